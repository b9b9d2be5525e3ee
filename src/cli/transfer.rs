//! `lockstep push` and `lockstep pull`: the pipeline between a directory here and one elsewhere.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use super::display::{Display, Verbosity};
use super::{Failure, login, remote, report};
use crate::codec::CompressOptions;
use crate::config::Config;
use crate::endpoint::local::{LocalSource, LocalTarget};
use crate::endpoint::{BeginOptions, Links, ScanOptions, Source, Target};
use crate::error::Exit;
use crate::filter::FilterSpec;
use crate::plan::safety::DeleteLimit;
use crate::policy::{PolicySpec, chmod_rules, chown_rules};
use crate::sync::{self, Options};

/// Sends a directory.
#[derive(Debug, clap::Args)]
pub(super) struct Push {
    /// The directory to send; its contents become those of the target
    #[arg(value_name = "SRC")]
    source: PathBuf,
    /// Where to: [USER@]HOST:DIR, or a directory of this machine
    #[arg(value_name = "[USER@]HOST:DEST")]
    target: String,
    #[command(flatten)]
    how: How,
}

/// Fetches a directory.
#[derive(Debug, clap::Args)]
pub(super) struct Pull {
    /// Where from: [USER@]HOST:DIR, or a directory of this machine
    #[arg(value_name = "[USER@]HOST:SRC")]
    source: String,
    /// The directory that is to hold the same
    #[arg(value_name = "DEST")]
    target: PathBuf,
    #[command(flatten)]
    how: How,
}

#[derive(Debug, clap::Args)]
struct How {
    /// Show what would be done; change nothing
    #[arg(short = 'n', long)]
    dry_run: bool,
    /// Say what is chosen and why
    #[arg(short, long, conflicts_with = "quiet")]
    verbose: bool,
    /// Say nothing but errors
    #[arg(short, long)]
    quiet: bool,
    /// One JSON object a line on standard output
    #[arg(long)]
    json: bool,
    /// A line for each path that changes, as rsync writes it
    #[arg(short, long)]
    itemize_changes: bool,
    /// Remove at the target what the source does not have
    #[arg(long)]
    delete: bool,
    /// Refuse to remove more than this: a number of paths, or a part of the target (10%)
    #[arg(long, value_name = "N|N%")]
    max_delete: Option<DeleteLimit>,
    /// Leave out what matches, as in gitignore(5); may be given several times
    #[arg(long, value_name = "GLOB")]
    exclude: Vec<String>,
    /// Take part all the same, whatever --exclude says
    #[arg(long, value_name = "GLOB")]
    include: Vec<String>,
    /// Only the paths that this file lists, one a line
    #[arg(long, value_name = "FILE")]
    files_from: Option<PathBuf>,
    /// Hash every file, whatever its size and time say
    #[arg(short, long)]
    checksum: bool,
    /// Symbolic links: safe (those that stay in the tree), all, skip, refuse
    #[arg(long, default_value = "safe", value_parser = parse_links)]
    links: Links,
    /// Modes of what arrives, as rsync's --chmod takes them (D755,F644 or go-rwx)
    #[arg(long, value_name = "MODES")]
    chmod: Option<String>,
    /// Owner and group of what arrives
    #[arg(long, value_name = "USER:GROUP")]
    chown: Option<String>,
    /// A file of [[rule]] tables with owner and permissions of what arrives
    #[arg(long, value_name = "FILE")]
    policy_file: Option<PathBuf>,
    /// The configuration that --policy names a policy of
    #[arg(long, value_name = "FILE", requires = "policy")]
    config: Option<PathBuf>,
    /// A named policy of the configuration: owner and permissions of what arrives
    #[arg(long, value_name = "NAME", requires = "config", conflicts_with = "policy_file")]
    policy: Option<String>,
    /// Publish directories that match whole or not at all, also where they are there already (checkpoint-*/)
    #[arg(long, value_name = "GLOB")]
    unit: Vec<String>,
    /// Start although the target seems to lack the room (sparse files, a file system that compresses)
    #[arg(long)]
    ignore_free_space: bool,
    /// Hash again what lies on the target's disk before it is published
    #[arg(long)]
    verify_disk: bool,
    /// Wait so long for another run on the same target, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 0)]
    wait: u64,
    /// Connections, and files in work at once
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=64))]
    transfers: u8,
    /// How often a file is sent again that changed or arrived damaged
    #[arg(long, value_name = "N", default_value_t = 2)]
    retries: u32,
    /// Do not compress
    #[arg(long)]
    no_compress: bool,
    /// Compress with this zstd level (-7 to 19) instead of the one that suits the link
    #[arg(long, value_name = "LEVEL", allow_negative_numbers = true, value_parser = clap::value_parser!(i32).range(-7..=19))]
    compress_level: Option<i32>,
    #[command(flatten)]
    reach: remote::Reach,
    #[command(flatten)]
    ssh: login::Ssh,
}

fn parse_links(text: &str) -> Result<Links, String> {
    match text {
        "safe" => Ok(Links::Safe),
        "all" => Ok(Links::All),
        "skip" => Ok(Links::Skip),
        "refuse" => Ok(Links::Refuse),
        _ => Err("it is one of safe, all, skip, refuse".into()),
    }
}

/// `user@host` of whoever runs this, for locks and the audit log.
pub(super) fn actor() -> String {
    let user = uzers::get_current_username()
        .map_or_else(|| rustix::process::getuid().as_raw().to_string(), |name| name.to_string_lossy().into_owned());
    format!("{user}@{}", rustix::system::uname().nodename().to_string_lossy())
}

/// Reads a file of `[[rule]]` tables; none is no rule.
pub(super) fn read_policy(file: Option<&Path>) -> Result<PolicySpec, Failure> {
    let Some(file) = file else { return Ok(PolicySpec::default()) };
    let text = std::fs::read_to_string(file).map_err(Failure::io("reading", file))?;
    toml::from_str(&text).map_err(|error| Failure::usage(format!("{}: {error}", super::shown(file))))
}

/// Where digests of sources are kept between runs.
fn state_directory() -> Option<PathBuf> {
    let state = std::env::var_os("XDG_STATE_HOME").map(PathBuf::from).filter(|path| path.is_absolute());
    state.or_else(|| Some(std::env::home_dir()?.join(".local/state"))).map(|path| path.join("lockstep"))
}

impl Push {
    pub(super) fn run(self) -> Result<Exit, Failure> {
        let mut display = self.how.display();
        let source = LocalSource::new(&self.source, state_directory().as_deref())?;
        let target: Box<dyn Target> = match remote::Destination::parse(&self.target)? {
            None => Box::new(LocalTarget::new(Path::new(&self.target), PolicySpec::default())),
            Some(destination) => {
                let How { ssh, reach, transfers, .. } = &self.how;
                remote::target(&destination, ssh, reach, (*transfers).into(), self.how.compress(), &display)?
            }
        };
        self.how.run(&source, &*target, true, &mut display)
    }
}

impl Pull {
    pub(super) fn run(self) -> Result<Exit, Failure> {
        let mut display = self.how.display();
        let source: Box<dyn Source> = match remote::Destination::parse(&self.source)? {
            None => Box::new(LocalSource::new(Path::new(&self.source), state_directory().as_deref())?),
            Some(destination) => {
                let How { ssh, reach, transfers, .. } = &self.how;
                remote::source(&destination, ssh, reach, (*transfers).into(), self.how.compress(), &display)?
            }
        };
        let target = LocalTarget::new(&self.target, PolicySpec::default());
        self.how.run(&*source, &target, false, &mut display)
    }
}

impl How {
    fn display(&self) -> Display {
        let verbosity = match (self.quiet, self.verbose) {
            (true, _) => Verbosity::Quiet,
            (_, true) => Verbosity::Verbose,
            _ => Verbosity::Normal,
        };
        Display::new(verbosity, self.json)
    }

    fn compress(&self) -> CompressOptions {
        CompressOptions { level: self.compress_level, enabled: !self.no_compress }
    }

    fn options(&self, from: &str) -> Result<Options, Failure> {
        let only = match &self.files_from {
            None => None,
            Some(file) => {
                let text = std::fs::read(file).map_err(Failure::io("reading", file))?;
                let lines = text.split(|&byte| byte == b'\n').filter(|line| !line.is_empty());
                Some(lines.map(<[u8]>::to_vec).collect())
            }
        };
        let included = self.include.iter().map(|glob| format!("!{glob}"));
        let filter = FilterSpec { rules: self.exclude.iter().cloned().chain(included).collect(), only };
        let mut policy = match (&self.config, &self.policy) {
            (Some(file), Some(name)) => {
                let named = Config::load(file).and_then(|config| config.policy(name));
                named.map_err(|error| Failure::usage(crate::error::chain(&error)))?
            }
            _ => read_policy(self.policy_file.as_deref())?,
        };
        if let Some(modes) = &self.chmod {
            policy.rules.extend(chmod_rules(modes).map_err(|error| Failure::usage(format!("--chmod: {error}")))?);
        }
        if let Some(owner) = &self.chown {
            // The last rule that matches decides alone: an owner has to stand in each rule there is.
            let wanted = chown_rules(owner);
            for rule in &mut policy.rules {
                rule.owner = wanted[0].owner.clone().or(rule.owner.take());
                rule.group = wanted[0].group.clone().or(rule.group.take());
            }
            // For what no rule matches so far.
            policy.rules.splice(0..0, wanted);
        }
        Ok(Options {
            scan: ScanOptions { filter: filter.clone(), hash_all: self.checksum, links: self.links },
            begin: BeginOptions {
                policy,
                peer: false,
                filter,
                checksum: self.checksum,
                last: Vec::new(),
                units: self.unit.clone(),
                ignore_free_space: self.ignore_free_space,
                verify_disk: self.verify_disk,
                wait_seconds: self.wait,
                dry_run: self.dry_run,
                actor: actor(),
                source: from.to_owned(),
            },
            delete: self.delete,
            max_delete: self.max_delete.unwrap_or_default(),
            workers: self.transfers.into(),
            retries: self.retries,
        })
    }

    fn run(
        &self,
        source: &dyn Source,
        target: &dyn Target,
        sending: bool,
        display: &mut Display,
    ) -> Result<Exit, Failure> {
        let (from, to) = (source.describe(), target.describe());
        let options = self.options(&from)?;
        let result = sync::run(source, target, &options, &*display, &AtomicBool::new(false))?;
        display.finish();
        let mut out = std::io::stdout().lock();
        let written = (|| {
            if self.itemize_changes {
                report::itemize(&result, self.delete, sending, &mut out)?;
            }
            if self.json {
                writeln!(out, "{}", report::summary_json(&result, &from, &to, &target.verification()))?;
            } else if !self.quiet {
                report::summary(&result, &from, &to, &target.verification(), &mut out)?;
            }
            out.flush()
        })();
        match written {
            Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => return Err(Failure::Output(error)),
            _ => {}
        }
        Ok(if result.is_complete() { Exit::Done } else { Exit::Incomplete })
    }
}
