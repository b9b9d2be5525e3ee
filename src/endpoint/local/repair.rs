//! A tree is made again what a list says of it, where it is not.
//!
//! What always holds: the list is the measure and is not changed. Nothing gets a name whose SHA-256 is not the listed one;
//! what could not be had leaves what is there. What nobody lists is not removed.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::Arc;

use super::area::Area;
use super::changes::Changes;
use super::metadata::Acls;
use super::publish::{self, Record};
use super::put::Put;
use super::target::{Run, State, io, rel};
use super::{audited, commit, known, links, recall, record, room};
use crate::access::Inode;
use crate::endpoint::{CommitOptions, Committed, Error};
use crate::error::{Exit, chain};
use crate::filter::{Filter, FilterSpec};
use crate::manifest::{Content, Digest, Entry, Timestamp, Tree};
use crate::monitor::threads::Threads;
use crate::monitor::{Event, Monitor, Problem, Severity};
use crate::path::RelPath;
use crate::plan::publish::{Publication, steps};
use crate::plan::{Compare, Desired, Need, Plan, diff as compare};
use crate::root::{FileKind, Follow, Metadata};
use crate::scan::names::Names;
use crate::scan::{self, ScanRule};
use crate::staging::{Permissions, sftp_holder};

/// What a repair goes by.
#[derive(Debug, Default)]
pub struct Repair {
    /// SHA-256 of the root's own manifest, where that is the list: another one ends the repair. `None` for another list.
    pub manifest: Option<Digest>,
    /// All that the list has.
    pub listed: Arc<Tree>,
    /// Modes and owners stay as they are; what is not there gets the mode of its entry.
    pub as_it_is: bool,
}

impl Repair {
    /// Where a repair stages, below the root.
    pub const STAGING: &str = Area::Repair.in_root();
}

/// The list has to be in force still: what was published since is not undone.
fn in_force(run: &Run, repair: &Repair, monitor: &dyn Monitor) -> Result<(), Error> {
    // A run over plain SFTP has another lock.
    if let Some(holder) = sftp_holder(&run.root) {
        return Err(Error::Locked { root: crate::error::shown(run.root.shown()).to_string(), holder });
    }
    let Some(wanted) = repair.manifest else { return Ok(()) };
    let (_, now) = recall::manifest(&run.root, monitor)?;
    if now == wanted {
        return Ok(());
    }
    let root = crate::error::shown(run.root.shown());
    let message =
        format!("'{root}': its manifest was replaced since it was checked; nothing was repaired, check again");
    Err(Error::Remote { message, exit: Exit::TryAgain })
}

/// What is there of the same kind as an entry.
fn there(run: &Run, entry: &Entry) -> Option<Metadata> {
    let found = run.root.stat(&entry.path, Follow::Never).ok()?;
    let same = match entry.content {
        Content::Directory => found.kind == FileKind::Directory,
        Content::File { .. } | Content::HardLink { .. } => found.kind == FileKind::Regular,
        Content::Symlink { .. } => false,
    };
    same.then_some(found)
}

/// The permissions that an entry gets: those of the list, or those of what is there. The list knows no ACLs: they stay
/// where the mode does.
pub(super) fn permissions(run: &Run, repair: &Repair, entry: &Entry) -> Result<Permissions, Error> {
    if matches!(entry.content, Content::Symlink { .. }) {
        return Ok(Permissions { mode: entry.mode, uid: None, gid: None, acl: None, mtime: entry.mtime });
    }
    let there = there(run, entry);
    let unknown = |error: crate::scan::names::UnknownName| Error::Refused {
        by: "this machine".into(),
        reason: format!("{}: {error}; make it here, or give --ignore-permissions", entry.path),
    };
    let (mode, uid, gid) = match (repair.as_it_is, &there) {
        (false, _) => {
            let (uid, gid) = (run.ids.user(&entry.owner), run.ids.group(&entry.group));
            (entry.mode, Some(uid.map_err(unknown)?), Some(gid.map_err(unknown)?))
        }
        // Who may not give files away keeps what it has.
        (true, Some(found)) if rustix::process::geteuid().is_root() => (found.mode, Some(found.uid), Some(found.gid)),
        (true, Some(found)) => (found.mode & 0o1777, None, None),
        (true, None) => (entry.mode & 0o777, None, None),
    };
    let kept = there.filter(|found| found.mode == mode);
    let kept = kept.and_then(|_| Inode::open(&run.root, Some(&entry.path)).ok()?.acls().ok());
    let acl = Some(kept.unwrap_or_default());
    Ok(Permissions { mode, uid, gid, acl, mtime: entry.mtime })
}

/// Compares what is wanted with what is there. Every file of it is read again, whatever is known of it.
pub(super) fn diff(run: &Run, repair: &Repair, wanted: &Arc<Tree>, monitor: &dyn Monitor) -> Result<Plan, Error> {
    in_force(run, repair, monitor)?;
    let only = Some(wanted.entries().iter().map(|entry| entry.path.as_bytes().to_vec()).collect());
    let filter = Filter::compile(&FilterSpec { rules: Vec::new(), only });
    let filter = filter.map_err(|error| Error::Usage(chain(&error)))?;
    let rule = ScanRule::everything(filter);
    let scanned = scan::scan_seen(&run.root, &rule, monitor).map_err(|error| match error {
        scan::ScanError::Root(error) => io(error),
        other => Error::Refused { by: "the repair".into(), reason: chain(&other) },
    })?;
    for problem in scanned.problems {
        monitor.event(Event::Problem(&Problem { severity: Severity::Skipped, ..problem }));
    }
    let mut target = scanned.tree;
    let none = Tree::default();
    // The table is not stored: it would know of these files alone.
    let look = known::Look {
        root: &run.root,
        source: wanted,
        listed: &none,
        metadata: &scanned.metadata,
        hash_all: true,
        dry_run: true,
        threads: Threads::default(),
    };
    known::complete(&look, &mut target, monitor);
    let mut names = Names::default();
    let mut refused = BTreeMap::new();
    let mut desired = Vec::with_capacity(wanted.entries().len());
    for (index, entry) in wanted.entries().iter().enumerate() {
        let found = permissions(run, repair, entry);
        if let Err(error) = &found {
            refused.insert(index as u32, chain(error));
        } else if let Some(reason) = in_the_way(run, entry) {
            refused.insert(index as u32, reason);
        }
        let found = found.ok();
        desired.push(Desired {
            mode: found.as_ref().map_or(entry.mode, |found| found.mode),
            owner: found.as_ref().and_then(|found| found.uid).map(|uid| names.user(uid)),
            group: found.as_ref().and_then(|found| found.gid).map(|gid| names.group(gid)),
            acl_differs: false,
        });
    }
    let times = Compare { times: false, ..Compare::default() };
    let mut plan = compare(wanted, &target, &|index, _| desired[index].clone(), times);
    // What nobody lists stays.
    plan.removals.clear();
    for action in plan.actions.iter_mut().filter(|action| refused.contains_key(&action.index)) {
        action.need = Need::Nothing;
    }
    refused.retain(|index, _| plan.actions.iter().any(|action| action.index == *index));
    let staging = run.staging.as_ref().ok_or_else(|| Error::Usage("a dry run repairs nothing".into()))?;
    run.prepare(staging, wanted, &mut plan)?;
    let need = room::needed(wanted, &plan, &|_| None, &|_, _| false);
    room::check(&run.root, need)?;
    *run.state() = State {
        source: Arc::clone(wanted),
        refused,
        target,
        metadata: scanned.metadata,
        need,
        plan: plan.clone(),
        ..State::default()
    };
    Ok(plan)
}

/// Why what lies there is not to be replaced: a directory that has things in it, which nobody lists.
fn in_the_way(run: &Run, entry: &Entry) -> Option<String> {
    let found = run.root.stat(&entry.path, Follow::Never).ok()?.kind;
    if entry.is_directory() {
        let special = !matches!(found, FileKind::Directory | FileKind::Regular | FileKind::Symlink);
        return special.then(|| format!("a {} lies there; remove it, then repair again", found.name()));
    }
    if found != FileKind::Directory {
        return None;
    }
    let empty = run.root.names(Some(&entry.path), Follow::Never).is_ok_and(|names| names.is_empty());
    (!empty)
        .then(|| "a directory lies there, with things in it that nobody lists; move it away, then repair again".into())
}

/// Publishes what is staged. The manifest stays.
pub(super) fn commit(
    run: &Arc<Run>,
    repair: &Repair,
    options: &CommitOptions,
    monitor: &dyn Monitor,
) -> Result<Committed, Error> {
    let mut state = run.state();
    let Some(staging) = &run.staging else { return Err(Error::Usage("a dry run repairs nothing".into())) };
    let wanted = Arc::clone(&state.source);
    links::record(run, &state.refused, &wanted, monitor)?;
    // The further names of what is refused are not to be had either.
    let refused = options.failed.iter().chain(state.refused.keys()).copied();
    let options = &CommitOptions { failed: refused.collect(), ..options.clone() };
    let mut failed = commit::not_staged(&mut state, options);
    let state = &*state;
    let mut held = commit::withhold(run, state, options, &mut failed);
    held.extend(state.refused.iter().map(|(&at, why)| (wanted.entries()[at as usize].path.clone(), why.clone())));
    let steps = steps(&Publication {
        source: &wanted,
        target: &state.target,
        plan: &state.plan,
        delete: false,
        failed: &|index| failed.contains(&index),
        last: &|path| run.is_last(path),
        unit: &|_, _| None,
    });
    if steps.is_empty() {
        run.root.remove_tree(&rel(run.area().in_root())?).map_err(io)?;
        return Ok(Committed { problems: commit::shown(held), ..Committed::default() });
    }
    commit::settle(run, staging, state, &failed)?;
    commit::settle_directories(run, staging, state, &failed)?;
    let put = Put::from(given(run, repair, state, &failed)?);
    let changes = Changes { generation: 0, created: Timestamp::default(), put, gone: BTreeSet::new() };
    let (actor, source) = (run.options.actor.clone(), run.options.source.clone());
    let (before, login) = (record::before(&state.target, &changes.put, &steps), run.options.login.clone());
    let record = Record { actor, source, login, steps, before, ..Record::default() };
    let acls = Acls::default();
    audited::announce(&run.root, run.area(), &record, &changes, monitor)?;
    publish::write_down(&run.root, staging, &record, &changes, &acls)?;
    state.recorded.set(true);
    let compared = |path: &RelPath| state.compared(path);
    let problems = publish::carry_out(&run.root, staging, run.area(), &record, &changes, &acls, &compared)?;
    let undone: BTreeSet<&RelPath> = problems.iter().map(|(path, _)| path).collect();
    let done = |path: &RelPath| !undone.contains(path) && !path.ancestors().any(|above| undone.contains(&above));
    let actions = state.plan.actions.iter().filter(|action| !failed.contains(&action.index));
    let entries = actions.map(|action| &wanted.entries()[action.index as usize]);
    let entries: Vec<&Entry> = entries.filter(|entry| done(&entry.path)).collect();
    let mut files = known::Files::amending(&run.root);
    for entry in &entries {
        // A further name is another time of change for the first one.
        let path = if let Content::HardLink { first } = &entry.content { first } else { &entry.path };
        if let Some(entry) = changes.put.get(path)? {
            files.look(&entry);
        }
    }
    files.store(monitor);
    let count = entries.len() as u64;
    held.extend(problems.iter().cloned());
    Ok(Committed { published: count, problems: commit::shown(held), ..Committed::default() })
}

/// What is brought back, as it will be, with the directories above: what happens in them moves their times.
fn given(run: &Run, repair: &Repair, state: &State, failed: &HashSet<u32>) -> Result<Tree, Error> {
    let mut names = Names::default();
    let own = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    let mut entries = BTreeMap::new();
    for (index, entry) in state.source.entries().iter().enumerate() {
        if failed.contains(&(index as u32)) {
            continue;
        }
        let mut entry = entry.clone();
        if !matches!(entry.content, Content::Symlink { .. }) {
            let wanted = permissions(run, repair, &entry)?;
            entry.mode = wanted.mode;
            entry.owner = names.user(wanted.uid.unwrap_or(own.0));
            entry.group = names.group(wanted.gid.unwrap_or(own.1));
        }
        entries.insert(entry.path.clone(), entry);
    }
    if !repair.as_it_is {
        let above: BTreeSet<RelPath> = entries.keys().flat_map(|path| path.ancestors().collect::<Vec<_>>()).collect();
        let directories = above.iter().filter_map(|path| repair.listed.get(path)).filter(|entry| entry.is_directory());
        for entry in directories.filter(|entry| there(run, entry).is_some()) {
            entries.entry(entry.path.clone()).or_insert_with(|| entry.clone());
        }
    }
    // A further name whose file could not be had was failed with it.
    Tree::new(entries.into_values().collect())
        .map_err(|error| Error::Refused { by: "the repair".into(), reason: error.to_string() })
}
