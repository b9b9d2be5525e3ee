//! PyTorch's distributed checkpoints (DCP): `__RANK_INDEX.distcp`, and `.metadata`, which is written last and by a rename.

use std::collections::BTreeSet;

use super::tree::{Item, Items, Open, below};
use super::{Kind, Layout, Look, names};
use crate::error::Escaped;
use crate::path::RelPath;

const METADATA: &[u8] = b".metadata";
/// So much of a `.metadata` is in memory at a time.
const PIECE: u64 = 1 << 20;

impl Look<'_> {
    pub(super) fn torch_dcp(&mut self, directory: Option<&RelPath>, items: &Items) {
        let parts = items.keys().any(|name| name.ends_with(b".distcp"));
        let temporary = items.contains_key(&b".metadata.tmp"[..]);
        let asked_for = self.options.wanted != super::Wanted::Auto && items.contains_key(METADATA);
        if !(parts || temporary || asked_for) {
            // Other programs have files named '.metadata'; only one that names parts is of this layout.
            let named = matches!(items.get(METADATA), Some(Item::File { .. }))
                && below(directory, METADATA)
                    .and_then(|path| Open::new(self.root, &path).ok())
                    .is_some_and(|file| read_names(&file).is_ok_and(|names| !names.is_empty()));
            if !named {
                return;
            }
        }
        self.report.found(Layout::TorchDcp, directory);
        let hint = super::pointers::SAVED_AGAIN;
        if temporary {
            let why = "'.metadata.tmp' is there, which gets its name when a save is done";
            self.report.add(Kind::Unfinished, directory.cloned(), "is unfinished", why, hint);
        }
        match items.get(METADATA) {
            Some(Item::File { .. }) => self.dcp_metadata(directory, items),
            // Said already.
            None if temporary => {}
            _ => {
                let why = "there is no '.metadata' file, which is written when all ranks are done";
                self.report.add(Kind::Unfinished, directory.cloned(), "is unfinished", why, hint);
            }
        }
    }

    fn dcp_metadata(&mut self, directory: Option<&RelPath>, items: &Items) {
        let Some(path) = below(directory, METADATA) else { return };
        let names = match Open::new(self.root, &path).and_then(|file| Ok((read_frame(&file)?, read_names(&file)?))) {
            Ok((None, names)) => names,
            Ok((Some(why), _)) => {
                let hint = "bring it again from where it is whole, or go on from an older checkpoint";
                return self.report.add(Kind::Damaged, Some(path), "is damaged", why, hint);
            }
            Err(why) => return self.report.cannot_read(Some(path), &why),
        };
        let hint = "bring what is missing, or go on from an older checkpoint";
        for name in &names {
            let Some(part) = below(directory, name) else {
                let why = format!("it names '{}', which is no path within the checkpoint", Escaped(name));
                self.report.add(Kind::Damaged, Some(path.clone()), "is damaged", why, hint);
                continue;
            };
            match self.item(directory, name) {
                Some(Item::File { size: 0 }) => {
                    let why = "'.metadata' names it, and it holds nothing";
                    self.report.add(Kind::Damaged, Some(part), "is empty", why, hint);
                }
                // A link that leads nowhere is told where contents are looked at.
                Some(Item::File { .. } | Item::Astray) => {}
                _ => self.report.add(Kind::Unfinished, Some(part), "is missing", "'.metadata' names it", hint),
            }
        }
        if names.is_empty() {
            self.dcp_numbers(directory, items);
        }
    }

    /// Where `.metadata` names no file in a way that is understood: a rank's files are numbered from 0. A rank that had
    /// nothing to write has none, so that a gap among ranks says nothing.
    fn dcp_numbers(&mut self, directory: Option<&RelPath>, items: &Items) {
        let mut ranks: std::collections::BTreeMap<u64, BTreeSet<Vec<u64>>> = std::collections::BTreeMap::new();
        for (pattern, numbers) in items.keys().filter_map(|name| names::pattern(name)) {
            if pattern == b"__#_#.distcp"
                && let [rank, index] = numbers[..]
            {
                ranks.entry(rank).or_default().insert(vec![index]);
            }
        }
        for (rank, indices) in ranks {
            self.rank_gap(directory, format!("__{rank}_#.distcp").as_bytes(), &indices);
        }
    }
}

/// What is wrong with a pickle as a whole, if anything: it begins with PROTO and ends with STOP.
fn read_frame(file: &Open) -> Result<Option<String>, String> {
    if file.size < 2 {
        return Ok(Some("it is cut off: it is empty or nearly so".into()));
    }
    let (first, last) = (file.read(0, 1)?, file.read(file.size - 1, 1)?);
    Ok(match (&first[..], &last[..]) {
        ([0x80], [b'.']) => None,
        ([0x80], _) => Some("it is cut off: it does not end as a pickle does".into()),
        _ => Some("it is no pickle".into()),
    })
}

/// The files that a `.metadata` names, piece by piece: pieces overlap by the longest name.
fn read_names(file: &Open) -> Result<BTreeSet<Vec<u8>>, String> {
    let mut found = BTreeSet::new();
    let mut at = 0;
    while at < file.size {
        let from = at.saturating_sub(names::MENTION_LENGTH_MAX as u64);
        let to = file.size.min(at + PIECE);
        if !names::mentions(&file.read(from, to - from)?, &mut found) {
            return Err(format!("it names more than {} files", names::MENTIONS_MAX));
        }
        at = to;
    }
    Ok(found)
}
