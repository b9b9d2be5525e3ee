//! Removals that a run does not do after all: what a new `.lockstepignore` of the source may be there to protect, and directories in
//! which something stays that was not looked at.

use std::collections::HashSet;

use super::target::Run;
use crate::filter::IGNORE_FILE;
use crate::manifest::Tree;
use crate::monitor::{Event, Monitor};
use crate::path::RelPath;
use crate::plan::{Change, Plan};
use crate::root::Follow;

/// Takes them out of the plan. What makes room for something of another kind has to go in any case.
pub(super) fn spare(run: &Run, source: &Tree, plan: &mut Plan, monitor: &dyn Monitor) {
    if plan.removals.is_empty() || !run.options.deletes {
        return;
    }
    let makes_room = |path: &RelPath| {
        path.ancestors().any(|above| source.get(&above).is_some_and(|entry| !entry.is_directory()))
            || source.get(path).is_some()
    };
    // The target was listed by the rules that it has, and gets others by this run.
    let changed = plan.actions.iter().filter(|action| action.change != Change::MetadataOnly);
    let paths = changed.map(|action| &source.entries()[action.index as usize].path);
    let rules: Vec<&RelPath> = paths.filter(|path| path.name() == IGNORE_FILE).collect();
    for rule in rules {
        let before = plan.removals.len();
        let above = rule.parent();
        let covers = |path: &RelPath| above.as_ref().is_none_or(|above| path.is_within(above));
        plan.removals.retain(|removal| !covers(&removal.path) || makes_room(&removal.path));
        if plan.removals.len() < before {
            monitor.event(Event::Warning(&format!(
                "'{rule}' is new or changed: this run removes nothing that it may speak of; the next one goes by it"
            )));
        }
    }
    let removed: HashSet<&RelPath> = plan.removals.iter().map(|removal| &removal.path).collect();
    let mut stays: HashSet<RelPath> = HashSet::new();
    // From the leaves up.
    for removal in plan.removals.iter().rev().filter(|removal| removal.directory && !makes_room(&removal.path)) {
        let path = &removal.path;
        // A unit that is not to stay is taken away whole.
        if run.options.retires && run.unit_of(path, true).is_some() {
            continue;
        }
        let Ok(names) = run.root.names(Some(path), Follow::Never) else { continue };
        let left = |name: &Vec<u8>| path.join(name).is_ok_and(|path| !removed.contains(&path) || stays.contains(&path));
        if names.iter().any(left) {
            stays.insert(path.clone());
        }
    }
    plan.removals.retain(|removal| !stays.contains(&removal.path));
}
