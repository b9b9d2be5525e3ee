//! OpenSSH's `sftp-server` behind pipes that a test may cut, change or watch, packet by packet.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use lockstep::endpoint::link::{ConnectError, Link, LinkError, Remote, Way};
use lockstep::endpoint::local::{LocalSource, LocalTarget};
use lockstep::endpoint::stock::{Lanes, StockSource, StockTarget, Verify};
use lockstep::endpoint::{BeginOptions, Error, ScanOptions, Target};
use lockstep::error::Exit;
use lockstep::manifest::format;
use lockstep::monitor::Silent;
use lockstep::plan::safety::DeleteLimit;
use lockstep::policy::PolicySpec;
use lockstep::sync::{Options, SyncReport, run};

const WRITE: u8 = 6;
const READ: u8 = 5;
const DATA: u8 = 103;
const NAME: u8 = 104;

/// Sees each packet (without its length) before it goes on; `false` cuts the link instead.
type Hook = Arc<dyn Fn(&mut Vec<u8>) -> bool + Send + Sync>;

fn nothing() -> Hook {
    Arc::new(|_| true)
}

struct Pipe {
    child: Mutex<Child>,
    input: Mutex<Option<ChildStdin>>,
    output: Mutex<ChildStdout>,
    /// Packets of SFTP; else plain bytes.
    hooks: Option<(Hook, Hook)>,
}

impl Pipe {
    fn start(mut command: Command, hooks: Option<(Hook, Hook)>) -> Arc<Pipe> {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("sftp-server is not installed: Debian package openssh-sftp-server");
        let (input, output) = (Mutex::new(child.stdin.take()), Mutex::new(child.stdout.take().unwrap()));
        Arc::new(Pipe { child: Mutex::new(child), input, output, hooks })
    }

    fn cut(&self) -> LinkError {
        let _ = self.child.lock().unwrap().kill();
        LinkError("cut".into())
    }
}

impl Link for Pipe {
    fn send(&self, packet: Bytes) -> Result<(), LinkError> {
        let mut packet = packet.to_vec();
        if let Some((hook, _)) = &self.hooks {
            let mut body = packet.split_off(4);
            if !hook(&mut body) {
                return Err(self.cut());
            }
            packet = (body.len() as u32).to_be_bytes().to_vec();
            packet.extend_from_slice(&body);
        }
        match self.input.lock().unwrap().as_mut().map(|input| input.write_all(&packet)) {
            Some(Ok(())) => Ok(()),
            _ => Err(LinkError("the server has ended".into())),
        }
    }

    fn recv(&self) -> Result<Option<Bytes>, LinkError> {
        let mut output = self.output.lock().unwrap();
        let Some((_, hook)) = &self.hooks else {
            let mut buffer = vec![0; 64 * 1024];
            let read = output.read(&mut buffer).map_err(|error| LinkError(error.to_string()))?;
            buffer.truncate(read);
            return Ok((read > 0).then(|| buffer.into()));
        };
        let mut length = [0; 4];
        if output.read_exact(&mut length).is_err() {
            return Ok(None);
        }
        let mut body = vec![0; u32::from_be_bytes(length) as usize];
        if output.read_exact(&mut body).is_err() {
            return Ok(None);
        }
        if !hook(&mut body) {
            return Err(self.cut());
        }
        Ok(Some([&(body.len() as u32).to_be_bytes()[..], &body].concat().into()))
    }

    fn close(&self) {
        drop(self.input.lock().unwrap().take());
    }
}

impl Drop for Pipe {
    fn drop(&mut self) {
        let mut child = self.child.lock().unwrap();
        let _ = child.kill();
        let _ = child.wait();
    }
}

/// A host whose server runs here.
struct Host {
    out: Hook,
    back: Hook,
    shell: bool,
}

impl Remote for Host {
    fn open(&self, _: &Way, _: usize) -> Result<Arc<dyn Link>, ConnectError> {
        let command = Command::new("/usr/lib/openssh/sftp-server");
        Ok(Pipe::start(command, Some((Arc::clone(&self.out), Arc::clone(&self.back)))))
    }

    fn exec(&self, text: &str) -> Result<Arc<dyn Link>, ConnectError> {
        if !self.shell {
            return Err(ConnectError { message: "no shell".into(), exit: Exit::Usage, not_offered: true });
        }
        let mut command = Command::new("sh");
        command.args(["-c", text]);
        Ok(Pipe::start(command, None))
    }

    fn describe(&self) -> String {
        "user@host:22".into()
    }
}

struct Pair {
    outer: tempfile::TempDir,
}

impl Pair {
    fn new() -> Pair {
        let outer = tempfile::tempdir().unwrap();
        fs::create_dir(outer.path().join("source")).unwrap();
        Pair { outer }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.outer.path().join(name)
    }

    fn write(&self, path: &str, data: impl AsRef<[u8]>) {
        let path = self.at("source").join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, data).unwrap();
    }

    fn lanes(&self, out: Hook, back: Hook, shell: bool, lanes: usize) -> Result<Lanes, Error> {
        let remote: Arc<dyn Remote> = Arc::new(Host { out, back, shell });
        let first = remote.open(&Way::SftpSubsystem, 0).unwrap();
        Lanes::connect(remote, first, lanes, self.at("target").as_os_str().as_encoded_bytes(), Verify::Auto)
    }

    fn push_over(&self, lanes: Lanes) -> Result<SyncReport, Error> {
        let source = LocalSource::new(&self.at("source"), Some(&self.at("state"))).unwrap();
        run(&source, &StockTarget::new(lanes), &options(), &Silent::default(), &AtomicBool::new(false))
    }

    fn push(&self, out: Hook, back: Hook, shell: bool) -> Result<SyncReport, Error> {
        self.push_over(self.lanes(out, back, shell, 1)?)
    }

    fn pull(&self, out: Hook, back: Hook) -> Result<SyncReport, Error> {
        let source = StockSource::new(self.lanes(out, back, false, 1)?);
        let target = LocalTarget::new(&self.at("copy"), PolicySpec::default());
        run(&source, &target, &options(), &Silent::default(), &AtomicBool::new(false))
    }

    /// The target holds exactly what the source does, and its manifest says so.
    fn in_step(&self) {
        let output = Command::new("rsync")
            .args(["-naHic", "--delete", "--modify-window=1", "--exclude=/.lockstep"])
            .args([self.at("source").join(""), self.at("target").join("")])
            .output()
            .expect("rsync is not installed: Debian package rsync");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let different: Vec<_> =
            text.lines().filter(|line| !line.ends_with(" ./") && !line.starts_with(".L..t")).collect();
        assert!(output.status.success() && different.is_empty(), "{different:#?}");
        let manifest = format::decode(&fs::read(self.at("target/.lockstep/manifest")).unwrap()).unwrap();
        for entry in manifest.tree.entries() {
            if let Some((_, digest)) = entry.file() {
                let data = fs::read(self.at("target").join(entry.path.as_path())).unwrap();
                assert_eq!(digest, Some(sha256(&data)), "{}", entry.path);
            }
        }
    }
}

fn sha256(data: &[u8]) -> lockstep::manifest::Digest {
    use sha2::Digest as _;
    lockstep::manifest::Digest(sha2::Sha256::digest(data).into())
}

fn options() -> Options {
    Options {
        scan: ScanOptions::default(),
        begin: BeginOptions { actor: "tester@here".into(), ..BeginOptions::default() },
        delete: true,
        max_delete: DeleteLimit::Unlimited,
        workers: 2,
        retries: 2,
    }
}

/// A byte of the content that is written is another one, in the first `times` WRITEs of content.
fn flip_writes(times: usize) -> Hook {
    let left = AtomicUsize::new(times);
    Arc::new(move |packet| {
        let content = packet.first() == Some(&WRITE) && packet.ends_with(b"content");
        if content && left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok() {
            let last = packet.len() - 1;
            packet[last] ^= 1;
        }
        true
    })
}

#[test]
fn h24_content_that_changed_on_the_way_is_sent_again_or_never_published() {
    for shell in [true, false] {
        let pair = Pair::new();
        pair.write("a/small", "some content");
        pair.write("b/large", [&vec![3; 700_000][..], b"content"].concat());
        let report = pair.push(flip_writes(2), nothing(), shell).unwrap();
        assert!(report.is_complete());
        pair.in_step();

        pair.write("a/small", "other, longer content");
        let report = pair.push(flip_writes(usize::MAX), nothing(), shell).unwrap();
        assert!(!report.is_complete());
        assert!(report.problems.iter().any(|problem| problem.message.contains("SHA-256")), "{:?}", report.problems);
        assert_eq!(fs::read(pair.at("target/a/small")).unwrap(), b"some content");
    }
}

/// What a reader may see of the tree of [`versions`] at any moment.
fn assert_old_or_new(target: &Path, new: bool) {
    let Ok(latest) = fs::read(target.join("latest")) else {
        assert!(!target.exists(), "a new tree appears whole");
        return;
    };
    let step = String::from_utf8(latest).unwrap();
    assert!(step == "1" || (new && step == "2"), "{step}");
    let unit = target.join(format!("checkpoint-{step}"));
    for name in ["model", "optimizer", "sub/state"] {
        let data = fs::read(unit.join(name)).unwrap();
        assert!(data.len() > 10 && data.iter().all(|byte| *byte == step.as_bytes()[0]), "{name} of {step}");
    }
    let config = fs::read(target.join("config")).unwrap();
    assert!(config == b"config of 1" || (new && config == b"config of 2, longer"));
}

fn version(pair: &Pair, step: u8) {
    for (name, size) in [("model", 300_000), ("optimizer", 40_000), ("sub/state", 11)] {
        pair.write(&format!("checkpoint-{step}/{name}"), vec![b'0' + step; size]);
    }
    pair.write("latest", format!("{step}"));
    pair.write("config", if step == 1 { "config of 1" } else { "config of 2, longer" });
}

#[test]
fn s21_a_reader_never_sees_half_a_file_nor_a_pointer_to_what_is_not_there() {
    let pair = Pair::new();
    let watch = |new| -> Hook {
        let target = pair.at("target");
        Arc::new(move |_| {
            assert_old_or_new(&target, new);
            true
        })
    };
    version(&pair, 1);
    pair.push(watch(false), watch(false), true).unwrap();
    version(&pair, 2);
    pair.push(watch(true), watch(true), true).unwrap();
    pair.in_step();
}

/// Lets `count` packets through and then cuts.
fn cut_after(count: usize) -> Hook {
    let left = AtomicUsize::new(count);
    Arc::new(move |_| left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok())
}

fn counting() -> (Hook, Arc<AtomicUsize>) {
    let counter = Arc::new(AtomicUsize::new(0));
    let counts = Arc::clone(&counter);
    (Arc::new(move |_| counts.fetch_add(1, Ordering::Relaxed) < usize::MAX), counter)
}

/// A target that holds version 1, and a source with version 2.
fn two_versions(from: &Pair) -> Pair {
    let pair = Pair::new();
    let copied = Command::new("cp").arg("-a").arg(from.at("target")).arg(pair.at("target")).status().unwrap();
    assert!(copied.success());
    version(&pair, 1);
    for name in ["checkpoint-1", "checkpoint-1/sub"] {
        let made = fs::metadata(from.at("source").join(name)).unwrap().modified().unwrap();
        fs::File::open(pair.at("source").join(name)).unwrap().set_modified(made).unwrap();
    }
    version(&pair, 2);
    pair
}

#[test]
fn h32_h34_cut_at_any_packet_an_existing_target_is_old_or_new_and_the_next_run_converges() {
    let first = Pair::new();
    version(&first, 1);
    first.push(nothing(), nothing(), true).unwrap();
    let (counter, packets) = counting();
    two_versions(&first).push(counter, nothing(), false).unwrap();
    // All points would take a while; a step of nine meets each kind of packet.
    for (turn, at) in (3..packets.load(Ordering::Relaxed)).step_by(9).enumerate() {
        let pair = two_versions(&first);
        let shell = turn % 2 == 0;
        match pair.push(cut_after(at), nothing(), shell) {
            Err(error) => assert_eq!(error.exit(), Exit::TryAgain, "{at}: {error}"),
            // Only the lock was still to be removed.
            Ok(_) => assert_eq!(fs::read(pair.at("target/latest")).unwrap(), b"2", "{at}"),
        }
        assert_old_or_new(&pair.at("target"), true);
        let report = pair.push(nothing(), nothing(), shell).unwrap();
        assert!(report.is_complete(), "{at}: {:?}", report.problems);
        pair.in_step();
        assert!(!pair.at("target/.lockstep/staging/sftp").exists());
    }
}

#[test]
fn h32_h34_cut_at_any_packet_a_new_target_is_whole_or_not_there() {
    let counted = Pair::new();
    version(&counted, 1);
    let (counter, packets) = counting();
    counted.push(counter, nothing(), false).unwrap();
    for (turn, at) in (3..packets.load(Ordering::Relaxed)).step_by(9).enumerate() {
        let pair = Pair::new();
        version(&pair, 1);
        let cut = pair.push(cut_after(at), nothing(), turn % 2 == 0);
        assert!(cut.is_err() || pair.at("target").exists());
        assert_old_or_new(&pair.at("target"), false);
        let report = pair.push(nothing(), nothing(), turn % 2 == 0).unwrap();
        assert!(report.is_complete(), "{at}: {:?}", report.problems);
        pair.in_step();
        assert!(!pair.at(".target.lockstep").exists());
    }
}

#[test]
fn h34_what_was_sent_is_not_sent_again() {
    let pair = Pair::new();
    let content: Vec<u8> = (0..6_000_000u32).map(|at| (at / 3) as u8).collect();
    pair.write("large", &content);
    pair.write("other", "x");
    let written = |limit: usize| -> (Hook, Arc<AtomicUsize>) {
        let counter = Arc::new(AtomicUsize::new(0));
        let counts = Arc::clone(&counter);
        let hook = move |packet: &mut Vec<u8>| {
            let length = if packet.first() == Some(&WRITE) { packet.len() } else { 0 };
            counts.fetch_add(length, Ordering::Relaxed) + length <= limit
        };
        (Arc::new(hook), counter)
    };
    let (hook, _) = written(4_000_000);
    assert!(pair.push(hook, nothing(), true).is_err());
    let staged = pair.at(".target.lockstep/.lockstep/staging/sftp/tree/large");
    let there = fs::metadata(&staged).unwrap().len() as usize;
    assert!(there > 1_000_000, "{there}");
    assert_eq!(fs::metadata(&staged).unwrap().mode() & 0o7777, 0o600);
    let (hook, sent) = written(usize::MAX);
    pair.push(hook, nothing(), true).unwrap();
    let sent = sent.load(Ordering::Relaxed);
    assert!(sent < content.len() - there + 200_000, "{sent} were sent, {there} were there");
    pair.in_step();

    // What was damaged meanwhile is found, and sent anew.
    fs::remove_dir_all(pair.at("target")).unwrap();
    let (hook, _) = written(4_000_000);
    assert!(pair.push(hook, nothing(), false).is_err());
    let length = fs::metadata(&staged).unwrap().len() as usize;
    fs::write(&staged, vec![9; length]).unwrap();
    assert!(pair.push(nothing(), nothing(), false).unwrap().is_complete());
    pair.in_step();
}

#[test]
fn h35_the_second_run_is_told_who_holds_the_root_and_one_that_ended_holds_nothing() {
    let pair = Pair::new();
    pair.write("f", "x");
    fs::create_dir(pair.at("target")).unwrap();
    let held = StockTarget::new(pair.lanes(nothing(), nothing(), false, 1).unwrap());
    held.begin(&options().begin, &Silent::default()).unwrap();
    let refused = pair.push(nothing(), nothing(), false).unwrap_err();
    assert_eq!(refused.exit(), Exit::TryAgain);
    assert!(refused.to_string().contains("tester@here"), "{refused}");
    held.abort();
    pair.push(nothing(), nothing(), false).unwrap();

    // A process that is no more, or of another machine and silent for long.
    let lock = pair.at("target/.lockstep/lock.sftp");
    let text = |machine: &str, pid: u32| {
        format!(r#"{{"actor":"gone@here","machine":"{machine}","pid":{pid},"started":1,"token":"t"}}"#)
    };
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    let numbering = fs::read_link("/proc/self/ns/pid").unwrap();
    let here = format!("{} {}", boot.trim(), numbering.display());
    for (name, content) in [("dead", text(&here, 4_000_000)), ("another process of that number", text(&here, 1))] {
        fs::write(&lock, content).unwrap();
        assert!(pair.push(nothing(), nothing(), false).is_ok(), "{name}");
        assert!(!lock.exists(), "{name}");
    }
    for content in [text("elsewhere", 1), String::new()] {
        fs::write(&lock, &content).unwrap();
        let refused = pair.push(nothing(), nothing(), false).unwrap_err();
        assert!(refused.to_string().contains("s ago"), "{refused}");
        assert_eq!(fs::read_to_string(&lock).unwrap(), content);
        let long_ago = std::time::SystemTime::now() - std::time::Duration::from_secs(301);
        fs::File::options().write(true).open(&lock).unwrap().set_modified(long_ago).unwrap();
        pair.push(nothing(), nothing(), false).unwrap();
        assert!(!lock.exists());
    }
    let left: Vec<_> =
        fs::read_dir(pair.at("target/.lockstep")).unwrap().map(|found| found.unwrap().file_name()).collect();
    assert!(left.iter().all(|name| !name.to_string_lossy().starts_with("lock")), "{left:?}");
}

#[test]
fn h35_a_lock_that_was_taken_over_publishes_nothing() {
    let pair = Pair::new();
    pair.write("f", "x");
    pair.push(nothing(), nothing(), false).unwrap();
    pair.write("f", "y, longer");
    let lock = pair.at("target/.lockstep/lock.sftp");
    // Somebody takes the lock over while content is on its way.
    let steal: Hook = Arc::new(move |packet| {
        if packet.first() == Some(&WRITE) && packet.ends_with(b"longer") {
            fs::remove_file(&lock).unwrap();
            fs::write(&lock, r#"{"actor":"thief@there","machine":"","pid":1,"started":1,"token":"t"}"#).unwrap();
        }
        true
    });
    let refused = pair.push(steal, nothing(), false).unwrap_err();
    assert!(refused.to_string().contains("thief@there"), "{refused}");
    assert_eq!(fs::read(pair.at("target/f")).unwrap(), b"x");
    assert!(pair.at("target/.lockstep/lock.sftp").exists(), "the lock of another is left alone");
}

#[test]
fn h36_a_source_that_changes_while_it_is_read_is_not_published() {
    let pair = Pair::new();
    fs::create_dir(pair.at("target")).unwrap();
    let file = pair.at("target/f");
    fs::write(&file, vec![1; 2_000_000]).unwrap();
    fs::write(pair.at("target/g"), "g").unwrap();
    let changes: [fn(&Path); 3] = [
        |file| fs::File::options().append(true).open(file).unwrap().write_all(b"more").unwrap(),
        |file| fs::File::options().write(true).open(file).unwrap().set_len(1_000_000).unwrap(),
        |file| {
            let later = std::time::SystemTime::now() + std::time::Duration::from_secs(5);
            fs::File::options().write(true).open(file).unwrap().set_modified(later).unwrap();
        },
    ];
    for change in changes {
        let (file, done) = (file.clone(), AtomicBool::new(false));
        // Whatever is tried again was listed before the change, and stays what it was not.
        let meddle: Hook = Arc::new(move |packet| {
            if packet.first() == Some(&READ) && packet.ends_with(&[0, 3, 252, 0]) && !done.swap(true, Ordering::Relaxed)
            {
                change(&file);
            }
            true
        });
        let report = pair.pull(meddle, nothing()).unwrap();
        assert!(report.problems.iter().any(|problem| problem.message.contains("changed")), "{:?}", report.problems);
        assert!(!pair.at("copy/f").exists());
        fs::remove_dir_all(pair.at("copy")).unwrap();
    }
    assert!(pair.pull(nothing(), nothing()).unwrap().is_complete());
}

#[test]
fn h01_h04_names_that_lead_elsewhere_and_more_bytes_than_asked_for_end_the_run() {
    let pair = Pair::new();
    fs::create_dir(pair.at("target")).unwrap();
    fs::write(pair.at("target/innocent"), "x").unwrap();
    // Names of the same length, so that the rest of the packet stays what it is.
    for hostile in [&b"../../ex"[..], b"/etc/pas", b"a/b/c/de", b"nul\0nul!"] {
        let replace: Hook = Arc::new(move |packet| {
            let found = packet.windows(8).position(|bytes| bytes == b"innocent");
            if let Some(at) = found.filter(|_| packet.first() == Some(&NAME)) {
                packet[at..at + 8].copy_from_slice(hostile);
            }
            true
        });
        let refused = pair.pull(nothing(), replace).unwrap_err();
        assert!(matches!(refused, Error::Protocol { .. }), "{refused}");
    }
    let more: Hook = Arc::new(|packet| {
        if packet.first() == Some(&DATA) {
            packet[8] += 1;
            packet.push(b'!');
        }
        true
    });
    let refused = pair.pull(nothing(), more).unwrap_err();
    assert!(matches!(refused, Error::Protocol { .. }), "{refused}");
}

#[test]
fn h14_a_directory_that_became_a_link_is_not_published_through() {
    let pair = Pair::new();
    pair.write("d/f", "old");
    pair.push(nothing(), nothing(), false).unwrap();
    fs::create_dir(pair.at("outside")).unwrap();
    pair.write("d/f", "new content");
    let (directory, outside) = (pair.at("target/d"), pair.at("outside"));
    let swap: Hook = Arc::new(move |packet| {
        if packet.first() == Some(&WRITE) && packet.ends_with(b"new content") {
            fs::remove_dir_all(&directory).unwrap();
            symlink(&outside, &directory).unwrap();
        }
        true
    });
    let refused = pair.push(swap, nothing(), false).unwrap_err();
    assert!(refused.to_string().contains("'d'"), "{refused}");
    assert_eq!(fs::read_dir(pair.at("outside")).unwrap().count(), 0);
}

#[test]
fn h15_h17_links_and_hard_links_at_the_target_are_replaced_and_never_followed() {
    let pair = Pair::new();
    for name in ["link", "dangling", "hard", "d/below"] {
        pair.write(name, format!("content of {name}"));
    }
    fs::create_dir(pair.at("target")).unwrap();
    fs::create_dir(pair.at("outside")).unwrap();
    fs::write(pair.at("outside/keep"), "keep").unwrap();
    fs::set_permissions(pair.at("outside/keep"), fs::Permissions::from_mode(0o604)).unwrap();
    symlink(pair.at("outside/keep"), pair.at("target/link")).unwrap();
    symlink(pair.at("outside/nothing"), pair.at("target/dangling")).unwrap();
    symlink(pair.at("outside"), pair.at("target/d")).unwrap();
    fs::hard_link(pair.at("outside/keep"), pair.at("target/hard")).unwrap();
    pair.push(nothing(), nothing(), true).unwrap();
    pair.in_step();
    let kept = fs::metadata(pair.at("outside/keep")).unwrap();
    assert_eq!((fs::read(pair.at("outside/keep")).unwrap(), kept.mode() & 0o7777), (b"keep".to_vec(), 0o604));
    assert_eq!(fs::read_dir(pair.at("outside")).unwrap().count(), 1);
    // lockstep's own directory is not taken for one when it is a link.
    fs::remove_dir_all(pair.at("target/.lockstep")).unwrap();
    symlink(pair.at("outside"), pair.at("target/.lockstep")).unwrap();
    assert!(pair.push(nothing(), nothing(), true).is_err());
    assert_eq!(fs::read_dir(pair.at("outside")).unwrap().count(), 1);
}

#[test]
fn several_connections_share_the_work() {
    let pair = Pair::new();
    for number in 0..400 {
        pair.write(&format!("d{}/{number}", number % 7), format!("{number}"));
    }
    pair.write("large", vec![5; 3_000_000]);
    let report = pair.push_over(pair.lanes(nothing(), nothing(), true, 3).unwrap()).unwrap();
    assert!(report.is_complete());
    pair.in_step();
}
