//! What a host has to prove before anything is said to it: its key, and a key exchange that cannot be tampered with.

use std::sync::{Arc, Mutex};

use russh::client::{DisconnectReason, Handler, Msg, Session};
use russh::keys::{PublicKey, PublicKeyOrCertificate};
use russh::{AlgorithmKind, Channel, ChannelOpenFailure, Names};

use super::known_hosts::{KnownHost, Verdict};
use super::lock;
use super::options::UnknownHost;
use crate::error::Exit;

/// Why a connection does not go on.
#[derive(Debug)]
pub(super) enum Stop {
    /// The host is not to be trusted.
    Refused(String),
    Protocol(russh::Error),
}

impl From<russh::Error> for Stop {
    fn from(error: russh::Error) -> Self {
        Stop::Protocol(error)
    }
}

impl Stop {
    /// What to say of a handshake that ended so.
    pub(super) fn explain(self, host: &str, said: Option<String>) -> (String, Exit) {
        match self {
            // The name is in it.
            Stop::Refused(reason) => (reason, Exit::Trust),
            Stop::Protocol(russh::Error::NoCommonAlgo { kind, ours, theirs }) => {
                let theirs = theirs.join(", ");
                let text = format!(
                    "{host}: refused: the host has no {} that is strong enough: it offers {}, and one of {} is needed; \
                     update its SSH server, or its configuration",
                    algorithm(kind),
                    if theirs.is_empty() { "none".into() } else { crate::error::said(theirs.as_bytes()) },
                    ours.iter()
                        .filter(|name| !name.contains("kex-strict") && !name.starts_with("ext-info"))
                        .cloned()
                        .collect::<Vec<_>>()
                        .join(", ")
                );
                (text, Exit::Trust)
            }
            Stop::Protocol(
                error @ (russh::Error::StrictKeyExchangeViolation { .. } | russh::Error::WrongServerSig),
            ) => (format!("{host}: refused: somebody tampers with the connection: {error}"), Exit::Trust),
            Stop::Protocol(error) => {
                let reason = said.unwrap_or_else(|| crate::error::said(error.to_string().as_bytes()));
                (format!("{host}: the handshake failed: {reason}; is an SSH server listening there?"), Exit::TryAgain)
            }
        }
    }
}

fn algorithm(kind: AlgorithmKind) -> &'static str {
    match kind {
        AlgorithmKind::Kex => "key exchange",
        AlgorithmKind::Key => "type of host key",
        AlgorithmKind::Cipher => "cipher",
        AlgorithmKind::Compression => "compression",
        AlgorithmKind::Mac => "MAC",
    }
}

/// How a connection ended.
#[derive(Default)]
pub(super) struct Heard(Mutex<End>);

#[derive(Default)]
struct End {
    /// What the host said when it hung up.
    goodbye: Option<String>,
    /// What broke, otherwise.
    failure: Option<String>,
}

impl Heard {
    /// What the host said when it hung up.
    pub(super) fn goodbye(&self) -> Option<String> {
        lock(&self.0).goodbye.clone()
    }

    /// The same, or what broke.
    pub(super) fn said(&self) -> Option<String> {
        let end = lock(&self.0);
        end.goodbye.clone().or_else(|| end.failure.clone())
    }
}

/// Decides on the host's key and the key exchange, and opens nothing for the host.
pub(super) struct Trust {
    known: KnownHost,
    unknown: UnknownHost,
    heard: Arc<Heard>,
    /// A key to be added once the key exchange is sound.
    new: Option<PublicKey>,
}

impl Trust {
    pub(super) fn new(known: KnownHost, unknown: UnknownHost, heard: Arc<Heard>) -> Trust {
        Trust { known, unknown, heard, new: None }
    }
}

impl Handler for Trust {
    type Error = Stop;

    async fn check_server_key(&mut self, offered: &PublicKeyOrCertificate) -> Result<bool, Stop> {
        let verdict = match offered {
            PublicKeyOrCertificate::PublicKey { key, .. } => self.known.check(key),
            PublicKeyOrCertificate::Certificate(certificate) => self.known.check_certificate(certificate),
        };
        match verdict {
            Verdict::Trusted => Ok(true),
            Verdict::Unknown(key, _) if self.unknown == UnknownHost::Add => {
                self.new = Some(key);
                Ok(true)
            }
            Verdict::Unknown(_, reason) | Verdict::Refused(reason) => Err(Stop::Refused(reason)),
        }
    }

    async fn kex_done(&mut self, _: Option<&[u8]>, names: &Names, _: &mut Session) -> Result<(), Stop> {
        if !names.strict_kex() {
            return Err(Stop::Refused(format!(
                "{}: refused: the host's SSH server does not do strict key exchange, so that somebody on the way could \
                 remove messages unseen (CVE-2023-48795); update it (OpenSSH has it since 9.6)",
                self.known.name()
            )));
        }
        if let Some(key) = self.new.take() {
            self.known.add_key(&key).map_err(Stop::Refused)?;
        }
        Ok(())
    }

    async fn disconnected(&mut self, reason: DisconnectReason<Stop>) -> Result<(), Stop> {
        match reason {
            DisconnectReason::ReceivedDisconnect(said) => {
                lock(&self.heard.0).goodbye = Some(crate::error::said(said.message.as_bytes()));
                Ok(())
            }
            DisconnectReason::Error(stop) => {
                let reason = match &stop {
                    Stop::Protocol(russh::Error::KeepaliveTimeout) => "the host has stopped answering".to_owned(),
                    Stop::Protocol(error) => crate::error::said(error.to_string().as_bytes()),
                    Stop::Refused(reason) => reason.clone(),
                };
                lock(&self.heard.0).failure = Some(reason);
                Err(stop)
            }
        }
    }

    // A server has nothing to open towards a client that forwards nothing.

    async fn server_channel_open_forwarded_tcpip(
        &mut self,
        _: Channel<Msg>,
        _: &str,
        _: u32,
        _: &str,
        _: u32,
        reply: Reply,
        _: &mut Session,
    ) -> Result<(), Stop> {
        refuse(reply, "forwarded-tcpip").await
    }

    async fn server_channel_open_forwarded_streamlocal(
        &mut self,
        _: Channel<Msg>,
        _: &str,
        reply: Reply,
        _: &mut Session,
    ) -> Result<(), Stop> {
        refuse(reply, "forwarded-streamlocal").await
    }

    async fn server_channel_open_agent_forward(
        &mut self,
        _: Channel<Msg>,
        reply: Reply,
        _: &mut Session,
    ) -> Result<(), Stop> {
        refuse(reply, "auth-agent").await
    }

    async fn server_channel_open_session(
        &mut self,
        _: Channel<Msg>,
        reply: Reply,
        _: &mut Session,
    ) -> Result<(), Stop> {
        refuse(reply, "session").await
    }

    async fn server_channel_open_direct_tcpip(
        &mut self,
        _: Channel<Msg>,
        _: &str,
        _: u32,
        _: &str,
        _: u32,
        reply: Reply,
        _: &mut Session,
    ) -> Result<(), Stop> {
        refuse(reply, "direct-tcpip").await
    }

    async fn server_channel_open_direct_streamlocal(
        &mut self,
        _: Channel<Msg>,
        _: &str,
        reply: Reply,
        _: &mut Session,
    ) -> Result<(), Stop> {
        refuse(reply, "direct-streamlocal").await
    }

    async fn server_channel_open_x11(
        &mut self,
        _: Channel<Msg>,
        _: &str,
        _: u32,
        reply: Reply,
        _: &mut Session,
    ) -> Result<(), Stop> {
        refuse(reply, "x11").await
    }
}

type Reply = russh::client::ChannelOpenHandle;

async fn refuse(reply: Reply, kind: &str) -> Result<(), Stop> {
    tracing::warn!(kind, "the host tried to open a channel; refused");
    reply.reject(ChannelOpenFailure::AdministrativelyProhibited).await;
    Ok(())
}
