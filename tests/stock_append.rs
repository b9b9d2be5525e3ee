//! What is new of a file that only grows is put at its end at a stock server too.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use lockstep::endpoint::local::LocalSource;
use lockstep::endpoint::stock::Verify;
use lockstep::monitor::Silent;
use lockstep::sync::{Options, SyncReport, run};

use super::stock_copies::{Sent, age, is_copy, noise, position, write_old};
use super::stock_pipes::{Hook, Pair, by_command, nothing, options};

const MIB: usize = 1 << 20;
const OPEN: u8 = 3;
const OLD: usize = 5 * MIB + 5;

struct Log {
    pair: Pair,
    options: Options,
    shell: bool,
}

impl Log {
    /// A log that the target has a beginning of, which is known to be that.
    fn new(shell: bool) -> Log {
        let mut options = options();
        options.begin.append_only = vec!["*.log".into()];
        let log = Log { pair: Pair::new(), options, shell };
        write_old(&log.pair, "run.log", &noise(1, OLD));
        log.pushed();
        log
    }

    fn grown(shell: bool) -> Log {
        let log = Log::new(shell);
        log.grow(2);
        log
    }

    fn there(&self) -> PathBuf {
        self.pair.at("target/run.log")
    }

    fn inode(&self) -> u64 {
        fs::metadata(self.there()).unwrap().ino()
    }

    /// A mebibyte more.
    fn grow(&self, seed: u64) {
        let path = self.pair.at("source/run.log");
        let file = fs::File::options().write(true).open(&path).unwrap();
        file.write_all_at(&noise(seed, MIB), file.metadata().unwrap().len()).unwrap();
        age(&path);
    }

    fn push_with(
        &self,
        options: &Options,
        verify: Verify,
        out: Hook,
    ) -> (Result<SyncReport, lockstep::endpoint::Error>, Arc<Sent>) {
        let sent = Arc::<Sent>::default();
        let source = LocalSource::new(&self.pair.at("source"), Some(&self.pair.at("state"))).unwrap();
        let lanes = self.pair.lanes_proven(verify, sent.counting(out), nothing(), self.shell, 1).unwrap();
        let target = by_command(lanes).keeping_sums_in(Some(&self.pair.at("state")));
        (run(&source, &target, options, &Silent::default(), &AtomicBool::new(false)), sent)
    }

    fn push(&self, out: Hook) -> Result<SyncReport, lockstep::endpoint::Error> {
        self.push_with(&self.options, Verify::Auto, out).0
    }

    fn pushed(&self) -> Arc<Sent> {
        let (report, sent) = self.push_with(&self.options, Verify::Auto, nothing());
        let report = report.unwrap();
        assert!(report.is_complete(), "{:?}", report.problems);
        self.pair.in_step();
        sent
    }
}

/// It is opened to be appended to.
fn is_opened(packet: &[u8]) -> bool {
    packet.first() == Some(&OPEN) && position(packet, b"target/run.log").is_some()
}

#[test]
fn s25_a_log_that_grew_is_the_same_file_at_a_stock_server() {
    for shell in [true, false] {
        let log = Log::new(shell);
        let before = log.inode();
        for round in 2..5 {
            log.grow(round);
            let sent = log.pushed();
            assert_eq!((log.inode(), sent.copies()), (before, 1));
            assert!(sent.content() < MIB + 30_000, "{}", sent.content());
        }
        assert!(log.pushed().content() < 20_000);
        // What changed in its middle is found by the sums that were kept of all of it.
        let mut options = log.options.clone();
        options.begin.append_only.clear();
        let path = log.pair.at("source/run.log");
        fs::File::options().write(true).open(&path).unwrap().write_all_at(b"changed", OLD as u64).unwrap();
        age(&path);
        let (report, sent) = log.push_with(&options, Verify::Auto, nothing());
        assert!(report.unwrap().is_complete() && sent.content() < 300_000, "{}", sent.content());
        log.pair.in_step();
    }
}

#[test]
fn what_is_to_be_hashed_or_kept_or_gets_other_permissions_is_staged_whole() {
    type Change = fn(&Log, &mut Options);
    let changes: [(&str, Change, Verify); 8] = [
        ("trash", |_, options| options.begin.trash_seconds = Some(3600), Verify::Auto),
        ("checksum", |_, options| options.begin.checksum = true, Verify::Auto),
        ("verify-disk", |_, options| options.begin.verify_disk = true, Verify::Auto),
        ("exec", |_, _| {}, Verify::Exec),
        ("read-back", |_, _| {}, Verify::ReadBack),
        (
            "mode there",
            |log, _| fs::set_permissions(log.there(), PermissionsExt::from_mode(0o600)).unwrap(),
            Verify::Auto,
        ),
        ("another name there", |log, _| fs::hard_link(log.there(), log.pair.at("snapshot.log")).unwrap(), Verify::Auto),
        (
            "another name",
            |log, _| fs::hard_link(log.pair.at("source/run.log"), log.pair.at("source/other")).unwrap(),
            Verify::Auto,
        ),
    ];
    for (what, change, verify) in changes {
        let log = Log::grown(true);
        let before = log.inode();
        let mut options = log.options.clone();
        change(&log, &mut options);
        let (report, _) = log.push_with(&options, verify, nothing());
        assert!(report.unwrap().is_complete(), "{what}");
        assert_ne!(log.inode(), before, "{what}");
        log.pair.in_step();
    }
}

#[test]
fn h36_what_somebody_wrote_to_before_it_was_appended_to_is_left_and_sent_by_the_next_run() {
    for shell in [true, false] {
        for more in [&b""[..], b"and more"] {
            let log = Log::grown(shell);
            let (there, done) = (log.there(), AtomicBool::new(false));
            let theirs = [&noise(3, OLD)[..], more].concat();
            let written = theirs.clone();
            let out: Hook = Arc::new(move |packet| {
                if is_opened(packet) && !done.swap(true, Ordering::Relaxed) {
                    fs::File::options().write(true).open(&there).unwrap().write_all_at(&written, 0).unwrap();
                }
                true
            });
            let report = log.push(out).unwrap();
            assert!(!report.is_complete());
            assert!(
                report
                    .committed
                    .unwrap()
                    .problems
                    .iter()
                    .any(|(path, why)| path == "run.log" && why.contains("somebody else"))
            );
            assert!(fs::read(log.there()).unwrap() == theirs);
            log.pushed();
        }
    }
}

#[test]
fn a_server_that_fails_at_it_leaves_the_file_as_it_was() {
    // It says that it fails; or that it is done, as OpenSSH's server does of what it could not write at the end.
    for (shell, lengths) in [(true, 1_u64 << 40), (false, 1 << 40), (true, 0), (false, 0)] {
        let log = Log::grown(shell);
        let before = fs::metadata(log.there()).unwrap();
        let out: Hook = Arc::new(move |packet| {
            if is_copy(packet) {
                let (from, length) = (18 + 4 + 4, 18 + 4 + 4 + 8);
                if lengths > 0 {
                    packet[from..from + 8].copy_from_slice(&lengths.to_be_bytes());
                } else {
                    packet[length..length + 8].copy_from_slice(&(MIB as u64 - 100).to_be_bytes());
                }
            }
            true
        });
        let report = log.push(out).unwrap();
        let problems = report.committed.unwrap().problems;
        assert!(
            problems.iter().any(|(path, why)| path == "run.log" && why.contains("cannot be appended to")),
            "{problems:?}"
        );
        let now = fs::metadata(log.there()).unwrap();
        assert_eq!((now.ino(), now.len(), now.mtime()), (before.ino(), before.len(), before.mtime()));
        assert!(log.pushed().content() < MIB + 30_000);
        assert_eq!(log.inode(), before.ino());
    }
}

#[test]
fn h32_wherever_a_run_breaks_off_while_it_appends_the_next_one_puts_the_rest_there() {
    let whole = [noise(1, OLD), noise(2, MIB)].concat();
    for most in 0.. {
        let log = Log::grown(most % 2 == 0);
        let before = log.inode();
        let (left, begun) = (AtomicUsize::new(most), AtomicBool::new(false));
        let cut: Hook = Arc::new(move |packet| {
            let begun = begun.fetch_or(is_opened(packet), Ordering::Relaxed) || is_opened(packet);
            !begun || left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok()
        });
        let ended = log.push(cut).is_ok();
        let there = fs::read(log.there()).unwrap();
        assert!(there.len() >= OLD && whole.starts_with(&there), "after {most}: {}", there.len());
        // It has grown further meanwhile.
        if most % 3 == 0 {
            log.grow(3);
        }
        log.pushed();
        assert_eq!(log.inode(), before, "after {most}");
        if ended {
            break;
        }
    }
}

#[test]
fn h36_what_somebody_wrote_to_after_a_run_broke_off_is_sent_whole() {
    let log = Log::grown(true);
    let copied = AtomicBool::new(false);
    let cut: Hook = Arc::new(move |packet| !copied.fetch_or(is_copy(packet), Ordering::Relaxed) || is_copy(packet));
    log.push(cut).unwrap_err();
    let before = log.inode();
    fs::File::options().write(true).open(log.there()).unwrap().write_all_at(b"theirs", 77).unwrap();
    // The run that finishes the one before tells it, and the file is sent whole.
    let _ = log.push(nothing());
    log.pushed();
    assert_ne!(log.inode(), before);
}

/// Another beginning of which the sums of blocks are the same: CRC-32 does not change where its polynomial is added anywhere.
fn changed_unseen(data: &mut [u8]) {
    const POLYNOMIAL: u64 = 0x1_04C1_1DB7;
    for bit in (0..33).filter(|bit| POLYNOMIAL >> (32 - bit) & 1 == 1) {
        data[1000 + bit / 8] ^= 1 << (bit % 8);
    }
}

#[test]
fn a_beginning_that_only_has_the_same_sums_is_found_out() {
    for shell in [true, false] {
        let log = Log::new(shell);
        // Whole blocks, so that all of what is there is found to be the same.
        let mut data = noise(1, 5 * MIB);
        write_old(&log.pair, "run.log", &data);
        log.pushed();
        assert_eq!(crc32fast::hash(&data), {
            changed_unseen(&mut data);
            crc32fast::hash(&data)
        });
        write_old(&log.pair, "run.log", &data);
        // Where nothing is known of it any more it is read.
        for entry in fs::read_dir(log.pair.at("state")).unwrap() {
            let path = entry.unwrap().path();
            if path.is_file() && !path.display().to_string().contains("/sums-") {
                fs::remove_file(path).unwrap();
            }
        }
        log.grow(2);
        log.pushed();
    }
}
