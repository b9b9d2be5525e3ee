//! `lockstep policy`: what the rules decide, where a tree differs from them, and the mending of it.

use clap::Subcommand;

use super::Failure;
use crate::error::Exit;

mod check;
mod explain;
mod rules;

pub(super) use rules::{own_file, trusted_file};

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Find what has other permissions than the rules say, and what a user or group cannot read
    ///
    /// Looks at modes, owners, groups and ACLs of everything in a directory, and for a user or group also at the
    /// directories above it, up to '/'. One line for each problem says which bit is missing where. Links are not followed.
    Check(check::Check),
    /// Give what is there the permissions that the rules say
    ///
    /// Files get execute and set-ID bits only when their content is that of the manifest. Files that have further names
    /// outside of the directory are refused: those would change too. Links are not followed.
    Apply(check::Apply),
    /// Say which mode, owner, group and ACL a path gets, and which rule decides it
    ///
    /// The path need not exist. The last rule that matches wins; where none matches, a path keeps the sender's mode
    /// without the set-user-ID, set-group-ID and sticky bits.
    Explain(explain::Explain),
}

impl Command {
    pub(super) fn run(self) -> Result<Exit, Failure> {
        match self {
            Command::Check(check) => check.run(),
            Command::Apply(apply) => apply.run(),
            Command::Explain(explain) => explain.run(),
        }
    }
}
