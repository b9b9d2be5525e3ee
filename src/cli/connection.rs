//! `lockstep serve-connection`: the process of one connection of `lockstep serve`, which starts it. Not for people.

use std::ffi::OsString;
use std::fs::File;
use std::net::IpAddr;
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;

use tracing::{Event, Subscriber};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::layer::{Context, Layer};
use tracing_subscriber::prelude::*;

use super::memory::Memory;
use super::sftp_server::{By, Served};
use super::{Failure, journal, output};
use crate::config::DataPorts;
use crate::endpoint::Error;
use crate::endpoint::local::beneath;
use crate::error::{Exit, chain};
use crate::server::agent::{self, Agent, Extensions, Factory, Limits, Output, SharedTarget};
use crate::server::channel::FedSession;
use crate::server::confine::{Identity, Wanted, names, trial};
use crate::server::hearsay;
use crate::server::listener::{SessionFactory, SessionStart};
use crate::server::metered::Metered;
use crate::server::ports;
use crate::server::process::{self, Lane, Level, Relay, Started, Upstream};
use crate::server::quota::Allowance;
use crate::server::session::{Session, SessionConfig};
use crate::server::stdio;
use crate::wire::extension;

/// Bytes of a token of `attach`.
const TOKEN: usize = 16;

/// The process of one connection; 'lockstep serve' starts it
#[derive(Debug, clap::Args)]
pub(super) struct ServeConnection {
    /// Address and port of the client
    peer: OsString,
    /// The number of the connection
    number: u64,
}

impl ServeConnection {
    /// As the listener starts it. The definition of the whole command line takes megabytes, which each process would keep.
    pub(super) fn started(arguments: &[OsString]) -> Option<ServeConnection> {
        let [_, command, peer, number] = arguments else { return None };
        let number = number.to_str()?.parse().ok().filter(|_| command == "serve-connection")?;
        Some(ServeConnection { peer: peer.clone(), number })
    }

    pub(super) fn run(self) -> Result<Exit, Failure> {
        let failed =
            |error: std::io::Error| Failure::usage(format!("serve-connection: {}", crate::error::in_words(&error)));
        let started = Started::take(&self.peer).map_err(failed)?;
        let (upstream, outgoing) = Upstream::new();
        let filter = EnvFilter::try_from_env("LOCKSTEP_LOG").unwrap_or_else(|_| EnvFilter::new("info,russh=error"));
        let library = Library(upstream.clone()).with_filter(EnvFilter::new("off,russh=warn"));
        let lines = Lines(upstream.clone()).with_filter(filter);
        let _ = tracing_subscriber::registry().with(library).with(lines).try_init();
        // Standard error leads nowhere.
        std::panic::set_hook(Box::new(|panic| tracing::error!("a mistake of the program: {panic}")));
        agent::set_origin(self.number);
        let factory = |lane| -> SessionFactory { Arc::new(move |start, output| session(&lane, start, output)) };
        let mut memory = Memory::new();
        process::run(started, &upstream, outgoing, factory, || memory.give_back()).map_err(failed)?;
        Ok(Exit::Done)
    }
}

/// What the sessions of a process have: SFTP and the agent, both confined to the user's root.
fn sides(start: &SessionStart) -> (SessionConfig, Arc<Agent>) {
    let config = SessionConfig {
        root: start.root.clone(),
        confine: true,
        rights: start.rights,
        quota: start.quota,
        policy: start.policy.clone(),
        actor: start.actor.clone(),
        login: start.login.clone(),
    };
    let by = By { actor: start.actor.clone(), login: start.login.clone() };
    let sides = super::sftp_server::factory(start.root.clone(), true, start.policy.clone(), &by);
    let open = sides.target;
    let limited = start.quota.map(|quota| (start.root.clone(), quota));
    let target = Box::new(move |path: &[u8]| {
        let target = by.attributed(open(path)?);
        let Some((root, quota)) = &limited else { return Ok(target) };
        let allowance = Allowance::open(root, *quota);
        let allowance = allowance.map_err(|error| Error::Refused { by: "the server".into(), reason: chain(&error) })?;
        Ok(Arc::new(Metered::new(target, allowance, beneath(path)?)) as SharedTarget)
    });
    let factory = Arc::new(Factory { target, source: sides.source, veil: sides.veil });
    (config, Arc::new(Agent::limited(factory, Limits::default(), start.rights)))
}

/// The session of a channel.
fn session(lane: &Arc<Lane>, start: &SessionStart, output: Arc<dyn Output>) -> Result<Box<dyn FedSession>, String> {
    let (config, agent) = sides(start);
    let extensions = Arc::clone(&agent) as Arc<dyn Extensions>;
    let session = Session::new(config, Arc::clone(&output), Some(extensions));
    let session = session.map_err(|error| crate::error::chain(&error))?;
    let (lane, start) = (Arc::clone(lane), start.clone());
    let head = Some(Vec::new());
    let served = Served::new(session, agent);
    Ok(Box::new(Whole { served, head, told: 0, relay: None, lane, start, output }))
}

/// A further connection of a run of this process, which another process passes on.
fn serve_lane(start: &SessionStart, stream: UnixStream) {
    let (config, agent) = sides(start);
    let extensions = Arc::clone(&agent) as Arc<dyn Extensions>;
    let kept = stream.try_clone();
    let ends = stream.try_clone().map(|other| (File::from(OwnedFd::from(stream)), File::from(OwnedFd::from(other))));
    let ended = ends.and_then(|(input, out)| stdio::over(input, out, config, Some(extensions)));
    // Whoever passes it on reads until it ends, and others here have it still.
    kept.into_iter().for_each(|stream| drop(stream.shutdown(Shutdown::Both)));
    if let Err(error) = ended {
        tracing::debug!("a further connection of a run ended: {}", crate::error::in_words(&error));
    }
    if let Some(agent) = Arc::into_inner(agent) {
        agent.finish();
    }
}

/// A longer first packet is of a session of this process, whatever comes behind it.
const FIRST_MAX: usize = 64;

/// A session of a connection, or of the run of another process; this one ends after it.
struct Whole {
    served: Served,
    /// The first packets, until it is known whether the client wants to work on the run of another process.
    head: Option<Vec<u8>>,
    /// So many bytes of them the session has.
    told: usize,
    relay: Option<Relay>,
    lane: Arc<Lane>,
    start: SessionStart,
    output: Arc<dyn Output>,
}

impl Whole {
    /// Looks at the second packet of a client, which says that it belongs to a run; a first one of it goes to the session.
    fn decide(&mut self, mut head: Vec<u8>) -> Result<(), String> {
        let wanted = extension::request("attach");
        let whole = |bytes: &[u8]| Some(4 + u32::from_be_bytes(*bytes.first_chunk()?) as usize);
        let Some(first) = whole(&head) else { return self.wait(head) };
        // That of a client which wants to work on another's run says nothing but its version.
        if first > FIRST_MAX {
            return self.go_on(&head);
        }
        if first > head.len() {
            return self.wait(head);
        }
        let second = &head[first..];
        let Some(length) = whole(second) else { return self.wait(head) };
        if length != wanted.len() + TOKEN {
            return self.go_on(&head);
        }
        if second.len() < length {
            return self.wait(head);
        }
        // Behind length, kind and number, of which the latter is the client's.
        let (named, token) = (&second[9..wanted.len()], &second[wanted.len()..length]);
        if second[4] != extension::EXTENDED || *named != wanted[9..] {
            return self.go_on(&head);
        }
        match self.lane.relay(token, Arc::clone(&self.output)) {
            None => self.go_on(&head),
            Some(mut relay) => {
                head.drain(..first);
                let fed = relay.feed(&head).map_err(|error| crate::error::in_words(&error));
                self.relay = Some(relay);
                fed
            }
        }
    }

    /// The client waits for the answer to its first packet before it says more.
    fn wait(&mut self, head: Vec<u8>) -> Result<(), String> {
        self.head = Some(head);
        Ok(())
    }

    /// It is a session of this process.
    fn go_on(&mut self, head: &[u8]) -> Result<(), String> {
        let start = self.start.clone();
        self.lane.accept(move |stream| serve_lane(&start, stream));
        let told = self.told;
        self.served.feed(&head[told..])
    }
}

impl FedSession for Whole {
    fn feed(&mut self, bytes: &[u8]) -> Result<(), String> {
        if let Some(relay) = &mut self.relay {
            return relay.feed(bytes).map_err(|error| crate::error::in_words(&error));
        }
        match self.head.take() {
            None => self.served.feed(bytes),
            Some(mut head) => {
                head.extend_from_slice(bytes);
                // The first packet is answered at once.
                let first = head.first_chunk().map(|length| 4 + u32::from_be_bytes(*length) as usize);
                if let Some(first) = first.filter(|&first| self.told == 0 && first <= head.len() && first <= FIRST_MAX)
                {
                    self.told = first;
                    self.served.feed(&head[..first])?;
                }
                self.decide(head)
            }
        }
    }

    fn finish(&mut self) {
        if let Some(head) = self.head.take() {
            let told = self.told;
            let _ = self.served.feed(&head[told..]);
        }
        if let Some(relay) = &mut self.relay {
            relay.finish();
        }
        self.served.finish();
    }
}

/// What is logged here is told to the listener, which alone writes the log.
struct Lines(Upstream);

impl<S: Subscriber> Layer<S> for Lines {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let level = match *event.metadata().level() {
            tracing::Level::ERROR => Level::Error,
            tracing::Level::WARN => Level::Warn,
            tracing::Level::INFO => Level::Info,
            _ => Level::Debug,
        };
        self.0.say(level, &journal::words(event));
    }
}

/// Some refusals are made by the SSH library, and only its log says why.
struct Library(Upstream);

impl<S: Subscriber> Layer<S> for Library {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        if let Some(reason) = hearsay::refusal(&journal::words(event)) {
            self.0.refused(reason);
        }
    }
}

/// Look up names of users and groups for a confined process; 'lockstep sftp-server' starts it
#[derive(Debug, clap::Args)]
pub(super) struct LookUpNames;

impl LookUpNames {
    pub(super) fn run(self) -> Result<Exit, Failure> {
        let failed = |error| Failure::usage(format!("look-up-names: {}", crate::error::in_words(&error)));
        names::serve().map_err(failed)?;
        Ok(Exit::Done)
    }
}

/// Listen for further connections of a run, and hand them over; 'lockstep sftp-server' starts it
#[derive(Debug, clap::Args)]
pub(super) struct HandOverConnections {
    /// The address to listen at
    address: IpAddr,
    /// The only address to take connections from
    client: IpAddr,
    /// On one of these ports
    ports: DataPorts,
}

impl HandOverConnections {
    pub(super) fn run(self) -> Result<Exit, Failure> {
        let failed = |error| Failure::usage(format!("{}: {}", ports::COMMAND, crate::error::in_words(&error)));
        let HandOverConnections { address, client, ports } = self;
        ports::hand_over(&ports::Place { address, client, ports }).map_err(failed)?;
        Ok(Exit::Done)
    }
}

/// Confine this process as a session's, and try what it can do all the same; 'lockstep doctor' starts it
#[derive(Debug, clap::Args)]
pub(super) struct TryConfinement {
    /// The directory to be confined to; files are made in it
    root: PathBuf,
    /// As for a user who may only read
    #[arg(long)]
    read_only: bool,
    /// As for a user with run_as
    #[arg(long, value_name = "USER")]
    run_as: Option<String>,
}

impl TryConfinement {
    pub(super) fn run(self) -> Result<Exit, Failure> {
        let failed = |message: String| Failure::Plain { exit: Exit::Incomplete, message };
        let identity = self.run_as.as_deref().map(Identity::of).transpose().map_err(failed)?;
        let wanted =
            Wanted { root: &self.root, read_only: self.read_only, identity: identity.as_ref(), require: false };
        let trial = trial::run(&wanted).map_err(failed)?;
        let text = serde_json::to_string(&trial).map_err(|error| failed(error.to_string()))?;
        output(format!("{text}\n").as_bytes())?;
        let good = trial.could.is_empty() && trial.could_not.is_empty();
        Ok(if good { Exit::Done } else { Exit::Incomplete })
    }
}
