//! A directory of a stock server as a target: compared, staged into, published to.
//!
//! The layout is that of a local target, in a staging area of its own: what is staged lies in
//! `.lockstep/staging/sftp/tree` of the root, pointers in `last` beside it. A root that is not there yet is made under a
//! hidden name beside its own and gets its name in the last step. A run that has nothing to do makes nothing but its lock.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::alike::{self, Alike, Lying};
use super::bulk::{Bulk, Starting};
use super::lock::Lock;
use super::look::{Looked, answers, look, open_both, questions};
use super::names::{Ids, Names};
use super::place::{Place, open_root};
use super::prove::{Provers, SharedShell};
use super::session::Session;
use super::shell::{Shell, Spare, is_plain};
use super::stage::Area;
use super::vouch::{as_held, ask_for_recent, vouched};
use super::writer::{COPIED_BYTES, StockWriter};
use super::{Lanes, Verify, adopt, at, publish, stage, trail, trash, whole_seconds};
use crate::codec::chunks::ChunkId;
use crate::endpoint::delta::{Former, Sums};
use crate::endpoint::local::POINTERS;
use crate::endpoint::{BeginOptions, CommitOptions, Committed, Crew, Error, Target, Writer};
use crate::filter::{Filter, FilterSpec, Globs};
use crate::manifest::{Digest, Entry, Manifest, Timestamp, Tree};
use crate::monitor::{Event, Monitor, Problem, Severity};
use crate::path::RelPath;
use crate::plan::{Compare, Desired, Need, Plan, diff};
use crate::policy::Policy;

pub(super) const STATE: &str = ".lockstep";
pub(super) const MANIFEST: &str = ".lockstep/manifest";
/// Targets of every kind stage below it.
pub(super) const STAGING_ABOVE: &str = ".lockstep/staging";
pub(super) const STAGING: &str = ".lockstep/staging/sftp";
/// Where a local target stages; what an interrupted run of one had begun to publish is finished by it alone.
pub(super) const FOREIGN_RECORD: &str = ".lockstep/staging/current/commit";
/// Threads that prove, at most: sshd allows ten sessions a connection.
const PROVERS: usize = 4;

/// A directory of a stock server as a target.
pub struct StockTarget {
    lanes: Arc<Lanes>,
    run: Mutex<Option<Arc<Run>>>,
    /// How what arrives is proven in the run, or was in the last.
    proof: Mutex<&'static str>,
    /// Files that only got another name in the run, or did in the last.
    renamed: AtomicUsize,
    /// Those that were appended to.
    grown: AtomicUsize,
    much: Much,
    /// Where what is known of the blocks of its files is kept.
    sums: Option<PathBuf>,
}

/// What is sent faster by a command that takes content, its start included: so many files, or so many bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Much {
    /// Files, at least. With 0 even the first waits until the command is there.
    pub files: u64,
    /// Bytes, at least.
    pub bytes: u64,
}

impl Default for Much {
    fn default() -> Self {
        Much { files: 1000, bytes: 16 << 20 }
    }
}

const BY_COMMAND: &str = "SHA-256 of what lies there, hashed by a command there";
const BY_READING: &str = "SHA-256 of what lies there, read back";

/// One run, from `begin` to `commit` or `abort`.
pub(super) struct Run {
    pub(super) session: Arc<Session>,
    pub(super) lanes: Arc<Lanes>,
    pub(super) root: Vec<u8>,
    /// The final path, while the root lies under its hidden name.
    pub(super) rename_to: Option<Vec<u8>>,
    /// Where things are staged.
    pub(super) staging: Vec<u8>,
    pub(super) options: BeginOptions,
    /// Before anything was listed at either side.
    pub(super) started: Timestamp,
    policy: Policy,
    pub(super) ids: Ids,
    pub(super) last: Filter,
    /// What only grows.
    pub(super) growing: Globs,
    pub(super) names: Mutex<Names>,
    pub(super) shell: SharedShell,
    /// The account runs commands for us.
    pub(super) has_shell: bool,
    /// A command brings everything to stable storage at once.
    pub(super) syncs: bool,
    pub(super) much: Much,
    pub(super) sums: Option<PathBuf>,
    pub(super) provers: Provers,
    pub(super) lock: Mutex<Option<Lock>>,
    /// Whose what is made there is.
    pub(super) own: (u32, u32),
    pub(super) area: Mutex<Area>,
    /// Nothing is removed in this run.
    keeps_all: AtomicBool,
    /// The disk is full: staging is given up.
    pub(super) full: AtomicBool,
    /// How often it was tried whether anything can be stored, and when that last was so.
    pub(super) tried: Mutex<(u32, Option<Instant>)>,
    /// What was found before the source was known.
    looked: Mutex<Option<Looked>>,
    state: Mutex<State>,
}

#[derive(Default)]
pub(super) struct State {
    /// The source's tree, with times as the server can hold them.
    pub(super) source: Arc<Tree>,
    pub(super) target: Tree,
    pub(super) plan: Plan,
    pub(super) old_manifest: Manifest,
    /// SHA-256 of the old manifest's file.
    pub(super) old_digest: Digest,
    /// Large files may be written out of their order.
    pub(super) spreads: bool,
    /// Files whose content is staged and proven.
    pub(super) staged: HashMap<u32, Digest>,
    /// The sums of what of it is large.
    pub(super) sums: HashMap<Digest, Sums>,
    /// What files may be made of.
    pub(super) alike: Arc<Alike>,
    /// Files that are to get their content by a name of what the target has.
    pub(super) moved: BTreeMap<u32, Arc<Lying>>,
    /// Files of which what is new is staged and proven, and what it is put at the end of.
    pub(super) tails: BTreeMap<u32, Arc<Lying>>,
    /// Those that are linked to where they are staged.
    pub(super) linked: BTreeMap<u32, Arc<Lying>>,
    /// Files whose content was found at the target.
    pub(super) kept: HashMap<u32, Digest>,
}

impl State {
    /// Whether so much is to be sent that a command more pays.
    fn is_much(&self, much: Much) -> bool {
        let needed = self.plan.actions.iter().filter(|action| action.need != Need::Nothing);
        let sizes = needed.filter_map(|action| {
            let (size, digest) = self.source.entries().get(action.index as usize)?.file()?;
            // What the server copies as a whole is not sent.
            (!self.alike.is_whole(action.index, size, digest)).then_some(size)
        });
        let (files, bytes) = sizes.fold((0_u64, 0_u64), |(files, bytes), size| (files + 1, bytes.saturating_add(size)));
        files >= much.files || bytes >= much.bytes
    }
}

/// What a path gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Permissions {
    pub(super) mode: u32,
    pub(super) uid: Option<u32>,
    pub(super) gid: Option<u32>,
    pub(super) mtime: Timestamp,
}

pub(super) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl StockTarget {
    /// The directory that `lanes` lead to, which need not be there yet.
    pub fn new(lanes: Lanes) -> StockTarget {
        let lanes = Arc::new(lanes);
        let (run, proof, much) = (Mutex::new(None), Mutex::new(BY_READING), Much::default());
        StockTarget {
            lanes,
            run,
            proof,
            renamed: AtomicUsize::default(),
            grown: AtomicUsize::default(),
            much,
            sums: None,
        }
    }

    /// Has what is known of the blocks of its files kept in `directory`, which is made where something is to be kept: of a file that
    /// changes the next run sends what has changed. `None` keeps nothing.
    #[must_use]
    pub fn keeping_sums_in(self, directory: Option<&Path>) -> StockTarget {
        let id = ChunkId::content_of(self.describe().as_bytes());
        let name = format!("sums-{:x}.redb", u128::from_be_bytes(id));
        StockTarget { sums: directory.map(|directory| directory.join(name)), ..self }
    }

    /// Has content go by a command, where there is one, from another amount on.
    #[must_use]
    pub fn by_command_from(self, much: Much) -> StockTarget {
        StockTarget { much, ..self }
    }

    fn run(&self) -> Result<Arc<Run>, Error> {
        locked(&self.run).clone().ok_or_else(|| Error::Usage("no run has begun at this target".into()))
    }
}

impl Target for StockTarget {
    fn describe(&self) -> String {
        self.lanes.describe()
    }

    fn begin(&self, options: &BeginOptions, monitor: &dyn Monitor) -> Result<(), Error> {
        self.renamed.store(0, Ordering::Relaxed);
        self.grown.store(0, Ordering::Relaxed);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let started = Timestamp { seconds: now.as_secs() as i64, nanoseconds: now.subsec_nanos() };
        let usage = |error: &dyn std::error::Error| Error::Usage(crate::error::chain(error));
        let policy = Policy::compile(&options.policy).map_err(|error| usage(&error))?;
        if policy.grants_by_acl() {
            let reason = "a rule has ACL entries, which an SFTP server without lockstep cannot set; leave 'acl' out, or \
                          install lockstep there";
            return Err(Error::Refused { by: self.describe(), reason: reason.into() });
        }
        if !options.units.is_empty() {
            let reason = "SFTP cannot exchange a directory that is there for another in one step; a directory that is new \
                          appears in one step without --unit, for others install lockstep there";
            return Err(Error::Refused { by: self.describe(), reason: reason.into() });
        }
        let rules = POINTERS.iter().map(|&name| name.to_owned()).chain(options.last.iter().cloned()).collect();
        let last = Filter::compile(&FilterSpec { rules, only: None }).map_err(|error| usage(&error))?;
        let growing = Globs::compile(&options.append_only).map_err(|error| usage(&error))?;
        monitor.event(Event::Detail(&format!("{}: {}", self.describe(), self.lanes.limits())));
        let Some(Place { root, rename_to }) = open_root(&self.lanes, options.dry_run)? else {
            // A dry run on nothing: compared with an empty directory that is never written to.
            *locked(&self.run) = None;
            return Ok(());
        };
        let session = Arc::clone(self.lanes.control());
        let names = Mutex::new(Names::default());
        let mut lock = None;
        let (mut own, mut area, mut interrupted) = ((0, 0), Area::default(), false);
        let opened = if options.dry_run {
            open_both(&session, &root)?
        } else {
            let wait = Duration::from_secs(options.wait_seconds);
            let state = at(&root, STATE);
            let (taken, replies) =
                Lock::take(&session, &state, self.describe(), &options.actor, wait, &questions(&root))?;
            lock = Some(taken);
            let found = answers(&session, &root, rename_to.is_some(), replies)?;
            if found.foreign {
                return Err(self.interrupted_otherwise());
            }
            (own, area.left, interrupted) = (found.own, found.staging, found.record);
            locked(&names).expect(&session, own)?;
            found.opened
        };
        let (shell, looked) = std::thread::scope(|scope| {
            // What an interrupted run has still to do changes what lies there.
            let looking = (!interrupted && !options.tries)
                .then(|| scope.spawn(|| look(&session, &root, options, opened.clone(), &names, monitor)));
            let shell = self.first_shell(lock.as_ref(), monitor);
            let broken = |_| Err(Error::Usage("an internal error stopped the listing".into()));
            (shell, looking.map(|looking| looking.join().unwrap_or_else(broken)))
        });
        let (shell, looked) = (shell?, looked.transpose()?);
        let (has_shell, syncs) = (shell.is_some(), shell.as_ref().is_some_and(Shell::syncs));
        let spare = |shell| Spare::new(Some(shell), Arc::clone(&self.lanes.remote), 0);
        let shell: SharedShell = Arc::new(Mutex::new(shell.map_or_else(Spare::default, spare)));
        let mut provers = Provers::default();
        if !options.dry_run {
            let verify = if has_shell { self.lanes.verify } else { Verify::ReadBack };
            provers = Provers::start(&self.lanes, &shell, verify, self.lanes.count().min(PROVERS))?;
        }
        let run = Run {
            session,
            lanes: Arc::clone(&self.lanes),
            staging: at(&root, STAGING),
            root,
            rename_to,
            options: options.clone(),
            started,
            policy,
            ids: Ids::default(),
            last,
            growing,
            names,
            shell,
            has_shell,
            syncs,
            much: self.much,
            sums: self.sums.clone(),
            provers,
            lock: Mutex::new(lock),
            own,
            area: Mutex::new(area),
            keeps_all: AtomicBool::new(false),
            full: AtomicBool::new(false),
            tried: Mutex::default(),
            looked: Mutex::new(looked),
            state: Mutex::default(),
        };
        if !options.dry_run {
            self.prepare(&run, interrupted, monitor)?;
        }
        if locked(&run.looked).is_none() {
            // It is listed anew when it is to be compared.
            opened.close(&run.session)?;
        }
        *locked(&self.run) = Some(Arc::new(run));
        Ok(())
    }

    fn keeps_all(&self) {
        if let Ok(run) = self.run() {
            run.keeps_all.store(true, Ordering::Relaxed);
        }
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
        Ok(Box::new(StockWriter::new(self.run()?)))
    }

    fn commit(&self, options: &CommitOptions, monitor: &dyn Monitor) -> Result<Committed, Error> {
        let run = self.run()?;
        let committed = publish::commit(&run, options, monitor)?;
        self.renamed.store(run.state().linked.len(), Ordering::Relaxed);
        self.grown.store(run.state().tails.len(), Ordering::Relaxed);
        *locked(&run.lock) = None;
        *locked(&self.run) = None;
        Ok(committed)
    }

    fn abort(&self) {
        if let Some(run) = locked(&self.run).take() {
            if run.full.load(Ordering::Relaxed) && publish::still_locked(&run).is_ok() {
                // What is staged would only keep the disk full. It was the run's error already.
                let _ = stage::clear(&run);
            }
            *locked(&run.lock) = None;
        }
    }

    fn verification(&self) -> String {
        let mut proof = String::from(*locked(&self.proof));
        let (renamed, grown) = (self.renamed.load(Ordering::Relaxed), self.grown.load(Ordering::Relaxed));
        if renamed > 0 {
            proof.push_str(&format!("; {renamed} only got another name there and were not hashed again"));
        }
        if grown > 0 {
            proof.push_str(&format!("; of {grown} that were appended to, what is new"));
        }
        proof
    }

    fn wire_bytes(&self) -> u64 {
        self.lanes.wire_bytes()
    }

    fn crew(&self) -> Crew {
        self.lanes.crew()
    }

    fn is_far(&self) -> bool {
        true
    }

    fn former(&self, index: u32) -> Option<Former> {
        Some(self.run().map(|run| run.former(index)).unwrap_or_default())
    }

    fn copies_at_once(&self) -> u64 {
        COPIED_BYTES
    }
}

impl StockTarget {
    /// A command that hashes, where the account has one and it sees the same files: it is tried on the lock, whose text is
    /// known.
    fn first_shell(&self, lock: Option<&Lock>, monitor: &dyn Monitor) -> Result<Option<Shell>, Error> {
        if self.lanes.verify == Verify::ReadBack {
            return Ok(None);
        }
        let host = self.lanes.control().client.host();
        let tried = self.lanes.first_shell().and_then(|mut shell| match lock {
            Some(lock) if shell.hash(&[lock.path()])? != [Some(lock.digest())] => {
                Err("it does not see what the SFTP server sees, or has no openssl and no sha256sum".into())
            }
            _ => Ok(shell),
        });
        match tried {
            Ok(shell) => {
                monitor.event(Event::Detail(&format!("{host}: what arrives is hashed there, by a command")));
                *locked(&self.proof) = BY_COMMAND;
                Ok(Some(shell))
            }
            Err(reason) if self.lanes.verify == Verify::Exec => Err(Error::Usage(format!(
                "{host} runs no command that hashes ({reason}); --verify=read-back proves by reading back"
            ))),
            Err(reason) => {
                monitor.event(Event::Detail(&format!(
                    "{host}: it runs no command that hashes ({reason}); what arrives is read back"
                )));
                *locked(&self.proof) = BY_READING;
                Ok(None)
            }
        }
    }

    fn interrupted_otherwise(&self) -> Error {
        Error::Refused {
            by: self.describe(),
            reason: "a run of lockstep's own server was interrupted there while it published; finish it by running \
                     lockstep there, with any source, before this way is used"
                .into(),
        }
    }

    /// Finishes what an interrupted run left.
    fn prepare(&self, run: &Run, interrupted: bool, monitor: &dyn Monitor) -> Result<(), Error> {
        // Before anything is published: who passes it on has to know.
        trail::remember(&run.session, &run.root, &run.options.trail)?;
        if !interrupted {
            return Ok(());
        }
        stage::make_area(run, monitor)?;
        if publish::recover(run, monitor)? {
            monitor.event(Event::Warning(&format!(
                "{}: an earlier run was interrupted while it published; it was finished first",
                self.describe()
            )));
        }
        Ok(())
    }
}

impl Run {
    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        locked(&self.state)
    }

    /// Whether it is known that nothing is removed in this run.
    pub(super) fn keeps_all(&self) -> bool {
        self.keeps_all.load(Ordering::Relaxed)
    }

    pub(super) fn shell(&self) -> MutexGuard<'_, Spare> {
        locked(&self.shell)
    }

    /// The root, as a path that can be looked at.
    pub(super) fn root_path(&self) -> Vec<u8> {
        if self.root.is_empty() { b"/".to_vec() } else { self.root.clone() }
    }

    pub(super) fn is_last(&self, path: &RelPath) -> bool {
        !self.last.admits(path, false)
    }

    /// Where a path is staged, below the staging area. Pointers lie apart: they are published by themselves. A directory
    /// is never one, whatever its name.
    pub(super) fn staged_name(&self, path: &RelPath, directory: bool) -> Vec<u8> {
        let tree: &[u8] = if !directory && self.is_last(path) { b"last/" } else { b"tree/" };
        [tree, path.as_bytes()].concat()
    }

    /// The same of a file or link, as the server knows it.
    pub(super) fn staged_path(&self, path: &RelPath) -> Vec<u8> {
        at(&self.staging, self.staged_name(path, false))
    }

    /// The same of a directory.
    pub(super) fn staged_directory(&self, path: &RelPath) -> Vec<u8> {
        at(&self.staging, self.staged_name(path, true))
    }

    /// The permissions that an entry gets.
    ///
    /// # Errors
    /// When the policy names somebody that the other machine does not know, or the connection ends.
    pub(super) fn permissions(&self, entry: &Entry) -> Result<Permissions, Error> {
        let decision = self.policy.decide(&entry.path, entry.is_directory(), entry.mode);
        let refused =
            |reason: String| Error::Refused { by: "the policy".into(), reason: format!("{}: {reason}", entry.path) };
        let (mut uid, mut gid) = (None, None);
        if let Some(name) = &decision.owner {
            uid = Some(self.ids.user(&self.session, &self.shell, name)?.map_err(refused)?);
        }
        if let Some(name) = &decision.group {
            gid = Some(self.ids.group(&self.session, &self.shell, name)?.map_err(refused)?);
        }
        Ok(Permissions { mode: decision.mode, uid, gid, mtime: whole_seconds(entry.mtime) })
    }

    /// Lists the target anew.
    fn look(&self, monitor: &dyn Monitor) -> Result<(), Error> {
        let opened = open_both(&self.session, &self.root)?;
        let looked = look(&self.session, &self.root, &self.options, opened, &self.names, monitor)?;
        *locked(&self.looked) = Some(looked);
        Ok(())
    }

    fn diff(&self, source: &Arc<Tree>, monitor: &dyn Monitor) -> Result<Plan, Error> {
        let source = Arc::new(as_held(source)?);
        let target_problem = |reason: String| Error::Refused { by: "the receiver".into(), reason };
        for entry in source.entries() {
            if entry.path.components().any(|name| name == STATE.as_bytes()) {
                let reason = format!("'{}' lies in the directory that lockstep keeps for itself", entry.path);
                return Err(target_problem(reason));
            }
        }
        if locked(&self.looked).is_none() {
            self.look(monitor)?;
        }
        let looked = locked(&self.looked).take();
        let Looked { manifest: old_manifest, digest: old_digest, listed } = looked.ok_or_else(|| self.session.odd())?;
        for problem in &listed.problems {
            // It is looked at for comparison; whether it matters is found out when it is to be changed.
            monitor.event(Event::Problem(&Problem { severity: Severity::Skipped, ..problem.clone() }));
        }
        let links = (&listed.shared, listed.tells_links);
        let mut entries = listed.entries;
        entries.sort_unstable_by(|a, b| a.path.cmp(&b.path));
        let target = Tree::new(entries).map_err(|error| target_problem(error.to_string()))?;
        let mut target = vouched(target, &old_manifest, true).map_err(|error| target_problem(error.to_string()))?;
        adopt::adopt(self, &source, &mut target)?;
        let wanted = self.desired(&source)?;
        let compare = Compare { checksum: self.options.checksum, whole_seconds: true, ..Compare::default() };
        let mut plan = diff(&source, &target, &|index, _| wanted[index].clone(), compare);
        ask_for_recent(&source, &target, &old_manifest, &mut plan);
        if let Some(keep) = self.options.trash_seconds.filter(|_| !self.options.dry_run) {
            trash::collect(self, keep, monitor)?;
        }
        let spreads = !self.options.dry_run
            && stage::prepare(self, &source, &mut plan, monitor).map_err(|error| self.explained(error))?;
        let alike = Arc::new(alike::find(self, &source, &target, &old_manifest, links, &mut plan)?);
        let (planned, state) = (plan.clone(), State::default());
        *self.state() = State { source, target, plan: planned, old_manifest, old_digest, spreads, alike, ..state };
        Ok(plan)
    }

    /// The command that takes content over the connection with this number, where the account runs commands and there is
    /// enough to send.
    pub(super) fn bulk(&self, connection: usize) -> Option<Starting> {
        // What it writes is brought to the disk by a command too.
        if !self.syncs || !is_plain(&self.staging) || !self.state().is_much(self.much) {
            return None;
        }
        // The one that is there already need not be waited for. Another will be there when there is something to hash.
        let shell = if connection == 0 { self.shell().take() } else { None };
        let (lanes, staging) = (Arc::clone(&self.lanes), self.staging.clone());
        let start = move || {
            let shell = shell.map_or_else(|| Shell::start(&*lanes.remote, connection), Ok)?;
            Bulk::start(shell, &lanes, &staging)
        };
        std::thread::Builder::new().name("bulk".to_owned()).spawn(start).ok()
    }

    /// What each entry of the source is to have, with owners named as the target's are.
    fn desired(&self, source: &Tree) -> Result<Vec<Desired>, Error> {
        let permissions: Vec<Permissions> =
            source.entries().iter().map(|entry| self.permissions(entry)).collect::<Result<_, _>>()?;
        let mut names = locked(&self.names);
        let users = permissions.iter().filter_map(|wanted| wanted.uid).collect();
        let groups = permissions.iter().filter_map(|wanted| wanted.gid).collect();
        names.learn(&self.session, &users, &groups)?;
        let desired = permissions.iter().map(|wanted| Desired {
            mode: wanted.mode,
            owner: wanted.uid.map(|uid| names.user(uid)),
            group: wanted.gid.map(|gid| names.group(gid)),
            acl_differs: false,
        });
        Ok(desired.collect())
    }
}
