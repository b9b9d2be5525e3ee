//! What a path is.

use std::os::fd::BorrowedFd;

use rustix::fs::{self, AtFlags, Statx, StatxFlags};

use crate::manifest::Timestamp;

/// The kinds of files that Linux has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum FileKind {
    Regular,
    Directory,
    Symlink,
    Fifo,
    Socket,
    CharacterDevice,
    BlockDevice,
    Other,
}

impl FileKind {
    /// For messages: `FIFO`, `socket`.
    pub fn name(self) -> &'static str {
        match self {
            FileKind::Regular => "regular file",
            FileKind::Directory => "directory",
            FileKind::Symlink => "symbolic link",
            FileKind::Fifo => "FIFO",
            FileKind::Socket => "socket",
            FileKind::CharacterDevice => "character device",
            FileKind::BlockDevice => "block device",
            FileKind::Other => "file of an unknown kind",
        }
    }
}

/// What statx(2) tells, as far as it is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Metadata {
    /// What it is.
    pub kind: FileKind,
    /// Bytes.
    pub size: u64,
    /// Time of last access.
    pub atime: Timestamp,
    /// Time of last modification.
    pub mtime: Timestamp,
    /// Time of last change of the inode; nobody can set it.
    pub ctime: Timestamp,
    /// Permission and special bits, 0 to 0o7777.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Device, major and minor number in one.
    pub device: u64,
    /// Inode number.
    pub inode: u64,
    /// Number of names.
    pub links: u32,
    /// Bytes that are allocated; less than `size` where there are holes.
    pub allocated: u64,
}

impl Metadata {
    /// Whether both are of the same file, and nothing about its content can have changed between them.
    pub fn same_content(&self, other: &Metadata) -> bool {
        Fingerprint::from(self) == Fingerprint::from(other)
    }
}

/// Which content a file has: as long as none of it is another, nothing about the content can have changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Fingerprint {
    /// Device, major and minor number in one.
    pub device: u64,
    /// Inode number.
    pub inode: u64,
    /// Bytes.
    pub size: u64,
    /// Time of last modification.
    pub mtime: Timestamp,
    /// Time of last change of the inode; nobody can set it.
    pub ctime: Timestamp,
}

impl From<&Metadata> for Fingerprint {
    fn from(metadata: &Metadata) -> Fingerprint {
        let Metadata { device, inode, size, mtime, ctime, .. } = *metadata;
        Fingerprint { device, inode, size, mtime, ctime }
    }
}

/// What a list of millions of files keeps of what statx(2) told, beside what an entry says: 36 bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C, packed(4))]
pub struct Seen {
    /// Device, major and minor number in one.
    pub device: u64,
    /// Inode number.
    pub inode: u64,
    /// Time of last change of the inode.
    pub ctime: Timestamp,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

impl Seen {
    /// The rest of what was told.
    pub fn of(metadata: &Metadata) -> Seen {
        let Metadata { device, inode, ctime, uid, gid, .. } = *metadata;
        Seen { device, inode, ctime, uid, gid }
    }

    /// The content of a file that was of this size, and was changed last then.
    pub fn fingerprint(&self, size: u64, mtime: Timestamp) -> Fingerprint {
        Fingerprint { device: self.device, inode: self.inode, size, mtime, ctime: self.ctime }
    }
}

const WANTED: StatxFlags = StatxFlags::BASIC_STATS;

pub(super) fn stat_at(directory: BorrowedFd<'_>, name: &[u8]) -> rustix::io::Result<Metadata> {
    fs::statx(directory, name, AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT, WANTED).map(from_statx)
}

pub(super) fn stat_descriptor(descriptor: BorrowedFd<'_>) -> rustix::io::Result<Metadata> {
    fs::statx(descriptor, "", AtFlags::EMPTY_PATH, WANTED).map(from_statx)
}

impl Metadata {
    /// What an open file is.
    ///
    /// # Errors
    /// As fstat(2).
    pub fn of(file: &impl std::os::fd::AsFd) -> std::io::Result<Metadata> {
        Ok(stat_descriptor(file.as_fd())?)
    }

    /// What `name` in the open directory `directory` is. `name` is one component; a link is not followed.
    ///
    /// # Errors
    /// As statx(2).
    pub fn at(directory: &impl std::os::fd::AsFd, name: &[u8]) -> std::io::Result<Metadata> {
        Ok(stat_at(directory.as_fd(), name)?)
    }
}

fn from_statx(stat: Statx) -> Metadata {
    use rustix::fs::FileType;
    let kind = match FileType::from_raw_mode(stat.stx_mode.into()) {
        FileType::RegularFile => FileKind::Regular,
        FileType::Directory => FileKind::Directory,
        FileType::Symlink => FileKind::Symlink,
        FileType::Fifo => FileKind::Fifo,
        FileType::Socket => FileKind::Socket,
        FileType::CharacterDevice => FileKind::CharacterDevice,
        FileType::BlockDevice => FileKind::BlockDevice,
        _ => FileKind::Other,
    };
    let time = |time: rustix::fs::StatxTimestamp| Timestamp { seconds: time.tv_sec, nanoseconds: time.tv_nsec };
    Metadata {
        kind,
        size: stat.stx_size,
        atime: time(stat.stx_atime),
        mtime: time(stat.stx_mtime),
        ctime: time(stat.stx_ctime),
        mode: u32::from(stat.stx_mode) & 0o7777,
        uid: stat.stx_uid,
        gid: stat.stx_gid,
        device: u64::from(stat.stx_dev_major) << 32 | u64::from(stat.stx_dev_minor),
        inode: stat.stx_ino,
        links: stat.stx_nlink,
        allocated: stat.stx_blocks.saturating_mul(512),
    }
}
