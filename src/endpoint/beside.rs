//! Connections beside the way in: an agent that a server of somebody else has started may listen on a port of its own for further
//! connections of one run (`docs/protocol.md`). The `ssh` shell makes them.

use std::sync::Arc;

use super::link::{ConnectError, Link};

/// Whom they log in as, whoever it was who came by the way in.
pub const USER: &str = "lockstep";

/// What makes the connections of one run.
pub trait Beside: Send + Sync {
    /// The key that they log in with, as it stands in `authorized_keys`.
    fn key(&self) -> &str;
    /// Whether the host answered at once when it was connected to first.
    fn is_near(&self) -> bool;
    /// Connects to this port of the host, which has to have this key there, and opens the subsystem.
    ///
    /// # Errors
    /// [`ConnectError`], with [`Exit::Trust`](crate::error::Exit::Trust) where somebody else is there, or in between.
    fn open(&self, port: u16, host_key: &str) -> Result<Arc<dyn Link>, ConnectError>;
}
