//! `lockstep policy`: what the rules decide.

use std::ffi::OsString;
use std::fmt::Write as _;
use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::{Failure, output, shown};
use crate::error::{Escaped, Exit, chain};
use crate::path::RelPath;
use crate::policy::{Policy, PolicySpec};

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Say which mode, owner and group a path gets, and which rule decides it
    ///
    /// The path need not exist. The last rule that matches wins; where none matches, a path keeps the sender's mode
    /// without the set-user-ID, set-group-ID and sticky bits.
    Explain(Explain),
}

impl Command {
    pub(super) fn run(self) -> Result<Exit, Failure> {
        let Command::Explain(explain) = self;
        explain.run()
    }
}

#[derive(Debug, Args)]
pub(super) struct Explain {
    /// The path, relative to the root; with a trailing slash for a directory
    path: OsString,
    /// A TOML file with one [[rule]] table for each rule
    #[arg(long, value_name = "FILE")]
    policy_file: PathBuf,
    /// The path is a directory
    #[arg(long)]
    directory: bool,
    /// The mode that the path has at the sender, in octal [default: 644, for a directory 755]
    #[arg(long, value_name = "MODE", value_parser = octal)]
    asked: Option<u32>,
}

fn octal(text: &str) -> Result<u32, String> {
    match u32::from_str_radix(text, 8) {
        Ok(mode) if mode <= 0o7777 => Ok(mode),
        _ => Err("an octal mode has digits 0 to 7 and is at most 7777".into()),
    }
}

impl Explain {
    fn run(self) -> Result<Exit, Failure> {
        let spec = self.spec()?;
        let file = shown(&self.policy_file);
        let policy = Policy::compile(&spec).map_err(|error| Failure::usage(format!("'{file}': {}", chain(&error))))?;
        let bytes = self.path.as_encoded_bytes();
        let bytes = bytes.strip_prefix(b"./").unwrap_or(bytes);
        let (bytes, slash) = bytes.strip_suffix(b"/").map_or((bytes, false), |bytes| (bytes, true));
        let path = RelPath::new(bytes)
            .map_err(|error| Failure::usage(format!("{error}; give it relative to the root of the tree")))?;
        let directory = self.directory || slash;
        let asked = self.asked.unwrap_or(if directory { 0o755 } else { 0o644 });
        let decision = policy.decide(&path, directory, asked);

        let mut text = String::new();
        let kind = if directory { "directory" } else { "file" };
        let _ = writeln!(text, "{path} ({kind}, {asked:04o} at the sender)");
        let _ = writeln!(text, "  mode   {:04o}", decision.mode);
        for (field, name) in [("owner", &decision.owner), ("group", &decision.group)] {
            let name = Escaped(name.as_deref().unwrap_or("that of the receiver").as_bytes());
            let _ = writeln!(text, "  {field}  {name}");
        }
        match decision.rule.and_then(|at| Some((at + 1, spec.rules.get(at)?))) {
            None => text.push_str("No rule matches: the sender's mode without special bits.\n"),
            Some((number, rule)) => {
                let _ = writeln!(text, "Decided by rule {number} of {}, the last that matches:", spec.rules.len());
                let rule = toml::to_string(rule).unwrap_or_else(|_| format!("match = '{}'", rule.pattern));
                rule.lines().for_each(|line| {
                    let _ = writeln!(text, "  {line}");
                });
            }
        }
        output(text.as_bytes())?;
        Ok(Exit::Done)
    }

    fn spec(&self) -> Result<PolicySpec, Failure> {
        let text = std::fs::read_to_string(&self.policy_file).map_err(|error| {
            let file = shown(&self.policy_file);
            Failure::usage(format!("reading '{file}': {error}; name the file of rules with --policy-file"))
        })?;
        toml::from_str(&text).map_err(|error| {
            let at = error.span().map_or(0, |span| span.start.min(text.len()));
            let line = 1 + text.as_bytes()[..at].iter().filter(|&&byte| byte == b'\n').count();
            Failure::usage(format!(
                "'{}', line {line}: {}",
                shown(&self.policy_file),
                Escaped(error.message().as_bytes())
            ))
        })
    }
}
