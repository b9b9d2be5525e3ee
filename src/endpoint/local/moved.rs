//! Files that only get another name: what goes under one name in a run is published under another, and is neither sent nor copied.
//!
//! What always holds: until the moment of publishing the file lies under its old name alone, and it gets the new one only if nothing
//! about it has changed since it was known what it holds. The old name stays until the new one is there; nobody else has a third.

use std::collections::HashSet;

use super::alike::Opened;
use super::append::Former;
use super::metadata;
use super::target::{self, Run, State, io, staged_in};
use crate::endpoint::{CommitOptions, Error};
use crate::manifest::{Content, Digest, Entry};
use crate::path::RelPath;
use crate::plan::publish::Step;
use crate::root::{FileKind, Follow, Metadata, Root};
use crate::staging::{StageError, StagedFile, hash_of};

const CHANGED: &str = "what it was to be made of there was changed by somebody else meanwhile; the next run sends it";

/// A file that is to get another name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Moved {
    /// Where it lies, and the number of that among what it may be made of.
    pub(super) from: RelPath,
    pub(super) piece: u32,
    /// What it holds.
    pub(super) digest: Digest,
}

/// The same once it is decided, and written down.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Renamed {
    /// Where it lies.
    pub(super) from: RelPath,
    /// What it was when it was known what it holds.
    pub(super) former: Former,
}

impl Run {
    /// Whether what `there` is goes in this run, and has all that `entry` is to have.
    pub(super) fn moves(&self, entry: &Entry, there: &Opened) -> bool {
        self.may_move()
            && self.state().plan.removes(there.path())
            && self.can_be_linked(entry)
            && there.unchanged().is_some_and(|found| self.is_to_be(entry, there.path(), &found))
    }

    /// Whether files may get another name in this run.
    pub(super) fn may_move(&self) -> bool {
        let options = &self.options;
        let undisturbed = !options.verify_disk && options.trash_seconds.is_none() && self.repair.is_none();
        options.deletes && self.publishes() && undisturbed
    }

    /// Whether it can get its name in staging at the moment of publishing: by itself or in a new directory that we may write to.
    fn can_be_linked(&self, entry: &Entry) -> bool {
        let path = &entry.path;
        let state = self.state();
        let closed = |above: RelPath| state.source.get(&above).is_none_or(|above| above.mode & 0o300 != 0o300);
        let ours = rustix::process::geteuid().is_root() || !path.ancestors().any(closed);
        let exchanged = self.unit_of(path, false).is_some_and(|unit| state.target.get(&unit).is_some());
        ours && !exchanged && !self.is_last(path)
    }

    /// Whether the file at `path` has the permissions and the time that `entry` is to have, and no other name.
    fn is_to_be(&self, entry: &Entry, path: &RelPath, found: &Metadata) -> bool {
        let Ok(wanted) = self.permissions(entry) else { return false };
        let own = rustix::process::geteuid();
        let same = |asked: Option<u32>, has: u32| asked.is_none_or(|asked| asked == has);
        found.kind == FileKind::Regular
            && found.links == 1
            && (own.is_root() || found.uid == own.as_raw())
            && self.root.stat_root().is_ok_and(|root| root.device == found.device)
            && found.mtime == wanted.mtime
            && found.mode == wanted.mode
            // What is to be executed is hashed where it lies first.
            && found.mode & 0o111 == 0
            && same(wanted.uid, found.uid)
            && same(wanted.gid, found.gid)
            && !wanted.acl.as_ref().is_some_and(|lists| metadata::acl_differs(&self.root, path, lists))
    }
}

/// Copies what is not what it was any more, as far as it is still right, and everything where nothing is removed after all. Answers
/// what is lost; then nothing is to be removed either.
///
/// # Errors
/// What ends the run: a full disk.
pub(super) fn settle(
    run: &Run,
    staging: &Root,
    state: &mut State,
    options: &mut CommitOptions,
) -> Result<Vec<(RelPath, String)>, Error> {
    let mut lost = Vec::new();
    let intact = |state: &State, index: u32, moved: &Moved| {
        let size = state.source.entries()[index as usize].file().map_or(0, |(size, _)| size);
        run.opened(state, index, moved.piece).is_some_and(|there| there.holds(size, Some(moved.digest)))
    };
    let changed: Vec<u32> =
        state.moved.iter().filter(|&(&index, moved)| !intact(state, index, moved)).map(|(&index, _)| index).collect();
    for index in changed {
        lost.extend(copy_instead(run, staging, state, index)?);
    }
    if !lost.is_empty() && options.delete {
        (options.delete, options.delete_later) = (false, true);
    }
    if !options.delete {
        let rest: Vec<u32> = state.moved.keys().copied().collect();
        for index in rest {
            lost.extend(copy_instead(run, staging, state, index)?);
        }
    }
    Ok(lost)
}

/// Of what is to be published what gets another name: that of which the old one goes by one of `steps`, and is given once. The others
/// are copied, and so is what has further names, which are made before it is published.
///
/// # Errors
/// What ends the run: they are not what they were.
pub(super) fn decide(
    run: &Run,
    staging: &Root,
    state: &mut State,
    steps: &[Step],
) -> Result<Vec<(RelPath, Renamed)>, Error> {
    if state.moved.is_empty() {
        return Ok(Vec::new());
    }
    let gone: HashSet<&RelPath> =
        steps.iter().filter(|step| matches!(step, Step::RemoveFile(_))).map(Step::path).collect();
    let named_again = state.source.entries().iter().filter_map(|entry| match &entry.content {
        Content::HardLink { first } => Some(first),
        _ => None,
    });
    let named_again: HashSet<&RelPath> = named_again.collect();
    let mut given: HashSet<&RelPath> = HashSet::new();
    let stays = state.moved.iter().filter(|&(&index, moved)| {
        let further = named_again.contains(&state.source.entries()[index as usize].path);
        further || !gone.contains(&moved.from) || !given.insert(&moved.from)
    });
    let stays: Vec<u32> = stays.map(|(&index, _)| index).collect();
    for index in stays {
        if let Some((path, why)) = copy_instead(run, staging, state, index)? {
            return Err(Error::Refused { by: "the target".into(), reason: format!("'{path}': {why}") });
        }
    }
    let renamed = state.moved.iter().filter_map(|(&index, moved)| {
        let path = state.source.entries()[index as usize].path.clone();
        let there = run.opened(state, index, moved.piece)?.unchanged()?;
        Some((path, Renamed { from: moved.from.clone(), former: Former::of(&there) }))
    });
    let renamed: Vec<_> = renamed.collect();
    match renamed.len() == state.moved.len() {
        true => Ok(renamed),
        false => Err(Error::Refused { by: "the target".into(), reason: CHANGED.into() }),
    }
}

/// Stages a copy of what was to get another name. What it does not hold any more is answered, with its path.
fn copy_instead(run: &Run, staging: &Root, state: &mut State, index: u32) -> Result<Option<(RelPath, String)>, Error> {
    let Some(Moved { piece, digest, .. }) = state.moved.remove(&index) else { return Ok(None) };
    let entry = state.source.entries()[index as usize].clone();
    let path = run.staged_path(&entry.path)?;
    staging.remove_tree(&path).map_err(io)?;
    let copied = match run.opened(state, index, piece) {
        Some(there) => copy(run, staging, &entry, &there, (&path, digest)),
        None => Err(StageError::Copy(CHANGED.to_owned())),
    };
    match copied {
        Ok(found) => {
            state.staged.get_mut().insert(index, target::Staged::of(&entry, digest, &found));
            Ok(None)
        }
        Err(error) if error.storage_full() => Err(target::stage_failure(&error, staging)),
        Err(error) => {
            staging.remove_tree(&path).map_err(io)?;
            state.staged.get_mut().remove(index);
            let why = if error.retry() { CHANGED.to_owned() } else { crate::error::chain(&error) };
            Ok(Some((entry.path, why)))
        }
    }
}

/// Copies it, as it would have been when it was asked for.
fn copy(
    run: &Run,
    staging: &Root,
    entry: &Entry,
    there: &Opened,
    (path, digest): (&RelPath, Digest),
) -> Result<Metadata, StageError> {
    let size = entry.file().map_or(0, |(size, _)| size);
    let wanted = run.permissions(entry).map_err(|error| StageError::Copy(crate::error::chain(&error)))?;
    let mut file = StagedFile::create(staging, path, size)?;
    file.copy(0, size, &there.file, 0, true)?;
    if !there.holds(size, Some(digest)) {
        file.hash_it(None)?;
    }
    Ok(file.finish(digest, &wanted, false)?.0)
}

/// Gives the file that is to be published at `path` its name in staging, if nothing about it has changed. Of a run that was interrupted
/// (`again`) it may have had that already; then its content tells.
///
/// # Errors
/// When it is not what it was: then its old name stays.
pub(super) fn link(
    root: &Root,
    staging: &Root,
    path: &RelPath,
    Renamed { from, former }: &Renamed,
    (entry, again): (Option<&Entry>, bool),
) -> Result<(), Error> {
    let staged = staged_in(b"tree/", path)?;
    let changed = || Error::Refused { by: "the target".into(), reason: CHANGED.into() };
    let is_it = |found: &Metadata| found.kind == FileKind::Regular && found.inode == former.inode;
    let holds = |root: &Root, path: &RelPath| {
        let (size, digest) = entry.and_then(Entry::file)?;
        let file = root.open_read(path, Follow::Never).ok()?;
        (hash_of(&file, size).ok()? == digest? && Metadata::of(&file).ok()?.size == size).then_some(())
    };
    if again {
        if root.stat(path, Follow::Never).is_ok_and(|found| is_it(&found)) {
            return Ok(());
        }
        if staging.stat(&staged, Follow::Never).is_ok_and(|found| is_it(&found)) {
            return holds(staging, &staged).ok_or_else(|| {
                let _ = staging.remove_tree(&staged);
                changed()
            });
        }
    }
    let found = root.stat(from, Follow::Never).map_err(io)?;
    let same = is_it(&found) && found.links == 1 && Former::of(&found) == *former;
    let is_still_it = same || (again && is_it(&found) && holds(root, from).is_some());
    if !is_still_it {
        return Err(changed());
    }
    staging.remove_tree(&staged).map_err(io)?;
    root.hard_link_to(from, staging, &staged).map_err(io)?;
    // RACE: the link itself changes the time of change. Who wrote in between has moved the other time, unless he put that back.
    let linked = staging.stat(&staged, Follow::Never).map_err(io)?;
    if is_it(&linked) && linked.size == found.size && linked.mtime == found.mtime {
        return Ok(());
    }
    staging.remove_tree(&staged).map_err(io)?;
    Err(changed())
}
