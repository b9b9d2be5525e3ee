//! Whether a checkpoint is complete, by its layout, where no manifest says what belongs to it.
//!
//! What always holds: the tree is listed once, nothing outside the root is read, what is read of a file is bounded
//! (100 MB at most, and 1 MiB at a time where it is longer), nothing is unpickled or run, and no content makes it panic.
//! `docs/layouts.md` says what each layout can tell and what not. The formats are pure ([`safetensors`], [`zip`],
//! [`index`], [`names`]); only `tree` reads.

use crate::error::Escaped;
use crate::path::RelPath;
use crate::root::{Root, RootError};
use crate::scan::Scanned;

pub mod complete;
mod contents;
mod deepspeed;
mod huggingface;
pub mod index;
mod megatron;
pub mod names;
mod pointers;
pub mod safetensors;
mod torch;
mod tree;
mod unfinished;
pub mod units;
pub mod zip;

use tree::{Item, Tree, below};

/// Who wrote a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[allow(missing_docs)]
pub enum Layout {
    HuggingFace,
    Megatron,
    DeepSpeed,
    TorchDcp,
    Nemo,
    Ray,
}

impl Layout {
    /// As options and documents write it.
    pub fn name(self) -> &'static str {
        match self {
            Layout::HuggingFace => "huggingface",
            Layout::Megatron => "megatron",
            Layout::DeepSpeed => "deepspeed",
            Layout::TorchDcp => "torch-dcp",
            Layout::Nemo => "nemo",
            Layout::Ray => "ray",
        }
    }
}

/// Which rules hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Wanted {
    /// Those of every layout that is recognised.
    #[default]
    Auto,
    /// Those of one layout, which has to be there.
    Only(Layout),
    /// Of no layout: only files are looked into.
    Nothing,
}

impl Wanted {
    /// As options and documents write it.
    pub fn name(self) -> &'static str {
        match self {
            Wanted::Auto => "auto",
            Wanted::Only(layout) => layout.name(),
            Wanted::Nothing => "none",
        }
    }
}

/// What is asked.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Which rules hold.
    pub wanted: Wanted,
    /// A file that every checkpoint has to hold (`_SUCCESS`); where none is recognised, the root.
    pub marker: Option<Vec<u8>>,
    /// The last component of the root's own path, where it says something (`checkpoint-500`).
    pub root_name: Option<Vec<u8>>,
    /// Files of weights are not held against what they say of themselves: names, indices and pointers alone.
    pub names_only: bool,
}

/// A layout that was recognised.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Found {
    /// Which.
    pub layout: Layout,
    /// The directory of the checkpoint; `None` for the root.
    pub path: Option<RelPath>,
}

/// How bad a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Something is not there, or not there yet.
    Unfinished,
    /// It could not be looked at.
    Unreadable,
    /// What is there is cut off, or contradicts itself.
    Damaged,
}

/// One thing that is wrong. Its texts are safe to print.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// How bad it is.
    pub kind: Kind,
    /// Where; `None` for the root.
    pub path: Option<RelPath>,
    /// What is wrong.
    pub what: String,
    /// How that is known.
    pub why: String,
    /// What to do.
    pub hint: &'static str,
}

/// So many findings are kept; further ones are counted.
pub const FINDINGS_MAX: usize = 10_000;

/// The answer.
#[derive(Debug, Default)]
pub struct Report {
    /// What was recognised, in order, each once.
    pub layouts: Vec<Found>,
    /// What is wrong, in order of paths.
    pub findings: Vec<Finding>,
    /// Findings that were too many to keep.
    pub more: u64,
    /// Files whose content was held against their length.
    pub files_checked: u64,
    /// Files of weights of which nothing can be told: `torch.save` in its format before 2020.
    pub files_untold: u64,
    kinds: [u64; 3],
}

impl Report {
    /// How many findings of a kind there are, with those that were not kept.
    pub fn count(&self, kind: Kind) -> u64 {
        self.kinds[kind as usize]
    }

    fn add(
        &mut self,
        kind: Kind,
        path: Option<RelPath>,
        what: impl Into<String>,
        why: impl Into<String>,
        hint: &'static str,
    ) {
        self.kinds[kind as usize] += 1;
        if self.findings.len() < FINDINGS_MAX {
            self.findings.push(Finding { kind, path, what: what.into(), why: why.into(), hint });
        } else {
            self.more += 1;
        }
    }

    fn unreadable(&mut self, path: Option<RelPath>, error: &dyn std::error::Error) {
        self.cannot_read(path, &crate::error::chain(error));
    }

    fn cannot_read(&mut self, path: Option<RelPath>, why: &str) {
        self.add(
            Kind::Unreadable,
            path,
            "could not be looked at",
            Escaped(why.as_bytes()).to_string(),
            "run as a user who may read it, or look at the disk's health",
        );
    }

    fn found(&mut self, layout: Layout, path: Option<&RelPath>) {
        self.layouts.push(Found { layout, path: path.cloned() });
    }
}

/// What the rules of layouts work on.
struct Look<'a> {
    root: &'a Root,
    tree: &'a Tree,
    options: &'a Options,
    report: Report,
}

impl Look<'_> {
    /// Whether the rules of `layout` hold.
    fn wants(&self, layout: Layout) -> bool {
        self.options.wanted == Wanted::Auto || self.options.wanted == Wanted::Only(layout)
    }

    /// The name of a directory, that of the root too where it is known.
    fn name<'n>(&'n self, directory: Option<&'n RelPath>) -> &'n [u8] {
        directory.map_or(self.options.root_name.as_deref().unwrap_or_default(), RelPath::name)
    }

    /// What lies at `name` (it may have several components) in a directory that was listed.
    fn item(&self, directory: Option<&RelPath>, name: &[u8]) -> Option<Item> {
        let path = below(directory, name)?;
        self.tree.get(&path.parent())?.get(path.name()).copied()
    }

    /// Whether a directory holds nothing at all, however deep; one that was not listed is not empty.
    fn is_empty(&self, directory: &RelPath) -> bool {
        let Some(items) = self.tree.get(&Some(directory.clone())) else { return false };
        items.is_empty()
            || self
                .tree
                .range(Some(directory.clone())..)
                .take_while(|(path, _)| path.as_ref().is_some_and(|path| path.is_within(directory)))
                .all(|(_, items)| items.values().all(|item| *item == Item::Directory))
    }
}

/// Looks at the tree beneath `root`.
///
/// # Errors
/// When the root itself cannot be listed; what cannot be read beneath it is a finding.
pub fn inspect(root: &Root, options: &Options) -> Result<Report, RootError> {
    let mut report = Report::default();
    let tree = tree::walk(root, &mut report)?;
    Ok(look(root, &tree, options, report))
}

/// The same of a tree that was listed already. What could not be listed is no finding here: who listed it knows.
pub fn inspect_listed(root: &Root, listed: &Scanned, options: &Options) -> Report {
    let speaks = |name: &[u8]| tree::speaks(name, options.names_only);
    let named = options.root_name.as_deref().is_some_and(speaks) || options.marker.is_some();
    // Most trees are no checkpoints, and may hold a million files.
    if options.wanted == Wanted::Auto && !named && !listed.tree.entries().iter().any(|entry| speaks(entry.path.name()))
    {
        return Report::default();
    }
    look(root, &tree::of_listing(root, listed), options, Report::default())
}

fn look(root: &Root, tree: &Tree, options: &Options, report: Report) -> Report {
    let mut look = Look { root, tree, options, report };
    for (directory, items) in tree {
        let directory = directory.as_ref();
        if !options.names_only {
            look.contents(directory, items);
        }
        if look.wants(Layout::HuggingFace) {
            look.huggingface(directory, items);
        }
        if look.wants(Layout::Megatron) {
            look.megatron(directory, items);
        }
        if look.wants(Layout::DeepSpeed) {
            look.deepspeed(directory, items);
        }
        if look.wants(Layout::TorchDcp) {
            look.torch_dcp(directory, items);
        }
        look.unfinished(directory, items);
    }
    look.finish();
    look.report
}

impl Look<'_> {
    fn finish(&mut self) {
        self.report.layouts.sort();
        self.report.layouts.dedup();
        let layouts = &self.report.layouts;
        if let Wanted::Only(layout) = self.options.wanted
            && !layouts.iter().any(|found| found.layout == layout)
        {
            let what = format!("holds no {} checkpoint", layout.name());
            let why = "nothing has the names that its layout gives";
            let hint = "name the directory of the checkpoint, or leave --layout out to see what is recognised";
            self.report.add(Kind::Unfinished, None, what, why, hint);
        }
        self.markers();
        self.report.findings.sort_by(|a, b| a.path.cmp(&b.path));
    }

    fn markers(&mut self) {
        let Some(marker) = &self.options.marker else { return };
        let mut units: Vec<Option<RelPath>> = self.report.layouts.iter().map(|found| found.path.clone()).collect();
        if units.is_empty() {
            units.push(None);
        }
        units.sort();
        units.dedup();
        for unit in units {
            if !matches!(self.item(unit.as_ref(), marker), Some(Item::File { .. })) {
                let why = format!("it has no '{}', which its writer makes last", Escaped(marker));
                let hint = "wait until it is written, or remove what an interrupted run left";
                self.report.add(Kind::Unfinished, unit, "is not marked as complete", why, hint);
            }
        }
    }
}
