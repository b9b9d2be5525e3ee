//! Stages content in memory.

use super::{Memory, digest, lock, out_of_order};
use crate::endpoint::{Block, Error, Staged, WriteFailure, Writer};
use crate::manifest::Digest;
use crate::path::RelPath;

pub(super) struct MemoryWriter<'a> {
    memory: &'a Memory,
    done: Vec<Staged>,
}

impl<'a> MemoryWriter<'a> {
    pub(super) fn new(memory: &'a Memory) -> Self {
        MemoryWriter { memory, done: Vec::new() }
    }

    fn path(&self, index: u32) -> Result<RelPath, Error> {
        self.memory.call()?;
        let run = lock(&self.memory.run);
        let entry = run.as_ref().and_then(|run| run.source.entries().get(index as usize));
        entry.map(|entry| entry.path.clone()).ok_or_else(out_of_order)
    }

    fn extend(&self, index: u32, offset: u64, bytes: &[u8]) -> Result<(), Error> {
        let path = self.path(index)?;
        let mut partial = lock(&self.memory.partial);
        let data = partial.get_mut(&path).filter(|data| data.len() as u64 == offset).ok_or_else(out_of_order)?;
        data.extend_from_slice(bytes);
        Ok(())
    }

    fn conclude(&mut self, index: u32, good: bool) {
        let failure = || WriteFailure { message: "its SHA-256 is another".into(), retry: true };
        if good && let Some(run) = lock(&self.memory.run).as_mut() {
            run.staged.insert(index);
        }
        self.done.push(Staged { index, result: if good { Ok(()) } else { Err(failure()) } });
    }
}

impl Writer for MemoryWriter<'_> {
    fn put(&mut self, index: u32, block: Block, expected: Digest) -> Result<(), Error> {
        self.open(index, 0)?;
        self.extend(index, 0, block.data())?;
        self.finish(index, expected)
    }

    fn open(&mut self, index: u32, resume_at: u64) -> Result<(), Error> {
        let path = self.path(index)?;
        lock(&self.memory.partial).entry(path).or_default().truncate(resume_at as usize);
        Ok(())
    }

    fn write(&mut self, index: u32, offset: u64, block: Block) -> Result<(), Error> {
        self.extend(index, offset, block.data())
    }

    fn hole(&mut self, index: u32, offset: u64, length: u64) -> Result<(), Error> {
        self.extend(index, offset, &vec![0; length as usize])
    }

    fn finish(&mut self, index: u32, expected: Digest) -> Result<(), Error> {
        let path = self.path(index)?;
        let mut partial = lock(&self.memory.partial);
        let good = partial.get(&path).is_some_and(|data| digest(data) == expected);
        if !good {
            partial.remove(&path);
        }
        drop(partial);
        self.conclude(index, good);
        Ok(())
    }

    fn keep(&mut self, index: u32, expected: Digest) -> Result<(), Error> {
        let path = self.path(index)?;
        let good = lock(&self.memory.nodes).get(&path).is_some_and(|node| digest(&node.data) == expected);
        let failure = || WriteFailure { message: "is not what the target has".into(), retry: true };
        self.done.push(Staged { index, result: if good { Ok(()) } else { Err(failure()) } });
        Ok(())
    }

    fn discard(&mut self, index: u32) -> Result<(), Error> {
        let path = self.path(index)?;
        lock(&self.memory.partial).remove(&path);
        Ok(())
    }

    fn completions(&mut self, _: bool) -> Result<Vec<Staged>, Error> {
        self.memory.call()?;
        Ok(std::mem::take(&mut self.done))
    }
}
