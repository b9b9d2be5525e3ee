//! `lockstep daemon`: keeps the jobs of the configuration in step by itself.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use super::arguments::Place;
use super::audit::place;
use super::connections::Connections;
use super::memory::Memory;
use super::transfer::{actor, config_file, load_config, state_directory};
use super::{Failure, login, notify, remote};
use crate::audit::{AuditError, AuditLog, OnFailure, Outcome};
use crate::codec::CompressOptions;
use crate::config::Config;
use crate::daemon::status::{State, Status, TargetStatus};
use crate::daemon::words;
use crate::daemon::{Connect, Daemon as Running, DaemonError, Places, Trouble};
use crate::endpoint::local::{LocalSource, LocalTarget};
use crate::endpoint::{Source, Target};
use crate::error::{Escaped, Exit, chain};
use crate::monitor::Monitor;
use crate::policy::PolicySpec;
use crate::root::Root;

/// Watch the sources of all jobs, and keep their targets in step
///
/// It stays in the foreground. SIGTERM and Ctrl-C end it: what is being published is, and what arrived of the rest is kept for
/// the next start. SIGHUP reads the configuration anew; the one of before stays where the new one is wrong.
#[derive(Debug, clap::Args)]
pub(super) struct Daemon {
    /// The configuration with the jobs [default: $LOCKSTEP_CONFIG, or /etc/lockstep/config.toml]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Say what is chosen and why
    #[arg(short, long)]
    verbose: bool,
    #[command(flatten)]
    reach: remote::Reach,
    #[command(flatten)]
    ssh: login::Ssh,
}

/// Connections as the command line and the user's ssh configuration say.
struct Dialler {
    reach: remote::Reach,
    ssh: login::Ssh,
    kept: Connections,
    state: PathBuf,
}

impl Connect for Dialler {
    fn target(&self, target: &str, connections: Option<u8>, monitor: &dyn Monitor) -> Result<Box<dyn Target>, Trouble> {
        match Place::parse(std::ffi::OsStr::new(target)).map_err(Dialler::failed)? {
            Place::Here(path) => Ok(Box::new(LocalTarget::new(&path, PolicySpec::default()))),
            Place::There(there) => remote::target(&there, &self.dial(connections), monitor).map_err(Dialler::failed),
        }
    }

    fn source(&self, source: &str, connections: Option<u8>, monitor: &dyn Monitor) -> Result<Box<dyn Source>, Trouble> {
        match Place::parse(std::ffi::OsStr::new(source)).map_err(Dialler::failed)? {
            Place::Here(path) => {
                let opened = LocalSource::new(&path, None);
                opened.map(|source| Box::new(source) as Box<dyn Source>).map_err(|error| Dialler::failed(error.into()))
            }
            Place::There(there) => remote::source(&there, &self.dial(connections), monitor).map_err(Dialler::failed),
        }
    }

    fn forget(&self, place: &str) {
        if let Ok(Place::There(there)) = Place::parse(std::ffi::OsStr::new(place)) {
            self.kept.forget(&there);
        }
    }
}

impl Dialler {
    fn dial(&self, count: Option<u8>) -> remote::Dial<'_> {
        let compress = CompressOptions::default();
        let state = Some(self.state.clone());
        remote::Dial { ssh: &self.ssh, reach: &self.reach, count, compress, kept: Some(&self.kept), state }
    }

    fn failed(failure: Failure) -> Trouble {
        Trouble { message: chain(&failure), exit: failure.exit() }
    }
}

/// What a signal asks for.
const RELOAD: u8 = 1;
const STOP: u8 = 2;

impl Daemon {
    pub(super) fn run(self) -> Result<Exit, Failure> {
        self.log();
        let file = config_file(self.config.as_deref());
        let config = load_config(self.config.as_deref())?;
        let places = places(&config)?;
        place::configure(&config.audit)?;
        let state = places.state.clone();
        let asked = signals()?;
        let (reach, ssh, kept) = (self.reach, self.ssh, Connections::default());
        let dialler = Arc::new(Dialler { reach, ssh, kept, state: state.clone() });
        let connect: Arc<dyn Connect> = Arc::clone(&dialler) as Arc<dyn Connect>;
        let running = Running::start(config, places, connect).map_err(|error| failure(&error))?;
        if let Err(error) = tell(&state, &file, Ok("started"))
            && crate::audit::settings().on_failure == OnFailure::Refuse
        {
            running.stop();
            return Err(error.into());
        }
        tracing::info!(config = %crate::error::shown(&file), "started");
        notify::ready();
        let (mut pulse, mut memory) = (notify::Pulse::new(), Memory::new());
        loop {
            match asked.swap(0, Ordering::SeqCst) {
                STOP => break,
                RELOAD => reload(&running, &file, &state),
                _ if running.reload_wanted() => reload(&running, &file, &state),
                _ => {}
            }
            running.tick();
            dialler.kept.sweep();
            if !running.is_alive() {
                let message = "a thread of the daemon ended that should not have; see the log".to_owned();
                return Err(Failure::Plain { exit: Exit::Io, message });
            }
            pulse.beat(|| in_a_line(&running.status()));
            memory.give_back();
            std::thread::sleep(Duration::from_millis(50));
        }
        notify::stopping();
        pulse.say("stopping: what is being published is, and what arrived of the rest is kept".into());
        tracing::info!("stopping");
        if !running.stop() {
            tracing::warn!("ended in the middle of a run; what arrived is kept, and the next start goes on from there");
        }
        Ok(Exit::Done)
    }

    fn log(&self) {
        let usual = if self.verbose { "lockstep=debug" } else { "lockstep=info" };
        let filter = tracing_subscriber::EnvFilter::try_from_env("LOCKSTEP_LOG")
            .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(usual));
        let colour = std::io::IsTerminal::is_terminal(&std::io::stderr());
        super::journal::begin(filter, colour, tracing_subscriber::layer::Identity::new());
    }
}

fn reload(running: &Running, file: &Path, state: &Path) {
    notify::reloading();
    let taken = Config::load(file).map_err(|error| chain(&error)).and_then(|config| {
        let settings = place::settings(&config.audit, None).map_err(|failure| chain(&failure))?;
        running.take(config).map_err(|error| chain(&error))?;
        crate::audit::configure(settings);
        Ok(())
    });
    let told = tell(state, file, taken.as_ref().map(|()| "read anew").map_err(String::as_str));
    if let Err(error) = told {
        tracing::error!(error = chain(&error), "the audit log of the daemon cannot be written");
    }
    match taken {
        Ok(()) => tracing::info!(config = %crate::error::shown(file), "read anew"),
        Err(reason) => running.keep_configuration(reason),
    }
    notify::ready();
}

/// Tells the log in the state directory which configuration is in force, or why one is not.
fn tell(state: &Path, file: &Path, how: Result<&str, &str>) -> Result<(), AuditError> {
    let (result, why) = match how {
        Ok(why) => (Outcome::Success, why.to_owned()),
        Err(reason) => (Outcome::Failure, format!("not taken: {reason}")),
    };
    let record = place::configuration(file, result, &why, actor());
    AuditLog::open(&Root::open(state)?)?.append_last([record]).map(drop)
}

/// How things stand, for `systemctl status`: the worst first, and of a failure one example.
fn in_a_line(status: &Status) -> String {
    let mut parts = Vec::new();
    if let Some(reason) = &status.config_error {
        parts.push(format!("the configuration of before stays in force: {reason}"));
    }
    let targets = || status.jobs.iter().flat_map(|job| job.targets.iter().map(move |target| (job, target)));
    let count = |wanted: &dyn Fn(&TargetStatus) -> bool| targets().filter(|(_, target)| wanted(target)).count();
    let in_step = targets().filter(|(job, target)| words::level(job, target) == words::Level::InStep).count();
    parts.push(format!("in step: {in_step} of {} targets", targets().count()));
    for state in State::ALL.into_iter().filter(|state| *state != State::Idle) {
        match count(&|target| target.state == state) {
            0 => {}
            some => parts.push(format!("{}: {some}", state.name())),
        }
    }
    let name = |text: &str| Escaped(text.as_bytes()).to_string();
    let halted = status.jobs.iter().find_map(|job| Some((&job.name, job.halted.as_ref()?)));
    let failing = targets().find_map(|(job, target)| Some((job, target, target.last_error.as_ref()?)));
    if let Some((job, trouble)) = halted {
        parts.push(format!("job {}: {}", name(job), trouble.message));
    } else if let Some((job, target, trouble)) = failing {
        parts.push(format!("{} to {}: {}", name(&job.name), name(&target.target), trouble.message));
    }
    parts.join("; ")
}

fn failure(error: &DaemonError) -> Failure {
    let exit = match error {
        DaemonError::Config(_) | DaemonError::NoJob(_) => Exit::Usage,
        DaemonError::Running { .. } => Exit::TryAgain,
        _ => Exit::Io,
    };
    Failure::Plain { exit, message: chain(error) }
}

/// A directory of systemd's, by its variable; the first where there are several.
fn given(variable: &str) -> Option<PathBuf> {
    let value = std::env::var(variable).ok()?;
    value.split(':').next().filter(|path| path.starts_with('/')).map(PathBuf::from)
}

/// The state directory of the daemon of this configuration.
pub(super) fn state_of(config: &Config) -> Result<PathBuf, Failure> {
    let state = config.daemon.state.clone().or_else(|| given("STATE_DIRECTORY")).or_else(state_directory);
    state.ok_or_else(|| Failure::usage("there is no home directory to keep state in; name one: [daemon] state"))
}

fn places(config: &Config) -> Result<Places, Failure> {
    Ok(Places { state: state_of(config)?, socket: super::control::socket_of(config)? })
}

/// Listens for the signals that ask for something.
fn signals() -> Result<Arc<AtomicU8>, Failure> {
    use tokio::signal::unix::{SignalKind, signal};
    let failed = |error: std::io::Error| Failure::Plain {
        exit: Exit::Io,
        message: format!("cannot listen for signals: {error}"),
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(failed)?;
    let asked = Arc::new(AtomicU8::new(0));
    let heard = Arc::clone(&asked);
    let (mut interrupt, mut terminate, mut hangup) = {
        let _guard = runtime.enter();
        let listen = |kind| signal(kind).map_err(failed);
        (listen(SignalKind::interrupt())?, listen(SignalKind::terminate())?, listen(SignalKind::hangup())?)
    };
    let listen = move || {
        runtime.block_on(async {
            let mut stops = 0;
            loop {
                let wish = tokio::select! {
                    _ = interrupt.recv() => STOP,
                    _ = terminate.recv() => STOP,
                    _ = hangup.recv() => RELOAD,
                };
                // A reload does not put a stop off; and who asks a second time means at once.
                stops += u32::from(wish == STOP);
                if stops > 1 {
                    std::process::exit(Exit::Terminated.code().into());
                }
                heard.fetch_max(wish, Ordering::SeqCst);
            }
        });
    };
    std::thread::Builder::new().name("signals".into()).spawn(listen).map_err(failed)?;
    Ok(asked)
}
