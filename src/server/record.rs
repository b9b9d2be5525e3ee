//! The record of logins, sessions and refusals: an audit log of its own, written by one thread.

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot};

use crate::audit::{AuditError, AuditLog, AuditRecord, OnFailure, settings};
use crate::error::shown;
use crate::root::Root;

/// Records that may wait. A flood of refusals is counted, not kept.
const WAITING: usize = 1024;
const BATCH: usize = 256;
const MINUTE: Duration = Duration::from_secs(60);

/// A record, and who waits for it; without a record somebody waits for those before.
type Entry = (Option<AuditRecord>, Option<oneshot::Sender<bool>>);

/// Of those who have not logged in, in a minute: anybody can make such records.
const STRANGERS: u64 = 60;

/// Where records go; nowhere without a directory.
#[derive(Debug, Default)]
pub struct Recorder {
    entries: Option<mpsc::Sender<Entry>>,
    /// Records that were not written since the last that was.
    lost: AtomicU64,
    /// When the minute began, and how many strangers were recorded in it.
    strangers: Mutex<Option<(Instant, u64)>>,
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
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
        let runtime = runtime.map_err(|source| AuditError::Io { path: shown(directory).to_string(), source })?;
        let write = move || {
            let (mut batch, mut unsigned) = (Vec::new(), false);
            loop {
                let more = runtime.block_on(async {
                    let more = entries.recv_many(&mut batch, BATCH);
                    match settings().signing.as_ref().filter(|_| unsigned) {
                        Some(signing) => tokio::time::timeout(signing.every, more).await.ok(),
                        None => Some(more.await),
                    }
                });
                // Who waits for all of it, nobody who is left, and a silence: each is an end.
                let end = more.is_none_or(|more| more == 0) || batch.iter().any(|(record, _)| record.is_none());
                let (records, waiting): (Vec<_>, Vec<_>) = batch.drain(..).unzip();
                let records = records.into_iter().flatten();
                let written = AuditLog::open(&root).and_then(|mut log| match end {
                    true => log.append_last(records),
                    false => log.append_all(records),
                });
                unsigned = !end;
                if let Err(error) = &written {
                    tracing::error!(error = crate::error::chain(error), "the audit log cannot be written");
                }
                for sender in waiting.into_iter().flatten() {
                    let _ = sender.send(written.is_ok());
                }
                if more == Some(0) {
                    return;
                }
            }
        };
        // Without the thread the channel is closed, and nobody can log in.
        let _ = std::thread::Builder::new().name("audit".into()).spawn(write);
        Ok(Recorder { entries: Some(sender), ..Recorder::default() })
    }

    /// Records what must not happen without a record, unless `[audit] on_failure` says that it may. `false` when it could not
    /// be written.
    pub async fn must(&self, record: AuditRecord) -> bool {
        self.written(Some(record)).await || settings().on_failure == OnFailure::Continue
    }

    /// Waits until all that was noted is written.
    pub async fn flush(&self) {
        self.written(None).await;
    }

    async fn written(&self, record: Option<AuditRecord>) -> bool {
        let Some(entries) = &self.entries else { return true };
        let (sender, written) = oneshot::channel();
        entries.send((record, Some(sender))).await.is_ok() && written.await.unwrap_or(false)
    }

    /// As [`Recorder::note`], for refusals before a login: only so many a minute; the others are counted.
    pub fn note_stranger(&self, records: impl IntoIterator<Item = AuditRecord>) {
        let now = Instant::now();
        let mut strangers = self.strangers.lock().unwrap_or_else(PoisonError::into_inner);
        let (began, count) = strangers.filter(|(began, _)| now - *began < MINUTE).unwrap_or((now, 0));
        *strangers = Some((began, count + 1));
        drop(strangers);
        if count < STRANGERS {
            records.into_iter().for_each(|record| self.note(record));
        } else {
            self.lost.fetch_add(records.into_iter().count() as u64, Ordering::Relaxed);
        }
    }

    /// Records what has happened already, without waiting.
    pub fn note(&self, mut record: AuditRecord) {
        let Some(entries) = &self.entries else { return };
        let lost = self.lost.swap(0, Ordering::Relaxed);
        if lost > 0 {
            let reason = record.reason.unwrap_or_default();
            record.reason = Some(format!("{reason} (and {lost} records before it that came too fast)"));
        }
        if entries.try_send((Some(record), None)).is_err() {
            self.lost.fetch_add(lost + 1, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_of_strangers_is_counted_not_written() {
        let at = tempfile::tempdir().unwrap();
        let recorder = Recorder::open(at.path()).unwrap();
        let record = |reason: &str| AuditRecord { reason: Some(reason.into()), ..AuditRecord::default() };
        for _ in 0..STRANGERS + 5 {
            recorder.note_stranger([record("flood")]);
        }
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        assert!(runtime.block_on(recorder.must(record("login"))));
        recorder.note(record("next"));
        assert!(runtime.block_on(recorder.must(record("login"))));
        let log = std::fs::read_to_string(at.path().join(crate::audit::LOG)).unwrap();
        assert_eq!(log.matches("\"flood\"").count() as u64, STRANGERS);
        assert!(log.contains("next (and 5 records before it that came too fast)"), "{log}");
        assert!(crate::audit::verify(&Root::open(at.path()).unwrap()).is_ok());
    }
}
