//! What files that only grow held when they were read, in the database of a source's digests: with the state of the hash there, so that
//! what was hashed once is not read again.
//!
//! What always holds: a state goes with the digest of just what it was made of. That a file still begins with it is the word of whoever
//! said that it only grows; that it is still the same file is seen by its inode, and by the last bytes of what was read.

use redb::{ReadableDatabase, ReadableTable, TableDefinition};
use sha2::Sha256;
use sha2::digest::common::hazmat::{SerializableState as _, SerializedState};

use super::cache::{CacheError, DigestCache};
use crate::codec::chunks::{Beginning, ChunkId};
use crate::manifest::Digest;

/// The length of a state of SHA-256.
pub const STATE_BYTES: usize = size_of::<SerializedState<Sha256>>();
/// So much of the end of what was read is known by its content.
pub const LAST_BYTES: u64 = 64 << 10;

const TABLE: TableDefinition<'_, (u64, u64), &[u8]> = TableDefinition::new("prefixes-1");
/// So many are kept of a file, the newest: not every target has the last of them.
const KEPT: usize = 4;
const LAST_ID_BYTES: usize = 16;
const RECORD_BYTES: usize = 8 + 32 + LAST_ID_BYTES + STATE_BYTES;

/// What a file held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Prefix {
    /// All of it.
    pub beginning: Beginning,
    /// The first half of the BLAKE3 of its last [`LAST_BYTES`], or of all where it is shorter.
    pub last: [u8; LAST_ID_BYTES],
    /// The state of SHA-256 after it.
    pub state: [u8; STATE_BYTES],
}

impl Prefix {
    /// Of a file that ends with `last`, at most [`LAST_BYTES`] of it.
    pub fn new(length: u64, hash: &Sha256, last: &[u8]) -> Prefix {
        use sha2::Digest as _;
        let digest = Digest(hash.clone().finalize().into());
        Prefix {
            beginning: Beginning { length, digest },
            last: ChunkId::content_of(last),
            state: hash.serialize().into(),
        }
    }

    /// Whether it ends with this.
    pub fn ends_with(&self, last: &[u8]) -> bool {
        ChunkId::content_of(last) == self.last
    }

    /// The hash of it, which can be gone on with.
    pub fn hash(&self) -> Option<Sha256> {
        Sha256::deserialize(&self.state.into()).ok()
    }

    fn encode(&self) -> [u8; RECORD_BYTES] {
        let mut bytes = [0; RECORD_BYTES];
        bytes[..8].copy_from_slice(&self.beginning.length.to_le_bytes());
        bytes[8..40].copy_from_slice(&self.beginning.digest.0);
        bytes[40..40 + LAST_ID_BYTES].copy_from_slice(&self.last);
        bytes[40 + LAST_ID_BYTES..].copy_from_slice(&self.state);
        bytes
    }

    fn decode(bytes: &[u8; RECORD_BYTES]) -> Option<Prefix> {
        let length = u64::from_le_bytes(bytes[..8].try_into().ok()?);
        let digest = Digest(bytes[8..40].try_into().ok()?);
        let (last, state) = bytes[40..].split_at(LAST_ID_BYTES);
        Some(Prefix {
            beginning: Beginning { length, digest },
            last: last.try_into().ok()?,
            state: state.try_into().ok()?,
        })
    }
}

fn decode(bytes: &[u8]) -> Vec<Prefix> {
    bytes.as_chunks().0.iter().filter_map(Prefix::decode).collect()
}

impl DigestCache<'_> {
    /// What the file at this device and inode held when it was read; nothing where that cannot be told.
    pub fn prefixes(self, file: (u64, u64)) -> Vec<Prefix> {
        let read = || -> Result<Vec<Prefix>, redb::Error> {
            let database = super::cache::builder().open(self.0)?;
            let table = database.begin_read()?.open_table(TABLE)?;
            Ok(table.get(file)?.map_or_else(Vec::new, |found| decode(found.value())))
        };
        if self.0.exists() { read().unwrap_or_default() } else { Vec::new() }
    }

    /// Adds what files held that were read, by their device and inode.
    ///
    /// # Errors
    /// As [`DigestCache::store`].
    pub fn store_prefixes(self, read: &[((u64, u64), Prefix)]) -> Result<(), CacheError> {
        if read.is_empty() {
            return Ok(());
        }
        self.write(|transaction| {
            let mut table = transaction.open_table(TABLE)?;
            for (file, prefix) in read {
                let mut kept = table.get(file)?.map_or_else(Vec::new, |found| decode(found.value()));
                kept.retain(|known| known.beginning != prefix.beginning);
                kept.insert(0, *prefix);
                kept.truncate(KEPT);
                table.insert(file, kept.iter().flat_map(Prefix::encode).collect::<Vec<u8>>().as_slice())?;
            }
            Ok(())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sha2::Digest as _;

    #[test]
    fn the_newest_of_what_a_file_held_are_kept_and_can_be_gone_on_with() {
        let at = tempfile::tempdir().unwrap();
        let file = at.path().join("d.redb");
        let cache = DigestCache(&file);
        assert!(cache.prefixes((1, 2)).is_empty());
        let of =
            |length: u8| Prefix::new(length.into(), &Sha256::new_with_prefix(vec![7; length.into()]), &[length; 5]);
        for length in [1, 2, 3, 100, 2, 4] {
            cache.store_prefixes(&[((1, 2), of(length)), ((1, 3), of(9))]).unwrap();
        }
        assert_eq!(cache.prefixes((1, 2)), [4, 2, 100, 3].map(of));
        assert_eq!(cache.prefixes((1, 3)), [of(9)]);
        let (long, whole) = (of(100), Sha256::digest(vec![7; 150]));
        assert_eq!(long.hash().unwrap().chain_update(vec![7; 50]).finalize(), whole);
        assert!(long.ends_with(&[100; 5]) && !long.ends_with(&[101; 5]));
        std::fs::write(&file, "damaged").unwrap();
        assert!(cache.prefixes((1, 2)).is_empty());
    }
}
