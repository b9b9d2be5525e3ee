//! What the tests share: servers to talk to, and ways to look at what they did.

pub(crate) mod raw;
