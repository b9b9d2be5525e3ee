//! Content from an agent: one stream, with several requests for what comes next in flight.

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::sync::Arc;

use crossbeam_channel::{Receiver, Sender, unbounded};

use super::body;
use crate::codec::{self, CompressOptions};
use crate::endpoint::client::{Client, Completion};
use crate::endpoint::{Block, Error, Fetch, Produced, Reader};
use crate::wire::extension::{self, FILES_MAX, Fields, WireError};

/// Requests in flight on one stream.
const DEPTH: u64 = 8;
/// Of so many bundles one is asked for compressed, to see whether that pays.
const PROBE: u64 = 32;
/// Bytes a second that the other end is taken to compress.
const COMPRESS_RATE: f64 = 400e6;
/// Files asked for ahead.
const AHEAD: usize = 512;

/// The reader of one worker.
pub(super) struct AgentReader {
    client: Arc<Client>,
    stream: u32,
    compress: CompressOptions,
    /// What the last probe was compressed to, as a fraction.
    ratio: f64,
    sender: Sender<Completion>,
    receiver: Receiver<Completion>,
    waiting: Vec<Fetch>,
    wanted: HashSet<u32>,
    asked: u64,
    given: u64,
    early: BTreeMap<u64, Vec<u8>>,
    ready: VecDeque<Produced>,
}

impl AgentReader {
    pub(super) fn new(client: Arc<Client>, stream: u32, compress: CompressOptions) -> Self {
        let (sender, receiver) = unbounded();
        AgentReader {
            client,
            stream,
            compress,
            ratio: 1.0,
            sender,
            receiver,
            waiting: Vec::new(),
            wanted: HashSet::new(),
            asked: 0,
            given: 0,
            early: BTreeMap::new(),
            ready: VecDeque::new(),
        }
    }

    /// The level to ask for the next bundle in.
    fn level(&self) -> u8 {
        match self.compress {
            CompressOptions { enabled: false, .. } => 0,
            CompressOptions { level: Some(level), .. } => level.clamp(0, 19) as u8,
            _ if self.asked.is_multiple_of(PROBE) => 1,
            _ => u8::from(self.ratio < 0.95 && codec::pays(self.ratio, COMPRESS_RATE, self.client.link_rate())),
        }
    }

    fn send_fetches(&mut self) -> Result<(), Error> {
        for fetches in self.waiting.chunks(FILES_MAX) {
            let mut packet = extension::request("fetch");
            packet.extend_from_slice(&self.stream.to_be_bytes());
            packet.extend_from_slice(&(fetches.len() as u32).to_be_bytes());
            for fetch in fetches {
                packet.extend_from_slice(&fetch.index.to_be_bytes());
                packet.extend_from_slice(&fetch.from.to_be_bytes());
                packet.push(u8::from(fetch.unless.is_some()));
                packet.extend(fetch.unless.iter().flat_map(|digest| digest.0));
            }
            self.client.submit(packet, 0, u64::MAX, &self.sender)?;
        }
        self.waiting.clear();
        Ok(())
    }

    /// Waits for the next bundle in order.
    fn bundle(&mut self) -> Result<Vec<u8>, Error> {
        loop {
            if let Some(raw) = self.early.remove(&self.given) {
                self.given += 1;
                return Ok(raw);
            }
            let completion = self.client.wait(&self.receiver, true)?;
            let answer = completion.answer.map_err(|lost| self.client.lost(lost))?;
            let reply = body(&self.client, answer)?;
            if completion.tag != u64::MAX {
                let mut raw = Vec::new();
                Fields(&reply).frame(&mut raw).map_err(|error| self.client.protocol(error.to_string()))?;
                if completion.tag.is_multiple_of(PROBE) && !raw.is_empty() {
                    self.ratio = reply.len() as f64 / raw.len() as f64;
                }
                self.early.insert(completion.tag, raw);
            }
        }
    }

    fn read(&mut self, raw: &[u8]) -> Result<(), WireError> {
        let mut fields = Fields(raw);
        while !fields.0.is_empty() {
            let (kind, index) = (fields.u8()?, fields.u32()?);
            if !self.wanted.contains(&index) {
                return Err(WireError::Range("the index of a file"));
            }
            let produced = match kind {
                0 => {
                    let digest = fields.digest()?;
                    Produced::Whole { index, block: Block::copy_of(fields.string()?), digest }
                }
                1 => {
                    let offset = fields.u64()?;
                    Produced::Data { index, offset, block: Block::copy_of(fields.string()?) }
                }
                2 => Produced::Hole { index, offset: fields.u64()?, length: fields.u64()? },
                3 => Produced::End { index, digest: fields.digest()? },
                4 => Produced::Same { index, digest: fields.digest()? },
                5 => {
                    let retry = fields.u8()? != 0;
                    Produced::Failed { index, message: fields.text()?, retry }
                }
                _ => return Err(WireError::Range("the kind of a piece")),
            };
            if !matches!(kind, 1 | 2) {
                self.wanted.remove(&index);
            }
            self.ready.push_back(produced);
        }
        Ok(())
    }
}

impl Reader for AgentReader {
    fn wants_more(&self) -> bool {
        self.wanted.len() < AHEAD
    }

    fn push(&mut self, fetch: Fetch) {
        self.wanted.insert(fetch.index);
        self.waiting.push(fetch);
    }

    fn next(&mut self) -> Result<Option<Produced>, Error> {
        loop {
            if let Some(produced) = self.ready.pop_front() {
                return Ok(Some(produced));
            }
            if self.wanted.is_empty() {
                return Ok(None);
            }
            self.send_fetches()?;
            while self.asked - self.given < DEPTH {
                let mut packet = extension::request("next");
                packet.extend_from_slice(&self.stream.to_be_bytes());
                packet.push(self.level());
                self.client.submit(packet, 0, self.asked, &self.sender)?;
                self.asked += 1;
            }
            let raw = self.bundle()?;
            self.read(&raw).map_err(|error| self.client.protocol(error.to_string()))?;
        }
    }
}
