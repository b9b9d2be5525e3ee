//! What the listener and the process of a connection tell each other: a length and JSON, over a pair of sockets.
//!
//! The listener believes nothing of it further than the connection goes that it is about: what comes is bounded in size, each
//! kind is expected only where it belongs, and answers are the listener's own.

use std::ffi::OsStr;
use std::io;
use std::net::SocketAddr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use russh::keys::ssh_key::PublicKey;
use russh::keys::ssh_key::public::KeyData;
use russh::keys::{Certificate, HashAlg};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use tokio::io::{AsyncRead, AsyncReadExt as _};

use crate::audit;
use crate::config::Confine;
use crate::scan::names::{Found, Question};
use crate::server::access::Proof;
use crate::server::confine::{Confinement, Identity};
use crate::server::listener::SessionStart;
use crate::server::penalties::Fault;

/// The longest message of a process. A packet of the client, with a certificate in it, has 256 KiB at most.
pub(in crate::server) const FROM_PROCESS_MAX: usize = 512 << 10;
/// The longest message to a process: a policy has 512 KiB of globs at most.
pub(super) const TO_PROCESS_MAX: usize = 16 << 20;

/// The first message: all that is needed before anybody has logged in, as the listener has it now.
#[derive(Serialize, Deserialize)]
pub(in crate::server) struct Setup {
    /// In OpenSSH's form.
    pub(in crate::server) host_key: String,
    /// Likewise.
    pub(in crate::server) certificates: Vec<String>,
    pub(in crate::server) strict_key_exchange: bool,
    pub(in crate::server) auth_tries: usize,
    pub(in crate::server) idle_seconds: u64,
    pub(in crate::server) channels: usize,
    /// Connections that there may be: they share what memory there is for clients that take nothing.
    pub(in crate::server) connections: usize,
    /// How the logs of roots are kept.
    pub(in crate::server) log: audit::Settings,
}

/// What a client has shown, in OpenSSH's form.
#[derive(Serialize, Deserialize)]
pub(in crate::server) enum Shown {
    Key(String),
    Certificate(String),
}

/// Of a process.
#[derive(Serialize, Deserialize)]
pub(in crate::server) enum FromProcess {
    /// A question, to be answered by the number.
    Asked(u64, Asked),
    /// Something about the client was refused; for the line at the end.
    Refused(String),
    /// A request that is nobody's here.
    NotAllowed { what: String, detail: String },
    /// A session that was admitted could not be made.
    NoSession { number: u64, reason: String },
    /// A session has ended, with its thread.
    SessionEnded { number: u64, received: u64, sent: u64, error: Option<String> },
    /// How long the client has done nothing.
    Quiet { number: u64, milliseconds: u64 },
    /// A line for the log.
    Said { level: Level, text: String },
    /// The connection is over; sessions may still end. With what the client did amiss, which counts if it never logged in.
    Ended { fault: Option<Fault>, why: Option<String> },
}

/// Questions of a process.
#[derive(Serialize, Deserialize)]
pub(in crate::server) enum Asked {
    /// Whether it is worth a client's while to sign with this key.
    Offered { user: String, key: String },
    /// Whether the client that has proven this may log in.
    Proven { user: String, shown: Shown },
    /// The process of the client is confined, or could not be; whether it may go on.
    Confined(Result<Confinement, String>),
    /// A place for a session.
    Session,
    /// To work on the run of another process of the same user, by its token.
    Attach(Vec<u8>),
    /// About users and groups of this machine.
    Name(Question),
}

/// To a process.
#[derive(Serialize, Deserialize)]
pub(in crate::server) enum ToProcess {
    Answer(u64, Answer),
    /// To be answered with the number, at once.
    HowQuiet(u64),
    /// So many sessions may be open in a connection.
    Channels(usize),
    /// It is to end, and to tell the client why.
    End(String),
}

/// Answers of the listener.
#[derive(Serialize, Deserialize)]
pub(in crate::server) enum Answer {
    Yes,
    /// The number of the session.
    Place(u64),
    No(String),
    Granted(Box<Granted>),
    Name(Found),
}

/// For whom the process is from now on.
#[derive(Clone, Serialize, Deserialize)]
pub(in crate::server) struct Granted {
    pub(in crate::server) start: SessionStart,
    pub(in crate::server) identity: Option<Identity>,
    pub(in crate::server) confine: Confine,
}

/// How much a line of the log matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Level {
    /// Something failed.
    Error,
    /// Somebody should look.
    Warn,
    /// As it should be.
    Info,
    /// For who looks for a mistake.
    Debug,
}

impl Shown {
    pub(in crate::server) fn of(proof: &Proof) -> Result<Shown, String> {
        let text = match proof {
            Proof::Key(key) => return key_text(key).map(Shown::Key),
            Proof::Certificate(certificate) => certificate.to_openssh(),
        };
        text.map(Shown::Certificate).map_err(|error| error.to_string())
    }

    pub(in crate::server) fn proof(&self) -> Result<Proof, String> {
        Ok(match self {
            Shown::Key(text) => Proof::Key(Box::new(key_of(text)?)),
            Shown::Certificate(text) => {
                Proof::Certificate(Box::new(Certificate::from_openssh(text).map_err(|error| error.to_string())?))
            }
        })
    }
}

pub(in crate::server) fn key_text(key: &KeyData) -> Result<String, String> {
    PublicKey::from(key.clone()).to_openssh().map_err(|error| error.to_string())
}

pub(in crate::server) fn key_of(text: &str) -> Result<KeyData, String> {
    let key = PublicKey::from_openssh(text).map_err(|error| error.to_string())?;
    Ok(key.key_data().clone())
}

/// `SHA256:…` of a key.
pub(in crate::server) fn fingerprint(key: &KeyData) -> String {
    key.fingerprint(HashAlg::Sha256).to_string()
}

/// A message as it is sent.
pub(in crate::server) fn frame<T: Serialize>(message: &T) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; 4];
    serde_json::to_writer(&mut bytes, message)?;
    let length = u32::try_from(bytes.len() - 4).map_err(io::Error::other)?;
    bytes[..4].copy_from_slice(&length.to_be_bytes());
    Ok(bytes)
}

/// Messages out of a stream.
pub(in crate::server) struct Frames<R> {
    stream: R,
    buffer: Vec<u8>,
    most: usize,
}

impl<R: AsyncRead + Unpin> Frames<R> {
    /// None is longer than `most`.
    pub(in crate::server) fn new(stream: R, most: usize) -> Frames<R> {
        Frames { stream, buffer: Vec::new(), most }
    }

    /// The next message; `None` at the end. What was read of one stays when this is dropped.
    pub(in crate::server) async fn next<T: DeserializeOwned>(&mut self) -> io::Result<Option<T>> {
        loop {
            if let Some((head, rest)) = self.buffer.split_first_chunk::<4>() {
                let length = u32::from_be_bytes(*head) as usize;
                if length > self.most {
                    return Err(io::Error::other(format!("a message of {length} bytes")));
                }
                if let Some(body) = rest.get(..length) {
                    let message = serde_json::from_slice(body)?;
                    self.buffer.drain(..4 + length);
                    return Ok(Some(message));
                }
            }
            if self.stream.read_buf(&mut self.buffer).await? == 0 {
                return Ok(None);
            }
        }
    }
}

/// For serde: a path of any bytes.
pub(in crate::server) mod path {
    use super::{Deserialize, Deserializer, OsStr, OsStrExt, Path, PathBuf, Serialize as _, Serializer};

    pub(in crate::server) fn serialize<S: Serializer>(path: &Path, output: S) -> Result<S::Ok, S::Error> {
        path.as_os_str().as_bytes().serialize(output)
    }

    pub(in crate::server) fn deserialize<'de, D: Deserializer<'de>>(input: D) -> Result<PathBuf, D::Error> {
        let bytes = Vec::<u8>::deserialize(input)?;
        Ok(PathBuf::from(OsStr::from_bytes(&bytes)))
    }
}

/// The number of the connection whose process has the run of a token.
pub(in crate::server) fn origin(token: &[u8]) -> Option<u64> {
    token.first_chunk().map(|number| u64::from_be_bytes(*number))
}

/// The address of the client, as it is given to the process on its command line.
pub(in crate::server) fn peer(text: &OsStr) -> Option<SocketAddr> {
    text.to_str()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_come_out_of_any_pieces_and_none_is_too_long() {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let sent = [
            frame(&FromProcess::Refused("a".into())).unwrap(),
            frame(&FromProcess::Quiet { number: 7, milliseconds: 8 }).unwrap(),
        ]
        .concat();
        runtime.block_on(async {
            let mut frames = Frames::new(&sent[..], FROM_PROCESS_MAX);
            assert!(matches!(frames.next().await, Ok(Some(FromProcess::Refused(text))) if text == "a"));
            assert!(matches!(frames.next().await, Ok(Some(FromProcess::Quiet { number: 7, milliseconds: 8 }))));
            assert!(matches!(frames.next::<FromProcess>().await, Ok(None)));
            let mut short = Frames::new(&sent[..], 4);
            assert!(short.next::<FromProcess>().await.is_err());
            let mut rubbish = Frames::new(&[0, 0, 0, 2, b'{', b'}'][..], 100);
            assert!(rubbish.next::<FromProcess>().await.is_err());
        });
    }

    #[test]
    fn a_root_may_have_any_bytes() {
        #[derive(Serialize, Deserialize)]
        struct Rooted(#[serde(with = "path")] PathBuf);
        let odd = PathBuf::from(OsStr::from_bytes(b"/data/\xff\xfe"));
        let text = serde_json::to_vec(&Rooted(odd.clone())).unwrap();
        assert_eq!(serde_json::from_slice::<Rooted>(&text).unwrap().0, odd);
    }
}
