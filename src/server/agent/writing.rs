//! One worker of a target: content messages onto its own [`Writer`](crate::endpoint::Writer).

use std::collections::HashMap;
use std::sync::Arc;

use crossbeam_channel::{Receiver, TryRecvError};

use super::ahead::Ahead;
use super::{Failure, Job, Run};
use crate::endpoint::delta::{COPY_MAX, Within};
use crate::endpoint::{Block, Staged, Target, Writer};
use crate::manifest::Tree;
use crate::wire::alike::{put_alike, read_wanted};
use crate::wire::extension::{FILES_MAX, Fields, HOLE_MAX, Message, RAW_MAX, WireError, put_string};

/// What stands in front of the frame of a `write`.
const INDEX_AND_OFFSET: usize = 4 + 8;
/// What stands in front of a frame's content: how it is coded, and its length.
const FRAME_HEAD: usize = 1 + 4;

/// Files of one request whose results are still out.
struct Group {
    job: Job,
    remaining: usize,
    failures: u32,
    body: Vec<u8>,
}

struct Worker<'a> {
    run: &'a Run,
    writer: Box<dyn Writer + 'a>,
    tree: Arc<Tree>,
    /// Where the next byte of an open file may be, at the least.
    open: HashMap<u32, u64>,
    /// The request that waits for a file, and the file's position in it.
    waiting: HashMap<u32, (u32, u32)>,
    groups: HashMap<u32, Group>,
    /// What came before its turn.
    ahead: Ahead,
    /// Requests of several connections meet here, so their numbers do not identify them.
    serial: u32,
}

pub(super) fn serve(run: &Run, target: &(dyn Target + Send + Sync), jobs: &Receiver<Job>) {
    let made = match run.tree.get() {
        Some(tree) => target.writer().map(|writer| (writer, Arc::clone(tree))).map_err(Failure::from),
        None => Err(Failure::order("nothing was compared")),
    };
    match made {
        Ok((writer, tree)) => {
            let (open, waiting, groups) = (HashMap::new(), HashMap::new(), HashMap::new());
            Worker { run, writer, tree, open, waiting, groups, ahead: Ahead::default(), serial: 0 }.serve(jobs);
        }
        Err(failure) => jobs.iter().for_each(|job| job.refuse(&failure)),
    }
}

/// Tells what files may be made of.
pub(super) fn list_alike(run: &Run, target: &(dyn Target + Send + Sync), jobs: &Receiver<Job>) {
    let answer = |job: &Job| -> Result<Vec<u8>, Failure> {
        run.is_good()?;
        if job.output.is_gone() {
            return Err(Failure::gone());
        }
        let mut fields = Fields(job.payload.bytes());
        let (index, wanted) = (fields.u32()?, read_wanted(&mut fields)?);
        fields.end()?;
        let mut body = Vec::new();
        put_alike(&mut body, target.alike(index, wanted)?.as_ref());
        Ok(body)
    };
    for job in jobs {
        match answer(&job) {
            Ok(body) => job.reply(&body),
            Err(failure) => {
                run.reject(b"", &failure);
                job.refuse(&failure);
            }
        }
    }
}

impl Worker<'_> {
    fn serve(mut self, jobs: &Receiver<Job>) {
        let Err(failure) = self.take_all(jobs) else { return };
        // The writer is of no more use: whatever waits or comes is told why.
        self.groups.drain().for_each(|(_, group)| group.job.refuse(&failure));
        jobs.iter().for_each(|job| job.refuse(&failure));
    }

    /// Until no more come.
    fn take_all(&mut self, jobs: &Receiver<Job>) -> Result<(), Failure> {
        loop {
            let job = match jobs.try_recv() {
                Ok(job) => job,
                Err(TryRecvError::Empty) => {
                    self.settle(true)?;
                    match jobs.recv() {
                        Ok(job) => job,
                        Err(_) => return Ok(()),
                    }
                }
                Err(TryRecvError::Disconnected) => return self.settle(true),
            };
            self.handle(job)?;
            self.settle(false)?;
        }
    }

    /// Does what a message asks for when it is its turn, and then what has come before its own.
    fn handle(&mut self, mut job: Job) -> Result<(), Failure> {
        let payload = std::mem::take(&mut job.payload);
        let mut fields = Fields(payload.bytes());
        let place = (job.name != "put").then(|| (fields.u32(), fields.u64()));
        if job.name == "stripe"
            && let Some((Ok(index), Ok(offset))) = place
            && self.open.get(&index).is_some_and(|&at| offset > at)
            && self.run.is_good().is_ok()
        {
            if let Err((job, failure)) = self.ahead.keep(&self.run.ahead, (index, offset), job, payload) {
                self.refuse(&job, Some(index), failure);
            }
            return Ok(());
        }
        self.handle_now(job, payload)?;
        let Some((Ok(index), _)) = place else { return Ok(()) };
        while let Some(&at) = self.open.get(&index)
            && let Some((job, payload)) = self.ahead.next(&self.run.ahead, index, at)
        {
            self.handle_now(job, payload)?;
        }
        Ok(())
    }

    /// A message that breaks the rules has no effect, and no later one has; `Err` ends the worker.
    fn handle_now(&mut self, job: Job, payload: Message) -> Result<(), Failure> {
        self.serial = self.serial.wrapping_add(1);
        let at = Fields(payload.bytes().get(if job.name == "put" { 4 } else { 0 }..).unwrap_or_default()).u32().ok();
        let done = self.run.is_good().map_err(Refusal::Message).and_then(|()| self.apply(&job, payload));
        match done {
            Ok(Done::Now) => job.reply(&[]),
            Ok(Done::Later(count)) => {
                self.groups.insert(self.serial, Group { job, remaining: count, failures: 0, body: Vec::new() });
            }
            Err(Refusal::Message(failure)) => self.refuse(&job, at, failure),
            Err(Refusal::Run(failure)) => {
                job.refuse(&failure);
                return Err(failure);
            }
        }
        Ok(())
    }

    /// Refuses a message about the file at `at`, and with it the run.
    fn refuse(&self, job: &Job, at: Option<u32>, failure: Failure) {
        let (path, failure) = self.named(at, failure);
        self.run.reject(&path, &failure);
        job.refuse(&failure);
    }

    fn apply(&mut self, job: &Job, payload: Message) -> Result<Done, Refusal> {
        let mut fields = Fields(payload.bytes());
        if job.name == "put" {
            return self.put(self.serial, fields);
        }
        let index = fields.u32()?;
        let size = self.size(index)?;
        match job.name {
            "open" => {
                let resume_at = fields.u64()?;
                if resume_at > size || !self.run.claim(index) {
                    return Err(Failure::order("open").into());
                }
                // It would hash what is staged, for nobody.
                let gone = job.output.is_gone().then(Failure::gone);
                let refused = gone.or_else(|| self.run.open_files.add(self.run.limits.open_files).err());
                if let Some(failure) = refused {
                    self.run.release(index);
                    return Err(failure.into());
                }
                self.open.insert(index, resume_at);
                self.writer.open(index, resume_at).map_err(Refusal::run)?;
            }
            "write" | "stripe" => {
                let offset = fields.u64()?;
                let length = u64::from(Fields(fields.0.get(1..).unwrap_or_default()).u32()?);
                if length > RAW_MAX as u64 {
                    return Err(WireError::Range("the declared length").into());
                }
                let end = self.advance(index, offset, length, size)?;
                // A part that is empty would take the turn of the one at its place.
                if job.name == "stripe" && length == 0 {
                    return Err(WireError::Range("the declared length").into());
                }
                let raw = fields.0.first() == Some(&0) && fields.0.len() as u64 == FRAME_HEAD as u64 + length;
                let block = if raw {
                    let (packet, start) = payload.skip(INDEX_AND_OFFSET + FRAME_HEAD).into_parts();
                    Block::within(packet, start)
                } else {
                    let mut block = Block::with_capacity(length as usize);
                    fields.frame(block.buffer_mut())?;
                    block
                };
                self.open.insert(index, end);
                self.writer.write(index, offset, block).map_err(Refusal::run)?;
            }
            "hole" => {
                let (offset, length) = (fields.u64()?, fields.u64()?);
                // Zeros are hashed like everything else: a hole is work, of which a client that goes leaves none.
                if length > HOLE_MAX {
                    return Err(WireError::Range("the length of a hole").into());
                }
                if job.output.is_gone() {
                    return Err(Failure::gone().into());
                }
                let end = self.advance(index, offset, length, size)?;
                self.open.insert(index, end);
                self.writer.hole(index, offset, length).map_err(Refusal::run)?;
            }
            "copy" => {
                let (offset, length) = (fields.u64()?, fields.u64()?);
                let from = Within { piece: fields.u32()?, offset: fields.u64()? };
                if length > COPY_MAX {
                    return Err(WireError::Range("the length of a copy").into());
                }
                if job.output.is_gone() {
                    return Err(Failure::gone().into());
                }
                let end = self.advance(index, offset, length, size)?;
                self.open.insert(index, end);
                self.writer.copy(index, offset, length, from).map_err(Refusal::run)?;
            }
            "finish" => {
                let digest = fields.digest()?;
                if self.ahead.holds(index) || !self.close(index) {
                    return Err(Failure::order("finish without open").into());
                }
                self.waiting.insert(index, (self.serial, 0));
                self.writer.finish(index, digest).map_err(Refusal::run)?;
                return Ok(Done::Later(1));
            }
            "keep" => {
                let digest = fields.digest()?;
                if !self.run.claim(index) {
                    return Err(Failure::order("keep").into());
                }
                self.waiting.insert(index, (self.serial, 0));
                self.writer.keep(index, digest).map_err(Refusal::run)?;
                return Ok(Done::Later(1));
            }
            "discard" => {
                if self.close(index) {
                    self.run.release(index);
                }
                self.ahead.drop_all(&self.run.ahead, index);
                self.writer.discard(index).map_err(Refusal::run)?;
            }
            _ => return Err(Failure::order("this run is a push").into()),
        }
        Ok(Done::Now)
    }

    /// Counts a file as not open any more, if it was.
    fn close(&mut self, index: u32) -> bool {
        let was_open = self.open.remove(&index).is_some();
        if was_open {
            self.run.open_files.remove();
        }
        was_open
    }

    /// The path that a message is about, and the failure with its name.
    fn named(&self, at: Option<u32>, failure: Failure) -> (Vec<u8>, Failure) {
        if self.run.is_good().is_err() {
            return (Vec::new(), failure);
        }
        match at.and_then(|at| self.tree.entries().get(at as usize)) {
            Some(entry) => {
                let message = format!("'{}': {}", entry.path, failure.message);
                (entry.path.as_bytes().to_vec(), Failure { message, ..failure })
            }
            None => (Vec::new(), failure),
        }
    }

    fn size(&self, index: u32) -> Result<u64, WireError> {
        let entry = self.tree.entries().get(index as usize).and_then(|entry| entry.file());
        entry.map(|(size, _)| size).ok_or(WireError::Range("the index of a file"))
    }

    fn advance(&self, index: u32, offset: u64, length: u64, size: u64) -> Result<u64, Refusal> {
        let at = *self.open.get(&index).ok_or_else(|| Failure::order("the file is not open"))?;
        match offset.checked_add(length) {
            Some(end) if offset >= at && end <= size => Ok(end),
            _ => Err(WireError::Range("the offset").into()),
        }
    }

    fn put(&mut self, id: u32, mut fields: Fields<'_>) -> Result<Done, Refusal> {
        let count = fields.u32()? as usize;
        if count == 0 || count > FILES_MAX {
            return Err(WireError::Range("the number of files").into());
        }
        let (mut files, mut total) = (Vec::with_capacity(count), 0_usize);
        for _ in 0..count {
            let (index, digest, length) = (fields.u32()?, fields.digest()?, fields.u32()? as usize);
            total = total.saturating_add(length);
            if self.size(index)? < length as u64 {
                return Err(WireError::Range("a file").into());
            }
            files.push((index, digest, length));
        }
        let indices: Vec<u32> = files.iter().map(|file| file.0).collect();
        if total > RAW_MAX || !indices.iter().all(|&index| self.run.claim(index)) {
            return Err(WireError::Range("a file").into());
        }
        let mut raw = Vec::new();
        if fields.frame(&mut raw)? != total {
            return Err(WireError::Range("the declared length").into());
        }
        let mut at = 0;
        for (position, (index, digest, length)) in files.into_iter().enumerate() {
            let block = Block::copy_of(&raw[at..at + length]);
            at += length;
            self.waiting.insert(index, (id, position as u32));
            self.writer.put(index, block, digest).map_err(Refusal::run)?;
        }
        Ok(Done::Later(count))
    }

    /// Answers the requests whose files are done.
    fn settle(&mut self, wait: bool) -> Result<(), Failure> {
        if self.waiting.is_empty() {
            return Ok(());
        }
        for Staged { index, result } in self.writer.completions(wait)? {
            let Some((id, position)) = self.waiting.remove(&index) else { continue };
            self.run.release(index);
            let Some(group) = self.groups.get_mut(&id) else { continue };
            group.remaining -= 1;
            if let Err(failure) = result {
                group.failures += 1;
                group.body.extend_from_slice(&position.to_be_bytes());
                group.body.push(u8::from(failure.retry));
                put_string(&mut group.body, group.job.veil.cover(&failure.message).as_bytes());
            }
            if group.remaining == 0
                && let Some(group) = self.groups.remove(&id)
            {
                group.job.reply(&[&group.failures.to_be_bytes()[..], &group.body].concat());
            }
        }
        Ok(())
    }
}

enum Done {
    Now,
    Later(usize),
}

enum Refusal {
    Message(Failure),
    Run(Failure),
}

impl Refusal {
    fn run(error: crate::endpoint::Error) -> Refusal {
        Refusal::Run(error.into())
    }
}

impl<T: Into<Failure>> From<T> for Refusal {
    fn from(error: T) -> Self {
        Refusal::Message(error.into())
    }
}
