//! Keys and certificates that are refused whoever lists them.
//!
//! The file is what sshd takes as RevokedKeys: public keys, one a line (here also fingerprints, `SHA256:…`), or a key
//! revocation list as `ssh-keygen -k` makes it (OpenSSH, PROTOCOL.krl). A file that cannot be read, or says something
//! that is not understood, refuses everybody.

use std::collections::HashSet;
use std::ops::RangeInclusive;
use std::path::Path;

use russh::keys::ssh_key::public::KeyData;
use russh::keys::{HashAlg, PublicKey};

pub mod add;

use super::{Credential, trusted_file};
use crate::error::Escaped;
use crate::wire::buffer::{Reader, Short};

const KRL: &[u8] = b"SSHKRL\n\0";

/// What is revoked.
#[derive(Debug, Clone, Default)]
pub struct Revoked {
    /// `SHA256:…` of keys; a certificate falls with its key and with its authority's.
    fingerprints: HashSet<String>,
    certificates: Vec<Certificates>,
}

/// Certificates of one authority; of any when there is no name.
#[derive(Debug, Clone, Default)]
struct Certificates {
    authority: Option<String>,
    serials: Vec<RangeInclusive<u64>>,
    key_ids: HashSet<Vec<u8>>,
}

impl Revoked {
    /// Reads a file that nobody else may have written.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn read(path: &Path) -> Result<Revoked, String> {
        let bytes = trusted_file::read(path)?;
        let shown = Escaped(path.as_os_str().as_encoded_bytes());
        Revoked::parse(&bytes).map_err(|reason| format!("{shown}: {reason}"))
    }

    /// Reads the text of such a file, or the bytes of a key revocation list.
    ///
    /// # Errors
    /// What is not understood.
    pub fn parse(bytes: &[u8]) -> Result<Revoked, String> {
        if let Some(list) = bytes.strip_prefix(KRL) {
            let cut = |Short| "the key revocation list is cut short".to_owned();
            return sections(list).map_err(cut)?;
        }
        let mut revoked = Revoked::default();
        for (number, line) in (1..).zip(String::from_utf8_lossy(bytes).lines()) {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let fingerprint = match PublicKey::from_openssh(line) {
                Ok(key) => fingerprint(key.key_data()),
                Err(_) if line.starts_with("SHA256:") && line.len() == "SHA256:".len() + 43 => line.to_owned(),
                Err(error) => return Err(format!("line {number} is neither a public key nor SHA256:…: {error}")),
            };
            revoked.fingerprints.insert(fingerprint);
        }
        Ok(revoked)
    }

    /// Whether a credential may still be used.
    ///
    /// # Errors
    /// What is revoked.
    pub fn check(&self, credential: Credential<'_>) -> Result<(), String> {
        let listed = |key: &KeyData| self.fingerprints.contains(&fingerprint(key));
        let certificate = match credential {
            Credential::Key(key) if listed(key) => return Err("the key is revoked".into()),
            Credential::Key(_) => return Ok(()),
            Credential::Certificate(certificate) => certificate,
        };
        if listed(certificate.public_key()) {
            return Err("the key of the certificate is revoked".into());
        }
        let authority = fingerprint(certificate.signature_key());
        if self.fingerprints.contains(&authority) {
            return Err("the authority of the certificate is revoked".into());
        }
        let (serial, id) = (certificate.serial(), certificate.key_id().as_bytes());
        for list in
            self.certificates.iter().filter(|list| list.authority.as_ref().is_none_or(|name| *name == authority))
        {
            // A certificate without a number has 0.
            if serial != 0 && list.serials.iter().any(|range| range.contains(&serial)) {
                return Err(format!("the certificate with the serial number {serial} is revoked"));
            }
            if list.key_ids.contains(id) {
                return Err(format!("the certificate '{}' is revoked", Escaped(id)));
            }
        }
        Ok(())
    }
}

fn fingerprint(key: &KeyData) -> String {
    key.fingerprint(HashAlg::Sha256).to_string()
}

fn fingerprint_of(blob: &[u8]) -> Result<String, String> {
    let key = PublicKey::from_bytes(blob).map_err(|error| format!("the list holds a key of no known kind: {error}"))?;
    Ok(fingerprint(key.key_data()))
}

fn encoded(digest: &[u8]) -> Result<String, String> {
    let digest = digest.try_into().map_err(|_| "the list holds a fingerprint of a wrong length".to_owned())?;
    Ok(russh::keys::ssh_key::Fingerprint::Sha256(digest).to_string())
}

type Parsed<T> = Result<Result<T, String>, Short>;

/// What follows the magic number.
fn sections(list: &[u8]) -> Parsed<Revoked> {
    let mut reader = Reader(list);
    let version = reader.u32()?;
    if version != 1 {
        return Ok(Err(format!("key revocation lists of version {version} are not known")));
    }
    reader.bytes(24)?; // number of the list, date, flags
    reader.string()?; // reserved
    reader.string()?; // comment
    let mut revoked = Revoked::default();
    while !reader.0.is_empty() {
        let (kind, section) = (reader.u8()?, reader.string()?);
        let found = match kind {
            1 => certificates(section)?.map(|list| revoked.certificates.push(list)),
            2 => strings(section, fingerprint_of)?.map(|list| revoked.fingerprints.extend(list)),
            5 => strings(section, encoded)?.map(|list| revoked.fingerprints.extend(list)),
            3 => Err("the list holds SHA-1 fingerprints; make it with whole keys, or with sha256:".into()),
            // Signatures of the list: whoever may write the file is trusted.
            4 => Ok(()),
            255 => extension(section)?,
            kind => Err(format!("the list holds a section of the unknown kind {kind}")),
        };
        if let Err(reason) = found {
            return Ok(Err(reason));
        }
    }
    Ok(Ok(revoked))
}

fn strings(section: &[u8], each: fn(&[u8]) -> Result<String, String>) -> Parsed<Vec<String>> {
    let mut reader = Reader(section);
    let mut list = Vec::new();
    while !reader.0.is_empty() {
        match each(reader.string()?) {
            Ok(text) => list.push(text),
            Err(reason) => return Ok(Err(reason)),
        }
    }
    Ok(Ok(list))
}

/// Only a critical one must be understood.
fn extension(section: &[u8]) -> Parsed<()> {
    let mut reader = Reader(section);
    let (name, critical) = (reader.string()?, reader.u8()? != 0);
    let unknown = || format!("the list's extension {} is not understood", Escaped(name));
    Ok(if critical { Err(unknown()) } else { Ok(()) })
}

fn certificates(section: &[u8]) -> Parsed<Certificates> {
    let mut reader = Reader(section);
    let authority = match reader.string()? {
        b"" => None,
        blob => match fingerprint_of(blob) {
            Ok(name) => Some(name),
            Err(reason) => return Ok(Err(reason)),
        },
    };
    reader.string()?; // reserved
    let mut list = Certificates { authority, ..Certificates::default() };
    while !reader.0.is_empty() {
        let (kind, data) = (reader.u8()?, reader.string()?);
        let mut data = Reader(data);
        match kind {
            0x20 => {
                while !data.0.is_empty() {
                    let serial = data.u64()?;
                    list.serials.push(serial..=serial);
                }
            }
            0x21 => list.serials.push(data.u64()?..=data.u64()?),
            0x22 => {
                let (first, bits) = (data.u64()?, data.string()?);
                // The lowest bit is the last of the last byte, and stands for the first number.
                for (at, byte) in (0_u64..).zip(bits.iter().rev()) {
                    for bit in (0..8).filter(|bit| byte >> bit & 1 == 1) {
                        let serial = first.saturating_add(at * 8 + bit);
                        list.serials.push(serial..=serial);
                    }
                }
            }
            0x23 => {
                while !data.0.is_empty() {
                    list.key_ids.insert(data.string()?.to_vec());
                }
            }
            0x39 => {
                if let Err(reason) = extension(data.0)? {
                    return Ok(Err(reason));
                }
            }
            kind => return Ok(Err(format!("the list holds certificates by the unknown kind {kind}"))),
        }
    }
    Ok(Ok(list))
}

#[cfg(test)]
mod tests {
    use super::*;
    use russh::keys::Certificate;
    use std::process::Command;

    fn ssh_keygen(at: &Path, arguments: &[&str]) {
        let output = Command::new("ssh-keygen").current_dir(at).args(arguments).output();
        let output = output.expect("ssh-keygen is not installed: Debian package openssh-client");
        assert!(output.status.success(), "{arguments:?} {}", String::from_utf8_lossy(&output.stderr));
    }

    /// What each specification of ssh-keygen revokes, as ssh-keygen itself sees it.
    #[test]
    fn h56_a_list_that_ssh_keygen_makes_revokes_what_it_says() {
        let directory = tempfile::tempdir().unwrap();
        let at = directory.path();
        for name in ["ca", "other", "user"] {
            ssh_keygen(at, &["-q", "-t", "ed25519", "-N", "", "-f", name]);
        }
        let certificate = |serial: &str, id: &str, authority: &str| {
            ssh_keygen(at, &["-q", "-s", authority, "-z", serial, "-I", id, "-n", "sync", "user.pub"]);
            std::fs::rename(at.join("user-cert.pub"), at.join(format!("{id}-cert.pub"))).unwrap();
            Certificate::from_openssh(&std::fs::read_to_string(at.join(format!("{id}-cert.pub"))).unwrap()).unwrap()
        };
        let made =
            [certificate("7", "seven", "ca"), certificate("300", "many", "ca"), certificate("7", "else", "other")];
        let key = |name: &str| PublicKey::from_openssh(&std::fs::read_to_string(at.join(name)).unwrap()).unwrap();
        let (user, ca) = (key("user.pub"), key("ca.pub"));
        let hash = format!("hash: {}\n", fingerprint(user.key_data()));
        let text = |key: &PublicKey| format!("key: {}\n", key.to_openssh().unwrap());
        for (specification, revoked) in [
            ("serial: 7\n".to_owned(), [false, true, false, false]),
            ("serial: 5-9\n".to_owned(), [false, true, false, false]),
            ("serial: 298\nserial: 300\nserial: 302\nserial: 7\n".to_owned(), [false, true, true, false]),
            ("id: many\n".to_owned(), [false, false, true, false]),
            (text(&user), [true, true, true, true]),
            (hash, [true, true, true, true]),
            (text(&ca), [false, true, true, false]),
        ] {
            std::fs::write(at.join("spec"), &specification).unwrap();
            ssh_keygen(at, &["-q", "-k", "-f", "krl", "-s", "ca.pub", "-z", "1", "spec"]);
            std::fs::set_permissions(at.join("krl"), std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
            let list = Revoked::read(&at.join("krl")).unwrap();
            let credentials = std::iter::once(Credential::Key(user.key_data()));
            let credentials = credentials.chain(made.iter().map(Credential::Certificate));
            let got: Vec<bool> = credentials.map(|credential| list.check(credential).is_err()).collect();
            assert_eq!(got, revoked, "{specification}");
            let queried = |name: &str| {
                !Command::new("ssh-keygen")
                    .current_dir(at)
                    .args(["-Q", "-f", "krl", name])
                    .output()
                    .unwrap()
                    .status
                    .success()
            };
            let asked: Vec<bool> = ["user.pub", "seven-cert.pub", "many-cert.pub", "else-cert.pub"].map(queried).into();
            assert_eq!(asked, revoked, "ssh-keygen -Q: {specification}");
        }
    }

    #[test]
    fn h56_what_is_not_understood_refuses_to_load() {
        let key = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJdD7y3aLq454yWBdwLWbieU1ebz9/cu7/QEXn9OIeZJ";
        let listed = PublicKey::from_openssh(key).unwrap();
        for text in [format!("# lost\n{key} alice\n"), fingerprint(listed.key_data())] {
            let revoked = Revoked::parse(text.as_bytes()).unwrap();
            assert!(revoked.check(Credential::Key(listed.key_data())).is_err());
        }
        assert!(Revoked::parse(b"").unwrap().check(Credential::Key(listed.key_data())).is_ok());
        let head = [KRL, &[0, 0, 0, 1], &[0; 32]].concat();
        for (bytes, part) in [
            (b"ssh-ed25519 AAAA\n".to_vec(), "line 1 is neither"),
            (b"SHA256:short\n".to_vec(), "line 1 is neither"),
            ([KRL, &[0, 0, 0, 2]].concat(), "version 2"),
            (head[..20].to_vec(), "cut short"),
            ([&head[..], &[9, 0, 0, 0, 0]].concat(), "unknown kind 9"),
            ([&head[..], &[3, 0, 0, 0, 0]].concat(), "SHA-1"),
            ([&head[..], &[2, 0xff, 0xff, 0xff, 0xff]].concat(), "cut short"),
            ([&head[..], &[255, 0, 0, 0, 6, 0, 0, 0, 1, b'x', 1]].concat(), "extension x"),
        ] {
            let error = Revoked::parse(&bytes).unwrap_err();
            assert!(error.contains(part), "{part}: {error}");
        }
        assert!(Revoked::parse(&[&head[..], &[255, 0, 0, 0, 6, 0, 0, 0, 1, b'x', 0]].concat()).is_ok());
    }
}
