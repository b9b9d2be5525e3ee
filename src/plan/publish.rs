//! The steps that make what is staged visible, in an order in which a reader never sees a pointer to something that is
//! not there.

use std::collections::{BTreeSet, HashSet};

use super::{Action, Change, Plan};
use crate::manifest::{Content, Entry, Tree};
use crate::path::RelPath;

/// One step. Staged things lie at the same relative path in the staging tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Rename the staged file or link over whatever non-directory is there.
    Replace(RelPath),
    /// Rename the staged directory, with everything in it, to a name that is free.
    NewDirectory(RelPath),
    /// Exchange a directory for the staged one, which holds all that is to be in it.
    Exchange(RelPath),
    /// Change owner, mode and times of what is there and keeps its content.
    ApplyMetadata(RelPath),
    /// Remove what is not a directory.
    RemoveFile(RelPath),
    /// Remove an empty directory.
    RemoveDirectory(RelPath),
    /// Take a directory away, with everything in it, in one step.
    TakeAway(RelPath),
}

impl Step {
    /// Whether what it is about is gone afterwards.
    pub fn is_removal(&self) -> bool {
        matches!(self, Step::RemoveFile(_) | Step::RemoveDirectory(_) | Step::TakeAway(_))
    }

    /// The path it is about.
    pub fn path(&self) -> &RelPath {
        match self {
            Step::Replace(path)
            | Step::NewDirectory(path)
            | Step::Exchange(path)
            | Step::ApplyMetadata(path)
            | Step::RemoveFile(path)
            | Step::RemoveDirectory(path)
            | Step::TakeAway(path) => path,
        }
    }
}

/// What the steps are made from.
pub struct Publication<'a> {
    /// The source's tree.
    pub source: &'a Tree,
    /// What is at the target before.
    pub target: &'a Tree,
    /// What is to be done.
    pub plan: &'a Plan,
    /// Carry out the plan's removals.
    pub delete: bool,
    /// Whether an entry, by its index, failed and stays as it is at the target.
    pub failed: &'a dyn Fn(u32) -> bool,
    /// Whether a path is a marker or pointer: published last, removed first.
    pub last: &'a dyn Fn(&RelPath) -> bool,
    /// The directory that is published whole and that a path lies in, or is when it is a directory.
    pub unit: &'a dyn Fn(&RelPath, bool) -> Option<RelPath>,
}

/// The units that are there already and get other content: each is exchanged for a new directory in one step.
pub fn exchanged(publication: &Publication<'_>) -> BTreeSet<RelPath> {
    let Publication { source, target, plan, delete, failed, unit, .. } = publication;
    let is_directory = |tree: &Tree, path: &RelPath| tree.get(path).is_some_and(Entry::is_directory);
    let changed = plan
        .actions
        .iter()
        .filter(|action| action.change != Change::MetadataOnly && !failed(action.index))
        .map(|action| &source.entries()[action.index as usize])
        .map(|entry| (&entry.path, entry.is_directory()));
    let removed = plan.removals.iter().filter(|_| *delete).map(|removal| (&removal.path, removal.directory));
    let units = changed.chain(removed).filter_map(|(path, directory)| unit(path, directory));
    units.filter(|unit| is_directory(source, unit) && is_directory(target, unit)).collect()
}

/// Puts the steps in order: pointers that go, what stands in the way, new content, removals from the leaves up, metadata of
/// directories from the leaves up, and last the pointers that come.
///
/// A directory that is new is published by one step with everything below it, unless it holds a pointer: then the
/// pointer alone follows at the end.
pub fn steps(publication: &Publication<'_>) -> Vec<Step> {
    let Publication { source, target, plan, delete, failed, last, .. } = publication;
    let exchanged = exchanged(publication);
    let whole = |path: &RelPath| {
        !exchanged.is_empty() && (exchanged.contains(path) || path.ancestors().any(|above| exchanged.contains(&above)))
    };
    let entry_of = |action: &Action| -> &Entry { &source.entries()[action.index as usize] };
    let actions: Vec<&Action> = plan.actions.iter().filter(|action| !failed(action.index)).collect();

    let mut first = Vec::new();
    let mut content = Vec::new();
    let mut directories = Vec::new();
    let mut pointers = Vec::new();
    let mut covered: Option<&RelPath> = None;
    let mut in_the_way: HashSet<&RelPath> = HashSet::new();

    content.extend(exchanged.iter().map(|unit| Step::Exchange(unit.clone())));
    for action in &actions {
        let entry = entry_of(action);
        if whole(&entry.path) {
            continue;
        }
        let old = target.get(&entry.path);
        let kind_changes = old.is_some_and(|old| old.is_directory() != entry.is_directory());
        if kind_changes && entry.is_directory() {
            first.push(Step::RemoveFile(entry.path.clone()));
        } else if kind_changes {
            // Everything below is among the removals, and has to go whether the run deletes or not.
            in_the_way.insert(&entry.path);
        }
        if action.change == Change::MetadataOnly {
            // Compared and found to be the same in everything.
            if !action.differences.any() {
                continue;
            }
            let step = Step::ApplyMetadata(entry.path.clone());
            if entry.is_directory() {
                directories.push(step)
            } else {
                content.push(step)
            }
            continue;
        }
        let pointer = !entry.is_directory() && last(&entry.path);
        if covered.is_some_and(|above| entry.path.is_within(above)) && !pointer {
            continue;
        }
        match (&entry.content, old) {
            (Content::Directory, None) => {
                covered = Some(&entry.path);
                content.push(Step::NewDirectory(entry.path.clone()));
            }
            (Content::Directory, Some(old)) if !old.is_directory() => {
                covered = Some(&entry.path);
                content.push(Step::NewDirectory(entry.path.clone()));
            }
            (Content::Directory, Some(_)) => directories.push(Step::ApplyMetadata(entry.path.clone())),
            _ if pointer => pointers.push(Step::Replace(entry.path.clone())),
            _ => content.push(Step::Replace(entry.path.clone())),
        }
    }

    let mut gone_pointers = Vec::new();
    let mut removals = Vec::new();
    for removal in plan.removals.iter().rev() {
        let forced = removal.path.ancestors().any(|above| in_the_way.contains(&above));
        if !forced && !delete || whole(&removal.path) {
            continue;
        }
        let step = match removal.directory {
            true => Step::RemoveDirectory(removal.path.clone()),
            false => Step::RemoveFile(removal.path.clone()),
        };
        match (forced, last(&removal.path) && !removal.directory) {
            (true, _) => first.push(step),
            (false, true) => gone_pointers.push(step),
            (false, false) => removals.push(step),
        }
    }
    first.extend(in_the_way.into_iter().map(|path| Step::RemoveDirectory(path.clone())));
    directories.reverse();

    let mut steps = gone_pointers;
    for part in [first, content, removals, directories, pointers] {
        steps.extend(part);
    }
    steps
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifest::{Digest, Timestamp};
    use crate::plan::{Compare, Desired, diff};

    fn tree(paths: &[&str], version: u8) -> Tree {
        let entry = |path: &&str| Entry {
            path: RelPath::new(path.trim_end_matches('/')).unwrap(),
            content: match path.ends_with('/') {
                true => Content::Directory,
                false => Content::File { size: 1, digest: Some(Digest([version; 32])) },
            },
            mtime: Timestamp { seconds: i64::from(version), nanoseconds: 0 },
            mode: 0o755,
            owner: "u".into(),
            group: "g".into(),
        };
        Tree::new(paths.iter().map(entry).collect()).unwrap()
    }

    fn published(source: &[&str], target: &[&str], delete: bool, failed: &[&str]) -> Vec<String> {
        let (source, target) = (tree(source, 2), tree(target, 1));
        let desired =
            |_: usize, entry: &Entry| Desired { mode: entry.mode, owner: None, group: None, acl_differs: false };
        let plan = diff(&source, &target, &desired, Compare::default());
        let publication = Publication {
            source: &source,
            target: &target,
            plan: &plan,
            delete,
            failed: &|index| failed.contains(&source.entries()[index as usize].path.to_string().as_str()),
            last: &|path| path.name() == b"latest",
            unit: &|path, directory| {
                let own = directory.then(|| path.clone());
                path.ancestors().chain(own).find(|above| above.name().starts_with(b"unit"))
            },
        };
        let name = |step: &Step| match step {
            Step::Replace(path) => format!("replace {path}"),
            Step::NewDirectory(path) => format!("new {path}"),
            Step::Exchange(path) => format!("exchange {path}"),
            Step::ApplyMetadata(path) => format!("apply {path}"),
            Step::RemoveFile(path) => format!("rm {path}"),
            Step::RemoveDirectory(path) => format!("rmdir {path}"),
            Step::TakeAway(path) => format!("take {path}"),
        };
        steps(&publication).iter().map(name).collect()
    }

    #[test]
    fn a_new_directory_is_one_step_and_pointers_come_last() {
        let steps =
            published(&["ckpt-2/", "ckpt-2/a/", "ckpt-2/a/w", "ckpt-2/m", "latest", "z"], &["latest"], false, &[]);
        assert_eq!(steps, ["new ckpt-2", "replace z", "replace latest"]);
        let steps = published(&["new/", "new/f", "new/latest"], &[], false, &[]);
        assert_eq!(steps, ["new new", "replace new/latest"]);
    }

    #[test]
    fn removals_go_from_the_leaves_up_and_pointers_go_first() {
        let target = ["old/", "old/a/", "old/a/f", "latest"];
        assert_eq!(published(&[], &target, true, &[]), ["rm latest", "rm old/a/f", "rmdir old/a", "rmdir old"]);
        assert_eq!(published(&[], &target, false, &[]), [""; 0]);
    }

    #[test]
    fn a_unit_that_is_there_is_exchanged_in_one_step() {
        let (source, target) = (["unit1/", "unit1/a", "unit2/", "unit2/f", "z"], ["unit1/", "unit1/b", "z"]);
        let steps = published(&source, &target, true, &[]);
        assert_eq!(steps, ["exchange unit1", "new unit2", "replace z"]);
        // What only goes is a change too, but only where it is asked for.
        let (source, target) = (["unit1/"], ["unit1/", "unit1/b"]);
        assert_eq!(published(&source, &target, true, &[]), ["exchange unit1"]);
        assert_eq!(published(&source, &target, false, &[]), ["apply unit1"]);
    }

    #[test]
    fn a_change_of_kind_clears_the_way_even_without_delete() {
        assert_eq!(
            published(&["x"], &["x/", "x/y/", "x/y/f"], false, &[]),
            ["rm x/y/f", "rmdir x/y", "rmdir x", "replace x"]
        );
        assert_eq!(published(&["x/", "x/f"], &["x"], false, &[]), ["rm x", "new x"]);
    }

    #[test]
    fn directories_that_stay_get_their_metadata_after_their_contents() {
        let steps = published(&["d/", "d/e/", "d/e/f"], &["d/", "d/e/", "d/e/f"], false, &[]);
        assert_eq!(steps, ["replace d/e/f", "apply d/e", "apply d"]);
        assert_eq!(published(&["f", "g"], &["f", "g"], false, &["f"]), ["replace g"]);
    }
}
