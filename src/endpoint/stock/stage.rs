//! Before content comes: what an earlier run left to go on with, and the directories to stage in.

use std::collections::{BTreeSet, HashMap, HashSet};

use super::list::list;
use super::names::Names;
use super::read::read_whole;
use super::session::{self, Reply, Session, about, extended, with_attributes};
use super::target::Run;
use super::{DIRECTORY, at, kind_of};
use crate::endpoint::Error;
use crate::filter::{Filter, FilterSpec};
use crate::manifest::{Content, Tree};
use crate::monitor::Silent;
use crate::plan::{Change, Need, Plan};
use crate::scan::ScanRule;
use crate::staging::Journal;
use crate::wire::sftp::{Attributes, open, packet};

const JOURNAL: &str = "plan";
/// A partial file is gone on with from a multiple of this.
const RESUME_UNIT: u64 = 64 << 10;

/// Finds what an earlier run left to go on with, drops the rest, and makes the staging directories.
pub(super) fn prepare(run: &Run, source: &Tree, plan: &mut Plan) -> Result<(), Error> {
    let left = left_behind(run)?;
    let journal = match read_whole(&run.session, &at(&run.staging, JOURNAL))? {
        Ok(bytes) => Journal::decode(&bytes),
        Err(_) => Journal::default(),
    };
    let mut files = Vec::new();
    let mut wanted: BTreeSet<Vec<u8>> = BTreeSet::new();
    let mut resumed: HashSet<Vec<u8>> = HashSet::new();
    for action in &mut plan.actions {
        let entry = &source.entries()[action.index as usize];
        let staged = run.staged_name(&entry.path, entry.is_directory());
        if let Content::File { size, .. } = entry.content
            && action.need != Need::Nothing
        {
            let found = left.files.get(&staged).copied().unwrap_or(0);
            if journal.lists(&entry.path, size, entry.mtime) && found <= size {
                // The end of what was cut off need not have arrived in order; the digest of the whole tells.
                let resume_at = if found == size { size } else { found / RESUME_UNIT * RESUME_UNIT };
                // That something is staged of a file that was to be compared says that it was found to differ.
                if resume_at > 0 {
                    action.need = Need::Content { resume_at };
                    resumed.insert(staged.clone());
                }
            }
            files.push((entry.path.clone(), size, entry.mtime));
        }
        if action.change == Change::MetadataOnly && action.need == Need::Nothing {
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
    drop_leftovers(run, &left, &resumed, &wanted)?;
    store(&run.session, &run.staging, JOURNAL, &Journal::new(files).encode())?;
    make_directories(run, &wanted)
}

/// What lies in the staging area: paths below it.
struct Left {
    /// Regular files with their size.
    files: HashMap<Vec<u8>, u64>,
    /// Links and whatever else.
    others: Vec<Vec<u8>>,
    directories: BTreeSet<Vec<u8>>,
}

fn left_behind(run: &Run) -> Result<Left, Error> {
    let mut left = Left { files: HashMap::new(), others: Vec::new(), directories: BTreeSet::new() };
    let filter = Filter::compile(&FilterSpec::default()).map_err(|error| Error::Usage(error.to_string()))?;
    let rule = ScanRule::everything(filter);
    for top in ["tree", "last"] {
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

fn make_directories(run: &Run, wanted: &BTreeSet<Vec<u8>>) -> Result<(), Error> {
    // A directory sorts before what lies below it.
    let paths: Vec<Vec<u8>> = wanted.iter().map(|path| [&run.staging[..], b"/", path].concat()).collect();
    let made = run.session.all(paths.iter().map(|path| session::mkdir(path, 0o700)))?;
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

/// Writes a file of our own beside its name, brings it to stable storage and gives it its name.
pub(super) fn store(session: &Session, directory: &[u8], name: &str, bytes: &[u8]) -> Result<(), Error> {
    let (path, new) = (at(directory, name), at(directory, format!("{name}.new")));
    let open = session::open(&new, open::WRITE | open::CREATE | open::EXCLUSIVE);
    let handle = match session.batch([about(packet::REMOVE, &new), open])?.pop() {
        Some(Reply::Handle(handle)) => handle,
        Some(Reply::Refused(refusal)) => return Err(session.refused("make", &new, &refusal)),
        _ => return Err(session.odd()),
    };
    let length = session.write_max as usize;
    let mut requests: Vec<Vec<u8>> = bytes
        .chunks(length)
        .enumerate()
        .map(|(at, chunk)| session::write(&handle, (at * length) as u64, chunk))
        .collect();
    if session.offers.fsync {
        requests.push(extended("fsync@openssh.com", &[&handle]));
    }
    requests.push(about(packet::CLOSE, &handle));
    if let Some(refusal) = session.all(requests)?.into_iter().find_map(Result::err) {
        return Err(session.refused("write", &new, &refusal));
    }
    replace(session, &new, &path)?.map_err(|refusal| session.refused("give its name to", &path, &refusal))
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
