//! What is believed of files that a server only says size and time of: by the manifest, and where their time proves something.

use super::whole_seconds;
use crate::endpoint::Error;
use crate::manifest::{Content, Entry, InvalidTree, Manifest, Tree};
use crate::plan::{Action, Change, Differences, Need, Plan};

/// The same tree with times that the server can hold.
pub(super) fn as_held(source: &Tree) -> Result<Tree, Error> {
    let mut entries = source.entries().to_vec();
    for entry in &mut entries {
        entry.mtime = whole_seconds(entry.mtime);
    }
    Tree::new(entries).map_err(|error| Error::Usage(error.to_string()))
}

/// Whether a file may have changed without its time showing it: it is as young as the manifest, and the time is known
/// to the second. (What git calls racily clean.)
fn is_recent(entry: &Entry, manifest: &Manifest) -> bool {
    entry.mtime.seconds >= manifest.created.seconds
}

/// Has the source hash files whose time proves nothing yet.
pub(super) fn ask_for_recent(source: &Tree, target: &Tree, manifest: &Manifest, plan: &mut Plan) {
    for (index, entry) in source.entries().iter().enumerate().filter(|(_, entry)| is_recent(entry, manifest)) {
        let Some((size, None)) = entry.file() else { continue };
        let Some((old_size, Some(digest))) = target.get(&entry.path).and_then(Entry::file) else { continue };
        if size != old_size {
            continue;
        }
        let need = Need::Compare { digest: Box::new(digest) };
        let index = index as u32;
        match plan.actions.binary_search_by_key(&index, |action| action.index) {
            Ok(at) if plan.actions[at].need == Need::Nothing => plan.actions[at].need = need,
            Ok(_) => {}
            Err(at) => {
                let differences = Differences::default();
                plan.actions.insert(at, Action { index, change: Change::MetadataOnly, differences, need });
            }
        }
    }
}

/// What was listed, with what the manifest knows of it: digests of files that still have their size and time, and
/// which names are of one file, which SFTP does not say. `recent` says whether that holds for files of which time
/// proves nothing yet.
pub(super) fn vouched(listed: Tree, manifest: &Manifest, recent: bool) -> Result<Tree, InvalidTree> {
    let same = |now: &Entry, then: &Entry| match (&now.content, &then.content) {
        (Content::File { size, .. }, Content::File { size: listed, .. }) => {
            size == listed && now.mtime.seconds == then.mtime.seconds && (recent || !is_recent(now, manifest))
        }
        _ => false,
    };
    let manifest = &manifest.tree;
    let mut entries = listed.entries().to_vec();
    for entry in &mut entries {
        let Some(then) = manifest.get(&entry.path) else { continue };
        match &then.content {
            Content::File { digest, .. } if same(entry, then) => {
                if let Content::File { digest: known, .. } = &mut entry.content {
                    *known = *digest;
                }
            }
            Content::HardLink { first } => {
                let first_then = manifest.get(first);
                let first_now = listed.get(first);
                let unchanged =
                    first_now.zip(first_then).is_some_and(|(now, then)| same(now, then) && same(entry, then));
                if unchanged {
                    entry.content = Content::HardLink { first: first.clone() };
                }
            }
            _ => {}
        }
    }
    Tree::new(entries)
}
