//! `copy-data`: from one open file to another.

use std::fs::File;

use super::files::OpenFile;
use super::{Failed, Status};
use crate::root::Metadata;
use crate::server::quota::STEP_BYTES;
use crate::staging::copy_range;

/// Copies `length` bytes, or all there are when it is 0; until nobody waits for it any more. Where room is limited, it is taken
/// in steps: what is taken and not there yet would be overlooked by a look at the tree.
///
/// # Errors
/// End of file when there are fewer, as OpenSSH's server has it; what was there is copied.
pub(super) fn copy(
    (from, from_at): (&File, u64),
    (to, to_at): (&OpenFile, u64),
    length: u64,
    gone: &dyn Fn() -> bool,
) -> Result<(), Failed> {
    let most = if length == 0 { u64::MAX } else { length };
    let mut copied = 0;
    while copied < most {
        let (at, end) = (from_at.saturating_add(copied), to_at.saturating_add(copied));
        let step = match to.is_limited() {
            true => Metadata::of(from)?.size.saturating_sub(at).min(most - copied).min(STEP_BYTES),
            false => most - copied,
        };
        to.grow(end, step)?;
        let count = copy_range((from, at), (&to.file, end, to.append), step, gone)?;
        copied += count;
        if count < step || step == 0 {
            break;
        }
    }
    if copied < length { Err(Status::EndOfFile.into()) } else { Ok(()) }
}
