//! The way to other hosts: connections, keys and host keys, and the streams over them.
//!
//! Keys only: no password is ever offered. A host key that is not on file is refused, and so is one that differs.

use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

mod agent;
mod auth;
mod beside;
pub mod certify;
pub mod config;
mod credit;
mod dial;
mod enroll;
mod foreword;
mod identity;
pub mod key_file;
mod known_hosts;
mod link;
mod look;
mod offer;
mod options;
mod remote;
mod scan;
mod sha1;
mod signing;
mod trust;

pub use enroll::Enrolled;
pub use known_hosts::{Finding, judge_hosts, revoke_host};
pub use look::Outlook;
pub use offer::Offer;
pub use options::{AddressFamily, Keepalive, Passphrase, SshOptions, UnknownHost};
pub use remote::SshRemote;
pub use scan::Shown;
pub use signing::SigningKey;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A path of this machine, made safe to print.
fn shown(path: &Path) -> String {
    crate::error::Escaped(path.as_os_str().as_encoded_bytes()).to_string()
}

/// A word for the shell.
pub fn quote(text: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-/:@+".contains(&byte);
    if !text.is_empty() && text.bytes().all(plain) {
        text.to_owned()
    } else {
        format!("'{}'", text.replace('\'', "'\\''"))
    }
}

#[cfg(test)]
mod tests;
