//! What a person sees while a run goes on: one line that tells where it is, and the problems as they come.

use std::io::{IsTerminal, Write};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use indicatif::{BinaryBytes, HumanCount, HumanDuration};
use serde_json::json;

use crate::error::Escaped;
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
}

struct State {
    counters: Counters,
    verbosity: Verbosity,
    json: bool,
    progress: bool,
    phase: Mutex<(Phase, Instant)>,
    line: Mutex<()>,
    done: AtomicBool,
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
            phase: Mutex::new((Phase::Connecting, Instant::now())),
            line: Mutex::new(()),
            done: AtomicBool::new(false),
        });
        let ticker = progress.then(|| {
            let state = Arc::clone(&state);
            std::thread::spawn(move || {
                while !state.done.load(Ordering::Relaxed) {
                    state.draw();
                    std::thread::sleep(Duration::from_millis(200));
                }
            })
        });
        Display { state, ticker }
    }

    /// Ends the progress line.
    pub fn finish(&mut self) {
        self.state.done.store(true, Ordering::Relaxed);
        if let Some(ticker) = self.ticker.take() {
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
        let _ = writeln!(std::io::stderr(), "{text}");
    }

    fn tell(&self, value: &serde_json::Value) {
        let _guard = self.line.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let _ = writeln!(std::io::stdout(), "{value}");
    }

    fn draw(&self) {
        let (phase, since) = *self.phase.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let get = Counters::get;
        let text = match phase {
            Phase::Connecting => "connecting".to_owned(),
            Phase::Scanning => format!("scanning: {} entries", HumanCount(get(&self.counters.scanned_entries))),
            Phase::Comparing => "comparing with the target".to_owned(),
            Phase::Transferring => {
                let (done, total) = (get(&self.counters.done_bytes), get(&self.counters.total_bytes));
                let seconds = since.elapsed().as_secs_f64().max(0.001);
                let rate = done as f64 / seconds;
                let left = if rate > 0.0 { total.saturating_sub(done) as f64 / rate } else { 0.0 };
                format!(
                    "{} of {}, {} of {} files, {}/s, {} left",
                    BinaryBytes(done),
                    BinaryBytes(total),
                    HumanCount(get(&self.counters.done_files)),
                    HumanCount(get(&self.counters.total_files)),
                    BinaryBytes(rate as u64),
                    HumanDuration(Duration::from_secs_f64(left)),
                )
            }
            Phase::Verifying => "verifying".to_owned(),
            Phase::Publishing => "publishing".to_owned(),
            Phase::Done => return,
        };
        let _guard = self.line.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if PAUSED.load(Ordering::SeqCst) > 0 {
            return;
        }
        let _ = write!(std::io::stderr(), "\r\x1b[K{text}");
        let _ = std::io::stderr().flush();
    }

    fn problem(&self, problem: &Problem) {
        let path = problem.path.as_ref().map_or_else(|| ".".to_owned(), ToString::to_string);
        let message = Escaped(problem.message.as_bytes());
        if self.json {
            let severity = if problem.severity == Severity::Failed { "failed" } else { "skipped" };
            self.tell(&json!({"event": severity, "path": path, "message": message.to_string()}));
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
                *state.phase.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = (phase, Instant::now());
                if state.json {
                    state.tell(&json!({"event": "phase", "phase": format!("{phase:?}").to_lowercase()}));
                }
            }
            Event::Detail(text) if state.json => state.tell(&json!({"event": "detail", "message": text})),
            Event::Detail(text) if state.verbosity == Verbosity::Verbose => state.say(text),
            Event::Detail(_) => {}
            Event::Warning(text) if state.json => state.tell(&json!({"event": "warning", "message": text})),
            Event::Warning(text) => state.say(&format!("warning: {text}")),
            Event::Problem(problem) => state.problem(problem),
        }
    }

    fn counters(&self) -> &Counters {
        &self.state.counters
    }
}
