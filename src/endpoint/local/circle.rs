//! Refuses what came through this directory before.

use super::place::Place;
use crate::endpoint::Error;
use crate::error::said;
use crate::plan::trail::{self, Stop};
use crate::staging::stop_at;

/// Fails where `trail` leads back to `place`.
///
/// # Errors
/// [`Error::Usage`]: a person has to take a part of the circle away.
pub(super) fn refuse(place: &Place, trail: &[Stop]) -> Result<(), Error> {
    if trail.is_empty() {
        return Ok(());
    }
    trail::check(trail).map_err(Error::Usage)?;
    let Some(names) = trail::circle(trail, &stop_at(&place.shown(), &place.called())) else { return Ok(()) };
    let names: Vec<String> = names.iter().map(|name| said(name.as_bytes())).collect();
    let from = names.len().checked_sub(2).map_or("", |at| names[at].as_str());
    Err(Error::Usage(format!(
        "it would go in a circle: {}; an edit or a removal at one place would be undone by another. Take one of these targets \
         out of its job. Where that was done already, remove '.lockstep/trail' of {from}",
        names.join(" -> ")
    )))
}
