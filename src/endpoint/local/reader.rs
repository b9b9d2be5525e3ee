//! Reads the files of a tree on this machine, one after the other, in one pass over each byte.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;

use rustix::fs::{Advice, SeekFrom as Sparse};
use sha2::{Digest as _, Sha256};

use super::source::LocalSource;
use crate::endpoint::guarded::CHANGED;
use crate::endpoint::{BLOCK_BYTES, Block, Error, Fetch, Produced, Reader, SMALL_FILE_BYTES};
use crate::manifest::{Digest, Entry, Tree};
use crate::monitor::cpu::{Stage, spend};
use crate::root::{FileKind, Metadata};
use crate::scan::prefixes::LAST_BYTES;

/// How many bytes of zeros are hashed at a time for a hole.
const ZEROS: &[u8] = &[0; 64 * 1024];

/// A file of the source that is open, and what stat said of it then.
pub(in crate::endpoint) struct Opened {
    pub(super) file: File,
    pub(in crate::endpoint) before: Metadata,
    pub(super) sparse: bool,
    /// What it held when it was opened it holds as long as it is no shorter.
    pub(in crate::endpoint) grows: bool,
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

    /// Makes `last` what everything ends with when this comes after it, at most [`LAST_BYTES`].
    fn end(&self, last: &mut Vec<u8>) {
        let (most, length) = (LAST_BYTES as usize, self.length().min(LAST_BYTES) as usize);
        last.drain(..(last.len() + length).saturating_sub(most).min(last.len()));
        match self {
            Piece::Data(block) => last.extend_from_slice(&block.data()[block.data().len() - length..]),
            Piece::Hole(_) => last.resize(last.len() + length, 0),
        }
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

impl<'a> LocalReader<'a> {
    pub(super) fn new(source: &'a LocalSource, tree: Arc<Tree>) -> LocalReader<'a> {
        LocalReader { source, tree, waiting: VecDeque::new(), current: None }
    }
}

/// A large file that is being read.
struct Open {
    fetch: Fetch,
    opened: Opened,
    hash: Sha256,
    offset: u64,
    /// Of what only grows the end of what was hashed: it has to be there still when all is read.
    last: Vec<u8>,
}

impl Reader for LocalReader<'_> {
    fn wants_more(&self) -> bool {
        self.waiting.is_empty() && self.current.is_none()
    }

    fn push(&mut self, fetch: Fetch) {
        self.waiting.push_back(fetch);
    }

    fn next(&mut self) -> Result<Option<Produced>, Error> {
        if let Some(open) = self.current.take() {
            return Ok(Some(self.go_on(open).unwrap_or_else(|failure| failure)));
        }
        let Some(fetch) = self.waiting.pop_front() else { return Ok(None) };
        Ok(Some(self.start(fetch).unwrap_or_else(|failure| failure)))
    }
}

pub(in crate::endpoint) fn unreadable(index: u32, error: &dyn std::error::Error) -> Produced {
    Produced::Failed { index, message: crate::error::chain(error), retry: false }
}

pub(in crate::endpoint) fn changed(index: u32) -> Produced {
    let message = format!("{CHANGED}; push again when its writer has finished");
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
        if let Some(after) = fetch.after {
            let hash = self.source.hash_after(index, &opened, after).ok_or_else(|| changed(index))?;
            return self.go_on(Open { fetch, opened, hash, offset: after.length, last: Vec::new() });
        }
        if let Some(expected) = fetch.unless {
            let digest =
                hash_to(&mut opened.file, opened.before.size).map_err(|error| unreadable(index, &error))?.finalize();
            if digest[..] == expected.0 {
                let same = opened.is_unchanged().map_err(|error| unreadable(index, &error))?;
                return if same { Ok(Produced::Same { index, digest: expected }) } else { Err(changed(index)) };
            }
            opened.file.rewind().map_err(|error| unreadable(index, &error))?;
        }
        let hash = hash_to(&mut opened.file, fetch.from).map_err(|error| unreadable(index, &error))?;
        self.go_on(Open { fetch, opened, hash, offset: fetch.from, last: Vec::new() })
    }

    /// The next piece of a large file, which is gone on with unless that was its end.
    fn go_on(&mut self, mut open: Open) -> Result<Produced, Produced> {
        let produced = open.next(self.source).map_err(|error| unreadable(open.fetch.index, &error))?;
        if !matches!(produced, Produced::End { .. } | Produced::Failed { .. }) {
            self.current = Some(open);
        }
        Ok(produced)
    }
}

pub(super) fn is_as_scanned(entry: &Entry, size: u64, grows: bool, now: &Metadata) -> bool {
    let same = now.size == size && now.mtime == entry.mtime;
    now.kind == FileKind::Regular && (same || grows && now.size >= size)
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
    fn next(&mut self, source: &LocalSource) -> io::Result<Produced> {
        let (index, offset) = (self.fetch.index, self.offset);
        if offset >= self.opened.before.size {
            return self.end(source);
        }
        let Some(piece) = self.opened.piece(offset, u64::MAX)? else { return Ok(changed(index)) };
        piece.hash(&mut self.hash);
        if self.opened.grows {
            piece.end(&mut self.last);
        }
        self.offset += piece.length();
        Ok(piece.at(index, offset))
    }

    fn end(&mut self, source: &LocalSource) -> io::Result<Produced> {
        let index = self.fetch.index;
        if !self.opened.is_unchanged()? {
            return Ok(changed(index));
        }
        if self.opened.grows {
            // Cut off and written anew meanwhile, it may be as long again.
            if !self.opened.last_before(self.opened.before.size)?.ends_with(&self.last) {
                return Ok(changed(index));
            }
            source.note(&self.opened, &self.hash)?;
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
        let now = Metadata::of(&self.file)?;
        Ok(if self.grows { now.size >= self.before.size } else { now.same_content(&self.before) })
    }

    /// The last bytes before `end`, by which a beginning is known again.
    pub(super) fn last_before(&self, end: u64) -> io::Result<Vec<u8>> {
        let mut last = vec![0; end.min(LAST_BYTES) as usize];
        self.file.read_exact_at(&mut last, end.saturating_sub(LAST_BYTES))?;
        Ok(last)
    }

    /// All of a small file; `None` where it changed.
    pub(in crate::endpoint) fn whole(&mut self) -> io::Result<Option<Block>> {
        spend(Stage::Read, || {
            let size = self.before.size;
            let mut block = Block::with_capacity(size as usize + 1);
            // One byte more than the size shows whether the file has grown.
            let read = (&mut self.file).take(size + u64::from(!self.grows)).read_to_end(block.buffer_mut())? as u64;
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
