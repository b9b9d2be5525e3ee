//! A side of a run that only has a stock SFTP server, OpenSSH's above all.
//!
//! Nothing of lockstep runs there: what an agent does for itself is done here by requests, many of them in flight. The
//! server knows times to the second, no ACLs and no holes; what it holds is proven by a command where the account has
//! a shell, else by reading it back (`prove`).

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::endpoint::client::{Client, ClientOptions};
use crate::endpoint::link::{Link, Remote, Way};
use crate::endpoint::{Crew, Error};
use crate::error::Escaped;
use crate::manifest::Timestamp;
use crate::path::RelPath;
use crate::wire::sftp::{Attributes, packet};

mod adopt;
mod alike;
mod audit;
mod bulk;
mod execute;
mod follow;
mod list;
mod lock;
mod look;
mod names;
mod place;
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
mod trail;
mod trash;
mod vouch;
mod writer;

pub use source::StockSource;
pub use target::{Much, StockTarget};

use session::{Reply, Session};

/// A stock server may take its time to bring a large file to the disk. That the host is there at all is found out by the
/// keepalive of the connection.
const TIMEOUT: Duration = Duration::from_secs(600);

/// What is staged is born with this mode.
const BORN_MODE: u32 = 0o600;

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

/// The sessions with one server: the first carries what is done once, all of them carry content. Further ones are made
/// when a worker first needs them: a run with nothing to send makes none.
pub struct Lanes {
    remote: Arc<dyn Remote>,
    first: Arc<Session>,
    further: Vec<Slot>,
    turn: AtomicUsize,
    root: Vec<u8>,
    verify: Verify,
    /// The first command, which logs in at the same time as the first session.
    shell: Mutex<Option<Starting>>,
    /// Bytes that commands were given.
    given: AtomicU64,
}

/// A session that was asked for; `None` inside when it could not be had.
type Slot = Mutex<Option<Option<Arc<Session>>>>;
/// A command that is being started.
type Starting = JoinHandle<Result<shell::Shell, String>>;

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
        let shell = (verify != Verify::ReadBack).then(|| {
            let remote = Arc::clone(&remote);
            let start = move || shell::Shell::start(&*remote, 0);
            std::thread::Builder::new().name("shell".to_owned()).spawn(start).ok()
        });
        let first = Arc::new(open(&*remote, first, None)?);
        let root = absolute(&first, root)?;
        Ok(Lanes {
            remote,
            first,
            further: (1..count).map(|_| Slot::default()).collect(),
            turn: AtomicUsize::new(0),
            root,
            verify,
            shell: Mutex::new(shell.flatten()),
            given: AtomicU64::new(0),
        })
    }

    /// The command that was started with the first session.
    fn first_shell(&self) -> Result<shell::Shell, String> {
        match target::locked(&self.shell).take() {
            Some(starting) => starting.join().unwrap_or_else(|_| Err("an internal error stopped it".to_owned())),
            None => shell::Shell::start(&*self.remote, 0),
        }
    }

    fn count(&self) -> usize {
        self.further.len() + 1
    }

    /// A connection more takes a login and two commands there, about what half a second of sending takes.
    fn crew(&self) -> Crew {
        Crew { workers: self.count(), bytes: 256 << 20, files: 4096 }
    }

    /// The number of a connection for whoever has this number.
    fn nearest(&self, number: usize) -> usize {
        number % self.count()
    }

    /// The session over the connection with this number, or the first when that could not be made. May take as long as
    /// it takes to log in.
    fn session(&self, number: usize) -> Arc<Session> {
        let Some(at) = self.nearest(number).checked_sub(1) else { return Arc::clone(&self.first) };
        let mut slot = target::locked(&self.further[at]);
        let session = slot.get_or_insert_with(|| {
            let link = self.remote.open(&Way::SftpSubsystem, at + 1).ok()?;
            open(&*self.remote, link, Some(&self.first)).ok().map(Arc::new)
        });
        Arc::clone(session.as_ref().unwrap_or(&self.first))
    }

    fn control(&self) -> &Session {
        &self.first
    }

    /// The root, as a path that can be looked at.
    fn root_path(&self) -> Vec<u8> {
        if self.root.is_empty() { b"/".to_vec() } else { self.root.clone() }
    }

    fn describe(&self) -> String {
        format!("{}:{}", self.control().client.host(), Escaped(&self.root_path()))
    }

    /// The number of the connection for the next worker.
    fn next(&self) -> usize {
        self.nearest(self.turn.fetch_add(1, Ordering::Relaxed))
    }

    fn wire_bytes(&self) -> u64 {
        let of = |session: &Session| {
            let (sent, received) = session.client.wire_bytes();
            sent + received
        };
        // One that is logging in is not waited for.
        let further: u64 =
            self.further.iter().filter_map(|slot| Some(of(slot.try_lock().ok()?.as_ref()?.as_ref()?))).sum();
        of(&self.first) + further + self.given.load(Ordering::Relaxed)
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
            (offers.copy_data, "what lies there already is sent again (no copy-data)"),
        ];
        for (_, without) in missing.iter().filter(|(offered, _)| !offered) {
            text.push_str(", ");
            text.push_str(without);
        }
        text
    }
}

/// Shakes hands with a server that has not spoken yet. What is known by `other` is not asked again.
fn open(remote: &dyn Remote, link: Arc<dyn Link>, other: Option<&Session>) -> Result<Session, Error> {
    let options = ClientOptions { timeout: TIMEOUT, ..ClientOptions::default() };
    Session::new(Client::connect(link, &remote.describe(), options)?, other)
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
