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
use super::metadata::{self, failed};
use super::target::{Run, io};
use crate::endpoint::Error;
use crate::manifest::{Content, Entry, Timestamp};
use crate::path::RelPath;
use crate::root::{FileKind, Follow, Metadata, Root};
use crate::staging::{copy_range, hash_of_both};

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

impl Run {
    /// Whether what is new of the file at `path` may be put at the end of what is there: it only grows, and is published by itself.
    pub(super) fn may_append(&self, path: &RelPath) -> bool {
        let alone = || !self.is_last(path) && self.unit_of(path, false).is_none();
        self.grows(path) && self.publishes() && !self.options.verify_disk && alone()
    }

    /// What the file of `entry` is at the target, where it can be appended to: nobody else has it under another name, nor is to, and it
    /// has all that it is to have but its content.
    pub(super) fn appends_to(&self, entry: &Entry, there: &Opened) -> Option<Former> {
        let path = &entry.path;
        let further = |entry: &Entry| matches!(&entry.content, Content::HardLink { first } if first == path);
        if !self.may_append(path) || self.state().source.entries().iter().any(further) {
            return None;
        }
        let (_, found) = open(&self.root, path).ok()?;
        let known = there.unchanged()?;
        let (wanted, ruled) = self.decided(entry).ok()?;
        let own = rustix::process::geteuid().as_raw();
        let same = |asked: Option<u32>, has: u32| asked.is_none_or(|asked| asked == has);
        let fits = found.kind == FileKind::Regular
            && found.same_content(&known)
            && found.links == 1
            && (found.uid == own || own == 0)
            && entry.file().is_some_and(|(size, _)| found.size <= size)
            && found.mode == wanted.mode
            && found.mode & 0o111 == 0
            && same(wanted.uid, found.uid)
            && same(wanted.gid, found.gid);
        let differs = |lists| ruled && metadata::acl_differs(&self.root, path, lists);
        (fits && !wanted.acl.as_ref().is_some_and(differs)).then(|| Former::of(&found))
    }
}

/// Takes the room that the file at `path` needs for what is staged of it, before it is written down that it gets that. Says what the file
/// is then.
///
/// # Errors
/// When there is no room. What else is wrong with the file is seen when it is appended to.
pub(super) fn reserve(root: &Root, staging: &Root, path: &RelPath, former: &Former) -> Result<Former, Error> {
    let as_it_was = Ok(*former);
    let (Ok(new), Ok((file, found))) = (staging.stat(&tail(path)?, Follow::Never), open(root, path)) else {
        return as_it_was;
    };
    // Of what has holes nobody needs room for all.
    if Former::of(&found) != *former || new.size == 0 || new.allocated < new.size {
        return as_it_was;
    }
    // Where the file system cannot, it is done without.
    let reserved = fallocate(&file, FallocateFlags::KEEP_SIZE, former.length, new.size);
    if let Err(errno @ (Errno::NOSPC | Errno::DQUOT)) = reserved {
        return Err(failed(root, path, "make room in", errno.into()));
    }
    Ok(Metadata::of(&file).map_or(*former, |now| Former { ctime: now.ctime, ..*former }))
}

/// Puts what is staged of the file of `entry` at its end. Where a run was interrupted that may have begun to (`again`), it is done anew.
pub(super) fn append(root: &Root, staging: &Root, entry: &Entry, former: &Former, again: bool) -> Result<(), Error> {
    let path = &entry.path;
    let Content::File { size, digest: Some(digest) } = entry.content else {
        return Err(Error::Usage("what is appended to has no digest".into()));
    };
    let new = staging.open_read(&tail(path)?, Follow::Never).map_err(io)?;
    let changed = || Error::Refused { by: "the receiver".into(), reason: CHANGED.into() };
    let (file, found) = open(root, path)?;
    let same = found.kind == FileKind::Regular && found.inode == former.inode && found.links == 1;
    if !same || found.size < former.length || found.size > size {
        return Err(changed());
    }
    let wrong = |source| failed(root, path, "append to", source);
    // RACE: what somebody writes to it from here on is not noticed before the file is read as a whole. Nobody else is to write to what
    // only grows at a target.
    if found.size != former.length || found.ctime != former.ctime {
        let proven = || hash_of_both((&file, former.length), (&new, size - former.length));
        if !again || proven().map_err(|error| wrong(std::io::Error::other(error)))? != digest {
            return Err(changed());
        }
    }
    let copied =
        copy_range((&new, 0), (&file, former.length, false), size - former.length, &|| false).map_err(wrong)?;
    let now = Metadata::of(&file).map_err(wrong)?;
    if copied == size - former.length && now.size == size { Ok(()) } else { Err(changed()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifest::Digest;
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
            for again in [begun.is_some(), true] {
                append(&root, &staging, &entry, &former, again).unwrap();
                assert_eq!(std::fs::read(at.path().join("log")).unwrap(), [BEFORE, NEW].concat());
            }
            assert_eq!(super::tests::former(&root).inode, former.inode);
        }
    }

    #[test]
    fn h36_what_somebody_else_did_to_it_is_noticed_before_anything_is_written() {
        for (theirs, again) in [
            (&b"BEFORE "[..], false),
            (b"BEFORE ", true),
            (b"befor", true),
            (b"before and NEW", false),
            (b"before and new and more", true),
            (b"BEFORE and new", true),
            (b"before ", false),
        ] {
            let (at, root, staging, entry) = area();
            let former = former(&root);
            // Times move by ticks.
            std::thread::sleep(crate::scan::cache::GRANULARITY);
            std::fs::write(at.path().join("log"), theirs).unwrap();
            assert!(append(&root, &staging, &entry, &former, again).is_err(), "{theirs:?}");
            assert_eq!(std::fs::read(at.path().join("log")).unwrap(), theirs);
        }
        let (at, root, staging, entry) = area();
        let former = former(&root);
        std::fs::write(at.path().join("new"), BEFORE).unwrap();
        std::fs::rename(at.path().join("new"), at.path().join("log")).unwrap();
        assert!(append(&root, &staging, &entry, &former, true).is_err());
        assert_eq!(std::fs::read(at.path().join("log")).unwrap(), BEFORE);
        // What is staged is shorter than it was when it was proven.
        let (at, root, staging, entry) = area();
        let former = super::tests::former(&root);
        std::fs::write(at.path().join("staging/tails/log"), &NEW[..3]).unwrap();
        assert!(append(&root, &staging, &entry, &former, false).is_err());
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
        assert_eq!(reserve(&root, &staging, &entry.path, &former).unwrap(), former);
        append(&root, &staging, &Entry { content, ..entry }, &former, false).unwrap();
        let found = root.stat(&RelPath::new("log").unwrap(), Follow::Never).unwrap();
        assert!(found.size == whole.len() as u64 && found.allocated < 1 << 20);
    }
}
