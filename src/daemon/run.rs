//! One run: what is to be sent of a job, to one target.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use super::feed::gathered;
use super::fetch::{self, Looked};
use super::pending::Work;
use super::settle::{POINTERS, Rules};
use super::tally::Tally;
use super::{Connect, Trouble, clock, units};
use crate::config::{Delete, Job};
use crate::endpoint::guarded::{BEING_WRITTEN, CHANGED, Guard, Guarded, HeldBack, NOT_STEADY, NOT_WHOLE, Steady};
use crate::endpoint::local::LocalSource;
use crate::endpoint::shared::SharedSource;
use crate::endpoint::{BeginOptions, Error, ScanOptions, Source};
use crate::error::{Exit, chain};
use crate::filter::{Filter, FilterSpec, line_for};
use crate::layout::complete;
use crate::monitor::threads::Threads;
use crate::monitor::{Problem, Severity};
use crate::path::RelPath;
use crate::plan::trail;
use crate::policy::PolicySpec;
use crate::root::{FileKind, Follow, Metadata, Root};
use crate::staging::{Standing, standing};
use crate::sync::retention::keep_only;
use crate::sync::{self, Options, Rate, SyncReport};

/// Connections of a run unless its job says otherwise, and how often a file is sent again that changed or arrived damaged.
const WORKERS: usize = 2;
const RETRIES: u32 = 2;
/// Another run on the same target, a push by hand for instance, is waited for so many seconds.
const WAIT_SECONDS: u64 = 30;

/// What is smaller is there soon enough with the rest of its unit.
const EARLY_BYTES_MIN: u64 = 1 << 20;
/// What is being published into a source for longer is told.
const PUBLISHING_MAX_SECONDS: u64 = 60;

/// How the target says that it did not publish what came with something that failed.
const HELD_BACK: [&str; 2] = ["is held back", "is not published, since"];

/// What the runs of a job have in common.
pub(super) struct Plan<'a> {
    pub(super) job: &'a Job,
    pub(super) policy: &'a PolicySpec,
    pub(super) actor: &'a str,
    /// Where digests of the source are kept.
    pub(super) state: &'a Path,
    /// What is not to be sent at the moment of asking.
    pub(super) held_back: HeldBack,
    /// Which directory is watched, by device and inode.
    pub(super) followed: &'a dyn Fn() -> Option<(u64, u64)>,
    /// Whether a file of the source is in somebody's hands.
    pub(super) guard: Guard,
    /// The same of a file alone, whatever unit it lies in.
    pub(super) file_guard: Guard,
    /// What the targets of the job have in common.
    pub(super) shared: &'a SharedSource,
    /// What may go to each target now.
    pub(super) rate: Rate,
    /// The units that no other target of the job needs; `None` for all.
    pub(super) safe: &'a dyn Fn() -> Option<BTreeSet<RelPath>>,
    /// What a source of another machine had when it was looked at last.
    pub(super) looked: Looked,
    /// Is told what of such a source is not finished.
    pub(super) unfinished: Arc<dyn Fn(BTreeSet<RelPath>) + Send + Sync>,
}

/// When what a run has left may be had.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum Again {
    AtOnce,
    #[default]
    WhenLeftAlone,
    /// As long as so much is written to at once, each try compares more than it brings.
    Seldom,
}

/// A run that came to its end.
#[derive(Debug, Default)]
pub(super) struct Done {
    /// The target was spoken to, and had what there was to say.
    pub(super) reached: bool,
    /// Files that were left because somebody writes to them: they become ready again by themselves.
    pub(super) left: u64,
    /// When what is left may be had.
    pub(super) again: Again,
    /// Nothing but this is left, and what may speak of it: it changes again, and becomes ready again by itself.
    pub(super) held: BTreeSet<RelPath>,
    /// Files were left that changed between being listed and being read: somebody wrote to them just then. It is a failure
    /// where it goes on.
    pub(super) changing: Option<Trouble>,
    pub(super) generation: Option<u64>,
    pub(super) published: u64,
    pub(super) removed: u64,
    pub(super) verified_bytes: u64,
    pub(super) transferred_bytes: u64,
    pub(super) wire_bytes: u64,
    /// The units of the source that are there now or need not be, where all were compared.
    pub(super) units: Option<BTreeSet<RelPath>>,
    /// Units are to go that other targets may need.
    pub(super) needed: BTreeSet<RelPath>,
}

/// Sends `work`, which has been ready since then, to `target`.
///
/// # Errors
/// [`Trouble`] when not all of it is there now; what was published before stays.
pub(super) fn run(
    plan: &Plan<'_>,
    target: &str,
    (work, ready): (&Work, Instant),
    connect: &dyn Connect,
    tally: &Tally,
    stop: &AtomicBool,
) -> Result<Done, Trouble> {
    let job = plan.job;
    let failed = |error: &dyn std::error::Error, exit| Trouble { message: chain(error), exit };
    let left_there;
    let mut again_held = BTreeSet::new();
    let mut left_when = Again::default();
    let (source, mut options): (Box<dyn Source>, Options) = match job.remote_source() {
        Some(_) => {
            let mut options = options(plan, FilterSpec { rules: job.exclude.clone(), only: None });
            let address = job.remote_source().unwrap_or_default();
            let source = || connect.source(address, job.connections, tally);
            let found = fetch::look(job, &options.scan, &plan.looked, &source, tally, stop)?;
            options.begin.filter.rules.extend(found.held.iter().map(line_for));
            left_there = u64::from(found.being_written);
            (plan.unfinished)(found.held);
            (Box::new(found.source), options)
        }
        None => {
            let root = Root::open(&job.source).map_err(|error| failed(&error, Exit::Io))?;
            let source =
                LocalSource::new(&job.source, Some(plan.state)).map_err(|error| failed(&error, error.exit()))?;
            // What lies in the place of a file system that was unmounted is not what is to be sent.
            let watched = (plan.followed)();
            let opened = [root.stat_root().ok().map(|found| (found.device, found.inode)), source.root_identity()];
            if watched.is_none() || opened.iter().any(|opened| *opened != watched) {
                return Ok(Done { left: 1, ..Done::default() });
            }
            let held = (plan.held_back)();
            // Too much of it for a filter, in one directory that has none above: it becomes less when it is left alone.
            let Some(out) = LeftOut::of(work, &held) else { return Ok(Done { left: 1, ..Done::default() }) };
            let again = out.touches(work, &held);
            left_when = if out.coarse { Again::Seldom } else { Again::AtOnce };
            let Some(filter) = filter(plan, work, &out.paths, again, &root) else {
                return Ok(Done { left: u64::from(again), again: left_when, held, ..Done::default() });
            };
            left_there = u64::from(again);
            if again {
                again_held = held;
            }
            let steady = published_whole(&root)?;
            let mut options = options(plan, filter);
            if let Some(rule) = job.retain.filter(|_| options.scan.filter.only.is_none()) {
                keep_only(&mut options, &root, rule, (plan.safe)()).map_err(|error| failed(&error, error.exit()))?;
            }
            let view = plan.shared.view(source, ready);
            let source = Guarded::new(view, Arc::clone(&plan.guard), Arc::clone(&plan.held_back)).steady(steady);
            let source = source.fitting(units::goes_with_what_it_names(job, &root)?);
            let source = source.whole(units::all_of_it(job, &root, &options.scan.filter)?);
            (Box::new(source), options)
        }
    };
    let trail = source.trail().map_err(|error| failed(&error, error.exit()))?;
    // A circle through a server that cannot tell who it is shows when what went out comes back.
    if let Some((own, before)) = trail.split_last()
        && let Some(message) = trail::refusal(before, own)
    {
        return Err(Trouble { message, exit: Exit::Usage });
    }
    options.begin.trail = trail;
    let target = connect.target(target, job.connections, tally)?;
    match sync::run(&*source, &*target, &options, tally, stop) {
        Ok(report) => {
            let units = options.retain.map(|of| of.source.into_iter().map(|unit| unit.path).collect());
            let done = concluded(report)?;
            let alone = done.left == 0;
            let again = if alone { left_when } else { Again::default() };
            let held = if alone { again_held } else { BTreeSet::new() };
            Ok(Done { units, again, held, left: done.left + left_there, ..done })
        }
        // A unit was begun between asking what is not finished and looking.
        Err(Error::Remote { message, .. }) if [NOT_STEADY, NOT_WHOLE].contains(&message.as_str()) => {
            Ok(Done { left: 1, again: Again::AtOnce, ..Done::default() })
        }
        Err(Error::Remote { message, .. }) if message == BEING_WRITTEN => Ok(Done { left: 1, ..Done::default() }),
        Err(error) => Err(failed(&error, error.exit())),
    }
}

/// Stages files of units that are not finished at `target`. `None` where there is nothing worth it.
///
/// # Errors
/// [`Trouble`] when not all of it is staged.
pub(super) fn stage(
    plan: &Plan<'_>,
    target: &str,
    (paths, ready): (&BTreeSet<RelPath>, Instant),
    connect: &dyn Connect,
    tally: &Tally,
    stop: &AtomicBool,
) -> Result<Option<Done>, Trouble> {
    let failed = |error: &dyn std::error::Error, exit| Trouble { message: chain(error), exit };
    let root = Root::open(&plan.job.source).map_err(|error| failed(&error, Exit::Io))?;
    let large = |path: &&RelPath| {
        let found = root.stat(path, Follow::Never);
        found.is_ok_and(|found| found.kind == FileKind::Regular && found.size >= EARLY_BYTES_MIN)
    };
    let only: Vec<Vec<u8>> = paths.iter().filter(large).map(|path| path.as_bytes().to_vec()).collect();
    if only.is_empty() {
        return Ok(None);
    }
    let mut options = options(plan, FilterSpec { rules: plan.job.exclude.clone(), only: Some(only) });
    options.begin.stage_only = true;
    (options.delete, options.begin.trash_seconds) = (false, None);
    let source = LocalSource::new(&plan.job.source, Some(plan.state)).map_err(|error| failed(&error, error.exit()))?;
    // That its unit is not finished is known.
    let view = plan.shared.view(source, ready);
    let source = Guarded::new(view, Arc::clone(&plan.file_guard), Arc::new(BTreeSet::new));
    options.begin.trail = source.trail().map_err(|error| failed(&error, error.exit()))?;
    let target = connect.target(target, plan.job.connections, tally)?;
    let report = sync::run(&source, &*target, &options, tally, stop).map_err(|error| failed(&error, error.exit()))?;
    concluded(report).map(Some)
}

/// Whether nothing is published into the source while it is listed: half of that is not passed on.
///
/// # Errors
/// [`Trouble`] where somebody has begun to publish long ago.
fn published_whole(root: &Root) -> Result<Steady, Trouble> {
    let before = standing(root);
    if let Standing::Publishing(since) = before
        && clock().saturating_sub(u64::try_from(since.seconds).unwrap_or(0)) > PUBLISHING_MAX_SECONDS
    {
        let source = crate::error::shown(root.shown());
        let message = format!(
            "a run that publishes into '{source}' has not come to its end for a long time, or was interrupted; what it brings \
             is passed on when it is complete: the next push into that directory finishes it"
        );
        return Err(Trouble { message, exit: Exit::TryAgain });
    }
    let root = root.reopen().map_err(|error| Trouble { message: chain(&error), exit: Exit::Io })?;
    Ok(Arc::new(move || !matches!(before, Standing::Publishing(_)) && standing(&root) == before))
}

/// Whether something of the work, which was finished when it was handed out, is not any more.
fn changes_again(work: &Work, held: &BTreeSet<RelPath>) -> bool {
    let touches = |a: &RelPath, b: &RelPath| a.is_within(b) || b.is_within(a);
    held.iter().any(|held| match work {
        Work::Paths(paths) => paths.iter().any(|path| touches(path, held)),
        Work::Everything { except } => !except.iter().any(|left| touches(left, held)),
    })
}

/// gitignore lines of what may say that something else is there.
fn pointers(job: &Job) -> impl Iterator<Item = String> {
    let usual = POINTERS.iter().map(|name| String::from_utf8_lossy(name).into_owned());
    usual.chain(job.last.iter().cloned())
}

/// What a run leaves out since it is not finished.
struct LeftOut {
    /// Paths that cover it, few enough to be rules of a filter.
    paths: BTreeSet<RelPath>,
    /// They cover more than it: what is finished and lies beside it waits for the next run.
    coarse: bool,
}

impl LeftOut {
    /// What is `held` and what the work leaves out anyway. `None` where that cannot be told by a filter.
    fn of(work: &Work, held: &BTreeSet<RelPath>) -> Option<LeftOut> {
        let mut all = held.clone();
        if let Work::Everything { except } = work {
            all.extend(except.iter().cloned());
        }
        match gathered(all.clone()) {
            Some(paths) if paths == all => Some(LeftOut { paths, coarse: false }),
            // Much of what the work leaves out may be gone by now, and nobody tells of what was never sent.
            _ => {
                let paths = gathered(held.clone())?;
                Some(LeftOut { coarse: paths != *held, paths })
            }
        }
    }

    /// Whether something of the work, which was finished when it was handed out, is left out now.
    fn touches(&self, work: &Work, held: &BTreeSet<RelPath>) -> bool {
        let beside = match work {
            Work::Everything { .. } => self.coarse,
            Work::Paths(_) => self.coarse && changes_again(work, &self.paths),
        };
        beside || changes_again(work, held)
    }
}

/// What of the source takes part; `None` where nothing of the work is left to do. Where something of it changes `again`, no
/// pointer goes: it may name just that.
fn filter(plan: &Plan<'_>, work: &Work, held: &BTreeSet<RelPath>, again: bool, root: &Root) -> Option<FilterSpec> {
    let job = plan.job;
    let mut filter = FilterSpec { rules: job.exclude.clone(), only: None };
    // The work may have waited for long: what changes again since then is left out, and comes when it is finished.
    filter.rules.extend(held.iter().map(line_for));
    if again {
        filter.rules.extend(pointers(job));
    }
    match work {
        Work::Everything { .. } => {}
        Work::Paths(paths) => {
            let found = paths.iter().filter_map(|path| Some((path, root.stat(path, Follow::Never).ok()?)));
            let found: Vec<(&RelPath, Metadata)> = found.collect();
            let gone = found.len() < paths.len();
            // RACE: a pointer may name another unit by now than it did when it became ready: it goes with what it names, or
            // waits for it.
            let mut named_too = Vec::new();
            for (pointer, named) in named_now(job, paths, root) {
                if held.contains(&named) || named.ancestors().any(|above| held.contains(&above)) {
                    filter.rules.push(line_for(pointer));
                } else if !paths.contains(&named) {
                    named_too.push(named.as_bytes().to_vec());
                }
            }
            // What is to be removed there is compared with everything: the limits on deleting are of the whole.
            if gone && job.delete != Delete::Never {
                return Some(filter);
            }
            // Of a file with several names only the one is known by which it was written.
            if found.iter().any(|(_, found)| found.kind == FileKind::Regular && found.links > 1) {
                return Some(filter);
            }
            let mut only: Vec<Vec<u8>> = found.iter().map(|(path, _)| path.as_bytes().to_vec()).collect();
            only.extend(named_too);
            if only.is_empty() {
                return None;
            }
            // Which units stay is a matter of all of them.
            if job.retain.is_some() && paths.iter().any(|path| is_unit(job, path)) {
                return Some(filter);
            }
            filter.only = Some(only);
        }
    }
    Some(filter)
}

/// The pointers of `paths`, with what they name at the moment.
fn named_now<'a>(job: &Job, paths: &'a BTreeSet<RelPath>, root: &Root) -> Vec<(&'a RelPath, RelPath)> {
    let rules = Rules::new(job.settle.0, job.ready.clone(), job.unit.as_deref(), &job.last);
    let Ok(rules) = rules else { return Vec::new() };
    let pointers = paths.iter().filter(|path| rules.is_pointer(path, false));
    pointers.filter_map(|pointer| Some((pointer, complete::named_by(root, pointer)?))).collect()
}

fn is_unit(job: &Job, path: &RelPath) -> bool {
    let globs = FilterSpec { rules: job.unit.iter().cloned().collect(), only: None };
    Filter::compile(&globs).is_ok_and(|unit| !unit.admits(path, true))
}

/// What is asked of the engine.
fn options(plan: &Plan<'_>, filter: FilterSpec) -> Options {
    let job = plan.job;
    let threads = Threads::at_most(job.threads);
    let mut options = Options {
        scan: ScanOptions {
            filter: filter.clone(),
            whole: job.remote_source().is_some(),
            threads,
            ..ScanOptions::default()
        },
        begin: BeginOptions {
            policy: plan.policy.clone(),
            filter,
            last: job.last.clone(),
            units: job.unit.iter().cloned().collect(),
            append_only: job.append_only.clone(),
            wait_seconds: WAIT_SECONDS,
            trash_seconds: job.trash_seconds(),
            threads,
            actor: plan.actor.to_owned(),
            source: crate::error::shown(&job.source).to_string(),
            ..BeginOptions::default()
        },
        delete: job.delete != Delete::Never,
        retain: None,
        max_delete: job.max_delete,
        workers: job.connections.map_or(WORKERS, usize::from),
        retries: RETRIES,
        bandwidth: plan.rate.clone(),
    };
    options.scan.append_only = sync::only_growing(&options.begin);
    options
}

fn concluded(report: SyncReport) -> Result<Done, Trouble> {
    let mut failed: Vec<_> = report.problems.iter().filter(|problem| problem.severity == Severity::Failed).collect();
    let all = failed.len();
    let changed = |problem: &&Problem| problem.message.starts_with(CHANGED);
    let changing: Vec<_> = failed.iter().copied().filter(changed).collect();
    failed.retain(|problem| problem.message != BEING_WRITTEN && !changed(problem));
    let left = (all - failed.len()) as u64;
    // What was held back with them is no failure either: it is looked at again together with them.
    failed.retain(|problem| left == 0 || !HELD_BACK.iter().any(|held| problem.message.starts_with(held)));
    if let Some(trouble) = first_of(&failed) {
        return Err(trouble);
    }
    let committed = report.committed.unwrap_or_default();
    Ok(Done {
        left,
        reached: true,
        again: Again::default(),
        held: BTreeSet::new(),
        changing: first_of(&changing),
        units: None,
        needed: report.needed,
        generation: Some(committed.generation),
        published: committed.published,
        removed: committed.removed,
        verified_bytes: report.verified_bytes,
        transferred_bytes: report.transferred_bytes,
        wire_bytes: report.wire_bytes,
    })
}

/// The first of what failed, and how much more there is.
fn first_of(failed: &[&Problem]) -> Option<Trouble> {
    let first = failed.first()?;
    let path = first.path.as_ref().map_or_else(|| ".".to_owned(), ToString::to_string);
    let more = if failed.len() > 1 { format!(" (and {} more paths)", failed.len() - 1) } else { String::new() };
    Some(Trouble { message: format!("'{path}': {}{more}", first.message), exit: Exit::Incomplete })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_somebody_wrote_to_just_then_is_left_and_what_failed_otherwise_fails() {
        let concluded_with = |messages: &[&str]| {
            let mut report = SyncReport::of_nothing(Instant::now());
            let problem = |message: &&str| Problem {
                path: RelPath::new("a").ok(),
                message: (*message).to_owned(),
                severity: Severity::Failed,
            };
            report.problems = messages.iter().map(problem).collect();
            concluded(report)
        };
        let changed = format!("{CHANGED}; push again when its writer has finished");
        let held = format!("{} 'b' failed", HELD_BACK[0]);
        let done = concluded_with(&[&changed, BEING_WRITTEN, &held]).unwrap();
        assert_eq!(done.left, 2);
        assert_eq!(done.changing.unwrap().message, format!("'a': {changed}"));
        assert!(concluded_with(&[BEING_WRITTEN]).unwrap().changing.is_none());
        let trouble = concluded_with(&[&changed, "cannot read it", "nor this"]).unwrap_err();
        assert_eq!(trouble.message, "'a': cannot read it (and 1 more paths)");
    }
}
