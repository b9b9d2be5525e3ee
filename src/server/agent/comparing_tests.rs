//! What a client may tell of what it has, and how much of that waits.

use crossbeam_channel::unbounded;

use super::tests::{files_client, tree};
use crate::codec::chunks::{Alike, BLOCK_LENGTH, Chunk, ChunkId, Cut, Part, Within};
use crate::endpoint::ScanOptions;
use crate::endpoint::client::{Answer, Client};
use crate::wire::alike::{put_part, read_order};
use crate::wire::extension::{self, COMPARES, Fields, NO_ORDER, PART_CHUNKS_MAX, PARTS_MAX};

fn packet(name: &str, index: u32, more: &[u8]) -> Vec<u8> {
    let mut packet = extension::request(name);
    packet.extend_from_slice(&index.to_be_bytes());
    packet.extend_from_slice(more);
    packet
}

fn fetch(index: u32) -> Vec<u8> {
    packet("fetch", 0, &[&1_u32.to_be_bytes()[..], &index.to_be_bytes(), &[0; 8], &[COMPARES]].concat())
}

fn parts(index: u32, chunks: usize) -> Vec<u8> {
    let chunk = Chunk { id: ChunkId::Sum(7), length: BLOCK_LENGTH as u32 };
    let alike = Alike { pieces: 1, cut: Cut::BySum, chunks: vec![chunk; chunks], ..Alike::default() };
    let mut raw = Vec::new();
    put_part(&mut raw, &Part { order: 1, from: Within::default(), alike: Some(alike) });
    packet("parts", index, &raw)
}

/// A client of a pull that was listed.
fn client() -> Client {
    let client = files_client(&tree(&[5; 300]));
    let options = serde_json::to_vec(&ScanOptions::default()).unwrap();
    let mut scan = extension::request("scan");
    extension::put_string(&mut scan, b"/x");
    extension::put_string(&mut scan, &options);
    assert_eq!(client.call(scan, false).unwrap().kind, extension::EXTENDED_REPLY);
    client
}

fn taken(client: &Client, packet: Vec<u8>) -> Answer {
    client.call(packet, false).unwrap()
}

#[test]
fn what_is_told_waits_until_it_is_looked_at_and_more_than_may_wait_is_refused() {
    let client = client();
    assert_eq!(taken(&client, parts(3, 1)).kind, extension::STATUS, "nothing was asked for");
    assert_eq!(taken(&client, parts(3, PART_CHUNKS_MAX + 1)).kind, extension::STATUS, "too long");
    assert_eq!(taken(&client, fetch(3)).kind, extension::EXTENDED_REPLY);
    let order = read_order(Fields(&taken(&client, packet("wants", 3, &[])).body)).unwrap().unwrap();
    assert_eq!((order.number, order.wanted[0].cut), (1, Cut::ByContent));
    let (sender, receiver) = unbounded();
    client.submit(packet("wants", 3, &[]), 0, 9, &sender).unwrap();
    assert_eq!(taken(&client, packet("wants", 3, &[])).kind, extension::STATUS, "one waits");
    (0..PARTS_MAX as u64).for_each(|tag| client.submit(parts(3, 1), 0, tag, &sender).unwrap());
    let refused = taken(&client, parts(3, 1));
    assert!(refused.kind == extension::STATUS && String::from_utf8_lossy(&refused.body).contains("parts that wait"));
    // Nobody waits for more of it.
    let told = client.wait(&receiver, false).unwrap();
    assert!(told.tag == 9 && read_order(Fields(&told.answer.unwrap().body)).unwrap().is_none());
    assert!(receiver.is_empty());
    // The file is a small one: it comes whole, and what waits is of no more use.
    assert_eq!(taken(&client, packet("next", 0, &[0])).kind, extension::EXTENDED_REPLY);
    for _ in 0..PARTS_MAX {
        assert_eq!(client.wait(&receiver, false).unwrap().answer.unwrap().kind, extension::EXTENDED_REPLY);
    }
    assert_eq!(taken(&client, parts(3, 1)).kind, extension::EXTENDED_REPLY, "too late");
    assert!(read_order(Fields(&taken(&client, packet("wants", 3, &[])).body)).unwrap().is_none());
}

#[test]
fn h23_no_more_chunks_wait_than_one_run_may_have() {
    let client = client();
    let (sender, receiver) = unbounded();
    let mut refused = 0;
    for index in 0..40 {
        assert_eq!(taken(&client, fetch(index)).kind, extension::EXTENDED_REPLY);
        for _ in 0..PARTS_MAX {
            client.submit(parts(index, PART_CHUNKS_MAX), 0, 0, &sender).unwrap();
        }
    }
    while let Ok(completion) = receiver.recv_timeout(std::time::Duration::from_millis(300)) {
        refused += usize::from(completion.answer.unwrap().kind == extension::STATUS);
    }
    // Of a file of which one was refused nothing waits any more.
    assert_eq!(refused, 8);
}

#[test]
fn who_says_that_nothing_more_is_told_is_asked_no_more() {
    let client = client();
    assert_eq!(taken(&client, fetch(2)).kind, extension::EXTENDED_REPLY);
    let mut raw = Vec::new();
    put_part(&mut raw, &Part { order: NO_ORDER, from: Within::default(), alike: None });
    assert_eq!(taken(&client, packet("parts", 2, &raw)).kind, extension::EXTENDED_REPLY);
    assert!(read_order(Fields(&taken(&client, packet("wants", 2, &[])).body)).unwrap().is_none());
}

#[test]
fn a_run_that_is_given_up_waits_for_nobody() {
    let client = client();
    let (sender, receiver) = unbounded();
    client.submit(packet("wants", 5, &[]), 0, 0, &sender).unwrap();
    assert_eq!(taken(&client, fetch(4)).kind, extension::EXTENDED_REPLY);
    client.submit(parts(4, 1), 0, 1, &sender).unwrap();
    assert_eq!(taken(&client, extension::request("abort")).kind, extension::EXTENDED_REPLY);
    for _ in 0..2 {
        assert_eq!(client.wait(&receiver, false).unwrap().answer.unwrap().kind, extension::EXTENDED_REPLY);
    }
}
