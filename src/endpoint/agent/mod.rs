//! A target or a source that a lockstep at the other end serves (`docs/protocol.md`), over one or more connections.

use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use crossbeam_channel::{Receiver, unbounded};

use crate::codec::{self, CompressOptions};
use crate::endpoint::client::{Answer, Client, ClientOptions, Completion};
use crate::endpoint::link::{Link, Remote, Way};
use crate::endpoint::pool::{Opener, Pool, Width};
use crate::endpoint::{BLOCK_BYTES, Error, spread};
use crate::error::Exit;
use crate::monitor::Monitor;
use crate::wire::extension::{self, Fields, WireError};
use crate::wire::notes;
use crate::wire::sftp::AGENT_PACKET_MAX;

mod alive;
mod compare;
mod ports;
mod reader;
mod source;
mod target;
mod writer;

pub use source::AgentSource;
pub use target::AgentTarget;

use alive::Alive;
use ports::Ports;

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

/// What an agent offers whose connections share a process.
const ATTACH: &str = "attach@lockstep.internal";

/// From so much on, or so many files, a run waits for a connection beside sshd, which is a few hundredths of a second.
const BULK_BYTES: u64 = 64 << 20;
const BULK_FILES: usize = 2000;

/// The connections to one agent.
pub struct Lanes {
    pool: Arc<Pool<Client>>,
    /// Where further ones come from, if the agent has a process of its own for each connection by the way in.
    ports: Option<Arc<Ports>>,
    /// What lets further connections work on the same run.
    token: Arc<OnceLock<Vec<u8>>>,
    root: Vec<u8>,
    compress: CompressOptions,
    /// The answer to `hello`, which is asked for when there is something to compress, and waited for when it is needed.
    hello: Receiver<Completion>,
    /// Whether it says that the agent reads and makes byte planes.
    planes: OnceLock<bool>,
    /// The first, which those that are opened beside it are kept alive by.
    _alive: Alive,
}

impl Lanes {
    /// Over `first`, which was opened by `way`, and as many further connections as `width` has.
    ///
    /// # Errors
    /// When no agent of this version answers the first.
    pub fn connect(
        remote: Arc<dyn Remote>,
        way: &Way,
        first: Arc<dyn Link>,
        width: impl Into<Width>,
        root: &[u8],
        compress: CompressOptions,
    ) -> Result<Lanes, Error> {
        let host = remote.describe();
        let first = Client::connect(first, &host, ClientOptions::default())?;
        let width = width.into();
        let (way, left) = (way.clone(), Arc::clone(&remote));
        let listens = !first.has(ATTACH, extension::VERSION) && first.has(extension::LISTEN, extension::VERSION);
        let beside = if listens && width.most > 1 { remote.beside() } else { None };
        let ports = beside.map(|beside| Arc::new(Ports::new(beside)));
        let open = move |number| {
            let link = remote.open(&way, number).ok()?;
            Client::connect(link, &remote.describe(), ClientOptions::default()).ok()
        };
        Lanes::of((first, Some(left)), (width, ports), Box::new(open), root, compress)
    }

    /// Over a connection that is there already, and those that `open` gives.
    ///
    /// # Errors
    /// When no agent of this version answers.
    pub fn over(
        first: Client,
        width: impl Into<Width>,
        open: Box<dyn Fn(usize) -> Option<Client> + Send + Sync>,
        root: &[u8],
        compress: CompressOptions,
    ) -> Result<Lanes, Error> {
        Lanes::of((first, None), (width.into(), None), open, root, compress)
    }

    fn of(
        (first, left): (Client, Option<Arc<dyn Remote>>),
        (width, ports): (Width, Option<Arc<Ports>>),
        open: Opener<Client>,
        root: &[u8],
        compress: CompressOptions,
    ) -> Result<Lanes, Error> {
        if !first.has("hello@lockstep.internal", extension::VERSION) {
            return Err(first.protocol("it is no lockstep agent of protocol version 1"));
        }
        let (sender, hello) = unbounded();
        if compress.enabled {
            first.submit(extension::request("hello"), 0, 0, &sender)?;
        }
        // An agent that sshd started has a process of its own for each connection: they cannot share a run, unless it listens.
        let shared = first.has(ATTACH, extension::VERSION) || ports.is_some();
        let width = if shared { width } else { Width::from(1) };
        let token = Arc::new(OnceLock::<Vec<u8>>::new());
        let first = Arc::new(first);
        let alive = Alive::keep(&first);
        let (known, beside, agent) = (Arc::clone(&token), ports.clone(), Arc::clone(&first));
        let attach = move |number| {
            let token = known.get().filter(|token| token.len() == 16)?;
            let Some(ports) = &beside else { return attached(open(number)?, token) };
            let (opens, first, token) = (Arc::clone(ports), Arc::clone(&agent), token.clone());
            let client = ports.in_time(agent.host(), move || attached(opens.open(&first)?, &token))?;
            ports.taken(agent.host());
            Some(client)
        };
        let pool = Arc::new(Pool::new(first, width, Box::new(attach), left));
        let (root, planes) = (root.to_vec(), OnceLock::new());
        Ok(Lanes { pool, ports, token, root, compress, hello, planes, _alive: alive })
    }

    /// Whether the agent takes and gives byte planes, which one that does not name them must never be sent or asked for.
    fn planes(&self) -> bool {
        *self.planes.get_or_init(|| {
            let names = || {
                let answer = self.control().wait(&self.hello, false).ok()?.answer.ok()?;
                let hello: serde_json::Value =
                    serde_json::from_slice(Fields(&body(self.control(), answer).ok()?).string().ok()?).ok()?;
                Some(hello["codecs"].as_array()?.iter().any(|name| name == codec::PLANES))
            };
            self.compress.enabled && names().unwrap_or(false)
        })
    }

    fn control(&self) -> &Client {
        self.pool.first()
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
        self.fits(&packet)?;
        self.call(packet)
    }

    /// Refuses a request that the other end would end the connection for.
    fn fits(&self, packet: &[u8]) -> Result<(), Error> {
        if packet.len() <= AGENT_PACKET_MAX {
            return Ok(());
        }
        let reason = format!(
            "the paths that are named are too many for one request (it has {} bytes, and {AGENT_PACKET_MAX} at most); name fewer at \
             a time, or the directories that they are in",
            packet.len()
        );
        Err(Error::Refused { by: self.describe(), reason })
    }

    /// Hears how much is to come. The first connection, which costs more where somebody else's server is in between, is left for what is
    /// done once, if there is much. A far host takes long to log in to, and what is spread goes over others soon.
    fn expect(&self, bytes: u64, files: usize) {
        let near = |ports: &Arc<Ports>| ports.is_near() || !spread::is_far(self.control());
        if (bytes >= BULK_BYTES || files >= BULK_FILES) && self.ports.as_ref().is_some_and(near) {
            self.pool.spare_first();
        }
    }

    /// Tells what came up of further connections.
    fn remark(&self, monitor: &dyn Monitor) {
        self.ports.iter().for_each(|ports| ports.tell(monitor));
    }

    /// Bytes sent and received over all connections.
    fn wire_bytes(&self) -> (u64, u64) {
        self.pool.wire_bytes()
    }

    /// Tells what a reply ends with.
    fn tell(&self, notes: Fields<'_>, monitor: &dyn Monitor) -> Result<(), Error> {
        notes::tell(notes, self.control().host(), monitor).map_err(|error| self.malformed(error))
    }

    fn malformed(&self, error: WireError) -> Error {
        self.control().protocol(error.to_string())
    }
}

/// A connection, once it works on the run that has this token.
fn attached(client: Client, token: &[u8]) -> Option<Client> {
    let mut packet = extension::request("attach");
    packet.extend_from_slice(token);
    client.call(packet, false).and_then(|answer| body(&client, answer)).ok()?;
    Some(client)
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
