//! `[serve]`: lockstep's own listener, its users and its limits.

use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use super::floods::{Penalties, Startups};
use super::origins::{Origin, Origins};
use super::quota::Quota;
use super::rights::Rights;
use super::{AddressList, absolute, meant};

/// The listener.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Serve {
    /// Address and port, or several.
    #[serde(deserialize_with = "one_or_more")]
    pub listen: Vec<SocketAddr>,
    /// The host key's file; made when missing. Absolute.
    pub host_key: PathBuf,
    /// A certificate for the host key, as `ssh-keygen -h` makes it; absolute.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_certificate: Option<PathBuf>,
    /// Keys and certificates that are refused whoever lists them: public keys, fingerprints, or a KRL. Absolute.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revoked_keys: Option<PathBuf>,
    /// A directory that gets the record of logins, sessions and refusals, chained as that of a root. Absolute.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub audit: Option<PathBuf>,
    /// Refuse clients without strict key exchange (CVE-2023-48795). Without, the one cipher that needs it is not offered.
    #[serde(default = "yes")]
    pub strict_key_exchange: bool,
    /// What happens where the kernel cannot confine the process of a connection.
    #[serde(default)]
    pub confine: Confine,
    /// Who may come in from where, beside `from` of each user; everybody from anywhere where there is none.
    #[serde(default, deserialize_with = "somebody", skip_serializing_if = "Vec::is_empty")]
    pub allow: Vec<Origin>,
    /// Who may not, whatever `allow` says.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub deny: Vec<Origin>,
    /// For how long an address is refused that fails again and again.
    #[serde(default)]
    pub penalties: Penalties,
    /// Addresses without penalties.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub penalty_exempt: Option<AddressList>,
    /// How much is allowed.
    #[serde(default)]
    pub limits: ServeLimits,
    /// Who may log in.
    #[serde(default, rename = "user")]
    pub users: Vec<ServeUser>,
}

/// Whether nobody is served where the kernel lacks Landlock or seccomp.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Confine {
    /// What there is, is used; the log and the status line say what that is.
    #[default]
    WhenPossible,
    /// The server does not start, and lets nobody in.
    Require,
}

/// One `[[serve.user]]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ServeUser {
    /// The name that clients log in with; with `*` it is for all whose names fit.
    pub name: String,
    /// The directory that is all the user sees; absolute. `%u` is the name that was logged in with, `%p` the principal of the
    /// certificate.
    pub root: PathBuf,
    /// Make the root, 0700, where it is missing; the directory above has to be there.
    #[serde(default, skip_serializing_if = "is_false")]
    pub create_root: bool,
    /// The file with the user's public keys; absolute. `%u` as for `root`.
    pub authorized_keys: PathBuf,
    /// Short for `rights = ["list", "read"]`.
    #[serde(default)]
    pub read_only: bool,
    /// What may be done; absent for everything (or see `read_only`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rights: Option<Rights>,
    /// How much may lie beneath the root.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quota: Option<Quota>,
    /// The policy of what arrives; it wins over the sender's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy: Option<String>,
    /// The account of this machine that the user's sessions run as; absent for the server's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub run_as: Option<String>,
    /// Where the user may come from; absent for anywhere.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<AddressList>,
    /// Keys and principals that have something else than the rest of the user's.
    #[serde(default, rename = "key", skip_serializing_if = "Vec::is_empty")]
    pub keys: Vec<ServeKey>,
}

/// One `[[serve.user.key]]`. What it does not say is as for the user.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ServeKey {
    /// `SHA256:…` of the key that signs; of a certificate, of its key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fingerprint: Option<String>,
    /// A principal of the certificate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub principal: Option<String>,
    /// As for a user.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub root: Option<PathBuf>,
    /// As for a user.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rights: Option<Rights>,
    /// As for a user.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quota: Option<Quota>,
    /// As for a user.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy: Option<String>,
    /// Beside the user's: both have to admit the address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<AddressList>,
}

/// `[serve.limits]`; every number is at least 1.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ServeLimits {
    /// Connections in all.
    pub connections: NonZeroUsize,
    /// Connections from one address (one /64 of IPv6).
    pub per_address: NonZeroUsize,
    /// Connections that have not logged in yet.
    pub unauthenticated: NonZeroUsize,
    /// From how many of them on new ones are shed at random, and how many.
    pub startups: Startups,
    /// Sessions in all.
    pub sessions: NonZeroUsize,
    /// Sessions of one user.
    pub sessions_per_user: NonZeroUsize,
    /// Sessions of one connection.
    pub channels: NonZeroUsize,
    /// Keys that a connection may offer in vain before it is dropped.
    pub auth_tries: NonZeroUsize,
    /// How long a client may take to log in.
    #[serde(deserialize_with = "duration", serialize_with = "length")]
    pub login_grace: Duration,
    /// How long a client may do nothing; its other connections count.
    #[serde(deserialize_with = "duration", serialize_with = "length")]
    pub idle_timeout: Duration,
    /// How long work that was begun may go on after a stop is asked for.
    #[serde(deserialize_with = "duration", serialize_with = "length")]
    pub stop_grace: Duration,
}

impl Default for ServeLimits {
    fn default() -> Self {
        let count = |number| NonZeroUsize::new(number).unwrap_or(NonZeroUsize::MIN);
        ServeLimits {
            connections: count(256),
            per_address: count(32),
            unauthenticated: count(64),
            startups: Startups::default(),
            sessions: count(512),
            sessions_per_user: count(128),
            channels: count(16),
            auth_tries: count(6),
            login_grace: Duration::from_secs(30),
            idle_timeout: Duration::from_secs(1800),
            stop_grace: Duration::from_secs(30),
        }
    }
}

/// A list that names somebody: where it was to be filled in and was not, nobody is let in rather than everybody.
fn somebody<'de, D: Deserializer<'de>>(input: D) -> Result<Vec<Origin>, D::Error> {
    let list = Vec::<Origin>::deserialize(input)?;
    if list.is_empty() {
        return Err(de::Error::custom(
            "'allow' names nobody, so that nobody could come in; leave it out for everybody",
        ));
    }
    Ok(list)
}

impl Serve {
    pub(super) fn check(&self) -> Result<(), String> {
        absolute("host_key", &self.host_key)?;
        let paths = [&self.host_certificate, &self.revoked_keys, &self.audit];
        for (field, path) in ["host_certificate", "revoked_keys", "audit"].iter().zip(paths) {
            path.as_ref().map_or(Ok(()), |path| absolute(field, path))?;
        }
        for (field, list) in [("allow", &self.allow), ("deny", &self.deny)] {
            // A name that is nobody's would let in, or keep out, nobody.
            let mut named = list.iter().filter_map(|origin| origin.user.as_ref());
            if let Some(name) = named.find(|name| !self.users.iter().any(|user| user.is_called(name))) {
                let known: Vec<String> = self.users.iter().map(|user| user.name.clone()).collect();
                let shown = crate::error::Escaped(name.as_bytes());
                return Err(format!("'{field}': there is no user '{shown}'{}", meant(name, &known)));
            }
        }
        if self.penalties.most < self.penalties.least {
            return Err("penalties: 'most' is below 'least', so that nobody would ever be refused".into());
        }
        Ok(())
    }

    /// Who may come from where.
    pub fn origins(&self) -> Origins {
        Origins { allow: self.allow.clone(), deny: self.deny.clone() }
    }
}

impl ServeUser {
    pub(super) fn check(&self) -> Result<(), String> {
        if self.name.contains(|c: char| c.is_control() || c.is_whitespace() || matches!(c, '?' | '!' | '@' | '/')) {
            return Err("the name holds blanks, control characters, or one of '?', '!', '@' and '/'".into());
        }
        if self.read_only && self.rights.is_some() {
            return Err("'read_only' is short for rights = [\"list\", \"read\"]; say it one way".into());
        }
        absolute("root", &self.root)?;
        absolute("authorized_keys", &self.authorized_keys)?;
        tokens("root", &self.root, "up")?;
        tokens("authorized_keys", &self.authorized_keys, "u")?;
        self.quota.map_or(Ok(()), |quota| quota.check())
    }

    /// What may be done.
    pub fn rights(&self) -> Rights {
        match self.rights {
            Some(rights) => rights,
            None if self.read_only => Rights::READ_ONLY,
            None => Rights::FULL,
        }
    }

    /// Whether a client that logs in with this name is meant.
    pub fn is_called(&self, name: &str) -> bool {
        is_called(&self.name, name)
    }

    /// The part of the root that is the same for everybody who is meant.
    pub fn fixed_root(&self) -> PathBuf {
        fixed_part(&self.root)
    }
}

impl ServeKey {
    /// For messages: which key.
    pub fn called(&self) -> String {
        let name = self.fingerprint.as_ref().or(self.principal.as_ref());
        crate::error::Escaped(name.map_or("", String::as_str).as_bytes()).to_string()
    }

    pub(super) fn check(&self) -> Result<(), String> {
        match (&self.fingerprint, &self.principal) {
            (Some(print), None) if print.strip_prefix("SHA256:").is_none_or(|hash| hash.len() != 43) => {
                return Err("'fingerprint' is not SHA256:… as 'ssh-keygen -lf KEY.pub' shows it".into());
            }
            (Some(_), None) => {}
            (None, Some(name)) if name.is_empty() => return Err("'principal' is empty".into()),
            (None, Some(_)) => {}
            _ => return Err("a key needs either 'fingerprint' or 'principal'".into()),
        }
        if let Some(root) = &self.root {
            absolute("root", root)?;
            tokens("root", root, "up")?;
        }
        self.quota.map_or(Ok(()), |quota| quota.check())
    }
}

/// Whether a client that logs in as `name` is meant by a section that is called `section`.
pub fn is_called(section: &str, name: &str) -> bool {
    match section.contains('*') {
        true => super::address::wildcard(section.as_bytes(), name.as_bytes()),
        false => section == name,
    }
}

/// A path up to the component that has something to be filled in.
pub fn fixed_part(path: &std::path::Path) -> PathBuf {
    let open = |part: &std::path::Component<'_>| part.as_os_str().as_encoded_bytes().contains(&b'%');
    path.components().take_while(|part| !open(part)).collect()
}

/// Refuses what cannot be filled in. `known` are the letters that can.
fn tokens(field: &str, path: &std::path::Path, known: &str) -> Result<(), String> {
    let text = path.to_string_lossy();
    let mut letters = text.chars();
    while let Some(letter) = letters.next() {
        if letter == '%' && !letters.next().is_some_and(|letter| letter == '%' || known.contains(letter)) {
            let known: Vec<String> = known.chars().map(|letter| format!("%{letter}")).collect();
            return Err(format!(
                "'{field}' is '{}', and can hold {}; a percent sign is written as %%",
                crate::error::shown(path),
                known.join(" and ")
            ));
        }
    }
    Ok(())
}

fn is_false(value: &bool) -> bool {
    !value
}

fn yes() -> bool {
    true
}

fn one_or_more<'de, D: Deserializer<'de>>(input: D) -> Result<Vec<SocketAddr>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Text {
        One(String),
        More(Vec<String>),
    }
    let texts = match Text::deserialize(input) {
        Ok(Text::One(text)) => vec![text],
        Ok(Text::More(texts)) => texts,
        Err(_) => return Err(de::Error::custom("an address with a port is expected, or a list of them")),
    };
    let wrong = |text: &str| format!("'{text}' is not an address with a port, as in '0.0.0.0:2222' or '[::]:2222'");
    let parsed: Result<Vec<_>, _> = texts.iter().map(|text| text.parse().map_err(|_| wrong(text))).collect();
    match parsed {
        Ok(list) if list.is_empty() => Err(de::Error::custom("no address is named to listen on")),
        parsed => parsed.map_err(de::Error::custom),
    }
}

/// Reads `30s`, `10m`, `500 ms`, `2h`.
pub(super) fn duration<'de, D: Deserializer<'de>>(input: D) -> Result<Duration, D::Error> {
    let text = String::deserialize(input)?;
    parse_duration(&text).map_err(de::Error::custom)
}

pub(super) fn length<S: Serializer>(value: &Duration, output: S) -> Result<S::Ok, S::Error> {
    let milliseconds = value.as_millis();
    let units = [(3_600_000, "h"), (60_000, "m"), (1000, "s")];
    let (unit, name) = units.into_iter().find(|(unit, _)| milliseconds.is_multiple_of(*unit)).unwrap_or((1, "ms"));
    output.collect_str(&format_args!("{}{name}", milliseconds / unit))
}

fn parse_duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("'{text}' is not a length of time: write it as '30s', '10m', '2h' or '500ms'");
    let plain = text.trim();
    let (number, unit) = plain.split_at(plain.find(|c: char| !c.is_ascii_digit()).unwrap_or(plain.len()));
    let milliseconds = match unit.trim() {
        "ms" => 1,
        "s" => 1000,
        "m" | "min" => 60_000,
        "h" => 3_600_000,
        _ => return Err(wrong()),
    };
    let number: u64 = number.parse().map_err(|_| wrong())?;
    // A year is more than any of them means.
    let found = number.checked_mul(milliseconds).filter(|&ms| ms > 0 && ms <= 31_536_000_000);
    found.map(Duration::from_millis).ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_of_time() {
        for (text, ms) in [("30s", 30_000), ("10 m", 600_000), ("2h", 7_200_000), (" 500ms ", 500), ("1min", 60_000)] {
            assert_eq!(parse_duration(text), Ok(Duration::from_millis(ms)), "{text}");
        }
        for wrong in ["", "30", "0s", "-1s", "1.5s", "s", "9999999999999999h", "10 fortnights"] {
            assert!(parse_duration(wrong).is_err(), "{wrong}");
        }
    }
}
