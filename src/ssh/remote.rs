//! A host, its connections, and the streams over them.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use russh::client::{Handle, Msg};
use russh::{Channel, ChannelMsg};
use tokio::runtime::Runtime;

use super::auth::{Login, Opened};
use super::beside::Side;
use super::credit::NEAR;
use super::dial;
use super::foreword::Foreword;
use super::identity::Identities;
use super::known_hosts::KnownHost;
use super::link::ChannelLink;
use super::lock;
use super::options::SshOptions;
use super::trust::{Heard, Trust};
use crate::endpoint::beside::Beside;
use crate::endpoint::link::{ConnectError, Link, Remote, Way};
use crate::endpoint::stream::OverflowStream;
use crate::error::Exit;

/// A login shell may take its time to start what was asked for.
pub(super) const START_TIMEOUT: Duration = Duration::from_secs(60);
/// What sshd allows a login to take; agents and passphrases may need a person.
const LOGIN_TIMEOUT: Duration = Duration::from_secs(120);

/// One connection, logged in.
pub(super) struct Connection {
    pub(super) handle: Handle<Trust>,
    heard: Arc<Heard>,
    /// The host answers at once.
    near: bool,
    /// The address that answered, where nothing stands in between.
    host: Option<SocketAddr>,
    /// What it runs through.
    _jump: Option<Box<Connection>>,
    // Tasks of the connection run on it; the last user ends it.
    _runtime: Arc<OwnRuntime>,
}

impl Connection {
    /// Through nothing.
    pub(super) fn direct(
        handle: Handle<Trust>,
        heard: Arc<Heard>,
        host: Option<SocketAddr>,
        runtime: Arc<OwnRuntime>,
    ) -> Connection {
        Connection { handle, heard, near: false, host, _jump: None, _runtime: runtime }
    }

    /// Will hold why it ended.
    pub(super) fn last_words(&self) -> Arc<Heard> {
        Arc::clone(&self.heard)
    }

    /// Whether the host is known to answer at once.
    pub(super) fn is_near(&self) -> bool {
        self.near
    }
}

/// The bytes below SSH.
pub(super) struct Below {
    pub(super) stream: dial::Stream,
    /// The connection that they run through.
    jump: Option<Box<Connection>>,
    /// Whether the host is known to be near.
    near: bool,
    /// The address that answered, where nothing stands in between.
    host: Option<SocketAddr>,
}

pub(super) struct OwnRuntime(Option<Runtime>);

impl OwnRuntime {
    pub(super) fn start() -> Result<Arc<OwnRuntime>, ConnectError> {
        let built = tokio::runtime::Builder::new_multi_thread().thread_name("ssh").enable_all().build();
        let runtime = built.map_err(|error| ConnectError {
            message: format!("no threads for ssh: {error}"),
            exit: Exit::Io,
            not_offered: false,
            patience: Duration::ZERO,
        })?;
        Ok(Arc::new(OwnRuntime(Some(runtime))))
    }

    pub(super) fn block_on<F: Future>(&self, future: F) -> Option<F::Output> {
        self.0.as_ref().map(|runtime| runtime.block_on(future))
    }
}

impl Drop for OwnRuntime {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

type Slot = Arc<Mutex<Option<Arc<Connection>>>>;

/// A host reached by SSH. Its methods block and must not be called from async code.
pub struct SshRemote {
    options: SshOptions,
    runtime: Arc<OwnRuntime>,
    connections: Mutex<HashMap<usize, Slot>>,
    opened: Opened,
    notes: Vec<String>,
    /// The host was reached and is trusted, but let nobody in.
    refused: AtomicBool,
    /// It did not let the last stream be opened.
    crowded: AtomicBool,
}

pub(super) fn failed(options: &SshOptions, what: impl std::fmt::Display, exit: Exit) -> ConnectError {
    let message = format!("{}: {what}", options.describe());
    ConnectError { message, exit, not_offered: false, patience: Duration::ZERO }
}

impl SshRemote {
    /// Prepares; nothing is connected yet.
    ///
    /// # Errors
    /// When the options cannot be used or no thread can be started.
    pub fn new(options: SshOptions) -> Result<SshRemote, ConnectError> {
        options.check().map_err(|message| ConnectError {
            message,
            exit: Exit::Usage,
            not_offered: false,
            patience: Duration::ZERO,
        })?;
        let runtime = OwnRuntime::start()?;
        Ok(SshRemote {
            options,
            runtime,
            connections: Mutex::default(),
            opened: Mutex::default(),
            notes: Vec::new(),
            refused: AtomicBool::new(false),
            crowded: AtomicBool::new(false),
        })
    }

    /// Adds what was left out of the configuration.
    #[must_use]
    pub fn with_notes(self, notes: Vec<String>) -> SshRemote {
        SshRemote { notes, ..self }
    }

    /// What was left out of the configuration, for whoever wants to know.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Connects and logs in, and asks for nothing more.
    ///
    /// # Errors
    /// [`ConnectError`].
    pub fn log_in(&self) -> Result<(), ConnectError> {
        self.connection(0).map(drop)
    }

    /// Whether the host could be reached and is trusted, but let nobody in.
    pub fn was_refused(&self) -> bool {
        self.refused.load(Ordering::Relaxed)
    }

    /// Whether the host did not let the last stream be opened, whatever was to run over it: it has as many as it allows.
    pub fn was_crowded(&self) -> bool {
        self.crowded.load(Ordering::Relaxed)
    }

    /// Whether the first connection was made and has broken since, rather than a stream over it.
    pub fn was_lost(&self) -> bool {
        let slot = lock(&self.connections).get(&0).cloned();
        let connection = slot.and_then(|slot| lock(&slot).clone());
        connection.is_some_and(|connection| connection.heard.said().is_some() || connection.handle.is_closed())
    }

    /// Closes all connections but the first, each when nobody uses it any more.
    pub fn keep_first(&self) {
        let further = |number: &usize| *number > 0;
        let closed: Vec<Slot> =
            lock(&self.connections).extract_if(|number, _| further(number)).map(|(_, slot)| slot).collect();
        drop(closed);
    }

    pub(super) fn options(&self) -> &SshOptions {
        &self.options
    }

    pub(super) fn failed(&self, what: impl std::fmt::Display, exit: Exit) -> ConnectError {
        failed(&self.options, what, exit)
    }

    pub(super) fn block_on<T>(&self, future: impl Future<Output = Result<T, ConnectError>>) -> Result<T, ConnectError> {
        self.runtime.block_on(future).unwrap_or_else(|| Err(self.failed("already ended", Exit::TryAgain)))
    }

    pub(super) fn connection(&self, number: usize) -> Result<Arc<Connection>, ConnectError> {
        let slot = Arc::clone(lock(&self.connections).entry(number).or_default());
        let mut slot = lock(&slot);
        if let Some(connection) = slot.as_ref().filter(|connection| !connection.handle.is_closed()) {
            return Ok(Arc::clone(connection));
        }
        let connection = Arc::new(self.block_on(self.connect(&self.options))?);
        *slot = Some(Arc::clone(&connection));
        Ok(connection)
    }

    /// Connects and logs in, through as many hosts as there are on the way.
    fn connect<'a>(
        &'a self,
        options: &'a SshOptions,
    ) -> Pin<Box<dyn Future<Output = Result<Connection, ConnectError>> + 'a>> {
        Box::pin(async move {
            let trust = |reason| failed(options, reason, Exit::Trust);
            let identities = Identities::read(&options.identity_files, &options.certificate_files).map_err(trust)?;
            let known = KnownHost::read(options).map_err(trust)?;
            let Below { stream, jump, near, host } = self.stream(options).await?;
            let (mut handle, heard) = shake(options, known, stream).await?;
            let login = Login::new(&mut handle, options, &identities, &self.opened, &heard).run();
            let late = ("the login took too long".to_owned(), Exit::TryAgain);
            let logged_in = tokio::time::timeout(LOGIN_TIMEOUT, login).await.unwrap_or(Err(late));
            logged_in.map_err(|(reason, exit)| {
                // Of a host on the way nothing can be said to the one behind it.
                let refused = exit == Exit::Trust && std::ptr::eq(options, &self.options);
                self.refused.store(refused, Ordering::Relaxed);
                failed(options, reason, exit)
            })?;
            Ok(Connection { handle, heard, near, host, _jump: jump, _runtime: Arc::clone(&self.runtime) })
        })
    }

    /// The bytes below SSH.
    pub(super) async fn stream(&self, options: &SshOptions) -> Result<Below, ConnectError> {
        match (&options.jump, &options.proxy_command) {
            (None, None) => {
                let (stream, round_trip, host) = dial::direct(options).await?;
                Ok(Below { stream, jump: None, near: round_trip < NEAR, host: Some(host) })
            }
            (None, Some(command)) => {
                Ok(Below { stream: dial::by_command(command, options)?, jump: None, near: false, host: None })
            }
            (Some(jump), _) => {
                let connection = self.connect(jump).await?;
                let stream = dial::through(&connection.handle, jump, options).await?;
                Ok(Below { stream, jump: Some(Box::new(connection)), near: false, host: None })
            }
        }
    }

    fn start(&self, way: &Way, number: usize) -> Result<Arc<dyn Link>, ConnectError> {
        let connection = self.connection(number)?;
        let again = |error: russh::Error| self.failed(format_args!("no channel: {error}"), Exit::TryAgain);
        self.block_on(async {
            let started = tokio::time::timeout(START_TIMEOUT, async {
                let opened = connection.handle.channel_open_session().await;
                let crowded = matches!(opened, Err(russh::Error::ChannelOpenFailure(_)));
                self.crowded.store(crowded, Ordering::Relaxed);
                let mut channel = opened.map_err(again)?;
                let what = match way {
                    Way::LockstepSubsystem => "subsystem lockstep",
                    Way::SftpSubsystem => "subsystem sftp",
                    Way::LockstepExec(_) => "command",
                };
                match way {
                    Way::LockstepSubsystem => channel.request_subsystem(true, "lockstep").await,
                    Way::SftpSubsystem => channel.request_subsystem(true, "sftp").await,
                    Way::LockstepExec(command) => channel.exec(true, command.as_bytes()).await,
                }
                .map_err(again)?;
                let early = started(&self.options, &mut channel, what).await?;
                Ok((channel, early))
            });
            let (channel, early) = started
                .await
                .map_err(|_| self.failed("the host did not start what was asked for", Exit::TryAgain))??;
            let link = ChannelLink::start(channel, Arc::clone(&connection), self.describe(), early).await;
            Ok(Arc::new(link) as Arc<dyn Link>)
        })
    }
}

/// Waits for the answer to the request; gives what data came before it.
pub(super) async fn started(
    options: &SshOptions,
    channel: &mut Channel<Msg>,
    what: &str,
) -> Result<Vec<bytes::Bytes>, ConnectError> {
    let mut early = Vec::new();
    loop {
        match channel.wait().await {
            Some(ChannelMsg::Success) => return Ok(early),
            Some(ChannelMsg::Failure) => {
                let _ = channel.close().await;
                let reason = format!("{what} is not offered there");
                return Err(ConnectError { not_offered: true, ..failed(options, reason, Exit::Usage) });
            }
            Some(ChannelMsg::Data { data }) => early.push(data),
            Some(ChannelMsg::Close) | None => {
                let reason = format_args!("the host closed the channel for its {what}");
                return Err(failed(options, reason, Exit::TryAgain));
            }
            Some(_) => {}
        }
    }
}

/// Agrees on keys with a host that has one of those that are known.
pub(super) async fn shake(
    options: &SshOptions,
    known: KnownHost,
    stream: dial::Stream,
) -> Result<(Handle<Trust>, Arc<Heard>), ConnectError> {
    let mut config = dial::config(options, &known.algorithms());
    if known.has_authority() {
        config.preferred.host_key_certificates = config.preferred.key.clone();
    }
    let heard = Arc::new(Heard::default());
    let trust = Trust::new(known, options.unknown_host, Arc::clone(&heard));
    let (stream, foreword) = Foreword::of(stream);
    // Its writes never block, so that bulk in both directions cannot stop both ends.
    let (stream, _kill) = OverflowStream::new(stream);
    let shaken = russh::client::connect_stream(Arc::new(config), stream, trust);
    match tokio::time::timeout(options.connect_timeout, shaken).await {
        Ok(Ok(handle)) => Ok((handle, heard)),
        Ok(Err(stop)) => {
            let words = foreword.words().map(|words| format!("the host says '{words}'"));
            let (message, exit) = stop.explain(&options.describe(), words.or_else(|| heard.said()));
            let patience = if exit == Exit::TryAgain { foreword.patience() } else { Duration::ZERO };
            Err(ConnectError { message, exit, not_offered: false, patience })
        }
        Err(_) => Err(failed(options, "the handshake took too long", Exit::TryAgain)),
    }
}

impl Remote for SshRemote {
    fn open(&self, way: &Way, connection: usize) -> Result<Arc<dyn Link>, ConnectError> {
        self.start(way, connection)
    }

    fn exec(&self, command: &str, connection: usize) -> Result<Arc<dyn Link>, ConnectError> {
        self.start(&Way::LockstepExec(command.to_owned()), connection)
    }

    fn leave(&self, connection: usize) {
        lock(&self.connections).remove(&connection);
    }

    fn beside(&self) -> Option<Arc<dyn Beside>> {
        let slot = lock(&self.connections).get(&0).cloned()?;
        let connection = lock(&slot).clone()?;
        let side = Side::new(connection.host?, connection.near, &self.options, Arc::clone(&self.runtime))?;
        Some(Arc::new(side))
    }

    fn describe(&self) -> String {
        self.options.describe()
    }
}
