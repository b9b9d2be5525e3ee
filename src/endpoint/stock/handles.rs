//! The handles that a large file has over further connections.

use std::collections::HashMap;
use std::sync::{Arc, Weak};

use bytes::Bytes;

use super::session::Session;
use crate::endpoint::spread::Spread;

/// See the module. Connections go by their numbers; another one with the same number is another.
#[derive(Default)]
pub(super) struct Handles {
    by_connection: HashMap<usize, Handle>,
    /// How often the connections had changed when these were looked through.
    seen: u64,
}

struct Handle {
    session: Weak<Session>,
    /// Once it is open.
    handle: Option<Bytes>,
    /// It may be used.
    good: bool,
}

/// What is to be done after the connections have changed.
pub(super) struct Changed {
    /// Handles over connections that were given up.
    pub(super) left: Vec<(Arc<Session>, Bytes)>,
    /// Connections over which there is none.
    pub(super) new: Vec<(usize, Arc<Session>)>,
}

impl Handles {
    /// Looks through them; `None` where the connections are those of the last time.
    pub(super) fn follow(&mut self, spread: &Spread<Session>) -> Option<Changed> {
        let changes = spread.changes();
        if std::mem::replace(&mut self.seen, changes) == changes {
            return None;
        }
        let stays = |over: usize, handle: &Handle| {
            let session = handle.session.upgrade();
            spread.all().any(|(one, lane)| one == over && session.as_ref().is_some_and(|own| Arc::ptr_eq(own, lane)))
        };
        let left = self.by_connection.extract_if(|over, handle| !stays(*over, handle));
        let left = left.filter_map(|(_, handle)| Some((handle.session.upgrade()?, handle.handle?))).collect();
        let own = spread.number(0);
        let is_new = |(over, _): &(usize, &Arc<Session>)| *over != own && !self.by_connection.contains_key(over);
        let new: Vec<_> = spread.all().filter(is_new).map(|(over, session)| (over, Arc::clone(session))).collect();
        for (over, session) in &new {
            let handle = Handle { session: Arc::downgrade(session), handle: None, good: false };
            self.by_connection.insert(*over, handle);
        }
        Some(Changed { left, new })
    }

    /// The one over this connection is open; false where nobody waits for it.
    pub(super) fn opened(&mut self, over: usize, handle: &Bytes) -> bool {
        let waits = self.by_connection.get_mut(&over).filter(|own| own.handle.is_none());
        waits.map(|own| own.handle = Some(handle.clone())).is_some()
    }

    /// The one over this connection that is open, whether or not it may be used.
    pub(super) fn pending(&self, over: usize) -> Option<Bytes> {
        self.by_connection.get(&over)?.handle.clone()
    }

    /// The one over this connection may be used.
    pub(super) fn approve(&mut self, over: usize) {
        self.by_connection.entry(over).and_modify(|handle| handle.good = true);
    }

    /// The one over this connection, where it may be used.
    pub(super) fn get(&self, over: usize) -> Option<&Bytes> {
        self.by_connection.get(&over).filter(|handle| handle.good)?.handle.as_ref()
    }

    /// The one over this connection is used no more.
    pub(super) fn take(&mut self, over: usize) -> Option<Bytes> {
        let handle = self.by_connection.get_mut(&over)?;
        handle.good = false;
        handle.handle.take()
    }

    /// None of them is used any more: those that are open, with what they go over.
    pub(super) fn drain(&mut self) -> Vec<(Arc<Session>, Bytes)> {
        let all = self.by_connection.drain();
        all.filter_map(|(_, handle)| Some((handle.session.upgrade()?, handle.handle?))).collect()
    }
}
