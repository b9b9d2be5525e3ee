//! Signing something else than a login: with the key of a file, or by the agent that has it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use russh::keys::agent::AgentIdentity;
use russh::keys::agent::client::AgentClient;
use russh::keys::signature::Signer as _;
use russh::keys::ssh_key::Signature;
use russh::keys::ssh_key::public::KeyData;
use russh::keys::{HashAlg, PrivateKey, PublicKey};
use tokio::net::UnixStream;

use super::identity::{Content, Identities, unlock};
use super::{Passphrase, shown};

/// A key that can sign.
pub struct SigningKey {
    public: PublicKey,
    holder: Holder,
}

enum Holder {
    File(Arc<PrivateKey>),
    /// The agent's socket.
    Agent(PathBuf),
}

impl SigningKey {
    /// Finds the private half of the key in `file`: there, or (for a public key, and for one with a passphrase) at the agent
    /// of this socket; else `ask` is asked for the passphrase.
    ///
    /// # Errors
    /// Why it is not to be had, and what to do.
    pub fn find(file: &Path, agent: Option<&Path>, ask: &Passphrase) -> Result<SigningKey, String> {
        let name = shown(file);
        let mut read = Identities::read(&[file.to_owned()], &[])?;
        let Some(identity) = read.files.pop() else { return Err(read.notes.join("; ")) };
        match (identity.content, identity.public) {
            (_, Some(public)) if matches!(public.key_data(), KeyData::Certificate(_)) => {
                Err(format!("'{name}' is a certificate; name the key that it is for"))
            }
            (Content::Open(key), _) => Ok(SigningKey::of_file(key)),
            (Content::Locked(_), Some(public)) if held(agent, &public).is_ok() => {
                Ok(SigningKey { public, holder: Holder::Agent(agent.map(PathBuf::from).unwrap_or_default()) })
            }
            (Content::Locked(text), _) => unlock(file, &text, Some(ask)).map(SigningKey::of_file),
            (Content::Public, Some(public)) => {
                let socket = held(agent, &public).map_err(|reason| {
                    format!("'{name}' is a public key, and {reason}; name the file of its other half")
                })?;
                Ok(SigningKey { public, holder: Holder::Agent(socket) })
            }
            (Content::Public, None) => Err(format!("'{name}' cannot be read as a key")),
        }
    }

    fn of_file(key: Arc<PrivateKey>) -> SigningKey {
        SigningKey { public: key.public_key().clone(), holder: Holder::File(key) }
    }

    /// The public half.
    pub fn public(&self) -> &KeyData {
        self.public.key_data()
    }

    /// Signs; with an RSA key over SHA-512.
    ///
    /// # Errors
    /// When the key is of a kind that cannot, or the agent does not do it.
    pub fn sign(&self, data: &[u8]) -> Result<Signature, String> {
        match &self.holder {
            Holder::File(key) => key.try_sign(data).map_err(|error| format!("the key cannot sign: {error}")),
            Holder::Agent(socket) => {
                let failed = |error: russh::keys::Error| {
                    let socket = shown(socket);
                    format!("the agent at '{socket}' did not sign ({error}); it may be locked, or have been refused")
                };
                run(async {
                    let mut client = AgentClient::connect_uds(socket).await.map_err(failed)?;
                    client.sign_request_signature(&self.public, Some(HashAlg::Sha512), data).await.map_err(failed)
                })?
            }
        }
    }
}

/// The socket, if the agent there has the key.
fn held(agent: Option<&Path>, key: &PublicKey) -> Result<PathBuf, String> {
    let socket = agent.ok_or("there is no agent to ask for the other half (SSH_AUTH_SOCK is not set)")?;
    let list = run(async {
        let mut client: AgentClient<UnixStream> = AgentClient::connect_uds(socket).await?;
        client.request_identities().await
    })?;
    let list: Vec<AgentIdentity> =
        list.map_err(|error| format!("the agent at '{}' does not answer: {error}", shown(socket)))?;
    let is_it = |held: &AgentIdentity| matches!(held, AgentIdentity::PublicKey { key: held, .. } if held.key_data() == key.key_data());
    if list.iter().any(is_it) {
        Ok(socket.to_owned())
    } else {
        Err(format!("the agent at '{}' does not have the other half; ssh-add it", shown(socket)))
    }
}

/// Waits for what an agent does, which may ask its user.
fn run<T>(work: impl Future<Output = T>) -> Result<T, String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build();
    Ok(runtime.map_err(|error| format!("cannot talk to an agent: {error}"))?.block_on(work))
}
