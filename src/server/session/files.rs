//! Open files, and what is done with them: the work of the lanes.

use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::FileExt as _;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::buffer::spare_capacity;
use rustix::io::Errno;

use super::content::{Shared, locked, removed, size_of};
use super::lanes::lane_of;
use super::site::{Site, drop_set_id};
use super::{Answer, Failed, Status, attributes_packet, statvfs_packet};
use crate::audit::Outcome;
use crate::path::RelPath;
use crate::root::{Change, FileKind, Follow, Metadata, RootError};
use crate::server::gate::Need;
use crate::wire::buffer::{Reader, Short, Writer};
use crate::wire::sftp::{Attributes, DATA_MAX, Packet, packet};

/// A file that a client opened.
pub(super) struct OpenFile {
    pub(super) file: File,
    /// Which of the lanes works on it.
    pub(super) lane: usize,
    pub(super) kind: FileKind,
    pub(super) device: u64,
    pub(super) inode: u64,
    pub(super) append: bool,
    site: Arc<Site>,
    /// Of a file that was opened to be written.
    arrival: Option<Mutex<Arrival>>,
    /// What is known of its content, with the other handles that write it.
    content: Option<Shared>,
    /// What it was called when it was opened to be written.
    opened: Option<RelPath>,
}

/// What is known of content that arrives through one handle.
struct Arrival {
    /// Made by this handle under a rule: private until it is closed.
    private: bool,
    /// Whether anything was written yet.
    touched: bool,
    /// The mode that the client asked for.
    asked: u32,
    /// What was there, where it was not made by this handle.
    before: Option<Metadata>,
}

/// How a file was opened to be written.
#[derive(Debug, Clone)]
pub(super) struct Opening {
    /// Where, without links.
    pub(super) path: RelPath,
    pub(super) append: bool,
    /// Made by this open.
    pub(super) touched: bool,
    /// Made under a rule: private until it is closed.
    pub(super) private: bool,
    /// The mode that the client asked for, where the file is new.
    pub(super) asked: Option<u32>,
}

/// What is known of the name of an open file.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Name {
    /// It is called so.
    Known,
    /// It was; that name is no more.
    Removed,
    /// It was; it lies outside of the root now.
    Outside,
    /// It was.
    Unknown,
}

impl Name {
    /// What the log says of it.
    fn story(self) -> &'static str {
        match self {
            Name::Known | Name::Unknown => "",
            Name::Removed => "that name was removed before it was closed",
            Name::Outside => "it was moved out of the root before it was closed",
        }
    }
}

impl OpenFile {
    /// `opening` is `None` for a file that is only read.
    pub(super) fn new(file: File, opening: Option<Opening>, site: &Arc<Site>) -> Result<OpenFile, Failed> {
        let found = Metadata::of(&file)?;
        let (proves, exclusive) = (site.recorder.is_some(), site.allowance.is_some());
        let content = opening.as_ref().map(|_| site.contents.open(&file, &found, proves, exclusive));
        let content = content.transpose()?;
        if opening.is_some() {
            drop_set_id(&file, &found);
        }
        let private = opening.as_ref().is_some_and(|opening| opening.private);
        if private {
            site.private().insert((found.device, found.inode));
        }
        let append = opening.as_ref().is_some_and(|opening| opening.append);
        let arrival = opening.as_ref().map(|&Opening { touched, asked, .. }| {
            // What was made for this has no mode of before.
            let before = asked.is_none().then_some(found);
            Mutex::new(Arrival { private, touched, asked: asked.unwrap_or(found.mode), before })
        });
        let (lane, site, opened) = (lane_of(&found), Arc::clone(site), opening.map(|opening| opening.path));
        let Metadata { kind, device, inode, .. } = found;
        Ok(OpenFile { file, lane, kind, device, inode, append, site, arrival, content, opened })
    }

    fn arrival(&self) -> Option<MutexGuard<'_, Arrival>> {
        self.arrival.as_ref().map(|arrival| arrival.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// It is not as it was opened: what becomes of it is told.
    fn mark(&self) {
        self.arrival().iter_mut().for_each(|arrival| arrival.touched = true);
    }

    /// Whether room has to be taken for what it gets.
    pub(super) fn is_limited(&self) -> bool {
        self.content.is_some() && self.site.allowance.is_some()
    }

    /// The room for `length` bytes at `offset`, as far as the file grows by them; none where it is not limited.
    fn growth(&self, offset: u64, length: u64) -> Result<u64, Failed> {
        let Some(content) = self.content.as_ref().filter(|_| self.is_limited()) else { return Ok(0) };
        if locked(content).is_removed {
            return Err(removed());
        }
        // Nobody else changes it meanwhile, and this session does one thing after the other.
        let size = size_of(&self.file).ok_or(Failed::from(Status::Failure))?;
        let end = if self.append { size } else { offset }.saturating_add(length);
        Ok(end.saturating_sub(size))
    }

    /// Takes that room.
    pub(super) fn grow(&self, offset: u64, length: u64) -> Result<(), Failed> {
        self.site.take(self.growth(offset, length)?, 0)
    }

    /// Whether it is there to be taken.
    pub(super) fn has_room(&self, offset: u64, length: u64) -> Result<(), Failed> {
        self.site.has(self.growth(offset, length)?)
    }

    /// Its content is about to change. That of a file that was there is told before: should the session be killed, nothing else says so.
    pub(super) fn touch(&self) -> Result<(), Failed> {
        let (Some(mut arrival), Some(content)) = (self.arrival(), &self.content) else { return Ok(()) };
        if !locked(content).told {
            // It may have waited on its lane since it was let pass.
            self.site.recorded(0)?;
        }
        arrival.touched = true;
        if !std::mem::replace(&mut locked(content).told, true) && self.site.recorder.is_some() {
            let found = Metadata::of(&self.file)?;
            if found.size > 0 {
                self.site.note_intent(&self.path()?.0, &found);
            }
        }
        Ok(())
    }

    /// Its content changes in a way that is not followed.
    pub(super) fn lose(&self) -> Result<(), Failed> {
        self.touch()?;
        self.content.iter().for_each(|content| locked(content).lost());
        Ok(())
    }

    /// Cuts it off at its start, as it is opened.
    pub(super) fn empty(&self) -> Result<(), Failed> {
        self.mark();
        self.site.resize(&self.file, &self.path()?.0, 0)
    }

    /// What it is called; where that is not known, what it was called when it was opened: what it is called besides cannot be found
    /// out, and gets the same by the rules.
    fn path(&self) -> Result<(RelPath, Name), Failed> {
        let error = match self.site.root.path_of(&self.file) {
            Ok(Some(path)) => return Ok((path, Name::Known)),
            Ok(None) => return Err(Status::Failure.into()),
            Err(error) => error,
        };
        let Some(opened) = self.opened.clone() else { return Err(error.into()) };
        let is_still_there = |found: Metadata| (found.device, found.inode) == (self.device, self.inode);
        let name = match error.errno().map(Errno::from_raw_os_error) {
            _ if self.site.root.stat(&opened, Follow::Never).is_ok_and(is_still_there) => Name::Known,
            Some(Errno::NOENT) => Name::Removed,
            Some(Errno::XDEV) => Name::Outside,
            _ => Name::Unknown,
        };
        Ok((opened, name))
    }

    fn read(&self, id: u32, offset: u64, length: u32) -> Answer {
        let length = (length as usize).min(DATA_MAX);
        // The data is read to where it is sent from.
        let mut reply = Vec::with_capacity(READ_HEAD + length);
        reply.extend_from_slice(&[0; READ_HEAD]);
        let count = match length {
            0 => 0,
            _ => rustix::io::pread(&self.file, spare_capacity(&mut reply), offset)?,
        };
        if count == 0 && length > 0 {
            return Err(Status::EndOfFile.into());
        }
        reply.truncate(READ_HEAD + length);
        let count = reply.len() - READ_HEAD;
        let head = Writer::new(packet::DATA).u32(id).u32(count as u32).finish();
        reply[..READ_HEAD].copy_from_slice(&head);
        reply[..4].copy_from_slice(&((READ_HEAD - 4 + count) as u32).to_be_bytes());
        Ok(reply)
    }

    fn write(&self, id: u32, offset: u64, data: &[u8]) -> Answer {
        self.grow(offset, data.len() as u64)?;
        self.touch()?;
        let mut content = self.content.as_ref().map(locked);
        if let Some(content) = &mut content {
            if self.append { content.lost() } else { content.writes(&self.file, offset, data) }
        }
        let written = if self.append { (&self.file).write_all(data) } else { self.file.write_all_at(data, offset) };
        if let Some(content) = &mut content {
            if written.is_ok() { content.changed(&self.file) } else { content.lost() }
        }
        if let Err(error) = written {
            self.site.loosen();
            return Err(error.into());
        }
        Ok(Status::Ok.packet(id))
    }

    /// A mode for a file that is still private is kept for its close.
    fn set(&self, id: u32, mut asked: Attributes) -> Answer {
        // What was not made by this handle is there already.
        if self.arrival.is_none() && !Need::Change.allowed(self.site.rights) {
            let (path, _) = self.path()?;
            return Err(self.site.not_allowed(Need::Change, Some(path.as_bytes())));
        }
        if let Some(mut arrival) = self.arrival()
            && let Some(mode) = asked.mode
        {
            arrival.asked = mode & 0o7777;
            if arrival.private {
                asked.mode = None;
            }
        }
        if asked.size.is_some() {
            self.mark();
        }
        if asked != Attributes::default() {
            self.site.recorded(0)?;
            let (path, name) = self.path()?;
            if name == Name::Outside {
                return Err(Errno::XDEV.into());
            }
            self.site.guard(&path)?;
            self.site.set(&self.file, &path, &asked)?;
        }
        Ok(Status::Ok.packet(id))
    }

    /// What was written gets what the rules say of the name it has by now.
    fn close(&self, id: u32) -> Answer {
        let Some(arrival) = self.arrival().filter(|arrival| arrival.touched) else { return Ok(Status::Ok.packet(id)) };
        if arrival.private {
            self.site.private().remove(&(self.device, self.inode));
        }
        let found = Metadata::of(&self.file)?;
        if found.kind != FileKind::Regular || found.links == 0 {
            return Ok(Status::Ok.packet(id));
        }
        if self.site.policy.is_empty() && self.site.recorder.is_none() {
            return Ok(Status::Ok.packet(id));
        }
        let (path, name) = self.path()?;
        // What it is given changes it, too.
        let digest = self.content.as_ref().and_then(|content| {
            let mut content = locked(content);
            content.told = false;
            content.digest(&self.file, found.size)
        });
        let digest = digest.filter(|_| name == Name::Known);
        let note = || self.site.note_file(name.story(), "publish", &path, &self.file, digest, arrival.before.as_ref());
        // What lies outside of the root is not the rules' affair.
        if name == Name::Outside {
            note();
            return Ok(Status::Ok.packet(id));
        }
        let grant = self.site.grant(&path, false, arrival.asked & 0o777, Some(&found))?;
        if grant.ruled() && !self.site.is_private(&found) {
            grant.give(&self.file)?;
        } else if arrival.private {
            // Renamed to where no rule is.
            Change { mode: Some(grant.mode), ..Change::default() }.apply(&self.file)?;
        }
        self.content.iter().for_each(|content| locked(content).changed(&self.file));
        note();
        Ok(Status::Ok.packet(id))
    }

    /// The session ended before it was closed. What was written stays, and is told.
    pub(super) fn cut_off(&self) {
        let Some(arrival) = self.arrival().filter(|arrival| arrival.touched) else { return };
        // What has no name any more is nobody's.
        if self.kind != FileKind::Regular || Metadata::of(&self.file).is_ok_and(|found| found.links == 0) {
            return;
        }
        let Ok((path, name)) = self.path() else { return };
        let before = arrival.before.as_ref();
        self.site.note_as(name.story(), "publish", &path, &self.file, before, |record| {
            record.result = Some(Outcome::Failure);
            record.reason = Some("the session ended before it was closed".to_owned());
        });
    }
}

impl Drop for OpenFile {
    fn drop(&mut self) {
        if let Some(content) = &self.content {
            self.site.contents.close(content);
        }
    }
}

/// Length, type, id, length of the data.
const READ_HEAD: usize = 4 + 1 + 4 + 4;

/// What is to be done with an open file; the fields of a request.
pub(super) enum Work {
    Read {
        offset: u64,
        length: u32,
    },
    /// The data is at the end of the packet but for what follows it, which nobody should send.
    Write {
        offset: u64,
        length: usize,
        after: usize,
    },
    Stat,
    Set(Attributes),
    Sync,
    Filesystem,
    Close,
}

impl Work {
    pub(super) fn read(reader: &mut Reader<'_>) -> Result<Work, Short> {
        Ok(Work::Read { offset: reader.u64()?, length: reader.u32()? })
    }

    pub(super) fn write(reader: &mut Reader<'_>) -> Result<Work, Short> {
        let (offset, length) = (reader.u64()?, reader.string()?.len());
        Ok(Work::Write { offset, length, after: reader.0.len() })
    }

    pub(super) fn set(reader: &mut Reader<'_>) -> Result<Work, Short> {
        Attributes::decode(reader).map(Work::Set)
    }
}

/// A request on an open file.
pub(super) struct Job {
    pub(super) id: u32,
    pub(super) file: Arc<OpenFile>,
    pub(super) work: Work,
    pub(super) packet: Packet,
}

impl Job {
    /// Does it; the reply.
    pub(super) fn run(self) -> Vec<u8> {
        let Job { id, file, work, packet } = self;
        let answer = match work {
            Work::Read { offset, length } => file.read(id, offset, length),
            Work::Write { offset, length, after } => file.write(id, offset, &packet.tail(length + after)[..length]),
            Work::Stat => Metadata::of(&file.file).map_err(Failed::from).map(|found| attributes_packet(id, &found)),
            Work::Set(asked) => file.set(id, asked),
            Work::Sync => file.file.sync_all().map_err(Failed::from).map(|()| Status::Ok.packet(id)),
            Work::Filesystem => statvfs(&file, id).map_err(Failed::from),
            Work::Close => file.close(id),
        };
        answer.unwrap_or_else(|failed| failed.packet(id))
    }
}

fn statvfs(file: &OpenFile, id: u32) -> Result<Vec<u8>, RootError> {
    file.site.root.filesystem(Some(&file.file)).map(|found| statvfs_packet(id, &file.site.limited(found)))
}
