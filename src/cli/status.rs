//! `lockstep status`: how a running daemon stands, for whoever is asked at night: what is wrong first, then the rest.

use std::fmt::Write as _;
use std::io::{ErrorKind, IsTerminal as _, Write as _};
use std::time::Duration;

use indicatif::{BinaryBytes, HumanCount};
use serde::Deserialize as _;
use serde_json::{Value, json};
use unicode_width::{UnicodeWidthChar as _, UnicodeWidthStr as _};

use super::jobs::Where;
use super::{Failure, control, output};
use crate::daemon::status::{FORMAT, JobStatus, Status as Standing, TargetStatus};
use crate::daemon::words::{self, Attention, Level, age, attention, level, short, span};
use crate::error::{Exit, chain, counted, said};

/// What is written where no terminal says how wide it is.
const WIDE: usize = 160;
/// A table is not narrower; of a terminal that is, lines are cut off.
const NARROW: usize = 60;
const EVERY: Duration = Duration::from_secs(1);
const RECENT: usize = 3;

/// Show how a running daemon stands: what is behind, by how much, since when, why, and what to do
///
/// Exit codes: 0 all in step or on the way, 4 some target fails or is halted, 5 no daemon answers.
#[derive(Debug, clap::Args)]
pub(super) struct Status {
    /// One JSON object (docs/monitoring.md)
    #[arg(long)]
    json: bool,
    /// Show it again every second, until Ctrl-C
    #[arg(short, long)]
    watch: bool,
    #[command(flatten)]
    at: Where,
}

impl Status {
    pub(super) fn run(self) -> Result<Exit, Failure> {
        let socket = self.at.socket()?;
        if self.watch {
            return self.watch(&socket);
        }
        let (text, exit) = self.look(&socket)?;
        output(text.as_bytes()).map(|()| exit)
    }

    /// How it stands, and what that means for the exit code.
    fn look(&self, socket: &std::path::Path) -> Result<(String, Exit), Failure> {
        let answer = control::request(socket, &json!({ "request": "status" }))?;
        let status = standing(&answer["status"])?;
        let bad = words::counts(&status).iter().any(|(level, _)| level.is_bad());
        let exit = if bad { Exit::Incomplete } else { Exit::Done };
        if self.json {
            return Ok((format!("{}\n", answer["status"]), exit));
        }
        let width = size().map_or(WIDE, |(width, _)| width);
        let wanted = std::env::var_os("NO_COLOR").is_none_or(|no| no.is_empty());
        // What is cut off must not be the end of a colour.
        let colour = wanted && std::io::stdout().is_terminal() && width >= NARROW;
        Ok((table(&status, width, colour), exit))
    }

    /// Ctrl-C ends it as it ends any command; nothing has to be put back then.
    fn watch(&self, socket: &std::path::Path) -> Result<Exit, Failure> {
        let mut out = std::io::stdout();
        let terminal = out.is_terminal() && !self.json;
        let mut before = if terminal { "\x1b[2J" } else { "" };
        loop {
            // A daemon that is started anew is seen again.
            let text = match self.look(socket) {
                Ok((text, _)) => text,
                Err(failure) if self.json => format!("{}\n", json!({ "error": chain(&failure) })),
                Err(failure) => format!("{}\n", chain(&failure)),
            };
            let text = match size().filter(|_| terminal) {
                Some((width, height)) => frame(&text, width, height),
                None => text,
            };
            // All at once, so that nothing flickers.
            match out.write_all(format!("{before}{text}").as_bytes()).and_then(|()| out.flush()) {
                Err(error) if error.kind() == ErrorKind::BrokenPipe => return Ok(Exit::Done),
                other => other.map_err(Failure::Output)?,
            }
            before = if terminal || self.json { "" } else { "\n" };
            std::thread::sleep(EVERY);
        }
    }
}

/// What the daemon answered, which may be of another version.
fn standing(answer: &Value) -> Result<Standing, Failure> {
    let wrong = |why: &str| Failure::Plain {
        exit: Exit::Io,
        message: format!("the daemon's answer cannot be shown ({why}); ask a daemon of this version, or use --json"),
    };
    match answer["format"].as_str() {
        Some(FORMAT) => Standing::deserialize(answer).map_err(|error| wrong(&said(error.to_string().as_bytes()))),
        other => Err(wrong(&format!("its format is '{}'", said(other.unwrap_or_default().as_bytes())))),
    }
}

/// Columns and rows of the terminal.
fn size() -> Option<(usize, usize)> {
    let size = rustix::termios::tcgetwinsize(std::io::stdout()).ok()?;
    (size.ws_col > 0 && size.ws_row > 0).then_some((size.ws_col.into(), size.ws_row.into()))
}

/// A text in place of the one of before: no line is longer than the terminal is wide, and what does not fit is said.
fn frame(text: &str, width: usize, height: usize) -> String {
    let lines: Vec<&str> = text.lines().collect();
    let fit = if lines.len() < height { lines.len() } else { height.saturating_sub(2) };
    let mut frame = String::from("\x1b[H");
    for line in &lines[..fit] {
        // A daemon that does not answer says so in a line of any length.
        let line = if line.contains('\x1b') { (*line).to_owned() } else { cut(line, width) };
        let _ = write!(frame, "{line}\x1b[K\r\n");
    }
    if fit < lines.len() {
        let more = counted((lines.len() - fit) as u64, "line", "lines");
        let _ = write!(frame, "{}\x1b[K\r\n", cut(&format!("… {more} more than fit here"), width));
    }
    frame + "\x1b[J"
}

/// A status for people, in lines of at most `width` columns (of `NARROW` where it is less).
pub(super) fn table(status: &Standing, width: usize, colour: bool) -> String {
    let mut table = Table { text: String::new(), width: width.max(NARROW), colour, now: status.now };
    let counts: Vec<String> = words::counts(status)
        .iter()
        .map(|&(level, count)| table.paint(level, &format!("{count} {}", level.name())))
        .collect();
    table.wrapped(
        "",
        &format!(
            "lockstep {} on {}, running for {}",
            said(status.version.as_bytes()),
            words::name(&status.host),
            span(status.now.saturating_sub(status.started))
        ),
    );
    let _ = writeln!(table.text, "{}", counts.join(", "));
    for one in attention(status) {
        table.attention(&one);
    }
    let columns = Columns::of(status, table.width);
    for job in &status.jobs {
        table.job(job, &columns);
    }
    table.recent(status);
    table.text
}

struct Table {
    text: String,
    width: usize,
    colour: bool,
    now: u64,
}

/// How wide each column of targets is; the same for all jobs.
struct Columns {
    target: usize,
    state: usize,
    behind: usize,
}

const SUCCESS: usize = "LAST SUCCESS".len();

impl Columns {
    fn of(status: &Standing, width: usize) -> Columns {
        let (mut target, mut state, mut behind) = ("TARGET".len(), "STATE".len(), "BEHIND".len());
        for job in &status.jobs {
            for one in &job.targets {
                target = target.max(words::name(&one.target).width());
                state = state.max(word(level(job, one), one).len());
                behind = behind.max(lag(one).len());
            }
        }
        // What is left of a line after its indentation, two spaces between columns, and the others.
        let left = width.saturating_sub(2 + 3 * 2 + state + behind + SUCCESS);
        Columns { target: target.min(left.max(8)), state, behind }
    }
}

impl Table {
    fn paint(&self, level: Level, text: &str) -> String {
        let code = match level {
            Level::Halted => "1;31",
            Level::Failing => "1;33",
            Level::Paused => "35",
            Level::Working => "36",
            Level::InStep => "32",
        };
        if self.colour { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }

    fn faint(&self, text: &str) -> String {
        if self.colour { format!("\x1b[2m{text}\x1b[0m") } else { text.to_owned() }
    }

    /// Text in as many lines as it needs; from the second on they are indented by two spaces more.
    fn wrapped(&mut self, indent: &str, text: &str) {
        for (number, line) in wrap(text, self.width - indent.len(), 2).into_iter().enumerate() {
            let _ = writeln!(self.text, "{indent}{}{line}", if number > 0 { "  " } else { "" });
        }
    }

    fn attention(&mut self, one: &Attention) {
        let about = match (&one.job, &one.target) {
            (Some(job), Some(target)) => format!("{job} -> {target}"),
            (Some(job), None) => job.clone(),
            _ => "configuration".to_owned(),
        };
        let word = one.level.name().to_uppercase();
        self.text.push('\n');
        for (number, line) in wrap(&format!("{word} {about}"), self.width, 2).into_iter().enumerate() {
            let line = match line.strip_prefix(&word).filter(|_| number == 0) {
                Some(rest) => self.paint(one.level, &word) + rest,
                None => format!("  {line}"),
            };
            let _ = writeln!(self.text, "{line}");
        }
        let hint = one.hint.as_ref().map(|hint| format!("do: {hint}"));
        for text in [one.behind.as_ref(), Some(&one.why), hint.as_ref(), one.next.as_ref()].into_iter().flatten() {
            self.wrapped("  ", text);
        }
    }

    fn job(&mut self, job: &JobStatus, columns: &Columns) {
        self.text.push('\n');
        let paused = if job.paused { "paused, " } else { "" };
        let watching = watching(job, self.now);
        self.wrapped("", &format!("{}: {}, {paused}{watching}", words::name(&job.name), said(job.source.as_bytes())));
        if job.unfinished_count > 0 {
            let some: Vec<String> = job.unfinished.iter().take(3).map(|name| said(name.as_bytes())).collect();
            let more = if job.unfinished_count as usize > some.len() { ", …" } else { "" };
            let count = HumanCount(job.unfinished_count);
            self.wrapped("  ", &format!("{count} not finished at the source: {}{more}", some.join(", ")));
        }
        let Columns { target, state, behind } = columns;
        let head = format!("  {:target$}  {:state$}  {:behind$}  LAST SUCCESS", "TARGET", "STATE", "BEHIND");
        let head = self.faint(&head);
        let _ = writeln!(self.text, "{head}");
        let mut targets: Vec<_> = job.targets.iter().map(|target| (level(job, target), target)).collect();
        targets.sort_by_key(|&(level, _)| level);
        for (level, target) in targets {
            self.target(level, target, columns);
        }
    }

    fn target(&mut self, level: Level, target: &TargetStatus, columns: &Columns) {
        let name = shortened(&words::name(&target.target), columns.target);
        let gap = " ".repeat(columns.target.saturating_sub(name.width()));
        let state = self.paint(level, &format!("{:1$}", word(level, target), columns.state));
        let success = target.last_success.map_or_else(
            || "never".to_owned(),
            |time| match self.now.saturating_sub(time) {
                0 => "now".to_owned(),
                seconds => format!("{} ago", short(seconds)),
            },
        );
        let _ = writeln!(self.text, "  {name}{gap}  {state}  {:1$}  {success}", lag(target), columns.behind);
        if let Some(progress) = target.progress.as_ref().filter(|progress| progress.total_bytes > 0) {
            let share = progress.done_bytes.min(progress.total_bytes) as f64 / progress.total_bytes as f64 * 100.0;
            let text = format!(
                "{share:.0}% of {}, {} of {} files, {}/s",
                BinaryBytes(progress.total_bytes),
                HumanCount(progress.done_files),
                HumanCount(progress.total_files),
                BinaryBytes(progress.bytes_per_second),
            );
            self.wrapped("    ", &text);
        }
    }

    fn recent(&mut self, status: &Standing) {
        for (number, one) in status.recent.iter().take(RECENT).enumerate() {
            if number == 0 {
                self.text.push_str("\nPublished last (all of it: lockstep history)\n");
            }
            let what = match &one.error {
                Some(error) => format!("failed: {}", said(error.as_bytes())),
                None => format!("{}, {}", counted(one.files, "path", "paths"), BinaryBytes(one.bytes)),
            };
            let (job, target) = (words::name(&one.job), words::name(&one.target));
            self.wrapped("  ", &format!("{}: {job} -> {target}: {what}", age(self.now, one.time)));
        }
    }
}

/// What a target does now, or else how it stands.
fn word(level: Level, target: &TargetStatus) -> &'static str {
    if level == Level::Working && target.progress.is_some() { target.state.name() } else { level.name() }
}

fn lag(target: &TargetStatus) -> String {
    let time = short(target.lag_seconds);
    match (target.lag_units, target.lag_bytes) {
        (0, 0) if target.lag_seconds == 0 => "-".to_owned(),
        (0, 0) => time,
        (units, 0) => format!("{}, {time}", counted(units, "unit", "units")),
        (_, bytes) => format!("{}, {time}", BinaryBytes(bytes)),
    }
}

fn watching(job: &JobStatus, now: u64) -> String {
    let watching = &job.watching;
    let mut text = match watching.mode.as_str() {
        "events" => format!("watches {}", counted(watching.directories, "directory", "directories")),
        mode => said(mode.as_bytes()),
    };
    if let Some(why) = &watching.why {
        let _ = write!(text, " ({})", said(why.as_bytes()));
    }
    if let Some(scan) = watching.last_scan {
        let _ = write!(text, ", looked at as a whole {}", age(now, scan));
    }
    for path in &watching.unmounted {
        let _ = write!(text, ", '{}' is not mounted", said(path.as_bytes()));
    }
    text
}

/// The first columns of a line.
fn cut(text: &str, width: usize) -> String {
    let mut used = 0;
    text.chars()
        .take_while(|c| {
            used += c.width().unwrap_or(0);
            used <= width
        })
        .collect()
}

/// A name in at most `width` columns: the middle goes, since names differ at their ends.
fn shortened(name: &str, width: usize) -> String {
    if name.width() <= width {
        return name.to_owned();
    }
    let left = width.saturating_sub(1);
    let begin = cut(name, left / 2);
    let reversed: String = name.chars().rev().collect();
    let end: String = cut(&reversed, left - left / 2).chars().rev().collect();
    format!("{begin}…{end}")
}

/// Lines of at most `width` columns, `less` fewer from the second on; a word that is longer is cut.
fn wrap(text: &str, width: usize, less: usize) -> Vec<String> {
    let mut lines = Vec::new();
    let mut line = String::new();
    let room = |lines: &Vec<String>| if lines.is_empty() { width } else { width - less };
    for word in text.split(' ') {
        let mut word = word;
        if !line.is_empty() && line.width() + 1 + word.width() > room(&lines) {
            lines.push(std::mem::take(&mut line));
        } else if !line.is_empty() {
            line.push(' ');
        }
        while line.width() + word.width() > room(&lines) {
            let part = cut(word, room(&lines));
            word = &word[part.len()..];
            lines.push(part);
        }
        line.push_str(word);
    }
    lines.push(line);
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::daemon::status::{Progress, State, Trouble, Watching};

    fn target(name: &str, state: State) -> TargetStatus {
        TargetStatus { target: name.into(), state, last_success: Some(880), ..TargetStatus::default() }
    }

    fn example() -> Standing {
        let trouble = |message: &str| Trouble {
            time: 965,
            message: message.into(),
            hint: Some("see that sshd runs there and that no firewall is in between".into()),
            times: 14,
        };
        let behind = TargetStatus {
            lag_units: 3,
            lag_bytes: 41 << 30,
            lag_seconds: 7300,
            last_error: Some(trouble("sync@gpu03: cannot connect to gpu03:22: Connection refused")),
            next_try: Some(1085),
            ..target("sync@gpu03.cluster.example:/data/checkpoints/of/the/large/model", State::Retrying)
        };
        let sending = TargetStatus {
            lag_bytes: 80 << 30,
            lag_seconds: 45,
            progress: Some(Progress {
                done_files: 210,
                total_files: 640,
                done_bytes: 48 << 30,
                total_bytes: 128 << 30,
                bytes_per_second: 1_400 << 20,
                seconds: 36,
            }),
            ..target("sync@gpu02:/data/checkpoints", State::Transferring)
        };
        let job = JobStatus {
            name: "checkpoints".into(),
            source: "/data/checkpoints".into(),
            paused: false,
            watching: Watching {
                mode: "events".into(),
                directories: 1204,
                why: None,
                last_scan: Some(600),
                ..Watching::default()
            },
            unfinished: vec!["checkpoint-12500".into()],
            unfinished_count: 1,
            halted: None,
            targets: vec![target("/mnt/ünï/漢字", State::Idle), sending, behind],
        };
        Standing {
            format: FORMAT.into(),
            version: "0.1.0".into(),
            host: "gpu01".into(),
            pid: 1,
            started: 0,
            now: 1000,
            config: "/etc/lockstep/config.toml".into(),
            config_error: None,
            jobs: vec![job],
            recent: Vec::new(),
            source_cpu: Default::default(),
        }
    }

    const EXAMPLE: &str = "\
lockstep 0.1.0 on gpu01, running for 16 minutes
1 failing, 1 working, 1 in step

FAILING checkpoints ->
  sync@gpu03.cluster.example:/data/checkpoints/of/the/large/model
  behind by 3 units, 41.00 GiB, for 2 hours; last success 2 minutes ago
  failed 14 times, the last 35 seconds ago: sync@gpu03: cannot connect to
    gpu03:22: Connection refused
  do: see that sshd runs there and that no firewall is in between
  tried again in 85 seconds; 'lockstep jobs now' does it at once

checkpoints: /data/checkpoints, watches 1204 directories, looked at as a whole 6
  minutes ago
  1 not finished at the source: checkpoint-12500
  TARGET                              STATE         BEHIND          LAST SUCCESS
  sync@gpu03.clust…f/the/large/model  failing       41.00 GiB, 2h   2m ago
  sync@gpu02:/data/checkpoints        transferring  80.00 GiB, 45s  2m ago
    38% of 128.00 GiB, 210 of 640 files, 1.37 GiB/s
  /mnt/ünï/漢字                       in step       -               2m ago
";

    #[test]
    fn what_is_wrong_stands_first_and_all_fits() {
        let shown = table(&example(), 80, false);
        assert_eq!(shown, EXAMPLE, "{shown}");
        for width in [0, NARROW, 80, 200] {
            let shown = table(&example(), width, false);
            assert!(shown.lines().all(|line| line.width() <= width.max(NARROW)), "{width}\n{shown}");
        }
        let coloured = table(&example(), 80, true);
        assert!(coloured.contains("\x1b[1;33mFAILING\x1b[0m checkpoints"), "{coloured}");
    }

    #[test]
    fn h09_what_is_hostile_steers_no_terminal() {
        let hostile = "\x1b[2J\n\u{202e}".to_owned();
        let mut status = example();
        (status.host, status.version, status.config_error) = (hostile.clone(), hostile.clone(), Some(hostile.clone()));
        let job = &mut status.jobs[0];
        (job.name, job.source, job.unfinished) = (hostile.clone(), hostile.clone(), vec![hostile.clone()]);
        (job.watching.mode, job.watching.why) = (hostile.clone(), Some(hostile.clone()));
        for target in &mut job.targets {
            target.target = hostile.clone();
            target.last_error =
                Some(Trouble { time: 0, message: hostile.clone(), hint: Some(hostile.clone()), times: 1 });
        }
        let shown = table(&status, 80, false);
        assert!(!shown.contains(['\x1b', '\u{202e}']), "{shown:?}");
    }

    #[test]
    fn a_frame_is_never_larger_than_the_terminal() {
        let text: String = (0..50).map(|number| format!("line {number} of many\n")).collect();
        let shown = frame(&text, 10, 24);
        assert!(shown.starts_with("\x1b[Hline 0 of \x1b[K\r\n") && shown.ends_with("\x1b[J"), "{shown}");
        assert_eq!(shown.matches("\r\n").count(), 23);
        assert!(shown.contains("… 28 lines"), "{shown}");
        assert_eq!(frame("one\n", 80, 24), "\x1b[Hone\x1b[K\r\n\x1b[J");
    }

    #[test]
    fn names_keep_their_ends() {
        for (name, width, shown) in [("abcdefgh", 8, "abcdefgh"), ("abcdefghi", 5, "ab…hi"), ("漢字漢字", 4, "…字")]
        {
            assert_eq!(shortened(name, width), shown);
            assert!(shortened(name, width).width() <= width);
        }
        assert_eq!(wrap("a bb ccc", 4, 1), ["a bb", "ccc"]);
        assert_eq!(wrap("abcdefghij", 4, 1), ["abcd", "efg", "hij"]);
    }
}
