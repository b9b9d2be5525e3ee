//! Checksums of the blocks of a large file, so that a part of it can be looked at without reading all of it.
//!
//! They are CRC-32 (IEEE 802.3): they find what a disk has lost, not what somebody has changed on purpose. What a file is
//! its SHA-256 says.

use crc32fast::Hasher;

/// The bytes of a block; the last of a file may have fewer.
pub const BLOCK_BYTES: u64 = 4 << 20;
/// A smaller file has no list of blocks: it is read as a whole.
pub const LISTED_BYTES: u64 = 64 << 20;
/// Room for more than this is made as they come: a size may be only what somebody announced.
const BLOCKS_AT_ONCE: usize = 1 << 16;

/// Adds up the blocks of a file that is read from its start.
#[derive(Debug)]
pub struct BlockSums {
    length: u64,
    sums: Vec<u32>,
    current: Hasher,
    left: u64,
}

impl BlockSums {
    /// For a file of so many bytes; `None` where it is too small to have a list.
    pub fn of(size: u64) -> Option<BlockSums> {
        BlockSums::by(BLOCK_BYTES, size)
    }

    /// The same with blocks of another length.
    pub fn by(length: u64, size: u64) -> Option<BlockSums> {
        let blocks = usize::try_from(size.div_ceil(length)).ok()?;
        let sums = || Vec::with_capacity(blocks.min(BLOCKS_AT_ONCE));
        (size >= LISTED_BYTES).then(|| BlockSums { length, sums: sums(), current: Hasher::new(), left: length })
    }

    /// The same where the sums of the first blocks are known: what is read comes after those.
    pub fn after(length: u64, size: u64, known: &[u32]) -> Option<BlockSums> {
        let mut sums = BlockSums::by(length, size)?;
        sums.sums.extend_from_slice(known);
        Some(sums)
    }

    /// The next bytes.
    pub fn update(&mut self, mut data: &[u8]) {
        while !data.is_empty() {
            let step = data.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
            let (now, later) = data.split_at(step);
            self.current.update(now);
            self.left -= step as u64;
            if self.left == 0 {
                self.close();
            }
            data = later;
        }
    }

    fn close(&mut self) {
        let full = std::mem::take(&mut self.current);
        self.sums.push(full.finalize());
        self.left = self.length;
    }

    /// One checksum for each block.
    pub fn finish(mut self) -> Box<[u32]> {
        if self.left < self.length {
            self.close();
        }
        self.sums.into_boxed_slice()
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
