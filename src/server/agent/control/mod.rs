//! The requests of an agent that are done one after the other: everything but content.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use crossbeam_channel::Receiver;

use super::limits::{Held, Limits, OpenFiles};
use super::veil::Veil;
use super::{Factory, Failure, Job, LONG, Run, Side, ahead, locked, runs};
use crate::config::{Right, Rights};
use crate::endpoint::{BeginOptions, CommitOptions, Forbidden, ScanOptions};
use crate::manifest::Tree;
use crate::monitor::Monitor as _;
use crate::plan::{self, Action, Plan};
use crate::server::gate::Need;
use crate::wire::entries::EntryList;
use crate::wire::extension::{self, Fields, WireError};
use crate::wire::notes::Notes;

mod chunks;

/// So many paths that could not be published are told.
const PROBLEMS_MAX: usize = 10_000;

/// Does them.
pub(super) struct Control {
    factory: Arc<Factory>,
    shared: Arc<Mutex<Option<Arc<Run>>>>,
    /// Whether the run was begun here, not attached to.
    own: bool,
    ended: bool,
    limits: Limits,
    rights: Rights,
    entries: EntryList,
    held: Held,
    plan: Option<Plan>,
    problems: usize,
    scan_problems: Vec<crate::monitor::Problem>,
}

impl Control {
    pub(super) fn new(
        factory: Arc<Factory>,
        shared: Arc<Mutex<Option<Arc<Run>>>>,
        limits: Limits,
        rights: Rights,
    ) -> Control {
        Control {
            factory,
            shared,
            own: false,
            ended: false,
            limits,
            rights,
            entries: EntryList::new(limits.entries_bytes),
            held: Held::default(),
            plan: None,
            problems: 0,
            scan_problems: Vec::new(),
        }
    }

    pub(super) fn serve(mut self, jobs: &Receiver<Job>, busy: &AtomicBool) {
        while let Ok(job) = jobs.recv() {
            let answer = self.answer(&job);
            if LONG.contains(&job.name) {
                // Before the reply, after which the client may ask for the next.
                busy.store(false, Ordering::Release);
            }
            match answer {
                Ok(body) => job.reply(&body),
                Err(failure) => {
                    if let Some(run) = locked(&self.shared).as_ref() {
                        run.reject(b"", &failure);
                    }
                    job.refuse(&failure);
                }
            }
        }
        self.abort();
    }

    fn abort(&mut self) {
        let run = locked(&self.shared).take();
        if let Some(run) = run.filter(|_| self.own) {
            run.stop();
            if let (Side::Target(target), false) = (&run.side, self.ended) {
                target.abort();
            }
        }
        self.ended = true;
        self.entries = EntryList::new(0);
        self.held = Held::default();
    }

    fn answer(&mut self, job: &Job) -> Result<Vec<u8>, Failure> {
        if job.output.is_gone() {
            return Err(Failure::gone());
        }
        let output = Arc::clone(&job.output);
        let notes = Notes::until(move || output.is_gone());
        let mut fields = Fields(job.payload.bytes());
        if job.name != "abort"
            && let Some(run) = locked(&self.shared).as_ref()
        {
            run.is_good()?;
        }
        match job.name {
            "hello" => {
                let hello = serde_json::json!({
                    "versions": [1], "software": concat!("lockstep ", env!("CARGO_PKG_VERSION")), "codecs": crate::codec::NAMES,
                    "block_bytes": crate::endpoint::BLOCK_BYTES, "in_flight_bytes": 16 << 20,
                });
                let mut body = Vec::new();
                extension::put_string(&mut body, hello.to_string().as_bytes());
                Ok(body)
            }
            "begin" => {
                let root = fields.string()?;
                let mut wish: BeginOptions = serde_json::from_slice(fields.string()?)?;
                let wait_seconds = wish.wait_seconds.min(self.limits.wait.as_secs());
                let forbidden = Forbidden {
                    change: !Need::Change.allowed(self.rights),
                    remove: !self.removes(),
                    see: !self.rights.has(Right::List),
                };
                // Both say what is there.
                let reads = Need::Read.allowed(self.rights);
                let delta = wish.delta && reads;
                wish.append_only.retain(|_| reads);
                let options = BeginOptions { peer: true, forbidden, wait_seconds, delta, ..wish };
                self.must_be_free()?;
                let target = (self.factory.target)(root)?;
                target.begin(&options, &notes)?;
                let verification = target.verification();
                let mut body = self.adopt(Side::Target(target))?;
                extension::put_string(&mut body, verification.as_bytes());
                notes.put(&mut body, |text| job.veil.cover(text));
                Ok(body)
            }
            "scan" => {
                let root = fields.string()?;
                let options: ScanOptions = serde_json::from_slice(fields.string()?)?;
                // What is read here only grows when somebody here says so.
                let options = ScanOptions { append_only: Vec::new(), ..options };
                self.must_be_free()?;
                let source = (self.factory.source)(root)?;
                let scan = source.scan(&options, &notes)?;
                // What was not listed to its end is not to be used.
                if notes.stopped() {
                    return Err(Failure::gone());
                }
                let mut body = self.adopt(Side::Source(source))?;
                let run = self.run()?;
                body.extend_from_slice(&(scan.tree.entries().len() as u32).to_be_bytes());
                body.extend_from_slice(&(scan.problems.len() as u32).to_be_bytes());
                notes.put(&mut body, |text| job.veil.cover(text));
                let _ = run.tree.set(Arc::new(scan.tree));
                self.scan_problems = scan.problems;
                run.start()?;
                Ok(body)
            }
            "trail" => {
                let source = (self.factory.source)(fields.string()?)?;
                let mut body = Vec::new();
                extension::put_string(&mut body, &serde_json::to_vec(&source.trail()?)?);
                Ok(body)
            }
            "attach" => {
                self.must_be_free()?;
                let token: [u8; 16] = fields.bytes(16)?.try_into().map_err(|_| WireError::Short)?;
                *locked(&self.shared) =
                    Some(runs::find(&token).ok_or_else(|| Failure::order("no such run in this process"))?);
                Ok(Vec::new())
            }
            "entries" => {
                let run = self.run()?;
                if !self.own || run.tree.get().is_some() || !matches!(run.side, Side::Target(_)) {
                    return Err(Failure::order("the entries are complete"));
                }
                let mut raw = Vec::new();
                fields.frame(&mut raw)?;
                let read = self.entries.read(&raw).map_err(Failure::from);
                let read = read.and_then(|()| self.held.grow(self.entries.bytes(), self.limits.all_entries_bytes));
                // A list with a part missing is not to be gone on with, and its memory is for others.
                if let Err(failure) = read {
                    run.reject(b"", &failure);
                    self.abort();
                    return Err(failure);
                }
                Ok(Vec::new())
            }
            "diff" => self.diff(&notes, &job.veil),
            "plan" => self.plan_chunk(fields.u32()? as usize, fields.u32()? as usize),
            "list" => self.list_chunk(fields.u32()? as usize, &job.veil),
            "commit" => {
                let options: CommitOptions = serde_json::from_slice(fields.string()?)?;
                let run = self.run()?;
                let (Side::Target(target), true, true) = (&run.side, self.own && !self.ended, run.tree.get().is_some())
                else {
                    return Err(Failure::order("nothing to commit"));
                };
                run.stop();
                self.ended = true;
                let mut committed = target.commit(&options, &notes)?;
                let more = committed.problems.len().saturating_sub(PROBLEMS_MAX);
                if more > 0 {
                    // All of them might be no message any more, and what was published would be told as lost.
                    committed.problems.truncate(PROBLEMS_MAX);
                    committed.problems.push((".".to_owned(), format!("and {more} paths more")));
                }
                let mut body = Vec::new();
                extension::put_string(&mut body, &serde_json::to_vec(&committed)?);
                notes.put(&mut body, |text| job.veil.cover(text));
                Ok(body)
            }
            _ => {
                self.abort();
                Ok(Vec::new())
            }
        }
    }

    /// Who sees no names cannot know what a run would remove.
    fn removes(&self) -> bool {
        self.rights.has(Right::Delete) && self.rights.has(Right::List)
    }

    fn must_be_free(&self) -> Result<(), Failure> {
        if locked(&self.shared).is_some() || self.ended {
            Err(Failure::order("a run was begun already"))
        } else {
            Ok(())
        }
    }

    fn run(&self) -> Result<Arc<Run>, Failure> {
        locked(&self.shared).clone().ok_or_else(|| Failure::order("nothing was begun"))
    }

    fn adopt(&mut self, side: Side) -> Result<Vec<u8>, Failure> {
        let run = Arc::new(Run {
            side,
            tree: OnceLock::new(),
            limits: self.limits,
            open_files: OpenFiles::default(),
            claimed: Mutex::default(),
            ahead: ahead::Waiting::default(),
            comparing: Arc::default(),
            held: OnceLock::new(),
            rejected: OnceLock::new(),
            queues: Mutex::new(None),
            queued: Arc::default(),
            threads: Mutex::new(Vec::new()),
        });
        self.own = true;
        let mut body = Vec::new();
        extension::put_string(&mut body, &runs::register(&run));
        *locked(&self.shared) = Some(run);
        Ok(body)
    }

    fn diff(&mut self, notes: &Notes, veil: &Veil) -> Result<Vec<u8>, Failure> {
        let run = self.run()?;
        let (Side::Target(target), true, None) = (&run.side, self.own && !self.ended, run.tree.get()) else {
            return Err(Failure::order("nothing to compare"));
        };
        let entries = std::mem::replace(&mut self.entries, EntryList::new(0)).into_entries();
        let _ = run.held.set(std::mem::take(&mut self.held));
        let tree = Tree::new(entries).map_err(|error| Failure::breach(error.to_string()))?;
        let tree = Arc::new(tree);
        let mut plan = target.diff(&tree, notes)?;
        if !self.rights.has(Right::List) {
            // What there is beside what is sent is not told.
            (plan.removals, plan.target_entries) = (Vec::new(), 0);
        }
        if !Need::Read.allowed(self.rights) {
            // Nor what is in it: the digest of what lies there would say that.
            let compared = |action: &&mut Action| matches!(action.need, plan::Need::Compare { .. });
            plan.actions
                .iter_mut()
                .filter(compared)
                .for_each(|action| action.need = plan::Need::Content { resume_at: 0 });
        }
        if notes.stopped() {
            return Err(Failure::gone());
        }
        let _ = run.tree.set(tree);
        run.start()?;
        let mut body = plan.target_entries.to_be_bytes().to_vec();
        body.extend_from_slice(&(plan.actions.len() as u32).to_be_bytes());
        body.extend_from_slice(&(plan.removals.len() as u32).to_be_bytes());
        notes.put(&mut body, |text| veil.cover(text));
        self.plan = Some(plan);
        Ok(body)
    }
}
