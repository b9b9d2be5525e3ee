//! Where the rules come from: a file of their own, or a named policy of the configuration.

use std::path::{Path, PathBuf};

use clap::Args;
use serde::Deserialize;
use serde::de::IgnoredAny;
use toml::Spanned;

use crate::cli::{Failure, shown};
use crate::config::{Config, DEFAULT_PATH};
use crate::error::{Escaped, chain};
use crate::policy::{Policy, PolicySpec};

#[derive(Debug, Args)]
pub(super) struct Rules {
    /// A TOML file with one [[rule]] table for each rule
    #[arg(long, value_name = "FILE", conflicts_with_all = ["policy", "config"])]
    policy_file: Option<PathBuf>,
    /// A named policy of the configuration
    #[arg(long, value_name = "NAME")]
    policy: Option<String>,
    /// The configuration [default: $LOCKSTEP_CONFIG, or /etc/lockstep/config.toml]
    #[arg(long, value_name = "FILE", requires = "policy")]
    config: Option<PathBuf>,
}

/// Rules that were read and compiled.
pub(in crate::cli) struct Loaded {
    pub(in crate::cli) spec: PolicySpec,
    pub(super) policy: Policy,
    file: PathBuf,
    /// The line of each rule, counted from 1.
    lines: Vec<usize>,
}

impl Rules {
    /// `None` when no rules were named.
    pub(super) fn load(&self) -> Result<Option<Loaded>, Failure> {
        match (&self.policy_file, &self.policy) {
            (Some(file), _) => own_file(file).map(Some),
            (None, Some(name)) => {
                let file = self.config.clone().or_else(|| std::env::var_os("LOCKSTEP_CONFIG").map(PathBuf::from));
                named(&file.unwrap_or_else(|| DEFAULT_PATH.into()), name).map(Some)
            }
            (None, None) => Ok(None),
        }
    }

    /// The same where there must be rules.
    pub(super) fn required(&self) -> Result<Loaded, Failure> {
        let missing = "name the rules: --policy-file FILE, or --policy NAME of the configuration";
        self.load()?.ok_or_else(|| Failure::usage(missing))
    }
}

impl Loaded {
    /// Where a rule, counted from 0, stands: `rule 2, rules.toml:5`.
    pub(super) fn place(&self, rule: usize) -> String {
        let line = self.lines.get(rule).map_or_else(String::new, |line| format!(":{line}"));
        format!("rule {}, {}{line}", rule + 1, shown(&self.file))
    }
}

#[derive(Deserialize)]
struct RulePlaces {
    #[serde(default)]
    rule: Vec<Spanned<IgnoredAny>>,
}

#[derive(Deserialize)]
struct ConfigPlaces {
    #[serde(default)]
    policy: std::collections::BTreeMap<String, RulePlaces>,
}

fn line(text: &str, at: usize) -> usize {
    1 + text.as_bytes()[..at.min(text.len())].iter().filter(|&&byte| byte == b'\n').count()
}

fn lines(text: &str, places: &[Spanned<IgnoredAny>]) -> Vec<usize> {
    places.iter().map(|place| line(text, place.span().start)).collect()
}

/// Reads and compiles a file of `[[rule]]` tables.
pub(in crate::cli) fn own_file(file: &Path) -> Result<Loaded, Failure> {
    let text = std::fs::read_to_string(file)
        .map_err(|error| Failure::usage(format!("cannot read the rules in '{}': {error}", shown(file))))?;
    of_text(file, &text)
}

/// The same of a file that nobody but root and whoever runs this can have written.
pub(in crate::cli) fn trusted_file(file: &Path) -> Result<Loaded, Failure> {
    let bytes = crate::trust::trusted_file::read(file).map_err(Failure::usage)?;
    let text = String::from_utf8(bytes).map_err(|_| Failure::usage(format!("'{}' is not UTF-8", shown(file))))?;
    of_text(file, &text)
}

fn of_text(file: &Path, text: &str) -> Result<Loaded, Failure> {
    let wrong = |error: toml::de::Error| {
        let line = line(text, error.span().map_or(0, |span| span.start));
        Failure::usage(format!("'{}', line {line}: {}", shown(file), Escaped(error.message().as_bytes())))
    };
    let spec: PolicySpec = toml::from_str(text).map_err(wrong)?;
    let places: RulePlaces = toml::from_str(text).map_err(wrong)?;
    let lines = lines(text, &places.rule);
    let policy = Policy::compile(&spec).map_err(|error| {
        let at = lines.get(error.rule().saturating_sub(1)).map_or_else(String::new, |line| format!(", line {line}"));
        Failure::usage(format!("'{}'{at}: {}", shown(file), chain(&error)))
    })?;
    Ok(Loaded { spec, policy, file: file.to_owned(), lines })
}

fn named(file: &Path, name: &str) -> Result<Loaded, Failure> {
    let usage = |error: &dyn std::error::Error| Failure::usage(chain(error));
    let spec = Config::load(file).and_then(|config| config.policy(name)).map_err(|error| usage(&error))?;
    let policy = Policy::compile(&spec).map_err(|error| usage(&error))?;
    // Only for messages: what was read above is what counts.
    let text = std::fs::read_to_string(file).unwrap_or_default();
    let places = toml::from_str::<ConfigPlaces>(&text).ok();
    let lines = places.and_then(|mut places| places.policy.remove(name)).map(|policy| lines(&text, &policy.rule));
    Ok(Loaded { spec, policy, file: file.to_owned(), lines: lines.unwrap_or_default() })
}
