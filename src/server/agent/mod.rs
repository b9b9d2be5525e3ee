//! The agent: lockstep's extension requests, adapted to a [`Target`] or a [`Source`].
//!
//! What always holds: nothing of a client's message is used before its bounds are checked; messages of one file are
//! handled in order, by one worker; a message that breaks the rules has no effect, and nothing of its run is published:
//! every later message is answered like it, what was staged is removed, and the audit log says why.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::JoinHandle;

use crossbeam_channel::{Sender, bounded, unbounded};

use super::gate::{self, Need};
use super::ports::{self, Ports};
use crate::config::Rights;
use crate::endpoint::{Error, Source, Target};
use crate::manifest::Tree;
use crate::wire::extension::{self, DOMAIN, Fields, Message, NAMES, VERSION, WireError};

mod ahead;
mod comparing;
mod control;
mod limits;
mod reading;
mod runs;
mod veil;
mod writing;

pub use limits::Limits;
pub use runs::set_origin;
pub use veil::Veil;

use control::Control;
use limits::{Held, OpenFiles};

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

#[cfg(test)]
mod ahead_tests;
#[cfg(test)]
mod comparing_tests;
#[cfg(test)]
mod tests;
