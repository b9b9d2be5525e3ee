//! Where things are: the directory that holds a path, opened over links, and the path of what is open.

use std::os::fd::{AsFd, AsRawFd as _};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{self, AtFlags, Mode, OFlags};
use rustix::io::Errno;

use super::{Follow, Result, Root};
use crate::path::RelPath;

impl Root {
    /// The directory that holds `path`, as a root of its own, and the last name in it. Links on the way are followed as
    /// `follow` says; the last name is not looked at.
    ///
    /// # Errors
    /// When a directory on the way is missing, is none, or may not be entered.
    pub fn holder(&self, path: &RelPath, follow: Follow) -> Result<(Root, RelPath)> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let parent = path.parent();
        let opened = match &parent {
            None => fs::openat(&self.directory, ".", flags, Mode::empty()),
            Some(parent) => self.resolve(parent.as_bytes(), follow, flags, Mode::empty()),
        };
        let directory = self.failed("open the directory", parent.as_ref(), opened)?;
        let shown = parent.as_ref().map_or_else(|| self.shown.clone(), |parent| self.whole(parent));
        let walk = AtomicBool::new(self.walk.load(Ordering::Relaxed));
        let name = RelPath::new(path.name()).map_err(|_| Errno::INVAL);
        let name = self.failed("open", Some(path), name)?;
        Ok((Root { directory, shown, walk }, name))
    }

    /// Where below the root something open lies, without links; `None` is the root itself.
    ///
    /// # Errors
    /// EXDEV when it lies elsewhere by now, ENOENT when it was removed and where /proc is not to be had, ENAMETOOLONG when its
    /// whole path is too long to be told.
    pub fn path_of(&self, file: &impl AsFd) -> Result<Option<RelPath>> {
        let found = path_of(self.directory.as_fd(), file.as_fd());
        self.failed("find the place of a file below", None, found)
    }

    /// The same for the directory of another root.
    ///
    /// # Errors
    /// As [`Root::path_of`].
    pub fn path_of_root(&self, other: &Root) -> Result<Option<RelPath>> {
        self.path_of(&other.directory)
    }

    /// Gives a file a further name, in another root on the same file system; a link is not followed.
    ///
    /// # Errors
    /// As linkat(2).
    pub fn hard_link_to(&self, from: &RelPath, root: &Root, to: &RelPath) -> Result<()> {
        let result = self.parent(from).and_then(|(old, old_name)| {
            let (new, new_name) = root.parent(to)?;
            fs::linkat(old.as_fd(), old_name, new.as_fd(), new_name, AtFlags::empty())
        });
        root.failed("link", Some(to), result)
    }

    /// The file system that an open file, or the root when there is none, lies on.
    ///
    /// # Errors
    /// As fstatvfs(3).
    pub fn filesystem(&self, file: Option<&std::fs::File>) -> Result<fs::StatVfs> {
        let descriptor = file.map_or(self.directory.as_fd(), AsFd::as_fd);
        self.failed("look at the file system of", None, fs::fstatvfs(descriptor))
    }
}

fn path_of(
    root_at: std::os::fd::BorrowedFd<'_>,
    file_at: std::os::fd::BorrowedFd<'_>,
) -> rustix::io::Result<Option<RelPath>> {
    let read = |raw| fs::readlinkat(fs::CWD, format!("/proc/self/fd/{raw}"), Vec::new()).map(|link| link.into_bytes());
    let (root, file) = (read(root_at.as_raw_fd())?, read(file_at.as_raw_fd())?);
    let below = file.strip_prefix(root.strip_suffix(b"/").unwrap_or(&root)).ok_or(Errno::XDEV)?;
    // What the kernel puts behind the name of what was removed, which may be a part of a name as well.
    if below.ends_with(b" (deleted)") {
        let name = below.strip_prefix(b"/").ok_or(Errno::XDEV)?;
        let named = fs::statat(root_at, name, AtFlags::SYMLINK_NOFOLLOW).map_err(|errno| match errno {
            // No name of a file is so long, nor that of a directory on its way.
            Errno::NAMETOOLONG | Errno::NOTDIR => Errno::NOENT,
            errno => errno,
        })?;
        let own = fs::fstat(file_at)?;
        if (named.st_dev, named.st_ino) != (own.st_dev, own.st_ino) {
            return Err(Errno::NOENT);
        }
    }
    match below.strip_prefix(b"/") {
        Some(b"") => Ok(None),
        Some(path) => RelPath::new(path).map(Some).map_err(|_| Errno::XDEV),
        None if below.is_empty() => Ok(None),
        // `/data_evil` does not lie below `/data`.
        None => Err(Errno::XDEV),
    }
}
