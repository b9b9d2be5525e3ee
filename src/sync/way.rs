//! How a run gives way to others on the same machine.

use rustix::io::Errno;

/// A nice value that cannot be had.
#[derive(Debug, thiserror::Error)]
#[error(
    "cannot run with nice = {nice}: {}; under systemd the unit has to allow it, as nice.conf of the examples does; a value below its own takes CAP_SYS_NICE or \
     LimitNICE=, too",
    std::io::Error::from(*errno)
)]
pub struct NiceError {
    nice: i8,
    errno: Errno,
}

/// Gives this thread, and those that it starts from now on, a nice value: -20 (before others) to 19 (after all). On Linux it is of
/// a thread, not of its process.
///
/// # Errors
/// [`NiceError`] where the system does not allow it.
pub fn be_nice(nice: i8) -> Result<(), NiceError> {
    rustix::process::setpriority_process(None, nice.into()).map_err(|errno| NiceError { nice, errno })
}
