//! What a run makes of the manifest in force: worked out before anything is published, by what the run changes alone, and
//! carried out on the whole afterwards.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::time::{SystemTime, UNIX_EPOCH};

use super::retire::Retired;
use super::target::{Run, State};
use crate::endpoint::Error;
use crate::manifest::{Content, Entry, Manifest, Timestamp, Tree};
use crate::path::RelPath;
use crate::plan::publish::Step;
use crate::root::{FileKind, Follow, Metadata};
use crate::scan::names::Names;

/// What is different afterwards.
pub(super) struct Changes {
    /// Generation and time of the new manifest; entries that are new or other than before, and those that a step looks at.
    pub(super) put: Manifest,
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
pub(super) fn of(
    run: &Run,
    state: &State,
    delete: bool,
    failed: &HashSet<u32>,
    steps: &[Step],
    retired: &Retired,
) -> Result<Changes, Error> {
    let (source, old) = (&state.source, &state.old_manifest.tree);
    let named = Named::of(steps);
    let mut gone: BTreeSet<RelPath> =
        state.plan.removals.iter().filter(|_| delete).map(|removal| removal.path.clone()).collect();
    for unit in retired.gone.keys() {
        gone.extend(within(old, unit).map(|entry| entry.path.clone()));
    }
    let (mut names, mut put) = (Names::default(), Vec::new());
    for (at, entry) in source.entries().iter().enumerate().filter(|(at, _)| !failed.contains(&(*at as u32))) {
        let entry = published(run, state, at as u32, entry, &mut names)?;
        let there = old.get(&entry.path);
        if !named.has(&entry.path) && there == Some(&entry) {
            continue;
        }
        if !entry.is_directory() && there.is_some_and(Entry::is_directory) {
            gone.extend(within(old, &entry.path).skip(1).map(|below| below.path.clone()));
        }
        let above = entry.path.ancestors().filter(|above| old.get(above).is_some_and(|above| !above.is_directory()));
        gone.extend(above);
        put.push(entry);
    }
    // Directories in which something happens, and further names of files that get other permissions.
    let kept = |entry: &&Entry| source.position(&entry.path).is_none() && !gone.contains(&entry.path);
    let beside = named.paths.iter().filter_map(|path| old.get(path)).filter(kept);
    put.extend(beside.cloned().collect::<Vec<_>>());
    let changed: HashSet<&RelPath> =
        named.steps.iter().filter(|step| matches!(step, Step::ApplyMetadata(_))).map(Step::path).collect();
    let further = |entry: &&Entry| matches!(&entry.content, Content::HardLink { first } if changed.contains(first));
    if !changed.is_empty() {
        put.extend(old.entries().iter().filter(kept).filter(further).cloned().collect::<Vec<_>>());
    }
    put.sort_by(|a, b| a.path.cmp(&b.path));
    put.dedup_by(|a, b| a.path == b.path);
    left_behind(source, old, &mut put, &gone);
    first_names(source, &mut put, run, state, failed, &mut names)?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let created = Timestamp { seconds: now.as_secs() as i64, nanoseconds: now.subsec_nanos() };
    Ok(Changes { put: Manifest { generation: state.old_manifest.generation + 1, created, tree: tree(put)? }, gone })
}

/// Further names of a file that is replaced or removed by its first name, and that the run has nothing to do with: the old
/// content is theirs still. The first of them is a file of its own from now on.
fn left_behind(source: &Tree, old: &Tree, put: &mut Vec<Entry>, gone: &BTreeSet<RelPath>) {
    let there = |put: &[Entry], path: &RelPath| put.binary_search_by(|entry| entry.path.cmp(path)).ok();
    let mut heirs: BTreeMap<RelPath, RelPath> = BTreeMap::new();
    let mut left: Vec<Entry> = Vec::new();
    for entry in old.entries() {
        let Content::HardLink { first } = &entry.content else { continue };
        let Some(before) = old.get(first) else { continue };
        let replaced = match there(put, first) {
            Some(at) => put[at].file() != before.file(),
            None => gone.contains(first),
        };
        let in_run = source.position(&entry.path).is_some() || there(put, &entry.path).is_some();
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
    put.extend(left);
    put.sort_by(|a, b| a.path.cmp(&b.path));
}

/// A hard link is nothing without its first name.
fn first_names(
    source: &Tree,
    put: &mut Vec<Entry>,
    run: &Run,
    state: &State,
    failed: &HashSet<u32>,
    names: &mut Names,
) -> Result<(), Error> {
    let firsts: BTreeSet<RelPath> = put
        .iter()
        .filter_map(|entry| if let Content::HardLink { first } = &entry.content { Some(first.clone()) } else { None })
        .collect();
    for first in firsts {
        if put.binary_search_by(|entry| entry.path.cmp(&first)).is_ok() {
            continue;
        }
        let of_source = source.position(&first).filter(|at| !failed.contains(&(*at as u32)));
        match of_source {
            Some(at) => put.push(published(run, state, at as u32, &source.entries()[at], names)?),
            None => put.extend(state.old_manifest.tree.get(&first).cloned()),
        }
        put.sort_by(|a, b| a.path.cmp(&b.path));
    }
    Ok(())
}

/// An entry of the source as it is at the target afterwards.
fn published(run: &Run, state: &State, index: u32, entry: &Entry, names: &mut Names) -> Result<Entry, Error> {
    let mut entry = entry.clone();
    let there = state.target.position(&entry.path);
    if let Some(at) = there.filter(|_| run.options.forbidden.change && entry.is_directory()) {
        // It stays as it is.
        return Ok(state.target.entries()[at].clone());
    }
    if let Content::File { digest, .. } = &mut entry.content {
        let proven = state.staged.get(&index).map(|staged| &staged.0).or_else(|| state.kept.get(&index)).copied();
        *digest = proven.or_else(|| state.target.entries()[there?].file()?.1).or(*digest);
    }
    let wanted = run.permissions(&entry)?;
    let now: Option<Metadata> = match state.staged.get(&index) {
        Some((_, staged)) => Some(*staged),
        None => there.map(|at| state.metadata[at]),
    };
    let own = || (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    let (uid, gid) = now.map_or_else(own, |now| (now.uid, now.gid));
    entry.owner = names.user(wanted.uid.unwrap_or(uid));
    entry.group = names.group(wanted.gid.unwrap_or(gid));
    if !matches!(entry.content, Content::Symlink { .. }) {
        entry.mode = wanted.mode;
    }
    Ok(entry)
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

/// `old` with the changes, but for what is at or below the paths that could not be published: of those the old entries stay
/// where `is_there` finds them. `stays` says it of all else that is not changed.
pub(super) fn carried_out(
    changes: &Changes,
    old: &Tree,
    undone: &HashSet<&RelPath>,
    stays: &dyn Fn(&Entry) -> bool,
    is_there: &dyn Fn(&Entry) -> bool,
) -> Result<Tree, Error> {
    let concerned = |path: &RelPath| {
        !undone.is_empty() && (undone.contains(path) || path.ancestors().any(|above| undone.contains(&above)))
    };
    let mut put = changes.put.tree.entries().iter().filter(|entry| !concerned(&entry.path)).peekable();
    let mut entries = Vec::with_capacity(old.entries().len() + changes.put.tree.entries().len());
    for entry in old.entries() {
        while let Some(new) = put.next_if(|new| new.path < entry.path) {
            entries.push(new.clone());
        }
        if let Some(new) = put.next_if(|new| new.path == entry.path) {
            entries.push(new.clone());
            continue;
        }
        let remains = match concerned(&entry.path) {
            true => is_there(entry),
            false => !changes.gone.contains(&entry.path) && stays(entry),
        };
        if remains {
            entries.push(entry.clone());
        }
    }
    entries.extend(put.cloned());
    // What has no digest is not vouched for, nor is a hard link whose first name is not.
    entries.retain(|entry| !matches!(entry.content, Content::File { digest: None, .. }));
    if entries.iter().any(|entry| matches!(entry.content, Content::HardLink { .. })) {
        let files: HashSet<RelPath> =
            entries.iter().filter(|entry| entry.file().is_some()).map(|entry| entry.path.clone()).collect();
        entries.retain(|entry| !matches!(&entry.content, Content::HardLink { first } if !files.contains(first)));
    }
    tree(entries)
}

fn tree(entries: Vec<Entry>) -> Result<Tree, Error> {
    Tree::new(entries).map_err(|error| Error::Refused { by: "the manifest".into(), reason: error.to_string() })
}
