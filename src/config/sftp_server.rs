//! `[sftp_server]`: what `lockstep sftp-server`, which sshd starts, may do beside serving its connection.

use std::fmt;
use std::ops::RangeInclusive;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use crate::error::Escaped;

/// What each `lockstep sftp-server` of this machine goes by that may read the file.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SftpServer {
    /// Where a session may listen for further connections of its run. Left out: nowhere.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data_ports: Option<DataPorts>,
}

/// TCP ports: `22100-22199`, or one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DataPorts {
    first: u16,
    last: u16,
}

impl DataPorts {
    /// All of them.
    #[must_use]
    pub fn all(self) -> RangeInclusive<u16> {
        self.first..=self.last
    }
}

impl FromStr for DataPorts {
    type Err = String;

    fn from_str(text: &str) -> Result<DataPorts, String> {
        let wrong = |why: &str| format!("'{}' {why}", Escaped(text.as_bytes()));
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        let port = |text: &str| {
            let text = text.trim();
            let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
            let number = digits.then(|| text.parse::<u64>().unwrap_or(u64::MAX));
            let number = number.ok_or_else(|| wrong("names no TCP ports: write them as 22100-22199, or one"))?;
            match u16::try_from(number) {
                Ok(0) => Err(wrong("has port 0, which is none: ports are from 1 to 65535")),
                Ok(port) => Ok(port),
                Err(_) => Err(wrong("has a port that there is not: ports are from 1 to 65535")),
            }
        };
        let (first, last) = (port(first)?, port(last)?);
        if first > last {
            return Err(wrong("ends before it begins: the lower port comes first"));
        }
        Ok(DataPorts { first, last })
    }
}

impl fmt::Display for DataPorts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.first == self.last { write!(f, "{}", self.first) } else { write!(f, "{}-{}", self.first, self.last) }
    }
}

impl Serialize for DataPorts {
    fn serialize<S: Serializer>(&self, output: S) -> Result<S::Ok, S::Error> {
        output.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for DataPorts {
    fn deserialize<D: Deserializer<'de>>(input: D) -> Result<DataPorts, D::Error> {
        String::deserialize(input)?.parse().map_err(|wrong| de::Error::custom(format!("'data_ports': {wrong}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_of_ports() {
        for (text, first, last) in
            [("40000-40100", 40000, 40100), ("40000", 40000, 40000), ("7 - 9", 7, 9), ("1-65535", 1, 65535)]
        {
            let ports: DataPorts = text.parse().unwrap();
            assert_eq!(ports.all(), first..=last, "{text}");
            assert_eq!(ports.to_string().parse(), Ok(ports));
        }
        for (text, why) in [
            ("", "names no TCP ports"),
            ("-", "names no TCP ports"),
            ("40000-", "names no TCP ports"),
            ("-40000", "names no TCP ports"),
            ("all", "names no TCP ports"),
            ("+1", "names no TCP ports"),
            ("1-2-3", "names no TCP ports"),
            ("0", "has port 0"),
            ("0-10", "has port 0"),
            ("40100-40000", "ends before it begins"),
            ("65536", "has a port that there is not"),
            ("40000-99999999999999999999", "has a port that there is not"),
        ] {
            let said = text.parse::<DataPorts>().unwrap_err();
            assert!(said.contains(why), "{text}: {said}");
        }
    }
}
