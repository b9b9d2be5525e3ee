//! What is known of a root that is a target, to who passes on what lies in it: what runs have published there, whether one
//! publishes just now, and through which directories it all came.
//!
//! Only a state directory is believed that nobody but its user, this one or root could have put there.

use std::fs::File;
use std::io::{BufReader, Read as _};
use std::path::{Path, PathBuf};

use rustix::process::geteuid;
use sha2::{Digest as _, Sha256};

use super::digests::store_beside_manifest;
use crate::manifest::{Manifest, Timestamp, format};
use crate::path::RelPath;
use crate::plan::trail::{self, Stop};
use crate::root::{FileKind, Follow, Root, RootError};

const STATE: &str = ".lockstep";
const MANIFEST: &str = ".lockstep/manifest";
const TRAIL: &str = ".lockstep/trail";
const NEW_TRAIL: &str = ".lockstep/trail.new";
/// What is to be published lies here while names are given: the record, and what comes into the manifest at the end.
pub const AREAS: [&str; 3] = [".lockstep/staging/current", ".lockstep/staging/repair", ".lockstep/staging/sftp"];
/// What comes into the manifest with a record: what it changes, or the whole of it.
pub const COMING: [&str; 2] = ["changes", "manifest"];
const TRAIL_BYTES_MAX: u64 = 1 << 20;
const WRITABLE_BY_OTHERS: u32 = 0o022;

/// How a root stands for who passes on what lies in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// A run gives names, or was interrupted while it did; since then, by the time of its record.
    Publishing(Timestamp),
    /// Nobody does; the manifest in force, by inode and time of change.
    Still(Option<(u64, Timestamp)>),
}

/// How `root` stands now. One whose state may not be looked into stands still.
pub fn standing(root: &Root) -> Standing {
    let stat = |path: &str| root.stat(&RelPath::new(path).ok()?, Follow::Never).ok();
    // Most sources are no targets.
    if stat(STATE).is_none() {
        return Standing::Still(None);
    }
    for area in AREAS {
        // The manifest comes into force at the end; what is left then is cleared away.
        if let Some(record) = stat(&format!("{area}/commit"))
            && COMING.iter().any(|name| stat(&format!("{area}/{name}")).is_some())
        {
            return Standing::Publishing(record.mtime);
        }
    }
    Standing::Still(stat(MANIFEST).map(|manifest| (manifest.inode, manifest.ctime)))
}

/// Whether the state directory of `root` can be believed.
pub fn is_believed(root: &Root) -> bool {
    let Ok(state) = RelPath::new(STATE) else { return false };
    let (Ok(own), Ok(found)) = (root.stat_root(), root.stat(&state, Follow::Never)) else { return false };
    found.kind == FileKind::Directory
        && found.mode & WRITABLE_BY_OTHERS == 0
        && [0, own.uid, geteuid().as_raw()].contains(&found.uid)
}

fn open(root: &Root, name: &str, most: u64) -> Option<File> {
    let file = root.open_read(&RelPath::new(name).ok()?, Follow::Never).ok()?;
    let found = crate::root::Metadata::of(&file).ok()?;
    (found.kind == FileKind::Regular && found.size <= most).then_some(file)
}

fn read(root: &Root, name: &str, most: u64) -> Option<Vec<u8>> {
    let mut file = open(root, name, most)?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).ok()?;
    Some(bytes)
}

/// What runs have published at `root`; `None` where that is not known.
pub fn published(root: &Root) -> Option<Manifest> {
    if !is_believed(root) {
        return None;
    }
    let file = open(root, MANIFEST, u64::MAX)?;
    format::read(BufReader::new(file)).ok().map(|(manifest, _)| manifest)
}

fn stored(root: &Root) -> Vec<Stop> {
    let text = is_believed(root).then(|| read(root, TRAIL, TRAIL_BYTES_MAX)).flatten();
    text.map(|text| trail::from_text(&text)).unwrap_or_default()
}

/// What came to `root`, or to a directory that holds it, came through these before.
pub fn trail_of(root: &Root) -> Vec<Stop> {
    let whole = whole(root.shown());
    let above = whole.ancestors().skip(1).filter_map(|above| Root::open(above).ok());
    let of_above: Vec<Stop> = above.flat_map(|above| stored(&above)).collect();
    trail::merged(&of_above, &stored(root))
}

/// Remembers that what comes to `root` came through these.
///
/// # Errors
/// [`RootError`] when it cannot be written.
pub fn remember_trail(root: &Root, now: &[Stop]) -> Result<(), RootError> {
    let known = stored(root);
    let stops = trail::merged(&known, now);
    if stops == known {
        return Ok(());
    }
    store_beside_manifest(root, TRAIL, NEW_TRAIL, &trail::to_text(&stops))
}

/// The path without links, as far as it is there.
fn whole(path: &Path) -> PathBuf {
    let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    for above in absolute.ancestors() {
        if let Ok(found) = std::fs::canonicalize(above) {
            let rest = absolute.strip_prefix(above).unwrap_or(Path::new(""));
            return if rest.as_os_str().is_empty() { found } else { found.join(rest) };
        }
    }
    absolute
}

/// The directory at `path` of this machine, which need not be there yet; `called` is its path as the other end knows it.
pub fn stop_at(path: &Path, called: &Path) -> Stop {
    let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    // Machines that were made from one image may have one identity, and machines of two clusters one name.
    let identity = std::fs::read_to_string("/etc/machine-id").unwrap_or_default();
    let whole = whole(path);
    let mut ways: Vec<&Path> = whole.ancestors().collect();
    ways.reverse();
    // The top alone says nothing: everything lies in it.
    let ways = if ways.len() > 1 { &ways[1..] } else { &ways[..] };
    let level = |way: &&Path| {
        let mut hash = Sha256::new();
        for part in [b"lockstep", identity.trim().as_bytes(), host.as_bytes(), way.as_os_str().as_encoded_bytes()] {
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part);
        }
        hash.finalize()[..12].iter().map(|byte| format!("{byte:02x}")).collect()
    };
    Stop { levels: ways.iter().map(level).collect(), name: format!("{host}:{}", crate::error::shown(called)) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::PermissionsExt as _;

    #[test]
    fn a_trail_is_remembered_and_found_from_below_and_not_believed_from_anybody() {
        let at = tempfile::tempdir().unwrap();
        fs::create_dir_all(at.path().join("data/sub")).unwrap();
        let open = |name: &str| Root::open(&at.path().join(name)).unwrap();
        let (data, sub) = (open("data"), open("data/sub"));
        data.mkdir(&RelPath::new(STATE).unwrap(), 0o700).unwrap();
        let elsewhere = stop_at(Path::new("/elsewhere/x"), Path::new("/x"));
        remember_trail(&data, std::slice::from_ref(&elsewhere)).unwrap();
        assert_eq!(trail_of(&data), std::slice::from_ref(&elsewhere));
        assert_eq!(trail_of(&sub), [elsewhere]);
        fs::set_permissions(at.path().join("data/.lockstep"), fs::Permissions::from_mode(0o777)).unwrap();
        assert!(trail_of(&data).is_empty() && published(&data).is_none());
    }

    #[test]
    fn a_directory_is_the_same_by_another_way_to_it_and_before_it_is_there() {
        let at = tempfile::tempdir().unwrap();
        fs::create_dir(at.path().join("data")).unwrap();
        std::os::unix::fs::symlink("data", at.path().join("link")).unwrap();
        let stop = |name: &str| stop_at(&at.path().join(name), Path::new("/"));
        assert_eq!(stop("link").levels, stop("data").levels);
        assert!(stop("data/new/deep").touches(&stop("link")) && !stop("data2").touches(&stop("data")));
        fs::create_dir_all(at.path().join("data/new")).unwrap();
        assert_eq!(stop("data/new").levels, stop("link/new").levels);
    }

    #[test]
    fn a_run_that_gives_names_is_seen_until_its_manifest_is_in_force() {
        let at = tempfile::tempdir().unwrap();
        let root = Root::open(at.path()).unwrap();
        assert_eq!(standing(&root), Standing::Still(None));
        let area = at.path().join(".lockstep/staging/current");
        fs::create_dir_all(&area).unwrap();
        fs::write(area.join("manifest"), "").unwrap();
        assert_eq!(standing(&root), Standing::Still(None));
        fs::write(area.join("commit"), "").unwrap();
        assert!(matches!(standing(&root), Standing::Publishing(_)));
        fs::rename(area.join("manifest"), area.join("changes")).unwrap();
        assert!(matches!(standing(&root), Standing::Publishing(_)));
        fs::rename(area.join("changes"), at.path().join(MANIFEST)).unwrap();
        assert!(matches!(standing(&root), Standing::Still(Some(_))));
    }
}
