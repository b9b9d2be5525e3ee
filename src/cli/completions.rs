//! `lockstep completions` and `lockstep man`: made from the definition of the command line itself.

use std::path::PathBuf;

use clap::{Args, CommandFactory as _};

use super::{Cli, Failure, output};
use crate::error::{Escaped, Exit};

#[derive(Debug, Args)]
pub(super) struct Completions {
    /// The shell, for example: lockstep completions bash > /etc/bash_completion.d/lockstep
    shell: clap_complete::Shell,
}

impl Completions {
    pub(super) fn run(self) -> Result<Exit, Failure> {
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut Cli::command(), "lockstep", &mut script);
        output(&script)?;
        Ok(Exit::Done)
    }
}

#[derive(Debug, Args)]
pub(super) struct Man {
    /// The command whose page it is, as 'check' or 'manifest sign' [default: the page of lockstep]
    #[arg(conflicts_with = "to")]
    command: Vec<String>,
    /// Write the pages of all commands here, as lockstep.1, lockstep-manifest.1 and so on
    #[arg(long, value_name = "DIR")]
    to: Option<PathBuf>,
}

impl Man {
    pub(super) fn run(self) -> Result<Exit, Failure> {
        match self.to {
            Some(directory) => {
                let written = clap_mangen::generate_to(Cli::command(), &directory);
                written.map_err(Failure::io("write manual pages to", &directory))?;
            }
            None => {
                let mut page = Vec::new();
                let title = [&["lockstep".to_owned()], &self.command[..]].concat().join("-");
                clap_mangen::Man::new(self.page()?).title(title).render(&mut page).map_err(Failure::Output)?;
                output(&page)?;
            }
        }
        Ok(Exit::Done)
    }

    fn page(&self) -> Result<clap::Command, Failure> {
        let mut command = Cli::command();
        command.build();
        let mut name = String::from("lockstep");
        for word in &self.command {
            let Some(found) = command.find_subcommand(word).cloned() else {
                let message = format!("'{name}' has no command '{}'; see {name} --help", Escaped(word.as_bytes()));
                return Err(Failure::usage(message));
            };
            command = found;
            name = format!("{name} {word}");
        }
        Ok(command)
    }
}
