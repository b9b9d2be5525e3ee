//! Units that are taken away whole, and what of a plan's removals stays for now.
//!
//! What always holds: a unit that a pointer names, once the run is published, is not taken away, nor one that somebody
//! holds; it vanishes in one step, after everything else. What stays is told, and looked at again by the next run.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::os::fd::OwnedFd;

use super::target::{Run, State, io};
use crate::endpoint::{CommitOptions, Error};
use crate::filter::{Filter, FilterSpec, STATE_DIRECTORY};
use crate::layout::complete::names_as;
use crate::layout::units::{Rules, leads_to, list};
use crate::manifest::Content;
use crate::path::RelPath;
use crate::plan::publish::Step;
use crate::root::Follow;
use crate::staging::hold::{self, Held};

/// What was decided.
#[derive(Debug, Default)]
pub(super) struct Retired {
    /// The units that go, and how many paths of each the plan lists.
    pub(super) gone: BTreeMap<RelPath, u64>,
    /// What stays for now, and why.
    pub(super) put_off: Vec<(RelPath, String)>,
    /// As long as they are open nobody begins to hold what goes.
    locks: Vec<OwnedFd>,
}

impl Retired {
    /// The steps that take the units away.
    pub(super) fn steps(&self) -> impl Iterator<Item = Step> {
        self.gone.keys().cloned().map(Step::TakeAway)
    }
}

fn within(units: &BTreeSet<RelPath>, path: &RelPath) -> bool {
    units.contains(path) || path.ancestors().any(|above| units.contains(&above))
}

/// Decides, and takes what is not removed path by path out of the plan's removals. After a failure nothing goes.
pub(super) fn decide(
    run: &Run,
    state: &mut State,
    options: &CommitOptions,
    failed: &HashSet<u32>,
) -> Result<Retired, Error> {
    let mut retired = Retired::default();
    let asked = units(run, state, &options.retire)?;
    let mut stays = units(run, state, &options.spare)?;
    stays.extend(asked.iter().cloned());
    if failed.is_empty() && options.unreadable.is_empty() && !asked.is_empty() {
        let pointed = pointed(run, state, failed)?;
        // What is not there is nothing to be taken away.
        for unit in asked.into_iter().filter(|unit| run.root.stat(unit, Follow::Never).is_ok()) {
            if let Some((pointer, _)) = pointed.iter().find(|(_, named)| *named == unit) {
                retired.put_off.push((unit, format!("'{pointer}' names it")));
            } else if hold(run, &unit, &mut retired)? {
                let below = |path: &RelPath| path.is_within(&unit);
                let paths = state.plan.removals.iter().filter(|removal| below(&removal.path)).count() as u64;
                retired.gone.insert(unit, paths);
            }
        }
    }
    if options.delete {
        stays.extend(held(run, state, &stays, &mut retired)?);
    }
    if !stays.is_empty() {
        // What holds something that stays does, too.
        let above: BTreeSet<RelPath> = stays.iter().flat_map(|path| path.ancestors().collect::<Vec<_>>()).collect();
        state.plan.removals.retain(|removal| !within(&stays, &removal.path) && !above.contains(&removal.path));
    }
    Ok(retired)
}

/// Of what goes path by path: units and directories that somebody holds.
fn held(
    run: &Run,
    state: &State,
    stays: &BTreeSet<RelPath>,
    retired: &mut Retired,
) -> Result<BTreeSet<RelPath>, Error> {
    let (mut units, mut directories) = (BTreeMap::new(), BTreeMap::new());
    let mut found = BTreeSet::new();
    for removal in state.plan.removals.iter().filter(|removal| !within(stays, &removal.path)) {
        if let Some(unit) = run.unit_of(&removal.path, removal.directory) {
            let free = match units.get(&unit) {
                Some(free) => *free,
                None => hold(run, &unit, retired)?,
            };
            if !free {
                found.insert(unit.clone());
            }
            units.insert(unit, free);
            continue;
        }
        let own = removal.directory.then(|| removal.path.clone());
        for directory in [None].into_iter().chain(removal.path.ancestors().chain(own).map(Some)) {
            let is_held = || hold::is_held(&run.root, directory.as_ref());
            if *directories.entry(directory.clone()).or_insert_with(is_held) {
                found.insert(directory.unwrap_or_else(|| removal.path.clone()));
                break;
            }
        }
    }
    let told: BTreeSet<RelPath> = retired.put_off.iter().map(|(path, _)| path.clone()).collect();
    for path in found.iter().filter(|path| !told.contains(*path)) {
        retired.put_off.push((path.clone(), HELD.to_owned()));
    }
    Ok(found)
}

const HELD: &str = "a check, or a job that was started by one, uses it";

/// Makes sure that nobody holds what is about to go.
fn hold(run: &Run, unit: &RelPath, retired: &mut Retired) -> Result<bool, Error> {
    match hold::none(&run.root, unit).map_err(io)? {
        Held::ByNobody(locks) => {
            retired.locks.extend(locks);
            Ok(true)
        }
        Held::BySomebody(_) => {
            retired.put_off.push((unit.clone(), HELD.to_owned()));
            Ok(false)
        }
    }
}

/// The units that a sender names: nothing else, and nothing that it has itself.
fn units(run: &Run, state: &State, paths: &[Vec<u8>]) -> Result<BTreeSet<RelPath>, Error> {
    let refused = |path: &[u8], why: &str| Error::Refused {
        by: "the receiver".into(),
        reason: format!("'{}' is to be kept or taken away as a unit, and {why}", crate::error::Escaped(path)),
    };
    let mut units = BTreeSet::new();
    for bytes in paths {
        let path = RelPath::new(bytes).map_err(|error| refused(bytes, &error.to_string()))?;
        if path.components().any(|name| name == STATE_DIRECTORY) {
            return Err(refused(bytes, "is lockstep's own"));
        }
        if run.unit_of(&path, true).as_ref() != Some(&path) {
            return Err(refused(bytes, "is none"));
        }
        if state.source.get(&path).is_some() {
            return Err(refused(bytes, "is sent in the same run"));
        }
        units.insert(path);
    }
    Ok(units)
}

/// What pointers at the target name once the run is published: with the pointer.
fn pointed(run: &Run, state: &State, failed: &HashSet<u32>) -> Result<BTreeSet<(RelPath, RelPath)>, Error> {
    let usage = |error: crate::filter::FilterError| Error::Usage(crate::error::chain(&error));
    let everything = Filter::compile(&FilterSpec::default()).map_err(usage)?;
    let rules = Rules { unit: &run.units, pointer: &run.last, admitted: &everything };
    let mut named = list(&run.root, rules).map_err(io)?.pointed;
    for action in state.plan.actions.iter().filter(|action| !failed.contains(&action.index)) {
        let entry = &state.source.entries()[action.index as usize];
        let names = match &entry.content {
            Content::Symlink { target } => leads_to(&run.root, &entry.path, target),
            Content::File { .. } if run.is_last(&entry.path) && state.staged.borrow().contains(action.index) => {
                let staged = run.staged_path(&entry.path)?;
                run.staging.as_ref().and_then(|staging| names_as(staging, &staged, &entry.path))
            }
            _ => continue,
        };
        // It takes the place of what is there now.
        named.retain(|(pointer, _)| *pointer != entry.path);
        let unit = names.and_then(|path| run.unit_of(&path, true));
        named.extend(unit.map(|unit| (entry.path.clone(), unit)));
    }
    Ok(named)
}
