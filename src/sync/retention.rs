//! What of a source's units is sent where a target is to keep only some: found out before the source is scanned.

use std::collections::BTreeSet;

use super::Options;
use crate::endpoint::Error;
use crate::endpoint::local::POINTERS;
use crate::error::chain;
use crate::filter::{Filter, FilterSpec, line_for};
use crate::layout::units::{Rules, list};
use crate::path::RelPath;
use crate::plan::retain::{Retain, Retention};
use crate::root::Root;

/// Has a run keep only the units at its target that `rule` wants, and leaves out what it does not want of the source, which is
/// at `root`. What the filter of `options` leaves out, as everything that is not finished, does not count. `safe` are the units
/// that no other target needs; `None` for all.
///
/// # Errors
/// When the source cannot be listed, or a glob is none.
pub fn keep_only(
    options: &mut Options,
    root: &Root,
    rule: Retain,
    safe: Option<BTreeSet<RelPath>>,
) -> Result<(), Error> {
    let usage = |error: crate::filter::FilterError| Error::Usage(chain(&error));
    let compile = |rules: Vec<String>| Filter::compile(&FilterSpec { rules, only: None }).map_err(usage);
    let pointers = POINTERS.iter().map(|&name| name.to_owned()).chain(options.begin.last.iter().cloned());
    let unit = compile(options.begin.units.clone())?;
    let pointer = compile(pointers.collect())?;
    let admitted = Filter::compile(&options.scan.filter).map_err(usage)?;
    let found =
        list(root, Rules { unit: &unit, pointer: &pointer, admitted: &admitted }).map_err(|error| Error::Io {
            operation: error.operation,
            path: crate::error::shown(&error.path).to_string(),
            source: error.source,
        })?;
    let pointed = found.pointed.into_iter().map(|(_, unit)| unit).collect();
    let retention = Retention { rule, source: found.units, pointed, safe };
    options.scan.filter.rules.extend(retention.left_out().iter().map(line_for));
    options.retain = Some(retention);
    Ok(())
}
