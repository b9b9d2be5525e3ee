//! The threads of one job: one that watches its source, one for each target.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::feed::{Feed, FeedOptions, Ready};
use super::fetch::Looked;
use super::recent::Recent;
use super::run::Plan;
use super::status::{JobStatus, Trouble, Watching};
use super::target::{Happened, Lane};
use super::tell::{Happening, Teller};
use super::{Connect, Places, clock};
use crate::config::{Job, Schedule};
use crate::endpoint::shared::SharedSource;
use crate::path::RelPath;
use crate::policy::PolicySpec;
use crate::sync::{Rate, give_way};

/// Another machine is not asked more often.
const REMOTE_PAUSE: Duration = Duration::from_secs(1);
/// So many unfinished paths are named to people.
const UNFINISHED_SHOWN: usize = 20;
/// How often it is seen whether a source that is gone is back.
const GONE_PAUSE: Duration = Duration::from_secs(2);

pub(super) struct JobThreads {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

struct Shared {
    job: Job,
    policy: PolicySpec,
    stop: Arc<AtomicBool>,
    lanes: Vec<Lane>,
    /// What the runs to all of them read.
    source: SharedSource,
    /// What may go to each target now.
    rates: Vec<Rate>,
    feed: Mutex<Option<Arc<Feed>>>,
    halted: Mutex<Option<Trouble>>,
    paused: AtomicBool,
    /// Somebody wants a source of another machine to be compared at once.
    asked: AtomicBool,
    safety: Mutex<Safety>,
    /// By target: the units of the source that it is known to have, or not to need.
    units: Mutex<Vec<BTreeSet<RelPath>>>,
    /// What of a source of another machine is not finished: the first of it, and how much it is.
    unfinished: Mutex<(Vec<String>, u64)>,
}

/// What is on its way, and what is at as many targets as it has to be.
#[derive(Default)]
struct Safety {
    /// What was handed out and is not safe yet, by number: the paths, or `None` for everything.
    open: BTreeMap<u64, Option<Vec<String>>>,
    /// All up to this number is safe.
    safe_through: u64,
    /// Something was published since others were told last.
    changed: bool,
}

impl JobThreads {
    /// A job that is not started yet.
    pub(super) fn new(job: Job, policy: PolicySpec) -> JobThreads {
        let stop = Arc::new(AtomicBool::new(false));
        let lanes = job.targets.iter().map(|target| Lane::new(target, Arc::clone(&stop))).collect();
        let rates = job.targets.iter().map(|_| Rate::default()).collect();
        let source = SharedSource::new(job.targets.len());
        let shared = Shared {
            rates,
            source,
            job,
            policy,
            stop,
            lanes,
            feed: Mutex::default(),
            halted: Mutex::default(),
            paused: AtomicBool::new(false),
            asked: AtomicBool::new(false),
            safety: Mutex::default(),
            units: Mutex::default(),
            unfinished: Mutex::default(),
        };
        JobThreads { shared: Arc::new(shared), threads: Vec::new() }
    }

    pub(super) fn name(&self) -> &str {
        &self.shared.job.name
    }

    pub(super) fn is_of(&self, job: &Job, policy: &PolicySpec) -> bool {
        self.shared.job == *job && self.shared.policy == *policy
    }

    /// Starts its threads, where they do not run already.
    pub(super) fn start(
        &mut self,
        places: &Places,
        connect: &Arc<dyn Connect>,
        recent: &Arc<Recent>,
        teller: &Teller,
    ) -> std::io::Result<()> {
        if !self.threads.is_empty() {
            return Ok(());
        }
        let actor = crate::scan::names::actor();
        self.shared.keep_rate();
        for number in 0..self.shared.lanes.len() {
            let (shared, connect, recent) = (Arc::clone(&self.shared), Arc::clone(connect), Arc::clone(recent));
            let (actor, state): (String, PathBuf) = (actor.clone(), places.state.clone());
            let teller = teller.clone();
            let serve = move || {
                shared.give_way();
                let watched = Arc::clone(&shared);
                let guard =
                    Arc::new(move |path: &RelPath| watched.feed().is_some_and(|feed| feed.is_being_written(path)));
                let watched = Arc::clone(&shared);
                let file_guard =
                    Arc::new(move |path: &RelPath| watched.feed().is_some_and(|feed| feed.is_file_being_written(path)));
                let rate = shared.rates[number].clone();
                let asked = Arc::clone(&shared);
                let held_back = Arc::new(move || asked.feed().map(|feed| feed.held_back()).unwrap_or_default());
                let safe = || shared.safe_units(number);
                let followed = || shared.feed().and_then(|feed| feed.followed());
                let there = Arc::clone(&shared);
                let unfinished = Arc::new(move |held| there.note_unfinished(held));
                let plan = Plan {
                    safe: &safe,
                    followed: &followed,
                    job: &shared.job,
                    policy: &shared.policy,
                    actor: &actor,
                    state: &state,
                    held_back,
                    guard,
                    file_guard,
                    shared: &shared.source,
                    rate,
                    looked: Looked::default(),
                    unfinished,
                };
                let happened = |what: Happened<'_>| shared.happened(number, &what, &teller);
                shared.lanes[number].serve(&plan, &*connect, &recent, &happened);
            };
            self.threads.push(std::thread::Builder::new().name("target".into()).spawn(serve)?);
        }
        let (shared, state) = (Arc::clone(&self.shared), places.state.clone());
        self.threads.push(std::thread::Builder::new().name("watch".into()).spawn(move || {
            shared.give_way();
            shared.watch(&state);
        })?);
        Ok(())
    }

    pub(super) fn pause(&self, paused: bool) {
        self.shared.paused.store(paused, Ordering::Relaxed);
        self.shared.lanes.iter().for_each(|lane| lane.pause(paused));
    }

    /// Tries again at once what waits for its time, and compares everything, also where nothing was noticed.
    pub(super) fn hurry(&self) {
        self.shared.asked.store(true, Ordering::Relaxed);
        if let Some(feed) = self.shared.feed() {
            feed.ask();
        }
        self.shared.lanes.iter().for_each(Lane::hurry);
    }

    pub(super) fn is_paused(&self) -> bool {
        self.shared.paused.load(Ordering::Relaxed)
    }

    pub(super) fn is_alive(&self) -> bool {
        let watches = || self.shared.feed().is_none_or(|feed| feed.is_alive());
        self.threads.iter().all(|thread| !thread.is_finished()) && watches()
    }

    pub(super) fn ask_to_stop(&self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        if let Some(feed) = self.shared.feed() {
            feed.stop();
        }
        self.shared.lanes.iter().for_each(Lane::wake);
    }

    /// Has what goes on keep to the rate of this time of the day.
    pub(super) fn keep_rate(&self) {
        self.shared.keep_rate();
    }

    /// Waits for its threads. True where all ended in time.
    pub(super) fn join(self, until: Instant) -> bool {
        while self.threads.iter().any(|thread| !thread.is_finished()) {
            if Instant::now() >= until {
                return false;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        self.threads.into_iter().for_each(|thread| drop(thread.join()));
        true
    }

    pub(super) fn status(&self) -> JobStatus {
        let shared = &self.shared;
        let feed = shared.feed();
        let mode = if shared.job.remote_source().is_some() { "polling" } else { "starting" };
        let starting = || Watching { mode: mode.into(), ..Watching::default() };
        let there = || shared.unfinished.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let (unfinished, unfinished_count) = feed.as_ref().map_or_else(there, |feed| feed.unfinished());
        JobStatus {
            name: shared.job.name.clone(),
            source: crate::error::shown(&shared.job.source).to_string(),
            paused: shared.paused.load(Ordering::Relaxed),
            watching: feed.as_ref().map_or_else(starting, |feed| feed.watching()),
            unfinished,
            unfinished_count,
            halted: shared.halted.lock().unwrap_or_else(PoisonError::into_inner).clone(),
            targets: shared.lanes.iter().map(Lane::status).collect(),
        }
    }
}

impl Shared {
    /// Gives way to others as the job says, from now on and with all that this thread starts.
    fn give_way(&self) {
        for error in give_way(self.job.nice, self.job.io_class) {
            tracing::warn!(job = self.job.name.as_str(), "{}", crate::error::chain(&error));
        }
    }

    fn feed(&self) -> Option<Arc<Feed>> {
        self.feed.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn note_unfinished(&self, held: BTreeSet<RelPath>) {
        let first = held.iter().take(UNFINISHED_SHOWN).map(ToString::to_string).collect();
        *self.unfinished.lock().unwrap_or_else(PoisonError::into_inner) = (first, held.len() as u64);
    }

    fn keep_rate(&self) {
        let rate = self.job.bandwidth.as_ref().and_then(Schedule::now);
        self.rates.iter().for_each(|one| one.set(rate));
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// A source of another machine gives no events: all of it is compared every so often, and when somebody asks for it.
    fn ask_again(&self) {
        while !self.stopped() {
            let ready = Ready::Everything { except: BTreeSet::new() };
            let number = self.hand_out(&ready);
            self.add(&ready, number);
            self.asked.store(false, Ordering::Relaxed);
            let until = Instant::now() + self.job.poll.0.max(REMOTE_PAUSE);
            while !self.stopped() && !self.asked.load(Ordering::Relaxed) && Instant::now() < until {
                std::thread::sleep(Duration::from_millis(20));
            }
        }
    }

    /// Passes on what may be sent. A source that cannot be watched is tried again, and nothing is sent meanwhile.
    fn watch(&self, state: &Path) {
        if self.job.remote_source().is_some() {
            return self.ask_again();
        }
        while !self.stopped() {
            match Feed::start(&self.job.source, self.feed_options(state)) {
                Ok(feed) => {
                    *self.feed.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(feed));
                    self.pass_on();
                }
                Err(error) => self.halt(Some(crate::error::chain(&error))),
            }
            self.pause_for(GONE_PAUSE);
        }
    }

    fn pass_on(&self) {
        let Some(feed) = self.feed() else { return };
        // RACE: asked to stop before the feed was there to be told.
        while !self.stopped() {
            let ready = feed.next(Some(Instant::now() + GONE_PAUSE));
            self.halt(feed.gone());
            if let Some(ready) = ready
                && self.halted.lock().unwrap_or_else(PoisonError::into_inner).is_none()
            {
                // What is only staged is on its way to nobody.
                let number = if matches!(ready, Ready::Early(_)) { 0 } else { self.hand_out(&ready) };
                self.add(&ready, number);
            }
        }
    }

    fn add(&self, ready: &Ready, number: u64) {
        let at = Instant::now();
        self.lanes.iter().for_each(|lane| lane.add(ready.clone(), number, at));
    }

    /// Notes what is on its way from now on, and gives it a number.
    fn hand_out(&self, ready: &Ready) -> u64 {
        let mut safety = self.safety.lock().unwrap_or_else(PoisonError::into_inner);
        let number = safety.open.last_key_value().map_or(safety.safe_through, |(last, _)| *last) + 1;
        let paths = match ready {
            Ready::Everything { .. } => None,
            Ready::Paths(paths) | Ready::Early(paths) => Some(paths.iter().map(ToString::to_string).collect()),
        };
        // Where everything is compared anyway, what was open before is a part of it.
        if paths.is_none() {
            safety.open.clear();
        }
        safety.open.insert(number, paths);
        number
    }

    /// A target's run ended.
    fn happened(&self, lane: usize, what: &Happened<'_>, teller: &Teller) {
        let (job, source) = (self.job.name.as_str(), crate::error::shown(&self.job.source).to_string());
        match what {
            Happened::Published { changed, units, needed } => {
                if let Some(units) = units {
                    self.has_units(lane, units);
                }
                // RACE: the others got there while this one was on its way.
                if self.safe_units(lane).is_some_and(|safe| needed.iter().any(|unit| safe.contains(unit))) {
                    self.lanes[lane].look_at_needed();
                }
                self.safety.lock().unwrap_or_else(PoisonError::into_inner).changed |= changed;
                let mut through: Vec<u64> = self.lanes.iter().map(Lane::done_through).collect();
                through.sort_unstable_by(|a, b| b.cmp(a));
                let now_safe = through[self.quorum() - 1];
                let Some(paths) = self.settled(now_safe) else { return };
                let there = self.lanes.iter().filter(|lane| lane.done_through() >= now_safe);
                let targets: Vec<&str> = there.map(|lane| lane.target.as_str()).collect();
                tracing::debug!(job, targets = targets.len(), "safe");
                if !self.job.on_published.is_empty() {
                    let command = &self.job.on_published;
                    teller.tell(Happening::published(command, job, &source, &targets, paths.as_deref()));
                }
            }
            Happened::BeganToFail(trouble) if !self.job.on_failed.is_empty() => {
                let (command, target) = (&self.job.on_failed, self.lanes[lane].target.as_str());
                teller.tell(Happening::failed(command, job, &source, target, &trouble.message));
            }
            Happened::BeganToFail(_) => {}
        }
    }

    fn quorum(&self) -> usize {
        self.job.quorum.unwrap_or(self.lanes.len()).clamp(1, self.lanes.len().max(1))
    }

    /// The units of the source that are at as many targets as they have to be, this one counted in; `None` for all.
    fn safe_units(&self, lane: usize) -> Option<BTreeSet<RelPath>> {
        let others = self.quorum() - 1;
        if others == 0 {
            return None;
        }
        let mut at: BTreeMap<RelPath, usize> = BTreeMap::new();
        let units = self.units.lock().unwrap_or_else(PoisonError::into_inner);
        for (_, there) in units.iter().enumerate().filter(|(other, _)| *other != lane) {
            there.iter().for_each(|unit| *at.entry(unit.clone()).or_default() += 1);
        }
        Some(at.into_iter().filter(|(_, count)| *count >= others).map(|(unit, _)| unit).collect())
    }

    /// What a target has got now. Where it is more than before, others may be free to remove theirs.
    fn has_units(&self, lane: usize, units: &BTreeSet<RelPath>) {
        let more = {
            let mut known = self.units.lock().unwrap_or_else(PoisonError::into_inner);
            known.resize(self.lanes.len(), BTreeSet::new());
            let more = !units.is_subset(&known[lane]);
            known[lane].clone_from(units);
            more
        };
        let others = self.lanes.iter().enumerate().filter(|(other, _)| more && *other != lane);
        others.for_each(|(_, other)| other.look_at_needed());
    }

    /// Takes what is safe now out of what is on its way: its paths, or everything. `None` where nothing more is.
    fn settled(&self, through: u64) -> Option<Option<Vec<String>>> {
        let mut safety = self.safety.lock().unwrap_or_else(PoisonError::into_inner);
        if through <= safety.safe_through {
            return None;
        }
        safety.safe_through = through;
        let later = safety.open.split_off(&(through + 1));
        let settled = std::mem::replace(&mut safety.open, later);
        let paths: Option<Vec<Vec<String>>> = settled.into_values().collect();
        // Most looks at everything find nothing to do.
        std::mem::take(&mut safety.changed).then(|| paths.map(|paths| paths.concat()))
    }

    /// Says that nothing is sent, and why; or that it is again.
    fn halt(&self, reason: Option<String>) {
        let mut halted = self.halted.lock().unwrap_or_else(PoisonError::into_inner);
        let (job, source) = (self.job.name.as_str(), crate::error::shown(&self.job.source).to_string());
        match (&*halted, reason) {
            (Some(known), Some(reason)) if known.message == reason => {}
            (_, Some(reason)) => {
                tracing::error!(job, source, "nothing is sent: {reason}");
                let hint = "nothing is deleted at the targets; bring the source back, or change the job".to_owned();
                *halted = Some(Trouble { time: clock(), message: reason, hint: Some(hint), times: 1 });
            }
            (Some(_), None) => {
                tracing::info!(job, source, "the source is there again");
                *halted = None;
            }
            (None, None) => {}
        }
        let held = halted.is_some();
        self.lanes.iter().for_each(|lane| lane.hold(held));
    }

    fn pause_for(&self, pause: Duration) {
        let until = Instant::now() + pause;
        while !self.stopped() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn feed_options(&self, state: &Path) -> FeedOptions {
        let job = &self.job;
        // One for each source, whatever the job is called.
        let name = blake3::hash(job.source.as_os_str().as_encoded_bytes()).to_hex();
        let note = |what: &str| Some(state.join(format!("{what}-{}", &name[..16])));
        FeedOptions {
            settle: job.settle.0,
            unit: job.unit.clone(),
            ready: job.ready.clone(),
            last: job.last.clone(),
            append_only: job.append_only.clone(),
            exclude: job.exclude.clone(),
            watch: job.watch,
            poll: job.poll.0,
            rescan: job.rescan.0,
            mount_note: note("mounted"),
            mounts_note: note("mounts"),
        }
    }
}
