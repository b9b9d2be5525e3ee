//! Content from an agent: one stream, with several requests for what comes next in flight, over several connections where a large
//! file comes faster like that.
//!
//! What always holds: requests are produced in the order of their numbers, whatever they go over; every answer brings a file on, or ends the run. Pieces of a file go on where the last one ended and
//! stay within the size that was listed; an answer without a piece comes only when nothing is left to be produced.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;

use crossbeam_channel::{Receiver, Sender, unbounded};

use super::{Lanes, body};
use crate::codec::{self, CompressOptions, PLANES_NUMBER, PLANES_RATE, Way, ZSTD_RATE};
use crate::endpoint::client::{Client, Completion};
use crate::endpoint::delta::{COPY_MAX, Within};
use crate::endpoint::spread::{SPREAD_AFTER, Spread};
use crate::endpoint::{Block, Error, Fetch, Produced, Reader};
use crate::manifest::Tree;
use crate::wire::extension::{
    self, AHEAD_NEXT_MAX, COMPARES, FETCH_MAX, Fields, HAS_DIGEST, HOLE_MAX, TAKES_PLANES, TURNS, WireError,
};

/// Requests in flight on one stream.
const DEPTH: u64 = 8;
/// Of so many bundles one is asked for compressed, to see whether that pays.
const PROBE: u64 = 32;
/// Files asked for ahead.
const AHEAD: usize = 512;
/// And files of no more than so many bytes: the rest is for readers over other connections.
const AHEAD_BYTES: u64 = 64 << 20;

/// A file that was asked for.
struct Wanted {
    fetch: Fetch,
    size: u64,
    /// Where its next piece begins.
    at: u64,
    /// The first `next` that was sent after its `fetch`.
    since: u64,
}

/// The reader of one worker.
pub(super) struct AgentReader {
    spread: Spread<Client>,
    /// Whether the agent puts what several connections ask for in order.
    turns: bool,
    /// Which connection each request is out on, by its number among those of the run, and how many are on each.
    out: HashMap<u64, usize>,
    loads: HashMap<usize, u64>,
    /// Fetches that were not answered yet.
    fetching: usize,
    /// Of the file that is read, what has come.
    come: u64,
    tree: Arc<Tree>,
    stream: u32,
    compress: CompressOptions,
    /// Whether the agent is asked for byte planes.
    planes: bool,
    /// What the last probe was compressed to, as a fraction.
    ratio: f64,
    /// Bytes a second that the other end is taken to compress, by what the probe was coded in.
    rate: f64,
    sender: Sender<Completion>,
    receiver: Receiver<Completion>,
    waiting: Vec<Fetch>,
    wanted: HashMap<u32, Wanted>,
    /// What of those is still to come.
    ahead: u64,
    asked: u64,
    given: u64,
    early: BTreeMap<u64, Vec<u8>>,
    ready: VecDeque<Produced>,
}

impl AgentReader {
    pub(super) fn new(lanes: &Arc<Lanes>, tree: Arc<Tree>, stream: u32) -> Self {
        let (sender, receiver) = unbounded();
        let (compress, planes) = (lanes.compress, lanes.planes());
        AgentReader {
            spread: Spread::new(&lanes.pool),
            turns: lanes.control().has(TURNS, extension::VERSION),
            out: HashMap::new(),
            loads: HashMap::new(),
            fetching: 0,
            come: 0,
            tree,
            stream,
            compress,
            planes,
            ratio: 1.0,
            rate: ZSTD_RATE,
            sender,
            receiver,
            waiting: Vec::new(),
            wanted: HashMap::new(),
            ahead: 0,
            asked: 0,
            given: 0,
            early: BTreeMap::new(),
            ready: VecDeque::new(),
        }
    }

    fn client(&self) -> &Client {
        self.spread.own()
    }

    /// Nobody here knows what the other side's processors do.
    fn way(&self) -> Way {
        Way { link_rate: self.spread.rate(), idle_processors: None }
    }

    /// The level to ask for the next bundle in.
    fn level(&self) -> u8 {
        let way = self.way();
        let level = match self.compress {
            CompressOptions { enabled: false, .. } => 0,
            CompressOptions { level: Some(level), .. } => level.clamp(0, 19) as u8,
            _ if self.asked.is_multiple_of(PROBE) => 1,
            _ if self.ratio >= 0.95 || !codec::pays(self.ratio, self.rate, way) => 0,
            // The level says nothing of planes.
            _ => way.link_rate.map_or(1, |rate| codec::level_elsewhere(self.ratio, rate)).clamp(1, 19) as u8,
        };
        if self.planes && level > 0 { level | TAKES_PLANES } else { level }
    }

    fn send_fetches(&mut self) -> Result<(), Error> {
        for fetches in self.waiting.chunks(FETCH_MAX) {
            let mut packet = extension::request("fetch");
            packet.extend_from_slice(&self.stream.to_be_bytes());
            packet.extend_from_slice(&(fetches.len() as u32).to_be_bytes());
            for fetch in fetches {
                if let Some(wanted) = self.wanted.get_mut(&fetch.index) {
                    wanted.since = self.asked;
                }
                packet.extend_from_slice(&fetch.index.to_be_bytes());
                packet.extend_from_slice(&fetch.from.to_be_bytes());
                let has_digest = if fetch.unless.is_some() { HAS_DIGEST } else { 0 };
                packet.push(has_digest | if fetch.compare { COMPARES } else { 0 });
                packet.extend(fetch.unless.iter().flat_map(|digest| digest.0));
            }
            self.spread.own().submit(packet, 0, u64::MAX, &self.sender)?;
            self.fetching += 1;
        }
        self.waiting.clear();
        Ok(())
    }

    /// Asks for what comes next, as far ahead as is worth it.
    fn ask(&mut self) -> Result<(), Error> {
        // Over another connection it might be asked for before the agent knows of which file.
        let spreads = self.turns && self.fetching == 0;
        if spreads && self.come > SPREAD_AFTER {
            self.spread.consider();
        }
        loop {
            let over = if spreads { self.spread.width() } else { 1 };
            let most = (DEPTH * over as u64).min(AHEAD_NEXT_MAX as u64);
            let load = |at: &usize| self.loads.get(&self.spread.number(*at)).copied().unwrap_or(0);
            let lives = |at: &usize| *at == 0 || !self.spread.get(*at).is_dead();
            let lightest = (0..over).filter(lives).min_by_key(load).unwrap_or(0);
            if load(&lightest) >= DEPTH || self.asked - self.given >= most {
                return Ok(());
            }
            let mut packet = extension::request("next");
            packet.extend_from_slice(&self.stream.to_be_bytes());
            packet.push(self.level());
            if self.turns {
                packet.extend_from_slice(&self.asked.to_be_bytes());
            }
            self.spread.get(lightest).submit(packet, 0, self.asked, &self.sender)?;
            let number = self.spread.number(lightest);
            self.out.insert(self.asked, number);
            *self.loads.entry(number).or_default() += 1;
            self.asked += 1;
        }
    }

    /// Waits for the next bundle in order.
    fn bundle(&mut self) -> Result<Vec<u8>, Error> {
        loop {
            if let Some(raw) = self.early.remove(&self.given) {
                // Requests of a stream are handled in order: what was fetched before this one has to come.
                if raw.is_empty() && self.wanted.values().any(|wanted| wanted.since <= self.given) {
                    return Err(self.client().protocol("it produces nothing of what it was asked for"));
                }
                self.given += 1;
                return Ok(raw);
            }
            let completion = self.client().wait(&self.receiver, true)?;
            let answer = completion.answer.map_err(|lost| self.client().lost(lost))?;
            let reply = body(self.client(), answer)?;
            if completion.tag == u64::MAX {
                self.fetching -= 1;
            } else {
                let load = self.out.remove(&completion.tag).and_then(|number| self.loads.get_mut(&number));
                load.into_iter().for_each(|load| *load -= 1);
                let mut raw = Vec::new();
                Fields(&reply).frame(&mut raw).map_err(|error| self.client().protocol(error.to_string()))?;
                if completion.tag.is_multiple_of(PROBE) && !raw.is_empty() {
                    self.ratio = reply.len() as f64 / raw.len() as f64;
                    self.rate = if reply.first() == Some(&PLANES_NUMBER) { PLANES_RATE } else { ZSTD_RATE };
                }
                self.early.insert(completion.tag, raw);
            }
        }
    }

    fn read(&mut self, raw: &[u8]) -> Result<(), WireError> {
        let mut fields = Fields(raw);
        while !fields.0.is_empty() {
            let (kind, index) = (fields.u8()?, fields.u32()?);
            let wanted = self.wanted.get_mut(&index).ok_or(WireError::Range("the index of a file"))?;
            let produced = match kind {
                0 => {
                    let (digest, data) = (fields.digest()?, fields.string()?);
                    if wanted.at != 0 || data.len() as u64 != wanted.size {
                        return Err(WireError::Range("the length of a file"));
                    }
                    Produced::Whole { index, block: Block::copy_of(data), digest }
                }
                1 => {
                    let (offset, data) = (fields.u64()?, fields.string()?);
                    wanted.advance(offset, data.len() as u64)?;
                    self.come += data.len() as u64;
                    self.ahead = self.ahead.saturating_sub(data.len() as u64);
                    Produced::Data { index, offset, block: Block::copy_of(data) }
                }
                2 => {
                    let (offset, length) = (fields.u64()?, fields.u64()?);
                    if length > HOLE_MAX {
                        return Err(WireError::Range("the length of a hole"));
                    }
                    wanted.advance(offset, length)?;
                    self.ahead = self.ahead.saturating_sub(length);
                    Produced::Hole { index, offset, length }
                }
                3 if wanted.at != wanted.size => return Err(WireError::Range("the end of a file")),
                3 => Produced::End { index, digest: fields.digest()? },
                4 => {
                    let digest = fields.digest()?;
                    if wanted.fetch.unless != Some(digest) {
                        return Err(WireError::Range("the digest of a file that is said to be the same"));
                    }
                    Produced::Same { index, digest }
                }
                6 if wanted.fetch.compare => {
                    let (offset, length) = (fields.u64()?, fields.u64()?);
                    let from = Within { piece: fields.u32()?, offset: fields.u64()? };
                    if length > COPY_MAX {
                        return Err(WireError::Range("the length of a copy"));
                    }
                    wanted.advance(offset, length)?;
                    self.ahead = self.ahead.saturating_sub(length);
                    Produced::Copy { index, offset, length, from }
                }
                5 => {
                    let retry = fields.u8()? != 0;
                    Produced::Failed { index, message: fields.said()?, retry }
                }
                _ => return Err(WireError::Range("the kind of a piece")),
            };
            if !matches!(kind, 1 | 6) {
                self.come = 0;
                self.spread.begin();
            }
            if !matches!(kind, 1 | 2 | 6)
                && let Some(wanted) = self.wanted.remove(&index)
            {
                self.ahead = self.ahead.saturating_sub(wanted.size.saturating_sub(wanted.at));
            }
            self.ready.push_back(produced);
        }
        Ok(())
    }
}

impl Wanted {
    fn advance(&mut self, offset: u64, length: u64) -> Result<(), WireError> {
        match offset.checked_add(length) {
            Some(end) if offset == self.at && length > 0 && end <= self.size => self.at = end,
            _ => return Err(WireError::Range("the place of a piece")),
        }
        Ok(())
    }
}

impl Reader for AgentReader {
    fn wants_more(&self) -> bool {
        self.wanted.len() < AHEAD && self.ahead < AHEAD_BYTES
    }

    fn push(&mut self, fetch: Fetch) {
        let size =
            self.tree.entries().get(fetch.index as usize).and_then(|entry| entry.file()).map_or(0, |file| file.0);
        let (at, since) = (fetch.from, u64::MAX);
        self.ahead += size.saturating_sub(at);
        self.wanted.insert(fetch.index, Wanted { fetch, size, at, since });
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
            self.ask()?;
            let raw = self.bundle()?;
            self.read(&raw).map_err(|error| self.client().protocol(error.to_string()))?;
        }
    }
}
