//! [`DigestTable`]: digests by device and inode, and the file they are kept in.
//!
//! A table of a million files takes about 100 bytes for each: records in one piece, and a place of four bytes to find each by.
//! It is read and written record by record.

use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasher as _, RandomState};
use std::io::{self, Read, Write};
use std::time::{SystemTime, UNIX_EPOCH};

use hashbrown::HashTable;
use sha2::{Digest as _, Sha256};

use super::blocks::BLOCK_BYTES;
use crate::manifest::{Digest, Timestamp};
use crate::root::Fingerprint;

/// A digest, and when the content was read that it is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Known {
    /// SHA-256.
    pub digest: Digest,
    /// Seconds since 1970; `None` where the table does not say.
    pub hashed: Option<u64>,
}

/// Digests by device and inode, and the checksums of the blocks of large files.
#[derive(Debug, Clone, Default)]
pub struct DigestTable {
    records: Vec<Record>,
    /// Where each record is, by device and inode.
    places: HashTable<u32>,
    hasher: RandomState,
    /// Only of files that have a record, and of the content that it is of.
    blocks: Blocks,
}

/// By device and inode, the sums of a file's blocks.
type Blocks = HashMap<(u64, u64), Box<[u32]>>;

/// A record as it is stored: device and inode, what [`encode`] makes, and when the content was read, in seconds since 1970; 0
/// where that is not known.
type Record = [u8; RECORD_BYTES];

/// A table as bytes: this line, how many records (8 bytes), the records, lists of blocks (device, inode, how many,
/// checksums), the SHA-256 of all before.
const MAGIC: &[u8] = b"lockstep-digests 3\n";
const RECORD_BYTES: usize = OLD_RECORD_BYTES + 8;
const OLD_RECORD_BYTES: usize = KEY_BYTES + CONTENT_BYTES;
const KEY_BYTES: usize = 16;
/// What [`encode`] makes.
pub(super) const CONTENT_BYTES: usize = 64;
const DIGEST_BYTES: usize = 32;
/// What was written before: records alone; and records without the time of hashing.
const EARLIER: [(&[u8], usize); 2] =
    [(b"lockstep-digests 2\n", RECORD_BYTES), (b"lockstep-digests 1\n", OLD_RECORD_BYTES)];
/// More records are none: a place has 32 bits.
const RECORDS_MAX: usize = u32::MAX as usize;

/// Size, times and digest as they are stored.
pub(super) fn encode(file: &Fingerprint, digest: &Digest) -> [u8; CONTENT_BYTES] {
    let mut bytes = [0; CONTENT_BYTES];
    bytes[..8].copy_from_slice(&file.size.to_le_bytes());
    for (at, time) in [(8, file.mtime), (20, file.ctime)] {
        bytes[at..at + 8].copy_from_slice(&time.seconds.to_le_bytes());
        bytes[at + 8..at + 12].copy_from_slice(&time.nanoseconds.to_le_bytes());
    }
    bytes[CONTENT_BYTES - DIGEST_BYTES..].copy_from_slice(&digest.0);
    bytes
}

/// The same of the file at this device and inode, read back.
pub(super) fn decode((device, inode): (u64, u64), bytes: &[u8]) -> Option<(Fingerprint, Digest)> {
    let bytes: &[u8; CONTENT_BYTES] = bytes.try_into().ok()?;
    let time = |at: usize| -> Option<Timestamp> {
        Some(Timestamp {
            seconds: i64::from_le_bytes(bytes[at..at + 8].try_into().ok()?),
            nanoseconds: u32::from_le_bytes(bytes[at + 8..at + 12].try_into().ok()?),
        })
    };
    let file = Fingerprint { device, inode, size: number(bytes, 0)?, mtime: time(8)?, ctime: time(20)? };
    Some((file, Digest(bytes[CONTENT_BYTES - DIGEST_BYTES..].try_into().ok()?)))
}

fn number(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

fn record(file: &Fingerprint, known: Known) -> Record {
    let mut record = [0; RECORD_BYTES];
    record[..8].copy_from_slice(&file.device.to_le_bytes());
    record[8..KEY_BYTES].copy_from_slice(&file.inode.to_le_bytes());
    record[KEY_BYTES..OLD_RECORD_BYTES].copy_from_slice(&encode(file, &known.digest));
    record[OLD_RECORD_BYTES..].copy_from_slice(&known.hashed.unwrap_or(0).to_le_bytes());
    record
}

/// Device and inode as they stand in a record.
fn key(record: &Record) -> &[u8] {
    &record[..KEY_BYTES]
}

impl DigestTable {
    /// An empty one with room for so many digests.
    pub fn with_capacity(count: usize) -> DigestTable {
        let count = count.min(RECORDS_MAX);
        let (records, places) = (Vec::with_capacity(count), HashTable::with_capacity(count));
        DigestTable { records, places, ..DigestTable::default() }
    }

    fn find(&self, key_of: &[u8]) -> Option<&Record> {
        let hash = self.hasher.hash_one(key_of);
        let place = self.places.find(hash, |&place| key(&self.records[place as usize]) == key_of)?;
        self.records.get(*place as usize)
    }

    fn put(&mut self, record: Record) {
        let DigestTable { records, places, hasher, .. } = self;
        let hash = hasher.hash_one(key(&record));
        if let Some(&place) = places.find(hash, |&place| key(&records[place as usize]) == key(&record)) {
            records[place as usize] = record;
        } else if let Some(place) = u32::try_from(records.len()).ok().filter(|_| records.len() < RECORDS_MAX) {
            records.push(record);
            places.insert_unique(hash, place, |&place| hasher.hash_one(key(&records[place as usize])));
        }
    }

    /// The digest of the content of `file`, where it is known.
    pub fn get(&self, file: impl Into<Fingerprint>) -> Option<Digest> {
        self.known(file).map(|known| known.digest)
    }

    /// The same, with the time of hashing.
    pub fn known(&self, file: impl Into<Fingerprint>) -> Option<Known> {
        let file = file.into();
        let found = self.find(&record(&file, Known { digest: Digest::default(), hashed: None })[..KEY_BYTES])?;
        let (same, digest) = decode((file.device, file.inode), &found[KEY_BYTES..OLD_RECORD_BYTES])?;
        let hashed = number(found, OLD_RECORD_BYTES).filter(|&time| time > 0);
        (same == file).then_some(Known { digest, hashed })
    }

    /// The checksums of its blocks, where they are known.
    pub fn blocks(&self, file: impl Into<Fingerprint>) -> Option<&[u32]> {
        let file = file.into();
        self.known(file)?;
        let blocks = self.blocks.get(&(file.device, file.inode))?;
        (blocks.len() as u64 == file.size.div_ceil(BLOCK_BYTES)).then_some(blocks)
    }

    /// Adds a digest of content that was read just now, with what stat said of the file after it was read. The caller
    /// sees to it that the file is settled: [`super::cache::is_settled`], [`super::cache::is_dated`].
    pub fn insert(&mut self, file: impl Into<Fingerprint>, digest: Digest) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        self.insert_as_of(file, Known { digest, hashed: Some(now) });
    }

    /// The same of content that was read at some time.
    pub fn insert_as_of(&mut self, file: impl Into<Fingerprint>, known: Known) {
        let file = file.into();
        self.put(record(&file, known));
        self.blocks.remove(&(file.device, file.inode));
    }

    /// Forgets a file, whatever its content was.
    pub fn remove(&mut self, file: impl Into<Fingerprint>) {
        let file = file.into();
        let DigestTable { records, places, hasher, blocks } = self;
        blocks.remove(&(file.device, file.inode));
        let gone = record(&file, Known { digest: Digest::default(), hashed: None });
        let found = places.find_entry(hasher.hash_one(key(&gone)), |&at| key(&records[at as usize]) == key(&gone));
        let Ok(found) = found else { return };
        let (place, _) = found.remove();
        records.swap_remove(place as usize);
        // The last one has moved to where the other was.
        let last = records.len() as u32;
        if let Some(moved) = records.get(place as usize)
            && let Some(at) = places.find_mut(hasher.hash_one(key(moved)), |&at| at == last)
        {
            *at = place;
        }
    }

    /// Adds the checksums of the blocks of a file whose digest was added.
    pub fn set_blocks(&mut self, file: impl Into<Fingerprint>, blocks: Box<[u32]>) {
        let file = file.into();
        if self.known(file).is_some() {
            self.blocks.insert((file.device, file.inode), blocks);
        }
    }

    /// Where a file stands in the table, whatever its content was; a number below [`DigestTable::len`]. It holds until
    /// something is taken out.
    pub fn place(&self, file: impl Into<Fingerprint>) -> Option<usize> {
        let wanted = record(&file.into(), Known { digest: Digest::default(), hashed: None });
        let hash = self.hasher.hash_one(key(&wanted));
        let place = self.places.find(hash, |&place| key(&self.records[place as usize]) == key(&wanted));
        place.map(|&place| place as usize)
    }

    /// Forgets all files but those at places that `kept` says true of.
    pub fn keep_only(&mut self, kept: &dyn Fn(usize) -> bool) {
        if (0..self.records.len()).all(kept) {
            return;
        }
        let DigestTable { records, places, hasher, blocks } = self;
        let mut at = 0..;
        records.retain(|_| at.next().is_some_and(kept));
        places.clear();
        for (place, record) in records.iter().enumerate() {
            let hash = hasher.hash_one(key(record));
            places.insert_unique(hash, place as u32, |&place| hasher.hash_one(key(&records[place as usize])));
        }
        let blocks = std::mem::take(blocks);
        let is_known = |&(device, inode): &(u64, u64)| {
            let (size, time) = (0, Timestamp::default());
            self.place(Fingerprint { device, inode, size, mtime: time, ctime: time }).is_some()
        };
        let left: Blocks = blocks.into_iter().filter(|(key, _)| is_known(key)).collect();
        self.blocks = left;
    }

    /// The digests of the files that have at least so many bytes.
    pub fn digests_of(&self, bytes: u64) -> HashSet<Digest> {
        let found = self.records.iter().filter_map(|record| {
            let key = (number(record, 0)?, number(record, 8)?);
            let (file, digest) = decode(key, &record[KEY_BYTES..OLD_RECORD_BYTES])?;
            (file.size >= bytes).then_some(digest)
        });
        found.collect()
    }

    /// How many digests it holds.
    pub fn len(&self) -> usize {
        self.records.len()
    }

    /// Whether it holds none.
    pub fn is_empty(&self) -> bool {
        self.records.is_empty()
    }

    /// Writes the whole table.
    ///
    /// # Errors
    /// As writing fails.
    pub fn write_to(&self, to: &mut impl Write) -> io::Result<()> {
        let mut hash = Sha256::new();
        let mut write = |bytes: &[u8]| {
            hash.update(bytes);
            to.write_all(bytes)
        };
        write(MAGIC)?;
        write(&(self.records.len() as u64).to_le_bytes())?;
        write(self.records.as_flattened())?;
        for ((device, inode), blocks) in &self.blocks {
            for number in [*device, *inode, blocks.len() as u64] {
                write(&number.to_le_bytes())?;
            }
            blocks.iter().try_for_each(|sum| write(&sum.to_le_bytes()))?;
        }
        let digest = hash.finalize();
        to.write_all(&digest)
    }

    /// The whole table as bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        // Memory takes what it is given.
        let _ = self.write_to(&mut bytes);
        bytes
    }

    /// Reads back what has so many bytes; bytes that are damaged give `None`.
    ///
    /// # Errors
    /// As reading fails.
    pub fn read_from(from: &mut impl Read, length: u64) -> io::Result<Option<DigestTable>> {
        let Some(body) = length.checked_sub(DIGEST_BYTES as u64) else { return Ok(None) };
        let mut body = Hashed { from: from.take(body), hash: Sha256::new() };
        let Some(table) = body.table()? else { return Ok(None) };
        let Hashed { from, hash } = body;
        let (mut digest, from) = ([0; DIGEST_BYTES], from.into_inner());
        let whole = read_whole(from, &mut digest)? && hash.finalize()[..] == digest;
        Ok(Some(table).filter(|_| whole))
    }

    /// Reads it back; bytes that are damaged give `None`.
    pub fn from_bytes(mut bytes: &[u8]) -> Option<DigestTable> {
        let length = bytes.len() as u64;
        DigestTable::read_from(&mut bytes, length).ok().flatten()
    }
}

/// Tables are equal that know the same.
impl PartialEq for DigestTable {
    fn eq(&self, other: &Self) -> bool {
        self.len() == other.len()
            && self.blocks == other.blocks
            && self.records.iter().all(|record| other.find(key(record)) == Some(record))
    }
}

impl Eq for DigestTable {}

/// The body of a table, which is hashed while it is read.
struct Hashed<R> {
    from: io::Take<R>,
    hash: Sha256,
}

/// False where it ends before that.
fn read_whole(from: &mut impl Read, buffer: &mut [u8]) -> io::Result<bool> {
    match from.read_exact(buffer) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        result => result.map(|()| true),
    }
}

impl<R: Read> Hashed<R> {
    fn fill(&mut self, buffer: &mut [u8]) -> io::Result<bool> {
        let whole = read_whole(&mut self.from, buffer)?;
        self.hash.update(&*buffer);
        Ok(whole)
    }

    fn table(&mut self) -> io::Result<Option<DigestTable>> {
        let mut magic = [0; MAGIC.len()];
        if !self.fill(&mut magic)? {
            return Ok(None);
        }
        let mut count = [0; 8];
        let (count, length) = if magic == MAGIC {
            if !self.fill(&mut count)? {
                return Ok(None);
            }
            (u64::from_le_bytes(count), RECORD_BYTES)
        } else if let Some((_, length)) = EARLIER.iter().find(|(earlier, _)| *earlier == &magic[..]) {
            (self.from.limit() / *length as u64, *length)
        } else {
            return Ok(None);
        };
        // What is damaged may say anything.
        if count > self.from.limit() / length as u64 {
            return Ok(None);
        }
        let mut table = DigestTable::with_capacity(usize::try_from(count).unwrap_or(0));
        for _ in 0..count {
            let mut record = [0; RECORD_BYTES];
            if !self.fill(&mut record[..length])? {
                return Ok(None);
            }
            table.put(record);
        }
        let mut lists = vec![0; usize::try_from(self.from.limit()).unwrap_or(0)];
        if !self.fill(&mut lists)? || (magic != MAGIC && !lists.is_empty()) {
            return Ok(None);
        }
        let Some(blocks) = read_blocks(&lists) else { return Ok(None) };
        table.blocks = blocks;
        Ok(Some(table))
    }
}

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

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::root::Metadata;

    fn metadata_of(file: &Path) -> Metadata {
        Metadata::of(&std::fs::File::open(file).unwrap()).unwrap()
    }

    fn file(inode: u64) -> Fingerprint {
        let time = Timestamp { seconds: -1, nanoseconds: 7 };
        Fingerprint { device: 1, inode, size: inode, mtime: time, ctime: time }
    }

    #[test]
    fn what_is_put_in_and_taken_out_leaves_the_rest_where_it_is_found() {
        let mut table = DigestTable::default();
        for inode in 0..1000 {
            table.insert(file(inode), Digest([inode as u8; 32]));
            table.insert(file(inode), Digest([inode as u8 ^ 1; 32]));
        }
        (0..1000).filter(|inode| inode % 3 != 0).for_each(|inode| table.remove(file(inode)));
        table.remove(file(1));
        assert_eq!(table.len(), 334);
        table.insert(file(1), Digest::default());
        table.insert(file(2), Digest::default());
        table.set_blocks(file(1), Box::new([1]));
        table.set_blocks(file(3), Box::new([3]));
        let gone: Vec<_> = [1, 2].iter().filter_map(|&inode| table.place(file(inode))).collect();
        table.keep_only(&|place| !gone.contains(&place));
        assert_eq!((table.len(), table.blocks(file(3)), table.blocks(file(1))), (334, Some(&[3][..]), None));
        for inode in 0..1000 {
            let known = (inode % 3 == 0).then_some(Digest([inode as u8 ^ 1; 32]));
            assert_eq!(table.get(file(inode)), known);
            assert_eq!(table.get(Fingerprint { size: 7777, ..file(inode) }), None);
        }
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
}
