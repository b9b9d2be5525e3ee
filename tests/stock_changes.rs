//! Of a file that a stock server has an older version of, only what changed is sent: what was where it is now the server copies.

use std::fs;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use lockstep::endpoint::local::LocalSource;
use lockstep::endpoint::stock::Verify;
use lockstep::monitor::Silent;
use lockstep::sync::run;

use super::stock_copies::{Sent, is_copy, noise, push_with, pushed, write_old};
use super::stock_pipes::{COMMAND, Hook, Pair, by_command, nothing, options};

const MIB: usize = 1 << 20;
const WRITE: u8 = 6;
/// What a run sends beside content, and rounds up to whole blocks.
const LITTLE: usize = 300_000;

/// A target that holds a file.
fn holding(data: &[u8], shell: bool) -> Pair {
    let pair = Pair::new();
    write_old(&pair, "sub/model.bin", data);
    assert!(pushed(&pair, shell).content() > data.len());
    pair
}

#[test]
fn of_a_file_that_changed_only_what_changed_is_sent() {
    for shell in [true, false] {
        let mut old = noise(1, 40 * MIB + 7);
        let pair = holding(&old, shell);
        let mut changed = old.clone();
        for at in [0, 9 * MIB, 30 * MIB + 5] {
            changed[at..at + 1000].fill(7);
        }
        let longer = [&changed[..], &noise(2, 6 * MIB)].concat();
        let mut replaced = longer.clone();
        replaced[..10 * MIB].copy_from_slice(&noise(3, 10 * MIB));
        let shorter = replaced[..20 * MIB].to_vec();
        for (what, new, most) in [
            ("three places", changed, 3 << 16),
            ("more at the end", longer, 6 * MIB),
            ("another beginning", replaced, 10 * MIB),
            ("less at the end", shorter.clone(), 0),
            ("the same", shorter.clone(), 0),
            ("all of it", noise(4, 20 * MIB), 20 * MIB),
        ] {
            write_old(&pair, "sub/model.bin", &new);
            let sent = pushed(&pair, shell);
            assert!(sent.content() < most + LITTLE, "{what}: {}", sent.content());
            // A long part that is new goes by the command, and the rest beside it.
            if shell && most >= 10 * MIB {
                assert!(sent.given() >= most - 9 * MIB, "{what}: {}", sent.given());
            }
            assert_eq!(sent.copies() == 0, new == old || most == new.len(), "{what}: {}", sent.copies());
            old = new;
        }
    }
}

#[test]
fn what_has_another_name_and_was_never_read_under_it_is_compared_with_what_is_like_it() {
    for shell in [true, false] {
        let data = noise(1, 9 * MIB);
        let pair = holding(&data, shell);
        // Others of that size.
        for number in 2..5 {
            write_old(&pair, &format!("sub/{number}.bin"), &noise(number, 9 * MIB));
        }
        pushed(&pair, shell);
        fs::rename(pair.at("source/sub/model.bin"), pair.at("source/sub/final.bin")).unwrap();
        write_old(&pair, "copies/3.bin", &noise(3, 9 * MIB));
        let sent = pushed(&pair, shell);
        assert!(sent.content() < LITTLE, "{}", sent.content());
    }
}

#[test]
fn without_what_was_known_of_it_a_file_is_sent_whole() {
    let mut data = noise(1, 9 * MIB);
    let pair = holding(&data, false);
    let state = fs::read_dir(pair.at("state")).unwrap().map(|entry| entry.unwrap().path());
    let sums: Vec<_> = state.filter(|path| path.display().to_string().contains("/sums-")).collect();
    assert_eq!(sums.len(), 1);
    for lost in [true, false] {
        if lost {
            fs::remove_file(&sums[0]).unwrap();
        } else {
            fs::write(&sums[0], "damaged").unwrap();
        }
        data[0] ^= 1;
        write_old(&pair, "sub/model.bin", &data);
        let sent = pushed(&pair, false);
        assert!(sent.content() > data.len() && sent.copies() == 0);
        // Then it is known again.
        data[0] ^= 1;
        write_old(&pair, "sub/model.bin", &data);
        assert!(pushed(&pair, false).content() < LITTLE);
    }
}

#[test]
fn what_was_changed_there_and_has_its_time_still_is_found_out_and_the_file_sent() {
    for shell in [true, false] {
        let mut data = noise(1, 9 * MIB);
        let pair = holding(&data, shell);
        let there = pair.at("target/sub/model.bin");
        let modified = fs::metadata(&there).unwrap().modified().unwrap();
        let file = fs::File::options().write(true).open(&there).unwrap();
        file.write_all_at(b"changed", 5 << 20).unwrap();
        file.set_modified(modified).unwrap();
        data[100] ^= 1;
        write_old(&pair, "sub/model.bin", &data);
        let sent = pushed(&pair, shell);
        assert!(sent.copies() > 0 && sent.content() > data.len());
    }
}

#[test]
fn content_that_changed_on_the_way_between_copies_is_found_out() {
    for shell in [true, false] {
        let mut data = noise(1, 9 * MIB);
        let pair = holding(&data, shell);
        data[MIB..MIB + 7].copy_from_slice(b"content");
        data[4 * MIB..6 * MIB].copy_from_slice(&noise(2, 2 * MIB));
        write_old(&pair, "sub/model.bin", &data);
        let once = AtomicBool::new(true);
        let flip: Hook = Arc::new(move |packet| {
            let found = packet.windows(7).position(|bytes| bytes == b"content");
            if let Some(at) = found.filter(|_| matches!(packet.first(), Some(&(WRITE | COMMAND))))
                && once.swap(false, Ordering::Relaxed)
            {
                packet[at] ^= 1;
            }
            true
        });
        let (report, sent) = push_with(&pair, flip, nothing(), shell);
        assert!(report.is_complete() && sent.content() > data.len(), "{}", sent.content());
        pair.in_step();
    }
}

#[test]
fn a_change_that_was_cut_off_is_gone_on_with() {
    for shell in [true, false] {
        for most in [0, 1, 3, 5] {
            let mut data = noise(1, 40 * MIB);
            let pair = holding(&data, shell);
            for at in 0..5 {
                data[(8 * at + 1) * MIB] ^= 1;
            }
            write_old(&pair, "sub/model.bin", &data);
            let left = AtomicUsize::new(most);
            let cut: Hook = Arc::new(move |packet| {
                !is_copy(packet)
                    || left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok()
            });
            pair.push(cut, nothing(), shell).unwrap_err();
            let sent = pushed(&pair, shell);
            assert!(sent.content() < 2 * LITTLE, "{}", sent.content());
        }
    }
}

#[test]
fn the_end_alone_of_a_file_that_only_grows_is_read_and_sent() {
    for shell in [true, false] {
        for known in [true, false] {
            let pair = Pair::new();
            let mut options = options();
            options.begin.append_only = vec!["*.log".into()];
            // That is for what changes.
            options.begin.whole_files = !known;
            let push = |verify| {
                let sent = Arc::<Sent>::default();
                let source = LocalSource::new(&pair.at("source"), Some(&pair.at("state"))).unwrap();
                let lanes = pair.lanes_proven(verify, sent.counting(nothing()), nothing(), shell, 1).unwrap();
                let target = by_command(lanes);
                // What it begins with is known by its digest, and needs no sums.
                let sums = pair.at("state");
                let target = target.keeping_sums_in(known.then_some(&sums));
                let report = run(&source, &target, &options, &Silent::default(), &AtomicBool::new(false)).unwrap();
                assert!(report.is_complete(), "{:?}", report.problems);
                pair.in_step();
                (sent, report.transferred_bytes)
            };
            let log = write_old(&pair, "run.log", &noise(1, 9 * MIB + 5));
            push(Verify::Auto);
            for round in 1..3 {
                let length = fs::metadata(&log).unwrap().len();
                fs::File::options().write(true).open(&log).unwrap().write_all_at(&noise(2, MIB), length).unwrap();
                let (sent, read) = push(Verify::Auto);
                assert!(sent.content() < MIB + LITTLE, "{}", sent.content());
                assert_eq!((sent.copies(), read), (1, MIB as u64), "{round}");
            }
            // Written anew at the server meanwhile: the beginning is not what it was.
            let there = pair.at("target/run.log");
            let modified = fs::metadata(&there).unwrap().modified().unwrap();
            let file = fs::File::options().write(true).open(&there).unwrap();
            file.write_all_at(b"changed", 1000).unwrap();
            file.set_modified(modified).unwrap();
            let length = fs::metadata(&log).unwrap().len();
            fs::File::options().write(true).open(&log).unwrap().write_all_at(b"more", length).unwrap();
            let hashed = if shell { Verify::Exec } else { Verify::ReadBack };
            assert!(push(hashed).0.content() > 9 * MIB);
        }
    }
}

#[test]
fn h36_what_is_changed_there_between_comparing_and_publishing_is_not_taken_for_what_it_was() {
    for shell in [true, false] {
        let data = noise(1, 20_000);
        let pair = holding(&data, shell);
        // Another time, the same content: it is compared, and gets that time.
        fs::File::options()
            .write(true)
            .open(pair.at("source/sub/model.bin"))
            .unwrap()
            .set_modified(std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_100_000_000))
            .unwrap();
        let (there, done) = (pair.at("target/sub/model.bin"), AtomicBool::new(false));
        let other = noise(2, 20_000);
        let out: Hook = Arc::new(move |packet| {
            let publishes = packet.windows(23).any(|bytes| bytes == b"staging/sftp/commit.new");
            if publishes && !done.swap(true, Ordering::Relaxed) {
                fs::write(&there, &other).unwrap();
            }
            true
        });
        let (report, _) = push_with(&pair, out, nothing(), shell);
        let told: Vec<_> = report.problems.iter().map(|problem| problem.message.as_str()).collect();
        assert!(told.iter().any(|told| told.contains("changed by somebody else after it was compared")), "{told:?}");
        pushed(&pair, shell);
        assert_eq!(fs::read(pair.at("target/sub/model.bin")).unwrap(), data);
    }
}
