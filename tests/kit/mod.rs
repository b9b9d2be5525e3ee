//! What the tests share: servers to talk to, and ways to look at what they did.

use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

pub(crate) mod agent;
pub(crate) mod area;
pub(crate) mod own;
pub(crate) mod pair;
pub(crate) mod ports;
pub(crate) mod proxy;
pub(crate) mod python;
pub(crate) mod raw;
pub(crate) mod served;
pub(crate) mod slurm;
pub(crate) mod sshd;
pub(crate) mod weights;

/// All that a command said.
pub(crate) fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// What a run with `--json` says at its end.
pub(crate) fn summary(output: &Output) -> serde_json::Value {
    let text = text(output);
    let line = text.lines().find(|line| line.contains("\"summary\"")).unwrap_or_else(|| panic!("{text}"));
    serde_json::from_str(line).unwrap()
}

/// Bytes that nothing makes smaller, the same each time.
pub(crate) fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut bytes);
    bytes
}

/// How a command ended, and words that it said.
#[track_caller]
pub(crate) fn ends(output: &Output, code: i32, words: &[&str]) {
    let text = text(output);
    assert_eq!(output.status.code(), Some(code), "{text}");
    for word in words {
        assert!(text.contains(word), "'{word}' is not in: {text}");
    }
}

#[track_caller]
pub(crate) fn done(output: &Output) {
    assert!(output.status.success(), "{}", text(output));
}

/// Polls until `done`; a test that waits too long fails with what it waited for.
pub(crate) fn until(what: &str, mut done: impl FnMut() -> bool) {
    let started = Instant::now();
    while !done() {
        assert!(started.elapsed() < Duration::from_secs(20), "waited too long for {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Waits until a process that was sent SIGSTOP has stopped, with all its threads.
pub(crate) fn stops(pid: u32) {
    until("it to stop", || {
        let threads = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
        let stopped = |stat: String| stat.rsplit(')').next().is_some_and(|rest| rest.starts_with(" T"));
        threads.flatten().all(|thread| fs::read_to_string(thread.path().join("stat")).is_ok_and(stopped))
    });
}

/// Runs ssh-keygen in a directory.
#[track_caller]
pub(crate) fn keygen(at: &Path, arguments: &[&str]) {
    let output = Command::new("ssh-keygen").arg("-q").args(arguments).current_dir(at).stdin(Stdio::null()).output();
    let output = output.expect("ssh-keygen is not installed: Debian package openssh-client");
    assert!(output.status.success(), "ssh-keygen {arguments:?}: {}", text(&output));
}

/// A key without a passphrase.
pub(crate) fn key(at: &Path, name: &str) {
    keygen(at, &["-t", "ed25519", "-N", "", "-C", name, "-f", name]);
}

/// Who runs the tests.
pub(crate) fn account() -> String {
    String::from_utf8(Command::new("id").arg("-un").output().unwrap().stdout).unwrap().trim().to_owned()
}

/// Type and base64 text of a public key file.
pub(crate) fn public(file: &Path) -> String {
    fs::read_to_string(file).unwrap().split(' ').take(2).collect::<Vec<_>>().join(" ").trim().to_owned()
}

/// rsync's opinion, by content and metadata; times to the second, and not those of links and of the root.
#[track_caller]
pub(crate) fn assert_same(a: &Path, b: &Path) {
    let different = differences(a, b, &["--modify-window=1"]);
    let different: Vec<_> = different.iter().filter(|line| !line.starts_with(".L..t")).collect();
    assert!(different.is_empty(), "{different:#?}");
}

/// What rsync would have to change. The root itself keeps its own mode and time.
pub(crate) fn differences(a: &Path, b: &Path, more: &[&str]) -> Vec<String> {
    let output = Command::new("rsync")
        .args(["-naHic", "--delete", "--exclude=/.lockstep"])
        .args(more)
        .args([a.join(""), b.join("")])
        .output()
        .expect("rsync is not installed: Debian package rsync");
    assert!(output.status.success(), "{}", text(&output));
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    said.lines().filter(|line| !line.ends_with(" ./")).map(str::to_owned).collect()
}
