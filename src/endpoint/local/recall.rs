//! What this process read or wrote last of a root's manifest and table of digests, so that a small change of a large tree
//! costs what the change does.
//!
//! What always holds: a file of which inode, size and times are what they were says what it said. Both are only ever
//! replaced by a rename, under the lock of the root; whoever else replaces them is noticed and their file is read.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufReader, ErrorKind, Read as _, Seek as _};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use sha2::{Digest as _, Sha256};

use super::target::{MANIFEST, io, rel};
use crate::endpoint::Error;
use crate::endpoint::agent::memory_bytes;
use crate::manifest::format::{self, ReadError};
use crate::manifest::{Digest, Manifest};
use crate::monitor::{Event, Monitor};
use crate::root::{Follow, Metadata, Root};
use crate::scan::cache::DigestTable;
use crate::staging::{DIGESTS, load_digests, store_digests};

const NEW_TABLE: &str = ".lockstep/digests.new";
/// About what an entry takes, in a manifest and in a table together.
const ENTRY_BYTES: u64 = 240;
/// What is kept of all roots together takes no more, nor more than a sixteenth of the machine's memory.
const KEPT_BYTES_MAX: u64 = 144 << 20;

fn kept_bytes_max() -> u64 {
    KEPT_BYTES_MAX.min(memory_bytes() / 16)
}

/// Whether what is known of so many entries is kept at all.
pub(super) fn is_worth_keeping(entries: usize) -> bool {
    entries as u64 * ENTRY_BYTES <= kept_bytes_max()
}

const READ_BYTES: usize = 128 * 1024;

/// A manifest in force and the SHA-256 of its file (zeros where there is none).
pub(super) type InForce = (Arc<Manifest>, Digest);

#[derive(Default)]
struct Kept {
    manifest: Option<(Metadata, InForce)>,
    table: Option<(Metadata, Arc<DigestTable>)>,
    /// When it was used last, counted in uses.
    used: u64,
}

impl Kept {
    fn bytes(&self) -> u64 {
        let listed = self.manifest.as_ref().map_or(0, |(_, (manifest, _))| manifest.tree.entries().len());
        let known = self.table.as_ref().map_or(0, |(_, table)| table.len());
        listed.max(known) as u64 * ENTRY_BYTES
    }
}

#[derive(Default)]
struct Roots {
    /// By device and inode.
    kept: HashMap<(u64, u64), Kept>,
    uses: u64,
}

static ROOTS: Mutex<Option<Roots>> = Mutex::new(None);

fn roots() -> MutexGuard<'static, Option<Roots>> {
    ROOTS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What is kept of `root`, for as long as `look` takes.
fn at<T>(root: &Root, look: impl FnOnce(&mut Kept) -> T) -> Option<T> {
    let found = root.stat_root().ok()?;
    let mut roots = roots();
    let roots = roots.get_or_insert_default();
    roots.uses += 1;
    let kept = roots.kept.entry((found.device, found.inode)).or_default();
    kept.used = roots.uses;
    let seen = look(kept);
    roots.shrink(kept_bytes_max());
    Some(seen)
}

impl Roots {
    /// Forgets what was not used for longest until the rest takes no more than `most` bytes.
    fn shrink(&mut self, most: u64) {
        let mut sum: u64 = self.kept.values().map(Kept::bytes).sum();
        while sum > most
            && let Some(oldest) = self.kept.iter().min_by_key(|(_, kept)| kept.used).map(|(&root, _)| root)
        {
            sum -= self.kept.remove(&oldest).map_or(0, |kept| kept.bytes());
        }
    }
}

fn seen(root: &Root, name: &str) -> Option<Metadata> {
    root.stat(&rel(name).ok()?, Follow::Never).ok()
}

/// The manifest of `root`. One that is damaged is told, and counts as absent.
pub(super) fn manifest(root: &Root, monitor: &dyn Monitor) -> Result<InForce, Error> {
    let now = seen(root, MANIFEST);
    let known = at(root, |kept| {
        let (then, known) = kept.manifest.as_ref()?;
        then.same_content(now.as_ref()?).then(|| known.clone())
    });
    if let Some(known) = known.flatten() {
        return Ok(known);
    }
    let unread = |source| Error::Io {
        operation: "read",
        path: crate::error::shown(&root.shown().join(MANIFEST)).to_string(),
        source,
    };
    let file = match root.open_read(&rel(MANIFEST)?, Follow::Never) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok((Arc::default(), Digest([0; 32]))),
        Err(error) => return Err(io(error)),
    };
    let (manifest, digest) = match format::read(BufReader::with_capacity(READ_BYTES, &file)) {
        Ok((manifest, digest)) => (Arc::new(manifest), digest),
        Err(ReadError::Io(source)) => return Err(unread(source)),
        Err(ReadError::Format(error)) => {
            let digest = digest_of(file).map_err(unread)?;
            let at = crate::error::shown(root.shown());
            monitor.event(Event::Warning(&format!(
                "the manifest of {at} is damaged ({error}); this run writes a new one"
            )));
            return Ok((Arc::default(), digest));
        }
    };
    // RACE: another may have been put in force while this one was read.
    if let Some(now) = now.filter(|now| seen(root, MANIFEST).is_some_and(|after| after.same_content(now))) {
        at(root, |kept| kept.manifest = Some((now, (Arc::clone(&manifest), digest))));
    }
    Ok((manifest, digest))
}

fn digest_of(mut file: File) -> std::io::Result<Digest> {
    let mut hash = Sha256::new();
    file.rewind()?;
    let mut buffer = vec![0; READ_BYTES];
    loop {
        match file.read(&mut buffer) {
            Ok(0) => break,
            Ok(read) => hash.update(&buffer[..read]),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(Digest(hash.finalize().into()))
}

/// Keeps nothing: another manifest was put in force.
pub(super) fn forget_manifest(root: &Root) {
    at(root, |kept| kept.manifest = None);
}

/// Keeps what was put in force. Only whoever holds the lock of the root may say so.
pub(super) fn keep_manifest(root: &Root, manifest: Arc<Manifest>, digest: Digest) {
    let now = seen(root, MANIFEST);
    at(root, |kept| kept.manifest = now.map(|now| (now, (manifest, digest))));
}

/// The table of `root`; empty where there is none.
pub(super) fn table(root: &Root) -> Arc<DigestTable> {
    let now = seen(root, DIGESTS);
    let known = at(root, |kept| {
        let (then, known) = kept.table.as_ref()?;
        then.same_content(now.as_ref()?).then(|| Arc::clone(known))
    });
    if let Some(known) = known.flatten() {
        return known;
    }
    let table = Arc::new(load_digests(root));
    if let Some(now) = now.filter(|now| seen(root, DIGESTS).is_some_and(|after| after.same_content(now))) {
        at(root, |kept| kept.table = Some((now, Arc::clone(&table))));
    }
    table
}

/// Stores the table; that it could not be makes the next run slower, not wrong.
pub(super) fn keep_table(root: &Root, table: Arc<DigestTable>, monitor: &dyn Monitor) {
    if let Err(error) = store_digests(root, &table, NEW_TABLE) {
        let reason = crate::error::chain(&error);
        monitor.event(Event::Detail(&format!("what was hashed is not remembered: {reason}")));
        return;
    }
    let now = seen(root, DIGESTS);
    at(root, |kept| kept.table = now.map(|now| (now, table)));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::monitor::Silent;

    fn manifest_of(generation: u64) -> Manifest {
        Manifest { generation, ..Manifest::default() }
    }

    #[test]
    fn what_is_kept_is_used_until_the_file_is_another() {
        let at = tempfile::tempdir().unwrap();
        std::fs::create_dir(at.path().join(".lockstep")).unwrap();
        let root = Root::open(at.path()).unwrap();
        let generation = || manifest(&root, &Silent::default()).unwrap().0.generation;
        assert_eq!(generation(), 0);
        let file = at.path().join(MANIFEST);
        std::fs::write(&file, format::encode(&manifest_of(3))).unwrap();
        assert_eq!(generation(), 3);
        let known = manifest(&root, &Silent::default()).unwrap();
        assert!(Arc::ptr_eq(&known.0, &manifest(&root, &Silent::default()).unwrap().0), "it is read once");
        // The same size, by a rename as every run does it.
        let next = at.path().join("next");
        std::fs::write(&next, format::encode(&manifest_of(4))).unwrap();
        std::fs::rename(&next, &file).unwrap();
        assert_eq!(generation(), 4);
        std::fs::remove_file(&file).unwrap();
        assert_eq!(generation(), 0);
    }

    #[test]
    fn what_was_used_last_is_kept_when_there_is_too_much() {
        let of_something = Metadata::of(&std::fs::File::open("/").unwrap()).unwrap();
        let mut roots = Roots::default();
        for number in 0..4 {
            let mut table = DigestTable::default();
            (0..10).for_each(|inode| table.insert(&Metadata { inode, ..of_something }, Digest([0; 32])));
            let table = Some((of_something, Arc::new(table)));
            roots.kept.insert((number, 0), Kept { table, used: number, ..Kept::default() });
        }
        roots.shrink(25 * ENTRY_BYTES);
        let mut left: Vec<u64> = roots.kept.keys().map(|root| root.0).collect();
        left.sort_unstable();
        assert_eq!(left, [2, 3]);
    }
}
