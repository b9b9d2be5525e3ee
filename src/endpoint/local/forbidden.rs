//! What a run may not do with what is there: looked at when it is compared, before anything is sent, and once more before
//! it is published.
//!
//! What always holds: a run that would do it is refused as a whole, and the refusal names the paths.

use super::target::{Run, State};
use crate::endpoint::{BeginOptions, CommitOptions, Error};
use crate::error::counted;
use crate::manifest::Tree;
use crate::path::RelPath;
use crate::plan::publish::{Publication, exchanged};
use crate::plan::{Change, Plan};

/// Paths that a refusal names.
const NAMED: usize = 10;

fn refused(reason: String) -> Error {
    Error::Refused { by: "the receiver".into(), reason }
}

fn list<'a>(paths: impl Iterator<Item = &'a RelPath>) -> Option<String> {
    let mut paths: Vec<&RelPath> = paths.collect();
    paths.sort();
    paths.dedup();
    let count = paths.len();
    let named: Vec<String> = paths.into_iter().take(NAMED).map(|path| format!("'{path}'")).collect();
    let more = if count > NAMED { format!(" and {} more", count - NAMED) } else { String::new() };
    (count > 0).then(|| format!("{}: {}{more}", counted(count as u64, "path", "paths"), named.join(", ")))
}

/// Refuses a run that says beforehand that it takes units away.
pub(super) fn begin(options: &BeginOptions) -> Result<(), Error> {
    if options.retires && options.forbidden.remove {
        return Err(refused(
            "the run takes units away that it does not keep, and nothing may be removed with these rights; leave 'retain' \
             out, or ask for the right 'delete'"
                .into(),
        ));
    }
    Ok(())
}

impl Run {
    /// Leaves directories as they are where nothing may be changed, and refuses a plan that does what is forbidden.
    pub(super) fn allow(&self, source: &Tree, target: &Tree, plan: &mut Plan) -> Result<(), Error> {
        if self.options.forbidden.change {
            plan.actions.retain(|action| {
                action.change != Change::MetadataOnly || !source.entries()[action.index as usize].is_directory()
            });
            self.changes_nothing(source, target, plan)?;
        }
        if self.options.forbidden.remove {
            let kept = |path: &&RelPath| {
                let (new, old) = (source.get(path), target.get(path));
                new.zip(old).is_some_and(|(new, old)| new.is_directory() != old.is_directory())
            };
            let in_the_way =
                plan.actions.iter().map(|action| &source.entries()[action.index as usize].path).filter(kept);
            let surplus = plan.removals.iter().filter(|_| self.options.deletes).map(|removal| &removal.path);
            removes_nothing(in_the_way, false)?;
            removes_nothing(surplus, self.options.forbidden.see)?;
        }
        Ok(())
    }

    fn changes_nothing(&self, source: &Tree, target: &Tree, plan: &Plan) -> Result<(), Error> {
        let changed = plan.actions.iter().filter(|action| {
            // What is only to be compared may be found to be the same.
            action.change != Change::MetadataOnly || action.differences.any()
        });
        let changed = changed.map(|action| &source.entries()[action.index as usize].path);
        let changed = changed.filter(|path| target.get(path).is_some());
        let units = exchanged(&Publication {
            source,
            target,
            plan,
            delete: false,
            failed: &|_| false,
            last: &|path| self.is_last(path),
            unit: &|path, directory| self.unit_of(path, directory),
        });
        match list(changed.chain(&units)) {
            None => Ok(()),
            Some(paths) => Err(refused(format!(
                "with the right 'write-once' nothing that is there is replaced or changed, and the run would do that with \
                 {paths}; send them under names that are free, or ask for the right 'write'"
            ))),
        }
    }

    /// The same when all is staged: what was compared may have been found to differ, and the sender says only now what it
    /// removes.
    pub(super) fn allow_commit(&self, state: &State, options: &CommitOptions) -> Result<(), Error> {
        if self.options.forbidden.change {
            self.changes_nothing(&state.source, &state.target, &state.plan)?;
        }
        if self.options.forbidden.remove {
            let surplus = state.plan.removals.iter().filter(|_| options.delete).map(|removal| &removal.path);
            removes_nothing(surplus, self.options.forbidden.see)?;
            let units: Vec<RelPath> = options.retire.iter().filter_map(|path| RelPath::new(path).ok()).collect();
            removes_nothing(units.iter(), false)?;
        }
        Ok(())
    }
}

/// With `unseen` it is not said which.
fn removes_nothing<'a>(paths: impl Iterator<Item = &'a RelPath>, unseen: bool) -> Result<(), Error> {
    let listed = match unseen {
        true => Some(paths.count()).filter(|count| *count > 0).map(|_| "what these rights do not show".to_owned()),
        false => list(paths),
    };
    match listed {
        None => Ok(()),
        Some(paths) => Err(refused(format!(
            "nothing may be removed with these rights, and the run would remove {paths}; push without --delete, or ask for \
             the right 'delete'"
        ))),
    }
}
