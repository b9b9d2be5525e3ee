//! The units of systemd, by systemd's own opinion of them, and by the options that they give to the programs.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use crate::kit::area::lockstep;
use crate::kit::{done, ends, text};

/// More than what is reached, and less than what a forgotten line would bring: tenths of systemd's exposure. The daemon and the
/// server give files away and use the network; a check does neither.
const EXPOSURE: [(&str, u32); 4] = [
    ("lockstep-check@.service", 18),
    ("lockstep.service", 21),
    ("lockstep-serve.service", 21),
    ("lockstep-push@.service", 21),
];

fn project(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

/// All units of `systemd/`.
fn names() -> Vec<String> {
    let entries = fs::read_dir(project("systemd")).unwrap().map(|entry| entry.unwrap());
    let files = entries.filter(|entry| entry.file_type().unwrap().is_file());
    let mut names: Vec<String> = files.map(|entry| entry.file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// The units, with programs in them that are there.
struct Units(tempfile::TempDir);

impl Units {
    fn new() -> Units {
        let units = Units(tempfile::tempdir().unwrap());
        for name in names() {
            let unit = fs::read_to_string(project("systemd").join(&name)).unwrap();
            assert_eq!(name.ends_with(".service"), unit.contains("=/usr/bin/lockstep "), "{name}");
            fs::write(units.path(&name), unit.replace("=/usr/bin/lockstep ", &format!("={} ", lockstep()))).unwrap();
        }
        let training = fs::read_to_string(project("config/systemd/training.service")).unwrap();
        let training = training.replace("=/usr/local/bin/train ", "=/bin/true ").replace("User=trainer\n", "");
        fs::write(units.path("training.service"), training).unwrap();
        units
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn analyze(&self, arguments: &[&str], unit: &str) -> Output {
        let mut command = Command::new("systemd-analyze");
        // With the units of the system after these.
        command.env("SYSTEMD_UNIT_PATH", format!("{}:", self.0.path().display()));
        let output = command.args(arguments).arg(self.path(unit)).output();
        output.expect("systemd-analyze is not installed: Debian package systemd")
    }

    fn verify(&self, unit: &str) -> Output {
        self.analyze(&["verify", "--man=no"], unit)
    }

    fn security(&self, unit: &str, tenths: u32) -> Output {
        let threshold = format!("--threshold={tenths}");
        self.analyze(&["security", "--offline=true", "--no-pager", &threshold], unit)
    }
}

#[test]
fn s30_the_units_are_what_systemd_takes_without_a_word() {
    let units = Units::new();
    let instances = names().into_iter().map(|name| name.replace("@.", "@data-x."));
    for unit in instances.chain(["training.service".to_owned()]) {
        let output = units.verify(&unit);
        ends(&output, 0, &[]);
        assert_eq!(text(&output), "", "{unit}");
    }
    // The one unit brings the other in: what is wrong there is said.
    let check = units.path("lockstep-check@.service");
    let right = fs::read_to_string(&check).unwrap();
    for (line, wrong, said) in [
        ("NoNewPrivileges=yes", "NoNewPrivilege=yes", "NoNewPrivilege"),
        ("Type=oneshot", "Type=once", "once"),
        ("[Unit]", "[Units]", "Units"),
    ] {
        fs::write(&check, right.replace(line, wrong)).unwrap();
        let output = units.verify("training.service");
        assert!(text(&output).contains(said), "'{wrong}' is taken: {}", text(&output));
    }
}

#[test]
fn s30_the_services_have_no_more_rights_than_they_need() {
    let units = Units::new();
    let services: BTreeSet<String> = names().into_iter().filter(|name| name.ends_with(".service")).collect();
    assert_eq!(services, EXPOSURE.iter().map(|(unit, _)| (*unit).to_owned()).collect());
    for (unit, tenths) in EXPOSURE {
        ends(&units.security(unit, tenths), 0, &["Overall exposure level"]);
        let right = fs::read_to_string(units.path(unit)).unwrap();
        for setting in ["SystemCallFilter=", "CapabilityBoundingSet=", "RestrictNamespaces="] {
            let without: Vec<&str> = right.lines().filter(|line| !line.starts_with(setting)).collect();
            fs::write(units.path(unit), without.join("\n")).unwrap();
            let output = units.security(unit, tenths);
            assert!(!output.status.success(), "{unit} without {setting}: {}", text(&output));
        }
        // What would take openat2(2) or chown(2) away.
        for line in ["RestrictSUIDSGID=yes", "PrivateUsers=yes", "DynamicUser=yes"] {
            assert!(!right.lines().any(|found| found == line), "{unit}: {line}");
        }
        // No unit of a service that gives files away lacks the system calls for it.
        assert_eq!(right.contains("CAP_CHOWN"), right.contains("\nSystemCallFilter=@chown\n"), "{unit}");
    }
}

/// The words of the commands that a unit runs by lockstep, with what `$` and `%` stand for left out.
fn commands(unit: &str) -> Vec<Vec<String>> {
    let lines = unit.lines().filter_map(|line| line.strip_prefix("Exec")?.split_once("=/usr/bin/lockstep "));
    lines.map(|(_, words)| words.split(' ').map(str::to_owned).collect()).collect()
}

#[test]
fn the_units_and_their_examples_use_what_the_program_has() {
    let mut seen = 0;
    for name in names().into_iter().filter(|name| name.ends_with(".service")) {
        let unit = fs::read_to_string(project("systemd").join(&name)).unwrap();
        for words in commands(&unit) {
            let help = Command::new(lockstep()).args([words[0].as_str(), "--help"]).output().unwrap();
            ends(&help, 0, &["Usage: lockstep"]);
            let help = text(&help);
            let known: BTreeSet<&str> = help.split([' ', '\n', ',', '[', '=']).collect();
            for option in words.iter().filter(|word| word.len() > 2 && word.starts_with('-')) {
                assert!(known.contains(option.as_str()), "{name}: lockstep {} has no {option}", words[0]);
                seen += 1;
            }
        }
        if let Some((_, page)) = unit.split_once("Documentation=man:lockstep-") {
            let command = page.split('(').next().unwrap();
            done(&Command::new(lockstep()).args(["man", command]).output().unwrap());
        }
    }
    assert!(seen >= 2, "the units are read in the wrong way");
}

#[test]
fn the_drop_ins_of_the_examples_are_taken_and_say_what_they_do() {
    let units = Units::new();
    for (example, unit) in [
        ("read-all.conf", "lockstep.service"),
        ("local-targets.conf", "lockstep.service"),
        ("nice.conf", "lockstep.service"),
        ("run-as.conf", "lockstep-serve.service"),
    ] {
        let text_of = fs::read_to_string(project("config/systemd").join(example)).unwrap();
        assert!(text_of.contains(&format!("{unit}.d/{example}")), "{example}");
        let directory = units.path(&format!("{unit}.d"));
        fs::create_dir_all(&directory).unwrap();
        fs::write(directory.join(example), &text_of).unwrap();
        let output = units.verify(unit);
        assert_eq!(text(&output), "", "{example}");
        fs::write(directory.join(example), text_of.replace("[Service]", "[Servic]")).unwrap();
        assert!(text(&units.verify(unit)).contains("Servic"), "{example} is not read");
        fs::write(directory.join(example), text_of).unwrap();
    }
}

/// A tree in which systemd's tools make users and directories: as root of it, without leaving it.
fn tree() -> tempfile::TempDir {
    let at = tempfile::tempdir().unwrap();
    fs::create_dir(at.path().join("etc")).unwrap();
    at
}

#[test]
fn the_user_and_the_directories_are_made_by_systemd() {
    let at = tree();
    let root = format!("--root={}", at.path().display());
    let run = |program: &str, more: &[&str], file: &str| {
        let output = Command::new(program).arg(&root).args(more).arg(project(file)).output();
        output.unwrap_or_else(|_| panic!("{program} is not installed: Debian package systemd"))
    };
    for _ in 0..2 {
        done(&run("systemd-sysusers", &[], "systemd/sysusers.d/lockstep.conf"));
    }
    let users = fs::read_to_string(at.path().join("etc/passwd")).unwrap();
    assert_eq!(users.lines().filter(|line| line.starts_with("lockstep:x:")).count(), 1, "{users}");
    assert!(users.contains(":/var/lib/lockstep:"), "{users}");
    fs::create_dir(at.path().join("etc/lockstep")).unwrap();
    fs::write(at.path().join("etc/lockstep/config.toml"), "").unwrap();
    // Giving files away needs root; the rest does not.
    if !rustix::process::geteuid().is_root() {
        return;
    }
    for _ in 0..2 {
        let output = run("systemd-tmpfiles", &["--create"], "systemd/tmpfiles.d/lockstep.conf");
        done(&output);
        assert_eq!(text(&output), "");
    }
    use std::os::unix::fs::MetadataExt as _;
    let id = users.split(':').nth(2).unwrap().parse::<u32>().unwrap();
    for (path, mode, uid) in
        [("etc/lockstep", 0o755, 0), ("etc/lockstep/config.toml", 0o640, 0), ("var/lib/lockstep", 0o700, id)]
    {
        let found = fs::metadata(at.path().join(path)).unwrap();
        assert_eq!((found.mode() & 0o7777, found.uid()), (mode, uid), "{path}");
    }
}
