//! What of the jobs can be known without connecting: sources, targets, the ways to them, and programs.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::cli::arguments::Place;
use crate::cli::finding::{Finding, Level};
use crate::cli::login::Ssh;
use crate::cli::places::{not_a_program, real, unreadable, unwritable};
use crate::cli::remote::Destination;
use crate::config::{Config, Delete, Job};
use crate::error::{Escaped, chain, shown};
use crate::filter::{Filter, FilterSpec};
use crate::path::RelPath;
use crate::plan::safety::DeleteLimit;

/// Below this a look at everything is most of what a machine does.
const RESCAN_MIN: Duration = Duration::from_secs(60);

/// A target, so that two names of one directory are the same.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Spot {
    /// Host, port and, where the path is relative, the user; empty for this machine.
    host: String,
    path: PathBuf,
}

/// A target of a job.
struct Used<'a> {
    job: &'a Job,
    target: &'a str,
    spot: Spot,
}

pub(super) fn about(job: &Job) -> String {
    format!("job {}", Escaped(job.name.as_bytes()))
}

/// All of it.
pub(super) fn look(config: &Config, ssh: &Ssh) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut used = Vec::new();
    let mut hosts = Hosts::default();
    for job in &config.jobs {
        findings.extend(source(job));
        findings.extend(keys(job));
        findings.extend(programs(job));
        findings.extend(owners(config, job));
        for place in job.targets.iter().map(String::as_str).chain(job.remote_source()) {
            match Place::parse(OsStr::new(place)) {
                Err(failure) => findings.push(Finding::error(&about(job), chain(&failure), "")),
                Ok(Place::Here(path)) => {
                    findings.extend(here(job, &path));
                    used.push(Used { job, target: place, spot: Spot { host: String::new(), path: real(&path) } });
                }
                Ok(Place::There(there)) => match hosts.way(&there, ssh) {
                    Ok(_) if Some(place) == job.remote_source() => {}
                    Ok(spot) => used.push(Used { job, target: place, spot }),
                    Err(reason) => findings.push(Finding::error(&about(job), reason, "")),
                },
            }
        }
    }
    findings.extend(hosts.findings());
    findings.extend(shared(&used));
    findings
}

fn source(job: &Job) -> Option<Finding> {
    if job.remote_source().is_some() {
        return None;
    }
    let about = about(job);
    let shown = shown(&job.source);
    Some(match std::fs::metadata(&job.source) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            let says = format!("its source '{shown}' is not there: nothing is sent until it is");
            Finding::warning(&about, says, "make it, or mount it; nothing is deleted at the targets meanwhile")
        }
        Err(error) => Finding::error(
            &about,
            format!("its source '{shown}' cannot be looked at: {}", crate::error::in_words(&error)),
            "let the user of the service enter the directories above it",
        ),
        Ok(found) if !found.is_dir() => Finding::error(
            &about,
            format!("its source '{shown}' is not a directory"),
            "name the directory that it lies in, and leave the rest out with 'exclude'",
        ),
        Ok(_) => match unreadable(&job.source) {
            Some(reason) => Finding::error(
                &about,
                format!("its source {reason}"),
                "let the user of the service read it: by a group, or as config/systemd/read-all.conf does",
            ),
            None => Finding::ok(&about, format!("its source '{shown}' is there")),
        },
    })
}

/// Keys that say nothing together with others.
fn keys(job: &Job) -> Vec<Finding> {
    let about = about(job);
    let mut findings = Vec::new();
    let mut say = |says: String, remedy: &str| findings.push(Finding::warning(&about, says, remedy));
    if job.max_delete != DeleteLimit::Unlimited && job.delete == Delete::Never {
        say("'max_delete' says nothing, since 'delete' is 'never'".into(), "leave one out, or change the other");
    }
    if job.rescan.0 < RESCAN_MIN {
        let says =
            "'rescan' is shorter than a minute: all of the source is listed, and compared with each target, that often";
        say(says.into(), "changes are noticed without it; an hour is usual");
    }
    if job.settle.0 > job.rescan.0 {
        say(
            "'settle' is longer than 'rescan': what is left alone is found only by the look after next".into(),
            "make 'rescan' longer",
        );
    }
    findings
}

fn programs(job: &Job) -> Vec<Finding> {
    let commands = [("on_published", &job.on_published), ("on_failed", &job.on_failed)];
    let named = commands.into_iter().filter_map(|(field, command)| Some((field, command.first()?)));
    named
        .map(|(field, program)| match not_a_program(Path::new(program)) {
            None => Finding::ok(&about(job), format!("the program of '{field}' is there")),
            Some(reason) => Finding::error(
                &about(job),
                format!("'{field}' names a program that cannot be started: {reason}"),
                "install it, or name another",
            ),
        })
        .collect()
}

/// Owners that a policy names and that this machine does not know, where it is a target.
fn owners(config: &Config, job: &Job) -> Vec<Finding> {
    let Some(policy) = job.policy.as_ref().and_then(|name| config.policies.get(name)) else { return Vec::new() };
    if !job.targets.iter().any(|target| target.starts_with('/')) {
        return Vec::new();
    }
    unknown_owners(policy)
        .into_iter()
        .map(|name| {
            let says = format!("its policy names {name}, which this machine does not know; files that get it fail");
            Finding::error(&about(job), says, "create it, or write a number")
        })
        .collect()
}

/// `the user 'x'` or `the group 'y'`, of those that are not known here.
pub(super) fn unknown_owners(policy: &crate::policy::PolicySpec) -> BTreeSet<String> {
    let is_number = |name: &str| name.parse::<u32>().is_ok();
    let users = policy.rules.iter().filter_map(|rule| rule.owner.as_deref());
    let users = users.filter(|name| !is_number(name) && uzers::get_user_by_name(name).is_none());
    let groups = policy.rules.iter().filter_map(|rule| rule.group.as_deref());
    let groups = groups.filter(|name| !is_number(name) && uzers::get_group_by_name(name).is_none());
    let users = users.map(|name| format!("the user '{}'", Escaped(name.as_bytes())));
    users.chain(groups.map(|name| format!("the group '{}'", Escaped(name.as_bytes())))).collect()
}

/// A target of this machine.
fn here(job: &Job, path: &Path) -> Vec<Finding> {
    let about = about(job);
    let mut findings = Vec::new();
    if let Some(reason) = unwritable(path) {
        let remedy = match reason.contains("ot a directory") {
            true => "name another directory, or move what lies there",
            false => "let the user of the service write there, and the unit: config/systemd/local-targets.conf",
        };
        findings.push(Finding::error(&about, format!("its target {reason}"), remedy));
    }
    if job.remote_source().is_some() {
        return findings;
    }
    let (from, to) = (real(&job.source), real(path));
    let (shown_source, shown_target) = (shown(&job.source), shown(path));
    if from == to {
        let says = format!("'{shown_target}' is source and target");
        findings.push(Finding::error(&about, says, "name another directory"));
    } else if let Ok(below) = to.strip_prefix(&from) {
        if takes_part(job, below) {
            let says = format!("its target '{shown_target}' lies in its source, and would be sent into itself");
            findings.push(Finding::error(&about, says, "name another directory, or leave it out with 'exclude'"));
        }
    } else if from.starts_with(&to) && job.delete != Delete::Never {
        let says = format!("its source '{shown_source}' lies in its target, where 'delete' would take it away");
        findings.push(Finding::error(&about, says, "name another directory"));
    }
    findings
}

fn takes_part(job: &Job, below: &Path) -> bool {
    let filter = Filter::compile(&FilterSpec { rules: job.exclude.clone(), only: None });
    let (Ok(filter), Ok(path)) = (filter, RelPath::new(below.as_os_str().as_bytes())) else { return true };
    path.ancestors().all(|above| filter.admits(&above, true)) && filter.admits(&path, true)
}

/// What is to be said of hosts: in the same words of many of them.
#[derive(Default)]
struct Hosts {
    looked_at: BTreeSet<String>,
    /// By what is said: whether it is an error, of which hosts, and what to do.
    said: BTreeMap<String, (Level, Vec<String>, String)>,
}

impl Hosts {
    /// How a host is reached.
    fn way(&mut self, there: &Destination, ssh: &Ssh) -> Result<Spot, String> {
        let resolved = ssh.resolve(there.user.as_deref(), &there.host).map_err(|failure| chain(&failure))?;
        let options = resolved.options;
        let name = options.describe();
        if self.looked_at.insert(name.clone()) {
            let found = options.look();
            let mut say = |level, says: String, remedy: String| {
                self.said.entry(says).or_insert_with(|| (level, Vec::new(), remedy)).1.push(name.clone());
            };
            found.wrong.into_iter().for_each(|says| say(Level::Error, says, String::new()));
            found.doubtful.into_iter().for_each(|(says, remedy)| say(Level::Warning, says, remedy));
            resolved.warnings.into_iter().for_each(|says| say(Level::Warning, says, String::new()));
        }
        let path = PathBuf::from(&there.path);
        let host = if path.is_absolute() { format!("{}:{}", options.host, options.port) } else { name };
        // Without dots and slashes that mean nothing.
        Ok(Spot { host, path: path.components().collect() })
    }

    fn findings(self) -> impl Iterator<Item = Finding> {
        self.said.into_iter().map(|(says, (level, hosts, remedy))| {
            let about = match hosts.as_slice() {
                [one] => format!("host {one}"),
                [first, second] => format!("hosts {first} and {second}"),
                [first, second, rest @ ..] => format!("hosts {first}, {second} and {} more", rest.len()),
                [] => String::new(),
            };
            Finding::new(level, &about, says, &remedy)
        })
    }
}

/// Targets that are one directory, or one in the other.
fn shared(used: &[Used<'_>]) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (at, one) in used.iter().enumerate() {
        for other in &used[at + 1..] {
            let same = one.spot == other.spot;
            let nested = one.spot.host == other.spot.host
                && (one.spot.path.starts_with(&other.spot.path) || other.spot.path.starts_with(&one.spot.path));
            if !nested {
                continue;
            }
            let (target, other_target) = (Escaped(one.target.as_bytes()), Escaped(other.target.as_bytes()));
            let how = if same { "are the same directory" } else { "lie one in the other" };
            let says = if std::ptr::eq(one.job, other.job) {
                format!("its targets '{target}' and '{other_target}' {how}")
            } else {
                let name = Escaped(other.job.name.as_bytes());
                format!("its target '{target}' and '{other_target}' of job {name} {how}")
            };
            let deletes = |job: &Job| job.delete != Delete::Never;
            findings.push(if std::ptr::eq(one.job, other.job) && same {
                Finding::error(&about(one.job), says, "name each target once")
            } else if deletes(one.job) || deletes(other.job) {
                let remedy = "one of them takes away what only the target has, and so what the other brings; give each a directory \
                              of its own";
                Finding::error(&about(one.job), says, remedy)
            } else {
                let remedy = "they wait for each other, and each replaces the manifest of the other; give each a directory of its own";
                Finding::warning(&about(one.job), says, remedy)
            });
        }
    }
    findings
}
