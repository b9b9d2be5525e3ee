//! The tour that a newcomer takes.

use std::fs;
use std::process::{Command, Output};

fn quickstart(temporary: &std::path::Path, more: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_lockstep"))
        .arg("quickstart")
        .args(more)
        .env_clear()
        .env("TMPDIR", temporary)
        .output()
        .unwrap()
}

#[test]
fn s29_quickstart_shows_the_main_job_and_leaves_nothing_behind() {
    let at = tempfile::tempdir().unwrap();
    let done = quickstart(at.path(), &[]);
    let said = String::from_utf8_lossy(&done.stdout).into_owned();
    assert!(done.status.success(), "{said}{}", String::from_utf8_lossy(&done.stderr));
    for expected in
        ["0644 -> 0600", "-> 1774", "-> 0744", "differs: SHA-256", "(exit code 1)", "all as listed", "unbroken"]
    {
        assert!(said.contains(expected), "{expected}: {said}");
    }
    assert_eq!(fs::read_dir(at.path()).unwrap().count(), 0);
}

#[test]
fn quickstart_with_a_directory_only_reads_it_and_keeps_the_rest_when_asked() {
    let at = tempfile::tempdir().unwrap();
    let given = tempfile::tempdir().unwrap();
    fs::create_dir(given.path().join("sub")).unwrap();
    fs::write(given.path().join("sub/data"), vec![1; 100_000]).unwrap();
    let done = quickstart(at.path(), &["--keep", &given.path().display().to_string()]);
    let said = String::from_utf8_lossy(&done.stdout).into_owned();
    assert!(done.status.success(), "{said}{}", String::from_utf8_lossy(&done.stderr));
    assert_eq!(fs::read(given.path().join("sub/data")).unwrap(), vec![1; 100_000]);
    assert_eq!(fs::read_dir(given.path()).unwrap().count(), 1);
    let kept: Vec<_> = fs::read_dir(at.path()).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert_eq!(fs::read(kept[0].join("server/copy/sub/data")).unwrap(), vec![1; 100_000]);
    let missing = quickstart(at.path(), &["/no/such/directory"]);
    assert_eq!(missing.status.code(), Some(5));
}
