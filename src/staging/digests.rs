//! What a target knows of its own files: the table of digests beside its manifest, `.lockstep/digests`.

use std::fs::File;
use std::io::{self, BufReader, BufWriter, Write as _};

use rustix::fs::RenameFlags;

use super::audience::as_manifest;
use crate::path::RelPath;
use crate::root::{FileKind, Follow, Metadata, Root, RootError};
use crate::scan::cache::DigestTable;

/// Where the table lies in a root.
pub const DIGESTS: &str = ".lockstep/digests";

const BUFFER_BYTES: usize = 128 * 1024;

fn invalid(root: &Root, error: crate::path::InvalidPath) -> RootError {
    let source = std::io::Error::new(std::io::ErrorKind::InvalidInput, error);
    RootError { operation: "name", path: root.shown().join(DIGESTS), source }
}

/// The table of `root`. One that is absent, damaged or not to be read is empty: files are hashed again then.
pub fn load_digests(root: &Root) -> DigestTable {
    let read = || -> Option<DigestTable> {
        let file = root.open_read(&RelPath::new(DIGESTS).ok()?, Follow::Never).ok()?;
        let found = Metadata::of(&file).ok()?;
        if found.kind != FileKind::Regular {
            return None;
        }
        DigestTable::read_from(&mut BufReader::with_capacity(BUFFER_BYTES, file), found.size).ok()?
    };
    read().unwrap_or_default()
}

/// Replaces the table of `root`, by a file that is called `new` until it is whole.
///
/// # Errors
/// [`RootError`] when it cannot be written.
pub fn store_digests(root: &Root, table: &DigestTable, new: &str) -> Result<(), RootError> {
    store_by(root, DIGESTS, new, |file| table.write_to(file))
}

/// Replaces a file beside the manifest of `root`: who may read the manifest may read it. It is called `new` until it is
/// whole, and not brought to stable storage: a torn one has to be seen by what is in it.
///
/// # Errors
/// [`RootError`] when it cannot be written.
pub fn store_beside_manifest(root: &Root, name: &str, new: &str, bytes: &[u8]) -> Result<(), RootError> {
    store_by(root, name, new, |file| file.write_all(bytes))
}

fn store_by(
    root: &Root,
    name: &str,
    new: &str,
    write: impl FnOnce(&mut BufWriter<&File>) -> io::Result<()>,
) -> Result<(), RootError> {
    let name = RelPath::new(name).map_err(|error| invalid(root, error))?;
    let new = RelPath::new(new).map_err(|error| invalid(root, error))?;
    root.remove_tree(&new)?;
    let file = root.create_new(&new, 0o600)?;
    let failed = |source| RootError { operation: "write", path: root.shown().join(new.as_path()), source };
    let mut to = BufWriter::with_capacity(BUFFER_BYTES, &file);
    write(&mut to).and_then(|()| to.flush()).map_err(failed)?;
    drop(to);
    as_manifest(root, &file);
    root.rename(&new, &name, RenameFlags::empty())
}
