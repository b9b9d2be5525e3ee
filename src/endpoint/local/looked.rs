//! [`Looked`]: what a scan of a source keeps of what stat said, so that digests can be remembered.

use std::time::SystemTime;

use crate::filter::Globs;
use crate::manifest::{Digest, Tree};
use crate::root::{Fingerprint, Seen};

/// What stat said of each entry of a scan, and when that was over.
#[derive(Debug)]
pub(in crate::endpoint) struct Looked {
    pub(in crate::endpoint) metadata: Vec<Seen>,
    pub(in crate::endpoint) at: SystemTime,
    /// What only grows.
    pub(in crate::endpoint) growing: Globs,
}

impl Looked {
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
