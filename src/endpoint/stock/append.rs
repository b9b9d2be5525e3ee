//! Files that only grow: what is new of one is staged alone, in `tails` of the staging area, and put at the end of what is there when the
//! run publishes, by the server itself (`copy-data`). It stays the same file, and what it has already costs nothing.
//!
//! What always holds: what is new was hashed there, and what was there before is what the manifest lists, as far as its size and time say.
//! Where a run is interrupted the next one puts the rest there and hashes all of it. Who reads it meanwhile sees a beginning of that.
//!
//! RACE: SFTP knows no inode, and opens what a link points to. Whoever puts another file of the same size and time, or a link to one, in its
//! place between the last look and the copy has that appended to; nobody else is to write to what only grows at a target.

use std::collections::{HashMap, HashSet};

use super::adopt;
use super::execute::Problems;
use super::moved::Further;
use super::prove::Unproven;
use super::record::Recorded;
use super::session::{self, Reply, about, extended, with_attributes};
use super::target::{Run, State, locked};
use super::{REGULAR, at, below, kind_of};
use crate::endpoint::{CommitOptions, Error};
use crate::manifest::{Digest, Entry, Tree};
use crate::path::RelPath;
use crate::plan::Action;
use crate::wire::sftp::{Attributes, open, packet};

/// Where what is new is staged.
pub(super) const TAILS: &str = "tails";
/// The server copies so much by one request, and is asked for so many at once: it does nothing else meanwhile.
const REQUEST_BYTES: u64 = 32 << 20;
const REQUESTS: usize = 4;
const CHANGED: &str =
    "was changed by somebody else, who wrote to it before it was appended to; the next run brings it whole";

/// What a file was that is appended to, and what is staged of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Appended {
    /// The name of what is new, below `tails`.
    pub(super) tail: u32,
    pub(super) length: u64,
    /// Its time of modification.
    pub(super) seconds: i64,
}

impl Run {
    /// Where what is new of the file with this number is staged.
    pub(super) fn tail_path(&self, number: u32) -> Vec<u8> {
        at(&self.staging, format!("{TAILS}/{number}"))
    }

    /// Whether what is new of the file of `entry`, which `action` is about, may be put at the end of what is there: it only grows, is
    /// published by itself and under one name, has all that it is to have but its content, and the account may write to it.
    pub(super) fn may_append(&self, entry: &Entry, target: &Tree, names: &Further<'_>, action: &Action) -> bool {
        let path = &entry.path;
        let differs = action.differences.mode || action.differences.owner || action.differences.group;
        let ours =
            |there: &Entry| names.own.as_ref().is_none_or(|own| there.owner == *own && there.mode & 0o600 == 0o600);
        self.files_may_stay()
            && self.growing.mean(path, false)
            && !self.is_last(path)
            && !differs
            && target.get(path).is_some_and(|there| there.mode & 0o7111 == 0 && ours(there))
            && !names.has(path)
            && !names.is_to_have(path)
    }
}

/// Gives up what there is no room for at the end of the files that are appended to: it is staged, and would lie there twice. Then nothing
/// is removed either.
///
/// # Errors
/// When the connection ends.
pub(super) fn settle(run: &Run, options: &mut CommitOptions, problems: &mut Problems) -> Result<(), Error> {
    let state = run.state();
    let failed: HashSet<u32> = options.failed.iter().copied().collect();
    let size = |index: u32| state.source.entries()[index as usize].file().map_or(0, |(size, _)| size);
    let tails: Vec<(u32, u64)> = state
        .tails
        .iter()
        .filter(|(index, _)| !failed.contains(index))
        .map(|(&index, lying)| (index, size(index).saturating_sub(lying.size)))
        .collect();
    // Where nothing goes what was to get another name is copied before that.
    let copies: u64 = state.moved.values().filter(|_| !options.delete).map(|lying| lying.size).sum();
    let wanted = copies.saturating_add(tails.iter().map(|(_, added)| added).sum());
    if tails.is_empty() {
        return Ok(());
    }
    let Some(room) = run.too_little_room(wanted)? else { return Ok(()) };
    for (index, _) in tails {
        let path = &state.source.entries()[index as usize].path;
        let why = format!("there is room for {room} bytes, and not for {wanted} at the ends of files: make room there");
        problems.tell(path, why);
        options.failed.push(index);
    }
    // After any problem nothing is removed.
    options.delete = false;
    Ok(())
}

/// Puts what is staged at the end of the files of those `steps` that say so. Where a run was interrupted that may have begun to (`again`),
/// it is done anew. Those that were changed by somebody else are told, and are as they were.
///
/// # Errors
/// When the connection ends.
pub(super) fn append<'a>(
    run: &Run,
    steps: impl Iterator<Item = &'a Recorded>,
    tree: &Tree,
    again: bool,
    problems: &mut Problems,
) -> Result<Vec<&'a RelPath>, Error> {
    let mut done = Vec::new();
    for (path, appended) in steps.filter_map(|recorded| Some((recorded.step.path(), recorded.append?))) {
        let Some(entry) = tree.get(path) else { continue };
        let Some((size, digest)) = entry.file() else { continue };
        let appending = Appending { run, path: below(&run.root, path), appended, size, mode: entry.mode };
        let ended = match appending.append(again)? {
            Ok(()) if again => appending.prove(digest)?,
            ended => ended,
        };
        match ended {
            Ok(()) => {
                locked(&run.area).tails.push(appended.tail);
                done.push(path);
            }
            Err(why) => {
                problems.tell(path, why);
                problems.unpublished.insert(path.clone());
            }
        }
    }
    Ok(done)
}

/// One of them.
struct Appending<'a> {
    run: &'a Run,
    path: Vec<u8>,
    appended: Appended,
    /// How long it is to be.
    size: u64,
    /// The mode that it has, and keeps.
    mode: u32,
}

impl Appending<'_> {
    fn append(&self, again: bool) -> Result<Result<(), String>, Error> {
        let session = &self.run.session;
        let tail = self.run.tail_path(self.appended.tail);
        // Before it is opened: a server that opens a FIFO waits.
        let looked = session.batch([about(packet::LSTAT, &self.path), about(packet::LSTAT, &tail)])?;
        let [there, staged] = <[Reply; 2]>::try_from(looked).map_err(|_| session.odd())?;
        let (there, staged) = (session.attributes(there)?, session.attributes(staged)?);
        let is_file = |seen: &Attributes| kind_of(seen) == Some(REGULAR);
        match (&there, &staged) {
            (Ok(there), Ok(staged)) if is_file(there) && is_file(staged) => {}
            // All of it may be there: then it only has to be proven.
            (Ok(there), Err(gone)) if again && gone.is_missing() && is_file(there) && there.size == Some(self.size) => {
                return Ok(Ok(()));
            }
            _ => return Ok(Err(CHANGED.to_owned())),
        }
        let opened = session.batch([session::open(&self.path, open::WRITE), session::open(&tail, open::READ)])?;
        let [file, new] = <[Reply; 2]>::try_from(opened).map_err(|_| session.odd())?;
        let (file, new) = (session.handle(file)?, session.handle(new)?);
        let ended = match (&file, &new) {
            (Ok(file), Ok(new)) => self.copy(new, file, again)?,
            (Err(refusal), _) => Err(format!("cannot be opened to append to it: {refusal}")),
            (_, Err(refusal)) => Err(format!("what is new of it cannot be read: {refusal}")),
        };
        let handles = [file, new].into_iter().flatten();
        // What the server could not keep it may say only now.
        let closed = session.all(handles.map(|handle| about(packet::CLOSE, &handle)))?;
        let lost = closed.into_iter().find_map(Result::err).filter(|_| ended.is_ok());
        Ok(lost.map_or(ended, |refusal| Err(format!("cannot be appended to: {refusal}"))))
    }

    /// Copies what is new behind what is there, if that is what it was.
    fn copy(&self, new: &[u8], file: &[u8], again: bool) -> Result<Result<(), String>, Error> {
        let session = &self.run.session;
        let Appended { length, seconds, .. } = self.appended;
        let looked = session.batch([about(packet::FSTAT, file), about(packet::FSTAT, new)])?;
        let [found, tail] = <[Reply; 2]>::try_from(looked).map_err(|_| session.odd())?;
        let (Ok(found), Ok(tail)) = (session.attributes(found)?, session.attributes(tail)?) else {
            return Ok(Err("cannot be looked at".to_owned()));
        };
        let added = self.size.saturating_sub(length);
        let modified = found.times.map(|(_, modified)| i64::from(modified));
        let as_it_was = found.size == Some(length) && modified == Some(seconds);
        let begun = again && found.size.is_some_and(|found| length < found && found <= self.size);
        let own = self.run.own.0;
        let ours = own == 0 || found.owner.is_some_and(|(uid, _)| uid == own);
        let permitted = found.mode.map(|mode| mode & 0o7777) == Some(self.mode) && ours;
        if tail.size != Some(added) || length > self.size || !permitted || !(as_it_was || begun) {
            return Ok(Err(CHANGED.to_owned()));
        }
        let starts: Vec<u64> = (0..added).step_by(REQUEST_BYTES as usize).collect();
        for starts in starts.chunks(REQUESTS) {
            let part = |start: u64| REQUEST_BYTES.min(added - start);
            let copies = starts.iter().flat_map(|&start| {
                let copied = session::copy_data((new, start), part(start), (file, length + start));
                // OpenSSH says nothing of what it could not write at the end of a request: how long the file is tells.
                [copied, about(packet::FSTAT, file)]
            });
            let synced = (session.offers.fsync && !self.run.syncs).then(|| extended("fsync@openssh.com", &[file]));
            let mut replies = session.batch(copies.chain(synced))?.into_iter();
            for &start in starts {
                let (Some(copied), Some(seen)) = (replies.next(), replies.next()) else { return Err(session.odd()) };
                if let Err(refusal) = session.status(copied)? {
                    return self.undo(file, as_it_was, &refusal.to_string());
                }
                let seen = session.attributes(seen)?.ok().and_then(|seen| seen.size).unwrap_or_default();
                let expected = length + start + part(start);
                if seen < expected {
                    return self.undo(
                        file,
                        as_it_was,
                        "the server wrote less than it was asked to; the disk may be full",
                    );
                }
                if seen > expected && !begun {
                    return Ok(Err(CHANGED.to_owned()));
                }
            }
            if let Some(synced) = replies.next()
                && let Err(refusal) = session.status(synced)?
            {
                return self.undo(file, as_it_was, &refusal.to_string());
            }
        }
        Ok(Ok(()))
    }

    /// Makes it what it was, where this run found it so.
    fn undo(&self, file: &[u8], as_it_was: bool, why: &str) -> Result<Result<(), String>, Error> {
        if as_it_was {
            let Appended { length, seconds, .. } = self.appended;
            let seconds = seconds.clamp(0, u32::MAX.into()) as u32;
            let size = Attributes { size: Some(length), ..Attributes::default() };
            let times = Attributes { times: Some((seconds, seconds)), ..Attributes::default() };
            let former = [size, times].map(|former| with_attributes(packet::FSETSTAT, file, &former));
            self.run.session.all(former)?;
        }
        Ok(Err(format!("cannot be appended to: {why}")))
    }

    /// Hashes all of it.
    fn prove(&self, digest: Option<Digest>) -> Result<Result<(), String>, Error> {
        let file = Unproven { id: 0, path: self.path.clone(), size: self.size, grant: None };
        let found = adopt::hash(self.run, vec![vec![file]])?.pop();
        Ok(match found {
            Some((_, Ok(found))) if Some(found.digest) == digest => Ok(()),
            Some((_, Err(why))) => Err(why),
            _ => Err(CHANGED.to_owned()),
        })
    }
}

/// The files of which what is new is staged, and how.
pub(super) fn appended(state: &State) -> HashMap<&RelPath, Appended> {
    let appended = state.tails.iter().map(|(&index, lying)| {
        let path = &state.source.entries()[index as usize].path;
        (path, Appended { tail: index, length: lying.size, seconds: lying.seconds })
    });
    appended.collect()
}
