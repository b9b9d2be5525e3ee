//! Content of a file that came over another connection before what stands in front of it.
//!
//! What always holds: it is given back in the order of its place in the file, each part once, and there is never more of it than
//! [`AHEAD_BYTES_MAX`] in a run.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicUsize, Ordering};

use super::{Failure, Job};
use crate::wire::extension::{AHEAD_BYTES_MAX, Message, WireError};

/// What waits at one worker.
#[derive(Default)]
pub(super) struct Ahead {
    files: HashMap<u32, BTreeMap<u64, (Job, Message)>>,
}

/// What waits at all workers of a run, in bytes.
#[derive(Debug, Default)]
pub(super) struct Waiting(AtomicUsize);

impl Ahead {
    /// Keeps what belongs at `offset`.
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
        let bytes = content.bytes().len();
        let taken = waiting.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |held| {
            held.checked_add(bytes).filter(|&held| held <= AHEAD_BYTES_MAX)
        });
        if taken.is_err() {
            return Err((job, WireError::Range("what is sent ahead").into()));
        }
        parts.insert(offset, (job, content));
        Ok(())
    }

    /// What comes at `offset`, where it is there.
    pub(super) fn next(&mut self, waiting: &Waiting, index: u32, offset: u64) -> Option<(Job, Message)> {
        let parts = self.files.get_mut(&index)?;
        let found = parts.remove(&offset)?;
        if parts.is_empty() {
            self.files.remove(&index);
        }
        waiting.0.fetch_sub(found.1.bytes().len(), Ordering::Relaxed);
        Some(found)
    }

    /// Whether something of a file waits.
    pub(super) fn holds(&self, index: u32) -> bool {
        self.files.contains_key(&index)
    }

    /// Everything that waits, of one file or of all.
    pub(super) fn drain(&mut self, waiting: &Waiting, index: Option<u32>) -> Vec<Job> {
        let files: Vec<u32> = match index {
            Some(index) => vec![index],
            None => self.files.keys().copied().collect(),
        };
        let parts = files.iter().filter_map(|index| self.files.remove(index)).flatten();
        let taken = parts.map(|(_, (job, content))| {
            waiting.0.fetch_sub(content.bytes().len(), Ordering::Relaxed);
            job
        });
        taken.collect()
    }
}
