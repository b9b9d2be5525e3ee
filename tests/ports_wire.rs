//! The port that an agent listens on, with stock clients: who is let in, to what, and for how long.

use std::fs;
use std::io::Read as _;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::ops::RangeInclusive;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use lockstep::wire::buffer::Reader;
use lockstep::wire::extension::{EXTENDED, EXTENDED_REPLY, put_string};
use lockstep::wire::sftp::{Status, packet};

use crate::kit::ports::{connected, free, listening, named, openers};
use crate::kit::raw::Server;
use crate::kit::{key, public, text, until};

/// An agent as sshd starts it for a client at 127.0.0.1, and keys.
struct Area {
    at: tempfile::TempDir,
    ports: RangeInclusive<u16>,
    agent: Option<Server>,
}

/// An agent with these options and this of its environment.
fn agent(connection: Option<&str>, options: &[&str]) -> Server {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lockstep"));
    command.arg("sftp-server").args(options).env_remove("SSH_CONNECTION").env_remove("LOCKSTEP_CONFIG");
    command.envs(connection.map(|connection| ("SSH_CONNECTION", connection)));
    Server::spawn(&mut command)
}

fn offers(server: &Server, name: &str) -> bool {
    let name = format!("{name}@lockstep.internal");
    server.version.windows(name.len()).any(|window| window == name.as_bytes())
}

fn listen(server: &mut Server, key: &str) -> Result<(u16, String), (Status, String)> {
    let mut body = Vec::new();
    put_string(&mut body, key.as_bytes());
    let (kind, reply) = server.ask(EXTENDED, |w| w.string(b"listen@lockstep.internal").bytes(&body));
    let mut fields = Reader(&reply);
    let number = fields.u32().unwrap();
    let said = String::from_utf8(fields.string().unwrap().to_vec()).unwrap();
    match kind {
        EXTENDED_REPLY => Ok((number.try_into().unwrap(), said)),
        packet::STATUS => Err((Status::from_code(number), said)),
        other => panic!("an answer of type {other}"),
    }
}

impl Area {
    fn new() -> Area {
        let at = tempfile::tempdir().unwrap();
        ["mine", "strange"].iter().for_each(|name| key(at.path(), name));
        let ports = free(3);
        let agent = agent(Some("127.0.0.1 50000 127.0.0.1 22"), &["--data-ports", &named(&ports)]);
        Area { at, ports, agent: Some(agent) }
    }

    fn key(&self, name: &str) -> String {
        public(&self.at.path().join(format!("{name}.pub")))
    }

    /// The agent listens for the key `mine`; the port. Its key is known from now on.
    fn listens(&mut self) -> u16 {
        let key = self.key("mine");
        let (port, host) = listen(self.agent.as_mut().unwrap(), &key).unwrap();
        assert!(self.ports.contains(&port) && host.starts_with("ssh-ed25519 "), "{port} {host}");
        fs::write(self.at.path().join("known"), format!("[127.0.0.1]:{port} {host}\n")).unwrap();
        port
    }

    /// OpenSSH's client with what it needs to get in, and these arguments.
    fn ssh(&self, port: u16, key: &str, user: &str, more: &[&str]) -> Command {
        let at = |name: &str| self.at.path().join(name).display().to_string();
        let mut ssh = Command::new("ssh");
        ssh.args(["-F", "none", "-p", &port.to_string(), "-i", &at(key), "-l", user]);
        for option in ["IdentitiesOnly=yes", "IdentityAgent=none", "BatchMode=yes", "StrictHostKeyChecking=yes"] {
            ssh.args(["-o", option]);
        }
        ssh.args(["-o", &format!("UserKnownHostsFile={}", at("known")), "-o", "ConnectTimeout=5"]);
        ssh.args(more).stdin(Stdio::null());
        ssh
    }

    fn says(&self, port: u16, more: &[&str]) -> Output {
        self.ssh(port, "mine", "lockstep", more).output().unwrap()
    }
}

fn connect(port: u16) -> TcpStream {
    TcpStream::connect(SocketAddr::from((Ipv4Addr::LOCALHOST, port))).unwrap()
}

/// Whether somebody there says anything.
fn speaks(mut stream: &TcpStream) -> bool {
    stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let mut line = [0; 4];
    stream.read_exact(&mut line).is_ok_and(|()| &line == b"SSH-")
}

#[test]
fn a_port_is_offered_where_it_is_allowed_and_it_is_known_who_came_where() {
    let ports = named(&free(3));
    let allowed = ["--data-ports", ports.as_str()];
    let came = Some("127.0.0.1 50000 127.0.0.1 22");
    for (connection, options, offered) in [
        (came, &allowed[..], true),
        (came, &[], false),
        (None, &allowed, false),
        (Some("127.0.0.1 50000 0.0.0.0 22"), &allowed, false),
        (Some("UNKNOWN 65535 UNKNOWN 65535"), &allowed, false),
    ] {
        let mut server = agent(connection, options);
        assert_eq!(offers(&server, "listen"), offered, "{connection:?} {options:?}");
        assert!(!offers(&server, "attach"));
        if !offered {
            let (_, said) = listen(&mut server, "ssh-ed25519 AAAA").unwrap_err();
            assert!(said.contains("it was not offered"), "{said}");
        }
    }
}

#[test]
fn nobody_listens_before_it_is_asked_for_and_nobody_does_afterwards() {
    let mut area = Area::new();
    assert_eq!(listening(&area.ports), 0);
    let key = area.key("mine");
    // What is no key of that kind is none; the session goes on.
    for wrong in ["", "ssh-ed25519 AAAA", "ssh-rsa AAAAB3NzaC1yc2EAAAADAQABAAAAgQ=="] {
        let (_, said) = listen(area.agent.as_mut().unwrap(), wrong).unwrap_err();
        assert!(said.contains("the key is none of Ed25519"), "{said}");
    }
    let port = area.listens();
    assert_eq!(listening(&area.ports), 1);
    let (_, said) = listen(area.agent.as_mut().unwrap(), &key).unwrap_err();
    assert!(said.contains("was asked to listen already"), "{said}");
    assert_eq!(listening(&area.ports), 1);
    // Nowhere but at the address that the client came to.
    assert!(TcpStream::connect(("127.0.0.2", port)).is_err());
    let open = connect(port);
    assert!(speaks(&open));
    drop(area.agent.take());
    until("the port to be closed", || listening(&area.ports) + connected(&area.ports) == 0);
    until("who listened to end", || openers(&area.ports).is_empty());
}

#[test]
fn h58_the_one_key_gets_in_and_nobody_else() {
    let mut area = Area::new();
    let port = area.listens();
    let subsystem = ["-s", "127.0.0.1", "lockstep"];
    for (key, user) in [("strange", "lockstep"), ("mine", "root"), ("mine", "")] {
        let user = if user.is_empty() { "Lockstep" } else { user };
        let output = area.ssh(port, key, user, &subsystem).output().unwrap();
        assert!(text(&output).contains("Permission denied (publickey)"), "{key} {user}: {}", text(&output));
    }
    let passwords = ["-o", "PreferredAuthentications=password,keyboard-interactive", "-s", "127.0.0.1", "lockstep"];
    assert!(text(&area.says(port, &passwords)).contains("Permission denied (publickey)"));
    // And with it the agent answers, of the same process: it offers what joins a run, and no further port.
    let session = Server::spawn(&mut area.ssh(port, "mine", "lockstep", &subsystem));
    assert!(offers(&session, "attach") && offers(&session, "hello") && !offers(&session, "listen"));
}

#[test]
fn h59_a_further_connection_has_one_session_and_nothing_else() {
    let mut area = Area::new();
    let port = area.listens();
    let refused = |more: &[&str], words: &[&str]| {
        let output = area.says(port, more);
        let text = text(&output);
        assert!(!output.status.success() && words.iter().any(|word| text.contains(word)), "{more:?}: {text}");
    };
    refused(&["127.0.0.1", "true"], &["exec request failed"]);
    refused(&["127.0.0.1", "lockstep sftp-server"], &["exec request failed"]);
    refused(&["127.0.0.1"], &["shell request failed"]);
    refused(&["-tt", "127.0.0.1"], &["PTY allocation request failed", "shell request failed"]);
    refused(&["-s", "127.0.0.1", "sftp"], &["subsystem request failed"]);
    refused(&["-W", "127.0.0.1:22", "127.0.0.1"], &["administratively prohibited", "forwarding failed"]);
    refused(
        &["-N", "-o", "ExitOnForwardFailure=yes", "-R", "0:127.0.0.1:22", "127.0.0.1"],
        &["remote port forwarding failed"],
    );
    // One session, and after it has begun no other over the same connection.
    let mux = area.at.path().join("mux").display().to_string();
    let first = ["-o", "ControlMaster=yes", "-S", &mux, "-s", "127.0.0.1", "lockstep"];
    let session = Server::spawn(&mut area.ssh(port, "mine", "lockstep", &first));
    assert!(offers(&session, "attach"));
    let second = area
        .says(port, &["-o", "ControlMaster=no", "-S", &mux, "-o", "ProxyCommand=false", "-s", "127.0.0.1", "lockstep"]);
    assert!(!second.status.success() && text(&second).contains("open refused by peer"), "{}", text(&second));
    drop(session);
}

#[test]
fn s16_who_comes_from_another_address_is_not_answered() {
    let mut area = Area::new();
    let port = area.listens();
    let from = |address: &str| area.says(port, &["-b", address, "-s", "127.0.0.1", "lockstep"]);
    let other = from("127.0.0.3");
    assert!(!other.status.success() && !text(&other).contains("Permission denied"), "{}", text(&other));
    assert!(text(&other).contains("onnection"), "{}", text(&other));
    // The session ends with its input, which is empty.
    let own = from("127.0.0.1");
    assert!(own.status.success(), "{}", text(&own));
}

#[test]
fn h43_who_does_not_log_in_keeps_a_place_for_some_seconds_and_there_are_not_many() {
    let mut area = Area::new();
    let port = area.listens();
    let begun = Instant::now();
    let held: Vec<TcpStream> = (0..16).map(|_| connect(port)).collect();
    assert!(held.iter().all(speaks));
    assert!(!speaks(&connect(port)), "there is no end of them");
    until("them to be let go", || {
        let mut last = &held[15];
        last.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        matches!(last.read(&mut [0; 4096]), Ok(0))
    });
    let held_for = begun.elapsed();
    assert!(held_for > Duration::from_secs(8) && held_for < Duration::from_secs(16), "{held_for:?}");
    drop(held);
    let session = area.says(port, &["-s", "127.0.0.1", "lockstep"]);
    assert!(session.status.success(), "{}", text(&session));
}

#[test]
fn h57_a_client_without_strict_key_exchange_is_refused_at_the_port() {
    let mut area = Area::new();
    let port = area.listens();
    let asyncssh = "import asyncssh, asyncio, sys\n\
                    import asyncssh.connection as c\n\
                    c.SSHClientConnection._get_extra_kex_algs = lambda self: [b'ext-info-c']\n\
                    async def go():\n\
                    \x20   await asyncssh.connect('127.0.0.1', int(sys.argv[1]), username='lockstep', client_keys=[sys.argv[2]], \
                    known_hosts=None, config=None)\n\
                    asyncio.run(go())\n";
    let mine = area.at.path().join("mine").display().to_string();
    let output = Command::new("/usr/bin/python3").args(["-c", asyncssh, &port.to_string(), &mine]).output().unwrap();
    assert!(!output.status.success() && text(&output).contains("strict key exchange"), "{}", text(&output));
}
