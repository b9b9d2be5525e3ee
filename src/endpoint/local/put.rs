//! [`Put`]: the entries that come into a manifest.
//!
//! Of a run that brings a million files they are as many. They are not kept beside the source's entries that they are made of,
//! but made each time that they are asked for.

use std::borrow::Cow;
use std::cell::RefCell;
use std::iter::Peekable;

use super::target::{Run, State};
use crate::endpoint::Error;
use crate::manifest::{Content, Entry, Tree};
use crate::path::RelPath;
use crate::scan::names::Names;

/// Sorted by path; none comes twice.
pub(super) struct Put<'a> {
    own: Vec<Entry>,
    of_run: Option<OfRun<'a>>,
}

/// Those of them that are the source's, as they are at the target afterwards.
struct OfRun<'a> {
    run: &'a Run,
    state: &'a State,
    names: RefCell<Names>,
    /// Indices of the source, ascending.
    indices: Vec<u32>,
}

/// One of them, with its index at the source where it is one of the source's.
pub(super) type Item<'a> = (Cow<'a, Entry>, Option<u32>);

impl From<Tree> for Put<'static> {
    fn from(tree: Tree) -> Put<'static> {
        Put { own: tree.into_entries(), of_run: None }
    }
}

impl<'a> Put<'a> {
    /// Of a run; nothing yet.
    pub(super) fn of_run(run: &'a Run, state: &'a State) -> Put<'a> {
        let of_run = OfRun { run, state, names: RefCell::default(), indices: Vec::new() };
        Put { own: Vec::new(), of_run: Some(of_run) }
    }

    pub(super) fn is_of_source_alone(&self) -> bool {
        self.own.is_empty()
    }

    /// The source's entry at `index` as it is at the target afterwards.
    pub(super) fn made(&self, index: u32) -> Result<Entry, Error> {
        match &self.of_run {
            Some(of_run) => of_run.made(index),
            None => Err(Error::Usage("there is no run that this comes from".into())),
        }
    }

    /// Adds entries of the source by their index.
    pub(super) fn add_of_source(&mut self, indices: impl IntoIterator<Item = u32>) {
        if let Some(of_run) = &mut self.of_run {
            of_run.indices.extend(indices);
            if !of_run.indices.is_sorted() {
                of_run.indices.sort_unstable();
            }
            of_run.indices.dedup();
        }
    }

    /// Adds entries that are none of the source's.
    pub(super) fn add(&mut self, entries: impl IntoIterator<Item = Entry>) {
        self.own.extend(entries);
        self.own.sort_by(|a, b| a.path.cmp(&b.path));
        self.own.dedup_by(|a, b| a.path == b.path);
    }

    /// The entry at `path`.
    pub(super) fn get(&self, path: &RelPath) -> Result<Option<Cow<'_, Entry>>, Error> {
        if let Ok(at) = self.own.binary_search_by(|entry| entry.path.cmp(path)) {
            return Ok(Some(Cow::Borrowed(&self.own[at])));
        }
        let Some(of_run) = &self.of_run else { return Ok(None) };
        let index = of_run.state.source.position(path).map(|at| at as u32);
        let index = index.filter(|index| of_run.indices.binary_search(index).is_ok());
        index.map(|index| of_run.made(index).map(Cow::Owned)).transpose()
    }

    pub(super) fn holds(&self, path: &RelPath) -> bool {
        let own = || self.own.binary_search_by(|entry| entry.path.cmp(path)).is_ok();
        let of_source = || {
            let of_run = self.of_run.as_ref()?;
            let index = of_run.state.source.position(path)? as u32;
            of_run.indices.binary_search(&index).ok()
        };
        own() || of_source().is_some()
    }

    /// All of them.
    pub(super) fn iter(&self) -> impl Iterator<Item = Result<Item<'_>, Error>> {
        self.starting_at(0, 0)
    }

    /// What is at `path` and below.
    pub(super) fn within<'b>(&'b self, path: &'b RelPath) -> impl Iterator<Item = Result<Item<'b>, Error>> + 'b {
        let own = self.own.partition_point(|entry| entry.path < *path);
        let of_source = self.of_run.as_ref().map_or(0, |of_run| {
            of_run.indices.partition_point(|&index| of_run.state.source.entries()[index as usize].path < *path)
        });
        let items = self.starting_at(own, of_source);
        items.take_while(|item| item.as_ref().map_or(true, |(entry, _)| entry.path.is_within(path)))
    }

    /// Further names, and what they are further names of. This makes nothing.
    pub(super) fn hard_links(&self) -> impl Iterator<Item = (&RelPath, &RelPath)> {
        let of_run = self.of_run.iter().flat_map(|of_run| {
            let entries = of_run.state.source.entries();
            of_run.indices.iter().map(|&index| &entries[index as usize])
        });
        self.own.iter().chain(of_run).filter_map(|entry| match &entry.content {
            Content::HardLink { first } => Some((&entry.path, first)),
            _ => None,
        })
    }

    /// The paths of all of them, in no order. This makes nothing.
    pub(super) fn paths(&self) -> impl Iterator<Item = &RelPath> {
        let of_run = self.of_run.iter().flat_map(|of_run| {
            let entries = of_run.state.source.entries();
            of_run.indices.iter().map(|&index| &entries[index as usize].path)
        });
        self.own.iter().map(|entry| &entry.path).chain(of_run)
    }

    fn starting_at(&self, own: usize, of_source: usize) -> Merged<'_> {
        let indices = self.of_run.as_ref().map_or(&[][..], |of_run| &of_run.indices[of_source..]);
        Merged {
            own: self.own[own..].iter().peekable(),
            of_run: self.of_run.as_ref(),
            indices: indices.iter().peekable(),
        }
    }
}

/// Goes through both lists at once.
struct Merged<'a> {
    own: Peekable<std::slice::Iter<'a, Entry>>,
    of_run: Option<&'a OfRun<'a>>,
    indices: Peekable<std::slice::Iter<'a, u32>>,
}

impl<'a> Iterator for Merged<'a> {
    type Item = Result<Item<'a>, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        let of_source = self.of_run.zip(self.indices.peek().map(|index| **index));
        if let Some((of_run, index)) = of_source {
            let path = &of_run.state.source.entries()[index as usize].path;
            if self.own.peek().is_none_or(|own| *path < own.path) {
                self.indices.next();
                return Some(of_run.made(index).map(|entry| (Cow::Owned(entry), Some(index))));
            }
        }
        self.own.next().map(|entry| Ok((Cow::Borrowed(entry), None)))
    }
}

impl OfRun<'_> {
    fn made(&self, index: u32) -> Result<Entry, Error> {
        let (run, state) = (self.run, self.state);
        let mut entry = state.source.entries()[index as usize].clone();
        let there = state.target.position(&entry.path);
        if let Some(at) = there.filter(|_| run.options.forbidden.change && entry.is_directory()) {
            // It stays as it is.
            return Ok(state.target.entries()[at].clone());
        }
        let staged = state.staged.borrow().get(index).copied();
        if let Content::File { digest, .. } = &mut entry.content {
            let proven = staged.map(|staged| staged.digest).or_else(|| state.kept.get(index).copied());
            *digest = proven.or_else(|| state.target.entries()[there?].file()?.1).or(*digest);
        }
        // A further name has what the file has.
        let first = if let Content::HardLink { first } = &entry.content { state.source.get(first) } else { None };
        let wanted = run.permissions(first.unwrap_or(&entry))?;
        let now = staged.map(|staged| staged.seen).or_else(|| there.map(|at| state.metadata[at]));
        let own = || (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        let (uid, gid) = now.map_or_else(own, |now| (now.uid, now.gid));
        let mut names = self.names.borrow_mut();
        entry.owner = names.user(wanted.uid.unwrap_or(uid));
        entry.group = names.group(wanted.gid.unwrap_or(gid));
        if !matches!(entry.content, Content::Symlink { .. }) {
            entry.mode = wanted.mode;
        }
        Ok(entry)
    }
}
