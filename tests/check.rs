//! The gate before training: every kind of damage at every depth, and what must never read as good.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use crate::kit::area::lockstep;
use crate::kit::pair::{Pair, damage, options};
use crate::kit::{done, ends, text, until};

const DEPTHS: [&[&str]; 4] = [&["--quick"], &[], &["--sample=100%"], &["--full"]];

pub(crate) fn published() -> Pair {
    let pair = Pair::new();
    pair.write("data/a.bin", &[1; 3000]);
    pair.write("data/b.bin", &vec![2; 2 << 20]);
    pair.write("data/deep/c.txt", b"three");
    pair.write("top", b"four");
    symlink("data/a.bin", pair.source.join("latest")).unwrap();
    // Old enough that the time of a write cannot be taken for that of the publishing.
    let old = std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000_000);
    for path in ["data/a.bin", "data/b.bin", "data/deep/c.txt", "top"] {
        fs::File::options().write(true).open(pair.source.join(path)).unwrap().set_modified(old).unwrap();
    }
    assert!(pair.push(&options()).is_complete());
    pair
}

pub(crate) fn check(target: &Path, arguments: &[&str]) -> Output {
    Command::new(lockstep()).arg("check").args(arguments).arg(target).output().unwrap()
}

/// The objects of `--json`, the verdict last.
pub(crate) fn objects(output: &Output) -> Vec<serde_json::Value> {
    let said = String::from_utf8(output.stdout.clone()).unwrap();
    said.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Kinds and paths that a check finds.
fn found(target: &Path, arguments: &[&str]) -> (i32, Vec<String>) {
    let output = check(target, &[arguments, &["--json"]].concat());
    let all = objects(&output);
    let verdict = all.last().unwrap_or_else(|| panic!("{}", text(&output)));
    assert_eq!(verdict["event"], "verdict");
    assert_eq!(verdict["result"] == "good", output.status.code() == Some(0), "{}", text(&output));
    let word = |value: &serde_json::Value| value.as_str().unwrap().to_owned();
    let findings = all[..all.len() - 1].iter().map(|one| format!("{} {}", word(&one["kind"]), word(&one["path"])));
    (output.status.code().unwrap(), findings.collect())
}

fn verdict(target: &Path, arguments: &[&str]) -> serde_json::Value {
    objects(&check(target, &[arguments, &["--json"]].concat())).pop().unwrap()
}

type Damage = (&'static str, fn(&Path), i32, &'static [&'static str]);

#[test]
fn s30_every_damage_is_found_at_every_depth() {
    let cases: [Damage; 16] = [
        ("nothing", |_| {}, 0, &[]),
        ("content, times put back", |at| damage(&at.join("data/a.bin")), 1, &["modified data/a.bin"]),
        ("longer", |at| fs::write(at.join("top"), "longer").unwrap(), 1, &["wrong-size top"]),
        ("cut off", |at| fs::write(at.join("data/b.bin"), "").unwrap(), 1, &["wrong-size data/b.bin"]),
        ("removed", |at| fs::remove_file(at.join("top")).unwrap(), 1, &["missing top"]),
        (
            "a directory removed",
            |at| fs::remove_dir_all(at.join("data/deep")).unwrap(),
            1,
            &["missing data/deep", "missing data/deep/c.txt"],
        ),
        ("added", |at| fs::write(at.join("data/new"), "x").unwrap(), 1, &["unlisted data/new"]),
        ("added, empty", |at| fs::create_dir(at.join("data/new")).unwrap(), 1, &["unlisted data/new"]),
        (
            "a directory for a file",
            |at| {
                fs::remove_file(at.join("top")).unwrap();
                fs::create_dir(at.join("top")).unwrap();
            },
            1,
            &["wrong-kind top"],
        ),
        (
            "a FIFO for a file",
            |at| {
                fs::remove_file(at.join("top")).unwrap();
                assert!(Command::new("mkfifo").arg(at.join("top")).status().unwrap().success());
            },
            1,
            &["wrong-kind top"],
        ),
        (
            "a link for a file",
            |at| {
                fs::rename(at.join("top"), at.join("other")).unwrap();
                symlink("other", at.join("top")).unwrap();
            },
            1,
            &["unlisted other", "wrong-kind top"],
        ),
        (
            "another link",
            |at| {
                fs::remove_file(at.join("latest")).unwrap();
                symlink("data/b.bin", at.join("latest")).unwrap();
            },
            1,
            &["wrong-link latest"],
        ),
        (
            "mode",
            |at| fs::set_permissions(at.join("top"), fs::Permissions::from_mode(0o666)).unwrap(),
            1,
            &["wrong-mode top"],
        ),
        (
            "manifest damaged",
            |at| {
                let manifest = at.join(".lockstep/manifest");
                let data = fs::read(&manifest).unwrap();
                fs::write(&manifest, &data[..data.len() - 2]).unwrap();
            },
            1,
            &["manifest-damaged .lockstep/manifest"],
        ),
        (
            "manifest removed",
            |at| fs::remove_file(at.join(".lockstep/manifest")).unwrap(),
            1,
            &["manifest-missing .lockstep/manifest"],
        ),
        (
            "a run not finished",
            |at| {
                fs::create_dir_all(at.join(".lockstep/staging/current/tree")).unwrap();
                fs::write(at.join(".lockstep/staging/current/tree/part"), "x").unwrap();
            },
            4,
            &["unfinished .lockstep/staging/current"],
        ),
    ];
    for ((what, spoil, exit, expected), seen) in cases.iter().flat_map(|case| [(case, false), (case, true)]) {
        let pair = published();
        if seen {
            // A good check keeps what it saw, and the next one goes by that first.
            look(&pair.target);
        }
        spoil(&pair.target);
        for depth in DEPTHS {
            let (code, findings) = found(&pair.target, depth);
            assert_eq!(findings, *expected, "{what}, {depth:?}, {seen}");
            assert_eq!(code, *exit, "{what}, {depth:?}, {seen}");
        }
    }
}

/// A good check, of a tree that is old enough to be believed.
pub(crate) fn look(target: &Path) {
    std::thread::sleep(std::time::Duration::from_millis(30));
    done(&check(target, &[]));
    assert!(target.join(".lockstep/index").exists());
}

#[test]
fn all_findings_come_in_one_run_and_have_the_signs_of_rclone() {
    let pair = published();
    damage(&pair.target.join("data/a.bin"));
    fs::remove_file(pair.target.join("top")).unwrap();
    fs::write(pair.target.join("new\n\x1b[31m"), "x").unwrap();
    let output = check(&pair.target, &["--combined"]);
    let said = String::from_utf8(output.stdout.clone()).unwrap();
    let lines: Vec<&str> = said.lines().collect();
    let expected = [
        "= data",
        "* data/a.bin",
        "= data/b.bin",
        "= data/deep",
        "= data/deep/c.txt",
        "= latest",
        "+ new\\n\\x1b[31m",
        "- top",
    ];
    assert_eq!(lines, expected);
    ends(&output, 1, &["1 missing, 1 modified, 1 unlisted", "default check of 4 files", "push it again"]);
    ends(&check(&pair.target, &[]), 1, &["modified: data/a.bin: its SHA-256 is", "unlisted: new\\n"]);
}

#[test]
fn what_was_read_is_counted_and_full_finds_what_the_table_vouches_for() {
    let pair = published();
    let total = 3000 + (2 << 20) + 5 + 4;
    for (depth, hashed) in [(&["--quick"][..], 0), (&[], 0), (&["--full"], 4), (&["--sample=50%"], 2)] {
        let verdict = verdict(&pair.target, depth);
        assert_eq!(verdict["hashed_files"], hashed, "{depth:?}: {verdict}");
        assert_eq!(verdict["vouched_files"], 4 - hashed, "{depth:?}");
        assert_eq!((&verdict["files"], &verdict["bytes"]), (&4.into(), &total.into()), "{depth:?}");
        assert!(verdict["oldest_hash"].as_u64().unwrap() > 1_000_000_000, "{depth:?}: {verdict}");
    }
    assert_eq!(verdict(&pair.target, &["--full"])["hashed_bytes"], total);
    // What was hashed longer ago than is asked for vouches for nothing.
    std::thread::sleep(std::time::Duration::from_millis(2100));
    assert_eq!(verdict(&pair.target, &["--max-age=1s"])["hashed_files"], 4);
    assert_eq!(verdict(&pair.target, &["--max-age=1h"])["hashed_files"], 0);
    // A digest table that vouches for other content stands for a disk that has lost bits without any time moving.
    let path = pair.target.join("data/a.bin");
    damage(&path);
    use lockstep::root::Metadata;
    use lockstep::scan::cache::DigestTable;
    let table = pair.target.join(".lockstep/digests");
    let mut digests = DigestTable::from_bytes(&fs::read(&table).unwrap()).unwrap();
    let manifest = fs::read(pair.target.join(".lockstep/manifest")).unwrap();
    let manifest = lockstep::manifest::format::decode(&manifest).unwrap();
    let entry = manifest.tree.get(&lockstep::path::RelPath::new("data/a.bin").unwrap()).unwrap();
    digests.insert(&Metadata::of(&fs::File::open(&path).unwrap()).unwrap(), entry.file().unwrap().1.unwrap());
    fs::write(&table, digests.to_bytes()).unwrap();
    assert_eq!(found(&pair.target, &["--quick"]).0, 0);
    assert_eq!(found(&pair.target, &[]).0, 0);
    assert_eq!(found(&pair.target, &["--full"]), (1, vec!["modified data/a.bin".to_owned()]));
}

#[test]
fn without_a_table_quick_goes_by_metadata_and_says_so() {
    let pair = published();
    fs::remove_file(pair.target.join(".lockstep/digests")).unwrap();
    // The manifest came last.
    let manifest = pair.target.join(".lockstep/manifest");
    std::thread::sleep(std::time::Duration::from_millis(30));
    fs::write(&manifest, fs::read(&manifest).unwrap()).unwrap();
    let quick = verdict(&pair.target, &["--quick"]);
    assert_eq!((&quick["unread_files"], &quick["hashed_files"]), (&4.into(), &0.into()), "{quick}");
    ends(&check(&pair.target, &["--quick"]), 0, &["4 files known by size and times alone"]);
    assert_eq!(verdict(&pair.target, &[])["hashed_files"], 4);
    std::thread::sleep(std::time::Duration::from_millis(30));
    damage(&pair.target.join("data/b.bin"));
    assert_eq!(found(&pair.target, &["--quick"]), (1, vec!["modified data/b.bin".to_owned()]));
    // A table that is damaged is none.
    fs::write(pair.target.join(".lockstep/digests"), "lockstep-digests 2\n").unwrap();
    assert_eq!(found(&pair.target, &[]), (1, vec!["modified data/b.bin".to_owned()]));
}

#[test]
fn h61_a_file_that_is_not_listed_is_refused_unless_it_is_allowed() {
    let pair = published();
    fs::write(pair.target.join("data/payload.py"), "import os").unwrap();
    for depth in DEPTHS {
        assert_eq!(found(&pair.target, depth), (1, vec!["unlisted data/payload.py".to_owned()]), "{depth:?}");
    }
    // Nor does a list of what to ignore hide it, which anybody could have put there.
    fs::write(pair.target.join(".lockstepignore"), "payload.py\n").unwrap();
    assert_eq!(found(&pair.target, &[]).1.len(), 2);
    assert_eq!(found(&pair.target, &["--allow-unlisted"]).0, 0);
    assert_eq!(found(&pair.target, &["--exclude=payload.py", "--exclude=.lockstepignore"]).0, 0);
    // What is left out is left out of the list, too.
    fs::remove_file(pair.target.join("data/a.bin")).unwrap();
    assert_eq!(found(&pair.target, &["--allow-unlisted", "--exclude=data/"]).0, 0);
    assert_eq!(found(&pair.target, &["--allow-unlisted"]).0, 1);
}

#[test]
fn permissions_are_compared_unless_they_are_ignored() {
    let pair = published();
    let top = pair.target.join("top");
    fs::set_permissions(&top, fs::Permissions::from_mode(0o4755)).unwrap();
    let mut expected = vec!["wrong-mode top".to_owned()];
    if fs::metadata(&top).unwrap().uid() == 0 {
        std::os::unix::fs::chown(pair.target.join("data"), Some(61234), Some(61235)).unwrap();
        expected = ["wrong-owner data", "wrong-group data", "wrong-mode top"].map(str::to_owned).to_vec();
    }
    assert_eq!(found(&pair.target, &[]), (1, expected));
    assert_eq!(found(&pair.target, &["--ignore-permissions"]).0, 0);
}

#[test]
fn s11_what_the_training_user_cannot_read_is_said_before_training() {
    let pair = published();
    let outer = pair.target.parent().unwrap();
    for (path, mode) in [(outer, 0o755), (&pair.target, 0o755)] {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }
    fs::set_permissions(pair.source.join("top"), fs::Permissions::from_mode(0o600)).unwrap();
    fs::set_permissions(pair.source.join("data/deep"), fs::Permissions::from_mode(0o700)).unwrap();
    assert!(pair.push(&options()).is_complete());
    assert_eq!(found(&pair.target, &[]).0, 0);
    let (code, findings) = found(&pair.target, &["--as=61234"]);
    assert_eq!((code, findings.len()), (1, 2), "{findings:?}");
    assert_eq!(findings, ["unreadable data/deep", "unreadable top"]);
    let (_, findings) = found(&pair.target, &["--as=61234", "--exclude=deep/"]);
    assert_eq!(findings, ["unreadable top"]);
    fs::set_permissions(outer, fs::Permissions::from_mode(0o700)).unwrap();
    let (_, findings) = found(&pair.target, &["--as=61234"]);
    assert_eq!(findings, [format!("unreadable {}", outer.display())]);
    ends(&check(&pair.target, &["--as=no-such-user"]), 2, &["there is no user 'no-such-user'"]);
}

#[test]
fn an_older_generation_than_asked_for_is_refused() {
    let pair = published();
    assert_eq!(found(&pair.target, &["--min-generation=1"]).0, 0);
    let expected = vec!["old-generation .lockstep/manifest".to_owned()];
    assert_eq!(found(&pair.target, &["--min-generation=2"]), (1, expected));
}

#[test]
fn s20_lists_of_sha256sum_are_compared_with_and_need_no_manifest() {
    let at = tempfile::tempdir().unwrap();
    let (tree, list) = (at.path().join("tree"), at.path().join("list"));
    fs::create_dir(&tree).unwrap();
    for name in ["one", "two"] {
        fs::write(tree.join(name), name).unwrap();
    }
    symlink("one", tree.join("link")).unwrap();
    for tag in [&[][..], &["--tag"]] {
        let sums =
            Command::new("sha256sum").args(tag).args(["one", "two", "link"]).current_dir(&tree).output().unwrap();
        fs::write(&list, &sums.stdout).unwrap();
        let against = format!("--against={}", list.display());
        for depth in DEPTHS {
            assert_eq!(found(&tree, &[depth, &[&against]].concat()), (0, vec![]), "{depth:?}");
        }
        fs::write(tree.join("two"), "TWO").unwrap();
        fs::write(tree.join("new"), "").unwrap();
        for depth in DEPTHS {
            let expected = ["unlisted new", "modified two"].map(str::to_owned).to_vec();
            assert_eq!(found(&tree, &[depth, &[&against]].concat()), (1, expected), "{depth:?}");
        }
        fs::remove_file(tree.join("new")).unwrap();
        fs::write(tree.join("two"), "two").unwrap();
    }
    // The list itself may lie there, and one that lists nothing vouches for nothing.
    fs::rename(&list, tree.join("SHA256SUMS")).unwrap();
    let inside = format!("--against={}", tree.join("SHA256SUMS").display());
    assert_eq!(found(&tree, &[&inside]).0, 0);
    fs::write(tree.join("SHA256SUMS"), "").unwrap();
    assert_eq!(found(&tree, &[&inside]).0, 1);
    ends(&check(&tree, &["--against=/nowhere/list"]), 5, &["cannot read the list '/nowhere/list'"]);
    ends(&check(&at.path().join("nowhere"), &[]), 5, &["nowhere"]);
}

#[test]
fn a_verdict_is_kept_and_read_only_while_it_holds() {
    let pair = published();
    let cached = |more: &[&str]| check(&pair.target, &[&["--cached", "--max-age=1h"], more].concat());
    ends(&cached(&[]), 1, &["no verdict stands for it", "verdict.json"]);
    done(&check(&pair.target, &[]));
    ends(&cached(&[]), 0, &["good, as a default check of 4 files"]);
    ends(&check(&pair.target, &["--cached"]), 2, &["--max-age"]);
    ends(&cached(&["--as=61234"]), 1, &["whether that user can read everything"]);
    ends(&cached(&["--min-generation=2"]), 1, &["generation 2"]);
    let kept = pair.target.join(".lockstep/verdict.json");
    // A copy of the directory is another directory.
    let copy = pair.target.with_file_name("copy");
    assert!(Command::new("cp").arg("-a").args([&pair.target, &copy]).status().unwrap().success());
    ends(&check(&copy, &["--cached", "--max-age=1h"]), 1, &["another directory"]);
    // So it is where the inode's number is the same by chance, as that of the top of a file system is.
    let mut value: serde_json::Value = serde_json::from_str(&fs::read_to_string(&kept).unwrap()).unwrap();
    value["inode"] = fs::metadata(&copy).unwrap().ino().into();
    fs::write(copy.join(".lockstep/verdict.json"), value.to_string()).unwrap();
    ends(&check(&copy, &["--cached", "--max-age=1h"]), 1, &["another directory"]);
    // Age, and a clock that was put back.
    let good = fs::read_to_string(&kept).unwrap();
    let mut value: serde_json::Value = serde_json::from_str(&good).unwrap();
    let time = value["time"].as_u64().unwrap();
    for (moved, words) in [(time - 4000, "seconds old"), (time + 4000, "from the future")] {
        value["time"] = moved.into();
        fs::write(&kept, value.to_string()).unwrap();
        ends(&cached(&[]), 1, &[words]);
    }
    fs::write(&kept, &good[..good.len() / 2]).unwrap();
    ends(&cached(&[]), 1, &["no verdict of lockstep"]);
    // One that allowed more than is asked for now.
    for option in ["--allow-unlisted", "--ignore-permissions", "--exclude=top"] {
        done(&check(&pair.target, &[option]));
        ends(&cached(&[]), 1, &["no verdict stands"]);
        done(&cached(&[option]));
    }
    // Damage that was found, and another manifest.
    damage(&pair.target.join("top"));
    ends(&check(&pair.target, &[]), 1, &["modified: top"]);
    ends(&cached(&[]), 1, &["not good"]);
    pair.write("top", b"new content");
    assert!(pair.push(&options()).is_complete());
    done(&check(&pair.target, &[]));
    done(&cached(&[]));
    pair.write("top", b"newer content");
    assert!(pair.push(&options()).is_complete());
    ends(&cached(&[]), 1, &["another manifest"]);
}

#[test]
fn a_verdict_goes_where_it_is_asked_for_and_replaces_nothing_else() {
    let pair = published();
    let file = pair.target.join("verdict.json");
    let option = format!("--verdict={}", file.display());
    for _ in 0..2 {
        done(&check(&pair.target, &[&option]));
    }
    assert!(fs::read_to_string(&file).unwrap().contains("\"result\": \"good\""));
    done(&check(&pair.target, &["--cached", "--max-age=1h", &option]));
    let precious = pair.target.join("data/a.bin");
    let before = fs::read(&precious).unwrap();
    ends(&check(&pair.target, &[&format!("--verdict={}", precious.display())]), 2, &["is no verdict of lockstep"]);
    assert_eq!(fs::read(&precious).unwrap(), before);
}

/// A check of a target whose largest file is read slowly, under strace.
fn slow(pair: &Pair, more: &[&str]) -> Command {
    let mut strace = Command::new("strace");
    strace.args(["-f", "-qq", "-o", "/dev/null", "-e", "trace=read", "-e", "inject=read:delay_enter=300000"]);
    strace.args([lockstep(), "check", "--full"]).args(more).arg(&pair.target);
    strace
}

#[test]
fn h62_a_check_that_is_killed_or_takes_too_long_never_reads_as_good() {
    let pair = published();
    done(&check(&pair.target, &[]));
    let kept: PathBuf = pair.target.join(".lockstep/verdict.json");
    assert!(kept.exists());
    let output = slow(&pair, &["--timeout=1"]).output().expect("strace is not installed: Debian package strace");
    ends(&output, 75, &["was not checked within 1 seconds"]);
    assert!(output.stdout.is_empty(), "{}", text(&output));
    ends(&check(&pair.target, &["--cached", "--max-age=1h"]), 1, &["no verdict stands"]);

    done(&check(&pair.target, &[]));
    let mut child = slow(&pair, &[]).stdout(std::process::Stdio::null()).spawn().unwrap();
    until("the verdict of before to go", || !kept.exists());
    // SIGKILL to strace alone would let the check go on.
    let checks = fs::read_to_string(format!("/proc/{0}/task/{0}/children", child.id())).unwrap();
    for pid in checks.split_whitespace() {
        assert!(Command::new("kill").args(["-9", pid]).status().unwrap().success());
    }
    assert!(!child.wait().unwrap().success());
    assert!(!kept.exists());
    ends(&check(&pair.target, &["--cached", "--max-age=1h"]), 1, &["no verdict stands"]);
}

#[test]
fn s30_a_command_is_started_on_good_data_alone() {
    let pair = published();
    let exec = |more: &[&str], command: &[&str]| {
        let mut exec = Command::new(lockstep());
        exec.args(["exec", "--check"]).arg(&pair.target).args(more).arg("--").args(command).output().unwrap()
    };
    let started = exec(&["--quick"], &["sh", "-c", "echo started; exit 7"]);
    assert_eq!((started.status.code(), &started.stdout[..]), (Some(7), &b"started\n"[..]), "{}", text(&started));
    ends(&started, 7, &["good, by a quick check"]);
    done(&exec(&["--cached", "--max-age=1h"], &["true"]));
    ends(&exec(&[], &["no-such-command-here"]), 2, &["the data is good, but 'no-such-command-here' cannot be started"]);
    let killed = exec(&[], &["sh", "-c", "kill -9 $$"]);
    assert_eq!(std::os::unix::process::ExitStatusExt::signal(&killed.status), Some(9));
    damage(&pair.target.join("top"));
    let mark = pair.target.with_file_name("mark");
    for option in ["--full", "--json", "--combined"] {
        let refused = exec(&[option], &["touch", mark.to_str().unwrap()]);
        ends(&refused, 1, &["top"]);
        assert!(refused.stdout.is_empty(), "{option}: standard output is that of the command");
    }
    ends(&exec(&["--cached", "--max-age=1h"], &["touch", mark.to_str().unwrap()]), 1, &["not good"]);
    assert!(!mark.exists(), "the command was started on bad data");
    ends(&exec(&[], &[]), 2, &[]);
}

#[test]
fn a_run_that_leaves_a_file_as_it_is_leaves_the_time_of_its_hash_too() {
    use lockstep::root::Metadata;
    use lockstep::scan::cache::{DigestTable, Known};
    let pair = published();
    let table = pair.target.join(".lockstep/digests");
    let mut digests = DigestTable::from_bytes(&fs::read(&table).unwrap()).unwrap();
    let top = Metadata::of(&fs::File::open(pair.target.join("top")).unwrap()).unwrap();
    let known = digests.known(&top).unwrap();
    digests.insert_as_of(&top, Known { hashed: Some(1_234_567_890), ..known });
    fs::write(&table, digests.to_bytes()).unwrap();
    pair.write("new", b"comes later");
    assert!(pair.push(&options()).is_complete());
    assert_eq!(verdict(&pair.target, &[])["oldest_hash"], 1_234_567_890);
    let again = verdict(&pair.target, &["--quick", "--max-age=365d"]);
    assert!(again["oldest_hash"].as_u64().unwrap() > 1_234_567_890, "{again}");
    // Nobody knows when: then it is said, and it is older than any age.
    digests.insert_as_of(&top, Known { hashed: None, ..known });
    fs::write(&table, digests.to_bytes()).unwrap();
    assert_eq!(verdict(&pair.target, &[])["undated_files"], 1);
    assert_eq!(verdict(&pair.target, &["--max-age=365d"])["undated_files"], 0);
}

/// Does something when files begin to be read.
struct Meanwhile<F>(F, lockstep::monitor::Counters);

impl<F: Fn() + Send + Sync> lockstep::monitor::Monitor for Meanwhile<F> {
    fn event(&self, event: lockstep::monitor::Event<'_>) {
        if matches!(event, lockstep::monitor::Event::Phase(lockstep::monitor::Phase::Transferring)) {
            (self.0)();
        }
    }
    fn counters(&self) -> &lockstep::monitor::Counters {
        &self.1
    }
}

#[test]
fn h36_what_changes_while_it_is_checked_is_never_good() {
    use lockstep::check::{Depth, Kind, Options, Outcome, check};
    let full = Options { depth: Depth::Full, ..Options::default() };
    type Change = fn(&Path);
    let changes: [(Change, Kind, &str); 4] = [
        (|at| damage(&at.join("top")), Kind::Changed, "top"),
        (|at| fs::remove_file(at.join("top")).unwrap(), Kind::Changed, "top"),
        (
            |at| {
                fs::remove_file(at.join("top")).unwrap();
                assert!(Command::new("mkfifo").arg(at.join("top")).status().unwrap().success());
            },
            Kind::Changed,
            "top",
        ),
        (|at| fs::remove_file(at.join(".lockstep/manifest")).unwrap(), Kind::Changed, ".lockstep/manifest"),
    ];
    for (number, (change, kind, path)) in changes.into_iter().enumerate() {
        let pair = published();
        let monitor = Meanwhile(|| change(&pair.target), lockstep::monitor::Counters::default());
        let report = check(&pair.target, &full, &monitor).unwrap();
        let found: Vec<_> = report.findings.iter().map(|one| (one.kind, one.path.to_str().unwrap())).collect();
        assert_eq!((report.outcome(), &found[..]), (Outcome::Bad, &[(kind, path)][..]), "{number}");
    }
}

#[test]
fn hard_links_are_read_once_and_damage_shows_under_each_name() {
    let pair = Pair::new();
    pair.write("a", b"content of both");
    fs::hard_link(pair.source.join("a"), pair.source.join("b")).unwrap();
    assert!(pair.push(&options()).is_complete());
    assert_eq!(found(&pair.target, &["--full"]).0, 0);
    // A copy that was made a file of its own has the content that is listed.
    fs::remove_file(pair.target.join("b")).unwrap();
    fs::copy(pair.target.join("a"), pair.target.join("b")).unwrap();
    assert_eq!(found(&pair.target, &["--full"]).0, 0);
    fs::remove_file(pair.target.join("b")).unwrap();
    fs::hard_link(pair.target.join("a"), pair.target.join("b")).unwrap();
    damage(&pair.target.join("a"));
    for depth in DEPTHS {
        let expected = ["modified a", "modified b"].map(str::to_owned).to_vec();
        assert_eq!(found(&pair.target, depth), (1, expected), "{depth:?}");
    }
}
