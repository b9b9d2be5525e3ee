//! (in the making)
pub mod authorized_keys;
pub mod channel;
pub mod host_key;
pub mod limits;
pub mod listener;
pub mod stream;
