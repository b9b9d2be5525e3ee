//! The audit trail of what plain clients do: lines of `ROOT/.lockstep/audit.jsonl`.
//!
//! Lines are written by a thread of its own, as many at once as there are; the end of the session waits for the last.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use crossbeam_channel::{Receiver, Sender, bounded};

use crate::audit::{AuditError, AuditLog, AuditRecord};
use crate::error::chain;
use crate::root::Root;

const WAITING: usize = 1024;

/// Takes records, and writes them.
pub(super) struct Recorder {
    actor: String,
    records: Option<Sender<AuditRecord>>,
    thread: Option<JoinHandle<()>>,
    failed: Arc<AtomicBool>,
}

impl Recorder {
    /// A recorder for the log of `root`, which is made when there is something to record.
    pub(super) fn new(root: Root, actor: String) -> Recorder {
        let (records, waiting) = bounded(WAITING);
        let failed = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&failed);
        let thread = std::thread::Builder::new()
            .name("sftp-audit".into())
            .spawn(move || write_all(&root, &waiting, &flag))
            .map_err(|error| {
                failed.store(true, Ordering::Release);
                tracing::error!(%error, "no thread for the audit log");
            })
            .ok();
        Recorder { actor, records: Some(records), thread, failed }
    }

    /// Queues a record. `how` says what the client did, where the action does not.
    pub(super) fn record(&self, how: &str, record: AuditRecord) {
        let source = if how.is_empty() { "sftp".to_owned() } else { format!("sftp: {how}") };
        if let Some(records) = &self.records {
            let _ = records.send(AuditRecord { actor: self.actor.clone(), source, ..record });
        }
    }

    /// Whether records were lost.
    pub(super) fn failed(&self) -> bool {
        self.failed.load(Ordering::Acquire)
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        drop(self.records.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn write_all(root: &Root, waiting: &Receiver<AuditRecord>, failed: &AtomicBool) {
    while let Ok(first) = waiting.recv() {
        let records: Vec<AuditRecord> = std::iter::once(first).chain(waiting.try_iter().take(WAITING)).collect();
        let written: Result<_, AuditError> = AuditLog::open(root).and_then(|mut log| log.append(&records));
        if let Err(error) = written {
            failed.store(true, Ordering::Release);
            tracing::error!(error = chain(&error), lost = records.len(), "the audit log cannot be written");
        }
    }
}
