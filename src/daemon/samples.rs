//! How the lag of each target and its rate went in the last 24 hours, in memory: coarser the longer ago it is, so that it stays small.

use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, PoisonError};

use super::status::{Status, TargetStatus};

/// Targets of which something is kept; some ten megabytes.
const TARGETS: usize = 1000;
/// Seconds between two points, and how many are kept: a quarter of an hour, three hours, a day.
const TIERS: [(u64, usize); 3] = [(10, 90), (120, 90), (960, 90)];

/// How a target stood at a time, or at worst in the interval that begins there.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Point {
    /// Seconds since 1970.
    pub time: u64,
    pub lag_bytes: u64,
    pub lag_seconds: u64,
    pub bytes_per_second: u64,
}

/// What is known of a target.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Series {
    /// How many seconds back from now it is of.
    pub span_seconds: u64,
    /// Seconds between two points.
    pub step_seconds: u64,
    /// The oldest first.
    pub points: Vec<Point>,
}

/// The samples of all targets.
#[derive(Debug, Default)]
pub struct History(Mutex<HashMap<(String, String), Kept>>);

#[derive(Debug, Default)]
struct Kept {
    tiers: [VecDeque<Point>; 3],
    /// When it was looked at last, and what was transferred until then.
    before: Option<(u64, u64)>,
}

impl History {
    /// Nothing yet.
    pub fn new() -> History {
        History::default()
    }

    /// Notes how things stand. What the configuration has no more is forgotten.
    pub fn sample(&self, status: &Status) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut now = HashMap::with_capacity(all.len());
        for job in &status.jobs {
            for target in &job.targets {
                if now.len() == TARGETS {
                    break;
                }
                let key = (job.name.clone(), target.target.clone());
                let mut kept = all.remove(&key).unwrap_or_default();
                kept.add(status.now, target);
                now.insert(key, kept);
            }
        }
        *all = now;
    }

    /// How a target was: of the shortest span that shows all that is known of it, of a day at most.
    pub fn series(&self, job: &str, target: &str) -> Series {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(kept) = all.get(&(job.to_owned(), target.to_owned())) else { return Series::default() };
        let first = |at: usize| kept.tiers[at].front().map_or(u64::MAX, |point: &Point| point.time);
        // The finest that has lost nothing yet.
        let whole = |&at: &usize| first(at) <= first(TIERS.len() - 1).saturating_add(TIERS[TIERS.len() - 1].0);
        let at = (0..TIERS.len()).find(whole).unwrap_or(TIERS.len() - 1);
        let known = kept.tiers[0].back().map_or(0, |point| point.time).saturating_sub(first(at));
        let (step_seconds, points) = TIERS[at];
        Series {
            span_seconds: known.clamp(TIERS[0].0 * TIERS[0].1 as u64, step_seconds * points as u64),
            step_seconds,
            points: kept.tiers[at].iter().copied().collect(),
        }
    }
}

impl Kept {
    fn add(&mut self, now: u64, target: &TargetStatus) {
        // What a run has done so far is added to the rest when it ends.
        let done = target.transferred_bytes + target.progress.as_ref().map_or(0, |progress| progress.done_bytes);
        let rate =
            self.before.map_or(0, |(time, before)| done.saturating_sub(before) / now.saturating_sub(time).max(1));
        self.before = Some((now, done));
        let point =
            Point { time: now, lag_bytes: target.lag_bytes, lag_seconds: target.lag_seconds, bytes_per_second: rate };
        for (tier, (step, limit)) in self.tiers.iter_mut().zip(TIERS) {
            let begin = now - now % step;
            match tier.back_mut() {
                Some(last) if last.time == begin => {
                    last.lag_bytes = last.lag_bytes.max(point.lag_bytes);
                    last.lag_seconds = last.lag_seconds.max(point.lag_seconds);
                    last.bytes_per_second = last.bytes_per_second.max(point.bytes_per_second);
                }
                // A clock that was put back: what is of the future is not known.
                Some(last) if last.time > begin => {
                    tier.clear();
                    tier.push_back(Point { time: begin, ..point });
                }
                _ => {
                    if tier.len() == limit {
                        tier.pop_front();
                    }
                    tier.push_back(Point { time: begin, ..point });
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::status::{JobStatus, Watching};
    use super::*;

    fn status(now: u64, targets: Vec<TargetStatus>) -> Status {
        let job = JobStatus {
            name: "j".into(),
            source: String::new(),
            paused: false,
            watching: Watching::default(),
            unfinished: Vec::new(),
            unfinished_count: 0,
            halted: None,
            targets,
        };
        Status {
            format: String::new(),
            version: String::new(),
            host: String::new(),
            pid: 1,
            started: 0,
            now,
            config: String::new(),
            config_error: None,
            jobs: vec![job],
            recent: Vec::new(),
            source_cpu: Default::default(),
        }
    }

    fn target(lag_seconds: u64, transferred_bytes: u64) -> TargetStatus {
        TargetStatus { target: "t".into(), lag_seconds, transferred_bytes, ..TargetStatus::default() }
    }

    #[test]
    fn a_week_of_samples_stays_small_and_shows_a_day() {
        let history = History::new();
        let start = 1_000_000;
        history.sample(&status(start, vec![target(1, 0)]));
        assert_eq!(history.series("j", "t").span_seconds, 900);
        for tick in 1..=600 {
            history.sample(&status(start + tick * 10, vec![target(tick, tick * 1000)]));
        }
        let series = history.series("j", "t");
        assert_eq!(series.span_seconds, 6040);
        assert!(series.points.len() >= 50, "{}", series.points.len());
        // The worst of each interval is kept.
        assert_eq!(series.points.last().unwrap().lag_seconds, 600);
        assert!(series.points.iter().skip(1).all(|point| point.bytes_per_second == 100), "{series:?}");
        for tick in 601..=60_480 {
            history.sample(&status(start + tick * 10, vec![target(0, 0)]));
        }
        let series = history.series("j", "t");
        assert!((86_000..=86_400).contains(&series.span_seconds) && series.points.len() == 90, "{series:?}");
        assert!(series.points.windows(2).all(|two| two[1].time - two[0].time == 960));
        history.sample(&status(start, vec![]));
        assert!(history.series("j", "t").points.is_empty());
    }

    #[test]
    fn targets_beyond_a_thousand_are_not_kept_and_a_clock_that_was_put_back_hurts_nothing() {
        let many: Vec<_> =
            (0..1100).map(|n| TargetStatus { target: n.to_string(), ..TargetStatus::default() }).collect();
        let history = History::new();
        history.sample(&status(5000, many.clone()));
        history.sample(&status(1000, many));
        assert_eq!(history.0.lock().unwrap().len(), TARGETS);
        assert_eq!(history.series("j", "7").points.len(), 1);
    }
}
