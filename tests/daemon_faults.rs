//! What goes wrong while a daemon sends: disks, kills, cuts, clocks, and others who write to the same target or file.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use crate::daemon::{Running, holds};
use crate::disk::assert_order;
use crate::kit::area::{Area, lockstep, traced};
use crate::kit::served::{Served, user};
use crate::kit::{done, ends, until};

/// A job of the source here for one target.
fn job(target: &str, more: &str) -> String {
    format!(
        "[[job]]\nname = \"data\"\nsource = \"AT/source\"\ntargets = [\"{target}\"]\nsettle = \"0s\"\nretry_max = \"1s\"\n{more}"
    )
}

const UNITS: &str = "delete = \"mirror\"\nunit = \"ckpt-*/\"\nready = \"_SUCCESS\"\nlast = [\"latest\"]\n";

fn idle(running: &Running) {
    until("it to be idle", || running.target(0)["state"] == "idle" && running.target(0)["last_error"].is_null());
}

/// Content of which one can tell whether it is whole.
fn version(number: u8, length: usize) -> Vec<u8> {
    vec![number; length + usize::from(number)]
}

fn is_whole(content: &[u8], length: usize) -> bool {
    content.first().is_some_and(|&number| content == version(number, length))
}

/// Servers with what ssh needs to know of them, by the names `s0`, `s1` and so on.
fn several(count: usize) -> (Vec<Served>, String) {
    let servers: Vec<Served> = (0..count).map(|_| Served::start("", "")).collect();
    let host = |(number, served): (usize, &Served)| {
        format!(
            "Host s{number}\n  HostName 127.0.0.1\n  Port {}\n  User sync\n  IdentityFile {}\n  UserKnownHostsFile {}\n",
            served.port,
            served.path("sync.key").display(),
            served.path("known").display()
        )
    };
    let config = servers[0].path("ssh_config");
    fs::write(&config, servers.iter().enumerate().map(host).collect::<String>()).unwrap();
    (servers, config.display().to_string())
}

#[test]
fn s21_many_servers_get_the_weights_and_a_reader_there_never_sees_half_of_them() {
    const LENGTH: usize = 1_500_000;
    let (servers, config) = several(3);
    let targets = "s0:/models\", \"s1:/models\", \"s2:/models";
    let rules = "[[policy.weights.rule]]\nmatch = \"*.ckpt\"\nmode = \"640\"\n";
    let running = Running::new(&(job(targets, "policy = \"weights\"\n") + rules), |_| {}, vec!["-F".into(), config]);
    let (stop, looks) = (AtomicBool::new(false), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for served in &servers {
            let (stop, looks) = (&stop, &looks);
            scope.spawn(move || {
                let file = served.path("sync/models/model.ckpt");
                while !stop.load(Ordering::SeqCst) {
                    let Ok(mut open) = fs::File::open(&file) else { continue };
                    let mode = std::os::unix::fs::PermissionsExt::mode(&open.metadata().unwrap().permissions());
                    let mut content = Vec::new();
                    std::io::Read::read_to_end(&mut open, &mut content).unwrap();
                    assert!(is_whole(&content, LENGTH), "{} bytes are no version of it", content.len());
                    assert_eq!(mode & 0o7777, 0o640);
                    looks.fetch_add(1, Ordering::SeqCst);
                }
            });
        }
        let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            for number in 1..=6 {
                let wanted = version(number, LENGTH);
                fs::write(running.path("source/model.tmp"), &wanted).unwrap();
                fs::rename(running.path("source/model.tmp"), running.path("source/model.ckpt")).unwrap();
                let there = |served: &Served| fs::read(served.path("sync/models/model.ckpt")).ok();
                until("the weights", || servers.iter().all(|served| there(served).as_ref() == Some(&wanted)));
            }
        }));
        stop.store(true, Ordering::SeqCst);
        ended.unwrap();
    });
    assert!(looks.load(Ordering::SeqCst) > 0);
}

#[test]
fn s23_many_daemons_send_into_one_server_and_each_reaches_a_directory_of_its_own() {
    let names = ["alice", "bob", "carol"];
    let served = Served::with(&names, |_| String::new(), "", |at| names.map(|name| user(at, name, "")).concat());
    let party = |name: &str, target: &str| {
        let key = served.path(&format!("{name}.key")).display().to_string();
        let known = served.path("known").display().to_string();
        let login = ["-P", &served.port.to_string(), "--identity", &key, "--known-hosts", &known, "-F", "none"];
        Running::new(&job(target, ""), |_| {}, login.map(str::to_owned).to_vec())
    };
    let parties = names.map(|name| party(name, &format!("{name}@127.0.0.1:/gradients")));
    for round in 0..3 {
        for (running, name) in parties.iter().zip(names) {
            for number in 0..10 {
                fs::write(running.path(&format!("source/{number}")), format!("{name} {number} in {round}")).unwrap();
            }
        }
        for name in names {
            let there = |number: usize| served.path(&format!("{name}/gradients/{number}"));
            until("the gradients", || {
                (0..10).all(|number| holds(&there(number), &format!("{name} {number} in {round}")))
            });
        }
    }
    // Another's account does not open, and what is above one's own is one's own top.
    let stranger = party("carol", "bob@127.0.0.1:/gradients");
    fs::write(stranger.path("source/0"), "of carol").unwrap();
    until("the refusal", || stranger.target(0)["state"] == "halted");
    let climber = party("carol", "carol@127.0.0.1:/../bob/gradients");
    fs::write(climber.path("source/0"), "of carol").unwrap();
    until("it to be refused, or to stay within", || {
        climber.target(0)["last_error"].is_object() || holds(&served.path("carol/bob/gradients/0"), "of carol")
    });
    assert!(holds(&served.path("bob/gradients/0"), "bob 0 in 2"));
}

#[test]
fn s25_a_large_map_of_which_a_part_changes_is_sent_and_verified() {
    let served = Served::start("", "");
    let running = Running::at_server(&served, &job("sync@SERVER:/maps", ""));
    let (here, there) = (running.path("source/map.bin"), served.path("sync/maps/map.bin"));
    let mut map: Vec<u8> = (0..6_000_000_u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    for part in [0, 3_000_000, 5_999_000] {
        map[part..part + 500].fill(7);
        fs::write(&here, &map).unwrap();
        until("the map", || fs::read(&there).is_ok_and(|found| found == map));
        idle(&running);
        done(&running.command(&["check", "--full"]).arg(served.path("sync/maps")).output().unwrap());
    }
}

#[test]
fn h31_a_disk_that_fails_is_told_and_tried_ever_less_often_and_nothing_is_recorded() {
    for (error, said) in [("EIO", "Input/output"), ("EROFS", "Read-only")] {
        let mut running = Running::start(&job("AT/one", ""));
        until("the first run", || running.path("one/.lockstep/manifest").exists());
        idle(&running);
        assert_eq!(running.stop(), Some(0));
        let listed = fs::read(running.path("one/.lockstep/manifest")).unwrap();
        fs::write(running.path("source/a"), "content").unwrap();
        let log = running.path("trace");
        let mut failing = traced("syncfs", Some(&format!("error={error}")), &log, &[lockstep()]);
        failing.env("HOME", running.path(""));
        running.launch_by(failing);
        until("it to be tried again", || running.target(0)["failures"].as_u64().unwrap() >= 2);
        until("it to wait", || running.target(0)["state"] == "retrying");
        let target = running.target(0);
        assert!(target["last_error"]["message"].as_str().unwrap().contains(said), "{target}");
        assert!(target["next_try"].is_u64() && target["lag_units"].as_u64().unwrap() >= 1, "{target}");
        // What failed is not done over and over within one try.
        let tries = running.target(0)["failures"].as_u64().unwrap() as usize + 1;
        let calls = fs::read_to_string(&log).unwrap().matches("syncfs(").count();
        assert!(calls <= 2 * tries, "{calls} calls in {tries} tries");
        assert!(!running.path("one/a").exists());
        assert_eq!(fs::read(running.path("one/.lockstep/manifest")).unwrap(), listed);
        running.stop_traced();
        running.launch();
        until("the file", || holds(&running.path("one/a"), "content"));
        idle(&running);
    }
}

#[test]
fn h32_a_daemon_that_is_killed_leaves_old_or_new_and_the_next_goes_on() {
    const LENGTH: usize = 3_000_000;
    let served = Served::start("", "");
    let mut running = Running::at_server(&served, &job("sync@SERVER:/data", UNITS));
    let there = served.path("sync/data");
    let (unit, seen) = (running.path("source/ckpt-1"), there.join("ckpt-1"));
    fs::create_dir(&unit).unwrap();
    let save = |number: u8| {
        let _ = fs::remove_file(unit.join("_SUCCESS"));
        for file in ["a", "b"] {
            fs::write(unit.join(file), version(number, LENGTH)).unwrap();
        }
        fs::write(unit.join("_SUCCESS"), [number]).unwrap();
    };
    let shown = || ["a", "b"].map(|file| fs::read(seen.join(file)).ok());
    save(1);
    until("the first", || shown().iter().all(|file| file == &Some(version(1, LENGTH))));
    for number in 2..8 {
        save(number);
        // At other points of a run each time: it has begun, it has a part, it publishes.
        let staging = there.join(".lockstep/staging/current");
        let point = ["", "tree", "commit"][usize::from(number % 3)];
        until("a run", || staging.join(point).exists() || shown()[0] == Some(version(number, LENGTH)));
        running.signal("-KILL");
        let mark = fs::read(seen.join("_SUCCESS")).unwrap()[0];
        let files = shown().map(Option::unwrap);
        // Between looking at the marker and the files a run may have ended.
        assert_eq!(files[0], files[1], "a mix");
        assert!([number - 1, number].contains(&mark) && is_whole(&files[0], LENGTH));
        running.launch_again();
        until("the new one", || shown().iter().all(|file| file == &Some(version(number, LENGTH))));
    }
    idle(&running);
    done(&running.command(&["check", "--full"]).arg(&there).output().unwrap());
}

#[test]
fn h33_a_daemon_stores_content_before_its_name_and_names_before_the_manifest() {
    let area = Area::new();
    area.reset();
    let config = format!(
        "[[job]]\nname = \"data\"\nsource = \"{}\"\ntargets = [\"{}\"]\nsettle = \"0s\"\nunit = \"ckpt-*/\"\nlast = [\"latest\"]\n",
        area.path("new").display(),
        area.path("target").display()
    );
    let mut running = Running::start(&job("AT/other", ""));
    assert_eq!(running.stop(), Some(0));
    running.configure(&config);
    let log = running.path("trace");
    let mut command = traced("pwrite64,fchmod,syncfs,fsync,renameat,renameat2", None, &log, &[lockstep()]);
    command.env("HOME", running.path(""));
    running.launch_by(command);
    until("the new version", || fs::read(area.path("target/changed")).is_ok_and(|found| found == [2; 2000]));
    idle(&running);
    running.stop_traced();
    assert_order(&fs::read_to_string(log).unwrap());
}

#[test]
fn h34_a_connection_that_stalls_or_is_cut_is_noticed_and_gone_on_with() {
    let served = Served::start("", "");
    let there = served.path("sync/data/large");
    for stalls in [true, false] {
        let left = Arc::new(AtomicUsize::new(700_000));
        let between = if stalls { crate::kit::proxy::swallowing } else { crate::kit::proxy::cutting };
        let port = between(served.port, Arc::clone(&left));
        let known = served.path("known-there");
        fs::write(&known, format!("[127.0.0.1]:{port} {}\n", host_key(&served))).unwrap();
        let login =
            ["-P", &port.to_string(), "--identity", served.path("sync.key").to_str().unwrap()].map(str::to_owned);
        let more = ["--known-hosts", known.to_str().unwrap(), "-F", "none"].map(str::to_owned);
        let alive = ["-o", "ServerAliveInterval=1", "-o", "ServerAliveCountMax=1"].map(str::to_owned);
        let arguments: Vec<String> = login.into_iter().chain(more).chain(alive).collect();
        let running = Running::new(&job("sync@127.0.0.1:/data", ""), |_| {}, arguments);
        // Nothing that becomes small on its way.
        let mut state = 1 + u32::from(stalls);
        let mut noise = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        };
        let content: Vec<u8> = (0..3_000_000).map(|_| noise()).collect();
        fs::write(running.path("source/large"), &content).unwrap();
        until("the failure", || running.target(0)["last_error"].is_object());
        let target = running.target(0);
        let message = target["last_error"]["message"].as_str().unwrap();
        assert!(!stalls || message.contains("has stopped answering"), "{target}");
        assert!(fs::read(&there).map_or(true, |found| found != content), "it has arrived nevertheless");
        left.store(usize::MAX, Ordering::SeqCst);
        until("the rest", || fs::read(&there).is_ok_and(|found| found == content));
        idle(&running);
    }
}

fn host_key(served: &Served) -> String {
    let known = fs::read_to_string(served.path("known")).unwrap();
    known.trim().split_once(' ').unwrap().1.to_owned()
}

#[test]
fn h35_two_daemons_and_a_push_into_one_target_take_turns() {
    let shared = tempfile::tempdir().unwrap();
    let target: PathBuf = shared.path().join("target");
    let config = job(target.to_str().unwrap(), "");
    let both = [Running::start(&config), Running::start(&config)];
    for round in 0..4 {
        for (number, running) in both.iter().enumerate() {
            for file in 0..5 {
                fs::write(running.path(&format!("source/{number}-{file}")), format!("{round}")).unwrap();
            }
        }
        fs::write(shared.path().join("by-hand"), format!("{round}")).unwrap();
        let push = both[0]
            .command(&["push", "-q", "--wait", "60"])
            .arg(shared.path().join("by-hand"))
            .arg(target.join("by-hand"))
            .output()
            .unwrap();
        done(&push);
        until("all of it", || {
            let theirs = (0..10).all(|of| holds(&target.join(format!("{}-{}", of / 5, of % 5)), &format!("{round}")));
            theirs && holds(&target.join("by-hand"), &format!("{round}"))
        });
    }
    both.iter().for_each(idle);
    done(&both[0].command(&["check", "--full"]).arg(&target).output().unwrap());
    // One who holds it for long is named.
    let holder = fs::File::options().write(true).open(target.join(".lockstep/lock")).unwrap();
    rustix::fs::flock(&holder, rustix::fs::FlockOperation::LockExclusive).unwrap();
    ends(&both[0].command(&["push", "-q"]).arg(both[0].path("source")).arg(&target).output().unwrap(), 75, &["in use"]);
}

#[test]
fn h36_a_file_that_is_written_again_and_again_arrives_as_one_version_or_another() {
    const LENGTH: usize = 400_000;
    let running = Running::start(&job("AT/one", ""));
    let (here, there) = (running.path("source/weights"), running.path("one/weights"));
    for number in 1..=40 {
        // In place, and in pieces: what is read meanwhile is a mix.
        let content = version(number, LENGTH);
        let mut file = fs::File::options().create(true).truncate(false).write(true).open(&here).unwrap();
        for part in content.chunks(50_000) {
            std::io::Write::write_all(&mut file, part).unwrap();
            std::thread::sleep(std::time::Duration::from_millis(2));
            if let Ok(found) = fs::read(&there) {
                assert!(is_whole(&found, LENGTH), "{} bytes of several versions were published", found.len());
            }
        }
    }
    until("the last version", || fs::read(&there).is_ok_and(|found| found == version(40, LENGTH)));
    idle(&running);
}

/// The library that lies to a program about the time.
fn faketime() -> PathBuf {
    let roots =
        fs::read_dir("/usr/lib").unwrap().flatten().map(|entry| entry.path().join("faketime/libfaketimeMT.so.1"));
    roots.into_iter().find(|path| path.exists()).expect("libfaketime is not installed: Debian package faketime")
}

#[test]
fn h39_a_clock_that_jumps_a_day_and_back_holds_nothing_up_and_is_told() {
    let mut running = Running::start(&job("AT/one", "rescan = \"1h\"\n"));
    assert_eq!(running.stop(), Some(0));
    let clock = running.path("clock");
    fs::write(&clock, "+0").unwrap();
    let mut command: Command = running.command(&[]);
    command.env("LD_PRELOAD", faketime()).env("FAKETIME_TIMESTAMP_FILE", &clock);
    // Nobody sets what waits are measured by.
    for setting in ["FAKETIME_NO_CACHE", "FAKETIME_DONT_FAKE_MONOTONIC", "NO_FAKE_STAT"] {
        command.env(setting, "1");
    }
    let now = || std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    running.launch_by(command);
    let set = |to: &str| {
        fs::write(running.path("clock.new"), to).unwrap();
        fs::rename(running.path("clock.new"), running.path("clock")).unwrap();
    };
    for (number, to) in ["+0", "+1d", "-1d", "+1d", "+0"].into_iter().enumerate() {
        set(to);
        let days = running.status()["now"].as_u64().unwrap().abs_diff(now()) / 86_000;
        assert_eq!(days, u64::from(to != "+0"), "the clock is not what it was set to");
        fs::write(running.path("source").join(number.to_string()), to).unwrap();
        until("what came after it", || holds(&running.path("one").join(number.to_string()), to));
        idle(&running);
        // One that failed is tried again after a wait that the clock has no part in.
        let (one, away) = (running.path("one"), running.path("away"));
        fs::rename(&one, &away).unwrap();
        fs::write(&one, "in the way").unwrap();
        fs::write(running.path("source/again"), to).unwrap();
        until("the failure", || running.target(0)["last_error"].is_object());
        set(if to == "+1d" { "-1d" } else { "+1d" });
        fs::remove_file(&one).unwrap();
        fs::rename(&away, &one).unwrap();
        until("the next try", || holds(&one.join("again"), to));
        idle(&running);
    }
    until("the clock to be told", || running.log().contains("is the clock of this machine right"));
    done(&running.command(&["check", "--full"]).arg(running.path("one")).output().unwrap());
}
