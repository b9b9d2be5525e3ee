//! The whole pipeline between two directories of this machine.

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::AtomicBool;

use lockstep::endpoint::local::{LocalSource, LocalTarget};
use lockstep::endpoint::{BeginOptions, Error};
use lockstep::manifest::format;
use lockstep::monitor::{Counters, Event, Monitor, Silent};
use lockstep::plan::safety::DeleteLimit;
use lockstep::policy::{PolicySpec, RuleSpec};
use lockstep::sync::{Options, run};

use crate::kit::pair::{Pair, mode_of, options, rule};

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
    assert_eq!(again.plan.actions.as_slice(), []);
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
    assert_eq!(pair.push_with(&options(), policy).unwrap().plan.actions.as_slice(), []);
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
