//! Tells the agent of a pull what the target here has of a file, as it wants to know that.
//!
//! What always holds: nothing is told of less than a block of 64 KiB, but for what is left at the end of a file, and of blocks and chunks
//! only that begin at a multiple of that or where the last one ended. Who asks for what is here learns whether it is what he knows, and
//! cannot go about it byte by byte.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, unbounded};

use super::{Lanes, body};
use crate::endpoint::Error;
use crate::endpoint::client::Completion;
use crate::endpoint::delta::{Alike, BLOCK_LENGTH, Cut, Lists, Order, Part, Wanted, Within, list};
use crate::wire::alike::{put_part, read_order};
use crate::wire::extension::{self, Fields, NO_ORDER, PART_CHUNKS_MAX, PARTS_MAX};

/// The tag of a `wants`; that of `parts` is another.
const WANTS: u64 = 0;
const PARTS: u64 = 1;
/// So often it is looked whether the file is read any more.
const LOOK: Duration = Duration::from_millis(100);

/// What is said about one file.
struct Telling<'a> {
    lanes: &'a Lanes,
    index: u32,
    over: &'a AtomicBool,
    sender: Sender<Completion>,
    receiver: Receiver<Completion>,
    /// The last that came, if it was not looked at.
    order: Option<Order>,
    /// Its number.
    number: u32,
    /// Parts that are not answered.
    out: usize,
    /// Nothing more is told, and why.
    ended: Option<End>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// Nothing more is wanted, or can be said.
    Done,
    /// Something went wrong that the agent does not know of.
    Broken,
}

/// Tells it until nothing more is wanted of the file at `index`, or `over` says so, or the connection has ended: whoever reads notices that.
pub(super) fn compare(lanes: &Lanes, index: u32, over: &AtomicBool, ask: &mut dyn FnMut(Wanted) -> Option<Alike>) {
    let (sender, receiver) = unbounded();
    let mut telling = Telling { lanes, index, over, sender, receiver, order: None, number: 0, out: 0, ended: None };
    if telling.ask_for_orders().is_ok() {
        let _ = list(&mut telling, |wanted| Ok::<_, Error>(ask(wanted)));
        if telling.ended != Some(End::Done) {
            // Else it would wait.
            telling.put(&Part { order: NO_ORDER, from: Within::default(), alike: None });
        }
    }
}

/// What is wanted, as far as it is told.
fn admitted(mut order: Order) -> Order {
    let unit = BLOCK_LENGTH as u64;
    for Wanted { from, cut, .. } in &mut order.wanted {
        if *cut == Cut::ByContent {
            from.offset -= from.offset % unit;
        }
    }
    let is_whole = |at: u64| at.is_multiple_of(unit) || at == u64::MAX;
    order.wanted.retain(|wanted| wanted.cut == Cut::ByContent || is_whole(wanted.from.offset) && is_whole(wanted.to));
    order
}

/// The same in parts that are not too long.
fn split(part: Part) -> Vec<Part> {
    let Some(alike) = part.alike.as_ref().filter(|alike| alike.chunks.len() > PART_CHUNKS_MAX) else {
        return vec![part];
    };
    let (mut parts, mut offset) = (Vec::new(), part.from.offset);
    let mut pieces = alike.chunks.chunks(PART_CHUNKS_MAX).peekable();
    while let Some(chunks) = pieces.next() {
        let from = Within { offset, ..part.from };
        offset += chunks.iter().map(|chunk| u64::from(chunk.length)).sum::<u64>();
        let next = if pieces.peek().is_some() { Some(offset) } else { alike.next };
        parts.push(Part { order: part.order, from, alike: Some(Alike { chunks: chunks.to_vec(), next, ..*alike }) });
    }
    parts
}

impl Telling<'_> {
    fn request(&self, name: &str) -> Vec<u8> {
        let mut packet = extension::request(name);
        packet.extend_from_slice(&self.index.to_be_bytes());
        packet
    }

    fn ask_for_orders(&self) -> Result<(), Error> {
        self.lanes.control().submit(self.request("wants"), 0, WANTS, &self.sender)
    }

    fn put(&mut self, part: &Part) -> bool {
        let mut packet = self.request("parts");
        put_part(&mut packet, part);
        self.out += 1;
        self.lanes.control().submit(packet, 0, PARTS, &self.sender).is_ok()
    }

    fn settle(&mut self, Completion { tag, answer }: Completion) -> Result<(), Error> {
        let client = self.lanes.control();
        let reply = body(client, answer.map_err(|lost| client.lost(lost))?)?;
        if tag == PARTS {
            self.out -= 1;
            return Ok(());
        }
        match read_order(Fields(&reply)).map_err(|error| self.lanes.malformed(error))? {
            Some(order) if order.number > self.number => {
                self.number = order.number;
                self.order = Some(admitted(order));
                self.ask_for_orders()
            }
            Some(_) => Err(self.lanes.malformed(extension::WireError::Range("the number of an order"))),
            None => {
                self.ended = Some(End::Done);
                Ok(())
            }
        }
    }

    /// Takes what has come; with `wait` at least something, unless it is over.
    fn pump(&mut self, mut wait: bool) {
        while self.ended.is_none() {
            let completion = match self.receiver.try_recv() {
                Ok(completion) => Some(completion),
                Err(_) if wait => self.receiver.recv_timeout(LOOK).ok(),
                Err(_) => return,
            };
            if self.over.load(Ordering::Relaxed) {
                self.ended = Some(End::Done);
            }
            if let Some(completion) = completion {
                wait = false;
                if self.settle(completion).is_err() {
                    self.ended = Some(End::Broken);
                }
            }
        }
    }
}

impl Lists for Telling<'_> {
    fn order(&mut self) -> Option<Order> {
        while self.order.is_none() && self.ended.is_none() {
            self.pump(true);
        }
        self.order.take().filter(|_| self.ended.is_none())
    }

    fn order_now(&mut self) -> Option<Order> {
        self.pump(false);
        self.order.take()
    }

    fn tell(&mut self, part: Part) -> bool {
        let order = part.order;
        for part in split(part) {
            // What was wanted before need not be told.
            while self.out >= PARTS_MAX && self.ended.is_none() && self.number == order {
                self.pump(true);
            }
            if self.ended.is_some() {
                return false;
            }
            if self.number == order && !self.put(&part) {
                return false;
            }
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::chunks::{Chunk, ChunkId};

    #[test]
    fn nothing_is_told_of_less_than_a_block() {
        let unit = BLOCK_LENGTH as u64;
        let wanted = |offset, to, cut| Wanted { from: Within { piece: 1, offset }, to, cut };
        for (asked, told) in [
            (wanted(5, u64::MAX, Cut::ByContent), Some(wanted(0, u64::MAX, Cut::ByContent))),
            (wanted(3 * unit - 1, 3 * unit, Cut::ByContent), Some(wanted(2 * unit, 3 * unit, Cut::ByContent))),
            (wanted(unit, u64::MAX, Cut::ByLength), Some(wanted(unit, u64::MAX, Cut::ByLength))),
            (wanted(unit, 5 * unit, Cut::BySum), Some(wanted(unit, 5 * unit, Cut::BySum))),
            (wanted(unit + 1, u64::MAX, Cut::ByLength), None),
            (wanted(unit - 1, unit, Cut::ByLength), None),
            (wanted(unit, unit + 1, Cut::ByLength), None),
            (wanted(unit, unit + 1, Cut::BySum), None),
        ] {
            assert_eq!(admitted(Order { number: 1, wanted: vec![asked] }).wanted, Vec::from_iter(told), "{asked:?}");
        }
    }

    #[test]
    fn a_long_part_is_told_in_pieces_that_follow_one_another() {
        let unit = BLOCK_LENGTH as u64;
        let chunk = Chunk { id: ChunkId::Sum(1), length: BLOCK_LENGTH as u32 };
        let count = 2 * PART_CHUNKS_MAX + 5;
        let alike = Alike { pieces: 1, cut: Cut::BySum, chunks: vec![chunk; count], next: None, ..Alike::default() };
        let from = Within { piece: 2, offset: unit };
        let parts = split(Part { order: 3, from, alike: Some(alike) });
        let starts: Vec<u64> = parts.iter().map(|part| part.from.offset / unit).collect();
        assert_eq!(starts, [1, 1 + PART_CHUNKS_MAX as u64, 1 + 2 * PART_CHUNKS_MAX as u64]);
        let ends: Vec<_> = parts.iter().map(|part| part.alike.as_ref().unwrap().next.map(|next| next / unit)).collect();
        assert_eq!(ends, [Some(starts[1]), Some(starts[2]), None]);
        assert_eq!(parts.iter().map(|part| part.alike.as_ref().unwrap().chunks.len()).sum::<usize>(), count);
    }
}
