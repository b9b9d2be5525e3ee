//! Which units stay at a target, where only some are to: the newest, and of the older ones those of round numbers.

use std::collections::{BTreeMap, BTreeSet};
use std::num::{NonZeroU32, NonZeroU64};

use serde::{Deserialize, Serialize};

use super::{Plan, Removal};
use crate::filter::Filter;
use crate::manifest::Timestamp;
use crate::path::RelPath;

/// How many units stay.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Retain {
    /// So many of the newest, of each directory that holds units.
    pub newest: NonZeroU32,
    /// And of the older ones those whose number is a multiple of this.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub every: Option<NonZeroU64>,
}

/// A directory that is published whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unit {
    /// Where.
    pub path: RelPath,
    /// When it changed last: what orders units that have no number.
    pub mtime: Timestamp,
}

/// The last number in a name: 1000 in `checkpoint-1000`, 500 in `epoch=3-step=500.ckpt`.
pub fn number(name: &[u8]) -> Option<u64> {
    let end = name.iter().rposition(u8::is_ascii_digit)? + 1;
    let start = name[..end].iter().rposition(|byte| !byte.is_ascii_digit()).map_or(0, |at| at + 1);
    std::str::from_utf8(&name[start..end]).ok()?.parse().ok()
}

/// A unit's number, time and path.
type Aged<'a> = (Option<u64>, Timestamp, &'a RelPath);

impl Retain {
    /// The units that stay. Those of one directory are counted together; those with a number are ordered by it, those without
    /// by their time and apart from the others.
    pub fn kept<'a>(&self, units: impl IntoIterator<Item = &'a Unit>) -> BTreeSet<&'a RelPath> {
        // By directory, and whether they have a number.
        let mut series: BTreeMap<(Option<RelPath>, bool), Vec<Aged<'a>>> = BTreeMap::new();
        for unit in units {
            let number = number(unit.path.name());
            let own = (unit.path.parent(), number.is_some());
            series.entry(own).or_default().push((number, unit.mtime, &unit.path));
        }
        let mut kept = BTreeSet::new();
        for units in series.values_mut() {
            units.sort_unstable_by(|a, b| {
                let time = |of: &Timestamp| (of.seconds, of.nanoseconds);
                (b.0, time(&b.1), b.2).cmp(&(a.0, time(&a.1), a.2))
            });
            units.dedup_by_key(|unit| unit.2);
            for (at, (number, _, path)) in units.iter().enumerate() {
                let newest = at < self.newest.get() as usize;
                let round = || number.zip(self.every).is_some_and(|(number, every)| number % every == 0);
                if newest || round() {
                    kept.insert(*path);
                }
            }
        }
        kept
    }
}

/// What a run has to know to keep only some units at a target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Retention {
    /// The rule.
    pub rule: Retain,
    /// The units that the source has and that are finished.
    pub source: Vec<Unit>,
    /// Those that a pointer at the source names.
    pub pointed: BTreeSet<RelPath>,
    /// Those of the source that are at enough targets, or need not be; `None` for all. Others stay.
    pub safe: Option<BTreeSet<RelPath>>,
}

/// What becomes of the units that only the target has, as far as the run compares.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Retired {
    /// They are taken away whole.
    pub gone: BTreeSet<RelPath>,
    /// The source has them and the rule does not want them, but another target may still need them.
    pub needed: BTreeSet<RelPath>,
}

impl Retention {
    /// What is not sent, although the source has it: a target that has it already is free to keep it no longer.
    pub fn left_out(&self) -> BTreeSet<RelPath> {
        let kept = self.rule.kept(&self.source);
        let paths = self.source.iter().map(|unit| &unit.path);
        paths.filter(|path| !kept.contains(path) && !self.pointed.contains(path)).cloned().collect()
    }

    /// The same without the units that were to be sent and that the scan did not find: they went after they were counted, and no target
    /// may lose another one for them.
    pub fn as_found(&self, is_there: &dyn Fn(&RelPath) -> bool) -> Retention {
        let left_out = self.left_out();
        let there = self.source.iter().filter(|unit| left_out.contains(&unit.path) || is_there(&unit.path));
        Retention { source: there.cloned().collect(), ..self.clone() }
    }

    /// Decides about the units among the removals of `plan`, which was made without what is left out. `unit` are the globs of
    /// units.
    ///
    /// What the rule keeps of the source alone is never among them, whatever newer ones the target has: it would be sent
    /// again by the next run.
    pub fn decide(&self, plan: &Plan, unit: &Filter) -> Retired {
        let is_unit = |path: &RelPath| !unit.admits(path, true);
        let whole = |removal: &&Removal| {
            removal.directory && is_unit(&removal.path) && !removal.path.ancestors().any(|above| is_unit(&above))
        };
        let only_there = plan.removals.iter().filter(whole).map(|removal| &removal.path);
        let left_out = self.left_out();
        // Without a number its own time would tell; a plan does not know it, and what nobody knows is not old.
        let unknown = Timestamp { seconds: i64::MAX, nanoseconds: 0 };
        let there: Vec<Unit> = only_there
            .filter(|path| left_out.contains(path) || number(path.name()).is_some())
            .map(|path| Unit { path: path.clone(), mtime: unknown })
            .collect();
        let all = || self.source.iter().chain(there.iter().filter(|unit| !left_out.contains(&unit.path)));
        let kept = self.rule.kept(all());
        let mut retired = Retired::default();
        // A source that has nothing says nothing.
        for unit in there.iter().filter(|_| !self.source.is_empty()) {
            if kept.contains(&unit.path) || self.pointed.contains(&unit.path) {
                continue;
            }
            let safe = self.safe.as_ref().is_none_or(|safe| safe.contains(&unit.path));
            if left_out.contains(&unit.path) && !safe {
                retired.needed.insert(unit.path.clone());
            } else {
                retired.gone.insert(unit.path.clone());
            }
        }
        retired
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::filter::FilterSpec;

    fn unit(path: &str, seconds: i64) -> Unit {
        Unit { path: RelPath::new(path).unwrap(), mtime: Timestamp { seconds, nanoseconds: 0 } }
    }

    fn units(paths: &[&str]) -> Vec<Unit> {
        paths.iter().map(|path| unit(path, 0)).collect()
    }

    fn rule(newest: u32, every: Option<u64>) -> Retain {
        Retain { newest: NonZeroU32::new(newest).unwrap(), every: every.and_then(NonZeroU64::new) }
    }

    fn shown<'a>(paths: impl IntoIterator<Item = &'a RelPath>) -> Vec<String> {
        paths.into_iter().map(ToString::to_string).collect()
    }

    #[test]
    fn the_number_of_a_unit_is_the_last_in_its_name() {
        for (name, expected) in [
            ("checkpoint-1000", Some(1000)),
            ("epoch=3-step=500.ckpt", Some(500)),
            ("iter_0000100", Some(100)),
            ("7", Some(7)),
            ("best", None),
            ("", None),
            ("step-99999999999999999999", None),
        ] {
            assert_eq!(number(name.as_bytes()), expected, "{name}");
        }
    }

    #[test]
    fn the_newest_stay_and_the_older_ones_of_round_numbers() {
        let all = units(&["c-900", "c-1000", "c-1100", "c-2000", "c-2100", "c-2200"]);
        assert_eq!(shown(rule(2, None).kept(&all)), ["c-2100", "c-2200"]);
        assert_eq!(shown(rule(1, Some(1000)).kept(&all)), ["c-1000", "c-2000", "c-2200"]);
        assert_eq!(rule(9, None).kept(&all).len(), 6);
        // Each directory of its own; what has no number is ordered by its time, apart from the rest.
        let mixed = [units(&["a/c-1", "a/c-2", "b/c-1"]), vec![unit("a/best", 1), unit("a/last", 2)]].concat();
        assert_eq!(shown(rule(1, None).kept(&mixed)), ["a/c-2", "a/last", "b/c-1"]);
        assert_eq!(shown(rule(1, None).kept(&[unit("x", 5), unit("y", 5)])), ["y"]);
    }

    fn decided(source: &[&str], there: &[&str], change: impl FnOnce(&mut Retention)) -> (Vec<String>, Vec<String>) {
        let mut retention =
            Retention { rule: rule(2, None), source: units(source), pointed: BTreeSet::new(), safe: None };
        change(&mut retention);
        let removal = |path: &&str| Removal { path: RelPath::new(path).unwrap(), directory: !path.contains('.') };
        let plan = Plan { removals: there.iter().map(removal).collect(), ..Plan::default() };
        let filter = Filter::compile(&FilterSpec { rules: vec!["c-*/".into()], only: None }).unwrap();
        let retired = retention.decide(&plan, &filter);
        (shown(&retired.gone), shown(&retired.needed))
    }

    #[test]
    fn what_the_rule_does_not_want_goes_and_is_not_sent() {
        let retention = |source: &[&str]| Retention {
            rule: rule(2, None),
            source: units(source),
            pointed: BTreeSet::from([RelPath::new("c-1").unwrap()]),
            safe: None,
        };
        assert_eq!(shown(&retention(&["c-1", "c-2", "c-3", "c-4"]).left_out()), ["c-2"]);
        let none: [&str; 0] = [];
        // The source has them still, or not any more.
        assert_eq!(decided(&["c-1", "c-2", "c-3"], &["c-1", "c-1/w.bin"], |_| {}).0, ["c-1"]);
        assert_eq!(decided(&["c-2", "c-3"], &["c-0", "c-1", "other", "other/c-9"], |_| {}).0, ["c-0", "c-1"]);
        // A source that went back to an older state: what it has now is not taken away for what the target has of before.
        assert_eq!(decided(&["c-5", "c-6"], &["c-8", "c-9"], |_| {}).0, none);
        // Nothing is concluded from nothing.
        assert_eq!(decided(&[], &["c-1", "c-2", "c-3"], |_| {}).0, none);
        assert_eq!(decided(&["c-2", "c-3"], &["c-old"], |_| {}).0, none);
    }

    #[test]
    fn a_unit_that_went_after_it_was_counted_costs_no_other_its_place() {
        let source = units(&["c-9", "c-10"]);
        let retention = Retention { rule: rule(1, None), source, pointed: BTreeSet::new(), safe: None };
        let removal = |path: &str| Removal { path: RelPath::new(path).unwrap(), directory: true };
        let plan = Plan { removals: ["c-8", "c-9"].map(removal).into(), ..Plan::default() };
        let filter = Filter::compile(&FilterSpec { rules: vec!["c-*/".into()], only: None }).unwrap();
        let gone = |is_there| shown(&retention.as_found(&|_| is_there).decide(&plan, &filter).gone);
        assert_eq!((gone(true), gone(false)), (vec!["c-8".to_owned(), "c-9".to_owned()], vec!["c-8".to_owned()]));
    }

    #[test]
    fn what_a_pointer_names_or_another_target_needs_stays() {
        let none: [&str; 0] = [];
        let (gone, needed) = decided(&["c-1", "c-2", "c-3", "c-4"], &["c-0", "c-1", "c-2"], |retention| {
            retention.pointed = BTreeSet::from([RelPath::new("c-1").unwrap()]);
            retention.safe = Some(BTreeSet::new());
        });
        assert_eq!((gone, needed), (vec!["c-0".to_owned()], vec!["c-2".to_owned()]));
        let safe = |retention: &mut Retention| retention.safe = Some(BTreeSet::from([RelPath::new("c-1").unwrap()]));
        let (gone, needed) = decided(&["c-1", "c-2", "c-3"], &["c-1"], safe);
        assert_eq!((gone, needed), (vec!["c-1".to_owned()], none.map(str::to_owned).to_vec()));
    }
}
