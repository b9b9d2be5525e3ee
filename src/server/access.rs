//! Who may log in: one decision, made at each login and again for open connections when the configuration is reloaded.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use russh::keys::ssh_key::public::KeyData;
use russh::keys::{Certificate, HashAlg};

use super::authorized_keys::{Asked, AuthorizedKeys, Credential, Grant};
use super::live::short;
use super::revoked::Revoked;
use super::trusted_file;
use crate::audit::Login;
use crate::config::AddressList;
use crate::error::Escaped;
use crate::policy::PolicySpec;

/// One user of the listener.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ServeUser {
    /// The name that clients log in with.
    pub name: String,
    /// What the user sees as `/`.
    pub root: PathBuf,
    /// No request may write.
    pub read_only: bool,
    /// The user's `authorized_keys`, read anew at each login.
    pub authorized_keys: PathBuf,
    /// The account of this machine that sessions run as; `None` for the server's own.
    pub run_as: Option<String>,
    /// Where the user may come from; `None` for anywhere.
    pub from: Option<AddressList>,
    /// The receiver's rules for what arrives.
    pub policy: PolicySpec,
}

/// What a client has proven, kept so that it can be judged again.
#[derive(Debug, Clone)]
pub enum Proof {
    /// A key.
    Key(Box<KeyData>),
    /// A certificate, its own signature verified.
    Certificate(Box<Certificate>),
}

impl Proof {
    fn credential(&self) -> Credential<'_> {
        match self {
            Proof::Key(key) => Credential::Key(key),
            Proof::Certificate(certificate) => Credential::Certificate(certificate),
        }
    }

    /// `SHA256:…` of the key that signed.
    pub fn fingerprint(&self) -> String {
        let key = match self {
            Proof::Key(key) => key,
            Proof::Certificate(certificate) => certificate.public_key(),
        };
        key.fingerprint(HashAlg::Sha256).to_string()
    }

    /// All of that in the fields of an audit line, with the address that the packets came from.
    pub fn login(&self, peer: SocketAddr) -> Login {
        let (peer, key) = (Some(peer.to_string()), Some(self.fingerprint()));
        match self {
            Proof::Key(_) => Login { peer, key, ..Login::default() },
            Proof::Certificate(certificate) => Login {
                peer,
                key,
                certificate: Some(short(&Escaped(certificate.key_id().as_bytes()).to_string(), 100)),
                serial: Some(certificate.serial()),
                authority: Some(certificate.signature_key().fingerprint(HashAlg::Sha256).to_string()),
            },
        }
    }

    /// The fingerprint, and what the certificate says of itself; for logs.
    pub fn describe(&self) -> String {
        match self {
            Proof::Key(_) => self.fingerprint(),
            Proof::Certificate(certificate) => format!(
                "{} certificate '{}' (serial {}) of {}",
                self.fingerprint(),
                short(&Escaped(certificate.key_id().as_bytes()).to_string(), 100),
                certificate.serial(),
                certificate.signature_key().fingerprint(HashAlg::Sha256),
            ),
        }
    }
}

/// The users, and what is revoked.
#[derive(Debug, Clone, Default)]
pub struct Access {
    users: Vec<Arc<ServeUser>>,
    revoked_keys: Option<PathBuf>,
}

impl Access {
    /// Of these users, but for what the file lists.
    pub fn new(users: &[ServeUser], revoked_keys: Option<PathBuf>) -> Access {
        Access { users: users.iter().cloned().map(Arc::new).collect(), revoked_keys }
    }

    /// What is wrong with the files now, and would refuse people later: what refuses everybody as an error, what
    /// refuses some as a list.
    ///
    /// # Errors
    /// When the list of what is revoked cannot be used.
    pub fn look(&self) -> Result<Vec<String>, String> {
        self.revoked()?;
        let mut found = Vec::new();
        for user in &self.users {
            match keys(user) {
                Err(reason) => found.push(format!("user {}: {reason}", user.name)),
                Ok(keys) => found.extend(keys.unreadable.iter().map(|(number, reason)| {
                    let path = Escaped(user.authorized_keys.as_os_str().as_encoded_bytes());
                    format!("user {}: {path}, line {number} is left out: {reason}", user.name)
                })),
            }
        }
        Ok(found)
    }

    fn revoked(&self) -> Result<Revoked, String> {
        self.revoked_keys.as_deref().map_or_else(|| Ok(Revoked::default()), Revoked::read)
    }

    fn user(&self, name: &str, peer: SocketAddr) -> Result<&Arc<ServeUser>, String> {
        let user = self.users.iter().find(|user| user.name == name).ok_or("there is no such user")?;
        match &user.from {
            Some(list) if !list.admits(peer.ip()) => Err("the user may not come from this address".into()),
            _ => Ok(user),
        }
    }

    /// Judges what was proven. Blocks: it reads the files anew.
    ///
    /// # Errors
    /// Why it is refused.
    pub fn judge(&self, name: &str, proof: &Proof, peer: SocketAddr) -> Result<(Arc<ServeUser>, Grant), String> {
        let user = self.user(name, peer)?;
        self.revoked()?.check(proof.credential())?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_err(|error| error.to_string())?.as_secs();
        let asked = Asked { user: name, peer: peer.ip(), now };
        let grant = keys(user)?.authorize(proof.credential(), &asked)?;
        Ok((Arc::clone(user), grant))
    }

    /// Whether it is worth a client's while to sign with this key. A certificate shows itself only with its signature,
    /// so where an authority is trusted, every key is worth it.
    ///
    /// # Errors
    /// Why not.
    pub fn worth_signing(&self, name: &str, key: &KeyData, peer: SocketAddr) -> Result<(), String> {
        if keys(self.user(name, peer)?)?.has_authority() {
            return Ok(());
        }
        self.judge(name, &Proof::Key(Box::new(key.clone())), peer).map(drop)
    }
}

fn keys(user: &ServeUser) -> Result<AuthorizedKeys, String> {
    trusted_file::read(&user.authorized_keys).map(|text| AuthorizedKeys::parse(&text))
}
