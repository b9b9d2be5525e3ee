//! A target or a source that a lockstep at the other end serves (`docs/protocol.md`), over one or more connections.

use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;

use crate::codec::CompressOptions;
use crate::endpoint::client::{Answer, Client, ClientOptions};
use crate::endpoint::link::{Link, Remote, Way};
use crate::endpoint::{BLOCK_BYTES, Error};
use crate::error::Exit;
use crate::wire::extension::{self, Fields, WireError};

mod reader;
mod source;
mod target;
mod writer;

pub use source::AgentSource;
pub use target::AgentTarget;

/// The connections to one agent: the first carries what is done once, all of them carry content.
pub struct Lanes {
    clients: Vec<Client>,
    /// Those of `clients` that attached to the run.
    attached: OnceLock<Vec<usize>>,
    turn: AtomicUsize,
    root: Vec<u8>,
    compress: CompressOptions,
}

impl Lanes {
    /// Over `first`, which was opened by `way`, and further connections up to `count`. Those may fail; the run goes on
    /// over the others.
    ///
    /// # Errors
    /// When no agent of this version answers the first.
    pub fn connect(
        remote: &dyn Remote,
        way: &Way,
        first: Arc<dyn Link>,
        count: usize,
        root: &[u8],
        compress: CompressOptions,
    ) -> Result<Lanes, Error> {
        let host = remote.describe();
        let mut clients = vec![Client::connect(first, &host, ClientOptions::default())?];
        for number in 1..count {
            let Ok(link) = remote.open(way, number) else { break };
            let Ok(client) = Client::connect(link, &host, ClientOptions::default()) else { break };
            clients.push(client);
        }
        Lanes::over(clients, root, compress)
    }

    /// Over connections that are there already (at least one).
    ///
    /// # Errors
    /// When no agent of this version answers.
    pub fn over(clients: Vec<Client>, root: &[u8], compress: CompressOptions) -> Result<Lanes, Error> {
        let Some(first) = clients.first() else { return Err(Error::Usage("no connection".to_owned())) };
        if !first.has("hello@lockstep.internal", extension::VERSION) {
            return Err(first.protocol("it is no lockstep agent of protocol version 1"));
        }
        let (attached, turn) = (OnceLock::new(), AtomicUsize::new(0));
        Ok(Lanes { clients, attached, turn, root: root.to_vec(), compress })
    }

    fn control(&self) -> &Client {
        &self.clients[0]
    }

    /// Bytes over all connections, both directions.
    fn wire_bytes(&self) -> u64 {
        self.clients.iter().map(Client::wire_bytes).map(|(sent, received)| sent + received).sum()
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

    /// Attaches the further connections to the run.
    fn attach(&self, token: &[u8]) {
        let mut usable = vec![0];
        for (number, client) in self.clients.iter().enumerate().skip(1).filter(|_| token.len() == 16) {
            let mut packet = extension::request("attach");
            packet.extend_from_slice(token);
            if client.call(packet, false).and_then(|answer| body(client, answer)).is_ok() {
                usable.push(number);
            }
        }
        let _ = self.attached.set(usable);
    }

    /// The connection for the next worker.
    fn lane(&self) -> &Client {
        let usable = self.attached.get().map_or(&[0][..], Vec::as_slice);
        &self.clients[usable[self.turn.fetch_add(1, Ordering::Relaxed) % usable.len()]]
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
                let (code, message, _) = (fields.u32()?, fields.text()?, fields.string()?);
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
            let message = crate::error::Escaped(message.as_bytes()).to_string();
            Err(Error::Remote { message: format!("{}: {message}", client.host()), exit })
        }
        kind => Err(client.protocol(format!("an answer of type {kind}"))),
    }
}

const _: () = assert!(BLOCK_BYTES <= extension::RAW_MAX);
