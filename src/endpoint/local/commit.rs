//! Makes what is staged visible, and finishes what an interrupted run had begun to make visible.
//!
//! When everything is staged, proven and on stable storage, the steps and the new manifest are written down and stored; from
//! then on the run can only go forward: each step is done again without harm by whoever comes next.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::io::{ErrorKind, Read, Write};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::fs::RenameFlags;
use sha2::{Digest as _, Sha256};

use super::metadata::{Acls, Existing, apply_directory};
use super::target::{MANIFEST, Run, STAGING, State, io, rel};
use crate::audit::{AuditLog, AuditRecord};
use crate::endpoint::{CommitOptions, Committed, Error};
use crate::error::Escaped;
use crate::manifest::{Content, Digest, Entry, Manifest, Timestamp, Tree, format};
use crate::monitor::{Event, Monitor};
use crate::path::RelPath;
use crate::plan::publish::{Publication, Step, steps};
use crate::plan::{Change, Need};
use crate::root::{FileKind, Follow, Metadata, Root};
use crate::scan::names::Names;
use crate::staging::Permissions;

const RECORD: &str = "commit";
const NEW_MANIFEST: &str = "manifest";
/// The ACLs of what gets its permissions after it was published.
const ACLS: &str = "acls";

/// The manifest of `root` and the SHA-256 of its file (zeros where there is none); one that is damaged is told, and counts as absent: nothing is believed then.
pub(super) fn read_manifest(root: &Root, monitor: &dyn Monitor) -> Result<(Manifest, Digest), Error> {
    let mut text = Vec::new();
    match root.open_read(&rel(MANIFEST)?, Follow::Never) {
        Ok(mut file) => {
            let shown = root.shown().join(MANIFEST).display().to_string();
            file.read_to_end(&mut text).map_err(|source| Error::Io { operation: "read", path: shown, source })?;
        }
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok((Manifest::default(), Digest([0; 32]))),
        Err(error) => return Err(io(error)),
    }
    let manifest = format::decode(&text).unwrap_or_else(|error| {
        monitor.event(Event::Warning(&format!(
            "the manifest of {} is damaged ({error}); every file is compared by its content",
            root.shown().display()
        )));
        Manifest::default()
    });
    Ok((manifest, Digest(Sha256::digest(&text).into())))
}

/// Publishes the run.
pub(super) fn commit(run: &Arc<Run>, options: &CommitOptions, monitor: &dyn Monitor) -> Result<Committed, Error> {
    let mut state = run.state();
    let state = &mut *state;
    let Some(staging) = &run.staging else { return Err(Error::Usage("a dry run publishes nothing".into())) };
    let failed = settle(run, staging, state, options)?;
    let source = Arc::clone(&state.source);
    let publication = Publication {
        source: &source,
        target: &state.target,
        plan: &state.plan,
        delete: options.delete,
        failed: &|index| failed.contains(&index),
        last: &|path| run.is_last(path),
    };
    let steps = steps(&publication);
    let changed = !steps.is_empty();
    if !changed && run.birth.is_none() && state.old_manifest.generation > 0 {
        run.root.remove_tree(&rel(STAGING)?).map_err(io)?;
        return Ok(Committed {
            generation: state.old_manifest.generation,
            manifest_digest: state.old_digest.to_string(),
            ..Committed::default()
        });
    }
    let manifest = new_manifest(run, staging, state, options, &failed)?;
    let text = format::encode(&manifest);
    // DURABILITY: all content and permissions first; only then the record that makes them the truth.
    run.root.sync_filesystem().map_err(io)?;
    let acls = late_acls(run, &source, &steps)?;
    store(staging, ACLS, acls.encode().as_bytes())?;
    store(staging, NEW_MANIFEST, &text)?;
    store(staging, RECORD, record(&steps).as_bytes())?;
    staging.sync_dir(None).map_err(io)?;

    let mut committed = Committed {
        generation: manifest.generation,
        manifest_digest: Digest(Sha256::digest(&text).into()).to_string(),
        ..Committed::default()
    };
    committed.problems = execute(&run.root, staging, &steps, &manifest.tree, &acls)?;
    committed.published = state.plan.actions.iter().filter(|action| !failed.contains(&action.index)).count() as u64;
    committed.removed = steps.iter().filter(|step| is_removal(step)).count() as u64;
    audit(run, state, &steps, &failed, &manifest)?;
    finish(&run.root)?;
    if let Some(birth) = &run.birth {
        birth.appear(&run.root)?;
    }
    monitor.event(Event::Detail(&format!("generation {} is published", committed.generation)));
    Ok(committed)
}

fn is_removal(step: &Step) -> bool {
    matches!(step, Step::RemoveFile(_) | Step::RemoveDirectory(_))
}

/// Makes the links, gives new directories their permissions, and says which entries are not to be published.
fn settle(run: &Run, staging: &Root, state: &mut State, options: &CommitOptions) -> Result<HashSet<u32>, Error> {
    let source = Arc::clone(&state.source);
    let mut failed: HashSet<u32> = options.failed.iter().copied().collect();
    let mut directories = Vec::new();
    let mut linked: HashSet<&RelPath> = HashSet::new();
    for action in &mut state.plan.actions {
        let index = action.index;
        let entry = &source.entries()[index as usize];
        let has_content = state.staged.contains_key(&index);
        match (&entry.content, action.need) {
            (Content::File { .. }, Need::Nothing) => continue,
            (Content::File { .. }, _) if has_content && !failed.contains(&index) => {
                action.change = if action.change == Change::Added { Change::Added } else { Change::Modified };
                linked.insert(&entry.path);
                continue;
            }
            (Content::File { .. }, _) if state.kept.contains_key(&index) && !failed.contains(&index) => continue,
            (Content::File { .. }, _) => {
                failed.insert(index);
                staging.remove_tree(&run.staged_path(&entry.path)?).map_err(io)?;
                continue;
            }
            (Content::Directory, _) if action.change != Change::MetadataOnly => directories.push(entry),
            _ if action.change == Change::MetadataOnly => {}
            (Content::Symlink { target }, _) => {
                let path = run.staged_path(&entry.path)?;
                staging.remove_tree(&path).map_err(io)?;
                staging.symlink(target, &path).map_err(io)?;
            }
            (Content::HardLink { first }, _) => {
                let failed_first = source.position(first).is_some_and(|at| failed.contains(&(at as u32)));
                if failed_first {
                    failed.insert(index);
                    continue;
                }
                let path = run.staged_path(&entry.path)?;
                staging.remove_tree(&path).map_err(io)?;
                let from =
                    if linked.contains(first) { staged_in_root(&run.staged_path(first)?)? } else { first.clone() };
                run.root.hard_link(&from, &staged_in_root(&path)?).map_err(io)?;
            }
            _ => {}
        }
    }
    let awaits_pointer: HashSet<RelPath> = source
        .entries()
        .iter()
        .filter(|entry| !entry.is_directory() && run.is_last(&entry.path))
        .filter_map(|entry| entry.path.parent())
        .collect();
    for entry in directories.iter().rev() {
        let path = run.staged_directory(&entry.path)?;
        // The top-most new directory gets its mode after the rename: without the right to write it cannot be moved. One
        // that a pointer is yet to be put into gets it after that.
        if path.depth() > 2 && staging.stat(&path, Follow::Never).is_ok() {
            let private = Permissions { mode: 0o700, ..run.permissions(entry)? };
            let above_is_new = entry
                .path
                .parent()
                .is_some_and(|parent| state.target.get(&parent).is_none_or(|there| !there.is_directory()));
            let last = above_is_new && !awaits_pointer.contains(&entry.path);
            let wanted = if last { run.permissions(entry)? } else { private };
            apply_directory(staging, &path, &wanted)?;
        }
    }
    Ok(failed)
}

fn staged_in_root(path: &RelPath) -> Result<RelPath, Error> {
    rel(STAGING)?
        .join(path.as_bytes())
        .map_err(|error| Error::Refused { by: "the staging directory".into(), reason: error.to_string() })
}

/// What the root holds once the steps are done, as far as this and earlier runs vouch for it.
fn new_manifest(
    run: &Run,
    staging: &Root,
    state: &State,
    options: &CommitOptions,
    failed: &HashSet<u32>,
) -> Result<Manifest, Error> {
    let source = &state.source;
    let gone: HashSet<&RelPath> =
        state.plan.removals.iter().filter(|_| options.delete).map(|removal| &removal.path).collect();
    let mut names = Names::default();
    let mut entries: Vec<Entry> = Vec::with_capacity(source.entries().len());
    let blocked =
        |path: &RelPath| path.ancestors().any(|above| source.get(&above).is_some_and(|entry| !entry.is_directory()));
    for old in state.old_manifest.tree.entries() {
        let replaced = source.position(&old.path).is_some_and(|at| !failed.contains(&(at as u32)));
        if !replaced && !gone.contains(&old.path) && !blocked(&old.path) && still_there(run, state, old) {
            entries.push(old.clone());
        }
    }
    for (at, entry) in source.entries().iter().enumerate() {
        let index = at as u32;
        if failed.contains(&index) {
            continue;
        }
        let mut entry = entry.clone();
        let there = state.target.get(&entry.path);
        if let Content::File { digest, .. } = &mut entry.content {
            let proven = state.staged.get(&index).or_else(|| state.kept.get(&index)).copied();
            *digest = proven.or_else(|| there.and_then(|there| there.file()?.1)).or(*digest);
        }
        let wanted = run.permissions(&entry)?;
        let staged = state.staged.contains_key(&index).then(|| run.staged_path(&entry.path)).transpose()?;
        let now: Option<Metadata> = match staged {
            Some(path) => Some(staging.stat(&path, Follow::Never).map_err(io)?),
            None => run.root.stat(&entry.path, Follow::Never).ok(),
        };
        let own = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        let (uid, gid) = now.map_or(own, |now| (now.uid, now.gid));
        entry.owner = names.user(wanted.uid.unwrap_or(uid));
        entry.group = names.group(wanted.gid.unwrap_or(gid));
        if !matches!(entry.content, Content::Symlink { .. }) {
            entry.mode = wanted.mode;
        }
        entries.push(entry);
    }
    // A hard link whose first name is not vouched for is not either.
    let files: HashSet<RelPath> =
        entries.iter().filter(|entry| entry.file().is_some()).map(|entry| entry.path.clone()).collect();
    entries.retain(|entry| !matches!(&entry.content, Content::HardLink { first } if !files.contains(first)));
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let created = Timestamp { seconds: now.as_secs() as i64, nanoseconds: now.subsec_nanos() };
    let tree =
        Tree::new(entries).map_err(|error| Error::Refused { by: "the manifest".into(), reason: error.to_string() })?;
    Ok(Manifest { generation: state.old_manifest.generation + 1, created, tree })
}

/// Whether a path that the source does not have is still as the old manifest says. One that the filter keeps out of this
/// run (a neighbour of a single file that is pushed) was not scanned, and is looked at here.
fn still_there(run: &Run, state: &State, old: &Entry) -> bool {
    match (state.target.get(&old.path).map(|now| (&now.content, now.mtime)), &old.content) {
        (Some((Content::File { size, .. }, mtime)), Content::File { size: listed, .. }) => {
            size == listed && mtime == old.mtime
        }
        (Some((now, _)), listed) => now == listed,
        (None, listed) => run.root.stat(&old.path, Follow::Never).is_ok_and(|now| match (now.kind, listed) {
            (FileKind::Regular, Content::File { size, .. }) => now.size == *size && now.mtime == old.mtime,
            (FileKind::Regular, Content::HardLink { .. }) | (FileKind::Directory, Content::Directory) => true,
            (FileKind::Symlink, Content::Symlink { target }) => {
                run.root.read_link(&old.path).is_ok_and(|now| now[..] == target[..])
            }
            _ => false,
        }),
    }
}

fn store(staging: &Root, name: &str, bytes: &[u8]) -> Result<(), Error> {
    let path = rel(&format!("{name}.new"))?;
    staging.remove_tree(&path).map_err(io)?;
    let mut file = staging.create_new(&path, 0o600).map_err(io)?;
    let shown = staging.shown().join(name).display().to_string();
    file.write_all(bytes).and_then(|()| file.sync_all()).map_err(|source| Error::Io {
        operation: "write",
        path: shown,
        source,
    })?;
    staging.rename(&path, &rel(name)?, RenameFlags::empty()).map_err(io)
}

/// One step a line: a letter and the path's bytes in hexadecimal.
fn record(steps: &[Step]) -> String {
    let mut text = String::new();
    for step in steps {
        let letter = match step {
            Step::Replace(_) => 'R',
            Step::NewDirectory(_) => 'N',
            Step::ApplyMetadata(_) => 'A',
            Step::RemoveFile(_) => 'F',
            Step::RemoveDirectory(_) => 'D',
        };
        text.push(letter);
        for byte in step.path().as_bytes() {
            text.push_str(&format!("{byte:02x}"));
        }
        text.push('\n');
    }
    text
}

fn parse_record(text: &str) -> Option<Vec<Step>> {
    text.lines()
        .map(|line| {
            let (letter, hex) = line.split_at_checked(1)?;
            let bytes = (0..hex.len() / 2).map(|at| u8::from_str_radix(hex.get(2 * at..2 * at + 2)?, 16).ok());
            let path = RelPath::new(bytes.collect::<Option<Vec<u8>>>()?).ok()?;
            Some(match letter {
                "R" => Step::Replace(path),
                "N" => Step::NewDirectory(path),
                "A" => Step::ApplyMetadata(path),
                "F" => Step::RemoveFile(path),
                "D" => Step::RemoveDirectory(path),
                _ => return None,
            })
        })
        .collect()
}

/// The ACLs of paths that get their permissions after they are published: those that are there already, and directories
/// in which something happens.
fn late_acls(run: &Run, source: &Tree, steps: &[Step]) -> Result<Acls, Error> {
    let mut acls = Acls::default();
    for step in steps {
        let own = matches!(step, Step::ApplyMetadata(_) | Step::NewDirectory(_)).then(|| step.path().clone());
        for path in own.into_iter().chain(step.path().parent()) {
            if let Some(entry) = source.get(&path) {
                acls.add(run, entry)?;
            }
        }
    }
    Ok(acls)
}

/// Does the steps that are not done yet. Those that the state of the target forbids are told and left.
fn execute(
    root: &Root,
    staging: &Root,
    steps: &[Step],
    tree: &Tree,
    acls: &Acls,
) -> Result<Vec<(String, String)>, Error> {
    let existing = Existing::new(root, staging, tree, acls);
    let mut problems = Vec::new();
    let mut touched: BTreeSet<RelPath> = BTreeSet::new();
    let mut opened: BTreeMap<RelPath, u32> = BTreeMap::new();
    for step in steps {
        let path = step.path();
        touched.extend(path.parent());
        let take = || match step {
            Step::Replace(_) | Step::NewDirectory(_) => publish_one(root, staging, path),
            Step::ApplyMetadata(_) => tree.get(path).map_or(Ok(()), |entry| existing.apply(entry)),
            Step::RemoveFile(_) => gone(root.unlink(path).map_err(io)),
            Step::RemoveDirectory(_) => gone(root.rmdir(path).map_err(io)),
        };
        let result = match (take(), path.parent()) {
            (Err(error), Some(above)) if denied(&error) => match open_up(root, &above) {
                Some(mode) => {
                    opened.entry(above).or_insert(mode);
                    take()
                }
                None => Err(error),
            },
            (result, _) => result,
        };
        match result {
            Ok(()) if matches!(step, Step::NewDirectory(_)) => {
                touched.insert(path.clone());
            }
            Ok(()) => {}
            Err(error) => problems.push((path.to_string(), crate::error::chain(&error))),
        }
    }
    for (path, mode) in opened.iter().rev() {
        let closed = root.open_dir(Some(path), Follow::Never).map_err(io).and_then(|directory| {
            let mode = rustix::fs::Mode::from_raw_mode(*mode);
            rustix::fs::fchmod(&directory, mode).map_err(|errno| Error::Io {
                operation: "give its mode back to",
                path: root.shown().join(path.as_path()).display().to_string(),
                source: errno.into(),
            })
        });
        match closed {
            Err(Error::Io { source, .. }) if source.kind() == ErrorKind::NotFound => {}
            Err(error) => problems.push((path.to_string(), crate::error::chain(&error))),
            Ok(()) => {}
        }
    }
    // What happened in a directory moved its time; and new ones still have the mode they were staged with.
    for path in touched.iter().rev() {
        if let Some(entry) = tree.get(path).filter(|entry| entry.is_directory())
            && let Err(error) = existing.apply(entry)
        {
            problems.push((path.to_string(), crate::error::chain(&error)));
        }
    }
    Ok(problems)
}

fn denied(error: &Error) -> bool {
    matches!(error, Error::Io { source, .. } if source.kind() == ErrorKind::PermissionDenied)
}

/// Lets us write in a directory that is ours and does not; gives the mode it had. `None` when that is not the cause.
fn open_up(root: &Root, path: &RelPath) -> Option<u32> {
    let directory = root.open_dir(Some(path), Follow::Never).ok()?;
    let found = Metadata::of(&directory).ok()?;
    let ours = found.uid == rustix::process::geteuid().as_raw();
    if !ours || found.mode & 0o300 == 0o300 {
        return None;
    }
    rustix::fs::fchmod(&directory, rustix::fs::Mode::from_raw_mode(found.mode | 0o700)).ok()?;
    Some(found.mode)
}

fn gone(result: Result<(), Error>) -> Result<(), Error> {
    match result {
        Err(Error::Io { source, .. }) if source.kind() == ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Renames the staged thing to its place; when it is not staged any more that was done before.
fn publish_one(root: &Root, staging: &Root, path: &RelPath) -> Result<(), Error> {
    for tree in [&b"tree/"[..], b"last/"] {
        let staged = RelPath::new([tree, path.as_bytes()].concat());
        let Ok(staged) = staged else { continue };
        match staging.stat(&staged, Follow::Never) {
            Ok(_) => return staging.rename_to(&staged, root, path, RenameFlags::empty()).map_err(io),
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(io(error)),
        }
    }
    root.stat(path, Follow::Never).map(drop).map_err(io)
}

fn audit(run: &Run, state: &State, steps: &[Step], failed: &HashSet<u32>, manifest: &Manifest) -> Result<(), Error> {
    let wrong = |error: crate::audit::AuditError| Error::Refused {
        by: "the audit log".into(),
        reason: crate::error::chain(&error),
    };
    let base =
        AuditRecord { actor: run.options.actor.clone(), source: run.options.source.clone(), ..AuditRecord::default() };
    let mut records = Vec::new();
    for action in state.plan.actions.iter().filter(|action| !failed.contains(&action.index)) {
        let sent = &state.source.entries()[action.index as usize];
        let Some(entry) = manifest.tree.get(&sent.path) else { continue };
        let file = entry.file();
        let decision = run.decision(sent);
        records.push(AuditRecord {
            action: if action.change == Change::MetadataOnly { "metadata" } else { "publish" }.into(),
            path: entry.path.to_string(),
            size: file.map(|(size, _)| size),
            sha256: file.and_then(|(_, digest)| digest).map(|digest| digest.to_string()),
            mode: Some(format!("{:04o}", entry.mode)),
            owner: Some(entry.owner.to_string()),
            group: Some(entry.group.to_string()),
            acl: decision.acl.filter(|acl| !acl.is_empty()).map(|acl| Escaped(acl.to_string().as_bytes()).to_string()),
            ..base.clone()
        });
        let link = matches!(sent.content, Content::Symlink { .. } | Content::HardLink { .. });
        if !decision.withheld.is_empty() && !link {
            let reason = format!("not given: {}; the policy here does not grant it", decision.withheld.join(", "));
            let (action, path) = ("refuse".into(), sent.path.to_string());
            records.push(AuditRecord { action, path, reason: Some(reason), ..base.clone() });
        }
    }
    for step in steps.iter().filter(|step| is_removal(step)) {
        records.push(AuditRecord { action: "remove".into(), path: step.path().to_string(), ..base.clone() });
    }
    AuditLog::open(&run.root).map_err(wrong)?.append(&records).map_err(wrong)?;
    Ok(())
}

/// Puts the new manifest in force and clears the staging area, in an order that a crash does not hurt.
fn finish(root: &Root) -> Result<(), Error> {
    let path = rel(STAGING)?;
    let staging = root.subroot(&path).map_err(io)?;
    root.sync_filesystem().map_err(io)?;
    match staging.rename_to(&rel(NEW_MANIFEST)?, root, &rel(MANIFEST)?, RenameFlags::empty()) {
        Ok(()) => {}
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(error) => return Err(io(error)),
    }
    root.sync_dir(Some(&rel(super::target::STATE)?)).map_err(io)?;
    root.remove_tree(&path).map_err(io)
}

/// Finishes what an interrupted run had begun to publish. Says whether there was something to finish.
pub(super) fn recover(root: &Root) -> Result<bool, Error> {
    let staging = match root.subroot(&rel(STAGING)?) {
        Ok(staging) => staging,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(io(error)),
    };
    let read = |name: &str| -> Result<Option<Vec<u8>>, Error> {
        let mut bytes = Vec::new();
        match staging.open_read(&rel(name)?, Follow::Never) {
            Ok(mut file) => {
                let path = staging.shown().join(name).display().to_string();
                file.read_to_end(&mut bytes).map_err(|source| Error::Io { operation: "read", path, source })?;
                Ok(Some(bytes))
            }
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(io(error)),
        }
    };
    let Some(record) = read(RECORD)? else { return Ok(false) };
    // Without the manifest in staging it was put in force already: only the clearing was cut off.
    if let Some(text) = read(NEW_MANIFEST)? {
        let damaged = |what: &str| Error::Refused {
            by: root.shown().display().to_string(),
            reason: format!(
                "{what} of an interrupted run is damaged; look at {}, then remove it",
                staging.shown().display()
            ),
        };
        let manifest = format::decode(&text).map_err(|_| damaged("the manifest"))?;
        let steps = std::str::from_utf8(&record).ok().and_then(parse_record).ok_or_else(|| damaged("the record"))?;
        let acls = read(ACLS)?.and_then(|bytes| Acls::parse(std::str::from_utf8(&bytes).ok()?));
        let acls = acls.ok_or_else(|| damaged("the list of ACLs"))?;
        execute(root, &staging, &steps, &manifest.tree, &acls)?;
    }
    finish(root)?;
    Ok(true)
}
