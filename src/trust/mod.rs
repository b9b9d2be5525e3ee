//! What both ends of a login go by: files that decide, and what is revoked.

use russh::keys::Certificate;
use russh::keys::ssh_key::public::KeyData;

pub mod revoked;
pub mod trusted_file;

/// What a client has proven to hold, or a host.
#[derive(Debug, Clone, Copy)]
pub enum Credential<'a> {
    /// A key.
    Key(&'a KeyData),
    /// A key, and a certificate for it. Its signature has been verified.
    Certificate(&'a Certificate),
}
