//! Who may log in: one decision, made at each login and again for open connections when the configuration is reloaded.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use russh::keys::ssh_key::public::KeyData;
use russh::keys::{Certificate, HashAlg};
use serde::{Deserialize, Serialize};

use super::authorized_keys::{Asked, AuthorizedKeys, Grant};
use super::live::short;
use super::resolve;
use crate::audit::Login;
use crate::config::{AddressList, Origins, Quota, Rights, is_called};
use crate::error::Escaped;
use crate::policy::PolicySpec;
use crate::trust::revoked::Revoked;
use crate::trust::{Credential, trusted_file};

/// One user of the listener, or all whose names fit; and, after a login, what came of it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ServeUser {
    /// The name that clients log in with; with `*` it is for all whose names fit.
    pub name: String,
    /// What the user sees as `/`. `%u` and `%p` are filled in at the login.
    pub root: PathBuf,
    /// Make the root where it is missing.
    pub create_root: bool,
    /// What may be done.
    pub rights: Rights,
    /// How much may lie beneath the root.
    pub quota: Option<Quota>,
    /// The user's `authorized_keys`, read anew at each login. `%u` is filled in.
    pub authorized_keys: PathBuf,
    /// The account of this machine that sessions run as; `None` for the server's own.
    pub run_as: Option<String>,
    /// Where the user may come from; `None` for anywhere.
    pub from: Option<AddressList>,
    /// The receiver's rules for what arrives.
    pub policy: PolicySpec,
    /// Keys that have something else.
    pub keys: Vec<ServeKey>,
}

/// A key, or those with a principal, that have something else than the rest of the user's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ServeKey {
    /// Which.
    pub which: Which,
    /// As for the user; and so on.
    pub root: Option<PathBuf>,
    /// What may be done.
    pub rights: Option<Rights>,
    /// How much may lie beneath the root.
    pub quota: Option<Quota>,
    /// The receiver's rules.
    pub policy: Option<PolicySpec>,
    /// Beside the user's.
    pub from: Option<AddressList>,
}

/// Which keys are meant.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Which {
    /// The key that signs, as `SHA256:…`.
    Fingerprint(String),
    /// A principal of the certificate that its authority is believed.
    Principal(String),
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
    origins: Origins,
    revoked_keys: Option<PathBuf>,
}

impl Access {
    /// Of these users, from where the lists say, but for what the file lists.
    pub fn new(users: &[ServeUser], origins: Origins, revoked_keys: Option<PathBuf>) -> Access {
        Access { users: users.iter().cloned().map(Arc::new).collect(), origins, revoked_keys }
    }

    /// Whether any user may come from this address. Who may not has nothing to say here.
    pub fn may_come(&self, peer: IpAddr) -> bool {
        self.users.iter().any(|user| {
            let listed = match user.name.contains('*') {
                true => self.origins.may_admit(peer),
                false => self.origins.admits(&user.name, peer),
            };
            listed && user.from.as_ref().is_none_or(|list| list.admits(peer))
        })
    }

    /// What is wrong with the files now, and would refuse people later: what refuses everybody as an error, what
    /// refuses some as a list.
    ///
    /// # Errors
    /// When the list of what is revoked cannot be used.
    pub fn look(&self) -> Result<Vec<String>, String> {
        self.revoked()?;
        let mut found = Vec::new();
        // Whose file is named after each of them has none to be looked at before he comes.
        for user in self.users.iter().filter(|user| !resolve::is_open(&user.authorized_keys)) {
            match keys(&resolve::fixed(user)) {
                Err(reason) => found.push(format!("user {}: {reason}", user.name)),
                Ok(keys) => {
                    let path = Escaped(user.authorized_keys.as_os_str().as_encoded_bytes());
                    found.extend(keys.unreadable.iter().map(|(number, reason)| {
                        format!("user {}: {path}, line {number} is left out: {reason}", user.name)
                    }));
                    let named = user.keys.iter().filter_map(|key| match &key.which {
                        Which::Principal(name) => Some(name).filter(|name| !keys.believes(name)),
                        Which::Fingerprint(_) => None,
                    });
                    found.extend(named.map(|name| {
                        let name = Escaped(name.as_bytes());
                        format!(
                            "user {}: what is said of the principal '{name}' holds for nobody: no line of {path} trusts an authority for it",
                            user.name
                        )
                    }));
                }
            }
        }
        Ok(found)
    }

    /// The list of what is revoked.
    pub fn revoked_keys(&self) -> Option<&Path> {
        self.revoked_keys.as_deref()
    }

    fn revoked(&self) -> Result<Revoked, String> {
        self.revoked_keys.as_deref().map_or_else(|| Ok(Revoked::default()), Revoked::read)
    }

    /// The section that a name is for: the one that is called so, or else the first that fits. With it the user, his file of
    /// keys filled in.
    fn user(&self, name: &str, peer: SocketAddr) -> Result<(&Arc<ServeUser>, ServeUser), String> {
        let exact = self.users.iter().find(|user| user.name == name);
        let section = exact.or_else(|| self.users.iter().find(|user| is_called(&user.name, name)));
        let section = section.ok_or("there is no such user")?;
        if !self.origins.admits(name, peer.ip()) {
            return Err("'allow' and 'deny' do not admit the user from this address".into());
        }
        if section.from.as_ref().is_some_and(|list| !list.admits(peer.ip())) {
            return Err("the user may not come from this address".into());
        }
        Ok((section, resolve::named(section, name)?))
    }

    /// Judges what was proven; the user as he is for who proved it. Blocks: it reads the files anew, and makes a root that is
    /// to be made.
    ///
    /// # Errors
    /// Why it is refused.
    pub fn judge(&self, name: &str, proof: &Proof, peer: SocketAddr) -> Result<(Arc<ServeUser>, Grant), String> {
        let (user, grant) = self.known(name, proof, peer)?;
        resolve::root_is_there(&user)?;
        Ok((Arc::new(user), grant))
    }

    fn known(&self, name: &str, proof: &Proof, peer: SocketAddr) -> Result<(ServeUser, Grant), String> {
        let (section, user) = self.user(name, peer)?;
        self.revoked()?.check(proof.credential())?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_err(|error| error.to_string())?.as_secs();
        let asked = Asked { user: name, peer: peer.ip(), now };
        let grant = keys(&user)?.authorize(proof.credential(), &asked)?;
        resolve::only_himself(section, name, proof)?;
        let user = resolve::settled(user, proof, &grant, peer.ip())?;
        Ok((user, grant))
    }

    /// Whether it is worth a client's while to sign with this key. A certificate shows itself only with its signature,
    /// so where an authority is trusted, every key is worth it.
    ///
    /// # Errors
    /// Why not.
    pub fn worth_signing(&self, name: &str, key: &KeyData, peer: SocketAddr) -> Result<(), String> {
        if keys(&self.user(name, peer)?.1)?.has_authority() {
            return Ok(());
        }
        self.known(name, &Proof::Key(Box::new(key.clone())), peer).map(drop)
    }
}

fn keys(user: &ServeUser) -> Result<AuthorizedKeys, String> {
    trusted_file::read(&user.authorized_keys).map(|text| AuthorizedKeys::parse(&text))
}
