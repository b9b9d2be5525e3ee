//! A limit on how fast content goes: a bucket of bytes that fills at the rate asked for.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// What may go at once after a pause, in seconds of the rate.
const BURST_SECONDS: f64 = 0.25;
/// The longest sleep: a run that is stopped is to notice it.
const STEP: Duration = Duration::from_millis(100);

/// How many bytes a second may go; it may be changed while a run goes on.
#[derive(Debug, Clone, Default)]
pub struct Rate(Arc<AtomicU64>);

impl Rate {
    /// At most so many; `None` for as fast as it goes.
    pub fn new(rate: Option<u64>) -> Rate {
        let made = Rate::default();
        made.set(rate);
        made
    }

    /// From now on.
    pub fn set(&self, rate: Option<u64>) {
        self.0.store(rate.map_or(0, |rate| rate.max(1)), Ordering::Relaxed);
    }

    /// What holds now.
    pub fn get(&self) -> Option<u64> {
        Some(self.0.load(Ordering::Relaxed)).filter(|&rate| rate > 0)
    }
}

/// Shared by the workers of one run.
pub(super) struct Pace {
    rate: Rate,
    state: Mutex<State>,
}

struct State {
    /// Bytes that may go now; below zero when more went than was allowed.
    allowed: f64,
    spent: u64,
    at: Instant,
}

impl Pace {
    pub(super) fn new(rate: Rate) -> Pace {
        let allowed = rate.get().unwrap_or(0) as f64 * BURST_SECONDS;
        Pace { rate, state: Mutex::new(State { allowed, spent: 0, at: Instant::now() }) }
    }

    /// Notes that `spent` bytes have gone since the start of the run, and waits until more may go, or until `stopped`.
    pub(super) fn wait(&self, spent: u64, stopped: &dyn Fn() -> bool) {
        let mut debt = self.note(spent, Instant::now());
        let before = self.rate.get();
        // Another rate is another wait: the next block finds it.
        while !debt.is_zero() && !stopped() && self.rate.get() == before {
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
        // Workers may tell their sums out of order.
        let more = spent.saturating_sub(state.spent);
        state.spent += more;
        let Some(rate) = self.rate.get().map(|rate| rate as f64) else {
            // What went while there was no limit is not owed when there is one again.
            state.allowed = 0.0;
            return Duration::ZERO;
        };
        state.allowed = (state.allowed + elapsed * rate).min(rate * BURST_SECONDS) - more as f64;
        // A year is as good as for ever, and can be added to.
        Duration::from_secs_f64((-state.allowed / rate).clamp(0.0, 3e7))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_goes_is_bounded_by_the_rate_and_a_small_burst() {
        let rate = Rate::new(Some(1000));
        let pace = Pace::new(rate.clone());
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
        // Without a limit anything may go, and it is not owed afterwards.
        rate.set(None);
        assert_eq!(pace.note(1_000_000, at(60_000)), Duration::ZERO);
        rate.set(Some(100));
        let debt = pace.note(1_000_050, at(60_000)).as_secs_f64();
        assert!((0.49..0.51).contains(&debt), "{debt}");
    }
}
