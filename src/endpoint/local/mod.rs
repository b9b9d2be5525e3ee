//! A side of a run that lies on this machine.

mod source;

pub use source::LocalSource;
