//! One client: which keys are accepted, which channels and requests. Files may be moved; everything else is refused.

use std::collections::HashSet;
use std::sync::Arc;

use russh::keys::ssh_key::public::KeyData;
use russh::keys::{Algorithm, Certificate};
use russh::server::{Auth, ChannelOpenHandle, Handler, Msg, PublicKeyOffer, Session, VerifiedPublicKey};
use russh::{Channel, ChannelId, ChannelOpenFailure, Pty};

use super::message::{Granted, fingerprint};
use super::own::Own;
use super::upstream::Upstream;
use crate::config::Confine;
use crate::error::{Escaped, chain};
use crate::server::access::Proof;
use crate::server::agent::Output;
use crate::server::channel;
use crate::server::confine::{self, Wanted};
use crate::server::listener::{SessionFactory, SessionStart};
use crate::server::live::short;

pub(super) struct Client {
    upstream: Upstream,
    own: Arc<Own>,
    factory: SessionFactory,
    start: Option<Arc<SessionStart>>,
    /// Requests that were refused, to say it once.
    said: HashSet<&'static str>,
}

impl Client {
    pub(super) fn new(upstream: Upstream, own: Arc<Own>, factory: SessionFactory) -> Client {
        Client { upstream, own, factory, start: None, said: HashSet::new() }
    }

    /// Has the listener decide on what a client has proven to hold. Then this process is its user's, and nobody else's.
    async fn log_in(&mut self, name: &str, proof: Proof) -> Auth {
        if self.start.is_some() {
            self.upstream.refused("this connection has logged in already");
            return Auth::reject();
        }
        let Granted { start, identity, confine } = match self.upstream.proven(name, &proof).await {
            Ok(granted) => granted,
            Err(_) => return Auth::reject(),
        };
        let wanted = Wanted {
            root: &start.root,
            read_only: !start.rights.writes(),
            identity: identity.as_ref(),
            require: confine == Confine::Require,
        };
        let confined = confine::enter(&wanted).map_err(|error| chain(&error));
        if let Err(reason) = self.upstream.confined(confined).await {
            // It may be confined to this user's root already: nobody else can log in here.
            self.own.end(&reason);
            return Auth::reject();
        }
        self.start = Some(Arc::new(start));
        self.own.touch();
        Auth::Accept
    }

    async fn offered(&mut self, name: &str, key: &KeyData, algorithm: &Algorithm) -> Auth {
        if matches!(algorithm, Algorithm::Rsa { hash: None } | Algorithm::Dsa) {
            let (name, key) = (short(&Escaped(name.as_bytes()).to_string(), 64), fingerprint(key));
            let reason = "it is used with SHA-1; update the client, or use an Ed25519 key";
            self.upstream.refused(&format!("user {name}, {key}: {reason}"));
            return Auth::reject();
        }
        // Why not is known to the listener, and told by it.
        if self.upstream.offered(name, key).await.is_ok() { Auth::Accept } else { Auth::reject() }
    }

    /// Says once per connection and kind that something was refused.
    fn not_allowed(&mut self, what: &'static str, detail: &str) {
        if self.start.is_some() && self.said.insert(what) {
            self.upstream.not_allowed(what, detail);
        }
    }

    async fn begin(&mut self, id: ChannelId, session: &mut Session) -> Result<(), russh::Error> {
        let (Some(channel), Some(start)) = (self.own.take(id), self.start.clone()) else {
            return session.channel_failure(id);
        };
        let number = match self.upstream.session().await {
            Ok(number) => number,
            Err(reason) => {
                self.not_allowed("a session", &reason);
                session.channel_failure(id)?;
                return session.close(id);
            }
        };
        let (shared, packets) = channel::queue();
        let (factory, output) = (Arc::clone(&self.factory), Arc::clone(&shared) as Arc<dyn Output>);
        let made = tokio::task::spawn_blocking(move || factory(&start, output)).await;
        let made = match made.unwrap_or_else(|error| Err(error.to_string())) {
            Ok(made) => made,
            Err(reason) => {
                self.upstream.no_session(number, &reason);
                session.channel_failure(id)?;
                return session.close(id);
            }
        };
        session.channel_success(id)?;
        self.own.session(&shared);
        let (own, upstream) = (Arc::clone(&self.own), self.upstream.clone());
        tokio::spawn(async move {
            let channel::Summary { received, sent, error } = channel::run(channel, shared, packets, made).await;
            upstream.session_ended(number, received, sent, error);
            own.session_ended();
        });
        Ok(())
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
        if self.start.is_some() && self.own.has_room() {
            self.own.opened(channel);
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
        drop(self.own.take(channel));
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
