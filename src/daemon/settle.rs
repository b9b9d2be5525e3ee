//! When what changed may be sent. Pure: hints and the time go in, questions and paths that are ready come out.
//!
//! What always holds: a path leaves only as ready, as gone, or by [`Settle::shrink`], after which everything is looked at. A unit
//! is one path, whatever changes in it. What is open for writing is not ready.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use super::early::Early;
use super::temporary::{is_temporary, marks_of};
use crate::config::Ready as WhenReady;
use crate::path::RelPath;

mod rules;

pub(super) use rules::Rules;

/// Something that was written and not closed is asked about after so much silence, then half as often each time.
const PROBE: Duration = Duration::from_secs(1);
const PROBE_MAX: Duration = Duration::from_secs(60);
/// Where it cannot be seen who has a file open, silence for so long counts as closed.
const UNTOLD: Duration = Duration::from_secs(600);
/// More paths than this are not remembered one by one.
pub(super) const WAITING_MAX: usize = 100_000;
/// Files that name a checkpoint, wherever they are.
pub(super) const POINTERS: [&[u8]; 2] = [b"latest", b"latest_checkpointed_iteration.txt"];

/// What only a look at the files can answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Ask {
    /// Which of these has somebody open for writing? ([`Settle::held`])
    Held(Vec<RelPath>),
    /// Is this unit complete? ([`Settle::complete`])
    Complete(RelPath),
    /// What does this pointer name? ([`Settle::names`])
    Names(RelPath),
}

/// Whether somebody has a file open for writing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Held {
    Yes,
    No,
    /// Not all processes could be looked at.
    Untold,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum What {
    File,
    /// A file that only grows, and is in no unit: it is never finished, and may be sent whenever it has not been for a while.
    Growing,
    Directory,
    Gone,
    Unit,
    Pointer,
}

#[derive(Debug)]
struct Waiting {
    what: What,
    /// The last change.
    last: Instant,
    /// Its marker was just made: it need not be left alone.
    hurry: bool,
    /// A unit that was looked at and is not complete.
    refused: bool,
    /// What a pointer names, once it was asked; the inner `None` where that is not known.
    names: Option<Option<RelPath>>,
}

#[derive(Debug)]
struct Open {
    last: Instant,
    /// It was seen being written; otherwise it was only found.
    seen: bool,
    probe: Instant,
    pause: Duration,
}

enum Verdict {
    Ready,
    Later(Instant),
    /// Until something else happens.
    Blocked,
    Ask(Ask),
}

/// What changed and is not finished.
#[derive(Debug)]
pub(super) struct Settle {
    rules: Rules,
    waiting: BTreeMap<RelPath, Waiting>,
    open: BTreeMap<RelPath, Open>,
    temporary: BTreeSet<RelPath>,
    ready: BTreeSet<RelPath>,
    early: Early,
    /// Nothing is due before.
    soonest: Option<Instant>,
}

/// What lies at a directory or below it: paths order so that it is in one piece.
fn within<'a, T>(map: &'a BTreeMap<RelPath, T>, top: &'a RelPath) -> impl Iterator<Item = (&'a RelPath, &'a T)> {
    map.range(top.clone()..).take_while(move |(path, _)| path.is_within(top))
}

fn drop_within<T>(map: &mut BTreeMap<RelPath, T>, top: &RelPath) -> Vec<(RelPath, T)> {
    let paths: Vec<RelPath> = within(map, top).map(|(path, _)| path.clone()).collect();
    paths.into_iter().filter_map(|path| map.remove_entry(&path)).collect()
}

impl Settle {
    pub(super) fn new(rules: Rules) -> Settle {
        Settle {
            rules,
            waiting: BTreeMap::new(),
            open: BTreeMap::new(),
            temporary: BTreeSet::new(),
            ready: BTreeSet::new(),
            early: Early::default(),
            soonest: None,
        }
    }

    /// The unit that a path lies in or is, and the topmost name of it that is temporary.
    fn place(&self, path: &RelPath, directory: bool) -> (Option<RelPath>, Option<RelPath>) {
        let mut unit = None;
        for (above, directory) in path.ancestors().map(|above| (above, true)).chain([(path.clone(), directory)]) {
            if is_temporary(above.name()) {
                return (unit, Some(above));
            }
            if unit.is_none() && directory && self.rules.is_unit(&above) {
                unit = Some(above);
            }
        }
        (unit, None)
    }

    fn grows(&self, path: &RelPath) -> bool {
        self.rules.grows(path) && self.place(path, false) == (None, None) && !self.rules.is_pointer(path, false)
    }

    /// A file is being written.
    pub(super) fn written(&mut self, path: &RelPath, now: Instant) {
        if self.grows(path) {
            self.open.remove(path);
            return self.touch(path, false, now);
        }
        let probe = now + self.rules.settle.max(PROBE);
        self.open.insert(path.clone(), Open { last: now, seen: true, probe, pause: PROBE });
        self.wake(probe);
        self.early.forget(path);
        self.touch(path, false, now);
    }

    /// A file is closed that lies in a unit: it need not wait for the rest of it to be brought. Markers and pointers are made
    /// when all else is there.
    fn may_be_early(&mut self, path: &RelPath, at: Instant) {
        let (Some(unit), None) = self.place(path, false) else { return };
        if unit != *path && !self.rules.is_marker(&unit, path) && !self.rules.is_pointer(path, false) {
            self.early.add(path, at);
            self.wake(at + self.rules.settle);
        }
    }

    /// A file was closed by whoever wrote it.
    pub(super) fn closed(&mut self, path: &RelPath, now: Instant) {
        self.open.remove(path);
        self.touch(path, false, now);
        self.may_be_early(path, now);
    }

    /// Something appeared whole, or its metadata changed.
    pub(super) fn touched(&mut self, path: &RelPath, directory: bool, now: Instant) {
        self.touch(path, directory, now);
    }

    /// Something was found that may have been written without being seen: a directory was made, then filled, before it was
    /// watched.
    pub(super) fn found_new(&mut self, path: &RelPath, file: bool, directory: bool, now: Instant) {
        if file && !self.open.contains_key(path) && !self.grows(path) {
            self.open.insert(path.clone(), Open { last: now, seen: false, probe: now, pause: PROBE });
            self.wake(now);
        }
        self.touch(path, directory, now);
    }

    /// Something was found while everything was looked at; it changed so long ago. What is old is finished, except what has
    /// to be judged by more than its age.
    pub(super) fn found(&mut self, path: &RelPath, directory: bool, age: Duration, held: bool, now: Instant) {
        let changed = now.checked_sub(age.min(self.rules.settle)).unwrap_or(now);
        let held = held && !self.grows(path);
        if held && !self.open.contains_key(path) {
            let probe = now + PROBE;
            self.open.insert(path.clone(), Open { last: changed, seen: true, probe, pause: PROBE });
            self.wake(probe);
        }
        let judged = || {
            let (unit, temporary) = self.place(path, directory);
            temporary.is_some()
                || (unit.is_some() && self.rules.ready != WhenReady::Settled)
                || self.rules.is_pointer(path, directory)
        };
        if held || age < self.rules.settle || judged() {
            self.touch(path, directory, changed);
            if !held && !directory {
                self.may_be_early(path, changed);
            }
        }
    }

    /// Something is not there any more.
    pub(super) fn gone(&mut self, path: &RelPath, now: Instant) {
        if self.waiting.get(path).is_some_and(|waiting| waiting.what == What::Gone) {
            return;
        }
        self.forget(path);
        match self.place(path, false) {
            (Some(unit), _) => self.enter(unit, What::Unit, now, false),
            (None, Some(_)) => {}
            (None, None) => self.enter(path.clone(), What::Gone, now, false),
        }
        self.wake(now);
    }

    /// Something, with what is in it, is nothing to wait for any more.
    pub(super) fn forget(&mut self, path: &RelPath) {
        drop_within(&mut self.waiting, path);
        drop_within(&mut self.open, path);
        self.early.forget(path);
        self.temporary.retain(|temporary| !temporary.is_within(path));
    }

    /// Something got another name. What lies in a directory has to be found anew.
    pub(super) fn moved(&mut self, from: &RelPath, to: &RelPath, directory: bool, now: Instant) {
        let open = drop_within(&mut self.open, from);
        self.gone(from, now);
        drop_within(&mut self.open, to);
        for (path, open) in open {
            let path = match path.strip_prefix(from) {
                Some(below) => to.join(below.as_bytes()),
                None => Ok(to.clone()),
            };
            if let Ok(path) = path
                && !self.grows(&path)
            {
                self.wake(open.probe);
                self.open.insert(path, open);
            }
        }
        self.touch(to, directory, now);
        if !directory && !self.open.contains_key(to) {
            self.may_be_early(to, now);
        }
    }

    fn touch(&mut self, path: &RelPath, directory: bool, at: Instant) {
        let (unit, temporary) = self.place(path, directory);
        let is_temporary = temporary.is_some();
        self.temporary.extend(temporary);
        if let Some(unit) = unit {
            let hurry = self.rules.is_marker(&unit, path) && !self.open.contains_key(path);
            return self.enter(unit, What::Unit, at, hurry);
        }
        if is_temporary {
            return;
        }
        // What lies in a directory takes the directory along.
        for above in path.ancestors() {
            if self.waiting.get(&above).is_some_and(|above| above.what == What::Directory) {
                self.waiting.remove(&above);
            }
        }
        if self.rules.is_pointer(path, directory) {
            // Some units are complete when a pointer says so.
            let parent = path.parent();
            for (unit, waiting) in &mut self.waiting {
                if parent.as_ref().is_none_or(|parent| unit.is_within(parent)) {
                    waiting.refused = false;
                }
            }
            self.wake(at);
            return self.enter(path.clone(), What::Pointer, at, false);
        }
        let what = match directory {
            true => What::Directory,
            false if self.grows(path) => What::Growing,
            false => What::File,
        };
        self.enter(path.clone(), what, at, false);
    }

    fn enter(&mut self, path: RelPath, what: What, at: Instant, hurry: bool) {
        // What was ready a moment ago changes again.
        if what != What::Growing {
            self.ready.remove(&path);
        }
        let new = Waiting { what, last: at, hurry, refused: false, names: None };
        let settle = self.rules.settle;
        let waiting = self
            .waiting
            .entry(path)
            .and_modify(|known| {
                let waits = what == What::Growing && known.what == What::Growing;
                let last = if waits { known.last } else { known.last.max(at) };
                *known = Waiting { last, ..Waiting { what, last, hurry, refused: false, names: None } };
            })
            .or_insert(new);
        let due = if hurry { waiting.last } else { waiting.last + settle };
        self.wake(due);
    }

    fn wake(&mut self, at: Instant) {
        self.soonest = Some(self.soonest.map_or(at, |soonest| soonest.min(at)));
    }

    /// When [`Settle::due`] is to be called.
    pub(super) fn next(&self) -> Option<Instant> {
        self.soonest
    }

    /// The paths that would be judged now.
    pub(super) fn due_paths(&self, now: Instant) -> Vec<RelPath> {
        let due = |waiting: &&Waiting| waiting.last + self.rules.settle <= now && !waiting.refused;
        self.waiting.iter().filter(|(_, waiting)| due(waiting)).map(|(path, _)| path.clone()).collect()
    }

    /// Judges what is due. Ask again after the questions were answered, until there are none.
    pub(super) fn due(&mut self, now: Instant) -> Vec<Ask> {
        if self.soonest.is_none_or(|soonest| soonest > now) {
            return Vec::new();
        }
        self.soonest = None;
        let mut asks = Vec::new();
        let (due, later): (Vec<_>, Vec<_>) = self.open.iter().partition(|(_, open)| open.probe <= now);
        let soonest = later.iter().map(|(_, open)| open.probe).min();
        if !due.is_empty() {
            asks.push(Ask::Held(due.into_iter().map(|(path, _)| path.clone()).collect()));
        }
        soonest.into_iter().for_each(|at| self.wake(at));
        self.early.due(now, self.rules.settle).into_iter().for_each(|at| self.wake(at));
        // Pointers last: they wait for what they name.
        for pointers in [false, true] {
            let (mut judged, mut later) = (Vec::new(), None::<Instant>);
            for (path, waiting) in self.waiting.iter().filter(|(_, of)| (of.what == What::Pointer) == pointers) {
                match self.judge(path, waiting, now) {
                    Verdict::Blocked => {}
                    Verdict::Later(at) => later = Some(later.map_or(at, |later| later.min(at))),
                    Verdict::Ready => judged.push(path.clone()),
                    Verdict::Ask(ask) => asks.push(ask),
                }
            }
            later.into_iter().for_each(|at| self.wake(at));
            // A directory waits for what is in it, a pointer for what it names.
            if !judged.is_empty() && self.waiting.len() > judged.len() {
                self.wake(now);
            }
            for path in judged {
                self.waiting.remove(&path);
                self.early.forget(&path);
                self.ready.insert(path);
            }
        }
        asks
    }

    fn judge(&self, path: &RelPath, waiting: &Waiting, now: Instant) -> Verdict {
        let due = if waiting.hurry { waiting.last } else { waiting.last + self.rules.settle };
        if due > now {
            return Verdict::Later(due);
        }
        if within(&self.open, path).next().is_some() || self.is_marked(path) {
            return Verdict::Blocked;
        }
        let has_temporary = || self.temporary.range(path.clone()..).next().is_some_and(|found| found.is_within(path));
        match (waiting.what, &self.rules.ready) {
            (What::File | What::Growing | What::Gone, _) => Verdict::Ready,
            // It would take along what is not finished in it.
            (What::Directory, _) if has_temporary() || within(&self.waiting, path).nth(1).is_some() => Verdict::Blocked,
            (What::Directory, _) => Verdict::Ready,
            (What::Unit, _) if waiting.refused => Verdict::Blocked,
            (What::Unit, WhenReady::Settled) if has_temporary() => Verdict::Blocked,
            (What::Unit, WhenReady::Settled) => Verdict::Ready,
            (What::Unit, _) => Verdict::Ask(Ask::Complete(path.clone())),
            (What::Pointer, _) => match &waiting.names {
                None => Verdict::Ask(Ask::Names(path.clone())),
                Some(Some(named)) if self.is_unfinished(named) => Verdict::Blocked,
                Some(None) if self.is_busy_beside(path) => Verdict::Blocked,
                Some(_) => Verdict::Ready,
            },
        }
    }

    fn is_marked(&self, path: &RelPath) -> bool {
        let parent = path.parent();
        let beside = |mark: Vec<u8>| parent.as_ref().map_or_else(|| RelPath::new(&mark), |parent| parent.join(&mark));
        !self.temporary.is_empty()
            && marks_of(path.name()).filter_map(|mark| beside(mark).ok()).any(|mark| self.temporary.contains(&mark))
    }

    /// Whether a path, something in it, or a unit around it waits.
    fn is_unfinished(&self, path: &RelPath) -> bool {
        let counts = |waiting: &Waiting| matches!(waiting.what, What::File | What::Unit);
        within(&self.waiting, path).any(|(_, waiting)| counts(waiting))
            || path.ancestors().any(|above| self.waiting.get(&above).is_some_and(counts))
            || self.is_marked(path)
    }

    /// Whether a unit beside a pointer is being written.
    fn is_busy_beside(&self, pointer: &RelPath) -> bool {
        let parent = pointer.parent();
        let busy = |waiting: &Waiting| waiting.what == What::Unit && !waiting.refused;
        self.waiting
            .iter()
            .any(|(path, waiting)| busy(waiting) && parent.as_ref().is_none_or(|parent| path.is_within(parent)))
    }

    /// Whether somebody has a file open for writing: the answer to [`Ask::Held`].
    pub(super) fn held(&mut self, path: &RelPath, held: Held, now: Instant) {
        let settle = self.rules.settle;
        let Some(open) = self.open.get_mut(path) else { return };
        let quiet = now.saturating_duration_since(open.last);
        let closed = match held {
            Held::Yes => {
                open.seen = true;
                false
            }
            Held::No => true,
            Held::Untold => !open.seen || quiet >= UNTOLD.max(settle),
        };
        if closed {
            let last = self.open.remove(path).map_or(now, |open| open.last);
            self.may_be_early(path, last);
            if let (Some(unit), _) = self.place(path, false)
                && self.rules.is_marker(&unit, path)
                && let Some(waiting) = self.waiting.get_mut(&unit)
            {
                waiting.hurry = true;
            }
            self.wake(now);
        } else {
            open.pause = (open.pause * 2).min(PROBE_MAX);
            open.probe = now + open.pause;
            let probe = open.probe;
            self.wake(probe);
        }
    }

    /// The question about these files is put off.
    pub(super) fn ask_later(&mut self, paths: &[RelPath], at: Instant) {
        for path in paths {
            if let Some(open) = self.open.get_mut(path) {
                open.probe = at;
            }
        }
        self.wake(at);
    }

    /// Whether a unit is complete: the answer to [`Ask::Complete`].
    pub(super) fn complete(&mut self, unit: &RelPath, complete: bool, now: Instant) {
        if complete {
            self.waiting.remove(unit);
            self.early.forget(unit);
            self.ready.insert(unit.clone());
        } else if let Some(waiting) = self.waiting.get_mut(unit) {
            waiting.refused = true;
        }
        self.wake(now);
    }

    /// What a pointer names: the answer to [`Ask::Names`].
    pub(super) fn names(&mut self, pointer: &RelPath, named: Option<RelPath>, now: Instant) {
        if let Some(waiting) = self.waiting.get_mut(pointer) {
            waiting.names = Some(named);
        }
        self.wake(now);
    }

    /// What became ready since this was asked last.
    pub(super) fn take(&mut self) -> BTreeSet<RelPath> {
        std::mem::take(&mut self.ready)
    }

    /// Files of units that are not finished, which became finished since this was asked last.
    pub(super) fn take_early(&mut self) -> BTreeSet<RelPath> {
        self.early.take()
    }

    /// Whether a file itself is being written or was a moment ago, whatever it lies in.
    pub(super) fn is_file_in_hands(&self, path: &RelPath) -> bool {
        self.open.contains_key(path)
            || self.early.waits(path)
            || self.is_marked(path)
            || self.place(path, false).1.is_some()
    }

    /// What is not to be sent now: what is temporary, and what changed and is not finished.
    pub(super) fn unfinished(&self) -> impl Iterator<Item = &RelPath> {
        let is_held = |waiting: &Waiting| !matches!(waiting.what, What::Directory | What::Growing);
        let waiting = self.waiting.iter().filter(move |(_, waiting)| is_held(waiting));
        waiting.map(|(path, _)| path).chain(&self.temporary)
    }

    /// Whether a file changed and is not finished, or lies in a unit that is not.
    pub(super) fn is_in_hands(&self, path: &RelPath) -> bool {
        match self.place(path, false) {
            (_, Some(_)) => true,
            (Some(unit), _) => self.waiting.contains_key(&unit),
            (None, _) if self.grows(path) => false,
            (None, _) => self.waiting.contains_key(path) || self.open.contains_key(path) || self.is_marked(path),
        }
    }

    /// Whether a directory is in a unit or is one, or is in something temporary: what happens there is no news of its own.
    pub(super) fn is_part(&self, directory: &RelPath) -> bool {
        let (unit, temporary) = self.place(directory, true);
        unit.is_some() || temporary.is_some()
    }

    pub(super) fn knows_temporary(&self, path: &RelPath) -> bool {
        self.temporary.contains(path)
    }

    pub(super) fn when(&self) -> &WhenReady {
        &self.rules.ready
    }

    /// Every path that is remembered.
    pub(super) fn paths(&self) -> Vec<RelPath> {
        self.waiting.keys().chain(&self.temporary).chain(self.open.keys()).cloned().collect()
    }

    /// What waits for its time, and is there.
    pub(super) fn settling(&self) -> Vec<RelPath> {
        let settling = self.waiting.iter().filter(|(_, waiting)| waiting.what != What::Gone && !waiting.hurry);
        settling.map(|(path, _)| path.clone()).collect()
    }

    /// Somebody vouches for what lies there: it is finished, and need not be left alone.
    pub(super) fn vouched(&mut self, path: &RelPath, now: Instant) {
        drop_within(&mut self.open, path);
        if let Some(waiting) = self.waiting.get_mut(path) {
            (waiting.hurry, waiting.refused) = (true, false);
            waiting.last = waiting.last.min(now);
        }
        self.wake(now);
    }

    /// Nothing is judged before.
    pub(super) fn put_off(&mut self, until: Instant) {
        if !self.waiting.is_empty() {
            self.soonest = Some(until);
        }
    }

    /// Forgets single paths where they are too many. True when some were: everything has to be looked at then.
    pub(super) fn shrink(&mut self) -> bool {
        if self.waiting.len() <= WAITING_MAX {
            return false;
        }
        let open = &self.open;
        let kept = |path: &RelPath, waiting: &mut Waiting| waiting.what == What::Unit || open.contains_key(path);
        self.waiting.retain(kept);
        true
    }
}

#[cfg(test)]
mod tests;
