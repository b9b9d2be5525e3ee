//! `lockstep check`: whether what lies in a directory is what its manifest says.

use std::collections::BTreeSet;
use std::io::{ErrorKind, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use clap::Args;
use sha2::{Digest as _, Sha256};

use super::arguments::Place;
use super::audit::place as audit;
use super::display::{Display, Verbosity};
use super::inspect::Rules;
use super::manifest::{Model, Trust, read_text};
use super::stop::Stop;
use super::{Failure, output, shown, transfer};
use crate::audit::{self as audit_log, AuditError, AuditLog, AuditRecord, LOG};
use crate::check::{self, CheckError, Depth, Kind, Options, Outcome, Report, Slot, SlotError, Verdict};
use crate::drift;
use crate::error::{Exit, chain, in_words};
use crate::manifest::Digest;
use crate::path::RelPath;
use crate::root::{Follow, Root};
use crate::staging::hold::Hold;
use crate::staging::{Standing, standing};
use crate::sync::repair::is_left_over;

mod quarantine;
mod repair;
mod show;

const ABOUT: &str = "\
Depths:
  --quick        names and metadata; what moved since it was hashed is hashed
  (none)         the same, and whatever no earlier hash vouches for
  --sample N%    as --quick, and so much of the files and of the blocks of large ones
  --full         every byte
What a depth cannot find is in docs/check.md. The summary says how much was hashed now, and when the oldest hash was made.

Exit codes:
  0   good: training may start
  1   bad: all that is wrong was said
  2   wrong usage
  3   not signed as it has to be
  4   nothing is wrong but that something is not finished
  5   the directory or its manifest cannot be looked at
  75  the time of --timeout was over, or files changed while they were checked
Anything else, a signal too, means: do not start.

Examples:
  lockstep check /data/checkpoint-1000
  lockstep exec --check /data/checkpoint-1000 --as trainer -- torchrun train.py
  lockstep check --cached --max-age 7d /data/checkpoint-1000
  lockstep check --repair sync@gpu01:/data/checkpoint-1000 /data/checkpoint-1000";

/// Check that a directory is what its manifest says: the gate before a training run
///
/// Says all that is wrong, and ends with 0 only when nothing is. Files are not read again whose metadata is what it was when
/// they were last hashed; --full reads every byte.
#[derive(Debug, Args)]
#[command(after_long_help = ABOUT)]
pub(super) struct Check {
    /// The directory
    path: PathBuf,
    #[command(flatten)]
    options: CheckOptions,
}

#[derive(Debug, Args)]
pub(super) struct CheckOptions {
    /// Hash only what moved: metadata is compared with the manifest and with what was hashed before
    #[arg(long, conflicts_with_all = ["sample", "full"])]
    quick: bool,
    /// As --quick, and hash so many per cent of the files, chosen at random, and of large ones so much in blocks
    #[arg(long, value_name = "N%", value_parser = percent, conflicts_with = "full")]
    sample: Option<f64>,
    /// Hash every byte
    #[arg(long)]
    full: bool,
    /// Compare with this list, a manifest or the output of sha256sum [default: PATH/.lockstep/manifest]
    #[arg(long, value_name = "FILE")]
    against: Option<PathBuf>,
    /// Refuse a manifest of an earlier generation
    #[arg(long, value_name = "N")]
    min_generation: Option<u64>,
    /// Find what this user, by name or number, cannot read, because of directories above and ACLs too
    #[arg(long = "as", value_name = "USER")]
    reader: Option<String>,
    /// Files that are not listed are no fault
    #[arg(long)]
    allow_unlisted: bool,
    /// Do not compare modes, owners and groups
    #[arg(long)]
    ignore_permissions: bool,
    /// Whose rules a checkpoint has to meet [default: those of every layout that is recognised]. Without a manifest a layout that
    /// is asked for decides alone, and content is not compared
    #[arg(long, value_enum)]
    layout: Option<Rules>,
    /// A file that every checkpoint has to hold, as _SUCCESS; where none is recognised, the directory itself
    #[arg(long, value_name = "NAME")]
    marker: Option<String>,
    /// Leave out what matches, a glob as in gitignore(5); may be given several times
    #[arg(long, value_name = "GLOB")]
    exclude: Vec<String>,
    /// Hash what was last hashed longer ago than this, as '12h' or '7d'; with --cached, refuse an older verdict
    #[arg(long, value_name = "AGE", value_parser = age)]
    max_age: Option<Duration>,
    /// Read only the verdict of an earlier check; refused when it is missing, too old, of another manifest or not good
    #[arg(long, requires = "max_age", conflicts_with_all = ["quick", "sample", "full", "threads", "nice", "timeout", "combined"])]
    cached: bool,
    /// How many files are hashed at once [default: the number of cores]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// Give way to others while hashing, as nice(1) does
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(i32).range(0..=19))]
    nice: i32,
    /// End with 75 when it takes longer
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=31_536_000))]
    timeout: Option<u64>,
    /// Keep the verdict in this file [default: PATH/.lockstep/verdict.json, where that may be written]
    #[arg(long, value_name = "FILE")]
    verdict: Option<PathBuf>,
    #[command(flatten)]
    repair: repair::Repair,
    #[command(flatten)]
    quarantine: quarantine::Quarantine,
    #[command(flatten)]
    trust: Trust,
    /// One JSON object a line: the findings, then the verdict
    #[arg(long, conflicts_with = "combined")]
    json: bool,
    /// A line for each path: '=' equal, '-' missing, '+' not listed, '*' differs, '!' error
    #[arg(long)]
    combined: bool,
    // What follows stands under its heading.
    #[command(flatten)]
    access: repair::Access,
}

fn percent(text: &str) -> Result<f64, String> {
    let number = text.strip_suffix('%').unwrap_or(text).parse::<f64>().ok();
    number
        .filter(|&number| number > 0.0 && number <= 100.0)
        .ok_or_else(|| "it is a share of the files, more than 0% and at most 100%".to_owned())
}

fn age(text: &str) -> Result<Duration, String> {
    let wrong = || "write it as '30s', '10m', '12h' or '7d'".to_owned();
    let (number, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()));
    let seconds = match unit {
        "s" => 1,
        "m" => 60,
        "h" => 3600,
        "d" => 86_400,
        _ => return Err(wrong()),
    };
    let number: u64 = number.parse().map_err(|_| wrong())?;
    number.checked_mul(seconds).filter(|&seconds| seconds > 0).map(Duration::from_secs).ok_or_else(wrong)
}

/// Ends the process when a check takes too long, whatever its threads are doing then.
struct Timer(Arc<AtomicBool>);

impl Timer {
    fn start(seconds: u64, path: &Path) -> Result<Timer, Failure> {
        let over = Arc::new(AtomicBool::new(false));
        let (heard, path) = (Arc::clone(&over), path.to_owned());
        let until = Instant::now() + Duration::from_secs(seconds);
        let wait = move || {
            while let Some(left) = until.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) {
                std::thread::sleep(left);
            }
            if !heard.swap(true, Ordering::SeqCst) {
                // Whoever cannot be told is stopped all the same.
                let _ = writeln!(
                    std::io::stderr(),
                    "lockstep: '{}' was not checked within {seconds} seconds, so that nothing is known of it; give it \
                     more time, or --quick",
                    shown(&path)
                );
                std::process::exit(Exit::TryAgain.code().into());
            }
        };
        let started = std::thread::Builder::new().name("timeout".into()).spawn(wait);
        started.map_err(|error| Failure::Plain { exit: Exit::Io, message: format!("start the timer: {error}") })?;
        Ok(Timer(over))
    }

    /// From here on the check counts as done. Does not return where the time was over before.
    fn disarm(&self) {
        if self.0.swap(true, Ordering::SeqCst) {
            // The timer is about to end the process.
            loop {
                std::thread::park();
            }
        }
    }
}

pub(super) fn check_failure(error: &CheckError) -> Failure {
    let exit = match error {
        CheckError::Filter(_) => Exit::Usage,
        CheckError::Scan(crate::scan::ScanError::Changed(_)) | CheckError::Stopped => Exit::TryAgain,
        _ => Exit::Io,
    };
    Failure::Plain { exit, message: chain(error) }
}

fn slot_failure(error: &SlotError) -> Failure {
    let exit = if matches!(error, SlotError::Foreign(_)) { Exit::Usage } else { Exit::Io };
    Failure::Plain { exit, message: chain(error) }
}

/// Somebody has put another list there between two looks at it.
fn not_what_was_signed(path: &Path) -> Failure {
    let message = format!("'{}': the list changed while it was checked; check again", shown(path));
    Failure::Plain { exit: Exit::Trust, message }
}

/// Why the verdict of an earlier check is still there. It is said unless this check comes to the same.
struct Kept(Option<String>);

impl Drop for Kept {
    fn drop(&mut self) {
        if let Some(reason) = &self.0 {
            let told = "the verdict of an earlier check stays, and is not of this one";
            let _ = writeln!(std::io::stderr(), "lockstep: warning: {told}: {reason}");
        }
    }
}

/// A list that was signed as asked.
struct Signed {
    /// SHA-256 of its bytes.
    digest: Digest,
    /// The signature, where what it signs is the list.
    model: Option<Model>,
}

/// Holds a directory, so that no run of this machine removes it. Where that cannot be done it is said: the check tells all the
/// same what is there.
pub(super) fn hold(path: &Path) -> Option<Hold> {
    match Hold::take(path) {
        Ok(hold) => Some(hold),
        // The check says what is wrong with it.
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => None,
        Err(error) => {
            let why =
                if error.kind() == ErrorKind::WouldBlock { "it is being removed".into() } else { in_words(&error) };
            let told = "cannot be held, so that a run with 'retain' or --delete may remove it meanwhile";
            eprintln!("lockstep: note: '{}' {told}: {why}", shown(path));
            None
        }
    }
}

impl Check {
    pub(super) fn run(self) -> Result<Exit, Failure> {
        let _hold = hold(&self.path);
        self.options.run(&self.path, false)
    }
}

impl CheckOptions {
    /// Checks `path`. With `aside` standard output is left to somebody else.
    pub(super) fn run(&self, path: &Path, aside: bool) -> Result<Exit, Failure> {
        let timer = self.timeout.map(|seconds| Timer::start(seconds, path)).transpose()?;
        audit::configure_as_usual()?;
        let root = Root::open(path)?;
        let slot = self.verdict.as_deref().map_or(Slot::Root(&root), Slot::File);
        if self.cached {
            return self.cached(path, &root, &slot, aside);
        }
        let (started, begun) = (Instant::now(), seconds_now());
        let place = self.repair.place(&self.access, path)?;
        let mut kept = Kept(slot.clear().map_err(|error| slot_failure(&error))?);
        let signed = self.signed(path)?;
        let options = self.options(path, signed.as_ref())?;
        let digest = signed.map(|signed| signed.digest);
        let mut report = self.look(path, &options, digest, None)?;
        // What a first check has said is not said twice.
        let (mut said, mut not_repaired, mut stop) = (false, None, None);
        let unfinished = report.outcome() == Outcome::Unfinished && is_left_over(&root);
        if let Some(place) = place.as_ref().filter(|_| report.outcome() == Outcome::Bad || unfinished) {
            said = true;
            match self.mend(path, &root, place, (&options, &report), aside) {
                Ok(Some(tried)) => {
                    let again = Options { read: tried.read, ..options.clone() };
                    report = self.look(path, &again, digest, Some(&tried.stop))?;
                    said = false;
                    stop = Some(tried.stop);
                }
                Ok(None) => {}
                Err(failure) => not_repaired = Some(failure),
            }
        }
        let inode = root.stat_root()?.inode;
        let verdict = Verdict::new(path, inode, begun, &options, transfer::actor(), &report);
        if let Some(timer) = &timer {
            timer.disarm();
        }
        match slot.store(&verdict) {
            Err(error) if self.verdict.is_some() => return Err(slot_failure(&error)),
            // Who may only read checks as well as anybody.
            _ => {}
        }
        record(&root, &verdict, &report);
        let text = match (self.json, self.combined) {
            (true, _) => show::json(&report, &verdict, started.elapsed()),
            (_, true) => show::combined(&report),
            _ if said => String::new(),
            _ => show::lines(&report),
        };
        say(&text, aside)?;
        for note in &report.notes {
            eprintln!("lockstep: note: {note}");
        }
        if report.outcome() == Outcome::Good {
            kept.0 = None;
        }
        let summary = show::summary(path, &report, &verdict);
        match report.outcome() {
            Outcome::Good => {
                if !self.json {
                    say(&format!("{summary}\n"), aside || self.combined)?;
                }
                // From a repair on signals are heard here: whoever sent one wants nothing to be started.
                stop.as_ref().map_or(Ok(()), Stop::check).map(|()| Exit::Done)
            }
            Outcome::Unfinished => {
                if let Some(failure) = not_repaired {
                    eprintln!("lockstep: {summary}");
                    return Err(failure);
                }
                self.quarantine.run(path, &root, &options, &report, self.json, aside || self.combined)?;
                Err(Failure::Plain { exit: Exit::Incomplete, message: summary })
            }
            Outcome::Bad => {
                let waits = not_repaired.as_ref().is_some_and(|failure| failure.exit() == Exit::TryAgain);
                if !waits && !stopped(not_repaired.as_ref()) {
                    self.quarantine.run(path, &root, &options, &report, self.json, aside || self.combined)?;
                }
                let Some(failure) = not_repaired else {
                    // Nothing is known to be wrong but that somebody wrote to it.
                    let moved = report.findings.iter().all(|finding| finding.kind == Kind::Changed);
                    let exit = if moved { Exit::TryAgain } else { Exit::BadData };
                    return Err(Failure::Plain { exit, message: summary });
                };
                eprintln!("lockstep: {summary}");
                Err(failure)
            }
        }
    }

    /// Checks once.
    fn look(
        &self,
        path: &Path,
        options: &Options,
        signed: Option<Digest>,
        stop: Option<&Stop>,
    ) -> Result<Report, Failure> {
        let verbosity = if self.json { Verbosity::Quiet } else { Verbosity::Normal };
        let mut display = Display::new(verbosity, false);
        if let Some(stop) = stop {
            display = display.stopped_by(stop.flag());
        }
        let report = check::check(path, options, &display);
        display.finish();
        let report = report.map_err(|error| match stop.and_then(Stop::exit) {
            Some(exit) => Failure::plain(exit, &error),
            None => check_failure(&error),
        })?;
        if signed.is_some() && report.list != signed {
            return Err(not_what_was_signed(path));
        }
        Ok(report)
    }

    /// Says what a first check has found, and has it mended from the good copy. `None` where nothing could be.
    fn mend(
        &self,
        path: &Path,
        root: &Root,
        place: &Place,
        (options, report): (&Options, &Report),
        aside: bool,
    ) -> Result<Option<repair::Tried>, Failure> {
        let telling = repair::Telling { json: self.json, aside: aside || self.combined };
        match (self.json, self.combined) {
            (true, _) => say(&show::before_repair(report), aside)?,
            (_, true) => {}
            _ => say(&show::lines(report), aside)?,
        }
        let text = match report.list {
            None => None,
            Some(_) => Some(read_text(options.against.as_deref(), path)?.1),
        };
        self.repair.run(path, root, (place, &self.access), text.as_deref(), (options, report), telling)
    }

    /// The list, where it has to be signed and is.
    fn signed(&self, path: &Path) -> Result<Option<Signed>, Failure> {
        if !self.trust.is_required() {
            return Ok(None);
        }
        let against = self.against.as_deref();
        let digest = |text: &[u8]| Digest(Sha256::digest(text).into());
        if let Some(model) = self.trust.model(path)? {
            return Ok(Some(match model.list(against, path)? {
                Some((_, text)) => Signed { digest: digest(&text), model: None },
                None => Signed { digest: model.digest, model: Some(model) },
            }));
        }
        let (_, text) = read_text(against, path)?;
        self.trust.check(against, path, &text)?;
        Ok(Some(Signed { digest: digest(&text), model: None }))
    }

    fn options(&self, path: &Path, signed: Option<&Signed>) -> Result<Options, Failure> {
        let model = signed.and_then(|signed| signed.model.as_ref());
        let depth = match (self.quick, self.sample, self.full) {
            (true, ..) => Depth::Quick,
            (_, Some(percent), _) => Depth::Sample(percent),
            (.., true) => Depth::Full,
            _ => Depth::Default,
        };
        if let Some(marker) = &self.marker
            && let Err(error) = RelPath::new(marker)
        {
            return Err(Failure::usage(format!("--marker: {error}; name a file within the checkpoint")));
        }
        let subject = self.reader.as_deref().map(|user| drift::subject(Some(user), None)).transpose();
        Ok(Options {
            depth,
            against: model.map(|model| model.at.clone()).or_else(|| self.against.clone()),
            key: model.map(|model| model.key.clone()),
            min_generation: self.min_generation,
            subject: subject.map_err(|error| Failure::usage(chain(&error)))?,
            allow_unlisted: self.allow_unlisted,
            ignore_permissions: self.ignore_permissions,
            exclude: self.exclude.clone(),
            max_age: self.max_age,
            threads: self.threads.map_or(0, usize::from),
            nice: self.nice,
            read: BTreeSet::new(),
            layout: self.layout.map(Rules::wanted),
            marker: self.marker.as_ref().map(|marker| marker.as_bytes().to_vec()),
            all_paths: self.combined,
            own: self.verdict.iter().cloned().chain(self.trust.file(self.against.as_deref(), path)).collect(),
        })
    }

    /// Whether an earlier verdict stands for a check now.
    fn cached(&self, path: &Path, root: &Root, slot: &Slot<'_>, aside: bool) -> Result<Exit, Failure> {
        let refused = |reason: String| {
            Err(Failure::bad_data(format!(
                "'{}': no verdict stands for it: {reason}; check it with 'lockstep check'",
                shown(path)
            )))
        };
        // Before anything is believed that stands there.
        let signed = self.signed(path)?;
        let options = self.options(path, signed.as_ref())?;
        let verdict = match slot.load() {
            Ok(Some(verdict)) => verdict,
            Ok(None) => return refused(format!("there is no '{}'", shown(&slot.shown()))),
            Err(error @ SlotError::Foreign(_)) => return refused(chain(&error)),
            Err(error) => return Err(slot_failure(&error)),
        };
        // What is told of the manifest in force is not what lies there while the next is coming.
        if matches!(standing(root), Standing::Publishing(_)) {
            return refused("something is being published to it, or a run broke off while it published".to_owned());
        }
        let listed = check::listed(path, &options).map_err(|error| check_failure(&error))?;
        let Some(list) = listed else {
            return refused("the manifest is missing or damaged".to_owned());
        };
        if signed.is_some_and(|signed| signed.digest != list.digest) {
            return Err(not_what_was_signed(path));
        }
        if let Some(least) = self.min_generation
            && list.generation.is_none_or(|generation| generation < least)
        {
            return refused(format!("the manifest is not of generation {least} or later"));
        }
        let inode = root.stat_root()?.inode;
        // `--cached` cannot be given without an age.
        let max_age = self.max_age.unwrap_or_default();
        if let Err(reason) = verdict.accept(inode, &list, max_age, &options) {
            return refused(reason.to_string());
        }
        let text = if self.json {
            show::cached_json(&verdict)
        } else {
            format!("'{}': {}\n", shown(path), show::cached(&verdict))
        };
        say(&text, aside)?;
        Ok(Exit::Done)
    }
}

/// Tells the audit log of what was checked, where it has one and this user may write it.
fn record(root: &Root, verdict: &Verdict, report: &Report) {
    let there = RelPath::new(LOG).is_ok_and(|log| root.stat(&log, Follow::Never).is_ok());
    if !there {
        return;
    }
    let (result, word) = match report.outcome() {
        Outcome::Good => (audit_log::Outcome::Success, "good"),
        Outcome::Bad => (audit_log::Outcome::Failure, "bad"),
        Outcome::Unfinished => (audit_log::Outcome::Failure, "unfinished"),
    };
    let counts = report.counts().into_iter().map(|(kind, count)| format!("{count} {}", kind.name()));
    let found: Vec<String> = counts.collect();
    let reason = if found.is_empty() { word.to_owned() } else { format!("{word}: {}", found.join(", ")) };
    let record = AuditRecord {
        actor: transfer::actor(),
        action: "check".into(),
        generation: verdict.generation,
        sha256: report.list.map(|list| list.to_string()),
        result: Some(result),
        reason: Some(reason),
        ..AuditRecord::default()
    };
    let denied = |error: &AuditError| {
        let kind = error.io().map(std::io::Error::kind);
        matches!(kind, Some(ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem))
    };
    match AuditLog::open(root).and_then(|mut log| log.append_last([record])) {
        Err(error) if !denied(&error) => {
            eprintln!("lockstep: note: the audit log does not tell of this check: {}", chain(&error));
        }
        _ => {}
    }
}

/// Whether a signal ended it.
fn stopped(failure: Option<&Failure>) -> bool {
    failure.is_some_and(|failure| matches!(failure.exit(), Exit::Interrupted | Exit::Terminated | Exit::HungUp))
}

/// To standard output, or where that belongs to somebody else to standard error.
fn say(text: &str, aside: bool) -> Result<(), Failure> {
    if aside {
        eprint!("{text}");
        return Ok(());
    }
    output(text.as_bytes())
}

fn seconds_now() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_and_ages_are_read_strictly() {
        for (text, value) in [("5%", 5.0), ("5", 5.0), ("0.5%", 0.5), ("100%", 100.0)] {
            assert_eq!(percent(text), Ok(value), "{text}");
        }
        for text in ["0", "0%", "101", "-1", "nan", "inf", "", "%", "5%%"] {
            assert!(percent(text).is_err(), "{text}");
        }
        assert_eq!(age("7d"), Ok(Duration::from_secs(7 * 86_400)));
        assert_eq!(age("90s"), Ok(Duration::from_secs(90)));
        for text in ["", "7", "d", "0d", "-1d", "7w", "7 d", "99999999999999999999d", "9999999999999999999d"] {
            assert!(age(text).is_err(), "{text}");
        }
    }
}
