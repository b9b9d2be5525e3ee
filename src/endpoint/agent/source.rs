//! The source of a pull from an agent.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use super::Lanes;
use super::reader::AgentReader;
use crate::endpoint::{Error, Reader, Scan, ScanOptions, Source};
use crate::manifest::{Digest, Tree};
use crate::monitor::{Monitor, Problem, Severity};
use crate::path::RelPath;
use crate::wire::extension::{self, Fields, WireError};

/// A source served by an agent.
pub struct AgentSource {
    lanes: Lanes,
    streams: AtomicU32,
}

impl AgentSource {
    /// A source over connections.
    pub fn new(lanes: Lanes) -> AgentSource {
        AgentSource { lanes, streams: AtomicU32::new(0) }
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

fn read_problems(raw: &[u8], problems: &mut Vec<Problem>) -> Result<(), WireError> {
    let mut fields = Fields(raw);
    while !fields.0.is_empty() {
        let path = fields.string()?;
        let path = if path.is_empty() { None } else { Some(RelPath::new(path)?) };
        let message = fields.text()?;
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
        let (mut entries, mut problems) = (Vec::new(), Vec::new());
        while entries.len() < count {
            extension::read_entries(&self.chunk(entries.len())?, &mut entries).map_err(bad)?;
        }
        while problems.len() < told {
            read_problems(&self.chunk(count)?, &mut problems).map_err(bad)?;
        }
        let tree = Tree::new(entries).map_err(|error| self.lanes.control().protocol(error.to_string()))?;
        Ok(Scan { tree, problems })
    }

    fn reader(&self, _: Arc<Tree>) -> Result<Box<dyn Reader + '_>, Error> {
        let stream = self.streams.fetch_add(1, Ordering::Relaxed);
        Ok(Box::new(AgentReader::new(self.lanes.lane(), stream, self.lanes.compress)))
    }

    /// The agent remembers for itself what it hashed.
    fn remember(&self, _: &Tree, _: &[(u32, Digest)]) {}

    fn wire_bytes(&self) -> u64 {
        let (sent, received) = self.lanes.wire_bytes();
        sent + received
    }
}
