//! What a target has yet to get. Pure: what was noticed goes in, what is to be compared comes out, and goes back in where
//! the run failed.

use std::collections::BTreeSet;
use std::time::Instant;

use super::feed::Ready;
use crate::path::RelPath;

/// More single paths than this are not worth naming: everything is compared instead.
const PATHS_MAX: usize = 10_000;

/// More bytes of them than this would not be asked for in one message.
const PATHS_BYTES_MAX: usize = 256 << 10;

/// What is to be compared and sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Work {
    /// All but these.
    Everything { except: BTreeSet<RelPath> },
    /// These alone.
    Paths(BTreeSet<RelPath>),
}

fn is_too_much(paths: &BTreeSet<RelPath>) -> bool {
    paths.len() > PATHS_MAX || paths.iter().map(|path| path.as_bytes().len()).sum::<usize>() > PATHS_BYTES_MAX
}

impl Work {
    /// What there is still to do where all else of it was done: what is `held` since changes again, and becomes ready once more by
    /// itself. `None` where that is nothing.
    pub(super) fn without(self, held: &BTreeSet<RelPath>) -> Option<Work> {
        match self {
            Work::Everything { mut except } => {
                except.extend(held.iter().cloned());
                Some(Work::Everything { except })
            }
            Work::Paths(mut paths) => {
                paths.retain(|path| !held.iter().any(|held| path.is_within(held) || held.is_within(path)));
                (!paths.is_empty()).then_some(Work::Paths(paths))
            }
        }
    }
}

/// What has not been published yet.
#[derive(Debug, Default)]
pub(super) struct Pending {
    work: Option<Work>,
    /// What may be staged when there is nothing else to do.
    early: BTreeSet<RelPath>,
    early_at: Option<Instant>,
    since: Option<Instant>,
    /// When the last of it became ready, until that was taken.
    ready: Option<Instant>,
    /// The number of what was added last.
    through: u64,
}

impl Pending {
    /// Something became ready; `number` grows from one to the next.
    pub(super) fn add(&mut self, ready: Ready, number: u64, now: Instant) {
        let work = self.work.take();
        let (since, through) = (Some(now), number);
        let work = match (work, ready) {
            (work, Ready::Early(paths)) => {
                self.early.extend(paths);
                if self.early.len() > PATHS_MAX {
                    // The target is away, or slow: they come with their units.
                    self.early.clear();
                }
                self.early_at = Some(now);
                self.work = work;
                return;
            }
            // It was looked at just now: what was left out before has become ready or not by this.
            (_, Ready::Everything { except }) => {
                self.early.clear();
                Work::Everything { except }
            }
            (None, Ready::Paths(paths)) => Work::Paths(paths),
            (Some(Work::Paths(mut all)), Ready::Paths(paths)) => {
                all.extend(paths);
                Work::Paths(all)
            }
            (Some(Work::Everything { mut except }), Ready::Paths(paths)) => {
                // What lies in a directory that is finished now is finished, too.
                except.retain(|left| !paths.iter().any(|path| left.is_within(path)));
                Work::Everything { except }
            }
        };
        self.work = Some(match work {
            Work::Paths(paths) if is_too_much(&paths) => Work::Everything { except: BTreeSet::new() },
            work => work,
        });
        (self.since, self.ready, self.through) = (self.since.or(since), Some(now), through);
    }

    /// What there is to do, which is in somebody's hands from now on.
    pub(super) fn take(&mut self) -> Option<Work> {
        self.work.take()
    }

    /// What may be staged, where there is nothing else to do, and since when.
    pub(super) fn take_early(&mut self, now: Instant) -> Option<(BTreeSet<RelPath>, Instant)> {
        if self.work.is_some() || self.early.is_empty() {
            return None;
        }
        Some((std::mem::take(&mut self.early), self.early_at.take().unwrap_or(now)))
    }

    /// It was interrupted, and is gone on with later.
    pub(super) fn put_back_early(&mut self, paths: BTreeSet<RelPath>) {
        self.early.extend(paths);
    }

    /// Since when all of what was just taken has been ready; `now` where it was taken before: who tries again does not believe
    /// what was seen for the time before.
    pub(super) fn ready(&mut self, now: Instant) -> Instant {
        self.ready.take().unwrap_or(now)
    }

    /// The number of what was added last: once all that was taken is done, everything up to it is.
    pub(super) fn through(&self) -> u64 {
        self.through
    }

    /// A run that was to do `work` did not come to its end.
    pub(super) fn put_back(&mut self, work: Work) {
        let later = self.work.take();
        self.work = Some(match (work, later) {
            (work, None) => work,
            // Of what became ready since more is known.
            (Work::Everything { .. }, Some(later @ Work::Everything { .. })) => later,
            (Work::Paths(paths), Some(Work::Paths(mut later))) => {
                later.extend(paths);
                Work::Paths(later)
            }
            (Work::Everything { mut except }, Some(Work::Paths(paths))) => {
                except.retain(|left| !paths.iter().any(|path| left.is_within(path)));
                Work::Everything { except }
            }
            (Work::Paths(_), Some(later @ Work::Everything { .. })) => later,
        });
    }

    /// A run has done its work. What became ready meanwhile waits since then.
    pub(super) fn done(&mut self, now: Instant) {
        self.since = self.work.is_some().then_some(now);
    }

    /// Since when something waits or is being sent.
    pub(super) fn since(&self) -> Option<Instant> {
        self.since
    }

    pub(super) fn is_empty(&self) -> bool {
        self.work.is_none()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(paths: &[&str]) -> BTreeSet<RelPath> {
        paths.iter().map(|path| RelPath::new(path).unwrap()).collect()
    }

    #[test]
    fn what_becomes_ready_adds_up_and_nothing_is_lost_when_a_run_fails() {
        let (now, mut pending) = (Instant::now(), Pending::default());
        assert!(pending.is_empty() && pending.take().is_none() && pending.since().is_none());
        pending.add(Ready::Paths(set(&["a"])), 1, now);
        pending.add(Ready::Paths(set(&["b"])), 1, now);
        let work = pending.take().unwrap();
        assert_eq!(work, Work::Paths(set(&["a", "b"])));
        assert!(pending.since().is_some(), "what is being sent still waits");
        let later = now + std::time::Duration::from_secs(1);
        assert_eq!((pending.ready(later), pending.ready(later)), (now, later));
        pending.add(Ready::Paths(set(&["c"])), 1, now);
        pending.put_back(work);
        assert_eq!(pending.take(), Some(Work::Paths(set(&["a", "b", "c"]))));
        pending.done(now);
        assert!(pending.since().is_none());
    }

    #[test]
    fn everything_takes_single_paths_in_and_what_is_finished_is_left_out_no_more() {
        let (now, mut pending) = (Instant::now(), Pending::default());
        pending.add(Ready::Paths(set(&["a"])), 1, now);
        pending.add(Ready::Everything { except: set(&["unit/x", "unit-2", "w"]) }, 1, now);
        pending.add(Ready::Paths(set(&["unit"])), 1, now);
        let work = pending.take().unwrap();
        assert_eq!(work, Work::Everything { except: set(&["unit-2", "w"]) });
        pending.add(Ready::Paths(set(&["w"])), 1, now);
        pending.put_back(work.clone());
        assert_eq!(pending.take(), Some(Work::Everything { except: set(&["unit-2"]) }));
        // What was left out is not sent because a run failed.
        pending.add(Ready::Everything { except: set(&["new"]) }, 1, now);
        pending.put_back(work);
        assert_eq!(pending.take(), Some(Work::Everything { except: set(&["new"]) }));
        pending.put_back(Work::Paths(set(&["a"])));
        pending.add(Ready::Everything { except: set(&["a"]) }, 1, now);
        assert_eq!(pending.take(), Some(Work::Everything { except: set(&["a"]) }));
    }

    #[test]
    fn what_changes_again_is_not_tried_again_before_it_is_ready() {
        let everything = Work::Everything { except: set(&["a"]) };
        assert_eq!(everything.without(&set(&["log"])), Some(Work::Everything { except: set(&["a", "log"]) }));
        let paths = || Work::Paths(set(&["unit", "other/f", "latest"]));
        assert_eq!(paths().without(&set(&["unit/part", "other"])), Some(Work::Paths(set(&["latest"]))));
        assert_eq!(paths().without(&set(&["unit", "other", "latest"])), None);
        assert_eq!(paths().without(&set(&[])), Some(paths()));
    }

    #[test]
    fn what_may_be_staged_early_is_forgotten_where_it_is_much_or_all_is_compared() {
        let (now, mut pending) = (Instant::now(), Pending::default());
        let many =
            |count: usize| Ready::Early((0..count).map(|at| RelPath::new(format!("unit/{at}")).unwrap()).collect());
        pending.add(many(3), 0, now);
        assert_eq!(pending.take_early(now).map(|(paths, _)| paths.len()), Some(3));
        pending.add(many(PATHS_MAX + 1), 0, now);
        assert!(pending.take_early(now).is_none());
        pending.add(many(3), 0, now);
        pending.add(Ready::Everything { except: BTreeSet::new() }, 1, now);
        assert!(pending.take().is_some() && pending.take_early(now).is_none());
    }

    #[test]
    fn too_many_paths_are_everything() {
        let mut pending = Pending::default();
        let many = (0..=PATHS_MAX).map(|number| RelPath::new(number.to_string()).unwrap()).collect();
        pending.add(Ready::Paths(many), 1, Instant::now());
        assert_eq!(pending.take(), Some(Work::Everything { except: BTreeSet::new() }));
        let long = |number: usize| RelPath::new(format!("{}/{number}", "x".repeat(200))).unwrap();
        pending.add(Ready::Paths((0..1000).map(long).collect()), 2, Instant::now());
        assert!(matches!(pending.take(), Some(Work::Paths(_))));
        pending.add(Ready::Paths((0..2000).map(long).collect()), 3, Instant::now());
        assert_eq!(pending.take(), Some(Work::Everything { except: BTreeSet::new() }));
    }
}
