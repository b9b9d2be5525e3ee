//! Names of users and groups for a confined process that has no listener to ask: another process looks them up, which does
//! nothing else and ends with it.

use std::io::{Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::scan::names::{Found, Question, ask_elsewhere, look_up};

/// The command that the process is started with.
pub const COMMAND: &str = "look-up-names";
const MESSAGE_MAX: usize = 64 << 10;

/// Starts the process, and has this one ask it from now on. No thread is started.
///
/// # Errors
/// When it cannot be started.
pub fn start() -> std::io::Result<()> {
    let (own, its) = UnixStream::pair()?;
    let mut command = Command::new("/proc/self/exe");
    command.arg(COMMAND).stdin(Stdio::from(OwnedFd::from(its))).stdout(Stdio::null()).stderr(Stdio::null());
    // It is not waited for: it ends when this process does.
    drop(command.spawn()?);
    let own = Mutex::new(own);
    ask_elsewhere(Box::new(move |question| {
        let mut stream = own.lock().unwrap_or_else(PoisonError::into_inner);
        write(&mut stream, &question).and_then(|()| read(&mut stream)).unwrap_or(Found::Nothing)
    }));
    Ok(())
}

/// Answers what is asked over standard input until its end.
///
/// # Errors
/// When that is no socket, or brings something else.
pub fn serve() -> std::io::Result<()> {
    let socket = rustix::io::fcntl_dupfd_cloexec(std::io::stdin(), 3)?;
    rustix::net::sockopt::socket_type(&socket)?;
    let mut stream = UnixStream::from(socket);
    loop {
        let question: Question = match read(&mut stream) {
            Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(()),
            question => question?,
        };
        write(&mut stream, &look_up(&question))?;
    }
}

pub(in crate::server) fn write(stream: &mut UnixStream, message: &impl Serialize) -> std::io::Result<()> {
    let body = serde_json::to_vec(message)?;
    let length = u32::try_from(body.len()).map_err(std::io::Error::other)?;
    stream.write_all(&[&length.to_be_bytes()[..], &body].concat())
}

pub(in crate::server) fn read<T: DeserializeOwned>(stream: &mut UnixStream) -> std::io::Result<T> {
    let mut length = [0; 4];
    stream.read_exact(&mut length)?;
    let length = u32::from_be_bytes(length) as usize;
    if length > MESSAGE_MAX {
        return Err(std::io::Error::other("the message is too long"));
    }
    let mut body = vec![0; length];
    stream.read_exact(&mut body)?;
    Ok(serde_json::from_slice(&body)?)
}
