//! The hash of a file on its way, and what is kept of it so that a file that goes on from another one is not hashed from its start.

use sha2::digest::common::hazmat::SerializableState as _;
use sha2::{Digest as _, Sha256};

use crate::codec::chunks::BLOCK_LENGTH;
use crate::manifest::Digest;
use crate::scan::blocks::BlockSums;
use crate::scan::prefixes::STATE_BYTES;

/// After each so many bytes of a large file the state of its hash is kept: so much is hashed again at most.
pub const STATE_EVERY: u64 = 64 << 20;

/// What is kept of a large file.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Kept {
    /// The CRC-32 of each block of [`BLOCK_LENGTH`].
    pub sums: Vec<u32>,
    /// The state of SHA-256 after each [`STATE_EVERY`] bytes.
    pub states: Vec<[u8; STATE_BYTES]>,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Hashing {
    hash: Sha256,
    at: u64,
    /// Of a large file alone.
    sums: Option<BlockSums>,
    states: Vec<[u8; STATE_BYTES]>,
}

impl Hashing {
    pub(super) fn of(size: u64) -> Hashing {
        let sums = BlockSums::by(BLOCK_LENGTH as u64, size);
        Hashing { hash: Sha256::new(), at: 0, sums, states: Vec::new() }
    }

    /// Of a file of `size` bytes of which the first `same` are those of one of which this is kept. It goes on from [`Hashing::at`].
    pub(super) fn after(size: u64, same: u64, kept: &Kept) -> Hashing {
        let resumed = || {
            let count = usize::try_from(same.min(size) / STATE_EVERY).ok()?.min(kept.states.len());
            let state = kept.states.get(count.checked_sub(1)?)?;
            let at = count as u64 * STATE_EVERY;
            let hash = Sha256::deserialize(&(*state).into()).ok()?;
            let known = kept.sums.get(..usize::try_from(at / BLOCK_LENGTH as u64).ok()?)?;
            let sums = BlockSums::after(BLOCK_LENGTH as u64, size, known);
            Some(Hashing { hash, at, sums, states: kept.states[..count].to_vec() })
        };
        resumed().unwrap_or_else(|| Hashing::of(size))
    }

    /// So much is hashed.
    pub(super) fn at(&self) -> u64 {
        self.at
    }

    pub(super) fn update(&mut self, mut data: &[u8]) {
        if let Some(sums) = &mut self.sums {
            sums.update(data);
        }
        while !data.is_empty() {
            let left = usize::try_from(STATE_EVERY - self.at % STATE_EVERY).unwrap_or(usize::MAX);
            let (now, later) = data.split_at(left.min(data.len()));
            self.hash.update(now);
            self.at += now.len() as u64;
            if self.at.is_multiple_of(STATE_EVERY) && self.sums.is_some() {
                self.states.push(self.hash.serialize().into());
            }
            data = later;
        }
    }

    /// The digest, and what is kept of a large file.
    pub(super) fn finish(self) -> (Digest, Option<Kept>) {
        let Hashing { hash, sums, states, .. } = self;
        let kept = sums.map(|sums| Kept { sums: sums.finish().into(), states });
        (Digest(hash.finalize().into()), kept)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(data: &[u8], step: usize) -> (Digest, Option<Kept>) {
        let mut hashing = Hashing::of(data.len() as u64);
        data.chunks(step).for_each(|part| hashing.update(part));
        hashing.finish()
    }

    #[test]
    fn what_goes_on_from_another_file_is_hashed_as_if_from_its_start() {
        let mut data: Vec<u8> =
            (0..(150_u64 << 20) + 77).map(|at| (at.wrapping_mul(0x9e37_79b9) >> 13) as u8).collect();
        let (digest, kept) = of(&data, 1 << 20);
        assert_eq!(digest, Digest(Sha256::digest(&data).into()));
        let kept = kept.unwrap();
        assert_eq!((kept.states.len(), kept.sums.len()), (2, 2401));
        assert_eq!(of(&data, 99_991).1.unwrap(), kept);
        data.extend_from_slice(b"more of it");
        let expected = of(&data, 5 << 20);
        for (same, from) in [(150 << 20, 128 << 20), (127 << 20, 64 << 20), (63 << 20, 0), (u64::MAX, 128 << 20)] {
            let mut hashing = Hashing::after(data.len() as u64, same, &kept);
            assert_eq!(hashing.at(), from);
            hashing.update(&data[from as usize..]);
            assert_eq!(hashing.finish(), expected, "{same}");
        }
    }

    #[test]
    fn what_is_kept_wrongly_does_not_give_the_digest_of_something_else() {
        let data = vec![5; 70 << 20];
        let (digest, kept) = of(&data, 1 << 20);
        let mut kept = kept.unwrap();
        kept.states[0][3] ^= 1;
        let mut hashing = Hashing::after(data.len() as u64, 70 << 20, &kept);
        let from = hashing.at() as usize;
        hashing.update(&data[from..]);
        assert_ne!(hashing.finish().0, digest);
        // Without sums that fit nothing is gone on from.
        assert_eq!(Hashing::after(70 << 20, 70 << 20, &Kept { sums: vec![1; 9], ..kept }).at(), 0);
        assert_eq!(of(&data[..1000], 10).1, None);
    }
}
