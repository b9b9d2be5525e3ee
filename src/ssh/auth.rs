//! Logging in: key files, certificates beside them, and the agent. Never a password.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use russh::client::{AuthResult, Handle};
use russh::keys::agent::AgentIdentity;
use russh::keys::agent::client::AgentClient;
use russh::keys::{Algorithm, Certificate, HashAlg, PrivateKey, PrivateKeyWithHashAlg};

use super::remote::{Passphrase, SshOptions, Trust};
use crate::error::Escaped;

/// A key file: read, or still locked.
enum Identity {
    Open(Arc<PrivateKey>),
    Locked(String),
}

/// Reads a key file.
fn read(path: &Path) -> Result<Identity, String> {
    let failed = |error: &dyn std::fmt::Display| format!("'{}': {error}", show(path));
    let metadata = std::fs::metadata(path).map_err(|error| failed(&error))?;
    if metadata.mode() & 0o077 != 0 && metadata.uid() == rustix::process::getuid().as_raw() {
        return Err(failed(&format_args!("others can read this private key; chmod 600 it")));
    }
    let text = std::fs::read_to_string(path).map_err(|error| failed(&error))?;
    match russh::keys::decode_secret_key(&text, None) {
        Ok(key) => Ok(Identity::Open(Arc::new(key))),
        Err(russh::keys::Error::KeyIsEncrypted) => Ok(Identity::Locked(text)),
        Err(_) if text.contains("ENCRYPTED") => Ok(Identity::Locked(text)),
        Err(error) => Err(failed(&error)),
    }
}

fn unlock(path: &Path, text: &str, passphrase: Option<&Passphrase>) -> Result<Arc<PrivateKey>, String> {
    let path_text = show(path);
    let Some(ask) = passphrase else {
        return Err(format!("'{path_text}': needs a passphrase; add it to the agent with ssh-add"));
    };
    let Some(secret) = ask(path) else { return Err(format!("'{path_text}': no passphrase was given")) };
    russh::keys::decode_secret_key(text, Some(&secret))
        .map(Arc::new)
        .map_err(|_| format!("'{path_text}': the passphrase does not open it"))
}

/// Tries files without passphrase, then the agent, then files that need one. Keys that were opened stay in `opened`.
///
/// # Errors
/// What was tried and why nothing was accepted.
pub(super) async fn log_in(
    handle: &mut Handle<Trust>,
    options: &SshOptions,
    opened: &std::sync::Mutex<Vec<(PathBuf, Arc<PrivateKey>)>>,
) -> Result<(), String> {
    let mut tried = Vec::new();
    let mut locked = Vec::new();
    for path in &options.identity_files {
        let known = {
            let opened = opened.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            opened.iter().find(|(opened, _)| opened == path).map(|(_, key)| Arc::clone(key))
        };
        match known.map_or_else(|| read(path), |key| Ok(Identity::Open(key))) {
            Ok(Identity::Open(key)) => {
                if offer_file(handle, &options.user, path, key, &mut tried).await? {
                    return Ok(());
                }
            }
            Ok(Identity::Locked(text)) => locked.push((path, text)),
            Err(reason) => tried.push(reason),
        }
    }
    if let Some(socket) = &options.agent_socket
        && offer_agent(handle, &options.user, socket, &mut tried).await?
    {
        return Ok(());
    }
    for (path, text) in locked {
        match unlock(path, &text, options.passphrase.as_ref()) {
            Ok(key) => {
                if offer_file(handle, &options.user, path, Arc::clone(&key), &mut tried).await? {
                    let mut opened = opened.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                    opened.push((path.clone(), key));
                    return Ok(());
                }
            }
            Err(reason) => tried.push(reason),
        }
    }
    if tried.is_empty() {
        return Err("no key to log in with: name an identity file, or add a key to the agent with ssh-add".into());
    }
    Err(format!(
        "no key was accepted ({}); add the public key to authorized_keys there, or name another identity file",
        tried.join("; ")
    ))
}

async fn rsa_hash(handle: &Handle<Trust>, algorithm: &Algorithm) -> Option<HashAlg> {
    if !matches!(algorithm, Algorithm::Rsa { .. }) {
        return None;
    }
    // Never SHA-1, whatever the host says.
    Some(handle.best_supported_rsa_hash().await.ok().flatten().flatten().unwrap_or(HashAlg::Sha512))
}

fn lost(error: &dyn std::fmt::Display, tried: &[String]) -> String {
    let tried = if tried.is_empty() { String::new() } else { format!(" (tried: {})", tried.join("; ")) };
    format!("the host ended the login: {error}{tried}")
}

async fn offer_file(
    handle: &mut Handle<Trust>,
    user: &str,
    path: &Path,
    key: Arc<PrivateKey>,
    tried: &mut Vec<String>,
) -> Result<bool, String> {
    let mut beside = path.as_os_str().to_owned();
    beside.push("-cert.pub");
    if let Some(certificate) =
        std::fs::read_to_string(&beside).ok().and_then(|text| Certificate::from_openssh(text.trim()).ok())
        && handle
            .authenticate_openssh_cert(user, Arc::clone(&key), certificate)
            .await
            .map_err(|error| lost(&error, tried))?
            .success()
    {
        return Ok(true);
    }
    let hash = rsa_hash(handle, &key.algorithm()).await;
    let result = handle
        .authenticate_publickey(user, PrivateKeyWithHashAlg::new(key, hash))
        .await
        .map_err(|error| lost(&error, tried))?;
    Ok(accepted(result, format!("'{}'", show(path)), tried))
}

async fn offer_agent(
    handle: &mut Handle<Trust>,
    user: &str,
    socket: &Path,
    tried: &mut Vec<String>,
) -> Result<bool, String> {
    let mut agent = match AgentClient::connect_uds(socket).await {
        Ok(agent) => agent,
        Err(error) => {
            tried.push(format!("the agent at '{}': {error}", show(socket)));
            return Ok(false);
        }
    };
    // Keys restricted to certain hosts sign only for a session that the agent knows; old agents cannot be told.
    if let Some(binding) = handle.agent_session_binding()
        && let Err(error) = agent.bind_session(binding, false).await
    {
        tracing::debug!(%error, "the agent takes no session binding");
    }
    let identities = match agent.request_identities().await {
        Ok(identities) => identities,
        Err(error) => {
            tried.push(format!("the agent at '{}': {error}", show(socket)));
            return Ok(false);
        }
    };
    for identity in identities {
        let (result, comment) = match identity {
            AgentIdentity::PublicKey { key, comment } => {
                let hash = rsa_hash(handle, &key.algorithm()).await;
                (handle.authenticate_publickey_with(user, key, hash, &mut agent).await, comment)
            }
            AgentIdentity::Certificate { certificate, comment } => {
                let hash = rsa_hash(handle, &certificate.public_key().algorithm()).await;
                (handle.authenticate_certificate_with(user, certificate, hash, &mut agent).await, comment)
            }
        };
        let name = format!("agent key '{}'", Escaped(comment.as_bytes()));
        match result {
            Ok(result) => {
                if accepted(result, name, tried) {
                    return Ok(true);
                }
            }
            Err(russh::AgentAuthError::Key(error)) => tried.push(format!("{name}: {error}")),
            Err(error) => return Err(lost(&error, tried)),
        }
    }
    Ok(false)
}

fn accepted(result: AuthResult, name: String, tried: &mut Vec<String>) -> bool {
    match result {
        AuthResult::Success => return true,
        AuthResult::Failure { partial_success: true, .. } => {
            tried.push(format!("{name}: accepted, but the host asks for more than a key"));
        }
        AuthResult::Failure { .. } => tried.push(format!("{name}: not accepted")),
    }
    false
}

fn show(path: &Path) -> String {
    use std::os::unix::ffi::OsStrExt as _;
    Escaped(path.as_os_str().as_bytes()).to_string()
}
