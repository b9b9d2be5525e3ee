//! Files that get what is there by its name ([`super::super::moved`]): until the run is published nothing is staged of them.

use std::sync::Arc;

use super::super::alike::Lying;
use super::StockWriter;
use crate::endpoint::{Error, Staged, WriteFailure};
use crate::manifest::Digest;

/// One of them.
#[derive(Debug)]
pub(super) struct Moving {
    lying: Arc<Lying>,
    /// So much of it was asked for.
    at: u64,
}

impl StockWriter {
    /// Whether what is there may become a part of the file at `index` as it is, and not as a copy.
    pub(super) fn may_stay(&self, index: u32, resume_at: u64) -> bool {
        self.moves && resume_at == 0 && !self.whole.contains(&index)
    }

    /// Whether the file at `index` gets what is there by its name, and is not opened.
    pub(super) fn begin_moving(&mut self, index: u32, resume_at: u64) -> bool {
        self.moving.remove(&index);
        if !self.may_stay(index, resume_at) {
            return false;
        }
        let Some(lying) = self.alike.moved(index) else { return false };
        self.moving.insert(index, Moving { lying, at: 0 });
        true
    }

    /// Whether these bytes are those that are there, of a file that gets them by their name.
    pub(super) fn moves_on(&mut self, index: u32, offset: u64, length: u64, from: (u32, u64)) -> bool {
        match self.moving.get_mut(&index) {
            Some(moving) if moving.at == offset && from == (0, offset) && length <= moving.lying.size - offset => {
                moving.at += length;
                true
            }
            _ => false,
        }
    }

    /// Has a file that was to get what is there made of it after all: something else comes for it.
    pub(super) fn stop_moving(&mut self, index: u32) -> Result<(), Error> {
        let Some(Moving { lying, at }) = self.moving.remove(&index) else { return Ok(()) };
        self.open_file(index, 0)?;
        if at > 0 { self.copy_from(index, 0, at, (lying, 0)) } else { Ok(()) }
    }

    /// Whether that was all of a file that gets what is there by its name, which is told.
    pub(super) fn end_moving(&mut self, index: u32, digest: Digest) -> bool {
        let Some(Moving { lying, at }) = self.moving.remove(&index) else { return false };
        let result = if at == lying.size && digest == lying.digest {
            self.run.state().moved.insert(index, lying);
            Ok(())
        } else {
            self.whole.insert(index);
            let message = format!("'{}', of which it was to get the content, does not hold that", lying.path);
            Err(WriteFailure { message, retry: true })
        };
        self.done.push(Staged { index, result });
        true
    }
}
