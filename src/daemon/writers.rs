//! Which files are open for writing, by any process that can be looked at.
//!
//! The kernel tells it exactly by a lease (fcntl(2), `F_SETLEASE`), which no crate offers without unsafe code. `/proc` shows the
//! descriptors of all processes to root, and of one's own to others. That takes a moment, so that it is asked seldom, for many
//! files at once.

use std::collections::HashSet;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, CWD, StatxFlags};

use crate::staging::processes;

/// Of the time at most one part in so many is spent on looking.
const SHARE: u32 = 10;

/// Files that are open for writing, by device and inode.
#[derive(Debug, Default)]
pub(super) struct Writers {
    open: HashSet<(u64, u64)>,
    /// Every process could be looked at.
    pub(super) complete: bool,
}

impl Writers {
    /// Looks at all processes.
    pub(super) fn look() -> Writers {
        let mut writers = Writers { open: HashSet::new(), complete: true };
        match processes() {
            Ok(processes) => processes.for_each(|process| writers.look_at(&process.join("fd"))),
            Err(_) => writers.complete = false,
        }
        writers
    }

    fn look_at(&mut self, descriptors: &Path) {
        let entries = match std::fs::read_dir(descriptors) {
            Ok(entries) => entries,
            // RACE: the process has ended.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return,
            Err(error) => {
                // ESRCH, of a process that has ended, is no kind of its own.
                self.complete &= error.kind() != std::io::ErrorKind::PermissionDenied;
                return;
            }
        };
        for entry in entries.flatten() {
            // The link's own mode says how the descriptor was opened.
            if entry.metadata().is_ok_and(|link| link.mode() & 0o200 != 0) {
                // Without asking a server of files, which may not answer.
                let flags = AtFlags::NO_AUTOMOUNT | AtFlags::STATX_DONT_SYNC;
                let wanted = StatxFlags::TYPE | StatxFlags::INO;
                if let Ok(found) = rustix::fs::statx(CWD, entry.path(), flags, wanted)
                    && u32::from(found.stx_mode) & 0o170_000 == 0o100_000
                {
                    let device = u64::from(found.stx_dev_major) << 32 | u64::from(found.stx_dev_minor);
                    self.open.insert((device, found.stx_ino));
                }
            }
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.open.is_empty()
    }

    /// Whether a file is among them, as [`crate::root::Metadata`] numbers it.
    pub(super) fn hold(&self, device: u64, inode: u64) -> bool {
        self.open.contains(&(device, inode))
    }
}

/// Says when processes may be looked at again.
#[derive(Debug, Default)]
pub(super) struct Throttle {
    next: Option<Instant>,
}

impl Throttle {
    /// When the next look may be, where it is not now.
    pub(super) fn wait(&self, now: Instant) -> Option<Instant> {
        self.next.filter(|&next| next > now)
    }

    pub(super) fn spent(&mut self, took: Duration) {
        self.next = Some(Instant::now() + took * SHARE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_seen_while_it_is_open_for_writing_and_not_while_it_is_read() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("caf\u{e9}\n");
        let file = std::fs::File::create(&path).unwrap();
        let found = crate::root::Metadata::of(&file).unwrap();
        assert!(Writers::look().hold(found.device, found.inode));
        drop(file);
        let _reader = std::fs::File::open(&path).unwrap();
        assert!(!Writers::look().hold(found.device, found.inode));
    }
}
