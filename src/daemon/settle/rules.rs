//! When things are finished, as a job says it.

use std::time::Duration;

use super::POINTERS;
use crate::config::Ready as WhenReady;
use crate::filter::{Filter, FilterError, FilterSpec, Globs};
use crate::path::RelPath;

/// When things are finished.
#[derive(Debug)]
pub(in crate::daemon) struct Rules {
    pub(in crate::daemon) settle: Duration,
    pub(in crate::daemon) ready: WhenReady,
    unit: Globs,
    last: Filter,
    growing: Globs,
}

impl Rules {
    pub(in crate::daemon) fn new(
        settle: Duration,
        ready: WhenReady,
        unit: Option<&str>,
        last: &[String],
    ) -> Result<Rules, FilterError> {
        let unit: Vec<String> = unit.into_iter().map(str::to_owned).collect();
        let last = Filter::compile(&FilterSpec { rules: last.to_vec(), only: None })?;
        Ok(Rules { settle, ready, unit: Globs::compile(&unit)?, last, growing: Globs::default() })
    }

    /// With files that only grow, as globs.
    pub(in crate::daemon) fn growing(self, globs: &[String]) -> Result<Rules, FilterError> {
        Ok(Rules { growing: Globs::compile(globs)?, ..self })
    }

    pub(in crate::daemon) fn is_unit(&self, directory: &RelPath) -> bool {
        self.unit.mean(directory, true)
    }

    pub(in crate::daemon) fn is_pointer(&self, path: &RelPath, directory: bool) -> bool {
        !directory && (POINTERS.contains(&path.name()) || !self.last.admits(path, false))
    }

    /// Whether it is said of the file at `path` that it only grows.
    pub(super) fn grows(&self, path: &RelPath) -> bool {
        self.growing.mean(path, false)
    }

    pub(super) fn is_marker(&self, unit: &RelPath, path: &RelPath) -> bool {
        matches!(&self.ready, WhenReady::Marker(name)
            if path.name() == name.as_bytes() && path.parent().as_ref() == Some(unit))
    }
}
