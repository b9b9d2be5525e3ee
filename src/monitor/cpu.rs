//! What content of sources has cost this process: seconds of a processor for reading, hashing and compressing it; and whether
//! this machine has processors that do nothing.
//!
//! A sum of the whole process, as the kernel's own sums are: whoever shows it need not know who read what.

use std::fs::File;
use std::io::Read as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, TryLockError};
use std::time::{Duration, Instant};

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

/// How often the machine is looked at.
const LOOK: Duration = Duration::from_millis(250);

/// Processors that did nothing between the last two looks, 1.0 for one; `None` while nobody knows.
pub fn idle_processors() -> Option<f64> {
    static LOOKED: Mutex<Option<(Instant, Ticks)>> = Mutex::new(None);
    /// The bits of the number; not a number for `None`.
    static IDLE: AtomicU64 = AtomicU64::new(f64::NAN.to_bits());
    let looked = match LOOKED.try_lock() {
        Ok(looked) => Some(looked),
        Err(TryLockError::Poisoned(looked)) => Some(looked.into_inner()),
        Err(TryLockError::WouldBlock) => None,
    };
    if let Some(mut looked) = looked
        && looked.is_none_or(|(at, _)| at.elapsed() >= LOOK)
        && let Some(now) = Ticks::now()
    {
        if let Some((at, before)) = looked.replace((Instant::now(), now)) {
            // After a pause of the run it says nothing of this moment.
            let idle = if at.elapsed() < 8 * LOOK { before.idle_until(now) } else { None };
            IDLE.store(idle.unwrap_or(f64::NAN).to_bits(), Ordering::Relaxed);
        }
    }
    Some(f64::from_bits(IDLE.load(Ordering::Relaxed))).filter(|idle| !idle.is_nan())
}

/// What the processors of the machine have done since its start, in the kernel's ticks: `cpu` of proc_stat(5).
#[derive(Debug, Clone, Copy)]
struct Ticks {
    idle: u64,
    all: u64,
    processors: usize,
}

impl Ticks {
    fn now() -> Option<Ticks> {
        // The first line is what is needed.
        let mut text = String::new();
        File::open("/proc/stat").ok()?.take(512).read_to_string(&mut text).ok()?;
        Ticks::read(text.lines().next()?, std::thread::available_parallelism().ok()?.get())
    }

    fn read(line: &str, processors: usize) -> Option<Ticks> {
        let numbers: Option<Vec<u64>> = line.strip_prefix("cpu ")?.split_whitespace().map(|n| n.parse().ok()).collect();
        let numbers = numbers?;
        // user nice system idle iowait irq softirq steal; guests are counted in user already.
        Some(Ticks { idle: numbers.get(3)? + numbers.get(4)?, all: numbers.iter().take(8).sum(), processors })
    }

    fn idle_until(self, now: Ticks) -> Option<f64> {
        let all = now.all.checked_sub(self.all).filter(|&all| all > 0)?;
        Some(now.idle.checked_sub(self.idle)? as f64 / all as f64 * now.processors as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn idle_is_what_was_neither_worked_nor_stolen() {
        let before = Ticks::read("cpu  100 0 50 800 50 0 0 0 0 0", 4).unwrap();
        let after = Ticks::read("cpu  140 0 60 830 70 0 0 0 0 0", 4).unwrap();
        assert!((before.idle_until(after).unwrap() - 2.0).abs() < 1e-9);
        assert!(before.idle_until(before).is_none());
        assert!(after.idle_until(before).is_none());
        assert!(Ticks::read("cpu0 1 2 3 4 5", 1).is_none());
        assert!(Ticks::read("cpu 1 2 3", 1).is_none());
        assert!(Ticks::now().is_some());
    }

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
