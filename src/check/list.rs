//! The list that a tree is compared with: its own manifest, or a file in the native format or that of sha256sum.

use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use sha2::{Digest as _, Sha256};

use super::{CheckError, Finding, Kind};
use crate::manifest::{Content, Digest, Timestamp, Tree, format, sums};
use crate::path::RelPath;
use crate::root::{FileKind, Follow, Metadata, Root};
use crate::scan::cache::is_settled;

const MANIFEST: &str = ".lockstep/manifest";
const NATIVE: &[u8] = b"lockstep-manifest\t";

/// A list as it was read, or why it cannot be used.
pub(super) struct Loaded {
    pub(super) list: Result<List, Finding>,
    /// SHA-256 of its bytes.
    pub(super) digest: Option<Digest>,
    /// What stat said of it.
    pub(super) metadata: Option<Metadata>,
    /// Where it is, for people.
    pub(super) shown: PathBuf,
    /// Where it lies in the tree itself, if it does.
    pub(super) inside: Option<RelPath>,
}

impl Loaded {
    /// Whether the tree has no manifest at all, and no other list was named.
    pub(super) fn is_missing(&self) -> bool {
        matches!(&self.list, Err(finding) if finding.kind == Kind::ManifestMissing)
    }
}

pub(super) struct List {
    pub(super) generation: Option<u64>,
    /// The list tells files alone, by name and digest.
    pub(super) sums: bool,
    /// Sorted by path.
    pub(super) entries: Vec<Listed>,
}

pub(super) struct Listed {
    pub(super) path: RelPath,
    pub(super) expected: Expected,
    pub(super) permissions: Option<Permissions>,
}

pub(super) enum Expected {
    /// Size and time where the list has them.
    File {
        digest: Digest,
        size: Option<u64>,
        mtime: Option<Timestamp>,
    },
    Directory,
    Link(Box<[u8]>),
}

pub(super) struct Permissions {
    pub(super) mode: u32,
    pub(super) owner: Arc<str>,
    pub(super) group: Arc<str>,
}

/// Reads the list.
pub(super) fn load(root: &Root, against: Option<&Path>) -> Result<Loaded, CheckError> {
    let shown = against.map_or_else(|| PathBuf::from(MANIFEST), Path::to_owned);
    let failed = |source| CheckError::List { file: shown.clone(), source };
    let mut file = match against {
        Some(file) => std::fs::File::open(file).map_err(failed)?,
        None => match root.open_read(&RelPath::new(MANIFEST)?, Follow::Never) {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                let message = "nothing was published here by lockstep: push to it, or name a list with --against";
                let finding = Finding { path: shown.clone(), kind: Kind::ManifestMissing, message: message.to_owned() };
                return Ok(Loaded { list: Err(finding), digest: None, metadata: None, shown, inside: None });
            }
            Err(source) if source.kind() == std::io::ErrorKind::PermissionDenied => {
                return Err(CheckError::Denied { root: root.shown().to_owned(), source });
            }
            Err(error) => return Err(error.into()),
        },
    };
    let metadata = Metadata::of(&file).map_err(failed)?;
    if metadata.kind != FileKind::Regular {
        let message = format!("is a {}", metadata.kind.name());
        let finding = Finding { path: shown.clone(), kind: Kind::ManifestDamaged, message };
        return Ok(Loaded { list: Err(finding), digest: None, metadata: None, shown, inside: None });
    }
    let mut text = Vec::new();
    file.read_to_end(&mut text).map_err(failed)?;
    let inside = root.path_of(&file).ok().flatten();
    let digest = Some(Digest(Sha256::digest(&text).into()));
    let native = against.is_none() || text.starts_with(NATIVE);
    let list = if native { native_list(&text) } else { sums_list(&text) };
    let list = list.map_err(|message| Finding { path: shown.clone(), kind: Kind::ManifestDamaged, message });
    Ok(Loaded { list, digest, metadata: Some(metadata), shown, inside })
}

/// Whether the list is still the one that was loaded.
pub(super) fn is_same(root: &Root, against: Option<&Path>, loaded: &Loaded) -> Result<bool, CheckError> {
    let now = match against {
        Some(file) => std::fs::File::open(file).ok().and_then(|file| Metadata::of(&file).ok()),
        None => root.stat(&RelPath::new(MANIFEST)?, Follow::Never).ok(),
    };
    let (Some(now), Some(before)) = (&now, &loaded.metadata) else {
        return Ok(now.is_none() && loaded.metadata.is_none() || load(root, against)?.digest == loaded.digest);
    };
    // One that was written a moment ago may be written again without its times showing it.
    match now.same_content(before) && is_settled(before, std::time::SystemTime::now()) {
        true => Ok(true),
        false => Ok(load(root, against)?.digest == loaded.digest),
    }
}

fn native_list(text: &[u8]) -> Result<List, String> {
    let wrong = |error| format!("{error}; get it again from where it came from, or push again");
    let manifest = format::decode(text).map_err(wrong)?;
    let tree = &manifest.tree;
    let entries = tree.entries().iter().filter_map(|entry| {
        let (expected, permissions) = match &entry.content {
            Content::Directory => (Expected::Directory, true),
            Content::Symlink { target } => (Expected::Link(target.clone()), false),
            Content::File { .. } => (file(tree, &entry.path)?, true),
            // A further name has the permissions of the first, and those are compared there.
            Content::HardLink { first } => (file(tree, first)?, false),
        };
        let (mode, owner, group) = (entry.mode, Arc::clone(&entry.owner), Arc::clone(&entry.group));
        let permissions = permissions.then_some(Permissions { mode, owner, group });
        Some(Listed { path: entry.path.clone(), expected, permissions })
    });
    Ok(List { generation: Some(manifest.generation), sums: false, entries: entries.collect() })
}

fn file(tree: &Tree, path: &RelPath) -> Option<Expected> {
    let entry = tree.get(path)?;
    let (size, digest) = entry.file()?;
    Some(Expected::File { digest: digest?, size: Some(size), mtime: Some(entry.mtime) })
}

fn sums_list(text: &[u8]) -> Result<List, String> {
    let wrong = |error| format!("{error}; it is neither a manifest of lockstep nor a list as sha256sum writes it");
    let sums = sums::parse(text).map_err(wrong)?;
    // As sha256sum itself: who lists nothing has forgotten something.
    if sums.is_empty() {
        return Err("it lists nothing".to_owned());
    }
    let listed = |(path, digest)| Listed {
        path,
        expected: Expected::File { digest, size: None, mtime: None },
        permissions: None,
    };
    let mut entries: Vec<Listed> = sums.into_iter().map(listed).collect();
    entries.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(List { generation: None, sums: true, entries })
}
