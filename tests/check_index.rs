//! What a good check saw: the next one goes by it, and never takes another tree for that one.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Command, Output};

use crate::check::{check, look, objects, published};
use crate::kit::area::lockstep;
use crate::kit::pair::options;
use crate::kit::{done, ends, text};

/// How many files a check opened.
fn opened(target: &Path, arguments: &[&str]) -> (Output, usize) {
    let mut strace = Command::new("strace");
    strace.args(["-f", "-qq", "-e", "trace=openat,openat2", "-o"]).arg(target.with_file_name("trace"));
    let output = strace.args([lockstep(), "check"]).args(arguments).arg(target).output();
    let trace = fs::read_to_string(target.with_file_name("trace")).unwrap();
    (output.expect("strace is not installed: Debian package strace"), trace.matches("digests").count())
}

#[test]
fn a_directory_that_got_the_name_of_one_that_is_being_written_is_not_what_the_last_check_saw() {
    let pair = published();
    look(&pair.target);
    done(&check(&pair.target, &[]));
    let unfinished = pair.target.with_file_name("tmp-checkpoint-5");
    fs::rename(&pair.target, &unfinished).unwrap();
    let found = check(&unfinished, &[]);
    assert_ne!(found.status.code(), Some(0), "{}", text(&found));
}

#[test]
fn where_nothing_moved_the_next_check_goes_by_what_the_last_saw() {
    let pair = published();
    look(&pair.target);
    // Neither manifest nor table is read again.
    let quick = |more: &[&str]| opened(&pair.target, &[&["--json"], more].concat());
    let verdict = |output: &Output| objects(output).pop().unwrap();
    let (output, tables) = quick(&[]);
    assert_eq!((verdict(&output)["vouched_files"].as_u64(), tables), (Some(4), 0), "{}", text(&output));
    let first = verdict(&output);
    for more in [&["--quick"][..], &["--max-age=1d"], &["--min-generation=1"], &["--as=root"]] {
        let (output, tables) = quick(more);
        done(&output);
        assert_eq!((&verdict(&output)["manifest_sha256"], tables), (&first["manifest_sha256"], 0), "{more:?}");
    }
    // What asks for something else is not answered by it.
    for more in [&["--full"][..], &["--exclude=x"], &["--layout=none"], &["--min-generation=2"]] {
        assert!(quick(more).1 > 0, "{more:?}");
    }
    std::thread::sleep(std::time::Duration::from_millis(2100));
    assert!(quick(&["--max-age=1s"]).1 > 0);
    assert_eq!(quick(&["--max-age=1m"]).1, 0);
    // Who can read it is asked each time: directories above are no part of the tree.
    fs::set_permissions(pair.target.parent().unwrap(), fs::Permissions::from_mode(0o700)).unwrap();
    ends(&check(&pair.target, &["--as=61234"]), 1, &["unreadable"]);
    // What was waived is not seen, and a new publication is looked at.
    let index = pair.target.join(".lockstep/index");
    fs::remove_file(&index).unwrap();
    fs::write(pair.target.join("extra"), "x").unwrap();
    done(&check(&pair.target, &["--allow-unlisted"]));
    assert!(!index.exists());
    fs::remove_file(pair.target.join("extra")).unwrap();
    look(&pair.target);
    pair.write("top", b"another");
    assert!(pair.push(&options()).is_complete());
    assert!(quick(&[]).1 > 0);
    // One that is damaged is none.
    std::thread::sleep(std::time::Duration::from_millis(30));
    look(&pair.target);
    let mut bytes = fs::read(&index).unwrap();
    let last = bytes.len() - 33;
    bytes[last] ^= 1;
    fs::write(&index, bytes).unwrap();
    let (output, tables) = quick(&[]);
    done(&output);
    assert!(tables > 0);
}
