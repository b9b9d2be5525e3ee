//! Which files are still to be read: large ones first, so that no worker is left alone with one at the end; small
//! ones in the order of the tree, so that neighbours on the disk stay neighbours.

use std::collections::VecDeque;
use std::sync::Mutex;

use crate::endpoint::{Fetch, SMALL_FILE_BYTES};
use crate::manifest::Tree;
use crate::plan::{Action, Actions, Need, Plan};

/// The files of one run, handed out to its workers.
pub(super) struct Queue {
    actions: Actions,
    waiting: Mutex<Waiting>,
    files: usize,
    bytes: u64,
}

/// Places in the list of actions.
struct Waiting {
    large: VecDeque<u32>,
    /// Those from here on that are no large ones.
    small: usize,
}

fn fetch(action: &Action) -> Option<Fetch> {
    let (from, unless) = match &action.need {
        Need::Nothing => return None,
        Need::Content { resume_at } => (*resume_at, None),
        Need::Compare { digest } => (0, Some(**digest)),
    };
    Some(Fetch { from, unless, ..Fetch::of(action.index) })
}

impl Queue {
    pub(super) fn new(tree: &Tree, plan: &Plan) -> Queue {
        let mut large = Vec::new();
        let mut files = 0;
        for (place, action) in plan.actions.iter().enumerate().filter(|(_, action)| action.need != Need::Nothing) {
            files += 1;
            let size = size_of(tree, action);
            if size > SMALL_FILE_BYTES {
                large.push((size, place as u32));
            }
        }
        large.sort_by_key(|&(size, _)| std::cmp::Reverse(size));
        let large = large.into_iter().map(|(_, place)| place).collect();
        let waiting = Mutex::new(Waiting { large, small: 0 });
        Queue { actions: plan.actions.clone(), waiting, files, bytes: super::bytes_needed(tree, plan) }
    }

    /// The next file to read.
    pub(super) fn pop(&self, tree: &Tree) -> Option<Fetch> {
        let mut waiting = super::lock(&self.waiting);
        if let Some(place) = waiting.large.pop_front() {
            return fetch(&self.actions[place as usize]);
        }
        let rest = self.actions.get(waiting.small..)?.iter();
        let small = |action: &&Action| action.need != Need::Nothing && size_of(tree, action) <= SMALL_FILE_BYTES;
        let found = rest.enumerate().find(|(_, action)| small(action));
        let (passed, action) = found.map_or((self.actions.len(), None), |(at, action)| (at + 1, Some(action)));
        waiting.small += passed;
        fetch(action?)
    }

    pub(super) fn files(&self) -> usize {
        self.files
    }

    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }
}

fn size_of(tree: &Tree, action: &Action) -> u64 {
    tree.entries()[action.index as usize].file().map_or(0, |(size, _)| size)
}
