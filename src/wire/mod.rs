//! The messages of SFTP version 3 and of lockstep's extensions, and the first one of SSH.

pub mod alike;
pub mod buffer;
pub mod entries;
pub mod extension;
pub mod kexinit;
pub mod notes;
pub mod sftp;
pub mod tar;
