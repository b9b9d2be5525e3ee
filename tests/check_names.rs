//! Names that are literal to a check, lists that it refuses, and what was signed once and is played again.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::process::{Command, Output};

use crate::check::check;
use crate::kit::area::lockstep;
use crate::kit::pair::{Pair, damage, options};
use crate::kit::{done, ends, key, public, text};

const ODD: [&[u8]; 9] =
    [b"caf\xe9", b"two\nlines", b"esc\x1b[31m", b"$(touch x)", b"-rf", b"; reboot", b"back\\slash", b"Case", b"case"];

fn odd() -> Pair {
    let pair = Pair::new();
    for (number, name) in ODD.iter().enumerate() {
        for path in [pair.source.join(OsStr::from_bytes(name)), pair.source.join("d").join(OsStr::from_bytes(name))] {
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, format!("content {number}")).unwrap();
        }
    }
    assert!(pair.push(&options()).is_complete());
    pair
}

#[test]
fn h06_h08_h09_h10_a_check_takes_names_as_they_are_and_shows_them_escaped() {
    let pair = odd();
    std::thread::sleep(std::time::Duration::from_millis(30));
    for depth in [&["--full"][..], &["--quick"], &[]] {
        done(&check(&pair.target, depth));
    }
    // The same by a list of sha256sum, with its escapes.
    let sums = "find . -path ./.lockstep -prune -o -type f -print0 | xargs -0 sha256sum";
    let sums = Command::new("sh").args(["-c", sums]).current_dir(&pair.target).output().unwrap();
    let list = pair.target.with_file_name("list");
    fs::write(&list, sums.stdout).unwrap();
    done(&check(&pair.target, &["--against", list.to_str().unwrap()]));
    for name in ODD {
        damage(&pair.target.join("d").join(OsStr::from_bytes(name)));
    }
    for more in [&[][..], &["--combined"], &["--json"]] {
        let output = check(&pair.target, more);
        let plain = ["9 modified", "d/caf\\xe9", "two\\nlines", "esc\\x1b[31m", "d/$(touch x)", "d/-rf"];
        // JSON escapes a backslash once more.
        let in_json = ["\"modified\":9", "d/caf\\\\xe9", "two\\\\nlines", "esc\\\\x1b[31m", "d/$(touch x)", "d/-rf"];
        ends(&output, 1, if more == ["--json"] { &in_json } else { &plain });
        assert!(!output.stdout.contains(&0x1b) && !output.stderr.contains(&0x1b));
    }
    assert!(!pair.target.join("x").exists());
    // Nor is the directory's own name anything but a name.
    let place = pair.target.with_file_name("$(touch y) -rf\n");
    fs::rename(&pair.target, &place).unwrap();
    ends(&check(&place, &[]), 1, &["$(touch y) -rf\\n': bad"]);
}

#[test]
fn h01_h07_h11_h12_lists_that_sha256sum_would_take_are_refused_with_their_line() {
    let at = tempfile::tempdir().unwrap();
    let tree = at.path().join("tree");
    fs::create_dir_all(tree.join("d")).unwrap();
    for name in ["a", "b", "d/f"] {
        fs::write(tree.join(name), "x").unwrap();
    }
    fs::write(at.path().join("outside"), "x").unwrap();
    // SHA-256 of "x".
    let digest = "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881";
    let line = |name: &str| format!("{digest}  {name}\n");
    let good = ["a", "b", "d/f"].map(line).concat();
    let list = at.path().join("list");
    let against = format!("--against={}", list.display());
    fs::write(&list, &good).unwrap();
    done(&check(&tree, &[&against]));
    let bad: [(&str, String); 9] = [
        ("junk", format!("{good}junk\n")),
        ("CRLF", good.replace('\n', "\r\n")),
        ("a comment", format!("# made by hand\n{good}")),
        ("a name that leads out", format!("{good}{}", line("../outside"))),
        ("an absolute name", format!("{good}{}", line("/etc/hostname"))),
        ("a name twice", format!("{good}{}", line("a"))),
        ("a file that is a directory too", format!("{good}{}", line("a/g"))),
        ("upper case", good.to_uppercase()),
        ("a NUL", format!("{good}{}", line("a\0b"))),
    ];
    for (what, text) in bad {
        fs::write(&list, text).unwrap();
        let output = check(&tree, &[&against]);
        assert_eq!(output.status.code(), Some(1), "{what}: {}", self::text(&output));
        assert!(text_of(&output).contains("manifest-damaged"), "{what}: {}", self::text(&output));
    }
}

fn text_of(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn h25_h26_what_was_signed_once_does_not_stand_for_other_data_or_an_older_version() {
    let pair = Pair::new();
    pair.write("weights", b"first");
    assert!(pair.push(&options()).is_complete());
    let outer = pair.target.parent().unwrap().to_owned();
    key(&outer, "alice");
    fs::write(outer.join("allowed"), format!("alice@x {}\n", public(&outer.join("alice.pub")))).unwrap();
    let run = |command: &[&str], path: &Path| {
        Command::new(lockstep()).args(command).arg(path).current_dir(&outer).env("HOME", &outer).output().unwrap()
    };
    let sign = |path: &Path| done(&run(&["manifest", "sign", "--key", "alice"], path));
    let trust = ["check", "--require-signature", "--allowed-signers", "allowed"];
    let checked = |more: &[&str], path: &Path| run(&[&trust[..], more].concat(), path);
    ends(&checked(&[], &pair.target), 3, &["is not signed"]);
    sign(&pair.target);
    done(&checked(&[], &pair.target));
    // The whole of the old version, with its valid signature, in the place of the new one.
    let old = outer.join("old");
    assert!(Command::new("cp").arg("-a").args([&pair.target, &old]).status().unwrap().success());
    pair.write("weights", b"second");
    assert!(pair.push(&options()).is_complete());
    ends(&checked(&[], &pair.target), 3, &["does not count"]);
    sign(&pair.target);
    done(&checked(&["--min-generation=2"], &pair.target));
    ends(&checked(&["--min-generation=2"], &old), 1, &["old-generation", "of generation 1, and at least 2"]);
    ends(&checked(&["--min-generation=2", "--cached", "--max-age=1d"], &old), 1, &["no verdict stands"]);
    // A signature over another data set, and one of this that was made for something else.
    fs::copy(old.join(".lockstep/manifest.sig"), pair.target.join(".lockstep/manifest.sig")).unwrap();
    ends(&checked(&[], &pair.target), 3, &["does not count"]);
    fs::remove_file(pair.target.join(".lockstep/manifest.sig")).unwrap();
    let manifest = pair.target.join(".lockstep/manifest");
    let other = ["-Y", "sign", "-q", "-f", "alice", "-n", "file"];
    done(&Command::new("ssh-keygen").args(other).arg(&manifest).current_dir(&outer).output().unwrap());
    ends(&checked(&[], &pair.target), 3, &["file"]);
    // Nothing is started on any of it.
    let exec = [&["exec", "--check", pair.target.to_str().unwrap()], &trust[1..], &["--", "true"]].concat();
    let exec = Command::new(lockstep()).args(exec).current_dir(&outer).output().unwrap();
    assert_eq!(exec.status.code(), Some(3), "{}", text(&exec));
}
