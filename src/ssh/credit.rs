//! How much may be on its way to a near sshd and not yet taken by the program behind it.
//!
//! sshd grants a window of 2 MiB and keeps what its program has not read in a buffer, which it makes larger packet by
//! packet, and copies and clears each time: on a slow machine that costs it more than all the rest. To a near host less on
//! the way is as fast, since sshd gives the window back each 96 KiB. It only ever delays: whatever is misjudged, the
//! window is what bounds the sending in the end.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;

/// What sshd grants (channels.h, CHAN_SES_WINDOW_DEFAULT).
const WINDOW: u64 = 2 << 20;
/// What is on the way at most. A host within [`NEAR`] is sent 700 MB a second with it, more than sshd can take.
const LIMIT: u64 = 512 << 10;
/// Hosts that answer within this time are near.
pub(super) const NEAR: Duration = Duration::from_micros(700);
/// A program that takes nothing for so long is given some more: it may be that the window comes back in large pieces.
const PATIENCE: Duration = Duration::from_millis(10);

#[derive(Default)]
struct State {
    unlimited: bool,
    limit: u64,
    /// What was on the way when the window was last given back.
    outstanding: u64,
    /// What was sent since then.
    sent: u64,
}

pub(super) struct Credit {
    state: Mutex<State>,
    given_back: Notify,
}

impl Credit {
    pub(super) fn new(near: bool) -> Credit {
        let state = State { unlimited: !near, limit: LIMIT, ..State::default() };
        Credit { state: Mutex::new(state), given_back: Notify::new() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many of `wanted` bytes may be sent now; at least one. Waits until that is so.
    pub(super) async fn take(&self, wanted: usize) -> usize {
        loop {
            let given_back = self.given_back.notified();
            {
                let mut state = self.state();
                let room = state.limit.saturating_sub(state.outstanding + state.sent);
                if state.unlimited {
                    return wanted;
                }
                if room > 0 {
                    let taken = wanted.min(usize::try_from(room).unwrap_or(usize::MAX));
                    state.sent += taken as u64;
                    return taken;
                }
            }
            if tokio::time::timeout(PATIENCE, given_back).await.is_err() {
                let mut state = self.state();
                state.limit += LIMIT / 2;
                state.unlimited |= state.limit > 2 * WINDOW;
            }
        }
    }

    /// The window is `size` bytes again.
    pub(super) fn given_back(&self, size: u32) {
        let mut state = self.state();
        match WINDOW.checked_sub(size.into()) {
            Some(outstanding) => {
                state.outstanding = outstanding;
                state.sent = 0;
                state.limit = LIMIT;
            }
            // It is no sshd.
            None => state.unlimited = true,
        }
        drop(state);
        self.given_back.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn now<F: Future>(future: F) -> F::Output {
        tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap().block_on(future)
    }

    #[test]
    fn no_more_than_the_limit_is_on_the_way_until_some_is_given_back() {
        let credit = Credit::new(true);
        now(async {
            assert_eq!(credit.take(400 << 10).await, 400 << 10);
            assert_eq!(credit.take(400 << 10).await, 112 << 10);
            // 96 KiB were taken by the program.
            credit.given_back((2 << 20) - (416 << 10));
            assert_eq!(credit.take(400 << 10).await, 96 << 10);
        });
    }

    #[test]
    fn a_window_that_does_not_come_back_delays_and_never_stops() {
        let credit = Credit::new(true);
        now(async {
            let mut sent = 0;
            while sent < 20 << 20 {
                sent += credit.take(1 << 20).await;
            }
        });
    }

    #[test]
    fn far_hosts_and_larger_windows_are_not_limited() {
        let credit = Credit::new(false);
        now(async { assert_eq!(credit.take(8 << 20).await, 8 << 20) });
        let credit = Credit::new(true);
        credit.given_back(64 << 20);
        now(async { assert_eq!(credit.take(8 << 20).await, 8 << 20) });
    }
}
