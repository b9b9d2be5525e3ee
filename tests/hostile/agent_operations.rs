//! Every request of the agent, while a directory that its run works in is swapped for a link that leads out of the root.
//!
//! A request that the agent knows and that is not tried here fails the test.

use std::collections::BTreeSet;

use lockstep::endpoint::{BeginOptions, CommitOptions, ScanOptions};
use lockstep::manifest::{Content, Entry, Timestamp};
use lockstep::wire::extension::{COMPARES, Fields, NAMES, put_frame, put_string};
use sha2::Digest as _;

use super::agent::{Peer, begin, entry, file, frame, link};
use super::swapping::{Field, SECRET, rounds};

/// What was asked, and what of it was done, over all rounds.
#[derive(Default)]
struct Tally {
    asked: BTreeSet<String>,
    done: BTreeSet<String>,
    committed: u32,
    fetched: u32,
    refused: u32,
}

/// One client of the agent, which has one run.
struct Client<'a> {
    field: &'a Field,
    peer: Peer,
    tally: &'a mut Tally,
}

impl Client<'_> {
    /// Asks; what was answered, or why not, is looked at.
    fn ask(&mut self, name: &str, body: &[u8]) -> Option<Vec<u8>> {
        let answer = self.peer.ask(name, body);
        self.field.is_silent(name, answer.as_deref().unwrap_or_else(|why| why.as_bytes()));
        self.tally.asked.insert(name.to_owned());
        if answer.is_err() {
            self.tally.refused += 1;
        } else {
            self.tally.done.insert(name.to_owned());
        }
        answer.ok()
    }
}

fn json(value: &impl serde::Serialize) -> Vec<u8> {
    let mut out = Vec::new();
    put_string(&mut out, &serde_json::to_vec(value).unwrap());
    out
}

fn text(text: &str) -> Vec<u8> {
    let mut out = Vec::new();
    put_string(&mut out, text.as_bytes());
    out
}

/// Numbers of the protocol, one after the other.
fn numbers(small: &[u32]) -> Vec<u8> {
    small.iter().flat_map(|number| number.to_be_bytes()).collect()
}

/// When in a run the swaps begin.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Since {
    Start,
    Begin,
    Comparison,
}

/// A tree below `prefix`, in which everything is new, other than what is there, or to be removed by its absence.
fn tree(prefix: &str, round: u32) -> Vec<Entry> {
    let path = |name: &str| format!("{prefix}{name}");
    let mode = if round.is_multiple_of(2) { 0o777 } else { 0o700 };
    let mtime = Timestamp { seconds: i64::from(round), nanoseconds: 0 };
    let mut entries = vec![
        file(&path("big"), 6),
        file(&path("f"), 1),
        // As large as that outside: whoever led there would hash it and say so.
        file(&path("g"), (SECRET.len() * 50) as u64),
        file(&path("new"), 1),
        entry(&path("sub"), Content::Directory),
        file(&path("sub/h"), (SECRET.len() * 50) as u64),
        link(&path(&format!("sub/l{round}")), "h"),
    ];
    if !prefix.is_empty() {
        entries.insert(0, entry(prefix.trim_end_matches('/'), Content::Directory));
    }
    entries.into_iter().map(|entry| Entry { mode, mtime, ..entry }).collect()
}

impl Client<'_> {
    /// As far as a run comes before content is sent; whether it came so far.
    fn starts(&mut self, root: &str, round: u32) -> bool {
        let options = BeginOptions {
            checksum: round.is_multiple_of(2),
            verify_disk: round.is_multiple_of(3),
            trash_seconds: round.is_multiple_of(4).then_some(60),
            units: if round.is_multiple_of(5) { vec!["d/".into()] } else { Vec::new() },
            dry_run: round % 11 == 10,
            delta: true,
            ..BeginOptions::default()
        };
        self.ask("hello", &[]);
        self.ask("begin", &begin(root, &options)).is_some()
    }

    fn compares(&mut self, entries: &[Entry]) -> bool {
        self.ask("entries", &frame(entries));
        self.ask("diff", &[]).is_some() && self.ask("plan", &[0; 8]).is_some()
    }

    /// Sends content, by all the requests there are for it, and publishes.
    fn sends(&mut self, entries: &[Entry], round: u32) {
        let index = |name: &str| entries.iter().position(|entry| entry.path.name() == name.as_bytes()).unwrap() as u32;
        let mut put = numbers(&[1, index("new")]);
        put.extend(sha2::Sha256::digest([round as u8]));
        put.extend(numbers(&[1]));
        put_frame(&mut put, &[round as u8], None);
        self.ask("put", &put);
        let big = index("big");
        self.ask("open", &numbers(&[big, 0, 0]));
        for (name, at, content) in [("write", 0, &b"ab"[..]), ("stripe", 2, b"c")] {
            let mut write = numbers(&[big, 0, at]);
            put_frame(&mut write, content, None);
            self.ask(name, &write);
        }
        self.ask("hole", &numbers(&[big, 0, 3, 0, 3]));
        self.ask("finish", &[&numbers(&[big])[..], &sha2::Sha256::digest(b"abc\0\0\0")].concat());
        self.ask("open", &numbers(&[index("f"), 0, 0]));
        self.ask("alike", &[numbers(&[index("f"), 0, 0, 0, u32::MAX, u32::MAX]), vec![round as u8 % 3]].concat());
        self.ask("copy", &numbers(&[index("f"), 0, 0, 0, 1, 0, 0, 0]));
        self.ask("discard", &numbers(&[index("f")]));
        self.ask("keep", &[&numbers(&[index("g")])[..], &sha2::Sha256::digest(b"of the root")].concat());
        if round % 7 == 6 {
            self.ask("abort", &[]);
        } else {
            let options = CommitOptions { delete: true, ..CommitOptions::default() };
            self.tally.committed += u32::from(self.ask("commit", &json(&options)).is_some());
        }
    }

    fn fetches(&mut self, root: &str) {
        self.ask("trail", &text(root));
        let options = ScanOptions { hash_all: true, ..ScanOptions::default() };
        let Some(scanned) = self.ask("scan", &[text(root), json(&options)].concat()) else { return };
        let mut fields = Fields(&scanned);
        fields.string().unwrap();
        let count = fields.u32().unwrap();
        self.ask("list", &[0; 4]);
        self.ask("list", &numbers(&[count]));
        for index in 0..count {
            self.ask("fetch", &[&numbers(&[index, 1, index, 0, 0])[..], &[0]].concat());
            for _ in 0..2 {
                self.tally.fetched += u32::from(self.ask("next", &[&numbers(&[index])[..], &[0]].concat()).is_some());
            }
            // Compared as a small file is, of which nothing is asked.
            let compared = self.ask("fetch", &[&numbers(&[index, 1, index, 0, 0])[..], &[COMPARES]].concat());
            if compared.is_some() && self.ask("next", &[&numbers(&[index])[..], &[0]].concat()).is_some() {
                self.ask("wants", &numbers(&[index]));
                self.ask("parts", &[&numbers(&[index, 1, 0, 0, 0])[..], &[0]].concat());
            }
        }
        self.ask("abort", &[]);
    }
}

fn every_request(openat2: bool, usual: u32) {
    let mut field = Field::new();
    let mut tally = Tally::default();
    for round in 0..rounds(usual) {
        field.lay_out();
        let mut client = Client { field: &field, peer: Peer::by(&mut field.server(openat2)), tally: &mut tally };
        let (root, prefix) = [("/", "d/"), ("/d", ""), ("/", "d/"), ("d/sub/..", "")][round as usize % 4];
        if round % 3 == 2 {
            field.while_swapping(|| client.fetches(["/", "/d", "d/sub"][round as usize / 3 % 3]));
            continue;
        }
        let since = [Since::Comparison, Since::Begin, Since::Comparison, Since::Start][round as usize / 3 % 4];
        let entries = tree(prefix, round);
        // Each part is done in quiet, or swaps have begun with it or before.
        let quiet = |part: Since| part < since;
        let begun = if quiet(Since::Start) {
            client.starts(root, round)
        } else {
            field.while_swapping(|| client.starts(root, round))
        };
        let compared = begun
            && if quiet(Since::Begin) {
                client.compares(&entries)
            } else {
                field.while_swapping(|| client.compares(&entries))
            };
        if compared {
            field.while_swapping(|| client.sends(&entries, round));
        }
        drop(client);
        if round.is_multiple_of(16) {
            field.is_untouched();
        }
    }
    field.is_untouched();
    assert_eq!(field.went_without(), !openat2);
    let mut last = Client { field: &field, peer: Peer::by(&mut field.server(openat2)), tally: &mut tally };
    last.ask("attach", &[7; 16]);
    last.ask("trash", &[]);
    last.ask("turns", &[]);
    last.ask("listen", &text("ssh-ed25519 AAAA"));
    drop(last);
    let names: BTreeSet<String> = NAMES.iter().map(|name| name.split('@').next().unwrap().to_owned()).collect();
    assert_eq!(tally.asked, names, "a request has no place here");
    let undone: Vec<_> = names.difference(&tally.done).collect();
    // Nobody's run is there to be attached to, and no port is allowed.
    assert_eq!(undone, ["attach", "listen"], "never done");
    assert!(tally.committed > 5 && tally.fetched > 5, "{} and {} got far enough", tally.committed, tally.fetched);
    assert!(tally.refused > 5, "the swaps were in nobody's way");
}

#[test]
fn h14_no_request_of_the_agent_is_led_out_by_a_directory_that_is_swapped() {
    every_request(true, 96);
}

#[test]
fn h14_h63_nor_those_of_the_agent_where_openat2_is_not_to_be_had() {
    every_request(false, 45);
}
