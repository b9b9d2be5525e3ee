//! Hashes a large file at the other end while it is still being sent: what the server has acknowledged is read there and
//! goes into the hash, so that the proof is there soon after the last byte.

use std::sync::{Arc, MutexGuard};

use crossbeam_channel::{Receiver, Sender, unbounded};

use super::Lanes;
use super::prove::{Answer, Found, SharedShell, Unproven, prove};
use super::shell::Spare;
use crate::endpoint::Error;
use crate::manifest::Digest;

/// Smaller files are hashed when they are complete, while the next are sent: that takes less of the machine there, and
/// for the last of them not long.
pub(super) const FOLLOW_BYTES: u64 = 128 << 20;
/// The follower is told of so many bytes at a time.
pub(super) const FOLLOW_STEP_BYTES: u64 = 16 << 20;
/// Bytes that are read at a time, in units of the command's block.
const STEP: u64 = 16;
const BLOCK: u64 = 1 << 20;

enum Step {
    Begin(Unproven),
    /// Everything before this offset is acknowledged.
    Reached(u64),
    /// All of it is there, and should have this digest.
    End(Digest, Sender<Answer>),
    Abandon,
}

/// A thread that follows one file after the other.
pub(super) struct Follower {
    steps: Sender<Step>,
}

impl Follower {
    /// Starts it. It uses the run's own command while nobody else does, else one that is started with the first file; what that cannot
    /// hash it reads back over the connection with this number.
    ///
    /// # Errors
    /// When there is no thread.
    pub(super) fn start(lanes: Arc<Lanes>, connection: usize, shared: SharedShell) -> Result<Follower, Error> {
        let (steps, waiting) = unbounded();
        let host = lanes.control().client.host().to_owned();
        std::thread::Builder::new()
            .name("follow".to_owned())
            .spawn(move || follow(&lanes, connection, &shared, &waiting))
            .map_err(|source| Error::Io { operation: "start a thread for", path: host, source })?;
        Ok(Follower { steps })
    }

    // The thread ends after its last user.

    pub(super) fn begin(&self, file: Unproven) {
        let _ = self.steps.send(Step::Begin(file));
    }

    pub(super) fn reached(&self, offset: u64) {
        let _ = self.steps.send(Step::Reached(offset));
    }

    /// The digest is sent to `answer`. One that is not as announced is confirmed in the ordinary way first.
    pub(super) fn end(&self, announced: Digest, answer: &Sender<Answer>) {
        let _ = self.steps.send(Step::End(announced, answer.clone()));
    }

    pub(super) fn abandon(&self) {
        let _ = self.steps.send(Step::Abandon);
    }
}

fn follow(lanes: &Lanes, connection: usize, shared: &SharedShell, steps: &Receiver<Step>) {
    let mut own = Spare::new(None, Arc::clone(&lanes.remote), 0);
    // Held from the beginning of a file to its end: its job is one of the command's.
    let mut held: Option<MutexGuard<'_, Spare>> = None;
    let mut current: Option<Unproven> = None;
    // Blocks that were asked for; `None` while the command does not follow.
    let mut asked: Option<u64> = None;
    for step in steps {
        if matches!(step, Step::Begin(_)) {
            held = shared.try_lock().ok();
        }
        let command = held.as_deref_mut().unwrap_or(&mut own);
        match step {
            Step::Begin(file) => {
                let begun = command.running().is_some_and(|shell| shell.follow(&file.path).is_ok());
                asked = begun.then_some(0);
                current = Some(file);
            }
            Step::Reached(offset) => {
                if let (Some(from), Some(shell)) = (asked, command.running())
                    && offset / BLOCK >= from + STEP
                {
                    let count = offset / BLOCK - from;
                    asked = shell.follow_on(from, count).is_ok().then_some(from + count);
                }
            }
            Step::End(announced, answer) => {
                let Some(file) = current.take() else { continue };
                let found = match (asked.take(), command.running()) {
                    (Some(from), Some(shell)) => {
                        let rest = file.size.div_ceil(BLOCK) - from;
                        shell.follow_on(from, rest).and_then(|()| shell.followed()).ok().flatten()
                    }
                    _ => None,
                };
                let proven = match found.filter(|found| *found == announced) {
                    Some(digest) => Ok(vec![(file.id, Ok(Found { digest, granted: false }))]),
                    None => prove(command, &|| lanes.spread(connection), vec![file]),
                };
                held = None;
                // Whoever asked may have gone.
                let _ = answer.send(proven);
            }
            Step::Abandon => {
                current = None;
                if let (Some(_), Some(shell)) = (asked.take(), command.running()) {
                    let _ = shell.followed();
                }
                held = None;
            }
        }
    }
}
