//! What a sender keeps of the files that a target holds and cannot look into itself: the sums of their blocks, by their SHA-256, in a
//! database under the state directory.
//!
//! What always holds: of a target no more is kept than of the files that its manifest lists, and no more than [`KEPT_BYTES_MAX`]. Without
//! it more is sent.

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::time::Duration;

use redb::{ReadableDatabase, ReadableTable, TableDefinition};

use super::cache::{CacheError, DigestCache, builder};
use crate::codec::sums::Sums;
use crate::manifest::Digest;

const TABLE: TableDefinition<'_, &[u8; 32], &[u8]> = TableDefinition::new("sums-1");
/// What is kept of one target, at most: that of 4 TiB.
pub const KEPT_BYTES_MAX: u64 = 256 << 20;

/// A database that nothing was stored in for so long is of a target that is pushed to no more.
const UNUSED: Duration = Duration::from_secs(90 * 24 * 60 * 60);

/// The database of one target.
#[derive(Debug, Clone, Copy)]
pub struct SumsStore<'a>(pub &'a Path);

impl SumsStore<'_> {
    /// What is known of files with these digests. What is damaged, in use or not there knows nothing.
    pub fn load(self, wanted: &HashSet<Digest>) -> HashMap<Digest, Sums> {
        let read = || -> Result<HashMap<Digest, Sums>, redb::Error> {
            let table = builder().open(self.0)?.begin_read()?.open_table(TABLE)?;
            let mut found = HashMap::new();
            for digest in wanted {
                let sums = table.get(&digest.0)?.and_then(|bytes| Sums::decode(bytes.value()));
                found.extend(sums.map(|sums| (*digest, sums)));
            }
            Ok(found)
        };
        if wanted.is_empty() || !self.0.exists() { HashMap::new() } else { read().unwrap_or_default() }
    }

    /// Adds what is new, and forgets all that is of none of the `listed` files.
    ///
    /// # Errors
    /// [`CacheError`] when the database cannot be written, or another process has it open.
    pub fn store(self, new: &HashMap<Digest, Sums>, listed: &HashSet<Digest>) -> Result<(), CacheError> {
        DigestCache(self.0).write(|transaction| {
            let mut table = transaction.open_table(TABLE)?;
            table.retain(|digest, _| listed.contains(&Digest(*digest)))?;
            let mut kept_bytes = 0;
            for item in table.iter()? {
                kept_bytes += item?.1.value().len() as u64;
            }
            for (digest, sums) in new.iter().filter(|(digest, _)| listed.contains(digest)) {
                let bytes = sums.encode();
                kept_bytes += bytes.len() as u64;
                if kept_bytes > KEPT_BYTES_MAX {
                    break;
                }
                table.insert(&digest.0, bytes.as_slice())?;
            }
            Ok(())
        })?;
        self.drop_unused();
        Ok(())
    }

    /// Removes the databases beside it of targets that are pushed to no more.
    fn drop_unused(self) {
        let beside = self.0.parent().and_then(|directory| std::fs::read_dir(directory).ok());
        for entry in beside.into_iter().flatten().flatten() {
            let name = entry.file_name();
            let ours = name.as_encoded_bytes().starts_with(b"sums-") && name.as_encoded_bytes().ends_with(b".redb");
            let age = entry.metadata().and_then(|found| found.modified()).ok().and_then(|time| time.elapsed().ok());
            if ours && entry.path() != *self.0 && age.is_some_and(|age| age > UNUSED) {
                // What cannot be removed costs room and nothing else.
                let _ = std::fs::remove_file(entry.path());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::sums::Summing;

    fn sums(byte: u8) -> (Digest, Sums) {
        let mut summing = Summing::default();
        summing.update(&vec![byte; 70_000]);
        (Digest([byte; 32]), summing.finish())
    }

    #[test]
    fn what_is_kept_of_a_target_that_is_pushed_to_no_more_goes() {
        let at = tempfile::tempdir().unwrap();
        let path = |name: &str| at.path().join(name);
        for name in ["sums-1.redb", "sums-2.redb", "digests.redb"] {
            std::fs::write(path(name), "").unwrap();
        }
        for name in ["sums-1.redb", "digests.redb"] {
            let file = std::fs::File::options().write(true).open(path(name)).unwrap();
            file.set_modified(std::time::SystemTime::now() - 2 * UNUSED).unwrap();
        }
        let (digest, sums) = sums(7);
        let own = path("sums-3.redb");
        SumsStore(&own).store(&HashMap::from([(digest, sums)]), &HashSet::from([digest])).unwrap();
        let there = |name: &str| path(name).exists();
        assert!(!there("sums-1.redb") && there("sums-2.redb") && there("digests.redb") && own.exists());
    }

    #[test]
    fn what_the_target_lists_is_kept_and_nothing_else() {
        let at = tempfile::tempdir().unwrap();
        let file = at.path().join("sums.redb");
        let store = SumsStore(&file);
        let digests = |bytes: &[u8]| -> HashSet<Digest> { bytes.iter().map(|&byte| Digest([byte; 32])).collect() };
        assert!(store.load(&digests(&[1])).is_empty());
        store.store(&HashMap::from([sums(1), sums(2), sums(3)]), &digests(&[1, 2])).unwrap();
        assert_eq!(store.load(&digests(&[1, 2, 3])), HashMap::from([sums(1), sums(2)]));
        assert_eq!(store.load(&digests(&[2])), HashMap::from([sums(2)]));
        store.store(&HashMap::from([sums(4)]), &digests(&[2, 4])).unwrap();
        assert_eq!(store.load(&digests(&[1, 2, 3, 4])), HashMap::from([sums(2), sums(4)]));
        std::fs::write(&file, "damaged").unwrap();
        assert!(store.load(&digests(&[2])).is_empty());
        store.store(&HashMap::from([sums(5)]), &digests(&[5])).unwrap();
        assert_eq!(store.load(&digests(&[5])), HashMap::from([sums(5)]));
    }
}
