//! The runs of this process, which further connections find by their tokens.

use std::collections::HashMap;
use std::io::Read as _;
use std::sync::{Arc, Mutex, OnceLock, Weak};

use super::{Run, locked};

/// Runs that further connections of this process may attach to, by token.
static RUNS: Mutex<Option<HashMap<[u8; 16], Weak<Run>>>> = Mutex::new(None);

/// The number of this process among those of a server; tokens begin with it.
static ORIGIN: OnceLock<u64> = OnceLock::new();

/// Says it. Only the first call counts.
pub fn set_origin(number: u64) {
    let _ = ORIGIN.set(number);
}

/// Gives a run a token; an empty one offers none.
pub(super) fn register(run: &Arc<Run>) -> Vec<u8> {
    let mut token = [0; 16];
    // The half that nobody can guess is enough beside a login of the same user.
    let random = match ORIGIN.get() {
        Some(number) => {
            token[..8].copy_from_slice(&number.to_be_bytes());
            &mut token[8..]
        }
        None => &mut token[..],
    };
    let filled = std::fs::File::open("/dev/urandom").and_then(|mut file| file.read_exact(random));
    if filled.is_err() {
        return Vec::new(); // No token: the client works over one connection.
    }
    let mut runs = locked(&RUNS);
    let runs = runs.get_or_insert_default();
    runs.retain(|_, run| run.strong_count() > 0);
    runs.insert(token, Arc::downgrade(run));
    token.to_vec()
}

/// The run of this token, if it goes on.
pub(super) fn find(token: &[u8; 16]) -> Option<Arc<Run>> {
    locked(&RUNS).as_ref().and_then(|runs| runs.get(token)?.upgrade())
}
