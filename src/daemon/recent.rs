//! What was published last; the same is kept on the disk.

use std::collections::VecDeque;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use super::history::{self, Filter, Log};
use super::status::Publication;

const KEPT: usize = 100;

/// The last publications and failures of all jobs.
#[derive(Debug)]
pub(super) struct Recent(Mutex<Inner>);

#[derive(Debug)]
struct Inner {
    last: VecDeque<Publication>,
    log: Log,
    /// That it cannot be kept was told.
    told: bool,
}

impl Recent {
    /// What an earlier daemon kept in this state directory.
    pub(super) fn open(state: &Path) -> Recent {
        let kept = history::publications(state, &Filter { limit: Some(KEPT), ..Filter::default() });
        let kept = kept.unwrap_or_else(|error| {
            tracing::warn!("the history in '{}' cannot be read: {error}", crate::error::shown(state));
            Vec::new()
        });
        let last = kept.into_iter().rev().collect();
        Recent(Mutex::new(Inner { last, log: Log::new(state), told: false }))
    }

    pub(super) fn add(&self, publication: Publication) {
        let mut inner = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match inner.log.add(&publication) {
            Ok(()) => inner.told = false,
            // Once: a disk that is full would fill the log too.
            Err(error) if !inner.told => {
                inner.told = true;
                tracing::warn!("the history cannot be kept, and 'lockstep history' will not have all: {error}");
            }
            Err(_) => {}
        }
        inner.last.truncate(KEPT - 1);
        inner.last.push_front(publication);
    }

    /// The newest first.
    pub(super) fn all(&self) -> Vec<Publication> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).last.iter().cloned().collect()
    }
}
