//! Changing what is said of a file, through its descriptor.

use std::fs::Permissions;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _};
use std::os::unix::fs::PermissionsExt as _;

use rustix::fs::{AtFlags, Gid, Timespec, Timestamps, Uid, chownat, removexattr, utimensat};
use rustix::io::Errno;

use crate::manifest::Timestamp;

/// What is to be changed; what is `None` stays.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Change {
    /// Owner.
    pub uid: Option<u32>,
    /// Group.
    pub gid: Option<u32>,
    /// Whether an ACL that was inherited goes.
    pub remove_acl: bool,
    /// Permission and special bits, exactly.
    pub mode: Option<u32>,
    /// Times of last access and last modification.
    pub times: Option<(Timestamp, Timestamp)>,
}

impl Change {
    /// Makes the change to an open file; one that was opened with O_PATH will do, and a symbolic link is changed itself.
    /// Owner, ACL, mode, times, in this order: a change of owner clears bits of the mode, and an ACL would widen it.
    /// What fails does not keep the rest from being tried.
    ///
    /// # Errors
    /// The first failure; EOPNOTSUPP for the mode of a symbolic link.
    pub fn apply(&self, file: &impl AsFd) -> io::Result<()> {
        let file = file.as_fd();
        let name = format!("/proc/self/fd/{}", file.as_raw_fd());
        let mut results: [io::Result<()>; 4] = [Ok(()), Ok(()), Ok(()), Ok(())];
        if self.uid.is_some() || self.gid.is_some() {
            let (uid, gid) = (self.uid.map(Uid::from_raw), self.gid.map(Gid::from_raw));
            results[0] = chownat(file, "", uid, gid, AtFlags::EMPTY_PATH).map_err(io::Error::from);
        }
        if self.remove_acl {
            results[1] = match removexattr(&name, "system.posix_acl_access") {
                Ok(()) | Err(Errno::NODATA | Errno::NOTSUP) => Ok(()),
                Err(errno) => Err(errno.into()),
            };
        }
        if let Some(mode) = self.mode {
            results[2] = std::fs::set_permissions(&name, Permissions::from_mode(mode & 0o7777));
        }
        if let Some((accessed, modified)) = self.times {
            let time = |at: Timestamp| Timespec { tv_sec: at.seconds, tv_nsec: at.nanoseconds.into() };
            let times = Timestamps { last_access: time(accessed), last_modification: time(modified) };
            results[3] = utimensat(file, "", &times, AtFlags::EMPTY_PATH).map_err(io::Error::from);
        }
        results.into_iter().collect()
    }
}
