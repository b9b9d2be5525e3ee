//! A session over standard input and output, as sshd starts a subsystem.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, IoSlice, Read, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;

use super::agent::{Extensions, Output};
use super::session::{Session, SessionConfig};

/// Replies that wait for a client which does not read; then its requests wait too.
const OUT_LIMIT: usize = 8 << 20;
const IN_BUFFER: usize = 256 << 10;
/// What pipes hold, where the system lets them: fewer changes between the two processes.
const PIPE: usize = 1 << 20;
/// Packets in one system call.
const VECTOR: usize = 64;

/// Replies on their way to standard output, written by a thread of its own.
#[derive(Default)]
struct Replies {
    waiting: Mutex<Waiting>,
    changed: Condvar,
}

#[derive(Default)]
struct Waiting {
    packets: VecDeque<Vec<u8>>,
    /// Of the packets that wait and of those that are being written.
    bytes: usize,
    /// No packet will come any more.
    complete: bool,
    /// The client has gone: packets are dropped. The session ends with its input.
    gone: bool,
    /// All that is to be written was.
    over: bool,
}

impl Replies {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut Waiting)) {
        change(&mut self.lock());
        self.changed.notify_all();
    }

    /// The packets that wait; `None` when there will be none.
    fn take(&self) -> Option<VecDeque<Vec<u8>>> {
        let mut waiting = self.lock();
        while waiting.packets.is_empty() {
            if waiting.complete {
                return None;
            }
            waiting = self.changed.wait(waiting).unwrap_or_else(PoisonError::into_inner);
        }
        Some(std::mem::take(&mut waiting.packets))
    }

    fn write_to(&self, mut out: impl Write) {
        while let Some(mut packets) = self.take() {
            while !packets.is_empty() {
                let some: Vec<Vec<u8>> = packets.drain(..packets.len().min(VECTOR)).collect();
                let written = write_all(&mut out, &some);
                let bytes: usize = some.iter().map(Vec::len).sum();
                self.change(|waiting| {
                    waiting.bytes -= bytes;
                    waiting.gone |= written.is_err();
                });
            }
        }
    }
}

impl Output for Replies {
    fn send(&self, packet: Vec<u8>) {
        let mut waiting = self.lock();
        while waiting.bytes > OUT_LIMIT && !waiting.gone && !waiting.over {
            waiting = self.changed.wait(waiting).unwrap_or_else(PoisonError::into_inner);
        }
        if !waiting.gone && !waiting.over {
            waiting.bytes += packet.len();
            waiting.packets.push_back(packet);
            drop(waiting);
            self.changed.notify_all();
        }
    }

    fn is_gone(&self) -> bool {
        self.lock().gone
    }
}

fn write_all(out: &mut impl Write, packets: &[Vec<u8>]) -> io::Result<()> {
    let mut slices: Vec<IoSlice<'_>> = packets.iter().map(|packet| IoSlice::new(packet)).collect();
    let mut left = &mut slices[..];
    while !left.is_empty() {
        match out.write_vectored(left) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => IoSlice::advance_slices(&mut left, count),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Serves until the end of the input.
///
/// # Errors
/// When the root cannot be opened, the input cannot be read or is not SFTP.
pub fn run(config: SessionConfig, extensions: Option<Arc<dyn Extensions>>) -> io::Result<()> {
    allow_open_files();
    over(duplicate(io::stdin())?, duplicate(io::stdout())?, config, extensions)
}

/// The same over another pair of streams.
///
/// # Errors
/// Likewise.
pub fn over(
    mut input: File,
    out: File,
    config: SessionConfig,
    extensions: Option<Arc<dyn Extensions>>,
) -> io::Result<()> {
    let watched = out.try_clone()?;
    let replies = Arc::new(Replies::default());
    let mut session = Session::new(config, replies.clone(), extensions).map_err(io::Error::other)?;
    let queue = Arc::clone(&replies);
    let writer = std::thread::Builder::new().name("replies".into()).spawn(move || queue.write_to(out))?;
    watch(watched, &replies)?;
    let mut buffer = vec![0; IN_BUFFER];
    let result = loop {
        match input.read(&mut buffer) {
            Ok(0) => break Ok(()),
            Ok(count) => match session.feed(&buffer[..count]) {
                Ok(()) => {}
                Err(error) => break Err(io::Error::other(error)),
            },
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => break Err(error),
        }
    };
    session.finish();
    replies.change(|waiting| waiting.complete = true);
    let _ = writer.join();
    // Nobody takes what is still to come of what goes on, which may not wait for that.
    replies.change(|waiting| waiting.over = true);
    result
}

/// Notices when nobody can read the replies any more, though there may be requests to be read yet.
fn watch(out: File, replies: &Arc<Replies>) -> io::Result<()> {
    let replies = Arc::clone(replies);
    let wait = move || {
        use rustix::event::{PollFd, PollFlags, poll};
        loop {
            // The end of a pipe or socket is told without being asked for.
            let mut polled = [PollFd::new(&out, PollFlags::empty())];
            match poll(&mut polled, None) {
                Ok(_) if polled[0].revents().intersects(PollFlags::HUP | PollFlags::ERR) => break,
                Err(Errno::INTR) => {}
                // It is noticed when something is written, then.
                Ok(_) | Err(_) => return,
            }
        }
        replies.change(|waiting| waiting.gone = true);
    };
    std::thread::Builder::new().name("client".into()).spawn(wait).map(drop)
}

/// As many open files as the system lets this process have: handles are files. Where it does not, OPEN fails sooner.
pub fn allow_open_files() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
}

/// Past the buffers of the standard library: packets are whole anyway.
fn duplicate(stream: impl std::os::fd::AsFd) -> io::Result<File> {
    let file = File::from(stream.as_fd().try_clone_to_owned()?);
    let _ = rustix::pipe::fcntl_setpipe_size(&file, PIPE);
    Ok(file)
}
