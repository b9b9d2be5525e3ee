//! What was staged of a unit that still grows, before there is a run that may publish it.
//!
//! What always holds: it lies apart from what a run stages, so that no run publishes it that does not ask for just this file,
//! with this content and these permissions; a file counts as whole only by a digest that was proven when it was staged, and
//! while its inode, size and times are what they were then.

use std::io::{ErrorKind, Read as _};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::fs::RenameFlags;

use super::area::Area;
use super::by_index::ByIndex;
use super::metadata;
use super::publish;
use super::target::{Run, Staged, io, rel, stage_failure};
use crate::endpoint::Error;
use crate::manifest::{Entry, Tree};
use crate::path::RelPath;
use crate::plan::{Need, Plan};
use crate::root::{FileKind, Follow, Metadata, Root};
use crate::scan::cache::DigestTable;
use crate::staging::{Journal, Permissions};

/// The digests of what is whole.
const WHOLE: &str = "digests";
/// What nobody has asked for by then is not waited for any more.
const KEPT: Duration = Duration::from_secs(24 * 3600);

fn table(early: &Root) -> DigestTable {
    let read = || -> Option<DigestTable> {
        let mut bytes = Vec::new();
        early.open_read(&rel(WHOLE).ok()?, Follow::Never).ok()?.read_to_end(&mut bytes).ok()?;
        DigestTable::from_bytes(&bytes)
    };
    read().unwrap_or_default()
}

/// Keeps for later what a run staged that was not to publish anything.
pub(super) fn keep(early: &Root, source: &Tree, staged: &ByIndex<Staged>) -> Result<(), Error> {
    let whole = staged.iter().filter_map(|(index, staged)| {
        let entry = source.entries().get(index as usize)?;
        Some((staged.fingerprint(entry)?, staged.digest))
    });
    let mut whole = whole.peekable();
    if whole.peek().is_none() {
        return Ok(());
    }
    let mut known = table(early);
    whole.for_each(|(file, digest)| known.insert(file, digest));
    publish::store(early, WHOLE, &known.to_bytes())
}

/// For a run that only stages: what is there already is done, or gone on with. Adds its files to those that are listed.
pub(super) fn prepare(run: &Run, early: &Root, source: &Tree, plan: &mut Plan) -> Result<(), Error> {
    let (journal, whole) = (Journal::load(early).map_err(|error| stage_failure(&error, early))?, table(early));
    let mut files = Vec::new();
    for action in &mut plan.actions {
        let entry = &source.entries()[action.index as usize];
        let Some((size, digest)) = entry.file().filter(|_| matches!(action.need, Need::Content { .. })) else {
            // Nothing else is to be done before it is known what becomes of the whole.
            action.need = Need::Nothing;
            continue;
        };
        let there = early.stat(&run.staged_path(&entry.path)?, Follow::Never).ok();
        let known = there.as_ref().and_then(|there| whole.get(there));
        action.need = match known {
            Some(known) if Some(known) == digest => Need::Nothing,
            _ => Need::Content { resume_at: journal.resume_at(early, &entry.path, size, entry.mtime) },
        };
        if let Some(above) = run.staged_path(&entry.path)?.parent() {
            early.mkdir_all(&above, 0o700).map_err(io)?;
        }
        files.push((entry.path.clone(), size, entry.mtime));
    }
    journal.with(files).store(early).map_err(|error| stage_failure(&error, early))
}

/// Takes over into `staging` what was staged before of what `plan` wants, and says so in it. Gives the files that are whole.
pub(super) fn take(run: &Run, staging: &Root, source: &Tree, plan: &mut Plan) -> Result<ByIndex<Staged>, Error> {
    let mut taken = ByIndex::default();
    let early = match run.root.subroot(&rel(Area::Early.in_root())?) {
        Ok(early) => early,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(taken),
        Err(error) => return Err(io(error)),
    };
    let journal = Journal::load(&early).map_err(|error| stage_failure(&error, &early))?;
    let whole = table(&early);
    for action in &mut plan.actions {
        let entry = &source.entries()[action.index as usize];
        let (Some((size, digest)), Need::Content { resume_at: 0 }) = (entry.file(), &action.need) else { continue };
        let path = run.staged_path(&entry.path)?;
        let Ok(there) = early.stat(&path, Follow::Never) else { continue };
        let known = whole.get(&there);
        let found = journal.resume_at(&early, &entry.path, size, entry.mtime);
        if found == 0 && known.is_none() {
            continue;
        }
        let wanted = run.permissions(entry)?;
        early.rename_to(&path, staging, &path, RenameFlags::empty()).map_err(io)?;
        action.need = match known.filter(|known| Some(*known) == digest && has(staging, &path, entry, &there, &wanted))
        {
            Some(known) => {
                // The new name is a change of its own.
                let found = staging.stat(&path, Follow::Never).map_err(io)?;
                taken.insert(action.index, Staged::of(entry, known, &found));
                Need::Nothing
            }
            None => Need::Content { resume_at: found },
        };
        if let Some(above) = path.parent() {
            // The last of a directory takes it with it.
            above.ancestors().chain([above.clone()]).collect::<Vec<_>>().iter().rev().for_each(|above| {
                let _ = early.rmdir(above);
            });
        }
    }
    Ok(taken)
}

/// Whether what is staged has the permissions that it is to have now; the rules may have changed.
fn has(staging: &Root, path: &RelPath, entry: &Entry, there: &Metadata, wanted: &Permissions) -> bool {
    there.kind == FileKind::Regular
        && there.mtime == entry.mtime
        && there.mode == wanted.mode
        && wanted.uid.is_none_or(|uid| uid == there.uid)
        && wanted.gid.is_none_or(|gid| gid == there.gid)
        && !wanted.acl.as_ref().is_some_and(|lists| metadata::acl_differs(staging, path, lists))
}

/// Removes what has waited for too long.
pub(super) fn collect(root: &Root) -> Result<(), Error> {
    let path = rel(Area::Early.in_root())?;
    let early = match root.subroot(&path) {
        Ok(early) => early,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(io(error)),
    };
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let oldest = now.saturating_sub(KEPT).as_secs() as i64;
    let (mut waiting, mut directories, mut kept) = (vec![rel("tree")?], Vec::new(), false);
    while let Some(directory) = waiting.pop() {
        let names = match early.names(Some(&directory), Follow::Never) {
            Ok(names) => names,
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            Err(error) => return Err(io(error)),
        };
        directories.push(directory.clone());
        for name in names {
            let Ok(path) = directory.join(&name) else { continue };
            let Ok(found) = early.stat(&path, Follow::Never) else { continue };
            match found.kind {
                FileKind::Directory => waiting.push(path),
                _ if found.ctime.seconds < oldest => early.unlink_anyway(&path).map_err(io)?,
                _ => kept = true,
            }
        }
    }
    if !kept {
        return root.remove_tree(&path).map_err(io);
    }
    directories.iter().rev().for_each(|directory| {
        let _ = early.rmdir(directory);
    });
    Ok(())
}
