//! `lockstep audit`: the record of what was published at a root.

use std::collections::VecDeque;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use serde_json::Value;

use super::{Failure, output, shown};
use crate::audit;
use crate::error::{Escaped, Exit, counted};
use crate::path::RelPath;
use crate::root::{Follow, Root};

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Check that no line was changed, removed or put in
    ///
    /// Each line carries the hash of the one before it. The last hash is printed: keep it elsewhere, and compare, to
    /// notice even a log that was written anew as a whole.
    Verify {
        /// The directory that is published to
        directory: PathBuf,
    },
    /// Print the record: when, what was done to which path, what it got, who did it, from where
    ///
    /// Then the record is checked as by 'audit verify'; the exit code is 1 when it was tampered with.
    Show(Show),
}

#[derive(Debug, Args)]
pub(super) struct Show {
    /// The directory that is published to
    directory: PathBuf,
    /// Only this path, written as it is printed, and what lies below it
    #[arg(long, value_name = "PATH")]
    path: Option<String>,
    /// Only the last N lines that are asked for
    #[arg(short = 'n', long, value_name = "N")]
    last: Option<usize>,
    /// The lines as they are kept, one JSON object each
    #[arg(long)]
    json: bool,
}

impl Command {
    pub(super) fn run(self) -> Result<Exit, Failure> {
        match self {
            Command::Verify { directory } => {
                let head = verify(&directory)?;
                let (directory, hash) = (shown(&directory), head.hash);
                let lines = counted(head.lines, "line", "lines");
                output(format!("{directory}: {lines}, unbroken; the last is {hash}\n").as_bytes())?;
                Ok(Exit::Done)
            }
            Command::Show(show) => show.run(),
        }
    }
}

/// A log that is not there proves nothing.
fn verify(directory: &Path) -> Result<audit::Head, Failure> {
    let head = audit::verify(&Root::open(directory)?)?;
    if head.lines > 0 {
        return Ok(head);
    }
    let message = "has no audit log: nothing was published there, or all of it was removed; check the path";
    Err(Failure::bad_data(format!("'{}' {message}", shown(directory))))
}

impl Show {
    fn run(self) -> Result<Exit, Failure> {
        let at = self.directory.join(audit::LOG);
        let log = RelPath::new(audit::LOG).map_err(|error| Failure::usage(error.to_string()))?;
        let mut found: VecDeque<String> = VecDeque::new();
        match Root::open(&self.directory)?.open_read(&log, Follow::Never) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(error.into()),
            Ok(file) => {
                for line in BufReader::new(file).split(b'\n') {
                    let line = line.map_err(Failure::io("read", &at))?;
                    found.extend(self.shown(&line));
                    if self.last.is_some_and(|last| found.len() > last) {
                        found.pop_front();
                    }
                }
            }
        }
        let mut text: String = found.make_contiguous().join("\n");
        if !text.is_empty() {
            text.push('\n');
        }
        output(text.as_bytes())?;
        verify(&self.directory)?;
        Ok(Exit::Done)
    }

    /// A line of the log as it is to be printed; `None` when it was not asked for.
    fn shown(&self, line: &[u8]) -> Option<String> {
        // A line that cannot be read is shown as it is; the check names it.
        let Ok(record) = serde_json::from_slice::<Value>(line) else { return Some(Escaped(line).to_string()) };
        // Names are escaped when the line is made. What was put in later may not be; backslashes are not doubled again.
        let safe = |text: &str| Escaped(text.as_bytes()).to_string().replace(r"\\", r"\");
        let field = |name: &str| record[name].as_str().map(safe);
        if let Some(wanted) = self.path.as_deref().map(|path| path.trim_end_matches('/')) {
            let path = record["path"].as_str()?;
            let below = path.strip_prefix(wanted).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
            if !below {
                return None;
            }
        }
        if self.json {
            return Some(String::from_utf8_lossy(line).into_owned());
        }
        let named = ["time", "action", "path"].map(|name| field(name).unwrap_or_else(|| "-".to_owned()));
        // Of a login there is no path.
        let mut text = named.into_iter().filter(|word| !word.is_empty()).collect::<Vec<_>>().join(" ");
        if let Some(size) = record["size"].as_u64() {
            text += &format!(" {size} bytes");
        }
        // Of what was moved it says where it is.
        let because = if record["action"] == "trash" { "" } else { "because: " };
        for (name, before) in [("sha256", "sha256:"), ("mode", "mode "), ("acl", "acl "), ("reason", because)] {
            text += &field(name).map_or_else(String::new, |value| format!(" {before}{value}"));
        }
        if let (Some(owner), Some(group)) = (field("owner"), field("group")) {
            text += &format!(" {owner}:{group}");
        }
        for (name, before) in [("actor", "by"), ("source", "from")] {
            let value = field(name).filter(|value| !value.is_empty());
            text += &value.map_or_else(String::new, |value| format!(" {before} {value}"));
        }
        Some(text)
    }
}
