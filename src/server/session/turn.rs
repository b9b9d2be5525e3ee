//! Whose turn it is: of the sessions confined to one root, one at a time makes a link or gives something another name.

use std::fs::File;
use std::io;

use rustix::fs::{FlockOperation, OFlags, flock};

use super::Failed;
use crate::path::RelPath;
use crate::root::{Follow, Root};

const STATE: &str = ".lockstep";
const TURN: &str = ".lockstep/turn";

/// Held until it is dropped. What a look at the tree finds of its links stays so for as long: no other session, of whichever
/// process, adds one or moves what it lies in.
pub(super) struct Turn(File);

impl Turn {
    /// Waits for it. An flock(2), which no crash leaves behind.
    pub(super) fn take(root: &Root) -> Result<Turn, Failed> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOCTTY | OFlags::NONBLOCK;
        match root.mkdir(&RelPath::new(STATE)?, 0o700) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error.into()),
            _ => {}
        }
        let file = root.open_with(&RelPath::new(TURN)?, Follow::Never, flags, 0o600)?;
        flock(&file, FlockOperation::LockExclusive)?;
        Ok(Turn(file))
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        // A child that another thread starts at this moment has the descriptor too: closing alone would leave the lock with it.
        let _ = flock(&self.0, FlockOperation::Unlock);
    }
}
