//! What a run makes of the manifest in force: worked out before anything is published, by what the run changes alone, and
//! carried out on the whole afterwards.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::time::{SystemTime, UNIX_EPOCH};

use super::put::Put;
use super::retire::Retired;
use super::target::{Run, State};
use crate::endpoint::Error;
use crate::manifest::{Checker, Content, Entry, InvalidTree, Timestamp, Tree};
use crate::path::RelPath;
use crate::plan::publish::Step;
use crate::root::{FileKind, Follow};

/// What is different afterwards.
pub(super) struct Changes<'a> {
    /// Of the new manifest.
    pub(super) generation: u64,
    /// When it is written.
    pub(super) created: Timestamp,
    /// Entries that are new or other than before, and those that a step looks at.
    pub(super) put: Put<'a>,
    /// What is listed no more.
    pub(super) gone: BTreeSet<RelPath>,
}

/// Steps that move whole directories, or change what is in them.
struct Named<'a> {
    paths: HashSet<RelPath>,
    whole: HashSet<&'a RelPath>,
    steps: &'a [Step],
}

impl<'a> Named<'a> {
    fn of(steps: &'a [Step]) -> Named<'a> {
        let paths = steps.iter().flat_map(|step| step.path().parent().into_iter().chain([step.path().clone()]));
        let whole = steps.iter().filter(|step| matches!(step, Step::NewDirectory(_) | Step::Exchange(_)));
        Named { paths: paths.collect(), whole: whole.map(Step::path).collect(), steps }
    }

    fn has(&self, path: &RelPath) -> bool {
        self.paths.contains(path)
            || (!self.whole.is_empty() && path.ancestors().any(|above| self.whole.contains(&above)))
    }
}

/// What `steps` change, and the entries of all that they name.
pub(super) fn of<'a>(
    run: &'a Run,
    state: &'a State,
    delete: bool,
    failed: &HashSet<u32>,
    steps: &[Step],
    retired: &Retired,
) -> Result<Changes<'a>, Error> {
    let (source, old) = (&state.source, &state.old_manifest.tree);
    let named = Named::of(steps);
    let mut gone: BTreeSet<RelPath> =
        state.plan.removals.iter().filter(|_| delete).map(|removal| removal.path.clone()).collect();
    for unit in retired.gone.keys() {
        gone.extend(within(old, unit).map(|entry| entry.path.clone()));
    }
    let (mut put, mut changed) = (Put::of_run(run, state), Vec::new());
    for (at, entry) in source.entries().iter().enumerate().filter(|(at, _)| !failed.contains(&(*at as u32))) {
        let path = &entry.path;
        let there = old.get(path);
        if let Some(there) = there.filter(|_| !named.has(path))
            && *there == put.made(at as u32)?
        {
            continue;
        }
        if !entry.is_directory() && there.is_some_and(Entry::is_directory) {
            gone.extend(within(old, path).skip(1).map(|below| below.path.clone()));
        }
        if !old.entries().is_empty() {
            let above = path.ancestors().filter(|above| old.get(above).is_some_and(|above| !above.is_directory()));
            gone.extend(above);
        }
        changed.push(at as u32);
    }
    put.add_of_source(changed);
    // Directories in which something happens, and further names of files that get other permissions.
    let kept = |entry: &&Entry| source.position(&entry.path).is_none() && !gone.contains(&entry.path);
    let beside = named.paths.iter().filter_map(|path| old.get(path)).filter(kept);
    put.add(beside.cloned());
    let changed: HashSet<&RelPath> =
        named.steps.iter().filter(|step| matches!(step, Step::ApplyMetadata(_))).map(Step::path).collect();
    let further = |entry: &&Entry| matches!(&entry.content, Content::HardLink { first } if changed.contains(first));
    if !changed.is_empty() {
        put.add(old.entries().iter().filter(further).filter(kept).cloned());
    }
    let left = left_behind(source, old, &put, &gone)?;
    put.add(left);
    first_names(state, &mut put, failed);
    check(&put)?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let created = Timestamp { seconds: now.as_secs() as i64, nanoseconds: now.subsec_nanos() };
    Ok(Changes { generation: state.old_manifest.generation + 1, created, put, gone })
}

/// Further names of a file that is replaced or removed by its first name, and that the run has nothing to do with: the old
/// content is theirs still. The first of them is a file of its own from now on.
fn left_behind(source: &Tree, old: &Tree, put: &Put<'_>, gone: &BTreeSet<RelPath>) -> Result<Vec<Entry>, Error> {
    let mut heirs: BTreeMap<RelPath, RelPath> = BTreeMap::new();
    let mut left: Vec<Entry> = Vec::new();
    for entry in old.entries() {
        let Content::HardLink { first } = &entry.content else { continue };
        let Some(before) = old.get(first) else { continue };
        let replaced = match put.get(first)? {
            Some(now) => now.file() != before.file(),
            None => gone.contains(first),
        };
        let in_run = source.position(&entry.path).is_some() || put.holds(&entry.path);
        if !replaced || in_run || gone.contains(&entry.path) {
            continue;
        }
        let content = match heirs.get(first) {
            Some(heir) => Content::HardLink { first: heir.clone() },
            None => {
                heirs.insert(first.clone(), entry.path.clone());
                before.content.clone()
            }
        };
        left.push(Entry { path: entry.path.clone(), content, ..before.clone() });
    }
    Ok(left)
}

/// A hard link is nothing without its first name.
fn first_names(state: &State, put: &mut Put<'_>, failed: &HashSet<u32>) {
    let firsts: BTreeSet<RelPath> = put.hard_links().map(|(_, first)| first.clone()).collect();
    let missing: Vec<RelPath> = firsts.into_iter().filter(|first| !put.holds(first)).collect();
    for first in missing {
        let of_source = state.source.position(&first).map(|at| at as u32).filter(|at| !failed.contains(at));
        match of_source {
            Some(at) => put.add_of_source([at]),
            None => put.add(state.old_manifest.tree.get(&first).cloned()),
        }
    }
}

fn invalid(error: InvalidTree) -> Error {
    Error::Refused { by: "the manifest".into(), reason: error.to_string() }
}

fn check(put: &Put<'_>) -> Result<(), Error> {
    if put.is_of_source_alone() {
        // A part of a tree, with what there are further names of, is a tree.
        return Ok(());
    }
    let mut checker = Checker::default();
    let is_file = |path: &RelPath| put.get(path).is_ok_and(|entry| entry.is_some_and(|entry| entry.file().is_some()));
    put.iter().try_for_each(|item| checker.add(&item?.0, &is_file).map_err(invalid))
}

/// The entries at `path` and below.
fn within<'a>(tree: &'a Tree, path: &'a RelPath) -> impl Iterator<Item = &'a Entry> {
    let from = tree.entries().partition_point(|entry| entry.path < *path);
    tree.entries()[from..].iter().take_while(|entry| entry.path.is_within(path))
}

/// Whether a path of the manifest in force, which the run does not change, is still as it is listed.
///
/// One that the run was not to look at stays listed in any case: that it vanished or was changed behind our back is for a
/// check to find.
pub(super) fn stays(run: &Run, state: &State, failed: &HashSet<u32>, old: &Entry) -> bool {
    if state.source.position(&old.path).is_some_and(|at| !failed.contains(&(at as u32)))
        || !state.reach.reaches(&old.path)
    {
        return true;
    }
    match (state.target.get(&old.path).map(|now| (&now.content, now.mtime)), &old.content) {
        (Some((Content::File { size, .. }, mtime)), Content::File { size: listed, .. }) => {
            size == listed && mtime == old.mtime
        }
        (Some((now, _)), listed) => now == listed,
        // A rule leaves it out.
        (None, listed) => run.root.stat(&old.path, Follow::Never).is_ok_and(|now| match (now.kind, listed) {
            (FileKind::Regular, Content::File { size, .. }) => now.size == *size && now.mtime == old.mtime,
            (FileKind::Regular, Content::HardLink { .. }) | (FileKind::Directory, Content::Directory) => true,
            (FileKind::Symlink, Content::Symlink { target }) => {
                run.root.read_link(&old.path).is_ok_and(|now| now[..] == target[..])
            }
            _ => false,
        }),
    }
}

/// Takes entries of the new manifest, with the index at the source of those that are the source's.
pub(super) type Each<'a> = dyn FnMut(&Entry, Option<u32>) -> Result<(), Error> + 'a;

/// Gives `each` one by one the entries of `old` with the changes, but for what is at or below the paths that could not be
/// published: of those the old entries stay where `is_there` finds them. `stays` says it of all else that is not changed. With
/// an entry that is the source's comes its index there.
pub(super) fn carried_out(
    changes: &Changes<'_>,
    old: &Tree,
    undone: &HashSet<&RelPath>,
    stays: &dyn Fn(&Entry) -> bool,
    is_there: &dyn Fn(&Entry) -> bool,
    each: &mut Each<'_>,
) -> Result<(), Error> {
    let concerned = |path: &RelPath| {
        !undone.is_empty() && (undone.contains(path) || path.ancestors().any(|above| undone.contains(&above)))
    };
    let mut listed = Listed::new(changes, old, each);
    let mut olds = old.entries().iter().peekable();
    let mut old_before = |listed: &mut Listed<'_>, path: Option<&RelPath>| -> Result<(), Error> {
        while let Some(entry) = olds.next_if(|entry| path.is_none_or(|path| entry.path < *path)) {
            let remains = match concerned(&entry.path) {
                true => is_there(entry),
                false => !changes.gone.contains(&entry.path) && stays(entry),
            };
            if remains {
                listed.add(entry, None)?;
            }
        }
        if let Some(path) = path {
            olds.next_if(|entry| entry.path == *path);
        }
        Ok(())
    };
    for item in changes.put.iter() {
        let (entry, index) = item?;
        if !concerned(&entry.path) {
            old_before(&mut listed, Some(&entry.path))?;
            listed.add(&entry, index)?;
        }
    }
    old_before(&mut listed, None)
}

/// What comes into a manifest: what has no digest is not vouched for, nor is a hard link whose first name is not.
struct Listed<'a> {
    checker: Checker,
    /// What there are further names of.
    firsts: HashSet<RelPath>,
    /// Those of them that are listed.
    files: HashSet<RelPath>,
    each: &'a mut Each<'a>,
}

impl<'a> Listed<'a> {
    fn new(changes: &Changes<'_>, old: &Tree, each: &'a mut Each<'a>) -> Listed<'a> {
        let before = old.entries().iter().filter_map(|entry| match &entry.content {
            Content::HardLink { first } => Some(first),
            _ => None,
        });
        let firsts = before.chain(changes.put.hard_links().map(|(_, first)| first)).cloned().collect();
        Listed { checker: Checker::default(), firsts, files: HashSet::new(), each }
    }

    fn add(&mut self, entry: &Entry, index: Option<u32>) -> Result<(), Error> {
        match &entry.content {
            Content::File { digest: None, .. } => return Ok(()),
            Content::HardLink { first } if !self.files.contains(first) => return Ok(()),
            Content::File { .. } if self.firsts.contains(&entry.path) => {
                self.files.insert(entry.path.clone());
            }
            _ => {}
        }
        let files = &self.files;
        self.checker.add(entry, &|path| files.contains(path)).map_err(invalid)?;
        (self.each)(entry, index)
    }
}
