//! Everything beneath a root, however deep it lies.

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};

use rustix::fs::{self, Mode, OFlags};
use rustix::io::Errno;

use super::metadata::{stat_at, stat_descriptor};
use super::{FileKind, Metadata, Root};

/// Opened by a name of a directory, and no link is followed.
const LISTED: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

impl Root {
    /// Calls `visit` for everything beneath: with the name of the directory that holds it, which is empty for the root itself,
    /// with its own name, and with what it is. Each is looked at from the descriptor of its directory, so that no path is too
    /// long, and there are two of them open at most. Links are not followed; what has gone meanwhile is left out. Answers the
    /// first reason why something was not looked at.
    ///
    /// RACE: what is moved meanwhile may be seen twice, or not at all.
    pub fn visit_below(&self, visit: impl FnMut(&[u8], &[u8], &Metadata)) -> Option<io::Error> {
        let mut walk = Walk { visit, levels: Vec::new(), missed: None };
        if let Some(top) = walk.enter(Vec::new(), fs::openat(&self.directory, ".", LISTED, Mode::empty())) {
            walk.go_on(top);
        }
        walk.missed.map(io::Error::from)
    }
}

/// A directory that is being looked at.
struct Level {
    inode: (u64, u64),
    /// The directories in it that are still to be looked at.
    left: Vec<Vec<u8>>,
}

struct Walk<V> {
    visit: V,
    /// From the top to where it is.
    levels: Vec<Level>,
    missed: Option<Errno>,
}

impl<V: FnMut(&[u8], &[u8], &Metadata)> Walk<V> {
    fn go_on(&mut self, mut here: OwnedFd) {
        while let Some(level) = self.levels.last_mut() {
            if let Some(name) = level.left.pop() {
                let opened = open_below(&here, &name, level.inode);
                here = self.enter(name, opened).unwrap_or(here);
                continue;
            }
            self.levels.pop();
            let Some(above) = self.levels.last() else { break };
            match open_above(&here, above.inode) {
                Ok(above) => here = above,
                Err(errno) => return self.miss(errno),
            }
        }
    }

    fn miss(&mut self, errno: Errno) {
        if errno != Errno::NOENT {
            self.missed.get_or_insert(errno);
        }
    }

    /// Looks at what is in a directory, and goes on from there.
    fn enter(&mut self, name: Vec<u8>, opened: rustix::io::Result<OwnedFd>) -> Option<OwnedFd> {
        let entered = opened.and_then(|directory| {
            let level = Level { inode: inode(&stat_descriptor(directory.as_fd())?), left: Vec::new() };
            Ok((fs::Dir::read_from(&directory)?, level, directory))
        });
        let (entries, mut level, directory) = entered.map_err(|errno| self.miss(errno)).ok()?;
        for entry in entries {
            let found = entry.and_then(|entry| {
                let name = entry.file_name().to_bytes();
                let shown = name != b"." && name != b"..";
                shown.then(|| Ok((name.to_vec(), stat_at(directory.as_fd(), name)?))).transpose()
            });
            match found {
                Ok(None) => {}
                Ok(Some((below, found))) => {
                    (self.visit)(&name, &below, &found);
                    if found.kind == FileKind::Directory {
                        level.left.push(below);
                    }
                }
                Err(errno) => self.miss(errno),
            }
        }
        self.levels.push(level);
        Some(directory)
    }
}

fn inode(found: &Metadata) -> (u64, u64) {
    (found.device, found.inode)
}

/// One that there is no way back from, as where nobody may search it, is not entered.
fn open_below(here: &OwnedFd, name: &[u8], inode_here: (u64, u64)) -> rustix::io::Result<OwnedFd> {
    let below = fs::openat(here, name, LISTED, Mode::empty())?;
    let back = inode(&stat_at(below.as_fd(), b"..")?);
    if back == inode_here { Ok(below) } else { Err(Errno::XDEV) }
}

/// RACE: a directory that was moved meanwhile leads elsewhere, where nothing is looked at.
fn open_above(here: &OwnedFd, inode_above: (u64, u64)) -> rustix::io::Result<OwnedFd> {
    let above = fs::openat(here, "..", LISTED, Mode::empty())?;
    let found = inode(&stat_descriptor(above.as_fd())?);
    if found == inode_above { Ok(above) } else { Err(Errno::XDEV) }
}
