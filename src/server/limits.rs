//! How many connections and sessions there may be: in all, from one address, before they have logged in, of one user.

use std::collections::HashMap;
use std::hash::Hash;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::config::ServeLimits;

/// Counts; a place that was taken is given back when its permit is dropped.
#[derive(Debug)]
pub struct Limits {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    caps: ServeLimits,
    connections: usize,
    unauthenticated: usize,
    by_address: HashMap<IpAddr, usize>,
    sessions: usize,
    by_user: HashMap<String, usize>,
}

/// The place of a connection.
#[derive(Debug)]
pub struct Permit {
    limits: Arc<Limits>,
    address: IpAddr,
    login: Mutex<bool>,
}

/// The place of a session.
#[derive(Debug)]
pub struct SessionPermit {
    limits: Arc<Limits>,
    user: String,
}

impl Limits {
    /// Nothing is taken yet.
    pub fn new(caps: ServeLimits) -> Arc<Self> {
        let (by_address, by_user) = (HashMap::new(), HashMap::new());
        let state = State { caps, connections: 0, unauthenticated: 0, by_address, sessions: 0, by_user };
        Arc::new(Self { state: Mutex::new(state) })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Other limits from now on. What is there stays.
    pub fn set(&self, caps: ServeLimits) {
        self.lock().caps = caps;
    }

    /// Takes a place for a connection that has not logged in.
    ///
    /// # Errors
    /// Which limit is reached.
    pub fn admit(self: &Arc<Self>, address: IpAddr) -> Result<Permit, &'static str> {
        let address = block(address);
        let mut state = self.lock();
        if state.connections >= state.caps.connections.get() {
            return Err("too many connections");
        }
        if state.unauthenticated >= state.caps.unauthenticated.get() {
            return Err("too many connections that have not logged in");
        }
        if count(&state.by_address, &address) >= state.caps.per_address.get() {
            return Err("too many connections from this address");
        }
        state.connections += 1;
        state.unauthenticated += 1;
        *state.by_address.entry(address).or_insert(0) += 1;
        Ok(Permit { limits: Arc::clone(self), address, login: Mutex::new(false) })
    }

    /// Takes a place for a session.
    ///
    /// # Errors
    /// Which limit is reached.
    pub fn session(self: &Arc<Self>, user: &str) -> Result<SessionPermit, &'static str> {
        let mut state = self.lock();
        if state.sessions >= state.caps.sessions.get() {
            return Err("too many sessions");
        }
        if count(&state.by_user, user) >= state.caps.sessions_per_user.get() {
            return Err("too many sessions of this user");
        }
        state.sessions += 1;
        *state.by_user.entry(user.to_owned()).or_insert(0) += 1;
        Ok(SessionPermit { limits: Arc::clone(self), user: user.to_owned() })
    }

    /// How many of them have not logged in.
    pub fn waiting(&self) -> usize {
        self.lock().unauthenticated
    }

    /// How many connections there are.
    pub fn connections(&self) -> usize {
        self.lock().connections
    }

    /// How many sessions there are.
    pub fn sessions(&self) -> usize {
        self.lock().sessions
    }
}

/// Whoever has one address of IPv6 has a /64 of them.
pub(super) fn block(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => IpAddr::V6(std::net::Ipv6Addr::from_bits(address.to_bits() & !u128::from(u64::MAX))),
        address => address,
    }
}

fn count<K: Hash + Eq + std::borrow::Borrow<Q>, Q: Hash + Eq + ?Sized>(counts: &HashMap<K, usize>, key: &Q) -> usize {
    counts.get(key).copied().unwrap_or(0)
}

fn give_back<K: Hash + Eq>(counts: &mut HashMap<K, usize>, key: &K) {
    if let Some(count) = counts.get_mut(key) {
        *count -= 1;
        if *count == 0 {
            counts.remove(key);
        }
    }
}

impl Permit {
    /// The connection has logged in, and no longer counts among those that have not.
    pub fn logged_in(&self) {
        let mut login = self.login.lock().unwrap_or_else(PoisonError::into_inner);
        if !std::mem::replace(&mut *login, true) {
            self.limits.lock().unauthenticated -= 1;
        }
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.logged_in();
        let mut state = self.limits.lock();
        state.connections -= 1;
        give_back(&mut state.by_address, &self.address);
    }
}

impl Drop for SessionPermit {
    fn drop(&mut self) {
        let mut state = self.limits.lock();
        state.sessions -= 1;
        give_back(&mut state.by_user, &self.user);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::num::NonZeroUsize;

    fn limits(connections: usize, per_address: usize, unauthenticated: usize) -> Arc<Limits> {
        let count = |number| NonZeroUsize::new(number).unwrap();
        Limits::new(ServeLimits {
            connections: count(connections),
            per_address: count(per_address),
            unauthenticated: count(unauthenticated),
            sessions: count(3),
            sessions_per_user: count(2),
            ..ServeLimits::default()
        })
    }

    #[test]
    fn h43_places_are_counted_in_all_and_for_one_address_and_given_back() {
        let limits = limits(2, 1, 9);
        let (a, b, c) = ([127, 0, 0, 1].into(), [127, 0, 0, 2].into(), [127, 0, 0, 3].into());
        let first = limits.admit(a).unwrap();
        assert_eq!(limits.admit(a).unwrap_err(), "too many connections from this address");
        let _second = limits.admit(b).unwrap();
        assert_eq!(limits.admit(c).unwrap_err(), "too many connections");
        drop(first);
        assert!(limits.admit(c).is_ok());
        assert_eq!(limits.connections(), 1);
    }

    #[test]
    fn h43_those_that_have_not_logged_in_have_a_limit_of_their_own() {
        let limits = limits(9, 9, 1);
        let first = limits.admit([127, 0, 0, 1].into()).unwrap();
        assert!(limits.admit([127, 0, 0, 2].into()).unwrap_err().contains("not logged in"));
        first.logged_in();
        first.logged_in();
        let second = limits.admit([127, 0, 0, 2].into()).unwrap();
        drop(first);
        assert!(limits.admit([127, 0, 0, 2].into()).is_err());
        drop(second);
        assert!(limits.admit([127, 0, 0, 2].into()).is_ok());
    }

    #[test]
    fn h43_a_network_of_ipv6_counts_as_one_address() {
        let limits = limits(9, 1, 9);
        let _first = limits.admit("2001:db8::1".parse().unwrap()).unwrap();
        assert!(limits.admit("2001:db8::2:0:0:1".parse().unwrap()).is_err());
        assert!(limits.admit("2001:db8:0:1::1".parse().unwrap()).is_ok());
    }

    #[test]
    fn sessions_are_counted_in_all_and_for_one_user() {
        let limits = limits(9, 9, 9);
        let first = limits.session("a").unwrap();
        let _second = limits.session("a").unwrap();
        assert_eq!(limits.session("a").unwrap_err(), "too many sessions of this user");
        let _third = limits.session("b").unwrap();
        assert_eq!(limits.session("c").unwrap_err(), "too many sessions");
        drop(first);
        assert!(limits.session("a").is_ok());
        assert_eq!(limits.sessions(), 2);
    }
}
