//! `lockstep check --repair`: what is bad is fetched from a good copy.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::path::Path;

use clap::Args;
use indicatif::BinaryBytes;
use serde_json::json;

use super::{Failure, Report, say, shown};
use crate::check::Options;
use crate::check::repair::{NotMendable, Wanted, wanted};
use crate::cli::arguments::Place;
use crate::cli::display::{Display, Verbosity};
use crate::cli::login::Ssh;
use crate::cli::remote::{self, Dial, Reach};
use crate::cli::stop::Stop;
use crate::cli::transfer::{USUAL_TRANSFERS, actor, state_directory};
use crate::codec::CompressOptions;
use crate::endpoint::local::LocalSource;
use crate::endpoint::{Error, Source};
use crate::error::{Escaped, Exit, chain, counted};
use crate::path::RelPath;
use crate::root::Root;
use crate::sync::repair::{How, HowToRepair, Repaired, finish, is_left_over, repair};

#[derive(Debug, Args)]
pub(super) struct Repair {
    /// Fetch what is missing or damaged from a good copy, set permissions as listed, and check again. Nothing is taken that
    /// has not the listed SHA-256; nothing is removed
    #[arg(long = "repair", value_name = "[USER@]HOST:PATH", conflicts_with = "cached")]
    from: Option<OsString>,
    /// With --repair, say each path that is repaired, and how the good copy is reached
    #[arg(short, long, requires = "from")]
    verbose: bool,
}

/// How a good copy is reached that lies on another machine.
#[derive(Debug, Args)]
#[command(next_help_heading = "How the good copy of --repair is reached")]
pub(super) struct Access {
    #[command(flatten)]
    reach: Reach,
    #[command(flatten)]
    ssh: Ssh,
}

/// How what was done is told.
#[derive(Debug, Clone, Copy)]
pub(super) struct Telling {
    pub(super) json: bool,
    /// Standard output is somebody else's.
    pub(super) aside: bool,
}

/// What was tried.
pub(super) struct Tried {
    /// Paths that were mended, which are to be read again.
    pub(super) read: BTreeSet<RelPath>,
    pub(super) stop: Stop,
}

impl Repair {
    /// Where the good copy is; refuses what cannot be meant, before anything is looked at.
    pub(super) fn place(&self, access: &Access, path: &Path) -> Result<Option<Place>, Failure> {
        let place = self.from.as_deref().map(Place::parse).transpose()?;
        let elsewhere = matches!(place, Some(Place::There(_)));
        if let Some(option) = access.ssh.given().or_else(|| access.reach.given())
            && !elsewhere
        {
            let message = format!("{option} is for another machine, and none is named with --repair [USER@]HOST:PATH");
            return Err(Failure::usage(message));
        }
        if let Some(Place::Here(copy)) = &place {
            let real = |path: &Path| path.canonicalize().map_err(Failure::io("open", path));
            if real(copy)? == real(path)? {
                return Err(Failure::usage(format!("'{}' is the directory itself, not a copy of it", shown(copy))));
            }
        }
        Ok(place)
    }

    /// Mends what `report` found at `path`, whose list has this text. `None` where there is nothing that a copy could mend.
    pub(super) fn run(
        &self,
        path: &Path,
        root: &Root,
        (place, access): (&Place, &Access),
        text: Option<&[u8]>,
        (options, report): (&Options, &Report),
        telling: Telling,
    ) -> Result<Option<Tried>, Failure> {
        let wanted = match text.map_or(Err(NotMendable::NoList), |text| wanted(root, text, options, report)) {
            Ok(wanted) if wanted.tree.entries().is_empty() && !is_left_over(root) => return Ok(None),
            Ok(wanted) => wanted,
            Err(error @ NotMendable::NoList) => {
                let message = format!(
                    "'{}' was not repaired: {error}; fetch all of it: lockstep pull {} {}",
                    shown(path),
                    Escaped(self.from.as_deref().unwrap_or_default().as_encoded_bytes()),
                    shown(path)
                );
                return Err(Failure::bad_data(message));
            }
            Err(error) => {
                let message = format!("'{}' was not repaired: {error}", shown(path));
                return Err(Failure::Plain { exit: Exit::TryAgain, message });
            }
        };
        let stop = Stop::on_signals()?;
        let verbosity = match (telling.json, self.verbose) {
            (true, _) => Verbosity::Quiet,
            (_, true) => Verbosity::Verbose,
            _ => Verbosity::Normal,
        };
        let mut display = Display::new(verbosity, false).stopped_by(stop.flag());
        if wanted.tree.entries().is_empty() {
            finish(path, &how(), &display).map_err(|error| failed(path, error, &stop))?;
            display.finish();
            if !telling.json {
                say("what an interrupted repair had left is finished\n", telling.aside)?;
            }
            return Ok(Some(Tried { read: BTreeSet::new(), stop }));
        }
        let (from, repaired) = fetch(path, (place, access), &wanted, &display, &stop)?;
        display.finish();
        self.tell(&from, &repaired, telling)?;
        let read = repaired.mended.into_iter().map(|mended| mended.path).collect();
        Ok(Some(Tried { read, stop }))
    }

    fn tell(&self, from: &str, repaired: &Repaired, Telling { json, aside }: Telling) -> Result<(), Failure> {
        let mut text = String::new();
        let count = |how: How| repaired.mended.iter().filter(|mended| mended.how == how).count() as u64;
        let bytes: u64 = repaired.mended.iter().map(|mended| mended.bytes).sum();
        let (fetched, made, permissions) = (count(How::Fetched), count(How::Made), count(How::Permissions));
        if json {
            for mended in &repaired.mended {
                let (path, how) = (mended.path.to_string(), mended.how.name());
                let line = json!({"event": "repaired", "path": path, "how": how, "bytes": mended.bytes, "from": from});
                text += &format!("{line}\n");
            }
            for (path, message) in &repaired.failed {
                let path = path.as_ref().map_or_else(|| ".".to_owned(), ToString::to_string);
                text += &format!("{}\n", json!({"event": "not-repaired", "path": path, "message": message}));
            }
            let line = json!({
                "event": "repair",
                "from": from,
                "fetched_files": fetched,
                "fetched_bytes": bytes,
                "made": made,
                "permissions": permissions,
                "failed": repaired.failed.len(),
            });
            return say(&format!("{text}{line}\n"), aside);
        }
        if self.verbose {
            for mended in &repaired.mended {
                let size =
                    if mended.how == How::Fetched { format!(", {}", BinaryBytes(mended.bytes)) } else { String::new() };
                text += &format!("repaired: {}: {}{size}\n", mended.path, mended.how.name());
            }
        }
        let mut parts = vec![match fetched {
            0 => format!("repaired with {from}: no file fetched"),
            _ => format!("repaired {} ({}) from {from}", counted(fetched, "file", "files"), BinaryBytes(bytes)),
        }];
        if made > 0 {
            parts.push(format!("{} made", counted(made, "directory or link", "directories and links")));
        }
        if permissions > 0 {
            parts.push(format!("permissions set of {}", counted(permissions, "path", "paths")));
        }
        if !repaired.failed.is_empty() {
            parts.push(format!("{} not repaired", counted(repaired.failed.len() as u64, "path", "paths")));
        }
        text += &parts.join("; ");
        say(&format!("{text}\n"), aside)
    }
}

fn fetch(
    path: &Path,
    (place, access): (&Place, &Access),
    wanted: &Wanted,
    display: &Display,
    stop: &Stop,
) -> Result<(String, Repaired), Failure> {
    let source: Box<dyn Source> = match place {
        Place::Here(copy) => Box::new(LocalSource::new(copy, state_directory().as_deref())?),
        Place::There(there) => {
            let compress = CompressOptions { level: None, enabled: true };
            let dial = Dial { ssh: &access.ssh, reach: &access.reach, count: None, compress, kept: None, state: None };
            remote::source(there, &dial, display)?
        }
    };
    let repaired = repair(&*source, path, wanted, &how(), display, stop.flag());
    Ok((source.describe(), repaired.map_err(|error| failed(path, error, stop))?))
}

fn how() -> HowToRepair {
    HowToRepair { actor: actor(), workers: USUAL_TRANSFERS, retries: 2 }
}

fn failed(path: &Path, error: Error, stop: &Stop) -> Failure {
    let (exit, reason) = match error {
        error if stop.wanted() => return Failure::plain(stop.exit().unwrap_or(Exit::TryAgain), &error),
        Error::Locked { holder, .. } => {
            (Exit::TryAgain, format!("it is in use by {holder}; check again when that has ended"))
        }
        // In a check that word is for data that is not wrong.
        error if error.exit() == Exit::Incomplete => (Exit::BadData, chain(&error)),
        error => (error.exit(), chain(&error)),
    };
    Failure::Plain { exit, message: format!("'{}' was not repaired: {reason}", shown(path)) }
}
