//! Refuses what came through this directory before.

use super::place::Place;
use crate::endpoint::Error;
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
    let refused = trail::refusal(trail, &stop_at(&place.shown(), &place.called()));
    refused.map_or(Ok(()), |why| Err(Error::Usage(why)))
}
