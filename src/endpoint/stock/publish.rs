//! Makes what is staged visible, and finishes what an interrupted run had begun to make visible.
//!
//! As at a local target: when everything is staged and proven, the steps and the new manifest are written down; from then on
//! the run can only go forward, and whoever comes next does again what was not done. The record says which manifest it
//! follows, so that it is void once another run has published.

use std::collections::{BTreeSet, HashSet};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use sha2::{Digest as _, Sha256};

use super::alike;
use super::audit::Log;
use super::execute::{Problems, execute};
use super::manifest_file::{NEW_MANIFEST, admit, mend, new_manifest, read_manifest};
use super::read::read_whole;
use super::record::{Record, Recorded};
use super::session::{self, Reply, about, extended, with_attributes};
use super::shell::{Job, Shell, Spare};
use super::stage::{OwnFile, clear, make_area, name_all, replace};
use super::target::{MANIFEST, Run, STATE, State, locked};
use super::trash::Trash;
use super::writer::grant;
use super::{DIRECTORY, append, at, audit, below, kind_of, moved};
use crate::endpoint::local::other_permissions;
use crate::endpoint::{CommitOptions, Committed, Error};
use crate::error::Escaped;
use crate::manifest::{Content, Digest, format};
use crate::monitor::{Event, Monitor, Silent};
use crate::path::RelPath;
use crate::plan::publish::{Publication, Step, steps};
use crate::plan::{Action, Change, Need, trash};
use crate::wire::sftp::{Attributes, packet};

pub(super) const RECORD: &str = "commit";
/// So long a look at the lock is believed.
const BELIEVED: Duration = Duration::from_secs(5);

/// Publishes the run.
pub(super) fn commit(run: &Arc<Run>, options: &CommitOptions, monitor: &dyn Monitor) -> Result<Committed, Error> {
    if run.options.dry_run {
        return Err(Error::Usage("a dry run publishes nothing".into()));
    }
    let (mut options, mut problems) = (options.clone(), Problems::default());
    let deletes = options.delete;
    append::settle(run, &mut options, &mut problems)?;
    moved::settle(run, &mut options, &mut problems)?;
    let options = &options;
    let held_back = deletes && !options.delete;
    let mut state = run.state();
    let state = &mut *state;
    let mut failed = settle(run, state, options, &mut problems).map_err(|error| run.explained(error))?;
    if !failed.is_empty() || !options.unreadable.is_empty() {
        hold_pointers_back(run, state, &mut failed, &mut problems);
    }
    let steps = planned(run, state, options, &failed);
    let manifest = new_manifest(run, state, options, &failed)?;
    let old = &state.old_manifest;
    if steps.is_empty() && run.rename_to.is_none() && old.generation > 0 && old.tree == manifest.tree {
        // The area may be another's by now, with what it is about to publish.
        if locked(&run.area).is_there() {
            still_locked(run)?;
        }
        clear(run)?;
        (state.tails, state.linked) = Default::default();
        let manifest_digest = state.old_digest.to_string();
        let (generation, problems) = (old.generation, problems.told);
        return Ok(Committed { generation, manifest_digest, problems, held_back, ..Committed::default() });
    }
    let text = format::encode(&manifest);
    let trash = run.options.trash_seconds.is_some().then(|| trash::name(manifest.created.seconds, manifest.generation));
    let (actor, source) = (run.options.actor.clone(), run.options.source.clone());
    let record = Record { base: state.old_digest, actor, source, steps, trash, linked: moved::written_down(state) };
    let log = ready(run, &record.steps).map_err(|error| run.explained(error))?;
    moved::check(run, state)?;
    let written = write_down(run, log, &record, &text, manifest.generation, monitor);
    let log = written.map_err(|error| run.explained(error))?;
    let done = execute(run, &record, &manifest.tree, Some(&state.target))?;
    let (manifest, text) = mend(run, &record, manifest, text, &state.old_manifest.tree, &done)?;

    let paths: Vec<(u32, &RelPath)> = published(state).filter(|(index, _)| !failed.contains(index)).collect();
    let removals = record.steps.iter().filter(|recorded| recorded.is_removal()).map(|recorded| recorded.step.path());
    let removed: Vec<&RelPath> = removals.filter(|path| !done.unpublished.contains(path)).collect();
    let published: HashSet<u32> =
        paths.into_iter().filter(|(_, path)| !done.left(path)).map(|(index, _)| index).collect();
    state.tails.retain(|index, _| published.contains(index));
    state.linked.retain(|index, _| published.contains(index));
    let state = &*state;
    let aside = record.trash.as_deref().map(|name| Trash::new(run, name));
    std::thread::scope(|scope| {
        let admitted = scope.spawn(|| admit(run, &manifest.tree));
        let kept = scope.spawn(|| alike::keep_sums(run, state, &manifest, monitor));
        let appended = audit::append(run, log, state, &published, &removed, &manifest, aside.as_ref());
        // A hint for later runs: whatever becomes of it, this one goes on.
        let _ = kept.join();
        appended?;
        joined(admitted.join())
    })?;
    finish(run, true)?;
    let trash = aside.map_or(Ok(None), |aside| aside.used())?;
    if let Some(path) = &run.rename_to {
        appear(run, path)?;
    }
    monitor.event(Event::Detail(&format!("generation {} is published", manifest.generation)));
    problems.told.extend(done.told);
    Ok(Committed {
        generation: manifest.generation,
        manifest_digest: Digest(Sha256::digest(&text).into()).to_string(),
        published: published.len() as u64,
        removed: removed.len() as u64,
        trash,
        retired: Vec::new(),
        put_off: Vec::new(),
        held_back,
        problems: problems.told,
    })
}

/// Everything that has to be so before the run is written down, none of which waits for another: the lock is still its own, what
/// the steps go through are directories, all content and permissions are on the disk, and the log is as it was left.
fn ready(run: &Run, steps: &[Recorded]) -> Result<Option<Log>, Error> {
    std::thread::scope(|scope| {
        let parents = scope.spawn(|| check_parents(run, steps));
        let durable = scope.spawn(|| bring_to_disk(run));
        let log = scope.spawn(|| audit::or_continue(Log::read(run)));
        // Of the clock that goes on while the machine sleeps.
        let looked = SystemTime::now();
        let lock = still_locked(run);
        lock?;
        joined(parents.join())?;
        joined(durable.join())?;
        let log = joined(log.join())?;
        // A disk may take its time, in which a lock that nobody keeps is taken over.
        if looked.elapsed().is_ok_and(|it| it < BELIEVED) { Ok(log) } else { still_locked(run).map(|()| log) }
    })
}

/// Makes sure that the lock is the run's own still.
pub(super) fn still_locked(run: &Run) -> Result<(), Error> {
    match locked(&run.lock).as_ref() {
        Some(lock) => lock.check(Escaped(&run.root).to_string()),
        None => Ok(()),
    }
}

fn joined<T>(ended: std::thread::Result<Result<T, Error>>) -> Result<T, Error> {
    ended.unwrap_or_else(|_| Err(Error::Usage("an internal error stopped the publishing".into())))
}

/// Tells the log what is about to be done, and stores the new manifest and then the record: from here on the run can only go
/// forward. Each has its name only when all of them are written.
fn write_down(
    run: &Run,
    mut log: Option<Log>,
    record: &Record,
    text: &[u8],
    generation: u64,
    monitor: &dyn Monitor,
) -> Result<Option<Log>, Error> {
    make_area(run, monitor)?;
    let session = &run.session;
    let head = audit::head_file(run);
    let (manifest, commit) = (OwnFile::new(&run.staging, NEW_MANIFEST), OwnFile::new(&run.staging, RECORD));
    let opening = log.iter().flat_map(|log| log.open(run, &head)).chain(manifest.open()).chain(commit.open());
    // One of an earlier run must not be put in force by the record of this one.
    let stale = about(packet::REMOVE, &at(&run.staging, NEW_MANIFEST));
    let mut replies = session.batch(opening.chain([stale]))?.into_iter();
    let head_handle = match &mut log {
        Some(log) => audit::or_continue(log.opened(run, &head, &mut replies))?,
        None => None,
    };
    let manifest_handle = manifest.opened(session, &mut replies)?;
    let commit_handle = commit.opened(session, &mut replies)?;

    let intent = audit::intent(run, generation, record.steps.len());
    let told = log.as_ref().map(|log| log.tell([intent], false)).transpose()?;
    let telling = match (&log, &told, &head_handle) {
        (Some(log), Some(told), Some(handle)) => log.write(session, &head, handle, told)?,
        _ => Vec::new(),
    };
    let of_log = telling.len();
    let manifest_writes = manifest.write(session, &manifest_handle, text);
    let of_manifest = manifest_writes.len();
    let commit_writes = commit.write(session, &commit_handle, record.encode().as_bytes());
    let mut results = session.all(telling.into_iter().chain(manifest_writes).chain(commit_writes))?.into_iter();
    let told = match (&mut log, told) {
        (Some(log), Some(told)) if of_log > 0 => {
            audit::or_continue(log.written(run, &told, results.by_ref().take(of_log).collect::<Vec<_>>()))?.is_some()
        }
        _ => false,
    };
    manifest.written(session, results.by_ref().take(of_manifest).collect::<Vec<_>>())?;
    commit.written(session, results)?;

    name_in_order(run, told.then_some(&head), &manifest, &commit)?;
    Ok(log.filter(|_| told))
}

/// Names what was written down, the record last.
fn name_in_order(run: &Run, head: Option<&OwnFile>, manifest: &OwnFile, commit: &OwnFile) -> Result<(), Error> {
    let session = &run.session;
    let files: Vec<&OwnFile> = head.into_iter().chain([manifest, commit]).collect();
    let mut named = name_all(session, &files)?.into_iter();
    let head = if head.is_some() { audit::or_continue(named.next().unwrap_or(Ok(()))).map(drop) } else { Ok(()) };
    let manifest = named.next().unwrap_or(Ok(()));
    named.next().unwrap_or(Ok(()))?;
    if head.is_err() || manifest.is_err() {
        // What is not published must not be finished by the next run either.
        session.order(about(packet::REMOVE, &at(&run.staging, RECORD)))?.ok();
    }
    head.and(manifest)
}

/// The paths of the plan, with their indices.
fn published(state: &State) -> impl Iterator<Item = (u32, &RelPath)> {
    let entries = state.source.entries();
    state.plan.actions.iter().map(|action| (action.index, &entries[action.index as usize].path))
}

fn planned(run: &Run, state: &State, options: &CommitOptions, failed: &HashSet<u32>) -> Vec<Recorded> {
    let publication = Publication {
        source: &state.source,
        target: &state.target,
        plan: &state.plan,
        delete: options.delete,
        failed: &|index| failed.contains(&index),
        last: &|path| run.is_last(path),
        unit: &|_, _| None,
    };
    let replaces = |step: &Step| matches!(step, Step::Replace(_));
    let pointer = |step: &Step| replaces(step) && run.is_last(step.path());
    let appended = append::appended(state);
    let append = |step: &Step| appended.get(step.path()).copied().filter(|_| replaces(step));
    steps(&publication)
        .into_iter()
        .map(|step| Recorded { pointer: pointer(&step), append: append(&step), step })
        .collect()
}

/// Makes sure that what the steps go through are directories still.
///
/// RACE: SFTP cannot hold a directory fast. Whoever may write in the target, and puts a link in the place of a directory
/// between this and a step, leads the step to where the link points.
fn check_parents(run: &Run, steps: &[Recorded]) -> Result<(), Error> {
    let new: HashSet<&RelPath> = steps
        .iter()
        .filter(|recorded| matches!(recorded.step, Step::NewDirectory(_)))
        .map(|recorded| recorded.step.path())
        .collect();
    let above: BTreeSet<RelPath> = steps
        .iter()
        .flat_map(|recorded| recorded.step.path().ancestors().take_while(|above| !new.contains(above)))
        .collect();
    let found = run.session.batch(above.iter().map(|path| about(packet::LSTAT, &below(&run.root, path))))?;
    for (path, found) in above.iter().zip(found) {
        if let Reply::Attributes(found) = found
            && kind_of(&found) != Some(DIRECTORY)
        {
            return Err(Error::Refused {
                by: run.session.client.host().to_owned(),
                reason: format!("'{path}' was a directory and is none any more; nothing was published, run again"),
            });
        }
    }
    Ok(())
}

/// Takes out of a record that is done again what has gone with a directory that something else has taken the place of by then: its
/// steps would lead through that. They are given.
fn drop_replaced(run: &Run, record: &mut Record) -> Result<Vec<Recorded>, Error> {
    let going: BTreeSet<&RelPath> =
        record.steps.iter().filter(|recorded| recorded.is_removal()).map(|recorded| recorded.step.path()).collect();
    let replaces = record.steps.iter().filter(|recorded| matches!(recorded.step, Step::Replace(_)));
    let in_the_way: Vec<RelPath> =
        replaces.map(|recorded| recorded.step.path()).filter(|path| going.contains(path)).cloned().collect();
    let found = run.session.batch(in_the_way.iter().map(|path| about(packet::LSTAT, &below(&run.root, path))))?;
    let found = in_the_way.iter().zip(found);
    let done: Vec<&RelPath> = found
        .filter(|(_, found)| matches!(found, Reply::Attributes(found) if kind_of(found) != Some(DIRECTORY)))
        .map(|(path, _)| path)
        .collect();
    let is_done =
        |recorded: &Recorded| recorded.is_removal() && done.iter().any(|path| recorded.step.path().is_within(path));
    let (dropped, left) = std::mem::take(&mut record.steps).into_iter().partition(is_done);
    record.steps = left;
    Ok(dropped)
}

/// Makes the links, gives new directories their permissions, and says which entries are not to be published.
fn settle(
    run: &Run,
    state: &mut State,
    options: &CommitOptions,
    problems: &mut Problems,
) -> Result<HashSet<u32>, Error> {
    let source = Arc::clone(&state.source);
    let mut failed: HashSet<u32> = options.failed.iter().copied().collect();
    let mut linked: HashSet<&RelPath> = HashSet::new();
    let mut requests: Vec<(u32, Vec<u8>)> = Vec::new();
    for action in &mut state.plan.actions {
        let index = action.index;
        let entry = &source.entries()[index as usize];
        let has_content = state.staged.contains_key(&index) && !failed.contains(&index);
        match (&entry.content, &action.need) {
            (Content::File { .. }, Need::Nothing) => {}
            (Content::File { .. }, _) if has_content => {
                action.change = if action.change == Change::Added { Change::Added } else { Change::Modified };
                linked.insert(&entry.path);
            }
            (Content::File { .. }, _) if state.kept.contains_key(&index) && !failed.contains(&index) => {}
            (Content::File { .. }, _) => {
                failed.insert(index);
                requests.push((index, about(packet::REMOVE, &run.staged_path(&entry.path))));
            }
            (Content::Directory, _) => {}
            _ if action.change == Change::MetadataOnly => {}
            (Content::Symlink { target }, _) => {
                let path = run.staged_path(&entry.path);
                requests.push((index, session::symlink(target, &path)));
                let wanted = run.permissions(entry)?;
                if run.session.offers.lsetstat && (wanted.uid.is_some() || wanted.gid.is_some()) {
                    let owner = (wanted.uid.unwrap_or(u32::MAX), wanted.gid.unwrap_or(u32::MAX));
                    requests.push((
                        index,
                        with_attributes(
                            packet::EXTENDED,
                            &path,
                            &Attributes { owner: Some(owner), ..Attributes::default() },
                        ),
                    ));
                }
            }
            (Content::HardLink { first }, _) => {
                if source.position(first).is_some_and(|at| failed.contains(&(at as u32))) {
                    failed.insert(index);
                    continue;
                }
                if let Some(file) = source.get(first) {
                    let (one, other) = (run.permissions(file)?, run.permissions(entry)?);
                    if (one.mode, one.uid, one.gid) != (other.mode, other.uid, other.gid) {
                        failed.insert(index);
                        problems.tell(&entry.path, other_permissions(first));
                        continue;
                    }
                }
                let from = if linked.contains(first) { run.staged_path(first) } else { below(&run.root, first) };
                requests.push((index, extended("hardlink@openssh.com", &[&from, &run.staged_path(&entry.path)])));
            }
        }
    }
    let (indices, packets): (Vec<u32>, Vec<Vec<u8>>) = requests.into_iter().unzip();
    for (index, result) in indices.into_iter().zip(run.session.all(packets)?) {
        if let Err(refusal) = result
            && !failed.contains(&index)
        {
            failed.insert(index);
            let entry = &source.entries()[index as usize];
            problems.tell(&entry.path, format!("cannot make the link: {refusal}"));
        }
    }
    // What was only asked about, and is as it was.
    let kept = |action: &Action| state.kept.contains_key(&action.index) && !action.differences.any();
    state.plan.actions.retain(|action| !kept(action) || failed.contains(&action.index));
    directories(run, state)?;
    Ok(failed)
}

/// A marker or pointer may say of just that which failed that it is there.
fn hold_pointers_back(run: &Run, state: &State, failed: &mut HashSet<u32>, problems: &mut Problems) {
    for action in &state.plan.actions {
        let entry = &state.source.entries()[action.index as usize];
        if !entry.is_directory() && run.is_last(&entry.path) && failed.insert(action.index) {
            let reason = "is held back, since other paths failed: it may say that they are there";
            problems.tell(&entry.path, reason.into());
        }
    }
}

/// Gives staged directories their permissions, from the leaves up.
fn directories(run: &Run, state: &State) -> Result<(), Error> {
    let source = &state.source;
    let actions = || state.plan.actions.iter().map(|action| (action, &source.entries()[action.index as usize]));
    let holds_pointer: HashSet<RelPath> = actions()
        .filter(|(_, entry)| !entry.is_directory() && run.is_last(&entry.path))
        .filter_map(|(_, entry)| entry.path.parent())
        .collect();
    let new = |path: &RelPath| state.target.get(path).is_none_or(|old| !old.is_directory());
    let mut packets = Vec::new();
    let mut paths = Vec::new();
    for (_, entry) in actions().filter(|(_, entry)| entry.is_directory() && new(&entry.path)) {
        let mut wanted = run.permissions(entry)?;
        // The top-most new directory gets its mode after the rename: without the right to write it cannot be moved. One
        // that a pointer is yet to be put into gets it after that.
        if entry.path.parent().is_none_or(|parent| !new(&parent)) || holds_pointer.contains(&entry.path) {
            wanted.mode = 0o700;
        }
        let path = run.staged_directory(&entry.path);
        packets.push(grant(packet::SETSTAT, &path, &wanted));
        paths.push(path);
    }
    packets.reverse();
    paths.reverse();
    let counts: Vec<usize> = packets.iter().map(Vec::len).collect();
    let mut results = run.session.all(packets.into_iter().flatten())?.into_iter();
    for (path, count) in paths.iter().zip(counts) {
        if let Some(refusal) = results.by_ref().take(count).find_map(Result::err) {
            return Err(run.session.refused("set owner, mode and time of", path, &refusal));
        }
    }
    Ok(())
}

/// One `sync -f` by a command where there is one; without, each file was brought to the disk when it was written.
fn bring_to_disk(run: &Run) -> Result<(), Error> {
    if !run.syncs {
        return Ok(());
    }
    let mut spare = run.shell();
    let failed = |reason: String| Error::Io {
        operation: "bring to stable storage what lies in",
        path: format!("{}:{}", run.session.client.host(), Escaped(&run.root)),
        source: std::io::Error::other(reason),
    };
    // One that ended meanwhile is started again: nothing else brings to the disk what was written.
    if spare.running().is_none() {
        let shell = Shell::start(&*run.lanes.remote, 0).map_err(failed)?;
        *spare = Spare::new(Some(shell), Arc::clone(&run.lanes.remote), 0);
    }
    let synced =
        spare.running().map_or_else(|| Err("there is no command".into()), |it| it.run(Job::Sync, &[&run.root]));
    let Err(reason) = synced else { return Ok(()) };
    spare.lose();
    // A command ends with its connection. Then that is what is wrong, and the next run goes on from here.
    let _ = run.session.stat(packet::LSTAT, &run.root)?;
    Err(failed(reason))
}

/// Puts the new manifest in force and clears the staging area, in an order that a crash does not hurt. With `ends` the run is
/// over after that.
fn finish(run: &Run, ends: bool) -> Result<(), Error> {
    let session = &run.session;
    bring_to_disk(run)?;
    let (from, to) = (at(&run.staging, NEW_MANIFEST), at(&run.root, MANIFEST));
    match replace(session, &from, &to)? {
        // What an interrupted run left may be in force already.
        Err(refusal) if ends || !refusal.is_missing() => return Err(session.refused("put in force", &to, &refusal)),
        _ => {}
    }
    std::thread::scope(|scope| {
        let cleared = scope.spawn(|| clear(run));
        // All that is left to do is done by the time that the lock is given up.
        if ends && let Some(lock) = locked(&run.lock).as_mut() {
            lock.about_to_end();
        }
        joined(cleared.join())
    })
}

/// Gives a root that was made under its hidden name its own.
fn appear(run: &Run, path: &[u8]) -> Result<(), Error> {
    let session = &run.session;
    let mode = Attributes { mode: Some(0o755), ..Attributes::default() };
    let requests = [
        session::with_attributes(packet::SETSTAT, &run.root, &mode),
        // A RENAME of SFTP never replaces.
        session::request(packet::RENAME).string(&run.root).string(path).finish(),
    ];
    if let Some(refusal) = session.all(requests)?.into_iter().find_map(Result::err) {
        return Err(session.refused("give the new tree its name", path, &refusal));
    }
    if let Some(lock) = locked(&run.lock).as_mut() {
        lock.moved(&at(path, STATE));
    }
    Ok(())
}

/// Finishes what an interrupted run had begun to publish. Says whether there was something to finish.
pub(super) fn recover(run: &Run, monitor: &dyn Monitor) -> Result<bool, Error> {
    let session = &run.session;
    let path = at(&run.staging, RECORD);
    let text = match read_whole(session, &path)? {
        Ok(text) => text,
        Err(refusal) if refusal.is_missing() => return Ok(false),
        Err(refusal) => return Err(session.refused("read", &path, &refusal)),
    };
    let damaged = |what: &str| Error::Refused {
        by: session.client.host().to_owned(),
        reason: format!("{what} of an interrupted run is damaged; look at '{}', then remove it", Escaped(&run.staging)),
    };
    let mut record = Record::decode(&text).ok_or_else(|| damaged("the record"))?;
    let (old, digest) = read_manifest(session, &run.root, &Silent::default())?;
    // Without the manifest in staging it was put in force already: only the clearing was cut off.
    let new = at(&run.staging, NEW_MANIFEST);
    let due = match read_whole(session, &new)? {
        Ok(text) => Some(text).filter(|_| record.base == digest),
        Err(refusal) if refusal.is_missing() => None,
        Err(refusal) => return Err(session.refused("read", &new, &refusal)),
    };
    if let Some(text) = &due {
        let manifest = format::decode(text).map_err(|_| damaged("the manifest"))?;
        let gone = drop_replaced(run, &mut record)?;
        check_parents(run, &record.steps)?;
        let done = execute(run, &record, &manifest.tree, None)?;
        for (path, why) in &done.told {
            let host = session.client.host();
            monitor.event(Event::Warning(&format!("{host}: '{path}' of the interrupted run: {why}")));
        }
        let (manifest, _) = mend(run, &record, manifest, Vec::new(), &old.tree, &done)?;
        let steps = record.steps.iter().chain(&gone).map(|recorded| &recorded.step);
        audit::finished(run, &record, steps, (&old.tree, &manifest), &done)?;
        admit(run, &manifest.tree)?;
        finish(run, false)?;
    } else {
        // Another run has published since, or it was all done: what is staged is older than what is there.
        session.order(about(packet::REMOVE, &path))?.ok();
        session.order(about(packet::REMOVE, &at(&run.staging, NEW_MANIFEST)))?.ok();
    }
    Ok(due.is_some())
}
