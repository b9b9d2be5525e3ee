//! Logging in: key files, certificates, and the agent. Never a password.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use russh::client::{AuthResult, Handle};
use russh::keys::agent::AgentIdentity;
use russh::keys::agent::client::AgentClient;
use russh::keys::signature::Signer as _;
use russh::keys::{Algorithm, Certificate, HashAlg, PrivateKey, PrivateKeyWithHashAlg, PublicKey};
use russh::{AgentAuthError, MethodKind, Signer};
use tokio::net::UnixStream;

use super::identity::{Content, Identities, Identity, unlock};
use super::options::SshOptions;
use super::trust::{Heard, Trust};
use super::{lock, shown};
use crate::error::Escaped;

/// Keys that were unlocked, so that a passphrase is asked for once.
pub(super) type Opened = Mutex<Vec<(PathBuf, Arc<PrivateKey>)>>;

/// Why nothing more is tried.
enum Stop {
    /// The host has ended the login, or the connection is gone.
    Lost(String),
    /// The host takes no keys.
    NoKeys(String),
}

/// One login: what it is tried with, and what became of it.
pub(super) struct Login<'a> {
    handle: &'a mut Handle<Trust>,
    options: &'a SshOptions,
    identities: Identities,
    opened: &'a Opened,
    heard: &'a Heard,
    tried: Vec<String>,
}

impl<'a> Login<'a> {
    pub(super) fn new(
        handle: &'a mut Handle<Trust>,
        options: &'a SshOptions,
        identities: Identities,
        opened: &'a Opened,
        heard: &'a Heard,
    ) -> Self {
        let tried = identities.notes.clone();
        Login { handle, options, identities, opened, heard, tried }
    }

    /// Tries files that are open, then keys of the agent, then files that need a passphrase.
    ///
    /// # Errors
    /// What was tried, why nothing was accepted, and what to do.
    pub(super) async fn run(mut self) -> Result<(), String> {
        match self.attempts().await {
            Ok(true) => Ok(()),
            Ok(false) => Err(self.refused()),
            Err(Stop::NoKeys(reason) | Stop::Lost(reason)) => {
                let tried = self.tried.join("; ");
                Err(if tried.is_empty() { reason } else { format!("{reason} (tried: {tried})") })
            }
        }
    }

    fn refused(&self) -> String {
        let SshOptions { host, port, user, .. } = self.options;
        let port = if *port == 22 { String::new() } else { format!("-P {port} ") };
        let enroll = format!("lockstep keys enroll {port}{}", super::quote(&format!("{user}@{host}")));
        if self.tried.is_empty() {
            return format!(
                "no key to log in with; name one with --identity, or make one with: lockstep keys generate \
                 ~/.ssh/id_ed25519; then: {enroll}"
            );
        }
        format!(
            "no key was accepted ({}); name another with --identity, or have one accepted there with: {enroll}",
            self.tried.join("; ")
        )
    }

    async fn attempts(&mut self) -> Result<bool, Stop> {
        let files = std::mem::take(&mut self.identities.files);
        let mut agent = self.agent().await;
        let offered = self.in_order(&files, agent.as_mut()).await;
        self.identities.files = files;
        let offered = offered?;
        if !offered && self.tried.len() == self.identities.notes.len() {
            // Nothing was offered: say at least whether keys would be taken.
            let user = self.options.user.clone();
            let result = self.handle.authenticate_none(user).await.map_err(|error| self.lost(&error))?;
            if result.success() {
                return Err(Stop::NoKeys("the host lets anybody in without a key; that is not to be trusted".into()));
            }
            self.accepted(result, "")?;
        }
        Ok(offered)
    }

    async fn in_order(&mut self, files: &[Identity], mut agent: Option<&mut Agent>) -> Result<bool, Stop> {
        let mut locked = Vec::new();
        for identity in files {
            match self.content(identity) {
                Content::Open(key) => {
                    if self.offer_file(identity, &key).await? {
                        return Ok(true);
                    }
                }
                Content::Locked(text) => locked.push((identity, text)),
                Content::Public => {}
            }
        }
        if let Some(agent) = agent.as_mut() {
            let open = |identity: &Identity| matches!(identity.content, Content::Open(_));
            let done: Vec<_> = files.iter().filter(|file| open(file)).filter_map(|file| file.public.clone()).collect();
            let named: Vec<_> = files.iter().filter_map(|file| file.public.clone()).collect();
            let is_in = |keys: &[PublicKey], key: &PublicKey| keys.iter().any(|in_| in_.key_data() == key.key_data());
            agent.keys.retain(|held| !is_in(&done, &held.key) || held.certificate.is_some());
            let is_named = |held: &Held| is_in(&named, &held.key);
            // A stable sort: what is named comes first.
            agent.keys.sort_by_key(|held| !is_named(held));
            if self.options.identities_only {
                agent.keys.retain(|held| {
                    is_named(held) || self.identities.certificates_of(held.key.key_data()).next().is_some()
                });
            }
            for held in std::mem::take(&mut agent.keys) {
                if self.offer_agent(agent, &held).await? {
                    return Ok(true);
                }
            }
        }
        for (identity, text) in locked {
            match unlock(&identity.path, &text, self.options.passphrase.as_ref()) {
                Ok(key) => {
                    // Kept even when this host does not take it: the next hop or connection may.
                    lock(self.opened).push((identity.path.clone(), Arc::clone(&key)));
                    if self.offer_file(identity, &key).await? {
                        return Ok(true);
                    }
                }
                Err(reason) => self.tried.push(reason),
            }
        }
        for identity in files.iter().filter(|identity| matches!(identity.content, Content::Public)) {
            if !self.tried.iter().any(|note| note.contains(&shown(&identity.path))) {
                self.tried.push(format!("'{}': a public key, whose other half no agent has", shown(&identity.path)));
            }
        }
        Ok(false)
    }

    /// The key as it is by now: a passphrase may have been given before.
    fn content(&self, identity: &Identity) -> Content {
        let opened = lock(self.opened);
        match opened.iter().find(|(path, _)| *path == identity.path) {
            Some((_, key)) => Content::Open(Arc::clone(key)),
            None => identity.content.clone(),
        }
    }

    async fn rsa_hash(&self, algorithm: &Algorithm) -> Option<HashAlg> {
        if !matches!(algorithm, Algorithm::Rsa { .. }) {
            return None;
        }
        // Never SHA-1, whatever the host says.
        Some(self.handle.best_supported_rsa_hash().await.ok().flatten().flatten().unwrap_or(HashAlg::Sha512))
    }

    async fn offer_file(&mut self, identity: &Identity, key: &Arc<PrivateKey>) -> Result<bool, Stop> {
        let name = format!("'{}'", shown(&identity.path));
        let user = self.options.user.clone();
        for certificate in &identity.certificates {
            // The signature of a file's RSA key is always one with SHA-512.
            let hash = matches!(key.algorithm(), Algorithm::Rsa { .. }).then_some(HashAlg::Sha512);
            let mut signer = FileSigner(Arc::clone(key));
            let result = self
                .handle
                .authenticate_certificate_with(user.clone(), certificate.clone(), hash, &mut signer)
                .await
                .map_err(|error| self.lost(&error))?;
            if self.accepted(result, &format!("the certificate of {name}"))? {
                return Ok(true);
            }
        }
        let hash = self.rsa_hash(&key.algorithm()).await;
        let result = self
            .handle
            .authenticate_publickey(user, PrivateKeyWithHashAlg::new(Arc::clone(key), hash))
            .await
            .map_err(|error| self.lost(&error))?;
        self.accepted(result, &name)
    }

    /// Connects to the agent and asks what it has; what fails is noted.
    async fn agent(&mut self) -> Option<Agent> {
        let socket = self.options.agent_socket.clone()?;
        match Agent::connect(&socket, self.handle).await {
            Ok(agent) => Some(agent),
            Err(error) => {
                self.tried.push(format!("the agent at '{}': {error}", shown(&socket)));
                None
            }
        }
    }

    async fn offer_agent(&mut self, agent: &mut Agent, held: &Held) -> Result<bool, Stop> {
        let name = format!("agent key '{}'", Escaped(held.comment.as_bytes()));
        let hash = self.rsa_hash(&held.key.algorithm()).await;
        let user = self.options.user.clone();
        let mut offers = Vec::new();
        match &held.certificate {
            Some(certificate) => offers.push((certificate.clone(), format!("the certificate of {name}"), false)),
            None => {
                for certificate in self.identities.certificates_of(held.key.key_data()) {
                    offers.push((certificate.clone(), format!("the certificate of {name}"), true));
                }
            }
        }
        for (certificate, name, apart) in offers {
            let mut signer = AgentSigner { client: &mut agent.client, apart };
            let result = self.handle.authenticate_certificate_with(user.clone(), certificate, hash, &mut signer).await;
            if self.signed(result, &name)? {
                return Ok(true);
            }
        }
        if held.certificate.is_some() {
            return Ok(false);
        }
        let result = self.handle.authenticate_publickey_with(user, held.key.clone(), hash, &mut agent.client).await;
        self.signed(result, &name)
    }

    fn signed(&mut self, result: Result<AuthResult, AgentAuthError>, name: &str) -> Result<bool, Stop> {
        match result {
            Ok(result) => self.accepted(result, name),
            Err(AgentAuthError::Key(error)) => {
                self.tried.push(format!("{name}: {error}"));
                Ok(false)
            }
            Err(error) => Err(self.lost(&error)),
        }
    }

    fn accepted(&mut self, result: AuthResult, name: &str) -> Result<bool, Stop> {
        let AuthResult::Failure { remaining_methods, partial_success } = result else { return Ok(true) };
        if !name.is_empty() {
            let what = if partial_success { "accepted, but the host asks for more than a key" } else { "not accepted" };
            self.tried.push(format!("{name}: {what}"));
        }
        if remaining_methods.is_empty() {
            // Also what a connection that has ended looks like.
            return Err(self.lost(&"it takes nothing more"));
        }
        if !partial_success && !remaining_methods.contains(&MethodKind::PublicKey) {
            let offered: Vec<String> = remaining_methods.iter().map(String::from).collect();
            return Err(Stop::NoKeys(format!(
                "the host takes no keys, only: {}; lockstep never asks for a password nor sends one: its sshd_config \
                 needs 'PubkeyAuthentication yes', and then your public key in its authorized_keys",
                offered.join(", ")
            )));
        }
        Ok(false)
    }

    fn lost(&self, error: &dyn std::fmt::Display) -> Stop {
        Stop::Lost(match self.heard.said() {
            Some(reason) => format!("the host ended the login: {reason}"),
            None => format!("the host ended the login: {error}"),
        })
    }
}

/// A key or certificate that the agent holds.
struct Held {
    key: PublicKey,
    certificate: Option<Certificate>,
    comment: String,
}

struct Agent {
    client: AgentClient<UnixStream>,
    keys: Vec<Held>,
}

impl Agent {
    async fn connect(socket: &Path, handle: &Handle<Trust>) -> Result<Agent, russh::keys::Error> {
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
struct FileSigner(Arc<PrivateKey>);

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
struct AgentSigner<'a> {
    client: &'a mut AgentClient<UnixStream>,
    /// The certificate came from a file: the agent knows the key alone.
    apart: bool,
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
