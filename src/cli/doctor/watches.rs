//! What inotify(7) grants, held against the directories of the sources.

use std::time::{Duration, Instant};

use crate::cli::finding::Finding;
use crate::config::{Config, Job, Watch};
use crate::daemon::filesystem;
use crate::error::{Escaped, shown};
use crate::filter::{Filter, FilterSpec};
use crate::path::RelPath;

/// A source that takes longer to be counted is counted in part.
const COUNT_MAX: Duration = Duration::from_secs(20);

/// A number below `/proc/sys/fs/inotify`.
fn limit(name: &str) -> Option<u64> {
    std::fs::read_to_string(format!("/proc/sys/fs/inotify/{name}")).ok()?.trim().parse().ok()
}

/// All of it.
pub(super) fn look(config: &Config) -> Vec<Finding> {
    let (mut findings, mut all) = (Vec::new(), 0);
    let local = config.jobs.iter().filter(|job| job.remote_source().is_none() && job.watch != Watch::Polling);
    for job in local {
        let about = format!("source of job {}", Escaped(job.name.as_bytes()));
        if let Some(kind) = std::fs::File::open(&job.source).ok().and_then(|source| filesystem::silent(&source)) {
            let says = format!(
                "'{}' is on {kind}, which does not tell of what others change: it is polled",
                shown(&job.source)
            );
            let remedy = "'poll' says how often; run the daemon where it is written to, if you can";
            findings.push(Finding::warning(&about, says, remedy));
            continue;
        }
        let (count, whole) = directories(job);
        all += count;
        let least = if whole { "" } else { "at least " };
        findings.push(Finding::ok(&about, format!("{least}{count} directories are to be watched")));
    }
    findings.push(watches(all));
    findings.extend(instances(config));
    findings
}

/// How many directories take part, and whether all were counted.
fn directories(job: &Job) -> (u64, bool) {
    let filter = Filter::compile(&FilterSpec { rules: job.exclude.clone(), only: None }).ok();
    let admitted = |entry: &walkdir::DirEntry| {
        let below = entry.path().strip_prefix(&job.source).ok().map(|path| path.as_os_str().as_encoded_bytes());
        let path = below.filter(|path| !path.is_empty()).and_then(|path| RelPath::new(path).ok());
        entry.file_type().is_dir()
            && path.is_none_or(|path| filter.as_ref().is_none_or(|filter| filter.admits(&path, true)))
    };
    let (started, mut count) = (Instant::now(), 0);
    for _ in walkdir::WalkDir::new(&job.source).into_iter().filter_entry(admitted).flatten() {
        count += 1;
        if started.elapsed() > COUNT_MAX {
            return (count, false);
        }
    }
    (count, true)
}

fn watches(needed: u64) -> Finding {
    let about = "inotify watches";
    let Some(most) = limit("max_user_watches") else {
        let says = "their number is not told here; a source that cannot be watched is polled";
        return Finding::warning(about, says, "see that /proc/sys is there");
    };
    // All programs of a user share them, and sources grow.
    let wanted = (needed.saturating_mul(2)).next_power_of_two().max(65_536);
    if needed > most {
        let says = format!("{most} are allowed to this user and {needed} are needed: sources would be polled");
        let remedy = format!("sysctl -w fs.inotify.max_user_watches={wanted}, and a line in /etc/sysctl.d");
        return Finding::error(about, says, &remedy);
    }
    if needed.saturating_mul(10) > most.saturating_mul(8) {
        let says =
            format!("{most} are allowed to this user and {needed} are needed: there is little left to grow into");
        let remedy = format!("sysctl -w fs.inotify.max_user_watches={wanted}, and a line in /etc/sysctl.d");
        return Finding::warning(about, says, &remedy);
    }
    let kilobytes = needed;
    Finding::ok(about, format!("{needed} of {most} are needed (about {kilobytes} kB of the kernel's memory)"))
}

fn instances(config: &Config) -> Option<Finding> {
    let (most, jobs) = (limit("max_user_instances")?, config.jobs.len() as u64);
    let about = "inotify instances";
    if jobs.saturating_mul(2) > most {
        let says = format!("{most} are allowed to this user, and each of the {jobs} jobs takes one");
        let remedy = format!("sysctl -w fs.inotify.max_user_instances={}", (jobs * 4).max(256));
        return Some(Finding::warning(about, says, &remedy));
    }
    let queue = limit("max_queued_events").unwrap_or(0);
    Some(Finding::ok(
        about,
        format!("{most} are allowed; {queue} events wait at most, and after more everything is compared"),
    ))
}
