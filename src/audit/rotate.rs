//! A log begins a new file, and the chain goes on.
//!
//! `audit.jsonl` is always the file that is written. Its content gets a further name, `audit-NNNNNN.jsonl`; then a new file,
//! whose only line carries the last hash, takes its place by one rename. At no moment is there no `audit.jsonl`, and each
//! step can be the last one: a file that has both names is not rotated yet.

use std::fs::File;
use std::io::{self, Write as _};
use std::os::unix::fs::FileExt as _;
use std::time::SystemTime;

use chrono::{DateTime, Utc};
use rustix::fs::{FlockOperation, RenameFlags};

use super::chain::{Lines, Links, TAIL_BYTES, time};
use super::log::hand_over;
use super::{AuditError, AuditRecord, Head, LOG, Outcome, Rotation, STATE, io_error};
use crate::path::RelPath;
use crate::root::{Follow, Metadata, Root};

const NEW_LOG: &str = ".lockstep/audit.jsonl.new";
/// Six digits, or more when those are used up.
const DIGITS: usize = 6;

/// The name of a rotated file.
pub(super) fn name(number: u64) -> String {
    format!("audit-{number:0DIGITS$}.jsonl")
}

pub(super) fn path(number: u64) -> Result<RelPath, AuditError> {
    Ok(RelPath::new(format!("{STATE}/{}", name(number)))?)
}

fn number(name: &[u8]) -> Option<u64> {
    let digits = std::str::from_utf8(name).ok()?.strip_prefix("audit-")?.strip_suffix(".jsonl")?;
    let number = digits.bytes().all(|digit| digit.is_ascii_digit()).then(|| digits.parse().ok())??;
    (self::name(number).as_bytes() == name).then_some(number)
}

/// The numbers of the rotated files that are there, in order.
pub(super) fn numbers(root: &Root) -> Result<Vec<u64>, AuditError> {
    let names = match root.names(Some(&RelPath::new(STATE)?), Follow::Never) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
        names => names?,
    };
    let mut numbers: Vec<u64> = names.iter().filter_map(|name| number(name)).collect();
    numbers.sort_unstable();
    Ok(numbers)
}

/// Whether a file of so many bytes has become too large or too old.
pub(super) fn due(rotation: &Rotation, file: &File, bytes: u64, now: SystemTime) -> bool {
    if bytes == 0 {
        return false;
    }
    if rotation.bytes.is_some_and(|most| bytes >= most) {
        return true;
    }
    let Some(age) = rotation.age else { return false };
    let first = first_time(file);
    // RACE: none; a clock that was set back makes the file younger, and no harm.
    first.and_then(|first| (DateTime::<Utc>::from(now) - first).to_std().ok()).is_some_and(|since| since >= age)
}

/// When the first line was written.
fn first_time(file: &File) -> Option<DateTime<Utc>> {
    // The first line of a file is hardly ever longer; one that is makes the file young, and its size decides.
    let mut text = vec![0; 16 << 10];
    let read = file.read_at(&mut text, 0).ok()?;
    let line = text[..read].split(|&byte| byte == b'\n').next()?;
    time(&serde_json::from_slice::<Links>(line).ok()?.time)
}

/// Takes back a rotation that was cut off before the new file was in its place: the name that the old one got too early.
pub(super) fn undo(root: &Root, current: &Metadata) -> Result<(), AuditError> {
    if current.links < 2 {
        return Ok(());
    }
    let Some(&last) = numbers(root)?.last() else { return Ok(()) };
    let path = path(last)?;
    let found = root.stat(&path, Follow::Never)?;
    if (found.device, found.inode) == (current.device, current.inode) {
        root.unlink(&path)?;
    }
    Ok(())
}

/// Begins a new file behind `head`. Answers it, locked, and its head.
pub(super) fn rotate(root: &Root, old: &File, head: Head) -> Result<(File, Head), AuditError> {
    let failed = io_error(root);
    let last = numbers(root)?.last().copied().unwrap_or(0);
    let record = AuditRecord {
        action: "rotate".into(),
        path: name(last + 1),
        head: Some(head.to_string()),
        result: Some(Outcome::Success),
        reason: Some(format!("goes on from '{}'", name(last + 1))),
        ..AuditRecord::default()
    };
    let mut lines = Lines::after(head);
    lines.add(&record).map_err(|error| failed(error.into()))?;
    let (new, log) = (RelPath::new(NEW_LOG)?, RelPath::new(LOG)?);
    root.remove_tree(&new)?;
    let mut file = root.create_new(&new, 0o600)?;
    if !hand_over(&file, old).map_err(&failed)? {
        root.unlink(&new)?;
        return Err(failed(io::Error::other("it is another user's, who begins the next file")));
    }
    // Nobody else knows it yet; whoever finds it under its name waits.
    rustix::fs::flock(&file, FlockOperation::LockExclusive).map_err(|errno| failed(errno.into()))?;
    file.write_all(&lines.text).and_then(|()| file.sync_all()).map_err(&failed)?;
    root.hard_link(&log, &path(last + 1)?)?;
    // DURABILITY: the old lines have a name of their own before theirs is taken.
    root.sync_dir(Some(&RelPath::new(STATE)?))?;
    root.rename(&new, &log, RenameFlags::empty())?;
    root.sync_dir(Some(&RelPath::new(STATE)?))?;
    Ok((file, lines.head))
}

/// Which rotated files are one too many, and the head up to which they go: they are to be removed once the log says so.
pub(super) fn surplus(root: &Root, keep: u32) -> Result<Option<(Vec<u64>, Head)>, AuditError> {
    let numbers = numbers(root)?;
    let Some(over) = numbers.len().checked_sub(keep as usize).filter(|&over| over > 0) else { return Ok(None) };
    // What the next file follows is where the removed ones end.
    let next = match numbers.get(over) {
        Some(&next) => path(next)?,
        None => RelPath::new(LOG)?,
    };
    let file = root.open_read(&next, Follow::Never)?;
    let mut text = vec![0; TAIL_BYTES as usize];
    let read = file.read_at(&mut text, 0).map_err(io_error(root))?;
    let line = text[..read].split(|&byte| byte == b'\n').next().unwrap_or_default();
    let head = serde_json::from_slice::<Links>(line).ok().and_then(|links| links.follows());
    // A file that cannot be read is for the check to find; nothing is removed then.
    Ok(head.map(|head| (numbers[..over].to_vec(), head)))
}

/// What the log says before they go.
pub(super) fn pruned(numbers: &[u64], head: Head, keep: u32) -> AuditRecord {
    let last = numbers.last().copied().unwrap_or_default();
    AuditRecord {
        action: "prune".into(),
        path: name(last),
        head: Some(head.to_string()),
        result: Some(Outcome::Success),
        reason: Some(format!("removed up to here: [audit] keep is {keep}")),
        ..AuditRecord::default()
    }
}
