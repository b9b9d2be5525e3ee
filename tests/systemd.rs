//! The units of systemd, by systemd's own opinion of them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use crate::kit::area::lockstep;
use crate::kit::{ends, text};

/// More than what is reached, and less than what a forgotten line would bring: tenths of systemd's exposure.
const EXPOSURE: u32 = 18;

/// The units, with programs in them that are there.
fn units() -> (tempfile::TempDir, PathBuf, PathBuf) {
    let at = tempfile::tempdir().unwrap();
    let copy = |name: &str, usual: &str, here: &str| {
        let from = Path::new(env!("CARGO_MANIFEST_DIR")).join(name);
        let unit = fs::read_to_string(&from).unwrap();
        assert!(unit.contains(usual), "{name}");
        let to = at.path().join(from.file_name().unwrap());
        fs::write(&to, unit.replace(usual, here).replace("User=trainer\n", "")).unwrap();
        to
    };
    let check = copy("systemd/lockstep-check@.service", "=/usr/bin/lockstep ", &format!("={} ", lockstep()));
    let training = copy("config/systemd/training.service", "=/usr/local/bin/train ", "=/bin/true ");
    (at, check, training)
}

fn analyze(at: &Path, arguments: &[&str], unit: &Path) -> Output {
    let mut command = Command::new("systemd-analyze");
    // With the units of the system after these.
    command.env("SYSTEMD_UNIT_PATH", format!("{}:", at.display())).args(arguments).arg(unit);
    command.output().expect("systemd-analyze is not installed: Debian package systemd")
}

#[test]
fn s30_the_units_are_what_systemd_takes_without_a_word() {
    let (at, check, training) = units();
    let verify = || analyze(at.path(), &["verify", "--man=no"], &training);
    let output = verify();
    ends(&output, 0, &[]);
    assert_eq!(text(&output), "");
    // The one unit brings the other in: what is wrong there is said.
    let right = fs::read_to_string(&check).unwrap();
    for (line, wrong, said) in [
        ("NoNewPrivileges=yes", "NoNewPrivilege=yes", "NoNewPrivilege"),
        ("Type=oneshot", "Type=once", "once"),
        ("[Unit]", "[Units]", "Units"),
    ] {
        fs::write(&check, right.replace(line, wrong)).unwrap();
        assert!(text(&verify()).contains(said), "'{wrong}' is taken: {}", text(&verify()));
    }
}

#[test]
fn s30_the_check_has_no_more_rights_than_it_needs() {
    let (at, check, _) = units();
    let threshold = format!("--threshold={EXPOSURE}");
    let security = || analyze(at.path(), &["security", "--offline=true", "--no-pager", &threshold], &check);
    ends(&security(), 0, &["Overall exposure level"]);
    let unit = fs::read_to_string(&check).unwrap();
    fs::write(&check, unit.replace("SystemCallFilter=@system-service\n", "")).unwrap();
    assert!(!security().status.success(), "{}", text(&security()));
}
