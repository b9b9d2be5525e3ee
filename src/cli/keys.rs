//! `lockstep keys`: from nothing to a first login without a password.

use std::path::{Path, PathBuf};

use russh::keys::ssh_key::{HashAlg, PublicKey};

use super::login::{Ssh, Warn as _, failed, parse_host};
use super::remote::REMOTE_COMMAND;
use super::{Failure, output, passphrase, shown};
use crate::endpoint::link::ConnectError;
use crate::error::{Escaped, Exit};
use crate::ssh::{Enrolled, Finding, Shown, SshOptions, SshRemote, key_file, quote};

mod certify;
mod list;
mod revoke;

#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
    /// Make a key pair to log in with
    Generate(Generate),
    /// Have a key accepted by another server, through a login that works already
    Enroll(Enroll),
    /// Show a server's host keys, and trust them
    ScanHost(ScanHost),
    /// Sign certificates for keys, so that no node needs a list of all the others'
    Certify(certify::Certify),
    /// Refuse keys and certificates from now on, whoever lists them
    Revoke(revoke::Revoke),
    /// Show what may connect to the server here, from where, and what it may do
    List(list::List),
}

impl Command {
    pub(super) fn run(self) -> Result<Exit, Failure> {
        match self {
            Command::Generate(command) => command.run(),
            Command::Enroll(command) => command.run(),
            Command::ScanHost(command) => command.run(),
            Command::Certify(command) => command.run(),
            Command::Revoke(command) => command.run(),
            Command::List(command) => command.run(),
        }
    }
}

/// Makes a key pair.
#[derive(Debug, clap::Args)]
pub(super) struct Generate {
    /// The kind of key
    #[arg(long = "type", value_name = "TYPE", default_value = "ed25519", value_parser = ["ed25519"])]
    kind: String,
    /// What the key is called at the other end [default: user@host]
    #[arg(long, value_name = "TEXT")]
    comment: Option<String>,
    /// Ask for a passphrase that protects the key
    #[arg(long)]
    passphrase: bool,
    /// The file to write the private key to; the public one gets '.pub' at its end [default: ~/.ssh/id_ed25519]
    #[arg(value_name = "FILE")]
    file: Option<PathBuf>,
}

impl Generate {
    fn run(self) -> Result<Exit, Failure> {
        let file = self.file.unwrap_or_else(|| std::env::home_dir().unwrap_or_default().join(".ssh/id_ed25519"));
        let comment = self.comment.unwrap_or_else(super::transfer::actor);
        if comment.contains(char::is_control) {
            return Err(Failure::usage("--comment: control characters cannot stand in a key's comment"));
        }
        for file in [file.clone(), key_file::beside(&file)] {
            if file.symlink_metadata().is_ok() {
                let file = shown(&file);
                return Err(Failure::usage(format!(
                    "'{file}' is there already; keys are never overwritten: name another"
                )));
            }
        }
        let secret = if self.passphrase { Some(new_passphrase(&file)?) } else { None };
        let public = key_file::generate(&file, &comment, secret.as_deref()).map_err(Failure::io("write", &file))?;
        eprintln!("wrote '{}' and '{}'", shown(&file), shown(&key_file::beside(&file)));
        eprintln!("{} key, {}", self.kind, public.fingerprint(HashAlg::Sha256));
        if secret.is_none() {
            eprintln!("it has no passphrase, so whoever can read the file can use it; --passphrase asks for one");
        }
        output(format!("{}\n", public_line(&public)).as_bytes())?;
        Ok(Exit::Done)
    }
}

fn new_passphrase(file: &Path) -> Result<String, Failure> {
    let no_one = || Failure::usage("--passphrase: there is no terminal to ask at, or nothing was typed");
    let first = passphrase::ask(&format!("New passphrase for {}: ", shown(file))).ok_or_else(no_one)?;
    if first.is_empty() {
        return Err(no_one());
    }
    if passphrase::ask("The same again: ").ok_or_else(no_one)? != first {
        return Err(Failure::usage("--passphrase: the two are not the same"));
    }
    Ok(first)
}

/// As it stands in `authorized_keys`.
fn public_line(key: &PublicKey) -> String {
    key.to_openssh().unwrap_or_default().trim_end().to_owned()
}

/// Adds the public key to `authorized_keys` of the account there.
#[derive(Debug, clap::Args)]
pub(super) struct Enroll {
    /// The account that is to accept the key
    #[arg(value_name = "[USER@]HOST")]
    host: String,
    /// A key that the account accepts already; several times for several [default: all but the new one]
    #[arg(long, value_name = "FILE")]
    with: Vec<PathBuf>,
    /// Let the key do nothing but file transfer below this directory
    #[arg(long, value_name = "DIR")]
    restrict: Option<PathBuf>,
    /// With --restrict: the command that starts lockstep there
    #[arg(long, value_name = "COMMAND", requires = "restrict", default_value = REMOTE_COMMAND)]
    remote_command: String,
    #[command(flatten)]
    ssh: Ssh,
}

impl Enroll {
    fn run(self) -> Result<Exit, Failure> {
        let (user, host) = parse_host(&self.host)?;
        if self.ssh.identity.len() > 1 {
            return Err(Failure::usage("--identity: one key at a time is enrolled"));
        }
        // What is there to log in with, apart from the new key.
        let resolved = self.ssh.with_identities(&self.with).resolve(user.as_deref(), &host)?;
        resolved.warn();
        let mut others = resolved.options;
        let key = self.ssh.resolve(user.as_deref(), &host)?.options.identity_files.into_iter().next();
        let key = key.ok_or_else(|| Failure::usage("no key to enroll; make one with: lockstep keys generate"))?;
        let public = key_file::public_half(&key).map_err(Failure::usage)?;
        let name = format!("{}: {}", others.describe(), public.fingerprint(HashAlg::Sha256));

        let alone = SshOptions { identity_files: vec![key.clone()], identities_only: true, ..others.clone() };
        let alone = SshRemote::new(alone).map_err(failed)?;
        match alone.log_in() {
            Ok(()) if self.restrict.is_none() => {
                eprintln!("{name} is accepted already");
                return Ok(Exit::Done);
            }
            // A host that is not trusted, or not there, takes no key at all.
            Err(error) if !alone.was_refused() => return Err(failed(error)),
            _ => {}
        }
        others.identity_files.retain(|file| *file != key);
        if self.restrict.is_some() {
            // The key may be there without the restriction; then it can see to its own.
            others.identity_files.push(key.clone());
        }
        self.add(&name, &key, &public, &others)?;
        prove(&alone, &name)
    }

    /// Adds the line through a login that works.
    fn add(&self, name: &str, key: &Path, public: &PublicKey, others: &SshOptions) -> Result<(), Failure> {
        let line = match &self.restrict {
            None => public_line(public),
            Some(directory) => {
                format!("{} {}", restriction(directory, &self.remote_command)?, public_line(public))
            }
        };
        let blob = public_line(&PublicKey::from(public.key_data().clone()));
        let remote = SshRemote::new(others.clone()).map_err(failed)?;
        let enrolled = remote.enroll(&line, blob.split(' ').nth(1).unwrap_or_default());
        let enrolled = enrolled.map_err(|error| match remote.was_refused() {
            true => by_hand(&error, key, &line, others),
            false => failed(error),
        });
        match enrolled? {
            Enrolled::Added(file) => eprintln!("{name} was added to {file}"),
            Enrolled::There(file) => eprintln!("{name} is in {file} already"),
            Enrolled::Otherwise(file) => {
                let message = format!(
                    "{name} is in {file} already, with other options in front; remove that line there, then try again"
                );
                return Err(Failure::Plain { exit: Exit::Incomplete, message });
            }
            Enrolled::Confined => {
                let message = format!(
                    "{name} was not added: the account sees only its own directory there, so that its keys are kept out \
                     of its reach; whoever runs that server adds this line to its file of keys (for 'lockstep serve', \
                     the one that --authorized-keys names):\n{line}"
                );
                return Err(Failure::Plain { exit: Exit::Trust, message });
            }
        }
        Ok(())
    }
}

/// Logs in with the new key.
fn prove(alone: &SshRemote, name: &str) -> Result<Exit, Failure> {
    alone.log_in().map_err(|error| {
        let message = format!(
            "{}; the line is in its authorized_keys: does sshd look there (AuthorizedKeysFile), and may others write \
             the file, .ssh or the home directory (StrictModes)?",
            error.message
        );
        Failure::Plain { exit: error.exit, message }
    })?;
    eprintln!("{name} logs in");
    Ok(Exit::Done)
}

/// The options that let a key transfer files below a directory, and nothing else.
fn restriction(directory: &Path, command: &str) -> Result<String, Failure> {
    let text = directory.to_str().filter(|text| text.starts_with('/') && !text.contains(char::is_control));
    let text =
        text.ok_or_else(|| Failure::usage("--restrict: an absolute path without control characters is needed"))?;
    let command = format!("{command} --root {}", quote(text)).replace('"', "\\\"");
    Ok(format!("restrict,command=\"{command}\""))
}

/// When no login works: what is to be done, by whom.
fn by_hand(error: &ConnectError, key: &Path, line: &str, options: &SshOptions) -> Failure {
    let SshOptions { host, port, user, .. } = options;
    let public = if key.extension().is_some_and(|end| end == "pub") { key.to_owned() } else { key_file::beside(key) };
    let port = if *port == 22 { String::new() } else { format!("-p {port} ") };
    let jumps = options.jumps();
    let jump = if jumps.is_empty() { jumps } else { format!("-o ProxyJump={} ", quote(&jumps)) };
    let message = format!(
        "{}\nNo login to {user}@{host} works from here yet; --with KEY names one that does. Or somebody who can write \
         ~{user}/.ssh/authorized_keys there adds this line:\n{line}\nor, where a password still works:\n  ssh-copy-id -i {} {jump}{port}{}",
        // Without its advice: it sends back to this command.
        error.message.split("; ").next().unwrap_or_default(),
        quote(&shown(&public).to_string()),
        quote(&format!("{user}@{host}")),
        user = Escaped(user.as_bytes()),
    );
    Failure::Plain { exit: error.exit, message }
}

/// Shows the host's keys as lines of `known_hosts`.
#[derive(Debug, clap::Args)]
pub(super) struct ScanHost {
    /// The server
    #[arg(value_name = "HOST")]
    host: String,
    /// Trust the keys: add them to the known hosts, unless the host has others there
    #[arg(long)]
    add: bool,
    /// With --add, only the key with this fingerprint
    #[arg(long, value_name = "SHA256:...", requires = "add")]
    fingerprint: Option<String>,
    #[command(flatten)]
    ssh: Ssh,
}

impl ScanHost {
    fn run(self) -> Result<Exit, Failure> {
        let (user, host) = parse_host(&self.host)?;
        let resolved = self.ssh.resolve(user.as_deref(), &host)?;
        resolved.warn();
        let options = resolved.options;
        let name = options.describe();
        let remote = SshRemote::new(options).map_err(failed)?;
        let found = remote.scan().map_err(failed)?;
        let mut text = String::new();
        for Shown { key, line, .. } in &found {
            text.push_str(&format!("# {} {}\n{line}\n", key.algorithm(), key.fingerprint(HashAlg::Sha256)));
        }
        output(text.as_bytes())?;
        let refused = |message| Failure::Plain { exit: Exit::Trust, message };
        if let Some(reason) = found.iter().find_map(|shown| match &shown.finding {
            Finding::Refused(reason) => Some(reason.clone()),
            _ => None,
        }) {
            return Err(refused(reason));
        }
        if !self.add {
            return Ok(Exit::Done);
        }
        let new: Vec<&PublicKey> = match &self.fingerprint {
            Some(wanted) => {
                let wanted = wanted.trim_end_matches('=');
                let is_wanted = |shown: &&Shown| shown.key.fingerprint(HashAlg::Sha256).to_string() == *wanted;
                let shown = found.iter().find(is_wanted).ok_or_else(|| {
                    refused(format!("{name}: the host shows no key with the fingerprint {wanted}; nothing was added"))
                })?;
                if shown.finding == Finding::Trusted { Vec::new() } else { vec![&shown.key] }
            }
            // A host that is known already proves further keys by nothing.
            None if found.iter().any(|shown| shown.finding == Finding::Trusted) => Vec::new(),
            None => found.iter().map(|shown| &shown.key).collect(),
        };
        if new.is_empty() {
            eprintln!("{name} is trusted already");
            return Ok(Exit::Done);
        }
        let file = remote.trust(&new).map_err(failed)?;
        for key in new {
            eprintln!("{name}: added {} {} to {}", key.algorithm(), key.fingerprint(HashAlg::Sha256), shown(&file));
        }
        eprintln!("compare with what the server's owner says: ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub, there");
        Ok(Exit::Done)
    }
}
