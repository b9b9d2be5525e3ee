//! Which keys a host shows, without logging in.

use std::sync::{Arc, Mutex};

use russh::client::Handler;
use russh::keys::{Algorithm, PublicKey, PublicKeyOrCertificate};

use super::known_hosts::{Finding, KnownHost};
use super::remote::{SshRemote, failed};
use super::trust::Stop;
use super::{dial, lock};
use crate::endpoint::link::ConnectError;
use crate::endpoint::stream::OverflowStream;
use crate::error::Exit;

/// A key that the host has shown, and what the known hosts files say of it.
pub struct Shown {
    /// The key; the host has proven that it has the other half.
    pub key: PublicKey,
    /// What is to be thought of it.
    pub finding: Finding,
    /// The line that trusts it.
    pub line: String,
}

/// Takes what the host shows, and goes no further.
struct Look(Arc<Mutex<Option<PublicKey>>>);

impl Handler for Look {
    type Error = Stop;

    async fn check_server_key(&mut self, offered: &PublicKeyOrCertificate) -> Result<bool, Stop> {
        *lock(&self.0) = Some(offered.public_key());
        Ok(false)
    }
}

impl SshRemote {
    /// Asks the host for its key of each type, over the same way that a login would take.
    ///
    /// # Errors
    /// When the host cannot be reached, shows no key, or the known hosts cannot be read.
    pub fn scan(&self) -> Result<Vec<Shown>, ConnectError> {
        let options = self.options();
        let known = KnownHost::read(options).map_err(|reason| failed(options, reason, Exit::Trust))?;
        let mut keys: Vec<PublicKey> = Vec::new();
        let mut last = None;
        for types in dial::host_keys().chunk_by(|a, b| kind(a) == kind(b)) {
            match self.block_on(self.look(types)) {
                Ok(Some(key)) => keys.push(key),
                Ok(None) => {}
                Err(error) => last = Some(error),
            }
        }
        if keys.is_empty() {
            return Err(
                last.unwrap_or_else(|| failed(options, "the host shows no key that is taken here", Exit::Trust))
            );
        }
        let findings = known.judge(&keys);
        Ok(keys
            .into_iter()
            .zip(findings)
            .map(|(key, finding)| Shown { line: known.line(&key), key, finding })
            .collect())
    }

    /// Appends lines to the first known hosts file, and says which that is.
    ///
    /// # Errors
    /// When there is no such file to write to.
    pub fn trust(&self, keys: &[&PublicKey]) -> Result<std::path::PathBuf, ConnectError> {
        let options = self.options();
        let refused = |reason| failed(options, reason, Exit::Io);
        let known = KnownHost::read(options).map_err(refused)?;
        for key in keys {
            known.add_key(key).map_err(refused)?;
        }
        known.first_file().map(Into::into).ok_or_else(|| refused("no known hosts file".into()))
    }

    /// The host's key of one of the types; `None` when it has none of them.
    async fn look(&self, types: &[Algorithm]) -> Result<Option<PublicKey>, ConnectError> {
        let options = self.options();
        let seen = Arc::new(Mutex::new(None));
        let mut config = dial::config(options, &[]);
        config.preferred.key = types.to_vec().into();
        let below = self.stream(options).await?;
        let (stream, _kill) = OverflowStream::new(below.stream);
        let shaking = russh::client::connect_stream(Arc::new(config), stream, Look(Arc::clone(&seen)));
        let shaken = tokio::time::timeout(options.connect_timeout, shaking).await;
        let key = lock(&seen).take();
        match (key, shaken) {
            (Some(key), _) => Ok(Some(key)),
            (None, Ok(Err(Stop::Protocol(russh::Error::NoCommonAlgo { kind: russh::AlgorithmKind::Key, .. })))) => {
                Ok(None)
            }
            (None, Ok(Err(stop))) => {
                let (message, exit) = stop.explain(&options.describe(), None);
                Err(ConnectError { message, exit, not_offered: false, patience: std::time::Duration::ZERO })
            }
            (None, Ok(Ok(_))) => Err(failed(options, "the handshake showed no key", Exit::TryAgain)),
            (None, Err(_)) => Err(failed(options, "the handshake took too long", Exit::TryAgain)),
        }
    }
}

fn kind(algorithm: &Algorithm) -> u8 {
    match algorithm {
        Algorithm::Ed25519 => 0,
        Algorithm::Ecdsa { .. } => 1,
        _ => 2,
    }
}
