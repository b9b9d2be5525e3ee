//! The `lockstep` command: a thin shell over the library.

use std::process::ExitCode;

// Packet buffers of 64 KiB and more are trimmed and faulted in again by glibc's allocator: a third of the throughput.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    ExitCode::from(lockstep::cli::run(std::env::args_os()).code())
}
