//! `lockstep manifest diff`: what differs between two lists, without reading what they list.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use clap::Args;

use super::load;
use crate::cli::{Failure, output, shown};
use crate::error::{Escaped, Exit, counted};
use crate::manifest::{Content, Entry, Manifest};
use crate::path::RelPath;
use crate::plan::{Action, Change, Compare, Desired, diff};

#[derive(Debug, Args)]
pub(in crate::cli) struct Diff {
    /// A manifest, or a directory that was published to
    a: PathBuf,
    /// Another
    b: PathBuf,
    /// Compare paths, kinds and content alone: no modes, owners and times
    #[arg(long)]
    content: bool,
}

fn read(path: &Path) -> Result<Manifest, Failure> {
    let directory = std::fs::metadata(path).map_err(Failure::io("read", path))?.is_dir();
    load((!directory).then_some(path), path)
}

impl Diff {
    pub(super) fn run(&self) -> Result<Exit, Failure> {
        let (a, b) = (read(&self.a)?.tree, read(&self.b)?.tree);
        let wanted = |_: usize, entry: &Entry| Desired {
            mode: entry.mode,
            owner: Some(entry.owner.clone()),
            group: Some(entry.group.clone()),
            acl_differs: false,
        };
        let plan = diff(&b, &a, &wanted, Compare { checksum: true, ..Compare::default() });
        let mut lines: BTreeMap<RelPath, String> = BTreeMap::new();
        for removal in plan.removals {
            lines.insert(removal.path, format!("only in '{}'", shown(&self.a)));
        }
        for action in &plan.actions {
            let new = &b.entries()[action.index as usize];
            let line = match a.get(&new.path) {
                None => Some(format!("only in '{}'", shown(&self.b))),
                Some(old) => self.difference(action, old, new),
            };
            lines.extend(line.map(|line| (new.path.clone(), line)));
        }
        let mut text = String::new();
        for (path, line) in &lines {
            let _ = writeln!(text, "{path}: {line}");
        }
        if lines.is_empty() {
            let what = if self.content { "the same content" } else { "the same" };
            let _ = writeln!(text, "{}, all of them {what}", counted(b.entries().len() as u64, "path", "paths"));
        }
        output(text.as_bytes())?;
        match lines.len() {
            0 => Ok(Exit::Done),
            count => Err(Failure::bad_data(format!(
                "'{}' and '{}' differ in {count} {}",
                shown(&self.a),
                shown(&self.b),
                if count == 1 { "path" } else { "paths" }
            ))),
        }
    }

    fn difference(&self, action: &Action, old: &Entry, new: &Entry) -> Option<String> {
        if action.change == Change::Added {
            return Some(format!("{} -> {}", kind(old), kind(new)));
        }
        let d = action.differences;
        let mut parts = Vec::new();
        if d.content {
            parts.push(match (&old.content, &new.content) {
                (Content::Symlink { target: old }, Content::Symlink { target: new }) => {
                    format!("points to '{}' -> '{}'", Escaped(old), Escaped(new))
                }
                (Content::File { size: old, .. }, Content::File { size: new, .. }) if old != new => {
                    format!("content, {old} -> {new} bytes")
                }
                (Content::HardLink { first: old }, Content::HardLink { first: new }) if old != new => {
                    format!("hard link to '{old}' -> '{new}'")
                }
                _ => "content".to_owned(),
            });
        }
        if !self.content {
            if d.mode {
                parts.push(format!("mode {:04o} -> {:04o}", old.mode, new.mode));
            }
            for (differs, what, old, new) in
                [(d.owner, "owner", &old.owner, &new.owner), (d.group, "group", &old.group, &new.group)]
            {
                if differs {
                    parts.push(format!("{what} {} -> {}", Escaped(old.as_bytes()), Escaped(new.as_bytes())));
                }
            }
            // What is put into a directory moves its time: that is told by what was put there.
            if d.time && !new.is_directory() {
                parts.push("time".to_owned());
            }
        }
        (!parts.is_empty()).then(|| parts.join(", "))
    }
}

fn kind(entry: &Entry) -> &'static str {
    match entry.content {
        Content::Directory => "a directory",
        Content::Symlink { .. } => "a symbolic link",
        Content::File { .. } | Content::HardLink { .. } => "a file",
    }
}
