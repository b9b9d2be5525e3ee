//! The manifest of a directory at a stock server: as it is read, as a run makes it, and who may read it.

use std::collections::{BTreeSet, HashSet};

use bytes::Bytes;
use sha2::{Digest as _, Sha256};

use super::execute::Problems;
use super::read::read_opened;
use super::record::Record;
use super::session::{self, Refusal, Session, about, with_attributes};
use super::stage::store;
use super::target::{MANIFEST, Run, STAGING_ABOVE, STATE, State, locked};
use super::{at, below};
use crate::endpoint::{CommitOptions, Error};
use crate::error::Escaped;
use crate::filter::Filter;
use crate::manifest::{Audience, Content, Digest, Entry, Manifest, Tree, format};
use crate::monitor::{Event, Monitor};
use crate::path::RelPath;
use crate::plan::outcome::{Outcome, entries_after};
use crate::wire::sftp::{Attributes, open, packet};

/// What it is called where it is staged.
pub(super) const NEW_MANIFEST: &str = "manifest";

/// The manifest of `root` and the SHA-256 of its file (zeros where there is none); one that is damaged is told, and
/// counts as absent: nothing is believed then.
pub(super) fn read_manifest(
    session: &Session,
    root: &[u8],
    monitor: &dyn Monitor,
) -> Result<(Manifest, Digest), Error> {
    let handle = session.handle(session.call(session::open(&at(root, MANIFEST), open::READ))?)?;
    manifest_of(session, root, handle, monitor)
}

/// The same where it was opened already.
pub(super) fn manifest_of(
    session: &Session,
    root: &[u8],
    opened: Result<Bytes, Refusal>,
    monitor: &dyn Monitor,
) -> Result<(Manifest, Digest), Error> {
    let text = match opened {
        Ok(handle) => read_opened(session, &handle, 0)?,
        Err(refusal) => Err(refusal),
    };
    let text = match text {
        Ok(text) => text,
        Err(refusal) if refusal.is_missing() => return Ok((Manifest::default(), Digest::default())),
        Err(refusal) => return Err(session.refused("read", &at(root, MANIFEST), &refusal)),
    };
    let manifest = format::decode(&text).unwrap_or_else(|error| {
        monitor.event(Event::Warning(&format!(
            "the manifest of {}:{} is damaged ({error}); it is not believed",
            session.client.host(),
            Escaped(root)
        )));
        Manifest::default()
    });
    Ok((manifest, Digest(Sha256::digest(&text).into())))
}

/// The manifest that the target gets, without what `failed`.
pub(super) fn new_manifest(
    run: &Run,
    state: &State,
    options: &CommitOptions,
    failed: &HashSet<u32>,
) -> Result<Manifest, Error> {
    let gone: HashSet<&RelPath> =
        state.plan.removals.iter().filter(|_| options.delete).map(|removal| &removal.path).collect();
    let filter = Filter::compile(&run.options.filter).map_err(|error| Error::Usage(crate::error::chain(&error)))?;
    let outcome = Outcome {
        source: &state.source,
        target: &state.target,
        old: &state.old_manifest.tree,
        removed: &|path| gone.contains(path),
        failed: &|index| failed.contains(&index),
        admits: &|path, directory| filter.admits(path, directory),
    };
    let own = run.own;
    let mut names = locked(&run.names);
    names.learn(&run.session, &BTreeSet::from([own.0]), &BTreeSet::from([own.1]))?;
    let mut published = |index: usize, entry: &Entry| -> Result<Entry, Error> {
        let mut entry = entry.clone();
        let there = state.target.get(&entry.path);
        let index = index as u32;
        if let Content::File { digest, .. } = &mut entry.content {
            let proven = state.staged.get(&index).or_else(|| state.kept.get(&index)).copied();
            *digest = proven.or_else(|| there.and_then(|there| there.file()?.1)).or(*digest);
        }
        // A further name has what the file has.
        let first = if let Content::HardLink { first } = &entry.content { state.source.get(first) } else { None };
        let wanted = run.permissions(first.unwrap_or(&entry))?;
        // What is appended to is whose it was.
        let there = there.filter(|_| !state.staged.contains_key(&index) || state.tails.contains_key(&index));
        let owner = there.map_or_else(|| names.user(own.0), |there| there.owner.clone());
        let group = there.map_or_else(|| names.group(own.1), |there| there.group.clone());
        entry.owner = wanted.uid.map_or(owner, |uid| names.user(uid));
        entry.group = wanted.gid.map_or(group, |gid| names.group(gid));
        if !matches!(entry.content, Content::Symlink { .. }) {
            entry.mode = wanted.mode;
        }
        Ok(entry)
    };
    let entries = entries_after(&outcome, &mut published)?;
    let tree =
        Tree::new(entries).map_err(|error| Error::Refused { by: "the manifest".into(), reason: error.to_string() })?;
    // Files that are younger than this may change without their time showing it.
    Ok(Manifest { generation: state.old_manifest.generation + 1, created: run.started, tree })
}

/// The manifest without what could not be published: of that it says what it said before.
pub(super) fn mend(
    run: &Run,
    record: &Record,
    mut manifest: Manifest,
    text: Vec<u8>,
    old: &Tree,
    problems: &Problems,
) -> Result<(Manifest, Vec<u8>), Error> {
    if problems.unpublished.is_empty() {
        return Ok((manifest, text));
    }
    let mut entries = manifest.tree.into_entries();
    entries.retain(|entry| !problems.left(&entry.path));
    // Of a directory that could not be removed something may have been.
    let removals = record.steps.iter().filter(|recorded| recorded.is_removal()).map(|recorded| recorded.step.path());
    let gone: HashSet<&RelPath> = removals.filter(|path| !problems.unpublished.contains(path)).collect();
    let stays = |entry: &&Entry| problems.left(&entry.path) && !gone.contains(&entry.path);
    entries.extend(old.entries().iter().filter(stays).cloned());
    entries.sort_unstable_by(|a, b| a.path.cmp(&b.path));
    let files: HashSet<RelPath> =
        entries.iter().filter(|entry| entry.file().is_some()).map(|entry| entry.path.clone()).collect();
    entries.retain(|entry| !matches!(&entry.content, Content::HardLink { first } if !files.contains(first)));
    manifest.tree =
        Tree::new(entries).map_err(|error| Error::Refused { by: "the manifest".into(), reason: error.to_string() })?;
    let text = format::encode(&manifest);
    store(&run.session, &run.staging, NEW_MANIFEST, &text)?;
    Ok((manifest, text))
}

/// Lets those read the staged manifest who may read what it lists, as far as mode and group can say so: there are no ACLs
/// here. Best effort; it is never readable by more.
pub(super) fn admit(run: &Run, tree: &Tree) -> Result<(), Error> {
    let session = &run.session;
    // All that is listed has this group, and a file of it has the number.
    let listed = tree.entries().iter().find(|entry| entry.is_directory() || entry.file().is_some());
    let looked = [run.root.clone()].into_iter().chain(listed.map(|entry| below(&run.root, &entry.path)));
    let mut found = session.batch(looked.map(|path| about(packet::LSTAT, &path)))?.into_iter();
    let mut found = || found.next().and_then(|reply| session.attributes(reply).ok()?.ok());
    let (directory, listed) = (found(), found());
    let gid = listed.and_then(|found| found.owner).map(|(_, gid)| gid);
    // A directory that is made by this run gets this mode when it appears.
    let mode = directory.as_ref().and_then(|found| found.mode).filter(|_| run.rename_to.is_none()).unwrap_or(0o755);
    let of_group = gid.is_some() && directory.and_then(|found| found.owner).map(|(_, gid)| gid) == gid;
    let group = Audience::of(tree).group.filter(|_| of_group).unwrap_or_else(|| "".into());
    let audience = Audience::of(tree).within(mode, "", &group);
    if !audience.others && audience.group.is_none() {
        return Ok(());
    }
    let manifest = at(&run.staging, NEW_MANIFEST);
    let set = |path: &[u8], attributes: &Attributes| with_attributes(packet::SETSTAT, path, attributes);
    let of_mode = |mode| Attributes { mode: Some(mode), ..Attributes::default() };
    let mut requests = if audience.others {
        vec![set(&manifest, &of_mode(0o644))]
    } else {
        let Some(gid) = gid else { return Ok(()) };
        // chown(2) leaves what is given as -1. Where the group may not be given, the mode must not be either.
        let group = Attributes { owner: Some((u32::MAX, gid)), ..Attributes::default() };
        if session.order(set(&manifest, &group))?.is_err() {
            return Ok(());
        }
        vec![set(&manifest, &of_mode(0o640))]
    };
    // They can be entered by whoever knows what to look for, and everything else in them is private.
    let entered = [at(&run.root, STATE), at(&run.root, STAGING_ABOVE)];
    requests.extend(entered.iter().map(|path| set(path, &of_mode(0o711))));
    session.all(requests).map(drop)
}
