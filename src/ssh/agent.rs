//! Keys of an agent, and of files for certificates: whoever signs a login.

use std::path::Path;
use std::sync::Arc;

use russh::client::Handle;
use russh::keys::agent::AgentIdentity;
use russh::keys::agent::client::AgentClient;
use russh::keys::signature::Signer as _;
use russh::keys::{Certificate, HashAlg, PrivateKey, PublicKey};
use russh::{AgentAuthError, Signer};
use tokio::net::UnixStream;

use super::trust::Trust;

/// A key or certificate that the agent holds.
pub(super) struct Held {
    pub(super) key: PublicKey,
    pub(super) certificate: Option<Certificate>,
    pub(super) comment: String,
}

/// An agent, and what it has.
pub(super) struct Agent {
    pub(super) client: AgentClient<UnixStream>,
    pub(super) keys: Vec<Held>,
}

impl Agent {
    pub(super) async fn connect(socket: &Path, handle: &Handle<Trust>) -> Result<Agent, russh::keys::Error> {
        let mut client = AgentClient::connect_uds(socket).await?;
        // Keys restricted to certain hosts sign only for a session that the agent knows; old agents cannot be told.
        if let Some(binding) = handle.agent_session_binding()
            && let Err(error) = client.bind_session(binding, false).await
        {
            tracing::debug!(%error, "the agent takes no session binding");
        }
        let keys = client.request_identities().await?.into_iter().map(|identity| match identity {
            AgentIdentity::PublicKey { key, comment } => Held { key, certificate: None, comment },
            AgentIdentity::Certificate { certificate, comment } => {
                let key = PublicKey::new(certificate.public_key().clone(), "");
                Held { key, certificate: Some(certificate), comment }
            }
        });
        Ok(Agent { keys: keys.collect(), client })
    }
}

/// Signs for a certificate with the key of a file.
pub(super) struct FileSigner(pub(super) Arc<PrivateKey>);

impl Signer for FileSigner {
    type Error = AgentAuthError;

    async fn auth_sign(
        &mut self,
        _: &AgentIdentity,
        _: Option<HashAlg>,
        mut to_sign: Vec<u8>,
    ) -> Result<Vec<u8>, AgentAuthError> {
        let failed = |error: russh::keys::ssh_key::Error| AgentAuthError::Key(error.into());
        let signature = self.0.try_sign(&to_sign).map_err(|error| failed(error.into()))?;
        let signature = Vec::<u8>::try_from(signature).map_err(failed)?;
        to_sign.extend_from_slice(&u32::try_from(signature.len()).unwrap_or(u32::MAX).to_be_bytes());
        to_sign.extend_from_slice(&signature);
        Ok(to_sign)
    }
}

/// Signs with a key of the agent.
pub(super) struct AgentSigner<'a> {
    pub(super) client: &'a mut AgentClient<UnixStream>,
    /// The certificate came from a file: the agent knows the key alone.
    pub(super) apart: bool,
}

impl Signer for AgentSigner<'_> {
    type Error = AgentAuthError;

    async fn auth_sign(
        &mut self,
        identity: &AgentIdentity,
        hash: Option<HashAlg>,
        to_sign: Vec<u8>,
    ) -> Result<Vec<u8>, AgentAuthError> {
        let bare = match identity {
            AgentIdentity::Certificate { certificate, comment } if self.apart => Some(AgentIdentity::PublicKey {
                key: PublicKey::new(certificate.public_key().clone(), ""),
                comment: comment.clone(),
            }),
            _ => None,
        };
        Ok(self.client.sign_request(bare.as_ref().unwrap_or(identity), hash, to_sign).await?)
    }
}
