//! Following by events.

use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use rustix::fs::inotify::ReadFlags;
use rustix::io::Errno;

use super::{End, Follower, Identity, ROOT_PAUSE, age, is_silent};
use crate::config::Watch;
use crate::daemon::feed::Shared;
use crate::daemon::look::{Visit, walk};
use crate::daemon::status::Watching;
use crate::daemon::watch::{Event, Watches, setting};
use crate::daemon::writers::Writers;
use crate::filter::{IGNORE_FILE, STATE_DIRECTORY};
use crate::path::RelPath;
use crate::root::{FileKind, Follow, Metadata, Root};

/// A look because of a doubt comes so many times later than the last one took: a storm of events must not make it look all
/// the time.
const LOOK_SHARE: u32 = 4;

/// What the events of one batch leave to do.
#[derive(Debug, Default)]
struct Doubt {
    /// Everything is to be looked at.
    look: bool,
    /// The watches are not to be relied on.
    anew: bool,
    /// The source itself was moved, removed or unmounted.
    top: bool,
    /// A run has published into the source.
    published: bool,
}

/// Watches directories while they are walked, and notes what is in them.
struct Cover<'a> {
    watches: &'a mut Watches,
    shared: &'a Shared,
    source: &'a Path,
    /// Everything is looked at; who has files open was seen before. Otherwise something new is.
    all: Option<(&'a Writers, SystemTime)>,
    directories: usize,
    full: bool,
    failed: Option<Errno>,
    silent: Option<String>,
}

impl Visit for Cover<'_> {
    fn enter(&mut self, directory: Option<&RelPath>, descriptor: &OwnedFd) {
        self.directories += 1;
        if self.silent.is_none() {
            self.silent = is_silent(directory, descriptor);
        }
        // Watched before it is listed: what comes later is told, what was there is listed.
        match self.watches.add(self.source, directory, descriptor) {
            Ok(()) => {}
            Err(Errno::NOSPC) => self.full = true,
            // RACE: removed meanwhile.
            Err(Errno::NOENT | Errno::NOTDIR) => {}
            Err(errno) => self.failed = Some(errno),
        }
        // A long walk must not make the kernel's queue overflow.
        if let Err(errno) = self.watches.pump() {
            self.failed = Some(errno);
        }
    }

    fn list(&mut self, _: Option<&RelPath>, entries: &[(RelPath, Metadata)]) {
        let mut state = self.shared.state();
        let now = Instant::now();
        for (path, metadata) in entries {
            let directory = metadata.kind == FileKind::Directory;
            match self.all {
                Some((writers, clock)) => {
                    let held = !writers.is_empty() && writers.hold(metadata.device, metadata.inode);
                    state.settle.found(path, directory, age(metadata.ctime, clock), held, now);
                }
                None => state.settle.found_new(path, metadata.kind == FileKind::Regular, directory, now),
            }
        }
    }

    fn unreadable(&mut self, _: Option<&RelPath>) {}

    fn stopped(&self) -> bool {
        self.shared.is_stopped()
    }
}

impl Follower {
    pub(super) fn follow_events(&mut self, identity: Identity) -> End {
        let end = match self.events(identity) {
            Ok(never) => match never {},
            Err(end) => end,
        };
        self.shared.state().events = None;
        self.shared.end();
        end
    }

    fn events(&mut self, identity: Identity) -> Result<std::convert::Infallible, End> {
        let mut watches = watches()?;
        loop {
            let began = Instant::now();
            self.shared.begin();
            self.shared.state().events = Some(std::sync::Arc::clone(watches.descriptor()));
            self.look(identity, &mut watches)?;
            if watches.is_empty() {
                self.shared.end();
            }
            let looked = Instant::now();
            let anew = self.until_doubt(identity, &mut watches, looked, looked - began)?;
            if anew {
                watches = self::watches()?;
            }
        }
    }

    /// Looks at everything, and watches it.
    fn look(&mut self, identity: Identity, watches: &mut Watches) -> Result<(), End> {
        let root = self.again(identity)?;
        self.review_mounts(identity);
        // RACE: a file that is opened between this and the watch of its directory, and not written to for as long as it has to
        // be left alone, is taken for finished. It is sent again when it is written to.
        let writers = Writers::look();
        let shared = std::sync::Arc::clone(&self.shared);
        let mut cover = Cover {
            watches,
            shared: &shared,
            source: &self.source,
            all: Some((&writers, SystemTime::now())),
            directories: 0,
            full: false,
            failed: None,
            silent: None,
        };
        let walked = walk(&root, None, &mut self.ignores, &mut cover);
        let (directories, silent) = (cover.directories, cover.silent.take());
        if self.shared.is_stopped() {
            return Err(End::Stopped);
        }
        walked.map_err(|error| self.lost(&error))?;
        if cover.full {
            return Err(End::Poll(limit_of_watches(directories)));
        }
        if let Some(errno) = cover.failed {
            let why = crate::error::in_words(&std::io::Error::from(errno));
            return Err(End::Poll(format!("the kernel's events cannot be had: {why}")));
        }
        match silent {
            Some(why) if self.options.watch == Watch::Auto => return Err(End::Poll(why)),
            why => {
                self.drop_gone(&root);
                self.watch_state(&root, watches);
                self.vouch(&root);
                self.judge(&root);
                // RACE: replaced while it was looked at.
                self.again(identity)?;
                let (mode, directories) = ("events".to_owned(), directories as u64);
                self.hand_out_everything(Watching { mode, directories, why, ..Watching::default() });
            }
        }
        Ok(())
    }

    /// Follows events until everything has to be looked at. True when the watches are to be made anew.
    fn until_doubt(
        &mut self,
        identity: Identity,
        watches: &mut Watches,
        looked: Instant,
        took: Duration,
    ) -> Result<bool, End> {
        let rescan = looked + self.options.rescan;
        let mut doubt = Doubt::default();
        let (mut checked, mut reviewed) = (looked, looked);
        loop {
            let due = self.shared.state().settle.next();
            let until = [Some(rescan), Some(checked + ROOT_PAUSE), due].into_iter().flatten().min();
            // What was taken into memory meanwhile wakes nobody.
            if watches.is_empty() {
                self.wait(Some(watches.descriptor().as_fd()), until);
            }
            if self.shared.is_stopped() {
                return Err(End::Stopped);
            }
            self.shared.begin();
            watches.pump().map_err(|errno| End::Poll(crate::error::in_words(&std::io::Error::from(errno))))?;
            let now = Instant::now();
            if !watches.is_empty() || now >= checked + ROOT_PAUSE || due.is_some_and(|due| due <= now) {
                let root = self.again(identity)?;
                checked = now;
                self.apply(&root, watches, &mut doubt)?;
                if doubt.top {
                    return Err(End::Replaced);
                }
                if std::mem::take(&mut doubt.published) {
                    self.vouch(&root);
                }
                self.settle(&root);
            }
            if now >= reviewed + ROOT_PAUSE {
                reviewed = now;
                // What was mounted meanwhile covers what is watched.
                doubt.look |= self.review_mounts(identity);
            }
            self.shared.end();
            doubt.look |= self.shared.state().settle.shrink();
            let may = looked + took * LOOK_SHARE;
            if now >= rescan || (doubt.look && now >= may) {
                return Ok(doubt.anew);
            }
        }
    }

    /// Takes note of what the kernel told.
    fn apply(&mut self, root: &Root, watches: &mut Watches, doubt: &mut Doubt) -> Result<(), End> {
        while let Some(event) = watches.next() {
            if event.flags.contains(ReadFlags::QUEUE_OVERFLOW) {
                tracing::info!(source = %crate::error::shown(&self.source), "more changed than the kernel can tell of");
                (doubt.look, doubt.anew) = (true, true);
                continue;
            }
            let Some(directory) = watches.path(event.watch).map(|path| path.cloned()) else { continue };
            let of_itself = ReadFlags::IGNORED | ReadFlags::UNMOUNT | ReadFlags::DELETE_SELF | ReadFlags::MOVE_SELF;
            if event.flags.intersects(of_itself) {
                doubt.top |= directory.is_none();
                // What a file system that was unmounted covered can be seen now.
                doubt.look |= event.flags.contains(ReadFlags::UNMOUNT);
                if event.flags.contains(ReadFlags::IGNORED) {
                    watches.forget(event.watch);
                }
                continue;
            }
            let Some(name) = &event.name else { continue };
            let path = match &directory {
                Some(directory) => directory.join(name),
                None => RelPath::new(name),
            };
            // A path that is too long cannot be sent; the scan of a run says so.
            let Ok(path) = path else { continue };
            if path.components().any(|name| name == STATE_DIRECTORY) {
                doubt.published |= self.state_changed(root, watches, &event, &path);
                continue;
            }
            if path.name() == IGNORE_FILE && !event.flags.intersects(ReadFlags::MODIFY | ReadFlags::ATTRIB) {
                // What takes part is another set from now on, and so are the directories to watch.
                (doubt.look, doubt.anew) = (true, true);
                self.ignores.read(root, directory.as_ref());
            }
            self.change(root, watches, &event, &path, doubt)?;
        }
        Ok(())
    }

    fn change(
        &mut self,
        root: &Root,
        watches: &mut Watches,
        event: &Event,
        path: &RelPath,
        doubt: &mut Doubt,
    ) -> Result<(), End> {
        let (flags, directory) = (event.flags, event.flags.contains(ReadFlags::ISDIR));
        // Until everything is looked at again, what an ignore file leaves out by now is watched.
        let counts = match doubt.anew {
            true => self.ignores.takes_part(path, directory),
            false => self.ignores.admits(path, directory),
        };
        let now = Instant::now();
        if flags.contains(ReadFlags::MOVED_FROM) {
            return self.moved(root, watches, event, path, doubt);
        }
        if !counts {
            return Ok(());
        }
        if flags.contains(ReadFlags::DELETE) {
            self.shared.state().settle.gone(path, now);
        } else if flags.intersects(ReadFlags::CREATE | ReadFlags::MOVED_TO) {
            if directory {
                self.cover(root, watches, path)?;
            } else {
                self.appeared(root, path, flags.contains(ReadFlags::CREATE), now);
            }
        } else if flags.contains(ReadFlags::CLOSE_WRITE) {
            self.shared.state().settle.closed(path, now);
        } else if flags.contains(ReadFlags::MODIFY) {
            self.shared.state().settle.written(path, now);
        } else if flags.contains(ReadFlags::ATTRIB) {
            self.shared.state().settle.touched(path, directory, now);
        }
        Ok(())
    }

    /// A name that was not there. A regular file that was created is being written. One that came from elsewhere, by a rename or
    /// as a second name, may be open for writing still, as it was there: it is asked who has it. A link is whole.
    fn appeared(&mut self, root: &Root, path: &RelPath, created: bool, now: Instant) {
        // RACE: gone again, which is told next.
        let Ok(found) = root.stat(path, Follow::Never) else { return };
        let mut state = self.shared.state();
        match found.kind {
            FileKind::Regular if created && found.links < 2 => state.settle.written(path, now),
            FileKind::Regular => state.settle.found_new(path, true, false, now),
            kind => state.settle.touched(path, kind == FileKind::Directory, now),
        }
    }

    fn moved(
        &mut self,
        root: &Root,
        watches: &mut Watches,
        event: &Event,
        from: &RelPath,
        doubt: &mut Doubt,
    ) -> Result<(), End> {
        let (now, directory) = (Instant::now(), event.flags.contains(ReadFlags::ISDIR));
        // RACE: the kernel tells both halves one after the other, but they may be read in two pieces. A second half that comes
        // still later is something new.
        let _ = watches.pump();
        let other = if watches.next_is_of(event.cookie) { watches.next() } else { None };
        let to = other.and_then(|other| {
            let parent = watches.path(other.watch)?.cloned();
            let name = other.name?;
            parent.map_or_else(|| RelPath::new(&name), |parent| parent.join(&name)).ok()
        });
        if let Some(to) = to.as_ref().filter(|to| to.name() == IGNORE_FILE) {
            (doubt.look, doubt.anew) = (true, true);
            self.ignores.read(root, to.parent().as_ref());
        }
        let to = to.filter(|to| self.ignores.admits(to, directory));
        let Some(to) = to else {
            if directory {
                watches.drop_within(from);
            }
            if self.ignores.admits(from, directory) {
                self.shared.state().settle.gone(from, now);
                // It was exchanged for another, which the kernel told before.
                match root.stat(from, Follow::Never) {
                    Ok(found) if found.kind == FileKind::Directory => return self.cover(root, watches, from),
                    Ok(_) => self.appeared(root, from, false, now),
                    Err(_) => {}
                }
            }
            return Ok(());
        };
        let admitted = self.ignores.admits(from, directory);
        if admitted {
            self.shared.state().settle.moved(from, &to, directory, now);
        }
        if directory {
            watches.moved(from, &to);
            self.cover(root, watches, &to)?;
        } else {
            self.shared.state().settle.touched(&to, false, now);
        }
        // Exchanged: each half of that has taken the other's watches with it.
        match root.stat(from, Follow::Never) {
            Ok(found) if admitted && found.kind == FileKind::Directory => self.cover(root, watches, from),
            Ok(_) if admitted => {
                self.appeared(root, from, false, now);
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// Watches a directory that is new, and notes what is in it.
    fn cover(&mut self, root: &Root, watches: &mut Watches, top: &RelPath) -> Result<(), End> {
        let shared = std::sync::Arc::clone(&self.shared);
        shared.state().settle.touched(top, true, Instant::now());
        let (all, source) = (None, self.source.as_path());
        let mut cover =
            Cover { watches, shared: &shared, source, all, directories: 0, full: false, failed: None, silent: None };
        // RACE: gone again, or not to be listed: what is above tells, and the scan of a run says so.
        let _ = walk(root, Some(top), &mut self.ignores, &mut cover);
        let (full, failed, silent) = (cover.full, cover.failed, cover.silent.take());
        let known = watches.count();
        shared.state().watching.directories = known as u64;
        if full {
            return Err(End::Poll(limit_of_watches(known + 1)));
        }
        if let Some(errno) = failed {
            let why = crate::error::in_words(&std::io::Error::from(errno));
            return Err(End::Poll(format!("the kernel's events cannot be had: {why}")));
        }
        match silent {
            Some(why) if self.options.watch == Watch::Auto => Err(End::Poll(why)),
            _ => Ok(()),
        }
    }
}

fn watches() -> Result<Watches, End> {
    Watches::new().map_err(|errno| {
        let name = "fs.inotify.max_user_instances";
        End::Poll(match errno {
            Errno::MFILE => {
                let now = setting("fs/inotify/max_user_instances").unwrap_or_default();
                format!("this user watches with too many programs; raise {name} (it is {now}) with sysctl")
            }
            other => format!("inotify cannot be had: {}", crate::error::in_words(&std::io::Error::from(other))),
        })
    })
}

/// What to say where there are too few watches for so many directories.
fn limit_of_watches(directories: usize) -> String {
    let now = setting("fs/inotify/max_user_watches").unwrap_or_default();
    let wanted = (now + directories as u64).next_multiple_of(65_536);
    format!(
        "there are too few watches for its {directories} directories; raise fs.inotify.max_user_watches (it is {now}): \
         sysctl -w fs.inotify.max_user_watches={wanted}"
    )
}
