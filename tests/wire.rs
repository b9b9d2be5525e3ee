//! Raw bytes to `lockstep sftp-server`, and the same to OpenSSH's server where the answers should be equal.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use lockstep::wire::buffer::{Reader, Writer};
use lockstep::wire::sftp::{Attributes, Status, open, packet};

const READ_WRITE_NEW: u32 = open::READ | open::WRITE | open::CREATE | open::TRUNCATE;

/// A server on pipes.
struct Server {
    child: Child,
    input: Option<ChildStdin>,
    output: ChildStdout,
    next: u32,
    version: Vec<u8>,
}

impl Server {
    fn spawn(command: &mut Command) -> Server {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let (input, output) = (child.stdin.take(), child.stdout.take().unwrap());
        let mut server = Server { child, input, output, next: 1, version: Vec::new() };
        server.send(&Writer::new(packet::INIT).u32(3).finish());
        server.version = server.receive().unwrap();
        server
    }

    fn lockstep(arguments: &[&str]) -> Server {
        Server::spawn(Command::new(env!("CARGO_BIN_EXE_lockstep")).arg("sftp-server").args(arguments))
    }

    fn confined(root: &Path) -> Server {
        Server::lockstep(&["--root", root.to_str().unwrap()])
    }

    fn openssh() -> Server {
        let path = "/usr/lib/openssh/sftp-server";
        assert!(Path::new(path).exists(), "{path} is missing: Debian package openssh-sftp-server");
        Server::spawn(&mut Command::new(path))
    }

    fn send(&mut self, bytes: &[u8]) {
        self.input.as_mut().unwrap().write_all(bytes).unwrap();
    }

    /// One packet without its length; `None` when the server has gone.
    fn receive(&mut self) -> Option<Vec<u8>> {
        let mut length = [0; 4];
        self.output.read_exact(&mut length).ok()?;
        let mut body = vec![0; u32::from_be_bytes(length) as usize];
        self.output.read_exact(&mut body).unwrap();
        Some(body)
    }

    /// Sends a request whose fields `fields` writes; its number.
    fn request(&mut self, kind: u8, fields: impl FnOnce(&mut Writer) -> &mut Writer) -> u32 {
        let mut writer = Writer::new(kind);
        self.next += 1;
        fields(writer.u32(self.next));
        self.send(&writer.finish());
        self.next
    }

    /// The answer: its type and what follows the number.
    fn ask(&mut self, kind: u8, fields: impl FnOnce(&mut Writer) -> &mut Writer) -> (u8, Vec<u8>) {
        let id = self.request(kind, fields);
        let reply = self.receive().expect("the server has gone");
        assert_eq!(reply[1..5], id.to_be_bytes());
        (reply[0], reply[5..].to_vec())
    }

    fn status(&mut self, kind: u8, fields: impl FnOnce(&mut Writer) -> &mut Writer) -> Status {
        let (kind, body) = self.ask(kind, fields);
        assert_eq!(kind, packet::STATUS);
        Status::from_code(Reader(&body).u32().unwrap())
    }

    fn opened(&mut self, kind: u8, fields: impl FnOnce(&mut Writer) -> &mut Writer) -> Vec<u8> {
        let (kind, body) = self.ask(kind, fields);
        assert_eq!(kind, packet::HANDLE, "{}", String::from_utf8_lossy(&body));
        Reader(&body).string().unwrap().to_vec()
    }

    fn open(&mut self, path: &str, flags: u32) -> Vec<u8> {
        self.opened(packet::OPEN, |w| w.string(path.as_bytes()).u32(flags).u32(0))
    }

    fn path(&mut self, kind: u8, path: &str) -> Status {
        self.status(kind, |w| w.string(path.as_bytes()).u32(0))
    }

    fn pair(&mut self, kind: u8, first: &str, second: &str) -> Status {
        self.status(kind, |w| w.string(first.as_bytes()).string(second.as_bytes()))
    }

    fn handle(&mut self, kind: u8, handle: &[u8]) -> Status {
        self.status(kind, |w| w.string(handle))
    }

    fn set_mode(&mut self, path: &str, mode: u32) -> Status {
        self.status(packet::SETSTAT, |w| w.string(path.as_bytes()).u32(4).u32(mode))
    }

    fn write(&mut self, handle: &[u8], offset: u64, data: &[u8]) -> Status {
        self.status(packet::WRITE, |w| w.string(handle).u64(offset).string(data))
    }

    fn read(&mut self, handle: &[u8], offset: u64, length: u32) -> Result<Vec<u8>, Status> {
        let (kind, body) = self.ask(packet::READ, |w| w.string(handle).u64(offset).u32(length));
        match kind {
            packet::DATA => Ok(Reader(&body).string().unwrap().to_vec()),
            _ => Err(Status::from_code(Reader(&body).u32().unwrap())),
        }
    }

    /// The first name of a reply with names.
    fn name(&mut self, kind: u8, fields: impl FnOnce(&mut Writer) -> &mut Writer) -> Result<String, Status> {
        let (kind, body) = self.ask(kind, fields);
        let mut reader = Reader(&body);
        let first = reader.u32().unwrap();
        match kind {
            packet::NAME => Ok(String::from_utf8(reader.string().unwrap().to_vec()).unwrap()),
            _ => Err(Status::from_code(first)),
        }
    }

    /// Names and long names of a directory, sorted.
    fn list(&mut self, path: &str) -> Vec<(String, String, Attributes)> {
        let handle = self.opened(packet::OPENDIR, |w| w.string(path.as_bytes()));
        let mut entries = Vec::new();
        loop {
            let (kind, body) = self.ask(packet::READDIR, |w| w.string(&handle));
            let mut reader = Reader(&body);
            let count = reader.u32().unwrap();
            if kind != packet::NAME {
                assert_eq!(Status::from_code(count), Status::EndOfFile);
                break;
            }
            for _ in 0..count {
                let mut text = || String::from_utf8(reader.string().unwrap().to_vec()).unwrap();
                let (name, long) = (text(), text());
                entries.push((name, long, Attributes::decode(&mut reader).unwrap()));
            }
        }
        assert_eq!(self.handle(packet::CLOSE, &handle), Status::Ok);
        entries.sort_by(|a, b| a.0.cmp(&b.0));
        entries
    }

    /// Whether the server ended the session by itself, and otherwise than with success.
    fn broke_off(mut self) -> bool {
        let mut rest = Vec::new();
        self.output.read_to_end(&mut rest).unwrap();
        rest.is_empty() && !self.child.wait().unwrap().success()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.input.take());
        let _ = self.child.wait();
    }
}

fn mode(path: &Path) -> u32 {
    fs::symlink_metadata(path).unwrap().permissions().mode() & 0o7777
}

#[test]
fn h40_handles_that_are_unknown_used_up_or_of_the_wrong_kind_fail() {
    let at = tempfile::tempdir().unwrap();
    let mut server = Server::confined(at.path());
    let file = server.open("/file", READ_WRITE_NEW);
    let directory = server.opened(packet::OPENDIR, |w| w.string(b"/"));
    assert_eq!(server.read(&directory, 0, 10), Err(Status::Failure));
    assert_eq!(server.handle(packet::FSTAT, &directory), Status::Failure);
    assert_eq!(server.handle(packet::READDIR, &file), Status::Failure);
    for unknown in [&b""[..], b"12345678", b"\0\0\0\0\0\0\0\0", b"far too long for a handle", &[0xff; 8]] {
        assert_eq!(server.read(unknown, 0, 10), Err(Status::Failure));
        assert_eq!(server.write(unknown, 0, b"x"), Status::Failure);
        assert_eq!(server.handle(packet::READDIR, unknown), Status::Failure);
        assert_eq!(server.handle(packet::CLOSE, unknown), Status::Failure);
    }
    assert_eq!(server.handle(packet::CLOSE, &file), Status::Ok);
    let other = server.open("/other", READ_WRITE_NEW);
    assert_ne!(other, file);
    assert_eq!(server.write(&file, 0, b"x"), Status::Failure);
    assert_eq!(server.handle(packet::CLOSE, &file), Status::Failure);
    assert_eq!(server.write(&other, 0, b"x"), Status::Ok);
}

#[test]
fn h41_a_stream_that_is_not_sftp_ends_the_session() {
    let at = tempfile::tempdir().unwrap();
    let name_too_long = Writer::new(packet::STAT).u32(1).u32(u32::MAX).bytes(b"abc").finish();
    let one_byte_short = Writer::new(packet::STAT).u32(1).u32(4).bytes(b"abc").finish();
    let data_too_long = Writer::new(packet::WRITE).u32(1).string(b"12345678").u64(0).u32(1 << 30).finish();
    let no_fields = Writer::new(packet::OPEN).u32(1).finish();
    let no_id = vec![0, 0, 0, 1, packet::STAT];
    let many_pairs = Writer::new(packet::MKDIR).u32(1).string(b"/d").u32(1 << 31).u32(u32::MAX).finish();
    let lengths = [0, u32::MAX, 1 << 31, (256 << 10) + 1025].map(|length: u32| {
        let mut bytes = length.to_be_bytes().to_vec();
        bytes.push(packet::WRITE);
        bytes
    });
    let bad = [name_too_long, one_byte_short, data_too_long, no_fields, no_id, many_pairs];
    for bytes in bad.into_iter().chain(lengths) {
        let mut server = Server::confined(at.path());
        assert_eq!(server.path(packet::STAT, "/missing"), Status::NoSuchFile);
        server.send(&bytes);
        assert!(server.broke_off(), "{bytes:?}");
    }
    assert!(!at.path().join("d").exists());
}

#[test]
fn h41_nothing_comes_before_init() {
    let mut child = Command::new(env!("CARGO_BIN_EXE_lockstep"))
        .arg("sftp-server")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    child.stdin.as_mut().unwrap().write_all(&Writer::new(packet::STAT).u32(7).string(b"/").finish()).unwrap();
    let mut said = Vec::new();
    child.stdout.take().unwrap().read_to_end(&mut said).unwrap();
    assert!(said.is_empty() && !child.wait().unwrap().success());
}

#[test]
fn h42_open_handles_have_a_cap_and_closing_one_makes_room() {
    let at = tempfile::tempdir().unwrap();
    fs::write(at.path().join("file"), "x").unwrap();
    let mut server = Server::confined(at.path());
    let (kind, body) = server.ask(packet::EXTENDED, |w| w.string(b"limits@openssh.com"));
    assert_eq!(kind, packet::EXTENDED_REPLY);
    let told = u64::from_be_bytes(body[24..32].try_into().unwrap());
    let mut handles = Vec::new();
    let refused = loop {
        let (kind, body) = server.ask(packet::OPENDIR, |w| w.string(b"/"));
        match kind {
            packet::HANDLE => handles.push(Reader(&body).string().unwrap().to_vec()),
            _ => break Status::from_code(Reader(&body).u32().unwrap()),
        }
        assert!(handles.len() <= 100_000, "no cap");
    };
    assert_eq!(refused, Status::Failure);
    assert!(handles.len() as u64 <= told, "{} of {told}", handles.len());
    let more = |server: &mut Server| server.ask(packet::OPEN, |w| w.string(b"/file").u32(open::READ).u32(0)).0;
    assert_eq!(more(&mut server), packet::STATUS);
    assert_eq!(server.handle(packet::CLOSE, &handles[0]), Status::Ok);
    assert_eq!(more(&mut server), packet::HANDLE);
}

#[test]
fn h44_unknown_requests_are_answered() {
    let at = tempfile::tempdir().unwrap();
    let mut server = Server::confined(at.path());
    for kind in [0, 2, 21, 99, 101, 202, 255] {
        assert_eq!(server.status(kind, |w| w.string(b"x")), Status::Unsupported, "{kind}");
    }
    for name in [&b"no-such@example.com"[..], b"", b"copy-data\0"] {
        assert_eq!(server.status(packet::EXTENDED, |w| w.string(name)), Status::Unsupported);
    }
}

#[test]
fn h23_offsets_and_sizes_that_no_file_has_are_refused() {
    let at = tempfile::tempdir().unwrap();
    let mut server = Server::confined(at.path());
    let file = server.open("/file", READ_WRITE_NEW);
    for offset in [u64::MAX, u64::MAX - 3, 1 << 63, (1 << 63) - 2] {
        assert_ne!(server.write(&file, offset, b"data"), Status::Ok, "{offset}");
    }
    assert!(server.read(&file, u64::MAX, 10).is_err());
    for size in [u64::MAX, 1 << 63] {
        assert_ne!(server.status(packet::FSETSTAT, |w| w.string(&file).u32(1).u64(size)), Status::Ok);
        assert_ne!(server.status(packet::SETSTAT, |w| w.string(b"/file").u32(1).u64(size)), Status::Ok);
    }
    assert_eq!(fs::metadata(at.path().join("file")).unwrap().len(), 0);
    // A length of any size is answered with what there is.
    assert_eq!(server.write(&file, 0, b"data"), Status::Ok);
    assert_eq!(server.read(&file, 1, u32::MAX), Ok(b"ata".to_vec()));
}

#[test]
fn h45_special_bits_are_dropped_however_they_are_asked_for() {
    let at = tempfile::tempdir().unwrap();
    let mut server = Server::confined(at.path());
    let with_mode = |server: &mut Server, name: &str, mode: u32| {
        server.opened(packet::OPEN, |w| w.string(name.as_bytes()).u32(READ_WRITE_NEW).u32(4).u32(mode))
    };
    let file = with_mode(&mut server, "/f", 0o4755);
    assert_eq!(mode(&at.path().join("f")), 0o755);
    assert_eq!(server.status(packet::FSETSTAT, |w| w.string(&file).u32(4).u32(0o6711)), Status::Ok);
    assert_eq!(mode(&at.path().join("f")), 0o711);
    assert_eq!(server.set_mode("/f", 0o102755), Status::Ok);
    assert_eq!(mode(&at.path().join("f")), 0o755);
    let mkdir = |server: &mut Server, mode: u32| server.status(packet::MKDIR, |w| w.string(b"/d").u32(4).u32(mode));
    assert_eq!(mkdir(&mut server, 0o2755), Status::Ok);
    assert_eq!(mode(&at.path().join("d")), 0o755);
    // A sticky bit only takes rights away.
    assert_eq!(server.set_mode("/d", 0o7777), Status::Ok);
    assert_eq!(mode(&at.path().join("d")), 0o1777);
    // What the owner of the root gave stays where it is asked for, and goes where it is not.
    fs::set_permissions(at.path().join("d"), fs::Permissions::from_mode(0o2770)).unwrap();
    assert_eq!(server.set_mode("/d", 0o2750), Status::Ok);
    assert_eq!(mode(&at.path().join("d")), 0o2750);
    // New content does not get the rights of the old.
    fs::set_permissions(at.path().join("f"), fs::Permissions::from_mode(0o4755)).unwrap();
    let again = server.open("/f", open::WRITE);
    assert_eq!(server.write(&again, 0, b"new"), Status::Ok);
    assert_eq!(mode(&at.path().join("f")), 0o755);
    drop(server);
    let log = fs::read_to_string(at.path().join(".lockstep/audit.jsonl")).unwrap();
    let refusals = log.lines().filter(|line| line.contains("\"refuse\"") && line.contains("special bits"));
    assert_eq!(refusals.count(), 5, "{log}");
}

#[test]
fn h01_h02_h14_nothing_outside_the_root_is_reached() {
    let at = tempfile::tempdir().unwrap();
    let (root, outside) = (at.path().join("data"), at.path().join("data_evil"));
    fs::create_dir_all(root.join("sub")).unwrap();
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("secret"), "secret").unwrap();
    fs::set_permissions(outside.join("secret"), fs::Permissions::from_mode(0o640)).unwrap();
    symlink(&outside, root.join("absolute")).unwrap();
    symlink("../data_evil", root.join("relative")).unwrap();
    symlink("../../data_evil/secret", root.join("sub/file")).unwrap();
    symlink("/sub", root.join("inside")).unwrap();
    symlink("/proc/self/root", root.join("magic")).unwrap();
    let before = fs::metadata(outside.join("secret")).unwrap();
    let mut server = Server::confined(&root);
    let outer = outside.join("secret").to_str().unwrap().to_owned();
    for path in [
        "/../data_evil/secret",
        "../data_evil/secret",
        "/absolute/secret",
        "/relative/secret",
        "/sub/file",
        "/sub/../../data_evil/secret",
        "/inside/../../data_evil/secret",
        "/magic/etc/passwd",
        &outer,
    ] {
        assert_eq!(server.path(packet::STAT, path), Status::NoSuchFile, "{path}");
        let open = server.status(packet::OPEN, |w| w.string(path.as_bytes()).u32(open::READ).u32(0));
        assert_eq!(open, Status::NoSuchFile, "{path}");
        let flags = open::WRITE | open::CREATE | open::TRUNCATE;
        let open = server.status(packet::OPEN, |w| w.string(path.as_bytes()).u32(flags).u32(0));
        assert_ne!(open, Status::Ok, "{path}");
        assert_ne!(server.set_mode(path, 0o777), Status::Ok, "{path}");
        assert_ne!(server.path(packet::REMOVE, "/absolute/secret"), Status::Ok, "{path}");
        let link = server
            .status(packet::EXTENDED, |w| w.string(b"hardlink@openssh.com").string(path.as_bytes()).string(b"/stolen"));
        assert!(link != Status::Ok || path == "/sub/file", "{path}");
        if path != "/sub/file" {
            assert_ne!(server.pair(packet::RENAME, path, "/moved"), Status::Ok, "{path}");
            assert_ne!(server.path(packet::MKDIR, &format!("{path}/d")), Status::Ok, "{path}");
        }
        let _ = fs::remove_file(root.join("stolen"));
    }
    // Absolute links count from the root, as in a chroot; `..` of the root is the root.
    let real = |server: &mut Server, path: &str| server.name(packet::REALPATH, |w| w.string(path.as_bytes()));
    assert_eq!(real(&mut server, "/inside/x"), Ok("/sub/x".into()));
    assert_eq!(real(&mut server, "/inside/../../.."), Ok("/".into()));
    assert_eq!(real(&mut server, "."), Ok("/".into()));
    let new = server.open("/inside/new", READ_WRITE_NEW);
    assert_eq!(server.write(&new, 0, b"x"), Status::Ok);
    assert!(root.join("sub/new").exists());
    // '..' of the top tells nothing of what is above.
    let dots: Vec<_> = server.list("/").into_iter().filter(|entry| entry.0.starts_with('.')).collect();
    assert_eq!(dots.len(), 2, "{dots:?}");
    assert_eq!(dots[0].2, dots[1].2);
    let after = fs::metadata(outside.join("secret")).unwrap();
    assert_eq!(
        (before.ino(), before.mode(), before.mtime(), before.nlink()),
        (after.ino(), after.mode(), after.mtime(), 1)
    );
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 1);
}

#[test]
fn what_lockstep_keeps_is_not_a_plain_clients_to_write() {
    let at = tempfile::tempdir().unwrap();
    fs::create_dir_all(at.path().join("models/.lockstep/staging")).unwrap();
    fs::write(at.path().join("models/.lockstep/manifest"), "good").unwrap();
    fs::write(at.path().join("free"), "x").unwrap();
    symlink("models/.lockstep", at.path().join("link")).unwrap();
    symlink("models/.lockstep/manifest", at.path().join("file")).unwrap();
    let mut server = Server::confined(at.path());
    for path in ["/models/.lockstep/manifest", "/link/manifest", "/file", "/models/../models/.lockstep/manifest"] {
        let flags = open::WRITE | open::CREATE | open::TRUNCATE;
        let open = server.status(packet::OPEN, |w| w.string(path.as_bytes()).u32(flags).u32(0));
        assert_eq!(open, Status::PermissionDenied, "{path}");
        assert_eq!(server.set_mode(path, 0o777), Status::PermissionDenied, "{path}");
        let cut = server.status(packet::SETSTAT, |w| w.string(path.as_bytes()).u32(1).u64(0));
        assert_eq!(cut, Status::PermissionDenied, "{path}");
    }
    for path in ["/link/new", "/.lockstep", "/models/.lockstep/x"] {
        assert_eq!(server.path(packet::MKDIR, path), Status::PermissionDenied, "{path}");
        assert_eq!(server.pair(packet::RENAME, "/free", path), Status::PermissionDenied, "{path}");
        assert_eq!(server.pair(packet::RENAME, path, "/taken"), Status::PermissionDenied, "{path}");
        assert_eq!(server.pair(packet::SYMLINK, "free", path), Status::PermissionDenied, "{path}");
        assert_eq!(server.path(packet::REMOVE, path), Status::PermissionDenied, "{path}");
        assert_eq!(server.path(packet::RMDIR, path), Status::PermissionDenied, "{path}");
    }
    // It is not listed, and may be read by name.
    assert!(server.list("/models").iter().all(|entry| entry.0 != ".lockstep"));
    let manifest = server.open("/models/.lockstep/manifest", open::READ);
    assert_eq!(server.read(&manifest, 0, 100), Ok(b"good".to_vec()));
    assert_eq!(server.status(packet::FSETSTAT, |w| w.string(&manifest).u32(4).u32(0o777)), Status::PermissionDenied);
    assert_eq!(fs::read_to_string(at.path().join("models/.lockstep/manifest")).unwrap(), "good");
}

#[test]
fn a_session_that_reads_neither_writes_nor_offers_to() {
    let at = tempfile::tempdir().unwrap();
    fs::write(at.path().join("file"), "content").unwrap();
    let mut server = Server::lockstep(&["--read-only", "--root", at.path().to_str().unwrap()]);
    let version = String::from_utf8_lossy(&server.version).into_owned();
    for (name, writes) in [("posix-rename@", true), ("copy-data", true), ("fsync@", true), ("statvfs@", false)] {
        assert_eq!(version.contains(name), !writes, "{name}");
    }
    let file = server.open("/file", open::READ);
    let denied = Status::PermissionDenied;
    for flags in [open::WRITE, open::APPEND, open::READ | open::CREATE, open::READ | open::TRUNCATE] {
        assert_eq!(server.status(packet::OPEN, |w| w.string(b"/file").u32(flags).u32(0)), denied);
    }
    assert_eq!(server.write(&file, 0, b"x"), denied);
    assert_eq!(server.status(packet::FSETSTAT, |w| w.string(&file).u32(4).u32(0)), denied);
    assert_eq!(server.set_mode("/file", 0), denied);
    for kind in [packet::REMOVE, packet::MKDIR, packet::RMDIR] {
        assert_eq!(server.path(kind, "/x"), denied);
    }
    for kind in [packet::RENAME, packet::SYMLINK] {
        assert_eq!(server.status(kind, |w| w.string(b"/file").string(b"/y")), denied);
    }
    for name in ["posix-rename@openssh.com", "hardlink@openssh.com", "lsetstat@openssh.com"] {
        let asked = server.status(packet::EXTENDED, |w| w.string(name.as_bytes()).string(b"/file").string(b"/y"));
        assert_eq!(asked, denied, "{name}");
    }
    drop(server);
    assert_eq!(fs::read_to_string(at.path().join("file")).unwrap(), "content");
    assert_eq!(fs::read_dir(at.path()).unwrap().count(), 1);
}

#[test]
fn requests_on_one_file_keep_their_order_whatever_the_handles() {
    let at = tempfile::tempdir().unwrap();
    let mut server = Server::confined(at.path());
    let files: Vec<Vec<u8>> = (0..8).map(|number| server.open(&format!("/{number}"), READ_WRITE_NEW)).collect();
    let again: Vec<Vec<u8>> = (0..8).map(|number| server.open(&format!("/{number}"), open::READ)).collect();
    let mut expected = std::collections::HashMap::new();
    for round in 0..50_u8 {
        for (file, again) in files.iter().zip(&again) {
            let data = vec![round; 20_000];
            server.request(packet::WRITE, |w| w.string(file).u64(0).string(&data));
            // Through another handle, while the write may still wait.
            let id = server.request(packet::READ, |w| w.string(again).u64(0).u32(20_000));
            expected.insert(id, data);
        }
        // What names a path sees what came before it.
        let id = server.request(packet::SETSTAT, |w| w.string(format!("/{}", round % 8).as_bytes()).u32(1).u64(0));
        for _ in 0..17 {
            let reply = server.receive().unwrap();
            let answered = u32::from_be_bytes(reply[1..5].try_into().unwrap());
            match (reply[0], expected.remove(&answered)) {
                (packet::DATA, Some(data)) => assert!(reply[9..] == data, "round {round}"),
                (packet::STATUS, None) => assert_eq!(reply[5..9], [0; 4], "{answered} of {id}"),
                other => panic!("{other:?}"),
            }
        }
    }
    assert!(expected.is_empty());
}

#[test]
fn a_client_that_reads_no_replies_does_not_make_the_server_grow() {
    let at = tempfile::tempdir().unwrap();
    fs::write(at.path().join("file"), vec![7; 200_000]).unwrap();
    let mut server = Server::confined(at.path());
    let file = server.open("/file", open::READ);
    let mut input = server.input.take().unwrap();
    let status = format!("/proc/{}/status", server.child.id());
    let peak = || {
        let text = fs::read_to_string(&status).unwrap();
        let line = text.lines().find(|line| line.starts_with("VmHWM")).unwrap().to_owned();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap()
    };
    let before = peak();
    let requests = 4_000;
    let request = Writer::new(packet::READ).u32(9).string(&file).u64(0).u32(200_000).finish();
    let sender = std::thread::spawn(move || {
        for _ in 0..requests {
            input.write_all(&request).unwrap();
        }
        input
    });
    // 800 MB are asked for; everything is answered when it is taken, and little was held meanwhile.
    for taken in 0..requests {
        assert_eq!(server.receive().unwrap().len(), 1 + 4 + 4 + 200_000);
        // By now the server has all it will take: nothing moves any more.
        while taken == 0 && !stopped(server.child.id()) {
            std::thread::yield_now();
        }
    }
    assert!(peak() - before < 64 << 10, "{} KiB more", peak() - before);
    drop(sender.join().unwrap());
}

/// Whether every thread of a process waits.
fn stopped(process: u32) -> bool {
    let tasks = fs::read_dir(format!("/proc/{process}/task")).unwrap();
    let state = |task: fs::DirEntry| fs::read_to_string(task.path().join("stat")).unwrap();
    tasks.map(|task| state(task.unwrap())).all(|line| line.rsplit(')').next().unwrap().starts_with(" S"))
}

#[test]
fn copy_data_does_what_opensshs_server_does() {
    let at = tempfile::tempdir().unwrap();
    let content: Vec<u8> = (0..3_000_000_u32).map(|number| (number % 251) as u8).collect();
    fs::write(at.path().join("from"), &content).unwrap();
    let show = |name: &str| at.path().join(name).to_str().unwrap().to_owned();
    let mut results = Vec::new();
    for (target, mut server) in [("a", Server::lockstep(&[])), ("b", Server::openssh())] {
        let from = server.open(&show("from"), open::READ);
        let to = server.open(&show(target), READ_WRITE_NEW);
        let mut copy = |from: &[u8], at: u64, length: u64, to: &[u8], to_at: u64| {
            server.status(packet::EXTENDED, |w| {
                w.string(b"copy-data").string(from).u64(at).u64(length).string(to).u64(to_at)
            })
        };
        let statuses = [
            copy(&from, 0, 0, &to, 10),
            copy(&from, 100, 50, &to, 0),
            copy(&from, 9_000_000, 0, &to, 0),
            copy(&to, 0, 10, &to, 0),
            copy(b"none", 0, 10, &to, 0),
        ];
        // OpenSSH's server hides that there were only ten.
        let short = copy(&from, 2_999_990, 50, &to, 4_000_000);
        assert!(short == Status::EndOfFile || target == "b");
        let again = server.open(&show("from"), open::READ | open::WRITE);
        let onto_itself = server
            .status(packet::EXTENDED, |w| w.string(b"copy-data").string(&from).u64(0).u64(10).string(&again).u64(20));
        results.push((statuses, onto_itself));
    }
    assert_eq!(results[0], results[1]);
    assert!(fs::read(at.path().join("a")).unwrap() == fs::read(at.path().join("b")).unwrap());
    assert!(fs::read(at.path().join("from")).unwrap() == content);
}

#[test]
fn answers_are_those_of_opensshs_server() {
    let at = tempfile::tempdir().unwrap();
    let base = at.path().join("tree");
    fs::create_dir_all(base.join("dir/deep")).unwrap();
    fs::write(base.join("file"), "0123456789").unwrap();
    fs::write(base.join("suid"), "").unwrap();
    fs::set_permissions(base.join("suid"), fs::Permissions::from_mode(0o4711)).unwrap();
    fs::set_permissions(base.join("dir"), fs::Permissions::from_mode(0o1777)).unwrap();
    let old = fs::FileTimes::new()
        .set_modified(std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000_000))
        .set_accessed(std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_100_000_000));
    fs::File::options().write(true).open(base.join("file")).unwrap().set_times(old).unwrap();
    for (name, target) in [
        ("link", "file"),
        ("dangling", "nowhere"),
        ("up", "dir/.."),
        ("loop", "loop"),
        ("absolute", "/usr/bin"),
        ("todir", "dir/deep"),
    ] {
        symlink(target, base.join(name)).unwrap();
    }
    assert!(Command::new("mkfifo").arg(base.join("fifo")).status().unwrap().success());
    // Times of access in the future, so that looking does not move them.
    let links = ["link", "dangling", "up", "loop", "absolute", "todir", "dir", "dir/deep", "fifo", "suid", ""];
    let mut touch = Command::new("touch");
    let touched = touch.args(["-h", "-a", "-d", "+1 hour"]).arg(at.path());
    assert!(touched.args(links.map(|name| base.join(name))).status().unwrap().success());
    // What is created goes to directories of their own.
    let work = tempfile::tempdir().unwrap();
    let run = |server: &mut Server, own: &str| {
        let base = base.to_str().unwrap();
        let own = work.path().join(own).display().to_string();
        fs::create_dir(&own).unwrap();
        let mut said = Vec::new();
        let mut say = |what: &str, text: String| said.push(format!("{what}: {}", text));
        for path in [
            "",
            ".",
            "file",
            "link",
            "dangling",
            "up",
            "up/file",
            "loop",
            "absolute",
            "dir/../file",
            "todir/..",
            "todir/../deep",
            "missing",
            "missing/x",
            "missing/../file",
            "file/x",
            "fifo",
            "suid",
            "//dir///deep/.",
        ] {
            let whole = format!("{base}/{path}");
            let (real, stat) =
                (server.name(packet::REALPATH, |w| w.string(whole.as_bytes())), [packet::STAT, packet::LSTAT]);
            say(&format!("realpath {path}"), format!("{real:?}"));
            for kind in stat {
                say(&format!("stat {kind} {path}"), format!("{:?}", server.ask(kind, |w| w.string(whole.as_bytes()))));
            }
            let link = server.name(packet::READLINK, |w| w.string(whole.as_bytes()));
            say(&format!("readlink {path}"), format!("{link:?}"));
            let expanded =
                server.name(packet::EXTENDED, |w| w.string(b"expand-path@openssh.com").string(whole.as_bytes()));
            say(&format!("expand {path}"), format!("{expanded:?}"));
        }
        for user in ["root", "no-such-user"] {
            let home = server.name(packet::EXTENDED, |w| w.string(b"home-directory").string(user.as_bytes()));
            say(&format!("home {user}"), format!("{:?}", home.map_err(|_| "failed")));
        }
        for (name, flags) in [
            ("file", open::READ),
            ("missing", open::READ),
            ("dir", open::READ),
            ("dir", open::WRITE),
            ("loop", open::READ),
            ("new", open::WRITE),
            ("own/new", READ_WRITE_NEW),
            ("own/new", READ_WRITE_NEW | open::EXCLUSIVE),
            ("link", open::WRITE | open::CREATE | open::EXCLUSIVE),
            ("missing/x", READ_WRITE_NEW),
        ] {
            let path = match name.strip_prefix("own") {
                Some(name) => format!("{own}{name}"),
                None => format!("{base}/{name}"),
            };
            let (kind, body) = server.ask(packet::OPEN, |w| w.string(path.as_bytes()).u32(flags).u32(0));
            let status = (kind == packet::STATUS).then(|| Status::from_code(Reader(&body).u32().unwrap()));
            say(&format!("open {name} {flags}"), format!("{status:?}"));
        }
        let two = |first: &str, second: &str| [format!("{base}/{first}"), format!("{base}/{second}")];
        for (kind, [first, second]) in [
            (packet::RENAME, two("missing", "x")),
            (packet::RENAME, two("file", "link")),
            (packet::RENAME, two("file", "file")),
            (packet::RENAME, two("dir", "up")),
            (packet::SYMLINK, two("x", "file")),
            (packet::SYMLINK, two("x", "missing/y")),
        ] {
            let status = server.status(kind, |w| w.string(first.as_bytes()).string(second.as_bytes()));
            say(&format!("{kind} {first} {second}"), format!("{status:?}"));
        }
        for (kind, name) in [
            (packet::REMOVE, "dir"),
            (packet::REMOVE, "missing"),
            (packet::RMDIR, "dir"),
            (packet::RMDIR, "file"),
            (packet::RMDIR, "missing"),
            (packet::MKDIR, "dir"),
            (packet::MKDIR, "missing/d"),
            (packet::MKDIR, "file/d"),
            (packet::MKDIR, "link"),
            (packet::OPENDIR, "file"),
            (packet::OPENDIR, "missing"),
        ] {
            let status = server.path(kind, &format!("{base}/{name}"));
            say(&format!("{kind} {name}"), format!("{status:?}"));
        }
        let long = "n".repeat(300);
        say("long name", format!("{:?}", server.path(packet::STAT, &format!("{base}/{long}"))));
        let entries = server.list(base);
        say("list", format!("{entries:#?}"));
        let ids: Vec<u8> = [0_u32, 1, 61_234].iter().flat_map(|id| id.to_be_bytes()).collect();
        let names =
            server.ask(packet::EXTENDED, |w| w.string(b"users-groups-by-id@openssh.com").string(&ids).string(&ids));
        say("names", format!("{names:?}"));
        let statvfs = server.ask(packet::EXTENDED, |w| w.string(b"statvfs@openssh.com").string(base.as_bytes()));
        // Free blocks move while tests run; sizes, numbers of the file system and flags do not.
        let fixed: Vec<u8> = [0..24, 40..48, 64..88].into_iter().flat_map(|range| statvfs.1[range].to_vec()).collect();
        say("statvfs", format!("{} {fixed:?}", statvfs.0));
        said
    };
    let openssh = run(&mut Server::openssh(), "openssh");
    let ours = run(&mut Server::lockstep(&[]), "lockstep");
    let different: Vec<_> = ours.iter().zip(&openssh).filter(|(ours, openssh)| ours != openssh).collect();
    assert!(different.is_empty() && ours.len() == openssh.len(), "{different:#?}");
}
