//! Memory for what waits because a peer does not take it: everybody has a share, and what goes beyond comes out of one pot
//! for the whole process, so that many who take nothing do not take everything.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

/// The least that is in the pot.
const POT_MIN: usize = 256 << 20;

static TAKEN: AtomicUsize = AtomicUsize::new(0);

/// The least that is in the pot of each of several processes.
const PART_MIN: usize = 64 << 20;

static POT: OnceLock<usize> = OnceLock::new();

fn eighth() -> usize {
    usize::try_from(super::agent::memory_bytes() / 8).unwrap_or(usize::MAX)
}

/// An eighth of the machine's memory.
fn pot() -> usize {
    *POT.get_or_init(|| eighth().max(POT_MIN))
}

/// This process is one of so many, which have one pot together. To be said before anything is held.
pub fn one_of(processes: usize) {
    let _ = POT.set((eighth() / processes.max(1)).max(PART_MIN));
}

/// What one peer has beyond its share. Given back when it is dropped.
#[derive(Debug)]
pub struct Surplus {
    share: usize,
    taken: usize,
}

impl Surplus {
    /// Nothing is held yet; `share` bytes may be whatever others do.
    pub fn new(share: usize) -> Surplus {
        Surplus { share, taken: 0 }
    }

    /// Says how many bytes are held from now on. `false` when the pot has not as much; then nothing is changed.
    #[must_use]
    pub fn hold(&mut self, bytes: usize) -> bool {
        self.hold_of(bytes, pot())
    }

    fn hold_of(&mut self, bytes: usize, pot: usize) -> bool {
        let wanted = bytes.saturating_sub(self.share);
        if wanted == self.taken {
            return true;
        }
        let (more, less) = (wanted.saturating_sub(self.taken), self.taken.saturating_sub(wanted));
        TAKEN.fetch_sub(less, Ordering::Relaxed);
        let fits = |taken: usize| taken.checked_add(more).filter(|&taken| more == 0 || taken <= pot);
        let held = TAKEN.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits).is_ok();
        self.taken = if held { wanted } else { self.taken };
        held
    }
}

impl Drop for Surplus {
    fn drop(&mut self) {
        TAKEN.fetch_sub(self.taken, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everybody_has_a_share_and_beyond_it_there_is_one_pot() {
        let mut peers: Vec<Surplus> = (0..4).map(|_| Surplus::new(10)).collect();
        assert!(peers.iter_mut().all(|peer| peer.hold_of(10, 100)));
        assert!(peers[0].hold_of(70, 100) && peers[1].hold_of(50, 100));
        // The pot is empty: nobody gets more, all keep what they have, and shares are what they were.
        assert!(!peers[2].hold_of(11, 100) && !peers[1].hold_of(51, 100));
        assert!(peers[2].hold_of(10, 100) && peers[1].hold_of(50, 100));
        assert!(peers[1].hold_of(45, 100) && peers[2].hold_of(15, 100) && !peers[3].hold_of(11, 100));
        peers.remove(0);
        assert!(peers[2].hold_of(70, 100));
        drop(peers);
        assert!(Surplus::new(0).hold_of(100, 100));
    }
}
