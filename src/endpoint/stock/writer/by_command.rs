//! The way of a writer's content that goes by a command at the other end ([`Bulk`]), and the hashing of large files there
//! while they are still being sent.

use std::sync::Arc;

use super::super::bulk::{Bulk, Done, Starting};
use super::super::follow::{FOLLOW_BYTES, FOLLOW_STEP_BYTES, Follower};
use super::super::prove::Unproven;
use super::super::session::with_attributes;
use super::super::shell::is_plain;
use super::StockWriter;
use super::file::{File, Op, Part, Route};
use crate::endpoint::{Block, Error, WriteFailure};
use crate::wire::sftp::{Attributes, packet};

/// Files up to this size are kept until they are complete, and sent in an archive.
const PACKED_BYTES: u64 = 4 << 20;
/// Of a file that is made of what is there, what is new goes by the command in such pieces: each costs a process there.
const LENT_BYTES_MIN: u64 = 256 << 10;
/// For so many it is waited until what comes before them is there.
const LENT_RUN_BYTES: u64 = 8 << 20;

impl StockWriter {
    /// How a file goes. One that has failed once goes by SFTP, which says of each file what is wrong with it.
    pub(super) fn route(&mut self, index: u32, path: &[u8], size: u64, resume_at: u64) -> Result<Route, Error> {
        // A large file waits for the command; small ones go by SFTP until it is there.
        let patient = size > PACKED_BYTES || self.run.much.files == 0;
        let due = |starting: &mut Starting| patient || starting.is_finished();
        if let Some(starting) = self.starting.take_if(due) {
            self.bulk = starting.join().ok().and_then(Result::ok);
        }
        let is_free = self.bulk.as_ref().is_some_and(|bulk| !bulk.is_writing());
        if !is_free || self.by_sftp.contains(&index) {
            return Ok(Route::Sftp);
        }
        if resume_at == 0 && size <= PACKED_BYTES {
            return Ok(Route::Pack);
        }
        if resume_at == size || !is_plain(path) {
            return Ok(Route::Sftp);
        }
        if resume_at > 0 {
            let cut = Attributes { size: Some(resume_at), ..Attributes::default() };
            if self.session.order(with_attributes(packet::SETSTAT, path, &cut))?.is_err() {
                return Ok(Route::Sftp);
            }
        }
        Ok(Route::Stream)
    }

    /// Whether `length` bytes of a file go by the command. Of one that is made of what is there too, it has what is large: at once where
    /// nothing that comes before is on its way by the handle, else when that is worth waiting for.
    pub(super) fn goes_by_command(&mut self, number: u64, length: u64) -> Result<bool, Error> {
        let Some(file) = self.files.get_mut(&number).filter(|file| file.beside.is_none()) else { return Ok(false) };
        if file.route == Route::Stream && file.handle.is_none() {
            return Ok(true);
        }
        file.fresh = if length >= LENT_BYTES_MIN { file.fresh + length } else { 0 };
        let waits = !file.queued.is_empty() || !file.unanswered.is_empty();
        let least = if waits { LENT_RUN_BYTES } else { LENT_BYTES_MIN };
        let patient = file.fresh >= LENT_RUN_BYTES;
        let may_be_made = file.origin.is_some() || self.alike.piece(file.index, 0).is_some();
        let large = may_be_made && file.size > PACKED_BYTES && file.fresh >= least;
        if !large || self.by_sftp.contains(&file.index) || !is_plain(&file.path) {
            return Ok(false);
        }
        if file.route != Route::Stream {
            if let Some(starting) = self.starting.take_if(|starting| patient || starting.is_finished()) {
                self.bulk = starting.join().ok().and_then(Result::ok);
            }
            if self.bulk.as_ref().is_none_or(Bulk::is_writing) {
                return Ok(false);
            }
        }
        let is_in_way = |file: &File| !file.queued.is_empty() || !file.unanswered.is_empty();
        while self.files.get(&number).is_some_and(is_in_way) && self.wait()? {}
        let Some(file) = self.files.get_mut(&number) else { return Ok(false) };
        if file.handle.is_none() || file.failure.is_some() || file.route == Route::Stream {
            return Ok(file.is_with_command);
        }
        (file.route, file.is_with_command) = (Route::Stream, true);
        let (path, at) = (file.path.clone(), file.sent);
        self.with_bulk(|bulk| bulk.join(number, &path, at))?;
        Ok(self.bulk.is_some())
    }

    /// Sends what waits of a file. What the command holds comes before it, and is written first.
    pub(super) fn send_on(&mut self, number: u64) -> Result<(), Error> {
        let waits = |file: &File| !file.lent.is_empty() && file.is_with_command && !file.ending;
        if self.files.get(&number).is_some_and(waits) {
            self.with_bulk(Bulk::send_held)?;
        }
        self.flush(number)
    }

    /// Gives the command bytes of a file.
    pub(super) fn lend(&mut self, number: u64, offset: u64, block: Block) -> Result<(), Error> {
        if let Some(file) = self.files.get_mut(&number) {
            file.sent = offset + block.data().len() as u64;
            file.lent.push_back((offset, file.sent));
        }
        self.with_bulk(|bulk| bulk.write(offset, block))?;
        self.pump_bulk(false)
    }

    /// Does something with the command; when that has ended, what it had is to be sent again, by SFTP.
    pub(super) fn with_bulk<T>(
        &mut self,
        act: impl FnOnce(&mut Bulk) -> Result<T, String>,
    ) -> Result<Option<T>, Error> {
        match self.bulk.as_mut().map(act) {
            Some(Ok(value)) => Ok(Some(value)),
            Some(Err(reason)) => self.lose_bulk(&reason).map(|()| None),
            None => Ok(None),
        }
    }

    fn lose_bulk(&mut self, reason: &str) -> Result<(), Error> {
        self.bulk = None;
        // It ends when it cannot write.
        self.run.check_room()?;
        let numbers: Vec<u64> =
            self.files.iter().filter(|(_, file)| file.is_with_command).map(|(&number, _)| number).collect();
        for number in numbers {
            if let Some(file) = self.files.get_mut(&number) {
                let message = format!("the command that takes content there has ended: {reason}");
                file.failure.get_or_insert(WriteFailure { message, retry: true });
                file.in_flight -= usize::from(std::mem::take(&mut file.ending));
                file.is_with_command = false;
                file.lent.clear();
            }
            self.forget_queued(number);
            self.close(number)?;
            self.step(number)?;
        }
        Ok(())
    }

    /// Takes what the command has done; with `wait` at least one thing, when any is due.
    pub(super) fn pump_bulk(&mut self, wait: bool) -> Result<(), Error> {
        let mut wait = wait;
        while let Some(Some(done)) = self.with_bulk(|bulk| bulk.done(wait))? {
            wait = false;
            match done {
                Done::Reached(number, offset) => {
                    if let Some(file) = self.files.get_mut(&number) {
                        file.written_to(offset);
                        self.follow_on(number);
                        self.flush(number)?;
                    }
                }
                Done::Written(number) => {
                    let Some(file) = self.files.get_mut(&number) else { continue };
                    file.done_by_command();
                    // What has a handle is made as long by that.
                    if file.hole_at_end && file.handle.is_none() {
                        let size = Attributes { size: Some(file.size), ..Attributes::default() };
                        let path = file.path.clone();
                        self.send(number, Op::Write, with_attributes(packet::SETSTAT, &path, &size))?;
                    }
                    self.flush(number)?;
                    self.step(number)?;
                }
                Done::Unpacked(numbers) => {
                    for number in numbers {
                        if let Some(file) = self.files.get_mut(&number) {
                            file.done_by_command();
                            self.step(number)?;
                        }
                    }
                }
            }
        }
        Ok(())
    }

    /// All of a file that goes by the command is here.
    pub(super) fn finish_by_command(&mut self, number: u64) -> Result<(), Error> {
        let Some(file) = self.files.get_mut(&number) else { return Ok(()) };
        if file.route == Route::Stream {
            file.closing |= file.handle.is_none();
            self.end_of_stream(number)?;
            self.close(number)?;
            return self.step(number);
        }
        if file.failure.is_some() {
            file.closing = true;
            file.queued.clear();
            return self.step(number);
        }
        // An archive would fill holes up; and the command may have ended meanwhile.
        if file.has_hole || self.bulk.is_none() {
            file.route = Route::Sftp;
            self.queued += file.queued_bytes();
            return self.open_new(number);
        }
        file.closing = true;
        file.in_flight += 1;
        (file.is_with_command, file.ending) = (true, true);
        let index = file.index;
        let parts = std::mem::take(&mut file.queued).into_iter();
        let blocks = parts.filter_map(|part| if let Part::Data { block, .. } = part { Some(block) } else { None });
        let blocks: Vec<Block> = blocks.collect();
        let entry = self.entry(index)?.0;
        let (name, modified) = (self.run.staged_name(&entry.path, false), entry.mtime.seconds);
        self.with_bulk(|bulk| bulk.pack(number, &name, modified, &blocks)).map(drop)
    }

    /// Tells the command the end of what it writes piece by piece.
    fn end_of_stream(&mut self, number: u64) -> Result<(), Error> {
        let file = self.files.get_mut(&number).filter(|file| file.is_with_command && !file.ending);
        if let Some(file) = file {
            file.ending = true;
            file.in_flight += 1;
            self.with_bulk(Bulk::end)?;
        }
        Ok(())
    }

    /// Has the command end with a file that will not be finished: what is written after the removal would be there again.
    pub(super) fn end_by_command(&mut self, number: u64) -> Result<(), Error> {
        let Some(file) = self.files.get(&number) else { return Ok(()) };
        self.by_sftp.insert(file.index);
        if file.route == Route::Stream {
            self.end_of_stream(number)?;
        } else if file.in_flight > 0 {
            self.with_bulk(Bulk::flush)?;
        }
        while self.bulk.as_ref().is_some_and(Bulk::is_busy) {
            self.pump_bulk(true)?;
        }
        Ok(())
    }

    /// Has a large file hashed at the other end from its beginning on, while the rest is sent.
    pub(super) fn follow(&mut self, number: u64) -> Result<(), Error> {
        let Some(file) = self.files.get(&number).filter(|file| file.size >= FOLLOW_BYTES) else { return Ok(()) };
        if self.following.is_some() || !self.run.has_shell {
            return Ok(());
        }
        let unproven = Unproven { id: number, path: file.path.clone(), size: file.size, grant: None };
        if self.follower.is_none() {
            self.follower =
                Some(Follower::start(Arc::clone(&self.run.lanes), self.spread.number(0), Arc::clone(&self.run.shell))?);
        }
        if let Some(follower) = &self.follower {
            follower.begin(unproven);
            self.following = Some((number, 0));
        }
        Ok(())
    }

    /// Tells the follower how far the server has got.
    pub(super) fn follow_on(&mut self, number: u64) {
        let (Some((followed, told)), Some(follower)) = (&mut self.following, &self.follower) else { return };
        let Some(file) = self.files.get(&number).filter(|_| *followed == number) else { return };
        let reached = file.reached();
        if reached >= *told + FOLLOW_STEP_BYTES {
            *told = reached;
            follower.reached(reached);
        }
    }

    /// Stops following a file that will not be proven that way.
    pub(super) fn lose(&mut self, number: u64) {
        if self.following.is_some_and(|(followed, _)| followed == number) {
            self.following = None;
            self.follower.iter().for_each(Follower::abandon);
        }
    }
}
