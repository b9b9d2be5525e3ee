//! What a run refused, for the audit log of its root.
//!
//! What always holds: a refusal is in the log before the run is over, whether the run goes on to publish or not.

use super::target::Run;
use crate::audit::{AuditLog, AuditRecord, Outcome};
use crate::error::{Escaped, chain};

/// A peer that only sends what is refused does not fill the disk with the record of it.
const KEPT: usize = 1000;
/// Bytes of a reason. A line of the log has a longest length, and a reason may quote whoever is refused.
const REASON_MAX: usize = 8 * 1024;

/// Refusals that are not yet in the log.
#[derive(Default)]
pub(super) struct Refusals {
    waiting: Vec<(String, String)>,
    left_out: u64,
}

/// A reason as it is recorded: of bounded length, without control characters.
pub(crate) fn recorded(reason: &str) -> String {
    let mut text = reason.to_owned();
    if text.contains(char::is_control) {
        text = Escaped(&reason.as_bytes()[..reason.len().min(REASON_MAX)]).to_string();
    }
    if text.len() > REASON_MAX {
        let end = (0..=REASON_MAX).rev().find(|&at| text.is_char_boundary(at));
        text.truncate(end.unwrap_or(0));
        text.push('…');
    }
    text
}

impl Run {
    /// Keeps a refusal for the log: the path as its bytes (empty where it is about none), and why.
    pub(super) fn refuse(&self, path: &[u8], reason: &str) {
        let mut refusals = self.refusals();
        if refusals.waiting.len() < KEPT {
            refusals.waiting.push((Escaped(path).to_string(), recorded(reason)));
        } else {
            refusals.left_out += 1;
        }
    }

    /// Writes what waits to the log. A dry run changes nothing, and so records nothing.
    pub(super) fn record_refusals(&self) {
        let Refusals { mut waiting, left_out } = std::mem::take(&mut *self.refusals());
        if waiting.is_empty() || self.options.dry_run {
            return;
        }
        if left_out > 0 {
            waiting.push((String::new(), format!("{left_out} further refusals of this run are left out")));
        }
        let records: Vec<AuditRecord> = waiting
            .into_iter()
            .map(|(path, reason)| AuditRecord {
                actor: self.options.actor.clone(),
                source: self.options.source.clone(),
                login: self.options.login.clone(),
                result: Some(Outcome::Failure),
                action: "refuse".into(),
                path,
                reason: Some(reason),
                ..AuditRecord::default()
            })
            .collect();
        // What is refused stays refused when the log cannot be written: there is nothing to take back.
        if let Err(error) = AuditLog::open(&self.root).and_then(|mut log| log.append(&records)) {
            tracing::error!(error = chain(&error), lost = records.len(), "the audit log cannot be written");
        }
    }
}
