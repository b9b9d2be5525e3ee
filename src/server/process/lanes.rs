//! Further connections of a run. Each is a process of its own, which cannot work on the run of another one: it passes what its
//! client says on to the process that has the run, over a socket that the listener hands there.

use std::io::{self, IoSlice, IoSliceMut, Read as _, Write as _};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    recvmsg, sendmsg,
};

use super::upstream::Upstream;
use crate::server::agent::Output;

/// The first packet of a session, as a client sends it: version 3.
const INIT: [u8; 9] = [0, 0, 0, 5, 1, 0, 0, 0, 3];
/// How long packets may be that come back.
const PACKET_MAX: usize = 64 << 20;

/// This process's end of a pair of sockets: either sockets of other processes come by it, or it is one of those.
pub struct Lane {
    socket: Mutex<Option<UnixStream>>,
    upstream: Upstream,
}

impl Lane {
    pub(super) fn new(socket: OwnedFd, upstream: Upstream) -> Lane {
        Lane { socket: Mutex::new(Some(socket.into())), upstream }
    }

    fn take(&self) -> Option<UnixStream> {
        self.socket.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// From now on further connections may work on runs of this process: `serve` is called with each, on a thread of its own.
    pub fn accept(&self, serve: impl Fn(UnixStream) + Send + Sync + 'static) {
        let Some(socket) = self.take() else { return };
        let serve = Arc::new(serve);
        let accept = move || {
            while let Ok(Some(lane)) = receive(&socket) {
                let serve = Arc::clone(&serve);
                let serve = move || serve(UnixStream::from(lane));
                if let Err(error) = std::thread::Builder::new().name("lane".into()).spawn(serve) {
                    tracing::warn!(%error, "no thread for a further connection of a run");
                }
            }
        };
        // Without the thread other connections wait for an answer, and end with this one.
        let _ = std::thread::Builder::new().name("lanes".into()).spawn(accept);
    }

    /// Has the process that has the run of this token do what the client asks for; nothing where there is none. Blocks.
    pub fn relay(&self, token: &[u8], output: Arc<dyn Output>) -> Option<Relay> {
        self.upstream.attach(token).then(|| self.take())?.and_then(|socket| Relay::start(socket, output).ok())
    }
}

/// What passes a client's packets on.
pub struct Relay {
    socket: UnixStream,
    thread: Option<JoinHandle<()>>,
}

impl Relay {
    fn start(mut socket: UnixStream, output: Arc<dyn Output>) -> io::Result<Relay> {
        // The client has begun its session with this process; the answer to this beginning is not for it.
        socket.write_all(&INIT)?;
        packet(&mut socket)?;
        let mut answers = socket.try_clone()?;
        let back = move || {
            while let Ok(packet) = packet(&mut answers) {
                output.send(packet);
            }
        };
        let thread = std::thread::Builder::new().name("relay".into()).spawn(back)?;
        Ok(Relay { socket, thread: Some(thread) })
    }

    /// Passes bytes on.
    ///
    /// # Errors
    /// When the other process has gone.
    pub fn feed(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.socket.write_all(bytes)
    }

    /// Nothing more will come; what was asked is still answered.
    pub fn finish(&mut self) {
        let _ = self.socket.shutdown(Shutdown::Write);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn packet(from: &mut UnixStream) -> io::Result<Vec<u8>> {
    let mut length = [0; 4];
    from.read_exact(&mut length)?;
    let body = u32::from_be_bytes(length) as usize;
    if body > PACKET_MAX {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut packet = vec![0; 4 + body];
    packet[..4].copy_from_slice(&length);
    from.read_exact(&mut packet[4..])?;
    Ok(packet)
}

/// Hands a socket to a process, without waiting for it.
pub(in crate::server) fn pass(to: impl AsFd, socket: &OwnedFd) -> rustix::io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds = [socket.as_fd()];
    control.push(SendAncillaryMessage::ScmRights(&fds));
    sendmsg(to, &[IoSlice::new(&[0])], &mut control, SendFlags::DONTWAIT | SendFlags::NOSIGNAL).map(drop)
}

/// The next socket; nothing when there will be none. Blocks.
pub(in crate::server) fn receive(from: impl AsFd) -> rustix::io::Result<Option<OwnedFd>> {
    loop {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut byte = [0];
        let mut into = [IoSliceMut::new(&mut byte)];
        match recvmsg(&from, &mut into, &mut control, RecvFlags::CMSG_CLOEXEC) {
            Ok(received) if received.bytes == 0 => return Ok(None),
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => continue,
            Err(error) => return Err(error),
        }
        let mut passed = control.drain().filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
            _ => None,
        });
        if let Some(socket) = passed.next() {
            return Ok(Some(socket));
        }
    }
}
