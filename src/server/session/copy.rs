//! `copy-data`: from one open file to another, in the kernel where it can.

use std::fs::File;
use std::io::{self, Write as _};
use std::os::unix::fs::FileExt as _;

use rustix::io::Errno;

use super::{Failed, Status};

/// In one system call.
const STEP: u64 = 1 << 30;
const BUFFER: usize = 256 << 10;

/// Copies `length` bytes, or all there are when it is 0.
///
/// # Errors
/// End of file when there are fewer, as OpenSSH's server has it; what was there is copied.
pub(super) fn copy(from: &File, at: u64, to: &File, to_at: u64, length: u64, append: bool) -> Result<(), Failed> {
    let most = if length == 0 { u64::MAX } else { length };
    let mut copied = 0;
    while copied < most {
        let step = (most - copied).min(STEP);
        let source = at.checked_add(copied).ok_or(Errno::INVAL)?;
        let target = to_at.checked_add(copied).ok_or(Errno::INVAL)?;
        let count = match in_kernel(from, source, to, target, step, append) {
            Ok(count) => count,
            // Another file system, one that cannot, or a file that is appended to.
            Err(Errno::XDEV | Errno::NOSYS | Errno::OPNOTSUPP | Errno::BADF | Errno::INVAL | Errno::PERM) => {
                by_hand(from, source, to, target, step, append)?
            }
            Err(errno) => return Err(errno.into()),
        };
        if count == 0 {
            return if length == 0 { Ok(()) } else { Err(Status::EndOfFile.into()) };
        }
        copied += count;
    }
    Ok(())
}

fn in_kernel(from: &File, mut at: u64, to: &File, mut to_at: u64, step: u64, append: bool) -> Result<u64, Errno> {
    if append {
        return Err(Errno::BADF);
    }
    let step = usize::try_from(step).map_err(|_| Errno::INVAL)?;
    rustix::fs::copy_file_range(from, Some(&mut at), to, Some(&mut to_at), step).map(|count| count as u64)
}

fn by_hand(from: &File, at: u64, mut to: &File, to_at: u64, step: u64, append: bool) -> io::Result<u64> {
    let mut buffer = vec![0; BUFFER.min(usize::try_from(step).unwrap_or(BUFFER))];
    let count = from.read_at(&mut buffer, at)?;
    if append {
        to.write_all(&buffer[..count])?
    } else {
        to.write_all_at(&buffer[..count], to_at)?
    }
    Ok(count as u64)
}
