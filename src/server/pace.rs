//! How much one process may say.

use std::time::{Duration, Instant};

/// So many in a second, and not more.
pub(super) struct Pace {
    most: u32,
    second: Instant,
    count: u32,
    /// What was too much, and is not told yet.
    pub(super) over: u64,
}

impl Pace {
    pub(super) fn new(most: u32) -> Pace {
        Pace { most, second: Instant::now(), count: 0, over: 0 }
    }

    /// Counts one. `false` when there were enough in this second.
    pub(super) fn one(&mut self) -> bool {
        if self.second.elapsed() >= Duration::from_secs(1) {
            (self.second, self.count) = (Instant::now(), 0);
        }
        self.count += 1;
        let fits = self.count <= self.most;
        self.over += u64::from(!fits);
        fits
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_too_much_in_a_second_is_counted() {
        let mut lines = Pace::new(3);
        assert_eq!((0..10).filter(|_| lines.one()).count(), 3);
        assert_eq!(lines.over, 7);
        lines.second = Instant::now().checked_sub(Duration::from_secs(1)).unwrap();
        assert!(lines.one());
    }
}
