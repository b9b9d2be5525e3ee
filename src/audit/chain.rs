//! How lines hang together: pure, text in and out.

use std::sync::LazyLock;
use std::time::SystemTime;

use chrono::{DateTime, SecondsFormat, Utc};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::AuditRecord;
use crate::manifest::Digest;

/// `,"hash":"` + 64 digits + `"}`.
const SUFFIX_BYTES: usize = 9 + 64 + 2;
/// More than the longest line can have.
pub const TAIL_BYTES: u64 = 256 * 1024;
/// So much is written at a time.
pub(super) const WRITE_BYTES: usize = 1 << 20;
/// How a signed line shows among others. In a text of the line the quotes would have backslashes.
const SIGNED: &[u8] = b"\"action\":\"head\"";

#[derive(Serialize)]
struct Line<'a> {
    sequence: u64,
    time: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    boot: Option<&'a str>,
    #[serde(flatten)]
    record: &'a AuditRecord,
    previous: String,
}

/// What of a line the chain and its files are judged by.
#[derive(Debug, Deserialize)]
pub(super) struct Links {
    pub(super) sequence: u64,
    pub(super) previous: String,
    #[serde(default)]
    pub(super) time: String,
    #[serde(default)]
    pub(super) action: String,
    #[serde(default)]
    pub(super) path: String,
    pub(super) head: Option<String>,
    pub(super) signature: Option<String>,
}

impl Links {
    /// The head that a line with this one's place follows.
    pub(super) fn follows(&self) -> Option<Head> {
        Some(Head { lines: self.sequence.checked_sub(1)?, hash: Digest::from_hex(self.previous.as_bytes())? })
    }
}

/// How far a log goes: compare it with one that was kept elsewhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Head {
    /// Number of lines.
    pub lines: u64,
    /// Hash of the last; zero for an empty log.
    pub hash: Digest,
}

impl Head {
    /// Of a log without a line.
    pub const EMPTY: Head = Head { lines: 0, hash: Digest([0; 32]) };

    /// What `audit.head` holds, and what is signed.
    pub fn encode(&self) -> String {
        format!("{self}\n")
    }

    /// Reads it.
    pub fn decode(text: &str) -> Option<Head> {
        let (lines, hash) = text.trim_end().split_once(' ')?;
        Some(Head { lines: lines.parse().ok()?, hash: Digest::from_hex(hash.as_bytes())? })
    }
}

impl std::fmt::Display for Head {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}", self.lines, self.hash)
    }
}

/// The boot of this machine, as the kernel numbers it.
fn boot() -> Option<&'static str> {
    static BOOT: LazyLock<Option<String>> = LazyLock::new(|| {
        let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
        let text = text.trim();
        let known = text.len() == 36 && text.bytes().all(|byte| byte.is_ascii_hexdigit() || byte == b'-');
        known.then(|| text.to_owned())
    });
    BOOT.as_deref()
}

/// The lines of `records` as they follow `head`, and the head after them.
///
/// # Errors
/// When a record cannot be written as JSON.
pub fn lines(head: Head, records: impl IntoIterator<Item = AuditRecord>) -> Result<(Vec<u8>, Head), serde_json::Error> {
    let mut lines = Lines::after(head);
    records.into_iter().try_for_each(|record| lines.add(&record))?;
    Ok((lines.text, lines.head))
}

/// Lines that follow one another.
pub(super) struct Lines {
    pub(super) head: Head,
    time: String,
    pub(super) text: Vec<u8>,
}

impl Lines {
    pub(super) fn after(head: Head) -> Lines {
        Lines { head, time: timestamp(SystemTime::now()), text: Vec::new() }
    }

    pub(super) fn add(&mut self, record: &AuditRecord) -> Result<(), serde_json::Error> {
        let (head, text) = (&mut self.head, &mut self.text);
        head.lines += 1;
        let previous = head.hash.to_string();
        let line = Line { sequence: head.lines, time: &self.time, boot: boot(), record, previous };
        let start = text.len();
        serde_json::to_writer(&mut *text, &line)?;
        text.pop();
        head.hash = Digest(Sha256::digest(&text[start..]).into());
        text.extend_from_slice(format!(",\"hash\":\"{}\"}}\n", head.hash).as_bytes());
        Ok(())
    }
}

/// What the end of a log says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Last {
    /// Up to where it goes.
    pub head: Head,
    /// Where in the text that was looked at the last complete line ends.
    pub complete: usize,
    /// The last line with a signed head in that text: its number, and when it was made.
    pub signed: Option<(u64, Option<DateTime<Utc>>)>,
}

/// The head that the end of a log says, and where in `tail` its last complete line ends. `whole` says that the tail is
/// the whole log.
///
/// # Errors
/// What is wrong with the last line.
pub fn head_of(tail: &[u8], whole: bool) -> Result<(Head, usize), &'static str> {
    last_of(tail, whole).map(|last| (last.head, last.complete))
}

/// The same, and when the log was last signed.
///
/// # Errors
/// As [`head_of`].
pub fn last_of(tail: &[u8], whole: bool) -> Result<Last, &'static str> {
    let complete = tail.iter().rposition(|&byte| byte == b'\n').map_or(0, |at| at + 1);
    if complete == 0 && !whole {
        return Err("the last line is longer than any that is written");
    }
    let Some(lines) = tail[..complete].strip_suffix(b"\n") else {
        return Ok(Last { head: Head::EMPTY, complete: 0, signed: None });
    };
    let mut backwards = lines.rsplit(|&byte| byte == b'\n');
    let last = backwards.next().unwrap_or(lines);
    let (links, hash) = check_line(last)?;
    let head = Head { lines: links.sequence, hash };
    let holds = |line: &&[u8]| line.windows(SIGNED.len()).any(|window| window == SIGNED);
    let signed = std::iter::once(last).chain(backwards).find(holds);
    let signed = signed.and_then(|line| serde_json::from_slice::<Links>(line).ok());
    let signed = signed.map(|links| (links.sequence, time(&links.time)));
    Ok(Last { head, complete, signed })
}

pub(super) fn check_line(line: &[u8]) -> Result<(Links, Digest), &'static str> {
    let at = line.len().checked_sub(SUFFIX_BYTES).ok_or("it is no audit line")?;
    let (body, suffix) = line.split_at(at);
    let digits = suffix.strip_prefix(b",\"hash\":\"").and_then(|rest| rest.strip_suffix(b"\"}"));
    let hash = digits.and_then(Digest::from_hex).ok_or("it has no hash")?;
    if Digest(Sha256::digest(body).into()) != hash {
        return Err("it was edited: its hash is not that of its text");
    }
    let links = serde_json::from_slice(line).map_err(|_| "it is no audit line")?;
    Ok((links, hash))
}

/// The time of a line; those that were made before there were milliseconds have none.
pub(super) fn time(text: &str) -> Option<DateTime<Utc>> {
    DateTime::parse_from_rfc3339(text).ok().map(|time| time.to_utc())
}

/// RFC 3339 in UTC, to the millisecond.
pub(super) fn timestamp(now: SystemTime) -> String {
    DateTime::<Utc>::from(now).to_rfc3339_opts(SecondsFormat::Millis, true)
}
