//! A side of a run that only has a stock SFTP server, OpenSSH's above all.
//!
//! Nothing of lockstep runs there: what an agent does for itself is done here by requests, many of them in flight. The
//! server knows times to the second, no ACLs and no holes; what it holds is proven by a command where the account has
//! a shell, else by reading it back (`prove`).

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use crate::endpoint::Error;
use crate::endpoint::client::{Client, ClientOptions};
use crate::endpoint::link::{Link, Remote, Way};
use crate::error::Escaped;
use crate::manifest::Timestamp;
use crate::path::RelPath;
use crate::wire::sftp::{Attributes, packet};

mod adopt;
mod audit;
mod execute;
mod follow;
mod list;
mod lock;
mod names;
mod prove;
mod publish;
mod read;
mod reader;
mod record;
mod session;
mod shell;
mod source;
mod stage;
mod target;
mod writer;

pub use source::StockSource;
pub use target::StockTarget;

use session::{Reply, Session};

/// A stock server may take its time to bring a large file to the disk. That the host is there at all is found out by the
/// keepalive of the connection.
const TIMEOUT: Duration = Duration::from_secs(600);

/// Connections that log in at once: sshd drops some of those beyond its MaxStartups, ten.
const LOGINS: usize = 4;

/// How it is proven what a stock server holds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Verify {
    /// By a command where the account can run one, else by reading back.
    #[default]
    Auto,
    /// By a command, and not at all without one.
    Exec,
    /// By reading back; no command is run.
    ReadBack,
}

/// The sessions with one server: the first carries what is done once, all of them carry content.
pub struct Lanes {
    remote: Arc<dyn Remote>,
    sessions: Vec<Arc<Session>>,
    turn: AtomicUsize,
    root: Vec<u8>,
    verify: Verify,
}

impl Lanes {
    /// Over `first`, where the server has not spoken yet, and further connections up to `count`. Those may fail; the run goes on
    /// over the others.
    ///
    /// # Errors
    /// When no SFTP server of version 3 answers.
    pub fn connect(
        remote: Arc<dyn Remote>,
        first: Arc<dyn Link>,
        count: usize,
        root: &[u8],
        verify: Verify,
    ) -> Result<Lanes, Error> {
        let host = remote.describe();
        let options = ClientOptions { timeout: TIMEOUT, ..ClientOptions::default() };
        let session = |link| Ok::<_, Error>(Arc::new(Session::new(Client::connect(link, &host, options)?)?));
        // What is no SFTP server is not connected to again and again.
        let mut sessions = vec![session(first)?];
        let more = |number| remote.open(&Way::SftpSubsystem, number).ok().and_then(|link| session(link).ok());
        let numbers: Vec<usize> = (1..count).collect();
        for numbers in numbers.chunks(LOGINS) {
            std::thread::scope(|scope| {
                let threads: Vec<_> = numbers.iter().map(|&number| scope.spawn(move || more(number))).collect();
                sessions.extend(threads.into_iter().filter_map(|thread| thread.join().ok().flatten()));
            });
        }
        let root = absolute(&sessions[0], root)?;
        Ok(Lanes { remote, sessions, turn: AtomicUsize::new(0), root, verify })
    }

    fn control(&self) -> &Session {
        &self.sessions[0]
    }

    /// The root, as a path that can be looked at.
    fn root_path(&self) -> Vec<u8> {
        if self.root.is_empty() { b"/".to_vec() } else { self.root.clone() }
    }

    fn describe(&self) -> String {
        format!("{}:{}", self.control().client.host(), Escaped(&self.root_path()))
    }

    /// The session for the next worker.
    fn lane(&self) -> Arc<Session> {
        Arc::clone(&self.sessions[self.turn.fetch_add(1, Ordering::Relaxed) % self.sessions.len()])
    }

    fn wire_bytes(&self) -> u64 {
        let of = |session: &Arc<Session>| session.client.wire_bytes();
        self.sessions.iter().map(of).map(|(sent, received)| sent + received).sum()
    }

    /// What this way of reaching the host cannot do, for `-v`.
    fn limits(&self) -> String {
        let offers = self.control().offers;
        let mut text = "a stock SFTP server: no compression, no policy of the receiver's own, no ACLs, times to the \
                        second"
            .to_owned();
        let missing = [
            (offers.posix_rename, "a replaced file is gone for a moment (no posix-rename@openssh.com)"),
            (offers.hard_link, "no hard links (no hardlink@openssh.com)"),
            (offers.names, "owners by number (no users-groups-by-id@openssh.com)"),
            (offers.lsetstat, "owners of symbolic links are left (no lsetstat@openssh.com)"),
        ];
        for (_, without) in missing.iter().filter(|(offered, _)| !offered) {
            text.push_str(", ");
            text.push_str(without);
        }
        text
    }
}

/// The root as an absolute path without a slash at its end, so that commands find it too. The path `/` is empty.
fn absolute(session: &Session, root: &[u8]) -> Result<Vec<u8>, Error> {
    if root.contains(&0) {
        return Err(Error::Usage("the path at the other end holds a NUL byte".into()));
    }
    let mut path = root.to_vec();
    if !path.starts_with(b"/") {
        path = match session.call(session::about(packet::REALPATH, b"."))? {
            Reply::Names(names) if names.len() == 1 && names[0].name.starts_with(b"/") => names[0].name.clone(),
            Reply::Refused(refusal) => return Err(session.refused("find the directory that is", b".", &refusal)),
            _ => return Err(session.odd()),
        };
        path.push(b'/');
        path.extend_from_slice(root);
    }
    while path.last() == Some(&b'/') {
        path.pop();
    }
    Ok(path)
}

/// `root/path`.
fn below(root: &[u8], path: &RelPath) -> Vec<u8> {
    [root, b"/", path.as_bytes()].concat()
}

/// `root/name` for a name of our own.
fn at(root: &[u8], name: impl AsRef<[u8]>) -> Vec<u8> {
    [root, b"/", name.as_ref()].concat()
}

const KIND_MASK: u32 = 0o170_000;
const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const SYMLINK: u32 = 0o120_000;

fn kind_of(attributes: &Attributes) -> Option<u32> {
    attributes.mode.map(|mode| mode & KIND_MASK)
}

/// A time as the server can hold it: whole seconds, from 1970 to 2106.
fn whole_seconds(time: Timestamp) -> Timestamp {
    Timestamp { seconds: time.seconds.clamp(0, u32::MAX.into()), nanoseconds: 0 }
}
