//! What a push of a job leaves out because it is not finished, and why.

use std::collections::BTreeMap;
use std::sync::atomic::AtomicBool;

use super::{Failure, shown};
use crate::config::{Job, Ready};
use crate::daemon::fetch;
use crate::endpoint::Source;
use crate::error::{Escaped, Exit, chain, counted};
use crate::filter::{Filter, FilterSpec, line_for};
use crate::layout::complete::{unfinished, unfinished_tree};
use crate::layout::units::{Rules, list};
use crate::monitor::Monitor;
use crate::path::RelPath;
use crate::root::Root;
use crate::sync::Options;

/// So many units are named.
const SHOWN: usize = 20;

/// Leaves out of the run what is not finished as the job's `ready` says, with the pointers that name it, and says so. What it is
/// at the targets stays as it is. Gives how many units that are.
///
/// # Errors
/// When the source as a whole is not finished, where the job has no units, or cannot be looked at.
pub(super) fn leave_out(job: &Job, root: &Root, options: &mut Options) -> Result<usize, Failure> {
    if job.ready == Ready::Settled {
        return Ok(0);
    }
    let Some(unit) = &job.unit else {
        let name = job.source.file_name().map(std::ffi::OsStr::as_encoded_bytes);
        return match unfinished_tree(root, name, &job.ready) {
            None => Ok(0),
            Some(why) => {
                let message = format!("'{}' is not finished: {why}", shown(&job.source));
                Err(Failure::Plain { exit: Exit::Incomplete, message })
            }
        };
    };
    let compile = |rules: Vec<String>| {
        let compiled = Filter::compile(&FilterSpec { rules, only: None });
        compiled.map_err(|error| Failure::usage(chain(&error)))
    };
    let pointers = crate::endpoint::local::POINTERS.iter().map(|&name| name.to_owned()).chain(job.last.iter().cloned());
    let (unit, pointer) = (compile(vec![unit.clone()])?, compile(pointers.collect())?);
    let admitted = compile(job.exclude.clone())?;
    let found = list(root, Rules { unit: &unit, pointer: &pointer, admitted: &admitted })?;
    let why = |path: RelPath| unfinished(root, &path, &job.ready).map(|why| (path, why));
    let left: BTreeMap<RelPath, String> = found.units.into_iter().filter_map(|unit| why(unit.path)).collect();
    say(&left);
    let naming = found.pointed.iter().filter(|(_, unit)| left.contains_key(unit)).map(|(pointer, _)| pointer);
    let lines: Vec<String> = left.keys().chain(naming).map(line_for).collect();
    for filter in [&mut options.scan.filter, &mut options.begin.filter] {
        filter.rules.extend(lines.iter().cloned());
    }
    Ok(left.len())
}

fn say(left: &BTreeMap<RelPath, String>) {
    for (path, why) in left.iter().take(SHOWN) {
        eprintln!("lockstep: '{path}' is not finished, and is left out: {why}");
    }
    if left.len() > SHOWN {
        eprintln!(
            "lockstep: {} more are not finished, and are left out",
            counted(left.len() as u64 - SHOWN as u64, "unit", "units")
        );
    }
}

/// The same of a source of another machine, which `connect` opens: what of it takes part, and how many units do not.
///
/// # Errors
/// As [`leave_out`], and when the connection ends.
pub(super) fn leave_out_there(
    job: &Job,
    options: &mut Options,
    connect: &dyn Fn() -> Result<Box<dyn Source>, Failure>,
    monitor: &dyn Monitor,
    stop: &AtomicBool,
) -> Result<(Box<dyn Source>, usize), Failure> {
    let Ready::Marker(marker) = &job.ready else { return Ok((connect()?, 0)) };
    // Only who comes again can wait until all has been left alone.
    let job = Job { settle: crate::config::Period(std::time::Duration::ZERO), ..job.clone() };
    options.scan.whole = true;
    let found = fetch::look_once(&job, &options.scan, connect, monitor, stop)?;
    let why = format!("'{}' is not in it", Escaped(marker.as_bytes()));
    let Some(unit) = &job.unit else {
        let tree = found.source.scan(&options.scan, monitor)?.tree;
        if RelPath::new(marker).is_ok_and(|marker| tree.get(&marker).is_some()) {
            return Ok((Box::new(found.source), 0));
        }
        let source = shown(&job.source);
        return Err(Failure::Plain { exit: Exit::Incomplete, message: format!("'{source}' is not finished: {why}") });
    };
    let unit = Filter::compile(&FilterSpec { rules: vec![unit.clone()], only: None });
    let unit = unit.map_err(|error| Failure::usage(chain(&error)))?;
    let left = found.held.iter().filter(|path| !unit.admits(path, true)).map(|path| (path.clone(), why.clone()));
    let left: BTreeMap<RelPath, String> = left.collect();
    say(&left);
    options.begin.filter.rules.extend(found.held.iter().map(line_for));
    Ok((Box::new(found.source), left.len()))
}
