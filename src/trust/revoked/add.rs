//! Adding to a list of what is revoked. What is in it stays as it is, byte for byte.

use std::fs::File;
use std::io::{self, Write as _};
use std::ops::RangeInclusive;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use russh::keys::PublicKey;
use russh::keys::ssh_key::Fingerprint;
use russh::keys::ssh_key::public::KeyData;
use rustix::fs::{FlockOperation, flock};

use super::{KRL, Revoked, fingerprint};
use crate::error::{Escaped, in_words, shown};
use crate::trust::trusted_file;
use crate::wire::buffer::{Reader, Short};

/// Before the first section: magic, version, number, date, flags.
const NUMBER: RangeInclusive<usize> = 12..=19;
const DATE: RangeInclusive<usize> = 20..=27;
const SIGNATURE: u8 = 4;

/// What is to be refused from now on.
#[derive(Debug, Clone)]
pub enum Revocation {
    /// A key, with all certificates of it and all that it signed.
    Key(Box<PublicKey>),
    /// The same by its fingerprint.
    Fingerprint(Fingerprint),
    /// Certificates of an authority by their numbers.
    Serials {
        /// Whose.
        authority: Box<KeyData>,
        /// Which; 0 is no number.
        range: RangeInclusive<u64>,
    },
    /// Certificates by their key id.
    Id {
        /// Whose; of any authority where there is none.
        authority: Option<Box<KeyData>>,
        /// Which.
        id: String,
    },
}

impl Revocation {
    /// In words.
    pub fn describe(&self) -> String {
        match self {
            Revocation::Key(key) => format!("{} {}", key.algorithm(), fingerprint(key.key_data())),
            Revocation::Fingerprint(print) => print.to_string(),
            Revocation::Serials { range, .. } if range.start() == range.end() => {
                format!("the certificate with the serial number {}", range.start())
            }
            Revocation::Serials { range, .. } => {
                format!("the certificates with the serial numbers {} to {}", range.start(), range.end())
            }
            Revocation::Id { id, .. } => format!("certificates with the key id '{}'", Escaped(id.as_bytes())),
        }
    }

    fn is_in(&self, list: &Revoked) -> bool {
        let of = |authority: Option<&KeyData>| {
            let name = authority.map(fingerprint);
            list.certificates.iter().filter(move |list| list.authority.is_none() || list.authority == name)
        };
        match self {
            Revocation::Key(key) => list.fingerprints.contains(&fingerprint(key.key_data())),
            Revocation::Fingerprint(print) => list.fingerprints.contains(&print.to_string()),
            Revocation::Serials { authority, range } => of(Some(authority)).any(|list| {
                let covers = |known: &RangeInclusive<u64>| known.contains(range.start()) && known.contains(range.end());
                list.serials.iter().any(covers)
            }),
            Revocation::Id { authority, id } => {
                of(authority.as_deref()).any(|list| list.key_ids.contains(id.as_bytes()))
            }
        }
    }

    /// As a section of a key revocation list (OpenSSH, PROTOCOL.krl).
    fn section(&self) -> Result<(u8, Vec<u8>), String> {
        let blob = |key: &KeyData| {
            let encoded = PublicKey::from(key.clone()).to_bytes();
            encoded.map_err(|error| format!("the key cannot be written: {error}"))
        };
        let mut section = Vec::new();
        let kind = match self {
            Revocation::Key(key) => {
                string(&mut section, &blob(key.key_data())?);
                2
            }
            Revocation::Fingerprint(print) => {
                string(&mut section, print.as_bytes());
                5
            }
            Revocation::Serials { authority, range } => {
                string(&mut section, &blob(authority)?);
                string(&mut section, b"");
                let numbers = [range.start().to_be_bytes(), range.end().to_be_bytes()].concat();
                section.push(0x21);
                string(&mut section, &numbers);
                1
            }
            Revocation::Id { authority, id } => {
                string(&mut section, &authority.as_deref().map_or_else(|| Ok(Vec::new()), blob)?);
                string(&mut section, b"");
                let mut ids = Vec::new();
                string(&mut ids, id.as_bytes());
                section.push(0x23);
                string(&mut section, &ids);
                1
            }
        };
        Ok((kind, section))
    }

    /// As a line of a list that is text.
    fn line(&self) -> Result<String, String> {
        match self {
            Revocation::Key(key) => key.to_openssh().map_err(|error| format!("the key cannot be written: {error}")),
            Revocation::Fingerprint(print) => Ok(print.to_string()),
            Revocation::Serials { .. } | Revocation::Id { .. } => Err(
                "it is a list of keys, which cannot name a certificate; revoke the key that the certificate is for, or make a \
                 key revocation list of it: ssh-keygen -k -f NEW LIST"
                    .into(),
            ),
        }
    }
}

fn string(to: &mut Vec<u8>, bytes: &[u8]) {
    to.extend(u32::try_from(bytes.len()).unwrap_or(u32::MAX).to_be_bytes());
    to.extend(bytes);
}

/// Adds to the list in `path`, which is made (a key revocation list) where it is missing; tells of each whether it is new.
/// The list is replaced whole. Who adds at the same time waits.
///
/// # Errors
/// Why it cannot be read, added to, or written; then it is as it was.
pub fn add(path: &Path, revocations: &[Revocation]) -> Result<Vec<bool>, String> {
    let path = &real(path);
    let failed = |error: &dyn std::fmt::Display| format!("cannot write '{}': {error}", shown(path));
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let io = |error: io::Error| failed(&in_words(&error));
    let lock = File::open(directory).map_err(io)?;
    flock(&lock, FlockOperation::LockExclusive).map_err(|error| io(error.into()))?;
    let before = match path.symlink_metadata() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        _ => Some(trusted_file::read(path)?),
    };
    let wrong = |reason: String| format!("'{}': {reason}", shown(path));
    let known = before.as_deref().map_or_else(|| Ok(Revoked::default()), Revoked::parse).map_err(wrong)?;
    let is_new: Vec<bool> = revocations.iter().map(|revocation| !revocation.is_in(&known)).collect();
    let new = revocations.iter().zip(&is_new).filter_map(|(revocation, new)| new.then_some(revocation));
    let new: Vec<&Revocation> = new.collect();
    if new.is_empty() && before.is_some() {
        return Ok(is_new);
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let bytes = extended(before.as_deref(), &new, now).map_err(wrong)?;
    // What could not be read again would refuse everybody.
    Revoked::parse(&bytes).map_err(wrong)?;
    replace(path, &bytes, before.is_some()).map_err(io)?;
    Ok(is_new)
}

/// Where a link leads, so that it stays one.
fn real(path: &Path) -> PathBuf {
    path.canonicalize().unwrap_or_else(|_| path.to_owned())
}

fn replace(path: &Path, bytes: &[u8], is_there: bool) -> io::Result<()> {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{}.new", std::process::id()));
    let new = PathBuf::from(name);
    let written = (|| {
        let mut file = File::options().write(true).create_new(true).mode(0o644).open(&new)?;
        if is_there {
            let before = path.metadata()?;
            std::os::unix::fs::fchown(&file, Some(before.uid()), Some(before.gid()))?;
            file.set_permissions(before.permissions())?;
        } else {
            file.set_permissions(std::fs::Permissions::from_mode(0o644))?;
        }
        file.write_all(bytes)?;
        file.sync_all()?;
        std::fs::rename(&new, path)
    })();
    if written.is_err() {
        let _ = std::fs::remove_file(&new);
    }
    written
}

fn extended(before: Option<&[u8]>, new: &[&Revocation], now: u64) -> Result<Vec<u8>, String> {
    match before {
        Some(text) if !text.starts_with(KRL) && !text.is_empty() => {
            let mut text = text.to_vec();
            for revocation in new {
                if text.last().is_some_and(|last| *last != b'\n') {
                    text.push(b'\n');
                }
                text.extend(revocation.line()?.trim_end().bytes());
                text.push(b'\n');
            }
            Ok(text)
        }
        _ => list(before.unwrap_or_default(), new, now),
    }
}

/// A key revocation list with more at its end.
fn list(before: &[u8], new: &[&Revocation], now: u64) -> Result<Vec<u8>, String> {
    let mut list = before.to_vec();
    if list.is_empty() {
        list.extend(KRL);
        list.extend(1_u32.to_be_bytes());
        list.extend([0; 24]); // number, date, flags
        string(&mut list, b"");
        string(&mut list, b"");
    }
    if is_signed(&list).unwrap_or(true) {
        return Err("the list is signed, and would not be any more; have whoever signs it make a new one".into());
    }
    let number = list.get(NUMBER).and_then(|bytes| bytes.try_into().ok()).map_or(0, u64::from_be_bytes);
    for (range, value) in [(NUMBER, number.wrapping_add(1)), (DATE, now)] {
        list.get_mut(range).ok_or("the list is cut short")?.copy_from_slice(&value.to_be_bytes());
    }
    for revocation in new {
        let (kind, section) = revocation.section()?;
        list.push(kind);
        string(&mut list, &section);
    }
    Ok(list)
}

fn is_signed(list: &[u8]) -> Result<bool, Short> {
    let mut reader = Reader(list);
    reader.bytes(KRL.len() + 4 + 24)?;
    reader.string()?;
    reader.string()?;
    while !reader.0.is_empty() {
        if reader.u8()? == SIGNATURE {
            return Ok(true);
        }
        reader.string()?;
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(seed: u8) -> PublicKey {
        use russh::keys::ssh_key::public::Ed25519PublicKey;
        KeyData::Ed25519(Ed25519PublicKey([seed; 32])).into()
    }

    fn serials(seed: u8, range: RangeInclusive<u64>) -> Revocation {
        Revocation::Serials { authority: Box::new(key(seed).key_data().clone()), range }
    }

    #[test]
    fn h56_what_is_added_stays_and_is_added_once() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("krl");
        let id = |authority: Option<u8>| Revocation::Id {
            authority: authority.map(|seed| Box::new(key(seed).key_data().clone())),
            id: "alice".into(),
        };
        let first = [Revocation::Key(Box::new(key(1))), serials(2, 5..=9)];
        assert_eq!(add(&file, &first), Ok(vec![true, true]));
        let before = std::fs::read(&file).unwrap();
        let print = key(1).fingerprint(russh::keys::HashAlg::Sha256);
        // The same by other words; a part of a range; another authority's.
        let more = [Revocation::Fingerprint(print), serials(2, 6..=7), serials(3, 6..=7), id(Some(2)), id(None)];
        assert_eq!(add(&file, &more), Ok(vec![false, false, true, true, true]));
        let after = std::fs::read(&file).unwrap();
        assert_eq!(before[28..], after[28..before.len()]);
        let numbers = [&before, &after].map(|list| u64::from_be_bytes(list[NUMBER].try_into().unwrap()));
        assert_eq!(numbers, [1, 2]);
        assert_eq!(add(&file, &more), Ok(vec![false; 5]));
        assert_eq!(std::fs::read(&file).unwrap(), after, "nothing new, nothing written");
    }

    #[test]
    fn h56_a_list_of_lines_stays_one_and_says_what_it_cannot_hold() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("revoked");
        let line = |seed: u8| key(seed).to_openssh().unwrap();
        std::fs::write(&file, format!("# lost in May\n{}", line(1))).unwrap();
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o640)).unwrap();
        assert_eq!(add(&file, &[1, 2].map(|seed| Revocation::Key(Box::new(key(seed))))), Ok(vec![false, true]));
        let text = format!("# lost in May\n{}\n{}\n", line(1), line(2));
        assert_eq!(std::fs::read_to_string(&file).unwrap(), text);
        assert_eq!(file.metadata().unwrap().permissions().mode() & 0o777, 0o640);
        let error = add(&file, &[Revocation::Key(Box::new(key(3))), serials(2, 1..=1)]).unwrap_err();
        assert!(error.contains("cannot name a certificate") && error.contains("ssh-keygen -k"), "{error}");
        assert_eq!(std::fs::read_to_string(&file).unwrap(), text);
    }

    #[test]
    fn h56_what_cannot_be_read_or_would_lose_its_signature_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("krl");
        let one = [Revocation::Key(Box::new(key(1)))];
        add(&file, &one).unwrap();
        let good = std::fs::read(&file).unwrap();
        for (bytes, part) in [
            ([&good[..], &[SIGNATURE, 0, 0, 0, 0]].concat(), "is signed"),
            (good[..good.len() - 1].to_vec(), "cut short"),
            (b"nonsense\n".to_vec(), "line 1"),
        ] {
            std::fs::write(&file, &bytes).unwrap();
            let error = add(&file, &[Revocation::Key(Box::new(key(2)))]).unwrap_err();
            assert!(error.contains(part), "{part}: {error}");
            assert_eq!(std::fs::read(&file).unwrap(), bytes);
        }
    }
}
