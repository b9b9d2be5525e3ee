//! Content-defined chunks: what was inserted or removed moves the bounds near it, and no others. And blocks of one length, for what is
//! likely to lie where it is looked for.
//!
//! Bounds are those of FastCDC (Xia et al., 2020) with normalization level 1, as crate `fastcdc` cuts them. A chunk is known by the
//! first 128 bits of its BLAKE3: that says where to look for content, and proves nothing; what is made of chunks is proven by
//! SHA-256 as a whole.

use std::sync::LazyLock;

use fastcdc::v2020::{self, Normalization};

use crate::manifest::Digest;

/// No chunk is shorter, but for the last of a file.
pub const MIN_BYTES: usize = 64 << 10;
/// Around this length most chunks end.
pub const AVERAGE_BYTES: usize = 256 << 10;
/// No chunk is longer.
pub const MAX_BYTES: usize = 1 << 20;

static MASKS: LazyLock<(u64, u64)> = LazyLock::new(|| v2020::select_masks(AVERAGE_BYTES, Normalization::Level1));

/// What a chunk is known by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ChunkId {
    /// The first half of its BLAKE3: it is found wherever it lies.
    Content([u8; 16]),
    /// Its CRC-32 (IEEE 802.3): enough to say whether it is what lies at one place, at a fifth of the work.
    Sum(u32),
}

/// A piece of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chunk {
    /// What it holds.
    pub id: ChunkId,
    /// Its length in bytes, at least 1 and at most [`MAX_BYTES`].
    pub length: u32,
}

/// So many files of a target are looked through for one.
pub const PIECES_MAX: u32 = 4;
/// An order has at most so many ranges: the beginning of each file, the rest of each, and what lies before.
pub const RANGES_MAX: usize = 2 * PIECES_MAX as usize + 2;
/// The length of a block of [`Cut::ByLength`]; the last of a file may be shorter.
pub const BLOCK_LENGTH: usize = 64 << 10;

/// How a file is cut into what is listed of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cut {
    /// Into chunks, whose bounds go with their content: what was moved is found again.
    ByContent,
    /// Into blocks of [`BLOCK_LENGTH`] from where was asked: a third of the work, where it is known what lies where.
    ByLength,
    /// Into blocks of [`BLOCK_LENGTH`] from the start of the file, known by sums that were kept when the file came: no work. What has
    /// no sums is cut by length.
    BySum,
}

/// What is to be listed of a file of the target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wanted {
    /// From there on.
    pub from: Within,
    /// Nothing is wanted that begins here or further on; the last block of [`Cut::ByLength`] ends here.
    pub to: u64,
    /// How.
    pub cut: Cut,
}

/// What is to be listed; it takes the place of what was wanted before.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Order {
    /// Each has a higher one than the last.
    pub number: u32,
    /// What, in this order; at most [`RANGES_MAX`].
    pub wanted: Vec<Wanted>,
}

/// What a target has listed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    /// Of this order.
    pub order: u32,
    /// From where on.
    pub from: Within,
    /// `None`: the order is done.
    pub alike: Option<Alike>,
}

/// Where a target has something that it listed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Within {
    /// In which of the files that it has for one.
    pub piece: u32,
    /// Where in it.
    pub offset: u64,
}

/// What a file held when it was shorter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Beginning {
    /// Its length then, in bytes.
    pub length: u64,
    /// The SHA-256 of all of it.
    pub digest: Digest,
}

/// A part of a file of the target, of which another may be made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Alike {
    /// It is, by its digest, the file as a whole. Nothing is listed then.
    pub same: bool,
    /// What the target has under the name of a file that only grows, as a whole.
    pub there: Option<Beginning>,
    /// So many such files there are, at most [`PIECES_MAX`]; the first is the most alike.
    pub pieces: u32,
    /// How it is cut.
    pub cut: Cut,
    /// The chunks or blocks from where was asked, one after the other.
    pub chunks: Vec<Chunk>,
    /// Where the next part begins; `None` at the end.
    pub next: Option<u64>,
}

/// Nothing.
impl Default for Alike {
    fn default() -> Alike {
        Alike { same: false, there: None, pieces: 0, cut: Cut::ByContent, chunks: Vec::new(), next: None }
    }
}

impl Chunk {
    /// All of `data`, which is no longer than [`MAX_BYTES`].
    pub fn of(data: &[u8]) -> Chunk {
        Chunk { id: ChunkId::of(data), length: data.len() as u32 }
    }

    /// The first chunk of `data`; `None` where there is nothing. Where `data` is shorter than [`MAX_BYTES`], the file has to end there.
    pub fn first_of(data: &[u8]) -> Option<Chunk> {
        let data = &data[..data.len().min(MAX_BYTES)];
        if data.is_empty() {
            return None;
        }
        let (strict, loose) = *MASKS;
        let cut = v2020::cut(data, MIN_BYTES, AVERAGE_BYTES, MAX_BYTES, strict, loose, strict << 1, loose << 1);
        Some(Chunk::of(&data[..cut.1.clamp(1, data.len())]))
    }
}

impl ChunkId {
    /// Of a whole chunk.
    pub fn of(chunk: &[u8]) -> ChunkId {
        ChunkId::Content(ChunkId::content_of(chunk))
    }

    /// The first half of the BLAKE3 of some bytes.
    pub fn content_of(bytes: &[u8]) -> [u8; 16] {
        let mut id = [0; 16];
        id.copy_from_slice(&blake3::hash(bytes).as_bytes()[..16]);
        id
    }

    /// Whether a whole chunk is known by it.
    pub fn is_of(&self, chunk: &[u8]) -> bool {
        match self {
            ChunkId::Content(_) => *self == ChunkId::of(chunk),
            ChunkId::Sum(sum) => *sum == crc32fast::hash(chunk),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn noise(seed: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        let mut hasher = blake3::Hasher::new();
        hasher.update(&seed.to_le_bytes());
        hasher.finalize_xof().fill(&mut bytes);
        bytes
    }

    fn all(mut data: &[u8]) -> Vec<Chunk> {
        let mut chunks = Vec::new();
        while let Some(chunk) = Chunk::first_of(data) {
            chunks.push(chunk);
            data = &data[chunk.length as usize..];
        }
        chunks
    }

    #[test]
    fn chunks_are_as_long_as_they_are_said_to_be_and_cover_everything() {
        for data in [noise(1, 20 << 20), vec![0; 5 << 20], noise(2, 1), b"ab".repeat(1 << 20)] {
            let chunks = all(&data);
            assert_eq!(chunks.iter().map(|chunk| chunk.length as usize).sum::<usize>(), data.len());
            let (_, but_last) = chunks.split_last().unwrap();
            assert!(but_last.iter().all(|chunk| (MIN_BYTES..=MAX_BYTES).contains(&(chunk.length as usize))));
        }
        let chunks = all(&noise(1, 64 << 20)).len();
        assert!((150..400).contains(&chunks), "{chunks}");
        assert_eq!(Chunk::first_of(b""), None);
    }

    #[test]
    fn the_bounds_are_those_of_the_protocol() {
        // Whoever cuts otherwise finds nothing of what another version has.
        let lengths: Vec<u32> = all(&noise(7, 2 << 20)).iter().map(|chunk| chunk.length).collect();
        assert_eq!(lengths, LENGTHS);
        let ChunkId::Content(id) = ChunkId::of(b"abc") else { panic!("it is found by its content") };
        assert_eq!(id[..4], [0x64, 0x37, 0xb3, 0xac]);
        assert!(ChunkId::of(b"abc").is_of(b"abc") && !ChunkId::of(b"abc").is_of(b"abd"));
        // The check value of the algorithm.
        assert!(ChunkId::Sum(0xcbf4_3926).is_of(b"123456789") && !ChunkId::Sum(0xcbf4_3926).is_of(b"123456780"));
    }

    const LENGTHS: [u32; 7] = [474_365, 137_683, 177_122, 169_437, 348_796, 731_684, 58_065];

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn what_is_inserted_changes_no_more_than_what_lies_near(at in 0_usize..(8 << 20), inserted in prop::collection::vec(any::<u8>(), 0..100_000)) {
            let old = noise(3, 8 << 20);
            let new = [&old[..at], &inserted, &old[at..]].concat();
            let known: std::collections::HashSet<_> = all(&old).iter().map(|chunk| chunk.id).collect();
            let other: usize = all(&new).iter().filter(|chunk| !known.contains(&chunk.id)).map(|chunk| chunk.length as usize).sum();
            prop_assert!(other < inserted.len() + 4 * MAX_BYTES, "{other} bytes are not found again");
        }
    }
}
