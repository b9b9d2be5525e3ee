//! How a directory of another machine is reached.

use std::sync::Arc;

use super::Failure;
use super::login::{Ssh, connect, failed};
use crate::codec::CompressOptions;
use crate::endpoint::agent::{AgentSource, AgentTarget, Lanes};
use crate::endpoint::link::{Remote, Way};
use crate::endpoint::{Source, Target};
use crate::error::Exit;
use crate::monitor::{Event, Monitor};

/// `[user@]host:path`; IPv6 addresses in brackets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Destination {
    pub(super) user: Option<String>,
    pub(super) host: String,
    pub(super) path: String,
}

impl Destination {
    /// `None` for a path of this machine: one without a colon, or with a slash before it.
    pub(super) fn parse(text: &str) -> Result<Option<Destination>, Failure> {
        let (user, rest) = match text.split_once('@') {
            Some((user, rest)) if !user.contains(['/', ':']) => (Some(user.to_owned()), rest),
            _ => (None, text),
        };
        let (host, path) = if let Some(rest) = rest.strip_prefix('[') {
            let Some((host, path)) = rest.split_once("]:") else { return Ok(None) };
            (host, path)
        } else {
            match rest.split_once(':') {
                Some((host, path)) if !host.contains('/') => (host, path),
                _ => return Ok(None),
            }
        };
        if host.is_empty() || path.is_empty() || user.as_deref() == Some("") {
            return Err(Failure::usage(format!("'{text}' is not [USER@]HOST:PATH")));
        }
        Ok(Some(Destination { user, host: host.to_owned(), path: path.to_owned() }))
    }
}

/// Opens connections to the agent by the first way in that is offered.
fn lanes(
    destination: &Destination,
    ssh: &Ssh,
    count: usize,
    compress: CompressOptions,
    monitor: &dyn Monitor,
) -> Result<Lanes, Failure> {
    let remote: Arc<dyn Remote> = Arc::new(connect(destination, ssh)?);
    for way in [Way::LockstepSubsystem, Way::LockstepExec(ssh.remote_command.clone())] {
        match remote.open(&way, 0) {
            Ok(link) => {
                let said = match &way {
                    Way::LockstepExec(command) => format!("the command '{command}'"),
                    _ => "the subsystem 'lockstep'".to_owned(),
                };
                monitor.event(Event::Detail(&format!("{}: connected to {said}", remote.describe())));
                let root = destination.path.as_bytes();
                return Lanes::connect(remote, &way, link, count, root, compress).map_err(|error| match error.exit() {
                    Exit::Trust => Failure::Endpoint(error),
                    exit => Failure::Plain {
                        exit,
                        message: format!(
                            "{}; is lockstep installed there? --remote-command says how it is started",
                            crate::error::chain(&error)
                        ),
                    },
                });
            }
            Err(error) if error.not_offered => {}
            Err(error) => return Err(failed(error)),
        }
    }
    Err(Failure::Plain {
        exit: Exit::Usage,
        message: format!(
            "{} lets neither the subsystem 'lockstep' nor '{}' be started; install lockstep there, or add \
             'Subsystem lockstep /usr/bin/lockstep sftp-server' to its sshd_config",
            remote.describe(),
            ssh.remote_command
        ),
    })
}

/// A directory of another machine as a target.
pub(super) fn target(
    destination: &Destination,
    ssh: &Ssh,
    count: usize,
    compress: CompressOptions,
    monitor: &dyn Monitor,
) -> Result<Box<dyn Target>, Failure> {
    Ok(Box::new(AgentTarget::new(lanes(destination, ssh, count, compress, monitor)?)))
}

/// A directory of another machine as a source.
pub(super) fn source(
    destination: &Destination,
    ssh: &Ssh,
    count: usize,
    compress: CompressOptions,
    monitor: &dyn Monitor,
) -> Result<Box<dyn Source>, Failure> {
    Ok(Box::new(AgentSource::new(lanes(destination, ssh, count, compress, monitor)?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn destinations_are_told_from_paths() {
        let parsed = |text: &str| {
            Destination::parse(text).unwrap().map(|found| (found.user.unwrap_or_default(), found.host, found.path))
        };
        let remote = |user: &str, host: &str, path: &str| Some((user.to_owned(), host.to_owned(), path.to_owned()));
        for (text, expected) in [
            ("gpu02:/data", remote("", "gpu02", "/data")),
            ("sync@gpu02:data/x", remote("sync", "gpu02", "data/x")),
            ("sync@[fe80::1]:/data", remote("sync", "fe80::1", "/data")),
            ("/data/a:b", None),
            ("./a:b", None),
            ("plain", None),
            ("host:a@b", remote("", "host", "a@b")),
        ] {
            assert_eq!(parsed(text), expected, "{text}");
        }
        for wrong in ["host:", ":path", "@host:path"] {
            assert!(Destination::parse(wrong).is_err(), "{wrong}");
        }
    }
}
