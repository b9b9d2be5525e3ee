//! `lockstep serve-connection`: the process of one connection of `lockstep serve`, which starts it. Not for people.

use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::Arc;

use tracing::{Event, Subscriber};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::layer::{Context, Layer};
use tracing_subscriber::prelude::*;

use super::memory::Memory;
use super::sftp_server::By;
use super::{Failure, journal, output};
use crate::endpoint::Error;
use crate::error::{Exit, chain};
use crate::server::agent::{Agent, Extensions, Factory, Limits, Output, SharedTarget};
use crate::server::channel::FedSession;
use crate::server::confine::{Identity, Wanted, names, trial};
use crate::server::hearsay;
use crate::server::listener::{SessionFactory, SessionStart};
use crate::server::metered::Metered;
use crate::server::process::{self, Level, Started, Upstream};
use crate::server::quota::Allowance;
use crate::server::session::{Session, SessionConfig};

/// The process of one connection; 'lockstep serve' starts it
#[derive(Debug, clap::Args)]
pub(super) struct ServeConnection {
    /// Address and port of the client
    peer: OsString,
}

impl ServeConnection {
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
        let factory: SessionFactory = Arc::new(session);
        let mut memory = Memory::new();
        process::run(started, &upstream, outgoing, factory, || memory.give_back()).map_err(failed)?;
        Ok(Exit::Done)
    }
}

/// The session of a channel: SFTP and the agent, both confined to the user's root.
fn session(start: &SessionStart, output: Arc<dyn Output>) -> Result<Box<dyn FedSession>, String> {
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
        Ok(Arc::new(Metered::new(target, allowance)) as SharedTarget)
    });
    // Another connection has another process: it cannot carry content of a run of this one.
    let factory = Arc::new(Factory { target, source: sides.source });
    let agent = Arc::new(Agent::limited(factory, Limits::default(), start.rights).alone());
    let extensions = Arc::clone(&agent) as Arc<dyn Extensions>;
    let session = Session::new(config, output, Some(extensions)).map_err(|error| chain(&error))?;
    Ok(Box::new(Whole { session: Some(session), agent: Some(agent) }))
}

/// A session that has ended when its agent has: the process ends after it, and what arrived is to be stored before.
struct Whole {
    session: Option<Session>,
    agent: Option<Arc<Agent>>,
}

impl FedSession for Whole {
    fn feed(&mut self, bytes: &[u8]) -> Result<(), String> {
        self.session.as_mut().map_or(Ok(()), |session| FedSession::feed(session, bytes))
    }

    fn finish(&mut self) {
        if let Some(session) = &mut self.session {
            session.finish();
        }
    }
}

impl Drop for Whole {
    fn drop(&mut self) {
        drop(self.session.take());
        if let Some(agent) = self.agent.take().and_then(Arc::into_inner) {
            agent.finish();
        }
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
