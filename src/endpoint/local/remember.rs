//! What the next run is to know of the files of a root, found out while the new manifest is written.

use std::collections::HashSet;

use super::known::Files;
use super::publish::Record;
use super::target::{Run, State};
use crate::manifest::{Content, Entry};
use crate::monitor::Monitor;
use crate::path::RelPath;
use crate::plan::publish::Step;

/// See the module. It is given what the new manifest lists, in order.
pub(super) struct Remembering<'a> {
    state: &'a State,
    files: Files<'a>,
    /// Of which nobody knows what they are now.
    failed: HashSet<&'a RelPath>,
    /// Directories that got their names with all that is in them.
    whole: HashSet<&'a RelPath>,
    /// What there are further names of.
    firsts: HashSet<&'a RelPath>,
    /// Of a run that looked at a part: what is listed of that. Such a run says nothing of the rest, and is not to cost what the
    /// rest would.
    part: Option<Vec<Entry>>,
}

impl<'a> Remembering<'a> {
    pub(super) fn new(
        run: &'a Run,
        state: &'a State,
        record: &'a Record,
        problems: &'a [(RelPath, String)],
    ) -> Remembering<'a> {
        let part = run.options.filter.only.is_some();
        let old = state.old_manifest.tree.entries().iter().filter(|_| !part);
        let firsts = state.source.entries().iter().chain(old).filter_map(|entry| match &entry.content {
            Content::HardLink { first } => Some(first),
            _ => None,
        });
        let whole = record.steps.iter().filter(|step| matches!(step, Step::NewDirectory(_) | Step::Exchange(_)));
        let mut files = if part { Files::amending(&run.root) } else { Files::new(&run.root) };
        if !part {
            for (entry, seen) in state.target.entries().iter().zip(&state.metadata) {
                files.unchanged(entry, seen);
            }
        }
        let part = part.then(Vec::new);
        let failed = problems.iter().map(|(path, _)| path).collect();
        Remembering { state, files, failed, whole: whole.map(Step::path).collect(), firsts: firsts.collect(), part }
    }

    /// An entry of the new manifest; with the index of the source's where it is one of those.
    pub(super) fn add(&mut self, entry: &Entry, index: Option<u32>) {
        if let Some(listed) = &mut self.part {
            let State { source, target, .. } = self.state;
            if index.is_some() || source.position(&entry.path).is_some() || target.position(&entry.path).is_some() {
                listed.push(entry.clone());
            }
            return;
        }
        self.look(entry, index);
        if let Some(index) = index {
            // Nothing before it is asked for again.
            self.state.staged.borrow_mut().forget_before(index);
        }
    }

    fn look(&mut self, entry: &Entry, index: Option<u32>) {
        if entry.file().is_none() || self.failed.contains(&entry.path) {
            return;
        }
        let State { source, target, plan, staged, .. } = self.state;
        let in_whole = !self.whole.is_empty() && entry.path.ancestors().any(|above| self.whole.contains(&above));
        let first = self.firsts.contains(&entry.path);
        let index = index.or_else(|| source.position(&entry.path).map(|at| at as u32));
        let staged = index.and_then(|index| staged.borrow().get(index).copied());
        // Its other name has gone since, which shows in its time of change.
        let moved = index.is_some_and(|index| self.state.moved.contains_key(&index));
        let planned = || index.is_some_and(|at| plan.actions.binary_search_by_key(&at, |one| one.index).is_ok());
        match staged {
            // What was moved with the directory above it is what it was in staging.
            Some(staged) if in_whole && !first && !moved => {
                if let Some(content) = staged.fingerprint(entry) {
                    self.files.published(entry, content);
                }
            }
            _ if first || in_whole || planned() => self.files.look(entry),
            // A rule kept it out of this run.
            _ if target.position(&entry.path).is_none() => self.files.apart(entry),
            _ => {}
        }
    }

    /// Keeps it.
    pub(super) fn store(mut self, monitor: &dyn Monitor) {
        if let Some(listed) = self.part.take() {
            let listed_at = |path: &RelPath| {
                let at = listed.binary_search_by(|entry| entry.path.cmp(path)).ok()?;
                Some(&listed[at])
            };
            for (entry, seen) in self.state.target.entries().iter().zip(&self.state.metadata) {
                match listed_at(&entry.path).is_some_and(|listed| listed.file() == entry.file()) {
                    true => self.files.unchanged(entry, seen),
                    false => self.files.gone(entry, seen),
                }
            }
            for (at, entry) in self.state.source.entries().iter().enumerate() {
                if let Some(entry) = listed_at(&entry.path) {
                    self.look(entry, Some(at as u32));
                }
            }
        }
        self.files.store(monitor);
    }
}
