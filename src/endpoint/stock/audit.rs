//! The record of what was published, appended to `.lockstep/audit.jsonl` of the target.
//!
//! It is written by the account that publishes, over the same session: whoever has that account can write it anew, and
//! shows only by a head that is kept elsewhere (`docs/security.md`).

use std::collections::HashSet;

use super::read::{Piece, ReadQueue, Wanted, read_whole};
use super::session::{self, Reply, about, extended, with_attributes};
use super::stage::store;
use super::target::{Run, STATE, State};
use super::trash::Trash;
use super::{REGULAR, at, kind_of};
use crate::audit::{
    AuditRecord, Before, HEAD, Head, LOG, OnFailure, Outcome, TAIL_BYTES, head_of, lines, settings, signed_head,
};
use crate::endpoint::Error;
use crate::error::{chain, counted};
use crate::manifest::Manifest;
use crate::path::RelPath;
use crate::plan::Change;
use crate::wire::sftp::{Attributes, open, packet};

/// Says what is about to be done, before anything can be seen of it. Room for what will be said of it cannot be taken by SFTP.
///
/// # Errors
/// When it cannot be written, or the log's end has been tampered with: nothing has changed then.
pub(super) fn announce(run: &Run, generation: u64, steps: usize) -> Result<(), Error> {
    let reason = Some(format!("to publish in {}", counted(steps as u64, "step", "steps")));
    let intent = AuditRecord { action: "intent".into(), reason, generation: Some(generation), ..base(run) };
    or_continue(put(run, std::iter::once(intent), false))
}

/// Appends one line for each path that was published or removed, and signs the log where there is a key.
///
/// # Errors
/// When it cannot be written, or its end has been tampered with. The run is not complete then.
pub(super) fn append(
    run: &Run,
    state: &State,
    published: &HashSet<u32>,
    removed: &[&RelPath],
    manifest: &Manifest,
    trash: Option<&Trash<'_>>,
) -> Result<(), Error> {
    let mut records = records(run, state, published, removed, manifest, trash).peekable();
    if records.peek().is_none() {
        return Ok(());
    }
    or_continue(put(run, records, true))
}

/// What a log that cannot be written means: a connection that is gone ends the run in any case.
fn or_continue(result: Result<(), Error>) -> Result<(), Error> {
    match result {
        Err(error @ (Error::Io { .. } | Error::Refused { .. })) if settings().on_failure == OnFailure::Continue => {
            tracing::warn!(error = chain(&error), "the audit log cannot be written, and has a gap");
            Ok(())
        }
        result => result,
    }
}

fn base(run: &Run) -> AuditRecord {
    let (actor, source) = (run.options.actor.clone(), run.options.source.clone());
    AuditRecord { actor, source, ..AuditRecord::default() }
}

fn put(run: &Run, records: impl Iterator<Item = AuditRecord>, last: bool) -> Result<(), Error> {
    let session = &run.session;
    let path = at(&run.root, LOG);
    let (head, end) = end_of(run)?;
    let broken = |error: serde_json::Error| Error::Usage(error.to_string());
    let (mut text, mut head) = lines(head, records).map_err(broken)?;
    if let Some(signing) = settings().signing.as_ref().filter(|_| last) {
        let signed = signed_head(&signing.key, head).map_err(|error| Error::Usage(chain(&error)))?;
        let (line, after) = lines(head, [signed]).map_err(broken)?;
        text.extend(line);
        head = after;
    }
    let handle = match session.call(session::open(&path, open::WRITE | open::CREATE))? {
        Reply::Handle(handle) => handle,
        Reply::Refused(refusal) => return Err(session.refused("open", &path, &refusal)),
        _ => return Err(session.odd()),
    };
    // What a crash left of an unfinished line, behind `end`, is dropped; the lock keeps others away.
    let cut = Attributes { size: Some(end), ..Attributes::default() };
    let chunk = session.write_max as usize;
    let writes = text.chunks(chunk).enumerate();
    let mut requests = vec![with_attributes(packet::FSETSTAT, &handle, &cut)];
    requests.extend(writes.map(|(number, bytes)| session::write(&handle, end + (number * chunk) as u64, bytes)));
    if session.offers.fsync {
        requests.push(extended("fsync@openssh.com", &[&handle]));
    }
    requests.push(about(packet::CLOSE, &handle));
    if let Some(refusal) = session.all(requests)?.into_iter().find_map(Result::err) {
        return Err(session.refused("write", &path, &refusal));
    }
    // DURABILITY: written after the lines; after a crash between the two the head is behind, which is no fault.
    let name = HEAD.rsplit('/').next().unwrap_or(HEAD);
    store(session, &at(&run.root, STATE), name, head.encode().as_bytes())
}

/// The head of the log as it is, and where its next line goes.
fn end_of(run: &Run) -> Result<(Head, u64), Error> {
    let session = &run.session;
    let path = at(&run.root, LOG);
    let broken = |what: &str| Error::Refused {
        by: format!("the audit log of {}", session.client.host()),
        reason: format!("{what}; keep the file as it is and find out who changed it"),
    };
    let size = match session.stat(packet::LSTAT, &path)? {
        Ok(found) if kind_of(&found) == Some(REGULAR) => found.size.unwrap_or_default(),
        Ok(_) => return Err(broken("it is not a regular file")),
        Err(refusal) if refusal.is_missing() => 0,
        Err(refusal) => return Err(session.refused("look at", &path, &refusal)),
    };
    let start = size.saturating_sub(TAIL_BYTES);
    let mut tail = Vec::new();
    if size > 0 {
        let mut queue = ReadQueue::new(run.session.clone());
        queue.push(Wanted { id: 0, path: path.clone(), from: start, size });
        while let Some(piece) = queue.next()? {
            match piece {
                Piece::Data { data, .. } => tail.extend_from_slice(&data),
                Piece::End { .. } => {}
                Piece::Failed { why: Err(refusal), .. } => return Err(session.refused("read", &path, &refusal)),
                Piece::Failed { why: Ok(()), .. } => return Err(broken("it was cut while it was read")),
            }
        }
    }
    let (head, complete) = head_of(&tail, start == 0).map_err(broken)?;
    let stored = match read_whole(session, &at(&run.root, HEAD))? {
        Ok(text) => Some(
            String::from_utf8(text)
                .ok()
                .and_then(|text| Head::decode(&text))
                .ok_or_else(|| broken("audit.head beside it cannot be read"))?,
        ),
        Err(refusal) if refusal.is_missing() => None,
        Err(refusal) => return Err(session.refused("read", &at(&run.root, HEAD), &refusal)),
    };
    if stored.is_some_and(|stored| stored.lines > head.lines) {
        return Err(broken("lines were cut off at its end"));
    }
    Ok((head, start + complete as u64))
}

fn records<'a>(
    run: &Run,
    state: &'a State,
    published: &'a HashSet<u32>,
    removed: &'a [&'a RelPath],
    manifest: &'a Manifest,
    trash: Option<&'a Trash<'a>>,
) -> impl Iterator<Item = AuditRecord> + 'a {
    let base = AuditRecord { generation: Some(manifest.generation), ..base(run) };
    let gone = base.clone();
    let before = |path: &RelPath| state.target.get(path).map(Before::of);
    let actions = state.plan.actions.iter().filter(|action| published.contains(&action.index));
    let old = gone.clone();
    let modified = state.plan.actions.iter().filter(|action| published.contains(&action.index));
    let modified = modified.filter(|action| action.change == Change::Modified);
    let replaced = modified.map(|action| &state.source.entries()[action.index as usize].path);
    let kept = trash.into_iter().flat_map(move |trash| {
        let (old, paths) = (old.clone(), replaced.clone());
        paths.map(move |path| AuditRecord { before: before(path), ..aside(&old, trash, path) })
    });
    let given = actions.filter_map(move |action| {
        let entry = manifest.tree.get(&state.source.entries()[action.index as usize].path)?;
        let what = if action.change == Change::MetadataOnly { "metadata" } else { "publish" };
        Some(AuditRecord { before: before(&entry.path), ..base.of_entry(what, entry) })
    });
    let removals = removed.iter().map(move |path| match trash {
        Some(trash) => AuditRecord { before: before(path), ..aside(&gone, trash, path) },
        None => {
            let (path, before) = (path.to_string(), before(path));
            AuditRecord { action: "remove".into(), path, before, result: Some(Outcome::Success), ..gone.clone() }
        }
    });
    kept.chain(given).chain(removals)
}

/// What was moved to the trash.
fn aside(base: &AuditRecord, trash: &Trash<'_>, path: &RelPath) -> AuditRecord {
    let reason = Some(format!("moved to trash: {}", trash.shown(path)));
    let (path, result) = (path.to_string(), Some(Outcome::Success));
    AuditRecord { action: "trash".into(), path, reason, result, ..base.clone() }
}
