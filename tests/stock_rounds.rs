//! How often a run waits for a stock server: each wait is a round trip, which on a far link is what a small push takes.

use std::fs;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use super::stock_pipes::{COMMAND, Hook, Pair, nothing};

/// For so long nothing is sent by a client that waits. A machine that stops it for longer makes it look worse, never better.
const QUIET: Duration = Duration::from_millis(60);

/// A link that is slow in a way that can be counted: an answer comes when the client has sent all that it sends without it, and with it come
/// all the answers to what was sent until then.
#[derive(Default)]
struct Rounds {
    state: Mutex<State>,
    released: Condvar,
}

#[derive(Default)]
struct State {
    sent: usize,
    last: Option<Instant>,
    answered: usize,
    /// Answers that may come.
    due: usize,
    rounds: usize,
    /// What was sent in each round, by its type.
    kinds: Vec<Vec<u8>>,
}

impl Rounds {
    fn hooks(self: &Arc<Rounds>) -> (Hook, Hook) {
        let (out, back) = (Arc::clone(self), Arc::clone(self));
        let sends: Hook = Arc::new(move |packet| {
            if packet.first() != Some(&COMMAND) {
                let mut state = out.state.lock().unwrap();
                state.sent += 1;
                state.last = Some(Instant::now());
                let round = state.rounds;
                state.kinds.resize(round + 1, Vec::new());
                state.kinds[round].push(packet[0]);
            }
            true
        });
        let answers: Hook = Arc::new(move |_| {
            back.answer();
            true
        });
        (sends, answers)
    }

    fn answer(&self) {
        let mut state = self.state.lock().unwrap();
        state.answered += 1;
        while state.answered > state.due {
            let quiet = state.last.map_or(QUIET, |last| last.elapsed());
            if quiet >= QUIET {
                state.due = state.sent;
                state.rounds += 1;
                return;
            }
            state = self.released.wait_timeout(state, QUIET - quiet).unwrap().0;
        }
    }
}

/// Pushes, and gives how often the client waited, and for what.
fn waits(pair: &Pair, shell: bool) -> (usize, Vec<Vec<u8>>) {
    let rounds = Arc::new(Rounds::default());
    let (out, back) = rounds.hooks();
    pair.push(out, back, shell).unwrap();
    let state = rounds.state.lock().unwrap();
    (state.rounds, state.kinds.clone())
}

/// Pushes what `made` makes, and sees how often the client waits. A machine that stops it for long makes that more, never less: it is
/// tried again then.
fn at_most(most: usize, shell: bool, what: &str, made: impl Fn() -> Pair) -> Pair {
    let mut found = String::new();
    for _ in 0..4 {
        let pair = made();
        let (rounds, kinds) = waits(&pair, shell);
        pair.in_step();
        if rounds <= most {
            return pair;
        }
        found = format!("{rounds} waits and not {most}: {kinds:?}");
    }
    panic!("{what}, a shell: {shell}: {found}");
}

/// Files that are older than any manifest, so that their times prove something.
fn write_old(pair: &Pair, path: &str, data: &str) {
    pair.write(path, data);
    let hour_ago = std::time::SystemTime::now() - Duration::from_secs(3600);
    let file = fs::File::options().write(true).open(pair.at("source").join(path)).unwrap();
    file.set_modified(hour_ago).unwrap();
}

fn pushed(made: impl Fn() -> Pair) -> Pair {
    let pair = made();
    pair.push(nothing(), nothing(), false).unwrap();
    pair
}

#[test]
fn a_run_with_nothing_to_do_waits_for_its_lock_and_the_list() {
    let one = || {
        let pair = Pair::new();
        write_old(&pair, "file", "old");
        pair
    };
    let changed = || {
        let pair = pushed(one);
        write_old(&pair, "file", "new, longer");
        pair
    };
    for shell in [false, true] {
        at_most(30, shell, "a first push", one);
        let pair = at_most(8, shell, "nothing to do", || pushed(one));
        assert!(!pair.at("target/.lockstep/staging/sftp").exists() && !pair.at("target/.lockstep/lock.sftp").exists());
        at_most(27, shell, "one file changed", changed);
    }
}

#[test]
fn waits_do_not_grow_with_the_files() {
    let many = || {
        let pair = Pair::new();
        for number in 0..600 {
            write_old(&pair, &format!("{}/{number}", number % 12), &format!("content {number}"));
        }
        std::os::unix::fs::symlink("0", pair.at("source/link")).unwrap();
        pair
    };
    // What has another name now is copied by the server, many files at once.
    let renamed = || {
        let pair = Pair::new();
        for number in 0..300 {
            write_old(&pair, &format!("{}/{number}", number % 12), &format!("content {number:4} ").repeat(2000));
        }
        std::thread::sleep(Duration::from_millis(50));
        pair.push(nothing(), nothing(), false).unwrap();
        for number in 0..12 {
            fs::rename(pair.at("source").join(number.to_string()), pair.at("source").join(format!("new-{number}")))
                .unwrap();
        }
        pair
    };
    let pair = at_most(70, false, "many renamed", renamed);
    assert!(!pair.at("target/0").exists());
    at_most(60, false, "a first push of many", many);
    at_most(12, false, "nothing to do for many", || pushed(many));
}
