//! How long to wait before a target that failed is tried again.

use std::hash::{BuildHasher as _, Hasher as _, RandomState};
use std::time::Duration;

const FIRST: Duration = Duration::from_secs(1);

/// The wait before the next try after `failures` in a row, 1 and more: twice as long each time, up to `longest`, and up to a
/// quarter shorter or longer by chance, so that many daemons do not come back to one server at the same moment.
pub fn wait(failures: u64, longest: Duration) -> Duration {
    spread(base(failures, longest), RandomState::new().build_hasher().finish())
}

fn base(failures: u64, longest: Duration) -> Duration {
    let doublings = u32::try_from(failures.saturating_sub(1)).unwrap_or(u32::MAX).min(20);
    (FIRST * 2_u32.pow(doublings)).min(longest.max(FIRST))
}

fn spread(wait: Duration, chance: u64) -> Duration {
    wait.mul_f64(0.75 + 0.5 * (chance % 1024) as f64 / 1023.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_the_longest_and_are_spread() {
        let longest = Duration::from_secs(300);
        let seconds = |failures| base(failures, longest).as_secs();
        assert_eq!([1, 2, 3, 9, 10, 60, u64::MAX].map(seconds), [1, 2, 4, 256, 300, 300, 300]);
        assert_eq!(base(5, Duration::ZERO), FIRST);
        assert_eq!(spread(Duration::from_secs(4), 0), Duration::from_secs(3));
        assert_eq!(spread(Duration::from_secs(4), 1023), Duration::from_secs(5));
        for _ in 0..100 {
            let wait = wait(3, longest).as_secs_f64();
            assert!((3.0..=5.0).contains(&wait), "{wait}");
        }
    }
}
