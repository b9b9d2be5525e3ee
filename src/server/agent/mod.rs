//! The agent: lockstep's extension requests, adapted to a [`Target`] or a [`Source`].
//!
//! What always holds: nothing of a client's message is used before its bounds are checked; messages of one file are
//! handled in order, by one worker; a message that breaks the rules has no effect, and nothing of its run is published:
//! every later message is answered like it, what was staged is removed, and the audit log says why.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::JoinHandle;

use crossbeam_channel::{Receiver, Sender, bounded, unbounded};

use super::gate::{self, Need};
use super::ports::{self, Ports};
use crate::config::{Right, Rights};
use crate::endpoint::{BeginOptions, CommitOptions, Error, Forbidden, ScanOptions, Source, Target};
use crate::manifest::Tree;
use crate::monitor::Monitor as _;
use crate::plan::{self, Action, Plan};
use crate::wire::entries::EntryList;
use crate::wire::extension::{self, DOMAIN, Fields, Message, NAMES, VERSION, WireError};
use crate::wire::notes::Notes;

mod ahead;
mod chunks;
mod comparing;
mod limits;
mod reading;
mod runs;
mod veil;
mod writing;

pub use limits::Limits;
pub use runs::set_origin;
pub use veil::Veil;

use limits::{Held, OpenFiles};

/// So many paths that could not be published are told.
const PROBLEMS_MAX: usize = 10_000;

/// Where answers go. Packets are whole, with their length in front.
pub trait Output: Send + Sync {
    /// Queues a packet; blocks while the queue is full.
    fn send(&self, packet: Vec<u8>);
    /// Whether nobody is there any more to be answered.
    fn is_gone(&self) -> bool;
    /// A request waits for its client to say something, or with `false` does so no longer: meanwhile nothing is done for it.
    fn rests(&self, rests: bool) {
        let _ = rests;
    }
}

/// Extension requests that a session hands on.
pub trait Extensions: Send + Sync {
    /// What to advertise: names and versions.
    fn names(&self) -> Vec<(&'static str, &'static str)>;
    /// Handles a request; its message is the name and what follows. `false` when the name is not known here.
    fn handle(&self, id: u32, message: Message, output: &Arc<dyn Output>) -> bool;
}

/// A target that workers share.
pub type SharedTarget = Arc<dyn Target + Send + Sync>;
/// A source that workers share.
pub type SharedSource = Arc<dyn Source + Send + Sync>;

/// Opens one side at the root that a client names, or refuses.
pub type Opener<T> = Box<dyn Fn(&[u8]) -> Result<T, Error> + Send + Sync>;

/// Makes the two sides for the root that a client names, or refuses.
pub struct Factory {
    /// Opens a target.
    pub target: Opener<SharedTarget>,
    /// Opens a source.
    pub source: Opener<SharedSource>,
    /// What the client is not told.
    pub veil: Veil,
}

/// Requests that may take as long as it takes to hash a tree, or for another run to end. One is done at a time, and
/// nothing waits behind it.
const LONG: [&str; 4] = ["begin", "scan", "diff", "commit"];
const WORKERS: usize = 8;
const QUEUE: usize = 8;
/// Requests to read take no more than so many bytes while they wait, all of a run.
const QUEUED_MAX: usize = 64 << 20;

struct Job {
    name: &'static str,
    id: u32,
    payload: Message,
    output: Arc<dyn Output>,
    veil: Veil,
}

impl Job {
    /// What it takes while it waits.
    fn queued_bytes(&self) -> usize {
        self.payload.bytes().len() + 512
    }

    fn reply(&self, body: &[u8]) {
        self.output.send(extension::reply(self.id, body));
    }

    fn refuse(&self, failure: &Failure) {
        self.output.send(extension::status(self.id, failure.code, &self.veil.cover(&failure.message), failure.exit));
    }
}

/// What is said when a request fails.
#[derive(Debug, Clone)]
struct Failure {
    code: u32,
    message: String,
    exit: u8,
    /// The other end broke the rules of the protocol.
    breach: bool,
}

impl Failure {
    /// Nobody will read it.
    fn gone() -> Failure {
        Failure::new(7, "the client has gone".into(), 75)
    }

    fn new(code: u32, message: String, exit: u8) -> Failure {
        Failure { code, message, exit, breach: false }
    }

    fn breach(message: String) -> Failure {
        Failure { breach: true, ..Failure::new(5, message, 5) }
    }

    fn forbidden(reason: &str) -> Failure {
        Failure::new(3, format!("refused by the server: {reason}"), crate::error::Exit::Incomplete.code())
    }

    fn order(what: &str) -> Failure {
        Failure::breach(format!("the request is out of order: {what}"))
    }
}

impl From<WireError> for Failure {
    fn from(error: WireError) -> Self {
        Failure::breach(error.to_string())
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let code = if matches!(error, Error::Refused { .. }) { 3 } else { 4 };
        Failure::new(code, crate::error::chain(&error), error.exit().code())
    }
}

impl From<serde_json::Error> for Failure {
    fn from(error: serde_json::Error) -> Self {
        Failure { exit: 2, ..Failure::breach(format!("the options cannot be read: {error}")) }
    }
}

enum Side {
    Target(SharedTarget),
    Source(SharedSource),
}

/// One run, which several connections may work on.
struct Run {
    side: Side,
    tree: OnceLock<Arc<Tree>>,
    limits: Limits,
    open_files: OpenFiles,
    /// Files that a worker has in hand: no other takes one of them meanwhile, by whichever message.
    claimed: Mutex<HashSet<u32>>,
    /// What came before its turn, at all workers.
    ahead: ahead::Waiting,
    /// What a client that pulls is asked.
    comparing: Arc<comparing::Comparing>,
    /// The memory of the tree, where a client sent it.
    held: OnceLock<Held>,
    /// Why nothing of it is published.
    rejected: OnceLock<Failure>,
    queues: Mutex<Option<Vec<Sender<Job>>>>,
    /// Bytes of requests in the queues of a source, which nobody waits for to have room.
    queued: Arc<AtomicUsize>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Run {
    /// Whether the file at `index` was in nobody's hands; it is in the caller's from now on.
    fn claim(&self, index: u32) -> bool {
        locked(&self.claimed).insert(index)
    }

    fn release(&self, index: u32) {
        locked(&self.claimed).remove(&index);
    }

    fn start(self: &Arc<Self>) -> Result<(), Failure> {
        let mut queues = Vec::new();
        let more = usize::from(matches!(self.side, Side::Target(_)));
        for number in 0..WORKERS + more {
            // What a source waits for comes over the connection that its requests come over.
            let (sender, receiver) = if more == 0 { unbounded() } else { bounded(QUEUE) };
            let run = Arc::clone(self);
            let thread = std::thread::Builder::new()
                .name(format!("agent-{number}"))
                .spawn(move || match &run.side {
                    Side::Target(target) if number == WORKERS => writing::list_alike(&run, &**target, &receiver),
                    Side::Target(target) => writing::serve(&run, &**target, &receiver),
                    Side::Source(source) => reading::serve(&run, &**source, &receiver),
                })
                .map_err(|error| Failure::new(4, format!("start a thread: {error}"), 75))?;
            queues.push(sender);
            locked(&self.threads).push(thread);
        }
        *locked(&self.queues) = Some(queues);
        Ok(())
    }

    /// Gives a push up because its sender broke the rules. A failure of another kind is none of the run's.
    fn reject(&self, path: &[u8], failure: &Failure) {
        if let Side::Target(target) = &self.side
            && failure.breach
            && self.rejected.set(failure.clone()).is_ok()
        {
            target.reject(path, &failure.message);
        }
    }

    /// Fails once the run was rejected.
    fn is_good(&self) -> Result<(), Failure> {
        self.rejected.get().map_or(Ok(()), |failure| Err(failure.clone()))
    }

    /// Lets the workers finish what they have; no message is taken afterwards.
    fn stop(&self) {
        self.comparing.close();
        drop(locked(&self.queues).take());
        for thread in std::mem::take(&mut *locked(&self.threads)) {
            let _ = thread.join();
        }
    }
}

/// The agent of one connection.
pub struct Agent {
    control: Sender<Job>,
    /// A request is being done that may take long.
    busy: Arc<AtomicBool>,
    /// Whether further connections may work on its run.
    shared: bool,
    /// What it may listen on for those.
    ports: Option<Arc<Ports>>,
    rights: Rights,
    veil: Veil,
    run: Arc<Mutex<Option<Arc<Run>>>>,
    thread: Option<JoinHandle<()>>,
}

impl Agent {
    /// An agent that has no run yet. Its control thread ends, and its run is aborted, after it is dropped.
    pub fn new(factory: Arc<Factory>) -> Agent {
        Agent::limited(factory, Limits::default(), Rights::FULL)
    }

    /// The same with other bounds, for a client that may do what `rights` say.
    pub fn limited(factory: Arc<Factory>, limits: Limits, rights: Rights) -> Agent {
        let (control, jobs) = bounded(QUEUE);
        let run = Arc::new(Mutex::new(None));
        let shared = Arc::clone(&run);
        let busy = Arc::new(AtomicBool::new(false));
        let done = Arc::clone(&busy);
        let veil = factory.veil.clone();
        // Without the thread the channel is closed, and every request is refused.
        let thread = std::thread::Builder::new()
            .name("agent-control".to_owned())
            .spawn(move || Control::new(factory, shared, limits, rights).serve(&jobs, &done));
        Agent { control, busy, run, shared: true, ports: None, rights, veil, thread: thread.ok() }
    }

    /// Waits until what has arrived is stored and the run is given up. A process that ended before would lose what the
    /// next run could go on from, and would leave a full disk full.
    pub fn finish(self) {
        drop(self.control);
        if let Some(thread) = self.thread {
            let _ = thread.join();
        }
    }

    /// The only agent of its process: no other connection can find its run.
    #[must_use]
    pub fn alone(self) -> Agent {
        Agent { shared: false, ..self }
    }

    /// With a port for connections that can, if its client asks for one.
    #[must_use]
    pub fn with_ports(self, ports: Arc<Ports>) -> Agent {
        Agent { ports: Some(ports), ..self }
    }
}

fn need(name: &str) -> Option<Need> {
    gate::of_agent(name.strip_suffix(DOMAIN).unwrap_or(name))
}

impl Extensions for Agent {
    fn names(&self) -> Vec<(&'static str, &'static str)> {
        let offered = |name: &&str| match name.split('@').next() {
            Some("attach") => self.shared,
            Some("listen") => self.ports.is_some(),
            _ => true,
        };
        let allowed = |name: &&str| need(name).is_some_and(|need| need.allowed(self.rights));
        NAMES.iter().filter(|name| offered(name) && allowed(name)).map(|name| (*name, VERSION)).collect()
    }

    fn handle(&self, id: u32, message: Message, output: &Arc<dyn Output>) -> bool {
        let Ok(asked) = Fields(message.bytes()).string() else { return false };
        let Some(name) = NAMES.iter().find(|known| known.as_bytes() == asked) else { return false };
        let payload = message.skip(4 + name.len());
        let need = need(name);
        let name = name.strip_suffix(DOMAIN).unwrap_or(name);
        let job = Job { name, id, payload, output: Arc::clone(output), veil: self.veil.clone() };
        if let Some(need) = need.filter(|need| !need.allowed(self.rights)) {
            job.refuse(&Failure::forbidden(need.refusal(self.rights)));
            return true;
        }
        if name == "listen" {
            self.listen(&job);
            return true;
        }
        let data = matches!(
            name,
            "put"
                | "open"
                | "write"
                | "stripe"
                | "hole"
                | "copy"
                | "alike"
                | "finish"
                | "keep"
                | "discard"
                | "fetch"
                | "next"
                | "wants"
                | "parts"
        );
        // What stood in a queue behind a request that takes hours would keep the session from reading on, and so from
        // noticing that its client has gone.
        if !data && self.busy.load(Ordering::Acquire) {
            job.refuse(&Failure::order("the request before it is not done yet"));
            return true;
        }
        if LONG.contains(&name) {
            self.busy.store(true, Ordering::Release);
        }
        let sent = if data { self.route(job) } else { self.control.send(job).map_err(|error| error.0) };
        if let Err(job) = sent {
            job.refuse(&Failure::order("there is no run that takes it"));
        }
        true
    }
}

impl Agent {
    /// Opens a port for further connections of the run.
    fn listen(&self, job: &Job) {
        let listen = || {
            let ports = self.ports.as_ref().ok_or_else(|| Failure::order("it was not offered"))?;
            let mut fields = Fields(job.payload.bytes());
            let key =
                ports::key(fields.string()?).ok_or_else(|| Failure::breach("the key is none of Ed25519".into()))?;
            fields.end()?;
            let (port, host) = ports.listen(&key).map_err(|reason| Failure::new(4, reason, 75))?;
            let host = host.to_openssh().map_err(|error| Failure::new(4, error.to_string(), 75))?;
            let mut body = u32::from(port).to_be_bytes().to_vec();
            extension::put_string(&mut body, host.as_bytes());
            Ok(body)
        };
        match listen() {
            Ok(body) => job.reply(&body),
            Err(failure) => {
                if let Some(run) = locked(&self.run).as_ref() {
                    run.reject(b"", &failure);
                }
                job.refuse(&failure);
            }
        }
    }

    /// The index (of a file, or of a stream) decides the worker; in a `put` it is that of the first file.
    fn route(&self, job: Job) -> Result<(), Job> {
        let at = if job.name == "put" { 4 } else { 0 };
        let index = job.payload.bytes().get(at..).and_then(|rest| Fields(rest).u32().ok()).unwrap_or(0);
        let run = locked(&self.run).clone();
        if matches!(job.name, "wants" | "parts") {
            let Some(run) = run.filter(|run| matches!(run.side, Side::Source(_))) else { return Err(job) };
            let entry = run.tree.get().and_then(|tree| tree.entries().get(index as usize));
            match entry.is_some_and(|entry| entry.file().is_some()) {
                true => run.comparing.take(job),
                false => job.refuse(&WireError::Range("the index of a file").into()),
            }
            return Ok(());
        }
        // What lists for long has a worker of its own: content does not wait for it.
        let number = if job.name == "alike" { WORKERS } else { index as usize % WORKERS };
        let Some(run) = run else { return Err(job) };
        let queue = locked(&run.queues).as_ref().and_then(|queues| queues.get(number).cloned());
        let Some(queue) = queue else { return Err(job) };
        if matches!(run.side, Side::Source(_)) {
            let bytes = job.queued_bytes();
            if run.queued.fetch_add(bytes, Ordering::Relaxed) + bytes > QUEUED_MAX {
                run.queued.fetch_sub(bytes, Ordering::Relaxed);
                job.refuse(&WireError::Range("the number of requests that wait").into());
                return Ok(());
            }
        }
        queue.send(job).map_err(|error| error.0)
    }
}

/// What runs in order: everything but content.
struct Control {
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
    fn new(factory: Arc<Factory>, shared: Arc<Mutex<Option<Arc<Run>>>>, limits: Limits, rights: Rights) -> Control {
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

    fn serve(mut self, jobs: &Receiver<Job>, busy: &AtomicBool) {
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

#[cfg(test)]
mod ahead_tests;
#[cfg(test)]
mod comparing_tests;
#[cfg(test)]
mod tests;
