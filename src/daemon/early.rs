//! Files of units that are not finished, which are: they may be brought before the unit may be seen. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use crate::path::RelPath;

/// More than so many are not remembered; they go with their units.
const MAX: usize = 10_000;

#[derive(Debug, Default)]
pub(super) struct Early {
    /// By the time of the last change.
    waiting: BTreeMap<RelPath, Instant>,
    ready: BTreeSet<RelPath>,
}

impl Early {
    /// A file was closed, or appeared whole.
    pub(super) fn add(&mut self, path: &RelPath, at: Instant) {
        self.ready.remove(path);
        if self.waiting.len() < MAX {
            self.waiting.insert(path.clone(), at);
        }
    }

    /// What lies at `top` or below changes, is gone, or goes with its unit.
    pub(super) fn forget(&mut self, top: &RelPath) {
        self.waiting.retain(|path, _| !path.is_within(top));
        self.ready.retain(|path| !path.is_within(top));
    }

    /// Takes note of what was left alone for long enough; when to ask again.
    pub(super) fn due(&mut self, now: Instant, settle: Duration) -> Option<Instant> {
        let ready = &mut self.ready;
        self.waiting.retain(|path, at| {
            let rests = *at + settle <= now;
            if rests {
                ready.insert(path.clone());
            }
            !rests
        });
        self.waiting.values().min().map(|at| *at + settle)
    }

    /// What is finished since this was asked last.
    pub(super) fn take(&mut self) -> BTreeSet<RelPath> {
        std::mem::take(&mut self.ready)
    }

    /// Whether a file changed, and was not left alone for long enough since.
    pub(super) fn waits(&self, path: &RelPath) -> bool {
        self.waiting.contains_key(path)
    }
}
