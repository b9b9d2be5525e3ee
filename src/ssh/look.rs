//! What of the way to a host can be judged without connecting: the keys to log in with, and what is known of the host.

use super::identity::{Content, Identities};
use super::known_hosts::KnownHost;
use super::options::{SshOptions, UnknownHost};

/// What was found; safe to print.
#[derive(Debug, Default)]
pub struct Outlook {
    /// A login cannot work: why.
    pub wrong: Vec<String>,
    /// A login will hardly work: why, and what to do. The same of many hosts is said in the same words.
    pub doubtful: Vec<(String, String)>,
}

impl SshOptions {
    /// Looks at what a login to this host, and to those on the way, would use.
    pub fn look(&self) -> Outlook {
        let mut found = self.jump.as_ref().map(|jump| jump.look()).unwrap_or_default();
        if let Err(reason) = self.check() {
            found.wrong.push(reason);
            return found;
        }
        match Identities::read(&self.identity_files, &self.certificate_files) {
            Ok(identities) => found.doubtful.extend(self.doubt_of_keys(&identities)),
            Err(reason) => found.wrong.push(reason),
        }
        match KnownHost::read(self) {
            Err(reason) => found.wrong.push(reason),
            Ok(known) if self.unknown_host == UnknownHost::Refuse => found.doubtful.extend(known.doubt()),
            Ok(_) => {}
        }
        found
    }

    fn doubt_of_keys(&self, identities: &Identities) -> Option<(String, String)> {
        if self.agent_socket.is_some() {
            return None;
        }
        let usable = |content: &Content| matches!(content, Content::Open(_));
        if identities.files.iter().any(|identity| usable(&identity.content)) {
            return None;
        }
        let reason = if identities.files.iter().any(|identity| matches!(identity.content, Content::Locked(_))) {
            "the key has a passphrase, which a service has nobody to ask for".to_owned()
        } else if identities.notes.is_empty() {
            "no key is named, and there is no agent".to_owned()
        } else {
            identities.notes.join("; ")
        };
        let remedy = "make one with 'lockstep keys generate', and name it with --identity, as the unit does";
        Some((format!("there is no key to log in with: {reason}"), remedy.to_owned()))
    }
}
