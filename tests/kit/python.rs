//! The Python that has what the tests take from PyPI.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::text;

/// A Python that has this module: that of `target/python`, or of `LOCKSTEP_TEST_PYTHON`. Fails where it has not.
#[track_caller]
pub(crate) fn python(module: &str) -> Command {
    let made = || Path::new(env!("CARGO_MANIFEST_DIR")).join("target/python/bin/python");
    let program = std::env::var_os("LOCKSTEP_TEST_PYTHON").map_or_else(made, PathBuf::from);
    let found = Command::new(&program).args(["-c", &format!("import {module}")]).output();
    match found {
        Ok(found) if found.status.success() => Command::new(program),
        Ok(found) => panic!("{} has no '{module}', run scripts/test: {}", program.display(), text(&found)),
        Err(error) => panic!("{} cannot be started, run scripts/test: {error}", program.display()),
    }
}
