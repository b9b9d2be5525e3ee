//! A stock server that is cut, changed and watched, packet by packet.

use std::fs;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use lockstep::endpoint::local::{LocalSource, LocalTarget};
use lockstep::endpoint::stock::StockTarget;
use lockstep::endpoint::{Error, Target};
use lockstep::error::Exit;
use lockstep::manifest::format;
use lockstep::monitor::Silent;
use lockstep::policy::PolicySpec;
use lockstep::sync::run;

use super::stock_pipes::{COMMAND, Hook, Pair, nothing, options, sha256};

const WRITE: u8 = 6;
const READ: u8 = 5;
const DATA: u8 = 103;
const NAME: u8 = 104;

/// A byte of the content that is sent is another one, in the first `times` packets or pieces with content.
fn flip_writes(times: usize) -> Hook {
    let left = AtomicUsize::new(times);
    Arc::new(move |packet| {
        let carries = matches!(packet.first(), Some(&(WRITE | COMMAND)));
        // Padding of an archive may stand behind it.
        let end = packet.iter().rposition(|&byte| byte != 0).map_or(0, |last| last + 1);
        let content = carries && packet[..end].ends_with(b"content");
        if content && left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok() {
            packet[end - 1] ^= 1;
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

#[test]
fn h34_where_a_command_ends_content_goes_by_sftp() {
    let mut ended = 0;
    for count in 0..40 {
        let pair = Pair::new();
        for number in 0..20 {
            pair.write(&format!("d/{number}"), format!("content {number}"));
        }
        pair.write("middle", vec![6; 600_000]);
        pair.write("large", vec![7; 5_000_000]);
        let left = AtomicUsize::new(count);
        let cut = Arc::new(AtomicUsize::new(0));
        let cuts = Arc::clone(&cut);
        // Only commands are cut, one after so many packets, and those that come after it.
        let hook: Hook = Arc::new(move |packet| {
            let go_on = packet.first() != Some(&COMMAND)
                || left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok();
            cuts.fetch_add(usize::from(!go_on), Ordering::Relaxed);
            go_on
        });
        match pair.push(hook, nothing(), true) {
            Ok(report) => {
                assert!(report.is_complete(), "after {count}: {:?}", report.problems);
                pair.in_step();
            }
            // Without the command nothing brings to the disk what it was to bring there.
            Err(error) => assert!(error.to_string().contains("stable storage"), "after {count}: {error}"),
        }
        ended += usize::from(cut.load(Ordering::Relaxed) > 0);
    }
    assert!(ended > 10, "{ended}");
}

#[test]
fn h24_a_file_that_is_hashed_there_while_it_is_sent_is_proven_like_any_other() {
    let pair = Pair::new();
    // Large enough to be followed, with a hole in it and an end that is no multiple of anything.
    let large = fs::File::create(pair.at("source").join("large")).unwrap();
    large.set_len(140 << 20).unwrap();
    for at in [0, 9 << 20, (140 << 20) - 5] {
        large.write_all_at(&vec![7; 1 << 20], at).unwrap();
    }
    large.write_all_at(b"content", 141 << 20).unwrap();
    drop(large);
    pair.write("second", vec![1; 33 << 20]);
    assert!(pair.push(nothing(), nothing(), true).unwrap().is_complete());
    pair.in_step();

    for (damaged, complete) in [(1, true), (usize::MAX, false)] {
        let mut data = fs::read(pair.at("source/large")).unwrap();
        data[77] += 1;
        pair.write("large", data);
        let before = fs::read(pair.at("target/large")).unwrap();
        let report = pair.push(flip_writes(damaged), nothing(), true).unwrap();
        assert_eq!(report.is_complete(), complete, "{:?} {:?}", report.problems, report.plan.actions);
        let now = fs::read(pair.at("target/large")).unwrap();
        assert!(now == if complete { fs::read(pair.at("source/large")).unwrap() } else { before });
    }
}

/// What a reader may see of the tree of [`versions`] at any moment.
fn assert_old_or_new(target: &Path, new: bool) {
    let latest = match fs::read(target.join("latest")) {
        Ok(latest) => latest,
        Err(_) if !target.exists() => return,
        // It may have appeared between the two.
        Err(_) => fs::read(target.join("latest")).expect("a new tree appears whole"),
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

pub(crate) fn version(pair: &Pair, step: u8) {
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
        // A thread of the client's that panics would be waited for: the link is cut instead.
        Arc::new(move |_| std::panic::catch_unwind(|| assert_old_or_new(&target, new)).is_ok())
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
    // All points would take a while; a step of thirteen meets each kind of packet.
    for (turn, at) in (3..packets.load(Ordering::Relaxed)).step_by(13).enumerate() {
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
    for (turn, at) in (3..packets.load(Ordering::Relaxed)).step_by(13).enumerate() {
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
fn h32_what_was_begun_to_be_published_is_finished_first_unless_another_has_published_since() {
    for another in [false, true] {
        let pair = Pair::new();
        version(&pair, 1);
        pair.push(nothing(), nothing(), false).unwrap();
        version(&pair, 2);
        let cut: Hook = Arc::new(|packet| {
            let rename = packet.windows(12).any(|bytes| bytes == b"posix-rename");
            !(rename && packet.ends_with(b"target/config"))
        });
        assert!(pair.push(cut, nothing(), false).is_err());
        assert!(pair.at("target/.lockstep/staging/sftp/commit").exists());
        assert_eq!(fs::read(pair.at("target/latest")).unwrap(), b"1");
        if another {
            // A run of the other kind, with other content.
            pair.write("config", "config of another");
            let source = LocalSource::new(&pair.at("source"), None).unwrap();
            let target = LocalTarget::new(&pair.at("target"), PolicySpec::default());
            run(&source, &target, &options(), &Silent::default(), &AtomicBool::new(false)).unwrap();
        }
        let target = StockTarget::new(pair.lanes(nothing(), nothing(), false, 1).unwrap());
        target.begin(&options().begin, &Silent::default()).unwrap();
        target.abort();
        assert_eq!(fs::read(pair.at("target/latest")).unwrap(), b"2");
        let expected = if another { "config of another" } else { "config of 2, longer" };
        assert_eq!(fs::read_to_string(pair.at("target/config")).unwrap(), expected);
        pair.in_step();
    }
}

#[test]
fn h32_a_link_that_takes_the_place_of_a_directory_is_not_gone_through_wherever_a_run_is_cut() {
    let changed = || {
        let pair = Pair::new();
        for path in ["unit/kept", "unit/sub/kept", "elsewhere/kept", "elsewhere/sub/kept", "file"] {
            pair.write(path, path);
        }
        pair.push(nothing(), nothing(), false).unwrap();
        fs::remove_dir_all(pair.at("source/unit")).unwrap();
        symlink("elsewhere", pair.at("source/unit")).unwrap();
        fs::remove_file(pair.at("source/file")).unwrap();
        pair.write("file/within", "a directory now");
        pair
    };
    let (counter, packets) = counting();
    changed().push(counter, nothing(), false).unwrap();
    let told = |pair: &Pair| -> Vec<String> {
        let log = fs::read_to_string(pair.at("target/.lockstep/audit.jsonl")).unwrap();
        let lines = log.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
        let lines = lines.filter(|line| line["generation"] == 2 && line["action"] != "intent");
        let mut told: Vec<String> = lines
            .map(|line| format!("{} {}", line["action"].as_str().unwrap(), line["path"].as_str().unwrap()))
            .collect();
        told.sort();
        told
    };
    let whole = changed();
    whole.push(nothing(), nothing(), false).unwrap();
    let expected = told(&whole);
    assert!(expected.contains(&"remove unit/sub/kept".to_owned()) && expected.contains(&"publish unit".to_owned()));
    let mut interrupted = 0;
    for at in (20..packets.load(Ordering::Relaxed)).step_by(2) {
        let pair = changed();
        let cut = pair.push(cut_after(at), nothing(), false);
        interrupted += usize::from(cut.is_err() && pair.at("target/.lockstep/staging/sftp/commit").exists());
        let report = pair.push(nothing(), nothing(), false).unwrap();
        assert!(report.is_complete(), "{at}: {:?}", report.problems);
        pair.in_step();
        // Each is told, and once.
        assert_eq!(told(&pair), expected, "{at}");
    }
    assert!(interrupted > 3, "{interrupted}");
}

#[test]
fn s13_what_an_interrupted_run_published_is_in_the_log_by_whom_it_was_begun() {
    for trash in [None, Some(3600)] {
        let pair = Pair::new();
        version(&pair, 1);
        pair.write("goes", "away");
        pair.push(nothing(), nothing(), false).unwrap();
        version(&pair, 2);
        fs::remove_file(pair.at("source/goes")).unwrap();
        fs::set_permissions(pair.at("source/checkpoint-1/model"), fs::Permissions::from_mode(0o640)).unwrap();
        let push = |actor: &str, hook| {
            let mut options = options();
            options.begin.trash_seconds = trash;
            options.begin.actor = actor.into();
            let source = LocalSource::new(&pair.at("source"), None).unwrap();
            let target = StockTarget::new(pair.lanes(hook, nothing(), false, 1).unwrap());
            run(&source, &target, &options, &Silent::default(), &AtomicBool::new(false))
        };
        let cut: Hook = Arc::new(|packet| {
            let rename = packet.windows(12).any(|bytes| bytes == b"posix-rename");
            !(rename && packet.ends_with(b"target/config"))
        });
        assert!(push("first@one", cut).is_err());
        assert!(push("second@two", nothing()).unwrap().is_complete());
        pair.in_step();
        let log = fs::read_to_string(pair.at("target/.lockstep/audit.jsonl")).unwrap();
        let lines: Vec<serde_json::Value> = log.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let mut told: Vec<String> = lines
            .iter()
            .filter(|line| line["actor"] == "first@one" && line["action"] != "intent")
            .map(|line| {
                format!(
                    "{} {} {}",
                    line["action"].as_str().unwrap(),
                    line["path"].as_str().unwrap(),
                    line["generation"]
                )
            })
            .collect();
        told.sort();
        let mut expected = vec![
            "metadata checkpoint-1/model 2",
            "publish checkpoint-2 2",
            "publish checkpoint-2/model 2",
            "publish checkpoint-2/optimizer 2",
            "publish checkpoint-2/sub 2",
            "publish checkpoint-2/sub/state 2",
            "publish config 2",
            "publish latest 2",
        ];
        expected.extend(match trash {
            None => &["remove goes 2"][..],
            Some(_) => &["trash config 2", "trash goes 2", "trash latest 2"],
        });
        assert_eq!(told, expected);
        let model =
            lines.iter().find(|line| line["path"] == "checkpoint-1/model" && line["action"] == "metadata").unwrap();
        assert_eq!((&model["mode"], &model["mode_before"]), (&"0640".into(), &"0644".into()), "{model}");
        assert!(!lines.iter().any(|line| line["actor"] == "second@two" && line["action"] == "publish"), "{log}");
    }
}

#[test]
fn a_change_that_the_time_of_a_young_file_hides_is_seen() {
    let pair = Pair::new();
    let soon = std::time::SystemTime::now() + std::time::Duration::from_secs(60);
    for content in ["1", "2", "3"] {
        pair.write("latest", content);
        fs::File::options().write(true).open(pair.at("source/latest")).unwrap().set_modified(soon).unwrap();
        pair.push(nothing(), nothing(), false).unwrap();
        pair.in_step();
    }
    let again = pair.push(nothing(), nothing(), false).unwrap().committed.unwrap();
    assert_eq!((again.generation, again.published), (3, 0));
}

#[test]
fn what_others_could_have_written_down_is_not_carried_out() {
    let pair = Pair::new();
    pair.write("f", "new");
    let state = pair.at("target/.lockstep");
    let as_root = rustix::process::geteuid().is_root();
    for owner in [None, as_root.then_some(65534)] {
        fs::create_dir_all(state.join("staging/sftp")).unwrap();
        fs::write(pair.at("target/kept"), "kept").unwrap();
        // A record that would remove it, of a run after no manifest.
        let record = format!("lockstep-sftp-commit 1 {}\nD{}\n", "0".repeat(64), "6b657074");
        fs::write(state.join("staging/sftp/commit"), record).unwrap();
        let mode = if owner.is_some() { 0o700 } else { 0o777 };
        fs::set_permissions(&state, fs::Permissions::from_mode(mode)).unwrap();
        std::os::unix::fs::chown(&state, owner, None).unwrap();
        if as_root || owner.is_none() {
            let refused = pair.push(nothing(), nothing(), false).unwrap_err().to_string();
            let why = if owner.is_some() { "belongs to user 65534" } else { "can be written by others (mode 0777)" };
            assert!(refused.contains(why), "{refused}");
        }
        assert!(pair.at("target/kept").exists());
        fs::remove_dir_all(pair.at("target")).unwrap();
    }
    pair.push(nothing(), nothing(), false).unwrap();
    pair.in_step();
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
            let length = if matches!(packet.first(), Some(&(WRITE | COMMAND))) { packet.len() } else { 0 };
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
        let long_ago = std::time::SystemTime::now() - std::time::Duration::from_secs(901);
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
        // Nothing of it is there, and the log of what would have become the copy says why.
        assert!(!pair.at("copy").exists() && !pair.at(".copy.lockstep/.lockstep/staging/current").exists());
        let log = fs::read_to_string(pair.at(".copy.lockstep/.lockstep/audit.jsonl")).unwrap();
        let last: serde_json::Value = serde_json::from_str(log.lines().last().unwrap()).unwrap();
        assert_eq!(last["action"], "refuse", "{log}");
        let reason = last["reason"].as_str().unwrap();
        let named = lockstep::error::Escaped(hostile).to_string();
        assert!(reason.contains(&named), "{reason} names no {named}");
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

/// Adds up the bytes of WRITEs.
fn counting_writes() -> (Hook, Arc<AtomicUsize>) {
    let counter = Arc::new(AtomicUsize::new(0));
    let counts = Arc::clone(&counter);
    let hook = move |packet: &mut Vec<u8>| {
        counts.fetch_add(if packet.first() == Some(&WRITE) { packet.len() } else { 0 }, Ordering::Relaxed);
        true
    };
    (Arc::new(hook), counter)
}

#[test]
fn what_could_not_be_published_is_told_holds_pointers_back_and_is_not_in_the_manifest() {
    let pair = Pair::new();
    version(&pair, 1);
    pair.push(nothing(), nothing(), false).unwrap();
    version(&pair, 2);
    // A directory that nobody planned for takes the place of a file just before it is replaced.
    let config = pair.at("target/config");
    let meddle: Hook = Arc::new(move |packet| {
        if packet.windows(12).any(|bytes| bytes == b"posix-rename") && packet.ends_with(b"target/config") {
            fs::remove_file(&config).unwrap();
            fs::create_dir(&config).unwrap();
        }
        true
    });
    let report = pair.push(meddle, nothing(), false).unwrap();
    let told: Vec<_> = report.committed.as_ref().unwrap().problems.iter().map(|(path, _)| path.as_str()).collect();
    assert_eq!(told, ["config", "latest"]);
    assert_eq!(fs::read(pair.at("target/latest")).unwrap(), b"1");
    let manifest = format::decode(&fs::read(pair.at("target/.lockstep/manifest")).unwrap()).unwrap();
    let listed = |path: &str| {
        let path = lockstep::path::RelPath::new(path).unwrap();
        manifest.tree.get(&path).unwrap().file().unwrap().1.unwrap()
    };
    assert_eq!((listed("latest"), listed("config")), (sha256(b"1"), sha256(b"config of 1")));
    assert_eq!(listed("checkpoint-2/sub/state"), sha256(&[b'2'; 11]));
    let log = fs::read_to_string(pair.at("target/.lockstep/audit.jsonl")).unwrap();
    assert_eq!(log.matches(r#""path":"latest""#).count(), 1, "{log}");
    assert!(pair.push(nothing(), nothing(), false).unwrap().is_complete());
    pair.in_step();
}

#[test]
fn what_may_not_be_moved_to_the_trash_stays_and_the_runs_after_it_get_in() {
    let pair = Pair::new();
    version(&pair, 1);
    pair.push(nothing(), nothing(), false).unwrap();
    version(&pair, 2);
    let mut options = options();
    options.begin.trash_seconds = Some(3600);
    // As where hard links to files of others are protected, and the directory is sticky.
    let elsewhere: Hook = Arc::new(|packet| {
        let moves =
            [&b"hardlink"[..], b"posix-rename"].iter().any(|word| packet.windows(word.len()).any(|at| at == *word));
        if let Some(at) = packet.windows(16).position(|at| at == b".lockstep/trash/")
            && moves
            && packet.ends_with(b"/config")
        {
            packet[at + 1] = b'X';
        }
        true
    });
    let push = |hook| {
        let source = LocalSource::new(&pair.at("source"), None).unwrap();
        let target = StockTarget::new(pair.lanes(hook, nothing(), false, 1).unwrap());
        run(&source, &target, &options, &Silent::default(), &AtomicBool::new(false)).unwrap()
    };
    let told = push(elsewhere).committed.unwrap().problems;
    assert_eq!(told.iter().map(|(path, _)| path.as_str()).collect::<Vec<_>>(), ["config", "latest"]);
    assert!(told[0].1.contains("cannot be moved to the trash"), "{told:?}");
    assert_eq!(fs::read(pair.at("target/config")).unwrap(), b"config of 1");
    assert_eq!(fs::read(pair.at("target/checkpoint-2/sub/state")).unwrap(), [b'2'; 11]);
    assert!(push(nothing()).is_complete());
    pair.in_step();
}

#[test]
fn what_lies_there_already_is_hashed_and_not_sent_again() {
    let pair = Pair::new();
    pair.write("large", vec![7; 3_000_000]);
    pair.write("same-size", "abc");
    let copied = Command::new("cp").arg("-a").arg(pair.at("source")).arg(pair.at("target")).status().unwrap();
    assert!(copied.success());
    fs::write(pair.at("target/same-size"), "abd").unwrap();
    let (hook, sent) = counting_writes();
    let report = pair.push(hook, nothing(), true).unwrap();
    assert!(report.is_complete() && sent.load(Ordering::Relaxed) < 100_000, "{sent:?}");
    pair.in_step();
    assert_eq!(pair.push(nothing(), nothing(), true).unwrap().committed.unwrap().generation, 1);
}

#[test]
fn checksum_finds_what_size_and_time_hide() {
    for shell in [true, false] {
        let pair = Pair::new();
        pair.write("f", "content");
        let hour_ago = std::time::SystemTime::now() - std::time::Duration::from_secs(3600);
        let put_back =
            |at: &str| fs::File::options().write(true).open(pair.at(at)).unwrap().set_modified(hour_ago).unwrap();
        put_back("source/f");
        pair.push(nothing(), nothing(), shell).unwrap();
        fs::write(pair.at("target/f"), "altered").unwrap();
        put_back("target/f");
        pair.push(nothing(), nothing(), shell).unwrap();
        assert_eq!(fs::read(pair.at("target/f")).unwrap(), b"altered");
        let source = LocalSource::new(&pair.at("source"), Some(&pair.at("state"))).unwrap();
        let target = StockTarget::new(pair.lanes(nothing(), nothing(), shell, 1).unwrap());
        let mut options = options();
        (options.begin.checksum, options.scan.hash_all) = (true, true);
        run(&source, &target, &options, &Silent::default(), &AtomicBool::new(false)).unwrap();
        pair.in_step();
    }
}

#[test]
fn several_connections_share_the_work() {
    let pair = Pair::new();
    for number in 0..4200 {
        pair.write(&format!("d{}/{number}", number % 7), format!("{number}"));
    }
    pair.write("large", vec![5; 3_000_000]);
    let report = pair.push_over(pair.lanes(nothing(), nothing(), true, 3).unwrap()).unwrap();
    assert!(report.is_complete());
    pair.in_step();
}
