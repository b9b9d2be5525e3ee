//! A target that stores no more than a quota allows.
//!
//! What always holds: room is taken before content is handed on. What a run does not fit into is refused when it is compared,
//! before anything is sent.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use super::agent::SharedTarget;
use super::quota::{Allowance, Amount, QuotaError};
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
        let missing = self.path.as_ref().map_or(0, |path| self.allowance.missing(path));
        if !options.dry_run && missing > 0 {
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
        self.take(length, 0)?;
        self.writer.hole(index, offset, length)
    }

    fn copy(&mut self, index: u32, offset: u64, length: u64, from: Within) -> Result<(), Error> {
        self.take(length, 0)?;
        self.writer.copy(index, offset, length, from)
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
