//! [`RelPath`]: a relative path that has been validated, in bytes.
//!
//! What always holds: not empty, no leading or trailing slash, no empty, `.` or `..` component, no NUL, components of
//! at most 255 bytes and 4095 bytes in all (the limits of Linux, `limits.h`). A name need not be UTF-8.
//! Paths order by component, so that a directory is directly followed by everything below it.
//!
//! A path takes one word where it is kept, and its bytes are there once however many lists have it: runs over millions of
//! files keep it in several.

use std::cmp::Ordering;
use std::ffi::OsStr;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use triomphe::ThinArc;

use crate::error::Escaped;

/// The longest name of one component, in bytes (`NAME_MAX`).
pub const NAME_MAX: usize = 255;
/// The longest path, in bytes (`PATH_MAX` less its NUL).
pub const PATH_MAX: usize = 4095;

/// Why bytes are not a [`RelPath`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)]
pub enum PathProblem {
    #[error("the name is empty")]
    Empty,
    #[error("the path is absolute")]
    Absolute,
    #[error("the path has a '..' component")]
    Parent,
    #[error("the path has a '.' component")]
    Current,
    #[error("the path has an empty component ('//' or a trailing '/')")]
    EmptyComponent,
    #[error("the path holds a NUL byte")]
    Nul,
    #[error("a component is longer than 255 bytes")]
    NameTooLong,
    #[error("the path is longer than 4095 bytes")]
    PathTooLong,
}

/// Bytes that were refused as a path, with the reason.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{}' is not an acceptable path: {problem}", Escaped(path))]
pub struct InvalidPath {
    /// The refused bytes (at most the first 4096 of them).
    pub path: Vec<u8>,
    /// What is wrong with them.
    pub problem: PathProblem,
}

/// A validated relative path; see the module's documentation for what holds.
#[derive(Clone)]
pub struct RelPath(ThinArc<(), u8>);

impl RelPath {
    /// Validates `path`.
    ///
    /// # Errors
    /// [`InvalidPath`] with the first rule that `path` breaks.
    pub fn new(path: impl AsRef<[u8]>) -> Result<Self, InvalidPath> {
        let path = path.as_ref();
        match problem_of(path) {
            None => Ok(RelPath::of(path)),
            Some(problem) => Err(InvalidPath { path: path[..path.len().min(PATH_MAX + 1)].to_vec(), problem }),
        }
    }

    /// Of bytes that are known to be a path.
    fn of(path: &[u8]) -> RelPath {
        RelPath(ThinArc::from_header_and_slice((), path))
    }

    /// The path's bytes, without a NUL.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0.slice
    }

    /// The path as the standard library's type. It is relative: join it only with a root that is trusted.
    pub fn as_path(&self) -> &Path {
        Path::new(OsStr::from_bytes(self.as_bytes()))
    }

    /// Its components, from the top.
    pub fn components(&self) -> impl DoubleEndedIterator<Item = &[u8]> {
        self.as_bytes().split(|&byte| byte == b'/')
    }

    /// The last component.
    pub fn name(&self) -> &[u8] {
        self.components().next_back().unwrap_or(self.as_bytes())
    }

    /// The directory that holds it; `None` at the top of the tree.
    pub fn parent(&self) -> Option<RelPath> {
        let path = self.as_bytes();
        path.iter().rposition(|&byte| byte == b'/').map(|at| RelPath::of(&path[..at]))
    }

    /// All directories above it, from the top.
    pub fn ancestors(&self) -> impl Iterator<Item = RelPath> + '_ {
        let path = self.as_bytes();
        path.iter().enumerate().filter(|&(_, &byte)| byte == b'/').map(|(at, _)| RelPath::of(&path[..at]))
    }

    /// `self/name`, where `name` may itself have several components.
    ///
    /// # Errors
    /// [`InvalidPath`] when the whole breaks a rule.
    pub fn join(&self, name: impl AsRef<[u8]>) -> Result<Self, InvalidPath> {
        let mut path = Vec::with_capacity(self.as_bytes().len() + 1 + name.as_ref().len());
        path.extend_from_slice(self.as_bytes());
        path.push(b'/');
        path.extend_from_slice(name.as_ref());
        Self::new(path)
    }

    /// Whether it is `directory` itself or lies below it (by component: `/data` does not hold `/data_evil`).
    pub fn is_within(&self, directory: &RelPath) -> bool {
        self.as_bytes().strip_prefix(directory.as_bytes()).is_some_and(|rest| rest.is_empty() || rest[0] == b'/')
    }

    /// What is left of the path below `directory`; `None` when it does not lie below it.
    pub fn strip_prefix(&self, directory: &RelPath) -> Option<RelPath> {
        let rest = self.as_bytes().strip_prefix(directory.as_bytes())?.strip_prefix(b"/")?;
        (!rest.is_empty()).then(|| RelPath::of(rest))
    }

    /// Whether a symbolic link here, with this target, leads to something below the top whatever links are on its way, as
    /// long as those do too: its target is relative, and `..` stands only at its beginning and no further up than the top.
    /// (`a/..` is not `.` where `a` is a link.)
    pub fn link_stays_below(&self, target: &[u8]) -> bool {
        let mut parts = target.split(|&byte| byte == b'/').filter(|part| !part.is_empty() && *part != b".").peekable();
        let mut depth = self.depth() - 1;
        while parts.next_if(|part| *part == b"..").is_some() {
            let Some(above) = depth.checked_sub(1) else { return false };
            depth = above;
        }
        !target.starts_with(b"/") && parts.all(|part| part != b"..")
    }

    /// How many components it has.
    pub fn depth(&self) -> usize {
        1 + self.as_bytes().iter().filter(|&&byte| byte == b'/').count()
    }
}

fn problem_of(path: &[u8]) -> Option<PathProblem> {
    if path.is_empty() {
        return Some(PathProblem::Empty);
    }
    if path[0] == b'/' {
        return Some(PathProblem::Absolute);
    }
    if path.len() > PATH_MAX {
        return Some(PathProblem::PathTooLong);
    }
    path.split(|&byte| byte == b'/').find_map(component_problem)
}

fn component_problem(component: &[u8]) -> Option<PathProblem> {
    match component {
        b"" => Some(PathProblem::EmptyComponent),
        b"." => Some(PathProblem::Current),
        b".." => Some(PathProblem::Parent),
        _ if component.len() > NAME_MAX => Some(PathProblem::NameTooLong),
        _ if component.contains(&0) => Some(PathProblem::Nul),
        _ => None,
    }
}

impl PartialEq for RelPath {
    fn eq(&self, other: &Self) -> bool {
        self.as_bytes() == other.as_bytes()
    }
}

impl Eq for RelPath {}

impl Hash for RelPath {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.as_bytes().hash(state);
    }
}

impl Ord for RelPath {
    fn cmp(&self, other: &Self) -> Ordering {
        let (path, other) = (self.as_bytes(), other.as_bytes());
        let common = path.iter().zip(other).position(|(a, b)| a != b);
        match common {
            // '/' orders before every other byte, so that a subtree is contiguous.
            Some(at) => match (path[at], other[at]) {
                (b'/', _) => Ordering::Less,
                (_, b'/') => Ordering::Greater,
                (a, b) => a.cmp(&b),
            },
            None => path.len().cmp(&other.len()),
        }
    }
}

impl PartialOrd for RelPath {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// Escaped: safe to print.
impl fmt::Display for RelPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Escaped(self.as_bytes()).fmt(f)
    }
}

impl fmt::Debug for RelPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{self}\"")
    }
}

impl TryFrom<&str> for RelPath {
    type Error = InvalidPath;
    fn try_from(path: &str) -> Result<Self, InvalidPath> {
        RelPath::new(path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rel(path: &str) -> RelPath {
        RelPath::new(path).unwrap()
    }

    #[test]
    fn refuses_each_kind_of_bad_path() {
        let long_name = "n".repeat(256);
        let long_path = "dir/".repeat(1024) + "f";
        let cases: [(&[u8], PathProblem); 13] = [
            (b"", PathProblem::Empty),
            (b"/etc/passwd", PathProblem::Absolute),
            (b"/", PathProblem::Absolute),
            (b"..", PathProblem::Parent),
            (b"a/../b", PathProblem::Parent),
            (b"../a", PathProblem::Parent),
            (b".", PathProblem::Current),
            (b"a/./b", PathProblem::Current),
            (b"a//b", PathProblem::EmptyComponent),
            (b"a/", PathProblem::EmptyComponent),
            (b"a\0b", PathProblem::Nul),
            (long_name.as_bytes(), PathProblem::NameTooLong),
            (long_path.as_bytes(), PathProblem::PathTooLong),
        ];
        for (path, problem) in cases {
            assert_eq!(RelPath::new(path).unwrap_err().problem, problem, "{}", Escaped(path));
        }
    }

    #[test]
    fn accepts_bytes_that_are_not_utf8_and_odd_names() {
        for path in [&b"caf\xe9"[..], b"...", b"-rf", b"$(touch x)", b"a b", b"new\nline", b"..a", b"a.."] {
            assert_eq!(RelPath::new(path).unwrap().as_bytes(), path);
        }
    }

    #[test]
    fn a_directory_is_directly_followed_by_its_contents() {
        let mut paths = ["a.b", "a/b", "a", "a-b", "a/b/c", "b", "a/a"].map(rel);
        paths.sort();
        assert_eq!(paths.map(|p| p.to_string()), ["a", "a/a", "a/b", "a/b/c", "a-b", "a.b", "b"]);
    }

    #[test]
    fn prefixes_go_by_component() {
        assert!(rel("data/x").is_within(&rel("data")));
        assert!(rel("data").is_within(&rel("data")));
        assert!(!rel("data_evil/x").is_within(&rel("data")));
        assert_eq!(rel("data/x/y").strip_prefix(&rel("data")), Some(rel("x/y")));
        assert_eq!(rel("data").strip_prefix(&rel("data")), None);
        assert_eq!(rel("a/b/c").ancestors().collect::<Vec<_>>(), [rel("a"), rel("a/b")]);
        assert_eq!(rel("a/b").parent(), Some(rel("a")));
        assert_eq!(rel("a").parent(), None);
    }
}
