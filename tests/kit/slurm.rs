//! A Slurm of one node: its controller, the node's daemon and munge, with keys, ports and directories of their own.

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use rustix::process::{Pid, Signal, kill_process};

use super::area::lockstep;
use super::until;

const PACKAGES: &str = "Debian packages slurmctld, slurmd, slurm-client, munge";
/// Who submits: somebody without rights.
const USER: u32 = 65534;

/// Ends with the test.
pub(crate) struct Slurm {
    // Ended in this order.
    daemons: Vec<Child>,
    at: tempfile::TempDir,
}

impl Slurm {
    pub(crate) fn start() -> Slurm {
        assert!(rustix::process::geteuid().is_root(), "slurmd starts tasks as other users: run this test as root");
        // RACE: a port that was free may be taken by another test before a daemon has it; then all is started anew.
        for _ in 0..5 {
            let mut slurm = Slurm { daemons: Vec::new(), at: tempfile::tempdir().unwrap() };
            slurm.install();
            slurm.configure();
            slurm.run("munged", &slurm.munge());
            until("munge", || slurm.path("munge.socket").exists() || slurm.has_ended());
            slurm.run("slurmctld", &["-D".to_owned(), "-c".to_owned()]);
            slurm.run("slurmd", &["-D".to_owned()]);
            until("the node", || slurm.has_ended() || slurm.state() == "idle");
            if !slurm.has_ended() {
                return slurm;
            }
            let log = slurm.log();
            assert!(log.contains("Address already in use"), "{log}");
        }
        panic!("no ports for Slurm");
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.at.path().join(name)
    }

    /// The files of `config/slurm`, with this place in front of the paths in them.
    fn install(&self) {
        fs::set_permissions(self.at.path(), fs::Permissions::from_mode(0o755)).unwrap();
        for (name, mode) in [("state", 0o755), ("spool", 0o755), ("tmp", 0o1777), ("etc", 0o755), ("run", 0o755)] {
            fs::create_dir(self.path(name)).unwrap();
            fs::set_permissions(self.path(name), fs::Permissions::from_mode(mode)).unwrap();
        }
        // Where any user may run it, which the build directory need not be.
        fs::copy(lockstep(), self.path("lockstep")).unwrap();
        let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("config/slurm");
        for entry in fs::read_dir(from).unwrap() {
            let from = entry.unwrap().path();
            let to = self.path(from.file_name().unwrap().to_str().unwrap());
            let mut changed = fs::read_to_string(&from).unwrap();
            for (usual, here) in [
                ("/tmp/", "tmp/"),
                ("/usr/bin/lockstep", "lockstep"),
                ("/etc/lockstep/", "etc/"),
                ("/etc/slurm/", ""),
                ("/run/lockstep-slurm", "run/slurm"),
            ] {
                changed = changed.replace(&format!("={usual}"), &format!("={}", self.path(here).display()));
            }
            fs::write(&to, changed).unwrap();
            fs::set_permissions(&to, fs::metadata(&from).unwrap().permissions()).unwrap();
        }
    }

    fn configure(&self) {
        let listeners = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
        let [controller, node] = listeners.map(|listener| listener.local_addr().unwrap().port());
        let name = rustix::system::uname().nodename().to_str().unwrap().split('.').next().unwrap().to_owned();
        let at = self.at.path().display();
        let lines = format!(
            "ClusterName=test\nSlurmctldHost={name}(127.0.0.1)\nSlurmUser=root\nSlurmdUser=root\n\
             AuthType=auth/munge\nAuthInfo=socket={at}/munge.socket\nCredType=cred/munge\n\
             SlurmctldPort={controller}\nSlurmdPort={node}\nStateSaveLocation={at}/state\nSlurmdSpoolDir={at}/spool\n\
             SlurmctldPidFile={at}/slurmctld.pid\nSlurmdPidFile={at}/slurmd.pid\n\
             ProctrackType=proctrack/linuxproc\nTaskPlugin=task/none\nSwitchType=switch/none\nMpiDefault=none\n\
             JobAcctGatherType=jobacct_gather/none\nAccountingStorageType=accounting_storage/none\n\
             SlurmdParameters=config_overrides\nMailProg=/bin/true\nKillWait=1\n\
             NodeName={name} NodeAddr=127.0.0.1 CPUs=4\nPartitionName=all Nodes={name} Default=YES MaxTime=5\n\
             Include lockstep.conf\n"
        );
        fs::write(self.path("slurm.conf"), lines).unwrap();
        fs::write(self.path("munge.key"), [7; 128]).unwrap();
        fs::set_permissions(self.path("munge.key"), fs::Permissions::from_mode(0o400)).unwrap();
    }

    fn munge(&self) -> Vec<String> {
        let of = |option: &str, name: &str| format!("--{option}={}", self.path(name).display());
        vec![
            "--foreground".to_owned(),
            "--force".to_owned(),
            of("socket", "munge.socket"),
            of("key-file", "munge.key"),
            of("pid-file", "munge.pid"),
            of("seed-file", "munge.seed"),
            of("log-file", "munge.log"),
        ]
    }

    fn run(&mut self, daemon: &str, arguments: &[String]) {
        let log = fs::File::create(self.path(&format!("{daemon}.log"))).unwrap();
        let mut command = self.client(&format!("/usr/sbin/{daemon}"));
        let child = command.args(arguments).stdout(log.try_clone().unwrap()).stderr(log).spawn();
        self.daemons.insert(0, child.unwrap_or_else(|error| panic!("{daemon} is not installed ({error}): {PACKAGES}")));
    }

    fn has_ended(&mut self) -> bool {
        self.daemons.iter_mut().any(|daemon| daemon.try_wait().unwrap().is_some())
    }

    fn log(&self) -> String {
        let read = |name: &str| fs::read_to_string(self.path(name)).unwrap_or_default();
        ["munged.log", "munge.log", "slurmctld.log", "slurmd.log"].map(read).concat()
    }

    fn client(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.env_clear().env("PATH", "/usr/bin:/bin").env("SLURM_CONF", self.path("slurm.conf"));
        command.current_dir(self.path("tmp")).stdin(Stdio::null());
        command
    }

    /// `srun` or `sbatch`, as somebody without rights.
    pub(crate) fn submit(&self, program: &str) -> Command {
        let mut command = self.client(program);
        command.args([format!("--uid={USER}"), format!("--gid={USER}")]);
        command
    }

    /// What the node is doing, in Slurm's words.
    pub(crate) fn state(&self) -> String {
        let output = self.client("sinfo").args(["--noheader", "--format=%T"]).output();
        String::from_utf8(output.expect(PACKAGES).stdout).unwrap().trim().to_owned()
    }

    /// The state of a job.
    pub(crate) fn job(&self, number: &str) -> String {
        let output = self.client("scontrol").args(["--oneliner", "show", "job", number]).output().expect(PACKAGES);
        let words = String::from_utf8(output.stdout).unwrap();
        words.split(' ').find_map(|word| word.strip_prefix("JobState=")).unwrap_or_default().to_owned()
    }

    /// Waits until nothing runs there: a node that was drained never comes to this.
    pub(crate) fn rest(&self) {
        until("the node to be idle", || self.state() == "idle");
    }

    /// A command of the submitter's, without Slurm.
    pub(crate) fn own(&self, program: &Path) -> Command {
        let mut command = self.client(program.to_str().unwrap());
        command.uid(USER).gid(USER).env("HOME", self.path("tmp"));
        command
    }
}

/// A command that is to end.
#[track_caller]
pub(crate) fn output(command: &mut Command) -> Output {
    command.output().unwrap_or_else(|error| panic!("{command:?} ({error}): {PACKAGES}"))
}

/// A process whose arguments have all these words, the oldest of them; not srun, which has them too.
pub(crate) fn find(words: &[&str]) -> Option<Pid> {
    let processes = fs::read_dir("/proc").unwrap().flatten();
    let mut processes: Vec<i32> = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
    processes.sort_unstable();
    let found = processes.into_iter().find(|process| {
        let arguments = fs::read(format!("/proc/{process}/cmdline")).unwrap_or_default();
        let arguments = String::from_utf8_lossy(&arguments);
        words.iter().all(|word| arguments.contains(word)) && !arguments.starts_with("srun")
    });
    found.and_then(Pid::from_raw)
}

impl Drop for Slurm {
    // What the daemons said is what explains a failure.
    #[allow(clippy::print_stderr)]
    fn drop(&mut self) {
        // A test that has failed may have left a job.
        if self.daemons.len() == 3 && !self.has_ended() {
            let _ = self.client("scancel").args(["--state=RUNNING", "--signal=KILL", "--full"]).status();
        }
        if std::thread::panicking() {
            eprintln!("{}", self.log());
        }
        for daemon in &mut self.daemons {
            let _ = kill_process(Pid::from_child(daemon), Signal::TERM);
            let _ = daemon.wait();
        }
    }
}
