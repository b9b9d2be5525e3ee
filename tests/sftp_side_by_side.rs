//! The same batches of the stock `sftp` client against `lockstep sftp-server` and against OpenSSH's server: what is said
//! and what lies there afterwards is equal.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::{Command, Stdio};

const OPENSSH: &str = "/usr/lib/openssh/sftp-server";

/// One of the two: a directory with `local` and `remote` in it, and a server.
struct Side {
    at: tempfile::TempDir,
    server: String,
}

impl Side {
    fn pair() -> [Side; 2] {
        assert!(Path::new(OPENSSH).exists(), "{OPENSSH} is missing: Debian package openssh-sftp-server");
        let lockstep = format!("{} sftp-server", env!("CARGO_BIN_EXE_lockstep"));
        [OPENSSH.to_owned(), lockstep].map(|server| {
            let side = Side { at: tempfile::tempdir().unwrap(), server };
            fs::create_dir(side.at.path().join("remote")).unwrap();
            side.prepare(&side.at.path().join("local"));
            side
        })
    }

    /// What is sent: files of several sizes, modes and times, names of all kinds, links.
    fn prepare(&self, local: &Path) {
        fs::create_dir_all(local.join("tree/sub/deep")).unwrap();
        let big: Vec<u8> = (0..3_000_000_u32).map(|number| (number.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
        fs::write(local.join("big"), &big).unwrap();
        fs::write(local.join("half"), &big[..1_000_000]).unwrap();
        for (name, mode) in [("empty", 0o600), ("a file", 0o644), ("sub/ünï", 0o640), ("sub/deep/x", 0o751)] {
            let path = local.join("tree").join(name);
            fs::write(&path, if name == "empty" { "" } else { name }).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            let file = fs::File::options().write(true).open(&path).unwrap();
            let time = std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_234_567_890);
            file.set_times(fs::FileTimes::new().set_modified(time).set_accessed(time)).unwrap();
        }
        fs::set_permissions(local.join("tree/sub"), fs::Permissions::from_mode(0o710)).unwrap();
    }

    /// Runs a batch of `sftp` in `local`. `REMOTE` stands for the remote directory, here and in what is returned.
    fn sftp(&self, batch: &str) -> String {
        let (local, remote) = (self.at.path().join("local"), self.at.path().join("remote").display().to_string());
        fs::write(self.at.path().join("batch"), batch.replace("REMOTE", &remote)).unwrap();
        let output = Command::new("sftp")
            .current_dir(local)
            .args(["-b", "../batch", "-D", &self.server])
            .env("LC_ALL", "C")
            .stdin(Stdio::null())
            .output()
            .expect("sftp is not installed: Debian package openssh-client");
        let said = format!(
            "{}{}{:?}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr),
            output.status.code()
        );
        said.replace(&remote, "REMOTE")
            .replace(&self.at.path().display().to_string(), "HERE")
            .replace(&self.server, "SERVER")
    }

    /// Everything below a directory, a line each: kind, mode, owner, size, links, time where it is not of today, content.
    fn tree(&self, name: &str) -> Vec<String> {
        let mut lines = Vec::new();
        let base = self.at.path().join(name);
        let mut stack = vec![base.clone()];
        while let Some(path) = stack.pop() {
            let found = fs::symlink_metadata(&path).unwrap();
            let time = Some(found.mtime()).filter(|time| *time < 1_700_000_000);
            let content = if found.is_file() {
                format!("{:?}", crc(&fs::read(&path).unwrap()))
            } else if found.is_symlink() {
                fs::read_link(&path).unwrap().display().to_string()
            } else {
                stack.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
                String::new()
            };
            let size = if found.is_dir() { 0 } else { found.size() };
            lines.push(format!(
                "{} {:o} {}:{} {size} {} {time:?} {content}",
                path.strip_prefix(&base).unwrap().display(),
                found.mode(),
                found.uid(),
                found.gid(),
                if found.is_dir() { 0 } else { found.nlink() },
            ));
        }
        lines.sort();
        lines.iter().map(|line| line.replace(&self.at.path().display().to_string(), "HERE")).collect()
    }
}

fn crc(bytes: &[u8]) -> (usize, u64) {
    (bytes.len(), bytes.iter().fold(0, |sum: u64, byte| sum.rotate_left(7) ^ u64::from(*byte)))
}

/// Runs the batches on both sides and compares after each; what the last one said.
fn same(batches: &[&str]) -> String {
    let [openssh, ours] = Side::pair();
    let mut last = String::new();
    for batch in batches {
        let (expected, said) = (openssh.sftp(batch), ours.sftp(batch));
        assert_eq!(said, expected, "{batch}");
        for place in ["remote", "local"] {
            assert_eq!(ours.tree(place), openssh.tree(place), "{place} after {batch}");
        }
        last = said;
    }
    last
}

#[test]
fn s14_a_batch_of_everything_does_what_it_does_with_opensshs_server() {
    let said = same(&[
        "cd REMOTE\npwd\nmkdir dir\nput big dir/big\nput half dir/part\nreput big dir/part\nls -l dir",
        "cd REMOTE/dir\nget big back\n!cp half again\nreget part again\nget -p big kept",
        "cd REMOTE\nrename dir/big dir/renamed\nchmod 640 dir/renamed\nchmod 1777 dir\nsymlink renamed dir/link\n\
         ln dir/renamed dir/hard\nln -s nowhere dir/dangling\nls -l dir\nls -la\nls -1 dir\nls -n dir/renamed",
        "cd REMOTE\nput -pR tree\nls -lR tree\nget -pR tree copied\nput tree/empty",
        "cd REMOTE\ncp dir/renamed dir/copied\nls -l dir/copied",
        "cd REMOTE\nrm dir/link\nrm dir/dangling\nrm dir/hard\nmkdir gone\nrmdir gone\nput -p tree/empty private",
    ]);
    assert!(said.ends_with("Some(0)"), "{said}");
}

#[test]
fn s14_what_fails_fails_alike() {
    same(&[
        "-mkdir REMOTE\n-rmdir REMOTE/missing\n-rm REMOTE/missing\n-get REMOTE/missing\n-put big REMOTE/missing/big",
        "mkdir REMOTE/d\nput half REMOTE/d/f\n-rmdir REMOTE/d\n-rm REMOTE/d\n-cd REMOTE/d/f\n-ls REMOTE/nothing*\n-chmod 600 REMOTE/x",
        "-rename REMOTE/missing REMOTE/y\n-rename REMOTE/d/f REMOTE/d\n-ln REMOTE/missing REMOTE/z\n-ln -s x REMOTE/d\n-mkdir REMOTE/d/f/x",
        "put half REMOTE/other\nrename REMOTE/other REMOTE/d/f\n-rename -l REMOTE/d/f REMOTE/d/f\nls REMOTE/d",
        "rename REMOTE/d REMOTE/e\nput -f big REMOTE/e/synced\nput -a big REMOTE/e/f\nls -l REMOTE/e",
    ]);
}

#[test]
fn s14_owners_and_the_size_of_the_file_system_are_those_of_opensshs_server() {
    if fs::metadata("/proc/self").unwrap().uid() == 0 {
        let said = same(&[
            "put half REMOTE/f\nchown 4711 REMOTE/f\nchgrp 4712 REMOTE/f\nls -l REMOTE/f\nls -ln REMOTE/f",
            "symlink f REMOTE/l\nchown -h 1 REMOTE/l\nchgrp -h 2 REMOTE/l\nls -ln REMOTE",
        ]);
        assert!(said.contains("-> ") || said.contains("REMOTE/l"), "{said}");
    }
    let [openssh, ours] = Side::pair();
    // Figures of a file system that others use too: the head line and the percentage of its inodes stay.
    let columns = |said: &str| {
        said.lines()
            .filter(|line| !line.starts_with("sftp>"))
            .map(|line| line.split_whitespace().count())
            .collect::<Vec<_>>()
    };
    for batch in ["df REMOTE", "df -h REMOTE", "df -i REMOTE"] {
        let (expected, said) = (openssh.sftp(batch), ours.sftp(batch));
        assert_eq!(columns(&said), columns(&expected), "{said}");
        let total = |said: &str| said.lines().nth(2).and_then(|line| line.split_whitespace().next().map(str::to_owned));
        assert_eq!(total(&said), total(&expected), "{said}\n{expected}");
    }
}
