//! `lockstep history`: what a daemon published, and what failed. It reads the files; no daemon has to run.

use std::fmt::Write as _;
use std::path::PathBuf;

use chrono::{DateTime, Local, NaiveDate, NaiveDateTime, TimeZone as _};
use indicatif::BinaryBytes;

use super::transfer::load_config;
use super::{Failure, daemon, output};
use crate::config::Period;
use crate::daemon::history::{self, Filter};
use crate::daemon::status::Publication;
use crate::error::{Escaped, Exit, counted, said};

/// Show what the daemon published, and what failed, the newest last
///
/// It is kept in the daemon's state directory, some tens of thousands of lines of it, and needs no daemon that runs.
#[derive(Debug, clap::Args)]
pub(super) struct History {
    /// Only of this job
    #[arg(long, value_name = "NAME")]
    job: Option<String>,
    /// Only to this target, as the configuration names it
    #[arg(long, value_name = "TARGET")]
    target: Option<String>,
    /// Only what is not older: a length of time as 30m, 12h or 7d, or a date by the clock of this machine, as
    /// 2026-01-31 or '2026-01-31 14:30'
    #[arg(long, value_name = "WHEN", value_parser = since)]
    since: Option<Since>,
    /// Only the last N; 0 for all
    #[arg(short = 'n', long = "last", value_name = "N", default_value_t = 50)]
    last: usize,
    /// One JSON object a line, as they are kept
    #[arg(long)]
    json: bool,
    /// The state directory of the daemon [default: that of the configuration]
    #[arg(long, value_name = "DIR")]
    state: Option<PathBuf>,
    /// The configuration that names it [default: $LOCKSTEP_CONFIG, or /etc/lockstep/config.toml]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

/// Seconds since 1970.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Since(u64);

fn since(text: &str) -> Result<Since, String> {
    let now = Local::now();
    let at = if let Ok(period) = text.parse::<Period>() {
        Some(now.to_utc() - period.0)
    } else if let Ok(time) = DateTime::parse_from_rfc3339(text) {
        Some(time.to_utc())
    } else {
        let day = NaiveDate::parse_from_str(text, "%Y-%m-%d").ok().and_then(|day| day.and_hms_opt(0, 0, 0));
        let minute = || NaiveDateTime::parse_from_str(text, "%Y-%m-%d %H:%M").ok();
        // An hour that a change of clocks left out has no time of its own.
        day.or_else(minute).and_then(|time| Local.from_local_datetime(&time).earliest()).map(|time| time.to_utc())
    };
    let at = at.ok_or("write it as '30m', '12h', '7d', '2026-01-31' or '2026-01-31 14:30'")?;
    Ok(Since(u64::try_from(at.timestamp()).unwrap_or(0)))
}

impl History {
    pub(super) fn run(self) -> Result<Exit, Failure> {
        let state = match self.state {
            Some(state) => state,
            None => daemon::state_of(&load_config(self.config.as_deref())?)?,
        };
        let filter = Filter {
            job: self.job,
            target: self.target,
            since: self.since.map(|since| since.0),
            limit: (self.last > 0).then_some(self.last),
        };
        let path = state.join(history::FILE);
        let found = history::publications(&state, &filter).map_err(Failure::io("read", &path))?;
        let mut text = String::new();
        for publication in &found {
            if self.json {
                let line = serde_json::to_string(publication);
                text += &line.map_err(|error| Failure::Plain { exit: Exit::Io, message: error.to_string() })?;
            } else {
                text += &line(publication);
            }
            text.push('\n');
        }
        if found.is_empty() && !self.json {
            eprintln!("lockstep: nothing of that is in '{}'", super::shown(&path));
        }
        output(text.as_bytes()).map(|()| Exit::Done)
    }
}

fn line(publication: &Publication) -> String {
    let time = i64::try_from(publication.time).ok().and_then(|time| Local.timestamp_opt(time, 0).single());
    let time = time.unwrap_or_default().format("%Y-%m-%d %H:%M:%S");
    let name = |text: &str| Escaped(text.as_bytes()).to_string();
    let mut text = format!("{time}  {} -> {}: ", name(&publication.job), name(&publication.target));
    // Writing to a String never fails.
    let _ = match &publication.error {
        Some(error) => write!(text, "failed: {}", said(error.as_bytes())),
        None => write!(
            text,
            "{}, {} in {:.1} s{}",
            counted(publication.files, "path", "paths"),
            BinaryBytes(publication.bytes),
            publication.milliseconds as f64 / 1000.0,
            publication.generation.map_or_else(String::new, |generation| format!(", generation {generation}")),
        ),
    };
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_is_a_length_or_a_date() {
        let now = u64::try_from(Local::now().timestamp()).unwrap();
        assert!(now - since("2h").unwrap().0 >= 7200);
        assert_eq!(since("2026-01-31T00:00:00Z"), Ok(Since(1_769_817_600)));
        assert!(since("2026-01-31").unwrap().0 < since("2026-01-31 14:30").unwrap().0);
        for wrong in ["", "yesterday", "2026-13-01", "12", "2026-01-31 25:00"] {
            assert!(since(wrong).is_err(), "{wrong}");
        }
    }
}
