//! Content to an agent: small files gathered into one message, blocks of large ones sent as they are or compressed, over further
//! connections too where that brings more.
//!
//! What always holds: what is sent of a file over another connection comes after its `open` was answered, and is answered itself
//! before anything of the file that is no such part. What was sent and not answered is a bounded stretch of the file: no more than that
//! can wait at the other end.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use crossbeam_channel::{Receiver, Sender, unbounded};

use super::{Lanes, body};
use crate::codec::{Chooser, Place, Way};
use crate::endpoint::client::{Client, Completion};
use crate::endpoint::delta::{COPY_MAX, Within};
use crate::endpoint::spread::{SPREAD_AFTER, Spread};
use crate::endpoint::{BLOCK_BYTES, Block, Error, Staged, WriteFailure, Writer};
use crate::manifest::Digest;
use crate::monitor::cpu::{Stage, idle_processors, spend};
use crate::wire::extension::{self, AHEAD_BYTES_MAX, FILES_MAX, Fields, HOLE_MAX, STRIPE, WireError};

/// What a request was for, where its answer says more than that it was taken.
enum Asked {
    /// These files were given whole: what became of them.
    Files(Vec<u32>),
    /// This file was opened.
    Open(u32),
    /// What this file has here was sent, by whichever connection where `anyhow`.
    Part { index: u32, offset: u64, anyhow: bool },
}

/// A file that was opened and not finished.
#[derive(Default)]
struct Flow {
    /// Which request opens it, and whether that was answered.
    opening: u64,
    open: bool,
    /// So much content was sent, with nothing else in between.
    sent: u64,
    /// Where the parts begin that are on their way.
    out: BTreeSet<u64>,
    /// How many of them go over whichever connection.
    anyhow: usize,
}

/// The writer of one worker.
pub(super) struct AgentWriter {
    spread: Spread<Client>,
    /// Whether the agent takes parts of a file over several connections.
    stripes: bool,
    flows: HashMap<u32, Flow>,
    chooser: Chooser,
    sender: Sender<Completion>,
    receiver: Receiver<Completion>,
    outstanding: usize,
    next_tag: u64,
    asked: HashMap<u64, Asked>,
    batch: Vec<(u32, Digest, u32)>,
    contents: Vec<u8>,
    done: Vec<Staged>,
}

impl AgentWriter {
    pub(super) fn new(lanes: &Arc<Lanes>) -> Self {
        let (sender, receiver) = unbounded();
        AgentWriter {
            spread: Spread::new(&lanes.pool),
            stripes: lanes.control().has(STRIPE, extension::VERSION),
            flows: HashMap::new(),
            chooser: Chooser::new(lanes.compress, lanes.planes()),
            sender,
            receiver,
            outstanding: 0,
            next_tag: 1,
            asked: HashMap::new(),
            batch: Vec::new(),
            contents: Vec::new(),
            done: Vec::new(),
        }
    }

    fn client(&self) -> &Client {
        self.spread.own()
    }

    /// The connection over which so many bytes are there soonest, if one has room.
    fn soonest(&self, bytes: usize) -> Option<&Arc<Client>> {
        self.spread.soonest(bytes, |_, client| Some(client.in_flight())).map(|(_, client)| client)
    }

    fn submit(&mut self, packet: Vec<u8>, start: usize, asked: Option<Asked>) -> Result<(), Error> {
        let anyhow = matches!(asked, Some(Asked::Part { anyhow: true, .. }));
        let tag = if asked.is_some() { self.next_tag } else { 0 };
        self.next_tag += 1;
        self.asked.extend(asked.map(|asked| (tag, asked)));
        let soonest = if anyhow { self.soonest(packet.len()) } else { None };
        let client = soonest.unwrap_or(self.spread.own());
        client.submit(packet, start, tag, &self.sender)?;
        self.outstanding += 1;
        Ok(())
    }

    /// Whether the next `length` bytes of a file go over whichever connection has room first.
    fn spreads(&mut self, index: u32, length: u64) -> bool {
        let Some(flow) = self.flows.get_mut(&index) else { return false };
        flow.sent += length;
        if !self.stripes || !flow.open || flow.sent <= SPREAD_AFTER {
            return false;
        }
        let begun = flow.anyhow > 0;
        self.spread.consider();
        begun || self.spread.width() > 1
    }

    /// Sends `length` bytes of a file at `offset`, which may come before its turn where `anyhow`.
    fn send(
        &mut self,
        (index, offset, length): (u32, u64, u64),
        packet: Vec<u8>,
        start: usize,
        anyhow: bool,
    ) -> Result<(), Error> {
        // What would wait here may soon go over another.
        let large = self.stripes && self.flows.get(&index).is_some_and(|flow| flow.sent > SPREAD_AFTER);
        if anyhow || large && self.spread.may_widen() {
            let most = (AHEAD_BYTES_MAX / 4 * 3 / self.spread.workers()) as u64;
            let bytes = packet.len() - start;
            let waits = |own: &Self| {
                let oldest = own.flows.get(&index).and_then(|flow| flow.out.first()).copied();
                oldest.is_some_and(|oldest| offset + length - oldest > most || own.soonest(bytes).is_none())
            };
            while waits(self) {
                self.settle_next()?;
            }
        }
        if let Some(flow) = self.flows.get_mut(&index) {
            flow.out.insert(offset);
            flow.anyhow += usize::from(anyhow);
        }
        self.submit(packet, start, Some(Asked::Part { index, offset, anyhow }))
    }

    /// Waits until what is on its way of a file over several connections has arrived: what follows is to come after it.
    fn gather(&mut self, index: u32) -> Result<(), Error> {
        while self.flows.get(&index).is_some_and(|flow| flow.anyhow > 0) {
            self.settle_next()?;
        }
        if let Some(flow) = self.flows.get_mut(&index) {
            flow.sent = 0;
        }
        Ok(())
    }

    fn settle_next(&mut self) -> Result<(), Error> {
        let completion = self.client().wait(&self.receiver, true)?;
        self.settle(completion)
    }

    fn way(&self) -> Way {
        Way { link_rate: self.spread.rate(), idle_processors: idle_processors() }
    }

    fn flush(&mut self) -> Result<(), Error> {
        let Some(first) = self.batch.first() else { return Ok(()) };
        let way = self.way();
        let place = Place { file: first.0, offset: 0, once: None };
        let coding = spend(Stage::Compress, || self.chooser.coding(place, &self.contents, way));
        let mut packet = extension::request("put");
        packet.extend_from_slice(&(self.batch.len() as u32).to_be_bytes());
        let mut files = Vec::with_capacity(self.batch.len());
        for (index, digest, length) in self.batch.drain(..) {
            files.push(index);
            packet.extend_from_slice(&index.to_be_bytes());
            packet.extend_from_slice(&digest.0);
            packet.extend_from_slice(&length.to_be_bytes());
        }
        spend(Stage::Compress, || extension::put_coded(&mut packet, &self.contents, coding));
        self.contents.clear();
        self.submit(packet, 0, Some(Asked::Files(files)))
    }

    fn settle(&mut self, completion: Completion) -> Result<(), Error> {
        self.outstanding -= 1;
        let answer = completion.answer.map_err(|lost| self.client().lost(lost))?;
        let reply = body(self.client(), answer)?;
        let files = match self.asked.remove(&completion.tag) {
            None => return Ok(()),
            Some(Asked::Open(index)) => {
                // Of an earlier try it says nothing.
                let flow = self.flows.get_mut(&index).filter(|flow| flow.opening == completion.tag);
                flow.into_iter().for_each(|flow| flow.open = true);
                return Ok(());
            }
            Some(Asked::Part { index, offset, anyhow }) => {
                if let Some(flow) = self.flows.get_mut(&index)
                    && flow.out.remove(&offset)
                {
                    flow.anyhow -= usize::from(anyhow);
                }
                return Ok(());
            }
            Some(Asked::Files(files)) => files,
        };
        let failures = read_failures(&reply, files.len()).map_err(|error| self.client().protocol(error.to_string()))?;
        let mut results: Vec<Result<(), WriteFailure>> = vec![Ok(()); files.len()];
        for (position, failure) in failures {
            results[position] = Err(failure);
        }
        self.done.extend(files.into_iter().zip(results).map(|(index, result)| Staged { index, result }));
        Ok(())
    }

    fn message(name: &str, index: u32) -> Vec<u8> {
        let mut packet = extension::request(name);
        packet.extend_from_slice(&index.to_be_bytes());
        packet
    }
}

fn read_failures(reply: &[u8], files: usize) -> Result<Vec<(usize, WriteFailure)>, WireError> {
    let mut fields = Fields(reply);
    let mut failures = Vec::new();
    for _ in 0..fields.u32()? {
        let (position, retry, message) = (fields.u32()? as usize, fields.u8()? != 0, fields.said()?);
        if position >= files {
            return Err(WireError::Range("the position of a failure"));
        }
        failures.push((position, WriteFailure { message, retry }));
    }
    fields.end()?;
    Ok(failures)
}

impl Writer for AgentWriter {
    fn put(&mut self, index: u32, block: Block, digest: Digest) -> Result<(), Error> {
        let data = block.data();
        if self.contents.len() + data.len() > BLOCK_BYTES || self.batch.len() >= FILES_MAX {
            self.flush()?;
        }
        self.batch.push((index, digest, data.len() as u32));
        self.contents.extend_from_slice(data);
        Ok(())
    }

    fn open(&mut self, index: u32, resume_at: u64) -> Result<(), Error> {
        let mut packet = Self::message("open", index);
        packet.extend_from_slice(&resume_at.to_be_bytes());
        self.gather(index)?;
        self.flows.insert(index, Flow { opening: self.next_tag, ..Flow::default() });
        self.spread.begin();
        self.submit(packet, 0, Some(Asked::Open(index)))
    }

    fn write(&mut self, index: u32, offset: u64, block: Block) -> Result<(), Error> {
        let length = block.data().len() as u32;
        let spread = self.spreads(index, length.into());
        let mut header = Self::message(if spread { "stripe" } else { "write" }, index);
        header.extend_from_slice(&offset.to_be_bytes());
        let (way, once) = (self.way(), block.once());
        let place = Place { file: index, offset, once };
        if let Some(coding) = spend(Stage::Compress, || self.chooser.coding(place, block.data(), way)) {
            let mut packet = header.clone();
            packet.push(coding.number());
            packet.extend_from_slice(&length.to_be_bytes());
            let made = spend(Stage::Compress, || match once {
                Some(once) => once.encode(coding, block.data(), &mut packet),
                None => coding.encode(block.data(), &mut packet),
            });
            if made.is_ok() && packet.len() < block.data().len() {
                return self.send((index, offset, length.into()), packet, 0, spread);
            }
        }
        header.push(0);
        header.extend_from_slice(&length.to_be_bytes());
        // The header goes into the room in front of the data, which is not copied.
        let (buffer, start) = block.headed(&header);
        self.send((index, offset, length.into()), buffer, start, spread)
    }

    fn hole(&mut self, index: u32, offset: u64, length: u64) -> Result<(), Error> {
        self.gather(index)?;
        let (mut at, end) = (offset, offset.saturating_add(length));
        while at < end {
            let step = (end - at).min(HOLE_MAX);
            let mut packet = Self::message("hole", index);
            packet.extend_from_slice(&at.to_be_bytes());
            packet.extend_from_slice(&step.to_be_bytes());
            self.submit(packet, 0, None)?;
            at += step;
        }
        Ok(())
    }

    fn copy(&mut self, index: u32, offset: u64, length: u64, from: Within) -> Result<(), Error> {
        self.gather(index)?;
        let mut done = 0;
        while done < length {
            let step = (length - done).min(COPY_MAX);
            let mut packet = Self::message("copy", index);
            packet.extend_from_slice(&(offset + done).to_be_bytes());
            packet.extend_from_slice(&step.to_be_bytes());
            packet.extend_from_slice(&from.piece.to_be_bytes());
            packet.extend_from_slice(&(from.offset + done).to_be_bytes());
            self.submit(packet, 0, None)?;
            done += step;
        }
        Ok(())
    }

    fn finish(&mut self, index: u32, digest: Digest) -> Result<(), Error> {
        self.gather(index)?;
        self.flows.remove(&index);
        let mut packet = Self::message("finish", index);
        packet.extend_from_slice(&digest.0);
        self.submit(packet, 0, Some(Asked::Files(vec![index])))
    }

    fn keep(&mut self, index: u32, digest: Digest) -> Result<(), Error> {
        let mut packet = Self::message("keep", index);
        packet.extend_from_slice(&digest.0);
        self.submit(packet, 0, Some(Asked::Files(vec![index])))
    }

    fn discard(&mut self, index: u32) -> Result<(), Error> {
        self.gather(index)?;
        self.flows.remove(&index);
        self.submit(Self::message("discard", index), 0, None)
    }

    fn completions(&mut self, wait: bool) -> Result<Vec<Staged>, Error> {
        if wait {
            self.flush()?;
        }
        while let Ok(completion) = self.receiver.try_recv() {
            self.settle(completion)?;
        }
        while wait && self.outstanding > 0 {
            self.settle_next()?;
        }
        Ok(std::mem::take(&mut self.done))
    }
}
