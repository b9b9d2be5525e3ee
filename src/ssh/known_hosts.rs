//! Which host keys are trusted: `known_hosts` files, read strictly.
//!
//! Hashed names, `[host]:port`, wildcards, negation, `@revoked` and `@cert-authority` are honoured. A file that is there
//! and cannot be read, or a `@revoked` line that cannot be understood, refuses: what is not known must not pass for
//! nothing known.

use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use russh::keys::ssh_key::HashAlg;
use russh::keys::ssh_key::certificate::CertType;
use russh::keys::ssh_key::known_hosts::{Entry, HostPatterns, Marker};
use russh::keys::ssh_key::public::KeyData;
use russh::keys::{Algorithm, Certificate, PublicKey};

use super::options::SshOptions;
use super::{quote, sha1, shown};
use crate::signature::MIN_RSA_BITS;
use crate::signature::pattern::wild;
use crate::trust::Credential;
use crate::trust::revoked::Revoked;

/// A key that a file holds for the host.
#[derive(Debug)]
struct Known {
    key: PublicKey,
    file: PathBuf,
    line: usize,
}

impl Known {
    fn place(&self) -> String {
        format!("{}:{}", shown(&self.file), self.line)
    }
}

/// What is to be thought of a host's key.
#[derive(Debug)]
pub(super) enum Verdict {
    Trusted,
    /// No file says anything of the host; with what to do about it.
    Unknown(PublicKey, String),
    /// With the reason, and what to do.
    Refused(String),
}

/// What is to be thought of one of the keys that a host has shown.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Finding {
    /// It is on file.
    Trusted,
    /// It is not on file, and nothing on file speaks against it.
    New,
    /// Another is on file, or it is revoked; with the reason, and what to do.
    Refused(String),
}

/// What the files say of one host.
#[derive(Debug)]
pub(super) struct KnownHost {
    /// As the files write it.
    name: String,
    /// Without the port, as certificates write it.
    host: String,
    /// What `scan-host` is to be asked for.
    scan: String,
    files: Vec<PathBuf>,
    trusted: Vec<Known>,
    /// Keys of the host for whatever port: they may be its own, but need not be.
    portless: Vec<Known>,
    revoked: Vec<Known>,
    authorities: Vec<Known>,
    /// What is revoked besides, and the file that says so.
    listed: Option<(PathBuf, Revoked)>,
    /// The one key that it may have, whatever files say.
    told: Option<PublicKey>,
}

/// The host's name as the files write it.
pub(super) fn name(host: &str, port: u16) -> String {
    let host = host.to_ascii_lowercase();
    if port == 22 { host } else { format!("[{host}]:{port}") }
}

impl KnownHost {
    fn new(options: &SshOptions) -> KnownHost {
        let SshOptions { host, port, host_key_alias, known_hosts, .. } = options;
        KnownHost {
            name: host_key_alias.as_ref().map_or_else(|| name(host, *port), |alias| alias.to_ascii_lowercase()),
            host: host_key_alias.as_ref().unwrap_or(host).to_ascii_lowercase(),
            scan: format!("{}{}", options.arguments(), quote(host)),
            files: known_hosts.clone(),
            trusted: Vec::new(),
            portless: Vec::new(),
            revoked: Vec::new(),
            authorities: Vec::new(),
            listed: None,
            told: None,
        }
    }

    /// A host whose key somebody has told who is trusted already.
    pub(super) fn told(options: &SshOptions, key: PublicKey) -> KnownHost {
        KnownHost { told: Some(key), ..KnownHost::new(options) }
    }

    /// Reads the files; one that does not exist is empty.
    ///
    /// # Errors
    /// When a file cannot be read or a `@revoked` line cannot be understood.
    pub(super) fn read(options: &SshOptions) -> Result<KnownHost, String> {
        let mut known = KnownHost::new(options);
        for file in known.files.clone() {
            match contents(&file) {
                Ok(bytes) => known.add(&file, &bytes)?,
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(format!("cannot read the known hosts in '{}': {error}", shown(&file))),
            }
        }
        if let Some(file) = &options.revoked_host_keys {
            // As OpenSSH has it: where the list cannot be read no host is trusted.
            let revoked = Revoked::read(file).map_err(|reason| format!("RevokedHostKeys: {reason}"))?;
            known.listed = Some((file.clone(), revoked));
        }
        Ok(known)
    }

    /// The host's name as the files write it.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    fn add(&mut self, file: &Path, bytes: &[u8]) -> Result<(), String> {
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
                    let file = shown(file);
                    return Err(format!("{file}:{number}: a revoked key cannot be read: {error}; repair the line"));
                }
                Err(error) => {
                    tracing::debug!(file = %shown(file), number, %error, "line of known hosts left out");
                    continue;
                }
            };
            let is_exact = matches(entry.host_patterns(), &self.name);
            // As OpenSSH does: a line without a port is for other ports too, when none is for this one.
            if !is_exact && !matches(entry.host_patterns(), &self.host) {
                continue;
            }
            let known = Known { key: entry.public_key().clone(), file: file.to_owned(), line: number };
            match entry.marker() {
                None if is_exact => self.trusted.push(known),
                None => self.portless.push(known),
                Some(Marker::Revoked) => self.revoked.push(known),
                Some(Marker::CertAuthority) => self.authorities.push(known),
            }
        }
        Ok(())
    }

    /// Names of the key types on file, so that the host is asked for a key that can be compared.
    pub(super) fn algorithms(&self) -> Vec<String> {
        let on_file = if self.trusted.is_empty() { &self.portless } else { &self.trusted };
        on_file.iter().map(|known| plain_type(&known.key)).collect()
    }

    /// Whether a certificate of the host could be believed.
    pub(super) fn has_authority(&self) -> bool {
        !self.authorities.is_empty()
    }

    /// Why the host would be refused whatever key it has, and what to do: nothing is on file.
    pub(super) fn doubt(&self) -> Option<(String, String)> {
        let none = self.trusted.is_empty() && self.portless.is_empty() && self.authorities.is_empty();
        let files: Vec<String> = self.files.iter().map(|file| shown(file)).collect();
        let says = match files.as_slice() {
            [] => "no file of known hosts is named, so that its key would be refused".to_owned(),
            files => {
                format!("its key is in no file of known hosts ({}), so that it would be refused", files.join(", "))
            }
        };
        none.then(|| (says, format!("lockstep keys scan-host {}", self.scan)))
    }

    /// The file that a new key is added to.
    pub(super) fn first_file(&self) -> Option<&Path> {
        self.files.first().map(PathBuf::as_path)
    }

    /// The line that trusts this key.
    pub(super) fn line(&self, key: &PublicKey) -> String {
        let key = PublicKey::from(key.key_data().clone()).to_openssh().unwrap_or_default();
        format!("{} {}", self.name, key.trim_end())
    }

    fn revocation(&self, key: &KeyData, what: &str) -> Option<String> {
        let known = self.revoked.iter().find(|known| known.key.key_data() == key)?;
        Some(format!(
            "{}: REVOKED HOST KEY: {} revokes the {} key {} {what}; do not connect before its owner says why",
            self.name,
            known.place(),
            plain_type(&known.key),
            known.key.fingerprint(HashAlg::Sha256),
        ))
    }

    /// The same of the list of `RevokedHostKeys`.
    fn listed(&self, credential: Credential<'_>) -> Option<String> {
        let (file, revoked) = self.listed.as_ref()?;
        let reason = revoked.check(credential).err()?;
        let (name, file) = (&self.name, shown(file));
        Some(format!("{name}: REVOKED HOST KEY: {reason}, by '{file}'; do not connect before its owner says why"))
    }

    /// Whether this key is the host's.
    pub(super) fn check(&self, offered: &PublicKey) -> Verdict {
        let kind = plain_type(offered);
        let fingerprint = offered.fingerprint(HashAlg::Sha256);
        if let Some(told) = &self.told {
            if told.key_data() == offered.key_data() {
                return Verdict::Trusted;
            }
            return Verdict::Refused(format!(
                "{}: ANOTHER HOST KEY: its agent has the {} key {} there, but the {kind} key {fingerprint} is offered; \
                 somebody may be in between: ask the host's owner who listens there",
                self.name,
                plain_type(told),
                told.fingerprint(HashAlg::Sha256),
            ));
        }
        let revoked = || self.listed(Credential::Key(offered.key_data()));
        if let Some(reason) = self.revocation(offered.key_data(), "that the host offers").or_else(revoked) {
            return Verdict::Refused(reason);
        }
        if let Some(reason) = too_short(offered.key_data()) {
            return Verdict::Refused(format!("{}: refused: the host's {reason}", self.name));
        }
        let is_on_file = |known: &[Known]| known.iter().any(|known| known.key.key_data() == offered.key_data());
        if is_on_file(&self.trusted) || (self.trusted.is_empty() && is_on_file(&self.portless)) {
            return Verdict::Trusted;
        }
        let alike = self.trusted.iter().find(|known| plain_type(&known.key) == kind);
        if let Some(known) = alike.or(self.trusted.first()) {
            return Verdict::Refused(format!(
                "{}: HOST KEY CHANGED: the host offers the {kind} key {fingerprint}, but {} holds the {} key {}; \
                 somebody may be listening in, or the host was set up anew: ask its owner, and only if the new key is \
                 right remove that line with: ssh-keygen -f {} -R {}",
                self.name,
                known.place(),
                plain_type(&known.key),
                known.key.fingerprint(HashAlg::Sha256),
                quote(&shown(&known.file)),
                quote(&self.name)
            ));
        }
        Verdict::Unknown(PublicKey::from(offered.key_data().clone()), self.unknown(&kind, &fingerprint.to_string()))
    }

    /// What is to be thought of the keys that a host has, one of each type.
    pub(super) fn judge(&self, keys: &[PublicKey]) -> Vec<Finding> {
        let verdicts: Vec<Verdict> = keys.iter().map(|key| self.check(key)).collect();
        let is_proven = verdicts.iter().any(|verdict| matches!(verdict, Verdict::Trusted));
        let on_file = self.algorithms();
        let findings = keys.iter().zip(verdicts).map(|(key, verdict)| match verdict {
            Verdict::Trusted => Finding::Trusted,
            Verdict::Unknown(..) => Finding::New,
            Verdict::Refused(_)
                if is_proven
                    && !on_file.contains(&plain_type(key))
                    && too_short(key.key_data()).is_none()
                    && self.listed(Credential::Key(key.key_data())).is_none()
                    && self.revocation(key.key_data(), "").is_none() =>
            {
                // The host has a key of one more type than is on file.
                Finding::New
            }
            Verdict::Refused(reason) => Finding::Refused(reason),
        });
        findings.collect()
    }

    fn unknown(&self, kind: &str, fingerprint: &str) -> String {
        let name = &self.name;
        let file = self.first_file().map_or_else(String::new, |file| format!("--known-hosts {} ", quote(&shown(file))));
        format!(
            "{name}: unknown host key: {kind} {fingerprint} is in none of the known hosts files; compare it with what \
             the host's owner says, then add it with: lockstep keys scan-host --add --fingerprint {fingerprint} \
             {file}{}",
            self.scan
        )
    }

    /// Whether this certificate is the host's, by an authority of the files; else its bare key may be.
    pub(super) fn check_certificate(&self, offered: &Certificate) -> Verdict {
        let bare = PublicKey::from(offered.public_key().clone());
        let authority = offered.signature_key();
        let revoked = self
            .revocation(offered.public_key(), "that the host's certificate is for")
            .or_else(|| self.revocation(authority, "that signed the host's certificate"))
            .or_else(|| self.listed(Credential::Certificate(offered)));
        if let Some(reason) = revoked {
            return Verdict::Refused(reason);
        }
        let Some(known) = self.authorities.iter().find(|known| known.key.key_data() == authority) else {
            return match self.check(&bare) {
                Verdict::Unknown(key, reason) => {
                    let signer = authority.fingerprint(HashAlg::Sha256);
                    Verdict::Unknown(
                        key,
                        format!("{reason} (its certificate is signed by {signer}, no authority here)"),
                    )
                }
                verdict => verdict,
            };
        };
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(u64::MAX, |now| now.as_secs());
        match self.certificate_fault(offered, now) {
            None => Verdict::Trusted,
            Some(reason) => Verdict::Refused(format!(
                "{}: HOST CERTIFICATE REFUSED: {reason}; it is signed by the authority of {}: ask who keeps that",
                self.name,
                known.place()
            )),
        }
    }

    /// What is wrong with a certificate whose authority is trusted, at `now` in Unix seconds.
    fn certificate_fault(&self, offered: &Certificate, now: u64) -> Option<String> {
        if offered.cert_type() != CertType::Host {
            return Some("it is a user's certificate, not a host's".into());
        }
        if matches!(offered.signature().algorithm(), Algorithm::Rsa { hash: None } | Algorithm::Dsa) {
            return Some("it is signed with SHA-1".into());
        }
        for (key, whose) in [(offered.public_key(), "its"), (offered.signature_key(), "its authority's")] {
            if let Some(reason) = too_short(key) {
                return Some(format!("{whose} {reason}"));
            }
        }
        if now < offered.valid_after() {
            return Some("it is not valid yet; is the clock right?".into());
        }
        if now >= offered.valid_before() {
            return Some("it has expired".into());
        }
        let signer = offered.signature_key().fingerprint(HashAlg::Sha256);
        if offered.validate_at(now, [&signer]).is_err() {
            return Some("its signature is wrong".into());
        }
        let names = offered.valid_principals();
        if !names.iter().any(|name| wild(name.to_ascii_lowercase().as_bytes(), self.host.as_bytes())) {
            let names = crate::error::Escaped(names.join(", ").as_bytes()).to_string();
            let names = if names.is_empty() { "no host at all".into() } else { names };
            return Some(format!("it is for {names}, not for {}", self.host));
        }
        if let Some((option, _)) = offered.critical_options().iter().next() {
            let option = crate::error::Escaped(option.as_bytes());
            return Some(format!("it has the critical option '{option}', which nobody here understands"));
        }
        None
    }

    /// Appends the line that trusts `key` to the first file.
    ///
    /// # Errors
    /// When there is no file to write to, or it cannot be written.
    pub(super) fn add_key(&self, key: &PublicKey) -> Result<(), String> {
        let file = self.first_file().ok_or_else(|| format!("{}: no file to add the host key to", self.name))?;
        let added = append(file, &self.line(key));
        added.map(drop).map_err(|error| format!("cannot add the host key to '{}': {error}", shown(file)))
    }
}

/// What the text of one file says of keys that a host may show, one of each type.
///
/// # Errors
/// When a `@revoked` line cannot be understood.
pub fn judge_hosts(text: &[u8], options: &SshOptions, keys: &[PublicKey]) -> Result<Vec<Finding>, String> {
    let mut known = KnownHost::new(options);
    known.add(Path::new("known_hosts"), text)?;
    Ok(known.judge(keys))
}

/// Adds a line that revokes a key for every host, be it a host's own or an authority's. Whether the line is new.
///
/// # Errors
/// When the file cannot be read or written, or others may write it.
pub fn revoke_host(file: &Path, key: &PublicKey) -> Result<bool, String> {
    let failed = |error: io::Error| format!("cannot add to '{}': {}", shown(file), crate::error::in_words(&error));
    let bare = PublicKey::from(key.key_data().clone()).to_openssh().map_err(|error| error.to_string())?;
    let line = format!("@revoked * {}", bare.trim_end());
    match contents(file) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed(error)),
        _ => append(file, &line).map_err(failed),
    }
}

fn too_short(key: &KeyData) -> Option<String> {
    let KeyData::Rsa(rsa) = key else { return None };
    let bits = rsa.key_size();
    (bits < MIN_RSA_BITS).then(|| format!("RSA key has only {bits} bits; its owner has to make a new one"))
}

/// A file that others may write would let them decide who is trusted.
fn contents(path: &Path) -> io::Result<Vec<u8>> {
    let mut file = std::fs::File::open(path)?;
    // RACE: none; the descriptor that is checked is the one that is read.
    let metadata = file.metadata()?;
    if metadata.is_file() && metadata.mode() & 0o022 != 0 {
        let mode = metadata.mode() & 0o7777;
        return Err(io::Error::other(format!("others may write it (mode {mode:04o}); run chmod go-w on it")));
    }
    if metadata.is_file() && ![0, rustix::process::geteuid().as_raw()].contains(&metadata.uid()) {
        let whose = metadata.uid();
        return Err(io::Error::other(format!(
            "it belongs to user {whose}, who decides then which hosts are trusted; make it yours, or root's"
        )));
    }
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Appends a line, below one that lacks its end too; makes the file and its directory for the user alone, but in a directory
/// that others may enter, as `/etc/ssh`, for all to read: which key a host has is no secret. Whether the line was not there yet.
fn append(file: &Path, line: &str) -> io::Result<bool> {
    let directory = file.parent().filter(|directory| !directory.as_os_str().is_empty()).unwrap_or(Path::new("."));
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
    let present = match std::fs::read(file) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
        Err(error) => return Err(error),
    };
    if present.split(|byte| *byte == b'\n').any(|there| there == line.as_bytes()) {
        return Ok(false);
    }
    let start = if present.last().is_none_or(|last| *last == b'\n') { "" } else { "\n" };
    let mode = if directory.metadata()?.mode() & 0o001 == 0 { 0o600 } else { 0o644 };
    // One write in append mode, so that lines of two programs do not mix.
    let append = |new: bool| std::fs::OpenOptions::new().append(true).create_new(new).mode(mode).open(file);
    let mut file = match append(true) {
        Ok(file) => {
            // Whatever the umask is.
            file.set_permissions(std::fs::Permissions::from_mode(mode))?;
            file
        }
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => append(false)?,
        Err(error) => return Err(error),
    };
    file.write_all(format!("{start}{line}\n").as_bytes())?;
    Ok(true)
}

/// `ssh-rsa` whatever the hash, `ssh-ed25519`, …
fn plain_type(key: &PublicKey) -> String {
    key.algorithm().as_str().to_owned()
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

#[cfg(test)]
mod tests {
    use super::*;

    const A: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIB9dG4kjRhQTtWTVzd2t27+t0DEHBPW7iOD23TUiYLio";
    const B: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJdD7y3aLq454yWBdwLWbieU1ebz9/cu7/QEXn9OIeZJ";

    fn options(host: &str, port: u16, file: impl Into<PathBuf>) -> SshOptions {
        SshOptions { known_hosts: vec![file.into()], ..SshOptions::new("u", host, port) }
    }

    fn verdict(file: &str, host: &str, port: u16, offered: &str) -> Result<(), String> {
        let mut known = KnownHost::new(&options(host, port, "kh"));
        known.add(Path::new("kh"), file.as_bytes())?;
        match known.check(&offered.parse().unwrap()) {
            Verdict::Trusted => Ok(()),
            Verdict::Unknown(_, reason) | Verdict::Refused(reason) => Err(reason),
        }
    }

    #[test]
    fn lines_match_as_openssh_matches_them() {
        let cases = [
            (format!("h1 {A}"), "h1", 22, "ok"),
            (format!("h1 {A}"), "H1", 22, "ok"),
            (format!("\t h1,h2\t{A} comment # more"), "h2", 22, "ok"),
            (format!("h1 {A}"), "h1", 2222, "ok"),
            (format!("h1 {B}"), "h1", 2222, "unknown"),
            (format!("h1 {A}\n[h1]:2222 {B}"), "h1", 2222, "CHANGED"),
            (format!("h1 {B}\n[h1]:2222 {A}"), "h1", 2222, "ok"),
            (format!("[h1]:2222 {A}\n@revoked h1 {A}"), "h1", 2222, "REVOKED"),
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
    fn an_unknown_key_comes_with_the_command_that_adds_it() {
        let message = verdict("", "h1", 2222, A).unwrap_err();
        let fingerprint = A.parse::<PublicKey>().unwrap().fingerprint(HashAlg::Sha256);
        let command = format!("keys scan-host --add --fingerprint {fingerprint} --known-hosts kh -P 2222 h1");
        assert!(message.ends_with(&command), "{message}");
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
    fn h57_short_rsa_keys_are_refused_even_when_they_are_on_file() {
        let directory = tempfile::tempdir().unwrap();
        for (bits, good) in [("2048", false), ("3072", true)] {
            let file = directory.path().join(bits);
            let mut command = std::process::Command::new("ssh-keygen");
            let run = command.args(["-q", "-t", "rsa", "-N", "", "-b", bits, "-f"]).arg(&file).status().unwrap();
            assert!(run.success());
            let key = std::fs::read_to_string(directory.path().join(format!("{bits}.pub"))).unwrap();
            let verdict = verdict(&format!("h1 {key}"), "h1", 22, key.trim());
            assert_eq!(verdict.is_ok(), good, "{verdict:?}");
            assert!(good || verdict.unwrap_err().contains("only 2048 bits"));
        }
    }

    #[test]
    fn h50_a_file_that_cannot_be_read_or_that_others_may_write_refuses() {
        use std::os::unix::fs::PermissionsExt as _;
        let directory = tempfile::tempdir().unwrap();
        let read = |path: PathBuf| KnownHost::read(&options("h1", 22, path));
        let file = directory.path().join("kh");
        std::fs::write(&file, format!("h1 {A}\n")).unwrap();
        for (mode, good) in [(0o644, true), (0o664, false), (0o602, false)] {
            std::fs::set_permissions(&file, std::fs::Permissions::from_mode(mode)).unwrap();
            let known = read(file.clone());
            assert_eq!(known.is_ok(), good, "{mode:o}");
            assert!(good || known.unwrap_err().contains("chmod go-w"));
        }
        assert!(read("/dev/null".into()).is_ok());
        assert!(read(directory.path().join("none")).is_ok());
        assert!(read(directory.path().to_owned()).unwrap_err().contains("cannot read"));
    }
}
