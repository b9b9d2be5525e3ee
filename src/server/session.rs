//! One SFTP version 3 session: packets in, packets out. Requests are handled one after the other, in order.
//!
//! What always holds: no path leads out of the root; a session that only reads changes nothing; special bits are
//! never set at a client's wish; a malformed stream ends the session.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::sync::Arc;

use rustix::fs::{self, AtFlags, OFlags, RenameFlags, Timespec, Timestamps};

use super::agent::{Extensions, Output};
use super::attributes;
use super::channel;
use crate::path::RelPath;
use crate::policy::PolicySpec;
use crate::root::{Follow, Metadata, Root, RootError};
use crate::wire::buffer::{Reader, Short, Writer};
use crate::wire::extension::Message;
use crate::wire::sftp::{Attributes, DATA_MAX, Frames, FramingError, Status, VERSION, open, packet};

/// What a session may do, and for whom.
#[derive(Debug, Clone)]
pub struct SessionConfig {
    /// The root, or where relative paths start when the session is not confined.
    pub root: PathBuf,
    /// Whether `/` of the client is the root.
    pub confine: bool,
    /// Whether everything that writes is refused.
    pub read_only: bool,
    /// The receiver's rules; for the agent.
    pub policy: PolicySpec,
    /// For whom, in logs.
    pub actor: String,
}

const HANDLES_MAX: usize = 4096;
const BATCH: usize = 100;

enum Handle {
    File { file: File, append: bool },
    Directory { path: Option<RelPath>, left: Vec<Vec<u8>> },
}

/// A request that failed.
struct Failed(Status);

impl From<Short> for Failed {
    fn from(_: Short) -> Self {
        Failed(Status::BadMessage)
    }
}

/// The one place where errors of the system become status codes; as OpenSSH's server maps them.
impl From<io::Error> for Failed {
    fn from(error: io::Error) -> Self {
        use rustix::io::Errno as E;
        Failed(match error.raw_os_error().map(E::from_raw_os_error) {
            Some(E::NOENT | E::NOTDIR | E::BADF | E::LOOP) => Status::NoSuchFile,
            Some(E::PERM | E::ACCESS | E::FAULT | E::XDEV) => Status::PermissionDenied,
            Some(E::NAMETOOLONG | E::INVAL) => Status::BadMessage,
            Some(E::NOSYS) => Status::Unsupported,
            _ => Status::Failure,
        })
    }
}

impl From<RootError> for Failed {
    fn from(error: RootError) -> Self {
        error.source.into()
    }
}

impl From<rustix::io::Errno> for Failed {
    fn from(error: rustix::io::Errno) -> Self {
        io::Error::from(error).into()
    }
}

type Answer = Result<Vec<u8>, Failed>;
type Handler = fn(&mut Session, u32, &mut Reader<'_>) -> Answer;

/// The requests: type, handler, whether it writes.
const REQUESTS: [(u8, Handler, bool); 18] = [
    (packet::OPEN, Session::open, false), // Looks at the flags itself.
    (packet::CLOSE, Session::close, false),
    (packet::READ, Session::read, false),
    (packet::WRITE, Session::write, true),
    (packet::LSTAT, |s, id, r| s.stat(id, r, Follow::Never), false),
    (packet::STAT, |s, id, r| s.stat(id, r, Follow::Beneath), false),
    (packet::FSTAT, Session::fstat, false),
    (packet::SETSTAT, |s, id, r| s.setstat(id, r, Follow::Beneath), true),
    (packet::FSETSTAT, Session::fsetstat, true),
    (packet::OPENDIR, Session::opendir, false),
    (packet::READDIR, Session::readdir, false),
    (packet::REMOVE, |s, id, r| s.path(r).and_then(|p| Ok(s.root.unlink(&p)?)).map(|()| Status::Ok.packet(id)), true),
    (packet::RMDIR, |s, id, r| s.path(r).and_then(|p| Ok(s.root.rmdir(&p)?)).map(|()| Status::Ok.packet(id)), true),
    (packet::MKDIR, Session::mkdir, true),
    (packet::REALPATH, Session::realpath, false),
    (packet::RENAME, |s, id, r| s.rename(id, r, RenameFlags::NOREPLACE), true),
    (packet::READLINK, Session::readlink, false),
    (packet::SYMLINK, Session::symlink, true),
];

/// The extensions: name, version, handler, whether it writes.
const EXTENSIONS: [(&str, &str, Handler, bool); 6] = [
    ("posix-rename@openssh.com", "1", |s, id, r| s.rename(id, r, RenameFlags::empty()), true),
    ("hardlink@openssh.com", "1", Session::hardlink, true),
    ("fsync@openssh.com", "1", Session::fsync, true),
    ("lsetstat@openssh.com", "1", |s, id, r| s.setstat(id, r, Follow::Never), true),
    ("limits@openssh.com", "1", Session::limits, false),
    ("expand-path@openssh.com", "1", Session::realpath, false),
];

/// A session; see the module's documentation.
pub struct Session {
    root: Root,
    start: Vec<u8>,
    config: SessionConfig,
    output: Arc<dyn Output>,
    extensions: Option<Arc<dyn Extensions>>,
    frames: Frames,
    handles: HashMap<u64, Handle>,
    next: u64,
    begun: bool,
}

impl Session {
    /// A session before its INIT.
    ///
    /// # Errors
    /// When the root cannot be opened.
    pub fn new(
        config: SessionConfig,
        output: Arc<dyn Output>,
        extensions: Option<Arc<dyn Extensions>>,
    ) -> Result<Session, RootError> {
        use std::os::unix::ffi::OsStrExt as _;
        let (root, start) = if config.confine {
            (Root::open(&config.root)?, b"/".to_vec())
        } else {
            (Root::open("/".as_ref())?, config.root.as_os_str().as_bytes().to_vec())
        };
        let (frames, handles) = (Frames::default(), HashMap::new());
        Ok(Session { root, start, config, output, extensions, frames, handles, next: 0, begun: false })
    }

    /// Takes bytes in any pieces and answers every packet that is whole.
    ///
    /// # Errors
    /// When the stream is not SFTP; it is out of step for good.
    pub fn feed(&mut self, bytes: &[u8]) -> Result<(), FramingError> {
        self.frames.push(bytes);
        while let Some(packet) = self.frames.next_packet()? {
            self.dispatch(packet)?;
        }
        Ok(())
    }

    /// Closes what is open.
    pub fn finish(&mut self) {
        self.handles.clear();
    }

    fn dispatch(&mut self, bytes: Vec<u8>) -> Result<(), FramingError> {
        let length = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        let mut reader = Reader(&bytes);
        let (Ok(kind), Ok(id)) = (reader.u8(), reader.u32()) else { return Err(FramingError(length)) };
        if !self.begun {
            if kind != packet::INIT || id < VERSION {
                return Err(FramingError(length));
            }
            self.begun = true;
            let version = self.version();
            self.output.send(version);
            return Ok(());
        }
        let answer = if kind == packet::EXTENDED {
            let Ok(name) = reader.string() else { return Err(FramingError(length)) };
            match EXTENSIONS.iter().find(|(known, ..)| known.as_bytes() == name) {
                Some((_, _, handler, writes)) => self.gate(*handler, *writes, id, &mut reader),
                None => {
                    let taken = self.extensions.as_ref();
                    if taken.is_some_and(|agent| agent.handle(id, Message::new(bytes, 5), &self.output)) {
                        return Ok(());
                    }
                    Err(Failed(Status::Unsupported))
                }
            }
        } else {
            match REQUESTS.iter().find(|(known, ..)| *known == kind) {
                Some((_, handler, writes)) => self.gate(*handler, *writes, id, &mut reader),
                None => Err(Failed(Status::Unsupported)),
            }
        };
        self.output.send(answer.unwrap_or_else(|failed| failed.0.packet(id)));
        Ok(())
    }

    fn allows(&self, writes: bool) -> bool {
        !(writes && self.config.read_only)
    }

    fn gate(&mut self, handler: Handler, writes: bool, id: u32, reader: &mut Reader<'_>) -> Answer {
        if !self.allows(writes) {
            return Err(Failed(Status::PermissionDenied));
        }
        handler(self, id, reader)
    }

    fn version(&self) -> Vec<u8> {
        let mut writer = Writer::new(packet::VERSION);
        writer.u32(VERSION);
        for (name, version, _, writes) in EXTENSIONS {
            if self.allows(writes) {
                writer.string(name.as_bytes()).string(version.as_bytes());
            }
        }
        for (name, version) in self.extensions.iter().flat_map(|agent| agent.names()) {
            writer.string(name.as_bytes()).string(version.as_bytes());
        }
        writer.finish()
    }

    /// A client's path made absolute and plain; `..` above the top stays at the top.
    fn absolute(&self, path: &[u8]) -> Vec<u8> {
        let whole = if path.starts_with(b"/") { path.to_vec() } else { [&self.start, &b"/"[..], path].concat() };
        let mut parts: Vec<&[u8]> = Vec::new();
        for part in whole.split(|&byte| byte == b'/') {
            match part {
                b"" | b"." => {}
                b".." => drop(parts.pop()),
                part => parts.push(part),
            }
        }
        [b"/", parts.join(&b'/').as_slice()].concat()
    }

    /// `None` is the top.
    fn place(&self, path: &[u8]) -> Result<Option<RelPath>, Failed> {
        match &self.absolute(path)[1..] {
            b"" => Ok(None),
            path => RelPath::new(path).map(Some).map_err(|_| Failed(Status::NoSuchFile)),
        }
    }

    /// The next field as a path that is not the top.
    fn path(&self, reader: &mut Reader<'_>) -> Result<RelPath, Failed> {
        self.place(reader.string()?)?.ok_or(Failed(Status::Failure))
    }

    fn keep(&mut self, id: u32, handle: Handle) -> Answer {
        if self.handles.len() >= HANDLES_MAX {
            return Err(Failed(Status::Failure));
        }
        self.next += 1;
        self.handles.insert(self.next, handle);
        Ok(Writer::new(packet::HANDLE).u32(id).string(&self.next.to_be_bytes()).finish())
    }

    fn file(&self, reader: &mut Reader<'_>) -> Result<(&File, bool), Failed> {
        let key = reader.string()?.try_into().map(u64::from_be_bytes).map_err(|_| Failed(Status::Failure))?;
        match self.handles.get(&key) {
            Some(Handle::File { file, append }) => Ok((file, *append)),
            _ => Err(Failed(Status::Failure)),
        }
    }

    fn open(&mut self, id: u32, reader: &mut Reader<'_>) -> Answer {
        let path = self.path(reader)?;
        let wanted = reader.u32()?;
        let asked = Attributes::decode(reader)?;
        let has = |flag: u32| wanted & flag != 0;
        if !self.allows(has(open::WRITE | open::APPEND | open::CREATE | open::TRUNCATE)) {
            return Err(Failed(Status::PermissionDenied));
        }
        let mut flags = match (has(open::READ), has(open::WRITE)) {
            (true, true) => OFlags::RDWR,
            (false, true) => OFlags::WRONLY,
            _ => OFlags::RDONLY,
        } | OFlags::NONBLOCK
            | OFlags::NOCTTY;
        for (flag, to) in [
            (open::APPEND, OFlags::APPEND),
            (open::CREATE, OFlags::CREATE),
            (open::TRUNCATE, OFlags::TRUNC),
            (open::EXCLUSIVE, OFlags::EXCL),
        ] {
            flags |= if has(flag) { to } else { OFlags::empty() };
        }
        // Special bits are not a client's to set.
        let mode = if has(open::CREATE) { asked.mode.unwrap_or(0o666) & 0o777 } else { 0 };
        let file = self.root.open_with(&path, Follow::Beneath, flags, mode)?;
        self.keep(id, Handle::File { file, append: has(open::APPEND) })
    }

    fn close(&mut self, id: u32, reader: &mut Reader<'_>) -> Answer {
        let key = reader.string()?.try_into().map(u64::from_be_bytes).map_err(|_| Failed(Status::Failure))?;
        self.handles.remove(&key).ok_or(Failed(Status::Failure))?;
        Ok(Status::Ok.packet(id))
    }

    fn read(&mut self, id: u32, reader: &mut Reader<'_>) -> Answer {
        let (file, _) = self.file(reader)?;
        let (offset, length) = (reader.u64()?, reader.u32()?);
        let mut data = vec![0; (length as usize).min(DATA_MAX)];
        let count = file.read_at(&mut data, offset)?;
        if count == 0 && length > 0 {
            return Err(Failed(Status::EndOfFile));
        }
        Ok(Writer::new(packet::DATA).u32(id).string(&data[..count]).finish())
    }

    fn write(&mut self, id: u32, reader: &mut Reader<'_>) -> Answer {
        let (mut file, append) = self.file(reader)?;
        let (offset, data) = (reader.u64()?, reader.string()?);
        if append {
            io::Write::write_all(&mut file, data)?
        } else {
            file.write_all_at(data, offset)?
        }
        Ok(Status::Ok.packet(id))
    }

    fn attributes(id: u32, file: &Metadata) -> Vec<u8> {
        let mut writer = Writer::new(packet::ATTRS);
        attributes::of(file).encode(writer.u32(id));
        writer.finish()
    }

    fn stat(&mut self, id: u32, reader: &mut Reader<'_>, follow: Follow) -> Answer {
        Ok(Self::attributes(
            id,
            &match self.place(reader.string()?)? {
                None => self.root.stat_root()?,
                Some(path) => self.root.stat(&path, follow)?,
            },
        ))
    }

    fn fstat(&mut self, id: u32, reader: &mut Reader<'_>) -> Answer {
        Ok(Self::attributes(id, &Metadata::of(self.file(reader)?.0)?))
    }

    fn setstat(&mut self, id: u32, reader: &mut Reader<'_>, follow: Follow) -> Answer {
        let path = self.path(reader)?;
        let asked = Attributes::decode(reader)?;
        if let Some(size) = asked.size {
            self.root.open_with(&path, follow, OFlags::WRONLY | OFlags::NONBLOCK, 0)?.set_len(size)?;
        }
        let file = self.root.open_with(&path, follow, OFlags::PATH, 0)?;
        apply(&file, &asked)?;
        Ok(Status::Ok.packet(id))
    }

    fn fsetstat(&mut self, id: u32, reader: &mut Reader<'_>) -> Answer {
        let (file, _) = self.file(reader)?;
        let asked = Attributes::decode(reader)?;
        if let Some(size) = asked.size {
            file.set_len(size)?;
        }
        apply(file, &asked)?;
        Ok(Status::Ok.packet(id))
    }

    fn opendir(&mut self, id: u32, reader: &mut Reader<'_>) -> Answer {
        let path = self.place(reader.string()?)?;
        let mut left = self.root.names(path.as_ref(), Follow::Beneath)?;
        left.extend([b".".to_vec(), b"..".to_vec()]);
        self.keep(id, Handle::Directory { path, left })
    }

    fn readdir(&mut self, id: u32, reader: &mut Reader<'_>) -> Answer {
        let key = reader.string()?.try_into().map(u64::from_be_bytes).map_err(|_| Failed(Status::Failure))?;
        let Some(Handle::Directory { path, left }) = self.handles.get_mut(&key) else {
            return Err(Failed(Status::Failure));
        };
        let directory = self.root.open_dir(path.as_ref(), Follow::Beneath)?;
        let mut batch = Vec::new();
        while let Some(name) = if batch.len() < BATCH { left.pop() } else { None } {
            // RACE: what has gone since the directory was read is left out. '..' is shown as '.': never above the root.
            let at = if name == b".." { &b"."[..] } else { &name };
            if let Ok(file) = Metadata::at(&directory, at) {
                batch.push((name, file));
            }
        }
        if batch.is_empty() {
            return Err(Failed(Status::EndOfFile));
        }
        let mut writer = Writer::new(packet::NAME);
        writer.u32(id).u32(u32::try_from(batch.len()).unwrap_or(0));
        for (name, file) in &batch {
            writer.string(name).string(&attributes::long_name(name, file));
            attributes::of(file).encode(&mut writer);
        }
        Ok(writer.finish())
    }

    fn mkdir(&mut self, id: u32, reader: &mut Reader<'_>) -> Answer {
        let path = self.path(reader)?;
        let asked = Attributes::decode(reader)?;
        self.root.mkdir(&path, asked.mode.unwrap_or(0o777) & 0o777)?;
        Ok(Status::Ok.packet(id))
    }

    fn name(id: u32, name: &[u8]) -> Vec<u8> {
        Writer::new(packet::NAME).u32(id).u32(1).string(name).string(name).u32(0).finish()
    }

    fn realpath(&mut self, id: u32, reader: &mut Reader<'_>) -> Answer {
        let path = reader.string()?;
        let path = path.strip_prefix(b"~/").unwrap_or(if path == b"~" { b"" } else { path });
        Ok(Self::name(id, &self.absolute(path)))
    }

    fn rename(&mut self, id: u32, reader: &mut Reader<'_>, flags: RenameFlags) -> Answer {
        let (from, to) = (self.path(reader)?, self.path(reader)?);
        self.root.rename(&from, &to, flags)?;
        Ok(Status::Ok.packet(id))
    }

    fn readlink(&mut self, id: u32, reader: &mut Reader<'_>) -> Answer {
        Ok(Self::name(id, &self.root.read_link(&self.path(reader)?)?))
    }

    /// The target comes first, as in OpenSSH and unlike the draft.
    fn symlink(&mut self, id: u32, reader: &mut Reader<'_>) -> Answer {
        let target = reader.string()?;
        self.root.symlink(target, &self.path(reader)?)?;
        Ok(Status::Ok.packet(id))
    }

    fn hardlink(&mut self, id: u32, reader: &mut Reader<'_>) -> Answer {
        let (from, to) = (self.path(reader)?, self.path(reader)?);
        self.root.hard_link(&from, &to)?;
        Ok(Status::Ok.packet(id))
    }

    fn fsync(&mut self, id: u32, reader: &mut Reader<'_>) -> Answer {
        self.file(reader)?.0.sync_all()?;
        Ok(Status::Ok.packet(id))
    }

    fn limits(&mut self, id: u32, _: &mut Reader<'_>) -> Answer {
        let data = DATA_MAX as u64;
        let mut writer = Writer::new(packet::EXTENDED_REPLY);
        Ok(writer.u32(id).u64(data + 1024).u64(data).u64(data).u64(HANDLES_MAX as u64).finish())
    }
}

/// Owner before mode, for a change of owner clears bits of the mode. Works on descriptors opened with O_PATH.
fn apply(file: &File, asked: &Attributes) -> Result<(), Failed> {
    use std::os::unix::fs::PermissionsExt as _;
    let name = format!("/proc/self/fd/{}", file.as_raw_fd());
    if let Some((user, group)) = asked.owner {
        let (user, group) = (fs::Uid::from_raw(user), fs::Gid::from_raw(group));
        fs::chownat(file, "", Some(user), Some(group), AtFlags::EMPTY_PATH)?;
    }
    if let Some(mode) = asked.mode {
        std::fs::set_permissions(&name, std::fs::Permissions::from_mode(mode & 0o777))?;
    }
    if let Some((accessed, modified)) = asked.times {
        let time = |seconds: u32| Timespec { tv_sec: seconds.into(), tv_nsec: 0 };
        let times = Timestamps { last_access: time(accessed), last_modification: time(modified) };
        fs::utimensat(fs::CWD, &name, &times, AtFlags::empty())?;
    }
    Ok(())
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
mod tests {
    use super::*;
    use std::sync::Mutex;

    #[derive(Default)]
    struct Kept(Mutex<Vec<Vec<u8>>>);

    impl Output for Kept {
        fn send(&self, packet: Vec<u8>) {
            self.0.lock().unwrap().push(packet);
        }
    }

    fn session(read_only: bool) -> (tempfile::TempDir, Arc<Kept>, Session) {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path().to_owned();
        let (policy, actor) = (PolicySpec::default(), String::new());
        let config = SessionConfig { root, confine: true, read_only, policy, actor };
        let kept = Arc::new(Kept::default());
        let mut session = Session::new(config, kept.clone(), None).unwrap();
        session.feed(&Writer::new(packet::INIT).u32(3).finish()).unwrap();
        (directory, kept, session)
    }

    fn ask(session: &mut Session, kept: &Kept, mut request: Writer) -> Vec<u8> {
        session.feed(&request.finish()).unwrap();
        kept.0.lock().unwrap().pop().unwrap()
    }

    fn create(mode: u32) -> Writer {
        let mut request = Writer::new(packet::OPEN);
        request.u32(1).string(b"/../f").u32(open::WRITE | open::CREATE).u32(4).u32(mode);
        request
    }

    #[test]
    fn h45_special_bits_are_dropped() {
        use std::os::unix::fs::PermissionsExt as _;
        let (directory, kept, mut session) = session(false);
        assert_eq!(ask(&mut session, &kept, create(0o4755))[4], packet::HANDLE);
        let mode = std::fs::metadata(directory.path().join("f")).unwrap().permissions().mode();
        assert_eq!(mode & 0o7000, 0);
    }

    #[test]
    fn a_read_only_session_changes_nothing() {
        let (directory, kept, mut session) = session(true);
        assert_eq!(ask(&mut session, &kept, create(0o644)), Status::PermissionDenied.packet(1));
        assert!(!directory.path().join("f").exists());
    }

    #[test]
    fn h40_h44_unknown_handles_and_requests_get_an_answer() {
        let (_directory, kept, mut session) = session(false);
        let mut close = Writer::new(packet::CLOSE);
        close.u32(1).string(b"12345678");
        assert_eq!(ask(&mut session, &kept, close), Status::Failure.packet(1));
        let mut unknown = Writer::new(99);
        unknown.u32(1);
        assert_eq!(ask(&mut session, &kept, unknown), Status::Unsupported.packet(1));
    }
}
