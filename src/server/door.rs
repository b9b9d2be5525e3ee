//! Who is turned away before a byte is exchanged: by address, by penalty, or because too many wait already. It also counts
//! them, and says now and then, not for each, that there were some.

use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::access::Access;
use super::penalties::{Fault, PenaltyTable};
use super::startups;
use crate::config::{AddressList, Penalties, ServeLimits};

/// Lines about one kind of refusal come no faster.
const PAUSE: Duration = Duration::from_secs(1);

/// Why somebody is turned away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Turned {
    /// No user may come from there.
    Unwelcome,
    /// It failed too often.
    Penalised,
    /// One of those that are shed at random.
    Shed,
    /// A limit is reached.
    Limit(&'static str),
}

impl Turned {
    /// For logs.
    pub const fn reason(self) -> &'static str {
        match self {
            Turned::Unwelcome => "no user may come from this address",
            Turned::Penalised => "this address failed too often",
            Turned::Shed => "too many connections that have not logged in; some are shed at random",
            Turned::Limit(reason) => reason,
        }
    }

    /// What the client is told before it is let go; nothing where it has no business here at all.
    pub fn farewell(self) -> Option<String> {
        let reason = match self {
            Turned::Unwelcome => return None,
            Turned::Shed => "too many connections that have not logged in",
            other => other.reason(),
        };
        Some(format!("lockstep: {reason}; try again later\r\n"))
    }

    const fn kind(self) -> usize {
        match self {
            Turned::Unwelcome => 0,
            Turned::Penalised => 1,
            Turned::Shed => 2,
            Turned::Limit(_) => 3,
        }
    }
}

/// In the order of [`Turned::kind`].
const KINDS: [&str; 4] = ["by address", "by penalty", "shed", "over a limit"];

/// When something was said last, and what was not since.
#[derive(Debug, Default, Clone, Copy)]
struct Said {
    last: Option<Instant>,
    unsaid: u64,
}

/// See the module.
#[derive(Debug)]
pub struct Door {
    penalties: Mutex<PenaltyTable>,
    counts: [AtomicU64; 4],
    said: Mutex<[Said; 4]>,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Door {
    /// Nobody was turned away yet.
    pub fn new(penalties: Penalties, exempt: Option<AddressList>) -> Door {
        let penalties = Mutex::new(PenaltyTable::new(penalties, exempt));
        Door { penalties, counts: Default::default(), said: Mutex::default() }
    }

    /// Other penalties from now on.
    pub fn set(&self, penalties: Penalties, exempt: Option<AddressList>) {
        locked(&self.penalties).set(penalties, exempt);
    }

    /// Whether a connection from `peer` may go on, while `waiting` others have not logged in.
    ///
    /// # Errors
    /// Why not.
    pub fn admit(&self, access: &Access, limits: &ServeLimits, peer: IpAddr, waiting: usize) -> Result<(), Turned> {
        if !access.may_come(peer) {
            return Err(Turned::Unwelcome);
        }
        if locked(&self.penalties).refuses(peer, Instant::now()).is_some() {
            return Err(Turned::Penalised);
        }
        // At the limit itself its own words are better ones.
        let below = waiting < limits.unauthenticated.get();
        if below && startups::sheds(limits.startups, waiting, startups::draw()) {
            return Err(Turned::Shed);
        }
        Ok(())
    }

    /// Adds to the penalty of an address.
    pub fn punish(&self, peer: IpAddr, fault: Fault) {
        if let Some(length) = locked(&self.penalties).punish(peer, fault, Instant::now()) {
            let seconds = length.as_secs();
            tracing::warn!(%peer, ?fault, seconds, "it failed too often: the address is refused for a while");
        }
    }

    /// Counts somebody who was turned away. How many were before him of whom nothing was said; nothing when it is too soon to
    /// say anything again.
    pub fn count(&self, turned: Turned) -> Option<u64> {
        let kind = turned.kind();
        self.counts[kind].fetch_add(1, Ordering::Relaxed);
        let said = &mut locked(&self.said)[kind];
        if said.last.is_some_and(|last| last.elapsed() < PAUSE) {
            said.unsaid += 1;
            return None;
        }
        said.last = Some(Instant::now());
        Some(std::mem::take(&mut said.unsaid))
    }

    /// `12 by penalty, 3 shed`; empty where nobody was.
    pub fn turned_away(&self) -> String {
        let counts = self.counts.iter().map(|count| count.load(Ordering::Relaxed));
        let counts = counts.zip(KINDS).filter(|(count, _)| *count > 0);
        counts.map(|(count, kind)| format!("{count} {kind}")).collect::<Vec<_>>().join(", ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn h43_a_flood_is_counted_and_said_once() {
        let door = Door::new(Penalties::default(), None);
        assert_eq!(door.turned_away(), "");
        assert_eq!(door.count(Turned::Shed), Some(0));
        assert!((0..100).all(|_| door.count(Turned::Shed).is_none()));
        // Another kind is another matter.
        assert_eq!(door.count(Turned::Limit("too many connections")), Some(0));
        assert_eq!(door.turned_away(), "101 shed, 1 over a limit");
        locked(&door.said)[2].last = None;
        assert_eq!(door.count(Turned::Shed), Some(100));
    }
}
