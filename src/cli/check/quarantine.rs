//! `lockstep check --quarantine`: what is damaged is moved aside, and it is said what to go on with.

use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::json;

use super::{Failure, check_failure, read_text, say, shown, transfer};
use crate::check::quarantine::{self, Decision, Moved};
use crate::check::repair::listed;
use crate::check::{self, CheckError, Options, Report};
use crate::error::{Escaped, chain};
use crate::monitor::Silent;
use crate::path::RelPath;
use crate::root::Root;

#[derive(Debug, Args)]
pub(super) struct Quarantine {
    /// Move what is damaged aside, by one rename on its file system, so that no training picks it up: to DIR, or to
    /// .quarantine beside PATH; of several checkpoints in PATH each by itself, to PATH/.lockstep/quarantine
    #[arg(long = "quarantine", value_name = "DIR", num_args = 0..=1, require_equals = true, conflicts_with = "cached")]
    to: Option<Option<PathBuf>>,
    /// With --quarantine, directories of PATH that are moved by themselves [default: checkpoint-N, iter_N, global_stepN
    /// and the like]
    #[arg(long = "unit", value_name = "GLOB", requires = "to")]
    units: Vec<String>,
}

impl Quarantine {
    /// Moves what of `path` is bad, where it was asked for. That it cannot be moved is said; bad it is anyway.
    pub(super) fn run(
        &self,
        path: &Path,
        root: &Root,
        options: &Options,
        report: &Report,
        json: bool,
        aside: bool,
    ) -> Result<(), Failure> {
        let Some(to) = &self.to else { return Ok(()) };
        // Nobody else needs the paths of what is good.
        let text = report.list.and_then(|_| read_text(options.against.as_deref(), path).ok());
        let listed = text.map_or_else(Vec::new, |(_, text)| listed(&text, options));
        let decided = quarantine::decide(root, options, report, &listed, &self.units);
        let decided = decided.map_err(|error| check_failure(&CheckError::Filter(error)))?;
        let (units, outside): (Vec<Option<RelPath>>, bool) = match decided {
            Decision::Stay(reason) => return stays(path, &reason, json, aside),
            Decision::Whole => (vec![None], false),
            Decision::Units(units, outside) => (units.into_iter().map(Some).collect(), outside),
        };
        if outside {
            eprintln!(
                "lockstep: warning: '{}': something is wrong outside of its checkpoints too, and stays where it is",
                shown(path)
            );
        }
        let actor = transfer::actor();
        let still = || {
            let now = check::listed(path, options).ok().flatten();
            now.is_none_or(|list| Some(list.digest) == report.list)
        };
        for unit in units {
            let at = unit.as_ref().map_or_else(|| path.to_owned(), |unit| path.join(unit.as_path()));
            match quarantine::move_aside(
                root,
                unit.as_ref(),
                to.as_deref(),
                &actor,
                (report, &listed),
                &still,
                &Silent::default(),
            ) {
                Ok(moved) => tell(&moved, json, aside)?,
                Err(error) => stays(&at, &chain(&error), json, aside)?,
            }
        }
        Ok(())
    }
}

fn stays(path: &Path, reason: &str, json: bool, aside: bool) -> Result<(), Failure> {
    if json {
        let line = json!({ "event": "not-quarantined", "path": shown(path).to_string(), "reason": reason });
        say(&format!("{line}\n"), aside)?;
    }
    eprintln!("lockstep: '{}' was not moved aside: {reason}", shown(path));
    Ok(())
}

fn tell(moved: &Moved, json: bool, aside: bool) -> Result<(), Failure> {
    let Moved { from, to, pointers, last_good, not_audited } = moved;
    if let Some(reason) = not_audited {
        eprintln!("lockstep: warning: the audit log does not tell of the move: {reason}");
    }
    for pointer in pointers {
        let way_out = match last_good {
            Some((path, _)) => {
                format!("have it name '{}'", Escaped(path.file_name().unwrap_or_default().as_encoded_bytes()))
            }
            None => "have it name one that is good".to_owned(),
        };
        eprintln!("lockstep: warning: '{}' still names it; {way_out}, or remove it", shown(pointer));
    }
    if json {
        let line = json!({
            "event": "quarantined",
            "from": shown(from).to_string(),
            "to": shown(to).to_string(),
            "last_good": last_good.as_ref().map(|(path, _)| shown(path).to_string()),
            "last_good_by": last_good.as_ref().map(|(_, how)| how),
            "pointers": pointers.iter().map(|path| shown(path).to_string()).collect::<Vec<_>>(),
        });
        return say(&format!("{line}\n"), aside);
    }
    let good = match last_good {
        Some((path, how)) => format!("the last good one is '{}' ({how})", shown(path)),
        None => "none beside it is known to be good".to_owned(),
    };
    say(&format!("moved '{}' to '{}'; {good}\n", shown(from), shown(to)), aside)
}
