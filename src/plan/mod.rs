//! What has to be done to make a target like its source, as a value that can be printed, tested and refused.
//!
//! [`diff()`] compares two trees and touches nothing; [`safety`] refuses what nobody can have meant.

use crate::manifest::Digest;
use crate::path::RelPath;

mod actions;
mod diff;

pub mod outcome;
pub mod publish;
pub mod retain;
pub mod safety;
pub mod trail;
pub mod trash;

pub use actions::Actions;
pub use diff::{Desired, diff, require_proof};

/// How a path differs between source and target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// Not at the target, or of another kind there.
    Added,
    /// Other content, kind or link target.
    Modified,
    /// Same content, other mode, owner, group or time.
    MetadataOnly,
}

/// What differs about a path; the letters of rsync's `--itemize-changes`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Differences {
    /// Content (by digest) or kind or link target.
    pub content: bool,
    /// Size.
    pub size: bool,
    /// Time of modification.
    pub time: bool,
    /// Mode or ACL.
    pub mode: bool,
    /// Owner.
    pub owner: bool,
    /// Group.
    pub group: bool,
}

impl Differences {
    /// Whether anything differs.
    pub fn any(self) -> bool {
        self != Differences::default()
    }
}

/// What the target lacks to have a path's content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Need {
    /// Nothing: a directory, a link, or only metadata.
    Nothing,
    /// The file's bytes from `resume_at` on; what is before lies staged already.
    Content {
        /// Bytes that are staged already.
        resume_at: u64,
    },
    /// The source hashes its file first: when it has this digest only the metadata changes, else all bytes are needed.
    Compare {
        /// The digest of what lies at the target.
        digest: Box<Digest>,
    },
}

/// One path of the source for which something is to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Action {
    /// Index in the source's tree.
    pub index: u32,
    /// How it differs.
    pub change: Change,
    /// In what.
    pub differences: Differences,
    /// What content is needed.
    pub need: Need,
}

/// A path of the target that the source does not have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Removal {
    /// The path.
    pub path: RelPath,
    /// Whether it is a directory.
    pub directory: bool,
}

/// All that is to be done at a target.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Plan {
    /// Sorted by index.
    pub actions: Actions,
    /// What the target has beyond the source, sorted by path. Removed only when the run deletes.
    pub removals: Vec<Removal>,
    /// How many entries the target had before, `.lockstep` and what the filter excludes not counted.
    pub target_entries: u64,
    /// Indices of files, ascending, that may be made of what the target has.
    pub alike: Vec<u32>,
}

impl Plan {
    /// Whether a file that the target has under this name goes, where the run deletes.
    pub fn removes(&self, path: &RelPath) -> bool {
        let at = self.removals.binary_search_by(|removal| removal.path.cmp(path));
        at.is_ok_and(|at| !self.removals[at].directory)
    }
}

/// How paths are compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Compare {
    /// Never trust size and time: where a digest is not known, ask for it (`--checksum`).
    pub checksum: bool,
    /// The target knows times only to the second (SFTP version 3).
    pub whole_seconds: bool,
    /// Compare and set times.
    pub times: bool,
}

impl Default for Compare {
    fn default() -> Self {
        Compare { checksum: false, whole_seconds: false, times: true }
    }
}
