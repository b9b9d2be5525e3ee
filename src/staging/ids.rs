//! Users and groups by name. An unknown name is an error and never number 0.

use std::collections::HashMap;
use std::sync::Mutex;

use crate::error::Escaped;

/// A name that this machine does not know.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("there is no {kind} '{}' here; create it, or change the policy's rule", Escaped(name.as_bytes()))]
pub struct UnknownName {
    kind: &'static str,
    name: String,
}

/// Looks names up, each once in a run.
#[derive(Debug, Default)]
pub struct Ids {
    users: Mutex<HashMap<String, Option<u32>>>,
    groups: Mutex<HashMap<String, Option<u32>>>,
}

type Known = Mutex<HashMap<String, Option<u32>>>;

fn look_up(known: &Known, kind: &'static str, name: &str, ask: fn(&str) -> Option<u32>) -> Result<u32, UnknownName> {
    let mut known = known.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let found = match known.get(name) {
        Some(found) => *found,
        None => *known.entry(name.to_owned()).or_insert(ask(name).or_else(|| number(name))),
    };
    found.ok_or_else(|| UnknownName { kind, name: name.to_owned() })
}

/// Decimal digits only. 2^32 - 1 means "leave it" to chown(2) and is no number.
fn number(name: &str) -> Option<u32> {
    let digits = !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_digit());
    name.parse().ok().filter(|&id| digits && id != u32::MAX)
}

impl Ids {
    /// The number of a user; a number in digits is itself.
    ///
    /// # Errors
    /// [`UnknownName`].
    pub fn user(&self, name: &str) -> Result<u32, UnknownName> {
        look_up(&self.users, "user", name, |name| uzers::get_user_by_name(name).map(|user| user.uid()))
    }

    /// The number of a group, likewise.
    ///
    /// # Errors
    /// [`UnknownName`].
    pub fn group(&self, name: &str) -> Result<u32, UnknownName> {
        look_up(&self.groups, "group", name, |name| uzers::get_group_by_name(name).map(|group| group.gid()))
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
