//! An old and a new version of a tree, pushes of them that strace meddles with, and what may be there afterwards.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read as _;
use std::os::unix::fs::symlink;
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

use super::text;

/// System calls after or before which a target may be left.
pub(crate) const STEPS: [&str; 14] = [
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

pub(crate) fn lockstep() -> &'static str {
    env!("CARGO_BIN_EXE_lockstep")
}

/// strace around a command, with what it is to do to system calls.
pub(crate) fn traced(calls: &str, inject: Option<&str>, log: &Path, command: &[&str]) -> Command {
    let mut strace = Command::new("strace");
    strace.args(["-f", "-qq", "-y", "-o"]).arg(log).args(["-e", &format!("trace={calls}")]);
    if let Some(inject) = inject {
        strace.args(["-e", &format!("inject={calls}:{inject}")]);
    }
    strace.args(command);
    strace
}

pub(crate) fn run_traced(command: &mut Command) -> Output {
    command.output().expect("strace is not installed: Debian package strace")
}

pub(crate) fn write(at: &Path, path: &str, data: &[u8]) {
    fs::create_dir_all(at.join(path).parent().unwrap()).unwrap();
    fs::write(at.join(path), data).unwrap();
}

/// Every file and link below a directory but lockstep's own, with its content.
pub(crate) fn contents(at: &Path) -> BTreeMap<String, Vec<u8>> {
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
pub(crate) struct Area {
    pub(crate) at: tempfile::TempDir,
}

impl Area {
    pub(crate) fn new() -> Area {
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
            // Written within one tick of the clock they would have one time, and count as the same.
            for name in ["changed", "ckpt-1/weights", "ckpt-1/_SUCCESS"] {
                let time = std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000_000 + u64::from(version));
                fs::File::options().write(true).open(at.join(name)).unwrap().set_modified(time).unwrap();
            }
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

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.at.path().join(name)
    }

    fn arguments(&self, source: &Path) -> Vec<String> {
        let shown = |path: &Path| path.to_str().unwrap().to_owned();
        let fixed = ["push", "-q", "--delete", "--unit", "ckpt-*/", "--transfers", "1"].map(str::to_owned);
        [lockstep().to_owned()].into_iter().chain(fixed).chain([shown(source), shown(&self.path("target"))]).collect()
    }

    pub(crate) fn prepared(&self, command: &mut Command) {
        command.env("XDG_STATE_HOME", self.path("state")).env("TMPDIR", self.at.path());
    }

    pub(crate) fn push(&self, source: &Path, more: &[&str]) -> Command {
        let arguments = self.arguments(source);
        let mut command = Command::new(&arguments[0]);
        command.args(&arguments[1..]).args(more);
        self.prepared(&mut command);
        command
    }

    /// A push of the new version under strace.
    pub(crate) fn injected(&self, calls: &str, inject: Option<&str>) -> Output {
        let arguments = self.arguments(&self.path("new"));
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let mut command = traced(calls, inject, &self.path("log"), &arguments);
        self.prepared(&mut command);
        run_traced(&mut command)
    }

    /// The target as the old version left it.
    pub(crate) fn reset(&self) {
        let _ = fs::remove_dir_all(self.path("target"));
        assert!(
            Command::new("cp").arg("-a").args([self.path("template"), self.path("target")]).status().unwrap().success()
        );
    }

    /// The target holds the old or the new version of each file, and of the unit all of one.
    pub(crate) fn assert_no_mix(&self, when: &str) {
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
    pub(crate) fn assert_converges(&self, when: &str) {
        let again = self.push(&self.path("new"), &[]).output().unwrap();
        assert!(again.status.success(), "{when}: {}", text(&again));
        let (now, new) = (contents(&self.path("target")), contents(&self.path("new")));
        let odd: Vec<&String> = now.keys().chain(new.keys()).filter(|name| now.get(*name) != new.get(*name)).collect();
        assert!(now == new, "{when}: {odd:?}; {}", text(&again));
        assert!(!self.path("target/.lockstep/staging/current").exists(), "{when}: staging was not collected");
        let verified = Command::new(lockstep()).args(["manifest", "verify"]).arg(self.path("target")).output().unwrap();
        assert!(verified.status.success(), "{when}: {}", text(&verified));
        lockstep::audit::verify(&lockstep::root::Root::open(&self.path("target")).unwrap()).unwrap();
    }

    /// How often a thread of a whole run made each of the calls, at most.
    pub(crate) fn counted(&self) -> BTreeMap<&'static str, usize> {
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
pub(crate) fn sample(count: usize) -> Vec<usize> {
    if std::env::var_os("LOCKSTEP_EXHAUSTIVE").is_some() {
        return (1..=count).collect();
    }
    let mut points = vec![1, count / 2, count];
    points.retain(|&point| point > 0);
    points.dedup();
    points
}

/// The agent as a process of its own, maybe under strace, with the client in this one. The link can be cut.
pub(crate) struct ChildLink {
    child: Mutex<Child>,
    stdin: Mutex<Option<std::process::ChildStdin>>,
    stdout: Mutex<std::process::ChildStdout>,
    /// Bytes that may still be sent before it is cut.
    left: AtomicU64,
}

impl ChildLink {
    pub(crate) fn start(command: &mut Command, cut_after: u64) -> ChildLink {
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

pub(crate) fn options() -> Options {
    Options {
        scan: ScanOptions::default(),
        begin: BeginOptions {
            actor: "tester@here".into(),
            units: vec!["ckpt-*/".into()],
            wait_seconds: 20,
            ..BeginOptions::default()
        },
        delete: true,
        retain: None,
        max_delete: DeleteLimit::Unlimited,
        workers: 1,
        retries: 2,
        bandwidth: lockstep::sync::Rate::default(),
    }
}

impl Area {
    /// A push of the new version to an agent that `command` starts.
    pub(crate) fn push_over(&self, command: &mut Command, cut_after: u64) -> (Result<SyncReport, Error>, u64) {
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

    pub(crate) fn agent(&self) -> Command {
        let mut command = Command::new(lockstep());
        command.arg("sftp-server");
        command
    }
}
