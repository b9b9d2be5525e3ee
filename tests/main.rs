//! All integration tests in one binary.

// A test that cannot go on fails; saying why at each step would hide what it tests.
#![allow(clippy::unwrap_used)]

mod architecture;
mod cli;
mod pipeline;
mod push;
mod quickstart;
mod serve;
mod ssh;
