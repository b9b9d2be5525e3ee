//! Which files of a target another may be made of: the one that it is to replace, one with the same content, one that was written at the
//! same time, or one that is called alike (the same shard of the checkpoint before).

use std::collections::{BTreeMap, HashMap, HashSet};

use super::PIECES_MAX;
use crate::manifest::{Digest, Entry, Tree};
use crate::path::RelPath;
use crate::plan::{Need, Plan};

/// The large files of a target, by what they can be found by; of several that are called alike the newest ones.
#[derive(Default)]
struct Large<'a> {
    by_digest: HashMap<Digest, &'a Entry>,
    /// By size and second: what was renamed or copied keeps its time, mostly.
    by_time: HashMap<(u64, i64), Newest<'a>>,
    by_name: HashMap<&'a [u8], Newest<'a>>,
    by_size: HashMap<(u64, &'a [u8]), Newest<'a>>,
}

/// The newest files of some, the newest first.
#[derive(Default, Clone)]
struct Newest<'a>(Vec<&'a Entry>);

/// So many of them are kept.
const NEWEST: usize = 3;

impl<'a> Newest<'a> {
    fn add(&mut self, entry: &'a Entry) {
        if self.0.iter().any(|known| known.path == entry.path) {
            return;
        }
        let age = |entry: &Entry| (entry.mtime.seconds, entry.mtime.nanoseconds);
        let place = self.0.partition_point(|known| age(known) > age(entry));
        self.0.insert(place, entry);
        self.0.truncate(NEWEST);
    }
}

fn extension(path: &RelPath) -> &[u8] {
    let name = path.name();
    name.iter().rposition(|&byte| byte == b'.').map_or(b"", |dot| &name[dot..])
}

impl<'a> Large<'a> {
    /// Of files with the same content one is taken that `goes`, where there is one: it may only need another name.
    fn of(entries: impl Iterator<Item = &'a Entry>, least: u64, goes: impl Fn(&RelPath) -> bool) -> Large<'a> {
        let mut large = Large::default();
        for entry in entries {
            let Some((size, digest)) = entry.file().filter(|(size, _)| *size >= least) else { continue };
            if let Some(digest) = digest {
                let known = large.by_digest.entry(digest).or_insert(entry);
                if goes(&entry.path) && !goes(&known.path) {
                    *known = entry;
                }
            }
            large.by_time.entry((size, entry.mtime.seconds)).or_default().add(entry);
            large.by_name.entry(entry.path.name()).or_default().add(entry);
            large.by_size.entry((size, extension(&entry.path))).or_default().add(entry);
        }
        large
    }
}

/// For the files of at least `least` bytes whose content is needed what each may be made of, the most alike first and at most
/// [`PIECES_MAX`]: one file where its digest says that it is that, else several. `target` is what was looked at, `listed` all that there was.
pub fn candidates<'a>(
    source: &Tree,
    target: &'a Tree,
    listed: &'a Tree,
    plan: &Plan,
    least: u64,
) -> BTreeMap<u32, Vec<&'a Entry>> {
    let wanted = |index: u32| {
        let entry = &source.entries()[index as usize];
        let (size, digest) = entry.file().filter(|(size, _)| *size >= least)?;
        Some((entry, size, digest))
    };
    let needed = plan.actions.iter().filter(|action| action.need != Need::Nothing);
    let needed: Vec<_> = needed.filter_map(|action| Some((action.index, wanted(action.index)?))).collect();
    if needed.is_empty() {
        return BTreeMap::new();
    }
    // Of millions of files few are like one that is wanted, mostly.
    let names: HashSet<&[u8]> = needed.iter().map(|(_, (entry, ..))| entry.path.name()).collect();
    let sizes: HashSet<u64> = needed.iter().map(|(_, (_, size, _))| *size).collect();
    let is_like_one = |entry: &&Entry| {
        entry.file().is_some_and(|(size, _)| sizes.contains(&size)) || names.contains(entry.path.name())
    };
    // What was looked at is known best.
    let known = target.entries().iter().chain(listed.entries()).filter(is_like_one);
    let large = Large::of(known, least, |path| plan.removes(path));
    let pieces = |entry: &Entry, size: u64, digest: Option<Digest>| -> Vec<&'a Entry> {
        if let Some(same) = digest.and_then(|digest| large.by_digest.get(&digest)) {
            return vec![same];
        }
        let before = target.get(&entry.path).filter(|before| before.file().is_some_and(|(size, _)| size >= least));
        let dated = large.by_time.get(&(size, entry.mtime.seconds));
        let called = large.by_name.get(entry.path.name());
        let sized = large.by_size.get(&(size, extension(&entry.path)));
        let newest = [dated, called, sized].into_iter().flatten().flat_map(|newest| newest.0.iter().copied());
        let mut pieces: Vec<&'a Entry> = Vec::new();
        for candidate in before.into_iter().chain(newest) {
            if !pieces.iter().any(|piece| piece.path == candidate.path) {
                pieces.push(candidate);
            }
        }
        pieces.truncate(PIECES_MAX as usize);
        pieces
    };
    let found = needed.into_iter().map(|(index, (entry, size, digest))| (index, pieces(entry, size, digest)));
    found.filter(|(_, pieces)| !pieces.is_empty()).collect()
}
