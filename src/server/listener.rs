//! The listener: SSH with public keys only, file sessions only.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use russh::keys::{Algorithm, EcdsaCurve, HashAlg, PrivateKey};
use russh::server::Config;
use russh::{MethodKind, MethodSet};
use tokio::net::TcpListener;
use tokio::sync::watch;

use super::access::Access;
use super::agent::Output;
use super::channel::{FedSession, Summary};
use super::connection;
use super::door::{Door, Turned};
use super::host_key::{self, HostKeyError};
use super::limits::Limits;
use super::live::{Live, Registry};
use super::record::Recorder;
use super::resolve;
use super::strict::Offered;

pub use super::access::{ServeKey, ServeUser, Which};
use crate::audit::{AuditError, AuditRecord};
use crate::config::{AddressList, Origins, Penalties, Quota, Rights, ServeLimits};
use crate::endpoint::algorithms::{End, preferred};
use crate::policy::PolicySpec;

/// What to listen on, for whom and within which limits.
#[derive(Debug, Clone)]
pub struct ServeConfig {
    /// Where to listen.
    pub listen: Vec<SocketAddr>,
    /// The host key's file; made when missing.
    pub host_key: PathBuf,
    /// A certificate for it; read anew by a reload.
    pub host_certificate: Option<PathBuf>,
    /// Who may log in.
    pub users: Vec<ServeUser>,
    /// Who may come from where, beside what each user says.
    pub origins: Origins,
    /// For how long an address is refused that fails again and again.
    pub penalties: Penalties,
    /// Addresses without penalties.
    pub penalty_exempt: Option<AddressList>,
    /// Keys that are refused whoever lists them; read anew at each login.
    pub revoked_keys: Option<PathBuf>,
    /// A directory for the record of logins, sessions and refusals.
    pub audit: Option<PathBuf>,
    /// Refuse clients without strict key exchange (CVE-2023-48795). Without, the one cipher that needs it is not offered.
    pub strict_key_exchange: bool,
    /// How much is allowed.
    pub limits: ServeLimits,
}

impl ServeConfig {
    /// With the usual limits.
    pub fn new(listen: SocketAddr, host_key: PathBuf, users: Vec<ServeUser>) -> Self {
        let limits = ServeLimits::default();
        let (host_certificate, revoked_keys, audit, strict_key_exchange) = (None, None, None, true);
        Self {
            listen: vec![listen],
            host_key,
            host_certificate,
            users,
            origins: Origins::default(),
            penalties: Penalties::default(),
            penalty_exempt: None,
            revoked_keys,
            audit,
            strict_key_exchange,
            limits,
        }
    }
}

/// For whom a session is started.
#[derive(Debug, Clone)]
pub struct SessionStart {
    /// The user who logged in.
    pub user: String,
    /// The user's root.
    pub root: PathBuf,
    /// By the user's settings or by the key's.
    pub rights: Rights,
    /// How much may lie beneath the root.
    pub quota: Option<Quota>,
    /// The receiver's rules for what arrives.
    pub policy: PolicySpec,
    /// Where from.
    pub peer: SocketAddr,
    /// The key that signed, as `SHA256:…`.
    pub fingerprint: String,
    /// All of that in a line, for audit logs: `user@address (SHA256:…)`.
    pub actor: String,
}

/// Makes the session of a channel. It is called on a thread that may block.
pub type SessionFactory =
    Arc<dyn Fn(&SessionStart, Arc<dyn Output>) -> Result<Box<dyn FedSession>, String> + Send + Sync>;

/// Why the listener does not run.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The host key.
    #[error(transparent)]
    HostKey(#[from] HostKeyError),
    /// The record of logins.
    #[error(transparent)]
    Audit(#[from] AuditError),
    /// The address.
    #[error(
        "cannot listen on {address}: {}; name a free port and an address of this machine with --listen",
        crate::error::in_words(reason)
    )]
    Listen {
        /// The address asked for.
        address: SocketAddr,
        /// Why.
        reason: std::io::Error,
    },
    /// A user's settings.
    #[error("user {user}: {reason}")]
    User {
        /// The user.
        user: String,
        /// What is wrong.
        reason: String,
    },
    /// The list of what is revoked.
    #[error("nobody could log in: {0}")]
    Revoked(String),
}

/// What a reload replaces. A connection asks for it each time it needs it.
pub(super) struct Settings {
    pub(super) access: Access,
    pub(super) limits: ServeLimits,
    pub(super) protocol: Arc<Config>,
    pub(super) offered: Arc<Offered>,
}

/// What all connections share.
pub(super) struct Server {
    settings: RwLock<Arc<Settings>>,
    pub(super) limits: Arc<Limits>,
    pub(super) door: Door,
    pub(super) live: Registry,
    pub(super) recorder: Recorder,
    pub(super) factory: SessionFactory,
    stopping: AtomicBool,
    number: AtomicU64,
}

impl Server {
    pub(super) fn settings(&self) -> Arc<Settings> {
        Arc::clone(&self.settings.read().unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) fn stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    /// A record to be filled in. Addresses are those the packets came from.
    pub(super) fn record(&self, actor: &str, peer: SocketAddr) -> AuditRecord {
        AuditRecord { actor: actor.to_owned(), source: peer.to_string(), ..AuditRecord::default() }
    }

    /// Says what went through a session.
    pub(super) fn session_ended(&self, live: &Live, start: &SessionStart, took: Duration, summary: Summary) {
        let Summary { received, sent, error } = summary;
        let seconds = took.as_secs_f64();
        let (peer, user) = (live.peer, &start.user);
        match &error {
            None => tracing::info!(%peer, user, received, sent, seconds, "session ended"),
            Some(error) => tracing::warn!(%peer, user, received, sent, seconds, error, "session ended"),
        }
        let why = error.map(|error| format!("; {error}")).unwrap_or_default();
        let reason = Some(format!("received {received} and sent {sent} bytes in {seconds:.1} s{why}"));
        self.recorder.note(AuditRecord { action: "session".into(), reason, ..self.record(&start.actor, peer) });
    }
}

/// A bound listener.
pub struct Listener {
    sockets: Vec<(TcpListener, SocketAddr)>,
    config: ServeConfig,
    settings: Arc<Settings>,
    problems: Vec<String>,
    recorder: Recorder,
    key: PrivateKey,
    /// `SHA256:…` of the host key.
    pub fingerprint: String,
}

/// Binds; the ports are known before anything is accepted.
///
/// # Errors
/// [`ServeError`].
pub async fn bind(config: ServeConfig) -> Result<Listener, ServeError> {
    bind_with(config, Vec::new()).await
}

/// The same with sockets that listen already, each with its address and set not to block; where there is none, those of the
/// configuration are made.
///
/// # Errors
/// [`ServeError`].
pub async fn bind_with(
    config: ServeConfig,
    passed: Vec<(std::net::TcpListener, SocketAddr)>,
) -> Result<Listener, ServeError> {
    let key = host_key::load_or_create(&config.host_key)?;
    let (settings, problems) = prepare(&config, &key)?;
    let settings = Arc::new(settings);
    let recorder = config.audit.as_deref().map_or_else(|| Ok(Recorder::default()), Recorder::open)?;
    let fingerprint = key.public_key().fingerprint(HashAlg::Sha256).to_string();
    let mut sockets = Vec::new();
    let own = if passed.is_empty() { config.listen.as_slice() } else { &[] };
    for (socket, address) in passed {
        let socket = TcpListener::from_std(socket).map_err(|reason| ServeError::Listen { address, reason })?;
        sockets.push((socket, address));
    }
    for &address in own {
        let listen = |reason| ServeError::Listen { address, reason };
        let socket = TcpListener::bind(address).await.map_err(listen)?;
        let bound = socket.local_addr().map_err(listen)?;
        sockets.push((socket, bound));
    }
    Ok(Listener { sockets, config, settings, problems, recorder, key, fingerprint })
}

/// What would keep a server from starting, or people from logging in, as far as the files tell. No address is taken, and no
/// key is made.
pub fn look(config: &ServeConfig) -> (Vec<ServeError>, Vec<String>) {
    let mut wrong = Vec::new();
    match host_key::find(&config.host_key) {
        Ok(Some(key)) => {
            let certificate = config.host_certificate.as_deref().map(|path| host_key::certificate(path, &key));
            wrong.extend(certificate.and_then(Result::err).map(ServeError::HostKey));
        }
        Ok(None) => {}
        Err(error) => wrong.push(error.into()),
    }
    wrong.extend(config.users.iter().filter_map(no_root));
    let problems = access(config).look();
    let problems = problems.unwrap_or_else(|reason| {
        wrong.push(ServeError::Revoked(reason));
        Vec::new()
    });
    (wrong, problems)
}

fn no_root(user: &ServeUser) -> Option<ServeError> {
    resolve::look(user).map(|reason| ServeError::User { user: user.name.clone(), reason })
}

fn access(config: &ServeConfig) -> Access {
    Access::new(&config.users, config.origins.clone(), config.revoked_keys.clone())
}

/// Checks what can be checked before anybody comes; beside the settings comes what will refuse people later.
fn prepare(config: &ServeConfig, key: &PrivateKey) -> Result<(Settings, Vec<String>), ServeError> {
    if let Some(error) = config.users.iter().find_map(no_root) {
        return Err(error);
    }
    let access = access(config);
    let problems = access.look().map_err(ServeError::Revoked)?;
    let (protocol, offered) = protocol(config, key)?;
    let limits = config.limits.clone();
    Ok((Settings { access, limits, protocol: Arc::new(protocol), offered: Arc::new(offered) }, problems))
}

/// How the SSH library is to behave, and the names of what it is to agree to.
fn protocol(config: &ServeConfig, key: &PrivateKey) -> Result<(Config, Offered), HostKeyError> {
    let mut methods = MethodSet::empty();
    methods.push(MethodKind::PublicKey);
    let mut preferred = preferred(End::Server);
    // Without SHA-1.
    preferred.key = vec![
        Algorithm::Ed25519,
        Algorithm::Ecdsa { curve: EcdsaCurve::NistP256 },
        Algorithm::Ecdsa { curve: EcdsaCurve::NistP384 },
        Algorithm::Ecdsa { curve: EcdsaCurve::NistP521 },
        Algorithm::Rsa { hash: Some(HashAlg::Sha512) },
        Algorithm::Rsa { hash: Some(HashAlg::Sha256) },
    ]
    .into();
    if !config.strict_key_exchange {
        preferred.cipher.to_mut().retain(|name| *name != russh::cipher::CHACHA20_POLY1305);
    }
    let host_keys = match key.algorithm() {
        Algorithm::Rsa { .. } => {
            preferred.key.iter().filter(|name| matches!(name, Algorithm::Rsa { .. })).cloned().collect()
        }
        algorithm => vec![algorithm],
    };
    let offered = Offered::new(&preferred, &host_keys, config.strict_key_exchange);
    let certificates = config.host_certificate.iter().map(|path| host_key::certificate(path, key));
    let certificates = certificates.collect::<Result<_, _>>()?;
    let protocol = Config {
        methods,
        auth_rejection_time: Duration::from_millis(500),
        auth_rejection_time_initial: Some(Duration::ZERO),
        keys: vec![key.clone()],
        certificates,
        window_size: 32 << 20,
        maximum_packet_size: 256 << 10,
        channel_buffer_size: 1024,
        event_buffer_size: 256,
        // OpenSSH's clients ask for "none" first, which is no try.
        max_auth_attempts: config.limits.auth_tries.get() + 1,
        // Answers to keepalives reset it: idle clients are found otherwise.
        inactivity_timeout: Some(config.limits.idle_timeout + Duration::from_secs(60)),
        keepalive_interval: Some(Duration::from_secs(30)),
        nodelay: true,
        preferred,
        ..Config::default()
    };
    Ok((protocol, offered))
}

fn warn(problems: &[String]) {
    problems.iter().for_each(|problem| tracing::warn!("{problem}"));
}

/// Binds and serves until `shutdown` holds true.
///
/// # Errors
/// [`ServeError`].
pub async fn serve(
    config: ServeConfig,
    factory: SessionFactory,
    shutdown: watch::Receiver<bool>,
) -> Result<(), ServeError> {
    bind(config).await?.run(factory, shutdown).await;
    Ok(())
}

impl Listener {
    /// The first address that is listened on.
    pub fn local_addr(&self) -> SocketAddr {
        self.sockets.first().map_or_else(|| SocketAddr::from(([0, 0, 0, 0], 0)), |(_, address)| *address)
    }

    /// All addresses that are listened on.
    pub fn addresses(&self) -> Vec<SocketAddr> {
        self.sockets.iter().map(|(_, address)| *address).collect()
    }

    /// What is to run, and how it is reloaded meanwhile.
    pub fn start(self, factory: SessionFactory) -> (Running, Reloader) {
        warn(&self.problems);
        let server = Arc::new(Server {
            limits: Limits::new(self.settings.limits.clone()),
            door: Door::new(self.config.penalties.clone(), self.config.penalty_exempt.clone()),
            settings: RwLock::new(self.settings),
            live: Registry::default(),
            recorder: self.recorder,
            factory,
            stopping: AtomicBool::new(false),
            number: AtomicU64::new(0),
        });
        let sockets = self.sockets.into_iter().map(|(socket, _)| socket).collect();
        let reloader = Reloader { server: Arc::clone(&server), key: self.key, config: self.config };
        (Running { server, sockets }, reloader)
    }

    /// Accepts until `shutdown` holds true (or its sender is gone), then lets work end for the time set.
    pub async fn run(self, factory: SessionFactory, shutdown: watch::Receiver<bool>) {
        self.start(factory).0.run(shutdown).await;
    }
}

/// A listener with its sessions.
pub struct Running {
    server: Arc<Server>,
    sockets: Vec<TcpListener>,
}

/// How long a client must have done nothing to be let go at once when the server stops.
const QUIET: Duration = Duration::from_secs(1);
/// How long connections may take to end when they must.
const END: Duration = Duration::from_secs(5);

impl Running {
    /// Accepts until `shutdown` holds true (or its sender is gone). Then clients that do nothing are let go, and the
    /// others may go on for the time set.
    pub async fn run(self, mut shutdown: watch::Receiver<bool>) {
        let Running { server, sockets } = self;
        let accepting: Vec<_> =
            sockets.into_iter().map(|socket| tokio::spawn(accept(Arc::clone(&server), socket))).collect();
        let _ = shutdown.wait_for(|stop| *stop).await;
        accepting.iter().for_each(tokio::task::JoinHandle::abort);
        drop(accepting);
        server.stopping.store(true, Ordering::Release);
        let (grace, begun) = (server.settings().limits.stop_grace, Instant::now());
        tracing::info!(connections = server.limits.connections(), "stopping");
        while server.limits.connections() > 0 && begun.elapsed() < grace {
            for live in server.live.all() {
                if live.login.get().is_none() || server.live.quiet(&live) >= QUIET {
                    live.end("the server stops");
                }
            }
            tokio::time::sleep(Duration::from_millis(25)).await;
        }
        let left = server.limits.connections();
        if left > 0 {
            tracing::warn!(
                connections = left,
                "cut off: they were still at work; what they sent is gone on with later"
            );
            server.live.all().iter().for_each(|live| live.end("the server stops"));
        }
        let begun = Instant::now();
        while server.limits.connections() + server.limits.sessions() > 0 && begun.elapsed() < END {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        server.recorder.flush().await;
        tracing::info!("stopped");
    }
}

async fn accept(server: Arc<Server>, socket: TcpListener) {
    loop {
        let (socket, peer) = match socket.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "cannot accept");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        // An IPv4 client of a listener for both is shown as what it is.
        let peer = SocketAddr::new(peer.ip().to_canonical(), peer.port());
        let settings = server.settings();
        let admitted = server.door.admit(&settings.access, &settings.limits, peer.ip(), server.limits.waiting());
        match admitted.and_then(|()| server.limits.admit(peer.ip()).map_err(Turned::Limit)) {
            Ok(permit) => {
                let number = server.number.fetch_add(1, Ordering::Relaxed);
                tokio::spawn(connection::serve(Arc::clone(&server), socket, peer, number, Arc::new(permit)));
            }
            Err(turned) => {
                // As OpenSSH's server says it; before the version such lines are allowed.
                if let Some(farewell) = turned.farewell() {
                    let _ = socket.try_write(farewell.as_bytes());
                }
                turn_away(&server, peer, turned);
            }
        }
    }
}

/// Who is turned away is said and recorded once a second for each kind, with the number of those before: they may come in
/// floods.
fn turn_away(server: &Server, peer: SocketAddr, turned: Turned) {
    let Some(more) = server.door.count(turned) else { return };
    let reason = turned.reason();
    tracing::warn!(%peer, reason, more, "connection refused");
    let reason = Some(if more == 0 { reason.to_owned() } else { format!("{reason}; and {more} before it") });
    server.recorder.note_stranger(AuditRecord { action: "refuse".into(), reason, ..server.record("", peer) });
}

/// Replaces users and limits while the listener runs.
pub struct Reloader {
    server: Arc<Server>,
    key: PrivateKey,
    config: ServeConfig,
}

impl Reloader {
    /// How many connections were turned away before a byte was exchanged, and why; empty where none was.
    pub fn turned_away(&self) -> String {
        self.server.door.turned_away()
    }

    /// How many clients are connected.
    pub fn connections(&self) -> usize {
        self.server.limits.connections()
    }

    /// From now on `config` decides. Who may no longer be here, or under other conditions, is ended.
    ///
    /// Addresses, host key and audit log stay as they are until the next start.
    ///
    /// # Errors
    /// [`ServeError`]; then everything stays as it was.
    pub async fn reload(&self, config: ServeConfig) -> Result<(), ServeError> {
        let (settings, problems) = prepare(&config, &self.key)?;
        warn(&problems);
        let fixed = |config: &ServeConfig| (config.listen.clone(), config.host_key.clone(), config.audit.clone());
        if fixed(&config) != fixed(&self.config) {
            tracing::warn!("a change of listen, host_key or audit takes effect at the next start");
        }
        let access = settings.access.clone();
        self.server.limits.set(settings.limits.clone());
        self.server.door.set(config.penalties.clone(), config.penalty_exempt.clone());
        *self.server.settings.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(settings);
        let all = self.server.live.all();
        let ended = tokio::task::spawn_blocking(move || {
            all.iter().filter(|live| rejudge(&access, live).map_err(|reason| live.end(&reason)).is_err()).count()
        });
        let ended = ended.await.unwrap_or(0);
        tracing::info!(users = config.users.len(), ended, "configuration reloaded");
        Ok(())
    }
}

/// Whether a connection may go on.
fn rejudge(access: &Access, live: &Live) -> Result<(), String> {
    let Some(login) = live.login.get() else { return Ok(()) };
    let (user, grant) = access.judge(&login.user.name, &login.proof, live.peer)?;
    let same = *user == *login.user && grant == login.grant;
    if same { Ok(()) } else { Err("the user's settings have changed".into()) }
}
