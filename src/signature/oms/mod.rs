//! Signatures of models in the format of OpenSSF Model Signing, version 1, with a key on the curve P-256: a bundle of
//! Sigstore around a DSSE envelope around an in-toto statement. `model_signing` (PyPI: model-signing) makes and checks them too.
//!
//! What always holds: the signature is checked with the key that was given, never with one that comes along, and nothing
//! of what was signed is parsed before.

use std::collections::BTreeMap;

use base64ct::{Base64, Encoding as _};
use p256::ecdsa::signature::{Signer as _, Verifier as _};
use p256::ecdsa::{DerSignature, Signature};
use serde::Deserialize;
use serde::de::IgnoredAny;

use crate::error::Escaped;
use crate::manifest::{Digest, Tree};
use crate::path::RelPath;

mod key;
mod statement;

pub use key::{KeyError, PrivateKey, PublicKey};
pub use statement::{Statement, StatementError, UnsignableTree};

/// More bytes than the signature of any model takes: of three million files.
pub const MAX_BYTES: u64 = 1 << 30;
const BUNDLE: &str = "application/vnd.dev.sigstore.bundle.v0.3+json";
const PAYLOAD: &str = "application/vnd.in-toto+json";

/// Why a signature does not count. What came with it is escaped.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)]
pub enum Refusal {
    #[error("it is not a signature of OpenSSF Model Signing: {0}")]
    Unreadable(String),
    #[error("it is a bundle of the kind '{found}', and '{BUNDLE}' is what is read")]
    Bundle { found: String },
    #[error("it was made with a certificate instead of a key ('keyless'), which is not supported here")]
    Certificate,
    #[error("it comes with entries of a transparency log, as 'keyless' signatures do, which are not supported here")]
    Logged,
    #[error("it says that it was made with another key: {named}, and the key to be trusted is {trusted}")]
    OtherKey { named: String, trusted: Digest },
    #[error("it names its key '{named}' beside the signature, and the key to be trusted is {trusted}")]
    KeyId { named: String, trusted: Digest },
    #[error("it holds {0} signatures, and one is what belongs there")]
    Several(usize),
    #[error("what was signed is of the type '{found}', not '{PAYLOAD}'")]
    Payload { found: String },
    #[error("it does not fit: it was made with another key, or what was signed has changed since")]
    Mismatch,
    #[error("what was signed is no list of a model's files that counts: {0}")]
    Statement(#[from] StatementError),
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Bundle {
    media_type: String,
    verification_material: Material,
    dsse_envelope: Envelope,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Material {
    public_key: Option<Identifier>,
    certificate: Option<IgnoredAny>,
    #[serde(rename = "x509CertificateChain")]
    chain: Option<IgnoredAny>,
    #[serde(default)]
    tlog_entries: Vec<IgnoredAny>,
}

#[derive(Deserialize)]
struct Identifier {
    hint: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Envelope {
    payload: String,
    payload_type: String,
    signatures: Vec<Made>,
}

#[derive(Deserialize)]
struct Made {
    sig: String,
    keyid: Option<String>,
}

/// The text of a signature's file.
///
/// # Errors
/// None that is known: those of JSON.
pub fn sign(statement: &Statement, key: &PrivateKey) -> Result<String, serde_json::Error> {
    let payload = statement.to_json()?;
    let made: Signature = key.key.sign(&enveloped(&payload));
    let text = serde_json::to_string(&serde_json::json!({
        "mediaType": BUNDLE,
        "verificationMaterial": { "publicKey": { "hint": key.public().hint().to_string() }, "tlogEntries": [] },
        "dsseEnvelope": {
            "payload": Base64::encode_string(&payload),
            "payloadType": PAYLOAD,
            "signatures": [{ "sig": Base64::encode_string(made.to_der().as_bytes()), "keyid": "" }],
        },
    }))?;
    Ok(text + "\n")
}

/// Judges the text of a signature's file, and reads what was signed.
///
/// # Errors
/// The first reason to refuse it.
pub fn verify(text: &[u8], key: &PublicKey) -> Result<Statement, Refusal> {
    let bundle: Bundle = serde_json::from_slice(text).map_err(|error| unreadable(&error))?;
    if bundle.media_type != BUNDLE {
        return Err(Refusal::Bundle { found: safe(&bundle.media_type) });
    }
    let (material, envelope) = (bundle.verification_material, bundle.dsse_envelope);
    if material.certificate.is_some() || material.chain.is_some() {
        return Err(Refusal::Certificate);
    }
    if !material.tlog_entries.is_empty() {
        return Err(Refusal::Logged);
    }
    let trusted = key.hint();
    // Signatures of early versions name no key: then the signature alone decides, as it does in any case.
    let named = material.public_key.and_then(|key| key.hint).filter(|hint| !hint.is_empty());
    if let Some(named) = named.filter(|named| *named != trusted.to_string()) {
        return Err(Refusal::OtherKey { named: safe(&named), trusted });
    }
    let [made] = &envelope.signatures[..] else { return Err(Refusal::Several(envelope.signatures.len())) };
    let named = made.keyid.as_ref().filter(|named| !named.is_empty() && **named != trusted.to_string());
    if let Some(named) = named {
        return Err(Refusal::KeyId { named: safe(named), trusted });
    }
    if envelope.payload_type != PAYLOAD {
        return Err(Refusal::Payload { found: safe(&envelope.payload_type) });
    }
    let payload = Base64::decode_vec(&envelope.payload).map_err(|error| unreadable(&error))?;
    let made = Base64::decode_vec(&made.sig).map_err(|error| unreadable(&error))?;
    let made = DerSignature::try_from(&made[..]).map_err(|error| unreadable(&error))?;
    key.key.verify(&enveloped(&payload), &made).map_err(|_| Refusal::Mismatch)?;
    Ok(Statement::from_json(&payload)?)
}

/// What DSSE signs: the type with its length, then the payload with its own.
fn enveloped(payload: &[u8]) -> Vec<u8> {
    let mut text = format!("DSSEv1 {} {PAYLOAD} {} ", PAYLOAD.len(), payload.len()).into_bytes();
    text.extend_from_slice(payload);
    text
}

/// What a list says of the names in it that are no directories: the digest of a file; `None` for a link.
pub type Listed = BTreeMap<RelPath, Option<Digest>>;

/// In what a list and a signature contradict each other, by path. `own` is the signature, if it lies in the tree.
pub fn disagreements(statement: &Statement, listed: &Listed, own: Option<&RelPath>) -> Vec<String> {
    let signed: BTreeMap<&RelPath, &Digest> = statement.files.iter().map(|(path, digest)| (path, digest)).collect();
    let mut found: Vec<(&RelPath, &str)> = Vec::new();
    for (path, digest) in listed {
        match (signed.get(path), digest) {
            (Some(signed), Some(digest)) if *signed == digest => {}
            (Some(_), Some(_)) => found.push((path, "is signed with another digest")),
            (Some(_), None) => found.push((path, "is signed as a file and listed as a link")),
            (None, _) if statement.ignores(path) || own == Some(path) => {}
            (None, Some(_)) => found.push((path, "is listed but not signed")),
            // Whatever it leads to would be taken for a part of the model.
            (None, None) => found.push((path, "is a link, which is not signed")),
        }
    }
    found.extend(
        signed.keys().filter(|path| !listed.contains_key(path)).map(|path| (*path, "is signed but not listed")),
    );
    found.sort();
    found.into_iter().map(|(path, what)| format!("'{path}' {what}")).collect()
}

/// What a manifest lists.
pub fn listed(tree: &Tree) -> Listed {
    let names = tree.entries().iter().filter(|entry| !entry.is_directory());
    names.map(|entry| (entry.path.clone(), statement::digest(tree, entry))).collect()
}

fn unreadable(error: &dyn std::fmt::Display) -> Refusal {
    Refusal::Unreadable(safe(&error.to_string()))
}

fn safe(text: &str) -> String {
    Escaped(text.as_bytes()).to_string()
}

#[cfg(test)]
mod tests;
