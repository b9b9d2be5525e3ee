//! `lockstep audit`: the record of what was published, and of who came.

use std::path::Path;

use clap::{Args, Subcommand};

use super::{Failure, output, shown};
use crate::audit::event::{Event, Query};
use crate::audit::{self, Outcome};
use crate::error::{Escaped, Exit};
use crate::root::Root;

mod export;
pub(super) mod place;
mod show;
mod verify;
mod when;

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Check that no line was changed, removed or put in
    ///
    /// Each line carries the hash of the one before it. The last hash is printed: keep it elsewhere, and compare (--head), to
    /// notice even a log that was written anew as a whole. Where heads are signed, --allowed-signers or --host-key says up to
    /// which line the log is as it was signed.
    Verify(verify::Verify),
    /// Print the record: when, what was done to which path, what it got, who did it, from where
    ///
    /// Then the record is checked as by 'audit verify'; the exit code is 1 when it was tampered with.
    Show(show::Show),
    /// Hand lines on: as CEF to a collector of events, as a table, or as they are
    ///
    /// The log is checked before anything is written. Where it does not fit its lines are written all the same, since somebody
    /// has to look at them; it is said on standard error, and the exit code is 1.
    Export(export::Export),
}

/// Which lines.
#[derive(Debug, Args)]
struct Wanted {
    /// Not before this time: 2026-01-31, 2026-01-31T06:59:02Z (without a zone: UTC), or so long ago, as '90m', '12h', '7d'
    #[arg(long, value_name = "TIME", value_parser = when::time)]
    since: Option<when::Time>,
    /// Before this time
    #[arg(long, value_name = "TIME", value_parser = when::time)]
    until: Option<when::Time>,
    /// By whom: a part of the name, the key's fingerprint, the certificate's id or the address
    #[arg(long, value_name = "WHO")]
    actor: Option<String>,
    /// What was done: publish, remove, trash, metadata, repair, quarantine, refuse, intent, check, login, session, connection,
    /// configuration, gap, head, rotate, prune; may be given several times
    #[arg(long, value_name = "ACTION", value_parser = action)]
    action: Vec<String>,
    /// Only this path, written as it is printed, and what lies below it
    #[arg(long, value_name = "PATH")]
    path: Option<String>,
    /// What came of it
    #[arg(long, value_enum)]
    result: Option<Came>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Came {
    /// Done, or good
    Success,
    /// Refused, not done, or bad
    Failure,
}

const ACTIONS: [&str; 17] = [
    "publish",
    "remove",
    "trash",
    "metadata",
    "repair",
    "quarantine",
    "refuse",
    "intent",
    "check",
    "login",
    "session",
    "connection",
    "configuration",
    "gap",
    "head",
    "rotate",
    "prune",
];

fn action(text: &str) -> Result<String, String> {
    match ACTIONS.contains(&text) {
        true => Ok(text.to_owned()),
        false => Err(format!("there is no such action; those that there are: {}", ACTIONS.join(", "))),
    }
}

impl Wanted {
    fn query(&self) -> Query {
        Query {
            since: self.since.map(|time| time.0),
            until: self.until.map(|time| time.0),
            actor: self.actor.clone(),
            actions: self.action.clone(),
            path: self.path.clone(),
            result: self.result.map(|came| match came {
                Came::Success => Outcome::Success,
                Came::Failure => Outcome::Failure,
            }),
        }
    }
}

impl Command {
    pub(super) fn run(self) -> Result<Exit, Failure> {
        match self {
            Command::Verify(verify) => verify.run(),
            Command::Show(show) => show.run(),
            Command::Export(export) => export.run(),
        }
    }
}

/// A log that is not there proves nothing.
fn verified(directory: &Path) -> Result<audit::Verified, Failure> {
    let verified = audit::inspect(&Root::open(directory)?, &mut |_, _| {})?;
    if verified.head.lines > 0 {
        return Ok(verified);
    }
    let message = "has no audit log: nothing was published there, or all of it was removed; check the path";
    Err(Failure::bad_data(format!("'{}' {message}", shown(directory))))
}
