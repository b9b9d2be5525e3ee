//! What of a source takes part: what the job leaves out, and the `.lockstepignore` files that were found in its directories.
//!
//! They are read by the code of the scan. What a run would leave out is not watched, and causes no run.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::filter::{Filter, IGNORE_FILE};
use crate::path::RelPath;
use crate::root::{Follow, Root};
use crate::scan::with_own_ignore_file;

/// The rules by directory. `None` as a path is the top.
#[derive(Debug)]
pub(super) struct Ignores {
    job: Arc<Filter>,
    /// Of directories with a file of their own: all rules that hold below them.
    own: BTreeMap<Option<RelPath>, Arc<Filter>>,
}

impl Ignores {
    /// What the job says; no file is known yet.
    pub(super) fn new(job: Filter) -> Ignores {
        Ignores { job: Arc::new(job), own: BTreeMap::new() }
    }

    /// The rules for what lies in a directory, without a file in the directory itself where `above`.
    fn rules(&self, directory: Option<&RelPath>, above: bool) -> &Arc<Filter> {
        if self.own.is_empty() {
            return &self.job;
        }
        let mut at = directory.cloned();
        if above {
            let Some(inner) = at else { return &self.job };
            at = inner.parent();
        }
        loop {
            if let Some(rules) = self.own.get(&at) {
                return rules;
            }
            let Some(inner) = at else { return &self.job };
            at = inner.parent();
        }
    }

    /// A directory is listed, which holds these names: its file counts from now on, or does not any more. Gives its rules.
    pub(super) fn enter(&mut self, root: &Root, directory: Option<&RelPath>, names: &[Vec<u8>]) -> Arc<Filter> {
        let above = Arc::clone(self.rules(directory, true));
        // One that cannot be read is told by the scan of a run, which does without it too.
        let rules = with_own_ignore_file(root, directory, names, &above).unwrap_or_else(|_| Arc::clone(&above));
        if Arc::ptr_eq(&above, &rules) {
            self.own.remove(&directory.cloned());
        } else {
            self.own.insert(directory.cloned(), Arc::clone(&rules));
        }
        rules
    }

    /// The file of a directory changed, appeared or went.
    pub(super) fn read(&mut self, root: &Root, directory: Option<&RelPath>) {
        let file = directory.map_or_else(|| RelPath::new(IGNORE_FILE), |directory| directory.join(IGNORE_FILE));
        let is_there = file.is_ok_and(|file| root.stat(&file, Follow::Never).is_ok());
        let names = if is_there { vec![IGNORE_FILE.to_vec()] } else { Vec::new() };
        self.enter(root, directory, &names);
    }

    /// Whether something in a directory that takes part does so itself.
    pub(super) fn admits(&self, path: &RelPath, directory: bool) -> bool {
        self.rules(path.parent().as_ref(), false).admits(path, directory)
    }

    /// The same of anything: all directories above it have to take part.
    pub(super) fn takes_part(&self, path: &RelPath, directory: bool) -> bool {
        path.ancestors().all(|above| self.admits(&above, true)) && self.admits(path, directory)
    }

    /// Whether any file is known.
    pub(super) fn has_files(&self) -> bool {
        !self.own.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::filter::FilterSpec;

    #[test]
    fn rules_hold_below_the_directory_of_their_file() {
        let at = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(at.path().join("a/b")).unwrap();
        std::fs::write(at.path().join(".lockstepignore"), "*.log\n").unwrap();
        std::fs::write(at.path().join("a/.lockstepignore"), "!keep.log\n/b/\n").unwrap();
        let root = Root::open(at.path()).unwrap();
        let rel = |path: &str| RelPath::new(path).unwrap();
        let spec = FilterSpec { rules: vec!["*.tmp".into()], only: None };
        let mut ignores = Ignores::new(Filter::compile(&spec).unwrap());
        assert!(ignores.admits(&rel("x.log"), false) && !ignores.admits(&rel("x.tmp"), false));
        let names = [b".lockstepignore".to_vec()];
        ignores.enter(&root, None, &names);
        ignores.enter(&root, Some(&rel("a")), &names);
        for (path, expected) in [
            ("x.log", false),
            ("a/x.log", false),
            ("a/keep.log", true),
            ("keep.log", false),
            ("a/c/keep.log", true),
            ("a/x.tmp", false),
        ] {
            assert_eq!(ignores.admits(&rel(path), false), expected, "{path}");
        }
        assert!(!ignores.takes_part(&rel("a/b/deep/file"), false) && ignores.takes_part(&rel("c/b/deep/file"), false));
        // A file that is gone, or is none, says nothing.
        ignores.enter(&root, Some(&rel("a")), &[]);
        assert!(!ignores.admits(&rel("a/keep.log"), false));
        std::fs::write(at.path().join(".lockstepignore"), "a{\n").unwrap();
        ignores.enter(&root, None, &names);
        assert!(ignores.admits(&rel("x.log"), false) && !ignores.has_files());
    }
}
