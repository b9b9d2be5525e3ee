//! Content by a command at the other end, where the account has one: large files by dd(1), many small ones in an archive
//! by tar(1). It spares a stock server its requests, of which a small file takes four, and the waiting for each.
//!
//! What always holds: pieces are announced with their length when all of their bytes are here, so that a piece is never
//! left unfinished; jobs are answered in the order in which they were given. What the command wrote proves nothing:
//! every file is hashed where it lies before it counts.
//!
//! RACE: a command outlives its connection by what it has still to write, a few hundred KiB at most. A run that begins at
//! once may find a file growing; the digest of the whole decides there too.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;

use bytes::Bytes;

use super::Lanes;
use super::shell::Shell;
use crate::endpoint::Block;
use crate::wire::tar;

/// Bytes of one file that are written by one dd(1).
const PIECE_BYTES: usize = 16 << 20;
/// Bytes of an archive that one dd(1) passes on.
const PACK_PIECE_BYTES: usize = 4 << 20;
/// What they are gathered in: buffers of a size that the allocator keeps for the next.
const PACK_BUFFER_BYTES: usize = 256 << 10;
/// What one archive holds, at most: its files are proven when all of it is unpacked.
const PACK_FILES: usize = 4096;
const PACK_BYTES: u64 = 64 << 20;

/// What the command has done.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Done {
    /// The file with this number is written up to this offset.
    Reached(u64, u64),
    /// The file with this number is written.
    Written(u64),
    /// These files are unpacked, or some of them are not: their digests tell.
    Unpacked(Vec<u64>),
}

/// A file that is being written by pieces.
struct Writing {
    number: u64,
    /// Where the held blocks belong, and they.
    at: u64,
    held: Vec<Block>,
    held_bytes: usize,
}

/// An archive that is being sent.
#[derive(Default)]
struct Pack {
    files: Vec<u64>,
    bytes: u64,
    /// What is next to be sent, and its length.
    held: Vec<Bytes>,
    held_bytes: usize,
    /// Goes behind it.
    tail: Vec<u8>,
}

impl Pack {
    /// Puts the tail behind what is held.
    fn close_tail(&mut self) {
        let full = std::mem::take(&mut self.tail);
        self.held_bytes += full.len();
        self.held.push(full.into());
    }
}

/// One that is being started.
pub(super) type Starting = JoinHandle<Result<Bulk, String>>;

/// The command of one writer.
pub(super) struct Bulk {
    shell: Shell,
    lanes: Arc<Lanes>,
    staging: Vec<u8>,
    writing: Option<Writing>,
    pack: Option<Pack>,
    /// What the next answers will say.
    due: VecDeque<Done>,
}

impl Bulk {
    /// Tries on nothing whether a shell can do what will be asked of it.
    ///
    /// # Errors
    /// Why it cannot.
    pub(super) fn start(shell: Shell, lanes: &Arc<Lanes>, staging: &[u8]) -> Result<Bulk, String> {
        if !shell.takes_content() {
            return Err("it lacks one of dd, tar and sync".into());
        }
        let mut bulk = Bulk {
            shell,
            lanes: Arc::clone(lanes),
            staging: staging.to_vec(),
            writing: None,
            pack: None,
            due: VecDeque::new(),
        };
        bulk.send_name("more", b"/dev/null")?;
        bulk.send(Bytes::from_static(b"0 1\nx0 0\n"))?;
        bulk.pack = Some(bulk.open_pack()?);
        bulk.flush()?;
        bulk.due.clear();
        let written = (bulk.shell.tried()?, bulk.shell.tried()?);
        let unpacked = bulk.shell.tried()?;
        match (written.0.as_str(), written.1.as_str(), unpacked.as_str()) {
            ("0", "0", "0") => Ok(bulk),
            _ => Err("its dd or tar cannot do what is asked of it".into()),
        }
    }

    /// Whether a file is being written: others have to wait, or to go another way.
    pub(super) fn is_writing(&self) -> bool {
        self.writing.is_some()
    }

    /// Whether answers are due, or will be once [`Bulk::flush`] was called.
    pub(super) fn is_busy(&self) -> bool {
        !self.due.is_empty() || self.pack.is_some()
    }

    /// Begins a file, new or from an offset of one that is there.
    ///
    /// # Errors
    /// When the command has ended, here and below.
    pub(super) fn begin(&mut self, number: u64, path: &[u8], from: u64) -> Result<(), String> {
        self.write_to(number, path, from, if from == 0 { "new" } else { "more" })
    }

    /// Begins parts of a file that is there and that others write to as well.
    ///
    /// # Errors
    /// As [`Bulk::begin`].
    pub(super) fn join(&mut self, number: u64, path: &[u8], from: u64) -> Result<(), String> {
        self.write_to(number, path, from, "more")
    }

    fn write_to(&mut self, number: u64, path: &[u8], from: u64, job: &str) -> Result<(), String> {
        self.flush()?;
        self.send_name(job, path)?;
        self.writing = Some(Writing { number, at: from, held: Vec::new(), held_bytes: 0 });
        Ok(())
    }

    /// Bytes of the file that is being written; they need not follow on the last ones.
    ///
    /// # Errors
    /// As [`Bulk::begin`].
    pub(super) fn write(&mut self, offset: u64, block: Block) -> Result<(), String> {
        let Some(writing) = &mut self.writing else { return Err("no file was begun".into()) };
        if offset != writing.at + writing.held_bytes as u64 {
            self.send_held()?;
        }
        let Some(writing) = &mut self.writing else { return Ok(()) };
        if writing.held.is_empty() {
            writing.at = offset;
        }
        writing.held_bytes += block.data().len();
        writing.held.push(block);
        if writing.held_bytes >= PIECE_BYTES { self.send_held() } else { Ok(()) }
    }

    /// Ends the file, whether or not all of it was given.
    ///
    /// # Errors
    /// As [`Bulk::begin`].
    pub(super) fn end(&mut self) -> Result<(), String> {
        self.send_held()?;
        if let Some(writing) = self.writing.take() {
            self.send(Bytes::from_static(b"0 0\n"))?;
            self.due.push_back(Done::Written(writing.number));
        }
        Ok(())
    }

    /// Adds a whole file to the archive; `name` is below the staging area.
    ///
    /// # Errors
    /// As [`Bulk::begin`].
    pub(super) fn pack(&mut self, number: u64, name: &[u8], modified: i64, blocks: &[Block]) -> Result<(), String> {
        let mut pack = match self.pack.take() {
            Some(pack) => pack,
            None => self.open_pack()?,
        };
        let size = blocks.iter().map(|block| block.data().len() as u64).sum();
        if pack.tail.capacity() == 0 {
            pack.tail.reserve_exact(PACK_BUFFER_BYTES);
        }
        tar::header(&mut pack.tail, name, size, modified);
        for block in blocks {
            pack.tail.extend_from_slice(block.data());
        }
        tar::pad(&mut pack.tail, size);
        pack.files.push(number);
        pack.bytes += size;
        let full = pack.files.len() >= PACK_FILES || pack.bytes >= PACK_BYTES;
        // The next is small, mostly: what is full to three quarters goes.
        if pack.tail.len() >= PACK_BUFFER_BYTES / 4 * 3 {
            pack.close_tail();
        }
        if pack.held_bytes >= PACK_PIECE_BYTES {
            self.send_pack(&mut pack)?;
        }
        self.pack = Some(pack);
        if full { self.flush() } else { Ok(()) }
    }

    /// What was done; with `wait`, at least one thing when any is due.
    ///
    /// # Errors
    /// When the command has ended.
    pub(super) fn done(&mut self, wait: bool) -> Result<Option<Done>, String> {
        if self.due.is_empty() {
            return Ok(None);
        }
        let status = if wait { Some(self.shell.status()?) } else { self.shell.try_status()? };
        Ok(status.and_then(|_| self.due.pop_front()))
    }

    fn send(&self, bytes: Bytes) -> Result<(), String> {
        self.lanes.given.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        self.shell.send(bytes)
    }

    fn send_name(&self, job: &str, path: &[u8]) -> Result<(), String> {
        self.send([format!("{job} {}\n", path.len()).as_bytes(), path].concat().into())
    }

    /// Sends what it holds of the file that is being written.
    ///
    /// # Errors
    /// As [`Bulk::begin`].
    pub(super) fn send_held(&mut self) -> Result<(), String> {
        let Some(writing) = self.writing.as_mut().filter(|writing| writing.held_bytes > 0) else { return Ok(()) };
        let (at, length) = (writing.at, writing.held_bytes);
        writing.at += length as u64;
        writing.held_bytes = 0;
        let (number, held) = (writing.number, std::mem::take(&mut writing.held));
        self.send(format!("{at} {length}\n").into_bytes().into())?;
        for block in held {
            let (buffer, start) = block.headed(&[]);
            self.send(Bytes::from(buffer).slice(start..))?;
        }
        self.due.push_back(Done::Reached(number, at + length as u64));
        Ok(())
    }

    fn open_pack(&self) -> Result<Pack, String> {
        self.send_name("tar", &self.staging)?;
        Ok(Pack::default())
    }

    fn send_pack(&self, pack: &mut Pack) -> Result<(), String> {
        self.send(format!("{}\n", pack.held_bytes).into_bytes().into())?;
        pack.held_bytes = 0;
        std::mem::take(&mut pack.held).into_iter().try_for_each(|bytes| self.send(bytes))
    }

    /// Ends the archive, which waits for nothing but more files.
    ///
    /// # Errors
    /// As [`Bulk::begin`].
    pub(super) fn flush(&mut self) -> Result<(), String> {
        let Some(mut pack) = self.pack.take() else { return Ok(()) };
        tar::end(&mut pack.tail);
        pack.close_tail();
        self.send_pack(&mut pack)?;
        self.send(Bytes::from_static(b"0\n"))?;
        self.due.push_back(Done::Unpacked(pack.files));
        Ok(())
    }
}
