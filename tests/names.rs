//! Names that are any bytes, and what is no file, on their way to a lockstep behind a real sshd and back.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;

use crate::kit::sshd::Sshd;
use crate::kit::{differences, done, text};

const ODD: [&[u8]; 14] = [
    b"caf\xe9",
    b"new\nline",
    b"\x1b[31mred\x07",
    b"back\\slash",
    b"$(touch touched)",
    b"`touch touched`",
    b"-rf",
    b"; touch touched #",
    b"quote ' and \" and space ",
    b"*",
    b"\xff\xfe",
    b"tab\tand\rreturn",
    b"...",
    b"~",
];

#[test]
fn h06_h09_h10_names_of_any_bytes_are_literal_to_lockstep_at_both_ends() {
    let sshd = Sshd::start();
    for name in ODD {
        let directory = sshd.path("source").join(OsStr::from_bytes(name));
        fs::create_dir_all(&directory).unwrap();
        fs::write(directory.join(OsStr::from_bytes(name)), name).unwrap();
        symlink(OsStr::from_bytes(name), directory.join("link")).unwrap();
    }
    let (source, copy) = (sshd.path("source").display().to_string(), sshd.path("copy").display().to_string());
    let pushed = sshd.lockstep(&["push", "-v", "-i", &source, &sshd.remote("target")]);
    done(&pushed);
    let pulled = sshd.lockstep(&["pull", "-v", "-i", &sshd.remote("target"), &copy]);
    done(&pulled);
    for said in [text(&pushed), text(&pulled)] {
        assert!(said.contains("subsystem 'lockstep'"), "{said}");
        assert!(said.contains("new\\nline") && said.contains("\\x1b[31mred"), "{said}");
        assert!(!said.contains('\x1b') && !said.contains('\x07') && !said.contains('\r'), "{said:?}");
    }
    for at in ["target", "copy"] {
        let different = differences(&sshd.path("source"), &sshd.path(at), &[]);
        assert!(different.is_empty(), "{different:#?}");
        // One line for each entry, whatever it is called, after the announcement.
        let log = fs::read_to_string(sshd.path(at).join(".lockstep/audit.jsonl")).unwrap();
        assert_eq!(log.lines().count(), 1 + ODD.len() * 3, "{log}");
        for line in log.lines().skip(1) {
            let line: serde_json::Value = serde_json::from_str(line).unwrap();
            assert!(!line["path"].as_str().unwrap().contains(char::is_control), "{line}");
        }
        done(&sshd.run(&["manifest", "verify", at]));
        done(&sshd.run(&["audit", "verify", at]));
    }
    for place in ["", "source", "target", "copy", "there", "home"] {
        assert!(!sshd.path(place).join("touched").exists(), "a shell saw a name, in {place}");
    }
}

#[test]
fn h08_names_that_differ_in_case_or_unicode_form_alone_are_different_files() {
    let sshd = Sshd::start();
    fs::create_dir(sshd.path("source")).unwrap();
    let names = ["model", "Model", "MODEL", "caf\u{e9}", "cafe\u{301}", "stra\u{df}e", "strasse", "\u{130}", "i"];
    for name in names {
        fs::write(sshd.path("source").join(name), name).unwrap();
    }
    let source = sshd.path("source").display().to_string();
    done(&sshd.lockstep(&["push", "--delete", &source, &sshd.remote("target")]));
    for name in names {
        assert_eq!(fs::read_to_string(sshd.path("target").join(name)).unwrap(), name);
    }
    assert_eq!(fs::read_dir(sshd.path("target")).unwrap().count(), names.len() + 1);
}

#[test]
fn h18_what_is_no_file_is_left_out_and_told_and_nothing_waits_for_it() {
    let sshd = Sshd::start();
    let at = sshd.path("source");
    fs::create_dir_all(at.join("sub")).unwrap();
    fs::write(at.join("file"), "content").unwrap();
    let _listener = UnixListener::bind(at.join("sub/socket")).unwrap();
    done(&Command::new("mkfifo").arg(at.join("pipe")).output().unwrap());
    let mut special = vec!["sub/socket", "pipe"];
    if rustix::process::geteuid().is_root() {
        for (name, kind, numbers) in [("null", "c", ["1", "3"]), ("disk", "b", ["7", "200"])] {
            done(&Command::new("mknod").arg(at.join(name)).arg(kind).args(numbers).output().unwrap());
            special.push(name);
        }
    }
    let source = at.display().to_string();
    for way in ["--remote=subsystem", "--remote=sftp"] {
        let target = sshd.remote(way.trim_start_matches("--remote="));
        let output = sshd.lockstep(&["push", way, &source, &target]);
        done(&output);
        for name in &special {
            assert!(text(&output).contains(name), "{way}: nothing is said of {name}: {}", text(&output));
        }
        let arrived = sshd.path(way.trim_start_matches("--remote="));
        assert_eq!(fs::read(arrived.join("file")).unwrap(), b"content");
        assert!(special.iter().all(|name| !exists(&arrived.join(name))), "{way}");
    }
    // And where it is the other end that has them.
    for way in ["--remote=subsystem", "--remote=sftp"] {
        let copy = sshd.path(&format!("from-{way}"));
        let output = sshd.lockstep(&["pull", way, &sshd.remote("source"), copy.to_str().unwrap()]);
        done(&output);
        assert!(special.iter().all(|name| text(&output).contains(name)), "{way}: {}", text(&output));
        assert_eq!(fs::read(copy.join("file")).unwrap(), b"content");
        assert!(special.iter().all(|name| !exists(&copy.join(name))), "{way}");
    }
}

fn exists(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok()
}

#[test]
fn s15_what_compresses_is_sent_compressed_and_noise_arrives_too() {
    let sshd = Sshd::start();
    fs::create_dir(sshd.path("source")).unwrap();
    let text_like: String = (0..200_000).map(|n| format!("step {n} loss {}\n", n % 97)).collect();
    fs::write(sshd.path("source/log"), &text_like).unwrap();
    let source = sshd.path("source").display().to_string();
    let wire = |more: &[&str], to: &str| -> u64 {
        let pushed = sshd.lockstep(&[&["push", "--json", &source, &sshd.remote(to)], more].concat());
        done(&pushed);
        assert_eq!(fs::read(sshd.path(to).join("log")).unwrap(), text_like.as_bytes());
        let said = String::from_utf8_lossy(&pushed.stdout).into_owned();
        let summary: serde_json::Value = serde_json::from_str(said.lines().last().unwrap()).unwrap();
        summary["wire_bytes"].as_u64().unwrap()
    };
    let length = text_like.len() as u64;
    assert!(wire(&["--compress-level", "3"], "packed") < length / 3);
    assert!(wire(&["--no-compress"], "plain") >= length);
    // Noise has no use for it.
    let noise: Vec<u8> = {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()
        };
        (0..300_000).flat_map(|_| next()).collect()
    };
    fs::write(sshd.path("source/log"), &noise).unwrap();
    let pushed = sshd.lockstep(&["push", "--json", "--compress-level", "3", &source, &sshd.remote("noise")]);
    done(&pushed);
    assert!(fs::read(sshd.path("noise/log")).unwrap() == noise);
}

#[test]
fn h08_names_that_a_file_system_takes_for_one_are_refused_before_anything_is_sent() {
    let at = tempfile::tempdir().unwrap();
    let path = |name: &str| at.path().join(name);
    fs::create_dir_all(path("source/sub")).unwrap();
    for name in ["sub/model", "sub/Model", "other"] {
        fs::write(path("source").join(name), name).unwrap();
    }
    // Such a file system is not to be had everywhere: strace has the probe of it find another name than it made.
    let push = |folds: bool| {
        let (source, target, log) = (path("source"), path("target"), path("log"));
        let shown = [&source, &target].map(|path| path.to_str().unwrap());
        let push = [env!("CARGO_BIN_EXE_lockstep"), "push", shown[0], shown[1]];
        let mut command = Command::new("strace");
        command.args(["-f", "-qq", "-P", "CASE-PROBE", "-e", "trace=statx,newfstatat", "-o"]).arg(log);
        if folds {
            command.args(["-e", "inject=statx,newfstatat:retval=0"]);
        }
        let output = command.args(push).env("XDG_STATE_HOME", path("state")).output();
        output.expect("strace is not installed: Debian package strace")
    };
    let refused = push(true);
    assert_eq!(refused.status.code(), Some(4), "{}", text(&refused));
    let reason = "takes 'sub/Model' and 'sub/model' for one name; rename one of them";
    assert!(text(&refused).contains(reason), "{}", text(&refused));
    assert!(!path("target").exists());
    let hidden = path(".target.lockstep/.lockstep");
    assert!(fs::read_to_string(hidden.join("audit.jsonl")).unwrap().contains(reason));
    let staged = walkdir::WalkDir::new(hidden.join("staging")).into_iter().filter_map(Result::ok);
    assert_eq!(staged.filter(|entry| entry.file_type().is_file()).count(), 0);
    done(&push(false));
    assert_eq!(fs::read_to_string(path("target/sub/model")).unwrap(), "sub/model");
}
