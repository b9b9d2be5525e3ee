//! `lockstep config` and `lockstep doctor`: what is wrong is found before anything is started, and named with the way out.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;

use crate::kit::area::lockstep;
use crate::kit::served::Served;
use crate::kit::{ends, key, text};

/// An area in which `AT` of a configuration stands for its path.
struct Area(tempfile::TempDir);

impl Area {
    fn new() -> Area {
        let area = Area(tempfile::tempdir().unwrap());
        fs::create_dir(area.path("source")).unwrap();
        area
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn config(&self, config: &str) -> PathBuf {
        let own = format!("{config}\n[daemon]\nstate = \"AT/state\"\nsocket = \"AT/daemon.sock\"\n");
        fs::write(self.path("config.toml"), own.replace("AT", self.0.path().to_str().unwrap())).unwrap();
        self.path("config.toml")
    }

    fn run(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new(lockstep());
        command.args(arguments).env("HOME", self.0.path()).env_remove("SSH_AUTH_SOCK").env_remove("LOCKSTEP_CONFIG");
        command.env_remove("STATE_DIRECTORY").env_remove("RUNTIME_DIRECTORY").output().unwrap()
    }

    fn check(&self, config: &str, further: &[&str]) -> Output {
        let file = self.config(config);
        self.run(&[&["config", "check", file.to_str().unwrap()], further].concat())
    }
}

const HERE: &str = "[[job]]\nname = \"one\"\nsource = \"AT/source\"\ntargets = [\"AT/target\"]\n";

#[test]
fn a_configuration_that_can_work_is_well() {
    let area = Area::new();
    ends(&area.check(HERE, &[]), 0, &["1 job with 1 target; nothing is wrong"]);
    let all = area.check(HERE, &["-v"]);
    ends(&all, 0, &["ok       job one: its source", "ok       daemon: its state directory"]);
    // Nothing was made.
    assert!(!area.path("target").exists() && !area.path("state").exists());
}

#[test]
fn what_cannot_work_is_named_with_the_way_out() {
    let area = Area::new();
    fs::write(area.path("file"), "").unwrap();
    let job = |name: &str, rest: &str| format!("[[job]]\nname = \"{name}\"\n{rest}\n");
    let here = "source = \"AT/source\"\n";
    let ports = |ports: &str| format!("[sftp_server]\ndata_ports = \"{ports}\"");
    let cases: [(String, i32, &str); 22] = [
        (job("x", &format!("{here}targets = [\"AT/t\"]\nrescan = \"0s\"")), 2, "'rescan' is how long to wait"),
        (job("x", &format!("{here}targets = [\"AT/t\"]\npoll = \"0s\"")), 2, "'poll' is how long to wait"),
        (job("x", &format!("{here}targets = [\"AT/t\"]\nsetle = \"2s\"")), 2, "did you mean 'settle'?"),
        (job("x", "source = \"AT/none\"\ntargets = [\"AT/t\"]"), 0, "is not there: nothing is sent"),
        (job("x", "source = \"AT/file\"\ntargets = [\"AT/t\"]"), 2, "is not a directory"),
        (job("x", &format!("{here}targets = [\"AT/source\"]")), 2, "lie in each other"),
        (job("x", &format!("{here}targets = [\"AT/source/below\"]")), 2, "lie in each other"),
        (job("x", &format!("{here}targets = [\"AT/source/b\"]\nexclude = [\"/b/\"]")), 2, "lie in each other"),
        (job("x", &format!("{here}targets = [\"AT\"]\ndelete = \"mirror\"")), 2, "lie in each other"),
        (job("x", &format!("{here}targets = [\"AT/t\", \"AT/./t\"]")), 2, "are the same directory"),
        (job("x", &format!("{here}targets = [\"AT/t\"]\ndelete = \"trash\"")), 0, "nothing is wrong"),
        (job("x", &format!("{here}targets = [\"AT/t\"]\non_failed = [\"AT/none\"]")), 2, "install it, or name another"),
        (job("x", &format!("{here}targets = [\"AT/file/t\"]")), 2, "name another directory, or move"),
        (job("x", &format!("{here}targets = [\"AT/t\"]\nmax_delete = \"5\"")), 0, "'max_delete' says nothing"),
        (job("x", &format!("{here}targets = [\"host:~root/t\"]")), 2, "names a home directory by its user"),
        (String::new(), 0, "neither [[job]] nor [serve]"),
        (ports("40000-40100"), 0, "nothing is wrong"),
        (ports("22-40000"), 0, "on those below 1024 root alone can listen"),
        (ports("0"), 2, "config.toml:2:14: 'data_ports': '0' has port 0"),
        (ports("40100-40000"), 2, "'40100-40000' ends before it begins"),
        (ports("40000-70000"), 2, "'40000-70000' has a port that there is not"),
        ("[sftp_server]\ndata_port = \"40000\"".into(), 2, "did you mean 'data_ports'?"),
    ];
    for (config, code, words) in cases {
        ends(&area.check(&config, &["-F", "none"]), code, &[words]);
    }
    // Of two jobs: what one mirrors the other's would be deleted of.
    let two = [HERE, &job("two", "source = \"AT/other\"\ntargets = [\"AT/target/below\"]")].concat();
    ends(&area.check(&two, &[]), 0, &["lie one in the other", "a directory of its own"]);
    ends(&area.check(&two, &["--strict"]), 2, &["lie one in the other"]);
    for delete in ["mirror", "trash"] {
        let two = two.replace("\"AT/target\"]", &format!("\"AT/target\"]\ndelete = \"{delete}\""));
        ends(&area.check(&two, &[]), 2, &["one of them takes away"]);
    }
}

#[test]
fn what_is_known_of_keys_and_hosts_is_said_without_connecting() {
    let area = Area::new();
    let hosts: Vec<String> = (1..=5).map(|number| format!("\"sync@gpu{number}:/data\"")).collect();
    let config = format!("[[job]]\nname = \"x\"\nsource = \"AT/source\"\ntargets = [{}]\n", hosts.join(", "));
    let none = ["-F", "none", "--known-hosts", "/nonexistent"];
    let output = area.check(&config, &none);
    ends(&output, 0, &["hosts sync@gpu1:22, sync@gpu2:22 and 3 more: there is no key", "lockstep keys scan-host gpu1"]);
    // Said once of all of them.
    assert_eq!(text(&output).matches("there is no key").count(), 1, "{}", text(&output));
    key(area.0.path(), "id");
    let id = area.path("id");
    let with = [&none[..], &["--identity", id.to_str().unwrap()]].concat();
    assert!(!text(&area.check(&config, &with)).contains("there is no key"));
    // Whoever can write the file of known hosts decides who is trusted.
    let public = fs::read_to_string(area.path("id.pub")).unwrap();
    let lines: String = (1..=5).map(|number| format!("gpu{number} {public}")).collect();
    fs::write(area.path("known"), lines).unwrap();
    let known = area.path("known").display().to_string();
    let both = ["-F", "none", "--identity", id.to_str().unwrap(), "--known-hosts", &known];
    ends(&area.check(&config, &both), 0, &["nothing is wrong"]);
    fs::set_permissions(&known, fs::Permissions::from_mode(0o666)).unwrap();
    ends(&area.check(&config, &both), 2, &["others may write it", "chmod go-w"]);
    fs::set_permissions(area.path("id"), fs::Permissions::from_mode(0o644)).unwrap();
    ends(&area.check(&config, &with), 2, &["others can read this private key", "chmod 600"]);
}

#[test]
fn the_server_is_looked_at_too() {
    let area = Area::new();
    fs::write(area.path("keys"), "").unwrap();
    let config = "[serve]\nlisten = \"127.0.0.1:2222\"\nhost_key = \"AT/state/key\"\n\
                  [[serve.user]]\nname = \"sync\"\nroot = \"AT/none\"\nauthorized_keys = \"AT/keys\"\n";
    ends(&area.check(config, &[]), 2, &["its directory is not there", "/none is not a directory"]);
    fs::create_dir(area.path("state")).unwrap();
    let good = config.replace("AT/none", "AT/source");
    ends(&area.check(&good, &["-v"]), 0, &["its keys, users and roots can be used"]);
    assert!(!area.path("state/key").exists(), "a key was made");
    fs::set_permissions(area.path("keys"), fs::Permissions::from_mode(0o666)).unwrap();
    ends(&area.check(&good, &[]), 0, &["user sync: ", "chmod go-w", "cannot log in"]);
}

#[test]
fn targets_are_logged_in_to_and_told_in_a_table() {
    let (area, served) = (Area::new(), Served::start("", ""));
    let login = |key: &str, known: &str| -> Vec<String> {
        let path = |name: &str| served.path(name).display().to_string();
        [
            "--connect",
            "-F",
            "none",
            "-P",
            &served.port.to_string(),
            "--identity",
            &path(key),
            "--known-hosts",
            &path(known),
        ]
        .map(str::to_owned)
        .into()
    };
    let config =
        format!("{HERE}[[job]]\nname = \"far\"\nsource = \"AT/source\"\ntargets = [\"sync@127.0.0.1:/data\"]\n");
    let run = |key: &str, known: &str, further: &[&str]| {
        let arguments = login(key, known);
        area.check(&config, &[&arguments.iter().map(String::as_str).collect::<Vec<_>>(), further].concat())
    };
    let output = run("sync.key", "known", &[]);
    ends(&output, 0, &["JOB", "far  sync@127.0.0.1:/data", "new", "lockstep", env!("CARGO_PKG_VERSION"), "here"]);
    let json = run("sync.key", "known", &["--json"]);
    let found: Value = serde_json::from_slice(&json.stdout).unwrap();
    let far = &found["targets"][1];
    assert_eq!(
        (&far["job"], &far["way"], &far["there"]),
        (&"far".into(), &"lockstep".into(), &false.into()),
        "{found}"
    );
    assert!(far["free_bytes"].as_u64().is_some_and(|free| free > 0), "{found}");
    // An unknown host is not trusted; that weighs most.
    ends(&run("sync.key", "none", &[]), 3, &["unknown host key"]);
}

#[test]
fn a_target_that_a_run_works_on_is_in_use_and_not_wrong() {
    let area = Area::new();
    fs::create_dir_all(area.path("target/.lockstep")).unwrap();
    fs::set_permissions(area.path("target/.lockstep"), fs::Permissions::from_mode(0o700)).unwrap();
    let root = lockstep::root::Root::open(&area.path("target")).unwrap();
    let lock = lockstep::staging::RootLock::take(&root, "ana@gpu01", std::time::Duration::ZERO, &|| false).unwrap();
    ends(&area.check(HERE, &["--connect"]), 0, &["in use", "by ana@gpu01"]);
    drop(lock);
    let output = area.check(HERE, &["--connect"]);
    ends(&output, 0, &["ready"]);
    // The lock was given back.
    drop(lockstep::staging::RootLock::take(&root, "bo@gpu02", std::time::Duration::ZERO, &|| false).unwrap());
    fs::remove_dir_all(area.path("target")).unwrap();
    fs::write(area.path("target"), "").unwrap();
    ends(&area.check(HERE, &["--connect"]), 2, &["is not a directory"]);
}

#[test]
fn what_is_shown_is_a_configuration_of_the_same_meaning() {
    let area = Area::new();
    for example in ["sender", "receiver", "policy-driving", "policy-medical", "policy-research"] {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("config/{example}.toml"));
        let copy = area.path("copy.toml");
        fs::copy(file, &copy).unwrap();
        fs::set_permissions(&copy, fs::Permissions::from_mode(0o600)).unwrap();
        let shown = area.run(&["config", "show", copy.to_str().unwrap()]);
        ends(&shown, 0, &[]);
        let again = area.path("again.toml");
        fs::write(&again, &shown.stdout).unwrap();
        let twice = area.run(&["config", "show", again.to_str().unwrap()]);
        let below = |text: &[u8]| String::from_utf8(text.to_vec()).unwrap().split_once('\n').unwrap().1.to_owned();
        assert_eq!(below(&shown.stdout), below(&twice.stdout), "{example}");
        let json = area.run(&["config", "show", "--json", copy.to_str().unwrap()]);
        let found: Value = serde_json::from_slice(&json.stdout).unwrap();
        let expected: Value = toml::from_str(&String::from_utf8(shown.stdout).unwrap()).unwrap();
        assert_eq!(found, expected, "{example}");
    }
    let file = area.config(HERE);
    let shown = area.run(&["config", "show", file.to_str().unwrap()]);
    ends(&shown, 0, &["settle = \"2s\"", "rescan = \"1h\"", "quorum = 1", "watch = \"auto\"", "ready = \"settled\""]);
}

#[test]
fn the_doctor_says_what_of_the_machine_could_hurt() {
    let area = Area::new();
    fs::create_dir_all(area.path("source/a/b")).unwrap();
    fs::create_dir(area.path("source/left")).unwrap();
    let file = area.config(&format!("{HERE}unit = \"unit-*/\"\nexclude = [\"left/\"]\n"));
    let doctor = |further: &[&str]| area.run(&[&["doctor", "--config", file.to_str().unwrap()], further].concat());
    let output = doctor(&["--json"]);
    let found: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{}", text(&output)));
    assert_eq!(found["format"], "lockstep-doctor 1");
    let findings = found["findings"].as_array().unwrap();
    let about = |name: &str| {
        let found = findings.iter().find(|finding| finding["about"].as_str().unwrap().contains(name));
        found.unwrap_or_else(|| panic!("nothing about {name}: {found:?}"))
    };
    assert_eq!(about("source of job one")["says"], "3 directories are to be watched");
    for name in ["kernel", "open files", "umask", "clock", "inotify watches", "ssh", "rights", "/target", "/state"] {
        assert!(!about(name)["says"].as_str().unwrap().is_empty(), "{name}");
    }
    assert!(fs::read_dir(area.0.path()).unwrap().count() == 2, "something was left behind");
    ends(&doctor(&[]), 0, &["kernel: ", "clock: "]);
    // Without any configuration the machine alone is looked at; one that is named has to be there.
    ends(&area.run(&["doctor", "--config", "/nonexistent"]), 2, &["cannot read the configuration"]);
    if !Path::new("/etc/lockstep/config.toml").exists() {
        ends(&area.run(&["doctor"]), 0, &["kernel: "]);
    }
}

#[test]
fn the_doctor_knows_file_systems_that_end_with_the_machine() {
    let area = Area::new();
    let memory = tempfile::Builder::new().tempdir_in("/dev/shm").unwrap();
    let target = memory.path().join("target");
    let file = area.config(&HERE.replace("AT/target", target.to_str().unwrap()));
    let named = file.to_str().unwrap();
    ends(&area.run(&["doctor", "--config", named]), 0, &["warning", "on tmpfs: what was brought there is gone"]);
    ends(&area.run(&["doctor", "--config", named, "--strict"]), 4, &["on tmpfs"]);
}

#[test]
fn ports_for_data_are_shown_as_they_are_named() {
    let area = Area::new();
    let file = area.config("[sftp_server]\ndata_ports = \"40000\"");
    let shown = |more: &[&str]| area.run(&[&["config", "show", file.to_str().unwrap()], more].concat());
    ends(&shown(&[]), 0, &["[sftp_server]\ndata_ports = \"40000\"\n"]);
    ends(&shown(&["--json"]), 0, &["\"data_ports\": \"40000\""]);
    ends(&area.check("[sftp_server]\ndata_ports = \"40000\"", &["-v"]), 0, &["may listen on one of the ports 40000"]);
    // An option that is none is refused before anything is served.
    let wrong = area.run(&["sftp-server", "--data-ports", "9-7"]);
    ends(&wrong, 2, &["--data-ports", "'9-7' ends before it begins: the lower port comes first"]);
    // Where nothing is said nothing is shown.
    let file = area.config(HERE);
    assert!(!text(&area.run(&["config", "show", file.to_str().unwrap()])).contains("sftp_server"));
}
