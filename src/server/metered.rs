//! A target that stores no more than a quota allows.
//!
//! What always holds: room is taken before content is handed on. What a run does not fit into is refused when it is compared,
//! before anything is sent.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use super::agent::SharedTarget;
use super::quota::{Allowance, Amount, QuotaError, steps};
use crate::endpoint::delta::{Alike, Wanted, Within};
use crate::endpoint::{BeginOptions, Block, CommitOptions, Committed, Error, Staged, Target, Writer};
use crate::manifest::{Digest, Tree};
use crate::monitor::Monitor;
use crate::path::RelPath;
use crate::plan::{Change, Need, Plan};

/// See the module.
pub struct Metered {
    target: SharedTarget,
    allowance: Arc<Allowance>,
    /// Where it is, below the root that the quota is of.
    path: Option<RelPath>,
    compared: Mutex<Compared>,
}

/// What a new target has besides what is stored in it: the directories in which a run stages.
const OWN_DIRECTORIES: u64 = 4;

/// What a run is going to do.
#[derive(Default)]
struct Compared {
    dry_run: bool,
    /// Directories and links that are made when it is published.
    made: u64,
    /// Something is replaced, so that there is less afterwards than was taken.
    replaces: bool,
}

impl Metered {
    /// `allowance` is what may be stored; `path` is where `target` is below the root that it is of.
    pub fn new(target: SharedTarget, allowance: Arc<Allowance>, path: Option<RelPath>) -> Metered {
        Metered { target, allowance, path, compared: Mutex::default() }
    }

    fn compared(&self) -> std::sync::MutexGuard<'_, Compared> {
        self.compared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn failed(&self, error: QuotaError) -> Error {
        failed(&self.target, error)
    }
}

fn failed(target: &SharedTarget, error: QuotaError) -> Error {
    let source = io::Error::new(io::ErrorKind::QuotaExceeded, error.to_string());
    Error::Io { operation: "make room in", path: target.describe(), source }
}

/// What is still to be sent, and how many names it makes.
fn needed(source: &Tree, plan: &Plan) -> (Amount, u64) {
    let (mut content, mut made) = (Amount::default(), 0);
    for action in plan.actions.iter().filter(|action| action.change != Change::MetadataOnly) {
        let size = source.entries()[action.index as usize].file().map(|(size, _)| size);
        match (&action.need, size) {
            (&Need::Content { resume_at }, Some(size)) => {
                content.bytes = content.bytes.saturating_add(size.saturating_sub(resume_at));
                content.files += u64::from(resume_at == 0);
            }
            (_, None) if action.change == Change::Added => made += 1,
            _ => {}
        }
    }
    (content, made)
}

impl Target for Metered {
    fn describe(&self) -> String {
        self.target.describe()
    }

    fn begin(&self, options: &BeginOptions, monitor: &dyn Monitor) -> Result<(), Error> {
        *self.compared() = Compared { dry_run: options.dry_run, ..Compared::default() };
        // A run makes the directories of its target before anything is compared.
        let made = self.path.as_ref().filter(|_| !options.dry_run);
        let missing = made.map_or(0, |path| self.allowance.missing(path));
        if missing > 0 {
            let directories = Amount::new(0, missing + OWN_DIRECTORIES);
            self.allowance.take(directories).map_err(|error| self.failed(error))?;
        }
        let begun = self.target.begin(options, monitor);
        if missing > 0 {
            // Some of them may be there, or go with the run.
            self.allowance.loosen();
        }
        begun
    }

    fn diff(&self, source: &Arc<Tree>, monitor: &dyn Monitor) -> Result<Plan, Error> {
        let plan = self.target.diff(source, monitor)?;
        let (content, made) = needed(source, &plan);
        let needed = Amount::new(content.bytes, content.files + made);
        if needed != Amount::default() {
            self.allowance.has(needed).map_err(|error| self.failed(error))?;
        }
        let mut compared = self.compared();
        compared.made = made;
        compared.replaces = plan.actions.iter().any(|action| action.change == Change::Modified);
        Ok(plan)
    }

    fn writer(&self) -> Result<Box<dyn Writer + '_>, Error> {
        Ok(Box::new(MeteredWriter { writer: self.target.writer()?, metered: self }))
    }

    fn commit(&self, options: &CommitOptions, monitor: &dyn Monitor) -> Result<Committed, Error> {
        let made = Amount::new(0, self.compared().made);
        self.allowance.take(made).map_err(|error| self.failed(error))?;
        let committed = self.target.commit(options, monitor);
        let loose = match &committed {
            Ok(done) => done.removed > 0 || !done.problems.is_empty() || self.compared().replaces,
            Err(_) => true,
        };
        if loose {
            self.allowance.loosen();
        }
        committed
    }

    fn abort(&self) {
        self.target.abort();
        if !self.compared().dry_run {
            self.allowance.loosen();
        }
    }

    fn reject(&self, path: &[u8], reason: &str) {
        self.target.reject(path, reason);
    }

    fn stages_early(&self) -> bool {
        self.target.stages_early()
    }

    fn verification(&self) -> String {
        self.target.verification()
    }

    fn wire_bytes(&self) -> u64 {
        self.target.wire_bytes()
    }

    fn alike(&self, index: u32, wanted: Wanted) -> Result<Option<Alike>, Error> {
        self.target.alike(index, wanted)
    }
}

struct MeteredWriter<'a> {
    writer: Box<dyn Writer + 'a>,
    metered: &'a Metered,
}

impl MeteredWriter<'_> {
    fn take(&self, bytes: u64, files: u64) -> Result<(), Error> {
        self.metered.allowance.take(Amount::new(bytes, files)).map_err(|error| self.metered.failed(error))
    }
}

impl Writer for MeteredWriter<'_> {
    fn put(&mut self, index: u32, block: Block, digest: Digest) -> Result<(), Error> {
        self.take(block.data().len() as u64, 1)?;
        self.writer.put(index, block, digest)
    }

    fn open(&mut self, index: u32, resume_at: u64) -> Result<(), Error> {
        self.take(0, u64::from(resume_at == 0))?;
        self.writer.open(index, resume_at)
    }

    fn write(&mut self, index: u32, offset: u64, block: Block) -> Result<(), Error> {
        self.take(block.data().len() as u64, 0)?;
        self.writer.write(index, offset, block)
    }

    fn hole(&mut self, index: u32, offset: u64, length: u64) -> Result<(), Error> {
        for (before, step) in steps(length) {
            self.take(step, 0)?;
            self.writer.hole(index, offset + before, step)?;
        }
        Ok(())
    }

    fn copy(&mut self, index: u32, offset: u64, length: u64, from: Within) -> Result<(), Error> {
        for (before, step) in steps(length) {
            self.take(step, 0)?;
            self.writer.copy(index, offset + before, step, Within { offset: from.offset + before, ..from })?;
        }
        Ok(())
    }

    fn finish(&mut self, index: u32, digest: Digest) -> Result<(), Error> {
        self.writer.finish(index, digest)
    }

    fn keep(&mut self, index: u32, digest: Digest) -> Result<(), Error> {
        self.writer.keep(index, digest)
    }

    fn discard(&mut self, index: u32) -> Result<(), Error> {
        self.writer.discard(index)
    }

    fn completions(&mut self, wait: bool) -> Result<Vec<Staged>, Error> {
        self.writer.completions(wait)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Quota;
    use crate::server::quota::STEP_BYTES;

    /// Stores nothing, and notes how much of what was taken is not there when something is to be stored.
    #[derive(Clone, Default)]
    struct Stores(Arc<Mutex<Seen>>);

    #[derive(Default)]
    struct Seen {
        stored: u64,
        most_ahead: u64,
        allowance: Option<Arc<Allowance>>,
    }

    impl Stores {
        fn store(&self, bytes: u64) -> Result<(), Error> {
            let mut seen = self.0.lock().unwrap();
            let taken = seen.allowance.as_ref().unwrap().taken_bytes();
            seen.most_ahead = seen.most_ahead.max(taken - seen.stored);
            seen.stored += bytes;
            Ok(())
        }
    }

    impl Target for Stores {
        fn describe(&self) -> String {
            String::new()
        }
        fn begin(&self, _: &BeginOptions, _: &dyn Monitor) -> Result<(), Error> {
            Ok(())
        }
        fn diff(&self, _: &Arc<Tree>, _: &dyn Monitor) -> Result<Plan, Error> {
            Ok(Plan::default())
        }
        fn writer(&self) -> Result<Box<dyn Writer + '_>, Error> {
            Ok(Box::new(self.clone()))
        }
        fn commit(&self, _: &CommitOptions, _: &dyn Monitor) -> Result<Committed, Error> {
            Ok(Committed::default())
        }
        fn abort(&self) {}
        fn verification(&self) -> String {
            String::new()
        }
    }

    impl Writer for Stores {
        fn put(&mut self, _: u32, block: Block, _: Digest) -> Result<(), Error> {
            self.store(block.data().len() as u64)
        }
        fn open(&mut self, _: u32, _: u64) -> Result<(), Error> {
            Ok(())
        }
        fn write(&mut self, _: u32, _: u64, block: Block) -> Result<(), Error> {
            self.store(block.data().len() as u64)
        }
        fn hole(&mut self, _: u32, offset: u64, length: u64) -> Result<(), Error> {
            assert_eq!(offset, self.0.lock().unwrap().stored);
            self.store(length)
        }
        fn copy(&mut self, _: u32, offset: u64, length: u64, from: Within) -> Result<(), Error> {
            assert_eq!((offset, offset), (self.0.lock().unwrap().stored, from.offset));
            self.store(length)
        }
        fn finish(&mut self, _: u32, _: Digest) -> Result<(), Error> {
            Ok(())
        }
        fn keep(&mut self, _: u32, _: Digest) -> Result<(), Error> {
            Ok(())
        }
        fn discard(&mut self, _: u32) -> Result<(), Error> {
            Ok(())
        }
        fn completions(&mut self, _: bool) -> Result<Vec<Staged>, Error> {
            Ok(Vec::new())
        }
    }

    #[test]
    fn no_more_of_a_quota_is_taken_at_once_for_a_hole_or_a_copy_than_for_anything_else() {
        let at = tempfile::tempdir().unwrap();
        let allowance = Allowance::open(at.path(), Quota { bytes: Some(1 << 40), files: None }).unwrap();
        let stores = Stores::default();
        stores.0.lock().unwrap().allowance = Some(Arc::clone(&allowance));
        let metered = Metered::new(Arc::new(stores.clone()), allowance, None);
        let mut writer = metered.writer().unwrap();
        let (hole, copy) = (1 << 30, 8 << 20);
        writer.hole(0, 0, hole + 5).unwrap();
        writer.copy(0, hole + 5, copy + 7, Within { piece: 0, offset: hole + 5 }).unwrap();
        let seen = stores.0.lock().unwrap();
        assert_eq!(seen.stored, hole + copy + 12);
        assert!(seen.most_ahead <= STEP_BYTES, "{}", seen.most_ahead);
    }
}
