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
fn parts_in_any_order_become_the_file_and_are_answered_when_it_is_their_turn() {
    let memory = Arc::new(Memory::default());
    let client = opened(&memory, 10);
    let last = send(&client, "stripe", &part(7, b"hij"));
    let middle = send(&client, "stripe", &part(3, b"defg"));
    // That all of them came, and wait, shows in the answer to what came after them.
    assert_eq!(kind(&send(&client, "discard", &1_u32.to_be_bytes())), STATUS);
    assert!(last.is_empty() && middle.is_empty());
    assert!(locked(&memory.0).get(&0).is_none_or(Vec::is_empty));

    let memory = Arc::new(Memory::default());
    let client = opened(&memory, 10);
    let [last, middle] = [part(7, b"hij"), part(3, b"defg")].map(|part| send(&client, "stripe", &part));
    let first = send(&client, "write", &part(0, b"abc"));
    assert_eq!([&first, &middle, &last].map(kind), [EXTENDED_REPLY; 3]);
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
    let waits = send(&client, "stripe", &part(7, b"hij"));
    assert_eq!(kind(&send(&client, "discard", &[0; 4])), EXTENDED_REPLY);
    assert_eq!(kind(&waits), EXTENDED_REPLY);
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
    ];
    for (what, parts) in bad {
        let client = opened(&Arc::new(Memory::default()), 10);
        let answers: Vec<_> = parts.iter().map(|part| send(&client, "stripe", part)).collect();
        // Each is answered before this; those that wait are when the run ends.
        assert_eq!(kind(&send(&client, "write", &part(9, b"j"))), STATUS, "{what}");
        assert!(answers.iter().any(|answer| answer.try_recv().is_ok_and(|done| done.answer.unwrap().kind == STATUS)));
    }
    let call = asked(&Arc::new(Memory::default()));
    compared(&call);
    assert_eq!(call("stripe", &block(0, 0, 4)), STATUS, "not open");
}

#[test]
fn h23_more_than_may_wait_ends_the_run_and_is_let_go() {
    let client = opened(&Arc::new(Memory::default()), 1 << 40);
    let data = vec![7; 1 << 20];
    let fits = AHEAD_BYTES_MAX as u64 / (1 << 20) - 1;
    let waiting: Vec<_> = (1..=fits).map(|at| send(&client, "stripe", &part(at << 20, &data))).collect();
    assert_eq!(kind(&send(&client, "stripe", &part((fits + 1) << 20, &data))), STATUS);
    assert!(waiting.iter().all(Receiver::is_empty));
    // What ends the run answers them all.
    drop(send(&client, "abort", &[]));
    assert_eq!(waiting.iter().map(kind).filter(|&kind| kind == STATUS).count(), waiting.len());
}
