//! The connections there are: who they are, what they do, and how they are ended from outside.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;

use super::access::{Proof, ServeUser};
use super::authorized_keys::Grant;
use super::ending::Ending;
use super::process::lanes::pass;
use crate::audit;

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
    pub(super) grant: Grant,
}

/// Something that was refused before anybody logged in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Refused {
    pub(super) reason: String,
    /// Who that was said to be, and by what; nobody has proven it.
    pub(super) claim: Option<(String, audit::Login)>,
}

/// Why, one after the other.
pub(super) fn reasons(refused: &[Refused]) -> String {
    refused.iter().map(|refused| refused.reason.as_str()).collect::<Vec<_>>().join("; ")
}

/// How long a process may take to say how long its client has been quiet.
const ANSWER: Duration = Duration::from_secs(2);

/// One connection, as the listener sees it.
pub(super) struct Live {
    pub(super) peer: SocketAddr,
    /// Set by what its process says was proven, when the login is recorded.
    pub(super) login: OnceLock<Login>,
    /// The listener's end of the socket by which its process gets further connections, until it is one itself.
    pub(super) lane: Mutex<Option<OwnedFd>>,
    /// When something was done last, as far as is known.
    last: Mutex<Instant>,
    /// The number of the last question for that, and of the last answer.
    asked: watch::Sender<u64>,
    answered: watch::Sender<u64>,
    refusals: Mutex<Vec<Refused>>,
    end: Ending,
    /// The connection is over, and its process has not ended yet.
    gone: AtomicBool,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Live {
    /// A connection that has not logged in.
    pub(super) fn new(peer: SocketAddr, lane: Option<OwnedFd>) -> Live {
        Live {
            peer,
            login: OnceLock::new(),
            lane: Mutex::new(lane),
            last: Mutex::new(Instant::now()),
            asked: watch::Sender::new(0),
            answered: watch::Sender::new(0),
            refusals: Mutex::default(),
            end: Ending::new(),
            gone: AtomicBool::new(false),
        }
    }

    /// Ends it; the first reason stays.
    pub(super) fn end(&self, reason: &str) {
        self.end.end(reason);
    }

    /// Why it is to end.
    pub(super) async fn ended(&self) -> String {
        self.end.ended().await
    }

    /// The client has gone; work of its sessions may go on.
    pub(super) fn leave(&self) {
        self.gone.store(true, Ordering::Release);
    }

    /// Whether the client has gone.
    pub(super) fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Acquire)
    }

    /// Something happened.
    pub(super) fn touch(&self) {
        self.heard(Duration::ZERO);
    }

    fn heard(&self, quiet: Duration) {
        let then = Instant::now().checked_sub(quiet);
        let mut last = locked(&self.last);
        *last = then.map_or(*last, |then| then.max(*last));
    }

    /// Questions for its process, as they come.
    pub(super) fn questions(&self) -> watch::Receiver<u64> {
        self.asked.subscribe()
    }

    /// Its process has answered.
    pub(super) fn answered(&self, number: u64, quiet: Duration) {
        self.heard(quiet);
        // What was not asked is no answer.
        let number = number.min(*self.asked.borrow());
        self.answered.send_if_modified(|last| *last < number && std::mem::replace(last, number) < number);
    }

    fn ask(&self) -> u64 {
        self.asked.send_modify(|number| *number += 1);
        *self.asked.borrow()
    }

    /// Keeps why something was refused, to be said once. Each reason once, and not without end.
    pub(super) fn refuse(&self, reason: &str, claim: Option<(String, audit::Login)>) {
        let refused = Refused { reason: short(reason, REASON_MAX), claim };
        let mut refusals = locked(&self.refusals);
        if refusals.len() < REFUSALS_MAX && !refusals.contains(&refused) {
            refusals.push(refused);
        }
    }

    /// What was refused.
    pub(super) fn refused(&self) -> Vec<Refused> {
        locked(&self.refusals).clone()
    }

    /// The same in words, if there was anything.
    pub(super) fn refusals(&self) -> Option<String> {
        Some(reasons(&locked(&self.refusals))).filter(|text| !text.is_empty())
    }

    fn quiet(&self) -> Duration {
        locked(&self.last).elapsed()
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

    /// Has the process of connection `number`, of the same login, work for the process of `live`.
    ///
    /// # Errors
    /// There is none, or it takes no more.
    pub(super) fn attach(&self, live: &Live, number: u64) -> Result<(), &'static str> {
        let none = "no such run";
        let other = locked(&self.0).get(&number).cloned().filter(|other| !other.is_gone()).ok_or(none)?;
        let same = match (live.login.get(), other.login.get()) {
            (Some(one), Some(other)) => *one.user == *other.user && one.grant == other.grant,
            _ => false,
        };
        if !same || std::ptr::eq(&*other, live) {
            return Err(none);
        }
        let lane = locked(&live.lane).take().ok_or(none)?;
        let to = locked(&other.lane);
        pass(to.as_ref().ok_or(none)?, &lane).map_err(|_| "the process of the run takes no more connections")
    }

    /// Those that are there now.
    pub(super) fn all(&self) -> Vec<Arc<Live>> {
        locked(&self.0).values().cloned().collect()
    }

    fn group(&self, live: &Live) -> Vec<Arc<Live>> {
        self.all().into_iter().filter(|other| !other.is_gone() && live.together(other)).collect()
    }

    /// How long a client has done nothing, over all its connections, as far as is known.
    pub(super) fn known(&self, live: &Live) -> Duration {
        self.group(live).iter().map(|other| other.quiet()).fold(live.quiet(), Duration::min)
    }

    /// How long a client has done nothing, over all its connections. Their processes are asked only where it would be `limit` by
    /// what is known; one that does not answer counts as quiet.
    pub(super) async fn quiet(&self, live: &Live, limit: Duration) -> Duration {
        if self.known(live) >= limit {
            refresh(&self.group(live)).await;
        }
        self.known(live)
    }
}

/// Asks processes how long their clients have done nothing, and waits a little for what they say.
pub(super) async fn refresh(group: &[Arc<Live>]) {
    let asked: Vec<(u64, &Arc<Live>)> = group.iter().map(|live| (live.ask(), live)).collect();
    let answers = async {
        for (number, live) in asked {
            let _ = live.answered.subscribe().wait_for(|answered| *answered >= number).await;
        }
    };
    let _ = tokio::time::timeout(ANSWER, answers).await;
}

impl Drop for Registered<'_> {
    fn drop(&mut self) {
        locked(&self.registry.0).remove(&self.number);
    }
}
