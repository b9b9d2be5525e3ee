//! The process of each connection of `lockstep serve`, and what it cannot do: seen from outside, and by what it tries itself.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

use lockstep::server::confine::trial::Trial;
use rustix::process::{Pid, Signal, kill_process};

use crate::kit::served::{Held, Served, user, write};
use crate::kit::{ends, noise, text as said, until};

/// A line of proc(5)'s status.
fn status(process: u32, name: &str) -> String {
    let text = fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    line.unwrap_or_else(|| panic!("{name} is not in {text}")).trim().to_owned()
}

/// The process of a client that has a session.
fn of(served: &Served, held: &mut Held) -> u32 {
    let before = served.connections();
    assert!(held.speaks(), "{}", served.log());
    let after = served.connections();
    let mut new: Vec<u32> = after.into_iter().filter(|process| !before.contains(process)).collect();
    // It may have been there before it could speak.
    if new.is_empty() {
        new = before;
    }
    assert_eq!(new.len(), 1, "{new:?}");
    new[0]
}

fn kill(process: u32) {
    kill_process(Pid::from_raw(process.try_into().unwrap()).unwrap(), Signal::KILL).unwrap();
}

/// What this kernel has, as the server says it.
fn has(served: &Served, what: &str) -> bool {
    let log = served.log();
    let line = log.lines().find(|line| line.contains("sessions in processes of their own")).unwrap();
    line.contains(what)
}

#[test]
fn each_connection_has_a_process_that_can_do_nothing_but_serve_its_root() {
    let served = Served::start("", "");
    let mut held = served.hold("sync", &[]);
    let process = of(&served, &mut held);
    assert_eq!(status(process, "NoNewPrivs"), "1");
    assert_eq!(status(process, "Seccomp"), "2");
    // CAP_CHOWN, CAP_DAC_OVERRIDE, CAP_FOWNER, CAP_FSETID at most.
    for set in ["CapEff", "CapPrm", "CapInh", "CapAmb"] {
        let held = u64::from_str_radix(&status(process, set), 16).unwrap();
        assert_eq!(held & !0b1_1011, 0, "{set}: {held:x}");
    }
    if rustix::process::geteuid().is_root() {
        assert_eq!(u64::from_str_radix(&status(process, "CapEff"), 16).unwrap(), 0b1_1011);
        assert_eq!(u64::from_str_radix(&status(process, "CapBnd"), 16).unwrap(), 0);
    }
    served.wait_for("logged in");
    let log = served.log();
    let line = log.lines().find(|line| line.contains("logged in")).unwrap();
    assert!(line.contains("own process") && line.contains("seccomp"), "{line}");
    assert_eq!(line.contains("Landlock "), has(&served, "Landlock"), "{line}");
    // Nothing is open there but what it works with: no socket that listens, no file of the server.
    let open = fs::read_dir(format!("/proc/{process}/fd")).unwrap().flatten();
    let open: Vec<String> =
        open.filter_map(|fd| fs::read_link(fd.path()).ok()).map(|to| to.display().to_string()).collect();
    for name in ["config.toml", "/host", "/log", "sync.keys", "record"] {
        assert!(!open.iter().any(|open| open.ends_with(name)), "{name}: {open:?}");
    }
    let listens = fs::read_to_string(format!("/proc/{process}/net/tcp")).unwrap();
    let of_listener = |line: &&str| line.split_whitespace().nth(3) == Some("0A");
    let inodes = listens.lines().filter(of_listener).filter_map(|line| line.split_whitespace().nth(9));
    for inode in inodes {
        assert!(!open.contains(&format!("socket:[{inode}]")), "{open:?}");
    }
    // The environment says nothing of the server.
    let environment = fs::read(format!("/proc/{process}/environ")).unwrap_or_default();
    assert!(!String::from_utf8_lossy(&environment).contains("HOME="), "{}", String::from_utf8_lossy(&environment));
    drop(held);
    until("the end of its process", || served.connections().is_empty());
}

#[test]
fn h32_a_session_whose_process_is_killed_ends_alone() {
    let served = Served::with(
        &["sync", "other"],
        |at| {
            fs::create_dir(at.join("record")).unwrap();
            format!("audit = '{}'", at.join("record").display())
        },
        "",
        |at| user(at, "sync", "") + &user(at, "other", ""),
    );
    let mut held = served.hold("sync", &[]);
    let doomed = of(&served, &mut held);
    fs::create_dir(served.path("source")).unwrap();
    let content: Vec<u8> = (0..60_000_000_u32).map(|number| (number.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    fs::write(served.path("source/weights"), &content).unwrap();
    let arguments = ["push", "source", "other@127.0.0.1:/m", "--bwlimit", "40M"];
    std::thread::scope(|scope| {
        let pushing = scope.spawn(|| served.lockstep(&arguments, "other"));
        until("the push to be under way", || {
            served.connections().len() > 1 && served.path("other/.m.lockstep").exists()
                || served.path("other/m").exists()
        });
        kill(doomed);
        assert!(!held.ended().is_empty());
        served.wait_for("the process of a connection ended before it");
        let pushed = pushing.join().unwrap();
        assert!(pushed.status.success(), "{}", said(&pushed));
    });
    assert!(fs::read(served.path("other/m/weights")).unwrap() == content);
    let log = served.log();
    let ended = |words: &str| log.lines().any(|line| line.contains(words) && line.contains("user=\"sync\""));
    assert!(
        ended("connection ended") && ended("session ended") && log.contains("its process was ended by signal 9"),
        "{log}"
    );
    // Its places are free, its end is recorded, and the next one comes in.
    assert!(served.sftp("sync", "sync", "ls\n").status.success());
    let record = fs::read_to_string(served.path("record/.lockstep/audit.jsonl")).unwrap();
    assert!(record.contains("its process is gone"), "{record}");
}

#[test]
fn h32_the_connections_of_a_server_that_is_killed_end_with_it() {
    let served = Served::start("", "");
    let mut held = served.hold("sync", &[]);
    let process = of(&served, &mut held);
    served.signal(Signal::KILL);
    assert!(!held.ended().is_empty());
    until("the end of its process", || !Path::new(&format!("/proc/{process}")).exists());
}

#[test]
fn h43_a_process_that_does_not_end_is_killed() {
    let served = Served::start("", "idle_timeout = '1s'");
    let mut held = served.hold("sync", &[]);
    let process = of(&served, &mut held);
    kill_process(Pid::from_raw(process.try_into().unwrap()).unwrap(), Signal::STOP).unwrap();
    // It neither says how long it has been quiet nor goes.
    until("the end of its process", || !Path::new(&format!("/proc/{process}")).exists());
    served.wait_for("it did not end when it had to");
    drop(held);
    assert!(served.sftp("sync", "sync", "ls\n").status.success());
}

/// Runs the trial as a process of its own.
fn tried(at: &Path, more: &[&str]) -> (Output, Option<Trial>) {
    let output = Command::new(env!("CARGO_BIN_EXE_lockstep"))
        .arg("try-confinement")
        .arg(at.join("root"))
        .args(more)
        .output()
        .unwrap();
    let trial = serde_json::from_slice(&output.stdout).ok();
    (output, trial)
}

fn place() -> tempfile::TempDir {
    let at = tempfile::tempdir().unwrap();
    fs::set_permissions(at.path(), fs::Permissions::from_mode(0o777)).unwrap();
    fs::create_dir(at.path().join("root")).unwrap();
    fs::set_permissions(at.path().join("root"), fs::Permissions::from_mode(0o777)).unwrap();
    for name in ["beside", "root/there"] {
        fs::write(at.path().join(name), "x").unwrap();
        fs::set_permissions(at.path().join(name), fs::Permissions::from_mode(0o666)).unwrap();
    }
    at
}

#[test]
fn h47_a_confined_process_opens_nothing_outside_and_starts_nothing() {
    for (more, capabilities) in [(&[][..], 4), (&["--read-only"], 1)] {
        let at = place();
        let (output, trial) = tried(at.path(), more);
        ends(&output, 0, &[]);
        let trial = trial.unwrap();
        assert_eq!((trial.could, trial.could_not), (Vec::<String>::new(), Vec::new()), "{more:?}");
        assert!(trial.confinement.seccomp && trial.confinement.landlock >= 2, "{:?}", trial.confinement);
        if rustix::process::geteuid().is_root() {
            assert_eq!(trial.confinement.capabilities.len(), capabilities, "{:?}", trial.confinement);
        }
        assert_eq!(fs::read_to_string(at.path().join("beside")).unwrap(), "x");
        assert!(!at.path().join("trial").exists());
    }
}

#[test]
fn a_process_with_several_threads_is_not_confined_but_refused() {
    // This one has several.
    let at = place();
    let root = at.path().join("root");
    let wanted = lockstep::server::confine::Wanted { root: &root, read_only: false, identity: None, require: false };
    let (go, going) = std::sync::mpsc::channel::<()>();
    let other = std::thread::spawn(move || going.recv());
    let error = lockstep::server::confine::enter(&wanted).unwrap_err().to_string();
    assert!(error.contains("threads, and only one can be confined"), "{error}");
    drop(go);
    assert!(other.join().unwrap().is_err());
    assert!(fs::read("/etc/passwd").is_ok());
}

#[test]
fn run_as_makes_files_of_that_user_and_of_nobody_else() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let nobody = uzers::get_user_by_name("nobody").unwrap();
    let served = Served::with(
        &["sync", "own"],
        |at| {
            fs::set_permissions(at, fs::Permissions::from_mode(0o755)).unwrap();
            String::new()
        },
        "",
        |at| user(at, "sync", "run_as = 'nobody'") + &user(at, "own", ""),
    );
    std::os::unix::fs::chown(served.path("sync"), Some(nobody.uid()), Some(nobody.primary_group_id())).unwrap();
    let mut held = served.hold("sync", &[]);
    let process = of(&served, &mut held);
    let (uid, gid) = (nobody.uid().to_string(), nobody.primary_group_id().to_string());
    assert_eq!(status(process, "Uid"), [&*uid; 4].join("\t"));
    assert_eq!(status(process, "Gid"), [&*gid; 4].join("\t"));
    assert_eq!(status(process, "Groups"), gid);
    for set in ["CapEff", "CapPrm", "CapInh", "CapAmb", "CapBnd"] {
        assert_eq!(status(process, set), "0000000000000000", "{set}");
    }
    served.wait_for("user nobody, no capabilities");
    fs::create_dir(served.path("source")).unwrap();
    fs::write(served.path("source/weights"), "w").unwrap();
    for name in ["sync", "own"] {
        let pushed = served.lockstep(&["push", "source", &format!("{name}@127.0.0.1:/m")], name);
        assert!(pushed.status.success(), "{}\n{}", said(&pushed), served.log());
    }
    let put = served.sftp("sync", "sync", "put source/weights plain\n");
    assert!(put.status.success(), "{}", said(&put));
    let owner = |path: &str| fs::symlink_metadata(served.path(path)).unwrap().uid();
    for path in ["sync/m", "sync/m/weights", "sync/m/.lockstep", "sync/m/.lockstep/manifest", "sync/plain"] {
        assert_eq!(owner(path), nobody.uid(), "{path}");
    }
    assert_eq!(owner("own/m/weights"), 0);
    // What the user may not read of its own root is not read, whoever started the server.
    fs::write(served.path("sync/of-root"), "x").unwrap();
    fs::set_permissions(served.path("sync/of-root"), fs::Permissions::from_mode(0o600)).unwrap();
    assert!(!served.sftp("sync", "sync", "get of-root\n").status.success());
    // Another user, from the next login on.
    served.reload("run_as = 'nobody'", "run_as = 'daemon'");
    assert!(held.ended().contains("the user's settings have changed"));
}

#[test]
fn run_as_what_cannot_be_ends_the_start_and_says_why() {
    let at = tempfile::tempdir().unwrap();
    fs::create_dir(at.path().join("u")).unwrap();
    write(&at.path().join("u.keys"), "");
    let start = |more: &str, policy: &str| {
        let head = format!("[serve]\nlisten = '127.0.0.1:0'\nhost_key = '{}/host'\n", at.path().display());
        write(&at.path().join("config"), &format!("{policy}{head}{}", user(at.path(), "u", more)));
        let mut start = Command::new("timeout");
        start.args(["20", env!("CARGO_BIN_EXE_lockstep"), "serve", "--config"]).arg(at.path().join("config"));
        start.output().unwrap()
    };
    let owner = "[[policy.p.rule]]\nmatch = '*.bin'\nowner = 'root'\n";
    ends(&start("run_as = 'no-such-user'", ""), 2, &["user u: there is no user 'no-such-user'", "run_as"]);
    ends(&start("run_as = 'root'", ""), 2, &["takes nothing away"]);
    ends(&start("run_as = 'nobody'\npolicy = 'p'", owner), 2, &["rule 1", "'*.bin'", "owner 'root'"]);
    if !rustix::process::geteuid().is_root() {
        ends(&start("run_as = 'nobody'", ""), 2, &["CAP_SETUID"]);
    }
}

/// As user and group 65534 with group 1 besides, and these capabilities.
fn with_a_group(capabilities: &str) -> Command {
    let mut setpriv = Command::new("setpriv");
    setpriv.args(["--reuid", "65534", "--regid", "65534", "--groups", "65534,1"]);
    if !capabilities.is_empty() {
        setpriv.args(["--inh-caps", capabilities, "--ambient-caps", capabilities]);
    }
    setpriv.args(["timeout", "20", env!("CARGO_BIN_EXE_lockstep")]);
    setpriv
}

#[test]
fn run_as_of_the_servers_own_account_leaves_no_groups_of_the_server() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let done = |command: &mut Command| command.output().expect("setpriv is not installed: Debian package util-linux");
    // What is the group's alone is read as long as the process is in it.
    let at = place();
    let root = at.path().join("root");
    std::os::unix::fs::chown(&root, Some(0), Some(1)).unwrap();
    fs::set_permissions(&root, fs::Permissions::from_mode(0o770)).unwrap();
    let attempt = |capabilities: &str| {
        let mut command = with_a_group(capabilities);
        done(command.arg("try-confinement").arg(&root).args(["--run-as", "nobody"]))
    };
    let tried: Trial = serde_json::from_slice(&attempt("+setuid,+setgid").stdout).unwrap();
    assert!(tried.could_not.iter().any(|what| what == "read its root"), "{tried:?}");
    ends(&attempt(""), 4, &["the groups of run_as"]);
    // The server says so before anybody comes.
    write(&at.path().join("u.keys"), "");
    fs::create_dir(at.path().join("u")).unwrap();
    fs::create_dir(at.path().join("own")).unwrap();
    let head = format!("[serve]\nlisten = '127.0.0.1:0'\nhost_key = '{}/own/host'\n", at.path().display());
    write(&at.path().join("config"), &format!("{head}{}", user(at.path(), "u", "run_as = 'nobody'")));
    fs::set_permissions(at.path(), fs::Permissions::from_mode(0o755)).unwrap();
    for name in ["config", "u.keys", "u", "own"] {
        std::os::unix::fs::chown(at.path().join(name), Some(65534), Some(65534)).unwrap();
    }
    let started = done(with_a_group("").args(["serve", "--config"]).arg(at.path().join("config")));
    ends(&started, 2, &["user u: run_as = 'nobody'", "groups that 'nobody' is not in (1)"]);
}

#[test]
fn names_are_looked_up_for_who_cannot() {
    let served = Served::start("", "");
    fs::write(served.path("sync/file"), "x").unwrap();
    // By the longname of a listing, and by the extension for names.
    let listed = served.sftp("sync", "sync", "ls -l\n");
    let owner = fs::metadata(served.path("sync/file")).unwrap().uid();
    let name = uzers::get_user_by_uid(owner).unwrap().name().to_string_lossy().into_owned();
    assert!(said(&listed).lines().any(|line| line.contains(&name) && line.ends_with("file")), "{}", said(&listed));
}

#[test]
fn nothing_is_started_by_hand() {
    let output =
        Command::new(env!("CARGO_BIN_EXE_lockstep")).args(["serve-connection", "127.0.0.1:1", "1"]).output().unwrap();
    ends(&output, 2, &["it is started by 'lockstep serve'"]);
    // Not among the commands that people see.
    let help = Command::new(env!("CARGO_BIN_EXE_lockstep")).arg("--help").output().unwrap();
    assert!(!said(&help).contains("serve-connection") && !said(&help).contains("try-confinement"), "{}", said(&help));
}

#[test]
fn h43_connections_before_the_login_are_no_more_processes_than_the_limit() {
    let served = Served::start("", "unauthenticated = 3");
    let streams: Vec<_> = (0..20).map(|_| std::net::TcpStream::connect(("127.0.0.1", served.port)).unwrap()).collect();
    served.wait_for("too many connections that have not logged in");
    until("the processes", || served.connections().len() == 3);
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(served.connections().len(), 3);
    drop(streams);
    until("their end", || served.connections().is_empty());
}

#[test]
fn further_connections_of_a_run_carry_its_content_to_the_process_that_has_it() {
    let served = Served::start("", "");
    fs::create_dir(served.path("source")).unwrap();
    let content = |number: u64| noise(number, 12_000_000);
    for number in 0..8 {
        fs::write(served.path(&format!("source/{number}")), content(number)).unwrap();
    }
    let pushed = served.lockstep(&["push", "source", "sync@127.0.0.1:/m", "--transfers", "4"], "sync");
    assert!(pushed.status.success(), "{}", said(&pushed));
    let pulled = served.lockstep(&["pull", "sync@127.0.0.1:/m", "back", "--transfers", "4"], "sync");
    assert!(pulled.status.success(), "{}", said(&pulled));
    for number in 0..8 {
        for copy in ["sync/m", "back"] {
            assert!(fs::read(served.path(&format!("{copy}/{number}"))).unwrap() == content(number), "{copy}/{number}");
        }
    }
    until("the ends", || served.connections().is_empty());
    let log = served.log();
    let large = |field: &str| {
        let of = |line: &str| line.split_once(field)?.1.split(' ').next()?.parse::<u64>().ok();
        log.lines().filter_map(of).filter(|&bytes| bytes > 4_000_000).count()
    };
    assert!(large("received=") > 1 && large("sent=") > 1, "{log}");
}
