//! The whole pipeline between two directories of this machine.

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::AtomicBool;

use lockstep::endpoint::local::{LocalSource, LocalTarget};
use lockstep::endpoint::{BeginOptions, Error, ScanOptions};
use lockstep::manifest::format;
use lockstep::monitor::{Counters, Event, Monitor, Silent};
use lockstep::plan::safety::DeleteLimit;
use lockstep::policy::{PolicySpec, RuleSpec};
use lockstep::sync::{Options, SyncReport, run};

fn options() -> Options {
    Options {
        scan: ScanOptions::default(),
        begin: BeginOptions { actor: "tester@here".into(), ..BeginOptions::default() },
        delete: false,
        max_delete: DeleteLimit::Unlimited,
        workers: 2,
        retries: 2,
        bandwidth: None,
    }
}

struct Pair {
    _outer: tempfile::TempDir,
    source: PathBuf,
    target: PathBuf,
    state: PathBuf,
}

impl Pair {
    fn new() -> Pair {
        let outer = tempfile::tempdir().unwrap();
        let at = |name: &str| outer.path().join(name);
        fs::create_dir(at("source")).unwrap();
        Pair { source: at("source"), target: at("target"), state: at("state"), _outer: outer }
    }

    fn write(&self, path: &str, data: &[u8]) {
        let path = self.source.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, data).unwrap();
    }

    fn push_with(&self, options: &Options, policy: PolicySpec) -> Result<SyncReport, Error> {
        let source = LocalSource::new(&self.source, Some(&self.state)).unwrap();
        let target = LocalTarget::new(&self.target, policy);
        run(&source, &target, options, &Silent::default(), &AtomicBool::new(false))
    }

    fn push(&self, options: &Options) -> SyncReport {
        self.push_with(options, PolicySpec::default()).unwrap()
    }

    /// rsync's opinion: what it would have to change, by content and metadata.
    fn differences(&self) -> String {
        let output = Command::new("rsync")
            .args(["-naHic", "--delete", "--exclude=/.lockstep"])
            .args([self.source.join(""), self.target.join("")])
            .output()
            .expect("rsync is not installed: Debian package rsync");
        assert!(output.status.success(), "{output:?}");
        // The root itself keeps its own mode and time.
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        text.lines().filter(|line| !line.ends_with(" ./")).collect()
    }
}

#[test]
fn h06_h09_h10_a_tree_of_everything_arrives_as_it_was_and_a_second_run_has_nothing_to_do() {
    let pair = Pair::new();
    pair.write("weights/model.safetensors", &vec![7; 3_000_000]);
    pair.write("weights/empty", b"");
    pair.write("deep/er/est/file", b"x");
    pair.write("script.sh", b"#!/bin/sh\n");
    fs::set_permissions(pair.source.join("script.sh"), fs::Permissions::from_mode(0o755)).unwrap();
    fs::create_dir(pair.source.join("hollow")).unwrap();
    symlink("weights/model.safetensors", pair.source.join("current")).unwrap();
    let dated = ["-h", "-d", "2001-02-03 04:05:06.789"];
    assert!(Command::new("touch").args(dated).arg(pair.source.join("current")).status().unwrap().success());
    fs::hard_link(pair.source.join("script.sh"), pair.source.join("weights/script-too.sh")).unwrap();
    for name in [&b"caf\xe9"[..], b"new\nline", b"-rf", b"$(touch x)", b"a;b"] {
        fs::write(pair.source.join(std::ffi::OsStr::from_bytes(name)), name).unwrap();
    }
    let sparse = fs::File::create(pair.source.join("sparse")).unwrap();
    sparse.set_len(64 << 20).unwrap();
    sparse.write_all_at(b"end", (64 << 20) - 3).unwrap();
    fs::set_permissions(pair.source.join("deep/er"), fs::Permissions::from_mode(0o555)).unwrap();

    let report = pair.push(&options());
    assert!(report.is_complete(), "{:?}", report.problems);
    assert_eq!(pair.differences(), "");
    let stored = fs::metadata(pair.target.join("sparse")).unwrap();
    assert!(stored.blocks() * 512 < 1 << 20, "the hole was filled");

    let again = pair.push(&options());
    assert_eq!(again.plan.actions, []);
    assert_eq!(again.committed.unwrap().generation, 1);
    let manifest = format::decode(&fs::read(pair.target.join(".lockstep/manifest")).unwrap()).unwrap();
    assert_eq!(manifest.generation, 1);
    assert!(manifest.tree.entries().iter().all(|entry| entry.file().is_none_or(|(_, digest)| digest.is_some())));
    assert!(!pair.target.join(".lockstep/staging/current").exists());
}

#[test]
fn changes_of_every_kind_are_followed_and_deleting_is_asked_for() {
    let pair = Pair::new();
    for path in ["same", "content", "grown", "gone", "dir/gone", "becomes-dir", "becomes-file/x", "mode"] {
        pair.write(path, path.as_bytes());
    }
    pair.push(&options());
    pair.write("content", b"CONTENT");
    pair.write("grown", b"grown by something");
    fs::remove_file(pair.source.join("gone")).unwrap();
    fs::remove_dir_all(pair.source.join("dir")).unwrap();
    fs::remove_file(pair.source.join("becomes-dir")).unwrap();
    pair.write("becomes-dir/inside", b"x");
    fs::remove_dir_all(pair.source.join("becomes-file")).unwrap();
    pair.write("becomes-file", b"y");
    fs::set_permissions(pair.source.join("mode"), fs::Permissions::from_mode(0o600)).unwrap();

    let dry = pair.push(&Options { begin: BeginOptions { dry_run: true, ..options().begin }, ..options() });
    assert!(dry.committed.is_none() && !dry.plan.actions.is_empty());
    assert_eq!(fs::read(pair.target.join("content")).unwrap(), b"content");

    let report = pair.push(&options());
    assert!(report.is_complete(), "{:?}", report.problems);
    assert!(pair.target.join("gone").exists() && pair.target.join("dir/gone").exists());
    pair.push(&Options { delete: true, ..options() });
    assert_eq!(pair.differences(), "");
}

#[test]
fn h38_an_emptied_source_and_an_exceeded_limit_delete_nothing() {
    let pair = Pair::new();
    pair.write("a", b"a");
    pair.write("b", b"b");
    pair.push(&options());
    fs::remove_file(pair.source.join("a")).unwrap();
    let limited = Options { delete: true, max_delete: DeleteLimit::Paths(0), ..options() };
    assert!(matches!(pair.push_with(&limited, PolicySpec::default()), Err(Error::Refused { .. })));
    fs::remove_file(pair.source.join("b")).unwrap();
    let all = Options { delete: true, ..options() };
    assert!(matches!(pair.push_with(&all, PolicySpec::default()), Err(Error::Refused { .. })));
    assert!(pair.target.join("a").exists() && pair.target.join("b").exists());
}

fn rule(pattern: &str, mode: &str) -> RuleSpec {
    RuleSpec { pattern: pattern.into(), mode: Some(mode.into()), ..RuleSpec::default() }
}

fn mode_of(path: &Path) -> u32 {
    fs::metadata(path).unwrap().mode() & 0o7777
}

#[test]
fn s07_s08_the_receivers_policy_decides_also_for_what_is_there_already() {
    let pair = Pair::new();
    pair.write("weights/model.safetensors", b"secret");
    pair.write("logs/run.log", b"log");
    pair.write("tool", b"x");
    fs::set_permissions(pair.source.join("tool"), fs::Permissions::from_mode(0o4755)).unwrap();
    pair.push(&options());
    assert_eq!(mode_of(&pair.target.join("tool")), 0o755, "special bits need a rule");
    let policy =
        PolicySpec { rules: vec![rule("**/*.safetensors", "600"), rule("logs/", "1774"), rule("logs/*.log", "640")] };
    let report = pair.push_with(&options(), policy.clone()).unwrap();
    assert!(report.is_complete(), "{:?}", report.problems);
    assert_eq!(mode_of(&pair.target.join("weights/model.safetensors")), 0o600);
    assert_eq!(mode_of(&pair.target.join("logs")), 0o1774);
    assert_eq!(mode_of(&pair.target.join("logs/run.log")), 0o640);
    assert_eq!(pair.push_with(&options(), policy).unwrap().plan.actions, []);
}

#[test]
fn h48_an_unknown_owner_is_refused_before_anything_changes() {
    let pair = Pair::new();
    pair.write("a", b"a");
    let unknown = RuleSpec { pattern: "**".into(), owner: Some("no-such-user".into()), ..RuleSpec::default() };
    let result = pair.push_with(&options(), PolicySpec { rules: vec![unknown] });
    assert!(matches!(&result, Err(Error::Refused { reason, .. }) if reason.contains("no-such-user")), "{result:?}");
    assert!(!pair.target.exists());
}

#[test]
fn h15_h16_h17_what_is_planted_at_the_target_is_replaced_and_never_followed() {
    let pair = Pair::new();
    for path in ["link", "linked-dir/f", "hard"] {
        pair.write(path, b"new");
    }
    let outside = pair.source.parent().unwrap().join("outside");
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("f"), "outside").unwrap();
    fs::set_permissions(&outside, fs::Permissions::from_mode(0o711)).unwrap();
    fs::create_dir(&pair.target).unwrap();
    symlink(outside.join("f"), pair.target.join("link")).unwrap();
    symlink(&outside, pair.target.join("linked-dir")).unwrap();
    fs::hard_link(outside.join("f"), pair.target.join("hard")).unwrap();
    let report = pair.push(&options());
    assert!(report.is_complete(), "{:?}", report.problems);
    assert_eq!(pair.differences(), "");
    assert_eq!(fs::read(outside.join("f")).unwrap(), b"outside");
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 1);
    assert_eq!(mode_of(&outside), 0o711);
}

/// Stops the run when so many bytes have passed, as a cut connection or Ctrl-C does.
struct StopAfter<'a> {
    counters: Counters,
    stop: &'a AtomicBool,
    phases: Mutex<Vec<String>>,
}

impl Monitor for StopAfter<'_> {
    fn event(&self, event: Event<'_>) {
        self.phases.lock().unwrap().push(format!("{event:?}"));
    }
    fn counters(&self) -> &Counters {
        if Counters::get(&self.counters.transferred_bytes) > 2_000_000 {
            self.stop.store(true, std::sync::atomic::Ordering::Relaxed);
        }
        &self.counters
    }
}

#[test]
fn s24_h34_an_interrupted_run_goes_on_where_it_stopped() {
    let pair = Pair::new();
    let data: Vec<u8> = (0..8_000_000u32).map(|at| (at * 31 % 253) as u8).collect();
    pair.write("big", &data);
    let stop = AtomicBool::new(false);
    let monitor = StopAfter { counters: Counters::default(), stop: &stop, phases: Mutex::default() };
    let source = LocalSource::new(&pair.source, None).unwrap();
    let target = LocalTarget::new(&pair.target, PolicySpec::default());
    assert!(run(&source, &target, &options(), &monitor, &stop).is_err());
    assert!(!pair.target.exists(), "nothing is visible before all of it is");

    let report = pair.push(&options());
    let resumed = report.plan.actions.iter().find_map(|action| match action.need {
        lockstep::plan::Need::Content { resume_at } => Some(resume_at),
        _ => None,
    });
    assert!(resumed.unwrap() >= 1_000_000, "{resumed:?}");
    assert_eq!(fs::read(pair.target.join("big")).unwrap(), data);
    assert_eq!(pair.differences(), "");
}

#[test]
fn h35_a_second_run_on_the_same_root_is_told_who_has_it() {
    use lockstep::endpoint::Target;
    let pair = Pair::new();
    pair.write("a", b"a");
    pair.push(&options());
    let first = LocalTarget::new(&pair.target, PolicySpec::default());
    first.begin(&options().begin, &Silent::default()).unwrap();
    let result = pair.push_with(&options(), PolicySpec::default());
    assert!(matches!(&result, Err(Error::Locked { holder, .. }) if holder.contains("tester@here")), "{result:?}");
    first.abort();
    pair.push(&options());
}

#[test]
fn s13_what_was_published_is_in_the_audit_log() {
    let pair = Pair::new();
    pair.write("a", b"content");
    pair.push(&options());
    let log = fs::read_to_string(pair.target.join(".lockstep/audit.jsonl")).unwrap();
    assert!(
        log.contains("tester@here") && log.contains("ed7002b439e9ac845f22357d822bac1444730fbdb6016d3ec9432297b9ec9f73")
    );
    lockstep::audit::verify(&lockstep::root::Root::open(&pair.target).unwrap()).unwrap();
}

/// Runs the program as somebody who is not root, for whom modes count.
fn as_nobody(at: &Path, arguments: &[&str]) -> std::process::Output {
    use std::os::unix::process::CommandExt;
    const NOBODY: u32 = 65534;
    let program = at.join("program");
    if !program.exists() {
        fs::copy(env!("CARGO_BIN_EXE_lockstep"), &program).unwrap();
    }
    let mut command = Command::new(program);
    command.args(arguments).current_dir(at).env("HOME", at);
    if rustix::process::geteuid().is_root() {
        let owned = Command::new("chown").args(["-R", "65534:65534"]).arg(at).status().unwrap();
        assert!(owned.success());
        command.uid(NOBODY).gid(NOBODY);
    }
    command.output().unwrap()
}

#[test]
fn a_directory_that_may_not_be_written_to_is_published_into_all_the_same() {
    let pair = Pair::new();
    pair.write("sealed/weights", b"1");
    pair.write("sealed/_SUCCESS", b"");
    let sealed =
        |root: &Path, mode| fs::set_permissions(root.join("sealed"), fs::Permissions::from_mode(mode)).unwrap();
    let mode = |root: &Path| fs::metadata(root.join("sealed")).unwrap().mode() & 0o7777;
    sealed(&pair.source, 0o555);
    let at = pair.source.parent().unwrap();
    let push = || {
        let output = as_nobody(at, &["push", "--delete", "source", "target"]);
        let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{said}");
        assert_eq!((pair.differences().as_str(), mode(&pair.target)), ("", 0o555), "{said}");
    };
    push();
    sealed(&pair.source, 0o755);
    pair.write("sealed/more", b"2");
    fs::remove_file(pair.source.join("sealed/weights")).unwrap();
    sealed(&pair.source, 0o555);
    push();
}

fn with(change: impl FnOnce(&mut BeginOptions)) -> Options {
    let mut options = options();
    change(&mut options.begin);
    options
}

fn run_command(program: &str, arguments: &[&str], paths: &[&Path]) {
    let status = Command::new(program).args(arguments).args(paths).status();
    assert!(status.unwrap_or_else(|error| panic!("{program}: {error}")).success(), "{program} {arguments:?}");
}

impl Pair {
    /// A push without a cache of the source's digests, and how many content bytes were sent.
    fn push_counted(&self, options: &Options) -> (SyncReport, u64) {
        let source = LocalSource::new(&self.source, None).unwrap();
        let target = LocalTarget::new(&self.target, PolicySpec::default());
        let monitor = Silent::default();
        let report = run(&source, &target, options, &monitor, &AtomicBool::new(false)).unwrap();
        (report, Counters::get(&monitor.counters().transferred_bytes))
    }

    fn listed(&self, path: &str) -> Option<String> {
        let manifest = format::decode(&fs::read(self.target.join(".lockstep/manifest")).unwrap()).unwrap();
        let entry = manifest.tree.get(&lockstep::path::RelPath::new(path).unwrap())?.file()?.1;
        Some(entry.unwrap().to_string())
    }
}

/// Writes other bytes of the same length and puts the times back, as a careful vandal or a failing disk does.
fn damage(path: &Path) {
    let before = fs::metadata(path).unwrap();
    let mut data = fs::read(path).unwrap();
    data[0] ^= 1;
    fs::write(path, data).unwrap();
    let file = fs::File::options().write(true).open(path).unwrap();
    file.set_times(fs::FileTimes::new().set_modified(before.modified().unwrap())).unwrap();
    assert_eq!(fs::metadata(path).unwrap().mtime_nsec(), before.mtime_nsec());
}

#[test]
fn a_tree_that_was_filled_by_other_means_is_adopted_and_not_sent_again() {
    for copy in ["-a", "-r"] {
        let pair = Pair::new();
        pair.write("large", &vec![3; 2_000_000]);
        pair.write("d/small", b"small");
        pair.write("d/damaged", b"good data");
        run_command("cp", &[copy], &[&pair.source, &pair.target]);
        fs::write(pair.target.join("more"), "of the target").unwrap();
        if copy == "-a" {
            damage(&pair.target.join("d/damaged"));
        } else {
            fs::write(pair.target.join("d/damaged"), "bad data!").unwrap();
        }
        let (report, sent) = pair.push_counted(&options());
        assert!(report.is_complete(), "{:?}", report.problems);
        assert_eq!(sent, 9, "cp {copy}: only what differs is sent");
        assert_eq!(fs::read(pair.target.join("d/damaged")).unwrap(), b"good data", "cp {copy}");
        for path in ["large", "d/small", "d/damaged"] {
            assert!(pair.listed(path).is_some(), "cp {copy}: {path}");
        }
        assert_eq!(pair.listed("more"), None);
        fs::remove_file(pair.target.join("more")).unwrap();
        assert_eq!(pair.differences(), "");
        let again = pair.push_counted(&options());
        assert_eq!((again.0.plan.actions, again.1), (vec![], 0));
    }
}

#[test]
fn an_edit_at_the_target_that_put_its_time_back_is_noticed_and_mended() {
    let pair = Pair::new();
    for path in ["a", "b", "c"] {
        pair.write(path, &[b'x'; 1000]);
        // Of another day: the table believes no file whose times are those of this moment.
        let file = fs::File::options().write(true).open(pair.source.join(path)).unwrap();
        file.set_modified(std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000_000)).unwrap();
    }
    pair.push_counted(&options());
    let table = fs::read(pair.target.join(".lockstep/digests")).unwrap();
    assert_eq!(table.len(), 19 + 3 * 80 + 32, "three files are known");
    damage(&pair.target.join("b"));
    let (report, sent) = pair.push_counted(&options());
    assert_eq!((report.plan.actions.len(), sent), (1, 1000), "{:?}", report.plan.actions);
    assert_eq!(pair.differences(), "");
    // Without the table of digests everything is hashed again, and nothing is sent.
    fs::remove_file(pair.target.join(".lockstep/digests")).unwrap();
    let (report, sent) = pair.push_counted(&options());
    assert_eq!((report.plan.actions, sent), (vec![], 0));
    assert!(pair.target.join(".lockstep/digests").exists());
}

#[test]
fn checksum_hashes_at_the_target_whatever_was_known_of_it() {
    let pair = Pair::new();
    pair.write("a", &[b'x'; 1000]);
    pair.push_counted(&options());
    let table = fs::read(pair.target.join(".lockstep/digests")).unwrap();
    let checksum = with(|begin| begin.checksum = true);
    let (report, sent) = pair.push_counted(&checksum);
    assert_eq!((report.committed.unwrap().generation, sent), (1, 0));
    damage(&pair.target.join("a"));
    // The table claims to know the damaged file: --checksum does not ask it.
    fs::write(pair.target.join(".lockstep/digests"), table).unwrap();
    assert_eq!(pair.push_counted(&checksum).1, 1000);
    assert_eq!(pair.differences(), "");
}

#[test]
fn a_unit_is_exchanged_whole_and_keeps_what_nobody_lists() {
    use std::os::unix::fs::FileTypeExt as _;
    let pair = Pair::new();
    for path in ["ckpt-1/weights", "ckpt-1/same", "ckpt-1/d/mode", "ckpt-1/_SUCCESS", "other"] {
        pair.write(path, path.as_bytes());
    }
    fs::hard_link(pair.source.join("ckpt-1/same"), pair.source.join("ckpt-1/z-link")).unwrap();
    let units = with(|begin| {
        begin.units = vec!["ckpt-*/".into()];
        begin.filter.rules = vec!["*.log".into()];
    });
    assert!(pair.push(&units).is_complete());
    let inode = |path: &str| fs::symlink_metadata(pair.target.join(path)).unwrap().ino();
    let (unit, same, mode) = (inode("ckpt-1"), inode("ckpt-1/same"), inode("ckpt-1/d/mode"));
    let old = fs::File::open(pair.target.join("ckpt-1/weights")).unwrap();
    fs::write(pair.target.join("ckpt-1/d/train.log"), "excluded").unwrap();
    run_command("mkfifo", &[], &[&pair.target.join("ckpt-1/pipe")]);
    pair.write("ckpt-1/weights", b"new weights");
    fs::set_permissions(pair.source.join("ckpt-1/d/mode"), fs::Permissions::from_mode(0o600)).unwrap();
    fs::set_permissions(pair.source.join("ckpt-1"), fs::Permissions::from_mode(0o750)).unwrap();
    let report = pair.push(&units);
    assert!(report.is_complete(), "{:?}", report.problems);
    assert_ne!(inode("ckpt-1"), unit, "the directory was not exchanged");
    assert_eq!(inode("ckpt-1/same"), same, "what stays is not copied");
    assert_eq!(inode("ckpt-1/z-link"), same);
    assert_ne!(inode("ckpt-1/d/mode"), mode, "the old unit would have got the new mode");
    assert_eq!(mode_of(&pair.target.join("ckpt-1/d/mode")), 0o600);
    assert_eq!(mode_of(&pair.target.join("ckpt-1")), 0o750);
    assert_eq!(fs::read(pair.target.join("ckpt-1/d/train.log")).unwrap(), b"excluded");
    assert!(fs::symlink_metadata(pair.target.join("ckpt-1/pipe")).unwrap().file_type().is_fifo());
    let mut text = String::new();
    std::io::Read::read_to_string(&mut &old, &mut text).unwrap();
    assert_eq!(text, "ckpt-1/weights", "who had the old version open reads on in it");
    fs::remove_file(pair.target.join("ckpt-1/d/train.log")).unwrap();
    fs::remove_file(pair.target.join("ckpt-1/pipe")).unwrap();
    // Removing them moved the times of their directories.
    pair.push(&units);
    assert_eq!(pair.differences(), "");
    assert_eq!(pair.push(&units).plan.actions, []);
    // What is removed goes with the exchange, too.
    fs::remove_dir_all(pair.source.join("ckpt-1/d")).unwrap();
    assert!(pair.push(&Options { delete: true, ..units }).is_complete());
    assert_eq!(pair.differences(), "");
}

/// Another size than was scanned: the file fails, as one does that is written to while it is read.
struct Spoil<'a>(&'a Path, Counters);

impl Monitor for Spoil<'_> {
    fn event(&self, event: Event<'_>) {
        if matches!(event, Event::Phase(lockstep::monitor::Phase::Transferring)) {
            fs::write(self.0, "longer than it was").unwrap();
        }
    }
    fn counters(&self) -> &Counters {
        &self.1
    }
}

#[test]
fn h36_a_unit_with_a_file_that_failed_is_held_back_and_so_is_every_marker() {
    let pair = Pair::new();
    for path in ["ckpt-1/weights", "ckpt-1/config", "latest", "ckpt-2/weights", "readme"] {
        pair.write(path, b"old");
    }
    let units = with(|begin| begin.units = vec!["ckpt-*/".into()]);
    pair.push(&units);
    for path in ["ckpt-1/weights", "ckpt-1/config", "ckpt-1/_SUCCESS", "latest", "ckpt-2/weights", "readme", "ckpt-3/w"]
    {
        pair.write(path, b"new!");
    }
    let source = LocalSource::new(&pair.source, None).unwrap();
    let target = LocalTarget::new(&pair.target, PolicySpec::default());
    let spoil = pair.source.join("ckpt-1/weights");
    let monitor = Spoil(&spoil, Counters::default());
    let report = run(&source, &target, &units, &monitor, &AtomicBool::new(false)).unwrap();
    assert!(!report.is_complete());
    let read = |path: &str| fs::read_to_string(pair.target.join(path)).unwrap_or_default();
    assert_eq!([read("ckpt-1/weights"), read("ckpt-1/config"), read("ckpt-1/_SUCCESS")], ["old", "old", ""]);
    assert_eq!(
        [read("latest"), read("ckpt-2/weights"), read("readme"), read("ckpt-3/w")],
        ["old", "new!", "new!", "new!"]
    );
    let told: Vec<_> =
        report.problems.iter().filter_map(|problem| problem.path.as_ref()).map(|path| path.to_string()).collect();
    for path in ["ckpt-1", "ckpt-1/weights", "latest"] {
        assert!(told.iter().any(|told| told == path), "{path}: {told:?}");
    }
    let held = pair.listed("ckpt-1/config").unwrap();
    assert_ne!(held, pair.listed("ckpt-2/weights").unwrap(), "the manifest lists what is not there");
    assert!(pair.push(&units).is_complete());
    assert_eq!(pair.differences(), "");
}

struct Told(Mutex<Vec<String>>, Counters);

impl Monitor for Told {
    fn event(&self, event: Event<'_>) {
        if let Event::Warning(text) = event {
            self.0.lock().unwrap().push(text.to_owned());
        }
    }
    fn counters(&self) -> &Counters {
        &self.1
    }
}

#[test]
fn h39_a_clock_that_was_put_back_loses_nothing_and_is_told() {
    let pair = Pair::new();
    pair.write("a", b"1");
    pair.push(&options());
    // As if the last run had been a day ahead of this one.
    let file = pair.target.join(".lockstep/manifest");
    let mut manifest = format::decode(&fs::read(&file).unwrap()).unwrap();
    manifest.created.seconds += 86_400;
    fs::write(&file, format::encode(&manifest)).unwrap();
    let far = std::time::SystemTime::now() + std::time::Duration::from_secs(86_400);
    fs::File::options().write(true).open(pair.target.join("a")).unwrap().set_modified(far).unwrap();
    pair.write("a", b"2");
    let source = LocalSource::new(&pair.source, None).unwrap();
    let target = LocalTarget::new(&pair.target, PolicySpec::default());
    let monitor = Told(Mutex::default(), Counters::default());
    let report = run(&source, &target, &options(), &monitor, &AtomicBool::new(false)).unwrap();
    assert_eq!(report.committed.unwrap().generation, 2);
    assert!(monitor.0.lock().unwrap().iter().any(|text| text.contains("is the clock of this machine right")));
    assert_eq!(pair.differences(), "");
}

#[test]
fn h38_a_source_that_is_gone_is_an_error_and_the_target_stays() {
    let pair = Pair::new();
    pair.write("a", b"1");
    pair.push(&options());
    fs::rename(&pair.source, pair.source.with_file_name("moved")).unwrap();
    let pushed = Command::new(env!("CARGO_BIN_EXE_lockstep"))
        .args(["push", "--delete"])
        .args([&pair.source, &pair.target])
        .env("XDG_STATE_HOME", &pair.state)
        .output()
        .unwrap();
    assert_eq!(pushed.status.code(), Some(5), "{pushed:?}");
    assert!(pair.target.join("a").exists());
}

#[test]
fn a_step_that_fails_leaves_the_manifest_true() {
    let pair = Pair::new();
    pair.write("a/b", b"1");
    pair.write("c", b"1");
    pair.push(&options());
    pair.write("c", b"22");
    pair.write("a/b", b"22");
    let source = LocalSource::new(&pair.source, None).unwrap();
    let target = LocalTarget::new(&pair.target, PolicySpec::default());
    /// A directory gets the name of a file between its comparison and its publication.
    struct InTheWay<'a>(&'a Path, Counters);
    impl Monitor for InTheWay<'_> {
        fn event(&self, event: Event<'_>) {
            if matches!(event, Event::Phase(lockstep::monitor::Phase::Publishing)) {
                fs::remove_file(self.0).unwrap();
                fs::create_dir_all(self.0.join("full")).unwrap();
            }
        }
        fn counters(&self) -> &Counters {
            &self.1
        }
    }
    let blocked = pair.target.join("c");
    let monitor = InTheWay(&blocked, Counters::default());
    let report = run(&source, &target, &options(), &monitor, &AtomicBool::new(false)).unwrap();
    let problems: Vec<_> = report.problems.iter().map(|problem| problem.path.clone().unwrap().to_string()).collect();
    assert_eq!(problems, ["c"]);
    assert_eq!(fs::read(pair.target.join("a/b")).unwrap(), b"22");
    let of = |data: &[u8]| -> String {
        use sha2::Digest as _;
        sha2::Sha256::digest(data).iter().map(|byte| format!("{byte:02x}")).collect()
    };
    assert_eq!(pair.listed("a/b"), Some(of(b"22")));
    assert_ne!(pair.listed("c"), Some(of(b"22")), "the manifest lists what was not published");
    assert!(pair.push(&options()).is_complete());
    assert_eq!(pair.differences(), "");
}
