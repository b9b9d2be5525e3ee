//! What the audit log is told of a run that publishes: before anything is seen that it will be, and afterwards what was.
//!
//! What always holds: unless `[audit] on_failure` says otherwise, no name is given before the log has taken the announcement,
//! and room for what it announces.

use std::collections::HashSet;
use std::io;

use super::area::Area;
use super::changes::Changes;
use super::publish::Record;
use super::put::Put;
use super::trash::Trash;
use crate::audit::{AuditError, AuditLog, AuditRecord, Before, OnFailure, Outcome, settings};
use crate::endpoint::Error;
use crate::error::{chain, counted, in_words};
use crate::monitor::{Event, Monitor, Silent};
use crate::path::RelPath;
use crate::plan::publish::Step;
use crate::root::Root;

/// What is said when the log could not be written before anything was changed.
pub(super) const UNCHANGED: &str =
    "nothing was changed, since what cannot be recorded is not done; mend it, or see [audit] on_failure";
/// The same when it could be written before, and not any more.
const UNTOLD: &str = "what was published is to be seen and not recorded yet; mend it and run again, which does both";

/// What a log that cannot be written means for a run: its end, or a warning. `so` says how things are.
pub(super) fn or_continue(
    result: Result<(), AuditError>,
    so: &'static str,
    monitor: &dyn Monitor,
) -> Result<(), Error> {
    let Err(error) = result else { return Ok(()) };
    if settings().on_failure == OnFailure::Continue {
        let message = format!("the audit log cannot be written, and has a gap: {}", chain(&error));
        tracing::warn!("{message}");
        monitor.event(Event::Warning(&message));
        return Ok(());
    }
    Err(match error.io().zip(error.path()) {
        Some((source, path)) => {
            let source = io::Error::new(source.kind(), format!("{}; {so}", in_words(source)));
            Error::Io { operation: "write the audit log", path, source }
        }
        None => Error::Refused { by: "the audit log".into(), reason: format!("{}; {so}", chain(&error)) },
    })
}

/// Who does it, from where, and what manifest comes of it.
fn base(area: Area, record: &Record, changes: &Changes<'_>) -> AuditRecord {
    AuditRecord {
        actor: record.actor.clone(),
        source: record.source.clone(),
        login: record.login.clone(),
        generation: (area == Area::Run).then_some(changes.generation),
        ..AuditRecord::default()
    }
}

/// Says in the log what is about to be done, and takes room there for what will be said of it.
pub(super) fn announce(
    root: &Root,
    area: Area,
    record: &Record,
    changes: &Changes<'_>,
    monitor: &dyn Monitor,
) -> Result<(), Error> {
    let base = base(area, record, changes);
    let own = [&base.actor, &base.source].map(|text| text.len() as u64).iter().sum::<u64>()
        + base.login.as_ref().map_or(0, |_| 400);
    let (mut lines, mut bytes) = (0, 0);
    // A line for each path, one for what goes to the trash and one for what is not granted.
    for path in changes.put.paths() {
        lines += 1;
        bytes += own + path.as_bytes().len() as u64;
    }
    for step in &record.steps {
        lines += 1;
        bytes += own + step.path().as_bytes().len() as u64 * if record.trash.is_some() { 3 } else { 1 };
    }
    let notes = record.withheld.iter().chain(&record.acls);
    bytes += notes.map(|(path, note)| own + (path.as_bytes().len() + note.len()) as u64).sum::<u64>();
    lines += record.withheld.len() as u64;
    let what = if area == Area::Repair { "repair" } else { "publish" };
    let steps = counted(record.steps.len() as u64, "step", "steps");
    let reason = Some(format!("to {what} in {steps}"));
    let intent = AuditRecord { action: "intent".into(), reason, ..base };
    let announced = AuditLog::open(root).and_then(|mut log| log.announce(intent, lines, bytes));
    or_continue(announced, UNCHANGED, monitor)
}

/// Tells what was done. A run that was interrupted between this and its end tells it once more when it is finished.
pub(super) fn tell(
    root: &Root,
    area: Area,
    record: &Record,
    changes: &Changes<'_>,
    problems: &[(RelPath, String)],
) -> Result<(), Error> {
    let base = base(area, record, changes);
    let failed: HashSet<&RelPath> = problems.iter().map(|(path, _)| path).collect();
    let trash = record.trash.as_ref().map(|name| Trash::new(root, name)).transpose()?;
    let steps = record.steps.iter().filter(|step| !failed.contains(step.path()));
    let records = steps.flat_map(|step| {
        let kept = trash.as_ref().and_then(|trash| trashed(step, trash, record, &base));
        kept.into_iter().map(Ok).chain(records(step, area, record, &changes.put, &base))
    });
    let mut made = Ok(());
    let records = records.map_while(|record| record.map_err(|error| made = Err(error)).ok());
    let told = AuditLog::reopen(root).and_then(|mut log| log.append_last(records).map(drop));
    or_continue(told, UNTOLD, &Silent::default())?;
    made
}

/// What the audit log is told of what a step has moved to the trash.
fn trashed(step: &Step, trash: &Trash<'_>, record: &Record, base: &AuditRecord) -> Option<AuditRecord> {
    // A directory of that name is there for what was in one that stays.
    let stays = matches!(step, Step::ApplyMetadata(_) | Step::NewDirectory(_));
    let place = trash.place(step.path()).ok().filter(|_| !stays && trash.holds(step.path()))?;
    let reason = Some(format!("moved to trash: {place}"));
    let (path, before) = (step.path().to_string(), before(record, step.path()));
    Some(AuditRecord { action: "trash".into(), path, reason, before, result: Some(Outcome::Success), ..base.clone() })
}

fn before(record: &Record, path: &RelPath) -> Option<Before> {
    let mut words = record.before.get(path)?.splitn(3, '\t').map(str::to_owned);
    Some(Before { mode: words.next()?, owner: words.next()?, group: words.next()? })
}

/// What the audit log is told of a step.
fn records<'a>(
    step: &'a Step,
    area: Area,
    record: &'a Record,
    put: &'a Put<'_>,
    base: &'a AuditRecord,
) -> Box<dyn Iterator<Item = Result<AuditRecord, Error>> + 'a> {
    let action = match step {
        // It was told what became of it.
        Step::RemoveFile(_) | Step::RemoveDirectory(_) | Step::TakeAway(_) if record.trash.is_some() => {
            return Box::new(std::iter::empty());
        }
        Step::RemoveFile(_) | Step::RemoveDirectory(_) | Step::TakeAway(_) => {
            let (path, before) = (step.path().to_string(), before(record, step.path()));
            let result = Some(Outcome::Success);
            let removed = AuditRecord { action: "remove".into(), path, before, result, ..base.clone() };
            return Box::new(std::iter::once(Ok(removed)));
        }
        _ if area == Area::Repair => "repair",
        Step::ApplyMetadata(_) => "metadata",
        Step::Replace(_) | Step::NewDirectory(_) | Step::Exchange(_) => "publish",
    };
    let whole = matches!(step, Step::NewDirectory(_) | Step::Exchange(_));
    let within = put.within(step.path()).take(if whole { usize::MAX } else { 1 });
    Box::new(within.flat_map(move |item| {
        let entry = match item {
            Ok((entry, _)) => entry,
            Err(error) => return vec![Err(error)],
        };
        let acl = record.acls.get(&entry.path).cloned();
        let given = AuditRecord { acl, before: before(record, &entry.path), ..base.of_entry(action, &entry) };
        let withheld = record.withheld.get(&entry.path).map(|what| AuditRecord {
            action: "refuse".into(),
            path: entry.path.to_string(),
            result: Some(Outcome::Failure),
            reason: Some(format!("not given: {what}; the policy here does not grant it")),
            ..base.clone()
        });
        std::iter::once(given).chain(withheld).map(Ok).collect()
    }))
}
