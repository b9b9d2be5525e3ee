//! What the engine sees of one side of a run.
//!
//! A [`Source`] is scanned and read; a [`Target`] compares, stages and publishes. Both are blocking and are called from
//! the engine's worker threads, each of which has a [`Reader`] and a [`Writer`] of its own. Between them travel
//! [`Block`]s of plain bytes: what is compressed on a wire is the business of the endpoint that has the wire.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use serde::{Deserialize, Serialize};

use crate::audit::Login;
use crate::endpoint::delta::{Alike, Beginning, Former, Wanted, Within};
use crate::error::Exit;
use crate::filter::FilterSpec;
use crate::manifest::{Digest, Tree};
use crate::monitor::threads::Threads;
use crate::monitor::{Monitor, Problem};
use crate::plan::Plan;
use crate::plan::trail::Stop;
use crate::policy::PolicySpec;

pub mod agent;
pub mod algorithms;
pub mod beside;
mod block;
pub mod client;
pub mod delta;
pub mod guarded;
pub mod link;
pub mod local;
pub mod memory;
pub mod picked;
mod pool;
pub mod several;
pub mod shared;
mod spread;
pub mod stock;
pub mod stream;
pub mod surplus;

pub use block::Block;
pub use pool::Width;

/// Content travels in blocks of at most this many bytes.
pub const BLOCK_BYTES: usize = 512 * 1024;
/// Files up to this size travel whole, in one block.
pub const SMALL_FILE_BYTES: u64 = 256 * 1024;

/// What ends a run.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum Error {
    // The path may have a name of a peer's tree in it.
    #[error("cannot {operation} '{}'", crate::error::said(path.as_bytes()))]
    Io { operation: &'static str, path: String, source: std::io::Error },
    #[error("{host}: the connection was lost{}; what arrived is kept, and the same command goes on from there", why(host, source.as_deref()))]
    Disconnected {
        host: String,
        #[source]
        source: Option<Box<dyn std::error::Error + Send + Sync>>,
    },
    #[error("{host} answered in a way the protocol does not allow: {what}")]
    Protocol { host: String, what: String },
    #[error("refused by {by}: {reason}")]
    Refused { by: String, reason: String },
    #[error("{root} is in use by {holder}; wait for it to end, or use --wait")]
    Locked { root: String, holder: String },
    #[error("{0}")]
    Usage(String),
    #[error("{message}")]
    Remote { message: String, exit: Exit },
}

/// Why a connection was lost, without what was said already.
fn why(host: &str, source: Option<&(dyn std::error::Error + Send + Sync)>) -> String {
    let Some(said) = source.map(crate::error::in_words) else { return String::new() };
    let said = said.strip_prefix(host).and_then(|rest| rest.strip_prefix(": ")).unwrap_or(&said);
    match said.strip_prefix("the connection was lost").unwrap_or(said).trim_start_matches(": ") {
        "" => String::new(),
        why => format!(": {why}"),
    }
}

impl Error {
    /// The exit status that says it.
    pub fn exit(&self) -> Exit {
        match self {
            Error::Io { source, .. } if source.kind() == std::io::ErrorKind::StorageFull => Exit::Io,
            Error::Io { .. } | Error::Protocol { .. } => Exit::Io,
            Error::Disconnected { .. } | Error::Locked { .. } => Exit::TryAgain,
            Error::Refused { .. } => Exit::Incomplete,
            Error::Usage(_) => Exit::Usage,
            Error::Remote { exit, .. } => *exit,
        }
    }
}

/// How a source is scanned.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScanOptions {
    /// What to leave out.
    pub filter: FilterSpec,
    /// Follow no cached digest, hash everything (`--checksum`).
    pub hash_all: bool,
    /// What to do with symbolic links.
    pub links: Links,
    /// Files that only grow, as globs: of one that was read before, what it held then is not read again.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub append_only: Vec<String>,
    /// List nothing while a run publishes there, or after one was interrupted while it did.
    #[serde(default)]
    pub whole: bool,
    /// How many directories are listed at once on this machine.
    #[serde(skip)]
    pub threads: Threads,
}

/// Why a source is not listed that is to be whole.
pub const BEING_PUBLISHED: &str = "a run publishes into it just now, or was interrupted while it did: half of that is not passed on; \
                                   it is when the run, or the next push into it, is complete";

/// What happens to symbolic links of the source.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Links {
    /// Kept as links when their target stays in the tree; others are skipped and reported.
    #[default]
    Safe,
    /// Kept as they are, wherever they point.
    All,
    /// Left out and reported.
    Skip,
    /// Any link ends the run.
    Refuse,
}

/// What a scan found.
#[derive(Debug, Default)]
pub struct Scan {
    /// The tree. Digests are there where they are known without reading.
    pub tree: Tree,
    /// Paths that could not be read or were left out.
    pub problems: Vec<Problem>,
}

/// How many workers a side has a use for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Crew {
    /// So many at most.
    pub workers: usize,
    /// One more is worth its while for so many bytes of content,
    pub bytes: u64,
    /// or so many files.
    pub files: u64,
}

impl Default for Crew {
    fn default() -> Self {
        Crew { workers: usize::MAX, bytes: 4 << 20, files: 128 }
    }
}

/// The side that content comes from.
pub trait Source: Sync {
    /// For messages: `/data/x` or `user@host:/data/x`.
    fn describe(&self) -> String;
    /// Lists the tree.
    ///
    /// # Errors
    /// When the root cannot be read, or the connection ends.
    fn scan(&self, options: &ScanOptions, monitor: &dyn Monitor) -> Result<Scan, Error>;
    /// A reader for one worker thread. `tree` is what [`Source::scan`] gave; indices refer to it.
    ///
    /// # Errors
    /// When the connection ends.
    fn reader(&self, tree: Arc<Tree>) -> Result<Box<dyn Reader + '_>, Error>;
    /// Remembers digests that were computed while reading (pairs of index and digest), so that nothing is hashed twice.
    fn remember(&self, tree: &Tree, digests: &[(u32, Digest)]);
    /// Whether the file at `index` is one that only grows ([`ScanOptions::append_only`]), and is known to have been this once, so
    /// that a reader can go on after it ([`Fetch::after`]).
    fn begins_with(&self, tree: &Tree, index: u32, beginning: Beginning) -> bool {
        let _ = (tree, index, beginning);
        false
    }
    /// Bytes that went over the wire so far, both directions; 0 where there is none.
    fn wire_bytes(&self) -> u64 {
        0
    }
    /// How many workers it has a use for.
    fn crew(&self) -> Crew {
        Crew::default()
    }
    /// Whether it is reached over a network.
    fn is_far(&self) -> bool {
        false
    }
    /// Whether it can be told what the target has of a file, so that it sends the rest alone ([`Source::compare`]).
    fn compares(&self) -> bool {
        false
    }
    /// Tells it what the target has of the file at `index` as it wants to know that, by `ask`, until all of the file is read, or `over`
    /// says that nobody reads it any more. A reader is given the file with [`Fetch::compare`].
    fn compare(&self, index: u32, over: &AtomicBool, ask: &mut dyn FnMut(Wanted) -> Option<Alike>) {
        let _ = (index, over, ask);
    }
    /// Says how much content is to come, before the first reader or writer is asked for.
    fn expect(&self, bytes: u64, files: usize) {
        let _ = (bytes, files);
    }
    /// Tells what came up of the connections while content went over them.
    fn remark(&self, monitor: &dyn Monitor) {
        let _ = monitor;
    }
    /// The directories that what it has came through, and itself; nothing where it cannot tell.
    ///
    /// # Errors
    /// When the connection ends.
    fn trail(&self) -> Result<Vec<Stop>, Error> {
        Ok(Vec::new())
    }
}

/// A file to be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fetch {
    /// Index in the tree.
    pub index: u32,
    /// The first byte that is wanted; what is before is only hashed.
    pub from: u64,
    /// When the content has this digest nothing of it is wanted.
    pub unless: Option<Digest>,
    /// What it begins with, as [`Source::begins_with`] has said: nothing of that is read or hashed.
    pub after: Option<Beginning>,
    /// What the target has of it already is not to come: the source finds it out by [`Source::compare`].
    pub compare: bool,
}

impl Fetch {
    /// All of the file at `index`.
    pub fn of(index: u32) -> Fetch {
        Fetch { index, from: 0, unless: None, after: None, compare: false }
    }
}

/// What a [`Reader`] produces. For one file: [`Produced::Whole`]; or any number of `Data`, `Hole` and (where it is compared) `Copy` in
/// ascending order that cover it from `from` on, then `End`; or `Same`; or `Failed`, which may also come after some `Data`.
#[derive(Debug)]
#[allow(missing_docs)]
pub enum Produced {
    /// A whole small file.
    Whole { index: u32, block: Block, digest: Digest },
    /// Bytes at `offset`.
    Data { index: u32, offset: u64, block: Block },
    /// `length` zero bytes at `offset`, which need not be stored.
    Hole { index: u32, offset: u64, length: u64 },
    /// `length` bytes at `offset` that the target has.
    Copy { index: u32, offset: u64, length: u64, from: Within },
    /// All is read; the digest is that of the whole file, from its first byte.
    End { index: u32, digest: Digest },
    /// The content is what `unless` said.
    Same { index: u32, digest: Digest },
    /// The file could not be read, or changed meanwhile (then `retry`).
    Failed { index: u32, message: String, retry: bool },
}

/// Reads files for one worker thread, several of them ahead where that hides delay.
pub trait Reader: Send {
    /// Whether it wants more files pushed before the next [`Reader::next`].
    fn wants_more(&self) -> bool;
    /// Adds a file to be read.
    fn push(&mut self, fetch: Fetch);
    /// The next piece; `None` when everything that was pushed has been produced.
    ///
    /// # Errors
    /// What ends the run. A single file that cannot be read is [`Produced::Failed`].
    fn next(&mut self) -> Result<Option<Produced>, Error>;
}

/// What a run may not do with what is there already, whatever its sender asks for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Forbidden {
    /// Replace it, or give it other content or permissions. Directories that are there stay as they are.
    pub change: bool,
    /// Remove it.
    pub remove: bool,
    /// Learn the names of what its sender has not named.
    pub see: bool,
}

/// How a run treats a target.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct BeginOptions {
    /// The sender's wish for permissions; the receiver's own policy wins.
    pub policy: PolicySpec,
    /// The sender is somebody else, who may not ask for everything. Whoever takes options from a connection sets it.
    #[serde(skip)]
    pub peer: bool,
    /// What it may not do. Set in the same way.
    #[serde(skip)]
    pub forbidden: Forbidden,
    /// It is going to remove what the source does not have, so that a target which forbids that says so at once.
    #[serde(default)]
    pub deletes: bool,
    /// It is going to take units away.
    #[serde(default)]
    pub retires: bool,
    /// What to leave out of the comparison (and so of deleting).
    pub filter: FilterSpec,
    /// Compare by content alone.
    pub checksum: bool,
    /// Paths that are published last, as globs (markers, pointers).
    pub last: Vec<String>,
    /// Directories that are published whole or not at all, also where they are there already, as globs.
    #[serde(default)]
    pub units: Vec<String>,
    /// Files that only grow, as globs: what is new of one is put at the end of what is there, where nothing speaks against it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub append_only: Vec<String>,
    /// Start although there seems to be no room (sparse files, a file system that compresses).
    #[serde(default)]
    pub ignore_free_space: bool,
    /// Hash what lies on the disk before publishing, not only the stream.
    pub verify_disk: bool,
    /// How many directories are listed, and files hashed, at once where the target is on this machine.
    #[serde(skip)]
    pub threads: Threads,
    /// How long to wait for another run on the same root, in seconds.
    pub wait_seconds: u64,
    /// Only look: create and change nothing.
    pub dry_run: bool,
    /// Only try whether a run can begin: it is given up at once, and what is there need not be listed.
    #[serde(skip)]
    pub tries: bool,
    /// Say which files may be made of what is there already ([`Plan::alike`]).
    #[serde(default)]
    pub delta: bool,
    /// Files that are to be sent are sent whole, though parts of them may be at the target: there is no [`Self::delta`].
    #[serde(skip)]
    pub whole_files: bool,
    /// Only stage: a later run that wants the same files publishes them.
    #[serde(default)]
    pub stage_only: bool,
    /// What is removed or replaced goes to the trash of the root, and stays there for so many seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trash_seconds: Option<u64>,
    /// Who runs it, for the audit log and the lock: `user@host`.
    pub actor: String,
    /// Where the content comes from, for the audit log.
    pub source: String,
    /// By what whoever runs it is here, as this machine has seen it: it is never read from what the other end sends.
    #[serde(skip)]
    pub login: Option<Box<Login>>,
    /// For runs that are made over and over: the directories that it came through. A target that is among them refuses, and
    /// remembers them otherwise.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub trail: Vec<Stop>,
}

/// What to do at the end.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct CommitOptions {
    /// Remove what the plan lists as removals.
    pub delete: bool,
    /// They are to go, but not now, since something failed: a unit that would keep some of them beside what is new is not
    /// published yet.
    #[serde(default)]
    pub delete_later: bool,
    /// Indices of entries that failed at the source and are not to be published.
    pub failed: Vec<u32>,
    /// Paths that could not even be listed at the source: what they belong to is not whole.
    #[serde(default)]
    pub unreadable: Vec<Vec<u8>>,
    /// Units (bytes of their paths) that are taken away whole, though the run may delete nothing else.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub retire: Vec<Vec<u8>>,
    /// Units that stay, with all that is in them, though the plan lists them as removals.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub spare: Vec<Vec<u8>>,
}

/// What was published.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Committed {
    /// Generation of the manifest that is now in force.
    pub generation: u64,
    /// SHA-256 of the manifest file, in hexadecimal.
    pub manifest_digest: String,
    /// Paths that were added or replaced.
    pub published: u64,
    /// Paths that were removed.
    pub removed: u64,
    /// Where what was removed or replaced lies now, below the root, if anything does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trash: Option<String>,
    /// Units that were taken away: escaped paths.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub retired: Vec<String>,
    /// What was to be removed and stays for now, since somebody uses it: escaped path and who.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub put_off: Vec<(String, String)>,
    /// What was to be removed stays all the same: something failed that had not by then.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub held_back: bool,
    /// Paths that could not be published: escaped path and reason.
    pub problems: Vec<(String, String)>,
}

/// The side that content goes to. One run: `begin`, `diff`, any writers, `commit` or `abort`.
pub trait Target: Sync {
    /// For messages: `/data/x` or `user@host:/data/x`.
    fn describe(&self) -> String;
    /// Takes the lock, finishes or collects what an interrupted run left.
    ///
    /// # Errors
    /// When the root cannot be used, is locked, or the receiver refuses.
    fn begin(&self, options: &BeginOptions, monitor: &dyn Monitor) -> Result<(), Error>;
    /// Says before the comparison that nothing will be removed in this run after all.
    fn keeps_all(&self) {}
    /// Compares the source's tree with what is there.
    ///
    /// # Errors
    /// When the receiver refuses a path or a permission, or cannot read its tree.
    fn diff(&self, source: &Arc<Tree>, monitor: &dyn Monitor) -> Result<Plan, Error>;
    /// A writer for one worker thread.
    ///
    /// # Errors
    /// When the connection ends.
    fn writer(&self) -> Result<Box<dyn Writer + '_>, Error>;
    /// Publishes what is staged.
    ///
    /// # Errors
    /// When nothing was published: the target is as it was.
    fn commit(&self, options: &CommitOptions, monitor: &dyn Monitor) -> Result<Committed, Error>;
    /// Ends the run without publishing. What is staged stays for the next run.
    fn abort(&self);
    /// The other end broke the rules, at this path (its bytes; empty where it is about none): nothing of the run is to be
    /// published or kept, and the audit log is to say why. The run is still ended by [`Target::abort`].
    fn reject(&self, path: &[u8], reason: &str) {
        let _ = (path, reason);
    }
    /// Whether it can keep what was staged by a run that does not publish ([`BeginOptions::stage_only`]).
    fn stages_early(&self) -> bool {
        false
    }
    /// How the target proves what it holds, for `-v` and the summary.
    fn verification(&self) -> String;
    /// Bytes that went over the wire so far, both directions; 0 where there is none.
    fn wire_bytes(&self) -> u64 {
        0
    }
    /// How many workers it has a use for.
    fn crew(&self) -> Crew {
        Crew::default()
    }
    /// Whether it is reached over a network.
    fn is_far(&self) -> bool {
        false
    }
    /// Says how much content is to come, before the first reader or writer is asked for.
    fn expect(&self, bytes: u64, files: usize) {
        let _ = (bytes, files);
    }
    /// Tells what came up of the connections while content went over them.
    fn remark(&self, monitor: &dyn Monitor) {
        let _ = monitor;
    }
    /// What is known of what the file at `index` may be made of, where that is nothing that can be listed ([`Target::alike`]); `None` of a
    /// target that lists.
    fn former(&self, index: u32) -> Option<Former> {
        let _ = index;
        None
    }
    /// The most that it copies at once ([`Writer::copy`]), in bytes.
    fn copies_at_once(&self) -> u64 {
        u64::MAX
    }
    /// What it has that the file at `index` may be made of ([`Writer::copy`]), from a place on; `None` where there is nothing.
    ///
    /// # Errors
    /// When the connection ends.
    fn alike(&self, index: u32, wanted: Wanted) -> Result<Option<Alike>, Error> {
        let _ = (index, wanted);
        Ok(None)
    }
}

/// What became of a file that was given to a [`Writer`].
#[derive(Debug)]
pub struct Staged {
    /// Index in the source's tree.
    pub index: u32,
    /// `Ok` when it is staged and its SHA-256 equals the source's.
    pub result: Result<(), WriteFailure>,
}

/// Why a file was not staged.
#[derive(Debug, Clone)]
pub struct WriteFailure {
    /// What failed and why; without the path.
    pub message: String,
    /// Worth sending again from the start.
    pub retry: bool,
}

/// Stages files for one worker thread. Calls may return before their work is done; what became of it is told by
/// [`Writer::completions`]. For one file: `put`; or `open`, `write`, `hole` and `copy` in ascending order, `finish`; or `keep`.
pub trait Writer: Send {
    /// Stages a whole small file.
    ///
    /// # Errors
    /// What ends the run (here and below); a single file's failure is a completion.
    fn put(&mut self, index: u32, block: Block, digest: Digest) -> Result<(), Error>;
    /// Starts a large file, or goes on with it at `resume_at`.
    ///
    /// # Errors
    /// What ends the run.
    fn open(&mut self, index: u32, resume_at: u64) -> Result<(), Error>;
    /// Bytes at `offset`.
    ///
    /// # Errors
    /// What ends the run.
    fn write(&mut self, index: u32, offset: u64, block: Block) -> Result<(), Error>;
    /// Zero bytes at `offset`, to be left as a hole.
    ///
    /// # Errors
    /// What ends the run.
    fn hole(&mut self, index: u32, offset: u64, length: u64) -> Result<(), Error>;
    /// Of a file that was opened, before anything of it comes: it begins with all that the target has under its name, which was hashed and
    /// is `there`.
    fn begins_with(&mut self, index: u32, there: Beginning) {
        let _ = (index, there);
    }
    /// `length` bytes at `offset` that the target has at a place of what [`Target::alike`] listed.
    ///
    /// # Errors
    /// What ends the run.
    fn copy(&mut self, index: u32, offset: u64, length: u64, from: Within) -> Result<(), Error> {
        let _ = (index, offset, length, from);
        Err(Error::Usage("this target has nothing that could be copied".into()))
    }
    /// The file is complete and has this digest at the source.
    ///
    /// # Errors
    /// What ends the run.
    fn finish(&mut self, index: u32, digest: Digest) -> Result<(), Error>;
    /// The target's content is right already; only metadata changes.
    ///
    /// # Errors
    /// What ends the run.
    fn keep(&mut self, index: u32, digest: Digest) -> Result<(), Error>;
    /// The source could not deliver the file: drop what is staged of it. No completion follows.
    ///
    /// # Errors
    /// What ends the run.
    fn discard(&mut self, index: u32) -> Result<(), Error>;
    /// Files that were completed since the last call. With `wait`, everything given so far is completed first.
    ///
    /// # Errors
    /// What ends the run.
    fn completions(&mut self, wait: bool) -> Result<Vec<Staged>, Error>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn h09_the_path_of_an_error_does_not_steer_a_terminal() {
        let source = std::io::ErrorKind::NotFound.into();
        let error = Error::Io { operation: "open", path: "/x/\u{1b}[2J\nok\\n".into(), source };
        assert_eq!(error.to_string(), "cannot open '/x/\\x1b[2J\\nok\\n'");
    }
}
