//! What a user or a key may do with the tree that it sees.
//!
//! What always holds: what is not named is not allowed, and rights that contradict each other are an error when they are
//! read.

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// One right.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Right {
    /// See names, sizes, permissions and where links lead.
    List,
    /// Read content.
    Read,
    /// Make, change, replace and rename.
    Write,
    /// Make what is not there yet. Nothing that is there is replaced, changed, renamed or removed.
    WriteOnce,
    /// Remove.
    Delete,
}

const ALL: [Right; 5] = [Right::List, Right::Read, Right::Write, Right::WriteOnce, Right::Delete];

impl Right {
    /// As the configuration has it.
    pub const fn name(self) -> &'static str {
        match self {
            Right::List => "list",
            Right::Read => "read",
            Right::Write => "write",
            Right::WriteOnce => "write-once",
            Right::Delete => "delete",
        }
    }

    const fn bit(self) -> u8 {
        1 << self as u8
    }
}

/// Several rights.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Rights(u8);

impl Rights {
    /// Everything.
    pub const FULL: Rights = Rights(Right::List.bit() | Right::Read.bit() | Right::Write.bit() | Right::Delete.bit());
    /// To list and to read.
    pub const READ_ONLY: Rights = Rights(Right::List.bit() | Right::Read.bit());

    /// These, if they go together.
    ///
    /// # Errors
    /// Which do not.
    pub fn of(rights: &[Right]) -> Result<Rights, String> {
        let found = Rights(rights.iter().fold(0, |bits, right| bits | right.bit()));
        if found.0 == 0 {
            return Err(
                "no right is named, so that nothing would be allowed; write rights = [\"list\", \"read\"]".into()
            );
        }
        for other in [Right::Write, Right::Delete] {
            if found.has(Right::WriteOnce) && found.has(other) {
                let other = other.name();
                return Err(format!(
                    "'write-once' and '{other}' contradict each other: with 'write-once' what is there stays as it is"
                ));
            }
        }
        Ok(found)
    }

    /// Reads names.
    ///
    /// # Errors
    /// Which is none, or which do not go together.
    pub fn parse<'a>(names: impl IntoIterator<Item = &'a str>) -> Result<Rights, String> {
        let mut rights = Vec::new();
        for name in names {
            let name = name.trim();
            rights.push(*ALL.iter().find(|right| right.name() == name).ok_or_else(|| {
                let known: Vec<String> = ALL.iter().map(|right| right.name().to_owned()).collect();
                format!("'{}' is no right{}", crate::error::Escaped(name.as_bytes()), super::meant(name, &known))
            })?);
        }
        Rights::of(&rights)
    }

    /// Whether this right is among them.
    pub const fn has(self, right: Right) -> bool {
        self.0 & right.bit() != 0
    }

    /// Whether anything may be written.
    pub const fn writes(self) -> bool {
        self.has(Right::Write) || self.has(Right::WriteOnce) || self.has(Right::Delete)
    }

    /// Those of them that change nothing.
    #[must_use]
    pub const fn only_reading(self) -> Rights {
        Rights(self.0 & Rights::READ_ONLY.0)
    }

    /// Their names.
    pub fn names(self) -> Vec<&'static str> {
        ALL.iter().filter(|right| self.has(**right)).map(|right| right.name()).collect()
    }
}

impl Default for Rights {
    fn default() -> Self {
        Rights::FULL
    }
}

impl std::fmt::Debug for Rights {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.names()).finish()
    }
}

impl std::fmt::Display for Rights {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.names().join(", "))
    }
}

impl std::str::FromStr for Rights {
    type Err = String;

    /// Reads `list,read`.
    fn from_str(text: &str) -> Result<Rights, String> {
        Rights::parse(text.split(','))
    }
}

impl Serialize for Rights {
    fn serialize<S: Serializer>(&self, output: S) -> Result<S::Ok, S::Error> {
        output.collect_seq(self.names())
    }
}

impl<'de> Deserialize<'de> for Rights {
    fn deserialize<D: Deserializer<'de>>(input: D) -> Result<Self, D::Error> {
        let names = Vec::<String>::deserialize(input)?;
        Rights::parse(names.iter().map(String::as_str)).map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rights_are_read_by_name_and_contradictions_refused() {
        let read: Rights = "list, read".parse().unwrap();
        assert_eq!(read, Rights::READ_ONLY);
        assert_eq!(Rights::FULL.to_string(), "list, read, write, delete");
        assert_eq!("list,read,write,delete".parse(), Ok(Rights::FULL));
        assert_eq!(Rights::FULL.only_reading(), Rights::READ_ONLY);
        assert!(!read.writes() && "write-once".parse::<Rights>().unwrap().writes());
        for (text, part) in [
            ("", "is no right"),
            ("list,writes", "did you mean 'write'?"),
            ("write,write-once", "'write-once' and 'write' contradict"),
            ("list,write-once,delete", "'write-once' and 'delete' contradict"),
        ] {
            let error = text.parse::<Rights>().unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
        assert!(Rights::of(&[]).is_err());
    }
}
