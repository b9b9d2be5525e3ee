//! One scan for the runs that begin together.
//!
//! A scan serves whoever wants the same of the same directory, if it began after what that one is to send was finished, and is
//! not over for longer than a moment. Who is in doubt looks for himself: what is old would be sent as if it were new.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::endpoint::local::{LocalSource, Looked};
use crate::endpoint::{Error, Scan, ScanOptions, Source};
use crate::manifest::Tree;
use crate::monitor::{Counters, Monitor, Problem};

/// For so long after its end a scan serves others.
const FRESH: Duration = Duration::from_millis(500);
/// How often who waits sees whether he is to stop.
const STEP: Duration = Duration::from_millis(100);

/// The directory (device and inode), and how it is scanned.
pub(super) type Wanted<'a> = ((u64, u64), &'a ScanOptions);

pub(super) struct Scans {
    targets: usize,
    known: Mutex<Vec<Arc<One>>>,
}

/// A scan that goes on or is over.
struct One {
    root: (u64, u64),
    options: ScanOptions,
    began: Instant,
    state: Mutex<State>,
    ended: Condvar,
}

struct State {
    going: bool,
    /// What it found, until all have it who may want it; `None` where it failed.
    found: Option<Found>,
    over: Instant,
    taken: usize,
}

#[derive(Clone)]
struct Found {
    tree: Arc<Tree>,
    problems: Arc<Vec<Problem>>,
    looked: Arc<Looked>,
}

impl One {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for its end; `None` where nothing came of it that is of use now.
    fn wait(&self, targets: usize, monitor: &dyn Monitor) -> Option<Found> {
        let mut state = self.state();
        while state.going {
            if monitor.stopped() {
                return None;
            }
            let waited = self.ended.wait_timeout(state, STEP);
            state = waited.map_or_else(|poisoned| poisoned.into_inner().0, |waited| waited.0);
        }
        state.taken += 1;
        if state.taken >= targets { state.found.take() } else { state.found.clone() }
    }
}

/// Ends a scan, however it comes to its end.
struct Going<'a>(&'a One, Option<Found>);

impl Drop for Going<'_> {
    fn drop(&mut self) {
        let mut state = self.0.state();
        (state.going, state.found, state.over) = (false, self.1.take(), Instant::now());
        drop(state);
        self.0.ended.notify_all();
    }
}

impl Scans {
    pub(super) fn new(targets: usize) -> Scans {
        Scans { targets, known: Mutex::default() }
    }

    fn known(&self) -> MutexGuard<'_, Vec<Arc<One>>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn clear(&self) {
        self.known().clear();
    }

    /// What `source` finds, or what another found who began to look after `ready`.
    pub(super) fn scan(
        &self,
        source: &LocalSource,
        (root, options): Wanted<'_>,
        ready: Instant,
        monitor: &dyn Monitor,
    ) -> Result<Scan, Error> {
        let mut known = self.known();
        known.retain(|one| {
            let state = one.state();
            state.going || (state.found.is_some() && state.over.elapsed() < FRESH)
        });
        let fits = |one: &&Arc<One>| one.root == root && one.options == *options && one.began >= ready;
        let theirs = known.iter().find(fits).cloned();
        if let Some(theirs) = theirs {
            drop(known);
            if let Some(found) = theirs.wait(self.targets, monitor) {
                Counters::add(&monitor.counters().scanned_entries, found.tree.entries().len() as u64);
                return Ok(given(source, found));
            }
            // RACE: it failed, or all others have it already. Whoever else waited looks for himself as well.
            return source.scan(options, monitor);
        }
        let state = State { going: true, found: None, over: Instant::now(), taken: 1 };
        let (options, state, ended) = (options.clone(), Mutex::new(state), Condvar::new());
        let one = Arc::new(One { root, options, began: Instant::now(), state, ended });
        known.push(Arc::clone(&one));
        drop(known);
        let mut going = Going(&one, None);
        let scan = source.scan(&one.options, monitor)?;
        // One that was stopped has not seen everything.
        if monitor.stopped() {
            return Ok(scan);
        }
        let (tree, problems) = (Arc::new(scan.tree), Arc::new(scan.problems));
        let found = Found { tree, problems, looked: source.looked() };
        going.1 = Some(found.clone());
        drop(going);
        Ok(given(source, found))
    }
}

/// Makes a scan that of `source`.
fn given(source: &LocalSource, found: Found) -> Scan {
    source.believe(found.looked);
    let (tree, problems) = (Arc::unwrap_or_clone(found.tree), Arc::unwrap_or_clone(found.problems));
    Scan { tree, problems }
}
