//! The target of a push to an agent.

use std::sync::Arc;

use super::writer::AgentWriter;
use super::{Lanes, json, list_bytes_max};
use crate::endpoint::delta::{Alike, Wanted};
use crate::endpoint::{BeginOptions, CommitOptions, Committed, Error, Target, Writer};
use crate::error::said;
use crate::manifest::{Digest, Tree};
use crate::monitor::Monitor;
use crate::plan::{Plan, Removal};
use crate::wire::alike::{put_wanted, read_alike};
use crate::wire::extension::{self, CHUNK_BYTES, Fields, WireError};

/// More files that failed are not named to a target: their numbers would not be one message.
const FAILED_MAX: usize = 100_000;

/// A target served by an agent.
pub struct AgentTarget {
    lanes: Arc<Lanes>,
}

impl AgentTarget {
    /// A target over connections.
    pub fn new(lanes: Lanes) -> AgentTarget {
        AgentTarget { lanes: Arc::new(lanes) }
    }

    fn send_entries(&self, source: &Tree) -> Result<(), Error> {
        let client = self.lanes.control();
        let (sender, receiver) = crossbeam_channel::unbounded();
        let (mut raw, mut sent) = (Vec::new(), 0);
        let mut flush = |raw: &mut Vec<u8>| {
            let mut packet = extension::request("entries");
            extension::put_frame(&mut packet, raw, Some(1));
            raw.clear();
            sent += 1;
            client.submit(packet, 0, 0, &sender)
        };
        for entry in source.entries() {
            extension::put_entry(&mut raw, entry);
            if raw.len() >= CHUNK_BYTES {
                flush(&mut raw)?;
            }
        }
        flush(&mut raw)?;
        for _ in 0..sent {
            let answer = client.wait(&receiver, false)?.answer.map_err(|lost| client.lost(lost))?;
            super::body(client, answer)?;
        }
        Ok(())
    }

    fn read_plan(&self, entries: usize, monitor: &dyn Monitor) -> Result<Plan, Error> {
        let reply = self.lanes.call(extension::request("diff"))?;
        let bad = |error| self.lanes.malformed(error);
        let mut fields = Fields(&reply);
        let mut plan = Plan { target_entries: fields.u64().map_err(bad)?, ..Plan::default() };
        let actions = fields.u32().map_err(bad)? as usize;
        let removals = fields.u32().map_err(bad)? as usize;
        self.lanes.tell(fields, monitor)?;
        let mut bytes = 0;
        while plan.actions.len() < actions || plan.removals.len() < removals {
            let mut packet = extension::request("plan");
            packet.extend_from_slice(&(plan.actions.len() as u32).to_be_bytes());
            packet.extend_from_slice(&(plan.removals.len() as u32).to_be_bytes());
            let reply = self.lanes.call(packet)?;
            bytes += read_chunk(&reply, &mut plan, entries).map_err(bad)?;
            if bytes > list_bytes_max() {
                return Err(bad(WireError::TooMany { most: list_bytes_max() }));
            }
        }
        if plan.actions.len() != actions || plan.removals.len() != removals {
            return Err(bad(WireError::Range("the length of the plan")));
        }
        Ok(plan)
    }
}

/// Adds a part of a plan; about how much memory it takes.
fn read_chunk(reply: &[u8], plan: &mut Plan, entries: usize) -> Result<usize, WireError> {
    let mut fields = Fields(reply);
    let (actions, removals) = (fields.u32()?, fields.u32()?);
    let mut raw = Vec::new();
    fields.frame(&mut raw)?;
    let mut fields = Fields(&raw);
    for _ in 0..actions {
        let (action, alike) = extension::read_action(&mut fields)?;
        let ascends = plan.actions.last().is_none_or(|last| last.index < action.index);
        if action.index as usize >= entries || !ascends {
            return Err(WireError::Range("the index of an action"));
        }
        if alike {
            plan.alike.push(action.index);
        }
        plan.actions.push(action);
    }
    for _ in 0..removals {
        let removal = extension::read_removal(&mut fields)?;
        if plan.removals.last().is_some_and(|last| last.path >= removal.path) {
            return Err(WireError::Order { path: removal.path.to_string() });
        }
        plan.removals.push(removal);
    }
    if actions == 0 && removals == 0 {
        return Err(WireError::Range("the length of the plan"));
    }
    fields.end()?;
    Ok(raw.len() + removals as usize * size_of::<Removal>())
}

impl Target for AgentTarget {
    fn describe(&self) -> String {
        self.lanes.describe()
    }

    fn begin(&self, options: &BeginOptions, monitor: &dyn Monitor) -> Result<(), Error> {
        let needs_trash = options.trash_seconds.is_some();
        if needs_trash && !self.lanes.control().has(extension::TRASH, extension::VERSION) {
            let reason = "the lockstep there is too old to have a trash, and would remove for good what is to be kept; \
                          install this version there";
            return Err(Error::Refused { by: self.describe(), reason: reason.into() });
        }
        // Who lacks one of the two, or may not use it, is sent everything.
        let has = |name| self.lanes.control().has(name, extension::VERSION);
        let knows = has(extension::ALIKE) && has(extension::COPY);
        let options = &BeginOptions { delta: options.delta && knows, ..options.clone() };
        let reply = self.lanes.start("begin", options)?;
        let bad = |error| self.lanes.malformed(error);
        let mut fields = Fields(&reply);
        let _ = self.lanes.token.set(fields.string().map_err(bad)?.to_vec());
        let _verification = fields.string().map_err(bad)?;
        self.lanes.tell(fields, monitor)
    }

    fn diff(&self, source: &Arc<Tree>, monitor: &dyn Monitor) -> Result<Plan, Error> {
        self.send_entries(source)?;
        self.read_plan(source.entries().len(), monitor)
    }

    fn writer(&self) -> Result<Box<dyn Writer + '_>, Error> {
        Ok(Box::new(AgentWriter::new(&self.lanes)))
    }

    fn commit(&self, options: &CommitOptions, monitor: &dyn Monitor) -> Result<Committed, Error> {
        let takes_away = !options.retire.is_empty() || !options.spare.is_empty();
        if takes_away && !self.lanes.control().has(extension::TRASH, extension::VERSION) {
            let reason = "the lockstep there is too old to keep only some units; install this version there";
            return Err(Error::Refused { by: self.describe(), reason: reason.into() });
        }
        let mut packet = extension::request("commit");
        // What nobody staged is not published, also where it is not said that it failed.
        let mut options = options.clone();
        if options.failed.len() > FAILED_MAX {
            options.failed.clear();
        }
        extension::put_string(&mut packet, &json(&options)?);
        self.lanes.fits(&packet)?;
        let reply = self.lanes.call(packet)?;
        let mut fields = Fields(&reply);
        let text = fields.string().map_err(|error| self.lanes.malformed(error))?;
        // What was published is not undone by notes that cannot be read.
        let _ = self.lanes.tell(fields, monitor);
        let committed: Committed =
            serde_json::from_slice(text).map_err(|error| self.lanes.control().protocol(error.to_string()))?;
        if Digest::from_hex(committed.manifest_digest.as_bytes()).is_none() {
            return Err(self.lanes.malformed(WireError::Range("the digest of the manifest")));
        }
        let safe = |(path, reason): &(String, String)| (said(path.as_bytes()), said(reason.as_bytes()));
        let problems = committed.problems.iter().map(safe).collect();
        let trash = committed.trash.as_ref().map(|trash| said(trash.as_bytes()));
        let put_off = committed.put_off.iter().map(safe).collect();
        let retired = committed.retired.iter().map(|path| said(path.as_bytes())).collect();
        Ok(Committed { problems, trash, put_off, retired, ..committed })
    }

    fn abort(&self) {
        // The agent aborts by itself when the connection ends.
        let _ = self.lanes.call(extension::request("abort"));
    }

    fn verification(&self) -> String {
        "SHA-256 computed by the receiving lockstep".to_owned()
    }

    fn stages_early(&self) -> bool {
        true
    }

    fn is_far(&self) -> bool {
        true
    }

    fn expect(&self, bytes: u64, files: usize) {
        self.lanes.expect(bytes, files);
    }

    fn remark(&self, monitor: &dyn Monitor) {
        self.lanes.remark(monitor);
    }

    fn alike(&self, index: u32, wanted: Wanted) -> Result<Option<Alike>, Error> {
        let mut packet = extension::request("alike");
        packet.extend_from_slice(&index.to_be_bytes());
        put_wanted(&mut packet, &wanted);
        let reply = self.lanes.call(packet)?;
        read_alike(Fields(&reply), wanted.from.offset).map_err(|error| self.lanes.malformed(error))
    }

    fn wire_bytes(&self) -> u64 {
        let (sent, received) = self.lanes.wire_bytes();
        sent + received
    }
}
