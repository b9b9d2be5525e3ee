//! `lockstep policy explain`: which rule decides about a path, and what it gets.

use std::ffi::OsString;
use std::fmt::Write as _;

use clap::Args;

use super::rules::Rules;
use crate::cli::{Failure, output};
use crate::error::{Escaped, Exit};
use crate::path::RelPath;

#[derive(Debug, Args)]
pub(in crate::cli) struct Explain {
    /// The path, relative to the root; with a trailing slash for a directory
    path: OsString,
    #[command(flatten)]
    rules: Rules,
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
    pub(in crate::cli) fn run(self) -> Result<Exit, Failure> {
        let loaded = self.rules.required()?;
        let bytes = self.path.as_encoded_bytes();
        let bytes = bytes.strip_prefix(b"./").unwrap_or(bytes);
        let (bytes, slash) = bytes.strip_suffix(b"/").map_or((bytes, false), |bytes| (bytes, true));
        let path = RelPath::new(bytes)
            .map_err(|error| Failure::usage(format!("{error}; give it relative to the root of the tree")))?;
        let directory = self.directory || slash;
        let asked = self.asked.unwrap_or(if directory { 0o755 } else { 0o644 });
        let explained = loaded.policy.explain(&path, directory, asked);
        let decision = &explained.decision;

        let mut text = String::new();
        let kind = if directory { "directory" } else { "file" };
        let _ = writeln!(text, "{path} ({kind}, {asked:04o} at the sender)");
        let _ = writeln!(text, "  mode   {:04o}", decision.mode);
        for (field, name) in [("owner", &decision.owner), ("group", &decision.group)] {
            let name = Escaped(name.as_deref().unwrap_or("that of the receiver").as_bytes());
            let _ = writeln!(text, "  {field}  {name}");
        }
        let acl = decision.acl.as_ref().filter(|acl| !acl.is_empty());
        let entries = acl.map_or_else(|| "none".to_owned(), ToString::to_string);
        let _ = writeln!(text, "  acl    {}", Escaped(entries.as_bytes()));
        if let Some(entry) = acl.and_then(|acl| acl.cut_by(decision.mode, directory)) {
            let entry = Escaped(entry.as_bytes());
            let _ = writeln!(text, "         the mode's group digit, which is the mask, cuts {entry} down");
        }
        if !directory && decision.executable() {
            let _ = writeln!(text, "  it may be executed, once what lies on the disk is verified");
        }
        for withheld in &decision.withheld {
            let _ = writeln!(text, "  not given: {withheld}");
        }
        match explained.deciding.as_ref().and_then(|&(at, _)| Some((at, loaded.spec.rules.get(at)?))) {
            None => text.push_str("No rule matches: the sender's mode without special bits.\n"),
            Some((at, rule)) => {
                let count = loaded.spec.rules.len();
                let _ = writeln!(
                    text,
                    "Decided by rule {} of {count}, the last that matches ({}):",
                    at + 1,
                    loaded.place(at)
                );
                let rule = toml::to_string(rule).unwrap_or_else(|_| format!("match = '{}'", rule.pattern));
                rule.lines().for_each(|line| {
                    let _ = writeln!(text, "  {}", Escaped(line.as_bytes()));
                });
            }
        }
        for (at, pattern) in &explained.overridden {
            let _ = writeln!(
                text,
                "'{}' matches too, but comes earlier ({}).",
                Escaped(pattern.as_bytes()),
                loaded.place(*at)
            );
        }
        output(text.as_bytes())?;
        Ok(Exit::Done)
    }
}
