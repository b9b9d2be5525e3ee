//! A disk that is full, fails or is read-only, made to be so with strace, and the order in which things get to it.

use std::fs;
use std::process::Output;

use crate::kit::area::{Area, contents, lockstep, run_traced, traced};
use crate::kit::{ends, text};

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
    assert_order(&fs::read_to_string(area.path("log")).unwrap());
}

/// Looks at the calls of a run that brought the new version of an area.
pub(crate) fn assert_order(log: &str) {
    let calls: Vec<&str> = log.lines().filter_map(|line| Some(line.split_once(' ')?.1.trim_start())).collect();
    let at = |wanted: &dyn Fn(&str) -> bool, what: &str| -> usize {
        calls.iter().position(|call| wanted(call)).unwrap_or_else(|| panic!("{what} is not in {log}"))
    };
    let last = |wanted: &dyn Fn(&str) -> bool| calls.iter().rposition(|call| wanted(call)).unwrap();
    let is = |call: &str, name: &str| call.starts_with(name);
    // Digests of the source are stored meanwhile, elsewhere.
    let written = last(&|call| is(call, "pwrite64(") && call.contains("/target/.lockstep/"));
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
fn h33_a_new_tree_is_stored_whole_before_it_has_its_name_and_its_name_before_the_run_ends() {
    let area = Area::new();
    fs::remove_dir_all(area.path("target")).unwrap();
    let output = area.injected("syncfs,fsync,renameat,renameat2", None);
    assert!(output.status.success(), "{}", text(&output));
    let log = fs::read_to_string(area.path("log")).unwrap();
    let named = log.lines().position(|line| line.contains("RENAME_NOREPLACE") && line.contains("\"target\""));
    let named = named.unwrap_or_else(|| panic!("the tree gets no name: {log}"));
    let is = |line: &str, call: &str| line.split_whitespace().nth(1).is_some_and(|first| first.starts_with(call));
    let lines: Vec<&str> = log.lines().collect();
    // The manifest is in force, on the disk, before the tree is seen. (The table of digests proves itself.)
    let in_force = |line: &&str| is(line, "renameat(") && line.matches("\"manifest\"").count() == 2;
    let last = lines[..named].iter().rposition(in_force).unwrap();
    assert!(lines[last..named].iter().any(|line| is(line, "fsync(") || is(line, "syncfs(")), "{log}");
    assert!(lines[..named].iter().any(|line| is(line, "syncfs(")), "{log}");
    assert!(lines[named..].iter().any(|line| is(line, "fsync(")), "the name is not brought to the disk: {log}");
}

#[test]
fn a_file_system_without_the_flags_of_renameat2_takes_all_but_a_unit_that_changes() {
    let at = tempfile::tempdir().unwrap();
    let path = |name: &str| at.path().join(name);
    fs::create_dir_all(path("source/unit-1")).unwrap();
    fs::write(path("source/unit-1/weights"), "old").unwrap();
    let push = || -> Output {
        let (source, target) = (path("source"), path("target"));
        let command = ["push", "-q", "--unit", "unit-*/", source.to_str().unwrap(), target.to_str().unwrap()];
        let command = [&[lockstep()][..], &command].concat();
        // As FUSE and NFS answer.
        let mut strace = traced("renameat2", Some("error=EINVAL"), &path("log"), &command);
        run_traced(strace.env("HOME", at.path()).env_remove("XDG_STATE_HOME"))
    };
    // A root and a unit that are new appear.
    ends(&push(), 0, &[]);
    assert_eq!(fs::read(path("target/unit-1/weights")).unwrap(), b"old");
    fs::write(path("source/unit-1/weights"), "changed").unwrap();
    fs::create_dir(path("source/unit-2")).unwrap();
    fs::write(path("source/unit-2/weights"), "new").unwrap();
    for _ in 0..2 {
        ends(&push(), 4, &["unit-1", "cannot exchange two directories in one step", "give it a new name"]);
        assert_eq!(fs::read(path("target/unit-1/weights")).unwrap(), b"old");
        assert_eq!(fs::read(path("target/unit-2/weights")).unwrap(), b"new");
    }
    let verify =
        std::process::Command::new(lockstep()).args(["manifest", "verify"]).arg(path("target")).output().unwrap();
    ends(&verify, 0, &[]);
}
