//! What is read of a tree: its names, once, and bounded pieces of files. Nothing outside the root is reached.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;

use super::{Kind, Report};
use crate::error::chain;
use crate::filter::STATE_DIRECTORY;
use crate::manifest::Content;
use crate::path::RelPath;
use crate::root::{FileKind, Follow, Metadata, Root, RootError};
use crate::scan::Scanned;

/// What a name in a directory is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Item {
    /// A regular file, or a link to one in the tree, of so many bytes.
    File {
        size: u64,
    },
    Directory,
    /// A link to a directory in the tree; what is in it is looked at where it lies.
    LinkedDirectory,
    /// A link that leads out of the tree, or to nothing.
    Astray,
    /// Neither file nor directory.
    Other,
}

pub(super) type Items = BTreeMap<Vec<u8>, Item>;

/// Every directory that could be listed; `None` is the root.
pub(super) type Tree = BTreeMap<Option<RelPath>, Items>;

/// `name` in `directory`; `None` where that is no path.
pub(super) fn below(directory: Option<&RelPath>, name: &[u8]) -> Option<RelPath> {
    match directory {
        Some(directory) => directory.join(name).ok(),
        None => RelPath::new(name).ok(),
    }
}

/// Lists everything beneath `root`. What cannot be listed becomes a finding.
///
/// # Errors
/// When the root itself cannot be listed.
pub(super) fn walk(root: &Root, report: &mut Report) -> Result<Tree, RootError> {
    let mut tree = Tree::new();
    let mut waiting = vec![None];
    while let Some(directory) = waiting.pop() {
        match list(root, directory.as_ref(), &mut waiting, report) {
            Ok(items) => {
                tree.insert(directory, items);
            }
            Err(error) if directory.is_none() => return Err(error),
            // RACE: removed since its name was read.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => report.unreadable(directory, &error),
        }
    }
    Ok(tree)
}

fn list(
    root: &Root,
    directory: Option<&RelPath>,
    waiting: &mut Vec<Option<RelPath>>,
    report: &mut Report,
) -> Result<Items, RootError> {
    let descriptor = root.open_dir(directory, Follow::Never)?;
    let mut items = Items::new();
    for name in root.names_in(&descriptor, directory)? {
        if name == STATE_DIRECTORY {
            continue;
        }
        let Some(path) = below(directory, &name) else {
            report.add(
                Kind::Unreadable,
                directory.cloned(),
                "holds a path that is too long",
                "no path is longer than 4095 bytes",
                "move the tree up, or remove what lies so deep",
            );
            continue;
        };
        let item = match Metadata::at(&descriptor, &name) {
            Ok(metadata) => match metadata.kind {
                FileKind::Regular => Item::File { size: metadata.size },
                FileKind::Directory => {
                    waiting.push(Some(path));
                    Item::Directory
                }
                FileKind::Symlink => followed(root, &path),
                _ => Item::Other,
            },
            // RACE: removed since the directory was read.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => {
                report.unreadable(Some(path), &error);
                continue;
            }
        };
        items.insert(name, item);
    }
    Ok(items)
}

/// The same of a listing.
pub(super) fn of_listing(root: &Root, listed: &Scanned) -> Tree {
    let mut tree = Tree::from([(None, Items::new())]);
    for (entry, metadata) in listed.tree.entries().iter().zip(&listed.metadata) {
        let item = match entry.content {
            Content::Directory => {
                tree.entry(Some(entry.path.clone())).or_default();
                Item::Directory
            }
            Content::File { .. } | Content::HardLink { .. } => Item::File { size: metadata.size },
            Content::Symlink { .. } => followed(root, &entry.path),
        };
        tree.entry(entry.path.parent()).or_default().insert(entry.path.name().to_vec(), item);
    }
    tree
}

/// Whether a name may mean something to the rules of a layout, or its file to those of contents. Where none does there is
/// nothing to look at.
pub(super) fn speaks(name: &[u8], names_only: bool) -> bool {
    const CONTENTS: [&[u8]; 5] = [b".safetensors", b".bin", b".pt", b".pth", b".ckpt"];
    const ENDS: [&[u8]; 12] = [
        b"model.safetensors",
        b"pytorch_model.bin",
        b"adapter_model.bin",
        b"model_states.pt",
        b"optim_states.pt",
        b".distcp",
        b".nemo",
        b".incomplete",
        b"-unfinished",
        b".metadata",
        b".metadata.tmp",
        b"latest",
    ];
    const BEGINS: [&[u8]; 7] = [
        b"checkpoint",
        b"tmp-checkpoint-",
        b"iter_",
        b"global_step",
        b"latest_checkpointed_iteration",
        b"mp_rank_",
        b"release",
    ];
    let is_index = || name.ends_with(b".json") && name.windows(7).any(|part| part == b".index.");
    ENDS.iter().any(|end| name.ends_with(end))
        || BEGINS.iter().any(|begin| name.starts_with(begin))
        || !names_only && CONTENTS.iter().any(|end| name.ends_with(end))
        || name == b"weights"
        || is_index()
        || super::index::numbered(name).is_some()
}

fn followed(root: &Root, path: &RelPath) -> Item {
    match root.stat(path, Follow::Beneath) {
        Ok(metadata) => match metadata.kind {
            FileKind::Regular => Item::File { size: metadata.size },
            FileKind::Directory => Item::LinkedDirectory,
            _ => Item::Other,
        },
        Err(_) => Item::Astray,
    }
}

/// An open regular file.
pub(super) struct Open {
    file: File,
    pub(super) size: u64,
}

impl Open {
    /// Opens a file of the tree.
    pub(super) fn new(root: &Root, path: &RelPath) -> Result<Open, String> {
        let file = root.open_read(path, Follow::Beneath).map_err(|error| chain(&error.source))?;
        let metadata = Metadata::of(&file).map_err(|error| chain(&error))?;
        if metadata.kind != FileKind::Regular {
            return Err("it became something else while it was looked at".into());
        }
        Ok(Open { file, size: metadata.size })
    }

    /// `length` bytes at `at`, which have to be there; the caller bounds `length`.
    pub(super) fn read(&self, at: u64, length: u64) -> Result<Vec<u8>, String> {
        let length = usize::try_from(length).map_err(|error| error.to_string())?;
        let mut bytes = vec![0; length];
        self.file.read_exact_at(&mut bytes, at).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => "it became shorter while it was read".to_owned(),
            _ => chain(&error),
        })?;
        Ok(bytes)
    }

    /// The whole file, where it is no longer than `max`.
    pub(super) fn whole(&self, max: u64) -> Result<Option<Vec<u8>>, String> {
        if self.size > max { Ok(None) } else { self.read(0, self.size).map(Some) }
    }
}
