//! Names of users and groups on this machine. Each is looked up once.

use std::collections::HashMap;

use crate::error::Escaped;
use crate::manifest::Name;

/// Names that were looked up.
#[derive(Debug, Default)]
pub struct Names {
    users: HashMap<u32, Name>,
    groups: HashMap<u32, Name>,
}

impl Names {
    /// The user's name; the number in decimal digits where there is none.
    pub fn user(&mut self, uid: u32) -> Name {
        let look_up = || uzers::get_user_by_uid(uid).map(|user| user.name().to_string_lossy().into_owned());
        self.users.entry(uid).or_insert_with(|| look_up().unwrap_or_else(|| uid.to_string()).into()).clone()
    }

    /// The group's name, likewise.
    pub fn group(&mut self, gid: u32) -> Name {
        let look_up = || uzers::get_group_by_gid(gid).map(|group| group.name().to_string_lossy().into_owned());
        self.groups.entry(gid).or_insert_with(|| look_up().unwrap_or_else(|| gid.to_string()).into()).clone()
    }
}

/// `user@host` of whoever runs this, for locks and the audit log.
pub fn actor() -> String {
    let user = uzers::get_current_username()
        .map_or_else(|| rustix::process::getuid().as_raw().to_string(), |name| name.to_string_lossy().into_owned());
    format!("{user}@{}", rustix::system::uname().nodename().to_string_lossy())
}

/// A name that this machine does not know.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("there is no {kind} '{}' on this machine; create it, or name another", Escaped(name.as_bytes()))]
pub struct UnknownName {
    /// `user` or `group`.
    pub kind: &'static str,
    /// The name.
    pub name: String,
}

/// The number of a user, by name or by number in decimal digits. An unknown name is an error, never 0.
///
/// # Errors
/// [`UnknownName`].
pub fn user_id(name: &str) -> Result<u32, UnknownName> {
    match uzers::get_user_by_name(name) {
        Some(user) => Ok(user.uid()),
        None => number(name).ok_or_else(|| UnknownName { kind: "user", name: name.to_owned() }),
    }
}

/// The number of a group, likewise.
///
/// # Errors
/// [`UnknownName`].
pub fn group_id(name: &str) -> Result<u32, UnknownName> {
    match uzers::get_group_by_name(name) {
        Some(group) => Ok(group.gid()),
        None => number(name).ok_or_else(|| UnknownName { kind: "group", name: name.to_owned() }),
    }
}

/// u32::MAX is left out: to chown(2) it means "do not change".
fn number(text: &str) -> Option<u32> {
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    text.parse().ok().filter(|&number| digits && number != u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn h48_an_unknown_name_is_an_error_and_never_root() {
        for name in ["no-such-user-here", "", "-1", "+5", "4294967295", "99999999999", "0x0"] {
            assert!(user_id(name).is_err(), "{name:?}");
            assert!(group_id(name).is_err(), "{name:?}");
        }
        assert_eq!(user_id("root"), Ok(0));
        assert_eq!(user_id("61234"), Ok(61234));
        assert_eq!(&*Names::default().user(0), "root");
        assert_eq!(&*Names::default().user(61234), "61234");
    }
}
