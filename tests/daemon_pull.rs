//! Jobs that fetch: from a lockstep and from a stock server, whole, what is finished, through outages.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use crate::daemon::{Running, holds};
use crate::kit::area::lockstep;
use crate::kit::served::Served;
use crate::kit::sshd::Sshd;
use crate::kit::{account, done, ends, until};

/// Polls so seldom that what arrives was asked for.
const SELDOM: &str = "poll = \"1h\"\nretry_max = \"1s\"\n";
const UNITS: &str = "unit = \"checkpoint-*/\"\nready = \"_SUCCESS\"\ndelete = \"mirror\"\nsettle = \"0s\"\n";

fn job(source: &str, more: &str) -> String {
    format!("[[job]]\nname = \"data\"\nsource = \"{source}\"\ntargets = [\"AT/here\"]\n{more}")
}

/// A daemon that logs in at a server of OpenSSH.
fn at_sshd(sshd: &Sshd, config: &str) -> Running {
    let show = |name: &str| sshd.path(name).display().to_string();
    let login = ["-P".into(), sshd.port.to_string(), "--identity".into(), show("user")];
    let known = ["--known-hosts".into(), show("known"), "-F".into(), "none".into()];
    Running::new(config, |_| {}, login.into_iter().chain(known).collect())
}

/// Fetches now, until `done`.
fn fetched(running: &Running, what: &str, mut there: impl FnMut() -> bool) {
    done(&running.jobs(&["now"]));
    until(what, || {
        let idle = running.target(0)["state"] == "idle";
        if idle && !there() {
            done(&running.jobs(&["now"]));
        }
        there()
    });
}

fn save(root: &Path, name: &str, complete: bool) {
    let unit = root.join(name);
    fs::create_dir_all(unit.join("deep")).unwrap();
    fs::write(unit.join("model.bin"), name).unwrap();
    fs::write(unit.join("deep/optimizer.bin"), name).unwrap();
    if complete {
        fs::write(unit.join("_SUCCESS"), "").unwrap();
    }
    fs::write(root.join("latest"), name).unwrap();
    // A stock server tells whole seconds: two that are written in one second and have one length are the same to it.
    let seconds = name.rsplit('-').next().unwrap().parse::<u64>().unwrap();
    let time = std::time::SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000_000 + seconds);
    fs::File::options().write(true).open(root.join("latest")).unwrap().set_modified(time).unwrap();
}

/// Units come when they are complete, and what names one not before it.
fn fetches_what_is_complete(running: &Running, there: &Path) {
    let here = running.path("here");
    fetched(running, "the first checkpoint", || holds(&here.join("latest"), "checkpoint-1"));
    assert!(holds(&here.join("checkpoint-1/deep/optimizer.bin"), "checkpoint-1"));
    save(there, "checkpoint-2", false);
    fs::write(there.join("model.tmp"), "on its way").unwrap();
    fs::write(there.join("file"), "first").unwrap();
    // One that is made anew keeps what it was at the target.
    fs::remove_file(there.join("checkpoint-1/_SUCCESS")).unwrap();
    fs::remove_file(there.join("checkpoint-1/model.bin")).unwrap();
    fetched(running, "what is finished", || holds(&here.join("file"), "first"));
    until("it to be idle", || running.target(0)["state"] == "idle");
    assert!(!here.join("checkpoint-2").exists() && !here.join("model.tmp").exists());
    assert!(holds(&here.join("latest"), "checkpoint-1") && holds(&here.join("checkpoint-1/model.bin"), "checkpoint-1"));
    let job = &running.status()["jobs"][0];
    let unfinished: Vec<&str> =
        job["unfinished"].as_array().unwrap().iter().map(|path| path.as_str().unwrap()).collect();
    assert_eq!(unfinished, ["checkpoint-1", "checkpoint-2", "latest", "model.tmp"]);
    fs::write(there.join("checkpoint-2/_SUCCESS"), "").unwrap();
    fetched(running, "the second checkpoint", || holds(&here.join("latest"), "checkpoint-2"));
    assert!(holds(&here.join("checkpoint-2/model.bin"), "checkpoint-2"));
    fs::write(there.join("checkpoint-1/model.bin"), "made anew").unwrap();
    fs::write(there.join("checkpoint-1/_SUCCESS"), "").unwrap();
    fs::remove_file(there.join("file")).unwrap();
    fetched(running, "what was made anew", || holds(&here.join("checkpoint-1/model.bin"), "made anew"));
    until("the removal", || !here.join("file").exists());
}

#[test]
fn s19_a_job_fetches_from_a_lockstep_what_is_complete_there() {
    let served = Served::start("", "");
    let there = served.path("sync/data");
    save(&there, "checkpoint-1", true);
    let running = Running::at_server(&served, &job("sync@SERVER:/data", &format!("{SELDOM}{UNITS}")));
    fetches_what_is_complete(&running, &there);
}

#[test]
fn s19_a_job_fetches_from_a_stock_server_what_is_complete_there() {
    let sshd = Sshd::only("Subsystem sftp internal-sftp");
    let there = sshd.path("data");
    save(&there, "checkpoint-1", true);
    let source = format!("{}@127.0.0.1:{}", account(), there.display());
    let running = at_sshd(&sshd, &job(&source, &format!("{SELDOM}{UNITS}")));
    fetches_what_is_complete(&running, &there);
}

#[test]
fn h36_a_job_that_fetches_leaves_what_is_being_written_there() {
    let served = Served::start("", "");
    let there = served.path("sync/data");
    fs::create_dir(&there).unwrap();
    fs::write(there.join("finished"), "content").unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let (stopped, log) = (Arc::clone(&stop), there.join("grows"));
    let writer = std::thread::spawn(move || {
        let mut file = fs::File::create(log).unwrap();
        while !stopped.load(Ordering::SeqCst) {
            file.write_all(b"a line\n").unwrap();
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
    });
    let more = "poll = \"1s\"\nsettle = \"300ms\"\nretry_max = \"1s\"\n";
    let running = Running::at_server(&served, &job("sync@SERVER:/data", more));
    let here = running.path("here");
    until("what is finished", || holds(&here.join("finished"), "content"));
    until("a further look", || running.target(0)["runs"].as_u64().unwrap() > 2);
    assert!(!here.join("grows").exists());
    stop.store(true, Ordering::SeqCst);
    writer.join().unwrap();
    let all = fs::read_to_string(there.join("grows")).unwrap();
    until("what was being written", || holds(&here.join("grows"), &all));
}

#[test]
fn h34_a_job_that_fetches_says_what_keeps_it_and_goes_on_afterwards() {
    let served = Served::start("", "");
    let there: PathBuf = served.path("sync/data");
    fs::create_dir(&there).unwrap();
    fs::write(there.join("file"), vec![7; 3 << 20]).unwrap();
    let left = Arc::new(AtomicUsize::new(400_000));
    let port = crate::kit::proxy::cutting(served.port, Arc::clone(&left));
    let known = fs::read_to_string(served.path("known")).unwrap();
    fs::write(served.path("known"), known.replace(&format!(":{} ", served.port), &format!(":{port} "))).unwrap();
    let show = |name: &str| served.path(name).display().to_string();
    let login = ["-P".into(), port.to_string(), "--identity".into(), show("sync.key")];
    let known = ["--known-hosts".into(), show("known"), "-F".into(), "none".into()];
    let running = Running::new(
        &job("sync@127.0.0.1:/data", &format!("{SELDOM}settle = \"0s\"\n")),
        |_| {},
        login.into_iter().chain(known).collect(),
    );
    until("the failure to be told", || running.target(0)["failures"].as_u64().unwrap() >= 2);
    let target = running.target(0);
    assert!(target["last_error"]["message"].as_str().unwrap().contains("127.0.0.1"), "{target}");
    assert!(!running.path("here").exists());
    left.store(usize::MAX, Ordering::SeqCst);
    until("the file", || fs::read(running.path("here/file")).is_ok_and(|found| found == vec![7; 3 << 20]));
    until("it to be idle", || running.target(0)["state"] == "idle" && running.target(0)["last_error"].is_null());
    // One that is not there is said, too.
    running.configure(&job("sync@127.0.0.1:/elsewhere", SELDOM));
    done(&running.jobs(&["reload"]));
    until("the failure to be told", || {
        running.target(0)["last_error"]["message"].as_str().is_some_and(|told| told.contains("/elsewhere"))
    });
}

#[test]
fn s19_a_job_that_fetches_leaves_out_what_is_not_finished_when_it_is_run_once() {
    let sshd = Sshd::only("Subsystem sftp internal-sftp");
    let there = sshd.path("data");
    save(&there, "checkpoint-1", true);
    save(&there, "checkpoint-2", false);
    let (area, here) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (config, target) = (area.path().join("config.toml"), here.path().join("copy"));
    let source = format!("{}@127.0.0.1:{}", account(), there.display());
    let push = |more: &str| {
        let job =
            format!("[[job]]\nname = \"data\"\nsource = \"{source}\"\ntargets = [\"{}\"]\n{more}", target.display());
        fs::write(&config, job).unwrap();
        let mut command = Command::new(lockstep());
        command.args(["push", "data", "-F", "none", "-P", &sshd.port.to_string(), "--config"]).arg(&config);
        command.arg("--identity").arg(sshd.path("user")).arg("--known-hosts").arg(sshd.path("known"));
        command.env("HOME", area.path()).output().unwrap()
    };
    let says = ["'checkpoint-2' is not finished, and is left out: '_SUCCESS' is not in it", "left out: 1 unit;"];
    ends(&push(UNITS), 4, &says);
    assert!(holds(&target.join("checkpoint-1/deep/optimizer.bin"), "checkpoint-1"));
    assert!(!target.join("checkpoint-2").exists() && !target.join("latest").exists());
    fs::write(there.join("checkpoint-2/_SUCCESS"), "").unwrap();
    done(&push(UNITS));
    assert!(holds(&target.join("latest"), "checkpoint-2") && target.join("checkpoint-2/model.bin").exists());
    // What names nothing is not waited for.
    save(&there, "checkpoint-3", true);
    fs::remove_dir_all(there.join("checkpoint-3")).unwrap();
    done(&push(UNITS));
    assert!(holds(&target.join("latest"), "checkpoint-3"));
    // Without units it is one thing.
    fs::remove_dir_all(&target).unwrap();
    ends(&push("ready = \"_SUCCESS\"\n"), 4, &["is not finished: '_SUCCESS' is not in it"]);
    assert!(!target.exists());
    fs::write(there.join("_SUCCESS"), "").unwrap();
    done(&push("ready = \"_SUCCESS\"\n"));
    assert!(target.join("checkpoint-2/model.bin").exists());
}
