//! All integration tests in one binary.

// A test that cannot go on fails; saying why at each step would hide what it tests.
#![allow(clippy::unwrap_used)]

mod architecture;
mod cli;
mod interop;
mod pipeline;
mod serve;
mod sftp_side_by_side;
mod ssh;
mod wire;
