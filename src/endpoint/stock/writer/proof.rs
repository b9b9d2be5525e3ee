//! What becomes of a file that is written: its digest is asked for, it gets its permissions, and it is told.

use super::super::prove::Proven;
use super::super::session::about;
use super::file::{Op, Route, Stage};
use super::{PROVE_BYTES, PROVE_FILES, StockWriter, grant};
use crate::endpoint::delta::Summing;
use crate::endpoint::{Error, Staged, WriteFailure};
use crate::policy::mode::SPECIAL_BITS;
use crate::wire::sftp::packet;

impl StockWriter {
    /// Asks for digests, when enough wait for them or `all` are to be asked for.
    pub(super) fn prove(&mut self, all: bool) {
        let enough = self.unproven.len() >= PROVE_FILES || self.unproven_bytes >= PROVE_BYTES;
        if self.unproven.is_empty() || !(all || enough) {
            return;
        }
        self.unproven_bytes = 0;
        self.proving += 1;
        let files = std::mem::take(&mut self.unproven);
        self.run.provers.submit(files, &self.proofs.0);
    }

    /// Compares digests, and gives owner, mode and times to what is right.
    pub(super) fn proven(&mut self, proven: Proven) -> Result<(), Error> {
        self.proving -= 1;
        for (number, found) in proven {
            let Some(file) = self.files.get_mut(&number) else { continue };
            let announced = file.digest.unwrap_or_default();
            match found {
                Ok(found) if found.digest == announced && found.granted => {
                    file.stage = Stage::Granting;
                    self.conclude(number)?;
                }
                Ok(found) if found.digest == announced => {
                    file.stage = Stage::Granting;
                    let (index, path) = (file.index, file.path.clone());
                    let wanted = self.run.permissions(self.entry(index)?.0)?;
                    for packet in grant(packet::SETSTAT, &path, &wanted) {
                        self.send(number, Op::Grant, packet)?;
                    }
                    if wanted.mode & SPECIAL_BITS != 0 {
                        self.send(number, Op::Check, about(packet::LSTAT, &path))?;
                    }
                }
                wrong => {
                    let message = wrong.map_or_else(
                        |reason| reason,
                        |found| format!("its SHA-256 is {} at the other end, and {announced} was sent", found.digest),
                    );
                    file.failure = Some(WriteFailure { message, retry: true });
                    // What unpacks an archive does not say why a file came to nothing.
                    let packed = file.route == Route::Pack;
                    self.conclude(number)?;
                    if packed {
                        self.run.check_room()?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Everything is done for a file: says what became of it.
    pub(super) fn conclude(&mut self, number: u64) -> Result<(), Error> {
        self.lose(number);
        self.forget_queued(number);
        let Some(mut file) = self.files.remove(&number) else { return Ok(()) };
        if self.current.get(&file.index) == Some(&number) {
            self.current.remove(&file.index);
        }
        let index = file.index;
        let result = match file.failure.take() {
            None => {
                let sums = file.summing.take().map(Summing::finish);
                let mut state = self.run.state();
                let digest = match file.grows.take() {
                    Some((lying, whole)) => {
                        state.tails.insert(index, lying);
                        whole
                    }
                    None => file.digest.unwrap_or_default(),
                };
                state.staged.insert(index, digest);
                state.sums.extend(sums.map(|sums| (digest, sums)));
                Ok(())
            }
            Some(failure) => {
                // What was made of something else is tried once more as if that were not there.
                if file.origin.is_some() || file.grows.is_some() {
                    self.whole.insert(index)
                } else {
                    self.by_sftp.insert(index)
                };
                self.send(number, Op::Clear, about(packet::REMOVE, &file.path))?;
                Err(failure)
            }
        };
        self.done.push(Staged { index, result });
        self.let_go(number, file)
    }
}
