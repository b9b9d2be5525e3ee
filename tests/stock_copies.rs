//! What a stock server has already is not sent again: it copies it itself, and what it made is proven like all that is sent.

use std::fs;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock};
use std::time::{Duration, SystemTime};

use lockstep::endpoint::local::LocalSource;
use lockstep::monitor::Silent;
use lockstep::sync::{Options, SyncReport, run};

use super::stock_pipes::{COMMAND, Hook, Pair, by_command, nothing, options};

const OPEN: u8 = 3;
const WRITE: u8 = 6;
const EXTENDED: u8 = 200;
const VERSION: u8 = 2;
const COPY_DATA: &[u8] = b"\0\0\0\x09copy-data";

pub(super) fn is_copy(packet: &[u8]) -> bool {
    packet.first() == Some(&EXTENDED) && packet.get(5..).is_some_and(|body| body.starts_with(COPY_DATA))
}

/// A server that does not offer what is called so.
pub(super) fn not_offering(extension: &'static [u8]) -> Hook {
    Arc::new(move |packet| {
        if packet.first() == Some(&VERSION)
            && let Some(at) = position(packet, extension)
        {
            packet[at] = b'x';
        }
        true
    })
}

pub(super) fn position(packet: &[u8], what: &[u8]) -> Option<usize> {
    packet.windows(what.len()).position(|bytes| bytes == what)
}

/// What went to the server.
#[derive(Default)]
pub(super) struct Sent {
    /// Requests to copy.
    copies: AtomicUsize,
    /// Bytes of what carries content.
    content: AtomicUsize,
    /// Those of them that a command was given.
    given: AtomicUsize,
}

impl Sent {
    pub(super) fn copies(&self) -> usize {
        self.copies.load(Ordering::Relaxed)
    }

    pub(super) fn content(&self) -> usize {
        self.content.load(Ordering::Relaxed)
    }

    pub(super) fn given(&self) -> usize {
        self.given.load(Ordering::Relaxed)
    }

    /// Counts what passes, after `first` has seen it.
    pub(super) fn counting(self: &Arc<Sent>, first: Hook) -> Hook {
        let sent = Arc::clone(self);
        Arc::new(move |packet| {
            let goes_on = first(packet);
            if is_copy(packet) {
                sent.copies.fetch_add(1, Ordering::Relaxed);
            }
            if matches!(packet.first(), Some(&(WRITE | COMMAND))) {
                sent.content.fetch_add(packet.len(), Ordering::Relaxed);
            }
            if packet.first() == Some(&COMMAND) {
                sent.given.fetch_add(packet.len(), Ordering::Relaxed);
            }
            goes_on
        })
    }
}

/// Pushes, `out` and `back` seeing what goes, and says what went.
pub(super) fn push_with(pair: &Pair, out: Hook, back: Hook, shell: bool) -> (SyncReport, Arc<Sent>) {
    let sent = Arc::<Sent>::default();
    let report = pair.push(sent.counting(out), back, shell).unwrap();
    (report, sent)
}

pub(super) fn pushed(pair: &Pair, shell: bool) -> Arc<Sent> {
    let (report, sent) = push_with(pair, nothing(), nothing(), shell);
    assert!(report.is_complete(), "{:?}", report.problems);
    pair.in_step();
    sent
}

pub(super) fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut bytes);
    bytes
}

/// Sets a time that proves something, each time another, and waits until what is known of the file is believed.
pub(super) fn age(path: &Path) {
    static AGED: AtomicUsize = AtomicUsize::new(3600);
    static NOW: LazyLock<SystemTime> = LazyLock::new(SystemTime::now);
    let then = *NOW - Duration::from_secs(2 * AGED.fetch_add(1, Ordering::Relaxed) as u64);
    fs::File::options().write(true).open(path).unwrap().set_modified(then).unwrap();
    std::thread::sleep(Duration::from_millis(30));
}

pub(super) fn write_old(pair: &Pair, path: &str, data: &[u8]) -> PathBuf {
    pair.write(path, data);
    let path = pair.at("source").join(path);
    age(&path);
    path
}

const SIZES: [usize; 4] = [20 << 10, 300_001, 3 << 20, 40 << 20];

/// Makes everything in `a` executable: what is to be executed is hashed first, and so copied where other files only get another name.
fn executable(pair: &Pair) {
    for entry in fs::read_dir(pair.at("source/a")).unwrap() {
        fs::set_permissions(entry.unwrap().path(), PermissionsExt::from_mode(0o755)).unwrap();
    }
    std::thread::sleep(Duration::from_millis(30));
}

/// A target that holds files of several sizes in `a`, which is called `b` at the source now.
fn renamed(shell: bool) -> Pair {
    let pair = Pair::new();
    for (number, size) in SIZES.into_iter().enumerate() {
        write_old(&pair, &format!("a/{number}"), &noise(number as u64, size));
    }
    executable(&pair);
    pushed(&pair, shell);
    fs::rename(pair.at("source/a"), pair.at("source/b")).unwrap();
    pair
}

#[test]
fn what_has_another_name_now_is_copied_there() {
    for shell in [true, false] {
        let pair = renamed(shell);
        let sent = pushed(&pair, shell);
        // The largest by two requests.
        assert_eq!(sent.copies(), SIZES.len() + 1);
        assert!(sent.content() < 30_000, "{}", sent.content());
    }
}

#[test]
fn a_small_copy_is_found_by_its_digest_once_it_is_read_and_what_only_has_its_size_is_sent() {
    for shell in [true, false] {
        let pair = Pair::new();
        let data = noise(1, 200_000);
        write_old(&pair, "a", &data);
        pushed(&pair, shell);
        write_old(&pair, "copy", &data);
        write_old(&pair, "other", &noise(2, 200_000));
        let sent = pushed(&pair, shell);
        assert_eq!(sent.copies(), 1);
        assert!((200_000..300_000).contains(&sent.content()), "{}", sent.content());
    }
}

/// Pushes what [`renamed`] made, which is to be sent whole after all.
fn sent_whole(pair: &Pair, out: Hook, back: Hook, shell: bool) -> usize {
    let (report, sent) = push_with(pair, out, back, shell);
    assert!(report.is_complete(), "{:?}", report.problems);
    pair.in_step();
    let whole: usize = SIZES.iter().sum();
    assert!(sent.content() >= whole, "{} of {whole}", sent.content());
    sent.copies()
}

#[test]
fn what_was_changed_there_and_has_its_time_still_is_found_out_and_sent() {
    for (shell, retries) in [(true, 2), (false, 2), (true, 0), (false, 0)] {
        let pair = renamed(shell);
        for number in 0..SIZES.len() {
            let there = pair.at("target/a").join(number.to_string());
            let modified = fs::metadata(&there).unwrap().modified().unwrap();
            let file = fs::File::options().write(true).open(&there).unwrap();
            file.write_all_at(b"changed", 5_000).unwrap();
            file.set_modified(modified).unwrap();
        }
        let sent = Arc::<Sent>::default();
        let source = LocalSource::new(&pair.at("source"), Some(&pair.at("state"))).unwrap();
        let target = by_command(pair.lanes(sent.counting(nothing()), nothing(), shell, 1).unwrap());
        let options = Options { retries, ..options() };
        let report = run(&source, &target, &options, &Silent::default(), &AtomicBool::new(false)).unwrap();
        assert!(report.is_complete(), "{:?}", report.problems);
        pair.in_step();
        assert_eq!(sent.copies(), SIZES.len() + 1);
        assert!(sent.content() > SIZES.iter().sum());
    }
}

#[test]
fn what_has_another_time_when_it_is_opened_is_not_believed() {
    for shell in [true, false] {
        let pair = renamed(shell);
        let target = pair.at("target/a");
        let touch: Hook = Arc::new(move |packet| {
            let number = packet.first() == Some(&OPEN);
            let number = number.then(|| position(packet, b"target/a/")).flatten().map(|at| packet[at + 9]);
            if let Some(number) = number {
                // The same content all the same: only the time says that it may be another.
                age(&target.join(char::from(number).to_string()));
            }
            true
        });
        sent_whole(&pair, touch, nothing(), shell);
    }
}

#[test]
fn a_server_that_does_not_copy_or_fails_at_it_is_sent_what_it_has() {
    for shell in [true, false] {
        assert_eq!(sent_whole(&renamed(shell), nothing(), not_offering(b"copy-data"), shell), 0);
        // It offers it, and knows nothing of it.
        let unknown: Hook = Arc::new(|packet| {
            if is_copy(packet) {
                packet[9] = b'x';
            }
            true
        });
        sent_whole(&renamed(shell), unknown, nothing(), shell);
        // What is to be copied ends too early: that of the largest file when a part of it is there.
        let short: Hook = Arc::new(|packet| {
            if is_copy(packet) {
                let at = 18 + 4 + 4;
                packet[at..at + 8].copy_from_slice(&(1_u64 << 40).to_be_bytes());
            }
            true
        });
        sent_whole(&renamed(shell), short, nothing(), shell);
    }
}

#[test]
fn a_server_that_copies_other_bytes_is_found_out() {
    for shell in [true, false] {
        // From the place one further on: as many bytes but for the last.
        let other: Hook = Arc::new(|packet| {
            if is_copy(packet) {
                let (from, length) = (18 + 4 + 4, 18 + 4 + 4 + 8);
                packet[from + 7] ^= 1;
                let bytes: [u8; 8] = packet[length..length + 8].try_into().unwrap();
                packet[length..length + 8].copy_from_slice(&(u64::from_be_bytes(bytes) - 1).to_be_bytes());
            }
            true
        });
        sent_whole(&renamed(shell), other, nothing(), shell);
    }
}

#[test]
fn a_run_that_is_to_stop_does_not_have_the_rest_copied() {
    let pair = Pair::new();
    for number in 0..40 {
        pair.write(&format!("a/{number}"), noise(number, 20_000));
    }
    executable(&pair);
    pushed(&pair, false);
    fs::rename(pair.at("source/a"), pair.at("source/b")).unwrap();
    let (stop, sent) = (Arc::<AtomicBool>::default(), Arc::<Sent>::default());
    let stops = Arc::clone(&stop);
    let out: Hook = Arc::new(move |packet| {
        if packet.first() == Some(&OPEN) && position(packet, b"target/a/").is_some() {
            stops.store(true, Ordering::Relaxed);
        }
        true
    });
    let source = LocalSource::new(&pair.at("source"), Some(&pair.at("state"))).unwrap();
    let target = by_command(pair.lanes(sent.counting(out), nothing(), false, 1).unwrap());
    let stopped = run(&source, &target, &options(), &Silent::default(), &stop).unwrap_err();
    assert!(stopped.to_string().contains("stopped") && sent.copies() < 3, "{stopped}: {}", sent.copies());
    assert!(pair.at("target/a").exists() && !pair.at("target/b").exists());
    assert!(pushed(&pair, false).content() < 200_000);
}

#[test]
fn a_copy_that_was_cut_off_is_gone_on_with() {
    let whole: usize = SIZES.iter().sum();
    for shell in [true, false] {
        for most in [1, 2, 4] {
            let pair = renamed(shell);
            let left = AtomicUsize::new(most);
            let cut: Hook = Arc::new(move |packet| {
                !is_copy(packet)
                    || left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok()
            });
            pair.push(cut, nothing(), shell).unwrap_err();
            assert!(pair.at("target/a/3").exists() && !pair.at("target/b").exists());
            let sent = pushed(&pair, shell);
            assert!(sent.content() < whole / 2, "{}", sent.content());
        }
    }
}
