//! One file over several connections: how many are worth it is measured while it goes on.
//!
//! One connection carries as much as its window and the losses of its way allow, and its cipher; several carry more of a large file
//! where the network or the processors have more to give. Where they do not, a second one shows it, and that is all.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::Lanes;
use crate::endpoint::client::Client;
use crate::monitor::cpu::idle_processors;

/// A file of which less than this was sent is not spread.
pub(super) const SPREAD_AFTER: u64 = 4 << 20;
/// A network that answers sooner than this is no reason for a further connection.
const FAR: Duration = Duration::from_millis(2);
/// Nor are processors, unless so many have nothing to do: each connection takes about one at either end.
const IDLE_PROCESSORS: usize = 3;
/// What is under way over one connection is what it carries in so long, or four times the way there and back, and so much at least.
const WAITS_SECONDS: f64 = 0.05;
const WAITS_BYTES: usize = 1 << 20;
/// How long and by how many bytes a number of connections is judged, after the time that new ones need to come up to speed.
const PERIOD: Duration = Duration::from_millis(750);
const PERIOD_BYTES: u64 = 1 << 20;
const BEGINNING: Duration = Duration::from_millis(250);
/// Twice as many connections have to bring so many times as much.
const WORTH: f64 = 1.2;
/// When they did not, more are tried after so long, and after twice as long each time.
const REST: Duration = Duration::from_secs(10);

/// The connections that one worker's file goes over.
pub(super) struct Spread<'a> {
    lanes: &'a Lanes,
    number: usize,
    own: Arc<Client>,
    more: Vec<(usize, Arc<Client>)>,
    climb: Climb,
}

impl<'a> Spread<'a> {
    /// The connection for the next worker. May take as long as it takes to log in.
    pub(super) fn new(lanes: &'a Lanes) -> Spread<'a> {
        let (number, own) = lanes.lane();
        lanes.users[number].fetch_add(1, Ordering::Relaxed);
        Spread { lanes, number, own, more: Vec::new(), climb: Climb::default() }
    }

    /// The worker's own connection.
    pub(super) fn own(&self) -> &Arc<Client> {
        &self.own
    }

    /// Over how many connections.
    pub(super) fn width(&self) -> usize {
        1 + self.more.len()
    }

    /// One of them, by a number below [`Spread::width`]; its own is the first.
    pub(super) fn get(&self, at: usize) -> &Arc<Client> {
        at.checked_sub(1).and_then(|at| self.more.get(at)).map_or(&self.own, |(_, client)| client)
    }

    /// The one on which the least waits for an answer, and whether it has room for so much more: what waits for long holds up what comes
    /// after it over another.
    pub(super) fn lightest(&self, bytes: usize) -> (&Arc<Client>, bool) {
        let all = (0..self.width()).map(|at| self.get(at)).map(|client| (client, client.in_flight()));
        let (client, waits) = all.min_by_key(|&(_, waits)| waits).unwrap_or((&self.own, 0));
        let seconds = client.round_trip().map_or(0.0, |nearest| 4.0 * nearest.as_secs_f64()).max(WAITS_SECONDS);
        let room = client.link_rate().map_or(0.0, |rate| rate * seconds);
        (client, waits == 0 || waits + bytes <= (room as usize).max(WAITS_BYTES))
    }

    /// Bytes a second that all of them were seen to carry together.
    pub(super) fn rate(&self) -> Option<f64> {
        // The most that each has carried was not at the same time.
        self.climb.recent.filter(|_| self.width() > 1).or_else(|| self.own.link_rate())
    }

    /// A file begins: what was measured before it ends there.
    pub(super) fn begin(&mut self) {
        self.climb.since = None;
    }

    /// Takes twice as many connections where that may be worth it, while a large file is on its way. Whether the file is one to be spread.
    pub(super) fn consider(&mut self) -> bool {
        if self.lanes.further.is_empty() || !self.is_worth_trying() {
            return self.width() > 1;
        }
        if self.width() > self.lanes.further.len() {
            return true;
        }
        let delivered = (0..self.width()).map(|at| self.get(at).delivered()).sum();
        let now = Instant::now();
        if self.climb.goes_on(delivered, now) {
            self.widen();
            self.climb.begin(Instant::now());
        }
        true
    }

    fn is_worth_trying(&self) -> bool {
        let far = self.own.round_trip().is_some_and(|nearest| nearest >= FAR);
        far || idle_processors().is_some_and(|idle| idle >= IDLE_PROCESSORS as f64)
    }

    /// As many connections more as there are, of those that no worker has to itself. They log in at the same time.
    fn widen(&mut self) {
        let taken = |number: &usize| self.more.iter().any(|(at, _)| at == number);
        let idle = |number: &usize| self.lanes.users[*number].load(Ordering::Relaxed) == 0;
        let free = (1..=self.lanes.further.len()).filter(|number| !taken(number) && idle(number));
        let (lanes, numbers) = (self.lanes, free.take(self.width()).collect::<Vec<_>>());
        let opened: Vec<_> = std::thread::scope(|scope| {
            let open = |&number: &usize| scope.spawn(move || Some((number, lanes.get(number)?)));
            let opening: Vec<_> = numbers.iter().map(open).collect();
            opening.into_iter().filter_map(|opening| opening.join().ok().flatten()).collect()
        });
        self.more.extend(opened);
    }
}

impl Drop for Spread<'_> {
    fn drop(&mut self) {
        self.lanes.users[self.number].fetch_sub(1, Ordering::Relaxed);
    }
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
    /// There are more connections from now on.
    fn begin(&mut self, now: Instant) {
        (self.since, self.not_before) = (None, Some(now + BEGINNING));
    }

    /// Whether more are worth trying, where so much was delivered up to now.
    fn goes_on(&mut self, delivered: u64, now: Instant) -> bool {
        if self.not_before.is_some_and(|at| now < at) {
            return false;
        }
        let Some((since, from)) = self.since else {
            self.since = Some((now, delivered));
            return false;
        };
        let (took, bytes) = (now.duration_since(since), delivered.saturating_sub(from));
        if took < PERIOD || bytes < PERIOD_BYTES {
            return false;
        }
        self.since = Some((now, delivered));
        let rate = bytes as f64 / took.as_secs_f64();
        self.recent = Some(rate);
        let rested = match self.rests_until {
            Some(until) if now < until => return false,
            rests => rests.is_some(),
        };
        let gains = rested || rate >= WORTH * self.before;
        self.before = rate;
        self.rests_until = (!gains).then(|| now + REST * 2_u32.pow(self.rests.min(10)));
        self.rests += u32::from(!gains);
        gains
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many connections are in use after so many seconds, where so many carry `rate(n)` bytes a second.
    fn climbed(seconds: u32, rate: impl Fn(usize) -> f64) -> usize {
        let (mut climb, mut over, mut delivered, mut now) = (Climb::default(), 1, 0, Instant::now());
        let step = Duration::from_millis(50);
        for _ in 0..seconds * 20 {
            if climb.goes_on(delivered, now) {
                over *= 2;
                climb.begin(now);
            }
            now += step;
            delivered += (rate(over) * step.as_secs_f64()) as u64;
        }
        over
    }

    #[test]
    fn connections_are_added_as_long_as_they_bring_more() {
        assert_eq!(climbed(3, |over| 4e6 * over as f64), 8);
        // Two fill it, and it takes twice as many to see that.
        assert_eq!(climbed(9, |over| (6e7 * over as f64).min(1e8)), 4);
        assert_eq!(climbed(9, |_| 1e8), 2);
        // Too slow to say anything of it.
        assert_eq!(climbed(1, |_| 1e6), 1);
    }

    #[test]
    fn more_are_tried_now_and_then() {
        assert_eq!(climbed(14, |_| 1e8), 4);
        assert_eq!(climbed(30, |_| 1e8), 4);
        assert_eq!(climbed(40, |_| 1e8), 8);
    }
}
