//! One file on its way: written and hashed, proven, given its permissions.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use rustix::fs::OFlags;

use super::copy::{copy_range, shares_blocks};
use super::hashing::{Hashing, Kept};
use crate::access::{AclLists, Inode};
use crate::manifest::{Digest, Timestamp};
use crate::path::RelPath;
use crate::root::{FileKind, Follow, Metadata, Root, RootError};
use crate::scan::cache::is_settled;

const EXECUTE_BITS: u32 = 0o111;
/// So much is copied before it is hashed.
const COPIED_AT_ONCE: usize = 512 << 10;
const SHORTER: &str = "it ends before that";
const READ_BACK: &str = "read the file back";
static ZEROS: [u8; 64 * 1024] = [0; 64 * 1024];

/// Setting an owner or a group; as an operation that failed.
pub const SET_OWNER: &str = "set the owner or group (who receives has to run as root to give files to others)";

/// Why a file was not staged. The path is told by who asked.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum StageError {
    #[error(transparent)]
    Root(#[from] RootError),
    #[error("cannot {operation}")]
    Io { operation: &'static str, source: io::Error },
    #[error("a write at {offset} of {length} bytes does not go on from {expected} within the announced {size} bytes")]
    OutOfPlace { offset: u64, length: u64, expected: u64, size: u64 },
    #[error("{written} bytes came, {size} were announced")]
    Short { written: u64, size: u64 },
    #[error("its SHA-256 is {found}, and {announced} was announced")]
    Mismatch { found: Digest, announced: Digest },
    #[error("cannot be made of what is there: {0}")]
    Copy(String),
    #[error("what is staged of it is no regular file of {expected} bytes or more")]
    NotResumable { expected: u64 },
}

impl StageError {
    /// Worth sending again from the start.
    pub fn retry(&self) -> bool {
        matches!(
            self,
            StageError::Copy(_)
                | StageError::Mismatch { .. }
                | StageError::NotResumable { .. }
                | StageError::Short { .. }
        )
    }

    /// The disk or the quota is full.
    pub fn storage_full(&self) -> bool {
        let kind = match self {
            StageError::Root(error) => error.kind(),
            StageError::Io { source, .. } => source.kind(),
            _ => return false,
        };
        is_full(kind)
    }
}

fn is_full(kind: io::ErrorKind) -> bool {
    matches!(kind, io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// What a file gets once it is proven.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Permissions {
    /// Mode with special bits.
    pub mode: u32,
    /// Owner; `None` leaves it.
    pub uid: Option<u32>,
    /// Group; `None` leaves it.
    pub gid: Option<u32>,
    /// Exactly these ACLs, none where they are empty; `None` leaves what is there.
    pub acl: Option<AclLists>,
    /// Time of last modification.
    pub mtime: Timestamp,
}

/// A file that is being staged. Dropped before [`StagedFile::finish`] it stays, to be resumed.
#[derive(Debug)]
pub struct StagedFile {
    file: File,
    hashing: Hashing,
    written: u64,
    size: u64,
    resumed: bool,
    /// What is staged begins here: what comes before lies elsewhere, and is hashed.
    base: u64,
    /// So much from its start on was taken from a file of which it is known what it holds, and is not hashed.
    unhashed: u64,
}

fn failed(operation: &'static str) -> impl Fn(io::Error) -> StageError {
    move |source| StageError::Io { operation, source }
}

impl StagedFile {
    /// Creates `path` beneath the staging root, 0600, for `size` bytes. Nothing is allocated yet.
    ///
    /// # Errors
    /// When something has the name already, or it cannot be created.
    pub fn create(staging: &Root, path: &RelPath, size: u64) -> Result<StagedFile, StageError> {
        let file = staging.create_new(path, 0o600)?;
        Ok(StagedFile { file, hashing: Hashing::of(size), written: 0, size, resumed: false, base: 0, unhashed: 0 })
    }

    /// The same of what follows the first `base` bytes alone, which are those of `before`; `kept` is kept of that.
    ///
    /// # Errors
    /// As [`StagedFile::create`]; also when it cannot be read.
    pub fn create_tail(
        staging: &Root,
        path: &RelPath,
        (size, base): (u64, u64),
        before: &File,
        kept: Option<&Kept>,
    ) -> Result<StagedFile, StageError> {
        let mut hashing = kept.map_or_else(|| Hashing::of(size), |kept| Hashing::after(size, base, kept));
        hash_to(before, 0, &mut hashing, base)?;
        let file = staging.create_new(path, 0o600)?;
        Ok(StagedFile { file, hashing, written: base, size, resumed: false, base, unhashed: 0 })
    }

    /// Goes on with what lies at `path`: its first `resume_at` bytes are hashed again, what is behind is dropped.
    ///
    /// # Errors
    /// [`StageError::NotResumable`] when there is less.
    pub fn resume(staging: &Root, path: &RelPath, size: u64, resume_at: u64) -> Result<StagedFile, StageError> {
        let open = || staging.open_with(path, Follow::Never, OFlags::RDWR | OFlags::NONBLOCK, 0);
        let not_resumable = StageError::NotResumable { expected: resume_at };
        let file = match open() {
            // It has its last mode already, which may forbid even its owner to write.
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                make_writable(staging, path).map_err(|_| not_resumable)?;
                open()?
            }
            other => other?,
        };
        let found = Metadata::of(&file).map_err(failed("look at the staged file"))?;
        let fits = found.kind == FileKind::Regular && found.links == 1 && found.size >= resume_at && resume_at <= size;
        if !fits {
            return Err(StageError::NotResumable { expected: resume_at });
        }
        file.set_len(resume_at).map_err(failed("cut the staged file"))?;
        let mut hashing = Hashing::of(size);
        hash_to(&file, 0, &mut hashing, resume_at)?;
        Ok(StagedFile { file, hashing, written: resume_at, size, resumed: true, base: 0, unhashed: 0 })
    }

    /// Checks a range before anything is done for it.
    fn advance(&self, offset: u64, length: u64) -> Result<u64, StageError> {
        let end = offset.checked_add(length).filter(|&end| offset == self.written && end <= self.size);
        end.ok_or(StageError::OutOfPlace { offset, length, expected: self.written, size: self.size })
    }

    /// Bytes at `offset`, which is where the last write ended.
    ///
    /// # Errors
    /// [`StageError::OutOfPlace`], or what the file system says.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Result<(), StageError> {
        let end = self.advance(offset, data.len() as u64)?;
        self.hash_it(None)?;
        self.file.write_all_at(data, offset - self.base).map_err(failed("write the staged file"))?;
        self.hashing.update(data);
        self.written = end;
        Ok(())
    }

    /// Zero bytes at `offset` that are not stored.
    ///
    /// # Errors
    /// As [`StagedFile::write`].
    pub fn hole(&mut self, offset: u64, length: u64) -> Result<(), StageError> {
        let end = self.advance(offset, length)?;
        self.hash_it(None)?;
        self.file.set_len(end - self.base).map_err(failed("make a hole"))?;
        let mut left = length;
        while left > 0 {
            let step = left.min(ZEROS.len() as u64);
            self.hashing.update(&ZEROS[..step as usize]);
            left -= step;
        }
        self.written = end;
        Ok(())
    }

    /// Bytes at `offset` that lie in another file from `at` on. Where `known`, they are not read yet: it is known of the other file
    /// what it holds, and whoever calls sees to it that it still does when all is taken.
    ///
    /// # Errors
    /// As [`StagedFile::write`]; [`StageError::Copy`] where the other file is shorter, or cannot be read: what is sent needs nothing of it.
    pub fn copy(&mut self, offset: u64, length: u64, from: &File, at: u64, known: bool) -> Result<(), StageError> {
        let end = self.advance(offset, length)?;
        if self.base > 0 {
            return Err(StageError::Copy("what is new of a file that only grows is sent".into()));
        }
        let known = known && at == offset && self.unhashed == self.written && !self.resumed;
        if !known {
            self.hash_it(None)?;
        }
        match known || shares_blocks(&self.file) {
            true => self.copy_in_kernel(offset, length, from, at, !known)?,
            false => self.copy_by_hand(offset, length, from, at)?,
        }
        self.written = end;
        if known {
            self.unhashed = end;
        }
        Ok(())
    }

    fn copy_in_kernel(&mut self, offset: u64, length: u64, from: &File, at: u64, hash: bool) -> Result<(), StageError> {
        let copied = copy_range((from, at), (&self.file, offset, false), length, &|| false);
        match copied {
            Ok(copied) if copied == length => {}
            Ok(_) => return Err(StageError::Copy(SHORTER.into())),
            Err(error) if is_full(error.kind()) => return Err(failed("write the staged file")(error)),
            Err(error) => return Err(StageError::Copy(crate::error::in_words(&error))),
        }
        // What is hashed is what is there now, whatever becomes of the other file.
        match hash {
            true => hash_to(&self.file, 0, &mut self.hashing, offset + length),
            false => Ok(()),
        }
    }

    /// Hashes by another thread what is written meanwhile.
    fn copy_by_hand(&mut self, offset: u64, length: u64, from: &File, at: u64) -> Result<(), StageError> {
        let (file, hashing) = (&self.file, &mut self.hashing);
        let (written, to_hash) = crossbeam_channel::bounded::<Vec<u8>>(1);
        let (used, free) = crossbeam_channel::unbounded();
        std::thread::scope(|scope| {
            let written = written;
            scope.spawn(move || {
                for buffer in to_hash {
                    hashing.update(&buffer);
                    let _ = used.send(buffer);
                }
            });
            let mut done = 0;
            while done < length {
                let step = (length - done).min(COPIED_AT_ONCE as u64);
                let mut buffer = free.try_recv().unwrap_or_default();
                buffer.resize(step as usize, 0);
                from.read_exact_at(&mut buffer, at.saturating_add(done)).map_err(|error| match error.kind() {
                    io::ErrorKind::UnexpectedEof => StageError::Copy(SHORTER.into()),
                    _ => StageError::Copy(crate::error::in_words(&error)),
                })?;
                file.write_all_at(&buffer, offset + done).map_err(failed("write the staged file"))?;
                done += step;
                // It takes all that comes, as long as this is here.
                let _ = written.send(buffer);
            }
            Ok(())
        })
    }

    /// Whether only what follows its beginning is staged.
    pub fn is_tail(&self) -> bool {
        self.base > 0
    }

    /// Whether it is, so far, taken from another file and not hashed.
    pub fn is_unhashed(&self) -> bool {
        self.unhashed > 0
    }

    /// Hashes what was taken without being read; from the last state of `kept` on, where the other file is the one that it is kept of, and
    /// still was when all was taken.
    ///
    /// # Errors
    /// As reading fails.
    pub fn hash_it(&mut self, kept: Option<&Kept>) -> Result<(), StageError> {
        if self.unhashed > 0 {
            let after = |kept| Hashing::after(self.size, self.unhashed, kept);
            self.hashing = kept.map_or_else(|| Hashing::of(self.size), after);
            hash_to(&self.file, 0, &mut self.hashing, self.unhashed)?;
            self.unhashed = 0;
        }
        Ok(())
    }

    /// Proves the content and then gives the permissions. With `verify_disk`, and for every file that gets an execute
    /// bit or was resumed, what lies on the disk is hashed too. Answers what it is now, and what is kept of it where it is large.
    ///
    /// # Errors
    /// [`StageError::Mismatch`] and [`StageError::Short`]: the caller removes the staged file.
    pub fn finish(
        self,
        announced: Digest,
        wanted: &Permissions,
        verify_disk: bool,
    ) -> Result<(Metadata, Option<Kept>), StageError> {
        if self.written != self.size {
            return Err(StageError::Short { written: self.written, size: self.size });
        }
        let known = self.unhashed == self.size && self.size > 0;
        let (hashed, kept) = self.hashing.finish();
        let found = if known { announced } else { hashed };
        if found != announced {
            return Err(StageError::Mismatch { found, announced });
        }
        if verify_disk || self.resumed || wanted.mode & EXECUTE_BITS != 0 {
            let found = hash_of(&self.file, self.size)?;
            if found != announced {
                return Err(StageError::Mismatch { found, announced });
            }
        }
        let inode = self.file.into();
        apply(&inode, wanted)?;
        let found = inode.metadata().map_err(failed("look at the staged file"))?;
        Ok((found, kept.filter(|_| !known)))
    }
}

/// A page that is dirty already is written to through a mapping without any time moving. So a file that changed not long ago has
/// its dirty pages written out before its content is remembered by its times: the next store to each then moves them.
///
/// What has not changed for longer than this has no dirty pages: the kernel writes them out within half a minute, unless it is
/// told to wait.
pub fn clean_pages(file: &File, seen: &Metadata) {
    if is_young(seen) {
        // Where it cannot be (a file system that is read-only), nobody writes.
        let _ = rustix::fs::fdatasync(file);
    }
}

/// Whether a file may have dirty pages, by its times.
pub fn is_young(seen: &Metadata) -> bool {
    const YOUNG: std::time::Duration = std::time::Duration::from_secs(15 * 60);
    !is_settled(seen, std::time::SystemTime::now() - YOUNG)
}

/// The SHA-256 of a file's first `length` bytes as they lie on the disk.
///
/// # Errors
/// When there are fewer, or they cannot be read.
pub fn hash_of(file: &File, length: u64) -> Result<Digest, StageError> {
    let mut hashing = Hashing::of(0);
    hash_to(file, 0, &mut hashing, length)?;
    Ok(hashing.finish().0)
}

/// The SHA-256 of the first bytes of two files, so many of each, one after the other.
///
/// # Errors
/// As [`hash_of`].
pub fn hash_of_both(first: (&File, u64), second: (&File, u64)) -> Result<Digest, StageError> {
    let mut hashing = Hashing::of(0);
    hash_to(first.0, 0, &mut hashing, first.1)?;
    hash_to(second.0, first.1, &mut hashing, first.1 + second.1)?;
    Ok(hashing.finish().0)
}

/// Gives a file of ours that has no other name the mode that it was staged with.
fn make_writable(staging: &Root, path: &RelPath) -> io::Result<()> {
    let inode = Inode::open(staging, Some(path)).map_err(|error| error.source)?;
    let found = inode.metadata()?;
    match found.kind == FileKind::Regular && found.links == 1 {
        true => inode.set_mode(0o600),
        false => Err(io::ErrorKind::PermissionDenied.into()),
    }
}

/// Hashes what lies on the disk, on to `end`; the file begins at `base` of what is hashed.
fn hash_to(file: &File, base: u64, hashing: &mut Hashing, end: u64) -> Result<(), StageError> {
    let mut buffer = vec![0; 256 * 1024];
    while hashing.at() < end {
        let step = (end - hashing.at()).min(buffer.len() as u64) as usize;
        file.read_exact_at(&mut buffer[..step], hashing.at() - base).map_err(failed(READ_BACK))?;
        hashing.update(&buffer[..step]);
    }
    Ok(())
}

/// Owner, ACL, mode, times, in this order: chown drops set-user-ID, and an ACL that was inherited would be woken up by
/// chmod, which widens its mask.
///
/// # Errors
/// What the file system says.
pub fn apply(inode: &Inode, wanted: &Permissions) -> Result<(), StageError> {
    if wanted.uid.is_some() || wanted.gid.is_some() {
        inode.set_owner(wanted.uid, wanted.gid).map_err(failed(SET_OWNER))?;
    }
    if let Some(lists) = &wanted.acl {
        inode.set_acls(lists).map_err(failed("set the ACL"))?;
    }
    inode.set_mode(wanted.mode).map_err(failed("set the mode"))?;
    inode.set_mtime(wanted.mtime).map_err(failed("set the times"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use sha2::{Digest as _, Sha256};
    use std::os::unix::fs::{MetadataExt, symlink};

    const WANTED: Permissions = Permissions {
        mode: 0o640,
        uid: None,
        gid: None,
        acl: Some(AclLists { access: None, default: None }),
        mtime: Timestamp { seconds: 7, nanoseconds: 9 },
    };

    fn area() -> (tempfile::TempDir, Root, RelPath) {
        let at = tempfile::tempdir().unwrap();
        let root = Root::open(at.path()).unwrap();
        (at, root, RelPath::new("f").unwrap())
    }

    fn digest(data: &[u8]) -> Digest {
        Digest(Sha256::digest(data).into())
    }

    #[test]
    fn s10_a_file_is_private_until_it_is_proven_and_then_gets_exactly_its_mode() {
        let (at, root, path) = area();
        let mut staged = StagedFile::create(&root, &path, 5).unwrap();
        staged.write(0, b"12345").unwrap();
        assert_eq!(std::fs::metadata(at.path().join("f")).unwrap().mode() & 0o7777, 0o600);
        staged.finish(digest(b"12345"), &Permissions { mode: 0o744, ..WANTED }, false).unwrap();
        let found = root.stat(&path, Follow::Never).unwrap();
        assert_eq!((found.mode, found.mtime), (0o744, WANTED.mtime));
    }

    #[test]
    fn s10_an_execute_bit_is_not_given_to_what_changed_on_the_disk() {
        let (at, root, path) = area();
        let mut staged = StagedFile::create(&root, &path, 5).unwrap();
        staged.write(0, b"12345").unwrap();
        std::fs::write(at.path().join("f"), "evil!").unwrap();
        let result = staged.finish(digest(b"12345"), &Permissions { mode: 0o755, ..WANTED }, false);
        assert!(matches!(result, Err(StageError::Mismatch { .. })));
        assert_eq!(root.stat(&path, Follow::Never).unwrap().mode, 0o600);
    }

    #[test]
    fn h23_a_write_out_of_place_is_refused_before_anything_is_stored() {
        let (_at, root, path) = area();
        let mut staged = StagedFile::create(&root, &path, 10).unwrap();
        for (offset, length) in [(u64::MAX, 4), (1, 4), (0, 11), (1 << 63, 1)] {
            let result = staged.write(offset, &vec![0; length]);
            assert!(matches!(result, Err(StageError::OutOfPlace { .. })), "{offset} {length}");
        }
        assert!(staged.hole(0, u64::MAX).is_err());
        assert_eq!(root.stat(&path, Follow::Never).unwrap().size, 0);
        let short = StagedFile { written: 3, ..staged }.finish(digest(b""), &WANTED, false);
        assert!(matches!(short, Err(StageError::Short { written: 3, size: 10 })));
    }

    #[test]
    fn h24_other_content_than_announced_is_refused_and_worth_another_try() {
        let (_at, root, path) = area();
        let mut staged = StagedFile::create(&root, &path, 1).unwrap();
        staged.write(0, b"a").unwrap();
        assert!(staged.finish(digest(b"b"), &WANTED, false).unwrap_err().retry());
    }

    #[test]
    fn h34_a_resumed_file_is_hashed_from_its_first_byte_on_the_disk() {
        for (damaged, good) in [(false, true), (true, false)] {
            let (at, root, path) = area();
            let mut staged = StagedFile::create(&root, &path, 200_010).unwrap();
            staged.write(0, b"12345678").unwrap();
            staged.hole(8, 200_000).unwrap();
            drop(staged);
            if damaged {
                std::fs::write(at.path().join("f"), vec![1; 200_008]).unwrap();
            }
            let mut staged = StagedFile::resume(&root, &path, 200_010, 200_008).unwrap();
            staged.write(200_008, b"ab").unwrap();
            let whole = [&b"12345678"[..], &vec![0; 200_000], b"ab"].concat();
            assert_eq!(staged.finish(digest(&whole), &WANTED, false).is_ok(), good);
        }
    }

    #[test]
    fn what_is_copied_is_hashed_at_once_or_when_something_else_follows() {
        let (at, root, path) = area();
        let data: Vec<u8> = (0..3_000_000_u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 7) as u8).collect();
        std::fs::write(at.path().join("other"), &data).unwrap();
        let other = File::open(at.path().join("other")).unwrap();
        let whole = [&data[..], b"tail"].concat();
        for known in [false, true] {
            let mut staged = StagedFile::create(&root, &path, whole.len() as u64).unwrap();
            for at in [0, 1_000_000, 2_000_000] {
                staged.copy(at, 1_000_000, &other, at, known).unwrap();
                assert_eq!(staged.is_unhashed(), known);
            }
            staged.write(data.len() as u64, b"tail").unwrap();
            assert!(!staged.is_unhashed());
            staged.finish(digest(&whole), &WANTED, false).unwrap();
            assert!(std::fs::read(at.path().join("f")).unwrap() == whole);
            std::fs::remove_file(at.path().join("f")).unwrap();
        }
        // As where the file system shares blocks.
        let mut staged = StagedFile::create(&root, &path, 2_000_000).unwrap();
        staged.copy_in_kernel(0, 1_500_000, &other, 1000, true).unwrap();
        staged.copy_in_kernel(1_500_000, 500_000, &other, 7, true).unwrap();
        staged.written = 2_000_000;
        let expected = [&data[1000..1_501_000], &data[7..500_007]].concat();
        staged.finish(digest(&expected), &WANTED, false).unwrap();
        std::fs::remove_file(at.path().join("f")).unwrap();
        // What lies elsewhere in the other file is hashed, whatever is known of that.
        let mut staged = StagedFile::create(&root, &path, 2000).unwrap();
        staged.copy(0, 1000, &other, 500, true).unwrap();
        staged.copy(1000, 1000, &other, 1000, true).unwrap();
        assert!(!staged.is_unhashed());
        let expected = [&data[500..1500], &data[1000..2000]].concat();
        assert!(matches!(staged.finish(digest(b"another"), &WANTED, false), Err(StageError::Mismatch { .. })));
        assert_eq!(std::fs::read(at.path().join("f")).unwrap(), expected);
        std::fs::remove_file(at.path().join("f")).unwrap();
        // Where it ends too early, or is beyond every place, the file is sent instead.
        let mut staged = StagedFile::create(&root, &path, 4_000_000).unwrap();
        for (length, from) in [(3_000_001, 0), (10, u64::MAX - 3)] {
            let error = staged.copy(0, length, &other, from, false).unwrap_err();
            assert!(matches!(error, StageError::Copy(_)) && error.retry(), "{error}");
        }
    }

    #[test]
    fn h15_h17_a_planted_link_is_neither_written_through_nor_resumed() {
        let (at, root, path) = area();
        std::fs::write(at.path().join("other"), "keep").unwrap();
        symlink("other", at.path().join("f")).unwrap();
        assert!(StagedFile::create(&root, &path, 1).is_err());
        assert!(StagedFile::resume(&root, &path, 9, 2).is_err());
        std::fs::remove_file(at.path().join("f")).unwrap();
        std::fs::hard_link(at.path().join("other"), at.path().join("f")).unwrap();
        assert!(matches!(StagedFile::resume(&root, &path, 9, 2), Err(StageError::NotResumable { .. })));
        assert_eq!(std::fs::read_to_string(at.path().join("other")).unwrap(), "keep");
    }
}
