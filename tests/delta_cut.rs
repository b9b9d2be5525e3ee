//! Files of which the other end has most are cut off on their way, at any byte: what was there stays whole, and the next run brings the rest.

use std::fs;
use std::path::Path;
use std::process::Output;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::kit::area::write;
use crate::kit::served::Served;
use crate::kit::{done, noise, proxy, text};

const MIB: usize = 1 << 20;
const LENGTH: usize = 12 * MIB;

/// Numbers that are others each time, and the same for the same seed.
struct Numbers {
    seed: u64,
    drawn: u64,
}

impl Numbers {
    fn new() -> Numbers {
        let given = std::env::var("LOCKSTEP_TEST_SEED").ok().and_then(|seed| seed.parse().ok());
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64;
        Numbers { seed: given.unwrap_or(now), drawn: 0 }
    }

    fn below(&mut self, end: usize) -> usize {
        self.drawn += 1;
        let bytes = noise(self.seed.wrapping_add(self.drawn), 8);
        (u64::from_le_bytes(bytes.try_into().unwrap()) % end.max(1) as u64) as usize
    }
}

/// The same with some of it replaced, put in, taken away and moved.
fn edited(old: &[u8], numbers: &mut Numbers) -> Vec<u8> {
    let mut new = old.to_vec();
    for _ in 0..1 + numbers.below(5) {
        let (at, length) = (numbers.below(new.len() - MIB), 1 + numbers.below(200_000));
        let fresh = noise(numbers.below(usize::MAX) as u64, length);
        match numbers.below(4) {
            0 => new[at..][..length].copy_from_slice(&fresh),
            1 => drop(new.splice(at..at, fresh)),
            2 => drop(new.drain(at..at + length)),
            _ => {
                let moved: Vec<u8> = new.drain(at..at + length).collect();
                let to = numbers.below(new.len());
                new.splice(to..to, moved);
            }
        }
    }
    new
}

/// Has runs from `from` to `to` cut off at places that nobody has chosen; `run` is one.
fn cut_anywhere(served: &Served, (from, to): (&Path, &Path), run: &dyn Fn() -> Output, left: &AtomicUsize) {
    let mut numbers = Numbers::new();
    let seed = numbers.seed;
    let mut old = noise(seed, LENGTH);
    write(from, "sub/model.bin", &old);
    done(&run());
    let carried = |run: &dyn Fn() -> Output| {
        left.store(usize::MAX, SeqCst);
        let output = run();
        done(&output);
        usize::MAX - left.load(SeqCst)
    };
    for round in 0..6 {
        let new = edited(&old, &mut numbers);
        write(from, "sub/model.bin", &new);
        let cut = numbers.below(1_500_000);
        let when = format!("LOCKSTEP_TEST_SEED={seed}, round {round}, cut after {cut} bytes");
        left.store(cut, SeqCst);
        let output = run();
        let enough = output.status.success();
        assert!(enough || output.status.code() == Some(75), "{when}: {}", text(&output));
        let there = fs::read(to.join("sub/model.bin")).unwrap();
        // A run whose last answer was lost may have published.
        assert!(there == new || (!enough && there == old), "{when}: it is neither of the two");
        let again = carried(run);
        assert!(fs::read(to.join("sub/model.bin")).unwrap() == new, "{when}: it did not arrive");
        assert!(again < LENGTH / 2, "{when}: {again} bytes were sent for it");
        old = new;
    }
    assert!(!served.log().contains("panicked"), "{}", served.log());
}

/// A server that is reached through what cuts.
fn behind_a_cut() -> (Served, String, Arc<AtomicUsize>) {
    let served = Served::start("", "");
    let left = Arc::new(AtomicUsize::new(usize::MAX));
    let port = proxy::cutting(served.port, Arc::clone(&left));
    let known = fs::read_to_string(served.path("known")).unwrap();
    fs::write(served.path("known"), known.replace(&format!(":{} ", served.port), &format!(":{port} "))).unwrap();
    (served, port.to_string(), left)
}

#[test]
fn h34_a_push_of_what_changed_is_cut_at_any_byte_and_gone_on_with() {
    let (served, port, left) = behind_a_cut();
    let (from, to) = (served.path("source"), served.path("sync/data"));
    // What the server has of a run that was cut ends by itself.
    let run = || served.through(&port, &["push", "--wait", "60", from.to_str().unwrap(), "sync@127.0.0.1:/data"]);
    cut_anywhere(&served, (&from, &to), &run, &left);
}

#[test]
fn h34_a_pull_of_what_changed_is_cut_at_any_byte_and_gone_on_with() {
    let (served, port, left) = behind_a_cut();
    let (from, to) = (served.path("sync/data"), served.path("here"));
    let run = || served.through(&port, &["pull", "sync@127.0.0.1:/data", to.to_str().unwrap()]);
    cut_anywhere(&served, (&from, &to), &run, &left);
}
