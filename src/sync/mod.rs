//! The one pipeline that push, pull and dry runs go through, whatever the two sides are.
//!
//! scan source, compare at the target, check that it is safe, stage, verify, publish. The engine is blocking; each of
//! its worker threads owns a reader and a writer, and a block of content passes from one to the other untouched.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::endpoint::local::POINTERS;
use crate::endpoint::{BeginOptions, CommitOptions, Committed, Crew, Error, ScanOptions, Source, Target};
use crate::filter::{Filter, FilterSpec, Globs};
use crate::manifest::{Digest, Tree};
use crate::monitor::{Counters, Event, Monitor, Phase, Problem, Severity};
use crate::path::RelPath;
use crate::plan::retain::{Retention, Retired};
use crate::plan::safety::{self, DeleteLimit};
use crate::plan::{Change, Need, Plan};

pub(crate) mod delta;
mod listed;
mod pace;
mod queue;
pub mod repair;
pub mod retention;
mod way;
mod worker;

use pace::Pace;
pub use pace::Rate;
use queue::Queue;
pub use way::{IoClass, WayError, give_way};

/// How a run is done.
#[derive(Debug, Clone)]
pub struct Options {
    /// How the source is scanned.
    pub scan: ScanOptions,
    /// How the target is treated.
    pub begin: BeginOptions,
    /// Remove at the target what the source does not have.
    pub delete: bool,
    /// Keep only some units at the target, whatever `delete` says.
    pub retain: Option<Retention>,
    /// How much may be removed at most.
    pub max_delete: DeleteLimit,
    /// Worker threads, at least 1.
    pub workers: usize,
    /// How often a file is sent again after its content did not match or it changed while it was read.
    pub retries: u32,
    /// At most so many bytes a second, on the wire where there is one.
    pub bandwidth: Rate,
}

/// What a run did.
#[derive(Debug)]
pub struct SyncReport {
    /// The source's tree, as it was listed.
    pub tree: Arc<Tree>,
    /// What was to be done; actions refer to `tree`.
    pub plan: Plan,
    /// What was published; `None` for a dry run.
    pub committed: Option<Committed>,
    /// Paths that failed or were left out, in the order they were met.
    pub problems: Vec<Problem>,
    /// Files whose content was staged and verified in this run.
    pub verified_files: u64,
    /// Their bytes.
    pub verified_bytes: u64,
    /// Bytes of content that the source had to deliver.
    pub transferred_bytes: u64,
    /// Bytes that went over the wire, both directions, compressed; 0 where there is none.
    pub wire_bytes: u64,
    /// Units that are taken away, or would be, because the run is to keep only some.
    pub retired: BTreeSet<RelPath>,
    /// Units that would be, but for other targets that may still need them.
    pub needed: BTreeSet<RelPath>,
    /// Whether removals were held back because of problems.
    pub deletion_held_back: bool,
    /// From start to end.
    pub elapsed: Duration,
}

impl SyncReport {
    /// A run that had nothing to do.
    pub(crate) fn of_nothing(started: Instant) -> SyncReport {
        SyncReport {
            tree: Arc::default(),
            plan: Plan::default(),
            committed: None,
            retired: BTreeSet::new(),
            needed: BTreeSet::new(),
            problems: Vec::new(),
            verified_files: 0,
            verified_bytes: 0,
            transferred_bytes: 0,
            wire_bytes: 0,
            deletion_held_back: false,
            elapsed: started.elapsed(),
        }
    }

    /// Whether every path of the source is at the target now (or would be).
    pub fn is_complete(&self) -> bool {
        !self.problems.iter().any(|problem| problem.severity == Severity::Failed)
    }
}

/// What the worker threads share.
struct Shared<'a> {
    tree: &'a Tree,
    /// Files that may be made of what the target has.
    alike: &'a [u32],
    /// What only grows.
    growing: Globs,
    queue: Queue,
    retries: u32,
    monitor: &'a dyn Monitor,
    pace: Pace,
    /// Bytes over the wire so far, both directions; 0 where there is none.
    wire_bytes: &'a (dyn Fn() -> u64 + Sync),
    /// The user's wish.
    stop: &'a AtomicBool,
    /// Another worker met an error that ends the run.
    broken: AtomicBool,
    outcome: Mutex<Outcome>,
}

impl Shared<'_> {
    /// Whether the file at `index` only grows.
    fn grows(&self, index: u32) -> bool {
        self.tree.entries().get(index as usize).is_some_and(|entry| self.growing.mean(&entry.path, false))
    }

    /// Whether the file at `index` may be made of what the target has.
    fn is_alike(&self, index: u32) -> bool {
        self.alike.binary_search(&index).is_ok()
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed) || self.broken.load(Ordering::Relaxed)
    }
}

/// So many digests are remembered at once: those of a large tree are never kept together.
const REMEMBERED: usize = 65_536;

#[derive(Default)]
struct Outcome {
    /// Those that the source is yet to be told, so that it remembers them.
    digests: Vec<(u32, Digest)>,
    /// Files that were to be compared and have another content than the target's.
    other: HashSet<u32>,
    failed: HashMap<u32, String>,
    verified_files: u64,
    verified_bytes: u64,
    error: Option<Error>,
}

/// Ends the run where the user wants it to. A monitor that says so too makes scans end early; what they found is then
/// not looked at.
fn check(stop: &AtomicBool) -> Result<(), Error> {
    if !stop.load(Ordering::Relaxed) {
        return Ok(());
    }
    Err(Error::Remote {
        message: "stopped before the end; nothing of this run is visible yet, what arrived is kept, and the same \
                  command goes on from there"
            .into(),
        exit: crate::error::Exit::TryAgain,
    })
}

/// Whether changed files are compared with what the target has: to do so costs both sides more than it saves where nothing is between them.
fn worth_comparing(source: &dyn Source, target: &dyn Target) -> bool {
    if source.is_far() { !target.is_far() && source.compares() } else { target.is_far() }
}

/// Makes `target` like `source`. `stop` ends the run before anything is published: what is staged stays for the next
/// one. Once publishing has begun the run goes to its end.
///
/// # Errors
/// What ended the run before anything was published. Single paths that failed are in the report.
pub fn run(
    source: &dyn Source,
    target: &dyn Target,
    options: &Options,
    monitor: &dyn Monitor,
    stop: &AtomicBool,
) -> Result<SyncReport, Error> {
    let started = Instant::now();
    if options.begin.stage_only && !target.stages_early() {
        return Ok(SyncReport::of_nothing(started));
    }
    monitor.event(Event::Phase(Phase::Scanning));
    let growing = only_growing(&options.begin);
    let scan = ScanOptions { append_only: growing.clone(), ..options.scan.clone() };
    let begin = BeginOptions {
        append_only: growing,
        deletes: options.delete,
        retires: options.retain.is_some(),
        delta: !options.begin.whole_files && worth_comparing(source, target),
        ..options.begin.clone()
    };
    let (begun, scanned) = std::thread::scope(|scope| {
        let begun = scope.spawn(|| target.begin(&begin, monitor));
        let scanned = source.scan(&scan, monitor);
        let begun = begun.join().unwrap_or_else(|_| Err(Error::Usage("an internal error stopped the target".into())));
        (begun, scanned)
    });
    begun?;
    let result = scanned.and_then(|mut scan| {
        check(stop)?;
        if !options.delete {
            scan.problems.extend(listed::missing(&options.scan.filter, &scan));
        }
        for problem in &scan.problems {
            monitor.event(Event::Problem(problem));
        }
        run_begun(source, target, options, monitor, stop, scan, started)
    });
    if let Err(error @ Error::Protocol { .. }) = &result {
        // A source that breaks the rules is not to be believed in anything it has said.
        target.reject(b"", &crate::error::chain(error));
    }
    if result.is_err() || options.begin.dry_run || options.begin.stage_only {
        target.abort();
    }
    result
}

fn run_begun(
    source: &dyn Source,
    target: &dyn Target,
    options: &Options,
    monitor: &dyn Monitor,
    stop: &AtomicBool,
    scan: crate::endpoint::Scan,
    started: Instant,
) -> Result<SyncReport, Error> {
    // With --delete a listed path is removed that way, where the target has it.
    let absent = if options.delete { listed::missing(&options.scan.filter, &scan) } else { Vec::new() };
    let tree = Arc::new(scan.tree);
    let mut problems = scan.problems;
    monitor.event(Event::Phase(Phase::Comparing));
    if problems.iter().any(|problem| problem.severity == Severity::Failed) {
        target.keeps_all();
    }
    let mut plan = target.diff(&tree, monitor)?;
    check(stop)?;
    let goes = |problem: &Problem| plan.removals.iter().any(|removal| problem.path.as_ref() == Some(&removal.path));
    for problem in absent.into_iter().filter(|problem| !goes(problem)) {
        monitor.event(Event::Problem(&problem));
        problems.push(problem);
    }
    let retired = retired(options, &tree, &mut plan)?;
    if options.delete {
        safety::check_removals(&tree, &plan, options.max_delete)
            .map_err(|refusal| Error::Refused { by: "the safety checks".into(), reason: refusal.to_string() })?;
    }
    let report = |tree, plan, committed, problems: Vec<Problem>, outcome: Outcome, held_back| SyncReport {
        tree,
        plan,
        committed,
        problems,
        verified_files: outcome.verified_files,
        verified_bytes: outcome.verified_bytes,
        transferred_bytes: Counters::get(&monitor.counters().transferred_bytes),
        wire_bytes: source.wire_bytes() + target.wire_bytes(),
        retired: retired.gone.clone(),
        needed: retired.needed.clone(),
        deletion_held_back: held_back,
        elapsed: started.elapsed(),
    };
    if options.begin.dry_run {
        compared(&mut plan, &Outcome::default());
        return Ok(report(tree, plan, None, problems, Outcome::default(), false));
    }

    let mut outcome = transfer(source, target, options, monitor, stop, &tree, &plan)?;
    let digests = std::mem::take(&mut outcome.digests);
    check(stop).inspect_err(|_| source.remember(&tree, &digests))?;
    if options.begin.stage_only {
        source.remember(&tree, &digests);
        return Ok(report(tree, plan, None, problems, outcome, false));
    }
    let not_listed = problems.iter().filter(|problem| problem.severity == Severity::Failed);
    let unreadable =
        not_listed.map(|problem| problem.path.as_ref().map_or_else(Vec::new, |path| path.as_bytes().to_vec()));
    let unreadable = unreadable.collect();
    let mut failed: Vec<u32> = outcome.failed.keys().copied().collect();
    failed.sort_unstable();
    for index in &failed {
        problems.push(Problem {
            path: tree.entries().get(*index as usize).map(|entry| entry.path.clone()),
            message: outcome.failed[index].clone(),
            severity: Severity::Failed,
        });
    }
    let any_failed = problems.iter().any(|problem| problem.severity == Severity::Failed);
    let kept = || monitor.event(Event::Warning("nothing was deleted at the target, because some paths failed"));
    let mut held_back = options.delete && any_failed && !plan.removals.is_empty();
    if held_back {
        kept();
    }
    monitor.event(Event::Phase(Phase::Publishing));
    let bytes = |paths: &BTreeSet<RelPath>| paths.iter().map(|path| path.as_bytes().to_vec()).collect();
    let (retire, spare) = if any_failed { Default::default() } else { (bytes(&retired.gone), bytes(&retired.needed)) };
    let delete = options.delete && !any_failed;
    let commit =
        CommitOptions { delete, delete_later: options.delete && any_failed, failed, unreadable, retire, spare };
    let committed = std::thread::scope(|scope| {
        // What was hashed is stored while it is published, and does not hold that up.
        scope.spawn(|| source.remember(&tree, &digests));
        target.commit(&commit, monitor)
    })?;
    if committed.held_back && !held_back {
        kept();
        held_back = true;
    }
    for (path, why) in &committed.put_off {
        monitor
            .event(Event::Warning(&format!("'{path}' is not removed for now: {why}; the next run looks at it again")));
    }
    for (path, message) in &committed.problems {
        let problem = Problem {
            path: crate::path::RelPath::new(path.as_bytes()).ok(),
            message: message.clone(),
            severity: Severity::Failed,
        };
        monitor.event(Event::Problem(&problem));
        problems.push(problem);
    }
    monitor.event(Event::Phase(Phase::Done));
    compared(&mut plan, &outcome);
    Ok(report(tree, plan, Some(committed), problems, outcome, held_back))
}

/// The units that are not to stay, which are no removals of the plan any more.
fn retired(options: &Options, tree: &Tree, plan: &mut Plan) -> Result<Retired, Error> {
    let Some(retention) = &options.retain else { return Ok(Retired::default()) };
    let retention = retention.as_found(&|unit| tree.position(unit).is_some());
    let spec = FilterSpec { rules: options.begin.units.clone(), only: None };
    let units = Filter::compile(&spec).map_err(|error| Error::Usage(crate::error::chain(&error)))?;
    let retired = retention.decide(plan, &units);
    let decided = |path: &RelPath| retired.gone.contains(path) || retired.needed.contains(path);
    // They are limited by their own rule, not by that for removals.
    plan.removals.retain(|removal| !decided(&removal.path) && !removal.path.ancestors().any(|above| decided(&above)));
    Ok(retired)
}

/// What the comparisons that the target asked for have shown, for the report. A dry run reads nothing, and shows
/// nothing of files that only reading would tell.
fn compared(plan: &mut Plan, outcome: &Outcome) {
    if !plan.actions.iter().any(|action| matches!(action.need, Need::Compare { .. })) {
        return;
    }
    plan.actions.retain_mut(|action| {
        if !matches!(action.need, Need::Compare { .. }) {
            return true;
        }
        if outcome.other.contains(&action.index) {
            (action.change, action.differences.content) = (Change::Modified, true);
        }
        action.differences.any() || outcome.failed.contains_key(&action.index)
    });
}

/// Globs of what only grows, for the source too ([`ScanOptions::append_only`]): what is published last, or as a part of something, is nothing that may be read as far as it has come.
pub fn only_growing(options: &BeginOptions) -> Vec<String> {
    if options.append_only.is_empty() {
        return Vec::new();
    }
    let own = POINTERS.iter().map(|&name| name.to_owned());
    let last = own.chain(options.last.iter().filter(|glob| !glob.starts_with('!')).cloned());
    let within = options.units.iter().map(|unit| {
        let unit = unit.trim_end_matches('/');
        if unit.contains('/') { format!("{unit}/**") } else { format!("**/{unit}/**") }
    });
    options.append_only.iter().cloned().chain(last.chain(within).map(|glob| format!("!{glob}"))).collect()
}

fn transfer(
    source: &dyn Source,
    target: &dyn Target,
    options: &Options,
    monitor: &dyn Monitor,
    stop: &AtomicBool,
    tree: &Arc<Tree>,
    plan: &Plan,
) -> Result<Outcome, Error> {
    // Who wants all to be hashed does not want to hear that something was before.
    let growing = if options.scan.hash_all { Vec::new() } else { only_growing(&options.begin) };
    let growing = Globs::compile(&growing).map_err(|error| Error::Usage(crate::error::chain(&error)))?;
    let queue = Queue::new(tree, plan);
    let counters = monitor.counters();
    Counters::add(&counters.total_files, queue.files() as u64);
    Counters::add(&counters.total_bytes, queue.bytes());
    monitor.event(Event::Phase(Phase::Transferring));
    // A worker more than there is work for would cost a connection and do nothing.
    let useful = |crew: Crew| {
        let worth = 1 + queue.bytes() / crew.bytes.max(1) + queue.files() as u64 / crew.files.max(1);
        crew.workers.max(1).min(usize::try_from(worth).unwrap_or(usize::MAX))
    };
    let workers = options.workers.clamp(1, queue.files().max(1)).min(useful(source.crew())).min(useful(target.crew()));
    let wire_bytes = || source.wire_bytes() + target.wire_bytes();
    let shared = Shared {
        tree,
        alike: &plan.alike,
        growing,
        queue,
        retries: options.retries,
        monitor,
        pace: Pace::new(options.bandwidth.clone()),
        wire_bytes: &wire_bytes,
        stop,
        broken: AtomicBool::new(false),
        outcome: Mutex::new(Outcome::default()),
    };
    if shared.queue.files() > 0 {
        source.expect(shared.queue.bytes(), shared.queue.files());
        target.expect(shared.queue.bytes(), shared.queue.files());
        std::thread::scope(|scope| {
            for _ in 0..workers {
                scope.spawn(|| {
                    let result = worker::work(source, target, tree, &shared);
                    if let Err(error) = result {
                        shared.broken.store(true, Ordering::Relaxed);
                        // The first error is the cause; those of the other workers follow from it.
                        lock(&shared.outcome).error.get_or_insert(error);
                    }
                });
            }
        });
        source.remark(monitor);
        target.remark(monitor);
    }
    let mut outcome = shared.outcome.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    match outcome.error.take() {
        Some(error) => {
            source.remember(tree, &outcome.digests);
            Err(error)
        }
        None => Ok(outcome),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// The bytes that `plan` asks the source for.
pub fn bytes_needed(tree: &Tree, plan: &Plan) -> u64 {
    plan.actions
        .iter()
        .map(|action| {
            let size = tree.entries()[action.index as usize].file().map_or(0, |(size, _)| size);
            match &action.need {
                Need::Nothing => 0,
                Need::Content { resume_at } => size.saturating_sub(*resume_at),
                Need::Compare { .. } => size,
            }
        })
        .fold(0, u64::saturating_add)
}
