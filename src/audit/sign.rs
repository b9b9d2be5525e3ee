//! Signatures over heads: what is signed is the line that `audit.head` holds, so that stock `ssh-keygen -Y verify` checks it.

use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;

use ssh_key::public::KeyData;
use ssh_key::{HashAlg, PrivateKey, SshSig};

use super::{AuditRecord, Head, Login, Outcome};
use crate::access::secret;
use crate::error::{Escaped, in_words, shown};
use crate::signature::{self, AllowedSigners, Refusal, SignError};

/// What heads are signed for, and nothing else.
pub const NAMESPACE: &str = "audit@lockstep.internal";
/// Stands before the head in what is signed where files of the log are removed: a head that is signed for itself is no word of that.
const REMOVED: &str = "prune ";
/// More than any key takes.
const KEY_MAX: u64 = 64 << 10;

/// The record of a head that `key` has signed.
///
/// # Errors
/// When the key is too weak to prove anything.
pub fn signed_head(key: &PrivateKey, head: Head) -> Result<AuditRecord, SignError> {
    let record = AuditRecord {
        action: "head".into(),
        result: Some(Outcome::Success),
        head: Some(head.to_string()),
        ..AuditRecord::default()
    };
    signed(key, &head.encode(), record)
}

/// The record that files up to `head` are about to be removed, as `key` has signed it.
///
/// # Errors
/// As [`signed_head`].
pub(super) fn signed_removal(key: &PrivateKey, head: Head, record: AuditRecord) -> Result<AuditRecord, SignError> {
    signed(key, &removal(head), record)
}

fn removal(head: Head) -> String {
    format!("{REMOVED}{}", head.encode())
}

fn signed(key: &PrivateKey, message: &str, record: AuditRecord) -> Result<AuditRecord, SignError> {
    let public = key.public_key().key_data();
    let made = SshSig::sign(key, NAMESPACE, HashAlg::Sha512, message.as_bytes())?;
    let text = signature::assemble(NAMESPACE, public, made.signature().clone(), message.as_bytes())?;
    let login = Login { key: Some(public.fingerprint(HashAlg::Sha256).to_string()), ..Login::default() };
    Ok(AuditRecord { login: Some(Box::new(login)), signature: Some(text), ..record })
}

/// Whose signatures count.
#[derive(Debug)]
pub enum Trusted {
    /// One key, as that of a host.
    Key(Box<KeyData>),
    /// Those of a list.
    Signers(AllowedSigners),
}

impl Trusted {
    /// Who has signed `head`, as of `time` (seconds since 1970).
    ///
    /// # Errors
    /// Every reason to refuse it.
    pub fn judge(&self, head: Head, text: &str, time: u64) -> Result<String, Vec<Refusal>> {
        self.judge_text(&head.encode(), text, time)
    }

    /// Who has signed that files up to `head` were removed, as of `time`.
    ///
    /// # Errors
    /// Every reason to refuse it.
    pub fn judge_removal(&self, head: Head, text: &str, time: u64) -> Result<String, Vec<Refusal>> {
        self.judge_text(&removal(head), text, time)
    }

    fn judge_text(&self, message: &str, text: &str, time: u64) -> Result<String, Vec<Refusal>> {
        match self {
            Trusted::Key(key) => {
                signature::verify_by_key(NAMESPACE, text.as_bytes(), message.as_bytes(), key)?;
                Ok(key.fingerprint(HashAlg::Sha256).to_string())
            }
            Trusted::Signers(signers) => {
                let signer = signature::verify(NAMESPACE, text.as_bytes(), message.as_bytes(), signers, None, time)?;
                Ok(format!("{} with {}", signer.principal, signer.fingerprint))
            }
        }
    }
}

/// Reads the private key that signs: nobody but its owner may read it, and it has no passphrase, since nobody is there to ask.
///
/// # Errors
/// What is wrong with it, and what to do.
pub fn load_key(path: &Path) -> Result<PrivateKey, String> {
    let at = shown(path);
    let failed = |error: std::io::Error| format!("the audit log's signing key '{at}': {}", in_words(&error));
    // A FIFO must not block here.
    let flags = i32::try_from(rustix::fs::OFlags::NONBLOCK.bits()).unwrap_or_default();
    let file = File::options().read(true).custom_flags(flags).open(path).map_err(failed)?;
    let metadata = file.metadata().map_err(failed)?;
    let mode = metadata.mode() & 0o7777;
    if !metadata.is_file() {
        return Err(format!("the audit log's signing key '{at}' is not a regular file"));
    }
    if !secret::is_kept(&file).map_err(failed)? {
        return Err(format!(
            "the audit log's signing key '{at}' is open to others (mode {mode:04o}), who could sign in its name; run: chmod \
             600 {at}, and think of it as known"
        ));
    }
    if ![0, rustix::process::geteuid().as_raw()].contains(&metadata.uid()) {
        return Err(format!("the audit log's signing key '{at}' belongs to user {}, not to this one", metadata.uid()));
    }
    let mut text = String::new();
    file.take(KEY_MAX).read_to_string(&mut text).map_err(failed)?;
    let key = PrivateKey::from_openssh(&text).map_err(|error| {
        let why = Escaped(error.to_string().as_bytes()).to_string();
        format!("'{at}' is not an OpenSSH private key: {why}; make one: ssh-keygen -t ed25519 -N '' -f {at}")
    })?;
    if key.is_encrypted() {
        return Err(format!("the audit log's signing key '{at}' has a passphrase, and nobody is there to type it"));
    }
    // One that is too weak is found out now, not when the first head is due.
    signed_head(&key, Head::EMPTY).map_err(|error| format!("the audit log's signing key '{at}': {error}"))?;
    Ok(key)
}
