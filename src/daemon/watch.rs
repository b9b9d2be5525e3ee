//! inotify(7): which directories are watched, and what the kernel says of them.
//!
//! Only directories are watched: that costs the kernel about a kilobyte for each, and this process little more than its path.
//! A watch is of a directory, not of a name: where one was moved, the watch tells of it as before, under the new path.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use rustix::fs::inotify::{self, CreateFlags, ReadFlags, Reader, WatchFlags};
use rustix::io::Errno;

use crate::path::RelPath;

/// So many events are kept in memory at most; what is more waits in the kernel, which says when it was too much.
const QUEUE_MAX: usize = 200_000;
const BUFFER: usize = 64 << 10;

/// Something that the kernel told.
#[derive(Debug)]
pub(super) struct Event {
    pub(super) watch: i32,
    pub(super) flags: ReadFlags,
    pub(super) cookie: u32,
    pub(super) name: Option<Box<[u8]>>,
}

/// The watches of a source. `None` as a path is its top.
#[derive(Debug)]
pub(super) struct Watches {
    inotify: Arc<OwnedFd>,
    paths: HashMap<i32, Option<RelPath>>,
    watches: BTreeMap<Option<RelPath>, i32>,
    queue: VecDeque<Event>,
}

impl Watches {
    /// Begins with none.
    ///
    /// # Errors
    /// As inotify_init1(2): EMFILE where this user has too many.
    pub(super) fn new() -> rustix::io::Result<Watches> {
        let inotify = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        Ok(Watches {
            inotify: Arc::new(inotify),
            paths: HashMap::new(),
            watches: BTreeMap::new(),
            queue: VecDeque::new(),
        })
    }

    /// To be polled.
    pub(super) fn descriptor(&self) -> &Arc<OwnedFd> {
        &self.inotify
    }

    pub(super) fn count(&self) -> usize {
        self.paths.len()
    }

    /// Watches an open directory, which lies at `path`. One that is watched already gets this path.
    ///
    /// # Errors
    /// As inotify_add_watch(2): ENOSPC where there are too many.
    pub(super) fn add(&mut self, source: &Path, path: Option<&RelPath>, open: &OwnedFd) -> rustix::io::Result<()> {
        let flags = WatchFlags::CREATE
            | WatchFlags::DELETE
            | WatchFlags::MODIFY
            | WatchFlags::CLOSE_WRITE
            | WatchFlags::MOVED_FROM
            | WatchFlags::MOVED_TO
            | WatchFlags::ATTRIB
            | WatchFlags::DELETE_SELF
            | WatchFlags::MOVE_SELF
            | WatchFlags::EXCL_UNLINK
            | WatchFlags::ONLYDIR;
        // By its descriptor: no link that somebody puts in its place is followed.
        let added = match inotify::add_watch(&self.inotify, format!("/proc/self/fd/{}", open.as_raw_fd()), flags) {
            // Without /proc there is only the name.
            Err(Errno::NOENT) => {
                let whole = path.map_or_else(|| source.to_owned(), |path| source.join(path.as_path()));
                inotify::add_watch(&self.inotify, whole, flags | WatchFlags::DONT_FOLLOW)
            }
            other => other,
        };
        let (watch, path) = (added?, path.cloned());
        if let Some(before) = self.paths.insert(watch, path.clone())
            && before != path
            && self.watches.get(&before) == Some(&watch)
        {
            self.watches.remove(&before);
        }
        // RACE: what was there under this path until now was moved or removed; the kernel will tell of it. What happens in it
        // from now on is none of this path's: a unit that was exchanged is being cleared away.
        if let Some(before) = self.watches.insert(path, watch)
            && before != watch
        {
            self.paths.remove(&before);
            let _ = inotify::remove_watch(&self.inotify, before);
        }
        Ok(())
    }

    /// Where the directory of a watch lies; `None` for a watch that is not known any more.
    pub(super) fn path(&self, watch: i32) -> Option<Option<&RelPath>> {
        self.paths.get(&watch).map(Option::as_ref)
    }

    /// The kernel has removed a watch.
    pub(super) fn forget(&mut self, watch: i32) {
        if let Some(path) = self.paths.remove(&watch)
            && self.watches.get(&path) == Some(&watch)
        {
            self.watches.remove(&path);
        }
    }

    fn within(&self, top: &RelPath) -> Vec<(RelPath, i32)> {
        let from = self.watches.range(Some(top.clone())..);
        let below = from.take_while(|(path, _)| path.as_ref().is_some_and(|path| path.is_within(top)));
        below.filter_map(|(path, &watch)| Some((path.clone()?, watch))).collect()
    }

    /// Watches what lies at `top` and below no more: it is not in the source.
    pub(super) fn drop_within(&mut self, top: &RelPath) {
        for (_, watch) in self.within(top) {
            self.forget(watch);
            // RACE: removed meanwhile, and the watch with it.
            let _ = inotify::remove_watch(&self.inotify, watch);
        }
    }

    /// What lies at `from` and below lies at `to` now.
    pub(super) fn moved(&mut self, from: &RelPath, to: &RelPath) {
        // Something that was there before and was replaced is gone.
        self.drop_within(to);
        for (path, watch) in self.within(from) {
            let new = match path.strip_prefix(from) {
                Some(below) => to.join(below.as_bytes()),
                None => Ok(to.clone()),
            };
            self.watches.remove(&Some(path));
            if let Ok(new) = new {
                self.paths.insert(watch, Some(new.clone()));
                self.watches.insert(Some(new), watch);
            }
        }
    }

    /// Takes what the kernel has to tell into memory.
    ///
    /// # Errors
    /// As read(2).
    pub(super) fn pump(&mut self) -> rustix::io::Result<()> {
        let mut buffer = [MaybeUninit::uninit(); BUFFER];
        let mut reader = Reader::new(&self.inotify, &mut buffer);
        while self.queue.len() < QUEUE_MAX || !reader.is_buffer_empty() {
            match reader.next() {
                Ok(event) => self.queue.push_back(Event {
                    watch: event.wd(),
                    flags: event.events(),
                    cookie: event.cookie(),
                    name: event.file_name().map(|name| name.to_bytes().into()),
                }),
                Err(Errno::AGAIN) => break,
                Err(Errno::INTR) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Whether nothing is left of what was taken into memory.
    pub(super) fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// The next event.
    pub(super) fn next(&mut self) -> Option<Event> {
        self.queue.pop_front()
    }

    /// Whether the next event has this cookie: the other half of a move.
    pub(super) fn next_is_of(&self, cookie: u32) -> bool {
        self.queue.front().is_some_and(|event| event.cookie == cookie && event.flags.contains(ReadFlags::MOVED_TO))
    }
}

/// The number in a file below `/proc/sys`.
pub(super) fn setting(name: &str) -> Option<u64> {
    std::fs::read_to_string(Path::new("/proc/sys").join(name)).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rel(path: &str) -> RelPath {
        RelPath::new(path).unwrap()
    }

    #[test]
    fn a_watch_keeps_its_directory_when_that_is_moved() {
        let directory = tempfile::tempdir().unwrap();
        let at = directory.path();
        std::fs::create_dir_all(at.join("a/b/c")).unwrap();
        let mut watches = Watches::new().unwrap();
        let open = |path: &str| OwnedFd::from(std::fs::File::open(at.join(path)).unwrap());
        for path in ["a", "a/b", "a/b/c"] {
            watches.add(at, Some(&rel(path)), &open(path)).unwrap();
        }
        std::fs::rename(at.join("a/b"), at.join("x")).unwrap();
        watches.moved(&rel("a/b"), &rel("x"));
        std::fs::write(at.join("x/c/new"), "").unwrap();
        watches.pump().unwrap();
        let mut told = Vec::new();
        while let Some(event) = watches.next() {
            let name = event.name.clone();
            told.extend(name.map(|name| (watches.path(event.watch).unwrap().cloned(), name)));
        }
        assert!(told.contains(&(Some(rel("x/c")), b"new"[..].into())), "{told:?}");
        // Added once more under another name it is the same watch.
        watches.add(at, Some(&rel("y")), &open("x")).unwrap();
        assert_eq!(watches.count(), 3);
        watches.drop_within(&rel("x"));
        watches.drop_within(&rel("y"));
        assert_eq!(watches.count(), 1);
    }
}
