//! Files that are open to be written: what is known of their content, by whichever handle of the session it came.
//!
//! What always holds: a digest is told only of what this session wrote, from the start to the end and without a gap, through all
//! handles together; and the room of a file that has lost its last name is given back when the session has it open no more.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use sha2::{Digest as _, Sha256};

use crate::manifest::Digest;
use crate::root::Metadata;

/// Device and inode.
type Key = (u64, u64);

/// The content of one file.
pub(super) struct Content {
    key: Key,
    handles: usize,
    /// Of what was written from the start without a gap, and how much that is.
    hash: Option<(Sha256, u64)>,
    /// Up to where room was taken for it.
    pub(super) end: u64,
    /// This session took its last name away.
    pub(super) is_removed: bool,
}

impl Content {
    /// It was written at `offset`.
    pub(super) fn wrote(&mut self, offset: u64, data: &[u8]) {
        self.hash = match self.hash.take() {
            Some((hash, at)) if at == offset => Some((hash.chain_update(data), at + data.len() as u64)),
            _ => None,
        };
    }

    /// It changed in a way that is not followed.
    pub(super) fn changed(&mut self) {
        self.hash = None;
    }

    /// It was cut off or made longer, and the room for that is settled. `proves` where digests are told.
    pub(super) fn resized(&mut self, size: u64, proves: bool) {
        self.end = size;
        self.hash = (size == 0 && proves).then(|| (Sha256::new(), 0));
    }

    /// Its digest, where it is known and the file has as much content as went into it.
    pub(super) fn digest(&self, size: u64) -> Option<Digest> {
        let (hash, _) = self.hash.as_ref().filter(|(_, length)| *length == size)?;
        Some(Digest(hash.clone().finalize().into()))
    }
}

/// A content that one handle writes.
pub(super) type Shared = Arc<Mutex<Content>>;

pub(super) fn locked(content: &Shared) -> MutexGuard<'_, Content> {
    content.lock().unwrap_or_else(PoisonError::into_inner)
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

    /// One more handle writes what was found. `proves` where digests are told.
    pub(super) fn open(&self, found: &Metadata, proves: bool) -> Shared {
        let new = || {
            let hash = (proves && found.size == 0).then(|| (Sha256::new(), 0));
            Content { key: key(found), handles: 0, hash, end: found.size, is_removed: false }
        };
        let content = Arc::clone(self.all().entry(key(found)).or_insert_with(|| Arc::new(Mutex::new(new()))));
        locked(&content).handles += 1;
        content
    }

    /// Of what was found, where the session has it open to be written.
    pub(super) fn of(&self, found: &Metadata) -> Option<Shared> {
        self.all().get(&key(found)).map(Arc::clone)
    }

    /// One handle less; gives what room is given back now.
    pub(super) fn close(&self, content: &Shared) -> u64 {
        let mut all = self.all();
        let mut content = locked(content);
        content.handles -= 1;
        if let Entry::Occupied(known) = all.entry(content.key)
            && content.handles == 0
        {
            known.remove();
        }
        if content.handles == 0 && content.is_removed { std::mem::take(&mut content.end) } else { 0 }
    }
}
