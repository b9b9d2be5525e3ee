//! One run at a time on a root, with nothing but files: SFTP has no locks that end with their holder.
//!
//! The lock is `.lockstep/lock.sftp`. It is written aside and gets its name by a RENAME that refuses an existing one,
//! so that it is never there without its text. Its holder writes to it now and then; one that is silent for
//! [`STALE`] by the server's own clock, or whose process is known to have ended, is taken over.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use crossbeam_channel::{RecvTimeoutError, Sender, bounded};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::at;
use super::read::read_whole;
use super::session::{self, Reply, Session, about, extended};
use crate::endpoint::Error;
use crate::error::Escaped;
use crate::manifest::Digest;
use crate::wire::sftp::{open, packet};

const LOCK: &str = "lock.sftp";
const HEARTBEAT: Duration = Duration::from_secs(20);
/// Seconds of silence after which a lock counts as left behind.
const STALE: u32 = 300;
const PAUSE: Duration = Duration::from_millis(200);

/// Locks that runs of this process hold.
static HELD: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Holder {
    actor: String,
    /// Which machine and process numbering `pid` belongs to; empty where that is not known.
    machine: String,
    pid: u32,
    /// When the process started, in the kernel's ticks.
    started: u64,
    token: String,
}

/// When a process started, by proc(5); `None` where there is no such process.
fn start_of(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name, in parentheses, may hold anything.
    stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
}

fn machine() -> String {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok();
    let numbering = std::fs::read_link("/proc/self/ns/pid").ok();
    match (boot, numbering) {
        (Some(boot), Some(numbering)) => format!("{} {}", boot.trim(), numbering.display()),
        _ => String::new(),
    }
}

impl Holder {
    fn new(actor: &str) -> Holder {
        let pid = std::process::id();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
        // Distinct for two runs of one process, and for processes on different machines at the same moment.
        let token = format!("{now:x}-{pid:x}-{:x}", std::ptr::from_ref(&actor).addr());
        Holder { actor: actor.to_owned(), machine: machine(), pid, started: start_of(pid).unwrap_or(0), token }
    }

    /// Whether its process is known to have ended, or to have given the lock up without being able to remove it.
    fn has_ended(&self) -> bool {
        if self.machine.is_empty() || self.machine != machine() {
            return false;
        }
        if self.pid == std::process::id() {
            return !HELD.lock().unwrap_or_else(PoisonError::into_inner).contains(&self.token);
        }
        let pid = i32::try_from(self.pid).ok().and_then(rustix::process::Pid::from_raw);
        let absent = |pid| rustix::process::test_kill_process(pid) == Err(rustix::io::Errno::SRCH);
        pid.is_none_or(absent) || start_of(self.pid).is_some_and(|started| started != self.started)
    }

    fn describe(&self, silent: Option<u32>) -> String {
        let who = match self.actor.as_str() {
            "" => "another run".to_owned(),
            actor => format!("{} (process {})", Escaped(actor.as_bytes()), self.pid),
        };
        match silent {
            Some(seconds) => format!(
                "{who}, heard of {seconds} s ago (a lock that is silent for {STALE} s is taken over; when its holder is \
                 known to be gone, remove .lockstep/{LOCK})"
            ),
            None => who,
        }
    }
}

/// A root that is locked until this is released or dropped.
pub(super) struct Lock {
    session: Arc<Session>,
    path: Vec<u8>,
    digest: Digest,
    token: String,
    stop: Sender<()>,
}

enum Try {
    Taken,
    Held(Box<Holder>, Option<u32>),
}

impl Lock {
    /// Locks the root whose state directory is `state`, and waits up to `wait` for another run to end.
    ///
    /// # Errors
    /// [`Error::Locked`] names who has it.
    pub(super) fn take(
        session: &Arc<Session>,
        state: &[u8],
        root: String,
        actor: &str,
        wait: Duration,
    ) -> Result<Lock, Error> {
        let holder = Holder::new(actor);
        let path = at(state, LOCK);
        let aside = at(state, format!("{LOCK}.{}", holder.token));
        let text = serde_json::to_vec(&holder).map_err(|error| Error::Usage(error.to_string()))?;
        let start = Instant::now();
        let handle = loop {
            let handle = write_aside(session, &aside, &text)?;
            match attempt(session, &path, &aside, &handle, &text)? {
                Try::Taken => break handle,
                Try::Held(other, silent) => {
                    session.all([about(packet::CLOSE, &handle), about(packet::REMOVE, &aside)])?;
                    if start.elapsed() >= wait {
                        return Err(Error::Locked { root, holder: other.describe(silent) });
                    }
                    std::thread::sleep(PAUSE);
                }
            }
        };
        HELD.lock().unwrap_or_else(PoisonError::into_inner).insert(holder.token.clone());
        let digest = Digest(Sha256::digest(&text).into());
        let stop = keep_alive(Arc::clone(session), handle, text);
        Ok(Lock { session: Arc::clone(session), path, digest, token: holder.token, stop })
    }

    /// Where it lies.
    pub(super) fn path(&self) -> &[u8] {
        &self.path
    }

    /// SHA-256 of its text, which no other file has.
    pub(super) fn digest(&self) -> Digest {
        self.digest
    }

    /// Makes sure that nobody has taken the lock over, as could happen when this machine slept.
    ///
    /// # Errors
    /// [`Error::Locked`] when somebody has.
    pub(super) fn check(&self, root: String) -> Result<(), Error> {
        let holder = read_holder(&self.session, &self.path)?.unwrap_or_default();
        if holder.token == self.token {
            return Ok(());
        }
        Err(Error::Locked { root, holder: holder.describe(None) })
    }

    /// The directory of the lock has another name now.
    pub(super) fn moved(&mut self, state: &[u8]) {
        self.path = at(state, LOCK);
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        let _ = self.stop.try_send(());
        if self.check(String::new()).is_ok() {
            let _ = self.session.order(about(packet::REMOVE, &self.path));
        }
        HELD.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.token);
    }
}

fn write_aside(session: &Session, path: &[u8], text: &[u8]) -> Result<Bytes, Error> {
    let flags = open::WRITE | open::CREATE | open::EXCLUSIVE;
    let handle = match session.call(session::open(path, flags))? {
        Reply::Handle(handle) => handle,
        Reply::Refused(refusal) => return Err(session.refused("make", path, &refusal)),
        _ => return Err(session.odd()),
    };
    match session.order(session::write(&handle, 0, text))? {
        Ok(()) => Ok(handle),
        Err(refusal) => Err(session.refused("write", path, &refusal)),
    }
}

fn read_holder(session: &Session, path: &[u8]) -> Result<Option<Holder>, Error> {
    let text = read_whole(session, path)?;
    Ok(text.ok().map(|text| serde_json::from_slice(&text).unwrap_or_default()))
}

fn attempt(session: &Session, path: &[u8], aside: &[u8], handle: &[u8], text: &[u8]) -> Result<Try, Error> {
    let rename = session::request(packet::RENAME).string(aside).string(path).finish();
    let Err(refusal) = session.order(rename)? else { return Ok(Try::Taken) };
    let Some(holder) = read_holder(session, path)? else {
        return match session.stat(packet::LSTAT, path)? {
            // Released between the two requests: the next attempt finds out.
            Err(gone) if gone.is_missing() => Ok(Try::Held(Box::default(), None)),
            _ => Err(session.refused("lock", path, &refusal)),
        };
    };
    // Both times are of the server's clock.
    let written = |reply| match reply {
        Reply::Attributes(attributes) => attributes.times.map(|(_, modified)| modified),
        _ => None,
    };
    let replies = session.batch([about(packet::FSTAT, handle), about(packet::LSTAT, path)])?;
    let mut times = replies.into_iter().map(written);
    let silent = match (times.next().flatten(), times.next().flatten()) {
        (Some(now), Some(then)) => Some(now.saturating_sub(then)),
        _ => None,
    };
    if !holder.has_ended() && silent.is_none_or(|silent| silent < STALE) {
        return Ok(Try::Held(Box::new(holder), silent));
    }
    // RACE: two may take over a lock that was left behind. The later rename wins, and the other finds out now or, at the
    // latest, before it publishes.
    let replaced = if session.offers.posix_rename {
        session.order(extended("posix-rename@openssh.com", &[aside, path]))?
    } else {
        session.order(about(packet::REMOVE, path))?.ok();
        session.order(session::request(packet::RENAME).string(aside).string(path).finish())?
    };
    let ours = replaced.is_ok() && read_whole(session, path)?.is_ok_and(|found| found == text);
    Ok(if ours { Try::Taken } else { Try::Held(Box::new(holder), silent) })
}

/// Writes the same text again and again over the handle, which stays with this file whatever happens to its name.
fn keep_alive(session: Arc<Session>, handle: Bytes, text: Vec<u8>) -> Sender<()> {
    let (stop, stopped) = bounded(1);
    let beat = move || {
        while stopped.recv_timeout(HEARTBEAT) == Err(RecvTimeoutError::Timeout) {
            if session.order(session::write(&handle, 0, &text)).is_err() {
                return;
            }
        }
        let _ = session.order(about(packet::CLOSE, &handle));
    };
    // Without the thread the lock counts as left behind after a while, and is found taken over before publishing.
    let _ = std::thread::Builder::new().name("lock".to_owned()).spawn(beat);
    stop
}
