//! Owner, mode and ACLs of what lies on the disk.
//!
//! Everything goes through the descriptor of one inode: a name that is exchanged meanwhile changes nothing about which
//! file is read or changed, and no link is followed.

mod inode;
pub mod secret;

pub use inode::{AclLists, Inode};
