//! Making OpenSSH certificates: what an authority says of a key, signed by it.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use russh::keys::signature::{Error as SignatureError, Signer};
use russh::keys::ssh_key::certificate::{Builder, CertType};
use russh::keys::ssh_key::getrandom::SysRng;
use russh::keys::ssh_key::public::KeyData;
use russh::keys::ssh_key::rand_core::TryRng as _;
use russh::keys::ssh_key::{self, Signature};
use russh::keys::{Certificate, PublicKey};

use super::signing::SigningKey;

/// The clock of whoever checks a certificate may be this much behind that of its authority.
pub const CLOCK_SKEW: Duration = Duration::from_secs(300);

/// For whom a certificate is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Subject {
    /// Somebody who logs in; principals are names to log in with.
    User,
    /// A server; principals are the names it is reached by.
    Host,
}

/// What a certificate is to say.
#[derive(Debug, Clone)]
pub struct Statement {
    /// A user's or a host's.
    pub subject: Subject,
    /// The key's name in logs.
    pub id: String,
    /// Names that it is good for; at least one.
    pub principals: Vec<String>,
    /// Its number, by which it can be revoked; not 0.
    pub serial: u64,
    /// From when on, in seconds since 1970.
    pub after: u64,
    /// Until when.
    pub before: u64,
    /// Addresses that it is good from, as `source-address` has them.
    pub source: Option<String>,
}

/// Has an authority certify a key. Of the extensions, which all allow something beside file transfer, none is given.
///
/// # Errors
/// What cannot be certified, or why the authority does not sign.
pub fn certify(key: &PublicKey, statement: &Statement, authority: &SigningKey) -> Result<Certificate, String> {
    let failed = |error: ssh_key::Error| format!("cannot make the certificate: {error}");
    if statement.principals.is_empty() {
        return Err("a certificate without principals would be good for everybody".into());
    }
    let mut nonce = [0; 32];
    SysRng.try_fill_bytes(&mut nonce).map_err(|error| format!("no random numbers: {error}"))?;
    let mut builder = Builder::new(nonce, key.key_data().clone(), statement.after, statement.before).map_err(failed)?;
    let kind = match statement.subject {
        Subject::User => CertType::User,
        Subject::Host => CertType::Host,
    };
    builder.cert_type(kind).and_then(|builder| builder.serial(statement.serial)).map_err(failed)?;
    builder.key_id(&statement.id).and_then(|builder| builder.comment(key.comment().clone())).map_err(failed)?;
    for principal in &statement.principals {
        builder.valid_principal(principal).map_err(failed)?;
    }
    if let Some(source) = &statement.source {
        builder.critical_option("source-address", source).map_err(failed)?;
    }
    let authority = Authority { key: authority, reason: std::cell::RefCell::default() };
    let made = builder.sign(&authority);
    made.map_err(|error| authority.reason.take().unwrap_or_else(|| failed(error)))
}

/// A number that no other certificate has, as far as chance goes; never 0, which means none.
///
/// # Errors
/// When the system has no random numbers.
pub fn serial() -> Result<u64, String> {
    let number = SysRng.try_next_u64().map_err(|error| format!("no random numbers: {error}"))?;
    // Programs with signed numbers read it too.
    Ok((number >> 1).max(1))
}

/// From now, less what clocks may differ, for so long.
pub fn validity(length: Duration) -> (u64, u64) {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    (now.saturating_sub(CLOCK_SKEW).as_secs(), (now + length).as_secs())
}

/// Keeps why the key did not sign: the trait's error has no room for it.
struct Authority<'k> {
    key: &'k SigningKey,
    reason: std::cell::RefCell<Option<String>>,
}

impl Signer<Signature> for Authority<'_> {
    fn try_sign(&self, data: &[u8]) -> Result<Signature, SignatureError> {
        self.key.sign(data).map_err(|reason| {
            self.reason.replace(Some(reason));
            SignatureError::new()
        })
    }
}

impl From<&Authority<'_>> for KeyData {
    fn from(authority: &Authority<'_>) -> KeyData {
        authority.key.public().clone()
    }
}
