//! What of a source may be sent now.
//!
//! Events are hints; the scan is the truth. Everything is looked at when a feed starts, every so often, and after every doubt.
//! What always holds: what is not finished is in no answer, and what is finished is in a later one.

use std::collections::BTreeSet;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use super::follow::Follower;
use super::mounts::Mounts;
use super::settle::{Rules, Settle};
use super::status::Watching;
use crate::config::{Ready as WhenReady, Watch};
use crate::filter::{Filter, FilterSpec, line_for};
use crate::path::RelPath;

/// So many unfinished paths are named to people.
const SHOWN: usize = 20;
/// A filter of more paths or bytes than this would be slow; beyond it directories are held back as a whole.
const HELD_BACK_MAX: usize = 2000;
const HELD_BACK_BYTES_MAX: usize = 128 << 10;
/// Of paths that lie in the top directory, which cannot be held back as a whole, a filter may have more: half of what one takes.
const TOP_BYTES_MAX: usize = crate::filter::GLOBS_BYTES_MAX / 2;
/// A thread that hangs in a file system that does not answer holds up nobody for longer.
const ENDING: Duration = Duration::from_secs(2);
/// What the kernel has told is waited for at most so long.
const CATCH_UP_MAX: Duration = Duration::from_secs(5);

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
    /// These files are finished, and lie in units that are not: they may be staged, and nobody is to see them yet.
    Early(BTreeSet<RelPath>),
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
    /// Globs of files that only grow: they are ready however they are written.
    pub append_only: Vec<String>,
    /// gitignore lines of what stays out.
    pub exclude: Vec<String>,
    /// How changes are noticed.
    pub watch: Watch,
    /// How often a source that gives no events is looked at.
    pub poll: Duration,
    /// How often everything is looked at.
    pub rescan: Duration,
    /// A file that is there when a file system of its own was mounted at the source, also before a restart. Without it that is known
    /// of the time since the start alone.
    pub mount_note: Option<PathBuf>,
    /// A file for what is mounted in the source, likewise.
    pub mounts_note: Option<PathBuf>,
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

/// Watches a source, on a thread of its own that ends with it.
#[derive(Debug)]
pub struct Feed {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
pub(super) struct Shared {
    state: Mutex<State>,
    woken: Condvar,
    caught_up: Condvar,
    mounts: Mutex<Mounts>,
    /// Readable when the thread is to end.
    pub(super) stop: OwnedFd,
}

#[derive(Debug)]
pub(super) struct State {
    pub(super) stopped: bool,
    pub(super) settle: Settle,
    pub(super) everything: bool,
    pub(super) paths: BTreeSet<RelPath>,
    pub(super) early: BTreeSet<RelPath>,
    pub(super) watching: Watching,
    pub(super) gone: Option<String>,
    /// The directory that is followed, by device and inode.
    pub(super) followed: Option<(u64, u64)>,
    /// Where the kernel tells of changes.
    pub(super) events: Option<Arc<OwnedFd>>,
    /// How often the thread began to take in events, and up to which time it has taken note of them.
    begun: u64,
    ended: u64,
}

impl Shared {
    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn is_stopped(&self) -> bool {
        self.state().stopped
    }

    pub(super) fn mounts(&self) -> MutexGuard<'_, Mounts> {
        self.mounts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn held_back(&self, state: &State) -> BTreeSet<RelPath> {
        let unfinished = state.settle.unfinished().cloned();
        unfinished.chain(self.mounts().missing(state.followed)).collect()
    }

    /// Events are about to be taken from the kernel.
    pub(super) fn begin(&self) {
        self.state().begun += 1;
    }

    /// All that was taken from the kernel is in the state.
    pub(super) fn end(&self) {
        let mut state = self.state();
        state.ended = state.begun;
        drop(state);
        self.caught_up.notify_all();
    }

    /// The state, when it holds all that the kernel knew at this moment. Where that takes too long (everything is being looked
    /// at), as it is.
    fn caught_up(&self) -> MutexGuard<'_, State> {
        let until = Instant::now() + CATCH_UP_MAX;
        let mut state = self.state();
        let begun = state.begun;
        loop {
            let Some(events) = &state.events else { return state };
            // Under the lock: what is not readable any more was taken by a round that has begun.
            let told = !is_readable(events);
            let now = Instant::now();
            if state.ended > begun || (told && state.ended == state.begun) || state.stopped || now >= until {
                return state;
            }
            let waited = self.caught_up.wait_timeout(state, until - now);
            state = waited.map_or_else(|poisoned| poisoned.into_inner().0, |waited| waited.0);
        }
    }

    /// Wakes whoever waits for something to send.
    pub(super) fn tell(&self) {
        self.woken.notify_all();
    }
}

impl Feed {
    /// Begins to watch `source`. It need not be there yet: [`Feed::gone`] says so.
    ///
    /// # Errors
    /// [`FeedError`] where a glob is none, or the system gives no thread or descriptor.
    pub fn start(source: &Path, options: FeedOptions) -> Result<Feed, FeedError> {
        let failed = |reason| FeedError { source_directory: source.to_owned(), reason };
        let wrong = |error: crate::filter::FilterError| failed(std::io::Error::other(error));
        let rules = Rules::new(options.settle, options.ready.clone(), options.unit.as_deref(), &options.last)
            .and_then(|rules| rules.growing(&options.append_only));
        let filter = FilterSpec { rules: options.exclude.clone(), only: None };
        let filter = Filter::compile(&filter).map_err(wrong)?;
        let state = State {
            stopped: false,
            settle: Settle::new(rules.map_err(wrong)?),
            everything: false,
            paths: BTreeSet::new(),
            early: BTreeSet::new(),
            watching: Watching { mode: "starting".to_owned(), ..Watching::default() },
            gone: None,
            followed: None,
            events: None,
            begun: 0,
            ended: 0,
        };
        let stop = eventfd(0, EventfdFlags::CLOEXEC).map_err(|errno| failed(errno.into()))?;
        let shared = Arc::new(Shared {
            state: Mutex::new(state),
            woken: Condvar::new(),
            caught_up: Condvar::new(),
            mounts: Mutex::new(Mounts::new(source, options.mounts_note.clone())),
            stop,
        });
        let follower = Follower::new(Arc::clone(&shared), source.to_owned(), options, filter);
        let thread = std::thread::Builder::new().name("feed".to_owned()).spawn(move || follower.run());
        Ok(Feed { shared, thread: Some(thread.map_err(failed)?) })
    }

    /// Waits until something may be sent, at most until `deadline`; `None` when there is nothing by then, or the feed was
    /// stopped.
    pub fn next(&self, deadline: Option<Instant>) -> Option<Ready> {
        let mut state = self.shared.state();
        loop {
            if state.stopped {
                return None;
            }
            if std::mem::take(&mut state.everything) {
                return Some(Ready::Everything { except: self.shared.held_back(&state) });
            }
            if !state.paths.is_empty() {
                return Some(Ready::Paths(std::mem::take(&mut state.paths)));
            }
            if !state.early.is_empty() {
                return Some(Ready::Early(std::mem::take(&mut state.early)));
            }
            let now = Instant::now();
            state = match deadline {
                Some(deadline) if deadline <= now => return None,
                Some(deadline) => {
                    let waited = self.shared.woken.wait_timeout(state, deadline - now);
                    waited.map_or_else(|poisoned| poisoned.into_inner().0, |waited| waited.0)
                }
                None => self.shared.woken.wait(state).unwrap_or_else(PoisonError::into_inner),
            };
        }
    }

    /// Has everything compared that is finished.
    pub fn ask(&self) {
        self.shared.state().everything = true;
        self.shared.tell();
    }

    /// Ends it: whoever waits gets nothing.
    pub fn stop(&self) {
        self.shared.state().stopped = true;
        self.shared.tell();
        // It only fails where it was written to before.
        let _ = rustix::io::write(&self.shared.stop, &1_u64.to_ne_bytes());
    }

    /// How it watches.
    pub fn watching(&self) -> Watching {
        let watching = self.shared.state().watching.clone();
        let unmounted = self.shared.mounts().told().iter().take(SHOWN).map(ToString::to_string).collect();
        Watching { unmounted, ..watching }
    }

    /// What changed and is not finished: the first of them, and how many there are.
    pub fn unfinished(&self) -> (Vec<String>, u64) {
        let state = self.shared.state();
        let shown = state.settle.unfinished().take(SHOWN).map(ToString::to_string).collect();
        (shown, state.settle.unfinished().count() as u64)
    }

    /// What is not to be sent at this moment, whatever was ready before: it changes again, or is not finished, or the file
    /// system that was mounted there is not.
    pub fn held_back(&self) -> BTreeSet<RelPath> {
        self.shared.held_back(&self.shared.caught_up())
    }

    /// Whether a file is being written: it was changed, by all that is known up to this moment, and not closed since, or not
    /// left alone for long enough. Of what lies in a unit: whether the unit is. It becomes ready again by itself.
    pub fn is_being_written(&self, path: &RelPath) -> bool {
        self.shared.caught_up().settle.is_in_hands(path)
    }

    /// The same of the file alone, whatever it lies in.
    pub fn is_file_being_written(&self, path: &RelPath) -> bool {
        self.shared.caught_up().settle.is_file_in_hands(path)
    }

    /// Which directory is followed at this moment, by device and inode; `None` where the source is not there.
    pub fn followed(&self) -> Option<(u64, u64)> {
        self.shared.state().followed
    }

    /// Whether its thread does what it is there for.
    pub fn is_alive(&self) -> bool {
        self.shared.is_stopped() || self.thread.as_ref().is_some_and(|thread| !thread.is_finished())
    }

    /// Why the source cannot be watched now. It goes on by itself when it is back.
    pub fn gone(&self) -> Option<String> {
        self.shared.state().gone.clone()
    }
}

impl Drop for Feed {
    fn drop(&mut self) {
        self.stop();
        let Some(thread) = self.thread.take() else { return };
        let until = Instant::now() + ENDING;
        while !thread.is_finished() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(5));
        }
        if thread.is_finished() {
            let _ = thread.join();
        }
    }
}

fn is_readable(events: &OwnedFd) -> bool {
    let mut watched = [PollFd::new(events, PollFlags::IN)];
    poll(&mut watched, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).is_ok_and(|ready| ready > 0)
}

/// Paths that cover all of `paths`, and are few enough to be the rules of a filter: those that lie deepest are replaced by their
/// directories, as far as there are any. `None` where too many lie in the top directory.
pub(super) fn gathered(paths: BTreeSet<RelPath>) -> Option<BTreeSet<RelPath>> {
    at_most(paths, HELD_BACK_MAX)
}

fn at_most(mut paths: BTreeSet<RelPath>, most: usize) -> Option<BTreeSet<RelPath>> {
    let bytes = |paths: &BTreeSet<RelPath>| paths.iter().map(|path| path.as_bytes().len()).sum::<usize>();
    while paths.len() > most || bytes(&paths) > HELD_BACK_BYTES_MAX {
        let deepest = paths.iter().map(RelPath::depth).max().unwrap_or(1);
        if deepest == 1 {
            let lines = paths.iter().map(|path| line_for(path).len()).sum::<usize>();
            return (lines <= TOP_BYTES_MAX).then_some(paths);
        }
        let up = |path: RelPath| if path.depth() == deepest { path.parent().unwrap_or(path) } else { path };
        paths = paths.into_iter().map(up).collect();
    }
    Some(paths)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn very_many_paths_are_held_back_by_their_directories() {
        let set = |paths: &[&str]| paths.iter().map(|path| RelPath::new(path).unwrap()).collect::<BTreeSet<_>>();
        let paths = set(&["a/b/1", "a/b/2", "a/c", "d"]);
        assert_eq!(at_most(paths.clone(), 4), Some(paths.clone()));
        assert_eq!(at_most(paths.clone(), 3), Some(set(&["a/b", "a/c", "d"])));
        assert_eq!(at_most(paths, 2), Some(set(&["a", "d"])));
        assert_eq!(at_most(set(&["a", "b"]), 1), Some(set(&["a", "b"])));
        let long = |count: usize| (0..count).map(|at| RelPath::new(format!("{at:0100}")).unwrap()).collect();
        let most = gathered(long(2500)).unwrap();
        let rules = most.iter().map(line_for).collect();
        assert!(Filter::compile(&FilterSpec { rules, only: None }).is_ok());
        assert_eq!(gathered(long(3000)), None);
    }
}
