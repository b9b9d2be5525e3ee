//! Reads files of a stock server: several at once, many READs in flight, the bytes of each file in order.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;

use bytes::Bytes;
use crossbeam_channel::{Receiver, Sender, unbounded};

use super::SPREAD_FROM;
use super::session::{self, Refusal, Reply, Session};
use crate::endpoint::Error;
use crate::endpoint::client::Completion;
use crate::endpoint::spread::Spread;
use crate::wire::sftp::{Attributes, Status, packet};

mod beside;

use beside::Beside;

/// Bytes asked for and not here yet, of one queue.
const IN_FLIGHT: u64 = 16 << 20;
/// Files of one queue that are open at once.
const OPEN_FILES: usize = 128;
/// A file of our own at the other end is never larger.
const WHOLE_MAX: usize = 1 << 30;

/// A file to be read from `from` to `size`.
#[derive(Debug)]
pub(super) struct Wanted {
    /// Comes back with each piece.
    pub(super) id: u64,
    pub(super) path: Vec<u8>,
    pub(super) from: u64,
    pub(super) size: u64,
    /// Nobody puts another file in its place meanwhile that looks the same: it may be read over several connections.
    pub(super) alone: bool,
}

/// What reading gives. For one file: `Data` in order, then `End`; or `Failed` at any time.
#[derive(Debug)]
pub(super) enum Piece {
    Data {
        id: u64,
        offset: u64,
        data: Bytes,
    },
    /// All is read; what FSTAT said before and after.
    End {
        id: u64,
        before: Attributes,
        after: Attributes,
    },
    /// `Err` is why the server refuses; `Ok` that the file is shorter than it was.
    Failed {
        id: u64,
        why: Result<(), Refusal>,
    },
}

enum Op {
    Open,
    /// The OPEN over a further connection, and the FSTAT of it.
    OpenBeside,
    LookBeside,
    /// A READ over the connection `of`, or over the first, of what lies at a place.
    Sample {
        offset: u64,
        of: usize,
    },
    CloseBeside,
    Before,
    Read {
        offset: u64,
        length: u32,
    },
    After,
    Close,
}

struct Reading {
    id: u64,
    size: u64,
    handle: Option<Bytes>,
    /// It is read over further connections too.
    beside: Option<Beside>,
    asked: u64,
    given: u64,
    early: BTreeMap<u64, Bytes>,
    before: Option<Attributes>,
    /// The last FSTAT and the CLOSE are sent.
    closing: bool,
}

/// Files that are being read over one session, and what is large over further ones.
pub(super) struct ReadQueue {
    spread: Spread<Session>,
    session: Arc<Session>,
    /// Bytes asked for over each connection and not here yet.
    loads: HashMap<usize, u64>,
    sender: Sender<Completion>,
    receiver: Receiver<Completion>,
    waiting: VecDeque<Wanted>,
    /// By a number of their own, since one `id` may be read again while answers to its first attempt are due.
    files: BTreeMap<u64, Reading>,
    next_file: u64,
    /// With the file, and the connection.
    sent: HashMap<u64, (u64, Op, usize)>,
    next_tag: u64,
    in_flight: u64,
    ready: VecDeque<Piece>,
}

impl ReadQueue {
    pub(super) fn new(spread: Spread<Session>) -> ReadQueue {
        let (sender, receiver) = unbounded();
        let session = Arc::clone(spread.own());
        ReadQueue {
            spread,
            session,
            loads: HashMap::new(),
            sender,
            receiver,
            waiting: VecDeque::new(),
            files: BTreeMap::new(),
            next_file: 0,
            sent: HashMap::new(),
            next_tag: 0,
            in_flight: 0,
            ready: VecDeque::new(),
        }
    }

    pub(super) fn push(&mut self, wanted: Wanted) {
        self.waiting.push_back(wanted);
    }

    /// Files that are neither ended nor failed.
    pub(super) fn files(&self) -> usize {
        self.waiting.len() + self.files.len()
    }

    /// The next piece; `None` when everything that was pushed is read.
    ///
    /// # Errors
    /// When the connection ends, here and below.
    pub(super) fn next(&mut self) -> Result<Option<Piece>, Error> {
        loop {
            if let Some(piece) = self.ready.pop_front() {
                return Ok(Some(piece));
            }
            self.ask()?;
            if self.files.is_empty() {
                return Ok(None);
            }
            let completion = self.session.client.wait(&self.receiver, false)?;
            let tag = completion.tag;
            match self.session.completed(completion) {
                Ok((tag, reply)) => self.settle(tag, reply)?,
                // What a further connection was not needed for.
                Err(_) if self.sent.get(&tag).is_some_and(|(_, op, over)| self.is_spare(op, *over)) => {
                    self.sent.remove(&tag);
                }
                // It was not sent.
                Err(_) if !self.sent.contains_key(&tag) => {}
                Err(lost) => return Err(lost),
            }
        }
    }

    /// Whether nothing is lost where such a request is not answered over this connection.
    fn is_spare(&self, op: &Op, over: usize) -> bool {
        match op {
            Op::OpenBeside | Op::LookBeside | Op::CloseBeside => true,
            Op::Sample { .. } => over != self.spread.number(0),
            _ => false,
        }
    }

    fn send(&mut self, file: u64, op: Op, packet: Vec<u8>) -> Result<(), Error> {
        self.send_over((self.spread.number(0), Arc::clone(&self.session)), file, op, packet)
    }

    fn send_over(
        &mut self,
        (over, session): (usize, Arc<Session>),
        file: u64,
        op: Op,
        packet: Vec<u8>,
    ) -> Result<(), Error> {
        if let Op::Read { length, .. } = op {
            self.in_flight += u64::from(length);
            *self.loads.entry(over).or_default() += u64::from(length);
        }
        let tag = self.next_tag;
        self.next_tag += 1;
        self.sent.insert(tag, (file, op, over));
        session.client.submit(packet, 0, tag, &self.sender)
    }

    /// Opens files and sends READs as far as the limits allow.
    fn ask(&mut self) -> Result<(), Error> {
        let most = OPEN_FILES.min(self.session.handles() / 4).max(1);
        while self.files.len() < most
            && let Some(Wanted { id, path, from, size, alone }) = self.waiting.pop_front()
        {
            let file = self.next_file;
            self.next_file += 1;
            let beside = (alone && size - from >= SPREAD_FROM).then(|| Beside::of(&path));
            let reading = Reading {
                id,
                size,
                handle: None,
                beside,
                asked: from,
                given: from,
                early: BTreeMap::new(),
                before: None,
                closing: false,
            };
            if reading.beside.is_some() {
                self.spread.begin();
            }
            self.files.insert(file, reading);
            self.send(file, Op::Open, session::open(&path, crate::wire::sftp::open::READ))?;
        }
        let due: Vec<u64> = self.files.keys().copied().collect();
        for file in due {
            self.ask_beside(file)?;
            while self.in_flight < IN_FLIGHT
                && let Some(reading) = self.files.get_mut(&file)
                && reading.beside.is_none()
                && let Some(handle) = reading.handle.clone()
                && reading.asked < reading.size
            {
                let length = (reading.size - reading.asked).min(self.session.read_max().into()) as u32;
                let offset = reading.asked;
                reading.asked += u64::from(length);
                self.send(file, Op::Read { offset, length }, session::read(&handle, offset, length))?;
            }
            self.conclude(file)?;
        }
        Ok(())
    }

    /// Sends the last FSTAT and the CLOSE, once every byte is asked for (of a small file) or here (of others).
    fn conclude(&mut self, file: u64) -> Result<(), Error> {
        let small = u64::from(self.session.read_max());
        let Some(reading) = self.files.get_mut(&file) else { return Ok(()) };
        let Some(handle) = reading.handle.clone() else { return Ok(()) };
        let asked = reading.asked >= reading.size && (reading.size <= small || reading.given >= reading.size);
        if reading.closing || !asked {
            return Ok(());
        }
        reading.closing = true;
        self.end_beside(file)?;
        self.send(file, Op::After, session::about(packet::FSTAT, &handle))?;
        self.send(file, Op::Close, session::about(packet::CLOSE, &handle))
    }

    fn settle(&mut self, tag: u64, reply: Reply) -> Result<(), Error> {
        let Some((file, op, over)) = self.sent.remove(&tag) else { return Ok(()) };
        if let Op::Read { length, .. } = op {
            self.in_flight -= u64::from(length);
            self.loads.entry(over).and_modify(|load| *load -= u64::from(length));
        }
        let Some(reading) = self.files.get_mut(&file) else {
            // Given up before; a handle that comes now is not left open.
            match (op, reply) {
                (Op::Open, Reply::Handle(handle)) => {
                    self.send(file, Op::Close, session::about(packet::CLOSE, &handle))?;
                }
                (Op::OpenBeside, Reply::Handle(handle)) => self.close_beside(file, over, &handle)?,
                _ => {}
            }
            return Ok(());
        };
        match (op, reply) {
            (Op::Open, Reply::Handle(handle)) => {
                reading.handle = Some(handle.clone());
                self.send(file, Op::Before, session::about(packet::FSTAT, &handle))
            }
            (Op::OpenBeside, Reply::Handle(handle)) => self.opened_beside(file, over, &handle),
            (Op::LookBeside, Reply::Attributes(found)) => self.seen_beside(file, over, &found),
            (Op::Sample { offset, of }, Reply::Data(data)) => self.sampled(file, offset, of, data),
            (Op::OpenBeside | Op::LookBeside, Reply::Refused(_)) => self.leave_beside(file, over),
            (Op::Sample { of, .. }, Reply::Refused(_)) => self.leave_beside(file, of),
            (Op::CloseBeside, _) => Ok(()),
            (Op::Before, Reply::Attributes(attributes)) => {
                reading.before = Some(attributes);
                Ok(())
            }
            (Op::Read { offset, length }, Reply::Data(data)) => self.arrived(file, offset, length, data),
            (Op::After, Reply::Attributes(after)) => {
                // The answers to a small file's READs come before this one, unless the server gave less than was asked.
                if reading.given < reading.size {
                    return self.fail(file, Ok(()));
                }
                let before = reading.before.take().unwrap_or_default();
                let id = reading.id;
                self.files.remove(&file);
                self.ready.push_back(Piece::End { id, before, after });
                Ok(())
            }
            (Op::Read { .. }, Reply::Refused(Refusal { status: Status::EndOfFile, .. })) => self.fail(file, Ok(())),
            (Op::Close, _) => Ok(()),
            (_, Reply::Refused(refusal)) => self.fail(file, Err(refusal)),
            _ => Err(self.session.odd()),
        }
    }

    fn arrived(&mut self, file: u64, offset: u64, length: u32, data: Bytes) -> Result<(), Error> {
        let Some(reading) = self.files.get_mut(&file) else { return Ok(()) };
        let got = data.len() as u32;
        if got > length {
            return Err(self.session.client.protocol(format!("{got} bytes where {length} were asked for")));
        }
        if got == 0 {
            return self.fail(file, Ok(()));
        }
        reading.early.insert(offset, data);
        while let Some(data) = reading.early.remove(&reading.given) {
            let offset = reading.given;
            reading.given += data.len() as u64;
            self.ready.push_back(Piece::Data { id: reading.id, offset, data });
        }
        if got < length {
            // A server may give less than was asked for; the rest is asked for again.
            let handle = reading.handle.clone().unwrap_or_default();
            if reading.closing {
                return self.fail(file, Ok(()));
            }
            let (offset, length) = (offset + u64::from(got), length - got);
            self.send(file, Op::Read { offset, length }, session::read(&handle, offset, length))?;
        }
        self.conclude(file)
    }

    fn fail(&mut self, file: u64, why: Result<(), Refusal>) -> Result<(), Error> {
        self.end_beside(file)?;
        let Some(reading) = self.files.remove(&file) else { return Ok(()) };
        self.ready.push_back(Piece::Failed { id: reading.id, why });
        match reading.handle {
            Some(handle) if !reading.closing => self.send(file, Op::Close, session::about(packet::CLOSE, &handle)),
            _ => Ok(()),
        }
    }
}

/// READs that go with the question how large a file is: most of our own are smaller.
const FIRST_READS: u64 = 2;
/// READs of one file of our own that are in flight at once.
const MOST_READS: u64 = 64;

/// A whole file of our own at the other end.
///
/// # Errors
/// `Err` inside when the server refuses; outside when the connection ends, or the file is larger than any of ours.
pub(super) fn read_whole(session: &Session, path: &[u8]) -> Result<Result<Vec<u8>, Refusal>, Error> {
    match session.handle(session.call(session::open(path, crate::wire::sftp::open::READ))?)? {
        Ok(handle) => read_opened(session, &handle, 0),
        Err(refusal) => Ok(Err(refusal)),
    }
}

/// The same of one that is open, from an offset on. The handle is closed.
///
/// # Errors
/// As [`read_whole`].
pub(super) fn read_opened(session: &Session, handle: &[u8], from: u64) -> Result<Result<Vec<u8>, Refusal>, Error> {
    let result = read_on(session, handle, from);
    session.forget(session::about(packet::CLOSE, handle))?;
    result
}

/// What `handle` holds from `from` on. How long that is says FSTAT, so that no READ waits at its end.
pub(super) fn read_on(session: &Session, handle: &[u8], from: u64) -> Result<Result<Vec<u8>, Refusal>, Error> {
    let length = u64::from(session.read_max());
    let reads = |at: u64, count: u64| (0..count).map(move |n| session::read(handle, at + n * length, length as u32));
    let first = [session::about(packet::FSTAT, handle)].into_iter().chain(reads(from, FIRST_READS));
    let mut replies = session.batch(first)?.into_iter();
    // Other servers may not say; then the end is where nothing more comes.
    let size = match replies.next() {
        Some(Reply::Attributes(found)) => found.size,
        _ => None,
    };
    let mut text = Vec::new();
    let mut at_once = FIRST_READS;
    loop {
        for reply in replies {
            match reply {
                Reply::Data(data) if data.len() as u64 > length => {
                    return Err(session.client.protocol("more bytes than were asked for"));
                }
                Reply::Data(data) if !data.is_empty() => {
                    text.extend_from_slice(&data);
                    if text.len() > WHOLE_MAX {
                        return Err(session.client.protocol("a file of lockstep's own without an end"));
                    }
                    if (data.len() as u64) < length {
                        break;
                    }
                }
                Reply::Data(_) => return Ok(Ok(text)),
                Reply::Refused(refusal) if refusal.status == Status::EndOfFile => return Ok(Ok(text)),
                Reply::Refused(refusal) => return Ok(Err(refusal)),
                _ => return Err(session.odd()),
            }
        }
        let at = from + text.len() as u64;
        at_once = match size {
            Some(size) if at >= size => return Ok(Ok(text)),
            Some(size) => (size - at).div_ceil(length).min(MOST_READS),
            None => (at_once * 2).min(MOST_READS),
        };
        replies = session.batch(reads(at, at_once))?.into_iter();
    }
}
