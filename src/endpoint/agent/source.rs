//! The source of a pull from an agent.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use super::compare::compare;
use super::reader::AgentReader;
use super::{Lanes, list_bytes_max};
use crate::endpoint::delta::{Alike, Wanted};
use crate::endpoint::{Error, Links, Reader, Scan, ScanOptions, Source};
use crate::error::Escaped;
use crate::manifest::{Content, Digest, Entry, Tree};
use crate::monitor::{Monitor, Problem, Severity};
use crate::path::RelPath;
use crate::plan::trail::{self, Stop};
use crate::wire::entries::EntryList;
use crate::wire::extension::{self, Fields, PARTS, WANTS, WireError};

/// A source served by an agent.
pub struct AgentSource {
    lanes: Arc<Lanes>,
    streams: AtomicU32,
}

impl AgentSource {
    /// A source over connections.
    pub fn new(lanes: Lanes) -> AgentSource {
        AgentSource { lanes: Arc::new(lanes), streams: AtomicU32::new(0) }
    }

    /// The next chunk of the listing, from entry `from` on; after the entries come the problems.
    fn chunk(&self, from: usize) -> Result<Vec<u8>, Error> {
        let mut packet = extension::request("list");
        packet.extend_from_slice(&(from as u32).to_be_bytes());
        let reply = self.lanes.call(packet)?;
        let mut raw = Vec::new();
        Fields(&reply).frame(&mut raw).map_err(|error| self.lanes.malformed(error))?;
        if raw.is_empty() {
            return Err(self.lanes.malformed(WireError::Short));
        }
        Ok(raw)
    }
}

/// A link that was asked not to be listed: it would lead out of the tree here, whatever the server thinks of it.
fn unasked_link(entry: &Entry, links: Links) -> Option<String> {
    let Content::Symlink { target } = &entry.content else { return None };
    let asked = match links {
        Links::All => true,
        Links::Safe => entry.path.link_stays_below(target),
        Links::Skip | Links::Refuse => false,
    };
    let shown = Escaped(&target[..target.len().min(200)]);
    (!asked).then(|| format!("it lists '{}', a link to '{shown}', which it was asked to leave out", entry.path))
}

fn read_problems(raw: &[u8], problems: &mut Vec<Problem>) -> Result<(), WireError> {
    let mut fields = Fields(raw);
    while !fields.0.is_empty() {
        let path = fields.string()?;
        let path = if path.is_empty() { None } else { Some(RelPath::new(path)?) };
        let message = fields.said()?;
        let severity = if fields.u8()? == 0 { Severity::Skipped } else { Severity::Failed };
        problems.push(Problem { path, message, severity });
    }
    Ok(())
}

impl Source for AgentSource {
    fn describe(&self) -> String {
        self.lanes.describe()
    }

    fn scan(&self, options: &ScanOptions, monitor: &dyn Monitor) -> Result<Scan, Error> {
        let bad = |error| self.lanes.malformed(error);
        let reply = self.lanes.start("scan", options)?;
        let mut fields = Fields(&reply);
        let _ = self.lanes.token.set(fields.string().map_err(bad)?.to_vec());
        let (count, told) = (fields.u32().map_err(bad)? as usize, fields.u32().map_err(bad)? as usize);
        self.lanes.tell(fields, monitor)?;
        let (mut list, mut problems) = (EntryList::new(list_bytes_max()), Vec::new());
        while list.entries().len() < count {
            list.read(&self.chunk(list.entries().len())?).map_err(bad)?;
        }
        let mut bytes = list.bytes();
        while problems.len() < told {
            let raw = self.chunk(count)?;
            // About what it takes in memory.
            bytes += 4 * raw.len();
            if bytes > list_bytes_max() {
                return Err(bad(WireError::TooMany { most: list_bytes_max() }));
            }
            read_problems(&raw, &mut problems).map_err(bad)?;
        }
        if list.entries().len() != count || problems.len() != told {
            return Err(bad(WireError::Range("the length of the list")));
        }
        let entries = list.into_entries();
        if let Some(what) = entries.iter().find_map(|entry| unasked_link(entry, options.links)) {
            return Err(self.lanes.control().protocol(what));
        }
        let tree = Tree::new(entries).map_err(|error| self.lanes.control().protocol(error.to_string()))?;
        Ok(Scan { tree, problems })
    }

    fn reader(&self, tree: Arc<Tree>) -> Result<Box<dyn Reader + '_>, Error> {
        let stream = self.streams.fetch_add(1, Ordering::Relaxed);
        Ok(Box::new(AgentReader::new(&self.lanes, tree, stream)))
    }

    /// The agent remembers for itself what it hashed.
    fn remember(&self, _: &Tree, _: &[(u32, Digest)]) {}

    fn is_far(&self) -> bool {
        true
    }

    fn compares(&self) -> bool {
        [WANTS, PARTS].iter().all(|name| self.lanes.control().has(name, extension::VERSION))
    }

    fn compare(&self, index: u32, over: &AtomicBool, ask: &mut dyn FnMut(Wanted) -> Option<Alike>) {
        compare(&self.lanes, index, over, ask);
    }

    fn expect(&self, bytes: u64, files: usize) {
        self.lanes.expect(bytes, files);
    }

    fn remark(&self, monitor: &dyn Monitor) {
        self.lanes.remark(monitor);
    }

    fn trail(&self) -> Result<Vec<Stop>, Error> {
        if !self.lanes.control().has("trail@lockstep.internal", extension::VERSION) {
            return Ok(Vec::new());
        }
        let mut packet = extension::request("trail");
        extension::put_string(&mut packet, &self.lanes.root);
        let reply = self.lanes.call(packet)?;
        let text = Fields(&reply).string().map_err(|error| self.lanes.malformed(error))?;
        let wrong = |what: String| self.lanes.control().protocol(what);
        let trail: Vec<Stop> = serde_json::from_slice(text).map_err(|error| wrong(error.to_string()))?;
        trail::check(&trail).map_err(wrong)?;
        Ok(trail)
    }

    fn wire_bytes(&self) -> u64 {
        let (sent, received) = self.lanes.wire_bytes();
        sent + received
    }
}
