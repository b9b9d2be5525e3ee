//! SFTP version 3 (draft-ietf-secsh-filexfer-02): packet types, attributes, status codes and framing. Paths and
//! handles are bytes.

use std::collections::VecDeque;

use super::buffer::{Reader, Short, Writer};

/// Packet types of the draft, without their `SSH_FXP_`.
#[allow(missing_docs)]
pub mod packet {
    pub const INIT: u8 = 1;
    pub const VERSION: u8 = 2;
    pub const OPEN: u8 = 3;
    pub const CLOSE: u8 = 4;
    pub const READ: u8 = 5;
    pub const WRITE: u8 = 6;
    pub const LSTAT: u8 = 7;
    pub const FSTAT: u8 = 8;
    pub const SETSTAT: u8 = 9;
    pub const FSETSTAT: u8 = 10;
    pub const OPENDIR: u8 = 11;
    pub const READDIR: u8 = 12;
    pub const REMOVE: u8 = 13;
    pub const MKDIR: u8 = 14;
    pub const RMDIR: u8 = 15;
    pub const REALPATH: u8 = 16;
    pub const STAT: u8 = 17;
    pub const RENAME: u8 = 18;
    pub const READLINK: u8 = 19;
    pub const SYMLINK: u8 = 20;
    pub const STATUS: u8 = 101;
    pub const HANDLE: u8 = 102;
    pub const DATA: u8 = 103;
    pub const NAME: u8 = 104;
    pub const ATTRS: u8 = 105;
    pub const EXTENDED: u8 = 200;
    pub const EXTENDED_REPLY: u8 = 201;
}

/// Flags of an OPEN.
#[allow(missing_docs)]
pub mod open {
    pub const READ: u32 = 1;
    pub const WRITE: u32 = 2;
    pub const APPEND: u32 = 4;
    pub const CREATE: u32 = 8;
    pub const TRUNCATE: u32 = 16;
    pub const EXCLUSIVE: u32 = 32;
}

/// The version that is spoken.
pub const VERSION: u32 = 3;
/// The most data in one READ or WRITE.
pub const DATA_MAX: usize = 256 << 10;
/// The largest ordinary packet.
pub const PACKET_MAX: usize = DATA_MAX + 1024;
/// The largest packet of an extension of ours.
pub const AGENT_PACKET_MAX: usize = super::extension::RAW_MAX + (64 << 10);

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
#[allow(missing_docs)]
pub enum Status {
    Ok = 0,
    EndOfFile = 1,
    NoSuchFile = 2,
    PermissionDenied = 3,
    Failure = 4,
    BadMessage = 5,
    NoConnection = 6,
    ConnectionLost = 7,
    Unsupported = 8,
}

impl Status {
    /// The code's meaning; unknown ones are failures.
    pub fn from_code(code: u32) -> Status {
        use Status as S;
        let all = [S::Ok, S::EndOfFile, S::NoSuchFile, S::PermissionDenied, S::Failure, S::BadMessage];
        let rest = [S::NoConnection, S::ConnectionLost, S::Unsupported];
        all.into_iter().chain(rest).find(|status| *status as u32 == code).unwrap_or(S::Failure)
    }

    /// What OpenSSH's server says.
    pub fn text(self) -> &'static str {
        match self {
            Status::Ok => "Success",
            Status::EndOfFile => "End of file",
            Status::NoSuchFile => "No such file",
            Status::PermissionDenied => "Permission denied",
            Status::Failure => "Failure",
            Status::BadMessage => "Bad message",
            Status::NoConnection => "No connection",
            Status::ConnectionLost => "Connection lost",
            Status::Unsupported => "Operation unsupported",
        }
    }

    /// The status packet for the request `id`.
    pub fn packet(self, id: u32) -> Vec<u8> {
        Writer::new(packet::STATUS).u32(id).u32(self as u32).string(self.text().as_bytes()).string(b"").finish()
    }
}

/// What is said or asked of a file; what is `None` is not said.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Attributes {
    /// Bytes.
    pub size: Option<u64>,
    /// User and group numbers.
    pub owner: Option<(u32, u32)>,
    /// st_mode.
    pub mode: Option<u32>,
    /// Access and modification, seconds.
    pub times: Option<(u32, u32)>,
    /// Further pairs.
    pub extended: Vec<(Vec<u8>, Vec<u8>)>,
}

impl Attributes {
    /// Reads them.
    ///
    /// # Errors
    /// [`Short`].
    pub fn decode(reader: &mut Reader<'_>) -> Result<Attributes, Short> {
        let flags = reader.u32()?;
        let has = |bit: u32| flags & bit != 0;
        let size = if has(1) { Some(reader.u64()?) } else { None };
        let owner = if has(2) { Some((reader.u32()?, reader.u32()?)) } else { None };
        let mode = if has(4) { Some(reader.u32()?) } else { None };
        let times = if has(8) { Some((reader.u32()?, reader.u32()?)) } else { None };
        let mut extended = Vec::new();
        if has(1 << 31) {
            // Nothing is reserved for the count: each pair has to be there.
            for _ in 0..reader.u32()? {
                extended.push((reader.string()?.to_vec(), reader.string()?.to_vec()));
            }
        }
        Ok(Attributes { size, owner, mode, times, extended })
    }

    /// Writes them.
    pub fn encode(&self, writer: &mut Writer) {
        let bit = |is: bool, bit: u32| if is { bit } else { 0 };
        writer.u32(
            bit(self.size.is_some(), 1)
                | bit(self.owner.is_some(), 2)
                | bit(self.mode.is_some(), 4)
                | bit(self.times.is_some(), 8)
                | bit(!self.extended.is_empty(), 1 << 31),
        );
        if let Some(size) = self.size {
            writer.u64(size);
        }
        if let Some((user, group)) = self.owner {
            writer.u32(user).u32(group);
        }
        if let Some(mode) = self.mode {
            writer.u32(mode);
        }
        if let Some((accessed, modified)) = self.times {
            writer.u32(accessed).u32(modified);
        }
        if !self.extended.is_empty() {
            writer.u32(u32::try_from(self.extended.len()).unwrap_or(u32::MAX));
            for (name, value) in &self.extended {
                writer.string(name).string(value);
            }
        }
    }
}

/// The stream is not SFTP.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a packet of {0} bytes is not acceptable")]
pub struct FramingError(pub u32);

/// Puts packets together from bytes in any pieces. A byte is copied once, into the packet that it belongs to.
#[derive(Debug, Default)]
pub struct Frames {
    /// The length and the type of the packet that is being received, as far as they are there.
    head: Vec<u8>,
    /// What of it is there.
    packet: Vec<u8>,
    /// Its length; 0 before that is known.
    length: usize,
    ready: VecDeque<Vec<u8>>,
    broken: Option<FramingError>,
}

const HEAD: usize = 5;

impl Frames {
    /// Takes bytes.
    pub fn push(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() && self.broken.is_none() {
            if self.length == 0 {
                let (head, rest) = bytes.split_at(bytes.len().min(HEAD - self.head.len()));
                self.head.extend_from_slice(head);
                bytes = rest;
                self.begin();
                continue;
            }
            let (more, rest) = bytes.split_at(bytes.len().min(self.length - self.packet.len()));
            self.packet.extend_from_slice(more);
            bytes = rest;
            self.complete();
        }
    }

    /// Looks at the length before anything is allocated for it.
    fn begin(&mut self) {
        let Some(length) = self.head.first_chunk().map(|length| u32::from_be_bytes(*length)) else { return };
        let kind = self.head.get(4);
        let most = if kind.is_none_or(|kind| *kind == packet::EXTENDED) { AGENT_PACKET_MAX } else { PACKET_MAX };
        if length == 0 || length as usize > most {
            self.broken = Some(FramingError(length));
        } else if let Some(kind) = kind {
            self.length = length as usize;
            self.packet.reserve_exact(self.length);
            self.packet.push(*kind);
            self.complete();
        }
    }

    fn complete(&mut self) {
        if self.packet.len() == self.length {
            self.ready.push_back(std::mem::take(&mut self.packet));
            self.head.clear();
            self.length = 0;
        }
    }

    /// The next whole packet, without its length.
    ///
    /// # Errors
    /// [`FramingError`]: the stream is out of step for good.
    pub fn next_packet(&mut self) -> Result<Option<Vec<u8>>, FramingError> {
        match (self.ready.pop_front(), self.broken) {
            (None, Some(error)) => Err(error),
            (packet, _) => Ok(packet),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_round_trip() {
        let full = Attributes {
            size: Some(1 << 40),
            owner: Some((1, 2)),
            mode: Some(0o100644),
            times: Some((3, 4)),
            extended: vec![(b"a".to_vec(), b"\xff".to_vec())],
        };
        for attributes in [full, Attributes::default(), Attributes { mode: Some(0o755), ..Default::default() }] {
            let mut writer = Writer::new(packet::ATTRS);
            attributes.encode(&mut writer);
            let bytes = writer.finish();
            assert_eq!(Attributes::decode(&mut Reader(&bytes[5..])), Ok(attributes));
        }
    }

    #[test]
    fn packets_come_whole_from_any_pieces() {
        let mut frames = Frames::default();
        let mut seen = Vec::new();
        for byte in Status::Ok.packet(1).into_iter().chain(Status::Failure.packet(2)) {
            frames.push(&[byte]);
            seen.extend(frames.next_packet().unwrap());
        }
        assert_eq!(seen.iter().map(|packet| packet[4]).collect::<Vec<_>>(), [1, 2]);
    }

    #[test]
    fn h41_bad_lengths_end_the_stream_without_allocation() {
        for length in [0u32, u32::MAX] {
            let mut frames = Frames::default();
            frames.push(&length.to_be_bytes());
            assert_eq!(frames.next_packet(), Err(FramingError(length)));
        }
    }
}
