//! Files that only get another name: what goes under one name in a run is published under another, and is neither sent nor copied.
//!
//! It is linked (`hardlink@openssh.com`) to where its new name is staged when everything else is, and looked at there twice, before and
//! after all is on the disk; its old name goes by the steps of the run, like that of anything that goes. What cannot be linked, or is not
//! what was listed, is copied after all and proven.
//!
//! What is not done is to hash it again: it is what the manifest lists, as far as its size, time, owner and mode say, which is what is
//! believed of a file that keeps its name. `--checksum`, `--verify=exec` and `--verify=read-back` have it copied and hashed.
//!
//! RACE: SFTP knows no inode and no time of change. Whoever writes to it under its old name between the last look and the publishing, or has
//! given it its old time after he did so before, finds that under the new name; the next run that hashes it finds it too.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use super::REGULAR;
use super::alike::Lying;
use super::execute::Problems;
use super::session::{Reply, about, extended};
use super::target::{Permissions, Run, State};
use super::writer::{COPIED_BYTES, StockWriter};
use super::{Verify, kind_of, stage};
use crate::endpoint::delta::Within;
use crate::endpoint::{CommitOptions, Error, Writer};
use crate::manifest::{Content, Entry, Manifest, Tree};
use crate::path::RelPath;
use crate::plan::Plan;
use crate::wire::sftp::packet;

/// What may get another name in a run.
pub(super) struct Movable<'a> {
    run: &'a Run,
    target: &'a Tree,
    plan: &'a Plan,
    /// Files that have further names there.
    shared: HashSet<&'a RelPath>,
    /// Each is given once.
    given: HashSet<RelPath>,
    /// Before this, a file that changed has another time.
    since: i64,
}

impl<'a> Movable<'a> {
    pub(super) fn new(run: &'a Run, target: &'a Tree, manifest: &'a Manifest, plan: &'a Plan) -> Movable<'a> {
        let entries = target.entries().iter().chain(manifest.tree.entries());
        let first = |entry: &'a Entry| match &entry.content {
            Content::HardLink { first } => Some(first),
            _ => None,
        };
        let (shared, given, since) = (entries.filter_map(first).collect(), HashSet::new(), manifest.created.seconds);
        Movable { run, target, plan, shared, given, since }
    }

    /// Whether what lies at `path` goes in this run.
    pub(super) fn goes(&self, path: &RelPath) -> bool {
        let run = self.run;
        let undisturbed = run.options.trash_seconds.is_none() && !run.options.checksum && !run.options.verify_disk;
        let may = run.options.deletes && run.session.offers.hard_link && run.lanes.verify == Verify::Auto;
        may && undisturbed && self.plan.removes(path)
    }

    /// Whether it is given to `entry`: it goes, and has all that this is to have.
    pub(super) fn gives(&mut self, lying: &Lying, entry: &Entry) -> bool {
        if !self.goes(&lying.path) || self.shared.contains(&lying.path) || self.run.is_last(&entry.path) {
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
    moved.retain(|index, _| !options.failed.contains(index));
    if moved.is_empty() {
        return Ok(());
    }
    if options.delete {
        let linked = link(run, &moved)?;
        moved.retain(|index, _| !linked.contains_key(index));
        let mut state = run.state();
        state.staged.extend(linked.iter().map(|(&index, lying)| (index, lying.digest)));
        state.linked = linked;
    }
    for (path, index, why) in copy(run, &moved)? {
        problems.tell(&path, why);
        options.failed.push(index);
        options.delete = false;
    }
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
    Ok(kind_of(&found) == Some(REGULAR)
        && found.size == Some(lying.size)
        && found.times.map(|(_, modified)| i64::from(modified)) == Some(lying.seconds)
        && found.mode.map(|mode| mode & 0o7777) == Some(wanted.mode)
        && found.owner == Some(expected))
}

/// Has them copied and proven; gives those of which that failed, and why.
fn copy(run: &Arc<Run>, moved: &BTreeMap<u32, Arc<Lying>>) -> Result<Vec<(RelPath, u32, String)>, Error> {
    if moved.is_empty() {
        return Ok(Vec::new());
    }
    let mut writer = StockWriter::new(Arc::clone(run)).moving_nothing();
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
    let state = run.state();
    let path = |index: u32| state.source.entries()[index as usize].path.clone();
    Ok(left.into_iter().map(|(index, why)| (path(index), index, why)).collect())
}
