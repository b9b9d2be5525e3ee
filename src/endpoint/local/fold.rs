//! File systems that do not tell `A` from `a` (vfat, ext4 and f2fs directories with casefold): two names of a source would
//! become one file there, each with the other's digest in the manifest.

use std::collections::HashMap;

use crate::manifest::Tree;
use crate::path::RelPath;
use crate::root::{Follow, Root, RootError};

const LOWER: &str = "case-probe";
const UPPER: &str = "CASE-PROBE";

/// Whether the directory takes names for the same that differ in case alone.
pub(super) fn folds_case(directory: &Root) -> Result<bool, RootError> {
    let (Ok(lower), Ok(upper)) = (RelPath::new(LOWER), RelPath::new(UPPER)) else { return Ok(false) };
    directory.remove_tree(&lower)?;
    drop(directory.create_new(&lower, 0o600)?);
    let folds = directory.stat(&upper, Follow::Never).is_ok();
    directory.unlink(&lower)?;
    Ok(folds)
}

/// Two paths of both trees that such a file system takes for the same.
pub(super) fn collision<'a>(source: &'a Tree, target: &'a Tree) -> Option<(&'a RelPath, &'a RelPath)> {
    let mut known: HashMap<String, &RelPath> = HashMap::new();
    let paths = source.entries().iter().chain(target.entries()).map(|entry| &entry.path);
    paths.into_iter().find_map(|path| {
        let folded = String::from_utf8_lossy(path.as_bytes()).to_lowercase();
        let first = *known.entry(folded).or_insert(path);
        (first != path).then_some((first, path))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifest::{Content, Entry, Timestamp};

    fn tree(paths: &[&str]) -> Tree {
        let entry = |path: &&str| Entry {
            path: RelPath::new(path).unwrap(),
            content: Content::Directory,
            mtime: Timestamp::default(),
            mode: 0o755,
            owner: "u".into(),
            group: "g".into(),
        };
        Tree::new(paths.iter().map(entry).collect()).unwrap()
    }

    #[test]
    fn h08_names_that_differ_in_case_alone_are_found_within_a_tree_and_between_two() {
        let none = tree(&[]);
        for (source, target, found) in [
            (tree(&["A", "a"]), &none, true),
            (tree(&["d", "d/É", "d/é"]), &none, true),
            (tree(&["A/x", "a"]), &none, false),
            (tree(&["README"]), &tree(&["readme"]), true),
            (tree(&["README"]), &tree(&["README"]), false),
        ] {
            assert_eq!(collision(&source, target).is_some(), found, "{source:?}");
        }
    }

    #[test]
    fn h08_a_file_system_that_tells_case_apart_is_known_as_such() {
        let at = tempfile::tempdir().unwrap();
        let root = Root::open(at.path()).unwrap();
        assert!(!folds_case(&root).unwrap());
        assert!(root.names(None, Follow::Never).unwrap().is_empty());
    }
}
