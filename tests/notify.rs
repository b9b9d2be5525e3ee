//! What the services tell systemd, and the sockets that they get from there.

use std::fs;
use std::io::Write as _;
use std::net::TcpListener;
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use crate::kit::area::lockstep;
use crate::kit::{done, ends, key, keygen, text, until};

/// What listens where systemd would, and a service that is told so.
struct Service {
    at: tempfile::TempDir,
    socket: UnixDatagram,
    heard: String,
    child: Option<Child>,
}

impl Service {
    fn new() -> Service {
        let at = tempfile::tempdir().unwrap();
        fs::create_dir(at.path().join("root")).unwrap();
        fs::create_dir(at.path().join("source")).unwrap();
        key(at.path(), "user");
        let socket = UnixDatagram::bind(at.path().join("notify")).unwrap();
        socket.set_nonblocking(true).unwrap();
        Service { at, socket, heard: String::new(), child: None }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.at.path().join(name)
    }

    fn write(&self, name: &str, content: &str) {
        fs::write(self.path(name), content.replace("AT", self.at.path().to_str().unwrap())).unwrap();
    }

    /// Runs a program with the environment that systemd gives to services.
    fn start(&mut self, program: &str, arguments: &[&str]) {
        let log = fs::File::create(self.path("log")).unwrap();
        let mut command = Command::new(program);
        command.args(arguments).arg("--config").arg(self.path("config.toml")).stderr(log).stdout(Stdio::null());
        command.env("NOTIFY_SOCKET", self.path("notify")).env("WATCHDOG_USEC", "300000").env_remove("WATCHDOG_PID");
        command.env("HOME", self.at.path()).env_remove("SSH_AUTH_SOCK");
        self.child = Some(command.spawn().unwrap());
    }

    /// Waits until something is told after this, and gives all that was told in between.
    #[track_caller]
    fn hears(&mut self, word: &str) -> String {
        until(word, || {
            let mut message = [0; 4096];
            while let Ok(length) = self.socket.recv(&mut message) {
                self.heard.push_str(std::str::from_utf8(&message[..length]).unwrap());
            }
            self.heard.contains(word)
        });
        let end = self.heard.find(word).unwrap() + word.len();
        let rest = self.heard.split_off(end);
        std::mem::replace(&mut self.heard, rest)
    }

    fn signal(&self, signal: &str) {
        let pid = self.child.as_ref().unwrap().id().to_string();
        done(&Command::new("kill").args([signal, &pid]).output().unwrap());
    }

    fn ends(&mut self) -> Option<i32> {
        self.child.take().unwrap().wait().unwrap().code()
    }

    fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap_or_default()
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
        if std::thread::panicking() {
            let _ = writeln!(std::io::stderr(), "{}\n{}", self.heard, self.log());
        }
    }
}

const SERVE: &str = "[serve]\nlisten = \"127.0.0.1:0\"\nhost_key = \"AT/host\"\n\
                     [[serve.user]]\nname = \"sync\"\nroot = \"AT/root\"\nauthorized_keys = \"AT/user.pub\"\n";
const DAEMON: &str = "[daemon]\nstate = \"AT/state\"\nsocket = \"AT/sock\"\n\
                      [[job]]\nname = \"data\"\nsource = \"AT/source\"\ntargets = [\"AT/root/copy\"]\n\
                      settle = \"0s\"\npoll = \"100ms\"\nretry_max = \"1s\"\n";

#[test]
fn the_server_says_that_it_listens_reloads_and_stops() {
    let mut service = Service::new();
    service.write("config.toml", SERVE);
    service.start(lockstep(), &["serve"]);
    service.hears("READY=1");
    service.hears("STATUS=listening on 127.0.0.1:");
    service.hears("connections: 0");
    for _ in 0..3 {
        service.hears("WATCHDOG=1");
    }
    service.write("config.toml", &SERVE.replace("root =", "rot ="));
    service.signal("-HUP");
    service.hears("RELOADING=1\nMONOTONIC_USEC=");
    service.hears("READY=1");
    let told = service.hears("rot");
    assert!(told.contains("not reloaded: "), "{told}");
    service.write("config.toml", SERVE);
    service.signal("-HUP");
    service.hears("RELOADING=1");
    let told = service.hears("connections: 0; sessions in processes of their own");
    assert!(told.contains("READY=1"), "{told}");
    service.hears("WATCHDOG=1");
    service.signal("-TERM");
    service.hears("STOPPING=1");
    service.hears("STATUS=stopping");
    assert_eq!(service.ends(), Some(0));
}

#[test]
fn the_daemon_says_how_things_stand_and_that_it_works() {
    let mut service = Service::new();
    service.write("config.toml", DAEMON);
    fs::write(service.path("source/a"), "content").unwrap();
    service.start(lockstep(), &["daemon"]);
    service.hears("READY=1");
    service.hears("STATUS=in step: 1 of 1 targets");
    for _ in 0..3 {
        service.hears("WATCHDOG=1");
    }
    service.write("config.toml", &DAEMON.replace("settle", "setle"));
    service.signal("-HUP");
    service.hears("RELOADING=1");
    service.hears("READY=1");
    service.hears("STATUS=the configuration of before stays in force: ");
    service.hears("setle");
    service.write("config.toml", DAEMON);
    service.signal("-HUP");
    service.hears("STATUS=in step: 1 of 1 targets");
    // A failure is told with its place.
    fs::remove_dir_all(service.path("root")).unwrap();
    fs::write(service.path("root"), "in the way").unwrap();
    fs::write(service.path("source/b"), "more").unwrap();
    service.hears("halted: 1");
    service.hears("root/copy: ");
    service.signal("-TERM");
    service.hears("STOPPING=1");
    assert_eq!(service.ends(), Some(0), "{}", service.log());
}

/// A program of systemd that passes sockets as a socket unit does.
fn activate(service: &mut Service, options: &[&str], port: u16) {
    let program = "systemd-socket-activate";
    let found = Command::new(program).arg("--version").output();
    done(&found.expect("systemd-socket-activate is not installed: Debian package systemd"));
    let address = format!("--listen=127.0.0.1:{port}");
    // Only what is named is passed on.
    let environment = ["-E", "NOTIFY_SOCKET", "-E", "HOME"];
    service.start(program, &[options, &environment, &[&address, lockstep(), "serve"]].concat());
    until("it to listen", || service.log().contains("Listening on"));
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

#[test]
fn a_socket_of_systemd_is_listened_on_instead_of_the_configured_address() {
    let mut service = Service::new();
    // The address of the configuration is taken: it must not be asked for.
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    service.write("config.toml", &SERVE.replace("127.0.0.1:0", &address));
    keygen(service.at.path(), &["-t", "ed25519", "-N", "", "-f", "host"]);
    let port = free_port();
    activate(&mut service, &[], port);
    let public = fs::read_to_string(service.path("host.pub")).unwrap();
    fs::write(service.path("known"), format!("[127.0.0.1]:{port} {public}")).unwrap();
    fs::write(service.path("source/a"), "content").unwrap();
    let mut push = Command::new(lockstep());
    push.args(["push", "-P", &port.to_string(), "--identity"]).arg(service.path("user"));
    push.arg("--known-hosts").arg(service.path("known")).arg(service.path("source")).arg("sync@127.0.0.1:/copy");
    push.env("HOME", service.at.path()).env_remove("SSH_AUTH_SOCK");
    done(&push.output().unwrap());
    assert_eq!(fs::read_to_string(service.path("root/copy/a")).unwrap(), "content");
    service.hears("READY=1");
    service.hears(&format!("STATUS=listening on 127.0.0.1:{port}"));
    assert!(service.log().contains("the sockets that systemd passed are used"), "{}", service.log());
    service.signal("-TERM");
    assert_eq!(service.ends(), Some(0));
}

#[test]
fn what_is_passed_and_does_not_listen_is_refused_with_the_way_out() {
    let mut service = Service::new();
    service.write("config.toml", SERVE);
    let port = free_port();
    // With Accept=yes a service gets the connection.
    activate(&mut service, &["--accept"], port);
    let _connection = std::net::TcpStream::connect(("127.0.0.1", port)).unwrap();
    until("the refusal", || service.log().contains("no Accept=yes"));
    // Not a socket at all.
    let script = format!("exec 3</dev/null; LISTEN_FDS=1 exec '{}' serve --config config.toml", lockstep());
    let output = Command::new("sh").args(["-c", &script]).current_dir(service.at.path()).output().unwrap();
    ends(&output, 2, &["descriptor 3", "is not a TCP socket that listens", "ListenStream="]);
    assert!(!text(&output).contains("listening on"));
}
