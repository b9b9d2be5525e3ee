//! What was looked at and what is to be thought of it: a line each, with what to do.

use std::fmt::Write as _;

use serde::Serialize;

/// How much something weighs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Level {
    Ok,
    Warning,
    Error,
}

impl Level {
    fn name(self) -> &'static str {
        match self {
            Level::Ok => "ok",
            Level::Warning => "warning",
            Level::Error => "error",
        }
    }
}

/// One thing that was looked at. All of it is safe to print.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Finding {
    pub(super) level: Level,
    /// What was looked at: `job maps`, `clock`.
    pub(super) about: String,
    /// How it is, and what that means.
    pub(super) says: String,
    /// What to do; empty where there is nothing.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(super) remedy: String,
}

impl Finding {
    pub(super) fn new(level: Level, about: &str, says: impl Into<String>, remedy: &str) -> Finding {
        Finding { level, about: about.to_owned(), says: says.into(), remedy: remedy.to_owned() }
    }

    pub(super) fn ok(about: &str, says: impl Into<String>) -> Finding {
        Finding::new(Level::Ok, about, says, "")
    }

    pub(super) fn warning(about: &str, says: impl Into<String>, remedy: &str) -> Finding {
        Finding::new(Level::Warning, about, says, remedy)
    }

    pub(super) fn error(about: &str, says: impl Into<String>, remedy: &str) -> Finding {
        Finding::new(Level::Error, about, says, remedy)
    }
}

/// The worst of them.
pub(super) fn worst(findings: &[Finding]) -> Level {
    findings.iter().map(|finding| finding.level).max().unwrap_or(Level::Ok)
}

/// `2 errors, 1 warning`; empty where all is well.
pub(super) fn counts(findings: &[Finding]) -> String {
    let count = |level| findings.iter().filter(|finding| finding.level == level).count() as u64;
    let words = [(count(Level::Error), "error", "errors"), (count(Level::Warning), "warning", "warnings")];
    let some = words.into_iter().filter(|(count, ..)| *count > 0);
    some.map(|(count, one, many)| crate::error::counted(count, one, many)).collect::<Vec<_>>().join(", ")
}

/// A line for each, and one below it with what to do.
pub(super) fn table(findings: &[Finding]) -> String {
    let mut text = String::new();
    for Finding { level, about, says, remedy } in findings {
        let _ = writeln!(text, "{:<8} {about}: {says}", level.name());
        if !remedy.is_empty() {
            let _ = writeln!(text, "         {remedy}");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn findings_are_lines() {
        let all = [Finding::ok("clock", "kept right"), Finding::warning("umask", "it is 0000", "set it")];
        assert_eq!(table(&all), "ok       clock: kept right\nwarning  umask: it is 0000\n         set it\n");
        assert_eq!((worst(&all), counts(&all).as_str(), counts(&all[..1]).as_str()), (Level::Warning, "1 warning", ""));
    }
}
