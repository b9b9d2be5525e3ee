//! What a target knows of its own files: the digests of those that it hashed or received, in `.lockstep/digests`.
//!
//! A digest holds as long as inode, size and times are what they were, the time of change too, which nobody can put back.
//! Every other file that may be what the source has is hashed where it lies instead of being sent: a tree that was filled
//! by other means is adopted, and an edit that kept size and time shows.

use std::io::{ErrorKind, Read as _};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::SystemTime;

use sha2::{Digest as _, Sha256};

use super::{recall, sums};
use crate::manifest::{Digest, Entry, Tree};
use crate::monitor::threads::Threads;
use crate::monitor::{Event, Monitor};
use crate::path::RelPath;
use crate::root::{FileKind, Fingerprint, Follow, Metadata, Root, Seen};
use crate::scan::blocks::LISTED_BYTES;
use crate::scan::cache::{DigestTable, is_dated, is_settled};
use crate::staging::clean_pages;

/// What is hashed between two times that the table is stored: so much is lost when the machine stops.
const BATCH_BYTES: u64 = 64 << 30;
const BUFFER_BYTES: usize = 512 * 1024;

/// How the files of a target are looked at.
pub(super) struct Look<'a> {
    pub(super) root: &'a Root,
    /// What the source has.
    pub(super) source: &'a Tree,
    /// What earlier runs vouch for.
    pub(super) listed: &'a Tree,
    /// What stat said of the target's entries, by their index.
    pub(super) metadata: &'a [Seen],
    /// Believe no digest that was computed before.
    pub(super) hash_all: bool,
    /// Change nothing, not even the table.
    pub(super) dry_run: bool,
    /// How many files are hashed at once.
    pub(super) threads: Threads,
}

/// Gives the files of `target` their digests: what is known, and for those that may be what the source has, by hashing.
/// Answers the indices of those that no earlier run vouches for: their digest says what they are, not that it is right.
pub(super) fn complete(look: &Look<'_>, target: &mut Tree, monitor: &dyn Monitor) -> Vec<usize> {
    find(look, target, monitor);
    let entries = target.entries().iter().enumerate();
    let known = entries.filter_map(|(index, entry)| Some((index, entry, entry.file()?.1?)));
    let vouched = |entry: &Entry, digest: Digest| {
        let listed = look.listed.get(&entry.path);
        listed.is_some_and(|listed| {
            let size = entry.file().map(|(size, _)| size);
            listed.file() == size.map(|size| (size, Some(digest))) && listed.mtime == entry.mtime
        })
    };
    known.filter(|&(_, entry, digest)| !vouched(entry, digest)).map(|(index, ..)| index).collect()
}

fn find(look: &Look<'_>, target: &mut Tree, monitor: &dyn Monitor) {
    let mut table = if look.hash_all { Arc::default() } else { recall::table(look.root) };
    let mut unknown = Vec::new();
    for index in 0..look.metadata.len() {
        let entry = &target.entries()[index];
        let Some((size, _)) = entry.file() else { continue };
        if let Some(digest) = content_of(look, entry, index).and_then(|content| table.get(content)) {
            target.set_digest(index, digest);
        } else if look.source.get(&entry.path).and_then(|entry| entry.file()).is_some_and(|there| there.0 == size) {
            unknown.push((index, size));
        }
    }
    if unknown.is_empty() {
        return;
    }
    let bytes: u64 = unknown.iter().fold(0, |sum, file| sum.saturating_add(file.1));
    let count = unknown.len();
    monitor.event(Event::Detail(&format!(
        "{count} files ({bytes} bytes) lie at the target already, and are hashed there to see whether they are the source's"
    )));
    let mut rest = &unknown[..];
    // What is found out by then is stored; who stopped the run does not use it.
    while !rest.is_empty() && !monitor.stopped() {
        let mut sum = 0_u64;
        let within = rest.iter().take_while(|file| {
            let first = sum == 0;
            sum = sum.saturating_add(file.1);
            first || sum <= BATCH_BYTES
        });
        let (batch, later) = rest.split_at(within.count().max(1));
        rest = later;
        let looked = SystemTime::now();
        for (index, digest) in hash(look, target, batch, monitor) {
            target.set_digest(index, digest);
            let content = content_of(look, &target.entries()[index], index);
            if let Some(content) = content.filter(|content| is_settled(*content, looked)) {
                Arc::make_mut(&mut table).insert(content, digest);
            }
        }
        if !look.dry_run {
            recall::keep_table(look.root, Arc::clone(&table), monitor);
        }
    }
}

/// Which content the scan saw.
fn content_of(look: &Look<'_>, entry: &Entry, index: usize) -> Option<Fingerprint> {
    Some(look.metadata[index].fingerprint(entry.file()?.0, entry.mtime))
}

/// Hashes files by several threads. One that cannot be read, or is not what the scan saw, has no digest.
fn hash(look: &Look<'_>, target: &Tree, files: &[(usize, u64)], monitor: &dyn Monitor) -> Vec<(usize, Digest)> {
    let (next, found) = (AtomicUsize::new(0), Mutex::new(Vec::with_capacity(files.len())));
    std::thread::scope(|scope| {
        for _ in 0..look.threads.count().min(files.len()) {
            scope.spawn(|| {
                let mut buffer = vec![0; BUFFER_BYTES];
                while let Some(&(index, _)) = files.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let entry = &target.entries()[index];
                    let Some(seen) = content_of(look, entry, index) else { continue };
                    if let Some(digest) = hash_one(look.root, &entry.path, seen, &mut buffer, monitor) {
                        found.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push((index, digest));
                    }
                }
            });
        }
    });
    found.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner)
}

fn hash_one(
    root: &Root,
    path: &RelPath,
    seen: Fingerprint,
    buffer: &mut [u8],
    monitor: &dyn Monitor,
) -> Option<Digest> {
    let mut file = root.open_read(path, Follow::Never).ok()?;
    // RACE: another file, even a FIFO, may have got the name since the scan: nothing else is read.
    let found = Metadata::of(&file).ok()?;
    if Fingerprint::from(&found) != seen {
        return None;
    }
    clean_pages(&file, &found);
    let mut hash = Sha256::new();
    loop {
        if monitor.stopped() {
            return None;
        }
        match file.read(buffer) {
            Ok(0) => break,
            Ok(read) => hash.update(&buffer[..read]),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(_) => return None,
        }
    }
    let same = Fingerprint::from(&Metadata::of(&file).ok()?) == seen;
    same.then(|| Digest(hash.finalize().into()))
}

/// The table after a run, as it is put together.
pub(super) struct Files<'a> {
    root: &'a Root,
    table: Arc<DigestTable>,
    /// By their places in the table the files that are to be known; `None` where what is known stays.
    told: Option<Vec<bool>>,
    /// Something that was known is known no more.
    replaced: bool,
    /// The directory that was last looked into.
    beside: Option<(RelPath, Root)>,
}

impl<'a> Files<'a> {
    /// What is told is all that is to be known: what nobody has any more is forgotten.
    pub(super) fn new(root: &'a Root) -> Files<'a> {
        Files { told: Some(Vec::new()), ..Files::amending(root) }
    }

    /// What is known stays, and the files that are looked at are added.
    pub(super) fn amending(root: &'a Root) -> Files<'a> {
        Files { root, table: recall::table(root), told: None, replaced: false, beside: None }
    }

    fn tell(&mut self, content: Fingerprint) {
        if let (Some(told), Some(place)) = (&mut self.told, self.table.place(content)) {
            if told.len() <= place {
                told.resize(self.table.len(), false);
            }
            told[place] = true;
        }
    }

    fn insert(&mut self, content: Fingerprint, digest: Digest) {
        // The same file with other content, or one that got the number of one that is gone.
        self.replaced |= self.table.place(content).is_some() && self.table.get(content) != Some(digest);
        Arc::make_mut(&mut self.table).insert(content, digest);
        self.tell(content);
    }

    /// A file of the target that a run left as it was, as the scan saw it. What this run hashed is in the table already, unless it had
    /// changed a moment before: that says nothing for long.
    pub(super) fn unchanged(&mut self, entry: &Entry, seen: &Seen) {
        let Some((size, Some(digest))) = entry.file() else { return };
        let content = seen.fingerprint(size, entry.mtime);
        if self.table.get(content) == Some(digest) {
            self.tell(content);
        }
    }

    /// A file of the target that a run had nothing to do with: what was known of it is known still.
    pub(super) fn apart(&mut self, entry: &Entry) {
        let Some(found) = self.stat(&entry.path) else { return };
        let known = self.table.get(&found);
        if known.is_some() && entry.file().is_some_and(|(_, listed)| listed == known) {
            self.tell((&found).into());
        }
    }

    /// A file that is published, with which content it had when it had got its permissions.
    pub(super) fn published(&mut self, entry: &Entry, content: Fingerprint) {
        if let Some((_, Some(digest))) = entry.file().filter(|_| is_dated(content)) {
            self.insert(content, digest);
        }
    }

    /// The same, where its inode changed since: it is looked at again.
    pub(super) fn look(&mut self, entry: &Entry) {
        let Some(found) = self.stat(&entry.path) else { return };
        // RACE: who writes to a file right after it was published gives it another time than it is listed with. Only one
        // who puts that time back within the same tick of the clock is not noticed, until the file changes again.
        let size = entry.file().map(|(size, _)| size);
        if found.kind == FileKind::Regular && Some(found.size) == size && found.mtime == entry.mtime {
            self.published(entry, (&found).into());
        }
    }

    /// A file that is there no more.
    pub(super) fn gone(&mut self, entry: &Entry, seen: &Seen) {
        let content = entry.file().map(|(size, _)| seen.fingerprint(size, entry.mtime));
        if let Some(content) = content.filter(|content| self.table.known(*content).is_some()) {
            Arc::make_mut(&mut self.table).remove(content);
            self.replaced = true;
        }
    }

    fn stat(&mut self, path: &RelPath) -> Option<Metadata> {
        let Some(above) = path.parent() else { return self.root.stat(path, Follow::Never).ok() };
        if self.beside.as_ref().is_none_or(|(directory, _)| *directory != above) {
            self.beside = Some((above.clone(), self.root.subroot(&above).ok()?));
        }
        let (_, directory) = self.beside.as_ref()?;
        directory.stat(&RelPath::new(path.name()).ok()?, Follow::Never).ok()
    }

    /// Stores the table; that it could not be makes the next run slower, not wrong.
    pub(super) fn store(mut self, monitor: &dyn Monitor) {
        if let Some(told) = &self.told
            && (0..self.table.len()).any(|place| told.get(place) != Some(&true))
        {
            Arc::make_mut(&mut self.table).keep_only(&|place| told.get(place) == Some(&true));
            self.replaced = true;
        }
        if self.replaced {
            sums::keep_only(self.root, &self.table.digests_of(LISTED_BYTES));
        }
        recall::keep_table(self.root, self.table, monitor);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::filter::{Filter, FilterSpec};
    use crate::monitor::Silent;
    use crate::scan::{ScanRule, scan_seen};

    #[test]
    fn what_had_changed_a_moment_before_it_was_hashed_is_not_kept() {
        let at = tempfile::tempdir().unwrap();
        std::fs::create_dir(at.path().join(".lockstep")).unwrap();
        std::fs::write(at.path().join("f"), "content").unwrap();
        let root = Root::open(at.path()).unwrap();
        let rule = ScanRule::everything(Filter::compile(&FilterSpec::default()).unwrap());
        let mut scanned = scan_seen(&root, &rule, &Silent::default()).unwrap();
        scanned.tree.set_digest(0, Digest([1; 32]));
        let mut files = Files::new(&root);
        files.unchanged(&scanned.tree.entries()[0], &scanned.metadata[0]);
        files.store(&Silent::default());
        assert!(recall::table(&root).is_empty());
    }
}
