//! Logging in: key files, certificates, and the agent. Never a password.

use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use russh::client::{AuthResult, Handle};
use russh::keys::{Algorithm, HashAlg, PrivateKey, PrivateKeyWithHashAlg, PublicKey};
use russh::{AgentAuthError, MethodKind};

use super::agent::{Agent, AgentSigner, FileSigner, Held};
use super::identity::{Content, Identities, Identity, unlock};
use super::options::SshOptions;
use super::trust::{Heard, Trust};
use super::{lock, shown};
use crate::error::{Escaped, Exit};

/// Keys that were unlocked, so that a passphrase is asked for once.
pub(super) type Opened = Mutex<Vec<(PathBuf, Arc<PrivateKey>)>>;

/// Why nothing more is tried.
enum Stop {
    /// The host has ended the login, and said why.
    HungUp(String),
    /// The connection is gone.
    Lost(String),
    /// The host takes no keys.
    NoKeys(String),
}

/// One login: what it is tried with, and what became of it.
pub(super) struct Login<'a> {
    handle: &'a mut Handle<Trust>,
    options: &'a SshOptions,
    identities: &'a Identities,
    opened: &'a Opened,
    heard: &'a Heard,
    /// Keys that the host has seen, so that none is shown twice: each counts as an attempt.
    offered: Vec<PublicKey>,
    tried: Vec<String>,
}

impl<'a> Login<'a> {
    pub(super) fn new(
        handle: &'a mut Handle<Trust>,
        options: &'a SshOptions,
        identities: &'a Identities,
        opened: &'a Opened,
        heard: &'a Heard,
    ) -> Self {
        let tried = identities.notes.clone();
        Login { handle, options, identities, opened, heard, offered: Vec::new(), tried }
    }

    /// Tries files that are open, then keys of the agent, then files that need a passphrase.
    ///
    /// # Errors
    /// What was tried, why nothing was accepted, and what to do; [`Exit::TryAgain`] when the connection was lost.
    pub(super) async fn run(mut self) -> Result<(), (String, Exit)> {
        let (reason, exit) = match self.attempts().await {
            Ok(true) => return Ok(()),
            Ok(false) => return Err((self.refused(), Exit::Trust)),
            Err(Stop::HungUp(reason) | Stop::NoKeys(reason)) => (reason, Exit::Trust),
            Err(Stop::Lost(reason)) => (reason, Exit::TryAgain),
        };
        let tried = self.tried.join("; ");
        Err((if tried.is_empty() { reason } else { format!("{reason} (tried: {tried})") }, exit))
    }

    fn refused(&self) -> String {
        let SshOptions { host, user, .. } = self.options;
        let account = super::quote(&format!("{user}@{host}"));
        let enroll = format!("lockstep keys enroll {}{account}", self.options.arguments());
        if self.tried.is_empty() {
            return format!(
                "no key to log in with; name one with --identity, or make one with: lockstep keys generate; then: {enroll}"
            );
        }
        format!(
            "no key was accepted ({}); name another with --identity, or have one accepted there with: {enroll}",
            self.tried.join("; ")
        )
    }

    async fn attempts(&mut self) -> Result<bool, Stop> {
        if self.open_files().await? || self.keys_of_the_agent().await? || self.locked_files().await? {
            return Ok(true);
        }
        self.note_halves();
        if self.offered.is_empty() {
            // Say at least whether keys would be taken.
            let user = self.options.user.clone();
            let result = self.handle.authenticate_none(user).await.map_err(|error| self.lost(&error))?;
            if result.success() {
                return Err(Stop::NoKeys("the host lets anybody in without a key; that is not to be trusted".into()));
            }
            self.accepted(result, None)?;
        }
        Ok(false)
    }

    async fn open_files(&mut self) -> Result<bool, Stop> {
        for identity in &self.identities.files {
            if let Content::Open(key) = self.content(identity)
                && self.offer_file(identity, &key).await?
            {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Those that a file names come first, or are all there is.
    async fn keys_of_the_agent(&mut self) -> Result<bool, Stop> {
        let Some(socket) = &self.options.agent_socket else { return Ok(false) };
        let mut agent = match Agent::connect(socket, self.handle).await {
            Ok(agent) => agent,
            Err(error) => {
                self.tried.push(format!("the agent at '{}': {error}", shown(socket)));
                return Ok(false);
            }
        };
        let mut keys = std::mem::take(&mut agent.keys);
        let identities = self.identities;
        keys.sort_by_key(|held| !identities.names(held.key.key_data()));
        if self.options.identities_only {
            keys.retain(|held| identities.names(held.key.key_data()));
        }
        for held in keys {
            if self.offer_agent(&mut agent, &held).await? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    async fn locked_files(&mut self) -> Result<bool, Stop> {
        for identity in &self.identities.files {
            let Content::Locked(text) = self.content(identity) else { continue };
            if identity.public.as_ref().is_some_and(|public| self.was_offered(public)) {
                continue;
            }
            match unlock(&identity.path, &text, self.options.passphrase.as_ref()) {
                Ok(key) => {
                    // Kept even when this host does not take it: the next one on the way may.
                    lock(self.opened).push((identity.path.clone(), Arc::clone(&key)));
                    if self.offer_file(identity, &key).await? {
                        return Ok(true);
                    }
                }
                Err(reason) => self.tried.push(reason),
            }
        }
        Ok(false)
    }

    fn note_halves(&mut self) {
        for identity in &self.identities.files {
            let is_half = matches!(identity.content, Content::Public);
            if is_half && !identity.public.as_ref().is_some_and(|public| self.was_offered(public)) {
                let path = shown(&identity.path);
                self.tried.push(format!("'{path}': a public key, whose other half no agent has"));
            }
        }
    }

    /// The key as it is by now: a passphrase may have been given before.
    fn content(&self, identity: &Identity) -> Content {
        let opened = lock(self.opened);
        match opened.iter().find(|(path, _)| *path == identity.path) {
            Some((_, key)) => Content::Open(Arc::clone(key)),
            None => identity.content.clone(),
        }
    }

    fn was_offered(&self, key: &PublicKey) -> bool {
        self.offered.iter().any(|offered| offered.key_data() == key.key_data())
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
        for certificate in self.identities.certificates_of(key.public_key().key_data()) {
            // The signature of a file's RSA key is always one with SHA-512.
            let hash = matches!(key.algorithm(), Algorithm::Rsa { .. }).then_some(HashAlg::Sha512);
            let mut signer = FileSigner(Arc::clone(key));
            let offer = (user.clone(), certificate.clone());
            let result = self.handle.authenticate_certificate_with(offer.0, offer.1, hash, &mut signer).await;
            if self.signed(result, &format!("the certificate of {name}"))? {
                return Ok(true);
            }
        }
        if self.was_offered(key.public_key()) {
            return Ok(false);
        }
        self.offered.push(key.public_key().clone());
        let hash = self.rsa_hash(&key.algorithm()).await;
        let result = self
            .handle
            .authenticate_publickey(user, PrivateKeyWithHashAlg::new(Arc::clone(key), hash))
            .await
            .map_err(|error| self.lost(&error))?;
        self.accepted(result, Some(&name))
    }

    async fn offer_agent(&mut self, agent: &mut Agent, held: &Held) -> Result<bool, Stop> {
        let name = format!("agent key '{}'", Escaped(held.comment.as_bytes()));
        let hash = self.rsa_hash(&held.key.algorithm()).await;
        let user = self.options.user.clone();
        // With the certificate that the agent has, or with those that files have for its key.
        let of_files = self.identities.certificates_of(held.key.key_data());
        let of_files = of_files.filter(|_| held.certificate.is_none());
        for certificate in held.certificate.iter().chain(of_files) {
            let mut signer = AgentSigner { client: &mut agent.client, apart: held.certificate.is_none() };
            let offer = (user.clone(), certificate.clone());
            let result = self.handle.authenticate_certificate_with(offer.0, offer.1, hash, &mut signer).await;
            if self.signed(result, &format!("the certificate of {name}"))? {
                return Ok(true);
            }
        }
        if held.certificate.is_some() || self.was_offered(&held.key) {
            return Ok(false);
        }
        self.offered.push(held.key.clone());
        let result = self.handle.authenticate_publickey_with(user, held.key.clone(), hash, &mut agent.client).await;
        self.signed(result, &name)
    }

    fn signed(&mut self, result: Result<AuthResult, AgentAuthError>, name: &str) -> Result<bool, Stop> {
        match result {
            Ok(result) => self.accepted(result, Some(name)),
            Err(AgentAuthError::Key(error)) => {
                self.tried.push(format!("{name}: {error}"));
                Ok(false)
            }
            Err(error) => Err(self.lost(&error)),
        }
    }

    /// Notes the answer to what was offered.
    fn accepted(&mut self, result: AuthResult, name: Option<&str>) -> Result<bool, Stop> {
        let AuthResult::Failure { remaining_methods, partial_success } = result else { return Ok(true) };
        if let Some(name) = name {
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
        match self.heard.goodbye() {
            Some(reason) => Stop::HungUp(format!("the host ended the login: {reason}")),
            None => Stop::Lost(match self.heard.said() {
                Some(reason) => format!("the connection was lost while logging in: {reason}"),
                None => format!("the host ended the login: {error}"),
            }),
        }
    }
}
