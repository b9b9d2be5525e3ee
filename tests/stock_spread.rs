//! One large file over several connections to a stock server, where each of them is slow.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Output;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use lockstep::endpoint::Width;

use super::stock_pipes::{Hook, Pair};
use crate::kit::proxy::{Carried, Cut, narrow};
use crate::kit::sshd::Sshd;
use crate::kit::{done, ends, noise, text};

const MIB: usize = 1 << 20;
/// A connection that carries less has carried no part of the file.
const PART: u64 = 1 << 20;
/// What a run that was cut may have to send again although it was there.
const LOOSE: usize = 32 * MIB;
const UNIT: usize = 64 << 10;

/// An sshd with no lockstep behind it, and a tree to be sent there.
fn far(length: usize) -> (Sshd, Vec<u8>) {
    let sshd = Sshd::only("Subsystem sftp internal-sftp");
    let content = noise(11, length);
    fs::create_dir(sshd.path("source")).unwrap();
    fs::write(sshd.path("source/large"), &content).unwrap();
    (sshd, content)
}

/// Runs over a port that leads to the server.
fn over(sshd: &Sshd, port: u16, arguments: &[&str]) -> Output {
    let public = fs::read_to_string(sshd.path("known")).unwrap();
    let known = format!("[127.0.0.1]:{port} {}\n", public.trim().split_once(' ').unwrap().1);
    fs::write(sshd.path("known-there"), known).unwrap();
    let port = port.to_string();
    let how = ["--remote", "sftp", "-P", &port, "-F", "none", "--identity", "user", "--known-hosts", "known-there"];
    sshd.run(&[arguments, &how].concat())
}

fn parts(carried: &Carried) -> usize {
    carried.lock().unwrap().iter().filter(|&&bytes| bytes > PART).count()
}

fn staged(sshd: &Sshd) -> Vec<u8> {
    let hidden = |at: &Path| fs::read_dir(at).ok()?.filter_map(Result::ok).map(|entry| entry.path()).next();
    // A root that is not there yet has a hidden name.
    let roots = fs::read_dir(sshd.at.path()).unwrap().filter_map(Result::ok).map(|entry| entry.path());
    let mut trees = roots.map(|root| root.join(".lockstep/staging/sftp/tree")).filter(|tree| tree.is_dir());
    trees.find_map(|tree| fs::read(hidden(&tree)?).ok()).expect("something is staged")
}

#[test]
fn a_large_file_goes_over_as_many_connections_as_bring_more() {
    let (sshd, content) = far(48 * MIB);
    for how in [&["--verify", "exec"][..], &["--verify", "read-back"]] {
        let (port, carried) = narrow(sshd.port, None);
        done(&over(&sshd, port, &[&["push", "source", &sshd.remote("arrived")], how].concat()));
        assert!(fs::read(sshd.path("arrived/large")).unwrap() == content);
        assert!(parts(&carried) >= 3, "{:?}", carried.lock().unwrap());
        fs::remove_dir_all(sshd.path("arrived")).unwrap();
    }
}

#[test]
fn a_large_file_comes_over_as_many_connections_as_bring_more_unless_it_is_new() {
    let (sshd, content) = far(48 * MIB);
    for old in [false, true] {
        if old {
            let day = SystemTime::now() - Duration::from_secs(86400);
            fs::File::options().write(true).open(sshd.path("source/large")).unwrap().set_modified(day).unwrap();
        }
        let (port, carried) = narrow(sshd.port, None);
        done(&over(&sshd, port, &["pull", &sshd.remote("source"), "fetched"]));
        assert!(fs::read(sshd.path("fetched/large")).unwrap() == content);
        assert_eq!(parts(&carried) >= 3, old, "{:?}", carried.lock().unwrap());
        fs::remove_dir_all(sshd.path("fetched")).unwrap();
    }
}

#[test]
fn as_many_connections_are_used_as_were_asked_for() {
    let (sshd, content) = far(26 * MIB);
    for most in [1, 2] {
        let (port, carried) = narrow(sshd.port, None);
        let transfers = most.to_string();
        done(&over(&sshd, port, &["push", "source", &sshd.remote("arrived"), "--transfers", &transfers]));
        assert!(fs::read(sshd.path("arrived/large")).unwrap() == content);
        assert_eq!(carried.lock().unwrap().len(), most);
        fs::remove_dir_all(sshd.path("arrived")).unwrap();
    }
}

#[test]
fn where_no_further_connection_is_to_be_had_the_one_carries_all() {
    let (sshd, content) = far(26 * MIB);
    // Those that come later are cut before they have said who they are.
    let (port, carried) = narrow(sshd.port, Some((Cut::From(1), 100)));
    done(&over(&sshd, port, &["push", "source", &sshd.remote("arrived")]));
    assert!(fs::read(sshd.path("arrived/large")).unwrap() == content);
    assert!(parts(&carried) == 1 && carried.lock().unwrap().len() > 1, "{:?}", carried.lock().unwrap());
}

#[test]
fn holes_of_a_file_that_goes_over_several_connections_are_nothing_but_zeros() {
    let (sshd, mut content) = far(48 * MIB);
    content[10 * MIB..14 * MIB].fill(0);
    content.truncate(47 * MIB);
    let at = sshd.path("source/large");
    fs::remove_file(&at).unwrap();
    let file = fs::File::create(&at).unwrap();
    file.write_all_at(&content[..10 * MIB], 0).unwrap();
    file.write_all_at(&content[14 * MIB..], 14 * MIB as u64).unwrap();
    file.set_len(49 * MIB as u64).unwrap();
    content.resize(49 * MIB, 0);
    let (port, carried) = narrow(sshd.port, None);
    done(&over(&sshd, port, &["push", "source", &sshd.remote("arrived")]));
    assert!(fs::read(sshd.path("arrived/large")).unwrap() == content);
    assert!(parts(&carried) >= 3, "{:?}", carried.lock().unwrap());
}

#[test]
fn a_file_that_another_takes_the_place_of_is_not_mixed_with_it() {
    const OPEN: u8 = 3;
    let (pair, old) = (Pair::new(), noise(21, 40 * MIB));
    let day = SystemTime::now() - Duration::from_secs(86400);
    let place = |name: &str, content: &[u8]| {
        fs::create_dir_all(pair.at("target")).unwrap();
        fs::write(pair.at(name), content).unwrap();
        fs::File::options().write(true).open(pair.at(name)).unwrap().set_modified(day).unwrap();
    };
    place("target/large", &old);
    place("other", &noise(22, 40 * MIB));
    let (other, large, opened) = (pair.at("other"), pair.at("target/large"), Arc::new(AtomicUsize::new(0)));
    let opens = Arc::clone(&opened);
    let far = || std::thread::sleep(Duration::from_micros(1200));
    let out: Hook = Arc::new(move |packet| {
        far();
        if packet[0] == OPEN && packet.windows(6).any(|part| part == b"/large") {
            // The first OPEN is of what was listed, the next ones of what has taken its place.
            if opens.fetch_add(1, Ordering::Relaxed) == 1 {
                fs::rename(&other, &large).unwrap();
            }
        }
        true
    });
    let back: Hook = Arc::new(move |_| {
        far();
        true
    });
    let lanes = pair.lanes(out, back, false, Width { workers: 1, most: 4 }).unwrap();
    let report = pair.pull_over(lanes).unwrap();
    assert!(report.is_complete(), "{:?}", report.problems);
    assert!(opened.load(Ordering::Relaxed) > 1, "{opened:?}");
    assert!(fs::read(pair.at("copy/large")).unwrap() == old);
}

#[test]
fn h34_one_of_several_connections_is_cut_and_each_run_goes_on_with_what_is_sure() {
    let (sshd, content) = far(96 * MIB);
    let arrived = sshd.remote("arrived");
    let mut sure = 0;
    for _ in 0..2 {
        let (port, carried) = narrow(sshd.port, Some((Cut::Only(2), 8 << 20)));
        ends(&over(&sshd, port, &["push", "source", &arrived]), 75, &["the connection was lost"]);
        assert!(parts(&carried) >= 3, "{:?}", carried.lock().unwrap());
        assert!(!sshd.path("arrived").exists());
        let there = staged(&sshd);
        assert!(there.len() < content.len());
        // Two thirds of what this run has sent, at least.
        let before = sure;
        sure += (there.len() - sure).saturating_sub((there.len() - sure).div_ceil(3).min(LOOSE)) / UNIT * UNIT;
        assert!(sure > before + 4 * MIB, "{before} {sure} of {}", there.len());
        assert!(there[..sure] == content[..sure]);
    }
    let (port, carried) = narrow(sshd.port, None);
    let output = over(&sshd, port, &["push", "source", &arrived]);
    done(&output);
    assert!(fs::read(sshd.path("arrived/large")).unwrap() == content, "{}", text(&output));
    let sent: u64 = carried.lock().unwrap().iter().sum();
    assert!(sent < (content.len() - sure + 4 * MIB) as u64, "{sent} bytes were sent again");
}
