//! Permissions on arrival, through real pushes: what stat(1) and getfacl(1) then see.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use crate::kit::served::{Served, user, write};
use crate::kit::sshd::Sshd;

/// Two directories, a file of rules, and the commands between them.
struct Sides {
    at: tempfile::TempDir,
}

impl Sides {
    fn new() -> Sides {
        let at = tempfile::tempdir().unwrap();
        fs::create_dir(at.path().join("source")).unwrap();
        Sides { at }
    }

    fn source(&self, name: &str) -> PathBuf {
        self.at.path().join("source").join(name)
    }

    fn target(&self, name: &str) -> PathBuf {
        self.at.path().join("target").join(name)
    }

    /// A file at the source.
    fn file(&self, name: &str, mode: u32) {
        let path = self.source(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, format!("content of {name}")).unwrap();
        chmod(&path, mode);
    }

    fn push(&self, rules: &str) -> Output {
        let config = self.at.path().join("config.toml");
        fs::write(&config, rules).unwrap();
        chmod(&config, 0o600);
        let (source, target) = (self.at.path().join("source"), self.at.path().join("target"));
        lockstep(&["push", "--config"], &[&config], &["--policy", "p"], &[&source, &target])
    }

    /// `policy check` finds nothing after the last push.
    fn checked(&self) {
        let (config, target) = (self.at.path().join("config.toml"), self.at.path().join("target"));
        let output = lockstep(&["policy", "check", "--config"], &[&config], &["--policy", "p"], &[&target]);
        assert!(output.status.success(), "{}", text(&output));
    }

    fn pushed(&self, rules: &str) {
        let output = self.push(rules);
        assert!(output.status.success(), "{}", text(&output));
    }
}

fn lockstep(first: &[&str], paths: &[&Path], more: &[&str], last: &[&Path]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lockstep"));
    command.args(first).args(paths).args(more).args(last);
    command.env("XDG_STATE_HOME", last.last().unwrap().parent().unwrap().join("state"));
    command.output().unwrap()
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

fn chmod(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

fn mode(path: &Path) -> String {
    format!("{:04o}", fs::metadata(path).unwrap().mode() & 0o7777)
}

fn run(program: &str, package: &str, arguments: &[&str], path: &Path) -> String {
    let output = Command::new(program).args(arguments).arg(path).output();
    let output = output.unwrap_or_else(|_| panic!("{program} is not installed: Debian package {package}"));
    assert!(output.status.success(), "{program}: {}", text(&output));
    String::from_utf8(output.stdout).unwrap()
}

/// The ACL as getfacl shows it, numbers and effective rights included, in one line.
fn getfacl(path: &Path) -> String {
    let shown = run("getfacl", "acl", &["-cnpE"], path);
    shown.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn setfacl(entries: &str, path: &Path) {
    run("setfacl", "acl", &["-m", entries], path);
}

/// What is not tested without root is said, so that nobody takes it for tested.
#[allow(clippy::print_stderr)]
fn without_root(what: &str) -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        eprintln!("not root: {what} is not tested");
    }
    !root
}

fn owner(path: &Path) -> (u32, u32) {
    let found = fs::symlink_metadata(path).unwrap();
    (found.uid(), found.gid())
}

/// A rule, with further lines.
fn rule(pattern: &str, lines: &str) -> String {
    format!("[[policy.p.rule]]\nmatch = '{pattern}'\n{lines}\n")
}

const NOBODY: u32 = 65534;
const GAMES: u32 = 60;

#[test]
fn s01_s02_s05_s06_s08_s09_modes_arrive_as_chmod_would_set_them() {
    let sides = Sides::new();
    let cases = [
        ("octal3", "755", 0o600, "0755"),
        ("octal4", "0600", 0o644, "0600"),
        ("plus", "+x", 0o644, "0755"),
        ("user", "u+x", 0o640, "0740"),
        ("minus", "g-w", 0o664, "0644"),
        ("others", "o=", 0o664, "0660"),
        ("all", "a+r", 0o600, "0644"),
        ("list", "u=rwx,g=rX,o-r", 0o604, "0750"),
        ("copy", "g=u", 0o604, "0664"),
        ("capital", "a+X", 0o644, "0644"),
        ("train.py", "750", 0o644, "0750"),
        ("model.safetensors", "600", 0o666, "0600"),
        ("labels.txt", "600", 0o644, "0600"),
        ("inference.log", "640", 0o666, "0640"),
        ("shared.out", "775", 0o600, "0775"),
        ("none", "", 0o4764, "0764"),
    ];
    let mut rules = String::new();
    for (name, wanted, bits, _) in cases {
        sides.file(name, bits);
        rules += &if wanted.is_empty() { String::new() } else { rule(name, &format!("mode = '{wanted}'")) };
    }
    sides.file("dataset/train/x", 0o600);
    rules += &(rule("dataset/**", "mode = '660'")
        + &rule("dataset/**/", "mode = '770'")
        + &rule("dataset/", "mode = '770'"));
    sides.pushed(&rules);
    for (name, wanted, _, result) in cases {
        assert_eq!(mode(&sides.target(name)), result, "{name}: {wanted}");
    }
    let found = ["dataset", "dataset/train", "dataset/train/x"].map(|name| mode(&sides.target(name)));
    assert_eq!(found, ["0770", "0770", "0660"]);
    sides.checked();
}

#[test]
fn s03_s04_owner_and_group_by_name_and_by_number() {
    if without_root("giving files away") {
        return;
    }
    let sides = Sides::new();
    for name in ["model.log", "sensor_data/a", "data/x", "owner", "number"] {
        sides.file(name, 0o644);
    }
    std::os::unix::fs::symlink("model.log", sides.source("link")).unwrap();
    let rules = [
        rule("model.log", "owner = 'nobody'\ngroup = 'games'"),
        rule("sensor_data/", "owner = 'nobody'\ngroup = 'games'"),
        rule("data/", "group = 'games'"),
        rule("owner", "owner = 'nobody'"),
        rule("number", "owner = '61234'\ngroup = '61235'\nmode = '600'"),
    ];
    sides.pushed(&rules.concat());
    for (name, expected) in [
        ("model.log", (NOBODY, GAMES)),
        ("sensor_data", (NOBODY, GAMES)),
        ("sensor_data/a", (0, 0)),
        ("data", (0, GAMES)),
        ("owner", (NOBODY, 0)),
        ("number", (61234, 61235)),
        ("link", (0, 0)),
    ] {
        assert_eq!(owner(&sides.target(name)), expected, "{name}");
    }
    sides.checked();
    // What is there already follows a rule that changed; and what somebody changed there is set back.
    std::os::unix::fs::chown(sides.target("owner"), Some(33), None).unwrap();
    sides.pushed(&rules.concat().replace("61235", "61236"));
    assert_eq!((owner(&sides.target("owner")), owner(&sides.target("number"))), ((NOBODY, 0), (61234, 61236)));
}

#[test]
fn s07_sticky_directories_new_and_those_that_are_there_already() {
    let sides = Sides::new();
    sides.file("logs/a", 0o644);
    sides.file("var/log/autodrive/b", 0o644);
    fs::create_dir_all(sides.target("logs")).unwrap();
    chmod(&sides.target("logs"), 0o755);
    let rules = rule("logs/", "mode = '1774'") + &rule("/var/log/autodrive/", "mode = '+t'");
    sides.pushed(&rules);
    assert_eq!((mode(&sides.target("logs")), mode(&sides.target("var/log/autodrive"))), ("1774".into(), "1755".into()));
    chmod(&sides.target("logs"), 0o774);
    sides.pushed(&rules);
    assert_eq!(mode(&sides.target("logs")), "1774");
    sides.checked();
}

#[test]
fn s10_s12_h45_special_and_execute_bits_only_by_rule() {
    let sides = Sides::new();
    sides.file("update.bin", 0o644);
    sides.file("tool", 0o755);
    sides.file("theirs", 0o6755);
    sides.file("never", 0o755);
    sides.file("group/x", 0o644);
    chmod(&sides.source("group"), 0o2775);
    let rules = rule("update.bin", "mode = '744'")
        + &rule("tool", "mode = 'u+s'")
        + &rule("never", "mode = '755'\nexecute = 'never'");
    sides.pushed(&rules);
    let found = ["update.bin", "tool", "theirs", "never", "group"].map(|name| mode(&sides.target(name)));
    assert_eq!(found, ["0744", "4755", "0755", "0644", "0775"]);
    let log = fs::read_to_string(sides.target(".lockstep/audit.jsonl")).unwrap();
    for (path, bits) in [("theirs", "6755"), ("group", "2775")] {
        let refused = format!(
            "\"action\":\"refuse\",\"path\":\"{path}\",\"reason\":\"not given: the special bits of its mode {bits}"
        );
        assert!(log.contains(&refused), "{path}: {log}");
    }
    assert!(!log.contains("\"action\":\"refuse\",\"path\":\"tool\""));
    sides.checked();
    let again = sides.push(&rules);
    assert!(text(&again).contains("nothing to do"), "{}", text(&again));
}

#[test]
fn s12_set_user_id_outlives_the_change_of_owner_here_and_at_a_stock_server() {
    if without_root("giving files away") {
        return;
    }
    let sides = Sides::new();
    sides.file("tool", 0o755);
    let rules = rule("tool", "mode = '4755'\nowner = 'nobody'\ngroup = 'games'");
    sides.pushed(&rules);
    assert_eq!((mode(&sides.target("tool")), owner(&sides.target("tool"))), ("4755".into(), (NOBODY, GAMES)));

    let sshd = Sshd::only("Subsystem sftp internal-sftp");
    fs::create_dir(sshd.path("source")).unwrap();
    fs::copy(sides.source("tool"), sshd.path("source/tool")).unwrap();
    write(&sshd.path("config.toml"), &rules);
    let port = sshd.port.to_string();
    let login = ["-P", &port, "--identity", "user", "--known-hosts", "known", "--remote=sftp"];
    let policy = ["push", "--config", "config.toml", "--policy", "p", "source", &sshd.remote("target")];
    let output = sshd.run(&[&policy[..], &login].concat());
    assert!(output.status.success(), "{}", text(&output));
    let tool = sshd.path("target/tool");
    assert_eq!((mode(&tool), owner(&tool)), ("4755".into(), (NOBODY, GAMES)));
}

#[test]
fn h17_a_change_of_permissions_leaves_names_outside_of_the_target_alone() {
    let sides = Sides::new();
    sides.file("a", 0o644);
    sides.file("tool", 0o755);
    fs::hard_link(sides.source("a"), sides.source("b")).unwrap();
    sides.pushed("[policy.p]\n");
    let outside = |name: &str| sides.at.path().join(format!("outside-{name}"));
    for name in ["a", "tool"] {
        fs::hard_link(sides.target(name), outside(name)).unwrap();
    }
    let inode = |path: &Path| fs::metadata(path).unwrap().ino();
    sides.pushed(&(rule("**", "mode = '600'") + &rule("tool", "mode = '711'")));
    for (name, before, after) in [("a", "0644", "0600"), ("tool", "0755", "0711")] {
        assert_eq!((mode(&outside(name)), mode(&sides.target(name))), (before.into(), after.into()));
        assert_eq!(fs::read(outside(name)).unwrap(), fs::read(sides.target(name)).unwrap());
        assert_eq!(fs::metadata(outside(name)).unwrap().nlink(), 1, "{name}");
    }
    // Names in the tree stay together.
    assert_eq!(inode(&sides.target("a")), inode(&sides.target("b")));
    let again = sides.push(&(rule("**", "mode = '600'") + &rule("tool", "mode = '711'")));
    assert!(text(&again).contains("nothing to do"), "{}", text(&again));
}

#[test]
fn s08_h47_a_further_name_gets_no_other_permissions_than_the_file() {
    let rules = rule("**", "mode = '640'") + &rule("*.safetensors", "mode = '600'");
    let sides = Sides::new();
    sides.file("a.bin", 0o644);
    fs::hard_link(sides.source("a.bin"), sides.source("model.safetensors")).unwrap();
    fs::hard_link(sides.source("a.bin"), sides.source("z.bin")).unwrap();
    let told = sides.push(&rules);
    let why = "is a further name of 'a.bin' (a hard link), and the rules there give the two different permissions";
    assert!(told.status.code() == Some(4) && text(&told).contains(why), "{}", text(&told));
    assert!(!sides.target("model.safetensors").exists());
    assert_eq!((mode(&sides.target("a.bin")), mode(&sides.target("z.bin"))), ("0640".into(), "0640".into()));
    let manifest = fs::read_to_string(sides.target(".lockstep/manifest")).unwrap();
    assert!(!manifest.contains("model.safetensors"), "{manifest}");

    let sshd = Sshd::only("Subsystem sftp internal-sftp");
    let copied = Command::new("cp").arg("-a").args([sides.source(""), sshd.path("source")]).status().unwrap();
    assert!(copied.success());
    write(&sshd.path("config.toml"), &rules);
    let port = sshd.port.to_string();
    let login = ["-P", &port, "--identity", "user", "--known-hosts", "known", "--remote=sftp"];
    let push = ["push", "--config", "config.toml", "--policy", "p", "source", &sshd.remote("target")];
    let told = sshd.run(&[&push[..], &login].concat());
    assert!(told.status.code() == Some(4) && text(&told).contains(why), "{}", text(&told));
    assert!(!sshd.path("target/model.safetensors").exists() && sshd.path("target/z.bin").exists());

    // What came to be so otherwise is found, and not made now the one and now the other.
    fs::hard_link(sides.target("a.bin"), sides.target("model.safetensors")).unwrap();
    let (config, target) = (sides.at.path().join("config.toml"), sides.target(""));
    for (command, code) in [("check", 1), ("apply", 4), ("apply", 4)] {
        let output = lockstep(&["policy", command, "--config"], &[&config], &["--policy", "p"], &[&target]);
        assert_eq!(output.status.code(), Some(code), "{}", text(&output));
        assert!(text(&output).contains("'model.safetensors'"), "{}", text(&output));
        assert_eq!(mode(&sides.target("a.bin")), "0640");
    }
}

#[test]
fn a_further_name_that_has_become_a_file_of_its_own_is_compared() {
    let sides = Sides::new();
    sides.file("a", 0o640);
    fs::hard_link(sides.source("a"), sides.source("b")).unwrap();
    sides.pushed("[policy.p]\n");
    let check = || lockstep(&["check"], &[], &[], &[&sides.target("")]);
    assert!(check().status.success());
    fs::remove_file(sides.target("b")).unwrap();
    fs::copy(sides.target("a"), sides.target("b")).unwrap();
    chmod(&sides.target("b"), 0o666);
    let found = check();
    assert!(found.status.code() == Some(1) && text(&found).contains("wrong-mode: b: is 0666"), "{}", text(&found));
}

#[test]
fn h48_an_unknown_name_anywhere_in_a_rule_changes_nothing() {
    let sides = Sides::new();
    sides.file("x", 0o644);
    for line in [
        "owner = 'no-such-user'",
        "group = 'no-such-group'",
        "acl = ['user:no-such-user:r']",
        "acl = ['group:no-such-group:r']",
    ] {
        let refused = sides.push(&rule("x", line));
        assert!(!refused.status.success() && text(&refused).contains("no-such-"), "{line}: {}", text(&refused));
        assert!(!sides.target("x").exists(), "{line}");
    }
}

/// A receiver that takes in as the policy `p` says.
fn receiver(rules: &str) -> Served {
    Served::with(&["sync"], |_| String::new(), "", |at| rules.to_owned() + &user(at, "sync", "policy = 'p'"))
}

fn push_to(served: &Served, sender: &str) -> Output {
    write(&served.path("sender.toml"), sender);
    served.lockstep(&["push", "source", "sync@127.0.0.1:/models", "--policy-file", "sender.toml"], "sync")
}

#[test]
fn h46_a_confined_sender_gives_nothing_away_where_the_receiver_has_no_rules() {
    if without_root("what a sender asks for owners") {
        return;
    }
    let served = Served::with(&["sync"], |_| String::new(), "", |at| user(at, "sync", ""));
    fs::create_dir_all(served.path("source")).unwrap();
    fs::write(served.path("source/model"), "weights").unwrap();
    let sender = "[[rule]]\nmatch = '**'\nmode = '640'\nowner = 'nobody'\ngroup = 'games'\n";
    let pushed = push_to(&served, sender);
    assert!(pushed.status.success(), "{}", text(&pushed));
    let model = served.path("sync/models/model");
    assert_eq!((mode(&model).as_str(), owner(&model)), ("0640", (0, 0)));
    let log = fs::read_to_string(served.path("sync/models/.lockstep/audit.jsonl")).unwrap();
    assert!(log.contains("not given: owner nobody, group games"), "{log}");
}

#[test]
fn s12_h45_h46_the_receivers_rules_win_over_what_a_sender_asks_for() {
    if without_root("what a sender asks for owners") {
        return;
    }
    let receiver_rules = rule("**", "mode = '640'\ngroup = 'games'")
        + &rule("scans/", "mode = '1750'\ngroup = 'games'\nacl = ['group:www-data:rx']")
        + &rule("*.dcm", "mode = '640'\ngroup = 'games'\nacl = ['group:www-data:r']")
        + &rule("tool", "mode = '4755'");
    let served = receiver(&receiver_rules);
    let source = |name: &str| served.path("source").join(name);
    fs::create_dir_all(source("scans")).unwrap();
    fs::create_dir(source("open")).unwrap();
    for name in ["scans/a.dcm", "tool", "model", "open/x"] {
        fs::write(source(name), name).unwrap();
        chmod(&source(name), 0o6777);
    }
    let wish = "mode = '7777'\nowner = 'nobody'\ngroup = 'root'\nacl = ['user:nobody:rwx']";
    let sender = format!("[[rule]]\nmatch = '**'\n{wish}\n[[rule]]\nmatch = '**/'\n{wish}\n");
    let pushed = push_to(&served, &sender);
    assert!(pushed.status.success(), "{}", text(&pushed));
    let target = |name: &str| served.path("sync/models").join(name);
    for (name, bits, group, acl) in [
        ("scans", "1750", GAMES, "user::rwx group::r-x group:33:r-x mask::r-x other::---"),
        ("scans/a.dcm", "0640", GAMES, "user::rw- group::r-- group:33:r-- mask::r-- other::---"),
        ("model", "0640", GAMES, "user::rw- group::r-- other::---"),
        ("tool", "4755", 0, "user::rwx group::r-x other::r-x"),
        // No rule of the receiver: the nine bits are the sender's, and nothing else.
        ("open", "0777", 0, "user::rwx group::rwx other::rwx"),
    ] {
        assert_eq!((mode(&target(name)).as_str(), owner(&target(name))), (bits, (0, group)), "{name}");
        assert!(getfacl(&target(name)).ends_with(acl), "{name}: {}", getfacl(&target(name)));
    }
    let log = fs::read_to_string(target(".lockstep/audit.jsonl")).unwrap();
    assert!(log.contains("\"path\":\"open\",\"reason\":\"not given: the special bits of mode 7777, owner nobody, group root, ACL user:nobody:rwx"), "{log}");
    assert!(log.contains("\"path\":\"scans/a.dcm\"") && log.contains("\"acl\":\"group:www-data:r--\""), "{log}");
    let again = push_to(&served, &sender);
    assert!(text(&again).contains("nothing to do"), "{}", text(&again));
}

#[test]
fn the_example_policies_run() {
    if without_root("the examples of config/, which name owners") {
        return;
    }
    let names = [
        ("owner = \"caros\"", "owner = \"nobody\""),
        ("group = \"caros\"", "group = \"games\""),
        ("data_team", "www-data"),
        ("clinical", "games"),
        ("auditors", "www-data"),
        ("annotator", "nobody"),
        ("ai_team", "games"),
        (":ops:", ":www-data:"),
        ("trainer", "nobody"),
    ];
    for (name, expected) in [
        (
            "medical",
            &[
                ("scans", "0750", 0, GAMES, "user::rwx group::r-x group:33:r-x mask::r-x other::--- default:user::rwx"),
                (
                    "scans/patient",
                    "0750",
                    0,
                    GAMES,
                    "user::rwx group::r-x group:33:r-x mask::r-x other::--- default:user::rwx",
                ),
                ("scans/patient/a.dcm", "0640", 0, GAMES, "user::rw- group::r-- group:33:r-- mask::r-- other::---"),
                ("labels.txt", "0600", NOBODY, 0, "user::rw- group::--- other::---"),
                ("run.sh", "0640", 0, GAMES, "user::rw- group::r-- other::---"),
            ][..],
        ),
        (
            "research",
            &[
                ("dataset", "0770", 0, GAMES, "user::rwx group::rwx other::---"),
                ("dataset/deep/x", "0660", 0, GAMES, "user::rw- group::rw- other::---"),
                ("logs", "1774", 0, GAMES, "user::rwx group::rwx group:33:rwx mask::rwx other::r-- default:user::rwx"),
                ("run.sh", "0755", 0, 0, "user::rwx group::r-x other::r-x"),
                ("w.safetensors", "0600", NOBODY, GAMES, "user::rw- group::--- other::---"),
            ],
        ),
        (
            "driving",
            &[
                ("update.bin", "0744", NOBODY, 0, "user::rwx group::r-- other::r--"),
                ("sensor_data/run", "0750", NOBODY, 33, "user::rwx group::r-x other::---"),
                ("sensor_data/run/lidar", "0640", NOBODY, 33, "user::rw- group::r-- other::---"),
                ("var/log/autodrive", "1775", 0, GAMES, "user::rwx group::rwx other::r-x"),
                ("w.ckpt", "0600", NOBODY, 0, "user::rw- group::--- other::---"),
            ],
        ),
    ] {
        let sides = Sides::new();
        for file in
            ["scans/patient/a.dcm", "labels.txt", "run.sh", "dataset/deep/x", "logs/l", "w.safetensors", "w.ckpt"]
        {
            sides.file(file, 0o644);
        }
        for file in ["update.bin", "sensor_data/run/lidar", "var/log/autodrive/l"] {
            sides.file(file, 0o644);
        }
        let example = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("config/policy-{name}.toml"));
        let mut rules = fs::read_to_string(example).unwrap().replace(&format!("policy.{name}."), "policy.p.");
        rules = rules.split_inclusive('\n').map(|line| line.replacen("owner   =", "owner =", 1)).collect();
        for (from, to) in names {
            rules = rules.replace(from, to);
        }
        sides.pushed(&rules);
        for &(path, bits, uid, gid, acl) in expected {
            let path = sides.target(path);
            assert_eq!((mode(&path).as_str(), owner(&path)), (bits, (uid, gid)), "{name}: {}", path.display());
            assert!(getfacl(&path).starts_with(acl), "{name}: {}: {}", path.display(), getfacl(&path));
        }
        sides.checked();
        let again = sides.push(&rules);
        assert!(text(&again).contains("nothing to do"), "{name}: {}", text(&again));
    }
}

const EVERYTHING: &str =
    "[[policy.p.rule]]\nmatch = '**'\nmode = '640'\n[[policy.p.rule]]\nmatch = '**/'\nmode = '750'\n";

#[test]
fn s12_acls_are_set_on_arrival_and_follow_the_rules() {
    let sides = Sides::new();
    sides.file("scans/a.dcm", 0o644);
    sides.file("scans/deep/b.dcm", 0o644);
    sides.file("plain", 0o644);
    let rules = |scans: &str, files: &str| {
        format!(
            "{EVERYTHING}[[policy.p.rule]]\nmatch = 'scans/'\nmode = '750'\n{scans}\n[[policy.p.rule]]\nmatch = '*.dcm'\nmode = '640'\n{files}\n"
        )
    };
    let scans = "acl = ['group:games:rx', 'default:group:games:rx', 'default:user:nobody:r']";
    sides.pushed(&rules(scans, "acl = ['group:games:r', 'user:nobody:---']"));
    let (games, nobody) = ("60", "65534");
    let directory = format!(
        "user::rwx group::r-x group:{games}:r-x mask::r-x other::--- default:user::rwx default:user:{nobody}:r-- \
         default:group::r-x default:group:{games}:r-x default:mask::r-x default:other::---"
    );
    let file = format!("user::rw- user:{nobody}:--- group::r-- group:{games}:r-- mask::r-- other::---");
    assert_eq!(getfacl(&sides.target("scans")), directory);
    assert_eq!(getfacl(&sides.target("scans/deep")), "user::rwx group::r-x other::---");
    for name in ["scans/a.dcm", "scans/deep/b.dcm"] {
        assert_eq!(getfacl(&sides.target(name)), file, "{name}");
        assert_eq!(mode(&sides.target(name)), "0640");
    }
    assert_eq!(getfacl(&sides.target("plain")), "user::rw- group::r-- other::---");
    let again = sides.push(&rules(scans, "acl = ['group:games:r', 'user:nobody:---']"));
    assert!(text(&again).contains("nothing to do"), "{}", text(&again));

    // A rule that changed changes what is there; one that lost its entries takes them away.
    sides.pushed(&rules("acl = ['default:group:games:rwx']", ""));
    let directory = "user::rwx group::r-x other::--- default:user::rwx default:group::r-x default:group:60:rwx \
                     default:mask::rwx default:other::---";
    assert_eq!(getfacl(&sides.target("scans")), directory);
    assert_eq!(getfacl(&sides.target("scans/a.dcm")), "user::rw- group::r-- other::---");

    // So does somebody's setfacl on the target.
    setfacl("u:nobody:r", &sides.target("plain"));
    sides.pushed(&rules("", ""));
    assert_eq!(getfacl(&sides.target("plain")), "user::rw- group::r-- other::---");
    assert_eq!(getfacl(&sides.target("scans")), "user::rwx group::r-x other::---");
}

#[test]
fn h32_s12_whoever_finishes_a_killed_run_sets_the_acls_that_it_meant() {
    let sides = Sides::new();
    sides.file("scans/a", 0o644);
    sides.pushed(EVERYTHING);
    // Killed at the first list: the record is written, nothing is done of it.
    let rules =
        EVERYTHING.to_owned() + &rule("scans/", "mode = '2770'\nacl = ['group:games:rx', 'default:group:games:rx']");
    let config = sides.at.path().join("config.toml");
    fs::write(&config, &rules).unwrap();
    let inject = "inject=fsetxattr:signal=SIGKILL:when=1";
    let killed = Command::new("strace")
        .args(["-f", "-qq", "-o", "/dev/null", "-e", inject, env!("CARGO_BIN_EXE_lockstep"), "push", "--policy", "p"])
        .arg("--config")
        .args([&config, &sides.source(""), &sides.target("")])
        .env("XDG_STATE_HOME", sides.at.path().join("state"))
        .output()
        .expect("strace is not installed: Debian package strace");
    assert_eq!(killed.status.code(), None, "{}", text(&killed));
    assert_eq!(mode(&sides.target("scans")), "0750");
    // The next run finishes it, and then ends without having done anything of its own.
    let refused = sides.push(&rule("**", "owner = 'no-such-user'"));
    assert!(text(&refused).contains("no-such-user"), "{}", text(&refused));
    let acl = "user::rwx group::rwx group:60:r-x mask::rwx other::--- default:user::rwx default:group::rwx \
               default:group:60:r-x default:mask::rwx default:other::---";
    assert_eq!((mode(&sides.target("scans")).as_str(), getfacl(&sides.target("scans")).as_str()), ("2770", acl));
}

#[test]
fn h47_a_default_acl_of_the_target_gives_nothing_to_what_arrives() {
    for (existing, rules) in [(true, EVERYTHING), (false, EVERYTHING), (true, "[policy.p]\n"), (false, "[policy.p]\n")]
    {
        let sides = Sides::new();
        sides.file("new/file", 0o660);
        chmod(&sides.source("new"), 0o770);
        setfacl("d:u:nobody:rwx,d:g:games:rwx,u:nobody:rwx", sides.at.path());
        if existing {
            fs::create_dir_all(sides.target("")).unwrap();
            assert!(getfacl(&sides.target("")).contains("default:user:65534:rwx"));
        }
        sides.pushed(rules);
        let expected = if rules == EVERYTHING { ("r--", "r-x") } else { ("rw-", "rwx") };
        assert_eq!(getfacl(&sides.target("new/file")), format!("user::rw- group::{} other::---", expected.0));
        assert_eq!(getfacl(&sides.target("new")), format!("user::rwx group::{} other::---", expected.1));
        if !existing {
            assert_eq!(getfacl(&sides.target("")), "user::rwx group::r-x other::r-x");
        }
        // Nor is what lockstep keeps itself for more people than it is for.
        let kept = sides.target(".lockstep");
        assert!(!getfacl(&kept).contains("65534"), "{}", getfacl(&kept));
        for name in ["manifest", "audit.jsonl", "audit.head"] {
            let acl = getfacl(&kept.join(name));
            assert!(!acl.contains("65534") && !acl.contains(":60:"), "{name}: {acl}");
        }
        // Nothing sleeps in them that a later chmod would wake up.
        chmod(&sides.target("new/file"), 0o666);
        assert_eq!(getfacl(&sides.target("new/file")), "user::rw- group::rw- other::rw-");
    }
}
