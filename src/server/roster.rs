//! What may connect: each user, each line of his file of keys, and what it may do.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use russh::keys::HashAlg;
use serde::Serialize;

use super::access::{ServeUser, Which};
use super::authorized_keys::{AuthorizedKeys, Listed};
use super::listener::ServeConfig;
use super::resolve;
use crate::config::{Quota, Rights, is_called};
use crate::error::{Escaped, in_words, shown};
use crate::trust::revoked::Revoked;
use crate::trust::{Credential, trusted_file};

/// How somebody gets in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Way {
    /// By this key.
    Key,
    /// By a certificate that this key has signed.
    Authority,
    /// By a certificate with this principal, signed by an authority of the user.
    Principal,
}

/// One way for one user.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Row {
    /// The user.
    pub user: String,
    /// How.
    pub way: Way,
    /// The file, and the line in it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub place: Option<String>,
    /// The kind of key.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub algorithm: Option<String>,
    /// `SHA256:…`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fingerprint: Option<String>,
    /// What stands behind the key.
    pub comment: String,
    /// As they are written.
    pub options: Vec<String>,
    /// Of certificates: one of them has to be in it.
    pub principals: Vec<String>,
    /// Lists of addresses, all of which have to admit the client; from anywhere where there is none.
    pub from: Vec<String>,
    /// What is seen as `/`.
    pub root: String,
    /// What may be done.
    pub rights: Rights,
    /// How much may lie beneath the root.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub quota: Option<Quota>,
    /// As it is written.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expires: Option<String>,
    /// Why nobody gets in by it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub refused: Option<String>,
}

/// All of it.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Roster {
    /// `[serve] allow`; everybody where it is empty.
    pub allow: Vec<String>,
    /// `[serve] deny`.
    pub deny: Vec<String>,
    /// Users in the order of the configuration, lines in that of the file.
    pub rows: Vec<Row>,
    /// What could not be read.
    pub problems: Vec<String>,
}

fn escaped(text: &str) -> String {
    Escaped(text.as_bytes()).to_string()
}

/// Reads all files that decide.
pub fn read(config: &ServeConfig) -> Roster {
    let list = |origins: &[crate::config::Origin]| origins.iter().map(ToString::to_string).collect();
    let (allow, deny) = (list(&config.origins.allow), list(&config.origins.deny));
    let mut roster = Roster { allow, deny, ..Roster::default() };
    let revoked = config.revoked_keys.as_deref().map_or_else(|| Ok(Revoked::default()), Revoked::read);
    let revoked = revoked.map_err(|reason| roster.problems.push(format!("nobody can log in: {reason}"))).ok();
    for section in &config.users {
        for user in roster.users(section) {
            roster.user(&user, revoked.as_ref());
        }
    }
    roster
}

/// The names that files are there for, where each user has a file of his own.
fn names(section: &ServeUser) -> Result<Vec<String>, String> {
    let cannot = || format!("the files of {} are named after each user, and are not listed", escaped(&section.name));
    let path = &section.authorized_keys;
    let (Some(above), Some(name)) = (path.parent(), path.file_name().and_then(|name| name.to_str())) else {
        return Err(cannot());
    };
    let (front, back) = name.split_once("%u").filter(|_| !resolve::is_open(above)).ok_or_else(cannot)?;
    let fail = |error| format!("cannot list {}: {}", shown(above), in_words(&error));
    let mut found = Vec::new();
    for entry in fs::read_dir(above).map_err(fail)? {
        let file = entry.map_err(fail)?.file_name();
        let Some(token) = file.to_str().and_then(|file| file.strip_prefix(front)?.strip_suffix(back)) else { continue };
        if is_called(&section.name, token) && resolve::named(section, token).is_ok() {
            found.push(token.to_owned());
        }
    }
    found.sort();
    Ok(found)
}

impl Roster {
    /// Those who are meant by a section, as far as they are known.
    fn users(&mut self, section: &ServeUser) -> Vec<ServeUser> {
        if !section.name.contains('*') {
            let named = resolve::named(section, &section.name);
            return named.map_err(|reason| self.problems.push(reason)).into_iter().collect();
        }
        if !resolve::is_open(&section.authorized_keys) {
            return vec![resolve::fixed(section)];
        }
        let names = names(section).map_err(|reason| self.problems.push(reason)).unwrap_or_default();
        names.iter().filter_map(|name| resolve::named(section, name).ok()).collect()
    }

    fn user(&mut self, user: &ServeUser, revoked: Option<&Revoked>) {
        let keys = match trusted_file::read(&user.authorized_keys) {
            Ok(text) => AuthorizedKeys::parse(&text),
            Err(reason) => return self.problems.push(format!("user {}: {reason}", escaped(&user.name))),
        };
        for (number, reason) in &keys.unreadable {
            let file = shown(&user.authorized_keys);
            self.problems.push(format!("user {}: {file}, line {number} is left out: {reason}", escaped(&user.name)));
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        for line in keys.list(now) {
            let mut row = of_line(user, &line);
            let listed = revoked.map(|revoked| revoked.check(Credential::Key(line.key)));
            row.refused = match listed {
                None => Some("what is revoked is not known".into()),
                Some(Err(_)) => Some("revoked".into()),
                Some(Ok(())) => row.refused,
            };
            self.rows.push(row);
        }
        for own in &user.keys {
            let (of_key, name) = match &own.which {
                Which::Fingerprint(print) => (true, print),
                Which::Principal(name) => (false, name),
            };
            let listed = self.rows.iter().any(|row| row.user == user.name && row.fingerprint.as_ref() == Some(name));
            if of_key && listed {
                continue;
            }
            let missing = match of_key {
                true => Some("no line of the file has this key".to_owned()),
                false => Some("no line of the file is an authority".to_owned()).filter(|_| !keys.has_authority()),
            };
            let mut row = blank(user, if of_key { Way::Key } else { Way::Principal });
            row.fingerprint = of_key.then(|| name.clone());
            row.principals = if of_key { Vec::new() } else { vec![escaped(name)] };
            row.refused = missing;
            row.has(own);
            self.rows.push(row);
        }
    }
}

fn blank(user: &ServeUser, way: Way) -> Row {
    Row {
        user: user.name.clone(),
        way,
        place: None,
        algorithm: None,
        fingerprint: None,
        comment: String::new(),
        options: Vec::new(),
        principals: Vec::new(),
        from: user.from.iter().map(ToString::to_string).collect(),
        root: root_of(&user.root, &user.name),
        rights: user.rights,
        quota: user.quota,
        expires: None,
        refused: None,
    }
}

/// With the name filled in, where it is that of one user.
fn root_of(root: &Path, name: &str) -> String {
    let filled = if name.contains('*') { None } else { resolve::filled(root, name) };
    shown(&filled.unwrap_or_else(|| PathBuf::from(root))).to_string()
}

impl Row {
    /// What a key has that is not as for the user.
    fn has(&mut self, own: &super::access::ServeKey) {
        if let Some(root) = &own.root {
            self.root = root_of(root, &self.user);
        }
        self.rights = own.rights.unwrap_or(self.rights);
        self.quota = own.quota.or(self.quota);
        self.from.extend(own.from.iter().map(ToString::to_string));
    }
}

fn of_line(user: &ServeUser, line: &Listed<'_>) -> Row {
    let fingerprint = line.key.fingerprint(HashAlg::Sha256).to_string();
    let values = |wanted: &str| {
        let values = line.options.iter().filter(|(name, _)| name == wanted).filter_map(|(_, value)| value.clone());
        values.map(|value| escaped(&value)).collect::<Vec<_>>()
    };
    let mut row = blank(user, if line.authority { Way::Authority } else { Way::Key });
    if let Some(own) =
        user.keys.iter().find(|own| own.which == Which::Fingerprint(fingerprint.clone()) && !line.authority)
    {
        row.has(own);
    }
    row.from.extend(values("from"));
    row.principals = values("principals").iter().flat_map(|list| list.split(',')).map(str::to_owned).collect();
    if line.authority && row.principals.is_empty() {
        row.principals.push(user.name.clone());
    }
    row.rights = if line.read_only { row.rights.only_reading() } else { row.rights };
    row.place = Some(format!("{}:{}", shown(&user.authorized_keys), line.number));
    row.algorithm = Some(line.key.algorithm().to_string());
    row.comment = escaped(line.comment);
    row.expires = values("expiry-time").pop();
    row.options = line
        .options
        .iter()
        .map(|(name, value)| match value {
            Some(value) => format!("{}=\"{}\"", escaped(name), escaped(value)),
            None => escaped(name),
        })
        .collect();
    row.refused = line.refusal.as_deref().map(escaped);
    if !line.authority && user.name.contains('*') {
        row.refused = row.refused.or(Some("it would be good for many users; certificates alone are taken here".into()));
    }
    row.fingerprint = Some(fingerprint);
    row
}
