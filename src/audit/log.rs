//! A log that is written.

use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use std::time::SystemTime;

use chrono::{DateTime, Utc};
use rustix::fs::{FallocateFlags, FlockOperation, Gid, OFlags, RenameFlags, Uid};
use rustix::io::Errno;

use super::chain::{Lines, TAIL_BYTES, WRITE_BYTES, last_of};
use super::trail::stored_head;
use super::{
    AuditError, AuditRecord, HEAD, Head, LOG, NEW_HEAD, Rotation, STATE, Settings, broken, io_error, lost,
    record::LINE_BYTES, rotate, settings, shown, sign,
};
use crate::error::chain;
use crate::path::RelPath;
use crate::root::{FileKind, Follow, Metadata, Root};
use crate::signature::SignError;

/// A log that is open for appending. The open file is locked: others wait.
#[derive(Debug)]
pub struct AuditLog<'r> {
    root: &'r Root,
    file: File,
    head: Head,
    /// The last line that holds a signed head, as far as it is known, and its time.
    signed: Option<(u64, Option<DateTime<Utc>>)>,
    settings: Arc<Settings>,
    /// Where an unfinished line begins, until it is taken away by who writes the next one and says so.
    torn: Option<u64>,
}

/// When a head is signed after what is written.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Sign {
    Never,
    /// When enough lines or time have gone by.
    Due,
    Now,
}

impl<'r> AuditLog<'r> {
    /// Opens the log of `root`, or starts it; with a new file, where the settings of the process want one. What a crash left of
    /// an unfinished line is dropped when something is written, with a line that says so.
    ///
    /// # Errors
    /// When it cannot be opened, or its end has been tampered with.
    pub fn open(root: &'r Root) -> Result<AuditLog<'r>, AuditError> {
        AuditLog::open_with(root, settings())
    }

    /// The same without a new file, whatever is due: room was taken in the one that there is.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn reopen(root: &'r Root) -> Result<AuditLog<'r>, AuditError> {
        AuditLog::open_with(root, Arc::new(Settings { rotation: Rotation::default(), ..(*settings()).clone() }))
    }

    /// The same with settings of its own.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_with(root: &'r Root, settings: Arc<Settings>) -> Result<AuditLog<'r>, AuditError> {
        let failed = io_error(root);
        root.mkdir_all(&RelPath::new(STATE)?, 0o700)?;
        let (mut file, found) = locked(root)?;
        rotate::undo(root, &found)?;
        let size = file.metadata().map_err(&failed)?.len();
        let start = size.saturating_sub(TAIL_BYTES);
        file.seek(SeekFrom::Start(start)).map_err(&failed)?;
        let mut tail = Vec::new();
        std::io::Read::by_ref(&mut file).take(TAIL_BYTES).read_to_end(&mut tail).map_err(&failed)?;
        let last = last_of(&tail, start == 0).map_err(|what| broken(root, 0, what))?;
        let head = last.head;
        if head == Head::EMPTY
            && let Some(&number) = rotate::numbers(root)?.last()
        {
            let what = format!("'audit.jsonl' is empty, though it goes on from '{}'", rotate::name(number));
            return Err(broken(root, 0, what));
        }
        if let Some(stored) = stored_head(root)? {
            if stored.lines > head.lines {
                return Err(broken(root, head.lines + 1, "lines were cut off at the end"));
            }
            if stored.lines == head.lines && stored != head {
                return Err(broken(root, head.lines, "it is another than audit.head says: it was written anew"));
            }
        }
        let end = start + last.complete as u64;
        let torn = (last.complete < tail.len()).then_some(end);
        let mut log = AuditLog { root, file, head, signed: last.signed, settings, torn };
        // What is torn is not put away so: the next time is early enough.
        if torn.is_none() && rotate::due(&log.settings.rotation, &log.file, end, SystemTime::now()) {
            log.rotate();
        }
        Ok(log)
    }

    /// Begins a new file. What keeps it from that keeps nobody from writing: the old one goes on.
    fn rotate(&mut self) {
        let rotated = rotate::rotate(self.root, &self.file, self.head).and_then(|(file, head)| {
            (self.file, self.head) = (file, head);
            self.prune()
        });
        if let Err(error) = rotated {
            tracing::warn!(error = chain(&error), "the audit log is not rotated");
        }
    }

    /// Removes what is too much, after the log says so: a file that is gone without such a line was taken away.
    fn prune(&mut self) -> Result<(), AuditError> {
        let Some(keep) = self.settings.rotation.keep else { return Ok(()) };
        let Some((numbers, head)) = rotate::surplus(self.root, keep)? else { return Ok(()) };
        let mut record = rotate::pruned(&numbers, head, keep);
        if let Some(signing) = &self.settings.signing {
            record = sign::signed_removal(&signing.key, head, record).map_err(unsigned(self.root))?;
        }
        self.write([record], Sign::Now)?;
        for number in numbers {
            self.root.unlink(&rotate::path(number)?)?;
        }
        self.root.sync_dir(Some(&RelPath::new(STATE)?)).map_err(AuditError::from)
    }

    /// How far it goes.
    #[must_use]
    pub fn head(&self) -> Head {
        self.head
    }

    /// Makes sure that lines of so many records, whose words take `bytes` in all, find room, and that the log can be written:
    /// it says what is about to be done. After this the disk may be full of other things.
    ///
    /// # Errors
    /// When there is no room, or nothing can be written.
    pub fn announce(&mut self, intent: AuditRecord, records: u64, bytes: u64) -> Result<(), AuditError> {
        self.reserve(records.saturating_add(4).saturating_mul(LINE_BYTES).saturating_add(bytes))?;
        let failed = io_error(self.root);
        let mut lines = Lines::after(self.head);
        let (gaps, lost) = self.gaps()?;
        for record in gaps.into_iter().chain([intent]) {
            lines.add(&record).map_err(|error| failed(error.into()))?;
        }
        // DURABILITY: the head stays behind, which is no fault; it comes with what is announced.
        self.file.write_all(&lines.text).and_then(|()| self.file.sync_data()).map_err(failed)?;
        (self.head, self.torn) = (lines.head, None);
        told(self.forget(lost));
        Ok(())
    }

    /// Takes room for so many bytes at the end. Where the file system has no such thing none is taken.
    ///
    /// # Errors
    /// When there is not so much room.
    pub fn reserve(&self, bytes: u64) -> Result<(), AuditError> {
        let failed = io_error(self.root);
        let size = self.file.metadata().map_err(&failed)?.len();
        match rustix::fs::fallocate(&self.file, FallocateFlags::KEEP_SIZE, size, bytes.max(1)) {
            Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL | Errno::PERM | Errno::SPIPE) => Ok(()),
            Err(errno) => Err(failed(errno.into())),
        }
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
        self.write(records, Sign::Due)
    }

    /// The same at the end of a run or a session: the head is signed, where there is a key.
    ///
    /// # Errors
    /// As [`append`](Self::append).
    pub fn append_last(&mut self, records: impl IntoIterator<Item = AuditRecord>) -> Result<Head, AuditError> {
        self.write(records, Sign::Now)
    }

    fn write(&mut self, records: impl IntoIterator<Item = AuditRecord>, sign: Sign) -> Result<Head, AuditError> {
        let failed = io_error(self.root);
        let mut lines = Lines::after(self.head);
        let json = |error: serde_json::Error| failed(error.into());
        let mut records = records.into_iter().peekable();
        let anything = records.peek().is_some() || self.is_due(sign, self.head);
        let (gaps, lost) = if anything { self.gaps()? } else { Default::default() };
        for record in gaps.into_iter().chain(records) {
            lines.add(&record).map_err(json)?;
            if lines.text.len() >= WRITE_BYTES {
                self.file.write_all(&std::mem::take(&mut lines.text)).map_err(&failed)?;
            }
        }
        if let Some(signing) = self.settings.signing.as_ref().filter(|_| self.is_due(sign, lines.head)) {
            let signed = sign::signed_head(&signing.key, lines.head).map_err(unsigned(self.root))?;
            lines.add(&signed).map_err(json)?;
            self.signed = Some((lines.head.lines, Some(Utc::now())));
        }
        let head = lines.head;
        if head == self.head {
            return Ok(head);
        }
        self.file.write_all(&lines.text).and_then(|()| self.file.sync_data()).map_err(&failed)?;
        (self.head, self.torn) = (head, None);
        // DURABILITY: written after the lines, which are there whether it can be or not; where it is behind, that is no fault.
        told(self.store_head(head));
        told(self.forget(lost));
        Ok(head)
    }

    /// What was lost is told in the log.
    fn forget(&self, lost: u64) -> Result<(), AuditError> {
        if lost > 0 { lost::set(self.root, 0) } else { Ok(()) }
    }

    /// Counts lines that could not be written: whoever writes the next one says how many they were.
    ///
    /// # Errors
    /// When that cannot be written down either.
    pub fn lose(root: &Root, lines: u64) -> Result<(), AuditError> {
        let _locked = locked(root)?;
        lost::set(root, lost::count(root)?.saturating_add(lines))
    }

    /// Makes sure that lines which are lost later can be counted.
    ///
    /// # Errors
    /// When there is no room for the count.
    pub fn prepare_for_loss(&self) -> Result<(), AuditError> {
        lost::prepare(self.root, &self.file)
    }

    fn store_head(&self, head: Head) -> Result<(), AuditError> {
        let (path, new) = (RelPath::new(HEAD)?, RelPath::new(NEW_HEAD)?);
        match self.new_head(head, &path, &new) {
            Ok(true) => return Ok(()),
            Ok(false) => {}
            Err(error) => tracing::debug!(error = chain(&error), "the head of the audit log is written in place"),
        }
        self.root.remove_tree(&new)?;
        let failed = |source| AuditError::Io { path: shown(self.root, HEAD), source };
        let text = head.encode();
        // Whoever writes the log could not read one of this user's, or the disk is full: it has its room. It is shorter than
        // what a disk writes at once.
        match self.root.open_with(&path, Follow::Never, OFlags::WRONLY | OFlags::NONBLOCK, 0) {
            Ok(file) => {
                let written = file.write_all_at(text.as_bytes(), 0).and_then(|()| file.set_len(text.len() as u64));
                written.and_then(|()| file.sync_data()).map_err(failed)
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// A new file in its place; false where it cannot be made for whom the log belongs to.
    fn new_head(&self, head: Head, path: &RelPath, new: &RelPath) -> Result<bool, AuditError> {
        let failed = |source| AuditError::Io { path: shown(self.root, HEAD), source };
        self.root.remove_tree(new)?;
        let mut file = self.root.create_new(new, 0o600)?;
        if !hand_over(&file, &self.file).map_err(failed)? {
            return Ok(false);
        }
        file.write_all(head.encode().as_bytes()).and_then(|()| file.sync_data()).map_err(failed)?;
        self.root.rename(new, path, RenameFlags::empty())?;
        Ok(true)
    }

    /// Takes an unfinished line away. The lines that tell of what is missing, and how many were lost.
    fn gaps(&self) -> Result<(Vec<AuditRecord>, u64), AuditError> {
        let mut gaps = Vec::new();
        if let Some(end) = self.torn {
            self.file.set_len(end).map_err(io_error(self.root))?;
            gaps.push(AuditRecord::unfinished());
        }
        // What cannot be read keeps nobody from writing.
        let lost = lost::count(self.root).unwrap_or_else(|error| {
            told(Err(error));
            0
        });
        gaps.extend((lost > 0).then(|| AuditRecord::lost(lost)));
        Ok((gaps, lost))
    }

    /// Whether the head is to be signed, when there is something that is not signed yet.
    fn is_due(&self, sign: Sign, head: Head) -> bool {
        let Some(signing) = &self.settings.signing else { return false };
        let (line, time) = self.signed.unwrap_or_default();
        let unsigned = head.lines.saturating_sub(line);
        if unsigned == 0 || sign == Sign::Never {
            return false;
        }
        let since = time.and_then(|time| (Utc::now() - time).to_std().ok());
        // Without a time it was never signed, or long ago; a clock that was set back is left to the number of lines.
        let late = time.is_none() || since.is_some_and(|since| since >= signing.every);
        sign == Sign::Now || unsigned >= signing.lines || late
    }
}

fn unsigned(root: &Root) -> impl Fn(SignError) -> AuditError + '_ {
    |source| AuditError::Sign { root: crate::error::shown(root.shown()).to_string(), source }
}

/// What fails behind the lines makes none of them undone.
fn told(beside: Result<(), AuditError>) {
    if let Err(error) = beside {
        tracing::warn!(error = chain(&error), "the audit log is written, but not what is kept beside it");
    }
}

/// Gives a new file to whom the log belongs: another user may tell something in it, as root does who checks. False where that is not
/// allowed.
pub(super) fn hand_over(new: &File, log: &File) -> std::io::Result<bool> {
    let (own, log) = (Metadata::of(new)?, Metadata::of(log)?);
    if own.uid == log.uid {
        return Ok(true);
    }
    match rustix::fs::fchown(new, Some(Uid::from_raw(log.uid)), Some(Gid::from_raw(log.gid))) {
        Ok(()) => Ok(true),
        Err(Errno::PERM) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

/// The file that has the log's name, locked.
fn locked(root: &Root) -> Result<(File, Metadata), AuditError> {
    let failed = io_error(root);
    let path = RelPath::new(LOG)?;
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::APPEND | OFlags::NONBLOCK;
    loop {
        let file = root.open_with(&path, Follow::Never, flags, 0o600)?;
        if Metadata::of(&file).map_err(&failed)?.kind != FileKind::Regular {
            return Err(broken(root, 0, "it is not a regular file"));
        }
        rustix::fs::flock(&file, FlockOperation::LockExclusive).map_err(|errno| failed(errno.into()))?;
        // RACE: who waited may hold what was rotated meanwhile; its name leads to another file then.
        let (own, named) = (Metadata::of(&file).map_err(&failed)?, root.stat(&path, Follow::Never));
        match named {
            Ok(named) if (named.device, named.inode) == (own.device, own.inode) => return Ok((file, own)),
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(error.into()),
        }
    }
}
