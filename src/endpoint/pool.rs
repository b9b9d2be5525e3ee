//! The connections to one host that workers share: the first carries what is done once, all of them carry content. Further ones are
//! made when a worker first needs them: a run with nothing to send makes none.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::client::Client;
use super::link::Remote;

/// Something that requests go over.
pub(super) trait Lane: Send + Sync + 'static {
    fn client(&self) -> &Client;
}

impl Lane for Client {
    fn client(&self) -> &Client {
        self
    }
}

/// How many connections there may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Width {
    /// Workers have one of so many.
    pub workers: usize,
    /// One large file goes over so many, where they bring more.
    pub most: usize,
}

impl From<usize> for Width {
    /// No more than workers have.
    fn from(workers: usize) -> Width {
        Width { workers, most: workers }
    }
}

/// Opens the connection with this number, or says that there is none.
pub(super) type Opener<L> = Box<dyn Fn(usize) -> Option<L> + Send + Sync>;
/// A connection that was asked for; `None` inside when it could not be had.
type Slot<L> = Mutex<Option<Option<Arc<L>>>>;

/// See the module. Connections go by their numbers, of which that of the first is 0.
pub(super) struct Pool<L> {
    first: Arc<L>,
    further: Vec<Slot<L>>,
    /// How many workers use each, the first too.
    users: Vec<AtomicUsize>,
    /// How many workers there are.
    alive: AtomicUsize,
    /// Workers have one of so many; the others are for large files that are spread.
    workers: usize,
    open: Opener<L>,
    /// Who is told of connections that are of no more use.
    left: Option<Arc<dyn Remote>>,
    turn: AtomicUsize,
    /// Workers have the others before the first.
    spares_first: AtomicBool,
    /// Bytes sent and received over connections that have ended.
    past: (AtomicU64, AtomicU64),
}

impl<L: Lane> Pool<L> {
    /// `first`, and further ones that `open` gives. Those may fail; the run goes on over the others.
    pub(super) fn new(
        first: impl Into<Arc<L>>,
        width: Width,
        open: Opener<L>,
        left: Option<Arc<dyn Remote>>,
    ) -> Pool<L> {
        let workers = width.workers.max(1);
        let count = width.most.max(workers);
        Pool {
            first: first.into(),
            further: (1..count).map(|_| Slot::default()).collect(),
            users: (0..count).map(|_| AtomicUsize::new(0)).collect(),
            alive: AtomicUsize::new(0),
            workers,
            open,
            left,
            turn: AtomicUsize::new(0),
            spares_first: AtomicBool::new(false),
            past: Default::default(),
        }
    }

    pub(super) fn first(&self) -> &Arc<L> {
        &self.first
    }

    /// How many connections workers have.
    pub(super) fn workers(&self) -> usize {
        self.workers
    }

    /// How many there may be beside the first.
    pub(super) fn further(&self) -> usize {
        self.further.len()
    }

    /// The number of the connection for the next worker.
    pub(super) fn next(&self) -> usize {
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        match self.spares_first.load(Ordering::Relaxed) {
            true => (1 + turn) % (1 + self.further.len()),
            false => turn % self.workers,
        }
    }

    /// Leaves the first for what is done once, as long as there are others.
    pub(super) fn spare_first(&self) {
        self.spares_first.store(true, Ordering::Relaxed);
    }

    /// The connection of this number, or the first where that cannot be had, with the number. May take as long as it takes to log in.
    pub(super) fn get_or_first(&self, number: usize) -> (usize, Arc<L>) {
        self.get(number).map_or_else(|| (0, Arc::clone(&self.first)), |lane| (number, lane))
    }

    /// The connection of this number, which is made when it is asked for first; `None` where it cannot be had.
    pub(super) fn get(&self, number: usize) -> Option<Arc<L>> {
        let Some(slot) = number.checked_sub(1).map(|at| &self.further[at]) else {
            return Some(Arc::clone(&self.first));
        };
        let mut slot = slot.lock().unwrap_or_else(PoisonError::into_inner);
        let open = || {
            let lane = (self.open)(number).map(Arc::new);
            if lane.is_none() {
                // It may have logged in all the same.
                self.left.iter().for_each(|remote| remote.leave(number));
            }
            lane
        };
        slot.get_or_insert_with(open).clone()
    }

    /// Whether the connection of this number was asked for in vain.
    pub(super) fn is_lost(&self, number: usize) -> bool {
        let slot = number.checked_sub(1).and_then(|at| self.further.get(at));
        slot.is_some_and(|slot| slot.try_lock().is_ok_and(|slot| matches!(*slot, Some(None))))
    }

    /// How many workers there are.
    pub(super) fn alive(&self) -> usize {
        self.alive.load(Ordering::Relaxed)
    }

    /// A worker begins.
    pub(super) fn begin_worker(&self) {
        self.alive.fetch_add(1, Ordering::Relaxed);
    }

    /// It ends.
    pub(super) fn end_worker(&self) {
        self.alive.fetch_sub(1, Ordering::Relaxed);
    }

    /// A worker uses the connection of this number from now on.
    pub(super) fn enter(&self, number: usize) {
        self.users[number].fetch_add(1, Ordering::Relaxed);
    }

    /// Whether any worker uses it.
    pub(super) fn is_used(&self, number: usize) -> bool {
        self.users[number].load(Ordering::Relaxed) > 0
    }

    /// A worker does not use the connection of this number any more; it ends when nobody does.
    pub(super) fn leave(&self, number: usize, lane: Option<Arc<L>>) {
        self.users[number].fetch_sub(1, Ordering::Relaxed);
        drop(lane);
        self.close_unused(number);
    }

    /// Ends the connection of this number, if nobody uses it.
    pub(super) fn close_unused(&self, number: usize) {
        if self.is_used(number) {
            return;
        }
        // Those that workers have stay for the next.
        let slot = number.checked_sub(1).and_then(|at| self.further.get(at));
        let Some(slot) = slot.filter(|_| number >= self.workers) else { return };
        if let Ok(mut slot) = slot.try_lock()
            && slot.as_ref().is_some_and(|had| had.as_ref().is_some_and(|lane| Arc::strong_count(lane) == 1))
        {
            let (sent, received) = slot.take().flatten().map_or((0, 0), |lane| lane.client().wire_bytes());
            self.past.0.fetch_add(sent, Ordering::Relaxed);
            self.past.1.fetch_add(received, Ordering::Relaxed);
            self.left.iter().for_each(|remote| remote.leave(number));
        }
    }

    /// Bytes sent and received over all connections.
    pub(super) fn wire_bytes(&self) -> (u64, u64) {
        let further = self.further.iter().filter_map(|slot| {
            // One that is logging in is not waited for.
            let slot = slot.try_lock().ok()?;
            slot.as_ref()?.as_ref().map(|lane| lane.client().wire_bytes())
        });
        let past = (self.past.0.load(Ordering::Relaxed), self.past.1.load(Ordering::Relaxed));
        further.chain([past]).fold(self.first.client().wire_bytes(), |sum, one| (sum.0 + one.0, sum.1 + one.1))
    }
}
