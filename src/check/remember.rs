//! Keeps what was hashed, so that the next check need not hash it again.

use std::time::SystemTime;

use crate::manifest::Digest;
use crate::monitor::{Event, Monitor};
use crate::path::RelPath;
use crate::root::{Metadata, Root};
use crate::scan::cache::is_settled;
use crate::staging::{load_digests, store_digests};

const STATE: &str = ".lockstep";
/// Another than that of a run.
const NEW_TABLE: &str = ".lockstep/digests.checked";

/// What a file was found to be.
pub(super) struct Hashed {
    pub(super) seen: Metadata,
    pub(super) digest: Digest,
    pub(super) blocks: Option<Box<[u32]>>,
    pub(super) looked: SystemTime,
}

/// Whether the state directory of the root is that of the one who checks.
pub(super) fn is_own(root: &Root) -> bool {
    let own = || -> Option<bool> {
        let state = root.subroot(&RelPath::new(STATE).ok()?).ok()?;
        Some(state.stat_root().ok()?.uid == rustix::process::geteuid().as_raw())
    };
    own() == Some(true)
}

/// Adds it to the digest table of a root that lockstep publishes to, where the one who checks is who receives. That it
/// cannot be kept makes the next check slower, not wrong.
pub(super) fn store(root: &Root, hashed: &[Hashed], monitor: &dyn Monitor) {
    let settled: Vec<&Hashed> = hashed.iter().filter(|one| is_settled(&one.seen, one.looked)).collect();
    if settled.is_empty() || !is_own(root) {
        return;
    }
    // RACE: a run that publishes at the same time writes a table of its own, and one of the two gets the name. What the
    // other knew is hashed again: a push is not to wait for a check, nor a check for a push.
    let keep = || -> Result<(), String> {
        let mut table = load_digests(root);
        for one in settled {
            table.insert(&one.seen, one.digest);
            if let Some(blocks) = &one.blocks {
                table.set_blocks(&one.seen, blocks.clone());
            }
        }
        store_digests(root, &table, NEW_TABLE).map_err(|error| crate::error::chain(&error))
    };
    if let Err(reason) = keep() {
        monitor.event(Event::Detail(&format!("what was hashed is not remembered: {reason}")));
    }
}
