//! A client of the agent that is confined to a root, while links and directories change places.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, symlink};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use lockstep::codec::CompressOptions;
use lockstep::endpoint::Error;
use lockstep::endpoint::agent::{AgentTarget, Lanes};
use lockstep::endpoint::client::{Client, ClientOptions};
use lockstep::endpoint::local::LocalSource;
use lockstep::monitor::Silent;
use lockstep::sync::{SyncReport, run};

use crate::kit::area::{ChildLink, lockstep, options, traced, write};
use crate::kit::served::Served;
use crate::kit::text;

#[test]
fn h14_h16_h19_a_confined_client_is_led_out_of_its_root_by_no_link() {
    let at = tempfile::tempdir().unwrap();
    let path = |name: &str| at.path().join(name);
    for name in ["data/inside", "data_evil", "source"] {
        fs::create_dir_all(path(name)).unwrap();
    }
    write(&path("source"), "f", b"x");
    fs::set_permissions(path("data_evil"), std::os::unix::fs::PermissionsExt::from_mode(0o711)).unwrap();
    symlink(path("data_evil"), path("data/link")).unwrap();
    symlink("../data_evil", path("data/relative")).unwrap();
    let push = |root: &str| -> Result<SyncReport, Error> {
        let mut agent = Command::new(lockstep());
        agent.args(["sftp-server", "--root"]).arg(path("data"));
        let link = Arc::new(ChildLink::start(&mut agent, u64::MAX));
        let source = LocalSource::new(&path("source"), None).unwrap();
        let client = Client::connect(link, "agent", ClientOptions::default())?;
        let compress = CompressOptions { level: None, enabled: false };
        let lanes = Lanes::over(client, 1, Box::new(|_| None), root.as_bytes(), compress)?;
        run(&source, &AgentTarget::new(lanes), &options(), &Silent::default(), &AtomicBool::new(false))
    };
    for root in
        ["/link", "link", "/link/new", "relative", "relative/new", "../data_evil", "/../data_evil", "inside/../link"]
    {
        assert!(push(root).is_err(), "{root}");
        assert_eq!(fs::read_dir(path("data_evil")).unwrap().count(), 0, "{root}");
    }
    // A name that begins like the root's is not the root.
    assert!(push(path("data_evil").to_str().unwrap()).unwrap().is_complete());
    assert_eq!(fs::read_dir(path("data_evil")).unwrap().count(), 0);
    assert!(push("/new/deep").unwrap().is_complete());
    assert_eq!(fs::read(path("data/new/deep/f")).unwrap(), b"x");

    // A directory that is swapped for a link, again and again, while pushes go on.
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            use rustix::fs::{CWD, RenameFlags, renameat_with};
            while !stop.load(Ordering::Relaxed) {
                let _ = renameat_with(CWD, path("data/inside"), CWD, path("data/link"), RenameFlags::EXCHANGE);
            }
        });
        for _ in 0..10 {
            let _ = push("inside");
            let _ = push("inside/below");
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert_eq!(fs::read_dir(path("data_evil")).unwrap().count(), 0);
    assert_eq!(fs::metadata(path("data_evil")).unwrap().mode() & 0o7777, 0o711);
}

#[test]
fn h63_where_openat2_is_not_to_be_had_paths_are_confined_all_the_same() {
    let at = tempfile::tempdir().unwrap();
    let path = |name: &str| at.path().join(name);
    for name in ["data/inside", "outside", "source/sub"] {
        fs::create_dir_all(path(name)).unwrap();
    }
    write(&path("source"), "sub/f", b"x");
    symlink(path("outside"), path("data/link")).unwrap();
    // As systemd's RestrictSUIDSGID= does it.
    let push = |root: &str| -> Result<SyncReport, Error> {
        let (log, data) = (path("log"), path("data"));
        let serve = [lockstep(), "sftp-server", "--root", data.to_str().unwrap()];
        let mut agent = traced("openat2", Some("error=ENOSYS"), &log, &serve);
        let link = Arc::new(ChildLink::start(&mut agent, u64::MAX));
        let source = LocalSource::new(&path("source"), None).unwrap();
        let client = Client::connect(link, "agent", ClientOptions::default())?;
        let compress = CompressOptions { level: None, enabled: false };
        let lanes = Lanes::over(client, 1, Box::new(|_| None), root.as_bytes(), compress)?;
        run(&source, &AgentTarget::new(lanes), &options(), &Silent::default(), &AtomicBool::new(false))
    };
    for root in ["/link", "link/new", "../outside", "inside/../../outside"] {
        assert!(push(root).is_err(), "{root}");
        assert_eq!(fs::read_dir(path("outside")).unwrap().count(), 0, "{root}");
    }
    // What lies in the way within the tree is replaced, and what is good arrives.
    symlink(path("outside"), path("data/inside/sub")).unwrap();
    assert!(push("inside").unwrap().is_complete());
    assert_eq!(fs::read(path("data/inside/sub/f")).unwrap(), b"x");
    assert_eq!(fs::read_dir(path("outside")).unwrap().count(), 0);
    let calls = fs::read_to_string(path("log")).unwrap();
    assert!(
        calls.contains("ENOSYS")
            && !calls
                .lines()
                .any(|line| line.contains("openat2(") && line.contains(" = ") && !line.contains("INJECTED")),
        "{calls}"
    );
}

#[test]
fn h14_a_confined_client_is_not_told_where_its_root_lies() {
    let served = Served::start("", "");
    let there = served.path("sync");
    write(&there, "plain", b"a file");
    write(&there, "full/.lockstep/audit.jsonl", b"no line of a log\n");
    write(&served.path("source"), "file", b"content");
    let source = served.path("source").display().to_string();
    let mine = served.at().display().to_string();
    for (arguments, part) in [
        (vec!["push", &source, "sync@127.0.0.1:/plain"], "'/plain"),
        (vec!["push", &source, "sync@127.0.0.1:/plain/below"], "'/plain"),
        (vec!["push", &source, "sync@127.0.0.1:/full"], "/full"),
        (vec!["pull", "sync@127.0.0.1:/missing", "AT/here"], "'/missing'"),
    ] {
        let here = served.path("here").display().to_string();
        let arguments: Vec<String> = arguments.iter().map(|text| text.replace("AT/here", &here)).collect();
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let told = text(&served.lockstep(&arguments, "sync"));
        let told = told.replace(&source, "SOURCE").replace(&here, "HERE");
        assert!(!told.contains(&mine) && told.contains(part), "{arguments:?}: {told}");
    }
}
