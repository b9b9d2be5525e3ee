//! The record of logins, sessions and refusals: an audit log of its own, written by one thread.

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::{mpsc, oneshot};

use crate::audit::{AuditError, AuditLog, AuditRecord};
use crate::root::Root;

/// Records that may wait. A flood of refusals is counted, not kept.
const WAITING: usize = 1024;
const BATCH: usize = 256;

type Entry = (AuditRecord, Option<oneshot::Sender<bool>>);

/// Where records go; nowhere without a directory.
#[derive(Debug, Default)]
pub struct Recorder {
    entries: Option<mpsc::Sender<Entry>>,
    lost: AtomicU64,
}

impl Recorder {
    /// Opens the log of a directory, which proves that it can be written.
    ///
    /// # Errors
    /// When it cannot be, or was tampered with.
    pub fn open(directory: &Path) -> Result<Recorder, AuditError> {
        let root = Root::open(directory)?;
        drop(AuditLog::open(&root)?);
        let (sender, mut entries) = mpsc::channel::<Entry>(WAITING);
        let write = move || {
            let mut batch = Vec::new();
            while entries.blocking_recv_many(&mut batch, BATCH) > 0 {
                let (records, waiting): (Vec<_>, Vec<_>) = batch.drain(..).unzip();
                let written = AuditLog::open(&root).and_then(|mut log| log.append(&records));
                if let Err(error) = &written {
                    tracing::error!(error = crate::error::chain(error), "the audit log cannot be written");
                }
                for sender in waiting.into_iter().flatten() {
                    let _ = sender.send(written.is_ok());
                }
            }
        };
        // Without the thread the channel is closed, and nobody can log in.
        let _ = std::thread::Builder::new().name("audit".into()).spawn(write);
        Ok(Recorder { entries: Some(sender), lost: AtomicU64::new(0) })
    }

    /// Records what must not happen without a record. `false` when it could not be written.
    pub async fn must(&self, record: AuditRecord) -> bool {
        let Some(entries) = &self.entries else { return true };
        let (sender, written) = oneshot::channel();
        entries.send((record, Some(sender))).await.is_ok() && written.await.unwrap_or(false)
    }

    /// Records what has happened already, without waiting.
    pub fn note(&self, mut record: AuditRecord) {
        let Some(entries) = &self.entries else { return };
        let lost = self.lost.swap(0, Ordering::Relaxed);
        if lost > 0 {
            let reason = record.reason.unwrap_or_default();
            record.reason = Some(format!("{reason} (and {lost} records before it that came too fast)"));
        }
        if entries.try_send((record, None)).is_err() {
            self.lost.fetch_add(lost + 1, Ordering::Relaxed);
        }
    }
}
