//! Content of a file that came over another connection before what stands in front of it.
//!
//! What always holds: it is given back in the order of its place in the file, each part once, and there is never more of it than
//! [`AHEAD_BYTES_MAX`] in a run. It is answered when it is taken: what is wrong with it is said to whatever comes for the file later.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::{Failure, Job, Output};
use crate::wire::extension::{AHEAD_BYTES_MAX, Message, WireError};

/// What waits at one worker.
#[derive(Default)]
pub(super) struct Ahead {
    files: HashMap<u32, BTreeMap<u64, (Job, Message)>>,
}

/// What a part takes beside its bytes.
const PART_BYTES: usize = 512;

/// Who was answered already, and hears no more.
struct Answered;

impl Output for Answered {
    fn send(&self, _: Vec<u8>) {}

    fn is_gone(&self) -> bool {
        false
    }
}

/// What waits at all workers of a run, in bytes.
#[derive(Debug, Default)]
pub(super) struct Waiting(AtomicUsize);

impl Ahead {
    /// Keeps what belongs at `offset`, and answers it.
    ///
    /// # Errors
    /// With the job, where there is too much, or something for that place already.
    pub(super) fn keep(
        &mut self,
        waiting: &Waiting,
        (index, offset): (u32, u64),
        job: Job,
        content: Message,
    ) -> Result<(), (Job, Failure)> {
        let parts = self.files.entry(index).or_default();
        if parts.contains_key(&offset) {
            return Err((job, WireError::Range("the offset").into()));
        }
        let bytes = content.bytes().len() + PART_BYTES;
        let taken = waiting.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |held| {
            held.checked_add(bytes).filter(|&held| held <= AHEAD_BYTES_MAX)
        });
        if taken.is_err() {
            return Err((job, WireError::Range("what is sent ahead").into()));
        }
        job.reply(&[]);
        parts.insert(offset, (Job { output: Arc::new(Answered), ..job }, content));
        Ok(())
    }

    /// What comes at `offset`, where it is there.
    pub(super) fn next(&mut self, waiting: &Waiting, index: u32, offset: u64) -> Option<(Job, Message)> {
        let parts = self.files.get_mut(&index)?;
        let found = parts.remove(&offset)?;
        if parts.is_empty() {
            self.files.remove(&index);
        }
        waiting.0.fetch_sub(found.1.bytes().len() + PART_BYTES, Ordering::Relaxed);
        Some(found)
    }

    /// Whether something of a file waits.
    pub(super) fn holds(&self, index: u32) -> bool {
        self.files.contains_key(&index)
    }

    /// Drops what waits of a file.
    pub(super) fn drop_all(&mut self, waiting: &Waiting, index: u32) {
        let parts = self.files.remove(&index).into_iter().flatten();
        let bytes: usize = parts.map(|(_, (_, content))| content.bytes().len() + PART_BYTES).sum();
        waiting.0.fetch_sub(bytes, Ordering::Relaxed);
    }
}
