//! What is damaged is moved out of the way of training, as a whole; what is not, or not known to be, stays.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use lockstep::check::Report;
use lockstep::check::quarantine::{NotMoved, move_aside};
use lockstep::monitor::Silent;
use lockstep::root::Root;
use lockstep::staging::RootLock;

use crate::kit::area::lockstep;
use crate::kit::pair::damage;
use crate::kit::{done, ends, text};

/// Checkpoints that were pushed each by itself, or all together, with what they were pushed from.
struct Checkpoints {
    at: tempfile::TempDir,
}

impl Checkpoints {
    fn new() -> Checkpoints {
        let made = Checkpoints { at: tempfile::tempdir().unwrap() };
        for name in ["checkpoint-90", "checkpoint-100", "checkpoint-200", "checkpoint-300"] {
            for file in ["weights", "inner/config"] {
                let file = made.path("source").join(name).join(file);
                fs::create_dir_all(file.parent().unwrap()).unwrap();
                fs::write(&file, format!("{name} {}", file.display())).unwrap();
            }
        }
        fs::write(made.path("source/notes"), "all of them").unwrap();
        made
    }

    fn each() -> Checkpoints {
        let made = Checkpoints::new();
        for name in ["checkpoint-90", "checkpoint-100", "checkpoint-200", "checkpoint-300"] {
            done(&made.run(&["push", &format!("source/{name}"), &format!("there/{name}")]));
        }
        made
    }

    fn together() -> Checkpoints {
        let made = Checkpoints::new();
        done(&made.run(&["push", "--unit", "checkpoint-*/", "source", "there"]));
        made
    }

    fn path(&self, name: &str) -> PathBuf {
        self.at.path().join(name)
    }

    fn run(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new(lockstep());
        command.args(arguments).current_dir(self.at.path()).env("XDG_STATE_HOME", self.path("state"));
        command.output().unwrap()
    }

    fn check(&self, arguments: &[&str]) -> Output {
        self.run(&[&["check"], arguments].concat())
    }
}

/// The one directory in a directory.
#[track_caller]
fn only(directory: &Path) -> PathBuf {
    let names: Vec<PathBuf> = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert_eq!(names.len(), 1, "{names:?}");
    names[0].clone()
}

fn inode(path: &Path) -> u64 {
    fs::symlink_metadata(path).unwrap().ino()
}

#[test]
fn a_damaged_checkpoint_is_moved_whole_and_the_last_good_one_is_named() {
    let there = Checkpoints::each();
    damage(&there.path("there/checkpoint-300/weights"));
    fs::write(there.path("there/latest"), "checkpoint-300\n").unwrap();
    fs::write(there.path("there/latest_checkpointed_iteration.txt"), "300").unwrap();
    fs::write(there.path("there/last"), "checkpoint-200").unwrap();
    symlink("checkpoint-300", there.path("there/best")).unwrap();
    let before = inode(&there.path("there/checkpoint-300"));
    // By the link: what it leads to is what is moved.
    let output = there.check(&["there/best", "--quarantine"]);
    let moved = only(&there.path("there/.quarantine"));
    ends(&output, 1, &["modified: weights", "moved '", moved.to_str().unwrap(), "bad, by a default check"]);
    ends(&output, 1, &["the last good one is", "there/checkpoint-200'", "the highest number", "of 3 directories"]);
    let name = moved.file_name().unwrap().to_str().unwrap().strip_prefix("checkpoint-300-").unwrap();
    assert!(name.len() == 16 && name.as_bytes()[8] == b'T' && name.ends_with('Z'), "{name}");
    assert_eq!(inode(&moved), before);
    assert!(!there.path("there/checkpoint-300").exists());
    assert_eq!(fs::metadata(there.path("there/.quarantine")).unwrap().mode() & 0o7777, 0o700);
    // Pointers are named and not edited.
    for pointer in ["there/latest'", "there/latest_checkpointed_iteration.txt'", "there/best'"] {
        ends(&output, 1, &[&format!("{pointer} still names it; have it name 'checkpoint-200'")]);
    }
    assert!(!text(&output).contains("there/last'"));
    assert_eq!(fs::read_to_string(there.path("there/latest")).unwrap(), "checkpoint-300\n");
    let shown = there.run(&["audit", "show", moved.to_str().unwrap(), "-n", "1"]);
    ends(&shown, 0, &[" quarantine . because: moved to '", "1 modified"]);
    // A second one, although what was good is not any more; numbers are not compared as text.
    damage(&there.path("there/checkpoint-200/weights"));
    damage(&there.path("there/checkpoint-90/weights"));
    let output = there.check(&["there/checkpoint-90", "--quarantine=aside"]);
    ends(&output, 1, &["there/checkpoint-100'", "of 2 directories"]);
    assert!(only(&there.path("aside")).join("weights").exists());
    damage(&there.path("there/checkpoint-100/weights"));
    ends(&there.check(&["there/checkpoint-200", "--quarantine"]), 1, &["none beside it is known to be good"]);
}

#[test]
fn of_several_checkpoints_in_a_root_each_bad_one_is_moved_and_repair_brings_it_back() {
    let there = Checkpoints::together();
    for name in ["checkpoint-100", "checkpoint-300"] {
        damage(&there.path("there").join(name).join("weights"));
    }
    fs::set_permissions(there.path("there/checkpoint-200"), fs::Permissions::from_mode(0o700)).unwrap();
    fs::write(there.path("there/notes"), "changed").unwrap();
    let output = there.check(&["there", "--quarantine", "--json"]);
    assert_eq!(output.status.code(), Some(1), "{}", text(&output));
    assert!(text(&output).contains("outside of its checkpoints too"), "{}", text(&output));
    let said = String::from_utf8(output.stdout).unwrap();
    let all: Vec<serde_json::Value> = said.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let moved: Vec<_> = all.iter().filter(|one| one["event"] == "quarantined").collect();
    let root = there.path("there").canonicalize().unwrap();
    for (one, (name, good)) in
        moved.iter().zip([("checkpoint-100", "checkpoint-90"), ("checkpoint-300", "checkpoint-90")])
    {
        assert_eq!(one["from"], root.join(name).to_str().unwrap());
        let to = Path::new(one["to"].as_str().unwrap());
        assert!(to.starts_with(root.join(".lockstep/quarantine")) && to.join("weights").exists());
        assert_eq!(one["last_good"], root.join(good).to_str().unwrap());
        assert!(
            one["last_good_by"].as_str().unwrap().contains("highest number")
                && one["pointers"] == serde_json::json!([])
        );
        assert!(!root.join(name).exists());
    }
    assert_eq!(moved.len(), 2);
    // What is wrong in its permissions alone, and what is no checkpoint, stays.
    assert!(root.join("checkpoint-200/weights").exists() && root.join("notes").exists());
    ends(
        &there.run(&["audit", "show", "there", "-n", "2"]),
        0,
        &["quarantine checkpoint-100 ", "quarantine checkpoint-300 "],
    );
    // What was moved is missing, takes part in nothing, and can be had again.
    ends(&there.check(&["there", "--quarantine"]), 1, &["missing: checkpoint-100/weights", "are not there at all"]);
    ends(&there.check(&["there", "--repair", "source"]), 0, &["repaired 5 files", "4 directories and links made"]);
}

/// What is done to it, what is asked, how that ends, and what is said.
type Case = (&'static str, fn(&Path), &'static [&'static str], i32, &'static str);

#[test]
fn what_is_good_unfinished_or_not_readable_for_somebody_stays() {
    let cases: [Case; 8] = [
        ("good", |_| {}, &[], 0, ""),
        (
            "unfinished",
            |at| {
                fs::create_dir_all(at.join(".lockstep/staging/current/tree")).unwrap();
                fs::write(at.join(".lockstep/staging/current/tree/part"), "x").unwrap();
            },
            &[],
            4,
            "a run which brings something is not finished",
        ),
        (
            "modes",
            |at| fs::set_permissions(at.join("weights"), fs::Permissions::from_mode(0o640)).unwrap(),
            &[],
            1,
            "only permissions are wrong",
        ),
        (
            "not readable",
            |at| fs::set_permissions(at.join("weights"), fs::Permissions::from_mode(0o600)).unwrap(),
            &["--as", "65534"],
            1,
            "only permissions are wrong",
        ),
        ("an older version", |_| {}, &["--min-generation", "9"], 1, "an older version than is asked for"),
        (
            "no manifest",
            |at| fs::remove_file(at.join(".lockstep/manifest")).unwrap(),
            &[],
            1,
            "without a manifest nothing is known of it",
        ),
        (
            "a run over SFTP",
            |at| {
                damage(&at.join("weights"));
                fs::write(at.join(".lockstep/lock.sftp"), r#"{"actor":"bo@gpu02","pid":7}"#).unwrap();
            },
            &[],
            1,
            "is in use by bo@gpu02 (process 7)",
        ),
        (
            "what others may write to",
            |at| {
                damage(&at.join("weights"));
                let place = at.parent().unwrap().join(".quarantine");
                fs::create_dir(&place).unwrap();
                fs::set_permissions(place, fs::Permissions::from_mode(0o777)).unwrap();
            },
            &[],
            1,
            "can be written to by others",
        ),
    ];
    for (when, harm, more, code, words) in cases {
        let there = Checkpoints::each();
        let unit = there.path("there/checkpoint-300");
        harm(&unit);
        let before = inode(&unit);
        let output = there.check(&[&["there/checkpoint-300", "--quarantine"], more].concat());
        ends(&output, code, &[words]);
        assert_eq!(inode(&unit), before, "{when}");
    }
    let there = Checkpoints::each();
    // A file that is cut off, or only half written yet.
    let save = there.path("checkpoint-7");
    fs::create_dir(&save).unwrap();
    fs::write(save.join("config.json"), "{}").unwrap();
    fs::write(save.join("model.safetensors"), [9, 0, 0, 0, 0, 0, 0, 0, b'{']).unwrap();
    let output = there.check(&["checkpoint-7", "--layout", "huggingface", "--quarantine"]);
    ends(&output, 1, &["damaged: model.safetensors", "a save that goes on looks the same"]);
    assert!(save.exists());
    ends(
        &there.check(&["there/checkpoint-300", "--quarantine", "--cached", "--max-age=1d"]),
        2,
        &["cannot be used with"],
    );
    // Nothing of it was published: a wrong path does no harm.
    ends(&there.check(&["source", "--quarantine"]), 1, &["without a manifest nothing is known of it"]);
    assert!(there.path("source/notes").exists());
}

#[test]
fn a_run_that_goes_on_keeps_it_where_it_is() {
    let there = Checkpoints::each();
    let unit = there.path("there/checkpoint-300");
    damage(&unit.join("weights"));
    for locked in [unit.clone(), there.path("there")] {
        let lock = RootLock::take(&Root::open(&locked).unwrap(), "ana@gpu01", Duration::ZERO, &|| false).unwrap();
        ends(&there.check(&["there/checkpoint-300", "--quarantine"]), 1, &["is in use by ana@gpu01"]);
        assert!(unit.exists());
        drop(lock);
    }
    ends(&there.check(&["there/checkpoint-300", "--quarantine"]), 1, &["moved '"]);
    assert!(!unit.exists());
}

#[test]
fn what_a_push_has_mended_since_the_check_stays() {
    let there = Checkpoints::each();
    let unit = there.path("there/checkpoint-300");
    let root = Root::open(&unit).unwrap();
    let move_aside =
        |still: bool| move_aside(&root, None, None, "ana", (&Report::default(), &[]), &|| still, &Silent::default());
    assert!(matches!(move_aside(false), Err(NotMoved::Renewed(_))));
    assert!(unit.exists());
    assert!(move_aside(true).is_ok() && !unit.exists());
}

#[test]
fn nothing_is_moved_into_itself_to_another_file_system_or_off_a_mount() {
    let there = Checkpoints::each();
    let unit = there.path("there/checkpoint-300");
    damage(&unit.join("weights"));
    ends(
        &there.check(&["there/checkpoint-300", "--quarantine=there/checkpoint-300/inner"]),
        1,
        &["name another directory"],
    );
    let outside = |path: &Path| fs::metadata(path).is_ok_and(|found| found.dev() != fs::metadata(&unit).unwrap().dev());
    let other = Path::new("/dev/shm");
    assert!(outside(other), "/dev/shm is to be another file system");
    let other = tempfile::tempdir_in(other).unwrap();
    let to = format!("--quarantine={}", other.path().join("q").display());
    ends(&there.check(&["there/checkpoint-300", &to]), 1, &["on another file system"]);
    assert!(unit.exists());
    // Mounts of its own namespace, which end with it.
    for mount in [
        "mount --bind there/checkpoint-300 there/checkpoint-300",
        "cp -a there/checkpoint-300 kept && mount -t tmpfs tmpfs there/checkpoint-300 && cp -a kept/. there/checkpoint-300",
    ] {
        let script =
            format!("{mount} && exec {} check there/checkpoint-300 --ignore-permissions --quarantine", lockstep());
        let mut unshare = Command::new("unshare");
        let who: &[&str] = if rustix::process::geteuid().is_root() { &[] } else { &["--map-root-user"] };
        unshare.args(who).args(["--mount", "sh", "-c", &script]).current_dir(there.at.path());
        let output = unshare.output().expect("unshare is not installed: Debian package util-linux");
        ends(&output, 1, &["is a mount point"]);
    }
    assert!(unit.exists());
}

#[test]
fn what_lies_in_a_tree_that_is_published_to_goes_where_the_next_run_leaves_it() {
    let made = Checkpoints::new();
    done(&made.run(&["push", "source", "there"]));
    let list = made.path("sums");
    fs::write(&list, format!("{}  weights\n", "0".repeat(64))).unwrap();
    let output = made.check(&["--against", list.to_str().unwrap(), "--quarantine", "there/checkpoint-90"]);
    ends(&output, 1, &[]);
    assert!(
        !made.path("there/checkpoint-90").exists() && !made.path("there/.quarantine").exists(),
        "{}",
        text(&output)
    );
    let moved = only(&made.path("there/.lockstep/quarantine"));
    done(&made.run(&["push", "--delete", "source", "there"]));
    assert!(moved.join("weights").exists());
}

#[test]
fn what_can_be_repaired_is_not_moved() {
    let there = Checkpoints::each();
    let unit = there.path("there/checkpoint-300");
    damage(&unit.join("weights"));
    let both = ["there/checkpoint-300", "--repair", "source/checkpoint-300", "--quarantine"];
    let output = there.check(&both);
    ends(&output, 0, &["repaired 1 file", "good"]);
    assert!(unit.exists() && !text(&output).contains("moved"));
    damage(&unit.join("weights"));
    damage(&there.path("source/checkpoint-300/weights"));
    ends(&there.check(&both), 1, &["1 path not repaired", "moved '"]);
    assert!(!unit.exists());
}

#[test]
fn directories_that_are_moved_by_themselves_can_be_named() {
    let there = Checkpoints::new();
    done(&there.run(&["push", "source", "there"]));
    fs::rename(there.path("there"), there.path("step-1")).unwrap();
    // A tree that is called like a checkpoint is one, whatever lies in it.
    damage(&there.path("step-1/checkpoint-100/inner/config"));
    ends(&there.check(&["step-1", "--quarantine", "--unit", "inner/"]), 1, &["step-1/checkpoint-100/inner' to '"]);
    assert!(there.path("step-1/checkpoint-100/weights").exists());
    ends(&there.check(&["step-1", "--quarantine"]), 1, &["step-1' to '"]);
    assert!(!there.path("step-1").exists());
}

#[test]
fn files_that_are_called_like_checkpoints_are_none_and_a_damaged_list_moves_nothing_that_may_be_good() {
    let there = Checkpoints::new();
    fs::create_dir(there.path("run")).unwrap();
    for name in ["step_10.pt", "step_20.pt"] {
        fs::write(there.path("run").join(name), name).unwrap();
    }
    done(&there.run(&["push", "run", "there"]));
    damage(&there.path("there/step_20.pt"));
    ends(&there.check(&["there", "--quarantine"]), 1, &["modified: step_20.pt", "there' to '"]);
    assert!(!there.path("there").exists());

    let there = Checkpoints::together();
    let list = there.path("there/.lockstep/manifest");
    fs::write(&list, &fs::read(&list).unwrap()[..100]).unwrap();
    ends(&there.check(&["there", "--quarantine"]), 1, &["nobody knows which of the checkpoints in it are good"]);
    assert!(there.path("there/checkpoint-100").exists());
    let there = Checkpoints::each();
    let list = there.path("there/checkpoint-200/.lockstep/manifest");
    fs::write(&list, &fs::read(&list).unwrap()[..100]).unwrap();
    ends(&there.check(&["there/checkpoint-200", "--quarantine"]), 1, &["moved '", "there/checkpoint-300'"]);
}
