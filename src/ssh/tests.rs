//! Against OpenSSH's own server on a loopback port, with keys and configuration of its own.

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;

use super::{Passphrase, SshOptions, SshRemote};
use crate::endpoint::link::{ConnectError, Link, Remote, Way};
use crate::error::Exit;

const SSHD: &str = "/usr/sbin/sshd";

struct Sshd {
    directory: tempfile::TempDir,
    port: u16,
    process: Child,
}

impl Drop for Sshd {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn keygen(path: &Path, passphrase: &str) {
    let kind: &[&str] = if path.ends_with("rsa") { &["rsa", "-b", "3072"] } else { &["ed25519"] };
    let run = Command::new("ssh-keygen")
        .args(["-q", "-N", passphrase, "-t"])
        .args(kind)
        .arg("-f")
        .arg(path)
        .stdin(Stdio::null())
        .status()
        .unwrap();
    assert!(run.success());
}

impl Sshd {
    /// `None` where there is no sshd to test against.
    fn start() -> Option<Sshd> {
        if !Path::new(SSHD).exists() {
            return None;
        }
        if rustix::process::getuid().is_root() {
            // What Debian's service unit makes at each start.
            let _ = fs::DirBuilder::new().recursive(true).mode(0o755).create("/run/sshd");
        }
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        for (name, passphrase) in
            [("host", ""), ("rsa", ""), ("other", ""), ("good", ""), ("wrong", ""), ("locked", "open sesame")]
        {
            keygen(&at(name), passphrase);
        }
        let keys = ["good.pub", "locked.pub"].map(|name| fs::read_to_string(at(name)).unwrap()).concat();
        fs::write(at("authorized_keys"), keys).unwrap();
        fs::set_permissions(at("authorized_keys"), fs::Permissions::from_mode(0o600)).unwrap();
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let config = format!(
            "Port {port}\nListenAddress 127.0.0.1\nHostKey {0}/host\nHostKey {0}/rsa\nAuthorizedKeysFile {0}/authorized_keys\n\
             PidFile none\nStrictModes no\nUsePAM no\nPasswordAuthentication no\nPermitRootLogin yes\n\
             Subsystem sftp internal-sftp\n",
            directory.path().display()
        );
        fs::write(at("config"), config).unwrap();
        let process = Command::new(SSHD)
            .args(["-D", "-e", "-f"])
            .arg(at("config"))
            .stdin(Stdio::null())
            .stderr(fs::File::create(at("log")).unwrap())
            .spawn()
            .unwrap();
        let server = Sshd { directory, port, process };
        let until = Instant::now() + Duration::from_secs(20);
        while std::net::TcpStream::connect(("127.0.0.1", port)).is_err() {
            assert!(Instant::now() < until, "{}", fs::read_to_string(server.at("log")).unwrap());
            std::thread::sleep(Duration::from_millis(50));
        }
        server.trust("host");
        Some(server)
    }

    fn at(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn trust(&self, key: &str) {
        let key = fs::read_to_string(self.at(&format!("{key}.pub"))).unwrap();
        fs::write(self.at("known_hosts"), format!("[127.0.0.1]:{} {key}", self.port)).unwrap();
    }

    fn remote(&self, key: &str, passphrase: Option<Passphrase>) -> SshRemote {
        SshRemote::new(self.options(key, passphrase)).unwrap()
    }

    fn options(&self, key: &str, passphrase: Option<Passphrase>) -> SshOptions {
        let user = uzers::get_current_username().unwrap().into_string().unwrap();
        SshOptions {
            identity_files: vec![self.at(key)],
            known_hosts: vec![self.at("known_hosts")],
            passphrase,
            ..SshOptions::new(&user, "127.0.0.1", self.port)
        }
    }
}

fn refused(remote: &SshRemote) -> ConnectError {
    match remote.open(&Way::SftpSubsystem, 0) {
        Ok(_) => panic!("was let in"),
        Err(error) => error,
    }
}

fn receive(link: &Arc<dyn Link>, length: usize) -> Vec<u8> {
    let mut received = Vec::new();
    while received.len() < length {
        received.extend_from_slice(&link.recv().unwrap().unwrap());
    }
    received
}

#[test]
fn a_stock_sshd_answers_and_trust_is_strict() {
    let Some(server) = Sshd::start() else { return };
    let log = || fs::read_to_string(server.at("log")).unwrap();
    let remote = server.remote("good", None);
    let link = remote.open(&Way::SftpSubsystem, 0).unwrap_or_else(|error| panic!("{error}\n{}", log()));
    link.send(Bytes::from_static(&[0, 0, 0, 5, 1, 0, 0, 0, 3])).unwrap();
    let version = receive(&link, 9);
    assert_eq!(version[4..9], [2, 0, 0, 0, 3]);
    link.close();
    assert!(link.recv().unwrap().is_none());

    let error = remote.open(&Way::LockstepSubsystem, 0).err().unwrap();
    assert!(error.not_offered, "{error}");

    // Bulk in both directions at once, over a second connection.
    let echo = remote.open(&Way::LockstepExec("cat".into()), 1).unwrap();
    let sender = {
        let echo = Arc::clone(&echo);
        std::thread::spawn(move || {
            for _ in 0..64 {
                echo.send(Bytes::from(vec![7; 512 * 1024])).unwrap();
            }
            echo.close();
        })
    };
    assert!(receive(&echo, 32 << 20).iter().all(|byte| *byte == 7));
    sender.join().unwrap();
    assert!(echo.recv().unwrap().is_none());
    let failing = remote.exec("echo no such thing >&2; exit 3", 0).unwrap();
    let message = failing.recv().unwrap_err().to_string();
    assert!(message.contains("status 3") && message.contains("no such thing"), "{message}");

    let passphrase: Passphrase = Arc::new(|_| Some("open sesame".into()));
    server.remote("locked", Some(passphrase)).open(&Way::SftpSubsystem, 0).unwrap();
    let error = refused(&server.remote("locked", None));
    assert!(error.exit == Exit::Trust && error.message.contains("passphrase"), "{error}");
    let error = refused(&server.remote("wrong", None));
    assert!(error.exit == Exit::Trust && error.message.contains("not accepted"), "{error}");

    server.trust("other");
    let error = refused(&server.remote("good", None));
    assert!(error.exit == Exit::Trust && error.message.contains("HOST KEY CHANGED"), "{error}");
    fs::remove_file(server.at("known_hosts")).unwrap();
    let error = refused(&server.remote("good", None));
    assert!(error.exit == Exit::Trust && error.message.contains("unknown host key"), "{error}");
}

#[test]
fn the_agent_logs_in_and_the_key_on_file_is_asked_for() {
    let Some(server) = Sshd::start() else { return };
    // Only the RSA key is on file, though the host would rather show another.
    server.trust("rsa");
    let socket = server.at("agent");
    let mut agent = Command::new("ssh-agent").arg("-D").arg("-a").arg(&socket).stdout(Stdio::null()).spawn().unwrap();
    let until = Instant::now() + Duration::from_secs(20);
    while !socket.exists() && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(20));
    }
    let added = ["wrong", "good"].map(|key| {
        Command::new("ssh-add").arg("-q").arg(server.at(key)).env("SSH_AUTH_SOCK", &socket).status().unwrap().success()
    });
    let mut options = server.options("nowhere", None);
    options.agent_socket = Some(socket);
    let opened = SshRemote::new(options.clone()).unwrap().open(&Way::SftpSubsystem, 0).map(|_| ());
    let _ = agent.kill();
    let _ = agent.wait();
    assert_eq!(added, [true, true]);
    opened.unwrap();
    let error = refused(&SshRemote::new(options).unwrap());
    assert!(error.exit == Exit::Trust && error.message.contains("the agent at"), "{error}");
}

#[test]
fn names_that_are_no_hosts_are_refused() {
    for host in ["", "-oProxyCommand=x", "a b", "a,b", "*", "[h]"] {
        assert_eq!(SshRemote::new(SshOptions::new("u", host, 22)).err().unwrap().exit, Exit::Usage, "{host}");
    }
}
