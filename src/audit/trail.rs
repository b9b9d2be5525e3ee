//! A log that is read: all of its files in order, and what is wrong with them.

use std::fs::File;
use std::io::{self, BufRead as _, BufReader, Read as _};

use chrono::{DateTime, Utc};
use rustix::fs::FlockOperation;

use super::chain::{Links, TAIL_BYTES, check_line, time};
use super::{AuditError, HEAD, Head, LOG, broken, io_error, rotate};
use crate::error::Escaped;
use crate::path::RelPath;
use crate::root::{Follow, Metadata, Root};

/// A head that was signed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SignedHead {
    /// The line that holds it.
    pub line: u64,
    /// What was signed: that of the line before.
    pub head: Head,
    /// The text of the signature.
    pub signature: String,
    /// When the line says it was made, in seconds since 1970.
    pub time: u64,
}

/// A line whose time is before that of the line before: the clock was set back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backwards {
    /// The later line.
    pub line: u64,
    /// Its time.
    pub time: String,
    /// That of the line before.
    pub before: String,
}

/// Files that a line of the log says were removed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Removed {
    /// The last of them.
    pub path: String,
    /// So many lines are gone.
    pub lines: u64,
    /// Up to where, as the line says.
    pub head: Head,
    /// The signature in the line.
    pub signature: Option<String>,
    /// When it was written, seconds since 1970.
    pub time: u64,
}

/// What is known of a log whose chain holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verified {
    /// Up to where it goes.
    pub head: Head,
    /// The names of its files, in order.
    pub files: Vec<String>,
    /// See [`Removed`].
    pub removed: Option<Removed>,
    /// See [`Backwards`].
    pub backwards: Vec<Backwards>,
    /// In order.
    pub signed: Vec<SignedHead>,
    /// The last line is not finished: whoever wrote it was interrupted, or is at it. The head beside the log knows nothing of it.
    pub unfinished: bool,
}

/// A file of the log.
struct Part {
    name: String,
    /// `None` for the one that is written.
    number: Option<u64>,
    file: File,
    /// What it held when the files were looked for; what comes later is not read.
    bytes: u64,
}

pub(super) fn stored_head(root: &Root) -> Result<Option<Head>, AuditError> {
    let mut text = String::new();
    match root.open_read(&RelPath::new(HEAD)?, Follow::Never) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error.into()),
        Ok(file) => file.take(128).read_to_string(&mut text).map_err(io_error(root))?,
    };
    Head::decode(&text).map(Some).ok_or_else(|| broken(root, 0, "audit.head beside it cannot be read"))
}

/// Something that is another when the log has grown or was rotated.
///
/// # Errors
/// When it cannot be looked at.
pub fn state(root: &Root) -> Result<Option<(u64, u64)>, AuditError> {
    match root.stat(&RelPath::new(LOG)?, Follow::Never) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        found => Ok(found.map(|found| Some((found.inode, found.size)))?),
    }
}

/// The files of the log of `root` as they are now, in order.
fn parts(root: &Root) -> Result<Vec<Part>, AuditError> {
    let log = RelPath::new(LOG)?;
    let current = match root.open_read(&log, Follow::Never) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        file => Some(file?),
    };
    // RACE: a line that is just being written would look cut off, and a rotation like a missing file. Where a lock is not to be
    // had (a file system without) it is read as it is. It is given back before anything is read: whoever reads may take his time.
    let locked = current.as_ref().filter(|file| rustix::fs::flock(file, FlockOperation::LockShared).is_ok());
    let own = current.as_ref().map(Metadata::of).transpose().map_err(io_error(root))?;
    let mut parts = Vec::new();
    for number in rotate::numbers(root)? {
        let file = root.open_read(&rotate::path(number)?, Follow::Never)?;
        let found = Metadata::of(&file).map_err(io_error(root))?;
        // A rotation that was cut off: it has both names for now.
        if own.as_ref().is_none_or(|own| (own.device, own.inode) != (found.device, found.inode)) {
            parts.push(Part { name: rotate::name(number), number: Some(number), file, bytes: found.size });
        }
    }
    if let Some(file) = locked {
        let _ = rustix::fs::flock(file, FlockOperation::Unlock);
    }
    let bytes = own.map_or(0, |own| own.size);
    parts.extend(current.map(|file| Part { name: "audit.jsonl".into(), number: None, file, bytes }));
    Ok(parts)
}

impl Part {
    /// Calls `each` for every line, without its end; the second is false for one that has none. Stops where it answers false.
    ///
    /// # Errors
    /// When it cannot be read.
    fn lines(&self, each: &mut dyn FnMut(&[u8], bool) -> bool) -> io::Result<()> {
        let mut reader = BufReader::with_capacity(1 << 20, (&self.file).take(self.bytes));
        let mut line = Vec::new();
        loop {
            line.clear();
            if reader.by_ref().take(TAIL_BYTES).read_until(b'\n', &mut line)? == 0 {
                return Ok(());
            }
            let whole = line.last() == Some(&b'\n');
            if whole {
                line.pop();
            }
            if !each(&line, whole) {
                return Ok(());
            }
        }
    }
}

/// Calls `each` for every line as it stands, of all files in order, whether or not they fit.
///
/// # Errors
/// When a file cannot be read.
pub fn raw(root: &Root, each: &mut dyn FnMut(&[u8])) -> Result<(), AuditError> {
    for part in parts(root)? {
        let mut one = |line: &[u8], _: bool| {
            each(line);
            true
        };
        part.lines(&mut one).map_err(io_error(root))?;
    }
    Ok(())
}

/// Checks every line of the log of `root`, and answers how far it goes. An absent log without a head is empty.
///
/// # Errors
/// [`AuditError::Broken`] with the first line that does not fit.
pub fn verify(root: &Root) -> Result<Head, AuditError> {
    inspect(root, &mut |_, _| {}).map(|verified| verified.head)
}

/// Checks every line, calls `each` with those that fit, and answers what there is to know. Whether a signature counts is for
/// [`super::Trusted`] to say.
///
/// # Errors
/// As [`verify`].
pub fn inspect(root: &Root, each: &mut dyn FnMut(Head, &[u8])) -> Result<Verified, AuditError> {
    // RACE: the head first: lines that come meanwhile are behind it, and no fault.
    let stored = stored_head(root)?;
    let parts = parts(root)?;
    complete(root, &parts)?;
    let names = parts.iter().map(|part| part.name.clone()).collect();
    let mut walk = Walk {
        root,
        names,
        from: None,
        head: None,
        time: None,
        ends: Vec::new(),
        pruned: Vec::new(),
        met: false,
        stored,
    };
    let mut found = Verified {
        head: Head::EMPTY,
        files: Vec::new(),
        removed: None,
        backwards: Vec::new(),
        signed: Vec::new(),
        unfinished: false,
    };
    for part in &parts {
        let mut wrong = None;
        let mut one = |line: &[u8], whole: bool| {
            // What was being written when a crash came; a head that knows of the line does not fit then.
            found.unfinished = !whole && part.number.is_none() && (line.len() as u64) < TAIL_BYTES;
            if found.unfinished {
                return false;
            }
            match walk.line(line, whole, &mut found) {
                Ok(head) => {
                    each(head, line);
                    true
                }
                Err(error) => {
                    wrong = Some(error);
                    false
                }
            }
        };
        part.lines(&mut one).map_err(io_error(root))?;
        wrong.map_or(Ok(()), Err)?;
        walk.ends.extend(walk.head);
        found.files.push(part.name.clone());
    }
    walk.finish(&mut found)?;
    Ok(found)
}

/// Names the first file that is not there though a later one is.
fn complete(root: &Root, parts: &[Part]) -> Result<(), AuditError> {
    let missing = |name: &str| Err(broken(root, 0, format!("'{name}' is not there, and later files are")));
    let numbers: Vec<u64> = parts.iter().filter_map(|part| part.number).collect();
    for pair in numbers.windows(2) {
        if pair[1] != pair[0] + 1 {
            return missing(&rotate::name(pair[0] + 1));
        }
    }
    if !numbers.is_empty() && parts.iter().all(|part| part.number.is_some()) {
        return Err(broken(root, 0, "'audit.jsonl' is not there, and rotated files are"));
    }
    Ok(())
}

/// Where a check is.
struct Walk<'r> {
    root: &'r Root,
    /// Of the files that are there.
    names: Vec<String>,
    /// The file that the first one goes on from, as it says.
    from: Option<String>,
    head: Option<Head>,
    /// The last time, as it is written and as it is meant.
    time: Option<(String, DateTime<Utc>)>,
    /// Where files begin and end.
    ends: Vec<Head>,
    /// What lines say was removed.
    pruned: Vec<Removed>,
    /// The head beside the log was met.
    met: bool,
    stored: Option<Head>,
}

impl Walk<'_> {
    fn line(&mut self, line: &[u8], whole: bool, found: &mut Verified) -> Result<Head, AuditError> {
        let before = self.head.unwrap_or(Head::EMPTY);
        let number = before.lines + 1;
        let wrong = |what: &str| broken(self.root, number, what);
        if !whole {
            let long = line.len() as u64 >= TAIL_BYTES;
            return Err(wrong(if long { "it is longer than any that is written" } else { "it is cut off" }));
        }
        let (links, hash) = check_line(line).map_err(wrong)?;
        let before = match self.head {
            Some(before) => before,
            // What came before may have been removed; a later line has to say so.
            None => {
                let start = links.follows().ok_or_else(|| wrong("it is no audit line"))?;
                self.ends.push(start);
                self.met = self.stored.is_none_or(|stored| stored == Head::EMPTY || stored == start);
                start
            }
        };
        let number = before.lines + 1;
        let from = (links.action == "rotate").then(|| Escaped(links.path.as_bytes()).to_string());
        if links.sequence != number || links.previous != before.hash.to_string() {
            return Err(match from.filter(|from| !self.names.contains(from)) {
                Some(from) => broken(self.root, number, format!("'{from}' is not there, and the log goes on from it")),
                None => broken(self.root, number, "it does not follow the line before: lines were removed or put in"),
            });
        }
        if self.head.is_none() {
            self.from = from;
        }
        self.moment(&links, found);
        match links.action.as_str() {
            "head" => found.signed.extend(self.signed(&links, before)?),
            "prune" => {
                let head = links.head.as_deref().and_then(Head::decode);
                self.pruned.extend(head.map(|head| Removed {
                    path: Escaped(links.path.as_bytes()).to_string(),
                    lines: head.lines,
                    head,
                    signature: links.signature.clone(),
                    time: seconds(&links),
                }));
            }
            _ => {}
        }
        let head = Head { lines: number, hash };
        self.head = Some(head);
        self.met |= self.stored == Some(head);
        Ok(head)
    }

    fn moment(&mut self, links: &Links, found: &mut Verified) {
        let Some(now) = time(&links.time) else { return };
        if let Some((before, _)) = self.time.as_ref().filter(|(_, before)| now < *before) {
            let (line, before) = (links.sequence, before.clone());
            found.backwards.push(Backwards { line, time: links.time.clone(), before });
        }
        self.time = Some((links.time.clone(), now));
    }

    fn signed(&self, links: &Links, before: Head) -> Result<Option<SignedHead>, AuditError> {
        let (Some(text), Some(signature)) = (&links.head, &links.signature) else { return Ok(None) };
        let head = Head::decode(text);
        if head != Some(before) {
            return Err(broken(self.root, links.sequence, "the head in it is not that of the line before"));
        }
        let (signature, time) = (signature.clone(), seconds(links));
        Ok(Some(SignedHead { line: links.sequence, head: before, signature, time }))
    }

    /// What can be said only in the end.
    fn finish(self, found: &mut Verified) -> Result<(), AuditError> {
        let Some(head) = self.head else {
            if self.stored.is_some_and(|stored| stored != Head::EMPTY) {
                return Err(broken(self.root, 1, "lines were cut off or written anew"));
            }
            return Ok(());
        };
        found.head = head;
        let start = self.ends.first().copied().unwrap_or(Head::EMPTY);
        if start != Head::EMPTY {
            // The removal may have been cut off: then some of what the line tells of is there still.
            let tells = |removed: &&Removed| removed.lines >= start.lines && self.ends.contains(&removed.head);
            let Some(told) = self.pruned.iter().find(tells) else {
                let first = self.names.first().map_or("audit.jsonl", String::as_str);
                let before = || format!("what came before '{first}'");
                let gone = self.from.as_ref().map_or_else(before, |from| format!("'{from}'"));
                let what = format!("{gone} is not there, and no line says that it was removed");
                return Err(broken(self.root, start.lines, what));
            };
            found.removed = Some(Removed { lines: start.lines, ..told.clone() });
        }
        if !self.met {
            return Err(broken(self.root, head.lines + 1, "lines were cut off or written anew"));
        }
        Ok(())
    }
}

/// When a line was written, in seconds since 1970.
fn seconds(links: &Links) -> u64 {
    time(&links.time).map_or(0, |time| u64::try_from(time.timestamp()).unwrap_or(0))
}
