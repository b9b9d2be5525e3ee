//! What only gets another name is renamed at the target, and is the same file there.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt, symlink};
use std::path::PathBuf;
use std::process::{Command, Output};

use crate::kit::area::{Area, contents, lockstep, traced, write};
use crate::kit::served::Served;
use crate::kit::{assert_same, done, ends, noise, text};

const MIB: usize = 1 << 20;

struct Pair(Served);

impl Pair {
    fn new() -> Pair {
        let pair = Pair(Served::start("", ""));
        write(&pair.source(), "checkpoint-1/a.bin", &noise(1, 4 * MIB));
        write(&pair.source(), "checkpoint-1/b.bin", &noise(2, 4 * MIB));
        write(&pair.source(), "same", b"it stays");
        // Old enough that its digest is believed.
        for name in ["a.bin", "b.bin"] {
            let file = fs::File::options().write(true).open(pair.source().join("checkpoint-1").join(name)).unwrap();
            file.set_modified(std::time::SystemTime::now() - std::time::Duration::from_secs(3600)).unwrap();
        }
        done(&pair.push(&[]));
        pair
    }

    fn source(&self) -> PathBuf {
        self.0.path("source")
    }

    fn there(&self, path: &str) -> PathBuf {
        self.0.path("sync/data").join(path)
    }

    fn rename(&self, from: &str, to: &str) {
        fs::rename(self.source().join(from), self.source().join(to)).unwrap();
    }

    fn push(&self, more: &[&str]) -> Output {
        let source = self.source().display().to_string();
        self.0.lockstep(&[&["push", &source, "sync@127.0.0.1:/data"], more].concat(), "sync")
    }

    fn is_in_step(&self) {
        let mut found = contents(&self.there(""));
        found.retain(|path, _| !path.starts_with(".lockstep"));
        assert!(found == contents(&self.source()), "the target is not the source");
        done(&Command::new(lockstep()).args(["check", "--full"]).arg(self.there("")).output().unwrap());
        let again = self.push(&["--delete"]);
        done(&again);
        assert!(text(&again).contains("nothing to do"), "{}", text(&again));
    }

    fn inode(&self, path: &str) -> u64 {
        let found = fs::symlink_metadata(self.there(path)).unwrap();
        assert_eq!(found.nlink(), if found.is_dir() { found.nlink() } else { 1 }, "{path} has another name");
        found.ino()
    }
}

#[test]
fn s25_a_renamed_checkpoint_is_the_same_files_at_the_target() {
    for more in [&["--delete"][..], &["--delete", "--unit", "checkpoint-*/"]] {
        let pair = Pair::new();
        let before = [pair.inode("checkpoint-1/a.bin"), pair.inode("checkpoint-1/b.bin")];
        pair.rename("checkpoint-1", "checkpoint-2");
        done(&pair.push(more));
        assert_eq!(before, [pair.inode("checkpoint-2/a.bin"), pair.inode("checkpoint-2/b.bin")], "{more:?}");
        pair.is_in_step();
        // And by itself, within what is there.
        pair.rename("checkpoint-2/a.bin", "checkpoint-2/model.bin");
        done(&pair.push(&["--delete"]));
        assert_eq!(before[0], pair.inode("checkpoint-2/model.bin"));
        pair.is_in_step();
    }
}

#[test]
fn what_stays_under_its_old_name_is_copied() {
    let pair = Pair::new();
    let before = pair.inode("checkpoint-1/a.bin");
    pair.rename("checkpoint-1/a.bin", "checkpoint-1/model.bin");
    done(&pair.push(&[]));
    assert_ne!(before, pair.inode("checkpoint-1/model.bin"));
    assert_eq!(before, pair.inode("checkpoint-1/a.bin"));
    done(&pair.push(&["--delete"]));
    pair.is_in_step();
    // Two with the content of one that goes.
    let before = pair.inode("checkpoint-1/b.bin");
    pair.rename("checkpoint-1/b.bin", "checkpoint-1/c.bin");
    write(&pair.source(), "checkpoint-1/d.bin", &noise(2, 4 * MIB));
    done(&pair.push(&["--delete"]));
    let two = [pair.inode("checkpoint-1/c.bin"), pair.inode("checkpoint-1/d.bin")];
    assert!(two[0] != two[1] && two.contains(&before), "{before} {two:?}");
    pair.is_in_step();
}

#[test]
fn what_is_to_have_a_further_name_is_copied() {
    let pair = Pair::new();
    let before = pair.inode("checkpoint-1/a.bin");
    pair.rename("checkpoint-1/a.bin", "checkpoint-1/model.bin");
    fs::hard_link(pair.source().join("checkpoint-1/model.bin"), pair.source().join("further.bin")).unwrap();
    done(&pair.push(&["--delete"]));
    let there = ["checkpoint-1/model.bin", "further.bin"].map(|path| fs::metadata(pair.there(path)).unwrap());
    assert!(there[0].ino() == there[1].ino() && there[0].nlink() == 2 && there[0].ino() != before);
    pair.is_in_step();
}

#[test]
fn what_goes_to_the_trash_or_gets_other_permissions_is_copied() {
    let pair = Pair::new();
    let before = pair.inode("checkpoint-1/a.bin");
    pair.rename("checkpoint-1/a.bin", "checkpoint-1/model.bin");
    done(&pair.push(&["--delete=trash"]));
    assert_ne!(before, pair.inode("checkpoint-1/model.bin"));
    pair.is_in_step();
    let before = pair.inode("checkpoint-1/b.bin");
    pair.rename("checkpoint-1/b.bin", "checkpoint-1/c.bin");
    fs::set_permissions(pair.source().join("checkpoint-1/c.bin"), PermissionsExt::from_mode(0o640)).unwrap();
    done(&pair.push(&["--delete"]));
    assert_ne!(before, pair.inode("checkpoint-1/c.bin"));
    assert_eq!(fs::metadata(pair.there("checkpoint-1/c.bin")).unwrap().mode() & 0o777, 0o640);
    pair.is_in_step();
}

#[test]
fn h36_what_somebody_wrote_to_at_the_target_is_sent() {
    let pair = Pair::new();
    let there = pair.there("checkpoint-1/a.bin");
    let modified = fs::metadata(&there).unwrap().modified().unwrap();
    fs::write(&there, noise(9, 4 * MIB)).unwrap();
    fs::File::options().write(true).open(&there).unwrap().set_modified(modified).unwrap();
    pair.rename("checkpoint-1", "checkpoint-2");
    done(&pair.push(&["--delete"]));
    pair.is_in_step();
}

#[test]
fn h30_what_is_not_removed_after_all_does_not_become_another_name_of_what_is_new() {
    let pair = Pair::new();
    let before = pair.inode("checkpoint-1/a.bin");
    pair.rename("checkpoint-1/a.bin", "checkpoint-1/model.bin");
    // A link that the server does not take: nothing is deleted in this run.
    symlink("/etc/passwd", pair.source().join("leads-out")).unwrap();
    let pushed = pair.push(&["--delete", "--links", "all"]);
    ends(&pushed, 4, &["leads-out"]);
    assert_eq!(before, pair.inode("checkpoint-1/a.bin"));
    assert_ne!(before, pair.inode("checkpoint-1/model.bin"));
    fs::remove_file(pair.source().join("leads-out")).unwrap();
    done(&pair.push(&["--delete"]));
    pair.is_in_step();
}

#[test]
fn h32_killed_at_any_step_a_renamed_file_is_whole_under_one_name_or_both() {
    let area = Area::new();
    let (source, target) = (area.path("new"), area.path("target"));
    let content = noise(3, 2 * MIB);
    let names = ["big-1", "big-2"];
    write(&source, names[0], &content);
    let old = std::time::SystemTime::now() - std::time::Duration::from_secs(3600);
    fs::File::options().write(true).open(source.join(names[0])).unwrap().set_modified(old).unwrap();
    area.push_over(&mut area.agent(), u64::MAX).0.unwrap();
    let (mut turn, mut linked, mut killed) = (0, 0, 0);
    for call in ["linkat", "renameat", "renameat2", "unlinkat", "syncfs"] {
        for when in 1..40 {
            let (from, to) = (names[turn % 2], names[(turn + 1) % 2]);
            turn += 1;
            fs::rename(source.join(from), source.join(to)).unwrap();
            let inode = fs::metadata(target.join(from)).unwrap().ino();
            let signal = format!("signal=SIGKILL:when={when}");
            let command = [lockstep(), "sftp-server"];
            let (result, _) = area.push_over(&mut traced(call, Some(&signal), &area.path("trace"), &command), u64::MAX);
            killed += u32::from(result.is_err());
            let there: Vec<_> = names.iter().filter_map(|name| fs::read(target.join(name)).ok()).collect();
            assert!(!there.is_empty() && there.iter().all(|found| *found == content), "{call} {when}");
            let ended = result.is_ok();
            if !ended {
                area.push_over(&mut area.agent(), u64::MAX).0.unwrap();
            }
            let found = fs::metadata(target.join(to)).unwrap();
            assert!(found.nlink() == 1 && !target.join(from).exists(), "{call} {when}: {} names", found.nlink());
            linked += u32::from(found.ino() == inode);
            if ended {
                break;
            }
        }
    }
    assert!(killed > 10 && linked > killed / 2, "{killed} {linked}");
    assert_same(&source, &target);
}

#[test]
fn h36_what_is_written_to_until_it_is_published_keeps_its_old_name() {
    let area = Area::new();
    let (source, target) = (area.path("new"), area.path("target"));
    let old = std::time::SystemTime::now() - std::time::Duration::from_secs(3600);
    for name in ["model/big-1", "model/other"] {
        write(&source, name, &noise(4, 2 * MIB));
        fs::File::options().write(true).open(source.join(name)).unwrap().set_modified(old).unwrap();
    }
    write(&source, "model/other", b"small");
    area.push_over(&mut area.agent(), u64::MAX).0.unwrap();
    // Alone, and with the directory that it lies in.
    for (from, to, call) in [
        ("model/big-1", "model/big-2", "syncfs"),
        ("model", "moved", "syncfs"),
        ("moved/big-2", "moved/big-3", "linkat"),
    ] {
        let at = if from == "model" { "big-2" } else { "" };
        fs::rename(source.join(from), source.join(to)).unwrap();
        let there = target.join(from).join(at);
        let there = if at.is_empty() { target.join(from) } else { there };
        let command = [lockstep(), "sftp-server"];
        let mut agent = traced(call, Some("delay_enter=1500000:when=1"), &area.path("trace"), &command);
        let (report, wrote) = std::thread::scope(|scope| {
            let run = scope.spawn(|| area.push_over(&mut agent, u64::MAX).0);
            // Until what is to be published is staged, or written down.
            std::thread::sleep(std::time::Duration::from_millis(900));
            let mut file = fs::File::options().append(true).open(&there).unwrap();
            let wrote = std::io::Write::write_all(&mut file, b"more").is_ok();
            (run.join().unwrap(), wrote)
        });
        assert!(wrote);
        let report = report.unwrap();
        let published = target.join(to).join(at);
        let published = if at.is_empty() { target.join(to) } else { published };
        // Whenever it was: what is seen under the new name is what was proven, or nothing is.
        if let Ok(found) = fs::read(&published) {
            assert!(found == noise(4, 2 * MIB), "{to} is what somebody else wrote");
        }
        let said = format!("{:?}", report.problems);
        assert!(published.exists() || said.contains("changed by somebody else"), "{to}: {said}");
        area.push_over(&mut area.agent(), u64::MAX).0.unwrap();
        assert_same(&source, &target);
    }
}
