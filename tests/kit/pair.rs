//! Two directories of this machine, and the pipeline between them.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::AtomicBool;

use lockstep::endpoint::local::{LocalSource, LocalTarget};
use lockstep::endpoint::{BeginOptions, Error, ScanOptions};
use lockstep::manifest::format;
use lockstep::monitor::{Counters, Monitor, Silent};
use lockstep::plan::safety::DeleteLimit;
use lockstep::policy::{PolicySpec, RuleSpec};
use lockstep::sync::{Options, SyncReport, run};

pub(crate) fn options() -> Options {
    Options {
        scan: ScanOptions::default(),
        begin: BeginOptions { actor: "tester@here".into(), ..BeginOptions::default() },
        delete: false,
        retain: None,
        max_delete: DeleteLimit::Unlimited,
        workers: 2,
        retries: 2,
        bandwidth: lockstep::sync::Rate::default(),
    }
}

/// A source and a target.
pub(crate) struct Pair {
    _outer: tempfile::TempDir,
    pub(crate) source: PathBuf,
    pub(crate) target: PathBuf,
    pub(crate) state: PathBuf,
}

impl Pair {
    pub(crate) fn new() -> Pair {
        let outer = tempfile::tempdir().unwrap();
        let at = |name: &str| outer.path().join(name);
        fs::create_dir(at("source")).unwrap();
        Pair { source: at("source"), target: at("target"), state: at("state"), _outer: outer }
    }

    pub(crate) fn write(&self, path: &str, data: &[u8]) {
        let path = self.source.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, data).unwrap();
    }

    pub(crate) fn push_with(&self, options: &Options, policy: PolicySpec) -> Result<SyncReport, Error> {
        let source = LocalSource::new(&self.source, Some(&self.state)).unwrap();
        let target = LocalTarget::new(&self.target, policy);
        run(&source, &target, options, &Silent::default(), &AtomicBool::new(false))
    }

    pub(crate) fn push(&self, options: &Options) -> SyncReport {
        self.push_with(options, PolicySpec::default()).unwrap()
    }

    /// rsync's opinion: what it would have to change, by content and metadata.
    pub(crate) fn differences(&self) -> String {
        super::differences(&self.source, &self.target, &[]).concat()
    }
}

pub(crate) fn rule(pattern: &str, mode: &str) -> RuleSpec {
    RuleSpec { pattern: pattern.into(), mode: Some(mode.into()), ..RuleSpec::default() }
}

pub(crate) fn mode_of(path: &Path) -> u32 {
    fs::metadata(path).unwrap().mode() & 0o7777
}

pub(crate) fn with(change: impl FnOnce(&mut BeginOptions)) -> Options {
    let mut options = options();
    change(&mut options.begin);
    options
}

pub(crate) fn run_command(program: &str, arguments: &[&str], paths: &[&Path]) {
    let status = Command::new(program).args(arguments).args(paths).status();
    assert!(status.unwrap_or_else(|error| panic!("{program}: {error}")).success(), "{program} {arguments:?}");
}

impl Pair {
    /// A push without a cache of the source's digests, and how many content bytes were sent.
    pub(crate) fn push_counted(&self, options: &Options) -> (SyncReport, u64) {
        let source = LocalSource::new(&self.source, None).unwrap();
        let target = LocalTarget::new(&self.target, PolicySpec::default());
        let monitor = Silent::default();
        let report = run(&source, &target, options, &monitor, &AtomicBool::new(false)).unwrap();
        (report, Counters::get(&monitor.counters().transferred_bytes))
    }

    pub(crate) fn listed(&self, path: &str) -> Option<String> {
        let manifest = format::decode(&fs::read(self.target.join(".lockstep/manifest")).unwrap()).unwrap();
        let entry = manifest.tree.get(&lockstep::path::RelPath::new(path).unwrap())?.file()?.1;
        Some(entry.unwrap().to_string())
    }
}

/// Writes other bytes of the same length and puts the times back, as a careful vandal or a failing disk does.
pub(crate) fn damage(path: &Path) {
    let before = fs::metadata(path).unwrap();
    let mut data = fs::read(path).unwrap();
    data[0] ^= 1;
    fs::write(path, data).unwrap();
    let file = fs::File::options().write(true).open(path).unwrap();
    file.set_times(fs::FileTimes::new().set_modified(before.modified().unwrap())).unwrap();
    assert_eq!(fs::metadata(path).unwrap().mtime_nsec(), before.mtime_nsec());
}
