//! What every layer needs to speak of failures: exit codes, and names made safe to print.
//!
//! Each module has its own error enum; this leaf holds only what they share.

use std::fmt;

/// How a command ends. The numbers are part of the command line's contract.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Exit {
    /// Done, or the data is good.
    Done = 0,
    /// The data is bad: mismatch, missing, unlisted, unreadable.
    BadData = 1,
    /// Wrong usage or configuration.
    Usage = 2,
    /// Signature or trust: host key, authentication.
    Trust = 3,
    /// Incomplete: some paths or targets failed, or the unit is not finished.
    Incomplete = 4,
    /// An input or output error.
    Io = 5,
    /// Try again: the target is locked, or the connection was lost.
    TryAgain = 75,
    /// Stopped by SIGHUP; as shells count, 128 and the signal. What was staged is kept.
    HungUp = 129,
    /// Stopped by SIGINT (Ctrl-C).
    Interrupted = 130,
    /// Stopped by SIGTERM.
    Terminated = 143,
}

impl Exit {
    /// The process exit status.
    pub fn code(self) -> u8 {
        self as u8
    }
}

/// Shows bytes that may hold anything (names of files above all) so that they cannot steer a terminal or forge a log
/// line: control bytes, backslash and bytes that are not UTF-8 appear as `\n`, `\\` or `\xHH`.
pub struct Escaped<'a>(pub &'a [u8]);

impl fmt::Display for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        use fmt::Write as _;
        for chunk in self.0.utf8_chunks() {
            for c in chunk.valid().chars() {
                match c {
                    '\\' => f.write_str("\\\\")?,
                    '\n' => f.write_str("\\n")?,
                    '\r' => f.write_str("\\r")?,
                    '\t' => f.write_str("\\t")?,
                    c if is_unsafe_to_print(c) => {
                        let mut utf8 = [0; 4];
                        for byte in c.encode_utf8(&mut utf8).bytes() {
                            write!(f, "\\x{byte:02x}")?;
                        }
                    }
                    c => f.write_char(c)?,
                }
            }
            for byte in chunk.invalid() {
                write!(f, "\\x{byte:02x}")?;
            }
        }
        Ok(())
    }
}

/// The longest text of a peer that is passed on, in characters; what is behind is cut off.
pub const SAID_MAX: usize = 2000;

/// What a peer says, made safe to print and of bounded length. Backslashes stay: what a lockstep says has the names in it
/// escaped already.
pub fn said(text: &[u8]) -> String {
    let mut shown = String::new();
    // No character takes more than four bytes: what is further behind would be cut off anyway.
    let whole = text.len() <= 4 * SAID_MAX;
    let text = String::from_utf8_lossy(&text[..text.len().min(4 * SAID_MAX)]);
    let mut left = text.chars();
    for c in left.by_ref().take(SAID_MAX) {
        if c == '\\' {
            shown.push(c);
        } else {
            shown.push_str(&Escaped(c.encode_utf8(&mut [0; 4]).as_bytes()).to_string());
        }
    }
    if !whole || left.next().is_some() {
        shown.push('…');
    }
    shown
}

/// Control characters (C0, DEL, C1) and the marks that reorder or hide text (bidirectional controls, zero-width).
fn is_unsafe_to_print(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{2069}' | '\u{feff}')
}

/// An error and its causes in one line, as `cli` and the logs print it: `a: b: c`.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = in_words(error);
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = in_words(cause);
        // Who failed may stand before each of them, and the cause within what came of it.
        let of_the_same = text.split_once(": ").and_then(|(who, _)| cause_text.strip_prefix(who)?.strip_prefix(": "));
        // A few letters may stand there by chance.
        let told = |cause: &str| text.ends_with(cause) || cause.len() > 16 && text.contains(cause);
        if !told(&cause_text) && !of_the_same.is_some_and(told) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}

/// What an error says of itself, without each ` (os error 2)` that the standard library puts after words that say it.
pub fn in_words(error: &(impl fmt::Display + ?Sized)) -> String {
    let text = error.to_string();
    let mut words = String::with_capacity(text.len());
    let mut rest = text.as_str();
    while let Some((before, after)) = rest.split_once(" (os error ") {
        words.push_str(before);
        rest = after.trim_start_matches(|c: char| c.is_ascii_digit());
        match rest.strip_prefix(')') {
            Some(left) if rest.len() < after.len() => rest = left,
            _ => {
                words.push_str(" (os error ");
                rest = after;
            }
        }
    }
    words + rest
}

/// `1 path`, `2 paths`.
pub fn counted(count: u64, one: &str, many: &str) -> String {
    format!("{count} {}", if count == 1 { one } else { many })
}

/// `1.5 GB`: powers of 1000, as disks are sold.
pub fn bytes_shown(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["bytes", "kB", "MB", "GB", "TB", "PB"];
    let (mut value, mut unit) = (bytes as f64, 0);
    while value >= 999.95 && unit + 1 < UNITS.len() {
        value /= 1000.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes} bytes") } else { format!("{value:.1} {}", UNITS[unit]) }
}

/// A path, made safe to print.
pub fn shown(path: &std::path::Path) -> Escaped<'_> {
    Escaped(path.as_os_str().as_encoded_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_shown_in_units() {
        let cases = [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (999_949, "999.9 kB"), (999_950, "1.0 MB")];
        for (bytes, text) in cases {
            assert_eq!(bytes_shown(bytes), text);
        }
    }

    #[test]
    fn causes_are_said_once_and_in_words() {
        let cause = || std::io::Error::from_raw_os_error(2);
        #[derive(Debug, thiserror::Error)]
        #[error("cannot read 'x'{0}")]
        struct Failed(&'static str, #[source] std::io::Error);
        assert_eq!(chain(&Failed("", cause())), "cannot read 'x': No such file or directory");
        let told = Failed(": No such file or directory (os error 2)", cause());
        assert_eq!(chain(&told), "cannot read 'x': No such file or directory");
        let twice = Failed(" of h: gone; try again", std::io::Error::other("cannot read 'x' of h: gone"));
        assert_eq!(chain(&twice), "cannot read 'x' of h: gone; try again");
        assert_eq!(in_words("a (os error 2); b (os error 13)"), "a; b");
        assert_eq!(in_words("a (os error x) (os error )"), "a (os error x) (os error )");
    }

    #[test]
    fn control_bytes_and_invalid_utf8_are_escaped() {
        let cases: [(&[u8], &str); 7] = [
            (b"plain.txt", "plain.txt"),
            (b"a\nb", "a\\nb"),
            (b"\x1b[31mred", "\\x1b[31mred"),
            (b"caf\xe9", "caf\\xe9"),
            ("café".as_bytes(), "café"),
            (b"back\\slash", "back\\\\slash"),
            ("\u{202e}gpj.exe".as_bytes(), "\\xe2\\x80\\xaegpj.exe"),
        ];
        for (name, shown) in cases {
            assert_eq!(Escaped(name).to_string(), shown);
        }
    }

    #[test]
    fn h09_what_a_peer_says_is_one_line_of_bounded_length() {
        assert_eq!(said(b"open 'a\\nb': caf\xe9\n\x1b[2J"), "open 'a\\nb': caf\u{fffd}\\n\\x1b[2J");
        assert_eq!(said("\u{202e}é".as_bytes()), "\\xe2\\x80\\xaeé");
        assert_eq!(said(&[b'a'; SAID_MAX]).len(), SAID_MAX);
        for long in [vec![b'a'; SAID_MAX + 1], vec![0x1b; 1 << 20], vec![0xff; 1 << 20], "€".repeat(1 << 20).into()] {
            let shown = said(&long);
            assert!(shown.ends_with('…') && shown.chars().count() <= 4 * SAID_MAX + 1, "{}", shown.len());
        }
    }
}
