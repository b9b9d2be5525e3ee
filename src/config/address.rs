//! Addresses that someone may come from, as in sshd's `from=`: single ones, ranges, wildcards, `!` for exceptions.
//!
//! What cannot be resolved is an error when the list is read, never a rule that silently does not apply.

use std::net::IpAddr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// A list that was read completely. An address is admitted when an entry fits and no exception does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AddressList(Vec<Entry>);

#[derive(Debug, Clone, PartialEq, Eq)]
struct Entry {
    exception: bool,
    pattern: Pattern,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Pattern {
    Network {
        address: IpAddr,
        bits: u32,
    },
    Any,
    /// Of IPv4 alone: of an IPv6 address there are many ways to write it, and a pattern would fit one of them.
    Wildcard(String),
}

impl AddressList {
    /// Reads entries, each an address, `ADDRESS/BITS`, or a pattern with `*` and `?`.
    ///
    /// # Errors
    /// Which entry cannot be resolved, and why.
    pub fn parse<'a>(items: impl IntoIterator<Item = &'a str>) -> Result<AddressList, String> {
        let mut entries = Vec::new();
        for item in items {
            let item = item.trim();
            let (exception, text) = item.strip_prefix('!').map_or((false, item), |rest| (true, rest));
            entries.push(Entry { exception, pattern: Pattern::parse(text)? });
        }
        if entries.iter().all(|entry| entry.exception) {
            return Err("no address is named, so that nobody could come in; leave it out for anywhere".into());
        }
        Ok(AddressList(entries))
    }

    /// Reads what `source-address` of a certificate may have: addresses and ranges alone.
    ///
    /// # Errors
    /// As [`parse`](Self::parse), and for exceptions and wildcards, which do not exist in certificates.
    pub fn of_certificate(text: &str) -> Result<AddressList, String> {
        if text.contains(['!', '*', '?']) {
            return Err(
                "a certificate has addresses and ranges alone, as 192.168.1.0/24; no wildcards or exceptions".into()
            );
        }
        AddressList::parse(text.split(','))
    }

    /// Whether `peer` may come in. IPv4 addresses in IPv6 clothes count as IPv4.
    pub fn admits(&self, peer: IpAddr) -> bool {
        let peer = peer.to_canonical();
        let fits = |exception| self.0.iter().any(|entry| entry.exception == exception && entry.pattern.fits(peer));
        fits(false) && !fits(true)
    }
}

impl Pattern {
    fn parse(text: &str) -> Result<Pattern, String> {
        if let Some((address, bits)) = text.split_once('/') {
            let wrong = || format!("'{text}' is not an address range; write it as 192.168.1.0/24");
            return network(address.parse().map_err(|_| wrong())?, bits.parse().map_err(|_| wrong())?, text);
        }
        if let Ok(address) = text.parse::<IpAddr>() {
            let bits = if address.is_ipv4() { 32 } else { 128 };
            return network(address, bits, text);
        }
        if text.contains('*') && text.chars().all(|c| matches!(c, '*' | '?')) {
            return Ok(Pattern::Any);
        }
        if text.contains(['*', '?']) && text.contains(':') {
            return Err(format!("'{text}': there are no wildcards for IPv6; write a range, as 2001:db8::/32"));
        }
        if text.contains(['*', '?']) && text.chars().all(|c| c.is_ascii_digit() || matches!(c, '.' | '*' | '?')) {
            // No address is longer than 15 characters, and no star needs another one beside it.
            if text.len() > 31 || text.contains("**") || !fits_any(text) {
                return Err(format!("'{text}' fits no address; write it as 10.0.*, or a range as 10.0.0.0/16"));
            }
            return Ok(Pattern::Wildcard(text.to_owned()));
        }
        Err(format!("'{text}' is not an address; names of hosts are not looked up, write addresses or ranges"))
    }

    fn fits(&self, peer: IpAddr) -> bool {
        match (self, peer) {
            (Pattern::Any, _) => true,
            (Pattern::Wildcard(pattern), IpAddr::V4(peer)) => wildcard(pattern.as_bytes(), peer.to_string().as_bytes()),
            (Pattern::Network { address: IpAddr::V4(network), bits }, IpAddr::V4(peer)) => {
                let shift = 32 - bits;
                network.to_bits().checked_shr(shift) == peer.to_bits().checked_shr(shift)
            }
            (Pattern::Network { address: IpAddr::V6(network), bits }, IpAddr::V6(peer)) => {
                let shift = 128 - bits;
                network.to_bits().checked_shr(shift) == peer.to_bits().checked_shr(shift)
            }
            _ => false,
        }
    }
}

fn network(address: IpAddr, bits: u32, text: &str) -> Result<Pattern, String> {
    let (address, bits) = match address.to_canonical() {
        IpAddr::V4(mapped) if address.is_ipv6() && bits >= 96 => (IpAddr::V4(mapped), bits - 96),
        IpAddr::V4(mapped) if address.is_ipv6() => (IpAddr::V6(mapped.to_ipv6_mapped()), bits),
        plain => (plain, bits),
    };
    let width = if address.is_ipv4() { 32 } else { 128 };
    if bits > width {
        return Err(format!("'{text}' is not an address range: there are at most {width} bits"));
    }
    let first: IpAddr = match address {
        IpAddr::V4(v4) => {
            std::net::Ipv4Addr::from_bits(v4.to_bits() & u32::MAX.checked_shl(32 - bits).unwrap_or(0)).into()
        }
        IpAddr::V6(v6) => {
            std::net::Ipv6Addr::from_bits(v6.to_bits() & u128::MAX.checked_shl(128 - bits).unwrap_or(0)).into()
        }
    };
    if first != address {
        return Err(format!(
            "'{text}' is not an address range: {address} is in the middle of it; write {first}/{bits}"
        ));
    }
    Ok(Pattern::Network { address, bits })
}

/// Whether there is an IPv4 address that a pattern fits; `*` may stand for several of its numbers.
fn fits_any(pattern: &str) -> bool {
    let dots = pattern.matches('.').count();
    if dots < 3 {
        // One of them stands for a dot, too.
        let more = |(at, _): (usize, &str)| fits_any(&format!("{}*.*{}", &pattern[..at], &pattern[at + 1..]));
        return pattern.match_indices('*').any(more);
    }
    let is_number = |part: &str| (0..=u8::MAX).any(|number| wildcard(part.as_bytes(), number.to_string().as_bytes()));
    dots == 3 && pattern.split('.').all(is_number)
}

/// `*` is any number of characters, `?` is one.
pub(super) fn wildcard(pattern: &[u8], text: &[u8]) -> bool {
    let (mut p, mut t) = (0, 0);
    let mut star: Option<(usize, usize)> = None;
    while t < text.len() {
        match pattern.get(p) {
            Some(b'*') => {
                star = Some((p, t));
                p += 1;
            }
            Some(&c) if c == b'?' || c == text[t] => {
                p += 1;
                t += 1;
            }
            _ => match star {
                // The last star takes one character more.
                Some((at, taken)) => {
                    star = Some((at, taken + 1));
                    (p, t) = (at + 1, taken + 1);
                }
                None => return false,
            },
        }
    }
    pattern[p..].iter().all(|&c| c == b'*')
}

impl std::fmt::Display for Entry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let exception = if self.exception { "!" } else { "" };
        match &self.pattern {
            Pattern::Network { address, bits } => write!(f, "{exception}{address}/{bits}"),
            Pattern::Any => write!(f, "{exception}*"),
            Pattern::Wildcard(text) => write!(f, "{exception}{text}"),
        }
    }
}

impl std::fmt::Display for AddressList {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (at, entry) in self.0.iter().enumerate() {
            write!(f, "{}{entry}", if at == 0 { "" } else { "," })?;
        }
        Ok(())
    }
}

impl Serialize for AddressList {
    fn serialize<S: Serializer>(&self, output: S) -> Result<S::Ok, S::Error> {
        output.collect_seq(self.0.iter().map(Entry::to_string))
    }
}

impl<'de> Deserialize<'de> for AddressList {
    fn deserialize<D: Deserializer<'de>>(input: D) -> Result<Self, D::Error> {
        let items = Vec::<String>::deserialize(input)?;
        AddressList::parse(items.iter().map(String::as_str)).map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn admits(list: &str, peer: &str) -> Result<bool, String> {
        AddressList::parse(list.split(',')).map(|list| list.admits(peer.parse().unwrap()))
    }

    #[test]
    fn s16_ranges_wildcards_and_exceptions() {
        for (list, peer, expected) in [
            ("192.168.1.0/24", "192.168.1.77", true),
            ("192.168.1.0/24", "192.168.2.1", false),
            ("192.168.1.0/24", "::ffff:192.168.1.77", true),
            ("::ffff:192.168.1.0/120", "192.168.1.77", true),
            ("0.0.0.0/0", "8.8.8.8", true),
            ("0.0.0.0/0", "::1", false),
            ("::/0", "2001:db8::1", true),
            ("2001:db8::/32", "2001:db8:1::1", true),
            ("2001:db8::/32", "2001:db9::1", false),
            ("10.0.0.0/8,!10.0.0.9", "10.0.0.9", false),
            ("!10.0.0.9,10.0.0.0/8", "10.0.0.9", false),
            ("!10.0.0.9,10.0.0.0/8", "10.0.0.8", true),
            ("10.0.0.?", "10.0.0.7", true),
            ("10.0.0.?", "10.0.0.77", false),
            ("10.*.7", "10.1.2.7", true),
            ("*", "::1", true),
            ("*", "10.0.0.1", true),
            ("1*.7", "10.1.2.7", true),
            ("10*20.1", "10.0.20.1", true),
            ("*?", "::1", true),
            ("1*", "1234::1", false),
            ("*,!1*", "10.0.0.1", false),
            ("127.0.0.1", "127.0.0.1", true),
        ] {
            assert_eq!(admits(list, peer), Ok(expected), "{list} {peer}");
        }
    }

    #[test]
    fn h51_what_cannot_be_resolved_is_an_error() {
        for (list, part) in [
            ("10.0.0.0/33", "at most 32 bits"),
            ("::/129", "at most 128 bits"),
            ("10.0.0.0/x", "192.168.1.0/24"),
            ("10.0.0/8", "192.168.1.0/24"),
            ("10.0.0.5/8", "write 10.0.0.0/8"),
            ("gpu01.example.org", "not looked up"),
            ("10.0.0.0/8,!*.example.org", "not looked up"),
            ("", "not an address"),
            ("*,!::ffff:10.0.0.*", "write a range"),
            ("*,!2001:0db8:*", "write a range"),
            ("*,!cafe*", "not looked up"),
            ("*,!10.0.0.0.*", "fits no address"),
            ("*,!10.0.00?.1", "fits no address"),
            ("*,!010.*", "fits no address"),
            ("*,!300.*", "fits no address"),
            ("*,!10.0.?", "fits no address"),
            ("!10.0.0.1", "nobody"),
        ] {
            let error = admits(list, "10.0.0.1").unwrap_err();
            assert!(error.contains(part), "{list}: {error}");
        }
        assert!(AddressList::parse([]).is_err());
    }

    #[test]
    fn wildcards_do_not_take_forever() {
        assert!(!wildcard("*a".repeat(30).as_bytes(), "a".repeat(60).replace('a', "ab").as_bytes()));
    }
}
