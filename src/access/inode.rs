//! One inode, held by a descriptor.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;

use rustix::fs::{AtFlags, Gid, Mode, OFlags, Uid, XattrFlags};
use rustix::io::Errno;

use crate::manifest::Timestamp;
use crate::path::RelPath;
use crate::policy::acl::{ACCESS_XATTR, DEFAULT_XATTR};
use crate::root::{FileKind, Follow, Metadata, Root, RootError};

/// The ACLs of an inode in the kernel's form; `None` where it has none.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AclLists {
    /// The value of `system.posix_acl_access`.
    pub access: Option<Vec<u8>>,
    /// The value of `system.posix_acl_default`; only directories have one.
    pub default: Option<Vec<u8>>,
}

/// A regular file or directory that is held open, so that what is asked and done is about one and the same inode.
#[derive(Debug)]
pub struct Inode {
    file: File,
    /// The descriptor is O_PATH: the file may not be read, but its owner may still change its permissions.
    path_only: bool,
}

impl From<File> for Inode {
    fn from(file: File) -> Inode {
        Inode { file, path_only: false }
    }
}

impl Inode {
    /// Opens what has the name, a regular file or a directory; `None` is the root itself. No link is followed.
    ///
    /// # Errors
    /// As open(2).
    pub fn open(root: &Root, path: Option<&RelPath>) -> Result<Inode, RootError> {
        let Some(path) = path else { return Ok(File::from(root.open_dir(None, Follow::Never)?).into()) };
        let inode = match root.open_read(path, Follow::Never) {
            Ok(file) => Inode::from(file),
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                Inode { file: root.open_with(path, Follow::Never, OFlags::PATH, 0)?, path_only: true }
            }
            Err(error) => return Err(error),
        };
        // RACE: it was listed as a file or directory, and something else has the name since.
        let other = match inode.metadata().map(|found| found.kind) {
            Ok(FileKind::Regular | FileKind::Directory) => return Ok(inode),
            Ok(kind) => io::Error::other(format!("it is a {} now; run again", kind.name())),
            Err(error) => error,
        };
        Err(RootError { operation: "open", path: root.shown().join(path.as_path()), source: other })
    }

    /// The open file, when it may be read.
    pub fn readable(&self) -> Option<&File> {
        (!self.path_only).then_some(&self.file)
    }

    /// What it is.
    ///
    /// # Errors
    /// As fstat(2).
    pub fn metadata(&self) -> io::Result<Metadata> {
        Metadata::of(&self.file)
    }

    /// The name by which the kernel takes requests that it refuses on an O_PATH descriptor.
    fn name(&self) -> String {
        format!("/proc/self/fd/{}", self.file.as_raw_fd())
    }

    /// Its ACLs. On a file system without ACLs there are none.
    ///
    /// # Errors
    /// As fgetxattr(2).
    pub fn acls(&self) -> io::Result<AclLists> {
        let directory = self.metadata()?.kind == FileKind::Directory;
        let default = if directory { self.attribute(DEFAULT_XATTR)? } else { None };
        Ok(AclLists { access: self.attribute(ACCESS_XATTR)?, default })
    }

    /// Whether its file system keeps ACLs.
    ///
    /// # Errors
    /// As fgetxattr(2).
    pub fn keeps_acls(&self) -> io::Result<bool> {
        match rustix::fs::fgetxattr(&self.file, ACCESS_XATTR, &mut [0; 4][..]) {
            Ok(_) | Err(Errno::NODATA | Errno::RANGE) => Ok(true),
            Err(Errno::NOTSUP) => Ok(false),
            Err(errno) => Err(errno.into()),
        }
    }

    fn attribute(&self, name: &str) -> io::Result<Option<Vec<u8>>> {
        // Most lists are short; the longest that ext4 and XFS keep fit the second size.
        for capacity in [256, 64 * 1024] {
            let mut value = vec![0; capacity];
            let result = match self.path_only {
                false => rustix::fs::fgetxattr(&self.file, name, &mut value[..]),
                true => rustix::fs::getxattr(self.name(), name, &mut value[..]),
            };
            match result {
                Ok(length) => {
                    value.truncate(length);
                    return Ok(Some(value));
                }
                Err(Errno::NODATA | Errno::NOTSUP) => return Ok(None),
                Err(Errno::RANGE) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        Err(Errno::TOOBIG.into())
    }

    /// Sets or removes its ACLs, so that it has exactly these. An access list sets the mode's permission bits too.
    ///
    /// # Errors
    /// As fsetxattr(2).
    pub fn set_acls(&self, lists: &AclLists) -> io::Result<()> {
        self.set_attribute(ACCESS_XATTR, lists.access.as_deref())?;
        if self.metadata()?.kind == FileKind::Directory {
            self.set_attribute(DEFAULT_XATTR, lists.default.as_deref())?;
        }
        Ok(())
    }

    fn set_attribute(&self, name: &str, value: Option<&[u8]>) -> io::Result<()> {
        let flags = XattrFlags::empty();
        let result = match (value, self.path_only) {
            (Some(value), false) => rustix::fs::fsetxattr(&self.file, name, value, flags),
            (Some(value), true) => rustix::fs::setxattr(self.name(), name, value, flags),
            (None, false) => rustix::fs::fremovexattr(&self.file, name),
            (None, true) => rustix::fs::removexattr(self.name(), name),
        };
        match result {
            Err(Errno::NODATA | Errno::NOTSUP) if value.is_none() => Ok(()),
            other => Ok(other?),
        }
    }

    /// Sets owner and group; `None` leaves them. The kernel takes the set-ID bits of a file away.
    ///
    /// # Errors
    /// As fchown(2).
    pub fn set_owner(&self, uid: Option<u32>, gid: Option<u32>) -> io::Result<()> {
        let (uid, gid) = (uid.map(Uid::from_raw), gid.map(Gid::from_raw));
        Ok(rustix::fs::chownat(&self.file, "", uid, gid, AtFlags::EMPTY_PATH)?)
    }

    /// Sets the mode exactly.
    ///
    /// # Errors
    /// As fchmod(2); and when the kernel left a special bit out, as it does for a group that the caller is not in.
    pub fn set_mode(&self, mode: u32) -> io::Result<()> {
        let bits = Mode::from_raw_mode(mode);
        match self.path_only {
            false => rustix::fs::fchmod(&self.file, bits)?,
            true => rustix::fs::chmod(self.name(), bits)?,
        }
        if mode & crate::policy::mode::SPECIAL_BITS != 0 {
            let found = self.metadata()?.mode;
            if found != mode {
                let reason =
                    format!("the kernel made {found:04o} of {mode:04o}; the set-group-ID bit needs membership");
                return Err(io::Error::new(io::ErrorKind::PermissionDenied, reason));
            }
        }
        Ok(())
    }

    /// Sets the time of last modification.
    ///
    /// # Errors
    /// As utimensat(2).
    pub fn set_mtime(&self, mtime: Timestamp) -> io::Result<()> {
        let time = rustix::fs::Timespec { tv_sec: mtime.seconds, tv_nsec: mtime.nanoseconds.into() };
        let times = rustix::fs::Timestamps { last_access: time, last_modification: time };
        match self.path_only {
            false => rustix::fs::futimens(&self.file, &times)?,
            true => rustix::fs::utimensat(rustix::fs::CWD, self.name(), &times, AtFlags::empty())?,
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    /// Root may read everything: the way of those who may not is taken by hand.
    fn unreadable(root: &Root, path: &RelPath) -> Inode {
        Inode { file: root.open_with(path, Follow::Never, OFlags::PATH, 0).unwrap(), path_only: true }
    }

    #[test]
    fn what_cannot_be_read_is_changed_by_its_owner_all_the_same() {
        let at = tempfile::tempdir().unwrap();
        let root = Root::open(at.path()).unwrap();
        let path = RelPath::new("f").unwrap();
        std::fs::write(at.path().join("f"), "x").unwrap();
        std::fs::set_permissions(at.path().join("f"), std::fs::Permissions::from_mode(0o000)).unwrap();
        let list = crate::policy::acl::Acl::parse(&["user:7:r"]).unwrap();
        let access = list.access_xattr(0o640, false, |_, name| name.parse::<u32>()).unwrap();
        let wanted = AclLists { access, default: None };
        for inode in [unreadable(&root, &path), Inode::open(&root, Some(&path)).unwrap()] {
            inode.set_acls(&AclLists::default()).unwrap();
            assert_eq!(inode.acls().unwrap(), AclLists::default());
            inode.set_acls(&wanted).unwrap();
            inode.set_mode(0o640).unwrap();
            inode.set_mtime(Timestamp { seconds: 5, nanoseconds: 6 }).unwrap();
            inode.set_owner(None, None).unwrap();
            let found = inode.metadata().unwrap();
            assert_eq!((inode.acls().unwrap(), found.mode, found.mtime.seconds), (wanted.clone(), 0o640, 5));
        }
        assert!(unreadable(&root, &path).readable().is_none());
    }

    #[test]
    fn h16_h18_links_and_special_files_are_not_opened() {
        let at = tempfile::tempdir().unwrap();
        let root = Root::open(at.path()).unwrap();
        std::os::unix::fs::symlink("/etc", at.path().join("link")).unwrap();
        let mode = Mode::from_raw_mode(0o600);
        rustix::fs::mknodat(rustix::fs::CWD, at.path().join("fifo"), rustix::fs::FileType::Fifo, mode, 0).unwrap();
        for name in ["link", "fifo"] {
            assert!(Inode::open(&root, Some(&RelPath::new(name).unwrap())).is_err(), "{name}");
        }
    }
}
