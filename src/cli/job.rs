//! `lockstep push NAME`: a job of the configuration, once, to all its targets.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::sync::Arc;

use super::arguments::{Place, Route};
use super::stop::Stop;
use super::transfer::{How, Rate, Transfers, config_file, load_config, state_directory};
use super::{Failure, shown, unfinished};
use crate::config::{Config, Delete, Job, Ready, Schedule};
use crate::daemon::units;
use crate::endpoint::Source;
use crate::endpoint::guarded::Guarded;
use crate::endpoint::local::LocalSource;
use crate::error::{Escaped, Exit, chain, counted};
use crate::monitor::threads::Threads;
use crate::path::RelPath;
use crate::root::Root;
use crate::sync::retention::keep_only;
use crate::sync::{Options, SyncReport, give_way};

/// Runs the job called `name`. One target that fails does not keep the others from theirs.
pub(super) fn push(name: &OsStr, how: &How) -> Result<Exit, Failure> {
    let shown_name = shown(std::path::Path::new(name)).to_string();
    let missing = || {
        format!(
            "'{shown_name}' alone would be the name of a job; to send a file or directory, say where to: \
             lockstep push {shown_name} [USER@]HOST:DEST"
        )
    };
    let Some(name) = name.to_str().filter(|name| !name.contains('/')) else {
        return Err(Failure::usage(missing()));
    };
    // Where there is no configuration, what lies here under that name was meant.
    if !config_file(how.config.as_deref()).exists() && std::path::Path::new(name).exists() {
        return Err(Failure::usage(missing()));
    }
    let config = load_config(how.config.as_deref())?;
    super::audit::place::configure(&config.audit)?;
    let job = config.job(name).map_err(|error| {
        let here = std::path::Path::new(name).exists();
        Failure::usage(if here { format!("{}; {}", chain(&error), missing()) } else { chain(&error) })
    })?;
    let wrong = |message: String| Failure::usage(format!("job '{}': {message}", Escaped(job.name.as_bytes())));
    refuse(how).map_err(wrong)?;
    // What the command line says wins.
    let mut own = how.clone();
    own.transfers = Transfers(how.transfers.0.or(job.connections));
    let how = &own;
    let mut options = options(&config, job, how)?;
    if let Some(error) = give_way(job.nice, job.io_class).first() {
        return Err(wrong(chain(error)));
    }
    // Said once, before anybody is connected to, and with the exit code of a push of the same directory.
    if job.remote_source().is_none()
        && !std::fs::metadata(&job.source).map_err(Failure::io("open", &job.source))?.is_dir()
    {
        return Err(wrong(format!("its source '{}' is not a directory", shown(&job.source))));
    }
    let unfinished = match job.remote_source() {
        None => unfinished::leave_out(job, &Root::open(&job.source)?, &mut options)?,
        Some(_) => 0,
    };
    let (failed, left_there) = to_all(job, how, &options, &Stop::on_signals()?)?;
    let unfinished = unfinished.max(left_there);
    match (failed.as_slice(), job.targets.len()) {
        ([], _) if unfinished > 0 => {
            let units = counted(unfinished as u64, "unit", "units");
            let message = format!("not finished and left out: {units}; the same command sends them when they are");
            Err(Failure::Plain { exit: Exit::Incomplete, message })
        }
        ([], _) => Ok(Exit::Done),
        ([exit], 1) => Ok(*exit),
        (_, all) => {
            let message =
                format!("targets that are not in step: {} of {all}; the same command goes on there", failed.len());
            Err(Failure::Plain { exit: Exit::Incomplete, message })
        }
    }
}

/// To one target after the other. Those that keep only some units are gone to once more when it is known that nobody needs the
/// others any more. Gives the exit codes of those that are not in step, and how many units of a source of another machine were not
/// finished.
fn to_all(job: &Job, how: &How, options: &Options, stop: &Stop) -> Result<(Vec<Exit>, usize), Failure> {
    let quorum = job.quorum.unwrap_or(job.targets.len());
    let (mut failed, mut full, mut unfinished) = (Vec::new(), Vec::new(), 0);
    let mut go = |target: &str, safe, failed: &mut Vec<Exit>| -> Result<bool, Failure> {
        stop.check()?;
        let gone = keeping(job, options.clone(), safe).and_then(|options| to_one(job, target, how, options, stop));
        match gone {
            Ok((exit, report, left)) => {
                unfinished = left.max(unfinished);
                if exit == Exit::Done {
                    return Ok(!report.needed.is_empty());
                }
                failed.push(exit);
            }
            // Nobody else is asked after a stop.
            Err(failure) if stop.wanted() => return Err(failure),
            Err(failure) => {
                eprintln!("lockstep: to {}: {}", Escaped(target.as_bytes()), chain(&failure));
                failed.push(failure.exit());
            }
        }
        Ok(false)
    };
    for target in &job.targets {
        if go(target, (quorum > 1).then(BTreeSet::new), &mut failed)? {
            full.push(target);
        }
    }
    if failed.len() + quorum <= job.targets.len() {
        for target in full {
            go(target, None, &mut failed)?;
        }
    } else if !full.is_empty() {
        eprintln!("lockstep: warning: what 'retain' is to take away stays until {quorum} targets are in step");
    }
    Ok((failed, unfinished))
}

/// The same options for a target that keeps only some units.
fn keeping(job: &Job, mut options: Options, safe: Option<BTreeSet<RelPath>>) -> Result<Options, Failure> {
    if let Some(rule) = job.retain {
        keep_only(&mut options, &Root::open(&job.source)?, rule, safe)?;
    }
    Ok(options)
}

/// Also tells how many units of a source of another machine were not finished.
fn to_one(
    job: &Job,
    target: &str,
    how: &How,
    mut options: Options,
    stop: &Stop,
) -> Result<(Exit, SyncReport, usize), Failure> {
    let mut display = how.display(stop);
    let (source, left) = match job.remote_source() {
        Some(source) => {
            let place = Place::parse(OsStr::new(source))?;
            let connect = || place.source(how, &display);
            unfinished::leave_out_there(job, &mut options, &connect, &display, stop.flag())?
        }
        None => (listed_whole(job, &options)?, 0),
    };
    let place = Place::parse(OsStr::new(target))?;
    let sending = matches!(place, Place::There(_));
    let target = place.target(how, &display)?;
    let route = Route { source, target, only: None, sending, called: None };
    let (exit, report) = how.reported(&route, options, &mut display, stop)?;
    Ok((exit, report, left))
}

/// A source of this machine, of which a unit that was listed and only finished afterwards ends the run.
fn listed_whole(job: &Job, options: &Options) -> Result<Box<dyn Source>, Failure> {
    let source = LocalSource::new(&job.source, state_directory().as_deref())?;
    if job.ready == Ready::Settled {
        return Ok(Box::new(source));
    }
    let root = Root::open(&job.source)?;
    let source = Guarded::new(source, Arc::new(|_| false), Arc::new(BTreeSet::new));
    let source = source.whole(units::all_of_it(job, &root, &options.scan.filter)?);
    Ok(Box::new(source.fitting(units::goes_with_what_it_names(job, &root)?)))
}

/// Options that the job decides itself are refused.
fn refuse(how: &How) -> Result<(), String> {
    if let Some(option) = how.decided_by_a_job() {
        return Err(format!(
            "{option} is for the job to say: change it in the configuration, or push with SRC and DEST"
        ));
    }
    Ok(())
}

/// The options of the command line, with what the job says.
fn options(config: &Config, job: &Job, how: &How) -> Result<Options, Failure> {
    let mut options = how.options()?;
    for filter in [&mut options.scan.filter, &mut options.begin.filter] {
        filter.rules.clone_from(&job.exclude);
    }
    if let Some(name) = &job.policy {
        options.begin.policy = config.policy(name).map_err(|error| Failure::usage(chain(&error)))?;
    }
    options.begin.last.clone_from(&job.last);
    let threads = Threads::at_most(job.threads);
    (options.scan.threads, options.begin.threads) = (threads, threads);
    options.begin.units = job.unit.iter().cloned().collect();
    options.begin.append_only.clone_from(&job.append_only);
    options.scan.append_only = crate::sync::only_growing(&options.begin);
    options.delete = job.delete != Delete::Never;
    options.begin.trash_seconds = job.trash_seconds();
    options.max_delete = job.max_delete;
    options.bandwidth = crate::sync::Rate::new(match how.bwlimit {
        Some(Rate(limit)) => limit,
        // What holds now holds for this run.
        None => job.bandwidth.as_ref().and_then(Schedule::now),
    });
    Ok(options)
}
