//! Push and pull with nothing but OpenSSH at the other end: its `sftp` subsystem, with and without a shell beside it.

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// An sshd with stock SFTP only, that ends with the test.
struct Sshd {
    child: Child,
    port: u16,
    at: tempfile::TempDir,
}

const SHELL: &str = "Subsystem sftp internal-sftp";
const NO_SHELL: &str = "Subsystem sftp internal-sftp\nForceCommand internal-sftp";

fn keygen(file: &Path) {
    let status = Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(file).status();
    assert!(status.expect("ssh-keygen is not installed: Debian package openssh-client").success());
}

impl Sshd {
    fn start(configuration: &str) -> Sshd {
        let at = tempfile::tempdir().unwrap();
        let path = |name: &str| at.path().join(name);
        keygen(&path("host"));
        keygen(&path("user"));
        fs::copy(path("user.pub"), path("authorized")).unwrap();
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let show = |name: &str| path(name).display().to_string();
        let config = format!(
            "Port {port}\nListenAddress 127.0.0.1\nHostKey {}\nAuthorizedKeysFile {}\nPidFile none\nUsePAM no\n\
             StrictModes no\nPasswordAuthentication no\nKbdInteractiveAuthentication no\nPermitRootLogin yes\n\
             {configuration}\n",
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

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lockstep"));
        command
            .args(arguments)
            .args(["-P", &self.port.to_string(), "--identity"])
            .arg(self.path("user"))
            .arg("--known-hosts")
            .arg(self.path("known"))
            .env("XDG_STATE_HOME", self.path("state"))
            .env_remove("SSH_AUTH_SOCK");
        command
    }

    fn remote(&self, name: &str) -> String {
        let user = String::from_utf8(Command::new("id").arg("-un").output().unwrap().stdout).unwrap();
        format!("{}@127.0.0.1:{}", user.trim(), self.path(name).display())
    }

    /// Pushes `source` to `target`, with further arguments.
    fn push(&self, arguments: &[&str]) -> Output {
        let source = self.path("source").display().to_string();
        let all: Vec<&str> = ["push", "-v"].iter().chain(arguments).copied().collect();
        self.command(&all).arg(source).arg(self.remote("target")).output().unwrap()
    }

    fn pushed(&self, arguments: &[&str]) -> String {
        let output = self.push(arguments);
        assert!(output.status.success(), "{}", text(&output));
        text(&output)
    }

    fn pull(&self, arguments: &[&str]) -> Output {
        let all: Vec<&str> = ["pull", "-v"].iter().chain(arguments).copied().collect();
        self.command(&all).arg(self.remote("target")).arg(self.path("copy")).output().unwrap()
    }

    fn same(&self) {
        assert_same(&self.path("source"), &self.path("target"));
    }
}

impl Drop for Sshd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// rsync's opinion, by content and metadata; times to the second, and not those of links and of the root.
fn assert_same(a: &Path, b: &Path) {
    let output = Command::new("rsync")
        .args(["-naHic", "--delete", "--modify-window=1", "--exclude=/.lockstep"])
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

/// A tree with something of everything.
fn sample(at: &Path) {
    fs::create_dir_all(at.join("checkpoint-1/shards")).unwrap();
    fs::create_dir_all(at.join("empty/deeper")).unwrap();
    for number in 0..300 {
        fs::write(at.join(format!("checkpoint-1/shards/{number}.txt")), format!("{number}").repeat(number)).unwrap();
    }
    let large: Vec<u8> = (0..5_000_000u32).map(|at| (at * 7 / 3) as u8).collect();
    fs::write(at.join("checkpoint-1/model.safetensors"), large).unwrap();
    fs::write(at.join("checkpoint-1/_SUCCESS"), "").unwrap();
    fs::write(at.join("train.py"), "print('x')\n").unwrap();
    fs::set_permissions(at.join("train.py"), fs::Permissions::from_mode(0o755)).unwrap();
    fs::set_permissions(at.join("empty"), fs::Permissions::from_mode(0o2550)).unwrap();
    fs::set_permissions(at.join("empty"), fs::Permissions::from_mode(0o550)).unwrap();
    fs::hard_link(at.join("train.py"), at.join("same.py")).unwrap();
    symlink("checkpoint-1", at.join("latest")).unwrap();
    let sparse = fs::File::create(at.join("sparse")).unwrap();
    sparse.write_all_at(b"data", 2_000_000).unwrap();
    sparse.set_len(4_000_000).unwrap();
}

fn verified(root: &Path) {
    let output = Command::new(env!("CARGO_BIN_EXE_lockstep")).args(["manifest", "verify"]).arg(root).output().unwrap();
    assert!(output.status.success(), "{}", text(&output));
}

#[test]
fn s14_s15_a_tree_of_everything_arrives_by_a_stock_server_and_comes_back() {
    for (configuration, said) in [(SHELL, "hashed there"), (NO_SHELL, "read back")] {
        let sshd = Sshd::start(configuration);
        sample(&sshd.path("source"));
        let first = sshd.pushed(&[]);
        assert!(first.contains("the subsystem 'sftp'") && first.contains(said), "{first}");
        sshd.same();
        verified(&sshd.path("target"));
        assert!(!sshd.path(".target.lockstep").exists() && !sshd.path("target/.lockstep/staging/sftp").exists());

        let again = sshd.pushed(&[]);
        assert!(again.contains("nothing to do"), "{again}");

        let pulled = sshd.pull(&[]);
        assert!(pulled.status.success(), "{}", text(&pulled));
        assert_same(&sshd.path("target"), &sshd.path("copy"));
        verified(&sshd.path("copy"));
        let again = sshd.pull(&[]);
        assert!(text(&again).contains("nothing to do"), "{}", text(&again));
    }
}
