//! Names of users and groups on this machine. Each is looked up once.

use std::collections::HashMap;
use std::sync::OnceLock;

use serde::{Deserialize, Serialize};

use crate::error::Escaped;
use crate::manifest::Name;

/// What is asked about users and groups.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Question {
    /// The name of the user with this number.
    UserName(u32),
    /// The name of the group with this number.
    GroupName(u32),
    /// The number of the user with this name.
    UserId(String),
    /// The number of the group with this name.
    GroupId(String),
}

/// What there is; nothing where nobody has that name or number.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Found {
    /// A name.
    Name(String),
    /// A number.
    Id(u32),
    /// Neither.
    Nothing,
}

/// Asks somebody who may look. It may block.
pub type Asking = Box<dyn Fn(Question) -> Found + Send + Sync>;

static ELSEWHERE: OnceLock<Asking> = OnceLock::new();

/// From now on this process asks another one: name services need sockets, libraries and files that a confined one has not.
/// Only the first call counts.
pub fn ask_elsewhere(asking: Asking) {
    let _ = ELSEWHERE.set(asking);
}

fn ask(question: Question) -> Found {
    match ELSEWHERE.get() {
        Some(asking) => asking(question),
        None => look_up(&question),
    }
}

/// Looks it up in this process.
pub fn look_up(question: &Question) -> Found {
    let text = |name: &std::ffi::OsStr| Found::Name(name.to_string_lossy().into_owned());
    match question {
        Question::UserName(id) => uzers::get_user_by_uid(*id).map(|user| text(user.name())),
        Question::GroupName(id) => uzers::get_group_by_gid(*id).map(|group| text(group.name())),
        Question::UserId(name) => uzers::get_user_by_name(name).map(|user| Found::Id(user.uid())),
        Question::GroupId(name) => uzers::get_group_by_name(name).map(|group| Found::Id(group.gid())),
    }
    .unwrap_or(Found::Nothing)
}

/// The user's name, if there is one.
pub fn user_name(uid: u32) -> Option<String> {
    named(Question::UserName(uid))
}

/// The group's name, if there is one.
pub fn group_name(gid: u32) -> Option<String> {
    named(Question::GroupName(gid))
}

fn named(question: Question) -> Option<String> {
    match ask(question) {
        Found::Name(name) => Some(name),
        _ => None,
    }
}

/// Names that were looked up.
#[derive(Debug, Default)]
pub struct Names {
    users: HashMap<u32, Name>,
    groups: HashMap<u32, Name>,
}

impl Names {
    /// The user's name; the number in decimal digits where there is none.
    pub fn user(&mut self, uid: u32) -> Name {
        let look_up = || user_name(uid).unwrap_or_else(|| uid.to_string()).into();
        self.users.entry(uid).or_insert_with(look_up).clone()
    }

    /// The group's name, likewise.
    pub fn group(&mut self, gid: u32) -> Name {
        let look_up = || group_name(gid).unwrap_or_else(|| gid.to_string()).into();
        self.groups.entry(gid).or_insert_with(look_up).clone()
    }
}

/// `user@host` of whoever runs this, for locks and the audit log.
pub fn actor() -> String {
    let uid = rustix::process::getuid().as_raw();
    let user = user_name(uid).unwrap_or_else(|| uid.to_string());
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
    match ask(Question::UserId(name.to_owned())) {
        Found::Id(id) => Ok(id),
        _ => number(name).ok_or_else(|| UnknownName { kind: "user", name: name.to_owned() }),
    }
}

/// The number of a group, likewise.
///
/// # Errors
/// [`UnknownName`].
pub fn group_id(name: &str) -> Result<u32, UnknownName> {
    match ask(Question::GroupId(name.to_owned())) {
        Found::Id(id) => Ok(id),
        _ => number(name).ok_or_else(|| UnknownName { kind: "group", name: name.to_owned() }),
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
