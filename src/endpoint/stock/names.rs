//! Users and groups of the other machine, by number and by name.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Mutex, PoisonError};

use crossbeam_channel::{Receiver, unbounded};

use super::prove::SharedShell;
use super::read::read_whole;
use super::session::{Reply, Session, extended};
use super::shell::Job;
use crate::endpoint::Error;
use crate::endpoint::client::Completion;
use crate::error::Escaped;
use crate::manifest::Name;
use crate::wire::buffer::Reader;

/// Numbers asked for in one request.
const AT_ONCE: usize = 1000;

/// Names by number, as the server gives them; the number in digits where it does not.
#[derive(Debug, Default)]
pub(super) struct Names {
    users: HashMap<u32, Name>,
    groups: HashMap<u32, Name>,
    /// What was asked about numbers that are likely to come, until it is needed.
    expected: Option<Expected>,
}

#[derive(Debug)]
struct Expected {
    user: u32,
    group: u32,
    answers: Receiver<Completion>,
}

impl Names {
    /// Asks for the names of a user and a group, and does not wait for them.
    ///
    /// # Errors
    /// When the connection has ended.
    pub(super) fn expect(&mut self, session: &Session, (user, group): (u32, u32)) -> Result<(), Error> {
        if session.offers.names {
            let (sender, answers) = unbounded();
            session.client.submit(question(&[user], true), 0, 0, &sender)?;
            session.client.submit(question(&[group], false), 0, 1, &sender)?;
            self.expected = Some(Expected { user, group, answers });
        }
        Ok(())
    }

    fn settle(&mut self, session: &Session) -> Result<(), Error> {
        let Some(Expected { user, group, answers }) = self.expected.take() else { return Ok(()) };
        for _ in 0..2 {
            let (tag, reply) = session.completed(session.client.wait(&answers, false)?)?;
            match tag {
                0 => self.users.extend(answer(session, &[user], true, reply)?),
                _ => self.groups.extend(answer(session, &[group], false, reply)?),
            }
        }
        Ok(())
    }

    /// Asks for those that are not known yet.
    ///
    /// # Errors
    /// When the connection ends.
    pub(super) fn learn(
        &mut self,
        session: &Session,
        users: &BTreeSet<u32>,
        groups: &BTreeSet<u32>,
    ) -> Result<(), Error> {
        if !session.offers.names {
            return Ok(());
        }
        self.settle(session)?;
        let unknown = |ids: &BTreeSet<u32>, known: &HashMap<u32, Name>| -> Vec<u32> {
            ids.iter().copied().filter(|id| !known.contains_key(id)).collect()
        };
        let (users, groups) = (unknown(users, &self.users), unknown(groups, &self.groups));
        // Both kinds have one answer each, and all of them one flight.
        let of = |ids: &[u32], user: bool| -> Vec<(bool, Vec<u32>)> {
            ids.chunks(AT_ONCE).map(|ids| (user, ids.to_vec())).collect()
        };
        let asked = [of(&users, true), of(&groups, false)].concat();
        let replies = session.batch(asked.iter().map(|(user, ids)| question(ids, *user)))?;
        for ((user, ids), reply) in asked.iter().zip(replies) {
            let found = answer(session, ids, *user, reply)?;
            if *user { self.users.extend(found) } else { self.groups.extend(found) }
        }
        Ok(())
    }

    pub(super) fn user(&self, uid: u32) -> Name {
        self.users.get(&uid).cloned().unwrap_or_else(|| uid.to_string().into())
    }

    pub(super) fn group(&self, gid: u32) -> Name {
        self.groups.get(&gid).cloned().unwrap_or_else(|| gid.to_string().into())
    }
}

fn question(ids: &[u32], users: bool) -> Vec<u8> {
    let bytes: Vec<u8> = ids.iter().flat_map(|id| id.to_be_bytes()).collect();
    let (first, second): (&[u8], &[u8]) = if users { (&bytes, b"") } else { (b"", &bytes) };
    extended("users-groups-by-id@openssh.com", &[first, second])
}

/// The pairs of numbers and names; those without a name are left out.
fn answer(session: &Session, ids: &[u32], users: bool, reply: Reply) -> Result<Vec<(u32, Name)>, Error> {
    let body = match reply {
        Reply::Extended(body) => body,
        Reply::Refused(_) => return Ok(Vec::new()),
        _ => return Err(session.odd()),
    };
    let short = |_| session.client.protocol("a short answer to users-groups-by-id@openssh.com");
    let mut lists = Reader(&body);
    let (user_list, group_list) = (lists.string().map_err(short)?, lists.string().map_err(short)?);
    let mut list = Reader(if users { user_list } else { group_list });
    let mut found = Vec::with_capacity(ids.len());
    for &id in ids {
        let name = list.string().map_err(short)?;
        // A name goes into the manifest as it is, and digits would read as another number.
        let sound = |name: &&str| !name.is_empty() && !name.bytes().all(|byte| byte.is_ascii_digit());
        if let Some(name) = std::str::from_utf8(name).ok().filter(sound) {
            found.push((id, name.into()));
        }
    }
    Ok(found)
}

/// Numbers by name. An unknown name is an error, never 0.
#[derive(Default)]
pub(super) struct Ids {
    known: Mutex<HashMap<(bool, String), Result<u32, String>>>,
}

impl Ids {
    /// The number of a user of the other machine; a number in digits is itself.
    ///
    /// # Errors
    /// `Err(reason)` inside: there is no such user, or nobody can say. Outside: the connection ended.
    pub(super) fn user(
        &self,
        session: &Session,
        shell: &SharedShell,
        name: &str,
    ) -> Result<Result<u32, String>, Error> {
        self.look_up(session, shell, name, true)
    }

    /// The number of a group, likewise.
    ///
    /// # Errors
    /// As [`Ids::user`].
    pub(super) fn group(
        &self,
        session: &Session,
        shell: &SharedShell,
        name: &str,
    ) -> Result<Result<u32, String>, Error> {
        self.look_up(session, shell, name, false)
    }

    fn look_up(
        &self,
        session: &Session,
        shell: &SharedShell,
        name: &str,
        user: bool,
    ) -> Result<Result<u32, String>, Error> {
        if !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_digit()) {
            let number = name.parse().ok().filter(|&number| number != u32::MAX);
            return Ok(number.ok_or_else(|| format!("'{name}' is out of range")));
        }
        let key = (user, name.to_owned());
        if let Some(found) = self.known.lock().unwrap_or_else(PoisonError::into_inner).get(&key) {
            return Ok(found.clone());
        }
        let found = find(session, shell, name, user)?;
        self.known.lock().unwrap_or_else(PoisonError::into_inner).insert(key, found.clone());
        Ok(found)
    }
}

fn find(session: &Session, shell: &SharedShell, name: &str, user: bool) -> Result<Result<u32, String>, Error> {
    let kind = if user { "user" } else { "group" };
    let shown = Escaped(name.as_bytes());
    if name.is_empty() || name.contains([':', '\n', '\0']) || name.starts_with('-') {
        return Ok(Err(format!("'{shown}' is not the name of a {kind}")));
    }
    let unknown =
        format!("there is no {kind} '{shown}' on {}; create it, or name another in the policy", session.client.host());
    let job = if user { Job::Users } else { Job::Groups };
    if let Some(shell) = super::target::locked(shell).running()
        && let Ok(output) = shell.run(job, &[name.as_bytes()])
    {
        return Ok(number_in(&output, name).ok_or(unknown));
    }
    let file: &[u8] = if user { b"/etc/passwd" } else { b"/etc/group" };
    match read_whole(session, file)? {
        Ok(text) => Ok(number_in(&text, name).ok_or(unknown)),
        Err(_) => Ok(Err(format!(
            "{} runs no command for us and shows no {}, so that the number of the {kind} '{shown}' is not known; write \
             the number in the policy",
            session.client.host(),
            String::from_utf8_lossy(file)
        ))),
    }
}

/// The third field of the line whose first is `name`, as passwd(5) and group(5) have it.
fn number_in(text: &[u8], name: &str) -> Option<u32> {
    text.split(|&byte| byte == b'\n').find_map(|line| {
        let mut fields = line.split(|&byte| byte == b':');
        let found = fields.next() == Some(name.as_bytes());
        let number = std::str::from_utf8(fields.nth(1)?).ok()?;
        number.parse().ok().filter(|&number| found && number != u32::MAX)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn h48_numbers_are_found_by_the_whole_name_only() {
        let text = b"root:x:0:0:root:/root:/bin/sh\ntrainer:x:1001:1001::/home/trainer:/bin/sh\nx:y:z\n";
        assert_eq!(number_in(text, "trainer"), Some(1001));
        for name in ["train", "traine", "x", "", "0"] {
            assert_eq!(number_in(text, name), None, "{name}");
        }
    }
}
