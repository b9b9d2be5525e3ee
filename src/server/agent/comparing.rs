//! What a client that pulls has already of a file, and so need not be sent. It is asked for that as it is wanted: its `wants` wait until
//! something is, and its `parts` say what it has, in the order in which they come.
//!
//! What always holds: no request waits here on the thread that reads the client's packets. Of what a client tells no more is kept than
//! [`WAITING_MAX`] chunks that wait and [`LISTED_MAX`] that are looked for.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, TryRecvError, unbounded};

use super::{Failure, Job, locked};
use crate::codec::chunks::{Cut, Order, Part};
use crate::endpoint::delta::{Looks, Matcher};
use crate::wire::alike::{put_order, read_part};
use crate::wire::extension::{COMPARED_MAX, Fields, NO_ORDER, PARTS_MAX, WireError};

/// Chunks that are looked for by their content, of all files of a run; each takes about 50 bytes. At 256 KiB each these are 256 GiB.
const LISTED_MAX: usize = 1 << 20;
/// Chunks and blocks in parts that wait, likewise.
const WAITING_MAX: usize = 1 << 20;
/// A client that says nothing for so long is not asked about the file any more, and all of it is sent.
const PATIENCE: Duration = Duration::from_secs(60);

/// The files of one run that are compared.
#[derive(Default)]
pub(super) struct Comparing {
    files: Mutex<Files>,
    listed: AtomicUsize,
}

#[derive(Default)]
struct Files {
    by_index: HashMap<u32, File>,
    /// How many of those have not ended.
    open: usize,
    /// Chunks in parts that wait.
    waiting: usize,
    /// The run has ended.
    over: bool,
}

/// One that is compared, or was.
enum File {
    Open(Open),
    Ended,
}

/// What waits of it.
#[derive(Default)]
struct Open {
    /// The `wants` of the client,
    asking: Option<Job>,
    /// or what it is to be told when that comes.
    order: Option<Order>,
    /// Where what it tells goes.
    parts: Option<Sender<(Part, Job)>>,
}

fn chunks(part: &Part) -> usize {
    part.alike.as_ref().map_or(0, |alike| alike.chunks.len())
}

/// Answers a `wants` that waited.
fn answer(job: &Job, order: Option<&Order>) {
    job.output.rests(false);
    tell(job, order);
}

fn tell(job: &Job, order: Option<&Order>) {
    let mut body = Vec::new();
    put_order(&mut body, order);
    job.reply(&body);
}

impl Files {
    /// The file at `index`, which is compared from now on if it was not. `None` where it is not: it has ended, or there are too many.
    fn open(&mut self, index: u32) -> Option<&mut Open> {
        if self.over {
            return None;
        }
        let open = &mut self.open;
        let file = self.by_index.entry(index).or_insert_with(|| {
            let room = *open < COMPARED_MAX;
            *open += usize::from(room);
            if room { File::Open(Open::default()) } else { File::Ended }
        });
        match file {
            File::Open(open) => Some(open),
            File::Ended => None,
        }
    }
}

impl Comparing {
    /// Looks for what the client has of the file at `index`, which is read from `from` on. `None` where that is not told any more, or is
    /// told already.
    pub(super) fn matcher(self: &Arc<Self>, index: u32, from: u64) -> Option<Matcher> {
        let (sender, parts) = unbounded();
        let mut files = locked(&self.files);
        let open = files.open(index).filter(|open| open.parts.is_none())?;
        open.parts = Some(sender);
        drop(files);
        let looks = Asking { comparing: Arc::clone(self), index, parts, listed: 0 };
        Some(Matcher::new(from, Box::new(looks)))
    }

    /// Takes a `wants` or `parts`.
    pub(super) fn take(&self, job: Job) {
        let taken = match job.name {
            "wants" => self.asks(job),
            _ => self.tells(job),
        };
        if let Err((job, failure)) = taken {
            job.refuse(&failure);
        }
    }

    fn asks(&self, job: Job) -> Result<(), (Job, Failure)> {
        let mut fields = Fields(job.payload.bytes());
        let index = match fields.u32().and_then(|index| fields.end().map(|()| index)) {
            Ok(index) => index,
            Err(error) => return Err((job, error.into())),
        };
        let mut files = locked(&self.files);
        // Answers may have to wait for room: nobody else is to wait for that.
        let order = match files.open(index) {
            None => None,
            Some(Open { asking: Some(_), .. }) => {
                drop(files);
                return Err((job, Failure::order("it was asked already")));
            }
            Some(open) => match open.order.take() {
                None => {
                    job.output.rests(true);
                    open.asking = Some(job);
                    return Ok(());
                }
                order => order,
            },
        };
        drop(files);
        tell(&job, order.as_ref());
        Ok(())
    }

    fn tells(&self, job: Job) -> Result<(), (Job, Failure)> {
        let mut fields = Fields(job.payload.bytes());
        let read = fields.u32().and_then(|index| read_part(fields).map(|part| (index, part)));
        let (index, part) = match read {
            Ok(read) => read,
            Err(error) => return Err((job, error.into())),
        };
        let mut guard = locked(&self.files);
        let files = &mut *guard;
        if part.order == NO_ORDER {
            files.by_index.entry(index).or_insert(File::Ended);
            drop(guard);
            self.end(index);
            job.reply(&[]);
            return Ok(());
        }
        match files.by_index.get_mut(&index) {
            // It came too late to be of use.
            Some(File::Ended) => {
                drop(guard);
                job.reply(&[]);
                Ok(())
            }
            Some(File::Open(Open { parts: Some(parts), .. })) => {
                let waiting = files.waiting + chunks(&part);
                if parts.len() < PARTS_MAX && waiting <= WAITING_MAX {
                    files.waiting = waiting;
                    job.output.rests(true);
                    let _ = parts.send((part, job));
                    return Ok(());
                }
                drop(guard);
                // Whoever waits for more of it would wait in vain.
                self.end(index);
                Err((job, WireError::Range("the number of parts that wait").into()))
            }
            _ => {
                drop(guard);
                Err((job, Failure::order("nothing was asked for")))
            }
        }
    }

    /// Asks the client; false where it cannot be told any more.
    fn order(&self, index: u32, order: Order) -> bool {
        let mut files = locked(&self.files);
        let Some(File::Open(open)) = files.by_index.get_mut(&index) else { return false };
        match open.asking.take() {
            Some(job) => {
                drop(files);
                answer(&job, Some(&order));
            }
            None => open.order = Some(order),
        }
        true
    }

    /// The file at `index` is compared no more, if it was.
    pub(super) fn end(&self, index: u32) {
        let mut files = locked(&self.files);
        if let Some(file) = files.by_index.get_mut(&index)
            && let File::Open(open) = std::mem::replace(file, File::Ended)
        {
            files.open -= 1;
            drop(files);
            open.asking.iter().for_each(|job| answer(job, None));
        }
    }

    /// The run ends: whoever waits for what the client has waits no longer.
    pub(super) fn close(&self) {
        let mut files = locked(&self.files);
        files.over = true;
        let all = std::mem::take(&mut files.by_index);
        drop(files);
        for file in all.into_values() {
            if let File::Open(Open { asking: Some(job), .. }) = file {
                answer(&job, None);
            }
        }
    }
}

/// The client, as it is asked about one file.
struct Asking {
    comparing: Arc<Comparing>,
    index: u32,
    parts: Receiver<(Part, Job)>,
    /// Chunks that are looked for by their content.
    listed: usize,
}

impl Asking {
    /// Lets the client tell more.
    fn accept(&mut self, (part, job): (Part, Job)) -> Part {
        locked(&self.comparing.files).waiting -= chunks(&part);
        job.output.rests(false);
        job.reply(&[]);
        if part.alike.as_ref().is_some_and(|alike| alike.cut == Cut::ByContent) {
            let listed = self.comparing.listed.fetch_add(chunks(&part), Ordering::Relaxed) + chunks(&part);
            self.listed += chunks(&part);
            if listed > LISTED_MAX {
                // As if that were all that the client has.
                return Part { alike: None, ..part };
            }
        }
        part
    }
}

impl Looks for Asking {
    fn order(&mut self, order: Order) -> bool {
        self.comparing.order(self.index, order)
    }

    fn part(&mut self) -> Option<Part> {
        let told = self.parts.recv_timeout(PATIENCE).ok();
        if told.is_none() {
            self.comparing.end(self.index);
        }
        told.map(|told| self.accept(told))
    }

    fn is_wary(&self) -> bool {
        true
    }

    fn part_now(&mut self) -> Result<Part, TryRecvError> {
        let told = self.parts.try_recv()?;
        Ok(self.accept(told))
    }
}

impl Drop for Asking {
    fn drop(&mut self) {
        self.comparing.end(self.index);
        self.comparing.listed.fetch_sub(self.listed, Ordering::Relaxed);
        for (part, job) in self.parts.try_iter() {
            locked(&self.comparing.files).waiting -= chunks(&part);
            job.output.rests(false);
            job.reply(&[]);
        }
    }
}
