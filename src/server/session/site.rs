//! What the requests of a session share: the tree, what its owner allows, and the record of what was done.
//!
//! What always holds: nothing named `.lockstep`, and nothing below it, is written by a plain client; special bits and
//! owners come from the receiver's rules; who breaks this is refused, and recorded.

use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::{OFlags, StatVfs};

use super::content::{Alone, Contents, Shared, busy, lock, locked, removed};
use super::record::Recorder;
use super::turn::Turn;
use super::walk::{Below, Walk};
use super::{Failed, Status};
use crate::access::{AclLists, Inode};
use crate::audit::{AuditRecord, Before, Outcome};
use crate::config::Rights;
use crate::error::Escaped;
use crate::manifest::{Digest, Timestamp};
use crate::path::RelPath;
use crate::policy::acl::Principal;
use crate::policy::{Decision, Policy};
use crate::root::{Change, FileKind, Follow, Metadata, Root};
use crate::scan::names::UnknownName;
use crate::server::gate::Need;
use crate::server::quota::{Allowance, Amount};
use crate::staging::Ids;
use crate::wire::sftp::Attributes;

/// What lockstep keeps of a root; listings leave it out, so that mirroring clients do not try to delete it.
pub(super) const STATE: &[u8] = b".lockstep";
const SPECIAL: u32 = 0o7000;
const STICKY: u32 = 0o1000;
const SET_ID: u32 = 0o6000;

pub(super) struct Site {
    pub(super) root: Root,
    /// Whether the client sees the root alone.
    pub(super) confined: bool,
    pub(super) policy: Policy,
    pub(super) ids: Ids,
    /// Device and inode of the files that are private until they are closed.
    pub(super) private: Mutex<HashSet<(u64, u64)>>,
    /// Where a log is kept.
    pub(super) recorder: Option<Recorder>,
    pub(super) rights: Rights,
    /// What may still be stored, where that is limited.
    pub(super) allowance: Option<Arc<Allowance>>,
    /// What is known of the files that are open to be written.
    pub(super) contents: Contents,
}

/// A file whose last name is about to be taken away.
pub(super) struct Going {
    file: File,
    /// Where the session has it open to be written itself.
    own: Option<Shared>,
}

/// A name in a directory that is open.
pub(super) struct Spot {
    pub(super) holder: Root,
    pub(super) name: RelPath,
    /// The path from the root, without links; what the rules go by.
    pub(super) path: RelPath,
}

/// What a path gets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Grant {
    pub(super) mode: u32,
    pub(super) uid: Option<u32>,
    pub(super) gid: Option<u32>,
    /// Exactly these ACLs, when a rule decided.
    acl: Option<AclLists>,
}

impl Grant {
    pub(super) fn ruled(&self) -> bool {
        self.acl.is_some()
    }

    /// Gives all of it to something a rule is about: first the owner, whose change clears bits of the mode; then the ACLs,
    /// which a mode would widen.
    pub(super) fn give(&self, file: &File) -> io::Result<()> {
        let inode = Inode::of(file)?;
        if self.uid.is_some() || self.gid.is_some() {
            inode.set_owner(self.uid, self.gid)?;
        }
        self.give_mode(&inode)
    }

    fn give_mode(&self, inode: &Inode) -> io::Result<()> {
        if let Some(lists) = &self.acl {
            inode.set_acls(lists)?;
        }
        inode.set_mode(self.mode)
    }
}

impl Site {
    /// The place that `path` names, for something that is to be written there.
    pub(super) fn spot(&self, path: &RelPath) -> Result<Spot, Failed> {
        self.guard(path)?;
        let (holder, name) = self.root.holder(path, Follow::Inside)?;
        let above = self.root.path_of_root(&holder)?;
        let path = match above {
            None => name.clone(),
            Some(above) => above.join(name.as_bytes()).map_err(|_| Failed::because(Status::BadMessage, "too long"))?,
        };
        self.guard(&path)?;
        Ok(Spot { holder, name, path })
    }

    /// Refuses paths that plain clients do not write.
    pub(super) fn guard(&self, path: &RelPath) -> Result<(), Failed> {
        if path.components().any(|component| component == STATE) {
            return Err(self.refused(path, "what is in '.lockstep' is written by lockstep alone"));
        }
        Ok(())
    }

    /// What a path gets when its sender asks for `asked`. Without a rule: permission bits as asked for, of the special
    /// bits those that `found` has already, and a directory's sticky bit, which only takes rights away.
    pub(super) fn grant(
        &self,
        path: &RelPath,
        directory: bool,
        asked: u32,
        found: Option<&Metadata>,
    ) -> Result<Grant, Failed> {
        let grant = self.weigh(path, directory, asked, found)?;
        let dropped = asked & SPECIAL & !grant.mode;
        if dropped != 0 {
            let reason = format!("special bits {dropped:04o} of the mode asked for are given by rule only");
            self.note("", "refuse", path, |record| record.reason = Some(reason));
        }
        Ok(grant)
    }

    /// The same, before it is asked for.
    fn weigh(&self, path: &RelPath, directory: bool, asked: u32, found: Option<&Metadata>) -> Result<Grant, Failed> {
        let decision = self.policy.decide(path, directory, asked);
        let ruled = decision.rule.is_some();
        let kept = found.map_or(0, |found| found.mode) | if directory { STICKY } else { 0 };
        let mode = if ruled { decision.mode } else { (asked & 0o777) | (asked & kept & SPECIAL) };
        let named = || -> Result<_, UnknownName> {
            let uid = decision.owner.as_ref().map(|name| self.ids.user(name)).transpose()?;
            let gid = decision.group.as_ref().map(|name| self.ids.group(name)).transpose()?;
            Ok((uid, gid, if ruled { Some(self.lists(&decision, directory)?) } else { None }))
        };
        let unknown = "the policy names somebody whom the server does not know";
        let (uid, gid, acl) = named().map_err(|_| Failed::because(Status::Failure, unknown))?;
        Ok(Grant { mode, uid, gid, acl })
    }

    fn lists(&self, decision: &Decision, directory: bool) -> Result<AclLists, UnknownName> {
        let resolve = |who: Principal, name: &str| match who {
            Principal::User => self.ids.user(name),
            Principal::Group => self.ids.group(name),
        };
        let Some(acl) = &decision.acl else { return Ok(AclLists::default()) };
        let access = acl.access_xattr(decision.mode, directory, resolve)?;
        let default = if directory { acl.default_xattr(decision.mode, resolve)? } else { None };
        Ok(AclLists { access, default })
    }

    /// Sets what a client asks for, as far as it is granted. Where the client is confined or there is a policy, an owner is
    /// granted when it is what a rule says or what is there: a server that runs as root could give files to anybody.
    pub(super) fn set(&self, file: &File, path: &RelPath, asked: &Attributes) -> Result<(), Failed> {
        let found = Metadata::of(file)?;
        let mut change = Change { times: times(asked), ..Change::default() };
        let free = !self.confined && self.policy.is_empty();
        if asked.mode.is_some() || (asked.owner.is_some() && !free) {
            let directory = found.kind == FileKind::Directory;
            let grant = self.grant(path, directory, asked.mode.unwrap_or(found.mode) & 0o7777, Some(&found))?;
            if !free {
                self.may_own(path, &found, &grant, asked)?;
            }
            let settable = asked.mode.is_some() && !self.is_private(&found);
            if settable && grant.ruled() {
                grant.give_mode(&Inode::of(file)?)?;
            } else if settable {
                change.mode = Some(grant.mode);
            }
        }
        if let Some((user, group)) = asked.owner {
            // u32::MAX is, to chown(2): as it is.
            let given = |id, there| Some(id).filter(|&id| id != u32::MAX && (free || id != there));
            (change.uid, change.gid) = (given(user, found.uid), given(group, found.gid));
        }
        self.keeping(file, || {
            let sized = asked.size.map_or(Ok(()), |size| self.resize(file, path, size));
            let applied = change.apply(file);
            sized.and(applied.map_err(Failed::from))
        })?;
        self.note_file("", "metadata", path, file, None, Some(&found));
        self.contents.of(&found).iter().for_each(|content| locked(content).told = false);
        Ok(())
    }

    /// Cuts a file off or makes it longer, with the room that it takes.
    pub(super) fn resize(&self, file: &File, path: &RelPath, size: u64) -> Result<(), Failed> {
        let content = self.contents.of(&Metadata::of(file)?);
        let other = content.is_none() && self.allowance.is_some();
        let _alone = other.then(|| Alone::with(file)).transpose()?;
        let mut content = content.as_ref().map(locked);
        if content.as_ref().is_some_and(|content| content.is_removed) {
            return Err(removed());
        }
        // Now that nobody else changes it.
        let found = Metadata::of(file)?;
        if found.size != size {
            let told = content.as_mut().is_some_and(|content| std::mem::replace(&mut content.told, true));
            if !told && found.size > 0 {
                self.note_intent(path, &found);
            }
        }
        let more = size.saturating_sub(found.size);
        self.take(more, 0)?;
        if let Err(error) = file.set_len(size) {
            self.give_back(more, 0);
            return Err(error.into());
        }
        if let Some(content) = &mut content {
            content.resized(file, size, self.recorder.is_some());
        }
        self.give_back(found.size.saturating_sub(size), 0);
        Ok(())
    }

    fn may_own(&self, path: &RelPath, found: &Metadata, grant: &Grant, asked: &Attributes) -> Result<(), Failed> {
        let Some((user, group)) = asked.owner else { return Ok(()) };
        let fits = |asked, there, granted| asked == u32::MAX || asked == there || Some(asked) == granted;
        if fits(user, found.uid, grant.uid) && fits(group, found.gid, grant.gid) {
            return Ok(());
        }
        Err(self.refused(path, "the server decides who owns what arrives"))
    }

    /// Refuses to call something `new` where the rules cannot be followed for it and everything below it. A file that has
    /// another name beside would have the permissions of the new one by that, too.
    pub(super) fn can_conform(&self, spot: &Spot, new: &RelPath) -> Result<(), Failed> {
        let too_long = |_| Failed::because(Status::BadMessage, "too long");
        let above = spot.path.parent();
        for below in Walk::new(spot, new) {
            let (name, path, found) = below?;
            let grant = |path: &RelPath| self.weigh(path, found.kind == FileKind::Directory, found.mode, Some(&found));
            let granted = grant(&path)?;
            if found.kind == FileKind::Regular && found.links > 1 {
                let old =
                    above.as_ref().map_or(Ok(name.clone()), |above| above.join(name.as_bytes())).map_err(too_long)?;
                if granted != grant(&old)? {
                    return Err(self.refused(
                        &path,
                        "the file has further names, and the policy gives this one other permissions",
                    ));
                }
            }
        }
        Ok(())
    }

    /// Gives something that is about to be called `new` what the rules say of that name, and so everything below it.
    /// Links stay as they are. Counts what was given something, should it fail, too.
    pub(super) fn conform(&self, spot: &Spot, new: &RelPath, given: &mut u64) -> Result<(), Failed> {
        Walk::new(spot, new).try_for_each(|below| self.conform_one(spot, below?, given))
    }

    fn conform_one(&self, spot: &Spot, (name, path, found): Below, given: &mut u64) -> Result<(), Failed> {
        if !matches!(found.kind, FileKind::Regular | FileKind::Directory) || self.is_private(&found) {
            return Ok(());
        }
        let grant = self.grant(&path, found.kind == FileKind::Directory, found.mode, Some(&found))?;
        if grant.ruled() {
            *given += 1;
            grant.give(&spot.holder.open_with(&name, Follow::Never, OFlags::PATH, 0)?)?;
        }
        Ok(())
    }

    /// It keeps its name after all: everything gets what the rules say of that again, as far as it can be given.
    pub(super) fn conform_again(&self, spot: &Spot, new: &RelPath) {
        let failed = |below: &Result<Below, Failed>| match below {
            Ok(below) => self.conform_one(spot, below.clone(), &mut 0).is_err(),
            Err(_) => true,
        };
        let left = Walk::new(spot, &spot.path).filter(failed).count();
        let how = format!("not renamed to '{}'", Escaped(new.as_bytes()));
        self.note(&how, "metadata", &spot.path, |record| {
            if left > 0 {
                record.result = Some(Outcome::Failure);
                record.reason = Some(format!("{left} entries have permissions of the name that it did not get"));
            }
        });
    }

    /// Waits until no other session makes links or moves what holds them. It is taken before the spots: they say how deep
    /// something lies, and that may change until then.
    pub(super) fn turn(&self) -> Result<Option<Turn>, Failed> {
        self.confined.then(|| Turn::take(&self.root)).transpose()
    }

    /// Refuses to call something `new` when it is a link, or holds one, that would then lead out of a confined client's
    /// root. The client could not follow it, but others on the machine would.
    pub(super) fn links_stay(&self, spot: &Spot, new: &RelPath) -> Result<(), Failed> {
        let depth = |path: &RelPath| path.components().count();
        let found = spot.holder.stat(&spot.name, Follow::Never)?;
        // What lies deeper than before leads less far up.
        let may_leave = found.kind == FileKind::Symlink || depth(new) < depth(&spot.path);
        if !self.confined || !may_leave {
            return Ok(());
        }
        for below in Walk::new(spot, new) {
            let (name, path, found) = below?;
            if found.kind == FileKind::Symlink {
                let (holder, name) = spot.holder.holder(&name, Follow::Never)?;
                self.link_stays(&path, &holder.read_link(&name)?)?;
            }
        }
        Ok(())
    }

    /// The same for a link that is made.
    pub(super) fn link_stays(&self, path: &RelPath, target: &[u8]) -> Result<(), Failed> {
        if !self.confined || path.link_stays_below(target) {
            return Ok(());
        }
        Err(self.refused(path, "the link would lead out of the root"))
    }

    pub(super) fn private(&self) -> MutexGuard<'_, HashSet<(u64, u64)>> {
        self.private.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a file gets its permissions when the handle that made it is closed, and none before.
    pub(super) fn is_private(&self, found: &Metadata) -> bool {
        self.private().contains(&(found.device, found.inode))
    }

    /// What cannot be recorded is not done. So many handles are open, as far as whoever asks knows.
    pub(super) fn recorded(&self, handles: usize) -> Result<(), Failed> {
        match &self.recorder {
            Some(recorder) if !recorder.ready(handles) => {
                Err(Failed::because(Status::Failure, "the server's audit log cannot be written"))
            }
            _ => Ok(()),
        }
    }

    /// Refuses what the rights do not cover; what would have written has its line in the log.
    pub(super) fn not_allowed(&self, needs: Need, path: Option<&[u8]>) -> Failed {
        let reason = needs.refusal(self.rights);
        if let (Some(path), Some(recorder)) = (path, &self.recorder) {
            let path = Escaped(&path[..path.len().min(crate::path::PATH_MAX)]).to_string();
            let reason = Some(reason.to_owned());
            let (action, result) = ("refuse".into(), Some(Outcome::Failure));
            recorder.record("", AuditRecord { action, path, reason, result, ..AuditRecord::default() });
        }
        Failed::because(Status::PermissionDenied, reason)
    }

    /// Takes room that is about to be used, where it is limited.
    pub(super) fn take(&self, bytes: u64, files: u64) -> Result<(), Failed> {
        Ok(self.allowance.as_ref().map_or(Ok(()), |allowance| allowance.take(Amount::new(bytes, files)))?)
    }

    /// Whether so many bytes are there to be taken; none are.
    pub(super) fn has(&self, bytes: u64) -> Result<(), Failed> {
        Ok(self.allowance.as_ref().map_or(Ok(()), |allowance| allowance.has(Amount::new(bytes, 0)))?)
    }

    /// Gives room back.
    pub(super) fn give_back(&self, bytes: u64, files: u64) {
        if let Some(allowance) = &self.allowance {
            allowance.give_back(Amount::new(bytes, files));
        }
    }

    /// Room may have been taken for what is not there.
    pub(super) fn loosen(&self) {
        self.allowance.iter().for_each(|allowance| allowance.loosen());
    }

    /// Gives back what something took that is no more; `found` is what it was, and `going` what was held of it.
    pub(super) fn gone(&self, found: Option<&Metadata>, going: Option<Going>) {
        if found.is_none() {
            return;
        }
        // A file with another name still takes its room, whenever it got that.
        let there = going.as_ref().and_then(|going| Metadata::of(&going.file).ok()).filter(|there| there.links == 0);
        let mut bytes = there.map_or(0, |there| there.size);
        if let Some((there, Going { file, own: Some(content) })) = there.zip(going) {
            // What this session has open of it is nobody's any more, and takes no room.
            let mut content = locked(&content);
            content.is_removed = true;
            content.lost();
            if there.size > 0 && file.set_len(0).is_err() {
                bytes = 0;
                self.loosen();
            }
        }
        self.give_back(bytes, 1);
    }

    /// Before a name is taken away, where room is limited: holds the file if that is its last name. One that somebody else writes to stays: its room would
    /// be given back, and still be used. Nobody begins to write to it as long as it is held.
    pub(super) fn going(&self, spot: &Spot, found: Option<&Metadata>) -> Result<Option<Going>, Failed> {
        let is_file = |found: &&Metadata| found.kind == FileKind::Regular && found.links <= 1;
        let Some(found) = found.filter(is_file).filter(|_| self.allowance.is_some()) else { return Ok(None) };
        let open =
            |flags| spot.holder.open_with(&spot.name, Follow::Never, flags | OFlags::NONBLOCK | OFlags::NOCTTY, 0);
        let file = open(OFlags::WRONLY).or_else(|_| open(OFlags::RDONLY)).map_err(|error| {
            let why = "whether somebody writes to it cannot be seen; give yourself the right to read it first";
            Failed::because(Failed::from(error).status(), why)
        })?;
        let own = self.contents.of(found);
        if own.is_none() {
            lock(&file)?;
        }
        // RACE: another file may have got the name since it was looked at.
        let named = spot.holder.stat(&spot.name, Follow::Never)?;
        let held = Metadata::of(&file)?;
        let same = |one: &Metadata| (one.device, one.inode) == (held.device, held.inode);
        if same(&named) && same(found) { Ok(Some(Going { file, own })) } else { Err(busy()) }
    }

    /// Does something that changes the times of a file, and its content in a way that is followed. What the session has open to be written stays
    /// known by it.
    fn keeping<T>(&self, file: &File, work: impl FnOnce() -> Result<T, Failed>) -> Result<T, Failed> {
        let Some(content) = Metadata::of(file).ok().and_then(|found| self.contents.of(&found)) else { return work() };
        locked(&content).look_again(file);
        let done = work();
        locked(&content).changed(file);
        done
    }

    /// The same by a name of the file.
    pub(super) fn keeping_named<T>(&self, spot: &Spot, work: impl FnOnce() -> Result<T, Failed>) -> Result<T, Failed> {
        if self.contents.is_empty() {
            return work();
        }
        match spot.holder.open_with(&spot.name, Follow::Never, OFlags::PATH, 0) {
            Ok(file) => self.keeping(&file, work),
            Err(_) => work(),
        }
    }

    /// What a file system has, as far as the client may use it.
    pub(super) fn limited(&self, mut found: StatVfs) -> StatVfs {
        let Some(Ok((cap, free))) = self.allowance.as_ref().map(|allowance| allowance.state()) else { return found };
        let blocks = |bytes: u64| bytes / found.f_frsize.max(1);
        found.f_blocks = found.f_blocks.min(blocks(cap.bytes));
        found.f_bfree = found.f_bfree.min(blocks(free.bytes));
        found.f_bavail = found.f_bavail.min(blocks(free.bytes));
        found.f_files = found.f_files.min(cap.files);
        found.f_ffree = found.f_ffree.min(free.files);
        found.f_favail = found.f_favail.min(free.files);
        found
    }

    /// Does something that makes one file, directory or link.
    pub(super) fn making<T, E: Into<Failed>>(&self, make: impl FnOnce() -> Result<T, E>) -> Result<T, Failed> {
        self.take(0, 1)?;
        make().map_err(|error| {
            self.give_back(0, 1);
            error.into()
        })
    }

    /// A refusal, with its line in the log.
    pub(super) fn refused(&self, path: &RelPath, reason: &'static str) -> Failed {
        self.note("", "refuse", path, |record| record.reason = Some(reason.to_owned()));
        Failed::because(Status::PermissionDenied, reason)
    }

    /// A line in the log.
    pub(super) fn note(&self, how: &str, action: &str, path: &RelPath, more: impl FnOnce(&mut AuditRecord)) {
        if let Some(recorder) = &self.recorder {
            let path = Escaped(path.as_bytes()).to_string();
            let result = Some(if action == "refuse" { Outcome::Failure } else { Outcome::Success });
            let mut record = AuditRecord { action: action.into(), path, result, ..AuditRecord::default() };
            more(&mut record);
            recorder.record(how, record);
        }
    }

    /// The same about something that is open, with what it is now, and what had the name before.
    pub(super) fn note_file(
        &self,
        how: &str,
        action: &str,
        path: &RelPath,
        file: &File,
        digest: Option<Digest>,
        there: Option<&Metadata>,
    ) {
        self.note_as(how, action, path, file, there, |record| {
            record.sha256 = digest.map(|digest| digest.to_string());
        });
    }

    /// The same with what else is to be told.
    pub(super) fn note_as(
        &self,
        how: &str,
        action: &str,
        path: &RelPath,
        file: &File,
        there: Option<&Metadata>,
        more: impl FnOnce(&mut AuditRecord),
    ) {
        self.note(how, action, path, |record| {
            record.before = there.map(before);
            if let Ok(found) = Metadata::of(file) {
                record.size = (found.kind == FileKind::Regular).then_some(found.size);
                record.mode = Some(format!("{:04o}", found.mode));
                record.owner = Some(found.uid.to_string());
                record.group = Some(found.gid.to_string());
            }
            more(record);
        });
    }

    /// The content of a file that is there is about to change.
    pub(super) fn note_intent(&self, path: &RelPath, there: &Metadata) {
        self.note("", "intent", path, |record| {
            record.result = None;
            record.size = Some(there.size);
            record.before = Some(before(there));
            record.reason = Some("what is there is about to be written to".to_owned());
        });
    }
}

/// Mode, owner and group of something, for a line that tells of its change.
pub(super) fn before(found: &Metadata) -> Before {
    let (owner, group) = (found.uid.to_string(), found.gid.to_string());
    Before { mode: format!("{:04o}", found.mode), owner, group }
}

/// Takes set-user-ID and set-group-ID from a file whose content is about to change, where the kernel does not do it (with
/// CAP_FSETID): new content would get the rights of the old. Who does not own the file cannot, and has it done by the
/// kernel.
pub(super) fn drop_set_id(file: &File, found: &Metadata) {
    if found.kind == FileKind::Regular && found.mode & SET_ID != 0 {
        let _ = Change { mode: Some(found.mode & !SET_ID), ..Change::default() }.apply(file);
    }
}

/// Times as SFTP has them, for a change.
pub(super) fn times(asked: &Attributes) -> Option<(Timestamp, Timestamp)> {
    let time = |seconds: u32| Timestamp { seconds: seconds.into(), nanoseconds: 0 };
    asked.times.map(|(accessed, modified)| (time(accessed), time(modified)))
}
