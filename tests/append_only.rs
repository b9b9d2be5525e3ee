//! Files that only grow: what was sent of them is neither read nor sent again, and whoever follows one at the target goes on.

use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use lockstep::filter::{Filter, FilterSpec};
use lockstep::path::RelPath;
use lockstep::policy::PolicySpec;
use lockstep::sync::{Options, SyncReport};

use crate::daemon::Running;
use crate::kit::area::{contents, lockstep, run_traced, traced};
use crate::kit::pair::{Pair, options, rule};
use crate::kit::served::Served;
use crate::kit::{ends, noise, text, until};

const MIB: usize = 1 << 20;

/// Pushes with files that only grow.
fn growing() -> Options {
    let mut options = options();
    options.scan.append_only = vec!["*.log".into()];
    options.begin.append_only = vec!["*.log".into()];
    options
}

fn append(path: &Path, data: &[u8]) {
    // Times move by ticks.
    std::thread::sleep(Duration::from_millis(25));
    File::options().append(true).create(true).open(path).unwrap().write_all(data).unwrap();
    std::thread::sleep(Duration::from_millis(25));
}

fn inode(path: &Path) -> u64 {
    fs::metadata(path).unwrap().ino()
}

/// A log of 3 MiB that was pushed.
fn pushed() -> Pair {
    let pair = Pair::new();
    append(&pair.source.join("run.log"), &noise(1, 3 * MIB));
    pair.push(&growing());
    pair
}

impl Pair {
    /// Pushes, and sees that the target has what the source has; the rest is what was sent and whether the file is still the same one.
    fn grows(&self, options: &Options) -> (SyncReport, bool) {
        let before = inode(&self.target.join("run.log"));
        let report = self.push(options);
        assert!(report.is_complete(), "{:?}", report.problems);
        assert!(contents(&self.source) == contents(&self.target), "the target is not the source");
        assert!(fs::read_dir(self.target.join(".lockstep/staging")).is_ok_and(|mut left| left.next().is_none()));
        (report, before == inode(&self.target.join("run.log")))
    }
}

#[test]
fn what_a_file_grew_by_is_all_that_is_read_and_sent_and_it_stays_the_same_file() {
    let pair = pushed();
    let log = pair.source.join("run.log");
    for round in 0..5 {
        append(&log, &noise(round, 100_000));
        let (report, same) = pair.grows(&growing());
        assert!(same && report.transferred_bytes == 100_000, "{}", report.transferred_bytes);
        let sum = std::process::Command::new("sha256sum").arg(&log).output().unwrap();
        assert!(text(&sum).starts_with(&pair.listed("run.log").unwrap()));
        // Its mode and time are those of the source, and nothing is left to do.
        assert_eq!(pair.differences(), "");
        assert!(pair.push(&growing()).plan.actions.is_empty());
    }
    // What it held before is not read: a change there does not show until all is read.
    File::options().write(true).open(&log).unwrap().write_at(b"other", MIB as u64).unwrap();
    append(&log, b"more");
    let report = pair.push(&growing());
    assert_eq!(report.transferred_bytes, 4);
    assert!(contents(&pair.source) != contents(&pair.target));
    let mut all = growing();
    (all.scan.hash_all, all.begin.checksum) = (true, true);
    pair.grows(&all);
}

#[test]
fn what_is_not_said_to_grow_only_is_read_whole_and_replaced() {
    let pair = pushed();
    let log = pair.source.join("run.log");
    File::options().write(true).open(&log).unwrap().write_at(b"other", MIB as u64).unwrap();
    append(&log, b"more");
    let (_, same) = pair.grows(&options());
    assert!(!same);
}

#[test]
fn h36_a_pointer_is_never_read_as_far_as_it_was_once_and_what_lies_in_a_unit_neither() {
    let mut begin = growing().begin;
    begin.append_only = vec!["*".into()];
    (begin.last, begin.units) = (vec!["*.done".into()], vec!["ckpt-*/".into(), "/runs/x/".into()]);
    let rules = lockstep::sync::only_growing(&begin);
    let others = Filter::compile(&FilterSpec { rules, only: None }).unwrap();
    for (path, grows) in [
        ("run.log", true),
        ("deep/run.log", true),
        ("latest", false),
        ("deep/latest_checkpointed_iteration.txt", false),
        ("x.done", false),
        ("ckpt-1/run.log", false),
        ("deep/ckpt-1/deep/run.log", false),
        ("runs/x/run.log", false),
        ("runs/y/run.log", true),
    ] {
        assert_eq!(others.admits(&RelPath::new(path).unwrap(), false), !grows, "{path}");
    }
    begin.append_only.clear();
    assert!(lockstep::sync::only_growing(&begin).is_empty());
}

#[test]
fn h36_a_log_that_was_rotated_is_sent_whole() {
    type Rotate = fn(&Path);
    let rotations: [(&str, Rotate); 4] = [
        ("a new file under its name", |log| {
            fs::rename(log, log.with_extension("old")).unwrap();
            append(log, &noise(7, 4 * MIB));
        }),
        ("cut off and written again", |log| {
            File::options().write(true).open(log).unwrap().set_len(0).unwrap();
            append(log, &noise(7, 4 * MIB));
        }),
        ("shorter than it was", |log| File::options().write(true).open(log).unwrap().set_len(2 << 20).unwrap()),
        ("empty", |log| File::options().write(true).open(log).unwrap().set_len(0).unwrap()),
    ];
    for (what, rotate) in rotations {
        let pair = pushed();
        let log = pair.source.join("run.log");
        append(&log, b"more");
        pair.grows(&growing());
        std::thread::sleep(Duration::from_millis(25));
        rotate(&log);
        let (_, same) = pair.grows(&growing());
        assert!(!same, "{what}");
        append(&log, &noise(8, 2 * MIB));
        pair.grows(&growing());
    }
}

#[test]
fn where_something_speaks_against_it_the_file_is_replaced_as_a_whole() {
    type Change = fn(&Pair, &mut Options) -> PolicySpec;
    let none = |_: &Pair, _: &mut Options| PolicySpec::default();
    let cases: [(&str, bool, Change); 8] = [
        ("nothing", true, none),
        ("another name of it there", false, |pair, _| {
            fs::hard_link(pair.target.join("run.log"), pair.target.with_extension("other")).unwrap();
            PolicySpec::default()
        }),
        ("another mode that it is to have", false, |_, _| PolicySpec { rules: vec![rule("*.log", "600")] }),
        ("an execute bit", false, |_, _| PolicySpec { rules: vec![rule("*.log", "744")] }),
        ("what lies on the disk is to be verified", false, |_, options| {
            options.begin.verify_disk = true;
            PolicySpec::default()
        }),
        ("it is published last", false, |_, options| {
            options.begin.last = vec!["run.log".into()];
            PolicySpec::default()
        }),
        ("somebody wrote to it there", false, |pair, _| {
            append(&pair.target.join("run.log"), b"theirs");
            PolicySpec::default()
        }),
        ("what is replaced is put aside", true, |_, options| {
            options.begin.trash_seconds = Some(1000);
            PolicySpec::default()
        }),
    ];
    for (what, expected, change) in cases {
        let pair = pushed();
        let (mut options, before) = (growing(), fs::read(pair.target.join("run.log")).unwrap());
        let policy = change(&pair, &mut options);
        append(&pair.source.join("run.log"), &noise(2, MIB));
        let was = inode(&pair.target.join("run.log"));
        let report = pair.push_with(&options, policy).unwrap();
        assert!(report.is_complete(), "{what}: {:?}", report.problems);
        assert_eq!(was == inode(&pair.target.join("run.log")), expected, "{what}");
        assert!(contents(&pair.source) == contents(&pair.target), "{what}");
        let other = pair.target.with_extension("other");
        assert!(!other.exists() || fs::read(other).unwrap() == before, "{what}");
    }
    // What is new of it has another name there too.
    let pair = pushed();
    fs::hard_link(pair.source.join("run.log"), pair.source.join("run.log.2")).unwrap();
    append(&pair.source.join("run.log"), b"more");
    let (_, same) = pair.grows(&growing());
    assert!(!same && inode(&pair.target.join("run.log")) == inode(&pair.target.join("run.log.2")));
    // Where it is a part of something that is published whole.
    let pair = Pair::new();
    fs::create_dir(pair.source.join("run-1")).unwrap();
    let log = pair.source.join("run-1/run.log");
    append(&log, &noise(1, 3 * MIB));
    let mut options = growing();
    options.begin.units = vec!["run-*/".into()];
    pair.push(&options);
    let was = inode(&pair.target.join("run-1/run.log"));
    append(&log, b"more");
    pair.push(&options);
    assert!(was != inode(&pair.target.join("run-1/run.log")) && contents(&pair.source) == contents(&pair.target));
}

#[test]
fn a_target_that_is_behind_catches_up_from_where_it_is() {
    let pair = pushed();
    let log = pair.source.join("run.log");
    let behind = Pair::new();
    let to_other = |options: &Options| {
        let source = lockstep::endpoint::local::LocalSource::new(&pair.source, Some(&pair.state)).unwrap();
        let target = lockstep::endpoint::local::LocalTarget::new(&behind.target, PolicySpec::default());
        let monitor = lockstep::monitor::Silent::default();
        lockstep::sync::run(&source, &target, options, &monitor, &AtomicBool::new(false)).unwrap()
    };
    to_other(&growing());
    for round in 0..3 {
        append(&log, &noise(round, 50_000));
        assert_eq!(pair.grows(&growing()).0.transferred_bytes, 50_000);
    }
    assert_eq!(to_other(&growing()).transferred_bytes, 150_000);
    assert!(contents(&pair.source) == contents(&behind.target));
    // So far behind that it is not known any more what it has: that is found out as for any other file.
    for round in 0..6 {
        append(&log, &noise(round, 50_000));
        assert_eq!(pair.grows(&growing()).0.transferred_bytes, 50_000);
    }
    let was = inode(&behind.target.join("run.log"));
    assert_eq!(to_other(&growing()).transferred_bytes, 300_000);
    assert!(contents(&pair.source) == contents(&behind.target));
    assert_eq!(was, inode(&behind.target.join("run.log")));
}

#[test]
fn of_a_large_log_only_the_sums_of_what_it_holds_now_are_kept() {
    let pair = Pair::new();
    append(&pair.source.join("run.log"), &noise(1, 70 * MIB));
    let mut part = growing();
    for filter in [&mut part.scan.filter, &mut part.begin.filter] {
        filter.only = Some(vec![b"run.log".to_vec()]);
    }
    pair.push(&growing());
    for options in [growing(), part, growing()] {
        append(&pair.source.join("run.log"), b"more");
        let (report, same) = pair.grows(&options);
        assert!(same && report.transferred_bytes == 4);
        let kept: Vec<_> = fs::read_dir(pair.target.join(".lockstep/sums")).unwrap().flatten().collect();
        assert_eq!(kept.len(), 1);
        assert_eq!(kept[0].file_name().to_str(), pair.listed("run.log").as_deref());
    }
}

#[test]
fn a_log_that_is_written_to_all_the_time_is_sent_as_far_as_it_was_listed() {
    let pair = pushed();
    let (log, stop) = (pair.source.join("run.log"), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let mut file = File::options().append(true).open(&log).unwrap();
            for line in 0.. {
                if stop.load(Ordering::Relaxed) {
                    return;
                }
                writeln!(file, "line {line} of what a training run says all the time").unwrap();
            }
        });
        let reader = scope.spawn(|| {
            // Whoever follows it sees one file that grows.
            let mut longest = Vec::new();
            let file = File::open(pair.target.join("run.log")).unwrap();
            while !stop.load(Ordering::Relaxed) {
                let mut now = vec![0; file.metadata().unwrap().len() as usize];
                file.read_exact_at(&mut now, 0).unwrap();
                assert!(now.starts_with(&longest));
                longest = now;
            }
            longest
        });
        let mut sizes = Vec::new();
        for _ in 0..10 {
            let report = pair.push(&growing());
            assert!(report.is_complete(), "{:?}", report.problems);
            sizes.push(fs::metadata(pair.target.join("run.log")).unwrap().len());
        }
        stop.store(true, Ordering::Relaxed);
        writer.join().unwrap();
        let seen = reader.join().unwrap();
        assert!(sizes.is_sorted() && sizes[9] > sizes[0], "{sizes:?}");
        assert!(seen.len() > 3 * MIB && fs::read(&log).unwrap().starts_with(&seen));
    });
    pair.grows(&growing());
}

#[test]
fn h30_where_there_is_no_room_for_what_is_new_nothing_is_appended() {
    let pair = pushed();
    append(&pair.source.join("run.log"), &noise(2, 500_000));
    let (from, to) = (pair.source.display().to_string(), pair.target.display().to_string());
    let command = [lockstep(), "push", "--append-only", "*.log", &from, &to];
    let log = pair.target.with_extension("trace");
    let before = fs::read(pair.target.join("run.log")).unwrap();
    let mut full = traced("fallocate", Some("error=ENOSPC:when=1"), &log, &command);
    let output = run_traced(full.env("XDG_STATE_HOME", &pair.state));
    ends(&output, 5, &["No space left on device", "make room in", "run.log"]);
    assert!(fs::read(pair.target.join("run.log")).unwrap() == before);
    assert!(!pair.target.join(".lockstep/staging/current").exists());
    pair.grows(&growing());
    append(&pair.source.join("run.log"), &noise(3, 500_000));
    let (report, same) = pair.grows(&growing());
    assert!(same && report.transferred_bytes == 500_000);
}

#[test]
fn h32_killed_at_any_step_a_log_holds_what_it_held_or_more_of_what_is_new() {
    let pair = pushed();
    let (from, to) = (pair.source.display().to_string(), pair.target.display().to_string());
    let command = [lockstep(), "push", "--append-only", "*.log", &from, &to];
    let (log, target) = (pair.source.join("run.log"), pair.target.join("run.log"));
    let mut begun = 0;
    for call in ["fallocate", "copy_file_range", "pwrite64", "utimensat", "syncfs", "renameat", "renameat2", "unlinkat"]
    {
        for when in 1..100 {
            append(&log, &noise(when, 300_000));
            let before = fs::read(&target).unwrap();
            let signal = format!("signal=SIGKILL:when={when}");
            let mut killed = traced(call, Some(&signal), &pair.target.with_extension("trace"), &command);
            let output = run_traced(killed.env("XDG_STATE_HOME", &pair.state));
            let (now, new) = (fs::read(&target).unwrap(), fs::read(&log).unwrap());
            assert!(now.starts_with(&before) && new.starts_with(&now), "{call} {when}: {}", text(&output));
            begun += u32::from(now.len() > before.len() && !output.status.success());
            pair.grows(&growing());
            if output.status.success() {
                break;
            }
        }
    }
    assert!(begun > 3, "{begun}");
    assert_eq!(pair.differences(), "");
}

#[test]
fn a_served_log_grows_over_the_network_and_by_its_right_alone() {
    let served = Served::start("", "");
    let source = served.path("source");
    fs::create_dir(&source).unwrap();
    append(&source.join("run.log"), &noise(1, 6 * MIB));
    fs::set_permissions(source.join("run.log"), fs::Permissions::from_mode(0o644)).unwrap();
    let push = |more: &[&str]| {
        let from = source.display().to_string();
        let line = [&["push", "--json", "--append-only", "*.log", &from, "sync@127.0.0.1:/data"], more].concat();
        let output = served.lockstep(&line, "sync");
        assert!(output.status.success(), "{}", text(&output));
        let summary = text(&output);
        let summary = summary.lines().find(|line| line.contains("\"summary\"")).unwrap();
        let summary: serde_json::Value = serde_json::from_str(summary).unwrap();
        assert!(contents(&source) == contents(&served.path("sync/data")));
        (summary["wire_bytes"].as_u64().unwrap(), inode(&served.path("sync/data/run.log")))
    };
    let (_, first) = push(&[]);
    for round in 0..3 {
        append(&source.join("run.log"), &noise(round, MIB));
        let (wire, now) = push(&[]);
        assert!(now == first && wire < 2 * MIB as u64, "{wire}");
    }
    // What is fetched is read by the other machine.
    let fetched = served.path("fetched").display().to_string();
    let output = served.lockstep(&["pull", "--append-only", "*.log", "sync@127.0.0.1:/data", &fetched], "sync");
    ends(&output, 2, &["--append-only is for push"]);
}

#[test]
fn s28_a_daemon_follows_a_log_that_is_never_closed_to_several_targets() {
    let job = "[[job]]\nname = \"logs\"\nsource = \"AT/source\"\ntargets = [\"AT/one\", \"AT/two\", \"AT/three\"]\nsettle = \"200ms\"\n\
               append_only = true\n";
    let running = Running::new(job, |at| append(&at.join("source/run.log"), &noise(1, 2 * MIB)), vec![]);
    let targets = ["one", "two", "three"].map(|name| running.path(name).join("run.log"));
    targets.iter().for_each(|target| until("the first", || target.exists()));
    let inodes = targets.each_ref().map(|target| inode(target));
    let mut log = File::options().append(true).open(running.path("source/run.log")).unwrap();
    let mut written = fs::metadata(running.path("source/run.log")).unwrap().len();
    for round in 0..4 {
        // It is written to all the while, and what was written a while ago arrives.
        let reached = |least: u64| targets.iter().all(|target| fs::metadata(target).unwrap().len() >= least);
        let least = written + 1;
        until("more of it", || {
            log.write_all(&noise(round, 1000)).unwrap();
            written += 1000;
            reached(least)
        });
    }
    let all = fs::read(running.path("source/run.log")).unwrap();
    targets.iter().for_each(|target| until("all of it", || fs::read(target).unwrap() == all));
    assert_eq!(inodes, targets.each_ref().map(|target| inode(target)));
}
