//! The server: the listener, who may log in, and what answers a session.

pub mod agent;
pub mod attributes;
pub mod authorized_keys;
pub mod channel;
pub mod host_key;
pub mod limits;
pub mod listener;
pub mod session;
pub mod stdio;
