//! What comes over another connection before its turn.

use crossbeam_channel::{Receiver, unbounded};

use super::tests::{Memory, asked, block, client_with, compared, digest, tree};
use super::*;
use crate::endpoint::BeginOptions;
use crate::endpoint::client::{Client, ClientOptions, Completion};
use crate::wire::extension::{AHEAD_BYTES_MAX, EXTENDED_REPLY, STATUS};

/// Sends without waiting for the answer.
fn send(client: &Client, name: &str, body: &[u8]) -> Receiver<Completion> {
    let (sender, receiver) = unbounded();
    let mut packet = extension::request(name);
    packet.extend_from_slice(body);
    client.submit(packet, 0, 0, &sender).unwrap();
    receiver
}

fn kind(receiver: &Receiver<Completion>) -> u8 {
    receiver.recv().unwrap().answer.unwrap().kind
}

/// A client whose run has one file of `size` bytes, which is open.
fn opened(memory: &Arc<Memory>, size: u64) -> Client {
    let all = ClientOptions { in_flight_bytes: 2 * AHEAD_BYTES_MAX, ..ClientOptions::default() };
    let client = client_with(memory, all);
    let mut begin = Vec::new();
    extension::put_string(&mut begin, b"/x");
    extension::put_string(&mut begin, &serde_json::to_vec(&BeginOptions::default()).unwrap());
    let (mut raw, mut entries) = (Vec::new(), Vec::new());
    tree(&[size]).entries().iter().for_each(|entry| extension::put_entry(&mut raw, entry));
    extension::put_frame(&mut entries, &raw, None);
    for (name, body) in [("begin", &begin), ("entries", &entries), ("diff", &Vec::new()), ("open", &vec![0; 12])] {
        assert_eq!(kind(&send(&client, name, body)), EXTENDED_REPLY, "{name}");
    }
    client
}

fn part(offset: u64, data: &[u8]) -> Vec<u8> {
    let mut body = 0_u32.to_be_bytes().to_vec();
    body.extend_from_slice(&offset.to_be_bytes());
    extension::put_frame(&mut body, data, None);
    body
}

#[test]
fn parts_in_any_order_become_the_file() {
    let memory = Arc::new(Memory::default());
    let client = opened(&memory, 10);
    for part in [part(7, b"hij"), part(3, b"defg")] {
        assert_eq!(kind(&send(&client, "stripe", &part)), EXTENDED_REPLY);
        assert!(locked(&memory.0).get(&0).is_none_or(Vec::is_empty));
    }
    assert_eq!(kind(&send(&client, "write", &part(0, b"abc"))), EXTENDED_REPLY);
    let mut finish = 0_u32.to_be_bytes().to_vec();
    finish.extend_from_slice(&digest(b"abcdefghij").0);
    assert_eq!(kind(&send(&client, "finish", &finish)), EXTENDED_REPLY);
    assert_eq!(locked(&memory.0)[&0], b"abcdefghij");
}

#[test]
fn a_file_that_is_finished_before_its_parts_are_there_ends_the_run() {
    let memory = Arc::new(Memory::default());
    let client = opened(&memory, 10);
    let _waits = send(&client, "stripe", &part(7, b"hij"));
    let mut finish = 0_u32.to_be_bytes().to_vec();
    finish.extend_from_slice(&digest(b"").0);
    assert_eq!(kind(&send(&client, "finish", &finish)), STATUS);
    assert_eq!(kind(&send(&client, "write", &part(0, b"abc"))), STATUS);
}

#[test]
fn a_file_that_is_given_up_leaves_no_part_of_it_waiting() {
    let client = opened(&Arc::new(Memory::default()), 10);
    assert_eq!(kind(&send(&client, "stripe", &part(7, b"hij"))), EXTENDED_REPLY);
    assert_eq!(kind(&send(&client, "discard", &[0; 4])), EXTENDED_REPLY);
    // It is sent again from its start.
    assert_eq!(kind(&send(&client, "open", &[0; 12])), EXTENDED_REPLY);
    assert_eq!(kind(&send(&client, "stripe", &part(0, b"abcdefghij"))), EXTENDED_REPLY);
}

#[test]
fn h23_parts_that_break_a_rule_end_the_run() {
    let bad = [
        ("before the place that is reached", vec![part(0, b"abcd"), part(2, b"cd")]),
        ("twice", vec![part(4, b"ef"), part(4, b"ef")]),
        ("nothing", vec![part(0, b"")]),
        ("past the end", vec![part(0, b"abcdefghijk")]),
        ("past the end, and ahead", vec![part(2, b"cdefghijk"), part(0, b"ab")]),
        ("what overlaps, and ahead", vec![part(4, b"efg"), part(6, b"ghi"), part(0, b"abcd")]),
    ];
    for (what, parts) in bad {
        let client = opened(&Arc::new(Memory::default()), 10);
        for part in &parts {
            let _answer = kind(&send(&client, "stripe", part));
        }
        // One that waited is found wrong when it is its turn, which is told to what comes then.
        let mut finish = 0_u32.to_be_bytes().to_vec();
        finish.extend_from_slice(&digest(b"abcdefghij").0);
        assert_eq!(kind(&send(&client, "finish", &finish)), STATUS, "{what}");
        assert_eq!(kind(&send(&client, "write", &part(9, b"j"))), STATUS, "{what}");
    }
    let call = asked(&Arc::new(Memory::default()));
    compared(&call);
    assert_eq!(call("stripe", &block(0, 0, 4)), STATUS, "not open");
}

#[test]
fn h23_more_than_may_wait_ends_the_run() {
    let client = opened(&Arc::new(Memory::default()), 1 << 40);
    let data = vec![7; 1 << 20];
    let fits = AHEAD_BYTES_MAX as u64 / (1 << 20) - 1;
    for at in 1..=fits {
        assert_eq!(kind(&send(&client, "stripe", &part(at << 20, &data))), EXTENDED_REPLY);
    }
    assert_eq!(kind(&send(&client, "stripe", &part((fits + 1) << 20, &data))), STATUS);
    // Small ones count for what they take.
    let client = opened(&Arc::new(Memory::default()), 1 << 40);
    let answers: Vec<_> = (1..=140_000).map(|at| send(&client, "stripe", &part(2 * at, b"x"))).collect();
    assert_eq!(kind(answers.last().unwrap()), STATUS);
}

/// A client whose run reads files of five bytes, `fetched` of which it has asked for.
fn reading(fetched: u32) -> Client {
    let client = super::tests::files_client(&tree(&[5; 8]));
    let mut scan = Vec::new();
    extension::put_string(&mut scan, b"/x");
    extension::put_string(&mut scan, &serde_json::to_vec(&crate::endpoint::ScanOptions::default()).unwrap());
    assert_eq!(kind(&send(&client, "scan", &scan)), EXTENDED_REPLY);
    let mut fetch = [0_u32, fetched].map(u32::to_be_bytes).concat();
    for index in 0..fetched {
        fetch.extend_from_slice(&index.to_be_bytes());
        fetch.extend_from_slice(&[0; 9]);
    }
    assert_eq!(kind(&send(&client, "fetch", &fetch)), EXTENDED_REPLY);
    client
}

fn next(number: u64) -> Vec<u8> {
    [&[0; 5][..], &number.to_be_bytes()].concat()
}

#[test]
fn what_comes_next_is_told_in_the_order_of_the_numbers() {
    let client = reading(3);
    let late = send(&client, "next", &next(1));
    assert_eq!(kind(&send(&client, "fetch", &[0; 8])), EXTENDED_REPLY);
    assert!(late.is_empty());
    let first = send(&client, "next", &next(0)).recv().unwrap().answer.unwrap();
    // All that was fetched is in the first.
    assert!(first.body.len() > 3 * 5);
    let late = late.recv().unwrap().answer.unwrap();
    assert_eq!((late.kind, late.body.len()), (EXTENDED_REPLY, 5), "a frame of nothing");
}

#[test]
fn h23_numbers_that_break_a_rule_are_refused_and_take_no_room() {
    let client = reading(1);
    assert_eq!(kind(&send(&client, "next", &next(0))), EXTENDED_REPLY);
    assert_eq!(kind(&send(&client, "next", &next(0))), STATUS, "its turn is over");
    let _waits = send(&client, "next", &next(2));
    assert_eq!(kind(&send(&client, "next", &next(2))), STATUS, "twice");
    let long = [&next(3)[..], &[7; 1000]].concat();
    assert_eq!(kind(&send(&client, "next", &long)), STATUS, "it has more");
    let waiting: Vec<_> =
        (3..2 + extension::AHEAD_NEXT_MAX as u64).map(|at| send(&client, "next", &next(at))).collect();
    assert_eq!(kind(&send(&client, "next", &next(1000))), STATUS, "too many");
    assert!(waiting.iter().all(Receiver::is_empty));
    assert_eq!(kind(&send(&client, "next", &next(1))), EXTENDED_REPLY);
    assert!(waiting.iter().all(|waiting| kind(waiting) == EXTENDED_REPLY));
}
