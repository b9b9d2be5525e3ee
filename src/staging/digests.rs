//! What a target knows of its own files: the table of digests beside its manifest, `.lockstep/digests`.

use std::io::{Read as _, Write as _};

use rustix::fs::RenameFlags;

use super::audience::as_manifest;
use crate::path::RelPath;
use crate::root::{FileKind, Follow, Metadata, Root, RootError};
use crate::scan::cache::DigestTable;

/// Where the table lies in a root.
pub const DIGESTS: &str = ".lockstep/digests";

fn invalid(root: &Root, error: crate::path::InvalidPath) -> RootError {
    let source = std::io::Error::new(std::io::ErrorKind::InvalidInput, error);
    RootError { operation: "name", path: root.shown().join(DIGESTS), source }
}

/// The table of `root`. One that is absent, damaged or not to be read is empty: files are hashed again then.
pub fn load_digests(root: &Root) -> DigestTable {
    let read = || -> Option<DigestTable> {
        let mut file = root.open_read(&RelPath::new(DIGESTS).ok()?, Follow::Never).ok()?;
        if Metadata::of(&file).ok()?.kind != FileKind::Regular {
            return None;
        }
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).ok()?;
        DigestTable::from_bytes(&bytes)
    };
    read().unwrap_or_default()
}

/// Replaces the table of `root`, by a file that is called `new` until it is whole.
///
/// # Errors
/// [`RootError`] when it cannot be written.
pub fn store_digests(root: &Root, table: &DigestTable, new: &str) -> Result<(), RootError> {
    store_beside_manifest(root, DIGESTS, new, &table.to_bytes())
}

/// Replaces a file beside the manifest of `root`: who may read the manifest may read it. It is called `new` until it is
/// whole, and not brought to stable storage: a torn one has to be seen by what is in it.
///
/// # Errors
/// [`RootError`] when it cannot be written.
pub fn store_beside_manifest(root: &Root, name: &str, new: &str, bytes: &[u8]) -> Result<(), RootError> {
    let name = RelPath::new(name).map_err(|error| invalid(root, error))?;
    let new = RelPath::new(new).map_err(|error| invalid(root, error))?;
    root.remove_tree(&new)?;
    let mut file = root.create_new(&new, 0o600)?;
    let failed = |source| RootError { operation: "write", path: root.shown().join(new.as_path()), source };
    file.write_all(bytes).map_err(failed)?;
    as_manifest(root, &file);
    root.rename(&new, &name, RenameFlags::empty())
}
