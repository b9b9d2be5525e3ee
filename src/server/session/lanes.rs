//! Lanes: a few threads that work on open files while the session reads on.
//!
//! What always holds: all requests on one file, by whichever handle, are on one lane and are done in the order they came;
//! what is in flight is bounded; and after [`Lanes::wait`] nothing is.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;

use crossbeam_channel::{Receiver, Sender, bounded};

use super::files::Job;
use crate::root::Metadata;
use crate::server::agent::Output;

pub(super) const LANES: u64 = 4;
/// Requests that wait on a lane; at 255 KiB each, 16 MiB in a session.
const WAITING: usize = 16;

/// How many requests are in flight.
#[derive(Default)]
struct Flight {
    count: Mutex<usize>,
    landed: Condvar,
}

impl Flight {
    fn change(&self, change: impl FnOnce(&mut usize)) {
        change(&mut self.count.lock().unwrap_or_else(PoisonError::into_inner));
        self.landed.notify_all();
    }
}

/// Counts a request until it is dropped, however its work ends.
struct Ticket(Arc<Flight>);

impl Drop for Ticket {
    fn drop(&mut self) {
        self.0.change(|count| *count -= 1);
    }
}

struct Lane {
    jobs: Sender<(Job, Ticket)>,
    thread: JoinHandle<()>,
}

/// The lanes of one session; a thread is started when a lane is first used.
pub(super) struct Lanes {
    lanes: [Option<Lane>; LANES as usize],
    flight: Arc<Flight>,
    output: Arc<dyn Output>,
}

/// The lane of a file: the same for all of its names and handles.
pub(super) fn lane_of(file: &Metadata) -> usize {
    ((file.inode ^ file.device) % LANES) as usize
}

impl Lanes {
    pub(super) fn new(output: Arc<dyn Output>) -> Lanes {
        Lanes { lanes: Default::default(), flight: Arc::default(), output }
    }

    /// Queues work on an open file; blocks while the lane is full. Gives the work back when there is no thread for it.
    pub(super) fn send(&mut self, lane: usize, job: Job) -> Result<(), Job> {
        let lane = &mut self.lanes[lane];
        if lane.is_none() {
            *lane = start(&self.output);
        }
        let Some(Lane { jobs, .. }) = lane else { return Err(job) };
        self.flight.change(|count| *count += 1);
        jobs.send((job, Ticket(Arc::clone(&self.flight)))).map_err(|refused| refused.0.0)
    }

    /// Waits until every request is answered.
    pub(super) fn wait(&self) {
        let mut count = self.flight.count.lock().unwrap_or_else(PoisonError::into_inner);
        while *count > 0 {
            count = self.flight.landed.wait(count).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Lets the threads finish what they have.
    pub(super) fn finish(&mut self) {
        for Lane { jobs, thread } in self.lanes.iter_mut().filter_map(Option::take) {
            drop(jobs);
            let _ = thread.join();
        }
    }
}

impl Drop for Lanes {
    fn drop(&mut self) {
        self.finish();
    }
}

fn start(output: &Arc<dyn Output>) -> Option<Lane> {
    let (jobs, receiver): (_, Receiver<(Job, Ticket)>) = bounded(WAITING);
    let output = Arc::clone(output);
    let work = move || {
        for (job, ticket) in receiver {
            output.send(job.run());
            drop(ticket);
        }
    };
    let thread = std::thread::Builder::new().name("sftp-files".into()).spawn(work).ok()?;
    Some(Lane { jobs, thread })
}
