//! Makes what is staged visible, and finishes what an interrupted run had begun to make visible.
//!
//! As at a local target: when everything is staged and proven, the steps and the new manifest are written down; from then on
//! the run can only go forward, and whoever comes next does again what was not done. The record says which manifest it
//! follows, so that it is void once another run has published.

use std::collections::{BTreeSet, HashSet};
use std::sync::Arc;

use bytes::Bytes;
use sha2::{Digest as _, Sha256};

use super::alike;
use super::audit::Log;
use super::execute::{Problems, execute};
use super::read::{read_opened, read_whole};
use super::record::{Record, Recorded};
use super::session::{self, Refusal, Reply, Session, about, extended, with_attributes};
use super::shell::{Job, Shell, Spare};
use super::stage::{OwnFile, clear, make_area, name_all, replace, store};
use super::target::{MANIFEST, Run, STAGING_ABOVE, STATE, State};
use super::trash::Trash;
use super::writer::grant;
use super::{DIRECTORY, append, at, audit, below, kind_of, moved};
use crate::endpoint::{CommitOptions, Committed, Error};
use crate::error::Escaped;
use crate::filter::Filter;
use crate::manifest::{Audience, Content, Digest, Entry, Manifest, Tree, format};
use crate::monitor::{Event, Monitor, Silent};
use crate::path::RelPath;
use crate::plan::outcome::{Outcome, entries_after};
use crate::plan::publish::{Publication, Step, steps};
use crate::plan::{Action, Change, Need, trash};
use crate::wire::sftp::{Attributes, open, packet};

pub(super) const RECORD: &str = "commit";
pub(super) const NEW_MANIFEST: &str = "manifest";

/// The manifest of `root` and the SHA-256 of its file (zeros where there is none); one that is damaged is told, and
/// counts as absent: nothing is believed then.
pub(super) fn read_manifest(
    session: &Session,
    root: &[u8],
    monitor: &dyn Monitor,
) -> Result<(Manifest, Digest), Error> {
    let handle = session.handle(session.call(session::open(&at(root, MANIFEST), open::READ))?)?;
    manifest_of(session, root, handle, monitor)
}

/// The same where it was opened already.
pub(super) fn manifest_of(
    session: &Session,
    root: &[u8],
    opened: Result<Bytes, Refusal>,
    monitor: &dyn Monitor,
) -> Result<(Manifest, Digest), Error> {
    let text = match opened {
        Ok(handle) => read_opened(session, &handle, 0)?,
        Err(refusal) => Err(refusal),
    };
    let text = match text {
        Ok(text) => text,
        Err(refusal) if refusal.is_missing() => return Ok((Manifest::default(), Digest::default())),
        Err(refusal) => return Err(session.refused("read", &at(root, MANIFEST), &refusal)),
    };
    let manifest = format::decode(&text).unwrap_or_else(|error| {
        monitor.event(Event::Warning(&format!(
            "the manifest of {}:{} is damaged ({error}); it is not believed",
            session.client.host(),
            Escaped(root)
        )));
        Manifest::default()
    });
    Ok((manifest, Digest(Sha256::digest(&text).into())))
}

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
    let mut failed = settle(run, state, options, &mut problems)?;
    if !failed.is_empty() || !options.unreadable.is_empty() {
        hold_pointers_back(run, state, &mut failed, &mut problems);
    }
    let steps = planned(run, state, options, &failed);
    let manifest = new_manifest(run, state, options, &failed)?;
    let old = &state.old_manifest;
    if steps.is_empty() && run.rename_to.is_none() && old.generation > 0 && old.tree == manifest.tree {
        // The area may be another's by now, with what it is about to publish.
        if super::target::locked(&run.area).is_there() {
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
    let record = Record { base: state.old_digest, steps, trash, linked: moved::written_down(state) };
    let log = ready(run, &record.steps)?;
    moved::check(run, state)?;
    let log = write_down(run, log, &record, &text, manifest.generation, monitor)?;
    let done = execute(run, &record, &manifest.tree, false)?;
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
        let lock = still_locked(run);
        lock?;
        joined(parents.join())?;
        joined(durable.join())?;
        joined(log.join())
    })
}

/// Makes sure that the lock is the run's own still.
pub(super) fn still_locked(run: &Run) -> Result<(), Error> {
    match super::target::locked(&run.lock).as_ref() {
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

/// The manifest without what could not be published: of that it says what it said before.
fn mend(
    run: &Run,
    record: &Record,
    mut manifest: Manifest,
    text: Vec<u8>,
    old: &Tree,
    problems: &Problems,
) -> Result<(Manifest, Vec<u8>), Error> {
    if problems.unpublished.is_empty() {
        return Ok((manifest, text));
    }
    let mut entries = manifest.tree.into_entries();
    entries.retain(|entry| !problems.left(&entry.path));
    // Of a directory that could not be removed something may have been.
    let removals = record.steps.iter().filter(|recorded| recorded.is_removal()).map(|recorded| recorded.step.path());
    let gone: HashSet<&RelPath> = removals.filter(|path| !problems.unpublished.contains(path)).collect();
    let stays = |entry: &&Entry| problems.left(&entry.path) && !gone.contains(&entry.path);
    entries.extend(old.entries().iter().filter(stays).cloned());
    entries.sort_unstable_by(|a, b| a.path.cmp(&b.path));
    let files: HashSet<RelPath> =
        entries.iter().filter(|entry| entry.file().is_some()).map(|entry| entry.path.clone()).collect();
    entries.retain(|entry| !matches!(&entry.content, Content::HardLink { first } if !files.contains(first)));
    manifest.tree =
        Tree::new(entries).map_err(|error| Error::Refused { by: "the manifest".into(), reason: error.to_string() })?;
    let text = format::encode(&manifest);
    store(&run.session, &run.staging, NEW_MANIFEST, &text)?;
    Ok((manifest, text))
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

fn new_manifest(run: &Run, state: &State, options: &CommitOptions, failed: &HashSet<u32>) -> Result<Manifest, Error> {
    let gone: HashSet<&RelPath> =
        state.plan.removals.iter().filter(|_| options.delete).map(|removal| &removal.path).collect();
    let filter = Filter::compile(&run.options.filter).map_err(|error| Error::Usage(crate::error::chain(&error)))?;
    let outcome = Outcome {
        source: &state.source,
        target: &state.target,
        old: &state.old_manifest.tree,
        removed: &|path| gone.contains(path),
        failed: &|index| failed.contains(&index),
        admits: &|path, directory| filter.admits(path, directory),
    };
    let own = run.own;
    let mut names = super::target::locked(&run.names);
    names.learn(&run.session, &BTreeSet::from([own.0]), &BTreeSet::from([own.1]))?;
    let mut published = |index: usize, entry: &Entry| -> Result<Entry, Error> {
        let mut entry = entry.clone();
        let there = state.target.get(&entry.path);
        let index = index as u32;
        if let Content::File { digest, .. } = &mut entry.content {
            let proven = state.staged.get(&index).or_else(|| state.kept.get(&index)).copied();
            *digest = proven.or_else(|| there.and_then(|there| there.file()?.1)).or(*digest);
        }
        let wanted = run.permissions(&entry)?;
        // What is appended to is whose it was.
        let there = there.filter(|_| !state.staged.contains_key(&index) || state.tails.contains_key(&index));
        let owner = there.map_or_else(|| names.user(own.0), |there| there.owner.clone());
        let group = there.map_or_else(|| names.group(own.1), |there| there.group.clone());
        entry.owner = wanted.uid.map_or(owner, |uid| names.user(uid));
        entry.group = wanted.gid.map_or(group, |gid| names.group(gid));
        if !matches!(entry.content, Content::Symlink { .. }) {
            entry.mode = wanted.mode;
        }
        Ok(entry)
    };
    let entries = entries_after(&outcome, &mut published)?;
    let tree =
        Tree::new(entries).map_err(|error| Error::Refused { by: "the manifest".into(), reason: error.to_string() })?;
    // Files that are younger than this may change without their time showing it.
    Ok(Manifest { generation: state.old_manifest.generation + 1, created: run.started, tree })
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
        if ends && let Some(lock) = super::target::locked(&run.lock).as_mut() {
            lock.about_to_end();
        }
        joined(cleared.join())
    })
}

/// Lets those read the staged manifest who may read what it lists, as far as mode and group can say so: there are no ACLs
/// here. Best effort; it is never readable by more.
fn admit(run: &Run, tree: &Tree) -> Result<(), Error> {
    let session = &run.session;
    // All that is listed has this group, and a file of it has the number.
    let listed = tree.entries().iter().find(|entry| entry.is_directory() || entry.file().is_some());
    let looked = [run.root.clone()].into_iter().chain(listed.map(|entry| below(&run.root, &entry.path)));
    let mut found = session.batch(looked.map(|path| about(packet::LSTAT, &path)))?.into_iter();
    let mut found = || found.next().and_then(|reply| session.attributes(reply).ok()?.ok());
    let (directory, listed) = (found(), found());
    let gid = listed.and_then(|found| found.owner).map(|(_, gid)| gid);
    // A directory that is made by this run gets this mode when it appears.
    let mode = directory.as_ref().and_then(|found| found.mode).filter(|_| run.rename_to.is_none()).unwrap_or(0o755);
    let of_group = gid.is_some() && directory.and_then(|found| found.owner).map(|(_, gid)| gid) == gid;
    let group = Audience::of(tree).group.filter(|_| of_group).unwrap_or_else(|| "".into());
    let audience = Audience::of(tree).within(mode, "", &group);
    if !audience.others && audience.group.is_none() {
        return Ok(());
    }
    let manifest = at(&run.staging, NEW_MANIFEST);
    let set = |path: &[u8], attributes: &Attributes| with_attributes(packet::SETSTAT, path, attributes);
    let of_mode = |mode| Attributes { mode: Some(mode), ..Attributes::default() };
    let mut requests = if audience.others {
        vec![set(&manifest, &of_mode(0o644))]
    } else {
        let Some(gid) = gid else { return Ok(()) };
        // chown(2) leaves what is given as -1. Where the group may not be given, the mode must not be either.
        let group = Attributes { owner: Some((u32::MAX, gid)), ..Attributes::default() };
        if session.order(set(&manifest, &group))?.is_err() {
            return Ok(());
        }
        vec![set(&manifest, &of_mode(0o640))]
    };
    // They can be entered by whoever knows what to look for, and everything else in them is private.
    let entered = [at(&run.root, STATE), at(&run.root, STAGING_ABOVE)];
    requests.extend(entered.iter().map(|path| set(path, &of_mode(0o711))));
    session.all(requests).map(drop)
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
    if let Some(lock) = super::target::locked(&run.lock).as_mut() {
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
    let record = Record::decode(&text).ok_or_else(|| damaged("the record"))?;
    let (old, digest) = read_manifest(session, &run.root, &Silent::default())?;
    // Without the manifest in staging it was put in force already: only the clearing was cut off.
    let new = read_whole(session, &at(&run.staging, NEW_MANIFEST))?;
    let due = new.ok().filter(|_| record.base == digest);
    if let Some(text) = &due {
        let manifest = format::decode(text).map_err(|_| damaged("the manifest"))?;
        check_parents(run, &record.steps)?;
        let done = execute(run, &record, &manifest.tree, true)?;
        for (path, why) in &done.told {
            let host = session.client.host();
            monitor.event(Event::Warning(&format!("{host}: '{path}' of the interrupted run: {why}")));
        }
        let (manifest, _) = mend(run, &record, manifest, Vec::new(), &old.tree, &done)?;
        admit(run, &manifest.tree)?;
        finish(run, false)?;
    } else {
        // Another run has published since, or it was all done: what is staged is older than what is there.
        session.order(about(packet::REMOVE, &path))?.ok();
        session.order(about(packet::REMOVE, &at(&run.staging, NEW_MANIFEST)))?.ok();
    }
    Ok(due.is_some())
}
