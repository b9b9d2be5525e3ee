//! Files that are open to be written: what is known of their content, by whichever handle of the session it comes.
//!
//! What always holds: a digest is told only of what this session wrote, from the start to the end and without a gap, through all
//! handles together, as long as nobody else is seen to have written meanwhile; and before content that was there changes, that is told.
//!
//! RACE: who else writes is seen by size and times, looked at before and after each change of its own. What somebody writes just while this session does is not
//! seen, nor, before Linux 6.13, what comes within one tick of the clock, 4 ms at most.

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::AsFd as _;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::{AtFlags, FlockOperation, StatxFlags, flock, statx};
use rustix::io::Errno;
use sha2::{Digest as _, Sha256};

use super::{Failed, Status};
use crate::manifest::Digest;
use crate::root::Metadata;

/// Device and inode.
type Key = (u64, u64);

/// Size, and times of modification and of change in seconds and nanoseconds: a client can set the first of them.
type Seen = (u64, (i64, u32), (i64, u32));

/// As far as this machine knows: a file system on another one is not asked to write down first what it still has here.
fn look(file: &File) -> Option<Seen> {
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    let found = statx(file.as_fd(), "", flags, StatxFlags::SIZE | StatxFlags::MTIME | StatxFlags::CTIME).ok()?;
    let (modified, changed) = (found.stx_mtime, found.stx_ctime);
    Some((found.stx_size, (modified.tv_sec, modified.tv_nsec), (changed.tv_sec, changed.tv_nsec)))
}

/// How long it is, by the same look.
pub(super) fn size_of(file: &File) -> Option<u64> {
    look(file).map(|(size, ..)| size)
}

/// The content of one file.
pub(super) struct Content {
    key: Key,
    handles: usize,
    /// Of what was written from the start without a gap, and how much that is.
    hash: Option<(Sha256, u64)>,
    /// What the file was after this session's last change, where it is hashed.
    seen: Option<Seen>,
    /// It was told that it changes, since the last time that it was told what it is.
    pub(super) told: bool,
    /// This session took its last name, where room is limited: it is empty, and stays so.
    pub(super) is_removed: bool,
    /// Keeps other sessions from writing to it, where it has to.
    _lock: Option<File>,
}

impl Content {
    fn new(file: &File, found: &Metadata, proves: bool, lock: Option<File>) -> Content {
        let (key, told, is_removed) = (key(found), false, false);
        let mut content = Content { key, handles: 0, hash: None, seen: None, told, is_removed, _lock: lock };
        if found.size == 0 {
            content.resized(file, 0, proves);
        }
        content
    }

    /// It is about to be written at `offset`.
    pub(super) fn writes(&mut self, file: &File, offset: u64, data: &[u8]) {
        self.look_again(file);
        self.hash = match self.hash.take() {
            Some((hash, at)) if at == offset => Some((hash.chain_update(data), at + data.len() as u64)),
            _ => None,
        };
    }

    /// That is done, or its times were set.
    pub(super) fn changed(&mut self, file: &File) {
        if self.hash.is_some() {
            self.seen = look(file);
        }
    }

    /// It changes in a way that is not followed.
    pub(super) fn lost(&mut self) {
        self.hash = None;
    }

    /// It was cut off or made longer. `proves` where digests are told.
    pub(super) fn resized(&mut self, file: &File, size: u64, proves: bool) {
        self.hash = (size == 0 && proves).then(|| (Sha256::new(), 0));
        self.changed(file);
    }

    /// Gives the hash up where somebody else has changed the file.
    pub(super) fn look_again(&mut self, file: &File) {
        if self.hash.is_some() && (self.seen.is_none() || self.seen != look(file)) {
            self.hash = None;
        }
    }

    /// Its digest, where it is known and the file has as much content as went into it.
    pub(super) fn digest(&mut self, file: &File, size: u64) -> Option<Digest> {
        self.look_again(file);
        let (hash, _) = self.hash.as_ref().filter(|(_, length)| *length == size)?;
        Some(Digest(hash.clone().finalize().into()))
    }
}

/// A content that handles share.
pub(super) type Shared = Arc<Mutex<Content>>;

pub(super) fn locked(content: &Shared) -> MutexGuard<'_, Content> {
    content.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Somebody else is writing to a file, where one at a time may.
pub(super) fn busy() -> Failed {
    let why = "another session, or a program there, is writing to it; try again when it has ended";
    Failed::because(Status::Failure, why)
}

/// It takes no room any more.
pub(super) fn removed() -> Failed {
    Failed::because(Status::Failure, "it was removed by this session, and takes nothing more")
}

/// Keeps others from writing to a file until it is closed, or the lock is given back. Where the file system has no locks it does not.
pub(super) fn lock(file: &File) -> Result<(), Failed> {
    match flock(file, FlockOperation::NonBlockingLockExclusive) {
        Err(Errno::WOULDBLOCK) => Err(busy()),
        _ => Ok(()),
    }
}

/// The same until it is dropped.
pub(super) struct Alone<'f>(&'f File);

impl Alone<'_> {
    pub(super) fn with(file: &File) -> Result<Alone<'_>, Failed> {
        lock(file).map(|()| Alone(file))
    }
}

impl Drop for Alone<'_> {
    fn drop(&mut self) {
        let _ = flock(self.0, FlockOperation::Unlock);
    }
}

/// Those of the files that the session has open to be written.
#[derive(Default)]
pub(super) struct Contents(Mutex<HashMap<Key, Shared>>);

fn key(found: &Metadata) -> Key {
    (found.device, found.inode)
}

impl Contents {
    fn all(&self) -> MutexGuard<'_, HashMap<Key, Shared>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One more handle writes a file. `proves` where digests are told, `exclusive` where nobody else may write to it meanwhile.
    pub(super) fn open(&self, file: &File, found: &Metadata, proves: bool, exclusive: bool) -> Result<Shared, Failed> {
        let mut all = self.all();
        let content = match all.get(&key(found)) {
            Some(content) => Arc::clone(content),
            None => {
                // A lock goes with what was opened, whichever handle of it is closed first.
                let held = if exclusive { Some(file.try_clone()?) } else { None };
                held.as_ref().map_or(Ok(()), lock)?;
                // RACE: its name may have been taken away between the opening and the lock.
                if exclusive && Metadata::of(file)?.links == 0 {
                    return Err(Status::NoSuchFile.into());
                }
                let content = Arc::new(Mutex::new(Content::new(file, found, proves, held)));
                all.insert(key(found), Arc::clone(&content));
                content
            }
        };
        locked(&content).handles += 1;
        Ok(content)
    }

    /// Whether there are none.
    pub(super) fn is_empty(&self) -> bool {
        self.all().is_empty()
    }

    /// Of what was found, where the session has it open to be written.
    pub(super) fn of(&self, found: &Metadata) -> Option<Shared> {
        self.all().get(&key(found)).map(Arc::clone)
    }

    /// One handle less.
    pub(super) fn close(&self, content: &Shared) {
        let mut all = self.all();
        let mut content = locked(content);
        content.handles -= 1;
        if content.handles == 0 {
            all.remove(&content.key);
        }
    }
}
