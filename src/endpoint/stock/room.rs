//! A disk that is full at the other end: SFTP has no status for it.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::at;
use super::session::{self, Refusal, about, extended};
use super::target::{Run, locked};
use crate::endpoint::Error;
use crate::error::Escaped;
use crate::wire::sftp::{Status, open, packet};

/// A write that fails where less than this is free failed for want of room.
const LITTLE_ROOM: u64 = 1 << 20;
/// So long it is believed that there is room.
const BELIEVED: Duration = Duration::from_secs(1);

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

    /// What statvfs(3) says knows of no quota: so it is tried, unless that has just been done.
    fn takes_a_little(&self) -> Result<bool, Error> {
        let (session, number) = (&self.session, {
            let mut tried = locked(&self.tried);
            if tried.1.is_some_and(|at| at.elapsed() < BELIEVED) {
                return Ok(true);
            }
            tried.0 += 1;
            tried.0
        });
        let path = at(&self.staging, format!("room-{number}"));
        let fails = |refusal: &Refusal| refusal.status == Status::Failure;
        let opened = session.call(session::open(&path, open::WRITE | open::CREATE | open::EXCLUSIVE))?;
        let takes = match session.handle(opened)? {
            Ok(handle) => {
                let data = vec![0xa5; 32 << 10];
                let requests = [0, 1].map(|at| session::write(&handle, at * data.len() as u64, &data));
                let sync = session.offers.fsync.then(|| extended("fsync@openssh.com", &[&handle]));
                let stored = session.all(requests.into_iter().chain(sync).chain([about(packet::CLOSE, &handle)]))?;
                session.forget(about(packet::REMOVE, &path))?;
                !stored.iter().any(|one| one.as_ref().is_err_and(fails))
            }
            // It may have no descriptors left, which a directory does not take.
            Err(refusal) if fails(&refusal) => {
                let made = session.order(session::mkdir(&path, 0o700))?;
                session.forget(about(packet::RMDIR, &path))?;
                !made.is_err_and(|refusal| fails(&refusal))
            }
            Err(_) => true,
        };
        if takes {
            locked(&self.tried).1 = Some(Instant::now());
        }
        Ok(takes)
    }

    /// An error that ends the run before anything is published, by the disk that is full where it is.
    pub(super) fn explained(&self, error: Error) -> Error {
        match error {
            Error::Io { .. } | Error::Refused { .. } => self.check_room().err().unwrap_or(error),
            other => other,
        }
    }
}
