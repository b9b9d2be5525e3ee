//! How the logs that this process writes are signed and rotated, and what happens when they cannot be written.
//!
//! It is one thing for the whole process, set once when it starts and again when its configuration is read anew: a log is
//! opened in many places, at the end of paths that know nothing of a configuration.

use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use ssh_key::PrivateKey;

/// What is done when a log cannot be written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnFailure {
    /// What it would tell of is not done.
    #[default]
    Refuse,
    /// It is done all the same, and the log has a gap.
    Continue,
}

/// When a log begins a new file.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rotation {
    /// When the file has so many bytes.
    pub bytes: Option<u64>,
    /// When its first line is so old.
    pub age: Option<Duration>,
    /// How many files stay beside the one that is written; all of them where it is `None`.
    pub keep: Option<u32>,
}

/// By what key heads are signed, and how often at least while something is written.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Signing {
    /// Without a passphrase.
    #[serde(with = "key")]
    pub key: PrivateKey,
    /// After so many lines.
    pub lines: u64,
    /// After so long.
    pub every: Duration,
}

/// All of it.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Settings {
    /// Without it nothing is signed.
    pub signing: Option<Signing>,
    /// See [`Rotation`].
    pub rotation: Rotation,
    /// See [`OnFailure`].
    pub on_failure: OnFailure,
}

/// A key as OpenSSH's text, for a process of this program.
mod key {
    use serde::{Deserialize, Deserializer, Serializer, de, ser};
    use ssh_key::{LineEnding, PrivateKey};

    pub(super) fn serialize<S: Serializer>(key: &PrivateKey, output: S) -> Result<S::Ok, S::Error> {
        output.serialize_str(&key.to_openssh(LineEnding::LF).map_err(ser::Error::custom)?)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(input: D) -> Result<PrivateKey, D::Error> {
        PrivateKey::from_openssh(String::deserialize(input)?).map_err(de::Error::custom)
    }
}

static CURRENT: RwLock<Option<Arc<Settings>>> = RwLock::new(None);

/// From now on logs are opened with these.
pub fn configure(settings: Settings) {
    *CURRENT.write().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(settings));
}

/// What holds now.
#[must_use]
pub fn settings() -> Arc<Settings> {
    CURRENT.read().unwrap_or_else(PoisonError::into_inner).clone().unwrap_or_default()
}
