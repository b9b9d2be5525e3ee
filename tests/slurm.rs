//! The hooks of `config/slurm` in a real Slurm: no task starts on data that is not known to be good, and the node stays in use.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use rustix::process::{Signal, kill_process};

use crate::kit::area::lockstep;
use crate::kit::pair::damage;
use crate::kit::slurm::{Slurm, find, output};
use crate::kit::{done, text, until};

/// A name with a blank, and one that would be a command to Slurm where it was printed as it is.
const BLANK: &str = "two words";
const COMMAND: &str = "x\nprint injected\nexport INJECTED=1";

/// A tree of this name, published by the submitter.
fn published(slurm: &Slurm, name: &str) -> PathBuf {
    let from = tempfile::tempdir().unwrap();
    fs::set_permissions(from.path(), fs::Permissions::from_mode(0o755)).unwrap();
    fs::write(from.path().join("weights"), [1; 3000]).unwrap();
    fs::write(from.path().join(COMMAND), "two").unwrap();
    let at = slurm.path("tmp").join(name);
    done(&output(
        slurm.own(&slurm.path("lockstep")).args(["push", "-q"]).arg(from.path()).arg(format!("{}/", at.display())),
    ));
    at
}

fn srun(slurm: &Slurm, check: &str, check_options: &str, tasks: u32) -> Command {
    let mut command = slurm.submit("srun");
    command.arg(format!("--ntasks={tasks}")).args(["echo", "it ran"]);
    command.env("LOCKSTEP_CHECK", check).env("LOCKSTEP_CHECK_OPTIONS", check_options);
    command
}

fn ran(output: &Output) -> usize {
    text(output).lines().filter(|line| *line == "it ran").count()
}

/// Started, as often as there are tasks.
#[track_caller]
fn started(slurm: &Slurm, command: &mut Command, tasks: usize) {
    let output = output(command);
    done(&output);
    assert_eq!(ran(&output), tasks, "{}", text(&output));
    assert!(!text(&output).contains("lockstep"), "{}", text(&output));
    slurm.rest();
}

/// A step that was refused with these words.
#[track_caller]
fn refused(slurm: &Slurm, command: &mut Command, words: &[&str]) -> String {
    let output = output(command);
    assert!(!output.status.success(), "{}", text(&output));
    assert_eq!(ran(&output), 0, "{}", text(&output));
    says_why(slurm, &text(&output), words);
    text(&output)
}

/// Words for the user; neither the node nor the next job suffers.
#[track_caller]
fn says_why(slurm: &Slurm, said: &str, words: &[&str]) {
    for word in [&["lockstep: not started on "], words].concat() {
        assert!(said.contains(word), "'{word}' is not in: {said}");
    }
    assert!(!said.lines().any(|line| line.starts_with("injected")), "{said}");
    slurm.rest();
}

fn shown(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn s30_slurm_starts_no_task_on_data_that_is_not_known_to_be_good() {
    let slurm = Slurm::start();
    tasks_and_batch_scripts(&slurm);
    what_is_checked_is_said_by_the_environment(&slurm);
    h62_a_check_that_does_not_end(&slurm);
    what_a_prolog_finds_counts(&slurm);
    a_prolog_that_cannot_answer_starts_nothing(&slurm);
}

/// How a batch job ended, and what it said.
fn sbatch(slurm: &Slurm, data: &Path) -> (String, String) {
    let (script, said) = (slurm.path("tmp/batch"), slurm.path("tmp/batch.out"));
    let _ = fs::remove_file(&said);
    fs::write(&script, "#!/bin/sh\necho it ran\nsrun --ntasks=2 echo a step ran\n").unwrap();
    let mut command = slurm.submit("sbatch");
    command.arg("--parsable").arg("--output").arg(&said).arg(&script).env("LOCKSTEP_CHECK", data);
    let submitted = output(&mut command);
    done(&submitted);
    let job = String::from_utf8(submitted.stdout).unwrap();
    let mut state = String::new();
    until("the end of a batch job", || {
        state = slurm.job(job.trim());
        !["PENDING", "RUNNING", "COMPLETING"].contains(&state.as_str())
    });
    (state, fs::read_to_string(said).unwrap())
}

fn tasks_and_batch_scripts(slurm: &Slurm) {
    let data = published(slurm, BLANK);
    started(slurm, &mut srun(slurm, shown(&data), "", 3), 3);
    let (state, said) = sbatch(slurm, &data);
    assert_eq!(state, "COMPLETED", "{said}");
    assert_eq!(said.lines().collect::<Vec<_>>(), ["it ran", "a step ran", "a step ran"]);

    damage(&data.join("weights"));
    damage(&data.join(COMMAND));
    let words = ["modified: weights", shown(&data), "repair it from a good copy (--repair)"];
    let said = refused(slurm, &mut srun(slurm, shown(&data), "", 3), &words);
    // One of them checked, and says what is wrong; the others waited for it.
    assert_eq!(said.matches("another task of this node found it bad").count(), 2, "{said}");
    assert_eq!(said.matches("push it again").count(), 1, "{said}");
    let (state, said) = sbatch(slurm, &data);
    assert_eq!(state, "FAILED", "{said}");
    says_why(slurm, &said, &words);
    assert!(!said.lines().any(|line| line.ends_with(" ran")), "{said}");
    // The same node, the next job.
    started(slurm, &mut srun(slurm, "", "", 2), 2);
}

fn what_is_checked_is_said_by_the_environment(slurm: &Slurm) {
    let (good, colon) = (published(slurm, "good"), published(slurm, "with:colon"));
    started(slurm, &mut srun(slurm, &format!("{}:{}", shown(&good), shown(&good)), "", 1), 1);
    started(slurm, &mut srun(slurm, &format!("{}\n{}\n", shown(&good), shown(&colon)), "--full --threads 1", 1), 1);
    fs::write(colon.join("added"), "more").unwrap();
    started(slurm, &mut srun(slurm, &format!("{}\n", shown(&colon)), "--allow-unlisted", 1), 1);
    for (paths, check_options, words) in [
        (format!("{}\n{}", shown(&good), shown(&colon)), "", ["unlisted: added", "Remove what is not listed"]),
        (format!("{}:/not/there", shown(&good)), "", ["'/not/there'", "No such file"]),
        (":".to_owned(), "", ["LOCKSTEP_CHECK is set", "names no path"]),
        (shown(&good).to_owned(), "--quick --help", ["'--help'", "does not belong there"]),
        (shown(&good).to_owned(), "--no-such-option", ["unexpected argument", "--no-such-option"]),
    ] {
        refused(slurm, &mut srun(slurm, &paths, check_options, 1), &words);
    }
}

/// A file that nobody reads to its end.
fn endless(slurm: &Slurm) -> (PathBuf, String) {
    let data = slurm.path("tmp/endless");
    fs::create_dir(&data).unwrap();
    fs::File::create(data.join("big")).unwrap().set_len(1 << 40).unwrap();
    let list = slurm.path("tmp/list");
    fs::write(&list, format!("{}  big\n", "0".repeat(64))).unwrap();
    (data, format!("--against {}", list.display()))
}

fn h62_a_check_that_does_not_end(slurm: &Slurm) {
    let (data, against) = endless(slurm);
    let mut late = srun(slurm, shown(&data), &format!("{against} --timeout 1"), 2);
    refused(slurm, &mut late, &[shown(&data), "was not checked within 1 seconds", "give it more time"]);
    // The check itself, then the script that waits for it, and the check with it.
    let (check, script) = (["lockstep\0check", shown(&data)], slurm.path("lockstep-taskprolog.sh"));
    for (words, said) in [(&check[..], "was killed"), (&["bash", shown(&script)], "")] {
        // An end also where this test fails.
        let mut command = srun(slurm, shown(&data), &format!("{against} --timeout 120"), 1);
        let killed = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        until("the check", || find(&check).is_some());
        kill_process(find(words).unwrap(), Signal::KILL).unwrap();
        let output = killed.wait_with_output().unwrap();
        assert!(!output.status.success(), "{}", text(&output));
        assert_eq!(ran(&output), 0, "{}", text(&output));
        assert!(text(&output).contains(said), "{}", text(&output));
        until("the end of the check", || find(&check).is_none());
        slurm.rest();
    }
}

fn verdict(data: &Path) -> Option<i32> {
    Command::new(lockstep()).arg("check").arg(data).output().unwrap().status.code()
}

/// Lets a verdict be of another time.
fn age(data: &Path, seconds: u64) {
    let file = data.join(".lockstep/verdict.json");
    let mut verdict: serde_json::Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
    verdict["time"] = (verdict["time"].as_u64().unwrap() - seconds).into();
    fs::write(&file, verdict.to_string()).unwrap();
}

fn what_a_prolog_finds_counts(slurm: &Slurm) {
    let (data, other) = (published(slurm, "needed here"), published(slurm, "needed too"));
    let list = slurm.path("etc/slurm-paths");
    fs::write(&list, format!("# every job of this node\n\n{}\n{}", shown(&data), shown(&other))).unwrap();
    let job = || srun(slurm, "", "", 2);
    let answers = slurm.path("run/slurm");

    refused(slurm, &mut job(), &[shown(&data), shown(&other), "no verdict stands", "check it with"]);
    assert_eq!((verdict(&data), verdict(&other)), (Some(0), Some(0)));
    started(slurm, &mut job(), 2);
    until("the Epilog", || fs::read_dir(&answers).unwrap().next().is_none());
    // A verdict that was good, and is of yesterday.
    age(&other, 2 * 86_400);
    refused(slurm, &mut job(), &[shown(&other), "no verdict stands", "check it with"]);
    // What is bad by a check.
    damage(&other.join("weights"));
    assert_eq!(verdict(&other), Some(1));
    let said = refused(slurm, &mut job(), &[shown(&other), "no verdict stands", "check it with"]);
    assert!(!said.contains(shown(&data)), "{said}");
    let (state, said) = sbatch(slurm, Path::new(""));
    assert_eq!(state, "FAILED", "{said}");
    says_why(slurm, &said, &[shown(&other), "no verdict stands"]);
    // What the job asks for does not make up for what the node asks for, nor the other way round.
    refused(slurm, &mut srun(slurm, shown(&data), "", 1), &[shown(&other)]);
    fs::write(&list, shown(&data)).unwrap();
    started(slurm, &mut job(), 2);
    refused(slurm, &mut srun(slurm, shown(&other), "", 1), &["modified: weights"]);
    // The same where users cannot look into the directory of the list.
    let closed = |mode| fs::set_permissions(slurm.path("etc"), fs::Permissions::from_mode(mode)).unwrap();
    closed(0o700);
    started(slurm, &mut job(), 2);
    fs::write(&list, shown(&other)).unwrap();
    refused(slurm, &mut job(), &[shown(&other), "no verdict stands"]);
    closed(0o755);
}

/// With a list, no answer is a bad one: so it is when the Prolog was killed, or was not set up.
fn a_prolog_that_cannot_answer_starts_nothing(slurm: &Slurm) {
    fs::remove_dir_all(slurm.path("run/slurm")).unwrap();
    fs::write(slurm.path("run/slurm"), "in the way").unwrap();
    refused(slurm, &mut srun(slurm, "", "", 2), &["left no answer", "administrator"]);
    fs::remove_file(slurm.path("run/slurm")).unwrap();
    fs::remove_file(slurm.path("etc/slurm-paths")).unwrap();
    started(slurm, &mut srun(slurm, "", "", 2), 2);
}
