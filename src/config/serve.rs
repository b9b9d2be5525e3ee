//! `[serve]`: lockstep's own listener, its users and its limits.

use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use super::{AddressList, absolute};

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
    /// The name that clients log in with.
    pub name: String,
    /// The directory that is all the user sees; absolute.
    pub root: PathBuf,
    /// The file with the user's public keys; absolute.
    pub authorized_keys: PathBuf,
    /// No request may write.
    #[serde(default)]
    pub read_only: bool,
    /// The policy of what arrives; it wins over the sender's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy: Option<String>,
    /// The account of this machine that the user's sessions run as; absent for the server's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub run_as: Option<String>,
    /// Where the user may come from; absent for anywhere.
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

impl Serve {
    pub(super) fn check(&self) -> Result<(), String> {
        absolute("host_key", &self.host_key)?;
        let paths = [&self.host_certificate, &self.revoked_keys, &self.audit];
        for (field, path) in ["host_certificate", "revoked_keys", "audit"].iter().zip(paths) {
            path.as_ref().map_or(Ok(()), |path| absolute(field, path))?;
        }
        Ok(())
    }
}

impl ServeUser {
    pub(super) fn check(&self) -> Result<(), String> {
        if self.name.contains(|c: char| c.is_control() || c.is_whitespace()) {
            return Err("the name holds blanks or control characters".into());
        }
        absolute("root", &self.root)?;
        absolute("authorized_keys", &self.authorized_keys)
    }
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
fn duration<'de, D: Deserializer<'de>>(input: D) -> Result<Duration, D::Error> {
    let text = String::deserialize(input)?;
    parse_duration(&text).map_err(de::Error::custom)
}

fn length<S: Serializer>(value: &Duration, output: S) -> Result<S::Ok, S::Error> {
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
