//! Where the tour takes place: a private temporary directory, the server in it, and the commands that are run.

use std::fs::{self, DirBuilder};
use std::io::{self, BufRead as _, BufReader};
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::cli::stop::Stop;
use crate::cli::{Failure, shown};
use crate::error::Exit;

/// The name that the client logs in with.
pub(super) const USER: &str = "sync";

/// A directory that is removed at the end, unless it is to be kept. Everything that is made lies in it.
pub(super) struct Place {
    pub(super) at: PathBuf,
    pub(super) keep: bool,
    program: PathBuf,
    stop: Stop,
}

/// How a command ended.
pub(super) struct Ran {
    pub(super) status: ExitStatus,
    pub(super) stdout: String,
    pub(super) stderr: String,
}

impl Ran {
    pub(super) fn code(&self) -> Option<i32> {
        self.status.code()
    }
}

impl Place {
    pub(super) fn new(keep: bool, stop: Stop) -> Result<Place, Failure> {
        let program = std::env::current_exe().map_err(Failure::io("find", Path::new("lockstep")))?;
        let parent = std::env::temp_dir();
        let parent = parent.canonicalize().map_err(Failure::io("open", &parent))?;
        for attempt in 0..100 {
            let at = parent.join(format!("lockstep-quickstart-{}-{attempt}", std::process::id()));
            match DirBuilder::new().mode(0o700).create(&at) {
                Ok(()) => {
                    let place = Place { at, keep, program, stop };
                    for directory in ["home", "state", "server"] {
                        fs::create_dir(place.path(directory)).map_err(Failure::io("make", &place.path(directory)))?;
                    }
                    return Ok(place);
                }
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(Failure::io("make", &at)(error)),
            }
        }
        let message = format!("every name for a temporary directory in '{}' is taken", shown(&parent));
        Err(Failure::Plain { exit: Exit::Io, message })
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.at.join(name)
    }

    pub(super) fn write(&self, name: &str, text: &str) -> Result<(), Failure> {
        let path = self.path(name);
        fs::write(&path, text).map_err(Failure::io("write", &path))
    }

    /// A command that sees nothing of the user's own settings and keys.
    fn command(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        command.current_dir(&self.at).stdin(Stdio::null()).env_remove("SSH_AUTH_SOCK").env_remove("LOCKSTEP_CONFIG");
        command.env("HOME", self.path("home")).env("XDG_STATE_HOME", self.path("state"));
        command
    }

    /// Runs this program with `arguments`. What it says to people goes to them unless it is `quiet`.
    pub(super) fn lockstep(&self, arguments: &[&str], quiet: bool) -> Result<Ran, Failure> {
        let mut command = self.command(&self.program);
        command.args(arguments).stderr(if quiet { Stdio::piped() } else { Stdio::inherit() });
        self.finish(command, "lockstep")
    }

    /// Runs another program in a directory of the place; `None` where there is no such program.
    pub(super) fn other(&self, program: &str, arguments: &[&str], directory: &str) -> Result<Option<Ran>, Failure> {
        let mut command = self.command(Path::new(program));
        command.args(arguments).current_dir(self.path(directory)).stderr(Stdio::piped());
        match self.finish(command, program) {
            Err(Failure::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(None),
            ran => ran.map(Some),
        }
    }

    fn finish(&self, mut command: Command, name: &str) -> Result<Ran, Failure> {
        self.stop.check()?;
        let failed = |error| Failure::io("run", Path::new(name))(error);
        let mut child = command.stdout(Stdio::piped()).spawn().map_err(failed)?;
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        let (status, stdout, stderr) = std::thread::scope(|scope| {
            let stdout = scope.spawn(|| text(stdout));
            let stderr = scope.spawn(|| text(stderr));
            let status = self.wait(&mut child);
            (status, stdout.join().unwrap_or_default(), stderr.join().unwrap_or_default())
        });
        let ran = Ran { status: status.map_err(failed)?, stdout, stderr };
        self.stop.check()?;
        Ok(ran)
    }

    /// Waits for the end of a command, and makes it end when the user wants to stop.
    fn wait(&self, child: &mut Child) -> io::Result<ExitStatus> {
        loop {
            if let Some(status) = child.try_wait()? {
                return Ok(status);
            }
            if self.stop.wanted() {
                child.kill()?;
                return child.wait();
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Runs a command of ours that has to end well.
    fn must(&self, arguments: &[&str]) -> Result<(), Failure> {
        let ran = self.lockstep(arguments, true)?;
        match ran.code() {
            Some(0) => Ok(()),
            _ => Err(super::wrong(&format!("lockstep {}", arguments.join(" ")), &ran)),
        }
    }

    /// Makes the client's key, starts the server, and makes its key known.
    pub(super) fn serve(&self) -> Result<Server, Failure> {
        self.must(&["keys", "generate", "--comment", "quickstart", "key"])?;
        let mut command = self.command(&self.program);
        command.args([
            "serve",
            "--listen",
            "127.0.0.1:0",
            "--user",
            USER,
            "--root",
            "server",
            "--host-key",
            "host_key",
        ]);
        command.args(["--authorized-keys", "key.pub", "--policy-file", "policy.toml", "--die-with-parent"]);
        command.stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().map_err(Failure::io("start", Path::new("lockstep serve")))?;
        let said = child.stderr.take();
        let mut server = Server { child, port: String::new(), log: Arc::default() };
        server.port = server.listening(said).ok_or_else(|| Failure::Plain {
            exit: Exit::Io,
            message: format!("the server did not start: {}", server.said()),
        })?;
        let known = ["-P", &server.port, "-F", "none", "--known-hosts", "known_hosts"];
        self.must(&[&["keys", "scan-host", "--add", "127.0.0.1"], &known[..]].concat())?;
        Ok(server)
    }
}

fn text(stream: Option<impl io::Read>) -> String {
    let mut bytes = Vec::new();
    // What was said before a stream broke is all there is.
    let _ = stream.map(|mut stream| stream.read_to_end(&mut bytes));
    String::from_utf8_lossy(&bytes).into_owned()
}

impl Drop for Place {
    fn drop(&mut self) {
        if !self.keep && remove(&self.at).is_err() {
            // A copy may hold directories that are closed even to their owner.
            for entry in
                walkdir::WalkDir::new(&self.at).into_iter().flatten().filter(|entry| entry.file_type().is_dir())
            {
                let _ = fs::set_permissions(entry.path(), fs::Permissions::from_mode(0o700));
            }
            if let Err(error) = remove(&self.at) {
                eprintln!("lockstep: removing '{}': {error}; remove it yourself", shown(&self.at));
            }
        }
    }
}

fn remove(at: &Path) -> io::Result<()> {
    match fs::remove_dir_all(at) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

/// A server that ends with the tour, however that ends.
pub(super) struct Server {
    child: Child,
    pub(super) port: String,
    log: Arc<Mutex<String>>,
}

impl Server {
    /// Waits until the server listens, and gives its port. Goes on reading so that the server never waits for us.
    fn listening(&self, said: Option<ChildStderr>) -> Option<String> {
        let mut lines = BufReader::new(said?).lines();
        let port = lines.by_ref().map_while(Result::ok).find_map(|line| {
            let port = port_of(&line);
            self.note(&line);
            port
        })?;
        let log = Arc::clone(&self.log);
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                push_line(&log, &line);
            }
        });
        Some(port)
    }

    fn note(&self, line: &str) {
        push_line(&self.log, line);
    }

    /// What the server said so far.
    pub(super) fn said(&self) -> String {
        self.log.lock().unwrap_or_else(PoisonError::into_inner).trim_end().to_owned()
    }
}

fn push_line(log: &Mutex<String>, line: &str) {
    let mut log = log.lock().unwrap_or_else(PoisonError::into_inner);
    log.push_str(line);
    log.push('\n');
}

/// The port in `… listening on 127.0.0.1:PORT, …`.
fn port_of(line: &str) -> Option<String> {
    let address = line.split("listening on ").nth(1)?;
    let digits: String = address.strip_prefix("127.0.0.1:")?.chars().take_while(char::is_ascii_digit).collect();
    (!digits.is_empty()).then_some(digits)
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
