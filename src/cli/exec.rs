//! `lockstep exec`: a command that is started only on data that was found to be good.

use std::ffi::OsString;
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};

use clap::Args;

use super::check::{self, CheckOptions};
use super::{Failure, shown};
use crate::error::{Exit, in_words};
use crate::staging::hold::Hold;

/// Check a directory, and start a command only when it is good
///
/// The command takes the place of lockstep: signals reach it, and its exit code is what the caller sees. When the data is not
/// good nothing is started, and the exit code is that of 'lockstep check'. What the check says goes to standard error.
///
/// The directory is held until the command, and whatever it started, has ended: runs on this machine that would remove it put
/// that off.
#[derive(Debug, Args)]
#[command(override_usage = "lockstep exec --check PATH [CHECK OPTIONS] -- COMMAND [ARGUMENT]...")]
pub(super) struct Exec {
    /// The directory to check
    #[arg(long = "check", value_name = "PATH", required = true)]
    path: PathBuf,
    /// The command and its arguments
    #[arg(last = true, required = true, value_name = "COMMAND")]
    command: Vec<OsString>,
    #[command(flatten)]
    options: CheckOptions,
}

impl Exec {
    pub(super) fn run(self) -> Result<Exit, Failure> {
        let hold = check::hold(&self.path);
        let meant = || std::fs::metadata(&self.path).ok().map(|found| (found.dev(), found.ino()));
        let before = meant();
        let verdict = self.options.run(&self.path, true)?;
        let (Exit::Done, Some((program, arguments))) = (verdict, self.command.split_first()) else {
            return Ok(if verdict == Exit::Done { Exit::Usage } else { verdict });
        };
        if meant() != before {
            // RACE: the command finds out what the path means once more.
            return Err(Failure::Plain {
                exit: Exit::TryAgain,
                message: format!(
                    "'{}' means another directory than the one that was checked, as a link does that was turned meanwhile; run again",
                    shown(&self.path)
                ),
            });
        }
        if let Some(Err(error)) = hold.map(Hold::pass_on) {
            eprintln!("lockstep: note: '{}' is not held any more: {}", shown(&self.path), in_words(&error));
        }
        // It comes back only where the command could not be started.
        let error = std::process::Command::new(program).args(arguments).exec();
        Err(Failure::usage(format!(
            "the data is good, but '{}' cannot be started: {}",
            shown(Path::new(program)),
            in_words(&error)
        )))
    }
}
