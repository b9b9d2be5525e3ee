//! One run at a time on a root: an flock(2), which no crash leaves behind, on a file that names its holder.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustix::fs::{FlockOperation, OFlags};
use rustix::io::Errno;

use crate::error::Escaped;
use crate::path::{InvalidPath, RelPath};
use crate::root::{Follow, Root, RootError};

const LOCK: &str = "lock";
const PAUSE: Duration = Duration::from_millis(50);
/// The lock of a run over plain SFTP, and for how long it stands when its holder is silent.
const SFTP_LOCK: &str = ".lockstep/lock.sftp";
const SFTP_SILENCE: Duration = Duration::from_secs(300);
const UNKNOWN: &str = "another run";

/// Why a root was not locked.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum LockError {
    #[error("in use by {holder}")]
    Held { holder: String },
    #[error(
        "'{}' {why}, so that somebody else may have put there what this run would carry out; run it as that user, \
         where he receives the tree; else look at it, and move it out of the way or make it yours (chown -R, chmod 700)",
        Escaped(directory.as_os_str().as_encoded_bytes())
    )]
    Foreign { directory: PathBuf, why: String },
    #[error(transparent)]
    Root(#[from] RootError),
    #[error("lock '{root}'")]
    Io { root: String, source: io::Error },
    #[error(transparent)]
    Path(#[from] InvalidPath),
}

/// A root that is locked until this is dropped.
#[derive(Debug)]
pub struct RootLock {
    file: File,
    state: Root,
}

impl Drop for RootLock {
    fn drop(&mut self) {
        // A child that another thread starts at this moment has the descriptor too, until it has become another program:
        // closing alone would leave the lock with it. It cannot fail for a lock that is held.
        let _ = rustix::fs::flock(&self.file, FlockOperation::Unlock);
    }
}

impl RootLock {
    /// Locks `root` for `actor`, and waits up to `wait` for another run to end, or until `stopped`.
    ///
    /// # Errors
    /// [`LockError::Held`] names who has it.
    pub fn take(root: &Root, actor: &str, wait: Duration, stopped: &dyn Fn() -> bool) -> Result<RootLock, LockError> {
        let failed = |source| LockError::Io { root: root.shown().display().to_string(), source };
        let state = super::state::open(root)?;
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NONBLOCK;
        let mut file = state.open_with(&RelPath::new(LOCK)?, Follow::Never, flags, 0o600)?;
        let start = Instant::now();
        loop {
            match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => break,
                Err(Errno::WOULDBLOCK) if start.elapsed() < wait && !stopped() => std::thread::sleep(PAUSE),
                Err(Errno::WOULDBLOCK) => return Err(LockError::Held { holder: holder(&mut file) }),
                Err(errno) => return Err(failed(errno.into())),
            }
        }
        let text = serde_json::json!({ "actor": actor, "pid": std::process::id() }).to_string();
        // RACE: who reads before this is written sees the holder before; only a message is wrong then.
        let write = |file: &mut File| {
            file.set_len(0)?;
            file.seek(SeekFrom::Start(0))?;
            file.write_all(text.as_bytes())
        };
        write(&mut file).map_err(failed)?;
        Ok(RootLock { file, state })
    }

    /// The directory `.lockstep` of the root, as it was found to be nobody else's.
    pub fn state(&self) -> &Root {
        &self.state
    }
}

/// Who brings something to `root` over plain SFTP from another machine; such a run has a lock of its own, which stands until
/// its holder has been silent for five minutes. `None` where nobody does.
pub fn sftp_holder(root: &Root) -> Option<String> {
    let path = RelPath::new(SFTP_LOCK).ok()?;
    let found = root.stat(&path, Follow::Never).ok()?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let written = Duration::from_secs(u64::try_from(found.mtime.seconds).unwrap_or(0));
    let stands = now.saturating_sub(written) < SFTP_SILENCE;
    stands
        .then(|| root.open_read(&path, Follow::Never).map_or_else(|_| UNKNOWN.to_owned(), |mut file| holder(&mut file)))
}

fn holder(file: &mut File) -> String {
    let mut text = Vec::new();
    let _ = file.seek(SeekFrom::Start(0));
    let _ = file.take(4096).read_to_end(&mut text);
    let value: serde_json::Value = serde_json::from_slice(&text).unwrap_or_default();
    match value["actor"].as_str() {
        Some(actor) => format!("{} (process {})", Escaped(actor.as_bytes()), value["pid"]),
        None => UNKNOWN.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn h35_the_second_run_is_told_who_holds_the_root_or_waits() {
        let at = tempfile::tempdir().unwrap();
        let root = Root::open(at.path()).unwrap();
        let first = RootLock::take(&root, "ana@gpu01", Duration::ZERO, &|| false).unwrap();
        let refused = RootLock::take(&root, "bo@gpu02", Duration::ZERO, &|| false).unwrap_err();
        assert!(refused.to_string().contains("ana@gpu01"), "{refused}");
        std::thread::scope(|scope| {
            let second = scope.spawn(|| RootLock::take(&root, "bo@gpu02", Duration::from_secs(10), &|| false));
            std::thread::sleep(Duration::from_millis(100));
            drop(first);
            second.join().unwrap().unwrap();
        });
    }
}
