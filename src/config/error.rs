//! What is wrong with a configuration, where, and which key was probably meant.

use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};

use crate::error::{in_words, shown};

/// A configuration that cannot be used. All of them end with exit code 2.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum ConfigError {
    #[error(
        "cannot read the configuration {}: {}; name another with --config or LOCKSTEP_CONFIG",
        shown(path),
        in_words(reason)
    )]
    Read { path: PathBuf, reason: std::io::Error },
    #[error("configuration {}: {problem}", shown(path))]
    Untrusted { path: PathBuf, problem: Untrusted },
    #[error("{}:{position}: {message}", shown(path))]
    Invalid { path: PathBuf, position: Position, message: String },
    #[error("configuration {}: there is no {kind} '{name}'{}", shown(path), meant(name, known))]
    Missing { path: PathBuf, kind: &'static str, name: String, known: Vec<String> },
}

/// Why a configuration file is not believed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)]
pub enum Untrusted {
    #[error("others may write it (mode {0:04o}), and so could decide who reads the data; run chmod go-w on it")]
    Writable(u32),
    #[error("it belongs to user number {0}, but must belong to root or to the user that reads it; run chown on it")]
    Owner(u32),
    #[error("it is not a regular file")]
    NotAFile,
    #[error("it is larger than 1 MiB, or not text in UTF-8")]
    NotText,
}

/// A line and a column, both from 1; columns count characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Position {
    pub line: usize,
    pub column: usize,
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.line, self.column)
    }
}

/// The place of a span's start in `text`.
pub(super) fn position(text: &str, span: Option<Range<usize>>) -> Position {
    let mut start = span.map_or(0, |span| span.start.min(text.len()));
    while !text.is_char_boundary(start) {
        start -= 1;
    }
    let before = &text[..start];
    let line_start = before.rfind('\n').map_or(0, |at| at + 1);
    Position { line: before.matches('\n').count() + 1, column: before[line_start..].chars().count() + 1 }
}

/// What the parser says, with the key that was probably meant.
pub(super) fn from_toml(path: &Path, text: &str, error: &toml::de::Error) -> ConfigError {
    let mut message = error.message().trim_end().replace('\n', "; ");
    if let Some((unknown, known)) = unknown_field(&message) {
        message = format!("unknown key '{unknown}'{}", meant(&unknown, &known));
    }
    ConfigError::Invalid { path: path.to_owned(), position: position(text, error.span()), message }
}

/// The unknown name and the known ones out of serde's "unknown field `a`, expected one of `b`, `c`".
fn unknown_field(message: &str) -> Option<(String, Vec<String>)> {
    let rest = message.strip_prefix("unknown field `")?;
    let (unknown, rest) = rest.split_once("`, ")?;
    let known = rest.split('`').skip(1).step_by(2).map(str::to_owned).collect();
    Some((unknown.to_owned(), known))
}

/// `; did you mean 'x'?`, or all there are where none is near.
pub(crate) fn meant(name: &str, known: &[String]) -> String {
    let nearest = known.iter().map(|known| (distance(name, known), known)).min();
    match nearest {
        None => "; there are none".into(),
        Some((away, nearest)) if away <= 1 + name.chars().count() / 3 => format!("; did you mean '{nearest}'?"),
        Some(_) => format!("; there are: {}", known.join(", ")),
    }
}

/// How many letters are to be added, removed, changed or swapped with their neighbour, regardless of case.
fn distance(a: &str, b: &str) -> usize {
    let [a, b] = [a, b].map(|text| text.to_lowercase().chars().collect::<Vec<_>>());
    let mut rows = vec![vec![0; b.len() + 1]; a.len() + 1];
    rows[0] = (0..=b.len()).collect();
    for i in 1..=a.len() {
        rows[i][0] = i;
        for j in 1..=b.len() {
            let change = rows[i - 1][j - 1] + usize::from(a[i - 1] != b[j - 1]);
            rows[i][j] = change.min(rows[i - 1][j] + 1).min(rows[i][j - 1] + 1);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                rows[i][j] = rows[i][j].min(rows[i - 2][j - 2] + 1);
            }
        }
    }
    rows[a.len()][b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances() {
        for (a, b, away) in
            [("mode", "mode", 0), ("Mode", "mode", 0), ("mdoe", "mode", 1), ("modes", "mode", 1), ("", "ab", 2)]
        {
            assert_eq!(distance(a, b), away, "{a} {b}");
        }
    }

    #[test]
    fn positions_count_from_one_and_in_characters() {
        let at = |start| position("a\nbé = x", Some(start..start)).to_string();
        assert_eq!((at(0), at(2), at(5), at(99)), ("1:1".into(), "2:1".into(), "2:3".into(), "2:7".into()));
    }
}
