//! How the SSH library is to behave: algorithms, windows, limits of time.

use std::time::Duration;

use russh::keys::{Algorithm, Certificate, EcdsaCurve, HashAlg, PrivateKey};
use russh::server::Config;
use russh::{MethodKind, MethodSet, SshId};

use super::strict::Offered;
use crate::endpoint::algorithms::{End, preferred};

/// The library's configuration, and the names of what it is to agree to.
pub(super) fn configuration(
    key: PrivateKey,
    certificates: Vec<Certificate>,
    strict_key_exchange: bool,
    auth_tries: usize,
    idle: Duration,
) -> (Config, Offered) {
    let mut methods = MethodSet::empty();
    methods.push(MethodKind::PublicKey);
    let mut preferred = preferred(End::Server);
    // Without SHA-1.
    preferred.key = vec![
        Algorithm::Ed25519,
        Algorithm::Ecdsa { curve: EcdsaCurve::NistP256 },
        Algorithm::Ecdsa { curve: EcdsaCurve::NistP384 },
        Algorithm::Ecdsa { curve: EcdsaCurve::NistP521 },
        Algorithm::Rsa { hash: Some(HashAlg::Sha512) },
        Algorithm::Rsa { hash: Some(HashAlg::Sha256) },
    ]
    .into();
    if !strict_key_exchange {
        preferred.cipher.to_mut().retain(|name| *name != russh::cipher::CHACHA20_POLY1305);
    }
    let host_keys = match key.algorithm() {
        Algorithm::Rsa { .. } => {
            preferred.key.iter().filter(|name| matches!(name, Algorithm::Rsa { .. })).cloned().collect()
        }
        algorithm => vec![algorithm],
    };
    let offered = Offered::new(&preferred, &host_keys, strict_key_exchange);
    let configuration = Config {
        server_id: SshId::Standard(concat!("SSH-2.0-lockstep_", env!("CARGO_PKG_VERSION")).into()),
        methods,
        auth_rejection_time: Duration::from_millis(500),
        auth_rejection_time_initial: Some(Duration::ZERO),
        keys: vec![key],
        certificates,
        window_size: 32 << 20,
        maximum_packet_size: 256 << 10,
        channel_buffer_size: 1024,
        event_buffer_size: 256,
        // OpenSSH's clients ask for "none" first, which is no try.
        max_auth_attempts: auth_tries + 1,
        // Answers to keepalives reset it: idle clients are found otherwise.
        inactivity_timeout: Some(idle + Duration::from_secs(60)),
        keepalive_interval: Some(Duration::from_secs(30)),
        nodelay: true,
        preferred,
        ..Config::default()
    };
    (configuration, offered)
}
