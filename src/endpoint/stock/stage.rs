//! Before content comes: what an earlier run left to go on with, and the directories to stage in.

use std::collections::{BTreeSet, HashMap, HashSet};

use bytes::Bytes;

use super::append::TAILS;
use super::list::list;
use super::names::Names;
use super::place::{make_private, must_be_private, private};
use super::read::read_whole;
use super::session::{self, Reply, Session, about, extended, with_attributes};
use super::shell::Job;
use super::target::{Run, STAGING_ABOVE, locked};
use super::{DIRECTORY, SPREAD_FROM, at, below, kind_of, lag};
use crate::endpoint::Error;
use crate::error::Escaped;
use crate::filter::{Filter, FilterSpec};
use crate::manifest::{Content, Tree};
use crate::monitor::{Event, Monitor, Silent};
use crate::path::RelPath;
use crate::plan::{Action, Change, Need, Plan};
use crate::scan::ScanRule;
use crate::staging::Journal;
use crate::wire::sftp::{Attributes, open, packet};

const JOURNAL: &str = "plan";
/// A partial file is gone on with from a multiple of this.
const RESUME_UNIT: u64 = 64 << 10;

/// What is known of the staging area.
#[derive(Debug, Default)]
pub(super) struct Area {
    /// There is one of an earlier run, whose content is not known.
    pub(super) left: bool,
    /// This run has made it, or taken it over.
    made: bool,
    /// What this run has said that it stages.
    journal: Journal,
    /// What was put at the end of files, by its name below [`TAILS`].
    pub(super) tails: Vec<u32>,
    /// Directories that this run has made in it, below it and from the top.
    directories: Vec<Vec<u8>>,
}

impl Area {
    /// There is one, of this run or of another.
    pub(super) fn is_there(&self) -> bool {
        self.left || self.made
    }
}

/// Finds what an earlier run left to go on with, drops the rest, and makes the staging directories, where anything is to be
/// staged. Gives whether large files may be written out of their order, as far as [`lag`] allows.
pub(super) fn prepare(run: &Run, source: &Tree, plan: &mut Plan, monitor: &dyn Monitor) -> Result<bool, Error> {
    let found = locked(&run.area).left;
    let is_staged = |action: &Action| action.change != Change::MetadataOnly || action.need != Need::Nothing;
    if !found && !plan.actions.iter().any(is_staged) {
        return Ok(false);
    }
    let (mut left, mut journal) = (Left::default(), Journal::default());
    if found {
        left = left_behind(run)?;
        if let Ok(bytes) = read_whole(&run.session, &at(&run.staging, JOURNAL))? {
            journal = Journal::decode(&bytes);
        }
    }
    let mut files = Vec::new();
    let mut wanted: BTreeSet<Vec<u8>> = BTreeSet::new();
    let mut resumed: HashSet<Vec<u8>> = HashSet::new();
    let mut cut: Vec<(Vec<u8>, u64)> = Vec::new();
    for action in &mut plan.actions {
        let entry = &source.entries()[action.index as usize];
        let staged = run.staged_name(&entry.path, entry.is_directory());
        if let Content::File { size, .. } = entry.content
            && action.need != Need::Nothing
        {
            let found = left.files.get(&staged).copied().unwrap_or(0);
            if journal.lists(&entry.path, size, entry.mtime) && found <= size {
                let resume_at = match found {
                    // The end of a file is written when the rest of it is.
                    found if found == size => size,
                    found => match journal.begun(&entry.path).filter(|_| size >= SPREAD_FROM) {
                        Some(begun) if begun <= found => (begun + lag::sure(found - begun)) / RESUME_UNIT * RESUME_UNIT,
                        _ => found / RESUME_UNIT * RESUME_UNIT,
                    },
                };
                // That something is staged of a file that was to be compared says that it was found to differ.
                if resume_at > 0 {
                    action.need = Need::Content { resume_at };
                    resumed.insert(staged.clone());
                    if resume_at < found {
                        cut.push((staged.clone(), resume_at));
                    }
                }
            }
            let begun = if let Need::Content { resume_at } = action.need { resume_at } else { 0 };
            files.push(((entry.path.clone(), size, entry.mtime), begun));
        }
        if !is_staged(action) {
            continue;
        }
        let deepest =
            if entry.is_directory() { staged.len() } else { staged.iter().rposition(|&b| b == b'/').unwrap_or(0) };
        for end in (0..=deepest).filter(|&end| end == staged.len() || staged[end] == b'/') {
            if wanted.contains(&staged[..end]) {
                continue;
            }
            wanted.insert(staged[..end].to_vec());
        }
    }
    wanted.insert(b"tree".to_vec());
    let may_grow = |action: &Action| {
        let entry = &source.entries()[action.index as usize];
        action.need != Need::Nothing && entry.file().is_some() && run.growing.mean(&entry.path, false)
    };
    if plan.actions.iter().any(may_grow) {
        wanted.insert(TAILS.as_bytes().to_vec());
    }
    let session = &run.session;
    let spreads = run.lanes.may_spread();
    let journal = match spreads {
        true => Journal::spread(files),
        false => Journal::new(files.into_iter().map(|(file, _)| file)),
    };
    let text = journal.encode();
    let own = OwnFile::new(&run.staging, JOURNAL);
    let mut replies = session.batch(area(run).iter().flat_map(|path| private(path)).chain(own.open()))?.into_iter();
    area(run).iter().try_for_each(|path| must_be_private(session, path, &mut replies))?;
    let handle = own.opened(session, &mut replies)?;
    locked(&run.area).made = true;
    locked(&run.area).journal = journal;
    let inherited = std::thread::scope(|scope| {
        let inherited = scope.spawn(|| inherit_nothing(run, monitor));
        own.written(session, session.all(own.write(session, &handle, &text))?)?;
        Ok::<_, Error>(inherited.join().is_ok())
    })?;
    if !inherited {
        return Err(Error::Usage("an internal error stopped the staging".into()));
    }
    // Before the new list counts: a run that ends before it has opened them would have it say of what lies there now what it does not know.
    let cuts = cut.iter().map(|(staged, size)| {
        let size = Attributes { size: Some(*size), ..Attributes::default() };
        with_attributes(packet::SETSTAT, &[&run.staging[..], b"/", staged].concat(), &size)
    });
    // One that cannot be cut cannot be gone on with, which says itself.
    let _ = session.all(cuts)?;
    drop_leftovers(run, &left, &resumed, &wanted)?;
    make_directories(run, &own, &wanted)?;
    locked(&run.area).directories = wanted.into_iter().collect();
    Ok(spreads)
}

/// Says of these files that they are not staged any more: what the next run finds of them it removes.
pub(super) fn unlist<'a>(run: &Run, paths: impl Iterator<Item = &'a RelPath>) -> Result<(), Error> {
    let mut area = locked(&run.area);
    area.journal = std::mem::take(&mut area.journal).without(paths);
    store(&run.session, &run.staging, JOURNAL, &area.journal.encode())
}

/// The directories of the area, from the top.
fn area(run: &Run) -> [Vec<u8>; 2] {
    [at(&run.root, STAGING_ABOVE), run.staging.clone()]
}

/// Makes the staging area, where this run has not done so.
pub(super) fn make_area(run: &Run, monitor: &dyn Monitor) -> Result<(), Error> {
    if locked(&run.area).made {
        return Ok(());
    }
    let paths = area(run);
    make_private(&run.session, &[&paths[0], &paths[1]])?;
    locked(&run.area).made = true;
    inherit_nothing(run, monitor);
    Ok(())
}

/// A default ACL of the directory above would be inherited, and wake up when a file gets its mode. Without a command nobody
/// can take it away: `docs/security.md` says so.
fn inherit_nothing(run: &Run, monitor: &dyn Monitor) {
    if let Some(shell) = run.shell().running() {
        let hidden = run.rename_to.as_ref().map(|_| run.root.as_slice());
        let paths: Vec<&[u8]> = hidden.into_iter().chain([run.staging.as_slice()]).collect();
        if let Err(reason) = shell.run(Job::NoAcl, &paths) {
            let host = run.session.client.host();
            monitor.event(Event::Detail(&format!("{host}:{}: default ACLs are left: {reason}", Escaped(&run.root))));
        }
    }
}

/// Removes the staging area with everything in it. What stays is in nobody's way: the next run removes it.
pub(super) fn clear(run: &Run) -> Result<(), Error> {
    let area = std::mem::take(&mut *locked(&run.area));
    if !area.is_there() {
        return Ok(());
    }
    let directories = area.directories;
    let session = &run.session;
    let whole = |path: &[u8]| [&run.staging[..], b"/", path].concat();
    let files = [super::publish::RECORD, super::manifest_file::NEW_MANIFEST, JOURNAL];
    let removed = files.iter().map(|name| about(packet::REMOVE, &at(&run.staging, name)));
    let removed = removed.chain(area.tails.iter().map(|&number| about(packet::REMOVE, &run.tail_path(number))));
    let emptied = directories.iter().rev().map(|path| about(packet::RMDIR, &whole(path)));
    let last = about(packet::RMDIR, &run.staging);
    // What was staged has its name by now, mostly, and then there is nothing to look for.
    if session.all(removed.chain(emptied).chain([last]))?.pop().is_some_and(|last| last.is_ok()) {
        return Ok(());
    }
    let filter = Filter::compile(&FilterSpec::default()).map_err(|error| Error::Usage(error.to_string()))?;
    let rule = ScanRule::everything(filter);
    let mut entries = list(session, &run.staging, &rule, &mut Names::default(), &Silent::default())?.entries;
    entries.sort_unstable_by(|a, b| b.path.cmp(&a.path));
    let requests = entries.iter().map(|entry| {
        let kind = if entry.is_directory() { packet::RMDIR } else { packet::REMOVE };
        about(kind, &below(&run.staging, &entry.path))
    });
    let _ = session.all(requests.chain([about(packet::RMDIR, &run.staging)]))?;
    Ok(())
}

/// What lies in the staging area: paths below it.
#[derive(Default)]
struct Left {
    /// Regular files with their size.
    files: HashMap<Vec<u8>, u64>,
    /// Links and whatever else.
    others: Vec<Vec<u8>>,
    directories: BTreeSet<Vec<u8>>,
}

fn left_behind(run: &Run) -> Result<Left, Error> {
    let mut left = Left::default();
    let filter = Filter::compile(&FilterSpec::default()).map_err(|error| Error::Usage(error.to_string()))?;
    let rule = ScanRule::everything(filter);
    for top in ["tree", "last", TAILS] {
        let root = at(&run.staging, top);
        if run.session.stat(packet::LSTAT, &root)?.is_err() {
            continue;
        }
        left.directories.insert(top.as_bytes().to_vec());
        for entry in list(&run.session, &root, &rule, &mut Names::default(), &Silent::default())?.entries {
            let path = [top.as_bytes(), b"/", entry.path.as_bytes()].concat();
            match entry.content {
                Content::File { size, .. } => drop(left.files.insert(path, size)),
                Content::Directory => drop(left.directories.insert(path)),
                _ => left.others.push(path),
            }
        }
    }
    Ok(left)
}

fn drop_leftovers(run: &Run, left: &Left, keep: &HashSet<Vec<u8>>, wanted: &BTreeSet<Vec<u8>>) -> Result<(), Error> {
    let whole = |path: &Vec<u8>| [&run.staging[..], b"/", path].concat();
    // What was about to be published may have its last mode already.
    let private = Attributes { mode: Some(0o700), ..Attributes::default() };
    let open_up = left.directories.iter().map(|path| with_attributes(packet::SETSTAT, &whole(path), &private));
    let files = left.files.keys().filter(|path| !keep.contains(*path)).chain(&left.others);
    let removed = files.map(|path| about(packet::REMOVE, &whole(path)));
    let directories = left.directories.iter().rev().filter(|path| !wanted.contains(*path));
    let emptied = directories.map(|path| about(packet::RMDIR, &whole(path)));
    let results = run.session.all(open_up.chain(removed).chain(emptied))?;
    match results.into_iter().skip(left.directories.len()).find_map(Result::err) {
        Some(refusal) if !refusal.is_missing() => {
            Err(run.session.refused("remove what an earlier run left in", &run.staging, &refusal))
        }
        _ => Ok(()),
    }
}

/// Gives the journal its name and makes the directories, in one flight where the server renames over what is there.
fn make_directories(run: &Run, journal: &OwnFile, wanted: &BTreeSet<Vec<u8>>) -> Result<(), Error> {
    let session = &run.session;
    // A directory sorts before what lies below it.
    let paths: Vec<Vec<u8>> = wanted.iter().map(|path| [&run.staging[..], b"/", path].concat()).collect();
    let naming = journal.naming(session);
    if naming.is_none() {
        journal.name(session)?;
    }
    let named = usize::from(naming.is_some());
    let mut made = session.all(naming.into_iter().chain(paths.iter().map(|path| session::mkdir(path, 0o700))))?;
    if let Some(refusal) = made.drain(..named).find_map(Result::err) {
        return Err(journal.unnamed(session, &refusal));
    }
    let refused: Vec<_> = paths.iter().zip(made).filter_map(|(path, made)| Some((path, made.err()?))).collect();
    // Those that are there already are refused with nothing but "Failure".
    let found = run.session.batch(refused.iter().map(|(path, _)| about(packet::LSTAT, path)))?;
    for ((path, refusal), found) in refused.iter().zip(found) {
        match found {
            Reply::Attributes(found) if kind_of(&found) == Some(DIRECTORY) => {}
            _ => return Err(run.session.refused("make the directory", path, refusal)),
        }
    }
    Ok(())
}

/// A file of our own that is written beside its name, brought to stable storage and given its name, in three flights: each
/// may have other requests with it.
pub(super) struct OwnFile {
    path: Vec<u8>,
    new: Vec<u8>,
}

impl OwnFile {
    pub(super) fn new(directory: &[u8], name: &str) -> OwnFile {
        OwnFile { path: at(directory, name), new: at(directory, format!("{name}.new")) }
    }

    /// The first flight.
    pub(super) fn open(&self) -> [Vec<u8>; 2] {
        let open = session::open(&self.new, open::WRITE | open::CREATE | open::EXCLUSIVE);
        [about(packet::REMOVE, &self.new), open]
    }

    /// The handle that it gives.
    pub(super) fn opened(&self, session: &Session, replies: &mut impl Iterator<Item = Reply>) -> Result<Bytes, Error> {
        match (replies.next(), replies.next()) {
            (Some(Reply::Done | Reply::Refused(_)), Some(reply)) => {
                session.handle(reply)?.map_err(|refusal| session.refused("make", &self.new, &refusal))
            }
            _ => Err(session.odd()),
        }
    }

    /// The second flight.
    pub(super) fn write(&self, session: &Session, handle: &[u8], bytes: &[u8]) -> Vec<Vec<u8>> {
        let length = session.write_max() as usize;
        let chunks = bytes.chunks(length).enumerate();
        let mut requests: Vec<Vec<u8>> =
            chunks.map(|(at, chunk)| session::write(handle, (at * length) as u64, chunk)).collect();
        if session.offers.fsync {
            requests.push(extended("fsync@openssh.com", &[handle]));
        }
        requests.push(about(packet::CLOSE, handle));
        requests
    }

    /// What became of it.
    pub(super) fn written(
        &self,
        session: &Session,
        results: impl IntoIterator<Item = Result<(), session::Refusal>>,
    ) -> Result<(), Error> {
        match results.into_iter().find_map(Result::err) {
            Some(refusal) => Err(session.refused("write", &self.new, &refusal)),
            None => Ok(()),
        }
    }

    /// The third flight, where it is one request.
    fn naming(&self, session: &Session) -> Option<Vec<u8>> {
        session.offers.posix_rename.then(|| extended("posix-rename@openssh.com", &[&self.new, &self.path]))
    }

    /// The third flight: it has its name only after everything of it was written.
    pub(super) fn name(&self, session: &Session) -> Result<(), Error> {
        let named = replace(session, &self.new, &self.path)?;
        named.map_err(|refusal| self.unnamed(session, &refusal))
    }

    fn unnamed(&self, session: &Session, refusal: &session::Refusal) -> Error {
        session.refused("give its name to", &self.path, refusal)
    }
}

/// Names several, in this order; says of each whether it has its name. Where that takes one request each they are one flight, and
/// one that is refused does not keep the next from its name.
pub(super) fn name_all(session: &Session, files: &[&OwnFile]) -> Result<Vec<Result<(), Error>>, Error> {
    let Some(requests) = files.iter().map(|file| file.naming(session)).collect::<Option<Vec<_>>>() else {
        return Ok(files.iter().map(|file| file.name(session)).collect());
    };
    let results = files.iter().zip(session.all(requests)?);
    Ok(results.map(|(file, result)| result.map_err(|refusal| file.unnamed(session, &refusal))).collect())
}

/// Writes a file of our own beside its name, brings it to stable storage and gives it its name.
pub(super) fn store(session: &Session, directory: &[u8], name: &str, bytes: &[u8]) -> Result<(), Error> {
    let own = OwnFile::new(directory, name);
    let handle = own.opened(session, &mut session.batch(own.open())?.into_iter())?;
    own.written(session, session.all(own.write(session, &handle, bytes))?)?;
    own.name(session)
}

/// Renames over whatever non-directory is there.
pub(super) fn replace(session: &Session, from: &[u8], to: &[u8]) -> Result<Result<(), session::Refusal>, Error> {
    if session.offers.posix_rename {
        return session.order(extended("posix-rename@openssh.com", &[from, to]));
    }
    let rename = || session::request(packet::RENAME).string(from).string(to).finish();
    if session.order(rename())?.is_ok() {
        return Ok(Ok(()));
    }
    // RACE: without posix-rename the name is gone for a moment. Whoever crashes here has the new file staged still.
    session.order(about(packet::REMOVE, to))?.ok();
    session.order(rename())
}
