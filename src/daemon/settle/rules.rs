//! When things are finished, as a job says it.

use std::time::Duration;

use super::POINTERS;
use crate::config::Ready as WhenReady;
use crate::filter::{Filter, FilterError, FilterSpec};
use crate::path::RelPath;

/// When things are finished.
#[derive(Debug)]
pub(in crate::daemon) struct Rules {
    pub(in crate::daemon) settle: Duration,
    pub(in crate::daemon) ready: WhenReady,
    unit: Option<Filter>,
    last: Filter,
    /// Does not admit what only grows.
    but_growing: Option<Filter>,
}

impl Rules {
    pub(in crate::daemon) fn new(
        settle: Duration,
        ready: WhenReady,
        unit: Option<&str>,
        last: &[String],
    ) -> Result<Rules, FilterError> {
        let compile = |rules: Vec<String>| Filter::compile(&FilterSpec { rules, only: None });
        let unit = unit.map(|glob| compile(vec![glob.to_owned()])).transpose()?;
        Ok(Rules { settle, ready, unit, last: compile(last.to_vec())?, but_growing: None })
    }

    /// With files that only grow, as globs.
    pub(in crate::daemon) fn growing(self, globs: &[String]) -> Result<Rules, FilterError> {
        let but_growing = Some(globs).filter(|globs| !globs.is_empty());
        let but_growing = but_growing.map(|globs| Filter::compile(&FilterSpec { rules: globs.to_vec(), only: None }));
        Ok(Rules { but_growing: but_growing.transpose()?, ..self })
    }

    pub(in crate::daemon) fn is_unit(&self, directory: &RelPath) -> bool {
        self.unit.as_ref().is_some_and(|unit| !unit.admits(directory, true))
    }

    pub(in crate::daemon) fn is_pointer(&self, path: &RelPath, directory: bool) -> bool {
        !directory && (POINTERS.contains(&path.name()) || !self.last.admits(path, false))
    }

    /// Whether it is said of the file at `path` that it only grows.
    pub(super) fn grows(&self, path: &RelPath) -> bool {
        self.but_growing.as_ref().is_some_and(|others| !others.admits(path, false))
    }

    pub(super) fn is_marker(&self, unit: &RelPath, path: &RelPath) -> bool {
        matches!(&self.ready, WhenReady::Marker(name)
            if path.name() == name.as_bytes() && path.parent().as_ref() == Some(unit))
    }
}
