//! `lockstep doctor`: what of this machine could hurt.

use std::path::PathBuf;

use serde_json::json;

use super::finding::{Level, counts, table, worst};
use super::transfer::{config_file, load_config};
use super::{Failure, output};
use crate::config::Config;
use crate::error::Exit;

mod machine;
mod sites;
mod watches;

/// Look for what of this machine could hurt: its kernel, limits, clock, file systems, rights and programs
///
/// With a configuration the directories of its jobs, of the daemon and of the server are looked at too. In those that are
/// written to, a directory '.lockstep-doctor-…' is made for a moment, to try what the file system can do; it is removed again.
/// Each line says how it is and what that means; the line below it what to do.
///
/// Exit codes: 0 nothing stands in the way (there may be warnings), 4 something does; with --strict also for warnings.
#[derive(Debug, clap::Args)]
pub(super) struct Doctor {
    /// The configuration [default: $LOCKSTEP_CONFIG, or /etc/lockstep/config.toml; none where that is not there]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Warnings count as errors
    #[arg(long)]
    strict: bool,
    /// One JSON object
    #[arg(long)]
    json: bool,
}

impl Doctor {
    pub(super) fn run(self) -> Result<Exit, Failure> {
        let config = self.config()?;
        let mut findings = machine::look(&config);
        findings.extend(watches::look(&config));
        findings.extend(sites::look(&config));
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

    /// One that was named has to be there.
    fn config(&self) -> Result<Config, Failure> {
        let file = config_file(self.config.as_deref());
        let named = self.config.is_some() || std::env::var_os("LOCKSTEP_CONFIG").is_some_and(|name| !name.is_empty());
        if named || file.exists() { load_config(Some(&file)) } else { Ok(Config::default()) }
    }
}
