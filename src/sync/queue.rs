//! Which files are still to be read: large ones first, so that no worker is left alone with one at the end; small
//! ones in the order of the tree, so that neighbours on the disk stay neighbours.

use std::collections::VecDeque;
use std::sync::Mutex;

use crate::endpoint::{Fetch, SMALL_FILE_BYTES};
use crate::manifest::Tree;
use crate::plan::{Need, Plan};

/// The files of one run, handed out to its workers.
pub(super) struct Queue {
    waiting: Mutex<Waiting>,
    files: usize,
    bytes: u64,
}

struct Waiting {
    large: VecDeque<Fetch>,
    small: VecDeque<Fetch>,
}

impl Queue {
    pub(super) fn new(tree: &Tree, plan: &Plan) -> Queue {
        let mut large = Vec::new();
        let mut small = VecDeque::new();
        for action in &plan.actions {
            let size = tree.entries()[action.index as usize].file().map_or(0, |(size, _)| size);
            let fetch = match action.need {
                Need::Nothing => continue,
                Need::Content { resume_at } => Fetch { index: action.index, from: resume_at, unless: None },
                Need::Compare { digest } => Fetch { index: action.index, from: 0, unless: Some(digest) },
            };
            if size > SMALL_FILE_BYTES { large.push((size, fetch)) } else { small.push_back(fetch) }
        }
        large.sort_by_key(|&(size, _)| std::cmp::Reverse(size));
        let files = large.len() + small.len();
        let waiting = Waiting { large: large.into_iter().map(|(_, fetch)| fetch).collect(), small };
        Queue { waiting: Mutex::new(waiting), files, bytes: super::bytes_needed(tree, plan) }
    }

    /// The next file to read.
    pub(super) fn pop(&self) -> Option<Fetch> {
        let mut waiting = super::lock(&self.waiting);
        waiting.large.pop_front().or_else(|| waiting.small.pop_front())
    }

    pub(super) fn files(&self) -> usize {
        self.files
    }

    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }
}
