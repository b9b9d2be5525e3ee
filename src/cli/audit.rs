//! `lockstep audit`: the record of what was published at a root.

use std::path::PathBuf;

use clap::Subcommand;

use super::{Failure, output, shown};
use crate::audit;
use crate::error::Exit;
use crate::root::Root;

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Check that no line was changed, removed or put in
    ///
    /// Each line carries the hash of the one before it. The last hash is printed: keep it elsewhere, and compare, to
    /// notice even a log that was written anew as a whole.
    Verify {
        /// The directory that is published to
        directory: PathBuf,
    },
}

impl Command {
    pub(super) fn run(self) -> Result<Exit, Failure> {
        let Command::Verify { directory } = self;
        let head = audit::verify(&Root::open(&directory)?)?;
        if head.lines == 0 {
            return Err(Failure::bad_data(format!(
                "'{}' has no audit log: nothing was published there, or all of it was removed; check the path",
                shown(&directory)
            )));
        }
        output(
            format!("{}: {} lines, unbroken; the last is {}\n", shown(&directory), head.lines, head.hash).as_bytes(),
        )?;
        Ok(Exit::Done)
    }
}
