//! Whether a unit is complete, and what a pointer names: what only the files can tell.

use std::io::Read as _;

use crate::config::{Layout, Ready as WhenReady};
use crate::layout::{self, names};
use crate::path::RelPath;
use crate::root::{FileKind, Follow, Metadata, Root};

/// A pointer holds one name.
const POINTER_MAX: u64 = 4096;
const MEGATRON: &[u8] = b"latest_checkpointed_iteration.txt";
const DEEPSPEED: &[u8] = b"latest";

/// Whether the unit is complete by its marker or layout.
pub(super) fn is_complete(root: &Root, unit: &RelPath, ready: &WhenReady) -> bool {
    match ready {
        WhenReady::Settled => true,
        WhenReady::Marker(name) => unit
            .join(name)
            .is_ok_and(|marker| root.stat(&marker, Follow::Never).is_ok_and(|found| found.kind == FileKind::Regular)),
        WhenReady::Layout(layout) => is_complete_by(root, unit, *layout),
    }
}

fn is_complete_by(root: &Root, unit: &RelPath, layout: Layout) -> bool {
    let Ok(inside) = root.subroot(unit) else { return false };
    let options = layout::Options { root_name: Some(unit.name().to_vec()), ..layout::Options::default() };
    let Ok(report) = layout::inspect(&inside, &options) else { return false };
    let numbered = |prefix: &[u8]| names::numbered(unit.name(), prefix);
    let (wanted, named, pointed) = match layout {
        Layout::HuggingFace => (layout::Layout::HuggingFace, false, true),
        Layout::TorchDcp => (layout::Layout::TorchDcp, false, true),
        Layout::Megatron => {
            let number = numbered(b"iter_");
            let is_release = unit.name() == b"release";
            let text = pointer_beside(root, unit, MEGATRON);
            let pointed = match (number, &text) {
                (Some(number), Some(text)) => names::decimal(text).is_some_and(|newest| newest >= number),
                (None, Some(text)) if is_release => text == b"release",
                (None, _) if !is_release => true,
                _ => false,
            };
            (layout::Layout::Megatron, number.is_some() || is_release, pointed)
        }
        Layout::DeepSpeed => {
            let text = pointer_beside(root, unit, DEEPSPEED);
            let newest = text.as_deref().and_then(|text| names::numbered(text, b"global_step"));
            let pointed = match numbered(b"global_step") {
                Some(number) => newest.is_some_and(|newest| newest >= number) || text.as_deref() == Some(unit.name()),
                // The pointer is in the unit, and the rules of the layout look at it.
                None => true,
            };
            (layout::Layout::DeepSpeed, false, pointed)
        }
    };
    let is_there = named || report.layouts.iter().any(|found| found.layout == wanted);
    is_there && pointed && report.findings.is_empty() && report.more == 0
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
pub(super) fn named_by(root: &Root, pointer: &RelPath) -> Option<RelPath> {
    let text = match root.stat(pointer, Follow::Never).ok()?.kind {
        FileKind::Symlink => root.read_link(pointer).ok()?,
        FileKind::Regular => pointer_text(root, pointer)?,
        _ => return None,
    };
    let named = named(pointer, &text);
    // A text that names nothing here is of another kind.
    named.filter(|named| root.stat(named, Follow::Never).is_ok())
}

/// What a pointer of this text, or a link to it, names, whether it is there or not.
pub(super) fn named(pointer: &RelPath, text: &[u8]) -> Option<RelPath> {
    let text = text.trim_ascii();
    let text = match names::decimal(text) {
        Some(number) if pointer.name() == MEGATRON => format!("iter_{number:07}").into_bytes(),
        _ => text.to_vec(),
    };
    let text = text.strip_prefix(b"./").unwrap_or(&text);
    let text = text.strip_suffix(b"/").unwrap_or(text);
    match pointer.parent() {
        Some(parent) => parent.join(text),
        None => RelPath::new(text),
    }
    .ok()
}
