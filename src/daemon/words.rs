//! What a status means to whoever looks at it: how bad it is, in words, with what to do. The terminal and the page say the same.

use std::fmt::Write as _;

use indicatif::BinaryBytes;

use super::status::{JobStatus, State, Status, TargetStatus};
use crate::error::{Escaped, counted, said};

/// How a target stands, the worst first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// Nothing is tried until a person does something.
    Halted,
    /// The last try failed.
    Failing,
    /// A person wanted it to wait.
    Paused,
    /// Something is on its way, or soon will be.
    Working,
    /// Nothing is missing there.
    InStep,
}

impl Level {
    /// Every level, the worst first.
    pub const ALL: [Level; 5] = [Level::Halted, Level::Failing, Level::Paused, Level::Working, Level::InStep];

    /// In a word or two.
    pub fn name(self) -> &'static str {
        match self {
            Level::Halted => "halted",
            Level::Failing => "failing",
            Level::Paused => "paused",
            Level::Working => "working",
            Level::InStep => "in step",
        }
    }

    /// Whether somebody has to be told.
    pub fn is_bad(self) -> bool {
        matches!(self, Level::Halted | Level::Failing)
    }
}

/// How a target of a job stands.
pub fn level(job: &JobStatus, target: &TargetStatus) -> Level {
    if job.halted.is_some() || target.state == State::Halted {
        return Level::Halted;
    }
    if target.last_error.is_some() || target.state == State::Retrying {
        return Level::Failing;
    }
    match target.state {
        State::Paused => Level::Paused,
        State::Idle if target.lag_units == 0 && target.lag_seconds == 0 => Level::InStep,
        _ => Level::Working,
    }
}

/// Something that a person should look at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attention {
    /// How bad it is.
    pub level: Level,
    /// The job; none where the whole daemon is meant.
    pub job: Option<String>,
    /// The target; none where the whole job is meant.
    pub target: Option<String>,
    /// How far it is behind and since when.
    pub behind: Option<String>,
    /// Why.
    pub why: String,
    /// What to do.
    pub hint: Option<String>,
    /// When it is tried again.
    pub next: Option<String>,
}

/// All that a person should look at, the worst and what waits longest first. Names and messages are made safe to print.
pub fn attention(status: &Status) -> Vec<Attention> {
    let mut found = Vec::new();
    for job in &status.jobs {
        let name = Some(name(&job.name));
        if let Some(halted) = &job.halted {
            found.push((
                u64::MAX,
                Attention {
                    level: Level::Halted,
                    job: name.clone(),
                    target: None,
                    behind: Some(format!("nothing was sent for {}", span(status.now.saturating_sub(halted.time)))),
                    why: said(halted.message.as_bytes()),
                    hint: halted.hint.as_ref().map(|hint| said(hint.as_bytes())),
                    next: None,
                },
            ));
        }
        for target in &job.targets {
            let level = level(job, target);
            // What is wrong with the whole job was said once.
            if level.is_bad() && (job.halted.is_none() || target.last_error.is_some()) {
                found.push((target.lag_seconds, of_target(status.now, level, name.clone(), target)));
            }
        }
    }
    found.sort_by(|(a, first), (b, second)| first.level.cmp(&second.level).then(b.cmp(a)));
    let mut all = Vec::with_capacity(found.len() + 1);
    if let Some(error) = &status.config_error {
        all.push(Attention {
            level: Level::Failing,
            job: None,
            target: None,
            behind: None,
            why: format!("the configuration of before stays in force: {}", said(error.as_bytes())),
            hint: Some("put the configuration right, then 'lockstep jobs reload'".to_owned()),
            next: None,
        });
    }
    all.extend(found.into_iter().map(|(_, attention)| attention));
    all
}

fn of_target(now: u64, level: Level, job: Option<String>, target: &TargetStatus) -> Attention {
    let mut behind = behind(target).unwrap_or_default();
    let after = if behind.is_empty() { "" } else { "; " };
    let _ = match target.last_success {
        Some(time) => write!(behind, "{after}last success {}", age(now, time)),
        None => write!(behind, "{after}no success since the daemon was started"),
    };
    let why = target.last_error.as_ref().map_or_else(
        || "the last try failed".to_owned(),
        |error| {
            let times = match error.times {
                0 | 1 => format!("failed {}", age(now, error.time)),
                times => format!("failed {times} times, the last {}", age(now, error.time)),
            };
            format!("{times}: {}", said(error.message.as_bytes()))
        },
    );
    let hint = target.last_error.as_ref().and_then(|error| error.hint.as_ref()).map(|hint| said(hint.as_bytes()));
    let next = target.next_try.map(|time| match time.saturating_sub(now) {
        0 => "tried again now".to_owned(),
        seconds => format!("tried again in {}; 'lockstep jobs now' does it at once", span(seconds)),
    });
    Attention { level, job, target: Some(name(&target.target)), behind: Some(behind), why, hint, next }
}

/// How far a target is behind, as `behind by 3 units, 1.20 GiB, for 2 hours`; none where it is in step.
pub fn behind(target: &TargetStatus) -> Option<String> {
    if target.lag_units == 0 && target.lag_bytes == 0 && target.lag_seconds == 0 {
        return None;
    }
    let mut text = "behind".to_owned();
    if target.lag_units > 0 {
        let _ = write!(text, " by {}", counted(target.lag_units, "unit", "units"));
    }
    if target.lag_bytes > 0 {
        let _ = write!(text, "{} {}", if target.lag_units > 0 { "," } else { " by" }, BinaryBytes(target.lag_bytes));
    }
    let _ = write!(text, "{} for {}", if text == "behind" { "" } else { "," }, span(target.lag_seconds));
    Some(text)
}

/// `2 targets failing, 3 working, 195 in step`: how many stand how, the worst first.
pub fn counts(status: &Status) -> Vec<(Level, usize)> {
    let levels: Vec<Level> =
        status.jobs.iter().flat_map(|job| job.targets.iter().map(|target| level(job, target))).collect();
    let count = |wanted| levels.iter().filter(|&&level| level == wanted).count();
    Level::ALL.into_iter().map(|level| (level, count(level))).filter(|&(_, count)| count > 0).collect()
}

/// A name of whoever wrote the configuration, made safe to print and of bounded length.
pub fn name(text: &str) -> String {
    Escaped(text.as_bytes()).to_string()
}

/// A length of time in one unit, as `45 seconds`, `3 hours`.
pub fn span(seconds: u64) -> String {
    match seconds {
        0..120 => counted(seconds, "second", "seconds"),
        120..7200 => counted(seconds / 60, "minute", "minutes"),
        7200..172_800 => counted(seconds / 3600, "hour", "hours"),
        _ => counted(seconds / 86_400, "day", "days"),
    }
}

/// The same in a column: `45s`, `3h`.
pub fn short(seconds: u64) -> String {
    match seconds {
        0..120 => format!("{seconds}s"),
        120..7200 => format!("{}m", seconds / 60),
        7200..172_800 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86_400),
    }
}

/// How long ago something was: `3 hours ago`, `just now`.
pub fn age(now: u64, then: u64) -> String {
    match now.saturating_sub(then) {
        0 => "just now".to_owned(),
        seconds => format!("{} ago", span(seconds)),
    }
}

#[cfg(test)]
mod tests {
    use super::super::status::{Trouble, Watching};
    use super::*;

    fn job(targets: Vec<TargetStatus>) -> JobStatus {
        JobStatus {
            name: "data".into(),
            source: "/data".into(),
            paused: false,
            watching: Watching::default(),
            unfinished: Vec::new(),
            unfinished_count: 0,
            halted: None,
            targets,
        }
    }

    fn trouble(message: &str, times: u64) -> Trouble {
        Trouble { time: 900, message: message.into(), hint: Some("plug it in".into()), times }
    }

    #[test]
    fn lengths_of_time_are_in_one_unit() {
        for (seconds, words, column) in [
            (0, "0 seconds", "0s"),
            (1, "1 second", "1s"),
            (119, "119 seconds", "119s"),
            (120, "2 minutes", "2m"),
            (7199, "119 minutes", "119m"),
            (7200, "2 hours", "2h"),
            (172_799, "47 hours", "47h"),
            (172_800, "2 days", "2d"),
        ] {
            assert_eq!((span(seconds).as_str(), short(seconds).as_str()), (words, column));
        }
        assert_eq!(age(5, 9), "just now");
    }

    #[test]
    fn the_worst_comes_first_with_what_to_do() {
        let target = |name: &str, state, lag_seconds, last_error: Option<Trouble>| TargetStatus {
            target: name.into(),
            state,
            lag_units: u64::from(lag_seconds > 0),
            lag_seconds,
            lag_bytes: 2048,
            last_error,
            next_try: Some(1030),
            ..TargetStatus::default()
        };
        let job = job(vec![
            target("a", State::Retrying, 10, Some(trouble("refused", 1))),
            target("b", State::Retrying, 500, Some(trouble("gone\u{1b}[2J", 7))),
            target("c", State::Halted, 1, Some(trouble("no key", 2))),
            TargetStatus { target: "d".into(), ..TargetStatus::default() },
            TargetStatus { target: "e".into(), state: State::Transferring, ..TargetStatus::default() },
        ]);
        let status = Status {
            format: String::new(),
            version: String::new(),
            host: String::new(),
            pid: 1,
            started: 0,
            now: 1000,
            config: String::new(),
            config_error: None,
            jobs: vec![job],
            recent: Vec::new(),
            source_cpu: Default::default(),
        };
        let found = attention(&status);
        let names: Vec<_> = found.iter().filter_map(|one| one.target.as_deref()).collect();
        assert_eq!(names, ["c", "b", "a"]);
        assert_eq!(found[1].why, "failed 7 times, the last 100 seconds ago: gone\\x1b[2J");
        let behind = "behind by 1 unit, 2.00 KiB, for 8 minutes; no success since the daemon was started";
        assert_eq!(found[1].behind.as_deref(), Some(behind));
        assert_eq!(found[1].hint.as_deref(), Some("plug it in"));
        assert_eq!(counts(&status), [(Level::Halted, 1), (Level::Failing, 2), (Level::Working, 1), (Level::InStep, 1)]);
    }
}
