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
use crate::root::{FileKind, Follow, Metadata, Root, RootError};

pub mod blocks;
pub mod cache;
pub mod names;

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

/// What was found.
#[derive(Debug, Default)]
pub struct Scanned {
    /// The entries.
    pub tree: Tree,
    /// What stat said of each entry, by the same index.
    pub metadata: Vec<Metadata>,
    /// Paths that were left out or could not be read.
    pub problems: Vec<Problem>,
}

impl Scanned {
    /// Gives files the digests that are known of them.
    pub fn know(&mut self, known: &DigestTable) {
        for (index, metadata) in self.metadata.iter().enumerate() {
            if let Some(digest) = known.get(metadata) {
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

#[derive(Default)]
struct Found {
    entries: Vec<(Entry, Metadata)>,
    problems: Vec<Problem>,
}

/// Lists everything beneath `root`.
///
/// # Errors
/// [`ScanError`] when the root itself cannot be listed. Other paths become problems.
pub fn scan(root: &Root, rule: &ScanRule, monitor: &dyn Monitor) -> Result<Scanned, ScanError> {
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
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(|| work(&shared))).collect();
        for worker in workers {
            if let Ok(found) = worker.join() {
                all.entries.extend(found.entries);
                all.problems.extend(found.problems);
            }
        }
    });
    all.entries.sort_unstable_by(|a, b| a.0.path.cmp(&b.0.path));
    all.problems.sort_by(|a, b| a.path.cmp(&b.path));
    join_hard_links(&mut all.entries);
    let (entries, metadata) = all.entries.into_iter().unzip();
    Ok(Scanned { tree: Tree::new(entries)?, metadata, problems: all.problems })
}

fn lock<'a>(shared: &'a Shared<'_>) -> MutexGuard<'a, Queue> {
    shared.queue.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

fn work(shared: &Shared<'_>) -> Found {
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
            && let Err(error) = list(shared, &directory, &mut names, &mut found, &mut below)
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

fn list(
    shared: &Shared<'_>,
    directory: &Directory,
    names: &mut Names,
    found: &mut Found,
    below: &mut Vec<Directory>,
) -> Result<(), RootError> {
    let descriptor = shared.root.open_dir(directory.path.as_ref(), Follow::Never)?;
    let children = shared.root.names_in(&descriptor, directory.path.as_ref())?;
    let filter = match own_filter(shared, directory, &children) {
        Ok(filter) => filter,
        Err(problem) => {
            found.problems.push(problem);
            Arc::clone(&directory.filter)
        }
    };
    Counters::add(&shared.monitor.counters().scanned_entries, children.len() as u64);
    for name in children {
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
        if let Some(content) = content(shared, &path, &metadata, found) {
            let mode = if metadata.kind == FileKind::Symlink { 0o777 } else { metadata.mode };
            let (owner, group) = (names.user(metadata.uid), names.group(metadata.gid));
            found.entries.push((Entry { path, content, mtime: metadata.mtime, mode, owner, group }, metadata));
        }
    }
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
    let path = match directory {
        Some(parent) => parent.join(IGNORE_FILE),
        None => RelPath::new(IGNORE_FILE),
    }
    .map_err(|error| failed(directory.cloned(), &error))?;
    let wrong = |error: &dyn std::error::Error| failed(Some(path.clone()), error);
    let file = root.open_read(&path, Follow::Never).map_err(|error| wrong(&error))?;
    let regular = Metadata::of(&file).map_err(|error| wrong(&error))?.kind == FileKind::Regular;
    // One byte more than may be: the filter refuses it then.
    let file = file.take(GLOBS_BYTES_MAX as u64 + 1);
    let text = if regular { std::io::read_to_string(file).map_err(|error| wrong(&error))? } else { String::new() };
    let filter = above.with_ignore_file(directory, &text).map_err(|error| wrong(&error))?;
    Ok(Arc::new(filter))
}

fn content(shared: &Shared<'_>, path: &RelPath, metadata: &Metadata, found: &mut Found) -> Option<Content> {
    let mut problem = |message: String, severity| {
        found.problems.push(Problem { path: Some(path.clone()), message, severity });
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
fn join_hard_links(entries: &mut [(Entry, Metadata)]) {
    let mut first_names: HashMap<(u64, u64), RelPath> = HashMap::new();
    for (entry, metadata) in entries {
        if metadata.links < 2 || metadata.kind != FileKind::Regular {
            continue;
        }
        match first_names.entry((metadata.device, metadata.inode)) {
            std::collections::hash_map::Entry::Vacant(vacant) => {
                vacant.insert(entry.path.clone());
            }
            std::collections::hash_map::Entry::Occupied(first) => {
                entry.content = Content::HardLink { first: first.get().clone() };
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
