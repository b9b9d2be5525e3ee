//! A port beside sshd: further connections of a run whose first one came through sshd, to the same process (`docs/protocol.md`).
//!
//! What always holds: nobody listens before a client that has logged in asks for it, and once at most; who comes from another address
//! than that client gets no answer, and who has another key than the one it named no session; sessions have what the first one has,
//! and end with it.

use std::net::{IpAddr, TcpStream as Socket};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use russh::keys::ssh_key::public::KeyData;
use russh::keys::{Algorithm, PublicKey};
use russh::server::Config;
use tokio::net::TcpStream;
use tokio::runtime::Runtime;
use tokio::sync::{Semaphore, watch};

use super::agent::Output;
use super::channel::FedSession;
use super::process::own::Own;
use super::strict::{Offered, StrictStream};
use super::{host_key, protocol};
use crate::config::DataPorts;
use crate::endpoint::beside::USER;
use crate::endpoint::stream::OverflowStream;
use crate::endpoint::surplus;
use crate::error::in_words;

mod client;
mod opener;

pub use opener::{COMMAND, serve as hand_over};

use client::Client;
use opener::{End, Opener};

/// So many connections there are at once, those that have not logged in among them.
const CONNECTIONS: usize = 16;
/// How long a login may take.
const GRACE: Duration = Duration::from_secs(10);
/// How long a connection may be silent, but for answers to whether it is there.
const IDLE: Duration = Duration::from_secs(600);
/// How long a port stays that nobody is connected to: there are not many for all sessions.
const UNUSED: Duration = Duration::from_secs(120);
/// A client has the one key.
const TRIES: usize = 1;
/// So many threads do the ciphers' work, at most.
const THREADS: usize = 4;

/// Makes the session of a connection. It is called on a thread that may block.
pub type Sessions = Arc<dyn Fn(Arc<dyn Output>) -> Result<Box<dyn FedSession>, String> + Send + Sync>;

/// Where to listen, and for whom.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The address of this machine that the client came to.
    pub address: IpAddr,
    /// The client's.
    pub client: IpAddr,
    /// Which ports are allowed.
    pub ports: DataPorts,
}

impl Place {
    /// From what sshd says of a connection (`SSH_CONNECTION`: address and port of the client, and those it came to).
    pub fn of(connection: &str, ports: DataPorts) -> Option<Place> {
        let words: Vec<&str> = connection.split(' ').collect();
        let [client, _, address, _] = words[..] else { return None };
        let known = |word: &str| word.parse::<IpAddr>().ok().map(|ip| ip.to_canonical());
        let (client, address) = (known(client)?, known(address)?);
        // Nobody came to all addresses at once.
        (!address.is_unspecified()).then_some(Place { address, client, ports })
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a session may open beside the way that it came.
pub struct Ports {
    place: Place,
    sessions: Sessions,
    opener: Mutex<Option<Opener>>,
    listening: Mutex<Option<Listening>>,
    /// It was asked for, with whatever result.
    asked: AtomicBool,
}

/// What listens, until it is dropped.
struct Listening {
    runtime: Runtime,
    live: Arc<Live>,
    end: End,
}

/// Connections that there are; nothing when there are to be none any more.
struct Live(Mutex<Option<Vec<Arc<Own>>>>);

impl Live {
    /// A new one, if there may be any.
    fn add(&self) -> Option<Arc<Own>> {
        let own = Arc::new(Own::new(1));
        locked(&self.0).as_mut()?.push(Arc::clone(&own));
        Some(own)
    }

    fn is_empty(&self) -> bool {
        locked(&self.0).as_ref().is_none_or(Vec::is_empty)
    }

    fn remove(&self, own: &Arc<Own>) {
        locked(&self.0).iter_mut().for_each(|all| all.retain(|known| !Arc::ptr_eq(known, own)));
    }
}

impl Ports {
    /// Nothing listens yet.
    pub fn new(place: Place, sessions: Sessions) -> Ports {
        let (opener, listening, asked) = (Mutex::default(), Mutex::default(), AtomicBool::new(false));
        Ports { place, sessions, opener, listening, asked }
    }

    /// Starts what will listen, while this process can still start others.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn prepare(&self) -> std::io::Result<()> {
        // What all runtimes of a process have in common is made with the first, of sockets; it has no thread but this one.
        drop(tokio::runtime::Builder::new_current_thread().enable_all().build()?);
        *locked(&self.opener) = Some(Opener::start(&self.place)?);
        Ok(())
    }

    /// Listens for whoever has this key; the port, and the key that the host has there. It is done once, and a second time not even
    /// where it has failed. A port that nobody uses for [`UNUSED`] is given back.
    ///
    /// # Errors
    /// What keeps it from listening.
    pub(super) fn listen(&self, key: &PublicKey) -> Result<(u16, PublicKey), String> {
        let mut listening = locked(&self.listening);
        if self.asked.swap(true, Ordering::Relaxed) {
            return Err("this session was asked to listen already".to_owned());
        }
        let failed = |error: std::io::Error| in_words(&error);
        // sshd may have started many like this one.
        surplus::one_of(CONNECTIONS);
        let prepared = locked(&self.opener).take();
        let mut opener = prepared.map_or_else(|| Opener::start(&self.place), Ok).map_err(failed)?;
        let own = host_key::made()?;
        let host = own.public_key().clone();
        let (config, offered) = protocol::configuration(own, Vec::new(), true, TRIES, IDLE);
        let threads = std::thread::available_parallelism().map_or(1, |count| count.get().min(THREADS));
        let mut builder = tokio::runtime::Builder::new_multi_thread();
        let runtime = builder.worker_threads(threads).thread_name("data").enable_all().build().map_err(failed)?;
        let port = opener.listen()?;
        let (end, unused) = (opener.end().map_err(failed)?, opener.end().map_err(failed)?);
        let live = Arc::new(Live(Mutex::new(Some(Vec::new()))));
        let watched = Arc::clone(&live);
        runtime.spawn(async move {
            let mut silent = Duration::ZERO;
            while silent < UNUSED {
                tokio::time::sleep(UNUSED / 4).await;
                silent = if watched.is_empty() { silent + UNUSED / 4 } else { Duration::ZERO };
            }
            drop(unused);
        });
        let connection = Connection {
            config: Arc::new(config),
            offered: Arc::new(offered),
            key: Arc::new(key.key_data().clone()),
            sessions: Arc::clone(&self.sessions),
            live: Arc::clone(&live),
        };
        let (places, handle) = (Arc::new(Semaphore::new(CONNECTIONS)), runtime.handle().clone());
        let take = move || {
            while let Some(socket) = opener.next() {
                let Ok(place) = Arc::clone(&places).try_acquire_owned() else { continue };
                let connection = connection.clone();
                handle.spawn(async move {
                    connection.serve(socket).await;
                    drop(place);
                });
            }
        };
        std::thread::Builder::new().name("ports".into()).spawn(take).map_err(failed)?;
        *listening = Some(Listening { runtime, live, end });
        Ok((port, host))
    }

    /// Nobody listens any more, and all connections end, each when its session has.
    pub fn close(&self) {
        drop(locked(&self.opener).take());
        let Some(Listening { runtime, live, end }) = locked(&self.listening).take() else { return };
        drop(end);
        let all = locked(&live.0).take().unwrap_or_default();
        for own in &all {
            own.end("the session that it belongs to has ended");
            own.abandon();
        }
        runtime.block_on(async {
            for own in &all {
                own.rests().await;
            }
        });
        runtime.shutdown_background();
    }
}

/// What each connection is served with.
#[derive(Clone)]
struct Connection {
    config: Arc<Config>,
    offered: Arc<Offered>,
    key: Arc<KeyData>,
    sessions: Sessions,
    live: Arc<Live>,
}

impl Connection {
    /// Serves until either side ends it.
    async fn serve(self, socket: OwnedFd) {
        let Ok(socket) = TcpStream::from_std(Socket::from(socket)) else { return };
        let Some(own) = self.live.add() else { return };
        let (stream, kill) = OverflowStream::new(socket);
        let (stream, mut refusal) = StrictStream::new(stream, self.offered);
        let (logged_in, mut login) = watch::channel(false);
        let (key, sessions) = (self.key, self.sessions);
        let client = Client { key, own: Arc::clone(&own), sessions, logged_in, opened: false };
        let running = async {
            let session = russh::server::run_stream(self.config, stream, client).await?;
            session.await
        };
        let late = async {
            if tokio::time::timeout(GRACE, login.wait_for(|done| *done)).await.is_ok() {
                std::future::pending::<()>().await;
            }
        };
        let refused = async {
            if refusal.wait_for(Option::is_some).await.is_err() {
                std::future::pending::<()>().await;
            }
            // It is told why.
            tokio::time::sleep(Duration::from_secs(1)).await;
        };
        tokio::select! {
            ended = running => drop(ended),
            _ = own.ended() => {}
            () = late => {}
            () = refused => {}
        }
        let _ = kill.send(());
        own.abandon();
        own.rests().await;
        self.live.remove(&own);
    }
}

/// The key in a request: one of Ed25519, as it stands in `authorized_keys`.
pub(super) fn key(text: &[u8]) -> Option<PublicKey> {
    let text = std::str::from_utf8(text).ok().filter(|text| text.len() <= 1024)?;
    PublicKey::from_openssh(text).ok().filter(|key| key.algorithm() == Algorithm::Ed25519)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_where_the_client_came_to() {
        let ports: DataPorts = "40000-40100".parse().unwrap();
        let of = |connection: &str| {
            Place::of(connection, ports).map(|place| (place.address.to_string(), place.client.to_string()))
        };
        let place = |address: &str, client: &str| Some((address.to_owned(), client.to_owned()));
        assert_eq!(of("10.0.0.2 50000 10.0.0.1 22"), place("10.0.0.1", "10.0.0.2"));
        assert_eq!(of("2001:db8::2 50000 2001:db8::1 22"), place("2001:db8::1", "2001:db8::2"));
        assert_eq!(of("::ffff:10.0.0.2 50000 ::ffff:10.0.0.1 22"), place("10.0.0.1", "10.0.0.2"));
        for none in [
            "",
            "10.0.0.2 50000",
            "10.0.0.2 50000 0.0.0.0 22",
            "10.0.0.2 50000 :: 22",
            "a 1 b 2",
            "UNKNOWN 65535 UNKNOWN 65535",
        ] {
            assert_eq!(of(none), None, "{none}");
        }
    }

    #[test]
    fn a_key_is_one_of_ed25519_and_nothing_else() {
        let good = host_key::made().unwrap().public_key().to_openssh().unwrap();
        assert!(key(good.as_bytes()).is_some());
        let p256 = "ecdsa-sha2-nistp256 AAAAE2VjZHNhLXNoYTItbmlzdHAyNTYAAAAIbmlzdHAyNTYAAABBBHwf2HMM5TRXvo2SQJjsNkiDD5KqiiNjrGVv3UUh+mMT5RHxiRtOnlqvjhQtBq0VpmpCV/PwUdhOig4vkbqAcEc=";
        assert!(PublicKey::from_openssh(p256).is_ok());
        for wrong in [p256, "", "ssh-ed25519 AAAA", &format!("{good} {}", "x".repeat(1024))] {
            assert!(key(wrong.as_bytes()).is_none(), "{wrong}");
        }
    }
}
