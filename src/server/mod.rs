//! The server: the listener, who may log in, and what answers a session.

pub mod access;
pub mod agent;
pub mod attributed;
pub mod attributes;
pub mod authorized_keys;
pub mod certificate;
pub mod channel;
mod client;
mod connection;
pub mod hearsay;
pub mod host_key;
pub mod limits;
pub mod listener;
mod live;
pub mod record;
pub mod revoked;
pub mod session;
pub mod stdio;
pub mod strict;
pub mod trusted_file;
