//! A side of a run that lies on this machine.

mod area;
mod circle;
mod commit;
mod fold;
mod known;
mod links;
mod metadata;
mod place;
mod publish;
mod refusals;
mod repair;
mod room;
mod source;
mod target;
mod unit;
mod writer;

pub use place::{anywhere, beneath};
pub(crate) use refusals::recorded;
pub use repair::Repair;
pub use source::LocalSource;
pub use target::LocalTarget;
pub(in crate::endpoint) use target::POINTERS;
