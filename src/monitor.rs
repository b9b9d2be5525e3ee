//! Where the library reports what it does: it never prints.
//!
//! Counters are read by whoever shows progress; events are told as they happen.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::path::RelPath;

pub mod cpu;
pub mod threads;

/// Sums that grow while a run goes on. All are counts since its start.
#[derive(Debug, Default)]
pub struct Counters {
    /// Entries found by the scan of the source.
    pub scanned_entries: AtomicU64,
    /// Regular files to transfer.
    pub total_files: AtomicU64,
    /// Bytes of those files.
    pub total_bytes: AtomicU64,
    /// Files that are staged and verified.
    pub done_files: AtomicU64,
    /// Content bytes read at the source (also those found to be there already).
    pub done_bytes: AtomicU64,
    /// Content bytes sent or received, before compression.
    pub transferred_bytes: AtomicU64,
    /// What went over the wire, both directions, with the messages around the content; 0 where there is no wire.
    pub wire_bytes: AtomicU64,
}

impl Counters {
    /// Adds `count`.
    pub fn add(counter: &AtomicU64, count: u64) {
        counter.fetch_add(count, Ordering::Relaxed);
    }

    /// The current value.
    pub fn get(counter: &AtomicU64) -> u64 {
        counter.load(Ordering::Relaxed)
    }
}

/// Where a run is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Phase {
    Connecting,
    Scanning,
    Comparing,
    Transferring,
    Verifying,
    Publishing,
    Done,
}

/// One path that failed while the run goes on. After any problem nothing is deleted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// The path below the root; `None` for the root itself.
    pub path: Option<RelPath>,
    /// What failed, why, and what to do next; without the path.
    pub message: String,
    /// A skipped path (a socket, a link out of the tree) is said but does not make the run incomplete.
    pub severity: Severity,
}

/// How much a [`Problem`] weighs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Severity {
    /// Left out on purpose, by a rule that is documented.
    Skipped,
    /// Should have worked: the run ends as incomplete.
    Failed,
}

/// Something worth telling.
#[derive(Debug)]
pub enum Event<'a> {
    /// The run entered a phase.
    Phase(Phase),
    /// For `-v`: what was chosen and why.
    Detail(&'a str),
    /// Something the user should know although nothing failed.
    Warning(&'a str),
    /// A path that failed or was left out.
    Problem(&'a Problem),
}

/// Receives reports; called from any thread, and must not block for long.
pub trait Monitor: Send + Sync {
    /// Something happened.
    fn event(&self, event: Event<'_>);
    /// The sums of this run.
    fn counters(&self) -> &Counters;
    /// Whether the user wants the run to end: long walks end early then, and what they found is not used.
    fn stopped(&self) -> bool {
        false
    }
}

/// Says nothing, counts.
#[derive(Debug, Default)]
pub struct Silent(Counters);

impl Monitor for Silent {
    fn event(&self, _: Event<'_>) {}
    fn counters(&self) -> &Counters {
        &self.0
    }
}
