//! What an interrupted run left: which files it was staging, so that the next run knows what of them it may go on with.
//!
//! The journal is `staging/current/plan` below the state directory: for each file its path, size and time, written
//! once before anything is staged. How much of a file is there is what lies in `staging/current/tree`; it is hashed
//! again before it is believed ([`super::StagedFile::resume`]).
//!
//! Where files are written at a stock server over several connections, how long one is does not say how much of it is there. Then a
//! record without a path stands first, and each other one says besides where the run began with its file.

use std::collections::HashMap;
use std::io::{self, BufWriter, Read, Write};

use rustix::fs::RenameFlags;

use super::StageError;
use crate::manifest::Timestamp;
use crate::path::RelPath;
use crate::root::{FileKind, Follow, Root};

const JOURNAL: &str = "plan";
const NEW_JOURNAL: &str = "plan.new";
const TREE: &str = "tree";
/// Path length, size, seconds, nanoseconds.
const FIXED_BYTES: usize = 2 + 8 + 8 + 4;

/// The files of a run.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Journal {
    /// By path: size and time at the source.
    files: HashMap<RelPath, (u64, Timestamp)>,
    /// Where the run began with each, where they are written out of their order.
    begun: Option<HashMap<RelPath, u64>>,
}

/// Path, size and time of a file.
pub type Listed<'a> = (&'a RelPath, u64, Timestamp);

impl Journal {
    /// Of the files that are to be staged.
    pub fn new(files: impl IntoIterator<Item = (RelPath, u64, Timestamp)>) -> Journal {
        let files = files.into_iter().map(|(path, size, mtime)| (path, (size, mtime))).collect();
        Journal { files, begun: None }
    }

    /// With these as well.
    #[must_use]
    pub fn with(mut self, files: impl IntoIterator<Item = (RelPath, u64, Timestamp)>) -> Journal {
        self.files.extend(Journal::new(files).files);
        self
    }

    /// Without these.
    #[must_use]
    pub fn without<'a>(mut self, paths: impl IntoIterator<Item = &'a RelPath>) -> Journal {
        for path in paths {
            self.files.remove(path);
        }
        self
    }

    /// Of files that may be written out of their order, with where the run begins with each.
    pub fn spread(files: Vec<((RelPath, u64, Timestamp), u64)>) -> Journal {
        let begun = files.iter().map(|((path, ..), begun)| (path.clone(), *begun)).collect();
        Journal { begun: Some(begun), ..Journal::new(files.into_iter().map(|(file, _)| file)) }
    }

    /// Where the run began with a file that it may have written out of its order.
    pub fn begun(&self, path: &RelPath) -> Option<u64> {
        self.begun.as_ref()?.get(path).copied()
    }

    /// Whether a file with this size and time was being staged.
    pub fn lists(&self, path: &RelPath, size: u64, mtime: Timestamp) -> bool {
        self.files.get(path) == Some(&(size, mtime))
    }

    /// How many bytes of a file with this size and time lie in `staging` already; 0 when it must start anew.
    pub fn resume_at(&self, staging: &Root, path: &RelPath, size: u64, mtime: Timestamp) -> u64 {
        if !self.lists(path, size, mtime) {
            return 0;
        }
        let staged = RelPath::new([TREE.as_bytes(), b"/", path.as_bytes()].concat());
        let found = staged.ok().and_then(|staged| staging.stat(&staged, Follow::Never).ok());
        found
            .filter(|found| found.kind == FileKind::Regular && found.links == 1 && found.size <= size)
            .map_or(0, |found| found.size)
    }

    /// The bytes that are stored.
    pub fn encode(&self) -> Vec<u8> {
        let Some(begun) = &self.begun else { return self.files().flat_map(record).collect() };
        let mut bytes = vec![0; FIXED_BYTES];
        for file in self.files() {
            let begun = begun.get(file.0).copied().unwrap_or(0);
            bytes.extend_from_slice(&record(file));
            bytes.extend_from_slice(&begun.to_be_bytes());
        }
        bytes
    }

    fn files(&self) -> impl Iterator<Item = Listed<'_>> {
        self.files.iter().map(|(path, (size, mtime))| (path, *size, *mtime))
    }

    /// Reads what [`Journal::encode`] wrote. One that is damaged is empty: then everything starts anew.
    pub fn decode(bytes: &[u8]) -> Journal {
        parse(bytes).unwrap_or_default()
    }

    /// Writes it to `staging` on stable storage, in place of the one before.
    ///
    /// # Errors
    /// When it cannot be written; the one before is then still there.
    pub fn store(&self, staging: &Root) -> Result<(), StageError> {
        Journal::store_list(staging, self.files())
    }

    /// Writes one of these files, which need not be in memory together. None may come twice.
    ///
    /// # Errors
    /// As [`Journal::store`].
    pub fn store_list<'a>(staging: &Root, files: impl IntoIterator<Item = Listed<'a>>) -> Result<(), StageError> {
        let failed = |source| StageError::Io { operation: "write the list of staged files", source };
        let (Ok(name), Ok(new)) = (RelPath::new(JOURNAL), RelPath::new(NEW_JOURNAL)) else { return Ok(()) };
        staging.remove_tree(&new)?;
        let mut file = BufWriter::new(staging.create_new(&new, 0o600)?);
        files.into_iter().try_for_each(|listed| file.write_all(&record(listed))).map_err(failed)?;
        file.flush().and_then(|()| file.get_ref().sync_data()).map_err(failed)?;
        staging.rename(&new, &name, RenameFlags::empty())?;
        Ok(staging.sync_dir(None)?)
    }

    /// Reads it from `staging`. One that is absent or damaged is empty: then everything starts anew.
    ///
    /// # Errors
    /// When it is there but cannot be read.
    pub fn load(staging: &Root) -> Result<Journal, StageError> {
        let Ok(name) = RelPath::new(JOURNAL) else { return Ok(Journal::default()) };
        let mut bytes = Vec::new();
        match staging.open_read(&name, Follow::Never) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Journal::default()),
            Err(error) => return Err(error.into()),
            Ok(mut file) => file
                .read_to_end(&mut bytes)
                .map_err(|source| StageError::Io { operation: "read the list of staged files", source })?,
        };
        Ok(Journal::decode(&bytes))
    }
}

fn record((path, size, mtime): Listed<'_>) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(FIXED_BYTES + path.as_bytes().len());
    // A RelPath has at most 4095 bytes.
    bytes.extend_from_slice(&(path.as_bytes().len() as u16).to_be_bytes());
    bytes.extend_from_slice(&size.to_be_bytes());
    bytes.extend_from_slice(&mtime.seconds.to_be_bytes());
    bytes.extend_from_slice(&mtime.nanoseconds.to_be_bytes());
    bytes.extend_from_slice(path.as_bytes());
    bytes
}

fn parse(mut bytes: &[u8]) -> Option<Journal> {
    let mut journal = Journal::default();
    // Who does not know what that says takes it for damage, and starts anew.
    if let Some(rest) = bytes.strip_prefix(&[0; FIXED_BYTES]) {
        (journal.begun, bytes) = (Some(HashMap::new()), rest);
    }
    while !bytes.is_empty() {
        let (fixed, rest) = bytes.split_at_checked(FIXED_BYTES)?;
        let length = u16::from_be_bytes(fixed[..2].try_into().ok()?);
        let size = u64::from_be_bytes(fixed[2..10].try_into().ok()?);
        let seconds = i64::from_be_bytes(fixed[10..18].try_into().ok()?);
        let nanoseconds = u32::from_be_bytes(fixed[18..22].try_into().ok()?);
        let (path, mut rest) = rest.split_at_checked(length.into())?;
        let path = RelPath::new(path).ok()?;
        if let Some(begun) = &mut journal.begun {
            let (at, after) = rest.split_at_checked(8)?;
            begun.insert(path.clone(), u64::from_be_bytes(at.try_into().ok()?));
            rest = after;
        }
        journal.files.insert(path, (size, Timestamp { seconds, nanoseconds }));
        bytes = rest;
    }
    Some(journal)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn h34_only_the_same_file_is_gone_on_with_and_a_damaged_list_starts_anew() {
        let at = tempfile::tempdir().unwrap();
        let root = Root::open(at.path()).unwrap();
        let (path, time) = (RelPath::new(b"d/\xff").unwrap(), Timestamp { seconds: -3, nanoseconds: 5 });
        assert_eq!(Journal::load(&root).unwrap(), Journal::default());
        let journal = Journal::new([(path.clone(), 100, time)]);
        journal.store(&root).unwrap();
        journal.store(&root).unwrap();
        let loaded = Journal::load(&root).unwrap();
        assert_eq!(loaded, journal);
        assert_eq!(loaded.resume_at(&root, &path, 100, time), 0);
        let staged = RelPath::new(b"tree/d/\xff").unwrap();
        root.mkdir_all(&staged.parent().unwrap(), 0o700).unwrap();
        root.create_new(&staged, 0o600).unwrap().set_len(40).unwrap();
        assert_eq!(loaded.resume_at(&root, &path, 100, time), 40);
        assert_eq!(loaded.resume_at(&root, &path, 101, time), 0);
        assert_eq!(loaded.resume_at(&root, &path, 100, Timestamp::default()), 0);
        assert_eq!(Journal::decode(&journal.encode()).begun(&path), None);
        let spread = Journal::spread(vec![((path.clone(), 100, time), 1 << 40)]);
        let (bytes, other) = (spread.encode(), RelPath::new("other").unwrap());
        assert_eq!(Journal::decode(&bytes), spread);
        assert!(
            spread.lists(&path, 100, time) && spread.begun(&path) == Some(1 << 40) && spread.begun(&other).is_none()
        );
        assert_eq!(Journal::decode(&bytes[..bytes.len() - 1]), Journal::default());
        let bytes = std::fs::read(at.path().join(JOURNAL)).unwrap();
        std::fs::write(at.path().join(JOURNAL), &bytes[..bytes.len() - 1]).unwrap();
        assert_eq!(Journal::load(&root).unwrap(), Journal::default());
    }
}
