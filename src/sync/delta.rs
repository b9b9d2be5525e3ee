//! What becomes of a file of which the target has parts, or perhaps all.

use crate::endpoint::Block;
use crate::endpoint::delta::{InPlace, Matcher, Step, Within};
use crate::manifest::Digest;

/// What the writer is given.
#[derive(Debug)]
pub(crate) enum Piece {
    Copy { offset: u64, length: u64, from: Within },
    Hole { offset: u64, length: u64 },
    Data { offset: u64, block: Block },
}

impl Piece {
    /// How much of the file it is.
    pub(crate) fn length(&self) -> u64 {
        match self {
            Piece::Copy { length, .. } | Piece::Hole { length, .. } => *length,
            Piece::Data { block, .. } => block.data().len() as u64,
        }
    }
}

/// How what the target has is looked for.
enum Search {
    /// In what the target lists.
    Listed(Box<Matcher>),
    /// In its place, by what is known of what the target has.
    InPlace(InPlace),
}

impl Search {
    fn feed(&mut self, block: Block, steps: &mut Vec<Step>) {
        match self {
            Search::Listed(matcher) => matcher.feed(block, steps),
            Search::InPlace(in_place) => in_place.feed(block, steps),
        }
    }

    fn skip(&mut self, length: u64, steps: &mut Vec<Step>) {
        match self {
            Search::Listed(matcher) => matcher.skip(length, steps),
            Search::InPlace(in_place) => in_place.skip(length, steps),
        }
    }

    fn flush(&mut self, steps: &mut Vec<Step>) {
        match self {
            Search::Listed(matcher) => matcher.flush(steps),
            Search::InPlace(in_place) => in_place.flush(steps),
        }
    }
}

/// One file.
pub(crate) struct Delta {
    search: Search,
    /// What the target has under the file's name has this digest; nothing is given to the writer as long as the two may be the same.
    unless: Option<Digest>,
    /// What the writer gets if they are not.
    held: Vec<Piece>,
}

impl Delta {
    pub(crate) fn new(matcher: Matcher, unless: Option<Digest>) -> Delta {
        Delta { search: Search::Listed(Box::new(matcher)), unless, held: Vec::new() }
    }

    /// Of a file of which the target can list nothing.
    pub(super) fn in_place(in_place: InPlace, unless: Option<Digest>) -> Delta {
        Delta { search: Search::InPlace(in_place), unless, held: Vec::new() }
    }

    /// The next bytes.
    pub(crate) fn feed(&mut self, block: Block) -> Vec<Piece> {
        let mut steps = Vec::new();
        self.search.feed(block, &mut steps);
        self.give(steps)
    }

    /// The next zeros.
    pub(crate) fn skip(&mut self, offset: u64, length: u64) -> Vec<Piece> {
        let mut steps = Vec::new();
        self.search.skip(length, &mut steps);
        let mut pieces = self.give(steps);
        let hole = Piece::Hole { offset, length };
        if self.unless.is_some() {
            self.held.push(hole);
        } else {
            pieces.push(hole);
        }
        pieces
    }

    /// The rest, when the whole file has this digest. `None` where the target has the file already.
    pub(crate) fn end(mut self, digest: Digest) -> Option<Vec<Piece>> {
        let mut steps = Vec::new();
        self.search.flush(&mut steps);
        let mut pieces = self.give(steps);
        if self.unless == Some(digest) {
            return None;
        }
        pieces.append(&mut self.held);
        Some(pieces)
    }

    fn give(&mut self, steps: Vec<Step>) -> Vec<Piece> {
        let mut pieces = Vec::new();
        for step in steps {
            let piece = match step {
                Step::Copy { offset, length, from } => {
                    let in_place = from == Within { piece: 0, offset };
                    let piece = Piece::Copy { offset, length, from };
                    if in_place && self.unless.is_some() {
                        self.held.push(piece);
                        continue;
                    }
                    piece
                }
                Step::Data { offset, block } => Piece::Data { offset, block },
            };
            self.unless = None;
            pieces.append(&mut self.held);
            pieces.push(piece);
        }
        pieces
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::chunks::Chunk;
    use crate::endpoint::delta::{Alike, BLOCK_LENGTH, Cut, Wanted, list};
    use crossbeam_channel::unbounded;

    const DIGEST: Digest = Digest([1; 32]);

    /// Of a target that lists all that it has at once.
    fn delta(old: &[u8], unless: Option<Digest>) -> Delta {
        let ((orders, ordered), (sender, parts)) = (unbounded(), unbounded());
        let matcher = Matcher::new(0, Box::new((orders, parts)));
        let old = old.to_vec();
        std::thread::spawn(move || {
            let ask = |Wanted { from, to, cut }: Wanted| -> Result<_, ()> {
                let end = old.len().min(usize::try_from(to).unwrap());
                let (mut chunks, mut rest) = (Vec::new(), old[..end].get(from.offset as usize..).unwrap_or_default());
                while let Some(first) = Chunk::first_of(rest) {
                    let blocks = Chunk::of(&rest[..rest.len().min(BLOCK_LENGTH)]);
                    let chunk = if cut == Cut::ByContent { first } else { blocks };
                    chunks.push(chunk);
                    rest = &rest[chunk.length as usize..];
                }
                let cut = if cut == Cut::BySum { Cut::ByLength } else { cut };
                Ok(Some(Alike { pieces: 1, cut, chunks, ..Alike::default() }))
            };
            list(&mut (ordered, sender), ask)
        });
        Delta::new(matcher, unless)
    }

    fn noise(length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        blake3::Hasher::new().finalize_xof().fill(&mut bytes);
        bytes
    }

    /// Copied, left as holes, sent.
    fn sums(pieces: &[Piece]) -> (u64, u64, u64) {
        pieces.iter().fold((0, 0, 0), |(copied, holes, sent), piece| match piece {
            Piece::Copy { length, .. } => (copied + length, holes, sent),
            Piece::Hole { length, .. } => (copied, holes + length, sent),
            Piece::Data { block, .. } => (copied, holes, sent + block.data().len() as u64),
        })
    }

    #[test]
    fn of_what_the_target_has_as_it_is_nothing_is_given() {
        let old = noise(5 << 20);
        for (digest, given) in [(DIGEST, None), (Digest([2; 32]), Some((5 << 20, 100, 0)))] {
            let mut delta = delta(&old, Some(DIGEST));
            for block in old.chunks(1 << 20) {
                assert!(delta.feed(Block::copy_of(block)).is_empty());
            }
            assert!(delta.skip(5 << 20, 100).is_empty());
            assert_eq!(delta.end(digest).map(|pieces| sums(&pieces)), given);
        }
    }

    #[test]
    fn what_was_held_comes_first_when_something_else_follows() {
        let old = noise(5 << 20);
        let mut delta = delta(&old, Some(DIGEST));
        let mut pieces = delta.feed(Block::copy_of(&old));
        assert!(pieces.is_empty());
        pieces.extend(delta.feed(Block::copy_of(&[7; 2 << 20])));
        pieces.extend(delta.end(DIGEST).unwrap());
        let (copied, _, sent) = sums(&pieces);
        assert!(copied > 3 << 20 && copied + sent == 7 << 20, "{copied} {sent}");
        let mut at = 0;
        for piece in &pieces {
            let (Piece::Copy { offset, .. } | Piece::Hole { offset, .. } | Piece::Data { offset, .. }) = piece;
            assert_eq!(*offset, at);
            at += sums(std::slice::from_ref(piece)).0 + sums(std::slice::from_ref(piece)).2;
        }
    }

    #[test]
    fn what_lies_elsewhere_at_the_target_is_not_what_it_has_as_it_is() {
        let old = noise(5 << 20);
        let moved = &old[3 << 20..];
        let mut delta = delta(&old, Some(DIGEST));
        let mut pieces = delta.feed(Block::copy_of(moved));
        pieces.extend(delta.end(DIGEST).unwrap());
        assert_eq!(sums(&pieces).0 + sums(&pieces).2, moved.len() as u64);
    }
}
