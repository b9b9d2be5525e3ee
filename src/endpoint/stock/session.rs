//! One SFTP session with a stock server: what it offers, its requests, and its answers.
//!
//! What always holds: an answer of another kind than its request allows, or one that does not hold what it says, ends
//! the run. A request that the server refuses is a [`Refusal`], which the caller weighs.

use std::io;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use bytes::Bytes;
use crossbeam_channel::{Receiver, unbounded};

use crate::endpoint::Error;
use crate::endpoint::client::{Answer, Client, Completion};
use crate::error::Escaped;
use crate::wire::buffer::{Reader, Short, Writer};
use crate::wire::sftp::{Attributes, Status, packet};

/// What a server reads and writes in one request when it does not say.
const USUAL_DATA: u64 = 32 << 10;
/// The most that is asked for or sent in one request.
const MOST_DATA: u64 = 255 << 10;
/// Handles in use at once where the server names no limit.
const USUAL_HANDLES: u64 = 64;
/// No handle is longer (draft-ietf-secsh-filexfer-02, 6.2).
const HANDLE_MAX: usize = 256;

/// Extensions of OpenSSH's PROTOCOL file that a server has.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Offers {
    /// A rename that replaces.
    pub(super) posix_rename: bool,
    pub(super) hard_link: bool,
    pub(super) fsync: bool,
    /// SETSTAT that does not follow a link.
    pub(super) lsetstat: bool,
    /// Names of users and groups by number.
    pub(super) names: bool,
    /// What lies in one open file written into another, by the server itself.
    pub(super) copy_data: bool,
    /// How much room a file system has.
    statvfs: bool,
}

/// One session.
pub(super) struct Session {
    pub(super) client: Client,
    pub(super) offers: Offers,
    limits: Arc<OnceLock<Limits>>,
    /// What was asked about them, until somebody needs the answer.
    asked: Mutex<Option<Receiver<Completion>>>,
}

/// What one session with a server knows of it, for another.
pub(super) struct Known {
    extensions: Vec<(Vec<u8>, Vec<u8>)>,
    limits: Arc<OnceLock<Limits>>,
}

/// How much the server takes at once.
#[derive(Debug, Clone, Copy)]
struct Limits {
    read: u32,
    write: u32,
    handles: usize,
}

impl Limits {
    /// Of what it said in answer to `limits@openssh.com`; 0 is "no limit that I know of".
    fn of([_, read, write, handles]: [u64; 4]) -> Limits {
        let data = |limit: u64| if limit == 0 { USUAL_DATA } else { limit.clamp(1024, MOST_DATA) } as u32;
        let handles = if handles == 0 { USUAL_HANDLES } else { handles.clamp(8, 1024) / 2 } as usize;
        Limits { read: data(read), write: data(write), handles }
    }
}

/// Why the server did not do something.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{text}")]
pub(super) struct Refusal {
    pub(super) status: Status,
    /// What the server said, made safe to print.
    pub(super) text: String,
}

impl Refusal {
    pub(super) fn is_missing(&self) -> bool {
        self.status == Status::NoSuchFile
    }

    fn kind(&self) -> io::ErrorKind {
        match self.status {
            Status::NoSuchFile => io::ErrorKind::NotFound,
            Status::PermissionDenied => io::ErrorKind::PermissionDenied,
            Status::Unsupported => io::ErrorKind::Unsupported,
            _ => io::ErrorKind::Other,
        }
    }
}

/// One name of a directory.
#[derive(Debug, Clone)]
pub(super) struct Name {
    pub(super) name: Vec<u8>,
    /// How many names it has, as far as the line for people tells.
    pub(super) links: Option<u32>,
    pub(super) attributes: Attributes,
}

/// The number of names in a line as `ls -l` writes it, which is what OpenSSH's server gives of each name that it lists.
fn links_of(line: &[u8]) -> Option<u32> {
    let mut words = line.split(|&byte| byte == b' ').filter(|word| !word.is_empty());
    let mode = words.next().filter(|mode| mode.len() >= 10 && mode[0] == b'-')?;
    mode[1..10].iter().all(|byte| b"-rwxsStT".contains(byte)).then_some(())?;
    std::str::from_utf8(words.next()?).ok()?.parse().ok()
}

/// An answer that fits its type.
#[derive(Debug, Clone)]
pub(super) enum Reply {
    Done,
    Refused(Refusal),
    Handle(Bytes),
    Data(Bytes),
    Names(Vec<Name>),
    Attributes(Attributes),
    Extended(Bytes),
}

/// A request without its number.
pub(super) fn request(kind: u8) -> Writer {
    let mut writer = Writer::new(kind);
    writer.u32(0);
    writer
}

/// A request about one path.
pub(super) fn about(kind: u8, path: &[u8]) -> Vec<u8> {
    request(kind).string(path).finish()
}

/// A request of an extension about one or two strings.
pub(super) fn extended(name: &str, strings: &[&[u8]]) -> Vec<u8> {
    let mut writer = request(packet::EXTENDED);
    writer.string(name.as_bytes());
    for string in strings {
        writer.string(string);
    }
    writer.finish()
}

/// SETSTAT, FSETSTAT, MKDIR: a path or handle, then attributes. EXTENDED is the SETSTAT that does not follow a link.
pub(super) fn with_attributes(kind: u8, what: &[u8], attributes: &Attributes) -> Vec<u8> {
    let mut writer = request(kind);
    if kind == packet::EXTENDED {
        writer.string(b"lsetstat@openssh.com");
    }
    writer.string(what);
    attributes.encode(&mut writer);
    writer.finish()
}

/// An OPEN; what it creates is born 0600.
pub(super) fn open(path: &[u8], flags: u32) -> Vec<u8> {
    let mut writer = request(packet::OPEN);
    writer.string(path).u32(flags);
    Attributes { mode: Some(0o600), ..Attributes::default() }.encode(&mut writer);
    writer.finish()
}

/// A WRITE.
pub(super) fn write(handle: &[u8], offset: u64, data: &[u8]) -> Vec<u8> {
    request(packet::WRITE).string(handle).u64(offset).string(data).finish()
}

/// Bytes of one open file, copied into another at the server (draft-ietf-secsh-filexfer-extensions-00, 7): `from` and `to` are a
/// handle and an offset in it.
pub(super) fn copy_data(from: (&[u8], u64), length: u64, to: (&[u8], u64)) -> Vec<u8> {
    let mut writer = request(packet::EXTENDED);
    writer.string(b"copy-data").string(from.0).u64(from.1).u64(length).string(to.0).u64(to.1);
    writer.finish()
}

/// A READ.
pub(super) fn read(handle: &[u8], offset: u64, length: u32) -> Vec<u8> {
    request(packet::READ).string(handle).u64(offset).u32(length).finish()
}

/// A MKDIR with a mode.
pub(super) fn mkdir(path: &[u8], mode: u32) -> Vec<u8> {
    with_attributes(packet::MKDIR, path, &Attributes { mode: Some(mode), ..Attributes::default() })
}

/// A SYMLINK. OpenSSH's server takes the target first, other than the draft says, and every client follows it.
pub(super) fn symlink(target: &[u8], path: &[u8]) -> Vec<u8> {
    request(packet::SYMLINK).string(target).string(path).finish()
}

impl Session {
    /// Asks the server at the other end of `client` what it takes at once, and does not wait for the answer. One that offers the
    /// same as one that is known is the same server, and is not asked.
    ///
    /// # Errors
    /// When the connection has ended.
    pub(super) fn new(client: Client, known: Option<&Known>) -> Result<Session, Error> {
        let has = |name: &str| client.has(name, "1");
        let offers = Offers {
            posix_rename: has("posix-rename@openssh.com"),
            hard_link: has("hardlink@openssh.com"),
            fsync: has("fsync@openssh.com"),
            lsetstat: has("lsetstat@openssh.com"),
            names: has("users-groups-by-id@openssh.com"),
            copy_data: has("copy-data"),
            statvfs: client.has("statvfs@openssh.com", "2"),
        };
        let known = known.filter(|known| known.extensions == client.extensions());
        let known = known.and_then(|known| known.limits.get().copied());
        let ask = known.is_none() && has("limits@openssh.com");
        let limits = Arc::new(known.map(OnceLock::from).unwrap_or_default());
        let session = Session { client, offers, limits, asked: Mutex::new(None) };
        if ask {
            let (sender, receiver) = unbounded();
            session.client.submit(extended("limits@openssh.com", &[]), 0, 0, &sender)?;
            *session.asked.lock().unwrap_or_else(PoisonError::into_inner) = Some(receiver);
        }
        Ok(session)
    }

    /// What it knows of the server, once it does.
    pub(super) fn known(&self) -> Known {
        Known { extensions: self.client.extensions().to_vec(), limits: Arc::clone(&self.limits) }
    }

    fn limits(&self) -> Limits {
        *self.limits.get_or_init(|| {
            let asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner).take();
            let mut told = [0; 4];
            // A connection that is gone, or an answer that is short, is met again by whoever asks next.
            let completed = asked.and_then(|asked| self.completed(self.client.wait(&asked, false).ok()?).ok());
            if let Some((_, Reply::Extended(body))) = completed {
                let mut reader = Reader(&body);
                told = std::array::from_fn(|_| reader.u64().unwrap_or_default());
            }
            Limits::of(told)
        })
    }

    /// Bytes asked for in one READ.
    pub(super) fn read_max(&self) -> u32 {
        self.limits().read
    }

    /// Bytes sent in one WRITE.
    pub(super) fn write_max(&self) -> u32 {
        self.limits().write
    }

    /// Handles that may be open at once.
    pub(super) fn handles(&self) -> usize {
        self.limits().handles
    }

    /// Sends a request whose answer nobody needs.
    ///
    /// # Errors
    /// When the connection has ended.
    pub(super) fn forget(&self, request: Vec<u8>) -> Result<(), Error> {
        self.client.submit(request, 0, 0, &unbounded().0)
    }

    /// Sends one request and waits for its answer.
    ///
    /// # Errors
    /// When the connection ends, here and below.
    pub(super) fn call(&self, request: Vec<u8>) -> Result<Reply, Error> {
        self.reply(self.client.call(request, false)?)
    }

    /// Sends all requests, and gives their answers in the same order. The server does them in this order: the draft
    /// has it that "the results will be the same as if it had sent the requests one at a time".
    ///
    /// # Errors
    /// When the connection ends.
    pub(super) fn batch(&self, requests: impl IntoIterator<Item = Vec<u8>>) -> Result<Vec<Reply>, Error> {
        let (sender, receiver) = unbounded();
        let mut count = 0;
        for request in requests {
            self.client.submit(request, 0, count, &sender)?;
            count += 1;
        }
        let mut replies: Vec<Option<Reply>> = (0..count).map(|_| None).collect();
        for _ in 0..count {
            let (tag, reply) = self.completed(self.client.wait(&receiver, false)?)?;
            replies[tag as usize] = Some(reply);
        }
        Ok(replies.into_iter().flatten().collect())
    }

    /// A batch of requests that are answered by a status.
    ///
    /// # Errors
    /// When the connection ends.
    pub(super) fn all(&self, requests: impl IntoIterator<Item = Vec<u8>>) -> Result<Vec<Result<(), Refusal>>, Error> {
        self.batch(requests)?.into_iter().map(|reply| self.status(reply)).collect()
    }

    /// What a completion says.
    ///
    /// # Errors
    /// When the connection ends.
    pub(super) fn completed(&self, completion: Completion) -> Result<(u64, Reply), Error> {
        let answer = completion.answer.map_err(|lost| self.client.lost(lost))?;
        Ok((completion.tag, self.reply(answer)?))
    }

    fn reply(&self, answer: Answer) -> Result<Reply, Error> {
        let kind = answer.kind;
        decode(answer).map_err(|Short| self.client.protocol(format!("an answer of type {kind} is cut short")))
    }

    /// A reply that can only be a status.
    ///
    /// # Errors
    /// When it is another.
    pub(super) fn status(&self, reply: Reply) -> Result<Result<(), Refusal>, Error> {
        match reply {
            Reply::Done => Ok(Ok(())),
            Reply::Refused(refusal) => Ok(Err(refusal)),
            _ => Err(self.odd()),
        }
    }

    /// A request that is answered by a status.
    ///
    /// # Errors
    /// When the connection ends.
    pub(super) fn order(&self, request: Vec<u8>) -> Result<Result<(), Refusal>, Error> {
        let reply = self.call(request)?;
        self.status(reply)
    }

    /// LSTAT (or with [`packet::STAT`] one that follows links).
    ///
    /// # Errors
    /// When the connection ends.
    pub(super) fn stat(&self, kind: u8, path: &[u8]) -> Result<Result<Attributes, Refusal>, Error> {
        let reply = self.call(about(kind, path))?;
        self.attributes(reply)
    }

    /// A reply to LSTAT, STAT or FSTAT.
    ///
    /// # Errors
    /// When it is another.
    pub(super) fn attributes(&self, reply: Reply) -> Result<Result<Attributes, Refusal>, Error> {
        match reply {
            Reply::Attributes(attributes) => Ok(Ok(attributes)),
            Reply::Refused(refusal) => Ok(Err(refusal)),
            _ => Err(self.odd()),
        }
    }

    /// A reply to OPEN or OPENDIR.
    ///
    /// # Errors
    /// When it is another.
    pub(super) fn handle(&self, reply: Reply) -> Result<Result<Bytes, Refusal>, Error> {
        match reply {
            Reply::Handle(handle) => Ok(Ok(handle)),
            Reply::Refused(refusal) => Ok(Err(refusal)),
            _ => Err(self.odd()),
        }
    }

    /// Bytes that can still be stored where `path` lies; `None` where the server does not say. 0 when no file can be made.
    ///
    /// # Errors
    /// When the connection ends.
    pub(super) fn room(&self, path: &[u8]) -> Result<Option<u64>, Error> {
        if !self.offers.statvfs {
            return Ok(None);
        }
        let Reply::Extended(body) = self.call(extended("statvfs@openssh.com", &[path]))? else { return Ok(None) };
        let mut reader = Reader(&body);
        let mut fields = [0; 8];
        for field in &mut fields {
            *field = reader.u64().map_err(|_| self.client.protocol("a short answer to statvfs@openssh.com"))?;
        }
        let [_, block, blocks, _, available, files, _, files_available] = fields;
        // File systems without a table of files say 0 of 0.
        let full = (blocks > 0 && available == 0) || (files > 0 && files_available == 0);
        Ok(Some(if full { 0 } else { block.saturating_mul(available) }))
    }

    /// The answer is of a kind that its request does not have.
    pub(super) fn odd(&self) -> Error {
        self.client.protocol("an answer of a kind that its request does not have")
    }

    /// The error that ends the run because of a refusal.
    pub(super) fn refused(&self, operation: &'static str, path: &[u8], refusal: &Refusal) -> Error {
        let path = format!("{}:{}", self.client.host(), Escaped(path));
        // Nothing is said of a full disk but that.
        let stores = refusal.status == Status::Failure && ["write", "make", "make the directory"].contains(&operation);
        let more = if stores { ", as where a disk is full or a quota used up" } else { "" };
        Error::Io { operation, path, source: io::Error::new(refusal.kind(), format!("{}{more}", refusal.text)) }
    }
}

fn decode(answer: Answer) -> Result<Reply, Short> {
    let body = &answer.body;
    let mut reader = Reader(body);
    Ok(match answer.kind {
        packet::STATUS => {
            let code = reader.u32()?;
            // The text is not there in the earliest servers.
            let text = reader.string().unwrap_or_default();
            match Status::from_code(code) {
                Status::Ok => Reply::Done,
                status => {
                    let text = if text.is_empty() { status.text().as_bytes() } else { &text[..text.len().min(500)] };
                    Reply::Refused(Refusal { status, text: Escaped(text).to_string() })
                }
            }
        }
        packet::HANDLE => match reader.string()? {
            handle if handle.len() > HANDLE_MAX => return Err(Short),
            handle => Reply::Handle(body.slice_ref(handle)),
        },
        packet::DATA => Reply::Data(body.slice_ref(reader.string()?)),
        packet::NAME => {
            let mut names = Vec::new();
            // Nothing is reserved for the count: each name has to be there.
            for _ in 0..reader.u32()? {
                let name = reader.string()?.to_vec();
                let links = links_of(reader.string()?);
                names.push(Name { name, links, attributes: Attributes::decode(&mut reader)? });
            }
            Reply::Names(names)
        }
        packet::ATTRS => Reply::Attributes(Attributes::decode(&mut reader)?),
        packet::EXTENDED_REPLY => Reply::Extended(answer.body.clone()),
        _ => return Err(Short),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn how_many_names_a_file_has_stands_in_its_line() {
        for (line, links) in [
            ("-rw-r--r--    1 root     root         1234 Nov 29 22:22 name", Some(1)),
            ("-rwsr-xr-x   12 0        0               0 Jan  1  1970 -rw 7", Some(12)),
            ("drwxr-xr-x    3 root     root         4096 Nov 29 22:22 name", None),
            ("-rw-r--r--    ? root     root         1234 Nov 29 22:22 name", None),
            ("-rw-r--r--", None),
            ("-some name 1", None),
            ("name", None),
            ("", None),
        ] {
            assert_eq!(links_of(line.as_bytes()), links, "{line}");
        }
    }
}
