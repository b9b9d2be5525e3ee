//! A side of a run that lies on this machine.

mod area;
mod audited;
mod changes;
mod circle;
mod commit;
mod early;
mod fold;
mod forbidden;
mod known;
mod links;
mod metadata;
mod place;
mod prepare;
mod publish;
mod recall;
mod record;
mod refusals;
mod repair;
mod retire;
mod room;
mod source;
mod target;
mod trash;
mod unit;
mod writer;

pub use place::{anywhere, beneath};
pub(crate) use refusals::recorded;
pub use repair::Repair;
pub use source::LocalSource;
pub(in crate::endpoint) use source::{LocalReader, Looked, Opened, Piece, changed, hashed, produced_whole, unreadable};
pub use target::LocalTarget;
pub(crate) use target::POINTERS;
