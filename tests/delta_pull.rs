//! Of what is here already nothing is fetched: the other end sends what has changed, and says what is to be copied.

use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use sha2::Digest as _;

use crate::kit::area::{contents, write};
use crate::kit::served::Served;
use crate::kit::sshd::Sshd;
use crate::kit::{done, noise, summary, text};

const MIB: usize = 1 << 20;

/// Pulls what `sync` has in `data` to a directory here; how many bytes went over the wire.
fn pull(served: &Served, more: &[&str]) -> u64 {
    let to = served.path("here").display().to_string();
    let output = served.lockstep(&[&["pull", "--json", "sync@127.0.0.1:/data", &to], more].concat(), "sync");
    assert!(output.status.success(), "{}", text(&output));
    let summary = summary(&output);
    let mut found = contents(&served.path("here"));
    found.retain(|path, _| !path.starts_with(".lockstep"));
    assert!(found == contents(&served.path("sync/data")), "the target is not the source");
    summary["wire_bytes"].as_u64().unwrap()
}

#[test]
fn s25_of_a_file_that_changed_only_what_changed_is_fetched() {
    let served = Served::start("", "");
    let data = served.path("sync/data");
    let old = noise(1, 24 * MIB);
    write(&data, "sub/model.bin", &old);
    let wire = pull(&served, &[]);
    assert!(wire > 24 * MIB as u64, "{wire}");
    let mut changed = old.clone();
    changed[9 * MIB..9 * MIB + 1000].fill(7);
    for (what, new, most) in [
        ("bytes in the middle", changed, 2 * MIB),
        ("a longer header", [b"a header", &old[..]].concat(), 2 * MIB),
        ("more at the end", [&old[..], &noise(2, MIB)].concat(), 3 * MIB),
        ("less at the end", old[..20 * MIB].to_vec(), 2 * MIB),
        ("parts that changed places", [&old[12 * MIB..], &old[..12 * MIB]].concat(), 6 * MIB),
    ] {
        write(&data, "sub/model.bin", &new);
        let wire = pull(&served, &[]);
        assert!(wire < most as u64, "{what}: {wire} bytes");
    }
    // What is not alike is sent, and arrives.
    write(&data, "sub/model.bin", &noise(3, 12 * MIB));
    assert!(pull(&served, &[]) > 12 * MIB as u64);
}

#[test]
fn s25_what_is_here_under_another_name_is_not_fetched_again() {
    let served = Served::start("", "");
    let data = served.path("sync/data");
    write(&data, "checkpoint-1/a.bin", &noise(1, 6 * MIB));
    write(&data, "checkpoint-1/b.bin", &noise(2, 6 * MIB));
    pull(&served, &[]);
    // The next checkpoint: one layer is frozen, of the other a part has changed.
    let mut b = noise(2, 6 * MIB);
    b[MIB..MIB + 10].fill(0);
    write(&data, "checkpoint-2/a.bin", &noise(1, 6 * MIB));
    write(&data, "checkpoint-2/b.bin", &b);
    let wire = pull(&served, &[]);
    assert!(wire < 2 * MIB as u64, "{wire}");
    fs::rename(data.join("checkpoint-2"), data.join("checkpoint-3")).unwrap();
    let wire = pull(&served, &["--delete"]);
    assert!(wire < MIB as u64, "{wire}");
}

#[test]
fn many_files_are_compared_at_once_over_several_connections() {
    let served = Served::start("", "");
    let data = served.path("sync/data");
    let file = |number: u64, at: usize| {
        let mut bytes = noise(number, 3 * MIB / 2);
        bytes[at..at + 10].fill(number as u8);
        bytes
    };
    (0..40).for_each(|number| write(&data, &format!("{number}.bin"), &file(number, 0)));
    let all = pull(&served, &["--transfers", "4"]);
    (0..40).for_each(|number| write(&data, &format!("{number}.bin"), &file(number, MIB)));
    let wire = pull(&served, &["--transfers", "4"]);
    assert!(wire < all / 2, "{wire} of {all}");
}

#[test]
fn what_is_told_gets_through_however_many_requests_wait() {
    let sshd = Sshd::start();
    let served = Served::start("", "");
    let (there, data) = (sshd.path("there"), served.path("sync/data"));
    let lay_out = |at: &Path, changed: usize| {
        let large = |seed: u64, length: usize| {
            let mut bytes = noise(seed, length);
            (0..length / MIB).for_each(|mib| bytes[mib * MIB + changed] ^= changed as u8);
            bytes
        };
        (0..40).for_each(|number| write(at, &format!("{number}.bin"), &large(number, 5 * MIB / 4)));
        write(at, "large.bin", &large(99, 30 * MIB));
    };
    for changed in [0, 77] {
        lay_out(&data, changed);
        lay_out(&there, changed);
        for transfers in ["16", "3"] {
            pull(&served, &["--transfers", transfers]);
        }
        // An agent behind sshd has one connection for everything.
        done(&sshd.lockstep(&["pull", &sshd.remote("there"), "here", "--transfers", "12"]));
        assert!(fs::read(sshd.path("here/large.bin")).unwrap() == fs::read(there.join("large.bin")).unwrap());
    }
}

#[test]
fn one_file_that_is_named_is_compared_too() {
    let served = Served::start("", "");
    let mut bytes = noise(3, 6 * MIB);
    let (from, to) = ("sync@127.0.0.1:/data/model.bin", served.path("one").display().to_string());
    for most in [7 * MIB as u64, MIB as u64] {
        write(&served.path("sync/data"), "model.bin", &bytes);
        let output = served.lockstep(&["pull", "--json", from, &format!("{to}/")], "sync");
        let summary = summary(&output);
        assert!(fs::read(served.path("one/model.bin")).unwrap() == bytes);
        assert!(summary["wire_bytes"].as_u64().unwrap() < most, "{summary}");
        bytes[3 * MIB] ^= 1;
    }
}

#[test]
fn a_file_with_holes_is_compared_too() {
    let served = Served::start("", "");
    let data = served.path("sync/data");
    let mut bytes = noise(5, 12 * MIB);
    bytes[4 * MIB..8 * MIB].fill(0);
    write(&data, "sparse.bin", &bytes);
    pull(&served, &[]);
    bytes[10 * MIB] ^= 1;
    let at = data.join("sparse.bin");
    fs::remove_file(&at).unwrap();
    let file = fs::File::create(&at).unwrap();
    file.write_all_at(&bytes[..4 * MIB], 0).unwrap();
    file.write_all_at(&bytes[8 * MIB..], 8 * MIB as u64).unwrap();
    let wire = pull(&served, &[]);
    assert!(wire < 2 * MIB as u64, "{wire}");
}

#[test]
fn h24_what_was_made_of_the_wrong_parts_is_noticed_and_fetched_whole() {
    let served = Served::start("", "");
    let data = served.path("sync/data");
    let mut content = noise(7, 70 * MIB);
    write(&data, "model.bin", &content);
    pull(&served, &[]);
    // Sums of what is to come, where something else lies.
    let name = lockstep::manifest::Digest(sha2::Sha256::digest(&content).into()).to_string();
    let sums = served.path("here/.lockstep/sums").join(name);
    let mut wrong = fs::read(&sums).unwrap();
    content[10 * MIB..10 * MIB + 200_000].copy_from_slice(&noise(9, 200_000));
    for block in (10 * MIB) / 65_536..=(10 * MIB + 200_000) / 65_536 {
        let sum = crc32fast::hash(&content[block * 65_536..][..65_536]);
        wrong[24 + block * 4..][..4].copy_from_slice(&sum.to_le_bytes());
    }
    fs::write(&sums, wrong).unwrap();
    write(&data, "model.bin", &content);
    assert!(pull(&served, &[]) > 70 * MIB as u64);
    // With sums that are right only what has changed is fetched.
    content[30 * MIB..30 * MIB + 9].fill(1);
    write(&data, "model.bin", &content);
    let wire = pull(&served, &[]);
    assert!(wire < MIB as u64, "{wire}");
}
