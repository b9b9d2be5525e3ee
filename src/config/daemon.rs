//! `[daemon]`: where it keeps what it knows, and where it can be asked.

use std::net::SocketAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// The daemon.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Daemon {
    /// Where it keeps what it knows; absolute. Left out: `$STATE_DIRECTORY`, as systemd gives it, or the user's state directory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<PathBuf>,
    /// The Unix socket that `lockstep status` asks; absolute. Left out: `$RUNTIME_DIRECTORY/daemon.sock`, or beside the user's
    /// other sockets.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket: Option<PathBuf>,
    /// Where the page and the metrics are served, as `127.0.0.1:9478`; a loopback address. Left out: nowhere.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub listen: Option<SocketAddr>,
    /// A file that the metrics are written to every 15 seconds, for node_exporter's textfile collector; absolute.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metrics_file: Option<PathBuf>,
}

impl Daemon {
    /// What the types alone do not say.
    pub(super) fn check(&self) -> Result<(), String> {
        for (field, path) in [("state", &self.state), ("socket", &self.socket), ("metrics_file", &self.metrics_file)] {
            if let Some(path) = path {
                super::absolute(field, path)?;
            }
        }
        match self.listen {
            Some(address) if !address.ip().is_loopback() => Err(format!(
                "'listen' is '{address}', which others can reach: the page asks nobody who he is; name a loopback address, as \
                 '127.0.0.1:{}', and let a proxy that asks stand in front",
                address.port()
            )),
            _ => Ok(()),
        }
    }
}
