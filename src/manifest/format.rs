//! The canonical text of a manifest (`docs/format.md`). There is exactly one way to write a given manifest, and
//! reading accepts nothing else.

use std::fmt::Write as _;
use std::io::{self, BufRead, Write};

use sha2::{Digest as _, Sha256};

use super::{Content, Digest, Entry, InvalidTree, Manifest, Name, Timestamp, Tree};
use crate::path::{InvalidPath, RelPath};

/// What is wrong with a line.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)]
pub enum LineProblem {
    #[error("it is not a lockstep manifest of version 1")]
    NotAManifest,
    #[error("a field is missing, or there is one too many")]
    Fields,
    #[error("the {0} is not written as it must be")]
    Field(&'static str),
    #[error(transparent)]
    Path(#[from] InvalidPath),
    #[error("it is not after the line before it, in order of paths")]
    Order,
    #[error("the manifest was changed or cut off: its digest does not fit")]
    Digest,
    #[error("the manifest is cut off: it has no 'end' line")]
    CutOff,
    #[error("something follows the 'end' line")]
    AfterEnd,
    #[error(transparent)]
    Tree(#[from] InvalidTree),
}

/// A text that is not a manifest.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {problem}")]
pub struct FormatError {
    /// Counted from 1.
    pub line: usize,
    /// What is wrong with it.
    pub problem: LineProblem,
}

const TITLE: &str = "lockstep-manifest\t1";

/// Why a manifest was not read.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum ReadError {
    #[error("it cannot be read")]
    Io(#[from] io::Error),
    #[error(transparent)]
    Format(#[from] FormatError),
}

/// So many bytes are written and hashed at once.
const WRITE_BYTES: usize = 64 * 1024;

/// Writes a manifest entry by entry, so that what is long need not be in memory.
pub struct Encoder<W> {
    to: W,
    hash: Sha256,
    text: String,
}

impl<W: Write> Encoder<W> {
    /// Begins a manifest.
    ///
    /// # Errors
    /// As writing to `to` fails; so do the others.
    pub fn new(to: W, generation: u64, created: Timestamp) -> io::Result<Encoder<W>> {
        let mut text = String::with_capacity(2 * WRITE_BYTES);
        let _ = writeln!(text, "{TITLE}\ngeneration\t{generation}\ncreated\t{}", Time(created));
        Ok(Encoder { to, hash: Sha256::new(), text })
    }

    /// Adds an entry, which comes after the one before by its path. A regular file whose digest is not known is left out: a
    /// manifest vouches for what it lists.
    ///
    /// # Errors
    /// As writing fails.
    pub fn add(&mut self, entry: &Entry) -> io::Result<()> {
        line(entry, &mut self.text);
        if self.text.len() >= WRITE_BYTES { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.hash.update(self.text.as_bytes());
        let written = self.to.write_all(self.text.as_bytes());
        self.text.clear();
        written
    }

    /// Ends the manifest; the SHA-256 of all of it.
    ///
    /// # Errors
    /// As writing fails.
    pub fn finish(mut self) -> io::Result<Digest> {
        self.flush()?;
        let digest = Digest(self.hash.clone().finalize().into());
        let _ = writeln!(self.text, "end\t{digest}");
        self.flush()?;
        Ok(Digest(self.hash.finalize().into()))
    }
}

/// Writes a manifest. A regular file whose digest is not known is left out: a manifest vouches for what it lists.
pub fn encode(manifest: &Manifest) -> Vec<u8> {
    let mut text = Vec::new();
    let mut write = || {
        let mut encoder = Encoder::new(&mut text, manifest.generation, manifest.created)?;
        manifest.tree.entries().iter().try_for_each(|entry| encoder.add(entry))?;
        encoder.finish()
    };
    // Memory takes what it is given.
    let _ = write();
    text
}

fn line(entry: &Entry, text: &mut String) {
    let kind = match &entry.content {
        Content::File { digest: None, .. } => return,
        Content::File { size, digest: Some(digest) } => {
            let _ = write!(text, "f\t{digest}\t{size}\t");
            None
        }
        Content::Directory => Some('d'),
        Content::Symlink { .. } => Some('l'),
        Content::HardLink { .. } => Some('h'),
    };
    if let Some(kind) = kind {
        let _ = write!(text, "{kind}\t-\t-\t");
    }
    let _ = write!(text, "{}\t{:04o}\t", Time(entry.mtime), entry.mode);
    for field in [entry.owner.as_bytes(), entry.group.as_bytes()] {
        escape(field, text);
        text.push('\t');
    }
    escape(entry.path.as_bytes(), text);
    let further = match &entry.content {
        Content::Symlink { target } => Some(&**target),
        Content::HardLink { first } => Some(first.as_bytes()),
        _ => None,
    };
    if let Some(further) = further {
        text.push('\t');
        escape(further, text);
    }
    text.push('\n');
}

/// Reads a manifest.
///
/// # Errors
/// [`FormatError`] with the first line that breaks a rule.
pub fn decode(text: &[u8]) -> Result<Manifest, FormatError> {
    match read(text) {
        Ok((manifest, _)) => Ok(manifest),
        Err(ReadError::Format(error)) => Err(error),
        // Memory gives what it has.
        Err(ReadError::Io(_)) => Err(FormatError { line: 1, problem: LineProblem::CutOff }),
    }
}

/// Reads a manifest line by line; also the SHA-256 of all of it.
///
/// # Errors
/// [`ReadError`] where it cannot be read, or with the first line that breaks a rule.
pub fn read(from: impl BufRead) -> Result<(Manifest, Digest), ReadError> {
    let mut lines = Lines { from, line: Vec::new(), number: 0, hash: Sha256::new() };
    let at = |line, problem| FormatError { line, problem };
    if lines.next()?.is_none_or(|line| line != TITLE.as_bytes()) {
        return Err(at(1, LineProblem::NotAManifest).into());
    }
    let generation = header(&mut lines, "generation", decimal)?;
    let created = header(&mut lines, "created", timestamp)?;
    let mut entries: Vec<Entry> = Vec::new();
    let mut names = Names::default();
    loop {
        let number = lines.number + 1;
        let Some(line) = lines.next()? else { return Err(at(number, LineProblem::CutOff).into()) };
        if let Some(digest) = line.strip_prefix(b"end\t") {
            let digest = Digest::from_hex(digest);
            if digest != Some(Digest(lines.hash.clone().finalize().into())) {
                return Err(at(number, LineProblem::Digest).into());
            }
            break;
        }
        let entry = entry(line, &mut names).map_err(|problem| at(number, problem))?;
        if entries.last().is_some_and(|last| last.path > entry.path) {
            return Err(at(number, LineProblem::Order).into());
        }
        entries.push(entry);
    }
    let number = lines.number;
    if lines.next()?.is_some() || !lines.line.is_empty() {
        return Err(at(number + 1, LineProblem::AfterEnd).into());
    }
    let tree = Tree::new(entries).map_err(|problem| at(number, problem.into()))?;
    Ok((Manifest { generation, created, tree }, Digest(lines.hash.finalize().into())))
}

struct Lines<R> {
    from: R,
    /// The last line, with its LF.
    line: Vec<u8>,
    number: usize,
    /// Of the lines before it.
    hash: Sha256,
}

impl<R: BufRead> Lines<R> {
    /// The next line without its LF; `None` at the end, or where the LF is missing.
    fn next(&mut self) -> io::Result<Option<&[u8]>> {
        self.hash.update(&self.line);
        self.line.clear();
        self.from.read_until(b'\n', &mut self.line)?;
        let Some(line) = self.line.strip_suffix(b"\n") else { return Ok(None) };
        self.number += 1;
        Ok(Some(line))
    }
}

fn header<T, R: BufRead>(
    lines: &mut Lines<R>,
    name: &'static str,
    read: impl Fn(&[u8]) -> Option<T>,
) -> Result<T, ReadError> {
    let line = lines.next()?;
    let value = line.and_then(|line| line.strip_prefix(name.as_bytes())?.strip_prefix(b"\t")).and_then(read);
    value.ok_or_else(|| FormatError { line: lines.number.max(1), problem: LineProblem::Field(name) }.into())
}

fn entry(line: &[u8], names: &mut Names) -> Result<Entry, LineProblem> {
    let mut fields = line.split(|&byte| byte == b'\t');
    let mut next = || fields.next().ok_or(LineProblem::Fields);
    let (kind, digest, size) = (next()?, next()?, next()?);
    let mtime = timestamp(next()?).ok_or(LineProblem::Field("time"))?;
    let mode = mode(next()?).ok_or(LineProblem::Field("mode"))?;
    let owner = names.get(next()?).ok_or(LineProblem::Field("owner"))?;
    let group = names.get(next()?).ok_or(LineProblem::Field("group"))?;
    let path = unescape(next()?).ok_or(LineProblem::Field("path"))?;
    let mut further = || next().and_then(|field| unescape(field).ok_or(LineProblem::Field("target")));
    let content = match kind {
        b"f" => Content::File {
            size: decimal(size).ok_or(LineProblem::Field("size"))?,
            digest: Some(Digest::from_hex(digest).ok_or(LineProblem::Field("digest"))?),
        },
        b"d" => Content::Directory,
        b"l" => Content::Symlink { target: further()?.into() },
        b"h" => Content::HardLink { first: RelPath::new(further()?)? },
        _ => return Err(LineProblem::Field("kind")),
    };
    if kind != b"f" && (digest != b"-" || size != b"-") {
        return Err(LineProblem::Field("digest or size"));
    }
    if fields.next().is_some() {
        return Err(LineProblem::Fields);
    }
    Ok(Entry { path: RelPath::new(path)?, content, mtime, mode, owner, group })
}

/// Owners and groups repeat: each name is kept once.
#[derive(Default)]
struct Names(Vec<(Vec<u8>, Name)>);

impl Names {
    fn get(&mut self, field: &[u8]) -> Option<Name> {
        if let Some((_, name)) = self.0.iter().find(|(known, _)| known == field) {
            return Some(name.clone());
        }
        let name: Name = String::from_utf8(unescape(field)?).ok().filter(|name| !name.is_empty())?.into();
        if self.0.len() < 64 {
            self.0.push((field.to_vec(), name.clone()));
        }
        Some(name)
    }
}

struct Time(Timestamp);

impl std::fmt::Display for Time {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Timestamp { seconds, nanoseconds } = self.0;
        write!(f, "{seconds}.{nanoseconds:09}")
    }
}

fn timestamp(field: &[u8]) -> Option<Timestamp> {
    let at = field.iter().position(|&byte| byte == b'.')?;
    let (seconds, nanoseconds) = (&field[..at], &field[at + 1..]);
    if nanoseconds.len() != 9 || !nanoseconds.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let seconds = match seconds.strip_prefix(b"-") {
        Some(before) if before != b"0" => decimal(before).map(i128::from).map(std::ops::Neg::neg),
        Some(_) => None,
        None => decimal(seconds).map(i128::from),
    };
    let nanoseconds = nanoseconds.iter().fold(0, |sum, digit| sum * 10 + u32::from(digit - b'0'));
    Some(Timestamp { seconds: i64::try_from(seconds?).ok()?, nanoseconds })
}

fn decimal(field: &[u8]) -> Option<u64> {
    let canonical = field == b"0" || field.first().is_some_and(|first| (b'1'..=b'9').contains(first));
    if !canonical {
        return None;
    }
    field.iter().try_fold(0_u64, |sum, &digit| {
        let digit = digit.checked_sub(b'0').filter(|&digit| digit < 10)?;
        sum.checked_mul(10)?.checked_add(digit.into())
    })
}

fn mode(field: &[u8]) -> Option<u32> {
    let digits = field.len() == 4 && field.iter().all(|digit| (b'0'..=b'7').contains(digit));
    digits.then(|| field.iter().fold(0, |mode, digit| mode << 3 | u32::from(digit - b'0')))
}

fn must_escape(c: char) -> bool {
    c.is_control() || c == '\\'
}

fn escape(bytes: &[u8], text: &mut String) {
    for chunk in bytes.utf8_chunks() {
        let valid = chunk.valid();
        if !valid.contains(must_escape) {
            text.push_str(valid);
        } else {
            for c in valid.chars() {
                if must_escape(c) {
                    let mut utf8 = [0; 4];
                    c.encode_utf8(&mut utf8).bytes().for_each(|byte| hex_escape(byte, text));
                } else {
                    text.push(c);
                }
            }
        }
        chunk.invalid().iter().for_each(|&byte| hex_escape(byte, text));
    }
}

fn hex_escape(byte: u8, text: &mut String) {
    let _ = write!(text, "\\x{byte:02x}");
}

/// `None` when the field is not exactly what [`escape`] writes.
fn unescape(field: &[u8]) -> Option<Vec<u8>> {
    let plain = field.iter().all(|&byte| matches!(byte, b' '..=b'~') && byte != b'\\');
    let clean = || !field.contains(&b'\\') && std::str::from_utf8(field).is_ok_and(|text| !text.contains(must_escape));
    if plain || clean() {
        return Some(field.to_vec());
    }
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, after)) = rest.split_first() {
        rest = match after.strip_prefix(b"x") {
            Some(digits) if first == b'\\' && digits.len() >= 2 => {
                bytes.push(super::hex_value(digits[0])? << 4 | super::hex_value(digits[1])?);
                &digits[2..]
            }
            _ if first == b'\\' => return None,
            _ => {
                bytes.push(first);
                after
            }
        };
    }
    let mut canonical = String::new();
    escape(&bytes, &mut canonical);
    (canonical.as_bytes() == field).then_some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sample() -> Manifest {
        let entry = |path: &[u8], content| Entry {
            path: RelPath::new(path).unwrap(),
            content,
            mtime: Timestamp { seconds: -1, nanoseconds: 7 },
            mode: 0o1774,
            owner: "trainer".into(),
            group: "1005".into(),
        };
        let file = Content::File { size: 3, digest: Some(Digest([7; 32])) };
        let entries = vec![
            entry(b"a", Content::Directory),
            entry(b"a/caf\xe9\n\\x", file.clone()),
            entry("a/é".as_bytes(), Content::HardLink { first: RelPath::new(b"a/caf\xe9\n\\x").unwrap() }),
            entry(b"b", Content::Symlink { target: b"../x\ty".as_slice().into() }),
        ];
        Manifest { generation: 3, created: Timestamp { seconds: 5, nanoseconds: 0 }, tree: Tree::new(entries).unwrap() }
    }

    #[test]
    fn h06_h09_any_name_comes_back_as_it_was() {
        let text = encode(&sample());
        assert_eq!(decode(&text), Ok(sample()));
        assert!(text.is_ascii() || std::str::from_utf8(&text).is_ok());
        assert!(!text.iter().any(|&byte| byte < b' ' && byte != b'\n' && byte != b'\t'));
    }

    /// Puts `line` into an otherwise good manifest, with the digest that fits.
    fn with_line(line: &[u8]) -> Result<Manifest, FormatError> {
        let mut text = format!("{TITLE}\ngeneration\t1\ncreated\t0.000000000\n").into_bytes();
        text.extend_from_slice(line);
        text.push(b'\n');
        let digest = Digest(Sha256::digest(&text).into());
        text.extend_from_slice(format!("end\t{digest}\n").as_bytes());
        decode(&text)
    }

    #[test]
    fn h01_h02_h03_h04_h05_h12_bad_lines_are_refused_by_number() {
        let good = "d\t-\t-\t0.000000000\t0755\tu\tg\t";
        assert!(with_line(format!("{good}fine").as_bytes()).is_ok());
        let long = "n".repeat(256);
        for path in
            ["../x", "a/../b", "/abs", "", ".", "a//b", "a/", "a\\x00b", &long, "cr\r", "a\\qb", "a\\x41", "x\ty"]
        {
            let error = with_line(format!("{good}{path}").as_bytes()).unwrap_err();
            assert_eq!(error.line, 4, "{path:?}");
        }
        for line in [
            "junk",
            "",
            "d\t-\t-\t0.0\t0755\tu\tg\tp",
            "d\t-\t-\t0.000000000\t755\tu\tg\tp",
            "d\t-\t-\t0.000000000\t0755\t\tg\tp",
            "d\t-\t0\t0.000000000\t0755\tu\tg\tp",
            "f\t-\t0\t0.000000000\t0755\tu\tg\tp",
            "l\t-\t-\t0.000000000\t0755\tu\tg\tp",
            "x\t-\t-\t0.000000000\t0755\tu\tg\tp",
            "d\t-\t-\t-0.000000000\t0755\tu\tg\tp",
        ] {
            assert_eq!(with_line(line.as_bytes()).unwrap_err().line, 4, "{line:?}");
        }
    }

    #[test]
    fn h07_h11_duplicates_and_files_with_contents_are_refused() {
        let digest = Digest([1; 32]);
        let file = |path: &str| format!("f\t{digest}\t1\t0.000000000\t0644\tu\tg\t{path}");
        for lines in [[file("a"), file("a")], [file("a"), file("a/b")], [file("b"), file("a")]] {
            assert!(with_line(lines.join("\n").as_bytes()).is_err(), "{lines:?}");
        }
    }

    #[test]
    fn every_flipped_bit_and_every_cut_is_noticed() {
        let text = encode(&sample());
        for at in 0..text.len() {
            assert!(decode(&text[..at]).is_err(), "cut at {at}");
            let mut changed = text.clone();
            changed[at] ^= 1;
            assert!(decode(&changed).is_err(), "bit flipped at {at}");
        }
        assert!(decode(&[text.as_slice(), b"x"].concat()).is_err());
    }

    proptest! {
        #[test]
        fn escapes_come_back(bytes in prop::collection::vec(any::<u8>(), 0..40)) {
            let mut text = String::new();
            escape(&bytes, &mut text);
            prop_assert_eq!(unescape(text.as_bytes()), Some(bytes));
        }

        #[test]
        fn whatever_is_accepted_is_canonical(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(manifest) = decode(&bytes) {
                prop_assert_eq!(encode(&manifest), bytes);
            }
        }
    }
}
