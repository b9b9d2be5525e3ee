//! How much lies beneath a root, and how much more may.
//!
//! The count is kept in `.lockstep/usage` of the root, under a lock, so that all sessions of all processes share it and a
//! restart does not lose it. Space is taken from it before it is used, in steps. What the count does not see (other
//! programs, sessions that were killed) is put right by looking at the tree: when there is no count yet, when a session
//! begins an hour after the last look, and before anything is refused.
//!
//! What always holds: nothing is stored that was not taken before. Sessions together pass a quota by at most [`STEP_BYTES`]
//! and [`STEP_FILES`] each, and only when the tree is looked at while they hold what they have not used yet: what is longer
//! is taken in [`steps`].

use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::fs::{FlockOperation, OFlags, flock};

use crate::config::Quota;
use crate::error::{bytes_shown, shown};
use crate::path::RelPath;
use crate::root::{FileKind, Follow, Root};

/// Bytes that a session takes at once.
pub const STEP_BYTES: u64 = 4 << 20;
/// Files that a session takes at once.
pub const STEP_FILES: u64 = 32;
/// Of what is free a session takes no more ahead than one part of so many.
const SHARE: u64 = 16;
/// Seconds after which a session that begins has the tree looked at.
const STALE: u64 = 3600;
/// Seconds for which a look is good enough to refuse by.
const FRESH: u64 = 60;
const STATE: &str = ".lockstep";
const USAGE: &str = ".lockstep/usage";
/// The file has one length, so that it is written in one piece.
const LENGTH: usize = 128;

/// What may be more than a session takes at once, in steps that are not: how much comes before each, and how long it is.
pub fn steps(bytes: u64) -> impl Iterator<Item = (u64, u64)> {
    (0..bytes).step_by(STEP_BYTES as usize).map(move |before| (before, STEP_BYTES.min(bytes - before)))
}

/// Bytes and files.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Amount {
    /// Sizes of files together.
    pub bytes: u64,
    /// Files, directories and links.
    pub files: u64,
}

impl Amount {
    /// So many bytes, and so many files.
    pub const fn new(bytes: u64, files: u64) -> Amount {
        Amount { bytes, files }
    }

    fn plus(self, other: Amount) -> Amount {
        Amount::new(self.bytes.saturating_add(other.bytes), self.files.saturating_add(other.files))
    }

    fn less(self, other: Amount) -> Amount {
        Amount::new(self.bytes.saturating_sub(other.bytes), self.files.saturating_sub(other.files))
    }

    fn least(self, other: Amount) -> Amount {
        Amount::new(self.bytes.min(other.bytes), self.files.min(other.files))
    }

    fn most(self, other: Amount) -> Amount {
        Amount::new(self.bytes.max(other.bytes), self.files.max(other.files))
    }

    fn covers(self, other: Amount) -> bool {
        self.bytes >= other.bytes && self.files >= other.files
    }
}

/// Why nothing more is stored.
#[derive(Debug, thiserror::Error)]
pub enum QuotaError {
    /// It would be too much.
    #[error("the quota is used up: {}; remove something, or have it raised", in_numbers(*used, *cap, *needed))]
    Exceeded {
        /// What is used and taken.
        used: Amount,
        /// What may be.
        cap: Amount,
        /// What was asked for.
        needed: Amount,
    },
    /// What is used is not known, so that nothing may be stored.
    #[error("what is used of the quota cannot be kept in {}: {}", shown(path), crate::error::in_words(reason))]
    Count {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: io::Error,
    },
}

fn in_numbers(used: Amount, cap: Amount, needed: Amount) -> String {
    let mut parts = Vec::new();
    if cap.bytes != u64::MAX {
        let (used, cap, needed) = (bytes_shown(used.bytes), bytes_shown(cap.bytes), bytes_shown(needed.bytes));
        parts.push(format!("{used} of {cap} are used and {needed} more are needed"));
    }
    if cap.files != u64::MAX {
        let (used, cap, needed) = (used.files, cap.files, needed.files);
        parts.push(format!("{used} of {cap} files are used and {needed} more are needed"));
    }
    parts.join(", ")
}

/// What is written down.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Count {
    used: Amount,
    /// All that was ever taken; tells what was taken during a look at the tree.
    taken: Amount,
    /// When the tree was looked at, seconds since 1970.
    looked: u64,
    /// More is counted than is there, or a look did not come to its end.
    loose: bool,
}

impl Count {
    fn encode(self) -> Vec<u8> {
        let Count { used, taken, looked, loose } = self;
        let text = format!(
            "lockstep-usage 1 {} {} {} {} {looked} {}",
            used.bytes,
            used.files,
            taken.bytes,
            taken.files,
            u8::from(loose)
        );
        format!("{text:<width$}\n", width = LENGTH - 1).into_bytes()
    }

    fn parse(text: &[u8]) -> Option<Count> {
        let text = std::str::from_utf8(text).ok().filter(|text| text.len() == LENGTH)?;
        let numbers = text.strip_prefix("lockstep-usage 1 ")?.split_ascii_whitespace();
        let numbers: Vec<u64> = numbers.map(str::parse).collect::<Result<_, _>>().ok()?;
        let [used_bytes, used_files, taken_bytes, taken_files, looked, loose] = numbers[..] else { return None };
        let (used, taken) = (Amount::new(used_bytes, used_files), Amount::new(taken_bytes, taken_files));
        Some(Count { used, taken, looked, loose: loose != 0 })
    }
}

/// The file, locked until it is dropped.
struct Ledger {
    file: File,
}

impl Ledger {
    fn read(&self) -> Option<Count> {
        let mut text = vec![0; LENGTH + 1];
        let length = self.file.read_at(&mut text, 0).ok()?;
        Count::parse(&text[..length])
    }

    fn write(&self, count: Count) -> io::Result<()> {
        self.file.write_all_at(&count.encode(), 0)?;
        self.file.set_len(LENGTH as u64)
    }
}

/// What one session may still store.
#[derive(Debug)]
pub struct Allowance {
    root: Root,
    path: PathBuf,
    cap: Amount,
    /// What was taken and is not used yet.
    held: Mutex<Amount>,
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

impl Allowance {
    /// Of what lies beneath `path`. Where there is no count yet the tree is looked at, which blocks.
    ///
    /// # Errors
    /// When what is used cannot be known.
    pub fn open(path: &Path, quota: Quota) -> Result<Arc<Allowance>, QuotaError> {
        let cap = Amount::new(quota.bytes.unwrap_or(u64::MAX), quota.files.unwrap_or(u64::MAX));
        let failed = |error: crate::root::RootError| QuotaError::Count { path: path.to_owned(), reason: error.source };
        let root = Root::open(path).map_err(failed)?;
        let allowance = Arc::new(Allowance { root, path: path.to_owned(), cap, held: Mutex::default() });
        let count = allowance.count()?;
        if now().saturating_sub(count.looked) >= STALE {
            let looking = Arc::clone(&allowance);
            let look = move || {
                let held = *looking.held();
                if let Err(error) = looking.look(held) {
                    tracing::warn!(error = crate::error::chain(&error), "the quota is not corrected");
                }
            };
            // Without a thread the next session does it.
            let _ = std::thread::Builder::new().name("quota".into()).spawn(look);
        }
        Ok(allowance)
    }

    fn failed(&self, reason: io::Error) -> QuotaError {
        QuotaError::Count { path: self.path.join(USAGE), reason }
    }

    fn lock(&self) -> Result<Ledger, QuotaError> {
        let open = || -> io::Result<File> {
            let rel = |text: &str| RelPath::new(text).map_err(io::Error::other);
            let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOCTTY | OFlags::NONBLOCK;
            match self.root.mkdir(&rel(STATE)?, 0o700) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error.source),
                _ => {}
            }
            let file = self.root.open_with(&rel(USAGE)?, Follow::Never, flags, 0o600).map_err(|error| error.source)?;
            if !file.metadata()?.is_file() {
                return Err(io::Error::other("it is not a regular file"));
            }
            flock(&file, FlockOperation::LockExclusive)?;
            Ok(file)
        };
        open().map(|file| Ledger { file }).map_err(|error| self.failed(error))
    }

    fn held(&self) -> MutexGuard<'_, Amount> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is counted. Where nothing is yet, nobody stores anything until the tree was looked at: the lock is held.
    fn count(&self) -> Result<Count, QuotaError> {
        let ledger = self.lock()?;
        self.known(&ledger)
    }

    fn known(&self, ledger: &Ledger) -> Result<Count, QuotaError> {
        if let Some(count) = ledger.read() {
            return Ok(count);
        }
        let count = Count { used: self.look_at_tree().0, looked: now(), ..Count::default() };
        ledger.write(count).map_err(|error| self.failed(error))?;
        Ok(count)
    }

    /// Looks at the tree anew while others go on: what they take meanwhile counts in addition, whether it was seen or not, and
    /// what this session holds.
    fn look(&self, held: Amount) -> Result<Count, QuotaError> {
        let before = {
            let ledger = self.lock()?;
            let count = self.known(&ledger)?;
            ledger.write(Count { looked: now(), loose: true, ..count }).map_err(|error| self.failed(error))?;
            count
        };
        let (found, missed) = self.look_at_tree();
        let ledger = self.lock()?;
        let count = self.known(&ledger)?;
        let mut used = found.plus(count.taken.less(before.taken)).plus(held);
        if let Some(error) = missed {
            used = used.most(count.used);
            tracing::warn!(root = %shown(&self.path), error = crate::error::in_words(&error), "the quota is not corrected");
        }
        let count = Count { used, taken: count.taken, looked: now(), loose: false };
        ledger.write(count).map_err(|error| self.failed(error))?;
        Ok(count)
    }

    /// Everything but what lockstep writes of its own accord: lists, logs and locks directly in a `.lockstep`. What is staged,
    /// in the trash or quarantined counts. With it the reason why it is not all that there is, where it is not.
    fn look_at_tree(&self) -> (Amount, Option<io::Error>) {
        let mut found = Amount::default();
        let mut seen = HashSet::new();
        let missed = self.root.visit_below(|holder, name, metadata| {
            let is_own = holder == STATE.as_bytes() && metadata.kind != FileKind::Directory;
            if is_own || name == STATE.as_bytes() {
                return;
            }
            found.files += 1;
            let is_file = metadata.kind == FileKind::Regular;
            if is_file && (metadata.links == 1 || seen.insert((metadata.device, metadata.inode))) {
                found.bytes = found.bytes.saturating_add(metadata.size);
            }
        });
        (found, missed)
    }

    /// Takes space that is about to be used.
    ///
    /// # Errors
    /// [`QuotaError`]; then it is not to be used.
    pub fn take(&self, needed: Amount) -> Result<(), QuotaError> {
        let mut held = self.held();
        if !held.covers(needed) {
            let missing = needed.less(*held);
            *held = held.plus(self.grant(missing, *held)?);
        }
        *held = held.less(needed);
        Ok(())
    }

    /// At least so much from the common count, beside what is held, and up to a step where there is enough for many.
    fn grant(&self, missing: Amount, held: Amount) -> Result<Amount, QuotaError> {
        let mut looked = false;
        loop {
            let count = {
                let ledger = self.lock()?;
                let count = self.known(&ledger)?;
                let free = self.cap.less(count.used);
                if free.covers(missing) {
                    let rest = free.less(missing);
                    let share = Amount::new(rest.bytes / SHARE, rest.files / SHARE);
                    // With what is about to be used no more than a step.
                    let ahead = Amount::new(STEP_BYTES, STEP_FILES).less(missing.plus(held)).least(share);
                    let given = missing.plus(ahead);
                    let (used, taken) = (count.used.plus(given), count.taken.plus(given));
                    ledger.write(Count { used, taken, ..count }).map_err(|error| self.failed(error))?;
                    return Ok(given);
                }
                count
            };
            let doubtful = count.loose || now().saturating_sub(count.looked) >= FRESH;
            if looked || !doubtful {
                return Err(QuotaError::Exceeded { used: count.used, cap: self.cap, needed: missing });
            }
            looked = true;
            self.look(held)?;
        }
    }

    /// How many directories would have to be made for one at `path`.
    pub fn missing(&self, path: &RelPath) -> u64 {
        let there = |path: &RelPath| self.root.stat(path, Follow::Beneath).is_ok();
        path.ancestors().chain([path.clone()]).filter(|path| !there(path)).count() as u64
    }

    /// Whether so much is there to be taken; nothing is.
    ///
    /// # Errors
    /// [`QuotaError`].
    pub fn has(&self, needed: Amount) -> Result<(), QuotaError> {
        let held = *self.held();
        let fits = |count: Count| self.cap.less(count.used).plus(held).covers(needed);
        let mut count = self.count()?;
        if !fits(count) && (count.loose || now().saturating_sub(count.looked) >= FRESH) {
            count = self.look(held)?;
        }
        if fits(count) { Ok(()) } else { Err(QuotaError::Exceeded { used: count.used, cap: self.cap, needed }) }
    }

    /// Gives space back that is used no more.
    pub fn give_back(&self, amount: Amount) {
        if amount != Amount::default() {
            self.change(|count| count.used = count.used.less(amount));
        }
    }

    /// More is counted than there is: whoever is about to be refused is to look again.
    pub fn loosen(&self) {
        self.change(|count| count.loose = true);
    }

    /// What cannot be written down stays counted, until the tree is looked at.
    fn change(&self, change: impl FnOnce(&mut Count)) {
        if let Ok(ledger) = self.lock()
            && let Some(mut count) = ledger.read()
        {
            change(&mut count);
            let _ = ledger.write(count);
        }
    }

    /// What may be stored in all, and what of it is free.
    ///
    /// # Errors
    /// When it is not known.
    pub fn state(&self) -> Result<(Amount, Amount), QuotaError> {
        let held = *self.held();
        Ok((self.cap, self.cap.less(self.count()?.used).plus(held).least(self.cap)))
    }
}

#[cfg(test)]
impl Allowance {
    /// All bytes that were ever taken beneath the root.
    pub(super) fn taken_bytes(&self) -> u64 {
        self.count().unwrap().taken.bytes
    }
}

impl Drop for Allowance {
    fn drop(&mut self) {
        let held = *self.held();
        self.give_back(held);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(at: &Path, bytes: u64, files: u64) -> Arc<Allowance> {
        Allowance::open(at, Quota { bytes: Some(bytes), files: Some(files) }).unwrap()
    }

    /// Makes the last look too old to refuse by.
    fn age(at: &Path) {
        let path = at.join(USAGE);
        let count = Count::parse(&std::fs::read(&path).unwrap()).unwrap();
        std::fs::write(path, Count { looked: now() - FRESH, ..count }.encode()).unwrap();
    }

    #[test]
    fn a_quota_counts_what_is_there_and_survives_its_sessions() {
        let at = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(at.path().join(".lockstep/staging")).unwrap();
        std::fs::write(at.path().join("a"), vec![0; 1000]).unwrap();
        std::fs::hard_link(at.path().join("a"), at.path().join("b")).unwrap();
        std::fs::write(at.path().join(".lockstep/manifest"), vec![0; 5000]).unwrap();
        std::fs::write(at.path().join(".lockstep/staging/part"), vec![0; 200]).unwrap();
        let allowance = open(at.path(), 2000, 10);
        // a, b, the staging directory and what is in it.
        assert_eq!(allowance.state().unwrap(), (Amount::new(2000, 10), Amount::new(800, 6)));
        allowance.take(Amount::new(500, 1)).unwrap();
        let error = allowance.take(Amount::new(301, 1)).unwrap_err().to_string();
        assert!(error.contains("of 2.0 kB are used and") && error.contains("of 10 files are used"), "{error}");
        allowance.take(Amount::new(300, 1)).unwrap();
        drop(allowance);
        let allowance = open(at.path(), 2000, 10);
        assert!(allowance.take(Amount::new(1, 0)).is_err());
        allowance.give_back(Amount::new(100, 0));
        allowance.take(Amount::new(100, 0)).unwrap();
    }

    #[test]
    fn what_others_removed_is_noticed_before_anything_is_refused() {
        let at = tempfile::tempdir().unwrap();
        std::fs::write(at.path().join("a"), vec![0; 1000]).unwrap();
        let allowance = open(at.path(), 1000, 10);
        std::fs::remove_file(at.path().join("a")).unwrap();
        // It was looked at just now.
        assert!(allowance.take(Amount::new(1, 1)).is_err());
        age(at.path());
        allowance.take(Amount::new(1000, 1)).unwrap();
        std::fs::write(at.path().join("c"), vec![0; 1000]).unwrap();
        assert!(allowance.has(Amount::new(1, 0)).is_err());
        std::fs::remove_file(at.path().join("c")).unwrap();
        allowance.loosen();
        allowance.has(Amount::new(1000, 1)).unwrap();
    }

    /// Whether a byte more than 1000 is refused once the tree was looked at again.
    fn refuses_more(at: &Path, allowance: &Allowance) -> bool {
        age(at);
        allowance.take(Amount::new(1, 0)).is_err()
    }

    #[test]
    fn what_lies_deeper_than_a_path_can_name_counts() {
        let at = tempfile::tempdir().unwrap();
        let allowance = open(at.path(), 1000, 100);
        // Relative to the root each of these has a name that can be used; a whole path would be too long.
        let deep = |first: &str| RelPath::new([first, &format!("/{}", "n".repeat(255)).repeat(15)].concat()).unwrap();
        allowance.take(Amount::new(1000, 33)).unwrap();
        for first in ["a", "b"] {
            allowance.root.mkdir_all(&deep(first), 0o700).unwrap();
        }
        let file = deep("a").join([b'f'; 200]).unwrap();
        allowance.root.create_new(&file, 0o600).unwrap().set_len(1000).unwrap();
        assert!(refuses_more(at.path(), &allowance));
        // Nor does it help to move them into each other.
        let flags = rustix::fs::RenameFlags::empty();
        let into = deep("b").parent().unwrap().join(b"a").unwrap();
        allowance.root.rename(&RelPath::new("a").unwrap(), &into, flags).unwrap();
        assert!(refuses_more(at.path(), &allowance));
        assert_eq!(allowance.look(Amount::default()).unwrap().used, Amount::new(1000, 33));
    }

    #[test]
    fn what_cannot_be_looked_at_keeps_its_room() {
        use std::os::unix::fs::PermissionsExt as _;

        use rustix::thread::CapabilitySet;
        // Also by root, who may look everywhere.
        let mut sets = rustix::thread::capabilities(None).unwrap();
        sets.effective.remove(CapabilitySet::DAC_OVERRIDE | CapabilitySet::DAC_READ_SEARCH);
        rustix::thread::set_capabilities(None, sets).unwrap();
        let at = tempfile::tempdir().unwrap();
        let allowance = open(at.path(), 1000, 100);
        let hidden = at.path().join("hidden");
        let set = |mode| std::fs::set_permissions(&hidden, std::fs::Permissions::from_mode(mode)).unwrap();
        std::fs::create_dir(&hidden).unwrap();
        allowance.take(Amount::new(1000, 2)).unwrap();
        std::fs::write(hidden.join("a"), vec![0; 1000]).unwrap();
        for mode in [0o300, 0o400, 0] {
            set(mode);
            assert!(refuses_more(at.path(), &allowance), "{mode:o}");
        }
        // What is given back is free, and so is all that is gone once it can be seen.
        allowance.give_back(Amount::new(10, 0));
        allowance.take(Amount::new(10, 0)).unwrap();
        set(0o700);
        std::fs::write(hidden.join("a"), vec![0; 900]).unwrap();
        assert!(!refuses_more(at.path(), &allowance));
    }

    #[test]
    fn sessions_at_once_do_not_pass_it_together() {
        let at = tempfile::tempdir().unwrap();
        let cap = 40 * 100_000;
        let taken = std::sync::atomic::AtomicU64::new(0);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    let allowance = open(at.path(), cap, u64::MAX);
                    for _ in 0..20 {
                        if allowance.take(Amount::new(100_000, 1)).is_ok() {
                            taken.fetch_add(100_000, std::sync::atomic::Ordering::Relaxed);
                        }
                    }
                });
            }
        });
        let taken = taken.into_inner();
        assert!(taken > 0 && taken <= cap, "{taken}");
    }

    #[test]
    fn a_damaged_count_is_made_anew() {
        let at = tempfile::tempdir().unwrap();
        std::fs::write(at.path().join("a"), "12345").unwrap();
        drop(open(at.path(), 10, 10));
        for damage in ["", "lockstep-usage 1 0 0", "lockstep-usage 2 0 0 0 0 0 0\n"] {
            std::fs::write(at.path().join(USAGE), damage).unwrap();
            assert_eq!(open(at.path(), 10, 10).state().unwrap().1, Amount::new(5, 9), "{damage}");
        }
        assert_eq!(Count::parse(&Count::default().encode()), Some(Count::default()));
    }
}
