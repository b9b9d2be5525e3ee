//! Sees whether a tree is what a good check saw: nothing is read but names and what stat says of them.

use std::io::Read as _;
use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use rustix::fs::RawDir;

use super::index::{Index, Whole, encode, identity};
use super::list::Loaded;
use super::{Depth, Options, Report, Sum, now};
use crate::error::Escaped;
use crate::filter::STATE_DIRECTORY;
use crate::monitor::{Counters, Event, Monitor};
use crate::path::RelPath;
use crate::root::{FileKind, Follow, Metadata, Root};
use crate::scan::Scanned;
use crate::scan::cache::is_settled;
use crate::scan::names::Names;
use crate::staging::store_beside_manifest;

const INDEX: &str = ".lockstep/index";
const NEW_INDEX: &str = ".lockstep/index.new";
const TABLE: &str = ".lockstep/digests";
const MANIFEST: &str = ".lockstep/manifest";
/// What getdents64(2) gives at once.
const NAMES_BYTES: usize = 64 * 1024;

/// Whether the options ask for no more and no less than what an index stands for.
fn is_usual(options: &Options) -> bool {
    !options.all_paths
        && options.read.is_empty()
        && options.against.is_none()
        && options.key.is_none()
        && options.exclude.is_empty()
        && options.layout.is_none()
        && options.marker.is_none()
}

/// The report of a check of a tree of which nothing moved since a good one; `None` where it has to be compared.
pub(super) fn look(root: &Root, options: &Options, monitor: &dyn Monitor) -> Option<Report> {
    if !is_usual(options) || !matches!(options.depth, Depth::Quick | Depth::Default) {
        return None;
    }
    let index = load(root)?;
    let manifest = stat(root, MANIFEST)?;
    let Whole { generation, oldest, .. } = index.whole;
    let old = options.max_age.is_some_and(|most| now().checked_sub(oldest).is_none_or(|age| age > most.as_secs()));
    let early = options.min_generation.is_some_and(|least| generation < least);
    let other_table = stat(root, TABLE).as_ref().map(identity) != index.whole.table;
    if other_table
        || identity(&manifest) != index.whole.manifest
        || manifest.device != index.whole.device
        || index.whole.name != called(root)
        || old
        || early
    {
        return None;
    }
    if !same_names(&index.whole) || !compare(root, &index, monitor) {
        return None;
    }
    let all = Sum { files: index.whole.files, bytes: index.whole.bytes };
    Some(Report {
        list: Some(index.whole.digest),
        list_changed: Some(manifest.ctime),
        generation: Some(generation),
        all,
        vouched: all,
        oldest: Some(oldest).filter(|_| all.files > 0),
        layouts: index.whole.layouts,
        ..Report::default()
    })
}

fn called(root: &Root) -> String {
    Escaped(&super::layouts::called(root.shown()).unwrap_or_default()).to_string()
}

fn stat(root: &Root, name: &str) -> Option<Metadata> {
    root.stat(&RelPath::new(name).ok()?, Follow::Never).ok()
}

fn load(root: &Root) -> Option<Index> {
    let mut file = root.open_read(&RelPath::new(INDEX).ok()?, Follow::Never).ok()?;
    let found = Metadata::of(&file).ok().filter(|found| found.kind == FileKind::Regular)?;
    let mut bytes = Vec::with_capacity(usize::try_from(found.size).ok()?.checked_add(1)?);
    file.read_to_end(&mut bytes).ok()?;
    Index::new(bytes)
}

/// Whether users and groups are still called what they were.
fn same_names(whole: &Whole) -> bool {
    let mut names = Names::default();
    whole.owners.iter().all(|(&uid, name)| **name == *names.user(uid))
        && whole.groups.iter().all(|(&gid, name)| **name == *names.group(gid))
}

/// Whether stat says of everything what it said, and there is nothing else.
fn compare(root: &Root, index: &Index, monitor: &dyn Monitor) -> bool {
    let (next, same) = (AtomicUsize::new(0), AtomicBool::new(true));
    let work = || {
        let mut buffer = vec![MaybeUninit::uninit(); NAMES_BYTES];
        while same.load(Ordering::Relaxed) {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= index.len() {
                return;
            }
            if monitor.stopped() || directory(root, index, number, &mut buffer, monitor) != Some(true) {
                same.store(false, Ordering::Relaxed);
            }
        }
    };
    let threads = std::thread::available_parallelism().map_or(2, |cores| cores.get().clamp(2, 8)).min(index.len());
    std::thread::scope(|scope| {
        (0..threads).for_each(|_| drop(scope.spawn(work)));
        if !index.is_whole() {
            same.store(false, Ordering::Relaxed);
        }
    });
    same.into_inner()
}

fn directory(
    root: &Root,
    index: &Index,
    number: usize,
    buffer: &mut [MaybeUninit<u8>],
    monitor: &dyn Monitor,
) -> Option<bool> {
    let (path, inside) = index.directory(number)?;
    let path = if path.is_empty() { None } else { Some(RelPath::new(path).ok()?) };
    let descriptor = root.open_dir(path.as_ref(), Follow::Never).ok()?;
    if Metadata::of(&descriptor).ok()?.device != index.whole.device {
        return Some(false);
    }
    let mut count = 0;
    let mut names = RawDir::new(&descriptor, buffer);
    while let Some(name) = names.next() {
        let name = name.ok()?;
        let name = name.file_name().to_bytes();
        // As the scan: what is called so is ours, wherever it is.
        if matches!(name, b"." | b"..") || name == STATE_DIRECTORY {
            continue;
        }
        let found = Metadata::at(&descriptor, name).ok()?;
        if found.device != index.whole.device || !inside.agrees(name, &found) {
            return Some(false);
        }
        count += 1;
    }
    Counters::add(&monitor.counters().scanned_entries, count as u64);
    Some(count == inside.len())
}

fn inside(root: &Root, file: &std::path::Path) -> bool {
    let open = std::fs::File::open(file).ok();
    open.and_then(|file| root.path_of(&file).ok().flatten())
        .is_some_and(|path| path.components().next() != Some(STATE_DIRECTORY))
}

/// Keeps what a good check saw, where the one who checks is the one who receives. That it cannot be kept makes the next
/// check slower, not wrong.
pub(super) fn keep(
    root: &Root,
    options: &Options,
    loaded: &Loaded,
    scanned: &Scanned,
    report: &Report,
    looked: std::time::SystemTime,
    monitor: &dyn Monitor,
) {
    let strict = is_usual(options)
        && !options.allow_unlisted
        && !options.ignore_permissions
        && report.findings.is_empty()
        && scanned.problems.is_empty();
    let read = report.unread.files == 0 && report.undated_files == 0;
    let settled = || scanned.metadata.iter().all(|found| found.kind != FileKind::Regular || is_settled(found, looked));
    // What is excused as a signature or a verdict of this check is not excused in the next.
    let excused = options.own.iter().any(|file| inside(root, file));
    if excused || !strict || !read || !settled() || !super::remember::is_own(root) {
        return;
    }
    let (Some(manifest), Some(digest), Some(generation)) = (loaded.metadata, loaded.digest, report.generation) else {
        return;
    };
    let mut names = Names::default();
    let users: std::collections::BTreeSet<u32> = scanned.metadata.iter().map(|found| found.uid).collect();
    let groups: std::collections::BTreeSet<u32> = scanned.metadata.iter().map(|found| found.gid).collect();
    let whole = Whole {
        manifest: identity(&manifest),
        table: stat(root, TABLE).as_ref().map(identity),
        digest,
        generation,
        device: manifest.device,
        files: report.all.files,
        bytes: report.all.bytes,
        oldest: report.oldest.unwrap_or_else(now),
        name: called(root),
        layouts: report.layouts.clone(),
        owners: users.into_iter().map(|uid| (uid, names.user(uid).to_string())).collect(),
        groups: groups.into_iter().map(|gid| (gid, names.group(gid).to_string())).collect(),
    };
    let Some(bytes) = encode(&whole, &scanned.tree, &scanned.metadata) else { return };
    if let Err(error) = store_beside_manifest(root, INDEX, NEW_INDEX, &bytes) {
        let reason = crate::error::chain(&error);
        monitor.event(Event::Detail(&format!("what was seen is not remembered: {reason}")));
    }
}
