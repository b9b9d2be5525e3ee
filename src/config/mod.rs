//! The configuration file: policies, jobs and the listener's users.
//!
//! What is read here is complete: unknown keys, names that lead nowhere and rules that do not compile are errors with
//! file, line and column, so that nothing is found out in the middle of a run.

mod address;
mod audit;
mod daemon;
mod error;
mod floods;
mod job;
mod origins;
mod quota;
mod rights;
mod serve;
mod sftp_server;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Read as _;
use std::ops::Range;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};
use toml::Spanned;

pub use address::AddressList;
pub use audit::Audit;
pub use daemon::Daemon;
pub(crate) use error::meant;
pub use error::{ConfigError, Position, Untrusted};
pub use floods::{Penalties, Startups};
pub use job::{Bandwidth, Delete, Job, Layout, Period, Ready, Schedule, Watch};
pub use origins::{Origin, Origins};
pub use quota::Quota;
pub use rights::{Right, Rights};
pub use serve::{Confine, Serve, ServeKey, ServeLimits, ServeUser, fixed_part, is_called};
pub use sftp_server::{DataPorts, SftpServer};

use crate::filter::{Filter, FilterSpec};
use crate::policy::{Policy, PolicySpec};

/// Where the configuration is, unless `--config` or `LOCKSTEP_CONFIG` says otherwise.
pub const DEFAULT_PATH: &str = "/etc/lockstep/config.toml";
const MAX_BYTES: u64 = 1 << 20;

/// A configuration that was read and checked.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The file it came from.
    #[serde(skip)]
    pub path: PathBuf,
    /// The policies by name.
    #[serde(default, rename = "policy", skip_serializing_if = "BTreeMap::is_empty")]
    pub policies: BTreeMap<String, PolicySpec>,
    /// The jobs, in order.
    #[serde(default, rename = "job", skip_serializing_if = "Vec::is_empty")]
    pub jobs: Vec<Job>,
    /// The listener, if this machine runs one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serve: Option<Serve>,
    /// What sshd starts.
    #[serde(default, skip_serializing_if = "is_default")]
    pub sftp_server: SftpServer,
    /// What runs the jobs by itself.
    #[serde(default)]
    pub daemon: Daemon,
    /// The audit logs.
    #[serde(default)]
    pub audit: Audit,
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// Only where things stand in the text.
#[derive(Default, Deserialize)]
struct Places {
    #[serde(default)]
    policy: BTreeMap<String, RulePlaces>,
    #[serde(default)]
    job: Vec<Spanned<IgnoredAny>>,
    #[serde(default)]
    serve: Option<Spanned<ServePlaces>>,
    #[serde(default)]
    daemon: Option<Spanned<IgnoredAny>>,
    #[serde(default)]
    audit: Option<Spanned<IgnoredAny>>,
}

#[derive(Default, Deserialize)]
struct RulePlaces {
    #[serde(default)]
    rule: Vec<Spanned<IgnoredAny>>,
}

#[derive(Default, Deserialize)]
struct ServePlaces {
    #[serde(default)]
    user: Vec<Spanned<UserPlaces>>,
}

#[derive(Default, Deserialize)]
struct UserPlaces {
    #[serde(default)]
    key: Vec<Spanned<IgnoredAny>>,
}

impl Config {
    /// Reads a file that only root or the caller may write.
    ///
    /// # Errors
    /// [`ConfigError`].
    pub fn load(path: &Path) -> Result<Config, ConfigError> {
        let unreadable = |reason| ConfigError::Read { path: path.to_owned(), reason };
        let untrusted = |problem| ConfigError::Untrusted { path: path.to_owned(), problem };
        // A FIFO must not block here. RACE: none; the descriptor that is checked is the one that is read.
        let flags = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::NONBLOCK | rustix::fs::OFlags::CLOEXEC;
        let file =
            rustix::fs::open(path, flags, rustix::fs::Mode::empty()).map_err(|error| unreadable(error.into()))?;
        let file = File::from(file);
        let metadata = file.metadata().map_err(unreadable)?;
        if !metadata.is_file() {
            return Err(untrusted(Untrusted::NotAFile));
        }
        if metadata.mode() & 0o022 != 0 {
            return Err(untrusted(Untrusted::Writable(metadata.mode() & 0o7777)));
        }
        if ![0, rustix::process::geteuid().as_raw()].contains(&metadata.uid()) {
            return Err(untrusted(Untrusted::Owner(metadata.uid())));
        }
        let mut bytes = Vec::new();
        file.take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(unreadable)?;
        let too_long = bytes.len() as u64 > MAX_BYTES;
        let text = String::from_utf8(bytes).ok().filter(|_| !too_long).ok_or(untrusted(Untrusted::NotText))?;
        Config::parse(path, &text)
    }

    /// Reads and checks text; errors name `path`.
    ///
    /// # Errors
    /// [`ConfigError::Invalid`].
    pub fn parse(path: &Path, text: &str) -> Result<Config, ConfigError> {
        let wrong = |error: toml::de::Error| error::from_toml(path, text, &error);
        let config = Config { path: path.to_owned(), ..toml::from_str(text).map_err(wrong)? };
        let places: Places = toml::from_str(text).map_err(wrong)?;
        config.check(&places).map_err(|(span, message)| ConfigError::Invalid {
            path: path.to_owned(),
            position: error::position(text, span),
            message,
        })?;
        Ok(config)
    }

    /// A policy by its name.
    ///
    /// # Errors
    /// [`ConfigError::Missing`] with the nearest name.
    pub fn policy(&self, name: &str) -> Result<PolicySpec, ConfigError> {
        self.policies.get(name).cloned().ok_or_else(|| self.missing("policy", name, self.policies.keys().cloned()))
    }

    /// A job by its name.
    ///
    /// # Errors
    /// [`ConfigError::Missing`] with the nearest name.
    pub fn job(&self, name: &str) -> Result<&Job, ConfigError> {
        let found = self.jobs.iter().find(|job| job.name == name);
        found.ok_or_else(|| self.missing("job", name, self.jobs.iter().map(|job| job.name.clone())))
    }

    fn missing(&self, kind: &'static str, name: &str, known: impl Iterator<Item = String>) -> ConfigError {
        ConfigError::Missing { path: self.path.clone(), kind, name: name.to_owned(), known: known.collect() }
    }

    /// What the types alone do not say.
    fn check(&self, places: &Places) -> Result<(), (Option<Range<usize>>, String)> {
        for (name, spec) in &self.policies {
            if let Err(error) = Policy::compile(spec) {
                let rules = places.policy.get(name).map(|policy| &policy.rule);
                let span = rules.and_then(|rules| place(rules, error.rule().saturating_sub(1)));
                return Err((span, format!("policy '{name}', {}", crate::error::chain(&error))));
            }
        }
        let mut names = BTreeSet::new();
        for (at, job) in self.jobs.iter().enumerate() {
            let checked = self.check_job(job).and_then(|()| unique(&mut names, &job.name));
            checked.map_err(|message| (place(&places.job, at), format!("job '{}': {message}", job.name)))?;
        }
        let at_daemon = |message| (places.daemon.as_ref().map(Spanned::span), message);
        self.daemon.check().map_err(at_daemon)?;
        self.audit.check().map_err(|message| (places.audit.as_ref().map(Spanned::span), message))?;
        let mut names = BTreeSet::new();
        let Some(serve) = &self.serve else { return Ok(()) };
        serve.check().map_err(|message| (places.serve.as_ref().map(Spanned::span), message))?;
        let users = places.serve.as_ref().map_or(&[][..], |serve| &serve.get_ref().user);
        for (at, user) in serve.users.iter().enumerate() {
            let checked = user.check().and_then(|()| self.known_policy(user.policy.as_deref()));
            let checked = checked.and_then(|()| unique(&mut names, &user.name));
            let name = &user.name;
            checked.map_err(|message| (place(users, at), format!("user '{name}': {message}")))?;
            for (number, key) in user.keys.iter().enumerate() {
                let keys = users.get(at).map_or(&[][..], |user| &user.get_ref().key);
                let checked = key.check().and_then(|()| self.known_policy(key.policy.as_deref()));
                let wrong = |message| format!("user '{name}', key {}: {message}", key.called());
                checked.map_err(|message| (place(keys, number), wrong(message)))?;
            }
        }
        Ok(())
    }

    fn check_job(&self, job: &Job) -> Result<(), String> {
        match job.remote_source() {
            None => absolute("source", &job.source)?,
            Some(source) if source.split('/').next().is_some_and(|host| host.contains(':')) => {
                if let Some(target) = job.targets.iter().find(|target| !target.starts_with('/')) {
                    return Err(format!(
                        "'{target}' is on another machine, and so is the source '{source}': one has to be here"
                    ));
                }
                if job.retain.is_some() {
                    return Err(format!("'retain' is for a source of this machine; '{source}' is on another one"));
                }
                if !job.append_only.is_empty() {
                    return Err(format!(
                        "'append_only' is for a source of this machine; '{source}' is on another one, which reads it"
                    ));
                }
                if job.watch == Watch::Events {
                    return Err(format!("'watch' cannot be 'events': the source '{source}' is on another machine"));
                }
                if let Ready::Layout(_) = job.ready {
                    return Err(format!(
                        "'ready' by a layout looks into files, and '{source}' is on another machine; name a marker, or push from \
                         there"
                    ));
                }
            }
            Some(_) => absolute("source", &job.source)?,
        }
        for (key, period) in [("rescan", job.rescan), ("poll", job.poll)] {
            if period.0.is_zero() {
                return Err(format!(
                    "'{key}' is how long to wait before the source is looked at again, and cannot be 0"
                ));
            }
        }
        if job.targets.is_empty() || job.targets.iter().any(String::is_empty) {
            return Err("'targets' needs at least one [USER@]HOST:PATH, and none that is empty".into());
        }
        // A name alone would be a directory of whatever the run happens to start in; most likely a host was meant.
        if let Some(target) = job.targets.iter().find(|target| !target.starts_with('/') && !target.contains(':')) {
            return Err(format!("the target '{target}' is neither [USER@]HOST:PATH nor a path that starts with '/'"));
        }
        if job.retain.is_some() && job.unit.is_none() {
            return Err("'retain' counts units: say with 'unit' what they are, as unit = 'checkpoint-*/'".into());
        }
        if job.trash_keep.is_some() && job.delete != Delete::Trash {
            return Err("'trash_keep' is for delete = 'trash': without it nothing is put into the trash".into());
        }
        if let Some(nice) = job.nice.filter(|nice| !(-20..=19).contains(nice)) {
            return Err(format!("'nice' is {nice}, and has to be from -20 to 19"));
        }
        if let Some(connections) = job.connections.filter(|connections| !(1..=64).contains(connections)) {
            return Err(format!("'connections' is {connections}, and has to be from 1 to 64"));
        }
        if let Some(target) =
            job.targets.iter().find(|target| job.remote_source().is_none() && is_nested(&job.source, target))
        {
            return Err(format!(
                "the source '{}' and the target '{target}' are one directory, or lie in each other: what arrives would be sent \
                 again",
                crate::error::shown(&job.source)
            ));
        }
        if let Some(quorum) = job.quorum.filter(|&quorum| quorum == 0 || quorum > job.targets.len()) {
            return Err(format!(
                "'quorum' is {quorum}, and has to be from 1 to the number of targets, {}",
                job.targets.len()
            ));
        }
        for (field, command) in [("on_published", &job.on_published), ("on_failed", &job.on_failed)] {
            if command.first().is_some_and(|program| !program.starts_with('/')) {
                return Err(format!("'{field}' has to begin with the whole path of a program: no shell looks for it"));
            }
        }
        for (field, lines) in [("exclude", &job.exclude), ("last", &job.last), ("append_only", &job.append_only)] {
            globs(field, lines)?;
        }
        if let Some(unit) = &job.unit {
            globs("unit", std::slice::from_ref(unit))?;
        }
        self.known_policy(job.policy.as_deref())
    }

    fn known_policy(&self, name: Option<&str>) -> Result<(), String> {
        let Some(name) = name.filter(|&name| !self.policies.contains_key(name)) else { return Ok(()) };
        let known: Vec<String> = self.policies.keys().cloned().collect();
        Err(format!("there is no policy '{name}'{}", meant(name, &known)))
    }
}

fn place<T>(places: &[Spanned<T>], at: usize) -> Option<Range<usize>> {
    places.get(at).map(Spanned::span)
}

fn unique<'a>(names: &mut BTreeSet<&'a str>, name: &'a str) -> Result<(), String> {
    if name.is_empty() {
        return Err("the name is empty".into());
    }
    if names.insert(name) { Ok(()) } else { Err("the name is taken by an earlier one".into()) }
}

/// Whether a target of this machine is the source, lies in it or holds it; links are followed as far as they are there.
fn is_nested(source: &Path, target: &str) -> bool {
    let stop = |path: &Path| crate::staging::stop_at(path, path);
    target.starts_with('/') && stop(Path::new(target)).touches(&stop(source))
}

fn absolute(field: &str, path: &Path) -> Result<(), String> {
    let shown = crate::error::shown(path);
    if path.is_absolute() { Ok(()) } else { Err(format!("'{field}' is '{shown}', but must start with '/'")) }
}

fn globs(field: &str, lines: &[String]) -> Result<(), String> {
    let compiled = Filter::compile(&FilterSpec { rules: lines.to_vec(), only: None });
    compiled.map(drop).map_err(|error| format!("'{field}': {}", crate::error::chain(&error)))
}

#[cfg(test)]
mod tests;
