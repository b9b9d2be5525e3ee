//! Who may read a manifest: those who may read all that it lists, and nobody else.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use lockstep::policy::{PolicySpec, RuleSpec};

use crate::kit::area::lockstep;
use crate::kit::pair::{Pair, damage, mode_of, options};
use crate::kit::{done, ends, text};

const TRAINER: &str = "61234";
const TEAM: &str = "61300";

/// A target that everybody may come to, and a copy of the program that everybody may run.
struct Shared {
    pair: Pair,
    program: PathBuf,
}

impl Shared {
    fn new() -> Shared {
        assert!(rustix::process::geteuid().is_root(), "only root can be somebody else: run the tests as root");
        let pair = Pair::new();
        pair.write("weights/model.bin", &[7; 5000]);
        pair.write("weights/notes.txt", b"text");
        let outer = pair.target.parent().unwrap();
        fs::set_permissions(outer, Permissions::from_mode(0o755)).unwrap();
        let program = outer.join("lockstep");
        fs::copy(lockstep(), &program).unwrap();
        // What is as young as its own hash is not remembered.
        let old = std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000_000);
        for path in ["weights/model.bin", "weights/notes.txt"] {
            fs::File::options().write(true).open(pair.source.join(path)).unwrap().set_modified(old).unwrap();
        }
        Shared { pair, program }
    }

    fn publish(&self, rules: &[(&str, &str, &str, &str)]) {
        let rule = |&(pattern, mode, owner, group): &(&str, &str, &str, &str)| RuleSpec {
            pattern: pattern.into(),
            mode: Some(mode.into()),
            owner: Some(owner.into()),
            group: Some(group.into()),
            ..RuleSpec::default()
        };
        let policy = PolicySpec { rules: rules.iter().map(rule).collect() };
        assert!(self.pair.push_with(&options(), policy).unwrap().is_complete());
        fs::set_permissions(&self.pair.target, Permissions::from_mode(0o755)).unwrap();
    }

    fn check_as(&self, uid: &str, gid: &str, more: &[&str]) -> Output {
        let mut setpriv = Command::new("setpriv");
        setpriv.args(["--reuid", uid, "--regid", gid, "--clear-groups"]).arg(&self.program);
        setpriv.arg("check").args(more).arg(&self.pair.target);
        setpriv.output().expect("setpriv is not installed: Debian package util-linux")
    }

    fn state(&self, name: &str) -> PathBuf {
        self.pair.target.join(".lockstep").join(name)
    }
}

#[test]
fn who_may_read_all_of_it_may_check_it_and_nobody_else() {
    let shared = Shared::new();
    // Weights that are one user's alone.
    shared.publish(&[("**", "600", TRAINER, "0"), ("*/", "700", TRAINER, "0")]);
    let checked = shared.check_as(TRAINER, TRAINER, &["--json"]);
    done(&checked);
    let said = text(&checked);
    assert!(said.contains("\"vouched_files\":2") && said.contains("\"hashed_files\":0"), "{said}");
    ends(&shared.check_as("61299", TEAM, &[]), 5, &["may not be read"]);
    // A group's.
    shared.publish(&[("**", "640", "0", TEAM), ("*/", "750", "0", TEAM)]);
    done(&shared.check_as("61299", TEAM, &[]));
    ends(&shared.check_as(TRAINER, TRAINER, &[]), 5, &["may not be read"]);
    // Everybody's.
    shared.publish(&[("**", "644", "0", "0"), ("*/", "755", "0", "0")]);
    done(&shared.check_as("61299", "61299", &[]));
    // One file that is not: its name, size and digest are nobody's business.
    shared.publish(&[("**", "644", "0", "0"), ("*/", "755", "0", "0"), ("notes.txt", "600", "0", "0")]);
    ends(&shared.check_as("61299", "61299", &[]), 5, &["may not be read"]);
    assert_eq!(mode_of(&shared.state("manifest")), 0o600);
    assert_eq!(mode_of(&shared.state("digests")), 0o600);
}

#[test]
fn who_may_check_finds_what_is_wrong_and_comes_to_nothing_else() {
    let shared = Shared::new();
    shared.publish(&[("**", "640", "0", TEAM), ("*/", "750", "0", TEAM)]);
    let as_member = |more: &[&str]| shared.check_as("61299", TEAM, more);
    // The lock would let anybody stop every run; the log tells more than a manifest does.
    for private in ["lock", "audit.jsonl", "audit.head"] {
        assert_eq!(mode_of(&shared.state(private)) & 0o077, 0, "{private}");
    }
    let unlisted = Command::new("setpriv")
        .args(["--reuid=61299", "--regid", TEAM, "--clear-groups", "ls"])
        .arg(shared.state(""))
        .output()
        .unwrap();
    assert!(!unlisted.status.success());
    fs::create_dir(shared.state("staging/current")).unwrap();
    ends(&as_member(&[]), 4, &["unfinished"]);
    fs::remove_dir(shared.state("staging/current")).unwrap();
    done(&as_member(&["--full"]));
    damage(&shared.pair.target.join("weights/model.bin"));
    let found = as_member(&[]);
    ends(&found, 1, &["modified: weights/model.bin"]);
    // What 'policy apply' writes is for the same people.
    let policy = shared.pair.target.with_file_name("policy.toml");
    fs::write(&policy, "[[rule]]\nmatch = \"**\"\nmode = \"600\"\nowner = \"0\"\n").unwrap();
    let apply = Command::new(&shared.program)
        .args(["policy", "apply", "--policy-file"])
        .arg(&policy)
        .arg(&shared.pair.target)
        .output()
        .unwrap();
    done(&apply);
    ends(&as_member(&[]), 5, &["may not be read"]);
    assert_eq!(mode_of(Path::new(&shared.state("manifest"))), 0o600);
}

#[test]
fn what_a_check_hashed_is_remembered_where_one_receives() {
    let shared = Shared::new();
    shared.publish(&[("**", "644", "0", "0"), ("*/", "755", "0", "0")]);
    fs::remove_file(shared.state("digests")).unwrap();
    std::thread::sleep(std::time::Duration::from_millis(50));
    let hashed = |output: &Output| {
        let said = String::from_utf8(output.stdout.clone()).unwrap();
        let verdict: serde_json::Value = serde_json::from_str(said.lines().last().unwrap()).unwrap();
        verdict["hashed_files"].as_u64().unwrap()
    };
    // Who may only read remembers nothing, and is none the worse for it.
    for _ in 0..2 {
        assert_eq!(hashed(&shared.check_as("61299", "61299", &["--json"])), 2);
    }
    let own = |more: &[&str]| {
        Command::new(lockstep()).args(["check", "--json"]).args(more).arg(&shared.pair.target).output().unwrap()
    };
    assert_eq!(hashed(&own(&[])), 2);
    assert_eq!(hashed(&own(&[])), 0);
    assert_eq!(hashed(&shared.check_as("61299", "61299", &["--json"])), 0);
    // A new hash counts as new.
    std::thread::sleep(std::time::Duration::from_millis(2100));
    assert_eq!(hashed(&own(&["--max-age=1s"])), 2);
    assert_eq!(hashed(&own(&["--max-age=1m"])), 0);
    // What is found to be something else is remembered as that, and never as good.
    damage(&shared.pair.target.join("weights/model.bin"));
    std::thread::sleep(std::time::Duration::from_millis(50));
    for _ in 0..2 {
        ends(&own(&[]), 1, &["modified"]);
    }
    // A tree that lockstep does not publish to gets nothing of ours.
    let plain = shared.pair.target.with_file_name("plain");
    fs::create_dir(&plain).unwrap();
    fs::write(plain.join("f"), "f").unwrap();
    let list = shared.pair.target.with_file_name("list");
    let sums = Command::new("sha256sum").arg("f").current_dir(&plain).output().unwrap();
    fs::write(&list, sums.stdout).unwrap();
    done(&Command::new(lockstep()).arg("check").arg("--against").arg(&list).arg(&plain).output().unwrap());
    assert_eq!(fs::read_dir(&plain).unwrap().count(), 1);
}
