//! Directories that are published whole: a unit that is there already is built anew in staging, and exchanged for the old
//! one in one step.
//!
//! What a run leaves as it is gets a further name there instead of a copy, whatever it is and whether the run's filter
//! lists it or not: nothing of the old directory is lost but what the run replaces or removes.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::io::ErrorKind;

use rustix::io::Errno;
use sha2::{Digest as _, Sha256};

use super::area::Area;
use super::metadata::apply_directory;
use super::target::{Run, State, io, rel, stage_failure};
use crate::access::Inode;
use crate::endpoint::{BLOCK_BYTES, Error};
use crate::manifest::{Content, Digest, Entry};
use crate::path::RelPath;
use crate::plan::Change;
use crate::root::{FileKind, Follow, Metadata, Root, RootError};
use crate::staging::{Permissions, StagedFile};

struct Unit<'a> {
    run: &'a Run,
    staging: &'a Root,
    state: &'a State,
    /// Paths that go.
    removed: HashSet<&'a RelPath>,
    /// Files that keep their content and get other permissions.
    changed: HashMap<&'a RelPath, &'a Entry>,
}

/// Builds the units in staging, and says which inodes they have.
pub(super) fn stage(
    run: &Run,
    staging: &Root,
    state: &State,
    units: &BTreeSet<RelPath>,
    delete: bool,
) -> Result<BTreeMap<RelPath, u64>, Error> {
    let mut inodes = BTreeMap::new();
    if units.is_empty() {
        return Ok(inodes);
    }
    let removals = state.plan.removals.iter().filter(|_| delete);
    let metadata_only = state.plan.actions.iter().filter(|action| action.change == Change::MetadataOnly);
    let entries = metadata_only.map(|action| &state.source.entries()[action.index as usize]);
    let unit = Unit {
        run,
        staging,
        state,
        removed: removals.map(|removal| &removal.path).collect(),
        changed: entries.filter(|entry| entry.file().is_some()).map(|entry| (&entry.path, entry)).collect(),
    };
    for path in units {
        unit.stage(path)?;
        let staged = staging.stat(&run.staged_path(path)?, Follow::Never).map_err(io)?;
        inodes.insert(path.clone(), staged.inode);
    }
    Ok(inodes)
}

impl Unit<'_> {
    fn stage(&self, unit: &RelPath) -> Result<(), Error> {
        make(self.staging, &self.run.staged_path(unit)?)?;
        let mut directories = vec![unit.clone()];
        let mut further_names = Vec::new();
        let mut at = 0;
        while at < directories.len() {
            let directory = directories[at].clone();
            at += 1;
            let descriptor = self.run.root.open_dir(Some(&directory), Follow::Never).map_err(io)?;
            for name in self.run.root.names_in(&descriptor, Some(&directory)).map_err(io)? {
                let path = directory.join(&name).map_err(|error| Error::Usage(error.to_string()))?;
                let found = Metadata::at(&descriptor, &name).map_err(|source| Error::Io {
                    operation: "look at",
                    path: crate::error::shown(&self.run.root.shown().join(path.as_path())).to_string(),
                    source,
                })?;
                if found.kind == FileKind::Directory {
                    if self.keeps_directory(&path)? {
                        directories.push(path);
                    }
                } else if self.keeps(&path)? {
                    let further = self.state.source.get(&path);
                    match further.map(|entry| &entry.content) {
                        Some(Content::HardLink { first }) => further_names.push((path, first.clone(), found)),
                        _ => self.carry(&path, &found)?,
                    }
                }
            }
        }
        for (path, first, found) in further_names {
            // The first name may have got a new inode: the others follow it.
            let staged_first = self.run.staged_path(&first)?;
            match self.staging.stat(&staged_first, Follow::Never) {
                Ok(_) => self.link(&self.below_root(&staged_first)?, &path).map_err(io)?,
                Err(_) => self.carry(&path, &found)?,
            }
        }
        directories.iter().rev().try_for_each(|directory| self.finish_directory(directory, unit))
    }

    /// Whether what the old directory holds is to be in the new one: not when it is removed, or replaced by something
    /// that is staged.
    fn keeps(&self, path: &RelPath) -> Result<bool, Error> {
        if self.removed.contains(path) {
            return Ok(false);
        }
        match self.staging.stat(&self.run.staged_path(path)?, Follow::Never) {
            Ok(_) => Ok(false),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(true),
            Err(error) => Err(io(error)),
        }
    }

    /// The same for a directory, which is made. One that is removed stays as long as it holds what nobody listed.
    fn keeps_directory(&self, path: &RelPath) -> Result<bool, Error> {
        let staged = self.run.staged_path(path)?;
        match self.staging.stat(&staged, Follow::Never) {
            Ok(found) => return Ok(found.kind == FileKind::Directory),
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(io(error)),
        }
        make(self.staging, &staged)?;
        Ok(true)
    }

    fn below_root(&self, staged: &RelPath) -> Result<RelPath, Error> {
        rel(Area::Run.in_root())?.join(staged.as_bytes()).map_err(|error| Error::Usage(error.to_string()))
    }

    fn link(&self, from: &RelPath, path: &RelPath) -> Result<(), RootError> {
        let to = self.run.staged_path(path).and_then(|staged| self.below_root(&staged));
        let to = to.map_err(|error| RootError {
            operation: "link",
            path: path.as_path().to_owned(),
            source: std::io::Error::other(error),
        })?;
        self.run.root.hard_link(from, &to)
    }

    /// Gives what stays a further name; a copy where its permissions change, or where links are not to be had.
    fn carry(&self, path: &RelPath, found: &Metadata) -> Result<(), Error> {
        if let Some(entry) = self.changed.get(path) {
            return self.copy(path, found, &self.run.permissions(entry)?);
        }
        match self.link(path, path) {
            Ok(()) => Ok(()),
            Err(error) if found.kind == FileKind::Regular && is_no_link(&error) => {
                self.copy(path, found, &as_it_is(&self.run.root, path, found)?)
            }
            Err(error) => Err(io(error)),
        }
    }

    fn copy(&self, path: &RelPath, found: &Metadata, wanted: &Permissions) -> Result<(), Error> {
        let shown = || crate::error::shown(&self.run.root.shown().join(path.as_path())).to_string();
        let failed = |source| Error::Io { operation: "copy", path: shown(), source };
        let staged = |error| stage_failure(&error, self.staging);
        let mut file = self.run.root.open_read(path, Follow::Never).map_err(io)?;
        if !Metadata::of(&file).map_err(failed)?.same_content(found) {
            return Err(failed(std::io::Error::other("it changed since it was compared; run again")));
        }
        let mut copy = StagedFile::create(self.staging, &self.run.staged_path(path)?, found.size).map_err(staged)?;
        let mut buffer = vec![0; BLOCK_BYTES];
        let (mut hash, mut at) = (Sha256::new(), 0);
        loop {
            let read = std::io::Read::read(&mut file, &mut buffer).map_err(failed)?;
            if read == 0 {
                break;
            }
            hash.update(&buffer[..read]);
            copy.write(at, &buffer[..read]).map_err(staged)?;
            at += read as u64;
        }
        // What was compared is what it has to be still.
        let known = self.state.target.get(path).and_then(Entry::file).and_then(|(_, digest)| digest);
        copy.finish(known.unwrap_or_else(|| Digest(hash.finalize().into())), wanted, false).map(drop).map_err(staged)
    }

    /// A directory that goes is removed when nothing is left in it; others get their permissions.
    fn finish_directory(&self, directory: &RelPath, unit: &RelPath) -> Result<(), Error> {
        let staged = self.run.staged_path(directory)?;
        if self.removed.contains(directory) {
            return match self.staging.rmdir(&staged) {
                Err(error) if error.errno() != Some(Errno::NOTEMPTY.raw_os_error()) => Err(io(error)),
                _ => Ok(()),
            };
        }
        let mut wanted = match self.state.source.get(directory) {
            Some(entry) => self.run.permissions(entry)?,
            None => {
                let found = self.run.root.stat(directory, Follow::Never).map_err(io)?;
                as_it_is(&self.run.root, directory, &found)?
            }
        };
        if directory == unit {
            // Without the right to write it could not be moved; it gets its own mode right after.
            wanted.mode |= 0o700;
        }
        apply_directory(self.staging, &staged, &wanted)
    }
}

fn make(staging: &Root, path: &RelPath) -> Result<(), Error> {
    staging.mkdir_all(path, 0o700).map_err(io)
}

/// A further name is refused for files of others (`fs.protected_hardlinks`), beyond so many, and by some file systems.
pub(super) fn is_no_link(error: &RootError) -> bool {
    let errno = error.errno().map(Errno::from_raw_os_error);
    matches!(errno, Some(Errno::PERM | Errno::MLINK | Errno::OPNOTSUPP | Errno::NOSYS | Errno::ACCESS))
}

/// The permissions that something has.
pub(super) fn as_it_is(root: &Root, path: &RelPath, found: &Metadata) -> Result<Permissions, Error> {
    let shown = || crate::error::shown(&root.shown().join(path.as_path())).to_string();
    let inode = Inode::open(root, Some(path)).map_err(io)?;
    let acls = inode.acls().map_err(|source| Error::Io { operation: "read the ACLs of", path: shown(), source })?;
    // Who may not give files away keeps what it has: naming the owner it has anyway would be refused.
    let other = found.uid != rustix::process::geteuid().as_raw() || found.gid != rustix::process::getegid().as_raw();
    let (uid, gid) = if other { (Some(found.uid), Some(found.gid)) } else { (None, None) };
    Ok(Permissions { mode: found.mode, uid, gid, acl: Some(acls), mtime: found.mtime })
}
