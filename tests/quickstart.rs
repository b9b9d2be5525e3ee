//! The tour, as somebody sees it who has just built the program.

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _};
use std::net::TcpStream;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// Nothing but a place for temporary files: no HOME, no configuration.
fn quickstart(temporary: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lockstep"));
    command.arg("quickstart").env_clear().env("PATH", "/usr/bin:/bin").env("TMPDIR", temporary);
    command
}

fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

fn port(text: &str) -> u16 {
    let digits = text.split("--listen 127.0.0.1:").nth(1).unwrap().split(' ').next().unwrap();
    digits.parse().unwrap()
}

fn is_empty(directory: &Path) -> bool {
    fs::read_dir(directory).unwrap().next().is_none()
}

/// Every path below with what would show a change.
fn snapshot(directory: &Path) -> Vec<(PathBuf, u32, i64, i64, u64)> {
    let entries = walkdir::WalkDir::new(directory).sort_by_file_name().into_iter().map(Result::unwrap);
    let seen = entries.map(|entry| {
        let metadata = entry.metadata().unwrap();
        (entry.into_path(), metadata.mode(), metadata.ctime(), metadata.ctime_nsec(), metadata.size())
    });
    seen.collect()
}

#[test]
fn s29_the_tour_shows_and_proves_everything_and_leaves_nothing() {
    let temporary = tempfile::tempdir().unwrap();
    let output = quickstart(temporary.path()).output().unwrap();
    let text = said(&output);
    assert_eq!(output.status.code(), Some(0), "{text}");
    assert!(output.stderr.is_empty(), "{text}");
    for part in [
        "$ lockstep push sample sync@127.0.0.1:/sample",
        "-> 0600  checkpoint-1000/model-00001-of-00002.safetensors and 1 more",
        "-> 0600  labels.txt",
        "-> 1774  logs",
        "-> 0755  train.sh",
        "-> 0750  train.py",
        "-> 0744  update.bin",
        "<fcst...... dataset/part-042.jsonl\n   Only that file was sent",
        "309 files: OK",
        ": differs: SHA-256",
        "exit 1",
        "1 file sent; the check says good again",
        "unbroken",
        "takes four commands",
    ] {
        assert!(text.contains(part), "{part} is not in\n{text}");
    }
    assert!(!text.contains('\x1b') && !text.contains('\r') && !text.contains(" 0 B"), "{text}");
    assert!(is_empty(temporary.path()), "{text}");
    assert!(TcpStream::connect(("127.0.0.1", port(&text))).is_err(), "the server still listens");
}

#[test]
fn a_directory_of_the_user_is_only_read() {
    let (temporary, home) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let own = home.path().join("own data");
    fs::create_dir_all(own.join("sub")).unwrap();
    fs::write(own.join("sub/model.safetensors"), vec![1; 300_000]).unwrap();
    fs::write(own.join("-n odd\n"), "x").unwrap();
    std::os::unix::fs::symlink("sub", own.join("link")).unwrap();
    let before = snapshot(home.path());
    let output = quickstart(temporary.path()).env("HOME", home.path()).arg("--keep").arg(&own).output().unwrap();
    let text = said(&output);
    assert_eq!(output.status.code(), Some(0), "{text}");
    assert!(text.contains("0600  sub/model.safetensors") && text.contains("2 files: OK"), "{text}");
    assert_eq!(snapshot(home.path()), before);
    let kept = text.split("Kept in ").nth(1).unwrap().trim();
    assert!(Path::new(kept).starts_with(temporary.path()));
    assert_eq!(fs::read(Path::new(kept).join("server/data/sub/model.safetensors")).unwrap(), vec![1; 300_000]);
}

#[test]
fn what_cannot_be_shown_is_said_and_leaves_nothing() {
    let (temporary, empty) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let output = quickstart(temporary.path()).arg(empty.path()).output().unwrap();
    assert_eq!(output.status.code(), Some(2), "{}", said(&output));
    assert!(said(&output).contains("holds no file"), "{}", said(&output));
    let missing = quickstart(temporary.path()).arg(empty.path().join("x")).output().unwrap();
    assert_eq!(missing.status.code(), Some(5), "{}", said(&missing));
    fs::write(empty.path().join("file"), "").unwrap();
    let file = quickstart(temporary.path()).arg(empty.path().join("file")).output().unwrap();
    assert_eq!(file.status.code(), Some(2), "{}", said(&file));
    assert!(file.stdout.is_empty() && said(&file).contains("is not a directory"), "{}", said(&file));
    assert!(is_empty(temporary.path()));
}

#[test]
fn a_signal_ends_the_tour_and_its_server_and_leaves_nothing() {
    let temporary = tempfile::tempdir().unwrap();
    let mut child = quickstart(temporary.path()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap());
    let mut text = String::new();
    while !text.contains("2. The first push") {
        assert_ne!(lines.read_line(&mut text).unwrap(), 0, "{text}");
    }
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    let _ = lines.read_to_string(&mut text);
    assert_eq!(child.wait().unwrap().code(), Some(143), "{text}");
    assert!(is_empty(temporary.path()), "{text}");
    assert!(TcpStream::connect(("127.0.0.1", port(&text))).is_err(), "the server still listens");
}
