//! The one connection of a process: its channels and sessions, how long they did nothing, and its end.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use russh::server::Msg;
use russh::{Channel, ChannelId};
use tokio::sync::watch;

use crate::server::channel::Shared;
use crate::server::ending::Ending;

/// See the module.
pub(in crate::server) struct Own {
    /// Channels that are open and have no session yet.
    waiting: Mutex<HashMap<ChannelId, Channel<Msg>>>,
    sessions: Mutex<Vec<Weak<Shared>>>,
    /// When it began, logged in, or a session of it began or ended.
    last: Mutex<Instant>,
    /// How many sessions there may be.
    channels: AtomicUsize,
    /// How many there are.
    running: watch::Sender<usize>,
    end: Ending,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Own {
    pub(in crate::server) fn new(channels: usize) -> Own {
        Own {
            waiting: Mutex::default(),
            sessions: Mutex::default(),
            last: Mutex::new(Instant::now()),
            channels: AtomicUsize::new(channels),
            running: watch::Sender::new(0),
            end: Ending::new(),
        }
    }

    /// Ends it; the first reason stays.
    pub(in crate::server) fn end(&self, reason: &str) {
        self.end.end(reason);
    }

    /// Why it is to end.
    pub(in crate::server) async fn ended(&self) -> String {
        self.end.ended().await
    }

    /// So many sessions may be open from now on.
    pub(in crate::server) fn allow(&self, channels: usize) {
        self.channels.store(channels, Ordering::Relaxed);
    }

    /// Whether another channel may be opened.
    pub(in crate::server) fn has_room(&self) -> bool {
        locked(&self.waiting).len() + *self.running.borrow() < self.channels.load(Ordering::Relaxed)
    }

    /// A channel was opened.
    pub(in crate::server) fn opened(&self, channel: Channel<Msg>) {
        locked(&self.waiting).insert(channel.id(), channel);
    }

    /// Takes a channel that waits for its session.
    pub(in crate::server) fn take(&self, id: ChannelId) -> Option<Channel<Msg>> {
        locked(&self.waiting).remove(&id)
    }

    /// Stops the work of its sessions. The library waits for whoever should read a channel: nobody is left to.
    pub(in crate::server) fn abandon(&self) {
        locked(&self.waiting).clear();
        locked(&self.sessions).iter().filter_map(Weak::upgrade).for_each(|session| session.abandon());
    }

    /// Something happened that is not a session's doing.
    pub(in crate::server) fn touch(&self) {
        *locked(&self.last) = Instant::now();
    }

    /// A session begins.
    pub(in crate::server) fn session(&self, session: &Arc<Shared>) {
        let mut sessions = locked(&self.sessions);
        sessions.retain(|session| session.strong_count() > 0);
        sessions.push(Arc::downgrade(session));
        drop(sessions);
        self.running.send_modify(|running| *running += 1);
        self.touch();
    }

    /// A session has ended, with its thread.
    pub(in crate::server) fn session_ended(&self) {
        self.running.send_modify(|running| *running -= 1);
        self.touch();
    }

    /// Waits until no session is left.
    pub(in crate::server) async fn rests(&self) {
        let _ = self.running.subscribe().wait_for(|running| *running == 0).await;
    }

    /// How long nothing was done.
    pub(in crate::server) fn quiet(&self) -> Duration {
        let now = Instant::now();
        let own = now.saturating_duration_since(*locked(&self.last));
        let sessions = locked(&self.sessions);
        sessions.iter().filter_map(Weak::upgrade).map(|session| session.quiet(now)).fold(own, Duration::min)
    }
}
