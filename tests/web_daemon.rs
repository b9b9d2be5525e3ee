//! A real daemon as its operator sees it: `lockstep status`, `lockstep history`, the page and the file of metrics.

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _};
use std::process::{Output, Stdio};

use serde_json::Value;

use crate::daemon::Running;
use crate::kit::{done, ends, text, until};
use crate::web::get;

const TWO: &str = r#"
listen = "127.0.0.1:0"
metrics_file = "AT/lockstep.prom"
[[job]]
name = "data"
source = "AT/source"
targets = ["AT/one", "AT/two"]
settle = "0s"
poll = "1s"
retry_max = "1s"
"#;

fn status(running: &Running, arguments: &[&str]) -> Output {
    let mut command = running.command(&["status", "--socket"]);
    command.arg(running.path("daemon.sock")).args(arguments).output().unwrap()
}

fn history(running: &Running, arguments: &[&str]) -> Output {
    running.command(&["history", "--config"]).arg(running.path("config.toml")).args(arguments).output().unwrap()
}

/// Where the page is, as the log says.
fn address(running: &Running) -> std::net::SocketAddr {
    let mut found = None;
    until("the address of the page", || {
        let log = running.log();
        let at = log.lines().rfind(|line| line.contains("serving the page"));
        found = at.and_then(|line| line.rsplit("address=").next()?.trim().parse().ok());
        found.is_some()
    });
    found.unwrap()
}

#[test]
fn s28_an_operator_sees_what_is_behind_and_what_to_do() {
    // A file where the directory should be.
    let mut running = Running::prepared(TWO, |at| fs::write(at.join("two"), "in the way").unwrap());
    fs::write(running.path("source/a"), "content").unwrap();
    let mut shown = status(&running, &[]);
    until("the refusal", || {
        shown = status(&running, &[]);
        let said = text(&shown);
        // While it is tried again it is called failing.
        said.contains("cannot be a target") && (said.contains("HALTED data -> ") || said.contains("FAILING data -> "))
    });
    ends(&shown, 4, &["behind by", "failed ", "cannot be a target", "do: ", "/one"]);
    until("one to be in step", || text(&status(&running, &[])).contains("1 in step"));
    let json = status(&running, &["--json"]);
    assert_eq!(json.status.code(), Some(4));
    let told: Value = serde_json::from_slice(&json.stdout).unwrap();
    assert_eq!((&told["format"], &told["jobs"][0]["name"]), (&"lockstep-status 1".into(), &"data".into()));

    let page = address(&running);
    let (code, body) = get(page, "/");
    assert!(code == 200 && body.contains("cannot be a target"), "{body}");
    let (code, body) = get(page, "/metrics");
    assert!(code == 200 && body.contains("lockstep_target_failures_total{job=\"data\",target=\""), "{body}");

    fs::remove_file(running.path("two")).unwrap();
    until("nothing to be wrong", || status(&running, &[]).status.code() == Some(0));
    until("the history to tell it", || {
        let told = text(&history(&running, &[]));
        let has = |target: &str| told.lines().any(|line| line.contains(target) && line.contains(", 7 B in"));
        has("/one: ") && has("/two: ")
    });
    ends(&history(&running, &[]), 0, &["/one: ", "/two: failed: ", ", generation "]);
    ends(&status(&running, &[]), 0, &["Published last", ", 7 B"]);
    let (one, two) = (running.path("one"), running.path("two"));
    let of_one = history(&running, &["--target", one.to_str().unwrap(), "--job", "data", "--since", "1h", "--json"]);
    done(&of_one);
    let lines: Vec<Value> = text(&of_one).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(!lines.is_empty() && lines.iter().all(|line| line["target"] == one.to_str().unwrap()), "{lines:?}");
    assert_eq!(text(&history(&running, &["-n", "1", "--target", two.to_str().unwrap()])).lines().count(), 1);
    ends(&history(&running, &["--job", "other"]), 0, &["nothing of that"]);
    ends(&history(&running, &["--since", "yesterday"]), 2, &["'12h'"]);

    assert_eq!(running.stop(), Some(0), "{}", running.log());
    ends(&status(&running, &[]), 5, &["no daemon listens"]);
    ends(&history(&running, &[]), 0, &["/two: failed: ", ", 7 B in"]);
    // What was published before is known to the next daemon.
    running.launch();
    assert!(running.status()["recent"].as_array().unwrap().len() >= 3, "{}", running.status());
}

#[test]
fn the_file_of_metrics_is_written_and_the_page_moves_with_the_configuration() {
    let running = Running::start(TWO);
    until("the metrics", || {
        fs::read_to_string(running.path("lockstep.prom")).is_ok_and(|text| text.contains("lockstep_up 1"))
    });
    let before = address(&running);
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let other = taken.local_addr().unwrap();
    // An address that another program has: nothing changes, and it is told.
    running.configure(&TWO.replace("127.0.0.1:0", &other.to_string()));
    running.signal("-HUP");
    until("the refusal", || {
        running.status()["config_error"].as_str().is_some_and(|told| told.contains("cannot serve the page"))
    });
    assert_eq!(get(before, "/healthz").0, 200);
    ends(&status(&running, &[]), 0, &["FAILING configuration", "cannot serve the page on", "lockstep jobs reload"]);
    drop(taken);
    done(&running.jobs(&["reload"]));
    until("the page to be there", || running.status()["config_error"].is_null());
    assert_eq!(get(other, "/healthz").0, 200);
    assert!(std::net::TcpStream::connect(before).is_err());
    running.configure(&TWO.replace("listen = \"127.0.0.1:0\"\n", ""));
    done(&running.jobs(&["reload"]));
    until("the page to be gone", || std::net::TcpStream::connect(other).is_err());
    // The one that others can reach is refused before anything starts.
    running.configure(&TWO.replace("127.0.0.1:0", "0.0.0.0:9478"));
    let refused = running.command(&["daemon", "--config"]).arg(running.path("config.toml")).output().unwrap();
    ends(&refused, 2, &["0.0.0.0:9478", "loopback"]);
}

#[test]
fn it_stops_though_somebody_removed_its_socket() {
    let mut running = Running::start(TWO);
    fs::remove_file(running.path("daemon.sock")).unwrap();
    assert_eq!(running.stop(), Some(0), "{}", running.log());
}

#[test]
fn watching_follows_a_daemon_that_goes_and_comes() {
    let mut running = Running::start(TWO);
    let mut command = running.command(&["status", "--watch", "--json", "--socket"]);
    let mut child = command.arg(running.path("daemon.sock")).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut next = || serde_json::from_str::<Value>(&lines.next().unwrap().unwrap()).unwrap();
    assert_eq!(next()["format"], "lockstep-status 1");
    assert_eq!(running.stop(), Some(0));
    until("it to be gone", || next()["error"].as_str().is_some_and(|told| told.contains("no daemon listens")));
    running.launch();
    until("it to be back", || next()["format"] == "lockstep-status 1");
    // As Ctrl-C.
    let pid = child.id().to_string();
    assert!(std::process::Command::new("kill").args(["-INT", &pid]).status().unwrap().success());
    assert!(!child.wait().unwrap().success());
}

#[test]
fn on_a_terminal_it_is_drawn_in_place() {
    let running = Running::start(TWO);
    let inner = format!(
        "stty cols 60 rows 6; timeout -s INT 3 {} status --watch --socket {}",
        crate::kit::area::lockstep(),
        running.path("daemon.sock").display()
    );
    let mut command = std::process::Command::new("script");
    let command = command.args(["-qec", &inner, "/dev/null"]).stdin(Stdio::null()).stdout(Stdio::piped());
    let mut child = command.spawn().expect("script is not installed: Debian package bsdutils");
    let mut shown = String::new();
    child.stdout.take().unwrap().read_to_string(&mut shown).unwrap();
    child.wait().unwrap();
    assert_eq!(shown.matches("\x1b[2J").count(), 1, "cleared once: {shown:?}");
    assert!(shown.matches("\x1b[H").count() >= 2, "drawn again: {shown:?}");
    assert!(shown.contains("more than fit here") && shown.contains("\x1b[3"), "{shown:?}");
}
