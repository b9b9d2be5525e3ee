//! A connection over which nothing is asked for a while, as while a tree is hashed on this side, is not ended by a server
//! that takes it for forgotten.

use std::sync::{Arc, Weak};
use std::time::Duration;

use crossbeam_channel::{RecvTimeoutError, Sender, bounded, unbounded};

use crate::endpoint::client::Client;
use crate::wire::extension;

/// Well below what anybody sets as `idle_timeout` of a server.
const EVERY: Duration = Duration::from_secs(10);

/// Asks for something small now and then, until it is dropped.
pub(super) struct Alive {
    _end: Sender<()>,
}

impl Alive {
    pub(super) fn keep(client: &Arc<Client>) -> Alive {
        Alive::keep_every(client, EVERY)
    }

    fn keep_every(client: &Arc<Client>, every: Duration) -> Alive {
        let (end, ended) = bounded::<()>(0);
        let client = Arc::downgrade(client);
        // Without it the connection is what it would be anyway.
        let _ = std::thread::Builder::new().name("keep-alive".to_owned()).spawn(move || {
            while ended.recv_timeout(every) == Err(RecvTimeoutError::Timeout) {
                if !ask(&client) {
                    return;
                }
            }
        });
        Alive { _end: end }
    }
}

/// `false` when the connection is gone.
fn ask(client: &Weak<Client>) -> bool {
    let Some(client) = client.upgrade() else { return false };
    // What it works on keeps it alive. The answer is of no use; one that comes to nobody is dropped.
    let (sender, _) = unbounded();
    !client.rests() || client.submit(extension::request("hello"), 0, 0, &sender).is_ok()
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::time::Instant;

    use bytes::Bytes;

    use super::*;
    use crate::endpoint::client::ClientOptions;
    use crate::endpoint::link::{Link, LinkError};

    /// Says what it supports, and answers nothing else.
    #[derive(Default)]
    struct Silent {
        sent: Mutex<Vec<Bytes>>,
        said: Mutex<bool>,
        closed: (Mutex<bool>, std::sync::Condvar),
    }

    impl Link for Silent {
        fn send(&self, bytes: Bytes) -> Result<(), LinkError> {
            self.sent.lock().unwrap().push(bytes);
            Ok(())
        }
        fn recv(&self) -> Result<Option<Bytes>, LinkError> {
            if !std::mem::replace(&mut *self.said.lock().unwrap(), true) {
                return Ok(Some(Bytes::from_static(&[0, 0, 0, 5, 2, 0, 0, 0, 3])));
            }
            let closed = self.closed.0.lock().unwrap();
            drop(self.closed.1.wait_while(closed, |closed| !*closed).unwrap());
            Ok(None)
        }
        fn close(&self) {
            *self.closed.0.lock().unwrap() = true;
            self.closed.1.notify_all();
        }
    }

    #[test]
    fn a_connection_at_rest_is_asked_once_and_not_held_open() {
        let link = Arc::new(Silent::default());
        let client = Arc::new(Client::connect(Arc::clone(&link) as _, "host", ClientOptions::default()).unwrap());
        let asked = || {
            let sent = link.sent.lock().unwrap();
            sent.iter().filter(|packet| packet.windows(23).any(|bytes| bytes == b"hello@lockstep.internal")).count()
        };
        let alive = Alive::keep_every(&client, Duration::from_millis(5));
        let begun = Instant::now();
        while asked() == 0 {
            assert!(begun.elapsed() < Duration::from_secs(20), "nothing was asked");
            std::thread::sleep(Duration::from_millis(1));
        }
        // The answer is due: nothing more is asked.
        std::thread::sleep(Duration::from_millis(50));
        assert_eq!(asked(), 1);
        drop(alive);
        drop(client);
        while !*link.closed.0.lock().unwrap() {
            assert!(begun.elapsed() < Duration::from_secs(20), "the connection is held open");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}
