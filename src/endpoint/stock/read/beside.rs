//! A large file read over several connections: each has a handle of its own, and what is read next is asked for over the one that
//! brings it soonest.
//!
//! What always holds: a further handle is read only after it was found to be of a file that looks like the first one's.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;

use super::super::session::{self, Session};
use super::{IN_FLIGHT, Op, ReadQueue};
use crate::endpoint::Error;
use crate::endpoint::client::Client;
use crate::endpoint::spread::SPREAD_AFTER;
use crate::wire::sftp::{Attributes, open, packet};

/// Bytes of a file that are asked for and not given, over all connections.
const AHEAD_BYTES: u64 = 64 << 20;

/// What a file has over further connections.
pub(super) struct Beside {
    path: Vec<u8>,
    handles: HashMap<usize, Side>,
}

/// A handle over one connection.
#[derive(Default)]
struct Side {
    handle: Option<Bytes>,
    /// It was found to be of the same file.
    same: bool,
}

/// Over what is read next.
struct Over {
    connection: (usize, Arc<Session>),
    handle: Bytes,
}

impl Beside {
    pub(super) fn of(path: &[u8]) -> Beside {
        Beside { path: path.to_vec(), handles: HashMap::new() }
    }
}

impl ReadQueue {
    /// Asks for what comes next of a file that may go over several connections.
    pub(super) fn ask_beside(&mut self, file: u64) -> Result<(), Error> {
        if self.files.get(&file).is_none_or(|reading| reading.beside.is_none()) {
            return Ok(());
        }
        self.consider(file)?;
        while let Some(reading) = self.files.get(&file).filter(|reading| reading.asked < reading.size) {
            let length = (reading.size - reading.asked).min(self.session.read_max().into()) as u32;
            let Some(Over { connection, handle }) = self.next_over(file, length) else { return Ok(()) };
            let Some(reading) = self.files.get_mut(&file) else { return Ok(()) };
            let offset = reading.asked;
            reading.asked += u64::from(length);
            self.send_over(connection, file, Op::Read { offset, length }, session::read(&handle, offset, length))?;
        }
        Ok(())
    }

    fn next_over(&self, file: u64, length: u32) -> Option<Over> {
        let reading = self.files.get(&file)?;
        let (beside, own_handle) = (reading.beside.as_ref()?, reading.handle.clone()?);
        let most = if self.spread.width() > 1 { AHEAD_BYTES } else { IN_FLIGHT };
        if self.in_flight >= most || reading.asked - reading.given >= most {
            return None;
        }
        let own = self.spread.number(0);
        let side = |over: usize| beside.handles.get(&over).filter(|side| side.same && over != own);
        let waiting = |over: usize, _: &Client| {
            let usable = over == own || side(over).is_some();
            usable.then(|| self.loads.get(&over).copied().unwrap_or(0) as usize)
        };
        let (over, session) = self.spread.soonest(length as usize, waiting)?;
        let handle = if over == own { own_handle } else { side(over)?.handle.clone()? };
        Some(Over { connection: (over, Arc::clone(session)), handle })
    }

    /// Takes further connections for a file, or gives up those that have brought nothing.
    fn consider(&mut self, file: u64) -> Result<(), Error> {
        let Some(reading) = self.files.get_mut(&file).filter(|reading| reading.before.is_some()) else { return Ok(()) };
        if reading.closing || reading.given < SPREAD_AFTER {
            return Ok(());
        }
        let Some(beside) = &mut reading.beside else { return Ok(()) };
        self.spread.consider();
        let left = beside.handles.extract_if(|over, _| !self.spread.has(*over));
        let left: Vec<(usize, Bytes)> = left.filter_map(|(over, side)| Some((over, side.handle?))).collect();
        let own = self.spread.number(0);
        let is_new = |(over, _): &(usize, &Arc<Session>)| *over != own && !beside.handles.contains_key(over);
        let new = self.spread.all().filter(is_new).map(|(over, session)| (over, Arc::clone(session)));
        let new: Vec<(usize, Arc<Session>)> = new.collect();
        beside.handles.extend(new.iter().map(|(over, _)| (*over, Side::default())));
        let path = beside.path.clone();
        for (over, handle) in left {
            self.close_beside(file, over, &handle)?;
        }
        for connection in new {
            self.send_over(connection, file, Op::OpenBeside, session::open(&path, open::READ))?;
        }
        Ok(())
    }

    /// A further connection has its handle.
    pub(super) fn opened_beside(&mut self, file: u64, over: usize, handle: Bytes) -> Result<(), Error> {
        let reading = self.files.get_mut(&file).filter(|reading| !reading.closing);
        let side = reading.and_then(|reading| reading.beside.as_mut()?.handles.get_mut(&over));
        match (side, self.spread.find(over).map(Arc::clone)) {
            (Some(side), Some(session)) => {
                side.handle = Some(handle.clone());
                self.send_over((over, session), file, Op::LookBeside, session::about(packet::FSTAT, &handle))
            }
            // It was given up, or all is read.
            _ => self.close_beside(file, over, &handle),
        }
    }

    /// What a further handle is of.
    pub(super) fn seen_beside(&mut self, file: u64, over: usize, found: &Attributes) -> Result<(), Error> {
        let Some(reading) = self.files.get_mut(&file) else { return Ok(()) };
        let Some(before) = &reading.before else { return Ok(()) };
        let modified = |attributes: &Attributes| attributes.times.map(|(_, modified)| modified);
        let same = found.size == before.size
            && modified(found) == modified(before)
            && (found.mode, found.owner) == (before.mode, before.owner);
        if !same {
            return self.fail(file, Ok(()));
        }
        let side = reading.beside.as_mut().and_then(|beside| beside.handles.get_mut(&over));
        side.into_iter().for_each(|side| side.same = true);
        Ok(())
    }

    /// Closes a handle over a further connection; one that has ended has closed it.
    pub(super) fn close_beside(&mut self, file: u64, over: usize, handle: &[u8]) -> Result<(), Error> {
        let Some(session) = self.spread.find(over).map(Arc::clone) else { return Ok(()) };
        self.send_over((over, session), file, Op::Close, session::about(packet::CLOSE, handle))
    }

    /// Closes all that a file has over further connections.
    pub(super) fn end_beside(&mut self, file: u64) -> Result<(), Error> {
        let beside = self.files.get_mut(&file).and_then(|reading| reading.beside.as_mut());
        let sides: Vec<(usize, Side)> = beside.into_iter().flat_map(|beside| beside.handles.drain()).collect();
        for (over, handle) in sides.into_iter().filter_map(|(over, side)| Some((over, side.handle?))) {
            self.close_beside(file, over, &handle)?;
        }
        Ok(())
    }
}
