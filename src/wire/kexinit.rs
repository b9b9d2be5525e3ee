//! The first packet of SSH: what a side can do, its favourites first (RFC 4253, section 7.1).

use super::buffer::{Reader, Short};
use crate::error::Escaped;

/// Longest packet that must be taken (RFC 4253, section 6.1).
const PACKET_MAX: usize = 35_000;
const KEXINIT: u8 = 20;

/// What a side can do. Names are escaped.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct KexInit {
    /// Key exchanges, and names beside them that are none (`kex-strict-…`, `ext-info-…`).
    pub exchanges: Vec<String>,
    /// Types of host keys.
    pub host_keys: Vec<String>,
    /// Ciphers from the client to the server.
    pub ciphers_to_server: Vec<String>,
    /// Ciphers from the server to the client.
    pub ciphers_to_client: Vec<String>,
    /// Message authentication codes from the client to the server; ciphers with their own need none.
    pub macs_to_server: Vec<String>,
    /// The same from the server to the client.
    pub macs_to_client: Vec<String>,
}

/// Why a packet is not a first one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NoKexInit {
    /// Another message.
    #[error("it does not begin with the key exchange")]
    Other,
    /// More than any side has to say.
    #[error("its first packet is longer than any that may come first")]
    Long,
    /// Without even the length of its padding.
    #[error("its first packet is empty")]
    Empty,
    /// Its fields do not fit into it.
    #[error("its first packet is cut short")]
    Cut,
}

impl From<Short> for NoKexInit {
    fn from(_: Short) -> Self {
        NoKexInit::Cut
    }
}

impl KexInit {
    /// Reads the packet at the front of `stream`, as it stands on the wire before there are keys; `None` while it is not there
    /// as a whole.
    ///
    /// # Errors
    /// [`NoKexInit`].
    pub fn of_packet(stream: &[u8]) -> Result<Option<KexInit>, NoKexInit> {
        let Some(length) = stream.first_chunk().map(|bytes| u32::from_be_bytes(*bytes) as usize) else {
            return Ok(None);
        };
        if length > PACKET_MAX {
            return Err(NoKexInit::Long);
        }
        let Some(body) = stream.get(4..4 + length) else { return Ok(None) };
        let (&padding, rest) = body.split_first().ok_or(NoKexInit::Empty)?;
        let payload = rest.len().checked_sub(padding.into()).map(|length| &rest[..length]);
        KexInit::of_payload(payload.ok_or(NoKexInit::Cut)?).map(Some)
    }

    fn of_payload(payload: &[u8]) -> Result<KexInit, NoKexInit> {
        let mut reader = Reader(payload);
        if reader.u8()? != KEXINIT {
            return Err(NoKexInit::Other);
        }
        reader.bytes(16)?;
        let mut list = || reader.string().map(names);
        Ok(KexInit {
            exchanges: list()?,
            host_keys: list()?,
            ciphers_to_server: list()?,
            ciphers_to_client: list()?,
            macs_to_server: list()?,
            macs_to_client: list()?,
        })
    }
}

fn names(list: &[u8]) -> Vec<String> {
    list.split(|&byte| byte == b',').filter(|name| !name.is_empty()).map(|name| Escaped(name).to_string()).collect()
}

/// Whether a name among the key exchanges is none, but says what a side can do beside them.
pub fn is_marker(name: &str) -> bool {
    name.starts_with("kex-strict-") || name.starts_with("ext-info-")
}

/// What two sides agree to: the client's first that the server has, too.
pub fn agreed<'a>(client: &'a [String], server: &[String]) -> Option<&'a str> {
    client.iter().map(String::as_str).find(|name| !is_marker(name) && server.iter().any(|other| other == name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_client_s_first_that_the_server_has_is_agreed_to() {
        let list = |names: &[&str]| names.iter().map(ToString::to_string).collect::<Vec<_>>();
        let client = list(&["kex-strict-c-v00@openssh.com", "a", "b", "c"]);
        assert_eq!(agreed(&client, &list(&["c", "kex-strict-c-v00@openssh.com", "b"])), Some("b"));
        assert_eq!(agreed(&client, &list(&["d"])), None);
    }
}
