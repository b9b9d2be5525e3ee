//! A directory of this machine as a target: compared, staged into, published to.
//!
//! Everything is staged beneath `.lockstep/staging/current` of the root. A root that is not there yet is made under a
//! hidden name beside its own and gets its name in the last step, so that a new tree appears whole.

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use super::place::{Birth, Place};
use super::writer::LocalWriter;
use super::{commit, metadata};
use crate::access::AclLists;
use crate::endpoint::{BeginOptions, CommitOptions, Committed, Error, Target, Writer};
use crate::filter::{Filter, FilterSpec};
use crate::manifest::{Content, Digest, Entry, Manifest, Tree};
use crate::monitor::{Event, Monitor};
use crate::path::RelPath;
use crate::plan::{Change, Compare, Desired, Need, Plan, diff};
use crate::policy::acl::Principal;
use crate::policy::{Decision, Policy, PolicySpec};
use crate::root::{Follow, Root, RootError};
use crate::scan::names::{Names, UnknownName};
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
    place: Place,
    policy: PolicySpec,
    run: Mutex<Option<Arc<Run>>>,
}

/// One run, from `begin` to `commit` or `abort`.
pub(super) struct Run {
    pub(super) root: Root,
    /// While the root lies under its hidden name.
    pub(super) birth: Option<Birth>,
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
        LocalTarget { place: Place::Named(path.to_owned()), policy, run: Mutex::new(None) }
    }

    /// The directory at `path` below `root` (`None` is `root` itself), for a client that may reach nothing else: no
    /// name is looked up outside `root`, and no link is followed.
    pub fn beneath(root: Arc<Root>, path: Option<RelPath>, policy: PolicySpec) -> LocalTarget {
        LocalTarget { place: Place::Beneath(root, path), policy, run: Mutex::new(None) }
    }

    fn run(&self) -> Result<Arc<Run>, Error> {
        let run = self.run.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        run.clone().ok_or_else(|| Error::Usage("no run has begun at this target".into()))
    }

    /// Opens the root, or the hidden one that will be it. `None` is a dry run on nothing.
    fn open_root(&self, dry_run: bool) -> Result<Option<(Root, Option<Birth>)>, Error> {
        match self.place.open() {
            Ok(root) => return Ok(Some((root, None))),
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(io(error)),
            Err(_) if dry_run => return Ok(None),
            Err(_) => {}
        }
        let (root, birth) = self.place.bear()?;
        metadata::disinherit(&root)?;
        Ok(Some((root, Some(birth))))
    }
}

impl Target for LocalTarget {
    fn describe(&self) -> String {
        crate::error::Escaped(self.place.shown().as_os_str().as_encoded_bytes()).to_string()
    }

    fn begin(&self, options: &BeginOptions, monitor: &dyn Monitor) -> Result<(), Error> {
        let usage = |error: &dyn std::error::Error| Error::Usage(crate::error::chain(error));
        let policy = Policy::of_both(&self.policy, &options.policy, options.peer).map_err(|error| usage(&error))?;
        let rules = POINTERS.iter().map(|&name| name.to_owned()).chain(options.last.iter().cloned()).collect();
        let last = Filter::compile(&FilterSpec { rules, only: None }).map_err(|error| usage(&error))?;
        let Some((root, birth)) = self.open_root(options.dry_run)? else {
            // A dry run on nothing: compared with an empty directory that is never written to.
            *self.run.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = None;
            return Ok(());
        };
        if policy.grants_by_acl() {
            metadata::check_support(&root)?;
        }
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
            birth,
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
                let desired = |_: usize, entry: &Entry| Desired {
                    mode: entry.mode & 0o777,
                    owner: None,
                    group: None,
                    acl_differs: false,
                };
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

    /// Where a file or link is staged. Pointers lie apart: they are published by themselves.
    pub(super) fn staged_path(&self, path: &RelPath) -> Result<RelPath, Error> {
        staged_in(if self.is_last(path) { b"last/" } else { b"tree/" }, path)
    }

    /// Where a directory is staged, which is never a pointer, whatever its name.
    pub(super) fn staged_directory(&self, path: &RelPath) -> Result<RelPath, Error> {
        staged_in(b"tree/", path)
    }

    pub(super) fn is_last(&self, path: &RelPath) -> bool {
        !self.last.admits(path, false)
    }

    /// The permissions that an entry gets when it is new.
    pub(super) fn permissions(&self, entry: &Entry) -> Result<Permissions, Error> {
        Ok(self.decided(entry)?.0)
    }

    pub(super) fn decision(&self, entry: &Entry) -> Decision {
        self.policy.decide(&entry.path, entry.is_directory(), entry.mode)
    }

    /// The same, and whether a rule says so.
    pub(super) fn decided(&self, entry: &Entry) -> Result<(Permissions, bool), Error> {
        let directory = entry.is_directory();
        let decision = self.decision(entry);
        let (mode, ruled) = (decision.mode, decision.rule.is_some());
        let resolve = |who: Principal, name: &str| match who {
            Principal::User => self.ids.user(name),
            Principal::Group => self.ids.group(name),
        };
        let permissions = || -> Result<Permissions, UnknownName> {
            let uid = decision.owner.map(|name| self.ids.user(&name)).transpose()?;
            let gid = decision.group.map(|name| self.ids.group(&name)).transpose()?;
            let mut lists = AclLists::default();
            if let Some(acl) = decision.acl {
                lists.access = acl.access_xattr(mode, directory, resolve)?;
                lists.default = if directory { acl.default_xattr(mode, resolve)? } else { None };
            }
            Ok(Permissions { mode, uid, gid, acl: Some(lists), mtime: entry.mtime })
        };
        let permissions = permissions()
            .map_err(|error| Error::Refused { by: "the policy".into(), reason: format!("{}: {error}", entry.path) })?;
        Ok((permissions, ruled))
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
            let (permissions, ruled) = self.decided(entry)?;
            let there = target.get(&entry.path).filter(|there| there.is_directory() == entry.is_directory());
            let comparable = there.is_some_and(|there| there.is_directory() || there.file().is_some());
            let acl_differs = match permissions.acl {
                Some(lists) if ruled && comparable => metadata::acl_differs(&self.root, &entry.path, &lists),
                _ => false,
            };
            wanted.push(Desired {
                mode: permissions.mode,
                owner: permissions.uid.map(|uid| names.user(uid)),
                group: permissions.gid.map(|gid| names.group(gid)),
                acl_differs,
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
            if entry.is_directory() {
                directories.push(self.staged_directory(&entry.path)?);
            } else if let Some(parent) = self.staged_path(&entry.path)?.parent()
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

fn staged_in(tree: &[u8], path: &RelPath) -> Result<RelPath, Error> {
    let staged = RelPath::new([tree, path.as_bytes()].concat());
    staged.map_err(|error| Error::Refused { by: "the staging directory".into(), reason: error.to_string() })
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
