//! The daemon: what changes arrives at every target by itself, and what goes wrong at one holds up no other.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use serde_json::{Value, json};

use crate::kit::area::lockstep;
use crate::kit::served::Served;
use crate::kit::{done, ends, text, until};

/// A daemon in an area of its own; it ends with this.
pub(crate) struct Running {
    at: tempfile::TempDir,
    child: Option<Child>,
    /// Further arguments of its command.
    arguments: Vec<String>,
}

impl Running {
    /// With a configuration in which `AT` stands for the area.
    pub(crate) fn start(config: &str) -> Running {
        Running::prepared(config, |_| {})
    }

    /// With a login at a server, which the configuration calls `sync@SERVER`.
    pub(crate) fn at_server(served: &Served, config: &str) -> Running {
        Running::prepared_at_server(served, config, |_| {})
    }

    fn prepared_at_server(served: &Served, config: &str, prepare: impl FnOnce(&Path)) -> Running {
        let login =
            ["-P".into(), served.port.to_string(), "--identity".into(), served.path("sync.key").display().to_string()];
        let known = ["--known-hosts".into(), served.path("known").display().to_string(), "-F".into(), "none".into()];
        let arguments = login.into_iter().chain(known).collect();
        Running::new(&config.replace("SERVER", "127.0.0.1"), prepare, arguments)
    }

    /// The same in an area that something is done to first.
    pub(crate) fn prepared(config: &str, prepare: impl FnOnce(&Path)) -> Running {
        Running::new(config, prepare, Vec::new())
    }

    pub(crate) fn new(config: &str, prepare: impl FnOnce(&Path), arguments: Vec<String>) -> Running {
        let at = tempfile::tempdir().unwrap();
        let mut running = Running { at, child: None, arguments };
        fs::create_dir(running.path("source")).unwrap();
        prepare(running.at.path());
        running.configure(config);
        running.launch();
        running
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.at.path().join(name)
    }

    pub(crate) fn configure(&self, config: &str) {
        let own = format!("[daemon]\nstate = \"AT/state\"\nsocket = \"AT/daemon.sock\"\n{config}");
        fs::write(self.path("config.toml"), own.replace("AT", self.at.path().to_str().unwrap())).unwrap();
    }

    pub(crate) fn launch(&mut self) {
        self.launch_by(self.command(&[]));
    }

    /// After it was killed.
    pub(crate) fn launch_again(&mut self) {
        self.child.take().unwrap().wait().unwrap();
        self.launch();
    }

    /// The same by a command that becomes the daemon, with its arguments.
    pub(crate) fn launch_by(&mut self, mut command: Command) {
        let log = fs::File::options().create(true).append(true).open(self.path("log")).unwrap();
        command.args(["daemon", "--config"]).arg(self.path("config.toml")).args(&self.arguments);
        let child = command.stderr(log).stdout(Stdio::null()).spawn().unwrap();
        self.child = Some(child);
        until("the daemon to answer", || self.path("daemon.sock").exists() && self.ask("status").is_some());
    }

    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(lockstep());
        command.args(arguments).env("HOME", self.at.path()).env_remove("SSH_AUTH_SOCK").env_remove("XDG_STATE_HOME");
        command
    }

    pub(crate) fn jobs(&self, arguments: &[&str]) -> Output {
        let mut command = self.command(&["jobs"]);
        command.args(arguments).arg("--socket").arg(self.path("daemon.sock")).output().unwrap()
    }

    fn ask(&self, request: &str) -> Option<Value> {
        use std::io::{BufRead as _, Write as _};
        let mut stream = std::os::unix::net::UnixStream::connect(self.path("daemon.sock")).ok()?;
        stream.write_all(format!("{}\n", json!({ "request": request })).as_bytes()).ok()?;
        let mut line = String::new();
        std::io::BufReader::new(stream).read_line(&mut line).ok()?;
        serde_json::from_str(&line).ok()
    }

    pub(crate) fn status(&self) -> Value {
        self.ask("status").unwrap()["status"].clone()
    }

    /// The state of a target of the first job.
    pub(crate) fn target(&self, number: usize) -> Value {
        self.status()["jobs"][0]["targets"][number].clone()
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.as_ref().unwrap().id()
    }

    pub(crate) fn signal(&self, signal: &str) {
        let pid = self.pid().to_string();
        assert!(Command::new("kill").args([signal, &pid]).status().unwrap().success());
    }

    /// Ends it where it runs under strace, which passes no signal on.
    pub(crate) fn stop_traced(&mut self) {
        let pid = self.pid();
        let traced = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
        assert!(Command::new("kill").args(traced.split_whitespace()).status().unwrap().success());
        self.child.take().unwrap().wait().unwrap();
    }

    /// Ends it as systemd does, and gives its exit status.
    pub(crate) fn stop(&mut self) -> Option<i32> {
        self.signal("-TERM");
        self.child.take().unwrap().wait().unwrap().code()
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap()
    }
}

impl Drop for Running {
    // A test that failed says what the daemon said.
    #[allow(clippy::print_stderr)]
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
            if std::thread::panicking() {
                eprintln!("{}", self.log());
            }
        }
    }
}

pub(crate) fn holds(path: &Path, content: &str) -> bool {
    fs::read_to_string(path).is_ok_and(|found| found == content)
}

const TWO: &str = r#"
[[job]]
name = "data"
source = "AT/source"
targets = ["AT/one", "AT/two"]
settle = "0s"
poll = "100ms"
retry_max = "1s"
"#;

#[test]
fn a_second_daemon_takes_no_socket_away_and_no_file() {
    let job = "[[job]]\nname = \"data\"\nsource = \"AT/source\"\ntargets = [\"AT/there\"]\n";
    let running = Running::start(job);
    let second = running.path("second.toml");
    let sock = running.path("daemon.sock");
    for (socket, why) in [(sock.clone(), "another daemon listens there"), (running.path("config.toml"), "is no socket")]
    {
        let (state, socket) = (running.path("other"), socket.display().to_string());
        let job = job.replace("AT", running.at.path().to_str().unwrap());
        fs::write(&second, format!("[daemon]\nstate = \"{}\"\nsocket = \"{socket}\"\n{job}", state.display())).unwrap();
        let output = running.command(&["daemon", "--config"]).arg(&second).output().unwrap();
        assert!(!output.status.success() && text(&output).contains(why), "{}", text(&output));
    }
    assert!(running.ask("status").is_some());
    assert!(fs::read_to_string(running.path("config.toml")).unwrap().contains("[daemon]"));
    assert_eq!(fs::metadata(&sock).unwrap().permissions().mode() & 0o777, 0o600);
}

#[test]
fn s28_what_changes_arrives_at_every_target_and_is_good() {
    let mut running = Running::start(TWO);
    fs::create_dir(running.path("source/d")).unwrap();
    fs::write(running.path("source/d/a"), "first").unwrap();
    for target in ["one", "two"] {
        until("the first file", || holds(&running.path(target).join("d/a"), "first"));
    }
    fs::write(running.path("source/d/a"), "second, and longer").unwrap();
    fs::write(running.path("source/b"), "new").unwrap();
    for target in ["one", "two"] {
        until("the change", || holds(&running.path(target).join("d/a"), "second, and longer"));
        until("the new file", || holds(&running.path(target).join("b"), "new"));
        until("it to be idle", || running.target(usize::from(target == "two"))["state"] == "idle");
        // A check that meets one of the runs that look again says that it is going on.
        let check = || running.command(&["check"]).arg(running.path(target)).output().unwrap();
        until("it to be good", || check().status.success());
    }
    // Deleting is never the default.
    fs::remove_file(running.path("source/b")).unwrap();
    fs::write(running.path("source/c"), "later").unwrap();
    until("what came after it", || holds(&running.path("one/c"), "later"));
    assert!(running.path("one/b").exists());
    let status = running.status();
    assert_eq!(status["format"], "lockstep-status 1");
    assert!(status["recent"].as_array().unwrap().len() >= 2, "{status}");
    assert_eq!(running.stop(), Some(0), "{}", running.log());
    assert!(!running.path("daemon.sock").exists());
}

#[test]
fn h30_a_target_that_fails_holds_up_no_other_and_catches_up() {
    // A file where the directory should be: nothing can be published there.
    let running = Running::prepared(TWO, |at| fs::write(at.join("two"), "in the way").unwrap());
    fs::write(running.path("source/a"), "content").unwrap();
    until("the good target", || holds(&running.path("one/a"), "content"));
    until("the failure to be told", || running.target(1)["last_error"].is_object());
    let target = running.target(1);
    assert!(target["failures"].as_u64().unwrap() >= 1, "{target}");
    assert!(target["last_error"]["message"].as_str().unwrap().contains("two"), "{target}");
    assert!(target["lag_units"].as_u64().unwrap() >= 1, "{target}");
    assert_eq!(running.target(0)["failures"], 0);
    fs::remove_file(running.path("two")).unwrap();
    until("the other target to catch up", || holds(&running.path("two/a"), "content"));
    until("it to be idle", || running.target(1)["state"] == "idle" && running.target(1)["last_error"].is_null());
}

#[test]
fn h38_a_source_that_is_gone_halts_the_job_and_deletes_nothing() {
    let running = Running::start(&format!("{TWO}delete = \"mirror\"\n"));
    fs::write(running.path("source/a"), "content").unwrap();
    until("the first file", || holds(&running.path("one/a"), "content") && holds(&running.path("two/a"), "content"));
    fs::rename(running.path("source"), running.path("elsewhere")).unwrap();
    until("the job to halt", || running.status()["jobs"][0]["halted"].is_object());
    // An empty directory in its place, as a file system that is not mounted.
    fs::create_dir(running.path("source")).unwrap();
    until("the refusal", || {
        running.target(0)["last_error"]["message"].as_str().is_some_and(|told| told.contains("safety"))
    });
    assert!(holds(&running.path("one/a"), "content") && holds(&running.path("two/a"), "content"));
    fs::remove_dir(running.path("source")).unwrap();
    fs::rename(running.path("elsewhere"), running.path("source")).unwrap();
    fs::write(running.path("source/b"), "more").unwrap();
    until("it to go on", || holds(&running.path("one/b"), "more"));
    assert!(running.status()["jobs"][0]["halted"].is_null());
}

#[test]
fn jobs_are_paused_and_resumed_and_a_bad_configuration_is_not_taken() {
    let mut running = Running::start(TWO);
    fs::write(running.path("source/a"), "content").unwrap();
    until("the first file", || holds(&running.path("one/a"), "content"));
    ends(&running.jobs(&["pause", "dta"]), 2, &["there is no job 'dta'", "data"]);
    done(&running.jobs(&["pause", "data"]));
    until("it to be paused", || running.target(0)["state"] == "paused" && running.target(1)["state"] == "paused");
    fs::write(running.path("source/b"), "later").unwrap();
    std::thread::sleep(std::time::Duration::from_millis(400));
    assert!(!running.path("one/b").exists());
    done(&running.jobs(&["resume"]));
    until("it to go on", || holds(&running.path("one/b"), "later"));
    // The old configuration stays while the new one is wrong, and says so.
    running.configure(&TWO.replace("settle", "setle"));
    running.signal("-HUP");
    until("the error", || running.status()["config_error"].is_string());
    assert!(running.status()["config_error"].as_str().unwrap().contains("setle"));
    fs::write(running.path("source/c"), "still").unwrap();
    until("it to work on", || holds(&running.path("one/c"), "still"));
    running.configure(&TWO.replace(", \"AT/two\"", ", \"AT/three\""));
    done(&running.jobs(&["reload"]));
    until("the new target", || holds(&running.path("three/c"), "still"));
    assert!(running.status()["config_error"].is_null());
    // A pause is over when somebody says so: a change of the job is none, nor a restart.
    done(&running.jobs(&["pause"]));
    let paused =
        |running: &Running| running.status()["jobs"][0]["paused"] == true && running.target(0)["state"] == "paused";
    running.configure(&format!("{TWO}bandwidth = \"1GB/s\"\n"));
    done(&running.jobs(&["reload"]));
    until("the new configuration", || running.path("two").exists() && paused(&running));
    assert_eq!(running.stop(), Some(0));
    running.launch();
    until("it to be paused", || paused(&running));
    fs::write(running.path("source/d"), "at last").unwrap();
    std::thread::sleep(std::time::Duration::from_millis(400));
    assert!(!running.path("one/d").exists());
    done(&running.jobs(&["resume"]));
    until("it to go on", || holds(&running.path("one/d"), "at last"));
}

#[test]
fn a_second_daemon_on_the_same_state_is_refused_and_a_killed_one_leaves_nothing_in_the_way() {
    let mut running = Running::start(TWO);
    let second = running.command(&["daemon", "--config"]).arg(running.path("config.toml")).output().unwrap();
    ends(&second, 75, &["another daemon (process"]);
    fs::write(running.path("source/a"), "content").unwrap();
    until("the first file", || holds(&running.path("one/a"), "content"));
    running.signal("-KILL");
    running.child.take().unwrap().wait().unwrap();
    fs::write(running.path("source/b"), "after").unwrap();
    running.launch();
    until("what changed meanwhile", || {
        holds(&running.path("one/b"), "after") && holds(&running.path("two/b"), "after")
    });
    assert_eq!(running.stop(), Some(0));
    let none = running.jobs(&["pause"]);
    ends(&none, 5, &["no daemon listens"]);
    let empty = running.path("empty.toml");
    fs::write(&empty, "").unwrap();
    let idle = running.command(&["daemon", "--config"]).arg(&empty).output().unwrap();
    ends(&idle, 2, &["has no [[job]]"]);
    assert!(text(&idle).contains("empty.toml"));
}

#[test]
fn others_are_told_when_enough_targets_have_it_and_when_one_begins_to_fail() {
    let told = "on_published = [\"/bin/sh\", \"-c\", \"cat >> AT/told\"]\non_failed = [\"/bin/sh\", \"-c\", \"cat >> AT/failed\"]\n";
    let config = format!("{TWO}quorum = 1\n{told}");
    let running = Running::prepared(&config, |at| fs::write(at.join("two"), "in the way").unwrap());
    fs::write(running.path("source/a"), "content").unwrap();
    let lines = |name: &str| -> Vec<Value> {
        let text = fs::read_to_string(running.path(name)).unwrap_or_default();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    };
    until("the news", || !lines("told").is_empty() && !lines("failed").is_empty());
    let (published, failed) = (lines("told").remove(0), lines("failed").remove(0));
    assert_eq!((&published["event"], &published["job"]), (&"published".into(), &"data".into()), "{published}");
    let one = running.path("one").display().to_string();
    assert_eq!(published["targets"], json!([one]), "{published}");
    assert_eq!(failed["target"], running.path("two").display().to_string(), "{failed}");
    // Looking again and finding nothing is no news, nor is that it still fails.
    until("it to be tried again", || running.target(1)["failures"].as_u64().unwrap() > 2);
    assert_eq!((lines("told").len(), lines("failed").len()), (1, 1));
    for (wrong, words) in [
        ("quorum = 3\n", "from 1 to the number of targets, 2"),
        ("on_published = [\"notify\"]\n", "the whole path of a program"),
    ] {
        running.configure(&format!("{TWO}{wrong}"));
        running.signal("-HUP");
        until(words, || running.status()["config_error"].as_str().is_some_and(|error| error.contains(words)));
    }
}

#[test]
fn s21_s28_it_sends_to_a_server_which_may_be_away_for_a_while() {
    let served = Served::start("", "");
    let job = "[[job]]\nname = \"data\"\nsource = \"AT/source\"\ntargets = [\"sync@SERVER:/data\"]\npoll = \"100ms\"\nsettle = \"0s\"\nretry_max = \"1s\"\n";
    let running = Running::at_server(&served, job);
    let there = served.path("sync/data");
    fs::write(running.path("source/a"), "first").unwrap();
    until("the first file", || holds(&there.join("a"), "first"));
    until("it to be idle", || running.target(0)["state"] == "idle");
    done(&running.command(&["check", "--full"]).arg(&there).output().unwrap());
    // The server is held for a moment, as a network that is cut.
    served.signal(rustix::process::Signal::STOP);
    fs::write(running.path("source/b"), "second").unwrap();
    std::thread::sleep(std::time::Duration::from_millis(500));
    assert!(!there.join("b").exists());
    served.signal(rustix::process::Signal::CONT);
    until("the second file", || holds(&there.join("b"), "second"));
}

#[test]
fn a_connection_stays_for_the_next_run_and_one_that_the_server_ended_is_made_anew() {
    let job = "[[job]]\nname = \"data\"\nsource = \"AT/source\"\ntargets = [\"sync@SERVER:/data\"]\nsettle = \"0s\"\nretry_max = \"1s\"\n";
    let served = Served::recording();
    let record = || fs::read_to_string(served.path("record/.lockstep/audit.jsonl")).unwrap();
    let logins = || record().matches("\"action\":\"login\"").count();
    let running = Running::at_server(&served, job);
    let there = served.path("sync/data");
    let arrives = |name: &str| {
        fs::write(running.path("source").join(name), name).unwrap();
        until(name, || holds(&there.join(name), name));
        until("it to be idle", || running.target(0)["state"] == "idle");
    };
    arrives("first");
    // A new root is made by the first run; a second connection may come with it.
    let before = logins();
    ["second", "third", "fourth"].into_iter().for_each(arrives);
    assert_eq!(logins(), before, "{}", record());
    served.reload("[serve.limits]", "[serve.limits]\nidle_timeout = '1s'");
    served.wait_for("nothing was done for too long");
    arrives("fifth");
    assert!(logins() > before, "{}", record());
    assert_eq!(running.target(0)["failures"], 0, "{}", running.target(0));
    // What was published by parts is good as a whole.
    done(&running.command(&["check", "--full"]).arg(&there).output().unwrap());
}

#[test]
fn what_vanishes_beside_a_change_is_still_listed_and_a_check_finds_it() {
    let served = Served::start("", "");
    let job = "[[job]]\nname = \"data\"\nsource = \"AT/source\"\ntargets = [\"sync@SERVER:/data\"]\nsettle = \"0s\"\n";
    let running = Running::prepared_at_server(&served, job, |at| {
        (0..20).for_each(|number| fs::write(at.join(format!("source/{number}")), "content").unwrap());
    });
    let there = served.path("sync/data");
    until("the first files", || holds(&there.join("19"), "content") && running.target(0)["state"] == "idle");
    fs::remove_file(there.join("7")).unwrap();
    fs::write(running.path("source/new"), "new").unwrap();
    until("the new file", || holds(&there.join("new"), "new") && running.target(0)["state"] == "idle");
    let check = running.command(&["check"]).arg(&there).output().unwrap();
    ends(&check, 1, &["7", "missing"]);
    // When everything is compared it comes back.
    done(&running.jobs(&["now"]));
    until("it to be back", || holds(&there.join("7"), "content"));
    until("it to be good", || running.command(&["check"]).arg(&there).output().unwrap().status.success());
}

#[test]
fn s04_what_is_finished_of_a_unit_is_there_before_its_marker_and_nobody_sees_it() {
    let served = Served::start("", "");
    let job = "[[job]]\nname = \"data\"\nsource = \"AT/source\"\ntargets = [\"sync@SERVER:/data\"]\nsettle = \"0s\"\nunit = \"ckpt-*/\"\nready = \"_SUCCESS\"\n";
    let running = Running::at_server(&served, job);
    let (there, source) = (served.path("sync/data"), running.path("source"));
    fs::write(source.join("first"), "first").unwrap();
    until("the first file", || holds(&there.join("first"), "first") && running.target(0)["state"] == "idle");
    let random = |seed: u64| -> Vec<u8> {
        let mut state = seed;
        let next = |_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 56) as u8
        };
        (0..3 << 20).map(next).collect()
    };
    fs::create_dir(source.join("ckpt-1")).unwrap();
    let files = ["ckpt-1/model", "ckpt-1/optimizer"];
    files.iter().zip(1..).for_each(|(name, seed)| fs::write(source.join(name), random(seed)).unwrap());
    let staged =
        |name: &str| fs::metadata(there.join(".lockstep/early/tree").join(name)).map_or(0, |found| found.len());
    until("both to be staged", || files.iter().all(|name| staged(name) == 3 << 20));
    // While the unit grows other files go out, and nothing of it is to be seen.
    fs::write(source.join("beside"), "beside").unwrap();
    until("another file", || holds(&there.join("beside"), "beside"));
    assert!(!there.join("ckpt-1").exists());
    until("it to be idle", || running.target(0)["state"] == "idle");
    let before = running.target(0)["transferred_bytes"].as_u64().unwrap();
    assert!(before >= 3 << 20, "{}", running.target(0));
    fs::write(source.join("ckpt-1/_SUCCESS"), "").unwrap();
    until("the unit", || there.join("ckpt-1/_SUCCESS").exists());
    until("it to be idle", || running.target(0)["state"] == "idle");
    let after = running.target(0)["transferred_bytes"].as_u64().unwrap();
    assert!(after - before < 1 << 20, "it was sent again: {before}, then {after}");
    files.iter().zip(1..).for_each(|(name, seed)| assert_eq!(fs::read(there.join(name)).unwrap(), random(seed)));
    done(&running.command(&["check", "--full"]).arg(&there).output().unwrap());
}

#[test]
fn h36_a_file_that_comes_from_elsewhere_and_is_open_there_waits_for_its_writer() {
    use std::io::Write as _;
    let running = Running::start(TWO);
    fs::write(running.path("source/first"), "first").unwrap();
    until("the first file", || holds(&running.path("one/first"), "first"));
    for (name, link) in [("moved", false), ("linked", true)] {
        let outside = running.path(&format!("outside-{name}"));
        let mut writer = fs::File::create(&outside).unwrap();
        writer.write_all(b"one half").unwrap();
        let inside = running.path("source").join(name);
        if link {
            fs::hard_link(&outside, &inside).unwrap()
        } else {
            fs::rename(&outside, &inside).unwrap()
        }
        std::thread::sleep(std::time::Duration::from_millis(700));
        assert!(!running.path("one").join(name).exists(), "half of {name} was sent");
        writer.write_all(b", and the other").unwrap();
        drop(writer);
        until(name, || holds(&running.path("one").join(name), "one half, and the other"));
    }
}

#[test]
fn all_names_of_a_file_follow_when_it_is_written_by_one() {
    let running = Running::prepared(TWO, |at| {
        fs::write(at.join("source/a"), "old").unwrap();
        ["b", "c"].iter().for_each(|name| fs::hard_link(at.join("source/a"), at.join("source").join(name)).unwrap());
    });
    until("the first files", || holds(&running.path("one/c"), "old") && running.target(0)["state"] == "idle");
    for (by, content) in [("a", "new content"), ("c", "and newer content")] {
        fs::write(running.path("source").join(by), content).unwrap();
        for name in ["a", "b", "c"] {
            until(name, || holds(&running.path("one").join(name), content));
        }
    }
    until("it to be idle", || running.target(0)["state"] == "idle" && running.target(1)["state"] == "idle");
    until("it to be good", || running.command(&["check"]).arg(running.path("one")).output().unwrap().status.success());
}

#[test]
fn s19_a_job_whose_source_is_another_machine_fetches_what_changes_there() {
    let served = Served::start("", "");
    let there = served.path("sync/data");
    fs::create_dir(&there).unwrap();
    fs::write(there.join("a"), "first").unwrap();
    let job = "[[job]]\nname = \"data\"\nsource = \"sync@SERVER:/data\"\ntargets = [\"AT/here\"]\npoll = \"1s\"\nretry_max = \"1s\"\n";
    let running = Running::at_server(&served, job);
    until("the first file", || holds(&running.path("here/a"), "first"));
    fs::write(there.join("b"), "second").unwrap();
    done(&running.jobs(&["now"]));
    until("the second file", || holds(&running.path("here/b"), "second"));
    assert_eq!(running.status()["jobs"][0]["watching"]["mode"], "polling");
    let both = job.replace("AT/here", "sync@SERVER:/other").replace("SERVER", "127.0.0.1");
    running.configure(&both);
    running.signal("-HUP");
    until("the refusal", || {
        running.status()["config_error"].as_str().is_some_and(|error| error.contains("one has to be here"))
    });
}

#[test]
fn a_job_runs_with_its_nice_value_and_with_as_many_connections_as_it_is_given() {
    let served = Served::start("", "");
    let job = |more: &str| {
        format!(
            "[[job]]\nname = \"data\"\nsource = \"AT/source\"\ntargets = [\"sync@SERVER:/data\"]\nsettle = \"0s\"\n{more}"
        )
    };
    let mut running = Running::at_server(&served, &job("nice = 15\nconnections = 1\n"));
    let source = running.path("source");
    let write = |name: &str| {
        for number in 0..6 {
            let data: Vec<u8> =
                (0..4_000_000_u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 24) as u8 ^ number).collect();
            fs::write(source.join(format!("{name}-{number}")), data).unwrap();
        }
    };
    write("a");
    let there = served.path("sync/data");
    until("the files", || (0..6).all(|number| there.join(format!("a-{number}")).exists()));
    until("it to be idle", || running.target(0)["state"] == "idle");
    // Field 19 of proc(5) stat, counted behind the name in parentheses.
    let nice = |thread: &Path| -> Option<(String, i32)> {
        let stat = fs::read_to_string(thread.join("stat")).ok()?;
        let (name, rest) = stat.split_once('(')?.1.rsplit_once(") ")?;
        Some((name.to_owned(), rest.split(' ').nth(16)?.parse().ok()?))
    };
    let tasks = format!("/proc/{}/task", running.pid());
    let threads: Vec<(String, i32)> =
        fs::read_dir(&tasks).unwrap().filter_map(|thread| nice(&thread.unwrap().path())).collect();
    let of = |name: &str| threads.iter().filter(|(found, _)| found == name).map(|(_, nice)| *nice).collect::<Vec<_>>();
    let own = nice(Path::new(&format!("/proc/{}", std::process::id()))).unwrap().1;
    assert_eq!((of("target"), of("watch"), of("lockstep")), (vec![15], vec![15], vec![own]), "{threads:?}");
    // It stays from one run to the next.
    let logins = || served.log().matches("logged in").count();
    assert_eq!(logins(), 1, "{}", served.log());
    running.stop();
    // So many as there are files of a size that is worth it, where more are allowed.
    write("b");
    running.configure(&job("connections = 4\n").replace("SERVER", "127.0.0.1"));
    running.launch();
    until("more files", || (0..6).all(|number| there.join(format!("b-{number}")).exists()));
    until("further connections", || logins() > 3);
}
