//! A job: what is kept in step with what, and how.

use std::fmt;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

pub use crate::layout::complete::{ByLayout as Layout, Ready};
use crate::plan::retain::Retain;
use crate::plan::safety::DeleteLimit;
use crate::plan::trash::USUAL_KEEP_SECONDS;
use crate::sync::IoClass;

/// One `[[job]]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Job {
    /// What `push NAME` and the daemon call it.
    pub name: String,
    /// The directory that is sent: absolute, or `[USER@]HOST:PATH`, which is fetched from there.
    pub source: PathBuf,
    /// `[USER@]HOST:PATH`, or a directory of this machine; each gets all of it.
    pub targets: Vec<String>,
    /// A glob; each directory that matches is published whole or not at all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unit: Option<String>,
    /// When a unit is complete.
    #[serde(default, deserialize_with = "from_text", serialize_with = "as_text")]
    pub ready: Ready,
    /// Globs of what is published last and removed first.
    #[serde(default)]
    pub last: Vec<String>,
    /// Globs of files that only grow; `true` for all.
    #[serde(default, deserialize_with = "globs", skip_serializing_if = "Vec::is_empty")]
    pub append_only: Vec<String>,
    /// gitignore lines of what stays out; `!` in front takes it in again.
    #[serde(default)]
    pub exclude: Vec<String>,
    /// What happens to paths that only a target has.
    #[serde(default)]
    pub delete: Delete,
    /// With `delete = "trash"`: how long what was put aside stays at the targets.
    #[serde(
        default,
        deserialize_with = "some_from_text",
        serialize_with = "some_as_text",
        skip_serializing_if = "Option::is_none"
    )]
    pub trash_keep: Option<Period>,
    /// A run that would delete more stops: a number of paths, or `10%`.
    #[serde(default, deserialize_with = "from_text", serialize_with = "as_text", skip_serializing_if = "is_unlimited")]
    pub max_delete: DeleteLimit,
    /// Which units stay at the targets.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retain: Option<Retain>,
    /// The name of the policy that is asked for at the targets.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy: Option<String>,
    /// At most this much a second, to each target; it may depend on the time of day.
    #[serde(
        default,
        deserialize_with = "some_from_text",
        serialize_with = "some_as_text",
        skip_serializing_if = "Option::is_none"
    )]
    pub bandwidth: Option<Schedule>,
    /// How the job's threads give way to other processes of this machine, -20 to 19 as for nice(1).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nice: Option<i8>,
    /// How what the job's threads read and write waits for others: `idle`, or `best-effort:0` to `best-effort:7`, as for ionice(1).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub io_class: Option<IoClass>,
    /// Directories that are listed, and files that are hashed in a target of this machine, at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub threads: Option<NonZeroUsize>,
    /// Connections to each target, and files in work at once, 1 to 64.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub connections: Option<u8>,
    /// For the daemon: how long a file or unit has to be left alone before it is sent.
    #[serde(default = "usual_settle", deserialize_with = "from_text", serialize_with = "as_text")]
    pub settle: Period,
    /// For the daemon: how changes are noticed.
    #[serde(default)]
    pub watch: Watch,
    /// For the daemon: how often a source that gives no events is looked at.
    #[serde(default = "usual_poll", deserialize_with = "from_text", serialize_with = "as_text")]
    pub poll: Period,
    /// For the daemon: how often everything is looked at, whatever was noticed.
    #[serde(default = "usual_rescan", deserialize_with = "from_text", serialize_with = "as_text")]
    pub rescan: Period,
    /// At how many targets something has to be before it counts as safe; all, where it is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quorum: Option<usize>,
    /// For the daemon: a program and its arguments, started when something is safe.
    #[serde(default)]
    pub on_published: Vec<String>,
    /// For the daemon: a program and its arguments, started when a target begins to fail.
    #[serde(default)]
    pub on_failed: Vec<String>,
    /// For the daemon: the longest wait between two tries of a target that fails.
    #[serde(default = "usual_retry", deserialize_with = "from_text", serialize_with = "as_text")]
    pub retry_max: Period,
}

impl Job {
    /// The source, where it is a directory of another machine.
    pub fn remote_source(&self) -> Option<&str> {
        self.source.to_str().filter(|source| !source.starts_with('/'))
    }

    /// How long what a run removes or replaces stays in the trash of a target; `None` where there is to be none.
    pub fn trash_seconds(&self) -> Option<u64> {
        let keep = self.trash_keep.map_or(USUAL_KEEP_SECONDS, |Period(keep)| keep.as_secs());
        (self.delete == Delete::Trash).then_some(keep)
    }
}

/// Longer than any writer needs between two writes of one file that are meant to be seen together.
fn usual_settle() -> Period {
    Period(Duration::from_secs(2))
}

fn usual_poll() -> Period {
    Period(Duration::from_secs(30))
}

fn usual_rescan() -> Period {
    Period(Duration::from_secs(3600))
}

fn usual_retry() -> Period {
    Period(Duration::from_secs(300))
}

/// How changes are noticed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Watch {
    /// By events where the file system gives them, else by polling.
    #[default]
    Auto,
    /// By events.
    Events,
    /// By looking every so often.
    Polling,
}

/// A length of time, as `500ms`, `2s`, `10m`, `12h` or `7d`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Period(pub Duration);

impl FromStr for Period {
    type Err = String;

    fn from_str(text: &str) -> Result<Period, String> {
        let wrong = || format!("'{text}' is no length of time: write it as '500ms', '2s', '10m', '12h' or '7d'");
        let (number, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()));
        let milliseconds = match unit {
            "ms" => 1,
            "s" => 1000,
            "m" => 60_000,
            "h" => 3_600_000,
            "d" => 86_400_000,
            _ => return Err(wrong()),
        };
        let number: u64 = number.parse().map_err(|_| wrong())?;
        // Beyond ten years nothing is meant.
        let all = number.checked_mul(milliseconds).filter(|&all| all < 3650 * 86_400_000).ok_or_else(wrong)?;
        Ok(Period(Duration::from_millis(all)))
    }
}

impl fmt::Display for Period {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let all = self.0.as_millis();
        let units = [(86_400_000, "d"), (3_600_000, "h"), (60_000, "m"), (1000, "s")];
        let whole = units.into_iter().find(|(unit, _)| all >= *unit && all.is_multiple_of(*unit));
        let (unit, name) = whole.unwrap_or(if all == 0 { (1, "s") } else { (1, "ms") });
        write!(f, "{}{name}", all / unit)
    }
}

/// What happens to paths that only the target has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Delete {
    /// They stay.
    #[default]
    Never,
    /// They are removed.
    Mirror,
    /// They are moved to `.lockstep/trash` there, and so is the old version of what is replaced.
    Trash,
}

/// Bytes a second, at least 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Bandwidth(pub u64);

impl FromStr for Bandwidth {
    type Err = String;

    /// Reads `2 GB/s`, `500MiB/s`, `10m`: powers of 1000, and of 1024 with an `i`; a letter alone is 1024, as for rsync.
    fn from_str(text: &str) -> Result<Bandwidth, String> {
        let wrong = || format!("'{text}' is not a rate: write it as '2 GB/s', '500 MiB/s' or '10m'");
        let plain = text.trim().strip_suffix("/s").unwrap_or(text.trim()).trim_end();
        let digits = plain.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(plain.len());
        let (number, unit) = plain.split_at(digits);
        let number: f64 = number.parse().map_err(|_| wrong())?;
        let unit = unit.trim().to_ascii_lowercase();
        let (letter, rest) = unit.split_at_checked(1).unwrap_or(("", ""));
        let power = match letter {
            "" => 0,
            "b" if rest.is_empty() => 0,
            "k" => 1,
            "m" => 2,
            "g" => 3,
            "t" => 4,
            _ => return Err(wrong()),
        };
        let base = match rest {
            "b" => 1000_f64,
            "" | "ib" | "i" => 1024.0,
            _ => return Err(wrong()),
        };
        let bytes = number * base.powi(power);
        // Beyond 2^53 a rate is no limit, and would not be exact.
        if (1.0..9e15).contains(&bytes) { Ok(Bandwidth(bytes as u64)) } else { Err(wrong()) }
    }
}

impl fmt::Display for Bandwidth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = [
            (1_000_000_000, "GB/s"),
            (1 << 30, "GiB/s"),
            (1_000_000, "MB/s"),
            (1 << 20, "MiB/s"),
            (1000, "kB/s"),
            (1 << 10, "KiB/s"),
        ];
        let whole = units.into_iter().find(|(unit, _)| self.0.is_multiple_of(*unit));
        let (unit, name) = whole.unwrap_or((1, "B/s"));
        write!(f, "{}{name}", self.0 / unit)
    }
}

/// How much may go at which time of the day.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Schedule(Vec<(u32, Option<Bandwidth>)>);

impl Schedule {
    /// Bytes a second that may go at this minute of the day; `None` for as many as can.
    pub fn at(&self, minute: u32) -> Option<u64> {
        let begun = self.0.iter().rev().find(|(from, _)| *from <= minute);
        // Before the first of the day what began the day before goes on.
        begun.or(self.0.last()).and_then(|(_, rate)| rate.map(|Bandwidth(rate)| rate))
    }

    /// The same now, by the clock of this machine.
    pub fn now(&self) -> Option<u64> {
        use chrono::Timelike as _;
        let now = chrono::Local::now();
        self.at(now.hour() * 60 + now.minute())
    }
}

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let [(0, Some(rate))] = self.0.as_slice() {
            return write!(f, "{rate}");
        }
        for (at, (minute, rate)) in self.0.iter().enumerate() {
            let blank = if at == 0 { "" } else { " " };
            write!(f, "{blank}{:02}:{:02},", minute / 60, minute % 60)?;
            match rate {
                Some(rate) => write!(f, "{rate}")?,
                None => f.write_str("off")?,
            }
        }
        Ok(())
    }
}

impl FromStr for Schedule {
    type Err = String;

    /// Reads a rate, which holds always, or `08:00,1GB/s 20:00,off`: times of the day in ascending order, each with what holds
    /// from then on.
    fn from_str(text: &str) -> Result<Schedule, String> {
        if !text.contains(',') {
            return Ok(Schedule(vec![(0, Some(text.parse()?))]));
        }
        let mut parts: Vec<(u32, Option<Bandwidth>)> = Vec::new();
        for part in text.split_whitespace() {
            let wrong = || format!("'{part}' is not a time and a rate: write it as '08:00,1GB/s' or '20:00,off'");
            let (time, rate) = part.split_once(',').ok_or_else(wrong)?;
            let number = |text: &str| text.parse::<u32>().ok().filter(|_| text.len() == 2);
            let (hour, minute) = time
                .split_once(':')
                .and_then(|(hour, minute)| Some((number(hour)?, number(minute)?)))
                .ok_or_else(wrong)?;
            if hour > 23 || minute > 59 {
                return Err(wrong());
            }
            let at = hour * 60 + minute;
            if parts.last().is_some_and(|(before, _)| *before >= at) {
                return Err(format!("'{part}' is not after the time before it; name the times of a day in order"));
            }
            parts.push((at, if rate == "off" { None } else { Some(rate.parse()?) }));
        }
        Ok(Schedule(parts))
    }
}

/// Globs; `true` is one that everything matches.
fn globs<'de, D: Deserializer<'de>>(input: D) -> Result<Vec<String>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged, expecting = "it is true, false, or a list of globs, as ['*.log']")]
    enum Written {
        All(bool),
        Some(Vec<String>),
    }
    Ok(match Written::deserialize(input)? {
        Written::All(all) => all.then(|| "*".to_owned()).into_iter().collect(),
        Written::Some(globs) => globs,
    })
}

fn from_text<'de, D: Deserializer<'de>, T: FromStr<Err = String>>(input: D) -> Result<T, D::Error> {
    String::deserialize(input)?.parse().map_err(de::Error::custom)
}

fn as_text<S: Serializer>(value: &impl fmt::Display, output: S) -> Result<S::Ok, S::Error> {
    output.collect_str(value)
}

fn some_as_text<S: Serializer>(value: &Option<impl fmt::Display>, output: S) -> Result<S::Ok, S::Error> {
    match value {
        Some(value) => output.collect_str(value),
        None => output.serialize_none(),
    }
}

fn is_unlimited(limit: &DeleteLimit) -> bool {
    *limit == DeleteLimit::Unlimited
}

fn some_from_text<'de, D: Deserializer<'de>, T: FromStr<Err = String>>(input: D) -> Result<Option<T>, D::Error> {
    from_text(input).map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_of_time() {
        for (text, milliseconds) in [("0s", 0), ("500ms", 500), ("2s", 2000), ("10m", 600_000), ("7d", 604_800_000)] {
            assert_eq!(text.parse(), Ok(Period(Duration::from_millis(milliseconds))), "{text}");
        }
        for wrong in ["", "0", "s", "-1s", "1.5s", "1w", "2 s", "99999999999999999999s", "4000d"] {
            assert!(wrong.parse::<Period>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn rates_by_the_time_of_day() {
        let always: Schedule = "2 GB/s".parse().unwrap();
        assert_eq!((always.at(0), always.at(1439)), (Some(2_000_000_000), Some(2_000_000_000)));
        let night: Schedule = "08:00,1GB/s 20:00,off".parse().unwrap();
        let at = |hour: u32| night.at(hour * 60);
        assert_eq!([7, 8, 19, 20, 0].map(at), [None, Some(1_000_000_000), Some(1_000_000_000), None, None]);
        for wrong in
            ["8:00,1GB/s", "24:00,off", "08:00", "08:00,", "08:00,fast", "20:00,off 08:00,1m", "08:00,1m 08:00,2m", ","]
        {
            assert!(wrong.parse::<Schedule>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn what_is_written_is_read_as_the_same() {
        for text in ["0s", "500ms", "2s", "90s", "10m", "12h", "7d"] {
            assert_eq!(text.parse::<Period>().unwrap().to_string(), text);
        }
        for text in
            ["2GB/s", "500MiB/s", "7B/s", "1500B/s", "08:00,1GB/s 20:00,off", "06:30,10m", "00:00,1GB/s 12:00,5kB/s"]
        {
            let schedule: Schedule = text.parse().unwrap();
            assert_eq!(schedule.to_string().parse(), Ok(schedule), "{text}");
        }
        for text in ["settled", "huggingface", "megatron", "deepspeed", "torch-dcp", "_SUCCESS"] {
            assert_eq!(text.parse::<Ready>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn rates() {
        for (text, bytes) in [
            ("2 GB/s", 2_000_000_000),
            ("500MiB/s", 524_288_000),
            ("10m", 10_485_760),
            ("1.5 kB/s", 1_500),
            ("100", 100),
            ("7 B/s", 7),
        ] {
            assert_eq!(text.parse(), Ok(Bandwidth(bytes)), "{text}");
        }
        for wrong in ["", "fast", "0", "-1", "2 GBit/s", "1e9", "2 XB", "1..5", "99999999 TB/s", "NaN", "é"] {
            assert!(wrong.parse::<Bandwidth>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn ready_is_a_word_a_layout_or_a_marker() {
        assert_eq!("settled".parse(), Ok(Ready::Settled));
        assert_eq!("megatron".parse(), Ok(Ready::Layout(Layout::Megatron)));
        assert_eq!("_SUCCESS".parse(), Ok(Ready::Marker("_SUCCESS".into())));
        assert!("a/b".parse::<Ready>().is_err() && "..".parse::<Ready>().is_err());
    }
}
