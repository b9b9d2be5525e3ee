//! A directory of this machine as a target: compared, staged into, published to.
//!
//! Everything is staged beneath `.lockstep/staging/current` of the root. A root that is not there yet is made under a
//! hidden name beside its own and gets its name in the last step, so that a new tree appears whole.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{SystemTime, UNIX_EPOCH};

use super::alike::{self, Candidate};
use super::append::Former;
use super::area::Area;
use super::by_index::ByIndex;
use super::links::{self, Confined};
use super::moved::Moved;
use super::place::{Birth, Place};
use super::refusals::Refusals;
use super::repair::{self, Repair};
use super::writer::LocalWriter;
use super::{commit, early, fold, forbidden, known, metadata, prepare, publish, recall, room, spared, trash};
use crate::access::AclLists;
use crate::endpoint::delta::{Alike, Wanted};
use crate::endpoint::{BeginOptions, CommitOptions, Committed, Error, Target, Writer};
use crate::filter::{Filter, FilterSpec, Globs, Reach};
use crate::manifest::{Digest, Entry, Manifest, Tree};
use crate::monitor::{Event, Monitor, Problem, Severity};
use crate::path::RelPath;
use crate::plan::{Compare, Desired, Plan, diff, require_proof};
use crate::policy::acl::Principal;
use crate::policy::{Decision, Policy, PolicySpec, Sender};
use crate::root::{FileKind, Fingerprint, Metadata, Root, RootError, Seen};
use crate::scan::names::{Names, UnknownName};
use crate::scan::{self, ScanRule};
use crate::staging::{self, Ids, Permissions, RootLock, StageError};

pub(super) const STATE: &str = ".lockstep";
pub(super) const MANIFEST: &str = ".lockstep/manifest";
/// Clocks of machines that exchange data differ by less.
const CLOCK_TOLERANCE_SECONDS: i64 = 60;
/// Names that are published last and removed first wherever they occur.
pub(crate) const POINTERS: [&str; 5] =
    ["latest", "latest_checkpointed_iteration.txt", "_SUCCESS", ".metadata", "*.index.json"];

/// A directory of this machine as a target.
pub struct LocalTarget {
    pub(super) place: Place,
    policy: PolicySpec,
    /// It is mended rather than brought up to date.
    pub(super) repair: Option<Arc<Repair>>,
    run: Mutex<Option<Arc<Run>>>,
}

/// One run, from `begin` to `commit` or `abort`.
pub(super) struct Run {
    pub(super) root: Root,
    /// While the root lies under its hidden name.
    pub(super) birth: Option<Birth>,
    pub(super) staging: Option<Root>,
    confined: Option<Confined>,
    pub(super) options: BeginOptions,
    pub(super) repair: Option<Arc<Repair>>,
    policy: Policy,
    pub(super) ids: Ids,
    pub(super) last: Filter,
    pub(super) units: Filter,
    growing: Globs,
    state: Mutex<State>,
    refusals: Mutex<Refusals>,
    _lock: Option<RootLock>,
}

#[derive(Default)]
pub(super) struct State {
    pub(super) source: Arc<Tree>,
    pub(super) target: Tree,
    /// What stat said of the target's entries.
    pub(super) metadata: Vec<Seen>,
    pub(super) plan: Plan,
    pub(super) old_manifest: Arc<Manifest>,
    /// What the run was to look at.
    pub(super) reach: Reach,
    /// SHA-256 of the old manifest's file.
    pub(super) old_digest: Digest,
    /// Files whose content is staged and proven, and what they are there.
    pub(super) staged: RefCell<ByIndex<Staged>>,
    /// Files of which only what is new is staged, and what they were.
    pub(super) grown: BTreeMap<u32, Former>,
    /// Files that are at the target under a name that goes.
    pub(super) moved: BTreeMap<u32, Moved>,
    /// Files whose content was found at the target.
    pub(super) kept: ByIndex<Digest>,
    /// Links that are not made, and why.
    pub(super) refused: BTreeMap<u32, String>,
    /// Files lie there that the manifest does not list as they are, and the source has.
    pub(super) adopts: bool,
    /// What files may be made of.
    pub(super) alike: BTreeMap<u32, Vec<Candidate>>,
    /// What the plan stores.
    pub(super) need: room::Need,
    /// The disk is full: staging is given up.
    pub(super) full: bool,
    /// The other end broke the rules: staging is given up, and nothing is published.
    pub(super) rejected: bool,
    /// What is to be published is written down: staging is needed until that is done.
    pub(super) recorded: Cell<bool>,
}

impl State {
    /// What the file at `path` was when it was compared.
    pub(super) fn compared(&self, path: &RelPath) -> Option<Fingerprint> {
        let at = self.target.position(path)?;
        let entry = &self.target.entries()[at];
        Some(self.metadata.get(at)?.fingerprint(entry.file()?.0, entry.mtime))
    }
}

/// A file that is staged whole.
#[derive(Debug, Clone, Copy)]
pub(super) struct Staged {
    pub(super) digest: Digest,
    pub(super) seen: Seen,
    /// It has the size and time of its entry: a file system may keep times less exactly.
    pub(super) as_listed: bool,
}

impl Staged {
    /// What stat said of `entry` when it was staged with this digest.
    pub(super) fn of(entry: &Entry, digest: Digest, found: &Metadata) -> Staged {
        let size = entry.file().map(|(size, _)| size);
        let as_listed = found.kind == FileKind::Regular && Some(found.size) == size && found.mtime == entry.mtime;
        Staged { digest, seen: Seen::of(found), as_listed }
    }

    /// Which content lies there of `entry`, where that can be said.
    pub(super) fn fingerprint(&self, entry: &Entry) -> Option<Fingerprint> {
        let (size, _) = entry.file().filter(|_| self.as_listed)?;
        Some(self.seen.fingerprint(size, entry.mtime))
    }
}

pub(super) fn io(error: RootError) -> Error {
    Error::Io { operation: error.operation, path: crate::error::shown(&error.path).to_string(), source: error.source }
}

pub(super) fn rel(path: &str) -> Result<RelPath, Error> {
    RelPath::new(path).map_err(|error| Error::Usage(error.to_string()))
}

impl LocalTarget {
    /// The directory at `path`, which need not be there yet. `policy` is the receiver's: it wins over a sender's.
    pub fn new(path: &Path, policy: PolicySpec) -> LocalTarget {
        LocalTarget { place: Place::Named(path.to_owned()), policy, repair: None, run: Mutex::new(None) }
    }

    /// The directory at `path`, which is there, to be made again what a list says. A run on it brings only what the list
    /// has, and leaves the manifest as it is.
    pub fn repairing(path: &Path, repair: Repair) -> LocalTarget {
        LocalTarget { repair: Some(Arc::new(repair)), ..LocalTarget::new(path, PolicySpec::default()) }
    }

    /// The directory at `path` below `root` (`None` is `root` itself), for a client that may reach nothing else: no
    /// name is looked up outside `root`, and no link is followed.
    pub fn beneath(root: Arc<Root>, path: Option<RelPath>, policy: PolicySpec) -> LocalTarget {
        LocalTarget { place: Place::Beneath(root, path), policy, repair: None, run: Mutex::new(None) }
    }

    fn run(&self) -> Result<Arc<Run>, Error> {
        let run = self.run.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        run.clone().ok_or_else(|| Error::Usage("no run has begun at this target".into()))
    }
}

impl Target for LocalTarget {
    fn describe(&self) -> String {
        crate::error::Escaped(self.place.shown().as_os_str().as_encoded_bytes()).to_string()
    }

    fn begin(&self, options: &BeginOptions, monitor: &dyn Monitor) -> Result<(), Error> {
        let usage = |error: &dyn std::error::Error| Error::Usage(crate::error::chain(error));
        forbidden::begin(options)?;
        let sent_by = match (options.peer, self.place.confined()) {
            (false, _) => Sender::Oneself,
            (true, None) => Sender::Peer,
            (true, Some(_)) => Sender::Confined,
        };
        let policy = Policy::of_both(&self.policy, &options.policy, sent_by).map_err(|error| usage(&error))?;
        let rules = POINTERS.iter().map(|&name| name.to_owned()).chain(options.last.iter().cloned()).collect();
        let last = Filter::compile(&FilterSpec { rules, only: None }).map_err(|error| usage(&error))?;
        let units = FilterSpec { rules: options.units.clone(), only: None };
        let units = Filter::compile(&units).map_err(|error| usage(&error))?;
        let growing = Globs::compile(&options.append_only).map_err(|error| usage(&error))?;
        let Some((root, birth, mut lock)) = self.enter(options, monitor)? else {
            // A dry run on nothing: compared with an empty directory that is never written to.
            *self.run.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = None;
            return Ok(());
        };
        if policy.grants_by_acl() {
            metadata::check_support(&root)?;
        }
        let mut staging = None;
        if let Some(taken) = lock.take() {
            let area = match (&self.repair, options.stage_only) {
                (Some(_), _) => Area::Repair,
                (None, true) => Area::Early,
                (None, false) => Area::Run,
            };
            let path = rel(area.in_state())?;
            // Before anything is published: who passes it on has to know.
            staging::remember_trail(&root, &options.trail).map_err(io)?;
            if publish::recover(&root, taken.state())? {
                monitor.event(Event::Warning(&format!(
                    "{}: an earlier run was interrupted while it published; it was finished first",
                    self.describe()
                )));
            }
            if area == Area::Run {
                // A repair that stopped half way is begun anew: what it wanted is what this run brings a newer one of.
                taken.state().remove_tree(&rel(Area::Repair.in_state())?).map_err(io)?;
            }
            taken.state().mkdir_all(&path.join("tree").map_err(|error| usage(&error))?, 0o700).map_err(io)?;
            staging = Some(taken.state().subroot(&path).map_err(io)?);
            lock = Some(taken);
        }
        let run = Run {
            root,
            birth,
            staging,
            confined: self.place.confined(),
            options: options.clone(),
            repair: self.repair.clone(),
            policy,
            ids: Ids::default(),
            last,
            units,
            growing,
            state: Mutex::default(),
            refusals: Mutex::default(),
            _lock: lock,
        };
        *self.run.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(Arc::new(run));
        Ok(())
    }

    fn diff(&self, source: &Arc<Tree>, monitor: &dyn Monitor) -> Result<Plan, Error> {
        match self.run() {
            Ok(run) => run.diff(source, monitor).inspect_err(|error| run.note(error)),
            Err(_) => {
                let desired = |_: usize, entry: &Entry| Desired {
                    mode: entry.mode & 0o777,
                    owner: None,
                    group: None,
                    acl_differs: false,
                };
                let plan = diff(source, &Tree::default(), &desired, Compare::default());
                links::tell(&links::refused(self.place.confined().as_ref(), source, &plan), source, monitor);
                Ok(plan)
            }
        }
    }

    fn writer(&self) -> Result<Box<dyn Writer + '_>, Error> {
        Ok(Box::new(LocalWriter::new(self.run()?)))
    }

    fn commit(&self, options: &CommitOptions, monitor: &dyn Monitor) -> Result<Committed, Error> {
        let run = self.run()?;
        if run.options.stage_only {
            self.abort();
            let reason = "a run that only stages publishes nothing".to_owned();
            return Err(Error::Refused { by: "the receiver".into(), reason });
        }
        if run.state().rejected {
            self.abort();
            let reason = "the run was refused; nothing of it is published".to_owned();
            return Err(Error::Refused { by: "the receiver".into(), reason });
        }
        let committed = match &run.repair {
            Some(wanted) => repair::commit(&run, wanted, options, monitor),
            None => commit::commit(&run, options, monitor),
        };
        run.record_refusals();
        match &committed {
            Ok(_) => *self.run.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = None,
            Err(error) => {
                run.note(error);
                self.abort();
            }
        }
        committed
    }

    fn abort(&self) {
        let run = self.run.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
        let Some(run) = run else { return };
        run.record_refusals();
        if let (Area::Early, Some(staging)) = (run.area(), &run.staging) {
            // What could not be written down is hashed again when it is wanted.
            let state = run.state();
            let _ = early::keep(staging, &state.source, &state.staged.borrow());
        }
        let given_up = {
            let state = run.state();
            // What a check would take for something that is being brought.
            let nothing =
                run.area() == Area::Run && run.staging.as_ref().is_some_and(|staging| !prepare::holds_files(staging));
            (state.full || state.rejected || nothing) && !state.recorded.get()
        };
        if given_up && let Ok(path) = rel(run.area().in_root()) {
            // What is staged would only keep the disk full, or came from somebody who is not to be believed.
            let _ = run.root.remove_tree(&path);
        }
    }

    fn reject(&self, path: &[u8], reason: &str) {
        let Ok(run) = self.run() else { return };
        run.state().rejected = true;
        run.refuse(path, reason);
        // The other end may stay connected for long.
        run.record_refusals();
    }

    fn verification(&self) -> String {
        "SHA-256 of what was written".into()
    }

    fn stages_early(&self) -> bool {
        self.repair.is_none()
    }

    fn alike(&self, index: u32, wanted: Wanted) -> Result<Option<Alike>, Error> {
        Ok(self.run()?.alike(index, wanted))
    }
}

impl Run {
    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    pub(super) fn refusals(&self) -> MutexGuard<'_, Refusals> {
        self.refusals.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    pub(super) fn area(&self) -> Area {
        match (&self.repair, self.options.stage_only) {
            (Some(_), _) => Area::Repair,
            (None, true) => Area::Early,
            (None, false) => Area::Run,
        }
    }

    /// What is staged is given up when the disk is full: it would only keep it full. What was refused is recorded.
    fn note(&self, error: &Error) {
        self.state().full |= matches!(error, Error::Io { source, .. } if is_full(source));
        if let Error::Refused { reason, .. } = error {
            self.refuse(b"", reason);
        }
    }

    /// Whether what is staged is published by this run itself.
    pub(super) fn publishes(&self) -> bool {
        self.area() == Area::Run && !self.options.forbidden.change
    }

    /// Where a file or link is staged. Pointers lie apart: they are published by themselves.
    pub(super) fn staged_path(&self, path: &RelPath) -> Result<RelPath, Error> {
        staged_in(if self.is_last(path) { b"last/" } else { b"tree/" }, path)
    }

    /// Where a directory is staged, which is never a pointer, whatever its name.
    pub(super) fn staged_directory(&self, path: &RelPath) -> Result<RelPath, Error> {
        staged_in(b"tree/", path)
    }

    /// Whether a path is published by itself at the end. What lies in a unit is published with it.
    pub(super) fn is_last(&self, path: &RelPath) -> bool {
        !self.last.admits(path, false) && self.unit_of(path, false).is_none()
    }

    /// The directory that is published whole and that a path lies in, or is.
    pub(super) fn unit_of(&self, path: &RelPath, directory: bool) -> Option<RelPath> {
        if self.options.units.is_empty() {
            return None;
        }
        let own = directory.then(|| path.clone());
        // What is lockstep's own takes part in nothing, and is no unit for that.
        let own_state = |above: &RelPath| above.components().any(|name| name == STATE.as_bytes());
        path.ancestors().chain(own).find(|above| !own_state(above) && !self.units.admits(above, true))
    }

    /// Whether the sender says of the file at `path` that it only grows.
    pub(super) fn grows(&self, path: &RelPath) -> bool {
        self.growing.mean(path, false)
    }

    /// The permissions that an entry gets when it is new.
    pub(super) fn permissions(&self, entry: &Entry) -> Result<Permissions, Error> {
        Ok(self.decided(entry)?.0)
    }

    /// Where it is below the root that its client is confined to.
    pub(super) fn confined(&self) -> Option<&links::Confined> {
        self.confined.as_ref()
    }

    pub(super) fn decision(&self, entry: &Entry) -> Decision {
        self.policy.decide(&entry.path, entry.is_directory(), entry.mode)
    }

    /// The same, and whether a rule says so.
    pub(super) fn decided(&self, entry: &Entry) -> Result<(Permissions, bool), Error> {
        if let Some(repair) = &self.repair {
            return Ok((repair::permissions(self, repair, entry)?, false));
        }
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
        if let Some(wanted) = &self.repair {
            return repair::diff(self, wanted, source, monitor);
        }
        for entry in source.entries() {
            if entry.path.components().any(|name| name == STATE.as_bytes()) {
                let reason = format!("'{}' lies in the directory that lockstep keeps for itself", entry.path);
                return Err(Error::Refused { by: "the receiver".into(), reason });
            }
        }
        let filter =
            Filter::compile(&self.options.filter).map_err(|error| Error::Usage(crate::error::chain(&error)))?;
        let reach = filter.reach();
        let rule = ScanRule { ignore_files: true, threads: self.options.threads, ..ScanRule::everything(filter) };
        let scanned = scan::scan_seen(&self.root, &rule, monitor).map_err(|error| match error {
            scan::ScanError::Root(error) => io(error),
            other => Error::Refused { by: "the receiver".into(), reason: crate::error::chain(&other) },
        })?;
        // Said, but no failure of the run: what comes of it is told when that path is published or removed.
        for problem in scanned.problems {
            monitor.event(Event::Problem(&Problem { severity: Severity::Skipped, ..problem }));
        }
        let mut target = scanned.tree;
        target.share_paths(source);
        let (mut old_manifest, old_digest) = recall::manifest(&self.root, monitor)?;
        if let Some(listed) = Arc::get_mut(&mut old_manifest) {
            listed.tree.share_paths(source);
        }
        warn_of_the_future(&old_manifest, &self.root, monitor);
        let look = known::Look {
            root: &self.root,
            source,
            listed: &old_manifest.tree,
            metadata: &scanned.metadata,
            hash_all: self.options.checksum,
            dry_run: self.options.dry_run,
            threads: self.options.threads,
        };
        let doubtful = known::complete(&look, &mut target, monitor);
        if let Some(staging) = &self.staging
            && fold::folds_case(staging).map_err(io)?
            && let Some((first, second)) = fold::collision(source, &target)
        {
            let reason =
                format!("the file system there takes '{first}' and '{second}' for one name; rename one of them");
            return Err(Error::Refused { by: "the receiver".into(), reason });
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
        require_proof(&mut plan, source, &target, &doubtful);
        spared::spare(self, source, &mut plan, monitor);
        self.allow(source, &target, &mut plan)?;
        let mut staged = ByIndex::default();
        if let Some(staging) = &self.staging {
            if self.area() == Area::Early {
                early::prepare(self, staging, source, &mut plan)?;
            } else {
                self.prepare(staging, source, &mut plan)?;
                if self.options.filter.only.is_none() {
                    early::collect(&self.root)?;
                }
                staged = early::take(self, staging, source, &mut plan)?;
            }
        }
        let collects = !self.options.dry_run && !self.options.forbidden.remove;
        if let Some(keep) = self.options.trash_seconds.filter(|_| collects) {
            // What has to go makes room for what comes.
            trash::collect(&self.root, keep, monitor);
        }
        let mut alike = match self.options.delta || !self.options.append_only.is_empty() {
            true => alike::find(source, (&target, &scanned.metadata), &old_manifest.tree, &plan),
            false => BTreeMap::new(),
        };
        alike.retain(|&at, _| self.options.delta || self.grows(&source.entries()[at as usize].path));
        plan.alike = alike.keys().copied().collect();
        let there =
            |entry: &Entry| target.get(&entry.path).and_then(Entry::file).filter(|_| self.may_append(&entry.path));
        let moves = |index: u32, entry: &Entry| {
            let whole = alike.get(&index).and_then(|pieces| pieces.first()).and_then(|piece| piece.is_all_of(entry));
            whole.is_some_and(|path| self.may_move() && plan.removes(path))
        };
        let need = room::needed(source, &plan, &|entry| there(entry).map(|(size, _)| size), &moves);
        if !self.options.ignore_free_space
            && let Err(error) = room::check(&self.root, need)
        {
            if !self.options.dry_run {
                return Err(error);
            }
            monitor.event(Event::Warning(&crate::error::chain(&error)));
        }
        let refused = links::refused_of(self, source, &plan)?;
        if self.options.dry_run {
            links::tell(&refused, source, monitor);
        }
        let mut state = self.state();
        *state = State {
            source: Arc::clone(source),
            refused,
            adopts: doubtful.iter().any(|&at| source.get(&target.entries()[at].path).is_some()),
            alike,
            target,
            metadata: scanned.metadata,
            need,
            plan: plan.clone(),
            staged: RefCell::new(staged),
            reach,
            old_manifest,
            old_digest,
            ..State::default()
        };
        Ok(plan)
    }
}

pub(super) fn staged_in(tree: &[u8], path: &RelPath) -> Result<RelPath, Error> {
    let staged = RelPath::new([tree, path.as_bytes()].concat());
    staged.map_err(|error| Error::Refused { by: "the staging directory".into(), reason: error.to_string() })
}

pub(super) fn is_full(error: &std::io::Error) -> bool {
    matches!(error.kind(), std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded)
}

pub(super) fn stage_failure(error: &StageError, staging: &Root) -> Error {
    let kind = if error.storage_full() { std::io::ErrorKind::StorageFull } else { std::io::ErrorKind::Other };
    let source = std::io::Error::new(kind, crate::error::chain(error));
    Error::Io { operation: "stage in", path: crate::error::shown(staging.shown()).to_string(), source }
}

/// A clock that was put back makes new files look older than old ones. Nothing is decided by it; it is told.
fn warn_of_the_future(manifest: &Manifest, root: &Root, monitor: &dyn Monitor) {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs() as i64;
    let ahead = manifest.created.seconds.saturating_sub(now);
    if ahead > CLOCK_TOLERANCE_SECONDS {
        monitor.event(Event::Warning(&format!(
            "{}: the last manifest was written {ahead} seconds in the future; is the clock of this machine right?",
            crate::error::shown(root.shown())
        )));
    }
}
