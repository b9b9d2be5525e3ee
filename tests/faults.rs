//! Killed, full, read-only, failing: a target through what can happen to a machine, made to happen with strace.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read as _;
use std::os::unix::fs::{MetadataExt as _, symlink};
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use lockstep::codec::CompressOptions;
use lockstep::endpoint::agent::{AgentTarget, Lanes};
use lockstep::endpoint::client::{Client, ClientOptions};
use lockstep::endpoint::link::{Link, LinkError};
use lockstep::endpoint::local::LocalSource;
use lockstep::endpoint::{BeginOptions, Error, ScanOptions};
use lockstep::monitor::{Counters, Monitor as _, Silent};
use lockstep::plan::safety::DeleteLimit;
use lockstep::sync::{Options, SyncReport, run};

/// System calls after or before which a target may be left.
const STEPS: [&str; 14] = [
    "mkdirat",
    "openat2",
    "pwrite64",
    "write",
    "ftruncate",
    "fchmod",
    "utimensat",
    "fsync",
    "fdatasync",
    "syncfs",
    "linkat",
    "renameat",
    "renameat2",
    "unlinkat",
];

fn lockstep() -> &'static str {
    env!("CARGO_BIN_EXE_lockstep")
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// strace around a command, with what it is to do to system calls.
fn traced(calls: &str, inject: Option<&str>, log: &Path, command: &[&str]) -> Command {
    let mut strace = Command::new("strace");
    strace.args(["-f", "-qq", "-o"]).arg(log).args(["-e", &format!("trace={calls}")]);
    if let Some(inject) = inject {
        strace.args(["-e", &format!("inject={calls}:{inject}")]);
    }
    strace.args(command);
    strace
}

fn run_traced(command: &mut Command) -> Output {
    command.output().expect("strace is not installed: Debian package strace")
}

fn write(at: &Path, path: &str, data: &[u8]) {
    fs::create_dir_all(at.join(path).parent().unwrap()).unwrap();
    fs::write(at.join(path), data).unwrap();
}

/// Every file and link below a directory but lockstep's own, with its content.
fn contents(at: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut left = vec![at.to_owned()];
    while let Some(directory) = left.pop() {
        for entry in fs::read_dir(&directory).unwrap() {
            let path = entry.unwrap().path();
            let name = path.strip_prefix(at).unwrap().to_str().unwrap().to_owned();
            let kind = fs::symlink_metadata(&path).unwrap().file_type();
            if name == ".lockstep" {
            } else if kind.is_symlink() {
                found.insert(name, fs::read_link(&path).unwrap().into_os_string().into_encoded_bytes());
            } else if kind.is_dir() {
                left.push(path);
            } else {
                found.insert(name, fs::read(&path).unwrap());
            }
        }
    }
    found
}

/// An old and a new version of a tree with a unit, new directories, files that change and that go, and a pointer.
struct Area {
    at: tempfile::TempDir,
}

impl Area {
    fn new() -> Area {
        // In memory where that is to be had: what is tested is the order of things, not the disk.
        let memory = Path::new("/dev/shm");
        let at = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() };
        let area = Area { at: at.unwrap() };
        let (old, new) = (area.path("old"), area.path("new"));
        for (at, name) in
            [&old, &new].into_iter().flat_map(|at| ["same", "ckpt-1/same", "ckpt-1/extra/deep"].map(|name| (at, name)))
        {
            write(at, name, b"the same in both");
            let time = std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000_000);
            fs::File::options().write(true).open(at.join(name)).unwrap().set_modified(time).unwrap();
        }
        for (at, version) in [(&old, 1), (&new, 2)] {
            write(at, "changed", &[version; 2000]);
            write(at, "ckpt-1/weights", &[version; 700_000]);
            write(at, "ckpt-1/_SUCCESS", &[version]);
            symlink(format!("ckpt-{version}"), at.join("latest")).unwrap();
        }
        write(&old, "gone/file", b"goes");
        write(&old, "ckpt-1/old-only", b"goes");
        write(&new, "ckpt-2/weights", &[3; 300_000]);
        write(&new, "ckpt-2/inner/config", b"{}");
        let pushed = area.push(&old, &[]).output().unwrap();
        assert!(pushed.status.success(), "{}", text(&pushed));
        assert!(
            Command::new("cp").arg("-a").args([area.path("target"), area.path("template")]).status().unwrap().success()
        );
        area
    }

    fn path(&self, name: &str) -> PathBuf {
        self.at.path().join(name)
    }

    fn arguments(&self, source: &Path) -> Vec<String> {
        let shown = |path: &Path| path.to_str().unwrap().to_owned();
        let fixed = ["push", "-q", "--delete", "--unit", "ckpt-*/", "--transfers", "1"].map(str::to_owned);
        [lockstep().to_owned()].into_iter().chain(fixed).chain([shown(source), shown(&self.path("target"))]).collect()
    }

    fn prepared(&self, command: &mut Command) {
        command.env("XDG_STATE_HOME", self.path("state")).env("TMPDIR", self.at.path());
    }

    fn push(&self, source: &Path, more: &[&str]) -> Command {
        let arguments = self.arguments(source);
        let mut command = Command::new(&arguments[0]);
        command.args(&arguments[1..]).args(more);
        self.prepared(&mut command);
        command
    }

    /// A push of the new version under strace.
    fn injected(&self, calls: &str, inject: Option<&str>) -> Output {
        let arguments = self.arguments(&self.path("new"));
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let mut command = traced(calls, inject, &self.path("log"), &arguments);
        self.prepared(&mut command);
        run_traced(&mut command)
    }

    /// The target as the old version left it.
    fn reset(&self) {
        let _ = fs::remove_dir_all(self.path("target"));
        assert!(
            Command::new("cp").arg("-a").args([self.path("template"), self.path("target")]).status().unwrap().success()
        );
    }

    /// The target holds the old or the new version of each file, and of the unit all of one.
    fn assert_no_mix(&self, when: &str) {
        let (old, new) = (contents(&self.path("old")), contents(&self.path("new")));
        let now = contents(&self.path("target"));
        for (name, data) in &now {
            let either = [&old, &new].iter().any(|version| version.get(name) == Some(data));
            assert!(either, "{when}: '{name}' is neither old nor new");
        }
        for name in old.keys().filter(|name| new.contains_key(*name)) {
            assert!(now.contains_key(name), "{when}: '{name}' is gone");
        }
        let unit = |tree: &BTreeMap<String, Vec<u8>>, prefix: &str| -> Vec<(String, Vec<u8>)> {
            tree.iter().filter(|(name, _)| name.starts_with(prefix)).map(|(a, b)| (a.clone(), b.clone())).collect()
        };
        for prefix in ["ckpt-1/", "ckpt-2/"] {
            let found = unit(&now, prefix);
            assert!(found == unit(&old, prefix) || found == unit(&new, prefix), "{when}: a mix of {prefix}");
        }
        if now["latest"] == b"ckpt-2" {
            assert_eq!(unit(&now, "ckpt-2/"), unit(&new, "ckpt-2/"), "{when}: the pointer came before its unit");
            assert_eq!(now["changed"], new["changed"], "{when}: the pointer came before the rest");
        }
    }

    /// The next run finishes the work, and nothing is left of the one before.
    fn assert_converges(&self, when: &str) {
        let again = self.push(&self.path("new"), &[]).output().unwrap();
        assert!(again.status.success(), "{when}: {}", text(&again));
        assert!(contents(&self.path("target")) == contents(&self.path("new")), "{when}");
        assert!(!self.path("target/.lockstep/staging/current").exists(), "{when}: staging was not collected");
        let verified = Command::new(lockstep()).args(["manifest", "verify"]).arg(self.path("target")).output().unwrap();
        assert!(verified.status.success(), "{when}: {}", text(&verified));
        lockstep::audit::verify(&lockstep::root::Root::open(&self.path("target")).unwrap()).unwrap();
    }

    /// How often a thread of a whole run made each of the calls, at most.
    fn counted(&self) -> BTreeMap<&'static str, usize> {
        self.reset();
        let whole = self.injected(&STEPS.join(","), None);
        assert!(whole.status.success(), "{}", text(&whole));
        let log = fs::read_to_string(self.path("log")).unwrap();
        let mut threads: BTreeMap<(&str, &str), usize> = BTreeMap::new();
        for line in log.lines() {
            let Some((thread, rest)) = line.split_once(' ') else { continue };
            if let Some(call) = STEPS.iter().find(|call| rest.trim_start().starts_with(&format!("{call}("))) {
                *threads.entry((thread, call)).or_default() += 1;
            }
        }
        let mut counts = BTreeMap::new();
        for ((_, call), count) in threads {
            let call = STEPS.iter().find(|known| **known == call).unwrap();
            let most: &mut usize = counts.entry(*call).or_default();
            *most = count.max(*most);
        }
        counts
    }
}

/// All points where `LOCKSTEP_EXHAUSTIVE` is set, else some of them.
fn sample(count: usize) -> Vec<usize> {
    if std::env::var_os("LOCKSTEP_EXHAUSTIVE").is_some() {
        return (1..=count).collect();
    }
    let mut points = vec![1, count / 2, count];
    points.retain(|&point| point > 0);
    points.dedup();
    points
}

#[test]
fn h32_killed_at_any_step_the_target_is_old_or_new_and_the_next_run_goes_on() {
    let area = Area::new();
    let counts = area.counted();
    for call in ["pwrite64", "renameat", "renameat2", "unlinkat", "syncfs", "fsync", "linkat", "mkdirat"] {
        assert!(counts.contains_key(call), "{call} is not among {counts:?}");
    }
    let points: Vec<(&str, usize)> =
        counts.iter().flat_map(|(call, &count)| sample(count).into_iter().map(|point| (*call, point))).collect();
    let mut killed = 0;
    for (call, point) in &points {
        let when = format!("killed at {call} number {point}");
        area.reset();
        let output = area.injected(call, Some(&format!("signal=SIGKILL:when={point}")));
        let was_killed = output.status.signal() == Some(9) || output.status.code() == Some(137);
        assert!(was_killed || output.status.success(), "{when}: {}", text(&output));
        killed += usize::from(was_killed);
        area.assert_no_mix(&when);
        area.assert_converges(&when);
    }
    assert!(killed * 10 >= points.len() * 9, "only {killed} of {} runs were killed", points.len());
}

/// The agent as a process of its own, maybe under strace, with the client in this one. The link can be cut.
struct ChildLink {
    child: Mutex<Child>,
    stdin: Mutex<Option<std::process::ChildStdin>>,
    stdout: Mutex<std::process::ChildStdout>,
    /// Bytes that may still be sent before it is cut.
    left: AtomicU64,
}

impl ChildLink {
    fn start(command: &mut Command, cut_after: u64) -> ChildLink {
        let child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn();
        let mut child = child.expect("strace is not installed: Debian package strace");
        let (stdin, stdout) = (child.stdin.take(), child.stdout.take().unwrap());
        ChildLink {
            child: Mutex::new(child),
            stdin: Mutex::new(stdin),
            stdout: Mutex::new(stdout),
            left: AtomicU64::new(cut_after),
        }
    }
}

impl Link for ChildLink {
    fn send(&self, packet: Bytes) -> Result<(), LinkError> {
        let gone = || LinkError("the link is cut".into());
        let mut stdin = self.stdin.lock().unwrap();
        let left = self.left.load(Ordering::Relaxed);
        if (packet.len() as u64) > left {
            // A part of the packet still gets through, as when a machine stops.
            let _ = stdin.as_mut().map(|pipe| std::io::Write::write_all(pipe, &packet[..left as usize]));
            *stdin = None;
            return Err(gone());
        }
        self.left.store(left - packet.len() as u64, Ordering::Relaxed);
        let pipe = stdin.as_mut().ok_or_else(gone)?;
        std::io::Write::write_all(pipe, &packet).map_err(|error| LinkError(error.to_string()))
    }

    fn recv(&self) -> Result<Option<Bytes>, LinkError> {
        let mut buffer = vec![0; 65536];
        let read = self.stdout.lock().unwrap().read(&mut buffer).map_err(|error| LinkError(error.to_string()))?;
        buffer.truncate(read);
        Ok((read > 0).then(|| buffer.into()))
    }

    fn close(&self) {
        *self.stdin.lock().unwrap() = None;
    }
}

impl Drop for ChildLink {
    fn drop(&mut self) {
        *self.stdin.get_mut().unwrap() = None;
        let _ = self.child.get_mut().unwrap().wait();
    }
}

fn options() -> Options {
    Options {
        scan: ScanOptions::default(),
        begin: BeginOptions {
            actor: "tester@here".into(),
            units: vec!["ckpt-*/".into()],
            wait_seconds: 20,
            ..BeginOptions::default()
        },
        delete: true,
        max_delete: DeleteLimit::Unlimited,
        workers: 1,
        retries: 2,
        bandwidth: None,
    }
}

impl Area {
    /// A push of the new version to an agent that `command` starts.
    fn push_over(&self, command: &mut Command, cut_after: u64) -> (Result<SyncReport, Error>, u64) {
        self.prepared(command);
        let link = Arc::new(ChildLink::start(command, cut_after));
        let source = LocalSource::new(&self.path("new"), None).unwrap();
        let client = match Client::connect(link.clone(), "agent", ClientOptions::default()) {
            Ok(client) => client,
            Err(error) => return (Err(error), 0),
        };
        let root = self.path("target");
        let root = root.as_os_str().as_encoded_bytes();
        let compress = CompressOptions { level: None, enabled: false };
        let target = match Lanes::over(client, 1, Box::new(|_| None), root, compress) {
            Ok(lanes) => AgentTarget::new(lanes),
            Err(error) => return (Err(error), 0),
        };
        let monitor = Silent::default();
        let result = run(&source, &target, &options(), &monitor, &AtomicBool::new(false));
        (result, Counters::get(&monitor.counters().transferred_bytes))
    }

    fn agent(&self) -> Command {
        let mut command = Command::new(lockstep());
        command.arg("sftp-server");
        command
    }
}

#[test]
fn h32_a_new_target_killed_at_any_step_appears_whole_or_not_at_all() {
    let area = Area::new();
    for call in ["mkdirat", "pwrite64", "syncfs", "fsync", "renameat", "renameat2", "unlinkat"] {
        for point in sample(12) {
            let when = format!("new target killed at {call} number {point}");
            fs::remove_dir_all(area.path("target")).unwrap();
            area.injected(call, Some(&format!("signal=SIGKILL:when={point}")));
            if area.path("target").exists() {
                assert!(contents(&area.path("target")) == contents(&area.path("new")), "{when}: it is not whole");
            }
            area.assert_converges(&when);
            assert!(!area.path(".target.lockstep").exists(), "{when}: the hidden directory was left");
        }
    }
}

#[test]
fn h32_a_receiver_that_is_killed_leaves_old_or_new_and_the_next_push_goes_on() {
    let area = Area::new();
    let counts = area.counted();
    // The number of calls of one thread differs between the two, so that some points lie beyond the end.
    let calls = ["pwrite64", "renameat", "renameat2", "syncfs", "fsync", "unlinkat"];
    let mut killed = 0;
    for call in calls {
        for point in sample(counts[call]) {
            let when = format!("receiver killed at {call} number {point}");
            area.reset();
            let inject = format!("signal=SIGKILL:when={point}");
            let mut agent = traced(call, Some(&inject), &area.path("log"), &[lockstep(), "sftp-server"]);
            let (result, _) = area.push_over(&mut agent, u64::MAX);
            killed += usize::from(result.is_err());
            area.assert_no_mix(&when);
            area.assert_converges(&when);
        }
    }
    assert!(killed >= calls.len(), "only {killed} runs were killed");
}

#[test]
fn h34_h32_a_sender_that_is_gone_at_any_byte_is_gone_on_from_where_it_stopped() {
    let area = Area::new();
    area.reset();
    let (whole, all_bytes) = area.push_over(&mut area.agent(), u64::MAX);
    assert!(whole.unwrap().is_complete() && all_bytes > 1_000_000);
    for cut_after in [0, 40, 300, 2_000, 50_000, 600_000, 800_000, 1_000_000] {
        let when = format!("cut after {cut_after} bytes");
        area.reset();
        let (cut, _) = area.push_over(&mut area.agent(), cut_after);
        assert!(cut.is_err(), "{when}");
        area.assert_no_mix(&when);
        let (finished, sent) = area.push_over(&mut area.agent(), u64::MAX);
        assert!(finished.unwrap().is_complete(), "{when}");
        // What was not yet written when the link was cut may come again: a block in flight and the file it belongs to.
        let again = (sent + cut_after).saturating_sub(all_bytes);
        assert!(again < 600_000, "{when}: {again} bytes were sent again");
        area.assert_converges(&when);
    }
}

#[test]
fn h30_a_full_disk_or_quota_keeps_the_old_version_and_gives_the_room_back() {
    let area = Area::new();
    for (call, error, point) in [
        ("pwrite64", "ENOSPC", 1),
        ("pwrite64", "EDQUOT", 2),
        ("mkdirat", "ENOSPC", 8),
        ("syncfs", "ENOSPC", 1),
        ("syncfs", "EDQUOT", 1),
        ("linkat", "ENOSPC", 1),
    ] {
        let when = format!("{error} at {call} number {point}");
        area.reset();
        let output = area.injected(call, Some(&format!("error={error}:when={point}+")));
        assert_eq!(output.status.code(), Some(5), "{when}: {}", text(&output));
        let said = ["No space left on device", "Disk quota exceeded", "are free"];
        assert!(said.iter().any(|part| text(&output).contains(part)), "{when}: {}", text(&output));
        assert!(contents(&area.path("target")) == contents(&area.path("old")), "{when}: the old version was touched");
        assert!(!area.path("target/.lockstep/staging/current").exists(), "{when}: staging takes room");
        area.assert_converges(&when);
    }
}

#[test]
fn h30_a_receiver_with_a_full_disk_says_so_and_gives_the_room_back() {
    let area = Area::new();
    for (call, point) in [("pwrite64", 2), ("syncfs", 1)] {
        area.reset();
        let inject = format!("error=ENOSPC:when={point}+");
        let mut agent = traced(call, Some(&inject), &area.path("log"), &[lockstep(), "sftp-server"]);
        let error = area.push_over(&mut agent, u64::MAX).0.unwrap_err();
        assert_eq!(error.exit(), lockstep::error::Exit::Io, "{call}: {error}");
        assert!(error.to_string().contains("No space left on device"), "{call}: {error}");
        assert!(contents(&area.path("target")) == contents(&area.path("old")), "{call}");
        assert!(!area.path("target/.lockstep/staging/current").exists(), "{call}: staging takes room");
        area.assert_converges(call);
    }
}

#[test]
fn h30_h31_a_disk_that_fails_while_names_are_given_is_finished_by_the_next_run() {
    let area = Area::new();
    for (call, error, points) in
        [("renameat", "ENOSPC", 7..9), ("renameat2", "EROFS", 1..2), ("renameat", "EIO", 6..8), ("syncfs", "EIO", 2..3)]
    {
        for point in points {
            let when = format!("{error} at {call} number {point}");
            area.reset();
            let output = area.injected(call, Some(&format!("error={error}:when={point}+")));
            assert_eq!(output.status.code(), Some(5), "{when}: {}", text(&output));
            area.assert_no_mix(&when);
            let listed = fs::read(area.path("target/.lockstep/manifest")).unwrap();
            assert_eq!(listed, fs::read(area.path("template/.lockstep/manifest")).unwrap(), "{when}: it was recorded");
            area.assert_converges(&when);
        }
    }
}

#[test]
fn h31_a_read_only_target_is_an_error_and_not_recorded() {
    let area = Area::new();
    for (call, error) in [("mkdirat", "EROFS"), ("openat2", "EROFS"), ("pwrite64", "EIO"), ("syncfs", "EIO")] {
        area.reset();
        let output = area.injected(call, Some(&format!("error={error}")));
        assert!(matches!(output.status.code(), Some(4 | 5)), "{call} {error}: {}", text(&output));
        let before = fs::read(area.path("template/.lockstep/manifest")).unwrap();
        assert_eq!(fs::read(area.path("target/.lockstep/manifest")).unwrap(), before, "{call} {error}");
        area.assert_no_mix(call);
        area.assert_converges(call);
    }
}

#[test]
fn h33_content_is_stored_before_its_name_and_names_before_the_manifest() {
    let area = Area::new();
    area.reset();
    let output = area.injected("pwrite64,fchmod,syncfs,fsync,renameat,renameat2", None);
    assert!(output.status.success(), "{}", text(&output));
    let log = fs::read_to_string(area.path("log")).unwrap();
    let calls: Vec<&str> = log.lines().filter_map(|line| Some(line.split_once(' ')?.1.trim_start())).collect();
    let at = |wanted: &dyn Fn(&str) -> bool, what: &str| -> usize {
        calls.iter().position(|call| wanted(call)).unwrap_or_else(|| panic!("{what} is not in {log}"))
    };
    let last = |wanted: &dyn Fn(&str) -> bool| calls.iter().rposition(|call| wanted(call)).unwrap();
    let is = |call: &str, name: &str| call.starts_with(name);
    let written = last(&|call| is(call, "pwrite64("));
    let synced = at(&|call| is(call, "syncfs("), "syncfs");
    assert!(written < synced, "content is written after it was stored");
    let recorded = at(&|call| is(call, "renameat(") && call.contains("\"commit\""), "the record");
    let stored = calls[..recorded].iter().rposition(|call| is(call, "fsync(")).unwrap();
    let exchanged = at(&|call| call.contains("RENAME_EXCHANGE"), "the exchange");
    let pointer = at(&|call| is(call, "renameat(") && call.contains("\"latest\""), "the pointer");
    let in_force =
        last(&|call| is(call, "renameat(") && call.ends_with("= 0") && call.matches("\"manifest\"").count() == 2);
    assert!(synced < stored && stored < recorded, "the record came before what it tells of");
    let after_record = calls[recorded..exchanged].iter().any(|call| is(call, "fsync("));
    assert!(after_record, "names were given before the record was stored");
    assert!(exchanged < pointer && pointer < in_force, "the order of names is wrong");
    assert!(calls[pointer..in_force].iter().any(|call| is(call, "syncfs(")), "the manifest came before the names");
    assert!(calls[in_force..].iter().any(|call| is(call, "fsync(")), "the manifest's name was not stored");
}

#[test]
fn h14_h16_h19_a_confined_client_is_led_out_of_its_root_by_no_link() {
    let at = tempfile::tempdir().unwrap();
    let path = |name: &str| at.path().join(name);
    for name in ["data/inside", "data_evil", "source"] {
        fs::create_dir_all(path(name)).unwrap();
    }
    write(&path("source"), "f", b"x");
    fs::set_permissions(path("data_evil"), std::os::unix::fs::PermissionsExt::from_mode(0o711)).unwrap();
    symlink(path("data_evil"), path("data/link")).unwrap();
    symlink("../data_evil", path("data/relative")).unwrap();
    let push = |root: &str| -> Result<SyncReport, Error> {
        let mut agent = Command::new(lockstep());
        agent.args(["sftp-server", "--root"]).arg(path("data"));
        let link = Arc::new(ChildLink::start(&mut agent, u64::MAX));
        let source = LocalSource::new(&path("source"), None).unwrap();
        let client = Client::connect(link, "agent", ClientOptions::default())?;
        let compress = CompressOptions { level: None, enabled: false };
        let lanes = Lanes::over(client, 1, Box::new(|_| None), root.as_bytes(), compress)?;
        run(&source, &AgentTarget::new(lanes), &options(), &Silent::default(), &AtomicBool::new(false))
    };
    for root in
        ["/link", "link", "/link/new", "relative", "relative/new", "../data_evil", "/../data_evil", "inside/../link"]
    {
        assert!(push(root).is_err(), "{root}");
        assert_eq!(fs::read_dir(path("data_evil")).unwrap().count(), 0, "{root}");
    }
    // A name that begins like the root's is not the root.
    assert!(push(path("data_evil").to_str().unwrap()).unwrap().is_complete());
    assert_eq!(fs::read_dir(path("data_evil")).unwrap().count(), 0);
    assert!(push("/new/deep").unwrap().is_complete());
    assert_eq!(fs::read(path("data/new/deep/f")).unwrap(), b"x");

    // A directory that is swapped for a link, again and again, while pushes go on.
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            use rustix::fs::{CWD, RenameFlags, renameat_with};
            while !stop.load(Ordering::Relaxed) {
                let _ = renameat_with(CWD, path("data/inside"), CWD, path("data/link"), RenameFlags::EXCHANGE);
            }
        });
        for _ in 0..10 {
            let _ = push("inside");
            let _ = push("inside/below");
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert_eq!(fs::read_dir(path("data_evil")).unwrap().count(), 0);
    assert_eq!(fs::metadata(path("data_evil")).unwrap().mode() & 0o7777, 0o711);
}

#[test]
fn directories_without_the_right_to_write_are_followed_by_who_is_not_root() {
    let area = Area::new();
    let shared = area.path("shared");
    fs::create_dir(&shared).unwrap();
    let (source, target, program) = (shared.join("source"), shared.join("target"), shared.join("lockstep"));
    fs::copy(lockstep(), &program).unwrap();
    let close = |names: &[&str]| {
        for name in names {
            fs::set_permissions(source.join(name), std::os::unix::fs::PermissionsExt::from_mode(0o555)).unwrap();
        }
    };
    let push = |kill: Option<&str>| -> Output {
        let mut command = Vec::new();
        if rustix::process::geteuid().is_root() {
            for path in [area.at.path(), &shared, &source] {
                let _ = Command::new("chown").args(["-R", "65534:65534"]).arg(path).status();
            }
            command.extend(["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]);
        }
        if let Some(inject) = kill {
            command.extend(["strace", "-f", "-qq", "-o", "/dev/null", "-e", inject]);
        }
        let shown = [&program, &source, &target].map(|path| path.to_str().unwrap());
        command.extend([shown[0], "push", "-q", "--delete", "--unit", "unit/", shown[1], shown[2]]);
        Command::new(command[0]).args(&command[1..]).env("XDG_STATE_HOME", shared.join("state")).output().unwrap()
    };
    for name in ["closed/deep/f", "closed/goes", "unit/inner/f", "unit/stays"] {
        write(&source, name, b"old");
    }
    close(&["closed/deep", "closed", "unit/inner", "unit"]);
    let first = push(None);
    assert!(first.status.success(), "{}", text(&first));
    for name in ["closed/deep", "closed", "unit/inner", "unit"] {
        fs::set_permissions(source.join(name), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    }
    for name in ["closed/deep/f", "closed/new/deep/f", "unit/inner/f", "unit/inner/more/f"] {
        write(&source, name, b"new!");
    }
    fs::remove_file(source.join("closed/goes")).unwrap();
    close(&["closed/deep", "closed/new/deep", "closed/new", "closed", "unit/inner/more", "unit/inner", "unit"]);
    for kill in [
        "inject=syncfs:signal=SIGKILL:when=1",
        "inject=renameat2:signal=SIGKILL:when=1",
        "inject=syncfs:signal=SIGKILL:when=2",
    ] {
        push(Some(kill));
    }
    let second = push(None);
    assert!(second.status.success(), "{}", text(&second));
    assert!(contents(&target) == contents(&source));
    for name in ["closed/deep", "closed/new/deep", "closed", "unit/inner/more", "unit"] {
        assert_eq!(fs::metadata(target.join(name)).unwrap().mode() & 0o7777, 0o555, "{name}");
    }
    assert!(!target.join(".lockstep/staging/current").exists());
}
