//! One target of a job, on a thread of its own: it waits for work, does it, and tries again what failed.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::feed::Ready;
use super::pending::{Pending, Work};
use super::run::{Again, Done, Plan, run, stage};
use super::status::{Publication, State, TargetStatus, Trouble as TroubleStatus};
use super::tally::Tally;
use super::{Connect, Trouble, clock, recent::Recent, remedy};
use crate::error::Exit;
use crate::path::RelPath;

/// What is known of a target, and what wakes its thread.
pub(super) struct Lane {
    pub(super) target: String,
    inner: Mutex<Inner>,
    woken: Condvar,
    stop: Arc<AtomicBool>,
    /// Something is to be published: what is only staged waits.
    interrupt: Arc<AtomicBool>,
}

/// What a target is to get.
enum Task {
    /// With the time since when all of it is ready.
    Publish(Work, Instant),
    /// Files of units that are not finished, likewise.
    Stage(BTreeSet<RelPath>, Instant),
}

/// How long nothing is staged early after that failed.
const EARLY_PAUSE: Duration = Duration::from_secs(30);

/// Of the time, runs that have to leave out more than is unfinished take at most one part in so many.
const SELDOM_SHARE: u32 = 4;

/// So many runs in a row may find that the same file changed under the reader, before that is told as a failure.
const CHANGING_MAX: u32 = 5;

#[derive(Default)]
struct Inner {
    pending: Pending,
    paused: bool,
    /// The source is not there.
    held: bool,
    /// The run that goes on.
    tally: Option<Arc<Tally>>,
    failures_in_a_row: u64,
    /// What was said of a file that changed while it was read, and how many runs in a row said the same.
    changing: Option<(String, u32)>,
    next_try: Option<Instant>,
    halted: bool,
    no_early_before: Option<Instant>,
    /// All that was added up to this number is published.
    done_through: u64,
    /// Units are to go there that other targets may need.
    keeps_needed: bool,
    known: TargetStatus,
}

/// What became of a run.
pub(super) enum Happened<'a> {
    /// All that was to be done is; `changed` where that was anything. `units` are those of the source that are there now or
    /// need not be, where that is known; `needed` those that were to go there and that other targets may need.
    Published { changed: bool, units: Option<&'a BTreeSet<RelPath>>, needed: &'a BTreeSet<RelPath> },
    /// It failed, and the one before had not.
    BeganToFail(&'a Trouble),
}

impl Lane {
    pub(super) fn new(target: &str, stop: Arc<AtomicBool>) -> Lane {
        let known = TargetStatus { target: target.to_owned(), ..TargetStatus::default() };
        let inner = Mutex::new(Inner { known, ..Inner::default() });
        Lane { target: target.to_owned(), inner, woken: Condvar::new(), stop, interrupt: Arc::default() }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Something may be sent, since `at`, which is the same for all targets.
    pub(super) fn add(&self, ready: Ready, number: u64, at: Instant) {
        let mut inner = self.inner();
        if !matches!(ready, Ready::Early(_)) {
            self.interrupt.store(true, Ordering::Relaxed);
        }
        inner.pending.add(ready, number, at);
        self.woken.notify_all();
    }

    /// Another target has got more units: where some were to go that it needed, all is looked at again.
    pub(super) fn look_at_needed(&self) {
        let mut inner = self.inner();
        if std::mem::take(&mut inner.keeps_needed) {
            let through = inner.pending.through();
            inner.pending.add(Ready::Everything { except: BTreeSet::new() }, through, Instant::now());
            self.woken.notify_all();
        }
    }

    /// All that was added up to this number is published.
    pub(super) fn done_through(&self) -> u64 {
        self.inner().done_through
    }

    /// Begins no run from now on, or begins them again.
    pub(super) fn pause(&self, paused: bool) {
        self.inner().paused = paused;
        self.woken.notify_all();
    }

    /// Begins no run as long as the source is not there: what lies in its place is not to be sent, nor what is missing removed.
    pub(super) fn hold(&self, held: bool) {
        self.inner().held = held;
        self.woken.notify_all();
    }

    /// Tries again at once what waits for its time.
    pub(super) fn hurry(&self) {
        self.inner().next_try = None;
        self.woken.notify_all();
    }

    /// Wakes the thread, which looks at its stop flag.
    pub(super) fn wake(&self) {
        // Taken and given back, so that nobody is between looking at the flag and waiting.
        let inner = self.inner();
        self.interrupt.store(true, Ordering::Relaxed);
        drop(inner);
        self.woken.notify_all();
    }

    /// How it stands.
    pub(super) fn status(&self) -> TargetStatus {
        let inner = self.inner();
        let mut status = inner.known.clone();
        status.state = match &inner.tally {
            Some(tally) => tally.state(),
            None if inner.paused => State::Paused,
            None if inner.halted => State::Halted,
            None if inner.next_try.is_some() && inner.failures_in_a_row > 0 => State::Retrying,
            None => State::Idle,
        };
        status.progress = inner.tally.as_ref().map(|tally| tally.progress());
        status.lag_seconds = inner.pending.since().map_or(0, |since| since.elapsed().as_secs());
        let progress = status.progress.clone().unwrap_or_default();
        status.lag_bytes = progress.total_bytes.saturating_sub(progress.done_bytes);
        status.lag_units = match inner.pending.since() {
            None => 0,
            Some(_) => progress.total_files.saturating_sub(progress.done_files).max(1),
        };
        let wait = |at: Instant| clock() + at.saturating_duration_since(Instant::now()).as_secs();
        status.next_try = inner.next_try.filter(|_| inner.failures_in_a_row > 0).map(wait);
        status
    }

    /// The thread: ends when the stop flag is set.
    pub(super) fn serve(
        &self,
        plan: &Plan<'_>,
        connect: &dyn Connect,
        recent: &Recent,
        happened: &dyn Fn(Happened<'_>),
    ) {
        while let Some((task, through, tally)) = self.wait(&plan.job.name) {
            let (work, ready) = match task {
                Task::Publish(work, ready) => (work, ready),
                Task::Stage(paths, ready) => {
                    self.stage(plan, connect, (paths, ready), &tally);
                    continue;
                }
            };
            let started = Instant::now();
            let result = run(plan, &self.target, (&work, ready), connect, &tally, &self.stop);
            let stopped = self.stop.load(Ordering::Relaxed);
            let mut inner = self.inner();
            inner.tally = None;
            match inner.changing(result) {
                Ok(done) => {
                    let left = done.left > 0;
                    match Some(work).filter(|_| left).and_then(|work| work.without(&done.held)) {
                        Some(rest) => {
                            inner.pending.put_back(rest);
                            let settle = plan.job.settle.0;
                            inner.left(match done.again {
                                Again::AtOnce => Duration::ZERO,
                                Again::WhenLeftAlone => settle,
                                Again::Seldom => settle.max(started.elapsed() * SELDOM_SHARE),
                            });
                        }
                        None => inner.pending.done(Instant::now()),
                    }
                    if !left {
                        inner.done_through = through;
                        inner.keeps_needed = !done.needed.is_empty();
                    }
                    inner.succeeded(&done);
                    drop(inner);
                    self.tell(plan, &done, started.elapsed(), recent);
                    if !left {
                        let changed = done.published + done.removed > 0;
                        happened(Happened::Published { changed, units: done.units.as_ref(), needed: &done.needed });
                    }
                }
                Err(trouble) => {
                    inner.pending.put_back(work);
                    if stopped {
                        return;
                    }
                    connect.forget(&self.target);
                    plan.job.remote_source().inspect(|source| connect.forget(source));
                    inner.failed(&trouble, plan.job.retry_max.0);
                    let first = inner.failures_in_a_row == 1;
                    drop(inner);
                    self.tell_trouble(plan, &trouble, started.elapsed(), recent);
                    if first {
                        happened(Happened::BeganToFail(&trouble));
                    }
                }
            }
        }
    }

    /// Brings files of units that are not finished, until there is something to publish. A failure is nothing by itself: it is
    /// met again with the unit, and then counts.
    fn stage(
        &self,
        plan: &Plan<'_>,
        connect: &dyn Connect,
        (paths, ready): (BTreeSet<RelPath>, Instant),
        tally: &Tally,
    ) {
        let (job, target) = (plan.job.name.as_str(), self.target.as_str());
        let result = stage(plan, target, (&paths, ready), connect, tally, &self.interrupt);
        let interrupted = self.interrupt.load(Ordering::Relaxed);
        let mut inner = self.inner();
        inner.tally = None;
        match result {
            Ok(Some(done)) => {
                inner.known.transferred_bytes += done.transferred_bytes;
                inner.known.wire_bytes += done.wire_bytes;
                tracing::debug!(job, target, bytes = done.transferred_bytes, "staged early");
            }
            Ok(None) => {}
            // What is whole by now is not sent again.
            Err(_) if interrupted => inner.pending.put_back_early(paths),
            Err(trouble) => {
                tracing::debug!(job, target, "not staged early: {}", trouble.message);
                inner.no_early_before = Some(Instant::now() + EARLY_PAUSE);
                drop(inner);
                connect.forget(&self.target);
            }
        }
    }

    /// Waits for work; `None` to end.
    fn wait(&self, job: &str) -> Option<(Task, u64, Arc<Tally>)> {
        let mut inner = self.inner();
        loop {
            if self.stop.load(Ordering::Relaxed) {
                return None;
            }
            let now = Instant::now();
            let early = inner.next_try.filter(|&at| at > now);
            let rests = inner.paused || inner.held;
            if !rests
                && early.is_none()
                && let Some(work) = inner.pending.take()
            {
                let tally = Arc::new(Tally::new(job, &self.target, Arc::clone(&self.stop)));
                inner.tally = Some(Arc::clone(&tally));
                inner.next_try = None;
                let ready = inner.pending.ready(now);
                return Some((Task::Publish(work, ready), inner.pending.through(), tally));
            }
            // A target that fails gets no more to do.
            let may_stage = !rests && inner.failures_in_a_row == 0 && inner.no_early_before.is_none_or(|at| at <= now);
            if may_stage && let Some((finished, ready)) = inner.pending.take_early(now) {
                // Under the lock: what is added from now on interrupts it.
                self.interrupt.store(false, Ordering::Relaxed);
                let tally = Arc::new(Tally::new(job, &self.target, Arc::clone(&self.interrupt)));
                inner.tally = Some(Arc::clone(&tally));
                return Some((Task::Stage(finished, ready), 0, tally));
            }
            inner = match early.filter(|_| !rests && !inner.pending.is_empty()) {
                Some(at) => {
                    let waited = self.woken.wait_timeout(inner, at - now);
                    waited.map_or_else(|poisoned| poisoned.into_inner().0, |waited| waited.0)
                }
                None => self.woken.wait(inner).unwrap_or_else(PoisonError::into_inner),
            };
        }
    }

    fn tell(&self, plan: &Plan<'_>, done: &Done, took: Duration, recent: &Recent) {
        if done.published + done.removed == 0 {
            return;
        }
        let (job, target) = (plan.job.name.as_str(), self.target.as_str());
        let milliseconds = u64::try_from(took.as_millis()).unwrap_or(u64::MAX);
        let (published, removed, bytes) = (done.published, done.removed, done.transferred_bytes);
        tracing::info!(job, target, published, removed, bytes, milliseconds, "published");
        recent.add(Publication {
            time: clock(),
            job: job.to_owned(),
            target: target.to_owned(),
            generation: done.generation,
            files: done.published,
            bytes: done.verified_bytes,
            milliseconds,
            error: None,
        });
    }

    fn tell_trouble(&self, plan: &Plan<'_>, trouble: &Trouble, took: Duration, recent: &Recent) {
        let (job, target) = (plan.job.name.as_str(), self.target.as_str());
        let status = self.status();
        let times = status.last_error.as_ref().map_or(1, |error| error.times);
        let next_try_seconds = status.next_try.map_or(0, |at| at.saturating_sub(clock()));
        tracing::warn!(job, target, times, next_try_seconds, "{}", trouble.message);
        // Of a target that is away for a night the first failure says it.
        if times == 1 {
            recent.add(Publication {
                time: clock(),
                job: job.to_owned(),
                target: target.to_owned(),
                generation: None,
                files: 0,
                bytes: 0,
                milliseconds: u64::try_from(took.as_millis()).unwrap_or(u64::MAX),
                error: Some(trouble.message.clone()),
            });
        }
    }
}

impl Inner {
    /// Somebody writes to a part of what was to be sent: it is looked at again when he may have finished.
    fn left(&mut self, settle: Duration) {
        self.next_try = Some(Instant::now() + settle.max(Duration::from_millis(250)));
    }

    /// Makes a failure of files that change under the reader again and again, though nobody is seen writing to them.
    fn changing(&mut self, result: Result<Done, Trouble>) -> Result<Done, Trouble> {
        let mut done = result?;
        let Some(trouble) = done.changing.take() else {
            self.changing = None;
            return Ok(done);
        };
        let before = self.changing.take().filter(|(message, _)| *message == trouble.message);
        let times = before.map_or(1, |(_, times)| times + 1);
        self.changing = Some((trouble.message.clone(), times));
        if times >= CHANGING_MAX {
            // What it has brought nevertheless counts.
            self.brought(&done);
            return Err(trouble);
        }
        Ok(done)
    }

    fn succeeded(&mut self, done: &Done) {
        // What is in somebody's hands still says nothing of the target.
        if !done.reached {
            return;
        }
        (self.failures_in_a_row, self.halted) = (0, false);
        self.known.runs += 1;
        self.known.last_success = Some(clock());
        self.known.last_error = None;
        self.brought(done);
    }

    fn brought(&mut self, done: &Done) {
        self.known.generation = done.generation.or(self.known.generation);
        self.known.published_files += done.published;
        self.known.transferred_bytes += done.transferred_bytes;
        self.known.wire_bytes += done.wire_bytes;
    }

    fn failed(&mut self, trouble: &Trouble, longest: Duration) {
        self.failures_in_a_row += 1;
        self.known.runs += 1;
        self.known.failures += 1;
        // What a person has to put right is not better after a second: it is asked for now and then.
        self.halted = matches!(trouble.exit, Exit::Usage | Exit::Trust);
        let failures = if self.halted { u64::MAX } else { self.failures_in_a_row };
        self.next_try = Some(Instant::now() + super::backoff::wait(failures, longest));
        let same = self.known.last_error.as_ref().filter(|last| last.message == trouble.message);
        self.known.last_error = Some(TroubleStatus {
            time: clock(),
            message: trouble.message.clone(),
            hint: remedy(trouble.exit),
            times: same.map_or(1, |last| last.times + 1),
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_changes_under_the_reader_is_a_failure_when_it_goes_on() {
        let trouble = Trouble { message: "'a': changed while it was read".into(), exit: Exit::Incomplete };
        let changing = || Ok(Done { left: 1, changing: Some(trouble.clone()), ..Done::default() });
        let mut inner = Inner::default();
        for _ in 0..2 {
            for _ in 1..CHANGING_MAX {
                assert!(inner.changing(changing()).is_ok());
            }
            assert!(inner.changing(Ok(Done::default())).is_ok(), "it was left alone in between");
        }
        for _ in 1..CHANGING_MAX {
            assert!(inner.changing(changing()).is_ok());
        }
        // It is one failure, however often it is met again.
        for times in 1..4 {
            let failed = inner.changing(changing()).unwrap_err();
            assert_eq!(failed, trouble);
            inner.failed(&failed, Duration::from_secs(60));
            assert_eq!(inner.failures_in_a_row, times);
            assert_eq!(inner.known.last_error.as_ref().unwrap().times, times);
        }
    }
}
