//! Carries out what a commit has written down, and finishes what an interrupted run had begun to publish.
//!
//! What always holds: once the record is stored a run can only go forward. Each step is done again without harm, by
//! this run or by the next one, and the manifest that is put in force lists nothing that a step did not bring about.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fs::File;
use std::io::{ErrorKind, Read as _, Write as _};

use rustix::fs::{Mode, RenameFlags};
use rustix::io::Errno;

use super::append::append;
use super::area::Area;
use super::audited;
use super::changes::{self, Changes};
use super::metadata::{Acls, Compared, Existing};
use super::moved::{self, Renamed};
use super::put::Put;
use super::recall;
pub(super) use super::record::Record;
use super::strangers::bring_over;
use super::target::{MANIFEST, STATE, io, rel};
use super::trash::{Trash, rename_whole};
use crate::endpoint::Error;
use crate::manifest::{Audience, Digest, Entry, Manifest, Readers, Tree, format};
use crate::monitor::Silent;
use crate::path::RelPath;
use crate::plan::publish::Step;
use crate::root::{FileKind, Follow, Metadata, Root, RootError};

const RECORD: &str = "commit";
/// What becomes of the manifest: what is put in. What is taken out stands in the record.
const CHANGES: &str = "changes";
/// The manifest that is put in force in the end. It was written before the record once, and nothing else then.
const NEW_MANIFEST: &str = "manifest";
const NO_EXCHANGE: &str = "its file system cannot exchange two directories in one step, so that one that is there and changes \
                           cannot be published whole; give it a new name, or use ext4, XFS or Btrfs";
const HELD_BACK: &str = "stays as it is, since other paths could not be published";
/// The ACLs of what gets its permissions after it was published.
const ACLS: &str = "acls";

/// Stores what is to be published; from then on the run goes forward only.
pub(super) fn write_down(
    root: &Root,
    staging: &Root,
    record: &Record,
    changes: &Changes<'_>,
    acls: &Acls,
) -> Result<(), Error> {
    // DURABILITY: all content and permissions first, then what becomes of the manifest; only then the record that makes them
    // the truth.
    root.sync_filesystem().map_err(io)?;
    store(staging, ACLS, acls.encode().as_bytes())?;
    store_by(staging, CHANGES, |file| {
        let mut encoder = format::Encoder::new(file, changes.generation, changes.created).map_err(Failed::Write)?;
        for item in changes.put.iter() {
            encoder.add(&item.map_err(Failed::Other)?.0).map_err(Failed::Write)?;
        }
        encoder.finish().map_err(Failed::Write)
    })?;
    staging.sync_dir(None).map_err(io)?;
    store(staging, RECORD, record.encode(&changes.gone).as_bytes())?;
    staging.sync_dir(None).map_err(io)
}

/// Does what was written down: after it everything is to be seen. Answers paths that could not be published, and why. A run
/// is ended by [`put_in_force`]. A repair ends here: what was written down of the manifest only tells what the things it
/// brings back are to have; that of the root is left alone, whatever could not be done.
pub(super) fn carry_out(
    root: &Root,
    staging: &Root,
    area: Area,
    record: &Record,
    changes: &Changes<'_>,
    acls: &Acls,
    compared: &Compared<'_>,
) -> Result<Vec<(RelPath, String)>, Error> {
    let existing = Existing::new(root, staging, &changes.put, acls, compared);
    let problems = execute(root, staging, record, &changes.put, &existing)?;
    audited::tell(root, area, record, changes, &problems)?;
    if area == Area::Repair {
        finish(root, area)?;
    }
    Ok(problems)
}

/// A manifest that was put in force.
pub(super) struct InForce {
    /// SHA-256 of its file.
    pub(super) digest: Digest,
    /// Who may read all that it lists, wherever that lies.
    readers: Audience,
}

/// Puts the manifest in force that what was carried out makes of the `old` one, and clears the staging area. `each` is given
/// what is listed, one by one; with an entry that is the source's comes its index there.
#[allow(clippy::too_many_arguments)]
pub(super) fn put_in_force(
    root: &Root,
    staging: &Root,
    record: &Record,
    changes: &Changes<'_>,
    old: &Tree,
    problems: &[(RelPath, String)],
    stays: &dyn Fn(&Entry) -> bool,
    each: &mut dyn FnMut(&Entry, Option<u32>),
) -> Result<InForce, Error> {
    // Permissions that could not be given do not make it another file.
    let metadata: HashSet<&RelPath> =
        record.steps.iter().filter(|step| matches!(step, Step::ApplyMetadata(_))).map(Step::path).collect();
    let content: HashSet<&RelPath> =
        record.steps.iter().map(Step::path).filter(|path| !metadata.contains(path)).collect();
    let undone = problems.iter().map(|(path, _)| path).filter(|path| content.contains(path)).collect();
    let is_there = |entry: &Entry| root.stat(&entry.path, Follow::Never).is_ok();
    let mut readers = Readers::default();
    let digest = store_by(staging, NEW_MANIFEST, |file| {
        let mut encoder = format::Encoder::new(file, changes.generation, changes.created).map_err(Failed::Write)?;
        let mut failed = None;
        let mut add = |entry: &Entry, index: Option<u32>| {
            if failed.is_none() {
                failed = encoder.add(entry).err();
                readers.add(entry);
                each(entry, index);
            }
            Ok::<(), Error>(())
        };
        changes::carried_out(changes, old, &undone, stays, &is_there, &mut add).map_err(Failed::Other)?;
        failed.map_or(Ok(()), |error| Err(Failed::Write(error)))?;
        encoder.finish().map_err(Failed::Write)
    })?;
    let in_force = InForce { digest, readers: readers.audience() };
    let audience = crate::staging::audience_at(root, in_force.readers.clone());
    if let Ok(file) = staging.open_read(&rel(NEW_MANIFEST)?, Follow::Never) {
        crate::staging::admit(&file, &audience);
    }
    finish(root, Area::Run)?;
    crate::staging::open_state(root, &audience);
    Ok(in_force)
}

/// Lets those read the manifest in force who may read what it lists.
pub(super) fn admit_readers(root: &Root, in_force: &InForce) -> Result<(), Error> {
    let audience = crate::staging::audience_at(root, in_force.readers.clone());
    if let Ok(file) = root.open_read(&rel(MANIFEST)?, Follow::Never) {
        crate::staging::admit(&file, &audience);
    }
    crate::staging::open_state(root, &audience);
    Ok(())
}

pub(super) fn store(staging: &Root, name: &str, bytes: &[u8]) -> Result<(), Error> {
    store_by(staging, name, |file| file.write_all(bytes).map_err(Failed::Write))
}

/// Why something is not stored.
enum Failed {
    Write(std::io::Error),
    Other(Error),
}

/// Stores what `write` writes, in place of what has the name.
fn store_by<T>(staging: &Root, name: &str, write: impl FnOnce(&mut File) -> Result<T, Failed>) -> Result<T, Error> {
    let path = rel(&format!("{name}.new"))?;
    staging.remove_tree(&path).map_err(io)?;
    let mut file = staging.create_new(&path, 0o600).map_err(io)?;
    let shown = || crate::error::shown(&staging.shown().join(name)).to_string();
    let written = write(&mut file).and_then(|written| file.sync_all().map(|()| written).map_err(Failed::Write));
    let written = written.map_err(|failed| match failed {
        Failed::Write(source) => Error::Io { operation: "write", path: shown(), source },
        Failed::Other(error) => error,
    })?;
    staging.rename(&path, &rel(name)?, RenameFlags::empty()).map_err(io)?;
    Ok(written)
}

/// Whether nothing else can be expected to work either: the disk, not the path, is at fault.
fn ends_the_run(error: &Error) -> bool {
    let Error::Io { source, .. } = error else { return false };
    let full =
        matches!(source.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::ReadOnlyFilesystem);
    let errno = source.raw_os_error().map(Errno::from_raw_os_error);
    full || matches!(errno, Some(Errno::IO | Errno::NOMEM | Errno::MFILE | Errno::NFILE))
}

/// Does the steps that are not done yet. Those that the state of the target forbids are told and left.
fn execute(
    root: &Root,
    staging: &Root,
    record: &Record,
    put: &Put<'_>,
    existing: &Existing<'_>,
) -> Result<Vec<(RelPath, String)>, Error> {
    let trash = record.trash.as_ref().map(|name| Trash::new(root, name)).transpose()?;
    let mut problems = Vec::new();
    let mut touched: BTreeSet<RelPath> = BTreeSet::new();
    let mut opened: BTreeMap<RelPath, u32> = BTreeMap::new();
    let mut note = |path: &RelPath, result: Result<(), Error>| match result {
        Err(error) if ends_the_run(&error) => Err(error),
        Err(error) => {
            problems.push((path.clone(), crate::error::chain(&error)));
            Ok(false)
        }
        Ok(()) => Ok(true),
    };
    let (mut failed, mut missing) = (false, false);
    // Old names of what has no new one.
    let mut stays: BTreeSet<&RelPath> = BTreeSet::new();
    for step in &record.steps {
        let path = step.path();
        if matches!(step, Step::RemoveFile(_)) && stays.contains(path) {
            note(path, Err(Error::Usage("stays, since what it was to be called was not published".into())))?;
            continue;
        }
        if missing && is_held_back(staging, step)? {
            note(path, Err(Error::Usage(HELD_BACK.into())))?;
            continue;
        }
        let moved: Vec<(&RelPath, &Renamed)> = match step {
            Step::Replace(_) => record.renamed.get_key_value(path).into_iter().collect(),
            Step::NewDirectory(_) => record.renamed.range(path..).take_while(|(new, _)| new.is_within(path)).collect(),
            _ => Vec::new(),
        };
        if matches!(step, Step::TakeAway(_)) && failed {
            // A pointer that did not come may be one of them.
            note(path, Err(Error::Usage("stays, since other paths failed".into())))?;
            continue;
        }
        touched.extend(path.parent());
        let give = || {
            for (new, renamed) in &moved {
                let entry = put.get(new)?;
                moved::link(root, staging, new, renamed, (entry.as_deref(), record.again))?;
            }
            Ok(())
        };
        let take = || match step {
            Step::Replace(_) | Step::NewDirectory(_) if let Err(error) = give() => Err(error),
            Step::Replace(_) if record.grown.contains_key(path) => match put.get(path)? {
                Some(entry) => append(root, staging, &entry, &record.grown[path], record.again)
                    .and_then(|()| existing.apply(&entry)),
                None => Ok(()),
            },
            Step::Replace(_) | Step::NewDirectory(_) if record.only_new => publish_new(root, staging, path),
            Step::Replace(_) | Step::NewDirectory(_) => publish_one(root, staging, path, trash.as_ref()),
            Step::Exchange(_) => exchange(root, staging, path, record.inodes.get(path).copied()),
            Step::ApplyMetadata(_) => put.get(path)?.map_or(Ok(()), |entry| existing.apply_compared(&entry)),
            Step::RemoveFile(_) => match &trash {
                Some(trash) => trash.take(path),
                None => gone(root.unlink(path).map_err(io)),
            },
            Step::RemoveDirectory(_) => match &trash {
                Some(trash) => trash.take_directory(path),
                None => gone(root.rmdir(path).map_err(io)),
            },
            Step::TakeAway(_) => match &trash {
                Some(trash) => trash.take_whole(path),
                None => take_away(root, path),
            },
        };
        let result = match take() {
            Err(error) if denied(&error) => {
                // To move the old directory of an exchange needs the right to write in it as well.
                let own = matches!(step, Step::Exchange(_)) && open_up(root, path).is_some();
                let above = path.parent().and_then(|above| Some((open_up(root, &above)?, above)));
                let any = own || above.is_some();
                if let Some((mode, above)) = above {
                    opened.entry(above).or_insert(mode);
                }
                if any { take() } else { Err(error) }
            }
            result => result,
        };
        let mut done = note(path, result)?;
        if done && matches!(step, Step::Exchange(_)) {
            let old = rel(Area::Run.in_root())?.join(staged_whole(path)?.as_bytes());
            let old = old.map_err(|error| Error::Usage(error.to_string()))?;
            if let Some(goes) = &record.goes {
                touched.extend(bring_over(root, &old, path, goes)?);
            }
            if let Some(trash) = &trash {
                done = note(path, trash.take_rest(&old, path))?;
            }
        }
        // A directory that still holds something says nothing of what came.
        failed |= !done && !matches!(step, Step::RemoveDirectory(_));
        missing |= !done && matches!(step, Step::Replace(_) | Step::NewDirectory(_) | Step::Exchange(_));
        match done {
            true => touched.extend(moved.iter().filter_map(|(new, _)| new.parent())),
            false => stays.extend(moved.iter().map(|(_, renamed)| &renamed.from)),
        }
        if done && matches!(step, Step::NewDirectory(_) | Step::Exchange(_)) {
            touched.insert(path.clone());
        }
    }
    for (path, mode) in opened.iter().rev() {
        note(path, gone(close_again(root, path, *mode)))?;
    }
    // What happened in a directory moved its time; and new ones still have the mode they were staged with.
    let made: Vec<&RelPath> =
        record.steps.iter().filter(|step| matches!(step, Step::NewDirectory(_))).map(Step::path).collect();
    let as_it_is = |path: &RelPath| record.only_new && !made.iter().any(|above| path.is_within(above));
    for path in touched.iter().rev().filter(|path| !as_it_is(path)) {
        if let Some(entry) = put.get(path)?.filter(|entry| entry.is_directory()) {
            note(path, existing.apply(&entry))?;
        }
    }
    Ok(problems)
}

/// Whether it is not to be done once something did not come: a pointer may say that it is there, and what goes may be what it was to be
/// made of.
fn is_held_back(staging: &Root, step: &Step) -> Result<bool, Error> {
    match step {
        Step::RemoveFile(_) | Step::RemoveDirectory(_) => Ok(true),
        Step::Replace(path) => Ok(staging.stat(&super::target::staged_in(b"last/", path)?, Follow::Never).is_ok()),
        _ => Ok(false),
    }
}

fn denied(error: &Error) -> bool {
    matches!(error, Error::Io { source, .. } if source.kind() == ErrorKind::PermissionDenied)
}

/// Lets us write in a directory that is ours and does not; gives the mode it had. `None` when that is not the cause.
pub(super) fn open_up(root: &Root, path: &RelPath) -> Option<u32> {
    let directory = root.open_dir(Some(path), Follow::Never).ok()?;
    let found = Metadata::of(&directory).ok()?;
    let ours = found.uid == rustix::process::geteuid().as_raw();
    if !ours || found.mode & 0o300 == 0o300 {
        return None;
    }
    rustix::fs::fchmod(&directory, Mode::from_raw_mode(found.mode | 0o700)).ok()?;
    Some(found.mode)
}

pub(super) fn close_again(root: &Root, path: &RelPath, mode: u32) -> Result<(), Error> {
    let directory = root.open_dir(Some(path), Follow::Never).map_err(io)?;
    rustix::fs::fchmod(&directory, Mode::from_raw_mode(mode)).map_err(|errno| Error::Io {
        operation: "give its mode back to",
        path: crate::error::shown(&root.shown().join(path.as_path())).to_string(),
        source: errno.into(),
    })
}

/// What is not there needs no removing; what has another kind than before was put in its place by a later step, when
/// steps are done again.
fn gone(result: Result<(), Error>) -> Result<(), Error> {
    match result {
        Err(Error::Io { source, .. })
            if matches!(source.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory | ErrorKind::IsADirectory) =>
        {
            Ok(())
        }
        other => other,
    }
}

/// Moves a directory to where everything is removed once the run has ended.
fn take_away(root: &Root, path: &RelPath) -> Result<(), Error> {
    let found = match root.stat(path, Follow::Never) {
        Ok(found) if found.kind == FileKind::Directory => found,
        Err(error) if !matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => return Err(io(error)),
        _ => return Ok(()),
    };
    let place = rel(Area::Run.in_root())?.join(b"gone").and_then(|gone| gone.join(path.as_bytes()));
    let place = place.map_err(|error| Error::Usage(error.to_string()))?;
    if let Some(above) = place.parent() {
        root.mkdir_all(&above, 0o700).map_err(io)?;
    }
    rename_whole(root, path, &found, &place)
}

/// Renames the staged thing to its place; when it is not staged any more that was done before. What it replaces is kept in the
/// trash, where there is one.
fn publish_one(root: &Root, staging: &Root, path: &RelPath, trash: Option<&Trash<'_>>) -> Result<(), Error> {
    for tree in [&b"tree/"[..], b"last/"] {
        let staged = RelPath::new([tree, path.as_bytes()].concat());
        let Ok(staged) = staged else { continue };
        match staging.stat(&staged, Follow::Never) {
            Ok(_) => {
                trash.map_or(Ok(()), |trash| trash.keep(path))?;
                return staging.rename_to(&staged, root, path, RenameFlags::empty()).map_err(io);
            }
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(io(error)),
        }
    }
    root.stat(path, Follow::Never).map(drop).map_err(io)
}

const TAKEN: &str =
    "something has got this name meanwhile, and what is there is not replaced with the right 'write-once'";

/// Renames the staged thing to its place when nothing is there, not even since the run was compared.
fn publish_new(root: &Root, staging: &Root, path: &RelPath) -> Result<(), Error> {
    for tree in [&b"tree/"[..], b"last/"] {
        let Ok(staged) = RelPath::new([tree, path.as_bytes()].concat()) else { continue };
        let found = match staging.stat(&staged, Follow::Never) {
            Ok(found) => found,
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            Err(error) => return Err(io(error)),
        };
        let renamed = staging.rename_to(&staged, root, path, RenameFlags::NOREPLACE);
        // FUSE and NFS may not know the flag. A further name is not made where there is one.
        let renamed = renamed.or_else(|error| match error.kind() {
            ErrorKind::InvalidInput if found.kind == FileKind::Directory => {
                staging.rename_to(&staged, root, path, RenameFlags::empty())
            }
            ErrorKind::InvalidInput => staging.hard_link_to(&staged, root, path).and_then(|()| staging.unlink(&staged)),
            _ => Err(error),
        });
        return renamed.or_else(|error| match root.stat(path, Follow::Never) {
            // The further name was made before, and the run cut off then.
            Ok(there) if (there.device, there.inode) == (found.device, found.inode) => {
                staging.unlink(&staged).map_err(io)
            }
            Ok(_) if error.kind() == ErrorKind::AlreadyExists => {
                Err(Error::Refused { by: "the receiver".into(), reason: TAKEN.into() })
            }
            _ => Err(io(error)),
        });
    }
    root.stat(path, Follow::Never).map(drop).map_err(io)
}

/// Where a directory is staged that is to be published whole.
fn staged_whole(path: &RelPath) -> Result<RelPath, Error> {
    rel("tree")?.join(path.as_bytes()).map_err(|error| Error::Usage(error.to_string()))
}

/// Exchanges a directory for the one that is staged, unless that was done before: then the old one is staged.
fn exchange(root: &Root, staging: &Root, path: &RelPath, new: Option<u64>) -> Result<(), Error> {
    let staged = staged_whole(path)?;
    let found = root.stat(path, Follow::Never).map_err(io)?;
    if Some(found.inode) != new {
        staging.rename_to(&staged, root, path, RenameFlags::EXCHANGE).map_err(|error| match error.kind() {
            // FUSE and NFS may not know the flag.
            ErrorKind::InvalidInput => {
                io(RootError { source: std::io::Error::new(ErrorKind::Unsupported, NO_EXCHANGE), ..error })
            }
            _ => io(error),
        })?;
    }
    Ok(())
}

/// Puts the new manifest in force and clears the staging area, in an order that a crash does not hurt.
fn finish(root: &Root, area: Area) -> Result<(), Error> {
    let path = rel(area.in_root())?;
    // DURABILITY: what was renamed first, then the manifest that lists it, then the record that would do it again.
    root.sync_filesystem().map_err(io)?;
    if area == Area::Run {
        let staging = root.subroot(&path).map_err(io)?;
        match staging.rename_to(&rel(NEW_MANIFEST)?, root, &rel(MANIFEST)?, RenameFlags::empty()) {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(io(error)),
        }
        root.sync_dir(Some(&rel(STATE)?)).map_err(io)?;
    }
    root.remove_tree(&path).map_err(io)
}

/// The content of a file; `None` where there is none.
pub(super) fn read(root: &Root, name: &str) -> Result<Option<Vec<u8>>, Error> {
    let mut bytes = Vec::new();
    match root.open_read(&rel(name)?, Follow::Never) {
        Ok(mut file) => {
            let path = crate::error::shown(&root.shown().join(name)).to_string();
            file.read_to_end(&mut bytes).map_err(|source| Error::Io { operation: "read", path, source })?;
            Ok(Some(bytes))
        }
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(io(error)),
    }
}

/// Finishes what an interrupted run had begun to publish. Says whether there was something to finish. `state` is the
/// directory `.lockstep` of the root, which nobody else may have a hand in: what is written down there is done.
pub(super) fn recover(root: &Root, state: &Root) -> Result<bool, Error> {
    let mut finished = false;
    for area in Area::ALL {
        finished |= recover_in(root, state, area)?;
    }
    Ok(finished)
}

fn recover_in(root: &Root, state: &Root, area: Area) -> Result<bool, Error> {
    let staging = match state.subroot(&rel(area.in_state())?) {
        Ok(staging) => staging,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(io(error)),
    };
    let Some(record) = read(&staging, RECORD)? else { return Ok(false) };
    let damaged = |what: &str| Error::Refused {
        by: crate::error::shown(root.shown()).to_string(),
        reason: format!(
            "{what} of an interrupted run is damaged; look at {}, then remove it",
            crate::error::shown(staging.shown())
        ),
    };
    let (changes, whole) = match read(&staging, CHANGES)? {
        Some(text) => (Some(text), false),
        None => (read(&staging, NEW_MANIFEST)?, true),
    };
    let Some(text) = changes else {
        // It was put in force already: only the clearing was cut off.
        finish(root, area)?;
        return Ok(true);
    };
    let put = format::decode(&text).map_err(|_| damaged("the manifest"))?;
    let record = std::str::from_utf8(&record).ok().and_then(Record::parse);
    let (record, gone) = record.ok_or_else(|| damaged("the record"))?;
    let acls = read(&staging, ACLS)?.and_then(|bytes| Acls::parse(std::str::from_utf8(&bytes).ok()?));
    let acls = acls.ok_or_else(|| damaged("the list of ACLs"))?;
    let (old, _) = recall::manifest(root, &Silent::default())?;
    let Manifest { generation, created, tree } = put;
    if area == Area::Run && !whole && old.generation >= generation {
        finish(root, area)?;
        return Ok(true);
    }
    let changes = Changes { generation, created, put: Put::from(tree), gone };
    audited::announce(root, area, &record, &changes, &Silent::default())?;
    let problems = carry_out(root, &staging, area, &record, &changes, &acls, &|_| None)?;
    if area == Area::Run {
        put_in_force(root, &staging, &record, &changes, &old.tree, &problems, &|_| !whole, &mut |_, _| {})?;
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn h32_an_exchange_that_is_done_again_leaves_the_new_directory_in_place() {
        let at = tempfile::tempdir().unwrap();
        let root = Root::open(at.path()).unwrap();
        let (unit, staged) = (RelPath::new("unit").unwrap(), RelPath::new("staging/tree/unit").unwrap());
        for (path, name) in [(&unit, "old"), (&staged, "new")] {
            root.mkdir_all(path, 0o700).unwrap();
            root.mkdir(&path.join(name).unwrap(), 0o700).unwrap();
        }
        let new = root.stat(&staged, Follow::Never).unwrap().inode;
        let staging = root.subroot(&RelPath::new("staging").unwrap()).unwrap();
        for _ in 0..3 {
            exchange(&root, &staging, &unit, Some(new)).unwrap();
            assert_eq!(root.names(Some(&unit), Follow::Never).unwrap(), [b"new".to_vec()]);
            assert_eq!(root.names(Some(&staged), Follow::Never).unwrap(), [b"old".to_vec()]);
        }
    }
}
