//! `lockstep serve`: lockstep's own SSH server.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};

use russh::keys::PrivateKey;

use super::audit::place;
use super::memory::Memory;
use super::{Failure, notify};
use crate::audit::{AuditRecord, Outcome};
use crate::config::{AddressList, Audit, Config, Confine, DEFAULT_PATH, Rights};
use crate::error::{Exit, chain};
use crate::server::host_key;
use crate::server::listener::{self, Reloader, ServeConfig, ServeError, ServeKey, ServeUser, Which};

/// Listen for SSH connections: public keys only, file transfer only
///
/// The users are those of [serve] in the configuration, or with --user one user who is described here. Sockets that systemd
/// passes (LISTEN_FDS) are used instead of addresses.
#[derive(Debug, clap::Args)]
pub(super) struct Serve {
    /// The configuration with [serve] and its users [default: $LOCKSTEP_CONFIG, or /etc/lockstep/config.toml]
    #[arg(long, value_name = "FILE", conflicts_with = "user")]
    config: Option<PathBuf>,
    /// Address and port to listen on, instead of the configuration's [default with --user: 127.0.0.1:2222]
    #[arg(long, value_name = "ADDRESS:PORT")]
    listen: Vec<SocketAddr>,
    /// Write the port that is listened on to this file, once it is; for port 0
    #[arg(long, value_name = "FILE")]
    port_file: Option<PathBuf>,
    /// End when the process that started this one ends
    #[arg(long)]
    die_with_parent: bool,
    #[command(flatten)]
    one: Option<OneUser>,
}

#[derive(Debug, Clone, clap::Args)]
struct OneUser {
    /// Serve one user without a configuration: the name that clients log in with
    #[arg(long, value_name = "NAME", required = false, requires_all = ["root", "authorized_keys", "host_key"])]
    user: String,
    /// The directory that the user sees as '/'
    #[arg(long, value_name = "DIR", required = false, requires = "user")]
    root: PathBuf,
    /// The keys that may log in, as OpenSSH's authorized_keys
    #[arg(long, value_name = "FILE", required = false, requires = "user")]
    authorized_keys: PathBuf,
    /// The server's own key; made at the first start
    #[arg(long, value_name = "FILE", required = false, requires = "user")]
    host_key: PathBuf,
    /// Addresses or ranges that the user may come from [default: any]
    #[arg(long, value_name = "RANGE", requires = "user")]
    from: Vec<String>,
    /// Refuse everything that writes
    #[arg(long, requires = "user", conflicts_with = "rights")]
    read_only: bool,
    /// What may be done, of list, read, write, write-once and delete [default: list,read,write,delete]
    #[arg(long, value_name = "RIGHTS", requires = "user")]
    rights: Option<Rights>,
    /// A file of [[rule]] tables: owner and permissions of what arrives
    #[arg(long, value_name = "FILE", requires = "user")]
    policy_file: Option<PathBuf>,
    /// Keys that are refused even when listed: public keys, fingerprints, or a revocation list of ssh-keygen
    #[arg(long, value_name = "FILE", requires = "user")]
    revoked_keys: Option<PathBuf>,
    /// The account of this machine that sessions run as, and that owns what arrives [default: this process's own]
    #[arg(long, value_name = "USER", requires = "user")]
    run_as: Option<String>,
    /// Serve nobody where the kernel has no Landlock or no seccomp
    #[arg(long, requires = "user")]
    require_confinement: bool,
    /// A directory for the record of logins, sessions and refusals; see 'lockstep audit'
    #[arg(long, value_name = "DIR", requires = "user")]
    audit: Option<PathBuf>,
}

impl OneUser {
    fn read(&self) -> Result<ServeConfig, Failure> {
        let from = match self.from.as_slice() {
            [] => None,
            list => {
                let list = list.iter().flat_map(|item| item.split(','));
                Some(AddressList::parse(list).map_err(|reason| Failure::usage(format!("--from: {reason}")))?)
            }
        };
        let user = ServeUser {
            name: self.user.clone(),
            root: self.root.clone(),
            rights: if self.read_only { Rights::READ_ONLY } else { self.rights.unwrap_or_default() },
            authorized_keys: self.authorized_keys.clone(),
            run_as: self.run_as.clone(),
            from,
            policy: super::transfer::receivers_policy(self.policy_file.as_deref())?,
            ..ServeUser::default()
        };
        let mut config = ServeConfig::new(SocketAddr::from(([127, 0, 0, 1], 2222)), self.host_key.clone(), vec![user]);
        (config.revoked_keys, config.audit) = (self.revoked_keys.clone(), self.audit.clone());
        config.confine = if self.require_confinement { Confine::Require } else { Confine::WhenPossible };
        Ok(config)
    }
}

pub(super) fn default_path() -> PathBuf {
    std::env::var_os("LOCKSTEP_CONFIG").map_or_else(|| DEFAULT_PATH.into(), PathBuf::from)
}

/// The listener's part of a configuration file.
pub(super) fn read(path: &Path) -> Result<(ServeConfig, Audit), Failure> {
    let usage = |error: crate::config::ConfigError| Failure::usage(chain(&error));
    let config = Config::load(path).map_err(|error| match error {
        error @ crate::config::ConfigError::Read { .. } => {
            Failure::usage(format!("{error}, or serve one user with --user"))
        }
        error => usage(error),
    })?;
    Ok((of_config(&config)?, config.audit))
}

/// The listener's part of a configuration.
pub(super) fn of_config(config: &Config) -> Result<ServeConfig, Failure> {
    let usage = |error: crate::config::ConfigError| Failure::usage(chain(&error));
    let missing = |what| Failure::usage(format!("configuration {}: there is no {what}", super::shown(&config.path)));
    let serve = config.serve.as_ref().ok_or_else(|| missing("[serve]; or name one user with --user"))?;
    if serve.users.is_empty() {
        return Err(missing("[[serve.user]], so that nobody could log in"));
    }
    let policy = |name: &Option<String>| name.as_ref().map(|name| config.policy(name).map_err(usage)).transpose();
    let mut users = Vec::new();
    for user in &serve.users {
        let mut keys = Vec::new();
        for key in &user.keys {
            let named = key.fingerprint.clone().map(Which::Fingerprint);
            let which = named.unwrap_or_else(|| Which::Principal(key.principal.clone().unwrap_or_default()));
            let (root, rights, quota, from) = (key.root.clone(), key.rights, key.quota, key.from.clone());
            keys.push(ServeKey { which, root, rights, quota, policy: policy(&key.policy)?, from });
        }
        users.push(ServeUser {
            name: user.name.clone(),
            root: user.root.clone(),
            create_root: user.create_root,
            rights: user.rights(),
            quota: user.quota,
            authorized_keys: user.authorized_keys.clone(),
            run_as: user.run_as.clone(),
            from: user.from.clone(),
            policy: policy(&user.policy)?.unwrap_or_default(),
            keys,
        });
    }
    Ok(ServeConfig {
        listen: serve.listen.clone(),
        host_key: serve.host_key.clone(),
        host_certificate: serve.host_certificate.clone(),
        users,
        origins: serve.origins(),
        penalties: serve.penalties.clone(),
        penalty_exempt: serve.penalty_exempt.clone(),
        revoked_keys: serve.revoked_keys.clone(),
        audit: serve.audit.clone(),
        log: Default::default(),
        strict_key_exchange: serve.strict_key_exchange,
        confine: serve.confine,
        limits: serve.limits.clone(),
    })
}

impl Serve {
    pub(super) fn run(self) -> Result<Exit, Failure> {
        if self.die_with_parent {
            let end = Some(rustix::process::Signal::TERM);
            rustix::process::set_parent_process_death_signal(end)
                .map_err(|errno| Failure::usage(format!("--die-with-parent: {errno}")))?;
        }
        log();
        raise_limit_of_files();
        let passed = notify::sockets()?;
        let (config, audit) = self.read()?;
        // Without a key of its own the log is signed with the host's.
        let key = host_key::load_or_create(&config.host_key).map_err(|error| Failure::plain(Exit::Usage, &error))?;
        let config = ServeConfig { log: place::settings(&audit, Some(&key))?, ..config };
        if !passed.is_empty() && passed.iter().map(|(_, address)| *address).ne(config.listen.iter().copied()) {
            tracing::info!("the sockets that systemd passed are used; 'listen' is not");
        }
        let failed = |exit, message: String| Failure::Plain { exit, message };
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .enable_all()
            .build()
            .map_err(|error| failed(Exit::Io, format!("no threads to serve with: {error}")))?;
        runtime.block_on(async {
            let listener = listener::bind_with(config, passed).await.map_err(|error| {
                let usage = !matches!(error, ServeError::Listen { .. } | ServeError::Audit(_));
                failed(if usage { Exit::Usage } else { Exit::Io }, chain(&error))
            })?;
            for address in listener.addresses() {
                say(&format!("lockstep: listening on {address}, host key {}", listener.fingerprint));
            }
            if let Some(path) = &self.port_file {
                let port = listener.local_addr().port();
                std::fs::write(path, format!("{port}\n")).map_err(Failure::io("write", path))?;
            }
            let addresses: Vec<String> = listener.addresses().iter().map(SocketAddr::to_string).collect();
            let listening = format!("listening on {}", addresses.join(", "));
            let (running, reloader) = listener.start();
            tracing::info!("{}", reloader.confinement());
            let (stop, stopped) = tokio::sync::watch::channel(false);
            let confinement = reloader.confinement();
            let service = Service { serve: self, reloader, stop, listening, key, confinement };
            service.tell(Ok("started"));
            let signals =
                Signals::listen().map_err(|error| failed(Exit::Io, format!("listening for signals: {error}")))?;
            notify::ready();
            tokio::spawn(signals.follow(service));
            running.run(stopped).await;
            Ok(Exit::Done)
        })
    }

    fn read(&self) -> Result<(ServeConfig, Audit), Failure> {
        let (mut config, audit) = match &self.one {
            Some(one) => (one.read()?, Audit::default()),
            None => read(&self.file())?,
        };
        if !self.listen.is_empty() {
            config.listen.clone_from(&self.listen);
        }
        Ok((config, audit))
    }

    fn file(&self) -> PathBuf {
        self.config.clone().unwrap_or_else(default_path)
    }
}

/// What signals act on.
struct Service {
    serve: Serve,
    reloader: Reloader,
    stop: tokio::sync::watch::Sender<bool>,
    listening: String,
    key: PrivateKey,
    confinement: String,
}

impl Service {
    /// Everything stays as it was when the new configuration is not right; gives why.
    async fn reload(&self) -> Option<String> {
        notify::reloading();
        let read =
            self.serve.read().and_then(|(config, audit)| Ok((config, place::settings(&audit, Some(&self.key))?)));
        let reloaded = match read {
            Ok((config, log)) => {
                self.reloader.reload(ServeConfig { log, ..config }).await.map_err(|error| chain(&error))
            }
            Err(failure) => Err(chain(&failure)),
        };
        self.tell(reloaded.as_ref().map(|()| "read anew").map_err(String::as_str));
        notify::ready();
        let reason = reloaded.err()?;
        tracing::error!(reason, "not reloaded: everything stays as it was");
        Some(reason)
    }

    /// Tells the log which configuration is in force, or why one is not.
    fn tell(&self, how: Result<&str, &str>) {
        let (result, why) = match how {
            Ok(why) => (Outcome::Success, why.to_owned()),
            Err(reason) => (Outcome::Failure, format!("not taken: {reason}")),
        };
        let actor = super::transfer::actor();
        self.reloader.note(match self.serve.one {
            None => place::configuration(&self.serve.file(), result, &why, actor),
            Some(_) => {
                let reason = Some(format!("{why}, by the options of the command line"));
                let action = "configuration".into();
                AuditRecord { actor, action, result: Some(result), reason, ..AuditRecord::default() }
            }
        });
    }

    fn status(&self, wrong: Option<&str>) -> String {
        let doing = if *self.stop.borrow() { "stopping" } else { &self.listening };
        let connections = self.reloader.connections();
        let wrong = wrong.map(|reason| format!("; not reloaded: {reason}")).unwrap_or_default();
        let turned = Some(self.reloader.turned_away()).filter(|turned| !turned.is_empty());
        let turned = turned.map(|turned| format!("; turned away: {turned}")).unwrap_or_default();
        format!("{doing}; connections: {connections}{turned}{wrong}; {}", self.confinement)
    }
}

/// SIGHUP reloads; SIGTERM and SIGINT stop, the second one at once.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
}

impl Signals {
    /// From now on none of them ends the process by itself.
    fn listen() -> std::io::Result<Signals> {
        let [terminate, interrupt, hangup] =
            [SignalKind::terminate(), SignalKind::interrupt(), SignalKind::hangup()].map(signal);
        Ok(Signals { terminate: terminate?, interrupt: interrupt?, hangup: hangup? })
    }

    /// Does what they ask for, and tells systemd meanwhile how things stand.
    async fn follow(mut self, service: Service) {
        let (mut pulse, mut memory, mut wrong) = (notify::Pulse::new(), Memory::new(), None);
        let mut beat = tokio::time::interval(Duration::from_millis(250));
        loop {
            tokio::select! {
                _ = self.terminate.recv() => {}
                _ = self.interrupt.recv() => {}
                _ = self.hangup.recv() => {
                    wrong = service.reload().await;
                    pulse.say(service.status(wrong.as_deref()));
                    continue;
                }
                _ = beat.tick() => {
                    pulse.beat(|| service.status(wrong.as_deref()));
                    memory.give_back();
                    continue;
                }
            }
            if service.stop.send_replace(true) {
                tracing::warn!("stopped at once");
                std::process::exit(Exit::Incomplete.code().into());
            }
            notify::stopping();
            pulse.say(service.status(wrong.as_deref()));
        }
    }
}

/// What the server reports goes to standard error, one line each; `LOCKSTEP_LOG` chooses what (`debug`, `warn`, …).
fn log() {
    use tracing_subscriber::EnvFilter;
    let chosen = EnvFilter::try_from_env("LOCKSTEP_LOG");
    let filter = chosen.unwrap_or_else(|_| EnvFilter::new("info,russh=error"));
    super::journal::begin(filter, false, tracing_subscriber::layer::Identity::new());
}

/// Connections and open files of clients are descriptors; the usual 1024 are soon taken.
fn raise_limit_of_files() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }) {
        tracing::warn!(%error, "the limit of open files stays low");
    }
}

fn say(line: &str) {
    use std::io::Write as _;
    let _ = writeln!(std::io::stderr(), "{line}");
}
