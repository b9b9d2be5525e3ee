//! What only gets another name is renamed at a stock server too, where its old name goes.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use lockstep::endpoint::local::LocalSource;
use lockstep::endpoint::stock::Verify;
use lockstep::monitor::Silent;
use lockstep::sync::{Options, SyncReport, run};

use super::stock_copies::{Sent, noise, not_offering, position, push_with, pushed, write_old};
use super::stock_pipes::{Hook, Pair, by_command, nothing, options};

const LSTAT: u8 = 7;
const EXTENDED: u8 = 200;
const HARD_LINK: &[u8] = b"\0\0\0\x14hardlink@openssh.com";
const SIZES: [usize; 3] = [20 << 10, 300_001, 9 << 20];

fn is_link(packet: &[u8]) -> bool {
    packet.first() == Some(&EXTENDED) && packet.get(5..).is_some_and(|body| body.starts_with(HARD_LINK))
}

/// A target that holds files of several sizes in `a`.
fn holding(shell: bool) -> Pair {
    let pair = Pair::new();
    for (number, size) in SIZES.into_iter().enumerate() {
        write_old(&pair, &format!("a/{number}"), &noise(number as u64, size));
    }
    write_old(&pair, "same", b"it stays");
    pushed(&pair, shell);
    pair
}

/// The same, called `b` at the source now.
fn renamed(shell: bool) -> Pair {
    let pair = holding(shell);
    rename(&pair, "a", "b");
    pair
}

fn rename(pair: &Pair, from: &str, to: &str) {
    fs::rename(pair.at("source").join(from), pair.at("source").join(to)).unwrap();
}

fn inodes(pair: &Pair, directory: &str) -> Vec<u64> {
    let inode = |number: usize| {
        let found = fs::symlink_metadata(pair.at("target").join(directory).join(number.to_string())).unwrap();
        assert_eq!(found.nlink(), 1, "{directory}/{number} has another name");
        found.ino()
    };
    (0..SIZES.len()).map(inode).collect()
}

/// Pushes with these options, `out` seeing what goes.
fn push(pair: &Pair, options: &Options, verify: Verify, out: Hook, shell: bool) -> (SyncReport, Arc<Sent>) {
    let sent = Arc::<Sent>::default();
    let source = LocalSource::new(&pair.at("source"), Some(&pair.at("state"))).unwrap();
    let target = by_command(pair.lanes_proven(verify, sent.counting(out), nothing(), shell, 1).unwrap());
    let report = run(&source, &target, options, &Silent::default(), &AtomicBool::new(false)).unwrap();
    (report, sent)
}

#[test]
fn s25_a_renamed_checkpoint_is_the_same_files_at_a_stock_server() {
    for shell in [true, false] {
        let pair = renamed(shell);
        let before = inodes(&pair, "a");
        let sent = pushed(&pair, shell);
        assert_eq!(inodes(&pair, "b"), before);
        assert!(sent.copies() == 0 && sent.content() < 20_000, "{} {}", sent.copies(), sent.content());
        // And into a directory that is there, over something else.
        fs::create_dir(pair.at("source/c")).unwrap();
        write_old(&pair, "c/b", b"it goes");
        pushed(&pair, shell);
        fs::remove_file(pair.at("source/c/b")).unwrap();
        rename(&pair, "b", "c/b");
        pushed(&pair, shell);
        assert_eq!(inodes(&pair, "c/b"), before);
    }
}

#[test]
fn what_is_to_be_hashed_or_kept_is_copied() {
    let kept = |change: fn(&mut Options)| {
        let mut options = options();
        change(&mut options);
        options
    };
    let stays = kept(|options| options.delete = false);
    let trash = kept(|options| options.begin.trash_seconds = Some(3600));
    let checksum = kept(|options| options.begin.checksum = true);
    for (options, verify) in [
        (&stays, Verify::Auto),
        (&trash, Verify::Auto),
        (&checksum, Verify::Auto),
        (&options(), Verify::Exec),
        (&options(), Verify::ReadBack),
    ] {
        let pair = renamed(true);
        let before = inodes(&pair, "a");
        let (report, sent) = push(&pair, options, verify, nothing(), true);
        assert!(report.is_complete() && sent.copies() == SIZES.len(), "{verify:?}: {:?}", report.problems);
        let now: Vec<u64> = inodes(&pair, "b");
        assert!(now.iter().all(|inode| !before.contains(inode)), "{verify:?}");
        if options.delete {
            pair.in_step();
        }
    }
}

#[test]
fn one_that_is_wanted_twice_or_has_further_names_or_other_permissions_is_copied() {
    let pair = holding(true);
    for directory in ["x", "y"] {
        write_old(&pair, &format!("{directory}/same"), &noise(8, SIZES[1]));
    }
    pushed(&pair, true);
    let before = inodes(&pair, "a");
    // What lies there is to be written to by nobody; at the source it is not.
    fs::set_permissions(pair.at("target/a/2"), PermissionsExt::from_mode(0o444)).unwrap();
    rename(&pair, "a", "b");
    rename(&pair, "x", "p");
    rename(&pair, "y", "q");
    let former = fs::metadata(pair.at("target/x/same")).unwrap().ino();
    pushed(&pair, true);
    let now = inodes(&pair, "b");
    assert!(now[..2] == before[..2] && now[2] != before[2]);
    let two = ["p", "q"].map(|directory| fs::metadata(pair.at("target").join(directory).join("same")).unwrap());
    assert!(two[0].ino() != two[1].ino() && two.iter().any(|found| found.ino() == former));
    // One that somebody has given a further name, elsewhere.
    fs::hard_link(pair.at("target/b/1"), pair.at("snapshot")).unwrap();
    rename(&pair, "b", "c");
    pushed(&pair, true);
    assert_eq!(fs::metadata(pair.at("target/c/0")).unwrap().ino(), before[0]);
    assert_ne!(fs::metadata(pair.at("target/c/1")).unwrap().ino(), before[1]);
    rename(&pair, "c", "b");
    pushed(&pair, true);
    // A file with two names, of which one goes.
    fs::hard_link(pair.at("source/b/2"), pair.at("source/further")).unwrap();
    pushed(&pair, true);
    rename(&pair, "b", "c");
    pushed(&pair, true);
    let names = ["c/2", "further"].map(|name| fs::metadata(pair.at("target").join(name)).unwrap());
    assert!(names[0].ino() == names[1].ino() && names[0].nlink() == 2);
}

#[test]
fn a_server_that_does_not_link_is_asked_to_copy() {
    for shell in [true, false] {
        // It offers it, and cannot.
        let unknown: Hook = Arc::new(|packet| {
            if is_link(packet) {
                packet[9] = b'x';
            }
            true
        });
        for (out, back) in [(nothing(), not_offering(b"hardlink")), (unknown, nothing())] {
            let pair = renamed(shell);
            let (report, sent) = push_with(&pair, out, back, shell);
            assert!(report.is_complete(), "{:?}", report.problems);
            pair.in_step();
            assert!(sent.copies() == SIZES.len() && sent.content() < 20_000, "{} {}", sent.copies(), sent.content());
        }
    }
}

/// Does `change` to a file of the target once, when this is the `nth` packet that `is` one.
fn once(pair: &Pair, nth: usize, is: fn(&[u8]) -> bool, change: fn(&fs::File)) -> Hook {
    let (seen, there) = (AtomicUsize::new(0), pair.at("target/a/2"));
    Arc::new(move |packet| {
        if is(packet) && seen.fetch_add(1, Ordering::Relaxed) == nth {
            change(&fs::File::options().write(true).open(&there).unwrap());
        }
        true
    })
}

#[test]
fn h36_what_somebody_wrote_to_until_it_is_linked_is_left_and_sent_by_the_next_run() {
    for shell in [true, false] {
        let pair = renamed(shell);
        let write = once(&pair, 0, is_link, |file| file.write_all_at(b"theirs", 9).unwrap());
        let (report, _) = push_with(&pair, write, nothing(), shell);
        assert!(!report.is_complete());
        assert!(report.problems.iter().any(|problem| format!("{problem:?}").contains("b/2")), "{:?}", report.problems);
        // Nothing is lost, and nothing that was not proven has the new name.
        assert!(pair.at("target/a/2").exists() && !pair.at("target/b/2").exists());
        // The others are copies: what stays is a file of its own.
        assert!(report.deletion_held_back);
        for (directory, number) in [("a", 0), ("a", 1), ("b", 0), ("b", 1)] {
            let found = fs::metadata(pair.at("target").join(directory).join(number.to_string())).unwrap();
            assert_eq!(found.nlink(), 1, "{directory}/{number}");
        }
        pushed(&pair, shell);
    }
}

#[test]
fn h36_what_somebody_wrote_to_after_it_was_linked_is_not_published() {
    for shell in [true, false] {
        let pair = renamed(shell);
        let looked =
            |packet: &[u8]| packet.first() == Some(&LSTAT) && position(packet, b"staging/sftp/tree/b/2").is_some();
        let write = once(&pair, 1, looked, |file| file.write_all_at(b"theirs", 9).unwrap());
        let refused = pair.push(write, nothing(), shell).unwrap_err().to_string();
        assert!(refused.contains("'a/2'") && refused.contains("nothing was published"), "{refused}");
        assert!(pair.at("target/a/2").exists() && !pair.at("target/b").exists());
        pushed(&pair, shell);
        assert_eq!(fs::metadata(pair.at("target/b/2")).unwrap().nlink(), 1);
    }
}

#[test]
fn what_was_changed_there_and_has_its_time_still_is_found_where_it_is_hashed() {
    let checksum =
        Options { begin: lockstep::endpoint::BeginOptions { checksum: true, ..options().begin }, ..options() };
    for (options, verify, found) in [
        (&options(), Verify::Auto, false),
        (&checksum, Verify::Auto, true),
        (&options(), Verify::Exec, true),
        (&options(), Verify::ReadBack, true),
    ] {
        let pair = renamed(true);
        let there = pair.at("target/a/2");
        let modified = fs::metadata(&there).unwrap().modified().unwrap();
        let file = fs::File::options().write(true).open(&there).unwrap();
        file.write_all_at(b"theirs", 9).unwrap();
        file.set_modified(modified).unwrap();
        let (report, _) = push(&pair, options, verify, nothing(), true);
        assert!(report.is_complete(), "{:?}", report.problems);
        assert_eq!(fs::read(pair.at("target/b/2")).unwrap() == noise(2, SIZES[2]), found, "{verify:?}");
    }
}

#[test]
fn where_a_new_name_cannot_be_given_the_old_one_stays() {
    for shell in [true, false] {
        let pair = renamed(shell);
        let before = inodes(&pair, "a");
        // Somebody has made what has that name at the source, when it is to get it.
        let (taken, done) = (pair.at("target/b"), AtomicBool::new(false));
        let out: Hook = Arc::new(move |packet| {
            if position(packet, b"staging/sftp/commit.new").is_some() && !done.swap(true, Ordering::Relaxed) {
                fs::create_dir(&taken).unwrap();
                fs::write(taken.join("theirs"), "theirs").unwrap();
            }
            true
        });
        let (report, _) = push_with(&pair, out, nothing(), shell);
        assert!(!report.is_complete());
        assert_eq!(inodes(&pair, "a"), before);
        // The manifest says what is there.
        let manifest =
            lockstep::manifest::format::decode(&fs::read(pair.at("target/.lockstep/manifest")).unwrap()).unwrap();
        let listed: Vec<String> = manifest.tree.entries().iter().map(|entry| entry.path.to_string()).collect();
        assert_eq!(listed, ["a", "a/0", "a/1", "a/2", "same"]);
        pushed(&pair, shell);
    }
}

#[test]
fn h36_what_somebody_wrote_to_after_a_run_broke_off_that_was_to_publish_is_not_published() {
    let pair = renamed(true);
    let recorded = AtomicBool::new(false);
    let cut: Hook = Arc::new(move |packet| {
        let names_it = position(packet, b"posix-rename").is_some() && position(packet, b"sftp/commit.new").is_some();
        !recorded.fetch_or(names_it, Ordering::Relaxed) || names_it
    });
    pair.push(cut, nothing(), true).unwrap_err();
    assert!(pair.at("target/.lockstep/staging/sftp/commit").exists() && !pair.at("target/b").exists());
    fs::File::options().write(true).open(pair.at("target/a/2")).unwrap().write_all_at(b"theirs", 9).unwrap();
    // The next run finishes that, and sends it.
    let seen = Arc::new(AtomicBool::new(false));
    let (sees, there) = (Arc::clone(&seen), pair.at("target/b/2"));
    let out: Hook = Arc::new(move |_| {
        let theirs = fs::read(&there).is_ok_and(|data| data != noise(2, SIZES[2]));
        sees.fetch_or(theirs, Ordering::Relaxed);
        true
    });
    let (report, _) = push_with(&pair, out, nothing(), true);
    assert!(report.is_complete() && !seen.load(Ordering::Relaxed), "{:?}", report.problems);
    pair.in_step();
}

#[test]
fn where_something_fails_nothing_goes_and_they_are_copied() {
    let pair = renamed(true);
    let before = inodes(&pair, "a");
    pair.write("new", noise(7, 1000));
    let gone = pair.at("source/new");
    // It is listed, and gone when it is to be read.
    let out: Hook = Arc::new(move |packet| {
        if position(packet, b"staging/sftp/plan").is_some() {
            let _ = fs::remove_file(&gone);
        }
        true
    });
    let (report, sent) = push_with(&pair, out, nothing(), true);
    assert!(!report.is_complete() && sent.copies() == SIZES.len(), "{}: {:?}", sent.copies(), report.problems);
    assert_eq!(inodes(&pair, "a"), before);
    assert!(inodes(&pair, "b").iter().all(|inode| !before.contains(inode)));
    pushed(&pair, true);
}

#[test]
fn h32_wherever_a_run_breaks_off_once_it_links_nothing_is_lost() {
    for most in 0.. {
        let (shell, back, stays) = (most % 2 == 0, most % 3 == 0, most % 3 == 1);
        let pair = renamed(shell);
        let (left, begun) = (AtomicUsize::new(most), AtomicBool::new(false));
        let cut: Hook = Arc::new(move |packet| {
            let begun = begun.fetch_or(is_link(packet), Ordering::Relaxed) || is_link(packet);
            let goes_on = |left: usize| left.checked_sub(1);
            !begun || left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, goes_on).is_ok()
        });
        let ended = pair.push(cut, nothing(), shell).is_ok();
        // Each is there under one of its names at least.
        for (number, size) in SIZES.into_iter().enumerate() {
            let places = ["a", "b", ".lockstep/staging/sftp/tree/b"];
            let found = places.iter().find_map(|at| fs::read(pair.at("target").join(at).join(number.to_string())).ok());
            assert!(found == Some(noise(number as u64, size)), "after {most}: {number}");
        }
        // It has its old name back by then, and is to be what it was.
        if back {
            rename(&pair, "b", "a");
        }
        // Where it keeps its old name, that is not one more name of the same file.
        let options = Options { delete: !stays, ..options() };
        let (report, _) = push(&pair, &options, Verify::Auto, nothing(), shell);
        assert!(report.is_complete(), "{:?}", report.problems);
        for directory in ["a", "b"].iter().filter(|directory| pair.at("target").join(directory).exists()) {
            inodes(&pair, directory);
        }
        pushed(&pair, shell);
        inodes(&pair, if back { "a" } else { "b" });
        if ended {
            break;
        }
    }
}
