//! Connections to a port that an agent listens on, beside the SSH server that the first one came through: to the very address that
//! answered there, with a key that was made for them, and nothing from any file.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use russh::keys::ssh_key::getrandom::SysRng;
use russh::keys::ssh_key::private::{Ed25519Keypair, KeypairData};
use russh::keys::ssh_key::rand_core::TryRng as _;
use russh::keys::{PrivateKey, PrivateKeyWithHashAlg, PublicKey};

use super::dial;
use super::known_hosts::KnownHost;
use super::link::ChannelLink;
use super::options::SshOptions;
use super::remote::{Connection, OwnRuntime, failed, shake, started};
use crate::endpoint::beside::{Beside, USER};
use crate::endpoint::link::{ConnectError, Link};
use crate::error::Exit;

/// How long the port is waited for, where what stands in between says nothing: one packet may be lost.
const REACH: Duration = Duration::from_millis(1500);
/// And then for the session, beside so many times the way there and back.
const SESSION: Duration = Duration::from_secs(3);
const SESSION_WAYS: u32 = 20;

/// What makes the connections of one run.
pub(super) struct Side {
    host: SocketAddr,
    near: bool,
    options: SshOptions,
    key: Arc<PrivateKey>,
    public: String,
    runtime: Arc<OwnRuntime>,
}

impl Side {
    /// To the host that answered at this address; nothing where no key can be made.
    pub(super) fn new(host: SocketAddr, near: bool, options: &SshOptions, runtime: Arc<OwnRuntime>) -> Option<Side> {
        let mut seed = [0; 32];
        SysRng.try_fill_bytes(&mut seed).ok()?;
        let key = PrivateKey::new(KeypairData::Ed25519(Ed25519Keypair::from_seed(&seed)), "").ok()?;
        let public = key.public_key().to_openssh().ok()?;
        let own = SshOptions::new(USER, &host.ip().to_string(), host.port());
        // Without it, what stands in between and says nothing would be waited for.
        let options = SshOptions { keepalive: options.keepalive.or(own.keepalive), ..own };
        Some(Side { host, near, options, key: Arc::new(key), public, runtime })
    }

    async fn connect(&self, port: u16, host_key: PublicKey) -> Result<Arc<dyn Link>, ConnectError> {
        let options = SshOptions { port, ..self.options.clone() };
        let again = |what: String| failed(&options, what, Exit::TryAgain);
        let mut address = self.host;
        address.set_port(port);
        let reached = tokio::time::timeout(REACH, dial::to(address)).await;
        let (stream, round_trip) = match reached {
            Ok(Ok(reached)) => reached,
            Ok(Err(error)) => return Err(again(format!("cannot connect: {}", crate::error::in_words(&error)))),
            Err(_) => return Err(again(format!("no answer within {} s", REACH.as_secs_f32()))),
        };
        let session = async {
            let known = KnownHost::told(&options, host_key);
            let (mut handle, heard) = shake(&options, known, Box::new(stream)).await?;
            let key = PrivateKeyWithHashAlg::new(Arc::clone(&self.key), None);
            let login = handle.authenticate_publickey(USER, key).await;
            if !login.is_ok_and(|result| result.success()) {
                return Err(again("it does not take the key that its agent was told".to_owned()));
            }
            let connection = Arc::new(Connection::direct(handle, heard, None, Arc::clone(&self.runtime)));
            let opened = connection.handle.channel_open_session().await;
            let mut channel = opened.map_err(|error| again(format!("no channel: {error}")))?;
            let asked = channel.request_subsystem(true, "lockstep").await;
            asked.map_err(|error| again(format!("no channel: {error}")))?;
            let early = started(&options, &mut channel, "subsystem lockstep").await?;
            let link = ChannelLink::start(channel, connection, options.describe(), early).await;
            Ok(Arc::new(link) as Arc<dyn Link>)
        };
        let opened = tokio::time::timeout(SESSION + round_trip * SESSION_WAYS, session).await;
        opened.unwrap_or_else(|_| Err(again("it does not go on".to_owned())))
    }
}

impl Beside for Side {
    fn key(&self) -> &str {
        &self.public
    }

    fn is_near(&self) -> bool {
        self.near
    }

    fn open(&self, port: u16, host_key: &str) -> Result<Arc<dyn Link>, ConnectError> {
        let options = &self.options;
        let key = PublicKey::from_openssh(host_key);
        let key = key.map_err(|_| failed(options, "its agent has told a host key that is none", Exit::TryAgain))?;
        let ended = || Err(failed(options, "already ended", Exit::TryAgain));
        self.runtime.block_on(self.connect(port, key)).unwrap_or_else(ended)
    }
}
