//! Many SFTP requests in flight over one [`Link`]; used with a stock server and with an agent.
//!
//! What always holds: every request that was sent is completed exactly once, by its answer or by the end of the link;
//! an answer to a request that was not made ends the connection.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use crossbeam_channel::{RecvTimeoutError, Sender, unbounded};

use crate::endpoint::Error;
use crate::endpoint::link::Link;
use crate::error::Escaped;
use crate::wire::extension::Fields;

/// Bounds of a connection.
#[derive(Debug, Clone, Copy)]
pub struct ClientOptions {
    /// Bytes of requests that may wait for their answers.
    pub in_flight_bytes: usize,
    /// How long to wait for an answer while nothing at all arrives.
    pub timeout: Duration,
}

impl Default for ClientOptions {
    fn default() -> Self {
        ClientOptions { in_flight_bytes: 16 << 20, timeout: Duration::from_secs(120) }
    }
}

/// The largest packet that is accepted from a server.
const PACKET_MAX: usize = 4 << 20;

/// An answer: its type and what follows the request's number.
#[derive(Debug, Clone)]
pub struct Answer {
    /// SSH_FXP_STATUS and so on.
    pub kind: u8,
    /// The fields.
    pub body: Bytes,
}

/// What became of a request.
#[derive(Debug)]
pub struct Completion {
    /// What was given with the request.
    pub tag: u64,
    /// The answer, or why there will be none.
    pub answer: Result<Answer, Lost>,
}

/// The link has ended.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{0}")]
pub struct Lost(pub String);

struct Pending {
    channel: Sender<Completion>,
    tag: u64,
    bytes: usize,
    sent_at: Instant,
    /// What had been delivered when it was sent.
    delivered: u64,
}

struct State {
    pending: HashMap<u32, Pending>,
    next_id: u32,
    in_flight: usize,
    /// Bytes of requests that were answered, and of their answers.
    delivered: u64,
    rate: Rate,
    /// What had been delivered at which time, of late.
    course: VecDeque<(Instant, u64)>,
    /// The shortest time to an answer.
    nearest: Option<Duration>,
    last_arrival: Instant,
    dead: Option<String>,
}

/// The most that was delivered in a second, of late.
#[derive(Default)]
struct Rate {
    since: Option<Instant>,
    highest: f64,
    /// Of the period before.
    before: f64,
}

/// Requests that move less say little about the link.
const TELLING_BYTES: usize = 32 << 10;
/// A rate is measured over so many times the way there and back, at the least.
const COURSE_WAYS: u32 = 5;
/// How long a measurement counts, at the least.
const RATE_PERIOD: Duration = Duration::from_secs(3);

impl Rate {
    fn add(&mut self, rate: f64, now: Instant) {
        let since = *self.since.get_or_insert(now);
        if now.duration_since(since) > RATE_PERIOD {
            self.since = Some(now);
            self.before = std::mem::take(&mut self.highest);
        }
        self.highest = self.highest.max(rate);
    }

    fn get(&self) -> f64 {
        self.highest.max(self.before)
    }
}

impl State {
    /// From when on a rate is measured at `now`, and what had been delivered then: since a request was sent, and for several times the way
    /// there and back. What was lost on the way and sent again lets much arrive at once.
    fn course(&mut self, pending: &Pending, now: Instant) -> (Instant, u64) {
        let least = self.nearest.unwrap_or_default() * COURSE_WAYS;
        while self.course.len() >= 2 && now.duration_since(self.course[1].0) >= least {
            self.course.pop_front();
        }
        self.course.push_back((now, self.delivered));
        let earlier = self.course[0];
        match earlier.0 < pending.sent_at && now.duration_since(pending.sent_at) < least {
            true => earlier,
            false => (pending.sent_at, pending.delivered),
        }
    }
}

struct Shared {
    link: Arc<dyn Link>,
    host: String,
    options: ClientOptions,
    state: Mutex<State>,
    room: Condvar,
    sending: Mutex<()>,
    rate: AtomicU64,
    sent: AtomicU64,
    received: AtomicU64,
}

/// One connection after its version handshake. Closes the link when dropped.
pub struct Client {
    shared: Arc<Shared>,
    extensions: Vec<(Vec<u8>, Vec<u8>)>,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Client {
    /// Shakes hands (SSH_FXP_INIT, version 3) and starts to receive.
    ///
    /// # Errors
    /// When the link ends or what answers does not speak SFTP version 3.
    pub fn connect(link: Arc<dyn Link>, host: &str, options: ClientOptions) -> Result<Client, Error> {
        let lost = |reason: String| Error::Disconnected { host: host.to_owned(), source: Some(Box::new(Lost(reason))) };
        let protocol = |what: &str| Error::Protocol { host: host.to_owned(), what: what.to_owned() };
        link.send(Bytes::from_static(&[0, 0, 0, 5, 1, 0, 0, 0, 3])).map_err(|error| lost(error.0))?;
        let mut buffer = BytesMut::new();
        let hello = loop {
            if let Some(packet) = take_packet(&mut buffer).map_err(|what| protocol(&what))? {
                break packet;
            }
            match link.recv() {
                Ok(Some(bytes)) => buffer.extend_from_slice(&bytes),
                Ok(None) => return Err(lost("the server closed the stream before it said its version".to_owned())),
                Err(error) => return Err(lost(error.0)),
            }
        };
        let mut fields = Fields(&hello);
        let version = (fields.u8(), fields.u32());
        if version != (Ok(2), Ok(3)) {
            return Err(protocol("it does not speak SFTP version 3"));
        }
        let mut extensions = Vec::new();
        while let (Ok(name), Ok(data)) = (fields.string(), fields.string()) {
            extensions.push((name.to_vec(), data.to_vec()));
        }
        let state = State {
            pending: HashMap::new(),
            next_id: 0,
            in_flight: 0,
            delivered: 0,
            rate: Rate::default(),
            course: VecDeque::new(),
            nearest: None,
            last_arrival: Instant::now(),
            dead: None,
        };
        let shared = Arc::new(Shared {
            link,
            host: host.to_owned(),
            options,
            state: Mutex::new(state),
            room: Condvar::new(),
            sending: Mutex::new(()),
            rate: AtomicU64::new(0),
            sent: AtomicU64::new(0),
            received: AtomicU64::new(0),
        });
        let receiving = Arc::clone(&shared);
        std::thread::Builder::new()
            .name("sftp-receive".to_owned())
            .spawn(move || {
                let reason = receiving.receive(buffer);
                receiving.die(&reason);
            })
            .map_err(|source| Error::Io { operation: "start a thread for", path: host.to_owned(), source })?;
        Ok(Client { shared, extensions })
    }

    /// What the server advertised: names and their data.
    pub fn extensions(&self) -> &[(Vec<u8>, Vec<u8>)] {
        &self.extensions
    }

    /// Whether the server advertised an extension with this version.
    pub fn has(&self, name: &str, version: &str) -> bool {
        self.extensions.iter().any(|(has, data)| has == name.as_bytes() && data == version.as_bytes())
    }

    /// For messages.
    pub fn host(&self) -> &str {
        &self.shared.host
    }

    /// Bytes a second that the link was seen to carry: what was delivered between the sending of a request and its answer,
    /// the most of the last seconds. A sender that has nothing to send makes it look slower, never faster.
    pub fn link_rate(&self) -> Option<f64> {
        match self.shared.rate.load(Ordering::Relaxed) {
            0 => None,
            rate => Some(rate as f64),
        }
    }

    /// The shortest time that an answer took: at least as long as the way there and back.
    pub fn round_trip(&self) -> Option<Duration> {
        locked(&self.shared.state).nearest
    }

    /// Whether the link has ended.
    pub fn is_dead(&self) -> bool {
        locked(&self.shared.state).dead.is_some()
    }

    /// Bytes of requests that wait for their answers.
    pub fn in_flight(&self) -> usize {
        locked(&self.shared.state).in_flight
    }

    /// Bytes of requests that were answered, and of their answers.
    pub fn delivered(&self) -> u64 {
        locked(&self.shared.state).delivered
    }

    /// Nothing is asked for.
    pub fn rests(&self) -> bool {
        locked(&self.shared.state).pending.is_empty()
    }

    /// Bytes sent and received so far.
    pub fn wire_bytes(&self) -> (u64, u64) {
        (self.shared.sent.load(Ordering::Relaxed), self.shared.received.load(Ordering::Relaxed))
    }

    /// Sends the packet that begins at `start` of `buffer` (length, type, number, fields; length and number are filled
    /// in) and has its completion sent to `channel`. Blocks while too much is in flight.
    ///
    /// # Errors
    /// When the link has ended.
    pub fn submit(&self, buffer: Vec<u8>, start: usize, tag: u64, channel: &Sender<Completion>) -> Result<(), Error> {
        self.shared.submit(buffer, start, tag, channel)
    }

    /// Sends a packet and waits for its answer. With `patient` as long as the link lives, for what may take the server
    /// hours (hashing a tree); else not longer than the time-out.
    ///
    /// # Errors
    /// When the link has ended or the time is over.
    pub fn call(&self, buffer: Vec<u8>, patient: bool) -> Result<Answer, Error> {
        let (sender, receiver) = unbounded();
        self.submit(buffer, 0, 0, &sender)?;
        self.wait(&receiver, patient)?.answer.map_err(|lost| self.lost(lost))
    }

    /// The next completion of `channel`.
    ///
    /// # Errors
    /// When nothing at all arrived for the length of the time-out.
    pub fn wait(&self, channel: &crossbeam_channel::Receiver<Completion>, patient: bool) -> Result<Completion, Error> {
        loop {
            match channel.recv_timeout(self.shared.options.timeout) {
                Ok(completion) => return Ok(completion),
                Err(RecvTimeoutError::Disconnected) => return Err(self.lost(Lost("the connection is gone".to_owned()))),
                Err(RecvTimeoutError::Timeout) if patient => {}
                Err(RecvTimeoutError::Timeout) => {
                    let quiet = locked(&self.shared.state).last_arrival.elapsed();
                    if quiet >= self.shared.options.timeout {
                        let reason = format!("no answer for {} seconds", quiet.as_secs());
                        self.shared.die(&reason);
                        return Err(self.lost(Lost(reason)));
                    }
                }
            }
        }
    }

    /// The error that ends the run when the link has ended.
    pub fn lost(&self, lost: Lost) -> Error {
        Error::Disconnected { host: self.shared.host.clone(), source: Some(Box::new(lost)) }
    }

    /// The error for an answer that makes no sense.
    pub fn protocol(&self, what: impl Into<String>) -> Error {
        Error::Protocol { host: self.shared.host.clone(), what: crate::error::said(what.into().as_bytes()) }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.shared.link.close();
    }
}

impl Shared {
    fn submit(&self, mut buffer: Vec<u8>, start: usize, tag: u64, channel: &Sender<Completion>) -> Result<(), Error> {
        let lost = |reason: &str| Error::Disconnected {
            host: self.host.clone(),
            source: Some(Box::new(Lost(reason.to_owned()))),
        };
        let bytes = buffer.len() - start;
        let mut state = locked(&self.state);
        while state.dead.is_none() && state.in_flight > 0 && state.in_flight + bytes > self.options.in_flight_bytes {
            state = self.room.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        if let Some(reason) = &state.dead {
            return Err(lost(reason));
        }
        while state.pending.contains_key(&state.next_id) {
            state.next_id = state.next_id.wrapping_add(1);
        }
        let id = state.next_id;
        state.next_id = id.wrapping_add(1);
        let sent_at = Instant::now();
        if state.pending.is_empty() {
            state.last_arrival = sent_at;
        }
        state.in_flight += bytes;
        let delivered = state.delivered;
        state.pending.insert(id, Pending { channel: channel.clone(), tag, bytes, sent_at, delivered });
        drop(state);
        buffer[start..start + 4].copy_from_slice(&(bytes as u32 - 4).to_be_bytes());
        buffer[start + 5..start + 9].copy_from_slice(&id.to_be_bytes());
        let packet = Bytes::from(buffer).slice(start..);
        let sent = {
            let _turn = locked(&self.sending);
            self.link.send(packet)
        };
        self.sent.fetch_add(bytes as u64, Ordering::Relaxed);
        if let Err(error) = sent {
            self.die(&error.0);
            return Err(lost(&error.0));
        }
        Ok(())
    }

    /// Receives until the end; gives the reason of the end.
    fn receive(&self, mut buffer: BytesMut) -> String {
        loop {
            loop {
                match take_packet(&mut buffer) {
                    Ok(Some(packet)) => {
                        if let Err(what) = self.complete(packet) {
                            return what;
                        }
                    }
                    Ok(None) => break,
                    Err(what) => return what,
                }
            }
            match self.link.recv() {
                Ok(Some(bytes)) => {
                    self.received.fetch_add(bytes.len() as u64, Ordering::Relaxed);
                    buffer.extend_from_slice(&bytes);
                }
                Ok(None) => return "the server closed the stream".to_owned(),
                Err(error) => return error.0,
            }
        }
    }

    fn complete(&self, packet: Bytes) -> Result<(), String> {
        if packet.len() < 5 {
            return Err("the server sent a packet without a number".to_owned());
        }
        let id = u32::from_be_bytes([packet[1], packet[2], packet[3], packet[4]]);
        let mut state = locked(&self.state);
        state.last_arrival = Instant::now();
        let Some(pending) = state.pending.remove(&id) else {
            return Err(format!("the server answered request {id}, which was not made"));
        };
        state.in_flight -= pending.bytes;
        self.measure(&mut state, &pending, packet.len());
        drop(state);
        self.room.notify_all();
        let answer = Ok(Answer { kind: packet[0], body: packet.slice(5..) });
        // Whoever asked may have gone.
        let _ = pending.channel.send(Completion { tag: pending.tag, answer });
        Ok(())
    }

    fn measure(&self, state: &mut State, pending: &Pending, answered: usize) {
        let bytes = pending.bytes + answered;
        state.delivered += bytes as u64;
        let now = state.last_arrival;
        let took = now.duration_since(pending.sent_at);
        state.nearest = Some(state.nearest.map_or(took, |nearest| nearest.min(took)));
        if bytes < TELLING_BYTES {
            return;
        }
        let (since, before) = state.course(pending, now);
        let seconds = now.duration_since(since).as_secs_f64().max(1e-6);
        state.rate.add((state.delivered - before) as f64 / seconds, now);
        self.rate.store(state.rate.get() as u64, Ordering::Relaxed);
    }

    fn die(&self, reason: &str) {
        let mut state = locked(&self.state);
        let reason = state.dead.get_or_insert_with(|| reason.to_owned()).clone();
        state.in_flight = 0;
        let orphans: Vec<Pending> = state.pending.drain().map(|(_, pending)| pending).collect();
        drop(state);
        self.room.notify_all();
        self.link.close();
        for orphan in orphans {
            let _ = orphan.channel.send(Completion { tag: orphan.tag, answer: Err(Lost(reason.clone())) });
        }
    }
}

/// What came where a packet should. A shell that refuses logins says so here, and so does a script that greets.
fn not_a_packet(length: usize, bytes: &[u8]) -> String {
    let line = bytes.split(|&byte| matches!(byte, b'\n' | b'\r')).find(|line| !line.is_empty()).unwrap_or_default();
    if !bytes[..4].iter().all(|&byte| matches!(byte, b'\n' | b'\r' | b'\t' | b' '..=b'~')) {
        return format!("it sent a packet of {length} bytes");
    }
    let said = Escaped(&line[..line.len().min(200)]);
    format!("instead of SFTP it said '{said}' (a shell that refuses logins, or a login script that prints)")
}

/// Takes a whole packet (without its length) from the front.
fn take_packet(buffer: &mut BytesMut) -> Result<Option<Bytes>, String> {
    let Some(length) = buffer.first_chunk::<4>().map(|length| u32::from_be_bytes(*length) as usize) else {
        return Ok(None);
    };
    if length == 0 || length > PACKET_MAX {
        return Err(not_a_packet(length, buffer));
    }
    if buffer.len() < 4 + length {
        buffer.reserve(4 + length - buffer.len());
        return Ok(None);
    }
    let _ = buffer.split_to(4);
    Ok(Some(buffer.split_to(length).freeze()))
}
