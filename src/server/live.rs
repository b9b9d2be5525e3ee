//! The connections there are: who they are, what they do, and how they are ended from outside.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};

use russh::server::Msg;
use russh::{Channel, ChannelId};
use tokio::sync::watch;

use super::access::{Proof, ServeUser};
use super::channel::Shared;

/// Reasons that are kept of one connection.
const REFUSALS_MAX: usize = 10;
const REASON_MAX: usize = 400;

/// Text that a client had a hand in, cut off where it gets long: logs are not a client's to fill.
pub(super) fn short(text: &str, most: usize) -> String {
    let cut = text.char_indices().nth(most).map_or(text, |(at, _)| &text[..at]);
    if cut.len() < text.len() { format!("{cut}…") } else { text.to_owned() }
}

/// Who logged in, by what.
#[derive(Debug)]
pub(super) struct Login {
    pub(super) user: Arc<ServeUser>,
    pub(super) proof: Proof,
}

/// One connection.
pub(super) struct Live {
    pub(super) peer: SocketAddr,
    /// Set by the key that signed, and by nothing else.
    pub(super) login: OnceLock<Login>,
    /// Channels that are open and have no session yet.
    waiting: Mutex<HashMap<ChannelId, Channel<Msg>>>,
    sessions: Mutex<Vec<Weak<Shared>>>,
    /// When it began, logged in, or a session of it began or ended.
    last: Mutex<Instant>,
    refusals: Mutex<Vec<String>>,
    end: watch::Sender<Option<String>>,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Live {
    /// A connection that has not logged in.
    pub(super) fn new(peer: SocketAddr) -> Live {
        Live {
            peer,
            login: OnceLock::new(),
            waiting: Mutex::default(),
            sessions: Mutex::default(),
            last: Mutex::new(Instant::now()),
            refusals: Mutex::default(),
            end: watch::Sender::new(None),
        }
    }

    /// Ends it; the first reason stays.
    pub(super) fn end(&self, reason: &str) {
        self.end.send_if_modified(|end| end.is_none() && end.replace(reason.to_owned()).is_none());
    }

    /// Why it is to end.
    pub(super) async fn ended(&self) -> String {
        let mut end = self.end.subscribe();
        loop {
            if let Some(reason) = end.borrow_and_update().clone() {
                return reason;
            }
            if end.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }

    /// A channel was opened.
    pub(super) fn opened(&self, channel: Channel<Msg>) {
        locked(&self.waiting).insert(channel.id(), channel);
    }

    /// Takes a channel that waits for its session.
    pub(super) fn take(&self, id: ChannelId) -> Option<Channel<Msg>> {
        locked(&self.waiting).remove(&id)
    }

    /// How many channels wait for a session.
    pub(super) fn waiting(&self) -> usize {
        locked(&self.waiting).len()
    }

    /// Stops the work of its sessions. The library waits for whoever should read a channel: nobody is left to.
    pub(super) fn abandon(&self) {
        locked(&self.waiting).clear();
        locked(&self.sessions).iter().filter_map(Weak::upgrade).for_each(|session| session.abandon());
    }

    /// Something happened that is not a session's doing.
    pub(super) fn touch(&self) {
        *locked(&self.last) = Instant::now();
    }

    /// A session begins.
    pub(super) fn session(&self, session: &Arc<Shared>) {
        let mut sessions = locked(&self.sessions);
        sessions.retain(|session| session.strong_count() > 0);
        sessions.push(Arc::downgrade(session));
        drop(sessions);
        self.touch();
    }

    /// Keeps why something was refused, to be said once. Each reason once, and not without end.
    pub(super) fn refuse(&self, reason: &str) {
        let reason = short(reason, REASON_MAX);
        let mut refusals = locked(&self.refusals);
        if refusals.len() < REFUSALS_MAX && !refusals.contains(&reason) {
            refusals.push(reason);
        }
    }

    /// What was refused, if anything.
    pub(super) fn refusals(&self) -> Option<String> {
        Some(locked(&self.refusals).join("; ")).filter(|text| !text.is_empty())
    }

    fn quiet(&self, now: Instant) -> Duration {
        let own = now.saturating_duration_since(*locked(&self.last));
        let sessions = locked(&self.sessions);
        sessions.iter().filter_map(Weak::upgrade).map(|session| session.quiet(now)).fold(own, Duration::min)
    }

    /// Connections of one user from one address work together.
    fn together(&self, other: &Live) -> bool {
        let name = |live: &Live| live.login.get().map(|login| login.user.name.clone());
        self.peer.ip() == other.peer.ip() && name(self) == name(other)
    }
}

/// All of them.
#[derive(Default)]
pub(super) struct Registry(Mutex<HashMap<u64, Arc<Live>>>);

/// Takes a connection out of the registry when dropped.
pub(super) struct Registered<'r> {
    registry: &'r Registry,
    number: u64,
}

impl Registry {
    /// Takes a connection in.
    pub(super) fn add(&self, number: u64, live: &Arc<Live>) -> Registered<'_> {
        locked(&self.0).insert(number, Arc::clone(live));
        Registered { registry: self, number }
    }

    /// Those that are there now.
    pub(super) fn all(&self) -> Vec<Arc<Live>> {
        locked(&self.0).values().cloned().collect()
    }

    /// How long a client has done nothing, over all its connections.
    pub(super) fn quiet(&self, live: &Live) -> Duration {
        let now = Instant::now();
        let all = self.all();
        all.iter()
            .filter(|other| live.together(other))
            .map(|other| other.quiet(now))
            .fold(live.quiet(now), Duration::min)
    }
}

impl Drop for Registered<'_> {
    fn drop(&mut self) {
        locked(&self.registry.0).remove(&self.number);
    }
}
