//! A large file over several connections: each has a handle of its own, and a block goes over the one that has it there soonest.
//!
//! What always holds: what is sent lies within [`LOOSE_BYTES`] behind the first byte that the server has not said to have written, so
//! that a run which goes on with what is there knows how much of it to send again. The end of the file is sent when everything
//! before it is written: a file that has its length is whole.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;

use super::super::SPREAD_FROM;
use super::super::session::{self, Session, about};
use super::super::stage::LOOSE_BYTES;
use super::StockWriter;
use super::file::{File, Op, Part};
use crate::endpoint::Error;
use crate::endpoint::client::Client;
use crate::endpoint::spread::SPREAD_AFTER;
use crate::wire::sftp::{open, packet};

/// What a file has over further connections: by their numbers the handles, `None` until they are there.
#[derive(Default)]
pub(super) struct Beside(HashMap<usize, Option<Bytes>>);

/// Over what the next part of a file goes.
struct Over {
    session: Arc<Session>,
    handle: Bytes,
}

impl File {
    /// Whether the part that waits first may be sent now, and whether it is the end of the file.
    fn first_may_go(&self) -> Option<bool> {
        let Some(Part::Data { to, block }) = self.queued.front() else { return None };
        let end = to + block.data().len() as u64;
        let is_end = end == self.size;
        let written = self.unanswered.first().copied().unwrap_or(*to);
        let may = if is_end { self.unanswered.is_empty() } else { end <= written + LOOSE_BYTES };
        may.then_some(is_end)
    }
}

impl StockWriter {
    /// Whether a file of which so much is to be sent may go over several connections.
    pub(super) fn goes_beside(&self, bytes: u64) -> bool {
        self.loosely && bytes >= SPREAD_FROM
    }

    /// Takes further connections for a file, or gives up those that have brought nothing.
    pub(super) fn consider(&mut self, number: u64) -> Result<(), Error> {
        let Some(file) = self.files.get_mut(&number) else { return Ok(()) };
        let (Some(beside), Some(_), false) = (&mut file.beside, &file.handle, file.closing) else { return Ok(()) };
        if file.at < SPREAD_AFTER {
            return Ok(());
        }
        self.spread.consider();
        let left: Vec<(usize, Bytes)> = beside
            .0
            .extract_if(|over, _| !self.spread.has(*over))
            .filter_map(|(over, handle)| Some((over, handle?)))
            .collect();
        let own = self.spread.number(0);
        let news: Vec<(usize, Arc<Session>)> = self
            .spread
            .all()
            .filter(|(over, _)| *over != own && !beside.0.contains_key(over))
            .map(|(over, session)| (over, Arc::clone(session)))
            .collect();
        beside.0.extend(news.iter().map(|(over, _)| (*over, None)));
        let path = file.path.clone();
        for (over, handle) in left {
            self.close_beside(number, over, &handle)?;
        }
        for (over, session) in news {
            self.send_over(session, number, Op::OpenBeside(over), session::open(&path, open::WRITE))?;
        }
        Ok(())
    }

    /// A further connection has its handle.
    pub(super) fn opened_beside(&mut self, number: u64, over: usize, handle: Bytes) -> Result<(), Error> {
        let waits = |file: &&mut File| file.failure.is_none() && !file.closing;
        let file = self.files.get_mut(&number).filter(waits);
        match file.and_then(|file| file.beside.as_mut()?.0.get_mut(&over)) {
            Some(slot) => *slot = Some(handle),
            // It was given up, or all is sent.
            None => return self.close_beside(number, over, &handle),
        }
        self.flush(number)
    }

    /// Closes a handle over a further connection; one that has ended has closed it.
    pub(super) fn close_beside(&mut self, number: u64, over: usize, handle: &[u8]) -> Result<(), Error> {
        let Some(session) = self.spread.find(over).map(Arc::clone) else { return Ok(()) };
        self.send_over(session, number, Op::Clear, about(packet::CLOSE, handle))
    }

    /// Closes all that a file has over further connections.
    pub(super) fn end_beside(&mut self, number: u64) -> Result<(), Error> {
        let beside = self.files.get_mut(&number).and_then(|file| file.beside.as_mut());
        let handles: Vec<_> = beside.into_iter().flat_map(|beside| beside.0.drain()).collect();
        for (over, handle) in handles {
            if let Some(handle) = handle {
                self.close_beside(number, over, &handle)?;
            }
        }
        Ok(())
    }

    /// Sends what waits of a file, over whichever connection has room.
    pub(super) fn flush_beside(&mut self, number: u64) -> Result<(), Error> {
        while let Some(over) = self.next_over(number) {
            let Some(Part::Data { to, block }) = self.files.get_mut(&number).and_then(|file| file.queued.pop_front())
            else {
                return Ok(());
            };
            self.queued -= block.data().len();
            self.send_block_over(&over.session, number, &over.handle, (to, &block))?;
        }
        Ok(())
    }

    /// Over what the part that waits first goes now; `None` where it has to wait.
    fn next_over(&self, number: u64) -> Option<Over> {
        let file = self.files.get(&number)?;
        let (beside, own_handle) = (file.beside.as_ref()?, file.handle.clone()?);
        let is_end = file.first_may_go()?;
        let own = self.spread.number(0);
        let by_own = || Over { session: Arc::clone(&self.session), handle: own_handle.clone() };
        // What is asked for the whole of it comes behind its end over the same connection. And somebody else's requests may fill it: then
        // nothing of this file would ever be answered that could make it go on.
        if is_end || file.unanswered.is_empty() {
            return Some(by_own());
        }
        let waiting = |over: usize, client: &Client| {
            let usable = over == own || beside.0.get(&over).is_some_and(Option::is_some);
            usable.then(|| client.in_flight())
        };
        let Some(Part::Data { block, .. }) = file.queued.front() else { return None };
        let (over, session) = self.spread.soonest(block.data().len(), waiting)?;
        match beside.0.get(&over).filter(|_| over != own) {
            Some(handle) => Some(Over { session: Arc::clone(session), handle: handle.clone()? }),
            None => Some(by_own()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::endpoint::Block;
    use crate::endpoint::stock::writer::file::Route;

    const BLOCK: u64 = 1000;

    /// A file of which what begins at `unanswered` is not answered, and what begins at `to` waits.
    fn file(size: u64, unanswered: &[u64], to: u64) -> File {
        let mut file = File::new(0, b"/f".to_vec(), size, 0, Route::Sftp);
        file.unanswered.extend(unanswered);
        file.queued.push_back(Part::Data { to, block: Block::copy_of(&[7; BLOCK as usize]) });
        file
    }

    #[test]
    fn h34_nothing_is_sent_far_behind_what_is_not_written_and_the_end_of_a_file_last_of_all() {
        let size = 3 * LOOSE_BYTES;
        let last = LOOSE_BYTES - BLOCK;
        assert_eq!(file(size, &[], LOOSE_BYTES * 2).first_may_go(), Some(false));
        assert_eq!(file(size, &[0, last - BLOCK], last).first_may_go(), Some(false));
        assert_eq!(file(size, &[0, last], last + 1).first_may_go(), None);
        assert_eq!(file(size, &[1, last], last + 1).first_may_go(), Some(false));
        assert_eq!(file(size, &[size - 2 * BLOCK], size - BLOCK).first_may_go(), None);
        assert_eq!(file(size, &[], size - BLOCK).first_may_go(), Some(true));
    }
}
