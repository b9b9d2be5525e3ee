//! A tree on this machine as a source: scanned, then read in one pass over each byte.

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use sha2::Sha256;

use super::looked::Looked;
use super::place::Place;
use super::reader::{LocalReader, Opened, changed, is_as_scanned, unreadable};
use crate::endpoint::delta::{Beginning, DELTA_BYTES_MIN};
use crate::endpoint::{BEING_PUBLISHED, Error, Links, Produced, Reader, Scan, ScanOptions, Source};
use crate::filter::{Filter, FilterError, Globs};
use crate::manifest::{Content, Digest, Entry, Tree};
use crate::monitor::{Event, Monitor};
use crate::path::RelPath;
use crate::plan::trail::Stop;
use crate::root::{Fingerprint, Follow, Metadata, Root, Seen};
use crate::scan::cache::{DigestCache, until_settled};
use crate::scan::prefixes::Prefix;
use crate::scan::{self, LinkRule, ScanRule};
use crate::staging::{self, clean_pages, is_young};

/// Who writes through a mapping, which need not show in a file's times, writes files of this size and more: for smaller ones the disk
/// is not waited for.
const MAPPED_BYTES_MIN: u64 = 1 << 20;

/// A directory of this machine as a source. Nothing is ever written to it.
#[derive(Debug)]
pub struct LocalSource {
    root: Root,
    /// How whoever asks for it calls it.
    called: PathBuf,
    /// Where digests are kept between runs.
    cache_file: Option<PathBuf>,
    scanned: Mutex<Arc<Looked>>,
    /// Whoever stores digests: the database is opened by one alone.
    storing: Mutex<()>,
    growing: Growing,
}

/// Of files that only grow: what is gone on after, by their index, and what they held that were read.
#[derive(Debug, Default)]
struct Growing {
    after: Mutex<HashMap<u32, Read>>,
    read: Mutex<Vec<Read>>,
}

/// What a file held, by device and inode.
type Read = ((u64, u64), Prefix);

impl LocalSource {
    /// Opens `root`. Digests are kept in a file of `state_directory`, which is created; `None` keeps none.
    ///
    /// # Errors
    /// When `root` is not a directory that can be opened.
    pub fn new(root: &Path, state_directory: Option<&Path>) -> Result<LocalSource, Error> {
        LocalSource::at(&Place::Named(root.to_owned()), state_directory)
    }

    /// The directory at `path` below `root` (`None` is `root` itself), for a client that may reach nothing else.
    ///
    /// # Errors
    /// As [`LocalSource::new`]; also where `path` leads over a symbolic link.
    pub fn beneath(
        root: Arc<Root>,
        path: Option<RelPath>,
        state_directory: Option<&Path>,
    ) -> Result<LocalSource, Error> {
        LocalSource::at(&Place::Beneath(root, path), state_directory)
    }

    fn at(place: &Place, state_directory: Option<&Path>) -> Result<LocalSource, Error> {
        let root = place.open().map_err(failed)?;
        let cache_file = match state_directory {
            None => None,
            Some(directory) => {
                let at = root.stat_root().map_err(failed)?;
                let made = std::fs::create_dir_all(directory).is_ok();
                made.then(|| directory.join(format!("digests-{:x}-{:x}.redb", at.device, at.inode)))
            }
        };
        let looked = Looked::new(Vec::new(), UNIX_EPOCH, Globs::default());
        let (scanned, storing) = (Mutex::new(Arc::new(looked)), Mutex::default());
        Ok(LocalSource { root, called: place.called(), cache_file, scanned, storing, growing: Growing::default() })
    }
}

impl LocalSource {
    /// Digests of what runs have brought here: it was hashed when it arrived, and is not what it was if its inode changed since.
    fn known_as_target(&self, scanned: &mut scan::Scanned<Seen>) {
        let is_unknown = |entry: &Entry| matches!(entry.content, Content::File { digest: None, .. });
        if !scanned.tree.entries().iter().any(is_unknown) || !staging::is_believed(&self.root) {
            return;
        }
        scanned.know(&super::recall::table(&self.root));
    }
}

fn failed(error: crate::root::RootError) -> Error {
    Error::Io { operation: error.operation, path: crate::error::shown(&error.path).to_string(), source: error.source }
}

impl Source for LocalSource {
    fn describe(&self) -> String {
        crate::error::Escaped(self.root.shown().as_os_str().as_encoded_bytes()).to_string()
    }

    fn scan(&self, options: &ScanOptions, monitor: &dyn Monitor) -> Result<Scan, Error> {
        let wrong = |error: FilterError| Error::Usage(crate::error::chain(&error));
        let filter = Filter::compile(&options.filter).map_err(wrong)?;
        let growing = Globs::compile(&options.append_only).map_err(wrong)?;
        let links = match options.links {
            Links::Safe => LinkRule::Safe,
            Links::All => LinkRule::All,
            Links::Skip => LinkRule::Skip,
            Links::Refuse => LinkRule::Refuse,
        };
        let rule = ScanRule { filter, links, ignore_files: true, report_special: true, threads: options.threads };
        let before = staging::standing(&self.root);
        let mut scanned = scan::scan_seen(&self.root, &rule, monitor).map_err(|error| match error {
            scan::ScanError::Root(error) => failed(error),
            scan::ScanError::Changed(_) => Error::Refused { by: self.describe(), reason: crate::error::chain(&error) },
        })?;
        if options.whole
            && (matches!(before, staging::Standing::Publishing(_)) || staging::standing(&self.root) != before)
        {
            return Err(Error::Refused { by: self.describe(), reason: BEING_PUBLISHED.to_owned() });
        }
        if let Some(file) = self.cache_file.as_deref().filter(|_| !options.hash_all) {
            let cache = DigestCache(file).load_for(&scanned.metadata);
            scanned.know(&cache);
            monitor.event(Event::Detail(&format!(
                "{}: SHA-256 known from earlier runs: {}",
                self.describe(),
                cache.len()
            )));
        }
        if !options.hash_all {
            self.known_as_target(&mut scanned);
        }
        self.believe(Arc::new(Looked::new(scanned.metadata, SystemTime::now(), growing)));
        Ok(Scan { tree: scanned.tree, problems: scanned.problems })
    }

    fn reader(&self, tree: Arc<Tree>) -> Result<Box<dyn Reader + '_>, Error> {
        Ok(Box::new(self.reads(tree)))
    }

    fn trail(&self) -> Result<Vec<Stop>, Error> {
        let mut trail = staging::trail_of(&self.root);
        trail.push(staging::stop_at(self.root.shown(), &self.called));
        Ok(trail)
    }

    fn remember(&self, tree: &Tree, digests: &[(u32, Digest)]) {
        let looked = self.looked();
        self.keep(looked.known(tree, digests), looked.at);
        self.keep_prefixes();
    }

    fn begins_with(&self, tree: &Tree, index: u32, beginning: Beginning) -> bool {
        let known = || {
            let opened = self.open(tree, index).ok().filter(|opened| opened.grows)?;
            let before = &opened.before;
            let cache = DigestCache(self.cache_file.as_deref().filter(|_| beginning.length <= before.size)?);
            let kept = cache.prefixes((before.device, before.inode));
            let prefix = kept.into_iter().find(|prefix| prefix.beginning == beginning)?;
            let ends = prefix.ends_with(&opened.last_before(beginning.length).ok()?);
            ends.then_some(((before.device, before.inode), prefix))
        };
        let Some(known) = known() else { return false };
        lock(&self.growing.after).insert(index, known);
        true
    }
}

fn lock<T>(what: &Mutex<T>) -> MutexGuard<'_, T> {
    what.lock().unwrap_or_else(PoisonError::into_inner)
}

impl LocalSource {
    pub(in crate::endpoint) fn reads(&self, tree: Arc<Tree>) -> LocalReader<'_> {
        LocalReader::new(self, tree)
    }

    /// Which directory it is: device and inode.
    pub(crate) fn root_identity(&self) -> Option<(u64, u64)> {
        self.root.stat_root().ok().map(|root| (root.device, root.inode))
    }

    /// What the last scan looked at.
    pub(in crate::endpoint) fn looked(&self) -> Arc<Looked> {
        Arc::clone(&lock(&self.scanned))
    }

    /// Takes a scan for its own.
    pub(in crate::endpoint) fn believe(&self, looked: Arc<Looked>) {
        *lock(&self.scanned) = looked;
    }

    /// Keeps digests for later runs; true where that was done.
    pub(in crate::endpoint) fn keep(
        &self,
        known: impl IntoIterator<Item = (Fingerprint, Digest)>,
        looked: SystemTime,
    ) -> bool {
        let Some(file) = &self.cache_file else { return false };
        let _turn = lock(&self.storing);
        // A cache that cannot be written makes the next run slower, not wrong.
        DigestCache(file).store(known, looked).is_ok()
    }

    /// The hash of what the file at `index` begins with, where that was found out and the file is still that one.
    pub(super) fn hash_after(&self, index: u32, opened: &Opened, beginning: Beginning) -> Option<Sha256> {
        let (file, prefix) = lock(&self.growing.after).remove(&index)?;
        let same = file == (opened.before.device, opened.before.inode) && prefix.beginning == beginning;
        (same && prefix.ends_with(&opened.last_before(beginning.length).ok()?)).then(|| prefix.hash())?
    }

    /// All of a file that only grows was read.
    pub(super) fn note(&self, opened: &Opened, hash: &Sha256) -> io::Result<()> {
        let Metadata { size, device, inode, .. } = opened.before;
        if size >= DELTA_BYTES_MIN && self.cache_file.is_some() {
            let prefix = Prefix::new(size, hash, &opened.last_before(size)?);
            lock(&self.growing.read).push(((device, inode), prefix));
        }
        Ok(())
    }

    /// Keeps what files held that only grow and were read.
    pub(in crate::endpoint) fn keep_prefixes(&self) {
        let read = std::mem::take(&mut *lock(&self.growing.read));
        if let Some(file) = self.cache_file.as_deref().filter(|_| !read.is_empty()) {
            let _turn = lock(&self.storing);
            let _ = DigestCache(file).store_prefixes(&read);
        }
    }

    /// Opens a regular file of the tree, as long as it is what was scanned.
    pub(in crate::endpoint) fn open(&self, tree: &Tree, index: u32) -> Result<Opened, Produced> {
        let missing = || Produced::Failed { index, message: "is not a regular file of the tree".into(), retry: false };
        let entry = tree.entries().get(index as usize).ok_or_else(missing)?;
        let Content::File { size, .. } = entry.content else { return Err(missing()) };
        let file = self.root.open_read(&entry.path, Follow::Never).map_err(|error| unreadable(index, &error))?;
        let mut now = Metadata::of(&file).map_err(|error| unreadable(index, &error))?;
        let looked = self.looked();
        let grows = looked.growing.mean(&entry.path, false);
        if !is_as_scanned(entry, size, grows, &now) {
            return Err(changed(index));
        }
        if !grows {
            if size >= MAPPED_BYTES_MIN && is_young(&now) && !looked.rules_out_mapping(&file, &now) {
                clean_pages(&file, &now);
            }
            // RACE: what is written within the tick of the clock that the file has its time of would not show.
            let wait = until_settled(&now, SystemTime::now());
            if !wait.is_zero() {
                std::thread::sleep(wait);
                now = Metadata::of(&file).map_err(|error| unreadable(index, &error))?;
            }
        }
        // RACE: the path may have got another file, even a FIFO, since the scan; that file is not what was planned.
        if !is_as_scanned(entry, size, grows, &now) {
            return Err(changed(index));
        }
        looked.opened(index, &now);
        // What has come since is for the next run.
        let before = Metadata { size, mtime: entry.mtime, ..now };
        Ok(Opened { file, sparse: now.allocated < now.size, before, grows })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::endpoint::{BLOCK_BYTES, Fetch, SMALL_FILE_BYTES};
    use crate::monitor::Silent;
    use sha2::Digest as _;
    use std::fs::File;
    use std::io::Write;
    use std::os::unix::fs::FileExt;

    fn scanned(at: &Path) -> (LocalSource, Arc<Tree>) {
        let source = LocalSource::new(at, None).unwrap();
        let scan = source.scan(&ScanOptions::default(), &Silent::default()).unwrap();
        (source, Arc::new(scan.tree))
    }

    fn sha256(data: &[u8]) -> Digest {
        Digest(Sha256::digest(data).into())
    }

    fn read(source: &LocalSource, tree: &Arc<Tree>, fetch: Fetch) -> Vec<Produced> {
        let mut reader = source.reader(Arc::clone(tree)).unwrap();
        reader.push(fetch);
        std::iter::from_fn(|| reader.next().unwrap()).collect()
    }

    /// The content from `from` on that the pieces make, and the digest at their end.
    fn put_together(pieces: &[Produced], from: u64) -> (Vec<u8>, Option<Digest>) {
        let mut content = Vec::new();
        let mut end = None;
        for piece in pieces {
            match piece {
                Produced::Whole { block, digest, .. } => {
                    content.extend_from_slice(block.data());
                    end = Some(*digest);
                }
                Produced::Data { offset, block, .. } => {
                    assert_eq!(*offset, from + content.len() as u64);
                    content.extend_from_slice(block.data());
                }
                Produced::Hole { offset, length, .. } => {
                    assert_eq!(*offset, from + content.len() as u64);
                    content.resize(content.len() + *length as usize, 0);
                }
                Produced::End { digest, .. } => end = Some(*digest),
                other => panic!("{other:?}"),
            }
        }
        (content, end)
    }

    #[test]
    fn files_of_all_sizes_are_read_whole_and_from_the_middle() {
        let directory = tempfile::tempdir().unwrap();
        for size in [0, 1, SMALL_FILE_BYTES, SMALL_FILE_BYTES + 1, 3 * BLOCK_BYTES as u64 + 17] {
            let data: Vec<u8> = (0..size).map(|at| (at * 31 % 251) as u8).collect();
            std::fs::write(directory.path().join("f"), &data).unwrap();
            let (source, tree) = scanned(directory.path());
            for from in [0, size / 2, size] {
                let pieces = read(&source, &tree, Fetch { from, ..Fetch::of(0) });
                let (content, digest) = put_together(&pieces, from);
                assert_eq!(digest, Some(sha256(&data)), "{size} from {from}");
                assert!(content == data[from as usize..], "{size} from {from}");
            }
            let pieces = read(&source, &tree, Fetch { unless: Some(sha256(&data)), ..Fetch::of(0) });
            assert!(matches!(pieces[..], [Produced::Same { .. }]), "{size}");
            let pieces = read(&source, &tree, Fetch { unless: Some(sha256(b"other")), ..Fetch::of(0) });
            assert!(put_together(&pieces, 0).0 == data, "{size}");
        }
    }

    #[test]
    fn holes_are_told_and_hashed_as_zeros() {
        let directory = tempfile::tempdir().unwrap();
        let file = File::create(directory.path().join("f")).unwrap();
        file.set_len(40 << 20).unwrap();
        file.write_all_at(b"data", 20 << 20).unwrap();
        drop(file);
        let (source, tree) = scanned(directory.path());
        let pieces = read(&source, &tree, Fetch::of(0));
        assert!(pieces.iter().any(|piece| matches!(piece, Produced::Hole { .. })));
        let (content, digest) = put_together(&pieces, 0);
        assert!(content == std::fs::read(directory.path().join("f")).unwrap());
        assert_eq!(digest, Some(sha256(&content)));
    }

    #[test]
    fn h36_a_file_that_changes_is_noticed_before_during_and_after() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("f");
        std::fs::write(&path, vec![1; 3 * BLOCK_BYTES]).unwrap();
        let failed = |piece: Option<Produced>| matches!(piece, Some(Produced::Failed { retry: true, .. }));
        // Between the scan and the opening.
        let (source, tree) = scanned(directory.path());
        File::options().append(true).open(&path).unwrap().write_all(b"x").unwrap();
        assert!(failed(read(&source, &tree, Fetch::of(0)).pop()));
        // While it is read: other bytes, fewer bytes, more bytes.
        type Edit = fn(&File);
        let edits: [Edit; 3] = [
            |file| file.write_all_at(b"y", 5).unwrap(),
            |file| file.set_len(BLOCK_BYTES as u64 + 1).unwrap(),
            |file| file.write_all_at(b"z", 4 * BLOCK_BYTES as u64).unwrap(),
        ];
        for edit in edits {
            std::fs::write(&path, vec![1; 3 * BLOCK_BYTES]).unwrap();
            let (source, tree) = scanned(directory.path());
            let mut reader = source.reader(tree).unwrap();
            reader.push(Fetch::of(0));
            assert!(matches!(reader.next().unwrap(), Some(Produced::Data { .. })));
            // The clock of file times ticks every few milliseconds.
            std::thread::sleep(std::time::Duration::from_millis(20));
            edit(&File::options().write(true).open(&path).unwrap());
            let last = std::iter::from_fn(|| reader.next().unwrap()).last();
            assert!(failed(last));
        }
    }

    #[test]
    fn of_a_file_that_only_grows_what_was_read_is_gone_on_after() {
        let (directory, state) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let path = directory.path().join("run.log");
        let options = ScanOptions { append_only: vec!["*.log".into()], ..ScanOptions::default() };
        let scanned = || {
            let source = LocalSource::new(directory.path(), Some(state.path())).unwrap();
            let tree = Arc::new(source.scan(&options, &Silent::default()).unwrap().tree);
            (source, tree)
        };
        let (mut data, mut beginnings) = (Vec::new(), Vec::new());
        for round in 0..3_u64 {
            data.extend((0..2_000_000_u64 + round).map(|at| ((at * at) >> 5) as u8));
            std::fs::write(&path, &data).unwrap();
            let (source, tree) = scanned();
            for &beginning in &beginnings {
                assert!(source.begins_with(&tree, 0, beginning));
                let pieces = read(&source, &tree, Fetch { after: Some(beginning), ..Fetch::of(0) });
                let (rest, digest) = put_together(&pieces, beginning.length);
                assert_eq!((&rest[..], digest), (&data[beginning.length as usize..], Some(sha256(&data))));
            }
            let whole = Beginning { length: data.len() as u64, digest: sha256(&data) };
            assert!(round > 0 || !source.begins_with(&tree, 0, whole));
            read(&source, &tree, Fetch::of(0));
            source.remember(&tree, &[(0, whole.digest)]);
            beginnings.push(whole);
        }
        // Not what has other last bytes, is shorter, or is another file; nor what nobody said anything of.
        let (source, tree) = scanned();
        let begins = |(source, tree): &(LocalSource, Arc<Tree>)| {
            [0, 1, 2].map(|at| source.begins_with(tree, 0, beginnings[at])) == [true; 3]
        };
        assert!(begins(&(source, tree)));
        let plain = LocalSource::new(directory.path(), Some(state.path())).unwrap();
        let tree = Arc::new(plain.scan(&ScanOptions::default(), &Silent::default()).unwrap().tree);
        assert!(!plain.begins_with(&tree, 0, beginnings[0]));
        File::options().write(true).open(&path).unwrap().write_at(b"x", beginnings[1].length - 1000).unwrap();
        let (source, tree) = scanned();
        assert_eq!([0, 1, 2].map(|at| source.begins_with(&tree, 0, beginnings[at])), [true, false, true]);
        File::options().write(true).open(&path).unwrap().set_len(beginnings[0].length + 1).unwrap();
        let (source, tree) = scanned();
        assert_eq!([0, 1, 2].map(|at| source.begins_with(&tree, 0, beginnings[at])), [true, false, false]);
        std::fs::rename(&path, directory.path().join("old")).unwrap();
        std::fs::copy(directory.path().join("old"), &path).unwrap();
        let (source, tree) = scanned();
        assert!((0..2).all(|index| !source.begins_with(&tree, index, beginnings[0])));
    }

    #[test]
    fn what_was_read_says_nothing_of_another_inode_that_was_scanned() {
        let (directory, state) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let at = |path: &str| directory.path().join(path);
        for (version, content) in [("v1", "content"), ("v2", "another")] {
            std::fs::create_dir(at(version)).unwrap();
            let path = at(version).join("f");
            std::fs::write(&path, content).unwrap();
            let file = File::options().write(true).open(path).unwrap();
            file.set_modified(UNIX_EPOCH + std::time::Duration::from_secs(1_000_000_000)).unwrap();
        }
        std::thread::sleep(std::time::Duration::from_millis(50));
        let source = LocalSource::new(directory.path(), Some(state.path())).unwrap();
        let scan = || source.scan(&ScanOptions::default(), &Silent::default()).unwrap();
        let tree = Arc::new(scan().tree);
        let of = |tree: &Tree, path: &str| tree.position(&RelPath::new(path).unwrap()).unwrap();
        std::fs::rename(at("v1"), at("old")).unwrap();
        std::fs::rename(at("v2"), at("v1")).unwrap();
        let index = of(&tree, "v1/f") as u32;
        let produced = read(&source, &tree, Fetch::of(index));
        let (content, digest) = put_together(&produced, 0);
        assert_eq!((content, digest), (b"another".to_vec(), Some(sha256(b"another"))));
        source.remember(&tree, &[(index, digest.unwrap())]);
        let later = scan().tree;
        assert_eq!(later.entries()[of(&later, "old/f")].file(), Some((7, None)));
    }

    #[test]
    fn digests_are_remembered_for_the_next_scan() {
        let (directory, state) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        std::fs::write(directory.path().join("f"), "content").unwrap();
        std::thread::sleep(std::time::Duration::from_millis(50));
        let source = LocalSource::new(directory.path(), Some(state.path())).unwrap();
        let options = ScanOptions::default();
        let first = source.scan(&options, &Silent::default()).unwrap();
        assert_eq!(first.tree.entries()[0].file(), Some((7, None)));
        source.remember(&first.tree, &[(0, sha256(b"content"))]);
        let second = source.scan(&options, &Silent::default()).unwrap();
        assert_eq!(second.tree.entries()[0].file(), Some((7, Some(sha256(b"content")))));
        let hashed_anew = ScanOptions { hash_all: true, ..options };
        assert_eq!(source.scan(&hashed_anew, &Silent::default()).unwrap().tree, first.tree);
    }
}
