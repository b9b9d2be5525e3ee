//! Lists a tree: what every path is, with the digests that are known without reading.
//!
//! Directories are listed by several threads; a file is never opened, so that a FIFO cannot block and a device cannot be
//! disturbed.

use std::collections::HashMap;
use std::io::Read as _;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};

use crate::filter::{Filter, GLOBS_BYTES_MAX, IGNORE_FILE};
use crate::manifest::{Content, Entry, Tree};
use crate::monitor::threads::Threads;
use crate::monitor::{Counters, Monitor, Problem, Severity};
use crate::path::RelPath;
use crate::root::{FileKind, Follow, Metadata, Root, RootError, Seen};

pub mod blocks;
pub mod cache;
pub mod names;
pub mod prefixes;
pub mod sums;
mod table;

use cache::DigestTable;
use names::Names;

/// What happens to symbolic links.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LinkRule {
    /// Listed when their target stays in the tree, else left out and reported.
    #[default]
    Safe,
    /// Listed.
    All,
    /// Left out and reported.
    Skip,
    /// Reported as failures.
    Refuse,
}

/// How a tree is listed.
#[derive(Debug, Clone)]
pub struct ScanRule {
    /// What to leave out.
    pub filter: Filter,
    /// Symbolic links.
    pub links: LinkRule,
    /// Whether `.lockstepignore` files count.
    pub ignore_files: bool,
    /// Whether FIFOs, sockets and devices are reported as skipped, or left out silently.
    pub report_special: bool,
    /// How many directories are listed at once.
    pub threads: Threads,
}

impl ScanRule {
    /// Everything that the filter lets by, as it lies there: all links, no regard for ignore files, not a word of what is no file.
    pub fn everything(filter: Filter) -> ScanRule {
        let (ignore_files, report_special) = (false, false);
        ScanRule { filter, links: LinkRule::All, ignore_files, report_special, threads: Threads::default() }
    }
}

/// What was found, with what is kept of each stat.
#[derive(Debug, Default)]
pub struct Scanned<M = Metadata> {
    /// The entries.
    pub tree: Tree,
    /// What stat said of each entry, by the same index.
    pub metadata: Vec<M>,
    /// Paths that were left out or could not be read.
    pub problems: Vec<Problem>,
}

impl Scanned<Seen> {
    /// Gives files that have none the digests that are known of them.
    pub fn know(&mut self, known: &DigestTable) {
        for (index, seen) in self.metadata.iter().enumerate() {
            let entry = &self.tree.entries()[index];
            if let Content::File { size, digest: None } = entry.content
                && let Some(digest) = known.get(seen.fingerprint(size, entry.mtime))
            {
                self.tree.set_digest(index, digest);
            }
        }
    }
}

/// A tree that cannot be listed at all.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum ScanError {
    #[error(transparent)]
    Root(#[from] RootError),
    #[error("the tree changed while it was listed, and does not fit together; run again")]
    Changed(#[from] crate::manifest::InvalidTree),
}

struct Directory {
    path: Option<RelPath>,
    filter: Arc<Filter>,
}

struct Queue {
    waiting: Vec<Directory>,
    /// Directories that are waiting or being listed.
    open: usize,
}

struct Shared<'a> {
    root: &'a Root,
    rule: &'a ScanRule,
    monitor: &'a dyn Monitor,
    queue: Mutex<Queue>,
    changed: Condvar,
}

/// Entries that are put together at once. Lists are made of pieces, so that they can be given up one by one as the whole
/// is made of them: of a large tree there is never twice what it takes.
const PIECE: usize = 1024;

/// What lies in a directory, sorted.
struct Listing<M> {
    directory: Option<RelPath>,
    pieces: Vec<Vec<(Entry, M)>>,
}

struct Found<M> {
    listings: Vec<Listing<M>>,
    /// Regular files with further names: device and inode.
    linked: Vec<(RelPath, (u64, u64))>,
    problems: Vec<Problem>,
}

impl<M> Default for Found<M> {
    fn default() -> Found<M> {
        Found { listings: Vec::new(), linked: Vec::new(), problems: Vec::new() }
    }
}

/// Lists everything beneath `root`.
///
/// # Errors
/// [`ScanError`] when the root itself cannot be listed. Other paths become problems.
pub fn scan(root: &Root, rule: &ScanRule, monitor: &dyn Monitor) -> Result<Scanned, ScanError> {
    scan_keeping(root, rule, monitor, |metadata| *metadata)
}

/// The same for a tree of which much else is kept beside it.
///
/// # Errors
/// As [`scan`].
pub fn scan_seen(root: &Root, rule: &ScanRule, monitor: &dyn Monitor) -> Result<Scanned<Seen>, ScanError> {
    scan_keeping(root, rule, monitor, Seen::of)
}

fn scan_keeping<M: Send>(
    root: &Root,
    rule: &ScanRule,
    monitor: &dyn Monitor,
    keep: fn(&Metadata) -> M,
) -> Result<Scanned<M>, ScanError> {
    root.open_dir(None, Follow::Never)?;
    let top = Directory { path: None, filter: Arc::new(rule.filter.clone()) };
    let shared = Shared {
        root,
        rule,
        monitor,
        queue: Mutex::new(Queue { waiting: vec![top], open: 1 }),
        changed: Condvar::new(),
    };
    let threads = rule.threads.count();
    let mut all = Found::default();
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(|| work(&shared, keep))).collect();
        for worker in workers {
            if let Ok(found) = worker.join() {
                all.listings.extend(found.listings);
                all.linked.extend(found.linked);
                all.problems.extend(found.problems);
            }
        }
    });
    all.problems.sort_by(|a, b| a.path.cmp(&b.path));
    let (mut entries, metadata) = put_together(all.listings);
    join_hard_links(&mut entries, all.linked);
    Ok(Scanned { tree: Tree::new(entries)?, metadata, problems: all.problems })
}

/// One list of all: what lies in a directory follows it.
fn put_together<M>(mut listings: Vec<Listing<M>>) -> (Vec<Entry>, Vec<M>) {
    let count = listings.iter().flat_map(|listing| &listing.pieces).map(Vec::len).sum();
    let (mut entries, mut metadata) = (Vec::with_capacity(count), Vec::with_capacity(count));
    // A directory comes before what lies in it, and so do their lists.
    listings.sort_unstable_by(|a, b| a.directory.cmp(&b.directory));
    let mut listings = listings.into_iter().peekable();
    let mut open = Vec::new();
    open.extend(listings.next().map(|top| top.pieces.into_iter().flatten()));
    while let Some(list) = open.last_mut() {
        let Some((entry, kept)) = list.next() else {
            open.pop();
            continue;
        };
        let below = listings.next_if(|listing| entry.is_directory() && listing.directory.as_ref() == Some(&entry.path));
        open.extend(below.map(|listing| listing.pieces.into_iter().flatten()));
        entries.push(entry);
        metadata.push(kept);
    }
    (entries, metadata)
}

fn lock<'a>(shared: &'a Shared<'_>) -> MutexGuard<'a, Queue> {
    shared.queue.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

fn work<M>(shared: &Shared<'_>, keep: fn(&Metadata) -> M) -> Found<M> {
    let mut found = Found::default();
    let mut names = Names::default();
    loop {
        let mut queue = lock(shared);
        let directory = loop {
            if let Some(directory) = queue.waiting.pop() {
                break directory;
            }
            if queue.open == 0 {
                return found;
            }
            queue = shared.changed.wait(queue).unwrap_or_else(std::sync::PoisonError::into_inner);
        };
        drop(queue);
        let mut below = Vec::new();
        if !shared.monitor.stopped()
            && let Err(error) = list(shared, &directory, keep, &mut names, &mut found, &mut below)
        {
            found.problems.push(failed(directory.path.clone(), &error));
        }
        let mut queue = lock(shared);
        queue.open += below.len();
        queue.open -= 1;
        queue.waiting.extend(below);
        drop(queue);
        shared.changed.notify_all();
    }
}

fn failed(path: Option<RelPath>, error: &dyn std::error::Error) -> Problem {
    Problem { path, message: crate::error::chain(error), severity: Severity::Failed }
}

fn list<M>(
    shared: &Shared<'_>,
    directory: &Directory,
    keep: fn(&Metadata) -> M,
    names: &mut Names,
    found: &mut Found<M>,
    below: &mut Vec<Directory>,
) -> Result<(), RootError> {
    let descriptor = shared.root.open_dir(directory.path.as_ref(), Follow::Never)?;
    let mut children = shared.root.names_in(&descriptor, directory.path.as_ref())?;
    children.sort_unstable();
    let mut left = children.len();
    let mut pieces: Vec<Vec<(Entry, M)>> = Vec::new();
    let filter = match own_filter(shared, directory, &children) {
        Ok(filter) => filter,
        // What it is to leave out must not be sent.
        Err(problem) => {
            found.problems.push(problem);
            return Ok(());
        }
    };
    Counters::add(&shared.monitor.counters().scanned_entries, children.len() as u64);
    for name in children {
        left -= 1;
        let path = match &directory.path {
            Some(parent) => parent.join(&name),
            None => RelPath::new(&name),
        };
        let path = match path {
            Ok(path) => path,
            Err(invalid) => {
                found.problems.push(failed(directory.path.clone(), &invalid));
                continue;
            }
        };
        if !filter.may_admit(&path) {
            continue;
        }
        let metadata = match Metadata::at(&descriptor, &name) {
            Ok(metadata) => metadata,
            // RACE: removed since the directory was read; it is not there any more, and that is all there is to say.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            Err(error) => {
                found.problems.push(failed(Some(path), &error));
                continue;
            }
        };
        if !filter.admits(&path, metadata.kind == FileKind::Directory) {
            continue;
        }
        if metadata.kind == FileKind::Directory {
            below.push(Directory { path: Some(path.clone()), filter: Arc::clone(&filter) });
        }
        if let Some(content) = content(shared, &path, &metadata, &mut found.problems) {
            if metadata.links > 1 && metadata.kind == FileKind::Regular {
                found.linked.push((path.clone(), (metadata.device, metadata.inode)));
            }
            let mode = if metadata.kind == FileKind::Symlink { 0o777 } else { metadata.mode };
            let (owner, group) = (names.user(metadata.uid), names.group(metadata.gid));
            let entry = (Entry { path, content, mtime: metadata.mtime, mode, owner, group }, keep(&metadata));
            match pieces.last_mut().filter(|piece| piece.len() < PIECE) {
                Some(piece) => piece.push(entry),
                None => {
                    let mut piece = Vec::with_capacity((left + 1).min(PIECE));
                    piece.push(entry);
                    pieces.push(piece);
                }
            }
        }
    }
    found.listings.push(Listing { directory: directory.path.clone(), pieces });
    Ok(())
}

/// The directory's filter, with its `.lockstepignore` where it has one.
fn own_filter(shared: &Shared<'_>, directory: &Directory, names: &[Vec<u8>]) -> Result<Arc<Filter>, Problem> {
    if !shared.rule.ignore_files {
        return Ok(Arc::clone(&directory.filter));
    }
    with_own_ignore_file(shared.root, directory.path.as_ref(), names, &directory.filter)
}

/// The rules for what lies in a directory that holds these names: those of above, with its `.lockstepignore` where it has one.
///
/// # Errors
/// A file that cannot be read, or whose lines are no globs.
pub(crate) fn with_own_ignore_file(
    root: &Root,
    directory: Option<&RelPath>,
    names: &[Vec<u8>],
    above: &Arc<Filter>,
) -> Result<Arc<Filter>, Problem> {
    if !names.iter().any(|name| name == IGNORE_FILE) {
        return Ok(Arc::clone(above));
    }
    let wrong = |error: &dyn std::error::Error| unusable(directory, &crate::error::chain(error));
    let path = match directory {
        Some(parent) => parent.join(IGNORE_FILE),
        None => RelPath::new(IGNORE_FILE),
    }
    .map_err(|error| wrong(&error))?;
    let file = root.open_read(&path, Follow::Never).map_err(|error| wrong(&error))?;
    if Metadata::of(&file).map_err(|error| wrong(&error))?.kind != FileKind::Regular {
        return Err(unusable(directory, NOT_REGULAR));
    }
    // One byte more than may be: the filter refuses it then.
    let file = file.take(GLOBS_BYTES_MAX as u64 + 1);
    let text = std::io::read_to_string(file).map_err(|error| wrong(&error))?;
    let filter = above.with_ignore_file(directory, &text).map_err(|error| wrong(&error))?;
    Ok(Arc::new(filter))
}

pub(crate) const NOT_REGULAR: &str = "it is no regular file";

/// That the ignore file of a directory cannot be used.
pub(crate) fn unusable(directory: Option<&RelPath>, reason: &str) -> Problem {
    let message = format!("its .lockstepignore cannot be used, so that nothing in this directory takes part: {reason}");
    Problem { path: directory.cloned(), message, severity: Severity::Failed }
}

fn content(shared: &Shared<'_>, path: &RelPath, metadata: &Metadata, problems: &mut Vec<Problem>) -> Option<Content> {
    let mut problem = |message: String, severity| {
        problems.push(Problem { path: Some(path.clone()), message, severity });
        None
    };
    match metadata.kind {
        FileKind::Regular => Some(Content::File { size: metadata.size, digest: None }),
        FileKind::Directory => Some(Content::Directory),
        FileKind::Symlink => {
            let target = match shared.root.read_link(path) {
                Ok(target) => target,
                Err(error) => return problem(crate::error::chain(&error), Severity::Failed),
            };
            let shown = crate::error::Escaped(&target).to_string();
            match shared.rule.links {
                LinkRule::Refuse => problem(format!("is a symbolic link (to '{shown}')"), Severity::Failed),
                LinkRule::Skip => problem(format!("is a symbolic link (to '{shown}')"), Severity::Skipped),
                LinkRule::Safe if !stays_inside(path, &target) => problem(
                    format!("is a symbolic link out of the tree (to '{shown}'); --links=all sends it as it is"),
                    Severity::Skipped,
                ),
                LinkRule::Safe | LinkRule::All => Some(Content::Symlink { target: target.into() }),
            }
        }
        other if shared.rule.report_special => {
            problem(format!("is a {}, which cannot be sent", other.name()), Severity::Skipped)
        }
        _ => None,
    }
}

/// Whether a link leads to something in the tree: the rule of [`RelPath::link_stays_below`].
pub(crate) fn stays_inside(path: &RelPath, target: &[u8]) -> bool {
    path.link_stays_below(target)
}

/// Of files with several names in the tree the first keeps the content, the others become links to it.
fn join_hard_links(entries: &mut [Entry], mut linked: Vec<(RelPath, (u64, u64))>) {
    linked.sort_unstable();
    let mut first_names: HashMap<(u64, u64), RelPath> = HashMap::new();
    for (path, inode) in linked {
        match first_names.entry(inode) {
            std::collections::hash_map::Entry::Vacant(vacant) => {
                vacant.insert(path);
            }
            std::collections::hash_map::Entry::Occupied(first) => {
                if let Ok(at) = entries.binary_search_by(|entry| entry.path.cmp(&path)) {
                    entries[at].content = Content::HardLink { first: first.get().clone() };
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::filter::FilterSpec;
    use crate::monitor::Silent;
    use std::os::unix::fs::symlink;

    fn listed(at: &std::path::Path, rules: &[&str], links: LinkRule) -> Scanned {
        let spec = FilterSpec { rules: rules.iter().map(|&rule| rule.into()).collect(), only: None };
        let filter = Filter::compile(&spec).unwrap();
        let rule = ScanRule { filter, links, ignore_files: true, report_special: true, threads: Threads::default() };
        scan(&Root::open(at).unwrap(), &rule, &Silent::default()).unwrap()
    }

    fn paths(scanned: &Scanned) -> Vec<String> {
        scanned.tree.entries().iter().map(|entry| entry.path.to_string()).collect()
    }

    #[test]
    fn h13_h18_links_out_of_the_tree_and_special_files_are_skipped_and_reported() {
        let directory = tempfile::tempdir().unwrap();
        let at = directory.path();
        std::fs::create_dir_all(at.join("d/e")).unwrap();
        std::fs::write(at.join("d/f"), "x").unwrap();
        for (name, target) in [("in", "d/f"), ("out", "../x"), ("abs", "/etc"), ("d/up", "../in"), ("d/far", "../../x")]
            .into_iter()
            // By its text it stays, but 'd' may be a link by then.
            .chain([("through", "d/../in")])
        {
            symlink(target, at.join(name)).unwrap();
        }
        let mode = rustix::fs::Mode::from_raw_mode(0o600);
        rustix::fs::mknodat(rustix::fs::CWD, at.join("fifo"), rustix::fs::FileType::Fifo, mode, 0).unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(at.join("socket")).unwrap();

        let scanned = listed(at, &[], LinkRule::Safe);
        assert_eq!(paths(&scanned), ["d", "d/e", "d/f", "d/up", "in"]);
        let skipped: Vec<_> =
            scanned.problems.iter().map(|problem| problem.path.clone().unwrap().to_string()).collect();
        assert_eq!(skipped, ["abs", "d/far", "fifo", "out", "socket", "through"]);
        assert!(scanned.problems.iter().all(|problem| problem.severity == Severity::Skipped));
        let refused = listed(at, &[], LinkRule::Refuse);
        assert_eq!(refused.problems.iter().filter(|problem| problem.severity == Severity::Failed).count(), 6);
        assert_eq!(listed(at, &[], LinkRule::All).problems.len(), 2);
    }

    #[test]
    fn filters_ignore_files_hard_links_and_the_state_directory() {
        let directory = tempfile::tempdir().unwrap();
        let at = directory.path();
        for dir in ["sub", ".lockstep", "cache"] {
            std::fs::create_dir(at.join(dir)).unwrap();
            std::fs::write(at.join(dir).join("a.txt"), dir).unwrap();
        }
        std::fs::write(at.join("sub/b.log"), "x").unwrap();
        std::fs::write(at.join("sub/.lockstepignore"), "*.log\n").unwrap();
        std::fs::hard_link(at.join("sub/a.txt"), at.join("z")).unwrap();
        let scanned = listed(at, &["cache/"], LinkRule::Safe);
        assert_eq!(paths(&scanned), ["sub", "sub/.lockstepignore", "sub/a.txt", "z"]);
        let first = RelPath::new("sub/a.txt").unwrap();
        assert_eq!(scanned.tree.entries()[3].content, Content::HardLink { first });
        assert_eq!(scanned.metadata.len(), 4);
    }
}
