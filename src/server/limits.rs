//! How many connections there may be, in all and from one address.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};

/// Counts connections; a [`Permit`] gives its place back when dropped.
#[derive(Debug)]
pub struct Limits {
    total: usize,
    per_address: usize,
    counts: Mutex<HashMap<IpAddr, usize>>,
}

/// A place taken.
#[derive(Debug)]
pub struct Permit {
    limits: Arc<Limits>,
    address: IpAddr,
}

impl Limits {
    /// Limits in all and for one address.
    pub fn new(total: usize, per_address: usize) -> Arc<Self> {
        Arc::new(Self { total, per_address, counts: Mutex::new(HashMap::new()) })
    }

    /// Takes a place, or says why there is none.
    ///
    /// # Errors
    /// Which limit is reached.
    pub fn admit(self: &Arc<Self>, address: IpAddr) -> Result<Permit, &'static str> {
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        if counts.values().sum::<usize>() >= self.total {
            return Err("too many connections");
        }
        let count = counts.entry(address).or_insert(0);
        if *count >= self.per_address {
            return Err("too many connections from this address");
        }
        *count += 1;
        Ok(Permit { limits: Arc::clone(self), address })
    }

    /// How many places are taken.
    pub fn active(&self) -> usize {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner).values().sum()
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let mut counts = self.limits.counts.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = counts.get_mut(&self.address) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.address);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn h43_places_are_counted_in_all_and_for_one_address_and_given_back() {
        let limits = Limits::new(2, 1);
        let (a, b, c) = ([127, 0, 0, 1].into(), [127, 0, 0, 2].into(), [127, 0, 0, 3].into());
        let first = limits.admit(a).unwrap();
        assert!(limits.admit(a).is_err());
        let _second = limits.admit(b).unwrap();
        assert!(limits.admit(c).is_err());
        drop(first);
        assert!(limits.admit(c).is_ok());
    }
}
