//! A source of which a part is left out once it was listed: what is not finished there.
//!
//! What always holds: what is left out is neither listed nor read, and of all else nothing is listed twice.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use crate::endpoint::delta::{Alike, Beginning, Wanted};
use crate::endpoint::{Crew, Error, Fetch, Produced, Reader, Scan, ScanOptions, Source};
use crate::manifest::{Content, Digest, Entry, Tree};
use crate::monitor::{Monitor, Problem};
use crate::path::RelPath;
use crate::plan::trail::Stop;

/// The largest file that is read for what it says.
pub const SMALL_BYTES: u64 = 4096;

/// A source that was listed.
pub struct Listed {
    source: Box<dyn Source>,
    tree: Arc<Tree>,
    problems: Vec<Problem>,
}

impl Listed {
    /// Lists a source.
    ///
    /// # Errors
    /// As [`Source::scan`].
    pub fn new(source: Box<dyn Source>, options: &ScanOptions, monitor: &dyn Monitor) -> Result<Listed, Error> {
        let scan = source.scan(options, monitor)?;
        Ok(Listed { source, tree: Arc::new(scan.tree), problems: scan.problems })
    }

    /// What it has.
    pub fn tree(&self) -> &Tree {
        &self.tree
    }

    /// What a small file says: a pointer. `None` where it is none, or cannot be read as it was listed.
    ///
    /// # Errors
    /// When the connection ends.
    pub fn read(&self, path: &RelPath) -> Result<Option<Vec<u8>>, Error> {
        let Some(position) = self.tree.position(path) else { return Ok(None) };
        if self.tree.entries()[position].file().is_none_or(|(size, _)| size > SMALL_BYTES) {
            return Ok(None);
        }
        let mut reader = self.source.reader(Arc::clone(&self.tree))?;
        reader.push(Fetch::of(position as u32));
        let mut content = None;
        while let Some(produced) = reader.next()? {
            match produced {
                Produced::Whole { block, .. } => content = Some(block.data().to_vec()),
                Produced::Data { block, .. } => content.get_or_insert_default().extend_from_slice(block.data()),
                Produced::Failed { .. } => return Ok(None),
                _ => {}
            }
        }
        Ok(content)
    }

    /// Leaves out what lies at these paths or below them, and further names of files that do.
    pub fn without(self, held: &BTreeSet<RelPath>) -> Picked {
        let within = |path: &RelPath| held.contains(path) || path.ancestors().any(|above| held.contains(&above));
        let left_out = |entry: &Entry| {
            within(&entry.path) || matches!(&entry.content, Content::HardLink { first } if within(first))
        };
        let entries = self.tree.entries().iter().enumerate().filter(|(_, entry)| !left_out(entry));
        let (positions, kept): (Vec<u32>, Vec<Entry>) =
            entries.map(|(position, entry)| (position as u32, entry.clone())).unzip();
        // A part of a tree, with its directories, is a tree; a hard link goes with its first name.
        let kept = Tree::new(kept).unwrap_or_default();
        Picked { listed: self, kept, positions }
    }
}

/// The part that is not left out.
pub struct Picked {
    listed: Listed,
    kept: Tree,
    /// For each entry that is kept where it stands in what was listed.
    positions: Vec<u32>,
}

impl Source for Picked {
    fn describe(&self) -> String {
        self.listed.source.describe()
    }

    fn scan(&self, _: &ScanOptions, _: &dyn Monitor) -> Result<Scan, Error> {
        let problem = |problem: &Problem| Problem {
            path: problem.path.clone(),
            message: problem.message.clone(),
            severity: problem.severity,
        };
        Ok(Scan { tree: self.kept.clone(), problems: self.listed.problems.iter().map(problem).collect() })
    }

    fn reader(&self, _: Arc<Tree>) -> Result<Box<dyn Reader + '_>, Error> {
        let inner = self.listed.source.reader(Arc::clone(&self.listed.tree))?;
        Ok(Box::new(PickedReader { inner, positions: &self.positions }))
    }

    fn remember(&self, _: &Tree, digests: &[(u32, Digest)]) {
        let position = |index: u32| self.positions.get(index as usize).copied();
        let digests: Vec<_> = digests.iter().filter_map(|&(at, digest)| Some((position(at)?, digest))).collect();
        self.listed.source.remember(&self.listed.tree, &digests);
    }

    fn begins_with(&self, _: &Tree, index: u32, beginning: Beginning) -> bool {
        let Listed { source, tree, .. } = &self.listed;
        self.positions.get(index as usize).is_some_and(|&position| source.begins_with(tree, position, beginning))
    }

    fn wire_bytes(&self) -> u64 {
        self.listed.source.wire_bytes()
    }

    fn crew(&self) -> Crew {
        self.listed.source.crew()
    }

    fn is_far(&self) -> bool {
        self.listed.source.is_far()
    }

    fn compares(&self) -> bool {
        self.listed.source.compares()
    }

    fn compare(&self, index: u32, over: &AtomicBool, ask: &mut dyn FnMut(Wanted) -> Option<Alike>) {
        if let Some(&position) = self.positions.get(index as usize) {
            self.listed.source.compare(position, over, ask);
        }
    }

    fn expect(&self, bytes: u64, files: usize) {
        self.listed.source.expect(bytes, files);
    }

    fn remark(&self, monitor: &dyn Monitor) {
        self.listed.source.remark(monitor);
    }

    fn trail(&self) -> Result<Vec<Stop>, Error> {
        self.listed.source.trail()
    }
}

struct PickedReader<'a> {
    inner: Box<dyn Reader + 'a>,
    positions: &'a [u32],
}

impl PickedReader<'_> {
    /// The index of what is kept, of a position in what was listed: both ascend.
    fn index(&self, position: u32) -> u32 {
        // Only what was pushed comes back, so that it is always there.
        self.positions.binary_search(&position).map_or(u32::MAX, |index| index as u32)
    }
}

impl Reader for PickedReader<'_> {
    fn wants_more(&self) -> bool {
        self.inner.wants_more()
    }

    fn push(&mut self, fetch: Fetch) {
        let position = self.positions.get(fetch.index as usize).copied().unwrap_or(u32::MAX);
        self.inner.push(Fetch { index: position, ..fetch });
    }

    fn next(&mut self) -> Result<Option<Produced>, Error> {
        let Some(mut produced) = self.inner.next()? else { return Ok(None) };
        match &mut produced {
            Produced::Whole { index, .. }
            | Produced::Data { index, .. }
            | Produced::Hole { index, .. }
            | Produced::Copy { index, .. }
            | Produced::End { index, .. }
            | Produced::Same { index, .. }
            | Produced::Failed { index, .. } => *index = self.index(*index),
        }
        Ok(Some(produced))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::endpoint::local::LocalSource;
    use crate::monitor::Silent;

    #[test]
    fn what_is_left_out_is_not_listed_and_what_stays_is_read_under_its_own_index() {
        let at = tempfile::tempdir().unwrap();
        let write = |path: &str| {
            let path = at.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(&path, path.file_name().unwrap().as_encoded_bytes()).unwrap();
        };
        ["a/first", "a/second", "b/third", "c", "pointer"].into_iter().for_each(write);
        std::fs::hard_link(at.path().join("a/first"), at.path().join("d")).unwrap();
        let source = Box::new(LocalSource::new(at.path(), None).unwrap());
        let listed = Listed::new(source, &ScanOptions::default(), &Silent::default()).unwrap();
        assert_eq!(listed.read(&RelPath::new("pointer").unwrap()).unwrap().as_deref(), Some(&b"pointer"[..]));
        assert_eq!(listed.read(&RelPath::new("a").unwrap()).unwrap(), None);
        let picked = listed.without(&BTreeSet::from([RelPath::new("a").unwrap()]));
        let tree = Arc::new(picked.scan(&ScanOptions::default(), &Silent::default()).unwrap().tree);
        let names: Vec<String> = tree.entries().iter().map(|entry| entry.path.to_string()).collect();
        assert_eq!(names, ["b", "b/third", "c", "pointer"]);
        let mut reader = picked.reader(Arc::clone(&tree)).unwrap();
        [1, 2].into_iter().for_each(|index| reader.push(Fetch::of(index)));
        let mut read = Vec::new();
        while let Some(Produced::Whole { index, block, .. }) = reader.next().unwrap() {
            read.push((index, block.data().to_vec()));
        }
        assert_eq!(read, [(1, b"third".to_vec()), (2, b"c".to_vec())]);
    }
}
