//! What the kernel cannot tell: its queue overflows, its watches run out, a file system goes away; and work that waited while a
//! file was written to again.

use std::fs::{self, File};
use std::io::Write as _;
use std::process::Command;

use crate::daemon::{Running, holds};
use crate::kit::area::lockstep;
use crate::kit::{done, stops, until};

const JOB: &str = r#"
[[job]]
name = "data"
source = "AT/source"
targets = ["AT/target"]
settle = "0s"
poll = "100ms"
retry_max = "1s"
"#;

/// A command that runs lockstep in namespaces of its own, after a script.
fn unshared(options: &str, script: &str) -> Command {
    let mut command = Command::new("unshare");
    command.args([options, "sh", "-c", &format!("{script} && exec \"$@\""), "sh"]).arg(lockstep());
    command
}

#[test]
fn h37_a_queue_that_overflows_is_followed_by_a_look_at_everything() {
    let running = Running::start(JOB);
    for name in ["kept", "before"] {
        fs::write(running.path("source").join(name), "old").unwrap();
    }
    until("the first files", || ["kept", "before"].iter().all(|name| holds(&running.path("target").join(name), "old")));
    // Nobody reads what the kernel tells, and it is more than the kernel keeps.
    running.signal("-STOP");
    stops(running.pid());
    let limit = fs::read_to_string("/proc/sys/fs/inotify/max_queued_events").unwrap();
    // In turn: the kernel makes one of two that are the same.
    let [mut one, mut other] = ["one", "other"].map(|name| File::create(running.path("source").join(name)).unwrap());
    for _ in 0..limit.trim().parse::<usize>().unwrap() / 2 + 100 {
        one.write_all(b"x").unwrap();
        other.write_all(b"x").unwrap();
    }
    drop((one, other));
    fs::write(running.path("source/kept"), "changed").unwrap();
    fs::create_dir_all(running.path("source/d/e")).unwrap();
    fs::write(running.path("source/d/e/last"), "x").unwrap();
    running.signal("-CONT");
    until("what nobody told of", || {
        holds(&running.path("target/kept"), "changed") && holds(&running.path("target/d/e/last"), "x")
    });
    // That they were closed was not told either.
    until("what was written to", || running.path("target/one").exists() && running.path("target/other").exists());
    assert!(running.log().contains("more changed than the kernel can tell of"));
    // It is watched again, the new directories too.
    fs::write(running.path("source/d/e/after"), "x").unwrap();
    until("a change after it", || holds(&running.path("target/d/e/after"), "x"));
    assert_eq!(running.status()["jobs"][0]["watching"]["mode"], "events");
}

#[test]
fn h37_too_few_watches_are_told_with_the_setting_and_it_polls() {
    let mut running = Running::start(JOB);
    assert_eq!(running.stop(), Some(0));
    for number in 0..6 {
        fs::create_dir(running.path(&format!("source/{number}"))).unwrap();
    }
    fs::write(running.path("source/5/a"), "x").unwrap();
    running.launch_by(unshared("-Ur", "echo 5 > /proc/sys/user/max_inotify_watches"));
    until("the file", || holds(&running.path("target/5/a"), "x"));
    let watching = running.status()["jobs"][0]["watching"].clone();
    assert_eq!((&watching["mode"], &watching["directories"]), (&"polling".into(), &7.into()), "{watching}");
    let why = watching["why"].as_str().unwrap();
    assert!(why.contains("its 7 directories") && why.contains("sysctl -w fs.inotify.max_user_watches="), "{why}");
    assert!(running.log().contains("fs.inotify.max_user_watches"), "{}", running.log());
    fs::write(running.path("source/3/b"), "later").unwrap();
    until("what is found by looking", || holds(&running.path("target/3/b"), "later"));
    // The limit is reached only later on.
    assert_eq!(running.stop(), Some(0));
    running.launch_by(unshared("-Ur", "echo 8 > /proc/sys/user/max_inotify_watches"));
    until("the start", || running.status()["jobs"][0]["watching"]["mode"] == "events");
    fs::create_dir_all(running.path("source/more/and/more")).unwrap();
    fs::write(running.path("source/more/and/more/c"), "x").unwrap();
    until("it to poll", || running.status()["jobs"][0]["watching"]["mode"] == "polling");
    until("what is found by looking", || holds(&running.path("target/more/and/more/c"), "x"));
}

#[test]
fn h37_h38_a_file_system_that_is_unmounted_halts_the_job_until_it_is_back() {
    let mut running = Running::start(&format!("{JOB}delete = \"mirror\"\n"));
    assert_eq!(running.stop(), Some(0));
    let source = running.path("source").display().to_string();
    let mount = format!("mount -t tmpfs none '{source}' && echo x > '{source}/a' && echo x > '{source}/b'");
    running.launch_by(unshared("-Urm", &mount));
    until("the files", || holds(&running.path("target/a"), "x\n") && holds(&running.path("target/b"), "x\n"));
    let pid = running.pid().to_string();
    let inside = |script: &str| {
        let arguments = ["-t", &pid, "-U", "-m", "--preserve-credentials", "sh", "-c", script];
        Command::new("nsenter").args(arguments).output().expect("nsenter is not installed: Debian package util-linux")
    };
    until("it to be unmounted", || inside(&format!("umount '{source}'")).status.success());
    until("the job to halt", || running.status()["jobs"][0]["halted"].is_object());
    let said = running.status()["jobs"][0]["halted"]["message"].to_string();
    assert!(said.contains("is not mounted"), "{said}");
    assert!(holds(&running.path("target/a"), "x\n") && holds(&running.path("target/b"), "x\n"));
    done(&inside(&format!("{mount} && echo new > '{source}/c'")));
    until("what is new", || holds(&running.path("target/c"), "new\n"));
    until("the job to go on", || running.status()["jobs"][0]["halted"].is_null());
    // What lies in its place is not taken for it, whatever waits and is asked for.
    done(&running.jobs(&["pause"]));
    done(&inside(&format!("echo more > '{source}/d'")));
    until("the work to wait", || running.target(0)["lag_units"].as_u64().unwrap() > 0);
    until("it to be unmounted", || inside(&format!("umount '{source}'")).status.success());
    until("the job to halt", || running.status()["jobs"][0]["halted"].is_object());
    fs::write(running.path("source/stray"), "x").unwrap();
    let is_left_alone = |running: &Running| {
        std::thread::sleep(std::time::Duration::from_millis(700));
        assert!(running.status()["jobs"][0]["halted"].is_object(), "{}", running.log());
        assert!(
            ["a", "b"].iter().all(|name| holds(&running.path("target").join(name), "x\n"))
                && holds(&running.path("target/c"), "new\n")
        );
        assert!(!running.path("target/stray").exists());
    };
    done(&running.jobs(&["resume"]));
    done(&running.jobs(&["now"]));
    is_left_alone(&running);
    // Nor after a restart, until somebody says that it is to be so.
    assert_eq!(running.stop(), Some(0));
    running.launch_by(unshared("-Urm", "true"));
    until("the job to halt", || running.status()["jobs"][0]["halted"].is_object());
    is_left_alone(&running);
    let said = running.status()["jobs"][0]["halted"]["message"].as_str().unwrap().to_owned();
    let note = said.split("remove '").nth(1).and_then(|rest| rest.split('\'').next()).unwrap();
    fs::remove_file(note).unwrap();
    assert_eq!(running.stop(), Some(0));
    running.launch_by(unshared("-Urm", "true"));
    until("what is there now", || running.path("target/stray").exists() && !running.path("target/a").exists());
}

#[test]
fn h38_what_is_deleted_goes_from_a_mirror_and_the_limit_is_of_the_whole() {
    let running = Running::start(&format!("{JOB}delete = \"mirror\"\nmax_delete = \"50%\"\n"));
    for name in ["a", "b", "c", "d"] {
        fs::write(running.path("source").join(name), name).unwrap();
    }
    until("the files", || ["a", "b", "c", "d"].iter().all(|name| holds(&running.path("target").join(name), name)));
    fs::remove_file(running.path("source/a")).unwrap();
    until("it to go", || !running.path("target/a").exists());
    assert!(running.target(0)["last_error"].is_null(), "{}", running.log());
    // Two of three are too many, even when they are seen to go one by one.
    done(&running.jobs(&["pause"]));
    until("it to be paused", || running.target(0)["state"] == "paused");
    for name in ["b", "c"] {
        fs::remove_file(running.path("source").join(name)).unwrap();
    }
    until("the work to wait", || running.target(0)["lag_units"].as_u64().unwrap() > 0);
    done(&running.jobs(&["resume"]));
    until("the refusal", || {
        running.target(0)["last_error"]["message"].as_str().is_some_and(|told| told.contains("over the limit"))
    });
    assert!(holds(&running.path("target/b"), "b") && holds(&running.path("target/c"), "c"));
}

#[test]
fn what_is_written_to_again_before_its_turn_comes_is_not_sent_half_written() {
    let running = Running::start(JOB);
    fs::write(running.path("source/first"), "x").unwrap();
    until("the first file", || holds(&running.path("target/first"), "x"));
    done(&running.jobs(&["pause"]));
    until("it to be paused", || running.target(0)["state"] == "paused");
    fs::write(running.path("source/a"), "whole").unwrap();
    fs::write(running.path("source/b"), "whole").unwrap();
    until("the work to wait", || running.target(0)["lag_units"].as_u64().unwrap() > 0);
    let mut file = File::create(running.path("source/a")).unwrap();
    file.write_all(b"ha").unwrap();
    done(&running.jobs(&["resume"]));
    until("the other file", || holds(&running.path("target/b"), "whole"));
    until("it to be idle", || running.target(0)["state"] == "idle");
    assert!(!running.path("target/a").exists());
    assert_eq!(running.status()["jobs"][0]["unfinished"], serde_json::json!(["a"]));
    file.write_all(b"lf and half").unwrap();
    drop(file);
    until("the file as it is in the end", || holds(&running.path("target/a"), "half and half"));
}

#[test]
fn h38_what_a_file_system_in_a_source_held_stays_at_a_mirror_when_it_is_unmounted() {
    let mut running = Running::start(&format!("{JOB}delete = \"mirror\"\n"));
    assert_eq!(running.stop(), Some(0));
    let inner = running.path("source/in ner");
    fs::create_dir(&inner).unwrap();
    // Of a source that is empty nothing is taken for removed anyway.
    fs::write(running.path("source/kept"), "x").unwrap();
    let inner = inner.display().to_string();
    let mount = format!("mount -t tmpfs none '{inner}' && echo x > '{inner}/a'");
    running.launch_by(unshared("-Urm", &mount));
    let there = running.path("target/in ner/a");
    until("the file in it", || holds(&there, "x\n"));
    let pid = running.pid().to_string();
    let inside = |script: &str| {
        let arguments = ["-t", &pid, "-U", "-m", "--preserve-credentials", "sh", "-c", script];
        Command::new("nsenter").args(arguments).output().expect("nsenter is not installed: Debian package util-linux")
    };
    let unmounted = |running: &Running| running.status()["jobs"][0]["watching"]["unmounted"].clone();
    let others_go = |running: &Running, name: &str| {
        fs::write(running.path("source").join(name), name).unwrap();
        until("what is not in it", || holds(&running.path("target").join(name), name));
        // What is missed at once is compared with everything.
        fs::remove_file(running.path("source").join(name)).unwrap();
        until("what is not in it to go", || !running.path("target").join(name).exists());
        done(&running.jobs(&["now"]));
        until("it to be idle", || running.target(0)["state"] == "idle" && running.target(0)["lag_units"] == 0);
        assert!(holds(&there, "x\n"), "{}", running.log());
    };
    until("it to be unmounted", || inside(&format!("umount '{inner}'")).status.success());
    others_go(&running, "b");
    until("it to be told", || unmounted(&running) == serde_json::json!(["in ner"]));
    assert!(running.log().contains("'in ner' in it is not mounted"), "{}", running.log());
    // Nor does what is put in its place go there.
    fs::write(running.path("source/in ner/stray"), "x").unwrap();
    others_go(&running, "c");
    assert!(!running.path("target/in ner/stray").exists());
    fs::remove_file(running.path("source/in ner/stray")).unwrap();
    // Mounted again it is followed as before.
    done(&inside(&format!("{mount} && echo new > '{inner}/n'")));
    until("what is new in it", || holds(&running.path("target/in ner/n"), "new\n"));
    until("it to be told no more", || unmounted(&running).is_null());
    done(&inside(&format!("rm '{inner}/n'")));
    until("what is gone in it", || !running.path("target/in ner/n").exists());
    // A restart knows it, too, until the directory is removed.
    assert_eq!(running.stop(), Some(0));
    running.launch_by(unshared("-Urm", "true"));
    until("it to be told", || unmounted(&running) == serde_json::json!(["in ner"]));
    others_go(&running, "d");
    fs::remove_dir(running.path("source/in ner")).unwrap();
    until("it to go", || !running.path("target/in ner").exists());
    until("it to be told no more", || unmounted(&running).is_null());
}

#[test]
fn more_that_is_not_finished_than_can_be_left_out_by_name_holds_up_what_lies_beside_it_and_loses_nothing() {
    let running = Running::start(JOB);
    let unfinished = |directory: &str, count: usize| -> Vec<_> {
        let directory = running.path("source").join(directory);
        fs::create_dir_all(&directory).unwrap();
        (0..count).map(|number| directory.join(format!("{number:0200}.tmp"))).collect()
    };
    let begin = |paths: &[std::path::PathBuf]| paths.iter().for_each(|path| fs::write(path, "x").unwrap());
    let end = |paths: &[std::path::PathBuf]| paths.iter().for_each(|path| fs::remove_file(path).unwrap());
    // In a directory: it is left out as a whole, and what else there is goes.
    let many = unfinished("d", 2500);
    begin(&many);
    until("it to be noticed", || running.status()["jobs"][0]["unfinished_count"] == 2500);
    fs::write(running.path("source/d/finished"), "x").unwrap();
    fs::write(running.path("source/other"), "x").unwrap();
    until("what lies elsewhere", || holds(&running.path("target/other"), "x"));
    assert!(!running.path("target/d/finished").exists());
    end(&many);
    until("what was finished all the time", || holds(&running.path("target/d/finished"), "x"));
    // At the top nothing can be left out as a whole.
    let many = unfinished("", 3000);
    begin(&many);
    until("it to be noticed", || running.status()["jobs"][0]["unfinished_count"] == 3000);
    fs::write(running.path("source/more"), "x").unwrap();
    until("it to wait", || running.target(0)["lag_units"].as_u64().unwrap() > 0);
    std::thread::sleep(std::time::Duration::from_millis(700));
    assert!(!running.path("target/more").exists());
    end(&many);
    until("what waited", || holds(&running.path("target/more"), "x"));
    assert!(running.target(0)["failures"] == 0, "{}", running.log());
    assert!(
        !running
            .path("target")
            .read_dir()
            .unwrap()
            .any(|entry| { entry.unwrap().file_name().as_encoded_bytes().ends_with(b".tmp") })
    );
}

#[test]
fn a_run_that_had_nothing_to_say_to_a_target_is_no_success_of_it() {
    let running = Running::start(&JOB.replace("AT/target", "AT/place/target"));
    fs::write(running.path("source/first"), "x").unwrap();
    until("the first file", || holds(&running.path("place/target/first"), "x"));
    until("it to be idle", || running.target(0)["state"] == "idle" && running.target(0)["lag_units"] == 0);
    fs::rename(running.path("place"), running.path("elsewhere")).unwrap();
    fs::write(running.path("place"), "no directory").unwrap();
    fs::write(running.path("source/a"), "x").unwrap();
    until("the failure", || running.target(0)["failures"].as_u64().unwrap() > 0);
    fs::remove_file(running.path("source/a")).unwrap();
    until("nothing to wait", || running.target(0)["lag_units"] == 0);
    let target = running.target(0);
    assert!(target["last_error"].is_object(), "{target}");
    fs::remove_file(running.path("place")).unwrap();
    fs::rename(running.path("elsewhere"), running.path("place")).unwrap();
    fs::write(running.path("source/b"), "x").unwrap();
    until("the next file", || holds(&running.path("place/target/b"), "x"));
    until("it to be told", || running.target(0)["last_error"].is_null());
}
