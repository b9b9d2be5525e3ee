//! Requests that name paths, and those about the session as a whole. Each runs alone, when nothing else is in flight.

use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::sync::Arc;

use rustix::fs::{Dir, OFlags, RenameFlags};
use rustix::io::Errno;

use super::files::{OpenFile, Opening};
use super::site::{STATE, Spot, drop_set_id, times};
use super::{Answer, Directory, Failed, HANDLES_MAX, Handle, Session, Status, attributes_packet, statvfs_packet};
use crate::path::{InvalidPath, PathProblem, RelPath};
use crate::root::{Change, FileKind, Follow, Metadata};
use crate::scan::names;
use crate::server::attributes;
use crate::server::gate::Need;
use crate::wire::buffer::{Reader, Writer};
use crate::wire::sftp::{Attributes, DATA_MAX, PACKET_LIMIT, open, packet};

/// Entries in one reply to READDIR.
const BATCH: usize = 100;
const LINKS_MAX: usize = 40;
/// For a file that is private until a rule says what it gets.
const PRIVATE: u32 = 0o600;
const OK: Status = Status::Ok;

impl From<InvalidPath> for Failed {
    fn from(error: InvalidPath) -> Self {
        match error.problem {
            PathProblem::NameTooLong | PathProblem::PathTooLong => Status::BadMessage.into(),
            _ => Status::NoSuchFile.into(),
        }
    }
}

fn name_packet(id: u32, name: &[u8]) -> Vec<u8> {
    Writer::new(packet::NAME).u32(id).u32(1).string(name).string(name).u32(0).finish()
}

fn done(id: u32) -> Answer {
    Ok(OK.packet(id))
}

/// Whether a path is of a directory by the way it ends, as it is for the kernel.
fn ends_in_slash(path: &[u8]) -> bool {
    path.ends_with(b"/") || path.ends_with(b"/.")
}

impl Session {
    /// A client's path; `None` is the top. Where it ends in a slash it is the directory that its last name is of, or leads to.
    fn place(&self, path: &[u8]) -> Result<Option<RelPath>, Failed> {
        match self.named(path)? {
            Some(place) if ends_in_slash(path) => self.directory(&place),
            place => Ok(place),
        }
    }

    /// Where a directory lies, without links.
    fn directory(&self, path: &RelPath) -> Result<Option<RelPath>, Failed> {
        let directory = self.site.root.open_with(path, Follow::Inside, OFlags::PATH | OFlags::DIRECTORY, 0)?;
        Ok(self.site.root.path_of(&directory)?)
    }

    /// The same by its names alone, as if no slash were at its end. `..` is resolved as the kernel does it: after the links
    /// before it.
    fn named(&self, path: &[u8]) -> Result<Option<RelPath>, Failed> {
        let whole = if path.starts_with(b"/") { path.to_vec() } else { [&self.start, &b"/"[..], path].concat() };
        let mut place: Option<RelPath> = None;
        for part in whole.split(|&byte| byte == b'/') {
            place = match (part, place) {
                (b"" | b".", place) => place,
                (b"..", None) => None,
                (b"..", Some(place)) => self.directory(&place)?.and_then(|path| path.parent()),
                (part, None) => Some(RelPath::new(part)?),
                (part, Some(place)) => Some(place.join(part)?),
            };
        }
        Ok(place)
    }

    /// The next field as a path that exists or could; no file has an empty name.
    fn path(&self, reader: &mut Reader<'_>) -> Result<Option<RelPath>, Failed> {
        match reader.string()? {
            b"" => Err(Status::NoSuchFile.into()),
            path => self.place(path),
        }
    }

    /// The place of something that is there, and is to be written. A slash is at the end of a directory, and not of a link to
    /// one: it is its name that is taken away or given.
    fn spot(&self, path: &[u8]) -> Result<Spot, Failed> {
        let spot = self.spot_of_directory(path)?;
        if path.ends_with(b"/") && spot.holder.stat(&spot.name, Follow::Never)?.kind != FileKind::Directory {
            return Err(Errno::NOTDIR.into());
        }
        Ok(spot)
    }

    /// The place of a file or link that is yet to be made.
    fn spot_to_make(&self, path: &[u8]) -> Result<Spot, Failed> {
        let spot = self.spot_of_directory(path)?;
        if path.ends_with(b"/") {
            spot.holder.stat(&spot.name, Follow::Never)?;
            return Err(Errno::EXIST.into());
        }
        Ok(spot)
    }

    /// The place of a directory, which may have a slash at its end before it is there.
    fn spot_of_directory(&self, path: &[u8]) -> Result<Spot, Failed> {
        if path.ends_with(b"/.") {
            self.place(path)?;
            return Err(Failed::because(Status::Failure, "a path that ends in '/.' has no name to be changed"));
        }
        let place = if path.is_empty() { return Err(Status::NoSuchFile.into()) } else { self.named(path)? };
        self.site.spot(&place.ok_or(Failed::from(Status::Failure))?)
    }

    pub(super) fn open(&mut self, id: u32, reader: &mut Reader<'_>) -> Answer {
        let path = reader.string()?;
        let wanted = reader.u32()?;
        let asked = Attributes::decode(reader)?;
        let writes = wanted & (open::WRITE | open::APPEND | open::CREATE | open::TRUNCATE) != 0;
        // Without a flag it is read.
        let reads = wanted & open::READ != 0 || !writes;
        let making = wanted & open::CREATE != 0;
        let needs = [(reads, Need::Read), (making, Need::Create), (writes && !making, Need::Change)];
        let missing = needs.into_iter().find(|(wanted, need)| *wanted && !need.allowed(self.config.rights));
        if let Some((_, need)) = missing {
            return Err(self.site.not_allowed(need, Some(path).filter(|_| writes)));
        }
        if writes {
            self.recorded()?;
        }
        if making && path.ends_with(b"/") {
            return Err(Errno::ISDIR.into());
        }
        let path = if path.is_empty() { None } else { self.place(path)? }.ok_or(Failed::from(Status::NoSuchFile))?;
        self.has_room()?;
        let file = if writes {
            self.open_to_write(&path, wanted, asked.mode)?
        } else {
            OpenFile::new(self.site.root.open_read(&path, Follow::Inside)?, None, &self.site)?
        };
        // Nothing is read from a FIFO or a socket: it would never end.
        match file.kind {
            FileKind::Fifo | FileKind::Socket => Err(Failed::because(Status::Failure, "not a regular file")),
            FileKind::BlockDevice | FileKind::CharacterDevice if self.config.confine => {
                Err(Failed::because(Status::PermissionDenied, "a device"))
            }
            _ => Ok(self.keep(id, Handle::File(Arc::new(file)))),
        }
    }

    /// What is there is opened first and looked at, so that nothing is emptied that should not be. A new file is made by
    /// itself: a link that leads nowhere is not written through.
    fn open_to_write(&self, path: &RelPath, wanted: u32, mode: Option<u32>) -> Result<OpenFile, Failed> {
        let has = |flag: u32| wanted & flag != 0;
        let append = has(open::APPEND);
        // Who may not change what is there makes what is not, and nothing else.
        let only_new = !Need::Change.allowed(self.site.rights);
        let mut flags = match (has(open::READ), has(open::WRITE)) {
            (true, true) => OFlags::RDWR,
            (false, true) => OFlags::WRONLY,
            _ => OFlags::RDONLY,
        } | OFlags::NONBLOCK
            | OFlags::NOCTTY;
        flags |= if append { OFlags::APPEND } else { OFlags::empty() };
        // RACE: what is missing may be made, and what is there removed, between the two attempts; then once more.
        for _ in 0..4 {
            let must_be_new = only_new || (has(open::CREATE) && has(open::EXCLUSIVE));
            if !must_be_new {
                match self.site.root.open_with(path, Follow::Inside, flags, 0) {
                    Ok(file) => {
                        let real = self.site.root.path_of(&file)?.ok_or(Failed::from(Status::Failure))?;
                        self.site.guard(&real)?;
                        let opening = Opening { path: real, append, touched: false, private: false, asked: None };
                        let opened = OpenFile::new(file, Some(opening), &self.site)?;
                        if has(open::TRUNCATE) && opened.kind == FileKind::Regular {
                            opened.empty()?;
                        }
                        return Ok(opened);
                    }
                    Err(error) if error.kind() == io::ErrorKind::NotFound && has(open::CREATE) => {}
                    Err(error) => return Err(error.into()),
                }
            }
            match self.create(path, flags, append, mode) {
                Err(Failed::Status(_, Some(Errno::EXIST), _)) if only_new => {
                    return Err(self.site.not_allowed(Need::Change, Some(path.as_bytes())));
                }
                Err(Failed::Status(_, Some(Errno::EXIST), _)) if !has(open::EXCLUSIVE) => {}
                other => return other,
            }
        }
        Err(Failed::because(Status::Failure, "a link that leads nowhere is not written through"))
    }

    fn create(&self, path: &RelPath, flags: OFlags, append: bool, mode: Option<u32>) -> Result<OpenFile, Failed> {
        let spot = self.site.spot(path)?;
        // Without a mode: what a umask of 022 leaves, where no umask comes in.
        let default = if self.site.policy.is_empty() { 0o666 } else { 0o644 };
        let asked = mode.unwrap_or(default) & 0o7777;
        let grant = self.site.grant(&spot.path, false, asked, None)?;
        let mode = if grant.ruled() { PRIVATE } else { grant.mode };
        let flags = flags | OFlags::CREATE | OFlags::EXCL;
        let file = self.site.making(|| spot.holder.open_with(&spot.name, Follow::Never, flags, mode))?;
        let opening = Opening { path: spot.path, append, touched: true, private: grant.ruled(), asked: Some(asked) };
        OpenFile::new(file, Some(opening), &self.site)
    }

    pub(super) fn stat(&mut self, id: u32, reader: &mut Reader<'_>, follow: Follow) -> Answer {
        let found = match self.path(reader)? {
            None => self.site.root.stat_root()?,
            Some(path) if follow == Follow::Never => {
                let (holder, name) = self.site.root.holder(&path, Follow::Inside)?;
                holder.stat(&name, Follow::Never)?
            }
            Some(path) => self.site.root.stat(&path, follow)?,
        };
        Ok(attributes_packet(id, &found))
    }

    pub(super) fn setstat(&mut self, id: u32, reader: &mut Reader<'_>, follow: Follow) -> Answer {
        let (path, mut asked) = (reader.string()?, Attributes::decode(reader)?);
        if follow == Follow::Never && asked.size.is_some() {
            return Err(Status::BadMessage.into()); // As OpenSSH has it: a link has no size to set.
        }
        let path = if path.is_empty() { return Err(Status::NoSuchFile.into()) } else { self.place(path)? };
        // The top is its owner's: clients that copy a directory onto it may set its times, and no more.
        let Some(path) = path else { return self.setstat_top(id, &asked) };
        let flags = match asked.size {
            Some(_) => OFlags::WRONLY | OFlags::NONBLOCK | OFlags::NOCTTY,
            None => OFlags::PATH,
        };
        let file = if follow == Follow::Never {
            let (holder, name) = self.site.root.holder(&path, Follow::Inside)?;
            holder.open_with(&name, Follow::Never, flags, 0)?
        } else {
            self.site.root.open_with(&path, follow, flags, 0)?
        };
        let Some(real) = self.site.root.path_of(&file)? else { return self.setstat_top(id, &asked) };
        self.site.guard(&real)?;
        if asked.size.is_some() {
            drop_set_id(&file, &Metadata::of(&file)?);
        }
        asked.extended.clear();
        self.site.set(&file, &real, &asked)?;
        done(id)
    }

    fn setstat_top(&self, id: u32, asked: &Attributes) -> Answer {
        let found = self.site.root.stat_root()?;
        let same_mode = asked.mode.is_none_or(|mode| mode & 0o7777 == found.mode);
        let same_owner = asked.owner.is_none_or(|owner| owner == (found.uid, found.gid));
        if asked.size.is_some() || !same_mode || !same_owner {
            return Err(Failed::because(Status::PermissionDenied, "the owner and mode of '/' are the server's"));
        }
        let directory = self.site.root.open_dir(None, Follow::Never)?;
        Change { times: times(asked), ..Change::default() }.apply(&directory)?;
        done(id)
    }

    pub(super) fn opendir(&mut self, id: u32, reader: &mut Reader<'_>) -> Answer {
        let path = self.path(reader)?;
        self.has_room()?;
        let opened = self.site.root.open_dir(path.as_ref(), Follow::Inside)?;
        let (here, top) = (Metadata::of(&opened)?, self.site.root.stat_root()?);
        let is_top = (here.device, here.inode) == (top.device, top.inode);
        Ok(self.keep(id, Handle::Directory(Directory { entries: Dir::new(opened)?, is_top })))
    }

    pub(super) fn readdir(&mut self, id: u32, reader: &mut Reader<'_>) -> Answer {
        let key = reader.string()?;
        let Some(Handle::Directory(directory)) = self.handles.get_mut(&super::handle_number(key)) else {
            return Err(Status::Failure.into());
        };
        let (mut count, mut body) = (0, Writer::default());
        while let Some(entry) = if count < BATCH { directory.entries.next() } else { None } {
            let entry = entry?;
            let name = entry.file_name().to_bytes();
            // '..' of the top is shown as '.': nothing is told of what is above it.
            let at = if name == b".." && directory.is_top { &b"."[..] } else { name };
            if name == STATE {
                continue;
            }
            // RACE: what has gone since the directory was read is left out.
            if let Ok(file) = Metadata::at(&directory.entries.fd()?, at) {
                body.string(name).string(&attributes::long_name(name, &file, &mut self.owners));
                attributes::of(&file).encode(&mut body);
                count += 1;
            }
        }
        if count == 0 {
            return Err(Status::EndOfFile.into());
        }
        Ok(Writer::new(packet::NAME).u32(id).u32(count as u32).bytes(&body.into_bytes()).finish())
    }

    pub(super) fn mkdir(&mut self, id: u32, reader: &mut Reader<'_>) -> Answer {
        let (path, asked) = (reader.string()?, Attributes::decode(reader)?);
        let spot = self.spot_of_directory(path)?;
        let default = if self.site.policy.is_empty() { 0o777 } else { 0o755 };
        let grant = self.site.grant(&spot.path, true, asked.mode.unwrap_or(default) & 0o7777, None)?;
        self.site.making(|| spot.holder.mkdir(&spot.name, if grant.ruled() { 0o700 } else { grant.mode }))?;
        let made = spot.holder.open_with(&spot.name, Follow::Never, OFlags::PATH | OFlags::DIRECTORY, 0)?;
        if grant.ruled()
            && let Err(error) = grant.give(&made)
        {
            // What cannot have its permissions does not stay.
            spot.holder.rmdir(&spot.name)?;
            self.site.give_back(0, 1);
            return Err(error.into());
        }
        self.site.note_file("mkdir", "publish", &spot.path, &made, None, None);
        done(id)
    }

    pub(super) fn remove(&mut self, id: u32, reader: &mut Reader<'_>, directory: bool) -> Answer {
        let spot = self.spot(reader.string()?)?;
        let there = spot.holder.stat(&spot.name, Follow::Never).ok();
        let going = self.site.going(&spot, there.as_ref())?;
        if directory {
            spot.holder.rmdir(&spot.name)?
        } else {
            self.site.keeping_named(&spot, || Ok(spot.holder.unlink(&spot.name)?))?
        }
        self.site.gone(there.as_ref(), going);
        self.site.note("", "remove", &spot.path, |record| record.before = there.as_ref().map(super::site::before));
        done(id)
    }

    pub(super) fn rename(&mut self, id: u32, reader: &mut Reader<'_>, replace: bool) -> Answer {
        let (from, to) = (reader.string()?, reader.string()?);
        let _turn = self.site.turn()?;
        let is_directory = to.ends_with(b"/");
        let (from, to) = (self.spot(from)?, self.spot_of_directory(to)?);
        if is_directory && from.holder.stat(&from.name, Follow::Never)?.kind != FileKind::Directory {
            return Err(Errno::NOTDIR.into());
        }
        self.site.links_stay(&from, &to.path)?;
        let replaced = to.holder.stat(&to.name, Follow::Never).ok();
        if !replace && replaced.is_some() {
            return Err(Errno::EXIST.into());
        }
        let moved = self.found(&from);
        let inode = |found: &Metadata| (found.device, found.inode);
        // Two names of one file stay as they are.
        let lost = replaced.as_ref().filter(|replaced| moved.as_ref().map(inode) != Some(inode(replaced)));
        let going = self.site.going(&to, lost)?;
        self.site.keeping_named(&from, || {
            if self.site.policy.is_empty() {
                return rename(&from, &to, replace);
            }
            // What is refused is refused before anything is changed.
            self.site.can_conform(&from, &to.path)?;
            let mut given = 0;
            // The permissions come before the name: at no moment has a file a name and another's permissions.
            let done = self.site.conform(&from, &to.path, &mut given).and_then(|()| rename(&from, &to, replace));
            if done.is_err() && given > 0 {
                self.site.conform_again(&from, &to.path);
            }
            done
        })?;
        self.site.gone(lost, going);
        let how = format!("renamed from '{}'", crate::error::Escaped(from.path.as_bytes()));
        match to.holder.open_with(&to.name, Follow::Never, OFlags::PATH, 0) {
            Ok(file) => self.site.note_file(&how, "publish", &to.path, &file, None, replaced.as_ref()),
            Err(_) => self.site.note(&how, "publish", &to.path, |_| {}),
        }
        done(id)
    }

    pub(super) fn readlink(&mut self, id: u32, reader: &mut Reader<'_>) -> Answer {
        let path = self.path(reader)?.ok_or(Failed::from(Status::BadMessage))?;
        let (holder, name) = self.site.root.holder(&path, Follow::Inside)?;
        Ok(name_packet(id, &holder.read_link(&name)?))
    }

    /// The target comes first, as in OpenSSH and unlike the draft.
    pub(super) fn symlink(&mut self, id: u32, reader: &mut Reader<'_>) -> Answer {
        let (target, path) = (reader.string()?, reader.string()?);
        let _turn = self.site.turn()?;
        let spot = self.spot_to_make(path)?;
        if target.contains(&0) {
            return Err(Status::NoSuchFile.into());
        }
        self.site.link_stays(&spot.path, target)?;
        self.site.making(|| spot.holder.symlink(target, &spot.name))?;
        self.site.note("symlink", "publish", &spot.path, |_| {});
        done(id)
    }

    pub(super) fn hardlink(&mut self, id: u32, reader: &mut Reader<'_>) -> Answer {
        let (from, to) = (reader.string()?, reader.string()?);
        let _turn = self.site.turn()?;
        let (from, to) = (self.spot(from)?, self.spot_to_make(to)?);
        if !self.site.policy.is_empty() {
            let found = from.holder.stat(&from.name, Follow::Never)?;
            let grant = |path| self.site.grant(path, false, found.mode, Some(&found));
            if grant(&from.path)? != grant(&to.path)? {
                return Err(self.site.refused(&to.path, "the policy gives the two names different permissions"));
            }
        }
        self.site.links_stay(&from, &to.path)?;
        let link = || Ok(from.holder.hard_link_to(&from.name, &to.holder, &to.name)?);
        self.site.making(|| self.site.keeping_named(&from, link))?;
        self.site.note("hard link", "publish", &to.path, |_| {});
        done(id)
    }

    /// As realpath(3), but the last component need not be there, unless a slash follows it.
    pub(super) fn realpath(&mut self, id: u32, reader: &mut Reader<'_>) -> Answer {
        let path = reader.string()?;
        Ok(name_packet(id, &self.real(path)?))
    }

    fn real(&self, path: &[u8]) -> Result<Vec<u8>, Failed> {
        if !Need::Look.allowed(self.site.rights) {
            return self.lexical(path);
        }
        let shown = |path: Option<&RelPath>| [&b"/"[..], path.map_or(b"", RelPath::as_bytes)].concat();
        let root = &self.site.root;
        let (mut place, must_be_there) = (self.named(path)?, ends_in_slash(path));
        for _ in 0..LINKS_MAX {
            let Some(path) = &place else { return Ok(shown(None)) };
            match root.open_with(path, Follow::Inside, OFlags::PATH, 0) {
                Ok(file) => return Ok(shown(root.path_of(&file)?.as_ref())),
                Err(error) if error.kind() == io::ErrorKind::NotFound && !must_be_there => {}
                Err(error) => return Err(error.into()),
            }
            let (holder, name) = root.holder(path, Follow::Inside)?;
            let above = shown(root.path_of_root(&holder)?.as_ref());
            let below = |name: &[u8]| [above.strip_suffix(b"/").unwrap_or(&above), b"/", name].concat();
            match holder.read_link(&name) {
                // A link that leads nowhere: to where it leads.
                Ok(target) if target.starts_with(b"/") => place = self.named(&target)?,
                Ok(target) => place = self.named(&below(&target))?,
                Err(_) => return Ok(below(name.as_bytes())),
            }
        }
        Err(Errno::LOOP.into())
    }

    /// The same for who may not look: nothing is told of what is there.
    fn lexical(&self, path: &[u8]) -> Result<Vec<u8>, Failed> {
        let whole = if path.starts_with(b"/") { path.to_vec() } else { [&self.start, &b"/"[..], path].concat() };
        let mut parts: Vec<&[u8]> = Vec::new();
        for part in whole.split(|&byte| byte == b'/') {
            match part {
                b"" | b"." => {}
                b".." => drop(parts.pop()),
                part => parts.push(part),
            }
        }
        Ok([&b"/"[..], &parts.join(&b'/')].concat())
    }

    /// What lies at a spot, where that has to be known afterwards.
    fn found(&self, spot: &Spot) -> Option<Metadata> {
        self.site.allowance.as_ref().and_then(|_| spot.holder.stat(&spot.name, Follow::Never).ok())
    }

    /// `~` and `~user` at the front are homes.
    pub(super) fn expand_path(&mut self, id: u32, reader: &mut Reader<'_>) -> Answer {
        let path = reader.string()?;
        let Some(rest) = path.strip_prefix(b"~") else { return Ok(name_packet(id, &self.real(path)?)) };
        let end = rest.iter().position(|&byte| byte == b'/').unwrap_or(rest.len());
        let home = self.home(&rest[..end])?;
        Ok(name_packet(id, &self.real(&[&home, &rest[end..]].concat())?))
    }

    pub(super) fn home_directory(&mut self, id: u32, reader: &mut Reader<'_>) -> Answer {
        let home = self.home(reader.string()?)?;
        Ok(name_packet(id, &self.real(&home)?))
    }

    /// Confined, the client has a home: the top. Nothing is told of the machine's users.
    fn home(&self, user: &[u8]) -> Result<Vec<u8>, Failed> {
        if user.is_empty() {
            return Ok(self.start.clone());
        }
        let user = std::ffi::OsStr::from_bytes(user);
        let found = if self.config.confine { None } else { uzers::get_user_by_name(user) };
        let found = found.ok_or(Failed::because(Status::Failure, "no such user"))?;
        Ok(uzers::os::unix::UserExt::home_dir(&found).as_os_str().as_bytes().to_vec())
    }

    pub(super) fn statvfs(&mut self, id: u32, reader: &mut Reader<'_>) -> Answer {
        let found = match self.path(reader)? {
            None => self.site.root.filesystem(None)?,
            Some(path) => {
                let file = self.site.root.open_with(&path, Follow::Inside, OFlags::PATH, 0)?;
                self.site.root.filesystem(Some(&file))?
            }
        };
        Ok(statvfs_packet(id, &self.site.limited(found)))
    }

    pub(super) fn copy_data(&mut self, id: u32, reader: &mut Reader<'_>) -> Answer {
        let (from, from_at, length) = (reader.string()?, reader.u64()?, reader.u64()?);
        let (to, to_at) = (reader.string()?, reader.u64()?);
        let (from, to) = (self.file(from)?, self.file(to)?);
        if (from.device, from.inode) == (to.device, to.inode) {
            return Err(Failed::because(Status::Failure, "both are the same file"));
        }
        let there = Metadata::of(&from.file)?.size.saturating_sub(from_at);
        // What does not fit as a whole is not begun.
        to.has_room(to_at, if length == 0 { there } else { length.min(there) })?;
        to.lose()?;
        let gone = || self.output.is_gone();
        let copied = super::copy::copy((&from.file, from_at), (&to, to_at), length, &gone);
        copied.inspect_err(|_| self.site.loosen())?;
        done(id)
    }

    pub(super) fn limits(&mut self, id: u32, _: &mut Reader<'_>) -> Answer {
        let data = DATA_MAX as u64;
        let mut writer = Writer::new(packet::EXTENDED_REPLY);
        Ok(writer.u32(id).u64(PACKET_LIMIT as u64).u64(data).u64(data).u64(HANDLES_MAX as u64).finish())
    }

    /// The names of users and groups; an empty one where there is none.
    pub(super) fn users_groups(&mut self, id: u32, reader: &mut Reader<'_>) -> Answer {
        let (users, groups) = (reader.string()?, reader.string()?);
        let user = |id| names::user_name(id).unwrap_or_default().into_bytes();
        let group = |id| names::group_name(id).unwrap_or_default().into_bytes();
        let users = names_of(users, user)?;
        let groups = names_of(groups, group)?;
        Ok(Writer::new(packet::EXTENDED_REPLY).u32(id).string(&users).string(&groups).finish())
    }
}

fn names_of(ids: &[u8], name: impl Fn(u32) -> Vec<u8>) -> Result<Vec<u8>, Failed> {
    let mut names = Writer::default();
    let mut ids = Reader(ids);
    while !ids.0.is_empty() {
        names.string(&name(ids.u32()?));
    }
    Ok(names.into_bytes())
}

/// RACE: on a file system that cannot refuse to replace, something may take the name between the look before and the
/// rename; it is then replaced.
fn rename(from: &Spot, to: &Spot, replace: bool) -> Result<(), Failed> {
    let rename = |flags| from.holder.rename_to(&from.name, &to.holder, &to.name, flags);
    if replace {
        return Ok(rename(RenameFlags::empty())?);
    }
    match rename(RenameFlags::NOREPLACE) {
        Err(error) if error.errno() == Some(Errno::INVAL.raw_os_error()) => Ok(rename(RenameFlags::empty())?),
        other => Ok(other?),
    }
}
