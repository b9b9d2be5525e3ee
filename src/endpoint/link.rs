//! The byte streams that remote endpoints speak over. The `ssh` shell implements them; a test may use pipes.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use super::beside::Beside;
use crate::error::Exit;

/// A stream has ended otherwise than by its end.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{0}")]
pub struct LinkError(pub String);

/// A stream of bytes in both directions. Sending and receiving may go on at once, each from one thread at a time.
pub trait Link: Send + Sync {
    /// Queues bytes; blocks while the queue is full. Whole packets, in order.
    ///
    /// # Errors
    /// When the stream has ended.
    fn send(&self, packet: Bytes) -> Result<(), LinkError>;
    /// The next bytes, in whatever pieces they came; blocks. `None` at the end of the stream.
    ///
    /// # Errors
    /// When the stream broke.
    fn recv(&self) -> Result<Option<Bytes>, LinkError>;
    /// Says that nothing more will be sent.
    fn close(&self);
}

/// Why there is no stream.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{message}")]
pub struct ConnectError {
    /// What failed on which host, why, and what to do.
    pub message: String,
    /// [`Exit::Trust`] for host keys and authentication, [`Exit::TryAgain`] for the network.
    pub exit: Exit,
    /// The host is there and trusts us, but this way in is not offered: another may be tried.
    pub not_offered: bool,
    /// The host may have no room for a connection just now: for how long it is worth asking again; zero where it is not.
    pub patience: Duration,
}

/// What is asked for at the other end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Way {
    /// Subsystem `lockstep`.
    LockstepSubsystem,
    /// A command that runs `lockstep sftp-server`.
    LockstepExec(String),
    /// Subsystem `sftp`.
    SftpSubsystem,
}

/// A host that streams can be opened to.
pub trait Remote: Send + Sync {
    /// Opens a stream over the connection with this number; connections are made when first asked for.
    ///
    /// # Errors
    /// [`ConnectError`].
    fn open(&self, way: &Way, connection: usize) -> Result<Arc<dyn Link>, ConnectError>;
    /// Runs a command over the connection with this number; the stream is its standard input and output.
    ///
    /// # Errors
    /// [`ConnectError`].
    fn exec(&self, command: &str, connection: usize) -> Result<Arc<dyn Link>, ConnectError>;
    /// The connection with this number is of no more use: it ends when its streams have.
    fn leave(&self, connection: usize) {
        let _ = connection;
    }
    /// What makes connections to another port of the host, once one was made; nothing where others stand in between.
    fn beside(&self) -> Option<Arc<dyn Beside>> {
        None
    }
    /// `user@host:port`, for messages.
    fn describe(&self) -> String;
}
