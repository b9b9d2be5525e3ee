//! Content to an agent: small files gathered into one message, blocks of large ones sent as they are or compressed.

use std::collections::HashMap;
use std::sync::Arc;

use crossbeam_channel::{Receiver, Sender, unbounded};

use super::body;
use crate::codec::{Chooser, CompressOptions, Place, Way};
use crate::endpoint::client::{Client, Completion};
use crate::endpoint::delta::{COPY_MAX, Within};
use crate::endpoint::{BLOCK_BYTES, Block, Error, Staged, WriteFailure, Writer};
use crate::manifest::Digest;
use crate::monitor::cpu::{Stage, idle_processors, spend};
use crate::wire::extension::{self, FILES_MAX, Fields, HOLE_MAX, WireError};

/// The writer of one worker.
pub(super) struct AgentWriter {
    client: Arc<Client>,
    chooser: Chooser,
    sender: Sender<Completion>,
    receiver: Receiver<Completion>,
    outstanding: usize,
    next_tag: u64,
    /// The files of each request whose reply says what became of them.
    files: HashMap<u64, Vec<u32>>,
    batch: Vec<(u32, Digest, u32)>,
    contents: Vec<u8>,
    done: Vec<Staged>,
}

impl AgentWriter {
    /// `planes`: the agent reads byte planes.
    pub(super) fn new(client: Arc<Client>, compress: CompressOptions, planes: bool) -> Self {
        let (sender, receiver) = unbounded();
        AgentWriter {
            client,
            chooser: Chooser::new(compress, planes),
            sender,
            receiver,
            outstanding: 0,
            next_tag: 1,
            files: HashMap::new(),
            batch: Vec::new(),
            contents: Vec::new(),
            done: Vec::new(),
        }
    }

    fn submit(&mut self, packet: Vec<u8>, start: usize, files: Vec<u32>) -> Result<(), Error> {
        let tag = if files.is_empty() { 0 } else { self.next_tag };
        self.next_tag += 1;
        if tag != 0 {
            self.files.insert(tag, files);
        }
        self.client.submit(packet, start, tag, &self.sender)?;
        self.outstanding += 1;
        Ok(())
    }

    fn way(&self) -> Way {
        Way { link_rate: self.client.link_rate(), idle_processors: idle_processors() }
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
        self.submit(packet, 0, files)
    }

    fn settle(&mut self, completion: Completion) -> Result<(), Error> {
        self.outstanding -= 1;
        let answer = completion.answer.map_err(|lost| self.client.lost(lost))?;
        let reply = body(&self.client, answer)?;
        let Some(files) = self.files.remove(&completion.tag) else { return Ok(()) };
        let failures = read_failures(&reply, files.len()).map_err(|error| self.client.protocol(error.to_string()))?;
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
        self.submit(packet, 0, Vec::new())
    }

    fn write(&mut self, index: u32, offset: u64, block: Block) -> Result<(), Error> {
        let mut header = Self::message("write", index);
        header.extend_from_slice(&offset.to_be_bytes());
        let length = block.data().len() as u32;
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
                return self.submit(packet, 0, Vec::new());
            }
        }
        header.push(0);
        header.extend_from_slice(&length.to_be_bytes());
        // The header goes into the room in front of the data, which is not copied.
        let (buffer, start) = block.headed(&header);
        self.submit(buffer, start, Vec::new())
    }

    fn hole(&mut self, index: u32, offset: u64, length: u64) -> Result<(), Error> {
        let (mut at, end) = (offset, offset.saturating_add(length));
        while at < end {
            let step = (end - at).min(HOLE_MAX);
            let mut packet = Self::message("hole", index);
            packet.extend_from_slice(&at.to_be_bytes());
            packet.extend_from_slice(&step.to_be_bytes());
            self.submit(packet, 0, Vec::new())?;
            at += step;
        }
        Ok(())
    }

    fn copy(&mut self, index: u32, offset: u64, length: u64, from: Within) -> Result<(), Error> {
        let mut done = 0;
        while done < length {
            let step = (length - done).min(COPY_MAX);
            let mut packet = Self::message("copy", index);
            packet.extend_from_slice(&(offset + done).to_be_bytes());
            packet.extend_from_slice(&step.to_be_bytes());
            packet.extend_from_slice(&from.piece.to_be_bytes());
            packet.extend_from_slice(&(from.offset + done).to_be_bytes());
            self.submit(packet, 0, Vec::new())?;
            done += step;
        }
        Ok(())
    }

    fn finish(&mut self, index: u32, digest: Digest) -> Result<(), Error> {
        let mut packet = Self::message("finish", index);
        packet.extend_from_slice(&digest.0);
        self.submit(packet, 0, vec![index])
    }

    fn keep(&mut self, index: u32, digest: Digest) -> Result<(), Error> {
        let mut packet = Self::message("keep", index);
        packet.extend_from_slice(&digest.0);
        self.submit(packet, 0, vec![index])
    }

    fn discard(&mut self, index: u32) -> Result<(), Error> {
        self.submit(Self::message("discard", index), 0, Vec::new())
    }

    fn completions(&mut self, wait: bool) -> Result<Vec<Staged>, Error> {
        if wait {
            self.flush()?;
        }
        while let Ok(completion) = self.receiver.try_recv() {
            self.settle(completion)?;
        }
        while wait && self.outstanding > 0 {
            let completion = self.client.wait(&self.receiver, true)?;
            self.settle(completion)?;
        }
        Ok(std::mem::take(&mut self.done))
    }
}
