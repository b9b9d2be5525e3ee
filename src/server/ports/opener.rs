//! The process that listens: it binds a port, and hands over whoever comes from the client's address. A confined process can make
//! no socket, and has none made for it but by this one, which does nothing else and ends with it.

use std::io::{self, Read as _, Write as _};
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::Place;
use crate::error::in_words;
use crate::server::confine::names::{read, write};
use crate::server::process::lanes::{pass, receive};

/// The command that the process is started with.
pub const COMMAND: &str = "hand-over-connections";

/// What becomes of the wish for a port.
#[derive(Serialize, Deserialize)]
enum Answer {
    Port(u16),
    No(String),
}

/// The process, as the one that asks sees it.
pub(super) struct Opener(UnixStream);

impl Opener {
    /// Starts it; it does nothing yet. No thread is started.
    pub(super) fn start(place: &Place) -> io::Result<Opener> {
        let (own, its) = UnixStream::pair()?;
        let mut command = Command::new("/proc/self/exe");
        command.args([COMMAND, &place.address.to_string(), &place.client.to_string(), &place.ports.to_string()]);
        command.stdin(Stdio::from(OwnedFd::from(its))).stdout(Stdio::null()).stderr(Stdio::null());
        // It is not waited for: it ends when this process does.
        drop(command.spawn()?);
        Ok(Opener(own))
    }

    /// Has it listen; the port.
    pub(super) fn listen(&mut self) -> Result<u16, String> {
        let answer = self.0.write_all(&[0]).and_then(|()| read(&mut self.0));
        match answer.map_err(|error| in_words(&error))? {
            Answer::Port(port) => Ok(port),
            Answer::No(reason) => Err(reason),
        }
    }

    /// The next who came; nothing when nobody comes any more. Blocks.
    pub(super) fn next(&self) -> Option<OwnedFd> {
        receive(&self.0).ok().flatten()
    }

    /// The same process, for whoever ends it.
    pub(super) fn end(&self) -> io::Result<End> {
        self.0.try_clone().map(End)
    }
}

/// Ends the process when it is dropped, with all who wait for somebody to come.
pub(super) struct End(UnixStream);

impl Drop for End {
    fn drop(&mut self) {
        let _ = self.0.shutdown(std::net::Shutdown::Both);
    }
}

/// Listens when it is told to over standard input, until that ends.
///
/// # Errors
/// When that is no socket.
pub fn serve(place: &Place) -> io::Result<()> {
    let socket = rustix::io::fcntl_dupfd_cloexec(io::stdin(), 3)?;
    rustix::net::sockopt::socket_type(&socket)?;
    let mut asking = UnixStream::from(socket);
    if asking.read(&mut [0])? == 0 {
        return Ok(());
    }
    let listener = match bind(place) {
        Ok((listener, port)) => write(&mut asking, &Answer::Port(port)).map(|()| listener)?,
        Err(reason) => return write(&mut asking, &Answer::No(reason)),
    };
    loop {
        let mut polled = [PollFd::new(&listener, PollFlags::IN), PollFd::new(&asking, PollFlags::IN)];
        match poll(&mut polled, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let [comes, ended] = [0, 1].map(|at: usize| !polled[at].revents().is_empty());
        if ended {
            return Ok(());
        }
        match comes.then(|| listener.accept()) {
            Some(Ok((client, peer))) if peer.ip().to_canonical() == place.client => {
                let _ = (client.set_nonblocking(true), client.set_nodelay(true));
                // Who comes faster than he is taken is turned away.
                let _ = pass(&asking, &OwnedFd::from(client));
            }
            // There may be no descriptor for him just now.
            Some(Err(error)) if error.kind() != io::ErrorKind::WouldBlock => {
                std::thread::sleep(std::time::Duration::from_millis(100));
            }
            _ => {}
        }
    }
}

/// One of the ports, at the address that the client came to.
fn bind(place: &Place) -> Result<(TcpListener, u16), String> {
    let ports: Vec<u16> = place.ports.all().collect();
    // Those who begin at once do not all try the same.
    let from = std::process::id() as usize % ports.len();
    let mut last = String::new();
    for &port in ports[from..].iter().chain(&ports[..from]) {
        match TcpListener::bind((place.address, port)) {
            Ok(listener) => {
                // Who has gone again before he was taken is not waited for.
                listener.set_nonblocking(true).map_err(|error| in_words(&error))?;
                return Ok((listener, port));
            }
            Err(error) => last = in_words(&error),
        }
    }
    Err(format!("none of the ports {} of {} can be listened on: {last}", place.ports, place.address))
}
