//! Asks a target for what it has, as it is wanted.

use crossbeam_channel::{Receiver, Sender, TryRecvError};

use super::{Alike, Order, Part, Wanted, Within};

/// The side of whoever looks for what the target has.
pub trait Looks: Send {
    /// Orders; false where nobody takes orders any more.
    fn order(&mut self, order: Order) -> bool;
    /// Waits for a part; `None` where no more come.
    fn part(&mut self) -> Option<Part>;
    /// A part that has come, if one has.
    ///
    /// # Errors
    /// Whether none has come yet, or none will.
    fn part_now(&mut self) -> Result<Part, TryRecvError>;
    /// Whether it tells nothing of what is shorter than a block: that might say what is in it.
    fn is_wary(&self) -> bool {
        false
    }
}

impl Looks for (Sender<Order>, Receiver<Part>) {
    fn order(&mut self, order: Order) -> bool {
        self.0.send(order).is_ok()
    }

    fn part(&mut self) -> Option<Part> {
        self.1.recv().ok()
    }

    fn part_now(&mut self) -> Result<Part, TryRecvError> {
        self.1.try_recv()
    }
}

/// The side of the target.
pub trait Lists {
    /// Waits for an order; `None` where no more come.
    fn order(&mut self) -> Option<Order>;
    /// An order that has come.
    fn order_now(&mut self) -> Option<Order>;
    /// Says a part; false where nobody listens any more.
    fn tell(&mut self, part: Part) -> bool;
}

impl Lists for (Receiver<Order>, Sender<Part>) {
    fn order(&mut self) -> Option<Order> {
        self.0.recv().ok()
    }

    fn order_now(&mut self) -> Option<Order> {
        self.0.try_recv().ok()
    }

    fn tell(&mut self, part: Part) -> bool {
        self.1.send(part).is_ok()
    }
}

/// Asks `ask` for what is ordered, and hands on what it answers, until nobody orders or listens any more.
///
/// # Errors
/// Those of `ask`.
pub fn list<E>(lists: &mut impl Lists, mut ask: impl FnMut(Wanted) -> Result<Option<Alike>, E>) -> Result<(), E> {
    while let Some(mut order) = lists.order() {
        let mut ranges = std::mem::take(&mut order.wanted).into_iter();
        let mut current = ranges.next();
        loop {
            // What was ordered last counts.
            while let Some(newer) = lists.order_now() {
                order = newer;
                ranges = std::mem::take(&mut order.wanted).into_iter();
                current = ranges.next();
            }
            let mut told = |from, alike| lists.tell(Part { order: order.number, from, alike });
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
