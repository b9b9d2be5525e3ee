//! `lockstep quickstart`: the main job shown on this machine, by the same commands that a user types.
//!
//! Everything lies in one temporary directory, the server listens on loopback, and the keys are made for it: nothing of
//! the user's own configuration is read or written.

use std::io::{BufRead as _, BufReader, Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use super::{Failure, output, shown};
use crate::error::{Escaped, Exit, chain};
use crate::manifest::{Manifest, format};
use crate::server::host_key;

mod sample;

/// What the first run on a real host takes.
const NEXT: &str = "\
A real first push takes four commands:
   lockstep keys generate ~/.ssh/id_ed25519
   lockstep keys scan-host --add gpu02              # compare the fingerprint, then trust it
   lockstep keys enroll you@gpu02                   # by a login that works already, or prints the line to add
   lockstep push checkpoint-1000 you@gpu02:/data/checkpoint-1000
";

/// Shows push, verify, policy and check on this machine, with nothing to configure.
#[derive(Debug, clap::Args)]
pub(super) struct Quickstart {
    /// Push this directory (which is only read) instead of a sample
    #[arg(value_name = "DIR")]
    directory: Option<PathBuf>,
    /// Keep what was made, to look at it
    #[arg(long)]
    keep: bool,
}

/// The temporary directory, removed in the end.
struct Scratch {
    path: PathBuf,
    keep: bool,
}

impl Scratch {
    fn make(keep: bool) -> Result<Scratch, Failure> {
        let mut tag = [0; 6];
        let random = Path::new("/dev/urandom");
        std::fs::File::open(random)
            .and_then(|mut file| file.read_exact(&mut tag))
            .map_err(Failure::io("reading", random))?;
        let tag: String = tag.iter().map(|byte| format!("{byte:02x}")).collect();
        let path = std::env::temp_dir().join(format!("lockstep-quickstart-{tag}"));
        std::fs::DirBuilder::new().mode(0o700).create(&path).map_err(Failure::io("making", &path))?;
        Ok(Scratch { path, keep })
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if !self.keep {
            let _ = std::fs::remove_dir_all(&self.path);
        }
    }
}

/// The server, stopped in the end.
struct Server {
    child: Child,
    address: String,
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(pid) = i32::try_from(self.child.id()).ok().and_then(rustix::process::Pid::from_raw) {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        }
        let _ = self.child.wait();
    }
}

struct Tour {
    scratch: Scratch,
    program: PathBuf,
    step: usize,
}

fn say(text: &str) -> Result<(), Failure> {
    output(text.as_bytes())
}

impl Quickstart {
    pub(super) fn run(self) -> Result<Exit, Failure> {
        let source = match &self.directory {
            Some(directory) => Some(directory.canonicalize().map_err(Failure::io("looking at", directory))?),
            None => None,
        };
        let program = std::env::current_exe().map_err(Failure::io("finding", Path::new("lockstep")))?;
        let mut tour = Tour { scratch: Scratch::make(self.keep)?, program, step: 0 };
        say(&format!("Everything happens in {}, between this machine and itself.\n", shown(&tour.scratch.path)))?;
        tour.run(source.as_deref())?;
        say(&format!("\nEach step did what it says.\n\n{NEXT}"))?;
        if self.keep {
            say(&format!("\nKept: {}\n", shown(&tour.scratch.path)))?;
        }
        Ok(Exit::Done)
    }
}

impl Tour {
    fn run(&mut self, given: Option<&Path>) -> Result<(), Failure> {
        let server = self.serve(given.is_none())?;
        let port = server.address.rsplit(':').next().unwrap_or_default().to_owned();
        self.trust(&port)?;
        let own = self.scratch.path.join("run-7");
        let (source, name) = match given {
            Some(given) => (given.to_owned(), "copy"),
            None => {
                sample::make(&own).map_err(Failure::io("making", &own))?;
                (own, "run-7")
            }
        };
        let from = if given.is_some() { source.display().to_string() } else { "run-7".to_owned() };
        let to = format!("demo@127.0.0.1:/{name}");
        let target = self.scratch.path.join("server").join(name);
        let login = ["-P", &port, "--identity", "client", "--known-hosts", "known_hosts"];
        let push: Vec<&str> = [&["push"][..], &login, &[&from, &to]].concat();

        self.title("Push: nothing is visible at the target before all of it is verified")?;
        self.expect(&push, Exit::Done)?;

        if given.is_none() {
            self.title("Push again after a change: only what changed is sent")?;
            let log = source.join("logs/train.log");
            let mut file = std::fs::OpenOptions::new().append(true).open(&log).map_err(Failure::io("opening", &log))?;
            file.write_all(b"step 50 loss 0.178\n").map_err(Failure::io("writing", &log))?;
            let itemized: Vec<&str> = [&push[..1], &["-i"], &push[1..]].concat();
            self.expect(&itemized, Exit::Done)?;
            self.title("The receiver's policy decided over owner and mode, whatever the sender had")?;
            self.permissions(&source, &target)?;
        }

        let inside = format!("server/{name}");
        self.title("Check what arrived: every byte is read and compared with the manifest")?;
        self.expect(&["manifest", "verify", &inside], Exit::Done)?;

        self.title("Break one byte of it: the check refuses, and training would not start")?;
        if let Some(broken) = self.break_one(&target)? {
            say(&format!("   (one bit of {inside}/{} was flipped)\n", broken))?;
            self.expect(&["manifest", "verify", &inside], Exit::BadData)?;
            self.title("Push once more: it is noticed, sent again, and good")?;
            self.expect(&push, Exit::Done)?;
            self.expect(&["manifest", "verify", &inside], Exit::Done)?;
        } else {
            say("   (there is no file with content in it to break)\n")?;
        }

        self.title("Who sent what, when, from where: a log whose lines are chained by their hashes")?;
        self.audit_line(&target)?;
        self.expect(&["audit", "verify", &inside], Exit::Done)
    }

    fn title(&mut self, text: &str) -> Result<(), Failure> {
        self.step += 1;
        say(&format!("\n{}. {text}\n", self.step))
    }

    /// A command in the temporary directory that knows nothing of the user's configuration.
    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command
            .args(arguments)
            .current_dir(&self.scratch.path)
            .env("HOME", &self.scratch.path)
            .env("XDG_STATE_HOME", self.scratch.path.join("state"))
            .env_remove("SSH_AUTH_SOCK")
            .env_remove("LOCKSTEP_CONFIG")
            .stdin(Stdio::null());
        command
    }

    /// Runs a command and shows it with what it says.
    fn show(&self, arguments: &[&str]) -> Result<Option<i32>, Failure> {
        say(&format!("   $ lockstep {}\n", arguments.join(" ")))?;
        let done = self.command(arguments).output().map_err(Failure::io("starting", &self.program))?;
        let text = format!("{}{}", String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
        for line in text.lines() {
            say(&format!("   {line}\n"))?;
        }
        Ok(done.status.code())
    }

    fn expect(&mut self, arguments: &[&str], exit: Exit) -> Result<(), Failure> {
        let code = self.show(arguments)?;
        if exit != Exit::Done {
            say(&format!("   (exit code {})\n", code.unwrap_or(-1)))?;
        }
        if code == Some(i32::from(exit.code())) {
            return Ok(());
        }
        let ended = code.map_or_else(|| "a signal".to_owned(), |code| format!("exit code {code}"));
        Err(self.failed(&format!("it ended with {ended} instead of {}", exit.code())))
    }

    fn serve(&mut self, with_policy: bool) -> Result<Server, Failure> {
        self.title("A key for the client, and a server on this machine that lets only that key in")?;
        self.make_key("client")?;
        let path = |name: &str| self.scratch.path.join(name);
        std::fs::create_dir(path("server")).map_err(Failure::io("making", &path("server")))?;
        let mut arguments = vec!["serve", "--listen", "127.0.0.1:0", "--user", "demo", "--root", "server"];
        arguments.extend(["--authorized-keys", "client.pub", "--host-key", "host"]);
        if with_policy {
            std::fs::write(path("policy.toml"), sample::POLICY)
                .map_err(Failure::io("writing", &path("policy.toml")))?;
            arguments.extend(["--policy-file", "policy.toml"]);
        }
        say(&format!("   $ lockstep {}\n", arguments.join(" ")))?;
        let starting = Failure::io("starting", &self.program);
        let mut child =
            self.command(&arguments).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().map_err(starting)?;
        let said = child.stderr.take();
        let mut server = Server { child, address: String::new() };
        let mut first = String::new();
        if let Some(said) = said {
            let mut said = BufReader::new(said);
            said.read_line(&mut first).map_err(Failure::io("reading from", &self.program))?;
            // What it says later is of no use here, but it must be able to say it.
            std::thread::spawn(move || std::io::copy(&mut said, &mut std::io::sink()));
        }
        say(&format!("   {}\n", Escaped(first.trim_end().as_bytes())))?;
        let address = first.split("listening on ").nth(1).and_then(|rest| rest.split(',').next());
        server.address = address.map(str::to_owned).ok_or_else(|| self.failed("the server did not start"))?;
        Ok(server)
    }

    fn failed(&mut self, what: &str) -> Failure {
        self.scratch.keep = true;
        let kept = shown(&self.scratch.path);
        Failure::Plain {
            exit: Exit::Incomplete,
            message: format!("step {}: {what}; what was made is kept in {kept}", self.step),
        }
    }

    fn make_key(&self, name: &str) -> Result<(), Failure> {
        let path = self.scratch.path.join(name);
        let failed = |message: String| Failure::Plain { exit: Exit::Io, message };
        let key = host_key::load_or_create(&path).map_err(|error| failed(chain(&error)))?;
        let public = key.public_key().to_openssh().map_err(|error| failed(error.to_string()))?;
        let file = path.with_extension("pub");
        std::fs::write(&file, public + "\n").map_err(Failure::io("writing", &file))
    }

    /// The client knows the server's key from its file: nobody could have come between.
    fn trust(&self, port: &str) -> Result<(), Failure> {
        let failed = |message: String| Failure::Plain { exit: Exit::Io, message };
        let key = host_key::load_or_create(&self.scratch.path.join("host")).map_err(|error| failed(chain(&error)))?;
        let public = key.public_key().to_openssh().map_err(|error| failed(error.to_string()))?;
        let file = self.scratch.path.join("known_hosts");
        std::fs::write(&file, format!("[127.0.0.1]:{port} {public}\n")).map_err(Failure::io("writing", &file))
    }

    fn permissions(&self, source: &Path, target: &Path) -> Result<(), Failure> {
        for name in sample::SHOWN {
            let mode = |root: &Path| -> Result<String, Failure> {
                let path = root.join(name);
                let metadata = std::fs::symlink_metadata(&path).map_err(Failure::io("looking at", &path))?;
                Ok(format!("{:04o}", metadata.mode() & 0o7777))
            };
            say(&format!("   {:34} {} -> {}\n", name, mode(source)?, mode(target)?))?;
        }
        Ok(())
    }

    /// Flips one bit of the largest file that was published, and says which it was.
    fn break_one(&self, target: &Path) -> Result<Option<String>, Failure> {
        let Some(entry) = manifest(target)?
            .tree
            .entries()
            .iter()
            .filter(|entry| entry.file().is_some())
            .cloned()
            .max_by_key(|entry| entry.file().map_or(0, |(size, _)| size))
        else {
            return Ok(None);
        };
        let Some(at) = entry.file().map(|(size, _)| size).filter(|&size| size > 0).map(|size| size / 2) else {
            return Ok(None);
        };
        let path = target.join(entry.path.as_path());
        let io = |operation| Failure::io(operation, &path);
        let mut file = std::fs::OpenOptions::new().read(true).write(true).open(&path).map_err(io("opening"))?;
        let mut byte = [0];
        file.seek(SeekFrom::Start(at)).and_then(|_| file.read_exact(&mut byte)).map_err(io("reading"))?;
        byte[0] ^= 1;
        file.seek(SeekFrom::Start(at)).and_then(|_| file.write_all(&byte)).map_err(io("writing"))?;
        Ok(Some(entry.path.to_string()))
    }

    /// The last line of the log that has a digest, by its fields.
    fn audit_line(&self, target: &Path) -> Result<(), Failure> {
        let path = target.join(".lockstep/audit.jsonl");
        let text = std::fs::read_to_string(&path).map_err(Failure::io("reading", &path))?;
        let lines = text.lines().rev().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
        let line = lines.into_iter().find(|line| line.get("sha256").is_some_and(serde_json::Value::is_string));
        for field in ["time", "actor", "source", "path", "sha256", "owner", "mode"] {
            if let Some(value) = line.as_ref().and_then(|line| line.get(field)?.as_str()) {
                say(&format!("   {field:7} {}\n", Escaped(value.as_bytes())))?;
            }
        }
        Ok(())
    }
}

fn manifest(target: &Path) -> Result<Manifest, Failure> {
    let path = target.join(".lockstep/manifest");
    let text = std::fs::read(&path).map_err(Failure::io("reading", &path))?;
    format::decode(&text).map_err(|error| Failure::bad_data(format!("{}: {error}", shown(&path))))
}
