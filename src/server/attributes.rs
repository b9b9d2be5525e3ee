//! Attributes as SFTP has them, from what a file is, and the lines of a listing.

use crate::root::{FileKind, Metadata};
use crate::wire::sftp::Attributes;

fn seconds(seconds: i64) -> u32 {
    u32::try_from(seconds.max(0)).unwrap_or(u32::MAX)
}

fn type_bits(kind: FileKind) -> (u32, char) {
    match kind {
        FileKind::Regular => (0o100_000, '-'),
        FileKind::Directory => (0o040_000, 'd'),
        FileKind::Symlink => (0o120_000, 'l'),
        FileKind::Fifo => (0o010_000, 'p'),
        FileKind::Socket => (0o140_000, 's'),
        FileKind::CharacterDevice => (0o020_000, 'c'),
        FileKind::BlockDevice => (0o060_000, 'b'),
        FileKind::Other => (0, '?'),
    }
}

/// All of SFTP's attributes. The time of access is not kept: that of modification stands for it.
pub fn of(file: &Metadata) -> Attributes {
    let time = seconds(file.mtime.seconds);
    Attributes {
        size: Some(file.size),
        owner: Some((file.uid, file.gid)),
        mode: Some(type_bits(file.kind).0 | file.mode),
        times: Some((time, time)),
        extended: Vec::new(),
    }
}

/// A line as `ls -ln` prints it.
pub fn long_name(name: &[u8], file: &Metadata) -> Vec<u8> {
    let mut line = String::from(type_bits(file.kind).1);
    for (at, letter) in "rwxrwxrwx".chars().enumerate() {
        line.push(if file.mode & (0o400 >> at) != 0 { letter } else { '-' });
    }
    let date = date(file.mtime.seconds);
    line += &format!(" {:4} {:<8} {:<8} {:8} {date} ", file.links, file.uid, file.gid, file.size);
    [line.as_bytes(), name].concat()
}

/// `Nov 24  2026` in UTC, by the days of the civil calendar.
fn date(seconds: i64) -> String {
    let days = seconds.div_euclid(86_400) + 719_468;
    let era = days.div_euclid(146_097);
    let of_era = days.rem_euclid(146_097);
    let year = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month + 2) / 5 + 1;
    let names = ["Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec", "Jan", "Feb"];
    let name = names[usize::try_from(month).unwrap_or(0) % 12];
    format!("{name} {day:2}  {}", year + era * 400 + i64::from(month >= 10))
}

#[cfg(test)]
mod tests {
    #[test]
    fn dates() {
        for (seconds, text) in [(0, "Jan  1  1970"), (1_795_478_400, "Nov 24  2026"), (951_782_400, "Feb 29  2000")] {
            assert_eq!(super::date(seconds), text);
        }
    }
}
