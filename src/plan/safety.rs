//! What stops a run before it deletes more than anybody meant.

use super::Plan;
use crate::error::counted;
use crate::manifest::Tree;

/// How much a run may delete at the target.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub enum DeleteLimit {
    /// Any number of paths.
    #[default]
    Unlimited,
    /// At most this many paths.
    Paths(u64),
    /// At most this part of what the target holds, 0 to 100.
    Percent(f64),
}

impl std::str::FromStr for DeleteLimit {
    type Err = String;

    /// Reads `100` (paths) or `10%`.
    fn from_str(text: &str) -> Result<DeleteLimit, String> {
        let wrong = || format!("'{text}' is not a limit: write a number of paths (100) or a percentage (10%)");
        match text.strip_suffix('%') {
            Some(number) => match number.parse::<f64>() {
                Ok(percent) if (0.0..=100.0).contains(&percent) => Ok(DeleteLimit::Percent(percent)),
                _ => Err(wrong()),
            },
            None => text.parse().map(DeleteLimit::Paths).map_err(|_| wrong()),
        }
    }
}

impl std::fmt::Display for DeleteLimit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            DeleteLimit::Unlimited => f.write_str("any number"),
            DeleteLimit::Paths(paths) => write!(f, "{paths}"),
            DeleteLimit::Percent(percent) => write!(f, "{percent}%"),
        }
    }
}

/// Why nothing was deleted, and nothing else done.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[allow(missing_docs)]
pub enum Refusal {
    #[error(
        "the source is empty, but the target holds {}: is the source mounted? \
         To empty the target on purpose, remove its contents there",
        counted(*.0, "entry", "entries")
    )]
    EmptiedSource(u64),
    #[error(
        "{removals} of {} at the target would be deleted, which is over the limit ({limit}); \
         look at them with push --dry-run, then raise --max-delete (max_delete of a job)",
        counted(*.entries, "entry", "entries")
    )]
    TooMany { removals: u64, entries: u64, limit: String },
}

/// Decides whether the removals of `plan` may be carried out.
///
/// # Errors
/// [`Refusal`] when the source is empty and the target is not, or when `limit` is exceeded.
pub fn check_removals(source: &Tree, plan: &Plan, limit: DeleteLimit) -> Result<(), Refusal> {
    let removals = plan.removals.len() as u64;
    let entries = plan.target_entries;
    if removals == 0 {
        return Ok(());
    }
    if source.entries().is_empty() {
        return Err(Refusal::EmptiedSource(entries));
    }
    let (exceeded, limit) = match limit {
        DeleteLimit::Unlimited => (false, String::new()),
        DeleteLimit::Paths(most) => (removals > most, counted(most, "path", "paths")),
        DeleteLimit::Percent(most) => (removals as f64 * 100.0 > most * entries as f64, format!("{most} %")),
    };
    if exceeded { Err(Refusal::TooMany { removals, entries, limit }) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifest::{Content, Entry, Timestamp};
    use crate::path::RelPath;
    use crate::plan::Removal;

    fn tree(names: &[&str]) -> Tree {
        let entry = |name: &&str| Entry {
            path: RelPath::new(name).unwrap(),
            content: Content::Directory,
            mtime: Timestamp::default(),
            mode: 0o755,
            owner: "u".into(),
            group: "g".into(),
        };
        Tree::new(names.iter().map(entry).collect()).unwrap()
    }

    fn removing(count: usize, of: u64) -> Plan {
        let path = |n| Removal { path: RelPath::new(format!("f{n}")).unwrap(), directory: false };
        Plan { removals: (0..count).map(path).collect(), target_entries: of, ..Plan::default() }
    }

    #[test]
    fn h38_an_emptied_source_deletes_nothing() {
        let result = check_removals(&tree(&[]), &removing(3, 3), DeleteLimit::Unlimited);
        assert_eq!(result, Err(Refusal::EmptiedSource(3)));
        assert_eq!(check_removals(&tree(&[]), &removing(0, 0), DeleteLimit::Unlimited), Ok(()));
    }

    #[test]
    fn limits_count_paths_or_parts() {
        let cases = [("3", true), ("2", false), ("30%", true), ("29.9%", false), ("0", false), ("100%", true)];
        for (limit, allowed) in cases {
            let result = check_removals(&tree(&["d"]), &removing(3, 10), limit.parse().unwrap());
            assert_eq!(result.is_ok(), allowed, "{limit}");
        }
        for wrong in ["", "x", "-1", "101%", "%", "1.5"] {
            assert!(wrong.parse::<DeleteLimit>().is_err(), "{wrong}");
        }
    }
}
