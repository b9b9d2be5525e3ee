//! What is new of files that only grow ([`super::super::append`]): it is staged and proven alone.

use std::sync::Arc;

use sha2::{Digest as _, Sha256};

use super::super::alike::Lying;
use super::StockWriter;
use super::file::{File, Route};
use crate::endpoint::delta::{Beginning, Summing};
use crate::endpoint::{Error, WriteFailure};
use crate::manifest::Digest;

/// A file that is appended to.
pub(super) struct Growing {
    lying: Arc<Lying>,
    /// What is there was hashed at the source too, and is what it is to begin with. That its blocks have the same sums proves nothing.
    is_beginning: bool,
    /// So much of what is there was asked for.
    at: u64,
    /// Of what is new, once there is any.
    hasher: Option<Sha256>,
}

impl StockWriter {
    /// Whether what is new of the file at `index` is staged alone; nothing is opened before it comes.
    pub(super) fn begin_growing(&mut self, index: u32, resume_at: u64) -> bool {
        self.growing.remove(&index);
        if !self.may_stay(index, resume_at) {
            return false;
        }
        let Some(lying) = self.alike.appended_to(index) else { return false };
        self.growing.insert(index, Growing { lying, is_beginning: false, at: 0, hasher: None });
        true
    }

    /// What a file begins with was hashed.
    pub(super) fn begin_after(&mut self, index: u32, there: Beginning) {
        if let Some(growing) = self.growing.get_mut(&index) {
            growing.is_beginning = there.length == growing.lying.size && there.digest == growing.lying.digest;
        }
    }

    /// Whether that is what is there of a file that is appended to, in its place.
    pub(super) fn stays(&mut self, index: u32, offset: u64, length: u64, from: (u32, u64)) -> bool {
        match self.growing.get_mut(&index) {
            Some(growing) if growing.hasher.is_none() && growing.at == offset && from == (0, offset) => {
                let fits = length <= growing.lying.size - offset;
                growing.at += if fits { length } else { 0 };
                fits
            }
            _ => false,
        }
    }

    /// Where what comes at `offset` of a file goes; of one that is appended to its tail is begun with the first of it. What can go nowhere
    /// makes the file fail.
    pub(super) fn place(&mut self, index: u32, offset: u64) -> Result<Option<u64>, Error> {
        let Some(growing) = self.growing.get(&index) else { return Ok(Some(offset)) };
        let length = growing.lying.size;
        if growing.hasher.is_none() {
            if !growing.is_beginning || growing.at != length || offset != length {
                self.stop_growing(index)?;
                return Ok(Some(offset));
            }
            self.open_tail(index)?;
        }
        let place = offset.checked_sub(length);
        if place.is_none() {
            self.fail_tail(index);
        }
        Ok(place)
    }

    /// Hashes what comes of what is new.
    pub(super) fn hash_tail(&mut self, index: u32, bytes: &[u8]) {
        if let Some(hasher) = self.growing.get_mut(&index).and_then(|growing| growing.hasher.as_mut()) {
            hasher.update(bytes);
        }
    }

    /// The same of a hole.
    pub(super) fn hash_hole_of_tail(&mut self, index: u32, mut length: u64) {
        static ZEROS: [u8; 64 << 10] = [0; 64 << 10];
        let Some(hasher) = self.growing.get_mut(&index).and_then(|growing| growing.hasher.as_mut()) else { return };
        while length > 0 {
            let part = length.min(ZEROS.len() as u64);
            hasher.update(&ZEROS[..part as usize]);
            length -= part;
        }
    }

    fn open_tail(&mut self, index: u32) -> Result<(), Error> {
        self.wait_for_handles()?;
        let (_, size) = self.entry(index)?;
        let Some(growing) = self.growing.get_mut(&index) else { return Ok(()) };
        growing.hasher = Some(Sha256::new());
        let lying = Arc::clone(&growing.lying);
        let number = self.next_file;
        self.next_file += 1;
        let path = self.run.tail_path(index);
        let mut file = File::new(index, path, size - lying.size.min(size), 0, Route::Sftp);
        file.summing = self.run.sums_up(size).then(Summing::default).and_then(|mut summing| {
            let known = self.alike.sums(lying.digest).is_some_and(|sums| summing.same(sums, lying.size));
            known.then_some(summing)
        });
        file.grows = Some((lying, Digest::default()));
        self.files.insert(number, file);
        self.current.insert(index, number);
        self.open_new(number)?;
        self.follow(number)
    }

    /// Has a file that was to be appended to staged whole after all: something else comes for it.
    pub(super) fn stop_growing(&mut self, index: u32) -> Result<(), Error> {
        match self.growing.remove(&index) {
            Some(Growing { lying, at, hasher: None, .. }) => {
                self.open_file(index, 0)?;
                if at > 0 { self.copy_from(index, 0, at, (lying, 0)) } else { Ok(()) }
            }
            Some(Growing { hasher: Some(_), .. }) => {
                self.fail_tail(index);
                Ok(())
            }
            None => Ok(()),
        }
    }

    /// What is new of a file came in another order than it lies in.
    fn fail_tail(&mut self, index: u32) {
        if let Some(file) = self.current.get(&index).and_then(|number| self.files.get_mut(number)) {
            let message = "what is new of it came out of its order".to_owned();
            file.failure.get_or_insert(WriteFailure { message, retry: true });
        }
    }

    /// The digest that what is staged of a file has to have, of which all is here and the whole has `digest`.
    pub(super) fn end_growing(&mut self, index: u32, digest: Digest) -> Result<Digest, Error> {
        match self.growing.get(&index).map(|growing| growing.hasher.is_some()) {
            Some(true) => {
                let hasher = self.growing.remove(&index).and_then(|growing| growing.hasher);
                if let Some((_, whole)) = self
                    .current
                    .get(&index)
                    .and_then(|number| self.files.get_mut(number))
                    .and_then(|file| file.grows.as_mut())
                {
                    *whole = digest;
                }
                Ok(hasher.map_or(digest, |hasher| Digest(hasher.finalize().into())))
            }
            Some(false) => {
                self.stop_growing(index)?;
                Ok(digest)
            }
            None => Ok(digest),
        }
    }
}
