//! One client: which keys are accepted, which channels and requests. Files may be moved; everything else is refused.

use std::collections::HashSet;
use std::sync::Arc;

use russh::keys::ssh_key::public::KeyData;
use russh::keys::{Algorithm, Certificate};
use russh::server::{Auth, ChannelOpenHandle, Handler, Msg, PublicKeyOffer, Session, VerifiedPublicKey};
use russh::{Channel, ChannelId, ChannelOpenFailure, Pty};

use super::access::{Proof, ServeUser};
use super::agent::Output;
use super::channel::{self, FedSession};
use super::hearsay;
use super::limits::{Permit, SessionPermit};
use super::listener::{Server, SessionStart};
use super::live::{Live, Login, short};

use crate::audit::AuditRecord;
use crate::error::Escaped;

pub(super) struct Client {
    server: Arc<Server>,
    live: Arc<Live>,
    permit: Arc<Permit>,
    start: Option<Arc<SessionStart>>,
    /// One more than there are sessions.
    running: Arc<()>,
    /// Requests that were refused, to say it once.
    said: HashSet<&'static str>,
}

/// A session that gives its place back when its thread ends.
struct Held {
    session: Box<dyn FedSession>,
    _place: SessionPermit,
}

impl FedSession for Held {
    fn feed(&mut self, bytes: &[u8]) -> Result<(), String> {
        self.session.feed(bytes)
    }

    fn finish(&mut self) {
        self.session.finish();
    }
}

impl Client {
    pub(super) fn new(server: Arc<Server>, live: Arc<Live>, permit: Arc<Permit>) -> Client {
        Client { server, live, permit, start: None, running: Arc::new(()), said: HashSet::new() }
    }

    fn refuse(&self, name: &str, what: &str, reason: &str) -> Auth {
        let name = short(&Escaped(name.as_bytes()).to_string(), 64);
        tracing::debug!(peer = %self.live.peer, user = name, what, reason, "key refused");
        self.live.refuse(&format!("user {name}, {what}: {reason}"));
        Auth::reject()
    }

    /// Decides on what a client has proven to hold, and remembers who it is.
    async fn log_in(&mut self, name: &str, proof: Proof) -> Auth {
        let described = proof.describe();
        let peer = self.live.peer;
        let settings = self.server.settings();
        let (access, asked, shown) = (settings.access.clone(), name.to_owned(), proof.clone());
        let judged = tokio::task::spawn_blocking(move || access.judge(&asked, &shown, peer)).await;
        let (user, grant) = match judged.unwrap_or_else(|error| Err(error.to_string())) {
            Ok(judged) => judged,
            Err(reason) => return self.refuse(name, &described, &reason),
        };
        let start = Arc::new(start(&user, self.live.peer, &proof));
        let login = AuditRecord { action: "login".into(), ..self.server.record(&start.actor, peer) };
        if !self.server.recorder.must(login).await {
            return self.refuse(name, &described, "the audit log cannot be written");
        }
        let user_name = user.name.clone();
        if self.live.login.set(Login { user, proof, grant }).is_err() {
            return self.refuse(name, &described, "this connection has logged in already");
        }
        // RACE: who reloads replaces the settings first and then looks at those that have logged in. Either it saw
        // this login, or the new settings are seen here.
        if !Arc::ptr_eq(&settings, &self.server.settings()) {
            self.live.end("the configuration was reloaded during the login; try again");
        }
        tracing::info!(%peer, user = user_name, key = described, "logged in");
        self.start = Some(start);
        self.permit.logged_in();
        self.live.touch();
        Auth::Accept
    }

    async fn offered(&mut self, name: &str, key: &KeyData, algorithm: &Algorithm) -> Auth {
        let fingerprint = key.fingerprint(russh::keys::HashAlg::Sha256).to_string();
        if matches!(algorithm, Algorithm::Rsa { hash: None } | Algorithm::Dsa) {
            return self.refuse(name, &fingerprint, "it is used with SHA-1; update the client, or use an Ed25519 key");
        }
        let access = self.server.settings().access.clone();
        let (asked, key, peer) = (name.to_owned(), key.clone(), self.live.peer);
        let judged = tokio::task::spawn_blocking(move || access.worth_signing(&asked, &key, peer)).await;
        match judged.unwrap_or_else(|error| Err(error.to_string())) {
            Ok(()) => Auth::Accept,
            Err(reason) => self.refuse(name, &fingerprint, &reason),
        }
    }

    /// Says once per connection and kind that something was refused.
    fn not_allowed(&mut self, what: &'static str, detail: &str) {
        let Some(start) = self.start.as_ref().filter(|_| self.said.insert(what)) else { return };
        let detail = short(detail, 200);
        tracing::warn!(peer = %self.live.peer, user = start.user, what, detail, "request refused");
        let reason = Some(if detail.is_empty() { what.to_owned() } else { format!("{what}: {detail}") });
        let record = self.server.record(&start.actor, self.live.peer);
        self.server.recorder.note(AuditRecord { action: "refuse".into(), reason, ..record });
    }

    async fn begin(&mut self, id: ChannelId, session: &mut Session) -> Result<(), russh::Error> {
        let (Some(channel), Some(start)) = (self.live.take(id), self.start.clone()) else {
            return session.channel_failure(id);
        };
        let stopping = if self.server.stopping() { Err("the server stops") } else { Ok(()) };
        let place = match stopping.and_then(|()| self.server.limits.session(&start.user)) {
            Ok(place) => place,
            Err(reason) => {
                self.not_allowed("a session", reason);
                session.channel_failure(id)?;
                return session.close(id);
            }
        };
        let (shared, packets) = channel::queue();
        let (factory, output) = (Arc::clone(&self.server.factory), Arc::clone(&shared) as Arc<dyn Output>);
        let given = Arc::clone(&start);
        let made = tokio::task::spawn_blocking(move || factory(&given, output)).await;
        let made = match made.unwrap_or_else(|error| Err(error.to_string())) {
            Ok(made) => Box::new(Held { session: made, _place: place }),
            Err(reason) => {
                tracing::error!(peer = %self.live.peer, user = start.user, reason, "no session");
                session.channel_failure(id)?;
                return session.close(id);
            }
        };
        session.channel_success(id)?;
        self.live.session(&shared);
        let (running, live, server) = (Arc::clone(&self.running), Arc::clone(&self.live), Arc::clone(&self.server));
        tokio::spawn(async move {
            let begun = std::time::Instant::now();
            let summary = channel::run(channel, shared, packets, made).await;
            live.touch();
            drop(running);
            server.session_ended(&live, &start, begun.elapsed(), summary);
        });
        Ok(())
    }
}

fn start(user: &ServeUser, peer: std::net::SocketAddr, proof: &Proof) -> SessionStart {
    SessionStart {
        user: user.name.clone(),
        root: user.root.clone(),
        rights: user.rights,
        quota: user.quota,
        policy: user.policy.clone(),
        peer,
        fingerprint: proof.fingerprint(),
        actor: format!("{}@{} ({})", user.name, peer.ip().to_canonical(), proof.describe()),
    }
}

/// The one command that may be run: the program's own file server.
fn is_file_server(command: &[u8]) -> bool {
    let Ok(command) = std::str::from_utf8(command) else { return false };
    let words: Vec<&str> = command.split(' ').filter(|word| !word.is_empty()).collect();
    matches!(words.as_slice(), [program, "sftp-server"] if program.rsplit('/').next() == Some("lockstep"))
}

impl Handler for Client {
    type Error = russh::Error;

    /// No banner; but this is called on the library's task, before any key is looked at.
    async fn authentication_banner(&mut self) -> Result<Option<String>, Self::Error> {
        hearsay::listen(&self.live);
        Ok(None)
    }

    async fn auth_publickey_offered(&mut self, user: &str, offer: PublicKeyOffer<'_>) -> Result<Auth, Self::Error> {
        // Only spares the client a signature; nothing is granted here.
        Ok(self.offered(user, offer.public_key.key_data(), offer.algorithm).await)
    }

    async fn auth_publickey(&mut self, user: &str, key: VerifiedPublicKey<'_>) -> Result<Auth, Self::Error> {
        Ok(self.log_in(user, Proof::Key(Box::new(key.public_key.key_data().clone()))).await)
    }

    async fn auth_openssh_certificate(&mut self, user: &str, certificate: &Certificate) -> Result<Auth, Self::Error> {
        Ok(self.log_in(user, Proof::Certificate(Box::new(certificate.clone()))).await)
    }

    async fn channel_open_session(
        &mut self,
        channel: Channel<Msg>,
        reply: ChannelOpenHandle,
        _session: &mut Session,
    ) -> Result<(), Self::Error> {
        let open = self.live.waiting() + Arc::strong_count(&self.running) - 1;
        if self.start.is_some() && open < self.server.settings().limits.channels.get() {
            self.live.opened(channel);
            reply.accept().await;
        } else {
            self.not_allowed("a channel", "too many in one connection");
            reply.reject(ChannelOpenFailure::ResourceShortage).await;
        }
        Ok(())
    }

    async fn channel_open_direct_tcpip(
        &mut self,
        _channel: Channel<Msg>,
        host: &str,
        port: u32,
        _originator: &str,
        _originator_port: u32,
        reply: ChannelOpenHandle,
        _session: &mut Session,
    ) -> Result<(), Self::Error> {
        self.not_allowed("port forwarding", &format!("to {}:{port}", Escaped(host.as_bytes())));
        reply.reject(ChannelOpenFailure::AdministrativelyProhibited).await;
        Ok(())
    }

    async fn channel_open_direct_streamlocal(
        &mut self,
        _channel: Channel<Msg>,
        path: &str,
        reply: ChannelOpenHandle,
        _session: &mut Session,
    ) -> Result<(), Self::Error> {
        self.not_allowed("socket forwarding", &format!("to {}", Escaped(path.as_bytes())));
        reply.reject(ChannelOpenFailure::AdministrativelyProhibited).await;
        Ok(())
    }

    async fn channel_close(&mut self, channel: ChannelId, _session: &mut Session) -> Result<(), Self::Error> {
        drop(self.live.take(channel));
        Ok(())
    }

    async fn subsystem_request(&mut self, id: ChannelId, name: &str, session: &mut Session) -> Result<(), Self::Error> {
        if matches!(name, "sftp" | "lockstep") {
            return self.begin(id, session).await;
        }
        self.not_allowed("a subsystem", &Escaped(name.as_bytes()).to_string());
        session.channel_failure(id)
    }

    async fn exec_request(&mut self, id: ChannelId, data: &[u8], session: &mut Session) -> Result<(), Self::Error> {
        if is_file_server(data) {
            return self.begin(id, session).await;
        }
        self.not_allowed("a command", &Escaped(data).to_string());
        session.channel_failure(id)
    }

    async fn shell_request(&mut self, id: ChannelId, session: &mut Session) -> Result<(), Self::Error> {
        self.not_allowed("a shell", "");
        session.channel_failure(id)
    }

    async fn pty_request(
        &mut self,
        id: ChannelId,
        _term: &str,
        _columns: u32,
        _rows: u32,
        _width: u32,
        _height: u32,
        _modes: &[(Pty, u32)],
        session: &mut Session,
    ) -> Result<(), Self::Error> {
        self.not_allowed("a terminal", "");
        session.channel_failure(id)
    }

    async fn x11_request(
        &mut self,
        id: ChannelId,
        _single: bool,
        _protocol: &str,
        _cookie: &str,
        _screen: u32,
        session: &mut Session,
    ) -> Result<(), Self::Error> {
        self.not_allowed("X11 forwarding", "");
        session.channel_failure(id)
    }

    /// Quietly: many clients send their language unasked.
    async fn env_request(
        &mut self,
        id: ChannelId,
        _name: &str,
        _value: &str,
        session: &mut Session,
    ) -> Result<(), Self::Error> {
        session.channel_failure(id)
    }

    async fn agent_request(&mut self, _id: ChannelId, _session: &mut Session) -> Result<bool, Self::Error> {
        self.not_allowed("agent forwarding", "");
        Ok(false)
    }

    async fn tcpip_forward(
        &mut self,
        address: &str,
        port: &mut u32,
        _session: &mut Session,
    ) -> Result<bool, Self::Error> {
        self.not_allowed("listening for the client", &format!("on {}:{port}", Escaped(address.as_bytes())));
        Ok(false)
    }

    async fn streamlocal_forward(&mut self, path: &str, _session: &mut Session) -> Result<bool, Self::Error> {
        self.not_allowed("listening for the client", &Escaped(path.as_bytes()).to_string());
        Ok(false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_command_is_known() {
        for (command, good) in [
            ("lockstep sftp-server", true),
            ("/usr/local/bin/lockstep  sftp-server ", true),
            ("lockstep sftp-server --root /", false),
            ("lockstep", false),
            ("lockstep sftp-server; id", false),
            ("lockstep\tsftp-server", false),
            ("notlockstep sftp-server", false),
            ("id", false),
            ("", false),
        ] {
            assert_eq!(is_file_server(command.as_bytes()), good, "{command}");
        }
    }
}
