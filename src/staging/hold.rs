//! Who uses a directory holds it: by a shared lock of flock(2) on the directory itself, which takes no right but to read it,
//! writes nothing, and goes with the process that has it.
//!
//! Who removes whole directories asks first, by an exclusive lock: on the directory, on those in it and on those above it up to
//! the root. One that cannot be opened, or a file system without locks on directories, is held by nobody that could be seen.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, Mode, OFlags, flock};
use rustix::io::Errno;

use crate::path::RelPath;
use crate::root::{FileKind, Follow, Root, RootError};

/// So long somebody may take to ask.
const ASKED_MAX: Duration = Duration::from_secs(1);
/// More directories than these in one unit are not asked one by one.
const DIRECTORIES_MAX: usize = 512;

/// A directory that is held as long as this is open.
#[derive(Debug)]
pub struct Hold(OwnedFd);

impl Hold {
    /// Holds the directory at `path`.
    ///
    /// # Errors
    /// As open(2) and flock(2): EWOULDBLOCK where it is about to be removed, ENOLCK, EOPNOTSUPP and others where the file
    /// system has no such locks.
    pub fn take(path: &Path) -> std::io::Result<Hold> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = rustix::fs::open(path, flags, Mode::empty())?;
        let until = Instant::now() + ASKED_MAX;
        loop {
            match flock(&directory, FlockOperation::NonBlockingLockShared) {
                Ok(()) => return Ok(Hold(directory)),
                // Somebody asks whether it is held, which takes no time.
                Err(Errno::WOULDBLOCK) if Instant::now() < until => std::thread::sleep(Duration::from_millis(5)),
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Leaves it to the program that takes the place of this process: it holds the directory as long as it, or a process
    /// that it started, is there.
    ///
    /// # Errors
    /// As fcntl(2).
    pub fn pass_on(self) -> std::io::Result<()> {
        rustix::io::fcntl_setfd(&self.0, rustix::io::FdFlags::empty())?;
        // Closed by nobody but the end of the process.
        std::mem::forget(File::from(self.0));
        Ok(())
    }
}

/// Whether a directory is held.
#[derive(Debug)]
pub enum Held {
    /// And nobody can begin to, as long as these are open.
    ByNobody(Vec<OwnedFd>),
    /// By who holds the directory of this path; `None` is the root.
    BySomebody(Option<RelPath>),
}

/// Asks who holds the directory `path` below `root`, one in it or one above it. What is no directory is held by nobody.
///
/// # Errors
/// When its directories cannot be listed.
pub fn none(root: &Root, path: &RelPath) -> Result<Held, RootError> {
    let mut locks = Vec::new();
    // Those above are only asked: other runs in them go on meanwhile.
    let above = [None].into_iter().chain(path.ancestors().map(Some));
    if let Some(held) = above.into_iter().find(|above| is_held(root, above.as_ref())) {
        return Ok(Held::BySomebody(held));
    }
    if !root.stat(path, Follow::Never).is_ok_and(|found| found.kind == FileKind::Directory) {
        return Ok(Held::ByNobody(locks));
    }
    let mut directories = vec![path.clone()];
    while let Some(directory) = directories.pop() {
        match ask(root, Some(&directory)) {
            Asked::Held => return Ok(Held::BySomebody(Some(directory))),
            Asked::Free(lock) => locks.push(lock),
            Asked::Untold => {}
        }
        if locks.len() + directories.len() > DIRECTORIES_MAX {
            continue;
        }
        let names = match root.names(Some(&directory), Follow::Never) {
            Ok(names) => names,
            Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => continue,
            Err(error) => return Err(error),
        };
        for name in names {
            let Ok(child) = directory.join(&name) else { continue };
            if root.stat(&child, Follow::Never).is_ok_and(|found| found.kind == FileKind::Directory) {
                directories.push(child);
            }
        }
    }
    Ok(Held::ByNobody(locks))
}

/// Whether this one directory is held at the moment; `None` is the root.
pub fn is_held(root: &Root, path: Option<&RelPath>) -> bool {
    matches!(ask(root, path), Asked::Held)
}

enum Asked {
    Held,
    Free(OwnedFd),
    Untold,
}

fn ask(root: &Root, path: Option<&RelPath>) -> Asked {
    let Ok(directory) = root.open_dir(path, Follow::Never) else { return Asked::Untold };
    match flock(&directory, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Asked::Free(directory),
        Err(Errno::WOULDBLOCK) => Asked::Held,
        Err(_) => Asked::Untold,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_is_held_by_whoever_holds_it_one_in_it_or_one_above() {
        let at = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(at.path().join("run/c-1/deep")).unwrap();
        std::fs::create_dir_all(at.path().join("run/c-2")).unwrap();
        let root = Root::open(at.path()).unwrap();
        let asked = |path: &str| match none(&root, &RelPath::new(path).unwrap()).unwrap() {
            Held::ByNobody(_) => None,
            Held::BySomebody(path) => Some(path.map_or_else(String::new, |path| path.to_string())),
        };
        assert_eq!(asked("run/c-1"), None);
        for (held, expected) in [("run/c-1", "run/c-1"), ("run/c-1/deep", "run/c-1/deep"), ("run", "run"), ("", "")] {
            let hold = Hold::take(&at.path().join(held)).unwrap();
            assert_eq!(asked("run/c-1").as_deref(), Some(expected), "{held}");
            // Any number may hold it.
            drop(Hold::take(&at.path().join(held)).unwrap());
            assert!(asked("run/c-1").is_some(), "{held}");
            drop(hold);
            assert_eq!(asked("run/c-1"), None, "{held}");
        }
        let _beside = Hold::take(&at.path().join("run/c-2")).unwrap();
        assert_eq!((asked("run/c-1"), asked("gone")), (None, None));
        let Held::ByNobody(locks) = none(&root, &RelPath::new("run/c-1").unwrap()).unwrap() else { panic!("held") };
        let late = Hold::take(&at.path().join("run/c-1")).unwrap_err();
        assert_eq!(late.kind(), std::io::ErrorKind::WouldBlock);
        drop(locks);
        Hold::take(&at.path().join("run/c-1")).unwrap();
    }
}
