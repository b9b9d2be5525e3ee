//! `lockstep doctor`: what of this machine could hurt.

use std::path::PathBuf;

use serde_json::json;

use super::finding::{Finding, Level, counts, table, worst};
use super::login::Ssh;
use super::transfer::{config_file, load_config};
use super::{Failure, output};
use crate::config::Config;
use crate::error::Exit;

mod host;
mod machine;
mod sites;
mod watches;

/// Look for what of this machine could hurt: its kernel, limits, clock, file systems, rights and programs
///
/// With a configuration the directories of its jobs, of the daemon and of the server are looked at too. In those that are
/// written to, a directory '.lockstep-doctor-…' is made for a moment, to try what the file system can do; it is removed again.
/// Each line says how it is and what that means; the line below it what to do.
///
/// With --ssh a host is asked instead: what a login there would agree to (key exchange, ciphers, keys), what weak things it would do with
/// others, and whether it is known. Nobody logs in, and nothing is trusted by it.
///
/// Exit codes: 0 nothing stands in the way (there may be warnings), 4 something does; with --strict also for warnings.
#[derive(Debug, clap::Args)]
pub(super) struct Doctor {
    /// The configuration [default: $LOCKSTEP_CONFIG, or /etc/lockstep/config.toml; none where that is not there]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Look at the SSH server of this host instead
    #[arg(long = "ssh", value_name = "[USER@]HOST", conflicts_with = "config")]
    host: Option<String>,
    /// Warnings count as errors
    #[arg(long)]
    strict: bool,
    /// One JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    login: Ssh,
}

impl Doctor {
    pub(super) fn run(self) -> Result<Exit, Failure> {
        let findings = match &self.host {
            Some(host) => host::look(host, &self.login)?,
            None => self.of_this_machine()?,
        };
        let text = if self.json {
            format!("{}\n", json!({ "format": "lockstep-doctor 1", "findings": findings }))
        } else {
            let wrong = counts(&findings);
            let verdict = if wrong.is_empty() { "nothing is wrong" } else { &wrong };
            format!("{}{verdict}\n", table(&findings))
        };
        output(text.as_bytes())?;
        Ok(match worst(&findings) {
            Level::Error => Exit::Incomplete,
            Level::Warning if self.strict => Exit::Incomplete,
            _ => Exit::Done,
        })
    }

    fn of_this_machine(&self) -> Result<Vec<Finding>, Failure> {
        if let Some(option) = self.login.given() {
            return Err(Failure::usage(format!("{option} says how to reach the host of --ssh, and there is none")));
        }
        let config = self.config()?;
        let mut findings = machine::look(&config);
        findings.extend(watches::look(&config));
        findings.extend(sites::look(&config));
        Ok(findings)
    }

    /// One that was named has to be there.
    fn config(&self) -> Result<Config, Failure> {
        let file = config_file(self.config.as_deref());
        let named = self.config.is_some() || std::env::var_os("LOCKSTEP_CONFIG").is_some_and(|name| !name.is_empty());
        if named || file.exists() { load_config(Some(&file)) } else { Ok(Config::default()) }
    }
}
