//! The process of one connection: key exchange, login and all sessions of one client.
//!
//! The listener starts it with the client's socket as its standard input, and a socket to the listener as its standard output.
//! What always holds: who may log in, how many may do so, and what is recorded is the listener's to decide; before a login is
//! accepted the process is confined to its user, and it has one thread until then.

use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use russh::Disconnect;
use russh::keys::{Certificate, PrivateKey};
use tokio::net::TcpStream;

use super::penalties::Fault;
use super::protocol;
use super::strict::{Refusal, StrictStream};
use crate::endpoint::stream::OverflowStream;
use crate::error::in_words;
use crate::server::listener::SessionFactory;

mod client;
pub(in crate::server) mod lanes;
pub(in crate::server) mod message;
pub(in crate::server) mod own;
mod upstream;

pub use lanes::{Lane, Relay};
pub use message::Level;
pub use upstream::{Outgoing, Upstream};

use client::Client;
use message::{Frames, Setup, TO_PROCESS_MAX};
use own::Own;

/// How often what was freed is looked for.
const PULSE: Duration = Duration::from_secs(5);
/// How long a client may take to hear that it is let go.
const FAREWELL: Duration = Duration::from_secs(1);

/// What a process was started with.
pub struct Started {
    /// The client's socket.
    pub client: OwnedFd,
    /// The socket to the listener.
    pub listener: OwnedFd,
    /// The socket by which further connections of a run come.
    pub lane: OwnedFd,
    /// Who the client is.
    pub peer: SocketAddr,
}

impl Started {
    /// Takes the standard input, output and error over, and leaves nothing in their place that anybody could reach by them.
    ///
    /// # Errors
    /// When they are something else: the process was not started by a listener.
    pub fn take(peer: &std::ffi::OsStr) -> std::io::Result<Started> {
        let wrong = || std::io::Error::other("it is started by 'lockstep serve', for one connection");
        let peer = message::peer(peer).ok_or_else(wrong)?;
        let socket = |fd: &OwnedFd| {
            rustix::net::sockopt::socket_type(fd).is_ok_and(|kind| kind == rustix::net::SocketType::STREAM)
        };
        let client = rustix::io::fcntl_dupfd_cloexec(std::io::stdin(), 3)?;
        let listener = rustix::io::fcntl_dupfd_cloexec(std::io::stdout(), 3)?;
        let lane = rustix::io::fcntl_dupfd_cloexec(std::io::stderr(), 3)?;
        if !socket(&client) || !socket(&listener) || !socket(&lane) {
            return Err(wrong());
        }
        let null = std::fs::File::options().read(true).write(true).open("/dev/null")?;
        rustix::stdio::dup2_stdin(&null)?;
        rustix::stdio::dup2_stdout(&null)?;
        rustix::stdio::dup2_stderr(&null)?;
        Ok(Started { client, listener, lane, peer })
    }
}

/// Serves the client until either side ends it. `pulse` is called now and then.
///
/// # Errors
/// When nothing could be begun.
pub fn run(
    started: Started,
    upstream: &Upstream,
    outgoing: Outgoing,
    factory: impl FnOnce(Arc<Lane>) -> SessionFactory,
    mut pulse: impl FnMut(),
) -> std::io::Result<()> {
    let factory = factory(Arc::new(Lane::new(started.lane, upstream.clone())));
    // One thread: others come with the first session, after the process was confined, and are so too.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let (client, listener) = (std::net::TcpStream::from(started.client), UnixStream::from(started.listener));
        client.set_nonblocking(true)?;
        listener.set_nonblocking(true)?;
        let _ = client.set_nodelay(true);
        let client = TcpStream::from_std(client)?;
        let (from, to) = tokio::net::UnixStream::from_std(listener)?.into_split();
        let mut frames = Frames::new(from, TO_PROCESS_MAX);
        let setup: Setup = frames.next().await?.ok_or(std::io::ErrorKind::UnexpectedEof)?;
        crate::audit::configure(setup.log.clone());
        crate::endpoint::surplus::one_of(setup.connections);
        let own = Arc::new(Own::new(setup.channels));
        let (asking, sending) = (upstream.clone(), upstream.clone());
        crate::scan::names::ask_elsewhere(Box::new(move |question| asking.look_up(question)));
        let sending = tokio::spawn(async move { sending.send(outgoing, to).await });
        let following = async {
            upstream.follow(frames, Arc::clone(&own)).await;
        };
        let serving = async {
            let (fault, why) = serve(client, &setup, upstream, &own, factory).await;
            upstream.ended(fault, why);
            // What was begun comes to its end: a commit is not to be cut off.
            own.rests().await;
            upstream.flush().await;
        };
        let beating = async {
            loop {
                tokio::time::sleep(PULSE).await;
                pulse();
            }
        };
        // Without a listener there is nobody to say who may do what: all ends with it.
        tokio::select! {
            () = following => {}
            () = serving => {}
            () = beating => {}
        }
        sending.abort();
        std::io::Result::Ok(())
    })?;
    // Threads that still work end with the process.
    runtime.shutdown_background();
    Ok(())
}

/// The connection. Gives what the client did amiss if it never logged in, and why it ended, where it was not by the client.
async fn serve(
    client: TcpStream,
    setup: &Setup,
    upstream: &Upstream,
    own: &Arc<Own>,
    factory: SessionFactory,
) -> (Option<Fault>, Option<String>) {
    let (config, offered) = match configured(setup) {
        Ok(made) => made,
        Err(reason) => return (None, Some(reason)),
    };
    let (stream, kill) = OverflowStream::new(client);
    let (stream, mut refusal) = StrictStream::new(stream, Arc::new(offered));
    let handler = Client::new(upstream.clone(), Arc::clone(own), factory);
    let handle = OnceLock::new();
    let running = async {
        let session = russh::server::run_stream(Arc::new(config), stream, handler).await?;
        let _ = handle.set(session.handle());
        session.await
    };
    tokio::pin!(running);
    let (ended, fault, why) = tokio::select! {
        ended = &mut running => {
            let error = ended.err().filter(|error| !hung_up(error));
            let breach = error.as_ref().is_some_and(|error| !matches!(error, russh::Error::IO(_)));
            let fault = if breach { Fault::Breach } else { Fault::NoLogin };
            (true, Some(fault), error.map(|error| in_words(&error)))
        }
        reason = own.ended() => (false, None, Some(reason)),
        () = refused(&mut refusal) => (false, Some(Fault::NoLogin), None),
    };
    if !ended {
        own.abandon();
        let farewell = async {
            if let (Some(handle), Some(why)) = (handle.get(), &why) {
                let _ = handle.disconnect(Disconnect::ByApplication, why.clone(), String::new()).await;
                let _ = (&mut running).await;
            }
        };
        let _ = tokio::time::timeout(FAREWELL, farewell).await;
    }
    let _ = kill.send(());
    let refused = refusal.borrow().clone();
    (fault, refused.or(why))
}

fn configured(setup: &Setup) -> Result<(russh::server::Config, super::strict::Offered), String> {
    let key = PrivateKey::from_openssh(&setup.host_key).map_err(|error| error.to_string())?;
    let certificates = setup.certificates.iter().map(|text| Certificate::from_openssh(text));
    let certificates = certificates.collect::<Result<_, _>>().map_err(|error| error.to_string())?;
    let idle = Duration::from_secs(setup.idle_seconds);
    Ok(protocol::configuration(key, certificates, setup.strict_key_exchange, setup.auth_tries, idle))
}

/// The client closed the connection without a word, as most do.
fn hung_up(error: &russh::Error) -> bool {
    matches!(error, russh::Error::IO(error) if error.kind() == std::io::ErrorKind::UnexpectedEof)
}

/// Ends a while after the client was told that it is refused, if it has not gone by itself.
async fn refused(refusal: &mut Refusal) {
    if refusal.wait_for(Option::is_some).await.is_err() {
        std::future::pending::<()>().await;
    }
    tokio::time::sleep(FAREWELL).await;
}
