//! `scripts/install`, into a directory.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use crate::kit::area::lockstep;
use crate::kit::{done, ends, text};

fn install(at: &Path, more: &[&str]) -> Output {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/install");
    Command::new(script).args(["--binary", lockstep(), "--destdir"]).arg(at).args(more).output().unwrap()
}

/// All files below a directory.
fn files(at: &Path) -> BTreeSet<PathBuf> {
    let entries = walkdir::WalkDir::new(at).into_iter().map(|entry| entry.unwrap());
    let files = entries.filter(|entry| !entry.file_type().is_dir());
    files.map(|entry| entry.path().strip_prefix(at).unwrap().to_owned()).collect()
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o7777
}

#[test]
fn all_is_put_in_its_place_and_what_an_administrator_wrote_stays() {
    let at = tempfile::tempdir().unwrap();
    let path = |name: &str| at.path().join(name);
    let first = install(at.path(), &[]);
    done(&first);
    assert_eq!(fs::read(path("usr/bin/lockstep")).unwrap(), fs::read(lockstep()).unwrap());
    assert_eq!(mode(&path("usr/bin/lockstep")), 0o755);
    for entry in fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("systemd")).unwrap() {
        let entry = entry.unwrap();
        let (usual, name) = (entry.path(), entry.file_name());
        let to = match name.to_str().unwrap() {
            directory @ ("sysusers.d" | "tmpfiles.d") => format!("usr/lib/{directory}/lockstep.conf"),
            unit => format!("usr/lib/systemd/system/{unit}"),
        };
        let from = if usual.is_dir() { usual.join("lockstep.conf") } else { usual };
        assert_eq!(fs::read(path(&to)).unwrap(), fs::read(from).unwrap(), "{to}");
    }
    for name in [
        "usr/share/man/man1/lockstep.1",
        "usr/share/man/man1/lockstep-manifest-sign.1",
        "usr/share/bash-completion/completions/lockstep",
        "usr/share/zsh/site-functions/_lockstep",
        "usr/share/fish/vendor_completions.d/lockstep.fish",
        "usr/share/doc/lockstep/examples/sender.toml",
        "usr/share/doc/lockstep/examples/slurm/lockstep-prolog.sh",
        "usr/share/doc/lockstep/docs/operations.md",
    ] {
        assert!(path(name).is_file() && text(&first).contains(name), "{name}");
    }
    let config = path("etc/lockstep/config.toml");
    assert_eq!((mode(&config), mode(&path("etc/lockstep"))), (0o640, 0o755));
    lockstep::config::Config::load(&config).unwrap();
    fs::write(&config, "# mine\n").unwrap();
    let before = files(at.path());

    let second = install(at.path(), &[]);
    ends(&second, 0, &["everything is as it should be", "kept"]);
    assert!(!text(&second).contains("installed ") && !text(&second).contains("updated "), "{}", text(&second));
    assert_eq!(files(at.path()), before);

    // What was changed is brought back, and what a version of before had goes.
    fs::write(path("usr/lib/systemd/system/lockstep.service"), "old").unwrap();
    fs::write(path("usr/share/man/man1/lockstep-old.1"), "old").unwrap();
    let list = path("usr/share/lockstep/installed");
    let listed = fs::read_to_string(&list).unwrap();
    fs::write(&list, format!("{listed}/usr/share/man/man1/lockstep-old.1\n")).unwrap();
    let third = install(at.path(), &[]);
    ends(&third, 0, &["updated", "lockstep.service", "removed"]);
    assert!(!text(&third).contains("installed "), "{}", text(&third));
    assert_eq!(files(at.path()), before);

    ends(&install(at.path(), &["--uninstall"]), 0, &["removed", "kept"]);
    assert_eq!(files(at.path()), BTreeSet::from([PathBuf::from("etc/lockstep/config.toml")]));
    assert_eq!(fs::read_to_string(&config).unwrap(), "# mine\n");
    ends(&install(at.path(), &["--uninstall"]), 2, &["nothing is installed there"]);
}

#[test]
fn another_prefix_is_in_the_units_too_and_wrong_use_is_told() {
    let at = tempfile::tempdir().unwrap();
    done(&install(at.path(), &["--prefix=/opt/lockstep/"]));
    let unit = fs::read_to_string(at.path().join("etc/systemd/system/lockstep.service")).unwrap();
    assert!(unit.contains("\nExecStart=/opt/lockstep/bin/lockstep daemon "), "{unit}");
    assert!(at.path().join("opt/lockstep/bin/lockstep").is_file() && !at.path().join("usr").exists());
    done(&install(at.path(), &["--prefix", "/opt/lockstep", "--uninstall"]));
    let empty = at.path().join("empty");
    for (options, said) in [
        (&["--prefix", "here"][..], "is not absolute"),
        (&["--prefix", "/a b"], "cannot stand in a unit"),
        (&["--prefix"], "needs a value"),
        (&["--prefx", "/usr"], "'--prefx' is not known"),
        (&["--binary", "/nowhere"], "cargo build --release"),
    ] {
        ends(&install(&empty, options), 2, &[said]);
        assert!(!empty.exists(), "{options:?}");
    }
}

/// Where the assets of the Debian package go, with their modes; those that are made first come from `made`.
fn packaged(made: &Path) -> BTreeSet<(PathBuf, u32)> {
    let project = Path::new(env!("CARGO_MANIFEST_DIR"));
    let cargo: toml::Table = toml::from_str(&fs::read_to_string(project.join("Cargo.toml")).unwrap()).unwrap();
    let assets = cargo["package"]["metadata"]["deb"]["assets"].as_array().unwrap();
    let mut found = BTreeSet::new();
    for asset in assets {
        let [from, to, mode] = [0, 1, 2].map(|part| asset[part].as_str().unwrap());
        let from = match from.strip_prefix("target/package/") {
            Some(rest) => made.join(rest),
            None if from == "target/release/lockstep" => made.join("usr/bin/lockstep"),
            None => project.join(from),
        };
        let (before, after) = from.file_name().unwrap().to_str().unwrap().split_once('*').unwrap_or_default();
        let entries = fs::read_dir(from.parent().unwrap()).unwrap().map(|entry| entry.unwrap());
        let names = entries.filter(|entry| entry.file_type().unwrap().is_file()).map(|entry| entry.file_name());
        let matching = names.map(|name| name.into_string().unwrap()).filter(|name| {
            from.ends_with(name)
                || (from.to_str().unwrap().contains('*') && name.starts_with(before) && name.ends_with(after))
        });
        let to = to.replace("vendor-completions", "site-functions");
        let matching: Vec<_> =
            matching.map(|name| (Path::new(&to).join(name), u32::from_str_radix(mode, 8).unwrap())).collect();
        assert!(!matching.is_empty(), "{}: there is no such file", from.display());
        found.extend(matching);
    }
    found
}

#[test]
fn the_debian_package_holds_what_the_script_installs() {
    let at = tempfile::tempdir().unwrap();
    done(&install(at.path(), &[]));
    let mut installed: BTreeSet<(PathBuf, u32)> =
        files(at.path()).into_iter().map(|file| (file.clone(), mode(&at.path().join(file)))).collect();
    // The package has a file of its own for the licence, and dpkg knows what it installed.
    installed.retain(|(file, _)| {
        !file.starts_with("usr/share/lockstep") && !file.file_name().unwrap().to_str().unwrap().starts_with("LICENSE")
    });
    assert_eq!(packaged(at.path()), installed);
    for script in ["postinst", "prerm", "postrm"] {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/debian").join(script);
        done(&Command::new("sh").arg("-n").arg(&script).output().unwrap());
        assert_eq!(mode(&script), 0o755, "{}", script.display());
    }
}
