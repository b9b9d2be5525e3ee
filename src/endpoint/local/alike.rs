//! What this target has that a file may be made of: the file that it is to replace, one with the same content, or one that is called
//! alike (the same shard of the checkpoint before).
//!
//! What always holds: nothing is decided by it but where content is looked for. What is made of it is hashed as a whole.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::unix::fs::FileExt as _;

use super::sums;
use super::target::{Run, State};
use crate::codec::chunks::{self, Chunk};
use crate::endpoint::BLOCK_BYTES;
use crate::endpoint::delta::{Alike, BLOCK_LENGTH, Beginning, Cut, DELTA_BYTES_MIN, Wanted, Within, candidates};
use crate::manifest::{Digest, Entry, Timestamp, Tree};
use crate::path::RelPath;
use crate::plan::Plan;
use crate::root::{FileKind, Fingerprint, Follow, Metadata, Root, Seen};
use crate::staging::Kept;

/// A part of a list covers about so much of a file: by its content, and by length, which takes a third of the time.
const PART_BYTES: u64 = 8 << 20;
const LENGTHS_BYTES: u64 = 32 << 20;

/// A file of the target, as it was listed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Candidate {
    path: RelPath,
    size: u64,
    mtime: Timestamp,
    digest: Option<Digest>,
    /// Of what was looked at what its digest is of.
    content: Option<Fingerprint>,
}

/// One of them that is read.
pub(super) struct Opened {
    pub(super) file: File,
    candidate: Candidate,
}

impl Opened {
    /// What stat says of it, where it is what it was when it was found out what it holds.
    pub(super) fn unchanged(&self) -> Option<Metadata> {
        let content = self.candidate.content.filter(|_| self.candidate.digest.is_some())?;
        Metadata::of(&self.file).ok().filter(|now| Fingerprint::from(now) == content)
    }

    /// Where it lies.
    pub(super) fn path(&self) -> &RelPath {
        &self.candidate.path
    }

    fn is_unchanged(&self) -> bool {
        self.unchanged().is_some()
    }

    /// Whether what begins as it does need not be hashed while it is copied: something is kept of it from which that is gone on.
    pub(super) fn is_kept(&self, root: &Root) -> bool {
        let Candidate { digest, size, .. } = &self.candidate;
        self.is_unchanged() && digest.is_some_and(|digest| sums::are_kept(root, digest, *size))
    }

    /// What is kept of what it holds now.
    pub(super) fn kept(&self, root: &Root) -> Option<Kept> {
        let Candidate { digest, size, .. } = &self.candidate;
        digest.filter(|_| self.is_unchanged()).and_then(|digest| sums::load_all(root, digest, *size))
    }

    /// Whether it may hold as a whole what has so many bytes, and this digest where it is known.
    pub(super) fn may_hold(&self, size: u64, digest: Option<Digest>) -> bool {
        match digest {
            Some(_) => self.holds(size, digest),
            None => self.candidate.size == size && self.is_unchanged(),
        }
    }

    /// Whether it is known to hold what has this digest, as a whole: it is what it was when that was found out.
    pub(super) fn holds(&self, size: u64, digest: Option<Digest>) -> bool {
        let Candidate { digest: own, size: own_size, .. } = &self.candidate;
        *own == digest && *own_size == size && self.is_unchanged()
    }
}

impl Candidate {
    /// Where it lies, if it holds what `entry` is to hold, by what is known of it.
    pub(super) fn is_all_of(&self, entry: &Entry) -> Option<&RelPath> {
        (self.digest.is_some() && entry.file() == Some((self.size, self.digest))).then_some(&self.path)
    }

    fn of(entry: &Entry) -> Option<Candidate> {
        let (size, digest) = entry.file().filter(|(size, _)| *size >= DELTA_BYTES_MIN)?;
        Some(Candidate { path: entry.path.clone(), size, mtime: entry.mtime, digest, content: None })
    }
}

/// For the files whose content is needed what each may be made of. `target` is what was looked at, with what stat said of it, `listed` all
/// that there was.
pub(super) fn find(
    source: &Tree,
    (target, seen): (&Tree, &[Seen]),
    listed: &Tree,
    plan: &Plan,
) -> BTreeMap<u32, Vec<Candidate>> {
    let candidate = |entry: &Entry| {
        let candidate = Candidate::of(entry)?;
        let looked_at = target.position(&entry.path).filter(|&at| target.entries()[at].file() == entry.file());
        let content = |at: usize| Some(seen.get(at)?.fingerprint(candidate.size, target.entries()[at].mtime));
        Some(Candidate { content: looked_at.and_then(content), ..candidate })
    };
    let found = candidates(source, target, listed, plan, DELTA_BYTES_MIN).into_iter().map(|(index, mut entries)| {
        // What it replaces is most often all that is needed.
        let replaced = source.entries().get(index as usize).map(|entry| &entry.path);
        if entries.first().map(|entry| &entry.path) == replaced {
            entries.truncate(1);
        }
        (index, entries.into_iter().filter_map(candidate).collect())
    });
    found.collect()
}

impl Run {
    /// A file that the one at `index` may be made of, unless it is not what it was.
    pub(super) fn open_alike(&self, index: u32, piece: u32) -> Option<Opened> {
        self.opened(&self.state(), index, piece)
    }

    /// The same, where the state is held.
    pub(super) fn opened(&self, state: &State, index: u32, piece: u32) -> Option<Opened> {
        let candidate = state.alike.get(&index)?.get(piece as usize)?.clone();
        let file = self.root.open_read(&candidate.path, Follow::Never).ok()?;
        let found = Metadata::of(&file).ok()?;
        let same = found.kind == FileKind::Regular && found.size == candidate.size && found.mtime == candidate.mtime;
        same.then_some(Opened { file, candidate })
    }

    /// What it holds from a place on; `None` where there is none.
    pub(super) fn alike(&self, index: u32, wanted: Wanted) -> Option<Alike> {
        let Opened { file, candidate } = self.open_alike(index, wanted.from.piece)?;
        let state = self.state();
        let pieces = state.alike.get(&index).map_or(0, |pieces| pieces.len() as u32);
        let file_wanted = state.source.entries().get(index as usize).and_then(Entry::file);
        drop(state);
        let known = (candidate.size, candidate.digest);
        if candidate.digest.is_some() && file_wanted == Some(known) {
            return Some(Alike { same: true, pieces, ..Alike::default() });
        }
        let from = wanted.from.offset;
        let there = file_wanted.and_then(|(size, _)| self.grown(&candidate, size, index, wanted.from));
        if wanted.cut == Cut::BySum
            && from.is_multiple_of(BLOCK_LENGTH as u64)
            && let Some(part) = candidate.digest.and_then(|digest| sums::load(&self.root, digest, candidate.size, from))
        {
            return Some(Alike { pieces, there, ..part });
        }
        // What cannot be read is not made anything of.
        list(&file, candidate.size, wanted).ok().map(|alike| Alike { pieces, there, ..alike })
    }

    /// What lies under the name of the file at `index`, of `size` bytes, where that only grows.
    fn grown(&self, there: &Candidate, size: u64, index: u32, from: Within) -> Option<Beginning> {
        let own = self.state().source.entries().get(index as usize).is_some_and(|entry| entry.path == there.path);
        let digest = there.digest.filter(|_| own && from == Within::default() && there.size <= size)?;
        self.grows(&there.path).then_some(Beginning { length: there.size, digest })
    }
}

fn list(file: &File, size: u64, wanted: Wanted) -> io::Result<Alike> {
    let (part, least, cut) = match wanted.cut {
        Cut::ByContent => (PART_BYTES, chunks::MAX_BYTES, Cut::ByContent),
        Cut::ByLength | Cut::BySum => (LENGTHS_BYTES, BLOCK_LENGTH, Cut::ByLength),
    };
    let mut alike = Alike { cut, ..Alike::default() };
    let (from, end) = (wanted.from.offset, size.min(wanted.to));
    let (mut buffer, mut read_to, mut at) = (Vec::new(), from, from);
    while at < end && at - from < part {
        while buffer.len() < least && read_to < size {
            let start = buffer.len();
            buffer.resize(start + BLOCK_BYTES, 0);
            let read = match file.read_at(&mut buffer[start..], read_to) {
                Err(error) if error.kind() == ErrorKind::Interrupted => Ok(0),
                // It became shorter.
                Ok(0) => Err(ErrorKind::UnexpectedEof.into()),
                other => other,
            }?;
            buffer.truncate(start + read);
            read_to += read as u64;
        }
        let mut done = 0;
        while at < end && at - from < part && done < buffer.len() && (buffer.len() - done >= least || read_to >= size) {
            let rest = &buffer[done..];
            let chunk = match cut {
                Cut::ByContent => Chunk::first_of(rest),
                _ => Some(Chunk::of(&rest[..rest.len().min(BLOCK_LENGTH.min((end - at) as usize))])),
            };
            let Some(chunk) = chunk else { break };
            alike.chunks.push(chunk);
            done += chunk.length as usize;
            at += u64::from(chunk.length);
        }
        buffer.drain(..done);
    }
    alike.next = (at < size).then_some(at);
    Ok(alike)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::endpoint::delta::Within;
    use crate::manifest::Content;
    use crate::plan::{Compare, Desired, diff};

    const MIB: u64 = 1 << 20;

    fn file(path: &str, size: u64, digest: Option<u8>, seconds: i64) -> Entry {
        let content = Content::File { size, digest: digest.map(|byte| Digest([byte; 32])) };
        let mtime = Timestamp { seconds, nanoseconds: 0 };
        Entry { path: RelPath::new(path).unwrap(), content, mtime, mode: 0o644, owner: "u".into(), group: "g".into() }
    }

    fn found(wanted: Entry, there: Vec<Entry>) -> Vec<String> {
        let directory = |path: &str| Entry { content: Content::Directory, ..file(path, 0, None, 0) };
        let with = |mut files: Vec<Entry>| {
            files.extend(["a", "b", "c"].map(directory));
            Tree::new(files).unwrap()
        };
        let (source, target) = (with(vec![wanted]), with(there));
        let as_sent =
            |_: usize, entry: &Entry| Desired { mode: entry.mode, owner: None, group: None, acl_differs: false };
        let plan = diff(&source, &target, &as_sent, Compare::default());
        let found = find(&source, (&target, &[]), &Tree::default(), &plan);
        found.into_values().flatten().map(|candidate| candidate.path.to_string()).collect()
    }

    #[test]
    fn the_most_alike_is_found() {
        let w = |size, digest| file("c/w.bin", size, digest, 9);
        for (what, wanted, there, expected) in [
            ("nothing", w(9 * MIB, None), vec![], &[][..]),
            (
                "what it replaces",
                w(9 * MIB, None),
                vec![file("a/w.bin", 9 * MIB, None, 5), file("c/w.bin", 8 * MIB, None, 1)],
                &["c/w.bin"],
            ),
            (
                "the same content",
                w(9 * MIB, Some(1)),
                vec![file("a/x", 9 * MIB, Some(1), 5), file("c/w.bin", 8 * MIB, Some(2), 1)],
                &["a/x"],
            ),
            (
                "the newest of its name",
                w(9 * MIB, None),
                vec![file("a/w.bin", 7 * MIB, None, 5), file("b/w.bin", 3 * MIB, None, 6)],
                &["b/w.bin", "a/w.bin"],
            ),
            (
                "one of its size and kind",
                w(9 * MIB, None),
                vec![file("a/v.bin", 9 * MIB, None, 5), file("b/v.txt", 9 * MIB, None, 6)],
                &["a/v.bin"],
            ),
            ("one that is too small", w(9 * MIB, None), vec![file("a/w.bin", MIB - 1, None, 5)], &[]),
            ("for one that is too small", w(MIB - 1, None), vec![file("a/w.bin", 9 * MIB, None, 5)], &[]),
        ] {
            assert_eq!(found(wanted, there), expected, "{what}");
        }
    }

    #[test]
    fn a_list_goes_on_where_its_part_before_ended() {
        let at = tempfile::tempdir().unwrap();
        let mut data = vec![0; 70 << 20];
        blake3::Hasher::new().finalize_xof().fill(&mut data);
        std::fs::write(at.path().join("f"), &data).unwrap();
        let file = File::open(at.path().join("f")).unwrap();
        let size = data.len() as u64;
        let wanted = |from, to, cut| Wanted { from: Within { piece: 0, offset: from }, to, cut };
        for (cut, expected) in [(Cut::ByContent, 9), (Cut::ByLength, 3), (Cut::BySum, 3)] {
            let (mut listed, mut from, mut parts) = (Vec::new(), Some(0), 0);
            while let Some(next) = from {
                let part = list(&file, size, wanted(next, u64::MAX, cut)).unwrap();
                listed.extend(part.chunks);
                (from, parts) = (part.next, parts + 1);
            }
            assert_eq!(parts, expected);
            let mut rest = &data[..];
            for chunk in listed {
                let length = rest.len().min(BLOCK_LENGTH);
                let own = if cut == Cut::ByContent { Chunk::first_of(rest) } else { Some(Chunk::of(&rest[..length])) };
                assert_eq!(own, Some(chunk));
                rest = &rest[chunk.length as usize..];
            }
            assert!(rest.is_empty());
            assert!(list(&file, size, wanted(size, u64::MAX, cut)).unwrap().chunks.is_empty());
        }
        assert!(list(&file, size + 1, wanted(size - MIB, u64::MAX, Cut::ByContent)).is_err());
        let lengths = |alike: Alike| alike.chunks.iter().map(|chunk| chunk.length).collect::<Vec<_>>();
        let part = list(&file, size, wanted(10, 10 + 65_536 + 7, Cut::ByLength)).unwrap();
        assert_eq!((lengths(part), size), (vec![65_536, 7], 70 << 20));
    }
}
