//! File systems that are mounted in a source: where one of them is not mounted any more, the empty directory that it leaves is
//! nothing that a mirror is to follow. /proc/self/mountinfo says what is mounted; see proc_pid_mountinfo(5).

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use crate::path::RelPath;
use crate::root::{FileKind, Follow, Root};

/// Device and inode of a source.
type Identity = (u64, u64);

/// The mounts in one source.
#[derive(Debug)]
pub(super) struct Mounts {
    source: PathBuf,
    /// Keeps over a restart what was mounted.
    note: Option<PathBuf>,
    /// What was mounted in the source, and takes part.
    known: BTreeSet<RelPath>,
    /// What of it is not mounted, as far as that was told.
    told: BTreeSet<RelPath>,
    /// What was mounted when it was looked at last.
    seen: Option<BTreeSet<RelPath>>,
}

impl Mounts {
    /// With what the note says. It need not be there.
    pub(super) fn new(source: &Path, note: Option<PathBuf>) -> Mounts {
        let kept = note.as_ref().and_then(|note| std::fs::read(note).ok()).unwrap_or_default();
        let known = kept.split(|&byte| byte == 0).filter_map(|path| RelPath::new(path).ok()).collect();
        Mounts { source: source.to_owned(), note, known, told: BTreeSet::new(), seen: None }
    }

    /// What was mounted and is not, at this moment. Where the source itself is not the directory that is `followed`, all that it
    /// does not hold.
    pub(super) fn missing(&self, followed: Option<Identity>) -> BTreeSet<RelPath> {
        if self.known.is_empty() {
            return BTreeSet::new();
        }
        mounted_in(&self.source).map_or_else(BTreeSet::new, |mounted| self.missing_of(&mounted, followed))
    }

    fn missing_of(&self, mounted: &BTreeSet<RelPath>, followed: Option<Identity>) -> BTreeSet<RelPath> {
        let root = Root::open(&self.source).ok();
        let root =
            root.filter(|root| root.stat_root().is_ok_and(|found| Some((found.device, found.inode)) == followed));
        // Somebody who removes the directory says that it is not to come back.
        let is_there = |path: &RelPath| match &root {
            Some(root) => root.stat(path, Follow::Never).is_ok_and(|found| found.kind == FileKind::Directory),
            None => true,
        };
        self.known.iter().filter(|path| !mounted.contains(path) && is_there(path)).cloned().collect()
    }

    /// What is told to people.
    pub(super) fn told(&self) -> &BTreeSet<RelPath> {
        &self.told
    }

    /// Takes note of what is mounted now. True where that is not what it was, so that all is to be looked at.
    pub(super) fn review(&mut self, followed: Option<Identity>, takes_part: &mut dyn FnMut(&RelPath) -> bool) -> bool {
        let Some(mounted) = mounted_in(&self.source) else { return false };
        let missing = self.missing_of(&mounted, followed);
        let mut known: BTreeSet<RelPath> = mounted.iter().filter(|path| takes_part(path)).cloned().collect();
        // Of what lies in something that is missing nobody can say whether it is there.
        let hidden =
            |path: &&RelPath| missing.contains(*path) || path.ancestors().any(|above| missing.contains(&above));
        known.extend(self.known.iter().filter(hidden).cloned());
        if known != self.known {
            self.known = known;
            self.keep();
        }
        let source = crate::error::shown(&self.source).to_string();
        for path in missing.difference(&self.told) {
            tracing::warn!(
                source,
                "the file system that was mounted at '{path}' in it is not mounted: nothing there is sent, and nothing of it is \
                 removed at the targets; mount it, or remove the directory if it is not to come back"
            );
        }
        for path in self.told.difference(&missing).filter(|path| mounted.contains(path)) {
            tracing::info!(source, "'{path}' in it is mounted again");
        }
        self.told = missing;
        let before = self.seen.replace(mounted);
        before.is_some() && before != self.seen
    }

    fn keep(&self) {
        let Some(note) = &self.note else { return };
        let paths: Vec<&[u8]> = self.known.iter().map(RelPath::as_bytes).collect();
        let new = note.with_extension("new");
        let kept = match paths.is_empty() {
            true => std::fs::remove_file(note).or_else(|error| match error.kind() {
                std::io::ErrorKind::NotFound => Ok(()),
                _ => Err(error),
            }),
            false => std::fs::write(&new, paths.join(&0)).and_then(|()| std::fs::rename(&new, note)),
        };
        if let Err(error) = kept {
            tracing::warn!(
                "a restart would not know what is mounted in '{}': cannot write '{}': {}",
                crate::error::shown(&self.source),
                crate::error::shown(note),
                crate::error::in_words(&error)
            );
        }
    }
}

/// Where in `source` other file systems are mounted; `None` where that cannot be told.
fn mounted_in(source: &Path) -> Option<BTreeSet<RelPath>> {
    let source = std::fs::canonicalize(source).ok()?;
    let mounts = std::fs::read("/proc/self/mountinfo").ok()?;
    Some(within(&mounts, source.as_os_str().as_bytes()))
}

/// The mounts below `source`, without those of a part of the file system that they are mounted on: a service manager makes such
/// ones to let its service write there.
fn within(mounts: &[u8], source: &[u8]) -> BTreeSet<RelPath> {
    let lines = mounts.split(|&byte| byte == b'\n');
    // Its number, that of the mount above, its device, what of it is mounted, where.
    let fields = lines.filter_map(|line| {
        let mut fields = line.split(|&byte| byte == b' ');
        let (number, above, device) = (fields.next()?, fields.next()?, fields.next()?);
        Some((number, above, device, fields.nth(1)?))
    });
    let fields: Vec<_> = fields.collect();
    let devices: BTreeMap<&[u8], &[u8]> = fields.iter().map(|&(number, _, device, _)| (number, device)).collect();
    let others = fields.iter().filter(|(_, above, device, _)| devices.get(above) != Some(device));
    others
        .filter_map(|(.., at)| {
            let at = unescaped(at);
            let below = at.strip_prefix(source)?;
            let below = if source == b"/" { below } else { below.strip_prefix(b"/")? };
            RelPath::new(below).ok()
        })
        .collect()
}

/// Blank, tab, line feed and backslash stand there as `\` and three octal digits.
fn unescaped(text: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(text.len());
    let mut left = text;
    while let [first, rest @ ..] = left {
        let number = rest.get(..3).and_then(|digits| std::str::from_utf8(digits).ok());
        match number.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) if *first == b'\\' => {
                plain.push(byte);
                left = &rest[3..];
            }
            _ => {
                plain.push(*first);
                left = rest;
            }
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(paths: &[&str]) -> BTreeSet<RelPath> {
        paths.iter().map(|path| RelPath::new(path).unwrap()).collect()
    }

    #[test]
    fn what_is_mounted_in_a_source_is_known_by_name_and_a_part_of_its_own_file_system_is_none() {
        let mounts = b"22 1 8:1 / / rw - ext4 /dev/sda1 rw\n\
            30 22 8:2 / /data rw shared:1 - xfs /dev/sdb1 rw\n\
            31 30 8:3 / /data/a\\040b\\134c rw - xfs /dev/sdc1 rw\n\
            32 30 8:2 /in /data/in rw - xfs /dev/sdb1 rw\n\
            33 31 0:40 / /data/a\\040b\\134c/d rw - nfs host:/d rw\n\
            34 22 8:4 / /database rw - xfs /dev/sdd1 rw\n\
            nothing\n";
        assert_eq!(within(mounts, b"/data"), set(&["a b\\c", "a b\\c/d"]));
        assert_eq!(within(mounts, b"/"), set(&["data", "data/a b\\c", "data/a b\\c/d", "database"]));
        assert_eq!(within(mounts, b"/database"), set(&[]));
        assert_eq!(unescaped(b"\\04\\x\\0"), b"\\04\\x\\0");
    }

    #[test]
    fn what_was_mounted_is_kept_over_a_restart_until_its_directory_is_gone() {
        let at = tempfile::tempdir().unwrap();
        let (source, note) = (at.path().join("source"), at.path().join("note"));
        std::fs::create_dir_all(source.join("a/b")).unwrap();
        let followed = Root::open(&source).unwrap().stat_root().map(|found| (found.device, found.inode)).ok();
        let mut mounts = Mounts::new(&source, Some(note.clone()));
        assert!(mounts.missing(followed).is_empty());
        mounts.known = set(&["a", "a/b", "gone"]);
        mounts.keep();
        let mut mounts = Mounts::new(&source, Some(note.clone()));
        assert_eq!(mounts.missing(followed), set(&["a", "a/b"]));
        // Another directory lies in its place: nothing can be said of what was there.
        assert_eq!(mounts.missing(Some((0, 0))), set(&["a", "a/b", "gone"]));
        std::fs::remove_dir(source.join("a/b")).unwrap();
        assert!(!mounts.review(followed, &mut |_| true), "it is the first look");
        assert_eq!((mounts.told(), &mounts.known), (&set(&["a"]), &set(&["a", "a/b"])));
        std::fs::remove_dir(source.join("a")).unwrap();
        mounts.review(followed, &mut |_| true);
        assert!(mounts.told().is_empty() && mounts.known.is_empty() && !note.exists());
    }
}
