//! Following by looking every so often.

use std::time::{Duration, Instant, SystemTime};

use super::{End, Follower, Identity, ROOT_PAUSE, age};
use crate::daemon::polling::{Changes, Snapshot};
use crate::daemon::status::Watching;
use crate::daemon::temporary::is_temporary;
use crate::path::RelPath;
use crate::root::{FileKind, Follow, Metadata, Root};

/// The longest wait between the first two looks, which show what is being written.
const FIRST_PAUSE_MAX: Duration = Duration::from_secs(30);

impl Follower {
    pub(super) fn poll(&mut self, identity: Identity, why: String) -> End {
        match self.polling(identity, why) {
            Ok(end) | Err(end) => end,
        }
    }

    fn polling(&mut self, identity: Identity, why: String) -> Result<End, End> {
        let mut snapshot = Snapshot::default();
        let root = self.again(identity)?;
        self.review_mounts(identity);
        self.look_by_polling(&root, &mut snapshot, true)?;
        drop(root);
        // Times on a file server are by its clock: whether something is written to is seen by looking twice.
        let until = Instant::now() + self.options.settle.min(FIRST_PAUSE_MAX);
        while Instant::now() < until && !self.shared.is_stopped() {
            self.wait(None, Some(until));
        }
        let began = Instant::now();
        let mut everything = true;
        let mut polled = None::<Instant>;
        loop {
            let (rescan, due) = (began + self.options.rescan, self.shared.state().settle.next());
            let next = polled.map_or(began, |polled| polled + self.options.poll);
            let until = [next, rescan, Instant::now() + ROOT_PAUSE].into_iter().chain(due).min();
            self.wait(None, until);
            if self.shared.is_stopped() {
                return Err(End::Stopped);
            }
            let now = Instant::now();
            let root = self.again(identity)?;
            if now >= rescan {
                // From the start: events may be to be had by now, where the limit was raised.
                return Ok(End::Again);
            }
            everything |= self.review_mounts(identity);
            if now >= next {
                let changes = self.look_by_polling(&root, &mut snapshot, false)?;
                everything |= self.note(changes);
                everything |= self.shared.state().settle.shrink();
                self.drop_gone(&root);
                self.vouch(&root);
                polled = Some(now);
            } else if due.is_some_and(|due| due <= now) {
                everything |= self.look_again(&root, &mut snapshot, now);
            }
            if std::mem::take(&mut everything) {
                self.vouch(&root);
                self.judge(&root);
                let directories = snapshot.directories() as u64;
                let why = Some(why.clone());
                let mode = "polling".to_owned();
                self.hand_out_everything(Watching { mode, directories, why, ..Watching::default() });
            } else {
                self.settle(&root);
                let watching = &mut self.shared.state().watching;
                (watching.directories, watching.last_scan) =
                    (snapshot.directories() as u64, Some(crate::daemon::clock()));
            }
        }
    }

    /// One look; the first tells also what is to be judged by more than its age.
    fn look_by_polling(&mut self, root: &Root, snapshot: &mut Snapshot, first: bool) -> Result<Changes, End> {
        let shared = std::sync::Arc::clone(&self.shared);
        let clock = SystemTime::now();
        let mut each = |path: &RelPath, metadata: &Metadata| {
            let directory = metadata.kind == FileKind::Directory;
            if first {
                shared.state().settle.found(path, directory, age(metadata.ctime, clock), false, Instant::now());
            } else if is_temporary(path.name()) && !shared.state().settle.knows_temporary(path) {
                shared.state().settle.touched(path, directory, Instant::now());
            }
        };
        let stopped = || shared.is_stopped();
        snapshot.look(root, None, &mut self.ignores, &stopped, &mut each).map_err(|error| self.lost(&error))
    }

    /// Takes note of changes. True when everything has to be compared: something is missing, and only by comparing it is
    /// known what.
    fn note(&mut self, changes: Changes) -> bool {
        let mut state = self.shared.state();
        let now = Instant::now();
        for (path, directory) in changes.changed {
            state.settle.touched(&path, directory, now);
        }
        for path in changes.gone {
            state.settle.gone(&path, now);
        }
        let mut everything = false;
        for directory in changes.thinned {
            match directory.filter(|directory| state.settle.is_part(directory)) {
                Some(part) => state.settle.touched(&part, true, now),
                None => everything = true,
            }
        }
        everything
    }

    /// Looks once more at what would be finished by now: nobody told whether it was written to since.
    fn look_again(&mut self, root: &Root, snapshot: &mut Snapshot, now: Instant) -> bool {
        let shared = std::sync::Arc::clone(&self.shared);
        let paths = shared.state().settle.due_paths(now);
        let mut everything = false;
        for path in paths {
            match root.stat(&path, Follow::Never) {
                Ok(found) if found.kind == FileKind::Directory => {
                    let stopped = || shared.is_stopped();
                    let looked = snapshot.look(root, Some(&path), &mut self.ignores, &stopped, &mut |_, _| ());
                    everything |= looked.is_ok_and(|changes| self.note(changes));
                }
                Ok(found) => {
                    if !snapshot.is_same(&path, &found) {
                        shared.state().settle.touched(&path, false, now);
                    }
                }
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                    shared.state().settle.gone(&path, now);
                }
                Err(_) => {}
            }
        }
        everything
    }
}
