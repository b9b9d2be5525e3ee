//! Content that the server has already: it copies it from one of its files into the one that is staged.
//!
//! What it is copied from is looked at once it is open, in the flight of the first copies, so that no copy waits for it. A file that is
//! not what was listed makes what is staged of it fail; what got past that, the digest of the whole finds.
//!
//! RACE: what was listed as a regular file may be a FIFO by the time it is opened, and a server that opens one for reading waits. Then the
//! request times out, and the run with it; nothing was published.

use std::sync::Arc;

use super::super::alike::Lying;
use super::super::is_file;
use super::super::session::{self, Refusal, about};
use super::StockWriter;
use super::file::{Op, Origin, Part, Route};
use crate::endpoint::{Error, WriteFailure};
use crate::wire::sftp::{Attributes, Status, open, packet};

/// The engine has so much copied by one call, and can stop between two.
pub(in crate::endpoint::stock) const COPIED_BYTES: u64 = 256 << 20;
/// The server copies so much by one request: it does nothing else meanwhile, and what is hashed follows behind.
const REQUEST_BYTES: u64 = 32 << 20;
/// So much is asked for and not done, at most, so that other requests of the session come to their turn.
const COPYING_BYTES: u64 = 128 << 20;

impl StockWriter {
    /// What of the target has this content, where the file at `index` is to be made of that.
    pub(super) fn holding(&self, index: u32, size: u64, digest: crate::manifest::Digest) -> Option<Arc<Lying>> {
        if self.whole.contains(&index) { None } else { self.alike.holding(size, digest) }
    }

    /// Has `length` bytes copied that `lying` has at `from`.
    pub(super) fn copy_from(
        &mut self,
        index: u32,
        offset: u64,
        length: u64,
        (lying, from): (Arc<Lying>, u64),
    ) -> Result<(), Error> {
        self.pump(false)?;
        let Some(&number) = self.current.get(&index) else { return Ok(()) };
        let Some(file) = self.files.get_mut(&number).filter(|file| file.failure.is_none()) else { return Ok(()) };
        if !file.goes_on(offset, length) {
            return Ok(());
        }
        (file.sent, file.hole_at_end, file.fresh) = (file.at, false, 0);
        if let Some(summing) = &mut file.summing {
            let known = self.alike.sums(lying.digest).filter(|_| from == offset);
            if !known.is_some_and(|sums| summing.same(sums, length)) {
                file.summing = None;
            }
        }
        if file.route == Route::Pack {
            file.route = Route::Sftp;
            self.queued += file.queued_bytes();
            self.open_new(number)?;
        }
        let path = self.run.path_of(&lying);
        let Some(file) = self.files.get_mut(&number) else { return Ok(()) };
        let is_first = file.origin.is_none();
        // It is made of one file: whoever asks for parts of several is mistaken, and the digest of the whole says so.
        file.origin.get_or_insert(Origin { lying, handle: None });
        let mut done = 0;
        while done < length {
            let step = (length - done).min(REQUEST_BYTES);
            file.queued.push_back(Part::Copy { to: offset + done, length: step, from: from + done });
            done += step;
        }
        self.copying += length;
        if is_first {
            self.send(number, Op::OpenOrigin, session::open(&path, open::READ))?;
        }
        self.send_on(number)?;
        while self.copying > COPYING_BYTES && self.wait()? {}
        Ok(())
    }

    /// Asks for a copy.
    pub(super) fn send_copy(
        &mut self,
        number: u64,
        (from, from_offset): (&[u8], u64),
        length: u64,
        (to, to_offset): (&[u8], u64),
    ) -> Result<(), Error> {
        if let Some(file) = self.files.get_mut(&number) {
            file.unanswered.insert(to_offset);
        }
        let packet = session::copy_data((from, from_offset), length, (to, to_offset));
        self.send(number, Op::Copy(to_offset, length), packet)
    }

    /// What is copied from is open.
    pub(super) fn origin_opened(&mut self, number: u64, handle: bytes::Bytes) -> Result<(), Error> {
        let Some(file) = self.files.get_mut(&number) else { return Ok(()) };
        match &mut file.origin {
            Some(origin) if file.failure.is_none() => origin.handle = Some(handle.clone()),
            _ => return self.send(number, Op::Clear, about(packet::CLOSE, &handle)),
        }
        self.send(number, Op::LookAtOrigin, about(packet::FSTAT, &handle))?;
        self.flush(number)
    }

    /// What is copied from has to be what was listed.
    pub(super) fn origin_seen(&mut self, number: u64, found: &Attributes) {
        let Some(origin) = self.files.get(&number).and_then(|file| file.origin.as_ref()) else { return };
        let Lying { size, seconds, .. } = *origin.lying;
        if !is_file(found, size, seconds) {
            self.no_copy(number, "has changed there since it was listed");
        }
    }

    /// The server has not copied it.
    pub(super) fn not_copied(&mut self, number: u64, refusal: &Refusal) -> Result<(), Error> {
        let is_first = self.files.get(&number).is_some_and(|file| file.failure.is_none());
        self.no_copy(number, &format!("could not be copied there: {refusal}"));
        if is_first && refusal.status == Status::Failure { self.run.check_room() } else { Ok(()) }
    }

    /// A file cannot be made of what was there: it is sent whole.
    pub(super) fn no_copy(&mut self, number: u64, why: &str) {
        let Some(file) = self.files.get_mut(&number) else { return };
        let Some(origin) = &file.origin else { return };
        let message = format!("'{}', which it was to be made of, {why}", origin.lying.path);
        file.failure.get_or_insert(WriteFailure { message, retry: true });
        self.forget_queued(number);
    }
}
