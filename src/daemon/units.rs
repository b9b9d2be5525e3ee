//! Whether units were listed as a whole, and what names one with it.

use std::sync::Arc;

use super::Trouble;
use super::settle::Rules;
use crate::config::Job;
use crate::endpoint::guarded::{Fitting, Whole};
use crate::error::{Exit, chain};
use crate::filter::{Filter, FilterSpec};
use crate::layout::complete::{self, Ready};
use crate::manifest::{Content, Entry, Tree};
use crate::path::RelPath;
use crate::root::{Follow, Root};

/// Says of a list whether its units have in it what makes them complete, and got nothing more since they were looked into.
///
/// RACE: what is not finished is asked for before the tree is listed, and afterwards. A unit that is begun after the first
/// question and finished before the second is not among it, and may have been listed in between.
///
/// # Errors
/// [`Trouble`] where the job's globs cannot be used.
pub fn all_of_it(job: &Job, root: &Root, listed: &FilterSpec) -> Result<Whole, Trouble> {
    let wrong = |error: &dyn std::error::Error| Trouble { message: chain(error), exit: Exit::Usage };
    let compile =
        |rules: Vec<String>| Filter::compile(&FilterSpec { rules, only: None }).map_err(|error| wrong(&error));
    let Some(glob) = &job.unit else { return Ok(Arc::new(|_: &Tree| true)) };
    let (unit, admitted) = (compile(vec![glob.clone()])?, compile(listed.rules.clone())?);
    let root = root.reopen().map_err(|error| Trouble { message: chain(&error), exit: Exit::Io })?;
    let marker = match &job.ready {
        Ready::Marker(name) => Some(name.clone()),
        Ready::Settled | Ready::Layout(_) => None,
    };
    let only: Option<Vec<RelPath>> =
        listed.only.as_ref().map(|only| only.iter().filter_map(|path| RelPath::new(path).ok()).collect());
    // Of a unit that is there already single files may be listed.
    let is_listed_whole =
        move |path: &RelPath| only.as_ref().is_none_or(|only| only.iter().any(|listed| path.is_within(listed)));
    Ok(Arc::new(move |tree: &Tree| {
        let is_unit = |path: &RelPath| !unit.admits(path, true);
        let mut current: Option<RelPath> = None;
        tree.entries().iter().filter(|entry| matches!(entry.content, Content::Directory)).all(|entry| {
            let path = &entry.path;
            let within = current.as_ref().is_some_and(|unit| path.is_within(unit));
            if !within {
                current = (is_unit(path) && is_listed_whole(path)).then(|| path.clone());
                if current.is_none() {
                    return true;
                }
                if !has_marker(tree, path, marker.as_deref(), &admitted) {
                    return false;
                }
            }
            is_as_listed(&root, entry)
        })
    }))
}

fn has_marker(tree: &Tree, unit: &RelPath, marker: Option<&str>, admitted: &Filter) -> bool {
    let Some(marker) = marker.and_then(|name| unit.join(name).ok()) else { return true };
    !admitted.admits(&marker, false) || tree.get(&marker).is_some()
}

/// What is made in a directory, or removed, changes its time.
fn is_as_listed(root: &Root, entry: &Entry) -> bool {
    root.stat(&entry.path, Follow::Never).is_ok_and(|found| found.mtime == entry.mtime)
}

/// Says of a pointer, by the content that was read of it, whether what it names was listed with it.
///
/// RACE: it may have been replaced after it was looked at, and before all was listed: what it names then is finished, and not
/// in this run.
///
/// # Errors
/// [`Trouble`] where the job's globs cannot be used.
pub fn goes_with_what_it_names(job: &Job, root: &Root) -> Result<Fitting, Trouble> {
    let wrong = |error: &dyn std::error::Error| Trouble { message: chain(error), exit: Exit::Usage };
    let rules = Rules::new(job.settle.0, job.ready.clone(), job.unit.as_deref(), &job.last);
    let rules = rules.map_err(|error| wrong(&error))?;
    let excluded =
        Filter::compile(&FilterSpec { rules: job.exclude.clone(), only: None }).map_err(|error| wrong(&error))?;
    let root = root.reopen().map_err(|error| Trouble { message: chain(&error), exit: Exit::Io })?;
    Ok(Arc::new(move |path: &RelPath, content: &[u8], tree: &Tree| {
        let named = if rules.is_pointer(path, false) { complete::named(path, content) } else { None };
        // What is not there, or takes no part, is not waited for.
        named.is_none_or(|named| {
            tree.get(&named).is_some() || !excluded.admits(&named, true) || root.stat(&named, Follow::Never).is_err()
        })
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::endpoint::local::LocalSource;
    use crate::endpoint::{ScanOptions, Source as _};
    use crate::monitor::Silent;

    fn job(ready: &str) -> Job {
        let text = format!(
            "[[job]]\nname = 'j'\nsource = '/s'\ntargets = ['/t']\nunit = 'checkpoint-*/'\nready = '{ready}'\n"
        );
        crate::config::Config::parse("c".as_ref(), &text).unwrap().jobs.remove(0)
    }

    #[test]
    fn a_unit_that_was_listed_before_it_was_finished_ends_the_run() {
        let at = tempfile::tempdir().unwrap();
        let write = |name: &str| std::fs::write(at.path().join(name), "x").unwrap();
        for unit in ["checkpoint-1/sub", "checkpoint-2", "other"] {
            std::fs::create_dir_all(at.path().join(unit)).unwrap();
        }
        ["checkpoint-1/sub/w", "checkpoint-1/_SUCCESS", "checkpoint-2/w", "other/w"]
            .iter()
            .for_each(|name| write(name));
        let root = Root::open(at.path()).unwrap();
        let list = |filter: &FilterSpec| {
            let options = ScanOptions { filter: filter.clone(), ..ScanOptions::default() };
            LocalSource::new(at.path(), None).unwrap().scan(&options, &Silent::default()).unwrap().tree
        };
        let only = |path: &str| FilterSpec { rules: Vec::new(), only: Some(vec![path.into()]) };
        let without = |rule: &str| FilterSpec { rules: vec![rule.into()], only: None };
        let all = FilterSpec::default();
        let whole =
            |ready: &str, filter: &FilterSpec, tree: &Tree| all_of_it(&job(ready), &root, filter).unwrap()(tree);
        for (ready, filter, good) in [
            ("_SUCCESS", &all, false),
            ("_SUCCESS", &only("checkpoint-1"), true),
            ("_SUCCESS", &only("checkpoint-2"), false),
            // One file of a unit that is there; a marker that takes no part; units that none makes ready.
            ("_SUCCESS", &only("checkpoint-2/w"), true),
            ("_SUCCESS", &without("_SUCCESS"), true),
            ("_SUCCESS", &without("checkpoint-2/"), true),
            ("settled", &all, true),
        ] {
            assert_eq!(whole(ready, filter, &list(filter)), good, "{ready} {filter:?}");
        }
        // What comes after the list was made, at any depth of a unit, and beside the units.
        let before = list(&all);
        std::thread::sleep(std::time::Duration::from_millis(20));
        write("other/more");
        assert!(whole("settled", &all, &before));
        write("checkpoint-1/sub/more");
        assert!(!whole("settled", &all, &before));
    }
}
