//! Keys on the curve P-256 as PEM, the way `openssl` writes them.

use p256::SecretKey;
use p256::ecdsa::{SigningKey, VerifyingKey};
use p256::pkcs8::{DecodePublicKey as _, EncodePublicKey as _, LineEnding};
use pkcs8::DecodePrivateKey as _;
use sha2::{Digest as _, Sha256};

use crate::manifest::Digest;

const MAKE: &str = "one is made by: openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256";

/// Why a text is no key that can be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)]
pub enum KeyError {
    #[error("it is not a key in PEM; {MAKE}")]
    NotPem,
    #[error("it is not a private key on the curve P-256, or is damaged; {MAKE}")]
    NotPrivate,
    #[error(
        "it is not a public key on the curve P-256, or is damaged; 'openssl pkey -pubout' writes that of a private key"
    )]
    NotPublic,
    #[error("it is a public key, and the private one is what signs")]
    IsPublic,
    #[error("it is a private key; what is checked with is the public one, which 'openssl pkey -pubout' writes")]
    IsPrivate,
    #[error("it is a key of OpenSSH, and signatures of this format are made with a key in PEM; {MAKE}")]
    OpenSsh,
    #[error(
        "it is encrypted in the old way of PEM ('Proc-Type'), which is not read; 'openssl pkcs8 -topk8' writes it in the new way"
    )]
    OldEncryption,
    #[error("it needs a passphrase, and there is no terminal to ask for it at")]
    NoPassphrase,
    #[error("the passphrase is wrong, or the key is encrypted in a way that is not known")]
    Passphrase,
}

/// A key that checks signatures.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PublicKey {
    pub(super) key: VerifyingKey,
    hint: Digest,
}

impl PublicKey {
    /// Reads `-----BEGIN PUBLIC KEY-----`.
    ///
    /// # Errors
    /// Why it is none that can be used.
    pub fn from_pem(text: &[u8]) -> Result<PublicKey, KeyError> {
        let (label, block) = block(text)?;
        match label {
            "PUBLIC KEY" => {}
            "PRIVATE KEY" | "ENCRYPTED PRIVATE KEY" | "EC PRIVATE KEY" => return Err(KeyError::IsPrivate),
            "OPENSSH PRIVATE KEY" => return Err(KeyError::OpenSsh),
            _ => return Err(KeyError::NotPublic),
        }
        PublicKey::of(VerifyingKey::from_public_key_pem(block).map_err(|_| KeyError::NotPublic)?)
    }

    fn of(key: VerifyingKey) -> Result<PublicKey, KeyError> {
        let pem = key.to_public_key_pem(LineEnding::LF).map_err(|_| KeyError::NotPublic)?;
        Ok(PublicKey { key, hint: Digest(Sha256::digest(pem.as_bytes()).into()) })
    }

    /// What signatures name the key by: the SHA-256 of its text in PEM, which `openssl pkey -pubout | sha256sum` shows.
    pub fn hint(&self) -> Digest {
        self.hint
    }
}

/// A key that signs.
pub struct PrivateKey {
    pub(super) key: SigningKey,
    public: PublicKey,
}

impl PrivateKey {
    /// Reads `-----BEGIN PRIVATE KEY-----` (PKCS#8), the same encrypted, with what `passphrase` answers, or
    /// `-----BEGIN EC PRIVATE KEY-----` (SEC1), where `-----BEGIN EC PARAMETERS-----` may stand before it.
    ///
    /// # Errors
    /// Why it is none that can be used.
    pub fn from_pem(text: &[u8], passphrase: &dyn Fn() -> Option<String>) -> Result<PrivateKey, KeyError> {
        let (label, block) = block(text)?;
        let key = match label {
            "PRIVATE KEY" => SecretKey::from_pkcs8_pem(block).map_err(|_| KeyError::NotPrivate)?,
            "ENCRYPTED PRIVATE KEY" => encrypted(block, passphrase)?,
            "EC PRIVATE KEY" if block.contains("\nProc-Type:") => return Err(KeyError::OldEncryption),
            "EC PRIVATE KEY" => SecretKey::from_sec1_pem(block).map_err(|_| KeyError::NotPrivate)?,
            "PUBLIC KEY" => return Err(KeyError::IsPublic),
            "OPENSSH PRIVATE KEY" => return Err(KeyError::OpenSsh),
            _ => return Err(KeyError::NotPrivate),
        };
        let key = SigningKey::from(key);
        let public = PublicKey::of(*key.verifying_key())?;
        Ok(PrivateKey { key, public })
    }

    /// The other half.
    pub fn public(&self) -> &PublicKey {
        &self.public
    }
}

fn encrypted(block: &str, passphrase: &dyn Fn() -> Option<String>) -> Result<SecretKey, KeyError> {
    use pkcs8::der::pem::PemLabel as _;
    let (label, document) = pkcs8::SecretDocument::from_pem(block).map_err(|_| KeyError::NotPrivate)?;
    pkcs8::EncryptedPrivateKeyInfoRef::validate_pem_label(label).map_err(|_| KeyError::NotPrivate)?;
    let locked = pkcs8::EncryptedPrivateKeyInfoRef::try_from(document.as_bytes()).map_err(|_| KeyError::NotPrivate)?;
    let open = locked.decrypt(passphrase().ok_or(KeyError::NoPassphrase)?).map_err(|_| KeyError::Passphrase)?;
    SecretKey::from_pkcs8_der(open.as_bytes()).map_err(|_| KeyError::NotPrivate)
}

/// The first block that holds a key, with its label.
fn block(text: &[u8]) -> Result<(&str, &str), KeyError> {
    let mut rest = std::str::from_utf8(text).map_err(|_| KeyError::NotPem)?;
    loop {
        let begin = rest.find("-----BEGIN ").ok_or(KeyError::NotPem)?;
        rest = &rest[begin..];
        let label = rest["-----BEGIN ".len()..].split_once("-----").ok_or(KeyError::NotPem)?.0;
        let last = format!("-----END {label}-----");
        let end = rest.find(&last).ok_or(KeyError::NotPem)? + last.len();
        // `openssl ecparam -genkey` writes the name of the curve first.
        if label != "EC PARAMETERS" {
            return Ok((label, &rest[..end]));
        }
        rest = &rest[end..];
    }
}
