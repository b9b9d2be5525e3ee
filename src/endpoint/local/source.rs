//! A tree on this machine as a source: scanned, then read in one pass over each byte.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::fs::{Advice, SeekFrom as Sparse};
use sha2::{Digest as _, Sha256};

use super::place::Place;
use crate::endpoint::{
    BEING_PUBLISHED, BLOCK_BYTES, Block, Error, Fetch, Links, Produced, Reader, SMALL_FILE_BYTES, Scan, ScanOptions,
    Source,
};
use crate::filter::Filter;
use crate::manifest::{Content, Digest, Entry, Tree};
use crate::monitor::cpu::{Stage, spend};
use crate::monitor::{Event, Monitor};
use crate::path::RelPath;
use crate::plan::trail::Stop;
use crate::root::{FileKind, Follow, Metadata, Root};
use crate::scan::cache::DigestCache;
use crate::scan::{self, LinkRule, ScanRule};
use crate::staging;

/// How many bytes of zeros are hashed at a time for a hole.
const ZEROS: &[u8] = &[0; 64 * 1024];

/// A directory of this machine as a source. Nothing is ever written to it.
#[derive(Debug)]
pub struct LocalSource {
    root: Root,
    /// How whoever asks for it calls it.
    called: PathBuf,
    /// Where digests are kept between runs.
    cache_file: Option<PathBuf>,
    scanned: Mutex<Arc<Looked>>,
}

/// What stat said of each entry of a scan, and when that was over.
#[derive(Debug)]
pub(in crate::endpoint) struct Looked {
    pub(in crate::endpoint) metadata: Vec<Metadata>,
    pub(in crate::endpoint) at: SystemTime,
}

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
        let scanned = Mutex::new(Arc::new(Looked { metadata: Vec::new(), at: UNIX_EPOCH }));
        Ok(LocalSource { root, called: place.called(), cache_file, scanned })
    }
}

impl LocalSource {
    /// Digests of what runs have brought here: it was hashed when it arrived, and is not what it was if its inode changed since.
    fn known_as_target(&self, scanned: &mut scan::Scanned) {
        let is_unknown = |entry: &Entry| matches!(entry.content, Content::File { digest: None, .. });
        if !scanned.tree.entries().iter().any(is_unknown) || !staging::is_believed(&self.root) {
            return;
        }
        let table = super::recall::table(&self.root);
        for (index, metadata) in scanned.metadata.iter().enumerate() {
            if is_unknown(&scanned.tree.entries()[index])
                && let Some(digest) = table.get(metadata)
            {
                scanned.tree.set_digest(index, digest);
            }
        }
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
        let filter = Filter::compile(&options.filter).map_err(|error| Error::Usage(crate::error::chain(&error)))?;
        let links = match options.links {
            Links::Safe => LinkRule::Safe,
            Links::All => LinkRule::All,
            Links::Skip => LinkRule::Skip,
            Links::Refuse => LinkRule::Refuse,
        };
        let rule = ScanRule { filter, links, ignore_files: true, report_special: true, threads: options.threads };
        let before = staging::standing(&self.root);
        let mut scanned = scan::scan(&self.root, &rule, monitor).map_err(|error| match error {
            scan::ScanError::Root(error) => failed(error),
            scan::ScanError::Changed(_) => Error::Refused { by: self.describe(), reason: crate::error::chain(&error) },
        })?;
        if options.whole
            && (matches!(before, staging::Standing::Publishing(_)) || staging::standing(&self.root) != before)
        {
            return Err(Error::Refused { by: self.describe(), reason: BEING_PUBLISHED.to_owned() });
        }
        if let Some(file) = self.cache_file.as_deref().filter(|_| !options.hash_all) {
            let cache = DigestCache::load_for(file, &scanned.metadata);
            scanned.know(cache.table());
            monitor.event(Event::Detail(&format!(
                "{}: SHA-256 known from earlier runs: {}",
                self.describe(),
                cache.len()
            )));
        }
        if !options.hash_all {
            self.known_as_target(&mut scanned);
        }
        self.believe(Arc::new(Looked { metadata: scanned.metadata, at: SystemTime::now() }));
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

    fn remember(&self, _: &Tree, digests: &[(u32, Digest)]) {
        let (known, looked) = self.seen(digests);
        self.keep(&known, looked.at);
    }
}

impl LocalSource {
    pub(in crate::endpoint) fn reads(&self, tree: Arc<Tree>) -> LocalReader<'_> {
        LocalReader { source: self, tree, waiting: VecDeque::new(), current: None }
    }

    /// Which directory it is: device and inode.
    pub(in crate::endpoint) fn root_identity(&self) -> Option<(u64, u64)> {
        self.root.stat_root().ok().map(|root| (root.device, root.inode))
    }

    /// What the last scan looked at.
    pub(in crate::endpoint) fn looked(&self) -> Arc<Looked> {
        Arc::clone(&self.scanned.lock().unwrap_or_else(std::sync::PoisonError::into_inner))
    }

    /// Takes a scan for its own.
    pub(in crate::endpoint) fn believe(&self, looked: Arc<Looked>) {
        *self.scanned.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = looked;
    }

    /// Digests of entries of the last scan, with what stat said of each.
    pub(in crate::endpoint) fn seen(&self, digests: &[(u32, Digest)]) -> (Vec<(Metadata, Digest)>, Arc<Looked>) {
        let looked = self.looked();
        let seen = |&(index, digest): &(u32, Digest)| Some((*looked.metadata.get(index as usize)?, digest));
        (digests.iter().filter_map(seen).collect(), looked)
    }

    /// Keeps digests for later runs; true where that was done.
    pub(in crate::endpoint) fn keep(&self, known: &[(Metadata, Digest)], looked: SystemTime) -> bool {
        let Some(file) = &self.cache_file else { return false };
        // A cache that cannot be written makes the next run slower, not wrong.
        DigestCache::unread(file).store(known, looked).is_ok()
    }

    /// Opens a regular file of the tree, as long as it is what was scanned.
    pub(in crate::endpoint) fn open(&self, tree: &Tree, index: u32) -> Result<Opened, Produced> {
        let missing = || Produced::Failed { index, message: "is not a regular file of the tree".into(), retry: false };
        let entry = tree.entries().get(index as usize).ok_or_else(missing)?;
        let Content::File { size, .. } = entry.content else { return Err(missing()) };
        let file = self.root.open_read(&entry.path, Follow::Never).map_err(|error| unreadable(index, &error))?;
        let before = Metadata::of(&file).map_err(|error| unreadable(index, &error))?;
        // RACE: the path may have got another file, even a FIFO, since the scan; that file is not what was planned.
        if !is_as_scanned(entry, size, &before) {
            return Err(changed(index));
        }
        Ok(Opened { file, sparse: before.allocated < before.size, before })
    }
}

/// A file of the source that is open, and what stat said of it then.
pub(in crate::endpoint) struct Opened {
    file: File,
    pub(in crate::endpoint) before: Metadata,
    sparse: bool,
}

/// A piece of a file.
#[derive(Debug)]
pub(in crate::endpoint) enum Piece {
    Data(Block),
    /// So many zeros, which are not stored.
    Hole(u64),
}

impl Piece {
    pub(in crate::endpoint) fn length(&self) -> u64 {
        match self {
            Piece::Data(block) => block.data().len() as u64,
            Piece::Hole(length) => *length,
        }
    }

    /// The same once more, not copied.
    pub(in crate::endpoint) fn share(&mut self) -> Piece {
        match self {
            Piece::Data(block) => Piece::Data(block.share()),
            Piece::Hole(length) => Piece::Hole(*length),
        }
    }

    pub(in crate::endpoint) fn hash(&self, hash: &mut Sha256) {
        spend(Stage::Hash, || match self {
            Piece::Data(block) => hash.update(block.data()),
            Piece::Hole(length) => {
                let mut left = *length;
                while left > 0 {
                    let part = left.min(ZEROS.len() as u64);
                    hash.update(&ZEROS[..part as usize]);
                    left -= part;
                }
            }
        });
    }

    pub(in crate::endpoint) fn at(self, index: u32, offset: u64) -> Produced {
        match self {
            Piece::Data(block) => Produced::Data { index, offset, block },
            Piece::Hole(length) => Produced::Hole { index, offset, length },
        }
    }
}

/// Reads one file after the other.
pub(in crate::endpoint) struct LocalReader<'a> {
    source: &'a LocalSource,
    tree: Arc<Tree>,
    waiting: VecDeque<Fetch>,
    current: Option<Open>,
}

/// A large file that is being read.
struct Open {
    fetch: Fetch,
    opened: Opened,
    hash: Sha256,
    offset: u64,
}

impl Reader for LocalReader<'_> {
    fn wants_more(&self) -> bool {
        self.waiting.is_empty() && self.current.is_none()
    }

    fn push(&mut self, fetch: Fetch) {
        self.waiting.push_back(fetch);
    }

    fn next(&mut self) -> Result<Option<Produced>, Error> {
        if let Some(mut open) = self.current.take() {
            return Ok(Some(match open.next() {
                Ok(produced) => {
                    if !matches!(produced, Produced::End { .. } | Produced::Failed { .. }) {
                        self.current = Some(open);
                    }
                    produced
                }
                Err(error) => unreadable(open.fetch.index, &error),
            }));
        }
        let Some(fetch) = self.waiting.pop_front() else { return Ok(None) };
        Ok(Some(self.start(fetch).unwrap_or_else(|failure| failure)))
    }
}

pub(in crate::endpoint) fn unreadable(index: u32, error: &dyn std::error::Error) -> Produced {
    Produced::Failed { index, message: crate::error::chain(error), retry: false }
}

pub(in crate::endpoint) fn changed(index: u32) -> Produced {
    let message = "changed while it was read; push again when its writer has finished".to_owned();
    Produced::Failed { index, message, retry: true }
}

impl LocalReader<'_> {
    /// Opens a file and produces its first piece.
    fn start(&mut self, fetch: Fetch) -> Result<Produced, Produced> {
        let index = fetch.index;
        let mut opened = self.source.open(&self.tree, index)?;
        if opened.before.size <= SMALL_FILE_BYTES && fetch.from == 0 {
            return whole(fetch, &mut opened).map_err(|error| unreadable(index, &error));
        }
        opened.is_read_on();
        if let Some(expected) = fetch.unless {
            let digest = hash_to(&mut opened.file, u64::MAX).map_err(|error| unreadable(index, &error))?.finalize();
            if digest[..] == expected.0 {
                let same = opened.is_unchanged().map_err(|error| unreadable(index, &error))?;
                return if same { Ok(Produced::Same { index, digest: expected }) } else { Err(changed(index)) };
            }
            opened.file.rewind().map_err(|error| unreadable(index, &error))?;
        }
        let hash = hash_to(&mut opened.file, fetch.from).map_err(|error| unreadable(index, &error))?;
        let mut open = Open { fetch, opened, hash, offset: fetch.from };
        let produced = open.next().map_err(|error| unreadable(index, &error))?;
        if !matches!(produced, Produced::End { .. } | Produced::Failed { .. }) {
            self.current = Some(open);
        }
        Ok(produced)
    }
}

fn is_as_scanned(entry: &Entry, size: u64, now: &Metadata) -> bool {
    now.kind == FileKind::Regular && now.size == size && now.mtime == entry.mtime
}

/// A small file in one read.
fn whole(fetch: Fetch, opened: &mut Opened) -> io::Result<Produced> {
    let index = fetch.index;
    let Some(block) = opened.whole()? else { return Ok(changed(index)) };
    Ok(produced_whole(fetch, hashed(&block), block))
}

/// The digest of a whole file.
pub(in crate::endpoint) fn hashed(block: &Block) -> Digest {
    Digest(spend(Stage::Hash, || Sha256::digest(block.data())).into())
}

/// A small file, unless the target has it.
pub(in crate::endpoint) fn produced_whole(fetch: Fetch, digest: Digest, block: Block) -> Produced {
    let index = fetch.index;
    if fetch.unless == Some(digest) {
        Produced::Same { index, digest }
    } else {
        Produced::Whole { index, block, digest }
    }
}

/// Hashes from where `file` stands to `end`, or to its end where that comes first.
fn hash_to(file: &mut File, end: u64) -> io::Result<Sha256> {
    let mut hash = Sha256::new();
    if end == 0 {
        return Ok(hash);
    }
    let mut buffer = vec![0; BLOCK_BYTES];
    let mut left = end;
    while left > 0 {
        let wanted = buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        match spend(Stage::Read, || file.read(&mut buffer[..wanted])) {
            Ok(0) => break,
            Ok(read) => {
                spend(Stage::Hash, || hash.update(&buffer[..read]));
                left -= read as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(hash)
}

impl Open {
    fn next(&mut self) -> io::Result<Produced> {
        let (index, offset) = (self.fetch.index, self.offset);
        if offset >= self.opened.before.size {
            return self.end();
        }
        let Some(piece) = self.opened.piece(offset, u64::MAX)? else { return Ok(changed(index)) };
        piece.hash(&mut self.hash);
        self.offset += piece.length();
        Ok(piece.at(index, offset))
    }

    fn end(&mut self) -> io::Result<Produced> {
        let index = self.fetch.index;
        if !self.opened.is_unchanged()? {
            return Ok(changed(index));
        }
        let digest = Digest(std::mem::take(&mut self.hash).finalize().into());
        Ok(Produced::End { index, digest })
    }
}

impl Opened {
    /// It will be read from one end to the other.
    pub(in crate::endpoint) fn is_read_on(&self) {
        let _ = rustix::fs::fadvise(&self.file, 0, None, Advice::Sequential);
    }

    /// Whether it is still what it was when it was opened.
    pub(in crate::endpoint) fn is_unchanged(&self) -> io::Result<bool> {
        Ok(Metadata::of(&self.file)?.same_content(&self.before))
    }

    /// All of a small file; `None` where it changed.
    pub(in crate::endpoint) fn whole(&mut self) -> io::Result<Option<Block>> {
        spend(Stage::Read, || {
            let size = self.before.size;
            let mut block = Block::with_capacity(size as usize + 1);
            // One byte more than the size shows whether the file has grown.
            let read = (&mut self.file).take(size + 1).read_to_end(block.buffer_mut())? as u64;
            Ok((read == size && self.is_unchanged()?).then_some(block))
        })
    }

    /// What is at `offset`, at most `most` bytes of it, which are at least one; `None` where the file is shorter than it was.
    pub(in crate::endpoint) fn piece(&mut self, offset: u64, most: u64) -> io::Result<Option<Piece>> {
        spend(Stage::Read, || {
            if self.sparse
                && let Some(length) = self.hole(offset)?
            {
                return Ok(Some(Piece::Hole(length.min(most))));
            }
            let wanted = (self.before.size - offset).min(BLOCK_BYTES as u64).min(most);
            let mut block = Block::with_capacity(wanted as usize);
            self.file.seek(SeekFrom::Start(offset))?;
            let read = (&mut self.file).take(wanted).read_to_end(block.buffer_mut())? as u64;
            // Shorter than it was: cut off while it was read.
            Ok((read == wanted).then_some(Piece::Data(block)))
        })
    }

    /// The length of the hole at `offset`, when there is one worth leaving.
    fn hole(&mut self, offset: u64) -> io::Result<Option<u64>> {
        let data = match rustix::fs::seek(&self.file, Sparse::Data(offset)) {
            Ok(data) => data.min(self.before.size),
            // Nothing but a hole up to the end.
            Err(rustix::io::Errno::NXIO) => self.before.size,
            Err(_) => {
                self.sparse = false;
                offset
            }
        };
        // At most 1 GiB at once, so that progress and cancelling stay alive while zeros are hashed.
        Ok((data > offset).then(|| (data - offset).min(1 << 30)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::monitor::Silent;
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
                let pieces = read(&source, &tree, Fetch { index: 0, from, unless: None });
                let (content, digest) = put_together(&pieces, from);
                assert_eq!(digest, Some(sha256(&data)), "{size} from {from}");
                assert!(content == data[from as usize..], "{size} from {from}");
            }
            let pieces = read(&source, &tree, Fetch { index: 0, from: 0, unless: Some(sha256(&data)) });
            assert!(matches!(pieces[..], [Produced::Same { .. }]), "{size}");
            let pieces = read(&source, &tree, Fetch { index: 0, from: 0, unless: Some(sha256(b"other")) });
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
        let pieces = read(&source, &tree, Fetch { index: 0, from: 0, unless: None });
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
        assert!(failed(read(&source, &tree, Fetch { index: 0, from: 0, unless: None }).pop()));
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
            reader.push(Fetch { index: 0, from: 0, unless: None });
            assert!(matches!(reader.next().unwrap(), Some(Produced::Data { .. })));
            // The clock of file times ticks every few milliseconds.
            std::thread::sleep(std::time::Duration::from_millis(20));
            edit(&File::options().write(true).open(&path).unwrap());
            let last = std::iter::from_fn(|| reader.next().unwrap()).last();
            assert!(failed(last));
        }
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
