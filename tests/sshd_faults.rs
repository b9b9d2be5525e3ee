//! Faults of real connections to a real sshd, with lockstep and with nothing but SFTP at the other end: cut, killed, full,
//! read-only, two at once.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

use crate::kit::sshd::Sshd;
use crate::kit::{done, ends, proxy, public, text, until};

/// What is at the other end.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Far {
    Lockstep,
    Stock,
}

const BOTH: [Far; 2] = [Far::Lockstep, Far::Stock];

impl Far {
    fn subsystem(self) -> String {
        match self {
            Far::Lockstep => format!("Subsystem lockstep {} sftp-server", env!("CARGO_BIN_EXE_lockstep")),
            Far::Stock => "Subsystem sftp /usr/lib/openssh/sftp-server".into(),
        }
    }

    /// The same, under strace that does this to its system calls.
    fn injected(self, call: &str, inject: &str) -> String {
        let subsystem = self.subsystem();
        let (name, command) = subsystem.split_at(subsystem.match_indices(' ').nth(1).unwrap().0);
        format!("{name} strace -f -qq -o /dev/null -e trace={call} -e inject={call}:{inject}{command}")
    }

    fn way(self) -> &'static str {
        match self {
            Far::Lockstep => "--remote=subsystem",
            Far::Stock => "--remote=sftp",
        }
    }
}

/// An old and a new version of a tree: a unit, a file that grows, one that is too large for one packet, a pointer.
struct Area {
    sshd: Sshd,
    far: Far,
    /// Where the target is.
    target: &'static str,
}

/// What the proxies do.
type Proxy = fn(u16, Arc<AtomicUsize>) -> u16;

/// More than sshd keeps of a channel before it is read, so that a cut leaves something to go on with.
const LARGE: usize = 6_000_000;
/// What sshd may have taken from the network and not yet given to the server that it started; it is lost with the connection.
const IN_FLIGHT: usize = 2_700_000;

type Content = BTreeMap<PathBuf, Vec<u8>>;

impl Area {
    fn new(far: Far, sshd: Sshd, target: &'static str) -> Area {
        for (name, version) in [("old", 1_u8), ("new", 2)] {
            let at = sshd.path(name);
            let large: Vec<u8> =
                (0..LARGE as u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8 ^ version).collect();
            let (marked, changed) = ([version], [version; 3000]);
            let mut files: Vec<(&str, &[u8])> = vec![
                ("same", b"the same in both"),
                ("changed", &changed),
                ("ckpt-1/weights", &large),
                ("ckpt-1/_SUCCESS", &marked),
                ("latest", &marked),
            ];
            if version == 2 {
                files.extend([("ckpt-2/weights", &large[..70_000]), ("ckpt-2/sub/state", b"new")]);
            }
            for (path, data) in files {
                let file = at.join(path);
                fs::create_dir_all(file.parent().unwrap()).unwrap();
                fs::write(&file, data).unwrap();
                // SFTP tells times to the second: what keeps its size has to show by its time.
                let second = if path == "same" { 0 } else { u64::from(version) };
                let time = std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000_000 + second);
                fs::File::options().write(true).open(&file).unwrap().set_modified(time).unwrap();
            }
        }
        Area { sshd, far, target }
    }

    fn start(far: Far) -> Area {
        Area::new(far, Sshd::only(&far.subsystem()), "target")
    }

    fn command(&self, source: &str, more: &[&str]) -> Vec<String> {
        let remote = self.sshd.remote(self.target);
        let port = self.sshd.port.to_string();
        // A directory that is there is exchanged whole by lockstep alone.
        let unit: &[&str] = if self.far == Far::Lockstep { &["--unit", "ckpt-*/"] } else { &[] };
        let fixed = ["push", "--json", "--no-compress", "--transfers", "1", self.far.way()];
        let login = ["-P", &port, "--identity", "user", "--known-hosts", "known", source, &remote];
        fixed.iter().chain(unit).chain(more).chain(&login).map(|&argument| argument.to_owned()).collect()
    }

    fn push(&self, source: &str, more: &[&str]) -> Output {
        self.sshd.command().args(self.command(source, more)).output().unwrap()
    }

    /// Content that a run had to send.
    #[track_caller]
    fn pushed(&self, source: &str) -> u64 {
        let output = self.push(source, &["--wait", "30"]);
        done(&output);
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        let summary: serde_json::Value = serde_json::from_str(said.lines().last().unwrap()).unwrap();
        summary["transferred_bytes"].as_u64().unwrap()
    }

    fn at(&self) -> PathBuf {
        self.sshd.path(self.target)
    }

    fn versions(&self) -> (Content, Content) {
        (contents(&self.sshd.path("old")), contents(&self.sshd.path("new")))
    }

    /// What is in the target is of the old or the new version, the unit wholly of one, and the pointer of no newer one.
    #[track_caller]
    fn assert_no_mix(&self, when: &str) {
        let (old, new) = self.versions();
        let now = contents(&self.at());
        assert!(old.keys().eq(now.keys()) || new.keys().eq(now.keys()), "{when}: {:?}", now.keys());
        for (name, data) in &now {
            let either = old.get(name) == Some(data) || new.get(name) == Some(data);
            assert!(either, "{when}: {name:?} is neither old nor new");
        }
        let is_new = |name: &str| now[Path::new(name)] == new[Path::new(name)];
        if self.far == Far::Lockstep {
            assert_eq!(is_new("ckpt-1/weights"), is_new("ckpt-1/_SUCCESS"), "{when}: a mix of the unit");
        }
        assert!(is_new("ckpt-1/weights") || !is_new("ckpt-1/_SUCCESS"), "{when}: the marker came before its unit");
        let complete = is_new("changed") && is_new("ckpt-1/weights") && now.len() == new.len();
        assert!(complete || !is_new("latest"), "{when}: the pointer came first");
    }

    /// The next run ends the work, sends no more than is missing, and leaves nothing behind.
    #[track_caller]
    fn assert_converges(&self, when: &str) -> u64 {
        let sent = self.pushed("new");
        assert!(contents(&self.at()) == self.versions().1, "{when}");
        for left in [".lockstep/staging/current", ".lockstep/staging/sftp", ".lockstep/lock.sftp"] {
            assert!(!self.at().join(left).exists(), "{when}: {left} was left");
        }
        ends(&self.sshd.run(&["manifest", "verify", self.target]), 0, &[]);
        ends(&self.sshd.run(&["audit", "verify", self.target]), 0, &[]);
        sent
    }

    /// The target as the old version left it: copied, so that the times of what is there stay.
    fn reset(&self) {
        let _ = fs::remove_dir_all(self.at());
        done(&Command::new("cp").arg("-a").args([self.sshd.path("template"), self.at()]).output().unwrap());
    }

    fn with_template(self) -> Area {
        self.pushed("old");
        fs::rename(self.at(), self.sshd.path("template")).unwrap();
        self
    }
}

/// Every file below a directory but lockstep's own.
fn contents(at: &Path) -> Content {
    let entries = walkdir::WalkDir::new(at).into_iter().filter_entry(|entry| entry.file_name() != ".lockstep");
    let files = entries.filter_map(Result::ok).filter(|entry| entry.file_type().is_file());
    files.map(|entry| (entry.path().strip_prefix(at).unwrap().to_owned(), fs::read(entry.path()).unwrap())).collect()
}

/// An area that is reached through a proxy, and what the proxy may pass on.
fn through(proxy: Proxy, far: Far) -> (Area, Arc<AtomicUsize>) {
    let mut area = Area::start(far).with_template();
    let left = Arc::new(AtomicUsize::new(usize::MAX));
    let port = proxy(area.sshd.port, Arc::clone(&left));
    let known = format!("[127.0.0.1]:{port} {}\n", public(&area.sshd.path("host.pub")));
    fs::write(area.sshd.path("known"), known).unwrap();
    area.sshd.port = port;
    (area, left)
}

fn cut_at_any_byte(far: Far) {
    let (area, left) = through(proxy::cutting, far);
    area.reset();
    let all = area.pushed("new") as usize;
    let whole = usize::MAX - left.load(SeqCst);
    assert!(all > LARGE && whole > all);
    // In the handshake, at the login, while listing, in content, and between the last byte of it and the last answer.
    let points = [0, 21, 3_000, 9_000, 4_000_001, whole - 6_000, whole - 200];
    // A run with a stock server takes longer: every second point is enough.
    let step = if far == Far::Stock { 2 } else { 1 };
    for cut in points.into_iter().step_by(step) {
        let when = format!("{far:?} cut after {cut} of {whole} bytes");
        // A machine that stops the receiver before it has begun to write has it lose more, never less: it is tried again then.
        let lost = |_| {
            area.reset();
            left.store(cut, SeqCst);
            let output = area.push("new", &[]);
            // What is cut after the last answer may have been enough.
            let enough = output.status.success() && cut > all;
            assert!(output.status.code() == Some(75) || enough, "{when}: {}", text(&output));
            area.assert_no_mix(&when);
            left.store(usize::MAX, SeqCst);
            let sent = area.assert_converges(&when) as usize;
            (sent + cut).saturating_sub(all)
        };
        let again = (0..3).map(lost).find(|again| *again < IN_FLIGHT);
        assert!(again.is_some(), "{when}: more was sent again than may have been under way");
    }
}

#[test]
fn h34_a_connection_to_lockstep_is_cut_at_any_byte_and_gone_on_with() {
    cut_at_any_byte(Far::Lockstep);
}

#[test]
fn h34_a_connection_to_a_stock_server_is_cut_at_any_byte_and_gone_on_with() {
    cut_at_any_byte(Far::Stock);
}

#[test]
fn s24_a_link_that_fails_again_and_again_loses_nothing_and_spoils_nothing() {
    let proxies: [Proxy; 2] = [proxy::cutting, proxy::spoiling];
    for (far, proxy) in BOTH.into_iter().zip(proxies) {
        let (area, left) = through(proxy, far);
        area.reset();
        // Each run gets a bit further; none of them publishes what it has not proven, and each says that it failed.
        let mut runs = 0;
        loop {
            runs += 1;
            assert!(runs < 10, "{far:?} never ends");
            left.store(4_500_000, SeqCst);
            let output = area.push("new", &["--wait", "30"]);
            if output.status.success() {
                break;
            }
            ends(&output, 75, &[]);
            area.assert_no_mix(&format!("{far:?} after {runs} runs"));
        }
        assert!(runs > 1, "{far:?}: nothing failed");
        left.store(usize::MAX, SeqCst);
        assert_eq!(area.assert_converges(&format!("{far:?} in the end")), 0);
    }
}

fn killed_sender(far: Far, calls: &[(&str, &[usize])]) {
    let area = Area::start(far).with_template();
    let mut killed = 0;
    for &(call, points) in calls {
        for point in points {
            let when = format!("sender to {far:?} killed at {call} number {point}");
            area.reset();
            let mut strace = area.sshd.command();
            let program = std::mem::replace(&mut strace, Command::new("strace"));
            strace.current_dir(program.get_current_dir().unwrap());
            strace.envs(program.get_envs().filter_map(|(name, value)| Some((name, value?))));
            let inject = format!("inject={call}:signal=SIGKILL:when={point}");
            strace.args(["-f", "-qq", "-o", "/dev/null", "-e", &format!("trace={call}"), "-e", &inject]);
            strace.arg(env!("CARGO_BIN_EXE_lockstep")).args(area.command("new", &[]));
            let output = strace.output().expect("strace is not installed: Debian package strace");
            killed += usize::from(output.status.signal() == Some(9) || output.status.code() == Some(137));
            area.assert_no_mix(&when);
            area.assert_converges(&when);
        }
    }
    assert!(killed >= 5, "only {killed} runs were killed");
}

#[test]
fn h32_a_sender_to_lockstep_that_is_killed_leaves_old_or_new_and_the_next_goes_on() {
    killed_sender(Far::Lockstep, &[("sendto", &[5, 9, 13, 24, 40, 60]), ("openat2", &[2, 5])]);
}

#[test]
fn h32_a_sender_to_a_stock_server_that_is_killed_leaves_old_or_new_and_the_next_goes_on() {
    killed_sender(Far::Stock, &[("sendto", &[9, 13, 40, 80, 120]), ("openat2", &[2, 5])]);
}

/// `fault` happens to calls of the receiver, from those points on or at them.
fn failing_receiver(far: Far, fault: &str, codes: &[i32], calls: &[(&str, &[&str])]) {
    // The receiver's strace is configured; the old version is brought by one without it.
    let template = Area::start(far).with_template();
    let mut failed = 0;
    for &(call, points) in calls {
        for point in points {
            let when = format!("{far:?} receiver: {fault} at {call} number {point}");
            let mut area = Area::new(far, Sshd::only(&far.injected(call, &format!("{fault}:when={point}"))), "target");
            done(&Command::new("cp").arg("-a").args([template.sshd.path("template"), area.at()]).output().unwrap());
            let output = area.push("new", &[]);
            failed += usize::from(!output.status.success());
            let code = output.status.code().unwrap();
            assert!(code == 0 || codes.contains(&code), "{when}: {}", text(&output));
            area.assert_no_mix(&when);
            // The next run meets a server that lives.
            let sound = Sshd::only(&far.subsystem());
            for name in ["old", "new", "target"] {
                fs::rename(area.sshd.path(name), sound.path(name)).unwrap();
            }
            area.sshd = sound;
            area.assert_converges(&when);
        }
    }
    assert!(failed >= calls.len(), "only {failed} runs failed");
}

#[test]
fn h32_a_lockstep_behind_sshd_that_is_killed_leaves_old_or_new_and_the_next_push_goes_on() {
    let calls: [(&str, &[&str]); 4] =
        [("pwrite64", &["1", "3"]), ("syncfs", &["1"]), ("renameat2", &["1"]), ("renameat", &["5"])];
    failing_receiver(Far::Lockstep, "signal=SIGKILL", &[75], &calls);
}

#[test]
fn h32_a_stock_server_that_is_killed_leaves_old_or_new_and_the_next_push_goes_on() {
    // OpenSSH's server seeks before it reads or writes, and names with rename.
    let calls: [(&str, &[&str]); 3] = [("lseek", &["2", "4", "6", "9"]), ("rename", &["1", "3"]), ("unlink", &["1"])];
    failing_receiver(Far::Stock, "signal=SIGKILL", &[75], &calls);
}

#[test]
fn h30_a_stock_server_whose_disk_is_full_at_an_fsync_or_a_rename_keeps_the_old_version() {
    let calls: [(&str, &[&str]); 2] = [("fsync", &["1+"]), ("rename", &["1+", "3+"])];
    failing_receiver(Far::Stock, "error=ENOSPC", &[4, 5], &calls);
}

/// Each write to a file fails from the one on that the variable FROM says.
const FULL: &str = r#"
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>
ssize_t write(int fd, const void *data, size_t length) {
    static int count;
    ssize_t (*next)(int, const void *, size_t) = dlsym(RTLD_NEXT, "write");
    struct stat found;
    if (fstat(fd, &found) == 0 && S_ISREG(found.st_mode) && ++count >= atoi(getenv("FROM"))) {
        errno = EDQUOT;
        return -1;
    }
    return next(fd, data, length);
}
"#;

#[test]
fn h30_where_a_quota_is_used_up_at_any_write_nothing_that_is_staged_keeps_the_next_run_away() {
    let library = tempfile::tempdir().unwrap();
    let at = |name: &str| library.path().join(name);
    fs::write(at("full.c"), FULL).unwrap();
    done(&Command::new("cc").args(["-shared", "-fPIC", "-o"]).args([at("full.so"), at("full.c")]).output().unwrap());
    let (mut staged, mut told) = (0, 0);
    for point in 1.. {
        let mut area = Area::new(Far::Stock, Sshd::only(&Far::Stock.subsystem()), "target");
        for name in ["old/ckpt-1/weights", "new/ckpt-1/weights", "new/ckpt-2/weights"] {
            let path = area.sshd.path(name);
            let time = fs::metadata(&path).unwrap().modified().unwrap();
            fs::write(&path, name).unwrap();
            fs::File::options().write(true).open(&path).unwrap().set_modified(time).unwrap();
        }
        area.pushed("old");
        let under = format!("Subsystem sftp env LD_PRELOAD={} FROM={point} ", at("full.so").display());
        let full = Sshd::only(&Far::Stock.subsystem().replace("Subsystem sftp ", &under));
        let carry = |from: &Sshd, to: &Sshd| {
            ["old", "new", "target"].iter().for_each(|name| fs::rename(from.path(name), to.path(name)).unwrap());
        };
        carry(&area.sshd, &full);
        let sound = std::mem::replace(&mut area.sshd, full);
        let output = area.push("new", &[]);
        if output.status.success() {
            assert!(point > 8 && staged <= 4 && told >= 5, "{point} writes, {staged} were staged, {told} told why");
            return;
        }
        area.assert_no_mix(&format!("at write {point}"));
        let staging = area.at().join(".lockstep/staging/sftp");
        // What is written down as about to be published is finished by the next run.
        assert!(!staging.exists() || staging.join("commit").exists(), "at write {point}: {}", text(&output));
        staged += usize::from(staging.exists());
        told += usize::from(text(&output).contains("quota"));
        println!("{point}: {}", text(&output));
        carry(&area.sshd, &sound);
        area.sshd = sound;
        area.assert_converges(&format!("at write {point}"));
    }
}

#[test]
fn h30_a_small_disk_that_fills_up_keeps_the_old_version_and_is_left_with_room() {
    for far in BOTH {
        let area = Area::new(far, Sshd::small(20 << 20, &far.subsystem()), "small/target");
        let seen = area.sshd.seen("small/target");
        area.pushed("old");
        let old = contents(&area.sshd.path("old"));
        assert!(contents(&seen) == old, "{far:?}");
        // Refused with numbers where it can be foreseen, and when the disk says so where it is not looked at.
        fs::write(area.sshd.path("new/huge"), vec![7; 24 << 20]).unwrap();
        let foreseen = if far == Far::Lockstep { "are free" } else { "" };
        for (more, said) in [(&[][..], foreseen), (&["--ignore-free-space"], "")] {
            let output = area.push("new", more);
            ends(&output, 5, &[said]);
            let text = text(&output).to_lowercase();
            assert!(
                text.contains("full") || text.contains("space") || text.contains("free"),
                "{far:?} does not say why: {text}"
            );
            assert!(contents(&seen) == old, "{far:?}: the old version was touched");
            // What the server still has open when its client is gone is freed when it ends.
            until("room on the disk", || {
                let room = rustix::fs::statvfs(&seen).unwrap();
                room.f_bavail * room.f_frsize > 13 << 20
            });
        }
        // With room again it goes on.
        fs::remove_file(area.sshd.path("new/huge")).unwrap();
        area.pushed("new");
        assert!(contents(&seen) == contents(&area.sshd.path("new")), "{far:?}");
    }
}

#[test]
fn h31_a_file_system_that_became_read_only_is_an_error_and_nothing_is_recorded() {
    for far in BOTH {
        let area = Area::new(far, Sshd::small(20 << 20, &far.subsystem()), "small/target");
        let seen = area.sshd.seen("small/target");
        area.pushed("old");
        let manifest = fs::read(seen.join(".lockstep/manifest")).unwrap();
        let small = area.sshd.path("small").display().to_string();
        let remount = |how: &str| {
            let mut mount = area.sshd.within("mount");
            mount.args(["-o", &format!("remount,{how}"), &small]);
            // The server of a push that has ended may have files open for a moment.
            until(how, || mount.output().unwrap().status.success());
        };
        remount("ro");
        let output = area.push("new", &[]);
        ends(&output, 5, &["target"]);
        let said = text(&output).to_lowercase();
        assert!(said.contains("read-only") || far == Far::Stock, "{said}");
        assert!(contents(&seen) == contents(&area.sshd.path("old")), "{far:?}");
        assert_eq!(fs::read(seen.join(".lockstep/manifest")).unwrap(), manifest, "{far:?}");
        remount("rw");
        area.pushed("new");
        assert!(contents(&seen) == contents(&area.sshd.path("new")), "{far:?}");
    }
}

#[test]
fn h35_of_two_senders_one_wins_and_the_other_waits_or_says_who_has_the_target() {
    for far in BOTH {
        let area = Area::start(far).with_template();
        area.reset();
        // One that has begun and sends nothing more for now: it is stopped.
        fs::write(area.sshd.path("new/slow"), vec![3; 6_000_000]).unwrap();
        let mut first = area.sshd.command();
        let mut first =
            first.args(area.command("new", &["--bwlimit", "4M"])).stdout(std::process::Stdio::null()).spawn().unwrap();
        let lock = if far == Far::Lockstep { "staging/current/tree/slow" } else { "staging/sftp/tree/slow" };
        until("the first to have begun", || area.at().join(".lockstep").join(lock).exists());
        let pid = rustix::process::Pid::from_child(&first);
        rustix::process::kill_process(pid, rustix::process::Signal::STOP).unwrap();
        ends(&area.push("old", &[]), 75, &["is in use by", "wait"]);
        area.assert_no_mix("while the first is stopped");
        // Who waits comes next, and what is there then is all its own.
        let waiting = std::thread::scope(|scope| {
            let waiting = scope.spawn(|| area.push("old", &["--wait", "60", "--delete", "--checksum"]));
            rustix::process::kill_process(pid, rustix::process::Signal::CONT).unwrap();
            assert!(first.wait().unwrap().success());
            waiting.join().unwrap()
        });
        done(&waiting);
        assert!(contents(&area.at()) == area.versions().0, "{far:?}");
    }
}

#[test]
fn h36_a_file_that_is_written_to_while_it_is_sent_is_not_published_until_it_rests() {
    for far in BOTH {
        let area = Area::start(far).with_template();
        area.reset();
        let stop = std::sync::atomic::AtomicBool::new(false);
        let growing = area.sshd.path("new/ckpt-1/weights");
        let output = std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(SeqCst) {
                    let mut file = fs::File::options().append(true).open(&growing).unwrap();
                    std::io::Write::write_all(&mut file, b"more").unwrap();
                    std::thread::sleep(std::time::Duration::from_millis(1));
                }
            });
            let output = area.push("new", &["--retries", "1"]);
            stop.store(true, SeqCst);
            output
        });
        ends(&output, 4, &["weights", "changed"]);
        let (old, now) = (area.versions().0, contents(&area.at()));
        // Neither it, nor the rest of its unit, nor what may say that it is there.
        for held in ["ckpt-1/weights", "ckpt-1/_SUCCESS", "latest"] {
            assert!(now[Path::new(held)] == old[Path::new(held)], "{far:?}: {held} was published");
        }
        area.assert_converges(&format!("{far:?} when it rests"));
    }
}
