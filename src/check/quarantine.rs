//! Moves what was found to be damaged out of the way of training, by one rename.
//!
//! What always holds: it is one directory, on one file system, and nothing is copied or removed. What is good, unfinished,
//! being written, or wrong in its permissions alone stays where it is.

use std::collections::BTreeSet;
use std::io::{ErrorKind, Read as _};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use chrono::{DateTime, Utc};
use rustix::fs::RenameFlags;
use rustix::io::Errno;

use super::repair::is_denied;
use super::{Depth, Finding, Kind, Options, Outcome, Report};
use crate::audit::{AuditError, AuditLog, AuditRecord, OnFailure, settings};
use crate::error::{chain, shown};
use crate::filter::{Filter, FilterError, FilterSpec, STATE_DIRECTORY};
use crate::layout::names::pattern;
use crate::monitor::Monitor;
use crate::path::RelPath;
use crate::root::{FileKind, Follow, Root, RootError};
use crate::staging::{LockError, RootLock, sftp_holder};

/// Names of checkpoints that are units where no glob says it.
pub const UNITS: [&str; 12] = [
    "checkpoint-[0-9]*/",
    "checkpoint_[0-9]*/",
    "ckpt-[0-9]*/",
    "ckpt_[0-9]*/",
    "iter_[0-9]*/",
    "global_step[0-9]*/",
    "step-[0-9]*/",
    "step_[0-9]*/",
    "step[0-9]*/",
    "epoch-[0-9]*/",
    "epoch_[0-9]*/",
    "epoch=[0-9]*/",
];
/// Files that name a checkpoint beside them.
const POINTERS: [&[u8]; 4] = [b"latest", b"latest_checkpointed_iteration.txt", b"last", b"latest_checkpoint.txt"];
/// Nothing longer is a pointer.
const POINTER_MAX: u64 = 4096;
/// The longest name of a file.
const NAME_MAX: usize = 255;
/// More than the line of a move takes.
const LINE_BYTES: u64 = 16 << 10;
/// Within the state directory: what lies there takes part in no check and no run.
const WITHIN: &str = ".lockstep/quarantine";
const BESIDE: &str = ".quarantine";

/// What is to be moved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    /// The directory that was checked.
    Whole,
    /// These directories in it, and whether something is wrong outside of them.
    Units(BTreeSet<RelPath>, bool),
    /// Nothing, for this reason.
    Stay(String),
}

/// Why something was not moved.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum NotMoved {
    #[error("'{}' is in use by {holder}; it is not moved while a run brings something to it", shown(path))]
    InUse { path: PathBuf, holder: String },
    #[error("'{}' is a mount point, which cannot be renamed; unmount it, or check the directories in it", shown(.0))]
    MountPoint(PathBuf),
    #[error(
        "'{}' is on another file system than '{}': it would be copied, not renamed; name a directory on its own with \
         --quarantine=DIR",
        shown(to),
        shown(from)
    )]
    OtherFileSystem { from: PathBuf, to: PathBuf },
    #[error("'{}' lies in '{}', which is to be moved there; name another directory", shown(to), shown(from))]
    Inside { from: PathBuf, to: PathBuf },
    #[error("'{}' can be written to by others, or belongs to somebody else; make it yours (chmod 700), or name another", shown(.0))]
    Foreign(PathBuf),
    #[error("'{}' is a symbolic link, which somebody may have put there; remove it, or name a directory with --quarantine=DIR", shown(.0))]
    Link(PathBuf),
    #[error("'{}' is another directory than the one that was checked; check again", shown(.0))]
    Replaced(PathBuf),
    #[error("the list of '{}' was replaced since it was checked, as by a push that brought what was damaged; check again", shown(.0))]
    Renewed(PathBuf),
    #[error("'{}' has no directory above it", shown(.0))]
    Top(PathBuf),
    #[error("cannot {operation} '{}'", shown(path))]
    Io { operation: &'static str, path: PathBuf, source: std::io::Error },
    #[error(transparent)]
    Root(#[from] RootError),
    #[error("it is not moved, since that could not be recorded; mend it, or see [audit] on_failure")]
    Audit(#[source] AuditError),
    #[error(transparent)]
    Lock(LockError),
    #[error(transparent)]
    Filter(#[from] FilterError),
}

/// What was moved, and what is to be known of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Moved {
    /// Where it was.
    pub from: PathBuf,
    /// Where it is.
    pub to: PathBuf,
    /// Pointers beside it that name it still.
    pub pointers: Vec<PathBuf>,
    /// The newest one beside it that is good, and how that is known.
    pub last_good: Option<(PathBuf, String)>,
    /// Why the audit log does not tell of it; `None` where it does, or where there is none.
    pub not_audited: Option<String>,
}

fn units(globs: &[String]) -> Result<Filter, FilterError> {
    let rules = match globs {
        [] => UNITS.iter().map(|&glob| glob.to_owned()).collect(),
        globs => globs.to_vec(),
    };
    Filter::compile(&FilterSpec { rules, only: None })
}

/// The outermost unit that a path lies in, or is.
fn unit_of(units: &Filter, path: &RelPath, directory: bool) -> Option<RelPath> {
    let own = directory.then(|| path.clone());
    path.ancestors().chain(own).find(|above| !units.admits(above, true))
}

/// Decides what of the tree at `root`, whose list has the paths `listed`, is moved after `report`. `globs` say which directories are moved by themselves.
///
/// # Errors
/// When a glob is none.
pub fn decide(
    root: &Root,
    options: &Options,
    report: &Report,
    listed: &[RelPath],
    globs: &[String],
) -> Result<Decision, FilterError> {
    let stay = |reason: &str| Ok(Decision::Stay(reason.to_owned()));
    let has = |kind: Kind| report.findings.iter().any(|finding| finding.kind == kind);
    match report.outcome() {
        Outcome::Good => return stay("it is good"),
        Outcome::Unfinished => {
            return stay("nothing is wrong with it but that a run which brings something is not finished");
        }
        Outcome::Bad => {}
    }
    if has(Kind::ManifestMissing) {
        return stay("without a manifest nothing is known of it");
    }
    if report.layout_alone {
        return stay("without a manifest its layout alone is known, and a save that goes on looks the same");
    }
    if has(Kind::ManifestDamaged) && options.against.is_some() {
        return stay("the list of --against is damaged, and says nothing of the tree");
    }
    if has(Kind::Changed) {
        return stay("somebody writes to it; check again when that has ended");
    }
    let damage: Vec<&Finding> = report.findings.iter().filter(|finding| is_damage(root, options, finding)).collect();
    if damage.is_empty() {
        let reason = match has(Kind::OldGeneration) {
            true => "it is an older version than is asked for, not a damaged one",
            false => "only permissions are wrong, which 'lockstep policy apply', chmod or chown mend where it is",
        };
        return stay(reason);
    }
    if damage.iter().all(|finding| finding.kind == Kind::Unlisted) {
        return stay(
            "all that is listed is as it should be, and somebody may be writing what is not listed; remove that",
        );
    }
    let units = units(globs)?;
    let own = root.shown().canonicalize().unwrap_or_else(|_| root.shown().to_owned());
    let own = own.file_name().and_then(|name| RelPath::new(name.as_bytes()).ok());
    // The steps of DeepSpeed within a checkpoint are no checkpoints of their own.
    if own.is_some_and(|own| !units.admits(&own, true)) {
        return Ok(Decision::Whole);
    }
    let names = root.names(None, Follow::Never).unwrap_or_default();
    let names = names.iter().filter(|name| *name != STATE_DIRECTORY);
    let there = names.filter_map(|name| RelPath::new(name).ok()).filter(|path| is_directory(root, path));
    let there = there.filter_map(|path| unit_of(&units, &path, true));
    let known: BTreeSet<RelPath> = listed.iter().filter_map(|path| unit_of(&units, path, false)).chain(there).collect();
    if known.is_empty() {
        return Ok(Decision::Whole);
    }
    if has(Kind::ManifestDamaged) {
        return stay("without its manifest nobody knows which of the checkpoints in it are good");
    }
    let (mut bad, mut gone, mut outside) = (BTreeSet::new(), false, false);
    for finding in damage {
        let path = RelPath::new(finding.path.as_os_str().as_bytes()).ok();
        let unit = path.and_then(|path| path.ancestors().chain([path.clone()]).find(|above| known.contains(above)));
        match unit {
            Some(unit) if is_directory(root, &unit) => drop(bad.insert(unit)),
            Some(_) => gone = true,
            None => outside = true,
        }
    }
    match (bad.is_empty(), gone) {
        (true, true) => stay("the checkpoints that are wrong are not there at all"),
        (true, false) => stay("what is wrong lies in none of the checkpoints that it holds"),
        (false, _) => Ok(Decision::Units(bad, outside)),
    }
}

fn is_directory(root: &Root, path: &RelPath) -> bool {
    root.stat(path, Follow::Never).is_ok_and(|found| found.kind == FileKind::Directory)
}

/// Whether a finding says that data is not what it should be.
fn is_damage(root: &Root, options: &Options, finding: &Finding) -> bool {
    match finding.kind {
        Kind::Missing | Kind::Modified | Kind::WrongSize | Kind::WrongKind | Kind::WrongLink | Kind::Unlisted => true,
        Kind::Damaged | Kind::ManifestDamaged => true,
        Kind::Unreadable => !is_denied(root, finding, options.subject.as_ref()),
        _ => false,
    }
}

/// Where a directory is, and where it goes.
struct Way {
    above: Root,
    /// The whole path of `above`.
    place: PathBuf,
    name: RelPath,
    from: PathBuf,
    to: Root,
}

impl Way {
    /// Of the directory `within` the root, or of the root itself.
    fn find(root: &Root, within: Option<&RelPath>, to: Option<&Path>) -> Result<Way, NotMoved> {
        let real = |path: &Path| {
            let failed = |source| NotMoved::Io { operation: "find", path: path.to_owned(), source };
            path.canonicalize().map_err(failed)
        };
        let top = real(root.shown())?;
        let from = within.map_or_else(|| top.clone(), |within| top.join(within.as_path()));
        let (Some(above), Some(name)) = (from.parent(), from.file_name()) else { return Err(NotMoved::Top(from)) };
        let name = RelPath::new(name.as_bytes()).map_err(|_| NotMoved::Top(from.clone()))?;
        let above = match within {
            None => Root::open(above)?,
            Some(within) => within.parent().map_or_else(|| root.reopen(), |above| root.subroot(&above))?,
        };
        let found = above.stat(&name, Follow::Never)?;
        let checked = match within {
            None => root.stat_root()?,
            Some(within) => root.stat(within, Follow::Never)?,
        };
        if above.stat_root()?.device != checked.device {
            return Err(NotMoved::MountPoint(from));
        }
        if (found.device, found.inode) != (checked.device, checked.inode) {
            return Err(NotMoved::Replaced(from));
        }
        let beside = from.parent().unwrap_or(&top).to_owned();
        let place = match (to, within) {
            (Some(to), _) => std::path::absolute(to).map_err(|source| NotMoved::Io {
                operation: "find",
                path: to.to_owned(),
                source,
            })?,
            (None, Some(_)) => top.join(WITHIN),
            // In a tree that is published to, nothing else is left alone by the next run.
            (None, None) if RelPath::new(".lockstep").is_ok_and(|state| is_directory(&above, &state)) => {
                beside.join(WITHIN)
            }
            (None, None) => beside.join(BESIDE),
        };
        // RACE: whoever may write beside the directory may put a link here afterwards; whose it leads to is seen below.
        if to.is_none() && place.symlink_metadata().is_ok_and(|found| found.is_symlink()) {
            return Err(NotMoved::Link(place));
        }
        let make = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&place);
        make.map_err(|source| NotMoved::Io { operation: "make", path: place.clone(), source })?;
        let place = real(&place)?;
        if place.starts_with(&from) {
            return Err(NotMoved::Inside { from, to: place });
        }
        let to = Root::open(&place)?;
        let there = to.stat_root()?;
        if there.uid != rustix::process::geteuid().as_raw() || there.mode & 0o022 != 0 {
            return Err(NotMoved::Foreign(place));
        }
        Ok(Way { above, place: beside, name, from, to })
    }

    /// Renames it to its name and the time, or that and a number where somebody was faster.
    fn go(&self, now: SystemTime) -> Result<PathBuf, NotMoved> {
        let stamp = DateTime::<Utc>::from(now).format("%Y%m%dT%H%M%SZ");
        for number in 1..=100_u8 {
            let tail = if number == 1 { format!("-{stamp}") } else { format!("-{stamp}-{number}") };
            let name = self.name.as_bytes();
            let name = [&name[..name.len().min(NAME_MAX - tail.len())], tail.as_bytes()].concat();
            let Ok(name) = RelPath::new(name) else { return Err(NotMoved::Top(self.from.clone())) };
            match self.above.rename_to(&self.name, &self.to, &name, RenameFlags::NOREPLACE) {
                Ok(()) => {
                    // DURABILITY: after a crash it is where this says.
                    self.to.sync_dir(None)?;
                    self.above.sync_dir(None)?;
                    return Ok(self.to.shown().join(name.as_path()));
                }
                Err(error) => match error.errno().map(Errno::from_raw_os_error) {
                    Some(Errno::EXIST | Errno::NOTEMPTY) if number < 100 => {}
                    Some(Errno::BUSY) => return Err(NotMoved::MountPoint(self.from.clone())),
                    // Another file system, or a bind mount of the same one.
                    Some(Errno::XDEV) => {
                        let to = self.to.shown().to_owned();
                        return Err(NotMoved::OtherFileSystem { from: self.from.clone(), to });
                    }
                    _ => return Err(error.into()),
                },
            }
        }
        Err(NotMoved::Top(self.from.clone()))
    }
}

/// Locks the root, so that no run is going on in it. `None` where no run was ever at it.
fn lock(root: &Root, actor: &str) -> Result<Option<RootLock>, NotMoved> {
    let path = || root.shown().to_owned();
    let state = RelPath::new(".lockstep").is_ok_and(|state| is_directory(root, &state));
    if !state {
        return Ok(None);
    }
    if let Some(holder) = sftp_holder(root) {
        return Err(NotMoved::InUse { path: path(), holder });
    }
    match RootLock::take(root, actor, Duration::ZERO, &|| false) {
        Ok(lock) => Ok(Some(lock)),
        Err(LockError::Held { holder }) => Err(NotMoved::InUse { path: path(), holder }),
        Err(error) => Err(NotMoved::Lock(error)),
    }
}

/// Moves the directory `within` the root, or the root itself, to `to` or the usual place, where its list is `still` the one that it was
/// checked by.
///
/// # Errors
/// [`NotMoved`]: it is where it was.
pub fn move_aside(
    root: &Root,
    within: Option<&RelPath>,
    to: Option<&Path>,
    actor: &str,
    (report, listed): (&Report, &[RelPath]),
    still: &dyn Fn() -> bool,
    monitor: &dyn Monitor,
) -> Result<Moved, NotMoved> {
    let lock = lock(root, actor)?;
    if !still() {
        return Err(NotMoved::Renewed(root.shown().to_owned()));
    }
    let way = Way::find(root, within, to)?;
    // It may be a unit of what is published to the directory above.
    let above = if within.is_none() { self::lock(&way.above, actor)? } else { None };
    // What cannot be recorded is not done.
    if lock.is_some() && settings().on_failure == OnFailure::Refuse {
        AuditLog::open(root).and_then(|log| log.reserve(LINE_BYTES)).map_err(NotMoved::Audit)?;
    }
    let moved = way.go(SystemTime::now())?;
    let counts: Vec<String> =
        report.counts().into_iter().map(|(kind, count)| format!("{count} {}", kind.name())).collect();
    let record = AuditRecord {
        actor: actor.to_owned(),
        action: "quarantine".into(),
        path: within.map_or_else(|| ".".to_owned(), ToString::to_string),
        result: Some(crate::audit::Outcome::Success),
        reason: Some(format!("moved to '{}': {} in the tree", shown(&moved), counts.join(", "))),
        ..AuditRecord::default()
    };
    // The log of a root is moved with it; its descriptor leads there.
    let audited = lock.is_some().then(|| AuditLog::open(root).and_then(|mut log| log.append_last([record])));
    let not_audited = audited.and_then(Result::err).map(|error| chain(&error));
    drop((lock, above));
    let last_good = match within {
        Some(unit) => newest_listed(root, unit, report, listed).map(|(path, how)| (way.place.join(path), how)),
        None => newest_beside(&way, monitor),
    };
    Ok(Moved { pointers: pointers(&way), from: way.from, to: moved, last_good, not_audited })
}

/// The newest of the units beside one in which nothing was found.
fn newest_listed(root: &Root, unit: &RelPath, report: &Report, listed: &[RelPath]) -> Option<(PathBuf, String)> {
    let (wanted, _) = pattern(unit.name())?;
    let bad = |path: &RelPath| report.findings.iter().any(|finding| finding.path.starts_with(path.as_path()));
    let beside = listed.iter().filter(|path| path.parent() == unit.parent() && *path != unit);
    let numbered = beside.filter(|path| is_directory(root, path)).filter_map(|path| {
        let (same, numbers) = pattern(path.name())?;
        (same == wanted && !bad(path)).then_some((numbers, path))
    });
    let (_, newest) = numbered.max()?;
    let name = RelPath::new(newest.name()).ok()?;
    Some((name.as_path().to_owned(), "it has the highest number of those in which this check found nothing".to_owned()))
}

/// The directory beside the one that was moved that has the highest number, a manifest, and is good by a quick check. Where
/// the name has no number nothing beside it is another version of it.
fn newest_beside(way: &Way, monitor: &dyn Monitor) -> Option<(PathBuf, String)> {
    let (wanted, _) = pattern(way.name.as_bytes()).filter(|(_, numbers)| !numbers.is_empty())?;
    let mut beside = Vec::new();
    for name in way.above.names(None, Follow::Never).ok()? {
        let (Ok(path), Some((same, numbers))) = (RelPath::new(&name), pattern(&name)) else { continue };
        let manifest = path.join(".lockstep/manifest").ok();
        let published = manifest.is_some_and(|manifest| way.above.stat(&manifest, Follow::Never).is_ok());
        if same == wanted && published {
            beside.push((numbers, path));
        }
    }
    beside.sort();
    let count = crate::error::counted(beside.len() as u64, "directory", "directories");
    let options = Options { depth: Depth::Quick, ..Options::default() };
    let good = beside.into_iter().rev().find(|(_, path)| {
        let report = super::check(&way.place.join(path.as_path()), &options, monitor);
        report.is_ok_and(|report| report.outcome() == Outcome::Good)
    });
    let how = format!("the highest number that a quick check finds good, of {count} beside it with a manifest");
    good.map(|(_, path)| (way.place.join(path.as_path()), how))
}

/// The pointers and links beside it that name what was moved.
fn pointers(way: &Way) -> Vec<PathBuf> {
    let name = way.name.as_bytes();
    let number = pattern(name).and_then(|(_, numbers)| numbers.last().copied());
    let last = |text: &[u8]| text.rsplit(|&byte| byte == b'/').find(|part| !part.is_empty()).map(<[u8]>::to_vec);
    let names_it = |path: &RelPath, kind: FileKind| match kind {
        FileKind::Symlink => {
            way.above.read_link(path).is_ok_and(|target| last(&target).is_some_and(|last| last == name))
        }
        FileKind::Regular if POINTERS.contains(&path.name()) => {
            let mut text = Vec::new();
            let read = way.above.open_read(path, Follow::Never).ok();
            let read = read.and_then(|file| file.take(POINTER_MAX).read_to_end(&mut text).ok());
            let text = text.trim_ascii();
            let counted = || crate::layout::names::decimal(text).is_some_and(|text| Some(text) == number);
            read.is_some() && (last(text).is_some_and(|last| last == name) || counted())
        }
        _ => false,
    };
    let names = match way.above.names(None, Follow::Never) {
        Ok(names) => names,
        Err(error) if error.kind() == ErrorKind::NotFound => return Vec::new(),
        Err(_) => return Vec::new(),
    };
    let paths = names.iter().filter_map(|name| RelPath::new(name).ok());
    let named = paths.filter(|path| way.above.stat(path, Follow::Never).is_ok_and(|found| names_it(path, found.kind)));
    let mut named: Vec<PathBuf> = named.map(|path| way.place.join(path.as_path())).collect();
    named.sort();
    named
}
