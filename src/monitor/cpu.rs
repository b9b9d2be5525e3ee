//! What content of sources has cost this process: seconds of a processor for reading, hashing and compressing it.
//!
//! A sum of the whole process, as the kernel's own sums are: whoever shows it need not know who read what.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// What is done with content at its source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// From the disk, or from what the kernel keeps of it.
    Read,
    /// SHA-256.
    Hash,
    /// zstd, and finding out whether it pays.
    Compress,
}

/// Nanoseconds, by stage.
static SPENT: [AtomicU64; 3] = [const { AtomicU64::new(0) }; 3];

/// Does `work`, and counts what this thread spends on it.
pub fn spend<T>(stage: Stage, work: impl FnOnce() -> T) -> T {
    let before = of_this_thread();
    let done = work();
    SPENT[stage as usize].fetch_add(of_this_thread().saturating_sub(before), Ordering::Relaxed);
    done
}

/// What this process has spent so far.
pub fn spent(stage: Stage) -> Duration {
    Duration::from_nanos(SPENT[stage as usize].load(Ordering::Relaxed))
}

fn of_this_thread() -> u64 {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    let part = |value: i64| u64::try_from(value).unwrap_or(0);
    part(time.tv_sec).saturating_mul(1_000_000_000).saturating_add(part(time.tv_nsec))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_is_counted_and_waiting_is_not() {
        let before = spent(Stage::Compress);
        let started = std::time::Instant::now();
        // Others of this process may compress meanwhile: only a lower bound holds.
        spend(Stage::Compress, || while started.elapsed() < Duration::from_millis(20) {});
        assert!(spent(Stage::Compress) > before);
        let waited = of_this_thread();
        std::thread::sleep(Duration::from_millis(20));
        assert!(of_this_thread() - waited < 20_000_000);
    }
}
