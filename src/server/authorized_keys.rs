//! `authorized_keys` as OpenSSH reads it, with one difference: an option that is not understood refuses the key.

use std::io::Read as _;
use std::net::IpAddr;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use russh::keys::PublicKey;
use russh::keys::ssh_key::public::KeyData;

/// What a key that was proven may do.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Grant {
    /// Its forced command asks for reading only.
    pub read_only: bool,
}

/// Reads the file for each login; refuses one that others can write.
///
/// # Errors
/// What is wrong with the file.
pub fn read(path: &Path) -> Result<String, String> {
    let shown = path.display();
    let fail = |e: std::io::Error| format!("cannot read {shown}: {e}");
    let mut file = std::fs::File::open(path).map_err(fail)?;
    let metadata = file.metadata().map_err(fail)?;
    if !metadata.is_file() {
        return Err(format!("{shown} is not a file"));
    }
    if metadata.mode() & 0o022 != 0 {
        return Err(format!("{shown} can be written by others; run: chmod go-w {shown}"));
    }
    if metadata.len() > 4 << 20 {
        return Err(format!("{shown} is larger than 4 MiB"));
    }
    let mut bytes = Vec::new();
    file.by_ref().take(4 << 20).read_to_end(&mut bytes).map_err(fail)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Looks a key up. `now` is in seconds since 1970.
///
/// # Errors
/// Why the key is refused.
pub fn authorize(text: &str, key: &KeyData, peer: IpAddr, now: u64) -> Result<Grant, String> {
    let mut refused = None;
    for (number, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let (options, listed) = match PublicKey::from_openssh(line) {
            Ok(listed) => ("", listed),
            Err(_) => {
                let Some((options, rest)) = split_options(line) else { continue };
                let Ok(listed) = PublicKey::from_openssh(rest.trim()) else { continue };
                (options, listed)
            }
        };
        if listed.key_data() != key {
            continue;
        }
        match apply(options, peer, now) {
            Ok(grant) => return Ok(grant),
            Err(reason) => refused = Some(format!("line {}: {reason}", number + 1)),
        }
    }
    Err(refused.unwrap_or_else(|| "the key is not listed".into()))
}

/// Splits at the first blank outside quotes.
fn split_options(line: &str) -> Option<(&str, &str)> {
    let (mut quoted, mut escaped) = (false, false);
    for (at, c) in line.char_indices() {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = quoted,
            '"' => quoted = !quoted,
            ' ' | '\t' if !quoted => return Some((&line[..at], &line[at..])),
            _ => {}
        }
    }
    None
}

fn options(text: &str) -> Result<Vec<(String, Option<String>)>, String> {
    let mut list = Vec::new();
    let mut chars = text.chars().peekable();
    while chars.peek().is_some() {
        let mut name = String::new();
        while let Some(c) = chars.next_if(|c| *c != ',' && *c != '=') {
            name.push(c.to_ascii_lowercase());
        }
        let mut value = None;
        if chars.next_if_eq(&'=').is_some() {
            if chars.next() != Some('"') {
                return Err(format!("option {name}: the value is not quoted"));
            }
            let mut text = String::new();
            loop {
                match chars.next() {
                    None => return Err(format!("option {name}: the quote does not end")),
                    Some('"') => break,
                    Some('\\') if chars.peek() == Some(&'"') => {
                        chars.next();
                        text.push('"');
                    }
                    Some(c) => text.push(c),
                }
            }
            value = Some(text);
        }
        list.push((name, value));
        match chars.next() {
            None => break,
            Some(',') if chars.peek().is_some() => {}
            Some(_) => return Err("options end in a strange way".into()),
        }
    }
    Ok(list)
}

fn apply(text: &str, peer: IpAddr, now: u64) -> Result<Grant, String> {
    let mut grant = Grant::default();
    for (name, value) in options(text)? {
        match (name.as_str(), value.as_deref()) {
            (
                "restrict"
                | "no-pty"
                | "no-port-forwarding"
                | "no-agent-forwarding"
                | "no-x11-forwarding"
                | "no-user-rc",
                None,
            ) => {}
            ("from", Some(list)) => {
                if !address_allowed(list, peer)? {
                    return Err(format!("from=\"{list}\" does not admit {peer}"));
                }
            }
            ("expiry-time", Some(time)) => {
                if now >= expiry(time).ok_or_else(|| format!("expiry-time {time} is not a time"))? {
                    return Err(format!("the key expired at {time}"));
                }
            }
            ("command", Some(command)) => grant.read_only |= forced(command)?,
            _ => return Err(format!("option {name} is not understood")),
        }
    }
    Ok(grant)
}

/// Whether a forced command is a file server, and if so whether it only reads.
fn forced(command: &str) -> Result<bool, String> {
    let mut words = command.split_ascii_whitespace();
    let program = words.next().unwrap_or_default();
    let base = program.rsplit('/').next().unwrap_or_default();
    let fits = match base {
        "internal-sftp" | "sftp-server" => true,
        "lockstep" => words.next() == Some("sftp-server"),
        _ => false,
    };
    let mut read_only = false;
    for word in words {
        match word {
            "-R" | "--read-only" => read_only = true,
            _ => return Err(format!("command=\"{command}\": argument {word} is not understood")),
        }
    }
    if fits { Ok(read_only) } else { Err(format!("command=\"{command}\" is not a file server")) }
}

/// Whether a list of addresses, ranges and wildcards, `!` for exceptions, admits an address.
///
/// # Errors
/// When a range cannot be read.
pub fn address_allowed(list: &str, peer: IpAddr) -> Result<bool, String> {
    let peer = peer.to_canonical();
    let mut allowed = false;
    for item in list.split(',').map(str::trim) {
        let (negated, pattern) = item.strip_prefix('!').map_or((false, item), |rest| (true, rest));
        let fits = if let Some((network, bits)) = pattern.split_once('/') {
            in_network(peer, network, bits).ok_or_else(|| format!("{pattern} is not an address range"))?
        } else if let Ok(address) = pattern.parse::<IpAddr>() {
            address.to_canonical() == peer
        } else if pattern.is_empty() {
            return Err("an address pattern is empty".into());
        } else {
            wildcard(pattern.as_bytes(), peer.to_string().as_bytes())
        };
        if fits && negated {
            return Ok(false);
        }
        allowed |= fits;
    }
    Ok(allowed)
}

fn in_network(peer: IpAddr, network: &str, bits: &str) -> Option<bool> {
    let bits: u32 = bits.parse().ok()?;
    let (width, network, peer) = match (network.parse().ok()?, peer) {
        (IpAddr::V4(n), IpAddr::V4(p)) => (32, u128::from(n.to_bits()), u128::from(p.to_bits())),
        (IpAddr::V6(n), IpAddr::V6(p)) => (128, n.to_bits(), p.to_bits()),
        (IpAddr::V4(_), _) => return (bits <= 32).then_some(false),
        (IpAddr::V6(_), _) => return (bits <= 128).then_some(false),
    };
    let shift = u32::checked_sub(width, bits)?;
    Some(network.checked_shr(shift).unwrap_or(0) == peer.checked_shr(shift).unwrap_or(0))
}

fn wildcard(pattern: &[u8], text: &[u8]) -> bool {
    match (pattern.split_first(), text.split_first()) {
        (None, None) => true,
        (Some((b'*', rest)), _) => (0..=text.len()).any(|at| wildcard(rest, &text[at..])),
        (Some((b'?', rest)), Some((_, tail))) => wildcard(rest, tail),
        (Some((p, rest)), Some((t, tail))) => p == t && wildcard(rest, tail),
        _ => false,
    }
}

/// `YYYYMMDD[HHMM[SS]][Z]`. Without `Z` the zone is not known here: the earliest moment it can mean is taken.
fn expiry(text: &str) -> Option<u64> {
    let (digits, zone) = text.strip_suffix('Z').map_or((text, 14 * 3600), |d| (d, 0));
    if !matches!(digits.len(), 8 | 12 | 14) || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let part = |from: usize, to: usize| digits.get(from..to).map_or(Some(0), |d| d.parse::<i64>().ok());
    let (year, month, day) = (part(0, 4)?, part(4, 6)?, part(6, 8)?);
    let (hour, minute, second) = (part(8, 10)?, part(10, 12)?, part(12, 14)?);
    if !(1..=12).contains(&month) || !(1..=31).contains(&day) || hour > 23 || minute > 59 || second > 60 {
        return None;
    }
    // Days since 1970 in the Gregorian calendar, the year taken to begin in March.
    let y = if month <= 2 { year - 1 } else { year };
    let (era, of_era) = (y.div_euclid(400), y.rem_euclid(400));
    let of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    let days = era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + of_year - 719_468;
    u64::try_from(days * 86_400 + hour * 3600 + minute * 60 + second - zone).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJdD7y3aLq454yWBdwLWbieU1ebz9/cu7/QEXn9OIeZJ";

    #[test]
    fn options_are_enforced_and_unknown_ones_refuse_the_key() {
        let cases = [
            ("", Some(false)),
            ("restrict,no-pty ", Some(false)),
            ("from=\"10.0.0.0/8,!10.0.0.9\" ", Some(false)),
            ("from=\"10.0.0.*,!10.0.0.1\" ", None),
            ("from=\"192.168.1.0/24\" ", None),
            ("from=\"10.0.0.0/99\" ", None),
            ("expiry-time=\"20200101Z\" ", None),
            ("expiry-time=\"21000101\" ", Some(false)),
            ("expiry-time=\"soon\" ", None),
            ("command=\"internal-sftp -R\" ", Some(true)),
            ("command=\"/usr/bin/lockstep sftp-server\",restrict ", Some(false)),
            ("command=\"/bin/sh\" ", None),
            ("command=\"internal-sftp -d /x\" ", None),
            ("cert-authority ", None),
            ("verify-required ", None),
            ("from=\"10.0.0.1 ", None),
        ];
        let key = PublicKey::from_openssh(KEY).unwrap();
        for (options, expected) in cases {
            let text = format!("# comment\n\nrubbish\n{options}{KEY} someone\n");
            let got = authorize(&text, key.key_data(), [10, 0, 0, 1].into(), 1_700_000_000);
            assert_eq!(got.as_ref().ok().map(|g| g.read_only), expected, "{options}: {got:?}");
        }
        assert_eq!(expiry("20231114221320Z"), Some(1_700_000_000));
    }

    #[test]
    fn h50_a_file_that_others_can_write_is_refused() {
        use std::os::unix::fs::PermissionsExt as _;
        let file = tempfile::NamedTempFile::new().unwrap();
        assert!(read(file.path()).is_ok());
        std::fs::set_permissions(file.path(), std::fs::Permissions::from_mode(0o620)).unwrap();
        assert!(read(file.path()).unwrap_err().contains("chmod go-w"));
    }
}
