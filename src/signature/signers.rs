//! The list of those whose signatures count: `allowed_signers`, as ssh-keygen(1) describes it.
//!
//! A line that is not understood allows nobody. Stricter than ssh-keygen in what a certificate must be: it needs
//! principals, and must have no critical option.

use chrono::{NaiveDate, NaiveDateTime};
use ssh_key::certificate::CertType;
use ssh_key::public::KeyData;
use ssh_key::{Algorithm, Certificate, PublicKey};

use super::{Refusal, Signer, fingerprint, pattern, strong};
use crate::error::Escaped;

/// Seconds since 1970 of a time on the clock of this machine; `None` for one that it skips or shows twice.
pub type LocalTime<'a> = &'a dyn Fn(NaiveDateTime) -> Option<i64>;

/// What the file says.
#[derive(Debug, Default)]
pub struct AllowedSigners {
    lines: Vec<Line>,
    /// Lines that are not understood, with the reason.
    unreadable: Vec<(usize, String)>,
}

#[derive(Debug)]
struct Line {
    number: usize,
    principals: String,
    options: Options,
    key: KeyData,
}

#[derive(Debug, Default)]
struct Options {
    authority: bool,
    namespaces: Option<String>,
    after: Option<Moment>,
    before: Option<Moment>,
}

/// A time, and how the file has it.
#[derive(Debug)]
struct Moment {
    text: String,
    seconds: i64,
}

impl AllowedSigners {
    /// Reads a file's text.
    pub fn parse(text: &[u8], local: LocalTime<'_>) -> AllowedSigners {
        let mut signers = AllowedSigners::default();
        for (number, line) in (1..).zip(text.split(|byte| *byte == b'\n')) {
            let Ok(line) = std::str::from_utf8(line) else {
                signers.unreadable.push((number, "it is not UTF-8".into()));
                continue;
            };
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            match parse_line(line, local) {
                Ok((principals, options, key)) => signers.lines.push(Line { number, principals, options, key }),
                Err(reason) => signers.unreadable.push((number, reason)),
            }
        }
        signers
    }

    /// Whether whoever signed with `key` (or a certificate) may.
    pub(super) fn judge(
        &self,
        namespace: &'static str,
        key: &KeyData,
        wanted: Option<&str>,
        now: u64,
    ) -> Result<Signer, Vec<Refusal>> {
        let (listed, certificate) = match key {
            KeyData::Certificate(certificate) => (certificate.signature_key(), Some(&**certificate)),
            key => (key, None),
        };
        let mut refusals = Vec::new();
        for line in self.lines.iter().filter(|line| line.key == *listed) {
            match line.judge(namespace, certificate, wanted, now) {
                Ok(principal) => {
                    let key = certificate.map_or(key, Certificate::public_key);
                    return Ok(Signer { principal, fingerprint: fingerprint(key), line: line.number });
                }
                Err(refusal) => refusals.push(refusal),
            }
        }
        if refusals.is_empty() {
            let what = if certificate.is_some() { "the certificate's authority" } else { "the key" };
            refusals.push(Refusal::Unknown { what, fingerprint: fingerprint(listed), hint: self.hint() });
        }
        Err(refusals)
    }

    /// What may be why a key is not found.
    fn hint(&self) -> String {
        let told = self.unreadable.iter().take(3).map(|(number, reason)| format!("line {number}: {reason}"));
        let told: Vec<String> = told.collect();
        if told.is_empty() { String::new() } else { format!(" (not understood: {})", told.join("; ")) }
    }
}

impl Line {
    /// The principal, or what speaks against it.
    fn judge(
        &self,
        namespace: &'static str,
        certificate: Option<&Certificate>,
        wanted: Option<&str>,
        now: u64,
    ) -> Result<String, Refusal> {
        let line = self.number;
        match certificate {
            None if self.options.authority => return Err(Refusal::IsAuthority { line }),
            Some(_) if !self.options.authority => return Err(Refusal::NoAuthority { line }),
            _ => {}
        }
        if let Some(wanted) = wanted.filter(|wanted| !pattern::any_of(&self.principals, wanted)) {
            let [allowed, wanted] = [&self.principals, wanted].map(|text| Escaped(text.as_bytes()).to_string());
            return Err(Refusal::Principal { line, allowed, wanted });
        }
        if let Some(list) = self.options.namespaces.as_ref().filter(|list| !pattern::any_of(list, namespace)) {
            return Err(Refusal::NotForNamespace {
                line,
                allowed: Escaped(list.as_bytes()).to_string(),
                wanted: namespace,
            });
        }
        let now_signed = i64::try_from(now).unwrap_or(i64::MAX);
        if let Some(from) = self.options.after.as_ref().filter(|from| now_signed < from.seconds) {
            return Err(Refusal::NotYetValid { line, from: from.text.clone() });
        }
        if let Some(until) = self.options.before.as_ref().filter(|until| now_signed > until.seconds) {
            return Err(Refusal::NoLongerValid { line, until: until.text.clone() });
        }
        let principal = match certificate {
            None => wanted.unwrap_or(&self.principals).to_owned(),
            Some(certificate) => {
                certified(certificate, now).map_err(|reason| Refusal::Certificate { line, reason })?;
                let mut names = certificate.valid_principals().iter();
                let found = names.find(|name| match wanted {
                    Some(wanted) => wanted == name.as_str(),
                    None => pattern::any_of(&self.principals, name),
                });
                found.cloned().ok_or_else(|| {
                    let names = certificate.valid_principals().join(",");
                    let names = if names.is_empty() { "nobody".into() } else { Escaped(names.as_bytes()).to_string() };
                    let wanted = Escaped(wanted.unwrap_or(&self.principals).as_bytes()).to_string();
                    Refusal::Certificate { line, reason: format!("is for {names}, not for {wanted}") }
                })?
            }
        };
        Ok(Escaped(principal.as_bytes()).to_string())
    }
}

/// What must hold of a certificate whoever it is for.
fn certified(certificate: &Certificate, now: u64) -> Result<(), String> {
    if certificate.cert_type() != CertType::User {
        return Err("is a host's, and cannot sign".into());
    }
    if matches!(certificate.signature().algorithm(), Algorithm::Rsa { hash: None } | Algorithm::Dsa) {
        return Err("was signed with SHA-1; sign it anew: ssh-keygen -t rsa-sha2-512".into());
    }
    strong(certificate.signature_key()).map_err(|reason| format!("is no proof: {reason}"))?;
    if now < certificate.valid_after() {
        return Err(format!("is not valid yet: not before @{}, now it is @{now}", certificate.valid_after()));
    }
    if now >= certificate.valid_before() {
        return Err(format!("has expired: valid before @{}, now it is @{now}", certificate.valid_before()));
    }
    if let Some((name, _)) = certificate.critical_options().iter().next() {
        return Err(format!("has the critical option {}, which is not understood here", Escaped(name.as_bytes())));
    }
    // Dates and authority have been looked at; what is left is the authority's signature.
    certificate
        .validate_at(now, [&certificate.signature_key().fingerprint(ssh_key::HashAlg::Sha256)])
        .map_err(|_| "was not signed by its authority, or was changed".into())
}

fn parse_line(line: &str, local: LocalTime<'_>) -> Result<(String, Options, KeyData), String> {
    let (principals, rest) = match line.strip_prefix('"') {
        Some(quoted) => quoted.split_once('"').ok_or("the quote of the principals does not end")?,
        None => line.split_once([' ', '\t']).ok_or("it has no key")?,
    };
    if principals.is_empty() {
        return Err("it has no principal".into());
    }
    let rest = rest.trim_start();
    let (options, key) = match PublicKey::from_openssh(rest) {
        Ok(key) => (Options::default(), key),
        Err(error) => {
            let (list, key) = split_options(rest).ok_or_else(|| format!("it has no key: {}", said(&error)))?;
            let options = parse_options(list, local)?;
            (
                options,
                PublicKey::from_openssh(key.trim()).map_err(|error| format!("not a public key: {}", said(&error)))?,
            )
        }
    };
    strong(key.key_data())?;
    Ok((principals.to_owned(), options, key.key_data().clone()))
}

/// What the library says may repeat words of the line.
fn said(error: &ssh_key::Error) -> String {
    Escaped(error.to_string().as_bytes()).to_string()
}

/// Splits at the first blank outside quotes.
fn split_options(text: &str) -> Option<(&str, &str)> {
    let (mut quoted, mut escaped) = (false, false);
    for (at, c) in text.char_indices() {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = quoted,
            '"' => quoted = !quoted,
            ' ' | '\t' if !quoted => return Some((&text[..at], &text[at..])),
            _ => {}
        }
    }
    None
}

fn parse_options(list: &str, local: LocalTime<'_>) -> Result<Options, String> {
    let mut options = Options::default();
    let mut rest = list;
    loop {
        let end = rest.find([',', '=']).unwrap_or(rest.len());
        let name = rest[..end].to_ascii_lowercase();
        let shown = Escaped(name.as_bytes()).to_string();
        rest = &rest[end..];
        let mut value = None;
        if let Some(after) = rest.strip_prefix('=') {
            let (text, after) = unquote(after).ok_or_else(|| format!("the value of {shown} is not in quotes"))?;
            (value, rest) = (Some(text), after);
        }
        let twice = match (name.as_str(), value) {
            ("cert-authority", None) => std::mem::replace(&mut options.authority, true),
            ("namespaces", Some(list)) => options.namespaces.replace(list).is_some(),
            ("valid-after", Some(text)) => options.after.replace(moment(text, local)?).is_some(),
            ("valid-before", Some(text)) => options.before.replace(moment(text, local)?).is_some(),
            _ => return Err(format!("the option {shown} is not understood")),
        };
        if twice {
            return Err(format!("the option {shown} stands there twice"));
        }
        match rest.strip_prefix(',') {
            Some(more) => rest = more,
            None if rest.is_empty() => break,
            None => return Err(format!("something follows the value of {shown}")),
        }
    }
    match (&options.after, &options.before) {
        (Some(after), Some(before)) if before.seconds <= after.seconds => {
            Err("valid-before is not after valid-after".into())
        }
        _ => Ok(options),
    }
}

/// The text within quotes at the beginning, and what follows them.
fn unquote(text: &str) -> Option<(String, &str)> {
    let mut value = String::new();
    let mut chars = text.strip_prefix('"')?.char_indices().peekable();
    while let Some((at, c)) = chars.next() {
        match c {
            // One byte of the quote before, one of this.
            '"' => return Some((value, &text[at + 2..])),
            '\\' if chars.next_if(|(_, next)| *next == '"').is_some() => value.push('"'),
            c => value.push(c),
        }
    }
    None
}

/// `YYYYMMDD[HHMM[SS]][Z]`, on this machine's clock without the `Z`.
fn moment(text: String, local: LocalTime<'_>) -> Result<Moment, String> {
    let digits = text.strip_suffix('Z').unwrap_or(&text);
    let wrong = || format!("'{}' is no time; write YYYYMMDD[HHMM[SS]]Z", Escaped(text.as_bytes()));
    if !matches!(digits.len(), 8 | 12 | 14) || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(wrong());
    }
    let part = |from: usize, to: usize| digits.get(from..to).map_or(Ok(0), str::parse::<u32>).ok();
    let read = || {
        let date = NaiveDate::from_ymd_opt(i32::try_from(part(0, 4)?).ok()?, part(4, 6)?, part(6, 8)?)?;
        date.and_hms_opt(part(8, 10)?, part(10, 12)?, part(12, 14)?)
    };
    let time = read().ok_or_else(wrong)?;
    let seconds = if digits.len() < text.len() {
        time.and_utc().timestamp()
    } else {
        local(time)
            .ok_or_else(|| format!("the clock here does not show {text} just once; write it in UTC, with a Z"))?
    };
    Ok(Moment { text, seconds })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::signature::NAMESPACE;

    const KEY: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJdD7y3aLq454yWBdwLWbieU1ebz9/cu7/QEXn9OIeZJ";
    const NOW: u64 = 1_700_000_000;

    fn judge(text: &str, wanted: Option<&str>) -> Result<Signer, Vec<Refusal>> {
        let ahead = |time: NaiveDateTime| Some(time.and_utc().timestamp() - 3600);
        let key = PublicKey::from_openssh(KEY).unwrap();
        AllowedSigners::parse(text.as_bytes(), &ahead).judge(NAMESPACE, key.key_data(), wanted, NOW)
    }

    #[test]
    fn lines_are_read_as_ssh_keygen_reads_them() {
        // 1_700_000_000 is 2023-11-14 22:13:20 UTC; the clock of this test is an hour ahead.
        let cases = [
            ("a@x KEY", Ok("a@x")),
            ("  a@x\tKEY comment with blanks \r", Ok("a@x")),
            ("# a@x\n\nb@x,a@? KEY", Ok("a@x")),
            ("*@x KEY", Ok("a@x")),
            ("\"b@x,a@x\" KEY", Ok("a@x")),
            ("*,!a@x KEY", Err("line 1: the key is that of '*,!a@x', not of 'a@x'")),
            ("A@x KEY", Err("not of 'a@x'")),
            ("a@x namespaces=\"file,*@lockstep.internal\" KEY", Ok("a@x")),
            ("a@x NAMESPACES=\"file\" KEY", Err("line 1: the key counts in the namespaces 'file' alone")),
            ("a@x namespaces=\"*,!manifest@*\" KEY", Err("namespaces '*,!manifest@*' alone")),
            ("a@x namespaces=\"a \\\" b\" KEY", Err("namespaces 'a \" b' alone")),
            ("a@x valid-after=\"20231114221320Z\" KEY", Ok("a@x")),
            ("a@x valid-after=\"20231114221321Z\" KEY", Err("not valid yet: valid-after 20231114221321Z")),
            ("a@x valid-after=\"20231114231320\" KEY", Ok("a@x")),
            ("a@x valid-after=\"20231114231321\" KEY", Err("not valid yet")),
            ("a@x valid-before=\"20231114221320Z\" KEY", Ok("a@x")),
            ("a@x valid-before=\"20231114221319Z\" KEY", Err("no longer valid: valid-before 20231114221319Z")),
            ("a@x valid-before=\"20231114\",namespaces=\"*\" KEY", Err("no longer valid")),
            ("a@x valid-before=\"202311150000Z\" KEY", Ok("a@x")),
            ("a@x cert-authority KEY", Err("line 1: the key is listed as an authority")),
            ("b@x KEY\na@x KEY", Ok("a@x")),
            // What is not understood allows nobody, and is told.
            (
                "a@x namespaces=file KEY",
                Err("is not listed (not understood: line 1: the value of namespaces is not in"),
            ),
            ("a@x verify-required KEY", Err("the option verify-required is not understood")),
            ("a@x cert-authority=\"x\" KEY", Err("the option cert-authority is not understood")),
            ("a@x namespaces=\"*\",namespaces=\"*\" KEY", Err("namespaces stands there twice")),
            ("a@x namespaces=\"*\"x KEY", Err("something follows the value of namespaces")),
            ("a@x namespaces=\"*\", KEY", Err("the option  is not understood")),
            ("a@x valid-after=\"20240230Z\" KEY", Err("'20240230Z' is no time")),
            ("a@x valid-after=\"2024\" KEY", Err("'2024' is no time")),
            ("a@x valid-after=\"20240101Z\",valid-before=\"20240101Z\" KEY", Err("valid-before is not after")),
            ("\"a@x KEY", Err("the quote of the principals does not end")),
            ("\"\" KEY", Err("it has no principal")),
            ("KEY", Err("not listed (not understood: line 1: it has no key")),
            ("", Err("the key SHA256:")),
        ];
        for (text, expected) in cases {
            let text = text.replace("KEY", KEY);
            match (judge(&text, Some("a@x")), expected) {
                (Ok(signer), Ok(name)) => assert_eq!(signer.principal, name, "{text}"),
                (Err(refusals), Err(part)) => {
                    let said = refusals.iter().map(Refusal::to_string).collect::<Vec<_>>().join("\n");
                    assert!(said.contains(part), "{text}: {said}");
                }
                (result, _) => panic!("{text}: {result:?}"),
            }
        }
    }

    #[test]
    fn without_a_name_the_list_says_who_it_is() {
        let text = format!("# comment\n\u{1b}*@x,b {KEY}\n");
        let signer = judge(&text, None).unwrap();
        assert_eq!((signer.principal.as_str(), signer.line), ("\\x1b*@x,b", 2));
        assert!(signer.fingerprint.starts_with("SHA256:"), "{}", signer.fingerprint);
        // Each line that speaks of the key says why not.
        let text = format!("a namespaces=\"file\" {KEY}\nb valid-before=\"20200101Z\" {KEY}\nc {KEY}\n");
        assert_eq!(judge(&text, Some("d")).unwrap_err().len(), 3);
        assert!(matches!(judge(&text, Some("b")).unwrap_err()[1], Refusal::NoLongerValid { line: 2, .. }));
    }

    #[test]
    fn a_time_that_the_clock_here_skips_allows_nobody() {
        let text = format!("a valid-after=\"202003290230\" {KEY}");
        let key = PublicKey::from_openssh(KEY).unwrap();
        let signers = AllowedSigners::parse(text.as_bytes(), &|_| None);
        let said = signers.judge(NAMESPACE, key.key_data(), None, NOW).unwrap_err()[0].to_string();
        assert!(said.contains("write it in UTC"), "{said}");
    }
}
