//! `lockstep sftp-server`: what sshd starts as a subsystem, and what a client starts by a command.

use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use russh::keys::{Certificate, HashAlg, PublicKey};

use super::Failure;
use crate::audit::{AuditLog, AuditRecord, Login, Outcome};
use crate::config::{DataPorts, Rights};
use crate::endpoint::Error;
use crate::endpoint::local::{LocalSource, LocalTarget, anywhere, beneath, recorded};
use crate::error::{Escaped, Exit, chain};
use crate::filter::STATE_DIRECTORY;
use crate::path::{PATH_MAX, RelPath};
use crate::policy::PolicySpec;
use crate::root::Root;
use crate::server::agent::{Agent, Extensions, Factory, Limits, Output, SharedTarget, Veil};
use crate::server::attributed::Attributed;
use crate::server::channel::FedSession;
use crate::server::confine::{self, Wanted};
use crate::server::ports::{Place, Ports, Sessions};
use crate::server::session::{Session, SessionConfig};
use crate::server::stdio;

/// Serve SFTP, and lockstep's own protocol, on standard input and output
///
/// For sshd_config: 'Subsystem lockstep /usr/bin/lockstep sftp-server', or a command in authorized_keys that confines a
/// key: 'restrict,command="lockstep sftp-server --root /data" ssh-ed25519 ...'. Any client of SFTP version 3 can use it.
#[derive(Debug, clap::Args)]
pub(super) struct SftpServer {
    /// Show the client this directory as '/', and let it reach nothing else
    #[arg(long, value_name = "DIR")]
    root: Option<PathBuf>,
    /// Refuse everything that writes
    #[arg(long, conflicts_with = "rights")]
    read_only: bool,
    /// What may be done, of list, read, write, write-once and delete [default: list,read,write,delete]
    #[arg(long, value_name = "RIGHTS")]
    rights: Option<Rights>,
    /// A file of [[rule]] tables: owner and permissions of what arrives; a sender's wishes give way to it
    #[arg(long, value_name = "FILE")]
    policy_file: Option<PathBuf>,
    /// Serve nobody where the kernel has no Landlock or no seccomp, which keep the process in --root
    #[arg(long, requires = "root")]
    require_confinement: bool,
    /// Let a lockstep client have further connections of a run, beside sshd, on one of these TCP ports: 22100-22199, or
    /// one, or none [default: data_ports in [sftp_server] of the configuration, else none]
    #[arg(long, value_name = "PORTS", value_parser = some_ports)]
    data_ports: Option<SomePorts>,
}

/// Ports, or none whatever the configuration says.
#[derive(Debug, Clone, Copy)]
struct SomePorts(Option<DataPorts>);

fn some_ports(text: &str) -> Result<SomePorts, String> {
    if text == "none" { Ok(SomePorts(None)) } else { text.parse().map(|ports| SomePorts(Some(ports))) }
}

impl SftpServer {
    pub(super) fn run(self) -> Result<Exit, Failure> {
        let usual = super::audit::place::configure_as_usual()?;
        let policy = super::transfer::receivers_policy(self.policy_file.as_deref())?;
        let home = std::env::home_dir().unwrap_or_else(|| PathBuf::from("/"));
        let confined = self.root.is_some();
        let root = self.root.unwrap_or(home);
        let rights = if self.read_only { Rights::READ_ONLY } else { self.rights.unwrap_or_default() };
        let receiver = Arc::new(Receiver { root, confined, rights, policy, by: logged_in() });
        let place = self.data_ports.map_or(usual.sftp_server.data_ports, |SomePorts(ports)| ports).and_then(|ports| {
            let connection = std::env::var("SSH_CONNECTION").ok()?;
            Place::of(&connection, ports)
        });
        let mut ports = place.map(|place| Arc::new(Ports::new(place, receiver.further())));
        if confined && receiver.root.is_dir() {
            let read_only = !rights.writes();
            let wanted = Wanted { root: &receiver.root, read_only, identity: None, require: self.require_confinement };
            let failed = |message: String| Failure::Plain { exit: Exit::Io, message: format!("no session: {message}") };
            stdio::allow_open_files();
            confine::names::start().map_err(|error| failed(crate::error::in_words(&error)))?;
            // What cannot be had is not offered; the run goes over its one connection.
            ports = ports.filter(|ports| ports.prepare().is_ok());
            let confinement = confine::enter(&wanted).map_err(|error| failed(chain(&error)))?;
            if !confinement.missing.is_empty() {
                eprintln!(
                    "lockstep: warning: this session is confined in part: {confinement}; with --require-confinement there is none"
                );
            }
        }
        let agent = receiver.agent().alone();
        let agent = Arc::new(match &ports {
            Some(ports) => agent.with_ports(Arc::clone(ports)),
            None => agent,
        });
        let ended = stdio::run(receiver.config(), Some(Arc::clone(&agent) as Arc<dyn Extensions>));
        // Further connections of a run end before it is given up.
        if let Some(ports) = ports {
            ports.close();
        }
        if let Some(agent) = Arc::into_inner(agent) {
            agent.finish();
        }
        ended.map_err(|error| Failure::Plain { exit: Exit::Io, message: format!("the session ended: {error}") })?;
        Ok(Exit::Done)
    }
}

/// What each session of this process has, the first and those of further connections.
struct Receiver {
    root: PathBuf,
    confined: bool,
    rights: Rights,
    policy: PolicySpec,
    by: By,
}

impl Receiver {
    fn config(&self) -> SessionConfig {
        SessionConfig {
            root: self.root.clone(),
            confine: self.confined,
            rights: self.rights,
            quota: None,
            policy: self.policy.clone(),
            actor: super::transfer::actor(),
            login: self.by.login.clone(),
        }
    }

    fn agent(&self) -> Agent {
        let by = self.by.clone();
        let Factory { target, source, veil } = factory(self.root.clone(), self.confined, self.policy.clone(), &by);
        let target = Box::new(move |path: &[u8]| Ok(by.attributed(target(path)?)));
        Agent::limited(Arc::new(Factory { target, source, veil }), Limits::default(), self.rights)
    }

    /// The sessions of further connections.
    fn further(self: &Arc<Self>) -> Sessions {
        let receiver = Arc::clone(self);
        Arc::new(move |output: Arc<dyn Output>| {
            let agent = Arc::new(receiver.agent());
            let extensions = Arc::clone(&agent) as Arc<dyn Extensions>;
            let session = Session::new(receiver.config(), output, Some(extensions)).map_err(|error| chain(&error))?;
            Ok(Box::new(Served::new(session, agent)) as Box<dyn FedSession>)
        })
    }
}

/// A session that has ended when its agent has: what arrived is stored by then.
pub(super) struct Served {
    session: Option<Session>,
    agent: Option<Arc<Agent>>,
}

impl Served {
    pub(super) fn new(session: Session, agent: Arc<Agent>) -> Served {
        Served { session: Some(session), agent: Some(agent) }
    }
}

impl FedSession for Served {
    fn feed(&mut self, bytes: &[u8]) -> Result<(), String> {
        self.session.as_mut().map_or(Ok(()), |session| FedSession::feed(session, bytes))
    }

    fn finish(&mut self) {
        if let Some(session) = &mut self.session {
            session.finish();
        }
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        drop(self.session.take());
        if let Some(agent) = self.agent.take().and_then(Arc::into_inner) {
            agent.finish();
        }
    }
}

/// Who is at the other end, and by what.
#[derive(Clone)]
pub(super) struct By {
    pub(super) actor: String,
    pub(super) login: Login,
}

impl By {
    /// A target whose records say so.
    pub(super) fn attributed(&self, target: SharedTarget) -> SharedTarget {
        Arc::new(Attributed::new(target, self.actor.clone(), self.login.clone()))
    }
}

/// As far as this machine knows: whom sshd let in, from where, and, where it says so (ExposeAuthInfo), with which key.
fn logged_in() -> By {
    let own = super::transfer::actor();
    let connection = std::env::var("SSH_CONNECTION").unwrap_or_default();
    let mut words = connection.split(' ');
    let from = words.next().filter(|from| !from.is_empty()).map(|from| Escaped(from.as_bytes()).to_string());
    let port = words.next().and_then(|port| port.parse::<u16>().ok());
    let mut login = std::env::var_os("SSH_USER_AUTH").and_then(|file| exposed(Path::new(&file))).unwrap_or_default();
    login.peer = from.as_ref().map(|from| match (from.parse::<std::net::IpAddr>(), port) {
        (Ok(ip), Some(port)) => std::net::SocketAddr::new(ip, port).to_string(),
        _ => from.clone(),
    });
    let actor = match from {
        Some(from) => format!("{own} from {from}"),
        None => own,
    };
    By { actor, login }
}

/// The key or certificate in the file that sshd writes for a session: `publickey TYPE BASE64` for each that was used.
fn exposed(file: &Path) -> Option<Login> {
    let mut text = String::new();
    std::fs::File::open(file).ok()?.take(64 << 10).read_to_string(&mut text).ok()?;
    let key = text.lines().find_map(|line| line.strip_prefix("publickey "))?;
    if let Ok(certificate) = Certificate::from_openssh(key) {
        return Some(Login {
            key: Some(certificate.public_key().fingerprint(HashAlg::Sha256).to_string()),
            certificate: Some(Escaped(certificate.key_id().as_bytes()).to_string()),
            serial: Some(certificate.serial()),
            authority: Some(certificate.signature_key().fingerprint(HashAlg::Sha256).to_string()),
            ..Login::default()
        });
    }
    let key = PublicKey::from_openssh(key).ok()?;
    Some(Login { key: Some(key.fingerprint(HashAlg::Sha256).to_string()), ..Login::default() })
}

/// Opens the directories that a client names: beneath `root` where it is confined, else as the file system has them. What
/// somebody is refused there is in the audit log of `root`; without a root there is no place for one.
pub(super) fn factory(root: PathBuf, confine: bool, policy: PolicySpec, by: &By) -> Factory {
    let (target_root, by) = (root.clone(), by.clone());
    // Whoever set up the server named the root: it is opened by name. What a client names is looked up beneath it.
    let confined = |root: &Path, path: &[u8]| -> Result<(Arc<Root>, Option<RelPath>), Error> {
        let path = beneath(path)?;
        let root = Root::open(root).map_err(|error| Error::Io {
            operation: error.operation,
            path: crate::error::shown(&error.path).to_string(),
            source: error.source,
        })?;
        Ok((Arc::new(root), path))
    };
    // Whoever is not confined names the paths of the machine himself.
    let veil = if confine { Veil::over(&root) } else { Veil::default() };
    Factory {
        veil,
        target: Box::new(move |path| {
            let policy = policy.clone();
            if !confine {
                own(path)?;
                return Ok(Arc::new(LocalTarget::new(&anywhere(&target_root, path), policy)));
            }
            let opened = own(path).and_then(|()| confined(&target_root, path));
            let (root, path) = opened.inspect_err(|error| record_refusal(&target_root, &by, path, error))?;
            Ok(Arc::new(LocalTarget::beneath(root, path, policy)))
        }),
        source: Box::new(move |path| {
            if !confine {
                return Ok(Arc::new(LocalSource::new(&anywhere(&root, path), None)?));
            }
            let (root, path) = confined(&root, path)?;
            Ok(Arc::new(LocalSource::beneath(root, path, None)?))
        }),
    }
}

/// Refuses what lockstep keeps for itself: a run there would replace the manifest and the audit log of the root that it
/// belongs to.
fn own(path: &[u8]) -> Result<(), Error> {
    if path.split(|&byte| byte == b'/').any(|name| name == STATE_DIRECTORY) {
        let reason = format!("'{}': nothing is sent into the directory that lockstep keeps for itself", Escaped(path));
        return Err(Error::Refused { by: "the server".into(), reason });
    }
    Ok(())
}

/// A run that is not even begun has no root of its own to record it.
fn record_refusal(root: &Path, by: &By, path: &[u8], error: &Error) {
    let Error::Refused { reason, .. } = error else { return };
    let record = AuditRecord {
        actor: by.actor.clone(),
        login: Some(Box::new(by.login.clone())),
        action: "refuse".into(),
        result: Some(Outcome::Failure),
        path: Escaped(&path[..path.len().min(PATH_MAX)]).to_string(),
        reason: Some(recorded(reason)),
        ..AuditRecord::default()
    };
    let written = Root::open(root)
        .map_err(Into::into)
        .and_then(|root| AuditLog::open(&root).and_then(|mut log| log.append(&[record])).map(drop));
    if let Err(error) = written {
        tracing::error!(error = chain(&error), "the audit log cannot be written");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn h01_no_run_is_begun_on_the_directory_that_lockstep_keeps_for_itself() {
        let at = tempfile::tempdir().unwrap();
        let by = By { actor: "tester".into(), login: Login::default() };
        for confine in [true, false] {
            let sides = factory(at.path().to_owned(), confine, PolicySpec::default(), &by);
            for path in ["/.lockstep", ".lockstep", "sub/.lockstep/", "/sub/.lockstep/staging"] {
                assert!(matches!((sides.target)(path.as_bytes()), Err(Error::Refused { .. })), "{path}");
            }
            assert!((sides.target)(b"/sub/lockstep").is_ok());
        }
    }
}
