//! `--files-from` names what is to be sent: what is named and not there is a failure, not a tree that is smaller.

use crate::endpoint::Scan;
use crate::filter::{Filter, FilterSpec};
use crate::monitor::{Problem, Severity};
use crate::path::RelPath;

/// Each listed path that `scan` has nothing of and has not spoken of.
pub(super) fn missing(spec: &FilterSpec, scan: &Scan) -> Vec<Problem> {
    let Some(only) = &spec.only else { return Vec::new() };
    let Ok(rules) = Filter::compile(&FilterSpec { only: None, ..spec.clone() }) else { return Vec::new() };
    let told = |path: &RelPath| {
        let above = |ancestor: &RelPath| scan.problems.iter().any(|problem| problem.path.as_ref() == Some(ancestor));
        above(path) || path.ancestors().any(|ancestor| above(&ancestor))
    };
    let left_out = |path: &RelPath| {
        path.ancestors().any(|above| !rules.admits(&above, true))
            || !rules.admits(path, false)
            || !rules.admits(path, true)
    };
    let listed = only.iter().filter_map(|path| RelPath::new(path).ok());
    let missing = listed.filter(|path| scan.tree.get(path).is_none() && !told(path) && !left_out(path));
    missing
        .map(|path| Problem {
            path: Some(path),
            message: "is listed in --files-from, but the source does not have it".into(),
            severity: Severity::Failed,
        })
        .collect()
}
