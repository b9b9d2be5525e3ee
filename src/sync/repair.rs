//! What a check found to be wrong is had again from a good copy, through the one pipeline.
//!
//! What always holds: the list says what is wanted, the copy only delivers. A file of it that has another size or SHA-256
//! than the list says is not taken, whatever the copy claims of it.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, OnceLock};

use super::{Options, run};
use crate::check::repair::Wanted;
use crate::endpoint::local::{LocalTarget, Repair};
use crate::endpoint::{
    BeginOptions, CommitOptions, Crew, Error, Fetch, Links, Produced, Reader, Scan, ScanOptions, Source, Target as _,
};
use crate::filter::FilterSpec;
use crate::manifest::{Content, Digest, Entry, Tree};
use crate::monitor::{Monitor, Severity};
use crate::path::RelPath;
use crate::plan::Change;
use crate::plan::safety::DeleteLimit;
use crate::root::{Follow, Root};

/// More bytes of paths are not named to the copy: it lists all that it has then.
const NAMED_BYTES: usize = 16 << 10;

/// How a path was mended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum How {
    /// Its content was fetched.
    Fetched,
    /// A directory or a link was made.
    Made,
    /// It got the permissions that it should have.
    Permissions,
}

impl How {
    /// The word for it.
    pub fn name(self) -> &'static str {
        match self {
            How::Fetched => "fetched",
            How::Made => "made",
            How::Permissions => "permissions",
        }
    }
}

/// A path that is as the list says again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mended {
    /// Which.
    pub path: RelPath,
    /// How.
    pub how: How,
    /// Bytes of content that were fetched.
    pub bytes: u64,
}

/// What a repair did.
#[derive(Debug, Default)]
pub struct Repaired {
    /// What is good again, by path.
    pub mended: Vec<Mended>,
    /// What could not be had, and why; `None` is none path in particular.
    pub failed: Vec<(Option<RelPath>, String)>,
}

/// How a repair is done.
#[derive(Debug, Clone)]
pub struct HowToRepair {
    /// Who does it: `user@host`, for the lock and the audit log.
    pub actor: String,
    /// Worker threads, at least 1.
    pub workers: usize,
    /// How often a file is fetched again that arrived damaged.
    pub retries: u32,
}

/// Makes what is wanted of the tree at `root` as the list says, with content from `source`. `stop` ends it before anything is
/// in its place; what is staged serves the next repair.
///
/// # Errors
/// What ended it before anything was in its place. Single paths that could not be had are told.
pub fn repair(
    source: &dyn Source,
    root: &Path,
    wanted: &Wanted,
    how: &HowToRepair,
    monitor: &dyn Monitor,
    stop: &AtomicBool,
) -> Result<Repaired, Error> {
    let copy = GoodCopy { source, wanted, found: OnceLock::new() };
    let by = Repair { manifest: wanted.manifest, listed: Arc::clone(&wanted.listed), as_it_is: wanted.as_it_is };
    let target = LocalTarget::repairing(root, by);
    let options = Options {
        scan: ScanOptions { links: Links::All, ..ScanOptions::default() },
        begin: BeginOptions { actor: how.actor.clone(), source: source.describe(), ..BeginOptions::default() },
        delete: false,
        retain: None,
        max_delete: DeleteLimit::Unlimited,
        workers: how.workers,
        retries: how.retries,
        bandwidth: super::Rate::default(),
    };
    let report = run(&copy, &target, &options, monitor, stop)?;
    let failed = report.problems.into_iter().filter(|problem| problem.severity == Severity::Failed);
    let failed: Vec<(Option<RelPath>, String)> = failed.map(|problem| (problem.path, problem.message)).collect();
    let not: BTreeSet<&RelPath> = failed.iter().filter_map(|(path, _)| path.as_ref()).collect();
    let done = |path: &RelPath| !not.contains(path) && !path.ancestors().any(|above| not.contains(&above));
    let actions = report.plan.actions.iter().map(|action| (action, &report.tree.entries()[action.index as usize]));
    let follows = |entry: &Entry| matches!(&entry.content, Content::HardLink { first } if not.contains(first));
    let mended = actions.filter(|(_, entry)| done(&entry.path) && !follows(entry)).map(|(action, entry)| {
        let (how, bytes) = match (&entry.content, action.change) {
            (_, Change::MetadataOnly) => (How::Permissions, 0),
            (Content::File { size, .. }, _) => (How::Fetched, *size),
            _ => (How::Made, 0),
        };
        Mended { path: entry.path.clone(), how, bytes }
    });
    let mended = mended.collect();
    Ok(Repaired { mended, failed })
}

/// Brings what an interrupted repair has left at `root` to its end. No copy is asked.
///
/// # Errors
/// When the root cannot be used, or is in use.
pub fn finish(root: &Path, how: &HowToRepair, monitor: &dyn Monitor) -> Result<(), Error> {
    let target = LocalTarget::repairing(root, Repair::default());
    target.begin(&BeginOptions { actor: how.actor.clone(), ..BeginOptions::default() }, monitor)?;
    let nothing = target.diff(&Arc::new(Tree::default()), monitor);
    let ended = nothing.and_then(|_| target.commit(&CommitOptions::default(), monitor));
    if ended.is_err() {
        target.abort();
    }
    ended.map(drop)
}

/// Whether an interrupted repair has left something at `root`.
pub fn is_left_over(root: &Root) -> bool {
    RelPath::new(Repair::STAGING).is_ok_and(|staging| root.stat(&staging, Follow::Never).is_ok())
}

/// A copy as the source of just what is wanted. Its entries are those of the list; `found` says where the copy has them.
struct GoodCopy<'a> {
    source: &'a dyn Source,
    wanted: &'a Wanted,
    found: OnceLock<Found>,
}

/// What the copy has of it.
struct Found {
    theirs: Arc<Tree>,
    /// By index of what is wanted: the copy's index, or why it is not taken from there.
    places: Vec<Result<u32, String>>,
    digests: Vec<Option<Digest>>,
}

impl GoodCopy<'_> {
    /// Where the copy has the file of an entry.
    fn place(&self, entry: &Entry, scan: &Scan) -> Result<u32, String> {
        let absent = || {
            let told = scan.problems.iter().find(|problem| {
                let path = problem.path.as_ref();
                path.is_some_and(|path| entry.path.is_within(path) || entry.path == *path)
            });
            told.map_or_else(
                || "the good copy does not have it".to_owned(),
                |problem| format!("the good copy cannot give it: {}", problem.message),
            )
        };
        let mut at = scan.tree.position(&entry.path).ok_or_else(absent)?;
        if let Content::HardLink { first } = &scan.tree.entries()[at].content {
            at = scan.tree.position(first).ok_or_else(absent)?;
        }
        let Some((size, digest)) = scan.tree.entries()[at].file() else {
            return Err("it is no regular file in the good copy".into());
        };
        let Some((listed, wanted)) = entry.file() else { return Err("it is no regular file".into()) };
        if size != listed && !self.wanted.sums {
            return Err(format!(
                "the good copy has {size} bytes of it, and the list says {listed}: it is not that file"
            ));
        }
        match (digest, wanted) {
            (Some(digest), Some(wanted)) if digest != wanted => Err(other(digest, wanted)),
            _ => Ok(at as u32),
        }
    }

    /// What is wanted, with what a list of names and digests does not tell.
    fn complete(&self, scan: &Scan) -> Result<Tree, Error> {
        if !self.wanted.sums {
            return Ok(self.wanted.tree.clone());
        }
        let mut entries = self.wanted.tree.clone().into_entries();
        for entry in &mut entries {
            let Some(theirs) = scan.tree.get(&entry.path) else { continue };
            let first = if let Content::HardLink { first } = &theirs.content { scan.tree.get(first) } else { None };
            let theirs = first.unwrap_or(theirs);
            match (&mut entry.content, theirs.file()) {
                (Content::File { size, .. }, Some((found, _))) => *size = found,
                (Content::Directory, None) if theirs.is_directory() => {}
                _ => continue,
            }
            (entry.mode, entry.mtime) = (theirs.mode & 0o777, theirs.mtime);
        }
        Tree::new(entries).map_err(|error| Error::Refused { by: "the list".into(), reason: error.to_string() })
    }
}

fn other(digest: Digest, wanted: Digest) -> String {
    format!(
        "the good copy's SHA-256 is {digest}, and the list says {wanted}: it is damaged there too, or of another version"
    )
}

impl Source for GoodCopy<'_> {
    fn describe(&self) -> String {
        self.source.describe()
    }

    fn scan(&self, options: &ScanOptions, monitor: &dyn Monitor) -> Result<Scan, Error> {
        let paths = self.wanted.tree.entries().iter().map(|entry| entry.path.as_bytes().to_vec());
        let paths: Vec<Vec<u8>> = paths.collect();
        let few = paths.iter().map(Vec::len).sum::<usize>() <= NAMED_BYTES;
        let filter = FilterSpec { rules: Vec::new(), only: few.then_some(paths) };
        let scan = self.source.scan(&ScanOptions { filter, ..options.clone() }, monitor)?;
        let tree = self.complete(&scan)?;
        let places = tree.entries().iter().map(|entry| self.place(entry, &scan)).collect();
        let digests = tree.entries().iter().map(|entry| entry.file().and_then(|(_, digest)| digest)).collect();
        let _ = self.found.set(Found { theirs: Arc::new(scan.tree), places, digests });
        Ok(Scan { tree, problems: Vec::new() })
    }

    fn reader(&self, _: Arc<Tree>) -> Result<Box<dyn Reader + '_>, Error> {
        let found = self.found.get().ok_or_else(|| Error::Usage("the good copy was not listed".into()))?;
        let inner = self.source.reader(Arc::clone(&found.theirs))?;
        let (going, waiting, refused) = (HashMap::new(), Vec::new(), VecDeque::new());
        Ok(Box::new(GoodReader { found, inner, going, waiting, refused }))
    }

    fn remember(&self, _: &Tree, digests: &[(u32, Digest)]) {
        let Some(found) = self.found.get() else { return };
        let place = |index: u32| found.places.get(index as usize)?.as_ref().ok().copied();
        let theirs: Vec<_> = digests.iter().filter_map(|&(index, digest)| Some((place(index)?, digest))).collect();
        self.source.remember(&found.theirs, &theirs);
    }

    fn wire_bytes(&self) -> u64 {
        self.source.wire_bytes()
    }

    fn expect(&self, bytes: u64, files: usize) {
        self.source.expect(bytes, files);
    }

    fn remark(&self, monitor: &dyn Monitor) {
        self.source.remark(monitor);
    }

    fn crew(&self) -> Crew {
        self.source.crew()
    }
}

/// Reads what the list wants by where the copy has it.
struct GoodReader<'a> {
    found: &'a Found,
    inner: Box<dyn Reader + 'a>,
    /// The copy's index of what is being read, and what it is wanted as.
    going: HashMap<u32, u32>,
    /// Other names at the copy for what is being read: one after the other.
    waiting: Vec<(u32, Fetch)>,
    refused: VecDeque<Produced>,
}

impl GoodReader<'_> {
    /// What a piece is wanted as; `last` where it is the file's last.
    fn wanted(&mut self, theirs: u32, last: bool) -> Result<u32, Error> {
        let index = if last { self.going.remove(&theirs) } else { self.going.get(&theirs).copied() };
        let index = index.ok_or_else(|| Error::Protocol {
            host: "the good copy".into(),
            what: "it sent a file that was not asked for".into(),
        })?;
        if last && let Some(at) = self.waiting.iter().position(|(same, _)| *same == theirs) {
            let (_, fetch) = self.waiting.remove(at);
            self.start(theirs, fetch);
        }
        Ok(index)
    }

    fn start(&mut self, theirs: u32, fetch: Fetch) {
        self.going.insert(theirs, fetch.index);
        self.inner.push(Fetch { index: theirs, ..fetch });
    }

    /// Lets a file pass that has the digest which the list says.
    fn proven(&self, index: u32, digest: Digest, produced: Produced) -> Produced {
        match self.found.digests.get(index as usize).copied().flatten() {
            Some(wanted) if wanted == digest => produced,
            Some(wanted) => Produced::Failed { index, message: other(digest, wanted), retry: false },
            None => Produced::Failed { index, message: "the list has no SHA-256 of it".into(), retry: false },
        }
    }
}

impl Reader for GoodReader<'_> {
    fn wants_more(&self) -> bool {
        self.inner.wants_more()
    }

    fn push(&mut self, fetch: Fetch) {
        let index = fetch.index;
        match self.found.places.get(index as usize) {
            Some(Ok(theirs)) if self.going.contains_key(theirs) => self.waiting.push((*theirs, fetch)),
            Some(Ok(theirs)) => self.start(*theirs, fetch),
            Some(Err(message)) => {
                self.refused.push_back(Produced::Failed { index, message: message.clone(), retry: false });
            }
            None => {
                let message = "it is not among what is wanted".into();
                self.refused.push_back(Produced::Failed { index, message, retry: false });
            }
        }
    }

    fn next(&mut self) -> Result<Option<Produced>, Error> {
        if let Some(refused) = self.refused.pop_front() {
            return Ok(Some(refused));
        }
        let Some(produced) = self.inner.next()? else { return Ok(None) };
        Ok(Some(match produced {
            Produced::Whole { index, block, digest } => {
                let index = self.wanted(index, true)?;
                self.proven(index, digest, Produced::Whole { index, block, digest })
            }
            Produced::Data { index, offset, block } => {
                Produced::Data { index: self.wanted(index, false)?, offset, block }
            }
            Produced::Hole { index, offset, length } => {
                Produced::Hole { index: self.wanted(index, false)?, offset, length }
            }
            Produced::Copy { index, offset, length, from } => {
                Produced::Copy { index: self.wanted(index, false)?, offset, length, from }
            }
            Produced::End { index, digest } => {
                let index = self.wanted(index, true)?;
                self.proven(index, digest, Produced::End { index, digest })
            }
            Produced::Same { index, digest } => {
                let index = self.wanted(index, true)?;
                self.proven(index, digest, Produced::Same { index, digest })
            }
            Produced::Failed { index, message, retry } => {
                Produced::Failed { index: self.wanted(index, true)?, message, retry }
            }
        }))
    }
}
