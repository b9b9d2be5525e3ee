//! `lockstep audit show`: lines as people read them.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use super::{Escaped, Event, Exit, Failure, Query, Wanted, audit, output, verified};
use crate::audit::Outcome;
use crate::root::Root;

/// How often somebody who follows looks for more.
const PERIOD: Duration = Duration::from_millis(250);

#[derive(Debug, Args)]
pub(in crate::cli) struct Show {
    /// The directory that is published to; of a server that of its 'audit'; of a daemon that of its state
    directory: PathBuf,
    #[command(flatten)]
    wanted: Wanted,
    /// Only the last N lines that are asked for
    #[arg(short = 'n', long, value_name = "N")]
    last: Option<usize>,
    /// The lines as they are kept, one JSON object each
    #[arg(long)]
    json: bool,
    /// Go on printing what is added, until Ctrl-C; nothing is checked
    #[arg(short, long)]
    follow: bool,
}

impl Show {
    pub(super) fn run(self) -> Result<Exit, Failure> {
        let (root, query) = (Root::open(&self.directory)?, self.wanted.query());
        let mut found: VecDeque<String> = VecDeque::new();
        let mut seen = 0;
        audit::raw(&root, &mut |line| {
            seen = Event::parse(line).map_or(seen, |event| event.sequence.max(seen));
            found.extend(self.shown(line, &query));
            if self.last.is_some_and(|last| found.len() > last) {
                found.pop_front();
            }
        })?;
        let mut text: String = found.make_contiguous().join("\n");
        if !text.is_empty() {
            text.push('\n');
        }
        output(text.as_bytes())?;
        if self.follow {
            return self.follow(&root, &query, seen);
        }
        verified(&self.directory)?;
        Ok(Exit::Done)
    }

    /// Looks again when the log has changed. Who reads a pipe and has gone ends it.
    fn follow(&self, root: &Root, query: &Query, mut seen: u64) -> Result<Exit, Failure> {
        let mut before = None;
        loop {
            std::thread::sleep(PERIOD);
            let now = audit::state(root)?;
            if before.replace(now) == Some(now) {
                continue;
            }
            let mut text = String::new();
            audit::raw(root, &mut |line| {
                let Some(event) = Event::parse(line).filter(|event| event.sequence > seen) else { return };
                seen = event.sequence;
                if let Some(shown) = self.shown(line, query) {
                    text.push_str(&shown);
                    text.push('\n');
                }
            })?;
            let written = std::io::Write::write_all(&mut std::io::stdout(), text.as_bytes());
            if written.and_then(|()| std::io::Write::flush(&mut std::io::stdout())).is_err() {
                return Ok(Exit::Done);
            }
        }
    }

    /// A line of the log as it is to be printed; `None` when it was not asked for.
    fn shown(&self, line: &[u8], query: &Query) -> Option<String> {
        // A line that cannot be read is shown as it is; the check names it.
        let Some(event) = Event::parse(line) else { return Some(Escaped(line).to_string()) };
        if !query.admits(&event) {
            return None;
        }
        if self.json {
            return Some(String::from_utf8_lossy(line).into_owned());
        }
        Some(in_words(&event))
    }
}

/// A line as a sentence.
fn in_words(event: &Event) -> String {
    // Names are escaped when the line is made. What was put in later may not be; backslashes are not doubled again.
    let safe = |text: &str| Escaped(text.as_bytes()).to_string().replace(r"\\", r"\");
    let some = |text: &Option<String>| text.as_deref().filter(|text| !text.is_empty()).map(safe);
    let or = |text: &str| if text.is_empty() { "-".to_owned() } else { safe(text) };
    let mut text = format!("{} {}", or(&event.time), or(&event.action));
    let mut add = |before: &str, value: Option<String>| {
        text += &value.map_or_else(String::new, |value| format!(" {before}{value}"));
    };
    add("", some(&event.path));
    add("", event.size.map(|size| format!("{size} bytes")));
    add("generation ", event.generation.filter(|_| event.action == "check").map(|number| number.to_string()));
    // Of what was moved or checked it says where it is, and what was found.
    let told = ["refuse", "metadata", "quarantine", "publish", "remove", "repair"];
    let because = if told.contains(&event.action.as_str()) { "because: " } else { "" };
    add("sha256:", some(&event.sha256));
    add("mode ", some(&event.mode));
    add("acl ", some(&event.acl));
    add(because, some(&event.reason));
    if let (Some(owner), Some(group)) = (some(&event.owner), some(&event.group)) {
        add("", Some(format!("{owner}:{group}")));
    }
    let was = [&event.mode_before, &event.owner_before, &event.group_before].map(some);
    if let [Some(mode), Some(owner), Some(group)] = was {
        let now = [&event.mode, &event.owner, &event.group].map(some);
        if now != [Some(mode.clone()), Some(owner.clone()), Some(group.clone())] {
            add("(before: ", Some(format!("{mode} {owner}:{group})")));
        }
    }
    add("head ", some(&event.head).filter(|_| event.action == "head"));
    add("", (event.result == Some(Outcome::Failure) && event.action != "refuse").then(|| "failed".to_owned()));
    add("by ", some(&event.actor));
    add("from ", some(&event.source));
    text
}
