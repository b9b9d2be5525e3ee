//! Files that name the checkpoint to go on from.

use super::tree::{Item, Open, below};
use super::{Kind, Look};
use crate::error::Escaped;
use crate::path::RelPath;

/// A pointer holds one name.
pub(super) const POINTER_MAX: u64 = 4096;

pub(super) const SAVED_AGAIN: &str =
    "wait until the save is done, or name an older checkpoint that is whole in the pointer";

impl Look<'_> {
    /// The name in a pointer, without white space around it; `None` where it cannot be read, which is said.
    pub(super) fn pointer(&mut self, directory: Option<&RelPath>, name: &[u8]) -> Option<Vec<u8>> {
        let path = below(directory, name)?;
        match Open::new(self.root, &path).and_then(|file| file.whole(POINTER_MAX)) {
            Ok(Some(text)) => Some(text.trim_ascii().to_vec()),
            Ok(None) => {
                self.bad_pointer(path, format!("it is longer than {POINTER_MAX} bytes, and a pointer holds a name"));
                None
            }
            Err(why) => {
                self.report.cannot_read(Some(path), &why);
                None
            }
        }
    }

    pub(super) fn bad_pointer(&mut self, path: RelPath, why: String) {
        let hint = "write the name of the newest whole checkpoint into it";
        self.report.add(Kind::Damaged, Some(path), "is no pointer to a checkpoint", why, hint);
    }

    /// Says it when what a pointer names is not there, or is empty. True where there is something.
    pub(super) fn pointed(&mut self, directory: Option<&RelPath>, pointer: &[u8], target: &[u8]) -> bool {
        let (Some(pointer), Some(at)) = (below(directory, pointer), below(directory, target)) else { return false };
        let why = match self.item(directory, target) {
            Some(Item::LinkedDirectory) => return true,
            Some(Item::Directory) if !self.is_empty(&at) => return true,
            Some(Item::Directory) => format!("it names '{}', which is empty", Escaped(target)),
            Some(_) => format!("it names '{}', which is no directory in the tree", Escaped(target)),
            None => format!("it names '{}', which is not there", Escaped(target)),
        };
        let hint = "bring the checkpoint that it names, or name one that is there";
        self.report.add(Kind::Unfinished, Some(pointer), "points to no checkpoint", why, hint);
        false
    }

    /// Says it of each numbered directory that is newer than the one that the pointer names: the pointer comes last.
    pub(super) fn newer(
        &mut self,
        directory: Option<&RelPath>,
        numbered: &[(u64, Vec<u8>)],
        current: u64,
        pointer: &str,
    ) {
        for (_, name) in numbered.iter().filter(|(number, _)| *number > current) {
            let why = format!("it is newer than what '{pointer}' names, which is written when a save is done");
            self.report.add(Kind::Unfinished, below(directory, name), "is unfinished", why, SAVED_AGAIN);
        }
    }
}
