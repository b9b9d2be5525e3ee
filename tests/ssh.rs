//! Push and pull through OpenSSH's server on loopback, with keys and a configuration of its own.

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// An sshd that ends with the test.
struct Sshd {
    child: Child,
    port: u16,
    at: tempfile::TempDir,
}

fn keygen(file: &Path) {
    let status = Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(file).status();
    assert!(status.expect("ssh-keygen is not installed: Debian package openssh-client").success());
}

impl Sshd {
    fn start() -> Sshd {
        let at = tempfile::tempdir().unwrap();
        let path = |name: &str| at.path().join(name);
        keygen(&path("host"));
        keygen(&path("user"));
        fs::copy(path("user.pub"), path("authorized")).unwrap();
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let show = |name: &str| path(name).display().to_string();
        let lockstep = env!("CARGO_BIN_EXE_lockstep");
        let config = format!(
            "Port {port}\nListenAddress 127.0.0.1\nHostKey {}\nAuthorizedKeysFile {}\nPidFile none\nUsePAM no\n\
             StrictModes no\nPasswordAuthentication no\nKbdInteractiveAuthentication no\nPermitRootLogin yes\n\
             Subsystem lockstep {lockstep} sftp-server\nSubsystem sftp internal-sftp\n",
            show("host"),
            show("authorized"),
        );
        fs::write(path("config"), config).unwrap();
        fs::create_dir_all("/run/sshd").ok();
        let child = Command::new("/usr/sbin/sshd")
            .args(["-D", "-e", "-f"])
            .arg(path("config"))
            .stderr(Stdio::null())
            .spawn()
            .expect("sshd is not installed: Debian package openssh-server");
        let host_key = fs::read_to_string(path("host.pub")).unwrap();
        let key: Vec<&str> = host_key.split(' ').take(2).collect();
        fs::write(path("known"), format!("[127.0.0.1]:{port} {}\n", key.join(" "))).unwrap();
        let started = Instant::now();
        while std::net::TcpStream::connect(("127.0.0.1", port)).is_err() {
            assert!(started.elapsed() < Duration::from_secs(20), "sshd does not listen");
            std::thread::sleep(Duration::from_millis(20));
        }
        Sshd { child, port, at }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.at.path().join(name)
    }

    fn lockstep(&self, arguments: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_lockstep"))
            .args(arguments)
            .args(["-P", &self.port.to_string(), "--identity"])
            .arg(self.path("user"))
            .arg("--known-hosts")
            .arg(self.path("known"))
            .env("XDG_STATE_HOME", self.path("state"))
            .env_remove("SSH_AUTH_SOCK")
            .output()
            .unwrap()
    }

    fn remote(&self, name: &str) -> String {
        let user = String::from_utf8(Command::new("id").arg("-un").output().unwrap().stdout).unwrap();
        format!("{}@127.0.0.1:{}", user.trim(), self.path(name).display())
    }
}

impl Drop for Sshd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn sample(at: &Path) {
    fs::create_dir_all(at.join("checkpoint-1/shards")).unwrap();
    fs::create_dir(at.join("empty")).unwrap();
    for number in 0..300 {
        fs::write(at.join(format!("checkpoint-1/shards/{number}.txt")), format!("{number}").repeat(number)).unwrap();
    }
    fs::write(at.join("checkpoint-1/model.safetensors"), vec![5; 5_000_000]).unwrap();
    fs::write(at.join("train.py"), "print('x')\n").unwrap();
    fs::set_permissions(at.join("train.py"), fs::Permissions::from_mode(0o755)).unwrap();
    std::os::unix::fs::symlink("checkpoint-1", at.join("latest")).unwrap();
}

fn assert_same(a: &Path, b: &Path) {
    let output = Command::new("rsync")
        .args(["-naHic", "--delete", "--exclude=/.lockstep"])
        .args([a.join(""), b.join("")])
        .output()
        .expect("rsync is not installed: Debian package rsync");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let different: Vec<_> = text.lines().filter(|line| !line.ends_with(" ./") && !line.starts_with(".L..t")).collect();
    assert!(output.status.success() && different.is_empty(), "{different:#?}");
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

#[test]
fn s15_s17_s29_push_and_pull_through_a_subsystem_of_sshd() {
    let sshd = Sshd::start();
    sample(&sshd.path("source"));
    let source = sshd.path("source").display().to_string();
    let pushed = sshd.lockstep(&["push", "-v", &source, &sshd.remote("target")]);
    assert!(pushed.status.success(), "{}", text(&pushed));
    assert!(text(&pushed).contains("subsystem"), "{}", text(&pushed));
    assert_same(&sshd.path("source"), &sshd.path("target"));

    let again = sshd.lockstep(&["push", "-i", &source, &sshd.remote("target")]);
    assert!(again.status.success() && text(&again).contains("nothing to do"), "{}", text(&again));

    // s19: pull, then check.
    let copy = sshd.path("copy").display().to_string();
    let pulled = sshd.lockstep(&["pull", &sshd.remote("target"), &copy]);
    assert!(pulled.status.success(), "{}", text(&pulled));
    assert_same(&sshd.path("source"), &sshd.path("copy"));
    let verified = Command::new(env!("CARGO_BIN_EXE_lockstep")).args(["manifest", "verify", &copy]).output().unwrap();
    assert!(verified.status.success(), "{}", text(&verified));
    fs::write(sshd.path("copy/train.py"), "print('y')\n").unwrap();
    let verified = Command::new(env!("CARGO_BIN_EXE_lockstep")).args(["manifest", "verify", &copy]).output().unwrap();
    assert_eq!(verified.status.code(), Some(1), "{}", text(&verified));
}

#[test]
fn h52_an_unknown_host_is_refused_and_a_wrong_key_too() {
    let sshd = Sshd::start();
    sample(&sshd.path("source"));
    let source = sshd.path("source").display().to_string();
    let known = fs::read(sshd.path("known")).unwrap();
    fs::write(sshd.path("known"), "").unwrap();
    let unknown = sshd.lockstep(&["push", &source, &sshd.remote("target")]);
    assert_eq!(unknown.status.code(), Some(3), "{}", text(&unknown));
    fs::write(sshd.path("known"), known).unwrap();
    fs::write(sshd.path("authorized"), "").unwrap();
    let refused = sshd.lockstep(&["push", &source, &sshd.remote("target")]);
    assert_eq!(refused.status.code(), Some(3), "{}", text(&refused));
    assert!(!sshd.path("target").exists());
}

#[test]
fn s14_stock_sftp_works_against_the_server() {
    let at = tempfile::tempdir().unwrap();
    fs::write(at.path().join("local"), vec![9; 300_000]).unwrap();
    fs::create_dir(at.path().join("root")).unwrap();
    let batch = "mkdir dir\nput local dir/file\nrename dir/file dir/renamed\nchmod 640 dir/renamed\nls -l dir\n\
                 get dir/renamed back\nsymlink renamed dir/link\nln dir/renamed dir/hard\nrm dir/link\nbye\n";
    fs::write(at.path().join("batch"), batch).unwrap();
    let server = format!("{} sftp-server --root {}", env!("CARGO_BIN_EXE_lockstep"), at.path().join("root").display());
    let output = Command::new("sftp")
        .current_dir(at.path())
        .args(["-b", "batch", "-D", &server])
        .output()
        .expect("sftp is not installed: Debian package openssh-client");
    assert!(output.status.success(), "{}", text(&output));
    assert_eq!(fs::read(at.path().join("back")).unwrap(), fs::read(at.path().join("local")).unwrap());
    let mode = fs::metadata(at.path().join("root/dir/renamed")).unwrap().permissions().mode();
    assert_eq!(mode & 0o7777, 0o640);
    assert!(text(&output).contains("renamed"));
}
