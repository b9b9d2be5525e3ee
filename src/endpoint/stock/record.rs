//! What a run was about to publish, written down before its first step.

use std::fmt::Write as _;

use crate::manifest::Digest;
use crate::path::RelPath;
use crate::plan::publish::Step;

const TITLE: &str = "lockstep-sftp-commit 1 ";

/// One step, and whether what is staged for it lies with the pointers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Recorded {
    pub(super) step: Step,
    pub(super) pointer: bool,
}

impl Recorded {
    pub(super) fn is_removal(&self) -> bool {
        matches!(self.step, Step::RemoveFile(_) | Step::RemoveDirectory(_) | Step::TakeAway(_))
    }

    /// What failed.
    pub(super) fn describe(&self, reason: &str) -> String {
        let what = match self.step {
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
    pub(super) steps: Vec<Recorded>,
    /// What is removed or replaced is moved to the directory of this name in the trash.
    pub(super) trash: Option<String>,
}

impl Record {
    /// A title with the manifest's digest, then one step a line: a letter and the path's bytes in hexadecimal.
    pub(super) fn encode(&self) -> String {
        let mut text = format!("{TITLE}{}\n", self.base);
        if let Some(name) = &self.trash {
            let _ = writeln!(text, "T{name}");
        }
        for Recorded { step, pointer } in &self.steps {
            text.push(match step {
                Step::Replace(_) if *pointer => 'P',
                Step::Replace(_) => 'R',
                Step::NewDirectory(_) => 'N',
                Step::Exchange(_) => 'X',
                Step::ApplyMetadata(_) => 'A',
                Step::RemoveFile(_) => 'F',
                Step::RemoveDirectory(_) => 'D',
                Step::TakeAway(_) => 'U',
            });
            for byte in step.path().as_bytes() {
                // Writing to a string cannot fail.
                let _ = write!(text, "{byte:02x}");
            }
            text.push('\n');
        }
        text
    }

    /// Reads what [`Record::encode`] wrote.
    pub(super) fn decode(text: &[u8]) -> Option<Record> {
        let mut lines = std::str::from_utf8(text).ok()?.lines().peekable();
        let base = Digest::from_hex(lines.next()?.strip_prefix(TITLE)?.as_bytes())?;
        let is_name =
            |name: &&str| !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
        let trash = match lines.next_if(|line| line.starts_with('T')) {
            Some(line) => Some(line.get(1..).filter(is_name)?.to_owned()),
            None => None,
        };
        let steps = lines.map(|line| {
            let (letter, hex) = line.split_at_checked(1)?;
            let bytes = (0..hex.len().div_ceil(2)).map(|at| u8::from_str_radix(hex.get(2 * at..2 * at + 2)?, 16).ok());
            let path = RelPath::new(bytes.collect::<Option<Vec<u8>>>()?).ok()?;
            let step = match letter {
                "R" | "P" => Step::Replace(path),
                "N" => Step::NewDirectory(path),
                "A" => Step::ApplyMetadata(path),
                "F" => Step::RemoveFile(path),
                "D" => Step::RemoveDirectory(path),
                _ => return None,
            };
            Some(Recorded { step, pointer: letter == "P" })
        });
        Some(Record { base, steps: steps.collect::<Option<_>>()?, trash })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_round_trips_and_a_damaged_one_is_none() {
        let path = || RelPath::new(b"a/\xff\n").unwrap();
        let steps = [
            (Step::RemoveFile(path()), false),
            (Step::NewDirectory(path()), false),
            (Step::Replace(path()), false),
            (Step::RemoveDirectory(path()), false),
            (Step::ApplyMetadata(path()), false),
            (Step::Replace(path()), true),
        ];
        let steps = steps.map(|(step, pointer)| Recorded { step, pointer }).to_vec();
        let record = Record { base: Digest([7; 32]), steps, trash: Some("20260131T065902Z-12".into()) };
        let text = record.encode();
        assert_eq!(Record::decode(text.as_bytes()), Some(record));
        for damaged in [&text[..text.len() - 2], &text[1..], "", &text.replace('R', "X")] {
            assert_eq!(Record::decode(damaged.as_bytes()), None, "{damaged}");
        }
        for name in ["T\n", "T..\n", "Ta/b\n"] {
            assert_eq!(Record::decode(text.replace("T20260131T065902Z-12\n", name).as_bytes()), None, "{name}");
        }
        assert_eq!(Record::decode(text.replace("R61", "R2e2e2f").as_bytes()), None);
    }
}
