//! Key files to log in with, and the certificates that go with them.
//!
//! A private key that others can read is refused before anything is connected: it may be anybody's by now.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use russh::keys::ssh_key::certificate::CertType;
use russh::keys::ssh_key::public::KeyData;
use russh::keys::{Certificate, PrivateKey, PublicKey};

use super::{Passphrase, shown};
use crate::access::secret;

/// More than any key takes.
pub(super) const MAX_BYTES: u64 = 64 << 10;
/// How often a passphrase is asked for.
const ATTEMPTS: usize = 3;

/// A file named as an identity.
pub(super) struct Identity {
    pub(super) path: PathBuf,
    /// Unknown for a locked file in a format that hides it.
    pub(super) public: Option<PublicKey>,
    pub(super) content: Content,
}

/// What there is of a key.
#[derive(Clone)]
pub(super) enum Content {
    Open(Arc<PrivateKey>),
    /// The file's text, to be opened with a passphrase.
    Locked(String),
    /// The public half alone: an agent has the other.
    Public,
}

/// What was read of the files named; those that cannot be used are told in `notes`.
#[derive(Default)]
pub(super) struct Identities {
    pub(super) files: Vec<Identity>,
    certificates: Vec<Certificate>,
    pub(super) notes: Vec<String>,
}

impl Identities {
    /// Reads key files with the certificates beside them, and certificate files.
    ///
    /// # Errors
    /// A private key that others can read.
    pub(super) fn read(keys: &[PathBuf], certificates: &[PathBuf]) -> Result<Identities, String> {
        let mut found = Identities::default();
        for path in keys {
            match read_text(path) {
                Ok((text, file)) => found.identity(path, text, &file)?,
                Err(error) => found.note(path, &error),
            }
            let beside = certificate_beside(path);
            if beside.exists() {
                found.certificate(&beside);
            }
        }
        for path in certificates {
            found.certificate(path);
        }
        Ok(found)
    }

    fn note(&mut self, path: &Path, reason: &dyn std::fmt::Display) {
        self.notes.push(format!("'{}': {reason}", shown(path)));
    }

    fn certificate(&mut self, path: &Path) {
        match read_text(path).map_err(|error| error.to_string()).and_then(|(text, _)| usable_certificate(&text)) {
            // One that is named twice is offered once.
            Ok(certificate) if self.certificates.contains(&certificate) => {}
            Ok(certificate) => self.certificates.push(certificate),
            Err(reason) => self.note(path, &reason),
        }
    }

    fn identity(&mut self, path: &Path, text: String, file: &File) -> Result<(), String> {
        let (public, content) = if let Ok(public) = PublicKey::from_openssh(text.trim()) {
            (Some(public), Content::Public)
        } else {
            match russh::keys::decode_secret_key(&text, None) {
                Ok(key) => (Some(key.public_key().clone()), Content::Open(Arc::new(key))),
                Err(russh::keys::Error::KeyIsEncrypted) => (locked_public(path, &text), Content::Locked(text)),
                Err(_) if text.contains("ENCRYPTED") => (locked_public(path, &text), Content::Locked(text)),
                Err(error) => {
                    self.note(path, &error);
                    return Ok(());
                }
            }
        };
        if !matches!(content, Content::Public) {
            match secret::is_kept(file) {
                Ok(true) => {}
                Ok(false) => return Err(exposed(path, file)),
                Err(error) => {
                    self.note(path, &error);
                    return Ok(());
                }
            }
        }
        self.files.push(Identity { path: path.to_owned(), public, content });
        Ok(())
    }

    /// The certificates for this key.
    pub(super) fn certificates_of<'a>(&'a self, key: &'a KeyData) -> impl Iterator<Item = &'a Certificate> {
        self.certificates.iter().filter(move |certificate| certificate.public_key() == key)
    }

    /// Whether a file names this key.
    pub(super) fn names(&self, key: &KeyData) -> bool {
        let of_file = |identity: &Identity| identity.public.as_ref().is_some_and(|public| public.key_data() == key);
        self.files.iter().any(of_file) || self.certificates_of(key).next().is_some()
    }
}

fn exposed(path: &Path, file: &File) -> String {
    let path = shown(path);
    let mode = file.metadata().map_or(0, |found| found.mode());
    format!(
        "'{path}': others can read this private key (mode {:04o}), so it may be known to them; run: chmod 600 {}",
        mode & 0o7777,
        super::quote(&path)
    )
}

/// A file's text, and the file. Nothing else is waited for: a FIFO is refused.
fn read_text(path: &Path) -> io::Result<(String, File)> {
    let flags = rustix::fs::OFlags::NONBLOCK.bits().cast_signed();
    let file: File = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
    // RACE: none; the descriptor that is checked is the one that is read.
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("not a regular file"));
    }
    let mut text = String::new();
    (&file).take(MAX_BYTES).read_to_string(&mut text)?;
    Ok((text, file))
}

/// `key-cert.pub`, beside `key` and `key.pub`.
fn certificate_beside(path: &Path) -> PathBuf {
    let is_public = path.extension().is_some_and(|end| end == "pub");
    let mut name = if is_public { path.with_extension("") } else { path.to_owned() }.into_os_string();
    name.push("-cert.pub");
    PathBuf::from(name)
}

/// The public half of a locked file: OpenSSH's format shows it, others have it beside them.
fn locked_public(path: &Path, text: &str) -> Option<PublicKey> {
    if let Ok(key) = PrivateKey::from_openssh(text) {
        return Some(key.public_key().clone());
    }
    let mut beside = path.as_os_str().to_owned();
    beside.push(".pub");
    PublicKey::from_openssh(read_text(Path::new(&beside)).ok()?.0.trim()).ok()
}

/// Opens a locked key with what `ask` gives.
///
/// # Errors
/// Why it stays locked, and what to do.
pub(super) fn unlock(path: &Path, text: &str, ask: Option<&Passphrase>) -> Result<Arc<PrivateKey>, String> {
    let name = shown(path);
    let no_one = || format!("'{name}': needs a passphrase, and there is no terminal to ask at; ssh-add it to an agent");
    let ask = ask.ok_or_else(no_one)?;
    for _ in 0..ATTEMPTS {
        let secret = ask(path).ok_or_else(no_one)?;
        if let Ok(key) = russh::keys::decode_secret_key(text, Some(&secret)) {
            return Ok(Arc::new(key));
        }
    }
    Err(format!("'{name}': the passphrase does not open it"))
}

/// Reads a user certificate that a server could accept now.
fn usable_certificate(text: &str) -> Result<Certificate, String> {
    let certificate = Certificate::from_openssh(text.trim()).map_err(|error| format!("not a certificate: {error}"))?;
    if certificate.cert_type() != CertType::User {
        return Err("a host's certificate cannot log a user in; have the key signed without -h".into());
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_err(|error| error.to_string())?.as_secs();
    if now >= certificate.valid_before() {
        return Err("the certificate has expired; have the key signed again".into());
    }
    if now < certificate.valid_after() {
        return Err("the certificate is not valid yet; is the clock right?".into());
    }
    Ok(certificate)
}
