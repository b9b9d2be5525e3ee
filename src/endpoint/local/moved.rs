//! Files that only get another name: what goes under one name in a run is published under another, and is neither sent nor copied.
//!
//! What always holds: the old name stays until the new one is there, and of the file nothing changes but its names. Nobody else
//! has it under a third name, so that it has one again at the end.

use super::alike::Opened;
use super::metadata;
use super::target::{self, Run, State, io};
use crate::endpoint::{CommitOptions, Error};
use crate::manifest::{Digest, Entry};
use crate::path::RelPath;
use crate::root::{FileKind, Follow, Metadata, Root};
use crate::staging::{StageError, StagedFile};

const GONE: &str = "what it was to be made of there was changed by somebody else meanwhile; the next run sends it";

/// A file that is to get another name.
#[derive(Debug, Clone)]
pub(super) struct Moved {
    /// Where it lies, and the number of that among what it may be made of.
    pub(super) from: RelPath,
    pub(super) piece: u32,
    /// What it holds.
    pub(super) digest: Digest,
}

impl Run {
    /// Whether what `there` is goes in this run, and has all that `entry` is to have.
    pub(super) fn moves(&self, entry: &Entry, there: &Opened) -> bool {
        let options = &self.options;
        let may = options.deletes && self.publishes() && !options.verify_disk && options.trash_seconds.is_none();
        if !may || self.repair.is_some() {
            return false;
        }
        let goes = self.state().plan.removes(there.path());
        goes && there.unchanged().is_some_and(|found| self.is_to_be(entry, there.path(), &found))
    }

    /// Whether the file at `path` has the permissions and the time that `entry` is to have, and no other name.
    fn is_to_be(&self, entry: &Entry, path: &RelPath, found: &Metadata) -> bool {
        let Ok(wanted) = self.permissions(entry) else { return false };
        let same = |asked: Option<u32>, has: u32| asked.is_none_or(|asked| asked == has);
        found.kind == FileKind::Regular
            && found.links == 1
            && found.mtime == wanted.mtime
            && found.mode == wanted.mode
            // What is to be executed is hashed where it lies first.
            && found.mode & 0o111 == 0
            && same(wanted.uid, found.uid)
            && same(wanted.gid, found.gid)
            && !wanted.acl.as_ref().is_some_and(|lists| metadata::acl_differs(&self.root, path, lists))
    }
}

/// Gives what only gets another name that name in staging, or copies it where the old one stays after all. Answers what was lost.
///
/// # Errors
/// What ends the run: a full disk.
pub(super) fn stage(
    run: &Run,
    staging: &Root,
    state: &mut State,
    options: &CommitOptions,
) -> Result<Vec<(RelPath, String)>, Error> {
    let goes = options.delete && !options.delete_later && options.retire.is_empty() && options.spare.is_empty();
    let mut lost = Vec::new();
    for (index, Moved { piece, digest, .. }) in state.moved.clone() {
        let entry = state.source.entries()[index as usize].clone();
        let path = run.staged_path(&entry.path)?;
        let size = entry.file().map_or(0, |(size, _)| size);
        staging.remove_tree(&path).map_err(io)?;
        let there = run.opened(state, index, piece).filter(|there| there.holds(size, Some(digest)));
        let linked = there.as_ref().filter(|_| goes).and_then(|there| link(run, staging, &entry, there, &path));
        let found = match (linked, there) {
            (Some(found), _) => Ok(found),
            (None, Some(there)) => copy(run, staging, &entry, &there, (&path, digest)),
            (None, None) => Err(StageError::Copy(GONE.to_owned())),
        };
        match found {
            Ok(found) => state.staged.get_mut().insert(index, target::Staged::of(&entry, digest, &found)),
            Err(error) if error.storage_full() => return Err(target::stage_failure(&error, staging)),
            Err(error) => {
                lost.push((entry.path.clone(), crate::error::chain(&error)));
                state.staged.get_mut().remove(index);
            }
        }
    }
    Ok(lost)
}

/// Gives it its name in staging; what it is then, where it is still what it was.
fn link(run: &Run, staging: &Root, entry: &Entry, there: &Opened, path: &RelPath) -> Option<Metadata> {
    let before = there.unchanged().filter(|before| run.is_to_be(entry, there.path(), before))?;
    run.root.hard_link_to(there.path(), staging, path).ok()?;
    // RACE: another file may have got the old name, or this one may have been written to, until it was linked. A link changes the
    // time of change and the number of names, and nothing else.
    let same = |found: &Metadata| {
        let Metadata { ctime, links, atime, allocated, .. } = *found;
        links == 2 && Metadata { ctime, links, atime, allocated, ..before } == *found
    };
    let found = staging.stat(path, Follow::Never).ok().filter(same);
    if found.is_none() {
        let _ = staging.remove_tree(path);
    }
    found
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
