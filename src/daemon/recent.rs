//! What was published last.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

use super::status::Publication;

const KEPT: usize = 100;

/// The last publications and failures of all jobs.
#[derive(Debug, Default)]
pub(super) struct Recent(Mutex<VecDeque<Publication>>);

impl Recent {
    pub(super) fn add(&self, publication: Publication) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.truncate(KEPT - 1);
        all.push_front(publication);
    }

    /// The newest first.
    pub(super) fn all(&self) -> Vec<Publication> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect()
    }
}
