//! `lockstep keys revoke`: keys and certificates that are refused from now on, whoever lists them.

use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use russh::keys::ssh_key::Fingerprint;
use russh::keys::ssh_key::public::KeyData;
use russh::keys::{Certificate, PublicKey};

use super::super::{Failure, serve, shown};
use crate::error::{Escaped, Exit};
use crate::ssh::{key_file, revoke_host};
use crate::trust::revoked::add::{self, Revocation};

/// Adds to the list of what is revoked.
#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Revoke {
    /// The list to add to; made as a key revocation list, as OpenSSH has them, where it is missing [default: revoked_keys of
    /// the configuration]
    #[arg(long, value_name = "FILE")]
    list: Option<PathBuf>,
    /// The configuration of the server [default: $LOCKSTEP_CONFIG, or /etc/lockstep/config.toml]
    #[arg(long, value_name = "FILE", conflicts_with = "list")]
    config: Option<PathBuf>,
    /// Certificates by number, or by numbers as 5-9; of the authority that --authority names
    #[arg(long = "serial", value_name = "NUMBER", value_parser = serials, requires = "authority")]
    serials: Vec<RangeInclusive<u64>>,
    /// Certificates by their key id, of any authority unless --authority names one
    #[arg(long = "id", value_name = "TEXT")]
    ids: Vec<String>,
    /// The public key of the authority that signed the certificates
    #[arg(long, value_name = "FILE")]
    authority: Option<PathBuf>,
    /// Revoke a server's key or the key of an authority of servers: as @revoked in the known hosts, by which pushes and pulls go
    #[arg(long, conflicts_with_all = ["list", "config", "serials", "ids", "authority"])]
    host: bool,
    /// With --host, the file to add to [default: ~/.ssh/known_hosts]
    #[arg(long, value_name = "FILE", requires = "host")]
    known_hosts: Option<PathBuf>,
    /// Files of public keys or certificates, or fingerprints of keys (SHA256:...)
    #[arg(value_name = "KEY", required_unless_present_any = ["serials", "ids"])]
    keys: Vec<String>,
}

fn serials(text: &str) -> Result<RangeInclusive<u64>, String> {
    let wrong = || format!("'{text}' is not a number from 1 on, or two as 5-9");
    let number = |text: &str| text.parse::<u64>().ok().filter(|number| *number > 0).ok_or_else(wrong);
    let (first, last) = text.split_once('-').map_or_else(
        || Ok((number(text)?, number(text)?)),
        |(first, last)| Ok::<_, String>((number(first)?, number(last)?)),
    )?;
    if first <= last { Ok(first..=last) } else { Err(wrong()) }
}

/// What an argument names.
enum Named {
    Key(PublicKey),
    Fingerprint(Fingerprint),
    Certificate(Box<Certificate>),
}

impl Named {
    fn read(text: &str) -> Result<Named, Failure> {
        if text.starts_with("SHA256:") {
            let print = text.trim_end_matches('=').parse();
            return print.map(Named::Fingerprint).map_err(|_| {
                let shown = Escaped(text.as_bytes());
                Failure::usage(format!(
                    "'{shown}' is not a fingerprint: SHA256: and 43 letters, as ssh-keygen -l prints it"
                ))
            });
        }
        let file = Path::new(text);
        if let Ok(found) = std::fs::read_to_string(file)
            && let Ok(certificate) = Certificate::from_openssh(found.trim())
        {
            return Ok(Named::Certificate(Box::new(certificate)));
        }
        key_file::public_half(file).map(Named::Key).map_err(Failure::usage)
    }
}

impl Revoke {
    pub(in crate::cli) fn run(self) -> Result<Exit, Failure> {
        let named = self.keys.iter().map(|text| Named::read(text)).collect::<Result<Vec<_>, _>>()?;
        if self.host {
            return self.hosts(named);
        }
        let authority = self.authority.as_deref().map(authority).transpose()?;
        let mut all = Vec::new();
        for named in named {
            all.push(match named {
                Named::Key(key) => Revocation::Key(Box::new(key)),
                Named::Fingerprint(print) => Revocation::Fingerprint(print),
                Named::Certificate(certificate) => of_certificate(&certificate),
            });
        }
        let with =
            |range: RangeInclusive<u64>| authority.clone().map(|authority| Revocation::Serials { authority, range });
        all.extend(self.serials.iter().cloned().filter_map(with));
        all.extend(self.ids.iter().map(|id| Revocation::Id { authority: authority.clone(), id: id.clone() }));
        let list = self.file()?;
        let new = add::add(&list, &all).map_err(|message| Failure::Plain { exit: Exit::Trust, message })?;
        for (revocation, new) in all.iter().zip(&new) {
            let (what, list) = (revocation.describe(), shown(&list));
            match new {
                true => eprintln!("revoked {what} in '{list}'"),
                false => eprintln!("{what} is revoked already in '{list}'"),
            }
        }
        if new.contains(&true) {
            eprintln!(
                "a server that goes by the list refuses it from now on, and ends sessions that are open within seconds"
            );
        }
        Ok(Exit::Done)
    }

    fn file(&self) -> Result<PathBuf, Failure> {
        if let Some(list) = &self.list {
            return Ok(list.clone());
        }
        let file = self.config.clone().unwrap_or_else(serve::default_path);
        let (config, _) = serve::read(&file)?;
        config.revoked_keys.ok_or_else(|| {
            Failure::usage(format!(
                "'{}' has no list of what is revoked; set revoked_keys in [serve], or name the file with --list",
                shown(&file)
            ))
        })
    }

    fn hosts(&self, named: Vec<Named>) -> Result<Exit, Failure> {
        let file = self.known_hosts.clone();
        let file = file.unwrap_or_else(|| std::env::home_dir().unwrap_or_default().join(".ssh/known_hosts"));
        for named in named {
            let key = match named {
                Named::Key(key) => key,
                Named::Certificate(certificate) => PublicKey::from(certificate.public_key().clone()),
                Named::Fingerprint(_) => {
                    return Err(Failure::usage("--host: known_hosts has whole keys; name the file of the public key"));
                }
            };
            let failed = |message| Failure::Plain { exit: Exit::Trust, message };
            let print = key.fingerprint(russh::keys::HashAlg::Sha256);
            match revoke_host(&file, &key).map_err(failed)? {
                true => eprintln!("revoked {} {print} for all hosts in '{}'", key.algorithm(), shown(&file)),
                false => eprintln!("{} {print} is revoked already in '{}'", key.algorithm(), shown(&file)),
            }
        }
        Ok(Exit::Done)
    }
}

fn authority(file: &Path) -> Result<Box<KeyData>, Failure> {
    let key = key_file::public_half(file).map_err(|reason| Failure::usage(format!("--authority: {reason}")))?;
    Ok(Box::new(key.key_data().clone()))
}

/// A certificate by its number, or by its key id where it has none, as ssh-keygen does it.
fn of_certificate(certificate: &Certificate) -> Revocation {
    let authority = Box::new(certificate.signature_key().clone());
    match certificate.serial() {
        0 => Revocation::Id { authority: Some(authority), id: certificate.key_id().to_owned() },
        serial => Revocation::Serials { authority, range: serial..=serial },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_certificates() {
        for (text, range) in [("7", 7..=7), ("5-9", 5..=9), ("18446744073709551615", u64::MAX..=u64::MAX)] {
            assert_eq!(serials(text), Ok(range), "{text}");
        }
        for wrong in ["", "0", "0-3", "9-5", "-1", "a", "1-", "1-2-3"] {
            assert!(serials(wrong).is_err(), "{wrong}");
        }
    }
}
