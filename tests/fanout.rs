//! A daemon with several targets: content is read once for all of them, and none waits for another.

use std::fs;

use rustix::process::Signal;

use crate::daemon::{Running, holds};
use crate::kit::served::Served;
use crate::kit::until;

const SIZE: usize = 24 << 20;

/// A daemon with one job that goes to these servers.
fn daemon(servers: &[&Served]) -> Running {
    let config: String = servers.iter().enumerate().map(|(number, served)| {
        let (port, key, known) = (served.port, served.path("sync.key"), served.path("known"));
        let (key, known) = (key.display(), known.display());
        format!("Host gpu{number}\n HostName 127.0.0.1\n Port {port}\n User sync\n IdentityFile {key}\n UserKnownHostsFile {known}\n")
    }).collect();
    let clients = servers[0].path("clients");
    fs::write(&clients, config).unwrap();
    let targets: Vec<String> = (0..servers.len()).map(|number| format!("\"gpu{number}:/data\"")).collect();
    let targets = targets.join(", ");
    let job = format!(
        "[[job]]\nname = \"data\"\nsource = \"AT/source\"\ntargets = [{targets}]\nsettle = \"0s\"\nretry_max = \"1s\"\n"
    );
    let running = Running::new(&job, |_| {}, vec!["-F".into(), clients.display().to_string()]);
    fs::write(running.path("source/first"), "first").unwrap();
    for (number, served) in servers.iter().enumerate() {
        until("the first file", || holds(&served.path("sync/data/first"), "first"));
        until("it to be idle", || running.target(number)["state"] == "idle");
    }
    running
}

/// Content of which a half can be compressed.
fn content(seed: u64) -> Vec<u8> {
    let mut state = seed;
    let next = |at: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        if at.is_multiple_of(2) { 7 } else { (state >> 56) as u8 }
    };
    (0..SIZE).map(next).collect()
}

/// Puts a file and a few small ones into the source, all at once.
fn put(running: &Running, name: &str, data: &[u8]) {
    let beside = running.path(name);
    fs::create_dir(&beside).unwrap();
    fs::write(beside.join("large"), data).unwrap();
    (0..20).for_each(|number| fs::write(beside.join(format!("small-{number}")), &data[..number * 1000]).unwrap());
    fs::rename(&beside, running.path("source").join(name)).unwrap();
}

fn has(served: &Served, name: &str, data: &[u8]) -> bool {
    let there = served.path("sync/data").join(name);
    let same = |name: &str, data: &[u8]| fs::read(there.join(name)).is_ok_and(|found| found == data);
    same("large", data) && (0..20).all(|number| same(&format!("small-{number}"), &data[..number * 1000]))
}

/// What the daemon has read of files so far.
fn read_bytes(running: &Running) -> u64 {
    let io = fs::read_to_string(format!("/proc/{}/io", running.pid())).unwrap();
    io.lines().find_map(|line| line.strip_prefix("rchar: ")).unwrap().parse().unwrap()
}

#[test]
fn s28_content_is_read_once_however_many_servers_get_it() {
    let servers = [(); 3].map(|()| Served::start("", ""));
    let data = content(1);
    let read = |servers: &[&Served]| {
        let running = daemon(servers);
        let before = read_bytes(&running);
        put(&running, "new", &data);
        for (number, served) in servers.iter().enumerate() {
            until("all of it", || has(served, "new", &data));
            until("it to be idle", || running.target(number)["state"] == "idle");
        }
        read_bytes(&running) - before
    };
    let one = read(&[&servers[0]]);
    assert!(one >= SIZE as u64, "what is counted is not what is read: {one}");
    fs::remove_dir_all(servers[0].path("sync/data")).unwrap();
    let three = read(&[&servers[0], &servers[1], &servers[2]]);
    assert!(three * 10 <= one * 13, "{three} bytes were read for three, {one} for one");
}

#[test]
fn h30_a_server_that_hangs_in_the_middle_holds_up_no_other_and_gets_it_all_in_the_end() {
    let servers = [(); 3].map(|()| Served::start("", ""));
    let running = daemon(&[&servers[0], &servers[1], &servers[2]]);
    let data = content(2);
    servers[2].signal(Signal::STOP);
    put(&running, "new", &data);
    for (number, served) in servers[..2].iter().enumerate() {
        until("all of it", || has(served, "new", &data));
        until("it to be idle", || running.target(number)["state"] == "idle");
    }
    assert!(!has(&servers[2], "new", &data));
    // The others get what comes next, too.
    let later = content(3);
    put(&running, "later", &later);
    servers[..2].iter().for_each(|served| until("what came later", || has(served, "later", &later)));
    servers[2].signal(Signal::CONT);
    for (name, data) in [("new", &data), ("later", &later)] {
        until("it to catch up", || has(&servers[2], name, data));
    }
}
