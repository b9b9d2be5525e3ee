//! Links that are not made: those of whoever is confined that would lead others on the machine out of his root, and further names of a
//! file that the rules give other permissions than the file.
//!
//! The rule is the one that a plain SFTP session goes by ([`RelPath::link_stays_below`]), and counts from the same top: the
//! root that the client is confined to, not the directory that the run is on. A link that is there already, with the same
//! target, is not made by the run, and left alone.

use std::collections::BTreeMap;

use super::audited;
use super::target::Run;
use crate::audit::{AuditLog, AuditRecord, Outcome};
use crate::endpoint::Error;
use crate::error::Escaped;
use crate::manifest::{Content, Tree};
use crate::monitor::{Event, Monitor, Problem, Severity};
use crate::path::RelPath;
use crate::plan::{Change, Plan};

/// The part of a reason that is shown of a link's target.
const SHOWN: usize = 200;

/// Where a run is below the root that its client is confined to; `None` is that root itself.
#[derive(Debug, Clone)]
pub(super) struct Confined(pub(super) Option<RelPath>);

impl Confined {
    fn allows(&self, path: &RelPath, target: &[u8]) -> bool {
        match &self.0 {
            None => path.link_stays_below(target),
            Some(above) => above.join(path.as_bytes()).is_ok_and(|path| path.link_stays_below(target)),
        }
    }
}

/// What of a plan is not made, by its index, and why.
pub(super) fn refused(confined: Option<&Confined>, source: &Tree, plan: &Plan) -> BTreeMap<u32, String> {
    let Some(confined) = confined else { return BTreeMap::new() };
    let made = plan.actions.iter().filter(|action| action.change != Change::MetadataOnly);
    let reason = |index: u32| {
        let entry = &source.entries()[index as usize];
        let Content::Symlink { target } = &entry.content else { return None };
        let shown = Escaped(&target[..target.len().min(SHOWN)]);
        (!confined.allows(&entry.path, target))
            .then(|| format!("is a link (to '{shown}') that would lead out of the root, and is not made"))
    };
    made.filter_map(|action| Some((action.index, reason(action.index)?))).collect()
}

/// The same of a run, and further names of files that are to get other permissions than the file: both are one inode, which can have
/// only one of them.
pub(super) fn refused_of(run: &Run, source: &Tree, plan: &Plan) -> Result<BTreeMap<u32, String>, Error> {
    let mut found = refused(run.confined(), source, plan);
    for action in plan.actions.iter().filter(|action| action.change != Change::MetadataOnly) {
        let entry = &source.entries()[action.index as usize];
        let Content::HardLink { first } = &entry.content else { continue };
        let Some(file) = source.get(first) else { continue };
        let (one, other) = (run.permissions(file)?, run.permissions(entry)?);
        if (one.mode, one.uid, one.gid, &one.acl) != (other.mode, other.uid, other.gid, &other.acl) {
            found.insert(action.index, other_permissions(first));
        }
    }
    Ok(found)
}

/// Why a further name of the file at `first` is not made.
pub(in crate::endpoint) fn other_permissions(first: &RelPath) -> String {
    format!(
        "is a further name of '{first}' (a hard link), and the rules there give the two different permissions; put a copy in its place, \
         or leave one out"
    )
}

/// Tells what is refused before anything is sent, where nothing will be.
pub(super) fn tell(refused: &BTreeMap<u32, String>, source: &Tree, monitor: &dyn Monitor) {
    for (&index, message) in refused {
        let path = Some(source.entries()[index as usize].path.clone());
        let problem = Problem { path, message: message.clone(), severity: Severity::Failed };
        monitor.event(Event::Problem(&problem));
    }
}

/// Has the audit log say what was refused.
pub(super) fn record(
    run: &Run,
    refused: &BTreeMap<u32, String>,
    source: &Tree,
    monitor: &dyn Monitor,
) -> Result<(), Error> {
    let line = |(&index, reason): (&u32, &String)| AuditRecord {
        action: "refuse".into(),
        actor: run.options.actor.clone(),
        source: run.options.source.clone(),
        login: run.options.login.clone(),
        result: Some(Outcome::Failure),
        path: source.entries()[index as usize].path.to_string(),
        reason: Some(reason.clone()),
        ..AuditRecord::default()
    };
    let lines: Vec<AuditRecord> = refused.iter().map(line).collect();
    if lines.is_empty() {
        return Ok(());
    }
    let told = AuditLog::open(&run.root).and_then(|mut log| log.append(&lines).map(drop));
    audited::or_continue(told, audited::UNCHANGED, monitor)
}
