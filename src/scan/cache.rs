//! Digests of files that were read before, so that nothing is hashed twice.
//!
//! A record holds as long as device, inode, size, time of modification and time of change are what they were. A file whose
//! time of change was within the clock's granularity of the moment it was looked at is not recorded: it may have been
//! changed since without its times showing it. The cache is a help, never needed: when it cannot be opened, files are hashed.
//!
//! A source's lies in a database under the state directory, since several runs may read one tree at once; a target's is a
//! table beside its manifest, written whole by the one run that holds the lock.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use redb::{Database, ReadableDatabase, ReadableTable, ReadableTableMetadata, TableDefinition};
use sha2::{Digest as _, Sha256};

use super::blocks::BLOCK_BYTES;
use crate::manifest::{Digest, Timestamp};
use crate::root::Metadata;

const TABLE: TableDefinition<'_, (u64, u64), &[u8]> = TableDefinition::new("digests-1");

/// How old a time must be before it is trusted, by far more than the tick of any kernel clock.
const GRANULARITY: Duration = Duration::from_millis(20);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Record {
    size: u64,
    mtime: Timestamp,
    ctime: Timestamp,
    digest: Digest,
    /// When the content was read, in seconds since 1970; 0 where that is not known.
    hashed: u64,
}

/// A digest, and when the content was read that it is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Known {
    /// SHA-256.
    pub digest: Digest,
    /// Seconds since 1970; `None` where the table does not say.
    pub hashed: Option<u64>,
}

/// Digests by device and inode, and the checksums of the blocks of large files.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DigestTable {
    records: HashMap<(u64, u64), Record>,
    /// Only of files that have a record, and of the content that it is of.
    blocks: Blocks,
}

/// A table as bytes: this line, how many records (8 bytes), the records, lists of blocks (device, inode, how many,
/// checksums), the SHA-256 of all before.
const MAGIC: &[u8] = b"lockstep-digests 3\n";
const RECORD_BYTES: usize = 16 + 64 + 8;
/// What was written before: records alone; and records without the time of hashing.
const EARLIER: [(&[u8], usize); 2] =
    [(b"lockstep-digests 2\n", RECORD_BYTES), (b"lockstep-digests 1\n", OLD_RECORD_BYTES)];
const OLD_RECORD_BYTES: usize = 16 + 64;

impl DigestTable {
    /// The digest of the file that `metadata` was taken of, where it is known.
    pub fn get(&self, metadata: &Metadata) -> Option<Digest> {
        self.known(metadata).map(|known| known.digest)
    }

    /// The same, with the time of hashing.
    pub fn known(&self, metadata: &Metadata) -> Option<Known> {
        let record = self.records.get(&(metadata.device, metadata.inode))?;
        let same = (record.size, record.mtime, record.ctime) == (metadata.size, metadata.mtime, metadata.ctime);
        same.then_some(Known { digest: record.digest, hashed: Some(record.hashed).filter(|&time| time > 0) })
    }

    /// The checksums of its blocks, where they are known.
    pub fn blocks(&self, metadata: &Metadata) -> Option<&[u32]> {
        self.known(metadata)?;
        let blocks = self.blocks.get(&(metadata.device, metadata.inode))?;
        (blocks.len() as u64 == metadata.size.div_ceil(BLOCK_BYTES)).then_some(blocks)
    }

    /// Adds a digest of content that was read just now, with what stat said of the file after it was read. The caller
    /// sees to it that the file is settled: [`is_settled`], [`is_dated`].
    pub fn insert(&mut self, metadata: &Metadata, digest: Digest) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        self.insert_as_of(metadata, Known { digest, hashed: Some(now) });
    }

    /// The same of content that was read at some time.
    pub fn insert_as_of(&mut self, metadata: &Metadata, known: Known) {
        let Metadata { size, mtime, ctime, .. } = *metadata;
        let record = Record { size, mtime, ctime, digest: known.digest, hashed: known.hashed.unwrap_or(0) };
        let key = (metadata.device, metadata.inode);
        self.records.insert(key, record);
        self.blocks.remove(&key);
    }

    /// Forgets the file that `metadata` was taken of.
    pub fn remove(&mut self, metadata: &Metadata) {
        let key = (metadata.device, metadata.inode);
        self.records.remove(&key);
        self.blocks.remove(&key);
    }

    /// Adds the checksums of the blocks of a file whose digest was added.
    pub fn set_blocks(&mut self, metadata: &Metadata, blocks: Box<[u32]>) {
        if self.known(metadata).is_some() {
            self.blocks.insert((metadata.device, metadata.inode), blocks);
        }
    }

    /// How many digests it holds.
    pub fn len(&self) -> usize {
        self.records.len()
    }

    /// Whether it holds none.
    pub fn is_empty(&self) -> bool {
        self.records.is_empty()
    }

    /// The whole table as bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        let of_blocks: usize = self.blocks.values().map(|blocks| 24 + 4 * blocks.len()).sum();
        let mut bytes = Vec::with_capacity(MAGIC.len() + 8 + self.records.len() * RECORD_BYTES + of_blocks + 32);
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&(self.records.len() as u64).to_le_bytes());
        for ((device, inode), record) in &self.records {
            bytes.extend_from_slice(&device.to_le_bytes());
            bytes.extend_from_slice(&inode.to_le_bytes());
            bytes.extend_from_slice(&encode(record));
            bytes.extend_from_slice(&record.hashed.to_le_bytes());
        }
        for ((device, inode), blocks) in &self.blocks {
            for number in [*device, *inode, blocks.len() as u64] {
                bytes.extend_from_slice(&number.to_le_bytes());
            }
            blocks.iter().for_each(|sum| bytes.extend_from_slice(&sum.to_le_bytes()));
        }
        let digest = Sha256::digest(&bytes);
        bytes.extend_from_slice(&digest);
        bytes
    }

    /// Reads it back; bytes that are damaged give `None`.
    pub fn from_bytes(bytes: &[u8]) -> Option<DigestTable> {
        let (body, digest) = bytes.split_at_checked(bytes.len().checked_sub(32)?)?;
        if Sha256::digest(body)[..] != *digest {
            return None;
        }
        let Some(body) = body.strip_prefix(MAGIC) else {
            let (records, length) =
                EARLIER.iter().find_map(|(magic, length)| Some((body.strip_prefix(*magic)?, *length)))?;
            return Some(DigestTable { records: read_records(records, length)?, blocks: HashMap::new() });
        };
        let (count, body) = body.split_at_checked(8)?;
        let length = usize::try_from(number(count, 0)?).ok()?.checked_mul(RECORD_BYTES)?;
        let (records, lists) = body.split_at_checked(length)?;
        Some(DigestTable { records: read_records(records, RECORD_BYTES)?, blocks: read_blocks(lists)? })
    }
}

fn number(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

fn read_records(bytes: &[u8], length: usize) -> Option<HashMap<(u64, u64), Record>> {
    if !bytes.len().is_multiple_of(length) {
        return None;
    }
    let record = |bytes: &[u8]| {
        let hashed = if length == RECORD_BYTES { number(bytes, OLD_RECORD_BYTES)? } else { 0 };
        let record = decode(&bytes[16..OLD_RECORD_BYTES])?;
        Some(((number(bytes, 0)?, number(bytes, 8)?), Record { hashed, ..record }))
    };
    bytes.chunks_exact(length).map(record).collect()
}

/// By device and inode, the sums of a file's blocks.
type Blocks = HashMap<(u64, u64), Box<[u32]>>;

fn read_blocks(mut bytes: &[u8]) -> Option<Blocks> {
    let mut blocks = HashMap::new();
    while !bytes.is_empty() {
        let key = (number(bytes, 0)?, number(bytes, 8)?);
        let length = usize::try_from(number(bytes, 16)?).ok()?.checked_mul(4)?;
        let (list, rest) = bytes[24..].split_at_checked(length)?;
        let sum = |bytes: &[u8]| bytes.try_into().ok().map(u32::from_le_bytes);
        blocks.insert(key, list.chunks_exact(4).map(sum).collect::<Option<Box<[u32]>>>()?);
        bytes = rest;
    }
    Some(blocks)
}

/// The digests of one root's files.
#[derive(Debug)]
pub struct DigestCache {
    file: PathBuf,
    table: DigestTable,
}

/// Where less than one record in so many is wanted, each is looked up by itself.
const SOONER_LOOKED_UP: u64 = 8;

/// A cache that could not be written. The run is not worse for it; the next one hashes again.
#[derive(Debug, thiserror::Error)]
#[error("the digest cache '{}' was not written: {reason}", crate::error::shown(file))]
pub struct CacheError {
    /// The database.
    pub file: PathBuf,
    /// Why.
    pub reason: String,
}

impl DigestCache {
    /// Reads what is there. A cache that is damaged, in use or not there is empty.
    pub fn load(file: &Path) -> DigestCache {
        DigestCache::load_of(file, None)
    }

    /// The same of these files alone, where that is less work.
    pub fn load_for(file: &Path, wanted: &[Metadata]) -> DigestCache {
        DigestCache::load_of(file, Some(wanted))
    }

    fn load_of(file: &Path, wanted: Option<&[Metadata]>) -> DigestCache {
        let records = if file.exists() { read(file, wanted).unwrap_or_default() } else { HashMap::new() };
        DigestCache { file: file.to_owned(), table: DigestTable { records, blocks: HashMap::new() } }
    }

    /// One that holds nothing yet.
    pub fn empty(file: &Path) -> DigestCache {
        DigestCache { file: file.to_owned(), table: DigestTable::default() }
    }

    /// What it holds.
    pub fn table(&self) -> &DigestTable {
        &self.table
    }

    /// How many digests it holds.
    pub fn len(&self) -> usize {
        self.table.len()
    }

    /// Whether it holds none.
    pub fn is_empty(&self) -> bool {
        self.table.is_empty()
    }

    /// Adds the digests of files that were read after `looked`, when stat said this of them.
    ///
    /// # Errors
    /// [`CacheError`] when the database cannot be written, or another process has it open.
    pub fn store(&mut self, known: &[(Metadata, Digest)], looked: SystemTime) -> Result<(), CacheError> {
        let trusted: Vec<_> = known.iter().filter(|(metadata, _)| is_settled(metadata, looked)).collect();
        if trusted.is_empty() {
            return Ok(());
        }
        let wrong = |error: redb::Error| CacheError { file: self.file.clone(), reason: error.to_string() };
        let database = open(&self.file).map_err(wrong)?;
        let write = || -> Result<(), redb::Error> {
            let transaction = database.begin_write()?;
            {
                let mut table = transaction.open_table(TABLE)?;
                for (metadata, digest) in &trusted {
                    let (size, mtime, ctime) = (metadata.size, metadata.mtime, metadata.ctime);
                    let record = Record { size, mtime, ctime, digest: *digest, hashed: 0 };
                    table.insert((metadata.device, metadata.inode), encode(&record).as_slice())?;
                }
            }
            transaction.commit()?;
            Ok(())
        };
        write().map_err(wrong)?;
        for (metadata, digest) in trusted {
            self.table.insert(metadata, *digest);
        }
        Ok(())
    }
}

/// Whether a file that was looked at then had not changed for so long that a further change would have another time.
pub fn is_settled(metadata: &Metadata, looked: SystemTime) -> bool {
    system_time(metadata.ctime).is_none_or(|changed| looked.duration_since(changed).is_ok_and(|age| age > GRANULARITY))
}

/// Whether a file has a time of modification that no write near its time of change can have given it: then a write shows
/// although the inode changed only now.
pub fn is_dated(metadata: &Metadata) -> bool {
    let (Some(modified), Some(changed)) = (system_time(metadata.mtime), system_time(metadata.ctime)) else {
        return true;
    };
    let apart = changed.duration_since(modified).or_else(|_| modified.duration_since(changed));
    apart.is_ok_and(|apart| apart > GRANULARITY)
}

/// `None` for times before 1970.
fn system_time(time: Timestamp) -> Option<SystemTime> {
    UNIX_EPOCH.checked_add(Duration::new(u64::try_from(time.seconds).ok()?, time.nanoseconds))
}

/// Opens the database; a damaged one is replaced, since it holds nothing that cannot be computed again.
fn open(file: &Path) -> Result<Database, redb::Error> {
    match Database::create(file) {
        Ok(database) => Ok(database),
        Err(redb::DatabaseError::DatabaseAlreadyOpen) => Err(redb::Error::DatabaseAlreadyOpen),
        Err(_) => {
            let _ = std::fs::remove_file(file);
            Ok(Database::create(file)?)
        }
    }
}

fn read(file: &Path, wanted: Option<&[Metadata]>) -> Result<HashMap<(u64, u64), Record>, redb::Error> {
    let database = Database::open(file)?;
    let table = database.begin_read()?.open_table(TABLE)?;
    let mut records = HashMap::new();
    if let Some(wanted) =
        wanted.filter(|wanted| table.len().is_ok_and(|all| wanted.len() as u64 * SOONER_LOOKED_UP < all))
    {
        for metadata in wanted {
            let key = (metadata.device, metadata.inode);
            if let Some(record) = table.get(key)?.and_then(|value| decode(value.value())) {
                records.insert(key, record);
            }
        }
        return Ok(records);
    }
    for item in table.iter()? {
        let (key, value) = item?;
        if let Some(record) = decode(value.value()) {
            records.insert(key.value(), record);
        }
    }
    Ok(records)
}

fn encode(record: &Record) -> [u8; 64] {
    let mut bytes = [0; 64];
    bytes[..8].copy_from_slice(&record.size.to_le_bytes());
    for (at, time) in [(8, record.mtime), (20, record.ctime)] {
        bytes[at..at + 8].copy_from_slice(&time.seconds.to_le_bytes());
        bytes[at + 8..at + 12].copy_from_slice(&time.nanoseconds.to_le_bytes());
    }
    bytes[32..].copy_from_slice(&record.digest.0);
    bytes
}

fn decode(bytes: &[u8]) -> Option<Record> {
    let bytes: &[u8; 64] = bytes.try_into().ok()?;
    let time = |at: usize| -> Option<Timestamp> {
        Some(Timestamp {
            seconds: i64::from_le_bytes(bytes[at..at + 8].try_into().ok()?),
            nanoseconds: u32::from_le_bytes(bytes[at + 8..at + 12].try_into().ok()?),
        })
    };
    Some(Record {
        size: u64::from_le_bytes(bytes[..8].try_into().ok()?),
        mtime: time(8)?,
        ctime: time(20)?,
        digest: Digest(bytes[32..].try_into().ok()?),
        hashed: 0,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn metadata_of(file: &Path) -> Metadata {
        Metadata::of(&std::fs::File::open(file).unwrap()).unwrap()
    }

    #[test]
    fn a_digest_holds_until_anything_about_the_file_moves() {
        let directory = tempfile::tempdir().unwrap();
        let (file, database) = (directory.path().join("f"), directory.path().join("d.redb"));
        std::fs::write(&file, "one").unwrap();
        std::thread::sleep(GRANULARITY * 2);
        let before = metadata_of(&file);
        DigestCache::load(&database).store(&[(before, Digest([1; 32]))], SystemTime::now()).unwrap();
        let cache = DigestCache::load(&database);
        assert_eq!(cache.table().get(&metadata_of(&file)), Some(Digest([1; 32])));
        // Same size, same time of modification: the time of change tells.
        let times = std::fs::FileTimes::new().set_modified(std::fs::metadata(&file).unwrap().modified().unwrap());
        std::fs::write(&file, "two").unwrap();
        std::fs::File::options().write(true).open(&file).unwrap().set_times(times).unwrap();
        assert_eq!(metadata_of(&file).mtime, before.mtime);
        assert_eq!(cache.table().get(&metadata_of(&file)), None);
    }

    #[test]
    fn a_few_of_many_are_looked_up_and_are_what_the_whole_says() {
        let directory = tempfile::tempdir().unwrap();
        let database = directory.path().join("d.redb");
        let files: Vec<_> = (0..40_u8)
            .map(|number| {
                let file = directory.path().join(number.to_string());
                std::fs::write(&file, [number]).unwrap();
                let found = metadata_of(&file);
                let old = Timestamp { seconds: 1_000_000_000, nanoseconds: 0 };
                (Metadata { ctime: old, ..found }, Digest([number; 32]))
            })
            .collect();
        DigestCache::empty(&database).store(&files, SystemTime::now()).unwrap();
        for (wanted, held) in [(1, 1), (4, 4), (5, 40), (40, 40)] {
            let few: Vec<_> = files.iter().take(wanted).map(|(metadata, _)| *metadata).collect();
            let cache = DigestCache::load_for(&database, &few);
            assert_eq!(cache.len(), held, "{wanted}");
            for (metadata, digest) in &files[..wanted] {
                assert_eq!(cache.table().get(metadata), Some(*digest));
            }
        }
    }

    #[test]
    fn a_file_that_had_just_changed_is_not_recorded() {
        let directory = tempfile::tempdir().unwrap();
        let (file, database) = (directory.path().join("f"), directory.path().join("d.redb"));
        std::fs::write(&file, "one").unwrap();
        let found = metadata_of(&file);
        assert!(!is_dated(&found));
        let old = Metadata { mtime: Timestamp::default(), ..found };
        let ahead = Metadata { mtime: Timestamp { seconds: i64::MAX / 2, nanoseconds: 0 }, ..found };
        assert!(is_dated(&old) && is_dated(&ahead) && !is_settled(&old, SystemTime::UNIX_EPOCH));
        let mut cache = DigestCache::load(&database);
        cache.store(&[(metadata_of(&file), Digest([1; 32]))], SystemTime::now()).unwrap();
        assert!(cache.is_empty() && DigestCache::load(&database).is_empty());
    }

    #[test]
    fn a_table_is_read_back_and_damage_anywhere_empties_it() {
        let directory = tempfile::tempdir().unwrap();
        let mut table = DigestTable::default();
        for number in 0..3_u8 {
            let file = directory.path().join(number.to_string());
            std::fs::write(&file, [number]).unwrap();
            table.insert(&metadata_of(&file), Digest([number; 32]));
            // Longer than the file has blocks: then it is not used, and kept all the same.
            table.set_blocks(&metadata_of(&file), (0..u32::from(number)).collect());
            assert_eq!(table.blocks(&metadata_of(&file)).is_some(), number == 1);
        }
        let bytes = table.to_bytes();
        assert_eq!(DigestTable::from_bytes(&bytes), Some(table));
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 1;
            assert_eq!(DigestTable::from_bytes(&damaged), None, "{at}");
            assert_eq!(DigestTable::from_bytes(&bytes[..at]), None, "{at}");
        }
    }

    #[test]
    fn a_table_says_when_a_file_was_hashed_and_one_of_before_does_not() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("f");
        std::fs::write(&file, "one").unwrap();
        let (found, digest) = (metadata_of(&file), Digest([7; 32]));
        let mut table = DigestTable::default();
        table.insert_as_of(&found, Known { digest, hashed: Some(1_000_000_000) });
        let read = DigestTable::from_bytes(&table.to_bytes()).unwrap();
        assert_eq!(read.known(&found), Some(Known { digest, hashed: Some(1_000_000_000) }));
        for ((magic, length), hashed) in EARLIER.into_iter().zip([Some(1_000_000_000), None]) {
            let mut old = [magic, &table.to_bytes()[MAGIC.len() + 8..][..length]].concat();
            let end = Sha256::digest(&old);
            old.extend_from_slice(&end);
            let read = DigestTable::from_bytes(&old).unwrap();
            assert_eq!(read.known(&found), Some(Known { digest, hashed }));
        }
        table.insert(&found, digest);
        assert!(table.known(&found).unwrap().hashed.unwrap() > 1_000_000_000);
    }

    #[test]
    fn a_damaged_cache_is_an_empty_one_and_is_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let (file, database) = (directory.path().join("f"), directory.path().join("d.redb"));
        std::fs::write(&database, "this is no database at all").unwrap();
        std::fs::write(&file, "one").unwrap();
        std::thread::sleep(GRANULARITY * 2);
        let mut cache = DigestCache::load(&database);
        cache.store(&[(metadata_of(&file), Digest([1; 32]))], SystemTime::now()).unwrap();
        assert_eq!(DigestCache::load(&database).len(), 1);
    }
}
