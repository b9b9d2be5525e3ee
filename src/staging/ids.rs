//! Users and groups by name. An unknown name is an error and never number 0.

use std::collections::HashMap;
use std::sync::Mutex;

use crate::scan::names::{self, UnknownName};

/// Looks names up, each once in a run.
#[derive(Debug, Default)]
pub struct Ids {
    users: Known,
    groups: Known,
}

type Found = Result<u32, UnknownName>;
type Known = Mutex<HashMap<String, Found>>;

fn once(known: &Known, name: &str, look_up: fn(&str) -> Found) -> Found {
    let mut known = known.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if let Some(found) = known.get(name) {
        return found.clone();
    }
    known.entry(name.to_owned()).or_insert_with(|| look_up(name)).clone()
}

impl Ids {
    /// The number of a user; a number in digits is itself.
    ///
    /// # Errors
    /// [`UnknownName`].
    pub fn user(&self, name: &str) -> Result<u32, UnknownName> {
        once(&self.users, name, names::user_id)
    }

    /// The number of a group, likewise.
    ///
    /// # Errors
    /// [`UnknownName`].
    pub fn group(&self, name: &str) -> Result<u32, UnknownName> {
        once(&self.groups, name, names::group_id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn h48_an_unknown_name_is_an_error_and_never_root() {
        let ids = Ids::default();
        assert_eq!((ids.user("root"), ids.group("root"), ids.user("4711")), (Ok(0), Ok(0), Ok(4711)));
        for name in ["", "no-such-name", "-1", "+0", "4294967295", "4294967296", "0x0", " 0", "root\0x"] {
            for _ in 0..2 {
                assert!(ids.user(name).is_err() && ids.group(name).is_err(), "{name:?}");
            }
        }
    }
}
