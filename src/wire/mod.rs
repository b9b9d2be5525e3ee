//! The messages of SFTP version 3 and of lockstep's extensions.

pub mod buffer;
pub mod entries;
pub mod extension;
pub mod notes;
pub mod sftp;
pub mod tar;
