//! A `lockstep serve` of a configuration, with its log, and stock clients to try it.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use super::{keygen, until};

/// A server that ends with the test. Paths are below its directory.
pub(crate) struct Served {
    child: Child,
    pub(crate) port: u16,
    at: tempfile::TempDir,
}

pub(crate) fn write(path: &Path, text: &str) {
    fs::write(path, text).unwrap();
    fs::set_permissions(path, PermissionsExt::from_mode(0o600)).unwrap();
}

/// A user of the configuration: its root is the directory of its name, its keys are in `NAME.keys`.
pub(crate) fn user(at: &Path, name: &str, more: &str) -> String {
    let at = at.display();
    format!("[[serve.user]]\nname = '{name}'\nroot = '{at}/{name}'\nauthorized_keys = '{at}/{name}.keys'\n{more}\n")
}

impl Served {
    /// Serves user `sync`, who may log in with the key `sync`; `serve` and `limits` are lines of the configuration.
    pub(crate) fn start(serve: &str, limits: &str) -> Served {
        Served::with(&["sync"], |at| serve.replace("AT", &at.display().to_string()), limits, |at| user(at, "sync", ""))
    }

    /// Serves user `sync`, with a record of logins below `record`.
    pub(crate) fn recording() -> Served {
        let audit = |at: &Path| {
            fs::create_dir(at.join("record")).unwrap();
            format!("audit = '{}'", at.join("record").display())
        };
        Served::with(&["sync"], audit, "", |at| user(at, "sync", ""))
    }

    /// Serves users; each of `keys` is made (`NAME.key`), with a directory of its name, and opens the user of its name.
    pub(crate) fn with(
        keys: &[&str],
        serve: impl Fn(&Path) -> String,
        limits: &str,
        users: impl Fn(&Path) -> String,
    ) -> Served {
        let at = tempfile::tempdir().unwrap();
        for key in keys {
            keygen(at.path(), &["-t", "ed25519", "-N", "", "-C", key, "-f", &format!("{key}.key")]);
            fs::create_dir(at.path().join(key)).ok();
            write(
                &at.path().join(format!("{key}.keys")),
                &fs::read_to_string(at.path().join(format!("{key}.key.pub"))).unwrap(),
            );
        }
        let (serve, users) = (serve(at.path()), users(at.path()));
        // Tests fail on purpose, and often; those of penalties say otherwise.
        let exempt = if serve.contains("penalt") { "" } else { "penalty_exempt = ['127.0.0.0/8']\n" };
        let serve = format!("{exempt}{serve}");
        let head = format!("[serve]\nlisten = '127.0.0.1:0'\nhost_key = '{}/host'\n{serve}\n", at.path().display());
        write(&at.path().join("config.toml"), &format!("{head}[serve.limits]\n{limits}\n{users}"));
        let mut served = Served { child: spawn(at.path()), port: 0, at };
        served.port = served.wait_for_port();
        let public = Command::new("ssh-keygen").args(["-y", "-f"]).arg(served.path("host")).output().unwrap().stdout;
        let known = format!("[127.0.0.1]:{} {}", served.port, String::from_utf8(public).unwrap());
        write(&served.path("known"), &known);
        served
    }

    fn wait_for_port(&mut self) -> u16 {
        let port = self.path("port");
        until("the port", || {
            let ended = self.child.try_wait().unwrap();
            assert!(ended.is_none(), "the server ended: {}", self.log());
            fs::read_to_string(&port).is_ok_and(|text| text.ends_with('\n'))
        });
        fs::read_to_string(port).unwrap().trim().parse().unwrap()
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.at.path().join(name)
    }

    pub(crate) fn at(&self) -> &Path {
        self.at.path()
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    /// Waits until the server has said this.
    pub(crate) fn wait_for(&self, part: &str) {
        let started = Instant::now();
        while !self.log().contains(part) {
            assert!(started.elapsed() < Duration::from_secs(15), "the log never says {part:?}:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Sends a signal to the server. One that is to stop has stopped, with all its threads.
    pub(crate) fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, signal).unwrap();
        if signal == rustix::process::Signal::STOP {
            super::stops(self.child.id());
        }
        // What hangs hangs with all its processes.
        if matches!(signal, rustix::process::Signal::STOP | rustix::process::Signal::CONT) {
            for process in self.connections() {
                rustix::process::kill_process(rustix::process::Pid::from_raw(process as i32).unwrap(), signal).ok();
            }
        }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The processes of its connections.
    pub(crate) fn connections(&self) -> Vec<u32> {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.child.id())).unwrap();
        let lists = tasks.flatten().map(|task| fs::read_to_string(task.path().join("children")).unwrap_or_default());
        lists.collect::<String>().split_whitespace().filter_map(|pid| pid.parse().ok()).collect()
    }

    /// Replaces text in the configuration, and has it read.
    pub(crate) fn reload(&self, from: &str, to: &str) {
        let path = self.path("config.toml");
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.contains(from), "{text}");
        write(&path, &text.replace(from, to));
        self.reload_as_it_is();
    }

    pub(crate) fn reload_as_it_is(&self) {
        let reloads = |log: &str| log.matches("configuration reloaded").count() + log.matches("not reloaded").count();
        let before = reloads(&self.log());
        self.signal(rustix::process::Signal::HUP);
        until("the reload", || reloads(&self.log()) > before);
    }

    /// How the server ended; nothing while it runs.
    pub(crate) fn running(&mut self) -> Option<std::process::ExitStatus> {
        self.child.try_wait().unwrap()
    }

    /// Waits for the end of the server; its exit code.
    pub(crate) fn ended(&mut self) -> Option<i32> {
        let mut code = None;
        until("the server's end", || {
            let status = self.child.try_wait().unwrap();
            code = status.and_then(|status| status.code());
            status.is_some()
        });
        code
    }

    /// A client of OpenSSH with the key of this name; `-P` or `-p` for the port.
    pub(crate) fn client(&self, program: &str, port_flag: &str, key: &str) -> Command {
        let mut command = Command::new(program);
        command.current_dir(self.at()).args([
            port_flag,
            &self.port.to_string(),
            "-i",
            &format!("{key}.key"),
            "-F",
            "none",
        ]);
        let options = ["UserKnownHostsFile=known", "BatchMode=yes", "IdentitiesOnly=yes", "IdentityAgent=none"];
        for option in options {
            command.args(["-o", option]);
        }
        command.env_remove("SSH_AUTH_SOCK").stdin(Stdio::null());
        command
    }

    pub(crate) fn ssh(&self, user: &str, more: &[&str]) -> Output {
        self.client("ssh", "-p", user).args(more).output().expect("ssh is not installed: Debian package openssh-client")
    }

    /// Runs a batch of the stock `sftp`.
    pub(crate) fn sftp(&self, user: &str, key: &str, batch: &str) -> Output {
        let mut child = self
            .client("sftp", "-P", key)
            .args(["-b", "-", &format!("{user}@127.0.0.1")])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("sftp is not installed: Debian package openssh-client");
        std::io::Write::write_all(&mut child.stdin.take().unwrap(), batch.as_bytes()).ok();
        child.wait_with_output().unwrap()
    }

    /// A stock client that has a session open until it is dropped; a connection of its own.
    pub(crate) fn hold(&self, user: &str, more: &[&str]) -> Held {
        let child = self
            .client("ssh", "-p", user)
            .args(more)
            .args(["-s", &format!("{user}@127.0.0.1"), "sftp"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        Held(child)
    }

    pub(crate) fn lockstep(&self, arguments: &[&str], key: &str) -> Output {
        self.at_port(&self.port.to_string(), arguments, key)
    }

    /// As `sync`, through what listens at this port.
    pub(crate) fn through(&self, port: &str, arguments: &[&str]) -> Output {
        self.at_port(port, arguments, "sync")
    }

    fn at_port(&self, port: &str, arguments: &[&str], key: &str) -> Output {
        Command::new(env!("CARGO_BIN_EXE_lockstep"))
            .current_dir(self.at())
            .args(arguments)
            .args(["-P", port, "--identity", &format!("{key}.key"), "--known-hosts", "known"])
            .env("XDG_STATE_HOME", self.at())
            .env_remove("SSH_AUTH_SOCK")
            .stdin(Stdio::null())
            .output()
            .unwrap()
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A process that ends with the test.
pub(crate) struct Held(pub(crate) Child);

impl Held {
    /// Speaks the first words of SFTP, which shows that there is a session.
    pub(crate) fn speaks(&mut self) -> bool {
        use std::io::{Read as _, Write as _};
        let mut answer = [0; 5];
        let asked = self.0.stdin.as_mut().unwrap().write_all(&[0, 0, 0, 5, 1, 0, 0, 0, 3]);
        asked.is_ok() && self.0.stdout.as_mut().unwrap().read_exact(&mut answer).is_ok() && answer[4] == 2
    }

    /// Waits for the end; what was said on standard error.
    pub(crate) fn ended(&mut self) -> String {
        until("the client's end", || self.0.try_wait().unwrap().is_some());
        let mut text = String::new();
        std::io::Read::read_to_string(self.0.stderr.as_mut().unwrap(), &mut text).unwrap();
        text
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn spawn(at: &Path) -> Child {
    Command::new(env!("CARGO_BIN_EXE_lockstep"))
        .args(["serve", "--config"])
        .arg(at.join("config.toml"))
        .arg("--port-file")
        .arg(at.join("port"))
        .env_remove("LOCKSTEP_LOG")
        .stdin(Stdio::null())
        .stderr(fs::File::create(at.join("log")).unwrap())
        .spawn()
        .unwrap()
}
