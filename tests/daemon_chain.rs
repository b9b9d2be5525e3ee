//! Chains of daemons: what one receives it passes on, whole, at once, and not in a circle.

use std::fs;
use std::path::{Path, PathBuf};

use lockstep::endpoint::local::LocalSource;
use lockstep::endpoint::{ScanOptions, Source as _};
use lockstep::monitor::Silent;
use serde_json::Value;

use crate::daemon::{Running, holds};
use crate::kit::area::{lockstep, run_traced, traced};
use crate::kit::pair::{Pair, options};
use crate::kit::served::Served;
use crate::kit::sshd::Sshd;
use crate::kit::{account, done, ends, until};

/// A machine: a server that receives into `data`, and a daemon that passes on what lies there.
struct Node {
    daemon: Running,
    data: PathBuf,
}

impl Node {
    /// Passes on from `own` to `next`; `more` are lines of its job.
    fn new(own: &Served, next: &Served, more: &str) -> Node {
        let data = own.path("sync/data");
        let job = format!(
            "[[job]]\nname = \"on\"\nsource = \"{}\"\ntargets = [\"sync@SERVER:/data\"]\nretry_max = \"1s\"\n{more}",
            data.display()
        );
        Node { daemon: Running::at_server(next, &job), data }
    }
}

const UNITS: &str = "unit = \"checkpoint-*/\"\nready = \"_SUCCESS\"\nlast = [\"latest\"]\n";
/// Nothing that has to be left alone for as long arrives before a test gives up waiting.
const PATIENT: &str = "settle = \"10m\"\n";

fn save(root: &Path, name: &str, content: &str) {
    let unit = root.join(name);
    fs::create_dir_all(unit.join("deep")).unwrap();
    fs::write(unit.join("model.bin"), content).unwrap();
    fs::write(unit.join("deep/optimizer.bin"), content).unwrap();
    fs::write(unit.join("_SUCCESS"), "").unwrap();
    fs::write(root.join("latest.tmp"), name).unwrap();
    fs::rename(root.join("latest.tmp"), root.join("latest")).unwrap();
}

fn arrived(root: &Path, name: &str, content: &str) -> bool {
    holds(&root.join("latest"), name)
        && holds(&root.join(name).join("deep/optimizer.bin"), content)
        && holds(&root.join(name).join("model.bin"), content)
}

#[test]
fn s28_a_chain_passes_on_what_was_published_at_once_and_what_others_write_when_they_have_finished() {
    let (a, b, c) = (Served::start("", ""), Served::start("", ""), Served::start("", ""));
    fs::create_dir_all(a.path("sync/data")).unwrap();
    let second = Node::new(&b, &c, &format!("{UNITS}{PATIENT}"));
    let first = Node::new(&a, &b, &format!("{UNITS}settle = \"0s\"\n"));
    let end = c.path("sync/data");
    save(&first.data, "checkpoint-10", "ten");
    until("the first checkpoint at the end", || arrived(&end, "checkpoint-10", "ten"));
    save(&first.data, "checkpoint-20", "twenty");
    until("the second checkpoint at the end", || arrived(&end, "checkpoint-20", "twenty"));
    // One that is replaced is exchanged as a whole, and watched from then on as the one before.
    for content in ["ten, once more", "and again, longer"] {
        fs::write(first.data.join("checkpoint-10/model.bin"), content).unwrap();
        fs::write(first.data.join("checkpoint-10/deep/optimizer.bin"), content).unwrap();
        until("the change at the end", || holds(&end.join("checkpoint-10/deep/optimizer.bin"), content));
        assert!(holds(&end.join("checkpoint-10/model.bin"), content));
    }
    fs::write(second.data.join("by-hand"), "is written here").unwrap();
    fs::write(second.data.join("checkpoint-20/by-hand"), "in a unit").unwrap();
    save(&first.data, "checkpoint-30", "thirty");
    until("the third checkpoint at the end", || arrived(&end, "checkpoint-30", "thirty"));
    assert!(!end.join("by-hand").exists() && !end.join("checkpoint-20/by-hand").exists());
    until("both to be idle", || [&first, &second].iter().all(|node| node.daemon.target(0)["state"] == "idle"));
    done(&first.daemon.command(&["check", "--full"]).arg(&end).output().unwrap());
}

#[test]
fn s28_a_circle_is_refused_and_said_before_anything_goes_round() {
    let (a, b, c) = (Served::start("", ""), Served::start("", ""), Served::start("", ""));
    fs::create_dir_all(a.path("sync/data")).unwrap();
    let quick = "settle = \"0s\"\ndelete = \"mirror\"\n";
    let first = Node::new(&a, &b, quick);
    let _second = Node::new(&b, &c, quick);
    fs::write(first.data.join("file"), "content").unwrap();
    until("the file at the end", || holds(&c.path("sync/data/file"), "content"));
    let third = Node::new(&c, &a, quick);
    let told = |node: &Node| -> Option<(Value, String)> {
        let target = node.daemon.target(0);
        Some((target["state"].clone(), target["last_error"]["message"].as_str()?.to_owned()))
    };
    until("the refusal", || told(&third).is_some_and(|(state, _)| state == "halted"));
    let (_, message) = told(&third).unwrap();
    assert!(message.contains("in a circle") && message.contains("/data -> "), "{message}");
    assert!(!a.path("sync/data/.lockstep/manifest").exists(), "something came back");
    // What is edited and removed at the beginning goes to the end, and nothing comes from there.
    fs::write(first.data.join("other"), "more").unwrap();
    fs::remove_file(first.data.join("file")).unwrap();
    until("the removal at the end", || holds(&c.path("sync/data/other"), "more") && !c.path("sync/data/file").exists());
    assert!(!first.data.join("file").exists());
}

#[test]
fn s28_a_job_into_its_own_source_is_refused_at_the_start() {
    let running = Running::start("[[job]]\nname = \"data\"\nsource = \"AT/source\"\ntargets = [\"AT/one\"]\n");
    std::os::unix::fs::symlink("source", running.path("link")).unwrap();
    for target in ["AT/source", "AT/source/sub", "AT/link/new/deep", "AT"] {
        running.configure(&format!("[[job]]\nname = \"data\"\nsource = \"AT/source\"\ntargets = [\"{target}\"]\n"));
        let mut command = running.command(&["daemon", "--config"]);
        let output = command.arg(running.path("config.toml")).output().unwrap();
        ends(&output, 2, &["lie in each other", "config.toml:4:1"]);
    }
}

#[test]
fn s28_what_is_half_published_is_not_passed_on() {
    let at = tempfile::tempdir().unwrap();
    let data = at.path().join("data");
    let job = format!(
        "[[job]]\nname = \"on\"\nsource = \"{}\"\ntargets = [\"AT/end\"]\nsettle = \"0s\"\nretry_max = \"1s\"\n",
        data.display()
    );
    let running = Running::prepared(&job, |_| {
        fs::create_dir(&data).unwrap();
        fs::write(data.join("before"), "old").unwrap();
    });
    until("what was there before", || holds(&running.path("end/before"), "old"));
    // A push that is killed when it has given one of two names.
    for name in ["a", "b"] {
        fs::write(running.path("source").join(name), "new").unwrap();
    }
    let arguments = ["push", "-q", running.path("source").to_str().unwrap(), data.to_str().unwrap()].map(str::to_owned);
    let command: Vec<&str> = [lockstep()].into_iter().chain(arguments.iter().map(String::as_str)).collect();
    // Four renames of its own, then those names.
    let mut killed = traced("renameat", Some("signal=SIGKILL:when=6"), &at.path().join("log"), &command);
    run_traced(killed.env("XDG_STATE_HOME", at.path()));
    assert!(holds(&data.join("a"), "new") && !data.join("b").exists(), "it was not killed between the two");
    fs::write(data.join("beside"), "by hand").unwrap();
    std::thread::sleep(std::time::Duration::from_millis(700));
    assert!(["a", "b", "beside"].iter().all(|name| !running.path("end").join(name).exists()));
    done(&running.command(&command[1..]).output().unwrap());
    until("all of it", || ["a", "b"].iter().all(|name| holds(&running.path("end").join(name), "new")));
    until("what was beside it", || holds(&running.path("end/beside"), "by hand"));
}

#[test]
fn s28_a_circle_through_a_stock_server_is_refused_too() {
    let sshd = Sshd::only("Subsystem sftp internal-sftp");
    let middle = sshd.path("middle");
    let show = |name: &str| sshd.path(name).display().to_string();
    let login = ["-P".into(), sshd.port.to_string(), "--identity".into(), show("user")];
    let known = ["--known-hosts".into(), show("known"), "-F".into(), "none".into()];
    let arguments = login.into_iter().chain(known).collect();
    let job = |source: &str, target: &str| {
        format!(
            "[[job]]\nname = \"on\"\nsource = \"{source}\"\ntargets = [\"{target}\"]\nsettle = \"0s\"\nretry_max = \"1s\"\n"
        )
    };
    let to = format!("{}@127.0.0.1:{}", account(), middle.display());
    let first = Running::new(&job("AT/source", &to), |_| {}, arguments);
    fs::write(first.path("source/file"), "content").unwrap();
    until("the file in the middle", || holds(&middle.join("file"), "content"));
    let back = Running::start(&job(middle.to_str().unwrap(), first.path("source").to_str().unwrap()));
    until("the refusal", || {
        back.target(0)["last_error"]["message"].as_str().is_some_and(|told| told.contains("in a circle"))
    });
    assert_eq!(back.target(0)["state"], "halted");
}

#[test]
fn what_a_run_has_brought_is_known_to_who_passes_it_on_until_its_inode_changes() {
    let pair = Pair::new();
    let old = std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000_000);
    for path in ["a", "d/b"] {
        pair.write(path, path.as_bytes());
        fs::File::options().write(true).open(pair.source.join(path)).unwrap().set_modified(old).unwrap();
    }
    pair.push(&options());
    let known = |at: &Path| -> Vec<bool> {
        let source = LocalSource::new(at, None).unwrap();
        let scan = source.scan(&ScanOptions::default(), &Silent::default()).unwrap();
        scan.tree.entries().iter().filter_map(|entry| Some(entry.file()?.1.is_some())).collect()
    };
    assert_eq!((known(&pair.source), known(&pair.target)), (vec![false, false], vec![true, true]));
    // An edit that puts size and time back changes the inode all the same.
    fs::write(pair.target.join("a"), "b").unwrap();
    fs::File::options().write(true).open(pair.target.join("a")).unwrap().set_modified(old).unwrap();
    assert_eq!(known(&pair.target), [false, true]);
    fs::set_permissions(pair.target.join(".lockstep"), std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
    assert_eq!(known(&pair.target), [false, false]);
}
