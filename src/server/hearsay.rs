//! What the SSH library decides without asking: it refuses certificates by their dates and signatures itself, and only
//! says so in its log. The task that the words come from tells whose connection it is.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use tokio::task;

use super::live::Live;

static TASKS: Mutex<Option<HashMap<task::Id, Weak<Live>>>> = Mutex::new(None);

/// Its words, and ours.
const REFUSALS: [(&str, &str); 2] = [
    ("Certificate is expired or not yet valid", "the certificate has expired or is not valid yet"),
    ("Certificate signature is invalid", "the certificate's signature is wrong"),
];

fn tasks<T>(change: impl FnOnce(&mut HashMap<task::Id, Weak<Live>>) -> T) -> T {
    change(TASKS.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert_default())
}

/// The current task works for this connection.
pub(super) fn listen(live: &Arc<Live>) {
    if let Some(id) = task::try_id() {
        tasks(|tasks| tasks.insert(id, Arc::downgrade(live)));
    }
}

/// The connection has ended.
pub(super) fn forget(live: &Arc<Live>) {
    tasks(|tasks| tasks.retain(|_, known| known.upgrade().is_some_and(|known| !Arc::ptr_eq(&known, live))));
}

/// Takes a line of the library's log, on the task that wrote it.
pub fn heard(line: &str) {
    let Some((_, reason)) = REFUSALS.iter().find(|(words, _)| line.contains(words)) else { return };
    let live = task::try_id().and_then(|id| tasks(|tasks| tasks.get(&id)?.upgrade()));
    if let Some(live) = live {
        live.refuse(reason);
    }
}
