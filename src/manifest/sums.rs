//! The text of `sha256sum`: written exactly as GNU coreutils does, read strictly (`docs/format.md`).

use std::collections::HashSet;

use super::{Content, Digest, Tree};
use crate::path::{InvalidPath, RelPath};

/// What is wrong with a line.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)]
pub enum LineProblem {
    #[error("it is neither 'HEX  NAME' nor 'SHA256 (NAME) = HEX' with 64 lower-case digits")]
    Syntax,
    #[error("the line ends in CR LF: convert the file with 'dos2unix'")]
    CarriageReturn,
    #[error("the name has a backslash escape other than \\\\, \\n and \\r")]
    Escape,
    #[error(transparent)]
    Path(#[from] InvalidPath),
    #[error("the name occurs twice")]
    Twice,
    #[error("the name lies below '{0}', which is listed as a file")]
    BelowFile(RelPath),
    #[error("the last line has no line end: the file may be cut off")]
    CutOff,
}

/// A text that is not a list of checksums.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {problem}")]
pub struct SumsError {
    /// Counted from 1.
    pub line: usize,
    /// What is wrong with it.
    pub problem: LineProblem,
}

/// Reads a list of checksums. A leading `./` of a name, which `find . | xargs sha256sum` writes, is taken off.
///
/// # Errors
/// [`SumsError`] with the first line that breaks a rule.
pub fn parse(text: &[u8]) -> Result<Vec<(RelPath, Digest)>, SumsError> {
    let mut sums = Vec::new();
    let mut seen = HashSet::new();
    let mut rest = text;
    let mut number = 0;
    while !rest.is_empty() {
        number += 1;
        let at = |problem| SumsError { line: number, problem };
        let end = rest.iter().position(|&byte| byte == b'\n').ok_or_else(|| at(LineProblem::CutOff))?;
        let (path, digest) = line(&rest[..end]).map_err(at)?;
        if !seen.insert(path.clone()) {
            return Err(at(LineProblem::Twice));
        }
        sums.push((path, digest));
        rest = &rest[end + 1..];
    }
    for (number, (path, _)) in (1..).zip(&sums) {
        if let Some(above) = path.ancestors().find(|above| seen.contains(above)) {
            return Err(SumsError { line: number, problem: LineProblem::BelowFile(above) });
        }
    }
    Ok(sums)
}

fn line(line: &[u8]) -> Result<(RelPath, Digest), LineProblem> {
    if line.ends_with(b"\r") {
        return Err(LineProblem::CarriageReturn);
    }
    let (escaped, line) = match line.strip_prefix(b"\\") {
        Some(rest) => (true, rest),
        None => (false, line),
    };
    let (name, digest) = match line.strip_prefix(b"SHA256 (") {
        Some(rest) => tagged(rest),
        None => plain(line),
    }
    .ok_or(LineProblem::Syntax)?;
    let name = if escaped { unescape(name).ok_or(LineProblem::Escape)? } else { name.to_vec() };
    let path = RelPath::new(name.strip_prefix(b"./").unwrap_or(&name))?;
    Ok((path, digest))
}

fn plain(line: &[u8]) -> Option<(&[u8], Digest)> {
    let (hex, rest) = line.split_at_checked(64)?;
    let name = rest.strip_prefix(b"  ").or_else(|| rest.strip_prefix(b" *"))?;
    Some((name, Digest::from_hex(hex)?))
}

fn tagged(rest: &[u8]) -> Option<(&[u8], Digest)> {
    let (rest, hex) = rest.split_at_checked(rest.len().checked_sub(64)?)?;
    Some((rest.strip_suffix(b") = ")?, Digest::from_hex(hex)?))
}

fn unescape(name: &[u8]) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(name.len());
    let mut rest = name.iter();
    while let Some(&byte) = rest.next() {
        bytes.push(match byte {
            b'\\' => match rest.next()? {
                b'\\' => b'\\',
                b'n' => b'\n',
                b'r' => b'\r',
                _ => return None,
            },
            byte => byte,
        });
    }
    Some(bytes)
}

/// Writes the regular files of `tree` whose digests are known, each under all its names.
pub fn write(tree: &Tree) -> Vec<u8> {
    let mut text = Vec::new();
    for entry in tree.entries() {
        let digest = match &entry.content {
            Content::File { digest, .. } => *digest,
            Content::HardLink { first } => {
                tree.get(first).and_then(|first| first.file()).and_then(|(_, digest)| digest)
            }
            _ => None,
        };
        let Some(digest) = digest else { continue };
        let name = entry.path.as_bytes();
        if name.iter().any(|byte| matches!(byte, b'\\' | b'\n' | b'\r')) {
            text.push(b'\\');
        }
        text.extend_from_slice(digest.to_string().as_bytes());
        text.extend_from_slice(b"  ");
        for &byte in name {
            match byte {
                b'\\' => text.extend_from_slice(b"\\\\"),
                b'\n' => text.extend_from_slice(b"\\n"),
                b'\r' => text.extend_from_slice(b"\\r"),
                byte => text.push(byte),
            }
        }
        text.push(b'\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifest::{Entry, Timestamp};
    use sha2::{Digest as _, Sha256};
    use std::os::unix::ffi::OsStrExt;
    use std::process::Command;

    const NAMES: [&[u8]; 6] = [b"plain", b"new\nline", b"back\\slash", b"caf\xe9", b"-rf", b"cr\r"];

    #[test]
    fn s20_lists_go_both_ways_between_us_and_sha256sum() {
        let directory = tempfile::tempdir().unwrap();
        let mut entries = Vec::new();
        for name in NAMES {
            std::fs::write(directory.path().join(std::ffi::OsStr::from_bytes(name)), name).unwrap();
            entries.push(Entry {
                path: RelPath::new(name).unwrap(),
                content: Content::File { size: 0, digest: Some(Digest(Sha256::digest(name).into())) },
                mtime: Timestamp::default(),
                mode: 0o644,
                owner: "u".into(),
                group: "g".into(),
            });
        }
        let ours = write(&Tree::new(entries).unwrap());
        std::fs::write(directory.path().join("list"), &ours).unwrap();
        let run = |arguments: &[&str]| {
            let mut command = Command::new("sha256sum");
            command.current_dir(directory.path()).args(arguments);
            if arguments[0] != "--check" {
                command.args(NAMES.map(std::ffi::OsStr::from_bytes));
            }
            command.output().unwrap()
        };
        assert!(run(&["--check", "--strict", "list"]).status.success());
        for form in [&["--text", "--"][..], &["--binary", "--"], &["--tag", "--"]] {
            let mut theirs = parse(&run(form).stdout).unwrap();
            theirs.sort();
            assert_eq!(theirs, parse(&ours).unwrap(), "{form:?}");
        }
    }

    #[test]
    fn h11_a_file_that_is_listed_as_a_directory_too_is_refused() {
        let line = |name: &str| format!("{}  {name}\n", Digest([7; 32]));
        let error = parse([line("a/b/c"), line("x"), line("a/b")].concat().as_bytes()).unwrap_err();
        assert_eq!((error.line, error.to_string().contains("below 'a/b'")), (1, true), "{error}");
        assert!(parse([line("a-b"), line("a"), line("ab")].concat().as_bytes()).is_ok());
    }

    #[test]
    fn h12_what_sha256sum_lets_pass_is_refused_with_the_line() {
        let hex = "a".repeat(64);
        let good = format!("{hex}  fine\n");
        for bad in [
            "junk\n".to_owned(),
            format!("{hex} one-blank\n"),
            format!("{}  upper\n", hex.to_uppercase()),
            format!("{hex}  crlf\r\n"),
            "# comment\n".to_owned(),
            format!("{hex}  /absolute\n"),
            format!("{hex}  ../up\n"),
            format!("{hex}  nul\0\n"),
            format!("{hex}  fine\n"),
            format!("\\{hex}  bad\\escape\n"),
            format!("{hex}  cut-off"),
            "\n".to_owned(),
        ] {
            assert_eq!(parse(format!("{good}{bad}").as_bytes()).unwrap_err().line, 2, "{bad:?}");
        }
    }
}
