//! What a run of a target reports, kept for the status and told to the log.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::time::Instant;

use super::status::{Progress, State};
use crate::monitor::{Counters, Event, Monitor, Phase, Severity};

/// The monitor of one run.
pub(super) struct Tally {
    job: String,
    target: String,
    counters: Counters,
    phase: AtomicU8,
    started: Instant,
    stop: Arc<AtomicBool>,
}

impl Tally {
    pub(super) fn new(job: &str, target: &str, stop: Arc<AtomicBool>) -> Tally {
        let (job, target) = (job.to_owned(), target.to_owned());
        Tally { job, target, counters: Counters::default(), phase: AtomicU8::new(0), started: Instant::now(), stop }
    }

    /// What the run is at.
    pub(super) fn state(&self) -> State {
        match self.phase.load(Ordering::Relaxed) {
            1 => State::Scanning,
            2 => State::Comparing,
            3 => State::Transferring,
            4 => State::Publishing,
            _ => State::Connecting,
        }
    }

    pub(super) fn progress(&self) -> Progress {
        let seconds = self.started.elapsed().as_secs_f64();
        let done_bytes = Counters::get(&self.counters.done_bytes);
        Progress {
            done_files: Counters::get(&self.counters.done_files),
            total_files: Counters::get(&self.counters.total_files),
            done_bytes,
            total_bytes: Counters::get(&self.counters.total_bytes),
            bytes_per_second: if seconds > 0.0 { (done_bytes as f64 / seconds) as u64 } else { 0 },
            seconds: seconds as u64,
        }
    }
}

impl Monitor for Tally {
    fn event(&self, event: Event<'_>) {
        let (job, target) = (self.job.as_str(), self.target.as_str());
        match event {
            Event::Phase(phase) => {
                let number = match phase {
                    Phase::Connecting => 0,
                    Phase::Scanning => 1,
                    Phase::Comparing => 2,
                    Phase::Transferring | Phase::Verifying => 3,
                    Phase::Publishing | Phase::Done => 4,
                };
                self.phase.store(number, Ordering::Relaxed);
            }
            Event::Detail(text) => tracing::debug!(job, target, "{text}"),
            Event::Warning(text) => tracing::warn!(job, target, "{text}"),
            Event::Problem(problem) => {
                let path = problem.path.as_ref().map_or_else(|| ".".to_owned(), ToString::to_string);
                match problem.severity {
                    Severity::Skipped => tracing::debug!(job, target, path, "left out: {}", problem.message),
                    Severity::Failed => tracing::warn!(job, target, path, "{}", problem.message),
                }
            }
        }
    }

    fn counters(&self) -> &Counters {
        &self.counters
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }
}
