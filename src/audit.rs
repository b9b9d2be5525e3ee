//! The audit trail of a target: append-only JSON lines, each chained to the one before it by SHA-256.
//!
//! A line's `hash` is the SHA-256 of everything in the line before `,"hash":`; its `previous` is the hash of the line
//! before, so that an edited, inserted or removed line shows. Lines cut off at the end show against `audit.head`, which
//! says how many lines there were; whoever can write both can only be caught by comparing [`Head`]s kept elsewhere.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::fs::{FlockOperation, OFlags, RenameFlags};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::manifest::{Digest, Entry};
use crate::path::{InvalidPath, RelPath};
use crate::root::{FileKind, Follow, Metadata, Root, RootError};

/// The log's name beneath a root.
pub const LOG: &str = ".lockstep/audit.jsonl";
/// The name of its head beneath a root.
pub const HEAD: &str = ".lockstep/audit.head";
const NEW_HEAD: &str = ".lockstep/audit.head.new";
const STATE: &str = ".lockstep";
/// `,"hash":"` + 64 digits + `"}`.
const SUFFIX_BYTES: usize = 9 + 64 + 2;
/// More than the longest line can have.
pub const TAIL_BYTES: u64 = 256 * 1024;

/// One thing that was done, or refused. Names are escaped ([`crate::error::Escaped`]) by whoever makes the record.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct AuditRecord {
    /// Who: `user@host`.
    pub actor: String,
    /// Where the content came from.
    pub source: String,
    /// `publish`, `remove`, `trash`, `metadata`, `repair`, `quarantine` or `refuse`; of a listener: `login`, `session` or `refuse`.
    pub action: String,
    /// The path below the root, escaped.
    pub path: String,
    /// Bytes of a regular file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub size: Option<u64>,
    /// SHA-256 of a regular file, in hexadecimal.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
    /// The mode it got, in octal.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mode: Option<String>,
    /// The owner it got.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub owner: Option<String>,
    /// The group it got.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub group: Option<String>,
    /// The ACL entries it got beyond owner, group and others.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub acl: Option<String>,
    /// Why it was refused, or where it was moved.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

impl AuditRecord {
    /// What happened to an entry and what it got, by whom this record says.
    #[must_use]
    pub fn of_entry(&self, action: &str, entry: &Entry) -> AuditRecord {
        let file = entry.file();
        AuditRecord {
            action: action.into(),
            path: entry.path.to_string(),
            size: file.map(|(size, _)| size),
            sha256: file.and_then(|(_, digest)| digest).map(|digest| digest.to_string()),
            mode: Some(format!("{:04o}", entry.mode)),
            owner: Some(entry.owner.to_string()),
            group: Some(entry.group.to_string()),
            ..self.clone()
        }
    }
}

#[derive(Serialize)]
struct Line<'a> {
    sequence: u64,
    time: &'a str,
    #[serde(flatten)]
    record: &'a AuditRecord,
    previous: String,
}

#[derive(Deserialize)]
struct Links {
    sequence: u64,
    previous: String,
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
    /// What `audit.head` holds.
    pub fn encode(&self) -> String {
        format!("{} {}\n", self.lines, self.hash)
    }

    /// Reads it.
    pub fn decode(text: &str) -> Option<Head> {
        let (lines, hash) = text.trim_end().split_once(' ')?;
        Some(Head { lines: lines.parse().ok()?, hash: Digest::from_hex(hash.as_bytes())? })
    }
}

const EMPTY: Head = Head { lines: 0, hash: Digest([0; 32]) };

/// Why a log cannot be written or believed.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum AuditError {
    #[error(transparent)]
    Root(#[from] RootError),
    #[error("cannot read or write the audit log of '{root}'")]
    Io { root: String, source: io::Error },
    #[error("the audit log of '{root}', line {line}: {what}; keep the file as it is and find out who changed it")]
    Broken { root: String, line: u64, what: &'static str },
    #[error(transparent)]
    Path(#[from] InvalidPath),
}

/// A log that is open for appending. The open file is locked: others wait.
#[derive(Debug)]
pub struct AuditLog<'r> {
    root: &'r Root,
    file: File,
    head: Head,
}

fn io_error(root: &Root) -> impl Fn(io::Error) -> AuditError + '_ {
    |source| AuditError::Io { root: crate::error::shown(root.shown()).to_string(), source }
}

fn broken(root: &Root, line: u64, what: &'static str) -> AuditError {
    AuditError::Broken { root: crate::error::shown(root.shown()).to_string(), line, what }
}

impl<'r> AuditLog<'r> {
    /// Opens the log of `root`, or starts it. What a crash left of an unfinished line is dropped.
    ///
    /// # Errors
    /// When it cannot be opened, or its end has been tampered with.
    pub fn open(root: &'r Root) -> Result<AuditLog<'r>, AuditError> {
        let failed = io_error(root);
        root.mkdir_all(&RelPath::new(STATE)?, 0o700)?;
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::APPEND | OFlags::NONBLOCK;
        let mut file = root.open_with(&RelPath::new(LOG)?, Follow::Never, flags, 0o600)?;
        let kind = Metadata::of(&file).map_err(&failed)?.kind;
        if kind != FileKind::Regular {
            return Err(broken(root, 0, "it is not a regular file"));
        }
        rustix::fs::flock(&file, FlockOperation::LockExclusive).map_err(|errno| failed(errno.into()))?;
        let size = file.metadata().map_err(&failed)?.len();
        let start = size.saturating_sub(TAIL_BYTES);
        file.seek(SeekFrom::Start(start)).map_err(&failed)?;
        let mut tail = Vec::new();
        Read::by_ref(&mut file).take(TAIL_BYTES).read_to_end(&mut tail).map_err(&failed)?;
        let (head, complete) = head_of(&tail, start == 0).map_err(|what| broken(root, 0, what))?;
        if stored_head(root)?.is_some_and(|stored| stored.lines > head.lines) {
            return Err(broken(root, head.lines + 1, "lines were cut off at the end"));
        }
        if complete < tail.len() {
            file.set_len(start + complete as u64).map_err(&failed)?;
        }
        Ok(AuditLog { root, file, head })
    }

    /// Appends the records and brings them to stable storage.
    ///
    /// # Errors
    /// When they cannot be written; the log is then as it was, or ends in an unfinished line.
    pub fn append(&mut self, records: &[AuditRecord]) -> Result<Head, AuditError> {
        self.append_all(records.iter().cloned())
    }

    /// The same for records that are made one by one: of a million files none are held at once.
    ///
    /// # Errors
    /// As [`append`](Self::append).
    pub fn append_all(&mut self, records: impl IntoIterator<Item = AuditRecord>) -> Result<Head, AuditError> {
        let failed = io_error(self.root);
        let mut lines = Lines::after(self.head);
        for record in records {
            lines.add(&record).map_err(|error| failed(error.into()))?;
            if lines.text.len() >= WRITE_BYTES {
                self.file.write_all(&std::mem::take(&mut lines.text)).map_err(&failed)?;
            }
        }
        self.file.write_all(&lines.text).and_then(|()| self.file.sync_data()).map_err(&failed)?;
        let head = lines.head;
        self.head = head;
        // DURABILITY: written after the lines; after a crash between the two the head is behind, which is no fault.
        let (path, new) = (RelPath::new(HEAD)?, RelPath::new(NEW_HEAD)?);
        self.root.remove_tree(&new)?;
        let mut file = self.root.create_new(&new, 0o600)?;
        file.write_all(head.encode().as_bytes()).and_then(|()| file.sync_data()).map_err(&failed)?;
        self.root.rename(&new, &path, RenameFlags::empty())?;
        Ok(head)
    }
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

/// So much is written at a time.
const WRITE_BYTES: usize = 1 << 20;

/// Lines that follow one another.
struct Lines {
    head: Head,
    time: String,
    text: Vec<u8>,
}

impl Lines {
    fn after(head: Head) -> Lines {
        Lines { head, time: timestamp(SystemTime::now()), text: Vec::new() }
    }

    fn add(&mut self, record: &AuditRecord) -> Result<(), serde_json::Error> {
        let (head, text) = (&mut self.head, &mut self.text);
        head.lines += 1;
        let line = Line { sequence: head.lines, time: &self.time, record, previous: head.hash.to_string() };
        let start = text.len();
        serde_json::to_writer(&mut *text, &line)?;
        text.pop();
        head.hash = Digest(Sha256::digest(&text[start..]).into());
        text.extend_from_slice(format!(",\"hash\":\"{}\"}}\n", head.hash).as_bytes());
        Ok(())
    }
}

/// The head that the end of a log says, and where in `tail` its last complete line ends. `whole` says that the tail is
/// the whole log.
///
/// # Errors
/// What is wrong with the last line.
pub fn head_of(tail: &[u8], whole: bool) -> Result<(Head, usize), &'static str> {
    let complete = tail.iter().rposition(|&byte| byte == b'\n').map_or(0, |at| at + 1);
    if complete == 0 && !whole {
        return Err("the last line is longer than any that is written");
    }
    let Some(lines) = tail[..complete].strip_suffix(b"\n") else { return Ok((EMPTY, 0)) };
    let last = lines.rsplit(|&byte| byte == b'\n').next().unwrap_or(lines);
    let (links, hash) = check_line(last)?;
    Ok((Head { lines: links.sequence, hash }, complete))
}

fn check_line(line: &[u8]) -> Result<(Links, Digest), &'static str> {
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

fn stored_head(root: &Root) -> Result<Option<Head>, AuditError> {
    let mut text = String::new();
    match root.open_read(&RelPath::new(HEAD)?, Follow::Never) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error.into()),
        Ok(file) => file.take(128).read_to_string(&mut text).map_err(io_error(root))?,
    };
    Head::decode(&text).map(Some).ok_or_else(|| broken(root, 0, "audit.head beside it cannot be read"))
}

/// Checks every line of the log of `root`. An absent log without a head is empty.
///
/// # Errors
/// [`AuditError::Broken`] with the first line that does not fit.
pub fn verify(root: &Root) -> Result<Head, AuditError> {
    let stored = stored_head(root)?;
    let mut text = Vec::new();
    match root.open_read(&RelPath::new(LOG)?, Follow::Never) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error.into()),
        Ok(mut file) => {
            file.read_to_end(&mut text).map_err(io_error(root))?;
        }
    }
    let mut head = EMPTY;
    let mut met = stored.is_none_or(|stored| stored == EMPTY);
    for line in text.split_inclusive(|&byte| byte == b'\n') {
        let number = head.lines + 1;
        let line = line.strip_suffix(b"\n").ok_or_else(|| broken(root, number, "it is cut off"))?;
        let (links, hash) = check_line(line).map_err(|what| broken(root, number, what))?;
        if links.sequence != number || links.previous != head.hash.to_string() {
            return Err(broken(root, number, "it does not follow the line before: lines were removed or put in"));
        }
        head = Head { lines: number, hash };
        met |= stored == Some(head);
    }
    if !met {
        return Err(broken(root, head.lines + 1, "lines were cut off or written anew"));
    }
    Ok(head)
}

/// RFC 3339 in UTC, to the second.
fn timestamp(now: SystemTime) -> String {
    let seconds = now.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    // Days to year, month and day, counting years from March (the proleptic Gregorian calendar).
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z", rest / 3600, rest / 60 % 60, rest % 60)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn log(paths: &[&str]) -> (tempfile::TempDir, Root) {
        let at = tempfile::tempdir().unwrap();
        let root = Root::open(at.path()).unwrap();
        for path in paths {
            let record = AuditRecord { action: "publish".into(), path: (*path).into(), ..AuditRecord::default() };
            AuditLog::open(&root).unwrap().append(&[record.clone(), record]).unwrap();
        }
        (at, root)
    }

    #[test]
    fn s13_lines_are_chained_over_runs() {
        let (_at, root) = log(&["a", "b\\n{}", "c"]);
        assert_eq!(verify(&root).unwrap().lines, 6);
    }

    #[test]
    fn h60_each_kind_of_tampering_names_the_line() {
        type Damage = fn(&mut Vec<String>);
        let cases: [(Damage, u64); 5] = [
            (|lines| lines[2] = lines[2].replace("publish", "nothing"), 3),
            (|lines| drop(lines.remove(1)), 2),
            (|lines| lines.swap(3, 4), 4),
            (|lines| drop(lines.pop()), 6),
            (|lines| lines.clear(), 1),
        ];
        for (damage, expected) in cases {
            let (at, root) = log(&["a", "b", "c"]);
            let path = at.path().join(LOG);
            let text = std::fs::read_to_string(&path).unwrap();
            let mut lines: Vec<String> = text.lines().map(|line| format!("{line}\n")).collect();
            damage(&mut lines);
            std::fs::write(&path, lines.concat()).unwrap();
            match verify(&root) {
                Err(AuditError::Broken { line, .. }) => assert_eq!(line, expected),
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn h60_a_cut_line_is_named_and_a_torn_one_that_was_never_acknowledged_is_dropped() {
        let (at, root) = log(&["a"]);
        let path = at.path().join(LOG);
        let text = std::fs::read(&path).unwrap();
        std::fs::write(&path, &text[..text.len() - 5]).unwrap();
        assert!(matches!(verify(&root), Err(AuditError::Broken { line: 2, .. })));
        assert!(AuditLog::open(&root).is_err());
        std::fs::write(&path, [&text[..], b"{\"sequence\":3"].concat()).unwrap();
        drop(AuditLog::open(&root).unwrap());
        assert_eq!(verify(&root).unwrap().lines, 2);
    }

    #[test]
    fn times_are_rfc_3339() {
        let cases = [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_399, "2000-02-28T23:59:59Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (1_767_225_599, "2025-12-31T23:59:59Z"),
        ];
        for (seconds, shown) in cases {
            assert_eq!(timestamp(UNIX_EPOCH + Duration::from_secs(seconds)), shown);
        }
    }
}
