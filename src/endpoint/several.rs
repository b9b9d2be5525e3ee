//! Named files and directories out of one or more directories, as one source: each appears at the top of the tree under
//! the name that it is to have at the target.

use std::collections::VecDeque;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError};

use crate::endpoint::delta::{Alike, Beginning, Wanted};
use crate::endpoint::{Error, Fetch, Produced, Reader, Scan, ScanOptions, Source};
use crate::manifest::{Content, Digest, Entry, Tree};
use crate::monitor::{Monitor, Problem, Severity};
use crate::path::RelPath;

/// What is taken out of one directory.
pub struct Part {
    /// The directory.
    pub source: Box<dyn Source>,
    /// Names in it, each with the name it gets; both are single components.
    pub names: Vec<(RelPath, RelPath)>,
}

/// Several parts as one source.
pub struct Several {
    parts: Vec<Part>,
    shown: String,
    layout: Mutex<Arc<Layout>>,
}

/// Where the entries of the joined tree come from.
#[derive(Default)]
struct Layout {
    trees: Vec<Arc<Tree>>,
    /// Part and index in its tree, by the index in the joined tree.
    origin: Vec<(usize, u32)>,
    /// The index in the joined tree, by part and index in its tree.
    joined: Vec<Vec<Option<u32>>>,
}

impl Several {
    /// `shown` is what the user named, for messages and the audit log.
    pub fn new(parts: Vec<Part>, shown: String) -> Several {
        Several { parts, shown, layout: Mutex::default() }
    }

    fn layout(&self) -> Arc<Layout> {
        Arc::clone(&self.layout.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Part {
    /// The path that `path` of the part has in the joined tree; `None` for what was not named.
    fn presented(&self, path: &RelPath) -> Option<RelPath> {
        let (name, new) = self.names.iter().find(|(name, _)| path == name || path.is_within(name))?;
        match path.strip_prefix(name) {
            Some(below) => new.join(below.as_bytes()).ok(),
            None => Some(new.clone()),
        }
    }

    fn scan(&self, options: &ScanOptions, monitor: &dyn Monitor) -> Result<Scan, Error> {
        let mut options = options.clone();
        options.filter.only = Some(self.names.iter().map(|(name, _)| name.as_bytes().to_vec()).collect());
        self.source.scan(&options, monitor)
    }

    /// An entry under its new name, links within the part too.
    fn renamed(&self, entry: &Entry) -> Option<Entry> {
        let path = self.presented(&entry.path)?;
        let content = match &entry.content {
            Content::HardLink { first } => Content::HardLink { first: self.presented(first)? },
            other => other.clone(),
        };
        Some(Entry { path, content, ..entry.clone() })
    }

    /// Says what was named and cannot be sent: somebody who names a file means it.
    fn missing(&self, tree: &Tree, problems: &mut Vec<Problem>) {
        for (name, new) in &self.names {
            let message = match tree.get(name).map(|entry| &entry.content) {
                Some(Content::Symlink { target }) => {
                    format!("is a symbolic link to '{}'; name what it points to", crate::error::Escaped(target))
                }
                Some(_) => continue,
                None if problems.iter().any(|problem| problem.path.as_ref() == Some(new)) => continue,
                None => "is not there, or left out by --exclude or a .lockstepignore beside it".to_owned(),
            };
            problems.push(Problem { path: Some(new.clone()), message, severity: Severity::Failed });
        }
    }
}

/// Of the names of one file the first keeps the content; under new names that may be another one.
fn lead(found: &mut [(Entry, usize, u32)]) {
    for at in 0..found.len() {
        let Content::HardLink { first } = found[at].0.content.clone() else { continue };
        let Ok(file) = found.binary_search_by(|(entry, ..)| entry.path.cmp(&first)) else { continue };
        if file < at {
            continue;
        }
        let content = std::mem::replace(&mut found[file].0.content, Content::Directory);
        let (path, origin) = (found[at].0.path.clone(), (found[at].1, found[at].2));
        (found[at].1, found[at].2) = (found[file].1, found[file].2);
        (found[file].1, found[file].2) = origin;
        found[at].0.content = content;
        found[file].0.content = Content::HardLink { first: path.clone() };
        for (entry, ..) in found.iter_mut() {
            if matches!(&entry.content, Content::HardLink { first: old } if *old == first) {
                entry.content = Content::HardLink { first: path.clone() };
            }
        }
    }
}

impl Source for Several {
    fn describe(&self) -> String {
        self.shown.clone()
    }

    fn scan(&self, options: &ScanOptions, monitor: &dyn Monitor) -> Result<Scan, Error> {
        let (mut found, mut trees, mut problems) = (Vec::new(), Vec::new(), Vec::new());
        for (number, part) in self.parts.iter().enumerate() {
            let scan = part.scan(options, monitor)?;
            let mut own: Vec<Problem> = scan
                .problems
                .into_iter()
                .map(|problem| Problem { path: problem.path.and_then(|path| part.presented(&path)), ..problem })
                .collect();
            part.missing(&scan.tree, &mut own);
            problems.extend(own);
            for (index, entry) in scan.tree.entries().iter().enumerate() {
                let named = entry.path.depth() == 1;
                if let Some(entry) = part.renamed(entry)
                    && !(named && matches!(entry.content, Content::Symlink { .. }))
                {
                    found.push((entry, number, index as u32));
                }
            }
            trees.push(Arc::new(scan.tree));
        }
        found.sort_by(|a, b| a.0.path.cmp(&b.0.path));
        lead(&mut found);
        let mut layout = Layout {
            origin: Vec::with_capacity(found.len()),
            joined: trees.iter().map(|tree| vec![None; tree.entries().len()]).collect(),
            trees,
        };
        let mut entries = Vec::with_capacity(found.len());
        for (at, (entry, part, index)) in found.into_iter().enumerate() {
            layout.joined[part][index as usize] = Some(at as u32);
            layout.origin.push((part, index));
            entries.push(entry);
        }
        let tree = Tree::new(entries).map_err(|error| Error::Usage(format!("{}: {error}", self.shown)))?;
        *self.layout.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(layout);
        Ok(Scan { tree, problems })
    }

    fn reader(&self, _: Arc<Tree>) -> Result<Box<dyn Reader + '_>, Error> {
        let layout = self.layout();
        let readers = self.parts.iter().map(|_| None).collect();
        Ok(Box::new(SeveralReader { source: self, layout, readers, active: 0, waiting: VecDeque::new() }))
    }

    fn remember(&self, _: &Tree, digests: &[(u32, Digest)]) {
        let layout = self.layout();
        for (number, part) in self.parts.iter().enumerate() {
            let own: Vec<(u32, Digest)> = digests
                .iter()
                .filter_map(|&(index, digest)| {
                    let &(of, index) = layout.origin.get(index as usize)?;
                    (of == number).then_some((index, digest))
                })
                .collect();
            if let Some(tree) = layout.trees.get(number).filter(|_| !own.is_empty()) {
                part.source.remember(tree, &own);
            }
        }
    }

    fn begins_with(&self, _: &Tree, index: u32, beginning: Beginning) -> bool {
        let layout = self.layout();
        let Some(&(of, index)) = layout.origin.get(index as usize) else { return false };
        let part = self.parts.get(of).zip(layout.trees.get(of));
        part.is_some_and(|(part, tree)| part.source.begins_with(tree, index, beginning))
    }

    fn wire_bytes(&self) -> u64 {
        self.parts.iter().map(|part| part.source.wire_bytes()).sum()
    }

    fn is_far(&self) -> bool {
        self.parts.iter().all(|part| part.source.is_far())
    }

    fn compares(&self) -> bool {
        self.parts.iter().all(|part| part.source.compares())
    }

    fn compare(&self, index: u32, over: &AtomicBool, ask: &mut dyn FnMut(Wanted) -> Option<Alike>) {
        if let Some(&(of, index)) = self.layout().origin.get(index as usize)
            && let Some(part) = self.parts.get(of)
        {
            part.source.compare(index, over, ask);
        }
    }

    fn expect(&self, bytes: u64, files: usize) {
        self.parts.iter().for_each(|part| part.source.expect(bytes, files));
    }

    fn remark(&self, monitor: &dyn Monitor) {
        self.parts.iter().for_each(|part| part.source.remark(monitor));
    }
}

/// Reads from one part at a time; what is pushed for another waits until that one is done.
struct SeveralReader<'a> {
    source: &'a Several,
    layout: Arc<Layout>,
    /// Made when first needed.
    readers: Vec<Option<Box<dyn Reader + 'a>>>,
    active: usize,
    /// Indices are those of the joined tree.
    waiting: VecDeque<Fetch>,
}

impl Reader for SeveralReader<'_> {
    fn wants_more(&self) -> bool {
        let active = self.readers.get(self.active).and_then(Option::as_ref);
        self.waiting.is_empty() && active.is_none_or(|reader| reader.wants_more())
    }

    fn push(&mut self, fetch: Fetch) {
        let origin = self.layout.origin.get(fetch.index as usize);
        match (origin, self.readers.get_mut(self.active)) {
            (Some(&(part, index)), Some(Some(reader))) if part == self.active && self.waiting.is_empty() => {
                reader.push(Fetch { index, ..fetch });
            }
            _ => self.waiting.push_back(fetch),
        }
    }

    fn next(&mut self) -> Result<Option<Produced>, Error> {
        loop {
            if let Some(Some(reader)) = self.readers.get_mut(self.active)
                && let Some(produced) = reader.next()?
            {
                return Ok(Some(self.joined(produced)?));
            }
            let Some(fetch) = self.waiting.pop_front() else { return Ok(None) };
            let Some(&(part, index)) = self.layout.origin.get(fetch.index as usize) else {
                let message = "is not in the tree".to_owned();
                return Ok(Some(Produced::Failed { index: fetch.index, message, retry: false }));
            };
            self.active = part;
            let reader = match &mut self.readers[part] {
                Some(reader) => reader,
                empty => {
                    let tree = Arc::clone(&self.layout.trees[part]);
                    empty.insert(self.source.parts[part].source.reader(tree)?)
                }
            };
            reader.push(Fetch { index, ..fetch });
        }
    }
}

impl SeveralReader<'_> {
    /// The same with the index of the joined tree.
    fn joined(&self, mut produced: Produced) -> Result<Produced, Error> {
        let index = match &mut produced {
            Produced::Whole { index, .. }
            | Produced::Data { index, .. }
            | Produced::Hole { index, .. }
            | Produced::Copy { index, .. }
            | Produced::End { index, .. }
            | Produced::Same { index, .. }
            | Produced::Failed { index, .. } => index,
        };
        let joined = self.layout.joined[self.active].get(*index as usize).copied().flatten();
        *index = joined.ok_or_else(|| Error::Protocol {
            host: self.source.parts[self.active].source.describe(),
            what: "it sent a file that was not asked for".to_owned(),
        })?;
        Ok(produced)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::endpoint::local::LocalSource;
    use crate::monitor::Silent;
    use std::fs;
    use std::path::Path;

    fn part(at: &Path, names: &[(&str, &str)]) -> Part {
        let name = |text: &str| RelPath::new(text).unwrap();
        Part {
            source: Box::new(LocalSource::new(at, None).unwrap()),
            names: names.iter().map(|(old, new)| (name(old), name(new))).collect(),
        }
    }

    fn scanned(source: &Several) -> (Arc<Tree>, Vec<String>) {
        let scan = source.scan(&ScanOptions::default(), &Silent::default()).unwrap();
        let problems = scan.problems.iter().map(|problem| problem.path.clone().unwrap().to_string()).collect();
        (Arc::new(scan.tree), problems)
    }

    #[test]
    fn parts_are_joined_renamed_and_read_whatever_the_order() {
        let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        fs::create_dir_all(a.path().join("z/sub")).unwrap();
        fs::write(a.path().join("z/sub/f"), "in z").unwrap();
        fs::write(a.path().join("not named"), "no").unwrap();
        fs::write(b.path().join("m"), vec![5; 700_000]).unwrap();
        fs::hard_link(b.path().join("m"), b.path().join("n")).unwrap();
        fs::write(b.path().join("zz"), "last").unwrap();
        let parts = vec![part(a.path(), &[("z", "z")]), part(b.path(), &[("m", "new"), ("n", "n"), ("zz", "a")])];
        let source = Several::new(parts, "both".into());
        let (tree, problems) = scanned(&source);
        let paths: Vec<String> = tree.entries().iter().map(|entry| entry.path.to_string()).collect();
        assert_eq!(
            (paths.as_slice(), problems.len()),
            (&["a", "n", "new", "z", "z/sub", "z/sub/f"].map(String::from)[..], 0)
        );
        assert_eq!(tree.entries()[2].content, Content::HardLink { first: RelPath::new("n").unwrap() });

        let mut reader = source.reader(Arc::clone(&tree)).unwrap();
        assert!(reader.wants_more());
        for index in [5, 1, 0, 5] {
            reader.push(Fetch::of(index));
        }
        let mut content: Vec<(u32, usize)> = Vec::new();
        while let Some(produced) = reader.next().unwrap() {
            match produced {
                Produced::Whole { index, block, .. } => content.push((index, block.data().len())),
                Produced::Data { index, block, .. } => match content.last_mut() {
                    Some((last, length)) if *last == index => *length += block.data().len(),
                    _ => content.push((index, block.data().len())),
                },
                Produced::End { index, .. } => assert_eq!(index, 1),
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(content, [(5, 4), (1, 700_000), (0, 4), (5, 4)]);
    }

    #[test]
    fn what_was_named_and_cannot_be_sent_is_a_problem() {
        let at = tempfile::tempdir().unwrap();
        for name in ["good", "ignored"] {
            fs::write(at.path().join(name), name).unwrap();
        }
        std::os::unix::fs::symlink("good", at.path().join("link")).unwrap();
        fs::write(at.path().join(".lockstepignore"), "ignored\n").unwrap();
        let names = [("good", "good"), ("gone", "x"), ("ignored", "ignored"), ("link", "link")];
        let (tree, problems) = scanned(&Several::new(vec![part(at.path(), &names)], "some".into()));
        assert_eq!(tree.entries().len(), 1);
        assert_eq!(problems, ["x", "ignored", "link"]);
    }

    #[test]
    fn h07_two_of_one_name_are_refused() {
        let at = tempfile::tempdir().unwrap();
        fs::write(at.path().join("a"), "").unwrap();
        fs::write(at.path().join("b"), "").unwrap();
        let source = Several::new(vec![part(at.path(), &[("a", "x"), ("b", "x")])], "some".into());
        assert!(matches!(source.scan(&ScanOptions::default(), &Silent::default()), Err(Error::Usage(_))));
    }
}
