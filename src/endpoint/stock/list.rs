//! Lists a tree of a stock server: directories are opened and read many at once.
//!
//! Names and kinds come from READDIR, whose attributes are those of LSTAT: no link is followed. What always holds: a
//! name that is no single component of a path ends the run.

use std::collections::{BTreeMap, BTreeSet, HashSet, VecDeque};
use std::sync::Arc;

use bytes::Bytes;
use crossbeam_channel::{Receiver, Sender, unbounded};

use super::names::Names;
use super::read::read_whole;
use super::session::{self, Name, Refusal, Reply, Session};
use super::{DIRECTORY, REGULAR, SYMLINK, below, kind_of};
use crate::endpoint::Error;
use crate::endpoint::agent::list_bytes_max;
use crate::endpoint::client::Completion;
use crate::error::Escaped;
use crate::filter::{Filter, IGNORE_FILE};
use crate::manifest::{Content, Entry, Timestamp};
use crate::monitor::{Counters, Monitor, Problem, Severity};
use crate::path::RelPath;
use crate::scan::{LinkRule, NOT_REGULAR, ScanRule, stays_inside, unusable};
use crate::wire::sftp::{Attributes, Status, packet};

/// Directories that are open at once.
const OPEN: usize = 192;
/// READDIRs in flight for one directory: at first, so that a small one is read in one flight with its end, and at most.
const FIRST_DEPTH: usize = 3;
const DEPTH: usize = 16;

/// What was found, in no order.
#[derive(Debug, Default)]
pub(super) struct Listed {
    pub(super) entries: Vec<Entry>,
    pub(super) problems: Vec<Problem>,
    /// Files that have further names, as far as the server tells.
    pub(super) shared: HashSet<RelPath>,
    /// It tells of every file.
    pub(super) tells_links: bool,
}

struct Directory {
    path: Option<RelPath>,
    filter: Arc<Filter>,
    handle: Option<Bytes>,
    names: Vec<Name>,
    in_flight: usize,
    depth: usize,
    ended: bool,
}

struct Listing<'a> {
    session: &'a Session,
    root: &'a [u8],
    rule: &'a ScanRule,
    monitor: &'a dyn Monitor,
    sender: Sender<Completion>,
    receiver: Receiver<Completion>,
    waiting: VecDeque<(Option<RelPath>, Arc<Filter>)>,
    open: BTreeMap<u64, Directory>,
    next: u64,
    found: Vec<(RelPath, Attributes, Content)>,
    links: Vec<(RelPath, Attributes)>,
    /// Answers to READLINK, by the place in `links`.
    targets: Vec<Option<Reply>>,
    /// Links whose answers are due.
    reading: usize,
    problems: Vec<Problem>,
    shared: HashSet<RelPath>,
    tells_links: bool,
    /// About what all that was listed takes.
    bytes: usize,
}

/// What a name takes besides itself.
const NAME_BYTES: usize = 200;

/// Tags from here on are of links, by their place; those below of directories.
const LINKS: u64 = 1 << 63;

/// Lists everything beneath `root`. Owners are named as far as the server names them.
///
/// # Errors
/// When the root itself cannot be listed, or the connection ends.
pub(super) fn list(
    session: &Session,
    root: &[u8],
    rule: &ScanRule,
    names: &mut Names,
    monitor: &dyn Monitor,
) -> Result<Listed, Error> {
    list_from(session, root, None, rule, names, monitor)
}

/// The same where the root is `opened` already.
///
/// # Errors
/// As [`list`].
pub(super) fn list_from(
    session: &Session,
    root: &[u8],
    opened: Option<Bytes>,
    rule: &ScanRule,
    names: &mut Names,
    monitor: &dyn Monitor,
) -> Result<Listed, Error> {
    let (sender, receiver) = unbounded();
    let mut listing = Listing {
        session,
        root,
        rule,
        monitor,
        sender,
        receiver,
        waiting: VecDeque::new(),
        open: BTreeMap::new(),
        next: 0,
        found: Vec::new(),
        links: Vec::new(),
        targets: Vec::new(),
        reading: 0,
        problems: Vec::new(),
        shared: HashSet::new(),
        tells_links: true,
        bytes: 0,
    };
    let filter = Arc::new(rule.filter.clone());
    match opened {
        Some(handle) => {
            let number = listing.begin(None, filter);
            listing.settle(number, Reply::Handle(handle))?;
        }
        None => listing.waiting.push_back((None, filter)),
    }
    listing.run()?;
    listing.read_links()?;
    let owners = |pick: fn((u32, u32)) -> u32| -> BTreeSet<u32> {
        listing.found.iter().filter_map(|(_, attributes, _)| attributes.owner.map(pick)).collect()
    };
    names.learn(session, &owners(|owner| owner.0), &owners(|owner| owner.1))?;
    let entries = listing.found.into_iter().map(|(path, attributes, content)| {
        let (uid, gid) = attributes.owner.unwrap_or_default();
        let seconds = attributes.times.map_or(0, |(_, modified)| modified.into());
        let mode = match content {
            Content::Symlink { .. } => 0o777,
            _ => attributes.mode.unwrap_or_default() & 0o7777,
        };
        let (owner, group) = (names.user(uid), names.group(gid));
        Entry { path, content, mtime: Timestamp { seconds, nanoseconds: 0 }, mode, owner, group }
    });
    let (shared, tells_links) = (listing.shared, listing.tells_links);
    Ok(Listed { entries: entries.collect(), problems: listing.problems, shared, tells_links })
}

fn failed(path: Option<RelPath>, message: String) -> Problem {
    Problem { path, message, severity: Severity::Failed }
}

impl Listing<'_> {
    fn run(&mut self) -> Result<(), Error> {
        loop {
            while self.open.len() < OPEN.min(self.session.handles())
                && let Some((path, filter)) = self.waiting.pop_front()
            {
                let at = self.absolute(path.as_ref());
                let number = self.begin(path, filter);
                self.session.client.submit(session::about(packet::OPENDIR, &at), 0, number, &self.sender)?;
            }
            if self.open.is_empty() && self.reading == 0 {
                return Ok(());
            }
            let completion = self.session.client.wait(&self.receiver, false)?;
            let (number, reply) = self.session.completed(completion)?;
            match number.checked_sub(LINKS) {
                Some(link) => {
                    self.reading -= 1;
                    self.targets[link as usize] = Some(reply);
                }
                None => self.settle(number, reply)?,
            }
        }
    }

    /// A directory whose OPENDIR is to be answered; gives its number.
    fn begin(&mut self, path: Option<RelPath>, filter: Arc<Filter>) -> u64 {
        let number = self.next;
        self.next += 1;
        let (names, handle) = (Vec::new(), None);
        let directory = Directory { path, filter, handle, names, in_flight: 1, depth: FIRST_DEPTH, ended: false };
        self.open.insert(number, directory);
        number
    }

    fn absolute(&self, path: Option<&RelPath>) -> Vec<u8> {
        match path {
            Some(path) => below(self.root, path),
            None if self.root.is_empty() => b"/".to_vec(),
            None => self.root.to_vec(),
        }
    }

    fn settle(&mut self, number: u64, reply: Reply) -> Result<(), Error> {
        let Some(directory) = self.open.get_mut(&number) else { return Ok(()) };
        directory.in_flight -= 1;
        match reply {
            Reply::Handle(handle) if directory.handle.is_none() => directory.handle = Some(handle),
            Reply::Names(names) if directory.handle.is_some() => {
                directory.depth = (directory.depth * 2).min(DEPTH);
                Counters::add(&self.monitor.counters().scanned_entries, names.len() as u64);
                self.bytes += names.iter().map(|name| name.name.len() + NAME_BYTES).sum::<usize>();
                if self.bytes > list_bytes_max() {
                    return Err(self.session.client.protocol("a list without an end".to_owned()));
                }
                directory.names.extend(names);
            }
            Reply::Refused(refusal) => {
                let path = directory.path.clone();
                let (opened, first) = (directory.handle.is_some(), !directory.ended);
                directory.ended = true;
                if !(opened && refusal.status == Status::EndOfFile) && first {
                    self.unlistable(path, &refusal)?;
                }
            }
            _ => return Err(self.session.odd()),
        }
        let Some(directory) = self.open.get_mut(&number) else { return Ok(()) };
        if let Some(handle) = directory.handle.clone() {
            while !directory.ended && directory.in_flight < directory.depth {
                directory.in_flight += 1;
                let request = session::about(packet::READDIR, &handle);
                self.session.client.submit(request, 0, number, &self.sender)?;
            }
        }
        if directory.ended && directory.in_flight == 0 {
            let Some(directory) = self.open.remove(&number) else { return Ok(()) };
            if let Some(handle) = &directory.handle {
                self.session.forget(session::about(packet::CLOSE, handle))?;
            }
            self.children(directory)?;
        }
        Ok(())
    }

    fn unlistable(&mut self, path: Option<RelPath>, refusal: &Refusal) -> Result<(), Error> {
        match path {
            None => Err(self.session.refused("list", &self.absolute(None), refusal)),
            // RACE: removed since its parent was read; it is not there any more, and that is all there is to say.
            Some(_) if refusal.is_missing() => Ok(()),
            Some(path) => {
                self.problems.push(failed(Some(path), format!("cannot list the directory: {refusal}")));
                Ok(())
            }
        }
    }

    /// What a directory that was read to its end holds.
    fn children(&mut self, mut directory: Directory) -> Result<(), Error> {
        if !directory.names.iter().any(|name| name.name == b".") {
            // OpenSSH's server leaves out what it cannot look at, without a word: all of a directory that may be read and not entered.
            let own = [&self.absolute(directory.path.as_ref())[..], b"/."].concat();
            if let Err(refusal) = self.session.stat(packet::LSTAT, &own)?
                && !refusal.is_missing()
            {
                return self.unlistable(directory.path, &refusal);
            }
        }
        directory.names.retain(|name| name.name != b"." && name.name != b"..");
        let mut paths = Vec::with_capacity(directory.names.len());
        for name in &directory.names {
            let path = match &directory.path {
                Some(parent) => parent.join(&name.name),
                None => RelPath::new(&name.name),
            };
            let sound = !name.name.contains(&b'/');
            let path = path.ok().filter(|_| sound).ok_or_else(|| {
                let (name, at) = (Escaped(&name.name), self.absolute(directory.path.as_ref()));
                self.session.client.protocol(format!("it lists the name '{name}' in '{}'", Escaped(&at)))
            })?;
            paths.push(path);
        }
        self.complete(&mut directory.names, &paths)?;
        let filter = match self.own_filter(&directory)? {
            Ok(filter) => filter,
            // What it is to leave out must not be sent.
            Err(problem) => {
                self.problems.push(problem);
                return Ok(());
            }
        };
        for (name, path) in directory.names.into_iter().zip(paths) {
            let kind = kind_of(&name.attributes);
            if !filter.admits(&path, kind == Some(DIRECTORY)) {
                continue;
            }
            match kind {
                // It went between READDIR and LSTAT.
                None => {}
                Some(DIRECTORY) => {
                    self.waiting.push_back((Some(path.clone()), Arc::clone(&filter)));
                    self.found.push((path, name.attributes, Content::Directory));
                }
                Some(REGULAR) => {
                    let size = name.attributes.size.unwrap_or_default();
                    self.tells_links &= name.links.is_some();
                    if name.links.is_some_and(|links| links > 1) {
                        self.shared.insert(path.clone());
                    }
                    self.found.push((path, name.attributes, Content::File { size, digest: None }));
                }
                Some(SYMLINK) => self.read_link(path, name.attributes)?,
                Some(_) if self.rule.report_special => self.problems.push(Problem {
                    path: Some(path),
                    message: "is a FIFO, socket or device, which cannot be sent".into(),
                    severity: Severity::Skipped,
                }),
                Some(_) => {}
            }
        }
        Ok(())
    }

    /// Asks for the attributes that READDIR did not give.
    fn complete(&self, names: &mut [Name], paths: &[RelPath]) -> Result<(), Error> {
        let lacking = |attributes: &Attributes| attributes.mode.is_none() || attributes.times.is_none();
        let lacks: Vec<usize> = (0..names.len()).filter(|&at| lacking(&names[at].attributes)).collect();
        let requests = lacks.iter().map(|&at| session::about(packet::LSTAT, &below(self.root, &paths[at])));
        for (reply, &at) in self.session.batch(requests)?.into_iter().zip(&lacks) {
            names[at].attributes = match reply {
                Reply::Attributes(attributes) => attributes,
                _ => Attributes::default(),
            };
        }
        Ok(())
    }

    /// The directory's filter, with its `.lockstepignore` where it has one.
    fn own_filter(&mut self, directory: &Directory) -> Result<Result<Arc<Filter>, Problem>, Error> {
        let own = directory.names.iter().find(|name| name.name == IGNORE_FILE);
        let Some(own) = own.filter(|_| self.rule.ignore_files) else { return Ok(Ok(Arc::clone(&directory.filter))) };
        let path = directory.path.as_ref();
        match kind_of(&own.attributes) {
            // It went between READDIR and LSTAT: whatever takes its place is to be heeded.
            None => return Ok(Err(unusable(path, "it is not there any more; run again"))),
            Some(REGULAR) => {}
            Some(_) => return Ok(Err(unusable(path, NOT_REGULAR))),
        }
        let file = [&self.absolute(path)[..], b"/", IGNORE_FILE].concat();
        let filter = match read_whole(self.session, &file)? {
            Err(refusal) => Err(refusal.to_string()),
            Ok(text) => String::from_utf8(text)
                .map_err(|error| error.to_string())
                .and_then(|text| directory.filter.with_ignore_file(path, &text).map_err(|error| error.to_string())),
        };
        Ok(filter.map(Arc::new).map_err(|reason| unusable(path, &reason)))
    }

    /// Asks for a link's target, while the listing goes on.
    fn read_link(&mut self, path: RelPath, attributes: Attributes) -> Result<(), Error> {
        let request = session::about(packet::READLINK, &below(self.root, &path));
        self.session.client.submit(request, 0, LINKS + self.links.len() as u64, &self.sender)?;
        self.links.push((path, attributes));
        self.targets.push(None);
        self.reading += 1;
        Ok(())
    }

    fn read_links(&mut self) -> Result<(), Error> {
        let (links, replies) = (std::mem::take(&mut self.links), std::mem::take(&mut self.targets));
        for ((path, attributes), reply) in links.into_iter().zip(replies) {
            let Some(reply) = reply else { continue };
            let target = match reply {
                Reply::Names(mut names) if names.len() == 1 => names.remove(0).name,
                Reply::Refused(refusal) if refusal.is_missing() => continue,
                Reply::Refused(refusal) => {
                    self.problems.push(failed(Some(path), format!("read the link: {refusal}")));
                    continue;
                }
                _ => return Err(self.session.odd()),
            };
            let shown = Escaped(&target).to_string();
            let skipped = |message| Problem { path: Some(path.clone()), message, severity: Severity::Skipped };
            match self.rule.links {
                LinkRule::Refuse => {
                    self.problems.push(failed(Some(path), format!("is a symbolic link (to '{shown}')")));
                }
                LinkRule::Skip => self.problems.push(skipped(format!("is a symbolic link (to '{shown}')"))),
                LinkRule::Safe if !stays_inside(&path, &target) => self.problems.push(skipped(format!(
                    "is a symbolic link out of the tree (to '{shown}'); --links=all sends it as it is"
                ))),
                LinkRule::Safe | LinkRule::All => {
                    self.found.push((path, attributes, Content::Symlink { target: target.into() }));
                }
            }
        }
        Ok(())
    }
}
