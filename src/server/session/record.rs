//! The audit trail of what plain clients do: lines of `ROOT/.lockstep/audit.jsonl`.
//!
//! Lines are written by a thread of its own, as many at once as there are; the end of the session waits for the last, and
//! signs them. There is always room taken for what may wait, and for what is still to be told of files that are open, so that a
//! disk that gets full is noticed before something is done that could not be told.
//!
//! RACE: sessions of one root take the same room. What several of them tell just when the disk gets full may be more; then it
//! is counted beside the log, and whoever writes the next line says so.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};

use super::lanes::LANES;
use crate::audit::{AuditLog, AuditRecord, Login, OnFailure, settings};
use crate::error::chain;
use crate::path::PATH_MAX;
use crate::root::Root;

const WAITING: usize = 256;
/// So many bytes of lines wait at most.
const WAITING_BYTES: u64 = 128 << 10;
/// The longest line of a request: it names two paths, and of a byte that is escaped in both ways there are five.
const LINE_BYTES: u64 = 2 * 5 * (PATH_MAX as u64) + (7 << 10);
/// The longest of a file that is closed.
const CLOSE_BYTES: u64 = 5 * (PATH_MAX as u64) + (3 << 10);
/// What is taken: for what waits, and for what is done while it does, on each lane and by name.
const ROOM_BYTES: u64 = WAITING_BYTES + (LANES + 1) * LINE_BYTES;
/// Room for closing files is taken for so many at a time.
const HANDLES: u64 = 8;
/// A log that cannot be written is tried no more often than this.
const AGAIN: Duration = Duration::from_secs(1);

/// What the thread and the session share.
struct Shared {
    root: Root,
    /// Room was taken, and the last lines were written.
    good: AtomicBool,
    /// How much room.
    room: AtomicU64,
    /// Bytes of lines that were not written yet.
    waiting: Mutex<u64>,
    written: Condvar,
    /// Records that were not written, and are not counted beside the log yet.
    lost: AtomicU64,
    /// When the log was last tried.
    tried: Mutex<Option<Instant>>,
}

impl Shared {
    fn waiting(&self) -> MutexGuard<'_, u64> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until there is room for a line. One alone always has it.
    fn enter(&self, bytes: u64) {
        let mut waiting = self.waiting();
        while *waiting > 0 && *waiting + bytes > WAITING_BYTES {
            waiting = self.written.wait(waiting).unwrap_or_else(PoisonError::into_inner);
        }
        *waiting += bytes;
    }

    fn leave(&self, bytes: u64) {
        *self.waiting() -= bytes;
        self.written.notify_all();
    }

    /// Counts what was lost where whoever writes next finds it, this session or another.
    fn keep_lost(&self, more: u64) {
        let lost = self.lost.load(Ordering::Relaxed) + more;
        let kept = lost == 0 || AuditLog::lose(&self.root, lost).is_ok();
        self.lost.store(if kept { 0 } else { lost }, Ordering::Relaxed);
    }
}

/// Takes records, and writes them.
pub(super) struct Recorder {
    actor: String,
    login: Login,
    /// Each with the length of its line.
    records: Option<Sender<(AuditRecord, u64)>>,
    thread: Option<JoinHandle<()>>,
    shared: Arc<Shared>,
}

impl Recorder {
    /// A recorder for the log of `root`, which is made when something is to be recorded.
    pub(super) fn new(root: Root, actor: String, login: Login) -> Recorder {
        let (records, waiting) = bounded(WAITING);
        let (good, room, lost) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
        let (waiting_bytes, written, tried) = (Mutex::new(0), Condvar::new(), Mutex::default());
        let shared = Arc::new(Shared { root, good, room, waiting: waiting_bytes, written, lost, tried });
        let own = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("sftp-audit".into())
            .spawn(move || write_all(&own, &waiting))
            .map_err(|error| tracing::error!(%error, "no thread for the audit log"))
            .ok();
        Recorder { actor, login, records: Some(records), thread, shared }
    }

    /// Queues a record; waits while there are too many. `how` says what the client did, where the action does not.
    pub(super) fn record(&self, how: &str, record: AuditRecord) {
        let source = if how.is_empty() { "sftp".to_owned() } else { format!("sftp: {how}") };
        if let Some(records) = &self.records {
            let login = Some(Box::new(self.login.clone())).filter(|login| **login != Login::default());
            let record = AuditRecord { actor: self.actor.clone(), source, login, ..record };
            let bytes = record.line_bytes();
            self.shared.enter(bytes);
            if records.send((record, bytes)).is_err() {
                self.shared.leave(bytes);
            }
        }
    }

    /// Whether something may be done that has to be recorded, by a session with so many open handles.
    pub(super) fn ready(&self, handles: usize) -> bool {
        if settings().on_failure == OnFailure::Continue {
            return true;
        }
        if self.thread.is_none() {
            return false;
        }
        let needed = ROOM_BYTES + (handles as u64 + 1).next_multiple_of(HANDLES) * CLOSE_BYTES;
        let room = needed.max(self.shared.room.load(Ordering::Relaxed));
        if self.shared.good.load(Ordering::Acquire) && room == self.shared.room.load(Ordering::Relaxed) {
            return true;
        }
        let mut tried = self.shared.tried.lock().unwrap_or_else(PoisonError::into_inner);
        if tried.is_some_and(|tried| tried.elapsed() < AGAIN) {
            return false;
        }
        let found = AuditLog::open(&self.shared.root).and_then(|log| {
            log.prepare_for_loss()?;
            log.reserve(room)
        });
        *tried = found.is_err().then(Instant::now);
        match &found {
            Ok(()) => {
                self.shared.room.store(room, Ordering::Relaxed);
                self.shared.good.store(true, Ordering::Release);
            }
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

fn write_all(shared: &Shared, waiting: &Receiver<(AuditRecord, u64)>) {
    let mut any = false;
    while let Ok(first) = waiting.recv() {
        let mut bytes = 0;
        let records = std::iter::once(first).chain(waiting.try_iter().take(WAITING));
        let records: Vec<AuditRecord> = records.map(|(record, length)| (bytes += length, record).1).collect();
        let count = records.len() as u64;
        shared.keep_lost(0);
        // The log is closed by then: what is lost is counted under its lock.
        let written = AuditLog::open(&shared.root).and_then(|mut log| {
            log.append(&records)?;
            Ok(log.reserve(shared.room.load(Ordering::Relaxed)))
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
                shared.keep_lost(count);
                shared.good.store(false, Ordering::Release);
                tracing::error!(error = chain(&error), lost = count, "the audit log cannot be written");
            }
        }
        shared.leave(bytes);
    }
    shared.keep_lost(0);
    if any
        && settings().signing.is_some()
        && let Err(error) = AuditLog::open(&shared.root).and_then(|mut log| log.append_last([]))
    {
        tracing::error!(error = chain(&error), "the audit log cannot be written");
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt as _;

    use super::*;
    use crate::audit::{LOG, verify};

    fn recorder(at: &tempfile::TempDir) -> Recorder {
        Recorder::new(Root::open(at.path()).unwrap(), String::new(), Login::default())
    }

    fn of(path: String) -> AuditRecord {
        AuditRecord { action: "publish".into(), path, ..AuditRecord::default() }
    }

    #[test]
    fn h30_no_more_waits_than_what_room_was_taken_for() {
        let at = tempfile::tempdir().unwrap();
        let recorder = recorder(&at);
        assert!(recorder.ready(1000));
        let room = std::fs::metadata(at.path().join(LOG)).unwrap().blocks() * 512;
        let root = Root::open(at.path()).unwrap();
        // Nothing can be written as long as somebody else has the log.
        let held = AuditLog::open(&root).unwrap();
        let line = of("\\xff".repeat(PATH_MAX));
        let lines = 100;
        assert!(line.line_bytes() <= CLOSE_BYTES && CLOSE_BYTES < line.line_bytes() + (3 << 10));
        let sent = AtomicU64::new(0);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for _ in 0..lines {
                    recorder.record("", line.clone());
                    sent.fetch_add(1, Ordering::Relaxed);
                }
            });
            std::thread::sleep(Duration::from_millis(300));
            let waiting = sent.load(Ordering::Relaxed) * line.line_bytes();
            assert!(waiting > 0 && waiting <= WAITING_BYTES, "{waiting}");
            assert!(room >= WAITING_BYTES + 1000 * CLOSE_BYTES, "{room}");
            drop(held);
        });
        drop(recorder);
        assert_eq!(verify(&root).unwrap().lines, lines);
    }

    #[test]
    fn h30_lines_that_were_lost_are_told_by_whoever_writes_the_next_one() {
        let at = tempfile::tempdir().unwrap();
        let (root, path) = (Root::open(at.path()).unwrap(), at.path().join(LOG));
        AuditLog::open(&root).unwrap().append(&[of("one".into())]).unwrap();
        let whole = std::fs::read_to_string(&path).unwrap();
        for lost in [2, 3] {
            let session = recorder(&at);
            std::fs::write(&path, &whole).unwrap();
            assert!(session.ready(0));
            std::fs::write(&path, whole.replace("one", "two")).unwrap();
            (0..lost).for_each(|number| session.record("", of(format!("lost-{number}"))));
            drop(session);
        }
        std::fs::write(&path, &whole).unwrap();
        for name in ["next", "last"] {
            let session = recorder(&at);
            assert!(session.ready(0));
            session.record("", of(name.to_owned()));
            drop(session);
        }
        verify(&root).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 4, "{text}");
        assert!(lines[1].contains("5 records before this one could not be written"), "{text}");
        assert!(lines[2].contains("next") && lines[3].contains("last"), "{text}");
    }
}
