//! The audit trail of a directory: append-only JSON lines, each chained to the one before it by SHA-256.
//!
//! A line's `hash` is the SHA-256 of everything in the line before `,"hash":`; its `previous` is the hash of the line
//! before, so that an edited, inserted or removed line shows. Lines cut off at the end show against `audit.head`, which
//! says how many lines there were. Where a key is given, lines `head` carry a signature over the [`Head`] before them: who
//! writes everything anew without the key shows. What was cut off behind the last of them, with `audit.head`, shows only
//! against a head that was kept elsewhere.
//!
//! What always holds: the chain goes on over files that are rotated, and nothing is appended to a log whose end does not
//! fit. `log` writes, `trail` reads and judges, `event` and `export` tell others.

mod chain;
pub mod event;
pub mod export;
mod log;
mod lost;
mod record;
mod rotate;
mod settings;
mod sign;
mod trail;

pub use chain::{Head, Last, TAIL_BYTES, head_of, last_of, lines};
pub use log::AuditLog;
pub use record::{AuditRecord, Before, Login, Outcome};
pub use settings::{OnFailure, Rotation, Settings, Signing, configure, settings};
pub use sign::{NAMESPACE, Trusted, load_key, signed_head};
pub use trail::{Backwards, Removed, SignedHead, Verified, inspect, raw, state, verify};

use std::io;

use crate::path::InvalidPath;
use crate::root::{Root, RootError};

/// The log's name beneath a root.
pub const LOG: &str = ".lockstep/audit.jsonl";
/// The name of its head beneath a root.
pub const HEAD: &str = ".lockstep/audit.head";
const LOST: &str = ".lockstep/audit.lost";
const NEW_HEAD: &str = ".lockstep/audit.head.new";
const STATE: &str = ".lockstep";

/// Why a log cannot be written or believed.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum AuditError {
    #[error(transparent)]
    Root(#[from] RootError),
    #[error("cannot read or write the audit log '{path}'")]
    Io { path: String, source: io::Error },
    #[error("the audit log of '{root}', line {line}: {what}; keep the file as it is and find out who changed it")]
    Broken { root: String, line: u64, what: String },
    #[error("cannot sign the audit log of '{root}'")]
    Sign { root: String, source: crate::signature::SignError },
    #[error(transparent)]
    Path(#[from] InvalidPath),
}

impl AuditError {
    /// The error of the system behind it, where there is one.
    #[must_use]
    pub fn io(&self) -> Option<&io::Error> {
        match self {
            AuditError::Root(RootError { source, .. }) | AuditError::Io { source, .. } => Some(source),
            _ => None,
        }
    }

    /// What it is about, as it is shown, where that is a file.
    #[must_use]
    pub fn path(&self) -> Option<String> {
        match self {
            AuditError::Root(RootError { path, .. }) => Some(crate::error::shown(path).to_string()),
            AuditError::Io { path, .. } => Some(path.clone()),
            _ => None,
        }
    }
}

fn io_error(root: &Root) -> impl Fn(io::Error) -> AuditError + '_ {
    |source| AuditError::Io { path: shown(root, LOG), source }
}

/// The path of one of its files, for messages.
fn shown(root: &Root, file: &str) -> String {
    crate::error::shown(&root.shown().join(file)).to_string()
}

fn broken(root: &Root, line: u64, what: impl Into<String>) -> AuditError {
    AuditError::Broken { root: crate::error::shown(root.shown()).to_string(), line, what: what.into() }
}

#[cfg(test)]
mod tests;
