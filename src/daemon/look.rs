//! A walk over the directories of a source. No link is followed, and what is left out is not entered.

use std::os::fd::OwnedFd;

use super::ignores::Ignores;
use crate::path::RelPath;
use crate::root::{FileKind, Follow, Metadata, Root, RootError};

/// What wants to know of a tree.
pub(super) trait Visit {
    /// A directory, before it is listed; `None` is the top.
    fn enter(&mut self, directory: Option<&RelPath>, descriptor: &OwnedFd);

    /// What is in it and takes part.
    fn list(&mut self, directory: Option<&RelPath>, entries: &[(RelPath, Metadata)]);

    /// A directory that is there and cannot be listed.
    fn unreadable(&mut self, directory: Option<&RelPath>);

    /// Whether to leave off.
    fn stopped(&self) -> bool;
}

/// Walks what lies at `top` and below, and takes note of the ignore files there.
///
/// # Errors
/// When `top` itself cannot be listed.
pub(super) fn walk(
    root: &Root,
    top: Option<&RelPath>,
    ignores: &mut Ignores,
    visit: &mut dyn Visit,
) -> Result<(), RootError> {
    let mut waiting = vec![top.cloned()];
    while let Some(directory) = waiting.pop() {
        if visit.stopped() {
            return Ok(());
        }
        let listed = list(root, directory.as_ref(), ignores, visit);
        match listed {
            Ok(entries) => {
                let below = entries.iter().filter(|(_, metadata)| metadata.kind == FileKind::Directory);
                waiting.extend(below.map(|(path, _)| Some(path.clone())));
                visit.list(directory.as_ref(), &entries);
            }
            Err(error) if directory.as_ref() == top => return Err(error),
            // RACE: removed since its name was read; the directory above tells.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(_) => visit.unreadable(directory.as_ref()),
        }
    }
    Ok(())
}

fn list(
    root: &Root,
    directory: Option<&RelPath>,
    ignores: &mut Ignores,
    visit: &mut dyn Visit,
) -> Result<Vec<(RelPath, Metadata)>, RootError> {
    let descriptor = root.open_dir(directory, Follow::Never)?;
    visit.enter(directory, &descriptor);
    let mut entries = Vec::new();
    let names = root.names_in(&descriptor, directory)?;
    let rules = ignores.enter(root, directory, &names);
    for name in names {
        let path = match directory {
            Some(directory) => directory.join(&name),
            None => RelPath::new(&name),
        };
        // A path that is too long cannot be sent; the scan of a run says so.
        let Ok(path) = path else { continue };
        // RACE: removed since the directory was read.
        let Ok(metadata) = Metadata::at(&descriptor, &name) else { continue };
        if rules.admits(&path, metadata.kind == FileKind::Directory) {
            entries.push((path, metadata));
        }
    }
    Ok(entries)
}
