//! What lockstep keeps at a root, `.lockstep`: whose it has to be.
//!
//! A run carries out what an interrupted one has written down there, with all the rights that it has. So the directory has
//! to be one that nobody else could have put there: owned by whoever would own it if it were made now, and not to be
//! written to by more people. What is looked at and what is used is one descriptor.

use std::io::ErrorKind;

use rustix::process::geteuid;

use crate::access::{AclLists, Inode};
use crate::path::RelPath;
use crate::root::{FileKind, Follow, Metadata, Root, RootError};

use super::lock::LockError;

const STATE: &str = ".lockstep";
const WRITABLE_BY_OTHERS: u32 = 0o022;

/// Opens the directory, which is made where it is missing.
///
/// # Errors
/// [`LockError::Foreign`] when others may have a hand in it.
pub(super) fn open(root: &Root) -> Result<Root, LockError> {
    let path = RelPath::new(STATE)?;
    let made = match root.mkdir(&path, 0o700) {
        Err(error) if error.kind() == ErrorKind::AlreadyExists => false,
        made => made.map(|()| true)?,
    };
    let state = root.subroot(&path)?;
    must_be_own(&state)?;
    if made {
        // What it inherits would be inherited by all that is made in it, and wake up when something of that gets its mode.
        let inherited = Inode::open(&state, None)?.set_acls(&AclLists::default());
        inherited.map_err(|source| RootError {
            operation: "remove the inherited ACL of",
            path: state.shown().to_owned(),
            source,
        })?;
    }
    Ok(state)
}

/// Refuses a directory that somebody else may have put there.
///
/// # Errors
/// [`LockError::Foreign`].
pub fn must_be_own(directory: &Root) -> Result<(), LockError> {
    let found = directory.stat_root()?;
    if found.uid == geteuid().as_raw() && found.mode & WRITABLE_BY_OTHERS == 0 {
        return Ok(());
    }
    // Some file systems give every file to one user (NFS for root, FUSE), or know no modes: what counts is what is made.
    let probe = RelPath::new(format!("probe-{}", std::process::id()))?;
    // What a run that was killed here left would be in the way.
    let _ = directory.rmdir(&probe);
    directory.mkdir(&probe, 0o700)?;
    let made = directory.stat(&probe, Follow::Never);
    directory.rmdir(&probe)?;
    let Metadata { uid, mode, kind, .. } = made?;
    let more = found.mode & !mode & WRITABLE_BY_OTHERS;
    if kind == FileKind::Directory && found.uid == uid && more == 0 {
        return Ok(());
    }
    let why = match found.uid == uid {
        true => format!("can be written to by others (mode {:04o})", found.mode),
        false => format!("belongs to user {}, not to {uid}", found.uid),
    };
    Err(LockError::Foreign { directory: directory.shown().to_owned(), why })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{self, Permissions};
    use std::os::unix::fs::PermissionsExt as _;

    #[test]
    fn a_directory_that_others_may_write_to_is_not_trusted() {
        let at = tempfile::tempdir().unwrap();
        let root = Root::open(at.path()).unwrap();
        open(&root).unwrap();
        let state = at.path().join(STATE);
        for (mode, good) in [(0o755, true), (0o770, false), (0o702, false), (0o1777, false), (0o700, true)] {
            fs::set_permissions(&state, Permissions::from_mode(mode)).unwrap();
            assert_eq!(open(&root).is_ok(), good, "{mode:o}");
            assert_eq!(fs::read_dir(&state).unwrap().count(), 0);
        }
        if geteuid().is_root() {
            rustix::fs::chown(&state, Some(rustix::fs::Uid::from_raw(65534)), None).unwrap();
            let refused = open(&root).unwrap_err().to_string();
            assert!(refused.contains("belongs to user 65534, not to 0"), "{refused}");
        }
    }
}
