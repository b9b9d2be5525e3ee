//! Reads the nodes of a tree in memory.

use std::collections::VecDeque;
use std::sync::Arc;

use super::{Memory, digest, lock};
use crate::endpoint::{Block, Error, Fetch, Produced, Reader};
use crate::manifest::Tree;

/// Files up to this size come whole; others in pieces of it. Small, so that tests see many pieces.
const PIECE_BYTES: usize = 16;

pub(super) struct MemoryReader<'a> {
    memory: &'a Memory,
    tree: Arc<Tree>,
    waiting: VecDeque<Fetch>,
    ready: VecDeque<Produced>,
}

impl<'a> MemoryReader<'a> {
    pub(super) fn new(memory: &'a Memory, tree: Arc<Tree>) -> Self {
        MemoryReader { memory, tree, waiting: VecDeque::new(), ready: VecDeque::new() }
    }

    fn produce(&mut self, fetch: Fetch) {
        let index = fetch.index;
        let entry = &self.tree.entries()[index as usize];
        let data = lock(&self.memory.nodes).get(&entry.path).map(|node| node.data.clone());
        let Some(data) = data.filter(|data| entry.file().is_some_and(|(size, _)| size == data.len() as u64)) else {
            let message = "changed while it was read".to_owned();
            self.ready.push_back(Produced::Failed { index, message, retry: false });
            return;
        };
        let found = digest(&data);
        if fetch.unless == Some(found) {
            self.ready.push_back(Produced::Same { index, digest: found });
        } else if data.len() <= PIECE_BYTES && fetch.from == 0 {
            self.ready.push_back(Produced::Whole { index, block: Block::copy_of(&data), digest: found });
        } else {
            let rest = &data[(fetch.from as usize).min(data.len())..];
            for (piece, bytes) in rest.chunks(PIECE_BYTES).enumerate() {
                let offset = fetch.from + (piece * PIECE_BYTES) as u64;
                self.ready.push_back(match bytes.iter().all(|byte| *byte == 0) {
                    true => Produced::Hole { index, offset, length: bytes.len() as u64 },
                    false => Produced::Data { index, offset, block: Block::copy_of(bytes) },
                });
            }
            self.ready.push_back(Produced::End { index, digest: found });
        }
    }
}

impl Reader for MemoryReader<'_> {
    fn wants_more(&self) -> bool {
        self.waiting.len() + self.ready.len() < 4
    }

    fn push(&mut self, fetch: Fetch) {
        self.waiting.push_back(fetch);
    }

    fn next(&mut self) -> Result<Option<Produced>, Error> {
        self.memory.call()?;
        while self.ready.is_empty() {
            let Some(fetch) = self.waiting.pop_front() else { return Ok(None) };
            self.produce(fetch);
        }
        Ok(self.ready.pop_front())
    }
}
