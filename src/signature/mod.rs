//! Signatures of manifests and of heads of audit logs, as OpenSSH writes them (PROTOCOL.sshsig), so that `ssh-keygen -Y` makes
//! and checks them too; and of models, in the format of OpenSSF Model Signing ([`oms`]).
//!
//! What always holds: a signature counts only in the namespace that is asked for, so that one that was made for something else
//! proves nothing here, and only by a key of the list of [`AllowedSigners`], never by the one that it brings along.

use ssh_key::public::KeyData;
use ssh_key::{Algorithm, HashAlg, LineEnding, PublicKey, Signature, SshSig};

use crate::error::Escaped;

pub mod oms;
pub mod pattern;
mod signers;

pub use signers::AllowedSigners;

/// What signatures of manifests are made for.
pub const NAMESPACE: &str = "manifest@lockstep.internal";
/// More bytes than any signature takes, with the longest keys and certificates.
pub const MAX_BYTES: u64 = 64 << 10;
/// Shorter RSA keys can be broken.
pub const MIN_RSA_BITS: u32 = 3072;

/// Who has signed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Signer {
    /// The name that was asked for; else what the list says of the key, which may be several names or a pattern.
    pub principal: String,
    /// SHA-256 of the key, as `ssh-keygen -l` shows it.
    pub fingerprint: String,
    /// The line of the list that allows it, counted from 1.
    pub line: usize,
}

/// Why a signature does not count. What came with the signature is escaped.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)]
pub enum Refusal {
    #[error("it is not an SSH signature: {0}")]
    Unreadable(String),
    #[error("it was made in the namespace '{found}', for something else than {} ('{wanted}')", purpose(wanted))]
    Namespace { found: String, wanted: &'static str },
    #[error("{0}")]
    Weak(String),
    #[error("it does not fit: {fingerprint} signed other data, or what was signed has changed since")]
    Mismatch { fingerprint: String },
    #[error("{what} {fingerprint} is not listed{hint}")]
    Unknown { what: &'static str, fingerprint: String, hint: String },
    #[error("line {line}: the key is that of '{allowed}', not of '{wanted}'")]
    Principal { line: usize, allowed: String, wanted: String },
    #[error("line {line}: the key counts in the namespaces '{allowed}' alone, not in '{wanted}'")]
    NotForNamespace { line: usize, allowed: String, wanted: &'static str },
    #[error("line {line}: the key is not valid yet: valid-after {from}")]
    NotYetValid { line: usize, from: String },
    #[error("line {line}: the key is no longer valid: valid-before {until}")]
    NoLongerValid { line: usize, until: String },
    #[error("line {line}: the key is listed as an authority of certificates, and signed itself")]
    IsAuthority { line: usize },
    #[error("line {line}: the authority of its certificate is listed without cert-authority")]
    NoAuthority { line: usize },
    #[error("line {line}: the certificate {reason}")]
    Certificate { line: usize, reason: String },
}

/// Why nothing could be signed.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum SignError {
    #[error("{0}")]
    Weak(String),
    #[error("what came back is no signature by {fingerprint}")]
    Mismatch { fingerprint: String },
    #[error("the signature cannot be written")]
    Format(#[from] ssh_key::Error),
}

/// What is signed in a namespace.
fn purpose(namespace: &str) -> &'static str {
    if namespace == NAMESPACE { "a manifest" } else { "an audit log" }
}

/// What a key has to sign, to be given to [`assemble`].
///
/// # Errors
/// None that is known: those of the format.
pub fn to_sign(namespace: &str, message: &[u8]) -> Result<Vec<u8>, SignError> {
    Ok(SshSig::signed_data(namespace, HashAlg::Sha512, message)?)
}

/// The text of a signature's file, from what `key` made of [`to_sign`].
///
/// # Errors
/// When `signature` is not one of `message` by `key`, or is one that [`verify`] would not take.
pub fn assemble(namespace: &str, key: &KeyData, signature: Signature, message: &[u8]) -> Result<String, SignError> {
    strong(key).map_err(SignError::Weak)?;
    let made = SshSig::new(key.clone(), namespace, HashAlg::Sha512, signature)?;
    if !fits(&made, namespace, key, message) {
        return Err(SignError::Mismatch { fingerprint: fingerprint(key) });
    }
    Ok(made.to_pem(LineEnding::LF)?)
}

/// Judges the text of a signature's file: who has signed `message`, and whether `signers` allow it at `now` (seconds since
/// 1970). With `wanted` it must be he.
///
/// # Errors
/// Every reason that there is to refuse it; at least one.
pub fn verify(
    namespace: &'static str,
    text: &[u8],
    message: &[u8],
    signers: &AllowedSigners,
    wanted: Option<&str>,
    now: u64,
) -> Result<Signer, Vec<Refusal>> {
    let signature = read(namespace, text, message)?;
    signers.judge(namespace, signature.public_key(), wanted, now)
}

/// Reads a signature and sees that it is one of `message`, by a key that is strong; nothing says yet that the key counts.
fn read(namespace: &'static str, text: &[u8], message: &[u8]) -> Result<SshSig, Vec<Refusal>> {
    let signature = SshSig::from_pem(text)
        .map_err(|error| vec![Refusal::Unreadable(Escaped(error.to_string().as_bytes()).to_string())])?;
    if signature.namespace() != namespace {
        let found = Escaped(signature.namespace().as_bytes()).to_string();
        return Err(vec![Refusal::Namespace { found, wanted: namespace }]);
    }
    let key = match signature.public_key() {
        KeyData::Certificate(certificate) => certificate.public_key(),
        key => key,
    };
    strong(key).map_err(|reason| vec![Refusal::Weak(reason)])?;
    if !fits(&signature, namespace, key, message) {
        return Err(vec![Refusal::Mismatch { fingerprint: fingerprint(key) }]);
    }
    Ok(signature)
}

/// The same against one key that is trusted in this namespace.
///
/// # Errors
/// The reason to refuse it.
pub fn verify_by_key(namespace: &'static str, text: &[u8], message: &[u8], key: &KeyData) -> Result<(), Vec<Refusal>> {
    let signature = read(namespace, text, message)?;
    if signature.public_key() == key {
        return Ok(());
    }
    let fingerprint = fingerprint(signature.public_key());
    Err(vec![Refusal::Unknown { what: "the key", fingerprint, hint: String::new() }])
}

/// Whether it is one of `message` by `key`, which may stand in a certificate. What is signed says the namespace, so that it
/// is proven too.
fn fits(signature: &SshSig, namespace: &str, key: &KeyData, message: &[u8]) -> bool {
    // SHA-1 is no proof: of RSA signatures only those with SHA-2 count.
    let modern = !matches!(signature.algorithm(), Algorithm::Rsa { hash: None } | Algorithm::Dsa);
    let bare = SshSig::new(key.clone(), namespace, signature.hash_alg(), signature.signature().clone());
    let key = PublicKey::from(key.clone());
    modern && bare.is_ok_and(|bare| key.verify(namespace, message, &bare).is_ok())
}

/// Keys that can be broken are no proof.
fn strong(key: &KeyData) -> Result<(), String> {
    match key {
        KeyData::Ed25519(_) | KeyData::Ecdsa(_) => Ok(()),
        KeyData::Rsa(key) if key.key_size() >= MIN_RSA_BITS => Ok(()),
        KeyData::Rsa(key) => {
            Err(format!("an RSA key of {} bits is too weak; {MIN_RSA_BITS} are the least", key.key_size()))
        }
        KeyData::SkEd25519(_) | KeyData::SkEcdsaSha2NistP256(_) => {
            Err("security keys (sk-…) are not supported for manifests; use an Ed25519 key".into())
        }
        other => {
            let kind = other.algorithm().to_string();
            Err(format!("a key of type {} does not count; use an Ed25519 key", Escaped(kind.as_bytes())))
        }
    }
}

fn fingerprint(key: &KeyData) -> String {
    key.fingerprint(HashAlg::Sha256).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use ssh_key::PrivateKey;
    use ssh_key::private::{Ed25519Keypair, KeypairData};
    use ssh_key::public::SkEd25519;

    fn key(seed: u8) -> PrivateKey {
        PrivateKey::new(KeypairData::Ed25519(Ed25519Keypair::from_seed(&[seed; 32])), "").unwrap()
    }

    fn made(by: &PrivateKey, message: &[u8]) -> Signature {
        let made = SshSig::sign(by, NAMESPACE, HashAlg::Sha512, message).unwrap();
        made.signature().clone()
    }

    #[test]
    fn what_an_agent_made_of_something_else_is_not_written() {
        let (own, other) = (key(1), key(2));
        let data = own.public_key().key_data();
        assert!(
            assemble(NAMESPACE, data, made(&own, b"list"), b"list")
                .unwrap()
                .starts_with("-----BEGIN SSH SIGNATURE-----\n")
        );
        for wrong in [made(&own, b"another"), made(&other, b"list")] {
            assert!(matches!(assemble(NAMESPACE, data, wrong, b"list"), Err(SignError::Mismatch { .. })));
        }
    }

    #[test]
    fn security_keys_are_refused_as_what_they_are() {
        let own = key(1);
        let KeyData::Ed25519(public) = own.public_key().key_data() else { panic!("it is an Ed25519 key") };
        let data = KeyData::SkEd25519(SkEd25519::new(*public, "ssh:"));
        assert!(matches!(assemble(NAMESPACE, &data, made(&own, b"list"), b"list"), Err(SignError::Weak(_))));
        let line = PublicKey::from(data).to_openssh().unwrap();
        let signers = AllowedSigners::parse(format!("a {line}").as_bytes(), &|_| None);
        let text = assemble(NAMESPACE, own.public_key().key_data(), made(&own, b"list"), b"list").unwrap();
        let said = verify(NAMESPACE, text.as_bytes(), b"list", &signers, None, 0).unwrap_err()[0].to_string();
        assert!(said.contains("not listed (not understood: line 1: security keys"), "{said}");
    }

    #[test]
    fn what_is_signed_is_what_openssh_signs() {
        // "SSHSIG", the namespace, nothing, the hash's name, the hash: PROTOCOL.sshsig.
        let signed = to_sign(NAMESPACE, b"list").unwrap();
        assert!(signed.starts_with(b"SSHSIG\0\0\0\x1amanifest@lockstep.internal\0\0\0\0\0\0\0\x06sha512\0\0\0\x40"));
        assert_eq!(signed.len(), 6 + 4 + 26 + 4 + 4 + 6 + 4 + 64);
    }
}
