//! Asks a target for what it has, as it is wanted.

use crossbeam_channel::{Receiver, Sender};

use super::{Alike, Cut, Within};

/// A part of a piece that is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Range {
    pub(super) from: Within,
    /// No part is wanted that begins here or further on.
    pub(super) to: u64,
}

/// What is to be asked for; it takes the place of what was wanted before.
#[derive(Debug)]
pub struct Order {
    pub(super) number: u32,
    pub(super) cut: Cut,
    pub(super) ranges: Vec<Range>,
}

/// What the target answered.
#[derive(Debug)]
pub struct Part {
    /// Of this order.
    pub(super) order: u32,
    pub(super) cut: Cut,
    pub(super) from: Within,
    /// `None`: the order is done.
    pub(super) alike: Option<Alike>,
}

/// Asks `ask` for what is ordered, and hands on what it answers, until nobody orders or listens any more.
///
/// # Errors
/// Those of `ask`.
pub fn list<E>(
    orders: &Receiver<Order>,
    parts: &Sender<Part>,
    mut ask: impl FnMut(Within, Cut) -> Result<Option<Alike>, E>,
) -> Result<(), E> {
    while let Ok(mut order) = orders.recv() {
        let mut ranges = std::mem::take(&mut order.ranges).into_iter();
        let mut current = ranges.next();
        loop {
            // What was ordered last counts.
            while let Ok(newer) = orders.try_recv() {
                order = newer;
                ranges = std::mem::take(&mut order.ranges).into_iter();
                current = ranges.next();
            }
            let told = |from, alike| parts.send(Part { order: order.number, cut: order.cut, from, alike }).is_ok();
            let Some(Range { from, to }) = current else {
                if told(Within::default(), None) {
                    break;
                }
                return Ok(());
            };
            // A piece that is not what it was any more has nothing.
            let alike = ask(from, order.cut)?.unwrap_or_default();
            let next = alike.next.filter(|next| *next < to);
            current = match next {
                Some(offset) => Some(Range { from: Within { offset, ..from }, to }),
                None => ranges.next(),
            };
            if !told(from, Some(alike)) {
                return Ok(());
            }
        }
    }
    Ok(())
}
