//! A host that has no room for a connection is asked again, less and less often, before a run is given up.

use std::time::{Duration, Instant};

use crate::daemon::backoff;
use crate::endpoint::link::ConnectError;
use crate::monitor::{Event, Monitor};

/// The longest pause between two tries.
const PAUSE: Duration = Duration::from_secs(8);
/// A stop is noticed within so long.
const STEP: Duration = Duration::from_millis(100);

/// Tries until it works, fails for another reason, the host's patience is over, or the user wants to stop.
pub(super) fn patiently<T>(
    monitor: &dyn Monitor,
    open: impl Fn() -> Result<T, ConnectError>,
) -> Result<T, ConnectError> {
    let began = Instant::now();
    let mut failures = 0;
    loop {
        let error = match open() {
            Ok(opened) => return Ok(opened),
            Err(error) => error,
        };
        failures += 1;
        let next = Instant::now() + backoff::wait(failures, PAUSE);
        if next.duration_since(began) > error.patience {
            return Err(error);
        }
        let detail = format!("{}; trying again", error.message);
        monitor.event(if failures == 1 { Event::Warning(&detail) } else { Event::Detail(&detail) });
        while Instant::now() < next {
            if monitor.stopped() {
                return Err(error);
            }
            std::thread::sleep(STEP.min(next.saturating_duration_since(Instant::now())));
        }
    }
}
