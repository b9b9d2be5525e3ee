//! Which host keys are trusted: `known_hosts` files, read strictly.
//!
//! Hashed names, `[host]:port`, wildcards, negation and `@revoked` are honoured. A file that is there and cannot be
//! read, or a `@revoked` line that cannot be understood, refuses: what is not known must not pass for nothing known.

use std::io;
use std::path::{Path, PathBuf};

use russh::keys::PublicKey;
use russh::keys::ssh_key::HashAlg;
use russh::keys::ssh_key::known_hosts::{Entry, HostPatterns, Marker};

use super::sha1;
use crate::error::{Escaped, Exit};

/// A key that a file holds for the host.
#[derive(Debug)]
struct Known {
    key: PublicKey,
    file: PathBuf,
    line: usize,
}

/// What the files say of one host.
#[derive(Debug)]
pub(super) struct KnownHost {
    host: String,
    port: u16,
    files: Vec<PathBuf>,
    trusted: Vec<Known>,
    revoked: Vec<Known>,
}

/// The host's name as the files write it.
fn name(host: &str, port: u16) -> String {
    let host = host.to_ascii_lowercase();
    if port == 22 { host } else { format!("[{host}]:{port}") }
}

impl KnownHost {
    /// Reads the files; one that does not exist is empty.
    ///
    /// # Errors
    /// When a file cannot be read or a `@revoked` line cannot be understood.
    pub(super) fn read(host: &str, port: u16, files: &[PathBuf]) -> Result<KnownHost, String> {
        let mut known =
            KnownHost { host: host.to_owned(), port, files: files.to_vec(), trusted: Vec::new(), revoked: Vec::new() };
        for file in files {
            match std::fs::read(file) {
                Ok(bytes) => known.add(file, &bytes)?,
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(format!("cannot read the known hosts in '{}': {error}", show(file))),
            }
        }
        Ok(known)
    }

    fn add(&mut self, file: &Path, bytes: &[u8]) -> Result<(), String> {
        let name = name(&self.host, self.port);
        for (number, line) in (1..).zip(bytes.split(|byte| *byte == b'\n')) {
            let line = String::from_utf8_lossy(line);
            let mut fields = line.split_whitespace().peekable();
            let Some(first) = fields.peek() else { continue };
            if first.starts_with('#') {
                continue;
            }
            let revoked = *first == "@revoked";
            let count = if first.starts_with('@') { 4 } else { 3 };
            let fields: Vec<&str> = fields.take(count).collect();
            let entry = match fields.join(" ").parse::<Entry>() {
                Ok(entry) => entry,
                Err(error) if revoked => {
                    let file = show(file);
                    return Err(format!("{file}:{number}: a revoked key cannot be read: {error}; repair the line"));
                }
                Err(error) => {
                    tracing::debug!(file = %show(file), number, %error, "line of known hosts left out");
                    continue;
                }
            };
            if !matches(entry.host_patterns(), &name) {
                continue;
            }
            let known = Known { key: entry.public_key().clone(), file: file.to_owned(), line: number };
            match entry.marker() {
                None => self.trusted.push(known),
                Some(Marker::Revoked) => self.revoked.push(known),
                Some(Marker::CertAuthority) => {}
            }
        }
        Ok(())
    }

    /// Names of the key types on file, so that the host is asked for a key that can be compared.
    pub(super) fn algorithms(&self) -> Vec<String> {
        self.trusted.iter().map(|known| plain_type(&known.key)).collect()
    }

    /// Whether this key is the host's.
    ///
    /// # Errors
    /// Why not, and what to do.
    pub(super) fn check(&self, offered: &PublicKey) -> Result<(), String> {
        let same = |known: &&Known| known.key.key_data() == offered.key_data();
        let name = name(&self.host, self.port);
        let kind = plain_type(offered);
        let fingerprint = offered.fingerprint(HashAlg::Sha256);
        if let Some(known) = self.revoked.iter().find(same) {
            return Err(format!(
                "{name}: REVOKED HOST KEY: {}:{} revokes the {kind} key {fingerprint} that the host offers; \
                 do not connect before its owner says why",
                show(&known.file),
                known.line
            ));
        }
        if self.trusted.iter().any(|known| same(&known)) {
            return Ok(());
        }
        let alike = self.trusted.iter().find(|known| plain_type(&known.key) == kind);
        if let Some(known) = alike.or(self.trusted.first()) {
            return Err(format!(
                "{name}: HOST KEY CHANGED: the host offers the {kind} key {fingerprint}, but {}:{} holds the {} key \
                 {}; somebody may be listening in, or the host was set up anew: ask its owner, and only if the new \
                 key is right remove that line with: ssh-keygen -f {} -R {}",
                show(&known.file),
                known.line,
                plain_type(&known.key),
                known.key.fingerprint(HashAlg::Sha256),
                quote(&show(&known.file)),
                quote(&name)
            ));
        }
        let file = self.files.first().map_or_else(|| "~/.ssh/known_hosts".to_owned(), |file| quote(&show(file)));
        let line = PublicKey::from(offered.key_data().clone()).to_openssh().unwrap_or_default();
        let line = format!("{name} {}", line.trim_end());
        Err(format!(
            "{name}: unknown host key: {kind} {fingerprint} is in none of the known hosts files; compare it with what \
             the host's owner says, then add it with: echo {} >> {file}  (or, unseen: ssh-keyscan -t {} -p {} {} >> {file})",
            quote(&line),
            keyscan_type(&kind),
            self.port,
            quote(&self.host)
        ))
    }
}

/// The exit status of every refusal here.
pub(super) const REFUSED: Exit = Exit::Trust;

fn show(path: &Path) -> String {
    use std::os::unix::ffi::OsStrExt as _;
    Escaped(path.as_os_str().as_bytes()).to_string()
}

/// A word for the shell.
fn quote(text: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-/:@+".contains(&byte);
    if !text.is_empty() && text.bytes().all(plain) {
        text.to_owned()
    } else {
        format!("'{}'", text.replace('\'', "'\\''"))
    }
}

/// `ssh-rsa` whatever the hash, `ssh-ed25519`, …
fn plain_type(key: &PublicKey) -> String {
    key.algorithm().as_str().to_owned()
}

fn keyscan_type(kind: &str) -> &str {
    match kind {
        "ssh-ed25519" => "ed25519",
        "ssh-rsa" => "rsa",
        kind if kind.starts_with("ecdsa-") => "ecdsa",
        kind => kind,
    }
}

fn matches(patterns: &HostPatterns, name: &str) -> bool {
    match patterns {
        HostPatterns::HashedName { salt, hash } => sha1::hmac(salt, name.as_bytes()) == *hash,
        HostPatterns::Patterns(patterns) => {
            let mut matched = false;
            for pattern in patterns {
                match pattern.strip_prefix('!') {
                    Some(pattern) if wild(pattern.to_ascii_lowercase().as_bytes(), name.as_bytes()) => return false,
                    Some(_) => {}
                    None => matched |= wild(pattern.to_ascii_lowercase().as_bytes(), name.as_bytes()),
                }
            }
            matched
        }
    }
}

/// `*` and `?`, in time linear in the product of the lengths.
fn wild(pattern: &[u8], name: &[u8]) -> bool {
    let (mut p, mut n, mut star) = (0, 0, None);
    while n < name.len() {
        match pattern.get(p) {
            Some(b'*') => {
                star = Some((p, n));
                p += 1;
            }
            Some(byte) if *byte == b'?' || *byte == name[n] => {
                p += 1;
                n += 1;
            }
            _ => match star {
                Some((at, from)) => {
                    star = Some((at, from + 1));
                    p = at + 1;
                    n = from + 1;
                }
                None => return false,
            },
        }
    }
    pattern[p..].iter().all(|byte| *byte == b'*')
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIB9dG4kjRhQTtWTVzd2t27+t0DEHBPW7iOD23TUiYLio";
    const B: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJdD7y3aLq454yWBdwLWbieU1ebz9/cu7/QEXn9OIeZJ";

    fn verdict(file: &str, host: &str, port: u16, offered: &str) -> Result<(), String> {
        let mut known =
            KnownHost { host: host.into(), port, files: vec!["kh".into()], trusted: Vec::new(), revoked: Vec::new() };
        known.add(Path::new("kh"), file.as_bytes())?;
        known.check(&offered.parse().unwrap())
    }

    #[test]
    fn lines_match_as_openssh_matches_them() {
        let cases = [
            (format!("h1 {A}"), "h1", 22, "ok"),
            (format!("h1 {A}"), "H1", 22, "ok"),
            (format!("\t h1,h2\t{A} comment # more"), "h2", 22, "ok"),
            (format!("h1 {A}"), "h1", 2222, "unknown"),
            (format!("[h1]:2222 {A}"), "h1", 2222, "ok"),
            (format!("[h1]:2222 {A}"), "h1", 22, "unknown"),
            (format!("*.x,!bad.x {A}"), "a.x", 22, "ok"),
            (format!("*.x,!bad.x {A}"), "bad.x", 22, "unknown"),
            (format!("!bad.x,* {A}"), "bad.x", 22, "unknown"),
            (format!("h? {A}"), "h12", 22, "unknown"),
            (format!("!h1 {A}"), "h2", 22, "unknown"),
            (format!("# h1 {A}"), "h1", 22, "unknown"),
            (format!("@cert-authority * {A}"), "h1", 22, "unknown"),
            (format!("h1 {B}"), "h1", 22, "CHANGED"),
            (format!("h1 {B}\nh1 {A}"), "h1", 22, "ok"),
            (format!("h1 {A}\n@revoked * {A}"), "h1", 22, "REVOKED"),
            (format!("h1 {A}\n@revoked * {B}"), "h1", 22, "ok"),
            (format!("h1 {A}\n@revoked * ssh-ed25519 AAAAnonsense"), "h1", 22, "revoked key cannot be read"),
            (format!("h1 ssh-ed25519 AAAAnonsense\nh1 {A}"), "h1", 22, "ok"),
        ];
        for (file, host, port, expected) in cases {
            match verdict(&file, host, port, A) {
                Ok(()) => assert_eq!("ok", expected, "{file}"),
                Err(message) => assert!(message.contains(expected), "{file}: {message}"),
            }
        }
    }

    #[test]
    fn an_unknown_key_comes_with_the_line_that_adds_it() {
        let message = verdict("", "h1", 2222, A).unwrap_err();
        assert!(message.contains(&format!("echo '[h1]:2222 {A}' >> kh")), "{message}");
        assert!(message.contains("ssh-keyscan -t ed25519 -p 2222 h1 >> kh"), "{message}");
        assert!(verdict(&format!("[h1]:2222 {A}"), "h1", 2222, A).is_ok());
    }

    #[test]
    fn names_hashed_by_openssh_match() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("kh");
        std::fs::write(&file, format!("h1 {A}\n[h1]:2222 {B}\n")).unwrap();
        let run = std::process::Command::new("ssh-keygen").arg("-H").arg("-f").arg(&file).output().unwrap();
        assert!(run.status.success());
        let text = std::fs::read_to_string(&file).unwrap();
        assert!(text.starts_with("|1|"));
        assert!(verdict(&text, "h1", 22, A).is_ok());
        assert!(verdict(&text, "h1", 2222, B).is_ok());
        assert!(verdict(&text, "h2", 22, A).unwrap_err().contains("unknown"));
    }

    #[test]
    fn a_file_that_cannot_be_read_refuses() {
        let directory = tempfile::tempdir().unwrap();
        let read = |path: PathBuf| KnownHost::read("h1", 22, &[path]);
        assert!(read(directory.path().join("none")).is_ok());
        assert!(read(directory.path().to_owned()).unwrap_err().contains("cannot read"));
    }
}
