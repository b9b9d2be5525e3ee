//! Starts the process of a connection.

use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::process::Stdio;

use tokio::net::{TcpStream, UnixStream};
use tokio::process::{Child, Command};

/// The command that a process is started with; it is not for people.
pub const COMMAND: &str = "serve-connection";

/// What is passed on of the environment: nothing that says something of this process.
const ENVIRONMENT: [&str; 5] = ["LOCKSTEP_LOG", "RUST_BACKTRACE", "TZ", "LANG", "LD_LIBRARY_PATH"];

/// Starts the process. The program is the one that runs, whatever has become of its file.
pub(super) async fn start(
    socket: TcpStream,
    peer: SocketAddr,
    number: u64,
) -> std::io::Result<(Child, UnixStream, OwnedFd)> {
    let (own, its) = UnixStream::pair()?;
    let (lane, its_lane) = std::os::unix::net::UnixStream::pair()?;
    let its_lane = OwnedFd::from(its_lane);
    let (socket, its) = (OwnedFd::from(socket.into_std()?), OwnedFd::from(its.into_std()?));
    let spawn = move || {
        let mut command = Command::new("/proc/self/exe");
        command.arg0("lockstep").arg(COMMAND).arg(peer.to_string()).arg(number.to_string()).env_clear();
        let kept = |(name, _): &(std::ffi::OsString, _)| {
            ENVIRONMENT.iter().any(|kept| name == kept) || name.as_encoded_bytes().starts_with(b"MIMALLOC_")
        };
        // The allocator's first pages would be huge ones: 6 MB for a process that needs a tenth of it, and there are as many as
        // connections that have not even logged in.
        command.env("MIMALLOC_ALLOW_THP", "0").envs(std::env::vars_os().filter(kept));
        // A group of its own: Ctrl-C at the listener's terminal is the listener's.
        command.process_group(0).kill_on_drop(true);
        command.stdin(Stdio::from(socket)).stdout(Stdio::from(its)).stderr(Stdio::from(its_lane));
        command.spawn()
    };
    let child = tokio::task::spawn_blocking(spawn).await.map_err(std::io::Error::other)??;
    Ok((child, own, lane.into()))
}
