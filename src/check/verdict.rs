//! What a check came to, kept for whoever has no time to check: `.lockstep/verdict.json`, or a file that was named.
//!
//! The one of before is removed when a check begins: a check that is killed leaves none, and none never reads as good. It is
//! signed by nobody; it is as good as the directory that it lies in.

use std::collections::BTreeMap;
use std::io::{ErrorKind, Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::RenameFlags;
use serde::{Deserialize, Serialize};

use super::{ListId, Options, Outcome, Report, now};
use crate::error::{Escaped, chain, shown};
use crate::layout::Wanted;
use crate::manifest::Timestamp;
use crate::path::RelPath;
use crate::root::{Follow, Root, RootError};
use crate::staging::as_manifest;

const VERDICT: &str = ".lockstep/verdict.json";
const FORMAT: &str = "lockstep-verdict 1";
/// More is no verdict.
const BYTES_MAX: u64 = 4 << 20;

/// A verdict, as it is stored and as `--json` shows it. Times are seconds since 1970.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Verdict {
    pub format: String,
    /// `good`, `unfinished` or `bad`.
    pub result: String,
    /// The directory, for people.
    pub root: String,
    /// Its inode number: a copy of the directory is another one.
    pub inode: u64,
    /// When the check began.
    pub time: u64,
    pub depth: String,
    pub who: String,
    pub manifest_sha256: Option<String>,
    /// The manifest's time of change: a copy has another.
    pub manifest_changed: Option<String>,
    pub generation: Option<u64>,
    pub files: u64,
    pub bytes: u64,
    pub hashed_files: u64,
    pub hashed_bytes: u64,
    /// Large files of which some blocks were read, and so many bytes of them.
    #[serde(default)]
    pub sampled_files: u64,
    #[serde(default)]
    pub sampled_bytes: u64,
    pub vouched_files: u64,
    pub vouched_bytes: u64,
    pub unread_files: u64,
    pub unread_bytes: u64,
    pub undated_files: u64,
    pub oldest_hash: Option<u64>,
    /// How many of each kind.
    pub findings: BTreeMap<String, u64>,
    pub notes: Vec<String>,
    /// Checkpoints that were recognised, by layout and path.
    #[serde(default)]
    pub layouts: Vec<String>,
    /// Who can read all of it.
    pub reader: Option<String>,
    pub allow_unlisted: bool,
    pub ignore_permissions: bool,
    pub exclude: Vec<String>,
    /// Whose rules were asked for, and the marker that each checkpoint was to hold.
    #[serde(default)]
    pub layout: Option<String>,
    #[serde(default)]
    pub marker: Option<String>,
}

/// Why a verdict does not stand for a check.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Refused(pub String);

/// A place for verdicts that cannot be used.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum SlotError {
    #[error("'{}' is there and is no verdict of lockstep; name another file with --verdict", shown(.0))]
    Foreign(PathBuf),
    #[error("the verdict '{}' cannot be {operation}", shown(file))]
    Io { file: PathBuf, operation: &'static str, source: std::io::Error },
    #[error(transparent)]
    Root(#[from] RootError),
}

impl Verdict {
    /// Of a report.
    pub fn new(root: &Path, inode: u64, time: u64, options: &Options, who: String, report: &Report) -> Verdict {
        let whole = root.canonicalize().unwrap_or_else(|_| root.to_owned());
        let findings = report.counts().into_iter().map(|(kind, count)| (kind.name().to_owned(), count)).collect();
        Verdict {
            format: FORMAT.to_owned(),
            result: report.outcome().name().to_owned(),
            root: shown(&whole).to_string(),
            inode,
            time,
            depth: if report.layout_alone { "layout".to_owned() } else { options.depth.to_string() },
            who,
            manifest_sha256: report.list.map(|digest| digest.to_string()),
            manifest_changed: report.list_changed.map(text),
            generation: report.generation,
            files: report.all.files,
            bytes: report.all.bytes,
            hashed_files: report.hashed.files,
            hashed_bytes: report.hashed.bytes,
            sampled_files: report.sampled.files,
            sampled_bytes: report.sampled.bytes,
            vouched_files: report.vouched.files,
            vouched_bytes: report.vouched.bytes,
            unread_files: report.unread.files,
            unread_bytes: report.unread.bytes,
            undated_files: report.undated_files,
            oldest_hash: report.oldest,
            findings,
            notes: report.notes.clone(),
            layouts: report.layouts.clone(),
            reader: options.subject.as_ref().map(|subject| subject.shown.clone()),
            allow_unlisted: options.allow_unlisted,
            ignore_permissions: options.ignore_permissions,
            exclude: options.exclude.clone(),
            layout: options.layout.map(|wanted| wanted.name().to_owned()),
            marker: options.marker.as_deref().map(|marker| Escaped(marker).to_string()),
        }
    }

    /// Whether it stands for a check of the directory with this inode and list, as `options` ask for it.
    ///
    /// # Errors
    /// [`Refused`] with the first reason.
    pub fn accept(&self, inode: u64, list: &ListId, max_age: Duration, options: &Options) -> Result<(), Refused> {
        let refused = |reason: String| Err(Refused(reason));
        if self.result != Outcome::Good.name() || !self.findings.is_empty() {
            return refused("it says that the data is not good".to_owned());
        }
        if self.manifest_sha256 != Some(list.digest.to_string()) {
            return refused("it is of another manifest: something was published since".to_owned());
        }
        if self.inode != inode || self.manifest_changed != Some(text(list.changed)) {
            return refused(
                "it is of another directory, or the manifest was written anew; it may have been copied with them"
                    .to_owned(),
            );
        }
        match now().checked_sub(self.time) {
            None => return refused("it is from the future: a clock is wrong".to_owned()),
            Some(age) if age > max_age.as_secs() => return refused(format!("it is {age} seconds old")),
            Some(_) => {}
        }
        if self.allow_unlisted && !options.allow_unlisted {
            return refused("it allowed unlisted files".to_owned());
        }
        if self.ignore_permissions && !options.ignore_permissions {
            return refused("it ignored permissions".to_owned());
        }
        if self.exclude != options.exclude {
            return refused("it left out other paths".to_owned());
        }
        let layout = options.layout.map(Wanted::name);
        let waived = self.layout.as_deref() == Some(Wanted::Nothing.name()) && options.layout != Some(Wanted::Nothing);
        if waived || layout.is_some_and(|layout| self.layout.as_deref() != Some(layout)) {
            return refused("it was asked for the rules of another layout".to_owned());
        }
        if let Some(marker) = options.marker.as_deref().map(|marker| Escaped(marker).to_string())
            && self.marker.as_ref() != Some(&marker)
        {
            return refused(format!("it does not say whether each checkpoint has '{marker}'"));
        }
        match &options.subject {
            Some(subject) if self.reader.as_ref() != Some(&subject.shown) => {
                refused("it does not say whether that user can read everything".to_owned())
            }
            _ => Ok(()),
        }
    }
}

/// Where a verdict is kept.
#[derive(Debug)]
pub enum Slot<'a> {
    /// Within the state directory of the root.
    Root(&'a Root),
    /// A file.
    File(&'a Path),
}

impl Slot<'_> {
    /// Where it is, for people.
    pub fn shown(&self) -> PathBuf {
        match self {
            Slot::Root(root) => root.shown().join(VERDICT),
            Slot::File(file) => (*file).to_owned(),
        }
    }

    /// Reads the verdict that is there; `None` where there is none.
    ///
    /// # Errors
    /// [`SlotError`] when what is there cannot be read, or is no verdict.
    pub fn load(&self) -> Result<Option<Verdict>, SlotError> {
        let file = match self {
            Slot::Root(root) => match root.open_read(&verdict_path(VERDICT, root)?, Follow::Never) {
                Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
                other => other?,
            },
            Slot::File(path) => {
                let nonblocking = rustix::fs::OFlags::NONBLOCK.bits() as i32;
                let open = std::fs::File::options().read(true).custom_flags(nonblocking).open(path);
                match open {
                    Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
                    other => other.map_err(|source| self.failed("opened", source))?,
                }
            }
        };
        if !file.metadata().map_err(|source| self.failed("looked at", source))?.is_file() {
            return Err(SlotError::Foreign(self.shown()));
        }
        let mut text = Vec::new();
        file.take(BYTES_MAX).read_to_end(&mut text).map_err(|source| self.failed("read", source))?;
        // So a crash leaves one whose content was not on the disk yet.
        if text.is_empty() {
            return Ok(None);
        }
        match serde_json::from_slice::<Verdict>(&text) {
            Ok(verdict) if verdict.format == FORMAT => Ok(Some(verdict)),
            _ => Err(SlotError::Foreign(self.shown())),
        }
    }

    /// Removes the verdict of before. Answers why it is still there, where it could not be removed.
    ///
    /// # Errors
    /// [`SlotError::Foreign`] when a file that was named is something else.
    pub fn clear(&self) -> Result<Option<String>, SlotError> {
        let removed = match self {
            // Whatever has this name is a verdict; it goes at once, before anything that may take long.
            Slot::Root(root) => verdict_path(VERDICT, root).and_then(|path| root.unlink(&path)),
            Slot::File(file) => match self.load() {
                Ok(None) => return Ok(None),
                Err(error @ SlotError::Foreign(_)) => return Err(error),
                _ => {
                    let path = (*file).to_owned();
                    std::fs::remove_file(file).map_err(|source| RootError { operation: "remove", path, source })
                }
            },
        };
        match removed {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            // A read-only file system answers so for what is not there, too.
            Err(_) if !self.exists() => Ok(None),
            other => Ok(other.err().map(|error| chain(&error))),
        }
    }

    fn exists(&self) -> bool {
        match self {
            Slot::Root(root) => verdict_path(VERDICT, root).is_ok_and(|path| root.stat(&path, Follow::Never).is_ok()),
            Slot::File(file) => std::fs::symlink_metadata(file).is_ok(),
        }
    }

    /// Stores a verdict, whole or not at all. One of a check that began later and found something bad stays where this one is good: it is
    /// not better known.
    ///
    /// # Errors
    /// [`SlotError`] when it cannot be written.
    pub fn store(&self, verdict: &Verdict) -> Result<(), SlotError> {
        let good = Outcome::Good.name();
        let later = self.load().ok().flatten().filter(|there| there.time >= verdict.time && there.result != good);
        if later.is_some() && verdict.result == good {
            return Ok(());
        }
        let mut json = serde_json::to_vec_pretty(verdict).map_err(|error| self.failed("written", error.into()))?;
        json.push(b'\n');
        match self {
            Slot::Root(root) => {
                let new = format!("{VERDICT}.{}.new", std::process::id());
                let (name, new) = (verdict_path(VERDICT, root)?, verdict_path(&new, root)?);
                root.remove_tree(&new)?;
                // It names paths: for those who may read the manifest.
                let mut file = root.create_new(&new, 0o600)?;
                as_manifest(root, &file);
                let written = file.write_all(&json).and_then(|()| file.sync_data());
                written.map_err(|source| self.failed("written", source))?;
                Ok(root.rename(&new, &name, RenameFlags::empty())?)
            }
            Slot::File(file) => {
                let mut new = file.as_os_str().to_owned();
                new.push(format!(".{}.new", std::process::id()));
                let new = PathBuf::from(new);
                let written = std::fs::File::create_new(&new)
                    .and_then(|mut open| open.write_all(&json).and_then(|()| open.sync_data()))
                    .and_then(|()| std::fs::rename(&new, file));
                if written.is_err() {
                    // Best effort: the error that is told is the one that matters.
                    let _ = std::fs::remove_file(&new);
                }
                written.map_err(|source| self.failed("written", source))
            }
        }
    }

    fn failed(&self, operation: &'static str, source: std::io::Error) -> SlotError {
        SlotError::Io { file: self.shown(), operation, source }
    }
}

fn text(Timestamp { seconds, nanoseconds }: Timestamp) -> String {
    format!("{seconds}.{nanoseconds:09}")
}

fn verdict_path(name: &str, root: &Root) -> Result<RelPath, RootError> {
    let invalid = |error| RootError {
        operation: "name",
        path: root.shown().join(name),
        source: std::io::Error::new(ErrorKind::InvalidInput, error),
    };
    RelPath::new(name).map_err(invalid)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_good_verdict_does_not_replace_a_bad_one_of_a_check_that_began_later() {
        let at = tempfile::tempdir().unwrap();
        std::fs::create_dir(at.path().join(".lockstep")).unwrap();
        let root = Root::open(at.path()).unwrap();
        let (report, options) = (Report::default(), Options::default());
        let of = |time, result: Outcome| {
            let verdict = Verdict::new(at.path(), 1, time, &options, "who".to_owned(), &report);
            Verdict { result: result.name().to_owned(), ..verdict }
        };
        let file = at.path().join("verdict");
        for slot in [Slot::Root(&root), Slot::File(&file)] {
            let there = || slot.load().unwrap().map(|found| (found.time, found.result));
            for (time, result, expected) in [
                (5, Outcome::Good, (5, "good")),
                (7, Outcome::Bad, (7, "bad")),
                (6, Outcome::Good, (7, "bad")),
                (6, Outcome::Unfinished, (6, "unfinished")),
                (7, Outcome::Good, (7, "good")),
                (6, Outcome::Good, (6, "good")),
            ] {
                slot.store(&of(time, result)).unwrap();
                assert_eq!(there(), Some((expected.0, expected.1.to_owned())), "{time} {result:?}");
            }
        }
    }
}
