//! Whether a unit is complete, and what a pointer names: what only the files can tell.

use std::fmt;
use std::io::Read as _;
use std::str::FromStr;

use super::{Finding, names};
use crate::error::Escaped;
use crate::path::RelPath;
use crate::root::{FileKind, Follow, Metadata, Root};

/// A pointer holds one name.
const POINTER_MAX: u64 = 4096;
const MEGATRON: &[u8] = b"latest_checkpointed_iteration.txt";
const DEEPSPEED: &[u8] = b"latest";

/// When a unit is complete.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Ready {
    /// Nothing in it changed for a while.
    #[default]
    Settled,
    /// What writes it says so as this layout does.
    Layout(ByLayout),
    /// A file of this name is in it.
    Marker(String),
}

impl fmt::Display for Ready {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Ready::Settled => "settled",
            Ready::Layout(ByLayout::HuggingFace) => "huggingface",
            Ready::Layout(ByLayout::Megatron) => "megatron",
            Ready::Layout(ByLayout::DeepSpeed) => "deepspeed",
            Ready::Layout(ByLayout::TorchDcp) => "torch-dcp",
            Ready::Marker(name) => name,
        })
    }
}

/// Who wrote the checkpoints.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum ByLayout {
    HuggingFace,
    Megatron,
    DeepSpeed,
    TorchDcp,
}

impl ByLayout {
    fn layout(self) -> super::Layout {
        match self {
            ByLayout::HuggingFace => super::Layout::HuggingFace,
            ByLayout::Megatron => super::Layout::Megatron,
            ByLayout::DeepSpeed => super::Layout::DeepSpeed,
            ByLayout::TorchDcp => super::Layout::TorchDcp,
        }
    }
}

impl FromStr for Ready {
    type Err = String;

    fn from_str(text: &str) -> Result<Ready, String> {
        Ok(match text {
            "settled" => Ready::Settled,
            "huggingface" => Ready::Layout(ByLayout::HuggingFace),
            "megatron" => Ready::Layout(ByLayout::Megatron),
            "deepspeed" => Ready::Layout(ByLayout::DeepSpeed),
            "torch-dcp" => Ready::Layout(ByLayout::TorchDcp),
            "" | "." | ".." => return Err("'ready' must name a file, a layout, or 'settled'".into()),
            name if name.contains(['/', '\0']) => return Err(format!("'{name}' is a path; a marker is a file's name")),
            name => Ready::Marker(name.to_owned()),
        })
    }
}

/// Why the unit is not complete by its marker or layout; `None` where it is. Safe to print.
pub fn unfinished(root: &Root, unit: &RelPath, ready: &Ready) -> Option<String> {
    match ready {
        Ready::Settled => None,
        Ready::Marker(name) => {
            let found = unit.join(name).ok().and_then(|marker| root.stat(&marker, Follow::Never).ok());
            let is_there = found.is_some_and(|found| found.kind == FileKind::Regular);
            (!is_there).then(|| format!("'{}' is not in it", Escaped(name.as_bytes())))
        }
        Ready::Layout(layout) => unfinished_by(root, unit, *layout),
    }
}

/// The same of a tree without units, which is looked at as a whole.
pub fn unfinished_tree(root: &Root, name: Option<&[u8]>, ready: &Ready) -> Option<String> {
    match ready {
        Ready::Settled => None,
        Ready::Marker(marker) => {
            let found = RelPath::new(marker).ok().and_then(|marker| root.stat(&marker, Follow::Beneath).ok());
            found.is_none().then(|| format!("'{}' is not in it", Escaped(marker.as_bytes())))
        }
        Ready::Layout(layout) => {
            let (wanted, root_name) = (super::Wanted::Only(layout.layout()), name.map(<[u8]>::to_vec));
            match super::inspect(root, &super::Options { wanted, root_name, ..super::Options::default() }) {
                Ok(report) => report.findings.first().map(said),
                Err(error) => Some(crate::error::chain(&error)),
            }
        }
    }
}

fn said(finding: &Finding) -> String {
    let path = finding.path.as_ref().map_or_else(|| ".".to_owned(), ToString::to_string);
    format!("'{path}' {}: {}", finding.what, finding.why)
}

fn unfinished_by(root: &Root, unit: &RelPath, layout: ByLayout) -> Option<String> {
    let unreadable = |error: &dyn std::error::Error| Some(crate::error::chain(error));
    let inside = match root.subroot(unit) {
        Ok(inside) => inside,
        Err(error) => return unreadable(&error),
    };
    let options = super::Options { root_name: Some(unit.name().to_vec()), ..super::Options::default() };
    let report = match super::inspect(&inside, &options) {
        Ok(report) => report,
        Err(error) => return unreadable(&error),
    };
    let numbered = |prefix: &[u8]| names::numbered(unit.name(), prefix);
    let wanted = layout.layout();
    let (named, not_named) = match layout {
        ByLayout::HuggingFace | ByLayout::TorchDcp => (false, None),
        ByLayout::Megatron => {
            let number = numbered(b"iter_");
            let is_release = unit.name() == b"release";
            let text = pointer_beside(root, unit, MEGATRON);
            let pointed = match (number, &text) {
                (Some(number), Some(text)) => names::decimal(text).is_some_and(|newest| newest >= number),
                (None, Some(text)) if is_release => text == b"release",
                (None, _) if !is_release => true,
                _ => false,
            };
            (number.is_some() || is_release, (!pointed).then_some(MEGATRON))
        }
        ByLayout::DeepSpeed => {
            let text = pointer_beside(root, unit, DEEPSPEED);
            let newest = text.as_deref().and_then(|text| names::numbered(text, b"global_step"));
            let pointed = match numbered(b"global_step") {
                Some(number) => newest.is_some_and(|newest| newest >= number) || text.as_deref() == Some(unit.name()),
                // The pointer is in the unit, and the rules of the layout look at it.
                None => true,
            };
            (false, (!pointed).then_some(DEEPSPEED))
        }
    };
    if !named && !report.layouts.iter().any(|found| found.layout == wanted) {
        return Some(format!("it does not look like a checkpoint of {}", wanted.name()));
    }
    if let Some(finding) = report.findings.first() {
        return Some(said(finding));
    }
    not_named.map(|pointer| format!("'{}' beside it names no checkpoint as new as this", Escaped(pointer)))
}

fn pointer_beside(root: &Root, unit: &RelPath, name: &[u8]) -> Option<Vec<u8>> {
    let path = match unit.parent() {
        Some(parent) => parent.join(name),
        None => RelPath::new(name),
    };
    pointer_text(root, &path.ok()?)
}

fn pointer_text(root: &Root, path: &RelPath) -> Option<Vec<u8>> {
    let file = root.open_read(path, Follow::Never).ok()?;
    if Metadata::of(&file).ok()?.kind != FileKind::Regular {
        return None;
    }
    let mut text = Vec::new();
    file.take(POINTER_MAX + 1).read_to_end(&mut text).ok()?;
    (text.len() as u64 <= POINTER_MAX).then(|| text.trim_ascii().to_vec())
}

/// What a pointer names, where that can be told: its text, or the target of a link, taken from the directory that it lies in.
pub fn named_by(root: &Root, pointer: &RelPath) -> Option<RelPath> {
    // A text that names nothing here is of another kind.
    names_as(root, pointer, pointer).filter(|named| root.stat(named, Follow::Never).is_ok())
}

/// What the pointer at `found` names where it lies at `pointer`, whether that is there or not.
pub fn names_as(root: &Root, found: &RelPath, pointer: &RelPath) -> Option<RelPath> {
    let text = match root.stat(found, Follow::Never).ok()?.kind {
        FileKind::Symlink => root.read_link(found).ok()?,
        FileKind::Regular => pointer_text(root, found)?,
        _ => return None,
    };
    named(pointer, &text)
}

/// What a pointer of this text, or a link to it, names, whether it is there or not.
pub fn named(pointer: &RelPath, text: &[u8]) -> Option<RelPath> {
    let text = text.trim_ascii();
    let text = match names::decimal(text) {
        Some(number) if pointer.name() == MEGATRON => format!("iter_{number:07}").into_bytes(),
        _ => text.to_vec(),
    };
    let text = text.strip_prefix(b"./").unwrap_or(&text);
    let text = text.strip_suffix(b"/").unwrap_or(text);
    match pointer.parent() {
        Some(parent) => parent.join(text).ok(),
        None => RelPath::new(text).ok(),
    }
}
