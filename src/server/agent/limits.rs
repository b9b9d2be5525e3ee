//! What one client, and all clients of the process together, may keep in memory and open.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use super::Failure;
use crate::endpoint::agent::{list_bytes_max, memory_bytes};

/// Bounds of runs.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Memory that the entries of one run may take, in bytes.
    pub entries_bytes: usize,
    /// The same of all runs of the process.
    pub all_entries_bytes: usize,
    /// Files that a run may have open to be written.
    pub open_files: usize,
    /// The longest that a run waits for another one on the same root.
    pub wait: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            entries_bytes: list_bytes_max(),
            all_entries_bytes: usize::try_from(memory_bytes() / 4).unwrap_or(usize::MAX),
            open_files: 256,
            wait: Duration::from_secs(24 * 60 * 60),
        }
    }
}

static ENTRIES_BYTES: AtomicUsize = AtomicUsize::new(0);

/// What the entries of one run take of what there is for all; given back when it is dropped.
#[derive(Debug, Default)]
pub(super) struct Held(usize);

impl Held {
    /// Takes what is missing to `bytes`.
    pub(super) fn grow(&mut self, bytes: usize, most: usize) -> Result<(), Failure> {
        let more = bytes.saturating_sub(self.0);
        let taken = ENTRIES_BYTES.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |held| {
            held.checked_add(more).filter(|&held| held <= most)
        });
        self.0 += taken.map_or(0, |_| more);
        taken.map(drop).map_err(|_| {
            let message =
                "the server has no memory left for the entries of this run beside those of others; try again later";
            Failure::new(4, message.into(), 75)
        })
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        ENTRIES_BYTES.fetch_sub(self.0, Ordering::Relaxed);
    }
}

/// How many files the workers of a run have open.
#[derive(Debug, Default)]
pub(super) struct OpenFiles(AtomicUsize);

impl OpenFiles {
    /// Counts one more, where there may be one.
    pub(super) fn add(&self, most: usize) -> Result<(), Failure> {
        let added = self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |open| (open < most).then_some(open + 1));
        added.map(drop).map_err(|open| {
            let message = format!("{open} files are open in this run, which is as many as may be; finish one first");
            Failure::new(4, message, 4)
        })
    }

    pub(super) fn remove(&self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}
