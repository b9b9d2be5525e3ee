//! A tree in memory as both sides of a run, for tests: it can be told to fail at any call, and shows what a reader
//! would see at that moment.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use sha2::{Digest as _, Sha256};

use super::{BeginOptions, CommitOptions, Committed, Error, Scan, ScanOptions, Source, Target, Writer};
use crate::manifest::{Content, Digest, Entry, Tree};
use crate::monitor::Monitor;
use crate::path::RelPath;
use crate::plan::publish::{Publication, Step, steps};
use crate::plan::{Change, Compare, Desired, Need, Plan, diff};

mod reader;
mod writer;

/// One path: what it is and, for a regular file, its bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// Digests are left out: the bytes are there.
    pub entry: Entry,
    /// Content of a regular file.
    pub data: Vec<u8>,
}

/// A tree in memory. What is staged outlives a failed run, as it does on a disk.
#[derive(Debug)]
pub struct Memory {
    nodes: Mutex<BTreeMap<RelPath, Node>>,
    /// Content that arrived, whole or in part.
    partial: Mutex<HashMap<RelPath, Vec<u8>>>,
    run: Mutex<Option<Run>>,
    calls_left: AtomicU64,
}

#[derive(Debug)]
struct Run {
    options: BeginOptions,
    source: Arc<Tree>,
    target: Tree,
    plan: Plan,
    staged: HashSet<u32>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn digest(data: &[u8]) -> Digest {
    Digest(Sha256::digest(data).into())
}

fn out_of_order() -> Error {
    Error::Usage("the calls are out of order".into())
}

impl Memory {
    /// A tree of these nodes.
    pub fn new(nodes: impl IntoIterator<Item = Node>) -> Memory {
        let nodes = nodes.into_iter().map(|node| (node.entry.path.clone(), node)).collect();
        Memory {
            nodes: Mutex::new(nodes),
            partial: Mutex::default(),
            run: Mutex::default(),
            calls_left: AtomicU64::new(u64::MAX),
        }
    }

    /// Lets so many calls through; every later one fails as if the connection was lost.
    pub fn fail_after(&self, calls: u64) {
        self.calls_left.store(calls, Ordering::SeqCst);
    }

    /// What a reader sees now.
    pub fn nodes(&self) -> BTreeMap<RelPath, Node> {
        lock(&self.nodes).clone()
    }

    fn call(&self) -> Result<(), Error> {
        let took = |left: u64| (left == u64::MAX).then_some(left).or_else(|| left.checked_sub(1));
        match self.calls_left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, took) {
            Ok(_) => Ok(()),
            Err(_) => Err(Error::Disconnected { host: "memory".into(), source: None }),
        }
    }

    fn tree(&self, with_digests: bool) -> Result<Tree, Error> {
        let entry = |node: &Node| {
            let mut entry = node.entry.clone();
            if let Content::File { digest: known, .. } = &mut entry.content {
                *known = with_digests.then(|| digest(&node.data));
            }
            entry
        };
        Tree::new(lock(&self.nodes).values().map(entry).collect()).map_err(|error| Error::Usage(error.to_string()))
    }
}

impl Source for Memory {
    fn describe(&self) -> String {
        "memory".into()
    }

    fn scan(&self, _: &ScanOptions, _: &dyn Monitor) -> Result<Scan, Error> {
        self.call()?;
        Ok(Scan { tree: self.tree(false)?, problems: Vec::new() })
    }

    fn reader(&self, tree: Arc<Tree>) -> Result<Box<dyn super::Reader + '_>, Error> {
        self.call()?;
        Ok(Box::new(reader::MemoryReader::new(self, tree)))
    }

    fn remember(&self, _: &Tree, _: &[(u32, Digest)]) {}
}

impl Target for Memory {
    fn describe(&self) -> String {
        "memory".into()
    }

    fn begin(&self, options: &BeginOptions, _: &dyn Monitor) -> Result<(), Error> {
        self.call()?;
        *lock(&self.run) = Some(Run {
            options: options.clone(),
            source: Arc::default(),
            target: Tree::default(),
            plan: Plan::default(),
            staged: HashSet::new(),
        });
        Ok(())
    }

    fn diff(&self, source: &Arc<Tree>, _: &dyn Monitor) -> Result<Plan, Error> {
        self.call()?;
        let target = self.tree(true)?;
        let mut run = lock(&self.run);
        let run = run.as_mut().ok_or_else(out_of_order)?;
        let desired = |_: usize, entry: &Entry| Desired {
            mode: entry.mode & 0o777,
            owner: None,
            group: None,
            acl_differs: false,
        };
        let compare = Compare { checksum: run.options.checksum, ..Compare::default() };
        let mut plan = diff(source, &target, &desired, compare);
        let partial = lock(&self.partial);
        for action in &mut plan.actions {
            let entry = &source.entries()[action.index as usize];
            let arrived = partial.get(&entry.path).map_or(0, |data| data.len() as u64);
            if let (Need::Content { resume_at }, Some((size, _))) = (&mut action.need, entry.file()) {
                *resume_at = if arrived <= size { arrived } else { 0 };
            }
        }
        (run.source, run.target, run.plan) = (Arc::clone(source), target, plan.clone());
        Ok(plan)
    }

    fn writer(&self) -> Result<Box<dyn Writer + '_>, Error> {
        self.call()?;
        Ok(Box::new(writer::MemoryWriter::new(self)))
    }

    fn commit(&self, options: &CommitOptions, _: &dyn Monitor) -> Result<Committed, Error> {
        self.call()?;
        let mut run = lock(&self.run).take().ok_or_else(out_of_order)?;
        // Content that was only to be compared and turned out to differ has come.
        let staged = std::mem::take(&mut run.staged);
        for action in run.plan.actions.iter_mut().filter(|action| staged.contains(&action.index)) {
            action.change = if action.change == Change::Added { Change::Added } else { Change::Modified };
        }
        run.staged = staged;
        let failed = |index: u32| {
            let entry = &run.source.entries()[index as usize];
            let lacks = |at: usize| run.source.entries()[at].file().is_some() && options.failed.contains(&(at as u32));
            match &entry.content {
                Content::HardLink { first } => run.source.position(first).is_some_and(lacks),
                _ => options.failed.contains(&index),
            }
        };
        let last = |path: &RelPath| path.components().last() == Some(b"latest".as_slice());
        let publication = Publication {
            source: &run.source,
            target: &run.target,
            plan: &run.plan,
            delete: options.delete,
            failed: &failed,
            last: &last,
            unit: &|_, _| None,
        };
        let steps = steps(&publication);
        for step in &steps {
            self.call()?;
            self.apply(&run, step, &last)?;
        }
        lock(&self.partial).clear();
        Ok(Committed { generation: 1, published: run.plan.actions.len() as u64, ..Committed::default() })
    }

    fn abort(&self) {
        *lock(&self.run) = None;
    }

    fn verification(&self) -> String {
        "SHA-256 in memory".into()
    }
}

impl Memory {
    /// The node that a source's entry becomes.
    fn made(&self, run: &Run, entry: &Entry) -> Node {
        let index = run.source.position(&entry.path).map_or(u32::MAX, |at| at as u32);
        let data = match entry.content {
            Content::File { .. } if run.staged.contains(&index) => {
                lock(&self.partial).get(&entry.path).cloned().unwrap_or_default()
            }
            Content::File { .. } => {
                lock(&self.nodes).get(&entry.path).map(|node| node.data.clone()).unwrap_or_default()
            }
            _ => Vec::new(),
        };
        let mut entry = entry.clone();
        entry.mode &= 0o777;
        if let Content::File { digest, .. } = &mut entry.content {
            *digest = None;
        }
        Node { entry, data }
    }

    fn apply(&self, run: &Run, step: &Step, last: &dyn Fn(&RelPath) -> bool) -> Result<(), Error> {
        let path = step.path();
        let missing = || Error::Usage(format!("'{path}' is not in the source"));
        let below = |above: &RelPath| lock(&self.nodes).keys().any(|path| path.is_within(above) && path != above);
        match step {
            Step::Replace(_) => {
                if lock(&self.nodes).get(path).is_some_and(|node| node.entry.is_directory()) {
                    return Err(Error::Usage(format!("'{path}' is a directory and would be replaced")));
                }
                let node = self.made(run, run.source.get(path).ok_or_else(missing)?);
                lock(&self.nodes).insert(path.clone(), node);
            }
            Step::NewDirectory(_) => {
                let arriving = run.source.entries().iter().filter(|entry| entry.path.is_within(path));
                for entry in arriving.filter(|entry| entry.is_directory() || !last(&entry.path)) {
                    let node = self.made(run, entry);
                    lock(&self.nodes).insert(entry.path.clone(), node);
                }
            }
            Step::Exchange(_) | Step::TakeAway(_) => return Err(Error::Usage("no run asks for units here".into())),
            Step::ApplyMetadata(_) => {
                let entry = run.source.get(path).ok_or_else(missing)?;
                if let Some(node) = lock(&self.nodes).get_mut(path) {
                    (node.entry.mode, node.entry.mtime) = (entry.mode & 0o777, entry.mtime);
                }
            }
            Step::RemoveFile(_) => {
                lock(&self.nodes).remove(path);
            }
            Step::RemoveDirectory(_) => {
                if below(path) {
                    return Err(Error::Usage(format!("'{path}' is removed before what it holds")));
                }
                lock(&self.nodes).remove(path);
            }
        }
        Ok(())
    }
}
