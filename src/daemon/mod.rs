//! Keeps directories in step with their targets by itself: notices what changed, waits until it is finished, sends it to every
//! target at that one's own pace, and says how things stand.
//!
//! What always holds: what is noticed only says where to look; what is sent is what a scan finds. A target that is slow or
//! gone holds up no other one. Nothing is forgotten that was not published: after any doubt everything is compared.

use std::fs::File;
use std::io::{Read as _, Seek as _, Write as _};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustix::fs::FlockOperation;
use serde_json::{Value, json};

use crate::config::Config;
use crate::endpoint::{Source, Target};
use crate::error::{Exit, shown};
use crate::monitor::Monitor;

pub mod backoff;
mod control;
mod early;
pub mod feed;
pub mod fetch;
pub mod filesystem;
mod follow;
pub mod history;
pub mod http;
mod ignores;
mod job;
mod look;
pub mod metrics;
mod mounts;
pub mod page;
mod paused;
mod pending;
mod polling;
mod recent;
mod run;
pub mod samples;
mod settle;
mod shows;
pub mod status;
mod tally;
mod target;
mod tell;
mod temporary;
pub mod units;
mod watch;
pub mod words;
mod writers;

use control::Control;
use job::JobThreads;
use recent::Recent;
use shows::Shows;
use status::{FORMAT, SourceCpu, Status};
use tell::Teller;

/// How long a stop waits for what goes on.
const GRACE: Duration = Duration::from_secs(10);

/// Why a run failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trouble {
    /// In words, with what to do where that is known.
    pub message: String,
    /// The exit status that a push would end with.
    pub exit: Exit,
}

/// How a target is reached.
pub trait Connect: Send + Sync {
    /// Opens what the configuration calls `target`, over so many connections where that is said.
    ///
    /// # Errors
    /// [`Trouble`].
    fn target(&self, target: &str, connections: Option<u8>, monitor: &dyn Monitor) -> Result<Box<dyn Target>, Trouble>;

    /// Opens a source of another machine, likewise.
    ///
    /// # Errors
    /// [`Trouble`].
    fn source(&self, source: &str, connections: Option<u8>, monitor: &dyn Monitor) -> Result<Box<dyn Source>, Trouble>;

    /// A run with this target or source failed: what was kept of a connection to it is not to be used again.
    fn forget(&self, place: &str);
}

/// Where a daemon keeps what it knows, and where it is asked.
#[derive(Debug, Clone)]
pub struct Places {
    /// Its state directory, which is made where it is missing.
    pub state: PathBuf,
    /// The control socket.
    pub socket: PathBuf,
}

/// What keeps a daemon from starting.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum DaemonError {
    #[error("cannot use '{}'", shown(path))]
    Place { path: PathBuf, source: std::io::Error },
    #[error(
        "another daemon (process {holder}) works on '{}'; end it first, or give this one a state of its own",
        shown(state)
    )]
    Running { state: PathBuf, holder: String },
    #[error("cannot listen on the control socket '{}'", shown(path))]
    Socket { path: PathBuf, source: std::io::Error },
    #[error("cannot serve the page on '{address}'")]
    Listen { address: std::net::SocketAddr, source: std::io::Error },
    #[error("cannot start a thread")]
    Thread(#[source] std::io::Error),
    #[error(transparent)]
    Config(#[from] crate::config::ConfigError),
    #[error("the configuration '{}' has no [[job]], so that there is nothing to do", shown(.0))]
    NoJob(PathBuf),
}

/// Seconds since 1970.
pub(crate) fn clock() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// What to do about a failure, by the kind of it.
fn remedy(exit: Exit) -> Option<String> {
    let words = match exit {
        Exit::Trust => {
            "see that the host key is known and the login is accepted: 'lockstep keys scan-host' and 'lockstep keys enroll'"
        }
        Exit::Usage => "put the configuration right, then reload it",
        Exit::Io => "look at the disk and the permissions that the message names",
        Exit::Incomplete => "see what the message says of the path; the rest is tried again by itself",
        _ => return None,
    };
    Some(words.to_owned())
}

/// A running daemon.
pub struct Daemon {
    shared: Arc<Shared>,
    control: Option<Control>,
    shows: Shows,
    _lock: File,
}

struct Shared {
    started: u64,
    places: Places,
    connect: Arc<dyn Connect>,
    recent: Arc<Recent>,
    teller: Teller,
    running: Mutex<Running>,
    /// A reload that somebody asked for by the socket.
    reload_wanted: AtomicBool,
}

struct Running {
    config: Config,
    config_error: Option<String>,
    jobs: Vec<JobThreads>,
}

impl Shared {
    fn running(&self) -> MutexGuard<'_, Running> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn status(&self) -> Status {
        let running = self.running();
        Status {
            format: FORMAT.to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            host: rustix::system::uname().nodename().to_string_lossy().into_owned(),
            pid: std::process::id(),
            started: self.started,
            now: clock(),
            config: shown(&running.config.path).to_string(),
            config_error: running.config_error.clone(),
            jobs: running.jobs.iter().map(JobThreads::status).collect(),
            recent: self.recent.all(),
            source_cpu: SourceCpu::spent(),
        }
    }

    fn answer(&self, request: &Value) -> Result<Value, String> {
        let named = request["job"].as_str();
        match request["request"].as_str() {
            Some("status") => Ok(json!({ "status": self.status() })),
            Some("pause") => self.pause(named, true),
            Some("resume") => self.pause(named, false),
            Some("now") => self.each(named, &JobThreads::hurry),
            Some("reload") => {
                self.reload_wanted.store(true, Ordering::SeqCst);
                Ok(json!({ "done": true }))
            }
            Some(other) => Err(format!("there is no request '{}'", crate::error::Escaped(other.as_bytes()))),
            None => Err("the line has no 'request'".to_owned()),
        }
    }

    fn pause(&self, named: Option<&str>, paused: bool) -> Result<Value, String> {
        let done = self.each(named, &|job| job.pause(paused))?;
        let running = self.running();
        let names = running.jobs.iter().filter(|job| job.is_paused()).map(|job| job.name().to_owned());
        paused::store(&self.places.state, &names.collect());
        Ok(done)
    }

    /// Does something to one job, or to all.
    fn each(&self, named: Option<&str>, act: &dyn Fn(&JobThreads)) -> Result<Value, String> {
        let running = self.running();
        let chosen: Vec<&JobThreads> =
            running.jobs.iter().filter(|job| named.is_none_or(|name| job.name() == name)).collect();
        if chosen.is_empty() {
            let known: Vec<String> = running.jobs.iter().map(|job| job.name().to_owned()).collect();
            let name = named.unwrap_or_default();
            let near = crate::config::meant(name, &known);
            return Err(format!("there is no job '{}'{near}", crate::error::Escaped(name.as_bytes())));
        }
        chosen.iter().for_each(|job| act(job));
        Ok(json!({ "jobs": chosen.iter().map(|job| job.name()).collect::<Vec<_>>() }))
    }
}

impl Daemon {
    /// Starts the jobs of a configuration.
    ///
    /// # Errors
    /// [`DaemonError`]; nothing runs then.
    pub fn start(config: Config, places: Places, connect: Arc<dyn Connect>) -> Result<Daemon, DaemonError> {
        if config.jobs.is_empty() {
            return Err(DaemonError::NoJob(config.path));
        }
        for directory in [Some(places.state.as_path()), places.socket.parent()].into_iter().flatten() {
            let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(directory);
            made.map_err(|source| DaemonError::Place { path: directory.to_owned(), source })?;
        }
        let lock = lock(&places.state)?;
        let shared = Arc::new(Shared {
            started: clock(),
            places: places.clone(),
            connect,
            recent: Arc::new(Recent::open(&places.state)),
            teller: Teller::start().map_err(DaemonError::Thread)?,
            running: Mutex::new(Running { config: Config::default(), config_error: None, jobs: Vec::new() }),
            reload_wanted: AtomicBool::new(false),
        });
        let watched = Arc::clone(&shared);
        let shows = Shows::start(Arc::new(move || watched.status())).map_err(DaemonError::Thread)?;
        let daemon = Daemon { control: None, shows, _lock: lock, shared };
        daemon.take(config)?;
        let answering = Arc::clone(&daemon.shared);
        let control = Control::listen(&places.socket, Arc::new(move |request| answering.answer(request)));
        let control = control.map_err(|source| DaemonError::Socket { path: places.socket, source })?;
        Ok(Daemon { control: Some(control), ..daemon })
    }

    /// Puts a configuration in force: jobs that are as they were go on, others end and begin.
    ///
    /// # Errors
    /// [`DaemonError`] when it cannot be; then what ran goes on.
    pub fn take(&self, config: Config) -> Result<(), DaemonError> {
        if config.jobs.is_empty() {
            return Err(DaemonError::NoJob(config.path));
        }
        // What cannot be listened on is known before a job ends.
        let shown = self.shows.prepare(&config.daemon);
        let shown = shown.map_err(|(address, source)| DaemonError::Listen { address, source })?;
        let mut running = self.shared.running();
        let mut jobs = Vec::with_capacity(config.jobs.len());
        let mut before = std::mem::take(&mut running.jobs);
        let paused = paused::load(&self.shared.places.state);
        for job in &config.jobs {
            let policy = job.policy.as_deref().map(|name| config.policy(name)).transpose();
            let policy = match policy {
                Ok(policy) => policy.unwrap_or_default(),
                Err(error) => {
                    before.extend(jobs);
                    running.jobs = before;
                    return Err(error.into());
                }
            };
            let same = before.iter().position(|other| other.is_of(job, &policy));
            jobs.push(match same {
                Some(at) => before.swap_remove(at),
                None => {
                    let new = JobThreads::new(job.clone(), policy);
                    if paused.contains(&job.name) {
                        new.pause(true);
                    }
                    new
                }
            });
        }
        // Those that go end before others begin: they may be of the same source and targets.
        before.iter().for_each(JobThreads::ask_to_stop);
        // All together, not each: the watchdog waits meanwhile.
        let until = Instant::now() + GRACE;
        for job in before {
            if !job.join(until) {
                tracing::warn!("a run of a job that is no more goes on for a while");
            }
        }
        let Shared { places, connect, recent, teller, .. } = &*self.shared;
        let started = jobs.iter_mut().try_for_each(|job| job.start(places, connect, recent, teller));
        // Where one cannot be started, the others run and are to be seen and stopped.
        running.jobs = jobs;
        started.map_err(DaemonError::Thread)?;
        (running.config, running.config_error) = (config, None);
        // Who is asked for the status just now waits for this lock.
        drop(running);
        self.shows.show(shown);
        Ok(())
    }

    /// Notes that a new configuration could not be read; the one of before stays in force.
    pub fn keep_configuration(&self, reason: String) {
        tracing::error!("the configuration of before stays in force: {reason}");
        self.shared.running().config_error = Some(reason);
    }

    /// How things stand.
    pub fn status(&self) -> Status {
        self.shared.status()
    }

    /// The same, for whoever shows it.
    pub fn watcher(&self) -> Arc<dyn Fn() -> Status + Send + Sync> {
        let shared = Arc::clone(&self.shared);
        Arc::new(move || shared.status())
    }

    /// Whether somebody asked by the socket to read the configuration anew, since this was asked last.
    pub fn reload_wanted(&self) -> bool {
        self.shared.reload_wanted.swap(false, Ordering::SeqCst)
    }

    /// What has to be done now and then: once a second is often enough.
    pub fn tick(&self) {
        self.shared.running().jobs.iter().for_each(JobThreads::keep_rate);
    }

    /// Whether every thread that should be there is.
    pub fn is_alive(&self) -> bool {
        self.shared.running().jobs.iter().all(JobThreads::is_alive)
    }

    /// Ends it: runs that go on end at a good point, and what they staged stays for the next start. True where all did in time.
    pub fn stop(mut self) -> bool {
        self.control = None;
        let jobs = std::mem::take(&mut self.shared.running().jobs);
        jobs.iter().for_each(JobThreads::ask_to_stop);
        let until = Instant::now() + GRACE;
        let late = jobs.into_iter().map(|job| job.join(until)).filter(|ended| !ended).count();
        late == 0
    }
}

/// Locks a state directory; an flock(2), which no crash leaves behind.
fn lock(state: &Path) -> Result<File, DaemonError> {
    let path = state.join("daemon.lock");
    let failed = |source| DaemonError::Place { path: path.clone(), source };
    let mut file = File::options().read(true).write(true).create(true).truncate(false).open(&path).map_err(failed)?;
    if rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
        let mut holder = String::new();
        let _ = file.take(32).read_to_string(&mut holder);
        let holder = holder.trim().parse::<u32>().map_or_else(|_| "unknown".to_owned(), |pid| pid.to_string());
        return Err(DaemonError::Running { state: state.to_owned(), holder });
    }
    let text = format!("{}\n", std::process::id());
    file.set_len(0).and_then(|()| file.rewind()).and_then(|()| file.write_all(text.as_bytes())).map_err(failed)?;
    Ok(file)
}
