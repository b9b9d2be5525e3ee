//! The server: the listener, who may log in, and what answers a session.

pub mod access;
pub mod agent;
pub mod attributed;
pub mod attributes;
pub mod authorized_keys;
pub mod certificate;
pub mod channel;
pub mod confine;
mod connection;
pub mod hearsay;
pub mod host_key;
pub mod limits;
pub mod listener;
mod live;
mod login;
mod pace;
pub mod process;
mod protocol;
pub mod record;
pub mod revoked;
pub mod session;
mod spawn;
pub mod stdio;
pub mod strict;
pub mod trusted_file;
