//! What of a source of another machine may be fetched now. Nobody tells what happens there: it is looked at, and looked at once
//! more where that is not enough.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::feed::gathered;
use super::settle::Rules;
use super::temporary::is_temporary;
use super::{Trouble, clock};
use crate::config::{Job, Ready};
use crate::endpoint::guarded::{Fitting, Guarded};
use crate::endpoint::picked::{Listed, Picked, SMALL_BYTES};
use crate::endpoint::{BEING_PUBLISHED, Error, Fetch, Produced, ScanOptions, Source};
use crate::error::{Exit, chain};
use crate::filter::{Filter, FilterSpec};
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

/// Pointers with what they said.
type Said = BTreeSet<(RelPath, Vec<u8>)>;

/// What was seen there at the last look.
#[derive(Debug, Default)]
pub struct Looked(Mutex<Last>);

#[derive(Debug, Default)]
struct Last {
    /// What had changed not long before, and when it was looked at.
    young: Option<(Seen, Instant)>,
    /// What each complete unit was made of.
    units: BTreeMap<RelPath, u64>,
    /// It was worth looking again soon.
    soon: bool,
    /// The pointers that were left because they name what was not listed.
    left: Arc<Mutex<Said>>,
}

/// What is to be fetched, and what is not.
pub struct Found {
    /// What takes part.
    pub source: Guarded<Picked>,
    /// What is left alone at both sides.
    pub held: BTreeSet<RelPath>,
    /// Whether somebody writes there, so that it is worth looking again soon; not twice in a row.
    pub being_written: bool,
}

/// Opens a source of another machine.
type Connect<'a, T> = dyn Fn() -> Result<Box<dyn Source>, T> + 'a;

/// Lists the source of `job` for who does not come again: the pointers are read, and where one names what was not listed, all is
/// listed once more.
///
/// # Errors
/// [`Trouble`].
pub fn look_once<T: From<Trouble>>(
    job: &Job,
    options: &ScanOptions,
    connect: &Connect<'_, T>,
    monitor: &dyn Monitor,
    stop: &AtomicBool,
) -> Result<Found, T> {
    let looked = Looked::default();
    let found = look(job, options, &looked, connect, monitor, stop)?;
    match all_fit(job, options, &found, monitor) {
        Ok(true) => Ok(found),
        Ok(false) => look(job, options, &looked, connect, monitor, stop),
        Err(error) => Err(Trouble { message: chain(&error), exit: error.exit() }.into()),
    }
}

/// Whether each pointer that is to be fetched names what was listed.
fn all_fit(job: &Job, options: &ScanOptions, found: &Found, monitor: &dyn Monitor) -> Result<bool, Error> {
    let rules = Rules::new(Duration::ZERO, job.ready.clone(), job.unit.as_deref(), &job.last);
    let rules = rules.map_err(|error| Error::Usage(chain(&error)))?;
    let tree = match found.source.scan(options, monitor) {
        Ok(scan) => Arc::new(scan.tree),
        // A link does not.
        Err(Error::Remote { exit: Exit::TryAgain, .. }) => return Ok(false),
        Err(error) => return Err(error),
    };
    let mut reader = found.source.reader(Arc::clone(&tree))?;
    for (position, entry) in tree.entries().iter().enumerate() {
        if rules.is_pointer(&entry.path, false) && entry.file().is_some_and(|(size, _)| size <= SMALL_BYTES) {
            reader.push(Fetch::of(position as u32));
        }
    }
    let mut all = true;
    while let Some(produced) = reader.next()? {
        all &= !matches!(produced, Produced::Failed { .. });
    }
    Ok(all)
}

/// Lists the source of `job`, which `connect` opens.
///
/// # Errors
/// [`Trouble`].
pub fn look<T: From<Trouble>>(
    job: &Job,
    options: &ScanOptions,
    looked: &Looked,
    connect: &Connect<'_, T>,
    monitor: &dyn Monitor,
    stop: &AtomicBool,
) -> Result<Found, T> {
    let failed = |error: &Error| Trouble { message: chain(error), exit: error.exit() };
    let list = |options: &ScanOptions| -> Result<Listed, T> {
        let mut tries = 0;
        loop {
            match Listed::new(connect()?, options, monitor).map_err(|error| failed(&error)) {
                // A run that gives names there is over soon.
                Err(trouble) if tries < PUBLISHING_TRIES && trouble.message.contains(BEING_PUBLISHED) => {
                    tries += 1;
                    if !wait(PUBLISHING_PAUSE, stop) {
                        return Err(trouble.into());
                    }
                }
                listed => return Ok(listed?),
            }
        }
    };
    let mut last = looked.0.lock().unwrap_or_else(PoisonError::into_inner);
    let said = std::mem::take(&mut *last.left.lock().unwrap_or_else(PoisonError::into_inner));
    let mut listed = list(options)?;
    let settle = job.settle.0;
    let mut written = BTreeSet::new();
    if !settle.is_zero() {
        let mut young = young(listed.tree());
        written = match last.young.take().filter(|(_, at)| at.elapsed() >= settle) {
            Some((before, _)) => changed(&before, &young),
            None => young.keys().cloned().collect(),
        };
        if !written.is_empty() && wait(settle, stop) {
            listed = list(options)?;
            let now = self::young(listed.tree());
            written = changed(&young, &now);
            young = now;
        }
        last.young = Some((young, Instant::now()));
    }
    let wrong = |error: crate::filter::FilterError| Trouble { message: chain(&error), exit: Exit::Usage };
    let rules = Rules::new(settle, job.ready.clone(), job.unit.as_deref(), &job.last).map_err(wrong)?;
    let mut held = unfinished(&rules, listed.tree(), &written);
    let mut units = units(&rules, listed.tree(), &held);
    // RACE: a unit that was completed while it was being listed may have been listed without some of its files, and with its
    // marker. What it is made of is asked for once more where it was not the same at the last look.
    let is_known = |unit: &RelPath, seen: &u64| last.units.get(unit) == Some(seen);
    let fresh = units.iter().filter(|(unit, seen)| !is_known(unit, seen));
    let fresh: Vec<RelPath> = fresh.map(|(unit, _)| unit.clone()).collect();
    let mut in_doubt = false;
    if !fresh.is_empty() {
        let mut again = options.clone();
        again.filter.only = Some(fresh.iter().map(|unit| unit.as_bytes().to_vec()).collect());
        let again = self::units(&rules, list(&again)?.tree(), &BTreeSet::new());
        for unit in fresh {
            if units.get(&unit) != again.get(&unit) {
                in_doubt = true;
                units.remove(&unit);
                held.insert(unit);
            }
        }
    }
    last.units = units;
    let pointers = pointers(&rules, &listed, &held).map_err(|error| failed(&error))?;
    held.extend(pointers);
    let many = held.len();
    let held = gathered(held).ok_or_else(|| {
        let message = format!(
            "{many} paths of the source are not finished, more than can be left out of a run by name; it is tried again when \
             they may have been finished"
        );
        Trouble { message, exit: Exit::TryAgain }
    })?;
    let excluded = Filter::compile(&FilterSpec { rules: job.exclude.clone(), only: None }).map_err(wrong)?;
    let fitting = names_what_was_listed(rules, excluded, held.clone(), (said, Arc::clone(&last.left)));
    let source = Guarded::new(listed.without(&held), Arc::new(|_| false), Arc::new(BTreeSet::new)).fitting(fitting);
    // What is written all the time is looked at twice, and then with the next poll: what else there is counts as done by then.
    last.soon = (in_doubt || !written.is_empty()) && !last.soon;
    Ok(Found { source, held, being_written: last.soon })
}

/// Whether a path is one of those that are held, or lies below one.
fn lies_in(held: &BTreeSet<RelPath>, path: &RelPath) -> bool {
    held.contains(path) || path.ancestors().any(|above| held.contains(&above))
}

/// Says of a pointer, by the content that was read of it, whether what it names was listed with it.
///
/// RACE: it may have been replaced after all was listed, and name what was finished since. So it is left; if it says the same after
/// the next list, which was made after it had been read, it names what is not there, and nothing is waited for.
fn names_what_was_listed(
    rules: Rules,
    excluded: Filter,
    held: BTreeSet<RelPath>,
    (said, left): (Said, Arc<Mutex<Said>>),
) -> Fitting {
    Arc::new(move |path: &RelPath, content: &[u8], tree: &Tree| {
        let named = if rules.is_pointer(path, false) { complete::named(path, content) } else { None };
        let Some(named) = named else { return true };
        if tree.get(&named).is_some() || !excluded.admits(&named, true) {
            return true;
        }
        if lies_in(&held, &named) {
            return false;
        }
        let this = (path.clone(), content.to_vec());
        let known = said.contains(&this);
        left.lock().unwrap_or_else(PoisonError::into_inner).insert(this);
        known
    })
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

/// What the units that are complete are made of, each in one number: two lists of one that was left alone give the same.
fn units(rules: &Rules, tree: &Tree, held: &BTreeSet<RelPath>) -> BTreeMap<RelPath, u64> {
    let mut found: BTreeMap<RelPath, DefaultHasher> = BTreeMap::new();
    let mut current: Option<RelPath> = None;
    for entry in tree.entries() {
        let path = &entry.path;
        if !current.as_ref().is_some_and(|unit| path.is_within(unit)) {
            let is_unit = entry.content == Content::Directory && rules.is_unit(path) && !held.contains(path);
            current = is_unit.then(|| path.clone());
        }
        if let Some(unit) = &current {
            let size = entry.file().map(|(size, _)| size);
            (path, size, entry.mtime.seconds, entry.mtime.nanoseconds).hash(found.entry(unit.clone()).or_default());
        }
    }
    found.into_iter().map(|(unit, hasher)| (unit, hasher.finish())).collect()
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
        if named.is_some_and(|named| lies_in(held, &named)) {
            found.insert(path.clone());
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::fs;
    use std::path::Path;

    use super::*;
    use crate::endpoint::local::LocalSource;
    use crate::endpoint::{Reader, Scan};
    use crate::manifest::Digest;
    use crate::monitor::Silent;

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

    /// A source that lists as much as `hides` leaves of it, and in which `afterwards` happens when it was listed.
    struct Meddled {
        source: LocalSource,
        hides: Option<&'static str>,
        afterwards: Box<dyn Fn() + Send + Sync>,
    }

    impl Source for Meddled {
        fn describe(&self) -> String {
            self.source.describe()
        }

        fn scan(&self, options: &ScanOptions, monitor: &dyn Monitor) -> Result<Scan, Error> {
            let mut options = options.clone();
            options.filter.rules.extend(self.hides.map(str::to_owned));
            let scan = self.source.scan(&options, monitor)?;
            (self.afterwards)();
            Ok(scan)
        }

        fn reader(&self, tree: Arc<Tree>) -> Result<Box<dyn Reader + '_>, Error> {
            self.source.reader(tree)
        }

        fn remember(&self, _: &Tree, _: &[(u32, Digest)]) {}
    }

    /// A look at `root`, of which the first list is without what `hides` says, and is followed by `afterwards`.
    fn looks(
        root: &Path,
        looked: &Looked,
        hides: Option<&'static str>,
        afterwards: impl Fn() + Send + Sync + Clone + 'static,
    ) -> Found {
        let text = "[[job]]\nname = 'j'\nsource = 'h:/s'\ntargets = ['/t']\nunit = 'ckpt-*/'\nready = '_SUCCESS'\nsettle = '0s'\n";
        let job = crate::config::Config::parse("c".as_ref(), text).unwrap().jobs.remove(0);
        let lists = Cell::new(0);
        let connect = || -> Result<Box<dyn Source>, Trouble> {
            lists.set(lists.get() + 1);
            let is_first = lists.get() == 1;
            let afterwards: Box<dyn Fn() + Send + Sync> =
                if is_first { Box::new(afterwards.clone()) } else { Box::new(|| {}) };
            let source = LocalSource::new(root, None).unwrap();
            Ok(Box::new(Meddled { source, hides: hides.filter(|_| is_first), afterwards }))
        };
        look(&job, &ScanOptions::default(), looked, &connect, &Silent::default(), &AtomicBool::new(false)).unwrap()
    }

    /// What is to be fetched of it: the paths, and what `latest` says where it is handed on.
    fn fetched(found: &Found) -> Option<(Vec<String>, Option<String>)> {
        let scan = found.source.scan(&ScanOptions::default(), &Silent::default());
        let tree = Arc::new(scan.ok()?.tree);
        let mut reader = found.source.reader(Arc::clone(&tree)).unwrap();
        let latest = tree.position(&RelPath::new("latest").unwrap()).unwrap();
        let mut said = None;
        if tree.entries()[latest].file().is_some() {
            reader.push(Fetch::of(latest as u32));
            if let Some(Produced::Whole { block, .. }) = reader.next().unwrap() {
                said = Some(String::from_utf8(block.data().to_vec()).unwrap());
            }
        }
        Some((tree.entries().iter().map(|entry| entry.path.to_string()).collect(), said))
    }

    fn save(root: &Path, unit: &str) {
        fs::create_dir_all(root.join(unit)).unwrap();
        fs::write(root.join(unit).join("w"), unit).unwrap();
        fs::write(root.join(unit).join("_SUCCESS"), "").unwrap();
    }

    const FIRST: [&str; 4] = ["ckpt-1", "ckpt-1/_SUCCESS", "ckpt-1/w", "latest"];

    #[test]
    fn a_pointer_that_was_replaced_after_the_list_waits_for_what_it_names() {
        let at = tempfile::tempdir().unwrap();
        let (root, looked) = (at.path().to_owned(), Looked::default());
        save(&root, "ckpt-1");
        fs::write(root.join("latest"), "ckpt-1").unwrap();
        let found = looks(&root, &looked, None, || {});
        assert_eq!(fetched(&found), Some((FIRST.map(String::from).to_vec(), Some("ckpt-1".into()))));
        let time = fs::metadata(root.join("latest")).unwrap().modified().unwrap();
        let writer = root.clone();
        let found = looks(&root, &looked, None, move || {
            save(&writer, "ckpt-2");
            // A server that tells whole seconds does not tell it from the one that was listed.
            fs::write(writer.join("latest"), "ckpt-2").unwrap();
            fs::File::options().write(true).open(writer.join("latest")).unwrap().set_modified(time).unwrap();
        });
        assert_eq!(fetched(&found), Some((FIRST.map(String::from).to_vec(), None)));
        let (paths, said) = fetched(&looks(&root, &looked, None, || {})).unwrap();
        assert!(paths.contains(&"ckpt-2/w".to_owned()) && said.as_deref() == Some("ckpt-2"), "{paths:?} {said:?}");
    }

    #[test]
    fn a_pointer_to_nothing_is_fetched_when_the_next_list_has_not_got_it_either() {
        for link in [false, true] {
            let at = tempfile::tempdir().unwrap();
            let (root, looked) = (at.path().to_owned(), Looked::default());
            match link {
                true => std::os::unix::fs::symlink("ckpt-9", root.join("latest")).unwrap(),
                false => fs::write(root.join("latest"), "ckpt-9").unwrap(),
            }
            let first = fetched(&looks(&root, &looked, None, || {}));
            assert_eq!(first, (!link).then(|| (vec!["latest".into()], None)), "{link}");
            let said = (!link).then(|| "ckpt-9".into());
            for _ in 0..2 {
                let found = looks(&root, &looked, None, || {});
                assert_eq!(fetched(&found), Some((vec!["latest".into()], said.clone())), "{link}");
            }
        }
    }

    #[test]
    fn a_unit_that_was_completed_while_it_was_listed_waits_for_the_next_look() {
        let at = tempfile::tempdir().unwrap();
        let (root, looked) = (at.path().to_owned(), Looked::default());
        save(&root, "ckpt-1");
        fs::write(root.join("latest"), "ckpt-1").unwrap();
        let found = looks(&root, &looked, Some("ckpt-1/w"), || {});
        assert!(found.being_written);
        assert_eq!(found.held.iter().map(ToString::to_string).collect::<Vec<_>>(), ["ckpt-1", "latest"]);
        let found = looks(&root, &looked, None, || {});
        assert!(!found.being_written && found.held.is_empty());
    }
}
