//! Digests of files that were read before, so that nothing is hashed twice.
//!
//! A record holds as long as device, inode, size, time of modification and time of change are what they were. A file whose
//! time of change was within the clock's granularity of the moment it was looked at is not recorded: it may have been
//! changed since without its times showing it. The cache is a help, never needed: when it cannot be opened, files are hashed.
//!
//! A source's lies in a database under the state directory, since several runs may read one tree at once; a target's is a
//! table beside its manifest, written whole by the one run that holds the lock.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use redb::{Database, ReadableDatabase, ReadableTable, ReadableTableMetadata, TableDefinition, WriteTransaction};

pub use super::table::{DigestTable, Known};
use super::table::{decode, encode};
use crate::manifest::{Digest, Timestamp};
use crate::root::{Fingerprint, Seen};

const TABLE: TableDefinition<'_, (u64, u64), &[u8]> = TableDefinition::new("digests-1");

/// How old a time must be before it is trusted, by far more than the tick of any kernel clock.
pub const GRANULARITY: Duration = Duration::from_millis(20);
/// The same on file systems that keep whole seconds, or as FAT every second one: all their times end with no nanoseconds.
const WHOLE_SECONDS: Duration = Duration::from_secs(2);

/// What the database may keep of its file in memory.
const DATABASE_BYTES: usize = 16 << 20;
/// So many digests are put in order before they are stored: neighbours lie in one page.
const BATCH: usize = 65_536;

/// The digests of one root's files: a database.
#[derive(Debug, Clone, Copy)]
pub struct DigestCache<'a>(pub &'a Path);

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

impl DigestCache<'_> {
    /// Reads what is there. A cache that is damaged, in use or not there is empty.
    pub fn load(self) -> DigestTable {
        self.load_of(None)
    }

    /// The same of these files alone, where that is less work.
    pub fn load_for(self, wanted: &[Seen]) -> DigestTable {
        self.load_of(Some(wanted))
    }

    fn load_of(self, wanted: Option<&[Seen]>) -> DigestTable {
        if self.0.exists() { read(self.0, wanted).unwrap_or_default() } else { DigestTable::default() }
    }

    /// Adds the digests of files that were read after `looked`, when stat said this of them. What else is there stays.
    ///
    /// # Errors
    /// [`CacheError`] when the database cannot be written, or another process has it open.
    pub fn store(
        self,
        known: impl IntoIterator<Item = (Fingerprint, Digest)>,
        looked: SystemTime,
    ) -> Result<(), CacheError> {
        let mut trusted = known.into_iter().filter(|(file, _)| is_settled(*file, looked)).peekable();
        if trusted.peek().is_none() {
            return Ok(());
        }
        self.write(|transaction| {
            let mut table = transaction.open_table(TABLE)?;
            loop {
                let mut batch: Vec<(Fingerprint, Digest)> = trusted.by_ref().take(BATCH).collect();
                if batch.is_empty() {
                    return Ok(());
                }
                batch.sort_unstable_by_key(|(file, _)| (file.device, file.inode));
                for (file, digest) in &batch {
                    table.insert((file.device, file.inode), encode(file, digest).as_slice())?;
                }
            }
        })
    }

    /// Changes the database in one transaction.
    pub(super) fn write(
        self,
        change: impl FnOnce(&WriteTransaction) -> Result<(), redb::Error>,
    ) -> Result<(), CacheError> {
        let written = || -> Result<(), redb::Error> {
            let database = open(self.0)?;
            let transaction = database.begin_write()?;
            change(&transaction)?;
            Ok(transaction.commit()?)
        };
        written().map_err(|error| CacheError { file: self.0.to_owned(), reason: error.to_string() })
    }
}

/// Whether a file that was looked at then had not changed for so long that a further change would have another time.
pub fn is_settled(file: impl Into<Fingerprint>, looked: SystemTime) -> bool {
    let changed = file.into().ctime;
    system_time(changed).is_none_or(|since| looked.duration_since(since).is_ok_and(|age| age > granularity_of(changed)))
}

fn granularity_of(time: Timestamp) -> Duration {
    if time.nanoseconds == 0 { WHOLE_SECONDS } else { GRANULARITY }
}

/// How long it takes from `now` on until a file with this time of change is [settled](is_settled), if it stays as it is.
pub fn until_settled(file: impl Into<Fingerprint>, now: SystemTime) -> Duration {
    let changed = file.into().ctime;
    until(changed, granularity_of(changed), now)
}

/// Whether a file has a time of modification that no write near its time of change can have given it: then a write shows
/// although the inode changed only now.
pub fn is_dated(file: impl Into<Fingerprint>) -> bool {
    let file = file.into();
    let (Some(modified), Some(changed)) = (system_time(file.mtime), system_time(file.ctime)) else {
        return true;
    };
    let apart = changed.duration_since(modified).or_else(|_| modified.duration_since(changed));
    apart.is_ok_and(|apart| apart > GRANULARITY)
}

/// How long it takes from `now` on until a file with this time of modification is [dated](is_dated) when its inode changes.
pub fn until_dated(mtime: Timestamp, now: SystemTime) -> Duration {
    until(mtime, GRANULARITY, now)
}

/// How long it takes until a time is longer ago than that. One that is far ahead, by another machine's clock, is not waited for.
fn until(time: Timestamp, granularity: Duration, now: SystemTime) -> Duration {
    let (Some(since), tick) = (system_time(time), granularity + Duration::from_millis(1)) else {
        return Duration::ZERO;
    };
    match now.duration_since(since) {
        Ok(age) => tick.saturating_sub(age),
        Err(ahead) if ahead.duration() <= tick => tick + ahead.duration(),
        Err(_) => Duration::ZERO,
    }
}

/// `None` for times before 1970.
fn system_time(time: Timestamp) -> Option<SystemTime> {
    UNIX_EPOCH.checked_add(Duration::new(u64::try_from(time.seconds).ok()?, time.nanoseconds))
}

pub(super) fn builder() -> redb::Builder {
    let mut builder = Database::builder();
    builder.set_cache_size(DATABASE_BYTES);
    builder
}

/// Opens the database; a damaged one is replaced, since it holds nothing that cannot be computed again.
fn open(file: &Path) -> Result<Database, redb::Error> {
    match builder().create(file) {
        Ok(database) => Ok(database),
        Err(redb::DatabaseError::DatabaseAlreadyOpen) => Err(redb::Error::DatabaseAlreadyOpen),
        Err(_) => {
            let _ = std::fs::remove_file(file);
            Ok(builder().create(file)?)
        }
    }
}

fn read(file: &Path, wanted: Option<&[Seen]>) -> Result<DigestTable, redb::Error> {
    let database = builder().open(file)?;
    let table = database.begin_read()?.open_table(TABLE)?;
    let add = |records: &mut DigestTable, key: (u64, u64), value: &[u8]| {
        if let Some((file, digest)) = decode(key, value) {
            records.insert_as_of(file, Known { digest, hashed: None });
        }
    };
    let all = table.len()?;
    if let Some(wanted) = wanted.filter(|wanted| (wanted.len() as u64).saturating_mul(SOONER_LOOKED_UP) < all) {
        let mut records = DigestTable::default();
        for key in wanted.iter().map(|seen| (seen.device, seen.inode)) {
            if let Some(value) = table.get(key)? {
                add(&mut records, key, value.value());
            }
        }
        return Ok(records);
    }
    let mut records = DigestTable::with_capacity(usize::try_from(all).unwrap_or(0));
    for item in table.iter()? {
        let (key, value) = item?;
        add(&mut records, key.value(), value.value());
    }
    Ok(records)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::root::Metadata;

    fn metadata_of(file: &Path) -> Metadata {
        Metadata::of(&std::fs::File::open(file).unwrap()).unwrap()
    }

    #[test]
    fn a_time_of_just_now_is_dated_a_moment_later() {
        let now = UNIX_EPOCH + Duration::from_secs(1_000_000);
        for (milliseconds, expected) in
            [(-3000, 0), (-21, 0), (-20, 1), (-1, 20), (0, 21), (5, 26), (21, 42), (22, 0), (90_000, 0)]
        {
            let at = 1_000_000_000_i64 + milliseconds;
            let mtime = Timestamp { seconds: at / 1000, nanoseconds: (at % 1000) as u32 * 1_000_000 };
            let wait = until_dated(mtime, now);
            assert_eq!(wait, Duration::from_millis(expected), "{milliseconds}");
            let changed = (now + wait).duration_since(UNIX_EPOCH).unwrap();
            let ctime = Timestamp { seconds: changed.as_secs() as i64, nanoseconds: changed.subsec_nanos() };
            assert!(is_dated(Fingerprint { device: 0, inode: 0, size: 0, mtime, ctime }), "{milliseconds}");
        }
    }

    #[test]
    fn a_file_is_settled_when_a_further_change_would_have_another_time() {
        let at = |milliseconds: u64| UNIX_EPOCH + Duration::from_secs(1_000_000) + Duration::from_millis(milliseconds);
        let of = |nanoseconds| Fingerprint {
            device: 0,
            inode: 0,
            size: 0,
            mtime: Timestamp::default(),
            ctime: Timestamp { seconds: 1_000_000, nanoseconds },
        };
        // One that has no nanoseconds is of a file system that keeps whole seconds.
        for (file, now, wait) in [
            (of(500_000_000), 500, 21),
            (of(500_000_000), 515, 6),
            (of(500_000_000), 490, 31),
            (of(500_000_000), 521, 0),
            (of(500_000_000), 0, 0),
            (of(0), 0, 2001),
            (of(0), 1999, 2),
            (of(0), 2001, 0),
        ] {
            let wait = Duration::from_millis(wait);
            assert_eq!(until_settled(file, at(now)), wait, "{file:?} {now}");
            assert_eq!(is_settled(file, at(now)), wait.is_zero() && now > 0, "{file:?} {now}");
            assert!(wait.is_zero() || is_settled(file, at(now) + wait));
        }
    }

    #[test]
    fn a_digest_holds_until_anything_about_the_file_moves() {
        let directory = tempfile::tempdir().unwrap();
        let (file, database) = (directory.path().join("f"), directory.path().join("d.redb"));
        std::fs::write(&file, "one").unwrap();
        std::thread::sleep(GRANULARITY * 2);
        let before = metadata_of(&file);
        DigestCache(&database).store([((&before).into(), Digest([1; 32]))], SystemTime::now()).unwrap();
        let cache = DigestCache(&database).load();
        assert_eq!(cache.get(&metadata_of(&file)), Some(Digest([1; 32])));
        // Same size, same time of modification: the time of change tells.
        let times = std::fs::FileTimes::new().set_modified(std::fs::metadata(&file).unwrap().modified().unwrap());
        std::fs::write(&file, "two").unwrap();
        std::fs::File::options().write(true).open(&file).unwrap().set_times(times).unwrap();
        assert_eq!(metadata_of(&file).mtime, before.mtime);
        assert_eq!(cache.get(&metadata_of(&file)), None);
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
                let found = Metadata { ctime: old, ..found };
                (Fingerprint::from(&found), Seen::of(&found), Digest([number; 32]))
            })
            .collect();
        let known = files.iter().map(|(file, _, digest)| (*file, *digest));
        DigestCache(&database).store(known, SystemTime::now()).unwrap();
        for (wanted, held) in [(1, 1), (4, 4), (5, 40), (40, 40)] {
            let few: Vec<_> = files.iter().take(wanted).map(|(_, seen, _)| *seen).collect();
            let cache = DigestCache(&database).load_for(&few);
            assert_eq!(cache.len(), held, "{wanted}");
            for (file, _, digest) in &files[..wanted] {
                assert_eq!(cache.get(*file), Some(*digest));
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
        let cache = DigestCache(&database);
        cache.store([((&metadata_of(&file)).into(), Digest([1; 32]))], SystemTime::now()).unwrap();
        assert!(cache.load().is_empty());
    }

    #[test]
    fn a_damaged_cache_is_an_empty_one_and_is_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let (file, database) = (directory.path().join("f"), directory.path().join("d.redb"));
        std::fs::write(&database, "this is no database at all").unwrap();
        std::fs::write(&file, "one").unwrap();
        std::thread::sleep(GRANULARITY * 2);
        let cache = DigestCache(&database);
        cache.store([((&metadata_of(&file)).into(), Digest([1; 32]))], SystemTime::now()).unwrap();
        assert_eq!(cache.load().len(), 1);
    }
}
