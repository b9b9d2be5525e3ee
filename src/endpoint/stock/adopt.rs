//! Digests of what lies at the target and is not vouched for: it is hashed there rather than sent again.

use crossbeam_channel::unbounded;

use super::below;
use super::prove::{Proven, Unproven, prove};
use super::target::Run;
use crate::endpoint::Error;
use crate::manifest::{Content, Entry, Tree};

/// Files of one batch, and their bytes.
const FILES: usize = 512;
const BYTES: u64 = 1 << 30;

/// Hashes files of `target` that may be what the source has: those of the same size without a digest, and with
/// `--checksum` all of the same size. Without a command a file is read back only for `--checksum`: to send it is not
/// more.
///
/// # Errors
/// When the connection ends.
pub(super) fn adopt(run: &Run, source: &Tree, target: &mut Tree) -> Result<(), Error> {
    let checksum = run.options.checksum;
    if !checksum && !run.has_shell {
        return Ok(());
    }
    let mut batches: Vec<Vec<Unproven>> = Vec::new();
    let mut bytes = BYTES;
    for (index, entry) in target.entries().iter().enumerate() {
        let Some((size, digest)) = entry.file() else { continue };
        let theirs = source.get(&entry.path).and_then(Entry::file);
        if theirs.is_none_or(|(wanted, _)| wanted != size) || (digest.is_some() && !checksum) {
            continue;
        }
        if bytes >= BYTES || batches.last().is_none_or(|batch| batch.len() >= FILES) {
            batches.push(Vec::new());
            bytes = 0;
        }
        bytes += size;
        let file = Unproven { id: index as u64, path: below(&run.root, &entry.path), size, grant: None };
        if let Some(batch) = batches.last_mut() {
            batch.push(file);
        }
    }
    let mut entries = std::mem::take(target).into_entries();
    for (index, found) in hash(run, batches)? {
        if let Some(Entry { content: Content::File { digest, .. }, .. }) = entries.get_mut(index as usize) {
            // What cannot be hashed is sent.
            *digest = found.ok().map(|found| found.digest);
        }
    }
    *target = Tree::new(entries).map_err(|error| Error::Usage(error.to_string()))?;
    Ok(())
}

/// Hashes files that lie there, by a command or by reading them back.
///
/// # Errors
/// When the connection ends.
pub(super) fn hash(run: &Run, batches: Vec<Vec<Unproven>>) -> Result<Proven, Error> {
    let mut all = Proven::new();
    if run.provers.is_empty() {
        // A dry run starts no threads.
        let mut shell = run.shell();
        for batch in batches {
            all.extend(prove(&mut shell, &|| run.lanes.spread(0), batch)?);
        }
        return Ok(all);
    }
    let (sender, receiver) = unbounded();
    let count = batches.len();
    for batch in batches {
        run.provers.submit(batch, &sender);
    }
    for _ in 0..count {
        let lost = |_| run.session.client.protocol("the thread that proves has ended");
        all.extend(receiver.recv().map_err(lost)??);
    }
    Ok(all)
}
