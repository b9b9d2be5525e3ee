//! A large file read over several connections: each has a handle of its own, and what is read next is asked for over the one that
//! brings it soonest.
//!
//! What always holds: a further handle is read only after it was found to be of a file that looks like the first one's, and that holds
//! the same at places that nobody can foresee. SFTP does not tell whether two handles are of one file.

use std::collections::HashMap;
use std::hash::{BuildHasher as _, RandomState};
use std::sync::Arc;

use bytes::Bytes;

use super::super::handles::{Changed, Handles};
use super::super::session::{self, Session};
use super::{IN_FLIGHT, Op, ReadQueue};
use crate::endpoint::Error;
use crate::endpoint::client::Client;
use crate::endpoint::spread::SPREAD_AFTER;
use crate::wire::sftp::{Attributes, open, packet};

/// Bytes of a file that are asked for and not given, over all connections.
const AHEAD_BYTES: u64 = 64 << 20;
/// So many places are looked at over a further connection, and so much is read at each.
const SAMPLES: u64 = 8;
const SAMPLE_BYTES: u32 = 4096;

/// What a file has over further connections.
pub(super) struct Beside {
    path: Vec<u8>,
    handles: Handles,
    /// What is looked at, by connection.
    samples: HashMap<usize, Sample>,
}

/// What lies at some places over one connection, and over the first.
#[derive(Default)]
struct Sample {
    /// What one of the two has given.
    by_offset: HashMap<u64, Bytes>,
    left: u64,
}

/// Over what is read next.
struct Over {
    connection: (usize, Arc<Session>),
    handle: Bytes,
}

impl Beside {
    pub(super) fn of(path: &[u8]) -> Beside {
        Beside { path: path.to_vec(), handles: Handles::default(), samples: HashMap::new() }
    }
}

impl ReadQueue {
    fn beside(&mut self, file: u64) -> Option<&mut Beside> {
        self.files.get_mut(&file).filter(|reading| !reading.closing)?.beside.as_mut()
    }

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
        let (handles, own_handle) = (&reading.beside.as_ref()?.handles, reading.handle.clone()?);
        let most = if self.spread.width() > 1 { AHEAD_BYTES } else { IN_FLIGHT };
        if self.in_flight >= most || reading.asked - reading.given >= most {
            return None;
        }
        let own = self.spread.number(0);
        let waiting = |over: usize, _: &Client| {
            let usable = over == own || handles.get(over).is_some();
            usable.then(|| self.loads.get(&over).copied().unwrap_or(0) as usize)
        };
        let (over, session) = self.spread.soonest(length as usize, waiting)?;
        let handle = if over == own { own_handle } else { handles.get(over)?.clone() };
        Some(Over { connection: (over, Arc::clone(session)), handle })
    }

    /// Takes further connections for a file, or gives up those that have brought nothing.
    fn consider(&mut self, file: u64) -> Result<(), Error> {
        let Some(reading) = self.files.get_mut(&file).filter(|reading| reading.before.is_some()) else { return Ok(()) };
        if reading.closing || reading.given < SPREAD_AFTER {
            return Ok(());
        }
        self.spread.consider();
        let Some(beside) = &mut reading.beside else { return Ok(()) };
        let Some(Changed { left, new }) = beside.handles.follow(&self.spread) else { return Ok(()) };
        let path = beside.path.clone();
        for (session, handle) in left {
            self.close_over(file, session, &handle)?;
        }
        for (over, session) in new {
            self.send_beside((over, session), file, Op::OpenBeside, session::open(&path, open::READ))?;
        }
        Ok(())
    }

    /// Sends what need not be done: a connection that has ended is none.
    fn send_beside(
        &mut self,
        (over, session): (usize, Arc<Session>),
        file: u64,
        op: Op,
        packet: Vec<u8>,
    ) -> Result<(), Error> {
        if session.client.is_dead() {
            return Ok(());
        }
        let tag = self.next_tag;
        match self.send_over((over, Arc::clone(&session)), file, op, packet) {
            Err(_) if session.client.is_dead() => {
                self.sent.remove(&tag);
                Ok(())
            }
            sent => sent,
        }
    }

    /// A further connection has its handle.
    pub(super) fn opened_beside(&mut self, file: u64, over: usize, handle: &Bytes) -> Result<(), Error> {
        let waits = self.beside(file).is_some_and(|beside| beside.handles.opened(over, handle));
        match self.spread.find(over).map(Arc::clone) {
            Some(session) if waits => {
                self.send_beside((over, session), file, Op::LookBeside, session::about(packet::FSTAT, handle))
            }
            // It was given up, or all is read.
            _ => self.close_beside(file, over, handle),
        }
    }

    /// What a further handle is of.
    pub(super) fn seen_beside(&mut self, file: u64, over: usize, found: &Attributes) -> Result<(), Error> {
        let Some(reading) = self.files.get_mut(&file) else { return Ok(()) };
        let (size, own) = (reading.size, reading.handle.clone().unwrap_or_default());
        let modified = |attributes: &Attributes| attributes.times.map(|(_, modified)| modified);
        let looks = |before: &Attributes| {
            (found.size, modified(found), found.mode, found.owner)
                == (before.size, modified(before), before.mode, before.owner)
        };
        let same = reading.before.as_ref().is_some_and(looks);
        let Some(beside) = reading.beside.as_mut().filter(|_| !reading.closing) else { return Ok(()) };
        let there = self.spread.find(over).map(Arc::clone);
        let (true, Some(session), Some(handle)) = (same, there, beside.handles.pending(over)) else {
            return self.leave_beside(file, over);
        };
        let places = size.saturating_sub(u64::from(SAMPLE_BYTES)).max(1);
        let offsets: Vec<u64> = (0..SAMPLES).map(|sample| RandomState::new().hash_one(sample) % places).collect();
        beside.samples.insert(over, Sample { by_offset: HashMap::new(), left: SAMPLES });
        for offset in offsets {
            let op = || Op::Sample { offset, of: over };
            let read = |handle: &[u8]| session::read(handle, offset, SAMPLE_BYTES);
            self.send_beside((over, Arc::clone(&session)), file, op(), read(&handle))?;
            self.send(file, op(), read(&own))?;
        }
        Ok(())
    }

    /// What lies at a place, over one of the two.
    pub(super) fn sampled(&mut self, file: u64, offset: u64, of: usize, data: Bytes) -> Result<(), Error> {
        let Some(beside) = self.beside(file) else { return Ok(()) };
        let Some(sample) = beside.samples.get_mut(&of) else { return Ok(()) };
        let Some(other) = sample.by_offset.remove(&offset) else {
            sample.by_offset.insert(offset, data);
            return Ok(());
        };
        sample.left -= 1;
        if data != other || data.is_empty() {
            return self.leave_beside(file, of);
        }
        if sample.left == 0 {
            beside.samples.remove(&of);
            beside.handles.approve(of);
        }
        Ok(())
    }

    /// A further connection is not used for a file: it is read over the others.
    pub(super) fn leave_beside(&mut self, file: u64, over: usize) -> Result<(), Error> {
        let Some(beside) = self.beside(file) else { return Ok(()) };
        beside.samples.remove(&over);
        let handle = beside.handles.take(over);
        handle.map_or(Ok(()), |handle| self.close_beside(file, over, &handle))
    }

    /// Closes a handle over the further connection with this number; one that has ended has closed it.
    pub(super) fn close_beside(&mut self, file: u64, over: usize, handle: &[u8]) -> Result<(), Error> {
        let session = self.spread.find(over).map(Arc::clone);
        session.map_or(Ok(()), |session| self.close_over(file, session, handle))
    }

    fn close_over(&mut self, file: u64, session: Arc<Session>, handle: &[u8]) -> Result<(), Error> {
        let number = self.spread.all().find(|(_, lane)| Arc::ptr_eq(lane, &session)).map_or(usize::MAX, |(at, _)| at);
        self.send_beside((number, session), file, Op::CloseBeside, session::about(packet::CLOSE, handle))
    }

    /// Closes all that a file has over further connections, and gives those back that no file needs.
    pub(super) fn end_beside(&mut self, file: u64) -> Result<(), Error> {
        let beside = self.files.get_mut(&file).and_then(|reading| reading.beside.as_mut());
        let handles = beside.map(|beside| beside.handles.drain()).unwrap_or_default();
        for (session, handle) in handles {
            self.close_over(file, session, &handle)?;
        }
        if !self.files.iter().any(|(one, reading)| *one != file && reading.beside.is_some() && !reading.closing) {
            self.spread.give_back();
        }
        Ok(())
    }
}
