//! Directories that are swapped for links while a server works in them: by whoever else may write in the root.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use lockstep::endpoint::{BeginOptions, CommitOptions};
use lockstep::manifest::{Content, Entry, Timestamp};
use lockstep::wire::extension::{Fields, put_frame, put_string};
use sha2::Digest as _;

use super::agent::{Peer, entry, file, frame, link};

/// Exchanges a directory for a link that leads out, again and again, while `work` goes on.
fn while_swapping(directory: &Path, link: &Path, work: impl FnOnce()) {
    use rustix::fs::{CWD, RenameFlags, renameat_with};
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let _ = renameat_with(CWD, directory, CWD, link, RenameFlags::EXCHANGE);
                std::thread::yield_now();
            }
        });
        work();
        stop.store(true, Ordering::Relaxed);
    });
}

/// What a swapped directory must not lead to: content, names, modes, owners and times of everything there.
fn portrait(at: &Path) -> Vec<String> {
    use std::os::unix::fs::MetadataExt as _;
    let entries = walkdir::WalkDir::new(at).sort_by_file_name().into_iter().map(Result::unwrap);
    let line = |entry: walkdir::DirEntry| {
        let found = entry.path().symlink_metadata().unwrap();
        let content = if found.is_file() { fs::read(entry.path()).unwrap() } else { Vec::new() };
        let (mode, owner, times) = (found.mode(), found.uid(), (found.mtime(), found.ctime(), found.ctime_nsec()));
        format!("{} {mode:o} {owner} {times:?} {content:?}", entry.path().display())
    };
    entries.map(line).collect()
}

/// A victim outside of the root, and a link that leads there once it is in the root.
fn victim(at: &Path) -> PathBuf {
    fs::create_dir_all(at.join("root/d")).unwrap();
    fs::create_dir_all(at.join("outside/sub")).unwrap();
    for name in ["outside/f", "outside/g", "outside/sub/h"] {
        fs::write(at.join(name), "untouched").unwrap();
        fs::set_permissions(at.join(name), fs::Permissions::from_mode(0o640)).unwrap();
    }
    symlink("../outside", at.join("link")).unwrap();
    at.join("outside")
}

#[test]
fn h14_a_directory_that_is_swapped_while_the_agent_publishes_leads_nowhere() {
    let at = tempfile::tempdir().unwrap();
    let outside = victim(at.path());
    let before = portrait(&outside);
    let (directory, link_out) = (at.path().join("root/d"), at.path().join("link"));
    let mut published = 0;
    for round in 0..60_u8 {
        // Anew each time: a link that a run finds where a directory is to be is replaced, and would be no danger any more.
        for path in [&directory, &link_out].into_iter().filter(|path| path.symlink_metadata().is_ok()) {
            if fs::remove_file(path).is_err() {
                fs::remove_dir_all(path).unwrap();
            }
        }
        fs::create_dir_all(directory.join("sub")).unwrap();
        fs::write(directory.join("f"), "old").unwrap();
        fs::write(directory.join("g"), "to be removed").unwrap();
        symlink("../outside", &link_out).unwrap();
        let mut peer = Peer::beside(at.path());
        peer.begin("/", &BeginOptions::default()).unwrap();
        // New content, other modes and times, new names, and removals of what the run finds there.
        let mode = if round % 2 == 0 { 0o777 } else { 0o700 };
        let entries = [
            Entry { mode, ..entry("d", Content::Directory) },
            Entry { mode, ..file("d/f", 1) },
            Entry { mode, mtime: Timestamp { seconds: i64::from(round), nanoseconds: 0 }, ..file("d/new", 1) },
            Entry { mode, ..entry("d/sub", Content::Directory) },
            link(&format!("d/sub/l{round}"), "x"),
        ];
        peer.ask("entries", &frame(&entries)).unwrap();
        let early = round % 3 == 0;
        let mut rest = |peer: &mut Peer| {
            for index in [1_u32, 2] {
                let mut put = [&1_u32.to_be_bytes()[..], &index.to_be_bytes()].concat();
                put.extend(sha2::Sha256::digest([round]));
                put.extend(1_u32.to_be_bytes());
                put_frame(&mut put, &[round], None);
                let _ = peer.ask("put", &put);
            }
            let mut body = Vec::new();
            let options = CommitOptions { delete: true, ..CommitOptions::default() };
            put_string(&mut body, &serde_json::to_vec(&options).unwrap());
            published += u32::from(peer.ask("commit", &body).is_ok());
        };
        // While it compares, or only after it has seen a directory.
        if early {
            while_swapping(&directory, &link_out, || {
                if peer.ask("diff", &[]).is_ok() {
                    rest(&mut peer);
                }
            });
        } else {
            peer.ask("diff", &[]).unwrap();
            while_swapping(&directory, &link_out, || rest(&mut peer));
        }
        assert_eq!(portrait(&outside), before, "{round}");
    }
    assert!(published > 0, "no run got as far as that");
}

#[test]
fn h14_a_directory_that_is_swapped_while_a_plain_client_works_leads_nowhere() {
    let at = tempfile::tempdir().unwrap();
    let outside = victim(at.path());
    let before = portrait(&outside);
    let mut peer = Peer::beside(at.path());
    let mut done = 0;
    while_swapping(&at.path().join("root/d"), &at.path().join("link"), || {
        let text = |parts: &[&str]| -> Vec<u8> {
            let mut body = Vec::new();
            parts.iter().for_each(|part| put_string(&mut body, part.as_bytes()));
            body
        };
        let with = |path: &str, more: &[u32]| -> Vec<u8> {
            text(&[path]).into_iter().chain(more.iter().flat_map(|number| number.to_be_bytes())).collect()
        };
        let started = Instant::now();
        let mut round = 0;
        while round < 300 || (done < 300 && started.elapsed() < Duration::from_secs(20)) {
            round += 1;
            let new = format!("d/new{round}");
            let requests = [
                // OPEN to write, create and cut; SETSTAT of mode, owner and times; MKDIR, REMOVE, RMDIR.
                (3, with("d/f", &[2 | 8 | 16, 0])),
                (3, with(&new, &[2 | 8 | 32, 0])),
                (9, with("d/g", &[4 | 8, 0o777, 1, 1])),
                (9, with("d", &[4, 0o777])),
                (14, with(&format!("{new}.d"), &[0])),
                (13, text(&["d/g"])),
                (15, text(&["d/sub"])),
                // RENAME both ways, SYMLINK, and hard links.
                (18, text(&["d/f", &format!("taken{round}")])),
                (18, text(&["root-file", "d/f"])),
                (20, text(&["x", &format!("d/l{round}")])),
                (200, text(&["hardlink@openssh.com", "d/f", &format!("hard{round}")])),
                (200, [text(&["lsetstat@openssh.com", "d/sub"]), vec![0, 0, 0, 4, 0, 0, 1, 0xff]].concat()),
            ];
            for (kind, body) in requests {
                let id = peer.send_plain(kind, &body);
                let reply = peer.receive_plain();
                assert_eq!(reply[1..5], id.to_be_bytes());
                match reply[0] {
                    // A handle: something is written, and it is closed.
                    102 => {
                        let handle = Fields(&reply[5..]).string().unwrap().to_vec();
                        let mut write = Vec::new();
                        put_string(&mut write, &handle);
                        let close = write.clone();
                        write.extend([0; 8]);
                        put_string(&mut write, b"written");
                        peer.send_plain(6, &write);
                        peer.receive_plain();
                        peer.send_plain(4, &close);
                        peer.receive_plain();
                        done += 1;
                    }
                    _ => done += u32::from(reply[5..9] == [0; 4]),
                }
            }
        }
    });
    assert_eq!(portrait(&outside), before);
    assert!(done >= 300, "too little was done: {done}");
}
