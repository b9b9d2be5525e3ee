//! What a check says: lines, signs, JSON, and the summary.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;
use std::time::Duration;

use chrono::{DateTime, Local};
use indicatif::BinaryBytes;
use serde_json::{Value, json};

use crate::check::{Kind, Report, Verdict};
use crate::error::{Escaped, counted, in_words, shown};

/// A line for each finding.
pub(super) fn lines(report: &Report) -> String {
    let mut text = String::new();
    for finding in &report.findings {
        let message = in_words(&Escaped(finding.message.as_bytes()).to_string());
        let _ = writeln!(text, "{}: {}: {message}", finding.kind.name(), shown(&finding.path));
    }
    text
}

/// A sign and a path a line. Of several findings on one path an error is what shows, else what differs.
pub(super) fn combined(report: &Report) -> String {
    let mut signs: BTreeMap<&Path, char> = report.paths.iter().map(|path| (path.as_path(), '=')).collect();
    let weight = |sign: char| ['=', '*', '-', '+', '!'].iter().position(|known| *known == sign);
    for finding in &report.findings {
        let sign = signs.entry(&finding.path).or_insert('=');
        let new = finding.kind.symbol();
        if weight(new) > weight(*sign) {
            *sign = new;
        }
    }
    signs.iter().fold(String::new(), |mut text, (path, sign)| {
        let _ = writeln!(text, "{sign} {}", shown(path));
        text
    })
}

fn findings(report: &Report) -> impl Iterator<Item = Value> + '_ {
    report.findings.iter().map(|finding| {
        json!({
            "event": "finding",
            "kind": finding.kind.name(),
            "symbol": finding.kind.symbol().to_string(),
            "path": shown(&finding.path).to_string(),
            "message": finding.message,
        })
    })
}

/// The findings of a check that another one follows.
pub(super) fn before_repair(report: &Report) -> String {
    findings(report).fold(String::new(), |mut text, mut line| {
        line["before_repair"] = json!(true);
        let _ = writeln!(text, "{line}");
        text
    })
}

/// The findings, then the verdict.
pub(super) fn json(report: &Report, verdict: &Verdict, took: Duration) -> String {
    let mut text = String::new();
    for line in findings(report) {
        let _ = writeln!(text, "{line}");
    }
    let mut line = verdict_json(verdict);
    line["seconds"] = json!(took.as_secs_f64());
    let _ = writeln!(text, "{line}");
    text
}

fn verdict_json(verdict: &Verdict) -> Value {
    let mut line = json!(verdict);
    line["event"] = json!("verdict");
    line["cached"] = json!(false);
    line
}

/// An earlier verdict that stands.
pub(super) fn cached_json(verdict: &Verdict) -> String {
    let mut line = verdict_json(verdict);
    line["cached"] = json!(true);
    format!("{line}\n")
}

/// The same for people.
pub(super) fn cached(verdict: &Verdict) -> String {
    format!(
        "good, as a {} check of {} found at {}; nothing was looked at now. {}",
        Escaped(verdict.depth.as_bytes()),
        counted(verdict.files, "file", "files"),
        time(verdict.time),
        read(verdict)
    )
}

/// One paragraph: how deep, how much of it was read, what is wrong, what to do.
pub(super) fn summary(path: &Path, report: &Report, verdict: &Verdict) -> String {
    let files = counted(verdict.files, "file", "files");
    let head = match report.layout_alone {
        true => format!("'{}': {}, by the layout alone of {files}", shown(path), verdict.result),
        false => format!("'{}': {}, by a {} check of {files}", shown(path), verdict.result, verdict.depth),
    };
    if report.findings.is_empty() {
        return format!("{head}. {}", read(verdict));
    }
    let counts: Vec<String> =
        report.counts().into_iter().map(|(kind, count)| format!("{count} {}", kind.name())).collect();
    format!("{head}: {}. {}. {}", counts.join(", "), read(verdict), advice(report))
}

fn read(verdict: &Verdict) -> String {
    let bytes = |bytes: u64| BinaryBytes(bytes).to_string();
    let mut parts = vec![format!(
        "hashed {} of {} ({} of {} files)",
        bytes(verdict.hashed_bytes),
        bytes(verdict.bytes),
        verdict.hashed_files,
        verdict.files
    )];
    if verdict.sampled_files > 0 {
        let files = counted(verdict.sampled_files, "large file", "large files");
        parts.push(format!("read {} in blocks of {files}", bytes(verdict.sampled_bytes)));
    }
    if verdict.vouched_files > 0 {
        let files = counted(verdict.vouched_files, "file", "files");
        parts.push(format!("{files} unchanged since they were hashed"));
    }
    if verdict.unread_files > 0 {
        let files = counted(verdict.unread_files, "file", "files");
        parts.push(format!("{files} known by size and times alone"));
    }
    if let Some(oldest) = verdict.oldest_hash {
        parts.push(format!("oldest hash {}", time(oldest)));
    }
    if verdict.undated_files > 0 {
        let files = counted(verdict.undated_files, "file", "files");
        parts.push(format!("{files} hashed nobody knows when"));
    }
    parts.join("; ")
}

fn time(seconds: u64) -> String {
    let known = i64::try_from(seconds).ok().and_then(|seconds| DateTime::from_timestamp(seconds, 0));
    known.map_or_else(
        || format!("@{seconds}"),
        |time| time.with_timezone(&Local).format("%Y-%m-%d %H:%M:%S %z").to_string(),
    )
}

/// What to do about the worst of it.
fn advice(report: &Report) -> &'static str {
    let has = |kinds: &[Kind]| report.findings.iter().any(|finding| kinds.contains(&finding.kind));
    if has(&[Kind::ManifestMissing]) && !report.layouts.is_empty() {
        "Without a manifest nothing is known of the content: push it, or name a list with --against; --layout auto asks \
         only whether it is complete"
    } else if has(&[Kind::ManifestMissing, Kind::ManifestDamaged]) {
        "Without its manifest nothing is known of the data: push it again, or name a list with --against"
    } else if has(&[Kind::Missing, Kind::Modified, Kind::Damaged, Kind::WrongSize, Kind::WrongKind, Kind::WrongLink]) {
        "Do not train on it: push it again, or repair it from a good copy (--repair), then check again"
    } else if has(&[Kind::Changed]) {
        "Somebody writes to it: wait for that to end, then check again"
    } else if has(&[Kind::OldGeneration]) {
        "Push the newer version, then check again"
    } else if has(&[Kind::Unreadable]) {
        "Give those who train the right to read it ('lockstep policy check --user' says what stands in the way)"
    } else if has(&[Kind::WrongMode, Kind::WrongOwner, Kind::WrongGroup]) {
        "Push again or run 'lockstep policy apply' to mend permissions, or give --ignore-permissions"
    } else if has(&[Kind::Unlisted]) {
        "Remove what is not listed, or give --allow-unlisted"
    } else {
        "Let what brings or writes it come to its end, then check again; where a layout asks for what need not be there, \
         give --layout none"
    }
}
