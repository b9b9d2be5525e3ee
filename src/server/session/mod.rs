//! One SFTP version 3 session: packets in, packets out.
//!
//! What always holds: no path leads out of the root; what the rights do not cover is neither done nor advertised; special
//! bits are never set at a client's wish; a malformed stream ends the session.
//!
//! Order, as the draft asks for: requests on one open file, by whichever handle, are done in the order they came, and
//! requests that name paths when everything before them is done. Requests on different open files go on at once, so
//! replies may come in another order than the requests (`lanes`).

use std::borrow::Cow;
use std::collections::HashMap;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use rustix::fs::{Dir, StatVfs, StatVfsMountFlags};
use rustix::io::Errno;

use super::agent::{Extensions, Output};
use super::attributes;
use super::channel;
use super::gate::Need;
use super::quota::{Allowance, QuotaError};
use crate::audit::Login;
use crate::config::{Quota, Rights};
use crate::policy::{Policy, PolicyError, PolicySpec};
use crate::root::{Follow, Metadata, Root, RootError};
use crate::scan::names::Names;
use crate::staging::Ids;
use crate::wire::buffer::{Reader, Short, Writer};
use crate::wire::extension::Message;
use crate::wire::sftp::{Frames, FramingError, Packet, Status, VERSION, packet};

mod content;
mod copy;
mod files;
mod lanes;
mod names;
mod record;
mod site;
mod turn;
mod walk;

use content::Contents;
use files::{Job, OpenFile, Work};
use lanes::Lanes;
use record::Recorder;
use site::Site;

/// What a session may do, and for whom.
#[derive(Debug, Clone)]
pub struct SessionConfig {
    /// The root, or where relative paths start when the session is not confined.
    pub root: PathBuf,
    /// Whether `/` of the client is the root.
    pub confine: bool,
    /// What may be done.
    pub rights: Rights,
    /// How much may lie beneath the root of a session that is confined.
    pub quota: Option<Quota>,
    /// The receiver's rules. Their paths count from `/` as the client sees it.
    pub policy: PolicySpec,
    /// For whom, in logs.
    pub actor: String,
    /// By what he is here.
    pub login: Login,
}

/// Why there is no session.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// The root cannot be opened.
    #[error(transparent)]
    Root(#[from] RootError),
    /// The rules cannot be used.
    #[error("the policy of the server")]
    Policy(#[from] PolicyError),
    /// What is used of the quota is not known.
    #[error(transparent)]
    Quota(#[from] QuotaError),
}

const HANDLES_MAX: usize = 1024;

enum Handle {
    File(Arc<OpenFile>),
    Directory(Directory),
}

struct Directory {
    entries: Dir,
    is_top: bool,
}

/// A request that failed.
#[derive(Debug)]
enum Failed {
    /// The packet ends before its fields do: the stream is not to be trusted any more.
    Malformed,
    /// With the cause, and a reason for people where the code does not say it.
    Status(Status, Option<Errno>, Cow<'static, str>),
}

impl Failed {
    fn because(status: Status, reason: impl Into<Cow<'static, str>>) -> Failed {
        Failed::Status(status, None, reason.into())
    }

    fn status(&self) -> Status {
        match self {
            Failed::Malformed => Status::BadMessage,
            Failed::Status(status, ..) => *status,
        }
    }

    fn packet(&self, id: u32) -> Vec<u8> {
        match self {
            Failed::Malformed => Status::BadMessage.packet(id),
            Failed::Status(status, _, reason) if reason.is_empty() => status.packet(id),
            Failed::Status(status, _, reason) => status.packet_saying(id, &format!("{}: {reason}", status.text())),
        }
    }
}

impl From<Short> for Failed {
    fn from(_: Short) -> Self {
        Failed::Malformed
    }
}

impl From<Status> for Failed {
    fn from(status: Status) -> Self {
        Failed::Status(status, None, "".into())
    }
}

/// Version 3 has no status of its own for it; the reason says what is used.
impl From<QuotaError> for Failed {
    fn from(error: QuotaError) -> Self {
        Failed::because(Status::Failure, error.to_string())
    }
}

/// The one place where errors of the system become status codes; as OpenSSH's server maps them.
impl From<Errno> for Failed {
    fn from(error: Errno) -> Self {
        use Errno as E;
        let status = match error {
            E::NOENT | E::NOTDIR | E::BADF | E::LOOP => Status::NoSuchFile,
            E::PERM | E::ACCESS | E::FAULT => Status::PermissionDenied,
            E::NAMETOOLONG | E::INVAL => Status::BadMessage,
            E::NOSYS => Status::Unsupported,
            _ => Status::Failure,
        };
        let reason = match error {
            E::ROFS => "the file system is read-only",
            E::NOSPC => "no space is left on the device",
            E::DQUOT => "the quota is used up",
            E::NOTEMPTY => "the directory is not empty",
            E::EXIST => "it exists already",
            E::XDEV => "it lies on another file system",
            E::MFILE | E::NFILE => "too many files are open",
            _ => "",
        };
        Failed::Status(status, Some(error), reason.into())
    }
}

impl From<io::Error> for Failed {
    fn from(error: io::Error) -> Self {
        Errno::from_io_error(&error).map_or(Failed::from(Status::Failure), Failed::from)
    }
}

impl From<RootError> for Failed {
    fn from(error: RootError) -> Self {
        error.source.into()
    }
}

type Answer = Result<Vec<u8>, Failed>;

/// What answers a request.
#[derive(Clone, Copy)]
enum Handler {
    /// Names paths, or is about the session: done at once, when nothing else is in flight.
    Alone(fn(&mut Session, u32, &mut Reader<'_>) -> Answer),
    /// Starts with a handle: done on the lane of the file. This reads the fields that follow.
    OnFile(fn(&mut Reader<'_>) -> Result<Work, Short>),
    /// Starts with a handle, of a file or a directory.
    Close,
}

/// What becomes of a request.
enum Next {
    Reply(Vec<u8>),
    /// It is for the lane of the file, which replies.
    Work(Arc<OpenFile>, Work),
}

/// A request that is known.
struct Request {
    /// Its type; that of an extension is EXTENDED.
    kind: u8,
    /// Of an extension.
    name: &'static str,
    version: &'static str,
    handler: Handler,
    needs: Need,
}

const fn request(kind: u8, needs: Need, handler: Handler) -> Request {
    Request { kind, name: "", version: "", handler, needs }
}

const fn extension(name: &'static str, version: &'static str, needs: Need, handler: Handler) -> Request {
    Request { kind: packet::EXTENDED, name, version, handler, needs }
}

use Handler::{Alone, OnFile};

/// All requests: what they are called, what they need, what answers them.
const REQUESTS: [Request; 29] = [
    request(packet::OPEN, Need::Nothing, Alone(Session::open)), // Looks at the flags itself.
    request(packet::CLOSE, Need::Nothing, Handler::Close),
    request(packet::READ, Need::Read, OnFile(Work::read)),
    request(packet::WRITE, Need::Create, OnFile(Work::write)),
    request(packet::LSTAT, Need::Look, Alone(|s, id, r| s.stat(id, r, Follow::Never))),
    request(packet::FSTAT, Need::Nothing, OnFile(|_| Ok(Work::Stat))),
    request(packet::SETSTAT, Need::Change, Alone(|s, id, r| s.setstat(id, r, Follow::Inside))),
    request(packet::FSETSTAT, Need::Create, OnFile(Work::set)),
    request(packet::OPENDIR, Need::List, Alone(Session::opendir)),
    request(packet::READDIR, Need::List, Alone(Session::readdir)),
    request(packet::REMOVE, Need::Delete, Alone(|s, id, r| s.remove(id, r, false))),
    request(packet::MKDIR, Need::Create, Alone(Session::mkdir)),
    request(packet::RMDIR, Need::Delete, Alone(|s, id, r| s.remove(id, r, true))),
    request(packet::REALPATH, Need::Nothing, Alone(Session::realpath)),
    request(packet::STAT, Need::Look, Alone(|s, id, r| s.stat(id, r, Follow::Inside))),
    request(packet::RENAME, Need::Change, Alone(|s, id, r| s.rename(id, r, false))),
    request(packet::READLINK, Need::Look, Alone(Session::readlink)),
    request(packet::SYMLINK, Need::Create, Alone(Session::symlink)),
    extension("posix-rename@openssh.com", "1", Need::Change, Alone(|s, id, r| s.rename(id, r, true))),
    extension("statvfs@openssh.com", "2", Need::Look, Alone(Session::statvfs)),
    extension("fstatvfs@openssh.com", "2", Need::Nothing, OnFile(|_| Ok(Work::Filesystem))),
    extension("hardlink@openssh.com", "1", Need::Create, Alone(Session::hardlink)),
    extension("fsync@openssh.com", "1", Need::Create, OnFile(|_| Ok(Work::Sync))),
    extension("lsetstat@openssh.com", "1", Need::Change, Alone(|s, id, r| s.setstat(id, r, Follow::Never))),
    extension("limits@openssh.com", "1", Need::Nothing, Alone(Session::limits)),
    extension("expand-path@openssh.com", "1", Need::Nothing, Alone(Session::expand_path)),
    extension("copy-data", "1", Need::Create, Alone(Session::copy_data)),
    extension("home-directory", "1", Need::Nothing, Alone(Session::home_directory)),
    extension("users-groups-by-id@openssh.com", "1", Need::Look, Alone(Session::users_groups)),
];

/// A session; see the module's documentation.
pub struct Session {
    config: SessionConfig,
    /// Where relative paths start, absolute.
    start: Vec<u8>,
    output: Arc<dyn Output>,
    extensions: Option<Arc<dyn Extensions>>,
    frames: Frames,
    begun: bool,
    handles: HashMap<u64, Handle>,
    next: u64,
    owners: Names,
    lanes: Lanes,
    site: Arc<Site>,
}

impl Session {
    /// A session before its INIT.
    ///
    /// # Errors
    /// When the root cannot be opened, or the policy not be used.
    pub fn new(
        config: SessionConfig,
        output: Arc<dyn Output>,
        extensions: Option<Arc<dyn Extensions>>,
    ) -> Result<Session, SessionError> {
        use std::os::unix::ffi::OsStrExt as _;
        let (root, start) = if config.confine {
            (Root::open(&config.root)?, b"/".to_vec())
        } else {
            (Root::open("/".as_ref())?, config.root.as_os_str().as_bytes().to_vec())
        };
        // Without a root there is no place for a log, nor for a count.
        let allowance = config.quota.filter(|_| config.confine && config.rights.writes());
        let allowance = allowance.map(|quota| Allowance::open(&config.root, quota)).transpose()?;
        let recorder = if config.confine && config.rights.writes() {
            Some(Recorder::new(Root::open(&config.root)?, config.actor.clone(), config.login.clone()))
        } else {
            None
        };
        let policy = Policy::compile(&config.policy)?;
        let site = Arc::new(Site {
            root,
            confined: config.confine,
            policy,
            ids: Ids::default(),
            private: Mutex::default(),
            recorder,
            rights: config.rights,
            allowance,
            contents: Contents::default(),
        });
        let (lanes, owners, frames) = (Lanes::new(Arc::clone(&output)), Names::default(), Frames::default());
        let (handles, next, begun) = (HashMap::new(), 0, false);
        Ok(Session { config, start, output, extensions, frames, begun, handles, next, owners, lanes, site })
    }

    /// Takes bytes in any pieces and answers every packet that is whole.
    ///
    /// # Errors
    /// When the stream is not SFTP; it is out of step for good.
    pub fn feed(&mut self, mut bytes: &[u8]) -> Result<(), FramingError> {
        while let Some(packet) = self.frames.take(&mut bytes)? {
            self.dispatch(packet)?;
        }
        Ok(())
    }

    /// Finishes what is in flight and closes what is open. What was not closed by the client is as if cut off.
    pub fn finish(&mut self) {
        self.lanes.finish();
        let mut left: Vec<_> = self.handles.drain().collect();
        left.sort_unstable_by_key(|(number, _)| *number);
        for (_, handle) in left {
            if let Handle::File(file) = handle {
                file.cut_off();
            }
        }
    }

    fn dispatch(&mut self, packet: Packet) -> Result<(), FramingError> {
        let malformed = || FramingError(u32::try_from(packet.body().len()).unwrap_or(u32::MAX));
        let mut reader = Reader(packet.body());
        let (Ok(kind), Ok(id)) = (reader.u8(), reader.u32()) else { return Err(malformed()) };
        if !self.begun {
            if kind != packet::INIT || id < VERSION {
                return Err(malformed());
            }
            self.begun = true;
            self.output.send(self.version());
            return Ok(());
        }
        let name = match kind {
            packet::EXTENDED => reader.string().map_err(|_| malformed())?,
            _ => b"",
        };
        let known = REQUESTS.iter().find(|known| known.kind == kind && known.name.as_bytes() == name);
        let next = match known {
            Some(request) => self.gate(request, &reader).and_then(|()| self.handle(request.handler, id, &mut reader)),
            None => {
                if let Some(agent) = self.extensions.as_ref().filter(|_| kind == packet::EXTENDED) {
                    let (bytes, start) = packet.into_parts();
                    if !agent.handle(id, Message::new(bytes, start), &self.output) {
                        self.output.send(Failed::from(Status::Unsupported).packet(id));
                    }
                    return Ok(());
                }
                Err(Status::Unsupported.into())
            }
        };
        match next {
            Ok(Next::Reply(reply)) => self.output.send(reply),
            Ok(Next::Work(file, work)) => {
                let lane = file.lane;
                // Without a thread it is done here, in its turn.
                if let Err(job) = self.lanes.send(lane, Job { id, file, work, packet }) {
                    self.output.send(job.run());
                }
            }
            Err(Failed::Malformed) => return Err(malformed()),
            Err(failed) => self.output.send(failed.packet(id)),
        }
        Ok(())
    }

    fn handle(&mut self, handler: Handler, id: u32, reader: &mut Reader<'_>) -> Result<Next, Failed> {
        match handler {
            Alone(handler) => {
                self.lanes.wait();
                handler(self, id, reader).map(Next::Reply)
            }
            OnFile(fields) => {
                let (handle, work) = (reader.string()?, fields(reader)?);
                Ok(Next::Work(self.file(handle)?, work))
            }
            Handler::Close => match self.handles.remove(&handle_number(reader.string()?)) {
                None => Err(Status::Failure.into()),
                Some(Handle::Directory(_)) => Ok(Next::Reply(Status::Ok.packet(id))),
                Some(Handle::File(file)) => Ok(Next::Work(file, Work::Close)),
            },
        }
    }

    /// The one place that decides what is done; [`Session::version`] advertises by the same rule.
    fn gate(&self, request: &Request, asked: &Reader<'_>) -> Result<(), Failed> {
        if !request.needs.allowed(self.config.rights) {
            // Some begin with a path, the others with a handle, which is of no use to whoever reads the log.
            let named = matches!(request.handler, Alone(_)) && request.needs.writes();
            let path = asked.clone().string().ok().filter(|_| named && request.name != "copy-data");
            return Err(self.site.not_allowed(request.needs, path));
        }
        if request.needs.writes() { self.recorded() } else { Ok(()) }
    }

    fn recorded(&self) -> Result<(), Failed> {
        self.site.recorded(self.handles.len())
    }

    fn version(&self) -> Vec<u8> {
        let mut writer = Writer::new(packet::VERSION);
        writer.u32(VERSION);
        let rights = self.config.rights;
        let own = REQUESTS.iter().filter(|one| one.kind == packet::EXTENDED && one.needs.allowed(rights));
        let own = own.map(|request| (request.name, request.version));
        for (name, version) in own.chain(self.extensions.iter().flat_map(|agent| agent.names())) {
            writer.string(name.as_bytes()).string(version.as_bytes());
        }
        writer.finish()
    }

    fn has_room(&self) -> Result<(), Failed> {
        if self.handles.len() < HANDLES_MAX {
            return Ok(());
        }
        Err(Failed::because(Status::Failure, "too many handles are open in this session"))
    }

    /// Numbers are not used again.
    fn keep(&mut self, id: u32, handle: Handle) -> Vec<u8> {
        self.next += 1;
        self.handles.insert(self.next, handle);
        Writer::new(packet::HANDLE).u32(id).string(&self.next.to_be_bytes()).finish()
    }

    fn file(&self, handle: &[u8]) -> Result<Arc<OpenFile>, Failed> {
        match self.handles.get(&handle_number(handle)) {
            Some(Handle::File(file)) => Ok(Arc::clone(file)),
            _ => Err(Status::Failure.into()),
        }
    }
}

/// 0, which is no handle's, for what is none.
fn handle_number(handle: &[u8]) -> u64 {
    handle.try_into().map_or(0, u64::from_be_bytes)
}

fn attributes_packet(id: u32, file: &Metadata) -> Vec<u8> {
    let mut writer = Writer::new(packet::ATTRS);
    attributes::of(file).encode(writer.u32(id));
    writer.finish()
}

fn statvfs_packet(id: u32, found: &StatVfs) -> Vec<u8> {
    let flag = |is, bit: u64| if found.f_flag.contains(is) { bit } else { 0 };
    let flags = flag(StatVfsMountFlags::RDONLY, 1) | flag(StatVfsMountFlags::NOSUID, 2);
    let mut writer = Writer::new(packet::EXTENDED_REPLY);
    writer.u32(id).u64(found.f_bsize).u64(found.f_frsize);
    writer.u64(found.f_blocks).u64(found.f_bfree).u64(found.f_bavail);
    writer.u64(found.f_files).u64(found.f_ffree).u64(found.f_favail);
    writer.u64(found.f_fsid).u64(flags).u64(found.f_namemax);
    writer.finish()
}

impl channel::FedSession for Session {
    fn feed(&mut self, bytes: &[u8]) -> Result<(), String> {
        Session::feed(self, bytes).map_err(|error| error.to_string())
    }

    fn finish(&mut self) {
        Session::finish(self);
    }
}

#[cfg(test)]
mod rights_tests;
#[cfg(test)]
mod tests;
