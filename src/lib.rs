//! lockstep keeps datasets and checkpoints in step between training servers, and proves that what arrived is what
//! was sent.
//!
//! The modules form layers; a module uses only those before it (`docs/architecture.md`, checked by
//! `tests/architecture`). The library never prints: it reports to a [`monitor::Monitor`].

// Leaves: usable from everywhere.
pub mod error;
pub mod monitor;

// Pure: no tokio, no files, no sockets.
pub mod codec;
pub mod filter;
pub mod manifest;
pub mod path;
pub mod plan;
pub mod policy;
pub mod signature;
pub mod wire;

// Local I/O: blocking.
pub mod access;
pub mod audit;
pub mod check;
pub mod drift;
pub mod layout;
pub mod root;
pub mod scan;
pub mod staging;

// What the engine sees of one side, and the engine.
pub mod endpoint;
pub mod sync;

// What both ends of a login go by.
pub mod trust;

// Shells: never import each other; `cli` alone puts them together.
pub mod cli;
pub mod config;
pub mod daemon;
pub mod server;
pub mod ssh;
