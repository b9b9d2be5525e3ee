//! How to log in to another machine: the options of a command line, `~/.ssh/config`, and what stands in for those not
//! given.

use std::path::PathBuf;

use super::Failure;
use super::passphrase;
use super::remote::Destination;
use crate::endpoint::link::ConnectError;
use crate::error::{Escaped, Exit};
use crate::ssh::SshRemote;
use crate::ssh::config::{Environment, Files, Given, Keyword, Resolved, resolve};

/// How to log in.
#[derive(Debug, Clone, clap::Args)]
pub(super) struct Ssh {
    /// TCP port of the SSH server [default: 22]
    #[arg(short = 'P', long, value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..))]
    port: Option<u16>,
    /// Connect through these hosts, one after the other
    #[arg(short = 'J', long, value_name = "[USER@]HOST[:PORT],...")]
    jump: Option<String>,
    /// Read this instead of ~/.ssh/config and /etc/ssh/ssh_config; 'none' reads none
    #[arg(short = 'F', long = "ssh-config", value_name = "FILE")]
    ssh_config: Option<PathBuf>,
    /// An option as in ssh_config(5); may be given several times
    #[arg(short = 'o', long = "ssh-option", value_name = "KEY=VALUE")]
    options: Vec<String>,
    /// Private key to log in with; may be given several times [default: those of ~/.ssh/config, or those in ~/.ssh]
    #[arg(long, value_name = "FILE")]
    pub(super) identity: Vec<PathBuf>,
    /// Trusted host keys [default: ~/.ssh/known_hosts and /etc/ssh/ssh_known_hosts]
    #[arg(long, value_name = "FILE")]
    known_hosts: Vec<PathBuf>,
    /// Seconds until a connection attempt is given up [default: 20]
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..))]
    connect_timeout: Option<u64>,
}

/// A connection that could not be made ends the command.
pub(super) fn failed(error: ConnectError) -> Failure {
    Failure::Plain { exit: error.exit, message: error.message }
}

impl Ssh {
    /// An option that was given, and that means nothing where no other machine takes part.
    pub(super) fn given(&self) -> Option<&'static str> {
        let given = [
            (self.port.is_some(), "-P"),
            (self.jump.is_some(), "-J"),
            (self.ssh_config.is_some(), "-F"),
            (!self.options.is_empty(), "-o"),
            (!self.identity.is_empty(), "--identity"),
            (!self.known_hosts.is_empty(), "--known-hosts"),
            (self.connect_timeout.is_some(), "--connect-timeout"),
        ];
        given.into_iter().find(|(given, _)| *given).map(|(_, option)| option)
    }

    /// The same with other keys.
    pub(super) fn with_identities(&self, identity: &[PathBuf]) -> Ssh {
        Ssh { identity: identity.to_vec(), ..self.clone() }
    }

    /// The host with the way to it.
    pub(super) fn resolve(&self, user: Option<&str>, host: &str) -> Result<Resolved, Failure> {
        let usage = |error: crate::ssh::config::ConfigError| Failure::usage(error.to_string());
        let files = match &self.ssh_config {
            None => Files::Usual,
            Some(file) if file.as_os_str().eq_ignore_ascii_case("none") => Files::None,
            Some(file) => Files::One(file.clone()),
        };
        let mut given = Given::new(files, Some(passphrase::of_keys()));
        given.identities.clone_from(&self.identity);
        given.known_hosts.clone_from(&self.known_hosts);
        if let Some(port) = self.port {
            given.set(Keyword::Port, port.to_string());
        }
        if let Some(jump) = &self.jump {
            given.set(Keyword::ProxyJump, jump);
        }
        if let Some(seconds) = self.connect_timeout {
            given.set(Keyword::ConnectTimeout, seconds.to_string());
        }
        for option in &self.options {
            given.option(option).map_err(usage)?;
        }
        resolve(host, user, &given, &Environment::of_process()).map_err(usage)
    }
}

/// Says what may be missed.
pub(super) trait Warn {
    /// To standard error.
    fn warn(&self);
}

impl Warn for Resolved {
    fn warn(&self) {
        for warning in &self.warnings {
            eprintln!("lockstep: warning: {warning}");
        }
    }
}

/// The host, with the keys to log in with and those to know it by. Nothing is connected yet.
pub(super) fn connect(destination: &Destination, ssh: &Ssh) -> Result<SshRemote, Failure> {
    let resolved = ssh.resolve(destination.user.as_deref(), &destination.host)?;
    resolved.warn();
    let Resolved { options, notes, .. } = resolved;
    Ok(SshRemote::new(options).map_err(failed)?.with_notes(notes))
}

/// `[USER@]HOST`, without a path.
pub(super) fn parse_host(text: &str) -> Result<(Option<String>, String), Failure> {
    let (user, host) = text.rsplit_once('@').map_or((None, text), |(user, host)| (Some(user.to_owned()), host));
    let host = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(host);
    if host.is_empty() || host.contains('/') || user.as_deref() == Some("") {
        let message = format!("'{}' is not [USER@]HOST", Escaped(text.as_bytes()));
        return Err(Failure::Plain { exit: Exit::Usage, message });
    }
    Ok((user, host.to_owned()))
}
