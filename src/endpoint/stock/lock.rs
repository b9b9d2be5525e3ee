//! One run at a time on a root, with nothing but files: SFTP has no locks that end with their holder.
//!
//! The lock is `.lockstep/lock.sftp`. It is written aside and gets its name by a RENAME that refuses an existing one,
//! so that it is never there without its text (on a full disk it is, until the run that could not write it has taken it away). Its holder writes to it now and then; one that is silent for
//! [`STALE`] by the server's own clock, or whose process is known to have ended, is taken over.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use crossbeam_channel::{RecvTimeoutError, Sender, bounded};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::at;
use super::read::read_whole;
use super::session::{self, Refusal, Reply, Session, about, extended};
use crate::endpoint::Error;
use crate::error::Escaped;
use crate::manifest::Digest;
use crate::wire::sftp::{open, packet};

pub(super) const LOCK: &str = "lock.sftp";
const HEARTBEAT: Duration = Duration::from_secs(20);
/// Seconds of silence after which a lock counts as left behind.
const STALE: u32 = 900;
/// For so long counts what was found about whose the name is.
const NAMED: Duration = Duration::from_secs(2);
/// No lock's text is as long as this.
const LONG: usize = 4096;
const PAUSE: Duration = Duration::from_millis(200);

/// Locks that runs of this process hold.
static HELD: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());

fn held() -> MutexGuard<'static, BTreeSet<String>> {
    HELD.lock().unwrap_or_else(PoisonError::into_inner)
}

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
            return !held().contains(&self.token);
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
    /// Stays with the file, whatever happens to its name.
    handle: Bytes,
    text: Vec<u8>,
    token: String,
    stop: Sender<()>,
    /// What was found when it was last looked whose the name is, for whoever gives the lock up.
    named: Option<(bool, SystemTime)>,
}

enum Try {
    Taken(Vec<Reply>),
    Held(Box<Holder>, Option<u32>),
}

/// The lock that is about to be taken.
struct Attempt<'a> {
    session: &'a Session,
    path: &'a [u8],
    aside: Vec<u8>,
    text: &'a [u8],
}

impl Lock {
    /// Locks the root whose state directory is `state`, and waits up to `wait` for another run to end. `then` is asked by
    /// whoever has the lock, in the same flight: the answers come with it.
    ///
    /// # Errors
    /// [`Error::Locked`] names who has it.
    pub(super) fn take(
        session: &Arc<Session>,
        state: &[u8],
        root: String,
        actor: &str,
        wait: Duration,
        then: &[Vec<u8>],
    ) -> Result<(Lock, Vec<Reply>), Error> {
        let holder = Holder::new(actor);
        let path = at(state, LOCK);
        let aside = at(state, format!("{LOCK}.{}", holder.token));
        let text = serde_json::to_vec(&holder).map_err(|error| Error::Usage(error.to_string()))?;
        let attempt = Attempt { session, path: &path, aside, text: &text };
        // Whoever reads it as soon as it has its name finds that its holder lives.
        held().insert(holder.token.clone());
        let taken = attempt.until(root, wait, then);
        if taken.is_err() {
            held().remove(&holder.token);
        }
        let (handle, replies) = taken?;
        let stop = keep_alive(Arc::clone(session), handle.clone(), text.clone());
        Ok((Lock { session: Arc::clone(session), path, handle, text, token: holder.token, stop, named: None }, replies))
    }

    /// Where it lies.
    pub(super) fn path(&self) -> &[u8] {
        &self.path
    }

    /// SHA-256 of its text, which no other file has.
    pub(super) fn digest(&self) -> Digest {
        Digest(Sha256::digest(&self.text).into())
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

    /// Finds out whose the name is, so that to give the lock up is one request more. Nothing may be written under it any more but what
    /// belongs to giving it up.
    pub(super) fn about_to_end(&mut self) {
        // Of the clock that goes on while the machine sleeps.
        let now = SystemTime::now();
        self.named = self.is_named().ok().map(|named| (named, now));
    }

    /// Whether what has the name of the lock is the file that this holds: that is made longer by blanks, and the other has to
    /// be as long. One that happens to be is another lock that is being given up at this moment.
    fn is_named(&self) -> Result<bool, Error> {
        let digest = self.digest().0;
        let blanks = vec![b' '; LONG + usize::from(u16::from_be_bytes([digest[0], digest[1]]) % 4096)];
        let longer = session::write(&self.handle, self.text.len() as u64, &blanks);
        let replies = self.session.batch([longer, about(packet::LSTAT, &self.path)])?;
        let longer = (self.text.len() + blanks.len()) as u64;
        match replies.as_slice() {
            [Reply::Done, Reply::Attributes(found)] if found.size == Some(longer) => Ok(true),
            // Another has it; or the disk is full, or the server does not say how long a file is: its text tells.
            _ => Ok(self.check(String::new()).is_ok()),
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        let named = self.named.take().filter(|(_, then)| then.elapsed().is_ok_and(|age| age < NAMED));
        let named = named.map(|(named, _)| named).or_else(|| self.is_named().ok());
        if named == Some(true) {
            let _ = self.session.order(about(packet::REMOVE, &self.path));
        }
        let _ = self.stop.try_send(());
        held().remove(&self.token);
    }
}

fn read_holder(session: &Session, path: &[u8]) -> Result<Option<Holder>, Error> {
    let text = read_whole(session, path)?;
    Ok(text.ok().map(|text| serde_json::from_slice(&text).unwrap_or_default()))
}

/// The RENAME of SFTP, which replaces nothing.
fn rename(from: &[u8], to: &[u8]) -> Vec<u8> {
    session::request(packet::RENAME).string(from).string(to).finish()
}

impl Attempt<'_> {
    /// Tries until it has the lock, or has waited long enough.
    fn until(&self, root: String, wait: Duration, then: &[Vec<u8>]) -> Result<(Bytes, Vec<Reply>), Error> {
        let start = Instant::now();
        loop {
            let handle = self.open()?;
            match self.run(&handle, then)? {
                Try::Taken(replies) => return Ok((handle, replies)),
                Try::Held(other, silent) => {
                    self.session.all([about(packet::CLOSE, &handle), about(packet::REMOVE, &self.aside)])?;
                    if start.elapsed() >= wait {
                        return Err(Error::Locked { root, holder: other.describe(silent) });
                    }
                    std::thread::sleep(PAUSE);
                }
            }
        }
    }

    /// Makes the file beside its name.
    fn open(&self) -> Result<Bytes, Error> {
        let flags = open::WRITE | open::CREATE | open::EXCLUSIVE;
        let handle = self.session.handle(self.session.call(session::open(&self.aside, flags))?)?;
        handle.map_err(|refusal| self.session.refused("make", &self.aside, &refusal))
    }

    /// Writes it and gives it its name. What is asked for `then` counts only when it has that.
    fn run(&self, handle: &[u8], then: &[Vec<u8>]) -> Result<Try, Error> {
        let Attempt { session, path, aside, text } = self;
        let both = [session::write(handle, 0, text), rename(aside, path)];
        let mut replies = session.batch(both.into_iter().chain(then.iter().cloned()))?;
        let answers = replies.split_off(2);
        let mut results = replies.into_iter().map(|reply| session.status(reply));
        let (written, named) = (results.next().transpose()?, results.next().transpose()?);
        let (Some(written), Some(named)) = (written, named) else { return Err(session.odd()) };
        if let Err(refusal) = written {
            // Nobody else may find it without its text for longer than this takes.
            let left = if named.is_ok() { path } else { &aside[..] };
            session.all([about(packet::REMOVE, left), about(packet::CLOSE, handle)])?;
            return Err(session.refused("write", aside, &refusal));
        }
        let Err(refusal) = named else { return Ok(Try::Taken(answers)) };
        for handle in answers.iter().filter_map(|reply| if let Reply::Handle(it) = reply { Some(it) } else { None }) {
            session.forget(about(packet::CLOSE, handle))?;
        }
        self.take_over(handle, then, &refusal)
    }

    /// Another lock has the name.
    fn take_over(&self, handle: &[u8], then: &[Vec<u8>], refusal: &Refusal) -> Result<Try, Error> {
        let Attempt { session, path, aside, text } = self;
        let Some(holder) = read_holder(session, path)? else {
            return match session.stat(packet::LSTAT, path)? {
                // Released between the two requests: the next attempt finds out.
                Err(gone) if gone.is_missing() => Ok(Try::Held(Box::default(), None)),
                _ => Err(session.refused("lock", path, refusal)),
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
            session.order(rename(aside, path))?
        };
        let ours = replaced.is_ok() && read_whole(session, path)?.is_ok_and(|found| found == *text);
        Ok(if ours { Try::Taken(session.batch(then.iter().cloned())?) } else { Try::Held(Box::new(holder), silent) })
    }
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
        let _ = session.forget(about(packet::CLOSE, &handle));
    };
    // Without the thread the lock counts as left behind after a while, and is found taken over before publishing.
    let _ = std::thread::Builder::new().name("lock".to_owned()).spawn(beat);
    stop
}
