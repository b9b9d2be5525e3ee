//! What a service has freed goes back to the system.

use std::time::{Duration, Instant};

/// After so long what was freed counts as not needed again.
const PAUSE: Duration = Duration::from_secs(1);
/// Large enough to have a page of its own.
const LARGE: usize = 1 << 20;

/// The allocator gives back what was freed more than a second ago, but looks for it only when a page is freed. A service that
/// rests frees none, and would keep what its last run took.
pub(super) struct Memory(Instant);

impl Memory {
    pub(super) fn new() -> Memory {
        Memory(Instant::now())
    }

    /// To be called often. Nothing of the page is touched: it costs microseconds.
    pub(super) fn give_back(&mut self) {
        if self.0.elapsed() >= PAUSE {
            self.0 = Instant::now();
            drop(std::hint::black_box(Vec::<u8>::with_capacity(LARGE)));
        }
    }
}
