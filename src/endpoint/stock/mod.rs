//! A side of a run that only has a stock SFTP server, OpenSSH's above all.
//!
//! Nothing of lockstep runs there: what an agent does for itself is done here by requests, many of them in flight. The
//! server knows times to the second, no ACLs and no holes; what it holds is proven by a command where the account has
//! a shell, else by reading it back (`prove`).

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::endpoint::client::{Client, ClientOptions};
use crate::endpoint::link::{Link, Remote, Way};
use crate::endpoint::pool::{Lane, Pool, Width};
use crate::endpoint::spread::{Spread, is_far};
use crate::endpoint::{Crew, Error};
use crate::error::Escaped;
use crate::manifest::Timestamp;
use crate::path::RelPath;
use crate::wire::sftp::{Attributes, packet};

mod adopt;
mod alike;
mod append;
mod audit;
mod bulk;
mod execute;
mod follow;
mod handles;
mod lag;
mod list;
mod lock;
mod look;
mod manifest_file;
mod moved;
mod names;
mod place;
mod prove;
mod publish;
mod read;
mod reader;
mod record;
mod room;
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

use session::{Known, Reply, Session};

/// A stock server may take its time to bring a large file to the disk. That the host is there at all is found out by the
/// keepalive of the connection.
const TIMEOUT: Duration = Duration::from_secs(600);

/// A file of which there is less to send or to read goes over one connection.
const SPREAD_FROM: u64 = 24 << 20;

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

/// The sessions with one server.
pub struct Lanes {
    remote: Arc<dyn Remote>,
    pool: Arc<Pool<Session>>,
    root: Vec<u8>,
    verify: Verify,
    /// The first command, which logs in at the same time as the first session.
    shell: Mutex<Option<Starting>>,
    /// Bytes that commands were given.
    given: AtomicU64,
}

impl Lane for Session {
    fn client(&self) -> &Client {
        &self.client
    }
}

/// A command that is being started.
type Starting = JoinHandle<Result<shell::Shell, String>>;

impl Lanes {
    /// Over `first`, where the server has not spoken yet, and as many further connections as `width` has.
    ///
    /// # Errors
    /// When no SFTP server of version 3 answers.
    pub fn connect(
        remote: Arc<dyn Remote>,
        first: Arc<dyn Link>,
        width: impl Into<Width>,
        root: &[u8],
        verify: Verify,
    ) -> Result<Lanes, Error> {
        let shell = (verify != Verify::ReadBack).then(|| {
            let remote = Arc::clone(&remote);
            let start = move || shell::Shell::start(&*remote, 0);
            std::thread::Builder::new().name("shell".to_owned()).spawn(start).ok()
        });
        let first = open(&*remote, first, None)?;
        let root = absolute(&first, root)?;
        let (there, known) = (Arc::clone(&remote), first.known());
        let further = move |number| {
            let link = there.open(&Way::SftpSubsystem, number).ok()?;
            open(&*there, link, Some(&known)).ok()
        };
        let pool = Arc::new(Pool::new(first, width.into(), Box::new(further), Some(Arc::clone(&remote))));
        Ok(Lanes { remote, pool, root, verify, shell: Mutex::new(shell.flatten()), given: AtomicU64::new(0) })
    }

    /// The command that was started with the first session.
    fn first_shell(&self) -> Result<shell::Shell, String> {
        match target::locked(&self.shell).take() {
            Some(starting) => starting.join().unwrap_or_else(|_| Err("an internal error stopped it".to_owned())),
            None => shell::Shell::start(&*self.remote, 0),
        }
    }

    /// How many connections workers have.
    fn count(&self) -> usize {
        self.pool.workers()
    }

    /// A connection more takes a login and two commands there, about what half a second of sending takes.
    fn crew(&self) -> Crew {
        Crew { workers: self.count(), bytes: 256 << 20, files: 4096 }
    }

    /// The number of a connection for whoever has this number.
    fn nearest(&self, number: usize) -> usize {
        number % self.count()
    }

    /// The connection with this number, or the first when that could not be made, and what large files may go over beside it. May take
    /// as long as it takes to log in.
    fn spread(&self, number: usize) -> Spread<Session> {
        Spread::at(&self.pool, self.nearest(number))
    }

    fn control(&self) -> &Arc<Session> {
        self.pool.first()
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
        self.pool.next()
    }

    /// Whether large files may go over more connections than one: where the server is near, a command takes more.
    fn may_spread(&self) -> bool {
        self.pool.further() > 0 && is_far(&self.control().client)
    }

    fn wire_bytes(&self) -> u64 {
        let (sent, received) = self.pool.wire_bytes();
        sent + received + self.given.load(Ordering::Relaxed)
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

/// Shakes hands with a server that has not spoken yet. What is known of it is not asked again.
fn open(remote: &dyn Remote, link: Arc<dyn Link>, known: Option<&Known>) -> Result<Session, Error> {
    let options = ClientOptions { timeout: TIMEOUT, ..ClientOptions::default() };
    Session::new(Client::connect(link, &remote.describe(), options)?, known)
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

/// Whether that is a regular file of this size and time of modification.
fn is_file(found: &Attributes, size: u64, seconds: i64) -> bool {
    let modified = found.times.map(|(_, modified)| i64::from(modified));
    kind_of(found) == Some(REGULAR) && found.size == Some(size) && modified == Some(seconds)
}

/// A time as the server can hold it: whole seconds, from 1970 to 2106.
fn whole_seconds(time: Timestamp) -> Timestamp {
    Timestamp { seconds: time.seconds.clamp(0, u32::MAX.into()), nanoseconds: 0 }
}
