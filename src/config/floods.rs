//! What a server does against floods: penalties for addresses that fail again and again, and early shedding of connections
//! that have not logged in. Both as sshd has them (PerSourcePenalties and MaxStartups of sshd_config(5)).

use std::num::NonZeroUsize;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use super::serve::{duration, length};

/// `[serve.penalties]`: for how long an address is refused. Penalties add up, and pass with time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Penalties {
    /// For a connection that offered keys, and none was good.
    #[serde(deserialize_with = "duration", serialize_with = "length")]
    pub failed_login: Duration,
    /// For one that ended without having tried to log in.
    #[serde(deserialize_with = "duration", serialize_with = "length")]
    pub no_login: Duration,
    /// For one that did not log in within `login_grace`.
    #[serde(deserialize_with = "duration", serialize_with = "length")]
    pub late: Duration,
    /// For one that did not keep to the protocol.
    #[serde(deserialize_with = "duration", serialize_with = "length")]
    pub breach: Duration,
    /// Nothing is refused before so much has come together.
    #[serde(deserialize_with = "duration", serialize_with = "length")]
    pub least: Duration,
    /// It never comes to more.
    #[serde(deserialize_with = "duration", serialize_with = "length")]
    pub most: Duration,
    /// Of how many addresses penalties are kept; then those go that end first.
    pub addresses: NonZeroUsize,
}

impl Default for Penalties {
    fn default() -> Self {
        let seconds = Duration::from_secs;
        Penalties {
            failed_login: seconds(5),
            no_login: seconds(1),
            late: seconds(10),
            breach: seconds(10),
            // Three times sshd's: whoever tries out his first key fails some times in a row.
            least: seconds(60),
            most: seconds(600),
            addresses: NonZeroUsize::new(65_536).unwrap_or(NonZeroUsize::MIN),
        }
    }
}

/// `START:RATE:FULL`: from START connections on that have not logged in, RATE percent of the new ones are shed; more and more
/// of them up to FULL, from where on all are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Startups {
    /// Below it nothing is shed.
    pub start: usize,
    /// Percent, 1 to 100.
    pub rate: usize,
    /// Everything is shed from here on.
    pub full: usize,
}

impl Default for Startups {
    fn default() -> Self {
        // Later than sshd's 10: two hundred nodes that push on the hour are no flood.
        Startups { start: 32, rate: 30, full: 64 }
    }
}

impl FromStr for Startups {
    type Err = String;

    fn from_str(text: &str) -> Result<Startups, String> {
        let numbers: Option<Vec<usize>> = text.split(':').map(|part| part.trim().parse().ok()).collect();
        match numbers.as_deref() {
            Some(&[start, rate, full]) if start >= 1 && start <= full && (1..=100).contains(&rate) => {
                Ok(Startups { start, rate, full })
            }
            _ => Err(format!(
                "'{}' is not START:RATE:FULL, as in '10:30:64': two numbers of connections, the second not below the \
                 first, and between them a percentage from 1 to 100",
                crate::error::Escaped(text.as_bytes())
            )),
        }
    }
}

impl Serialize for Startups {
    fn serialize<S: Serializer>(&self, output: S) -> Result<S::Ok, S::Error> {
        output.collect_str(&format_args!("{}:{}:{}", self.start, self.rate, self.full))
    }
}

impl<'de> Deserialize<'de> for Startups {
    fn deserialize<D: Deserializer<'de>>(input: D) -> Result<Self, D::Error> {
        String::deserialize(input)?.parse().map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn startups_are_three_numbers() {
        assert_eq!("10:30:64".parse(), Ok(Startups { start: 10, rate: 30, full: 64 }));
        for wrong in ["", "10", "10:30", "10:30:9", "0:30:9", "10:0:64", "10:101:64", "10:30:64:1", "a:b:c", "-1:30:64"]
        {
            assert!(wrong.parse::<Startups>().unwrap_err().contains("10:30:64"), "{wrong}");
        }
    }
}
