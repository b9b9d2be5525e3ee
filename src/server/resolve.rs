//! What a login comes to: which root, which rights, which rules and which quota. The most specific wins: the key's
//! fingerprint, then a principal of its certificate, then the user.
//!
//! What always holds: what is filled into a path is one component of safe characters; a key that is good for many names at
//! once is good for none of them.

use std::fs;
use std::io;
use std::net::IpAddr;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{CWD, RenameFlags, renameat_with};

use super::access::{Proof, ServeKey, ServeUser, Which};
use super::authorized_keys::Grant;
use super::confine::Identity;
use crate::config::fixed_part;
use crate::error::{Escaped, in_words, shown};

/// The longest name that is filled in.
const TOKEN_MAX: usize = 64;

/// Whether a path has something to be filled in.
pub(super) fn is_open(path: &Path) -> bool {
    fixed_part(path) != path && tokens(path).iter().any(|letter| *letter != b'%')
}

fn tokens(path: &Path) -> Vec<u8> {
    let mut bytes = path.as_os_str().as_bytes().iter();
    let mut found = Vec::new();
    while let Some(byte) = bytes.next() {
        if *byte == b'%' {
            found.extend(bytes.next());
        }
    }
    found
}

/// Letters, digits, dot, underscore and hyphen; none but a letter, a digit or an underscore at the beginning.
fn token(what: &str, name: &str) -> Result<(), String> {
    let safe = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if name.len() <= TOKEN_MAX && name.chars().all(safe) && !name.is_empty() && !name.starts_with(['.', '-']) {
        return Ok(());
    }
    let name = Escaped(name.as_bytes());
    Err(format!("{what} '{name}' cannot be part of a path: letters, digits, '.', '_' and '-' can, {TOKEN_MAX} at most"))
}

fn fill(path: &Path, name: &str, principal: Option<&str>) -> Result<PathBuf, String> {
    let mut filled = Vec::new();
    let mut bytes = path.as_os_str().as_bytes().iter();
    while let Some(byte) = bytes.next() {
        if *byte != b'%' {
            filled.push(*byte);
            continue;
        }
        match bytes.next() {
            Some(b'u') => {
                token("the user name", name)?;
                filled.extend_from_slice(name.as_bytes());
            }
            Some(b'p') => {
                let principal =
                    principal.ok_or("the root is named after a principal: log in with a certificate of one")?;
                token("the principal", principal)?;
                filled.extend_from_slice(principal.as_bytes());
            }
            _ => filled.push(b'%'),
        }
    }
    Ok(PathBuf::from(std::ffi::OsString::from_vec(filled)))
}

/// A section for the one who logs in with `name`.
pub(super) fn named(section: &ServeUser, name: &str) -> Result<ServeUser, String> {
    if section.name != name {
        token("the user name", name)?;
    }
    let authorized_keys = fill(&section.authorized_keys, name, None)?;
    Ok(ServeUser { name: name.to_owned(), authorized_keys, ..section.clone() })
}

/// A root with the name filled in, if nothing else is to be.
pub(super) fn filled(root: &Path, name: &str) -> Option<PathBuf> {
    fill(root, name, None).ok()
}

/// A root that is the same for everybody.
pub(super) fn fixed_root(root: &Path) -> Option<PathBuf> {
    fill(root, "", None).ok().filter(|_| !is_open(root))
}

/// A section whose file of keys is the same for everybody.
pub(super) fn fixed(section: &ServeUser) -> ServeUser {
    let filled = fill(&section.authorized_keys, "", None);
    ServeUser { authorized_keys: filled.unwrap_or_else(|_| section.authorized_keys.clone()), ..section.clone() }
}

/// A file of keys that many names share lets nobody be whom he likes: a plain key would be good for all of them, and a
/// certificate has to be for this very name.
pub(super) fn only_himself(section: &ServeUser, name: &str, proof: &Proof) -> Result<(), String> {
    if !section.name.contains('*') || is_open(&section.authorized_keys) {
        return Ok(());
    }
    match proof {
        Proof::Certificate(certificate) if certificate.valid_principals().iter().any(|one| one == name) => Ok(()),
        Proof::Certificate(_) => Err(format!("its certificate is not for {}", Escaped(name.as_bytes()))),
        Proof::Key(_) => Err(format!(
            "a key would be good for every user that fits '{}'; use certificates, or %u in authorized_keys",
            Escaped(section.name.as_bytes())
        )),
    }
}

/// The key's own settings, if it has some. Where the line of an authority names principals, none but those count of its certificates: nobody
/// is what another authority alone may say of him.
fn own<'k>(keys: &'k [ServeKey], proof: &Proof, grant: &Grant) -> Option<&'k ServeKey> {
    let fingerprint = proof.fingerprint();
    let is_it = |key: &&ServeKey| matches!(&key.which, Which::Fingerprint(print) if *print == fingerprint);
    let has_it = |key: &&ServeKey| matches!(&key.which, Which::Principal(name) if grant.roles.contains(name));
    keys.iter().find(is_it).or_else(|| keys.iter().find(has_it))
}

/// What the user is for who has proven to be him.
pub(super) fn settled(user: ServeUser, proof: &Proof, grant: &Grant, peer: IpAddr) -> Result<ServeUser, String> {
    let own = own(&user.keys, proof, grant).cloned();
    if own.as_ref().and_then(|key| key.from.as_ref()).is_some_and(|list| !list.admits(peer)) {
        return Err("the key may not come from this address".into());
    }
    let own = own.as_ref();
    let root = own.and_then(|key| key.root.as_ref()).unwrap_or(&user.root);
    let principal = match grant.principals.as_slice() {
        _ if !tokens(root).contains(&b'p') => None,
        [] => None,
        [one] => Some(one.as_str()),
        _ => {
            return Err(
                "the root is named after a principal, and the certificate has several that are good here".into()
            );
        }
    };
    let root = fill(root, &user.name, principal)?;
    let rights = own.and_then(|key| key.rights).unwrap_or(user.rights);
    let rights = if grant.read_only { rights.only_reading() } else { rights };
    if rights.names().is_empty() {
        return Err("its line allows reading alone, which its rights do not include".into());
    }
    let quota = own.and_then(|key| key.quota).or(user.quota);
    let policy = own.and_then(|key| key.policy.clone()).unwrap_or_else(|| user.policy.clone());
    Ok(ServeUser { root, rights, quota, policy, keys: Vec::new(), ..user })
}

/// Makes the root where that is wanted, for the server alone, or for the account that its sessions run as.
pub(super) fn root_is_there(user: &ServeUser) -> Result<(), String> {
    if !user.create_root {
        return Ok(());
    }
    let cannot = |error: io::Error| format!("its root {} cannot be made: {}", shown(&user.root), in_words(&error));
    match user.run_as.as_deref() {
        Some(account) if fs::symlink_metadata(&user.root).is_err() => make_for(&user.root, account)?,
        _ => match fs::DirBuilder::new().mode(0o700).create(&user.root) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(cannot(error)),
            _ => {}
        },
    }
    // A link would lead wherever somebody else likes.
    if !fs::symlink_metadata(&user.root).map_err(cannot)?.is_dir() {
        return Err(format!("its root {} is not a directory", shown(&user.root)));
    }
    Ok(())
}

/// Whether there is a root to be confined to: where a root is filled in the configuration alone does not tell.
pub(super) fn root_is_a_directory(user: &ServeUser) -> Result<(), String> {
    let root = shown(&user.root);
    match fs::metadata(&user.root) {
        Ok(found) if found.is_dir() => Ok(()),
        Ok(_) => Err(format!("its root {root} is not a directory")),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            Err(format!("its root {root} is not there; make it, or set create_root"))
        }
        Err(error) => Err(format!("its root {root} cannot be looked at: {}", in_words(&error))),
    }
}

/// Makes a root that is another account's from the moment that it has its name.
fn make_for(root: &Path, account: &str) -> Result<(), String> {
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    let identity = Identity::of(account)?;
    let cannot = |error: io::Error| {
        let needs = "that takes CAP_CHOWN; make it by hand, or see run-as.conf of the examples for systemd";
        let hint = if error.kind() == io::ErrorKind::PermissionDenied { needs } else { "make it by hand" };
        format!("its root {} cannot be made for '{account}': {}; {hint}", shown(root), in_words(&error))
    };
    let name = root.file_name().unwrap_or_default().to_string_lossy();
    // No name that is filled in begins with a dot.
    let number = (std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
    let new = root.with_file_name(format!(".{name}.new-{}-{}", number.0, number.1));
    let made = fs::DirBuilder::new().mode(0o700).create(&new);
    let made = made.and_then(|()| std::os::unix::fs::lchown(&new, Some(identity.uid), Some(identity.gid)));
    let named = made.and_then(|()| Ok(renameat_with(CWD, &new, CWD, root, RenameFlags::NOREPLACE)?));
    let Err(error) = named else { return Ok(()) };
    let _ = fs::remove_dir(&new);
    // Another login was faster.
    if error.kind() == io::ErrorKind::AlreadyExists { Ok(()) } else { Err(cannot(error)) }
}

/// What is wrong with the roots before anybody comes.
pub(super) fn look(user: &ServeUser) -> Option<String> {
    let own = user.keys.iter().filter_map(|key| key.root.as_ref());
    own.chain([&user.root]).find_map(|root| {
        let there = match fixed_root(root) {
            Some(root) if user.create_root => root.parent().map_or(root.clone(), Path::to_owned),
            Some(root) => root,
            None => fixed_part(root),
        };
        (!there.is_dir()).then(|| format!("root {} is not a directory; make it first", shown(&there)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn s23_what_is_filled_in_is_one_safe_component() {
        let path = |text: &str| PathBuf::from(text);
        let filled = |text: &str, name: &str, principal| fill(&path(text), name, principal);
        assert_eq!(filled("/gather/%u/x%%", "node-01", None), Ok(path("/gather/node-01/x%")));
        assert_eq!(filled("/g/%u.%p", "a", Some("b.c_D")), Ok(path("/g/a.b.c_D")));
        assert_eq!(filled("/plain", "../x", None), Ok(path("/plain")));
        let long = "x".repeat(65);
        for bad in ["", ".", "..", "../x", "a/b", ".hidden", "-x", "a b", "a\0", "ä", "%u", &long] {
            assert!(filled("/g/%u", bad, None).is_err(), "{bad}");
            assert!(filled("/g/%p", "a", Some(bad)).is_err(), "{bad}");
        }
        assert!(filled("/g/%p", "a", None).unwrap_err().contains("certificate"));
        assert!(is_open(&path("/g/%u")) && !is_open(&path("/g/x%%")) && !is_open(&path("/g")));
    }
}
