//! The listener: SSH with public keys only, file sessions only.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use russh::keys::{Algorithm, HashAlg, PublicKey};
use russh::server::{Auth, ChannelOpenHandle, Config, Handler, Msg, PublicKeyOffer, Session, VerifiedPublicKey};
use russh::{Channel, ChannelId, MethodKind, MethodSet};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use super::agent::Output;
use super::authorized_keys::{self, Grant};
use super::channel::{self, FedSession};
use super::host_key::{self, HostKeyError};
use super::limits::Limits;

use crate::endpoint::algorithms::{End, preferred};
use crate::endpoint::stream::OverflowStream;
use crate::error::Escaped;

/// One user of the listener.
#[derive(Debug, Clone)]
pub struct ServeUser {
    /// The name that clients log in with.
    pub name: String,
    /// What the user sees as `/`.
    pub root: PathBuf,
    /// No request may write.
    pub read_only: bool,
    /// The user's `authorized_keys`, read anew at each login.
    pub authorized_keys: PathBuf,
    /// Addresses, ranges and wildcards the user may come from, as in `from=`; empty for anywhere.
    pub from: Vec<String>,
}

/// What to listen on, for whom and within which limits.
#[derive(Debug, Clone)]
pub struct ServeConfig {
    /// Where to listen.
    pub listen: SocketAddr,
    /// The host key's file; made when missing.
    pub host_key: PathBuf,
    /// Who may log in.
    pub users: Vec<ServeUser>,
    /// Connections in all.
    pub max_connections: usize,
    /// Connections from one address.
    pub max_per_address: usize,
    /// Channels of one connection.
    pub max_channels: usize,
    /// Failed attempts before a connection is dropped.
    pub max_auth_tries: usize,
    /// How long a client may take to log in.
    pub login_grace: Duration,
    /// A connection this long without a byte is dropped.
    pub idle_timeout: Duration,
    /// How long sessions may go on after a stop is asked for.
    pub stop_grace: Duration,
}

impl ServeConfig {
    /// The usual limits.
    pub fn new(listen: SocketAddr, host_key: PathBuf, users: Vec<ServeUser>) -> Self {
        Self {
            listen,
            host_key,
            users,
            max_connections: 256,
            max_per_address: 32,
            max_channels: 16,
            max_auth_tries: 6,
            login_grace: Duration::from_secs(30),
            idle_timeout: Duration::from_secs(600),
            stop_grace: Duration::from_secs(30),
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
    pub read_only: bool,
    /// Where from.
    pub peer: SocketAddr,
    /// The key that signed, as `SHA256:…`.
    pub fingerprint: String,
}

/// Makes the session of a channel.
pub type SessionFactory =
    Arc<dyn Fn(&SessionStart, Arc<dyn Output>) -> Result<Box<dyn FedSession>, String> + Send + Sync>;

/// Why the listener does not run.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The host key.
    #[error(transparent)]
    HostKey(#[from] HostKeyError),
    /// The address.
    #[error("cannot listen on {address}: {source}; is another server using the port?")]
    Listen {
        /// The address asked for.
        address: SocketAddr,
        /// Why.
        source: std::io::Error,
    },
    /// A user's settings.
    #[error("user {user}: {reason}")]
    User {
        /// The user.
        user: String,
        /// What is wrong.
        reason: String,
    },
}

/// A bound listener.
pub struct Listener {
    socket: TcpListener,
    config: Arc<ServeConfig>,
    protocol: Arc<Config>,
    address: SocketAddr,
    /// `SHA256:…` of the host key.
    pub fingerprint: String,
}

/// Binds; the port is known before anything is accepted.
///
/// # Errors
/// [`ServeError`].
pub async fn bind(config: ServeConfig) -> Result<Listener, ServeError> {
    for user in &config.users {
        let bad = |reason| ServeError::User { user: user.name.clone(), reason };
        for pattern in &user.from {
            authorized_keys::address_allowed(pattern, IpAddr::from([0, 0, 0, 0])).map_err(bad)?;
        }
        if !user.root.is_dir() {
            return Err(bad(format!("root {} is not a directory; make it first", user.root.display())));
        }
    }
    let key = host_key::load_or_create(&config.host_key)?;
    let fingerprint = key.public_key().fingerprint(HashAlg::Sha256).to_string();
    let listen = |source| ServeError::Listen { address: config.listen, source };
    let socket = TcpListener::bind(config.listen).await.map_err(listen)?;
    let address = socket.local_addr().map_err(listen)?;
    let mut methods = MethodSet::empty();
    methods.push(MethodKind::PublicKey);
    let protocol = Config {
        methods,
        auth_rejection_time: Duration::from_millis(500),
        auth_rejection_time_initial: Some(Duration::ZERO),
        keys: vec![key],
        window_size: 32 << 20,
        maximum_packet_size: 256 << 10,
        channel_buffer_size: 4096,
        event_buffer_size: 256,
        max_auth_attempts: config.max_auth_tries,
        inactivity_timeout: Some(config.idle_timeout),
        keepalive_interval: Some(Duration::from_secs(30)),
        nodelay: true,
        preferred: preferred(End::Server),
        ..Config::default()
    };
    Ok(Listener { socket, config: Arc::new(config), protocol: Arc::new(protocol), address, fingerprint })
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
    /// The address that is listened on.
    pub fn local_addr(&self) -> SocketAddr {
        self.address
    }

    /// Accepts until `shutdown` holds true (or its sender is gone), then lets sessions end for the time set.
    pub async fn run(self, factory: SessionFactory, mut shutdown: watch::Receiver<bool>) {
        let limits = Limits::new(self.config.max_connections, self.config.max_per_address);
        let (stop, stopped) = watch::channel(false);
        loop {
            let accepted = tokio::select! {
                accepted = self.socket.accept() => accepted,
                _ = shutdown.wait_for(|stop| *stop) => break,
            };
            let (socket, peer) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(%error, "cannot accept");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            let permit = match limits.admit(peer.ip().to_canonical()) {
                Ok(permit) => permit,
                Err(reason) => {
                    tracing::warn!(%peer, reason, "connection refused");
                    continue;
                }
            };
            let authenticated = Arc::new(AtomicBool::new(false));
            let client = Client {
                config: Arc::clone(&self.config),
                factory: Arc::clone(&factory),
                peer,
                start: None,
                authenticated: Arc::clone(&authenticated),
                channels: HashMap::new(),
                running: Arc::default(),
            };
            let (protocol, grace, stopped) = (Arc::clone(&self.protocol), self.config.login_grace, stopped.clone());
            tokio::spawn(async move {
                let _permit = permit;
                connection(protocol, socket, client, grace, &authenticated, stopped).await;
            });
        }
        drop(self.socket);
        let end = tokio::time::Instant::now() + self.config.stop_grace;
        while limits.active() > 0 && tokio::time::Instant::now() < end {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let _ = stop.send(true);
    }
}

async fn connection(
    protocol: Arc<Config>,
    socket: TcpStream,
    client: Client,
    grace: Duration,
    authenticated: &AtomicBool,
    mut stopped: watch::Receiver<bool>,
) {
    let peer = client.peer;
    let _ = socket.set_nodelay(true);
    let (stream, kill) = OverflowStream::new(socket);
    let running = async { russh::server::run_stream(protocol, stream, client).await?.await };
    tokio::pin!(running);
    let late = async {
        tokio::time::sleep(grace).await;
        if authenticated.load(Ordering::Acquire) {
            std::future::pending::<()>().await;
        }
    };
    tokio::select! {
        ended = &mut running => {
            match ended {
                Ok(()) => tracing::info!(%peer, "connection ended"),
                Err(error) => tracing::info!(%peer, %error, "connection ended"),
            }
            return;
        }
        () = late => tracing::warn!(%peer, "connection dropped: no login in time"),
        _ = stopped.wait_for(|stop| *stop) => tracing::info!(%peer, "connection dropped: the server stops"),
    }
    let _ = kill.send(());
    let _ = tokio::time::timeout(Duration::from_secs(5), running).await;
}

struct Client {
    config: Arc<ServeConfig>,
    factory: SessionFactory,
    peer: SocketAddr,
    /// Set by the key that signed, and by nothing else.
    start: Option<SessionStart>,
    authenticated: Arc<AtomicBool>,
    channels: HashMap<ChannelId, Channel<Msg>>,
    running: Arc<()>,
}

impl Client {
    fn judge(&self, name: &str, key: &PublicKey, algorithm: &Algorithm) -> Result<(ServeUser, Grant), String> {
        if matches!(algorithm, Algorithm::Rsa { hash: None } | Algorithm::Dsa) {
            return Err("a signature with SHA-1".into());
        }
        let user = self.config.users.iter().find(|user| user.name == name).ok_or("no such user")?;
        let address = self.peer.ip();
        if !user.from.is_empty() && !authorized_keys::address_allowed(&user.from.join(","), address)? {
            return Err("the user may not come from this address".into());
        }
        let text = authorized_keys::read(&user.authorized_keys)?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_err(|e| e.to_string())?.as_secs();
        let grant = authorized_keys::authorize(&text, key.key_data(), address, now)?;
        Ok((user.clone(), grant))
    }

    fn refused(&self, name: &str, key: &PublicKey, reason: &str) -> Auth {
        let fingerprint = key.fingerprint(HashAlg::Sha256);
        tracing::warn!(peer = %self.peer, user = %Escaped(name.as_bytes()), %fingerprint, reason, "key refused");
        Auth::reject()
    }

    fn begin(&mut self, id: ChannelId, session: &mut Session) -> Result<(), russh::Error> {
        let (Some(channel), Some(start)) = (self.channels.remove(&id), &self.start) else {
            return session.channel_failure(id);
        };
        let (shared, packets) = channel::queue();
        match (self.factory)(start, Arc::clone(&shared) as Arc<dyn Output>) {
            Ok(fed) => {
                session.channel_success(id)?;
                let running = Arc::clone(&self.running);
                tokio::spawn(async move {
                    channel::run(channel, shared, packets, fed).await;
                    drop(running);
                });
                Ok(())
            }
            Err(reason) => {
                tracing::error!(peer = %self.peer, user = start.user, reason, "no session");
                session.channel_failure(id)
            }
        }
    }
}

/// The one command that may be run: the program's own file server.
fn is_file_server(command: &[u8]) -> bool {
    let Ok(command) = std::str::from_utf8(command) else { return false };
    let words: Vec<&str> = command.split(' ').filter(|word| !word.is_empty()).collect();
    matches!(words.as_slice(), [program, "sftp-server"] if program.rsplit('/').next() == Some("lockstep"))
}

impl Handler for Client {
    type Error = russh::Error;

    async fn auth_publickey_offered(&mut self, user: &str, offer: PublicKeyOffer<'_>) -> Result<Auth, Self::Error> {
        // Only spares the client a signature; nothing is granted here.
        Ok(match self.judge(user, offer.public_key, offer.algorithm) {
            Ok(_) => Auth::Accept,
            Err(reason) => self.refused(user, offer.public_key, &reason),
        })
    }

    async fn auth_publickey(&mut self, user: &str, key: VerifiedPublicKey<'_>) -> Result<Auth, Self::Error> {
        let (settings, grant) = match self.judge(user, key.public_key, key.algorithm) {
            Ok(judged) => judged,
            Err(reason) => return Ok(self.refused(user, key.public_key, &reason)),
        };
        let fingerprint = key.public_key.fingerprint(HashAlg::Sha256).to_string();
        tracing::info!(peer = %self.peer, user = settings.name, fingerprint, "logged in");
        self.start = Some(SessionStart {
            user: settings.name,
            root: settings.root,
            read_only: settings.read_only || grant.read_only,
            peer: self.peer,
            fingerprint,
        });
        self.authenticated.store(true, Ordering::Release);
        Ok(Auth::Accept)
    }

    async fn channel_open_session(
        &mut self,
        channel: Channel<Msg>,
        reply: ChannelOpenHandle,
        _session: &mut Session,
    ) -> Result<(), Self::Error> {
        let open = self.channels.len() + Arc::strong_count(&self.running) - 1;
        if self.start.is_some() && open < self.config.max_channels {
            self.channels.insert(channel.id(), channel);
            reply.accept().await;
        }
        Ok(())
    }

    async fn channel_close(&mut self, channel: ChannelId, _session: &mut Session) -> Result<(), Self::Error> {
        self.channels.remove(&channel);
        Ok(())
    }

    async fn subsystem_request(&mut self, id: ChannelId, name: &str, session: &mut Session) -> Result<(), Self::Error> {
        if matches!(name, "sftp" | "lockstep") { self.begin(id, session) } else { session.channel_failure(id) }
    }

    async fn exec_request(&mut self, id: ChannelId, data: &[u8], session: &mut Session) -> Result<(), Self::Error> {
        if is_file_server(data) {
            return self.begin(id, session);
        }
        tracing::warn!(peer = %self.peer, command = %Escaped(data), "command refused");
        session.channel_failure(id)
    }

    async fn shell_request(&mut self, id: ChannelId, session: &mut Session) -> Result<(), Self::Error> {
        session.channel_failure(id)
    }
}
