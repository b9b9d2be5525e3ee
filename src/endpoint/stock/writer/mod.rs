//! Stages files of one worker thread: many files and many requests in flight.
//!
//! A file goes through: OPEN, WRITEs, CLOSE; its digest is asked for (with those of many others); owner, then mode and
//! times. No step waits for another file. Execute bits and every other permission come after the digest was right.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use crossbeam_channel::{Receiver, Sender, unbounded};

use super::alike::Alike;
use super::bulk::{Bulk, Starting};
use super::follow::Follower;
use super::prove::{Answer, Unproven};
use super::session::{self, Refusal, Reply, Session, about, with_attributes};
use super::target::{Permissions, Run};
use crate::endpoint::client::Completion;
use crate::endpoint::delta::{Beginning, Within};
use crate::endpoint::spread::Spread;
use crate::endpoint::{Block, Error, Staged, WriteFailure, Writer};
use crate::manifest::{Content, Digest, Entry, Tree};
use crate::policy::mode::SPECIAL_BITS;
use crate::wire::sftp::{Attributes, Status, packet};

mod beside;
mod by_command;
mod copies;
mod file;
mod moved;
mod opening;
mod proof;
mod tail;

pub(super) use copies::COPIED_BYTES;
use file::{File, Op, Part, Route, Stage};
use moved::Moving;
use tail::Growing;

/// Files of one writer that are open or waiting to be, at most.
const OPEN_FILES: usize = 256;
/// Bytes that wait for a handle, at most.
const QUEUED: usize = 16 << 20;
/// Digests are asked for when so many files wait for them, or so many bytes.
const PROVE_FILES: usize = 4096;
const PROVE_BYTES: u64 = 64 << 20;

/// The writer of one worker.
pub(super) struct StockWriter {
    run: Arc<Run>,
    source: Arc<Tree>,
    alike: Arc<Alike>,
    /// Its own connection, and further ones for what is large.
    spread: Spread<Session>,
    /// The session over its own.
    session: Arc<Session>,
    /// Large files may be written out of their order.
    spreads: bool,
    sender: Sender<Completion>,
    receiver: Receiver<Completion>,
    sent: HashMap<u64, (u64, Op)>,
    next_tag: u64,
    /// By a number of their own: an index that is sent again is another file.
    files: HashMap<u64, File>,
    /// The file that an index is being written as.
    current: HashMap<u32, u64>,
    next_file: u64,
    open_files: usize,
    queued: usize,
    /// Bytes that are to be copied and are not yet.
    copying: u64,
    unproven: Vec<Unproven>,
    unproven_bytes: u64,
    proofs: (Sender<Answer>, Receiver<Answer>),
    proving: usize,
    /// The command that takes content, once it has started.
    bulk: Option<Bulk>,
    starting: Option<Starting>,
    /// What failed once.
    by_sftp: HashSet<u32>,
    /// What could not be made of what is there.
    whole: HashSet<u32>,
    /// Files that get what is there by its name.
    moving: HashMap<u32, Moving>,
    /// Files of which what is new is staged alone.
    growing: HashMap<u32, Growing>,
    /// Files may.
    moves: bool,
    follower: Option<Follower>,
    /// The file that is hashed at the other end while it is sent, and how far that was told.
    following: Option<(u64, u64)>,
    /// Bring each file to stable storage: there is no command that does it for all.
    sync_each: bool,
    done: Vec<Staged>,
}

fn refused(what: &str, refusal: &Refusal) -> WriteFailure {
    WriteFailure { message: format!("cannot {what}: {refusal}"), retry: false }
}

impl StockWriter {
    /// Over the next connection. May take as long as it takes to log in.
    pub(super) fn new(run: Arc<Run>) -> StockWriter {
        StockWriter::of(run, true)
    }

    /// The same, to have copied what is to be copied, whatever its name.
    pub(super) fn copying_only(run: Arc<Run>) -> StockWriter {
        StockWriter::of(run, false)
    }

    fn of(run: Arc<Run>, moves: bool) -> StockWriter {
        let (sender, receiver) = unbounded();
        let spread = Spread::new(&run.lanes.pool);
        let session = Arc::clone(spread.own());
        let starting = if moves { run.bulk(spread.number(0)) } else { None };
        let spreads = run.state().spreads;
        let source = Arc::clone(&run.state().source);
        let alike = Arc::clone(&run.state().alike);
        let sync_each = session.offers.fsync && !run.syncs;
        StockWriter {
            run,
            source,
            alike,
            spread,
            session,
            spreads,
            sender,
            receiver,
            sent: HashMap::new(),
            next_tag: 0,
            files: HashMap::new(),
            current: HashMap::new(),
            next_file: 0,
            open_files: 0,
            queued: 0,
            copying: 0,
            unproven: Vec::new(),
            unproven_bytes: 0,
            proofs: unbounded(),
            proving: 0,
            bulk: None,
            starting,
            by_sftp: HashSet::new(),
            whole: HashSet::new(),
            moving: HashMap::new(),
            growing: HashMap::new(),
            moves,
            follower: None,
            following: None,
            sync_each,
            done: Vec::new(),
        }
    }

    fn entry(&self, index: u32) -> Result<(&Entry, u64), Error> {
        match self.source.entries().get(index as usize) {
            Some(entry) if let Content::File { size, .. } = entry.content => Ok((entry, size)),
            _ => Err(Error::Refused { by: "the target".into(), reason: format!("entry {index} is no regular file") }),
        }
    }

    fn send(&mut self, number: u64, op: Op, packet: Vec<u8>) -> Result<(), Error> {
        self.send_over(Arc::clone(&self.session), number, op, packet)
    }

    fn send_over(&mut self, session: Arc<Session>, number: u64, op: Op, packet: Vec<u8>) -> Result<(), Error> {
        let tag = self.next_tag;
        self.next_tag += 1;
        self.sent.insert(tag, (number, op));
        if let Some(file) = self.files.get_mut(&number) {
            file.in_flight += 1;
        }
        session.client.submit(packet, 0, tag, &self.sender)
    }

    /// What was sent with this tag is not waited for; of which file it was.
    fn unsend(&mut self, tag: u64) -> Option<u64> {
        let (number, _) = self.sent.remove(&tag)?;
        if let Some(file) = self.files.get_mut(&number) {
            file.in_flight -= 1;
        }
        Some(number)
    }

    /// Takes what answers there are; with `wait` at least one.
    fn pump(&mut self, mut wait: bool) -> Result<(), Error> {
        loop {
            let completion = match self.receiver.try_recv() {
                Ok(completion) => completion,
                Err(_) if wait && !self.sent.is_empty() => self.session.client.wait(&self.receiver, false)?,
                Err(_) => return Ok(()),
            };
            wait = false;
            let tag = completion.tag;
            match self.session.completed(completion) {
                Ok((tag, reply)) => self.settle(tag, reply)?,
                // What a further connection was not needed for.
                Err(_) if matches!(self.sent.get(&tag), Some((_, Op::OpenBeside(_) | Op::CloseBeside))) => {
                    if let Some(number) = self.unsend(tag) {
                        self.step(number)?;
                    }
                }
                // It was not sent.
                Err(_) if !self.sent.contains_key(&tag) => {}
                Err(lost) => return Err(lost),
            }
        }
    }

    fn settle(&mut self, tag: u64, reply: Reply) -> Result<(), Error> {
        let Some((number, op)) = self.sent.remove(&tag) else { return Ok(()) };
        if let Op::Copy(_, length) = op {
            self.copying -= length;
        }
        let Some(file) = self.files.get_mut(&number) else {
            // Discarded meanwhile; a handle that comes now is not left open.
            match (op, reply) {
                (Op::Open | Op::OpenOrigin, Reply::Handle(handle)) => {
                    self.send(number, Op::Clear, about(packet::CLOSE, &handle))?;
                }
                (Op::OpenBeside(over), Reply::Handle(handle)) => self.close_beside(number, over, &handle)?,
                _ => {}
            }
            return Ok(());
        };
        file.in_flight -= 1;
        if let Op::Data(at) | Op::Copy(at, _) = op {
            file.unanswered.remove(&at);
        }
        let index = file.index;
        match (op, reply) {
            (Op::Open, Reply::Handle(handle)) => {
                file.handle = Some(handle);
                self.flush(number)?;
            }
            (Op::Open, Reply::Refused(refusal)) => self.not_opened(number, &refusal)?,
            (Op::OpenBeside(over), Reply::Handle(handle)) => self.opened_beside(number, over, &handle)?,
            // It goes over the others.
            (Op::OpenBeside(_) | Op::CloseBeside, Reply::Refused(_)) | (Op::CloseBeside, Reply::Done) => {}
            (Op::OpenOrigin, Reply::Handle(handle)) => self.origin_opened(number, handle)?,
            (Op::LookAtOrigin, Reply::Attributes(found)) => self.origin_seen(number, &found),
            (Op::OpenOrigin | Op::LookAtOrigin, Reply::Refused(refusal)) => {
                self.no_copy(number, &format!("cannot be opened there: {refusal}"));
                self.close(number)?;
            }
            (Op::Copy(..), Reply::Refused(refusal)) => self.not_copied(number, &refusal)?,
            (Op::Clear, Reply::Done | Reply::Refused(_)) => {}
            (Op::Data(_), Reply::Done) if file.beside.is_some() => self.flush(number)?,
            (Op::Data(_) | Op::Copy(..) | Op::Write | Op::Close | Op::Grant, Reply::Done) => {}
            (Op::Data(_) | Op::Write | Op::Close, Reply::Refused(refusal)) => {
                let first = file.failure.is_none();
                file.failure.get_or_insert(refused("write", &refusal));
                if file.beside.is_some() {
                    self.forget_queued(number);
                    self.close(number)?;
                }
                if first && refusal.status == Status::Failure {
                    self.run.check_room()?;
                }
            }
            (Op::Grant, Reply::Refused(refusal)) => {
                file.failure.get_or_insert(refused("set its owner, mode and time", &refusal));
            }
            (Op::Check, Reply::Attributes(found)) => {
                // The kernel leaves them out without a word where the account may not give them.
                let wanted = self.run.permissions(self.entry(index)?.0)?.mode;
                let found = found.mode.unwrap_or_default() & 0o7777;
                if found != wanted
                    && let Some(file) = self.files.get_mut(&number)
                {
                    let message =
                        format!("its mode is {found:04o} after {wanted:04o} was set; the account may not give it");
                    file.failure.get_or_insert(WriteFailure { message, retry: false });
                }
            }
            (Op::Check, Reply::Refused(refusal)) => {
                file.failure.get_or_insert(refused("look at its mode", &refusal));
            }
            _ => return Err(self.session.odd()),
        }
        self.step(number)
    }

    /// Takes a file on when everything that was asked for it is answered.
    fn step(&mut self, number: u64) -> Result<(), Error> {
        self.follow_on(number);
        let Some(file) = self.files.get_mut(&number) else { return Ok(()) };
        if file.in_flight > 0 {
            return Ok(());
        }
        match file.stage {
            Stage::Writing if !file.closing => Ok(()),
            Stage::Writing if file.failure.is_none() => {
                file.stage = Stage::Proving;
                self.open_files -= usize::from(std::mem::take(&mut file.counted));
                if let (Some((followed, _)), Some(follower)) = (self.following, &self.follower)
                    && followed == number
                {
                    follower.end(file.digest.unwrap_or_default(), &self.proofs.0);
                    self.following = None;
                    self.proving += 1;
                    return Ok(());
                }
                let (index, path, size, packed) = (file.index, file.path.clone(), file.size, file.route == Route::Pack);
                let announced = file.digest.unwrap_or_default();
                // An archive has set the time; special bits are looked at when they are set.
                let grant = match packed {
                    true => Some((announced, self.run.permissions(self.entry(index)?.0)?)),
                    false => None,
                };
                let grant = grant.filter(|(_, wanted)| wanted.mode & SPECIAL_BITS == 0);
                self.unproven_bytes += size;
                self.unproven.push(Unproven { id: number, path, size, grant });
                self.prove(false);
                Ok(())
            }
            Stage::Writing | Stage::Granting => self.conclude(number),
            Stage::Proving => Ok(()),
        }
    }

    /// Sends what waited and need not any more.
    fn flush(&mut self, number: u64) -> Result<(), Error> {
        if self.files.get(&number).is_some_and(|file| file.beside.is_some()) {
            self.flush_beside(number)?;
            return self.close(number);
        }
        while let Some((part, handle, origin)) = self.files.get_mut(&number).and_then(File::next_part) {
            match part {
                Part::Data { to, block } => {
                    self.queued -= block.data().len();
                    self.send_block(number, &handle, to, &block)?;
                }
                Part::Copy { to, length, from } => {
                    let origin = origin.unwrap_or_default();
                    self.send_copy(number, (&origin, from), length, (&handle, to))?;
                }
            }
        }
        self.close(number)
    }

    /// Forgets what waits of a file.
    fn forget_queued(&mut self, number: u64) {
        let Some(file) = self.files.get_mut(&number) else { return };
        self.copying -= file.queued_copies();
        // What waits to be packed is not counted.
        if file.route != Route::Pack {
            self.queued -= file.queued_bytes();
        }
        file.queued.clear();
    }

    /// Waits until anything that was asked for is done; false where nothing is.
    fn wait(&mut self) -> Result<bool, Error> {
        if !self.sent.is_empty() {
            self.pump(true)?;
        } else if self.bulk.as_ref().is_some_and(Bulk::is_busy) {
            self.pump_bulk(true)?;
        } else {
            return Ok(false);
        }
        Ok(true)
    }

    fn send_block(&mut self, number: u64, handle: &[u8], offset: u64, block: &Block) -> Result<(), Error> {
        self.send_block_over(&Arc::clone(&self.session), number, handle, (offset, block))
    }

    fn send_block_over(
        &mut self,
        session: &Arc<Session>,
        number: u64,
        handle: &[u8],
        (offset, block): (u64, &Block),
    ) -> Result<(), Error> {
        let mut at = offset;
        for chunk in block.data().chunks(session.write_max() as usize) {
            if let Some(file) = self.files.get_mut(&number) {
                file.unanswered.insert(at);
                file.sent = file.sent.max(at + chunk.len() as u64);
            }
            self.send_over(Arc::clone(session), number, Op::Data(at), session::write(handle, at, chunk))?;
            at += chunk.len() as u64;
        }
        Ok(())
    }
}

/// Owner in one request, mode and times in the next: OpenSSH's server sets the mode first where one request has both,
/// and the change of the owner would take special bits away again.
pub(super) fn grant(kind: u8, path: &[u8], wanted: &Permissions) -> Vec<Vec<u8>> {
    let mut packets = Vec::with_capacity(2);
    if wanted.uid.is_some() || wanted.gid.is_some() {
        // chown(2) leaves what is given as -1.
        let owner = (wanted.uid.unwrap_or(u32::MAX), wanted.gid.unwrap_or(u32::MAX));
        let owner = Attributes { owner: Some(owner), ..Attributes::default() };
        packets.push(with_attributes(kind, path, &owner));
    }
    let seconds = wanted.mtime.seconds.clamp(0, u32::MAX.into()) as u32;
    let rest = Attributes { mode: Some(wanted.mode), times: Some((seconds, seconds)), ..Attributes::default() };
    packets.push(with_attributes(kind, path, &rest));
    packets
}

impl Writer for StockWriter {
    fn put(&mut self, index: u32, block: Block, digest: Digest) -> Result<(), Error> {
        self.open(index, 0)?;
        let length = block.data().len() as u64;
        if self.moves_on(index, 0, length, (0, 0)) {
            return self.finish(index, digest);
        }
        self.stop_moving(index)?;
        self.stop_growing(index)?;
        if let Some(lying) = self.holding(index, length, digest) {
            self.copy_from(index, 0, length, (lying, 0))?;
        } else if length > 0 {
            self.write(index, 0, block)?;
        }
        self.finish(index, digest)
    }

    fn open(&mut self, index: u32, resume_at: u64) -> Result<(), Error> {
        self.drop_file(index)?;
        if self.begin_moving(index, resume_at) || self.begin_growing(index, resume_at) {
            return Ok(());
        }
        self.open_file(index, resume_at)
    }

    fn write(&mut self, index: u32, offset: u64, block: Block) -> Result<(), Error> {
        self.stop_moving(index)?;
        let Some(offset) = self.place(index, offset)? else { return Ok(()) };
        self.hash_tail(index, block.data());
        self.pump(false)?;
        let Some(&number) = self.current.get(&index) else { return Ok(()) };
        let Some(file) = self.files.get_mut(&number).filter(|file| file.failure.is_none()) else { return Ok(()) };
        let length = block.data().len() as u64;
        if !file.goes_on(offset, length) {
            return Ok(());
        }
        file.hole_at_end = false;
        if let Some(summing) = &mut file.summing {
            summing.update(block.data());
        }
        if file.route == Route::Pack {
            file.queued.push_back(Part::Data { to: offset, block });
            return Ok(());
        }
        if self.goes_by_command(number, length)? {
            return self.lend(number, offset, block);
        }
        let Some(file) = self.files.get_mut(&number) else { return Ok(()) };
        file.queued.push_back(Part::Data { to: offset, block });
        self.queued += length as usize;
        self.consider(number)?;
        self.send_on(number)?;
        while self.queued > QUEUED && self.wait()? {}
        Ok(())
    }

    fn hole(&mut self, index: u32, offset: u64, length: u64) -> Result<(), Error> {
        self.stop_moving(index)?;
        let Some(offset) = self.place(index, offset)? else { return Ok(()) };
        self.hash_hole_of_tail(index, length);
        let Some(file) = self.current.get(&index).and_then(|number| self.files.get_mut(number)) else { return Ok(()) };
        match offset.checked_add(length) {
            Some(end) if offset == file.at && end <= file.size => {
                file.at = end;
                file.hole_at_end = true;
                file.has_hole = true;
                if let Some(summing) = &mut file.summing {
                    summing.zeros(length);
                }
            }
            _ => {
                let message = format!("a hole of {length} bytes at {offset} does not go on from {}", file.at);
                file.failure.get_or_insert(WriteFailure { message, retry: false });
            }
        }
        Ok(())
    }

    fn begins_with(&mut self, index: u32, there: Beginning) {
        self.begin_after(index, there);
    }

    fn copy(&mut self, index: u32, offset: u64, length: u64, from: Within) -> Result<(), Error> {
        let known = (from.piece, from.offset);
        if self.moves_on(index, offset, length, known) || self.stays(index, offset, length, known) {
            return Ok(());
        }
        self.stop_moving(index)?;
        self.stop_growing(index)?;
        match self.alike.piece(index, from.piece) {
            Some(lying) => self.copy_from(index, offset, length, (lying, from.offset)),
            None => Err(Error::Usage("this target has nothing of which that file could be made".into())),
        }
    }

    fn finish(&mut self, index: u32, digest: Digest) -> Result<(), Error> {
        if self.end_moving(index, digest) {
            return Ok(());
        }
        let digest = self.end_growing(index, digest)?;
        let Some(&number) = self.current.get(&index) else {
            let message = "was finished without having been opened".into();
            self.done.push(Staged { index, result: Err(WriteFailure { message, retry: false }) });
            return Ok(());
        };
        let Some(file) = self.files.get_mut(&number) else { return Ok(()) };
        if file.at != file.size {
            let message = format!("{} bytes came, {} were announced", file.at, file.size);
            file.failure.get_or_insert(WriteFailure { message, retry: true });
        }
        file.digest = Some(digest);
        if file.route != Route::Sftp {
            self.finish_by_command(number)?;
            return self.pump_bulk(false);
        }
        let nothing_open = file.handle.is_none() && file.in_flight == 0;
        file.closing |= nothing_open || file.never_opens;
        self.close(number)?;
        self.step(number)?;
        self.pump(false)
    }

    fn keep(&mut self, index: u32, digest: Digest) -> Result<(), Error> {
        let (entry, _) = self.entry(index)?;
        let mut state = self.run.state();
        let known = state.target.get(&entry.path).and_then(Entry::file).and_then(|(_, digest)| digest);
        let result = if known == Some(digest) {
            state.kept.insert(index, digest);
            Ok(())
        } else {
            Err(WriteFailure { message: "is not what the target has".to_owned(), retry: true })
        };
        drop(state);
        self.done.push(Staged { index, result });
        Ok(())
    }

    fn discard(&mut self, index: u32) -> Result<(), Error> {
        self.moving.remove(&index);
        self.growing.remove(&index);
        self.drop_file(index)
    }

    fn completions(&mut self, wait: bool) -> Result<Vec<Staged>, Error> {
        loop {
            self.pump(false)?;
            self.pump_bulk(false)?;
            while let Ok(proven) = self.proofs.1.try_recv() {
                self.proven(proven?)?;
            }
            if !wait || self.files.is_empty() {
                return Ok(std::mem::take(&mut self.done));
            }
            self.with_bulk(Bulk::flush)?;
            if !self.sent.is_empty() {
                self.pump(true)?;
            } else if self.bulk.as_ref().is_some_and(Bulk::is_busy) {
                self.pump_bulk(true)?;
            } else if !self.unproven.is_empty() {
                self.prove(true);
            } else if self.proving > 0 {
                let lost = |_| self.session.client.protocol("the thread that proves has ended");
                let proven = self.proofs.1.recv().map_err(lost)??;
                self.proven(proven)?;
            } else {
                // Opened and not finished: those are for the engine to finish or discard.
                return Ok(std::mem::take(&mut self.done));
            }
        }
    }
}
