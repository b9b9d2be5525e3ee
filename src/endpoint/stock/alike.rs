//! What lies at the target that a file which is to be sent may be made of: the server copies it from there (`copy-data`), and it does not
//! go over the network again.
//!
//! What always holds: nothing is decided by it but what is copied from where. What was made of it is proven by its SHA-256 like all that
//! is sent, and sent whole where that is another.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use super::moved::{Further, Movable};
use super::target::{Run, State};
use super::{Verify, below};
use crate::endpoint::delta::{Beginning, Former, Sums, candidates};
use crate::endpoint::{Error, SMALL_FILE_BYTES};
use crate::manifest::{Digest, Entry, Manifest, Tree};
use crate::monitor::{Event, Monitor};
use crate::path::RelPath;
use crate::plan::{Action, Need, Plan};
use crate::scan::sums::SumsStore;

/// A smaller file is sent sooner than the server is asked to copy it, which takes seven requests.
const COPIED_BYTES_MIN: u64 = 16 << 10;
/// Of a file from this size on the sums of its blocks are kept: a smaller one is read as a whole before anything is decided.
const SUMMED_BYTES_MIN: u64 = SMALL_FILE_BYTES + 1;

/// A file that lies at the target and has the size and the time with which its digest is listed.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Lying {
    pub(super) path: RelPath,
    pub(super) size: u64,
    /// Its time of modification.
    pub(super) seconds: i64,
    pub(super) digest: Digest,
}

impl Lying {
    fn of(entry: &Entry) -> Option<Arc<Lying>> {
        let (size, digest) = entry.file()?;
        Some(Arc::new(Lying { path: entry.path.clone(), size, seconds: entry.mtime.seconds, digest: digest? }))
    }
}

/// What there is for the files of a run.
#[derive(Debug, Default)]
pub(super) struct Alike {
    /// Of the sizes that are wanted.
    by_digest: HashMap<Digest, Arc<Lying>>,
    /// Files, by their index, that are made of what gets their name.
    moves: HashSet<u32>,
    /// Files, by their index, of which what is new is put at the end of what is there.
    tails: HashSet<u32>,
    /// What a file, by its index, is made of, the most alike first.
    made_of: BTreeMap<u32, Vec<Arc<Lying>>>,
    /// What is known of these.
    sums: HashMap<Digest, Arc<Sums>>,
}

impl Alike {
    /// One of what the file at `index` is made of.
    pub(super) fn piece(&self, index: u32, piece: u32) -> Option<Arc<Lying>> {
        self.made_of.get(&index)?.get(piece as usize).cloned()
    }

    /// Whether the file at `index`, which has this size and digest, is made of one as a whole.
    pub(super) fn is_whole(&self, index: u32, size: u64, digest: Option<Digest>) -> bool {
        self.piece(index, 0).is_some_and(|lying| lying.size == size && digest == Some(lying.digest))
    }

    /// What gets the name of the file at `index`.
    pub(super) fn moved(&self, index: u32) -> Option<Arc<Lying>> {
        if self.moves.contains(&index) { self.piece(index, 0) } else { None }
    }

    /// What the file at `index` is appended to.
    pub(super) fn appended_to(&self, index: u32) -> Option<Arc<Lying>> {
        if self.tails.contains(&index) { self.piece(index, 0) } else { None }
    }

    /// What is known of a file with this digest.
    pub(super) fn sums(&self, digest: Digest) -> Option<&Arc<Sums>> {
        self.sums.get(&digest)
    }

    /// What has this content.
    pub(super) fn holding(&self, size: u64, digest: Digest) -> Option<Arc<Lying>> {
        self.by_digest.get(&digest).filter(|lying| lying.size == size).cloned()
    }
}

/// A file whose content is needed.
struct Wanted<'a> {
    action: &'a Action,
    index: u32,
    entry: &'a Entry,
    size: u64,
    digest: Option<Digest>,
}

/// Finds it, and tells the plan for which files there is something.
///
/// # Errors
/// When the connection ends.
pub(super) fn find(
    run: &Run,
    source: &Tree,
    target: &Tree,
    manifest: &Manifest,
    links: (&HashSet<RelPath>, bool),
    plan: &mut Plan,
) -> Result<Alike, Error> {
    if run.options.dry_run || !run.session.offers.copy_data {
        return Ok(Alike::default());
    }
    let needed = plan.actions.iter().filter(|action| action.need != Need::Nothing);
    let needed = needed.filter_map(|action| {
        let (index, entry) = (action.index, &source.entries()[action.index as usize]);
        let (size, digest) = entry.file().filter(|(size, _)| *size >= COPIED_BYTES_MIN)?;
        (run.options.delta || run.growing.mean(&entry.path, false)).then_some(())?;
        Some(Wanted { action, index, entry, size, digest })
    });
    let needed: Vec<Wanted<'_>> = needed.collect();
    if needed.is_empty() {
        return Ok(Alike::default());
    }
    let sizes: HashSet<u64> = needed.iter().map(|wanted| wanted.size).collect();
    // What a run on a part of the tree does not look at is looked at when it is opened.
    let nothing = Tree::default();
    let listed = if run.options.filter.only.is_some() { &manifest.tree } else { &nothing };
    let mut alike = Alike::default();
    let names = Further::new(run, (source, target), manifest, links)?;
    let mut movable = Movable::new(run, (source, target), manifest, plan, &names);
    for entry in target.entries().iter().chain(listed.entries()) {
        if let Some((size, Some(digest))) = entry.file()
            && sizes.contains(&size)
            && let Some(lying) = Lying::of(entry)
        {
            let known = alike.by_digest.entry(digest).or_insert_with(|| Arc::clone(&lying));
            if movable.goes(&lying) && !movable.goes(known) {
                *known = lying;
            }
        }
    }
    let there: HashSet<u64> = alike.by_digest.values().map(|lying| lying.size).collect();
    let former = candidates(source, target, listed, plan, SUMMED_BYTES_MIN).into_iter();
    let former = former.map(|(index, entries)| (index, entries.into_iter().filter_map(Lying::of).collect()));
    let mut former: BTreeMap<u32, Vec<Arc<Lying>>> = former.collect();
    if let Some(file) = &run.sums {
        let digests = former.values().flatten().map(|lying| lying.digest).collect();
        alike.sums =
            SumsStore(file).load(&digests).into_iter().map(|(digest, sums)| (digest, Arc::new(sums))).collect();
    }
    let mut whole_bytes = 0_u64;
    for wanted in &needed {
        if let Some(same) = wanted.digest.and_then(|digest| alike.holding(wanted.size, digest)) {
            if movable.gives(&same, wanted.entry) {
                alike.moves.insert(wanted.index);
            } else {
                whole_bytes = whole_bytes.saturating_add(wanted.size);
            }
            alike.made_of.insert(wanted.index, vec![same]);
            continue;
        }
        let mut pieces = former.remove(&wanted.index).unwrap_or_default();
        pieces.retain(|lying| alike.sums.contains_key(&lying.digest));
        if let Some(shorter) = grown(run, target, wanted).filter(|shorter| pieces.first() != Some(shorter)) {
            pieces = vec![shorter];
        }
        let former = pieces.first().filter(|former| former.path == wanted.entry.path && former.size < wanted.size);
        if former.is_some() && run.may_append(wanted.entry, target, &names, wanted.action) {
            alike.tails.insert(wanted.index);
        }
        if !pieces.is_empty() {
            alike.made_of.insert(wanted.index, pieces);
        }
    }
    // Copied by the server, a hole becomes zeros that take room.
    if whole_bytes > 0 && run.too_little_room(whole_bytes)?.is_some() {
        // What gets another name needs none, and what is appended to as much as is sent.
        let Alike { moves, tails, mut made_of, .. } = alike;
        made_of.retain(|index, _| moves.contains(index) || tails.contains(index));
        alike = Alike { moves, tails, made_of, ..Alike::default() };
    }
    let may_be = |wanted: &&Wanted<'_>| {
        alike.made_of.contains_key(&wanted.index)
            || !alike.by_digest.is_empty() && wanted.digest.is_none() && there.contains(&wanted.size)
    };
    plan.alike = needed.iter().filter(may_be).map(|wanted| wanted.index).collect();
    Ok(alike)
}

/// What lies under the name of a file that only grows.
fn grown(run: &Run, target: &Tree, wanted: &Wanted<'_>) -> Option<Arc<Lying>> {
    if !run.growing.mean(&wanted.entry.path, false) {
        return None;
    }
    target.get(&wanted.entry.path).and_then(Lying::of).filter(|lying| lying.size <= wanted.size)
}

/// Keeps the sums of what was staged, for the next run: of what `manifest` lists now. That they could not be kept makes that send more.
pub(super) fn keep_sums(run: &Run, state: &State, manifest: &Manifest, monitor: &dyn Monitor) {
    let Some(file) = run.sums.as_ref().filter(|_| !state.sums.is_empty()) else { return };
    let files = manifest.tree.entries().iter().filter_map(Entry::file);
    let listed = files.filter(|(size, _)| *size >= SUMMED_BYTES_MIN).filter_map(|(_, digest)| digest).collect();
    // Where it cannot be made, that shows in what is stored there.
    let _ = file.parent().map(std::fs::create_dir_all);
    if let Err(error) = SumsStore(file).store(&state.sums, &listed) {
        let reason = crate::error::chain(&error);
        monitor.event(Event::Detail(&format!("what changes in the files that were sent will not be known: {reason}")));
    }
}

impl Run {
    /// Whether sums of a file of this size are kept.
    pub(super) fn sums_up(&self, size: u64) -> bool {
        self.sums.is_some() && size >= SUMMED_BYTES_MIN
    }

    /// What is known of what the file at `index` may be made of.
    pub(super) fn former(&self, index: u32) -> Former {
        let state = self.state();
        let Some(first) = state.alike.piece(index, 0) else { return Former::default() };
        let Some(entry) = state.source.entries().get(index as usize) else { return Former::default() };
        let Some((size, digest)) = entry.file() else { return Former::default() };
        let Lying { digest: own, size: length, .. } = *first;
        let grows = entry.path == first.path && length <= size && self.growing.mean(&entry.path, false);
        let there = grows.then_some(Beginning { length, digest: own });
        let pieces = state.alike.made_of.get(&index).into_iter().flatten();
        let pieces = pieces.filter_map(|lying| state.alike.sums(lying.digest).cloned()).collect();
        Former { same: state.alike.is_whole(index, size, digest), there, pieces }
    }

    /// Whether what is there may stay the same file when it gets another name or grows: nothing asks for it to be kept aside, or to be
    /// hashed in whole.
    pub(super) fn files_may_stay(&self) -> bool {
        let options = &self.options;
        options.trash_seconds.is_none()
            && !options.checksum
            && !options.verify_disk
            && self.lanes.verify == Verify::Auto
    }

    /// The room that there is, in bytes, where it is known and less than what is wanted.
    ///
    /// # Errors
    /// When the connection ends.
    pub(super) fn too_little_room(&self, wanted: u64) -> Result<Option<u64>, Error> {
        Ok(self.session.room(&self.root_path())?.filter(|room| *room < wanted))
    }

    /// Where something lies, as the server knows it.
    pub(super) fn path_of(&self, lying: &Lying) -> Vec<u8> {
        below(&self.root, &lying.path)
    }
}
