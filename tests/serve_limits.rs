//! What `lockstep serve` allows in number and time, and how it stops: over the wire.

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt as _;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use lockstep::wire::buffer::Writer;
use lockstep::wire::sftp::packet;
use rustix::process::Signal;

use crate::kit::served::{Held, Served, user};
use crate::kit::{keygen, proxy, text as said, until};

/// A client that knows no SSH.
fn raw(served: &Served) -> TcpStream {
    let stream = TcpStream::connect(("127.0.0.1", served.port)).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    stream
}

/// All that the server says until it hangs up.
fn rest(stream: &mut TcpStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    match stream.read_to_end(&mut bytes) {
        Ok(_) => {}
        Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "{error}"),
    }
    bytes
}

#[test]
fn h43_who_says_nothing_or_too_little_is_dropped() {
    let served = Served::start("", "login_grace = '400ms'");
    let mut silent = raw(&served);
    let mut slow = raw(&served);
    slow.write_all(b"SSH-2.0-slow\r\n").unwrap();
    // Who has logged in stays.
    let mut held = served.hold("sync", &[]);
    assert!(held.speaks());
    assert!(rest(&mut silent).starts_with(b"SSH-2.0-"));
    assert!(rest(&mut slow).starts_with(b"SSH-2.0-"));
    until("both in the log", || served.log().matches("no login in time").count() == 2);
    assert!(held.0.try_wait().unwrap().is_none());
}

#[test]
fn h43_connections_are_limited_before_the_login_and_for_one_address() {
    let served = Served::start("", "unauthenticated = 2\nper_address = 3");
    let first_words = |stream: &mut TcpStream| {
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line).unwrap();
        line
    };
    let mut waiting = [raw(&served), raw(&served)];
    assert!(waiting.iter_mut().all(|stream| first_words(stream).starts_with("SSH-2.0-")));
    let refused = first_words(&mut raw(&served));
    assert_eq!(refused, "lockstep: too many connections that have not logged in; try again later\r\n");
    served.wait_for("too many connections that have not logged in");
    drop(waiting);
    let mut held: Vec<Held> = Vec::new();
    for _ in 0..3 {
        // A place is free when the server has noticed the end of what took it.
        until("a place", || {
            let mut next = served.hold("sync", &[]);
            let good = next.speaks();
            held.extend(good.then_some(next));
            good
        });
    }
    assert!(first_words(&mut raw(&served)).contains("too many connections from this address"));
    drop(held.pop());
    until("a place that was given back", || first_words(&mut raw(&served)).starts_with("SSH-2.0-"));
}

/// The first line that the server says to a client of this address; nothing where it hangs up.
fn greeting(served: &Served, last: u8) -> String {
    use rustix::net::{AddressFamily, SocketType, bind, connect, socket};
    let stream = socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
    bind(&stream, &std::net::SocketAddr::from(([127, 0, 0, last], 0))).unwrap();
    connect(&stream, &std::net::SocketAddr::from(([127, 0, 0, 1], served.port))).unwrap();
    let mut line = String::new();
    let _ = BufReader::new(TcpStream::from(stream)).read_line(&mut line);
    line
}

#[test]
fn h43_an_address_that_fails_again_and_again_is_refused_for_a_while() {
    let penalties = "penalties = { failed_login = '1h', least = '3h', most = '4h' }\npenalty_exempt = ['127.0.0.9']";
    let served = Served::start(penalties, "");
    keygen(served.at(), &["-t", "ed25519", "-N", "", "-f", "wrong.key"]);
    let tried = |key: &str, last: u8| {
        let mut sftp = served.client("sftp", "-P", key);
        sftp.args(["-b", "/dev/null", "-o", &format!("BindAddress=127.0.0.{last}"), "sync@127.0.0.1"]);
        let output = sftp.output().unwrap();
        (output.status.success(), said(&output))
    };
    for number in 1..=3 {
        assert!(greeting(&served, 5).starts_with("SSH-2.0-"), "refused after {number}");
        assert!(!tried("wrong", 5).0 && !tried("wrong", 9).0);
        // The end of a connection is noticed when it is.
        until("the failure", || served.log().matches("no login").count() >= 2 * number);
    }
    until("the penalty", || !greeting(&served, 5).starts_with("SSH-2.0-"));
    assert_eq!(greeting(&served, 5), "lockstep: this address failed too often; try again later\r\n");
    assert!(!tried("sync", 5).0, "also with a good key");
    // Others are not concerned, nor who is exempt.
    assert!(tried("sync", 1).0 && tried("sync", 9).0);
    for _ in 0..100 {
        greeting(&served, 5);
    }
    let log = served.log();
    let lines = log.matches("this address failed too often").count();
    assert!((1..50).contains(&lines), "{lines} lines for a hundred: {log}");
    assert_eq!(log.matches("the address is refused for a while").count(), 1, "{log}");
    served.reload("penalty_exempt = ['127.0.0.9']", "penalty_exempt = ['127.0.0.0/24']");
    assert!(tried("sync", 5).0);
}

#[test]
fn h43_from_a_number_on_connections_that_have_not_logged_in_are_shed() {
    // All of those that are over the first two; random numbers are looked at where they are drawn.
    let served = Served::start("", "startups = '2:100:60'\nunauthenticated = 60\nper_address = 60");
    let waiting: Vec<TcpStream> = (0..2).map(|_| raw(&served)).collect();
    until("two that wait", || greeting(&served, 1).starts_with("lockstep: too many connections that have not"));
    for _ in 0..20 {
        assert!(greeting(&served, 2).starts_with("lockstep: too many connections that have not logged in"));
    }
    served.wait_for("some are shed at random");
    drop(waiting);
    until("a place", || served.sftp("sync", "sync", "ls\n").status.success());
}

#[test]
fn h43_a_push_comes_back_to_a_server_that_is_full_and_says_so() {
    let served = Served::start("", "connections = 1");
    fs::create_dir(served.path("source")).unwrap();
    fs::write(served.path("source/f"), "f").unwrap();
    let mut held = served.hold("sync", &[]);
    assert!(held.speaks());
    let pushed = std::thread::scope(|scope| {
        let push = scope.spawn(|| served.lockstep(&["push", "source", "sync@127.0.0.1:/m"], "sync"));
        served.wait_for("too many connections");
        assert!(!push.is_finished());
        drop(held);
        push.join().unwrap()
    });
    let text = said(&pushed);
    assert!(pushed.status.success(), "{text}");
    assert!(text.contains("the host says 'lockstep: too many connections; try again later'"), "{text}");
    assert_eq!(text.matches("trying again").count(), 1, "said once: {text}");
    assert_eq!(fs::read_to_string(served.path("sync/m/f")).unwrap(), "f");
}

#[test]
fn h43_a_push_does_not_come_back_to_a_server_that_refuses_its_address() {
    let penalties = "penalties = { failed_login = '1h', least = '1s', most = '4h' }";
    let served = Served::start(penalties, "");
    keygen(served.at(), &["-t", "ed25519", "-N", "", "-f", "wrong.key"]);
    fs::create_dir(served.path("source")).unwrap();
    assert!(!served.sftp("sync", "wrong", "ls\n").status.success());
    served.wait_for("refused for a while");
    let started = std::time::Instant::now();
    let pushed = served.lockstep(&["push", "source", "sync@127.0.0.1:/m"], "sync");
    assert_eq!(pushed.status.code(), Some(75), "{}", said(&pushed));
    assert!(said(&pushed).contains("the host says 'lockstep: this address failed too often"), "{}", said(&pushed));
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
}

#[test]
fn h43_keys_are_not_tried_without_end() {
    let served = Served::start("", "auth_tries = 2");
    for number in 0..4 {
        keygen(served.at(), &["-t", "ed25519", "-N", "", "-f", &format!("wrong{number}.key")]);
    }
    let tried = |wrong: &[&str]| {
        let mut ssh = served.client("ssh", "-p", wrong[0]);
        for key in &wrong[1..] {
            ssh.args(["-i", &format!("{key}.key")]);
        }
        let output = ssh.args(["-i", "sync.key", "-s", "sync@127.0.0.1", "sftp"]).output().unwrap();
        (output.status.success(), said(&output))
    };
    assert!(tried(&["wrong0"]).0);
    let (good, said) = tried(&["wrong0", "wrong1", "wrong2", "wrong3"]);
    assert!(!good && said.contains("Too many authentication"), "{said}");
    // One line for the connection, not one for each key.
    served.wait_for("no login");
    let log = served.log();
    let lines: Vec<&str> = log.lines().filter(|line| line.contains("the key is not listed")).collect();
    assert!(lines.len() == 1 && lines[0].matches("SHA256:").count() == 2, "{log}");
}

#[test]
fn sessions_are_limited_for_one_user_and_one_connection() {
    let served = Served::start("", "sessions_per_user = 2\nchannels = 1");
    let mut held = [served.hold("sync", &[]), served.hold("sync", &[])];
    assert!(held.iter_mut().all(Held::speaks));
    let third = served.sftp("sync", "sync", "ls\n");
    assert!(!third.status.success(), "{}", said(&third));
    served.wait_for("too many sessions of this user");
    drop(held);
    until("a session's place", || served.sftp("sync", "sync", "ls\n").status.success());
    // Two sessions over one connection.
    let mut master = served.hold("sync", &["-M", "-S", "mux"]);
    assert!(master.speaks());
    let second = served.ssh("sync", &["-S", "mux", "-s", "sync@127.0.0.1", "sftp"]);
    assert!(said(&second).contains("open refused by peer"), "{}", said(&second));
    served.wait_for("too many in one connection");
}

/// A client that asks for more than it takes, and then closes its channel but not its connection.
#[test]
fn a_closed_channel_gives_its_place_back_while_a_reply_waits_for_a_window() {
    let served = Served::start("", "sessions_per_user = 1\nchannels = 1");
    fs::write(served.path("sync/big"), vec![7; 8 << 20]).unwrap();
    let mut master = served.client("ssh", "-p", "sync");
    master.args(["-M", "-N", "-S", "mux", "sync@127.0.0.1"]).stderr(Stdio::null());
    let master = Held(master.spawn().unwrap());
    until("the connection", || served.path("mux").exists());
    let mut greedy = served.hold("sync", &["-S", "mux"]);
    assert!(greedy.speaks());
    let input = greedy.0.stdin.as_mut().unwrap();
    let packet = |kind: u8, fields: &[&[u8]]| {
        let body = fields.concat();
        [&(body.len() as u32 + 1).to_be_bytes()[..], &[kind], &body].concat()
    };
    input.write_all(&packet(3, &[&[0, 0, 0, 1], &[0, 0, 0, 4], b"/big", &[0, 0, 0, 1], &[0, 0, 0, 0]])).unwrap();
    // The handle, after what is left of the version.
    let output = greedy.0.stdout.as_mut().unwrap();
    let mut bytes = Vec::new();
    let handle = loop {
        let mut byte = [0];
        output.read_exact(&mut byte).unwrap();
        bytes.push(byte[0]);
        // Type 102, the number of the request, length and handle.
        let at = bytes.windows(5).position(|window| window == [102, 0, 0, 0, 1]);
        let field = at.and_then(|at| bytes.get(at + 5..)).filter(|field| field.len() >= 4);
        let length = field.map(|field| 4 + u32::from_be_bytes(*field.first_chunk().unwrap()) as usize);
        if let (Some(field), Some(length)) = (field, length)
            && field.len() >= length
        {
            break field[..length].to_vec();
        }
    };
    for number in 2..202_u32 {
        let offset = u64::from(number % 30) * 256_000;
        let read = packet(5, &[&number.to_be_bytes(), &handle, &offset.to_be_bytes(), &256_000_u32.to_be_bytes()]);
        input.write_all(&read).unwrap();
    }
    // The place is taken as long as the replies wait.
    assert!(!served.sftp("sync", "sync", "ls\n").status.success());
    served.wait_for("too many sessions of this user");
    drop(greedy);
    until("the place among the user's sessions", || served.sftp("sync", "sync", "ls\n").status.success());
    let over_the_same = || served.hold("sync", &["-S", "mux", "-oControlMaster=no", "-oProxyCommand=false"]).speaks();
    until("the place in the connection", over_the_same);
    drop(master);
}

#[test]
fn who_does_nothing_is_let_go_though_it_answers_that_it_is_alive() {
    let served = Served::start("", "idle_timeout = '1s'");
    let mut held = served.hold("sync", &["-oServerAliveInterval=1"]);
    assert!(held.speaks());
    let last_words = held.ended();
    assert!(last_words.contains("nothing was done for too long"), "{last_words}");
    served.wait_for("nothing was done for too long");
}

#[test]
fn a_first_packet_of_any_length_is_answered_and_who_does_nothing_after_it_is_let_go() {
    let served = Served::start("", "idle_timeout = '1s'");
    let answer = served.path("answer");
    // The longest are in more than one message of SSH.
    for length in [0, 44, 45, 100, 40_000, 200_000] {
        let mut command = served.client("ssh", "-p", "sync");
        command.args(["-s", "sync@127.0.0.1", "sftp"]).stdin(Stdio::piped()).stdout(fs::File::create(&answer).unwrap());
        let mut client = command.stderr(Stdio::null()).spawn().unwrap();
        let first = Writer::new(packet::INIT).u32(3).string(b"x@y").string(&vec![7; length]).finish();
        let mut input = client.stdin.take().unwrap();
        input.write_all(&first).unwrap();
        until(&format!("the answer to {length}"), || fs::read(&answer).unwrap().get(4) == Some(&packet::VERSION));
        until(&format!("the end of {length}"), || client.try_wait().unwrap().is_some());
    }
}

#[test]
fn a_stop_lets_work_end_and_idle_clients_go() {
    let users = ["sync", "idle"];
    let mut served = Served::with(
        &users,
        |_| String::new(),
        "stop_grace = '1h'",
        |at| users.map(|name| user(at, name, "")).concat(),
    );
    let mut idle = served.hold("idle", &[]);
    assert!(idle.speaks());
    let (_working, stop_work) = busy(&served);
    served.signal(Signal::TERM);
    assert!(idle.ended().contains("the server stops"));
    assert!(TcpStream::connect(("127.0.0.1", served.port)).is_err());
    // It would go on for an hour.
    assert_eq!(served.running(), None);
    drop(stop_work);
    assert_eq!(served.ended(), Some(0));
    assert!(!served.log().contains("cut off"), "{}", served.log());
    assert!(served.log().contains("stopped"), "{}", served.log());
}

#[test]
fn a_second_signal_stops_at_once() {
    let mut served = Served::start("", "stop_grace = '1h'");
    let (mut held, _work) = busy(&served);
    served.signal(Signal::TERM);
    served.wait_for("stopping");
    assert!(held.0.try_wait().unwrap().is_none());
    served.signal(Signal::TERM);
    assert_eq!(served.ended(), Some(4));
    served.wait_for("stopped at once");
}

/// A client that keeps its session at work until the second value is dropped.
fn busy(served: &Served) -> (Held, Arc<()>) {
    let mut held = served.hold("sync", &[]);
    assert!(held.speaks());
    let mut input = held.0.stdin.take().unwrap();
    let mut output = held.0.stdout.take().unwrap();
    let work = Arc::new(());
    let wanted = Arc::downgrade(&work);
    // Asks for the same over and over.
    let request = [0, 0, 0, 10, 16, 0, 0, 0, 1, 0, 0, 0, 1, b'/'];
    std::thread::spawn(move || while wanted.upgrade().is_some() && input.write_all(&request).is_ok() {});
    std::thread::spawn(move || std::io::copy(&mut output, &mut std::io::sink()));
    (held, work)
}

#[test]
fn a_stop_cuts_off_what_does_not_end_in_time() {
    let mut served = Served::start("", "stop_grace = '500ms'");
    let _work = busy(&served);
    served.signal(Signal::INT);
    assert_eq!(served.ended(), Some(0));
    assert!(served.log().contains("cut off"), "{}", served.log());
}

#[test]
fn s22_nothing_is_in_clear_on_the_wire_or_left_for_others_to_read() {
    let served = Served::recording();
    let secret = "patient 4711: the scan shows nothing unusual. ".repeat(2000);
    fs::create_dir(served.path("source")).unwrap();
    fs::write(served.path("source/scan-of-patient-4711"), &secret).unwrap();
    fs::set_permissions(served.path("source/scan-of-patient-4711"), fs::Permissions::from_mode(0o600)).unwrap();
    // All that goes over the wire, both ways.
    let port = served.port;
    let (through, wire) = proxy::listening(port);
    let known = fs::read_to_string(served.path("known")).unwrap();
    fs::write(served.path("known"), known.replace(&port.to_string(), &through.to_string())).unwrap();
    let mut push = std::process::Command::new(env!("CARGO_BIN_EXE_lockstep"));
    push.current_dir(served.at()).args(["push", "source", "sync@127.0.0.1:/m", "-P", &through.to_string()]);
    push.args(["--identity", "sync.key", "--known-hosts", "known"]).env("XDG_STATE_HOME", served.at());
    let pushed = push.env_remove("SSH_AUTH_SOCK").output().unwrap();
    assert!(pushed.status.success(), "{}", said(&pushed));
    assert_eq!(fs::read_to_string(served.path("sync/m/scan-of-patient-4711")).unwrap(), secret);
    let wire = wire.lock().unwrap();
    assert!(wire.len() > 1000, "{}", wire.len());
    for words in ["patient 4711", "scan-of-patient", "nothing unusual"] {
        assert!(!wire.windows(words.len()).any(|window| window == words.as_bytes()), "{words}");
    }
    // What the server made beside the files is its own.
    let mut open = vec![served.path("sync/m"), served.path("record/.lockstep")];
    let mut seen = 0;
    while let Some(path) = open.pop() {
        let metadata = fs::symlink_metadata(&path).unwrap();
        let inside = path.components().any(|part| part.as_os_str() == ".lockstep");
        if inside || metadata.is_file() {
            assert_eq!(metadata.permissions().mode() & 0o007, 0, "{}", path.display());
            seen += 1;
        }
        if metadata.is_dir() {
            open.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        }
    }
    assert!(seen >= 5, "{seen}");
    assert_eq!(fs::metadata(served.path("host")).unwrap().permissions().mode() & 0o777, 0o600);
}
