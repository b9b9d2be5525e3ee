//! The messages of the agent: SSH_FXP_EXTENDED requests `X@lockstep.internal`; `docs/protocol.md` specifies them.
//!
//! Everything read here comes from a peer: lengths are held against what is there before anything is allocated.

use super::buffer::{Reader, Short};
use crate::codec::{self, CodecError, Coding};
use crate::manifest::{Content, Digest, Entry};
use crate::path::RelPath;
use crate::plan::{Action, Change, Differences, Need, Removal};

/// What follows the name of every message.
pub const DOMAIN: &str = "@lockstep.internal";
/// The version of every message.
pub const VERSION: &str = "1";
/// No message: an agent that has this name knows the options of `begin` and `commit` that put things into the trash and
/// that take whole units away. One that did not would remove what is to be kept.
pub const TRASH: &str = "trash@lockstep.internal";
/// The names that are advertised.
pub const NAMES: [&str; 28] = [
    "hello@lockstep.internal",
    "begin@lockstep.internal",
    "attach@lockstep.internal",
    "entries@lockstep.internal",
    "diff@lockstep.internal",
    "plan@lockstep.internal",
    "put@lockstep.internal",
    "open@lockstep.internal",
    "write@lockstep.internal",
    "hole@lockstep.internal",
    "finish@lockstep.internal",
    "keep@lockstep.internal",
    "discard@lockstep.internal",
    "commit@lockstep.internal",
    "abort@lockstep.internal",
    "scan@lockstep.internal",
    "list@lockstep.internal",
    "fetch@lockstep.internal",
    "next@lockstep.internal",
    TRASH,
    "trail@lockstep.internal",
    ALIKE,
    COPY,
    STRIPE,
    TURNS,
    WANTS,
    PARTS,
    LISTEN,
];
/// Names what the target has that a file may be made of.
pub const ALIKE: &str = "alike@lockstep.internal";
/// Makes a part of a file of that.
pub const COPY: &str = "copy@lockstep.internal";
/// A `write` that may come over another connection than what stands before it, and before that.
pub const STRIPE: &str = "stripe@lockstep.internal";
/// No message: an agent that has this name produces what several connections ask for of one stream in the order of the numbers
/// that their `next` have.
pub const TURNS: &str = "turns@lockstep.internal";
/// Waits for what the source of a pull wants to know of what the target has already.
pub const WANTS: &str = "wants@lockstep.internal";
/// Tells it.
pub const PARTS: &str = "parts@lockstep.internal";
/// What a `fetch` says of a file: that its digest follows, and that it is to be compared with what the client has.
pub const HAS_DIGEST: u8 = 1;
/// See [`HAS_DIGEST`].
pub const COMPARES: u8 = 2;
/// So many files of a pull are compared at once, at most.
pub const COMPARED_MAX: usize = 1024;
/// Chunks or blocks in one `parts`, at most.
pub const PART_CHUNKS_MAX: usize = 8192;
/// The order of a `parts` that says that nothing more will be told of a file.
pub const NO_ORDER: u32 = u32::MAX;
/// So many `parts` of one file may wait to be looked at.
pub const PARTS_MAX: usize = 4;
/// Opens a port beside the way in, for further connections of the run. Advertised only where that may be.
pub const LISTEN: &str = "listen@lockstep.internal";
/// So much of `stripe` requests, as they were sent, may wait in a run for what stands before it.
pub const AHEAD_BYTES_MAX: usize = 64 << 20;
/// So many `next` requests of one stream may wait for those before them.
pub const AHEAD_NEXT_MAX: usize = 256;
/// Content and lists in one message come to at most this many bytes before compression.
pub const RAW_MAX: usize = 2 << 20;
/// At most this many files in one `put` or `fetch`.
pub const FILES_MAX: usize = 4096;
/// At most this many files of one stream may be fetched and not produced yet.
pub const FETCH_MAX: usize = 1024;
/// The longest hole in one message: its zeros are hashed.
pub const HOLE_MAX: u64 = 1 << 30;
/// Lists travel in chunks of about this many bytes.
pub const CHUNK_BYTES: usize = 1 << 20;

/// SSH_FXP_STATUS.
pub const STATUS: u8 = 101;
/// SSH_FXP_EXTENDED.
pub const EXTENDED: u8 = 200;
/// SSH_FXP_EXTENDED_REPLY.
pub const EXTENDED_REPLY: u8 = 201;

/// Why a message is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)]
pub enum WireError {
    #[error("the message ends too early")]
    Short,
    #[error("the message has bytes after its end")]
    Trailing,
    #[error("{0} is out of range")]
    Range(&'static str),
    /// Paths are listed in ascending order.
    #[error("'{path}' is listed after what it comes before: the paths do not ascend")]
    Order {
        /// Safe to print.
        path: String,
    },
    /// Each path is listed once.
    #[error("'{path}' is listed twice")]
    Twice {
        /// Safe to print.
        path: String,
    },
    #[error(
        "the list takes more than {most} bytes of memory, which is all that there is for one run; send the tree in parts"
    )]
    TooMany { most: usize },
    #[error(transparent)]
    Codec(#[from] CodecError),
    #[error(transparent)]
    Path(#[from] crate::path::InvalidPath),
}

/// Reads fields from the front of bytes: those of [`Reader`], and what extensions add.
#[derive(Debug, Clone, Copy)]
pub struct Fields<'a>(pub &'a [u8]);

impl<'a> Fields<'a> {
    fn take<T>(&mut self, take: impl FnOnce(&mut Reader<'a>) -> Result<T, Short>) -> Result<T, WireError> {
        let mut reader = Reader(self.0);
        let value = take(&mut reader).map_err(|Short| WireError::Short)?;
        self.0 = reader.0;
        Ok(value)
    }

    /// The next `count` bytes.
    ///
    /// # Errors
    /// [`WireError::Short`], here and below.
    pub fn bytes(&mut self, count: usize) -> Result<&'a [u8], WireError> {
        self.take(|reader| reader.bytes(count))
    }

    /// One byte.
    ///
    /// # Errors
    /// [`WireError::Short`].
    pub fn u8(&mut self) -> Result<u8, WireError> {
        self.take(Reader::u8)
    }

    /// Four bytes.
    ///
    /// # Errors
    /// [`WireError::Short`].
    pub fn u32(&mut self) -> Result<u32, WireError> {
        self.take(Reader::u32)
    }

    /// Eight bytes.
    ///
    /// # Errors
    /// [`WireError::Short`].
    pub fn u64(&mut self) -> Result<u64, WireError> {
        self.take(Reader::u64)
    }

    /// A length in four bytes, then as many bytes.
    ///
    /// # Errors
    /// [`WireError::Short`].
    pub fn string(&mut self) -> Result<&'a [u8], WireError> {
        self.take(Reader::string)
    }

    /// A string, with what is not UTF-8 replaced.
    ///
    /// # Errors
    /// [`WireError::Short`].
    pub fn text(&mut self) -> Result<String, WireError> {
        Ok(String::from_utf8_lossy(self.string()?).into_owned())
    }

    /// A string that a peer says to people, made safe to print ([`crate::error::said`]).
    ///
    /// # Errors
    /// [`WireError::Short`].
    pub fn said(&mut self) -> Result<String, WireError> {
        self.string().map(crate::error::said)
    }

    /// 32 bytes.
    ///
    /// # Errors
    /// [`WireError::Short`].
    pub fn digest(&mut self) -> Result<Digest, WireError> {
        self.take(Reader::array).map(Digest)
    }

    /// Nothing may be left.
    ///
    /// # Errors
    /// [`WireError::Trailing`].
    pub fn end(self) -> Result<(), WireError> {
        if self.0.is_empty() { Ok(()) } else { Err(WireError::Trailing) }
    }

    /// A `frame` (codec, raw length, then all that is left) appended to `out`.
    ///
    /// # Errors
    /// [`WireError`]; the declared length is bounded by [`RAW_MAX`].
    pub fn frame(mut self, out: &mut Vec<u8>) -> Result<usize, WireError> {
        let codec = self.u8()?;
        let raw_length = self.u32()? as usize;
        if raw_length > RAW_MAX {
            return Err(WireError::Range("the declared length"));
        }
        match codec {
            0 if raw_length == self.0.len() => out.extend_from_slice(self.0),
            0 => return Err(WireError::Range("the declared length")),
            1 => codec::decompress(self.0, raw_length, out)?,
            codec::PLANES_NUMBER => codec::planes::decode(self.0, raw_length, out)?,
            _ => return Err(WireError::Range("the codec")),
        }
        Ok(raw_length)
    }
}

/// A request's message within the packet it came in, so that its content need not be copied out.
#[derive(Debug, Default)]
pub struct Message {
    packet: Vec<u8>,
    start: usize,
}

impl Message {
    /// The bytes of `packet` from `start` on.
    pub fn new(packet: Vec<u8>, start: usize) -> Message {
        Message { start: start.min(packet.len()), packet }
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.packet[self.start..]
    }

    /// Leaves the first `count` bytes out.
    pub fn skip(self, count: usize) -> Message {
        Message { start: (self.start + count).min(self.packet.len()), ..self }
    }

    /// The whole packet, and where the bytes start.
    pub fn into_parts(self) -> (Vec<u8>, usize) {
        (self.packet, self.start)
    }
}

/// Appends a length and bytes.
pub fn put_string(out: &mut Vec<u8>, bytes: &[u8]) {
    out.extend_from_slice(&(bytes.len() as u32).to_be_bytes());
    out.extend_from_slice(bytes);
}

/// Appends a `frame` of `raw`, compressed when a level is given and it becomes smaller.
pub fn put_frame(out: &mut Vec<u8>, raw: &[u8], level: Option<i32>) {
    put_coded(out, raw, level.map(Coding::Zstd));
}

/// Appends a `frame` of `raw`, coded when a coding is given and it becomes smaller.
pub fn put_coded(out: &mut Vec<u8>, raw: &[u8], coding: Option<Coding>) {
    let start = out.len();
    out.push(coding.map_or(0, Coding::number));
    out.extend_from_slice(&(raw.len() as u32).to_be_bytes());
    let smaller = coding.is_some_and(|coding| coding.encode(raw, out).is_ok() && out.len() - start < raw.len());
    if !smaller {
        out.truncate(start + 5);
        out[start] = 0;
        out.extend_from_slice(raw);
    }
}

/// In the level of a `next`: the client reads byte planes. Only for a server that says the same.
pub const TAKES_PLANES: u8 = 0x80;

/// The start of a request; its length and number are filled in when it is sent.
pub fn request(name: &str) -> Vec<u8> {
    let mut packet = vec![0, 0, 0, 0, EXTENDED, 0, 0, 0, 0];
    put_string(&mut packet, format!("{name}{DOMAIN}").as_bytes());
    packet
}

/// A whole reply.
pub fn reply(id: u32, body: &[u8]) -> Vec<u8> {
    let mut packet = Vec::with_capacity(9 + body.len());
    packet.extend_from_slice(&(5 + body.len() as u32).to_be_bytes());
    packet.push(EXTENDED_REPLY);
    packet.extend_from_slice(&id.to_be_bytes());
    packet.extend_from_slice(body);
    packet
}

/// A whole status; `exit` is how the client's run should end when the status ends it.
pub fn status(id: u32, code: u32, message: &str, exit: u8) -> Vec<u8> {
    let mut body = code.to_be_bytes().to_vec();
    put_string(&mut body, message.as_bytes());
    put_string(&mut body, b"en");
    body.push(exit);
    let mut packet = reply(id, &body);
    packet[4] = STATUS;
    packet
}

/// Appends one entry of a list.
pub fn put_entry(out: &mut Vec<u8>, entry: &Entry) {
    put_string(out, entry.path.as_bytes());
    match &entry.content {
        Content::File { size, digest } => {
            out.push(u8::from(digest.is_some()));
            out.extend_from_slice(&size.to_be_bytes());
            out.extend(digest.iter().flat_map(|digest| digest.0));
        }
        Content::Directory => out.push(2),
        Content::Symlink { target } => {
            out.push(3);
            put_string(out, target);
        }
        Content::HardLink { first } => {
            out.push(4);
            put_string(out, first.as_bytes());
        }
    }
    out.extend_from_slice(&entry.mtime.seconds.to_be_bytes());
    out.extend_from_slice(&entry.mtime.nanoseconds.to_be_bytes());
    out.extend_from_slice(&entry.mode.to_be_bytes());
    put_string(out, entry.owner.as_bytes());
    put_string(out, entry.group.as_bytes());
}

/// Appends one action of a plan.
pub fn put_action(out: &mut Vec<u8>, action: &Action, alike: bool) {
    out.extend_from_slice(&action.index.to_be_bytes());
    out.push(match action.change {
        Change::Added => 0,
        Change::Modified => 1,
        Change::MetadataOnly => 2,
    });
    let d = action.differences;
    let bits = [d.content, d.size, d.time, d.mode, d.owner, d.group];
    out.push(bits.iter().enumerate().fold(0, |sum, (at, &bit)| sum | u8::from(bit) << at));
    match &action.need {
        Need::Nothing => out.push(0),
        Need::Content { resume_at } => {
            out.push(if alike { 3 } else { 1 });
            out.extend_from_slice(&resume_at.to_be_bytes());
        }
        Need::Compare { digest } => {
            out.push(if alike { 4 } else { 2 });
            out.extend_from_slice(&digest.0);
        }
    }
}

/// Reads one action, and whether its file may be made of what the target has.
///
/// # Errors
/// [`WireError`].
pub fn read_action(fields: &mut Fields<'_>) -> Result<(Action, bool), WireError> {
    let index = fields.u32()?;
    let change = match fields.u8()? {
        0 => Change::Added,
        1 => Change::Modified,
        2 => Change::MetadataOnly,
        _ => return Err(WireError::Range("the kind of a change")),
    };
    let bits = fields.u8()?;
    let bit = |at: u8| bits & 1 << at != 0;
    let differences =
        Differences { content: bit(0), size: bit(1), time: bit(2), mode: bit(3), owner: bit(4), group: bit(5) };
    let kind = fields.u8()?;
    let need = match kind {
        0 => Need::Nothing,
        1 | 3 => Need::Content { resume_at: fields.u64()? },
        2 | 4 => Need::Compare { digest: Box::new(fields.digest()?) },
        _ => return Err(WireError::Range("the kind of a need")),
    };
    Ok((Action { index, change, differences, need }, kind >= 3))
}

/// Appends one removal of a plan.
pub fn put_removal(out: &mut Vec<u8>, removal: &Removal) {
    put_string(out, removal.path.as_bytes());
    out.push(u8::from(removal.directory));
}

/// Reads one removal.
///
/// # Errors
/// [`WireError`].
pub fn read_removal(fields: &mut Fields<'_>) -> Result<Removal, WireError> {
    Ok(Removal { path: RelPath::new(fields.string()?)?, directory: fields.u8()? != 0 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn actions_round_trip() {
        for need in [Need::Nothing, Need::Content { resume_at: 9 }, Need::Compare { digest: Box::new(Digest([1; 32])) }]
        {
            let differences = Differences { content: true, owner: true, ..Differences::default() };
            let action = Action { index: 3, change: Change::Modified, differences, need };
            let mut raw = Vec::new();
            put_action(&mut raw, &action, false);
            assert_eq!(read_action(&mut Fields(&raw)).unwrap(), (action, false));
        }
    }

    #[test]
    fn h23_lengths_are_bounded_before_allocating() {
        let mut frame = vec![0];
        frame.extend_from_slice(&u32::MAX.to_be_bytes());
        assert_eq!(Fields(&frame).frame(&mut Vec::new()), Err(WireError::Range("the declared length")));
        assert_eq!(Fields(&[0xff, 0xff, 0xff, 0xff, 1]).string(), Err(WireError::Short));
        let mut short = Vec::new();
        put_frame(&mut short, b"hello", None);
        short.pop();
        assert!(Fields(&short).frame(&mut Vec::new()).is_err());
    }
}
