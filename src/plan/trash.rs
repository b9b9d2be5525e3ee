//! What is moved aside instead of being removed: how the directories of the trash are called, and when they go.
//!
//! Each run that puts something into the trash of a root has a directory of its own there, named by the time and by the
//! generation that the run published: `20260131T065902Z-12`. Below it everything lies at the path that it had.

use chrono::{DateTime, NaiveDateTime, Utc};

/// Where the trash of a root is.
pub const TRASH: &str = ".lockstep/trash";
/// How long something stays there unless a run says otherwise: seven days, in seconds.
pub const USUAL_KEEP_SECONDS: u64 = 7 * 86_400;

const TIME: &str = "%Y%m%dT%H%M%SZ";

/// The name of a run's directory. `seconds` count from 1970.
pub fn name(seconds: i64, generation: u64) -> String {
    let time = DateTime::<Utc>::from_timestamp(seconds, 0).unwrap_or_default();
    format!("{}-{generation}", time.format(TIME))
}

/// Whether a directory of this name has been there for longer than `keep_seconds`. What is called otherwise is nobody's of
/// ours and stays, and so does what comes from the future of a clock that was put back.
pub fn is_expired(name: &[u8], now_seconds: i64, keep_seconds: u64) -> bool {
    let time = std::str::from_utf8(name).ok().and_then(|name| {
        let (time, generation) = name.split_once('-')?;
        generation.parse::<u64>().ok()?;
        NaiveDateTime::parse_from_str(time, TIME).ok()
    });
    time.is_some_and(|time| {
        u64::try_from(now_seconds.saturating_sub(time.and_utc().timestamp())).is_ok_and(|age| age >= keep_seconds)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_is_named_by_time_and_generation_and_goes_when_its_time_is_over() {
        let name = name(1_769_842_742, 12);
        assert_eq!(name, "20260131T065902Z-12");
        let expired = |name: &str, later: i64, keep| is_expired(name.as_bytes(), 1_769_842_742 + later, keep);
        for (later, keep, gone) in
            [(0, 0, true), (9, 10, false), (10, 10, true), (-1, 0, false), (i64::MAX / 2, 1, true)]
        {
            assert_eq!(expired(&name, later, keep), gone, "{later} {keep}");
        }
        for other in [
            "",
            "notes",
            "20260131T065902Z",
            "20260131T065902Z-",
            "20260131T065902Z-x",
            "2026-12",
            "20261331T065902Z-1",
        ] {
            assert!(!expired(other, 1 << 40, 0), "{other}");
        }
        assert!(!is_expired(b"\xff-1", i64::MAX, 0));
    }
}
