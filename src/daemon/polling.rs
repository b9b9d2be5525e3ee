//! What changed between two looks at a source that gives no events.
//!
//! Of every path two numbers are kept: a hash of its name, and one of size, times and inode. A million files take 16 MB.

use std::collections::BTreeMap;
use std::hash::{BuildHasher as _, RandomState};
use std::os::fd::OwnedFd;

use super::ignores::Ignores;
use super::look::{Visit, walk};
use super::temporary::is_temporary;
use crate::path::RelPath;
use crate::root::{FileKind, Follow, Metadata, Root, RootError};

/// What is known of a source.
#[derive(Debug, Default)]
pub(super) struct Snapshot {
    /// By directory: name and state of what is in it, in order of the hashes of names.
    directories: BTreeMap<Option<RelPath>, Box<[(u64, u64)]>>,
    hasher: RandomState,
}

/// What a look found.
#[derive(Debug, Default)]
pub(super) struct Changes {
    /// New or changed, and whether it is a directory.
    pub(super) changed: Vec<(RelPath, bool)>,
    /// Directories in which something is missing that was there.
    pub(super) thinned: Vec<Option<RelPath>>,
    /// Directories that are not there any more.
    pub(super) gone: Vec<RelPath>,
}

struct Compare<'a> {
    snapshot: &'a mut Snapshot,
    changes: Changes,
    stopped: &'a dyn Fn() -> bool,
    each: &'a mut dyn FnMut(&RelPath, &Metadata),
}

impl Snapshot {
    /// How many directories there are.
    pub(super) fn directories(&self) -> usize {
        self.directories.len()
    }

    fn pair(&self, path: &RelPath, metadata: &Metadata) -> (u64, u64) {
        let of = metadata;
        let times = (of.mtime.seconds, of.mtime.nanoseconds, of.ctime.seconds, of.ctime.nanoseconds);
        // The size of a directory is nobody's content; its time of change is told by what is in it.
        let state = match of.kind {
            FileKind::Directory => self.hasher.hash_one((of.inode, of.mode, of.uid, of.gid)),
            _ => self.hasher.hash_one((of.size, times, of.inode, of.device)),
        };
        (self.hasher.hash_one(path.name()), state)
    }

    /// Looks at everything at `top` and below, tells each path, and says what is not as it was.
    ///
    /// # Errors
    /// When `top` cannot be listed.
    pub(super) fn look(
        &mut self,
        root: &Root,
        top: Option<&RelPath>,
        ignores: &mut Ignores,
        stopped: &dyn Fn() -> bool,
        each: &mut dyn FnMut(&RelPath, &Metadata),
    ) -> Result<Changes, RootError> {
        let mut compare = Compare { snapshot: self, changes: Changes::default(), stopped, each };
        walk(root, top, ignores, &mut compare)?;
        let mut changes = compare.changes;
        if stopped() {
            return Ok(changes);
        }
        let below = |path: &&Option<RelPath>| match (path, top) {
            (None, _) => false,
            (Some(_), None) => true,
            (Some(path), Some(top)) => path.is_within(top),
        };
        let known: Vec<RelPath> = self.directories.keys().filter(below).flatten().cloned().collect();
        for path in known {
            // A file says so since.
            if ignores.has_files() && !ignores.takes_part(&path, true) {
                self.directories.remove(&Some(path));
                continue;
            }
            // One that cannot be listed for now is not gone.
            let is_there = match root.stat(&path, Follow::Never) {
                Ok(found) => found.kind == FileKind::Directory,
                Err(error) => !matches!(error.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory),
            };
            if !is_there {
                self.directories.remove(&Some(path.clone()));
                if !changes.gone.iter().any(|gone| path.is_within(gone)) {
                    changes.gone.push(path);
                }
            }
        }
        Ok(changes)
    }

    /// Whether a path that is no directory is as it was at the last look; what it is now is kept.
    pub(super) fn is_same(&mut self, path: &RelPath, metadata: &Metadata) -> bool {
        let (name, state) = self.pair(path, metadata);
        let Some(known) = self.directories.get_mut(&path.parent()) else { return false };
        match known.binary_search_by_key(&name, |pair| pair.0) {
            Ok(at) => std::mem::replace(&mut known[at].1, state) == state,
            Err(_) => false,
        }
    }
}

impl Visit for Compare<'_> {
    fn enter(&mut self, _: Option<&RelPath>, _: &OwnedFd) {}

    fn list(&mut self, directory: Option<&RelPath>, entries: &[(RelPath, Metadata)]) {
        let before = self.snapshot.directories.get(&directory.cloned());
        let mut pairs = Vec::with_capacity(entries.len());
        for (path, metadata) in entries {
            (self.each)(path, metadata);
            // Those come and go; when they are done they have another name.
            if is_temporary(path.name()) {
                continue;
            }
            let pair = self.snapshot.pair(path, metadata);
            let known = before.and_then(|before| before.binary_search_by_key(&pair.0, |known| known.0).ok());
            let known = known.and_then(|at| before.map(|before| before[at].1));
            if known != Some(pair.1) {
                self.changes.changed.push((path.clone(), metadata.kind == FileKind::Directory));
            }
            pairs.push(pair);
        }
        pairs.sort_unstable();
        let is_there = |name: u64| pairs.binary_search_by_key(&name, |pair| pair.0).is_ok();
        if before.is_some_and(|before| before.iter().any(|pair| !is_there(pair.0))) {
            self.changes.thinned.push(directory.cloned());
        }
        self.snapshot.directories.insert(directory.cloned(), pairs.into());
    }

    fn unreadable(&mut self, _: Option<&RelPath>) {}

    fn stopped(&self) -> bool {
        (self.stopped)()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::filter::{Filter, FilterSpec};

    #[test]
    fn what_changed_between_two_looks() {
        let directory = tempfile::tempdir().unwrap();
        let at = directory.path();
        std::fs::create_dir_all(at.join("d/e")).unwrap();
        for name in ["a", "d/b", "d/e/c", "skip.log"] {
            std::fs::write(at.join(name), name).unwrap();
        }
        let root = Root::open(at).unwrap();
        let filter = Filter::compile(&FilterSpec { rules: vec!["*.log".into()], only: None }).unwrap();
        let mut ignores = Ignores::new(filter);
        let mut snapshot = Snapshot::default();
        let mut look = |snapshot: &mut Snapshot| {
            let changes = snapshot.look(&root, None, &mut ignores, &|| false, &mut |_, _| ()).unwrap();
            let mut changed: Vec<String> = changes.changed.iter().map(|(path, _)| path.to_string()).collect();
            changed.sort();
            let thinned: Vec<_> = changes.thinned.iter().map(|path| path.as_ref().map(ToString::to_string)).collect();
            (changed, thinned, changes.gone.iter().map(ToString::to_string).collect::<Vec<_>>())
        };
        assert_eq!(look(&mut snapshot).0, ["a", "d", "d/b", "d/e", "d/e/c"]);
        assert_eq!(look(&mut snapshot), (vec![], vec![], vec![]));
        // Same size, and the time put back: the time of change tells.
        let time = std::fs::metadata(at.join("a")).unwrap().modified().unwrap();
        std::fs::write(at.join("a"), "b").unwrap();
        std::fs::File::options().write(true).open(at.join("a")).unwrap().set_modified(time).unwrap();
        std::fs::write(at.join("d/new.tmp"), "").unwrap();
        assert_eq!(look(&mut snapshot), (vec!["a".into()], vec![], vec![]));
        std::fs::rename(at.join("d/new.tmp"), at.join("d/new")).unwrap();
        std::fs::remove_file(at.join("d/b")).unwrap();
        std::fs::remove_dir_all(at.join("d/e")).unwrap();
        assert_eq!(look(&mut snapshot), (vec!["d/new".into()], vec![Some("d".into())], vec!["d/e".into()]));
        let path = RelPath::new("a").unwrap();
        let now = root.stat(&path, Follow::Never).unwrap();
        assert!(snapshot.is_same(&path, &now));
        std::fs::write(at.join("a"), "longer").unwrap();
        let now = root.stat(&path, Follow::Never).unwrap();
        assert!(!snapshot.is_same(&path, &now) && snapshot.is_same(&path, &now));
    }
}
