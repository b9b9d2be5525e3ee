//! The audit trail of what plain clients do: lines of `ROOT/.lockstep/audit.jsonl`.
//!
//! Lines are written by a thread of its own, as many at once as there are; the end of the session waits for the last, and
//! signs them. There is always room taken for what may wait, so that a disk that gets full is noticed before something is
//! done that could not be told.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};

use crate::audit::{AuditLog, AuditRecord, Login, OnFailure, settings};
use crate::error::chain;
use crate::root::Root;

const WAITING: usize = 256;
/// What is taken for them.
const ROOM_BYTES: u64 = 256 << 10;
/// A log that cannot be written is tried no more often than this.
const AGAIN: Duration = Duration::from_secs(1);

/// What the thread and the session share.
struct Shared {
    root: Root,
    /// Room was taken, and the last lines were written.
    good: AtomicBool,
    /// Records that were not written since the last that was.
    lost: AtomicU64,
    /// When the log was last tried.
    tried: Mutex<Option<Instant>>,
}

/// Takes records, and writes them.
pub(super) struct Recorder {
    actor: String,
    login: Login,
    records: Option<Sender<AuditRecord>>,
    thread: Option<JoinHandle<()>>,
    shared: Arc<Shared>,
}

impl Recorder {
    /// A recorder for the log of `root`, which is made when something is to be recorded.
    pub(super) fn new(root: Root, actor: String, login: Login) -> Recorder {
        let (records, waiting) = bounded(WAITING);
        let (good, lost, tried) = (AtomicBool::new(false), AtomicU64::new(0), Mutex::default());
        let shared = Arc::new(Shared { root, good, lost, tried });
        let own = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("sftp-audit".into())
            .spawn(move || write_all(&own, &waiting))
            .map_err(|error| tracing::error!(%error, "no thread for the audit log"))
            .ok();
        Recorder { actor, login, records: Some(records), thread, shared }
    }

    /// Queues a record. `how` says what the client did, where the action does not.
    pub(super) fn record(&self, how: &str, record: AuditRecord) {
        let source = if how.is_empty() { "sftp".to_owned() } else { format!("sftp: {how}") };
        if let Some(records) = &self.records {
            let login = Some(Box::new(self.login.clone())).filter(|login| **login != Login::default());
            let _ = records.send(AuditRecord { actor: self.actor.clone(), source, login, ..record });
        }
    }

    /// Whether something may be done that has to be recorded.
    pub(super) fn ready(&self) -> bool {
        if settings().on_failure == OnFailure::Continue {
            return true;
        }
        if self.thread.is_none() {
            return false;
        }
        if self.shared.good.load(Ordering::Acquire) {
            return true;
        }
        let mut tried = self.shared.tried.lock().unwrap_or_else(PoisonError::into_inner);
        if tried.is_some_and(|tried| tried.elapsed() < AGAIN) {
            return false;
        }
        let found = AuditLog::open(&self.shared.root).and_then(|log| log.reserve(ROOM_BYTES));
        *tried = found.is_err().then(Instant::now);
        match &found {
            Ok(()) => self.shared.good.store(true, Ordering::Release),
            Err(error) => tracing::error!(error = chain(error), "the audit log cannot be written"),
        }
        found.is_ok()
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

fn write_all(shared: &Shared, waiting: &Receiver<AuditRecord>) {
    let mut any = false;
    while let Ok(first) = waiting.recv() {
        let mut records: Vec<AuditRecord> = std::iter::once(first).chain(waiting.try_iter().take(WAITING)).collect();
        let count = records.len() as u64;
        let lost = shared.lost.swap(0, Ordering::Relaxed);
        if lost > 0 {
            let reason = Some(format!("{lost} records before this one could not be written"));
            records.insert(0, AuditRecord { action: "gap".into(), reason, ..AuditRecord::default() });
        }
        let mut opened = AuditLog::open(&shared.root);
        let written = opened.as_mut().map_err(|error| chain(error));
        let written = written.and_then(|log| {
            log.append(&records).map_err(|error| chain(&error))?;
            Ok(log.reserve(ROOM_BYTES))
        });
        any = true;
        match written {
            Ok(room) => {
                shared.good.store(room.is_ok(), Ordering::Release);
                if let Err(error) = room {
                    tracing::error!(error = chain(&error), "the audit log has no room for more");
                }
            }
            Err(error) => {
                shared.lost.store(lost + count, Ordering::Relaxed);
                shared.good.store(false, Ordering::Release);
                tracing::error!(error, lost = count, "the audit log cannot be written");
            }
        }
    }
    if any
        && settings().signing.is_some()
        && let Err(error) = AuditLog::open(&shared.root).and_then(|mut log| log.append_last([]))
    {
        tracing::error!(error = chain(&error), "the audit log cannot be written");
    }
}
