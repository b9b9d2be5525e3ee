//! Whether a tree is what its manifest says: the gate before a training run.
//!
//! Looking changes nothing. All that is wrong is found in one run. What was not read is counted as such: a report says how
//! much was hashed, how much an earlier hash vouches for, and how much nobody has read. A file that could not be looked at
//! is a finding, never good.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::drift::{self, DriftError, Question};
use crate::filter::{Filter, FilterError, FilterSpec};
use crate::layout::Wanted;
use crate::manifest::{Digest, Timestamp};
use crate::monitor::threads::Threads;
use crate::monitor::{Monitor, Phase};
use crate::path::{InvalidPath, RelPath};
use crate::policy::rights::Subject;
use crate::root::{FileKind, Follow, Root, RootError};
use crate::scan::{self, LinkRule, ScanError, ScanRule};
use crate::signature::oms::PublicKey;

mod compare;
mod hash;
mod index;
mod layouts;
mod list;
pub mod quarantine;
mod remember;
pub mod repair;
mod sample;
mod unchanged;
mod verdict;

use compare::Compare;
use list::Loaded;
pub use verdict::{Refused, Slot, SlotError, Verdict};

/// How much is read.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Depth {
    /// Metadata against list and digest table; what moved is hashed.
    Quick,
    /// The same, and everything that the digest table does not vouch for is hashed.
    Default,
    /// As quick, and so many per cent of all files, chosen at random, are hashed; of large files whose blocks are known so
    /// many per cent of the blocks.
    Sample(f64),
    /// Every byte.
    Full,
}

impl std::fmt::Display for Depth {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Depth::Quick => f.write_str("quick"),
            Depth::Default => f.write_str("default"),
            Depth::Sample(percent) => write!(f, "sample {percent}%"),
            Depth::Full => f.write_str("full"),
        }
    }
}

/// What is asked.
#[derive(Debug, Clone)]
pub struct Options {
    /// How much is read.
    pub depth: Depth,
    /// The list to compare with; `None` is the manifest of the tree itself.
    pub against: Option<PathBuf>,
    /// The list is the signature of a model, by this key.
    pub key: Option<PublicKey>,
    /// The least generation that is good.
    pub min_generation: Option<u64>,
    /// Who has to be able to read all of it.
    pub subject: Option<Subject>,
    /// Paths that nobody lists are no finding.
    pub allow_unlisted: bool,
    /// Modes, owners and groups are not compared.
    pub ignore_permissions: bool,
    /// gitignore globs of what is not looked at.
    pub exclude: Vec<String>,
    /// A digest that was computed longer ago, or nobody knows when, vouches for nothing.
    pub max_age: Option<Duration>,
    /// How many files are hashed at once; 0 for as many as there are cores.
    pub threads: usize,
    /// How much the threads that hash give way to others, as for nice(1).
    pub nice: i32,
    /// Files that are read whatever is known of them.
    pub read: BTreeSet<RelPath>,
    /// Whose rules a checkpoint has to meet; `None` is those of every layout that is recognised. Where it is asked for and
    /// there is no manifest, the layout alone says whether the tree is good.
    pub layout: Option<Wanted>,
    /// A file that every checkpoint has to hold.
    pub marker: Option<Vec<u8>>,
    /// The listed paths are asked for, those that are good too.
    pub all_paths: bool,
    /// Files beside the list that may lie in the tree without being listed.
    pub own: Vec<PathBuf>,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            depth: Depth::Default,
            against: None,
            key: None,
            min_generation: None,
            subject: None,
            allow_unlisted: false,
            ignore_permissions: false,
            exclude: Vec::new(),
            max_age: None,
            threads: 0,
            nice: 0,
            read: BTreeSet::new(),
            layout: None,
            marker: None,
            all_paths: false,
            own: Vec::new(),
        }
    }
}

/// Why a tree could not be checked.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum CheckError {
    #[error(transparent)]
    Scan(#[from] ScanError),
    #[error(transparent)]
    Root(#[from] RootError),
    #[error(transparent)]
    Filter(#[from] FilterError),
    #[error(transparent)]
    Path(#[from] InvalidPath),
    #[error(transparent)]
    Drift(#[from] DriftError),
    #[error("cannot read the list '{}'", crate::error::shown(file))]
    List { file: PathBuf, source: std::io::Error },
    #[error(
        "the manifest of '{}' may not be read; check as its owner, or name a list that may be with --against",
        crate::error::shown(root)
    )]
    Denied { root: PathBuf, source: RootError },
    #[error("cannot start a thread to hash with")]
    Thread(#[source] std::io::Error),
    #[error("stopped before everything was looked at")]
    Stopped,
}

/// What is wrong with a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[allow(missing_docs)]
pub enum Kind {
    ManifestMissing,
    ManifestDamaged,
    OldGeneration,
    Unfinished,
    Unreadable,
    Changed,
    Damaged,
    Missing,
    Modified,
    WrongSize,
    WrongKind,
    WrongLink,
    WrongMode,
    WrongOwner,
    WrongGroup,
    Unlisted,
}

impl Kind {
    /// The word that stands for it in every output.
    pub fn name(self) -> &'static str {
        match self {
            Kind::ManifestMissing => "manifest-missing",
            Kind::ManifestDamaged => "manifest-damaged",
            Kind::OldGeneration => "old-generation",
            Kind::Unfinished => "unfinished",
            Kind::Unreadable => "unreadable",
            Kind::Changed => "changed",
            Kind::Damaged => "damaged",
            Kind::Missing => "missing",
            Kind::Modified => "modified",
            Kind::WrongSize => "wrong-size",
            Kind::WrongKind => "wrong-kind",
            Kind::WrongLink => "wrong-link",
            Kind::WrongMode => "wrong-mode",
            Kind::WrongOwner => "wrong-owner",
            Kind::WrongGroup => "wrong-group",
            Kind::Unlisted => "unlisted",
        }
    }

    /// The sign of `rclone check --combined`.
    pub fn symbol(self) -> char {
        match self {
            Kind::Missing => '-',
            Kind::Unlisted => '+',
            Kind::Modified | Kind::Damaged | Kind::WrongSize | Kind::WrongKind | Kind::WrongLink => '*',
            Kind::WrongMode | Kind::WrongOwner | Kind::WrongGroup => '*',
            _ => '!',
        }
    }
}

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Finding {
    /// Below the root; a whole path where it lies above it.
    pub path: PathBuf,
    /// What is wrong.
    pub kind: Kind,
    /// In which way; names in it are escaped. Empty where the kind says it all.
    pub message: String,
}

/// Files and their bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Sum {
    pub files: u64,
    pub bytes: u64,
}

impl Sum {
    fn add(&mut self, bytes: u64) {
        self.files += 1;
        self.bytes = self.bytes.saturating_add(bytes);
    }
}

/// What was found.
#[derive(Debug, Clone, Default)]
pub struct Report {
    /// SHA-256 of the list that was compared with; `None` where there is none that can be read.
    pub list: Option<Digest>,
    /// The time of change of the list, which no copy of it has.
    pub list_changed: Option<Timestamp>,
    /// The generation of the manifest; `None` for a list that has none.
    pub generation: Option<u64>,
    /// All that is wrong, by path.
    pub findings: Vec<Finding>,
    /// The listed paths, where they are asked for.
    pub paths: Vec<PathBuf>,
    /// Listed files.
    pub all: Sum,
    /// Read in this run.
    pub hashed: Sum,
    /// Of which some blocks were read. They are counted among those that are not read as well.
    pub sampled: Sum,
    /// Not read: metadata is what it was when the digest was computed.
    pub vouched: Sum,
    /// Not read by anybody that is known of: size and times are as listed.
    pub unread: Sum,
    /// When the oldest of the digests that vouch was computed, in seconds since 1970; of this run where all were.
    pub oldest: Option<u64>,
    /// Files that a digest of unknown age vouches for.
    pub undated_files: u64,
    /// The checkpoints that were recognised, by layout and path.
    pub layouts: Vec<String>,
    /// Nothing but the layout says that the tree is complete.
    pub layout_alone: bool,
    /// What was not looked at, and why.
    pub notes: Vec<String>,
}

/// How it ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Outcome {
    Good,
    /// Nothing is wrong but that a run which brings something is not finished.
    Unfinished,
    Bad,
}

impl Outcome {
    /// The word for it.
    pub fn name(self) -> &'static str {
        match self {
            Outcome::Good => "good",
            Outcome::Unfinished => "unfinished",
            Outcome::Bad => "bad",
        }
    }
}

impl Report {
    /// Whether training may start.
    pub fn outcome(&self) -> Outcome {
        match self.findings.iter().all(|finding| finding.kind == Kind::Unfinished) {
            _ if self.findings.is_empty() => Outcome::Good,
            true => Outcome::Unfinished,
            false => Outcome::Bad,
        }
    }

    /// How many findings there are of each kind.
    pub fn counts(&self) -> BTreeMap<Kind, u64> {
        let mut counts = BTreeMap::new();
        for finding in &self.findings {
            *counts.entry(finding.kind).or_insert(0) += 1;
        }
        counts
    }
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

const STAGING: &str = ".lockstep/staging";
/// Of a run of lockstep there, of one over plain SFTP, and of a repair.
const STAGED: [&str; 3] = ["current", "sftp", "repair"];

/// Compares what lies at `path` with its list.
///
/// # Errors
/// [`CheckError`] when it could not be done: then nothing is known of the tree.
pub fn check(path: &Path, options: &Options, monitor: &dyn Monitor) -> Result<Report, CheckError> {
    monitor.event(crate::monitor::Event::Phase(Phase::Scanning));
    let root = Root::open(path)?;
    let filter = Filter::compile(&FilterSpec { rules: options.exclude.clone(), only: None })?;
    let mut report = match unchanged::look(&root, options, monitor) {
        Some(report) => report,
        None => compare_all(path, &root, options, &filter, monitor)?,
    };
    staging(&root, &mut report);
    if let Some(subject) = &options.subject {
        unreadable(path, subject, &filter, &mut report, monitor)?;
    }
    if monitor.stopped() {
        return Err(CheckError::Stopped);
    }
    report.findings.sort();
    report.findings.dedup();
    Ok(report)
}

/// The same by list and tree, and what the next check is told of it.
fn compare_all(
    path: &Path,
    root: &Root,
    options: &Options,
    filter: &Filter,
    monitor: &dyn Monitor,
) -> Result<Report, CheckError> {
    let (started, looked) = (now(), SystemTime::now());
    let loaded = list::load(root, options.against.as_deref(), options.key.as_ref())?;
    let mut report = empty(&loaded);
    old_generation(options, &loaded, &mut report);
    let rule = ScanRule {
        filter: filter.clone(),
        links: LinkRule::All,
        ignore_files: false,
        report_special: true,
        threads: Threads::default(),
    };
    let scanned = scan::scan(root, &rule, monitor)?;
    layouts::look(root, path, options, &loaded, &scanned, &mut report);
    match &loaded.list {
        Ok(list) => {
            let mut compare = Compare::new(root, options, list, &loaded, filter, &scanned);
            compare.paths(&mut report);
            let jobs = compare.finish(&mut report);
            let hashed = hash::run(root, options, &jobs, started, &mut report, monitor)?;
            remember::store(root, &hashed, monitor);
        }
        Err(_) if report.layout_alone => {}
        Err(finding) => report.findings.push(finding.clone()),
    }
    // RACE: what was published meanwhile was compared with the list of before.
    if !list::is_same(root, options, &loaded)? {
        let message = "was replaced while the tree was checked; check again".to_owned();
        report.findings.push(Finding { path: loaded.shown.clone(), kind: Kind::Changed, message });
    }
    unchanged::keep(root, options, &loaded, &scanned, &report, looked, monitor);
    Ok(report)
}

fn old_generation(options: &Options, loaded: &Loaded, report: &mut Report) {
    if let (Some(least), Ok(list)) = (options.min_generation, &loaded.list)
        && list.generation.is_none_or(|generation| generation < least)
    {
        let message = match list.generation {
            Some(generation) => format!("is of generation {generation}, and at least {least} is asked for"),
            None => format!("has no generation, and at least {least} is asked for"),
        };
        report.findings.push(Finding { path: loaded.shown.clone(), kind: Kind::OldGeneration, message });
    }
}

/// The list that [`check`] would compare with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ListId {
    /// SHA-256 of its bytes.
    pub digest: Digest,
    /// Its time of change.
    pub changed: Timestamp,
    /// The generation, where it has one.
    pub generation: Option<u64>,
}

/// Which list [`check`] would compare with, as [`Options`] has them; `None` where there is none that can be used.
///
/// # Errors
/// [`CheckError`] when it cannot be read.
pub fn listed(path: &Path, options: &Options) -> Result<Option<ListId>, CheckError> {
    let loaded = list::load(&Root::open(path)?, options.against.as_deref(), options.key.as_ref())?;
    let Loaded { list, digest, metadata, .. } = loaded;
    let (Ok(list), Some(digest), Some(metadata)) = (list, digest, metadata) else { return Ok(None) };
    Ok(Some(ListId { digest, changed: metadata.ctime, generation: list.generation }))
}

fn empty(loaded: &Loaded) -> Report {
    Report {
        list: loaded.digest,
        list_changed: loaded.metadata.map(|found| found.ctime),
        generation: loaded.list.as_ref().ok().and_then(|list| list.generation),
        ..Report::default()
    }
}

/// Whether a run that brings something has not come to its end.
fn staging(root: &Root, report: &mut Report) {
    let look = || -> Result<Option<PathBuf>, RootError> {
        let Ok(staging) = RelPath::new(STAGING) else { return Ok(None) };
        let names = match root.names(Some(&staging), Follow::Never) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => return by_name(root, &staging),
            other => other?,
        };
        for name in names {
            let Ok(path) = staging.join(&name) else { continue };
            // A run that has found nothing to do so far has made directories alone.
            if !holds_nothing(root, &path)? {
                return Ok(Some(path.as_path().to_owned()));
            }
        }
        Ok(None)
    };
    match look() {
        Ok(None) => {}
        Ok(Some(path)) => {
            let message =
                "a run that brings something is going on, or was interrupted; run it again to its end".to_owned();
            report.findings.push(Finding { path, kind: Kind::Unfinished, message });
        }
        // What cannot be known is not good.
        Err(error) => {
            let message =
                format!("whether an interrupted run is left over cannot be seen: {}", crate::error::chain(&error));
            report.findings.push(Finding { path: PathBuf::from(STAGING), kind: Kind::Unreadable, message });
        }
    }
}

/// Whether there is nothing but directories at `path`.
fn holds_nothing(root: &Root, path: &RelPath) -> Result<bool, RootError> {
    match root.stat(path, Follow::Never) {
        Ok(found) if found.kind == FileKind::Directory => {}
        // RACE: the run has ended.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(true),
        other => return other.map(|_| false),
    }
    for name in root.names(Some(path), Follow::Never)? {
        let Ok(inside) = path.join(&name) else { return Ok(false) };
        if !holds_nothing(root, &inside)? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Who may enter the staging directory, and not list it, asks for the names that runs use: they are there while a run is
/// not finished.
///
/// A run that finds nothing to do is there for a moment as well, and what it has made cannot be looked into: it is waited for.
fn by_name(root: &Root, staging: &RelPath) -> Result<Option<PathBuf>, RootError> {
    for _ in 0..20 {
        if named(root, staging)?.is_none() {
            return Ok(None);
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    named(root, staging)
}

fn named(root: &Root, staging: &RelPath) -> Result<Option<PathBuf>, RootError> {
    for name in STAGED {
        let Ok(path) = staging.join(name) else { continue };
        match root.stat(&path, Follow::Never) {
            Ok(_) => return Ok(Some(path.as_path().to_owned())),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(None)
}

fn unreadable(
    path: &Path,
    subject: &Subject,
    filter: &Filter,
    report: &mut Report,
    monitor: &dyn Monitor,
) -> Result<(), CheckError> {
    let found = drift::look(path, &Question { policy: None, subject: Some(subject) }, monitor)?;
    let who = crate::error::Escaped(subject.shown.as_bytes()).to_string();
    let admitted = |inside: &Path, directory| {
        let inside = RelPath::new(inside.as_os_str().as_bytes());
        inside.map_or(true, |inside| takes_part(filter, &inside, directory))
    };
    for denied in found.unreadable {
        let place = match denied.path.strip_prefix(path) {
            Ok(inside) if inside.as_os_str().is_empty() => PathBuf::from("."),
            Ok(inside) if !admitted(inside, denied.what != "read") => continue,
            Ok(inside) => inside.to_owned(),
            Err(_) => denied.path.clone(),
        };
        let mut message = format!("{who} may not {} it: {}", denied.what, denied.reason);
        if denied.beneath > 0 {
            let beneath = crate::error::counted(denied.beneath, "path", "paths");
            message += &format!(", so that {beneath} beneath cannot be reached");
        }
        report.findings.push(Finding { path: place, kind: Kind::Unreadable, message });
    }
    for problem in found.problems {
        let Some(at) = problem.path else { continue };
        let directory = path.join(at.as_path()).symlink_metadata().is_ok_and(|found| found.is_dir());
        if !takes_part(filter, &at, directory) {
            continue;
        }
        let known = report.findings.iter().any(|one| one.kind == Kind::Unreadable && one.path == at.as_path());
        if !known {
            let message = problem.message;
            report.findings.push(Finding { path: at.as_path().to_owned(), kind: Kind::Unreadable, message });
        }
    }
    Ok(())
}

/// Whether the filter leaves a path in, with all directories above it.
fn takes_part(filter: &Filter, path: &RelPath, directory: bool) -> bool {
    let one = || filter.admits(path, directory);
    if filter.has_no_rules() { one() } else { path.ancestors().all(|above| filter.admits(&above, true)) && one() }
}
