//! One file over several connections: how many are worth it is measured while it goes on.
//!
//! One connection carries as much as its window and the losses of its way allow, and its cipher; several carry more of a large file
//! where the network or the processors have more to give. Where they do not, a second one shows it, and is given up.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::BLOCK_BYTES;
use super::client::Client;
use super::pool::{Lane, Pool};
use crate::monitor::cpu::idle_processors;

/// A file of which less than this was sent is not spread.
pub(super) const SPREAD_AFTER: u64 = 4 << 20;
/// A network that answers sooner than this is no reason for a further connection.
const FAR: Duration = Duration::from_millis(2);
/// Nor are processors, unless so many have nothing to do: each connection takes about one at either end.
const IDLE_PROCESSORS: usize = 3;
/// What is under way over one connection is what it carries in so long, or four times the way there and back, and so much at least.
const WAITS_SECONDS: f64 = 0.05;
const WAITS_BYTES: usize = 4 * BLOCK_BYTES + 4096;
/// So many are taken at once where the network is far.
const FAR_WIDTH: usize = 4;
/// How long and by how many bytes a number of connections is judged, after the time that new ones need to come up to speed: this, or
/// so many times the way there and back. A connection that loses packets is faster for some seconds than it can go on.
const PERIOD: Duration = Duration::from_secs(3);
const PERIOD_BYTES: u64 = 1 << 20;
const BEGINNING: Duration = Duration::from_millis(250);
const BEGINNING_WAYS: u32 = 10;
/// Twice as many connections have to bring so many times as much.
const WORTH: f64 = 1.2;
/// When they did not, more are tried after so long, and after twice as long each time.
const REST: Duration = Duration::from_secs(10);

/// A connection beside the worker's own, with its number.
type Further<L> = (usize, Arc<L>);

/// The connections that one worker's file goes over.
pub(super) struct Spread<L: Lane> {
    pool: Arc<Pool<L>>,
    number: usize,
    own: Arc<L>,
    more: Vec<Further<L>>,
    /// How many of those came last.
    newest: usize,
    /// Those that are logging in.
    opening: Vec<(usize, JoinHandle<Option<Arc<L>>>)>,
    /// Those that are of no more use, until what went over them is answered.
    leaving: Vec<Further<L>>,
    /// How often they have changed.
    changes: u64,
    climb: Climb,
}

impl<L: Lane> Spread<L> {
    /// The connection for the next worker. May take as long as it takes to log in.
    pub(super) fn new(pool: &Arc<Pool<L>>) -> Spread<L> {
        Spread::at(pool, pool.next())
    }

    /// The connection with this number, or the first where that cannot be had.
    pub(super) fn at(pool: &Arc<Pool<L>>, number: usize) -> Spread<L> {
        // Counted before it has logged in: what may wait at the other end is shared among all.
        pool.begin_worker();
        let (number, own) = pool.get_or_first(number);
        pool.enter(number);
        let (more, opening, leaving) = (Vec::new(), Vec::new(), Vec::new());
        let climb = Climb::default();
        Spread { pool: Arc::clone(pool), number, own, more, newest: 0, opening, leaving, changes: 1, climb }
    }

    /// The worker's own connection.
    pub(super) fn own(&self) -> &Arc<L> {
        &self.own
    }

    /// Over how many connections.
    pub(super) fn width(&self) -> usize {
        1 + self.more.len()
    }

    /// One of them, by a number below [`Spread::width`]; its own is the first.
    pub(super) fn get(&self, at: usize) -> &Arc<L> {
        at.checked_sub(1).and_then(|at| self.more.get(at)).map_or(&self.own, |(_, lane)| lane)
    }

    /// The number of one of them among those of the run.
    pub(super) fn number(&self, at: usize) -> usize {
        at.checked_sub(1).and_then(|at| self.more.get(at)).map_or(self.number, |(number, _)| *number)
    }

    /// All of them, with their numbers.
    pub(super) fn all(&self) -> impl Iterator<Item = (usize, &Arc<L>)> {
        [(self.number, &self.own)].into_iter().chain(self.more.iter().map(|(number, lane)| (*number, lane)))
    }

    /// How often they have changed.
    pub(super) fn changes(&self) -> u64 {
        self.changes
    }

    /// The connection with this number, if it is one of them or was until what goes over it is answered.
    pub(super) fn find(&self, number: usize) -> Option<&Arc<L>> {
        let leaving = self.leaving.iter().map(|(number, lane)| (*number, lane));
        self.all().chain(leaving).find_map(|(one, lane)| (one == number).then_some(lane))
    }

    /// How many workers there are.
    pub(super) fn workers(&self) -> usize {
        self.pool.alive().max(1)
    }

    /// The one over which so many bytes are there soonest, of those that have room for them, with its number: what waits for long holds
    /// up what comes after it over another. `waiting` says how many bytes are on their way over one, of those that can be used.
    pub(super) fn soonest(
        &self,
        bytes: usize,
        waiting: impl Fn(usize, &Client) -> Option<usize>,
    ) -> Option<(usize, &Arc<L>)> {
        let usual = self.own.client().link_rate().unwrap_or(1e6);
        let room = |client: &Client, waits: usize| {
            let seconds = client.round_trip().map_or(0.0, |nearest| 4.0 * nearest.as_secs_f64()).max(WAITS_SECONDS);
            let most = client.link_rate().map_or(0.0, |rate| rate * seconds) as usize;
            waits == 0 || waits + bytes <= most.max(WAITS_BYTES)
        };
        let takes =
            |client: &Client, waits: usize| (waits + bytes) as f64 / client.link_rate().unwrap_or(usual).max(1.0);
        // One that was lost while nothing went over it is missed by nobody.
        let lives = |number: usize, client: &Client| !client.is_dead() || number == self.number;
        let all = self.all().filter_map(|(number, lane)| {
            let client = lane.client();
            let waits = waiting(number, client)?;
            (lives(number, client) && room(client, waits)).then(|| (takes(client, waits), number, lane))
        });
        all.min_by(|(a, ..), (b, ..)| a.total_cmp(b)).map(|(_, number, lane)| (number, lane))
    }

    /// Bytes a second that all of them were seen to carry together.
    pub(super) fn rate(&self) -> Option<f64> {
        // The most that each has carried was not at the same time.
        self.climb.recent.filter(|_| self.width() > 1).or_else(|| self.own.client().link_rate())
    }

    /// A file begins: what was measured before it ends there.
    pub(super) fn begin(&mut self) {
        self.climb.since = None;
    }

    /// Takes twice as many connections where that may be worth it, while a large file is on its way, and gives up what was not.
    pub(super) fn consider(&mut self) {
        if self.pool.further() == 0 {
            return;
        }
        self.lose_dead();
        self.let_go(|client| client.in_flight() == 0);
        if !self.opening.is_empty() {
            self.take_in();
            return;
        }
        let leaving = self.leaving.iter().map(|(_, lane)| lane);
        let delivered = self.all().map(|(_, lane)| lane).chain(leaving).map(|lane| lane.client().delivered()).sum();
        match self.climb.judge(delivered, Instant::now()) {
            None => {}
            Some(true) => {
                self.newest = 0;
                if self.is_worth_trying() {
                    self.widen();
                }
            }
            Some(false) => {
                self.leaving.extend(self.more.drain(self.more.len().saturating_sub(self.newest)..));
                self.changes += 1;
                self.newest = 0;
                self.climb.since = None;
            }
        }
    }

    /// Gives back all but its own, until they are considered again.
    pub(super) fn give_back(&mut self) {
        if self.more.is_empty() {
            return;
        }
        self.leaving.append(&mut self.more);
        self.changes += 1;
        (self.newest, self.climb) = (0, Climb::default());
        self.let_go(|client| client.in_flight() == 0);
    }

    /// Gives up those that have ended: others may take their place.
    fn lose_dead(&mut self) {
        let dead: Vec<Further<L>> = self.more.extract_if(.., |(_, lane)| lane.client().is_dead()).collect();
        if !dead.is_empty() {
            self.newest = 0;
            self.changes += 1;
            self.leaving.extend(dead);
        }
    }

    /// Whether there may be more soon.
    pub(super) fn may_widen(&self) -> bool {
        self.width() <= self.pool.further() && self.is_worth_trying()
    }

    fn is_worth_trying(&self) -> bool {
        is_worth_trying(self.own.client())
    }

    /// Begins to log in over as many connections as there are, or a few more at first, of those that nobody else uses.
    fn widen(&mut self) {
        let more = if self.width() == 1 && is_far(self.own.client()) { FAR_WIDTH - 1 } else { self.width() };
        let leaves = |number: &usize| self.leaving.iter().any(|(at, _)| at == number);
        let idle = |number: &usize| !self.pool.is_used(*number);
        let free =
            (1..=self.pool.further()).filter(|number| idle(number) && !leaves(number) && !self.pool.is_lost(*number));
        let numbers: Vec<usize> = free.take(more).collect();
        for number in numbers {
            let pool = Arc::clone(&self.pool);
            let open = move || {
                let lane = pool.get(number);
                if !pool.is_used(number) {
                    // Who asked for it has ended.
                    drop(lane);
                    pool.close_unused(number);
                    return None;
                }
                lane
            };
            self.pool.enter(number);
            match std::thread::Builder::new().name("lane".to_owned()).spawn(open) {
                Ok(thread) => self.opening.push((number, thread)),
                Err(_) => self.pool.leave(number, None),
            }
        }
    }

    /// Takes those that have logged in, when all have, or have failed.
    fn take_in(&mut self) {
        if !self.opening.iter().all(|(_, thread)| thread.is_finished()) {
            return;
        }
        let opened: Vec<_> =
            self.opening.drain(..).map(|(number, thread)| (number, thread.join().ok().flatten())).collect();
        self.newest = 0;
        for (number, lane) in opened {
            match lane {
                Some(lane) => {
                    self.more.push((number, lane));
                    self.newest += 1;
                }
                None => self.pool.leave(number, None),
            }
        }
        self.changes += 1;
        let ways = self.own.client().round_trip().unwrap_or_default() * BEGINNING_WAYS;
        self.climb.begin(Instant::now() + BEGINNING.max(ways));
    }

    /// Gives back those of the leaving that are done.
    fn let_go(&mut self, done: impl Fn(&Client) -> bool) {
        for (number, lane) in self.leaving.extract_if(.., |(_, lane)| done(lane.client())) {
            self.pool.leave(number, Some(lane));
        }
    }
}

impl<L: Lane> Drop for Spread<L> {
    fn drop(&mut self) {
        self.leaving.append(&mut self.more);
        self.let_go(|_| true);
        // Those that are logging in are not waited for; they end with the run.
        for (number, _) in self.opening.drain(..) {
            self.pool.leave(number, None);
        }
        self.pool.leave(self.number, None);
        self.pool.end_worker();
    }
}

fn is_worth_trying(client: &Client) -> bool {
    is_far(client) || idle_processors().is_some_and(|idle| idle >= IDLE_PROCESSORS as f64)
}

/// Whether it answers so late that further connections beside it may bring more.
pub(super) fn is_far(client: &Client) -> bool {
    client.round_trip().is_some_and(|nearest| nearest >= FAR)
}

/// Whether more connections have brought more so far.
#[derive(Debug, Default)]
struct Climb {
    since: Option<(Instant, u64)>,
    /// Nothing is measured before.
    not_before: Option<Instant>,
    /// Bytes a second, when that was measured last,
    recent: Option<f64>,
    /// and over half as many connections.
    before: f64,
    rests_until: Option<Instant>,
    rests: u32,
}

impl Climb {
    /// There are more connections, and what they carry is measured from then on.
    fn begin(&mut self, at: Instant) {
        (self.since, self.not_before) = (None, Some(at));
    }

    /// Whether more are worth trying, where so much was delivered up to now: true where those that came last brought more, or it is
    /// time to try again, false where they did not. `None` while nothing can be said.
    fn judge(&mut self, delivered: u64, now: Instant) -> Option<bool> {
        if self.not_before.is_some_and(|at| now < at) {
            return None;
        }
        let Some((since, from)) = self.since else {
            self.since = Some((now, delivered));
            // There is nothing yet to compare with, nor to lose.
            return (self.before == 0.0 && self.rests_until.is_none() && self.not_before.is_none()).then_some(true);
        };
        let (took, bytes) = (now.duration_since(since), delivered.saturating_sub(from));
        if took < PERIOD || bytes < PERIOD_BYTES {
            return None;
        }
        self.since = Some((now, delivered));
        let rate = bytes as f64 / took.as_secs_f64();
        self.recent = Some(rate);
        let rested = match self.rests_until {
            Some(until) if now < until => return None,
            rests => rests.is_some(),
        };
        let gains = rested || rate >= WORTH * self.before;
        self.before = rate;
        self.rests_until = (!gains).then(|| now + REST * 2_u32.pow(self.rests.min(10)));
        self.rests += u32::from(!gains);
        Some(gains)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many connections are in use after so many seconds, where so many carry `rate(n)` bytes a second.
    fn climbed(seconds: u32, rate: impl Fn(usize) -> f64) -> usize {
        let (mut climb, mut over, mut delivered, mut now) = (Climb::default(), vec![1], 0, Instant::now());
        let step = Duration::from_millis(50);
        for _ in 0..seconds * 20 {
            match climb.judge(delivered, now) {
                Some(true) => {
                    over.push(if over.len() == 1 { FAR_WIDTH } else { 2 * over[over.len() - 1] });
                    climb.begin(now + BEGINNING);
                }
                Some(false) => {
                    over.pop();
                    climb.since = None;
                }
                None => {}
            }
            now += step;
            delivered += (rate(over[over.len() - 1]) * step.as_secs_f64()) as u64;
        }
        over[over.len() - 1]
    }

    #[test]
    fn connections_are_added_as_long_as_they_bring_more() {
        assert_eq!(climbed(1, |over| 4e6 * over as f64), 4);
        assert_eq!(climbed(4, |over| 4e6 * over as f64), 8);
        assert_eq!(climbed(8, |over| 4e6 * over as f64), 16);
        // Too slow to say anything of it.
        assert_eq!(climbed(4, |_| 1e5), 4);
    }

    #[test]
    fn those_that_bring_nothing_are_given_up_and_tried_again_now_and_then() {
        assert_eq!(climbed(5, |_| 1e8), 8);
        assert_eq!(climbed(9, |_| 1e8), 4);
        assert_eq!(climbed(12, |over| (2e7 * over as f64).min(1e8)), 8);
        let tried = (12..80).filter(|&seconds| climbed(seconds, |_| 1e8) == 8).count();
        assert!((4..16).contains(&tried), "{tried}");
    }
}
