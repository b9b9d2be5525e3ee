//! What a good check saw, kept so that the next one need only see that nothing moved: `.lockstep/index`.
//!
//! It holds what stat said of everything in a tree that was as its manifest says, files whose content a digest vouches for
//! alone. A tree of which stat says the same now is as its manifest says now: the time of change of an inode cannot be put
//! back. Where anything at all differs nobody asks the index further, and the tree is compared with its manifest.
//!
//! Numbers are little-endian. The title; a header of lengths and of what is the same for all; owners' and groups' numbers and
//! names; directories, sorted by path; records of 64 bytes, by directory and sorted by name; names; the SHA-256 of all before.

use std::collections::BTreeMap;

use sha2::{Digest as _, Sha256};

use crate::manifest::{Content, Digest, Timestamp, Tree};
use crate::path::RelPath;
use crate::root::{FileKind, Metadata};

const TITLE: &[u8] = b"lockstep-index 1\n";
const RECORD_BYTES: usize = 64;
const DIRECTORY_BYTES: usize = 24;

/// What is said of the tree as a whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Whole {
    /// The file of the manifest.
    pub(super) manifest: Identity,
    /// That of the digest table, where there is one: what it vouches for may be another thing since.
    pub(super) table: Option<Identity>,
    /// SHA-256 of its text.
    pub(super) digest: Digest,
    pub(super) generation: u64,
    /// Of everything in the tree.
    pub(super) device: u64,
    /// Files and their bytes.
    pub(super) files: u64,
    pub(super) bytes: u64,
    /// When the oldest digest was computed, in seconds since 1970.
    pub(super) oldest: u64,
    /// What the directory was called, which says of some checkpoints whether they are finished.
    pub(super) name: String,
    /// Checkpoints that were recognised.
    pub(super) layouts: Vec<String>,
    /// Names of owners and of groups, by number.
    pub(super) owners: BTreeMap<u32, String>,
    pub(super) groups: BTreeMap<u32, String>,
}

/// What identifies the content of a file: inode, size, time of modification and of change.
pub(super) type Identity = (u64, u64, Timestamp, Timestamp);

/// That of a file.
pub(super) fn identity(metadata: &Metadata) -> Identity {
    (metadata.inode, metadata.size, metadata.mtime, metadata.ctime)
}

fn kind_of(kind: FileKind) -> Option<u8> {
    match kind {
        FileKind::Regular => Some(b'f'),
        FileKind::Directory => Some(b'd'),
        FileKind::Symlink => Some(b'l'),
        _ => None,
    }
}

/// What stat said of a name, in the form that is compared. Of a directory only its permissions: what is in it is looked at.
fn record(metadata: &Metadata) -> Option<[u8; RECORD_BYTES - 8]> {
    let kind = kind_of(metadata.kind)?;
    let mut bytes = [0; RECORD_BYTES - 8];
    bytes[..4].copy_from_slice(&(metadata.mode << 8 | u32::from(kind)).to_le_bytes());
    bytes[4..8].copy_from_slice(&metadata.uid.to_le_bytes());
    bytes[8..12].copy_from_slice(&metadata.gid.to_le_bytes());
    if metadata.kind != FileKind::Directory {
        bytes[12..16].copy_from_slice(&metadata.mtime.nanoseconds.to_le_bytes());
        bytes[16..24].copy_from_slice(&metadata.mtime.seconds.to_le_bytes());
        bytes[24..32].copy_from_slice(&metadata.ctime.seconds.to_le_bytes());
        bytes[32..36].copy_from_slice(&metadata.ctime.nanoseconds.to_le_bytes());
        bytes[36..44].copy_from_slice(&metadata.size.to_le_bytes());
        bytes[44..52].copy_from_slice(&metadata.inode.to_le_bytes());
    }
    Some(bytes)
}

/// The index of a tree; `None` where it cannot have one: it lies on several file systems, or is too large for its numbers.
pub(super) fn encode(whole: &Whole, tree: &Tree, metadata: &[Metadata]) -> Option<Vec<u8>> {
    let mut by_directory: BTreeMap<Option<RelPath>, BTreeMap<&[u8], &Metadata>> =
        BTreeMap::from([(None, BTreeMap::new())]);
    for (entry, found) in tree.entries().iter().zip(metadata) {
        if found.device != whole.device {
            return None;
        }
        by_directory.entry(entry.path.parent()).or_default().insert(entry.path.name(), found);
        if let Content::Directory = entry.content {
            by_directory.entry(Some(entry.path.clone())).or_default();
        }
    }
    let (mut directories, mut records, mut names) = (Vec::new(), Vec::new(), Vec::new());
    for (path, items) in &by_directory {
        let path = path.as_ref().map_or(&b""[..], RelPath::as_bytes);
        for number in [names.len(), path.len(), records.len() / RECORD_BYTES, items.len()] {
            directories.extend_from_slice(&u32::try_from(number).ok()?.to_le_bytes());
        }
        directories.extend_from_slice(&[0; DIRECTORY_BYTES - 16]);
        names.extend_from_slice(path);
        for (name, found) in items {
            records.extend_from_slice(&u32::try_from(names.len()).ok()?.to_le_bytes());
            records.extend_from_slice(&u32::try_from(name.len()).ok()?.to_le_bytes());
            records.extend_from_slice(&record(found)?);
            names.extend_from_slice(name);
        }
    }
    let header = header(whole);
    let mut bytes = TITLE.to_vec();
    for length in [header.len(), directories.len(), records.len(), names.len()] {
        bytes.extend_from_slice(&(length as u64).to_le_bytes());
    }
    for part in [header, directories, records, names] {
        bytes.extend_from_slice(&part);
    }
    let digest = Sha256::digest(&bytes);
    bytes.extend_from_slice(&digest);
    Some(bytes)
}

fn header(whole: &Whole) -> Vec<u8> {
    let of_file = |(inode, size, mtime, ctime): Identity| {
        let time = |Timestamp { seconds, nanoseconds }: Timestamp| serde_json::json!([seconds, nanoseconds]);
        serde_json::json!([inode, size, time(mtime), time(ctime)])
    };
    serde_json::json!({
        "manifest": of_file(whole.manifest),
        "table": whole.table.map(of_file),
        "digest": whole.digest.to_string(),
        "generation": whole.generation,
        "device": whole.device,
        "files": whole.files,
        "bytes": whole.bytes,
        "oldest": whole.oldest,
        "name": whole.name,
        "layouts": whole.layouts,
        "owners": whole.owners,
        "groups": whole.groups,
    })
    .to_string()
    .into_bytes()
}

fn read_header(bytes: &[u8]) -> Option<Whole> {
    let value: serde_json::Value = serde_json::from_slice(bytes).ok()?;
    let number = |name: &str| value[name].as_u64();
    let time = |value: &serde_json::Value| {
        let nanoseconds = u32::try_from(value[1].as_u64()?).ok()?;
        Some(Timestamp { seconds: value[0].as_i64()?, nanoseconds })
    };
    let of_file = |value: &serde_json::Value| -> Option<Identity> {
        Some((value[0].as_u64()?, value[1].as_u64()?, time(&value[2])?, time(&value[3])?))
    };
    let names = |name: &str| serde_json::from_value(value[name].clone()).ok();
    Some(Whole {
        manifest: of_file(&value["manifest"])?,
        table: if value["table"].is_null() { None } else { Some(of_file(&value["table"])?) },
        digest: Digest::from_hex(value["digest"].as_str()?.as_bytes())?,
        generation: number("generation")?,
        device: number("device")?,
        files: number("files")?,
        bytes: number("bytes")?,
        oldest: number("oldest")?,
        name: value["name"].as_str()?.to_owned(),
        layouts: serde_json::from_value(value["layouts"].clone()).ok()?,
        owners: names("owners")?,
        groups: names("groups")?,
    })
}

/// An index that was read. Whether it is whole is asked apart: it may be used meanwhile.
pub(super) struct Index {
    bytes: Vec<u8>,
    pub(super) whole: Whole,
    directories: std::ops::Range<usize>,
    records: std::ops::Range<usize>,
    names: std::ops::Range<usize>,
}

/// A directory of an index.
#[derive(Clone, Copy)]
pub(super) struct Directory<'a> {
    records: &'a [u8],
    names: &'a [u8],
}

fn number(bytes: &[u8], at: usize) -> Option<usize> {
    let bytes = bytes.get(at..at + 4)?.try_into().ok()?;
    usize::try_from(u32::from_le_bytes(bytes)).ok()
}

fn name<'a>(names: &'a [u8], from: &[u8]) -> Option<&'a [u8]> {
    let (start, length) = (number(from, 0)?, number(from, 4)?);
    names.get(start..start.checked_add(length)?)
}

impl Index {
    pub(super) fn new(bytes: Vec<u8>) -> Option<Index> {
        let body = bytes.len().checked_sub(32)?;
        let mut at = TITLE.len();
        bytes.get(..at).filter(|title| *title == TITLE)?;
        let mut lengths = [0; 4];
        for length in &mut lengths {
            let number = bytes.get(at..at + 8)?.try_into().ok()?;
            *length = usize::try_from(u64::from_le_bytes(number)).ok()?;
            at += 8;
        }
        let mut part = |length: usize| {
            let range = at..at.checked_add(length)?;
            at = range.end;
            (range.end <= body).then_some(range)
        };
        let (header, directories) = (part(lengths[0])?, part(lengths[1])?);
        let (records, names) = (part(lengths[2])?, part(lengths[3])?);
        let whole = read_header(&bytes[header])?;
        (names.end == body).then_some(Index { whole, directories, records, names, bytes })
    }

    /// Whether it is what was written.
    pub(super) fn is_whole(&self) -> bool {
        let (body, digest) = self.bytes.split_at(self.bytes.len() - 32);
        Sha256::digest(body)[..] == *digest
    }

    /// How many directories there are, with the root.
    pub(super) fn len(&self) -> usize {
        self.directories.len() / DIRECTORY_BYTES
    }

    /// The path of the directory with this number and what is in it. The empty path is the root.
    pub(super) fn directory(&self, index: usize) -> Option<(&[u8], Directory<'_>)> {
        let names = &self.bytes[self.names.clone()];
        let at = self.bytes[self.directories.clone()].chunks_exact(DIRECTORY_BYTES).nth(index)?;
        let (start, count) = (number(at, 8)?.checked_mul(RECORD_BYTES)?, number(at, 12)?.checked_mul(RECORD_BYTES)?);
        let records = self.bytes[self.records.clone()].get(start..start.checked_add(count)?)?;
        Some((name(names, at)?, Directory { records, names }))
    }
}

impl Directory<'_> {
    /// How many names are in it.
    pub(super) fn len(&self) -> usize {
        self.records.len() / RECORD_BYTES
    }

    /// Whether it has the name, and stat says the same of it.
    pub(super) fn agrees(&self, wanted: &[u8], found: &Metadata) -> bool {
        let at = |index: usize| &self.records[index * RECORD_BYTES..(index + 1) * RECORD_BYTES];
        let (mut low, mut high) = (0, self.len());
        while low < high {
            let middle = low + (high - low) / 2;
            let Some(here) = name(self.names, at(middle)) else { return false };
            match here.cmp(wanted) {
                std::cmp::Ordering::Equal => return record(found).is_some_and(|found| at(middle)[8..] == found),
                std::cmp::Ordering::Less => low = middle + 1,
                std::cmp::Ordering::Greater => high = middle,
            }
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifest::Entry;

    fn sample() -> (Whole, Tree, Vec<Metadata>) {
        let at = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(at.path().join("d/e")).unwrap();
        std::fs::write(at.path().join("d/f"), "x").unwrap();
        let mut metadata = Vec::new();
        let mut entry = |path: &str, content| {
            metadata.push(Metadata::of(&std::fs::File::open(at.path().join(path)).unwrap()).unwrap());
            let (mtime, owner) = (Timestamp::default(), "root".into());
            Entry { path: RelPath::new(path).unwrap(), content, mtime, mode: 0o644, owner, group: "root".into() }
        };
        let entries = vec![
            entry("d", Content::Directory),
            entry("d/e", Content::Directory),
            entry("d/f", Content::File { size: 1, digest: None }),
        ];
        let whole = Whole {
            manifest: (1, 2, Timestamp { seconds: -3, nanoseconds: 4 }, Timestamp::default()),
            table: Some((3, 4, Timestamp::default(), Timestamp { seconds: 1, nanoseconds: 2 })),
            digest: Digest([7; 32]),
            generation: 5,
            device: metadata[0].device,
            files: 1,
            bytes: 1,
            oldest: 6,
            name: "checkpoint-5".into(),
            layouts: vec!["huggingface .".into()],
            owners: BTreeMap::from([(0, "root".into())]),
            groups: BTreeMap::new(),
        };
        (whole, Tree::new(entries).unwrap(), metadata)
    }

    #[test]
    fn what_was_seen_is_recognised_and_anything_else_is_not() {
        let (whole, tree, metadata) = sample();
        let index = Index::new(encode(&whole, &tree, &metadata).unwrap()).unwrap();
        assert!(index.is_whole() && index.whole == whole && index.len() == 3);
        let paths: Vec<&[u8]> = (0..3).map(|number| index.directory(number).unwrap().0).collect();
        assert_eq!(paths, [&b""[..], b"d", b"d/e"]);
        let (path, inside) = index.directory(1).unwrap();
        assert_eq!((path, inside.len()), (&b"d"[..], 2));
        let file = metadata[2];
        assert!(inside.agrees(b"f", &file) && inside.agrees(b"e", &metadata[1]));
        assert!(!inside.agrees(b"g", &file) && !inside.agrees(b"", &file) && !inside.agrees(b"e", &file));
        let other: [fn(&mut Metadata); 8] = [
            |one| one.size += 1,
            |one| one.inode += 1,
            |one| one.mode ^= 0o4000,
            |one| one.uid += 1,
            |one| one.gid += 1,
            |one| one.mtime.nanoseconds ^= 1,
            |one| one.ctime.nanoseconds ^= 1,
            |one| one.kind = FileKind::Fifo,
        ];
        for (number, change) in other.into_iter().enumerate() {
            let mut changed = file;
            change(&mut changed);
            assert!(!inside.agrees(b"f", &changed), "{number}");
        }
        let elsewhere = Metadata { device: file.device + 1, ..file };
        assert!(encode(&whole, &tree, &[metadata[0], metadata[1], elsewhere]).is_none());
    }

    #[test]
    fn damage_anywhere_is_noticed_and_nothing_panics() {
        let (whole, tree, metadata) = sample();
        let bytes = encode(&whole, &tree, &metadata).unwrap();
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 0x81;
            if let Some(index) = Index::new(damaged) {
                assert!(!index.is_whole(), "{at}");
                for number in 0..index.len() {
                    if let Some((_, inside)) = index.directory(number) {
                        inside.agrees(b"f", &metadata[2]);
                    }
                }
            }
            assert!(Index::new(bytes[..at].to_vec()).is_none_or(|index| !index.is_whole()), "{at}");
        }
    }
}
