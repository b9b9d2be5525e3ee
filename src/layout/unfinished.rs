//! Names that say by themselves that something is unfinished: NeMo, Ray, downloads.

use super::tree::{Item, Items, below};
use super::{Kind, Layout, Look};
use crate::path::RelPath;

impl Look<'_> {
    pub(super) fn unfinished(&mut self, directory: Option<&RelPath>, items: &Items) {
        let leftover = "wait until the save is done, or remove it when the run that wrote it is gone";
        if self.wants(Layout::Nemo)
            && items.get(&b"context"[..]) == Some(&Item::Directory)
            && items.get(&b"weights"[..]) == Some(&Item::Directory)
        {
            self.report.found(Layout::Nemo, directory);
        }
        for (name, item) in items {
            let path = below(directory, name);
            if self.wants(Layout::Nemo) && name.ends_with(b".nemo") {
                self.report.found(Layout::Nemo, directory);
            }
            if self.wants(Layout::Nemo) && name.ends_with(b"-unfinished") {
                self.report.found(Layout::Nemo, directory);
                let why = "NeMo removes this mark when the checkpoint beside it is whole";
                let hint = "wait until the save is done, or remove the mark and the checkpoint of its name";
                self.report.add(Kind::Unfinished, path, "marks an unfinished checkpoint", why, hint);
            } else if self.wants(Layout::Ray) && name.starts_with(b"checkpoint_tmp") && *item == Item::Directory {
                self.report.found(Layout::Ray, path.as_ref());
                let why = "Ray writes a checkpoint under this name until it is whole";
                self.report.add(Kind::Unfinished, path, "is unfinished", why, leftover);
            }
        }
    }
}
