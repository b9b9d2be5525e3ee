//! Data over ports beside sshd: further connections of a run to the agent that sshd has started.

use std::fs;
use std::net::TcpListener;
use std::ops::RangeInclusive;
use std::path::Path;
use std::process::{Child, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::kit::ports::{children, connected, free, listening, named, openers, processes};
use crate::kit::sshd::Sshd;
use crate::kit::{account, assert_same, done, ends, noise, proxy, public, text, until};

const OVER_A_PORT: &str = ": data goes over port";
const OVER_ONE_ALONE: &str = "data goes over the SSH server's port alone";
/// Of each of two files.
const LARGE: usize = 40 << 20;

/// An sshd whose agent may listen on some ports, and something to send.
struct Area {
    sshd: Sshd,
    ports: RangeInclusive<u16>,
}

impl Area {
    /// With these options of the agent beside the ports; `AT` is the directory of all of it.
    fn with(count: u16, options: &str) -> Area {
        let ports = free(count);
        let named = named(&ports);
        let sshd = Sshd::of(tempfile::tempdir().unwrap(), None, |at| {
            let options = options.replace("AT", &at.display().to_string());
            let lockstep = env!("CARGO_BIN_EXE_lockstep");
            format!("Subsystem lockstep {lockstep} sftp-server --data-ports {named} {options}")
        });
        Area { sshd, ports }
    }

    fn new() -> Area {
        Area::with(20, "")
    }

    /// Two large files and many small ones.
    fn large(&self) {
        let source = self.sshd.path("source");
        fs::create_dir_all(source.join("small")).unwrap();
        (0..2).for_each(|at| fs::write(source.join(format!("large-{at}")), noise(at, LARGE)).unwrap());
        (0..300).for_each(|at| fs::write(source.join(format!("small/{at}")), noise(at, at as usize)).unwrap());
    }

    /// Little, but enough for two workers.
    fn little(&self) {
        let source = self.sshd.path("source");
        fs::create_dir_all(&source).unwrap();
        (0..300).for_each(|at| fs::write(source.join(at.to_string()), noise(at, 100)).unwrap());
    }

    /// What the sshd is reached by from now on, and what goes over it.
    fn counted(&self, address: &str) -> (u16, Arc<AtomicUsize>) {
        let (port, carried) = proxy::counting(&format!("{address}:0"), self.sshd.port);
        let known = format!("[{address}]:{port} {}\n", public(&self.sshd.path("host.pub")));
        fs::write(self.sshd.path("known"), known).unwrap();
        (port, carried)
    }

    fn run(&self, port: u16, arguments: &[&str]) -> Output {
        let port = port.to_string();
        let login = ["-F", "none", "-P", &port, "--identity", "user", "--known-hosts", "known"];
        self.sshd.run(&[arguments, &login].concat())
    }

    fn push(&self, more: &[&str]) -> Output {
        let arrived = self.sshd.remote("arrived");
        self.run(self.sshd.port, &[&["push", "-v", "source", &arrived], more].concat())
    }

    /// By the address that a proxy has.
    fn push_by(&self, address: &str, port: u16) -> Output {
        let arrived = format!("{}@{address}:{}", account(), self.sshd.path("arrived").display());
        self.run(port, &["push", "-v", "source", &arrived])
    }

    /// A push that takes its time.
    fn slowly(&self) -> Child {
        let (port, arrived) = (self.sshd.port.to_string(), self.sshd.remote("arrived"));
        let mut push = self.sshd.command();
        push.args(["push", "--bwlimit", "8M", "--no-compress", "source", &arrived]);
        push.args(["-F", "none", "-P", &port, "--identity", "user", "--known-hosts", "known"]);
        push.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
    }

    #[track_caller]
    fn assert_arrived(&self) {
        assert_same(&self.sshd.path("source"), &self.sshd.path("arrived"));
    }

    /// Nobody listens, nobody is connected, and who would hand connections over is gone.
    #[track_caller]
    fn assert_closed(&self) {
        until("the ports to be closed", || listening(&self.ports) + connected(&self.ports) == 0);
        until("who listened to end", || openers(&self.ports).is_empty());
    }
}

#[track_caller]
fn says(output: &Output, word: &str) {
    done(output);
    assert!(text(output).contains(word), "'{word}' is not in: {}", text(output));
}

#[track_caller]
fn says_not(output: &Output, word: &str) {
    done(output);
    assert!(!text(output).contains(word), "'{word}' is in: {}", text(output));
}

#[test]
fn data_goes_over_ports_beside_sshd_and_comes_back_over_them() {
    let area = Area::new();
    area.large();
    let (port, carried) = area.counted("127.0.0.1");
    let (there, back) = (area.sshd.remote("arrived"), area.sshd.path("back").display().to_string());
    // So slowly that there is time to log in on a machine that does other work.
    let slowly = ["-v", "--no-compress", "--bwlimit", "40M"];
    // Where the machine is busy the host looks far, and content may begin to go over the first connection: then it is tried again.
    let past_sshd = |from: &str, to: &str, (source, target): (&str, &str)| {
        let verb = if from == "source" { "push" } else { "pull" };
        (0..3).any(|_| {
            fs::remove_dir_all(area.sshd.path(target)).ok();
            carried.store(0, SeqCst);
            says(&area.run(port, &[&[verb, from, to], &slowly[..]].concat()), OVER_A_PORT);
            assert_same(&area.sshd.path(source), &area.sshd.path(target));
            area.assert_closed();
            carried.load(SeqCst) < LARGE / 2
        })
    };
    assert!(past_sshd("source", &there, ("source", "arrived")), "a push goes over sshd");
    assert!(past_sshd(&there, &back, ("arrived", "back")), "a pull goes over sshd");
    // All of it was one run each, and one sender's.
    let log = fs::read_to_string(area.sshd.path("arrived/.lockstep/audit.jsonl")).unwrap();
    let lines: Vec<serde_json::Value> = log.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let actors: Vec<_> = lines.iter().filter_map(|line| line["actor"].as_str()).collect();
    assert!(actors.iter().all(|actor| *actor == actors[0] && actor.contains("from 127.0.0.1")), "{actors:?}");
    ends(&area.sshd.run(&["manifest", "verify", "arrived"]), 0, &[]);
}

#[test]
fn several_connections_carry_one_run_and_no_more_than_were_asked_for() {
    let area = Area::new();
    area.large();
    for (transfers, most) in [("4", 3), ("2", 1), ("1", 0)] {
        fs::remove_dir_all(area.sshd.path("arrived")).ok();
        let mut highest = (0, 0);
        std::thread::scope(|scope| {
            let push = scope.spawn(|| area.push(&["--no-compress", "--bwlimit", "40M", "--transfers", transfers]));
            while !push.is_finished() {
                highest = (highest.0.max(connected(&area.ports)), highest.1.max(listening(&area.ports)));
                std::thread::sleep(Duration::from_millis(2));
            }
            let push = push.join().unwrap();
            if most == 0 { says_not(&push, OVER_A_PORT) } else { says(&push, OVER_A_PORT) }
        });
        area.assert_arrived();
        // Each is seen once, on the server's side; one may log in when all is over.
        assert!(highest.0 <= most && highest.0 >= most.min(2), "{transfers}: {highest:?}");
        assert_eq!(highest.1, usize::from(most > 0), "{transfers}");
        area.assert_closed();
    }
}

#[test]
fn a_run_with_little_to_send_asks_for_no_port() {
    let area = Area::new();
    fs::create_dir(area.sshd.path("source")).unwrap();
    fs::write(area.sshd.path("source/one"), "a little").unwrap();
    let mut highest = 0;
    std::thread::scope(|scope| {
        let push = scope.spawn(|| area.push(&[]));
        while !push.is_finished() {
            highest = highest.max(listening(&area.ports));
        }
        says_not(&push.join().unwrap(), OVER_A_PORT);
    });
    assert_eq!(highest, 0);
    area.assert_arrived();
}

#[test]
fn no_port_is_opened_where_the_receiver_does_not_allow_it() {
    let sshd = Sshd::start();
    fs::create_dir(sshd.path("source")).unwrap();
    (0..300).for_each(|at| fs::write(sshd.path(&format!("source/{at}")), noise(at, 30_000)).unwrap());
    let push = sshd.lockstep(&["push", "-v", "source", &sshd.remote("arrived")]);
    says(&push, "connected to the subsystem 'lockstep'");
    says_not(&push, OVER_A_PORT);
    says_not(&push, OVER_ONE_ALONE);
    says_not(&push, "port for data");
    assert_same(&sshd.path("source"), &sshd.path("arrived"));
}

#[test]
fn the_configuration_of_the_receiver_allows_it_for_the_subsystem_and_the_command() {
    let ports = free(20);
    let sshd = Sshd::of(tempfile::tempdir().unwrap(), None, |at| {
        fs::write(at.join("config.toml"), format!("[sftp_server]\ndata_ports = \"{}\"\n", named(&ports))).unwrap();
        let config = at.join("config.toml").display().to_string();
        format!("SetEnv LOCKSTEP_CONFIG={config}\nSubsystem lockstep {} sftp-server", env!("CARGO_BIN_EXE_lockstep"))
    });
    let area = Area { sshd, ports };
    area.little();
    says(&area.push(&["--remote", "subsystem"]), OVER_A_PORT);
    area.assert_arrived();
    fs::remove_dir_all(area.sshd.path("arrived")).unwrap();
    let command = format!("{} sftp-server", env!("CARGO_BIN_EXE_lockstep"));
    says(&area.push(&["--remote", "exec", "--remote-command", &command]), OVER_A_PORT);
    area.assert_arrived();
    // One account may be kept from it.
    fs::remove_dir_all(area.sshd.path("arrived")).unwrap();
    let none = format!("{command} --data-ports none");
    says_not(&area.push(&["--remote", "exec", "--remote-command", &none]), OVER_A_PORT);
    area.assert_arrived();
    // A range that is none ends the session with its place.
    fs::write(area.sshd.path("config.toml"), "[sftp_server]\ndata_ports = \"9-7\"\n").unwrap();
    let wrong = area.push(&["--remote", "exec", "--remote-command", &command]);
    ends(&wrong, 2, &["config.toml:2", "'data_ports': '9-7' ends before it begins"]);
}

#[test]
fn ports_that_are_all_taken_leave_the_run_its_first_connection() {
    let area = Area::with(8, "");
    area.little();
    let mut taken: Vec<_> = area.ports.clone().map(|port| TcpListener::bind(("127.0.0.1", port)).unwrap()).collect();
    let push = area.push(&[]);
    says(&push, &format!("none of the ports {} of 127.0.0.1 can be listened on", named(&area.ports)));
    says_not(&push, OVER_A_PORT);
    area.assert_arrived();
    // One that is free among them is found.
    for at in [3, 0] {
        let free = taken.remove(at);
        let port = free.local_addr().unwrap().port();
        drop(free);
        fs::remove_dir_all(area.sshd.path("arrived")).unwrap();
        says(&area.push(&[]), &format!("{OVER_A_PORT} {port}"));
        area.assert_arrived();
        until("the port to be closed", || {
            taken.extend(TcpListener::bind(("127.0.0.1", port)));
            taken.len() == 8
        });
    }
}

#[test]
fn a_port_that_nobody_gets_through_to_leaves_the_run_its_first_connection() {
    let area = Area::with(1, "");
    area.little();
    // The agent listens where sshd was reached by the proxy, and the client comes to where the proxy is.
    let (port, _) = area.counted("127.0.0.2");
    let begun = Instant::now();
    let refused = area.push_by("127.0.0.2", port);
    says(&refused, OVER_ONE_ALONE);
    says(&refused, "Connection refused");
    area.assert_arrived();
    area.assert_closed();
    assert!(begun.elapsed() < Duration::from_secs(10));

    // Somebody is there and says nothing.
    let silent = TcpListener::bind(("127.0.0.2", *area.ports.start())).unwrap();
    fs::remove_dir_all(area.sshd.path("arrived")).unwrap();
    let begun = Instant::now();
    says(&area.push_by("127.0.0.2", port), OVER_ONE_ALONE);
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    area.assert_arrived();

    // Who has no place for one more drops what asks to connect, as a firewall does.
    rustix::net::listen(&silent, 0).unwrap();
    let address = silent.local_addr().unwrap();
    let short = Duration::from_millis(100);
    let held: Vec<_> = (0..8).map_while(|_| std::net::TcpStream::connect_timeout(&address, short).ok()).collect();
    assert!(held.len() < 8, "the queue has no end");
    fs::remove_dir_all(area.sshd.path("arrived")).unwrap();
    let begun = Instant::now();
    let dropped = area.push_by("127.0.0.2", port);
    says(&dropped, "no answer within 1.5 s");
    assert!(begun.elapsed() < Duration::from_secs(6), "{:?}", begun.elapsed());
    area.assert_arrived();
}

#[test]
fn h53_another_host_key_at_the_port_is_a_warning_and_gets_no_data() {
    let area = Area::with(1, "");
    area.large();
    // Another sshd, which knows the account's key.
    let other = Sshd::start();
    let (port, over_sshd) = area.counted("127.0.0.2");
    let (_, carried) = proxy::counting(&format!("127.0.0.2:{}", area.ports.start()), other.port);
    let push = area.push_by("127.0.0.2", port);
    says(&push, "warning: no data goes over port");
    says(&push, "ANOTHER HOST KEY");
    says_not(&push, OVER_A_PORT);
    area.assert_arrived();
    assert!(over_sshd.load(SeqCst) > 2 * LARGE);
    let carried = carried.load(SeqCst);
    assert!(0 < carried && carried < 16 << 10, "{carried}");
    assert!(!other.log().contains("userauth-request") && !other.log().contains("Failed publickey"), "{}", other.log());
}

#[test]
fn ports_are_not_tried_where_a_command_or_another_host_is_in_between() {
    let area = Area::new();
    area.little();
    let (port, at) = (area.sshd.port, area.sshd.at.path().display());
    let proxy = format!(
        "ProxyCommand=ssh -F none -i {at}/user -o UserKnownHostsFile={at}/known -p {port} -W %h:%p {}@127.0.0.1",
        account()
    );
    let push = area.push(&["-o", &proxy]);
    says_not(&push, OVER_A_PORT);
    says_not(&push, OVER_ONE_ALONE);
    area.assert_arrived();
    fs::remove_dir_all(area.sshd.path("arrived")).unwrap();
    let (hop, _) = proxy::counting("127.0.0.2:0", port);
    let host = public(&area.sshd.path("host.pub"));
    fs::write(area.sshd.path("known"), format!("[127.0.0.1]:{port} {host}\n[127.0.0.2]:{hop} {host}\n")).unwrap();
    let jump = format!("{}@127.0.0.2:{hop}", account());
    let push = area.push(&["-J", &jump]);
    says_not(&push, OVER_A_PORT);
    says_not(&push, OVER_ONE_ALONE);
    area.assert_arrived();
}

#[test]
fn h47_a_confined_agent_has_its_connections_handed_over() {
    let area = Area::with(20, "--root AT/jail --require-confinement");
    fs::create_dir(area.sshd.path("jail")).unwrap();
    area.large();
    let there = format!("{}@127.0.0.1:/arrived", account());
    let push = area.run(area.sshd.port, &["push", "-v", "--no-compress", "source", &there]);
    says(&push, OVER_A_PORT);
    assert_same(&area.sshd.path("source"), &area.sshd.path("jail/arrived"));
    area.assert_closed();
    let pull = area.run(area.sshd.port, &["pull", "-v", "--no-compress", &there, "back"]);
    says(&pull, OVER_A_PORT);
    assert_same(&area.sshd.path("source"), &area.sshd.path("back"));
    area.assert_closed();
}

/// Kills one of the processes at the receiver while content goes over a port; the next run goes on.
fn killed(which: impl Fn(&Area) -> Vec<i32>) {
    let area = Area::new();
    area.large();
    let push = area.slowly();
    let staged = || size(&area.sshd.path(".arrived.lockstep")) + size(&area.sshd.path("arrived"));
    until("content to go over a port", || connected(&area.ports) > 0 && staged() > (8 << 20));
    let killed = which(&area);
    assert!(!killed.is_empty());
    killed.iter().for_each(|&process| kill_process(Pid::from_raw(process).unwrap(), Signal::KILL).unwrap());
    ends(&push.wait_with_output().unwrap(), 75, &["the connection was lost"]);
    area.assert_closed();
    assert!(!area.sshd.path("arrived/large-0").exists());
    let next = area.push(&["--json", "--no-compress", "--wait", "30"]);
    done(&next);
    area.assert_arrived();
    let said = String::from_utf8_lossy(&next.stdout).into_owned();
    let summary: serde_json::Value = serde_json::from_str(said.lines().last().unwrap()).unwrap();
    let sent = summary["transferred_bytes"].as_u64().unwrap();
    assert!(sent < 2 * LARGE as u64 - (4 << 20), "{sent} bytes were sent again");
}

/// So many bytes of files.
fn size(at: &Path) -> u64 {
    let files = walkdir::WalkDir::new(at).into_iter().flatten().filter_map(|entry| entry.metadata().ok());
    files.filter(|metadata| metadata.is_file()).map(|metadata| metadata.len()).sum()
}

#[test]
fn h32_a_session_of_sshd_that_is_killed_ends_its_port_and_the_next_push_goes_on() {
    // The process of the session is a child of the listening one.
    killed(|area| children(&processes(&format!("/usr/sbin/sshd -D -e -p {} ", area.sshd.port))));
}

#[test]
fn h32_an_agent_with_a_port_that_is_killed_leaves_nothing_and_the_next_push_goes_on() {
    let agent = concat!(env!("CARGO_BIN_EXE_lockstep"), " sftp-server --data-ports");
    killed(|area| processes(&format!("{agent} {}", named(&area.ports))));
}
