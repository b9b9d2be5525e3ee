//! `[audit]`: how the logs that this machine writes are signed and rotated, and what happens when they cannot be written.

use std::num::{NonZeroU32, NonZeroU64};
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::audit::{OnFailure, Rotation};

/// A file that is smaller would hold little but its first line.
const ROTATE_MIN: u64 = 4096;
const DAY: u64 = 86_400;

/// The audit logs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Audit {
    /// The private key that signs heads, without a passphrase; absolute. Left out: `serve` signs with its host key, others not
    /// at all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub signing_key: Option<PathBuf>,
    /// A head is signed after so many lines at the latest.
    pub sign_lines: NonZeroU64,
    /// A head is signed with the first line that is written so many minutes after the last one.
    pub sign_minutes: NonZeroU64,
    /// A new file is begun when the old one has so many bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rotate_bytes: Option<u64>,
    /// A new file is begun when the first line of the old one is so many days old.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rotate_days: Option<NonZeroU32>,
    /// How many rotated files stay; the oldest go. Left out: all stay.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keep: Option<NonZeroU32>,
    /// What happens when a log cannot be written.
    pub on_failure: OnFailure,
}

impl Default for Audit {
    fn default() -> Audit {
        let count = |number| NonZeroU64::new(number).unwrap_or(NonZeroU64::MIN);
        Audit {
            signing_key: None,
            sign_lines: count(1000),
            sign_minutes: count(10),
            rotate_bytes: None,
            rotate_days: None,
            keep: None,
            on_failure: OnFailure::Refuse,
        }
    }
}

impl Audit {
    /// What the types alone do not say.
    pub(super) fn check(&self) -> Result<(), String> {
        if let Some(path) = &self.signing_key {
            super::absolute("signing_key", path)?;
        }
        if let Some(bytes) = self.rotate_bytes.filter(|&bytes| bytes < ROTATE_MIN) {
            return Err(format!("'rotate_bytes' is {bytes}, and has to be {ROTATE_MIN} at least"));
        }
        if self.keep.is_some() && self.rotate_bytes.is_none() && self.rotate_days.is_none() {
            return Err(
                "'keep' counts rotated files: say with 'rotate_bytes' or 'rotate_days' when a log is rotated".into()
            );
        }
        Ok(())
    }

    /// When a log begins a new file.
    #[must_use]
    pub fn rotation(&self) -> Rotation {
        let days = self.rotate_days.map(|days| Duration::from_secs(u64::from(days.get()) * DAY));
        Rotation { bytes: self.rotate_bytes, age: days, keep: self.keep.map(NonZeroU32::get) }
    }

    /// The time between two signed heads.
    #[must_use]
    pub fn sign_every(&self) -> Duration {
        Duration::from_secs(self.sign_minutes.get().saturating_mul(60))
    }
}
