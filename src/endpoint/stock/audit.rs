//! The record of what was published, appended to `.lockstep/audit.jsonl` of the target.
//!
//! It is written by the account that publishes, over the same session: whoever has that account can write it anew, and
//! shows only by a head that is kept elsewhere (`docs/security.md`).

use std::collections::{HashMap, HashSet};

use bytes::Bytes;

use super::execute::Problems;
use super::read::{read_on, read_opened};
use super::record::Record;
use super::session::{self, Refusal, Reply, Session, about, extended, with_attributes};
use super::stage::OwnFile;
use super::target::{Run, STATE, State};
use super::trash::Trash;
use super::{REGULAR, at, kind_of};
use crate::audit::{
    AuditRecord, Before, HEAD, Head, LOG, OnFailure, Outcome, TAIL_BYTES, head_of, lines, settings, signed_head,
};
use crate::endpoint::Error;
use crate::error::{chain, counted};
use crate::manifest::{Manifest, Tree};
use crate::path::RelPath;
use crate::plan::Change;
use crate::plan::publish::Step;
use crate::wire::sftp::{Attributes, open, packet};

/// The log as a run has found it, and goes on with it.
pub(super) struct Log {
    /// It is open, unless it is to be made, or was closed to bring its lines to the disk.
    handle: Option<Bytes>,
    head: Head,
    /// Where the next line goes; 0 in a log that is to be made.
    end: u64,
    /// Something that is no line lies behind `end`.
    torn: bool,
    /// One was taken away, and no line says so yet.
    was_torn: bool,
    /// What it ends with.
    tail: Vec<u8>,
}

/// Lines for the log, and its head after them.
pub(super) struct Told {
    text: Vec<u8>,
    head: Head,
}

/// The file that says how far the log goes.
pub(super) fn head_file(run: &Run) -> OwnFile {
    OwnFile::new(&at(&run.root, STATE), HEAD.rsplit('/').next().unwrap_or(HEAD))
}

/// What is about to be done.
pub(super) fn intent(run: &Run, generation: u64, steps: usize) -> AuditRecord {
    let reason = Some(format!("to publish in {}", counted(steps as u64, "step", "steps")));
    AuditRecord { action: "intent".into(), reason, generation: Some(generation), ..base(run) }
}

/// Appends one line for each path that was published or removed, and signs the log where there is a key.
///
/// # Errors
/// When it cannot be written, or its end has been tampered with. The run is not complete then.
pub(super) fn append(
    run: &Run,
    log: Option<Log>,
    state: &State,
    published: &HashSet<u32>,
    removed: &[&RelPath],
    manifest: &Manifest,
    trash: Option<&Trash<'_>>,
) -> Result<(), Error> {
    let mut records = records(run, state, published, removed, manifest, trash).peekable();
    if records.peek().is_none() {
        return log.map_or(Ok(()), |log| log.close(&run.session));
    }
    or_continue(tell_last(run, log, records)).map(drop)
}

/// Tells what an interrupted run had written down and is published now, by whom it was begun, unless it had told that itself. The
/// manifest before it, `old`, knows what rights there were; what lies in the trash was moved there. Where this is interrupted too, or
/// others wrote to the log meanwhile, it is told once more.
///
/// # Errors
/// As [`append`].
pub(super) fn finished<'a>(
    run: &Run,
    record: &Record,
    steps: impl Iterator<Item = &'a Step>,
    (old, manifest): (&Tree, &Manifest),
    done: &Problems,
) -> Result<(), Error> {
    let log = match or_continue(Log::read(run))? {
        Some(log) if log.tells_of(manifest.generation) => return log.close(&run.session),
        log => log,
    };
    let (actor, source) = (record.actor.clone(), record.source.clone());
    let base = AuditRecord { actor, source, generation: Some(manifest.generation), ..AuditRecord::default() };
    let before = |path: &RelPath| old.get(path).map(Before::of);
    let (mut whole, mut single, mut gone) = (HashSet::new(), HashMap::new(), Vec::new());
    for step in steps {
        let path = step.path();
        match step {
            // Of a directory that could not be removed something may have been.
            _ if step.is_removal() && !done.unpublished.contains(path) => gone.push(path),
            _ if step.is_removal() || done.left(path) => {}
            Step::NewDirectory(_) | Step::Exchange(_) => drop(whole.insert(path)),
            Step::ApplyMetadata(_) => drop(single.entry(path).or_insert("metadata")),
            _ => drop(single.insert(path, "publish")),
        }
    }
    let mut records = Vec::new();
    if let Some(trash) = record.trash.as_deref().map(|name| Trash::new(run, name)) {
        let replaced = single.iter().filter(|(_, what)| **what == "publish").map(|(path, _)| *path);
        let mut moved: Vec<&RelPath> = gone.drain(..).chain(replaced).collect();
        moved.sort_unstable();
        moved.dedup();
        let there = run.session.batch(moved.iter().map(|path| about(packet::LSTAT, &trash.place(path))))?;
        let moved = moved.into_iter().zip(there).filter(|(_, there)| matches!(there, Reply::Attributes(_)));
        records.extend(moved.map(|(path, _)| AuditRecord { before: before(path), ..aside(&base, &trash, path) }));
    }
    records.extend(gone.into_iter().map(|path| AuditRecord { before: before(path), ..removal(&base, path) }));
    records.extend(manifest.tree.entries().iter().filter_map(|entry| {
        let path = &entry.path;
        let within = whole.contains(path) || path.ancestors().any(|above| whole.contains(&above));
        let what = if within { "publish" } else { single.get(path)? };
        Some(AuditRecord { before: before(path), ..base.of_entry(what, entry) })
    }));
    or_continue(tell_last(run, log, records.into_iter())).map(drop)
}

fn tell_last(run: &Run, log: Option<Log>, records: impl Iterator<Item = AuditRecord>) -> Result<(), Error> {
    let session = &run.session;
    let mut log = log.map_or_else(|| Log::read(run), Ok)?;
    let own = head_file(run);
    let mut replies = session.batch(log.open(run, &own))?.into_iter();
    let head = log.opened(run, &own, &mut replies)?;
    let told = log.tell(records, true)?;
    let results = session.all(log.write(session, &own, &head, &told)?)?;
    log.written(run, &told, results)?;
    own.name(session)?;
    log.close(session)
}

/// What a log that cannot be written means: a connection that is gone ends the run in any case.
pub(super) fn or_continue<T>(result: Result<T, Error>) -> Result<Option<T>, Error> {
    match result {
        Err(error @ (Error::Io { .. } | Error::Refused { .. })) if settings().on_failure == OnFailure::Continue => {
            tracing::warn!(error = chain(&error), "the audit log cannot be written, and has a gap");
            Ok(None)
        }
        result => result.map(Some),
    }
}

fn base(run: &Run) -> AuditRecord {
    let (actor, source) = (run.options.actor.clone(), run.options.source.clone());
    AuditRecord { actor, source, ..AuditRecord::default() }
}

impl Log {
    /// The head of the log as it is, and where its next line goes.
    ///
    /// # Errors
    /// When its end has been tampered with, or it cannot be read.
    pub(super) fn read(run: &Run) -> Result<Log, Error> {
        let session = &run.session;
        let (path, head_path) = (at(&run.root, LOG), at(&run.root, HEAD));
        let broken = |what: &str| Error::Refused {
            by: format!("the audit log of {}", session.client.host()),
            reason: format!("{what}; keep the file as it is and find out who changed it"),
        };
        let looks = [
            about(packet::LSTAT, &path),
            session::open(&path, open::READ | open::WRITE),
            session::open(&head_path, open::READ),
        ];
        let Ok([found, opened, stored]) = <[Reply; 3]>::try_from(session.batch(looks)?) else {
            return Err(session.odd());
        };
        let (opened, stored) = (session.handle(opened)?, session.handle(stored)?);
        let size = match session.attributes(found)? {
            Ok(found) if kind_of(&found) == Some(REGULAR) => found.size.unwrap_or_default(),
            Ok(_) => return Err(broken("it is not a regular file")),
            Err(refusal) if refusal.is_missing() => 0,
            Err(refusal) => return Err(session.refused("look at", &path, &refusal)),
        };
        let handle = match opened {
            Ok(handle) => Some(handle),
            Err(refusal) if refusal.is_missing() => None,
            Err(refusal) => return Err(session.refused("open", &path, &refusal)),
        };
        let start = size.saturating_sub(TAIL_BYTES);
        let (tail, stored) = std::thread::scope(|scope| {
            let stored = scope.spawn(|| stored.map(|handle| read_opened(session, &handle, 0)));
            let tail = handle.as_ref().map_or(Ok(Ok(Vec::new())), |handle| read_on(session, handle, start));
            (tail, stored.join())
        });
        let tail = tail?.map_err(|refusal| session.refused("read", &path, &refusal))?;
        if start + (tail.len() as u64) < size {
            return Err(broken("it was cut while it was read"));
        }
        let (head, complete) = head_of(&tail, start == 0).map_err(broken)?;
        let stored = match stored.map_err(|_| Error::Usage("an internal error stopped the audit".into()))? {
            Ok(read) => read?,
            Err(refusal) => Err(refusal),
        };
        let stored = match stored {
            Ok(text) => Some(
                String::from_utf8(text)
                    .ok()
                    .and_then(|text| Head::decode(&text))
                    .ok_or_else(|| broken("audit.head beside it cannot be read"))?,
            ),
            Err(refusal) if refusal.is_missing() => None,
            Err(refusal) => return Err(session.refused("read", &head_path, &refusal)),
        };
        if stored.is_some_and(|stored| stored.lines > head.lines) {
            return Err(broken("lines were cut off at its end"));
        }
        let (end, torn) = (start + complete as u64, complete < tail.len());
        Ok(Log { handle, head, end, torn, was_torn: false, tail })
    }

    /// Whether its last lines tell of what was published as this generation.
    fn tells_of(&self, generation: u64) -> bool {
        let lines = self.tail.split(|&byte| byte == b'\n').rev();
        let mut records = lines.filter_map(|line| serde_json::from_slice::<serde_json::Value>(line).ok());
        records
            .find(|record| record["action"] != "head")
            .is_some_and(|record| record["action"] != "intent" && record["generation"] == generation)
    }

    /// Lines for these; `last` signs the log where there is a key.
    ///
    /// # Errors
    /// When they cannot be written down.
    pub(super) fn tell(&self, records: impl IntoIterator<Item = AuditRecord>, last: bool) -> Result<Told, Error> {
        let broken = |error: serde_json::Error| Error::Usage(error.to_string());
        let gap = self.was_torn.then(AuditRecord::unfinished);
        let (mut text, mut head) = lines(self.head, gap.into_iter().chain(records)).map_err(broken)?;
        if let Some(signing) = settings().signing.as_ref().filter(|_| last) {
            let signed = signed_head(&signing.key, head).map_err(|error| Error::Usage(chain(&error)))?;
            let (line, after) = lines(head, [signed]).map_err(broken)?;
            text.extend(line);
            head = after;
        }
        Ok(Told { text, head })
    }

    /// The first flight of telling. The lock of a run keeps those away who publish, and nobody else who writes to the log: that it
    /// is as it was read is asked right before it is written to.
    pub(super) fn open(&self, run: &Run, own: &OwnFile) -> Vec<Vec<u8>> {
        let path = at(&run.root, LOG);
        let looks = match &self.handle {
            Some(handle) => vec![about(packet::FSTAT, handle), about(packet::LSTAT, &path)],
            None if self.end == 0 => vec![made(&path)],
            None => Vec::new(),
        };
        looks.into_iter().chain(own.open()).collect()
    }

    /// The handle of the head's file. Where others have written to the log meanwhile, or it has another name, it is read once more.
    ///
    /// # Errors
    /// As [`Log::read`], or when one of both cannot be opened.
    pub(super) fn opened(
        &mut self,
        run: &Run,
        own: &OwnFile,
        replies: &mut impl Iterator<Item = Reply>,
    ) -> Result<Bytes, Error> {
        let session = &run.session;
        let mut next = || replies.next().ok_or_else(|| session.odd());
        let mut same = false;
        if self.handle.is_some() {
            let (held, named) = (session.attributes(next()?)?, session.attributes(next()?)?);
            same = [held, named].into_iter().all(|found| found.is_ok_and(|found| found.size == Some(self.end)));
        } else if self.end == 0 {
            self.handle = session.handle(next()?)?.ok();
            same = self.handle.is_some();
        }
        let own = own.opened(session, replies)?;
        if !same {
            self.again(run)?;
        }
        Ok(own)
    }

    /// Reads it once more, makes it where it is not there, and drops what a crash left of an unfinished line.
    fn again(&mut self, run: &Run) -> Result<(), Error> {
        let (session, path) = (&run.session, at(&run.root, LOG));
        let was_torn = self.was_torn;
        std::mem::replace(self, Log { was_torn, ..Log::read(run)? }).close(session)?;
        let Some(handle) = &self.handle else {
            let handle = session.handle(session.call(made(&path))?)?;
            self.handle = Some(handle.map_err(|refusal| session.refused("make", &path, &refusal))?);
            return Ok(());
        };
        if self.torn {
            let cut = Attributes { size: Some(self.end), ..Attributes::default() };
            let cut = session.order(with_attributes(packet::FSETSTAT, handle, &cut))?;
            cut.map_err(|refusal| session.refused("write", &path, &refusal))?;
            (self.torn, self.was_torn) = (false, true);
        }
        Ok(())
    }

    /// The second flight.
    ///
    /// # Errors
    /// When it was not opened.
    pub(super) fn write(
        &self,
        session: &Session,
        own: &OwnFile,
        head: &[u8],
        told: &Told,
    ) -> Result<Vec<Vec<u8>>, Error> {
        let Some(handle) = &self.handle else { return Err(session.odd()) };
        let chunk = session.write_max() as usize;
        let writes = told.text.chunks(chunk).enumerate();
        let mut requests: Vec<Vec<u8>> =
            writes.map(|(at, bytes)| session::write(handle, self.end + (at * chunk) as u64, bytes)).collect();
        // Where nothing else says that they have arrived, closing does.
        requests.push(match session.offers.fsync {
            true => extended("fsync@openssh.com", &[handle]),
            false => about(packet::CLOSE, handle),
        });
        // DURABILITY: written after the lines; after a crash between the two the head is behind, which is no fault.
        requests.extend(own.write(session, head, told.head.encode().as_bytes()));
        Ok(requests)
    }

    /// What became of it.
    ///
    /// # Errors
    /// When anything was refused.
    pub(super) fn written(
        &mut self,
        run: &Run,
        told: &Told,
        results: impl IntoIterator<Item = Result<(), Refusal>>,
    ) -> Result<(), Error> {
        if let Some(refusal) = results.into_iter().find_map(Result::err) {
            return Err(run.session.refused("write", &at(&run.root, LOG), &refusal));
        }
        if !run.session.offers.fsync {
            self.handle = None;
        }
        (self.head, self.was_torn) = (told.head, false);
        self.end += told.text.len() as u64;
        Ok(())
    }

    fn close(self, session: &Session) -> Result<(), Error> {
        self.handle.map_or(Ok(()), |handle| session.forget(about(packet::CLOSE, &handle)))
    }
}

/// Makes the log, which nobody else has done meanwhile.
fn made(path: &[u8]) -> Vec<u8> {
    session::open(path, open::READ | open::WRITE | open::CREATE | open::EXCLUSIVE)
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
        None => AuditRecord { before: before(path), ..removal(&gone, path) },
    });
    kept.chain(given).chain(removals)
}

fn removal(base: &AuditRecord, path: &RelPath) -> AuditRecord {
    AuditRecord { action: "remove".into(), path: path.to_string(), result: Some(Outcome::Success), ..base.clone() }
}

/// What was moved to the trash.
fn aside(base: &AuditRecord, trash: &Trash<'_>, path: &RelPath) -> AuditRecord {
    let reason = Some(format!("moved to trash: {}", trash.shown(path)));
    let (path, result) = (path.to_string(), Some(Outcome::Success));
    AuditRecord { action: "trash".into(), path, reason, result, ..base.clone() }
}
