//! What of a source may be sent now.
//!
//! Events are hints; the scan is the truth. This feed has no events yet: everything is looked at when it starts, and then
//! every so often.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::status::Watching;
use crate::config::{Ready as WhenReady, Watch};
use crate::path::RelPath;

/// What may be sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ready {
    /// Everything, without what is not finished.
    Everything {
        /// What is not finished.
        except: BTreeSet<RelPath>,
    },
    /// These paths changed and are finished: files, directories, units, pointers; also ones that are gone.
    Paths(BTreeSet<RelPath>),
}

/// How a source is watched.
#[derive(Debug, Clone)]
pub struct FeedOptions {
    /// How long a file or unit has to be left alone.
    pub settle: Duration,
    /// A glob; each directory that matches is a unit.
    pub unit: Option<String>,
    /// When a unit is complete.
    pub ready: WhenReady,
    /// Globs of pointers and markers.
    pub last: Vec<String>,
    /// gitignore lines of what stays out.
    pub exclude: Vec<String>,
    /// How changes are noticed.
    pub watch: Watch,
    /// How often a source that gives no events is looked at.
    pub poll: Duration,
    /// How often everything is looked at.
    pub rescan: Duration,
}

/// A source that cannot be watched at all.
#[derive(Debug, thiserror::Error)]
#[error("cannot watch '{}'", crate::error::shown(source_directory))]
pub struct FeedError {
    /// The source.
    pub source_directory: PathBuf,
    /// Why.
    #[source]
    pub reason: std::io::Error,
}

/// Watches a source.
#[derive(Debug)]
pub struct Feed {
    directory: PathBuf,
    every: Duration,
    state: Mutex<State>,
    woken: Condvar,
}

#[derive(Debug, Default)]
struct State {
    stopped: bool,
    last: Option<(Instant, u64)>,
}

impl Feed {
    /// Begins to watch `source`.
    ///
    /// # Errors
    /// [`FeedError`].
    pub fn start(source: &Path, options: FeedOptions) -> Result<Feed, FeedError> {
        let every = options.poll.min(options.rescan);
        Ok(Feed { directory: source.to_owned(), every, state: Mutex::default(), woken: Condvar::new() })
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until something may be sent, at most until `deadline`; `None` when there is nothing by then, or the feed was
    /// stopped.
    pub fn next(&self, deadline: Option<Instant>) -> Option<Ready> {
        let mut state = self.state();
        loop {
            let now = Instant::now();
            let due = state.last.map_or(now, |(last, _)| last + self.every);
            if state.stopped {
                return None;
            }
            if due <= now {
                let clock = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
                state.last = Some((now, clock));
                return Some(Ready::Everything { except: BTreeSet::new() });
            }
            if deadline.is_some_and(|deadline| deadline <= now) {
                return None;
            }
            let until = deadline.map_or(due, |deadline| deadline.min(due));
            let waited = self.woken.wait_timeout(state, until - now);
            state = waited.map_or_else(|poisoned| poisoned.into_inner().0, |waited| waited.0);
        }
    }

    /// Ends it: whoever waits gets nothing.
    pub fn stop(&self) {
        self.state().stopped = true;
        self.woken.notify_all();
    }

    /// How it watches.
    pub fn watching(&self) -> Watching {
        let last_scan = self.state().last.map(|(_, clock)| clock);
        Watching { mode: "polling".into(), directories: 0, why: None, last_scan }
    }

    /// What changed and is not finished: the first of them, and how many there are.
    pub fn unfinished(&self) -> (Vec<String>, u64) {
        (Vec::new(), 0)
    }

    /// Whether a file is being written: it was changed, by all that is known up to this moment, and not closed since, or not
    /// left alone for long enough.
    pub fn is_being_written(&self, _path: &RelPath) -> bool {
        false
    }

    /// Why the source cannot be watched now.
    pub fn gone(&self) -> Option<String> {
        let found = std::fs::metadata(&self.directory);
        match found {
            Ok(found) if found.is_dir() => None,
            Ok(_) => Some("it is not a directory".into()),
            Err(error) => Some(crate::error::in_words(&error)),
        }
    }
}
