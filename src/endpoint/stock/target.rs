//! A directory of a stock server as a target: compared, staged into, published to.
//!
//! The layout is that of a local target, in a staging area of its own: what is staged lies in
//! `.lockstep/staging/sftp/tree` of the root, pointers in `last` beside it. A root that is not there yet is made under a
//! hidden name beside its own and gets its name in the last step.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::list::list;
use super::lock::Lock;
use super::names::{Ids, Names};
use super::prove::Prover;
use super::session::{self, Session};
use super::shell::Shell;
use super::writer::StockWriter;
use super::{DIRECTORY, Lanes, Verify, at, kind_of, publish, stage, whole_seconds};
use crate::endpoint::local::POINTERS;
use crate::endpoint::{BeginOptions, CommitOptions, Committed, Error, Target, Writer};
use crate::error::Escaped;
use crate::filter::{Filter, FilterSpec};
use crate::manifest::{Content, Digest, Entry, Manifest, Timestamp, Tree};
use crate::monitor::{Event, Monitor};
use crate::path::RelPath;
use crate::plan::{Compare, Desired, Plan, diff};
use crate::policy::Policy;
use crate::scan::{LinkRule, ScanRule};
use crate::wire::sftp::packet;

pub(super) const STATE: &str = ".lockstep";
pub(super) const MANIFEST: &str = ".lockstep/manifest";
const STAGING: &str = ".lockstep/staging/sftp";
/// Where a local target stages; what an interrupted run of one had begun to publish is finished by it alone.
const FOREIGN_RECORD: &str = ".lockstep/staging/current/commit";
/// Threads that prove, at most: each has a command of its own, and sshd allows ten sessions a connection.
const PROVERS: usize = 4;

/// A directory of a stock server as a target.
pub struct StockTarget {
    lanes: Lanes,
    run: Mutex<Option<Arc<Run>>>,
}

/// Where a run works.
struct Place {
    root: Vec<u8>,
    rename_to: Option<Vec<u8>>,
}

/// One run, from `begin` to `commit` or `abort`.
pub(super) struct Run {
    pub(super) session: Arc<Session>,
    pub(super) root: Vec<u8>,
    /// The final path, while the root lies under its hidden name.
    pub(super) rename_to: Option<Vec<u8>>,
    /// Where things are staged.
    pub(super) staging: Vec<u8>,
    pub(super) options: BeginOptions,
    policy: Policy,
    pub(super) ids: Ids,
    pub(super) last: Filter,
    pub(super) names: Mutex<Names>,
    shell: Mutex<Option<Shell>>,
    pub(super) provers: Vec<Prover>,
    pub(super) lock: Mutex<Option<Lock>>,
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
    /// Files whose content is staged and proven.
    pub(super) staged: HashMap<u32, Digest>,
    /// Files whose content was found at the target.
    pub(super) kept: HashMap<u32, Digest>,
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
        StockTarget { lanes, run: Mutex::new(None) }
    }

    fn run(&self) -> Result<Arc<Run>, Error> {
        locked(&self.run).clone().ok_or_else(|| Error::Usage("no run has begun at this target".into()))
    }

    /// The root, or the hidden directory that will be it; `None` when it is not there and nothing may be made.
    fn open_root(&self, dry_run: bool) -> Result<Option<Place>, Error> {
        let (session, root) = (self.lanes.control(), &self.lanes.root);
        match session.stat(packet::STAT, &self.lanes.root_path())? {
            Ok(found) if kind_of(&found).is_none_or(|kind| kind == DIRECTORY) => {
                return Ok(Some(Place { root: root.clone(), rename_to: None }));
            }
            Ok(_) => return Err(Error::Usage(format!("{} is not a directory", self.describe()))),
            Err(refusal) if !refusal.is_missing() => return Err(session.refused("look at", root, &refusal)),
            Err(_) if dry_run => return Ok(None),
            Err(_) => {}
        }
        let slash = root.iter().rposition(|&byte| byte == b'/').unwrap_or(0);
        let (parent, name) = (&root[..slash], &root[slash + 1..]);
        if name == b".." || name == b"." {
            return Err(Error::Usage(format!("'{}' cannot be a target", self.describe())));
        }
        let above: Vec<&[u8]> =
            parent.iter().enumerate().skip(1).filter(|&(_, &byte)| byte == b'/').map(|(at, _)| &parent[..at]).collect();
        // Those that are there already are refused, and that is no fault.
        let _ = session.all(above.into_iter().chain([parent]).map(|path| session::mkdir(path, 0o755)))?;
        let hidden = [parent, b"/.", name, b".lockstep"].concat();
        make_private(session, &hidden)?;
        Ok(Some(Place { root: hidden, rename_to: Some(root.clone()) }))
    }
}

/// A directory of ours, which nobody else may enter. What has its name and is no directory, a link above all, is
/// refused.
fn make_private(session: &Session, path: &[u8]) -> Result<(), Error> {
    let made = session.order(session::mkdir(path, 0o700))?;
    let Err(refusal) = made else { return Ok(()) };
    match session.stat(packet::LSTAT, path)? {
        Ok(found) if kind_of(&found) == Some(DIRECTORY) => Ok(()),
        Ok(_) => Err(Error::Refused {
            by: session.client.host().to_owned(),
            reason: format!("'{}' is not a directory; look at it, then remove it", Escaped(path)),
        }),
        Err(_) => Err(session.refused("make the directory", path, &refusal)),
    }
}

impl Target for StockTarget {
    fn describe(&self) -> String {
        self.lanes.describe()
    }

    fn begin(&self, options: &BeginOptions, monitor: &dyn Monitor) -> Result<(), Error> {
        let usage = |error: &dyn std::error::Error| Error::Usage(crate::error::chain(error));
        let policy = Policy::compile(&options.policy).map_err(|error| usage(&error))?;
        if policy.grants_by_acl() {
            let reason = "a rule has ACL entries, which an SFTP server without lockstep cannot set; leave 'acl' out, or \
                          install lockstep there";
            return Err(Error::Refused { by: self.describe(), reason: reason.into() });
        }
        let rules = POINTERS.iter().map(|&name| name.to_owned()).chain(options.last.iter().cloned()).collect();
        let last = Filter::compile(&FilterSpec { rules, only: None }).map_err(|error| usage(&error))?;
        monitor.event(Event::Detail(&format!("{}: {}", self.describe(), self.lanes.limits())));
        let Some(Place { root, rename_to }) = self.open_root(options.dry_run)? else {
            // A dry run on nothing: compared with an empty directory that is never written to.
            *locked(&self.run) = None;
            return Ok(());
        };
        let session = Arc::clone(&self.lanes.sessions[0]);
        let mut lock = None;
        let mut shell = None;
        let mut provers = Vec::new();
        if self.lanes.verify != Verify::ReadBack {
            shell = self.start_shell(monitor)?;
        }
        if !options.dry_run {
            make_private(&session, &at(&root, STATE))?;
            let wait = Duration::from_secs(options.wait_seconds);
            lock = Some(Lock::take(&session, &at(&root, STATE), self.describe(), &options.actor, wait)?);
            let verify = if shell.is_some() { self.lanes.verify } else { Verify::ReadBack };
            for _ in 0..self.lanes.sessions.len().min(PROVERS) {
                provers.push(Prover::start(Arc::clone(&self.lanes.remote), self.lanes.lane(), verify)?);
            }
        }
        let run = Run {
            session,
            staging: at(&root, STAGING),
            root,
            rename_to,
            options: options.clone(),
            policy,
            ids: Ids::default(),
            last,
            names: Mutex::default(),
            shell: Mutex::new(shell),
            provers,
            lock: Mutex::new(lock),
            state: Mutex::default(),
        };
        if !options.dry_run {
            self.prepare(&run, monitor)?;
        }
        *locked(&self.run) = Some(Arc::new(run));
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
        Ok(Box::new(StockWriter::new(self.run()?, self.lanes.lane())))
    }

    fn commit(&self, options: &CommitOptions, monitor: &dyn Monitor) -> Result<Committed, Error> {
        let run = self.run()?;
        let committed = publish::commit(&run, options, monitor)?;
        *locked(&run.lock) = None;
        *locked(&self.run) = None;
        Ok(committed)
    }

    fn abort(&self) {
        if let Some(run) = locked(&self.run).take() {
            *locked(&run.lock) = None;
        }
    }

    fn verification(&self) -> String {
        let shell = locked(&self.run).as_ref().is_some_and(|run| locked(&run.shell).is_some());
        let _ = shell;
        "SHA-256 of what lies at the other end".into()
    }

    fn wire_bytes(&self) -> u64 {
        self.lanes.wire_bytes()
    }
}

impl StockTarget {
    fn start_shell(&self, monitor: &dyn Monitor) -> Result<Option<Shell>, Error> {
        let told =
            |text: &str| monitor.event(Event::Detail(&format!("{}: {text}", self.lanes.control().client.host())));
        let started = Shell::start(&*self.lanes.remote).and_then(|shell| {
            if shell.hashing().is_some() { Ok(shell) } else { Err("it has no openssl and no sha256sum".into()) }
        });
        match started {
            Ok(shell) => {
                told("what arrives is hashed there, by a command");
                Ok(Some(shell))
            }
            Err(reason) if self.lanes.verify == Verify::Exec => Err(Error::Usage(format!(
                "{} runs no command that hashes ({reason}); --verify read-back proves by reading back",
                self.lanes.control().client.host()
            ))),
            Err(reason) => {
                told(&format!("it runs no command that hashes ({reason}); what arrives is read back"));
                Ok(None)
            }
        }
    }

    /// Finishes or refuses what interrupted runs left, and makes the staging area.
    fn prepare(&self, run: &Run, monitor: &dyn Monitor) -> Result<(), Error> {
        let session = &run.session;
        if session.stat(packet::LSTAT, &at(&run.root, FOREIGN_RECORD))?.is_ok() {
            return Err(Error::Refused {
                by: self.describe(),
                reason:
                    "a run of lockstep's own server was interrupted there while it published; finish it by running \
                         lockstep there, with any source, before this way is used"
                        .into(),
            });
        }
        make_private(session, &at(&run.root, ".lockstep/staging"))?;
        make_private(session, &run.staging)?;
        if publish::recover(run)? {
            monitor.event(Event::Warning(&format!(
                "{}: an earlier run was interrupted while it published; it was finished first",
                self.describe()
            )));
            make_private(session, &run.staging)?;
        }
        Ok(())
    }
}

impl Run {
    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        locked(&self.state)
    }

    pub(super) fn shell(&self) -> MutexGuard<'_, Option<Shell>> {
        locked(&self.shell)
    }

    pub(super) fn is_last(&self, path: &RelPath) -> bool {
        !self.last.admits(path, false)
    }

    /// Where the content of a path is staged, below the staging area. Pointers lie apart: they are published by
    /// themselves.
    pub(super) fn staged_name(&self, path: &RelPath) -> Vec<u8> {
        let tree: &[u8] = if self.is_last(path) { b"last/" } else { b"tree/" };
        [tree, path.as_bytes()].concat()
    }

    /// The same, as the server knows it.
    pub(super) fn staged_path(&self, path: &RelPath) -> Vec<u8> {
        [&self.staging[..], b"/", &self.staged_name(path)].concat()
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
            uid = Some(self.ids.user(&self.session, self.shell().as_mut(), name)?.map_err(refused)?);
        }
        if let Some(name) = &decision.group {
            gid = Some(self.ids.group(&self.session, self.shell().as_mut(), name)?.map_err(refused)?);
        }
        Ok(Permissions { mode: decision.mode, uid, gid, mtime: whole_seconds(entry.mtime) })
    }

    fn diff(&self, source: &Arc<Tree>, monitor: &dyn Monitor) -> Result<Plan, Error> {
        let source = Arc::new(as_held(source)?);
        let target_problem = |reason: String| Error::Refused { by: "the receiver".into(), reason };
        for entry in source.entries() {
            if entry.path.components().next() == Some(STATE.as_bytes()) {
                let reason = format!("'{}' lies in the directory that lockstep keeps for itself", entry.path);
                return Err(target_problem(reason));
            }
        }
        let (old_manifest, old_digest) = publish::read_manifest(&self.session, &self.root, monitor)?;
        let filter =
            Filter::compile(&self.options.filter).map_err(|error| Error::Usage(crate::error::chain(&error)))?;
        let rule = ScanRule { filter, links: LinkRule::All, ignore_files: true, report_special: false };
        let listed = list(&self.session, &self.root, &rule, &mut locked(&self.names), monitor)?;
        for problem in &listed.problems {
            monitor.event(Event::Problem(problem));
        }
        let mut entries = listed.entries;
        entries.sort_unstable_by(|a, b| a.path.cmp(&b.path));
        let target = Tree::new(entries).map_err(|error| target_problem(error.to_string()))?;
        let target = vouched(target, &old_manifest.tree).map_err(|error| target_problem(error.to_string()))?;
        let wanted = self.desired(&source)?;
        let compare = Compare { checksum: self.options.checksum, whole_seconds: true, ..Compare::default() };
        let mut plan = diff(&source, &target, &|index, _| wanted[index].clone(), compare);
        if !self.options.dry_run {
            stage::prepare(self, &source, &mut plan)?;
        }
        *self.state() = State { source, target, plan: plan.clone(), old_manifest, old_digest, ..State::default() };
        Ok(plan)
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

/// The same tree with times that the server can hold.
fn as_held(source: &Tree) -> Result<Tree, Error> {
    let mut entries = source.entries().to_vec();
    for entry in &mut entries {
        entry.mtime = whole_seconds(entry.mtime);
    }
    Tree::new(entries).map_err(|error| Error::Usage(error.to_string()))
}

/// What was listed, with what the manifest knows of it: digests of files that still have their size and time, and
/// which names are of one file, which SFTP does not say.
pub(super) fn vouched(listed: Tree, manifest: &Tree) -> Result<Tree, crate::manifest::InvalidTree> {
    let same = |now: &Entry, then: &Entry| match (&now.content, &then.content) {
        (Content::File { size, .. }, Content::File { size: listed, .. }) => {
            size == listed && now.mtime.seconds == then.mtime.seconds
        }
        _ => false,
    };
    let mut entries = listed.entries().to_vec();
    for entry in &mut entries {
        let Some(then) = manifest.get(&entry.path) else { continue };
        match &then.content {
            Content::File { digest, .. } if same(entry, then) => {
                if let Content::File { digest: known, .. } = &mut entry.content {
                    *known = *digest;
                }
            }
            Content::HardLink { first } => {
                let first_then = manifest.get(first);
                let first_now = listed.get(first);
                let unchanged =
                    first_now.zip(first_then).is_some_and(|(now, then)| same(now, then) && same(entry, then));
                if unchanged {
                    entry.content = Content::HardLink { first: first.clone() };
                }
            }
            _ => {}
        }
    }
    Tree::new(entries)
}
