//! (in the making)
pub mod authorized_keys;
pub mod host_key;
pub mod limits;
pub mod stream;
