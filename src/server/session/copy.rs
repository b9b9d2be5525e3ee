//! `copy-data`: from one open file to another.

use std::fs::File;

use super::{Failed, Status};
use crate::staging::copy_range;

/// Copies `length` bytes, or all there are when it is 0; until nobody waits for it any more.
///
/// # Errors
/// End of file when there are fewer, as OpenSSH's server has it; what was there is copied.
pub(super) fn copy(
    from: (&File, u64),
    to: (&File, u64, bool),
    length: u64,
    gone: &dyn Fn() -> bool,
) -> Result<(), Failed> {
    let most = if length == 0 { u64::MAX } else { length };
    match copy_range(from, to, most, gone)? {
        copied if copied < length => Err(Status::EndOfFile.into()),
        _ => Ok(()),
    }
}
