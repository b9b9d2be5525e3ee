//! A side of a run that lies on this machine.

mod commit;
mod metadata;
mod place;
mod source;
mod target;
mod writer;

pub use place::{anywhere, beneath};
pub use source::LocalSource;
pub use target::LocalTarget;
pub(in crate::endpoint) use target::POINTERS;
