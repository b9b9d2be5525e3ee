//! Whoever speaks the agent's protocol with something else in mind: raw requests to `lockstep sftp-server --root`.

use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use lockstep::endpoint::{BeginOptions, CommitOptions, Committed, ScanOptions};
use lockstep::manifest::{Content, Digest, Entry, Manifest, Timestamp, Tree};
use lockstep::path::RelPath;
use lockstep::wire::extension::{self, EXTENDED_REPLY, Fields, STATUS, put_entry, put_frame, put_string};

use sha2::Digest as _;

use crate::kit::own::Server;
use crate::kit::served::Served;
use crate::kit::{noise, until};

/// A session of the agent, confined to `root`, that is spoken to in single messages.
pub(crate) struct Peer {
    child: Child,
    input: Option<ChildStdin>,
    output: Option<ChildStdout>,
    next: u32,
    at: tempfile::TempDir,
}

/// What the other end answered: the body of a reply, or what a status says.
type Answer = Result<Vec<u8>, String>;

impl Peer {
    fn start() -> Peer {
        let at = tempfile::tempdir().unwrap();
        fs::create_dir(at.path().join("root")).unwrap();
        Peer::at(at)
    }

    fn at(at: tempfile::TempDir) -> Peer {
        let (child, input, output) = spawn(at.path());
        Peer { child, input: Some(input), output: Some(output), next: 0, at }
    }

    /// The one that `command` starts.
    pub(crate) fn by(command: &mut Command) -> Peer {
        let (child, input, output) = started(command);
        Peer { child, input: Some(input), output: Some(output), next: 0, at: tempfile::tempdir().unwrap() }
    }

    fn root(&self, name: &str) -> PathBuf {
        self.at.path().join("root").join(name)
    }

    fn send(&mut self, name: &str, body: &[u8]) -> u32 {
        self.next += 1;
        let packet = packet(name, body, self.next);
        self.input.as_mut().unwrap().write_all(&packet).unwrap();
        self.next
    }

    fn receive(&mut self) -> (u32, Answer) {
        let mut reply = self.receive_plain();
        let id = u32::from_be_bytes(reply[1..5].try_into().unwrap());
        let body = reply.split_off(5);
        match reply[0] {
            EXTENDED_REPLY => (id, Ok(body)),
            STATUS => (id, Err(String::from_utf8_lossy(Fields(&body[4..]).string().unwrap()).into_owned())),
            kind => panic!("an answer of type {kind}"),
        }
    }

    fn receive_plain(&mut self) -> Vec<u8> {
        let output = self.output.as_mut().unwrap();
        let mut length = [0; 4];
        output.read_exact(&mut length).expect("the server has gone");
        let mut reply = vec![0; u32::from_be_bytes(length) as usize];
        output.read_exact(&mut reply).unwrap();
        reply
    }

    pub(crate) fn ask(&mut self, name: &str, body: &[u8]) -> Answer {
        let id = self.send(name, body);
        let (answered, answer) = self.receive();
        assert_eq!(answered, id);
        answer
    }

    fn begin(&mut self, root: &str, options: &BeginOptions) -> Answer {
        self.ask("begin", &begin(root, options))
    }

    /// Begins a run that is told what files may be made of, and compares.
    fn compares(&mut self, entries: &[Entry]) {
        self.begin("/", &BeginOptions { delta: true, ..BeginOptions::default() }).unwrap();
        self.ask("entries", &frame(entries)).unwrap();
        self.ask("diff", &[]).unwrap();
    }

    /// Begins, and has these entries compared.
    fn prepare(&mut self, root: &str, entries: &[Entry]) {
        self.begin(root, &BeginOptions { ignore_free_space: true, ..BeginOptions::default() }).unwrap();
        self.ask("entries", &frame(entries)).unwrap();
        self.ask("diff", &[]).unwrap();
    }

    fn commit(&mut self, options: &CommitOptions) -> Committed {
        let mut body = Vec::new();
        put_string(&mut body, &serde_json::to_vec(options).unwrap());
        let reply = self.ask("commit", &body).unwrap();
        serde_json::from_slice(Fields(&reply).string().unwrap()).unwrap()
    }

    /// Goes without a word.
    fn hang_up(&mut self) {
        (self.input, self.output) = (None, None);
    }

    fn has_ended(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn spawn(at: &Path) -> (Child, ChildStdin, ChildStdout) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lockstep"));
    started(command.args(["sftp-server", "--root"]).arg(at.join("root")))
}

fn started(command: &mut Command) -> (Child, ChildStdin, ChildStdout) {
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let (mut input, mut output) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
    input.write_all(&[0, 0, 0, 5, 1, 0, 0, 0, 3]).unwrap();
    let mut length = [0; 4];
    output.read_exact(&mut length).unwrap();
    output.read_exact(&mut vec![0; u32::from_be_bytes(length) as usize]).unwrap();
    (child, input, output)
}

fn packet(name: &str, body: &[u8], id: u32) -> Vec<u8> {
    let mut packet = extension::request(name);
    packet.extend_from_slice(body);
    let length = packet.len() as u32 - 4;
    packet[..4].copy_from_slice(&length.to_be_bytes());
    packet[5..9].copy_from_slice(&id.to_be_bytes());
    packet
}

pub(crate) fn begin(root: &str, options: &BeginOptions) -> Vec<u8> {
    let mut body = Vec::new();
    put_string(&mut body, root.as_bytes());
    put_string(&mut body, &serde_json::to_vec(options).unwrap());
    body
}

pub(crate) fn entry(path: &str, content: Content) -> Entry {
    let (owner, group) = ("o".into(), "g".into());
    Entry { path: RelPath::new(path).unwrap(), content, mtime: Timestamp::default(), mode: 0o644, owner, group }
}

pub(crate) fn file(path: &str, size: u64) -> Entry {
    entry(path, Content::File { size, digest: None })
}

pub(crate) fn link(path: &str, target: &str) -> Entry {
    entry(path, Content::Symlink { target: target.as_bytes().into() })
}

pub(crate) fn frame(entries: &[Entry]) -> Vec<u8> {
    let (mut raw, mut body) = (Vec::new(), Vec::new());
    entries.iter().for_each(|entry| put_entry(&mut raw, entry));
    put_frame(&mut body, &raw, None);
    body
}

#[test]
fn h13_no_link_out_of_a_confined_root_is_published_whichever_protocol_asks_for_it() {
    let mut peer = Peer::start();
    fs::create_dir(peer.root("sub")).unwrap();
    symlink("/etc/hostname", peer.root("sub/there")).unwrap();
    fs::write(peer.root("sub/extra"), "x").unwrap();
    let entries = [
        link("abs", "/etc/passwd"),
        // Within what the client is confined to, though not within the directory of the run.
        link("beside", "../other"),
        link("dot", "."),
        link("far", "../../x"),
        link("near", "dot/there"),
        // By its text it stays; through 'dot' it does not.
        link("round", "dot/../../x"),
        // As it is there already.
        link("there", "/etc/hostname"),
        link("unclear", "dot/../there"),
    ];
    peer.prepare("/sub", &entries);
    let committed = peer.commit(&CommitOptions { delete: true, ..CommitOptions::default() });
    let refused: Vec<&str> = committed.problems.iter().map(|(path, _)| path.as_str()).collect();
    assert_eq!(refused, ["abs", "far", "round", "unclear"]);
    assert!(committed.problems.iter().all(|(_, why)| why.contains("lead out of the root")), "{committed:?}");
    for (name, is) in [("abs", false), ("far", false), ("round", false), ("unclear", false), ("near", true)] {
        assert_eq!(fs::symlink_metadata(peer.root("sub").join(name)).is_ok(), is, "{name}");
    }
    assert_eq!(fs::read_link(peer.root("sub/beside")).unwrap(), Path::new("../other"));
    assert_eq!(fs::read_link(peer.root("sub/there")).unwrap(), Path::new("/etc/hostname"));
    assert!(fs::exists(peer.root("sub/extra")).unwrap(), "something was deleted after a refusal");
    let audit = fs::read_to_string(peer.root("sub/.lockstep/audit.jsonl")).unwrap();
    assert_eq!(audit.matches("\"refuse\"").count(), 4, "{audit}");
    let manifest = fs::read_to_string(peer.root("sub/.lockstep/manifest")).unwrap();
    assert!(manifest.contains("\tnear") && !manifest.contains("\tabs"), "{manifest}");
    assert!(fs::read_dir(peer.root("sub/.lockstep/staging")).unwrap().next().is_none());
}

#[test]
fn h13_a_sender_is_told_which_links_were_refused_and_a_unit_with_one_is_held_back() {
    let server = Server::start(&[]);
    let at = server.at.path();
    fs::create_dir_all(at.join("source/unit")).unwrap();
    fs::write(at.join("source/unit/f"), "f").unwrap();
    fs::write(at.join("source/g"), "g").unwrap();
    symlink("/etc/passwd", at.join("source/unit/out")).unwrap();
    let push = |more: &[&str]| {
        let arguments = ["push", "--links=all", "--unit=unit/", "source", "sync@127.0.0.1:/"];
        server.lockstep(&[&arguments[..], more].concat(), "user")
    };
    for more in [&["-n"][..], &[]] {
        let output = push(more);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(said.contains("is a link (to '/etc/passwd') that would lead out"), "{said}");
        assert_eq!(output.status.code(), Some(if more.is_empty() { 4 } else { 0 }), "{said}");
    }
    assert_eq!(fs::read_to_string(at.join("root/g")).unwrap(), "g");
    assert!(!fs::exists(at.join("root/unit")).unwrap());
}

/// Index, then what an `open` says of where it goes on.
fn open(index: u32) -> Vec<u8> {
    [&index.to_be_bytes()[..], &[0; 8]].concat()
}

fn hole(index: u32, offset: u64, length: u64) -> Vec<u8> {
    [&index.to_be_bytes()[..], &offset.to_be_bytes(), &length.to_be_bytes()].concat()
}

#[test]
fn h42_a_session_of_the_agent_has_so_many_files_open_and_no_more() {
    let mut peer = Peer::start();
    let entries: Vec<Entry> = (0..1000).map(|number| file(&format!("{number:04}"), 10)).collect();
    peer.prepare("/", &entries);
    let mut opened = 0;
    for index in 0..1000 {
        match peer.ask("open", &open(index)) {
            Ok(_) => opened += 1,
            Err(why) => assert!(why.contains("256 files are open"), "{why}"),
        }
    }
    assert_eq!(opened, 256);
    let descriptors = fs::read_dir(format!("/proc/{}/fd", peer.child.id())).unwrap().count();
    assert!(descriptors < 320, "{descriptors}");
    // One that is given up makes room.
    peer.ask("discard", &1_u32.to_be_bytes()).unwrap();
    peer.ask("open", &open(999)).unwrap();
    assert!(peer.ask("open", &open(998)).is_err());
    peer.ask("finish", &[&0_u32.to_be_bytes()[..], &[0; 32]].concat()).unwrap();
    peer.ask("open", &open(998)).unwrap();
    // One that is open is not opened again beside itself.
    assert!(peer.ask("open", &open(2)).unwrap_err().contains("out of order"));
}

#[test]
fn h35_who_waits_for_a_root_is_not_waited_for_when_he_has_gone() {
    let mut first = Peer::start();
    first.begin("/", &BeginOptions::default()).unwrap();
    let at = first.at.path().to_owned();
    let (mut child, mut input, output) = spawn(&at);
    let forever = BeginOptions { wait_seconds: u64::MAX, ..BeginOptions::default() };
    input.write_all(&packet("begin", &begin("/", &forever), 1)).unwrap();
    // What waits behind it keeps the session from seeing the end of its input.
    for number in 2..40 {
        input.write_all(&packet("plan", &[0; 8], number)).unwrap();
    }
    std::thread::sleep(Duration::from_millis(300));
    assert!(child.try_wait().unwrap().is_none(), "it does not wait");
    drop((input, output));
    until("the end of the session", || child.try_wait().unwrap().is_some());
    assert!(!first.has_ended());
}

#[test]
fn h34_a_client_that_goes_leaves_no_work_behind() {
    let mut peer = Peer::start();
    peer.prepare("/", &[file("sparse", 1 << 42)]);
    peer.ask("open", &open(0)).unwrap();
    for length in [(1 << 30) + 1, 1 << 41, u64::MAX] {
        assert!(peer.ask("hole", &hole(0, 0, length)).unwrap_err().contains("the length of a hole"));
    }
    // Each takes a second or so to be hashed.
    for number in 0..1000 {
        peer.send("hole", &hole(0, number << 30, 1 << 30));
    }
    peer.hang_up();
    let started = Instant::now();
    until("the end of the session", || peer.has_ended());
    assert!(started.elapsed() < Duration::from_secs(12));
}

#[test]
fn a_stream_takes_so_many_files_to_be_fetched_and_no_more() {
    let mut peer = Peer::start();
    fs::write(peer.root("f"), "content").unwrap();
    let mut scan = Vec::new();
    put_string(&mut scan, b"/");
    put_string(&mut scan, &serde_json::to_vec(&ScanOptions::default()).unwrap());
    peer.ask("scan", &scan).unwrap();
    let fetch = |count: u32| {
        let one = [0; 4 + 8 + 1];
        [&0_u32.to_be_bytes()[..], &count.to_be_bytes(), &one.repeat(count as usize)].concat()
    };
    for _ in 0..4 {
        peer.ask("fetch", &fetch(256)).unwrap();
    }
    assert!(peer.ask("fetch", &fetch(1)).unwrap_err().contains("number of files"));
    assert!(peer.ask("fetch", &fetch(0xffff)).unwrap_err().contains("number of files"));
    let bundle = peer.ask("next", &[0, 0, 0, 0, 0]).unwrap();
    assert!(bundle.windows(7).filter(|window| window == b"content").count() == 1024);
    peer.ask("fetch", &fetch(1024)).unwrap();
    // Streams, of which each has a file open, are so many too.
    let next = |stream: u32| [&stream.to_be_bytes()[..], &[0]].concat();
    assert_eq!((1..40).filter(|number| peer.ask("next", &next(number * 8)).is_ok()).count(), 31);
}

#[test]
fn h07_entries_that_do_not_ascend_end_the_run_as_they_come() {
    let mut peer = Peer::start();
    peer.begin("/", &BeginOptions::default()).unwrap();
    peer.ask("entries", &frame(&[file("b", 1)])).unwrap();
    assert!(peer.ask("entries", &frame(&[file("a", 1)])).unwrap_err().contains("do not ascend"));
    assert!(peer.ask("diff", &[]).is_err());
    // And nobody else is kept waiting.
    let mut other = Peer::at(std::mem::replace(&mut peer.at, tempfile::tempdir().unwrap()));
    other.begin("/", &BeginOptions::default()).unwrap();
}

/// What somebody who may write in a root would like the next run there to carry out: a program of root's.
fn plant(at: &Path) {
    let staging = at.join(".lockstep/staging/current");
    fs::create_dir_all(staging.join("tree")).unwrap();
    fs::write(staging.join("tree/evil"), "#!/bin/sh\n").unwrap();
    let digest = Digest(sha2::Sha256::digest(b"#!/bin/sh\n").into());
    let evil = Entry { mode: 0o4755, owner: "root".into(), ..file("evil", 0) };
    let evil = Entry { content: Content::File { size: 10, digest: Some(digest) }, ..evil };
    let tree = Tree::new(vec![evil]).unwrap();
    let manifest = Manifest { generation: 1, created: Timestamp::default(), tree };
    fs::write(staging.join("manifest"), lockstep::manifest::format::encode(&manifest)).unwrap();
    let hex: String = b"evil".iter().map(|byte| format!("{byte:02x}")).collect();
    fs::write(staging.join("commit"), format!("\n\nR{hex}\nA{hex}\n")).unwrap();
    fs::write(staging.join("acls"), "").unwrap();
}

#[test]
fn what_somebody_else_wrote_into_the_state_directory_is_not_carried_out() {
    let open = |path: &Path| fs::set_permissions(path, fs::Permissions::from_mode(0o777)).unwrap();
    let at = tempfile::tempdir().unwrap();
    let path = |name: &str| at.path().join(name);
    fs::create_dir(path("source")).unwrap();
    fs::write(path("source/f"), "f").unwrap();
    let push = |target: &str| {
        let output = Command::new(env!("CARGO_BIN_EXE_lockstep"))
            .args(["push", "source", target])
            .current_dir(at.path())
            .env("XDG_STATE_HOME", path("state"))
            .stdin(Stdio::null())
            .output()
            .unwrap();
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    // At a root, and in the hidden place of one that is not there yet.
    for (planted, target) in [("root", "root"), (".new.lockstep", "new")] {
        plant(&path(planted));
        let state = if target == "new" { path(planted) } else { path("root/.lockstep") };
        open(&state);
        let (code, said) = push(target);
        assert_eq!(code, Some(4), "{said}");
        assert!(said.contains("somebody else may have put there"), "{said}");
        if rustix::process::geteuid().is_root() {
            let nobody = rustix::fs::Uid::from_raw(65534);
            fs::set_permissions(&state, fs::Permissions::from_mode(0o700)).unwrap();
            rustix::fs::chown(&state, Some(nobody), None).unwrap();
            let (code, said) = push(target);
            assert_eq!(code, Some(4), "{said}");
            assert!(said.contains("belongs to user 65534"), "{said}");
        }
        assert!(!fs::exists(path(planted).join("evil")).unwrap());
    }
    // What it is all about: as the own record of a run that was interrupted it would be carried out.
    fs::remove_dir_all(path("root")).unwrap();
    plant(&path("root"));
    fs::set_permissions(path("root/.lockstep"), fs::Permissions::from_mode(0o700)).unwrap();
    assert_eq!(push("root").0, Some(0));
    assert_eq!(fs::metadata(path("root/evil")).unwrap().permissions().mode() & 0o7777, 0o4755);
}

#[test]
fn h35_who_waits_over_a_connection_that_is_gone_gives_his_place_back() {
    let served = Served::start("", "");
    let root = lockstep::root::Root::open(&served.path("sync")).unwrap();
    let _lock = lockstep::staging::RootLock::take(&root, "ana@gpu01", Duration::ZERO, &|| false).unwrap();
    let mut held = served.hold("sync", &[]);
    assert!(held.speaks());
    let forever = BeginOptions { wait_seconds: u64::MAX, ..BeginOptions::default() };
    let pid = rustix::process::Pid::from_child(&held.0);
    let input = held.0.stdin.as_mut().unwrap();
    input.write_all(&packet("begin", &begin("/", &forever), 1)).unwrap();
    // More than is read while a session is at work: the end of the channel stands behind it.
    let junk = packet("plan", &vec![0; 1 << 20], 2);
    std::thread::scope(|scope| {
        scope.spawn(|| while input.write_all(&junk).is_ok() {});
        std::thread::sleep(Duration::from_secs(2));
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    });
    served.wait_for("session ended");
}

const MIB: usize = 1 << 20;

#[test]
fn h42_what_is_asked_of_a_file_that_may_be_copied_is_bounded() {
    let mut peer = Peer::start();
    let old = noise(0, 3 * MIB);
    fs::write(peer.root("old"), &old).unwrap();
    peer.compares(&[file("new", 3 * MIB as u64)]);
    let numbers = |numbers: &[u64]| -> Vec<u8> {
        [&0_u32.to_be_bytes()[..], &numbers.iter().flat_map(|number| number.to_be_bytes()).collect::<Vec<_>>()].concat()
    };
    let alike = |index: u32, piece: u32, offset: u64| {
        [&index.to_be_bytes()[..], &piece.to_be_bytes(), &offset.to_be_bytes(), &[255; 8], &[0]].concat()
    };
    let copy =
        |length: u64, offset: u64| [&numbers(&[0, length])[..], &0_u32.to_be_bytes(), &offset.to_be_bytes()].concat();
    let listed = peer.ask("alike", &alike(0, 0, 0)).unwrap();
    assert!(listed.len() > 1 + 1 + 1 + 8 + 20 && listed[..3] == [1, 1, 0]);
    // From beyond its end nothing is listed, nor of a file that there is not.
    for offset in [u64::MAX, 3 * MIB as u64] {
        assert_eq!(peer.ask("alike", &alike(0, 0, offset)).unwrap().len(), 1 + 1 + 1 + 8);
    }
    for (index, piece) in [(9, 0), (0, 1), (0, u32::MAX)] {
        assert_eq!(peer.ask("alike", &alike(index, piece, 0)).unwrap(), [0]);
    }
    peer.ask("open", &numbers(&[0])).unwrap();
    assert!(peer.ask("copy", &copy((8 << 20) + 1, 0)).is_err());
    drop(peer);
    // What lies beyond the end of what is copied fails that file.
    let mut peer = Peer::start();
    fs::write(peer.root("old"), &old).unwrap();
    peer.compares(&[file("new", 3 * MIB as u64)]);
    peer.ask("open", &numbers(&[0])).unwrap();
    peer.ask("copy", &copy(MIB as u64, u64::MAX - 5)).unwrap();
    let finished = peer.ask("finish", &[&0_u32.to_be_bytes()[..], &[0; 32]].concat()).unwrap();
    assert!(String::from_utf8_lossy(&finished).contains("cannot be made of what is there"), "{finished:?}");
    assert!(!peer.root("new").exists());
}
