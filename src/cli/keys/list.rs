//! `lockstep keys list`: what may connect to this machine's server, from where, and what it may do.

use std::path::PathBuf;

use super::super::{Failure, output, serve};
use crate::error::Exit;
use crate::server::roster::{self, Roster, Row, Way};

/// Shows what may connect to the server here.
#[derive(Debug, clap::Args)]
pub(in crate::cli) struct List {
    /// The configuration with [serve] and its users [default: $LOCKSTEP_CONFIG, or /etc/lockstep/config.toml]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Only this user
    #[arg(value_name = "USER")]
    user: Option<String>,
    /// Show all of it as JSON
    #[arg(long)]
    json: bool,
}

impl List {
    pub(in crate::cli) fn run(self) -> Result<Exit, Failure> {
        let (config, _) = serve::read(&self.config.unwrap_or_else(serve::default_path))?;
        let mut roster = roster::read(&config);
        if let Some(wanted) = &self.user {
            if !config.users.iter().any(|user| crate::config::is_called(&user.name, wanted)) {
                let known: Vec<String> = config.users.iter().map(|user| user.name.clone()).collect();
                let shown = crate::error::Escaped(wanted.as_bytes());
                return Err(Failure::usage(format!(
                    "there is no user '{shown}'{}",
                    crate::config::meant(wanted, &known)
                )));
            }
            roster.rows.retain(|row| crate::config::is_called(&row.user, wanted));
        }
        let text = match self.json {
            true => serde_json::to_string_pretty(&roster).unwrap_or_default() + "\n",
            false => table(&roster),
        };
        output(text.as_bytes())?;
        roster.problems.iter().for_each(|problem| eprintln!("lockstep: {problem}"));
        Ok(if roster.problems.is_empty() { Exit::Done } else { Exit::Incomplete })
    }
}

const HEAD: [&str; 8] = ["USER", "BY", "KEY", "FROM", "ROOT", "RIGHTS", "EXPIRES", "STATE"];

fn cells(row: &Row) -> [String; 8] {
    let or = |text: String, other: &str| if text.is_empty() { other.to_owned() } else { text };
    let by = match row.way {
        Way::Key => "key".to_owned(),
        Way::Authority => format!("certificate for {}", row.principals.join(" or ")),
        Way::Principal => format!("principal {}", row.principals.join(" or ")),
    };
    let key = [row.fingerprint.clone().unwrap_or_default(), row.comment.clone()];
    let key = key.into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join(" ");
    [
        row.user.clone(),
        by,
        or(key, "-"),
        or(row.from.join(" and "), "anywhere"),
        row.root.clone(),
        row.rights.to_string(),
        row.expires.clone().unwrap_or_else(|| "never".into()),
        row.refused.clone().map_or_else(|| "good".into(), |reason| format!("refused: {reason}")),
    ]
}

fn table(roster: &Roster) -> String {
    let rows: Vec<[String; 8]> = roster.rows.iter().map(cells).collect();
    let mut widths = HEAD.map(str::len);
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(unicode_width::UnicodeWidthStr::width(cell.as_str()));
        }
    }
    let mut text = String::new();
    for (list, name) in [(&roster.allow, "allow"), (&roster.deny, "deny")] {
        if !list.is_empty() {
            text.push_str(&format!("{name}: {}\n", list.join(", ")));
        }
    }
    for row in std::iter::once(HEAD.map(str::to_owned)).chain(rows) {
        let mut line = String::new();
        for (width, cell) in widths.iter().zip(&row) {
            let pad = width - unicode_width::UnicodeWidthStr::width(cell.as_str());
            line.push_str(&format!("{cell}{}  ", " ".repeat(pad)));
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}
