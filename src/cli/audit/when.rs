//! Times as people give them.

use chrono::{DateTime, Duration, NaiveDate, NaiveDateTime, NaiveTime, Utc};

/// A moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Time(pub(super) DateTime<Utc>);

pub(super) fn time(text: &str) -> Result<Time, String> {
    at(text, Utc::now()).map(Time).ok_or_else(|| {
        "write it as 2026-01-31, 2026-01-31T06:59:02Z (without a zone: UTC), or so long ago, as '90m', '12h' or '7d'".to_owned()
    })
}

fn at(text: &str, now: DateTime<Utc>) -> Option<DateTime<Utc>> {
    if let Some(ago) = ago(text) {
        return now.checked_sub_signed(ago);
    }
    if let Ok(time) = DateTime::parse_from_rfc3339(text) {
        return Some(time.to_utc());
    }
    let day = NaiveDate::parse_from_str(text, "%Y-%m-%d").map(|day| day.and_time(NaiveTime::MIN));
    let forms = ["%Y-%m-%dT%H:%M:%S", "%Y-%m-%dT%H:%M", "%Y-%m-%d %H:%M:%S", "%Y-%m-%d %H:%M"];
    let moment = || forms.iter().find_map(|form| NaiveDateTime::parse_from_str(text, form).ok());
    day.ok().or_else(moment).map(|time| time.and_utc())
}

fn ago(text: &str) -> Option<Duration> {
    let (number, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    let number: i64 = number.bytes().all(|digit| digit.is_ascii_digit()).then(|| number.parse().ok())??;
    let seconds = match unit {
        "s" => 1,
        "m" => 60,
        "h" => 3600,
        "d" => 86_400,
        _ => return None,
    };
    Duration::try_seconds(number.checked_mul(seconds)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_as_people_write_them() {
        let time = |text: &str| DateTime::parse_from_rfc3339(text).unwrap().to_utc();
        let now = time("2026-01-31T12:00:00Z");
        for (text, expected) in [
            ("2026-01-30", "2026-01-30T00:00:00Z"),
            ("2026-01-30T06:59", "2026-01-30T06:59:00Z"),
            ("2026-01-30 06:59:02", "2026-01-30T06:59:02Z"),
            ("2026-01-30T06:59:02.5+01:00", "2026-01-30T05:59:02.5Z"),
            ("90m", "2026-01-31T10:30:00Z"),
            ("7d", "2026-01-24T12:00:00Z"),
        ] {
            assert_eq!(at(text, now), Some(time(expected)), "{text}");
        }
        for text in ["", "d", "7", "7w", "-1d", "2026-02-30", "yesterday", "99999999999999999d", "é"] {
            assert_eq!(at(text, now), None, "{text}");
        }
    }
}
