//! What of a file need not be sent, since the target has it already: a list of chunks comes from there, and what the source reads is
//! looked up in it.
//!
//! What always holds: the steps cover what was fed, in its order and without a gap. Nothing is believed of the list but where to
//! look: the target hashes the whole file when all of it is there.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use crossbeam_channel::{Receiver, TryRecvError};

use crate::codec::chunks::{self, Chunk, ChunkId};
use crate::endpoint::Block;

/// A smaller file is sent sooner than it is compared.
pub const DELTA_BYTES_MIN: u64 = 1 << 20;
/// The target has listed what it has at least so far beyond where the source reads, before anything is sent for not being listed.
const AHEAD_BYTES: u64 = 96 << 20;
/// Where nothing was found for so long, nothing is looked for any more.
const FRUITLESS_BYTES: u64 = 256 << 20;
/// So much is copied by one step.
pub const COPY_MAX: u64 = 8 << 20;

/// So many files of a target are looked through for one.
pub const PIECES_MAX: u32 = 4;

/// A part of a file of the target, of which another may be made.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Alike {
    /// It is, by its digest, the file as a whole. Nothing is listed then.
    pub same: bool,
    /// So many such files there are, at most [`PIECES_MAX`]; the first is the most alike.
    pub pieces: u32,
    /// The chunks from where was asked, one after the other.
    pub chunks: Vec<Chunk>,
    /// Where the next part begins; `None` at the end.
    pub next: Option<u64>,
}

/// Where a target has something that it listed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Within {
    /// In which of the files that it has for one.
    pub piece: u32,
    /// Where in it.
    pub offset: u64,
}

/// Which of several files is listed on, since something was found in it.
#[derive(Debug, Clone, Default)]
pub struct Favourite(Arc<AtomicU32>);

impl Favourite {
    /// Its number.
    pub fn get(&self) -> Option<u32> {
        self.0.load(Ordering::Relaxed).checked_sub(1)
    }

    fn set(&self, piece: u32) {
        self.0.store(piece + 1, Ordering::Relaxed);
    }
}

/// How a part of a file comes to the target.
#[derive(Debug)]
pub enum Step {
    /// The target has it.
    Copy {
        /// Where in the file.
        offset: u64,
        /// How much.
        length: u64,
        /// Where the target has it.
        from: Within,
    },
    /// It has to be sent.
    Data {
        /// Where in the file.
        offset: u64,
        /// The bytes.
        block: Block,
    },
}

/// Looks for what the target has, in one file.
pub struct Matcher {
    parts: Receiver<(u32, Alike)>,
    known: HashMap<ChunkId, (Within, u32)>,
    /// How far the target has listed each of its files; `None` for all of it.
    listed: Vec<Option<u64>>,
    /// It lists nothing more.
    complete: bool,
    favourite: Favourite,
    /// Where something was found last.
    last: Option<Within>,
    /// What was fed and is not decided, and where in the file it begins.
    buffer: Vec<u8>,
    at: u64,
    /// What is to be copied, and may go on: where it goes, its length, and where it is.
    copy: Option<(u64, u64, Within)>,
    fruitless: u64,
}

impl Matcher {
    /// Of a file that is read from `from` on. `parts` brings what the target lists of each of its files, and ends with it.
    pub fn new(from: u64, parts: Receiver<(u32, Alike)>, favourite: Favourite) -> Matcher {
        Matcher {
            parts,
            known: HashMap::new(),
            listed: Vec::new(),
            complete: false,
            favourite,
            last: None,
            buffer: Vec::new(),
            at: from,
            copy: None,
            fruitless: 0,
        }
    }

    /// Waits for the first part, and says whether the target has the file as a whole.
    pub fn begins_with_all(&mut self) -> bool {
        match self.parts.recv() {
            Ok((_, first)) if first.same => true,
            Ok((piece, first)) => {
                self.learn(piece, &first);
                false
            }
            Err(_) => false,
        }
    }

    /// The next bytes of the file.
    pub fn feed(&mut self, block: Block, steps: &mut Vec<Step>) {
        if self.is_in_vain() {
            self.flush(steps);
            let offset = self.at;
            self.at += block.data().len() as u64;
            return steps.push(Step::Data { offset, block });
        }
        self.buffer.extend_from_slice(block.data());
        self.decide(chunks::MAX_BYTES, steps);
    }

    /// So many zeros follow, which are not fed: what comes before them is decided.
    pub fn skip(&mut self, length: u64, steps: &mut Vec<Step>) {
        self.flush(steps);
        self.at += length;
    }

    /// Decides all that was fed.
    pub fn flush(&mut self, steps: &mut Vec<Step>) {
        self.decide(1, steps);
        self.put_copy(steps);
    }

    /// Decides as long as there are so many bytes.
    fn decide(&mut self, least: usize, steps: &mut Vec<Step>) {
        let buffer = std::mem::take(&mut self.buffer);
        let mut rest = &buffer[..];
        while rest.len() >= least {
            let Some(chunk) = Chunk::first_of(rest) else { break };
            let (data, after) = rest.split_at(chunk.length as usize);
            rest = after;
            self.listen();
            let length = u64::from(chunk.length);
            match self.known.get(&chunk.id).filter(|known| known.1 == chunk.length) {
                Some(&(from, _)) => {
                    self.fruitless = 0;
                    self.last = Some(Within { offset: from.offset + length, ..from });
                    self.favourite.set(from.piece);
                    self.add_copy(length, from, steps);
                }
                None => {
                    self.fruitless += length;
                    self.put_copy(steps);
                    steps.push(Step::Data { offset: self.at, block: Block::copy_of(data) });
                }
            }
            self.at += length;
        }
        self.buffer = rest.to_vec();
    }

    fn is_in_vain(&self) -> bool {
        self.complete && (self.known.is_empty() || self.fruitless > FRUITLESS_BYTES)
    }

    /// Takes what the target has listed; waits where it has not come far enough.
    fn listen(&mut self) {
        while !self.complete {
            let part = match self.is_far_enough() {
                true => self.parts.try_recv(),
                false => self.parts.recv().map_err(|_| TryRecvError::Disconnected),
            };
            match part {
                Ok((piece, part)) => self.learn(piece, &part),
                Err(TryRecvError::Empty) => return,
                Err(TryRecvError::Disconnected) => self.complete = true,
            }
        }
    }

    /// Whether the target has listed what is likely to come next: what follows on what was found last. Where nothing was found,
    /// the beginning of each file, and of the first as much as was read.
    fn is_far_enough(&self) -> bool {
        let is_far = |piece: u32, offset: u64| match self.listed.get(piece as usize) {
            Some(Some(listed)) => *listed >= offset.saturating_add(AHEAD_BYTES),
            Some(None) => true,
            None => false,
        };
        let place = self.last.unwrap_or(Within { piece: 0, offset: self.at });
        let all_begun = self.last.is_some() || self.listed.iter().all(|listed| *listed != Some(0));
        all_begun && is_far(place.piece, place.offset)
    }

    fn learn(&mut self, piece: u32, part: &Alike) {
        let pieces = part.pieces.clamp(piece + 1, PIECES_MAX.max(piece + 1)) as usize;
        if self.listed.len() < pieces {
            self.listed.resize(pieces, Some(0));
        }
        let Some(mut offset) = self.listed[piece as usize] else { return };
        for chunk in &part.chunks {
            // Of several that are alike the first will do.
            self.known.entry(chunk.id).or_insert((Within { piece, offset }, chunk.length));
            offset += u64::from(chunk.length);
        }
        self.listed[piece as usize] = part.next.map(|_| offset);
    }

    fn add_copy(&mut self, length: u64, from: Within, steps: &mut Vec<Step>) {
        if let Some((offset, so_far, at)) = &mut self.copy
            && at.piece == from.piece
            && at.offset + *so_far == from.offset
            && *offset + *so_far == self.at
            && *so_far + length <= COPY_MAX
        {
            *so_far += length;
            return;
        }
        self.put_copy(steps);
        self.copy = Some((self.at, length, from));
    }

    fn put_copy(&mut self, steps: &mut Vec<Step>) {
        if let Some((offset, length, from)) = self.copy.take() {
            steps.push(Step::Copy { offset, length, from });
        }
    }
}

/// Tells all that there is of a file's pieces, as `ask` gives it by the number of a piece and a place in it, as long as `told` takes it.
/// First the beginning of each; then what something was found in, or one after the other.
pub fn list_all<E>(
    mut ask: impl FnMut(u32, u64) -> Result<Option<Alike>, E>,
    favourite: &Favourite,
    mut told: impl FnMut(u32, Alike) -> bool,
) -> Result<(), E> {
    let mut next: Vec<Option<u64>> = vec![Some(0)];
    let mut begun = 0;
    loop {
        let going_on = |piece: &usize| next.get(*piece).is_some_and(Option::is_some);
        let piece = if begun < next.len() {
            begun
        } else if let Some(favourite) = favourite.get() {
            match Some(favourite as usize).filter(going_on) {
                Some(piece) => piece,
                // What is in the others is looked for by nobody.
                None => return Ok(()),
            }
        } else {
            match (0..next.len()).find(going_on) {
                Some(piece) => piece,
                None => return Ok(()),
            }
        };
        begun = begun.max(piece + 1);
        let alike = ask(piece as u32, next[piece].unwrap_or(0))?;
        // One that is not what it was any more is left out.
        let alike = alike.unwrap_or(Alike { pieces: next.len() as u32, ..Alike::default() });
        if next.len() < alike.pieces.min(PIECES_MAX) as usize {
            next.resize(alike.pieces.min(PIECES_MAX) as usize, Some(0));
        }
        next[piece] = alike.next;
        if !told(piece as u32, alike) {
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crossbeam_channel::unbounded;
    use proptest::prelude::*;

    fn noise(seed: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut bytes);
        bytes
    }

    /// What a target lists of `data` from `from` on, so many chunks.
    fn part(data: &[u8], from: u64, count: usize, pieces: u32) -> Alike {
        let (mut alike, mut at) = (Alike { pieces, ..Alike::default() }, from);
        while let Some(chunk) = Chunk::first_of(&data[at as usize..]).filter(|_| alike.chunks.len() < count) {
            alike.chunks.push(chunk);
            at += u64::from(chunk.length);
        }
        alike.next = (at < data.len() as u64).then_some(at);
        alike
    }

    /// A matcher for what a target has, which lists so many chunks at once.
    fn matcher(there: &[&[u8]], each: usize) -> Matcher {
        let (sender, receiver) = unbounded();
        let favourite = Favourite::default();
        let ask = |piece: u32, from| -> Result<_, ()> {
            Ok(Some(part(there[piece as usize], from, each, there.len() as u32)))
        };
        list_all(ask, &favourite, |piece, alike| sender.send((piece, alike)).is_ok()).unwrap();
        Matcher::new(0, receiver, favourite)
    }

    /// What a target that has `there` makes of `new`, which is fed in blocks of so many bytes; how many bytes were sent.
    fn made(there: &[&[u8]], new: &[u8], block: usize, mut matcher: Matcher) -> (Vec<u8>, usize) {
        let mut steps = Vec::new();
        for bytes in new.chunks(block) {
            matcher.feed(Block::copy_of(bytes), &mut steps);
        }
        matcher.flush(&mut steps);
        let (mut made, mut sent) = (Vec::new(), 0);
        for step in steps {
            match step {
                Step::Copy { offset, length, from } => {
                    assert!(offset == made.len() as u64 && length <= COPY_MAX);
                    made.extend_from_slice(&there[from.piece as usize][from.offset as usize..][..length as usize]);
                }
                Step::Data { offset, block } => {
                    assert_eq!(offset, made.len() as u64);
                    sent += block.data().len();
                    made.extend_from_slice(block.data());
                }
            }
        }
        (made, sent)
    }

    #[test]
    fn only_what_the_target_does_not_have_is_sent() {
        let old = noise(1, 30 << 20);
        let insert = |at: usize| [&old[..at], b"a header that was longer", &old[at..]].concat();
        let changed = {
            let mut changed = old.clone();
            changed[10 << 20] ^= 1;
            changed
        };
        let moved = [&old[20 << 20..], &old[..20 << 20]].concat();
        for (what, new, most) in [
            ("the same", old.clone(), 0),
            ("a byte in the middle", changed, 2 << 20),
            ("something at the front", insert(0), 2 << 20),
            ("something in the middle", insert(15 << 20), 2 << 20),
            ("more at the end", [&old[..], &noise(2, 1 << 20)].concat(), 3 << 20),
            ("the end cut off", old[..20 << 20].to_vec(), 2 << 20),
            ("parts that changed places", moved, 4 << 20),
            ("nothing of it", noise(3, 10 << 20), 10 << 20),
        ] {
            for block in [1 << 20, 100_000] {
                let (result, sent) = made(&[&old], &new, block, matcher(&[&old], 16));
                assert!(result == new && sent <= most, "{what}: {sent} bytes were sent");
            }
        }
        assert_eq!(made(&[&[]], &old, 1 << 20, matcher(&[&[]], 1)).1, old.len());
    }

    #[test]
    fn of_several_files_the_one_is_listed_on_in_which_something_was_found() {
        let there: Vec<Vec<u8>> = (1..4).map(|seed| noise(seed, 20 << 20)).collect();
        let there: Vec<&[u8]> = there.iter().map(|data| &data[..]).collect();
        let (favourite, mut asked) = (Favourite::default(), Vec::new());
        let ask = |piece: u32, from| -> Result<_, ()> {
            if asked.len() == 3 {
                favourite.set(2);
            }
            asked.push((piece, from > 0));
            Ok(Some(part(there[piece as usize], from, 30, 3)))
        };
        list_all(ask, &favourite, |_, _| true).unwrap();
        assert_eq!(asked[..4], [(0, false), (1, false), (2, false), (0, true)]);
        assert!(asked.len() > 5 && asked[4..].iter().all(|&asked| asked == (2, true)), "{asked:?}");
        for (new, most) in [(there[1].to_vec(), 0), ([there[2], there[0]].concat(), 2 << 20)] {
            let (result, sent) = made(&there, &new, 1 << 20, matcher(&there, 30));
            assert!(result == new && sent <= most, "{sent} bytes were sent");
        }
    }

    #[test]
    fn a_list_that_breaks_off_costs_only_what_it_does_not_have() {
        let old = noise(1, 20 << 20);
        let (sender, receiver) = unbounded();
        sender.send((0, part(&old, 0, 20, 1))).unwrap();
        drop(sender);
        let (result, sent) = made(&[&old], &old, 1 << 20, Matcher::new(0, receiver, Favourite::default()));
        assert!(result == old && sent > 0 && sent < old.len());
    }

    #[test]
    fn a_file_of_which_nothing_is_found_is_not_looked_at_to_its_end() {
        let (sender, receiver) = unbounded();
        let chunks = vec![Chunk { id: ChunkId([0; 16]), length: 100_000 }];
        sender.send((0, Alike { chunks, ..Alike::default() })).unwrap();
        drop(sender);
        let mut matcher = Matcher::new(0, receiver, Favourite::default());
        let (mut steps, block) = (Vec::new(), vec![7; 1 << 20]);
        for _ in 0..FRUITLESS_BYTES / (1 << 20) + 8 {
            matcher.feed(Block::copy_of(&block), &mut steps);
        }
        assert!(matcher.is_in_vain());
        matcher.flush(&mut steps);
        let mut at = 0;
        for step in steps {
            let Step::Data { offset, block } = step else { panic!("{step:?}") };
            assert_eq!(offset, at);
            at += block.data().len() as u64;
        }
        assert_eq!(at, FRUITLESS_BYTES + (8 << 20));
    }

    #[derive(Debug, Clone)]
    enum Edit {
        Insert(usize, usize),
        Remove(usize, usize),
        Replace(usize, usize),
        Move(usize, usize, usize),
    }

    fn edit() -> impl Strategy<Value = Edit> {
        let (at, length) = (0_usize..(6 << 20), 0_usize..(1 << 20));
        prop_oneof![
            (at.clone(), length.clone()).prop_map(|(at, length)| Edit::Insert(at, length)),
            (at.clone(), length.clone()).prop_map(|(at, length)| Edit::Remove(at, length)),
            (at.clone(), length.clone()).prop_map(|(at, length)| Edit::Replace(at, length)),
            (at.clone(), length, at).prop_map(|(at, length, to)| Edit::Move(at, length, to)),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn whatever_was_edited_the_target_makes_the_same_file(
            edits in prop::collection::vec(edit(), 0..6), block in 1_000_usize..2_000_000, each in 1_usize..40, seed in any::<u64>(),
        ) {
            let old = noise(9, 6 << 20);
            let mut new = old.clone();
            for edit in edits {
                let within = |at: usize, new: &Vec<u8>| at.min(new.len());
                match edit {
                    Edit::Insert(at, length) => {
                        let at = within(at, &new);
                        new.splice(at..at, noise(seed, length));
                    }
                    Edit::Remove(at, length) => {
                        let at = within(at, &new);
                        let end = within(at + length, &new);
                        new.drain(at..end);
                    }
                    Edit::Replace(at, length) => {
                        let at = within(at, &new);
                        let end = within(at + length, &new);
                        new.splice(at..end, noise(seed ^ 1, end - at));
                    }
                    Edit::Move(at, length, to) => {
                        let at = within(at, &new);
                        let end = within(at + length, &new);
                        let moved: Vec<u8> = new.drain(at..end).collect();
                        let to = within(to, &new);
                        new.splice(to..to, moved);
                    }
                }
            }
            let other = noise(8, 3 << 20);
            for there in [&[&old[..]][..], &[&other, &old]] {
                prop_assert!(made(there, &new, block, matcher(there, each)).0 == new);
            }
        }
    }
}
