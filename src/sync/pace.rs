//! A limit on how fast content goes: a bucket of bytes that fills at the rate asked for.

use std::sync::Mutex;
use std::time::{Duration, Instant};

/// What may go at once after a pause, in seconds of the rate.
const BURST_SECONDS: f64 = 0.25;
/// The longest sleep: a run that is stopped is to notice it.
const STEP: Duration = Duration::from_millis(100);

/// Shared by the workers of one run.
pub(super) struct Pace {
    rate: f64,
    state: Mutex<State>,
}

struct State {
    /// Bytes that may go now; below zero when more went than was allowed.
    allowed: f64,
    spent: u64,
    at: Instant,
}

impl Pace {
    /// At most `rate` bytes a second, at least 1.
    pub(super) fn new(rate: u64) -> Pace {
        let rate = rate.max(1) as f64;
        Pace { rate, state: Mutex::new(State { allowed: rate * BURST_SECONDS, spent: 0, at: Instant::now() }) }
    }

    /// Notes that `spent` bytes have gone since the start of the run, and waits until more may go, or until `stopped`.
    pub(super) fn wait(&self, spent: u64, stopped: &dyn Fn() -> bool) {
        let mut debt = self.note(spent, Instant::now());
        while !debt.is_zero() && !stopped() {
            let step = debt.min(STEP);
            std::thread::sleep(step);
            debt -= step;
        }
    }

    /// How long it takes until what has gone is within the rate.
    fn note(&self, spent: u64, now: Instant) -> Duration {
        let mut state = super::lock(&self.state);
        let elapsed = now.saturating_duration_since(state.at).as_secs_f64();
        state.at = now.max(state.at);
        state.allowed = (state.allowed + elapsed * self.rate).min(self.rate * BURST_SECONDS);
        // Workers may tell their sums out of order.
        let more = spent.saturating_sub(state.spent);
        state.spent += more;
        state.allowed -= more as f64;
        // A year is as good as for ever, and can be added to.
        Duration::from_secs_f64((-state.allowed / self.rate).clamp(0.0, 3e7))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_goes_is_bounded_by_the_rate_and_a_small_burst() {
        let pace = Pace::new(1000);
        let start = Instant::now();
        let at = |milliseconds| start + Duration::from_millis(milliseconds);
        assert_eq!(pace.note(200, at(0)), Duration::ZERO);
        let debt = pace.note(1250, at(0)).as_secs_f64();
        assert!((0.99..1.01).contains(&debt), "{debt}");
        // A sum that comes late adds nothing.
        let debt = pace.note(700, at(500)).as_secs_f64();
        assert!((0.49..0.51).contains(&debt), "{debt}");
        // After a long pause no more than the burst is free.
        assert_eq!(pace.note(1500, at(60_000)), Duration::ZERO);
        let debt = pace.note(2500, at(60_000)).as_secs_f64();
        assert!((0.99..1.01).contains(&debt), "{debt}");
    }
}
