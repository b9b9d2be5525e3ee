//! Clients of others against lockstep's server: scp, rclone, sshfs, paramiko, asyncssh.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use crate::kit::sshd::Sshd;
use crate::kit::{account, own, text as said};

/// What serves; it ends with the test.
enum Serving {
    Own(own::Server),
    Sshd(Sshd),
}

/// A server with one user, who is confined to `root`, and files to send.
struct Server {
    serving: Serving,
    user: String,
    port: String,
}

impl Server {
    /// lockstep's own listener.
    fn own() -> Server {
        let server = own::Server::start(&[]);
        sample(&server.at.path().join("source"));
        Server { user: "sync".into(), port: server.port.clone(), serving: Serving::Own(server) }
    }

    /// OpenSSH's, with `lockstep sftp-server` as its subsystem: for clients whose SSH is too old for the own listener.
    fn sshd() -> Server {
        let sshd = Sshd::of(tempfile::tempdir().unwrap(), None, |at| {
            let root = at.join("root");
            fs::create_dir(&root).unwrap();
            format!("Subsystem sftp {} sftp-server --root {}", env!("CARGO_BIN_EXE_lockstep"), root.display())
        });
        sample(&sshd.path("source"));
        Server { user: account(), port: sshd.port.to_string(), serving: Serving::Sshd(sshd) }
    }

    fn at(&self) -> &Path {
        match &self.serving {
            Serving::Own(server) => server.at.path(),
            Serving::Sshd(sshd) => sshd.at.path(),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.at().join(name)
    }

    fn run(&self, package: &str, program: &str, arguments: &[&str]) -> Output {
        let output = Command::new(program)
            .current_dir(self.at())
            .args(arguments)
            .env("HOME", self.at())
            .env_remove("SSH_AUTH_SOCK")
            .stdin(Stdio::null())
            .output();
        output.unwrap_or_else(|error| panic!("{program}: {error}; Debian package {package}"))
    }

    /// A program of Python's, with where to log in as its arguments.
    fn python(&self, module: &str, package: &str, script: &str) {
        let probe = self.run("python3", "/usr/bin/python3", &["-W", "ignore", "-c", &format!("import {module}")]);
        assert!(probe.status.success(), "Python has no {module}: Debian package {package}\n{}", said(&probe));
        let output = self.run("python3", "/usr/bin/python3", &["-W", "ignore", "-c", script, &self.port, &self.user]);
        assert!(output.status.success(), "{}", said(&output));
    }
}

fn sample(at: &Path) {
    fs::create_dir_all(at.join("sub/deep")).unwrap();
    fs::create_dir(at.join("empty directory")).unwrap();
    let big: Vec<u8> = (0..2_000_000_u32).map(|number| (number.wrapping_mul(2_654_435_761) >> 11) as u8).collect();
    fs::write(at.join("big"), big).unwrap();
    for number in 0..15 {
        fs::write(at.join(format!("sub/{number} ünï")), format!("{number}").repeat(number)).unwrap();
    }
    fs::write(at.join("sub/deep/script"), "#!/bin/sh\n").unwrap();
    fs::set_permissions(at.join("sub/deep/script"), fs::Permissions::from_mode(0o750)).unwrap();
    let time = std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_234_567_890);
    let script = fs::File::options().write(true).open(at.join("sub/deep/script")).unwrap();
    script.set_times(fs::FileTimes::new().set_modified(time).set_accessed(time)).unwrap();
}

fn assert_same(a: &Path, b: &Path) {
    let output = Command::new("diff").args(["-r", "--exclude=.lockstep"]).args([a, b]).output().unwrap();
    assert!(output.status.success(), "{}", said(&output));
}

#[test]
fn s15_scp_sends_and_fetches_directories_with_modes_and_times() {
    let server = Server::own();
    let login = ["-P", &server.port, "-i", "user", "-F", "none", "-oUserKnownHostsFile=known", "-oBatchMode=yes"];
    let scp = |more: &[&str]| {
        let output = server.run("openssh-client", "scp", &[&login, more].concat());
        assert!(output.status.success(), "{more:?}: {}", said(&output));
    };
    scp(&["-r", "-p", "-C", "source", "sync@127.0.0.1:/copy"]);
    scp(&["-s", "-r", "-p", "sync@127.0.0.1:copy", "back"]);
    for copy in ["root/copy", "back"] {
        assert_same(&server.path("source"), &server.path(copy));
        let script = fs::metadata(server.path(copy).join("sub/deep/script")).unwrap();
        assert_eq!((script.mode() & 0o7777, script.mtime()), (0o750, 1_234_567_890), "{copy}");
    }
    scp(&["sync@127.0.0.1:/copy/big", "sync@127.0.0.1:/copy/sub/0 ünï", "."]);
    assert!(fs::read(server.path("big")).unwrap() == fs::read(server.path("source/big")).unwrap());
    let missing = server.run("openssh-client", "scp", &[&login[..], &["sync@127.0.0.1:/none", "x"]].concat());
    assert!(!missing.status.success() && said(&missing).contains("No such file"), "{}", said(&missing));
}

#[test]
fn rclone_copies_mirrors_moves_and_deletes() {
    let server = Server::sshd();
    let config = format!(
        "[r]\ntype = sftp\nhost = 127.0.0.1\nuser = {}\nport = {}\nkey_file = {}\nknown_hosts_file = {}\n\
         shell_type = none\nmd5sum_command = none\nsha1sum_command = none\n",
        server.user,
        server.port,
        server.path("user").display(),
        server.path("known").display()
    );
    fs::write(server.path("rclone.conf"), config).unwrap();
    let rclone = |arguments: &[&str]| {
        let output =
            server.run("rclone", "rclone", &[&["--config", "rclone.conf", "--checkers=4"], arguments].concat());
        assert!(output.status.success(), "{arguments:?}: {}", said(&output));
    };
    rclone(&["copy", "--transfers=4", "--create-empty-src-dirs", "source", "r:/copy"]);
    assert_same(&server.path("source"), &server.path("root/copy"));
    assert_eq!(fs::metadata(server.path("root/copy/sub/deep/script")).unwrap().mtime(), 1_234_567_890);
    // A mirror deletes what the source has not, and leaves alone what the server keeps for itself.
    fs::write(server.path("root/stray"), "x").unwrap();
    assert!(server.path("root/.lockstep").exists());
    rclone(&["sync", "--create-empty-src-dirs", "source", "r:/"]);
    assert!(!server.path("root/stray").exists() && !server.path("root/copy").exists());
    assert!(server.path("root/.lockstep/audit.jsonl").exists());
    rclone(&["moveto", "r:/big", "r:/bigger"]);
    rclone(&["copyto", "r:/bigger", "back"]);
    assert!(fs::read(server.path("back")).unwrap() == fs::read(server.path("source/big")).unwrap());
    rclone(&["purge", "r:/sub"]);
    assert!(!server.path("root/sub").exists());
}

/// A mount that ends with the test.
struct Mount(PathBuf);

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("fusermount3").arg("-uz").arg(&self.0).status();
    }
}

#[test]
fn sshfs_mounts_the_server_as_a_file_system() {
    assert!(
        Path::new("/dev/fuse").exists(),
        "/dev/fuse is missing: load the kernel module fuse, or give it to the container"
    );
    let server = Server::own();
    let mount = Mount(server.path("mount"));
    fs::create_dir(&mount.0).unwrap();
    let options = format!(
        "port={},IdentityFile={},UserKnownHostsFile={},BatchMode=yes,ssh_command=ssh -F none",
        server.port,
        server.path("user").display(),
        server.path("known").display()
    );
    let mounted = server.run("sshfs", "sshfs", &["sync@127.0.0.1:/", mount.0.to_str().unwrap(), "-o", &options]);
    assert!(mounted.status.success(), "{}", said(&mounted));
    let at = |name: &str| mount.0.join(name);
    let copied = server.run("coreutils", "cp", &["-rp", "source", at("copy").to_str().unwrap()]);
    assert!(copied.status.success(), "{}", said(&copied));
    assert_same(&server.path("source"), &at("copy"));
    assert_same(&server.path("source"), &server.path("root/copy"));
    let script = fs::metadata(server.path("root/copy/sub/deep/script")).unwrap();
    assert_eq!((script.mode() & 0o7777, script.mtime()), (0o750, 1_234_567_890));
    // What programs do to files.
    use std::io::{Read as _, Seek as _, Write as _};
    let mut file = fs::File::options().read(true).write(true).create(true).truncate(true).open(at("new")).unwrap();
    file.write_all(b"0123456789").unwrap();
    file.seek(std::io::SeekFrom::Start(3)).unwrap();
    file.write_all(b"abc").unwrap();
    file.sync_all().unwrap();
    file.set_len(8).unwrap();
    file.rewind().unwrap();
    let mut text = String::new();
    file.read_to_string(&mut text).unwrap();
    assert_eq!(text, "012abc67");
    drop(file);
    fs::File::options().append(true).open(at("new")).unwrap().write_all(b"+").unwrap();
    assert_eq!(fs::read_to_string(server.path("root/new")).unwrap(), "012abc67+");
    fs::write(at("other"), "x").unwrap();
    fs::rename(at("other"), at("new")).unwrap();
    fs::hard_link(at("new"), at("hard")).unwrap();
    std::os::unix::fs::symlink("new", at("link")).unwrap();
    assert_eq!(fs::read_to_string(at("link")).unwrap(), "x");
    fs::set_permissions(at("new"), fs::Permissions::from_mode(0o4640)).unwrap();
    assert_eq!(fs::metadata(server.path("root/new")).unwrap().mode() & 0o7777, 0o640);
    assert!(fs::File::options().write(true).create_new(true).open(at("new")).is_err());
    assert!(fs::remove_dir(at("copy/sub")).is_err());
    fs::remove_dir_all(at("copy/sub")).unwrap();
    assert!(!server.path("root/copy/sub").exists());
    let df = server.run("coreutils", "df", &["--output=size", mount.0.to_str().unwrap()]);
    assert!(df.status.success(), "{}", said(&df));
}

#[test]
fn paramiko_works() {
    let script = r#"
import os, stat, sys, paramiko
client = paramiko.SSHClient()
client.load_host_keys("known")
client.connect("127.0.0.1", int(sys.argv[1]), sys.argv[2], key_filename="user", allow_agent=False, look_for_keys=False)
sftp = client.open_sftp()
big = open("source/big", "rb").read()
assert sftp.put("source/big", "big").st_size == len(big)
sftp.get("big", "paramiko-back")
assert open("paramiko-back", "rb").read() == big
with sftp.open("big", "rb") as f:
    f.prefetch()
    assert f.read() == big
    assert f.readv([(10, 20), (1500000, 30)]).__next__() == big[10:30]
with sftp.open("new", "w") as f:
    f.set_pipelined(True)
    for _ in range(100):
        f.write(b"x" * 30000)
assert sftp.stat("new").st_size == 3000000
with sftp.open("new", "r+") as f:
    f.seek(5)
    f.write(b"abc")
    f.truncate(10)
    f.chmod(0o640)
    f.utime((5, 6))
    s = f.stat()
assert (s.st_size, s.st_mtime, s.st_atime, stat.S_IMODE(s.st_mode)) == (10, 6, 5, 0o640), s
with sftp.open("new", "a") as f:
    f.write(b"+")
with sftp.open("new") as f:
    assert f.read() == b"xxxxxabcxx+"
try:
    sftp.open("new", "x")
    raise SystemExit("exclusive open of what exists")
except IOError:
    pass
sftp.mkdir("dir", 0o750)
sftp.chdir("dir")
assert sftp.getcwd() == "/dir" and sftp.normalize("../dir/./x") == "/dir/x"
sftp.symlink("../new", "link")
assert sftp.readlink("link") == "../new" and stat.S_ISLNK(sftp.lstat("link").st_mode)
assert sftp.stat("link").st_size == 11
sftp.posix_rename("../new", "moved")
try:
    sftp.rename("moved", "link")
    raise SystemExit("renamed onto what exists")
except IOError:
    pass
sftp.truncate("moved", 3)
sftp.chown("moved", os.getuid(), os.getgid())
names = sorted(a.filename for a in sftp.listdir_attr("."))
assert names == ["link", "moved"], names
assert sorted(a.filename for a in sftp.listdir_iter("/")) == ["big", "dir"]
sftp.remove("link"); sftp.remove("moved"); sftp.rmdir("/dir")
try:
    sftp.stat("nothing")
    raise SystemExit("found nothing")
except FileNotFoundError:
    pass
client.close()
"#;
    Server::sshd().python("paramiko", "python3-paramiko", script);
}

#[test]
fn asyncssh_works() {
    let script = r#"
import asyncio, os, stat, sys, asyncssh
async def main():
    async with asyncssh.connect("127.0.0.1", int(sys.argv[1]), username=sys.argv[2], client_keys=["user"],
                                known_hosts="known", agent_path=None, config=None) as c, c.start_sftp_client() as sftp:
        await sftp.put("source", "copy", recurse=True, preserve=True)
        await sftp.get("copy", "asyncssh-back", recurse=True, preserve=True)
        assert await sftp.realpath(".") == "/"
        a = await sftp.stat("copy/sub/deep/script")
        assert (stat.S_IMODE(a.permissions), a.mtime) == (0o750, 1234567890), a
        big = open("source/big", "rb").read()
        files = [await sftp.open(f"f{n}", "wb+") for n in range(6)]
        await asyncio.gather(*(f.write(big[n:]) for n, f in enumerate(files)))
        await asyncio.gather(*(f.fsync() for f in files))
        read = await asyncio.gather(*(f.read(offset=0) for f in files))
        assert all(r == big[n:] for n, r in enumerate(read))
        v = await files[0].statvfs()
        assert v.frsize > 0 and v.blocks >= v.bfree
        assert (await sftp.statvfs("copy")).namemax == v.namemax
        for f in files: await f.close()
        await sftp.posix_rename("f0", "f1")
        await sftp.link("f1", "hard")
        assert (await sftp.stat("hard")).size == len(big)
        await sftp.symlink("f1", "link")
        assert await sftp.readlink("link") == "f1"
        names = [n.filename async for n in sftp.scandir("/")] if hasattr(sftp, "scandir") else await sftp.listdir("/")
        assert ".lockstep" not in names and "hard" in names, names
        assert len(await sftp.glob("copy/sub/*")) == 16
        await sftp.rmtree("copy")
        assert not await sftp.exists("copy")
        try:
            await sftp.remove("/.lockstep/audit.jsonl")
            raise SystemExit("the audit log was removed")
        except asyncssh.SFTPError as error:
            assert "lockstep" in error.reason, error
asyncio.run(main())
"#;
    let server = Server::sshd();
    server.python("asyncssh", "python3-asyncssh", script);
    assert_same(&server.path("source"), &server.path("asyncssh-back"));
}
