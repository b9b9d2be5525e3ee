//! One further connection: the one key, one session of the one subsystem; everything else is refused.

use std::sync::Arc;

use russh::keys::ssh_key::public::KeyData;
use russh::server::{Auth, ChannelOpenHandle, Handler, Msg, PublicKeyOffer, Session, VerifiedPublicKey};
use russh::{Channel, ChannelId, ChannelOpenFailure, Pty};
use tokio::sync::watch;

use super::{Sessions, USER};
use crate::server::agent::Output;
use crate::server::channel;
use crate::server::process::own::Own;

pub(super) struct Client {
    pub(super) key: Arc<KeyData>,
    pub(super) own: Arc<Own>,
    pub(super) sessions: Sessions,
    pub(super) logged_in: watch::Sender<bool>,
    /// A channel was opened, and another is not to be had.
    pub(super) opened: bool,
}

impl Client {
    fn knows(&self, user: &str, key: &KeyData) -> Auth {
        if user == USER && *key == *self.key { Auth::Accept } else { Auth::reject() }
    }
}

impl Handler for Client {
    type Error = russh::Error;

    async fn auth_publickey_offered(&mut self, user: &str, offer: PublicKeyOffer<'_>) -> Result<Auth, Self::Error> {
        Ok(self.knows(user, offer.public_key.key_data()))
    }

    async fn auth_publickey(&mut self, user: &str, key: VerifiedPublicKey<'_>) -> Result<Auth, Self::Error> {
        let known = self.knows(user, key.public_key.key_data());
        self.logged_in.send_replace(known == Auth::Accept);
        Ok(known)
    }

    async fn channel_open_session(
        &mut self,
        channel: Channel<Msg>,
        reply: ChannelOpenHandle,
        _session: &mut Session,
    ) -> Result<(), Self::Error> {
        if *self.logged_in.borrow() && !self.opened {
            self.opened = true;
            self.own.opened(channel);
            reply.accept().await;
        } else {
            reply.reject(ChannelOpenFailure::ResourceShortage).await;
        }
        Ok(())
    }

    async fn channel_open_direct_tcpip(
        &mut self,
        _channel: Channel<Msg>,
        _host: &str,
        _port: u32,
        _originator: &str,
        _originator_port: u32,
        reply: ChannelOpenHandle,
        _session: &mut Session,
    ) -> Result<(), Self::Error> {
        reply.reject(ChannelOpenFailure::AdministrativelyProhibited).await;
        Ok(())
    }

    async fn channel_open_direct_streamlocal(
        &mut self,
        _channel: Channel<Msg>,
        _path: &str,
        reply: ChannelOpenHandle,
        _session: &mut Session,
    ) -> Result<(), Self::Error> {
        reply.reject(ChannelOpenFailure::AdministrativelyProhibited).await;
        Ok(())
    }

    async fn channel_close(&mut self, channel: ChannelId, _session: &mut Session) -> Result<(), Self::Error> {
        drop(self.own.take(channel));
        Ok(())
    }

    async fn subsystem_request(&mut self, id: ChannelId, name: &str, session: &mut Session) -> Result<(), Self::Error> {
        let Some(channel) = Some(id).filter(|_| name == "lockstep").and_then(|id| self.own.take(id)) else {
            return session.channel_failure(id);
        };
        let (shared, packets) = channel::queue();
        let (sessions, output) = (Arc::clone(&self.sessions), Arc::clone(&shared) as Arc<dyn Output>);
        // Who ends the connection waits for what has begun.
        self.own.session(&shared);
        let made = tokio::task::spawn_blocking(move || sessions(output)).await;
        let Ok(Ok(made)) = made else {
            self.own.session_ended();
            session.channel_failure(id)?;
            return session.close(id);
        };
        session.channel_success(id)?;
        let own = Arc::clone(&self.own);
        tokio::spawn(async move {
            channel::run(channel, shared, packets, made).await;
            own.session_ended();
        });
        Ok(())
    }

    async fn exec_request(&mut self, id: ChannelId, _command: &[u8], session: &mut Session) -> Result<(), Self::Error> {
        session.channel_failure(id)
    }

    async fn shell_request(&mut self, id: ChannelId, session: &mut Session) -> Result<(), Self::Error> {
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
        session.channel_failure(id)
    }

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
        Ok(false)
    }

    async fn tcpip_forward(
        &mut self,
        _address: &str,
        _port: &mut u32,
        _session: &mut Session,
    ) -> Result<bool, Self::Error> {
        Ok(false)
    }

    async fn streamlocal_forward(&mut self, _path: &str, _session: &mut Session) -> Result<bool, Self::Error> {
        Ok(false)
    }
}
