//! A target or a source that a lockstep at the other end serves (`docs/protocol.md`), over one or more connections.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use bytes::Bytes;
use crossbeam_channel::{Receiver, unbounded};

use crate::codec::{self, CompressOptions};
use crate::endpoint::client::{Answer, Client, ClientOptions, Completion};
use crate::endpoint::link::{Link, Remote, Way};
use crate::endpoint::{BLOCK_BYTES, Error};
use crate::error::Exit;
use crate::monitor::Monitor;
use crate::wire::extension::{self, Fields, WireError};
use crate::wire::notes;

mod reader;
mod source;
mod spread;
mod target;
mod writer;

pub use source::AgentSource;
pub use target::AgentTarget;

/// What the lists of one run may take in memory, where a peer sends them: an eighth of what the machine has, and no more
/// than 1 GiB, which holds the entries of some five million files.
pub fn list_bytes_max() -> usize {
    usize::try_from(memory_bytes() / 8).unwrap_or(usize::MAX).min(1 << 30)
}

/// What the machine has.
pub fn memory_bytes() -> u64 {
    let found = rustix::system::sysinfo();
    u64::from(found.mem_unit).saturating_mul(found.totalram as u64)
}

/// Opens the connection with this number, or says that there is none.
type Opener = Box<dyn Fn(usize) -> Option<Client> + Send + Sync>;
/// A connection that was asked for; `None` inside when it could not be had.
type Slot = Mutex<Option<Option<Arc<Client>>>>;

/// The connections to one agent: the first carries what is done once, all of them carry content. Further ones are made
/// when a worker first needs them: a run with nothing to send makes none.
pub struct Lanes {
    first: Arc<Client>,
    further: Vec<Slot>,
    /// How many workers use each, the first too.
    users: Vec<AtomicUsize>,
    /// How many workers there are.
    alive: AtomicUsize,
    /// Workers have one of so many; the others are for large files that are spread.
    workers: usize,
    open: Opener,
    /// Who is told of connections that are of no more use.
    left: Option<Arc<dyn Remote>>,
    /// What lets further connections work on the same run.
    token: OnceLock<Vec<u8>>,
    turn: AtomicUsize,
    /// Bytes sent and received over connections that have ended.
    past: (AtomicU64, AtomicU64),
    root: Vec<u8>,
    compress: CompressOptions,
    /// The answer to `hello`, which is asked for when there is something to compress, and waited for when it is needed.
    hello: Receiver<Completion>,
    /// Whether it says that the agent reads and makes byte planes.
    planes: OnceLock<bool>,
}

impl Lanes {
    /// Over `first`, which was opened by `way`, and further connections up to `count`. Those may fail; the run goes on
    /// over the others.
    ///
    /// # Errors
    /// When no agent of this version answers the first.
    pub fn connect(
        remote: Arc<dyn Remote>,
        way: &Way,
        first: Arc<dyn Link>,
        count: usize,
        root: &[u8],
        compress: CompressOptions,
    ) -> Result<Lanes, Error> {
        let host = remote.describe();
        let first = Client::connect(first, &host, ClientOptions::default())?;
        let (way, left) = (way.clone(), Arc::clone(&remote));
        let open = move |number| {
            let link = remote.open(&way, number).ok()?;
            Client::connect(link, &remote.describe(), ClientOptions::default()).ok()
        };
        let lanes = Lanes::over(first, count, Box::new(open), root, compress)?;
        Ok(Lanes { left: Some(left), ..lanes })
    }

    /// Over a connection that is there already, and `open` for up to `count` in all.
    ///
    /// # Errors
    /// When no agent of this version answers.
    pub fn over(
        first: Client,
        count: usize,
        open: Opener,
        root: &[u8],
        compress: CompressOptions,
    ) -> Result<Lanes, Error> {
        if !first.has("hello@lockstep.internal", extension::VERSION) {
            return Err(first.protocol("it is no lockstep agent of protocol version 1"));
        }
        // An agent that sshd started has a process of its own for each connection: they cannot share a run.
        let shared = first.has("attach@lockstep.internal", extension::VERSION);
        let workers = if shared { count.max(1) } else { 1 };
        let further = (1..workers).map(|_| Slot::default()).collect();
        let users = (0..workers).map(|_| AtomicUsize::new(0)).collect();
        let (token, turn, past) = (OnceLock::new(), AtomicUsize::new(0), Default::default());
        let (sender, hello) = unbounded();
        if compress.enabled {
            first.submit(extension::request("hello"), 0, 0, &sender)?;
        }
        let (first, root, planes) = (Arc::new(first), root.to_vec(), OnceLock::new());
        Ok(Lanes {
            first,
            further,
            users,
            alive: AtomicUsize::new(0),
            workers,
            open,
            left: None,
            token,
            turn,
            past,
            root,
            compress,
            hello,
            planes,
        })
    }

    /// Over up to `most` connections where one file is sent alone and more bring more.
    #[must_use]
    pub fn wide(mut self, most: usize) -> Lanes {
        let shared = self.first.has("attach@lockstep.internal", extension::VERSION);
        let more = (self.further.len() + 1..most).filter(|_| shared);
        self.further.extend(more.map(|_| Slot::default()));
        self.users.resize_with(self.further.len() + 1, AtomicUsize::default);
        self
    }

    /// Whether the agent takes and gives byte planes, which one that does not name them must never be sent or asked for.
    fn planes(&self) -> bool {
        *self.planes.get_or_init(|| {
            let names = || {
                let answer = self.first.wait(&self.hello, false).ok()?.answer.ok()?;
                let hello: serde_json::Value =
                    serde_json::from_slice(Fields(&body(&self.first, answer).ok()?).string().ok()?).ok()?;
                Some(hello["codecs"].as_array()?.iter().any(|name| name == codec::PLANES))
            };
            self.compress.enabled && names().unwrap_or(false)
        })
    }

    fn control(&self) -> &Client {
        &self.first
    }

    fn describe(&self) -> String {
        format!("{}:{}", self.control().host(), crate::error::Escaped(&self.root))
    }

    /// A call over the first connection whose answer is a reply.
    fn call(&self, packet: Vec<u8>) -> Result<Bytes, Error> {
        let client = self.control();
        body(client, client.call(packet, true)?)
    }

    /// `name` with the root and options in JSON.
    fn start(&self, name: &str, options: &impl serde::Serialize) -> Result<Bytes, Error> {
        let mut packet = extension::request(name);
        extension::put_string(&mut packet, &self.root);
        extension::put_string(&mut packet, &json(options)?);
        self.call(packet)
    }

    /// The connection for the next worker, with its number. May take as long as it takes to log in.
    fn lane(&self) -> (usize, Arc<Client>) {
        let number = self.turn.fetch_add(1, Ordering::Relaxed) % self.workers;
        self.get(number).map_or_else(|| (0, Arc::clone(&self.first)), |client| (number, client))
    }

    /// The connection of this number, which is made when it is asked for first; `None` where it cannot be had.
    fn get(&self, number: usize) -> Option<Arc<Client>> {
        let Some(slot) = number.checked_sub(1).map(|at| &self.further[at]) else {
            return Some(Arc::clone(&self.first));
        };
        let mut slot = slot.lock().unwrap_or_else(PoisonError::into_inner);
        let open = || {
            let client = self.attached(number).map(Arc::new);
            if client.is_none() {
                // It may have logged in all the same.
                self.left.iter().for_each(|remote| remote.leave(number));
            }
            client
        };
        slot.get_or_insert_with(open).clone()
    }

    /// Whether the connection of this number was asked for in vain.
    fn is_lost(&self, number: usize) -> bool {
        let slot = number.checked_sub(1).and_then(|at| self.further.get(at));
        slot.is_some_and(|slot| slot.try_lock().is_ok_and(|slot| matches!(*slot, Some(None))))
    }

    /// A worker does not use the connection of this number any more; it ends when nobody does.
    fn leave(&self, number: usize, client: Option<Arc<Client>>) {
        self.users[number].fetch_sub(1, Ordering::Relaxed);
        drop(client);
        self.close_unused(number);
    }

    /// Ends the connection of this number, if nobody uses it.
    fn close_unused(&self, number: usize) {
        if self.users[number].load(Ordering::Relaxed) > 0 {
            return;
        }
        // Those that workers have stay for the next.
        let slot = number.checked_sub(1).and_then(|at| self.further.get(at));
        let Some(slot) = slot.filter(|_| number >= self.workers) else { return };
        if let Ok(mut slot) = slot.try_lock()
            && slot.as_ref().is_some_and(|had| had.as_ref().is_some_and(|client| Arc::strong_count(client) == 1))
        {
            let (sent, received) = slot.take().flatten().map_or((0, 0), |client| client.wire_bytes());
            self.past.0.fetch_add(sent, Ordering::Relaxed);
            self.past.1.fetch_add(received, Ordering::Relaxed);
            self.left.iter().for_each(|remote| remote.leave(number));
        }
    }

    fn attached(&self, number: usize) -> Option<Client> {
        let token = self.token.get().filter(|token| token.len() == 16)?;
        let client = (self.open)(number)?;
        let mut packet = extension::request("attach");
        packet.extend_from_slice(token);
        client.call(packet, false).and_then(|answer| body(&client, answer)).ok()?;
        Some(client)
    }

    /// Bytes sent and received over all connections.
    fn wire_bytes(&self) -> (u64, u64) {
        let further = self.further.iter().filter_map(|slot| {
            // One that is logging in is not waited for.
            let slot = slot.try_lock().ok()?;
            slot.as_ref()?.as_ref().map(|client| client.wire_bytes())
        });
        let past = (self.past.0.load(Ordering::Relaxed), self.past.1.load(Ordering::Relaxed));
        further.chain([past]).fold(self.first.wire_bytes(), |sum, one| (sum.0 + one.0, sum.1 + one.1))
    }

    /// Tells what a reply ends with.
    fn tell(&self, notes: Fields<'_>, monitor: &dyn Monitor) -> Result<(), Error> {
        notes::tell(notes, self.control().host(), monitor).map_err(|error| self.malformed(error))
    }

    fn malformed(&self, error: WireError) -> Error {
        self.control().protocol(error.to_string())
    }
}

fn json(options: &impl serde::Serialize) -> Result<Vec<u8>, Error> {
    serde_json::to_vec(options).map_err(|error| Error::Usage(format!("the options cannot be sent: {error}")))
}

/// What a reply holds; a status becomes the error it says.
fn body(client: &Client, answer: Answer) -> Result<Bytes, Error> {
    match answer.kind {
        extension::EXTENDED_REPLY => Ok(answer.body),
        extension::STATUS => {
            let mut fields = Fields(&answer.body);
            let read = (|| {
                let (code, message, _) = (fields.u32()?, fields.said()?, fields.string()?);
                Ok::<_, WireError>((code, message, fields.u8().unwrap_or(4)))
            })();
            let (_, message, exit) = read.map_err(|error| client.protocol(error.to_string()))?;
            let exit = match exit {
                1 => Exit::BadData,
                2 => Exit::Usage,
                3 => Exit::Trust,
                5 => Exit::Io,
                75 => Exit::TryAgain,
                _ => Exit::Incomplete,
            };
            Err(Error::Remote { message: format!("{}: {message}", client.host()), exit })
        }
        kind => Err(client.protocol(format!("an answer of type {kind}"))),
    }
}

const _: () = assert!(BLOCK_BYTES <= extension::RAW_MAX);
