//! The command line: one file per command. Only here anything is printed, and only here errors become exit codes.

// A command line prints; the rest of the crate may not.
#![allow(clippy::print_stdout, clippy::print_stderr)]

use std::ffi::OsString;
use std::io::Write as _;
use std::path::PathBuf;

use clap::{Parser, Subcommand};

use crate::audit::AuditError;
use crate::endpoint;
use crate::error::{Exit, chain, shown};
use crate::root::RootError;

mod arguments;
mod audit;
mod check;
mod completions;
mod config;
mod connection;
mod connections;
mod control;
mod daemon;
pub mod display;
mod doctor;
mod exec;
mod finding;
mod habits;
mod history;
mod inspect;
mod job;
mod jobs;
mod journal;
mod keys;
mod login;
mod look;
mod manifest;
mod memory;
mod notify;
mod passphrase;
mod patience;
mod places;
mod policy;
mod push;
mod quickstart;
mod remote;
pub mod report;
mod serve;
mod sftp_server;
mod status;
mod stop;
mod transfer;
mod unfinished;
mod whole;

const EXIT_CODES: &str = "\
Exit codes:
  0   done, or the data is good
  1   the data is bad: something differs, is missing, is not listed or cannot be read
  2   wrong usage or configuration
  3   signature or trust: host key, authentication
  4   incomplete: some paths or targets failed
  5   input or output error
  75  try again: the target is in use, or the connection was lost
  130 stopped by Ctrl-C (143 by SIGTERM, 129 by SIGHUP); the same command goes on from there
Anything but 0 means: do not rely on the data.";

/// Keeps datasets and checkpoints in step between training servers, and proves that what arrived is what was sent.
#[derive(Debug, Parser)]
#[command(name = "lockstep", version, after_help = EXIT_CODES, subcommand_required = true, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

// To add a command: a file with a `clap::Args` (or `Subcommand`) that has `fn run(self) -> Result<Exit, Failure>`, a
// variant here, a line in `Command::run`.
#[derive(Debug, Subcommand)]
enum Command {
    // What these say of themselves is longer than a line, and stands with their options.
    Push(push::Push),
    Pull(push::Pull),
    Check(check::Check),
    Exec(exec::Exec),
    Daemon(daemon::Daemon),
    Status(status::Status),
    History(history::History),
    /// Pause, resume and hurry the jobs of a running daemon
    #[command(subcommand)]
    Jobs(jobs::Command),
    Serve(serve::Serve),
    SftpServer(sftp_server::SftpServer),
    #[command(hide = true)]
    ServeConnection(connection::ServeConnection),
    #[command(hide = true)]
    LookUpNames(connection::LookUpNames),
    #[command(hide = true)]
    HandOverConnections(connection::HandOverConnections),
    #[command(hide = true)]
    TryConfinement(connection::TryConfinement),
    /// List what a directory holds with its SHA-256, and check a directory against such a list
    #[command(subcommand)]
    Manifest(manifest::Command),
    /// Say which owner and permissions a path gets, and why
    #[command(subcommand)]
    Policy(policy::Command),
    /// Make a key, have it accepted by another server, and see which keys that server has
    #[command(subcommand)]
    Keys(keys::Command),
    /// Show and check the record of what was published
    #[command(subcommand)]
    Audit(audit::Command),
    Inspect(inspect::Inspect),
    /// Check the configuration, and show what it means
    #[command(subcommand)]
    Config(config::Command),
    Doctor(doctor::Doctor),
    Quickstart(quickstart::Quickstart),
    /// Print a completion script for a shell
    Completions(completions::Completions),
    /// Print the manual page, or write those of all commands to a directory
    Man(completions::Man),
}

impl Command {
    fn run(self) -> Result<Exit, Failure> {
        match self {
            Command::Push(command) => command.run(),
            Command::Pull(command) => command.run(),
            Command::Check(command) => command.run(),
            Command::Exec(command) => command.run(),
            Command::Daemon(command) => command.run(),
            Command::Status(command) => command.run(),
            Command::History(command) => command.run(),
            Command::Jobs(command) => command.run(),
            Command::Serve(command) => command.run(),
            Command::SftpServer(command) => command.run(),
            Command::ServeConnection(command) => command.run(),
            Command::LookUpNames(command) => command.run(),
            Command::HandOverConnections(command) => command.run(),
            Command::TryConfinement(command) => command.run(),
            Command::Manifest(command) => command.run(),
            Command::Policy(command) => command.run(),
            Command::Keys(command) => command.run(),
            Command::Audit(command) => command.run(),
            Command::Inspect(command) => command.run(),
            Command::Config(command) => command.run(),
            Command::Doctor(command) => command.run(),
            Command::Quickstart(command) => command.run(),
            Command::Completions(command) => command.run(),
            Command::Man(command) => command.run(),
        }
    }
}

/// Why a command ended early.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(transparent)]
    Endpoint(#[from] endpoint::Error),
    #[error(transparent)]
    Root(#[from] RootError),
    #[error(transparent)]
    Audit(#[from] AuditError),
    #[error("cannot {operation} '{}'", shown(path))]
    Io { operation: &'static str, path: PathBuf, source: std::io::Error },
    #[error("cannot write to standard output")]
    Output(#[source] std::io::Error),
    /// What is to be said is complete.
    #[error("{message}")]
    Plain { exit: Exit, message: String },
}

impl From<crate::daemon::Trouble> for Failure {
    fn from(trouble: crate::daemon::Trouble) -> Failure {
        Failure::Plain { exit: trouble.exit, message: trouble.message }
    }
}

impl Failure {
    fn plain(exit: Exit, error: &dyn std::error::Error) -> Failure {
        Failure::Plain { exit, message: chain(error) }
    }

    fn usage(message: impl Into<String>) -> Failure {
        Failure::Plain { exit: Exit::Usage, message: message.into() }
    }

    fn bad_data(message: impl Into<String>) -> Failure {
        Failure::Plain { exit: Exit::BadData, message: message.into() }
    }

    /// For `map_err`: the operation is a verb, as in "cannot read 'x': No such file or directory".
    fn io(operation: &'static str, path: &std::path::Path) -> impl FnOnce(std::io::Error) -> Failure {
        let path = path.to_owned();
        move |source| Failure::Io { operation, path, source }
    }

    fn exit(&self) -> Exit {
        match self {
            Failure::Endpoint(error) => error.exit(),
            Failure::Audit(AuditError::Broken { .. }) => Exit::BadData,
            Failure::Root(_) | Failure::Audit(_) | Failure::Io { .. } | Failure::Output(_) => Exit::Io,
            Failure::Plain { exit, .. } => *exit,
        }
    }
}

/// Writes data to standard output. A reader that has seen enough (`| head`) is no failure.
fn output(data: &[u8]) -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    match out.write_all(data).and_then(|()| out.flush()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(Failure::Output(error)),
        _ => Ok(()),
    }
}

/// Runs the command that `arguments` (the program's name first) ask for, and says what went wrong.
pub fn run(arguments: impl IntoIterator<Item = OsString>) -> Exit {
    let arguments: Vec<OsString> = arguments.into_iter().collect();
    if let Some(connection) = connection::ServeConnection::started(&arguments) {
        return ended(connection.run());
    }
    let of_a_transfer = arguments.get(1).is_some_and(|command| command == "push" || command == "pull");
    let cli = match Cli::try_parse_from(arguments) {
        Ok(cli) => cli,
        Err(error) if error.use_stderr() => {
            if of_a_transfer && let Some(hint) = habits::hint(&error) {
                eprintln!("lockstep: {hint}");
                return Exit::Usage;
            }
            let text = error.render().to_string();
            match text.strip_prefix("error: ") {
                Some(text) => eprint!("lockstep: {text}"),
                None => eprint!("{text}"),
            }
            return Exit::Usage;
        }
        Err(help) => {
            let _ = help.print();
            return Exit::Done;
        }
    };
    ended(cli.command.run())
}

fn ended(result: Result<Exit, Failure>) -> Exit {
    result.unwrap_or_else(|failure| {
        eprintln!("lockstep: {}", chain(&failure));
        failure.exit()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    #[test]
    fn the_definition_of_the_command_line_is_sound() {
        Cli::command().debug_assert();
    }
}
