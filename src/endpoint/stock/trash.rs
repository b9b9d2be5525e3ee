//! The trash of a root at a stock server: what the steps of a run remove or replace is moved aside by requests of SFTP.
//!
//! As at a local target nothing is copied, and each move is done again without harm. Owner, mode and time of files go along;
//! a directory that is removed is made anew in the trash, with its mode.

use std::collections::{BTreeMap, BTreeSet};

use super::list::list;
use super::names::Names;
use super::record::Recorded;
use super::session::{self, Refusal, Reply, Session, about, extended, with_attributes};
use super::target::Run;
use super::{DIRECTORY, at, below, kind_of};
use crate::endpoint::Error;
use crate::error::chain;
use crate::filter::{Filter, FilterSpec};
use crate::manifest::Entry;
use crate::monitor::{Event, Monitor, Silent};
use crate::path::RelPath;
use crate::plan::publish::Step;
use crate::plan::trash::{TRASH, is_expired};
use crate::scan::ScanRule;
use crate::wire::sftp::{Attributes, packet};

/// What may not be moved to the trash, and why.
pub(super) type Stuck = BTreeMap<RelPath, Refusal>;

/// The directory of one run.
pub(super) struct Trash<'a> {
    run: &'a Run,
    name: &'a str,
}

impl<'a> Trash<'a> {
    pub(super) fn new(run: &'a Run, name: &'a str) -> Trash<'a> {
        Trash { run, name }
    }

    /// Where something goes, below the root.
    pub(super) fn shown(&self, path: &RelPath) -> String {
        format!("{TRASH}/{}/{path}", self.name)
    }

    fn directory(&self) -> Vec<u8> {
        at(&self.run.root, format!("{TRASH}/{}", self.name))
    }

    /// Where something goes, as the server knows it.
    pub(super) fn place(&self, path: &RelPath) -> Vec<u8> {
        below(&self.directory(), path)
    }

    /// The request that moves what is not a directory there.
    pub(super) fn take(&self, path: &RelPath) -> Vec<u8> {
        let (from, to) = (below(&self.run.root, path), self.place(path));
        if self.run.session.offers.posix_rename {
            return extended("posix-rename@openssh.com", &[&from, &to]);
        }
        session::request(packet::RENAME).string(&from).string(&to).finish()
    }

    /// Before the steps are done: makes the directories that are needed, and gives what is about to be replaced a further name
    /// in the trash, or moves it where the server makes no hard links. `staged` says where the new version lies; what is not
    /// staged any more was replaced before. Those that may not be moved are given with the reason: they must not be replaced.
    pub(super) fn prepare(&self, steps: &[&Recorded], staged: &dyn Fn(&Recorded) -> Vec<u8>) -> Result<Stuck, Error> {
        let session = &self.run.session;
        let replaced = steps.iter().filter(|one| matches!(one.step, Step::Replace(_)));
        let mut old = Vec::new();
        for one in replaced {
            old.push((one.step.path(), staged(one)));
        }
        let new = session.batch(old.iter().map(|(_, staged)| about(packet::LSTAT, staged)))?;
        let now = session.batch(old.iter().map(|(path, _)| about(packet::LSTAT, &below(&self.run.root, path))))?;
        let is_there = |reply: &Reply| matches!(reply, Reply::Attributes(found) if kind_of(found) != Some(DIRECTORY));
        let both = new.iter().zip(&now).map(|(new, now)| is_there(new) && is_there(now));
        let kept: Vec<&RelPath> = old.iter().zip(both).filter(|(_, both)| *both).map(|((path, _), _)| *path).collect();
        let removed = steps.iter().filter_map(|one| match &one.step {
            Step::RemoveFile(path) => path.parent(),
            Step::RemoveDirectory(path) => Some(path.clone()),
            _ => None,
        });
        let wanted: BTreeSet<RelPath> = removed
            .chain(kept.iter().filter_map(|path| path.parent()))
            .flat_map(|path| path.ancestors().chain([path.clone()]).collect::<Vec<_>>())
            .collect();
        let any = steps.iter().any(|one| one.is_removal()) || !kept.is_empty();
        if !any {
            return Ok(Stuck::new());
        }
        let tops = [at(&self.run.root, TRASH), self.directory()];
        self.make(&tops.into_iter().chain(wanted.iter().map(|path| self.place(path))).collect::<Vec<_>>())?;
        self.keep(session, &kept)
    }

    fn keep(&self, session: &Session, kept: &[&RelPath]) -> Result<Stuck, Error> {
        let links = kept
            .iter()
            .map(|path| extended("hardlink@openssh.com", &[&below(&self.run.root, path), &self.place(path)]));
        let made = session.all(links)?;
        let refused: Vec<&RelPath> =
            kept.iter().zip(made).filter(|(_, made)| made.is_err()).map(|(path, _)| *path).collect();
        // A run that is done again finds them there.
        let there = session.batch(refused.iter().map(|path| about(packet::LSTAT, &self.place(path))))?;
        let mut stuck = Stuck::new();
        for (path, there) in refused.iter().zip(there) {
            if matches!(there, Reply::Attributes(_)) {
                continue;
            }
            // RACE: between this and the step that follows nothing has the name.
            if let Err(refusal) = session.order(self.take(path))? {
                stuck.insert((*path).clone(), refusal);
            }
        }
        Ok(stuck)
    }

    fn make(&self, paths: &[Vec<u8>]) -> Result<(), Error> {
        let session = &self.run.session;
        let made = session.all(paths.iter().map(|path| session::mkdir(path, 0o700)))?;
        let refused: Vec<_> = paths.iter().zip(made).filter_map(|(path, made)| Some((path, made.err()?))).collect();
        // Those that are there already are refused with nothing but "Failure".
        let found = session.batch(refused.iter().map(|(path, _)| about(packet::LSTAT, path)))?;
        for ((path, refusal), found) in refused.iter().zip(found) {
            match found {
                Reply::Attributes(found) if kind_of(&found) == Some(DIRECTORY) => {}
                _ => return Err(session.refused("make the directory", path, refusal)),
            }
        }
        Ok(())
    }

    /// The directories that are about to be removed, from the leaves up, and their modes.
    pub(super) fn directories<'b>(&self, steps: &[&'b Recorded]) -> Result<Vec<(&'b RelPath, u32)>, Error> {
        let removed = steps.iter().filter(|one| matches!(one.step, Step::RemoveDirectory(_)));
        let paths: Vec<&RelPath> = removed.map(|one| one.step.path()).collect();
        let found =
            self.run.session.batch(paths.iter().map(|path| about(packet::LSTAT, &below(&self.run.root, path))))?;
        let modes = paths.into_iter().zip(found).filter_map(|(path, found)| match found {
            Reply::Attributes(found) if kind_of(&found) == Some(DIRECTORY) => Some((path, found.mode? & 0o7777)),
            _ => None,
        });
        Ok(modes.collect())
    }

    /// After the steps were done: gives directories that were removed their modes in the trash.
    pub(super) fn finish(&self, directories: &[(&RelPath, u32)]) -> Result<(), Error> {
        let requests = directories.iter().map(|(path, mode)| {
            let mode = Attributes { mode: Some(*mode), ..Attributes::default() };
            with_attributes(packet::SETSTAT, &self.place(path), &mode)
        });
        // Best effort: whatever mode it has, nobody else gets to it.
        self.run.session.all(requests).map(drop)
    }

    /// Its path below the root, where anything was moved into it.
    pub(super) fn used(&self) -> Result<Option<String>, Error> {
        let found = self.run.session.stat(packet::LSTAT, &self.directory())?;
        Ok(found.is_ok().then(|| format!("{TRASH}/{}", self.name)))
    }
}

fn rule(rules: &[&str]) -> Result<ScanRule, Error> {
    let spec = FilterSpec { rules: rules.iter().map(|&rule| rule.to_owned()).collect(), only: None };
    let filter = Filter::compile(&spec).map_err(|error| Error::Usage(error.to_string()))?;
    Ok(ScanRule::everything(filter))
}

/// Removes what has been in the trash for long enough. What cannot be removed is told, and stays.
pub(super) fn collect(run: &Run, keep_seconds: u64, monitor: &dyn Monitor) -> Result<(), Error> {
    let session = &run.session;
    let trash = at(&run.root, TRASH);
    if session.stat(packet::LSTAT, &trash)?.is_err() {
        return Ok(());
    }
    let tops = list(session, &trash, &rule(&["/*/*"])?, &mut Names::default(), &Silent::default())?.entries;
    let old = |top: &&Entry| is_expired(top.path.as_bytes(), run.started.seconds, keep_seconds);
    for top in tops.iter().filter(old) {
        let path = below(&trash, &top.path);
        let shown = format!("{TRASH}/{}", top.path);
        if let Err(error) = remove(session, &path) {
            if matches!(error, Error::Disconnected { .. }) {
                return Err(error);
            }
            let reason = chain(&error);
            monitor.event(Event::Warning(&format!("'{shown}' is to go, its time in the trash is over: {reason}")));
            continue;
        }
        monitor.event(Event::Detail(&format!("{shown}: its time in the trash is over; removed")));
    }
    Ok(())
}

/// Removes a directory with everything in it.
fn remove(session: &Session, path: &[u8]) -> Result<(), Error> {
    let open_up = Attributes { mode: Some(0o700), ..Attributes::default() };
    let mut entries = list(session, path, &rule(&[])?, &mut Names::default(), &Silent::default())?.entries;
    // What a directory that its owner may not look into holds is found once it is opened up.
    let closed = |entry: &Entry| entry.is_directory() && entry.mode & 0o700 != 0o700;
    let mut depth = 0;
    while entries.iter().any(closed) && depth < 64 {
        let closed = entries.iter().filter(|entry| closed(entry));
        session.all(closed.map(|entry| with_attributes(packet::SETSTAT, &below(path, &entry.path), &open_up)))?;
        entries = list(session, path, &rule(&[])?, &mut Names::default(), &Silent::default())?.entries;
        depth += 1;
    }
    entries.sort_unstable_by(|a, b| b.path.cmp(&a.path));
    let requests = entries.iter().map(|entry| {
        about(if entry.is_directory() { packet::RMDIR } else { packet::REMOVE }, &below(path, &entry.path))
    });
    let refused = session.all(requests.chain([about(packet::RMDIR, path)]))?.into_iter().find_map(Result::err);
    match refused {
        Some(refusal) if !refusal.is_missing() => Err(session.refused("empty", path, &refusal)),
        _ => Ok(()),
    }
}
