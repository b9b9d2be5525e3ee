//! One source for several targets: what all of them get is read, hashed and compressed once.
//!
//! Each run has a [`View`] of its own and goes at its own pace: none waits for another one's target, only ever for one piece of
//! content that another is just reading. What is read is kept for the others as long as all of it together is not more than
//! [`KEPT_BYTES`]; who falls behind that reads from the disk, and still need not hash. Each looks at each file itself, before
//! and after: a file that changed meanwhile fails in every run, as if they had nothing to do with each other. A file that is
//! asked for again is read and hashed anew by that run alone.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use super::delta::Beginning;
use super::local::LocalSource;
use super::{Error, Reader, Scan, ScanOptions, Source};
use crate::manifest::{Digest, Tree};
use crate::monitor::Monitor;
use crate::plan::trail::Stop;
use crate::scan::cache::is_settled;

mod flow;
mod reader;
mod scans;
#[cfg(test)]
mod tests;

use flow::Flows;
use reader::SharedReader;
use scans::Scans;

/// What is kept in memory for those who come later, at most, in bytes. Content counts twice, since what it compresses to is
/// kept beside it.
pub const KEPT_BYTES: usize = 256 << 20;

/// What the runs to so many targets have in common.
#[derive(Clone)]
pub struct SharedSource {
    common: Arc<Common>,
}

struct Common {
    flows: Arc<Flows>,
    scans: Scans,
    targets: usize,
    /// Whoever stores digests.
    storing: Mutex<()>,
}

impl SharedSource {
    /// For so many targets.
    pub fn new(targets: usize) -> SharedSource {
        SharedSource::keeping(targets, KEPT_BYTES)
    }

    fn keeping(targets: usize, bytes: usize) -> SharedSource {
        let flows = Arc::new(Flows::new(bytes));
        let common = Common { flows, scans: Scans::new(targets), targets, storing: Mutex::new(()) };
        SharedSource { common: Arc::new(common) }
    }

    /// The source of one run. What it is to send was finished at `ready`: a scan that began earlier does not do for it.
    pub fn view(&self, source: LocalSource, ready: Instant) -> View {
        View { source, ready, number: self.common.flows.enter(), common: Arc::clone(&self.common) }
    }
}

impl Common {
    /// Where there is one target alone, nothing is shared and nothing is kept.
    fn is_alone(&self) -> bool {
        self.targets < 2
    }
}

/// The source as one run sees it.
pub struct View {
    source: LocalSource,
    ready: Instant,
    number: u64,
    common: Arc<Common>,
}

impl Source for View {
    fn describe(&self) -> String {
        self.source.describe()
    }

    fn scan(&self, options: &ScanOptions, monitor: &dyn Monitor) -> Result<Scan, Error> {
        match self.source.root_identity().filter(|_| !self.common.is_alone()) {
            Some(root) => self.common.scans.scan(&self.source, (root, options), self.ready, monitor),
            None => self.source.scan(options, monitor),
        }
    }

    fn trail(&self) -> Result<Vec<Stop>, Error> {
        self.source.trail()
    }

    fn reader(&self, tree: Arc<Tree>) -> Result<Box<dyn Reader + '_>, Error> {
        match self.common.is_alone() {
            true => self.source.reader(tree),
            false => Ok(Box::new(SharedReader::new(&self.source, tree, Arc::clone(&self.common.flows), self.number))),
        }
    }

    fn begins_with(&self, tree: &Tree, index: u32, beginning: Beginning) -> bool {
        self.source.begins_with(tree, index, beginning)
    }

    fn remember(&self, tree: &Tree, digests: &[(u32, Digest)]) {
        if self.common.is_alone() {
            return self.source.remember(tree, digests);
        }
        self.source.keep_prefixes();
        let looked = self.source.looked();
        let mut known: Vec<_> = looked.known(tree, digests).filter(|(file, _)| is_settled(*file, looked.at)).collect();
        let _turn = self.common.storing.lock().unwrap_or_else(PoisonError::into_inner);
        known.retain(|(file, digest)| !self.common.flows.is_stored(*file, *digest));
        if !known.is_empty() && self.source.keep(known.iter().copied(), looked.at) {
            known.iter().for_each(|(file, digest)| self.common.flows.stored(*file, *digest));
        }
    }
}

impl Drop for View {
    fn drop(&mut self) {
        // Where nobody is left who would take it, only digests are worth keeping.
        if self.common.flows.leave(self.number) {
            self.common.scans.clear();
        }
    }
}
