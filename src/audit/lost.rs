//! How many lines could not be written. It is kept beside the log, so that whoever writes the next line says so, also when the
//! session that lost them has ended.
//!
//! Whoever holds the log's lock reads and writes it. The file has one length and is made before it is needed: on a full disk it
//! is written over.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;

use rustix::fs::OFlags;

use super::log::hand_over;
use super::{AuditError, LOST, shown};
use crate::path::RelPath;
use crate::root::{Follow, Root};

/// As many digits as there can be, and the end of the line.
const LENGTH: usize = 21;

fn open(root: &Root, flags: OFlags) -> Result<File, AuditError> {
    let mode = if flags.contains(OFlags::CREATE) { 0o600 } else { 0 };
    Ok(root.open_with(&RelPath::new(LOST)?, Follow::Never, flags | OFlags::RDWR | OFlags::NONBLOCK, mode)?)
}

fn failed(root: &Root) -> impl Fn(io::Error) -> AuditError + '_ {
    |source| AuditError::Io { path: shown(root, LOST), source }
}

/// Makes the file, for whom `log` belongs to; where that is not allowed there is none.
pub(super) fn prepare(root: &Root, log: &File) -> Result<(), AuditError> {
    match open(root, OFlags::CREATE | OFlags::EXCL) {
        Ok(file) if hand_over(&file, log).map_err(failed(root))? => write(root, &file, 0),
        Ok(_) => Ok(root.unlink(&RelPath::new(LOST)?)?),
        Err(AuditError::Root(error)) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(error),
    }
}

/// How many there are; what is no number is none.
pub(super) fn count(root: &Root) -> Result<u64, AuditError> {
    let file = match open(root, OFlags::empty()) {
        Err(AuditError::Root(error)) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
        opened => opened?,
    };
    let mut text = [0; LENGTH];
    let read = file.read_at(&mut text, 0).map_err(failed(root))?;
    Ok(std::str::from_utf8(&text[..read]).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0))
}

/// Of a file that is there, or is made now.
pub(super) fn set(root: &Root, count: u64) -> Result<(), AuditError> {
    write(root, &open(root, OFlags::CREATE)?, count)
}

fn write(root: &Root, file: &File, count: u64) -> Result<(), AuditError> {
    let text = format!("{count:<width$}\n", width = LENGTH - 1);
    file.write_all_at(text.as_bytes(), 0).and_then(|()| file.sync_data()).map_err(failed(root))
}
