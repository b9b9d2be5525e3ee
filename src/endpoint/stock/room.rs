//! A disk that is full at the other end: SFTP has no status for it.

use std::sync::atomic::Ordering;

use super::at;
use super::session::{self, about, extended};
use super::target::Run;
use crate::endpoint::Error;
use crate::error::Escaped;
use crate::wire::sftp::{Status, open, packet};

/// A write that fails where less than this is free failed for want of room.
const LITTLE_ROOM: u64 = 1 << 20;

impl Run {
    /// A full disk is looked for where a write failed. Then the run ends, and what it staged
    /// is removed: it would keep away every run that comes next.
    ///
    /// # Errors
    /// When it is full, or the connection ends.
    pub(super) fn check_room(&self) -> Result<(), Error> {
        let full = match self.session.room(&self.staging)? {
            Some(room) if room < LITTLE_ROOM => format!("the file system is full: {room} bytes are left"),
            _ if self.takes_a_little()? => return Ok(()),
            _ => "nothing more can be stored there, as where a quota is used up".to_owned(),
        };
        self.full.store(true, Ordering::Relaxed);
        let source =
            std::io::Error::new(std::io::ErrorKind::StorageFull, format!("{full}; make room there, then run again"));
        let path = format!("{}:{}", self.session.client.host(), Escaped(&self.root));
        Err(Error::Io { operation: "stage in", path, source })
    }

    /// What statvfs(3) says knows of no quota: so it is tried.
    fn takes_a_little(&self) -> Result<bool, Error> {
        let (session, path) = (&self.session, at(&self.staging, "room"));
        let opened = session.call(session::open(&path, open::WRITE | open::CREATE | open::TRUNCATE))?;
        let handle = match session.handle(opened)? {
            Ok(handle) => handle,
            Err(refusal) => return Ok(refusal.status != Status::Failure),
        };
        let data = vec![0xa5; 32 << 10];
        let requests = [0, 1].map(|at| session::write(&handle, at * data.len() as u64, &data));
        let sync = session.offers.fsync.then(|| extended("fsync@openssh.com", &[&handle]));
        let requests = requests.into_iter().chain(sync).chain([about(packet::CLOSE, &handle)]);
        let stored = session.all(requests.chain([about(packet::REMOVE, &path)]))?;
        Ok(!stored.iter().any(|one| one.as_ref().is_err_and(|refusal| refusal.status == Status::Failure)))
    }

    /// An error that ends the run before anything is published, by the disk that is full where it is.
    pub(super) fn explained(&self, error: Error) -> Error {
        match error {
            Error::Io { .. } | Error::Refused { .. } => self.check_room().err().unwrap_or(error),
            other => other,
        }
    }
}
