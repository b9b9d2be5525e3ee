//! A source whose files may be in somebody's hands: each is asked about once more when it has been read.
//!
//! stat before and after the reading tells that a file changed meanwhile, not that it is half written and its writer rests.
//! Who watches the tree may know.

use std::collections::BTreeSet;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError};

use crate::endpoint::delta::{Alike, Beginning, Wanted};
use crate::endpoint::{Crew, Error, Fetch, Produced, Reader, Scan, ScanOptions, Source};
use crate::error::Exit;
use crate::manifest::{Content, Digest, Entry, Tree};
use crate::monitor::Monitor;
use crate::path::RelPath;
use crate::plan::trail::Stop;

/// What is said of a file that is in somebody's hands.
pub const BEING_WRITTEN: &str = "is being written; it is sent when its writer has finished";

/// What begins the message of a file that was not the same before and after it was read.
pub const CHANGED: &str = "changed while it was read";

/// What is said where a run publishes into the source at this moment.
pub const NOT_STEADY: &str = "a run publishes into it; it is passed on when that is done";

/// What is said where something was listed that was only finished afterwards.
pub const NOT_WHOLE: &str = "a unit was written to while it was listed; the same again finds it as it is then";

/// Whether a file that was read a moment ago is in somebody's hands.
pub type Guard = Arc<dyn Fn(&RelPath) -> bool + Send + Sync>;

/// What is not to be sent at the moment of asking, directories too.
pub type HeldBack = Arc<dyn Fn() -> BTreeSet<RelPath> + Send + Sync>;

/// Whether the tree has been left alone as a whole since something was remembered of it.
pub type Steady = Arc<dyn Fn() -> bool + Send + Sync>;

/// Whether a small file with this content, or a link with this target, may go with what was listed: a pointer that names something
/// else has to wait for it.
pub type Fitting = Arc<dyn Fn(&RelPath, &[u8], &Tree) -> bool + Send + Sync>;

/// Whether what was listed is all that there is, as far as it has to be.
pub type Whole = Arc<dyn Fn(&Tree) -> bool + Send + Sync>;

/// A source with a guard.
pub struct Guarded<S> {
    steady: Option<Steady>,
    whole: Option<Whole>,
    fitting: Option<Fitting>,
    source: S,
    guard: Guard,
    held_back: HeldBack,
    /// Files that were not finished when the tree had been listed.
    left: Mutex<BTreeSet<RelPath>>,
}

impl<S> Guarded<S> {
    /// `guard` is asked about each file after all of it was read, and before anything of it can be published; `held_back` after
    /// the tree was listed: a directory that is not finished, and holds no file yet that `guard` could be asked about, ends the
    /// run.
    pub fn new(source: S, guard: Guard, held_back: HeldBack) -> Guarded<S> {
        Guarded { steady: None, whole: None, fitting: None, source, guard, held_back, left: Mutex::default() }
    }

    /// Ends the run when the tree was listed and `steady` says no.
    #[must_use]
    pub fn steady(self, steady: Steady) -> Guarded<S> {
        Guarded { steady: Some(steady), ..self }
    }

    /// Ends the run when the tree was listed and `whole` says that something is missing.
    #[must_use]
    pub fn whole(self, whole: Whole) -> Guarded<S> {
        Guarded { whole: Some(whole), ..self }
    }

    /// Leaves small files that do not fit, and ends the run when it has listed a link that does not.
    #[must_use]
    pub fn fitting(self, fitting: Fitting) -> Guarded<S> {
        Guarded { fitting: Some(fitting), ..self }
    }
}

impl<S: Source> Source for Guarded<S> {
    fn describe(&self) -> String {
        self.source.describe()
    }

    fn scan(&self, options: &ScanOptions, monitor: &dyn Monitor) -> Result<Scan, Error> {
        let scan = self.source.scan(options, monitor)?;
        // All that was listed has been noticed by the time that this answers.
        let held = (self.held_back)();
        let unfinished = |path: &&RelPath| scan.tree.get(path).is_some_and(|entry| entry.file().is_none());
        // RACE: a link may have been put in the place of another after what it named then was asked for.
        let fits = |entry: &Entry| match (&entry.content, &self.fitting) {
            (Content::Symlink { target }, Some(fitting)) => fitting(&entry.path, target, &scan.tree),
            _ => true,
        };
        let steady = self.steady.as_ref().is_none_or(|steady| steady()) && scan.tree.entries().iter().all(fits);
        let whole = self.whole.as_ref().is_none_or(|whole| whole(&scan.tree));
        match held.iter().find(unfinished) {
            // That is over soon.
            _ if !steady => Err(Error::Remote { message: NOT_STEADY.to_owned(), exit: Exit::TryAgain }),
            // RACE: a directory that was not finished when it was listed may be finished by now.
            None if !whole => Err(Error::Remote { message: NOT_WHOLE.to_owned(), exit: Exit::TryAgain }),
            None => {
                *self.left.lock().unwrap_or_else(PoisonError::into_inner) = held;
                Ok(scan)
            }
            _ => Err(Error::Remote { message: BEING_WRITTEN.to_owned(), exit: Exit::TryAgain }),
        }
    }

    fn reader(&self, tree: Arc<Tree>) -> Result<Box<dyn Reader + '_>, Error> {
        let inner = self.source.reader(Arc::clone(&tree))?;
        // RACE: a pointer that was changed before the list was complete may be finished by the time that it is read, and so is
        // what it names; but that may not be in the list.
        let left = self.left.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let asked = Arc::clone(&self.guard);
        let guard: Guard = Arc::new(move |path| left.contains(path) || asked(path));
        Ok(Box::new(GuardedReader { inner, tree, guard, fitting: self.fitting.clone() }))
    }

    fn remember(&self, tree: &Tree, digests: &[(u32, Digest)]) {
        self.source.remember(tree, digests);
    }

    fn begins_with(&self, tree: &Tree, index: u32, beginning: Beginning) -> bool {
        self.source.begins_with(tree, index, beginning)
    }

    fn wire_bytes(&self) -> u64 {
        self.source.wire_bytes()
    }

    fn crew(&self) -> Crew {
        self.source.crew()
    }

    fn is_far(&self) -> bool {
        self.source.is_far()
    }

    fn compares(&self) -> bool {
        self.source.compares()
    }

    fn compare(&self, index: u32, over: &AtomicBool, ask: &mut dyn FnMut(Wanted) -> Option<Alike>) {
        self.source.compare(index, over, ask);
    }

    fn expect(&self, bytes: u64, files: usize) {
        self.source.expect(bytes, files);
    }

    fn remark(&self, monitor: &dyn Monitor) {
        self.source.remark(monitor);
    }

    fn trail(&self) -> Result<Vec<Stop>, Error> {
        self.source.trail()
    }
}

struct GuardedReader<'a> {
    inner: Box<dyn Reader + 'a>,
    tree: Arc<Tree>,
    guard: Guard,
    fitting: Option<Fitting>,
}

impl Reader for GuardedReader<'_> {
    fn wants_more(&self) -> bool {
        self.inner.wants_more()
    }

    fn push(&mut self, fetch: Fetch) {
        self.inner.push(fetch);
    }

    fn next(&mut self) -> Result<Option<Produced>, Error> {
        let produced = self.inner.next()?;
        // Every change before the end of the reading has been noticed by the time that the guard answers.
        let read = match &produced {
            Some(Produced::Whole { index, .. } | Produced::End { index, .. }) => *index,
            _ => return Ok(produced),
        };
        let fits = |path: &RelPath| match (&produced, &self.fitting) {
            (Some(Produced::Whole { block, .. }), Some(fitting)) => fitting(path, block.data(), &self.tree),
            _ => true,
        };
        let entry = self.tree.entries().get(read as usize);
        let held = entry.is_some_and(|entry| (self.guard)(&entry.path) || !fits(&entry.path));
        match held {
            true => Ok(Some(Produced::Failed { index: read, message: BEING_WRITTEN.to_owned(), retry: false })),
            false => Ok(produced),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::endpoint::local::LocalSource;
    use crate::monitor::Silent;

    #[test]
    fn a_link_waits_for_what_it_names() {
        let at = tempfile::tempdir().unwrap();
        std::fs::create_dir(at.path().join("unit")).unwrap();
        std::os::unix::fs::symlink("unit", at.path().join("latest")).unwrap();
        let source = LocalSource::new(at.path(), None).unwrap();
        let fitting: Fitting = Arc::new(|path, target, tree: &Tree| {
            path.as_bytes() != b"latest" || tree.get(&RelPath::new(target).unwrap()).is_some()
        });
        let source = Guarded::new(source, Arc::new(|_: &RelPath| false), Arc::new(BTreeSet::new)).fitting(fitting);
        assert!(source.scan(&ScanOptions::default(), &Silent::default()).is_ok());
        let mut alone = ScanOptions::default();
        alone.filter.only = Some(vec![b"latest".to_vec()]);
        let error = source.scan(&alone, &Silent::default()).unwrap_err();
        assert!(error.to_string().contains(NOT_STEADY), "{error}");
    }

    #[test]
    fn a_file_in_somebodys_hands_is_read_and_not_handed_on() {
        let at = tempfile::tempdir().unwrap();
        std::fs::write(at.path().join("small"), "x").unwrap();
        std::fs::write(at.path().join("large"), vec![7; 2 << 20]).unwrap();
        for held in ["small", "large", "none"] {
            let guard: Guard = Arc::new(move |path: &RelPath| path.as_bytes() == held.as_bytes());
            let source = Guarded::new(LocalSource::new(at.path(), None).unwrap(), guard, Arc::new(BTreeSet::new));
            let tree = Arc::new(source.scan(&ScanOptions::default(), &Silent::default()).unwrap().tree);
            let mut reader = source.reader(Arc::clone(&tree)).unwrap();
            (0..2).for_each(|index| reader.push(Fetch::of(index)));
            let (mut whole, mut failed) = (Vec::new(), Vec::new());
            while let Some(produced) = reader.next().unwrap() {
                let name = |index: u32| tree.entries()[index as usize].path.to_string();
                match produced {
                    Produced::Whole { index, .. } | Produced::End { index, .. } => whole.push(name(index)),
                    Produced::Failed { index, message, retry } => {
                        assert!(!retry && message == BEING_WRITTEN);
                        failed.push(name(index));
                    }
                    _ => {}
                }
            }
            let expected: Vec<&str> = ["large", "small"].into_iter().filter(|name| *name != held).collect();
            assert_eq!(whole, expected);
            assert_eq!(failed, ["large", "small"].into_iter().filter(|name| *name == held).collect::<Vec<_>>());
        }
    }

    #[test]
    fn a_small_file_that_does_not_fit_with_what_was_listed_is_left() {
        let at = tempfile::tempdir().unwrap();
        std::fs::write(at.path().join("latest"), "unit-2").unwrap();
        for (unit, fits) in [("unit-1", false), ("unit-2", true)] {
            std::fs::create_dir(at.path().join(unit)).unwrap();
            let named: Fitting = Arc::new(|path: &RelPath, content: &[u8], tree: &Tree| {
                path.as_bytes() != b"latest" || tree.get(&RelPath::new(content).unwrap()).is_some()
            });
            let source = LocalSource::new(at.path(), None).unwrap();
            let source = Guarded::new(source, Arc::new(|_| false), Arc::new(BTreeSet::new)).fitting(named);
            let tree = Arc::new(source.scan(&ScanOptions::default(), &Silent::default()).unwrap().tree);
            let mut reader = source.reader(Arc::clone(&tree)).unwrap();
            reader.push(Fetch::of(0));
            let produced = reader.next().unwrap().unwrap();
            assert_eq!(matches!(produced, Produced::Whole { .. }), fits, "{unit}: {produced:?}");
        }
    }

    #[test]
    fn a_directory_that_is_not_finished_ends_the_run_and_a_file_does_not() {
        let at = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(at.path().join("checkpoint-30")).unwrap();
        std::fs::write(at.path().join("file"), "x").unwrap();
        for (held, good) in [("checkpoint-30", false), ("file", true), ("elsewhere", true)] {
            let held_back: HeldBack = Arc::new(move || BTreeSet::from([RelPath::new(held).unwrap()]));
            let source = Guarded::new(LocalSource::new(at.path(), None).unwrap(), Arc::new(|_| false), held_back);
            assert_eq!(source.scan(&ScanOptions::default(), &Silent::default()).is_ok(), good, "{held}");
        }
    }
}
