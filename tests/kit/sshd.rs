//! OpenSSH's server on loopback with keys and a configuration of its own, and its agent.

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use super::{account, key, public, text, until};

/// An sshd that ends with the test.
pub(crate) struct Sshd {
    child: Child,
    pub(crate) port: u16,
    pub(crate) at: tempfile::TempDir,
}

impl Sshd {
    pub(crate) fn start() -> Sshd {
        Sshd::with(|_| String::new())
    }

    /// With lines of configuration that come before the usual ones, and so win; made when `host` and `user` are there.
    pub(crate) fn with(first: impl FnOnce(&Path) -> String) -> Sshd {
        Sshd::of(tempfile::tempdir().unwrap(), None, |at| {
            let lockstep = env!("CARGO_BIN_EXE_lockstep");
            let there = at.join("there");
            format!(
                "{}\nSubsystem lockstep {lockstep} sftp-server\nSubsystem sftp internal-sftp -d {}",
                first(at),
                there.display()
            )
        })
    }

    /// With these lines alone beside what every one needs: its subsystems are to be named.
    pub(crate) fn only(configuration: &str) -> Sshd {
        Sshd::of(tempfile::tempdir().unwrap(), None, |_| configuration.to_owned())
    }

    /// The same, with a file system of its own of so many bytes at `small`, which nobody else sees.
    pub(crate) fn small(bytes: u64, configuration: &str) -> Sshd {
        let at = tempfile::tempdir().unwrap();
        let small = at.path().join("small");
        fs::create_dir(&small).unwrap();
        let mount = format!("mount -t tmpfs -o size={bytes} tmpfs '{}' && exec \"$@\"", small.display());
        Sshd::of(at, Some(&mount), |_| configuration.to_owned())
    }

    /// In this directory, `within` a script that runs what follows it, with lines that are made when the keys are there.
    pub(crate) fn of(at: tempfile::TempDir, within: Option<&str>, lines: impl FnOnce(&Path) -> String) -> Sshd {
        let path = |name: &str| at.path().join(name);
        for name in ["host", "user"] {
            key(at.path(), name);
        }
        fs::copy(path("user.pub"), path("authorized")).unwrap();
        // The home directory of the account, as far as SFTP can tell.
        fs::create_dir(path("there")).unwrap();
        let lines = lines(at.path());
        let show = |name: &str| path(name).display().to_string();
        let config = format!(
            "{lines}\nListenAddress 127.0.0.1\nHostKey {}\nAuthorizedKeysFile {}\nPidFile none\nUsePAM no\nStrictModes no\n\
             PasswordAuthentication no\nKbdInteractiveAuthentication no\nPermitRootLogin yes\nLogLevel VERBOSE\n",
            show("host"),
            show("authorized"),
        );
        fs::write(path("config"), config).unwrap();
        fs::create_dir_all("/run/sshd").ok();
        // RACE: a port that was free may be taken by another test before sshd has it; then it ends, and gets another.
        for _ in 0..10 {
            let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
            // A mount is seen by the processes below it alone, and goes with them.
            let mut command = match within {
                Some(script) => {
                    let mut unshare = Command::new("unshare");
                    let who: &[&str] = if rustix::process::geteuid().is_root() { &[] } else { &["--map-root-user"] };
                    unshare.args(who).args(["--mount", "sh", "-c", script, "sh", "/usr/sbin/sshd"]);
                    unshare
                }
                None => Command::new("/usr/sbin/sshd"),
            };
            let mut child = command
                .args(["-D", "-e", "-p", &port.to_string(), "-f"])
                .arg(path("config"))
                .stdin(Stdio::null())
                .stderr(fs::File::create(path("log")).unwrap())
                .spawn()
                .expect("sshd or unshare is not installed: Debian packages openssh-server, util-linux");
            let log = || fs::read_to_string(path("log")).unwrap();
            let started = Instant::now();
            while !log().contains("Server listening on") && child.try_wait().unwrap().is_none() {
                assert!(started.elapsed() < Duration::from_secs(20), "sshd does not listen: {}", log());
                std::thread::sleep(Duration::from_millis(10));
            }
            if log().contains("Server listening on") {
                fs::write(path("known"), format!("[127.0.0.1]:{port} {}\n", public(&path("host.pub")))).unwrap();
                return Sshd { child, port, at };
            }
            assert!(log().contains("Address already in use"), "sshd has ended: {}", log());
        }
        panic!("no port for sshd");
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap()
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.at.path().join(name)
    }

    /// How its own processes' files are reached from here, mounts included.
    pub(crate) fn seen(&self, name: &str) -> PathBuf {
        let root = PathBuf::from(format!("/proc/{}/root", self.child.id()));
        root.join(self.path(name).strip_prefix("/").unwrap())
    }

    /// A command among its mounts.
    pub(crate) fn within(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["-t", &self.child.id().to_string(), "-m", program]);
        command
    }

    /// A lockstep that knows nothing of this machine's user.
    pub(crate) fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lockstep"));
        command
            .current_dir(self.at.path())
            .env("HOME", self.path("home"))
            .env("XDG_STATE_HOME", self.path("state"))
            .env_remove("SSH_AUTH_SOCK")
            .stdin(Stdio::null());
        command
    }

    pub(crate) fn run(&self, arguments: &[&str]) -> Output {
        self.command().args(arguments).output().unwrap()
    }

    pub(crate) fn lockstep(&self, arguments: &[&str]) -> Output {
        let port = self.port.to_string();
        self.run(&[arguments, &["-P", &port, "--identity", "user", "--known-hosts", "known"]].concat())
    }

    pub(crate) fn remote(&self, name: &str) -> String {
        format!("{}@127.0.0.1:{}", account(), self.path(name).display())
    }

    /// Pushes a small tree with these options; whether it arrived.
    pub(crate) fn push(&self, options: &[&str]) -> Output {
        fs::create_dir_all(self.path("small")).unwrap();
        fs::write(self.path("small/file"), "content").unwrap();
        fs::remove_dir_all(self.path("arrived")).ok();
        let output = self.run(&[&["push", "small", &self.remote("arrived")], options].concat());
        assert_eq!(output.status.success(), self.path("arrived/file").exists(), "{}", text(&output));
        output
    }
}

impl Drop for Sshd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// An ssh-agent that ends with the test.
pub(crate) struct Agent {
    child: Child,
    at: PathBuf,
    pub(crate) socket: PathBuf,
}

impl Agent {
    pub(crate) fn start(at: &Path) -> Agent {
        let socket = at.join("agent");
        let child = Command::new("ssh-agent").arg("-D").arg("-a").arg(&socket).stdout(Stdio::null()).spawn();
        let child = child.expect("ssh-agent is not installed: Debian package openssh-client");
        until("the agent", || std::os::unix::net::UnixStream::connect(&socket).is_ok());
        Agent { child, at: at.to_owned(), socket }
    }

    pub(crate) fn add(&self, key: &str) {
        let mut command = Command::new("ssh-add");
        let output = command.arg("-q").arg(self.at.join(key)).env("SSH_AUTH_SOCK", &self.socket).output().unwrap();
        assert!(output.status.success(), "{}", text(&output));
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
