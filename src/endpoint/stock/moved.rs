//! Files that only get another name: what goes under one name in a run is published under another, and is neither sent nor copied.
//!
//! It is linked (`hardlink@openssh.com`) to where its new name is staged when everything else is, and looked at there twice, before and
//! after all is on the disk. Its old name goes once the new one is there, and stays where that could not be given. What cannot be linked,
//! or is not what was listed, is copied after all and proven; so are all where the run does not remove anything.
//!
//! What is not done is to hash it again: it is what the manifest lists, as far as its size, time, owner and mode say, which is what is
//! believed of a file that keeps its name. `--checksum`, `--verify=exec` and `--verify=read-back` have it copied and hashed.
//!
//! RACE: SFTP knows no inode and no time of change. Whoever writes to it under its old name between the last look and
//! the publishing, or has given it its old time after he did so before, finds that under the new name; the next run that hashes it finds
//! it too. What has a further name is copied, as far as the server says how many a file has.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::Arc;

use super::alike::Lying;
use super::execute::Problems;
use super::record::Record;
use super::session::{Reply, about, extended};
use super::target::{Permissions, Run, State, locked};
use super::writer::{COPIED_BYTES, StockWriter};
use super::{at, is_file, stage};
use crate::endpoint::delta::Within;
use crate::endpoint::{CommitOptions, Error, Writer};
use crate::manifest::{Content, Entry, Manifest, Name, Tree};
use crate::path::RelPath;
use crate::plan::Plan;
use crate::wire::sftp::packet;

/// A file that gets another name, as it is written down.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Linked {
    pub(super) from: RelPath,
    pub(super) to: RelPath,
    pub(super) size: u64,
    /// Its time of modification.
    pub(super) seconds: i64,
}

/// Which files have further names, or are to have, and whose the account's own are.
pub(super) struct Further<'a> {
    there: HashSet<&'a RelPath>,
    wanted: HashSet<&'a RelPath>,
    listed: &'a HashSet<RelPath>,
    /// The server does not tell.
    unknown: bool,
    /// The name of the account, where it may not do what it wants.
    pub(super) own: Option<Name>,
}

impl<'a> Further<'a> {
    /// As the trees and the server say.
    ///
    /// # Errors
    /// When the connection ends.
    pub(super) fn new(
        run: &Run,
        (source, target): (&'a Tree, &'a Tree),
        manifest: &'a Manifest,
        (listed, tells): (&'a HashSet<RelPath>, bool),
    ) -> Result<Further<'a>, Error> {
        fn first(entry: &Entry) -> Option<&RelPath> {
            match &entry.content {
                Content::HardLink { first } => Some(first),
                _ => None,
            }
        }
        let own = match run.own {
            (0, _) => None,
            (uid, gid) => {
                let mut names = locked(&run.names);
                names.learn(&run.session, &BTreeSet::from([uid]), &BTreeSet::from([gid]))?;
                Some(names.user(uid))
            }
        };
        let there = target.entries().iter().chain(manifest.tree.entries()).filter_map(first).collect();
        let wanted = source.entries().iter().filter_map(first).collect();
        // What is no OpenSSH may write lines in which the number says nothing.
        let is_openssh = run.session.offers.lsetstat && run.session.offers.names;
        Ok(Further { there, wanted, listed, unknown: !(tells && is_openssh), own })
    }

    /// Whether the file at `path` may have further names.
    pub(super) fn has(&self, path: &RelPath) -> bool {
        self.unknown || self.there.contains(path) || self.listed.contains(path)
    }

    /// Whether it is to have any.
    pub(super) fn is_to_have(&self, path: &RelPath) -> bool {
        self.wanted.contains(path)
    }
}

/// What may get another name in a run.
pub(super) struct Movable<'a> {
    run: &'a Run,
    source: &'a Tree,
    target: &'a Tree,
    plan: &'a Plan,
    names: &'a Further<'a>,
    /// Each is given once.
    given: HashSet<RelPath>,
    /// Before this, a file that changed has another time.
    since: i64,
    /// Files may at all.
    may: bool,
}

impl<'a> Movable<'a> {
    pub(super) fn new(
        run: &'a Run,
        (source, target): (&'a Tree, &'a Tree),
        manifest: &'a Manifest,
        plan: &'a Plan,
        names: &'a Further<'a>,
    ) -> Movable<'a> {
        let options = &run.options;
        let may = options.deletes && options.delta && !run.keeps_all();
        let may = may && run.files_may_stay() && run.session.offers.hard_link;
        let (given, since) = (HashSet::new(), manifest.created.seconds);
        Movable { run, source, target, plan, names, given, since, may }
    }

    /// Whether it goes in this run, when its new name is there, and is what was listed.
    pub(super) fn goes(&self, lying: &Lying) -> bool {
        let path = &lying.path;
        if !self.may || !self.plan.removes(path) || self.run.is_last(path) {
            return false;
        }
        let listed = self.target.get(path).filter(|there| there.mtime.seconds == lying.seconds);
        // What stands in the way of something new goes before that comes.
        let in_the_way = self.source.get(path).is_some()
            || path.ancestors().any(|above| self.source.get(&above).is_some_and(|above| !above.is_directory()));
        listed.and_then(Entry::file) == Some((lying.size, Some(lying.digest))) && !in_the_way && self.can_go(path)
    }

    /// Whether the account may take a name away from the directory that it is in, as far as its owner and mode say.
    fn can_go(&self, path: &RelPath) -> bool {
        let Some(own) = &self.names.own else { return true };
        let parent = path.parent().and_then(|parent| self.target.get(&parent));
        parent.is_none_or(|parent| parent.owner == *own && parent.mode & 0o300 == 0o300)
    }

    /// Whether it is given to `entry`: it goes, and has all that this is to have.
    pub(super) fn gives(&mut self, lying: &Lying, entry: &Entry) -> bool {
        if !self.goes(lying)
            || self.names.has(&lying.path)
            || self.names.is_to_have(&entry.path)
            || self.run.is_last(&entry.path)
        {
            return false;
        }
        let Some(there) = self.target.get(&lying.path) else { return false };
        let Ok(wanted) = self.run.permissions(entry) else { return false };
        // What is to be executed is hashed first.
        let fits = there.mode == wanted.mode && wanted.mode & 0o111 == 0;
        let same_time = lying.seconds == wanted.mtime.seconds && lying.seconds < self.since;
        fits && same_time && self.given.insert(lying.path.clone())
    }
}

/// Stages what gets another name, or a copy of it. What can be neither is added to what failed; then nothing is removed either.
///
/// # Errors
/// When the connection ends, or the disk is full.
pub(super) fn settle(run: &Arc<Run>, options: &mut CommitOptions, problems: &mut Problems) -> Result<(), Error> {
    let mut moved = std::mem::take(&mut run.state().moved);
    let failed: HashSet<u32> = options.failed.iter().copied().collect();
    moved.retain(|index, _| !failed.contains(index));
    if moved.is_empty() {
        return Ok(());
    }
    let mut linked = BTreeMap::new();
    if options.delete {
        linked = link(run, &moved)?;
        moved.retain(|index, _| !linked.contains_key(index));
    }
    let mut lost = copy(run, &moved)?;
    if !lost.is_empty() {
        // Nothing goes now, and what stays under its old name is to be a file of its own.
        options.delete = false;
        let unlinked = linked.keys().map(|&index| about(packet::REMOVE, &staged(run, &run.state(), index)));
        let unlinked: Vec<_> = unlinked.collect();
        let _ = run.session.all(unlinked)?;
        lost.extend(copy(run, &std::mem::take(&mut linked))?);
    }
    for (path, index, why) in lost {
        problems.tell(&path, why);
        options.failed.push(index);
    }
    let mut state = run.state();
    state.staged.extend(linked.iter().map(|(&index, lying)| (index, lying.digest)));
    state.linked = linked;
    Ok(())
}

/// Makes sure that what was linked is what was listed still.
///
/// # Errors
/// When it is not: then nothing may be published.
pub(super) fn check(run: &Run, state: &State) -> Result<(), Error> {
    let found =
        run.session.batch(state.linked.keys().map(|&index| about(packet::LSTAT, &staged(run, state, index))))?;
    for ((&index, lying), found) in state.linked.iter().zip(found) {
        let entry = &state.source.entries()[index as usize];
        if !is_as_listed(run, lying, &run.permissions(entry)?, found)? {
            let reason = format!(
                "'{}', which was to get the name '{}', was changed there by somebody else; nothing was published, run again",
                lying.path, entry.path
            );
            return Err(Error::Refused { by: run.session.client.host().to_owned(), reason });
        }
    }
    Ok(())
}

/// What was linked, to be written down.
pub(super) fn written_down(state: &State) -> Vec<Linked> {
    let linked = state.linked.iter().map(|(&index, lying)| Linked {
        from: lying.path.clone(),
        to: state.source.entries()[index as usize].path.clone(),
        size: lying.size,
        seconds: lying.seconds,
    });
    linked.collect()
}

/// Where a run was interrupted when it was about to publish: takes away what has changed since, which is told and not published.
///
/// # Errors
/// When the connection ends.
pub(super) fn look_again(run: &Run, record: &Record, problems: &mut Problems) -> Result<(), Error> {
    // What is published last is none of them.
    let staged = |linked: &Linked| at(&run.staging, [b"tree/", linked.to.as_bytes()].concat());
    let found = run.session.batch(record.linked.iter().map(|linked| about(packet::LSTAT, &staged(linked))))?;
    let mut changed = Vec::new();
    for (linked, found) in record.linked.iter().zip(found) {
        // What is not there any more has its name already.
        let Ok(found) = run.session.attributes(found)? else { continue };
        if !is_file(&found, linked.size, linked.seconds) {
            changed.push(about(packet::REMOVE, &staged(linked)));
            let why = format!("'{}', which was to get this name, was changed there since; push again", linked.from);
            problems.tell(&linked.to, why);
            problems.unpublished.insert(linked.to.clone());
        }
    }
    run.session.all(changed).map(drop)
}

/// What goes only once the new names are there: the old ones, and the directories above them.
pub(super) fn later(record: &Record) -> HashSet<RelPath> {
    let from = record.linked.iter().map(|linked| linked.from.clone());
    let above = record.linked.iter().flat_map(|linked| linked.from.ancestors());
    from.chain(above).collect()
}

/// Of these what stays, since the new name of something is not there.
pub(super) fn staying(record: &Record, problems: &Problems) -> HashSet<RelPath> {
    let left = record.linked.iter().filter(|linked| problems.left(&linked.to));
    left.flat_map(|linked| linked.from.ancestors().chain([linked.from.clone()])).collect()
}

fn staged(run: &Run, state: &State, index: u32) -> Vec<u8> {
    run.staged_path(&state.source.entries()[index as usize].path)
}

/// Links them to where they are staged; gives those that are there and what they were listed as.
fn link(run: &Run, moved: &BTreeMap<u32, Arc<Lying>>) -> Result<BTreeMap<u32, Arc<Lying>>, Error> {
    let session = &run.session;
    let entries: Vec<Entry> = {
        let state = run.state();
        moved.keys().map(|&index| state.source.entries()[index as usize].clone()).collect()
    };
    // An interrupted run must not leave one to be gone on with: what is done to it would be done to the file under its old name.
    stage::unlist(run, entries.iter().map(|entry| &entry.path))?;
    let to: Vec<Vec<u8>> = entries.iter().map(|entry| run.staged_path(&entry.path)).collect();
    let requests = moved.values().zip(&to).flat_map(|(lying, to)| {
        [extended("hardlink@openssh.com", &[&run.path_of(lying), to]), about(packet::LSTAT, to)]
    });
    let mut replies = session.batch(requests)?.into_iter();
    let (mut linked, mut wrong) = (BTreeMap::new(), Vec::new());
    for (((&index, lying), entry), to) in moved.iter().zip(&entries).zip(&to) {
        let (Some(made), Some(found)) = (replies.next(), replies.next()) else { return Err(session.odd()) };
        if session.status(made)?.is_err() {
            continue;
        }
        if is_as_listed(run, lying, &run.permissions(entry)?, found)? {
            linked.insert(index, Arc::clone(lying));
        } else {
            wrong.push(about(packet::REMOVE, to));
        }
    }
    let _ = session.all(wrong)?;
    Ok(linked)
}

/// Whether what was found is what was listed, and has the permissions that it is to have.
fn is_as_listed(run: &Run, lying: &Lying, wanted: &Permissions, found: Reply) -> Result<bool, Error> {
    let Ok(found) = run.session.attributes(found)? else { return Ok(false) };
    // What is nobody's by the policy is the account's own, as what it would have made.
    let expected = (wanted.uid.unwrap_or(run.own.0), wanted.gid.unwrap_or(run.own.1));
    Ok(is_file(&found, lying.size, lying.seconds)
        && found.mode.map(|mode| mode & 0o7777) == Some(wanted.mode)
        && found.owner == Some(expected))
}

/// Has them copied and proven; gives those of which that failed, and why.
fn copy(run: &Arc<Run>, moved: &BTreeMap<u32, Arc<Lying>>) -> Result<Vec<(RelPath, u32, String)>, Error> {
    if moved.is_empty() {
        return Ok(Vec::new());
    }
    let path = |index: u32| run.state().source.entries()[index as usize].path.clone();
    let wanted: u64 = moved.values().map(|lying| lying.size).sum();
    if let Some(room) = run.too_little_room(wanted)? {
        let lost = moved.iter().map(|(&index, lying)| {
            let why = format!(
                "was to be what is called '{}' there, which stays, as other paths failed; there is room for {room} bytes \
                 and not for copies of {wanted}: mend what failed, or make room",
                lying.path
            );
            (path(index), index, why)
        });
        return Ok(lost.collect());
    }
    let mut writer = StockWriter::copying_only(Arc::clone(run));
    for (&index, lying) in moved {
        writer.open(index, 0)?;
        let mut at = 0;
        while at < lying.size {
            let length = (lying.size - at).min(COPIED_BYTES);
            writer.copy(index, at, length, Within { piece: 0, offset: at })?;
            at += length;
        }
        writer.finish(index, lying.digest)?;
    }
    let mut left: BTreeMap<u32, String> =
        moved.keys().map(|&index| (index, "was not copied there".to_owned())).collect();
    loop {
        let staged = writer.completions(true)?;
        if staged.is_empty() {
            break;
        }
        for staged in staged {
            match staged.result {
                Ok(()) => drop(left.remove(&staged.index)),
                Err(failure) => drop(left.insert(staged.index, failure.message)),
            }
        }
    }
    Ok(left.into_iter().map(|(index, why)| (path(index), index, why)).collect())
}
