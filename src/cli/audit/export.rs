//! `lockstep audit export`: lines for other programs.

use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};

use super::{Event, Exit, Failure, Wanted, audit, shown, verified};
use crate::audit::export;
use crate::error::chain;
use crate::root::Root;

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    /// ArcSight's Common Event Format, version 0: a line for each event
    Cef,
    /// Comma-separated values (RFC 4180) with a line of headings
    Csv,
    /// The lines as they are kept
    Jsonl,
}

#[derive(Debug, Args)]
pub(in crate::cli) struct Export {
    /// Directories with a log, one after the other
    #[arg(required = true)]
    directories: Vec<PathBuf>,
    /// How
    #[arg(long, value_enum)]
    format: Format,
    #[command(flatten)]
    wanted: Wanted,
}

impl Export {
    pub(super) fn run(self) -> Result<Exit, Failure> {
        // All are looked at before the first line is written.
        let mut wrong = 0;
        let mut until = Vec::new();
        for directory in &self.directories {
            match verified(directory) {
                Ok(found) => until.push(Some(found.head.lines)),
                Err(failure @ Failure::Root(_)) => return Err(failure),
                Err(failure) => {
                    wrong += 1;
                    until.push(None);
                    eprintln!("lockstep: NOT VERIFIED: {}", chain(&failure));
                }
            }
        }
        let mut out = BufWriter::new(std::io::stdout().lock());
        let written = self.write(&mut out, &until)?;
        match written.and_then(|()| out.flush()) {
            Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => return Err(Failure::Output(error)),
            _ => {}
        }
        if wrong == 0 {
            return Ok(Exit::Done);
        }
        let message = format!(
            "{wrong} of {} logs could not be verified; what was written of them proves nothing",
            self.directories.len()
        );
        Err(Failure::bad_data(message))
    }

    /// The lines of all logs, each as far as it was verified; of one that was not, all.
    fn write(&self, out: &mut dyn Write, until: &[Option<u64>]) -> Result<std::io::Result<()>, Failure> {
        let query = self.wanted.query();
        let mut written = match self.format {
            Format::Csv => out.write_all(export::csv_header().as_bytes()),
            _ => Ok(()),
        };
        for (directory, until) in self.directories.iter().zip(until) {
            let name = root_of(directory);
            let mut one = |line: &[u8]| {
                // What cannot be read is said above, with its number.
                let Some(event) = Event::parse(line) else { return };
                let verified = until.is_none_or(|until| event.sequence <= until);
                if written.is_ok() && verified && query.admits(&event) {
                    written = match self.format {
                        Format::Cef => out.write_all((export::cef(&name, &event) + "\n").as_bytes()),
                        Format::Csv => out.write_all(export::csv(&name, &event).as_bytes()),
                        Format::Jsonl => out.write_all(line).and_then(|()| out.write_all(b"\n")),
                    };
                }
            };
            audit::raw(&Root::open(directory)?, &mut one)?;
        }
        Ok(written)
    }
}

/// The directory as its name is everywhere.
fn root_of(directory: &Path) -> String {
    let whole = directory.canonicalize().unwrap_or_else(|_| directory.to_owned());
    shown(&whole).to_string()
}
