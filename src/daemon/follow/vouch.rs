//! A source that is a target itself: what a run published there is finished, and passed on without waiting.
//!
//! What always holds: only what the manifest in force lists, and what lies there as it is listed, skips the wait.

use std::time::Instant;

use rustix::fs::inotify::ReadFlags;

use super::Follower;
use crate::daemon::watch::{Event, Watches};
use crate::filter::STATE_DIRECTORY;
use crate::manifest::{Content, Entry, Tree};
use crate::path::RelPath;
use crate::root::{FileKind, Follow, Metadata, Root};
use crate::staging;

const MANIFEST: &[u8] = b"manifest";

impl Follower {
    /// Watches the state directory of the source, where it has one: a new manifest says what was published. True where it did.
    pub(super) fn watch_state(&self, root: &Root, watches: &mut Watches) -> bool {
        let Ok(state) = RelPath::new(STATE_DIRECTORY) else { return false };
        // One that may not be looked into tells nothing; what comes is left alone for as long as everything is.
        let Ok(directory) = root.open_dir(Some(&state), Follow::Never) else { return false };
        watches.add(&self.source, Some(&state), &directory).is_ok()
    }

    /// Takes note of what happened in a state directory. True when a run has published into the source.
    pub(super) fn state_changed(&self, root: &Root, watches: &mut Watches, event: &Event, path: &RelPath) -> bool {
        if event.flags.contains(ReadFlags::ISDIR) {
            let made = event.flags.intersects(ReadFlags::CREATE | ReadFlags::MOVED_TO);
            // RACE: the first manifest may have come before the directory was watched.
            return made && path.as_bytes() == STATE_DIRECTORY && self.watch_state(root, watches);
        }
        event.flags.contains(ReadFlags::MOVED_TO) && path.name() == MANIFEST && path.depth() == 2
    }

    /// Lets what waits and was published go at once.
    pub(super) fn vouch(&self, root: &Root) {
        let paths = self.shared.state().settle.settling();
        if paths.is_empty() {
            return;
        }
        let Some(manifest) = staging::published(root) else { return };
        let now = Instant::now();
        for path in paths {
            if self.is_as_listed(root, &manifest.tree, &path) {
                self.shared.state().settle.vouched(&path, now);
            }
        }
    }

    /// Whether a path, and all in it that takes part, is what the manifest says.
    fn is_as_listed(&self, root: &Root, listed: &Tree, path: &RelPath) -> bool {
        let (Some(entry), Ok(found)) = (listed.get(path), root.stat(path, Follow::Never)) else { return false };
        if !is_same(root, listed, entry, &found) {
            return false;
        }
        if found.kind != FileKind::Directory {
            return true;
        }
        let below = |name: &[u8]| path.join(name).ok();
        let Ok(names) = root.names(Some(path), Follow::Never) else { return false };
        let there: Vec<RelPath> = names.iter().filter_map(|name| below(name)).collect();
        let from = listed.entries().partition_point(|entry| entry.path <= *path);
        let mut wanted = listed.entries()[from..].iter().take_while(|entry| entry.path.is_within(path));
        // Nothing of it may be missing; what lies deeper is asked of its own directory.
        let all = wanted.all(|entry| entry.path.depth() > path.depth() + 1 || there.contains(&entry.path));
        all && there.iter().all(|inner| {
            let directory = root.stat(inner, Follow::Never).is_ok_and(|found| found.kind == FileKind::Directory);
            !self.ignores.admits(inner, directory) || self.is_as_listed(root, listed, inner)
        })
    }
}

fn is_same(root: &Root, listed: &Tree, entry: &Entry, found: &Metadata) -> bool {
    match &entry.content {
        Content::Directory => found.kind == FileKind::Directory,
        Content::Symlink { target } => {
            found.kind == FileKind::Symlink && root.read_link(&entry.path).is_ok_and(|now| now[..] == target[..])
        }
        // RACE: who writes to a file gives it another time; only one who puts that back is not noticed, until he writes again.
        Content::File { size, .. } => {
            found.kind == FileKind::Regular && found.size == *size && found.mtime == entry.mtime
        }
        Content::HardLink { first } => listed.get(first).is_some_and(|first| {
            found.kind == FileKind::Regular
                && first.mtime == found.mtime
                && first.file().is_some_and(|(size, _)| size == found.size)
        }),
    }
}
