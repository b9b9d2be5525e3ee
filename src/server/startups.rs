//! Early shedding of connections that have not logged in, as sshd's MaxStartups: the more there are, the more of the new
//! ones are turned away at random, so that in a flood some of those who mean it get in.

use crate::config::Startups;

/// Whether a new connection is shed while `waiting` others have not logged in. `draw` is a random number from 0 to 99.
pub fn sheds(startups: Startups, waiting: usize, draw: usize) -> bool {
    let Startups { start, rate, full } = startups;
    if waiting < start {
        return false;
    }
    if waiting >= full {
        return true;
    }
    // From `rate` percent at the start to all of them, in a straight line.
    draw < rate + (100 - rate) * (waiting - start) / (full - start)
}

/// A number from 0 to 99 that nobody can foretell.
pub fn draw() -> usize {
    use std::hash::{BuildHasher as _, RandomState};
    // The keys are random for each of them.
    usize::try_from(RandomState::new().hash_one(0_u8) % 100).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn h43_the_more_wait_the_more_are_shed() {
        let startups = Startups { start: 10, rate: 30, full: 60 };
        let shed = |waiting| (0..100).filter(|&draw| sheds(startups, waiting, draw)).count();
        let cases = [(0, 0), (9, 0), (10, 30), (35, 65), (59, 98), (60, 100), (1000, 100)];
        for (waiting, of_a_hundred) in cases {
            assert_eq!(shed(waiting), of_a_hundred, "{waiting}");
        }
        let at_once = Startups { start: 4, rate: 1, full: 4 };
        assert!(!sheds(at_once, 3, 0) && sheds(at_once, 4, 99));
    }

    #[test]
    fn draws_differ() {
        let draws: std::collections::HashSet<usize> = (0..1000).map(|_| draw()).collect();
        assert!(draws.len() > 50 && draws.iter().all(|&draw| draw < 100), "{draws:?}");
    }
}
