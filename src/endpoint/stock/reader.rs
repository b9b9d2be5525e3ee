//! Content from a stock server, for one worker thread.
//!
//! A file is looked at before and after it is read; it counts as changed when size or time (to the second, SFTP knows no
//! more) are not those that were listed.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use sha2::{Digest as _, Sha256};

use super::read::{Piece, ReadQueue, Wanted};
use super::session::Session;
use super::{REGULAR, below, kind_of};
use crate::endpoint::guarded::CHANGED;
use crate::endpoint::spread::Spread;
use crate::endpoint::{BLOCK_BYTES, Block, Error, Fetch, Produced, Reader, SMALL_FILE_BYTES};
use crate::manifest::{Content, Digest, Entry, Timestamp, Tree};
use crate::wire::sftp::Attributes;

/// Files asked for ahead, and their bytes: what one worker has asked for no other can take.
const AHEAD: usize = 256;
const AHEAD_BYTES: u64 = 64 << 20;
/// What was changed so long ago, by the clock here, is read over several connections: the clock there may be another.
const SETTLED_SECONDS: i64 = 60;

struct File {
    fetch: Fetch,
    size: u64,
    hash: Sha256,
    /// Whole, of a small file; else what is not yet a block.
    held: Block,
    held_at: u64,
    /// Its digest is wanted first: nothing is given of it unless it differs.
    only_hashed: bool,
}

/// The reader of one worker.
pub(super) struct StockReader {
    root: Vec<u8>,
    tree: Arc<Tree>,
    queue: ReadQueue,
    files: HashMap<u64, File>,
    ready: VecDeque<Produced>,
    next: u64,
    /// Bytes of `files`.
    ahead: u64,
}

impl StockReader {
    pub(super) fn new(spread: Spread<Session>, root: &[u8], tree: Arc<Tree>) -> StockReader {
        let queue = ReadQueue::new(spread);
        StockReader {
            root: root.to_vec(),
            tree,
            queue,
            files: HashMap::new(),
            ready: VecDeque::new(),
            next: 0,
            ahead: 0,
        }
    }

    fn ask(&mut self, fetch: Fetch, only_hashed: bool) {
        let failed = |message: &str| Produced::Failed { index: fetch.index, message: message.into(), retry: false };
        let Some((entry, size)) = self.tree.entries().get(fetch.index as usize).and_then(|entry| match entry.content {
            Content::File { size, .. } => Some((entry, size)),
            _ => None,
        }) else {
            return self.ready.push_back(failed("is not a regular file of the tree"));
        };
        let id = self.next;
        self.next += 1;
        let held = Block::with_capacity(0);
        let only_hashed = only_hashed && size > SMALL_FILE_BYTES;
        self.ahead += size;
        self.files.insert(id, File { fetch, size, hash: Sha256::new(), held, held_at: 0, only_hashed });
        let alone = settled(entry.mtime);
        self.queue.push(Wanted { id, path: below(&self.root, &entry.path), from: 0, size, alone });
    }

    fn take(&mut self, piece: Piece) {
        match piece {
            Piece::Data { id, offset, data } => {
                if let Some(file) = self.files.get_mut(&id) {
                    self.ready.extend(file.data(offset, &data));
                }
            }
            Piece::End { id, before, after } => {
                let Some(file) = self.files.remove(&id) else { return };
                self.ahead -= file.size;
                let entry = &self.tree.entries()[file.fetch.index as usize];
                if !(is_as_listed(entry, &before) && is_as_listed(entry, &after)) {
                    return self.ready.push_back(changed(file.fetch.index));
                }
                if let Some(again) = file.end(&mut self.ready) {
                    self.ask(again, false);
                }
            }
            Piece::Failed { id, why } => {
                let Some(file) = self.files.remove(&id) else { return };
                self.ahead -= file.size;
                let index = file.fetch.index;
                self.ready.push_back(match why {
                    Ok(()) => changed(index),
                    Err(refusal) => Produced::Failed { index, message: format!("read: {refusal}"), retry: false },
                });
            }
        }
    }
}

/// A file that another takes the place of has another time, to the second that SFTP tells, or is as new as this.
fn settled(modified: Timestamp) -> bool {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs() as i64;
    modified.seconds < now.saturating_sub(SETTLED_SECONDS)
}

fn changed(index: u32) -> Produced {
    let message = format!("{CHANGED}; pull again when its writer has finished");
    Produced::Failed { index, message, retry: true }
}

fn is_as_listed(entry: &Entry, now: &Attributes) -> bool {
    let Some((size, _)) = entry.file() else { return false };
    let time = now.times.map(|(_, modified)| i64::from(modified));
    kind_of(now) == Some(REGULAR) && now.size == Some(size) && time == Some(entry.mtime.seconds)
}

impl File {
    /// Hashes bytes and gives those that make a block.
    fn data(&mut self, offset: u64, data: &[u8]) -> Vec<Produced> {
        self.hash.update(data);
        let index = self.fetch.index;
        let mut produced = Vec::new();
        if self.only_hashed {
            return produced;
        }
        let end = offset + data.len() as u64;
        if self.size <= SMALL_FILE_BYTES && self.fetch.from == 0 {
            if offset == 0 {
                self.held = Block::with_capacity(self.size as usize);
            }
            self.held.buffer_mut().extend_from_slice(data);
            return produced;
        }
        if end <= self.fetch.from {
            return produced;
        }
        let skip = self.fetch.from.saturating_sub(offset) as usize;
        let mut data = &data[skip..];
        while !data.is_empty() {
            if self.held.data().is_empty() {
                self.held_at = end - data.len() as u64;
                self.held = Block::with_capacity(BLOCK_BYTES.min((self.size - self.held_at) as usize));
            }
            let room = BLOCK_BYTES - self.held.data().len();
            let (now, later) = data.split_at(room.min(data.len()));
            self.held.buffer_mut().extend_from_slice(now);
            data = later;
            let held = self.held.data().len();
            if held == BLOCK_BYTES || self.held_at + held as u64 == self.size {
                let block = std::mem::replace(&mut self.held, Block::with_capacity(0));
                produced.push(Produced::Data { index, offset: self.held_at, block });
            }
        }
        produced
    }

    /// All is read and was not changed meanwhile. Gives what is to be read again.
    fn end(self, ready: &mut VecDeque<Produced>) -> Option<Fetch> {
        let index = self.fetch.index;
        let digest = Digest(self.hash.finalize().into());
        if self.fetch.unless == Some(digest) {
            ready.push_back(Produced::Same { index, digest });
        } else if self.only_hashed {
            return Some(Fetch { unless: None, ..self.fetch });
        } else if self.size <= SMALL_FILE_BYTES && self.fetch.from == 0 {
            ready.push_back(Produced::Whole { index, block: self.held, digest });
        } else {
            ready.push_back(Produced::End { index, digest });
        }
        None
    }
}

impl Reader for StockReader {
    fn wants_more(&self) -> bool {
        self.files.len() < AHEAD && self.ahead < AHEAD_BYTES
    }

    fn push(&mut self, fetch: Fetch) {
        self.ask(fetch, fetch.unless.is_some());
    }

    fn next(&mut self) -> Result<Option<Produced>, Error> {
        loop {
            if let Some(produced) = self.ready.pop_front() {
                return Ok(Some(produced));
            }
            match self.queue.next()? {
                Some(piece) => self.take(piece),
                // What was taken may have asked for more.
                None if self.queue.files() == 0 && self.ready.is_empty() => return Ok(None),
                None => {}
            }
        }
    }
}
