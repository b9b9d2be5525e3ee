//! The same raw requests to `lockstep sftp-server` and to OpenSSH's server: the answers are equal.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::process::Command;

use lockstep::wire::buffer::Reader;
use lockstep::wire::sftp::{Status, open, packet};

use crate::kit::raw::{READ_WRITE_NEW, Server};

#[test]
fn copy_data_does_what_opensshs_server_does() {
    let at = tempfile::tempdir().unwrap();
    let content: Vec<u8> = (0..3_000_000_u32).map(|number| (number % 251) as u8).collect();
    fs::write(at.path().join("from"), &content).unwrap();
    let sparse = fs::File::create(at.path().join("sparse")).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&sparse, b"in the middle", 5_000_000).unwrap();
    sparse.set_len(9_000_000).unwrap();
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
        let sparse = server.open(&show("sparse"), open::READ);
        let mut copy_sparse = |at: u64, length: u64, to_at: u64| {
            server.status(packet::EXTENDED, |w| {
                w.string(b"copy-data").string(&sparse).u64(at).u64(length).string(&to).u64(to_at)
            })
        };
        let of_holes = [copy_sparse(0, 0, 1000), copy_sparse(4_999_990, 12, 20_000_000)];
        let again = server.open(&show("from"), open::READ | open::WRITE);
        let onto_itself = server
            .status(packet::EXTENDED, |w| w.string(b"copy-data").string(&from).u64(0).u64(10).string(&again).u64(20));
        results.push((statuses, of_holes, onto_itself));
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
            "dir/",
            "file/",
            "file/.",
            "link/",
            "dangling/",
            "todir/",
            "todir/.",
            "loop/",
            "missing/",
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

#[test]
fn a_path_that_ends_in_a_slash_is_a_directorys_as_for_opensshs_server() {
    let run = |server: &mut Server| {
        let at = tempfile::tempdir().unwrap();
        let path = |name: &str| format!("{}/{name}", at.path().display());
        fs::create_dir_all(path("dir/deep")).unwrap();
        fs::write(path("file"), "0123456789").unwrap();
        symlink("dir", path("dirlink")).unwrap();
        symlink("file", path("link")).unwrap();
        let mut said = Vec::new();
        for (name, flags) in [
            ("new/", READ_WRITE_NEW),
            ("new/.", READ_WRITE_NEW),
            ("file/", READ_WRITE_NEW),
            ("link/", open::WRITE | open::CREATE),
            ("dir/", open::WRITE | open::CREATE),
            ("file/", open::WRITE | open::TRUNCATE),
            ("file/", open::READ),
            ("link/", open::READ),
            ("dirlink/", open::READ),
            ("missing/", open::READ),
        ] {
            let (kind, body) = server.ask(packet::OPEN, |w| w.string(path(name).as_bytes()).u32(flags).u32(0));
            let status = (kind == packet::STATUS).then(|| Status::from_code(Reader(&body).u32().unwrap()));
            said.push(format!("open {name} {flags}: {status:?}"));
        }
        for name in ["file/", "dirlink/", "dir/"] {
            said.push(format!("setstat {name}: {:?}", server.set_mode(&path(name), 0o700)));
            let status = server.status(packet::EXTENDED, |w| {
                w.string(b"lsetstat@openssh.com").string(path(name).as_bytes()).u32(8).u32(1).u32(1_000_000_000)
            });
            said.push(format!("lsetstat {name}: {status:?}"));
        }
        for (kind, name) in [
            (packet::MKDIR, "file/"),
            (packet::MKDIR, "made/"),
            (packet::MKDIR, "made/."),
            (packet::MKDIR, "missing/."),
            (packet::REMOVE, "file/."),
            (packet::OPENDIR, "dirlink/"),
            (packet::OPENDIR, "file/"),
            (packet::REMOVE, "file/"),
            (packet::REMOVE, "link/"),
            (packet::REMOVE, "dirlink/"),
            (packet::REMOVE, "dir/"),
            (packet::REMOVE, "missing/"),
            (packet::RMDIR, "file/"),
            (packet::RMDIR, "dirlink/"),
            (packet::RMDIR, "dir/deep/"),
        ] {
            let (answered, body) = server.ask(kind, |w| w.string(path(name).as_bytes()).u32(0));
            let status = (answered == packet::STATUS).then(|| Status::from_code(Reader(&body).u32().unwrap()));
            said.push(format!("{kind} {name}: {status:?}"));
        }
        for (kind, first, second) in [
            (packet::RENAME, "file", "new/"),
            (packet::RENAME, "file/", "new"),
            (packet::RENAME, "dirlink/", "new"),
            (packet::RENAME, "made/", "renamed/"),
            (packet::SYMLINK, "made", "file/"),
            (packet::SYMLINK, "made", "new/"),
            (packet::RENAME, "renamed/.", "new"),
        ] {
            let first_path = if kind == packet::SYMLINK { first.to_owned() } else { path(first) };
            said.push(format!("{kind} {first} {second}: {:?}", server.pair(kind, &first_path, &path(second))));
        }
        for name in ["posix-rename@openssh.com", "hardlink@openssh.com"] {
            for (first, second) in [("file", "new/"), ("file/", "new"), ("dirlink/", "new")] {
                let (one, other) = (path(first), path(second));
                let status = server.status(packet::EXTENDED, |w| {
                    w.string(name.as_bytes()).string(one.as_bytes()).string(other.as_bytes())
                });
                said.push(format!("{name} {first} {second}: {:?}", status == Status::Ok));
            }
        }
        let mut left: Vec<String> =
            server.list(&path("")).into_iter().map(|(name, _, found)| format!("{name} {:?}", found.mode)).collect();
        left.push(fs::read_to_string(path("file")).unwrap());
        (said, left)
    };
    let (openssh, ours) = (run(&mut Server::openssh()), run(&mut Server::lockstep(&[])));
    let different: Vec<_> = ours.0.iter().zip(&openssh.0).filter(|(ours, openssh)| ours != openssh).collect();
    assert!(different.is_empty(), "{different:#?}");
    assert_eq!(ours.1, openssh.1);
    assert!(ours.1.iter().all(|left| !left.starts_with("new")) && ours.1.ends_with(&["0123456789".to_owned()]));
}
