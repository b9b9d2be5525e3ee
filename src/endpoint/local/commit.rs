//! Decides what of a run is published, completes the staged tree, and has it published.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::Arc;
use std::time::SystemTime;

use super::append::{self, Former};
use super::area::Area;
use super::metadata::{Acls, apply_directory};
use super::publish::{self, Record};
use super::remember::Remembering;
use super::retire;
use super::target::{Run, State, io, rel};
use super::trash::Trash;
use super::{audited, changes, links, moved, recall, record, unit};
use crate::endpoint::{CommitOptions, Committed, Error};
use crate::error::Escaped;
use crate::manifest::{Content, Entry, Manifest, Tree};
use crate::monitor::{Event, Monitor};
use crate::path::RelPath;
use crate::plan::publish::{Publication, Step, exchanged, steps};
use crate::plan::{Action, Change, Need, trash};
use crate::root::{Follow, Root};
use crate::scan::cache::until_dated;
use crate::staging::Permissions;

/// Publishes the run.
pub(super) fn commit(run: &Arc<Run>, options: &CommitOptions, monitor: &dyn Monitor) -> Result<Committed, Error> {
    let mut state = run.state();
    let Some(staging) = &run.staging else { return Err(Error::Usage("a dry run publishes nothing".into())) };
    let source = Arc::clone(&state.source);
    links::record(run, &state.refused, &source, monitor)?;
    // After any problem nothing is deleted.
    let mut options = CommitOptions {
        delete: options.delete && state.refused.is_empty(),
        delete_later: options.delete_later || (options.delete && !state.refused.is_empty()),
        ..options.clone()
    };
    let deletes = options.delete;
    let lost = moved::settle(run, staging, &mut state, &mut options)?;
    let nothing_goes = deletes && !options.delete;
    let options = &options;
    let mut failed = not_staged(&mut state, options);
    run.allow_commit(&state, options)?;
    failed.extend(state.refused.keys());
    let mut withheld = withhold(run, &state, options, &mut failed);
    withheld.extend(lost);
    let held_back = !withheld.is_empty();
    withheld.extend(state.refused.iter().map(|(&at, why)| (source.entries()[at as usize].path.clone(), why.clone())));
    let retired = retire::decide(run, &mut state, options, &failed)?;
    let put_off = shown(retired.put_off.iter().cloned());
    let publication = Publication {
        source: &source,
        target: &state.target,
        plan: &state.plan,
        delete: options.delete,
        failed: &|index| failed.contains(&index),
        last: &|path| run.is_last(path),
        unit: &|path, directory| run.unit_of(path, directory),
    };
    let (mut steps, exchanged) = (steps(&publication), exchanged(&publication));
    steps.extend(retired.steps());
    state.moved.retain(|index, _| !failed.contains(index));
    let renamed = moved::decide(run, staging, &mut state, &steps)?;
    let state = &*state;
    let nothing = steps.is_empty() && !state.adopts && run.birth.is_none();
    if nothing && state.old_manifest.generation > 0 {
        // What is staged of a unit that is held back saves the next run from sending it again.
        if !held_back {
            run.root.remove_tree(&rel(Area::Run.in_root())?).map_err(io)?;
        }
        return Ok(Committed {
            generation: state.old_manifest.generation,
            manifest_digest: state.old_digest.to_string(),
            put_off,
            held_back: nothing_goes,
            problems: shown(withheld),
            ..Committed::default()
        });
    }
    settle(run, staging, state, &failed)?;
    let inodes = unit::stage(run, staging, state, &exchanged, options.delete)?;
    settle_directories(run, staging, state, &failed)?;
    let changes = changes::of(run, state, options.delete, &failed, &steps, &retired)?;
    let acls = late_acls(run, &source, &steps)?;
    let (actor, from) = (run.options.actor.clone(), run.options.source.clone());
    let (withheld_rights, acls_given) = decided(run, state, &failed);
    let (created, generation) = (changes.created, changes.generation);
    let trash = run.options.trash_seconds.is_some().then(|| trash::name(created.seconds, generation));
    let trash = trash.as_deref().map(rel).transpose()?;
    let_times_pass(run, state);
    let (before, login) = (record::before(&state.target, &changes.put, &steps), run.options.login.clone());
    let record = Record {
        actor,
        source: from,
        login,
        steps,
        inodes,
        goes: (!exchanged.is_empty()).then(|| going_within(&exchanged, state, options.delete)),
        grown: grown(run, staging, state, &failed)?,
        renamed: renamed.into_iter().collect(),
        withheld: withheld_rights,
        acls: acls_given,
        before,
        trash,
        only_new: run.options.forbidden.change,
        again: false,
    };
    audited::announce(&run.root, Area::Run, &record, &changes, monitor)?;
    publish::write_down(&run.root, staging, &record, &changes, &acls)?;
    state.recorded.set(true);
    let compared = |path: &RelPath| state.compared(path);
    let problems = publish::carry_out(&run.root, staging, Area::Run, &record, &changes, &acls, &compared)?;
    let stays = |old: &Entry| changes::stays(run, state, &failed, old);
    let old = &state.old_manifest.tree;
    let mut kept = recall::is_worth_keeping(old.entries().len().max(source.entries().len())).then(Vec::new);
    let mut remembering = Remembering::new(run, state, &record, &problems);
    let mut each = |entry: &Entry, index: Option<u32>| {
        remembering.add(entry, index);
        if let Some(kept) = &mut kept {
            kept.push(entry.clone());
        }
    };
    let in_force = publish::put_in_force(&run.root, staging, &record, &changes, old, &problems, &stays, &mut each)?;
    let digest = in_force.digest;
    if let Some(birth) = &run.birth {
        birth.appear(&run.root)?;
        // Only now it has the mode that it keeps.
        publish::admit_readers(&run.root, &in_force)?;
    }
    remembering.store(monitor);
    match kept.and_then(|entries| Tree::new(entries).ok()) {
        Some(tree) => recall::keep_manifest(&run.root, Arc::new(Manifest { generation, created, tree }), digest),
        None => recall::forget_manifest(&run.root),
    }
    // What a step could not do is claimed by nobody, nor what was to come with it.
    let undone: BTreeSet<&RelPath> = problems.iter().map(|(path, _)| path).collect();
    let whole =
        |step: &&Step| matches!(step, Step::NewDirectory(_) | Step::Exchange(_)) && undone.contains(step.path());
    let undone_whole: BTreeSet<&RelPath> = record.steps.iter().filter(whole).map(Step::path).collect();
    let done = |path: &&RelPath| {
        !undone.contains(path)
            && (undone_whole.is_empty() || !path.ancestors().any(|above| undone_whole.contains(&above)))
    };
    let counted = |paths: &mut dyn Iterator<Item = &RelPath>| paths.filter(done).count() as u64;
    let path_of = |action: &Action| &source.entries()[action.index as usize].path;
    let is_removal = |step: &&Step| matches!(step, Step::RemoveFile(_) | Step::RemoveDirectory(_));
    monitor.event(Event::Detail(&format!("generation {generation} is published")));
    Ok(Committed {
        generation,
        manifest_digest: digest.to_string(),
        published: counted(
            &mut state.plan.actions.iter().filter(|action| !failed.contains(&action.index)).map(path_of),
        ),
        removed: counted(&mut record.steps.iter().filter(is_removal).map(Step::path))
            + retired.gone.iter().filter(|(path, _)| done(path)).map(|(_, paths)| paths).sum::<u64>(),
        retired: retired.gone.keys().filter(done).map(ToString::to_string).collect(),
        put_off,
        trash: moved_aside(run, &record)?,
        held_back: nothing_goes,
        problems: shown(withheld.into_iter().chain(problems.iter().cloned())),
    })
}

/// A file that is written to all the time was changed a moment ago. Within the same tick of the clock it could not be told whether somebody
/// changed it here; what grows is to be believed to be what it was by the next run.
fn let_times_pass(run: &Run, state: &State) {
    let staged = state.plan.actions.iter().filter(|action| state.staged.borrow().contains(action.index));
    let entries = staged.map(|action| &state.source.entries()[action.index as usize]);
    let now = SystemTime::now();
    let longest = entries.filter(|entry| run.grows(&entry.path)).map(|entry| until_dated(entry.mtime, now)).max();
    longest.into_iter().for_each(std::thread::sleep);
}

/// What goes of the units that are exchanged.
fn going_within(units: &BTreeSet<RelPath>, state: &State, delete: bool) -> BTreeSet<RelPath> {
    let removals = state.plan.removals.iter().filter(|_| delete).map(|removal| &removal.path);
    removals.filter(|path| path.ancestors().any(|above| units.contains(&above))).cloned().collect()
}

/// The files that are appended to; there is room for what is new of them.
fn grown(run: &Run, staging: &Root, state: &State, failed: &HashSet<u32>) -> Result<BTreeMap<RelPath, Former>, Error> {
    let grown = state.grown.iter().filter(|(index, _)| !failed.contains(index));
    let reserved = grown.map(|(&index, former)| {
        let path = &state.source.entries()[index as usize].path;
        Ok((path.clone(), append::reserve(&run.root, staging, path, former)?))
    });
    reserved.collect()
}

/// Where what was removed or replaced lies now, if anything does.
fn moved_aside(run: &Run, record: &Record) -> Result<Option<String>, Error> {
    let Some(name) = &record.trash else { return Ok(None) };
    Ok(Trash::new(&run.root, name)?.used().map(ToString::to_string))
}

type Notes = BTreeMap<RelPath, String>;

/// What the audit log is told of decisions: what a sender asked for in vain, and the ACLs that are given.
fn decided(run: &Run, state: &State, failed: &HashSet<u32>) -> (Notes, Notes) {
    let (mut withheld, mut acls) = (Notes::new(), Notes::new());
    for action in state.plan.actions.iter().filter(|action| !failed.contains(&action.index)) {
        let entry = &state.source.entries()[action.index as usize];
        if matches!(entry.content, Content::Symlink { .. } | Content::HardLink { .. }) {
            continue;
        }
        let decision = run.decision(entry);
        if !decision.withheld.is_empty() {
            withheld.insert(entry.path.clone(), decision.withheld.join(", "));
        }
        if let Some(acl) = decision.acl.filter(|acl| !acl.is_empty()) {
            acls.insert(entry.path.clone(), Escaped(acl.to_string().as_bytes()).to_string());
        }
    }
    (withheld, acls)
}

pub(super) fn shown(problems: impl IntoIterator<Item = (RelPath, String)>) -> Vec<(String, String)> {
    // A directory may fail twice for one reason: when it is made, and when it gets its permissions.
    let mut told = BTreeSet::new();
    let shown = problems.into_iter().map(|(path, reason)| (path.to_string(), reason));
    shown.filter(|problem| told.insert(problem.clone())).collect()
}

/// The entries that are not to be published: those that failed at the source, and files that nobody staged. What was
/// compared and found to differ is a change of content.
pub(super) fn not_staged(state: &mut State, options: &CommitOptions) -> HashSet<u32> {
    let source = Arc::clone(&state.source);
    let mut failed: HashSet<u32> = options.failed.iter().copied().collect();
    let State { plan, staged, kept, target, .. } = state;
    let staged = staged.get_mut();
    let is_file = |action: &Action| source.entries()[action.index as usize].file().is_some();
    let is_needed = |action: &&Action| is_file(action) && action.need != Need::Nothing;
    let lacks = |action: &&Action| !staged.contains(action.index) && !kept.contains(action.index);
    failed.extend(plan.actions.iter().filter(is_needed).filter(lacks).map(|action| action.index));
    // The engine goes by the same list: only what changes something copies it.
    let differs =
        |action: &Action| is_needed(&action) && action.change == Change::MetadataOnly && staged.contains(action.index);
    if plan.actions.iter().any(differs) {
        plan.actions.iter_mut().filter(|action| differs(action)).for_each(|action| action.change = Change::Modified);
    }
    // The further names of what was compared and is the same stay, too.
    let stays = |action: &Action| {
        let entry = &source.entries()[action.index as usize];
        let Content::HardLink { first } = &entry.content else { return false };
        let same = source.position(first).is_some_and(|at| kept.contains(at as u32));
        same && target.get(&entry.path).is_some_and(|there| there.content == entry.content)
    };
    if plan.actions.iter().any(stays) {
        plan.actions.retain(|action| !stays(action));
    }
    for action in &state.plan.actions {
        if let Content::HardLink { first } = &source.entries()[action.index as usize].content
            && source.position(first).is_some_and(|at| failed.contains(&(at as u32)))
        {
            failed.insert(action.index);
        }
    }
    failed
}

/// Adds to `failed` what must not appear without that which failed: the rest of its unit, and every marker and pointer outside
/// of units, since it may say of just this that it is complete.
pub(super) fn withhold(
    run: &Run,
    state: &State,
    options: &CommitOptions,
    failed: &mut HashSet<u32>,
) -> Vec<(RelPath, String)> {
    let entries = state.source.entries();
    let unreadable: Vec<RelPath> = options.unreadable.iter().filter_map(|path| RelPath::new(path).ok()).collect();
    if failed.is_empty() && unreadable.is_empty() && !options.delete_later {
        return Vec::new();
    }
    let missing = failed.iter().filter_map(|&index| entries.get(index as usize));
    let missing = missing.map(|entry| (&entry.path, entry.is_directory()));
    let missing = missing.chain(unreadable.iter().map(|path| (path, true)));
    let mut units: BTreeSet<RelPath> = missing.filter_map(|(path, directory)| run.unit_of(path, directory)).collect();
    // What is to go of a unit and stays for now would be taken for a part of what is new.
    let stale = state.plan.removals.iter().filter(|_| options.delete_later);
    let stale: BTreeSet<RelPath> = stale.filter_map(|removal| run.unit_of(&removal.path, removal.directory)).collect();
    let mut held = Vec::new();
    for action in &state.plan.actions {
        let (path, directory) = (&entries[action.index as usize].path, entries[action.index as usize].is_directory());
        match run.unit_of(path, directory) {
            // A marker in a unit speaks of that unit alone, and goes with it.
            Some(unit) if units.contains(&unit) || stale.contains(&unit) => {
                failed.insert(action.index);
                units.insert(unit);
            }
            None if !directory && run.is_last(path) && failed.insert(action.index) => {
                let why = "is held back, since other paths failed: it may say that they are there";
                held.push((path.clone(), why.into()));
            }
            _ => {}
        }
    }
    held.extend(units.into_iter().map(|unit| (unit, "is not published, since it would not be whole".to_owned())));
    held
}

/// Makes the staged tree what is to be published: with its links, without what failed.
pub(super) fn settle(run: &Run, staging: &Root, state: &State, failed: &HashSet<u32>) -> Result<(), Error> {
    let source = &state.source;
    let is_staged = |path: &RelPath| {
        let index = source.position(path).map(|at| at as u32);
        index.is_some_and(|index| !failed.contains(&index) && state.staged.borrow().contains(index))
    };
    for action in &state.plan.actions {
        let entry = &source.entries()[action.index as usize];
        let path = run.staged_path(&entry.path)?;
        if failed.contains(&action.index) {
            staging.remove_tree(&path).map_err(io)?;
            continue;
        }
        if action.change == Change::MetadataOnly {
            continue;
        }
        match &entry.content {
            Content::Symlink { target } => {
                staging.remove_tree(&path).map_err(io)?;
                staging.symlink(target, &path).map_err(io)?;
                staging.set_mtime(&path, entry.mtime).map_err(io)?;
            }
            Content::HardLink { first } => {
                staging.remove_tree(&path).map_err(io)?;
                let made = match is_staged(first) {
                    true => staging.hard_link(&run.staged_path(first)?, &path),
                    false => run.root.hard_link_to(first, staging, &path),
                };
                made.map_err(io)?;
            }
            _ => {}
        }
    }
    Ok(())
}

/// Gives new directories their permissions, from the leaves up.
pub(super) fn settle_directories(run: &Run, staging: &Root, state: &State, failed: &HashSet<u32>) -> Result<(), Error> {
    let awaits_pointer: HashSet<RelPath> = state
        .source
        .entries()
        .iter()
        .filter(|entry| !entry.is_directory() && run.is_last(&entry.path))
        .filter_map(|entry| entry.path.parent())
        .collect();
    for action in state.plan.actions.iter().rev() {
        let entry = &state.source.entries()[action.index as usize];
        if !entry.is_directory() || action.change == Change::MetadataOnly || failed.contains(&action.index) {
            continue;
        }
        let path = run.staged_directory(&entry.path)?;
        // The top-most new directory gets its mode after the rename: without the right to write it cannot be moved. One
        // that a pointer is yet to be put into gets it after that.
        if path.depth() > 2 && staging.stat(&path, Follow::Never).is_ok() {
            let private = Permissions { mode: 0o700, ..run.permissions(entry)? };
            let above = entry.path.parent();
            let moved_with = above.is_some_and(|parent| {
                state.target.get(&parent).is_none_or(|there| !there.is_directory())
                    || run.unit_of(&parent, true).is_some()
            });
            let complete = moved_with && !awaits_pointer.contains(&entry.path);
            apply_directory(staging, &path, &if complete { run.permissions(entry)? } else { private })?;
        }
    }
    Ok(())
}

/// The ACLs of paths that get their permissions after they are published: those that are there already, and directories
/// in which something happens.
fn late_acls(run: &Run, source: &Tree, steps: &[Step]) -> Result<Acls, Error> {
    let mut acls = Acls::default();
    for step in steps {
        let own = matches!(step, Step::ApplyMetadata(_) | Step::NewDirectory(_)).then(|| step.path().clone());
        for path in own.into_iter().chain(step.path().parent()) {
            if let Some(entry) = source.get(&path) {
                acls.add(run, entry)?;
            }
        }
    }
    Ok(acls)
}
