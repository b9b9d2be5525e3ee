//! What the layout of a checkpoint adds to a check: whether it is complete, also where no manifest says what belongs to it.

use std::path::Path;

use super::list::Loaded;
use super::{Depth, Finding, Kind, Options, Report};
use crate::layout::{self, Wanted};
use crate::manifest::Content;
use crate::path::RelPath;
use crate::root::Root;
use crate::scan::Scanned;

/// Holds the tree against the rules of its layout. Where nothing else is known of it, and it was asked for, they decide.
pub(super) fn look(
    root: &Root,
    path: &Path,
    options: &Options,
    loaded: &Loaded,
    scanned: &Scanned,
    report: &mut Report,
) {
    let wanted = options.layout.unwrap_or_default();
    // A file that is as its list says is what its writer made. Nothing else is known of one where there is no list.
    let names_only = loaded.list.is_ok() && matches!(options.depth, Depth::Quick | Depth::Default);
    if wanted == Wanted::Nothing && loaded.list.is_ok() && options.marker.is_none() {
        return;
    }
    let root_name = called(path);
    let asked = layout::Options { wanted, marker: options.marker.clone(), root_name, names_only };
    let found = layout::inspect_listed(root, scanned, &asked);
    let place = |path: &Option<RelPath>| {
        path.as_ref().map_or_else(|| Path::new(".").to_owned(), |path| path.as_path().to_owned())
    };
    report.layouts = found
        .layouts
        .iter()
        .map(|one| format!("{} {}", one.layout.name(), crate::error::shown(&place(&one.path))))
        .collect();
    for one in &found.findings {
        let kind = match one.kind {
            layout::Kind::Unfinished => Kind::Unfinished,
            layout::Kind::Unreadable => Kind::Unreadable,
            layout::Kind::Damaged => Kind::Damaged,
        };
        let message = format!("{}: {}; {}", one.what, one.why, one.hint);
        report.findings.push(Finding { path: place(&one.path), kind, message });
    }
    if found.more > 0 {
        report.notes.push(format!("{} further findings of layouts are not listed", found.more));
    }
    if loaded.is_missing() && options.layout.is_some() && !found.layouts.is_empty() {
        alone(scanned, report);
    }
}

/// There is no list. What is there counts as unread.
fn alone(scanned: &Scanned, report: &mut Report) {
    report.layout_alone = true;
    for (entry, metadata) in scanned.tree.entries().iter().zip(&scanned.metadata) {
        if let Content::File { .. } = entry.content {
            report.all.add(metadata.size);
            report.unread.add(metadata.size);
        }
        report.paths.push(entry.path.as_path().to_owned());
    }
    for problem in &scanned.problems {
        let path = problem.path.as_ref().map_or_else(|| Path::new(".").to_owned(), |path| path.as_path().to_owned());
        if problem.severity == crate::monitor::Severity::Failed {
            report.findings.push(Finding { path, kind: Kind::Unreadable, message: problem.message.clone() });
        }
    }
    report.notes.push("there is no manifest: nothing was compared, and changed content is not found".to_owned());
}

/// The name of a directory, whatever leads to it.
pub(super) fn called(path: &Path) -> Option<Vec<u8>> {
    let whole = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    whole.file_name().map(|name| name.as_encoded_bytes().to_vec())
}
