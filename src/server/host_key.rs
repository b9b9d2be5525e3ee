//! The listener's own key: made at the first start, refused when others can read it.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use russh::keys::ssh_key::LineEnding;
use russh::keys::ssh_key::certificate::CertType;
use russh::keys::ssh_key::private::{Ed25519Keypair, KeypairData};
use russh::keys::{Certificate, PrivateKey};

use crate::access::secret;
use crate::error::in_words;
use crate::trust::trusted_file;

/// Why there is no host key.
#[derive(Debug, thiserror::Error)]
pub enum HostKeyError {
    /// The file cannot be read or made.
    #[error("cannot use host key {}", crate::error::shown(path))]
    Io {
        /// The key file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Others have access.
    #[error(
        "host key {} is open to others (mode {mode:03o}); run: chmod 600 {}",
        crate::error::shown(path),
        crate::error::shown(path)
    )]
    Exposed {
        /// The key file.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// Somebody else's.
    #[error("host key {}: {reason}", crate::error::shown(path))]
    Untrusted {
        /// The key file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// A certificate that does not fit the key.
    #[error("host certificate {}: {reason}", crate::error::shown(path))]
    Certificate {
        /// The certificate's file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// Not a key.
    #[error("host key {} is not an OpenSSH private key without passphrase: {reason}", crate::error::shown(path))]
    Invalid {
        /// The key file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
}

/// Reads the key, or makes one when there is no file.
///
/// # Errors
/// [`HostKeyError`].
pub fn load_or_create(path: &Path) -> Result<PrivateKey, HostKeyError> {
    match File::open(path) {
        Ok(file) => load(path, file),
        Err(e) if e.kind() == io::ErrorKind::NotFound => create(path),
        Err(source) => Err(HostKeyError::Io { path: path.into(), source }),
    }
}

/// Reads the key; `None` where there is no file, but a directory that one can be made in.
///
/// # Errors
/// [`HostKeyError`].
pub fn find(path: &Path) -> Result<Option<PrivateKey>, HostKeyError> {
    match File::open(path) {
        Ok(file) => load(path, file).map(Some),
        Err(error) if error.kind() == io::ErrorKind::NotFound => match path.parent() {
            Some(above) if !above.is_dir() => {
                Err(HostKeyError::Untrusted { path: path.into(), reason: no_directory() })
            }
            _ => Ok(None),
        },
        Err(source) => Err(HostKeyError::Io { path: path.into(), source }),
    }
}

fn no_directory() -> String {
    "it is made at the first start, but its directory is not there; make that first".to_owned()
}

/// Reads a certificate for the key.
///
/// # Errors
/// [`HostKeyError`].
pub fn certificate(path: &Path, key: &PrivateKey) -> Result<Certificate, HostKeyError> {
    let unfit = |reason: String| HostKeyError::Certificate { path: path.into(), reason };
    let text = std::fs::read_to_string(path).map_err(|source| HostKeyError::Io { path: path.into(), source })?;
    let certificate = Certificate::from_openssh(text.trim()).map_err(|error| unfit(error.to_string()))?;
    if certificate.public_key() != key.public_key().key_data() {
        return Err(unfit("it is for another key".into()));
    }
    if certificate.cert_type() != CertType::Host {
        return Err(unfit("it is a user's; sign it with ssh-keygen -h".into()));
    }
    Ok(certificate)
}

fn load(path: &Path, mut file: File) -> Result<PrivateKey, HostKeyError> {
    let io = |source| HostKeyError::Io { path: path.into(), source };
    let mode = file.metadata().map_err(io)?.mode() & 0o777;
    if !secret::is_kept(&file).map_err(io)? {
        return Err(HostKeyError::Exposed { path: path.into(), mode });
    }
    trusted_file::check(&file, path).map_err(|reason| HostKeyError::Untrusted { path: path.into(), reason })?;
    let mut text = String::new();
    io::Read::by_ref(&mut file).take(64 << 10).read_to_string(&mut text).map_err(io)?;
    let invalid = |reason: String| HostKeyError::Invalid { path: path.into(), reason };
    let key = PrivateKey::from_openssh(&text).map_err(|e| invalid(e.to_string()))?;
    if key.is_encrypted() {
        return Err(invalid("it has a passphrase".into()));
    }
    Ok(key)
}

/// A new key of Ed25519.
///
/// # Errors
/// When there is no randomness.
pub(super) fn made() -> Result<PrivateKey, String> {
    let mut seed = [0; 32];
    File::open("/dev/urandom").and_then(|mut f| f.read_exact(&mut seed)).map_err(|error| in_words(&error))?;
    let pair = KeypairData::Ed25519(Ed25519Keypair::from_seed(&seed));
    PrivateKey::new(pair, "lockstep").map_err(|error| error.to_string())
}

fn create(path: &Path) -> Result<PrivateKey, HostKeyError> {
    let io = |source| HostKeyError::Io { path: path.into(), source };
    let invalid = |reason: String| HostKeyError::Invalid { path: path.into(), reason };
    let key = made().map_err(invalid)?;
    let text = key.to_openssh(LineEnding::LF).map_err(|e| invalid(e.to_string()))?;
    // DURABILITY: the name appears with the whole key behind it, or not at all: half a key would end every later start.
    let mut new = path.as_os_str().to_owned();
    new.push(format!(".new-{}", std::process::id()));
    // Left by a start that was killed.
    let _ = std::fs::remove_file(&new);
    let mut file = match OpenOptions::new().write(true).create_new(true).mode(0o600).open(&new) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(HostKeyError::Untrusted { path: path.into(), reason: no_directory() });
        }
        opened => opened.map_err(io)?,
    };
    let written = file.write_all(text.as_bytes()).and_then(|()| file.sync_all());
    let named = written.and_then(|()| std::fs::hard_link(&new, path));
    let _ = std::fs::remove_file(&new);
    match named {
        // Another start was faster.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => load(path, File::open(path).map_err(io)?),
        named => named.map(|()| key).map_err(io),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    #[test]
    fn h50_made_once_and_refused_when_others_can_read_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("host_key");
        let made = load_or_create(&path).unwrap();
        assert_eq!(made.public_key(), load_or_create(&path).unwrap().public_key());
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).unwrap();
        assert!(matches!(load_or_create(&path), Err(HostKeyError::Exposed { mode: 0o640, .. })));
    }
}
