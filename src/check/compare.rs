//! Each listed path with what is there, and what is there with the list. Answers which files have to be read.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;

use super::list::{Expected, List, Listed, Loaded};
use super::sample::choose;
use super::{Depth, Finding, Kind, Options, Report, now, takes_part};
use crate::error::Escaped;
use crate::filter::Filter;
use crate::manifest::{Digest, Timestamp};
use crate::monitor::Severity;
use crate::path::RelPath;
use crate::root::{FileKind, Follow, Metadata, Root};
use crate::scan::Scanned;
use crate::scan::blocks::BLOCK_BYTES;
use crate::scan::cache::DigestTable;
use crate::staging::load_digests;

/// A file that is to be read, under all its listed names.
pub(super) struct Job {
    pub(super) path: RelPath,
    pub(super) follow: Follow,
    pub(super) seen: Metadata,
    pub(super) names: Vec<(RelPath, Digest)>,
    /// The blocks that are read of it, by number, with their checksums; `None` for the whole file.
    pub(super) blocks: Option<Vec<(u64, u32)>>,
}

impl Job {
    /// How much is read.
    pub(super) fn bytes(&self) -> u64 {
        self.blocks.as_ref().map_or(self.seen.size, |blocks| (blocks.len() as u64 * BLOCK_BYTES).min(self.seen.size))
    }
}

/// A listed file whose metadata is right.
struct Candidate<'a> {
    path: &'a RelPath,
    digest: Digest,
    mtime: Option<Timestamp>,
    follow: Follow,
    found: Metadata,
}

pub(super) struct Compare<'a> {
    root: &'a Root,
    options: &'a Options,
    list: &'a List,
    loaded: &'a Loaded,
    filter: &'a Filter,
    scanned: &'a Scanned,
    table: DigestTable,
    candidates: Vec<Candidate<'a>>,
    /// The first of the scanned entries that is not before the listed one that is looked at.
    next: usize,
}

impl<'a> Compare<'a> {
    pub(super) fn new(
        root: &'a Root,
        options: &'a Options,
        list: &'a List,
        loaded: &'a Loaded,
        filter: &'a Filter,
        scanned: &'a Scanned,
    ) -> Compare<'a> {
        let table = load_digests(root);
        Compare { root, options, list, loaded, filter, scanned, table, candidates: Vec::new(), next: 0 }
    }

    /// Compares what can be compared without reading.
    pub(super) fn paths(&mut self, report: &mut Report) {
        let (mut unread, mut special) = (HashMap::<&RelPath, u64>::new(), HashSet::new());
        for problem in &self.scanned.problems {
            let Some(path) = &problem.path else {
                let (path, message) = (PathBuf::from("."), problem.message.clone());
                report.findings.push(Finding { path, kind: Kind::Unreadable, message });
                continue;
            };
            if problem.severity == Severity::Skipped {
                special.insert(path);
            } else {
                unread.insert(path, 0);
            }
        }
        let mut listed = HashSet::new();
        for entry in &self.list.entries {
            let directory = matches!(entry.expected, Expected::Directory);
            if !takes_part(self.filter, &entry.path, directory) {
                continue;
            }
            listed.insert(&entry.path);
            if self.options.all_paths {
                report.paths.push(entry.path.as_path().to_owned());
            }
            if let Expected::File { size, .. } = entry.expected {
                report.all.add(size.unwrap_or(0));
            }
            let mut ancestors = entry.path.ancestors();
            let above = match unread.is_empty() {
                true => None,
                false => ancestors.find_map(|above| unread.get_key_value(&above).map(|found| *found.0)),
            };
            match above {
                _ if unread.contains_key(&entry.path) && !directory => {}
                Some(above) => *unread.entry(above).or_default() += 1,
                None => self.path(entry, report),
            }
        }
        for problem in self.scanned.problems.iter().filter(|problem| problem.severity == Severity::Failed) {
            let Some(path) = &problem.path else { continue };
            let mut message = problem.message.clone();
            if let Some(count @ 1..) = unread.get(path) {
                let beneath = crate::error::counted(*count, "listed path", "listed paths");
                message += &format!("; {beneath} beneath could not be looked at");
            }
            report.findings.push(Finding { path: path.as_path().to_owned(), kind: Kind::Unreadable, message });
        }
        if !self.options.allow_unlisted {
            self.unlisted(&listed, &special, report);
        }
    }

    fn unlisted(&self, listed: &HashSet<&RelPath>, special: &HashSet<&RelPath>, report: &mut Report) {
        let own: Vec<RelPath> = self.options.own.iter().filter_map(|file| self.inside(file)).collect();
        let excused =
            |path: &RelPath| listed.contains(path) || own.contains(path) || self.loaded.inside.as_ref() == Some(path);
        let mut unproven = Vec::new();
        let entries = self.scanned.tree.entries().iter().map(|entry| (&entry.path, Some(&entry.content)));
        for (path, content) in entries.chain(special.iter().map(|path| (*path, None))) {
            if excused(path) {
                continue;
            }
            if !self.list.scope.covers(self.root, path, content) {
                unproven.extend(self.list.scope.leaves_out(path, content).then_some(path));
                continue;
            }
            let message = "lies there, and the list does not have it".to_owned();
            report.findings.push(Finding { path: path.as_path().to_owned(), kind: Kind::Unlisted, message });
        }
        if let Some(first) = unproven.first() {
            let paths = crate::error::counted(unproven.len() as u64, "path", "paths");
            report
                .notes
                .push(format!("the signature leaves out {paths} ('{first}' first): nothing proves what is there"));
        }
    }

    fn inside(&self, file: &std::path::Path) -> Option<RelPath> {
        self.root.path_of(&std::fs::File::open(file).ok()?).ok().flatten()
    }

    /// Where a path is in what was scanned. Paths are asked for in order.
    fn position(&mut self, path: &RelPath) -> Option<usize> {
        let entries = self.scanned.tree.entries();
        while entries.get(self.next).is_some_and(|entry| entry.path < *path) {
            self.next += 1;
        }
        entries.get(self.next).is_some_and(|entry| entry.path == *path).then_some(self.next)
    }

    fn path(&mut self, listed: &'a Listed, report: &mut Report) {
        let mut wrong = |kind, message: String| {
            report.findings.push(Finding { path: listed.path.as_path().to_owned(), kind, message });
        };
        let at = self.position(&listed.path);
        let mut found = at.and_then(|at| self.scanned.metadata.get(at)).copied();
        let mut follow = Follow::Never;
        if self.list.scope.follows() && found.is_none_or(|found| found.kind == FileKind::Symlink) {
            follow = Follow::Beneath;
            found = None;
        }
        let found = match found {
            Some(found) => found,
            None => match self.root.stat(&listed.path, follow) {
                Ok(found) => found,
                Err(error) if matches!(error.errno(), Some(2 | 20)) => {
                    return wrong(Kind::Missing, "is listed, and not there".to_owned());
                }
                Err(error) => return wrong(Kind::Unreadable, crate::error::chain(&error)),
            },
        };
        let kind = match &listed.expected {
            Expected::File { .. } => FileKind::Regular,
            Expected::Directory => FileKind::Directory,
            Expected::Link(_) => FileKind::Symlink,
        };
        if found.kind != kind {
            return wrong(Kind::WrongKind, format!("is a {}, and should be a {}", found.kind.name(), kind.name()));
        }
        if let (Some(wanted), Some(at)) = (listed.permissions.as_ref().filter(|_| !self.options.ignore_permissions), at)
        {
            let is = &self.scanned.tree.entries()[at];
            if found.mode != wanted.mode {
                let message = format!("is {:04o}, and should be {:04o}", found.mode, wanted.mode);
                wrong(Kind::WrongMode, message);
            }
            for (kind, is, wanted) in
                [(Kind::WrongOwner, &is.owner, &wanted.owner), (Kind::WrongGroup, &is.group, &wanted.group)]
            {
                if is != wanted {
                    let (is, wanted) = (Escaped(is.as_bytes()), Escaped(wanted.as_bytes()));
                    wrong(kind, format!("is {is}, and should be {wanted}"));
                }
            }
        }
        match &listed.expected {
            Expected::Directory => {}
            Expected::Link(target) => match self.root.read_link(&listed.path) {
                Ok(is) if is[..] == target[..] => {}
                Ok(is) => {
                    let message = format!("leads to '{}', and should lead to '{}'", Escaped(&is), Escaped(target));
                    wrong(Kind::WrongLink, message);
                }
                Err(error) => wrong(Kind::Unreadable, crate::error::chain(&error)),
            },
            Expected::File { size: Some(size), .. } if *size != found.size => {
                wrong(Kind::WrongSize, format!("has {} bytes, and should have {size}", found.size));
            }
            Expected::File { digest, mtime, size } => {
                if size.is_none() {
                    report.all.bytes = report.all.bytes.saturating_add(found.size);
                }
                let (path, digest, mtime) = (&listed.path, *digest, *mtime);
                self.candidates.push(Candidate { path, digest, mtime, follow, found });
            }
        }
    }

    /// Decides for each file whether it has to be read; what has not is counted as what it is.
    pub(super) fn finish(self, report: &mut Report) -> Vec<Job> {
        let mut chosen = HashSet::new();
        if let Depth::Sample(percent) = self.options.depth {
            // A file whose blocks are known is looked at in some of them.
            let whole: Vec<usize> = (0..self.candidates.len())
                .filter(|&index| self.table.blocks(&self.candidates[index].found).is_none())
                .collect();
            chosen.extend(choose(whole.len(), percent).into_iter().map(|at| whole[at]));
        }
        let mut jobs: Vec<Job> = Vec::new();
        let mut inodes: HashMap<(u64, u64), usize> = HashMap::new();
        for (index, candidate) in self.candidates.iter().enumerate() {
            let Candidate { path, digest, follow, found, .. } = candidate;
            let asked = chosen.contains(&index) || self.options.read.contains(*path);
            let mut blocks = None;
            if !asked && self.may_stay_unread(candidate, report) {
                blocks = self.some_blocks(found);
                if blocks.is_none() {
                    continue;
                }
            }
            if found.links > 1
                && let Some(&job) = inodes.get(&(found.device, found.inode))
            {
                let job: &mut Job = &mut jobs[job];
                job.names.push(((*path).clone(), *digest));
                // Under another name it has to be read whole: then that is enough.
                job.blocks = job.blocks.take().filter(|_| blocks.is_some());
                continue;
            }
            inodes.insert((found.device, found.inode), jobs.len());
            let names = vec![((*path).clone(), *digest)];
            jobs.push(Job { path: (*path).clone(), follow: *follow, seen: *found, names, blocks });
        }
        jobs
    }

    /// A choice of the blocks of a large file, one at least, where a sample is asked for and they are known.
    fn some_blocks(&self, found: &Metadata) -> Option<Vec<(u64, u32)>> {
        let Depth::Sample(percent) = self.options.depth else { return None };
        let blocks = self.table.blocks(found)?;
        let mut some: Vec<_> =
            choose(blocks.len(), percent).into_iter().map(|index| (index as u64, blocks[index])).collect();
        some.sort_unstable();
        Some(some)
    }

    fn may_stay_unread(&self, candidate: &Candidate<'_>, report: &mut Report) -> bool {
        let Candidate { digest, mtime, found, .. } = candidate;
        if self.options.depth == Depth::Full {
            return false;
        }
        if let Some(known) = self.table.known(found) {
            let too_old = self.options.max_age.is_some_and(|most| {
                known.hashed.is_none_or(|hashed| now().checked_sub(hashed).is_none_or(|age| age > most.as_secs()))
            });
            // Another digest than the listed one is not believed: the file is read.
            if known.digest != *digest || too_old {
                return false;
            }
            report.vouched.add(found.size);
            match known.hashed {
                Some(hashed) => report.oldest = Some(report.oldest.map_or(hashed, |oldest| oldest.min(hashed))),
                None => report.undated_files += 1,
            }
            return true;
        }
        // Where there is a table, a file that it does not know is one that was put there, or touched, since.
        if self.options.depth == Depth::Default || !self.table.is_empty() || self.options.max_age.is_some() {
            return false;
        }
        // The time of change cannot be put back: what changed after the list came here was touched since.
        let before = self.loaded.metadata.is_some_and(|list| found.ctime < list.ctime);
        if *mtime != Some(found.mtime) || !before {
            return false;
        }
        report.unread.add(found.size);
        true
    }
}
