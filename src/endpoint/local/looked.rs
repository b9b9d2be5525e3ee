//! [`Looked`]: what a scan of a source keeps of what stat said, so that digests can be remembered.

use std::collections::HashSet;
use std::fs::File;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::SystemTime;

use crate::filter::Globs;
use crate::manifest::{Digest, Tree};
use crate::root::{Fingerprint, Metadata, Seen};
use crate::staging::Mapped;

/// What stat said of each entry of a scan, and when that was over.
#[derive(Debug)]
pub(in crate::endpoint) struct Looked {
    pub(in crate::endpoint) metadata: Vec<Seen>,
    pub(in crate::endpoint) at: SystemTime,
    /// What only grows.
    pub(in crate::endpoint) growing: Globs,
    /// Entries of which another inode was read than the scan saw: a directory on the way got another one's name.
    others: Mutex<HashSet<u32>>,
    /// What somebody may write to through a mapping, since the scan was over; looked at when it is first asked for.
    mapped: OnceLock<Mapped>,
}

impl Looked {
    pub(in crate::endpoint) fn new(metadata: Vec<Seen>, at: SystemTime, growing: Globs) -> Looked {
        Looked { metadata, at, growing, others: Mutex::default(), mapped: OnceLock::new() }
    }

    /// Whether nobody had a file mapped after the scan, whose times are what the scan saw: what is written to it since shows in them.
    pub(super) fn rules_out_mapping(&self, file: &File, now: &Metadata) -> bool {
        self.mapped.get_or_init(Mapped::look).rules_out(file, now)
    }

    /// Takes note of which inode of the entry at `index` is read: its digest says nothing of another.
    pub(in crate::endpoint) fn opened(&self, index: u32, now: &Metadata) {
        let seen = self.metadata.get(index as usize);
        if seen.is_some_and(|seen| (seen.device, seen.inode) != (now.device, now.inode)) {
            self.others.lock().unwrap_or_else(PoisonError::into_inner).insert(index);
        }
    }

    /// Digests of entries of the scan, which gave `tree`, with what stat said of each.
    pub(in crate::endpoint) fn known<'a>(
        &'a self,
        tree: &'a Tree,
        digests: &'a [(u32, Digest)],
    ) -> impl Iterator<Item = (Fingerprint, Digest)> + 'a {
        let others = self.others.lock().unwrap_or_else(PoisonError::into_inner).clone();
        digests.iter().filter_map(move |&(index, digest)| {
            if others.contains(&index) {
                return None;
            }
            let (entry, seen) = (tree.entries().get(index as usize)?, self.metadata.get(index as usize)?);
            Some((seen.fingerprint(entry.file()?.0, entry.mtime), digest))
        })
    }
}
