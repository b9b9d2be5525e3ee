//! `lockstep sftp-server`: what sshd starts as a subsystem, and what a client starts by a command.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::Failure;
use crate::endpoint::Error;
use crate::endpoint::local::{LocalSource, LocalTarget, anywhere, beneath};
use crate::error::Exit;
use crate::path::RelPath;
use crate::policy::PolicySpec;
use crate::root::Root;
use crate::server::agent::{Agent, Extensions, Factory};
use crate::server::session::SessionConfig;
use crate::server::stdio;

/// Serves SFTP version 3 to any client, and lockstep's own protocol to a lockstep.
#[derive(Debug, clap::Args)]
pub(super) struct SftpServer {
    /// Show the client this directory as '/', and let it reach nothing else
    #[arg(long, value_name = "DIR")]
    root: Option<PathBuf>,
    /// Refuse everything that writes
    #[arg(long)]
    read_only: bool,
    /// A file of [[rule]] tables: owner and permissions of what arrives; a sender's wishes give way to it
    #[arg(long, value_name = "FILE")]
    policy_file: Option<PathBuf>,
}

impl SftpServer {
    pub(super) fn run(self) -> Result<Exit, Failure> {
        let policy = super::transfer::read_policy(self.policy_file.as_deref())?;
        let home = std::env::home_dir().unwrap_or_else(|| PathBuf::from("/"));
        let confine = self.root.is_some();
        let root = self.root.unwrap_or(home);
        let config = SessionConfig {
            root: root.clone(),
            confine,
            read_only: self.read_only,
            policy: policy.clone(),
            actor: super::transfer::actor(),
        };
        let agent = Arc::new(Agent::new(Arc::new(factory(root, confine, self.read_only, policy))).alone());
        let ended = stdio::run(config, Some(Arc::clone(&agent) as Arc<dyn Extensions>));
        if let Some(agent) = Arc::into_inner(agent) {
            agent.finish();
        }
        ended.map_err(|error| Failure::Plain { exit: Exit::Io, message: format!("the session ended: {error}") })?;
        Ok(Exit::Done)
    }
}

/// Opens the directories that a client names: beneath `root` where it is confined, else as the file system has them.
pub(super) fn factory(root: PathBuf, confine: bool, read_only: bool, policy: PolicySpec) -> Factory {
    let target_root = root.clone();
    // Whoever set up the server named the root: it is opened by name. What a client names is looked up beneath it.
    let confined = |root: &Path, path: &[u8]| -> Result<(Arc<Root>, Option<RelPath>), Error> {
        let path = beneath(path)?;
        let root = Root::open(root).map_err(|error| Error::Io {
            operation: error.operation,
            path: error.path.display().to_string(),
            source: error.source,
        })?;
        Ok((Arc::new(root), path))
    };
    Factory {
        target: Box::new(move |path| {
            if read_only {
                let reason = "this server only lets read".to_owned();
                return Err(Error::Refused { by: "the server".into(), reason });
            }
            let policy = policy.clone();
            if !confine {
                return Ok(Arc::new(LocalTarget::new(&anywhere(&target_root, path), policy)));
            }
            let (root, path) = confined(&target_root, path)?;
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
