//! Hugging Face: `checkpoint-N` (`tmp-checkpoint-N` while it is written), and indices that list shards.

use super::index::{self, INDEX_MAX, Numbered};
use super::tree::{Item, Items, Open, below};
use super::{Kind, Layout, Look, names};
use crate::error::Escaped;
use crate::path::RelPath;

const BRING: &str = "bring what is missing from where the checkpoint is whole, or wait until it is written";

/// Names of models and adapters in one file.
const WHOLE: [&[u8]; 5] = [
    b"model.safetensors",
    b"pytorch_model.bin",
    b"adapter_model.safetensors",
    b"adapter_model.bin",
    b"diffusion_pytorch_model.safetensors",
];

fn is_index(name: &[u8]) -> bool {
    let parts = [&b".safetensors.index."[..], b".bin.index."];
    name.ends_with(b".json") && parts.iter().any(|part| name.windows(part.len()).any(|window| window == *part))
}

impl Look<'_> {
    pub(super) fn huggingface(&mut self, directory: Option<&RelPath>, items: &Items) {
        let name = self.name(directory);
        let (temporary, checkpoint) =
            (names::numbered(name, b"tmp-checkpoint-").is_some(), names::numbered(name, b"checkpoint-").is_some());
        if temporary || checkpoint || WHOLE.iter().any(|name| items.contains_key(*name)) {
            self.report.found(Layout::HuggingFace, directory);
        }
        if temporary {
            let why = "the trainer gives it the name 'checkpoint-N' when it is whole";
            let hint = "wait until the save is done, or remove it when the run that wrote it is gone";
            self.report.add(Kind::Unfinished, directory.cloned(), "is unfinished", why, hint);
        }
        if checkpoint && items.is_empty() {
            self.report.add(Kind::Unfinished, directory.cloned(), "is empty", "nothing of it is there", BRING);
        }
        if checkpoint
            && items.contains_key(&b"training_args.bin"[..])
            && !items.contains_key(&b"trainer_state.json"[..])
        {
            let why = "it has 'training_args.bin' and no 'trainer_state.json', which the trainer writes after it";
            self.report.add(Kind::Unfinished, directory.cloned(), "is unfinished", why, BRING);
        }
        for name in items.keys().filter(|name| is_index(name)) {
            self.report.found(Layout::HuggingFace, directory);
            self.index(directory, name, items);
        }
        for name in items.keys().filter(|name| name.ends_with(b".incomplete")) {
            let why = "a download writes under this name until it is done";
            let hint = "finish the download, or remove it";
            self.report.add(Kind::Unfinished, below(directory, name), "is unfinished", why, hint);
        }
        self.numbered_shards(directory, items);
    }

    fn index(&mut self, directory: Option<&RelPath>, name: &[u8], items: &Items) {
        let Some(path) = below(directory, name) else { return };
        let damaged = "bring the index again from where it is whole";
        match items.get(name) {
            Some(Item::File { .. }) => {}
            _ => {
                let why = "it is no file, or a link out of the tree or to nothing";
                return self.report.add(Kind::Unfinished, Some(path), "cannot be the index", why, damaged);
            }
        }
        let text = match Open::new(self.root, &path).and_then(|file| file.whole(INDEX_MAX)) {
            Ok(Some(text)) => text,
            Ok(None) => {
                let why = format!("it is longer than {INDEX_MAX} bytes");
                return self.report.add(Kind::Damaged, Some(path), "is no index", why, damaged);
            }
            Err(why) => return self.report.cannot_read(Some(path), &why),
        };
        let shards = match index::shards(&text) {
            Ok(shards) => shards,
            Err(why) => return self.report.add(Kind::Damaged, Some(path), "is no index of shards", why, damaged),
        };
        for shard in &shards {
            let Some(at) = below(directory, shard.as_bytes()) else {
                let why = format!("it lists '{}', which is no path within the checkpoint", Escaped(shard.as_bytes()));
                self.report.add(Kind::Damaged, Some(path.clone()), "leads out of the checkpoint", why, damaged);
                continue;
            };
            match self.item(directory, shard.as_bytes()) {
                // A link that leads nowhere is told where contents are looked at.
                Some(Item::File { .. } | Item::Astray) => {}
                Some(_) => {
                    let why = format!("'{}' lists it as a shard", Escaped(name));
                    self.report.add(Kind::Damaged, Some(at), "is no file", why, BRING);
                }
                None => {
                    let why = format!("'{}' lists it", Escaped(name));
                    self.report.add(Kind::Unfinished, Some(at), "is missing", why, BRING);
                }
            }
        }
        let numbers: Vec<Numbered> = shards.iter().filter_map(|shard| index::numbered(shard.as_bytes())).collect();
        match index::gaps(&numbers) {
            Ok(missing) => {
                for why in missing {
                    let why = format!("it lists only some: {why}");
                    self.report.add(Kind::Damaged, Some(path.clone()), "does not list all shards", why, damaged);
                }
            }
            Err(why) => self.report.add(Kind::Damaged, Some(path), "contradicts itself", why, damaged),
        }
    }

    /// Shards that are there without an index, which is written after them.
    fn numbered_shards(&mut self, directory: Option<&RelPath>, items: &Items) {
        let mut numbers: Vec<Numbered> = items.keys().filter_map(|name| index::numbered(name)).collect();
        numbers.retain(|shard| {
            let (stem, suffix) = &shard.set;
            let known = [&b"model"[..], b"pytorch_model", b"diffusion_pytorch_model", b"adapter_model"];
            let own = [stem.as_slice(), suffix, b".index."].concat();
            known.contains(&stem.as_slice()) && !items.keys().any(|name| name.starts_with(&own))
        });
        let Some(first) = numbers.first() else { return };
        self.report.found(Layout::HuggingFace, directory);
        let (stem, suffix) = &first.set;
        let index = [stem.as_slice(), suffix, b".index.json"].concat();
        let why = format!("there are shards and no '{}', which is written after them", Escaped(&index));
        self.report.add(Kind::Unfinished, below(directory, &index), "is missing", why, BRING);
        match index::gaps(&numbers) {
            Ok(missing) => {
                for why in missing {
                    self.report.add(Kind::Unfinished, directory.cloned(), "lacks shards", why, BRING);
                }
            }
            Err(why) => {
                let hint = "remove what is left of the other set";
                self.report.add(Kind::Damaged, directory.cloned(), "holds shards of several sets", why, hint);
            }
        }
    }
}
