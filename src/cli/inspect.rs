//! `lockstep inspect`: whether checkpoints are complete by their layout.

use std::fmt::Write as _;
use std::path::PathBuf;

use clap::{Args, ValueEnum};
use serde_json::json;

use super::{Failure, output, shown};
use crate::error::{Exit, counted};
use crate::layout::{self, Kind, Layout, Options, Report, Wanted};
use crate::path::RelPath;
use crate::root::Root;

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Rules {
    /// Those of every layout that is recognised
    Auto,
    #[value(name = "huggingface")]
    HuggingFace,
    Megatron,
    #[value(name = "deepspeed")]
    DeepSpeed,
    TorchDcp,
    Nemo,
    Ray,
    /// Of no layout: only look into safetensors and torch files
    None,
}

impl Rules {
    pub(super) fn wanted(self) -> Wanted {
        Wanted::Only(match self {
            Rules::Auto => return Wanted::Auto,
            Rules::None => return Wanted::Nothing,
            Rules::HuggingFace => Layout::HuggingFace,
            Rules::Megatron => Layout::Megatron,
            Rules::DeepSpeed => Layout::DeepSpeed,
            Rules::TorchDcp => Layout::TorchDcp,
            Rules::Nemo => Layout::Nemo,
            Rules::Ray => Layout::Ray,
        })
    }
}

/// Say whether checkpoints are complete, by what their layout says belongs to them
///
/// No manifest is needed and nothing is hashed: shards that are missing or cut off, saves that were interrupted and pointers
/// to nothing are found, changed content is not (`lockstep manifest verify` finds it).
///
/// Exit codes: 0 complete, 4 unfinished or nothing recognised, 5 something could not be read, 1 damaged (cut off, or it
/// contradicts itself); the worst of them, in this order.
#[derive(Debug, Args)]
pub(super) struct Inspect {
    /// A checkpoint, or a directory with checkpoints in it
    path: PathBuf,
    /// Whose rules hold; one that is named has to be there
    #[arg(long, value_enum, default_value = "auto")]
    layout: Rules,
    /// A file that every checkpoint has to hold, as _SUCCESS
    #[arg(long, value_name = "NAME")]
    marker: Option<String>,
    /// One JSON object a line
    #[arg(long)]
    json: bool,
}

fn place(path: Option<&RelPath>) -> String {
    path.map_or_else(|| ".".to_owned(), ToString::to_string)
}

fn word(kind: Kind) -> &'static str {
    match kind {
        Kind::Unfinished => "unfinished",
        Kind::Unreadable => "unreadable",
        Kind::Damaged => "damaged",
    }
}

impl Inspect {
    pub(super) fn run(self) -> Result<Exit, Failure> {
        if let Some(marker) = &self.marker
            && let Err(error) = RelPath::new(marker)
        {
            return Err(Failure::usage(format!("--marker: {error}; name a file within the checkpoint")));
        }
        match std::fs::metadata(&self.path) {
            Ok(found) if !found.is_dir() => {
                let message = format!("'{}' is no directory; name that of the checkpoint", shown(&self.path));
                return Err(Failure::usage(message));
            }
            Ok(_) => {}
            Err(error) => return Err(Failure::io("look at", &self.path)(error)),
        }
        let whole = self.path.canonicalize().map_err(Failure::io("look at", &self.path))?;
        let options = Options {
            wanted: self.layout.wanted(),
            marker: self.marker.as_ref().map(|marker| marker.as_bytes().to_vec()),
            root_name: whole.file_name().map(|name| name.as_encoded_bytes().to_vec()),
            names_only: false,
        };
        let report = layout::inspect(&Root::open(&self.path)?, &options)?;
        let verdict = self.verdict(&report);
        let text = if self.json { json_lines(&report, verdict.0) } else { text(&report) };
        output(text.as_bytes())?;
        let (exit, words) = verdict;
        let message = format!("'{}': {words}", shown(&self.path));
        if exit == Exit::Done {
            if !self.json {
                output(format!("{message}\n").as_bytes())?;
            }
            return Ok(exit);
        }
        Err(Failure::Plain { exit, message })
    }

    fn verdict(&self, report: &Report) -> (Exit, String) {
        let counts: Vec<String> = [Kind::Damaged, Kind::Unreadable, Kind::Unfinished]
            .into_iter()
            .filter(|&kind| report.count(kind) > 0)
            .map(|kind| format!("{} {}", report.count(kind), word(kind)))
            .collect();
        let exit = if report.count(Kind::Damaged) > 0 {
            Exit::BadData
        } else if report.count(Kind::Unreadable) > 0 {
            Exit::Io
        } else if report.count(Kind::Unfinished) > 0 {
            Exit::Incomplete
        } else {
            Exit::Done
        };
        if exit != Exit::Done {
            return (exit, counts.join(", "));
        }
        let files = format!("{} looked into", counted(report.files_checked, "file", "files"));
        match self.layout {
            // To say that it is good what nothing is known of would be worse than to say nothing.
            Rules::Auto if report.layouts.is_empty() && self.marker.is_none() => {
                let what = "no layout of a checkpoint is recognised, so that it cannot be told whether all is there";
                (
                    Exit::Incomplete,
                    format!("{what} ({files}); name a checkpoint, or look into files with --layout none"),
                )
            }
            Rules::None if report.files_checked == 0 && self.marker.is_none() => {
                let what = "there is no safetensors or torch file that tells whether it is whole";
                (Exit::Incomplete, format!("{what}; lockstep manifest verify compares with a manifest"))
            }
            Rules::None => (exit, format!("each file as long as it says of itself ({files})")),
            _ => (exit, format!("complete by its layout ({files})")),
        }
    }
}

fn text(report: &Report) -> String {
    let mut text = String::new();
    for found in &report.layouts {
        let _ = writeln!(text, "{}: {}", found.layout.name(), place(found.path.as_ref()));
    }
    for finding in &report.findings {
        let (path, kind) = (place(finding.path.as_ref()), word(finding.kind));
        let kind = if finding.what.contains(kind) { String::new() } else { format!(" ({kind})") };
        let _ = writeln!(text, "'{path}' {}{kind}: {}; {}", finding.what, finding.why, finding.hint);
    }
    if report.more > 0 {
        let _ = writeln!(text, "… and {} more", report.more);
    }
    if report.files_untold > 0 {
        let files = counted(report.files_untold, "file of weights is", "files of weights are");
        let _ = writeln!(text, "{files} in a format that does not tell whether they are whole");
    }
    text
}

fn json_lines(report: &Report, exit: Exit) -> String {
    let layouts = report
        .layouts
        .iter()
        .map(|found| json!({"event": "layout", "layout": found.layout.name(), "path": place(found.path.as_ref())}));
    let findings = report.findings.iter().map(|finding| {
        json!({
            "event": word(finding.kind),
            "path": place(finding.path.as_ref()),
            "what": finding.what,
            "why": finding.why,
            "hint": finding.hint,
        })
    });
    let summary = json!({
        "event": "summary",
        "damaged": report.count(Kind::Damaged),
        "unreadable": report.count(Kind::Unreadable),
        "unfinished": report.count(Kind::Unfinished),
        "not_listed": report.more,
        "files_checked": report.files_checked,
        "files_untold": report.files_untold,
        "good": exit == Exit::Done,
        "exit": exit.code(),
    });
    layouts.chain(findings).chain([summary]).map(|line| format!("{line}\n")).collect()
}
