//! What is moved aside instead of being removed: at a directory, an agent and a stock server, when it goes, and that nothing is
//! lost wherever a run is cut off.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use crate::daemon::Running;
use crate::kit::area::{contents, lockstep, run_traced, sample, traced, write};
use crate::kit::pair::mode_of;
use crate::kit::sshd::Sshd;
use crate::kit::{done, ends, text, until};

fn old_version(at: &Path) {
    for (path, data) in [
        ("kept", "kept"),
        ("replaced", "old"),
        ("gone", "gone"),
        ("dir/gone", "deep"),
        ("dir/sub/x", "deeper"),
        ("dir2/kept", "kept too"),
        ("stays/kept", "kept too"),
        ("stays/lost", "lost"),
        ("latest", "dir"),
    ] {
        write(at, path, data.as_bytes());
    }
    symlink("replaced", at.join("link")).unwrap();
    symlink("kept", at.join("turned")).unwrap();
    fs::create_dir(at.join("empty")).unwrap();
    fs::set_permissions(at.join("gone"), fs::Permissions::from_mode(0o640)).unwrap();
    fs::set_permissions(at.join("dir/sub"), fs::Permissions::from_mode(0o750)).unwrap();
    fs::set_permissions(at.join("empty"), fs::Permissions::from_mode(0o711)).unwrap();
}

fn new_version(at: &Path) {
    for (path, data) in [
        ("kept", "kept"),
        ("replaced", "new!"),
        ("dir2/kept", "kept too"),
        ("stays/kept", "kept too"),
        ("latest", "dir2"),
    ] {
        write(at, path, data.as_bytes());
    }
    symlink("replaced", at.join("turned")).unwrap();
}

/// The directories of the trash of a root, by name.
fn trash(root: &Path) -> Vec<PathBuf> {
    let Ok(found) = fs::read_dir(root.join(".lockstep/trash")) else { return Vec::new() };
    let mut found: Vec<PathBuf> = found.map(|entry| entry.unwrap().path()).collect();
    found.sort();
    found
}

/// What the old version had and the new one has not lies in the trash, as it was.
fn assert_aside(root: &Path, way: &str) {
    let found = trash(root);
    assert_eq!(found.len(), 1, "{way}: {found:?}");
    let aside = &found[0];
    let read =
        |path: &str| fs::read_to_string(aside.join(path)).unwrap_or_else(|error| panic!("{way}: {path}: {error}"));
    let files = ["replaced", "gone", "dir/gone", "dir/sub/x", "latest"].map(read);
    assert_eq!(files, ["old", "gone", "deep", "deeper", "dir"], "{way}");
    assert_eq!(fs::read_link(aside.join("link")).unwrap(), Path::new("replaced"), "{way}");
    assert_eq!(fs::read_link(aside.join("turned")).unwrap(), Path::new("kept"), "{way}");
    let modes = ["gone", "dir/sub", "empty"].map(|path| mode_of(&aside.join(path)));
    assert_eq!(modes, [0o640, 0o750, 0o711], "{way}");
    assert_eq!(mode_of(&root.join(".lockstep/trash")), 0o700, "{way}: others may look into it");
    for path in ["kept", "dir2"] {
        assert!(!aside.join(path).exists(), "{way}: {path} was moved");
    }
    let log = fs::read_to_string(root.join(".lockstep/audit.jsonl")).unwrap();
    for path in ["gone", "dir/sub/x", "replaced", "latest"] {
        let told = log.lines().any(|line| {
            line.contains(&format!(r#""action":"trash","path":"{path}""#))
                && line.contains("moved to trash: .lockstep/trash/")
        });
        assert!(told, "{way}: the audit log does not tell of {path}: {log}");
    }
    assert!(!log.contains(r#""action":"remove""#), "{way}");
    // Nor does it tell of a directory that only lost something.
    assert!(
        !log.contains(r#""action":"trash","path":"stays""#) && log.contains(r#""path":"stays/lost""#),
        "{way}: {log}"
    );
}

#[test]
fn what_is_removed_or_replaced_is_moved_aside_at_every_kind_of_target() {
    let sshd = Sshd::start();
    old_version(&sshd.path("old"));
    new_version(&sshd.path("new"));
    for (way, remote) in [("directory", None), ("agent", Some("lockstep")), ("stock", Some("sftp"))] {
        let target = sshd.path(&format!("target-{way}"));
        let push = |source: &str, more: &[&str]| -> Output {
            let mut command = sshd.command();
            command.arg("push").args(more).arg(sshd.path(source));
            match remote {
                None => command.arg(&target),
                Some(remote) => {
                    let port = sshd.port.to_string();
                    command.args(["-P", &port, "--identity", "user", "--known-hosts", "known"]);
                    command.arg(format!("--remote={remote}")).arg(sshd.remote(&format!("target-{way}")))
                }
            };
            command.output().unwrap()
        };
        done(&push("old", &[]));
        let pushed = push("new", &["--delete=trash"]);
        done(&pushed);
        assert!(text(&pushed).contains("what was removed or replaced lies in .lockstep/trash/2"), "{}", text(&pushed));
        assert_eq!(contents(&target), contents(&sshd.path("new")), "{way}");
        assert_aside(&target, way);
        let verified = Command::new(lockstep()).args(["manifest", "verify"]).arg(&target).output().unwrap();
        done(&verified);
        lockstep::audit::verify(&lockstep::root::Root::open(&target).unwrap()).unwrap();
        let shown = Command::new(lockstep()).args(["audit", "show"]).arg(&target).output().unwrap();
        assert!(text(&shown).contains(" trash dir/gone moved to trash: .lockstep/trash/2"), "{way}: {}", text(&shown));
        // A person gets it back by moving it.
        fs::rename(trash(&target)[0].join("gone"), target.join("gone")).unwrap();
        assert_eq!(fs::read_to_string(target.join("gone")).unwrap(), "gone");
        // Nothing new in the trash; the next run clears away what is older than it asks for.
        let again = push("new", &["--delete=trash", "--trash-keep=1h"]);
        done(&again);
        assert_eq!(trash(&target).len(), 2, "{way}");
        done(&push("new", &["--delete=trash", "--trash-keep=0s", "-v"]));
        assert_eq!(trash(&target), [] as [PathBuf; 0], "{way}");
    }
}

#[test]
fn a_unit_that_is_exchanged_leaves_what_it_lost_in_the_trash_and_nothing_else() {
    let at = tempfile::tempdir().unwrap();
    let (source, target) = (at.path().join("source"), at.path().join("target"));
    for path in ["ckpt-1/same", "ckpt-1/replaced", "ckpt-1/d/gone", "ckpt-1/e/same"] {
        write(&source, path, path.as_bytes());
    }
    let push = |more: &[&str]| {
        let mut command = Command::new(lockstep());
        command.args(["push", "--unit", "ckpt-*/", "--delete=trash"]).args(more).arg(&source).arg(&target);
        done(&command.env("HOME", at.path()).output().unwrap());
    };
    push(&[]);
    assert_eq!(trash(&target), [] as [PathBuf; 0], "nothing was removed");
    let inode = fs::metadata(target.join("ckpt-1/same")).unwrap().ino();
    write(&source, "ckpt-1/replaced", b"new");
    fs::remove_dir_all(source.join("ckpt-1/d")).unwrap();
    push(&[]);
    assert_eq!(contents(&target), contents(&source));
    let aside = &trash(&target)[0];
    let found: BTreeSet<String> = contents(aside).into_keys().collect();
    let expected = ["ckpt-1/replaced", "ckpt-1/d/gone"].map(str::to_owned);
    assert_eq!(found.into_iter().filter(|path| aside.join(path).is_file()).collect::<BTreeSet<_>>(), expected.into());
    let now = fs::metadata(target.join("ckpt-1/same")).unwrap();
    assert_eq!((now.ino(), now.nlink()), (inode, 1), "what stays has a name in the trash");
}

#[test]
fn h32_killed_at_any_step_nothing_is_lost_and_the_next_run_moves_the_rest_aside() {
    let at = tempfile::tempdir().unwrap();
    let path = |name: &str| at.path().join(name);
    old_version(&path("old"));
    new_version(&path("new"));
    let program = |source: &str| -> Vec<String> {
        let show = |name: &str| path(name).display().to_string();
        vec![lockstep().into(), "push".into(), "--delete=trash".into(), show(source), show("target")]
    };
    let mut killed = 0;
    for call in ["renameat", "renameat2", "linkat", "unlinkat", "mkdirat", "fsync"] {
        for point in sample(if call == "renameat" { 16 } else { 8 }) {
            let when = format!("killed at {call} number {point}");
            let _ = fs::remove_dir_all(path("target"));
            let run = |arguments: Vec<String>| {
                Command::new(&arguments[0]).args(&arguments[1..]).env("HOME", at.path()).output()
            };
            done(&run(program("old")).unwrap());
            let arguments = program("new");
            let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
            let mut command = traced(call, Some(&format!("signal=SIGKILL:when={point}")), &path("log"), &arguments);
            let output = run_traced(command.env("HOME", at.path()));
            killed += usize::from(output.status.signal() == Some(9) || output.status.code() == Some(137));
            let everywhere = |name: &str| -> Vec<String> {
                let places = trash(&path("target")).into_iter().chain([path("target")]);
                places.filter_map(|place| fs::read_to_string(place.join(name)).ok()).collect()
            };
            for (name, data) in [("gone", "gone"), ("dir/gone", "deep"), ("dir/sub/x", "deeper"), ("replaced", "old")] {
                assert!(everywhere(name).iter().any(|found| found == data), "{when}: {name} is lost");
            }
            done(&run(program("new")).unwrap());
            assert!(contents(&path("target")) == contents(&path("new")), "{when}");
            assert_aside(&path("target"), &when);
        }
    }
    assert!(killed > 10, "only {killed} runs were killed");
}

#[test]
fn options_of_the_trash_that_make_no_sense_are_refused() {
    let push = |more: &[&str]| {
        let mut command = Command::new(lockstep());
        command.arg("push").args(more).args(["/nowhere", "/nowhere2"]).output().unwrap()
    };
    ends(&push(&["--delete", "--trash-keep=7d"]), 2, &["--trash-keep is for --delete=trash"]);
    ends(&push(&["--delete=all"]), 2, &["mirror", "trash"]);
}

#[test]
fn a_job_with_a_trash_moves_aside_what_its_source_loses_by_push_and_by_the_daemon() {
    const JOB: &str = "[[job]]\nname = \"j\"\nsource = \"AT/source\"\ntargets = [\"AT/target\"]\nsettle = \"0s\"\n\
                       delete = \"trash\"\nmax_delete = \"2\"\n";
    let mut running = Running::prepared(JOB, |at| {
        for name in ["a", "b", "c", "d", "e"] {
            write(&at.join("source"), name, name.as_bytes());
        }
    });
    let (source, target) = (running.path("source"), running.path("target"));
    until("the first version", || target.exists() && contents(&target) == contents(&source));
    fs::remove_file(source.join("a")).unwrap();
    until("what is gone to be moved aside", || !target.join("a").exists());
    assert_eq!(fs::read_to_string(trash(&target)[0].join("a")).unwrap(), "a");
    running.stop();
    let push = || running.command(&["push", "j", "--config"]).arg(running.path("config.toml")).output().unwrap();
    fs::remove_file(source.join("b")).unwrap();
    let pushed = push();
    done(&pushed);
    assert!(text(&pushed).contains("lies in .lockstep/trash/"), "{}", text(&pushed));
    assert_eq!(fs::read_to_string(trash(&target).last().unwrap().join("b")).unwrap(), "b");
    for name in ["c", "d", "e"] {
        fs::remove_file(source.join(name)).unwrap();
    }
    write(&source, "new", b"");
    ends(&push(), 4, &["over the limit (2 paths)"]);
    assert!(target.join("c").exists());
}
