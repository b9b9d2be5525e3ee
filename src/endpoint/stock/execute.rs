//! Does the steps of a publication, many of them in flight.

use std::collections::BTreeSet;

use super::append::append;
use super::record::{Record, Recorded};
use super::session::{self, Refusal, Reply, Session, about, extended};
use super::stage::replace;
use super::target::{Permissions, Run};
use super::trash::Trash;
use super::writer::grant;
use super::{DIRECTORY, SYMLINK, below, is_file, kind_of, moved, whole_seconds};
use crate::endpoint::Error;
use crate::manifest::{Content, Entry, Timestamp, Tree};
use crate::path::RelPath;
use crate::plan::publish::Step;
use crate::wire::sftp::{Attributes, packet};

/// What failed while the others went on.
#[derive(Debug, Default)]
pub(super) struct Problems {
    /// Paths, escaped, and why.
    pub(super) told: Vec<(String, String)>,
    /// Paths that are as they were before.
    pub(super) unpublished: BTreeSet<RelPath>,
}

impl Problems {
    /// Whether a path, or a directory above it, is as it was before.
    pub(super) fn left(&self, path: &RelPath) -> bool {
        self.unpublished.contains(path) || path.ancestors().any(|above| self.unpublished.contains(&above))
    }

    pub(super) fn tell(&mut self, path: &RelPath, what: String) {
        self.told.push((path.to_string(), what));
    }
}

/// A step and what became of it.
type Done<'a> = (&'a Recorded, Result<(), Refusal>);

/// Does the steps. Those that the state of the target forbids are told and left; after one no pointer is published.
/// `compared` is what the target was when it was compared with `tree`; of a record of which a part was done before that is not known.
pub(super) fn execute(run: &Run, record: &Record, tree: &Tree, compared: Option<&Tree>) -> Result<Problems, Error> {
    let again = compared.is_none();
    let mut problems = Problems::default();
    if again {
        moved::look_again(run, record, &mut problems)?;
    }
    let steps = &record.steps;
    let (pointers, content): (Vec<&Recorded>, Vec<&Recorded>) = steps.iter().partition(|recorded| recorded.pointer);
    let how = How { tree, compared, trash: record.trash.as_deref().map(|name| Trash::new(run, name)) };
    let parents = |of: &[&Recorded]| -> BTreeSet<RelPath> {
        of.iter().filter_map(|recorded| recorded.step.path().parent()).collect()
    };
    let later = parents(&pointers);
    let mut touched = parents(&content);
    let new = content.iter().filter(|recorded| matches!(recorded.step, Step::NewDirectory(_)));
    touched.extend(new.map(|recorded| recorded.step.path().clone()));
    // What happened in a directory moved its time; and new ones still have the mode they were staged with.
    let dated = touched.difference(&later);
    let dated = dated.filter(|path| tree.get(path).is_some_and(Entry::is_directory)).cloned().collect();
    let later_steps = moved::later(record);
    let is_later = |recorded: &&Recorded| match recorded.step {
        Step::RemoveFile(_) | Step::RemoveDirectory(_) => later_steps.contains(recorded.step.path()),
        // What is in them moves their times.
        Step::ApplyMetadata(_) => !later_steps.is_empty(),
        _ => false,
    };
    let (old_names, content): (Vec<&Recorded>, Vec<&Recorded>) = content.into_iter().partition(is_later);
    if old_names.is_empty() {
        perform(run, &content, dated, &how, &mut problems)?;
    } else {
        perform(run, &content, BTreeSet::new(), &how, &mut problems)?;
        let staying = moved::staying(record, &problems);
        let stays = |recorded: &&Recorded| recorded.is_removal() && staying.contains(recorded.step.path());
        let (kept, going): (Vec<&Recorded>, Vec<&Recorded>) = old_names.into_iter().partition(stays);
        problems.unpublished.extend(kept.into_iter().map(|recorded| recorded.step.path().clone()));
        perform(run, &going, dated, &how, &mut problems)?;
    }
    let later = later.into_iter().filter(|path| tree.get(path).is_some_and(Entry::is_directory)).collect();
    if problems.told.is_empty() {
        perform(run, &pointers, later, &how, &mut problems)?;
    } else {
        let held = "is not published, because something that it may point to could not be; push again";
        for recorded in pointers {
            problems.tell(recorded.step.path(), held.to_owned());
            problems.unpublished.insert(recorded.step.path().clone());
        }
        perform(run, &[], later, &how, &mut problems)?;
    }
    Ok(problems)
}

/// How steps are done.
struct How<'a> {
    tree: &'a Tree,
    compared: Option<&'a Tree>,
    trash: Option<Trash<'a>>,
}

/// Does steps, then settles owner, mode and times of what has its name already: of what the steps say, and of directories that
/// they `moved` the times of.
fn perform(
    run: &Run,
    steps: &[&Recorded],
    mut moved: BTreeSet<RelPath>,
    how: &How<'_>,
    problems: &mut Problems,
) -> Result<(), Error> {
    let session = &run.session;
    let How { tree, compared, trash } = how;
    let again = compared.is_none();
    let staged = |recorded: &Recorded| {
        let tree: &[u8] = if recorded.pointer { b"/last/" } else { b"/tree/" };
        [&run.staging[..], tree, recorded.step.path().as_bytes()].concat()
    };
    let (stuck, removed) = match trash {
        Some(trash) => (trash.prepare(steps, &staged)?, trash.directories(steps)?),
        None => Default::default(),
    };
    let growing: Vec<&Recorded> = steps.iter().copied().filter(|recorded| recorded.append.is_some()).collect();
    let steps: Vec<&Recorded> = steps.iter().copied().filter(|recorded| recorded.append.is_none()).collect();
    let mut batch: Vec<(&Recorded, Vec<u8>)> = Vec::new();
    let mut results: Vec<Done<'_>> = Vec::new();
    for recorded in steps {
        if let Some(refusal) = stuck.get(recorded.step.path()) {
            let reason = format!("what it replaces cannot be moved to the trash: {refusal}");
            problems.tell(recorded.step.path(), recorded.describe(&reason));
            problems.unpublished.insert(recorded.step.path().clone());
            continue;
        }
        let path = below(&run.root, recorded.step.path());
        let request = match &recorded.step {
            Step::Replace(_) if session.offers.posix_rename => {
                extended("posix-rename@openssh.com", &[&staged(recorded), &path])
            }
            Step::Replace(_) => {
                let before = std::mem::take(&mut batch);
                results.extend(flush(session, before)?);
                results.push((recorded, replace(session, &staged(recorded), &path)?));
                continue;
            }
            Step::NewDirectory(_) => session::request(packet::RENAME).string(&staged(recorded)).string(&path).finish(),
            // SFTP cannot do it, and no run asks for it.
            Step::Exchange(path) | Step::TakeAway(path) => {
                problems.tell(path, "cannot be exchanged or taken away over SFTP".into());
                continue;
            }
            Step::ApplyMetadata(path) => {
                moved.insert(path.clone());
                continue;
            }
            Step::RemoveFile(_) => match trash {
                Some(trash) => trash.take(recorded.step.path()),
                None => about(packet::REMOVE, &path),
            },
            Step::RemoveDirectory(_) => about(packet::RMDIR, &path),
        };
        batch.push((recorded, request));
    }
    let known = compared.map_or(Known::Nothing, Known::Compared);
    let settled = Settled::new(run, moved.iter().filter_map(|path| tree.get(path)), known);
    // They are looked at in the same flight, behind the steps.
    let (steps, packets): (Vec<_>, Vec<_>) = batch.into_iter().unzip();
    let mut replies = session.batch(packets.into_iter().chain(settled.looks()))?;
    let found = replies.split_off(steps.len());
    for (recorded, reply) in steps.into_iter().zip(replies) {
        results.push((recorded, session.status(reply)?));
    }
    for (recorded, result) in results {
        let Err(refusal) = result else { continue };
        let path = below(&run.root, recorded.step.path());
        let done_before = match recorded.step {
            // What was to make room for a directory has done so.
            Step::RemoveFile(_) if again && !refusal.is_missing() => {
                session.stat(packet::LSTAT, &path)?.is_ok_and(|found| kind_of(&found) == Some(DIRECTORY))
            }
            Step::RemoveFile(_) | Step::RemoveDirectory(_) => refusal.is_missing(),
            _ => {
                again
                    && session.stat(packet::LSTAT, &staged(recorded))?.is_err_and(|gone| gone.is_missing())
                    && session.stat(packet::LSTAT, &path)?.is_ok()
            }
        };
        if !done_before {
            problems.tell(recorded.step.path(), recorded.describe(&refusal.to_string()));
            problems.unpublished.insert(recorded.step.path().clone());
        }
    }
    if let Some(trash) = trash {
        trash.finish(&removed)?;
    }
    settled.apply(run, found, problems)?;
    // After the markers that go.
    let grown = append(run, growing.into_iter(), tree, again, problems)?;
    if grown.is_empty() {
        return Ok(());
    }
    let settled = Settled::new(run, grown.into_iter().filter_map(|path| tree.get(path)), Known::Proven);
    let found = session.batch(settled.looks())?;
    settled.apply(run, found, problems)
}

fn flush<'a>(session: &Session, batch: Vec<(&'a Recorded, Vec<u8>)>) -> Result<Vec<Done<'a>>, Error> {
    let (steps, packets): (Vec<_>, Vec<_>) = batch.into_iter().unzip();
    Ok(steps.into_iter().zip(session.all(packets)?).collect())
}

/// What is known of the files that are settled.
enum Known<'a> {
    /// That they are what is listed, since a moment ago.
    Proven,
    /// What they were when they were compared.
    Compared(&'a Tree),
    /// They keep the time that they have, and the next run compares them.
    Nothing,
}

impl Known<'_> {
    /// Whether somebody else has changed a file meanwhile: the time that it is to get would hide that.
    fn is_changed(&self, entry: &Entry, now: &Attributes) -> bool {
        let Known::Compared(tree) = self else { return false };
        let before = tree.get(&entry.path).and_then(|before| Some((before.file()?.0, before.mtime.seconds)));
        entry.file().is_some()
            && now.times.is_some()
            && before.is_some_and(|(size, seconds)| !is_file(now, size, seconds))
    }

    /// The time that it gets.
    fn time_of(&self, entry: &Entry, now: &Attributes) -> Timestamp {
        match (self, now.times) {
            (Known::Nothing, Some((_, modified))) if entry.file().is_some() => {
                Timestamp { seconds: modified.into(), nanoseconds: 0 }
            }
            _ => whole_seconds(entry.mtime),
        }
    }
}

/// What has its final name, and is to get owner, mode and times that the manifest says, from the leaves up. A link that took the
/// place of one is not followed.
struct Settled<'a> {
    entries: Vec<&'a Entry>,
    paths: Vec<Vec<u8>>,
    known: Known<'a>,
}

impl<'a> Settled<'a> {
    fn new(run: &Run, entries: impl DoubleEndedIterator<Item = &'a Entry>, known: Known<'a>) -> Settled<'a> {
        let is_link = |entry: &&Entry| matches!(entry.content, Content::Symlink { .. });
        let entries: Vec<&Entry> = entries.rev().filter(|entry| !is_link(entry)).collect();
        let paths = entries.iter().map(|entry| below(&run.root, &entry.path)).collect();
        Settled { entries, paths, known }
    }

    /// What is to be asked first.
    fn looks(&self) -> impl Iterator<Item = Vec<u8>> + '_ {
        self.paths.iter().map(|path| about(packet::LSTAT, path))
    }

    fn apply(&self, run: &Run, found: Vec<Reply>, problems: &mut Problems) -> Result<(), Error> {
        let Settled { entries, paths, known } = self;
        let session = &run.session;
        let mut there = Vec::with_capacity(entries.len());
        for (number, found) in found.into_iter().enumerate() {
            let mut problem = |what: String| problems.tell(&entries[number].path, what);
            match found {
                Reply::Attributes(found) if known.is_changed(entries[number], &found) => {
                    problem(
                        "was changed by somebody else after it was compared; the next run looks at it again".into(),
                    );
                }
                Reply::Attributes(found) if kind_of(&found) != Some(SYMLINK) => there.push((number, found)),
                Reply::Attributes(_) => problem("has become a symbolic link".into()),
                Reply::Refused(refusal) => problem(refusal.to_string()),
                _ => return Err(session.odd()),
            }
        }
        let wanted = wanted(run, entries, &there, known)?;
        let kind = if session.offers.lsetstat { packet::EXTENDED } else { packet::SETSTAT };
        let mut left = settle_permissions(session, kind, paths, &wanted)?;
        if kind == packet::EXTENDED && !left.is_empty() {
            // RACE: the server cannot set a mode without following links where it has no /proc. What is there was no link
            // when it was looked at, a moment ago.
            let again: Vec<_> =
                wanted.into_iter().filter(|(number, _)| left.iter().any(|(at, _)| at == number)).collect();
            left = settle_permissions(session, packet::SETSTAT, paths, &again)?;
        }
        for (number, refusal) in left {
            problems.tell(&entries[number].path, format!("cannot set its owner, mode and time: {refusal}"));
        }
        Ok(())
    }
}

/// What each of `there` is to have. An owner that it has already is left out: only few may give files away.
fn wanted(
    run: &Run,
    entries: &[&Entry],
    there: &[(usize, Attributes)],
    known: &Known<'_>,
) -> Result<Vec<(usize, Permissions)>, Error> {
    let owners = |pick: fn((u32, u32)) -> u32| -> BTreeSet<u32> {
        there.iter().filter_map(|(_, found)| found.owner.map(pick)).collect()
    };
    let mut names = super::target::locked(&run.names);
    names.learn(&run.session, &owners(|owner| owner.0), &owners(|owner| owner.1))?;
    let mut wanted = Vec::with_capacity(there.len());
    for (number, found) in there {
        let entry = entries[*number];
        let (user, group) = found.owner.unwrap_or_default();
        let mut permissions =
            Permissions { mode: entry.mode, uid: None, gid: None, mtime: known.time_of(entry, found) };
        if names.user(user) != entry.owner {
            permissions.uid = run.ids.user(&run.session, &run.shell, &entry.owner)?.ok();
        }
        if names.group(group) != entry.group {
            permissions.gid = run.ids.group(&run.session, &run.shell, &entry.group)?.ok();
        }
        wanted.push((*number, permissions));
    }
    Ok(wanted)
}

/// Those that were refused, each once.
fn settle_permissions(
    session: &Session,
    kind: u8,
    paths: &[Vec<u8>],
    wanted: &[(usize, Permissions)],
) -> Result<Vec<(usize, Refusal)>, Error> {
    let mut requests = Vec::new();
    let mut asked = Vec::new();
    for (number, wanted) in wanted {
        for packet in grant(kind, &paths[*number], wanted) {
            asked.push(*number);
            requests.push(packet);
        }
    }
    let results = asked.into_iter().zip(session.all(requests)?);
    let mut refused: Vec<(usize, Refusal)> =
        results.filter_map(|(number, result)| Some((number, result.err()?))).collect();
    refused.dedup_by_key(|(number, _)| *number);
    Ok(refused)
}
