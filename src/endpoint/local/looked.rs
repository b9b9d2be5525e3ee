//! [`Looked`]: what a scan of a source keeps of what stat said, so that digests can be remembered.

use std::time::SystemTime;

use crate::filter::Filter;
use crate::manifest::{Digest, Tree};
use crate::path::RelPath;
use crate::root::{Fingerprint, Seen};

/// What stat said of each entry of a scan, and when that was over.
#[derive(Debug)]
pub(in crate::endpoint) struct Looked {
    pub(in crate::endpoint) metadata: Vec<Seen>,
    pub(in crate::endpoint) at: SystemTime,
    /// Does not admit what only grows; `None` where nothing does.
    pub(in crate::endpoint) but_growing: Option<Filter>,
}

impl Looked {
    /// Whether the file at `path` only grows.
    pub(in crate::endpoint) fn grows(&self, path: &RelPath) -> bool {
        self.but_growing.as_ref().is_some_and(|others| !others.admits(path, false))
    }

    /// Digests of entries of the scan, which gave `tree`, with what stat said of each.
    pub(in crate::endpoint) fn known<'a>(
        &'a self,
        tree: &'a Tree,
        digests: &'a [(u32, Digest)],
    ) -> impl Iterator<Item = (Fingerprint, Digest)> + 'a {
        digests.iter().filter_map(|&(index, digest)| {
            let (entry, seen) = (tree.entries().get(index as usize)?, self.metadata.get(index as usize)?);
            Some((seen.fingerprint(entry.file()?.0, entry.mtime), digest))
        })
    }
}
