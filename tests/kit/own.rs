//! A `lockstep serve` with one user, `sync`, on the command line.

use std::fs;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Output, Stdio};

use super::key;

/// Ends with the test.
pub(crate) struct Server {
    child: Child,
    pub(crate) port: String,
    pub(crate) at: tempfile::TempDir,
}

impl Server {
    pub(crate) fn start(more: &[&str]) -> Server {
        let at = tempfile::tempdir().unwrap();
        let path = |name: &str| at.path().join(name).display().to_string();
        for name in ["user", "other"] {
            key(at.path(), name);
        }
        fs::create_dir(at.path().join("root")).unwrap();
        let mut child = Command::new(env!("CARGO_BIN_EXE_lockstep"))
            .args(["serve", "--listen", "127.0.0.1:0", "--user", "sync", "--root", &path("root")])
            .args(["--authorized-keys", &path("user.pub"), "--host-key", &path("host")])
            .args(more)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stderr.take().unwrap()).read_line(&mut line).unwrap();
        let address = line.split("listening on ").nth(1).and_then(|rest| rest.split(',').next());
        let port =
            address.and_then(|address| address.rsplit(':').next()).unwrap_or_else(|| panic!("{line}")).to_owned();
        let public = Command::new("ssh-keygen").args(["-y", "-f", &path("host")]).output().unwrap().stdout;
        let known = format!("[127.0.0.1]:{port} {}", String::from_utf8(public).unwrap());
        fs::write(at.path().join("known"), known).unwrap();
        Server { child, port, at }
    }

    pub(crate) fn run(&self, program: &str, arguments: &[&str]) -> Output {
        Command::new(program)
            .current_dir(self.at.path())
            .args(arguments)
            .env("XDG_STATE_HOME", self.at.path())
            .env_remove("SSH_AUTH_SOCK")
            .stdin(Stdio::null())
            .output()
            .unwrap()
    }

    pub(crate) fn lockstep(&self, arguments: &[&str], key: &str) -> Output {
        let login = ["-P", &self.port, "--identity", key, "--known-hosts", "known"];
        self.run(env!("CARGO_BIN_EXE_lockstep"), &[arguments, &login].concat())
    }

    pub(crate) fn openssh(&self, program: &str, port_flag: &str, more: &[&str]) -> Output {
        let login =
            [port_flag, &self.port, "-i", "user", "-F", "none", "-oUserKnownHostsFile=known", "-oBatchMode=yes"];
        self.run(program, &[&login, more].concat())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
