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
/// How long and by how many bytes a number of connections is judged.
const PERIOD: Duration = Duration::from_millis(500);
const PERIOD_BYTES: u64 = 1 << 20;
/// Of what one more would bring if each carried as much as those before, so much has to come.
const WORTH: f64 = 0.4;
/// When it did not, another is tried after so long, and after twice as long each time.
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
        (0..self.width()).filter_map(|at| self.get(at).link_rate()).reduce(|sum, rate| sum + rate)
    }

    /// A file begins: what was measured before it ends there.
    pub(super) fn begin(&mut self) {
        self.climb.since = None;
    }

    /// Takes one connection more where that may be worth it, while a large file is on its way. Whether the file is one to be spread.
    pub(super) fn consider(&mut self) -> bool {
        if self.lanes.further.is_empty() || !self.is_worth_trying() {
            return self.width() > 1;
        }
        if self.width() > self.lanes.further.len() {
            return true;
        }
        let delivered = (0..self.width()).map(|at| self.get(at).delivered()).sum();
        if self.climb.goes_on(self.width(), delivered, Instant::now()) {
            self.more.extend(self.free());
            self.begin();
        }
        true
    }

    fn is_worth_trying(&self) -> bool {
        let far = self.own.round_trip().is_some_and(|nearest| nearest >= FAR);
        far || idle_processors().is_some_and(|idle| idle >= IDLE_PROCESSORS as f64)
    }

    /// A connection that no worker has to itself.
    fn free(&self) -> Option<(usize, Arc<Client>)> {
        let taken = |number: &usize| self.more.iter().any(|(at, _)| at == number);
        let idle = |number: &usize| self.lanes.users[*number].load(Ordering::Relaxed) == 0;
        let free = (1..=self.lanes.further.len()).filter(|number| !taken(number) && idle(number));
        free.map(|number| (number, self.lanes.get(number))).find_map(|(number, client)| Some((number, client?)))
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
    /// Bytes a second over one connection less.
    before: f64,
    rests_until: Option<Instant>,
    rests: u32,
}

impl Climb {
    /// Whether one more is worth trying, beside `over`, by which so much was delivered up to now.
    fn goes_on(&mut self, over: usize, delivered: u64, now: Instant) -> bool {
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
        let rested = match self.rests_until {
            Some(until) if now < until => return false,
            rests => rests.is_some(),
        };
        // What one of those before carried, more or less.
        let share = self.before / (over.max(2) - 1) as f64;
        let gains = rested || rate >= self.before + WORTH * share;
        self.before = rate;
        self.rests_until = (!gains).then(|| now + REST * 2_u32.pow(self.rests.min(10)));
        self.rests += u32::from(!gains);
        gains
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many connections are in use after so many periods, where so many carry `rate(n)` bytes a second.
    fn climbed(periods: u32, rate: impl Fn(usize) -> f64) -> usize {
        let (mut climb, mut over, mut delivered, mut now) = (Climb::default(), 1, 0, Instant::now());
        for _ in 0..periods * 2 {
            if climb.goes_on(over, delivered, now) {
                (over, climb.since) = (over + 1, None);
            }
            now += PERIOD;
            delivered += (rate(over) * PERIOD.as_secs_f64()) as u64;
        }
        over
    }

    #[test]
    fn connections_are_added_as_long_as_they_bring_more() {
        assert_eq!(climbed(4, |over| 4e6 * over as f64), 5);
        // Two fill it.
        assert_eq!(climbed(9, |_| 1e8), 2);
        assert!((4..=5).contains(&climbed(9, |over| (3e6 * over as f64).min(11e6))));
        // Too slow to say anything of it.
        assert_eq!(climbed(1, |_| 1e6), 1);
    }

    #[test]
    fn another_is_tried_now_and_then() {
        assert_eq!(climbed(14, |_| 1e8), 3);
        assert_eq!(climbed(30, |_| 1e8), 3);
        assert_eq!(climbed(40, |_| 1e8), 4);
    }
}
