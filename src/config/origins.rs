//! Who may come from where, as in sshd's AllowUsers and DenyUsers: `sync@192.168.1.0/24`, `*@10.0.0.0/8`, `2001:db8::/32`.

use std::net::IpAddr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use super::AddressList;

/// One entry: a user, or everybody, from an address or a range.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Origin {
    /// The user it is about; `None` for everybody.
    pub user: Option<String>,
    addresses: AddressList,
}

impl Origin {
    /// Reads `USER@RANGE`, `*@RANGE` or `RANGE`.
    ///
    /// # Errors
    /// What cannot be resolved.
    pub fn parse(text: &str) -> Result<Origin, String> {
        let (user, range) = match text.split_once('@') {
            Some((user, range)) => (user, range),
            None => ("*", text),
        };
        let wrong = |why: &str| {
            format!("'{}': {why}; write it as 'sync@192.168.1.0/24'", crate::error::Escaped(text.as_bytes()))
        };
        let user = match user {
            "*" => None,
            "" => return Err(wrong("no user is named before the '@', and '*' means everybody")),
            name if name.contains(['*', '?', '!', ' ']) || name.contains(char::is_control) => {
                return Err(wrong("before the '@' stands the name of a user, or '*' alone"));
            }
            name => Some(name.to_owned()),
        };
        if range.starts_with('!') {
            return Err(wrong("exceptions are written as entries of 'deny'"));
        }
        Ok(Origin { user, addresses: AddressList::parse([range])? })
    }

    /// Whether a user who comes from `peer` is meant.
    pub fn fits(&self, user: &str, peer: IpAddr) -> bool {
        self.user.as_deref().is_none_or(|name| name == user) && self.addresses.admits(peer)
    }

    /// Whether everybody who comes from `peer` is meant.
    pub fn fits_all(&self, peer: IpAddr) -> bool {
        self.user.is_none() && self.addresses.admits(peer)
    }

    /// Whether anybody who comes from `peer` is meant.
    pub fn fits_some(&self, peer: IpAddr) -> bool {
        self.addresses.admits(peer)
    }
}

impl std::fmt::Display for Origin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}@{}", self.user.as_deref().unwrap_or("*"), self.addresses)
    }
}

impl Serialize for Origin {
    fn serialize<S: Serializer>(&self, output: S) -> Result<S::Ok, S::Error> {
        output.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Origin {
    fn deserialize<D: Deserializer<'de>>(input: D) -> Result<Self, D::Error> {
        Origin::parse(&String::deserialize(input)?).map_err(de::Error::custom)
    }
}

/// The two lists; `deny` wins.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Origins {
    /// Who may come in; everybody where it is empty.
    pub allow: Vec<Origin>,
    /// Who may not.
    pub deny: Vec<Origin>,
}

impl Origins {
    /// Whether this user may come from this address.
    pub fn admits(&self, user: &str, peer: IpAddr) -> bool {
        let fits = |list: &[Origin]| list.iter().any(|origin| origin.fits(user, peer));
        (self.allow.is_empty() || fits(&self.allow)) && !fits(&self.deny)
    }

    /// Whether a user whose name is not known yet might.
    pub fn may_admit(&self, peer: IpAddr) -> bool {
        let allowed = self.allow.is_empty() || self.allow.iter().any(|origin| origin.fits_some(peer));
        allowed && !self.deny.iter().any(|origin| origin.fits_all(peer))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn origins(allow: &[&str], deny: &[&str]) -> Origins {
        let read = |list: &[&str]| list.iter().map(|text| Origin::parse(text).unwrap()).collect();
        Origins { allow: read(allow), deny: read(deny) }
    }

    #[test]
    fn s16_an_entry_is_for_a_user_or_for_all_and_deny_wins() {
        let list = origins(
            &["sync@192.168.1.0/24", "*@10.0.0.0/8", "backup@2001:db8::/32", "127.0.0.1"],
            &["sync@10.9.0.0/16", "10.1.1.1"],
        );
        for (user, peer, expected) in [
            ("sync", "192.168.1.9", true),
            ("sync", "::ffff:192.168.1.9", true),
            ("backup", "192.168.1.9", false),
            ("backup", "10.9.0.1", true),
            ("sync", "10.9.0.1", false),
            ("sync", "10.1.1.1", false),
            ("backup", "2001:db8:7::1", true),
            ("sync", "2001:db8:7::1", false),
            ("anybody", "127.0.0.1", true),
            ("sync", "192.0.2.1", false),
        ] {
            assert_eq!(list.admits(user, peer.parse().unwrap()), expected, "{user} {peer}");
        }
        for (peer, expected) in [("192.168.1.9", true), ("10.9.0.1", true), ("10.1.1.1", false), ("192.0.2.1", false)] {
            assert_eq!(list.may_admit(peer.parse().unwrap()), expected, "{peer}");
        }
        assert!(origins(&[], &[]).admits("x", "192.0.2.1".parse().unwrap()));
        assert!(!origins(&[], &["*@192.0.2.0/24"]).may_admit("192.0.2.1".parse().unwrap()));
        assert_eq!(Origin::parse("sync@10.0.0.0/8").unwrap().to_string(), "sync@10.0.0.0/8");
    }

    #[test]
    fn h51_what_cannot_be_resolved_is_an_error() {
        for (text, part) in [
            ("sync@10.0.0.1/8", "write 10.0.0.0/8"),
            ("sync@gpu01", "not looked up"),
            ("sync", "not looked up"),
            ("@10.0.0.0/8", "'*' means everybody"),
            ("s*@10.0.0.0/8", "the name of a user"),
            ("sync@!10.0.0.0/8", "entries of 'deny'"),
            ("sync@", "not an address"),
            ("sync@2001:db8::/129", "at most 128 bits"),
        ] {
            let error = Origin::parse(text).unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
    }
}
