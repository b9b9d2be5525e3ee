//! The way into a root: it is opened, or made under a hidden name, and locked.

use std::time::Duration;

use super::circle;
use super::metadata;
use super::place::Birth;
use super::target::{LocalTarget, io};
use crate::endpoint::{BeginOptions, Error, Target as _};
use crate::monitor::Monitor;
use crate::root::Root;
use crate::staging::{LockError, RootLock};

/// So often a root is opened anew that has got its name while its lock was waited for.
const TRIES: usize = 5;

/// A root, the birth that it waits for, and the lock on it.
type Entered = (Root, Option<Birth>, Option<RootLock>);

impl LocalTarget {
    /// Opens the root and, unless it is a dry run, locks it. `None` is a dry run on nothing.
    pub(super) fn enter(&self, options: &BeginOptions, monitor: &dyn Monitor) -> Result<Option<Entered>, Error> {
        let wait = Duration::from_secs(options.wait_seconds);
        let mut tries = 0;
        loop {
            tries += 1;
            let Some((root, birth)) = self.open_root(options.dry_run || self.repair.is_some())? else {
                return Ok(None);
            };
            circle::refuse(&self.place, &options.trail)?;
            if options.dry_run {
                return Ok(Some((root, birth, None)));
            }
            let taken = RootLock::take(&root, &options.actor, wait, &|| monitor.stopped());
            let taken = taken.map_err(|error| match error {
                LockError::Held { holder } => Error::Locked { root: self.describe(), holder },
                LockError::Root(error) => io(error),
                foreign @ LockError::Foreign { .. } => {
                    Error::Refused { by: "the receiver".into(), reason: crate::error::chain(&foreign) }
                }
                other => Error::Usage(crate::error::chain(&other)),
            })?;
            // RACE: whoever had the lock may have given this directory its name meanwhile, or another one that name.
            // What is in the way all the same, as a link that leads nowhere, is told when the name is given.
            if tries == TRIES || birth.as_ref().map_or(Ok(true), |birth| birth.is_due(&root))? {
                return Ok(Some((root, birth, Some(taken))));
            }
        }
    }

    /// Opens the root, or the hidden one that will be it. `None` is a dry run on nothing.
    fn open_root(&self, dry_run: bool) -> Result<Option<(Root, Option<Birth>)>, Error> {
        match self.place.open() {
            Ok(root) => return Ok(Some((root, None))),
            Err(error) if error.kind() == std::io::ErrorKind::NotADirectory => {
                let shown = crate::error::shown(&error.path);
                return Err(Error::Usage(format!(
                    "'{shown}' cannot be a target: a file lies there, or on the way to it"
                )));
            }
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(io(error)),
            Err(_) if dry_run => return Ok(None),
            Err(_) => {}
        }
        let (root, birth) = self.place.bear()?;
        metadata::disinherit(&root)?;
        Ok(Some((root, Some(birth))))
    }
}
