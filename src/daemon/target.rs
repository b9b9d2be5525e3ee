//! One target of a job, on a thread of its own: it waits for work, does it, and tries again what failed.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::feed::Ready;
use super::pending::Pending;
use super::run::{Done, Plan, run};
use super::status::{Publication, State, TargetStatus, Trouble as TroubleStatus};
use super::tally::Tally;
use super::{Connect, Trouble, clock, recent::Recent, remedy};
use crate::error::Exit;

/// What is known of a target, and what wakes its thread.
pub(super) struct Lane {
    pub(super) target: String,
    inner: Mutex<Inner>,
    woken: Condvar,
    stop: Arc<AtomicBool>,
}

#[derive(Default)]
struct Inner {
    pending: Pending,
    paused: bool,
    /// The run that goes on.
    tally: Option<Arc<Tally>>,
    failures_in_a_row: u64,
    next_try: Option<Instant>,
    halted: bool,
    /// All that was added up to this number is published.
    done_through: u64,
    known: TargetStatus,
}

/// What became of a run.
pub(super) enum Happened<'a> {
    /// All that was to be done is; `changed` where that was anything.
    Published { changed: bool },
    /// It failed, and the one before had not.
    BeganToFail(&'a Trouble),
}

impl Lane {
    pub(super) fn new(target: &str, stop: Arc<AtomicBool>) -> Lane {
        let known = TargetStatus { target: target.to_owned(), ..TargetStatus::default() };
        let inner = Mutex::new(Inner { known, ..Inner::default() });
        Lane { target: target.to_owned(), inner, woken: Condvar::new(), stop }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Something may be sent, since `at`, which is the same for all targets.
    pub(super) fn add(&self, ready: Ready, number: u64, at: Instant) {
        let mut inner = self.inner();
        inner.pending.add(ready, number, at);
        self.woken.notify_all();
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

    /// Tries again at once what waits for its time.
    pub(super) fn hurry(&self) {
        self.inner().next_try = None;
        self.woken.notify_all();
    }

    /// Wakes the thread, which looks at its stop flag.
    pub(super) fn wake(&self) {
        // Taken and given back, so that nobody is between looking at the flag and waiting.
        drop(self.inner());
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
        while let Some((work, ready, through, tally)) = self.wait(&plan.job.name) {
            let started = Instant::now();
            let result = run(plan, &self.target, (&work, ready), connect, &tally, &self.stop);
            let stopped = self.stop.load(Ordering::Relaxed);
            let mut inner = self.inner();
            inner.tally = None;
            match result {
                Ok(done) => {
                    let left = done.left > 0;
                    if left {
                        inner.pending.put_back(work);
                        inner.left(plan.job.settle.0);
                    } else {
                        inner.done_through = through;
                    }
                    inner.succeeded(&done);
                    drop(inner);
                    self.tell(plan, &done, started.elapsed(), recent);
                    if !left {
                        happened(Happened::Published { changed: done.published + done.removed > 0 });
                    }
                }
                Err(trouble) => {
                    inner.pending.put_back(work);
                    if stopped {
                        return;
                    }
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

    /// Waits for work, and says since when it is ready; `None` to end.
    fn wait(&self, job: &str) -> Option<(super::pending::Work, Instant, u64, Arc<Tally>)> {
        let mut inner = self.inner();
        loop {
            if self.stop.load(Ordering::Relaxed) {
                return None;
            }
            let now = Instant::now();
            let early = inner.next_try.filter(|&at| at > now);
            if !inner.paused
                && early.is_none()
                && let Some(work) = inner.pending.take()
            {
                let tally = Arc::new(Tally::new(job, &self.target, Arc::clone(&self.stop)));
                inner.tally = Some(Arc::clone(&tally));
                inner.next_try = None;
                return Some((work, inner.pending.ready(now), inner.pending.through(), tally));
            }
            inner = match early.filter(|_| !inner.paused && !inner.pending.is_empty()) {
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

    fn succeeded(&mut self, done: &Done) {
        let now = clock();
        self.pending.done(Instant::now());
        (self.failures_in_a_row, self.halted) = (0, false);
        self.known.runs += 1;
        self.known.last_success = Some(now);
        self.known.last_error = None;
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
