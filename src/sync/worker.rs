//! One worker thread: what its reader produces goes to its writer.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use crossbeam_channel::{bounded, unbounded};

use super::delta::{Delta, Piece};
use super::{REMEMBERED, Shared, lock};
use crate::endpoint::delta::{self, Beginning, Cut, DELTA_BYTES_MIN, Former, InPlace, Matcher, Wanted, Within};
use crate::endpoint::{Error, Fetch, Produced, Reader, Source, Staged, Target, Writer};
use crate::manifest::{Digest, Entry, Tree};
use crate::monitor::{Counters, Event, Problem, Severity};

/// So much a target copies before it is waited for.
const COPYING_MAX: u64 = 64 << 20;
/// So many parts of what the target has of a file wait until they are looked at; then it is not asked for more.
const LISTED_AHEAD: usize = 4;
/// Files of which the source is told at once what the target has.
const TELLING_MAX: usize = 16;

/// Files that are read or written by this worker, and what is to become of them.
struct Worker<'a, 'b> {
    shared: &'a Shared<'b>,
    target: &'a dyn Target,
    reader: Box<dyn Reader + 'a>,
    writer: Box<dyn Writer + 'a>,
    /// Pushed to the reader and not done yet.
    pushed: HashMap<u32, Fetch>,
    /// Opened at the writer and neither finished nor discarded.
    open: HashSet<u32>,
    /// Given to the writer whole; waiting for its completion.
    finished: HashMap<u32, Digest>,
    /// To be read again.
    again: VecDeque<u32>,
    attempts: HashMap<u32, u32>,
    /// To be compared with what the target has, and not found to be the same.
    compared: HashSet<u32>,
    /// Of what is read what the target has already is found out.
    deltas: HashMap<u32, Delta>,
    /// Bytes that the target was asked to copy, and has not answered.
    copying: u64,
    list: &'a dyn Fn(u32, u64) -> Matcher,
    /// Tells the source what the target has of a file, on a thread of its own; false where there is none. And how many do so.
    compare: &'a dyn Fn(u32) -> bool,
    telling: &'a AtomicUsize,
}

/// Says, when it goes, that a worker reads no more.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

pub(super) fn work(
    source: &dyn Source,
    target: &dyn Target,
    tree: &Arc<Tree>,
    shared: &Shared<'_>,
) -> Result<(), Error> {
    let (over, telling) = (&AtomicBool::new(false), &AtomicUsize::new(0));
    std::thread::scope(|scope| {
        let _over = Over(over);
        let list = |index, from| {
            let ((orders, ordered), (sender, parts)) = (unbounded(), bounded(LISTED_AHEAD));
            // Where it cannot be told, all is sent; a connection that is lost shows there too, and so does that there is no thread for it.
            let ask = move || drop(delta::list(&mut (ordered, sender), |wanted| target.alike(index, wanted)));
            let _ = std::thread::Builder::new().name("list".to_owned()).spawn_scoped(scope, ask);
            Matcher::new(from, Box::new((orders, parts)))
        };
        let compare = |index| {
            let tell = move || {
                source.compare(index, over, &mut |wanted| target.alike(index, wanted).ok().flatten());
                telling.fetch_sub(1, Ordering::Relaxed);
            };
            telling.fetch_add(1, Ordering::Relaxed);
            let started = std::thread::Builder::new().name("tell".to_owned()).spawn_scoped(scope, tell).is_ok();
            telling.fetch_sub(usize::from(!started), Ordering::Relaxed);
            started
        };
        let worker = Worker {
            shared,
            target,
            reader: source.reader(Arc::clone(tree))?,
            writer: target.writer()?,
            pushed: HashMap::new(),
            open: HashSet::new(),
            finished: HashMap::new(),
            again: VecDeque::new(),
            attempts: HashMap::new(),
            compared: HashSet::new(),
            deltas: HashMap::new(),
            copying: 0,
            list: &list,
            compare: &compare,
            telling,
        };
        // What lists for it ends with it.
        { worker }.run(source)
    })
}

impl Worker<'_, '_> {
    fn run(&mut self, source: &dyn Source) -> Result<(), Error> {
        loop {
            if self.shared.stopped() {
                return Ok(());
            }
            while self.reader.wants_more() && self.telling.load(Ordering::Relaxed) < TELLING_MAX {
                let Some(mut fetch) = self.next_fetch() else { break };
                if fetch.unless.is_some() {
                    self.compared.insert(fetch.index);
                }
                if self.is_there(source, &mut fetch)? {
                    // Nothing is read meanwhile that would ask for it.
                    if self.shared.stopped() {
                        return Ok(());
                    }
                    continue;
                }
                self.pushed.insert(fetch.index, fetch);
                self.reader.push(fetch);
            }
            let held_up = self.telling.load(Ordering::Relaxed) >= TELLING_MAX;
            match self.reader.next()? {
                Some(produced) => {
                    self.pass_on(produced)?;
                    self.slow_down();
                    let staged = self.writer.completions(false)?;
                    self.complete(staged);
                    self.remember(source);
                }
                None => {
                    let staged = self.writer.completions(true)?;
                    let nothing = staged.is_empty();
                    self.complete(staged);
                    if held_up {
                        // There may be more to do once those have ended that tell of what is done.
                        std::thread::sleep(Duration::from_millis(5));
                        continue;
                    }
                    if self.again.is_empty() && self.finished.is_empty() {
                        return Ok(());
                    }
                    if nothing && self.again.is_empty() {
                        // A defect of ours; to ask again and again would not end.
                        let what = format!("{} files were sent and nothing became of them", self.finished.len());
                        return Err(Error::Protocol { host: "the target".into(), what });
                    }
                }
            }
        }
    }

    fn next_fetch(&mut self) -> Option<Fetch> {
        match self.again.pop_front() {
            Some(index) => Some(Fetch::of(index)),
            None => self.shared.queue.pop(self.shared.tree),
        }
    }

    fn pass_on(&mut self, produced: Produced) -> Result<(), Error> {
        let counters = self.shared.monitor.counters();
        match produced {
            Produced::Whole { index, block, digest } => {
                let length = block.data().len() as u64;
                Counters::add(&counters.done_bytes, length);
                Counters::add(&counters.transferred_bytes, length);
                self.deltas.remove(&index);
                self.pushed.remove(&index);
                self.finished.insert(index, digest);
                self.writer.put(index, block, digest)
            }
            Produced::Data { index, offset, block } => {
                let length = block.data().len() as u64;
                Counters::add(&counters.done_bytes, length);
                if let Some(delta) = self.deltas.get_mut(&index) {
                    let pieces = delta.feed(block);
                    return self.take(index, pieces);
                }
                self.open_once(index)?;
                Counters::add(&counters.transferred_bytes, length);
                self.writer.write(index, offset, block)
            }
            Produced::Hole { index, offset, length } => {
                Counters::add(&counters.done_bytes, length);
                if let Some(delta) = self.deltas.get_mut(&index) {
                    let pieces = delta.skip(offset, length);
                    return self.take(index, pieces);
                }
                self.open_once(index)?;
                self.writer.hole(index, offset, length)
            }
            Produced::Copy { index, offset, length, from } => {
                Counters::add(&counters.done_bytes, length);
                self.open_once(index)?;
                self.writer.copy(index, offset, length, from)
            }
            Produced::End { index, digest } => {
                if let Some(delta) = self.deltas.remove(&index) {
                    let Some(pieces) = delta.end(digest) else {
                        return self.pass_on(Produced::Same { index, digest });
                    };
                    self.take(index, pieces)?;
                }
                self.open_once(index)?;
                self.open.remove(&index);
                self.pushed.remove(&index);
                self.finished.insert(index, digest);
                self.writer.finish(index, digest)
            }
            Produced::Same { index, digest } => {
                self.compared.remove(&index);
                self.deltas.remove(&index);
                Counters::add(&counters.done_bytes, self.size_of(index));
                self.pushed.remove(&index);
                self.finished.insert(index, digest);
                self.writer.keep(index, digest)
            }
            Produced::Failed { index, message, retry } => {
                self.deltas.remove(&index);
                self.pushed.remove(&index);
                if self.open.remove(&index) {
                    self.writer.discard(index)?;
                }
                self.fail(index, message, retry);
                Ok(())
            }
        }
    }

    /// Sends what the target does not have, and has it make the rest.
    fn take(&mut self, index: u32, pieces: Vec<Piece>) -> Result<(), Error> {
        let counters = self.shared.monitor.counters();
        for piece in pieces {
            self.open_once(index)?;
            match piece {
                Piece::Copy { offset, length, from } => self.writer.copy(index, offset, length, from)?,
                Piece::Hole { offset, length } => self.writer.hole(index, offset, length)?,
                Piece::Data { offset, block } => {
                    Counters::add(&counters.transferred_bytes, block.data().len() as u64);
                    self.writer.write(index, offset, block)?;
                }
            }
        }
        Ok(())
    }

    /// Whether the target copies the file of another that it has. Where it may have parts of it, they are looked for from now on.
    fn is_there(&mut self, source: &dyn Source, fetch: &mut Fetch) -> Result<bool, Error> {
        let index = fetch.index;
        // What was made of something else, and was not the file, is sent whole.
        if self.attempts.contains_key(&index) || !self.shared.is_alike(index) {
            return Ok(false);
        }
        if source.compares() {
            return self.is_compared(fetch);
        }
        let digest = self.digest_of(index);
        if let Some(former) = self.target.former(index) {
            return self.is_made_of(source, fetch, former, digest);
        }
        // A target that is not honest may say it of any file.
        if self.size_of(index) < DELTA_BYTES_MIN {
            return Ok(false);
        }
        let mut matcher = (self.list)(index, fetch.from);
        if let Some(digest) = digest
            && matcher.begins_with_all()
        {
            return self.copy_whole_of_several(index, digest);
        }
        if fetch.from == 0
            && self.shared.grows(index)
            && let Some(there) = matcher.there()
        {
            if source.begins_with(self.shared.tree, index, there) {
                return self.go_on_after(there, fetch);
            }
            matcher.expect_in_place();
        }
        // It is compared by its parts, and read once.
        self.deltas.insert(index, Delta::new(matcher, fetch.unless.take()));
        Ok(false)
    }

    /// The same, where it is the source that finds out what the target has.
    fn is_compared(&mut self, fetch: &mut Fetch) -> Result<bool, Error> {
        let index = fetch.index;
        // Whether there is anything, and what it is as a whole; nothing is listed.
        let first = Wanted { from: Within::default(), to: 0, cut: Cut::ByContent };
        let Some(there) = self.target.alike(index, first)? else { return Ok(false) };
        if let Some(digest) = self.digest_of(index)
            && there.same
        {
            return self.copy_whole_of_several(index, digest);
        }
        fetch.compare = (self.compare)(index);
        Ok(false)
    }

    fn copy_whole_of_several(&mut self, index: u32, digest: Digest) -> Result<bool, Error> {
        let copied = self.copy_whole(index, 0, digest)?;
        // Other workers, over connections of their own, are to have some of them too.
        self.copying += self.size_of(index);
        if self.copying >= COPYING_MAX {
            self.copying = 0;
            let staged = self.writer.completions(true)?;
            self.complete(staged);
        }
        Ok(copied)
    }

    /// The same, where the target cannot look into what it has.
    fn is_made_of(
        &mut self,
        source: &dyn Source,
        fetch: &mut Fetch,
        former: Former,
        digest: Option<Digest>,
    ) -> Result<bool, Error> {
        if let Some(digest) = digest.filter(|_| former.same) {
            return self.copy_whole(fetch.index, fetch.from, digest);
        }
        if fetch.from == 0
            && self.shared.grows(fetch.index)
            && let Some(there) = former.there
            && source.begins_with(self.shared.tree, fetch.index, there)
        {
            return self.go_on_after(there, fetch);
        }
        if !former.pieces.is_empty() {
            let in_place = InPlace::new(fetch.from, former.pieces);
            self.deltas.insert(fetch.index, Delta::in_place(in_place, fetch.unless.take()));
        }
        Ok(false)
    }

    /// Has the target copy a file from `from` on, of which it has all.
    fn copy_whole(&mut self, index: u32, from: u64, digest: Digest) -> Result<bool, Error> {
        let size = self.size_of(index);
        Counters::add(&self.shared.monitor.counters().done_bytes, size - from);
        self.writer.open(index, from)?;
        if self.copy(index, from, size)? {
            self.finished.insert(index, digest);
            self.writer.finish(index, digest)?;
        }
        Ok(true)
    }

    /// Has it copy what it has in its place; false where the run is to stop, which leaves the rest.
    fn copy(&mut self, index: u32, mut from: u64, to: u64) -> Result<bool, Error> {
        while from < to {
            if self.shared.stopped() {
                return Ok(false);
            }
            let length = (to - from).min(self.target.copies_at_once());
            self.writer.copy(index, from, length, Within { piece: 0, offset: from })?;
            from += length;
        }
        Ok(true)
    }

    /// A file that only grows: the target has what it begins with, and the rest of it is read. Whether that is nothing.
    fn go_on_after(&mut self, there: Beginning, fetch: &mut Fetch) -> Result<bool, Error> {
        let index = fetch.index;
        if fetch.unless.is_some() && there.length == self.size_of(index) {
            self.pass_on(Produced::Same { index, digest: there.digest })?;
            return Ok(true);
        }
        (fetch.after, fetch.unless) = (Some(there), None);
        self.open_once(index)?;
        self.writer.begins_with(index, there);
        if !self.copy(index, 0, there.length)? {
            return Ok(true);
        }
        Counters::add(&self.shared.monitor.counters().done_bytes, there.length);
        Ok(false)
    }

    /// Tells what went over the wire, and keeps to the rate that was asked for.
    fn slow_down(&self) {
        let counters = self.shared.monitor.counters();
        let wire = (self.shared.wire_bytes)();
        counters.wire_bytes.fetch_max(wire, Ordering::Relaxed);
        let spent = if wire > 0 { wire } else { Counters::get(&counters.transferred_bytes) };
        self.shared.pace.wait(spent, &|| self.shared.stopped());
    }

    fn open_once(&mut self, index: u32) -> Result<(), Error> {
        if self.open.insert(index) {
            let resume_at = self.pushed.get(&index).map_or(0, |fetch| fetch.from);
            self.writer.open(index, resume_at)?;
        }
        Ok(())
    }

    fn complete(&mut self, staged: Vec<Staged>) {
        for Staged { index, result } in staged {
            let Some(digest) = self.finished.remove(&index) else { continue };
            match result {
                Ok(()) => {
                    let size = self.size_of(index);
                    Counters::add(&self.shared.monitor.counters().done_files, 1);
                    let mut outcome = lock(&self.shared.outcome);
                    outcome.digests.push((index, digest));
                    if self.compared.remove(&index) {
                        outcome.other.insert(index);
                    }
                    outcome.verified_files += 1;
                    outcome.verified_bytes += size;
                }
                Err(failure) => self.fail(index, failure.message, failure.retry),
            }
        }
    }

    /// Tells the source what it is to remember, when that has become much.
    fn remember(&self, source: &dyn Source) {
        let mut outcome = lock(&self.shared.outcome);
        if outcome.digests.len() < REMEMBERED {
            return;
        }
        let digests = std::mem::take(&mut outcome.digests);
        drop(outcome);
        source.remember(self.shared.tree, &digests);
    }

    fn fail(&mut self, index: u32, message: String, retry: bool) {
        // One that was made of what the target had is sent at least once.
        let most = self.shared.retries.max(self.shared.is_alike(index).into());
        let attempts = self.attempts.entry(index).or_default();
        if retry && *attempts < most {
            *attempts += 1;
            self.again.push_back(index);
            return;
        }
        let path = self.shared.tree.entries().get(index as usize).map(|entry| entry.path.clone());
        let problem = Problem { path, message: message.clone(), severity: Severity::Failed };
        self.shared.monitor.event(Event::Problem(&problem));
        lock(&self.shared.outcome).failed.insert(index, message);
    }

    fn digest_of(&self, index: u32) -> Option<Digest> {
        self.shared.tree.entries().get(index as usize).and_then(Entry::file).and_then(|(_, digest)| digest)
    }

    fn size_of(&self, index: u32) -> u64 {
        self.shared.tree.entries().get(index as usize).and_then(|entry| entry.file()).map_or(0, |(size, _)| size)
    }
}
