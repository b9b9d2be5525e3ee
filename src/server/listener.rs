//! The listener: SSH with public keys only, file sessions only.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use russh::keys::ssh_key::LineEnding;
use russh::keys::{HashAlg, PrivateKey};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};

use super::access::Access;
use super::agent::Output;
use super::channel::FedSession;
use super::confine::{Available, Identity};
use super::connection;
use super::door::{Door, Turned};
use super::host_key::{self, HostKeyError};
use super::limits::Limits;
use super::live::{Live, Registry, refresh};
use super::process::message::{Setup, frame};
use super::record::Recorder;
use super::resolve;
use super::watch::watch;

pub use super::access::{ServeKey, ServeUser, Which};
use crate::audit::{self, AuditError, AuditRecord, Login, Outcome};
use crate::config::{AddressList, Confine, Origins, Penalties, Quota, Rights, ServeLimits};
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
    /// How audit logs are kept, that of the listener and those of roots.
    pub log: audit::Settings,
    /// Refuse clients without strict key exchange (CVE-2023-48795). Without, the one cipher that needs it is not offered.
    pub strict_key_exchange: bool,
    /// What happens where the kernel cannot confine the process of a connection.
    pub confine: Confine,
    /// How much is allowed.
    pub limits: ServeLimits,
}

impl ServeConfig {
    /// With the usual limits.
    pub fn new(listen: SocketAddr, host_key: PathBuf, users: Vec<ServeUser>) -> Self {
        let limits = ServeLimits::default();
        let (host_certificate, revoked_keys, directory, strict_key_exchange) = (None, None, None, true);
        Self {
            listen: vec![listen],
            host_key,
            host_certificate,
            users,
            origins: Origins::default(),
            penalties: Penalties::default(),
            penalty_exempt: None,
            revoked_keys,
            audit: directory,
            log: audit::Settings::default(),
            strict_key_exchange,
            confine: Confine::default(),
            limits,
        }
    }
}

/// For whom a session is started.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SessionStart {
    /// The user who logged in.
    pub user: String,
    /// The user's root.
    #[serde(with = "super::process::message::path")]
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
    /// The same in the fields of an audit line.
    pub login: Login,
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
    /// What the kernel lacks.
    #[error(
        "confine = 'require', and this kernel has no {0}; see 'lockstep doctor', or let in whom it can confine with \
         confine = 'when-possible'"
    )]
    Confine(String),
}

/// What a reload replaces. A connection asks for it each time it needs it.
pub(super) struct Settings {
    pub(super) access: Access,
    pub(super) limits: ServeLimits,
    pub(super) confine: Confine,
    /// The first message to each process.
    pub(super) setup: Arc<[u8]>,
}

/// What all connections share.
pub(super) struct Server {
    settings: RwLock<Arc<Settings>>,
    pub(super) limits: Arc<Limits>,
    pub(super) door: Door,
    pub(super) live: Registry,
    pub(super) recorder: Recorder,
    /// How many sessions there may be in a connection.
    pub(super) channels: watch::Sender<usize>,
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
        let login = Login { peer: Some(peer.to_string()), ..Login::default() };
        let (actor, source) = (actor.to_owned(), peer.to_string());
        AuditRecord { actor, source, login: Some(Box::new(login)), ..AuditRecord::default() }
    }

    /// The same of somebody who has logged in.
    pub(super) fn record_of(&self, start: &SessionStart, peer: SocketAddr) -> AuditRecord {
        AuditRecord { login: Some(Box::new(start.login.clone())), ..self.record(&start.actor, peer) }
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
    audit::configure(config.log.clone());
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
    wrong.extend(config.users.iter().filter_map(|user| no_identity(user, false)));
    wrong.extend(lacking(config.confine).0);
    let problems = access(config).look();
    let problems = problems.unwrap_or_else(|reason| {
        wrong.push(ServeError::Revoked(reason));
        Vec::new()
    });
    (wrong, problems.into_iter().chain(config.users.iter().filter_map(other_root)).collect())
}

fn no_root(user: &ServeUser) -> Option<ServeError> {
    resolve::look(user).map(|reason| ServeError::User { user: user.name.clone(), reason })
}

fn access(config: &ServeConfig) -> Access {
    Access::new(&config.users, config.origins.clone(), config.revoked_keys.clone())
}

/// Why sessions of the user cannot run as whom they should. `here`: by this very process.
fn no_identity(user: &ServeUser, here: bool) -> Option<ServeError> {
    let look = |name: &String| {
        let identity = Identity::of(name)?;
        identity.can_follow(&user.policy)?;
        user.keys.iter().filter_map(|key| key.policy.as_ref()).try_for_each(|policy| identity.can_follow(policy))?;
        if here { identity.reachable() } else { Ok(()) }
    };
    let reason = user.run_as.as_ref()?;
    look(reason).err().map(|reason| ServeError::User { user: user.name.clone(), reason })
}

/// A root of somebody else: what lies in it as the state of lockstep has to belong to whoever runs.
fn other_root(user: &ServeUser) -> Option<String> {
    use std::os::unix::fs::MetadataExt as _;
    let identity = Identity::of(user.run_as.as_deref()?).ok()?;
    let own = user.keys.iter().filter_map(|key| Some((key.root.as_ref()?, key.rights.unwrap_or(user.rights))));
    let mut written = own.chain([(&user.root, user.rights)]).filter(|(_, rights)| rights.writes());
    let others = |root: &PathBuf| {
        let root = resolve::fixed_root(root)?;
        (std::fs::metadata(&root).ok()?.uid() != identity.uid).then_some(root)
    };
    let root = crate::error::shown(&written.find_map(|(root, _)| others(root))?).to_string();
    let name = &identity.name;
    Some(format!(
        "user {}: root {root} does not belong to '{name}', whom its sessions run as; run: chown {name} {root}",
        user.name
    ))
}

/// What the kernel lacks to confine sessions, where that must not be and where it is only to be known.
fn lacking(confine: Confine) -> (Option<ServeError>, Option<String>) {
    match (Available::look().missing(), confine) {
        (missing, _) if missing.is_empty() => (None, None),
        (missing, Confine::Require) => (Some(ServeError::Confine(missing.join(" and no "))), None),
        (missing, Confine::WhenPossible) => {
            let missing = missing.join(" and no ");
            let warning = format!(
                "sessions are confined by less than they could be: this kernel has no {missing}; see 'lockstep doctor'"
            );
            (None, Some(warning))
        }
    }
}

/// Checks what can be checked before anybody comes; beside the settings comes what will refuse people later.
fn prepare(config: &ServeConfig, key: &PrivateKey) -> Result<(Settings, Vec<String>), ServeError> {
    if let Some(error) = config.users.iter().find_map(no_root) {
        return Err(error);
    }
    let access = access(config);
    let mut problems = access.look().map_err(ServeError::Revoked)?;
    if let Some(error) = config.users.iter().find_map(|user| no_identity(user, true)) {
        return Err(error);
    }
    let (lacking, unconfined) = lacking(config.confine);
    if let Some(error) = lacking {
        return Err(error);
    }
    problems.extend(unconfined);
    problems.extend(config.users.iter().filter_map(other_root));
    let (confine, limits) = (config.confine, config.limits.clone());
    Ok((Settings { access, setup: setup(config, key)?, confine, limits }, problems))
}

/// What each process is told first.
fn setup(config: &ServeConfig, key: &PrivateKey) -> Result<Arc<[u8]>, HostKeyError> {
    let path = || config.host_key.clone();
    let host_key = key.to_openssh(LineEnding::LF);
    let host_key = host_key.map_err(|error| HostKeyError::Invalid { path: path(), reason: error.to_string() })?;
    let certificates = config.host_certificate.iter().map(|file| {
        let invalid = |reason: String| HostKeyError::Certificate { path: file.clone(), reason };
        host_key::certificate(file, key)?.to_openssh().map_err(|error| invalid(error.to_string()))
    });
    let setup = Setup {
        host_key: host_key.to_string(),
        certificates: certificates.collect::<Result<_, _>>()?,
        strict_key_exchange: config.strict_key_exchange,
        auth_tries: config.limits.auth_tries.get(),
        idle_seconds: config.limits.idle_timeout.as_secs(),
        channels: config.limits.channels.get(),
        connections: config.limits.connections.get(),
        log: config.log.clone(),
    };
    let framed = frame(&setup).map_err(|error| HostKeyError::Invalid { path: path(), reason: error.to_string() })?;
    Ok(framed.into())
}

fn warn(problems: &[String]) {
    problems.iter().for_each(|problem| tracing::warn!("{problem}"));
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
    pub fn start(self) -> (Running, Reloader) {
        warn(&self.problems);
        let server = Arc::new(Server {
            limits: Limits::new(self.settings.limits.clone()),
            door: Door::new(self.config.penalties.clone(), self.config.penalty_exempt.clone()),
            settings: RwLock::new(self.settings),
            live: Registry::default(),
            recorder: self.recorder,
            channels: watch::Sender::new(self.config.limits.channels.get()),
            stopping: AtomicBool::new(false),
            number: AtomicU64::new(0),
        });
        let sockets = self.sockets.into_iter().map(|(socket, _)| socket).collect();
        let reloader = Reloader { server: Arc::clone(&server), key: self.key, config: self.config };
        (Running { server, sockets }, reloader)
    }
}

/// A listener with its sessions.
pub struct Running {
    pub(super) server: Arc<Server>,
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
        let watching = tokio::spawn(watch(Arc::clone(&server)));
        let _ = shutdown.wait_for(|stop| *stop).await;
        watching.abort();
        accepting.iter().for_each(tokio::task::JoinHandle::abort);
        drop(accepting);
        server.stopping.store(true, Ordering::Release);
        let (grace, begun) = (server.settings().limits.stop_grace, Instant::now());
        tracing::info!(connections = server.limits.connections(), "stopping");
        while server.limits.connections() > 0 && begun.elapsed() < grace {
            let mut all = server.live.all();
            all.retain(|live| !live.is_gone());
            refresh(&all).await;
            for live in all {
                if live.login.get().is_none() || server.live.known(&live) >= QUIET {
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
                tokio::spawn(connection::serve(Arc::clone(&server), socket, peer, number, permit));
            }
            Err(turned) => {
                // As OpenSSH's server says it; before the version such lines are allowed.
                turn_away(&server, peer, turned);
                if let Some(farewell) = turned.farewell() {
                    see_off(socket, &farewell);
                }
            }
        }
    }
}

/// So many who were turned away may be listened to for a moment.
static LEAVING: Semaphore = Semaphore::const_new(64);
/// And for so long.
const LEAVE: Duration = Duration::from_secs(1);

/// Tells a client why it is turned away.
///
/// RACE: a socket that is closed before what came over it was read resets the connection, and its client, which says its
/// version at once, may never see why. So what comes is read for a moment; not of everybody in a flood.
fn see_off(mut socket: TcpStream, farewell: &str) {
    let _ = socket.try_write(farewell.as_bytes());
    let Ok(place) = LEAVING.try_acquire() else { return };
    tokio::spawn(async move {
        let mut left = [0; 1024];
        let gone = async {
            let _ = socket.shutdown().await;
            let _ = socket.read(&mut left).await;
        };
        let _ = tokio::time::timeout(LEAVE, gone).await;
        drop(place);
    });
}

/// Who is turned away is said and recorded once a second for each kind, with the number of those before: they may come in
/// floods.
fn turn_away(server: &Server, peer: SocketAddr, turned: Turned) {
    let Some(more) = server.door.count(turned) else { return };
    let reason = turned.reason();
    tracing::warn!(%peer, reason, more, "connection refused");
    let reason = Some(if more == 0 { reason.to_owned() } else { format!("{reason}; and {more} before it") });
    let (action, result) = ("refuse".into(), Some(Outcome::Failure));
    server.recorder.note_stranger([AuditRecord { action, result, reason, ..server.record("", peer) }]);
}

/// Replaces users and limits while the listener runs.
pub struct Reloader {
    server: Arc<Server>,
    key: PrivateKey,
    config: ServeConfig,
}

impl Reloader {
    /// What keeps sessions in their place, in words.
    pub fn confinement(&self) -> String {
        format!("sessions in processes of their own, confined by {}", Available::look())
    }

    /// How many connections were turned away before a byte was exchanged, and why; empty where none was.
    pub fn turned_away(&self) -> String {
        self.server.door.turned_away()
    }

    /// How many clients are connected.
    pub fn connections(&self) -> usize {
        self.server.limits.connections()
    }

    /// Notes what is no connection's doing, as that another configuration is in force.
    pub fn note(&self, record: AuditRecord) {
        self.server.recorder.note(record);
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
        audit::configure(config.log.clone());
        let access = settings.access.clone();
        self.server.limits.set(settings.limits.clone());
        self.server.door.set(config.penalties.clone(), config.penalty_exempt.clone());
        *self.server.settings.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(settings);
        let all = self.server.live.all();
        self.server.channels.send_replace(config.limits.channels.get());
        let ended = tokio::task::spawn_blocking(move || judge_again(&access, &all));
        let ended = ended.await.unwrap_or(0);
        tracing::info!(users = config.users.len(), ended, "configuration reloaded");
        Ok(())
    }
}

/// Judges connections once more, and ends those that may not go on; so many are.
pub(super) fn judge_again(access: &Access, all: &[Arc<Live>]) -> usize {
    all.iter().filter(|live| rejudge(access, live).map_err(|reason| live.end(&reason)).is_err()).count()
}

/// Whether a connection may go on.
fn rejudge(access: &Access, live: &Live) -> Result<(), String> {
    let Some(login) = live.login.get() else { return Ok(()) };
    let (user, grant) = access.judge(&login.user.name, &login.proof, live.peer)?;
    let same = *user == *login.user && grant == login.grant;
    if same { Ok(()) } else { Err("the user's settings have changed".into()) }
}
