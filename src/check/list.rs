//! The list that a tree is compared with: its own manifest, or a file in the native format or that of sha256sum, or the
//! signature of a model, which lists what it signs.

use std::io::Read as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use sha2::{Digest as _, Sha256};

use super::{CheckError, Finding, Kind, Options};
use crate::manifest::{Content, Digest, Name, Timestamp, Tree, format, sums};
use crate::path::RelPath;
use crate::root::{FileKind, Follow, Metadata, Root};
use crate::scan::cache::is_settled;
use crate::signature::oms::{self, PublicKey, Statement};

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
    pub(super) scope: Scope,
    /// Sorted by path.
    pub(super) entries: Vec<Listed>,
}

/// Of what a list tells.
pub(super) enum Scope {
    /// Of all that lies there.
    Tree,
    /// Of files alone, by name and digest. As sha256sum itself, which opens whatever has the name, it takes a link for the
    /// file that it leads to, within the tree.
    Sums,
    /// Of files likewise; links are taken so where the signature says it.
    Signed(Statement),
}

impl Scope {
    /// Whether a link may stand where a file is listed.
    pub(super) fn follows(&self) -> bool {
        match self {
            Scope::Tree => false,
            Scope::Sums => true,
            Scope::Signed(statement) => statement.links,
        }
    }

    /// Whether the signature says of something that lies there that it is not signed.
    pub(super) fn leaves_out(&self, path: &RelPath, content: Option<&Content>) -> bool {
        let Scope::Signed(statement) = self else { return false };
        !matches!(content, Some(Content::Directory)) && statement.ignores(path)
    }

    /// Whether something that lies there ought to be listed.
    pub(super) fn covers(&self, root: &Root, path: &RelPath, content: Option<&Content>) -> bool {
        match (self, content) {
            (Scope::Tree, _) => true,
            (Scope::Sums, content) => {
                content.is_none_or(|content| matches!(content, Content::File { .. } | Content::HardLink { .. }))
            }
            (Scope::Signed(statement), None) => !statement.ignores(path),
            (Scope::Signed(statement), Some(content)) => {
                // What such a link leads to is signed under its own name.
                let directory = statement.links
                    && matches!(content, Content::Symlink { .. })
                    && root.stat(path, Follow::Beneath).is_ok_and(|found| found.kind == FileKind::Directory);
                statement.covers(path, content) && !directory
            }
        }
    }
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
    pub(super) owner: Name,
    pub(super) group: Name,
}

/// Reads the list. With a key it is a signature, which has to be by that key.
pub(super) fn load(root: &Root, against: Option<&Path>, key: Option<&PublicKey>) -> Result<Loaded, CheckError> {
    let shown = against.map_or_else(|| PathBuf::from(MANIFEST), Path::to_owned);
    let failed = |source| CheckError::List { file: shown.clone(), source };
    let mut file = match against {
        // A FIFO must not block here; what it is, is looked at next.
        Some(file) => {
            let nonblocking = rustix::fs::OFlags::NONBLOCK.bits() as i32;
            std::fs::File::options().read(true).custom_flags(nonblocking).open(file).map_err(failed)?
        }
        None => match root.open_read(&RelPath::new(MANIFEST)?, Follow::Never) {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                let finding = Finding { path: shown.clone(), kind: Kind::ManifestMissing, message: unpublished(root) };
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
    let list = match key {
        Some(key) => signed_list(&text, key),
        None if native => native_list(&text),
        None => sums_list(&text),
    };
    let list = list.map_err(|message| Finding { path: shown.clone(), kind: Kind::ManifestDamaged, message });
    Ok(Loaded { list, digest, metadata: Some(metadata), shown, inside })
}

/// What there is to say of a directory without a manifest.
fn unpublished(root: &Root) -> String {
    let published = |name: &Vec<u8>| {
        let manifest = RelPath::new(name).and_then(|name| name.join(MANIFEST));
        manifest.is_ok_and(|manifest| root.stat(&manifest, Follow::Never).is_ok())
    };
    let mut inside = root.names(None, Follow::Never).unwrap_or_default();
    inside.retain(published);
    inside.sort();
    let told: Vec<String> = inside.iter().take(3).map(|name| format!("'{}'", crate::error::Escaped(name))).collect();
    match inside.len() {
        0 => "nothing was published here by lockstep: push to it, or name a list with --against".to_owned(),
        1..=3 => format!(
            "nothing was published here, but to {} in it: check {}",
            told.join(", "),
            if inside.len() == 1 { "that" } else { "those" }
        ),
        all => {
            format!("nothing was published here, but to {} and {} more in it: check those", told.join(", "), all - 3)
        }
    }
}

/// Whether the list is still the one that was loaded.
pub(super) fn is_same(root: &Root, options: &Options, loaded: &Loaded) -> Result<bool, CheckError> {
    let against = options.against.as_deref();
    let again = || load(root, against, options.key.as_ref());
    let now = match against {
        Some(file) => std::fs::File::open(file).ok().and_then(|file| Metadata::of(&file).ok()),
        None => root.stat(&RelPath::new(MANIFEST)?, Follow::Never).ok(),
    };
    let (Some(now), Some(before)) = (&now, &loaded.metadata) else {
        return Ok(now.is_none() && loaded.metadata.is_none() || again()?.digest == loaded.digest);
    };
    // One that was written a moment ago may be written again without its times showing it.
    match now.same_content(before) && is_settled(before, std::time::SystemTime::now()) {
        true => Ok(true),
        false => Ok(again()?.digest == loaded.digest),
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
            // As published a further name has the permissions of the first; since then it may have become a file of its own.
            Content::HardLink { first } => (file(tree, first)?, true),
        };
        let (mode, owner, group) = (entry.mode, entry.owner.clone(), entry.group.clone());
        let permissions = permissions.then_some(Permissions { mode, owner, group });
        Some(Listed { path: entry.path.clone(), expected, permissions })
    });
    Ok(List { generation: Some(manifest.generation), scope: Scope::Tree, entries: entries.collect() })
}

fn file(tree: &Tree, path: &RelPath) -> Option<Expected> {
    let entry = tree.get(path)?;
    let (size, digest) = entry.file()?;
    Some(Expected::File { digest: digest?, size: Some(size), mtime: Some(entry.mtime) })
}

fn sums_list(text: &[u8]) -> Result<List, String> {
    if text.starts_with(b"{") {
        return Err("it is no list; a signature is named with --signature, and proven with --oms-key".to_owned());
    }
    let wrong = |error| format!("{error}; it is neither a manifest of lockstep nor a list as sha256sum writes it");
    let sums = sums::parse(text).map_err(wrong)?;
    // As sha256sum itself: who lists nothing has forgotten something.
    if sums.is_empty() {
        return Err("it lists nothing".to_owned());
    }
    Ok(List { generation: None, scope: Scope::Sums, entries: digests(sums) })
}

fn signed_list(text: &[u8], key: &PublicKey) -> Result<List, String> {
    let statement = oms::verify(text, key).map_err(|refusal| format!("does not count: {refusal}"))?;
    let entries = digests(statement.files.clone());
    Ok(List { generation: None, scope: Scope::Signed(statement), entries })
}

/// Files of which nothing else is known.
fn digests(files: Vec<(RelPath, Digest)>) -> Vec<Listed> {
    let listed = |(path, digest)| Listed {
        path,
        expected: Expected::File { digest, size: None, mtime: None },
        permissions: None,
    };
    let mut entries: Vec<Listed> = files.into_iter().map(listed).collect();
    entries.sort_by(|a, b| a.path.cmp(&b.path));
    entries
}
