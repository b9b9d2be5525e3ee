//! Further connections of one run beside the way in: the agent is asked for a port when the first is wanted. Where there is none to
//! be had, or nobody gets there, the run goes on without.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use crossbeam_channel::bounded;

use super::body;
use crate::endpoint::Error;
use crate::endpoint::beside::Beside;
use crate::endpoint::client::{Client, ClientOptions};
use crate::error::{Exit, chain};
use crate::monitor::{Event, Monitor};
use crate::wire::extension::{self, Fields, LISTEN, WireError};

/// How long a connection may take until it is of use.
const PATIENCE: Duration = Duration::from_secs(8);

/// What there is to say of it.
enum Remark {
    Detail(String),
    Warning(String),
}

/// See the module.
pub(super) struct Ports {
    beside: Arc<dyn Beside>,
    /// Where the agent listens, and the key that it has there; nothing where it does not.
    listens: OnceLock<Option<(u16, String)>>,
    /// Nobody got there, and nobody tries any more.
    given_up: AtomicBool,
    /// Somebody did.
    used: AtomicBool,
    remarks: Mutex<Vec<Remark>>,
}

impl Ports {
    /// Nothing is asked yet.
    pub(super) fn new(beside: Arc<dyn Beside>) -> Ports {
        let (listens, given_up, used) = (OnceLock::new(), AtomicBool::new(false), AtomicBool::new(false));
        Ports { beside, listens, given_up, used, remarks: Mutex::default() }
    }

    /// Whether the host answered at once when it was connected to first.
    pub(super) fn is_near(&self) -> bool {
        self.beside.is_near()
    }

    /// A further connection, to the agent that `first` speaks to.
    pub(super) fn open(&self, first: &Client) -> Option<Client> {
        if self.given_up.load(Ordering::Relaxed) {
            return None;
        }
        let host = first.host();
        let (port, key) = self
            .listens
            .get_or_init(|| match self.ask(first) {
                Ok(found) => Some(found),
                Err(error) => {
                    self.give_up(Remark::Detail(format!("no port for data beside the SSH server: {}", chain(&error))));
                    None
                }
            })
            .as_ref()?;
        let link = self.beside.open(*port, key).map_err(|error| (error.exit == Exit::Trust, error.message));
        let client = link.and_then(|link| {
            Client::connect(link, host, ClientOptions::default()).map_err(|error| (false, chain(&error)))
        });
        match client {
            Ok(client) => Some(client),
            Err((true, reason)) => {
                self.give_up(Remark::Warning(format!("no data goes over port {port} of the host: {reason}")));
                None
            }
            Err((false, reason)) => {
                let what = match self.used.load(Ordering::Relaxed) {
                    true => format!("no more connections over port {port}"),
                    false => "data goes over the SSH server's port alone".to_owned(),
                };
                self.give_up(Remark::Detail(format!("{host}: {what}: {reason}")));
                None
            }
        }
    }

    /// What `open` gives, if it does so soon; nobody tries again otherwise. What comes later is dropped.
    pub(super) fn in_time(&self, host: &str, open: impl FnOnce() -> Option<Client> + Send + 'static) -> Option<Client> {
        let (sender, receiver) = bounded(1);
        let opens = move || drop(sender.send(open()));
        let started = std::thread::Builder::new().name("port".to_owned()).spawn(opens);
        let opened = started.ok().and_then(|_| receiver.recv_timeout(PATIENCE).ok()).flatten();
        if opened.is_none() {
            self.give_up(Remark::Detail(format!("{host}: what listens for data there does not go on")));
        }
        opened
    }

    /// A connection was taken into the run.
    pub(super) fn taken(&self, host: &str) {
        let Some(Some((port, _))) = self.listens.get() else { return };
        if !self.used.swap(true, Ordering::Relaxed) {
            self.remark(Remark::Detail(format!("{host}: data goes over port {port} too")));
        }
    }

    fn ask(&self, first: &Client) -> Result<(u16, String), Error> {
        let mut packet = extension::request(LISTEN.split('@').next().unwrap_or(LISTEN));
        extension::put_string(&mut packet, self.beside.key().as_bytes());
        let reply = body(first, first.call(packet, false)?)?;
        let mut fields = Fields(&reply);
        let read = (|| {
            let (port, key) = (fields.u32()?, fields.string()?);
            fields.end()?;
            let port = u16::try_from(port).ok().filter(|port| *port > 0).ok_or(WireError::Range("the port"))?;
            let key = std::str::from_utf8(key).map_err(|_| WireError::Range("the host key"))?;
            Ok::<_, WireError>((port, key.to_owned()))
        })();
        read.map_err(|error| first.protocol(error.to_string()))
    }

    fn give_up(&self, remark: Remark) {
        if !self.given_up.swap(true, Ordering::Relaxed) {
            self.remark(remark);
        }
    }

    fn remark(&self, remark: Remark) {
        self.remarks.lock().unwrap_or_else(PoisonError::into_inner).push(remark);
    }

    /// Tells what there is to say, once.
    pub(super) fn tell(&self, monitor: &dyn Monitor) {
        let remarks = std::mem::take(&mut *self.remarks.lock().unwrap_or_else(PoisonError::into_inner));
        for remark in remarks {
            match remark {
                Remark::Detail(text) => monitor.event(Event::Detail(&text)),
                Remark::Warning(text) => monitor.event(Event::Warning(&text)),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::endpoint::link::{ConnectError, Link, LinkError};
    use crate::monitor::Counters;
    use bytes::Bytes;
    use std::sync::atomic::AtomicUsize;

    /// A host that says its version and nothing else.
    struct Silent(AtomicBool);

    impl Link for Silent {
        fn send(&self, _: Bytes) -> Result<(), LinkError> {
            Ok(())
        }

        fn recv(&self) -> Result<Option<Bytes>, LinkError> {
            let first = !self.0.swap(true, Ordering::Relaxed);
            Ok(first.then(|| Bytes::from_static(&[0, 0, 0, 5, 2, 0, 0, 0, 3])))
        }

        fn close(&self) {}
    }

    fn silent() -> Arc<dyn Link> {
        Arc::new(Silent(AtomicBool::new(false)))
    }

    /// Connects as often as there is something left, and then fails like this.
    struct Failing(Exit, AtomicUsize, AtomicUsize);

    impl Beside for Failing {
        fn key(&self) -> &str {
            "key"
        }

        fn is_near(&self) -> bool {
            true
        }

        fn open(&self, _: u16, _: &str) -> Result<Arc<dyn Link>, ConnectError> {
            self.1.fetch_add(1, Ordering::Relaxed);
            let left = self.2.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1));
            let (message, patience) = ("it fails".to_owned(), Duration::ZERO);
            left.map(|_| silent()).map_err(|_| ConnectError { message, exit: self.0, not_offered: false, patience })
        }
    }

    /// What is said, with its kind.
    #[derive(Default)]
    struct Heard(Mutex<Vec<String>>, Counters);

    impl Monitor for Heard {
        fn event(&self, event: Event<'_>) {
            self.0.lock().unwrap().push(match event {
                Event::Detail(text) => format!("detail: {text}"),
                Event::Warning(text) => format!("warning: {text}"),
                _ => "another".to_owned(),
            });
        }

        fn counters(&self) -> &Counters {
            &self.1
        }
    }

    #[test]
    fn a_port_that_fails_is_not_tried_again_and_it_is_said_once_how() {
        for (exit, good, words) in [
            (Exit::TryAgain, 0, &["detail: h: data goes over the SSH server's port alone: it fails"][..]),
            (Exit::Trust, 0, &["warning: no data goes over port 7 of the host: it fails"]),
            (
                Exit::TryAgain,
                1,
                &["detail: h: data goes over port 7 too", "detail: h: no more connections over port 7: it fails"],
            ),
        ] {
            let failing = Arc::new(Failing(exit, AtomicUsize::new(0), AtomicUsize::new(good)));
            let ports = Ports::new(Arc::clone(&failing) as Arc<dyn Beside>);
            ports.listens.set(Some((7, "key".to_owned()))).unwrap();
            let first = Client::connect(silent(), "h", ClientOptions::default()).unwrap();
            for number in 0..5 {
                assert_eq!(ports.open(&first).is_some(), number < good);
                if number < good {
                    ports.taken("h");
                }
            }
            assert_eq!(failing.1.load(Ordering::Relaxed), good + 1);
            let heard = Heard::default();
            ports.tell(&heard);
            ports.tell(&heard);
            assert_eq!(*heard.0.lock().unwrap(), words);
        }
    }
}
