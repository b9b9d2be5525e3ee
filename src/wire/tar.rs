//! Members of a tar archive, as far as regular files need them: what carries many small files to a machine that has
//! nothing but tar(1).
//!
//! The format is GNU's (tar(5), "GNU tar archives"), which every tar on Linux reads: names are bytes of any length. Each
//! member is born with mode 0600; owner, mode and whatever else it is to have are given to it once it is proven.

/// Everything in an archive is padded to a multiple of this.
pub const RECORD: usize = 512;
/// Longer names stand in a member of their own.
const NAME_MAX: usize = 100;
/// Seconds since 1970 that eleven octal digits hold.
const TIME_MAX: u64 = 0o777_7777_7777;

/// Appends the header of a regular file of `size` bytes, which are to follow it, padded with [`pad`].
pub fn header(out: &mut Vec<u8>, name: &[u8], size: u64, modified_seconds: i64) {
    if name.len() > NAME_MAX {
        record(out, b"././@LongLink", name.len() as u64 + 1, 0, b'L');
        out.extend_from_slice(name);
        out.push(0);
        pad(out, name.len() as u64 + 1);
    }
    let seconds = u64::try_from(modified_seconds).unwrap_or(0).min(TIME_MAX);
    record(out, &name[..name.len().min(NAME_MAX)], size, seconds, b'0');
}

/// Appends what fills up the last record of `size` bytes.
pub fn pad(out: &mut Vec<u8>, size: u64) {
    let over = (size % RECORD as u64) as usize;
    if over > 0 {
        out.resize(out.len() + RECORD - over, 0);
    }
}

/// Appends the end of the archive.
pub fn end(out: &mut Vec<u8>) {
    out.resize(out.len() + 2 * RECORD, 0);
}

fn record(out: &mut Vec<u8>, name: &[u8], size: u64, seconds: u64, kind: u8) {
    let start = out.len();
    out.resize(start + RECORD, 0);
    let block = &mut out[start..];
    block[..name.len()].copy_from_slice(name);
    octal(&mut block[100..108], 0o600);
    octal(&mut block[108..116], 0);
    octal(&mut block[116..124], 0);
    octal(&mut block[124..136], size);
    octal(&mut block[136..148], seconds);
    // The sum is taken with blanks in its own place.
    block[148..156].fill(b' ');
    block[156] = kind;
    block[257..265].copy_from_slice(b"ustar  \0");
    let sum: u64 = block.iter().map(|&byte| u64::from(byte)).sum();
    octal(&mut block[148..155], sum);
}

/// Octal digits with a NUL behind them.
fn octal(field: &mut [u8], mut value: u64) {
    let digits = field.len() - 1;
    for digit in field[..digits].iter_mut().rev() {
        *digit = b'0' + (value & 7) as u8;
        value >>= 3;
    }
    field[digits] = 0;
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::os::unix::ffi::OsStrExt as _;
    use std::os::unix::fs::MetadataExt as _;
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn tar_unpacks_names_of_any_bytes_and_length() {
        let at = tempfile::tempdir().unwrap();
        let long = [b"d/".as_slice(), &[b'x'; 250]].concat();
        let hundred = [b'y'; 100];
        let hundred_and_one = [b'z'; 101];
        let names: [&[u8]; 8] =
            [b"a", b"-rf", b"sp ace\n\xff\\", b"$(touch x)", &hundred, &hundred_and_one, &long, b"e"];
        let mut archive = Vec::new();
        for (number, name) in names.iter().enumerate() {
            let content = vec![b'0' + number as u8; number * 300];
            header(&mut archive, name, content.len() as u64, 1_700_000_000 + number as i64);
            archive.extend_from_slice(&content);
            pad(&mut archive, content.len() as u64);
        }
        end(&mut archive);
        assert_eq!(archive.len() % RECORD, 0);
        let mut tar =
            Command::new("tar").args(["-xof", "-", "-C"]).arg(at.path()).stdin(Stdio::piped()).spawn().unwrap();
        tar.stdin.take().unwrap().write_all(&archive).unwrap();
        assert!(tar.wait().unwrap().success());
        for (number, name) in names.iter().enumerate() {
            let path = at.path().join(std::ffi::OsStr::from_bytes(name));
            assert_eq!(std::fs::read(&path).unwrap(), vec![b'0' + number as u8; number * 300], "{name:?}");
            let found = std::fs::symlink_metadata(&path).unwrap();
            assert_eq!((found.mode() & 0o7777, found.mtime()), (0o600, 1_700_000_000 + number as i64), "{name:?}");
        }
    }

    #[test]
    fn times_that_the_format_cannot_hold_are_brought_into_its_range() {
        for (time, digits) in [(-5, b"00000000000"), (i64::MAX, b"77777777777"), (8, b"00000000010")] {
            let mut out = Vec::new();
            header(&mut out, b"a", 0, time);
            assert_eq!(&out[136..147], digits, "{time}");
        }
    }
}
