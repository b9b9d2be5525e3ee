//! Which host, as whom, and what is trusted. Nothing in here is taken from the environment.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use super::quote;
use crate::error::Escaped;

/// Gives the passphrase of a key file, or `None` when there is nobody to ask.
pub type Passphrase = Arc<dyn Fn(&Path) -> Option<String> + Send + Sync>;

/// What becomes of a host whose key is in no file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum UnknownHost {
    /// Refused, with the command that adds the key.
    #[default]
    Refuse,
    /// Its key is added to the first file; a key that differs from one on file is still refused.
    Add,
}

/// When a connection that says nothing is given up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Keepalive {
    /// After so long without a byte the host is asked for a sign of life.
    pub interval: Duration,
    /// After so many questions without an answer the connection is lost.
    pub count: usize,
}

impl Default for Keepalive {
    fn default() -> Self {
        Keepalive { interval: Duration::from_secs(15), count: 3 }
    }
}

/// Which of a host's addresses are tried.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[allow(missing_docs)]
pub enum AddressFamily {
    #[default]
    Any,
    V4,
    V6,
}

/// One host, and the way to it.
#[derive(Clone)]
pub struct SshOptions {
    /// Name or address to connect to, without brackets.
    pub host: String,
    /// The TCP port.
    pub port: u16,
    /// Who logs in.
    pub user: String,
    /// The name that known hosts and certificates are looked up by, instead of the host's.
    pub host_key_alias: Option<String>,
    /// Key files, tried in order: private ones, or public ones whose other half the agent has.
    pub identity_files: Vec<PathBuf>,
    /// User certificates, for keys of files and of the agent.
    pub certificate_files: Vec<PathBuf>,
    /// Of the agent's keys only those are offered that a file names.
    pub identities_only: bool,
    /// Socket of the agent.
    pub agent_socket: Option<PathBuf>,
    /// Files of trusted host keys; those that do not exist are empty. The first is named when a key is unknown.
    pub known_hosts: Vec<PathBuf>,
    /// A list of keys that no host may have; it must be there. `None` for none.
    pub revoked_host_keys: Option<PathBuf>,
    /// What becomes of a host whose key is in none of them.
    pub unknown_host: UnknownHost,
    /// How long each step until the login may take.
    pub connect_timeout: Duration,
    /// When a silent connection is given up; `None` for never.
    pub keepalive: Option<Keepalive>,
    /// Which of the host's addresses are tried.
    pub address_family: AddressFamily,
    /// A command, word by word, whose standard input and output are the connection.
    pub proxy_command: Option<Vec<String>>,
    /// The host that is connected to first, and through which this one is reached.
    pub jump: Option<Box<SshOptions>>,
    /// Asked for the passphrase of an encrypted key file.
    pub passphrase: Option<Passphrase>,
}

impl SshOptions {
    /// A host reached directly, with neither keys nor known hosts.
    pub fn new(user: &str, host: &str, port: u16) -> SshOptions {
        SshOptions {
            host: host.to_owned(),
            port,
            user: user.to_owned(),
            host_key_alias: None,
            identity_files: Vec::new(),
            certificate_files: Vec::new(),
            identities_only: false,
            agent_socket: None,
            known_hosts: Vec::new(),
            revoked_host_keys: None,
            unknown_host: UnknownHost::default(),
            connect_timeout: Duration::from_secs(20),
            keepalive: Some(Keepalive::default()),
            address_family: AddressFamily::Any,
            proxy_command: None,
            jump: None,
            passphrase: None,
        }
    }

    /// `user@host:port`, for messages.
    pub fn describe(&self) -> String {
        let SshOptions { host, port, user, .. } = self;
        let (user, host) = (Escaped(user.as_bytes()), Escaped(host.as_bytes()));
        if self.host.contains(':') { format!("{user}@[{host}]:{port}") } else { format!("{user}@{host}:{port}") }
    }

    /// The hosts on the way, as `-J` takes them; empty for none.
    pub fn jumps(&self) -> String {
        let Some(jump) = &self.jump else { return String::new() };
        let before = jump.jumps();
        if before.is_empty() { jump.describe() } else { format!("{before},{}", jump.describe()) }
    }

    /// Arguments of a command of ours that takes the same way, each with a blank behind it.
    pub(super) fn arguments(&self) -> String {
        let jumps = self.jumps();
        let mut arguments = Vec::new();
        if !jumps.is_empty() {
            arguments.push(format!("-J {} ", quote(&jumps)));
        }
        if let Some(command) = &self.proxy_command {
            let words: Vec<String> = command.iter().map(|word| quote(&word.replace('%', "%%"))).collect();
            arguments.push(format!("-o {} ", quote(&format!("ProxyCommand={}", words.join(" ")))));
        }
        if let Some(alias) = &self.host_key_alias {
            arguments.push(format!("-o {} ", quote(&format!("HostKeyAlias={alias}"))));
        }
        if self.port != 22 {
            arguments.push(format!("-P {} ", self.port));
        }
        arguments.concat()
    }

    /// Whether this can be a host to connect to; the reason if not.
    pub(super) fn check(&self) -> Result<(), String> {
        let odd = |c: char| c.is_control() || c.is_whitespace() || ",[]*?!|#@".contains(c);
        for name in [Some(&self.host), self.host_key_alias.as_ref()].into_iter().flatten() {
            if name.is_empty() || name.starts_with('-') || name.contains(odd) {
                return Err(format!("'{}' is not the name of a host", Escaped(name.as_bytes())));
            }
        }
        if self.user.is_empty() {
            return Err(format!("no user to log in to {} as; write user@host", self.host));
        }
        if self.proxy_command.is_some() && (self.host.contains(is_active) || self.user.contains(is_active)) {
            return Err(format!("'{}' cannot be part of a ProxyCommand", Escaped(self.describe().as_bytes())));
        }
        self.jump.as_ref().map_or(Ok(()), |jump| jump.check())
    }
}

/// OpenSSH's list of what no name may have that becomes part of a command, which may be a script that is not careful.
pub(super) fn is_active(c: char) -> bool {
    "'`\"$\\;&<>|(){}".contains(c)
}
