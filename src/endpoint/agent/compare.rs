//! Tells the agent of a pull what the target here has of a file, as it wants to know that.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, unbounded};

use super::{Lanes, body};
use crate::endpoint::Error;
use crate::endpoint::client::Completion;
use crate::endpoint::delta::{Alike, Lists, Order, Part, Wanted, list};
use crate::wire::alike::{put_part, read_order};
use crate::wire::extension::{self, Fields, PARTS_MAX};

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
    /// Those that were not looked at.
    orders: VecDeque<Order>,
    /// Parts that are not answered.
    out: usize,
    /// Nothing more is wanted.
    ended: bool,
}

/// Tells it until nothing more is wanted of the file at `index`, or `over` says so, or the connection has ended: whoever reads notices that.
pub(super) fn compare(lanes: &Lanes, index: u32, over: &AtomicBool, ask: &mut dyn FnMut(Wanted) -> Option<Alike>) {
    let (sender, receiver) = unbounded();
    let orders = VecDeque::new();
    let mut telling = Telling { lanes, index, over, sender, receiver, orders, out: 0, ended: false };
    if telling.ask_for_orders().is_ok() {
        let _ = list(&mut telling, |wanted| Ok::<_, Error>(ask(wanted)));
    }
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

    fn settle(&mut self, Completion { tag, answer }: Completion) -> Result<(), Error> {
        let client = self.lanes.control();
        let reply = body(client, answer.map_err(|lost| client.lost(lost))?)?;
        if tag == PARTS {
            self.out -= 1;
            return Ok(());
        }
        match read_order(Fields(&reply)).map_err(|error| self.lanes.malformed(error))? {
            Some(order) => {
                self.orders.push_back(order);
                self.ask_for_orders()
            }
            None => {
                self.ended = true;
                Ok(())
            }
        }
    }

    /// Takes what has come; with `wait` at least something, unless it is over.
    fn pump(&mut self, mut wait: bool) {
        while !self.ended {
            let completion = match self.receiver.try_recv() {
                Ok(completion) => Some(completion),
                Err(_) if wait => self.receiver.recv_timeout(LOOK).ok(),
                Err(_) => return,
            };
            self.ended |= self.over.load(Ordering::Relaxed);
            if let Some(completion) = completion {
                wait = false;
                self.ended |= self.settle(completion).is_err();
            }
        }
    }
}

impl Lists for Telling<'_> {
    fn order(&mut self) -> Option<Order> {
        while self.orders.is_empty() && !self.ended {
            self.pump(true);
        }
        self.orders.pop_front().filter(|_| !self.ended)
    }

    fn order_now(&mut self) -> Option<Order> {
        self.pump(false);
        self.orders.pop_front()
    }

    fn tell(&mut self, part: Part) -> bool {
        while self.out >= PARTS_MAX && !self.ended {
            self.pump(true);
        }
        let mut packet = self.request("parts");
        put_part(&mut packet, &part);
        self.out += 1;
        !self.ended && self.lanes.control().submit(packet, 0, PARTS, &self.sender).is_ok()
    }
}
