//! Megatron-LM: `iter_NNNNNNN/` (or `release/`), and `latest_checkpointed_iteration.txt`, written when all ranks are done.

use std::collections::BTreeSet;

use super::tree::{Item, Items, below};
use super::{Kind, Layout, Look, names};
use crate::path::RelPath;

const POINTER: &[u8] = b"latest_checkpointed_iteration.txt";

impl Look<'_> {
    pub(super) fn megatron(&mut self, directory: Option<&RelPath>, items: &Items) {
        let numbered: Vec<(u64, Vec<u8>)> = items
            .iter()
            .filter(|(_, item)| **item == Item::Directory)
            .filter_map(|(name, _)| Some((names::numbered(name, b"iter_")?, name.clone())))
            .collect();
        for (_, name) in &numbered {
            if let Some(path) = below(directory, name) {
                self.report.found(Layout::Megatron, Some(&path));
            }
        }
        if matches!(items.get(POINTER), Some(Item::File { .. })) {
            self.megatron_pointer(directory, &numbered);
        } else if let Some((_, name)) = numbered.last() {
            let why = "'latest_checkpointed_iteration.txt', which is written when a save is done, is not beside it";
            let hint = "wait until the save is done, or write the iteration that is whole into that file";
            self.report.add(Kind::Unfinished, below(directory, name), "is unfinished", why, hint);
        }
        if names::numbered(self.name(directory), b"iter_").is_some() || self.name(directory) == b"release" {
            self.megatron_iteration(directory, items);
        }
    }

    fn megatron_pointer(&mut self, directory: Option<&RelPath>, numbered: &[(u64, Vec<u8>)]) {
        let Some(text) = self.pointer(directory, POINTER) else { return };
        let (target, number) = match names::decimal(&text) {
            Some(number) => (format!("iter_{number:07}").into_bytes(), Some(number)),
            None if text == b"release" => (text, None),
            None => {
                let why = if text.is_empty() { "it is empty" } else { "it holds neither a number nor 'release'" };
                if let Some(path) = below(directory, POINTER) {
                    self.report.found(Layout::Megatron, directory);
                    self.bad_pointer(path, why.into());
                }
                return;
            }
        };
        self.report.found(Layout::Megatron, below(directory, &target).as_ref());
        self.pointed(directory, POINTER, &target);
        if let Some(number) = number {
            self.newer(directory, numbered, number, "latest_checkpointed_iteration.txt");
        }
    }

    fn megatron_iteration(&mut self, directory: Option<&RelPath>, items: &Items) {
        let ranks: Vec<&[u8]> = items.keys().filter(|name| name.starts_with(b"mp_rank_")).map(Vec::as_slice).collect();
        for (pattern, numbers) in names::grouped(ranks.iter().copied()) {
            self.rank_gap(directory, &pattern, &numbers);
        }
        for rank in ranks.iter().filter(|rank| items.get(**rank) == Some(&Item::Directory)) {
            let path = below(directory, rank).filter(|path| self.is_empty(path));
            if let Some(path) = path {
                let why = "nothing of this rank is there";
                self.report.add(Kind::Unfinished, Some(path), "is empty", why, super::pointers::SAVED_AGAIN);
            }
        }
        if items.contains_key(&b"common.pt"[..]) && !items.contains_key(&b"metadata.json"[..]) {
            let why = "it has 'common.pt' and no 'metadata.json', which is written last";
            self.report.add(Kind::Unfinished, directory.cloned(), "is unfinished", why, super::pointers::SAVED_AGAIN);
        }
    }

    /// Says it where the ranks in names of one pattern are not all combinations.
    pub(super) fn rank_gap(&mut self, directory: Option<&RelPath>, pattern: &[u8], ranks: &BTreeSet<Vec<u64>>) {
        if let Some(missing) = names::missing_rank(ranks) {
            let missing: Vec<String> = missing.iter().map(u64::to_string).collect();
            let why = format!(
                "of '{}' that with {} is missing (# stands for the numbers)",
                crate::error::Escaped(pattern),
                missing.join(", ")
            );
            let hint = "bring what is missing, or go on from an older checkpoint";
            self.report.add(Kind::Unfinished, directory.cloned(), "lacks a rank", why, hint);
        }
    }
}
