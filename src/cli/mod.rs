//! The command line.
use crate::error::Exit;
/// (in the making)
pub fn run(_: impl Iterator<Item = std::ffi::OsString>) -> Exit {
    Exit::Done
}
