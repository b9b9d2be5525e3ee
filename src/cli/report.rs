//! What a run did, for people and for programs: itemized changes as rsync writes them, and the summary.

use std::io::Write;

use indicatif::{BinaryBytes, HumanCount};
use serde_json::json;

use crate::manifest::{Content, Entry};
use crate::monitor::Severity;
use crate::plan::{Action, Change};
use crate::sync::SyncReport;

/// The eleven letters of rsync's `--itemize-changes`, with `<` for what is sent and `>` for what is received.
fn letters(action: &Action, entry: &Entry, sending: bool) -> String {
    let kind = match entry.content {
        Content::Directory => 'd',
        Content::Symlink { .. } => 'L',
        _ => 'f',
    };
    let moved = match action.change {
        Change::MetadataOnly => '.',
        _ if matches!(entry.content, Content::HardLink { .. }) => 'h',
        _ if kind != 'f' => 'c',
        _ if sending => '<',
        _ => '>',
    };
    if action.change == Change::Added {
        return format!("{moved}{kind}+++++++++");
    }
    let d = action.differences;
    let letter = |differs: bool, letter: char| if differs { letter } else { '.' };
    [
        moved,
        kind,
        letter(d.content, 'c'),
        letter(d.size, 's'),
        letter(d.time, 't'),
        letter(d.mode, 'p'),
        letter(d.owner, 'o'),
        letter(d.group, 'g'),
        '.',
        '.',
        '.',
    ]
    .into_iter()
    .collect()
}

/// Each path that changed (or would): its letters, its name, and what comes after the name in a line for people.
fn changes(
    report: &SyncReport,
    deleting: bool,
    sending: bool,
    mut tell: impl FnMut(&str, &str, &str) -> std::io::Result<()>,
) -> std::io::Result<()> {
    if deleting && !report.deletion_held_back {
        for removal in &report.plan.removals {
            tell("*deleting  ", &removal.path.to_string(), if removal.directory { "/" } else { "" })?;
        }
    }
    // Of a run that was to publish what was taken away, of others what would be.
    let retired: Vec<String> = match &report.committed {
        Some(committed) => committed.retired.clone(),
        None => report.retired.iter().map(ToString::to_string).collect(),
    };
    for unit in &retired {
        tell("*deleting  ", unit, "/")?;
    }
    for action in &report.plan.actions {
        let entry = &report.tree.entries()[action.index as usize];
        let tail = match &entry.content {
            Content::Directory => "/".to_owned(),
            Content::Symlink { target } => format!(" -> {}", crate::error::Escaped(target)),
            Content::HardLink { first } => format!(" => {first}"),
            Content::File { .. } => String::new(),
        };
        tell(&letters(action, entry, sending), &entry.path.to_string(), &tail)?;
    }
    Ok(())
}

/// Writes a line for each path that changed (or would).
///
/// # Errors
/// When `out` cannot be written.
pub fn itemize(report: &SyncReport, deleting: bool, sending: bool, out: &mut impl Write) -> std::io::Result<()> {
    changes(report, deleting, sending, |letters, path, tail| writeln!(out, "{letters} {path}{tail}"))
}

/// The same as one JSON object for each path.
///
/// # Errors
/// When `out` cannot be written.
pub fn changes_json(report: &SyncReport, deleting: bool, sending: bool, out: &mut impl Write) -> std::io::Result<()> {
    changes(report, deleting, sending, |letters, path, _| {
        writeln!(out, "{}", json!({"event": "change", "change": letters.trim_end(), "path": path}))
    })
}

fn units(count: usize) -> String {
    crate::error::counted(count as u64, "unit", "units")
}

/// The summary in a few lines.
///
/// # Errors
/// When `out` cannot be written.
pub fn summary(
    report: &SyncReport,
    from: &str,
    to: &str,
    verification: &str,
    deleting: bool,
    out: &mut impl Write,
) -> std::io::Result<()> {
    let count = |change| report.plan.actions.iter().filter(|action| action.change == change).count() as u64;
    let failed = report.problems.iter().filter(|problem| problem.severity == Severity::Failed).count() as u64;
    let skipped = report.problems.len() as u64 - failed;
    let seconds = report.elapsed.as_secs_f64();
    let Some(committed) = &report.committed else {
        write!(
            out,
            "dry run, nothing was changed: {} to add, {} to replace, {} to change in metadata only",
            HumanCount(count(Change::Added)),
            HumanCount(count(Change::Modified)),
            HumanCount(count(Change::MetadataOnly)),
        )?;
        if !report.retired.is_empty() {
            write!(out, "; {} to take away", units(report.retired.len()))?;
        }
        return match report.plan.removals.len() as u64 {
            0 => writeln!(out),
            // They are known, and stay.
            extra if !deleting => {
                writeln!(out, "; {} at the target alone, which --delete would remove", HumanCount(extra))
            }
            extra => writeln!(out, "; {} to remove", HumanCount(extra)),
        };
    };
    writeln!(out, "{from} -> {to}")?;
    if committed.published == 0 && committed.removed == 0 && failed == 0 {
        match report.tree.entries().len() as u64 {
            0 => writeln!(out, "  nothing to do: the source is empty, or all of it is left out")?,
            1 => writeln!(out, "  in step: nothing to do (1 entry)")?,
            entries => writeln!(out, "  in step: nothing to do ({} entries)", HumanCount(entries))?,
        }
    } else {
        writeln!(
            out,
            "  {} published, {} removed, {} failed, {} skipped",
            HumanCount(committed.published),
            HumanCount(committed.removed),
            HumanCount(failed),
            HumanCount(skipped),
        )?;
    }
    if !committed.retired.is_empty() {
        writeln!(out, "  {} taken away, to keep as many as 'retain' says", units(committed.retired.len()))?;
    }
    if let Some(trash) = &committed.trash {
        writeln!(out, "  what was removed or replaced lies in {trash} there")?;
    }
    if report.verified_files > 0 {
        let rate = report.verified_bytes as f64 / seconds.max(0.001);
        write!(
            out,
            "  {} {}, {} {} ({verification}), {}/s",
            HumanCount(report.verified_files),
            if report.verified_files == 1 { "file" } else { "files" },
            BinaryBytes(report.verified_bytes),
            // Parts of some were there already, or are zeros that no disk stores.
            match report.transferred_bytes < report.verified_bytes {
                true => format!("verified, {} of them transferred", BinaryBytes(report.transferred_bytes)),
                false => "transferred and verified".to_owned(),
            },
            BinaryBytes(rate as u64),
        )?;
        if report.wire_bytes > 0 {
            write!(out, "; {} on the wire", BinaryBytes(report.wire_bytes))?;
            // Of a few bytes the ratio only tells what a greeting costs.
            if report.transferred_bytes >= 64 * 1024 {
                write!(out, " ({:.2})", report.wire_bytes as f64 / report.transferred_bytes as f64)?;
            }
        }
        writeln!(out)?;
    }
    writeln!(out, "  generation {}, manifest {}, {seconds:.2} s", committed.generation, committed.manifest_digest)
}

/// The summary as one JSON object.
pub fn summary_json(report: &SyncReport, from: &str, to: &str, verification: &str) -> serde_json::Value {
    let count = |change| report.plan.actions.iter().filter(|action| action.change == change).count();
    json!({
        "event": "summary",
        "source": from,
        "target": to,
        "dry_run": report.committed.is_none(),
        "entries": report.tree.entries().len(),
        "added": count(Change::Added),
        "modified": count(Change::Modified),
        "metadata_only": count(Change::MetadataOnly),
        "removals": report.plan.removals.len(),
        "published": report.committed.as_ref().map(|committed| committed.published),
        "removed": report.committed.as_ref().map(|committed| committed.removed),
        "trash": report.committed.as_ref().and_then(|committed| committed.trash.clone()),
        "retired": report.committed.as_ref().map_or(report.retired.len(), |committed| committed.retired.len()),
        "generation": report.committed.as_ref().map(|committed| committed.generation),
        "manifest_sha256": report.committed.as_ref().map(|committed| committed.manifest_digest.clone()),
        "verified_files": report.verified_files,
        "verified_bytes": report.verified_bytes,
        "transferred_bytes": report.transferred_bytes,
        "verification": verification,
        "wire_bytes": report.wire_bytes,
        "failed": report.problems.iter().filter(|problem| problem.severity == Severity::Failed).count(),
        "skipped": report.problems.iter().filter(|problem| problem.severity == Severity::Skipped).count(),
        "complete": report.is_complete(),
        "seconds": report.elapsed.as_secs_f64(),
    })
}
