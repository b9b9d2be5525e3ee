//! What a daemon shows without being asked by its socket: the page, the file of metrics, and the samples that the page is drawn from.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::http::{self, Server, Watcher};
use super::metrics;
use super::samples::History;
use crate::config::Daemon as Settings;
use crate::error::{in_words, shown};

const SAMPLE: Duration = Duration::from_secs(10);
const WRITE: Duration = Duration::from_secs(15);

/// It ends when this is dropped.
pub(super) struct Shows {
    watcher: Arc<Watcher>,
    history: Arc<History>,
    page: Mutex<Page>,
    ticking: Arc<Ticking>,
    thread: Option<JoinHandle<()>>,
}

type Page = Option<(SocketAddr, Server)>;

/// What is shown from now on; a page that was to be kept as it is needs no other server.
pub(super) struct Prepared {
    page: Option<Page>,
    metrics_file: Option<PathBuf>,
}

#[derive(Default)]
struct Ticking {
    inner: Mutex<Inner>,
    woken: Condvar,
}

#[derive(Default)]
struct Inner {
    metrics_file: Option<PathBuf>,
    stop: bool,
    /// The file was asked for just now.
    fresh: bool,
}

impl Ticking {
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Shows {
    /// Begins to take samples; nothing is shown yet.
    ///
    /// # Errors
    /// When no thread can be started.
    pub(super) fn start(watcher: Arc<Watcher>) -> std::io::Result<Shows> {
        let history = Arc::new(History::new());
        let ticking = Arc::new(Ticking::default());
        let tick = {
            let (watcher, history, ticking) = (Arc::clone(&watcher), Arc::clone(&history), Arc::clone(&ticking));
            move || tick(&*watcher, &history, &ticking)
        };
        let thread = Some(std::thread::Builder::new().name("samples".into()).spawn(tick)?);
        Ok(Shows { watcher, history, page: Mutex::default(), ticking, thread })
    }

    /// Listens where the configuration says, before anything else is changed.
    ///
    /// # Errors
    /// With the address that cannot be listened on; what was shown before is.
    pub(super) fn prepare(&self, settings: &Settings) -> Result<Prepared, (SocketAddr, std::io::Error)> {
        let now = self.page.lock().unwrap_or_else(PoisonError::into_inner).as_ref().map(|(address, _)| *address);
        let page = match settings.listen {
            same if same == now => None,
            None => Some(None),
            Some(address) => {
                let server = http::serve(address, Arc::clone(&self.watcher), Arc::clone(&self.history));
                let server = server.map_err(|error| (address, error))?;
                tracing::info!(address = %server.address(), "serving the page and the metrics");
                Some(Some((address, server)))
            }
        };
        Ok(Prepared { page, metrics_file: settings.metrics_file.clone() })
    }

    /// Shows from now on what was prepared.
    pub(super) fn show(&self, prepared: Prepared) {
        if let Some(page) = prepared.page {
            let before = std::mem::replace(&mut *self.page.lock().unwrap_or_else(PoisonError::into_inner), page);
            drop(before);
        }
        let mut inner = self.ticking.inner();
        inner.metrics_file = prepared.metrics_file;
        inner.fresh = true;
        self.ticking.woken.notify_all();
    }
}

impl Drop for Shows {
    fn drop(&mut self) {
        self.ticking.inner().stop = true;
        self.ticking.woken.notify_all();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn tick(watcher: &Watcher, history: &History, ticking: &Ticking) {
    let (mut sample, mut write) = (Instant::now() + SAMPLE, Instant::now() + WRITE);
    let mut told = false;
    loop {
        let mut inner = ticking.inner();
        while !inner.stop && !inner.fresh && Instant::now() < sample.min(write) {
            let wait = sample.min(write).saturating_duration_since(Instant::now());
            inner = ticking.woken.wait_timeout(inner, wait).map_or_else(|error| error.into_inner().0, |woken| woken.0);
        }
        if inner.stop {
            return;
        }
        let fresh = std::mem::take(&mut inner.fresh);
        let file = inner.metrics_file.clone();
        drop(inner);
        let (now, status) = (Instant::now(), watcher());
        if fresh || now >= sample {
            history.sample(&status);
            sample = now + SAMPLE;
        }
        if fresh || now >= write {
            write = now + WRITE;
            let Some(path) = file else { continue };
            match metrics::write_textfile(&path, &status) {
                Ok(()) => told = false,
                // Once: it is tried again every time.
                Err(error) if !told => {
                    told = true;
                    tracing::warn!("cannot write the metrics to '{}': {}", shown(&path), in_words(&error));
                }
                Err(_) => {}
            }
        }
    }
}
