//! What a tree holds: [`Entry`], [`Tree`] and [`Manifest`].
//!
//! What always holds in a [`Tree`]: entries are sorted by path, no path occurs twice, nothing lies below a path that
//! is not a directory where that path is listed, and a hard link names a regular file listed before it.

use std::fmt;

use crate::path::RelPath;

mod audience;
pub mod format;
mod name;
pub mod sums;

pub use audience::{Audience, Readers};
pub use name::Name;

/// A SHA-256 digest.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Digest(pub [u8; 32]);

impl Digest {
    /// Reads 64 hexadecimal digits, in lower case only.
    pub fn from_hex(text: &[u8]) -> Option<Digest> {
        let digits: &[u8; 64] = text.try_into().ok()?;
        let mut bytes = [0; 32];
        let mut all = 0;
        for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
            let (high, low) = (HEX[usize::from(pair[0])], HEX[usize::from(pair[1])]);
            all |= high | low;
            *byte = high << 4 | (low & 15);
        }
        (all < 16).then_some(Digest(bytes))
    }
}

fn hex_value(digit: u8) -> Option<u8> {
    Some(HEX[usize::from(digit)]).filter(|&value| value < 16)
}

/// The value of each digit; 255 for what is none. Upper case is none.
const HEX: [u8; 256] = {
    let mut values = [255; 256];
    let mut value = 0;
    while value < 16 {
        values[b"0123456789abcdef"[value] as usize] = value as u8;
        value += 1;
    }
    values
};

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// A point in time, as a file's times are: seconds since the epoch and nanoseconds below 1,000,000,000. It takes 12 bytes, so
/// that no list of times has gaps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
#[repr(C, packed(4))]
pub struct Timestamp {
    /// Seconds since 1970-01-01 00:00:00 UTC; negative before.
    pub seconds: i64,
    /// Nanoseconds, 0 to 999,999,999. 0 where the source of the time knows only seconds (SFTP version 3).
    pub nanoseconds: u32,
}

/// What a path is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// A regular file. `digest` is `None` where nobody has read the file yet.
    File {
        /// Bytes.
        size: u64,
        /// SHA-256 of the content.
        digest: Option<Digest>,
    },
    /// A directory.
    Directory,
    /// A symbolic link; the target's bytes as readlink(2) gives them.
    Symlink {
        /// Not empty, without NUL.
        target: Box<[u8]>,
    },
    /// A further name of the regular file `first`, which is listed before it in the same tree.
    HardLink {
        /// The first name.
        first: RelPath,
    },
}

/// One path of a tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Where it is, relative to the root.
    pub path: RelPath,
    /// What it is.
    pub content: Content,
    /// Time of last modification.
    pub mtime: Timestamp,
    /// Permission bits with the special bits, 0 to 0o7777. 0o777 for symbolic links.
    pub mode: u32,
    /// Name of the owner; its number in decimal digits where it has no name.
    pub owner: Name,
    /// Name of the group, likewise.
    pub group: Name,
}

impl Entry {
    /// Whether it is a directory.
    pub fn is_directory(&self) -> bool {
        matches!(self.content, Content::Directory)
    }

    /// The size and digest of a regular file.
    pub fn file(&self) -> Option<(u64, Option<Digest>)> {
        match self.content {
            Content::File { size, digest } => Some((size, digest)),
            _ => None,
        }
    }
}

/// Why entries are not a [`Tree`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)]
pub enum InvalidTree {
    #[error("'{0}' is listed twice")]
    Twice(RelPath),
    #[error("'{path}' lies below '{ancestor}', which is not a directory")]
    BelowNonDirectory { path: RelPath, ancestor: RelPath },
    #[error("'{path}' is a hard link to '{first}', which is not a regular file listed before it")]
    DanglingHardLink { path: RelPath, first: RelPath },
    #[error("'{0}' has a mode beyond 7777, or a time with more than 999,999,999 nanoseconds")]
    BadMetadata(RelPath),
    #[error("'{0}' is a symbolic link with an empty target, or one that holds a NUL byte or is longer than 4095 bytes")]
    BadLinkTarget(RelPath),
}

/// Sorted entries; see the module's documentation for what holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tree(Vec<Entry>);

impl Tree {
    /// Sorts `entries` and checks them.
    ///
    /// # Errors
    /// [`InvalidTree`] with the first path that breaks a rule.
    pub fn new(mut entries: Vec<Entry>) -> Result<Tree, InvalidTree> {
        if !entries.is_sorted_by(|a, b| a.path < b.path) {
            entries.sort_by(|a, b| a.path.cmp(&b.path));
        }
        check(&entries)?;
        Ok(Tree(entries))
    }

    /// The entries, sorted by path.
    pub fn entries(&self) -> &[Entry] {
        &self.0
    }

    /// The index of `path`.
    pub fn position(&self, path: &RelPath) -> Option<usize> {
        self.0.binary_search_by(|entry| entry.path.cmp(path)).ok()
    }

    /// The entry at `path`.
    pub fn get(&self, path: &RelPath) -> Option<&Entry> {
        self.position(path).map(|at| &self.0[at])
    }

    /// Records the digest of the regular file at `index`; no effect on what is not a regular file.
    pub fn set_digest(&mut self, index: usize, value: Digest) {
        if let Some(Entry { content: Content::File { digest, .. }, .. }) = self.0.get_mut(index) {
            *digest = Some(value);
        }
    }

    /// Has the paths that both trees have once in memory, not twice.
    pub fn share_paths(&mut self, other: &Tree) {
        let mut others = other.0.iter().map(|entry| &entry.path).peekable();
        for entry in &mut self.0 {
            while others.next_if(|path| **path < entry.path).is_some() {}
            if let Some(path) = others.next_if(|path| **path == entry.path) {
                entry.path = path.clone();
            }
        }
    }

    /// Gives the entries back.
    pub fn into_entries(self) -> Vec<Entry> {
        self.0
    }
}

fn check(entries: &[Entry]) -> Result<(), InvalidTree> {
    let is_file = |path: &RelPath| {
        let found = entries.binary_search_by(|other| other.path.cmp(path));
        found.is_ok_and(|index| entries[index].file().is_some())
    };
    let mut checker = Checker::default();
    entries.iter().try_for_each(|entry| checker.add(entry, &is_file))
}

/// Checks entries that come one by one, in order of their paths.
#[derive(Debug, Default)]
pub struct Checker {
    /// The last entry, and what of the directories (and others) above it is listed itself; whether it is a directory.
    above: Vec<(RelPath, bool)>,
}

impl Checker {
    /// The next entry; `is_file` says of what was listed before whether it is a regular file.
    ///
    /// # Errors
    /// [`InvalidTree`] where it breaks a rule.
    pub fn add(&mut self, entry: &Entry, is_file: &dyn Fn(&RelPath) -> bool) -> Result<(), InvalidTree> {
        let above = &mut self.above;
        if above.last().is_some_and(|(last, _)| *last == entry.path) {
            return Err(InvalidTree::Twice(entry.path.clone()));
        }
        if entry.mode > 0o7777 || entry.mtime.nanoseconds > 999_999_999 {
            return Err(InvalidTree::BadMetadata(entry.path.clone()));
        }
        while above.last().is_some_and(|(last, _)| !entry.path.is_within(last)) {
            above.pop();
        }
        if let Some((ancestor, _)) = above.last().filter(|(_, directory)| !directory) {
            return Err(InvalidTree::BelowNonDirectory { path: entry.path.clone(), ancestor: ancestor.clone() });
        }
        above.push((entry.path.clone(), entry.is_directory()));
        match &entry.content {
            Content::Symlink { target } if target.is_empty() || target.contains(&0) || target.len() > 4095 => {
                Err(InvalidTree::BadLinkTarget(entry.path.clone()))
            }
            Content::HardLink { first } if *first >= entry.path || !is_file(first) => {
                Err(InvalidTree::DanglingHardLink { path: entry.path.clone(), first: first.clone() })
            }
            _ => Ok(()),
        }
    }
}

/// A tree as it was published at a target, with its place in the sequence of publications.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Manifest {
    /// 1 for the first publication at a root, one more for each that changed something.
    pub generation: u64,
    /// When it was written.
    pub created: Timestamp,
    /// What the tree holds. Every regular file has its digest.
    pub tree: Tree,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(path: &str, content: Content) -> Entry {
        Entry {
            path: RelPath::new(path).unwrap(),
            content,
            mtime: Timestamp::default(),
            mode: 0o644,
            owner: "root".into(),
            group: "root".into(),
        }
    }

    const FILE: Content = Content::File { size: 0, digest: None };

    #[test]
    fn h07_the_same_name_twice_is_refused() {
        let result = Tree::new(vec![entry("a", FILE), entry("b", FILE), entry("a", FILE)]);
        assert_eq!(result, Err(InvalidTree::Twice(RelPath::new("a").unwrap())));
    }

    #[test]
    fn h11_a_path_that_is_a_file_and_a_directory_is_refused() {
        let result = Tree::new(vec![entry("a", FILE), entry("a/b", FILE)]);
        assert!(matches!(result, Err(InvalidTree::BelowNonDirectory { .. })));
        // Deeper, with a directory that is not listed between them.
        let result = Tree::new(vec![entry("a", FILE), entry("a/b/c", FILE)]);
        assert!(matches!(result, Err(InvalidTree::BelowNonDirectory { .. })));
        // Not confused by a common prefix of the names.
        assert!(Tree::new(vec![entry("a", FILE), entry("a-b", FILE)]).is_ok());
    }

    #[test]
    fn hard_links_name_a_file_listed_before() {
        let link = |first: &str| Content::HardLink { first: RelPath::new(first).unwrap() };
        assert!(Tree::new(vec![entry("a", FILE), entry("b", link("a"))]).is_ok());
        for (path, first) in [("a", "b"), ("b", "b"), ("c", "nowhere"), ("c", "dir")] {
            let tree = vec![entry("dir", Content::Directory), entry(path, link(first))];
            assert!(matches!(Tree::new(tree), Err(InvalidTree::DanglingHardLink { .. })), "{path} {first}");
        }
    }

    #[test]
    fn digests_are_read_strictly() {
        let digest = Digest([0xab; 32]);
        assert_eq!(Digest::from_hex(digest.to_string().as_bytes()), Some(digest));
        assert_eq!(Digest::from_hex(&[b'A'; 64]), None);
        assert_eq!(Digest::from_hex(&[b'a'; 63]), None);
    }
}
