//! The trash of a root: what a run removes or replaces is moved aside, on the same file system.
//!
//! What always holds: nothing is copied, and everything keeps its owner, mode and ACL; nobody but the owner of the root's
//! state gets at what lies here; each move is done again without harm.

use std::cell::RefCell;
use std::io::ErrorKind;
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::fs::RenameFlags;
use rustix::io::Errno;

use super::metadata::apply_directory;
use super::target::{io, rel};
use super::unit::{as_it_is, is_no_link};
use crate::endpoint::Error;
use crate::monitor::{Event, Monitor};
use crate::path::RelPath;
use crate::plan::trash::{TRASH, is_expired};
use crate::root::{FileKind, Follow, Metadata, Root, RootError};

/// The directory of one run.
pub(super) struct Trash<'a> {
    root: &'a Root,
    /// Below the root.
    directory: RelPath,
    /// A directory of it that is there: most paths share theirs with the one before.
    made: RefCell<Option<RelPath>>,
}

impl<'a> Trash<'a> {
    /// The directory of this name, which is made when something is moved into it.
    pub(super) fn new(root: &'a Root, name: &RelPath) -> Result<Trash<'a>, Error> {
        let directory = rel(TRASH)?.join(name.as_bytes()).map_err(|error| Error::Usage(error.to_string()))?;
        Ok(Trash { root, directory, made: RefCell::default() })
    }

    /// Where it is, where anything was moved into it.
    pub(super) fn used(&self) -> Option<&RelPath> {
        self.root.stat(&self.directory, Follow::Never).is_ok().then_some(&self.directory)
    }

    /// Where what has this path goes.
    pub(super) fn place(&self, path: &RelPath) -> Result<RelPath, Error> {
        let long =
            |error: crate::path::InvalidPath| Error::Refused { by: "the trash".into(), reason: error.to_string() };
        self.directory.join(path.as_bytes()).map_err(long)
    }

    /// Whether something of this path was moved here.
    pub(super) fn holds(&self, path: &RelPath) -> bool {
        self.place(path).is_ok_and(|place| self.root.stat(&place, Follow::Never).is_ok())
    }

    /// The place of a path, with the directories that lead to it.
    fn prepared(&self, path: &RelPath) -> Result<RelPath, Error> {
        let place = self.place(path)?;
        if let Some(above) = place.parent().filter(|above| self.made.borrow().as_ref() != Some(above)) {
            self.root.mkdir_all(&above, 0o700).map_err(io)?;
            *self.made.borrow_mut() = Some(above);
        }
        Ok(place)
    }

    /// Moves what is not a directory here. What is not there was moved before, or is gone.
    pub(super) fn take(&self, path: &RelPath) -> Result<(), Error> {
        match self.root.stat(path, Follow::Never) {
            // A later step of a run that is done again has put something in its place.
            Ok(found) if found.kind == FileKind::Directory => return Ok(()),
            Ok(_) => {}
            Err(error) if is_gone(&error) => return Ok(()),
            Err(error) => return Err(io(error)),
        }
        let place = self.prepared(path)?;
        self.root.rename(path, &place, RenameFlags::empty()).map_err(io)
    }

    /// Gives what is about to be replaced a further name here, so that its own is never free. Where the file system or the
    /// kernel refuses that it is moved.
    pub(super) fn keep(&self, path: &RelPath) -> Result<(), Error> {
        let found = match self.root.stat(path, Follow::Never) {
            Ok(found) if found.kind != FileKind::Directory => found,
            Ok(_) => return Ok(()),
            Err(error) if is_gone(&error) => return Ok(()),
            Err(error) => return Err(io(error)),
        };
        let place = self.prepared(path)?;
        let result = match self.root.hard_link(path, &place) {
            // RACE: between this and the step that follows nothing has the name.
            Err(error) if is_no_link(&error) && found.kind != FileKind::Directory => {
                self.root.rename(path, &place, RenameFlags::NOREPLACE)
            }
            result => result,
        };
        match result {
            // By a run that is done again.
            Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
            result => result.map_err(io),
        }
    }

    /// Moves an empty directory here, or removes it where what was in it came here before it: then the one here gets its
    /// permissions. One that holds what nobody listed stays.
    pub(super) fn take_directory(&self, path: &RelPath) -> Result<(), Error> {
        let found = match self.root.stat(path, Follow::Never) {
            Ok(found) if found.kind == FileKind::Directory => found,
            Ok(_) => return Ok(()),
            Err(error) if is_gone(&error) => return Ok(()),
            Err(error) => return Err(io(error)),
        };
        let place = self.prepared(path)?;
        let empty = self.root.names(Some(path), Follow::Never).map_err(io)?.is_empty();
        match self.root.stat(&place, Follow::Never) {
            // RACE: what is put into it now comes along, and is not lost.
            Err(error) if is_gone(&error) && empty => {
                self.root.rename(path, &place, RenameFlags::NOREPLACE).map_err(io)
            }
            Ok(there) if there.kind == FileKind::Directory && empty => {
                let wanted = as_it_is(self.root, path, &found)?;
                self.root.rmdir(path).map_err(io)?;
                apply_directory(self.root, &place, &wanted)
            }
            // Says why it stays.
            _ => self.root.rmdir(path).map_err(io),
        }
    }

    /// Moves what an exchange has taken out of a unit here: the files of `old`, below the root, that `unit` does not have any
    /// more. What both have is one file with two names, and stays where it is. Where that cannot be told apart all of it is
    /// moved.
    pub(super) fn take_rest(&self, old: &RelPath, unit: &RelPath) -> Result<(), Error> {
        // Nobody misses what could not be tidied up.
        let _ = self.drop_shared(old, unit);
        match self.root.stat(old, Follow::Never) {
            Ok(found) => rename_whole(self.root, old, &found, &self.prepared(unit)?),
            Err(error) if is_gone(&error) => Ok(()),
            Err(error) => Err(io(error)),
        }
    }

    /// Removes from `old` what `unit` has as well.
    fn drop_shared(&self, old: &RelPath, unit: &RelPath) -> Result<(), RootError> {
        let counterpart = |path: &RelPath| match path.strip_prefix(old) {
            Some(below) => unit.join(below.as_bytes()).ok(),
            None => Some(unit.clone()),
        };
        let now = |path: &RelPath| self.root.stat(&counterpart(path)?, Follow::Never).ok();
        let mut directories = vec![old.clone()];
        let mut at = 0;
        while at < directories.len() {
            let directory = directories[at].clone();
            at += 1;
            for name in self.root.names(Some(&directory), Follow::Never)? {
                let Ok(path) = directory.join(&name) else { continue };
                let found = self.root.stat(&path, Follow::Never)?;
                if found.kind == FileKind::Directory {
                    directories.push(path);
                } else if now(&path).is_some_and(|now| (now.device, now.inode) == (found.device, found.inode)) {
                    self.root.unlink_anyway(&path)?;
                }
            }
        }
        // From the leaves up: a directory with nothing left in it, that the unit still has, tells nothing.
        for directory in directories.iter().rev() {
            let stays = now(directory).is_some_and(|now| now.kind == FileKind::Directory);
            if stays && self.root.names(Some(directory), Follow::Never)?.is_empty() {
                self.root.rmdir(directory)?;
            }
        }
        Ok(())
    }

    /// Moves a directory with everything in it here.
    pub(super) fn take_whole(&self, path: &RelPath) -> Result<(), Error> {
        match self.root.stat(path, Follow::Never) {
            Ok(found) if found.kind == FileKind::Directory => {
                let place = self.prepared(path)?;
                rename_whole(self.root, path, &found, &place)
            }
            Ok(_) => Ok(()),
            Err(error) if is_gone(&error) => Ok(()),
            Err(error) => Err(io(error)),
        }
    }
}

/// Renames a directory. One that its owner may not write in cannot be moved to another directory: it is opened up for that.
pub(super) fn rename_whole(root: &Root, from: &RelPath, found: &Metadata, to: &RelPath) -> Result<(), Error> {
    match root.rename(from, to, RenameFlags::NOREPLACE) {
        Err(error) if error.errno() == Some(Errno::ACCESS.raw_os_error()) && found.mode & 0o300 != 0o300 => {
            root.open_up(from).map_err(io)?;
            root.rename(from, to, RenameFlags::NOREPLACE).map_err(io)?;
            let moved = root.open_dir(Some(to), Follow::Never).map_err(io)?;
            let mode = rustix::fs::Mode::from_raw_mode(found.mode);
            rustix::fs::fchmod(&moved, mode).map_err(|errno| Error::Io {
                operation: "give its mode back to",
                path: crate::error::shown(&root.shown().join(to.as_path())).to_string(),
                source: errno.into(),
            })
        }
        result => result.map_err(io),
    }
}

fn is_gone(error: &RootError) -> bool {
    matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory)
}

/// Removes what has been in the trash of a root for long enough. What cannot be removed is told, and stays.
pub(super) fn collect(root: &Root, keep_seconds: u64, monitor: &dyn Monitor) {
    let Ok(trash) = rel(TRASH) else { return };
    let Ok(names) = root.names(Some(&trash), Follow::Never) else { return };
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs() as i64;
    for name in names.iter().filter(|name| is_expired(name, now, keep_seconds)) {
        let Ok(path) = trash.join(name) else { continue };
        let said = match root.remove_tree(&path) {
            Ok(()) => Event::Detail(&format!("{path}: its time in the trash is over; removed")),
            Err(error) => {
                let reason = crate::error::chain(&error);
                monitor.event(Event::Warning(&format!("'{path}' is to go, its time in the trash is over: {reason}")));
                continue;
            }
        };
        monitor.event(said);
    }
}
