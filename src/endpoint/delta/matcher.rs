//! Looks for what the target has, in one file.
//!
//! Where nothing is known the target lists chunks, whose bounds go with their content, and the file is cut likewise. Once something
//! was found, what follows is likely to be what follows there: it is held against blocks of one length, from there on, which is
//! less work for both. Where that does not hold for a while, chunks are looked for again, from where it ended.

use std::collections::{HashMap, VecDeque};

use crossbeam_channel::TryRecvError;

use super::lister::Looks;
use super::{Alike, BLOCK_LENGTH, Beginning, COPY_MAX, Cut, Order, PIECES_MAX, Part, Step, Wanted, Within};
use crate::codec::chunks::{self, Chunk, ChunkId};
use crate::endpoint::Block;

/// The target has listed at least so much more than was looked for, before anything is sent for not being listed: the beginning of
/// each of its files.
const AHEAD_BYTES: u64 = 32 << 20;
/// Where nothing was found for so long in all that the target has, nothing is looked for any more.
const FRUITLESS_BYTES: u64 = 256 << 20;
/// So many chunks of what the target has are looked for, each takes about 60 bytes; at 256 KiB each these are 128 GiB of its files.
const KNOWN_MAX: usize = 1 << 19;
/// What follows on what was found is other for so long: it was moved.
const MOVED_BYTES: u64 = 1 << 20;

#[derive(Debug)]
enum Mode {
    /// Chunks are looked for, in what was listed since the file was there.
    Seek { since: u64, heard: u64 },
    /// What is read is held against what comes next at the target.
    Follow { next: Within, blocks: VecDeque<Chunk>, missed: u64 },
    /// Nothing is looked for.
    Vain,
}

/// Where a chunk lies at the target.
#[derive(Debug, Clone, Copy)]
struct Known {
    from: Within,
    length: u32,
    /// It lies elsewhere too, so that it does not say what follows.
    repeated: bool,
}

/// One file on its way.
pub struct Matcher {
    target: Box<dyn Looks>,
    /// The number of the last order, and whether it is done.
    order: u32,
    done: bool,
    pieces: u32,
    there: Option<Beginning>,
    /// The first part has come.
    heard: bool,
    mode: Mode,
    known: HashMap<ChunkId, Known>,
    /// What was fed and is not decided, and where in the file it begins.
    buffer: Vec<u8>,
    at: u64,
    /// What is to be copied, and may go on: where it goes, its length, and where it is.
    copy: Option<(u64, u64, Within)>,
    fruitless: u64,
}

impl Matcher {
    /// Of a file that is read from `from` on. What it wants to know `target` is asked for ([`list`](super::list)).
    pub fn new(from: u64, target: Box<dyn Looks>) -> Matcher {
        let mut matcher = Matcher {
            target,
            order: 0,
            done: false,
            pieces: 1,
            there: None,
            heard: false,
            mode: Mode::Vain,
            known: HashMap::new(),
            buffer: Vec::new(),
            at: from,
            copy: None,
            fruitless: 0,
        };
        matcher.seek(Within::default());
        matcher
    }

    /// Waits for the first part, and says whether the target has the file as a whole.
    pub fn begins_with_all(&mut self) -> bool {
        let Some(part) = self.target.part() else { return false };
        self.heard = true;
        let same = part.alike.as_ref().is_some_and(|alike| alike.same);
        self.hear(part);
        same
    }

    /// Waits for the first part, and says what the target has under the name of the file, where that only grows.
    pub fn there(&mut self) -> Option<Beginning> {
        if !self.heard {
            self.begins_with_all();
        }
        self.there
    }

    /// The file is expected to begin with what the target has under its name.
    pub fn expect_in_place(&mut self) {
        self.follow(Within::default());
    }

    /// The next bytes of the file.
    pub fn feed(&mut self, block: Block, steps: &mut Vec<Step>) {
        if matches!(self.mode, Mode::Vain) {
            self.flush(steps);
            let offset = self.at;
            self.at += block.data().len() as u64;
            return steps.push(Step::Data { offset, block });
        }
        self.decide(block.data(), false, steps);
    }

    /// So many zeros follow, which are not fed: what comes before them is decided.
    pub fn skip(&mut self, length: u64, steps: &mut Vec<Step>) {
        self.flush(steps);
        self.at += length;
        // It has a hole there too, or something else; what is behind is there or not.
        if let Mode::Follow { next, .. } = self.mode {
            self.follow(Within { offset: next.offset + length, ..next });
        }
    }

    /// Decides all that was fed.
    pub fn flush(&mut self, steps: &mut Vec<Step>) {
        self.decide(&[], true, steps);
        self.put_copy(steps);
    }

    fn decide(&mut self, mut rest: &[u8], all: bool, steps: &mut Vec<Step>) {
        // So much of the buffer is decided.
        let mut start = 0;
        loop {
            let buffered = self.buffer.len() - start;
            let wanted = match self.mode {
                Mode::Seek { .. } => chunks::MAX_BYTES,
                Mode::Follow { .. } => match self.next_length() {
                    Some(length) => length,
                    None => continue,
                },
                Mode::Vain => (buffered + rest.len()).max(1),
            };
            if buffered == 0 && rest.len() >= wanted {
                rest = &rest[self.one(&rest[..wanted], steps)..];
                continue;
            }
            let missing = wanted.saturating_sub(buffered).min(rest.len());
            self.buffer.extend_from_slice(&rest[..missing]);
            rest = &rest[missing..];
            let buffered = buffered + missing;
            if buffered == 0 || buffered < wanted && !all {
                break;
            }
            let buffer = std::mem::take(&mut self.buffer);
            let end = (start + wanted).min(buffer.len());
            start += self.one(&buffer[start..end], steps);
            self.buffer = buffer;
            if start == self.buffer.len() {
                self.buffer.clear();
                start = 0;
            }
        }
        self.buffer.drain(..start);
    }

    /// Decides the beginning of `data`; how much of it.
    fn one(&mut self, data: &[u8], steps: &mut Vec<Step>) -> usize {
        match &mut self.mode {
            Mode::Seek { .. } => self.look_for(data, steps),
            Mode::Follow { next, blocks, missed } => {
                let (from, block) = (*next, blocks.pop_front());
                next.offset += data.len() as u64;
                let is_there = block.is_some_and(|block| block.length as usize == data.len() && block.id.is_of(data));
                *missed = if is_there { 0 } else { *missed + data.len() as u64 };
                let moved = (*missed >= MOVED_BYTES).then_some(Within { offset: next.offset - *missed, ..from });
                match is_there {
                    true => self.add_copy(data.len() as u64, from, steps),
                    false => self.send(data, steps),
                }
                if let Some(from) = moved {
                    self.seek(from);
                }
                data.len()
            }
            Mode::Vain => {
                self.send(data, steps);
                data.len()
            }
        }
    }

    fn look_for(&mut self, data: &[u8], steps: &mut Vec<Step>) -> usize {
        let Some(chunk) = Chunk::first_of(data) else { return data.len() };
        self.listen();
        let length = chunk.length as usize;
        match self.known.get(&chunk.id).copied().filter(|known| known.length == chunk.length) {
            Some(Known { from, repeated, .. }) => {
                self.fruitless = 0;
                self.add_copy(u64::from(chunk.length), from, steps);
                // What all is known of is not asked for again.
                if !self.done && !repeated {
                    self.follow(Within { offset: from.offset + u64::from(chunk.length), ..from });
                }
            }
            None => {
                self.fruitless += u64::from(chunk.length);
                self.send(&data[..length], steps);
                if self.done && (self.known.is_empty() || self.fruitless > FRUITLESS_BYTES) {
                    self.mode = Mode::Vain;
                }
            }
        }
        length
    }

    /// How long the block is that comes next at the target. `None` where there is none, and chunks are looked for.
    fn next_length(&mut self) -> Option<usize> {
        loop {
            let Mode::Follow { next, blocks, .. } = &self.mode else { return None };
            if let Some(block) = blocks.front() {
                return Some(block.length as usize);
            }
            let piece = next.piece;
            if self.done {
                self.seek(Within { piece, offset: 0 });
                return None;
            }
            match self.target.part() {
                Some(part) => self.hear(part),
                // The list broke off.
                None => {
                    self.mode = Mode::Vain;
                    return None;
                }
            }
        }
    }

    fn order(&mut self, wanted: Vec<Wanted>) {
        self.order += 1;
        // Where nobody takes orders nothing more is listed.
        self.done = !self.target.order(Order { number: self.order, wanted });
    }

    /// Looks for chunks: of what lies from there on, then before, then in other files.
    fn seek(&mut self, from: Within) {
        self.mode = Mode::Seek { since: self.at, heard: 0 };
        let mut wanted = vec![by_content(from, u64::MAX)];
        if from.offset > 0 {
            wanted.push(by_content(Within { offset: 0, ..from }, from.offset));
        }
        let others = (0..self.pieces).filter(|piece| *piece != from.piece);
        wanted.extend(others.map(|piece| by_content(Within { piece, offset: 0 }, u64::MAX)));
        self.order(wanted);
    }

    /// Goes on looking, since there are other files beside the first, which was listed up to `next`: the beginning of each comes before
    /// the rest.
    fn seek_in_all(&mut self, next: Option<u64>) {
        let others = |to| (1..self.pieces).map(move |piece| by_content(Within { piece, offset: 0 }, to));
        let rest = next.map(|offset| by_content(Within { piece: 0, offset }, u64::MAX));
        self.order(others(1).chain(rest).chain(others(u64::MAX)).collect());
    }

    fn follow(&mut self, next: Within) {
        // Sums are of blocks from the start of the file on.
        let start = next.offset.next_multiple_of(BLOCK_LENGTH as u64);
        let short = (start - next.offset) as u32;
        // What is not told is what is not there.
        let untold =
            (short > 0 && self.target.is_wary()).then_some(Chunk { id: ChunkId::Content([0; 16]), length: short });
        let before = Wanted { from: next, to: start, cut: Cut::ByLength };
        let before = (short > 0 && untold.is_none()).then_some(before);
        self.mode = Mode::Follow { next, blocks: untold.into_iter().collect(), missed: 0 };
        let rest = Wanted { from: Within { offset: start, ..next }, to: u64::MAX, cut: Cut::BySum };
        self.order(before.into_iter().chain([rest]).collect());
    }

    /// Takes what the target has listed; waits where it has not come far enough.
    fn listen(&mut self) {
        while !self.done {
            let Mode::Seek { since, heard } = self.mode else { return };
            let part = match heard >= (self.at - since).saturating_add(AHEAD_BYTES) {
                true => self.target.part_now(),
                false => self.target.part().ok_or(TryRecvError::Disconnected),
            };
            match part {
                Ok(part) => self.hear(part),
                Err(TryRecvError::Empty) => return,
                Err(TryRecvError::Disconnected) => self.done = true,
            }
        }
    }

    fn hear(&mut self, Part { order, from, alike }: Part) {
        let current = order == self.order;
        let Some(alike) = alike else {
            self.done |= current;
            return;
        };
        let length = alike.chunks.iter().map(|chunk| u64::from(chunk.length)).sum::<u64>();
        self.there = self.there.or(alike.there);
        match (alike.cut, &mut self.mode) {
            (Cut::ByContent, mode) => {
                if let Mode::Seek { heard, .. } = mode {
                    *heard += length;
                }
                self.learn(from, &alike);
                if self.known.len() >= KNOWN_MAX {
                    // As if that were all that it has.
                    self.done |= current;
                    return;
                }
                // The first answer says how many there are.
                if order == 1 && current && alike.pieces.min(PIECES_MAX) > self.pieces {
                    self.pieces = alike.pieces.min(PIECES_MAX);
                    self.seek_in_all(alike.next);
                }
            }
            (Cut::ByLength | Cut::BySum, Mode::Follow { blocks, .. }) if current => blocks.extend(alike.chunks),
            _ => {}
        }
    }

    fn learn(&mut self, mut from: Within, part: &Alike) {
        for chunk in &part.chunks {
            // Of several that are alike the first will do.
            let first = || Known { from, length: chunk.length, repeated: false };
            let known = self.known.entry(chunk.id).or_insert_with(first);
            known.repeated |= known.from != from;
            from.offset += u64::from(chunk.length);
        }
    }

    fn send(&mut self, data: &[u8], steps: &mut Vec<Step>) {
        self.put_copy(steps);
        if !data.is_empty() {
            steps.push(Step::Data { offset: self.at, block: Block::copy_of(data) });
        }
        self.at += data.len() as u64;
    }

    fn add_copy(&mut self, length: u64, from: Within, steps: &mut Vec<Step>) {
        let at = self.at;
        self.at += length;
        if let Some((offset, so_far, place)) = &mut self.copy
            && place.piece == from.piece
            && place.offset + *so_far == from.offset
            && *offset + *so_far == at
            && *so_far + length <= COPY_MAX
        {
            *so_far += length;
            return;
        }
        self.put_copy(steps);
        self.copy = Some((at, length, from));
    }

    fn put_copy(&mut self, steps: &mut Vec<Step>) {
        if let Some((offset, length, from)) = self.copy.take() {
            steps.push(Step::Copy { offset, length, from });
        }
    }
}

fn by_content(from: Within, to: u64) -> Wanted {
    Wanted { from, to, cut: Cut::ByContent }
}

#[cfg(test)]
mod tests;
