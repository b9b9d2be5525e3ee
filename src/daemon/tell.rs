//! Tells others what happened: commands of the configuration, each as its arguments and never by a shell.
//!
//! They run one after the other on a thread of their own, so that none holds up a transfer; one that takes too long is ended.

use std::io::Write as _;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// How many events wait; further ones are dropped, and that is said.
const WAITING: usize = 1000;
/// A command has so long.
const PATIENCE: Duration = Duration::from_secs(60);
/// Paths beyond these are counted only.
const PATHS_MAX: usize = 1000;

/// Something that others may want to know.
#[derive(Debug, Clone)]
pub(super) struct Happening {
    /// The program and its arguments.
    pub(super) command: Vec<String>,
    /// What it is told on its standard input, as one line of JSON; `event`, `job` and `target` in its environment too.
    pub(super) what: Value,
}

impl Happening {
    /// What was sent is at as many targets as it has to be.
    pub(super) fn published(
        command: &[String],
        job: &str,
        source: &str,
        targets: &[&str],
        paths: Option<&[String]>,
    ) -> Happening {
        let shown = paths.map(|paths| &paths[..paths.len().min(PATHS_MAX)]);
        let what = json!({
            "event": "published",
            "job": job,
            "source": source,
            "targets": targets,
            "everything": paths.is_none(),
            "paths": shown.unwrap_or_default(),
            "paths_count": paths.map_or(0, <[String]>::len),
        });
        Happening { command: command.to_vec(), what }
    }

    /// A target began to fail.
    pub(super) fn failed(command: &[String], job: &str, source: &str, target: &str, error: &str) -> Happening {
        let what = json!({ "event": "failed", "job": job, "source": source, "target": target, "error": error });
        Happening { command: command.to_vec(), what }
    }
}

/// Where happenings go.
#[derive(Debug, Clone)]
pub(super) struct Teller(SyncSender<Happening>);

impl Teller {
    /// Starts the thread; it ends when the last clone is dropped.
    pub(super) fn start() -> std::io::Result<Teller> {
        let (sender, receiver) = sync_channel(WAITING);
        std::thread::Builder::new().name("tell".into()).spawn(move || tell(&receiver))?;
        Ok(Teller(sender))
    }

    /// Has it told; never waits.
    pub(super) fn tell(&self, happening: Happening) {
        match self.0.try_send(happening) {
            Ok(()) | Err(TrySendError::Disconnected(_)) => {}
            Err(TrySendError::Full(lost)) => {
                let event = lost.what["event"].as_str().unwrap_or_default();
                tracing::warn!(event, "not told: commands of the configuration are too slow, and {WAITING} wait");
            }
        }
    }
}

fn tell(receiver: &Receiver<Happening>) {
    for happening in receiver {
        let program = happening.command.first().cloned().unwrap_or_default();
        if let Err(reason) = run(&happening) {
            let job = happening.what["job"].as_str().unwrap_or_default();
            tracing::warn!(job, command = %crate::error::Escaped(program.as_bytes()), "was not told: {reason}");
        }
    }
}

fn run(happening: &Happening) -> Result<(), String> {
    let Some((program, arguments)) = happening.command.split_first() else { return Ok(()) };
    let text = |name: &str| happening.what[name].as_str().unwrap_or_default().to_owned();
    let mut child = Command::new(program)
        .args(arguments)
        .env("LOCKSTEP_EVENT", text("event"))
        .env("LOCKSTEP_JOB", text("job"))
        .env("LOCKSTEP_SOURCE", text("source"))
        .env("LOCKSTEP_TARGET", text("target"))
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|error| crate::error::in_words(&error))?;
    if let Some(mut input) = child.stdin.take() {
        let line = format!("{}\n", happening.what);
        // Whoever does not read what he is told does not want it. More than a pipe holds is written beside the wait.
        let write = move || drop(input.write_all(line.as_bytes()));
        let _ = std::thread::Builder::new().name("tell".into()).spawn(write);
    }
    wait(&mut child)
}

fn wait(child: &mut Child) -> Result<(), String> {
    let until = Instant::now() + PATIENCE;
    loop {
        match child.try_wait() {
            Ok(Some(status)) if status.success() => return Ok(()),
            Ok(Some(status)) => return Err(format!("it ended with {status}")),
            Ok(None) if Instant::now() < until => std::thread::sleep(Duration::from_millis(20)),
            Ok(None) => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(format!("it took longer than {} seconds, and was ended", PATIENCE.as_secs()));
            }
            Err(error) => return Err(crate::error::in_words(&error)),
        }
    }
}
