//! Either end killed at any step: the target is old or new, and the next run goes on.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Command, Output};

use crate::kit::area::{Area, contents, lockstep, sample, traced, write};
use crate::kit::text;

#[test]
fn h32_killed_at_any_step_the_target_is_old_or_new_and_the_next_run_goes_on() {
    let area = Area::new();
    let counts = area.counted();
    for call in ["pwrite64", "renameat", "renameat2", "unlinkat", "syncfs", "fsync", "linkat", "mkdirat"] {
        assert!(counts.contains_key(call), "{call} is not among {counts:?}");
    }
    let points: Vec<(&str, usize)> =
        counts.iter().flat_map(|(call, &count)| sample(count).into_iter().map(|point| (*call, point))).collect();
    let mut killed = 0;
    for (call, point) in &points {
        let when = format!("killed at {call} number {point}");
        area.reset();
        let output = area.injected(call, Some(&format!("signal=SIGKILL:when={point}")));
        let was_killed = output.status.signal() == Some(9) || output.status.code() == Some(137);
        assert!(was_killed || output.status.success(), "{when}: {}", text(&output));
        killed += usize::from(was_killed);
        area.assert_no_mix(&when);
        area.assert_converges(&when);
    }
    assert!(killed * 10 >= points.len() * 9, "only {killed} of {} runs were killed", points.len());
}

#[test]
fn h32_a_new_target_killed_at_any_step_appears_whole_or_not_at_all() {
    let area = Area::new();
    for call in ["mkdirat", "pwrite64", "syncfs", "fsync", "renameat", "renameat2", "unlinkat"] {
        for point in sample(12) {
            let when = format!("new target killed at {call} number {point}");
            fs::remove_dir_all(area.path("target")).unwrap();
            area.injected(call, Some(&format!("signal=SIGKILL:when={point}")));
            if area.path("target").exists() {
                assert!(contents(&area.path("target")) == contents(&area.path("new")), "{when}: it is not whole");
            }
            area.assert_converges(&when);
            assert!(!area.path(".target.lockstep").exists(), "{when}: the hidden directory was left");
        }
    }
}

#[test]
fn h32_a_receiver_that_is_killed_leaves_old_or_new_and_the_next_push_goes_on() {
    let area = Area::new();
    let counts = area.counted();
    // The number of calls of one thread differs between the two, so that some points lie beyond the end.
    let calls = ["pwrite64", "renameat", "renameat2", "syncfs", "fsync", "unlinkat"];
    let mut killed = 0;
    for call in calls {
        for point in sample(counts[call]) {
            let when = format!("receiver killed at {call} number {point}");
            area.reset();
            let inject = format!("signal=SIGKILL:when={point}");
            let mut agent = traced(call, Some(&inject), &area.path("log"), &[lockstep(), "sftp-server"]);
            let (result, _) = area.push_over(&mut agent, u64::MAX);
            killed += usize::from(result.is_err());
            area.assert_no_mix(&when);
            area.assert_converges(&when);
        }
    }
    assert!(killed >= calls.len(), "only {killed} runs were killed");
}

#[test]
fn h34_h32_a_sender_that_is_gone_at_any_byte_is_gone_on_from_where_it_stopped() {
    let area = Area::new();
    area.reset();
    let (whole, all_bytes) = area.push_over(&mut area.agent(), u64::MAX);
    assert!(whole.unwrap().is_complete() && all_bytes > 1_000_000);
    for cut_after in [0, 40, 300, 2_000, 50_000, 600_000, 800_000, 1_000_000] {
        let when = format!("cut after {cut_after} bytes");
        area.reset();
        let (cut, _) = area.push_over(&mut area.agent(), cut_after);
        assert!(cut.is_err(), "{when}");
        area.assert_no_mix(&when);
        let (finished, sent) = area.push_over(&mut area.agent(), u64::MAX);
        assert!(finished.unwrap().is_complete(), "{when}");
        // What was not yet written when the link was cut may come again: a block in flight and the file it belongs to.
        let again = (sent + cut_after).saturating_sub(all_bytes);
        assert!(again < 600_000, "{when}: {again} bytes were sent again");
        area.assert_converges(&when);
    }
}

#[test]
fn directories_without_the_right_to_write_are_followed_by_who_is_not_root() {
    let area = Area::new();
    let shared = area.path("shared");
    fs::create_dir(&shared).unwrap();
    let (source, target, program) = (shared.join("source"), shared.join("target"), shared.join("lockstep"));
    fs::copy(lockstep(), &program).unwrap();
    let close = |names: &[&str]| {
        for name in names {
            fs::set_permissions(source.join(name), std::os::unix::fs::PermissionsExt::from_mode(0o555)).unwrap();
        }
    };
    let push = |kill: Option<&str>| -> Output {
        let mut command = Vec::new();
        if rustix::process::geteuid().is_root() {
            for path in [area.at.path(), &shared, &source] {
                let _ = Command::new("chown").args(["-R", "65534:65534"]).arg(path).status();
            }
            command.extend(["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]);
        }
        if let Some(inject) = kill {
            command.extend(["strace", "-f", "-qq", "-o", "/dev/null", "-e", inject]);
        }
        let shown = [&program, &source, &target].map(|path| path.to_str().unwrap());
        command.extend([shown[0], "push", "-q", "--delete", "--unit", "unit/", shown[1], shown[2]]);
        Command::new(command[0]).args(&command[1..]).env("XDG_STATE_HOME", shared.join("state")).output().unwrap()
    };
    for name in ["closed/deep/f", "closed/goes", "unit/inner/f", "unit/stays"] {
        write(&source, name, b"old");
    }
    close(&["closed/deep", "closed", "unit/inner", "unit"]);
    let first = push(None);
    assert!(first.status.success(), "{}", text(&first));
    for name in ["closed/deep", "closed", "unit/inner", "unit"] {
        fs::set_permissions(source.join(name), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    }
    for name in ["closed/deep/f", "closed/new/deep/f", "unit/inner/f", "unit/inner/more/f"] {
        write(&source, name, b"new!");
    }
    fs::remove_file(source.join("closed/goes")).unwrap();
    close(&["closed/deep", "closed/new/deep", "closed/new", "closed", "unit/inner/more", "unit/inner", "unit"]);
    for kill in [
        "inject=syncfs:signal=SIGKILL:when=1",
        "inject=renameat2:signal=SIGKILL:when=1",
        "inject=syncfs:signal=SIGKILL:when=2",
    ] {
        push(Some(kill));
    }
    let second = push(None);
    assert!(second.status.success(), "{}", text(&second));
    assert!(contents(&target) == contents(&source));
    for name in ["closed/deep", "closed/new/deep", "closed", "unit/inner/more", "unit"] {
        assert_eq!(fs::metadata(target.join(name)).unwrap().mode() & 0o7777, 0o555, "{name}");
    }
    assert!(!target.join(".lockstep/staging/current").exists());
    // What is staged has its last mode by then, which forbids even its owner to write: the next run goes on with it all the same.
    fs::set_permissions(source.join("unit"), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    write(&source, "unit/read-only", b"of the unit alone");
    fs::set_permissions(source.join("unit/read-only"), std::os::unix::fs::PermissionsExt::from_mode(0o400)).unwrap();
    let killed = push(Some("inject=syncfs:signal=SIGKILL:when=1"));
    assert!(!killed.status.success() && !target.join("unit/read-only").exists());
    let last = push(None);
    assert!(last.status.success(), "{}", text(&last));
    assert!(contents(&target) == contents(&source));
}
