//! What push and pull share: their options, and the way through the pipeline.

use std::io::Write as _;
use std::path::{Path, PathBuf};

use super::arguments::Route;
use super::display::{Display, Verbosity};
use super::stop::Stop;
use super::{Failure, login, remote, report};
use crate::codec::CompressOptions;
use crate::config::{Bandwidth, Config, DEFAULT_PATH, Period};
use crate::endpoint::{BeginOptions, Links, ScanOptions};
use crate::error::Exit;
use crate::filter::FilterSpec;
use crate::monitor::threads::Threads;
use crate::plan::safety::DeleteLimit;
use crate::plan::trash::USUAL_KEEP_SECONDS;
use crate::policy::{PolicySpec, chmod_rules, chown_rules};
use crate::sync::{self, Options, SyncReport};

#[derive(Debug, Clone, clap::Args)]
pub(super) struct How {
    /// Show what would be done; change nothing, read no file's content
    #[arg(short = 'n', long)]
    pub(super) dry_run: bool,
    /// Say what is chosen and why
    #[arg(short, long, overrides_with = "verbose", conflicts_with = "quiet")]
    pub(super) verbose: bool,
    /// Say nothing but errors and warnings
    #[arg(short, long)]
    pub(super) quiet: bool,
    /// One JSON object a line on standard output
    #[arg(long)]
    pub(super) json: bool,
    /// A line for each path that changes, as rsync --checksum writes it
    #[arg(short, long, overrides_with = "itemize_changes")]
    pub(super) itemize_changes: bool,
    /// Remove at the target what the source does not have. With =trash it is moved to .lockstep/trash there, and so is the old
    /// version of what is replaced
    #[arg(long, value_name = "HOW", num_args = 0..=1, require_equals = true, default_missing_value = "mirror")]
    #[arg(value_parser = parse_removal)]
    delete: Option<Removal>,
    /// With --delete=trash: how long it stays there, as '12h' or '30d'; later runs with --delete=trash clear away what is older
    /// [default: 7d]
    #[arg(long, value_name = "AGE")]
    trash_keep: Option<Period>,
    /// Refuse to remove more than this: a number of paths, or a part of the target (10%) [default: any number]
    #[arg(long, value_name = "N|N%")]
    pub(super) max_delete: Option<DeleteLimit>,
    /// Leave out what matches, as in gitignore(5); may be given several times
    #[arg(long, value_name = "GLOB")]
    pub(super) exclude: Vec<String>,
    /// Take part all the same, whatever --exclude says
    #[arg(long, value_name = "GLOB")]
    pub(super) include: Vec<String>,
    /// Only the paths that this file lists, one a line, relative to SRC
    #[arg(long, value_name = "FILE")]
    pub(super) files_from: Option<PathBuf>,
    /// Hash every file, whatever its size and time say
    #[arg(short, long)]
    checksum: bool,
    /// Send what has to be sent whole: nothing is made of what the target has, but for what only grows
    #[arg(short = 'W', long)]
    whole_file: bool,
    /// Symbolic links: safe (those that stay in the tree), all, skip, refuse
    #[arg(long, default_value = "safe", value_parser = parse_links)]
    links: Links,
    /// Modes of what arrives, as rsync's --chmod takes them (D755,F644 or go-rwx)
    #[arg(long, value_name = "MODES")]
    pub(super) chmod: Option<String>,
    /// Owner and group of what arrives, by name or number there: USER:GROUP, USER or :GROUP
    #[arg(long, value_name = "USER:GROUP")]
    pub(super) chown: Option<String>,
    /// A file of [[rule]] tables with owner and permissions of what arrives
    #[arg(long, value_name = "FILE")]
    pub(super) policy_file: Option<PathBuf>,
    /// The configuration that --policy and the NAME of a job are looked up in
    /// [default: $LOCKSTEP_CONFIG, or /etc/lockstep/config.toml]
    #[arg(long, value_name = "FILE")]
    pub(super) config: Option<PathBuf>,
    /// A named policy of the configuration: owner and permissions of what arrives
    #[arg(long, value_name = "NAME", conflicts_with = "policy_file")]
    pub(super) policy: Option<String>,
    /// Publish directories that match whole or not at all, also where they are there already (checkpoint-*/)
    #[arg(long, value_name = "GLOB")]
    pub(super) unit: Vec<String>,
    /// Files that match only ever grow: what was sent of them before is neither read nor sent again, and what is new is put at the end of
    /// what the target has (*.log)
    #[arg(long, value_name = "GLOB")]
    pub(super) append_only: Vec<String>,
    /// Start although the target seems to lack the room (sparse files, a file system that compresses)
    #[arg(long)]
    ignore_free_space: bool,
    /// Hash again what lies on the target's disk before it is published
    #[arg(long)]
    verify_disk: bool,
    /// Wait so many seconds for another run on the same target to end
    #[arg(long, value_name = "SECONDS", default_value_t = 0)]
    wait: u64,
    /// Connections, and files in work at once, 1 to 64; auto: 2, up to 8 for one large file where they bring more, and to a
    /// stock SFTP server on a machine with fewer than four cores 1
    #[arg(long, value_name = "N", default_value = "auto", value_parser = parse_transfers)]
    pub(super) transfers: Transfers,
    /// How often a file is sent again that changed or arrived damaged
    #[arg(long, value_name = "N", default_value_t = 2)]
    retries: u32,
    /// At most this much a second over the wire, as for rsync: 500K, 1.5m (of 1024), 2GB (of 1000); a plain number is
    /// KiB, and 0 no limit [default: no limit]
    #[arg(long, value_name = "RATE", value_parser = parse_rate)]
    pub(super) bwlimit: Option<Rate>,
    /// Do not compress
    #[arg(long)]
    no_compress: bool,
    /// Compress with this zstd level (-7 to 19) [default: the one that suits the link]
    #[arg(long, value_name = "LEVEL", allow_negative_numbers = true, value_parser = clap::value_parser!(i32).range(-7..=19))]
    compress_level: Option<i32>,
    #[command(flatten)]
    pub(super) reach: remote::Reach,
    #[command(flatten)]
    pub(super) ssh: login::Ssh,
    #[command(flatten)]
    habits: super::habits::Habits,
}

/// What becomes of what only the target has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Removal {
    Mirror,
    Trash,
}

fn parse_removal(text: &str) -> Result<Removal, String> {
    match text {
        "mirror" => Ok(Removal::Mirror),
        "trash" => Ok(Removal::Trash),
        _ => Err("it is mirror (remove it, as --delete alone does) or trash (move it aside)".into()),
    }
}

/// Connections at most; `None` for as many as are worth it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Transfers(pub(super) Option<u8>);

fn parse_transfers(text: &str) -> Result<Transfers, String> {
    match text.parse() {
        _ if text == "auto" => Ok(Transfers(None)),
        Ok(number @ 1..=64) => Ok(Transfers(Some(number))),
        _ => Err("it is a number from 1 to 64, or auto".into()),
    }
}

/// Connections unless told otherwise.
pub(super) const USUAL_TRANSFERS: usize = 2;
/// Connections that one large file may be spread over, unless told otherwise.
pub(super) const MOST_TRANSFERS: usize = 8;

/// Bytes a second; `None` for no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Rate(pub(super) Option<u64>);

fn parse_rate(text: &str) -> Result<Rate, String> {
    let plain = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.');
    if plain && text.parse() == Ok(0.0) {
        return Ok(Rate(None));
    }
    let rate = if plain { format!("{text}K").parse() } else { text.parse() };
    rate.map(|Bandwidth(rate)| Rate(Some(rate)))
}

/// The configuration that is meant: the one given, `LOCKSTEP_CONFIG`, or the usual one.
pub(super) fn config_file(given: Option<&Path>) -> PathBuf {
    let named = std::env::var_os("LOCKSTEP_CONFIG").filter(|value| !value.is_empty()).map(PathBuf::from);
    given.map(Path::to_owned).or(named).unwrap_or_else(|| PathBuf::from(DEFAULT_PATH))
}

pub(super) fn load_config(given: Option<&Path>) -> Result<Config, Failure> {
    Config::load(&config_file(given)).map_err(|error| Failure::usage(crate::error::chain(&error)))
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

pub(super) use crate::scan::names::actor;

/// A sender's file of `[[rule]]` tables; none is no rule.
fn read_policy(file: Option<&Path>) -> Result<PolicySpec, Failure> {
    file.map_or_else(|| Ok(PolicySpec::default()), |file| Ok(super::policy::own_file(file)?.spec))
}

/// The same of a receiver, whose rules decide: others must not have had a hand in them.
pub(super) fn receivers_policy(file: Option<&Path>) -> Result<PolicySpec, Failure> {
    file.map_or_else(|| Ok(PolicySpec::default()), |file| Ok(super::policy::trusted_file(file)?.spec))
}

/// Where digests of sources are kept between runs.
pub(super) fn state_directory() -> Option<PathBuf> {
    let state = std::env::var_os("XDG_STATE_HOME").map(PathBuf::from).filter(|path| path.is_absolute());
    state.or_else(|| Some(std::env::home_dir()?.join(".local/state"))).map(|path| path.join("lockstep"))
}

impl How {
    pub(super) fn display(&self, stop: &Stop) -> Display {
        let verbosity = match (self.quiet, self.verbose) {
            (true, _) => Verbosity::Quiet,
            (_, true) => Verbosity::Verbose,
            _ => Verbosity::Normal,
        };
        Display::new(verbosity, self.json).stopped_by(stop.flag())
    }

    /// A configuration that nothing would be looked up in is a mistake.
    pub(super) fn needs_no_config(&self) -> Result<(), Failure> {
        if self.config.is_some() && self.policy.is_none() {
            return Err(Failure::usage("--config is for --policy, or for the NAME of a job alone"));
        }
        Ok(())
    }

    /// An option that only pushes know is a mistake.
    pub(super) fn fetches(&self) -> Result<(), Failure> {
        if !self.append_only.is_empty() {
            return Err(Failure::usage("--append-only is for push: what is fetched is read by the other machine"));
        }
        Ok(())
    }

    /// An option that was given although a job says the same thing.
    pub(super) fn decided_by_a_job(&self) -> Option<&'static str> {
        let given = [
            (self.delete.is_some(), "--delete"),
            (self.trash_keep.is_some(), "--trash-keep"),
            (self.max_delete.is_some(), "--max-delete"),
            (!self.exclude.is_empty(), "--exclude"),
            (!self.include.is_empty(), "--include"),
            (self.files_from.is_some(), "--files-from"),
            (!self.unit.is_empty(), "--unit"),
            (!self.append_only.is_empty(), "--append-only"),
            (self.chmod.is_some(), "--chmod"),
            (self.chown.is_some(), "--chown"),
            (self.policy.is_some(), "--policy"),
            (self.policy_file.is_some(), "--policy-file"),
        ];
        given.into_iter().find(|(given, _)| *given).map(|(_, option)| option)
    }

    /// How another machine is spoken to.
    pub(super) fn dial(&self) -> remote::Dial<'_> {
        let compress = CompressOptions { level: self.compress_level, enabled: !self.no_compress };
        let state = state_directory();
        remote::Dial { ssh: &self.ssh, reach: &self.reach, count: self.transfers.0, compress, kept: None, state }
    }

    /// What a run is to do. The source is not known yet: `begin.source` is empty.
    pub(super) fn options(&self) -> Result<Options, Failure> {
        let filter = self.filter()?;
        let mut options = Options {
            scan: ScanOptions {
                filter: filter.clone(),
                hash_all: self.checksum,
                links: self.links,
                ..ScanOptions::default()
            },
            begin: BeginOptions {
                policy: self.policy()?,
                filter,
                checksum: self.checksum,
                last: Vec::new(),
                units: self.unit.clone(),
                append_only: self.append_only.clone(),
                ignore_free_space: self.ignore_free_space,
                verify_disk: self.verify_disk,
                whole_files: self.whole_file,
                wait_seconds: self.wait,
                dry_run: self.dry_run,
                stage_only: false,
                threads: Threads::default(),
                trash_seconds: self.trash_seconds()?,
                actor: actor(),
                source: String::new(),
                login: None,
                trail: Vec::new(),
                ..BeginOptions::default()
            },
            delete: self.deletes(),
            retain: None,
            max_delete: self.max_delete.unwrap_or_default(),
            workers: self.workers(),
            retries: self.retries,
            bandwidth: sync::Rate::new(self.bwlimit.and_then(|Rate(rate)| rate)),
        };
        options.scan.append_only = sync::only_growing(&options.begin);
        Ok(options)
    }

    /// Whether anything is removed at the target.
    pub(super) fn deletes(&self) -> bool {
        self.delete.is_some()
    }

    fn trash_seconds(&self) -> Result<Option<u64>, Failure> {
        match (self.delete, self.trash_keep) {
            (Some(Removal::Trash), keep) => Ok(Some(keep.map_or(USUAL_KEEP_SECONDS, |Period(keep)| keep.as_secs()))),
            (_, Some(_)) => {
                Err(Failure::usage("--trash-keep is for --delete=trash: without it nothing is put into the trash"))
            }
            (_, None) => Ok(None),
        }
    }

    /// Threads that carry content, at most; each side may have a use for fewer.
    fn workers(&self) -> usize {
        self.transfers.0.map_or(USUAL_TRANSFERS, usize::from)
    }

    pub(super) fn filter(&self) -> Result<FilterSpec, Failure> {
        let only = match &self.files_from {
            None => None,
            Some(file) => {
                let text = std::fs::read(file).map_err(Failure::io("read", file))?;
                let lines = text.split(|&byte| byte == b'\n').filter(|line| !line.is_empty());
                Some(lines.map(<[u8]>::to_vec).collect())
            }
        };
        let included = self.include.iter().map(|glob| format!("!{glob}"));
        Ok(FilterSpec { rules: self.exclude.iter().cloned().chain(included).collect(), only })
    }

    fn policy(&self) -> Result<PolicySpec, Failure> {
        let mut policy = match &self.policy {
            Some(name) => {
                let named = load_config(self.config.as_deref())?.policy(name);
                named.map_err(|error| Failure::usage(crate::error::chain(&error)))?
            }
            None => read_policy(self.policy_file.as_deref())?,
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
        Ok(policy)
    }

    /// Goes the whole way, and says what was done.
    pub(super) fn run(
        &self,
        route: &Route,
        options: Options,
        display: &mut Display,
        stop: &Stop,
    ) -> Result<Exit, Failure> {
        Ok(self.reported(route, options, display, stop)?.0)
    }

    /// The same, with what was found out on the way.
    pub(super) fn reported(
        &self,
        route: &Route,
        mut options: Options,
        display: &mut Display,
        stop: &Stop,
    ) -> Result<(Exit, SyncReport), Failure> {
        let from = route.source.describe();
        let to = match (route.target.describe(), &route.called) {
            (directory, None) => directory,
            (directory, Some(name)) => format!("{}/{name}", directory.trim_end_matches('/')),
        };
        options.begin.source.clone_from(&from);
        if let Some(only) = &route.only {
            options.begin.filter.only = Some(only.clone());
        }
        let result = sync::run(&*route.source, &*route.target, &options, &*display, stop.flag());
        display.finish();
        let result = result.map_err(|error| match stop.exit() {
            Some(exit) => Failure::plain(exit, &error),
            None => Failure::Endpoint(error),
        })?;
        let mut out = std::io::stdout().lock();
        let verification = route.target.verification();
        let written = (|| {
            if self.json {
                report::changes_json(&result, options.delete, route.sending, &mut out)?;
                writeln!(out, "{}", report::summary_json(&result, &from, &to, &verification))?;
            } else {
                if self.itemize_changes {
                    report::itemize(&result, options.delete, route.sending, &mut out)?;
                }
                if !self.quiet {
                    report::summary(&result, &from, &to, &verification, options.delete, &mut out)?;
                }
            }
            out.flush()
        })();
        match written {
            Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => return Err(Failure::Output(error)),
            _ => {}
        }
        Ok((if result.is_complete() { Exit::Done } else { Exit::Incomplete }, result))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_those_of_rsync() {
        for (text, rate) in [
            ("0", None),
            ("100", Some(102_400)),
            ("1.5", Some(1536)),
            ("500K", Some(512_000)),
            ("1.5m", Some(1_572_864)),
            ("2GB", Some(2_000_000_000)),
            ("2 GB/s", Some(2_000_000_000)),
        ] {
            assert_eq!(parse_rate(text), Ok(Rate(rate)), "{text}");
        }
        assert!(parse_rate("fast").is_err() && parse_rate("").is_err() && parse_rate(".").is_err());
    }
}
