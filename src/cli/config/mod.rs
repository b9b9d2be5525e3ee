//! `lockstep config`: what the configuration means, and whether it can work here.

use std::path::{Path, PathBuf};

use clap::Subcommand;
use serde_json::json;

use super::finding::{Finding, Level, counts, table, worst};
use super::transfer::{config_file, load_config};
use super::{Failure, login, output, remote};
use crate::config::Config;
use crate::error::{Exit, counted, shown};

mod connect;
mod jobs;
mod services;
mod show;

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Check all of the configuration that can be known without starting anything
    ///
    /// Beside what makes a configuration wrong by itself (unknown keys, globs, names that lead nowhere) it is looked at what
    /// is there on this machine, as the user who runs the command: sources, targets, keys, known hosts, programs, state.
    /// Nothing is changed. With --connect each target is logged in to.
    ///
    /// Exit codes: 0 it can work (there may be warnings), 2 it cannot, 3 a target was not trusted or let nobody in, 4 another
    /// target cannot be used.
    Check(Check),
    /// Print the configuration as it is understood, with what stands in for what it leaves out
    Show(Show),
}

#[derive(Debug, clap::Args)]
pub(super) struct Check {
    /// The configuration [default: $LOCKSTEP_CONFIG, or /etc/lockstep/config.toml]
    file: Option<PathBuf>,
    /// Log in to each target, and to sources of other machines; where a target was used before, its lock is taken for a moment
    #[arg(long)]
    connect: bool,
    /// Warnings count as errors
    #[arg(long)]
    strict: bool,
    /// Tell what is well too
    #[arg(short, long)]
    verbose: bool,
    /// One JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    reach: remote::Reach,
    #[command(flatten)]
    ssh: login::Ssh,
}

#[derive(Debug, clap::Args)]
pub(super) struct Show {
    /// The configuration [default: $LOCKSTEP_CONFIG, or /etc/lockstep/config.toml]
    file: Option<PathBuf>,
    /// JSON instead of TOML
    #[arg(long)]
    json: bool,
}

impl Command {
    pub(super) fn run(self) -> Result<Exit, Failure> {
        match self {
            Command::Check(check) => check.run(),
            Command::Show(show) => {
                let config = load_config(show.file.as_deref())?;
                output(show::text(config, show.json)?.as_bytes())?;
                Ok(Exit::Done)
            }
        }
    }
}

impl Check {
    fn run(self) -> Result<Exit, Failure> {
        let file = config_file(self.file.as_deref());
        let config = load_config(Some(&file))?;
        let mut findings = look(&config, &self.ssh);
        let probes = if self.connect { connect::probe(&config, &self.ssh, &self.reach) } else { Vec::new() };
        findings.sort_by_key(|finding| std::cmp::Reverse(finding.level));
        let exit = self.exit(worst(&findings), &probes);
        let text = if self.json {
            let object = json!({
                "format": "lockstep-config-check 1",
                "config": shown(&file).to_string(),
                "findings": findings,
                "targets": probes,
            });
            format!("{object}\n")
        } else {
            self.words(&file, &config, findings, &probes)
        };
        output(text.as_bytes())?;
        Ok(exit)
    }

    fn exit(&self, worst: Level, probes: &[connect::Probe]) -> Exit {
        match worst {
            Level::Error => Exit::Usage,
            Level::Warning if self.strict => Exit::Usage,
            _ => connect::exit(probes),
        }
    }

    fn words(&self, file: &Path, config: &Config, findings: Vec<Finding>, probes: &[connect::Probe]) -> String {
        let wrong = counts(&findings);
        let told: Vec<Finding> =
            findings.into_iter().filter(|finding| self.verbose || finding.level != Level::Ok).collect();
        let mut text = table(&told);
        text.push_str(&connect::table(probes));
        let targets: usize = config.jobs.iter().map(|job| job.targets.len()).sum();
        let jobs = counted(config.jobs.len() as u64, "job", "jobs");
        let targets = counted(targets as u64, "target", "targets");
        let users = config.serve.as_ref().map_or(0, |serve| serve.users.len());
        let server = match config.serve {
            Some(_) => format!(", a server for {}", counted(users as u64, "user", "users")),
            None => String::new(),
        };
        let verdict = if wrong.is_empty() { "nothing is wrong".to_owned() } else { wrong };
        let user = who();
        text.push_str(&format!("{}: {jobs} with {targets}{server}; {verdict}, as user {user}\n", shown(file)));
        text
    }
}

/// Who looks: what is readable and writable depends on it.
fn who() -> String {
    let uid = rustix::process::geteuid().as_raw();
    let name = uzers::get_effective_username();
    name.map_or_else(|| uid.to_string(), |name| crate::error::Escaped(name.as_encoded_bytes()).to_string())
}

/// All that can be known without connecting.
fn look(config: &Config, ssh: &login::Ssh) -> Vec<Finding> {
    let mut findings = Vec::new();
    if config.jobs.is_empty() && config.serve.is_none() && config.sftp_server.data_ports.is_none() {
        let says = "it has neither [[job]] nor [serve], so that no service has anything to do";
        findings.push(Finding::warning("configuration", says, "docs/operations.md has examples"));
    }
    findings.extend(jobs::look(config, ssh));
    findings.extend(services::look(config));
    findings
}
