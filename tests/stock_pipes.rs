//! OpenSSH's `sftp-server` behind pipes that a test may cut, change or watch, packet by packet.

use std::fs;
use std::io::{Read, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use lockstep::endpoint::link::{ConnectError, Link, LinkError, Remote, Way};
use lockstep::endpoint::local::{LocalSource, LocalTarget};
use lockstep::endpoint::stock::{Lanes, Much, StockSource, StockTarget, Verify};
use lockstep::endpoint::{BeginOptions, Error, ScanOptions, Width};
use lockstep::error::Exit;
use lockstep::manifest::format;
use lockstep::monitor::Silent;
use lockstep::plan::safety::DeleteLimit;
use lockstep::policy::PolicySpec;
use lockstep::sync::{Options, SyncReport, run};

/// Stands in front of what a hook sees of the input of commands. No packet of SFTP is of this type.
pub(super) const COMMAND: u8 = 0;

/// Sees each packet (without its length) before it goes on, and what is sent to commands; `false` cuts the link instead.
pub(super) type Hook = Arc<dyn Fn(&mut Vec<u8>) -> bool + Send + Sync>;

pub(super) fn nothing() -> Hook {
    Arc::new(|_| true)
}

struct Pipe {
    child: Mutex<Child>,
    input: Mutex<Option<ChildStdin>>,
    output: Mutex<ChildStdout>,
    out: Hook,
    /// For packets of SFTP; a command gives plain bytes.
    back: Option<Hook>,
}

impl Pipe {
    fn start(mut command: Command, out: Hook, back: Option<Hook>) -> Arc<Pipe> {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("sftp-server is not installed: Debian package openssh-sftp-server");
        let (input, output) = (Mutex::new(child.stdin.take()), Mutex::new(child.stdout.take().unwrap()));
        Arc::new(Pipe { child: Mutex::new(child), input, output, out, back })
    }

    /// As sshd does when a connection is lost: commands find their input ended.
    fn end(&self) {
        self.close();
        let mut child = self.child.lock().unwrap();
        if self.back.is_some() {
            let _ = child.kill();
        }
        let _ = child.wait();
    }

    fn cut(&self) -> LinkError {
        self.end();
        LinkError("cut".into())
    }
}

impl Link for Pipe {
    fn send(&self, packet: Bytes) -> Result<(), LinkError> {
        let mut packet = packet.to_vec();
        if self.back.is_some() {
            let mut body = packet.split_off(4);
            if !(self.out)(&mut body) {
                return Err(self.cut());
            }
            packet = (body.len() as u32).to_be_bytes().to_vec();
            packet.extend_from_slice(&body);
        } else {
            packet.insert(0, COMMAND);
            if !(self.out)(&mut packet) {
                return Err(self.cut());
            }
            packet.remove(0);
        }
        match self.input.lock().unwrap().as_mut().map(|input| input.write_all(&packet)) {
            Some(Ok(())) => Ok(()),
            _ => Err(LinkError("the server has ended".into())),
        }
    }

    fn recv(&self) -> Result<Option<Bytes>, LinkError> {
        let mut output = self.output.lock().unwrap();
        let Some(hook) = &self.back else {
            let mut buffer = vec![0; 64 * 1024];
            let read = output.read(&mut buffer).map_err(|error| LinkError(error.to_string()))?;
            buffer.truncate(read);
            return Ok((read > 0).then(|| buffer.into()));
        };
        let mut length = [0; 4];
        if output.read_exact(&mut length).is_err() {
            return Ok(None);
        }
        let mut body = vec![0; u32::from_be_bytes(length) as usize];
        if output.read_exact(&mut body).is_err() {
            return Ok(None);
        }
        if !hook(&mut body) {
            return Err(self.cut());
        }
        Ok(Some([&(body.len() as u32).to_be_bytes()[..], &body].concat().into()))
    }

    fn close(&self) {
        drop(self.input.lock().unwrap().take());
    }
}

impl Drop for Pipe {
    fn drop(&mut self) {
        self.end();
    }
}

/// A host whose server runs here.
pub(super) struct Host {
    out: Hook,
    back: Hook,
    shell: bool,
}

impl Remote for Host {
    fn open(&self, _: &Way, _: usize) -> Result<Arc<dyn Link>, ConnectError> {
        let command = Command::new("/usr/lib/openssh/sftp-server");
        Ok(Pipe::start(command, Arc::clone(&self.out), Some(Arc::clone(&self.back))))
    }

    fn exec(&self, text: &str, _: usize) -> Result<Arc<dyn Link>, ConnectError> {
        if !self.shell {
            let (exit, not_offered, patience) = (Exit::Usage, true, std::time::Duration::ZERO);
            return Err(ConnectError { message: "no shell".into(), exit, not_offered, patience });
        }
        let mut command = Command::new("sh");
        command.args(["-c", text]);
        Ok(Pipe::start(command, Arc::clone(&self.out), None))
    }

    fn describe(&self) -> String {
        "user@host:22".into()
    }
}

pub(super) struct Pair {
    outer: tempfile::TempDir,
}

impl Pair {
    pub(super) fn new() -> Pair {
        let outer = tempfile::tempdir().unwrap();
        fs::create_dir(outer.path().join("source")).unwrap();
        Pair { outer }
    }

    pub(super) fn at(&self, name: &str) -> PathBuf {
        self.outer.path().join(name)
    }

    pub(super) fn write(&self, path: &str, data: impl AsRef<[u8]>) {
        let path = self.at("source").join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, data).unwrap();
    }

    pub(super) fn lanes(&self, out: Hook, back: Hook, shell: bool, lanes: impl Into<Width>) -> Result<Lanes, Error> {
        self.lanes_proven(Verify::Auto, out, back, shell, lanes)
    }

    pub(super) fn lanes_proven(
        &self,
        verify: Verify,
        out: Hook,
        back: Hook,
        shell: bool,
        lanes: impl Into<Width>,
    ) -> Result<Lanes, Error> {
        let remote: Arc<dyn Remote> = Arc::new(Host { out, back, shell });
        let first = remote.open(&Way::SftpSubsystem, 0).unwrap();
        Lanes::connect(remote, first, lanes, self.at("target").as_os_str().as_encoded_bytes(), verify)
    }

    pub(super) fn push_over(&self, lanes: Lanes) -> Result<SyncReport, Error> {
        let source = LocalSource::new(&self.at("source"), Some(&self.at("state"))).unwrap();
        let target = by_command(lanes).keeping_sums_in(Some(&self.at("state")));
        run(&source, &target, &options(), &Silent::default(), &AtomicBool::new(false))
    }

    pub(super) fn push(&self, out: Hook, back: Hook, shell: bool) -> Result<SyncReport, Error> {
        self.push_over(self.lanes(out, back, shell, 1)?)
    }

    pub(super) fn pull(&self, out: Hook, back: Hook) -> Result<SyncReport, Error> {
        self.pull_over(self.lanes(out, back, false, 1)?)
    }

    pub(super) fn pull_over(&self, lanes: Lanes) -> Result<SyncReport, Error> {
        let source = StockSource::new(lanes);
        let target = LocalTarget::new(&self.at("copy"), PolicySpec::default());
        run(&source, &target, &options(), &Silent::default(), &AtomicBool::new(false))
    }

    /// The target holds exactly what the source does, and its manifest says so.
    pub(super) fn in_step(&self) {
        let output = Command::new("rsync")
            .args(["-naHic", "--delete", "--modify-window=1", "--exclude=/.lockstep"])
            .args([self.at("source").join(""), self.at("target").join("")])
            .output()
            .expect("rsync is not installed: Debian package rsync");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let different: Vec<_> =
            text.lines().filter(|line| !line.ends_with(" ./") && !line.starts_with(".L..t")).collect();
        assert!(output.status.success() && different.is_empty(), "{different:#?}");
        let manifest = format::decode(&fs::read(self.at("target/.lockstep/manifest")).unwrap()).unwrap();
        for entry in manifest.tree.entries() {
            if let Some((_, digest)) = entry.file() {
                let data = fs::read(self.at("target").join(entry.path.as_path())).unwrap();
                assert_eq!(digest, Some(sha256(&data)), "{}", entry.path);
            }
        }
    }
}

/// A target to which content goes by a command, where there is one, however little it is.
pub(super) fn by_command(lanes: Lanes) -> StockTarget {
    StockTarget::new(lanes).by_command_from(Much { files: 0, bytes: 0 })
}

pub(super) fn sha256(data: &[u8]) -> lockstep::manifest::Digest {
    use sha2::Digest as _;
    lockstep::manifest::Digest(sha2::Sha256::digest(data).into())
}

pub(super) fn options() -> Options {
    Options {
        scan: ScanOptions::default(),
        begin: BeginOptions { actor: "tester@here".into(), ..BeginOptions::default() },
        delete: true,
        retain: None,
        max_delete: DeleteLimit::Unlimited,
        workers: 2,
        retries: 2,
        bandwidth: lockstep::sync::Rate::default(),
    }
}
