//! `lockstep policy check` and `lockstep policy apply`.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::{Value, json};

use super::rules::{Loaded, Rules};
use crate::cli::display::{Display, Verbosity};
use crate::cli::{Failure, output, shown, transfer};
use crate::drift::{self, Drift, DriftError, Findings, MendError, Mended, Mending, Question, Unreadable};
use crate::error::{Escaped, Exit, chain, counted};
use crate::monitor::Problem;
use crate::policy::rights::Subject;
use crate::staging::LockError;

/// So many lines of a kind are printed without `-v`.
const SHOWN: usize = 50;

#[derive(Debug, Args)]
pub(in crate::cli) struct Check {
    /// The directory; rules are relative to it
    path: PathBuf,
    #[command(flatten)]
    rules: Rules,
    /// Find what this user, by name or number, cannot read
    #[arg(long, value_name = "USER")]
    user: Option<String>,
    /// Find what members of this group cannot read; with --user, as if the user were in it too
    #[arg(long, value_name = "GROUP")]
    group: Option<String>,
    /// One JSON object a line
    #[arg(long)]
    json: bool,
    /// Show all, however many there are
    #[arg(short, long)]
    verbose: bool,
}

#[derive(Debug, Args)]
pub(in crate::cli) struct Apply {
    /// The directory; rules are relative to it
    path: PathBuf,
    #[command(flatten)]
    rules: Rules,
    /// Only say what would be changed
    #[arg(short = 'n', long)]
    dry_run: bool,
    /// One JSON object a line
    #[arg(long)]
    json: bool,
}

/// Where there is something to read, and where it is for people.
fn directory(path: &Path) -> Result<(), Failure> {
    match std::fs::metadata(path) {
        Ok(found) if !found.is_dir() => {
            Err(Failure::usage(format!("'{}' is no directory; name the one that the rules are for", shown(path))))
        }
        Ok(_) => Ok(()),
        Err(error) => Err(Failure::io("look at", path)(error)),
    }
}

fn drift_failure(error: &DriftError) -> Failure {
    let exit = if matches!(error, DriftError::Name { .. }) { Exit::Usage } else { Exit::Io };
    Failure::Plain { exit, message: chain(error) }
}

impl Check {
    pub(in crate::cli) fn run(self) -> Result<Exit, Failure> {
        directory(&self.path)?;
        let loaded = self.rules.load()?;
        let subject = match (&self.user, &self.group) {
            (None, None) if loaded.is_none() => {
                let what =
                    "say what to check: rules with --policy-file or --policy, or a reader with --user or --group";
                return Err(Failure::usage(what));
            }
            (None, None) => None,
            (user, group) => {
                Some(drift::subject(user.as_deref(), group.as_deref()).map_err(|error| Failure::usage(chain(&error)))?)
            }
        };
        let question = Question { policy: loaded.as_ref().map(|loaded| &loaded.policy), subject: subject.as_ref() };
        let monitor = Display::new(Verbosity::Quiet, false);
        let findings = drift::look(&self.path, &question, &monitor).map_err(|error| drift_failure(&error))?;
        if self.json {
            output(json_lines(&findings, loaded.as_ref(), subject.as_ref()).as_bytes())?;
        } else {
            let cap = if self.verbose { usize::MAX } else { SHOWN };
            output(text(&findings, loaded.as_ref(), subject.as_ref(), cap).as_bytes())?;
        }
        let bad = summary(&findings, subject.as_ref());
        if bad.is_empty() {
            if !self.json {
                output(format!("'{}': {}\n", shown(&self.path), good(&findings, &question)).as_bytes())?;
            }
            return Ok(Exit::Done);
        }
        Err(Failure::bad_data(format!(
            "'{}': of {} {}",
            shown(&self.path),
            counted(findings.entries, "path", "paths"),
            bad.join(", ")
        )))
    }
}

fn good(findings: &Findings, question: &Question<'_>) -> String {
    let policy = question.policy.map(|_| "have the permissions that the rules say".to_owned());
    let reader = question.subject.map(|subject| format!("can be read by {}", Escaped(subject.shown.as_bytes())));
    let parts: Vec<String> = policy.into_iter().chain(reader).collect();
    format!("all {} paths {}", findings.entries, parts.join(" and "))
}

/// What is wrong, in numbers; nothing when all is good.
fn summary(findings: &Findings, subject: Option<&Subject>) -> Vec<String> {
    let mut parts = Vec::new();
    if !findings.drift.is_empty() {
        parts.push(format!("{} differ from the rules", findings.drift.len()));
    }
    // The root and what is above it are findings too, but are no entries.
    let hidden: u64 = findings.unreadable.iter().map(|unreadable| 1 + unreadable.beneath).sum();
    let hidden = if hidden == 0 { 0 } else { hidden.min(findings.entries).max(1) };
    if let (1.., Some(subject)) = (hidden, subject) {
        parts.push(format!("{hidden} cannot be read by {}", Escaped(subject.shown.as_bytes())));
    }
    if !findings.problems.is_empty() {
        parts.push(format!("{} could not be looked at", findings.problems.len()));
    }
    parts
}

fn changes(drift: &Drift, between: &str) -> String {
    let one = |difference: &drift::Difference| {
        let (found, wanted) = (Escaped(difference.found.as_bytes()), Escaped(difference.wanted.as_bytes()));
        format!("{} {found}{between}{wanted}", difference.field)
    };
    drift.differences.iter().map(one).collect::<Vec<_>>().join(", ")
}

fn place(drift: &Drift, loaded: Option<&Loaded>) -> String {
    match (drift.rule, loaded) {
        (Some(rule), Some(loaded)) => loaded.place(rule),
        _ => "no rule matches".into(),
    }
}

fn problem_path(problem: &Problem) -> String {
    problem.path.as_ref().map_or_else(|| ".".to_owned(), ToString::to_string)
}

fn denied(unreadable: &Unreadable, subject: Option<&Subject>) -> String {
    let who = subject.map_or("nobody", |subject| &subject.shown);
    let beneath = match unreadable.beneath {
        0 => String::new(),
        1 => ", so that 1 path beneath cannot be reached".into(),
        many => format!(", so that {many} paths beneath cannot be reached"),
    };
    let what = match unreadable.what {
        "list" => "list what it holds",
        "enter" => "enter it",
        _ => "read it",
    };
    format!("{} may not {what}: {}{beneath}", Escaped(who.as_bytes()), unreadable.reason)
}

/// At most `cap` lines of each kind.
fn text(findings: &Findings, loaded: Option<&Loaded>, subject: Option<&Subject>, cap: usize) -> String {
    let mut text = String::new();
    let mut section = |count: usize, line: &dyn Fn(usize) -> String| {
        for at in 0..count.min(cap) {
            let _ = writeln!(text, "{}", line(at));
        }
        if count > cap {
            let _ = writeln!(text, "… and {} more; -v shows all", count - cap);
        }
    };
    section(findings.unreadable.len(), &|at| {
        let unreadable = &findings.unreadable[at];
        format!("'{}': {}", shown(&unreadable.path), denied(unreadable, subject))
    });
    section(findings.drift.len(), &|at| {
        let drift = &findings.drift[at];
        format!("'{}': {} ({})", drift.path, changes(drift, ", should be "), place(drift, loaded))
    });
    section(findings.problems.len(), &|at| {
        let problem = &findings.problems[at];
        format!("'{}': {}", problem_path(problem), Escaped(problem.message.as_bytes()))
    });
    text
}

fn drift_json(drift: &Drift, event: &str) -> Value {
    let differences: Vec<Value> = drift
        .differences
        .iter()
        .map(|one| json!({"field": one.field, "found": one.found, "wanted": one.wanted}))
        .collect();
    json!({
        "event": event,
        "path": drift.path.to_string(),
        "rule": drift.rule.map(|rule| rule + 1),
        "differences": differences,
    })
}

fn json_lines(findings: &Findings, loaded: Option<&Loaded>, subject: Option<&Subject>) -> String {
    let mut lines: Vec<Value> = Vec::new();
    for unreadable in &findings.unreadable {
        lines.push(json!({
            "event": "unreadable",
            "path": shown(&unreadable.path).to_string(),
            "what": unreadable.what,
            "reason": unreadable.reason,
            "beneath": unreadable.beneath,
        }));
    }
    for drift in &findings.drift {
        let mut line = drift_json(drift, "drift");
        line["place"] = json!(drift.rule.and_then(|rule| Some(loaded?.place(rule))));
        lines.push(line);
    }
    for problem in &findings.problems {
        lines.push(json!({"event": "problem", "path": problem_path(problem), "message": problem.message}));
    }
    lines.push(json!({
        "event": "summary",
        "entries": findings.entries,
        "subject": subject.map(|subject| &subject.shown),
        "drift": findings.drift.len(),
        "unreadable": findings.unreadable.len(),
        "problems": findings.problems.len(),
        "good": summary(findings, subject).is_empty(),
    }));
    lines.iter().map(|line| format!("{line}\n")).collect()
}

impl Apply {
    pub(in crate::cli) fn run(self) -> Result<Exit, Failure> {
        directory(&self.path)?;
        crate::cli::audit::place::configure_as_usual()?;
        let loaded = self.rules.required()?;
        let question = Question { policy: Some(&loaded.policy), subject: None };
        let actor = transfer::actor();
        let mending = Mending { actor: &actor, dry_run: self.dry_run };
        let monitor = Display::new(Verbosity::Quiet, false);
        let (findings, mended) =
            drift::mend(&self.path, &question, mending, &monitor).map_err(|error| match &error {
                MendError::Drift(error) => drift_failure(error),
                MendError::Lock(LockError::Held { .. }) => {
                    let message = format!("'{}' is {}; run again when it is free", shown(&self.path), chain(&error));
                    Failure::Plain { exit: Exit::TryAgain, message }
                }
                _ => Failure::Plain { exit: Exit::Io, message: chain(&error) },
            })?;
        let lines: String = mended.iter().map(|mended| self.line(mended, &loaded)).collect();
        output(lines.as_bytes())?;
        for problem in &findings.problems {
            eprintln!("lockstep: '{}': {}", problem_path(problem), Escaped(problem.message.as_bytes()));
        }
        let refused = mended.iter().filter(|mended| mended.refused.is_some()).count();
        let verb = if self.dry_run { "would be mended" } else { "mended" };
        let left = refused + findings.problems.len();
        let text = format!(
            "{} of {} {verb}, {left} left as they are",
            mended.len() - refused,
            counted(findings.entries, "path", "paths")
        );
        if self.json {
            let (changed, entries) = (mended.len() - refused, findings.entries);
            let line = json!({"event": "summary", "entries": entries, "mended": changed, "left": left, "dry_run": self.dry_run});
            output(format!("{line}\n").as_bytes())?;
        } else if left == 0 {
            output(format!("'{}': {text}\n", shown(&self.path)).as_bytes())?;
        }
        if left == 0 {
            return Ok(Exit::Done);
        }
        Err(Failure::Plain { exit: Exit::Incomplete, message: format!("'{}': {text}", shown(&self.path)) })
    }

    fn line(&self, mended: &Mended, loaded: &Loaded) -> String {
        let drift = &mended.drift;
        if self.json {
            let mut line = drift_json(drift, if mended.refused.is_some() { "refused" } else { "mended" });
            line["reason"] = json!(mended.refused);
            return format!("{line}\n");
        }
        let changes = changes(drift, " -> ");
        match &mended.refused {
            None => format!("'{}': {changes} ({})\n", drift.path, place(drift, Some(loaded))),
            Some(reason) => {
                format!("'{}': left as it is ({changes}): {}\n", drift.path, Escaped(reason.as_bytes()))
            }
        }
    }
}
