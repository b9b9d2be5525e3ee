//! Sums of the blocks of a file, by which it is told what of it is where it was, without the file.
//!
//! They are CRC-32 (IEEE 802.3), which proves nothing: it says what may be copied, and what was made of it is proven as a whole.

use crc32fast::Hasher;

use super::chunks::BLOCK_LENGTH;

const BLOCK: u64 = BLOCK_LENGTH as u64;
const SUM_BYTES: usize = 4;
/// What is hashed at a time for a hole.
const ZEROS: &[u8] = &[0; BLOCK_LENGTH];

/// The sums of the blocks of [`BLOCK_LENGTH`] of a file; the last may be shorter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sums {
    size: u64,
    blocks: Vec<u32>,
}

impl Sums {
    /// The sum of one block.
    pub fn of_block(block: &[u8]) -> u32 {
        crc32fast::hash(block)
    }

    /// Whether the block with this number has this length and this sum.
    pub fn has(&self, number: u64, length: usize, sum: u32) -> bool {
        let known = usize::try_from(number).ok().and_then(|number| self.blocks.get(number));
        known == Some(&sum) && self.length_of(number) == length as u64
    }

    fn length_of(&self, number: u64) -> u64 {
        self.size.saturating_sub(number.saturating_mul(BLOCK)).min(BLOCK)
    }

    /// Bytes that say the same: the size of the file, and each sum, little endian.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(size_of::<u64>() + self.blocks.len() * SUM_BYTES);
        bytes.extend_from_slice(&self.size.to_le_bytes());
        bytes.extend(self.blocks.iter().flat_map(|sum| sum.to_le_bytes()));
        bytes
    }

    /// What [`Sums::encode`] wrote; `None` of what it has not.
    pub fn decode(bytes: &[u8]) -> Option<Sums> {
        let (size, rest) = bytes.split_first_chunk()?;
        let size = u64::from_le_bytes(*size);
        let (sums, []) = rest.as_chunks::<SUM_BYTES>() else { return None };
        let blocks: Vec<u32> = sums.iter().map(|sum| u32::from_le_bytes(*sum)).collect();
        (blocks.len() as u64 == size.div_ceil(BLOCK)).then_some(Sums { size, blocks })
    }
}

/// Adds up the blocks of one length of what is read from its start.
#[derive(Debug)]
pub struct Blocks {
    length: usize,
    sums: Vec<u32>,
    current: Hasher,
    /// Bytes of the current block.
    filled: usize,
}

impl Blocks {
    /// Blocks of so many bytes, with room for so many of them.
    pub fn of(length: usize, room: usize) -> Blocks {
        Blocks { length, sums: Vec::with_capacity(room), current: Hasher::new(), filled: 0 }
    }

    /// With these before what is read.
    #[must_use]
    pub fn after(mut self, known: &[u32]) -> Blocks {
        self.sums.extend_from_slice(known);
        self
    }

    /// The next bytes.
    pub fn update(&mut self, mut data: &[u8]) {
        while !data.is_empty() {
            let (now, later) = data.split_at(data.len().min(self.length - self.filled));
            self.current.update(now);
            self.filled += now.len();
            if self.filled == self.length {
                self.close();
            }
            data = later;
        }
    }

    /// A block that has this sum and length, where one begins.
    fn add(&mut self, sum: u32, length: usize) {
        self.current = Hasher::new_with_initial_len(sum, length as u64);
        self.filled = length;
        if self.filled == self.length {
            self.close();
        }
    }

    fn close(&mut self) {
        self.sums.push(std::mem::take(&mut self.current).finalize());
        self.filled = 0;
    }

    /// The sum of each block; the last may be shorter.
    pub fn finish(mut self) -> Vec<u32> {
        if self.filled > 0 {
            self.close();
        }
        self.sums
    }
}

/// Adds up a file from its start.
#[derive(Debug)]
pub struct Summing(Blocks);

impl Default for Summing {
    fn default() -> Self {
        Summing(Blocks::of(BLOCK_LENGTH, 0))
    }
}

impl Summing {
    /// The next bytes.
    pub fn update(&mut self, data: &[u8]) {
        self.0.update(data);
    }

    /// So many zeros.
    pub fn zeros(&mut self, mut length: u64) {
        while length > 0 {
            let now = length.min((BLOCK_LENGTH - self.0.filled) as u64);
            self.update(&ZEROS[..now as usize]);
            length -= now;
        }
    }

    /// So many bytes that a file of which `sums` are has in the same place. False where these do not tell: then nothing of this is
    /// worth anything.
    #[must_use]
    pub fn same(&mut self, sums: &Sums, mut length: u64) -> bool {
        while length > 0 {
            let number = self.0.sums.len();
            let (Some(&sum), there) = (sums.blocks.get(number), sums.length_of(number as u64)) else { return false };
            if self.0.filled > 0 || there > length {
                return false;
            }
            self.0.add(sum, there as usize);
            length -= there;
        }
        true
    }

    /// What it comes to.
    pub fn finish(self) -> Sums {
        let size = self.0.sums.len() as u64 * BLOCK + self.0.filled as u64;
        Sums { size, blocks: self.0.finish() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sums(data: &[u8], step: usize) -> Sums {
        let mut summing = Summing::default();
        data.chunks(step).for_each(|part| summing.update(part));
        summing.finish()
    }

    fn noise(length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        blake3::Hasher::new().finalize_xof().fill(&mut bytes);
        bytes
    }

    #[test]
    fn sums_are_the_same_however_the_bytes_come_and_whoever_keeps_them() {
        for length in [0, 1, BLOCK_LENGTH, BLOCK_LENGTH + 1, 5 * BLOCK_LENGTH - 1] {
            let data = noise(length);
            let all = sums(&data, 1 << 20);
            for (number, block) in data.chunks(BLOCK_LENGTH).enumerate() {
                let (number, sum) = (number as u64, Sums::of_block(block));
                assert!(all.has(number, block.len(), sum));
                assert!(!all.has(number, block.len() - 1, sum) && !all.has(number, block.len(), sum ^ 1));
            }
            assert!(!all.has(length.div_ceil(BLOCK_LENGTH) as u64, 0, 0) && !all.has(u64::MAX, 0, 0));
            assert_eq!(sums(&data, 777), all);
            assert_eq!(Sums::decode(&all.encode()), Some(all));
        }
    }

    #[test]
    fn what_is_no_list_of_sums_is_none() {
        let good = sums(&noise(3 * BLOCK_LENGTH + 5), 1 << 20).encode();
        assert!((0..good.len()).all(|length| Sums::decode(&good[..length]).is_none()));
        assert!(Sums::decode(&[&good[..], &[0; 4]].concat()).is_none());
        let absurd = [&u64::MAX.to_le_bytes()[..], &good[8..]].concat();
        assert!(Sums::decode(&absurd).is_none());
    }

    #[test]
    fn what_is_the_same_need_not_be_there() {
        let old = noise(3 * BLOCK_LENGTH + 1000);
        let known = sums(&old, 1 << 20);
        let new = [&old[..], &[7; 200_000], &vec![0; 150_000]].concat();
        let mut summing = Summing::default();
        assert!(summing.same(&known, old.len() as u64));
        summing.update(&[7; 200_000]);
        summing.zeros(150_000);
        assert_eq!(summing.finish(), sums(&new, 1 << 20));
        // In between, by whole blocks.
        let mut summing = Summing::default();
        summing.update(&old[..BLOCK_LENGTH]);
        assert!(summing.same(&known, 2 * BLOCK_LENGTH as u64));
        summing.update(&old[3 * BLOCK_LENGTH..]);
        assert_eq!(summing.finish(), known);
        // A part of a block, what is beyond the end, and what does not begin with one, nothing tells.
        assert!(!Summing::default().same(&known, 5) && !Summing::default().same(&known, old.len() as u64 + 1));
        let mut summing = Summing::default();
        summing.update(b"x");
        assert!(!summing.same(&known, BLOCK_LENGTH as u64));
    }
}
