//! The thread of a feed: looks at a source, follows what changes, and says what is ready.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustix::event::{PollFd, PollFlags, poll};

use super::feed::{FeedOptions, Shared};
use super::filesystem;
use super::ignores::Ignores;
use super::settle::{Ask, Held};
use super::status::Watching;
use super::writers::{Throttle, Writers};
use crate::config::Watch;
use crate::error::shown;
use crate::filter::Filter;
use crate::layout::complete;
use crate::manifest::Timestamp;
use crate::path::RelPath;
use crate::root::{FileKind, Follow, Root};
use crate::staging::{Standing, standing};

mod events;
mod poller;
mod vouch;

/// How often it is seen whether the source is still the directory that it was: no event tells when one above it is moved.
const ROOT_PAUSE: Duration = Duration::from_secs(2);
/// How often it is seen whether a source that is gone is back.
const GONE_PAUSE: Duration = Duration::from_millis(500);

/// How often it is seen whether a run that publishes into the source has come to its end.
const PUBLISHING_PAUSE: Duration = Duration::from_millis(20);
const REPLACED_PAUSE: Duration = Duration::from_millis(50);

/// Why a source is not followed as it was any more.
#[derive(Debug)]
pub(super) enum End {
    Stopped,
    /// It is not there, or is another directory.
    Replaced,
    /// Events are not to be had.
    Poll(String),
    /// It is time to begin from the start.
    Again,
}

/// Device and inode of the source.
type Identity = (u64, u64);

#[derive(Debug)]
pub(super) struct Follower {
    shared: Arc<Shared>,
    source: PathBuf,
    options: FeedOptions,
    ignores: Ignores,
    throttle: Throttle,
    /// A file system of its own was mounted at the source.
    was_mounted: bool,
}

impl Follower {
    pub(super) fn new(shared: Arc<Shared>, source: PathBuf, options: FeedOptions, filter: Filter) -> Follower {
        let ignores = Ignores::new(filter);
        let was_mounted = options.mount_note.as_ref().is_some_and(|note| note.exists());
        Follower { shared, source, options, ignores, throttle: Throttle::default(), was_mounted }
    }

    /// Follows the source until the feed is stopped.
    pub(super) fn run(mut self) {
        let mut polls = None;
        while !self.shared.is_stopped() {
            let (root, identity) = match self.open() {
                Ok(found) => found,
                Err(reason) => {
                    let mut state = self.shared.state();
                    (state.gone, state.followed) = (Some(reason), None);
                    drop(state);
                    self.shared.tell();
                    self.wait(None, Some(Instant::now() + GONE_PAUSE));
                    continue;
                }
            };
            self.shared.state().followed = Some(identity);
            let why = polls.take().or_else(|| self.polls_because(&root));
            // Nothing is held open: it would keep a file system from being unmounted.
            drop(root);
            let end = match why {
                Some(why) => self.poll(identity, why),
                None => self.follow_events(identity),
            };
            if matches!(end, End::Replaced) {
                self.shared.state().followed = None;
            }
            match end {
                End::Poll(why) => {
                    tracing::warn!(source = %shown(&self.source), "changes are looked for: {why}");
                    polls = Some(why);
                }
                // What is there and cannot be listed must not be tried all the time.
                End::Replaced => self.wait(None, Some(Instant::now() + REPLACED_PAUSE)),
                End::Stopped | End::Again => {}
            }
        }
    }

    /// Opens the source, where it is what it was.
    fn open(&mut self) -> Result<(Root, Identity), String> {
        let root = Root::open(&self.source).map_err(|error| crate::error::chain(&error))?;
        let found = root.stat_root().map_err(|error| crate::error::chain(&error))?;
        let above = std::fs::metadata(self.source.join("..")).map_err(|error| crate::error::in_words(&error))?;
        let above = {
            use std::os::unix::fs::MetadataExt as _;
            let device = above.dev();
            u64::from(rustix::fs::major(device)) << 32 | u64::from(rustix::fs::minor(device))
        };
        let is_mounted = above != found.device;
        let note = self.options.mount_note.as_deref();
        if self.was_mounted && !is_mounted {
            let otherwise = note
                .map_or_else(|| "reload the job".to_owned(), |note| format!("remove '{}' and restart", shown(note)));
            return Err(format!(
                "the file system that was mounted at '{}' is not mounted; mount it, or {otherwise} if it is to be without it",
                shown(&self.source)
            ));
        }
        if is_mounted
            && !self.was_mounted
            && let Some(note) = note
            && let Err(error) = std::fs::write(note, self.source.as_os_str().as_encoded_bytes())
        {
            tracing::warn!(
                "a restart would not know that '{}' is a mount: {}",
                shown(&self.source),
                crate::error::in_words(&error)
            );
        }
        self.was_mounted = is_mounted;
        Ok((root, (found.device, found.inode)))
    }

    /// The source, when it is still the directory that is followed.
    fn again(&mut self, identity: Identity) -> Result<Root, End> {
        match self.open() {
            Ok((root, found)) if found == identity => Ok(root),
            _ => Err(End::Replaced),
        }
    }

    /// The top of the source cannot be listed.
    fn lost(&self, error: &dyn std::error::Error) -> End {
        self.shared.state().gone = Some(crate::error::chain(error));
        self.shared.tell();
        End::Replaced
    }

    /// Takes note of what is mounted in the source. True where that is not what it was.
    fn review_mounts(&mut self, identity: Identity) -> bool {
        let ignores = &self.ignores;
        self.shared.mounts().review(Some(identity), &mut |path| ignores.takes_part(path, true))
    }

    fn polls_because(&self, root: &Root) -> Option<String> {
        if self.options.watch == Watch::Polling {
            return Some("the job says so".to_owned());
        }
        let directory = root.open_dir(None, Follow::Never).ok()?;
        is_silent(None, &directory).filter(|_| self.options.watch == Watch::Auto)
    }

    /// Waits for the descriptor, the time or the end.
    fn wait(&self, descriptor: Option<BorrowedFd<'_>>, until: Option<Instant>) {
        let mut watched = vec![PollFd::new(&self.shared.stop, PollFlags::IN)];
        watched.extend(descriptor.map(|descriptor| PollFd::from_borrowed_fd(descriptor, PollFlags::IN)));
        let left = until.map(|until| until.saturating_duration_since(Instant::now()));
        let left = left.and_then(|left| rustix::event::Timespec::try_from(left).ok());
        // What it says is looked at by whoever waits; EINTR is nothing.
        let _ = poll(&mut watched, left.as_ref());
    }

    /// Hands out what is ready.
    fn settle(&mut self, root: &Root) {
        // What a run publishes here is passed on when it is complete, and told by its manifest.
        if matches!(standing(root), Standing::Publishing(_)) {
            return self.shared.state().settle.put_off(Instant::now() + PUBLISHING_PAUSE);
        }
        self.judge(root);
        let mut state = self.shared.state();
        let (ready, early) = (state.settle.take(), state.settle.take_early());
        if !ready.is_empty() || !early.is_empty() {
            state.paths.extend(ready);
            state.early.extend(early);
            self.shared.tell();
        }
    }

    /// Answers what is asked of the files, until nothing is.
    fn judge(&mut self, root: &Root) {
        loop {
            let now = Instant::now();
            let asks = self.shared.state().settle.due(now);
            if asks.is_empty() {
                break;
            }
            for ask in asks {
                match ask {
                    Ask::Held(paths) => self.answer_held(root, &paths, now),
                    Ask::Complete(unit) => {
                        let ready = self.shared.state().settle.when().clone();
                        let complete = complete::unfinished(root, &unit, &ready).is_none();
                        self.shared.state().settle.complete(&unit, complete, now);
                    }
                    Ask::Names(pointer) => {
                        let named = complete::named_by(root, &pointer);
                        self.shared.state().settle.names(&pointer, named, now);
                    }
                }
            }
        }
    }

    fn answer_held(&mut self, root: &Root, paths: &[RelPath], now: Instant) {
        if let Some(at) = self.throttle.wait(now) {
            return self.shared.state().settle.ask_later(paths, at);
        }
        let began = Instant::now();
        let writers = Writers::look();
        self.throttle.spent(began.elapsed());
        for path in paths {
            let held = match root.stat(path, Follow::Never) {
                Err(_) => Held::No,
                Ok(found) if writers.hold(found.device, found.inode) => Held::Yes,
                Ok(_) if writers.complete => Held::No,
                Ok(_) => Held::Untold,
            };
            self.shared.state().settle.held(path, held, now);
        }
    }

    /// What waits and is not there any more, without having been seen to go, or does not take part any more.
    fn drop_gone(&self, root: &Root) {
        let paths = self.shared.state().settle.paths();
        for path in paths {
            match root.stat(&path, Follow::Never) {
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                    self.shared.state().settle.gone(&path, Instant::now());
                }
                Ok(found) if !self.ignores.takes_part(&path, found.kind == FileKind::Directory) => {
                    self.shared.state().settle.forget(&path);
                }
                _ => {}
            }
        }
    }

    /// Everything was looked at: it is handed out, without what is not finished.
    fn hand_out_everything(&self, watching: Watching) {
        let mut state = self.shared.state();
        state.settle.take();
        state.paths.clear();
        state.everything = true;
        state.gone = None;
        state.watching = Watching { last_scan: Some(super::clock()), ..watching };
        self.shared.tell();
    }
}

/// Why a directory's events do not tell all.
fn is_silent(path: Option<&RelPath>, directory: &OwnedFd) -> Option<String> {
    let kind = filesystem::silent(directory)?;
    let place = path.map_or_else(|| "the source".to_owned(), |path| format!("'{path}'"));
    Some(format!("{place} is on {kind}, which does not tell of what others change"))
}

/// How long ago something happened by the clock; nothing for what lies ahead, as after the clock was put back.
fn age(time: Timestamp, clock: SystemTime) -> Duration {
    let Ok(seconds) = u64::try_from(time.seconds) else { return Duration::MAX };
    let then = UNIX_EPOCH.checked_add(Duration::new(seconds, time.nanoseconds));
    then.and_then(|then| clock.duration_since(then).ok()).unwrap_or_default()
}
