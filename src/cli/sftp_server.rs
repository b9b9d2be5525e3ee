//! `lockstep sftp-server`: what sshd starts as a subsystem, and what a client starts by a command.

use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::Failure;
use crate::endpoint::Error;
use crate::endpoint::local::{LocalSource, LocalTarget};
use crate::error::Exit;
use crate::path::RelPath;
use crate::policy::PolicySpec;
use crate::server::agent::{Agent, Factory};
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
        let agent = Agent::new(Arc::new(factory(root, confine, self.read_only, policy))).alone();
        stdio::run(config, Some(Arc::new(agent)))
            .map_err(|error| Failure::Plain { exit: Exit::Io, message: format!("the session ended: {error}") })?;
        Ok(Exit::Done)
    }
}

/// Opens the directories that a client names: below `root` where it is confined, else as the file system has them.
pub(super) fn factory(root: PathBuf, confine: bool, read_only: bool, policy: PolicySpec) -> Factory {
    let target_root = root.clone();
    Factory {
        target: Box::new(move |path| {
            if read_only {
                let reason = "this server only lets read".to_owned();
                return Err(Error::Refused { by: "the server".into(), reason });
            }
            Ok(Arc::new(LocalTarget::new(&locate(&target_root, confine, path)?, policy.clone())))
        }),
        source: Box::new(move |path| Ok(Arc::new(LocalSource::new(&locate(&root, confine, path)?, None)?))),
    }
}

/// The directory that a client means.
fn locate(root: &Path, confine: bool, path: &[u8]) -> Result<PathBuf, Error> {
    let refused = |reason: String| Error::Refused { by: "the server".into(), reason };
    if !confine {
        let path = Path::new(std::ffi::OsStr::from_bytes(path));
        return Ok(root.join(path.strip_prefix("~").unwrap_or(path)));
    }
    let parts: Vec<&[u8]> =
        path.split(|&byte| byte == b'/').filter(|part| !part.is_empty() && *part != b"." && *part != b"~").collect();
    if parts.is_empty() {
        return Ok(root.to_owned());
    }
    let relative = RelPath::new(parts.join(&b'/')).map_err(|error| refused(error.to_string()))?;
    // RACE: who may write in the root could replace a parent by a link after this look; what is opened then is opened
    // by name. A confined user who can also make links on the server by other means should have a root of his own.
    let mut at = root.to_owned();
    for component in relative.components() {
        at.push(std::ffi::OsStr::from_bytes(component));
        match std::fs::symlink_metadata(&at) {
            Ok(found) if found.file_type().is_symlink() => {
                return Err(refused(format!("'{relative}' leads over a symbolic link")));
            }
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => break,
            Err(error) => return Err(refused(format!("'{relative}': {error}"))),
        }
    }
    Ok(root.join(relative.as_path()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn h01_h02_a_confined_client_reaches_nothing_outside() {
        let at = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/etc", at.path().join("link")).unwrap();
        for (asked, found) in [("/", ""), ("", ""), ("/a/b", "a/b"), ("a//b/", "a/b"), ("~/x", "x"), ("/etc", "etc")] {
            let path = locate(at.path(), true, asked.as_bytes()).unwrap();
            assert_eq!(path, at.path().join(found), "{asked}");
        }
        for asked in ["..", "/../etc", "a/../../b", "link", "link/ssh"] {
            assert!(locate(at.path(), true, asked.as_bytes()).is_err(), "{asked}");
        }
    }
}
