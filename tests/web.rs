//! What a daemon shows: metrics, the page, and the server of both, each as the program that reads it sees it.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::time::Duration;

use lockstep::daemon::http::{self, Server};
use lockstep::daemon::samples::History;
use lockstep::daemon::status::{
    FORMAT, JobStatus, Progress, Publication, SourceCpu, State, Status, TargetStatus, Trouble, Watching,
};
use lockstep::daemon::{metrics, page};

use crate::kit::{text, until};

pub(crate) const NOW: u64 = 1_700_000_000;

fn trouble(message: &str, hint: &str, times: u64) -> Option<Trouble> {
    Some(Trouble { time: NOW - 35, message: message.into(), hint: Some(hint.into()), times })
}

pub(crate) fn target(name: &str, state: State) -> TargetStatus {
    TargetStatus {
        target: name.into(),
        state,
        last_success: Some(NOW - 130),
        generation: Some(812),
        runs: 240,
        published_files: 12_345,
        transferred_bytes: 9 << 40,
        wire_bytes: 6 << 40,
        ..TargetStatus::default()
    }
}

pub(crate) fn job(name: &str, targets: Vec<TargetStatus>) -> JobStatus {
    JobStatus {
        name: name.into(),
        source: format!("/data/{name}"),
        paused: false,
        watching: Watching {
            mode: "events".into(),
            directories: 1204,
            why: None,
            last_scan: Some(NOW - 400),
            ..Watching::default()
        },
        unfinished: Vec::new(),
        unfinished_count: 0,
        halted: None,
        targets,
    }
}

pub(crate) fn status(jobs: Vec<JobStatus>) -> Status {
    Status {
        format: FORMAT.into(),
        version: "0.1.0".into(),
        host: "gpu01".into(),
        pid: 4711,
        started: NOW - 200_000,
        now: NOW,
        config: "/etc/lockstep/config.toml".into(),
        config_error: None,
        jobs,
        recent: Vec::new(),
        source_cpu: SourceCpu { read_seconds: 1.5, hash_seconds: 20.25, compress_seconds: 0.0 },
    }
}

/// Two jobs with three targets each; one target is behind, one sends, the rest is in step.
pub(crate) fn example() -> Status {
    let behind = TargetStatus {
        lag_units: 3,
        lag_bytes: 41 << 30,
        lag_seconds: 7300,
        last_success: Some(NOW - 7400),
        last_error: trouble(
            "sync@gpu03: cannot connect to gpu03:22: Connection refused",
            "see that sshd runs there and that no firewall is in between: 'ssh sync@gpu03 true'",
            14,
        ),
        next_try: Some(NOW + 85),
        failures: 14,
        ..target("sync@gpu03:/data/checkpoints", State::Retrying)
    };
    let sending = TargetStatus {
        lag_units: 1,
        lag_bytes: 80 << 30,
        lag_seconds: 45,
        progress: Some(Progress {
            done_files: 210,
            total_files: 640,
            done_bytes: 48 << 30,
            total_bytes: 128 << 30,
            bytes_per_second: 1_400 << 20,
            seconds: 36,
        }),
        ..target("sync@gpu02:/data/checkpoints", State::Transferring)
    };
    let mut checkpoints =
        job("checkpoints", vec![sending, behind, target("sync@gpu04:/data/checkpoints", State::Idle)]);
    checkpoints.unfinished = vec!["checkpoint-12500".into()];
    checkpoints.unfinished_count = 1;
    let maps = ["sync@gpu02:/data/maps", "sync@gpu03:/data/maps", "/mnt/archive/maps"];
    let mut maps = job("maps", maps.map(|name| target(name, State::Idle)).into());
    maps.watching = Watching { mode: "polling".into(), why: Some("a network file system".into()), ..maps.watching };
    let published = |ago, target: &str, error: Option<&str>| Publication {
        time: NOW - ago,
        job: "checkpoints".into(),
        target: target.into(),
        generation: error.is_none().then_some(812),
        files: 640,
        bytes: 128 << 30,
        milliseconds: 93_400,
        error: error.map(str::to_owned),
    };
    let mut status = status(vec![checkpoints, maps]);
    status.recent = vec![
        published(130, "sync@gpu04:/data/checkpoints", None),
        published(7300, "sync@gpu03:/data/checkpoints", Some("cannot connect to gpu03:22: Connection refused")),
        published(7400, "sync@gpu02:/data/checkpoints", None),
    ];
    status
}

/// What went on with the example for the last three hours.
fn went_on(status: &Status) -> History {
    let history = History::new();
    let mut then = status.clone();
    for tick in 0..1080_u64 {
        then.now = NOW - (1080 - tick) * 10;
        for target in then.jobs.iter_mut().flat_map(|job| &mut job.targets) {
            target.progress = None;
            let busy = tick % 180 < 40;
            target.transferred_bytes += if busy { (1 << 30) * (8 + tick % 7) } else { 0 };
            let failing = target.last_error.is_some() && tick > 350;
            target.lag_seconds = if failing {
                (tick - 350) * 10
            } else if busy {
                tick % 180 * 4
            } else {
                0
            };
        }
        history.sample(&then);
    }
    history
}

fn serve(status: Status) -> Server {
    let history = Arc::new(went_on(&status));
    http::serve("127.0.0.1:0".parse().unwrap(), Arc::new(move || status.clone()), history).unwrap()
}

/// Sends bytes as they are, and gives all that comes back.
fn raw(address: SocketAddr, bytes: &[u8]) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    // It may have been answered and closed before all is sent.
    let _ = stream.write_all(bytes);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    String::from_utf8_lossy(&answer).into_owned()
}

pub(crate) fn get(address: SocketAddr, path: &str) -> (u16, String) {
    let answer = raw(address, format!("GET {path} HTTP/1.1\r\nHost: {address}\r\n\r\n").as_bytes());
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no answer: {answer:?}"));
    (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
}

fn with_input(command: &mut Command, package: &str, input: &str) -> Output {
    let child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let mut child = child.unwrap_or_else(|_| panic!("{command:?} is not installed: Debian package {package}"));
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    child.wait_with_output().unwrap()
}

/// A browser's own opinion of a page: what is in the document after it was read.
fn dom(url: &str) -> String {
    let profile = tempfile::tempdir().unwrap();
    let output = Command::new("chromium")
        .args(["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"])
        .args(["--disable-background-networking", "--disable-extensions", "--dump-dom"])
        .arg(format!("--user-data-dir={}", profile.path().display()))
        .arg(url)
        .env("HOME", profile.path())
        .output()
        .expect("chromium is not installed: Debian package chromium");
    assert!(output.status.success(), "{}", text(&output));
    String::from_utf8(output.stdout).unwrap()
}

const HOSTILE: &str = "<script>alert(1)</script>\"'&\\\n\u{1b}[31m";

fn hostile() -> Status {
    let mut status = example();
    status.host = HOSTILE.into();
    status.config = HOSTILE.into();
    status.config_error = Some(HOSTILE.into());
    let job = &mut status.jobs[0];
    job.name = HOSTILE.into();
    job.source = HOSTILE.into();
    job.unfinished = vec![HOSTILE.into()];
    job.watching.why = Some(HOSTILE.into());
    job.halted = trouble(HOSTILE, HOSTILE, 1);
    for target in &mut job.targets {
        target.target = HOSTILE.into();
        target.last_error = trouble(HOSTILE, HOSTILE, 2);
    }
    status.recent[1].error = Some(HOSTILE.into());
    status.recent[1].job = HOSTILE.into();
    status.recent[1].target = HOSTILE.into();
    status
}

#[test]
fn prometheus_reads_the_metrics() {
    let mut all = hostile();
    // The same name twice must not spoil the rest.
    all.jobs.push(all.jobs[1].clone());
    for status in [example(), all, status(Vec::new())] {
        let text_of = metrics::render(&status);
        let output = with_input(Command::new("promtool").args(["check", "metrics"]), "prometheus", &text_of);
        assert!(output.status.success() && text(&output).is_empty(), "{}\n{text_of}", text(&output));
    }
    let of_example = metrics::render(&example());
    let labels = "{job=\"checkpoints\",target=\"sync@gpu03:/data/checkpoints\"";
    for line in [
        "lockstep_up 1".to_owned(),
        "lockstep_source_cpu_seconds_total{stage=\"hash\"} 20.25".to_owned(),
        "# TYPE lockstep_source_cpu_seconds_total counter".to_owned(),
        "lockstep_build_info{version=\"0.1.0\"} 1".to_owned(),
        format!("lockstep_target_state{labels},state=\"retrying\"}} 1"),
        format!("lockstep_target_state{labels},state=\"idle\"}} 0"),
        format!("lockstep_target_lag_seconds{labels}}} 7300"),
        format!("lockstep_target_failures_total{labels}}} 14"),
        "lockstep_job_polling{job=\"maps\"} 1".to_owned(),
    ] {
        assert!(of_example.lines().any(|found| found == line), "'{line}' is not in\n{of_example}");
    }
}

#[test]
fn the_file_of_metrics_is_whole_readable_and_without_those_of_the_process() {
    let at = tempfile::tempdir().unwrap();
    let file = at.path().join("lockstep.prom");
    let elsewhere = at.path().join("elsewhere");
    // What somebody put where it is written first is not followed.
    std::os::unix::fs::symlink(&elsewhere, at.path().join(".lockstep.prom.new")).unwrap();
    metrics::write_textfile(&file, &example()).unwrap();
    metrics::write_textfile(&file, &example()).unwrap();
    assert!(!elsewhere.exists());
    let found: Vec<_> = fs::read_dir(at.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(found, ["lockstep.prom"]);
    let mode = std::os::unix::fs::PermissionsExt::mode(&fs::metadata(&file).unwrap().permissions());
    assert_eq!(mode & 0o777, 0o644);
    let written = fs::read_to_string(&file).unwrap();
    assert!(written.contains("lockstep_up 1\n") && !written.contains("\nprocess_"), "{written}");
    fs::create_dir(at.path().join("directory")).unwrap();
    metrics::write_textfile(&at.path().join("directory"), &example()).unwrap_err();
    assert_eq!(fs::read_dir(at.path()).unwrap().count(), 2);
}

#[test]
fn every_route_answers_and_nothing_else_does() {
    let server = serve(example());
    let address = server.address();
    assert_eq!(get(address, "/healthz"), (200, "ok\n".into()));
    assert_eq!(get(address, "/metrics"), (200, metrics::render(&example())));
    let (code, body) = get(address, "/status.json");
    assert_eq!((code, serde_json::from_str::<Status>(&body).unwrap()), (200, example()));
    let (code, body) = get(address, "/?again");
    assert!(code == 200 && body.starts_with("<!DOCTYPE html>") && body.ends_with("</html>\n"));
    for path in ["/../etc/passwd", "/index.html", "//", "/status.json/"] {
        assert_eq!(get(address, path).0, 404, "{path}");
    }
    let asked = |request: &str| raw(address, request.replace("HOST", &format!("Host: {address}\r\n\r\n")).as_bytes());
    let head = asked("HEAD / HTTP/1.1\r\nHOST");
    assert!(head.starts_with("HTTP/1.1 200 OK\r\n") && head.ends_with("\r\n\r\n"), "{head}");
    for header in
        ["Content-Security-Policy: default-src 'none'; style-src", "nosniff", "no-store", "no-referrer", "DENY"]
    {
        assert!(head.contains(header), "{header}: {head}");
    }
    let post = asked("POST / HTTP/1.1\r\nContent-Length: 5\r\nHOSThello");
    assert!(post.starts_with("HTTP/1.1 405 ") && post.contains("\r\nAllow: GET, HEAD\r\n"), "{post}");
    drop(server);
    assert!(TcpStream::connect(address).is_err());
}

#[test]
fn a_page_of_another_host_cannot_read_it_and_nobody_else_may_listen() {
    let server = serve(example());
    for host in ["evil.example", "127.0.0.1.evil.example:80", "gpu01", ""] {
        let answer = raw(server.address(), format!("GET /status.json HTTP/1.1\r\nHost: {host}\r\n\r\n").as_bytes());
        assert!(answer.starts_with("HTTP/1.1 403 ") && !answer.contains("checkpoints"), "{host}: {answer}");
    }
    for address in ["0.0.0.0:0", "[::]:0", "192.0.2.1:0"] {
        let error = http::serve(address.parse().unwrap(), Arc::new(example), Arc::default()).unwrap_err();
        assert!(error.to_string().contains("loopback"), "{error}");
    }
}

#[test]
fn whoever_sends_rubbish_or_nothing_holds_up_no_other() {
    let server = serve(example());
    let address = server.address();
    for (bytes, status) in [
        (&b"\0\xff\xfe\n\n"[..], "400"),
        (b"\r\n\r\n", "400"),
        (b"GET /\xff HTTP/1.1\r\nHost: localhost\r\n\r\n", "400"),
        (b"GET / HTTP/1.1\r\n\r\n", "400"),
        (b"GET / HTTP/3\r\nHost: localhost\r\n\r\n", "505"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\n\n", "400"),
        (b"BREW / HTTP/1.1\r\nHost: localhost\r\n\r\n", "405"),
    ] {
        let answer = raw(address, bytes);
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{bytes:?}: {answer}");
    }
    let large = format!("GET / HTTP/1.1\r\nHost: localhost\r\nX: {}\r\n\r\n", "x".repeat(20_000));
    assert!(raw(address, large.as_bytes()).starts_with("HTTP/1.1 431 "));
    // Those who say nothing take up all the places there are; whoever comes then is told, and the next is answered again.
    let silent: Vec<TcpStream> = (0..32).map(|_| TcpStream::connect(address).unwrap()).collect();
    until("the places to be taken", || {
        raw(address, b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n").contains(" 503 ")
    });
    drop(silent);
    until("a place", || raw(address, b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n").contains(" 200 "));
}

#[test]
fn a_browser_shows_every_target_and_what_is_wrong_first() {
    let server = serve(example());
    let dom = dom(&format!("http://{}/", server.address()));
    for words in [
        "<title>(1) lockstep on gpu01</title>",
        "behind by 3 units, 41.00 GiB, for 2 hours; last success 2 hours ago",
        "failed 14 times, the last 35 seconds ago: sync@gpu03: cannot connect",
        "see that sshd runs there",
        "checkpoint-12500",
        "a network file system",
        "38%",
    ] {
        assert!(dom.contains(words), "'{words}' is not in {dom}");
    }
    for target in example().jobs.iter().flat_map(|job| &job.targets) {
        let cell = format!("<td class=\"target\">{}", target.target);
        assert_eq!(dom.matches(&cell).count(), 1, "{cell}");
    }
    assert_eq!(dom.matches("<tr class=\"failing\">").count(), 2, "a target and a publication: {dom}");
    let table = dom.find("<table").unwrap();
    assert!(dom.find("Connection refused").unwrap() < table, "what is wrong stands above everything");
    assert!(dom.matches("class=\"line\"").count() >= 6, "plots: {dom}");
}

#[test]
fn h09_hostile_names_are_text_in_a_browser() {
    let server = serve(hostile());
    let dom = dom(&format!("http://{}/", server.address()));
    assert!(!dom.contains("<script"), "{dom}");
    assert!(dom.matches("&lt;script&gt;alert(1)&lt;/script&gt;").count() >= 14, "{dom}");
    assert!(!dom.contains('\u{1b}'));
    assert!(page::render(&hostile(), &History::new()).contains("\\x1b[31m"));
}

/// The names of metrics in an expression.
fn names(text: &str) -> Vec<&str> {
    let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    words.filter(|word| word.starts_with("lockstep_")).collect()
}

/// Every metric that there is, with all that a status may have.
fn written() -> Vec<String> {
    let mut status = example();
    for target in status.jobs.iter_mut().flat_map(|job| &mut job.targets) {
        target.progress = Some(Progress::default());
        target.next_try = Some(NOW);
    }
    let text = metrics::render(&status);
    text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next().map(str::to_owned)).collect()
}

#[test]
fn the_dashboard_asks_for_metrics_that_there_are() {
    let dashboard: serde_json::Value = serde_json::from_str(include_str!("../config/grafana.json")).unwrap();
    assert_eq!(dashboard["__inputs"][0]["pluginId"], "prometheus");
    let (mut asked, mut expressions, mut left) = (Vec::new(), Vec::new(), vec![&dashboard]);
    while let Some(value) = left.pop() {
        match value {
            serde_json::Value::Object(fields) => {
                for key in ["expr", "definition"] {
                    let text = fields.get(key).and_then(|text| text.as_str());
                    asked.extend(text.map(names).unwrap_or_default());
                }
                expressions.extend(fields.get("expr").and_then(|text| text.as_str()));
                left.extend(fields.values());
            }
            serde_json::Value::Array(values) => left.extend(values),
            _ => {}
        }
    }
    let written = written();
    assert!(expressions.len() > 20);
    for name in asked {
        assert!(written.iter().any(|metric| metric == name), "{name}");
    }
    // Prometheus itself reads each expression, as a rule.
    let rules: Vec<_> = expressions
        .iter()
        .enumerate()
        .map(|(number, text)| {
            let text = text.replace("$__rate_interval", "5m");
            serde_json::json!({ "record": format!("panel:{number}"), "expr": text })
        })
        .collect();
    let at = tempfile::tempdir().unwrap();
    let file = at.path().join("rules.yml");
    fs::write(&file, serde_json::json!({ "groups": [{ "name": "panels", "rules": rules }] }).to_string()).unwrap();
    let output = with_input(Command::new("promtool").args(["check", "rules"]).arg(&file), "prometheus", "");
    assert!(output.status.success(), "{}", text(&output));
}

#[test]
fn the_alerts_are_raised_when_they_should_be() {
    let rules = concat!(env!("CARGO_MANIFEST_DIR"), "/config/prometheus-rules.yml");
    let output = with_input(Command::new("promtool").args(["check", "rules", rules]), "prometheus", "");
    assert!(output.status.success(), "{}", text(&output));
    let written = written();
    for line in fs::read_to_string(rules).unwrap().lines().filter(|line| line.trim_start().starts_with("expr:")) {
        for name in names(line) {
            assert!(written.iter().any(|metric| metric == name), "{name}");
        }
    }
    let labels = "instance=\"gpu01\",job=\"data\"";
    let series = |name: &str, labels: &str, values: &str| serde_json::json!({ "series": format!("{name}{{{labels}}}"), "values": values });
    let tests = serde_json::json!({
        "rule_files": [rules],
        "tests": [{
            "interval": "1m",
            "input_series": [
                series("up", "instance=\"gpu01\",job=\"lockstep\"", "0x60"),
                series("lockstep_target_lag_seconds", &format!("{labels},target=\"a\""), "0+60x120"),
                series("lockstep_target_lag_seconds", "instance=\"gpu01\",job=\"quiet\",target=\"a\"", "0+60x120"),
                series("lockstep_job_paused", "instance=\"gpu01\",job=\"quiet\"", "1x120"),
                series("lockstep_job_paused", labels, "0x120"),
                series("lockstep_job_halted", labels, "1x120"),
                series("lockstep_status_timestamp_seconds", "instance=\"gpu02\"", "0x120"),
            ],
            "promql_expr_test": [{
                "expr": "sum by (alertname, job) (ALERTS{alertstate=\"firing\"})",
                "eval_time": "70m",
                "exp_samples": [
                    { "labels": "{alertname=\"LockstepTargetBehind\", job=\"data\"}", "value": 1 },
                    { "labels": "{alertname=\"LockstepJobHalted\", job=\"data\"}", "value": 1 },
                    { "labels": "{alertname=\"LockstepSilent\"}", "value": 1 },
                ],
            }, {
                "expr": "sum by (alertname) (ALERTS{alertstate=\"firing\",alertname=\"LockstepDown\"})",
                "eval_time": "10m",
                "exp_samples": [{ "labels": "{alertname=\"LockstepDown\"}", "value": 1 }],
            }],
        }],
    });
    let at = tempfile::tempdir().unwrap();
    let file = at.path().join("tests.yml");
    fs::write(&file, tests.to_string()).unwrap();
    let output = with_input(Command::new("promtool").args(["test", "rules"]).arg(&file), "prometheus", "");
    assert!(output.status.success(), "{}", text(&output));
}

#[test]
fn the_page_of_a_daemon_without_jobs_says_so_and_long_messages_leave_room() {
    let history = History::default();
    assert!(page::render(&status(Vec::new()), &history).contains("No job runs"));
    let mut all = example();
    let message = "no room; ".repeat(200);
    for target in &mut all.jobs[0].targets {
        target.last_error = trouble(&message, "make room", 1);
    }
    all.jobs[1].targets = vec![all.jobs[0].targets[0].clone(); 200];
    let page = page::render(&all, &history);
    assert!(!page.contains("No job runs"));
    // Few are told in full; the rest stands in the tables, cut off, with all of it for who points at it.
    assert_eq!(page.matches("<section class=\"alert").count(), 5);
    assert_eq!(page.matches("<div class=\"error clamp\" title=\"no room").count(), 203);
    assert!(page.contains("199 more troubles stand in the tables below."));
}
