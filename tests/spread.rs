//! One large file over several connections, where each of them is slow.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use crate::kit::area::lockstep;
use crate::kit::proxy::{Cut, narrow};
use crate::kit::served::Served;
use crate::kit::{done, ends, noise, text, until};

const LENGTH: usize = 32 << 20;
/// A connection that carries less has carried no part of the file.
const PART: u64 = 1 << 20;

struct Far {
    served: Served,
    local: tempfile::TempDir,
}

impl Far {
    fn new() -> Far {
        Far { served: Served::start("", ""), local: tempfile::tempdir().unwrap() }
    }

    fn local(&self, name: &str) -> PathBuf {
        self.local.path().join(name)
    }

    /// A command through a port that leads to the server.
    fn command(&self, port: u16, arguments: &[&str]) -> Command {
        let public = fs::read_to_string(self.served.path("known")).unwrap();
        let known = format!("[127.0.0.1]:{port} {}\n", public.trim().split_once(' ').unwrap().1);
        fs::write(self.local("known"), known).unwrap();
        let mut command = Command::new(lockstep());
        command.args(arguments).args(["-P", &port.to_string(), "-F", "none"]);
        command.arg("--identity").arg(self.served.path("sync.key")).arg("--known-hosts").arg(self.local("known"));
        command.env("XDG_STATE_HOME", self.local("state")).env("HOME", self.local.path());
        command
    }
}

fn parts(carried: &crate::kit::proxy::Carried) -> usize {
    carried.lock().unwrap().iter().filter(|&&bytes| bytes > PART).count()
}

#[test]
fn a_large_file_goes_over_as_many_connections_as_bring_more_and_comes_back_over_them() {
    let far = Far::new();
    let content = noise(7, LENGTH);
    fs::create_dir(far.local("source")).unwrap();
    fs::write(far.local("source/large"), &content).unwrap();
    let (port, carried) = narrow(far.served.port, None);
    let source = far.local("source");
    let push = far.command(port, &["push", "-v", source.to_str().unwrap(), "sync@127.0.0.1:/data"]).output().unwrap();
    done(&push);
    assert!(fs::read(far.served.path("sync/data/large")).unwrap() == content);
    assert!(parts(&carried) >= 3, "{:?} {}", carried.lock().unwrap(), text(&push));
    assert!(carried.lock().unwrap().len() <= 8);
    until("the server to be left alone", || far.served.connections().is_empty());

    let (port, carried) = narrow(far.served.port, None);
    let target = far.local("target");
    done(&far.command(port, &["pull", "sync@127.0.0.1:/data", target.to_str().unwrap()]).output().unwrap());
    assert!(fs::read(target.join("large")).unwrap() == content);
    assert!(parts(&carried) >= 3, "{:?}", carried.lock().unwrap());
}

#[test]
fn as_many_connections_are_used_as_were_asked_for_and_no_more() {
    let far = Far::new();
    fs::create_dir(far.local("source")).unwrap();
    fs::write(far.local("source/large"), noise(8, LENGTH / 2)).unwrap();
    for (most, to) in [("1", "sync@127.0.0.1:/one"), ("2", "sync@127.0.0.1:/two")] {
        let (port, carried) = narrow(far.served.port, None);
        let source = far.local("source");
        let arguments = ["push", "--transfers", most, source.to_str().unwrap(), to];
        done(&far.command(port, &arguments).output().unwrap());
        assert_eq!(carried.lock().unwrap().len().to_string(), most);
    }
}

#[test]
fn where_no_further_connection_is_to_be_had_the_one_carries_all() {
    let mut far = Far::new();
    far.served = Served::start("", "per_address = 1");
    let content = noise(6, LENGTH / 2);
    fs::create_dir(far.local("source")).unwrap();
    fs::write(far.local("source/large"), &content).unwrap();
    let (port, carried) = narrow(far.served.port, None);
    let source = far.local("source");
    done(&far.command(port, &["push", source.to_str().unwrap(), "sync@127.0.0.1:/data"]).output().unwrap());
    assert!(fs::read(far.served.path("sync/data/large")).unwrap() == content);
    assert!(parts(&carried) == 1 && carried.lock().unwrap().len() > 1, "{:?}", carried.lock().unwrap());
}

#[test]
fn h34_one_of_several_connections_is_cut_and_the_next_run_goes_on_with_what_arrived() {
    let far = Far::new();
    let content = noise(9, LENGTH);
    fs::create_dir(far.local("source")).unwrap();
    fs::write(far.local("source/large"), &content).unwrap();
    let source = far.local("source");
    let arguments = ["push", source.to_str().unwrap(), "sync@127.0.0.1:/data"];
    let (port, _) = narrow(far.served.port, Some((Cut::Only(1), 2 << 20)));
    ends(&far.command(port, &arguments).output().unwrap(), 75, &["the connection was lost"]);
    assert!(!far.served.path("sync/data/large").exists());
    let (port, carried) = narrow(far.served.port, None);
    done(&far.command(port, &arguments).output().unwrap());
    assert!(fs::read(far.served.path("sync/data/large")).unwrap() == content);
    let sent: u64 = carried.lock().unwrap().iter().sum();
    assert!(sent < LENGTH as u64 - (4 << 20), "{sent} bytes were sent again");
}
