//! `lockstep keys certify`: an authority vouches for keys, so that no node needs a list of all the others'.

use std::path::{Path, PathBuf};
use std::time::Duration;

use chrono::{DateTime, SecondsFormat};
use russh::keys::{Certificate, HashAlg, PublicKey};

use super::super::whole::replace;
use super::super::{Failure, output, passphrase, shown};
use super::public_line;
use crate::config::AddressList;
use crate::error::{Escaped, Exit};
use crate::server::authorized_keys::strong;
use crate::ssh::certify::{self, Statement, Subject};
use crate::ssh::{SigningKey, key_file};

/// Signs certificates for keys.
#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Certify {
    /// The authority's key: a file, or the public half of a key that the agent has
    #[arg(long, value_name = "FILE")]
    ca: PathBuf,
    /// Who may log in with it, or with --host what the server is called; several separated by commas
    #[arg(long = "principal", value_name = "NAME", required = true, value_delimiter = ',')]
    principals: Vec<String>,
    /// Certify a server's key, not a user's
    #[arg(long)]
    host: bool,
    /// For how long it is good: a number with h, d or w for hours, days or weeks
    #[arg(long, value_name = "LENGTH", default_value = "52w", value_parser = length)]
    valid: Duration,
    /// What the key is called in logs [default: the key's comment]
    #[arg(long, value_name = "TEXT")]
    id: Option<String>,
    /// The number by which it can be revoked [default: a random one]
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u64).range(1..))]
    serial: Option<u64>,
    /// Where it may be used from: addresses or ranges, separated by commas [default: anywhere]
    #[arg(long, value_name = "ADDRESSES", conflicts_with = "host")]
    from: Option<String>,
    /// The public keys; each certificate is written beside its key, as KEY-cert.pub
    #[arg(value_name = "KEY", required = true)]
    keys: Vec<PathBuf>,
}

/// Ten years are more than any key should stay.
const LONGEST: Duration = Duration::from_secs(520 * 7 * 86_400);

fn length(text: &str) -> Result<Duration, String> {
    let wrong = || format!("'{text}' is not a length of time: write it as 12h, 90d or 52w, at most 520w");
    let (number, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()));
    let seconds = match unit {
        "h" => 3600,
        "d" => 86_400,
        "w" => 7 * 86_400,
        _ => return Err(wrong()),
    };
    let found = number.parse::<u64>().ok().and_then(|number| number.checked_mul(seconds)).map(Duration::from_secs);
    found.filter(|length| !length.is_zero() && *length <= LONGEST).ok_or_else(wrong)
}

impl Certify {
    pub(in crate::cli) fn run(self) -> Result<Exit, Failure> {
        let source = self.from.as_deref().map(AddressList::of_certificate).transpose();
        let source = source.map_err(|reason| Failure::usage(format!("--from: {reason}")))?;
        let source = source.map(|list| list.to_string());
        for principal in &self.principals {
            // What a list of names in authorized_keys could not name.
            if principal.is_empty() || principal.contains(|c: char| c.is_control() || c.is_whitespace() || c == '"') {
                let principal = Escaped(principal.as_bytes());
                return Err(Failure::usage(format!("--principal: '{principal}' cannot be a name")));
            }
        }
        if self.keys.len() > 1 && (self.serial.is_some() || self.id.is_some()) {
            return Err(Failure::usage("--serial and --id are for one key; each certificate has its own"));
        }
        let keys: Vec<(&PathBuf, PublicKey, PathBuf)> =
            self.keys.iter().map(|file| found(file).map(|(key, to)| (file, key, to))).collect::<Result<_, _>>()?;
        let authority = passphrase::signing_key(&self.ca).map_err(|reason| untrusted(format!("--ca: {reason}")))?;
        strong(authority.public()).map_err(|reason| Failure::usage(format!("--ca '{}': {reason}", shown(&self.ca))))?;
        for (file, key, to) in &keys {
            if key.key_data() == authority.public() {
                return Err(Failure::usage(format!("'{}' is the authority's own key", shown(file))));
            }
            let certificate = self.certify(file, key, source.clone(), &authority)?;
            let text = certificate.to_openssh().map_err(|error| untrusted(error.to_string()))?;
            replace(to, format!("{}\n", text.trim_end()).as_bytes()).map_err(Failure::io("write", to))?;
            tell(&certificate, to);
        }
        let line = public_line(&PublicKey::from(authority.public().clone()));
        let names = self.principals.join(",");
        let line = if self.host {
            eprintln!(
                "clients trust it with this line in their known_hosts, and the server shows it by host_certificate:"
            );
            format!("@cert-authority {names} {line}\n")
        } else {
            eprintln!("a server takes it with this line in the user's authorized_keys:");
            format!("cert-authority,principals=\"{names}\" {line}\n")
        };
        output(line.as_bytes())?;
        Ok(Exit::Done)
    }

    fn certify(
        &self,
        file: &Path,
        key: &PublicKey,
        source: Option<String>,
        authority: &SigningKey,
    ) -> Result<Certificate, Failure> {
        let id = self.id.clone().unwrap_or_else(|| key.comment().as_str_lossy().to_owned());
        if id.trim().is_empty() || id.contains(char::is_control) {
            let file = shown(file);
            let message =
                format!("'{file}': the key has no comment that could be its name in logs; give one with --id");
            return Err(Failure::usage(message));
        }
        let (after, before) = certify::validity(self.valid);
        let serial = self.serial.map_or_else(certify::serial, Ok).map_err(untrusted)?;
        let subject = if self.host { Subject::Host } else { Subject::User };
        let statement = Statement { subject, id, principals: self.principals.clone(), serial, after, before, source };
        certify::certify(key, &statement, authority)
            .map_err(|reason| untrusted(format!("'{}' was not certified: {reason}", shown(file))))
    }
}

fn untrusted(message: String) -> Failure {
    Failure::Plain { exit: Exit::Trust, message }
}

/// The key of a file, and where its certificate goes.
fn found(file: &Path) -> Result<(PublicKey, PathBuf), Failure> {
    let wrong = |reason: &str| Failure::usage(format!("'{}': {reason}", shown(file)));
    if std::fs::read_to_string(file).is_ok_and(|text| Certificate::from_openssh(text.trim()).is_ok()) {
        return Err(wrong("it is a certificate; name the key that it is for"));
    }
    let key = key_file::public_half(file).map_err(Failure::usage)?;
    strong(key.key_data()).map_err(|reason| wrong(&reason))?;
    let name = file.as_os_str().to_string_lossy();
    let to = PathBuf::from(format!("{}-cert.pub", name.strip_suffix(".pub").unwrap_or(&name)));
    match std::fs::read_to_string(&to) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        // An older one of the same key is what is to be renewed.
        Ok(text) if Certificate::from_openssh(text.trim()).is_ok_and(|old| old.public_key() == key.key_data()) => {}
        _ => {
            let to = shown(&to);
            return Err(Failure::usage(format!("'{to}' is there, and no certificate of this key; move it away")));
        }
    }
    Ok((key, to))
}

fn tell(certificate: &Certificate, to: &Path) {
    let time = |seconds: u64| {
        let time = i64::try_from(seconds).ok().and_then(|seconds| DateTime::from_timestamp(seconds, 0));
        time.map_or_else(|| seconds.to_string(), |time| time.to_rfc3339_opts(SecondsFormat::Secs, true))
    };
    let kind = if certificate.cert_type().is_host() { "host" } else { "user" };
    let source = certificate.critical_options().iter().find(|(name, _)| *name == "source-address");
    eprintln!(
        "wrote '{}': {kind} certificate '{}' (serial {}) of {} for {}, good from {} to {}{}; signed by {}",
        shown(to),
        Escaped(certificate.key_id().as_bytes()),
        certificate.serial(),
        certificate.public_key().fingerprint(HashAlg::Sha256),
        certificate.valid_principals().join(", "),
        time(certificate.valid_after()),
        time(certificate.valid_before()),
        source.map(|(_, list)| format!(", from {list} alone")).unwrap_or_default(),
        certificate.signature_key().fingerprint(HashAlg::Sha256),
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn how_long_a_certificate_is_good() {
        for (text, hours) in [("12h", 12), ("90d", 2160), ("52w", 8736), ("520w", 87_360)] {
            assert_eq!(length(text), Ok(Duration::from_secs(hours * 3600)), "{text}");
        }
        for wrong in ["", "0d", "521w", "12", "d", "1y", "-1d", "99999999999999999999w"] {
            assert!(length(wrong).unwrap_err().contains("12h, 90d or 52w"), "{wrong}");
        }
    }
}
