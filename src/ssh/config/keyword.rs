//! The keywords of `ssh_config` that mean something here.

/// What can be set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[allow(missing_docs)]
pub enum Keyword {
    AddressFamily,
    BatchMode,
    CertificateFile,
    ConnectTimeout,
    GlobalKnownHostsFile,
    HostKeyAlias,
    HostName,
    IdentitiesOnly,
    IdentityAgent,
    IdentityFile,
    Port,
    ProxyCommand,
    ProxyJump,
    RevokedHostKeys,
    ServerAliveCountMax,
    ServerAliveInterval,
    StrictHostKeyChecking,
    User,
    UserKnownHostsFile,
}

use Keyword as K;

const NAMES: &[(&str, Keyword)] = &[
    ("AddressFamily", K::AddressFamily),
    ("BatchMode", K::BatchMode),
    ("CertificateFile", K::CertificateFile),
    ("ConnectTimeout", K::ConnectTimeout),
    ("GlobalKnownHostsFile", K::GlobalKnownHostsFile),
    ("HostKeyAlias", K::HostKeyAlias),
    ("HostName", K::HostName),
    ("IdentitiesOnly", K::IdentitiesOnly),
    ("IdentityAgent", K::IdentityAgent),
    ("IdentityFile", K::IdentityFile),
    ("Port", K::Port),
    ("ProxyCommand", K::ProxyCommand),
    ("ProxyJump", K::ProxyJump),
    ("RevokedHostKeys", K::RevokedHostKeys),
    ("ServerAliveCountMax", K::ServerAliveCountMax),
    ("ServerAliveInterval", K::ServerAliveInterval),
    ("StrictHostKeyChecking", K::StrictHostKeyChecking),
    ("User", K::User),
    ("UserKnownHostsFile", K::UserKnownHostsFile),
];

/// What is always so here: it may be asked for, but not otherwise.
const ALWAYS: &[(&str, &str, &str)] = &[
    ("ClearAllForwardings", "yes", "nothing is ever forwarded"),
    ("Compression", "no", "lockstep compresses by itself (--compress-level)"),
    ("ForwardAgent", "no", "the agent is never forwarded"),
    ("ForwardX11", "no", "nothing is ever forwarded"),
    ("KbdInteractiveAuthentication", "no", "lockstep never sends a password"),
    ("PasswordAuthentication", "no", "lockstep never sends a password"),
    ("PreferredAuthentications", "publickey", "lockstep logs in with keys alone"),
    ("PubkeyAuthentication", "yes", "lockstep logs in with keys alone"),
];

impl Keyword {
    /// Reads it, in upper or lower case.
    pub(super) fn parse(name: &str) -> Option<Keyword> {
        NAMES.iter().find(|(known, _)| known.eq_ignore_ascii_case(name)).map(|(_, keyword)| *keyword)
    }

    pub(super) fn name(self) -> &'static str {
        NAMES.iter().find(|(_, keyword)| *keyword == self).map_or("", |(name, _)| name)
    }

    /// Whether each further value is one more, where others keep the first.
    pub(super) fn accumulates(self) -> bool {
        matches!(self, K::IdentityFile | K::CertificateFile)
    }

    /// Whether several words may follow.
    pub(super) fn takes_many(self) -> bool {
        matches!(self, K::UserKnownHostsFile | K::GlobalKnownHostsFile)
    }

    /// Whether the rest of the line is one value, spaces and all.
    pub(super) fn takes_the_rest(self) -> bool {
        matches!(self, K::ProxyCommand | K::ProxyJump)
    }

    /// Whether it says something of one host only, and so nothing of those that are jumped through.
    pub(super) fn is_of_one_host(self) -> bool {
        matches!(self, K::HostKeyAlias | K::HostName | K::Port | K::ProxyCommand | K::ProxyJump | K::User)
    }
}

/// A keyword of the command line: unknown ones, and what is never so here, are errors.
///
/// # Errors
/// What is wrong, and what was probably meant.
pub(super) fn of_command_line(name: &str, value: &str) -> Result<Option<Keyword>, String> {
    if let Some(keyword) = Keyword::parse(name) {
        return Ok(Some(keyword));
    }
    match ALWAYS.iter().find(|(known, ..)| known.eq_ignore_ascii_case(name)) {
        Some((_, only, _)) if only.eq_ignore_ascii_case(value) => Ok(None),
        Some((known, only, why)) => Err(format!("{known} can only be '{only}': {why}")),
        None => {
            let known: Vec<String> = NAMES.iter().map(|(name, _)| (*name).to_owned()).collect();
            Err(format!("lockstep has no option '{name}'{}", crate::config::meant(name, &known)))
        }
    }
}
