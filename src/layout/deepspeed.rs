//! DeepSpeed: `global_step*/` with a file a rank, and `latest`, which is written when all ranks are done.

use std::collections::{BTreeMap, BTreeSet};

use super::pointers::POINTER_MAX;
use super::tree::{Item, Items, Open, below};
use super::{Kind, Layout, Look, names};
use crate::error::Escaped;
use crate::path::RelPath;

const POINTER: &[u8] = b"latest";
const MODEL: &[u8] = b"_model_states.pt";
const OPTIMIZER: &[u8] = b"_optim_states.pt";

fn is_state(name: &[u8]) -> bool {
    name.ends_with(MODEL) || name.ends_with(b"-model_states.pt") || name.ends_with(OPTIMIZER)
}

impl Look<'_> {
    pub(super) fn deepspeed(&mut self, directory: Option<&RelPath>, items: &Items) {
        let numbered: Vec<(u64, Vec<u8>)> = items
            .iter()
            .filter(|(_, item)| **item == Item::Directory)
            .filter_map(|(name, _)| Some((names::numbered(name, b"global_step")?, name.clone())))
            .collect();
        for (_, name) in &numbered {
            if let Some(path) = below(directory, name) {
                self.report.found(Layout::DeepSpeed, Some(&path));
            }
        }
        // Other programs write a file of this name too.
        let known = !numbered.is_empty() || items.contains_key(&b"zero_to_fp32.py"[..]);
        if matches!(items.get(POINTER), Some(Item::File { .. })) {
            self.deepspeed_pointer(directory, &numbered, known);
        } else if let Some((_, name)) = numbered.last() {
            let why = "'latest', which is written when a save is done, is not beside it";
            let hint = "wait until the save is done, or write the name of the directory that is whole into 'latest'";
            self.report.add(Kind::Unfinished, below(directory, name), "is unfinished", why, hint);
        }
        if items.keys().any(|name| is_state(name)) {
            self.report.found(Layout::DeepSpeed, directory);
            self.deepspeed_ranks(directory, items);
        }
    }

    fn deepspeed_pointer(&mut self, directory: Option<&RelPath>, numbered: &[(u64, Vec<u8>)], known: bool) {
        let Some(path) = below(directory, POINTER) else { return };
        // A file that is no pointer is of another program, where nothing else is of this one.
        if !known
            && Open::new(self.root, &path).and_then(|file| file.whole(POINTER_MAX)).is_ok_and(|text| text.is_none())
        {
            return;
        }
        let Some(tag) = self.pointer(directory, POINTER) else { return };
        let named = below(directory, &tag);
        let states = named.clone().is_some_and(|named| {
            self.tree.get(&Some(named)).is_some_and(|items| items.keys().any(|name| is_state(name)))
        });
        if !known && !states && !tag.starts_with(b"global_step") {
            return;
        }
        let one = !tag.contains(&b'/');
        let Some(named) = named.filter(|_| one) else {
            self.report.found(Layout::DeepSpeed, directory);
            let why = if tag.is_empty() {
                "it is empty: it is written in place, and a crash leaves it so".into()
            } else {
                format!("'{}' is no name of a directory beside it", Escaped(&tag))
            };
            return self.bad_pointer(path, why);
        };
        self.report.found(Layout::DeepSpeed, Some(&named));
        let there = self.pointed(directory, POINTER, &tag);
        if there && !states && self.tree.contains_key(&Some(named.clone())) {
            let why = "no file in it ends in 'model_states.pt'";
            self.report.add(Kind::Unfinished, Some(named), "is unfinished", why, super::pointers::SAVED_AGAIN);
        }
        if let Some(current) = names::numbered(&tag, b"global_step") {
            self.newer(directory, numbered, current, "latest");
        }
    }

    fn deepspeed_ranks(&mut self, directory: Option<&RelPath>, items: &Items) {
        let groups = names::grouped(items.keys().map(Vec::as_slice).filter(|name| is_state(name)));
        for (pattern, ranks) in &groups {
            if !pattern.starts_with(b"layer_#") {
                self.rank_gap(directory, pattern, ranks);
                continue;
            }
            // Not every layer has parameters; but each has a file of every rank.
            let mut layers: BTreeMap<u64, BTreeSet<Vec<u64>>> = BTreeMap::new();
            for numbers in ranks {
                if let Some((layer, rest)) = numbers.split_first() {
                    layers.entry(*layer).or_default().insert(rest.to_vec());
                }
            }
            let all: BTreeSet<Vec<u64>> = layers.values().flatten().cloned().collect();
            if names::missing_rank(&all).is_some() {
                self.rank_gap(directory, pattern, &all);
            } else if let Some((layer, missing)) =
                layers.iter().find_map(|(layer, there)| Some((layer, all.difference(there).next()?)))
            {
                let numbers: Vec<String> = missing.iter().map(u64::to_string).collect();
                let why = format!("layer {layer} lacks '{}' with {}", Escaped(pattern), numbers.join(", "));
                let hint = "bring what is missing, or go on from an older checkpoint";
                self.report.add(Kind::Unfinished, directory.cloned(), "lacks a rank", why, hint);
            }
        }
        // ZeRO-3 has a file of the model and one of the optimizer for each rank.
        let Some(model) = groups.get(&b"zero_pp_rank_#_mp_rank_#_model_states.pt"[..]) else { return };
        let optimizer: Vec<&[u8]> =
            vec![b"zero_pp_rank_#_mp_rank_#_optim_states.pt", b"bf16_zero_pp_rank_#_mp_rank_#_optim_states.pt"];
        for optimizer in optimizer.into_iter().filter_map(|pattern| groups.get(pattern)) {
            if let Some(missing) = model.symmetric_difference(optimizer).next() {
                let numbers: Vec<String> = missing.iter().map(u64::to_string).collect();
                let lacking = if model.contains(missing) { "optimizer" } else { "model" };
                let why = format!("rank {} has no states of its {lacking}", numbers.join(", "));
                let hint = "bring what is missing, or go on from an older checkpoint";
                self.report.add(Kind::Unfinished, directory.cloned(), "lacks a rank", why, hint);
            }
        }
    }
}
