//! SFTP version 3 (draft-ietf-secsh-filexfer-02): packet types, attributes, status codes and framing. Paths and
//! handles are bytes.

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
/// The most data in one READ or WRITE, as OpenSSH has it: clients take its limits for those of the protocol.
pub const DATA_MAX: usize = PACKET_LIMIT - 1024;
/// The largest packet that clients are told of.
pub const PACKET_LIMIT: usize = 256 << 10;
/// The largest ordinary packet that is taken: clients that count 256 KiB of data without the header are let be.
pub const PACKET_MAX: usize = PACKET_LIMIT + 1024;
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
        self.packet_saying(id, self.text())
    }

    /// The same, with a reason for people.
    pub fn packet_saying(self, id: u32, text: &str) -> Vec<u8> {
        Writer::new(packet::STATUS).u32(id).u32(self as u32).string(text.as_bytes()).string(b"").finish()
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
    /// The length, its type and then the rest of a packet, as far as it is here.
    held: Vec<u8>,
}

const HEAD: usize = 5;

impl Frames {
    /// Takes bytes from the front of `bytes`, and gives the next whole packet without its length. A bad length is
    /// refused before anything is held for it; what is held is never more than one packet.
    ///
    /// # Errors
    /// [`FramingError`]: the stream is out of step for good.
    pub fn take(&mut self, bytes: &mut &[u8]) -> Result<Option<Packet>, FramingError> {
        while self.held.len() < HEAD {
            let Some((first, rest)) = bytes.split_first() else { return Ok(None) };
            *bytes = rest;
            self.held.push(*first);
            let length = self.length();
            let most = if self.held.get(4).is_none_or(|kind| *kind == packet::EXTENDED) {
                AGENT_PACKET_MAX
            } else {
                PACKET_MAX
            };
            if self.held.len() >= 4 && (length == 0 || length > most) {
                return Err(FramingError(u32::try_from(length).unwrap_or(u32::MAX)));
            }
        }
        let whole = 4 + self.length();
        let (head, rest) = bytes.split_at((whole - self.held.len()).min(bytes.len()));
        self.held.reserve_exact(whole - self.held.len());
        self.held.extend_from_slice(head);
        *bytes = rest;
        Ok((self.held.len() == whole).then(|| Packet(std::mem::take(&mut self.held))))
    }

    fn length(&self) -> usize {
        Reader(&self.held).u32().map_or(0, |length| length as usize)
    }
}

/// One whole packet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Packet(Vec<u8>);

impl Packet {
    /// What follows the length: type and fields. Not empty.
    pub fn body(&self) -> &[u8] {
        &self.0[4..]
    }

    /// All of it, and where what follows type and number begins.
    pub fn into_parts(self) -> (Vec<u8>, usize) {
        (self.0, 4 + 1 + 4)
    }

    /// The last `count` bytes.
    pub fn tail(&self, count: usize) -> &[u8] {
        &self.0[self.0.len().saturating_sub(count)..]
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
            seen.extend(frames.take(&mut &[byte][..]).unwrap());
        }
        let mut both = &[Status::Ok.packet(1), Status::Failure.packet(2)].concat()[..];
        while let Some(packet) = frames.take(&mut both).unwrap() {
            seen.push(packet);
        }
        assert_eq!(seen[..2], seen[2..]);
        assert_eq!(seen[..2].iter().map(|packet| packet.body()[4]).collect::<Vec<_>>(), [1, 2]);
    }

    #[test]
    fn h41_bad_lengths_end_the_stream_without_allocation() {
        for length in [0u32, u32::MAX, 1 << 31, AGENT_PACKET_MAX as u32 + 1] {
            let mut frames = Frames::default();
            assert_eq!(frames.take(&mut &length.to_be_bytes()[..]), Err(FramingError(length)));
            assert!(frames.held.capacity() < 64);
        }
        let ordinary = [&(PACKET_MAX as u32 + 1).to_be_bytes()[..], &[packet::WRITE]].concat();
        assert!(Frames::default().take(&mut &ordinary[..]).is_err());
    }
}
