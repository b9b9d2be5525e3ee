//! Ctrl-C and SIGTERM: the first asks a run to end at a good point, the second ends it at once.

use std::io::IsTerminal as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

use super::Failure;
use crate::error::Exit;

/// Whether the user wants to stop.
#[derive(Debug, Clone, Default)]
pub(super) struct Stop {
    wanted: Arc<AtomicBool>,
    /// The exit status that says which signal came; 0 for none.
    status: Arc<AtomicU8>,
}

impl Stop {
    /// Listens for SIGINT, SIGTERM and SIGHUP from now on.
    pub(super) fn on_signals() -> Result<Stop, Failure> {
        use tokio::signal::unix::{SignalKind, signal};
        let failed = |error: std::io::Error| Failure::Plain {
            exit: Exit::Io,
            message: format!("listening for signals: {error}"),
        };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(failed)?;
        let stop = Stop::default();
        let heard = stop.clone();
        let (mut interrupt, mut terminate, mut hangup) = {
            let _guard = runtime.enter();
            let listen = |kind| signal(kind).map_err(failed);
            (listen(SignalKind::interrupt())?, listen(SignalKind::terminate())?, listen(SignalKind::hangup())?)
        };
        let listening = std::thread::Builder::new().name("signals".into()).spawn(move || {
            runtime.block_on(async {
                loop {
                    let exit = tokio::select! {
                        _ = interrupt.recv() => Exit::Interrupted,
                        _ = terminate.recv() => Exit::Terminated,
                        _ = hangup.recv() => Exit::HungUp,
                    };
                    heard.hear(exit);
                }
            });
        });
        listening.map_err(failed)?;
        Ok(stop)
    }

    fn hear(&self, exit: Exit) {
        let terminal = std::io::stderr().is_terminal();
        if self.wanted.load(Ordering::Relaxed) {
            if terminal {
                eprint!("\r\x1b[K");
            }
            std::process::exit(exit.code().into());
        }
        self.status.store(exit.code(), Ordering::Relaxed);
        self.wanted.store(true, Ordering::Relaxed);
        if terminal {
            eprintln!("\r\x1b[Klockstep: stopping; once more to end at once");
        }
    }

    /// The flag that the engine looks at.
    pub(super) fn flag(&self) -> &Arc<AtomicBool> {
        &self.wanted
    }

    /// Whether a signal came.
    pub(super) fn wanted(&self) -> bool {
        self.wanted.load(Ordering::Relaxed)
    }

    /// The exit status of a command that was stopped; `None` while no signal came.
    pub(super) fn exit(&self) -> Option<Exit> {
        let status = self.status.load(Ordering::Relaxed);
        [Exit::Interrupted, Exit::Terminated, Exit::HungUp].into_iter().find(|exit| exit.code() == status)
    }

    /// Ends a command between two of its steps.
    pub(super) fn check(&self) -> Result<(), Failure> {
        match self.exit() {
            None => Ok(()),
            Some(exit) => Err(Failure::Plain { exit, message: "stopped by a signal".into() }),
        }
    }
}
