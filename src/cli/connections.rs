//! Connections that outlive the run they were made for, so that the next one to the same host begins at once.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::remote::Destination;
use crate::endpoint::link::Way;
use crate::ssh::SshRemote;

/// How long one stays that nobody uses; what a run had of them beside the first goes sooner, since many may send to one host.
const IDLE_MAX: Duration = Duration::from_secs(600);
const FURTHER_IDLE_MAX: Duration = Duration::from_secs(10);
/// Who may log in, and where to, is asked anew after so long.
const AGE_MAX: Duration = Duration::from_secs(3600);

struct Kept {
    remote: Arc<SshRemote>,
    way: Way,
    made: Instant,
    used: Instant,
}

impl Kept {
    fn is_old(&self) -> bool {
        self.made.elapsed() > AGE_MAX || self.used.elapsed() > IDLE_MAX || self.remote.was_lost()
    }
}

type Host = (Option<String>, String);

/// What is connected, by user and host, with the way that led in.
#[derive(Default)]
pub(super) struct Connections(Mutex<HashMap<Host, Kept>>);

fn host(destination: &Destination) -> Host {
    (destination.user.clone(), destination.host.clone())
}

impl Connections {
    fn kept(&self) -> MutexGuard<'_, HashMap<Host, Kept>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is there for this host.
    pub(super) fn get(&self, destination: &Destination) -> Option<(Arc<SshRemote>, Way)> {
        let mut all = self.kept();
        let kept = all.get_mut(&host(destination)).filter(|kept| !kept.is_old())?;
        kept.used = Instant::now();
        Some((Arc::clone(&kept.remote), kept.way.clone()))
    }

    /// Keeps one that was made. Of two that were made at once the later stays.
    pub(super) fn keep(&self, destination: &Destination, remote: Arc<SshRemote>, way: Way) {
        let now = Instant::now();
        self.kept().insert(host(destination), Kept { remote, way, made: now, used: now });
    }

    /// The next run to this host logs in anew. Who uses the connection at this moment keeps it to its end.
    pub(super) fn forget(&self, destination: &Destination) {
        self.kept().remove(&host(destination));
    }

    /// Closes what nobody has used for long.
    pub(super) fn sweep(&self) {
        let mut all = self.kept();
        all.values().filter(|kept| kept.used.elapsed() > FURTHER_IDLE_MAX).for_each(|kept| kept.remote.keep_first());
        let old: Vec<Host> = all.iter().filter(|(_, kept)| kept.is_old()).map(|(host, _)| host.clone()).collect();
        let closed: Vec<Kept> = old.iter().filter_map(|host| all.remove(host)).collect();
        drop(all);
        drop(closed);
    }
}
