//! Each target is logged in to: what answers there, which version it is, how much room it has, and who works on it.

use std::ffi::OsStr;
use std::fmt::Write as _;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use serde::Serialize;
use unicode_width::UnicodeWidthStr as _;

use crate::cli::arguments::Place;
use crate::cli::login::{self, Ssh};
use crate::cli::places::nearest;
use crate::cli::remote::{self, Destination, Dial, Reach};
use crate::cli::{Failure, transfer};
use crate::codec::CompressOptions;
use crate::config::{Config, Job};
use crate::endpoint::client::{Client, ClientOptions};
use crate::endpoint::link::{Remote as _, Way};
use crate::endpoint::local::LocalTarget;
use crate::endpoint::{BeginOptions, Error, Target};
use crate::error::{Escaped, Exit, chain, said};
use crate::filter::FilterSpec;
use crate::monitor::Silent;
use crate::policy::PolicySpec;
use crate::root::Root;
use crate::wire::buffer::Reader;
use crate::wire::extension::{self, put_string};
use crate::wire::sftp::{Status, packet};

/// Targets that are asked at once.
const AT_ONCE: usize = 16;
/// What a run that has the lock is called in a refusal.
const IN_USE: &str = " is in use by ";

/// What was found at one target.
#[derive(Debug, Default, Serialize)]
pub(super) struct Probe {
    job: String,
    /// As the configuration writes it; a source of another machine too.
    target: String,
    /// What answers: `lockstep`, `sftp` or `here`.
    #[serde(skip_serializing_if = "Option::is_none")]
    way: Option<&'static str>,
    /// Of the lockstep there.
    #[serde(skip_serializing_if = "Option::is_none")]
    version: Option<String>,
    /// Whether the directory is there already.
    there: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    free_bytes: Option<u64>,
    /// Which run works on it at this moment.
    #[serde(skip_serializing_if = "Option::is_none")]
    in_use_by: Option<String>,
    /// Why it cannot be used.
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
    /// The exit code that a push to it would end with.
    exit: u8,
}

/// The exit code for all of them.
pub(super) fn exit(probes: &[Probe]) -> Exit {
    let any = |exit: Exit| probes.iter().any(|probe| probe.exit == exit.code());
    match probes.iter().all(|probe| probe.exit == 0) {
        true => Exit::Done,
        false if any(Exit::Trust) => Exit::Trust,
        false => Exit::Incomplete,
    }
}

/// Asks all, several at once; in their order.
pub(super) fn probe(config: &Config, ssh: &Ssh, reach: &Reach) -> Vec<Probe> {
    let of_job = |job: &'_ Job| {
        let source = job.remote_source().map(str::to_owned);
        job.targets.iter().cloned().map(|target| (target, true)).chain(source.map(|source| (source, false))).collect()
    };
    let all: Vec<(&Job, String, bool)> = config
        .jobs
        .iter()
        .flat_map(|job| {
            let places: Vec<(String, bool)> = of_job(job);
            places.into_iter().map(move |(place, target)| (job, place, target))
        })
        .collect();
    let next = AtomicUsize::new(0);
    let found: Mutex<Vec<(usize, Probe)>> = Mutex::default();
    std::thread::scope(|scope| {
        for _ in 0..all.len().min(AT_ONCE) {
            scope.spawn(|| {
                while let Some((at, (job, place, target))) = {
                    let at = next.fetch_add(1, Ordering::Relaxed);
                    all.get(at).map(|one| (at, one))
                } {
                    let options = target.then(|| options(config, job));
                    let probe = one(job, place, options.as_ref(), ssh, reach);
                    found.lock().unwrap_or_else(PoisonError::into_inner).push((at, probe));
                }
            });
        }
    });
    let mut found = found.into_inner().unwrap_or_else(PoisonError::into_inner);
    found.sort_by_key(|(at, _)| *at);
    found.into_iter().map(|(_, probe)| probe).collect()
}

/// What a run of the job would ask for.
fn options(config: &Config, job: &Job) -> BeginOptions {
    BeginOptions {
        policy: job.policy.as_ref().and_then(|name| config.policies.get(name)).cloned().unwrap_or_default(),
        filter: FilterSpec { rules: job.exclude.clone(), only: None },
        last: job.last.clone(),
        units: job.unit.iter().cloned().collect(),
        append_only: job.append_only.clone(),
        actor: transfer::actor(),
        source: "config check".to_owned(),
        ..BeginOptions::default()
    }
}

/// Looks at one place; with `options` as a target, else as a source.
fn one(job: &Job, place: &str, options: Option<&BeginOptions>, ssh: &Ssh, reach: &Reach) -> Probe {
    let name = |text: &str| Escaped(text.as_bytes()).to_string();
    let mut probe = Probe { job: name(&job.name), target: name(place), ..Probe::default() };
    let result = (|| match Place::parse(OsStr::new(place))? {
        Place::Here(path) => here(&path, options, &mut probe),
        Place::There(there) => far(&there, options, ssh, reach, &mut probe),
    })();
    if let Err(failure) = result {
        let message = chain(&failure);
        probe.exit = failure.exit().code();
        match message.split_once(IN_USE) {
            // That a run goes on is nothing wrong.
            Some((_, holder)) if failure.exit() == Exit::TryAgain => {
                probe.in_use_by = Some(holder.split("; wait for it").next().unwrap_or(holder).to_owned());
                probe.exit = 0;
            }
            _ => probe.error = Some(message),
        }
    }
    probe
}

fn here(path: &Path, options: Option<&BeginOptions>, probe: &mut Probe) -> Result<(), Failure> {
    (probe.way, probe.there) = (Some("here"), path.is_dir());
    let free = Root::open(&nearest(path)).and_then(|root| root.free_space())?;
    probe.free_bytes = Some(free.bytes).filter(|&bytes| bytes != u64::MAX);
    let used = path.join(".lockstep").is_dir();
    begin(&LocalTarget::new(path, PolicySpec::default()), options, used)
}

fn far(
    there: &Destination,
    options: Option<&BeginOptions>,
    ssh: &Ssh,
    reach: &Reach,
    probe: &mut Probe,
) -> Result<(), Failure> {
    let used = ask(there, ssh, reach, probe)?;
    if options.is_some() {
        let compress = CompressOptions::default();
        let dial = Dial { ssh, reach, count: Some(1), compress, kept: None, state: None };
        let target = remote::target(there, &dial, &Silent::default())?;
        return begin(&*target, options, used);
    }
    if probe.there {
        return Ok(());
    }
    let message = format!("there is no directory '{}'", Escaped(there.path.as_bytes()));
    Err(Failure::Plain { exit: Exit::Io, message })
}

/// Begins a run and gives it up. Where there was none before it is only looked, so that nothing is made.
fn begin(target: &dyn Target, options: Option<&BeginOptions>, used: bool) -> Result<(), Failure> {
    let Some(options) = options else { return Ok(()) };
    let begun = target.begin(&BeginOptions { dry_run: !used, tries: true, ..options.clone() }, &Silent::default());
    target.abort();
    Ok(begun?)
}

/// What answers at the host, and what it says of the directory. True where runs were made on it before.
fn ask(there: &Destination, ssh: &Ssh, reach: &Reach, probe: &mut Probe) -> Result<bool, Failure> {
    let remote = login::connect(there, ssh)?;
    let host = remote.describe();
    for way in reach.ways() {
        let link = match remote.open(&way, 0) {
            Ok(link) => link,
            Err(error) if error.not_offered => continue,
            Err(error) => return Err(login::failed(error)),
        };
        // A command that is not there shows only now.
        let Ok(client) = Client::connect(link, &host, ClientOptions::default()) else { continue };
        probe.way = Some(if way == Way::SftpSubsystem { "sftp" } else { "lockstep" });
        probe.version = version(&client);
        probe.there = is_directory(&client, there.path.as_bytes())?;
        probe.free_bytes = free(&client, there.path.as_bytes())?;
        return Ok(is_directory(&client, format!("{}/.lockstep", there.path.trim_end_matches('/')).as_bytes())?);
    }
    // The attempt at a run says by which ways it was tried, and what came of them.
    Ok(false)
}

/// What a lockstep says of itself.
fn version(client: &Client) -> Option<String> {
    if !client.has("hello@lockstep.internal", extension::VERSION) {
        return None;
    }
    let mut request = extension::request("hello");
    put_string(&mut request, b"{}");
    let answer = client.call(request, false).ok().filter(|answer| answer.kind == extension::EXTENDED_REPLY)?;
    let hello: serde_json::Value = serde_json::from_slice(Reader(&answer.body).string().ok()?).ok()?;
    let software = hello["software"].as_str()?;
    Some(said(software.strip_prefix("lockstep ").unwrap_or(software).as_bytes()))
}

fn is_directory(client: &Client, path: &[u8]) -> Result<bool, Error> {
    let mut request = vec![0, 0, 0, 0, packet::STAT, 0, 0, 0, 0];
    put_string(&mut request, path);
    let answer = client.call(request, false)?;
    let mut fields = Reader(&answer.body);
    let short = |_| client.protocol("the answer to STAT ends too early");
    match answer.kind {
        packet::ATTRS => {
            let found = crate::wire::sftp::Attributes::decode(&mut fields).map_err(short)?;
            Ok(found.mode.unwrap_or(0) & 0o170_000 == 0o040_000)
        }
        packet::STATUS if fields.u32().map_err(short)? == Status::PermissionDenied as u32 => {
            let message = format!("'{}' may not be looked at: permission denied there", Escaped(path));
            Err(Error::Remote { message, exit: Exit::Io })
        }
        _ => Ok(false),
    }
}

/// Bytes that are free where the directory lies, or will; `None` where that is not said.
fn free(client: &Client, path: &[u8]) -> Result<Option<u64>, Error> {
    if !client.has("statvfs@openssh.com", "2") {
        return Ok(None);
    }
    let mut path = path;
    loop {
        let mut request = vec![0, 0, 0, 0, extension::EXTENDED, 0, 0, 0, 0];
        put_string(&mut request, b"statvfs@openssh.com");
        put_string(&mut request, if path.is_empty() { b"." } else { path });
        let answer = client.call(request, false)?;
        if answer.kind == extension::EXTENDED_REPLY {
            let mut fields = Reader(&answer.body);
            let numbers: Option<Vec<u64>> = (0..5).map(|_| fields.u64().ok()).collect();
            // Sizes are in blocks of the second number; the fifth is what an unprivileged user may still take.
            return Ok(numbers.map(|numbers| numbers[1].saturating_mul(numbers[4])));
        }
        // Not there yet: what is above it says as much.
        match path.iter().rposition(|&byte| byte == b'/') {
            Some(0) if path.len() > 1 => path = b"/",
            Some(at) if at > 0 => path = &path[..at],
            None if !path.is_empty() => path = b"",
            _ => return Ok(None),
        }
    }
}

fn size(bytes: u64) -> String {
    indicatif::DecimalBytes(bytes).to_string()
}

/// A line for each, with what is wrong below it.
pub(super) fn table(probes: &[Probe]) -> String {
    if probes.is_empty() {
        return String::new();
    }
    let mut rows = vec![["JOB", "TARGET", "STATE", "BY", "VERSION", "FREE"].map(str::to_owned)];
    rows.extend(probes.iter().map(|probe| {
        let state = match probe {
            Probe { error: Some(_), .. } => "error",
            Probe { in_use_by: Some(_), .. } => "in use",
            Probe { there: true, .. } => "ready",
            _ => "new",
        };
        let known = |text: Option<&str>| text.unwrap_or("-").to_owned();
        [
            probe.job.clone(),
            probe.target.clone(),
            state.to_owned(),
            known(probe.way),
            known(probe.version.as_deref()),
            known(probe.free_bytes.map(size).as_deref()),
        ]
    }));
    let widths: [usize; 6] = std::array::from_fn(|at| rows.iter().map(|row| row[at].width()).max().unwrap_or(0));
    let mut text = String::new();
    for (number, row) in rows.iter().enumerate() {
        let cells = row.iter().zip(widths).map(|(cell, width)| format!("{cell}{}", " ".repeat(width - cell.width())));
        let _ = writeln!(text, "{}", cells.collect::<Vec<_>>().join("  ").trim_end());
        let Some(probe) = number.checked_sub(1).map(|at| &probes[at]) else { continue };
        if let Some(error) = &probe.error {
            let _ = writeln!(text, "    {error}");
        }
        if let Some(holder) = &probe.in_use_by {
            let _ = writeln!(text, "    by {holder}");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trust_is_the_worst_that_a_target_can_lack() {
        let probes =
            |codes: &[u8]| -> Vec<Probe> { codes.iter().map(|&exit| Probe { exit, ..Probe::default() }).collect() };
        let codes: [(&[u8], Exit); 4] =
            [(&[], Exit::Done), (&[0, 0], Exit::Done), (&[75, 0], Exit::Incomplete), (&[75, 3], Exit::Trust)];
        for (given, expected) in codes {
            assert_eq!(exit(&probes(given)), expected, "{given:?}");
        }
    }
}
