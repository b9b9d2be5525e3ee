//! `ssh_config(5)`: from the name of a host, the command line and the user's files to [`SshOptions`].
//!
//! The command line comes first, then the user's file, then the system's; the first value wins. No command of
//! `Match exec` is run. Keywords that mean nothing here are left out, and that is noted.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

mod file;
mod keyword;
mod tokens;
mod words;

pub use keyword::Keyword;

use file::{Pass, Settings, Value};
use tokens::{Tokens, tilde};

use super::options::{AddressFamily, Keepalive, Passphrase, SshOptions, UnknownHost, is_active};
use crate::error::Escaped;

/// Hosts that are jumped through, at most.
const MAX_HOPS: usize = 8;

/// What is wrong with a configuration, and where.
#[derive(Debug, thiserror::Error)]
#[error("{place}: {reason}")]
pub struct ConfigError {
    place: String,
    reason: String,
}

impl ConfigError {
    fn new(place: String, reason: String) -> ConfigError {
        ConfigError { place, reason }
    }
}

/// What tokens, variables and defaults stand for on this machine.
#[derive(Debug, Clone)]
pub struct Environment {
    /// The user's home directory.
    pub home: PathBuf,
    /// The user who runs this.
    pub user: String,
    /// The user's number.
    pub uid: u32,
    /// This machine's name.
    pub node: String,
    /// Socket of the agent.
    pub agent: Option<PathBuf>,
    /// Looks up a variable.
    pub variable: fn(&str) -> Option<String>,
}

impl Environment {
    /// That of this process.
    pub fn of_process() -> Environment {
        let uid = rustix::process::getuid().as_raw();
        Environment {
            home: std::env::home_dir().unwrap_or_default(),
            user: uzers::get_current_username().map_or_else(|| uid.to_string(), |name| name.to_string_lossy().into()),
            uid,
            node: rustix::system::uname().nodename().to_string_lossy().into_owned(),
            agent: std::env::var_os("SSH_AUTH_SOCK").filter(|socket| !socket.is_empty()).map(PathBuf::from),
            variable: |name| std::env::var_os(name).map(OsString::into_string)?.ok(),
        }
    }
}

/// Which files are read.
#[derive(Debug, Clone, Default)]
pub enum Files {
    /// The user's and the system's.
    #[default]
    Usual,
    /// This alone; it must be there.
    One(PathBuf),
    /// None at all.
    None,
}

/// What the command line says.
#[derive(Clone, Default)]
pub struct Given {
    /// The files to read.
    pub files: Files,
    settings: Vec<(Keyword, Vec<String>)>,
    /// Key files, with names as they are: no token means anything in them.
    pub identities: Vec<PathBuf>,
    /// Instead of all files of known hosts.
    pub known_hosts: Vec<PathBuf>,
    /// Asked for the passphrase of an encrypted key file, unless `BatchMode` says no.
    pub passphrase: Option<Passphrase>,
}

impl Given {
    /// The files to read, and whom to ask for passphrases.
    pub fn new(files: Files, passphrase: Option<Passphrase>) -> Given {
        Given { files, passphrase, ..Given::default() }
    }

    /// Sets a keyword; what was set before wins.
    pub fn set(&mut self, keyword: Keyword, value: impl Into<String>) {
        self.settings.push((keyword, vec![value.into()]));
    }

    /// `-o`: `KEY=VALUE` or `KEY VALUE`.
    ///
    /// # Errors
    /// An unknown keyword with the nearest one, and a value that cannot be.
    pub fn option(&mut self, text: &str) -> Result<(), ConfigError> {
        let wrong = |reason| ConfigError::new(format!("-o {text}"), reason);
        let (name, rest) = words::keyword(text).ok_or_else(|| wrong("write it as KEY=VALUE".into()))?;
        let Some(keyword) = keyword::of_command_line(name, rest).map_err(wrong)? else { return Ok(()) };
        let words = if keyword.takes_the_rest() { vec![rest.to_owned()] } else { words::split(rest).map_err(wrong)? };
        if words.first().is_none_or(String::is_empty) || (words.len() > 1 && !keyword.takes_many()) {
            return Err(wrong(format!("write it as {}=VALUE", keyword.name())));
        }
        self.settings.push((keyword, words));
        Ok(())
    }
}

/// A host with the way to it, and what was left out on the way there.
pub struct Resolved {
    /// To connect with.
    pub options: SshOptions,
    /// What may be missed.
    pub warnings: Vec<String>,
    /// What means nothing here.
    pub notes: Vec<String>,
}

/// Finds out how `host` is reached, and as whom.
///
/// # Errors
/// What is wrong with a file or a value.
pub fn resolve(
    host: &str,
    user: Option<&str>,
    given: &Given,
    environment: &Environment,
) -> Result<Resolved, ConfigError> {
    let mut resolver = Resolver { given, environment, warnings: Vec::new(), notes: Vec::new() };
    let mut settings = Settings::default();
    if let Some(user) = user {
        settings.set(Keyword::User, vec![user.to_owned()], "the command line");
    }
    let options = resolver.host(host, settings, &mut Vec::new())?;
    Ok(Resolved { options, warnings: resolver.warnings, notes: resolver.notes })
}

struct Resolver<'a> {
    given: &'a Given,
    environment: &'a Environment,
    warnings: Vec<String>,
    notes: Vec<String>,
}

impl Resolver<'_> {
    /// What the command line and the files say of a host, and the name to connect to.
    fn settings(
        &mut self,
        original: &str,
        mut settings: Settings,
        jump: bool,
    ) -> Result<(Settings, String), ConfigError> {
        for (keyword, words) in &self.given.settings {
            if !(jump && keyword.is_of_one_host()) {
                settings.set(*keyword, words.clone(), "the command line");
            }
        }
        let wants_last = self.pass(original, original, false, &mut settings)?;
        let host = hostname(&settings, original)?.to_lowercase();
        if wants_last {
            self.pass(original, &host, true, &mut settings)?;
        }
        Ok((settings, host))
    }

    fn pass(
        &mut self,
        original: &str,
        host: &str,
        is_last: bool,
        settings: &mut Settings,
    ) -> Result<bool, ConfigError> {
        let user = self.environment.home.join(".ssh");
        let system = Path::new("/etc/ssh");
        let files = match &self.given.files {
            Files::None => Vec::new(),
            Files::One(file) => vec![(file.clone(), user.as_path(), true)],
            Files::Usual => {
                vec![(user.join("config"), user.as_path(), false), (system.join("ssh_config"), system, false)]
            }
        };
        let (warnings, notes) = (std::mem::take(&mut self.warnings), std::mem::take(&mut self.notes));
        let environment = self.environment;
        let mut pass = Pass { environment, original, host, is_last, settings, wants_last: false, notes, warnings };
        for (file, beside, must) in files {
            pass.read(&file, beside, must)?;
        }
        let Pass { wants_last, notes, warnings, .. } = pass;
        (self.notes, self.warnings) = (notes, warnings);
        // The same block may be left out for several hosts.
        self.warnings.dedup();
        Ok(wants_last)
    }

    fn host(&mut self, original: &str, settings: Settings, trail: &mut Vec<String>) -> Result<SshOptions, ConfigError> {
        let is_jump = !trail.is_empty();
        let (settings, host) = self.settings(original, settings, is_jump)?;
        let environment = self.environment;
        let port = number(&settings, Keyword::Port)?.unwrap_or(22);
        let user = settings.text(Keyword::User).unwrap_or(&environment.user).to_owned();
        let alias = settings.text(Keyword::HostKeyAlias).map(str::to_owned);
        let key_name = alias.clone().unwrap_or_else(|| original.to_owned());
        let tokens = Tokens { environment, original, host: &host, alias: &key_name, port, user: &user };
        let default = SshOptions::new(&user, &host, port);
        let batch = flag(&settings, Keyword::BatchMode)?.unwrap_or(false);
        let mut options = SshOptions {
            host_key_alias: alias,
            identity_files: self.identity_files(&settings, &tokens)?,
            certificate_files: paths(settings.all(Keyword::CertificateFile), &tokens)?,
            identities_only: flag(&settings, Keyword::IdentitiesOnly)?.unwrap_or(false),
            agent_socket: agent(&settings, &tokens)?,
            known_hosts: self.known_hosts(&settings, &tokens)?,
            revoked_host_keys: paths(settings.all(Keyword::RevokedHostKeys), &tokens)?.into_iter().next(),
            unknown_host: self.unknown_host(&settings)?,
            // 0 means none of its own, as for ssh.
            connect_timeout: seconds(&settings, Keyword::ConnectTimeout)?
                .filter(|time| !time.is_zero())
                .unwrap_or(default.connect_timeout),
            keepalive: keepalive(&settings)?,
            address_family: address_family(&settings)?,
            proxy_command: proxy_command(&settings, &tokens)?,
            passphrase: self.given.passphrase.clone().filter(|_| !batch),
            ..default
        };
        let name = options.describe();
        if trail.contains(&name) || trail.len() >= MAX_HOPS {
            let reason = format!(
                "the way to it leads through itself; give it a block with 'Host {original}' and 'ProxyJump none'"
            );
            return Err(ConfigError::new(format!("jump host {name}"), reason));
        }
        trail.push(name);
        if let Some(value) = settings.first(Keyword::ProxyJump) {
            options.jump = self.jump(value, &tokens, trail)?.map(Box::new);
        }
        trail.pop();
        Ok(options)
    }

    /// The last host of a list; those before it are on the way to it.
    fn jump(
        &mut self,
        value: &Value,
        tokens: &Tokens<'_>,
        trail: &mut Vec<String>,
    ) -> Result<Option<SshOptions>, ConfigError> {
        let wrong = |reason| ConfigError::new(value.place.clone(), reason);
        let text = tokens.percent(&value.words[0], "%hnpr").map_err(wrong)?;
        if text.eq_ignore_ascii_case("none") {
            return Ok(None);
        }
        let (before, last) = text.rsplit_once(',').map_or((None, text.as_str()), |(before, last)| (Some(before), last));
        let hop = Hop::parse(last.trim()).map_err(wrong)?;
        let mut settings = Settings::default();
        for (keyword, word) in
            [(Keyword::User, hop.user), (Keyword::Port, hop.port), (Keyword::ProxyJump, before.map(str::to_owned))]
        {
            if let Some(word) = word {
                settings.set(keyword, vec![word], &value.place);
            }
        }
        self.host(&hop.host, settings, trail).map(Some)
    }

    fn identity_files(&self, settings: &Settings, tokens: &Tokens<'_>) -> Result<Vec<PathBuf>, ConfigError> {
        let mut files = self.given.identities.clone();
        let named = settings.all(Keyword::IdentityFile);
        files.extend(paths(named, tokens)?);
        if files.is_empty() && named.is_empty() {
            let usual = ["id_ed25519", "id_ecdsa", "id_rsa"];
            let usual = usual.iter().map(|name| self.environment.home.join(".ssh").join(name));
            files = usual.filter(|path| path.exists()).collect();
        }
        Ok(files)
    }

    fn known_hosts(&self, settings: &Settings, tokens: &Tokens<'_>) -> Result<Vec<PathBuf>, ConfigError> {
        if !self.given.known_hosts.is_empty() {
            return Ok(self.given.known_hosts.clone());
        }
        let ssh = self.environment.home.join(".ssh");
        let mut files = Vec::new();
        for (keyword, directory, usual) in [
            (Keyword::UserKnownHostsFile, ssh.as_path(), ["known_hosts", "known_hosts2"]),
            (Keyword::GlobalKnownHostsFile, Path::new("/etc/ssh"), ["ssh_known_hosts", "ssh_known_hosts2"]),
        ] {
            match settings.all(keyword) {
                [] => files.extend(usual.iter().map(|name| directory.join(name))),
                values => files.extend(paths(values, tokens)?),
            }
        }
        Ok(files)
    }

    fn unknown_host(&mut self, settings: &Settings) -> Result<UnknownHost, ConfigError> {
        let Some(value) = settings.first(Keyword::StrictHostKeyChecking) else { return Ok(UnknownHost::Refuse) };
        match value.words[0].to_ascii_lowercase().as_str() {
            "yes" | "true" | "ask" => Ok(UnknownHost::Refuse),
            "accept-new" => Ok(UnknownHost::Add),
            "no" | "off" | "false" if value.place == "the command line" => {
                let reason = "host keys are always checked; 'accept-new' adds those of new hosts";
                Err(ConfigError::new("StrictHostKeyChecking=no".into(), reason.into()))
            }
            "no" | "off" | "false" => {
                let text =
                    format!("{}: StrictHostKeyChecking is not heeded: host keys are always checked", value.place);
                self.warnings.push(text);
                self.warnings.dedup();
                Ok(UnknownHost::Refuse)
            }
            other => Err(bad(value, Keyword::StrictHostKeyChecking, other, "yes or accept-new")),
        }
    }
}

/// `[user@]host[:port]`, or as a URI.
struct Hop {
    user: Option<String>,
    host: String,
    port: Option<String>,
}

impl Hop {
    fn parse(text: &str) -> Result<Hop, String> {
        let wrong = || format!("'{text}' is not [USER@]HOST[:PORT]");
        let text = text.strip_prefix("ssh://").map_or(text, |rest| rest.trim_end_matches('/'));
        let (user, rest) = text.rsplit_once('@').map_or((None, text), |(user, rest)| (Some(user.to_owned()), rest));
        let (host, port) = match rest.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
            Some((host, "")) => (host, None),
            Some((host, port)) => (host, Some(port.strip_prefix(':').ok_or_else(wrong)?)),
            // Two colons are an address of IPv6.
            None if rest.matches(':').count() > 1 => (rest, None),
            None => rest.split_once(':').map_or((rest, None), |(host, port)| (host, Some(port))),
        };
        if host.is_empty() || user.as_deref() == Some("") || port == Some("") {
            return Err(wrong());
        }
        Ok(Hop { user, host: host.to_owned(), port: port.map(str::to_owned) })
    }
}

fn hostname(settings: &Settings, original: &str) -> Result<String, ConfigError> {
    let Some(value) = settings.first(Keyword::HostName) else { return Ok(original.to_owned()) };
    let host = |token| match token {
        '%' => Some("%".to_owned()),
        'h' => Some(original.to_owned()),
        _ => None,
    };
    tokens::percent(&value.words[0], host).map_err(|reason| ConfigError::new(value.place.clone(), reason))
}

fn bad(value: &Value, keyword: Keyword, text: &str, wanted: &str) -> ConfigError {
    ConfigError::new(value.place.clone(), format!("{}: '{text}' is not {wanted}", keyword.name()))
}

fn number<N: std::str::FromStr + Default + PartialEq>(
    settings: &Settings,
    keyword: Keyword,
) -> Result<Option<N>, ConfigError> {
    let Some(value) = settings.first(keyword) else { return Ok(None) };
    let text = &value.words[0];
    let parsed = text.parse().ok().filter(|number| keyword != Keyword::Port || *number != N::default());
    parsed.map(Some).ok_or_else(|| bad(value, keyword, text, "a number that fits"))
}

fn flag(settings: &Settings, keyword: Keyword) -> Result<Option<bool>, ConfigError> {
    let Some(value) = settings.first(keyword) else { return Ok(None) };
    match value.words[0].to_ascii_lowercase().as_str() {
        "yes" | "true" => Ok(Some(true)),
        "no" | "false" => Ok(Some(false)),
        other => Err(bad(value, keyword, other, "yes or no")),
    }
}

/// `90`, `1m30s`, `2h`; `none` is nothing.
fn seconds(settings: &Settings, keyword: Keyword) -> Result<Option<Duration>, ConfigError> {
    let Some(value) = settings.first(keyword) else { return Ok(None) };
    let text = &value.words[0];
    if text == "none" {
        return Ok(None);
    }
    let wrong = || bad(value, keyword, text, "a time, as 30 or 1m30s");
    let (mut total, mut digits) = (0u64, String::new());
    for c in text.chars().chain(std::iter::once('s')) {
        if c.is_ascii_digit() {
            digits.push(c);
            continue;
        }
        let unit = match c.to_ascii_lowercase() {
            's' => 1,
            'm' => 60,
            'h' => 3600,
            'd' => 86_400,
            'w' => 604_800,
            _ => return Err(wrong()),
        };
        // The 's' that was put at the end may follow a unit.
        let count: u64 = if digits.is_empty() && total > 0 { 0 } else { digits.parse().map_err(|_| wrong())? };
        total = count.checked_mul(unit).and_then(|more| total.checked_add(more)).ok_or_else(wrong)?;
        digits.clear();
    }
    Ok(Some(Duration::from_secs(total)))
}

fn keepalive(settings: &Settings) -> Result<Option<Keepalive>, ConfigError> {
    let usual = Keepalive::default();
    let interval = seconds(settings, Keyword::ServerAliveInterval)?.unwrap_or(usual.interval);
    let count = number(settings, Keyword::ServerAliveCountMax)?.unwrap_or(usual.count);
    Ok(Some(Keepalive { interval, count }).filter(|keepalive| !keepalive.interval.is_zero()))
}

fn address_family(settings: &Settings) -> Result<AddressFamily, ConfigError> {
    let Some(value) = settings.first(Keyword::AddressFamily) else { return Ok(AddressFamily::Any) };
    match value.words[0].to_ascii_lowercase().as_str() {
        "any" => Ok(AddressFamily::Any),
        "inet" => Ok(AddressFamily::V4),
        "inet6" => Ok(AddressFamily::V6),
        other => Err(bad(value, Keyword::AddressFamily, other, "any, inet or inet6")),
    }
}

/// The words of the command; no shell gets to see them, so that no name of a host can be more than a word.
fn proxy_command(settings: &Settings, tokens: &Tokens<'_>) -> Result<Option<Vec<String>>, ConfigError> {
    let Some(value) = settings.first(Keyword::ProxyCommand) else { return Ok(None) };
    let text = &value.words[0];
    if text.eq_ignore_ascii_case("none") {
        return Ok(None);
    }
    let wrong = |reason| ConfigError::new(value.place.clone(), format!("ProxyCommand: {reason}"));
    let way_out = "put it into a script, and name that";
    if let Some(c) = words::of_a_shell(text) {
        return Err(wrong(format!("'{c}' is for a shell, and the command is run without one; {way_out}")));
    }
    // It may become an option of the command, or go through a shell all the same.
    let odd = |c: char| is_active(c) || c.is_whitespace() || c.is_control();
    for name in [tokens.original, tokens.user] {
        if name.starts_with('-') || name.contains(odd) {
            let name = Escaped(name.as_bytes());
            return Err(wrong(format!("the name '{name}' cannot be part of a command")));
        }
    }
    let words = words::split(text).map_err(wrong)?;
    let expand = |word: String| tokens.percent(&tilde(&word, tokens.environment)?, "%hnpr");
    let words: Vec<String> = words.into_iter().map(expand).collect::<Result<_, _>>().map_err(wrong)?;
    // As it is often written for the shell.
    let skipped = usize::from(words.first().is_some_and(|word| word == "exec"));
    match &words[skipped..] {
        [] => Err(wrong("it names no command".into())),
        [first, ..] if first.split_once('=').is_some_and(|(name, _)| !name.contains(['/', '.'])) => Err(wrong(
            format!("'{}' sets a variable, for which there is no shell; {way_out}", Escaped(first.as_bytes())),
        )),
        words => Ok(Some(words.to_vec())),
    }
}

/// The files that values name; `none` names none.
fn paths(values: &[Value], tokens: &Tokens<'_>) -> Result<Vec<PathBuf>, ConfigError> {
    let mut files = Vec::new();
    for value in values {
        for word in value.words.iter().filter(|word| !word.eq_ignore_ascii_case("none")) {
            files.push(tokens.path(word).map_err(|reason| ConfigError::new(value.place.clone(), reason))?);
        }
    }
    Ok(files)
}

fn agent(settings: &Settings, tokens: &Tokens<'_>) -> Result<Option<PathBuf>, ConfigError> {
    let Some(value) = settings.first(Keyword::IdentityAgent) else { return Ok(tokens.environment.agent.clone()) };
    match value.words[0].as_str() {
        "SSH_AUTH_SOCK" => Ok(tokens.environment.agent.clone()),
        text => match text.strip_prefix('$').filter(|name| !name.starts_with('{')) {
            Some(name) => Ok((tokens.environment.variable)(name).filter(|path| !path.is_empty()).map(PathBuf::from)),
            None => paths(std::slice::from_ref(value), tokens).map(|files| files.into_iter().next()),
        },
    }
}

#[cfg(test)]
mod tests;
