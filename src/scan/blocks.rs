//! Checksums of the blocks of a large file, so that a part of it can be looked at without reading all of it.
//!
//! They are CRC-32 (IEEE 802.3): they find what a disk has lost, not what somebody has changed on purpose. What a file is
//! its SHA-256 says.

use crc32fast::Hasher;

use crate::codec::sums::Blocks;

/// The bytes of a block; the last of a file may have fewer.
pub const BLOCK_BYTES: u64 = 4 << 20;
/// A smaller file has no list of blocks: it is read as a whole.
pub const LISTED_BYTES: u64 = 64 << 20;
/// Room for more than this is made as they come: a size may be only what somebody announced.
const BLOCKS_AT_ONCE: usize = 1 << 16;

/// Adds up the blocks of a file that is read from its start.
#[derive(Debug)]
pub struct BlockSums(Blocks);

impl BlockSums {
    /// For a file of so many bytes; `None` where it is too small to have a list.
    pub fn of(size: u64) -> Option<BlockSums> {
        BlockSums::by(BLOCK_BYTES, size)
    }

    /// The same with blocks of another length.
    pub fn by(length: u64, size: u64) -> Option<BlockSums> {
        let blocks = usize::try_from(size.div_ceil(length)).ok()?;
        let length = usize::try_from(length).ok()?;
        (size >= LISTED_BYTES).then(|| BlockSums(Blocks::of(length, blocks.min(BLOCKS_AT_ONCE))))
    }

    /// The same where the sums of the first blocks are known: what is read comes after those.
    pub fn after(length: u64, size: u64, known: &[u32]) -> Option<BlockSums> {
        BlockSums::by(length, size).map(|BlockSums(blocks)| BlockSums(blocks.after(known)))
    }

    /// The next bytes.
    pub fn update(&mut self, data: &[u8]) {
        self.0.update(data);
    }

    /// One checksum for each block.
    pub fn finish(self) -> Box<[u32]> {
        self.0.finish().into_boxed_slice()
    }
}

/// Adds up one block.
#[derive(Debug, Default)]
pub struct BlockSum(Hasher);

impl BlockSum {
    /// The next bytes.
    pub fn update(&mut self, data: &[u8]) {
        self.0.update(data);
    }

    /// Its checksum.
    pub fn finish(self) -> u32 {
        self.0.finalize()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum_of(block: &[u8]) -> u32 {
        let mut sum = BlockSum::default();
        sum.update(block);
        sum.finish()
    }

    #[test]
    fn blocks_are_the_same_however_the_bytes_come() {
        assert!(BlockSums::of(LISTED_BYTES - 1).is_none());
        let data: Vec<u8> = (0..LISTED_BYTES + 5).map(|at| ((at * 31) >> 7) as u8).collect();
        let expected: Vec<u32> = data.chunks(BLOCK_BYTES as usize).map(sum_of).collect();
        assert_eq!(expected.len(), 17);
        for step in [7 << 20, BLOCK_BYTES as usize, 99_991] {
            let mut sums = BlockSums::of(data.len() as u64).unwrap();
            data.chunks(step).for_each(|part| sums.update(part));
            assert_eq!(sums.finish()[..], expected, "{step}");
        }
        let mut whole = BlockSums::of(LISTED_BYTES).unwrap();
        whole.update(&data[..LISTED_BYTES as usize]);
        assert_eq!(whole.finish()[..], expected[..16]);
        // The check value of the algorithm.
        assert_eq!(sum_of(b"123456789"), 0xcbf4_3926);
    }
}
