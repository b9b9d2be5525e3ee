//! Files that are opened to be staged, and closed, dropped or given back.

use super::super::session::{self, Refusal, about, extended, with_attributes};
use super::file::{File, Op, Route};
use super::{OPEN_FILES, StockWriter, refused};
use crate::endpoint::delta::Summing;
use crate::endpoint::{Error, WriteFailure};
use crate::wire::sftp::{Attributes, Status, open, packet};

impl StockWriter {
    pub(super) fn count(&mut self, number: u64) {
        if let Some(file) = self.files.get_mut(&number) {
            file.counted = true;
            self.open_files += 1;
        }
    }

    /// Opens a file that is not there yet.
    pub(super) fn open_new(&mut self, number: u64) -> Result<(), Error> {
        self.count(number);
        let Some(path) = self.files.get(&number).map(|file| file.path.clone()) else { return Ok(()) };
        self.send(number, Op::Open, session::open(&path, open::WRITE | open::CREATE | open::EXCLUSIVE))
    }

    pub(super) fn not_opened(&mut self, number: u64, refusal: &Refusal) -> Result<(), Error> {
        let Some(file) = self.files.get_mut(&number) else { return Ok(()) };
        // What an earlier attempt left has the name; CREAT with EXCL follows no link and opens nothing of others.
        if refusal.status == Status::Failure && !file.opened_again && !file.resumed {
            file.opened_again = true;
            let path = file.path.clone();
            self.send(number, Op::Clear, about(packet::REMOVE, &path))?;
            return self.send(number, Op::Open, session::open(&path, open::WRITE | open::CREATE | open::EXCLUSIVE));
        }
        let resumed = file.resumed;
        file.failure = Some(WriteFailure { retry: resumed, ..refused("make the staged file", refusal) });
        file.never_opens = true;
        file.closing |= file.digest.is_some();
        self.forget_queued(number);
        if resumed || refusal.status != Status::Failure { Ok(()) } else { self.run.check_room() }
    }

    /// Ends a file whose end was said, whose handle is there, and of which all is sent.
    pub(super) fn close(&mut self, number: u64) -> Result<(), Error> {
        let Some(file) = self.files.get_mut(&number).filter(|file| file.queued.is_empty()) else { return Ok(()) };
        let (Some(handle), Some(_), false) = (file.handle.clone(), file.digest, file.closing) else { return Ok(()) };
        // What follows is for all of it.
        if file.beside.is_some() && !file.unanswered.is_empty() {
            return Ok(());
        }
        file.closing = true;
        let origin = file.origin.as_mut().and_then(|origin| origin.handle.take());
        let size = Attributes { size: Some(file.size), ..Attributes::default() };
        if file.hole_at_end {
            self.send(number, Op::Write, with_attributes(packet::FSETSTAT, &handle, &size))?;
        }
        if self.sync_each {
            self.send(number, Op::Write, extended("fsync@openssh.com", &[&handle]))?;
        }
        if let Some(origin) = origin {
            self.send(number, Op::Clear, about(packet::CLOSE, &origin))?;
        }
        self.end_beside(number)?;
        self.send(number, Op::Close, about(packet::CLOSE, &handle))
    }

    /// Waits until another file may be opened.
    pub(super) fn wait_for_handles(&mut self) -> Result<(), Error> {
        while self.open_files >= OPEN_FILES.min(self.session.handles() / 2) && !self.sent.is_empty() {
            self.pump(true)?;
        }
        Ok(())
    }

    /// Begins to stage a file.
    pub(super) fn open_file(&mut self, index: u32, resume_at: u64) -> Result<(), Error> {
        self.wait_for_handles()?;
        let (entry, size) = self.entry(index)?;
        let path = self.run.staged_path(&entry.path);
        // What may be copied takes a handle.
        let is_made = self.alike.piece(index, 0).is_some() && !self.whole.contains(&index);
        let beside = !is_made && self.goes_beside(index, size - resume_at.min(size));
        let route = if is_made || beside { Route::Sftp } else { self.route(index, &path, size, resume_at)? };
        let number = self.next_file;
        self.next_file += 1;
        let mut file = File::new(index, path.clone(), size, resume_at, route);
        file.is_with_command = route == Route::Stream;
        file.beside = beside.then(Default::default);
        // Of what an earlier run has sent nothing is known.
        file.summing = (resume_at == 0 && self.run.sums_up(size)).then(Summing::default);
        self.files.insert(number, file);
        self.current.insert(index, number);
        if beside {
            self.spread.begin();
        }
        match (route, resume_at) {
            (Route::Pack, _) => return Ok(()),
            (Route::Stream, _) => {
                self.with_bulk(|bulk| bulk.begin(number, &path, resume_at))?;
                return self.follow(number);
            }
            (Route::Sftp, 0) => self.open_new(number)?,
            // All of it is there, perhaps with its last mode: only the proof is left, and the way to the disk where it may have been cut
            // off before that.
            (Route::Sftp, _) if resume_at == size => {
                if self.sync_each {
                    self.count(number);
                    self.send(number, Op::Open, session::open(&path, open::READ))?;
                }
            }
            (Route::Sftp, _) => {
                let cut = Attributes { size: Some(resume_at), ..Attributes::default() };
                self.send(number, Op::Write, with_attributes(packet::SETSTAT, &path, &cut))?;
                self.count(number);
                self.send(number, Op::Open, session::open(&path, open::WRITE))?;
            }
        }
        self.follow(number)
    }

    pub(super) fn drop_file(&mut self, index: u32) -> Result<(), Error> {
        let Some(number) = self.current.remove(&index) else { return Ok(()) };
        self.lose(number);
        if self.files.get(&number).is_some_and(|file| file.route != Route::Sftp) {
            self.end_by_command(number)?;
        }
        self.forget_queued(number);
        self.end_beside(number)?;
        let Some(file) = self.files.remove(&number) else { return Ok(()) };
        let path = file.path.clone();
        self.let_go(number, file)?;
        self.send(number, Op::Clear, about(packet::REMOVE, &path))
    }

    /// Gives back what a file holds at the server that is no more of this writer's.
    pub(super) fn let_go(&mut self, number: u64, file: File) -> Result<(), Error> {
        self.open_files -= usize::from(file.counted);
        let origin = file.origin.and_then(|origin| origin.handle);
        for handle in file.handle.filter(|_| !file.closing).into_iter().chain(origin) {
            self.send(number, Op::Clear, about(packet::CLOSE, &handle))?;
        }
        Ok(())
    }
}
