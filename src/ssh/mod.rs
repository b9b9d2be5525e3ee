//! The way to other hosts: connections, keys and host keys, and the streams over them.
//!
//! Keys only: no password is ever offered. A host key that is not on file is refused, and so is one that differs.

mod auth;
mod known_hosts;
mod link;
mod remote;
mod sha1;

pub use remote::{Passphrase, SshOptions, SshRemote};

#[cfg(test)]
mod tests;
