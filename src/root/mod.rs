//! The one way into a tree: a directory's descriptor, and paths that are resolved beneath it.
//!
//! What always holds: no operation reaches anything outside the directory, whatever is renamed, linked or replaced
//! in the tree meanwhile, and none follows a symbolic link in the last component unless [`Follow::Beneath`] says so.
//! Where openat2(2) is not to be had (a seccomp filter answers ENOSYS) paths are walked component by component.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{self, AtFlags, Mode, OFlags, RenameFlags, ResolveFlags, Timespec, Timestamps, UTIME_OMIT};
use rustix::io::Errno;

use crate::error::Escaped;
use crate::manifest::Timestamp;
use crate::path::RelPath;

mod attributes;
mod below;
mod metadata;
mod places;

pub use attributes::Change;
pub use metadata::{FileKind, Fingerprint, Metadata, Seen};

/// Whether symbolic links are followed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Follow {
    /// In no component.
    Never,
    /// Where they lead to something beneath the root.
    Beneath,
    /// As if the root were `/`: an absolute link starts at the root, and `..` of the root is the root.
    Inside,
}

/// An operation that failed on a path.
#[derive(Debug, thiserror::Error)]
#[error("cannot {operation} '{}'", Escaped(path.as_os_str().as_encoded_bytes()))]
pub struct RootError {
    /// What was to be done, as a verb.
    pub operation: &'static str,
    /// The whole path, for people.
    pub path: PathBuf,
    /// Why it failed.
    pub source: io::Error,
}

impl RootError {
    /// The kind of the cause.
    pub fn kind(&self) -> io::ErrorKind {
        self.source.kind()
    }

    /// The cause as errno, where it has one.
    pub fn errno(&self) -> Option<i32> {
        self.source.raw_os_error()
    }
}

/// What a file system has left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FreeSpace {
    /// Bytes; `u64::MAX` where it is not said.
    pub bytes: u64,
    /// Inodes; `None` where they are made as needed.
    pub inodes: Option<u64>,
}

type Result<T> = std::result::Result<T, RootError>;

/// Whether this process may use openat2(2). Filters of containers and of systemd answer ENOSYS or EPERM where it may not.
pub fn has_openat2() -> bool {
    static HAS_IT: OnceLock<bool> = OnceLock::new();
    *HAS_IT.get_or_init(|| {
        let (flags, mode) = (OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty());
        let tried = fs::openat2(fs::CWD, "/", flags, mode, ResolveFlags::empty());
        !matches!(tried, Err(Errno::NOSYS | Errno::PERM))
    })
}

/// A directory and everything beneath it.
#[derive(Debug)]
pub struct Root {
    directory: OwnedFd,
    /// Where it was opened; for messages only.
    shown: PathBuf,
    /// openat2 is not to be had.
    walk: AtomicBool,
}

impl Root {
    /// Opens a directory as a root. Links in `path` itself are followed: whoever names the root is trusted.
    ///
    /// # Errors
    /// When it is not there, not a directory, or not to be opened.
    pub fn open(path: &Path) -> Result<Root> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = fs::open(path, flags, Mode::empty()).map_err(|errno| RootError {
            operation: "open the directory",
            path: path.to_owned(),
            source: errno.into(),
        })?;
        Ok(Root { directory, shown: path.to_owned(), walk: AtomicBool::new(!has_openat2()) })
    }

    /// The same, but paths are walked component by component, as where openat2(2) is not to be had.
    ///
    /// # Errors
    /// As [`Root::open`].
    pub fn open_without_openat2(path: &Path) -> Result<Root> {
        let root = Root::open(path)?;
        root.walk.store(true, Ordering::Relaxed);
        Ok(root)
    }

    /// The same directory once more.
    ///
    /// # Errors
    /// When it may not be opened any more, or there are too many descriptors.
    pub fn reopen(&self) -> Result<Root> {
        let directory = self.open_dir(None, Follow::Never)?;
        Ok(Root { directory, shown: self.shown.clone(), walk: AtomicBool::new(self.walk.load(Ordering::Relaxed)) })
    }

    /// A directory beneath as a root of its own. Follows no link.
    ///
    /// # Errors
    /// When it is not a directory, or not to be opened.
    pub fn subroot(&self, path: &RelPath) -> Result<Root> {
        let directory = self.open_dir(Some(path), Follow::Never)?;
        Ok(Root { directory, shown: self.whole(path), walk: AtomicBool::new(self.walk.load(Ordering::Relaxed)) })
    }

    /// Where it was opened, for messages.
    pub fn shown(&self) -> &Path {
        &self.shown
    }

    fn whole(&self, path: &RelPath) -> PathBuf {
        self.shown.join(path.as_path())
    }

    fn failed<T>(&self, operation: &'static str, path: Option<&RelPath>, result: rustix::io::Result<T>) -> Result<T> {
        result.map_err(|errno| RootError {
            operation,
            path: path.map_or_else(|| self.shown.clone(), |path| self.whole(path)),
            source: errno.into(),
        })
    }

    /// The descriptor for `path`, by whatever means the kernel offers.
    fn resolve(&self, path: &[u8], follow: Follow, flags: OFlags, mode: Mode) -> rustix::io::Result<OwnedFd> {
        let flags = flags | OFlags::CLOEXEC;
        if !self.walk.load(Ordering::Relaxed) {
            let resolve = ResolveFlags::NO_MAGICLINKS
                | match follow {
                    Follow::Never => ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS,
                    Follow::Beneath => ResolveFlags::BENEATH,
                    Follow::Inside => ResolveFlags::IN_ROOT,
                };
            for _ in 0..64 {
                match fs::openat2(&self.directory, path, flags, mode, resolve) {
                    // RACE: something was renamed while '..' of a link was resolved; the kernel asks to try again.
                    Err(Errno::AGAIN) => {}
                    Err(Errno::NOSYS) => {
                        self.walk.store(true, Ordering::Relaxed);
                        return self.walk(path, follow, flags, mode);
                    }
                    other => return other,
                }
            }
            return Err(Errno::AGAIN);
        }
        self.walk(path, follow, flags, mode)
    }

    /// The fallback: each component is opened by itself and follows no link. Links are read and walked by hand, and
    /// one that is absolute or leads above the root is refused or stays inside, as openat2 does.
    fn walk(&self, path: &[u8], follow: Follow, flags: OFlags, mode: Mode) -> rustix::io::Result<OwnedFd> {
        let components = |path: &[u8]| -> Vec<Vec<u8>> {
            path.split(|&byte| byte == b'/')
                .filter(|part| !part.is_empty() && *part != b".")
                .map(<[u8]>::to_vec)
                .collect()
        };
        let step = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        // The directories passed through, so that '..' of a link goes back over descriptors and never by name.
        let mut passed: Vec<OwnedFd> = Vec::new();
        let mut left = components(path);
        left.reverse();
        let mut links = 0;
        while let Some(name) = left.pop() {
            let here = passed.last().map_or(self.directory.as_fd(), AsFd::as_fd);
            if name == b".." {
                if passed.pop().is_none() && follow != Follow::Inside {
                    return Err(Errno::XDEV);
                }
                continue;
            }
            let last = left.is_empty();
            let link = match fs::readlinkat(here, name.as_slice(), Vec::new()) {
                Ok(target) => Some(target.into_bytes()),
                Err(_) => None,
            };
            if let Some(target) = link {
                let wanted = flags.contains(OFlags::NOFOLLOW) && last;
                if wanted || (flags.contains(OFlags::CREATE | OFlags::EXCL) && last) {
                    return fs::openat(here, name.as_slice(), flags | OFlags::NOFOLLOW, mode);
                }
                links += 1;
                if follow == Follow::Never || links > 40 {
                    return Err(Errno::LOOP);
                }
                if target.starts_with(b"/") {
                    if follow != Follow::Inside {
                        return Err(Errno::XDEV);
                    }
                    passed.clear();
                }
                left.extend(components(&target).into_iter().rev());
                continue;
            }
            if last {
                return fs::openat(here, name.as_slice(), flags | OFlags::NOFOLLOW, mode);
            }
            let next = fs::openat(here, name.as_slice(), step, Mode::empty())?;
            if follow == Follow::Never {
                // Without links there is no way back: one descriptor is enough, however deep the path.
                passed.clear();
            }
            passed.push(next);
        }
        let here = passed.last().map_or(self.directory.as_fd(), AsFd::as_fd);
        fs::openat(here, ".", flags.difference(OFlags::NOFOLLOW), mode)
    }

    /// The directory that holds `path`, and its last name. No link is followed.
    fn parent<'p>(&self, path: &'p RelPath) -> rustix::io::Result<(Parent<'_>, &'p [u8])> {
        let bytes = path.as_bytes();
        Ok(match bytes.iter().rposition(|&byte| byte == b'/') {
            None => (Parent::Root(self.directory.as_fd()), bytes),
            Some(at) => {
                let flags = OFlags::PATH | OFlags::DIRECTORY;
                (Parent::Below(self.resolve(&bytes[..at], Follow::Never, flags, Mode::empty())?), &bytes[at + 1..])
            }
        })
    }

    /// Opens what is there, or creates it. The flags are those of open(2); O_NOFOLLOW and O_CLOEXEC are added for
    /// [`Follow::Never`].
    ///
    /// # Errors
    /// As open(2); EXDEV where a link leads out of the root, ELOOP where none may be followed.
    pub fn open_with(&self, path: &RelPath, follow: Follow, flags: OFlags, mode: u32) -> Result<File> {
        let flags = if follow == Follow::Never { flags | OFlags::NOFOLLOW } else { flags };
        let result = self.resolve(path.as_bytes(), follow, flags, Mode::from_raw_mode(mode));
        self.failed("open", Some(path), result).map(File::from)
    }

    /// Opens for reading. Does not wait for a writer where the path is a FIFO: check the kind before reading.
    ///
    /// # Errors
    /// As [`Root::open_with`].
    pub fn open_read(&self, path: &RelPath, follow: Follow) -> Result<File> {
        self.open_with(path, follow, OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY, 0)
    }

    /// Creates a file that was not there, for reading and writing.
    ///
    /// # Errors
    /// EEXIST when something has the name, a dangling link too.
    pub fn create_new(&self, path: &RelPath, mode: u32) -> Result<File> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW;
        let result = self.resolve(path.as_bytes(), Follow::Never, flags, Mode::from_raw_mode(mode));
        self.failed("create", Some(path), result).map(File::from)
    }

    /// Opens a directory; `None` is the root itself.
    ///
    /// # Errors
    /// ENOTDIR when it is something else.
    pub fn open_dir(&self, path: Option<&RelPath>, follow: Follow) -> Result<OwnedFd> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY;
        let result = match path {
            None => fs::openat(&self.directory, ".", flags | OFlags::CLOEXEC, Mode::empty()),
            Some(path) => self.resolve(path.as_bytes(), follow, flags, Mode::empty()),
        };
        self.failed("open the directory", path, result)
    }

    /// What a path is.
    ///
    /// # Errors
    /// ENOENT when there is nothing.
    pub fn stat(&self, path: &RelPath, follow: Follow) -> Result<Metadata> {
        let result = match follow {
            Follow::Never => self.parent(path).and_then(|(parent, name)| metadata::stat_at(parent.as_fd(), name)),
            Follow::Beneath | Follow::Inside => self
                .resolve(path.as_bytes(), follow, OFlags::PATH, Mode::empty())
                .and_then(|descriptor| metadata::stat_descriptor(descriptor.as_fd())),
        };
        self.failed("look at", Some(path), result)
    }

    /// What the root itself is.
    ///
    /// # Errors
    /// As fstat(2).
    pub fn stat_root(&self) -> Result<Metadata> {
        self.failed("look at", None, metadata::stat_descriptor(self.directory.as_fd()))
    }

    /// Makes a directory.
    ///
    /// # Errors
    /// EEXIST when something has the name.
    pub fn mkdir(&self, path: &RelPath, mode: u32) -> Result<()> {
        let result =
            self.parent(path).and_then(|(parent, name)| fs::mkdirat(parent.as_fd(), name, Mode::from_raw_mode(mode)));
        self.failed("make the directory", Some(path), result)
    }

    /// Makes a directory and those above it that are missing.
    ///
    /// # Errors
    /// ENOTDIR or ELOOP when something else has one of the names.
    pub fn mkdir_all(&self, path: &RelPath, mode: u32) -> Result<()> {
        for directory in path.ancestors().chain([path.clone()]) {
            match self.mkdir(&directory, mode) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                other => other?,
            }
        }
        self.open_dir(Some(path), Follow::Never).map(drop)
    }

    /// Removes what is not a directory.
    ///
    /// # Errors
    /// As unlink(2).
    pub fn unlink(&self, path: &RelPath) -> Result<()> {
        let result = self.parent(path).and_then(|(parent, name)| fs::unlinkat(parent.as_fd(), name, AtFlags::empty()));
        self.failed("remove", Some(path), result)
    }

    /// Removes an empty directory.
    ///
    /// # Errors
    /// As rmdir(2).
    pub fn rmdir(&self, path: &RelPath) -> Result<()> {
        let result =
            self.parent(path).and_then(|(parent, name)| fs::unlinkat(parent.as_fd(), name, AtFlags::REMOVEDIR));
        self.failed("remove the directory", Some(path), result)
    }

    /// Gives the owner of a directory every right in it. Without them its names cannot be changed, by other users than
    /// root.
    ///
    /// # Errors
    /// When it is not a directory of this user.
    pub fn open_up(&self, path: &RelPath) -> Result<()> {
        let directory = self.open_dir(Some(path), Follow::Never)?;
        let opened = fs::fstat(&directory).and_then(|stat| {
            let mode = Mode::from_raw_mode(stat.st_mode & 0o7777 | 0o700);
            fs::fchmod(&directory, mode)
        });
        self.failed("make writable", Some(path), opened)
    }

    /// Removes what is not a directory, also from a directory of this user that forbids it, which is opened up.
    ///
    /// # Errors
    /// As unlink(2).
    pub fn unlink_anyway(&self, path: &RelPath) -> Result<()> {
        match (self.unlink(path), path.parent()) {
            (Err(error), Some(above)) if error.errno() == Some(Errno::ACCESS.raw_os_error()) => {
                self.open_up(&above)?;
                self.unlink(path)
            }
            (result, _) => result,
        }
    }

    /// Removes a path and everything beneath it; nothing there is no error. Links are removed, never followed.
    /// Directories of this user that forbid it are opened up.
    ///
    /// # Errors
    /// The first path that could not be removed.
    pub fn remove_tree(&self, path: &RelPath) -> Result<()> {
        match self.unlink(path) {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) if !matches!(error.kind(), io::ErrorKind::IsADirectory | io::ErrorKind::PermissionDenied) => {
                return Err(error);
            }
            Err(_) => {}
        }
        // A stack of directories instead of recursion: trees may be deeper than a thread's stack.
        let mut stack = vec![(path.clone(), false)];
        while let Some((directory, emptied)) = stack.pop() {
            if emptied {
                let removed = self.rmdir(&directory);
                match (removed, directory.parent()) {
                    (Err(error), Some(above)) if error.errno() == Some(Errno::ACCESS.raw_os_error()) => {
                        self.open_up(&above)?;
                        self.rmdir(&directory)?;
                    }
                    (removed, _) => removed?,
                }
                continue;
            }
            let names = self.names(Some(&directory), Follow::Never)?;
            stack.push((directory.clone(), true));
            for name in names {
                let Ok(child) = directory.join(&name) else {
                    // Longer than a path may be: it is removed from further down.
                    if let Ok(name) = RelPath::new(&name) {
                        self.subroot(&directory)?.remove_tree(&name)?;
                    }
                    continue;
                };
                match self.unlink_anyway(&child) {
                    Ok(()) => {}
                    Err(error) if error.kind() == io::ErrorKind::IsADirectory => stack.push((child, false)),
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(())
    }

    /// Renames within the root; a link in the last component is renamed itself. With no flags an existing target
    /// that is not a directory is replaced.
    ///
    /// # Errors
    /// As renameat2(2).
    pub fn rename(&self, from: &RelPath, to: &RelPath, flags: RenameFlags) -> Result<()> {
        self.rename_to(from, self, to, flags)
    }

    /// Renames into another root on the same file system.
    ///
    /// # Errors
    /// As renameat2(2).
    pub fn rename_to(&self, from: &RelPath, root: &Root, to: &RelPath, flags: RenameFlags) -> Result<()> {
        let result = self.parent(from).and_then(|(old, old_name)| {
            let (new, new_name) = root.parent(to)?;
            if flags.is_empty() {
                fs::renameat(old.as_fd(), old_name, new.as_fd(), new_name)
            } else {
                fs::renameat_with(old.as_fd(), old_name, new.as_fd(), new_name, flags)
            }
        });
        root.failed("rename to", Some(to), result)
    }

    /// Makes a symbolic link. Its target is not interpreted.
    ///
    /// # Errors
    /// EEXIST when something has the name.
    pub fn symlink(&self, target: &[u8], path: &RelPath) -> Result<()> {
        let result = self.parent(path).and_then(|(parent, name)| fs::symlinkat(target, parent.as_fd(), name));
        self.failed("make the link", Some(path), result)
    }

    /// Sets the time of modification of what has the name; a link is not followed.
    ///
    /// # Errors
    /// As utimensat(2).
    pub fn set_mtime(&self, path: &RelPath, mtime: Timestamp) -> Result<()> {
        let result = self.parent(path).and_then(|(parent, name)| {
            let omit = Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT };
            let at = Timespec { tv_sec: mtime.seconds, tv_nsec: mtime.nanoseconds.into() };
            let times = Timestamps { last_access: omit, last_modification: at };
            fs::utimensat(parent.as_fd(), name, &times, AtFlags::SYMLINK_NOFOLLOW)
        });
        self.failed("set the time of", Some(path), result)
    }

    /// Gives a file a further name; a link is not followed.
    ///
    /// # Errors
    /// As linkat(2).
    pub fn hard_link(&self, from: &RelPath, to: &RelPath) -> Result<()> {
        let result = self.parent(from).and_then(|(old, old_name)| {
            let (new, new_name) = self.parent(to)?;
            fs::linkat(old.as_fd(), old_name, new.as_fd(), new_name, AtFlags::empty())
        });
        self.failed("link", Some(to), result)
    }

    /// The target of a symbolic link.
    ///
    /// # Errors
    /// EINVAL when it is none.
    pub fn read_link(&self, path: &RelPath) -> Result<Vec<u8>> {
        let result = self.parent(path).and_then(|(parent, name)| fs::readlinkat(parent.as_fd(), name, Vec::new()));
        self.failed("read the link", Some(path), result).map(std::ffi::CString::into_bytes)
    }

    /// The names in a directory, without `.` and `..`, in no order; `None` is the root itself.
    ///
    /// # Errors
    /// As opendir(3) and readdir(3).
    pub fn names(&self, path: Option<&RelPath>, follow: Follow) -> Result<Vec<Vec<u8>>> {
        self.names_in(&self.open_dir(path, follow)?, path)
    }

    /// The names in a directory that [`Root::open_dir`] opened; `path` is for messages.
    ///
    /// # Errors
    /// As readdir(3).
    pub fn names_in(&self, directory: &OwnedFd, path: Option<&RelPath>) -> Result<Vec<Vec<u8>>> {
        let names = || -> rustix::io::Result<Vec<Vec<u8>>> {
            let mut names = Vec::new();
            for entry in fs::Dir::read_from(directory)? {
                let entry = entry?;
                let name = entry.file_name().to_bytes();
                if name != b"." && name != b".." {
                    names.push(name.to_vec());
                }
            }
            Ok(names)
        };
        self.failed("list", path, names())
    }

    /// What is free on its file system for whoever asks.
    ///
    /// # Errors
    /// As fstatvfs(3).
    pub fn free_space(&self) -> Result<FreeSpace> {
        let stat = self.failed("look at the file system of", None, fs::fstatvfs(&self.directory))?;
        let inodes = (stat.f_files > 0).then_some(stat.f_favail);
        // Some FUSE file systems say nothing of their size.
        let bytes = if stat.f_blocks == 0 { u64::MAX } else { stat.f_bavail.saturating_mul(stat.f_frsize) };
        Ok(FreeSpace { bytes, inodes })
    }

    /// Writes everything of the file system to stable storage.
    ///
    /// # Errors
    /// EIO or ENOSPC when something that was written before could not be stored.
    pub fn sync_filesystem(&self) -> Result<()> {
        self.failed("write to stable storage", None, fs::syncfs(&self.directory))
    }

    /// Writes a directory's names to stable storage; `None` is the root itself.
    ///
    /// # Errors
    /// As fsync(2).
    pub fn sync_dir(&self, path: Option<&RelPath>) -> Result<()> {
        let directory = self.open_dir(path, Follow::Never)?;
        self.failed("write to stable storage", path, fs::fsync(&directory))
    }
}

/// A directory that holds a name.
enum Parent<'a> {
    Root(BorrowedFd<'a>),
    Below(OwnedFd),
}

impl AsFd for Parent<'_> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Parent::Root(descriptor) => *descriptor,
            Parent::Below(descriptor) => descriptor.as_fd(),
        }
    }
}

#[cfg(test)]
mod tests;
