//! What goes to several targets is read once.

use std::fs;

use crate::daemon::Running;
use crate::kit::served::Served;
use crate::kit::{assert_same, until};

/// Bytes that a process has read by system calls.
fn read_by(pid: u32) -> u64 {
    let io = fs::read_to_string(format!("/proc/{pid}/io")).unwrap();
    io.lines().find_map(|line| line.strip_prefix("rchar: ")).unwrap().parse().unwrap()
}

/// What a daemon reads to bring 64 MiB to so many targets.
fn bytes_read(targets: usize) -> u64 {
    let served = Served::start("", "");
    let list: Vec<String> = (0..targets).map(|number| format!("\"sync@SERVER:/{number}\"")).collect();
    let job = format!(
        "[[job]]\nname = \"data\"\nsource = \"AT/source\"\ntargets = [{}]\nsettle = \"0s\"\nretry_max = \"1s\"\n",
        list.join(", ")
    );
    let running = Running::at_server(&served, &job);
    until("it to be idle", || (0..targets).all(|number| running.target(number)["runs"].as_u64() >= Some(1)));
    let noise: Vec<u8> = (0..64_u64 << 20).map(|at| (at.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let before = read_by(running.pid());
    fs::write(running.path("new"), &noise).unwrap();
    fs::rename(running.path("new"), running.path("source/model.bin")).unwrap();
    let there = |number: usize| served.path("sync").join(number.to_string());
    until("it to be everywhere", || (0..targets).all(|number| there(number).join("model.bin").exists()));
    let read = read_by(running.pid()) - before;
    (0..targets).for_each(|number| assert_same(&running.path("source"), &there(number)));
    read
}

#[test]
fn three_targets_are_served_by_one_reading() {
    let (one, three) = (bytes_read(1), bytes_read(3));
    assert!(one >= 64 << 20, "{one}");
    assert!(three * 10 <= one * 13, "{three} bytes for three targets, {one} for one");
}
