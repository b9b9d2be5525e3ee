//! What of a file need not be sent, since the target has it already: a list of blocks comes from there, and what the source reads is
//! held against it.
//!
//! What always holds: the steps cover what was fed, in its order and without a gap. Nothing is believed of the list but where to
//! look: the target hashes the whole file when all of it is there.

use std::sync::Arc;

use crate::endpoint::Block;

mod candidates;
mod in_place;
mod lister;
mod matcher;

pub use crate::codec::chunks::{Alike, BLOCK_LENGTH, Beginning, Cut, Order, PIECES_MAX, Part, Wanted, Within};
pub use crate::codec::sums::{Summing, Sums};
pub use candidates::candidates;
pub use in_place::InPlace;
pub use lister::{Lists, Looks, list};
pub use matcher::Matcher;

/// A smaller file is sent sooner than it is compared.
pub const DELTA_BYTES_MIN: u64 = 1 << 20;
/// So much is copied by one step.
pub const COPY_MAX: u64 = 8 << 20;

/// What a target that cannot look into its files knows of those that a file may be made of.
#[derive(Debug, Default)]
pub struct Former {
    /// The first is, by its digest, the file as a whole.
    pub same: bool,
    /// The first is what lies under the name of a file that only grows.
    pub there: Option<Beginning>,
    /// The sums of each.
    pub pieces: Vec<Arc<Sums>>,
}

/// How a part of a file comes to the target.
#[derive(Debug)]
pub enum Step {
    /// The target has it.
    Copy {
        /// Where in the file.
        offset: u64,
        /// How much.
        length: u64,
        /// Where the target has it.
        from: Within,
    },
    /// It has to be sent.
    Data {
        /// Where in the file.
        offset: u64,
        /// The bytes.
        block: Block,
    },
}
