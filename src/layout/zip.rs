//! The end of a zip file, as `torch.save` writes it: its directory comes last, so that a file that was cut off has none.
//!
//! The format is that of PKWARE's APPNOTE.TXT, 4.3.12 to 4.3.16. Nothing here reads a file, and nothing panics on any bytes.

/// What a zip file begins with.
pub const MAGIC: [u8; 4] = *b"PK\x03\x04";
/// What each entry of the directory begins with.
pub const ENTRY: [u8; 4] = *b"PK\x01\x02";
const END: &[u8] = b"PK\x05\x06";
const END_LENGTH: usize = 22;
const LOCATOR: &[u8] = b"PK\x06\x07";
const LOCATOR_LENGTH: usize = 20;
const END_64: &[u8] = b"PK\x06\x06";
const END_64_LENGTH: usize = 56;
/// So much of the end of a file holds all that is looked for: the longest comment, and the records before it.
pub const TAIL: u64 = (u16::MAX as usize + END_LENGTH + LOCATOR_LENGTH + END_64_LENGTH) as u64;

/// The directory of a zip file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Directory {
    /// Where it begins in the file.
    pub start: u64,
    /// Bytes before what it takes for the beginning of the archive; more than 0 where something was put in front.
    pub before: u64,
    /// Whether it has entries.
    pub entries: bool,
}

/// The directory, from the last bytes of a file (all of it, or at least [`TAIL`]) of `size` bytes.
///
/// # Errors
/// What is wrong, for people.
pub fn directory(tail: &[u8], size: u64) -> Result<Directory, String> {
    let missing = || "it is cut off: the directory that a zip file ends with is not there".to_owned();
    let begin = size.checked_sub(tail.len() as u64).ok_or_else(missing)?;
    let last = tail.len().checked_sub(END_LENGTH).ok_or_else(missing)?;
    // The comment behind the record ends with the file; a signature within a comment does not fit that.
    let at = (0..=last)
        .rev()
        .find(|&at| {
            tail[at..].starts_with(END)
                && number(tail, at + 20, 2).is_some_and(|comment| at as u64 + 22 + comment == tail.len() as u64)
        })
        .ok_or_else(missing)?;
    let field = |at: usize, length: usize| number(tail, at, length).ok_or_else(missing);
    let (mut entries, mut length, mut offset) = (field(at + 10, 2)?, field(at + 12, 4)?, field(at + 16, 4)?);
    let mut end = begin + at as u64;
    if entries == 0xffff || length == 0xffff_ffff || offset == 0xffff_ffff {
        let wrong = || "its directory is damaged: the record of large sizes is not where it must be".to_owned();
        let locator = at.checked_sub(LOCATOR_LENGTH).filter(|&at| tail[at..].starts_with(LOCATOR)).ok_or_else(wrong)?;
        // Where it says it is, or directly before the locator, where something was put in front of the archive.
        let said = field(locator + 8, 8)?.checked_sub(begin).and_then(|at| usize::try_from(at).ok());
        let record = said
            .into_iter()
            .chain(locator.checked_sub(END_64_LENGTH))
            .find(|&at| at <= locator && tail.get(at..).is_some_and(|rest| rest.starts_with(END_64)))
            .filter(|&at| at + END_64_LENGTH <= locator)
            .ok_or_else(wrong)?;
        (entries, length, offset) = (field(record + 32, 8)?, field(record + 40, 8)?, field(record + 48, 8)?);
        end = begin + record as u64;
    }
    let start = end.checked_sub(length).ok_or_else(|| format!("its directory would be {length} bytes long"))?;
    let before = start.checked_sub(offset).ok_or_else(|| {
        format!("its directory should begin at byte {offset}, and begins at {start}: bytes are missing")
    })?;
    Ok(Directory { start, before, entries: entries > 0 })
}

/// `length` bytes at `at`, little-endian.
fn number(bytes: &[u8], at: usize, length: usize) -> Option<u64> {
    let bytes = bytes.get(at..at.checked_add(length)?)?;
    Some(bytes.iter().rev().fold(0, |number, &byte| number << 8 | u64::from(byte)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn end(entries: u16, length: u32, offset: u32, comment: &[u8]) -> Vec<u8> {
        let mut bytes = [END, &[0; 4], &entries.to_le_bytes(), &entries.to_le_bytes()].concat();
        bytes.extend(length.to_le_bytes());
        bytes.extend(offset.to_le_bytes());
        bytes.extend((comment.len() as u16).to_le_bytes());
        bytes.extend(comment);
        bytes
    }

    fn large(length: u64, offset: u64, record: u64) -> Vec<u8> {
        let mut bytes = [END_64, &44_u64.to_le_bytes(), &[0; 12], &[1, 0, 0, 0, 0, 0, 0, 0]].concat();
        bytes.extend([1, 0, 0, 0, 0, 0, 0, 0]);
        bytes.extend(length.to_le_bytes());
        bytes.extend(offset.to_le_bytes());
        assert_eq!(bytes.len(), END_64_LENGTH);
        bytes.extend([LOCATOR, &[0; 4], &record.to_le_bytes(), &[1, 0, 0, 0]].concat());
        bytes.extend(end(0xffff, u32::MAX, u32::MAX, b""));
        bytes
    }

    #[test]
    fn the_directory_is_found_and_lies_in_the_file() {
        let whole = [vec![7; 30], end(1, 10, 20, b"PK\x05\x06 in a comment")].concat();
        let found = directory(&whole, whole.len() as u64);
        assert_eq!(found, Ok(Directory { start: 20, before: 0, entries: true }));
        let tail = &whole[25..];
        assert_eq!(directory(tail, whole.len() as u64), Ok(Directory { start: 20, before: 0, entries: true }));
        for cut in 0..whole.len() {
            assert!(directory(&whole[..cut], cut as u64).is_err(), "{cut}");
        }
        let moved = [vec![7; 30], end(1, 10, 15, b"")].concat();
        assert_eq!(directory(&moved, moved.len() as u64).unwrap().before, 5);
        for (length, offset) in [(31, 0), (10, 21), (u32::MAX - 1, 0)] {
            let bytes = [vec![7; 30], end(1, length, offset, b"")].concat();
            assert!(directory(&bytes, bytes.len() as u64).is_err(), "{length} {offset}");
        }
    }

    #[test]
    fn sizes_of_64_bits_are_followed_within_the_file() {
        let size = (5 << 32) + 178;
        let tail = [vec![7; 80], large(40, (5 << 32) + 40, (5 << 32) + 80)].concat();
        let found = directory(&tail, size);
        assert_eq!(found, Ok(Directory { start: (5 << 32) + 40, before: 0, entries: true }));
        for (length, offset, record) in [(u64::MAX, 0, 80), (40, u64::MAX, 80), (40, 41, 80)] {
            let tail = [vec![7; 80], large(length, offset, record)].concat();
            assert!(directory(&tail, tail.len() as u64).is_err(), "{length} {offset}");
        }
        let alone = end(1, u32::MAX, 0, b"");
        assert!(directory(&alone, 22).is_err());
    }
}
