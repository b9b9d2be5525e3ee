//! The way of a writer's content that goes by a command at the other end ([`Bulk`]), and the hashing of large files there
//! while they are still being sent.

use std::sync::Arc;

use super::super::bulk::{Bulk, Done, Starting};
use super::super::follow::{FOLLOW_BYTES, FOLLOW_STEP_BYTES, Follower};
use super::super::prove::Unproven;
use super::super::session::{about, with_attributes};
use super::super::shell::is_plain;
use super::StockWriter;
use super::file::{Op, Route};
use crate::endpoint::{Block, Error, WriteFailure};
use crate::wire::sftp::{Attributes, packet};

/// Files up to this size are kept until they are complete, and sent in an archive.
const PACKED_BYTES: u64 = 4 << 20;

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
        self.check_room()?;
        let numbers: Vec<u64> =
            self.files.iter().filter(|(_, file)| file.is_with_command()).map(|(&number, _)| number).collect();
        for number in numbers {
            if let Some(file) = self.files.get_mut(&number) {
                let message = format!("the command that takes content there has ended: {reason}");
                file.failure.get_or_insert(WriteFailure { message, retry: true });
                file.queued.clear();
                file.in_flight = 0;
            }
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
                        file.sent = offset;
                        self.follow_on(number);
                    }
                }
                Done::Written(number) => {
                    let Some(file) = self.files.get_mut(&number) else { continue };
                    file.in_flight -= 1;
                    if file.hole_at_end {
                        let size = Attributes { size: Some(file.size), ..Attributes::default() };
                        let path = file.path.clone();
                        self.send(number, Op::Write, with_attributes(packet::SETSTAT, &path, &size))?;
                    }
                    self.step(number)?;
                }
                Done::Unpacked(numbers) => {
                    for number in numbers {
                        if let Some(file) = self.files.get_mut(&number) {
                            file.in_flight -= 1;
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
        if file.failure.is_some() {
            file.closing = true;
            file.queued.clear();
            return self.step(number);
        }
        // An archive would fill holes up; and the command may have ended meanwhile.
        if file.route == Route::Pack && (file.has_hole || self.bulk.is_none()) {
            file.route = Route::Sftp;
            self.queued += file.queued.iter().map(|(_, block)| block.data().len()).sum::<usize>();
            return self.open_new(number);
        }
        file.closing = true;
        file.in_flight += 1;
        let (route, index) = (file.route, file.index);
        if route == Route::Stream {
            return self.with_bulk(Bulk::end).map(drop);
        }
        let blocks: Vec<Block> = std::mem::take(&mut file.queued).into_iter().map(|(_, block)| block).collect();
        let entry = self.entry(index)?.0;
        let (name, modified) = (self.run.staged_name(&entry.path, false), entry.mtime.seconds);
        self.with_bulk(|bulk| bulk.pack(number, &name, modified, &blocks)).map(drop)
    }

    /// Has the command give a file up that will not be finished, and removes what there is of it.
    pub(super) fn give_up(&mut self, number: u64) -> Result<(), Error> {
        let Some(file) = self.files.get(&number) else { return Ok(()) };
        self.by_sftp.insert(file.index);
        if file.route == Route::Stream && !file.closing {
            self.with_bulk(Bulk::end)?;
        } else if file.in_flight > 0 {
            self.with_bulk(Bulk::flush)?;
        }
        // What is written after the removal would be there again.
        while self.bulk.as_ref().is_some_and(Bulk::is_busy) {
            self.pump_bulk(true)?;
        }
        if let Some(file) = self.files.remove(&number) {
            self.send(number, Op::Clear, about(packet::REMOVE, &file.path))?;
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
            self.follower = Some(Follower::start(
                Arc::clone(&self.run.lanes),
                Arc::clone(&self.session),
                Arc::clone(&self.run.shell),
            )?);
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
        let reached = file.unanswered.values().next().copied().unwrap_or(file.sent);
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
