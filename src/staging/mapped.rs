//! Which files somebody may be writing to through a mapping.
//!
//! A store to a page that is dirty already moves no time. The first store through a new mapping does, also to a page that is dirty. So
//! of a file that is mapped by nobody at one moment, whatever is written to it after that shows in its times.

use std::collections::HashSet;
use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use crate::root::Metadata;

/// The inode of the first namespace of processes: `PROC_PID_INIT_INO` of `linux/proc_ns.h`.
const ALL_PROCESSES: u64 = 0xefff_fffc;
/// File systems of which mappings tell the number that stat(2) tells: ext4 and XFS, by `linux/magic.h`.
const TELLING: [u32; 2] = [0xef53, 0x5846_5342];

/// Files that are mapped and shared, when it was looked.
#[derive(Debug)]
pub struct Mapped {
    /// By their inodes alone: more is taken for mapped than is.
    inodes: HashSet<u64>,
    /// Every process was looked at; else, as good as always, those of this user.
    complete: bool,
    /// What was not seen may be anything.
    blind: bool,
    user: u32,
}

impl Mapped {
    /// Looks at all processes that can be looked at.
    pub fn look() -> Mapped {
        let user = rustix::process::geteuid().as_raw();
        let mut mapped = Mapped { inodes: HashSet::new(), complete: true, blind: false, user };
        let sees_all = std::fs::metadata("/proc/self/ns/pid").is_ok_and(|found| found.ino() == ALL_PROCESSES);
        match processes() {
            Ok(processes) if sees_all => processes.for_each(|process| mapped.look_at(&process)),
            _ => mapped.blind = true,
        }
        mapped
    }

    fn look_at(&mut self, process: &Path) {
        match std::fs::read(process.join("maps")) {
            Ok(maps) => self.inodes.extend(maps.split(|&byte| byte == b'\n').filter_map(shared)),
            Err(error) if error.kind() == ErrorKind::PermissionDenied => self.complete = false,
            // ESRCH: it has ended.
            Err(_) => {}
        }
    }

    /// Whether nobody had it mapped.
    ///
    /// RACE: where not every process can be looked at, that is believed of a file of this user's that no other may write. Root's
    /// processes may have it mapped all the same, and those of this user that guard themselves, as agents for keys do.
    pub fn rules_out(&self, file: &File, found: &Metadata) -> bool {
        let only_own = found.uid == self.user && found.mode & 0o022 == 0;
        !self.blind
            && (self.complete || only_own)
            && !self.inodes.contains(&found.inode)
            // The field's width is not the same everywhere; the numbers have 32 bits.
            && rustix::fs::fstatfs(file).is_ok_and(|found| TELLING.contains(&(found.f_type as u32)))
    }
}

/// The directories of all processes in `/proc`.
///
/// # Errors
/// When there is no `/proc`.
pub fn processes() -> std::io::Result<impl Iterator<Item = PathBuf>> {
    let entries = std::fs::read_dir("/proc")?.flatten();
    let is_process = |entry: &std::fs::DirEntry| entry.file_name().as_bytes().iter().all(u8::is_ascii_digit);
    Ok(entries.filter(is_process).map(|entry| entry.path()))
}

/// The inode of a line of proc(5)'s maps, where the mapping is shared.
fn shared(line: &[u8]) -> Option<u64> {
    let mut words = line.split(|&byte| byte == b' ').filter(|word| !word.is_empty());
    let (_, rights, _, _, inode) = (words.next()?, words.next()?, words.next()?, words.next()?, words.next()?);
    let inode = std::str::from_utf8(inode).ok()?.parse().ok()?;
    (rights.get(3) == Some(&b's') && inode != 0).then_some(inode)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shared_mappings_are_told_from_private_ones() {
        let line = b"7f1c2b400000-7f1c2b401000 rw-s 00000000 fe:00 5512071                    /tmp/a b (deleted)";
        assert_eq!(shared(line), Some(5_512_071));
        let private = String::from_utf8_lossy(line).replace("rw-s", "rw-p");
        assert_eq!(shared(private.as_bytes()), None);
        for odd in [&b""[..], b"7f1c-7f1d r--s", b"7f1c-7f1d r--s 0 00:00 0", b"7f1c-7f1d r--s 0 00:00 x"] {
            assert_eq!(shared(odd), None, "{}", String::from_utf8_lossy(odd));
        }
    }

    #[test]
    fn what_another_may_write_is_ruled_out_only_where_all_processes_are_seen() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        std::fs::write(&path, "x").unwrap();
        let file = File::open(&path).unwrap();
        let found = Metadata::of(&file).unwrap();
        let on_disk = TELLING.contains(&(rustix::fs::fstatfs(&file).unwrap().f_type as u32));
        let user = rustix::process::geteuid().as_raw();
        let sees = |complete, blind| Mapped { inodes: HashSet::new(), complete, blind, user };
        assert_eq!(sees(true, false).rules_out(&file, &found), on_disk);
        assert_eq!(sees(false, false).rules_out(&file, &Metadata { mode: 0o644, ..found }), on_disk);
        assert!(!sees(false, false).rules_out(&file, &Metadata { mode: 0o664, ..found }));
        assert!(!sees(false, false).rules_out(&file, &Metadata { uid: user + 1, ..found }));
        assert!(!sees(true, true).rules_out(&file, &found));
        let mapped = Mapped { inodes: HashSet::from([found.inode]), ..sees(true, false) };
        assert!(!mapped.rules_out(&file, &found));
    }
}
