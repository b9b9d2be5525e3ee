//! A host, its connections, and the streams over them.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use russh::client::{Config, Handle, Handler, Msg};
use russh::keys::{Algorithm, EcdsaCurve, HashAlg, PrivateKey, PublicKeyOrCertificate};
use russh::{Channel, ChannelMsg, Preferred};
use tokio::net::TcpStream;
use tokio::runtime::Runtime;

use super::auth;
use super::known_hosts::{KnownHost, REFUSED};
use super::link::ChannelLink;
use crate::endpoint::algorithms::{End, preferred};
use crate::endpoint::link::{ConnectError, Link, Remote, Way};
use crate::endpoint::stream::OverflowStream;
use crate::error::{Escaped, Exit};

/// Gives the passphrase of a key file, or `None` when there is nobody to ask.
pub type Passphrase = Arc<dyn Fn(&Path) -> Option<String> + Send + Sync>;

/// Which host, as whom, and what is trusted. Nothing is taken from the environment.
#[derive(Clone)]
pub struct SshOptions {
    /// Name or address, without brackets.
    pub host: String,
    /// The TCP port.
    pub port: u16,
    /// Who logs in.
    pub user: String,
    /// Private key files, tried in order.
    pub identity_files: Vec<PathBuf>,
    /// Socket of the agent.
    pub agent_socket: Option<PathBuf>,
    /// Files of trusted host keys; those that do not exist are empty. The first is named when a key is unknown.
    pub known_hosts: Vec<PathBuf>,
    /// How long each step until the login may take.
    pub connect_timeout: Duration,
    /// Asked for the passphrase of an encrypted key file.
    pub passphrase: Option<Passphrase>,
}

const WINDOW_BYTES: u32 = 64 << 20;
const PACKET_BYTES: u32 = 65535;
const KEEPALIVE: Duration = Duration::from_secs(15);
/// A login shell may take its time to start what was asked for.
const START_TIMEOUT: Duration = Duration::from_secs(60);

/// Decides on the host's key.
pub(super) struct Trust {
    known: Arc<KnownHost>,
    refusal: Arc<Mutex<Option<String>>>,
}

impl Handler for Trust {
    type Error = russh::Error;

    async fn check_server_key(&mut self, offered: &PublicKeyOrCertificate) -> Result<bool, russh::Error> {
        let verdict = match offered {
            PublicKeyOrCertificate::PublicKey { key, .. } => self.known.check(key),
            PublicKeyOrCertificate::Certificate(_) => {
                Err("the host offers a certificate, which was not asked for".into())
            }
        };
        Ok(match verdict {
            Ok(()) => true,
            Err(reason) => {
                *lock(&self.refusal) = Some(reason);
                false
            }
        })
    }
}

/// One connection, logged in.
pub(super) struct Connection {
    handle: Handle<Trust>,
    // Tasks of the connection run on it; the last user ends it.
    _runtime: Arc<OwnRuntime>,
}

struct OwnRuntime(Option<Runtime>);

impl OwnRuntime {
    fn block_on<F: Future>(&self, future: F) -> Option<F::Output> {
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
    opened: Mutex<Vec<(PathBuf, Arc<PrivateKey>)>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl SshRemote {
    /// Prepares; nothing is connected yet.
    ///
    /// # Errors
    /// When the options cannot be used or no thread can be started.
    pub fn new(options: SshOptions) -> Result<SshRemote, ConnectError> {
        let wrong = |message: String| ConnectError { message, exit: Exit::Usage, not_offered: false };
        let odd = |c: char| c.is_control() || c.is_whitespace() || ",[]*?!|#@".contains(c);
        if options.host.is_empty() || options.host.starts_with('-') || options.host.contains(odd) {
            return Err(wrong(format!("'{}' is not the name of a host", Escaped(options.host.as_bytes()))));
        }
        if options.user.is_empty() {
            return Err(wrong(format!("no user to log in to {} as; write user@host", options.host)));
        }
        let runtime =
            tokio::runtime::Builder::new_multi_thread().thread_name("ssh").enable_all().build().map_err(|error| {
                ConnectError { message: format!("no threads for ssh: {error}"), exit: Exit::Io, not_offered: false }
            })?;
        Ok(SshRemote {
            options,
            runtime: Arc::new(OwnRuntime(Some(runtime))),
            connections: Mutex::default(),
            opened: Mutex::default(),
        })
    }

    fn failed(&self, what: impl std::fmt::Display, exit: Exit) -> ConnectError {
        ConnectError { message: format!("{}: {what}", self.describe()), exit, not_offered: false }
    }

    fn block_on<T>(&self, future: impl Future<Output = Result<T, ConnectError>>) -> Result<T, ConnectError> {
        self.runtime.block_on(future).unwrap_or_else(|| Err(self.failed("already ended", Exit::TryAgain)))
    }

    fn connection(&self, number: usize) -> Result<Arc<Connection>, ConnectError> {
        let slot = Arc::clone(lock(&self.connections).entry(number).or_default());
        let mut slot = lock(&slot);
        if let Some(connection) = slot.as_ref().filter(|connection| !connection.handle.is_closed()) {
            return Ok(Arc::clone(connection));
        }
        let handle = self.block_on(self.connect())?;
        let connection = Arc::new(Connection { handle, _runtime: Arc::clone(&self.runtime) });
        *slot = Some(Arc::clone(&connection));
        Ok(connection)
    }

    async fn dial(&self) -> Result<TcpStream, ConnectError> {
        let SshOptions { host, port, connect_timeout, .. } = &self.options;
        let again = |what: String| self.failed(what, Exit::TryAgain);
        let found = tokio::time::timeout(*connect_timeout, tokio::net::lookup_host((host.as_str(), *port)))
            .await
            .map_err(|_| again("its address was not found in time".into()))?
            .map_err(|error| again(format!("its address was not found: {error}; check the name")))?;
        let mut last = "it has no address; check the name".to_owned();
        for address in found {
            match tokio::time::timeout(*connect_timeout, TcpStream::connect(address)).await {
                Ok(Ok(stream)) => {
                    stream.set_nodelay(true).map_err(|error| again(error.to_string()))?;
                    return Ok(stream);
                }
                Ok(Err(error)) => last = format!("cannot connect to {address}: {error}"),
                Err(_) => last = format!("{address} did not answer within {} s", connect_timeout.as_secs_f32()),
            }
        }
        Err(again(last))
    }

    async fn connect(&self) -> Result<Handle<Trust>, ConnectError> {
        let SshOptions { host, port, known_hosts, connect_timeout, .. } = &self.options;
        let known = KnownHost::read(host, *port, known_hosts).map_err(|reason| self.failed(reason, REFUSED))?;
        let config = Arc::new(config(&known.algorithms()));
        let stream = self.dial().await?;
        let refusal = Arc::new(Mutex::new(None));
        let trust = Trust { known: Arc::new(known), refusal: Arc::clone(&refusal) };
        // Its writes never block, so that bulk in both directions cannot stop both ends.
        let (stream, _kill) = OverflowStream::new(stream);
        let shaken = tokio::time::timeout(*connect_timeout, russh::client::connect_stream(config, stream, trust)).await;
        let mut handle = match shaken {
            Ok(Ok(handle)) => handle,
            Ok(Err(error)) => {
                let refused = lock(&refusal).take();
                return Err(match refused {
                    Some(reason) => ConnectError { message: reason, exit: REFUSED, not_offered: false },
                    None => self.failed(format_args!("the handshake failed: {error}"), Exit::TryAgain),
                });
            }
            Err(_) => return Err(self.failed("the handshake took too long", Exit::TryAgain)),
        };
        auth::log_in(&mut handle, &self.options, &self.opened)
            .await
            .map_err(|reason| self.failed(reason, Exit::Trust))?;
        Ok(handle)
    }

    fn start(&self, way: &Way, number: usize) -> Result<Arc<dyn Link>, ConnectError> {
        let connection = self.connection(number)?;
        let again = |error: russh::Error| self.failed(format_args!("no channel: {error}"), Exit::TryAgain);
        self.block_on(async {
            let started = tokio::time::timeout(START_TIMEOUT, async {
                let mut channel = connection.handle.channel_open_session().await.map_err(again)?;
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
                let early = self.started(&mut channel, what).await?;
                Ok((channel, early))
            });
            let (channel, early) = started
                .await
                .map_err(|_| self.failed("the host did not start what was asked for", Exit::TryAgain))??;
            let link = ChannelLink::start(channel, Arc::clone(&connection), self.describe(), early);
            Ok(Arc::new(link) as Arc<dyn Link>)
        })
    }

    /// Waits for the answer to the request; gives what data came before it.
    async fn started(&self, channel: &mut Channel<Msg>, what: &str) -> Result<Vec<bytes::Bytes>, ConnectError> {
        let mut early = Vec::new();
        loop {
            match channel.wait().await {
                Some(ChannelMsg::Success) => return Ok(early),
                Some(ChannelMsg::Failure) => {
                    let _ = channel.close().await;
                    let reason = format!("{what} is not offered there");
                    return Err(ConnectError { not_offered: true, ..self.failed(reason, Exit::Usage) });
                }
                Some(ChannelMsg::Data { data }) => early.push(data),
                Some(ChannelMsg::Close) | None => {
                    return Err(self.failed(format_args!("the host closed the channel for its {what}"), Exit::TryAgain));
                }
                Some(_) => {}
            }
        }
    }
}

/// Algorithms and sizes; host keys of the types on file come first.
fn config(known: &[String]) -> Config {
    let mut keys = vec![
        Algorithm::Ed25519,
        Algorithm::Ecdsa { curve: EcdsaCurve::NistP256 },
        Algorithm::Ecdsa { curve: EcdsaCurve::NistP384 },
        Algorithm::Ecdsa { curve: EcdsaCurve::NistP521 },
        Algorithm::Rsa { hash: Some(HashAlg::Sha512) },
        Algorithm::Rsa { hash: Some(HashAlg::Sha256) },
    ];
    let on_file = |key: &Algorithm| match key {
        Algorithm::Rsa { .. } => known.iter().any(|name| name == "ssh-rsa"),
        key => known.iter().any(|name| name == key.as_str()),
    };
    keys.sort_by_key(|key| !on_file(key));
    Config {
        window_size: WINDOW_BYTES,
        maximum_packet_size: PACKET_BYTES,
        channel_buffer_size: 4096,
        keepalive_interval: Some(KEEPALIVE),
        keepalive_max: 4,
        nodelay: true,
        preferred: Preferred { key: keys.into(), ..preferred(End::Client) },
        ..Config::default()
    }
}

impl Remote for SshRemote {
    fn open(&self, way: &Way, connection: usize) -> Result<Arc<dyn Link>, ConnectError> {
        self.start(way, connection)
    }

    fn exec(&self, command: &str) -> Result<Arc<dyn Link>, ConnectError> {
        self.start(&Way::LockstepExec(command.to_owned()), 0)
    }

    fn describe(&self) -> String {
        let SshOptions { host, port, user, .. } = &self.options;
        let user = Escaped(user.as_bytes());
        if host.contains(':') { format!("{user}@[{host}]:{port}") } else { format!("{user}@{host}:{port}") }
    }
}
