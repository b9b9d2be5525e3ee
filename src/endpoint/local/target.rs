//! A directory of this machine as a target: compared, staged into, published to.
//!
//! Everything is staged beneath `.lockstep/staging/current` of the root. A root that is not there yet is made under a
//! hidden name beside its own and gets its name in the last step, so that a new tree appears whole.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use super::commit;
use super::writer::LocalWriter;
use crate::endpoint::{BeginOptions, CommitOptions, Committed, Error, Target, Writer};
use crate::filter::{Filter, FilterSpec};
use crate::manifest::{Content, Digest, Entry, Manifest, Tree};
use crate::monitor::{Event, Monitor};
use crate::path::RelPath;
use crate::plan::{Change, Compare, Desired, Need, Plan, diff};
use crate::policy::{Policy, PolicySpec, merge};
use crate::root::{Follow, Root, RootError};
use crate::scan::names::Names;
use crate::scan::{self, LinkRule, ScanRule};
use crate::staging::{Ids, Journal, LockError, Permissions, RootLock, StageError};

pub(super) const STATE: &str = ".lockstep";
pub(super) const MANIFEST: &str = ".lockstep/manifest";
pub(super) const STAGING: &str = ".lockstep/staging/current";
/// Names that are published last and removed first wherever they occur.
pub(in crate::endpoint) const POINTERS: [&str; 5] =
    ["latest", "latest_checkpointed_iteration.txt", "_SUCCESS", ".metadata", "*.index.json"];

/// A directory of this machine as a target.
pub struct LocalTarget {
    path: PathBuf,
    policy: PolicySpec,
    run: Mutex<Option<Arc<Run>>>,
}

/// One run, from `begin` to `commit` or `abort`.
pub(super) struct Run {
    pub(super) root: Root,
    /// The final path, while the root lies under its hidden name.
    pub(super) rename_to: Option<PathBuf>,
    pub(super) staging: Option<Root>,
    pub(super) options: BeginOptions,
    policy: Policy,
    ids: Ids,
    pub(super) last: Filter,
    state: Mutex<State>,
    _lock: Option<RootLock>,
}

#[derive(Default)]
pub(super) struct State {
    pub(super) source: Arc<Tree>,
    pub(super) target: Tree,
    pub(super) plan: Plan,
    pub(super) old_manifest: Manifest,
    /// SHA-256 of the old manifest's file.
    pub(super) old_digest: Digest,
    /// Files whose content is staged and proven.
    pub(super) staged: HashMap<u32, Digest>,
    /// Files whose content was found at the target.
    pub(super) kept: HashMap<u32, Digest>,
    /// The disk is full: staging is given up.
    pub(super) full: bool,
}

pub(super) fn io(error: RootError) -> Error {
    Error::Io { operation: error.operation, path: error.path.display().to_string(), source: error.source }
}

pub(super) fn rel(path: &str) -> Result<RelPath, Error> {
    RelPath::new(path).map_err(|error| Error::Usage(error.to_string()))
}

impl LocalTarget {
    /// The directory at `path`, which need not be there yet. `policy` is the receiver's: it wins over a sender's.
    pub fn new(path: &Path, policy: PolicySpec) -> LocalTarget {
        LocalTarget { path: path.to_owned(), policy, run: Mutex::new(None) }
    }

    fn run(&self) -> Result<Arc<Run>, Error> {
        let run = self.run.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        run.clone().ok_or_else(|| Error::Usage("no run has begun at this target".into()))
    }

    fn io_error(&self, operation: &'static str, source: std::io::Error) -> Error {
        Error::Io { operation, path: self.path.display().to_string(), source }
    }

    /// Opens the root, or the hidden one that will be it.
    fn open_root(&self, dry_run: bool) -> Result<Option<(Root, Option<PathBuf>)>, Error> {
        match std::fs::metadata(&self.path) {
            Ok(_) => return Ok(Some((Root::open(&self.path).map_err(io)?, None))),
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(self.io_error("look at", error));
            }
            Err(_) if dry_run => return Ok(None),
            Err(_) => {}
        }
        let (Some(parent), Some(name)) = (self.path.parent(), self.path.file_name()) else {
            return Err(Error::Usage(format!("'{}' cannot be a target", self.path.display())));
        };
        let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
        std::fs::create_dir_all(parent).map_err(|error| self.io_error("make the directory above", error))?;
        let mut hidden = std::ffi::OsString::from(".");
        hidden.push(name);
        hidden.push(".lockstep");
        let hidden = parent.join(hidden);
        let mode = rustix::fs::Mode::from_raw_mode(0o700);
        match rustix::fs::mkdir(&hidden, mode) {
            Ok(()) | Err(rustix::io::Errno::EXIST) => {}
            Err(errno) => return Err(self.io_error("make the directory", errno.into())),
        }
        Ok(Some((Root::open(&hidden).map_err(io)?, Some(self.path.clone()))))
    }
}

impl Target for LocalTarget {
    fn describe(&self) -> String {
        crate::error::Escaped(self.path.as_os_str().as_encoded_bytes()).to_string()
    }

    fn begin(&self, options: &BeginOptions, monitor: &dyn Monitor) -> Result<(), Error> {
        let usage = |error: &dyn std::error::Error| Error::Usage(crate::error::chain(error));
        let policy = Policy::compile(&merge(&self.policy, &options.policy)).map_err(|error| usage(&error))?;
        let rules = POINTERS.iter().map(|&name| name.to_owned()).chain(options.last.iter().cloned()).collect();
        let last = Filter::compile(&FilterSpec { rules, only: None }).map_err(|error| usage(&error))?;
        let Some((root, rename_to)) = self.open_root(options.dry_run)? else {
            // A dry run on nothing: compared with an empty directory that is never written to.
            *self.run.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = None;
            return Ok(());
        };
        let mut lock = None;
        let mut staging = None;
        if !options.dry_run {
            let taken = RootLock::take(&root, &options.actor, Duration::from_secs(options.wait_seconds));
            lock = Some(taken.map_err(|error| match error {
                LockError::Held { holder } => Error::Locked { root: self.describe(), holder },
                LockError::Root(error) => io(error),
                other => Error::Usage(crate::error::chain(&other)),
            })?);
            let path = rel(STAGING)?;
            if commit::recover(&root)? {
                monitor.event(Event::Warning(&format!(
                    "{}: an earlier run was interrupted while it published; it was finished first",
                    self.describe()
                )));
            }
            root.mkdir_all(&path.join("tree").map_err(|error| usage(&error))?, 0o700).map_err(io)?;
            staging = Some(root.subroot(&path).map_err(io)?);
        }
        let run = Run {
            root,
            rename_to,
            staging,
            options: options.clone(),
            policy,
            ids: Ids::default(),
            last,
            state: Mutex::default(),
            _lock: lock,
        };
        *self.run.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(Arc::new(run));
        Ok(())
    }

    fn diff(&self, source: &Arc<Tree>, monitor: &dyn Monitor) -> Result<Plan, Error> {
        match self.run() {
            Ok(run) => run.diff(source, monitor),
            Err(_) => {
                let desired = |_: usize, entry: &Entry| Desired { mode: entry.mode & 0o777, owner: None, group: None };
                Ok(diff(source, &Tree::default(), &desired, Compare::default()))
            }
        }
    }

    fn writer(&self) -> Result<Box<dyn Writer + '_>, Error> {
        Ok(Box::new(LocalWriter::new(self.run()?)))
    }

    fn commit(&self, options: &CommitOptions, monitor: &dyn Monitor) -> Result<Committed, Error> {
        let run = self.run()?;
        let committed = commit::commit(&run, options, monitor)?;
        *self.run.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = None;
        Ok(committed)
    }

    fn abort(&self) {
        let run = self.run.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
        if let Some(run) = run
            && run.state().full
            && let Ok(path) = rel(STAGING)
        {
            // What is staged would only keep the disk full.
            let _ = run.root.remove_tree(&path);
        }
    }

    fn verification(&self) -> String {
        "SHA-256 of what was written".into()
    }
}

impl Run {
    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Where the content of a path is staged. Pointers lie apart: they are published by themselves.
    pub(super) fn staged_path(&self, path: &RelPath) -> Result<RelPath, Error> {
        let tree: &[u8] = if self.is_last(path) { b"last/" } else { b"tree/" };
        let staged = RelPath::new([tree, path.as_bytes()].concat());
        staged.map_err(|error| Error::Refused { by: "the staging directory".into(), reason: error.to_string() })
    }

    pub(super) fn is_last(&self, path: &RelPath) -> bool {
        !self.last.admits(path, false)
    }

    /// The permissions that an entry gets.
    pub(super) fn permissions(&self, entry: &Entry) -> Result<Permissions, Error> {
        let decision = self.policy.decide(&entry.path, entry.is_directory(), entry.mode);
        let refused = |error: &dyn std::error::Error| Error::Refused {
            by: "the policy".into(),
            reason: format!("{}: {error}", entry.path),
        };
        let uid = decision.owner.map(|name| self.ids.user(&name)).transpose().map_err(|error| refused(&error))?;
        let gid = decision.group.map(|name| self.ids.group(&name)).transpose().map_err(|error| refused(&error))?;
        Ok(Permissions { mode: decision.mode, uid, gid, acl: None, mtime: entry.mtime })
    }

    fn diff(&self, source: &Arc<Tree>, monitor: &dyn Monitor) -> Result<Plan, Error> {
        for entry in source.entries() {
            if entry.path.components().next() == Some(STATE.as_bytes()) {
                let reason = format!("'{}' lies in the directory that lockstep keeps for itself", entry.path);
                return Err(Error::Refused { by: "the receiver".into(), reason });
            }
        }
        let filter =
            Filter::compile(&self.options.filter).map_err(|error| Error::Usage(crate::error::chain(&error)))?;
        let rule = ScanRule { filter, links: LinkRule::All, ignore_files: true, report_special: false };
        let scanned = scan::scan(&self.root, &rule, None, monitor).map_err(|error| match error {
            scan::ScanError::Root(error) => io(error),
            other => Error::Refused { by: "the receiver".into(), reason: crate::error::chain(&other) },
        })?;
        for problem in &scanned.problems {
            monitor.event(Event::Problem(problem));
        }
        let mut target = scanned.tree;
        let (old_manifest, old_digest) = commit::read_manifest(&self.root, monitor)?;
        let known: Vec<(usize, Digest)> = target
            .entries()
            .iter()
            .enumerate()
            .filter_map(|(index, entry)| Some((index, known_digest(entry, old_manifest.tree.get(&entry.path)?)?)))
            .collect();
        for (index, digest) in known {
            target.set_digest(index, digest);
        }
        let mut names = Names::default();
        let mut wanted = Vec::with_capacity(source.entries().len());
        for entry in source.entries() {
            let permissions = self.permissions(entry)?;
            wanted.push(Desired {
                mode: permissions.mode,
                owner: permissions.uid.map(|uid| names.user(uid)),
                group: permissions.gid.map(|gid| names.group(gid)),
            });
        }
        let compare = Compare { checksum: self.options.checksum, ..Compare::default() };
        let mut plan = diff(source, &target, &|index, _| wanted[index].clone(), compare);
        if let Some(staging) = &self.staging {
            self.prepare(staging, source, &mut plan)?;
        }
        let mut state = self.state();
        *state = State {
            source: Arc::clone(source),
            target,
            plan: plan.clone(),
            old_manifest,
            old_digest,
            ..State::default()
        };
        Ok(plan)
    }

    /// Finds what an earlier run left to go on with, drops the rest, and makes the staging directories.
    fn prepare(&self, staging: &Root, source: &Tree, plan: &mut Plan) -> Result<(), Error> {
        let stage_error = |error: StageError| stage_failure(&error, staging);
        let before = Journal::load(staging).map_err(stage_error)?;
        let mut files = Vec::new();
        let mut directories: Vec<RelPath> = Vec::new();
        let mut resumed: HashSet<RelPath> = HashSet::new();
        for action in &mut plan.actions {
            let entry = &source.entries()[action.index as usize];
            if let Content::File { size, .. } = entry.content
                && action.need != Need::Nothing
            {
                if let Need::Content { resume_at } = &mut action.need {
                    *resume_at = before.resume_at(staging, &entry.path, size, entry.mtime);
                    if *resume_at > 0 {
                        resumed.insert(self.staged_path(&entry.path)?);
                    }
                }
                files.push((entry.path.clone(), size, entry.mtime));
            }
            if action.change == Change::MetadataOnly && action.need == Need::Nothing {
                continue;
            }
            let staged = self.staged_path(&entry.path)?;
            if entry.is_directory() {
                directories.push(staged);
            } else if let Some(parent) = staged.parent()
                && directories.last() != Some(&parent)
            {
                directories.push(parent);
            }
        }
        drop_leftovers(staging, &resumed)?;
        Journal::new(files).store(staging).map_err(stage_error)?;
        let mut made: HashSet<RelPath> = HashSet::new();
        for directory in directories {
            if made.contains(&directory) {
                continue;
            }
            for step in directory.ancestors().chain([directory.clone()]) {
                if !made.contains(&step) {
                    match staging.mkdir(&step, 0o700) {
                        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => return Err(io(error)),
                        _ => made.insert(step),
                    };
                }
            }
        }
        Ok(())
    }
}

pub(super) fn stage_failure(error: &StageError, staging: &Root) -> Error {
    let kind = if error.storage_full() { std::io::ErrorKind::StorageFull } else { std::io::ErrorKind::Other };
    let source = std::io::Error::new(kind, crate::error::chain(error));
    Error::Io { operation: "stage in", path: staging.shown().display().to_string(), source }
}

/// The digest that the manifest vouches for, when the file still has the size and time it had then.
fn known_digest(entry: &Entry, listed: &Entry) -> Option<Digest> {
    let ((size, _), (listed_size, digest)) = (entry.file()?, listed.file()?);
    if size == listed_size && entry.mtime == listed.mtime { digest } else { None }
}

/// Removes every staged file that is not gone on with.
fn drop_leftovers(staging: &Root, keep: &HashSet<RelPath>) -> Result<(), Error> {
    if keep.is_empty() {
        for name in ["tree", "last"] {
            staging.remove_tree(&rel(name)?).map_err(io)?;
        }
        return Ok(());
    }
    let mut directories: Vec<RelPath> = vec![rel("tree")?, rel("last")?];
    while let Some(directory) = directories.pop() {
        let names = match staging.names(Some(&directory), Follow::Never) {
            Ok(names) => names,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            Err(error) => return Err(io(error)),
        };
        for name in names {
            let Ok(path) = directory.join(&name) else { continue };
            if keep.contains(&path) {
                continue;
            }
            match staging.unlink(&path) {
                Ok(()) => {}
                Err(error) if error.kind() == std::io::ErrorKind::IsADirectory => directories.push(path),
                Err(error) => return Err(io(error)),
            }
        }
    }
    Ok(())
}
