//! What must never read as good, or be read by more people than may: as somebody tried it.

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::Path;
use std::process::{Command, Output, Stdio};

use crate::check::{check, look, published};
use crate::kit::area::lockstep;
use crate::kit::pair::{Pair, mode_of, options};
use crate::kit::{done, ends, key, public};

#[test]
fn h62_a_timeout_ends_a_check_whose_words_nobody_can_read() {
    let pair = Pair::new();
    fs::create_dir_all(&pair.source).unwrap();
    fs::File::create(pair.source.join("huge")).unwrap().set_len(1 << 40).unwrap();
    let list = pair.source.with_file_name("list");
    fs::write(&list, format!("{}  huge\n", "0".repeat(64))).unwrap();
    let full = fs::File::options().write(true).open("/dev/full").unwrap();
    let mut command = Command::new(lockstep());
    command.args(["check", "--timeout=1", "--against"]).arg(&list).arg(&pair.source);
    let ended = command.stdout(Stdio::null()).stderr(full).status().unwrap();
    assert_eq!(ended.code(), Some(75));
}

#[test]
fn a_verdict_stands_only_for_what_it_asked() {
    let pair = published();
    let cached = |more: &[&str]| check(&pair.target, &[&["--cached", "--max-age=1h"], more].concat());
    done(&check(&pair.target, &[]));
    done(&cached(&[]));
    ends(&cached(&["--marker=_SUCCESS"]), 1, &["no verdict stands", "_SUCCESS"]);
    ends(&cached(&["--layout=huggingface"]), 1, &["no verdict stands", "another layout"]);
    done(&check(&pair.target, &["--layout=none"]));
    ends(&cached(&[]), 1, &["no verdict stands", "another layout"]);
    done(&cached(&["--layout=none"]));
}

#[test]
fn h61_what_one_check_excused_as_its_signature_the_next_does_not() {
    let pair = published();
    let outer = pair.target.parent().unwrap();
    key(outer, "alice");
    fs::write(outer.join("allowed"), format!("alice@x {}\n", public(&outer.join("alice.pub")))).unwrap();
    let signature = pair.target.join("data/m.sig");
    let run = |arguments: &[&str]| -> Output {
        let mut command = Command::new(lockstep());
        command.args(arguments).arg(&pair.target).current_dir(outer).env("HOME", outer).output().unwrap()
    };
    let at = signature.to_str().unwrap();
    done(&run(&["manifest", "sign", "--key", "alice", "--output", at]));
    std::thread::sleep(std::time::Duration::from_millis(30));
    let trust = ["check", "--require-signature", "--allowed-signers", "allowed", "--signature", at];
    done(&run(&trust));
    for depth in [&["check"][..], &["check", "--quick"], &["check", "--full"]] {
        ends(&run(depth), 1, &["unlisted: data/m.sig"]);
    }
}

#[test]
fn a_tree_that_changes_under_the_check_is_to_be_checked_again() {
    let pair = published();
    let target = pair.target.clone();
    // Reading is held up, so that the change falls into it.
    let mut strace = Command::new("strace");
    strace.args(["-f", "-qq", "-o", "/dev/null", "-e", "trace=read", "-e", "inject=read:delay_enter=300000"]);
    strace.args([lockstep(), "check", "--full"]).arg(&target).stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = strace.spawn().expect("strace is not installed: Debian package strace");
    let verdict = target.join(".lockstep/verdict.json");
    assert!(!verdict.exists());
    std::thread::sleep(std::time::Duration::from_millis(1200));
    let file = fs::File::options().write(true).open(target.join("data/b.bin")).unwrap();
    file.set_modified(std::time::SystemTime::now()).unwrap();
    let code = child.wait().unwrap().code();
    // Where the change came too early or too late it is found, or was not there: never is it good and wrong.
    assert!(matches!(code, Some(75 | 0)), "{code:?}");
    ends(&check(&target, &["--full"]), 0, &["good"]);
}

#[test]
fn what_is_kept_of_a_check_is_for_those_who_may_read_the_manifest() {
    let pair = published();
    let kept = |name: &str| mode_of(&pair.target.join(".lockstep").join(name));
    fs::set_permissions(&pair.target, Permissions::from_mode(0o755)).unwrap();
    look(&pair.target);
    assert_eq!((kept("manifest"), kept("verdict.json"), kept("index"), kept("digests")), (0o644, 0o644, 0o644, 0o644));
    // Who may not list the directory learns nothing from what lies in it.
    fs::set_permissions(&pair.target, Permissions::from_mode(0o711)).unwrap();
    pair.write("more", b"more");
    assert!(pair.push(&options()).is_complete());
    look(&pair.target);
    assert_eq!((kept("manifest"), kept("verdict.json"), kept("index"), kept("digests")), (0o600, 0o600, 0o600, 0o600));
}

#[test]
fn who_receives_goes_on_after_root_has_checked() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("not root: whose files a check makes is not tested");
        return;
    }
    let pair = published();
    let mut chown = Command::new("chown");
    done(&chown.args(["-R", "65534:65534"]).arg(&pair.target).output().unwrap());
    let owners = || {
        let names = ["audit.head", "audit.jsonl"].map(|name| pair.target.join(".lockstep").join(name));
        names.map(|name| std::os::unix::fs::MetadataExt::uid(&fs::metadata(name).unwrap()))
    };
    // As root with all rights, and as the unit has it, without the one to give files away.
    for rights in [&["--bounding-set=+all"][..], &["--bounding-set=-chown"]] {
        let before = fs::read(pair.target.join(".lockstep/audit.head")).unwrap();
        let mut command = Command::new("setpriv");
        command.args(rights).args([lockstep(), "check", "--ignore-permissions"]).arg(&pair.target);
        done(&command.env("XDG_STATE_HOME", &pair.state).output().unwrap());
        assert_ne!(
            fs::read(pair.target.join(".lockstep/audit.head")).unwrap(),
            before,
            "{rights:?}: it tells of the check"
        );
        assert_eq!(owners(), [65534, 65534], "{rights:?}");
        done(&Command::new(lockstep()).args(["audit", "verify"]).arg(&pair.target).output().unwrap());
    }
}

#[test]
fn a_verdict_does_not_stand_while_something_is_published_to_what_it_is_of() {
    let pair = published();
    let cached = || check(&pair.target, &["--cached", "--max-age=1h"]);
    done(&check(&pair.target, &[]));
    done(&cached());
    // As a run leaves it that is cut off while it gives names.
    let area = pair.target.join(".lockstep/staging/current");
    fs::create_dir_all(&area).unwrap();
    for name in ["commit", "manifest"] {
        fs::write(area.join(name), "").unwrap();
    }
    ends(&cached(), 1, &["no verdict stands", "something is being published to it"]);
    fs::remove_dir_all(&area).unwrap();
    done(&cached());
}

#[test]
fn a_verdict_that_a_crash_left_empty_is_written_anew() {
    let pair = published();
    let file = pair.target.with_file_name("verdict.json");
    fs::write(&file, "").unwrap();
    let run = || check(&pair.target, &["--verdict", file.to_str().unwrap()]);
    done(&run());
    assert!(fs::read_to_string(&file).unwrap().contains("\"good\""));
    fs::write(&file, "something else").unwrap();
    ends(&run(), 2, &[]);
}

#[test]
fn a_command_is_not_started_on_a_link_that_was_turned_during_the_check() {
    let pair = published();
    let link = pair.target.with_file_name("latest");
    symlink(&pair.target, &link).unwrap();
    let exec = |command: &[&str]| {
        let mut started = Command::new(lockstep());
        started.args(["exec", "--check"]).arg(&link).arg("--").args(command);
        started.output().unwrap()
    };
    done(&exec(&["true"]));
    // A second name for a file of the tree, that takes long to be hashed.
    let slow = fs::File::create(pair.source.join("slow")).unwrap();
    slow.set_len(1 << 30).unwrap();
    pair.push(&options());
    let verdict = pair.target.join(".lockstep/verdict");
    let _ = fs::remove_file(verdict);
    let mut started = Command::new(lockstep());
    started.args(["exec", "--full", "--check"]).arg(&link).args(["--", "echo", "started"]);
    let running = started.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    std::thread::sleep(std::time::Duration::from_millis(300));
    let turned = pair.target.with_file_name("turned");
    symlink(&pair.source, &turned).unwrap();
    fs::rename(&turned, &link).unwrap();
    let output = running.wait_with_output().unwrap();
    ends(&output, 75, &["means another directory than the one that was checked"]);
    assert!(!String::from_utf8_lossy(&output.stdout).contains("started"));
}

#[test]
fn a_link_in_the_place_of_the_quarantine_is_not_followed() {
    let pair = published();
    let outer = pair.target.parent().unwrap();
    fs::create_dir(outer.join("elsewhere")).unwrap();
    symlink("elsewhere", outer.join(".quarantine")).unwrap();
    fs::remove_file(pair.target.join("top")).unwrap();
    let refused = check(&pair.target, &["--quarantine"]);
    assert_ne!(refused.status.code(), Some(0));
    assert!(pair.target.exists() && fs::read_dir(outer.join("elsewhere")).unwrap().count() == 0);
    assert!(String::from_utf8_lossy(&refused.stderr).contains("symbolic link"), "{}", crate::kit::text(&refused));
    fs::remove_file(outer.join(".quarantine")).unwrap();
    // Nor is anything moved that only holds more than is listed.
    let again = published();
    fs::write(again.target.join("being-written"), "x").unwrap();
    ends(&check(&again.target, &["--quarantine"]), 1, &["all that is listed is as it should be"]);
    assert!(again.target.exists());
}

/// Writes to a page of a file through a mapping that is dirty already.
const MAPPED: &str = r#"
import mmap, os, subprocess, sys, time
path, check = sys.argv[1], sys.argv[2:]
with open(path, "r+b") as file:
    memory = mmap.mmap(file.fileno(), 0)
    memory[0] = memory[0] ^ 1
    memory[0] = memory[0] ^ 1
    time.sleep(0.1)
    first = subprocess.run(check, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode
    memory[0] = memory[0] ^ 1
    second = subprocess.run(check, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode
    print(first, second)
"#;

#[test]
fn a_write_through_a_mapping_after_a_good_check_is_noticed() {
    let pair = published();
    if is_memory(&pair.target) {
        // There no time moves: docs/check.md says so.
        return;
    }
    std::thread::sleep(std::time::Duration::from_millis(30));
    let mut python = Command::new("python3");
    python.args(["-c", MAPPED]).arg(pair.target.join("data/b.bin")).args([lockstep(), "check"]).arg(&pair.target);
    let output = python.output().expect("python3 is not installed: Debian package python3");
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), "0 1", "{}", crate::kit::text(&output));
}

fn is_memory(path: &Path) -> bool {
    const TMPFS: i64 = 0x0102_1994;
    rustix::fs::statfs(path).unwrap().f_type as i64 == TMPFS
}

#[test]
fn h36_a_write_through_a_mapping_after_a_push_is_sent_by_the_next() {
    let pair = Pair::new();
    // On another file system: what is written down at the target writes everything out that is on the same. Who else does so
    // meanwhile hides what is to be seen here, but not each time.
    let Ok(apart) = tempfile::tempdir_in("/dev/shm") else { return };
    if is_memory(&pair.source) || !is_memory(apart.path()) {
        return;
    }
    for round in 0..5 {
        let at = |name: &str| apart.path().join(format!("{name}{round}"));
        let (source, target) = (pair.source.join(round.to_string()), at("target"));
        // As large as files are that are written through mappings.
        pair.write(&format!("{round}/mapped"), &vec![7; 3 << 20]);
        std::thread::sleep(std::time::Duration::from_millis(30));
        let mut python = Command::new("python3");
        python
            .args(["-c", MAPPED])
            .arg(source.join("mapped"))
            .args([lockstep(), "push", "-q"])
            .arg(&source)
            .arg(&target);
        let output = python.env("XDG_STATE_HOME", at("state")).output();
        let output = output.expect("python3 is not installed: Debian package python3");
        assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), "0 0", "{}", crate::kit::text(&output));
        assert_eq!(fs::read(target.join("mapped")).unwrap()[0], 7 ^ 1, "{round}");
    }
}
