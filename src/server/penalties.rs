//! Addresses that fail again and again are refused for a while, as with sshd's PerSourcePenalties.
//!
//! What always holds: the table has a largest size; an address that is exempt has no penalty; what is refused is what came
//! from one address, or from one /64 of IPv6.

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::limits::block;
use crate::config::{AddressList, Penalties};

/// What a connection did that has not logged in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Fault {
    /// It offered keys, and none was good.
    FailedLogin,
    /// It ended without having tried.
    NoLogin,
    /// It took too long.
    Late,
    /// It did not keep to the protocol.
    Breach,
}

#[derive(Debug, Clone, Copy)]
struct Penalty {
    ends: Instant,
    /// It has come to so much that the address is refused, until it ends.
    active: bool,
}

/// The penalties of all addresses.
#[derive(Debug)]
pub struct PenaltyTable {
    config: Penalties,
    exempt: Option<AddressList>,
    table: HashMap<IpAddr, Penalty>,
    /// The same, by when they end.
    order: BTreeSet<(Instant, IpAddr)>,
}

impl PenaltyTable {
    /// Nobody has one yet.
    pub fn new(config: Penalties, exempt: Option<AddressList>) -> PenaltyTable {
        PenaltyTable { config, exempt, table: HashMap::new(), order: BTreeSet::new() }
    }

    /// Other numbers from now on. Who is exempt now has none any more.
    pub fn set(&mut self, config: Penalties, exempt: Option<AddressList>) {
        (self.config, self.exempt) = (config, exempt);
    }

    fn is_exempt(&self, peer: IpAddr) -> bool {
        self.exempt.as_ref().is_some_and(|list| list.admits(peer))
    }

    /// For how long an address is refused, if it is.
    pub fn refuses(&self, peer: IpAddr, now: Instant) -> Option<Duration> {
        let penalty = self.table.get(&block(peer)).filter(|penalty| penalty.active && !self.is_exempt(peer))?;
        penalty.ends.checked_duration_since(now).filter(|left| !left.is_zero())
    }

    /// Adds to the penalty of an address. Says for how long it is refused, when that begins with this.
    pub fn punish(&mut self, peer: IpAddr, fault: Fault, now: Instant) -> Option<Duration> {
        if self.is_exempt(peer) {
            return None;
        }
        let length = match fault {
            Fault::FailedLogin => self.config.failed_login,
            Fault::NoLogin => self.config.no_login,
            Fault::Late => self.config.late,
            Fault::Breach => self.config.breach,
        };
        let address = block(peer);
        let before = self.take(address).filter(|penalty| penalty.ends > now);
        let from = before.map_or(now, |penalty| penalty.ends);
        let ends = (from + length).min(now + self.config.most);
        let was_active = before.is_some_and(|penalty| penalty.active);
        let active = was_active || ends.saturating_duration_since(now) >= self.config.least;
        self.make_room(now);
        self.table.insert(address, Penalty { ends, active });
        self.order.insert((ends, address));
        (active && !was_active).then(|| ends.saturating_duration_since(now))
    }

    fn take(&mut self, address: IpAddr) -> Option<Penalty> {
        let penalty = self.table.remove(&address)?;
        self.order.remove(&(penalty.ends, address));
        Some(penalty)
    }

    /// What is over goes, and where there is no room what ends first.
    fn make_room(&mut self, now: Instant) {
        while let Some(&(ends, address)) = self.order.first() {
            if ends > now && self.table.len() < self.config.addresses.get() {
                break;
            }
            self.take(address);
        }
    }

    /// Of how many addresses it knows.
    pub fn len(&self) -> usize {
        self.table.len()
    }

    /// Whether it knows of none.
    pub fn is_empty(&self) -> bool {
        self.table.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn table(addresses: usize, exempt: &[&str]) -> PenaltyTable {
        let exempt = (!exempt.is_empty()).then(|| AddressList::parse(exempt.iter().copied()).unwrap());
        let addresses = addresses.try_into().unwrap();
        PenaltyTable::new(Penalties { addresses, least: 15 * SECOND, ..Penalties::default() }, exempt)
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn h43_penalties_grow_to_a_maximum_and_pass_with_time() {
        let (mut table, now, peer) = (table(10, &[]), Instant::now(), ip("192.0.2.1"));
        assert_eq!(table.punish(peer, Fault::FailedLogin, now), None);
        assert_eq!(table.punish(peer, Fault::FailedLogin, now), None);
        assert_eq!(table.refuses(peer, now), None);
        assert_eq!(table.punish(peer, Fault::FailedLogin, now), Some(15 * SECOND));
        assert_eq!(table.refuses(peer, now + 5 * SECOND), Some(10 * SECOND));
        assert_eq!(table.refuses(ip("192.0.2.2"), now), None);
        assert_eq!(table.refuses(peer, now + 15 * SECOND), None);
        for _ in 0..1000 {
            // It is refused already.
            assert_eq!(table.punish(peer, Fault::Breach, now), None);
        }
        assert_eq!(table.refuses(peer, now), Some(600 * SECOND));
        // Decay: what has passed does not count any more.
        let later = now + 700 * SECOND;
        assert_eq!(table.punish(peer, Fault::FailedLogin, later), None);
        assert_eq!(table.refuses(peer, later), None);
    }

    #[test]
    fn h43_faults_differ_in_weight() {
        let now = Instant::now();
        for (fault, needed) in [(Fault::NoLogin, 15), (Fault::FailedLogin, 3), (Fault::Late, 2), (Fault::Breach, 2)] {
            let mut table = table(10, &[]);
            let count = (1..).find(|_| table.punish(ip("192.0.2.1"), fault, now).is_some());
            assert_eq!(count, Some(needed), "{fault:?}");
        }
    }

    #[test]
    fn h43_a_network_of_ipv6_is_one_address_and_ranges_can_be_exempt() {
        let (mut table, now) = (table(10, &["10.0.0.0/8", "2001:db8:1::/48"]), Instant::now());
        for _ in 0..3 {
            for peer in ["2001:db8::1", "10.1.1.1", "2001:db8:1::1"] {
                table.punish(ip(peer), Fault::FailedLogin, now);
            }
        }
        for (peer, refused) in
            [("2001:db8::2:0:0:1", true), ("2001:db8:0:1::1", false), ("10.1.1.1", false), ("2001:db8:1::1", false)]
        {
            assert_eq!(table.refuses(ip(peer), now).is_some(), refused, "{peer}");
        }
        assert_eq!(table.len(), 1);
        table.set(Penalties::default(), Some(AddressList::parse(["2001:db8::/32"]).unwrap()));
        assert_eq!(table.refuses(ip("2001:db8::1"), now), None);
    }

    #[test]
    fn h43_the_table_does_not_grow_without_end() {
        let (mut table, now) = (table(100, &[]), Instant::now());
        let of = |number: u32| IpAddr::V4(std::net::Ipv4Addr::from_bits(0xC633_0000 | number));
        for _ in 0..3 {
            table.punish(of(60_000), Fault::Late, now);
        }
        for number in 0..10_000 {
            table.punish(of(number), Fault::NoLogin, now);
            assert!(table.len() <= 100 && table.order.len() == table.len());
        }
        // The one that lasts longest stays.
        assert!(table.refuses(of(60_000), now).is_some());
        // What is over makes room for itself.
        table.punish(of(1), Fault::NoLogin, now + 3600 * SECOND);
        assert_eq!(table.len(), 1);
    }
}
