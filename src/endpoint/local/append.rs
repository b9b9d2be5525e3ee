//! Files that only grow: what is new of one is staged alone, and put at the end of what is there. It stays the same file, so that
//! whoever follows it goes on, and what it has already costs nothing.
//!
//! What always holds: what is put at its end was proven, with what is there, to be what was announced. Who reads it meanwhile sees a
//! beginning of that. Where a run is interrupted the next one puts the rest there; what somebody else did to the file until then is
//! noticed, since all of it is hashed then.

use std::fs::File;

use rustix::fs::{FallocateFlags, OFlags, fallocate};
use rustix::io::Errno;

use super::alike::Opened;
use super::metadata;
use super::target::{Run, io};
use crate::endpoint::Error;
use crate::manifest::{Content, Digest, Entry, Timestamp};
use crate::path::RelPath;
use crate::root::{FileKind, Follow, Metadata, Root};
use crate::staging::{copy_range, hash_of};

/// Where what is new is staged.
pub(super) const TAILS: &str = "tails";
const CHANGED: &str =
    "was changed by somebody else, who wrote to it while it was appended to; the next run brings it whole";

/// What a file was that is appended to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Former {
    pub(super) inode: u64,
    pub(super) length: u64,
    pub(super) ctime: Timestamp,
}

impl Former {
    pub(super) fn of(found: &Metadata) -> Former {
        Former { inode: found.inode, length: found.size, ctime: found.ctime }
    }

    /// In hexadecimal, but for the time.
    pub(super) fn encode(&self) -> String {
        let Former { inode, length, ctime: Timestamp { seconds, nanoseconds } } = *self;
        format!("{inode:x} {length:x} {seconds} {nanoseconds}")
    }

    pub(super) fn parse(text: &str) -> Option<Former> {
        let mut words = text.split(' ');
        let mut hex = || u64::from_str_radix(words.next()?, 16).ok();
        let (inode, length) = (hex()?, hex()?);
        let ctime = Timestamp { seconds: words.next()?.parse().ok()?, nanoseconds: words.next()?.parse().ok()? };
        words.next().is_none().then_some(Former { inode, length, ctime })
    }
}

/// Where what is new of the file at `path` is staged.
pub(super) fn tail(path: &RelPath) -> Result<RelPath, Error> {
    super::target::staged_in(b"tails/", path)
}

fn open(root: &Root, path: &RelPath) -> Result<(File, Metadata), Error> {
    let file = root.open_with(path, Follow::Never, OFlags::RDWR | OFlags::NONBLOCK | OFlags::NOCTTY, 0).map_err(io)?;
    let found = Metadata::of(&file).map_err(|source| failed(root, path, "look at", source))?;
    Ok((file, found))
}

fn failed(root: &Root, path: &RelPath, operation: &'static str, source: std::io::Error) -> Error {
    Error::Io { operation, path: crate::error::shown(&root.shown().join(path.as_path())).to_string(), source }
}

impl Run {
    /// What the file of `entry` is at the target, where it can be appended to: it only grows, nobody else has it under another name, it
    /// is published by itself and has all that it is to have but its content.
    pub(super) fn appends_to(&self, entry: &Entry, there: &Opened) -> Option<Former> {
        let path = &entry.path;
        let alone = !self.is_last(path) && self.unit_of(path, false).is_none();
        if !self.grows(path) || !alone || !self.publishes() || self.options.verify_disk {
            return None;
        }
        let (_, found) = open(&self.root, path).ok()?;
        let known = there.unchanged()?;
        let (wanted, ruled) = self.decided(entry).ok()?;
        let same = |asked: Option<u32>, has: u32| asked.is_none_or(|asked| asked == has);
        let fits = found.kind == FileKind::Regular
            && found.same_content(&known)
            && found.links == 1
            && entry.file().is_some_and(|(size, _)| found.size <= size)
            && found.mode == wanted.mode
            && found.mode & 0o111 == 0
            && same(wanted.uid, found.uid)
            && same(wanted.gid, found.gid);
        let differs = |lists| ruled && metadata::acl_differs(&self.root, path, lists);
        (fits && !wanted.acl.as_ref().is_some_and(differs)).then(|| Former::of(&found))
    }
}

/// Takes the room that the file at `path` needs to have `size` bytes, before it is written down that it gets them. Says what the file is then.
pub(super) fn reserve(root: &Root, path: &RelPath, former: &Former, size: u64) -> Result<Former, Error> {
    let (file, found) = open(root, path)?;
    if Former::of(&found) != *former || size <= former.length {
        // What became of it is seen when it is appended to.
        return Ok(*former);
    }
    match fallocate(&file, FallocateFlags::KEEP_SIZE, former.length, size - former.length) {
        // The file system cannot.
        Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => {}
        Err(errno) => return Err(failed(root, path, "make room in", errno.into())),
    }
    let found = Metadata::of(&file).map_err(|source| failed(root, path, "look at", source))?;
    Ok(Former { ctime: found.ctime, ..*former })
}

/// Puts what is staged of the file of `entry` at its end; again, where that was begun.
pub(super) fn append(root: &Root, staging: &Root, entry: &Entry, former: &Former) -> Result<(), Error> {
    let path = &entry.path;
    let Content::File { size, digest: Some(digest) } = entry.content else {
        return Err(Error::Usage("what is appended to has no digest".into()));
    };
    let tail = staging.open_read(&tail(path)?, Follow::Never).map_err(io)?;
    let changed = || Error::Refused { by: "the receiver".into(), reason: CHANGED.into() };
    let (file, found) = open(root, path)?;
    let same = found.kind == FileKind::Regular && found.inode == former.inode && found.links == 1;
    if !same || found.size < former.length || found.size > size {
        return Err(changed());
    }
    // RACE: what somebody writes between this look and the next lines is taken for what was there. Nobody is to write to what only
    // grows at a target; who does is noticed otherwise.
    let untouched = found.size == former.length && found.ctime == former.ctime;
    let wrong = |source| failed(root, path, "append to", source);
    copy_range((&tail, 0), (&file, former.length, false), size - former.length, &|| false).map_err(wrong)?;
    let now = Metadata::of(&file).map_err(wrong)?;
    if now.size < size {
        // It ends with a hole.
        file.set_len(size).map_err(wrong)?;
    }
    let is_whole = || hash_of(&file, size).map(|found: Digest| found == digest);
    let whole = now.size <= size && (untouched || is_whole().map_err(|error| wrong(std::io::Error::other(error)))?);
    if whole { Ok(()) } else { Err(changed()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sha2::{Digest as _, Sha256};

    const BEFORE: &[u8] = b"before ";
    const NEW: &[u8] = b"and new";

    /// A root with a file that is to be appended to, and what is staged of it.
    fn area() -> (tempfile::TempDir, Root, Root, Entry) {
        let at = tempfile::tempdir().unwrap();
        let root = Root::open(at.path()).unwrap();
        std::fs::create_dir_all(at.path().join("staging/tails")).unwrap();
        std::fs::write(at.path().join("log"), BEFORE).unwrap();
        std::fs::write(at.path().join("staging/tails/log"), NEW).unwrap();
        let staging = root.subroot(&RelPath::new("staging").unwrap()).unwrap();
        let whole = [BEFORE, NEW].concat();
        let content = Content::File { size: whole.len() as u64, digest: Some(Digest(Sha256::digest(&whole).into())) };
        let path = RelPath::new("log").unwrap();
        let mtime = Timestamp { seconds: 1, nanoseconds: 2 };
        (at, root, staging, Entry { path, content, mtime, mode: 0o644, owner: "u".into(), group: "g".into() })
    }

    fn former(root: &Root) -> Former {
        Former::of(&root.stat(&RelPath::new("log").unwrap(), Follow::Never).unwrap())
    }

    #[test]
    fn what_a_file_was_is_read_back() {
        let ctime = Timestamp { seconds: -3, nanoseconds: 999_999_999 };
        let former = Former { inode: u64::MAX, length: 1 << 40, ctime };
        assert_eq!(Former::parse(&former.encode()), Some(former));
        for damaged in ["", "1", "1 2 3", "1 2 3 4 5", "g 2 3 4", "1 2 x 4", "1 2 3 -4", "1 2 3 4 "] {
            assert_eq!(Former::parse(damaged), None, "{damaged:?}");
        }
    }

    #[test]
    fn h32_what_is_new_comes_to_the_end_and_again_after_it_was_interrupted_anywhere() {
        for begun in [None, Some(0), Some(3), Some(NEW.len())] {
            let (at, root, staging, entry) = area();
            let former = former(&root);
            if let Some(begun) = begun {
                // As if it had broken off here.
                std::fs::write(at.path().join("log"), [BEFORE, &NEW[..begun]].concat()).unwrap();
            }
            for _ in 0..2 {
                append(&root, &staging, &entry, &former).unwrap();
                assert_eq!(std::fs::read(at.path().join("log")).unwrap(), [BEFORE, NEW].concat());
            }
            assert_eq!(super::tests::former(&root).inode, former.inode);
        }
    }

    #[test]
    fn h36_what_somebody_else_did_to_it_is_noticed() {
        let written: [&[u8]; 5] = [b"BEFORE ", b"befor", b"before and NEW", b"before and new and more", b"before AND"];
        for theirs in written {
            let (at, root, staging, entry) = area();
            let former = former(&root);
            // Times move by ticks.
            std::thread::sleep(crate::scan::cache::GRANULARITY);
            std::fs::write(at.path().join("log"), theirs).unwrap();
            let result = append(&root, &staging, &entry, &former);
            // What they put at its end is written over: it is not what the file holds.
            assert_eq!(result.is_err(), !theirs.starts_with(BEFORE) || theirs.len() > 14, "{theirs:?}");
        }
        let (at, root, staging, entry) = area();
        let former = former(&root);
        std::fs::write(at.path().join("new"), BEFORE).unwrap();
        std::fs::rename(at.path().join("new"), at.path().join("log")).unwrap();
        assert!(append(&root, &staging, &entry, &former).is_err());
        assert_eq!(std::fs::read(at.path().join("log")).unwrap(), BEFORE);
    }

    #[test]
    fn a_hole_at_the_end_stays_one() {
        let (at, root, staging, entry) = area();
        let former = former(&root);
        let tail = File::options().write(true).open(at.path().join("staging/tails/log")).unwrap();
        tail.set_len(0).unwrap();
        tail.set_len(10 << 20).unwrap();
        let whole = [BEFORE, &vec![0; 10 << 20]].concat();
        let content = Content::File { size: whole.len() as u64, digest: Some(Digest(Sha256::digest(&whole).into())) };
        append(&root, &staging, &Entry { content, ..entry }, &former).unwrap();
        let found = root.stat(&RelPath::new("log").unwrap(), Follow::Never).unwrap();
        assert!(found.size == whole.len() as u64 && found.allocated < 1 << 20);
    }
}
