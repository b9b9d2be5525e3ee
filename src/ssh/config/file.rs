//! Reading `ssh_config` files: which blocks are for a host, and what they set. The first value of a keyword wins.

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::io::{self, Read as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use super::keyword::Keyword;
use super::{ConfigError, Environment, tokens, words};
use crate::error::in_words;
use crate::signature::pattern::{any_of, wild};
use crate::ssh::shown;

const MAX_DEPTH: usize = 16;
const MAX_BYTES: u64 = 1 << 20;

/// A value, and where it was set.
#[derive(Debug, Clone)]
pub(super) struct Value {
    pub(super) words: Vec<String>,
    pub(super) place: String,
}

/// What was set so far.
#[derive(Debug, Clone, Default)]
pub(super) struct Settings(BTreeMap<Keyword, Vec<Value>>);

impl Settings {
    pub(super) fn set(&mut self, keyword: Keyword, words: Vec<String>, place: &str) {
        // What comes first shuts out the other.
        let other = match keyword {
            Keyword::ProxyCommand => self.all(Keyword::ProxyJump),
            Keyword::ProxyJump => self.all(Keyword::ProxyCommand),
            _ => &[],
        };
        let had = self.all(keyword);
        let new = if keyword.accumulates() { had.iter().all(|had| had.words != words) } else { had.is_empty() };
        if new && other.is_empty() {
            self.0.entry(keyword).or_default().push(Value { words, place: place.to_owned() });
        }
    }

    /// The value of a keyword that has one.
    pub(super) fn first(&self, keyword: Keyword) -> Option<&Value> {
        self.all(keyword).first()
    }

    pub(super) fn text(&self, keyword: Keyword) -> Option<&str> {
        self.first(keyword).and_then(|value| value.words.first()).map(String::as_str)
    }

    pub(super) fn all(&self, keyword: Keyword) -> &[Value] {
        self.0.get(&keyword).map_or(&[], Vec::as_slice)
    }
}

/// One pass over the files for one host.
pub(super) struct Pass<'a> {
    pub(super) environment: &'a Environment,
    /// As it was given.
    pub(super) original: &'a str,
    /// What `Host` lines are compared with: in the last pass, what `HostName` said.
    pub(super) host: &'a str,
    pub(super) is_last: bool,
    pub(super) settings: &'a mut Settings,
    /// `Match final` was met: another pass is due.
    pub(super) wants_last: bool,
    /// What was left out, for `-v`.
    pub(super) notes: Vec<String>,
    /// What was left out and may be missed.
    pub(super) warnings: Vec<String>,
}

/// Where a file stands among those it is included from.
struct Frame<'a> {
    file: &'a Path,
    /// Where relative names in `Include` are looked for.
    beside: &'a Path,
    depth: usize,
    /// It is included from a block that is not for this host.
    shut: bool,
}

impl Pass<'_> {
    /// Reads a file; one that does not exist says nothing, unless it `must` be there.
    ///
    /// # Errors
    /// When it cannot be read, others may write it, or a line cannot be understood.
    pub(super) fn read(&mut self, file: &Path, beside: &Path, must: bool) -> Result<(), ConfigError> {
        self.file(&Frame { file, beside, depth: 0, shut: false }, must)
    }

    fn file(&mut self, frame: &Frame<'_>, must: bool) -> Result<(), ConfigError> {
        let wrong = |reason: String| ConfigError::new(shown(frame.file), reason);
        let text = match read(frame.file) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound && !must => return Ok(()),
            Err(error) => return Err(wrong(format!("cannot be read: {}", in_words(&error)))),
        };
        let mut active = !frame.shut;
        for (number, line) in (1..).zip(text.lines()) {
            let Some((name, rest)) = words::keyword(line) else { continue };
            let place = format!("{}:{number}", shown(frame.file));
            let wrong = |reason: String| ConfigError::new(place.clone(), reason);
            match name.to_ascii_lowercase().as_str() {
                "host" => active = !frame.shut && self.is_for_host(&words::split(rest).map_err(wrong)?),
                "match" => {
                    let criteria = words::split(rest).map_err(wrong)?;
                    active = self.matches(&criteria, &place)? && !frame.shut;
                }
                "include" => {
                    for pattern in words::split(rest).map_err(wrong)? {
                        let pattern = tokens::tilde(&pattern, self.environment).map_err(wrong)?;
                        self.include(frame, &pattern, !active, &place)?;
                    }
                }
                _ => match Keyword::parse(name) {
                    Some(keyword) if active => self.set(keyword, rest, &place)?,
                    Some(_) => {}
                    None if active && !self.is_last => self.notes.push(format!("{place}: '{name}' is left out")),
                    None => {}
                },
            }
        }
        Ok(())
    }

    fn set(&mut self, keyword: Keyword, rest: &str, place: &str) -> Result<(), ConfigError> {
        let wrong = |reason: String| ConfigError::new(place.to_owned(), format!("{}: {reason}", keyword.name()));
        let words = if keyword.takes_the_rest() {
            vec![rest.trim_end().to_owned()]
        } else {
            words::split(rest).map_err(wrong)?
        };
        if words.first().is_none_or(String::is_empty) {
            return Err(wrong("a value is missing".into()));
        }
        if words.len() > 1 && !keyword.takes_many() {
            return Err(wrong(format!("'{}' is too much; put a value with blanks in quotes", words[1])));
        }
        self.settings.set(keyword, words, place);
        Ok(())
    }

    fn is_for_host(&self, patterns: &[String]) -> bool {
        let mut found = false;
        for pattern in patterns {
            match pattern.strip_prefix('!') {
                Some(pattern) if wild(pattern.as_bytes(), self.host.as_bytes()) => return false,
                Some(_) => {}
                None => found |= wild(pattern.as_bytes(), self.host.as_bytes()),
            }
        }
        found
    }

    /// What `HostName` makes of the host, as far as it is known by now.
    fn host_now(&self) -> String {
        match self.settings.text(Keyword::HostName) {
            Some(name) if !self.is_last => {
                let host = |token| match token {
                    '%' => Some("%".to_owned()),
                    'h' => Some(self.host.to_owned()),
                    _ => None,
                };
                tokens::percent(name, host).unwrap_or_else(|_| name.to_owned())
            }
            _ => self.host.to_owned(),
        }
    }

    fn matches(&mut self, criteria: &[String], place: &str) -> Result<bool, ConfigError> {
        let wrong = |reason: String| ConfigError::new(place.to_owned(), format!("Match: {reason}"));
        let local_user = self.environment.user.clone();
        let user = self.settings.text(Keyword::User).unwrap_or(&local_user).to_owned();
        let mut result = true;
        let mut words = criteria.iter();
        let mut seen = 0;
        while let Some(word) = words.next() {
            // `host=x` is `host x`.
            let (word, given) = word.split_once('=').map_or((word.as_str(), None), |(word, value)| (word, Some(value)));
            let (negated, word) = word.strip_prefix('!').map_or((false, word), |word| (true, word));
            let kind = word.to_ascii_lowercase();
            let met = match kind.as_str() {
                "all" if seen > 1 || words.len() > 0 => {
                    return Err(wrong("'all' stands alone".into()));
                }
                "all" => true,
                "final" | "canonical" => {
                    self.wants_last |= kind == "final";
                    self.is_last
                }
                _ => {
                    let argument = given.or_else(|| words.next().map(String::as_str));
                    let argument = argument.ok_or_else(|| wrong(format!("'{word}' lacks its pattern")))?;
                    match kind.as_str() {
                        "host" => any_of(&argument.to_lowercase(), &self.host_now()),
                        "originalhost" => any_of(&argument.to_lowercase(), self.original),
                        "user" => any_of(argument, &user),
                        "localuser" => any_of(argument, &local_user),
                        _ => {
                            if result && !self.is_last {
                                let what = if kind == "exec" { "runs no command" } else { "does not know this test" };
                                self.warnings
                                    .push(format!("{place}: 'Match {word}': lockstep {what}; the block is left out"));
                            }
                            // Not known to be met, nor known not to be.
                            result = false;
                            continue;
                        }
                    }
                }
            };
            seen += 1;
            result &= met != negated;
        }
        if criteria.is_empty() {
            return Err(wrong("what is to match is missing".into()));
        }
        Ok(result)
    }

    fn include(&mut self, from: &Frame<'_>, pattern: &str, shut: bool, place: &str) -> Result<(), ConfigError> {
        if from.depth >= MAX_DEPTH {
            return Err(ConfigError::new(place.to_owned(), "too many files that include each other".into()));
        }
        for file in glob(&from.beside.join(pattern)) {
            self.file(&Frame { file: &file, beside: from.beside, depth: from.depth + 1, shut }, false)?;
        }
        Ok(())
    }
}

/// Reads a file that only root or the user may write: who writes it decides where the data goes.
fn read(path: &Path) -> io::Result<String> {
    let flags = rustix::fs::OFlags::NONBLOCK.bits().cast_signed();
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
    // RACE: none; the descriptor that is checked is the one that is read.
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(io::Error::other("not a regular file"));
    }
    if metadata.mode() & 0o022 != 0 {
        let mode = metadata.mode() & 0o7777;
        return Err(io::Error::other(format!("others may write it (mode {mode:04o}); run chmod go-w on it")));
    }
    let user = rustix::process::geteuid().as_raw();
    if ![0, user].contains(&metadata.uid()) {
        let owner = metadata.uid();
        return Err(io::Error::other(format!("it belongs to user number {owner}, neither to root nor to you")));
    }
    let mut bytes = Vec::new();
    file.take(MAX_BYTES).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// The files that a pattern names, sorted, as glob(3) finds them.
fn glob(pattern: &Path) -> Vec<PathBuf> {
    let mut found = vec![PathBuf::new()];
    for component in pattern.components() {
        let name = component.as_os_str();
        let is_pattern = name.as_encoded_bytes().iter().any(|byte| b"*?[".contains(byte));
        let matcher = name.to_str().filter(|_| is_pattern).and_then(|name| globset::Glob::new(name).ok());
        let Some(matcher) = matcher.map(|glob| glob.compile_matcher()) else {
            found = found.into_iter().map(|path| path.join(name)).collect();
            continue;
        };
        let shows_hidden = name.as_encoded_bytes().starts_with(b".");
        let mut below = Vec::new();
        for directory in found {
            for entry in std::fs::read_dir(&directory).into_iter().flatten().flatten() {
                let file = entry.file_name();
                let hidden = file.as_encoded_bytes().starts_with(b".");
                if (shows_hidden || !hidden) && matcher.is_match(&file) {
                    below.push(directory.join(file));
                }
            }
        }
        below.sort();
        found = below;
    }
    found
}
