//! `lockstep sftp-server`: what sshd starts as a subsystem, and what a client starts by a command.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::Failure;
use crate::audit::{AuditLog, AuditRecord};
use crate::config::Rights;
use crate::endpoint::Error;
use crate::endpoint::local::{LocalSource, LocalTarget, anywhere, beneath, recorded};
use crate::error::{Escaped, Exit, chain};
use crate::filter::STATE_DIRECTORY;
use crate::path::{PATH_MAX, RelPath};
use crate::policy::PolicySpec;
use crate::root::Root;
use crate::server::agent::{Agent, Extensions, Factory, Limits, SharedTarget};
use crate::server::attributed::Attributed;
use crate::server::session::SessionConfig;
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
}

impl SftpServer {
    pub(super) fn run(self) -> Result<Exit, Failure> {
        let policy = super::transfer::receivers_policy(self.policy_file.as_deref())?;
        let home = std::env::home_dir().unwrap_or_else(|| PathBuf::from("/"));
        let confine = self.root.is_some();
        let root = self.root.unwrap_or(home);
        let rights = if self.read_only { Rights::READ_ONLY } else { self.rights.unwrap_or_default() };
        let config = SessionConfig {
            root: root.clone(),
            confine,
            rights,
            quota: None,
            policy: policy.clone(),
            actor: super::transfer::actor(),
        };
        let actor = logged_in();
        let Factory { target, source } = factory(root, confine, policy, &actor);
        let target =
            Box::new(move |path: &[u8]| Ok(Arc::new(Attributed::new(target(path)?, actor.clone())) as SharedTarget));
        let factory = Arc::new(Factory { target, source });
        let agent = Arc::new(Agent::limited(factory, Limits::default(), rights).alone());
        let ended = stdio::run(config, Some(Arc::clone(&agent) as Arc<dyn Extensions>));
        if let Some(agent) = Arc::into_inner(agent) {
            agent.finish();
        }
        ended.map_err(|error| Failure::Plain { exit: Exit::Io, message: format!("the session ended: {error}") })?;
        Ok(Exit::Done)
    }
}

/// Who is at the other end as far as this machine knows: whom sshd let in, and from where.
fn logged_in() -> String {
    let own = super::transfer::actor();
    let connection = std::env::var("SSH_CONNECTION").unwrap_or_default();
    match connection.split(' ').next().filter(|from| !from.is_empty()) {
        Some(from) => format!("{own} from {}", Escaped(from.as_bytes())),
        None => own,
    }
}

/// Opens the directories that a client names: beneath `root` where it is confined, else as the file system has them. What
/// `actor` is refused there is in the audit log of `root`; without a root there is no place for one.
pub(super) fn factory(root: PathBuf, confine: bool, policy: PolicySpec, actor: &str) -> Factory {
    let (target_root, actor) = (root.clone(), actor.to_owned());
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
    Factory {
        target: Box::new(move |path| {
            let policy = policy.clone();
            if !confine {
                own(path)?;
                return Ok(Arc::new(LocalTarget::new(&anywhere(&target_root, path), policy)));
            }
            let opened = own(path).and_then(|()| confined(&target_root, path));
            let (root, path) = opened.inspect_err(|error| record_refusal(&target_root, &actor, path, error))?;
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
fn record_refusal(root: &Path, actor: &str, path: &[u8], error: &Error) {
    let Error::Refused { reason, .. } = error else { return };
    let record = AuditRecord {
        actor: actor.to_owned(),
        action: "refuse".into(),
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
        for confine in [true, false] {
            let sides = factory(at.path().to_owned(), confine, PolicySpec::default(), "tester");
            for path in ["/.lockstep", ".lockstep", "sub/.lockstep/", "/sub/.lockstep/staging"] {
                assert!(matches!((sides.target)(path.as_bytes()), Err(Error::Refused { .. })), "{path}");
            }
            assert!((sides.target)(b"/sub/lockstep").is_ok());
        }
    }
}
