//! Making a key, and reading the public half of one.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use russh::keys::ssh_key::getrandom::SysRng;
use russh::keys::ssh_key::private::{Ed25519Keypair, KeypairData};
use russh::keys::ssh_key::{LineEnding, rand_core::TryRng as _};
use russh::keys::{PrivateKey, PublicKey};

use super::{identity, shown};

/// The file of a key's public half.
pub fn beside(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".pub");
    PathBuf::from(name)
}

/// Makes an Ed25519 key: the private half for its owner alone, the public half beside it. What is there stays.
///
/// # Errors
/// When one of the two is there already, or cannot be written.
pub fn generate(path: &Path, comment: &str, passphrase: Option<&str>) -> io::Result<PublicKey> {
    let failed = |error: &dyn std::fmt::Display| io::Error::other(error.to_string());
    let mut seed = [0; 32];
    SysRng.try_fill_bytes(&mut seed).map_err(|error| failed(&error))?;
    let pair = KeypairData::Ed25519(Ed25519Keypair::from_seed(&seed));
    let key = PrivateKey::new(pair, comment).map_err(|error| failed(&error))?;
    let public = key.public_key().clone();
    let key = match passphrase {
        None => key,
        Some(passphrase) => key.encrypt(&mut SysRng, passphrase).map_err(|error| failed(&error))?,
    };
    let private_text = key.to_openssh(LineEnding::LF).map_err(|error| failed(&error))?;
    let public_text = public.to_openssh().map_err(|error| failed(&error))?;
    if let Some(directory) = path.parent().filter(|directory| !directory.as_os_str().is_empty()) {
        DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
    }
    // RACE: none; neither file is opened if it is there.
    let private = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    let written = write(private, private_text.as_bytes()).and_then(|()| {
        let public = OpenOptions::new().write(true).create_new(true).mode(0o644).open(beside(path))?;
        write(public, format!("{}\n", public_text.trim_end()).as_bytes())
    });
    if let Err(error) = written {
        let _ = std::fs::remove_file(path);
        return Err(error);
    }
    Ok(public)
}

fn write(mut file: File, bytes: &[u8]) -> io::Result<()> {
    file.write_all(bytes)?;
    file.sync_all()
}

/// The public half of a key file: from the file beside it, or from the key itself. With its comment.
///
/// # Errors
/// Why there is none.
pub fn public_half(path: &Path) -> Result<PublicKey, String> {
    let mut reasons = Vec::new();
    // What is a public half by its name has none beside it.
    let other = (path.extension() != Some("pub".as_ref())).then(|| beside(path));
    for file in other.into_iter().chain([path.to_owned()]) {
        let mut text = String::new();
        match File::open(&file).and_then(|file| file.take(identity::MAX_BYTES).read_to_string(&mut text)) {
            Ok(_) => match PublicKey::from_openssh(text.trim()) {
                Ok(key) if text.trim().contains(char::is_control) => {
                    let kind = key.algorithm();
                    reasons.push(format!("'{}': a {kind} key with control characters in its comment", shown(&file)));
                }
                Ok(key) => return Ok(key),
                Err(_) => match PrivateKey::from_openssh(&text) {
                    Ok(key) => return Ok(key.public_key().clone()),
                    Err(error) => reasons.push(format!("'{}': {error}", shown(&file))),
                },
            },
            Err(error) => reasons.push(format!("'{}': {error}", shown(&file))),
        }
    }
    Err(format!("no public key: {}", reasons.join("; ")))
}
