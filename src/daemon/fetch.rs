//! What of a source of another machine may be fetched now. Nobody tells what happens there: it is looked at, and looked at once
//! more where that is not enough.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::feed::gathered;
use super::settle::Rules;
use super::temporary::is_temporary;
use super::{Connect, Trouble, clock};
use crate::config::{Job, Ready};
use crate::endpoint::picked::{Listed, Picked};
use crate::endpoint::{BEING_PUBLISHED, Error, ScanOptions};
use crate::error::{Exit, chain};
use crate::layout::complete;
use crate::manifest::{Content, Entry, Timestamp, Tree};
use crate::monitor::Monitor;
use crate::path::RelPath;

/// What changed longer ago than this has been left alone for long enough, whatever the clocks of two machines say.
const OLD_SECONDS: i64 = 86_400;

/// How often, and after which pauses, a source is listed again that a run publishes into.
const PUBLISHING_TRIES: u32 = 10;
const PUBLISHING_PAUSE: Duration = Duration::from_millis(300);

/// What was seen of a file that changed not long ago.
type Seen = BTreeMap<RelPath, (u64, Timestamp)>;

/// What was seen there at the last look, and when.
#[derive(Debug, Default)]
pub(super) struct Looked(Mutex<Option<(Seen, Instant)>>);

/// What is to be fetched, and what is not.
pub(super) struct Found {
    pub(super) source: Picked,
    /// What is left alone at both sides.
    pub(super) held: BTreeSet<RelPath>,
    /// Whether somebody writes there, so that it is worth looking again soon.
    pub(super) being_written: bool,
}

/// Lists the source of `job`.
///
/// # Errors
/// [`Trouble`].
pub(super) fn look(
    job: &Job,
    options: &ScanOptions,
    looked: &Looked,
    connect: &dyn Connect,
    monitor: &dyn Monitor,
    stop: &AtomicBool,
) -> Result<Found, Trouble> {
    let failed = |error: &Error| Trouble { message: chain(error), exit: error.exit() };
    let address = job.remote_source().unwrap_or_default();
    let list = || -> Result<Listed, Trouble> {
        let mut tries = 0;
        loop {
            let source = connect.source(address, job.connections, monitor)?;
            match Listed::new(source, options, monitor).map_err(|error| failed(&error)) {
                // A run that gives names there is over soon.
                Err(trouble) if tries < PUBLISHING_TRIES && trouble.message.contains(BEING_PUBLISHED) => {
                    tries += 1;
                    if !wait(PUBLISHING_PAUSE, stop) {
                        return Err(trouble);
                    }
                }
                listed => return listed,
            }
        }
    };
    let mut listed = list()?;
    let settle = job.settle.0;
    let mut written = BTreeSet::new();
    if !settle.is_zero() {
        let mut young = young(listed.tree());
        let before = looked.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        written = match before.filter(|(_, at)| at.elapsed() >= settle) {
            Some((before, _)) => changed(&before, &young),
            None => young.keys().cloned().collect(),
        };
        if !written.is_empty() && wait(settle, stop) {
            listed = list()?;
            let now = self::young(listed.tree());
            written = changed(&young, &now);
            young = now;
        }
        *looked.0.lock().unwrap_or_else(PoisonError::into_inner) = Some((young, Instant::now()));
    }
    let wrong = |error: crate::filter::FilterError| Trouble { message: chain(&error), exit: Exit::Usage };
    let rules = Rules::new(settle, job.ready.clone(), job.unit.as_deref(), &job.last).map_err(wrong)?;
    let mut held = unfinished(&rules, listed.tree(), &written);
    let pointers = pointers(&rules, &listed, &held).map_err(|error| failed(&error))?;
    held.extend(pointers);
    let held = gathered(held);
    Ok(Found { source: listed.without(&held), held, being_written: !written.is_empty() })
}

/// Waits; false when it is to end.
fn wait(pause: Duration, stop: &AtomicBool) -> bool {
    let until = Instant::now() + pause;
    while Instant::now() < until && !stop.load(Ordering::Relaxed) {
        std::thread::sleep(Duration::from_millis(20));
    }
    !stop.load(Ordering::Relaxed)
}

/// The files that changed not long ago.
fn young(tree: &Tree) -> Seen {
    let old = i64::try_from(clock()).unwrap_or(i64::MAX) - OLD_SECONDS;
    let files = tree.entries().iter().filter(|entry| entry.mtime.seconds > old);
    files.filter_map(|entry| Some((entry.path.clone(), (entry.file()?.0, entry.mtime)))).collect()
}

fn changed(before: &Seen, now: &Seen) -> BTreeSet<RelPath> {
    now.iter().filter(|(path, seen)| before.get(*path) != Some(seen)).map(|(path, _)| path.clone()).collect()
}

/// What is not finished: files that are written, units that one of them is in, units without their marker, and what is
/// temporary by its name.
fn unfinished(rules: &Rules, tree: &Tree, written: &BTreeSet<RelPath>) -> BTreeSet<RelPath> {
    let unit_of = |path: &RelPath| path.ancestors().find(|above| rules.is_unit(above));
    let mut held: BTreeSet<RelPath> =
        written.iter().map(|path| unit_of(path).unwrap_or_else(|| path.clone())).collect();
    let mut units = BTreeSet::new();
    for Entry { path, content, .. } in tree.entries() {
        if is_temporary(path.name()) {
            held.insert(path.clone());
            // A unit is not whole without what has not got its name yet.
            if rules.ready == Ready::Settled {
                held.extend(unit_of(path));
            }
        }
        if *content == Content::Directory && rules.is_unit(path) && unit_of(path).is_none() {
            units.insert(path.clone());
        }
    }
    if let Ready::Marker(marker) = &rules.ready {
        let is_complete = |unit: &RelPath| {
            let marker = unit.join(marker.as_bytes()).ok();
            marker.and_then(|marker| tree.get(&marker)).is_some_and(|entry| entry.file().is_some())
        };
        held.extend(units.into_iter().filter(|unit| !is_complete(unit)));
    }
    held
}

/// The pointers that name something of this.
fn pointers(rules: &Rules, listed: &Listed, held: &BTreeSet<RelPath>) -> Result<BTreeSet<RelPath>, Error> {
    let mut found = BTreeSet::new();
    if held.is_empty() {
        return Ok(found);
    }
    for Entry { path, content, .. } in listed.tree().entries() {
        if !rules.is_pointer(path, false) || path.ancestors().any(|above| held.contains(&above)) {
            continue;
        }
        let text = match content {
            Content::Symlink { target } => Some(target.to_vec()),
            Content::File { .. } => listed.read(path)?,
            _ => None,
        };
        let named = text.and_then(|text| complete::named(path, &text));
        if named.is_some_and(|named| held.contains(&named) || named.ancestors().any(|above| held.contains(&above))) {
            found.insert(path.clone());
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(paths: &[&str]) -> Tree {
        let mut entries: BTreeMap<RelPath, Content> = BTreeMap::new();
        for path in paths {
            let path = RelPath::new(path).unwrap();
            entries.extend(path.ancestors().map(|above| (above, Content::Directory)));
            entries.insert(path, Content::File { size: 1, digest: None });
        }
        let entry = |(path, content)| Entry {
            path,
            content,
            mtime: Timestamp { seconds: 0, nanoseconds: 0 },
            mode: 0o644,
            owner: "o".into(),
            group: "g".into(),
        };
        Tree::new(entries.into_iter().map(entry).collect()).unwrap()
    }

    fn held(ready: Ready, written: &[&str], paths: &[&str]) -> Vec<String> {
        let rules = Rules::new(Duration::ZERO, ready, Some("ckpt-*/"), &[]).unwrap();
        let written = written.iter().map(|path| RelPath::new(path).unwrap()).collect();
        unfinished(&rules, &tree(paths), &written).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn a_unit_that_is_not_complete_is_held_back_and_its_neighbours_are_not() {
        let paths = ["ckpt-1/a", "ckpt-1/_SUCCESS", "ckpt-2/a", "ckpt-2/deep/_SUCCESS", "file", "d/x.tmp"];
        assert_eq!(held(Ready::Marker("_SUCCESS".into()), &[], &paths), ["ckpt-2", "d/x.tmp"]);
        assert_eq!(held(Ready::Settled, &["ckpt-1/a", "file"], &paths), ["ckpt-1", "d/x.tmp", "file"]);
        assert_eq!(held(Ready::Settled, &[], &["ckpt-1/x.part", "ckpt-2/a"]), ["ckpt-1", "ckpt-1/x.part"]);
        assert!(held(Ready::Settled, &[], &["ckpt-1/a", "file"]).is_empty());
    }
}
