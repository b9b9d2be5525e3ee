//! A large file over several connections: each has a handle of its own, and a block goes over the one that has it there soonest.
//!
//! What always holds: what is sent lies no farther behind the first byte that the server has not said to have written than [`lag`]
//! allows. The end of the file is sent when everything before it is written: a file that has its length is whole. A further
//! connection that ends ends the run only if something of the file is on its way over it.

use std::sync::Arc;

use bytes::Bytes;

use super::super::handles::Changed;
use super::super::session::{self, Session, about};
use super::super::{SPREAD_FROM, lag};
use super::StockWriter;
use super::file::{File, Op, Part};
use crate::endpoint::Error;
use crate::endpoint::client::Client;
use crate::endpoint::spread::SPREAD_AFTER;
use crate::wire::sftp::{open, packet};

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
        let most = written + lag::allowed(written.saturating_sub(self.begun));
        let may = if is_end { self.unanswered.is_empty() } else { self.unanswered.is_empty() || end <= most };
        may.then_some(is_end)
    }
}

impl StockWriter {
    /// Whether a file of which so much is to be sent may go over several connections. One that has failed once does not.
    pub(super) fn goes_beside(&self, index: u32, bytes: u64) -> bool {
        let failed = self.by_sftp.contains(&index) || self.whole.contains(&index);
        self.spreads && bytes >= SPREAD_FROM && !failed
    }

    /// Takes further connections for a file, or gives up those that have brought nothing.
    pub(super) fn consider(&mut self, number: u64) -> Result<(), Error> {
        let Some(file) = self.files.get(&number) else { return Ok(()) };
        if file.beside.is_some() && file.handle.is_some() && !file.closing && file.at - file.begun > SPREAD_AFTER {
            self.spread.consider();
            self.follow_connections(number)?;
        }
        Ok(())
    }

    /// Opens a file over connections that are new, and closes it over those that were given up.
    fn follow_connections(&mut self, number: u64) -> Result<(), Error> {
        let Some(file) = self.files.get_mut(&number).filter(|file| !file.closing) else { return Ok(()) };
        let changed = file.beside.as_mut().and_then(|handles| handles.follow(&self.spread));
        let Some(Changed { left, new }) = changed else { return Ok(()) };
        let path = file.path.clone();
        for (session, handle) in left {
            self.close_over(number, session, &handle)?;
        }
        for (over, session) in new {
            self.send_beside(number, session, Op::OpenBeside(over), session::open(&path, open::WRITE))?;
        }
        Ok(())
    }

    /// Sends what need not be done: a connection that has ended is none.
    fn send_beside(&mut self, number: u64, session: Arc<Session>, op: Op, packet: Vec<u8>) -> Result<(), Error> {
        if session.client.is_dead() {
            return Ok(());
        }
        let tag = self.next_tag;
        match self.send_over(Arc::clone(&session), number, op, packet) {
            Err(_) if session.client.is_dead() => {
                self.unsend(tag);
                Ok(())
            }
            sent => sent,
        }
    }

    /// A further connection has its handle.
    pub(super) fn opened_beside(&mut self, number: u64, over: usize, handle: &Bytes) -> Result<(), Error> {
        let file = self.files.get_mut(&number).filter(|file| file.failure.is_none() && !file.closing);
        if let Some(handles) = file.and_then(|file| file.beside.as_mut())
            && handles.opened(over, handle)
        {
            handles.approve(over);
            return self.flush(number);
        }
        // It was given up, or all is sent.
        self.close_beside(number, over, handle)
    }

    /// Closes a handle over the further connection with this number; one that has ended has closed it.
    pub(super) fn close_beside(&mut self, number: u64, over: usize, handle: &[u8]) -> Result<(), Error> {
        let session = self.spread.find(over).map(Arc::clone);
        session.map_or(Ok(()), |session| self.close_over(number, session, handle))
    }

    fn close_over(&mut self, number: u64, session: Arc<Session>, handle: &[u8]) -> Result<(), Error> {
        self.send_beside(number, session, Op::CloseBeside, about(packet::CLOSE, handle))
    }

    /// Closes all that a file has over further connections, and gives those back that no file needs.
    pub(super) fn end_beside(&mut self, number: u64) -> Result<(), Error> {
        let Some(handles) = self.files.get_mut(&number).and_then(|file| file.beside.as_mut()) else { return Ok(()) };
        for (session, handle) in handles.drain() {
            self.close_over(number, session, &handle)?;
        }
        let needed = |(one, file): (&u64, &File)| *one != number && file.beside.is_some() && !file.closing;
        if !self.files.iter().any(needed) {
            self.spread.give_back();
        }
        Ok(())
    }

    /// Sends what waits of a file, over whichever connection has room.
    pub(super) fn flush_beside(&mut self, number: u64) -> Result<(), Error> {
        self.follow_connections(number)?;
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
        let (handles, own_handle) = (file.beside.as_ref()?, file.handle.clone()?);
        let is_end = file.first_may_go()?;
        let own = self.spread.number(0);
        let by_own = || Over { session: Arc::clone(&self.session), handle: own_handle.clone() };
        // What is asked for the whole of it comes behind its end over the same connection. And somebody else's requests may fill it: then
        // nothing of this file would ever be answered that could make it go on.
        if is_end || file.unanswered.is_empty() {
            return Some(by_own());
        }
        let waiting = |over: usize, client: &Client| {
            let usable = over == own || handles.get(over).is_some();
            usable.then(|| client.in_flight())
        };
        let Some(Part::Data { block, .. }) = file.queued.front() else { return None };
        let (over, session) = self.spread.soonest(block.data().len(), waiting)?;
        match handles.get(over).filter(|_| over != own) {
            Some(handle) => Some(Over { session: Arc::clone(session), handle: handle.clone() }),
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

    /// A file that was begun at `begun`, of which what begins at `unanswered` is not answered, and what begins at `to` waits.
    fn file(size: u64, begun: u64, unanswered: &[u64], to: u64) -> File {
        let mut file = File::new(0, b"/f".to_vec(), size, begun, Route::Sftp);
        file.unanswered.extend(unanswered);
        file.queued.push_back(Part::Data { to, block: Block::copy_of(&[7; BLOCK as usize]) });
        file
    }

    #[test]
    fn h34_nothing_is_sent_far_behind_what_is_not_written_and_the_end_of_a_file_last_of_all() {
        let (size, begun, written) = (1 << 30, 1 << 28, 3 << 27);
        let last = written + lag::allowed(written - begun) - BLOCK;
        let first_may_go = |unanswered: &[u64], to| file(size, begun, unanswered, to).first_may_go();
        assert_eq!(first_may_go(&[], size - 5 * BLOCK), Some(false));
        assert_eq!(first_may_go(&[written, last - BLOCK], last), Some(false));
        assert_eq!(first_may_go(&[written, last], last + 1), None);
        assert_eq!(first_may_go(&[written + 1, last], last + 1), Some(false));
        assert_eq!(first_may_go(&[size - 2 * BLOCK], size - BLOCK), None);
        assert_eq!(first_may_go(&[], size - BLOCK), Some(true));
    }
}
