//! What a person sees while a run goes on: one line that tells where it is, and the problems as they come.

use std::io::{IsTerminal, Write};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use indicatif::{BinaryBytes, HumanCount, HumanDuration};
use serde_json::json;

use crate::error::{Escaped, in_words, said};
use crate::monitor::{Counters, Event, Monitor, Phase, Problem, Severity};

/// Nothing is drawn while this is not 0: the terminal asks for something.
static PAUSED: AtomicUsize = AtomicUsize::new(0);

/// While it lives no progress is drawn.
pub(super) struct Pause;

/// Stops drawing.
pub(super) fn pause() -> Pause {
    PAUSED.fetch_add(1, Ordering::SeqCst);
    Pause
}

impl Drop for Pause {
    fn drop(&mut self) {
        PAUSED.fetch_sub(1, Ordering::SeqCst);
    }
}

/// How much is said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verbosity {
    /// Errors only.
    Quiet,
    /// Progress on a terminal, problems, the summary.
    Normal,
    /// Also what was chosen and why.
    Verbose,
}

/// Reports to standard error; with `json`, one object a line to standard output.
pub struct Display {
    state: Arc<State>,
    ticker: Option<JoinHandle<()>>,
    stop: Arc<AtomicBool>,
}

struct State {
    counters: Counters,
    verbosity: Verbosity,
    json: bool,
    progress: bool,
    phase: Mutex<Phase>,
    rate: Mutex<Rate>,
    line: Mutex<()>,
    done: AtomicBool,
}

/// How fast it goes, over the last few seconds.
struct Rate {
    at: Instant,
    bytes: u64,
    smooth: f64,
    /// How much of `smooth` is measured, from 0 to 1. At first little is, and a burst must not pass for the rate.
    known: f64,
}

impl Rate {
    /// Bytes a second, now that `bytes` are done.
    fn update(&mut self, bytes: u64) -> f64 {
        self.update_at(bytes, Instant::now())
    }

    fn update_at(&mut self, bytes: u64, when: Instant) -> f64 {
        let seconds = when.saturating_duration_since(self.at).as_secs_f64();
        if seconds > 0.0 {
            let now = bytes.saturating_sub(self.bytes) as f64 / seconds;
            // What was measured three seconds ago counts for a third.
            let weight = 1.0 - (-seconds / 3.0).exp();
            self.smooth += (now - self.smooth) * weight;
            self.known += (1.0 - self.known) * weight;
            (self.at, self.bytes) = (when, bytes);
        }
        if self.known > 0.0 { self.smooth / self.known } else { 0.0 }
    }
}

impl Display {
    /// Starts to report. A progress line is drawn only where standard error is a terminal.
    pub fn new(verbosity: Verbosity, json: bool) -> Display {
        let progress = !json && verbosity != Verbosity::Quiet && std::io::stderr().is_terminal();
        let state = Arc::new(State {
            counters: Counters::default(),
            verbosity,
            json,
            progress,
            phase: Mutex::new(Phase::Connecting),
            rate: Mutex::new(Rate { at: Instant::now(), bytes: 0, smooth: 0.0, known: 0.0 }),
            line: Mutex::new(()),
            done: AtomicBool::new(false),
        });
        let every = if json { Duration::from_secs(1) } else { Duration::from_millis(200) };
        let ticker = (progress || json).then(|| {
            let state = Arc::clone(&state);
            std::thread::spawn(move || {
                while !state.done.load(Ordering::Relaxed) {
                    if json {
                        state.tell_progress()
                    } else {
                        state.draw()
                    }
                    std::thread::park_timeout(every);
                }
            })
        });
        Display { state, ticker, stop: Arc::default() }
    }

    /// The same, for a run that ends when `stop` is set.
    #[must_use]
    pub fn stopped_by(mut self, stop: &Arc<AtomicBool>) -> Display {
        self.stop = Arc::clone(stop);
        self
    }

    /// Ends the progress line.
    pub fn finish(&mut self) {
        self.state.done.store(true, Ordering::Relaxed);
        if let Some(ticker) = self.ticker.take() {
            ticker.thread().unpark();
            let _ = ticker.join();
            self.state.clear();
        }
    }
}

impl Drop for Display {
    fn drop(&mut self) {
        self.finish();
    }
}

impl State {
    fn clear(&self) {
        if self.progress {
            let _ = write!(std::io::stderr(), "\r\x1b[K");
        }
    }

    fn say(&self, text: &str) {
        let _guard = self.line.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        self.clear();
        let _ = writeln!(std::io::stderr(), "{}", in_words(text));
    }

    fn tell(&self, value: &serde_json::Value) {
        let _guard = self.line.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let _ = writeln!(std::io::stdout(), "{value}");
    }

    fn phase(&self) -> Phase {
        *self.phase.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// What is going on, in a line.
    fn text(&self) -> Option<String> {
        let get = Counters::get;
        Some(match self.phase() {
            Phase::Connecting => "connecting".to_owned(),
            Phase::Scanning => format!("scanning: {} entries", HumanCount(get(&self.counters.scanned_entries))),
            Phase::Comparing => {
                format!("comparing {} entries with the target", HumanCount(get(&self.counters.scanned_entries)))
            }
            Phase::Transferring => self.transferring(),
            Phase::Verifying => format!("verifying {} files", HumanCount(get(&self.counters.total_files))),
            Phase::Publishing => {
                format!("publishing: {} files are verified", HumanCount(get(&self.counters.done_files)))
            }
            Phase::Done => return None,
        })
    }

    fn transferring(&self) -> String {
        let get = Counters::get;
        let (done, total) = (get(&self.counters.done_bytes), get(&self.counters.total_bytes));
        let rate = self.rate.lock().unwrap_or_else(std::sync::PoisonError::into_inner).update(done);
        // What is looked at most comes first: a narrow terminal cuts the end.
        let mut text = format!("{} %", (u128::from(done.min(total)) * 100).checked_div(total.into()).unwrap_or(100));
        if rate >= 1.0 {
            let left = Duration::from_secs_f64((total.saturating_sub(done) as f64 / rate).min(1e9));
            text += &format!(", {} left, {}/s", HumanDuration(left), BinaryBytes(rate as u64));
        }
        text += &format!(
            ": {} of {}, {} of {} files",
            BinaryBytes(done),
            BinaryBytes(total),
            HumanCount(get(&self.counters.done_files)),
            HumanCount(get(&self.counters.total_files)),
        );
        let (sent, wire) = (get(&self.counters.transferred_bytes), get(&self.counters.wire_bytes));
        if wire > 0 && sent > 0 {
            text += &format!(", {:.2} on the wire", wire as f64 / sent as f64);
        }
        text
    }

    fn draw(&self) {
        let Some(mut text) = self.text() else { return };
        // A line that wraps cannot be taken back.
        if let Ok(size) = rustix::termios::tcgetwinsize(std::io::stderr())
            && size.ws_col > 1
        {
            text = text.chars().take(usize::from(size.ws_col) - 1).collect();
        }
        let _guard = self.line.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if PAUSED.load(Ordering::SeqCst) > 0 {
            return;
        }
        let _ = write!(std::io::stderr(), "\r\x1b[K{text}");
        let _ = std::io::stderr().flush();
    }

    fn tell_progress(&self) {
        if self.phase() == Phase::Transferring {
            let get = Counters::get;
            self.tell(&json!({
                "event": "progress",
                "done_bytes": get(&self.counters.done_bytes),
                "total_bytes": get(&self.counters.total_bytes),
                "done_files": get(&self.counters.done_files),
                "total_files": get(&self.counters.total_files),
                "wire_bytes": get(&self.counters.wire_bytes),
            }));
        }
    }

    fn problem(&self, problem: &Problem) {
        let path = problem.path.as_ref().map_or_else(|| ".".to_owned(), ToString::to_string);
        let message = in_words(&Escaped(problem.message.as_bytes()));
        if self.json {
            let severity = if problem.severity == Severity::Failed { "failed" } else { "skipped" };
            self.tell(&json!({"event": severity, "path": path, "message": message}));
        } else if problem.severity == Severity::Failed {
            self.say(&format!("failed: {path}: {message}"));
        } else if self.verbosity != Verbosity::Quiet {
            self.say(&format!("skipped: {path}: {message}"));
        }
    }
}

impl Monitor for Display {
    fn event(&self, event: Event<'_>) {
        let state = &self.state;
        match event {
            Event::Phase(phase) => {
                *state.phase.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = phase;
                if phase == Phase::Transferring {
                    let now = Instant::now();
                    *state.rate.lock().unwrap_or_else(std::sync::PoisonError::into_inner) =
                        Rate { at: now, bytes: Counters::get(&state.counters.done_bytes), smooth: 0.0, known: 0.0 };
                }
                if state.json {
                    state.tell(&json!({"event": "phase", "phase": format!("{phase:?}").to_lowercase()}));
                }
            }
            Event::Detail(text) if state.json => state.tell(&json!({"event": "detail", "message": text})),
            Event::Detail(text) if state.verbosity == Verbosity::Verbose => state.say(&said(text.as_bytes())),
            Event::Detail(_) => {}
            Event::Warning(text) if state.json => state.tell(&json!({"event": "warning", "message": text})),
            Event::Warning(text) => state.say(&format!("warning: {}", said(text.as_bytes()))),
            Event::Problem(problem) => state.problem(problem),
        }
    }

    fn counters(&self) -> &Counters {
        &self.state.counters
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_at_the_start_does_not_pass_for_the_rate() {
        let start = Instant::now();
        let mut rate = Rate { at: start, bytes: 0, smooth: 0.0, known: 0.0 };
        // A megabyte at once, then a hundred kilobytes a second.
        rate.update_at(1_000_000, start + Duration::from_millis(10));
        let mut last = 0.0;
        for second in 1..=12_u64 {
            last = rate.update_at(1_000_000 + second * 100_000, start + Duration::from_secs(second));
            assert!(last < 1_300_000.0 / second as f64, "after {second} s: {last}");
        }
        assert!((100_000.0..120_000.0).contains(&last), "{last}");
    }
}
