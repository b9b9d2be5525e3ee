//! Asks a target for what it has, as it is wanted.

use crossbeam_channel::{Receiver, Sender};

use super::{Alike, Wanted, Within};

/// What is to be asked for; it takes the place of what was wanted before.
#[derive(Debug)]
pub struct Order {
    pub(super) number: u32,
    pub(super) wanted: Vec<Wanted>,
}

/// What the target answered.
#[derive(Debug)]
pub struct Part {
    /// Of this order.
    pub(super) order: u32,
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
    mut ask: impl FnMut(Wanted) -> Result<Option<Alike>, E>,
) -> Result<(), E> {
    while let Ok(mut order) = orders.recv() {
        let mut ranges = std::mem::take(&mut order.wanted).into_iter();
        let mut current = ranges.next();
        loop {
            // What was ordered last counts.
            while let Ok(newer) = orders.try_recv() {
                order = newer;
                ranges = std::mem::take(&mut order.wanted).into_iter();
                current = ranges.next();
            }
            let told = |from, alike| parts.send(Part { order: order.number, from, alike }).is_ok();
            let Some(wanted) = current else {
                if told(Within::default(), None) {
                    break;
                }
                return Ok(());
            };
            // A piece that is not what it was any more has nothing.
            let alike = ask(wanted)?.unwrap_or_default();
            let next = alike.next.filter(|next| *next < wanted.to);
            current = match next {
                Some(offset) => Some(Wanted { from: Within { offset, ..wanted.from }, ..wanted }),
                None => ranges.next(),
            };
            if !told(wanted.from, Some(alike)) {
                return Ok(());
            }
        }
    }
    Ok(())
}
