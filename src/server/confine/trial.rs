//! What a process that was confined to a directory tries to do all the same: the names of what it could, which is nothing where
//! all is in force.

use std::fs;
use std::net::TcpListener;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::Command;

use serde::{Deserialize, Serialize};

use super::{Confinement, Wanted, enter};

/// What came of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trial {
    /// What was said to be in force.
    pub confinement: Confinement,
    /// What could be done and should not.
    pub could: Vec<String>,
    /// What could not be done and should.
    pub could_not: Vec<String>,
}

/// Confines this process to a directory that it may write in, and tries. It is of no use afterwards.
///
/// # Errors
/// [`super::ConfineError`], in words.
pub fn run(wanted: &Wanted<'_>) -> Result<Trial, String> {
    let confinement = enter(wanted).map_err(|error| error.to_string())?;
    let root = wanted.root;
    let good = [
        ("read its root", fs::read_dir(root).is_ok()),
        ("write a file", wanted.read_only || fs::write(root.join("trial"), "trial").is_ok()),
        ("move a file to another directory", wanted.read_only || moved(root).is_ok()),
        ("start a thread", std::thread::Builder::new().spawn(|| ()).is_ok_and(|thread| thread.join().is_ok())),
    ];
    let own = rustix::process::getpid();
    let above = root.parent().unwrap_or(Path::new("/"));
    let mut bad = vec![
        ("read /etc/passwd", fs::read("/etc/passwd").is_ok()),
        ("list /", fs::read_dir("/").is_ok()),
        ("write beside its root", fs::write(above.join("trial"), "trial").is_ok()),
        ("truncate a file beside its root", truncated(&above.join("beside")).is_ok()),
        ("link a file of elsewhere into its root", fs::hard_link(above.join("beside"), root.join("linked")).is_ok()),
        ("read the memory of its parent", parent_memory().is_ok()),
        ("listen on a port", TcpListener::bind("127.0.0.1:0").is_ok()),
        ("make a local socket", UnixDatagram::unbound().is_ok()),
        ("start a program", Command::new("/bin/true").status().is_ok()),
        ("start itself", Command::new("/proc/self/exe").arg("--version").status().is_ok()),
        ("signal another process", signalled().is_ok()),
        ("become root", rustix::thread::set_thread_uid(rustix::process::Uid::ROOT).is_ok()),
        ("change its groups", rustix::thread::set_thread_groups(&[]).is_ok()),
        ("change its root", rustix::process::chroot(root).is_ok()),
        ("move to another namespace", other_namespace().is_ok()),
        ("raise a limit", raised().is_ok()),
        (
            "hold a process by a descriptor",
            rustix::process::pidfd_open(own, rustix::process::PidfdFlags::empty()).is_ok(),
        ),
    ];
    if wanted.read_only {
        bad.push(("write a file", fs::write(root.join("trial"), "trial").is_ok()));
        bad.push(("make a directory", fs::create_dir(root.join("made")).is_ok()));
        bad.push(("remove a file", fs::remove_file(root.join("there")).is_ok()));
    }
    let names = |list: &[(&str, bool)], wanted| {
        list.iter().filter(|(_, could)| *could == wanted).map(|(what, _)| (*what).to_owned()).collect()
    };
    Ok(Trial { confinement, could: names(&bad, true), could_not: names(&good, false) })
}

fn moved(root: &Path) -> std::io::Result<()> {
    fs::create_dir(root.join("one"))?;
    fs::create_dir(root.join("two"))?;
    fs::write(root.join("one/file"), "moved")?;
    fs::rename(root.join("one/file"), root.join("two/file"))
}

fn truncated(file: &Path) -> rustix::io::Result<()> {
    let flags = rustix::fs::OFlags::PATH | rustix::fs::OFlags::CLOEXEC;
    let file = rustix::fs::open(file, flags, rustix::fs::Mode::empty())?;
    // By the way that leads around the check of the name.
    let name = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
    let flags = rustix::fs::OFlags::WRONLY | rustix::fs::OFlags::TRUNC | rustix::fs::OFlags::CLOEXEC;
    rustix::fs::open(name, flags, rustix::fs::Mode::empty()).map(drop)
}

fn parent_memory() -> std::io::Result<fs::File> {
    let parent = rustix::process::getppid().ok_or(std::io::ErrorKind::NotFound)?;
    fs::File::open(format!("/proc/{}/mem", parent.as_raw_nonzero()))
}

fn other_namespace() -> rustix::io::Result<()> {
    use rustix::thread::{ThreadNameSpaceType, move_into_thread_name_spaces};
    let own = rustix::process::pidfd_open(rustix::process::getpid(), rustix::process::PidfdFlags::empty())?;
    move_into_thread_name_spaces(std::os::fd::AsFd::as_fd(&own), ThreadNameSpaceType::NETWORK)
}

fn signalled() -> rustix::io::Result<()> {
    let parent = rustix::process::getppid().ok_or(rustix::io::Errno::SRCH)?;
    rustix::process::test_kill_process(parent)
}

fn raised() -> rustix::io::Result<()> {
    use rustix::process::{Resource, Rlimit, setrlimit};
    setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) })
}
