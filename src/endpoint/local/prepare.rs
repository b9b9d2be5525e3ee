//! Makes the staging area ready for a run: what an earlier one left is gone on with or removed.

use std::collections::HashSet;

use super::append;
use super::target::{Run, io, rel, stage_failure};
use crate::endpoint::Error;
use crate::manifest::{Content, Tree};
use crate::path::RelPath;
use crate::plan::{Change, Need, Plan};
use crate::root::{FileKind, Follow, Root};
use crate::staging::{Journal, StageError};

impl Run {
    /// Finds what an earlier run left to go on with, drops the rest, and makes the staging directories.
    pub(super) fn prepare(&self, staging: &Root, source: &Tree, plan: &mut Plan) -> Result<(), Error> {
        let stage_error = |error: StageError| stage_failure(&error, staging);
        let before = Journal::load(staging).map_err(stage_error)?;
        let mut directories: Vec<RelPath> = Vec::new();
        let mut resumed: HashSet<RelPath> = HashSet::new();
        for action in &mut plan.actions {
            let entry = &source.entries()[action.index as usize];
            if let Content::File { size, .. } = entry.content
                && action.need != Need::Nothing
            {
                // That something is staged of a file that was to be compared says that it was found to differ.
                let resume_at = before.resume_at(staging, &entry.path, size, entry.mtime);
                if resume_at > 0 {
                    action.need = Need::Content { resume_at };
                    resumed.insert(self.staged_path(&entry.path)?);
                }
            }
            if action.change == Change::MetadataOnly && action.need == Need::Nothing {
                continue;
            }
            if entry.is_directory() {
                directories.push(self.staged_directory(&entry.path)?);
            } else if let Some(parent) = self.staged_path(&entry.path)?.parent()
                && directories.last() != Some(&parent)
            {
                directories.push(parent);
            }
        }
        drop_leftovers(staging, &resumed)?;
        staging.remove_tree(&rel(append::TAILS)?).map_err(io)?;
        drop(before);
        let files = plan.actions.iter().filter(|action| action.need != Need::Nothing).filter_map(|action| {
            let entry = &source.entries()[action.index as usize];
            Some((&entry.path, entry.file()?.0, entry.mtime))
        });
        Journal::store_list(staging, files).map_err(stage_error)?;
        let mut made: HashSet<RelPath> = HashSet::new();
        for directory in directories {
            if made.contains(&directory) {
                continue;
            }
            for step in directory.ancestors().chain([directory.clone()]) {
                if !made.contains(&step) {
                    match staging.mkdir(&step, 0o700) {
                        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => return Err(io(error)),
                        _ => made.insert(step),
                    };
                }
            }
        }
        Ok(())
    }
}

/// Removes every staged file that is not gone on with.
fn drop_leftovers(staging: &Root, keep: &HashSet<RelPath>) -> Result<(), Error> {
    if keep.is_empty() {
        for name in ["tree", "last"] {
            staging.remove_tree(&rel(name)?).map_err(io)?;
        }
        return Ok(());
    }
    let mut directories: Vec<RelPath> = vec![rel("tree")?, rel("last")?];
    while let Some(directory) = directories.pop() {
        let names = match staging.names(Some(&directory), Follow::Never) {
            Ok(names) => names,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            Err(error) => return Err(io(error)),
        };
        for name in names {
            let Ok(path) = directory.join(&name) else { continue };
            if keep.contains(&path) {
                continue;
            }
            match staging.unlink_anyway(&path) {
                Ok(()) => {}
                Err(error) if error.kind() == std::io::ErrorKind::IsADirectory => directories.push(path),
                Err(error) => return Err(io(error)),
            }
        }
    }
    Ok(())
}

/// Whether anything but directories is staged, or it cannot be told.
pub(super) fn holds_files(staging: &Root) -> bool {
    let mut waiting: Vec<RelPath> = ["tree", "last"].iter().filter_map(|name| rel(name).ok()).collect();
    while let Some(directory) = waiting.pop() {
        let names = match staging.names(Some(&directory), Follow::Never) {
            Ok(names) => names,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            Err(_) => return true,
        };
        for name in names {
            let Ok(path) = directory.join(&name) else { return true };
            match staging.stat(&path, Follow::Never) {
                Ok(found) if found.kind == FileKind::Directory => waiting.push(path),
                _ => return true,
            }
        }
    }
    false
}
