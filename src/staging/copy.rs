//! From one open file to another, in the kernel where it can; a file system that shares blocks between files does so. Holes stay holes:
//! what somebody has said in a few bytes is not written out.

use std::fs::File;
use std::io::{self, Write as _};
use std::os::unix::fs::FileExt as _;

use rustix::fs::{FallocateFlags, SeekFrom, fallocate, seek};
use rustix::io::Errno;

/// In one system call.
const STEP: u64 = 64 << 20;
const BUFFER: usize = 256 << 10;

/// Whether its file system makes a copy of a file by sharing its blocks, or by a server far away that has both: then it costs less than to
/// write it.
pub(super) fn shares_blocks(file: &File) -> bool {
    // XFS, Btrfs, bcachefs, OCFS2, NFS and SMB; see statfs(2).
    const SHARING: [u64; 6] = [0x5846_5342, 0x9123_683e, 0xca45_1a4e, 0x7461_636f, 0x6969, 0xff53_4d42];
    rustix::fs::fstatfs(file).is_ok_and(|found| SHARING.contains(&(found.f_type as u64 & 0xffff_ffff)))
}

/// What lies at a place of a file.
enum Found {
    Data(u64),
    Hole(u64),
    End,
}

/// Copies at most `length` bytes, until `stop`; how many there were.
///
/// # Errors
/// What the file system says; [`Errno::CANCELED`] where it was stopped.
pub fn copy_range(
    (from, at): (&File, u64),
    (to, to_at, append): (&File, u64, bool),
    length: u64,
    stop: &dyn Fn() -> bool,
) -> io::Result<u64> {
    let mut copied = 0;
    while copied < length {
        if stop() {
            return Err(Errno::CANCELED.into());
        }
        let source = at.checked_add(copied).ok_or(Errno::INVAL)?;
        let target = to_at.checked_add(copied).ok_or(Errno::INVAL)?;
        let count = match look(from, source, length - copied)? {
            Found::Hole(length) => {
                skip(to, target, length, append)?;
                length
            }
            Found::Data(length) => {
                let step = length.min(STEP);
                match in_kernel(from, source, to, target, step, append) {
                    Ok(count) => count,
                    // Another file system, one that cannot, or a file that is appended to.
                    Err(Errno::XDEV | Errno::NOSYS | Errno::OPNOTSUPP | Errno::BADF | Errno::INVAL | Errno::PERM) => {
                        by_hand(from, source, to, target, step, append)?
                    }
                    Err(errno) => return Err(errno.into()),
                }
            }
            Found::End => 0,
        };
        if count == 0 {
            break;
        }
        copied += count;
    }
    Ok(copied)
}

/// What lies at `at`, and for how long: at most `most`. A file system that tells of no holes has none.
fn look(from: &File, at: u64, most: u64) -> Result<Found, Errno> {
    let found = rustix::fs::fstat(from)?;
    let size = found.st_size.cast_unsigned();
    let left = size.saturating_sub(at).min(most);
    if left == 0 {
        return Ok(Found::End);
    }
    // Where a hole is, is asked only of a file that has some: a tmpfs looks at each page up to the next.
    if found.st_blocks.cast_unsigned().saturating_mul(512) >= size {
        return Ok(Found::Data(left));
    }
    let data = match seek(from, SeekFrom::Data(at)) {
        Ok(data) => data,
        // No data up to the end.
        Err(Errno::NXIO) => return Ok(Found::Hole(left)),
        Err(_) => at,
    };
    if data > at {
        return Ok(Found::Hole(left.min(data - at)));
    }
    let end = seek(from, SeekFrom::Hole(at)).unwrap_or(size);
    // It was cut between the two looks.
    Ok(if end > at { Found::Data(left.min(end - at)) } else { Found::End })
}

/// Makes zeros of what is at the target.
fn skip(to: &File, to_at: u64, length: u64, append: bool) -> io::Result<()> {
    let size = rustix::fs::fstat(to)?.st_size.cast_unsigned();
    let at = if append { size } else { to_at };
    let end = at.checked_add(length).ok_or(Errno::FBIG)?;
    if at < size {
        let there = end.min(size) - at;
        match fallocate(to, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, at, there) {
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => zero(to, at, there)?,
            punched => punched?,
        }
    }
    if end > size {
        rustix::fs::ftruncate(to, end)?;
    }
    Ok(())
}

fn zero(to: &File, mut at: u64, mut length: u64) -> io::Result<()> {
    let zeros = vec![0; BUFFER];
    while length > 0 {
        let step = length.min(BUFFER as u64);
        to.write_all_at(&zeros[..step as usize], at)?;
        (at, length) = (at + step, length - step);
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt as _;

    const MIB: u64 = 1 << 20;

    fn file(at: &tempfile::TempDir, name: &str, parts: &[(u64, &[u8])], size: u64) -> File {
        let file =
            File::options().read(true).write(true).create(true).truncate(true).open(at.path().join(name)).unwrap();
        parts.iter().for_each(|(offset, data)| file.write_all_at(data, *offset).unwrap());
        file.set_len(size).unwrap();
        file
    }

    #[test]
    fn holes_stay_holes_and_what_lay_there_is_gone() {
        let at = tempfile::tempdir().unwrap();
        let from = file(&at, "from", &[(0, &[1; 5000]), (600 * MIB, &[2; 70_000])], 900 * MIB);
        for append in [false, true] {
            let to = file(&at, "to", &[(0, &vec![9; 3 << 20])], 3 * MIB);
            let to = if append { File::options().append(true).open(at.path().join("to")).unwrap() } else { to };
            let start = if append { 3 * MIB } else { 10 };
            assert_eq!(copy_range((&from, 0), (&to, 10, append), u64::MAX, &|| false).unwrap(), 900 * MIB);
            let made = File::open(at.path().join("to")).unwrap();
            let found = made.metadata().unwrap();
            assert_eq!(found.len(), start + 900 * MIB, "{append}");
            assert!(found.blocks() * 512 < 4 * MIB, "{append}: {} blocks", found.blocks());
            let read = |offset: u64, length: usize| {
                let mut data = vec![7; length];
                made.read_exact_at(&mut data, offset).unwrap();
                data
            };
            assert_eq!(read(0, 10), [9; 10]);
            assert_eq!(read(start, 5001), [&[1; 5000][..], &[0]].concat());
            assert!(read(start + 5000, 4 << 20).iter().all(|&byte| byte == 0), "{append}");
            assert_eq!(read(start + 600 * MIB - 1, 70_002), [&[0][..], &[2; 70_000], &[0]].concat());
        }
    }

    #[test]
    fn a_part_ends_where_it_was_asked_to_and_is_short_where_there_is_less() {
        let at = tempfile::tempdir().unwrap();
        let from = file(&at, "from", &[(MIB, &[1; 100])], 2 * MIB);
        let to = file(&at, "to", &[], 0);
        assert_eq!(copy_range((&from, MIB - 50), (&to, 0, false), 100, &|| false).unwrap(), 100);
        assert_eq!(std::fs::read(at.path().join("to")).unwrap(), [[0; 50], [1; 50]].concat());
        assert_eq!(copy_range((&from, 2 * MIB - 5), (&to, 0, false), 6, &|| false).unwrap(), 5);
        assert_eq!(copy_range((&from, 9 * MIB), (&to, 0, false), 9, &|| false).unwrap(), 0);
        assert_eq!(to.metadata().unwrap().len(), 100);
    }

    #[test]
    fn nothing_is_copied_that_is_not_wanted_any_more() {
        let at = tempfile::tempdir().unwrap();
        let (from, to) = (file(&at, "from", &[(0, &[1; 100])], 100), file(&at, "to", &[], 0));
        assert!(copy_range((&from, 0), (&to, 0, false), 100, &|| true).is_err());
        assert_eq!(to.metadata().unwrap().len(), 0);
    }
}
