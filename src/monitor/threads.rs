//! How many threads may work for one thing at once.

use std::num::NonZeroUsize;

/// More do not make listing or hashing faster on any disk that was tried.
const USUAL_MAX: usize = 8;

/// Threads that list or hash for a run; unless it is said, one for each processor, from two to eight.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Threads(Option<NonZeroUsize>);

impl Threads {
    /// So many; `None` for the usual number.
    pub fn at_most(count: Option<NonZeroUsize>) -> Threads {
        Threads(count)
    }

    /// How many are to be started.
    pub fn count(self) -> usize {
        let usual = || std::thread::available_parallelism().map_or(2, |cores| cores.get().clamp(2, USUAL_MAX));
        self.0.map_or_else(usual, NonZeroUsize::get)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_counts() {
        assert_eq!(Threads::at_most(NonZeroUsize::new(1)).count(), 1);
        assert!((2..=USUAL_MAX).contains(&Threads::default().count()));
    }
}
