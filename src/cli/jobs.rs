//! `lockstep jobs`: what a running daemon is to do with its jobs.

use std::path::PathBuf;

use serde_json::json;

use super::transfer::load_config;
use super::{Failure, control, output};
use crate::error::{Escaped, Exit};

#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
    /// Begin no run of a job, or of all, until it is resumed; what goes on comes to its end
    Pause(One),
    /// Go on with a job, or with all
    Resume(One),
    /// Compare everything at once, and try again what waits after a failure
    Now(One),
    /// Read the configuration anew, as SIGHUP does
    Reload(Where),
}

#[derive(Debug, clap::Args)]
pub(super) struct One {
    /// The job [default: all]
    name: Option<String>,
    #[command(flatten)]
    at: Where,
}

#[derive(Debug, clap::Args)]
pub(super) struct Where {
    /// The socket of the daemon [default: that of the configuration]
    #[arg(long, value_name = "PATH", env = "LOCKSTEP_SOCKET")]
    socket: Option<PathBuf>,
    /// The configuration that says where the daemon listens [default: $LOCKSTEP_CONFIG, or /etc/lockstep/config.toml]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

impl Where {
    pub(super) fn socket(&self) -> Result<PathBuf, Failure> {
        match &self.socket {
            Some(socket) => Ok(socket.clone()),
            None => control::socket_of(&load_config(self.config.as_deref())?),
        }
    }
}

impl Command {
    pub(super) fn run(self) -> Result<Exit, Failure> {
        let (request, name, at, done) = match self {
            Command::Pause(One { name, at }) => ("pause", name, at, "paused"),
            Command::Resume(One { name, at }) => ("resume", name, at, "resumed"),
            Command::Now(One { name, at }) => ("now", name, at, "compared now"),
            Command::Reload(at) => {
                ("reload", None, at, "asked to read its configuration anew; 'lockstep status' says whether it did")
            }
        };
        let answer = control::request(&at.socket()?, &json!({ "request": request, "job": name }))?;
        let jobs = answer["jobs"].as_array().cloned().unwrap_or_default();
        let names: Vec<String> =
            jobs.iter().filter_map(|job| Some(Escaped(job.as_str()?.as_bytes()).to_string())).collect();
        let what = if names.is_empty() { "the daemon".to_owned() } else { names.join(", ") };
        output(format!("{what}: {done}\n").as_bytes()).map(|()| Exit::Done)
    }
}
