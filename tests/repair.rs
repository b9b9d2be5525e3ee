//! What a check finds is had again from a good copy: every kind of damage, from every kind of copy, and what a copy that is no
//! better must not do.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use lockstep::check::repair::Wanted;
use lockstep::endpoint::local::LocalSource;
use lockstep::endpoint::{Block, Error, Fetch, Produced, Reader, Scan, ScanOptions, Source};
use lockstep::manifest::{Digest, Tree, format};
use lockstep::monitor::{Monitor, Silent};
use lockstep::root::Root;
use lockstep::staging::RootLock;
use lockstep::sync::repair::{self, HowToRepair};

use crate::kit::area::{contents, lockstep, run_traced, sample, traced};
use crate::kit::own::Server;
use crate::kit::pair::{Pair, damage, options, rule};
use crate::kit::sshd::Sshd;
use crate::kit::{assert_same, done, ends, key, public, text, until};

/// A source and what was pushed from it. Files are older than their publishing.
fn published() -> Pair {
    let pair = Pair::new();
    pair.write("data/a.bin", &[1; 3000]);
    pair.write("data/b.bin", &vec![2; 2 << 20]);
    pair.write("data/deep/c.txt", b"three");
    pair.write("empty", b"");
    pair.write("top", b"four");
    fs::hard_link(pair.source.join("top"), pair.source.join("top-again")).unwrap();
    symlink("data/a.bin", pair.source.join("latest")).unwrap();
    fs::set_permissions(pair.source.join("data/deep"), fs::Permissions::from_mode(0o2750)).unwrap();
    age(&pair.source);
    assert!(pair.push_with(&options(), spec()).unwrap().is_complete());
    pair
}

fn spec() -> lockstep::policy::PolicySpec {
    lockstep::policy::PolicySpec { rules: vec![rule("data/deep/", "2750")] }
}

fn age(at: &Path) {
    let old =
        Command::new("find").arg(at).args(["-type", "f", "-exec", "touch", "-d", "2001-09-09", "{}", "+"]).status();
    assert!(old.unwrap().success());
}

fn check(pair: &Pair, arguments: &[&str]) -> Output {
    let mut command = Command::new(lockstep());
    command.arg("check").args(arguments).arg(&pair.target).env("XDG_STATE_HOME", &pair.state);
    command.output().unwrap()
}

fn mend(pair: &Pair, arguments: &[&str]) -> Output {
    check(pair, &[&["--repair", pair.source.to_str().unwrap()], arguments].concat())
}

fn objects(output: &Output) -> Vec<serde_json::Value> {
    let said = String::from_utf8(output.stdout.clone()).unwrap();
    said.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// The bytes of what the root keeps of itself.
fn manifest(target: &Path) -> Vec<u8> {
    fs::read(target.join(".lockstep/manifest")).unwrap()
}

/// It is as the source again, and nothing is left over.
#[track_caller]
fn assert_mended(pair: &Pair, list: &[u8], when: &str) {
    assert!(manifest(&pair.target) == list, "{when}: the manifest was changed");
    assert!(contents(&pair.target) == contents(&pair.source), "{when}");
    assert_same(&pair.source, &pair.target);
    assert!(!pair.target.join(".lockstep/staging/repair").exists(), "{when}: staging is left over");
    ends(&check(pair, &["--quick"]), 0, &["good"]);
    lockstep::audit::verify(&Root::open(&pair.target).unwrap()).unwrap();
}

type Damage = (&'static str, fn(&Path));

/// Every kind of damage that a copy can mend.
const DAMAGES: [Damage; 16] = [
    ("content, times put back", |at| damage(&at.join("data/a.bin"))),
    ("longer", |at| fs::write(at.join("top"), "longer").unwrap()),
    ("cut off", |at| fs::write(at.join("data/b.bin"), "").unwrap()),
    ("removed", |at| fs::remove_file(at.join("top")).unwrap()),
    ("a further name removed", |at| fs::remove_file(at.join("top-again")).unwrap()),
    ("a directory removed", |at| fs::remove_dir_all(at.join("data/deep")).unwrap()),
    ("all removed", |at| {
        fs::remove_dir_all(at.join("data")).unwrap();
        for name in ["top", "top-again", "latest", "empty"] {
            fs::remove_file(at.join(name)).unwrap();
        }
    }),
    ("an empty directory for a file", |at| {
        fs::remove_file(at.join("empty")).unwrap();
        fs::create_dir(at.join("empty")).unwrap();
    }),
    ("a FIFO for a file", |at| {
        fs::remove_file(at.join("top")).unwrap();
        assert!(Command::new("mkfifo").arg(at.join("top")).status().unwrap().success());
    }),
    ("a link for a file", |at| {
        fs::remove_file(at.join("data/a.bin")).unwrap();
        symlink("/etc/passwd", at.join("data/a.bin")).unwrap();
    }),
    ("a link for a directory", |at| {
        fs::remove_dir_all(at.join("data/deep")).unwrap();
        symlink("/etc", at.join("data/deep")).unwrap();
    }),
    ("a file for a directory", |at| {
        fs::remove_dir_all(at.join("data/deep")).unwrap();
        fs::write(at.join("data/deep"), "x").unwrap();
    }),
    ("another link", |at| {
        fs::remove_file(at.join("latest")).unwrap();
        symlink("data/b.bin", at.join("latest")).unwrap();
    }),
    ("a file for a link", |at| {
        fs::remove_file(at.join("latest")).unwrap();
        fs::write(at.join("latest"), "data/a.bin").unwrap();
    }),
    ("mode of a file", |at| fs::set_permissions(at.join("top"), fs::Permissions::from_mode(0o666)).unwrap()),
    ("mode of a directory", |at| {
        fs::set_permissions(at.join("data/deep"), fs::Permissions::from_mode(0o700)).unwrap();
    }),
];

#[test]
fn each_kind_of_damage_is_mended_and_checked_again() {
    for (when, harm) in DAMAGES {
        for depth in ["--quick", "--full"] {
            let pair = published();
            let list = manifest(&pair.target);
            harm(&pair.target);
            assert_eq!(check(&pair, &[depth]).status.code(), Some(1), "{when}");
            let output = mend(&pair, &[depth]);
            assert_eq!(output.status.code(), Some(0), "{when}: {}", text(&output));
            assert!(text(&output).contains("repaired ") && text(&output).contains("good, by a"), "{}", text(&output));
            let quick = check(&pair, &["--quick", "--json"]);
            assert_eq!(objects(&quick)[0]["hashed_files"], 0, "{when}: {}", text(&quick));
            assert_mended(&pair, &list, when);
        }
    }
}

#[test]
fn what_changed_without_any_time_moving_is_mended_although_the_table_knows_better() {
    let pair = published();
    let list = manifest(&pair.target);
    let file = pair.target.join("data/a.bin");
    // As a failing disk: the table has what the inode says now, with the digest of before.
    let table = pair.target.join(".lockstep/digests");
    let root = Root::open(&pair.target).unwrap();
    damage(&file);
    let found = root.stat(&lockstep::path::RelPath::new("data/a.bin").unwrap(), lockstep::root::Follow::Never).unwrap();
    let mut known = lockstep::scan::cache::DigestTable::from_bytes(&fs::read(&table).unwrap()).unwrap();
    let listed = lockstep::manifest::Digest::from_hex(pair.listed("data/a.bin").unwrap().as_bytes()).unwrap();
    known.insert(&found, listed);
    fs::write(&table, known.to_bytes()).unwrap();
    done(&check(&pair, &[]));
    ends(&mend(&pair, &["--full"]), 0, &["modified: data/a.bin", "repaired 1 file (2.93 KiB) from"]);
    assert_mended(&pair, &list, "a failing disk");
}

#[test]
fn owners_are_mended_by_root_and_what_may_not_be_given_away_is_said_by_others() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let pair = published();
    let list = manifest(&pair.target);
    let shown = pair.target.to_str().unwrap();
    let give =
        |owner: &str, path: &str| assert!(Command::new("chown").args(["-hR", owner, path]).status().unwrap().success());
    give("65534:65534", pair.target.join("top").to_str().unwrap());
    ends(&mend(&pair, &[]), 0, &["wrong-owner: top", "no file fetched; permissions set of 1 path"]);
    assert_mended(&pair, &list, "another owner");

    // Who is not root can neither take the place of root's files nor pretend to.
    let outer = pair.target.parent().unwrap();
    fs::set_permissions(outer, fs::Permissions::from_mode(0o755)).unwrap();
    let program = outer.join("lockstep");
    fs::copy(lockstep(), &program).unwrap();
    damage(&pair.target.join("data/a.bin"));
    give("65534:65534", shown);
    let before = contents(&pair.target);
    let mut command = Command::new("setpriv");
    command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]).arg(&program);
    command.args(["check", "--repair", pair.source.to_str().unwrap(), shown]).env("XDG_STATE_HOME", "/nowhere");
    ends(&command.output().unwrap(), 1, &["set the owner or group (who receives has to run as root", "not repaired"]);
    assert!(contents(&pair.target) == before);
    // Where permissions do not matter the content is had.
    command.arg("--ignore-permissions");
    ends(&command.output().unwrap(), 0, &["repaired 1 file"]);
    assert_eq!(fs::metadata(pair.target.join("data/a.bin")).unwrap().uid(), 65534);
}

/// What is wrong with a copy, and what is said of it.
type Copy = (&'static str, fn(&Path), &'static str);

#[test]
fn a_copy_that_is_no_better_is_refused_and_what_was_there_stays() {
    let copies: [Copy; 5] = [
        ("damaged in the same file", |copy| damage(&copy.join("data/a.bin")), "the good copy's SHA-256 is"),
        ("damaged in a large file", |copy| damage(&copy.join("data/b.bin")), "the good copy's SHA-256 is"),
        (
            "another version",
            |copy| fs::write(copy.join("data/a.bin"), "new").unwrap(),
            "has 3 bytes of it, and the list says 3000",
        ),
        ("without it", |copy| fs::remove_file(copy.join("data/a.bin")).unwrap(), "the good copy does not have it"),
        (
            "with a directory for it",
            |copy| {
                fs::remove_file(copy.join("data/a.bin")).unwrap();
                fs::create_dir(copy.join("data/a.bin")).unwrap();
            },
            "it is no regular file in the good copy",
        ),
    ];
    for (when, harm, words) in copies {
        let pair = published();
        let list = manifest(&pair.target);
        for name in ["data/a.bin", "data/b.bin"] {
            fs::write(pair.target.join(name), "what is here").unwrap();
        }
        fs::remove_file(pair.target.join("top")).unwrap();
        fs::remove_file(pair.target.join("latest")).unwrap();
        let files = ["data/a.bin", "data/b.bin"].map(|name| pair.target.join(name));
        let before = files.clone().map(|file| fs::metadata(file).unwrap().ino());
        harm(&pair.source);
        let output = mend(&pair, &[]);
        ends(&output, 1, &[words, "2 paths not repaired", "1 wrong-size"]);
        let refused = usize::from(when.contains("large"));
        assert_eq!(fs::metadata(&files[refused]).unwrap().ino(), before[refused], "{when}");
        assert_eq!(fs::read_to_string(&files[refused]).unwrap(), "what is here", "{when}");
        // The rest is had; a pointer, which would say that all is there, is held back.
        assert_ne!(fs::metadata(&files[1 - refused]).unwrap().ino(), before[1 - refused], "{when}");
        assert_eq!(fs::read_to_string(pair.target.join("top")).unwrap(), "four", "{when}");
        assert!(text(&output).contains("is held back"), "{when}: {}", text(&output));
        assert!(fs::symlink_metadata(pair.target.join("latest")).is_err(), "{when}");
        assert!(manifest(&pair.target) == list);
        // What was not had is vouched for by nobody.
        ends(&check(&pair, &["--quick"]), 1, &["wrong-size", "missing: latest"]);
    }
}

#[test]
fn what_nobody_lists_is_neither_removed_nor_replaced() {
    let pair = published();
    fs::write(pair.target.join("data/new"), "mine").unwrap();
    fs::remove_file(pair.target.join("top")).unwrap();
    fs::create_dir(pair.target.join("top")).unwrap();
    fs::write(pair.target.join("top/mine"), "mine").unwrap();
    fs::remove_file(pair.target.join("empty")).unwrap();
    let output = mend(&pair, &[]);
    ends(&output, 1, &["a directory lies there, with things in it that nobody lists", "repaired 1 file"]);
    for name in ["data/new", "top/mine"] {
        assert_eq!(fs::read_to_string(pair.target.join(name)).unwrap(), "mine");
    }
    assert!(pair.target.join("empty").exists());
    fs::remove_dir_all(pair.target.join("top")).unwrap();
    ends(&mend(&pair, &["--allow-unlisted"]), 0, &["good, by a"]);
    // Only unlisted things: there is nothing to fetch, and no word of a repair.
    let output = mend(&pair, &[]);
    ends(&output, 1, &["1 unlisted"]);
    assert!(!text(&output).contains("repaired"), "{}", text(&output));
    assert_eq!(text(&output).matches("unlisted: data/new").count(), 1);
}

#[test]
fn a_file_that_the_disk_does_not_give_is_had_anew() {
    let pair = published();
    let list = manifest(&pair.target);
    let file = pair.target.join("data/a.bin");
    let shown = [&pair.source, &pair.target, &file].map(|path| path.to_str().unwrap());
    let log = pair.state.with_extension("log");
    // The first read of that path fails, for each thread: so does that of the second check.
    let before = fs::metadata(&file).unwrap().ino();
    let command = [lockstep(), "check", "--full", "--threads=1", "--repair", shown[0], shown[1]];
    let mut strace = Command::new("strace");
    strace.args(["-f", "-qq", "-o"]).arg(&log).args(["-P", shown[2], "-e", "trace=read"]);
    strace.args(["-e", "inject=read:error=EIO:when=1"]).args(command).env("XDG_STATE_HOME", &pair.state);
    let output = strace.output().expect("strace is not installed: Debian package strace");
    ends(&output, 1, &["unreadable: data/a.bin", "Input/output error", "repaired 1 file"]);
    assert_ne!(fs::metadata(&file).unwrap().ino(), before);
    done(&check(&pair, &["--full"]));
    assert_mended(&pair, &list, "a bad sector");
}

#[test]
fn without_a_list_nothing_is_repaired_and_pull_is_named() {
    for harm in [(|file: &Path| fs::remove_file(file).unwrap()) as fn(&Path), |file| {
        let data = fs::read(file).unwrap();
        fs::write(file, &data[..data.len() - 2]).unwrap();
    }] {
        let pair = published();
        harm(&pair.target.join(".lockstep/manifest"));
        fs::remove_file(pair.target.join("top")).unwrap();
        ends(&mend(&pair, &[]), 1, &["was not repaired", "lockstep pull ", "manifest-"]);
        assert!(!pair.target.join("top").exists());
    }
}

#[test]
fn wrong_usage_is_said_before_anything_is_looked_at() {
    let pair = published();
    let target = pair.target.to_str().unwrap();
    ends(&check(&pair, &["--repair", target]), 2, &["is the directory itself"]);
    ends(&mend(&pair, &["-P", "22"]), 2, &["-P is for another machine"]);
    ends(&mend(&pair, &["--remote", "sftp"]), 2, &["--remote is for another machine"]);
    ends(&check(&pair, &["--identity", "key"]), 2, &["--identity is for another machine"]);
    ends(&mend(&pair, &["--cached", "--max-age", "1d"]), 2, &["cannot be used with"]);
    ends(&check(&pair, &["--verbose"]), 2, &["--repair"]);
    ends(&check(&pair, &["--repair", "host:"]), 2, &["names no path"]);
    // On good data the copy is not asked at all.
    ends(&check(&pair, &["--repair", "nobody@127.0.0.1:/nowhere", "-P", "1"]), 0, &["good"]);
    fs::remove_file(pair.target.join("top")).unwrap();
    let output =
        check(&pair, &["--repair", "nobody@127.0.0.1:/nowhere", "-P", "1", "-F", "none", "--identity", "none"]);
    assert!(![0, 1].contains(&output.status.code().unwrap()), "{}", text(&output));
    assert!(text(&output).contains("missing: top") && text(&output).contains("bad, by a"), "{}", text(&output));
    ends(&check(&pair, &["--cached", "--max-age", "1d"]), 1, &["it says that the data is not good"]);
}

#[test]
fn programs_are_told_each_path() {
    let pair = published();
    fs::remove_dir_all(pair.target.join("data/deep")).unwrap();
    fs::set_permissions(pair.target.join("data/a.bin"), fs::Permissions::from_mode(0o666)).unwrap();
    let output = mend(&pair, &["--json"]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output));
    let all = objects(&output);
    let of = |event: &str| all.iter().filter(|one| one["event"] == event).cloned().collect::<Vec<_>>();
    assert!(of("finding").iter().all(|one| one["before_repair"] == true));
    let from = pair.source.to_str().unwrap();
    let mended: Vec<_> = of("repaired")
        .iter()
        .map(|one| {
            assert_eq!(one["from"], from);
            format!("{} {} {}", one["path"].as_str().unwrap(), one["how"].as_str().unwrap(), one["bytes"])
        })
        .collect();
    assert_eq!(mended, ["data/a.bin permissions 0", "data/deep made 0", "data/deep/c.txt fetched 5"]);
    let repair = &of("repair")[0];
    assert_eq!(
        (&repair["fetched_files"], &repair["fetched_bytes"], &repair["failed"]),
        (&1.into(), &5.into(), &0.into())
    );
    let verdict = all.last().unwrap();
    assert_eq!((&verdict["event"], &verdict["result"]), (&"verdict".into(), &"good".into()));
    // What was mended was read from the disk, whatever is known of it; and nothing else.
    assert_eq!((&verdict["depth"], &verdict["hashed_files"]), (&"default".into(), &2.into()));
    let audit = Command::new(lockstep())
        .args(["audit", "show", "-n", "3", "--action", "repair"])
        .arg(&pair.target)
        .output()
        .unwrap();
    ends(&audit, 0, &["repair data/a.bin", "repair data/deep ", "repair data/deep/c.txt 5 bytes"]);
}

#[test]
fn a_list_of_sha256sum_is_a_measure_too() {
    let pair = published();
    let sums = pair.state.with_extension("sums");
    let script = "find . -type f -exec sha256sum {} +; sha256sum latest";
    let list = Command::new("sh").args(["-c", script]).current_dir(&pair.source).output().unwrap().stdout;
    fs::write(&sums, list).unwrap();
    let against = ["--against", sums.to_str().unwrap()];
    let own = manifest(&pair.target);
    damage(&pair.target.join("data/a.bin"));
    fs::set_permissions(pair.target.join("data/a.bin"), fs::Permissions::from_mode(0o604)).unwrap();
    fs::remove_dir_all(pair.target.join("data/deep")).unwrap();
    let output = mend(&pair, &against);
    ends(&output, 0, &["repaired 2 files", "good"]);
    assert!(contents(&pair.target) == contents(&pair.source) && manifest(&pair.target) == own);
    assert_eq!(fs::metadata(pair.target.join("data/a.bin")).unwrap().mode() & 0o7777, 0o604);
    assert!(fs::symlink_metadata(pair.target.join("latest")).unwrap().is_symlink());
}

#[test]
fn a_run_that_goes_on_is_named_and_one_that_was_interrupted_is_gone_on_with() {
    let pair = published();
    fs::remove_file(pair.target.join("top")).unwrap();
    let root = Root::open(&pair.target).unwrap();
    let lock = RootLock::take(&root, "ana@gpu01", Duration::ZERO, &|| false).unwrap();
    ends(&mend(&pair, &["--quarantine"]), 75, &["in use by ana@gpu01", "was not repaired", "missing: top"]);
    drop(lock);
    // A run over plain SFTP has a lock of its own.
    let sftp = pair.target.join(".lockstep/lock.sftp");
    fs::write(&sftp, r#"{"actor":"bo@gpu02","pid":7}"#).unwrap();
    ends(&mend(&pair, &["--quarantine"]), 75, &["in use by bo@gpu02 (process 7)"]);
    assert!(!pair.target.join("top").exists());
    fs::remove_file(sftp).unwrap();
    // What an interrupted push has staged is not the repair's.
    let staged = pair.target.join(".lockstep/staging/current/tree/next");
    fs::create_dir_all(staged.parent().unwrap()).unwrap();
    fs::write(&staged, "half").unwrap();
    ends(&mend(&pair, &[]), 4, &["repaired 1 file", "1 unfinished"]);
    assert_eq!(fs::read_to_string(staged).unwrap(), "half");
    // And what a repair has left is not the push's.
    let left = pair.target.join(".lockstep/staging/repair/tree");
    fs::create_dir_all(&left).unwrap();
    pair.push(&options());
    ends(&check(&pair, &[]), 0, &["good"]);
}

#[test]
fn a_signature_stays_valid_and_is_asked_for_first() {
    let pair = published();
    let at = pair.target.parent().unwrap();
    key(at, "alice");
    fs::write(at.join("allowed"), format!("alice@x {}\n", public(&at.join("alice.pub")))).unwrap();
    let sign =
        Command::new(lockstep()).args(["manifest", "sign", "--key"]).arg(at.join("alice")).arg(&pair.target).output();
    done(&sign.unwrap());
    let allowed = at.join("allowed");
    let signed = ["--require-signature", "--allowed-signers", allowed.to_str().unwrap()];
    damage(&pair.target.join("data/a.bin"));
    ends(&mend(&pair, &signed), 0, &["is signed by alice@x", "repaired 1 file"]);
    ends(&check(&pair, &signed), 0, &["is signed by alice@x"]);
    damage(&pair.target.join("data/a.bin"));
    let signature = pair.target.join(".lockstep/manifest.sig");
    fs::write(&signature, "no signature").unwrap();
    let before = contents(&pair.target);
    ends(&mend(&pair, &signed), 3, &["does not count"]);
    assert!(contents(&pair.target) == before);
}

#[test]
fn a_command_is_started_on_what_was_repaired_and_on_nothing_worse() {
    let pair = published();
    let exec = |more: &[&str]| {
        let mut command = Command::new(lockstep());
        command.args(["exec", "--check"]).arg(&pair.target).args(["--repair", pair.source.to_str().unwrap()]);
        command.args(more).args(["--", "echo", "training"]).env("XDG_STATE_HOME", &pair.state).output().unwrap()
    };
    damage(&pair.target.join("data/a.bin"));
    let output = exec(&[]);
    ends(&output, 0, &["repaired 1 file"]);
    assert_eq!(output.stdout, b"training\n");
    damage(&pair.target.join("data/a.bin"));
    damage(&pair.source.join("data/a.bin"));
    let output = exec(&[]);
    ends(&output, 1, &["1 path not repaired"]);
    assert_eq!(output.stdout, b"");
}

/// What the target of a repair may hold: for each path the old or the good content.
#[track_caller]
fn assert_old_or_good(now: &Path, old: &BTreeMap<String, Vec<u8>>, good: &BTreeMap<String, Vec<u8>>, when: &str) {
    for (name, data) in contents(now) {
        let either = [old, good].iter().any(|version| version.get(&name) == Some(&data));
        assert!(either, "{when}: '{name}' is neither old nor good");
    }
}

#[test]
fn h32_killed_at_any_step_each_file_is_old_or_good_and_the_next_repair_goes_on() {
    let pair = published();
    let list = manifest(&pair.target);
    let harm = |at: &Path| {
        damage(&at.join("data/a.bin"));
        fs::write(at.join("data/b.bin"), "cut").unwrap();
        fs::remove_dir_all(at.join("data/deep")).unwrap();
        fs::remove_file(at.join("top")).unwrap();
        fs::set_permissions(at.join("empty"), fs::Permissions::from_mode(0o600)).unwrap();
        fs::remove_file(at.join("latest")).unwrap();
    };
    harm(&pair.target);
    let template = pair.state.with_extension("template");
    let copy = |from: &Path, to: &Path| {
        let _ = fs::remove_dir_all(to);
        assert!(Command::new("cp").arg("-a").args([from, to]).status().unwrap().success());
    };
    copy(&pair.target, &template);
    let (old, good) = (contents(&template), contents(&pair.source));
    let log = pair.state.with_extension("log");
    let shown = [&pair.source, &pair.target].map(|path| path.to_str().unwrap());
    let command = [lockstep(), "check", "--repair", shown[0], shown[1]];
    let (mut killed, mut runs) = (0, 0);
    for call in ["mkdirat", "pwrite64", "write", "fchmod", "fsync", "fdatasync", "syncfs", "renameat2", "unlinkat"] {
        for point in sample(12) {
            let when = format!("killed at {call} number {point}");
            copy(&template, &pair.target);
            let mut strace = traced(call, Some(&format!("signal=SIGKILL:when={point}")), &log, &command);
            let output = run_traced(strace.env("XDG_STATE_HOME", &pair.state));
            runs += 1;
            killed += usize::from(!output.status.success());
            assert_old_or_good(&pair.target, &old, &good, &when);
            assert!(manifest(&pair.target) == list, "{when}");
            let again = mend(&pair, &[]);
            assert_eq!(again.status.code(), Some(0), "{when}: {}", text(&again));
            assert_mended(&pair, &list, &when);
        }
    }
    assert!(killed * 2 > runs, "only {killed} of {runs} runs were killed");
}

#[test]
fn one_that_is_stopped_leaves_the_old_and_is_gone_on_with() {
    let pair = Pair::new();
    pair.write("weights", &vec![7; 6 << 20]);
    age(&pair.source);
    pair.push(&options());
    let file = pair.target.join("weights");
    damage(&file);
    let old = fs::read(&file).unwrap();
    let log = pair.state.with_extension("log");
    let shown = [&pair.source, &pair.target].map(|path| path.to_str().unwrap());
    let command = [lockstep(), "check", "--repair", shown[0], shown[1]];
    let mut strace = traced("pwrite64", Some("delay_enter=300000"), &log, &command);
    strace.env("XDG_STATE_HOME", &pair.state).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = strace.spawn().expect("strace is not installed: Debian package strace");
    let staged = pair.target.join(".lockstep/staging/repair/tree/weights");
    until("something to be staged", || fs::metadata(&staged).is_ok_and(|found| found.len() >= 1 << 20));
    let lock: serde_json::Value =
        serde_json::from_slice(&fs::read(pair.target.join(".lockstep/lock")).unwrap()).unwrap();
    let pid = rustix::process::Pid::from_raw(i32::try_from(lock["pid"].as_i64().unwrap()).unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    let output = child.wait_with_output().unwrap();
    ends(&output, 130, &["stopped before the end"]);
    assert!(fs::read(&file).unwrap() == old && staged.exists());
    ends(&check(&pair, &["--quick"]), 1, &["unfinished: .lockstep/staging/repair"]);
    ends(&mend(&pair, &[]), 0, &["repaired 1 file"]);
    assert!(fs::read(&file).unwrap() == fs::read(pair.source.join("weights")).unwrap() && !staged.exists());
}

/// A copy that says of everything that it is what the list wants, and sends something else.
struct Liar(Tree);

impl Source for Liar {
    fn describe(&self) -> String {
        "liar".into()
    }

    fn scan(&self, _: &ScanOptions, _: &dyn Monitor) -> Result<Scan, Error> {
        Ok(Scan { tree: self.0.clone(), problems: Vec::new() })
    }

    fn reader(&self, tree: Arc<Tree>) -> Result<Box<dyn Reader + '_>, Error> {
        Ok(Box::new(Lies(tree, Vec::new())))
    }

    fn remember(&self, _: &Tree, _: &[(u32, Digest)]) {}
}

struct Lies(Arc<Tree>, Vec<u32>);

impl Reader for Lies {
    fn wants_more(&self) -> bool {
        self.1.is_empty()
    }

    fn push(&mut self, fetch: Fetch) {
        self.1.push(fetch.index);
    }

    fn next(&mut self) -> Result<Option<Produced>, Error> {
        let Some(index) = self.1.pop() else { return Ok(None) };
        let (size, digest) = self.0.entries()[index as usize].file().unwrap();
        let block = Block::copy_of(&vec![b'x'; size as usize]);
        Ok(Some(Produced::Whole { index, block, digest: digest.unwrap() }))
    }
}

#[test]
fn h24_a_copy_that_lies_brings_nothing_and_neither_does_one_that_comes_too_late() {
    let pair = published();
    fs::write(pair.target.join("top"), "bad").unwrap();
    fs::remove_file(pair.target.join("data/deep/c.txt")).unwrap();
    let before = contents(&pair.target);
    let root = Root::open(&pair.target).unwrap();
    let asked = lockstep::check::Options::default();
    let found = lockstep::check::check(&pair.target, &asked, &Silent::default()).unwrap();
    let list = manifest(&pair.target);
    let wanted = || lockstep::check::repair::wanted(&root, &list, &asked, &found).unwrap();
    let liar = Liar(format::decode(&list).unwrap().tree);
    let how = HowToRepair { actor: "tester@here".into(), workers: 2, retries: 2 };
    let go = |source: &dyn Source, wanted: &Wanted| {
        repair::repair(source, &pair.target, wanted, &how, &Silent::default(), &AtomicBool::new(false))
    };
    let lied = go(&liar, &wanted()).unwrap();
    assert!(lied.mended.is_empty(), "{:?}", lied.mended);
    assert_eq!(lied.failed.len(), 2, "{:?}", lied.failed);
    assert!(lied.failed.iter().all(|(_, why)| why.contains("its SHA-256 is")), "{:?}", lied.failed);
    assert!(contents(&pair.target) == before && manifest(&pair.target) == list);
    // Something was published since the check: what the check wanted is not wanted any more.
    let good = LocalSource::new(&pair.source, None).unwrap();
    let late = Wanted { manifest: Some(Digest([7; 32])), ..wanted() };
    let refused = go(&good, &late).unwrap_err();
    assert_eq!(refused.exit(), lockstep::error::Exit::TryAgain);
    assert!(refused.to_string().contains("its manifest was replaced since it was checked"), "{refused}");
    assert!(contents(&pair.target) == before);
    assert_eq!(go(&good, &wanted()).unwrap().mended.len(), 3);
    assert!(contents(&pair.target) == contents(&pair.source));
    // The list that was read is not the one that was compared with.
    assert!(lockstep::check::repair::wanted(&root, b"other", &asked, &found).is_err());
}

/// Damages what was pushed to `target`, has it repaired by `repair`, and looks.
fn mends_over_a_wire(source: &Path, target: &Path, repair: &dyn Fn(&[&str]) -> Output, words: &[&str]) {
    let list = manifest(target);
    let harm = || {
        damage(&target.join("data/a.bin"));
        fs::write(target.join("data/b.bin"), "cut").unwrap();
        fs::remove_dir_all(target.join("data/deep")).unwrap();
        fs::remove_file(target.join("latest")).unwrap();
        fs::set_permissions(target.join("top"), fs::Permissions::from_mode(0o600)).unwrap();
    };
    harm();
    let output = repair(&["-v"]);
    ends(&output, 0, &[&["repaired 3 files (2.00 MiB) from ", "permissions set of", "good, by a"], words].concat());
    assert!(contents(target) == contents(source) && manifest(target) == list);
    assert_same(source, target);
    // The copy is damaged in the same file, and in another one that nobody asks it for.
    harm();
    for name in ["data/b.bin", "empty"] {
        fs::write(source.join(name), "also bad").unwrap();
    }
    ends(&repair(&[]), 1, &["failed: data/b.bin: the good copy", "2 paths not repaired", "repaired 2 files"]);
    assert_eq!(fs::read_to_string(target.join("data/b.bin")).unwrap(), "cut");
}

fn tree(at: &Path) -> (PathBuf, PathBuf) {
    let (source, target) = (at.join("source"), at.join("target"));
    fs::create_dir_all(source.join("data/deep")).unwrap();
    for (path, data) in
        [("data/a.bin", vec![1; 3000]), ("data/b.bin", vec![2; 2 << 20]), ("data/deep/c", b"c".to_vec())]
    {
        fs::write(source.join(path), data).unwrap();
    }
    fs::write(source.join("top"), "four").unwrap();
    fs::write(source.join("empty"), "").unwrap();
    symlink("data/a.bin", source.join("latest")).unwrap();
    age(&source);
    (source, target)
}

#[test]
fn a_copy_behind_a_stock_sshd_mends() {
    let server = Sshd::start();
    let (source, target) = tree(server.at.path());
    done(&server.run(&["push", "source", "target"]));
    let from = server.remote("source");
    let repair =
        |more: &[&str]| server.lockstep(&[&["check", "target", "--remote", "sftp", "--repair", &from], more].concat());
    mends_over_a_wire(&source, &target, &repair, &["connected to the subsystem 'sftp'"]);
}

#[test]
fn a_copy_behind_an_agent_mends() {
    let server = Sshd::start();
    let (source, target) = tree(server.at.path());
    done(&server.run(&["push", "source", "target"]));
    let (from, agent) = (server.remote("source"), format!("{} sftp-server", lockstep()));
    let repair = |more: &[&str]| {
        let how = ["check", "target", "--remote", "exec", "--remote-command", &agent, "--repair", &from];
        server.lockstep(&[&how, more].concat())
    };
    mends_over_a_wire(&source, &target, &repair, &["connected to the command"]);
}

#[test]
fn a_copy_behind_our_own_listener_mends() {
    let server = Server::start(&[]);
    let (source, target) = tree(&server.at.path().join("root"));
    let shown = [&source, &target].map(|path| path.to_str().unwrap());
    done(&server.run(lockstep(), &["push", shown[0], shown[1]]));
    let repair = |more: &[&str]| {
        server.lockstep(&[&["check", shown[1], "--repair", "sync@127.0.0.1:/source"], more].concat(), "user")
    };
    mends_over_a_wire(&source, &target, &repair, &["connected to the subsystem 'lockstep'"]);
}

#[test]
fn many_files_are_asked_for_by_name_or_found_in_a_list_of_all() {
    let server = Sshd::start();
    // Names of 40 bytes: just as many as are named to the copy, and more.
    for count in [409, 500] {
        let (source, target) = (server.path("source"), server.path("target"));
        let _ = (fs::remove_dir_all(&source), fs::remove_dir_all(&target));
        fs::create_dir_all(source.join("many")).unwrap();
        for number in 0..count {
            fs::write(source.join(format!("many/{number:035}")), number.to_string()).unwrap();
        }
        done(&server.run(&["push", "source", "target"]));
        let from = server.remote("source");
        for way in ["lockstep", "sftp"] {
            for entry in fs::read_dir(target.join("many")).unwrap() {
                fs::remove_file(entry.unwrap().path()).unwrap();
            }
            let output = server.lockstep(&["check", "target", "--remote", way, "--repair", &from]);
            ends(&output, 0, &[&format!("repaired {count} files (")]);
            assert!(contents(&target) == contents(&source));
        }
    }
}
