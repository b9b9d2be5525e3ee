//! Raw bytes to `lockstep sftp-server`: what breaks the rules of SFTP, and what would lead out of the root.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::{Command, Stdio};

use lockstep::wire::buffer::{Reader, Writer};
use lockstep::wire::sftp::{Status, open, packet};

use crate::kit::raw::{READ_WRITE_NEW, Server};

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
    let before = server.peak_kib();
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
    let grown = server.peak_kib() - before;
    assert!(grown < 64 << 10, "{grown} KiB more");
    drop(sender.join().unwrap());
}

/// Whether every thread of a process waits.
fn stopped(process: u32) -> bool {
    let tasks = fs::read_dir(format!("/proc/{process}/task")).unwrap();
    let state = |task: fs::DirEntry| fs::read_to_string(task.path().join("stat")).unwrap();
    tasks.map(|task| state(task.unwrap())).all(|line| line.rsplit(')').next().unwrap().starts_with(" S"))
}

#[test]
fn h46_a_rename_that_ends_half_way_leaves_no_permissions_of_the_other_name() {
    let at = tempfile::tempdir().unwrap();
    let path = |name: &str| at.path().join(name);
    let rules = "[[rule]]\nmatch = 'secret/**'\nmode = '600'\n[[rule]]\nmatch = 'public/**'\nmode = '644'\n";
    fs::write(path("rules.toml"), rules).unwrap();
    fs::create_dir_all(path("root/secret/d")).unwrap();
    fs::create_dir(path("root/public")).unwrap();
    let names = ["a", "b", "c", "d", "e"].map(|name| format!("root/secret/d/{name}"));
    for name in &names {
        fs::write(path(name), "x").unwrap();
        fs::set_permissions(path(name), PermissionsExt::from_mode(0o600)).unwrap();
    }
    let (root, rules) = (path("root"), path("rules.toml"));
    let serve = [root.to_str().unwrap(), "--policy-file", rules.to_str().unwrap()];
    let serve = [&[crate::kit::area::lockstep(), "sftp-server", "--root"], &serve[..]].concat();
    let mut strace = crate::kit::area::traced("chmod,fchmodat", Some("error=EIO:when=3"), &path("log"), &serve);
    let mut server = Server::spawn(&mut strace);
    assert_eq!(server.pair(packet::RENAME, "/secret/d", "/public/d"), Status::Failure);
    drop(server);
    let calls = fs::read_to_string(path("log")).unwrap();
    assert!(calls.contains("INJECTED") && calls.contains("0644"), "{calls}");
    for name in &names {
        assert_eq!(mode(&path(name)), 0o600, "{name}: {calls}");
    }
    let log = fs::read_to_string(path("root/.lockstep/audit.jsonl")).unwrap();
    assert!(log.contains("not renamed to 'public/d'"), "{log}");
}
