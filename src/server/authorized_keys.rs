//! `authorized_keys` as OpenSSH reads it, with one difference: an option that is not understood refuses the key.

use std::net::IpAddr;

use russh::keys::ssh_key::public::KeyData;
use russh::keys::{Certificate, HashAlg, PublicKey};

use super::certificate;
use crate::config::AddressList;
use crate::signature::MIN_RSA_BITS;
use crate::trust::Credential;

/// What a key that was proven may do.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Grant {
    /// Its forced command asks for reading only.
    pub read_only: bool,
    /// The principals of its certificate that are good here.
    pub principals: Vec<String>,
    /// Those by which something is said of it besides: these where the authority's line names some, else all that it has.
    pub roles: Vec<String>,
}

/// For whom, from where and when a credential is to be good.
#[derive(Debug, Clone, Copy)]
pub struct Asked<'a> {
    /// The name that is logged in with.
    pub user: &'a str,
    /// Where from.
    pub peer: IpAddr,
    /// Seconds since 1970.
    pub now: u64,
}

/// The lines of a file.
#[derive(Debug, Clone, Default)]
pub struct AuthorizedKeys {
    lines: Vec<Line>,
    /// Lines that are neither a key nor a comment: their numbers and what is wrong.
    pub unreadable: Vec<(usize, String)>,
}

#[derive(Debug, Clone)]
struct Line {
    number: usize,
    authority: bool,
    /// Lower case names with their values; or why they cannot be read, which refuses the key.
    options: Result<Vec<(String, Option<String>)>, String>,
    key: KeyData,
    comment: String,
}

/// What a line says, for people.
#[derive(Debug, Clone)]
pub struct Listed<'a> {
    /// Of the line, from 1.
    pub number: usize,
    /// Whether it is one that signs certificates.
    pub authority: bool,
    /// The key.
    pub key: &'a KeyData,
    /// What stands behind the key.
    pub comment: &'a str,
    /// Names in lower case, with their values.
    pub options: &'a [(String, Option<String>)],
    /// Why nobody gets in by it, wherever he comes from.
    pub refusal: Option<String>,
    /// Reading alone is allowed.
    pub read_only: bool,
}

impl AuthorizedKeys {
    /// Reads the text of a file.
    pub fn parse(text: &[u8]) -> AuthorizedKeys {
        let mut keys = AuthorizedKeys::default();
        for (number, line) in (1..).zip(String::from_utf8_lossy(text).lines()) {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let parsed =
                PublicKey::from_openssh(line).map(|key| ("", key)).or_else(|error| match split_options(line) {
                    Some((options, rest)) => PublicKey::from_openssh(rest.trim()).map(|key| (options, key)),
                    None => Err(error),
                });
            match parsed {
                Ok((_, key)) if matches!(key.key_data(), KeyData::Certificate(_) | KeyData::Other(_)) => {
                    keys.unreadable.push((number, format!("a key of type {} is not known here", key.algorithm())));
                }
                Ok((text, key)) => {
                    let options = options(text);
                    let names = options.iter().flatten();
                    let authority = names.clone().any(|(name, _)| name == "cert-authority");
                    let (key, comment) = (key.key_data().clone(), key.comment().to_string());
                    keys.lines.push(Line { number, authority, options, key, comment });
                }
                Err(error) => keys.unreadable.push((number, format!("not a public key: {error}"))),
            }
        }
        keys
    }

    /// Whether a certificate may be good, so that a key that is not listed may yet be.
    pub fn has_authority(&self) -> bool {
        self.lines.iter().any(|line| line.authority)
    }

    /// Whether an authority is believed that a certificate has this principal.
    pub fn believes(&self, principal: &str) -> bool {
        let authorities = self.lines.iter().filter(|line| line.authority).filter_map(|line| line.options.as_ref().ok());
        let mut named = authorities.map(|options| options.iter().find(|(name, _)| name == "principals"));
        named.any(|option| match option {
            Some((_, Some(list))) => certificate::listed(list).any(|name| name == principal),
            _ => true,
        })
    }

    /// What the lines say at this moment, seconds since 1970.
    pub fn list(&self, now: u64) -> impl Iterator<Item = Listed<'_>> {
        self.lines.iter().map(move |line| {
            let standing = line.standing(now);
            Listed {
                number: line.number,
                authority: line.authority,
                key: &line.key,
                comment: &line.comment,
                options: line.options.as_deref().unwrap_or_default(),
                read_only: standing.as_ref().is_ok_and(|grant| grant.read_only),
                refusal: standing.err(),
            }
        })
    }

    /// Looks a credential up.
    ///
    /// # Errors
    /// Why it is refused.
    pub fn authorize(&self, credential: Credential<'_>, asked: &Asked<'_>) -> Result<Grant, String> {
        let (listed, what) = match credential {
            Credential::Key(key) => (key, "the key".to_owned()),
            Credential::Certificate(certificate) => {
                let authority = certificate.signature_key();
                let fingerprint = authority.fingerprint(HashAlg::Sha256);
                (authority, format!("the certificate's authority {fingerprint}"))
            }
        };
        let mut refused = None;
        for line in self.lines.iter().filter(|line| line.key == *listed) {
            let granted = match (credential, line.authority) {
                (Credential::Key(key), false) => line.grant(key, asked),
                (Credential::Certificate(certificate), true) => line.grant_certificate(certificate, asked),
                (Credential::Key(_), true) => Err("the key is listed as an authority, not to log in with".into()),
                (Credential::Certificate(_), false) => Err(format!("{what} is listed without cert-authority")),
            };
            match granted {
                Ok(grant) => return Ok(grant),
                Err(reason) => refused = Some(format!("line {}: {reason}", line.number)),
            }
        }
        Err(refused.unwrap_or_else(|| format!("{what} is not listed{}", self.hint())))
    }

    /// What may be why a key is not found.
    fn hint(&self) -> String {
        let numbers: Vec<String> = self.unreadable.iter().take(5).map(|(number, _)| number.to_string()).collect();
        if numbers.is_empty() { String::new() } else { format!(" (unreadable lines: {})", numbers.join(", ")) }
    }
}

impl Line {
    fn grant(&self, key: &KeyData, asked: &Asked<'_>) -> Result<Grant, String> {
        let mut grant = Grant::default();
        let mut untouched = false;
        for (name, value) in self.options.clone()? {
            match (name.as_str(), value) {
                ("no-touch-required", None) => untouched = true,
                (name, value) => restrict(&mut grant, name, value.as_deref(), asked)?,
            }
        }
        strong(key)?;
        touched(key, untouched)?;
        Ok(grant)
    }

    /// What it grants whoever comes from the right place, with a certificate that is good.
    fn standing(&self, now: u64) -> Result<Grant, String> {
        let own = |name: &str| name == "from" || (self.authority && matches!(name, "cert-authority" | "principals"));
        let options = self.options.clone()?.into_iter().filter(|(name, _)| !own(name)).collect();
        let peer = IpAddr::from([0, 0, 0, 0]);
        let line = Line { options: Ok(options), ..self.clone() };
        for (_, list) in self.options.iter().flatten().filter(|(name, _)| name == "from") {
            AddressList::parse(list.iter().flat_map(|list| list.split(',')))
                .map_err(|reason| format!("from=: {reason}"))?;
        }
        line.grant(&self.key, &Asked { user: "", peer, now })
    }

    fn grant_certificate(&self, certificate: &Certificate, asked: &Asked<'_>) -> Result<Grant, String> {
        let mut grant = Grant::default();
        let (mut principals, mut untouched) = (None, false);
        for (name, value) in self.options.clone()? {
            match (name.as_str(), value) {
                ("cert-authority", None) => {}
                ("no-touch-required", None) => untouched = true,
                ("principals", Some(list)) if principals.is_none() => principals = Some(list),
                ("principals", Some(_)) => return Err("option principals is there twice".into()),
                (name, value) => restrict(&mut grant, name, value.as_deref(), asked)?,
            }
        }
        let certified = certificate::check(certificate, principals.as_deref(), asked)?;
        // As for sshd both have to say so, the line and the certificate.
        touched(certificate.public_key(), untouched && certificate::untouched(certificate))?;
        grant.read_only |= certified.read_only;
        (grant.principals, grant.roles) = (certified.principals, certified.roles);
        Ok(grant)
    }
}

/// Keys that can be broken are no proof.
///
/// # Errors
/// Why it is too weak.
pub fn strong(key: &KeyData) -> Result<(), String> {
    match key {
        KeyData::Dsa(_) => Err("DSA keys are too weak; make an Ed25519 key".into()),
        KeyData::Rsa(key) if key.key_size() < MIN_RSA_BITS => {
            Err(format!("an RSA key of {} bits is too weak; {MIN_RSA_BITS} are the least", key.key_size()))
        }
        _ => Ok(()),
    }
}

/// Refuses a key that signs when it is touched, unless it may without. The signature says whether it was, but the SSH library
/// does not pass that on.
fn touched(key: &KeyData, untouched: bool) -> Result<(), String> {
    if matches!(key, KeyData::SkEd25519(_) | KeyData::SkEcdsaSha2NistP256(_)) && !untouched {
        return Err(
            "whether a security key was touched is not seen here; add no-touch-required to allow it (where the key is \
                    certified: to the authority's line, and to the certificate)"
                .into(),
        );
    }
    Ok(())
}

fn restrict(grant: &mut Grant, name: &str, value: Option<&str>, asked: &Asked<'_>) -> Result<(), String> {
    match (name, value) {
        // What they forbid, or allow again, is not there: this server only moves files.
        (
            "restrict"
            | "no-pty"
            | "no-port-forwarding"
            | "no-agent-forwarding"
            | "no-x11-forwarding"
            | "no-user-rc"
            | "pty"
            | "port-forwarding"
            | "agent-forwarding"
            | "x11-forwarding"
            | "user-rc",
            None,
        )
        | ("permitopen" | "permitlisten", Some(_)) => {}
        ("from", Some(list)) => {
            let addresses = AddressList::parse(list.split(',')).map_err(|reason| format!("from=: {reason}"))?;
            if !addresses.admits(asked.peer) {
                return Err(format!("from=\"{list}\" does not admit {}", asked.peer.to_canonical()));
            }
        }
        ("expiry-time", Some(time)) => {
            if asked.now >= expiry(time).ok_or_else(|| format!("expiry-time {time} is not a time"))? {
                return Err(format!("the key expired at {time}"));
            }
        }
        ("command", Some(command)) => grant.read_only |= forced(command)?,
        _ => return Err(format!("option {name} is not understood")),
    }
    Ok(())
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
            Some(_) => return Err("the options do not end in a blank".into()),
        }
    }
    Ok(list)
}

/// Whether a forced command is a file server, and if so whether it only reads.
pub(super) fn forced(command: &str) -> Result<bool, String> {
    let mut words = command.split_ascii_whitespace();
    let program = words.next().unwrap_or_default();
    let base = program.rsplit('/').next().unwrap_or_default();
    let fits = match base {
        "internal-sftp" | "sftp-server" => true,
        "lockstep" => words.next() == Some("sftp-server"),
        _ => false,
    };
    if !fits {
        return Err(format!("command=\"{command}\" is not a file server"));
    }
    let mut read_only = false;
    for word in words {
        match word {
            "-R" | "--read-only" => read_only = true,
            _ => return Err(format!("command=\"{command}\": argument {word} is not understood")),
        }
    }
    Ok(read_only)
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

    fn asked() -> Asked<'static> {
        Asked { user: "sync", peer: [10, 0, 0, 1].into(), now: 1_700_000_000 }
    }

    #[test]
    fn options_are_enforced_and_unknown_ones_refuse_the_key() {
        let cases = [
            ("", Ok(false)),
            ("restrict,no-pty ", Ok(false)),
            ("RESTRICT,pty,permitopen=\"a:1\" ", Ok(false)),
            ("from=\"10.0.0.0/8,!10.0.0.9\" ", Ok(false)),
            ("from=\"10.0.0.*,!10.0.0.1\" ", Err("does not admit 10.0.0.1")),
            ("from=\"192.168.1.0/24\" ", Err("does not admit")),
            ("from=\"10.0.0.0/99\" ", Err("at most 32 bits")),
            ("from=\"10.0.0.0/8,!gpu01\" ", Err("not looked up")),
            ("expiry-time=\"20200101Z\" ", Err("expired at 20200101Z")),
            ("expiry-time=\"21000101\" ", Ok(false)),
            ("expiry-time=\"soon\" ", Err("soon is not a time")),
            ("command=\"internal-sftp -R\" ", Ok(true)),
            ("command=\"/usr/bin/lockstep sftp-server\",restrict ", Ok(false)),
            ("command=\"/usr/bin/lockstep sftp-server --read-only\" ", Ok(true)),
            ("command=\"/bin/sh\" ", Err("is not a file server")),
            ("command=\"/bin/sh -c \\\"internal-sftp\\\"\" ", Err("is not a file server")),
            ("command=\"internal-sftp -d /x\" ", Err("-d is not understood")),
            ("command=\"lockstep\" ", Err("is not a file server")),
            ("command ", Err("option command is not understood")),
            ("cert-authority ", Err("as an authority")),
            ("principals=\"sync\" ", Err("option principals is not understood")),
            ("verify-required ", Err("verify-required is not understood")),
            ("environment=\"A=B\" ", Err("environment is not understood")),
            ("no-touch-required ", Ok(false)),
            ("from=10.0.0.1 ", Err("not quoted")),
            ("from=\"10.0.0.1\"x ", Err("do not end")),
        ];
        let key = PublicKey::from_openssh(KEY).unwrap();
        for (options, expected) in cases {
            let text = format!("# comment\n\nrubbish\n{options}{KEY} someone\n");
            let keys = AuthorizedKeys::parse(text.as_bytes());
            assert_eq!(keys.unreadable.len(), 1, "{options}");
            assert_eq!(keys.unreadable[0].0, 3);
            match (keys.authorize(Credential::Key(key.key_data()), &asked()), expected) {
                (Ok(grant), Ok(read_only)) => assert_eq!(grant.read_only, read_only, "{options}"),
                (Err(reason), Err(part)) => {
                    assert!(reason.starts_with("line 4: ") && reason.contains(part), "{options}: {reason}");
                }
                (got, _) => panic!("{options}: {got:?}"),
            }
        }
    }

    #[test]
    fn a_line_that_cannot_be_read_is_counted_and_grants_nothing() {
        let key = PublicKey::from_openssh(KEY).unwrap();
        for text in [format!("from=\"10.0.0.1 {KEY}\n"), format!("x{KEY}\n"), KEY[..40].to_owned()] {
            let keys = AuthorizedKeys::parse(text.as_bytes());
            assert_eq!(keys.unreadable.len(), 1, "{text}");
            let reason = keys.authorize(Credential::Key(key.key_data()), &asked()).unwrap_err();
            assert!(reason.contains("not listed (unreadable lines: 1)"), "{reason}");
        }
        // Of two lines for a key the one that admits it counts.
        let twice = format!("from=\"10.9.9.9\" {KEY}\n{KEY}\n");
        assert!(AuthorizedKeys::parse(twice.as_bytes()).authorize(Credential::Key(key.key_data()), &asked()).is_ok());
    }

    #[test]
    fn times_of_expiry() {
        assert_eq!(expiry("20231114221320Z"), Some(1_700_000_000));
        // Without a zone: as early as anywhere on Earth.
        assert_eq!(expiry("20231114221320"), Some(1_700_000_000 - 14 * 3600));
        for wrong in ["", "2023", "20231301", "20230001", "20230132", "202301012460", "2023010é"] {
            assert_eq!(expiry(wrong), None, "{wrong}");
        }
    }
}
