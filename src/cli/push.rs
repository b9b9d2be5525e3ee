//! `lockstep push` and `lockstep pull`: the pipeline between what lies here and what lies elsewhere.

use std::ffi::OsString;

use super::arguments::{Place, route};
use super::stop::Stop;
use super::transfer::How;
use super::{Failure, job};
use crate::error::Exit;

/// Send files and directories to another server, verified, with the right permissions
///
/// One directory SRC: its contents become those of DEST, which need not be there yet.
///
/// One file SRC: DEST is the directory it goes into when it is one already or ends in a slash; otherwise DEST is the
/// file's new name, as for cp and scp.
///
/// Several SRC: each gets its own name in the directory DEST.
///
/// In the last two cases nothing else in DEST is looked at, changed or removed, --delete or not. A symbolic link that is
/// named as SRC stands for what it points to. The directory DEST (or the one above the file's new name) keeps the record
/// of what was published in .lockstep/.
///
/// A relative DEST starts at the home directory of the account there, and so does ~/. HOST:. is that directory itself.
///
/// A single NAME runs the [[job]] of that name in the configuration once, to all its targets.
#[derive(Debug, clap::Args)]
#[command(override_usage = "lockstep push [OPTIONS] SRC... [USER@]HOST:DEST\n       lockstep push [OPTIONS] NAME")]
pub(super) struct Push {
    /// What to send, then where to: [USER@]HOST:DEST or a directory of this machine; or the name of a job
    #[arg(value_name = "SRC... DEST|NAME", required = true, num_args = 1..)]
    arguments: Vec<OsString>,
    #[command(flatten)]
    how: How,
}

/// Fetch files and directories from another server
///
/// What becomes of one directory, one file or several SRC is as for push; DEST is on this machine.
#[derive(Debug, clap::Args)]
#[command(override_usage = "lockstep pull [OPTIONS] [USER@]HOST:SRC... DEST")]
pub(super) struct Pull {
    /// What to fetch, then where to
    #[arg(value_name = "[USER@]HOST:SRC... DEST", required = true, num_args = 1..)]
    arguments: Vec<OsString>,
    #[command(flatten)]
    how: How,
}

impl Push {
    pub(super) fn run(self) -> Result<Exit, Failure> {
        super::audit::place::configure_as_usual()?;
        match self.arguments.as_slice() {
            [] => Err(Failure::usage("push needs SRC and DEST, or the NAME of a job")),
            [name] => job::push(name, &self.how),
            [sources @ .., target] => {
                for source in sources {
                    Place::must_be_here(source, "push sends what lies on this machine (pull fetches)")?;
                }
                self.how.needs_no_config()?;
                transfer(sources, target, &self.how)
            }
        }
    }
}

impl Pull {
    pub(super) fn run(self) -> Result<Exit, Failure> {
        super::audit::place::configure_as_usual()?;
        match self.arguments.as_slice() {
            [sources @ .., target] if !sources.is_empty() => {
                Place::must_be_here(target, "pull fetches to this machine (push sends)")?;
                self.how.needs_no_config()?;
                self.how.fetches()?;
                transfer(sources, target, &self.how)
            }
            _ => Err(Failure::usage(
                "pull needs SRC and DEST: lockstep pull [USER@]HOST:SRC DIRECTORY ('.' is the one you are in)",
            )),
        }
    }
}

fn transfer(sources: &[OsString], target: &OsString, how: &How) -> Result<Exit, Failure> {
    let stop = Stop::on_signals()?;
    let options = how.options()?;
    let mut display = how.display(&stop);
    let route = route(sources, target, how, &options.scan, &display)?;
    how.run(&route, options, &mut display, &stop)
}
