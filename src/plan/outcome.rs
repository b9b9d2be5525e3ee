//! What a target holds after a run, as far as the run and the manifest before it vouch for it.

use std::collections::HashSet;

use crate::manifest::{Content, Entry, Tree};
use crate::path::RelPath;

/// What the outcome follows from.
pub struct Outcome<'a> {
    /// The source's tree.
    pub source: &'a Tree,
    /// What was at the target before.
    pub target: &'a Tree,
    /// What the manifest listed before.
    pub old: &'a Tree,
    /// Whether a path that the source does not have is removed.
    pub removed: &'a dyn Fn(&RelPath) -> bool,
    /// Whether an entry, by its index, failed and stays as it is at the target.
    pub failed: &'a dyn Fn(u32) -> bool,
}

/// The entries of the next manifest. `published` says how an entry of the source lies at the target.
///
/// # Errors
/// What `published` fails with.
pub fn entries_after<E>(
    outcome: &Outcome<'_>,
    published: &mut dyn FnMut(usize, &Entry) -> Result<Entry, E>,
) -> Result<Vec<Entry>, E> {
    let Outcome { source, target, old, removed, failed } = outcome;
    let mut entries: Vec<Entry> = Vec::with_capacity(source.entries().len());
    let blocked =
        |path: &RelPath| path.ancestors().any(|above| source.get(&above).is_some_and(|entry| !entry.is_directory()));
    for entry in old.entries() {
        let replaced = source.position(&entry.path).is_some_and(|at| !failed(at as u32));
        if !replaced && !removed(&entry.path) && !blocked(&entry.path) && still_there(target, entry) {
            entries.push(entry.clone());
        }
    }
    for (index, entry) in source.entries().iter().enumerate() {
        if !failed(index as u32) {
            entries.push(published(index, entry)?);
        }
    }
    // A hard link whose first name is not vouched for is not either.
    let files: HashSet<RelPath> =
        entries.iter().filter(|entry| entry.file().is_some()).map(|entry| entry.path.clone()).collect();
    entries.retain(|entry| !matches!(&entry.content, Content::HardLink { first } if !files.contains(first)));
    Ok(entries)
}

/// Whether a path that is not published is still as the old manifest says; to the second, as some targets know no
/// more.
fn still_there(target: &Tree, old: &Entry) -> bool {
    target.get(&old.path).is_some_and(|now| match (&now.content, &old.content) {
        (Content::File { size, .. }, Content::File { size: listed, .. }) => {
            size == listed && now.mtime.seconds == old.mtime.seconds
        }
        (now, listed) => now == listed,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifest::{Digest, Timestamp};
    use std::convert::Infallible;

    fn entry(path: &str, content: Content) -> Entry {
        let path = RelPath::new(path).unwrap();
        let (owner, group) = ("u".into(), "g".into());
        Entry { path, content, mtime: Timestamp { seconds: 1, nanoseconds: 0 }, mode: 0o644, owner, group }
    }

    fn file(path: &str, size: u64) -> Entry {
        entry(path, Content::File { size, digest: Some(Digest([size as u8; 32])) })
    }

    #[test]
    fn what_is_vouched_for_stays_and_what_is_not_goes() {
        let link = |path: &str| entry(path, Content::HardLink { first: RelPath::new("gone").unwrap() });
        let tree = |entries: Vec<Entry>| Tree::new(entries).unwrap();
        let source = tree(vec![file("blocks", 1), file("failed", 9), file("new", 2)]);
        let old = tree(vec![
            entry("blocks", Content::Directory),
            file("blocks/below", 3),
            file("changed", 4),
            file("failed", 5),
            file("gone", 6),
            link("linked"),
            file("stays", 7),
        ]);
        let mut now = old.entries().to_vec();
        now[2] = file("changed", 8);
        let target = tree(now);
        let outcome = Outcome {
            source: &source,
            target: &target,
            old: &old,
            removed: &|path| path.as_bytes() == b"gone",
            failed: &|index| index == 1,
        };
        let after = entries_after(&outcome, &mut |_, entry| Ok::<_, Infallible>(entry.clone())).unwrap();
        let after = tree(after);
        let paths: Vec<_> = after.entries().iter().map(|entry| (entry.path.to_string(), entry.file())).collect();
        let size = |name: &str, size: u64| (name.to_owned(), Some((size, Some(Digest([size as u8; 32])))));
        assert_eq!(paths, [size("blocks", 1), size("failed", 5), size("new", 2), size("stays", 7)]);
    }
}
