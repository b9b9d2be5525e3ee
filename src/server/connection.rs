//! One connection from its first byte to its last: how long it may take to log in or do nothing, and what is said of it.

use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use russh::Disconnect;
use tokio::net::TcpStream;

use super::client::Client;
use super::limits::Permit;
use super::listener::Server;
use super::live::{Live, short};
use super::penalties::Fault;
use super::strict::{Refusal, StrictStream};
use crate::audit::AuditRecord;
use crate::endpoint::stream::OverflowStream;
use crate::error::in_words;

/// How long a client may take to hear that it is let go.
const FAREWELL: Duration = Duration::from_secs(1);

/// Serves until either side ends it.
pub(super) async fn serve(server: Arc<Server>, socket: TcpStream, peer: SocketAddr, number: u64, permit: Arc<Permit>) {
    let live = Arc::new(Live::new(peer));
    let registered = server.live.add(number, &live);
    let settings = server.settings();
    let _ = socket.set_nodelay(true);
    let (stream, kill) = OverflowStream::new(socket);
    let (stream, mut refusal) = StrictStream::new(stream, Arc::clone(&settings.offered));
    let client = Client::new(Arc::clone(&server), Arc::clone(&live), Arc::clone(&permit));
    let handle = OnceLock::new();
    let running = async {
        let session = russh::server::run_stream(Arc::clone(&settings.protocol), stream, client).await?;
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
        () = late(&live, settings.limits.login_grace) => (false, Some(Fault::Late), Some("no login in time".to_owned())),
        () = idle(&server, &live) => (false, None, Some("nothing was done for too long".to_owned())),
        reason = live.ended() => (false, None, Some(reason)),
        () = refused(&mut refusal) => (false, Some(Fault::NoLogin), None),
    };
    if !ended {
        live.abandon();
        let farewell = async {
            if let (Some(handle), Some(why)) = (handle.get(), &why) {
                let _ = handle.disconnect(Disconnect::ByApplication, why.clone(), String::new()).await;
                let _ = (&mut running).await;
            }
        };
        let _ = tokio::time::timeout(FAREWELL, farewell).await;
    }
    let _ = kill.send(());
    drop((registered, permit));
    super::hearsay::forget(&live);
    if let Some(fault) = fault.filter(|_| live.login.get().is_none()) {
        let refused = live.refusals().is_some();
        server.door.punish(peer.ip(), if refused { Fault::FailedLogin } else { fault });
    }
    report(&server, &live, refusal.borrow().clone().or(why));
}

/// The client closed the connection without a word, as most do.
fn hung_up(error: &russh::Error) -> bool {
    matches!(error, russh::Error::IO(error) if error.kind() == std::io::ErrorKind::UnexpectedEof)
}

async fn late(live: &Live, grace: Duration) {
    tokio::time::sleep(grace).await;
    if live.login.get().is_some() {
        std::future::pending::<()>().await;
    }
}

async fn idle(server: &Server, live: &Live) {
    loop {
        let limit = server.settings().limits.idle_timeout;
        let quiet = server.live.quiet(live);
        if live.login.get().is_some() && quiet >= limit {
            return;
        }
        // A reload may have made it shorter.
        let wait = limit.saturating_sub(quiet).clamp(Duration::from_millis(10), Duration::from_secs(10));
        tokio::time::sleep(wait).await;
    }
}

/// Ends a while after the client was told that it is refused, if it has not gone by itself.
async fn refused(refusal: &mut Refusal) {
    if refusal.wait_for(Option::is_some).await.is_err() {
        std::future::pending::<()>().await;
    }
    tokio::time::sleep(FAREWELL).await;
}

/// One line for a connection: who it was, or why it did not become anybody.
fn report(server: &Server, live: &Live, why: Option<String>) {
    let peer = live.peer;
    if let Some(login) = live.login.get() {
        let why = why.unwrap_or_else(|| "by the client".into());
        tracing::info!(%peer, user = login.user.name, why, "connection ended");
        return;
    }
    let reason = match (live.refusals(), why) {
        (Some(refusals), _) => refusals,
        (None, Some(why)) => short(&why, 1000),
        (None, None) => {
            tracing::info!(%peer, "connection ended without a login");
            return;
        }
    };
    tracing::warn!(%peer, reason, "no login");
    server.recorder.note_stranger(AuditRecord {
        action: "refuse".into(),
        reason: Some(reason),
        ..server.record("", peer)
    });
}
