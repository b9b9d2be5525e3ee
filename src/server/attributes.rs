//! Attributes as SFTP has them, from what a file is, and the lines of a listing.

use chrono::{DateTime, Local, Utc};

use crate::root::{FileKind, Metadata};
use crate::scan::names::Names;
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

/// All of SFTP's attributes.
pub fn of(file: &Metadata) -> Attributes {
    Attributes {
        size: Some(file.size),
        owner: Some((file.uid, file.gid)),
        mode: Some(type_bits(file.kind).0 | file.mode),
        times: Some((seconds(file.atime.seconds), seconds(file.mtime.seconds))),
        extended: Vec::new(),
    }
}

/// A line as `ls -l` prints it, to the columns of OpenSSH's server: some clients take it apart.
pub fn long_name(name: &[u8], file: &Metadata, names: &mut Names) -> Vec<u8> {
    let (user, group) = (names.user(file.uid), names.group(file.gid));
    let date = date(file.mtime.seconds, Utc::now());
    let line = format!("{}  {:>3} {user:<8} {group:<8} {:>8} {date} ", letters(file), file.links, file.size);
    [line.as_bytes(), name].concat()
}

/// `drwxr-sr-t`.
fn letters(file: &Metadata) -> String {
    let mut letters: Vec<char> =
        (0..9).map(|at| if file.mode & (0o400 >> at) != 0 { ['r', 'w', 'x'][at % 3] } else { '-' }).collect();
    for (bit, at, both) in [(0o4000, 2, 's'), (0o2000, 5, 's'), (0o1000, 8, 't')] {
        if file.mode & bit != 0 {
            letters[at] = if letters[at] == 'x' { both } else { both.to_ascii_uppercase() };
        }
    }
    std::iter::once(type_bits(file.kind).1).chain(letters).collect()
}

/// The local time of day for the last half year, the year for what is older.
fn date(seconds: i64, now: DateTime<Utc>) -> String {
    let Some(time) = DateTime::from_timestamp(seconds, 0) else { return seconds.to_string() };
    let recent = now.timestamp() - 365 * 24 * 3600 / 2 < seconds;
    time.with_timezone(&Local).format(if recent { "%b %e %H:%M" } else { "%b %e  %Y" }).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_letters_are_those_of_ls() {
        let at = tempfile::tempdir().unwrap();
        let file = std::fs::File::open(at.path()).unwrap();
        let found = Metadata::of(&file).unwrap();
        for (mode, shown) in [
            (0o0755, "drwxr-xr-x"),
            (0o7777, "drwsrwsrwt"),
            (0o7000, "d--S--S--T"),
            (0o1774, "drwxrwxr-T"),
            (0o2750, "drwxr-s---"),
        ] {
            assert_eq!(letters(&Metadata { mode, ..found }), shown);
        }
    }

    #[test]
    fn what_is_older_than_half_a_year_shows_its_year() {
        let now = DateTime::from_timestamp(1_795_500_000, 0).unwrap();
        assert!(date(951_782_400 + 43_200, now).ends_with("  2000"));
        assert!(date(1_795_400_000, now).contains(':'));
    }
}
