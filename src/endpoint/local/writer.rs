//! Stages files of one worker thread.

use std::collections::HashMap;
use std::sync::Arc;

use super::alike::Opened;
use super::append::{self, Former};
use super::moved::Moved;
use super::room::{self, Need};
use super::sums;
use super::target::{self, Run};
use crate::endpoint::delta::Within;
use crate::endpoint::{Block, Error, Staged, WriteFailure, Writer};
use crate::manifest::{Content, Digest, Entry, Tree};
use crate::path::RelPath;
use crate::root::{Metadata, Root, RootError};
use crate::staging::{StageError, StagedFile};

/// Writes what it is given at once: a completion is there as soon as a call has returned.
pub(super) struct LocalWriter {
    run: Arc<Run>,
    source: Arc<Tree>,
    /// The directory that the last file was staged in: the next one is likely to lie beside it.
    beside: Option<(RelPath, Root)>,
    open: HashMap<u32, StagedFile>,
    /// What files are made of that the target has.
    alike: HashMap<u32, Copied>,
    /// Files that are appended to, if all that is there is what they begin with, or that only get another name, if they are all of it.
    growing: HashMap<u32, Growing>,
    /// Files that failed before their end; what else comes for them is dropped.
    broken: HashMap<u32, WriteFailure>,
    done: Vec<Staged>,
}

/// What a file is made of.
struct Copied {
    piece: u32,
    from: Opened,
    /// What is copied from its start on is hashed when something else follows.
    later: bool,
}

/// A file of which what is there stays where it is.
struct Growing {
    /// What it is appended to; `None` where it only gets another name.
    former: Option<Former>,
    /// So much of what is there it begins with, as far as it was told,
    taken: u64,
    /// and so much there is.
    length: u64,
}

fn full(error: &StageError, staging: &Root, need: Need) -> Error {
    let text = format!("{}; {}", crate::error::chain(error), room::filled(staging, need));
    Error::Io {
        operation: "stage in",
        path: crate::error::shown(staging.shown()).to_string(),
        source: std::io::Error::new(std::io::ErrorKind::StorageFull, text),
    }
}

fn hash(file: &mut StagedFile, alike: Option<&Copied>, root: &Root) -> Result<(), StageError> {
    let kept = alike.filter(|_| file.is_unhashed()).and_then(|alike| alike.from.kept(root));
    file.hash_it(kept.as_ref())
}

impl LocalWriter {
    pub(super) fn new(run: Arc<Run>) -> LocalWriter {
        let source = Arc::clone(&run.state().source);
        LocalWriter {
            run,
            source,
            beside: None,
            open: HashMap::new(),
            alike: HashMap::new(),
            growing: HashMap::new(),
            broken: HashMap::new(),
            done: Vec::new(),
        }
    }

    fn staging(&self) -> Result<&Root, Error> {
        self.run.staging.as_ref().ok_or_else(|| Error::Usage("a dry run stages nothing".into()))
    }

    /// The regular file at `index`, with its size.
    fn entry(&self, index: u32) -> Result<(&Entry, u64), Error> {
        match self.source.entries().get(index as usize) {
            Some(entry) if let Content::File { size, .. } = entry.content => Ok((entry, size)),
            _ => Err(Error::Refused { by: "the receiver".into(), reason: format!("entry {index} is no regular file") }),
        }
    }

    /// A full disk ends the run; anything else is this file's failure.
    fn failure(&self, error: &StageError) -> Result<WriteFailure, Error> {
        if error.storage_full() {
            let mut state = self.run.state();
            state.full = true;
            return Err(full(error, self.staging()?, state.need));
        }
        Ok(WriteFailure { message: crate::error::chain(error), retry: error.retry() })
    }

    fn break_off(&mut self, index: u32, error: &StageError) -> Result<(), Error> {
        self.open.remove(&index);
        self.growing.remove(&index);
        let failure = self.failure(error)?;
        self.broken.insert(index, failure);
        Ok(())
    }

    /// What was proven of a file counts no more.
    fn forget(&mut self, index: u32) {
        self.growing.remove(&index);
        let mut state = self.run.state();
        state.grown.remove(&index);
        state.moved.remove(&index);
        state.staged.get_mut().remove(index);
    }

    fn remove_staged(&self, entry: &Entry) -> Result<(), Error> {
        let path = self.run.staged_path(&entry.path)?;
        self.staging()?.remove_tree(&path).map_err(super::target::io)
    }

    /// The staging directory that holds `path`, and its name there.
    fn beside(&mut self, path: &RelPath) -> Result<(&Root, RelPath), RootError> {
        let staging = self.run.staging.as_ref().unwrap_or(&self.run.root);
        // A staged path has at least the name of the staged tree above it.
        let above = path.parent().unwrap_or_else(|| path.clone());
        let name = RelPath::new(path.name()).unwrap_or_else(|_| path.clone());
        let kept = match self.beside.take() {
            Some((directory, root)) if directory == above => (directory, root),
            _ => {
                let root = staging.subroot(&above)?;
                (above, root)
            }
        };
        Ok((&self.beside.insert(kept).1, name))
    }

    fn start(&mut self, index: u32, resume_at: u64) -> Result<Result<StagedFile, StageError>, Error> {
        let (entry, size) = self.entry(index)?;
        let path = self.run.staged_path(&entry.path)?;
        self.staging()?;
        let (directory, name) = match self.beside(&path) {
            Ok(found) => found,
            Err(error) => return Ok(Err(error.into())),
        };
        if resume_at > 0 {
            return Ok(StagedFile::resume(directory, &name, size, resume_at));
        }
        Ok(match StagedFile::create(directory, &name, size) {
            Err(StageError::Root(error)) if error.kind() == std::io::ErrorKind::AlreadyExists => {
                directory.remove_tree(&name).map_err(super::target::io)?;
                StagedFile::create(directory, &name, size)
            }
            other => other,
        })
    }

    /// Whether what is copied to `offset` stays where it is, in a file that what follows is put at the end of, or that only gets another
    /// name.
    fn grows(&mut self, index: u32, offset: u64, length: u64, from: Within) -> Result<bool, Error> {
        if offset == 0
            && let Some(alike) = self.alike.get(&index).filter(|_| self.open.contains_key(&index))
        {
            let (entry, size) = self.entry(index)?;
            let wanted = entry.file().and_then(|(_, digest)| digest);
            if let Some(former) = self.run.appends_to(entry, &alike.from) {
                self.growing.insert(index, Growing { former: Some(former), taken: 0, length: former.length });
            } else if alike.from.may_hold(size, wanted) && self.run.moves(entry, &alike.from) {
                self.growing.insert(index, Growing { former: None, taken: 0, length: size });
            }
        }
        let Some(growing) = self.growing.get_mut(&index) else { return Ok(false) };
        let end = offset.saturating_add(length);
        let piece = self.alike.get(&index).map_or(0, |alike| alike.piece);
        if offset != growing.taken || from != (Within { piece, offset }) || end > growing.length {
            self.take_back(index)?;
            return Ok(false);
        }
        growing.taken = end;
        if end == growing.length
            && let Some(former) = growing.former
        {
            self.growing.remove(&index);
            self.stage_tail(index, former)?;
        }
        Ok(true)
    }

    /// Whether a file that is finished is all there under another name, which goes.
    fn is_moved(&mut self, index: u32, digest: Digest) -> Result<bool, Error> {
        let whole = |growing: &Growing| growing.former.is_none() && growing.taken == growing.length;
        if !self.growing.get(&index).is_some_and(whole) {
            return Ok(false);
        }
        let (entry, size) = self.entry(index)?;
        let there = self.alike.get(&index).filter(|alike| alike.from.holds(size, Some(digest)));
        let Some((alike, found)) = there.and_then(|alike| Some((alike, alike.from.unchanged()?))) else {
            return Ok(false);
        };
        if !self.run.state().plan.removes(alike.from.path()) {
            return Ok(false);
        }
        let moved = Moved { from: alike.from.path().clone(), piece: alike.piece, digest };
        let staged = target::Staged::of(entry, digest, &found);
        let mut state = self.run.state();
        state.staged.get_mut().insert(index, staged);
        state.moved.insert(index, moved);
        drop(state);
        self.growing.remove(&index);
        self.alike.remove(&index);
        self.open.remove(&index);
        self.remove_staged(self.entry(index)?.0)?;
        Ok(true)
    }

    /// Copies what was to stay where it is.
    fn take_back(&mut self, index: u32) -> Result<(), Error> {
        let Some(Growing { taken, .. }) = self.growing.remove(&index) else { return Ok(()) };
        let Some((staged, alike)) = self.open.get_mut(&index).zip(self.alike.get(&index)) else { return Ok(()) };
        let copied = staged.copy(0, taken, &alike.from.file, 0, alike.later);
        copied.map_or_else(|error| self.break_off(index, &error), Ok)
    }

    /// From now on what follows what is there is staged alone.
    fn stage_tail(&mut self, index: u32, former: Former) -> Result<(), Error> {
        let (entry, size) = self.entry(index)?;
        let Some(alike) = self.alike.get(&index) else { return Ok(()) };
        self.remove_staged(entry)?;
        let (path, staging) = (append::tail(&entry.path)?, self.staging()?);
        let kept = alike.from.kept(&self.run.root);
        let above = path.parent().map_or(Ok(()), |above| staging.mkdir_all(&above, 0o700));
        let made = above.and_then(|()| staging.remove_tree(&path)).map_err(StageError::from).and_then(|()| {
            StagedFile::create_tail(staging, &path, (size, former.length), &alike.from.file, kept.as_ref())
        });
        match made {
            Ok(file) => {
                self.open.insert(index, file);
                self.run.state().grown.insert(index, former);
                Ok(())
            }
            Err(error) => self.break_off(index, &error),
        }
    }

    /// Hashes what was copied without that, before something else follows.
    fn hash(&mut self, index: u32) -> Result<(), Error> {
        let Some(file) = self.open.get_mut(&index).filter(|file| file.is_unhashed()) else { return Ok(()) };
        let hashed = hash(file, self.alike.get(&index), &self.run.root);
        hashed.map_or_else(|error| self.break_off(index, &error), Ok)
    }

    fn conclude(&mut self, index: u32, mut file: StagedFile, digest: Digest) -> Result<(), Error> {
        let alike = self.alike.remove(&index);
        let (entry, size) = self.entry(index)?;
        let wanted = self.run.permissions(entry)?;
        let same = alike.as_ref().is_some_and(|alike| alike.from.holds(size, Some(digest)));
        let hashed = if same { Ok(()) } else { hash(&mut file, alike.as_ref(), &self.run.root) };
        let tail = file.is_tail();
        // What is appended to has all that it is to have, and is looked at once more.
        let there = |found: Metadata| match (tail, alike.as_ref().map(|alike| alike.from.unchanged())) {
            (false, _) => Ok(found),
            (true, Some(Some(there))) => Ok(there),
            (true, _) => Err(StageError::Copy("it is not what it was any more".into())),
        };
        let finished = hashed.and_then(|()| file.finish(digest, &wanted, self.run.options.verify_disk));
        let result = match finished.and_then(|(found, sums)| Ok((there(found)?, sums))) {
            Ok((metadata, sums)) => {
                // Without them the file is read when a part of it changes.
                let _ = sums.map(|sums| sums::keep(&self.run.root, digest, size, &sums));
                let staged = target::Staged::of(entry, digest, &metadata);
                self.run.state().staged.get_mut().insert(index, staged);
                Ok(())
            }
            Err(error) => {
                self.remove_staged(entry)?;
                self.run.state().grown.remove(&index);
                if matches!(error, StageError::Mismatch { .. }) {
                    self.run.refuse(entry.path.as_bytes(), &crate::error::chain(&error));
                }
                Err(self.failure(&error)?)
            }
        };
        self.done.push(Staged { index, result });
        Ok(())
    }
}

impl Writer for LocalWriter {
    fn put(&mut self, index: u32, block: Block, digest: Digest) -> Result<(), Error> {
        self.open(index, 0)?;
        if !block.data().is_empty() {
            self.write(index, 0, block)?;
        }
        self.finish(index, digest)
    }

    fn open(&mut self, index: u32, resume_at: u64) -> Result<(), Error> {
        self.broken.remove(&index);
        self.forget(index);
        match self.start(index, resume_at)? {
            Ok(file) => {
                self.open.insert(index, file);
                Ok(())
            }
            Err(error) => self.break_off(index, &error),
        }
    }

    fn write(&mut self, index: u32, offset: u64, block: Block) -> Result<(), Error> {
        self.take_back(index)?;
        self.hash(index)?;
        match self.open.get_mut(&index).map(|file| file.write(offset, block.data())) {
            Some(Err(error)) => self.break_off(index, &error),
            _ => Ok(()),
        }
    }

    fn hole(&mut self, index: u32, offset: u64, length: u64) -> Result<(), Error> {
        self.take_back(index)?;
        self.hash(index)?;
        match self.open.get_mut(&index).map(|file| file.hole(offset, length)) {
            Some(Err(error)) => self.break_off(index, &error),
            _ => Ok(()),
        }
    }

    fn copy(&mut self, index: u32, offset: u64, length: u64, from: Within) -> Result<(), Error> {
        if from.piece > 0 {
            self.take_back(index)?;
        }
        let (entry, size) = self.entry(index)?;
        let wanted = entry.file().and_then(|(_, digest)| digest);
        if self.alike.get(&index).is_none_or(|alike| alike.piece != from.piece) {
            self.take_back(index)?;
            self.hash(index)?;
            self.alike.remove(&index);
            let made = |opened: Opened| {
                let later = opened.holds(size, wanted) || opened.is_kept(&self.run.root);
                Copied { piece: from.piece, from: opened, later }
            };
            let opened = self.run.open_alike(index, from.piece).map(made);
            self.alike.extend(opened.map(|opened| (index, opened)));
        }
        if self.grows(index, offset, length, from)? {
            return Ok(());
        }
        let Some(staged) = self.open.get_mut(&index) else { return Ok(()) };
        let copied = match self.alike.get(&index) {
            Some(alike) => staged.copy(offset, length, &alike.from.file, from.offset, alike.later),
            None => Err(StageError::Copy("it is not what it was any more".into())),
        };
        copied.map_or_else(|error| self.break_off(index, &error), Ok)
    }

    fn finish(&mut self, index: u32, digest: Digest) -> Result<(), Error> {
        if self.is_moved(index, digest)? {
            self.done.push(Staged { index, result: Ok(()) });
            return Ok(());
        }
        self.take_back(index)?;
        if let Some(file) = self.open.remove(&index) {
            return self.conclude(index, file, digest);
        }
        self.alike.remove(&index);
        let never_opened = || WriteFailure { message: "was finished without having been opened".into(), retry: false };
        let failure = self.broken.remove(&index).unwrap_or_else(never_opened);
        self.done.push(Staged { index, result: Err(failure) });
        Ok(())
    }

    fn keep(&mut self, index: u32, digest: Digest) -> Result<(), Error> {
        let (entry, size) = self.entry(index)?;
        let mut state = self.run.state();
        // The receiver believes its own digest of what it has, not the sender's word.
        let known = state.target.get(&entry.path).and_then(Entry::file);
        let result = if known == Some((size, Some(digest))) {
            state.kept.insert(index, digest);
            Ok(())
        } else {
            let message = "is not what the target has".to_owned();
            Err(WriteFailure { message, retry: true })
        };
        drop(state);
        self.done.push(Staged { index, result });
        Ok(())
    }

    fn discard(&mut self, index: u32) -> Result<(), Error> {
        self.alike.remove(&index);
        self.open.remove(&index);
        self.forget(index);
        self.broken.remove(&index);
        let (entry, _) = self.entry(index)?;
        self.remove_staged(entry)
    }

    fn completions(&mut self, _wait: bool) -> Result<Vec<Staged>, Error> {
        Ok(std::mem::take(&mut self.done))
    }
}
