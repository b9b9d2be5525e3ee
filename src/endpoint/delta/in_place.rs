//! Looks for what the target has where it is in the file too, in one that the target cannot look into: by sums of blocks that are known of
//! it.
//!
//! What always holds: the steps cover what was fed, in its order and without a gap, and what is copied lies where it goes. What was
//! inserted or moved is not found.

use std::sync::Arc;

use super::{BLOCK_LENGTH, COPY_MAX, Step, Sums, Within};
use crate::endpoint::Block;

/// What is sent in between is put together up to this length.
const SENT_BYTES: usize = 512 << 10;

/// One file on its way.
pub struct InPlace {
    /// What it may be made of, the most alike first, and which of them have had all that was found so far; one of them once something of it
    /// is to be copied.
    pieces: Vec<(u32, Arc<Sums>)>,
    /// What was fed and is not decided: the beginning of a block of the file.
    buffer: Vec<u8>,
    at: u64,
    /// What is to be copied, and may go on: where it begins, and its length.
    copy: Option<(u64, u64)>,
    /// What is to be sent, and may go on; it ends where `at` is.
    send: Vec<u8>,
}

impl InPlace {
    /// Of a file that is read from `from` on.
    pub fn new(from: u64, pieces: Vec<Arc<Sums>>) -> InPlace {
        InPlace { pieces: (0..).zip(pieces).collect(), buffer: Vec::new(), at: from, copy: None, send: Vec::new() }
    }

    /// The next bytes of the file.
    pub fn feed(&mut self, block: Block, steps: &mut Vec<Step>) {
        if self.is_all_new(block.data()) {
            self.put(steps);
            let offset = self.at;
            self.at += block.data().len() as u64;
            return steps.push(Step::Data { offset, block });
        }
        let mut rest = block.data();
        while !rest.is_empty() {
            let missing = self.left_of_block() - self.buffer.len();
            let (now, later) = rest.split_at(missing.min(rest.len()));
            rest = later;
            if self.buffer.is_empty() && now.len() == missing {
                self.decide(now, steps);
                continue;
            }
            self.buffer.extend_from_slice(now);
            if now.len() == missing {
                let buffer = std::mem::take(&mut self.buffer);
                self.decide(&buffer, steps);
            }
        }
    }

    /// So many zeros follow, which are not fed: what comes before them is decided.
    pub fn skip(&mut self, length: u64, steps: &mut Vec<Step>) {
        self.flush(steps);
        self.at += length;
    }

    /// Decides all that was fed.
    pub fn flush(&mut self, steps: &mut Vec<Step>) {
        let buffer = std::mem::take(&mut self.buffer);
        if !buffer.is_empty() {
            self.decide(&buffer, steps);
        }
        self.put(steps);
    }

    /// How much there is from here to the end of a block.
    fn left_of_block(&self) -> usize {
        BLOCK_LENGTH - (self.at % BLOCK_LENGTH as u64) as usize
    }

    /// The pieces that have `data`, which begins at `at`, as one of their blocks.
    fn having(&self, at: u64, data: &[u8]) -> impl Iterator<Item = u32> {
        // Where a hole has moved the beginning, it is none.
        let number = at.is_multiple_of(BLOCK_LENGTH as u64).then_some(at / BLOCK_LENGTH as u64);
        let sum = if number.is_some() { Sums::of_block(data) } else { 0 };
        let (length, pieces) = (data.len(), self.pieces.iter());
        pieces
            .filter(move |(_, sums)| number.is_some_and(|number| sums.has(number, length, sum)))
            .map(|(piece, _)| *piece)
    }

    /// Whether `data` is whole blocks of the file of which the target has none: it need not be copied to be sent.
    fn is_all_new(&self, data: &[u8]) -> bool {
        let whole = self.at.is_multiple_of(BLOCK_LENGTH as u64) && data.len().is_multiple_of(BLOCK_LENGTH);
        let mut blocks = (self.at..).step_by(BLOCK_LENGTH).zip(data.chunks(BLOCK_LENGTH));
        whole && self.buffer.is_empty() && blocks.all(|(at, block)| self.having(at, block).next().is_none())
    }

    /// Decides `data`, which is a block of the file or a part of one.
    fn decide(&mut self, data: &[u8], steps: &mut Vec<Step>) {
        let having: Vec<u32> = self.having(self.at, data).collect();
        if having.is_empty() {
            self.put_copy(steps);
            self.send.extend_from_slice(data);
            self.at += data.len() as u64;
            if self.send.len() >= SENT_BYTES {
                self.put(steps);
            }
            return;
        }
        self.put_sent(steps);
        // What several begin with says nothing of which of them it is.
        self.pieces.retain(|(piece, _)| having.contains(piece));
        let (start, length) = self.copy.take().unwrap_or((self.at, 0));
        let length = length + data.len() as u64;
        self.at += data.len() as u64;
        self.copy = Some((start, length));
        if length >= COPY_MAX {
            self.put_copy(steps);
        }
    }

    fn put(&mut self, steps: &mut Vec<Step>) {
        self.put_sent(steps);
        self.put_copy(steps);
    }

    fn put_sent(&mut self, steps: &mut Vec<Step>) {
        if !self.send.is_empty() {
            let offset = self.at - self.send.len() as u64;
            steps.push(Step::Data { offset, block: Block::copy_of(&self.send) });
            self.send.clear();
        }
    }

    fn put_copy(&mut self, steps: &mut Vec<Step>) {
        if let Some((offset, length)) = self.copy.take() {
            self.pieces.truncate(1);
            let piece = self.pieces.first().map_or(0, |(piece, _)| *piece);
            steps.push(Step::Copy { offset, length, from: Within { piece, offset } });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Summing;
    use super::*;
    use proptest::prelude::*;

    const MIB: usize = 1 << 20;

    fn noise(seed: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut bytes);
        bytes
    }

    fn sums(data: &[u8]) -> Arc<Sums> {
        let mut summing = Summing::default();
        summing.update(data);
        Arc::new(summing.finish())
    }

    /// What a target that has `there` makes of `new`, which is fed in blocks of so many bytes; how many bytes were sent, and by how many
    /// steps.
    fn made(there: &[&[u8]], new: &[u8], block: usize) -> (Vec<u8>, usize, usize) {
        let mut in_place = InPlace::new(0, there.iter().map(|data| sums(data)).collect());
        let mut steps = Vec::new();
        new.chunks(block).for_each(|bytes| in_place.feed(Block::copy_of(bytes), &mut steps));
        in_place.flush(&mut steps);
        let (mut made, mut sent, count) = (Vec::new(), 0, steps.len());
        let mut from = None;
        for step in steps {
            match step {
                Step::Copy { offset, length, from: Within { piece, offset: within } } => {
                    assert!(offset == made.len() as u64 && within == offset && length <= COPY_MAX);
                    assert_eq!(*from.get_or_insert(piece), piece, "it is made of one file");
                    made.extend_from_slice(&there[piece as usize][within as usize..][..length as usize]);
                }
                Step::Data { offset, block } => {
                    assert_eq!(offset, made.len() as u64);
                    sent += block.data().len();
                    made.extend_from_slice(block.data());
                }
            }
        }
        (made, sent, count)
    }

    #[test]
    fn what_is_in_its_place_still_is_copied() {
        let old = noise(1, 20 * MIB + 7);
        let mut changed = old.clone();
        changed[10 * MIB] ^= 1;
        let mut replaced = old.clone();
        replaced[5 * MIB..9 * MIB].copy_from_slice(&noise(4, 4 * MIB));
        for (what, new, most) in [
            ("the same", old.clone(), 0),
            ("a byte in the middle", changed, BLOCK_LENGTH),
            ("4 MiB in the middle", replaced, 4 * MIB),
            ("more at the end", [&old[..], &noise(2, MIB)].concat(), MIB + 7),
            ("the end cut off", old[..19 * MIB + 1].to_vec(), 1),
            ("nothing of it", noise(3, 10 * MIB), 10 * MIB),
        ] {
            for block in [512 << 10, 100_000, 3 * MIB] {
                let (result, sent, steps) = made(&[&old], &new, block);
                assert!(result == new && sent <= most, "{what}: {sent} bytes were sent");
                assert!(steps < 45, "{what}: {steps} steps");
            }
        }
        assert_eq!(made(&[&[]], &old, MIB).1, old.len());
        assert_eq!(made(&[], &old, MIB).1, old.len());
    }

    #[test]
    fn of_several_that_begin_alike_the_one_that_goes_on_alike_is_chosen() {
        let there: Vec<Vec<u8>> = (1..4).map(|seed| [&noise(9, MIB)[..], &noise(seed, 9 * MIB)].concat()).collect();
        let pieces: Vec<&[u8]> = there.iter().map(|data| &data[..]).collect();
        for new in &there {
            assert_eq!(made(&pieces, new, 512 << 10).1, 0);
        }
    }

    #[test]
    fn what_is_behind_a_hole_is_found_where_a_block_begins() {
        let old = noise(1, 10 * MIB);
        for (hole, sent_of) in [(4 * MIB, 0), (4 * MIB + 4096, BLOCK_LENGTH - 4096)] {
            let mut in_place = InPlace::new(0, vec![sums(&old)]);
            let mut steps = Vec::new();
            in_place.feed(Block::copy_of(&old[..2 * MIB]), &mut steps);
            in_place.skip((hole - 2 * MIB) as u64, &mut steps);
            in_place.feed(Block::copy_of(&old[hole..]), &mut steps);
            in_place.flush(&mut steps);
            let (mut copied, mut sent) = (0, 0);
            for step in &steps {
                match step {
                    Step::Copy { length, .. } => copied += *length as usize,
                    Step::Data { block, .. } => sent += block.data().len(),
                }
            }
            assert_eq!((copied + sent, sent), (2 * MIB + old.len() - hole, sent_of));
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn whatever_was_changed_the_target_makes_the_same_file(
            edits in prop::collection::vec((0_usize..(3 << 20), 0_usize..400_000), 0..8),
            block in 1_000_usize..2_000_000, length in 0_usize..(4 << 20), seed in 2_u64..1000,
        ) {
            let (old, other) = (noise(1, 3 << 20), noise(8, 2 << 20));
            let mut new = old.clone();
            new.resize(length, 3);
            for (at, count) in edits {
                let (from, to) = (at.min(length), (at + count).min(length));
                new[from..to].copy_from_slice(&noise(seed, to - from));
            }
            for there in [&[&old[..]][..], &[&other, &old]] {
                prop_assert!(made(there, &new, block).0 == new);
            }
        }
    }
}
