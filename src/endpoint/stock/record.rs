//! What a run was about to publish, written down before its first step.

use std::fmt::Write as _;

use super::append::Appended;
use super::moved::Linked;
use crate::manifest::Digest;
use crate::path::RelPath;
use crate::plan::publish::Step;

const TITLE: &str = "lockstep-sftp-commit 1 ";

/// One step, and whether what is staged for it lies with the pointers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Recorded {
    pub(super) step: Step,
    pub(super) pointer: bool,
    /// It is not replaced but appended to.
    pub(super) append: Option<Appended>,
}

impl Recorded {
    pub(super) fn is_removal(&self) -> bool {
        self.step.is_removal()
    }

    /// What failed.
    pub(super) fn describe(&self, reason: &str) -> String {
        let what = match self.step {
            Step::Replace(_) if self.append.is_some() => "append to it",
            Step::Replace(_) | Step::NewDirectory(_) | Step::Exchange(_) => "give it its name",
            Step::ApplyMetadata(_) => "set its owner, mode and time",
            Step::RemoveFile(_) | Step::RemoveDirectory(_) | Step::TakeAway(_) => "remove it",
        };
        format!("cannot {what}: {reason}")
    }
}

/// The steps, and the SHA-256 of the manifest that they follow: the record is void when another is in force.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Record {
    pub(super) base: Digest,
    /// Who publishes, and from where.
    pub(super) actor: String,
    pub(super) source: String,
    pub(super) steps: Vec<Recorded>,
    /// What is removed or replaced is moved to the directory of this name in the trash.
    pub(super) trash: Option<String>,
    /// What gets another name.
    pub(super) linked: Vec<Linked>,
}

impl Record {
    /// A title with the manifest's digest, a line that says who publishes, then one step a line: a letter and the path's bytes in hexadecimal; of a file that is appended
    /// to also the number of what is staged, and its length and time before.
    pub(super) fn encode(&self) -> String {
        let mut text = format!("{TITLE}{}\n", self.base);
        if !self.actor.is_empty() || !self.source.is_empty() {
            let _ = writeln!(text, "W{} {}", hex(self.actor.as_bytes()), hex(self.source.as_bytes()));
        }
        if let Some(name) = &self.trash {
            let _ = writeln!(text, "T{name}");
        }
        for Linked { from, to, size, seconds } in &self.linked {
            let _ = writeln!(text, "L{} {} {size} {seconds}", hex(from.as_bytes()), hex(to.as_bytes()));
        }
        for Recorded { step, pointer, append } in &self.steps {
            text.push(match step {
                Step::Replace(_) if append.is_some() => 'G',
                Step::Replace(_) if *pointer => 'P',
                Step::Replace(_) => 'R',
                Step::NewDirectory(_) => 'N',
                Step::Exchange(_) => 'X',
                Step::ApplyMetadata(_) => 'A',
                Step::RemoveFile(_) => 'F',
                Step::RemoveDirectory(_) => 'D',
                Step::TakeAway(_) => 'U',
            });
            text.push_str(&hex(step.path().as_bytes()));
            if let Some(Appended { tail, length, seconds }) = append {
                // Writing to a string cannot fail.
                let _ = write!(text, " {tail} {length} {seconds}");
            }
            text.push('\n');
        }
        text
    }

    /// Reads what [`Record::encode`] wrote.
    pub(super) fn decode(text: &[u8]) -> Option<Record> {
        let mut lines = std::str::from_utf8(text).ok()?.lines().peekable();
        let base = Digest::from_hex(lines.next()?.strip_prefix(TITLE)?.as_bytes())?;
        let (actor, source) = match lines.next_if(|line| line.starts_with('W')) {
            Some(line) => {
                let (actor, source) = line.get(1..)?.split_once(' ')?;
                (String::from_utf8(bytes_of(actor)?).ok()?, String::from_utf8(bytes_of(source)?).ok()?)
            }
            None => Default::default(),
        };
        let is_name =
            |name: &&str| !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
        let trash = match lines.next_if(|line| line.starts_with('T')) {
            Some(line) => Some(line.get(1..).filter(is_name)?.to_owned()),
            None => None,
        };
        let mut linked = Vec::new();
        while let Some(line) = lines.next_if(|line| line.starts_with('L')) {
            linked.push(link(line.get(1..)?)?);
        }
        let steps = lines.map(|line| {
            let (letter, rest) = line.split_at_checked(1)?;
            let (hex, append) = match (letter, rest.split_once(' ')) {
                ("G", Some((hex, append))) => (hex, Some(appended(append)?)),
                ("G", None) => return None,
                _ => (rest, None),
            };
            let path = path_of(hex)?;
            let step = match letter {
                "R" | "P" | "G" => Step::Replace(path),
                "N" => Step::NewDirectory(path),
                "A" => Step::ApplyMetadata(path),
                "F" => Step::RemoveFile(path),
                "D" => Step::RemoveDirectory(path),
                _ => return None,
            };
            Some(Recorded { step, pointer: letter == "P", append })
        });
        Some(Record { base, actor, source, steps: steps.collect::<Option<_>>()?, trash, linked })
    }
}

fn hex(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(2 * bytes.len());
    for byte in bytes {
        let _ = write!(text, "{byte:02x}");
    }
    text
}

fn bytes_of(hex: &str) -> Option<Vec<u8>> {
    (0..hex.len().div_ceil(2)).map(|at| u8::from_str_radix(hex.get(2 * at..2 * at + 2)?, 16).ok()).collect()
}

fn path_of(hex: &str) -> Option<RelPath> {
    RelPath::new(bytes_of(hex)?).ok()
}

fn link(text: &str) -> Option<Linked> {
    let mut words = text.split(' ');
    let (from, to) = (path_of(words.next()?)?, path_of(words.next()?)?);
    let (size, seconds) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
    words.next().is_none().then_some(Linked { from, to, size, seconds })
}

fn appended(text: &str) -> Option<Appended> {
    let mut words = text.split(' ');
    let (tail, length) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
    let seconds = words.next()?.parse().ok()?;
    words.next().is_none().then_some(Appended { tail, length, seconds })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_round_trips_and_a_damaged_one_is_none() {
        let path = || RelPath::new(b"a/\xff\n").unwrap();
        let grown = Appended { tail: 3, length: 1 << 40, seconds: -5 };
        let steps = [
            (Step::RemoveFile(path()), false, None),
            (Step::NewDirectory(path()), false, None),
            (Step::Replace(path()), false, None),
            (Step::RemoveDirectory(path()), false, None),
            (Step::ApplyMetadata(path()), false, None),
            (Step::Replace(path()), false, Some(grown)),
            (Step::Replace(path()), true, None),
        ];
        let steps = steps.map(|(step, pointer, append)| Recorded { step, pointer, append }).to_vec();
        let linked = vec![Linked { from: path(), to: RelPath::new("b").unwrap(), size: 9, seconds: -9 }];
        let (actor, source) = ("ann@host key\n".to_owned(), String::new());
        let trash = Some("20260131T065902Z-12".into());
        let record = Record { base: Digest([7; 32]), actor, source, steps, trash, linked };
        let text = record.encode();
        assert_eq!(Record::decode(text.as_bytes()), Some(record));
        for damaged in [&text[..text.len() - 2], &text[1..], "", &text.replace('R', "X")] {
            assert_eq!(Record::decode(damaged.as_bytes()), None, "{damaged}");
        }
        for lost in ["W61", " 62 9", " 9 -9", " 3", " 1099511627776", " -5"] {
            assert_eq!(Record::decode(text.replace(lost, "").as_bytes()), None, "{lost}");
        }
        for name in ["T\n", "T..\n", "Ta/b\n"] {
            assert_eq!(Record::decode(text.replace("T20260131T065902Z-12\n", name).as_bytes()), None, "{name}");
        }
        assert_eq!(Record::decode(text.replace("R61", "R2e2e2f").as_bytes()), None);
    }
}
