//! Targets that keep only some units: which ones, what is never taken away, and that it is not sent again.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

use crate::daemon::Running;
use crate::kit::area::{run_traced, traced, write};
use crate::kit::sshd::Sshd;
use crate::kit::{done, ends, text, until};
use crate::layout::archive;

fn unit(at: &Path, number: u32) {
    write(at, &format!("c-{number}/weights"), format!("weights {number}").as_bytes());
    write(at, &format!("c-{number}/sub/optimizer"), format!("optimizer {number}").as_bytes());
}

/// The numbers of the units there.
fn units(at: &Path) -> Vec<u32> {
    let Ok(found) = fs::read_dir(at) else { return Vec::new() };
    let names = found.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut numbers: Vec<u32> = names.filter_map(|name| name.strip_prefix("c-")?.parse().ok()).collect();
    numbers.sort_unstable();
    numbers
}

const RULE: &str = "unit = \"c-*/\"\nretain = { newest = 2, every = 3 }\n";

#[test]
fn only_some_units_stay_at_a_directory_and_at_an_agent_and_are_not_sent_again() {
    let sshd = Sshd::start();
    let source = sshd.path("source");
    (1..=6).for_each(|number| unit(&source, number));
    write(&source, "latest", b"c-6");
    write(&source, "other/file", b"no unit");
    for (name, target) in [("here", sshd.path("here").display().to_string()), ("there", sshd.remote("there-target"))] {
        let at = sshd.path(if name == "here" { "here" } else { "there-target" });
        let push = |rule: &str, arguments: &[&str]| -> Output {
            let source = source.display();
            let job = format!("[[job]]\nname = \"j\"\nsource = \"{source}\"\ntargets = [\"{target}\"]\n{rule}");
            fs::write(sshd.path("config.toml"), job).unwrap();
            let port = sshd.port.to_string();
            let mut command = sshd.command();
            command.args(["push", "j", "--config", "config.toml", "--identity", "user", "--known-hosts", "known"]);
            command.args(["-P", &port, "--remote=lockstep"]).args(arguments).output().unwrap()
        };
        done(&push(RULE, &[]));
        assert_eq!(units(&at), [3, 5, 6], "{name}");
        assert!(at.join("other/file").exists());
        let again = push(RULE, &[]);
        done(&again);
        assert!(text(&again).contains("nothing to do"), "{name}: {}", text(&again));
        // The next ones come, and older ones go, though nothing else is deleted.
        unit(&source, 7);
        write(&source, "latest", b"c-7");
        write(&at, "only-there", b"stays");
        let dry = push(RULE, &["-n", "-i"]);
        done(&dry);
        assert!(
            text(&dry).contains("*deleting   c-5/") && text(&dry).contains("1 unit to take away"),
            "{}",
            text(&dry)
        );
        let pushed = push(RULE, &[]);
        done(&pushed);
        assert!(text(&pushed).contains("1 unit taken away"), "{name}: {}", text(&pushed));
        assert_eq!(units(&at), [3, 6, 7], "{name}");
        assert!(at.join("only-there").exists());
        // What a pointer at the source names is sent, and what one names at the target is not taken away.
        write(&source, "latest", b"c-4");
        symlink("c-3", at.join("best")).unwrap();
        done(&push(RULE, &[]));
        assert_eq!(units(&at), [3, 4, 6, 7], "{name}");
        symlink("c-6", at.join("good")).unwrap();
        unit(&source, 8);
        unit(&source, 10);
        write(&source, "latest", b"c-10");
        let pushed = push("unit = \"c-*/\"\nretain = { newest = 2 }\n", &[]);
        done(&pushed);
        assert_eq!(units(&at), [3, 6, 8, 10], "{name}: {}", text(&pushed));
        assert!(text(&pushed).contains("'c-6' is not removed for now: 'good' names it"), "{name}: {}", text(&pushed));
        lockstep::audit::verify(&lockstep::root::Root::open(&at).unwrap()).unwrap();
        // As the next target finds it.
        for number in [7, 8, 10] {
            fs::remove_dir_all(source.join(format!("c-{number}"))).unwrap();
        }
        write(&source, "latest", b"c-6");
    }
}

#[test]
fn a_unit_that_goes_is_moved_to_the_trash_whole() {
    let at = tempfile::tempdir().unwrap();
    let (source, target) = (at.path().join("source"), at.path().join("target"));
    (1..=2).for_each(|number| unit(&source, number));
    let show = |path: &Path| path.display().to_string();
    let job = format!(
        "[[job]]\nname = \"j\"\nsource = \"{}\"\ntargets = [\"{}\"]\nunit = \"c-*/\"\nretain = {{ newest = 2 }}\ndelete = \"trash\"\nmax_delete = \"0\"\n",
        show(&source),
        show(&target)
    );
    fs::write(at.path().join("config.toml"), job).unwrap();
    let push = || {
        let mut command = Command::new(crate::kit::area::lockstep());
        command.args(["push", "j", "--config"]).arg(at.path().join("config.toml")).env("HOME", at.path());
        done(&command.output().unwrap());
    };
    push();
    unit(&source, 3);
    fs::remove_dir_all(source.join("c-1")).unwrap();
    push();
    assert_eq!(units(&target), [2, 3]);
    let aside = fs::read_dir(target.join(".lockstep/trash")).unwrap().next().unwrap().unwrap().path();
    assert_eq!(fs::read_to_string(aside.join("c-1/sub/optimizer")).unwrap(), "optimizer 1");
    let log = fs::read_to_string(target.join(".lockstep/audit.jsonl")).unwrap();
    assert!(log.contains(r#""action":"trash","path":"c-1""#), "{log}");
}

#[test]
fn the_daemon_takes_nothing_away_that_another_target_needs_and_goes_on_once_it_is_there() {
    let job = format!(
        "[[job]]\nname = \"j\"\nsource = \"AT/source\"\ntargets = [\"AT/near\", \"AT/away/far\"]\nsettle = \"0s\"\n\
         retry_max = \"1s\"\n{}",
        RULE.replace(", every = 3", "")
    );
    let running = Running::prepared(&job, |at| {
        (1..=2).for_each(|number| unit(&at.join("source"), number));
        // A file where a directory is to be.
        fs::write(at.join("away"), "").unwrap();
    });
    let (near, far) = (running.path("near"), running.path("away/far"));
    until("the first units", || units(&near) == [1, 2]);
    for number in 3..=4 {
        unit(&running.path("source"), number);
    }
    until("more units", || units(&near) == [1, 2, 3, 4]);
    // Units that the other target lacks stay, whatever is compared in the meantime.
    done(&running.jobs(&["now"]));
    let runs = || running.target(0)["runs"].as_u64().unwrap();
    let before = runs();
    unit(&running.path("source"), 5);
    until("a further run", || units(&near).contains(&5) && runs() > before);
    assert_eq!(units(&near), [1, 2, 3, 4, 5]);
    fs::remove_file(running.path("away")).unwrap();
    until("the other target to have what it is to have", || units(&far) == [4, 5]);
    until("what nobody needs any more to go", || units(&near) == [4, 5]);
}

#[test]
fn what_retain_needs_is_named_where_it_is_missing() {
    let at = tempfile::tempdir().unwrap();
    let config = |more: &str, source: &str| {
        let job = format!("[[job]]\nname = \"j\"\nsource = \"{source}\"\ntargets = [\"/t\"]\n{more}\n");
        fs::write(at.path().join("config.toml"), job).unwrap();
        let mut command = Command::new(crate::kit::area::lockstep());
        command.args(["push", "j", "--config"]).arg(at.path().join("config.toml")).output().unwrap()
    };
    for (more, source, part) in [
        ("retain = { newest = 2 }", "/s", "say with 'unit' what they are"),
        ("unit = 'c-*/'\nretain = { newest = 0 }", "/s", "nonzero"),
        ("unit = 'c-*/'\nretain = { every = 2 }", "/s", "newest"),
        ("unit = 'c-*/'\nretain = { newest = 2, oldest = 1 }", "/s", "oldest"),
        ("unit = 'c-*/'\nretain = { newest = 2 }", "host:/s", "'retain' is for a source of this machine"),
    ] {
        ends(&config(more, source), 2, &[part]);
    }
}

/// A command that ends with the test.
struct Started(Child);

impl Drop for Started {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn what_a_check_or_the_job_that_it_started_holds_is_removed_by_a_later_run() {
    let at = tempfile::tempdir().unwrap();
    let (source, target) = (at.path().join("source"), at.path().join("target"));
    (1..=2).for_each(|number| unit(&source, number));
    write(&source, "plain/file", b"plain");
    let lockstep = |arguments: &[&str]| {
        let mut command = Command::new(crate::kit::area::lockstep());
        command.args(arguments).env("HOME", at.path()).current_dir(at.path());
        command
    };
    let push = |rule: &str| {
        let (source, target) = (source.display(), target.display());
        let job =
            format!("[[job]]\nname = \"j\"\nsource = \"{source}\"\ntargets = [\"{target}\"]\nunit = \"c-*/\"\n{rule}");
        fs::write(at.path().join("config.toml"), job).unwrap();
        let output = lockstep(&["push", "j", "--config", "config.toml"]).output().unwrap();
        done(&output);
        text(&output)
    };
    push("");
    let hold = |path: &str| {
        let script = "cd \"$1\" && find . -type f -printf '%P\\0' | xargs -0 sha256sum";
        let sums = Command::new("sh").args(["-c", script, "sh"]).arg(at.path().join(path)).output().unwrap();
        fs::write(at.path().join("sums"), sums.stdout).unwrap();
        let mut command = lockstep(&["exec", "--check", path, "--against", "sums", "--"]);
        let child = Started(command.args(["sleep", "1000"]).stderr(Stdio::null()).spawn().unwrap());
        let comm = format!("/proc/{}/comm", child.0.id());
        until("the command to be started", || fs::read_to_string(&comm).is_ok_and(|name| name.trim() == "sleep"));
        child
    };
    // By a part of it, and by all of it.
    for path in ["target/c-1", "target/c-1/sub"] {
        let job = hold(path);
        let said = push("retain = { newest = 1 }\n");
        assert!(said.contains("'c-1' is not removed for now") && said.contains("the next run"), "{path}: {said}");
        assert_eq!(units(&target), [1, 2], "{path}");
        done(&lockstep(&["manifest", "verify", "target"]).output().unwrap());
        drop(job);
    }
    let job = hold("target/c-1");
    // What is removed because the source does not have it any more, and what is no unit.
    fs::remove_dir_all(source.join("c-1")).unwrap();
    fs::remove_dir_all(source.join("plain")).unwrap();
    let plain = hold("target/plain");
    let said = push("delete = \"mirror\"\n");
    for path in ["c-1", "plain"] {
        assert!(said.contains(&format!("'{path}' is not removed for now")), "{said}");
        assert!(target.join(path).exists());
    }
    done(&lockstep(&["manifest", "verify", "target"]).output().unwrap());
    drop(plain);
    push("delete = \"mirror\"\n");
    assert!(target.join("c-1/sub/optimizer").exists() && !target.join("plain").exists());
    // A directory that holds what is held stays with it.
    write(&source, "outer/inner/file", b"deep");
    write(&source, "outer/gone", b"gone");
    push("");
    fs::remove_dir_all(source.join("outer")).unwrap();
    let inner = hold("target/outer/inner");
    assert!(push("delete = \"trash\"\n").contains("'outer/inner' is not removed for now"));
    assert!(target.join("outer/inner/file").exists() && !target.join("outer/gone").exists());
    drop(inner);
    push("delete = \"mirror\"\n");
    assert!(!target.join("outer").exists());
    // Whoever holds it may be killed.
    drop(job);
    push("retain = { newest = 1 }\n");
    assert_eq!(units(&target), [2]);
    let mut check =
        traced("flock", None, &at.path().join("log"), &[crate::kit::area::lockstep(), "check", "target/c-2"]);
    check.args(["--marker", "weights"]).current_dir(at.path()).env("HOME", at.path());
    run_traced(&mut check);
    let calls = fs::read_to_string(at.path().join("log")).unwrap();
    assert!(calls.contains("LOCK_SH|LOCK_NB"), "{calls}");
}

#[test]
fn a_push_of_a_job_sends_the_units_that_are_finished_and_says_why_others_are_not() {
    let at = tempfile::tempdir().unwrap();
    let (source, target) = (at.path().join("source"), at.path().join("target"));
    let push = |rule: &str| {
        let (source, target) = (source.display(), target.display());
        let job = format!("[[job]]\nname = \"j\"\nsource = \"{source}\"\ntargets = [\"{target}\"]\n{rule}");
        fs::write(at.path().join("config.toml"), job).unwrap();
        let mut command = Command::new(crate::kit::area::lockstep());
        command
            .args(["push", "j", "--config"])
            .arg(at.path().join("config.toml"))
            .env("HOME", at.path())
            .output()
            .unwrap()
    };
    // Markers.
    let marked = "unit = \"c-*/\"\nready = \"_SUCCESS\"\nretain = { newest = 2 }\n";
    for number in 1..=4 {
        unit(&source, number);
        if number < 4 {
            write(&source, &format!("c-{number}/_SUCCESS"), b"");
        }
    }
    write(&source, "latest", b"c-4");
    write(&source, "readme", b"no unit");
    ends(
        &push(marked),
        4,
        &["'c-4' is not finished, and is left out: '_SUCCESS' is not in it", "not finished and left out: 1 unit"],
    );
    // One that is not finished is none of the newest, and what names it does not come either.
    assert_eq!(units(&target), [2, 3]);
    assert!(!target.join("latest").exists() && target.join("readme").exists());
    write(&source, "c-4/_SUCCESS", b"");
    done(&push(marked));
    assert_eq!(units(&target), [3, 4]);
    assert_eq!(fs::read_to_string(target.join("latest")).unwrap(), "c-4");
    // Layouts: Megatron names the newest whole iteration in a file beside them.
    fs::remove_dir_all(&source).unwrap();
    fs::remove_dir_all(&target).unwrap();
    for iteration in ["iter_0000100", "iter_0000200"] {
        write(&source, &format!("{iteration}/mp_rank_00/model_optim_rng.pt"), &archive());
    }
    write(&source, "latest_checkpointed_iteration.txt", b"100");
    let layout = "unit = \"iter_*/\"\nready = \"megatron\"\n";
    let output = push(layout);
    ends(&output, 4, &["'iter_0000200' is not finished, and is left out: ", "names no checkpoint as new as this"]);
    assert!(target.join("iter_0000100/mp_rank_00/model_optim_rng.pt").exists(), "{}", text(&output));
    assert!(!target.join("iter_0000200").exists());
    write(&source, "latest_checkpointed_iteration.txt", b"200");
    done(&push(layout));
    assert!(target.join("iter_0000200").exists());
    // A tree without units is looked at as a whole.
    write(&source, "latest_checkpointed_iteration.txt", b"300");
    ends(&push("ready = \"megatron\"\n"), 4, &["is not finished: "]);
}

#[test]
fn h32_killed_at_any_step_a_unit_that_goes_is_whole_or_gone_and_the_next_run_takes_it_away() {
    let at = tempfile::tempdir().unwrap();
    let path = |name: &str| at.path().join(name);
    let config = |name: &str| {
        let (source, target) = (path(name).display().to_string(), path("target").display().to_string());
        let job = format!("[[job]]\nname = \"j\"\nsource = \"{source}\"\ntargets = [\"{target}\"]\nunit = \"c-*/\"\n");
        let file = path(&format!("{name}.toml"));
        fs::write(&file, format!("{job}retain = {{ newest = 1 }}\n")).unwrap();
        let program = crate::kit::area::lockstep().to_owned();
        [program, "push".into(), "j".into(), "--config".into(), file.display().to_string()]
    };
    unit(&path("old"), 1);
    write(&path("old"), "latest", b"c-1");
    unit(&path("new"), 2);
    write(&path("new"), "latest", b"c-2");
    let (old, new) = (config("old"), config("new"));
    let run = |arguments: &[String]| {
        let output = Command::new(&arguments[0]).args(&arguments[1..]).env("HOME", at.path()).output().unwrap();
        done(&output);
    };
    let mut killed = 0;
    for (call, points) in [("renameat", 6), ("renameat2", 6), ("unlinkat", 24), ("fsync", 6), ("syncfs", 3)] {
        for point in 1..=points {
            let when = format!("killed at {call} number {point}");
            let _ = fs::remove_dir_all(path("target"));
            run(&old);
            let arguments: Vec<&str> = new.iter().map(String::as_str).collect();
            let mut command = traced(call, Some(&format!("signal=SIGKILL:when={point}")), &path("log"), &arguments);
            killed += usize::from(!run_traced(command.env("HOME", at.path())).status.success());
            let target = path("target");
            for number in units(&target) {
                for file in ["weights", "sub/optimizer"] {
                    assert!(target.join(format!("c-{number}/{file}")).exists(), "{when}: a part of c-{number} is gone");
                }
            }
            let named = fs::read_to_string(target.join("latest")).unwrap();
            assert!(target.join(&named).exists(), "{when}: latest names {named}");
            run(&new);
            assert_eq!(units(&target), [2], "{when}");
            assert!(!target.join(".lockstep/staging/current").exists(), "{when}");
            done(&Command::new(&new[0]).args(["manifest", "verify"]).arg(&target).output().unwrap());
            lockstep::audit::verify(&lockstep::root::Root::open(&target).unwrap()).unwrap();
        }
    }
    assert!(killed > 10, "only {killed} runs were killed");
}

#[test]
fn a_push_of_a_job_to_several_targets_takes_away_what_is_at_as_many_as_it_has_to_be() {
    let at = tempfile::tempdir().unwrap();
    let source = at.path().join("source");
    let push = |quorum: &str| {
        let root = at.path().display();
        let targets = format!("\"{root}/first\", \"{root}/away/second\"");
        let job =
            format!("[[job]]\nname = \"j\"\nsource = \"{root}/source\"\ntargets = [{targets}]\nunit = \"c-*/\"\n");
        fs::write(at.path().join("config.toml"), format!("{job}retain = {{ newest = 2 }}\n{quorum}")).unwrap();
        let mut command = Command::new(crate::kit::area::lockstep());
        command
            .args(["push", "j", "--config"])
            .arg(at.path().join("config.toml"))
            .env("HOME", at.path())
            .output()
            .unwrap()
    };
    let there = || (units(&at.path().join("first")), units(&at.path().join("away/second")));
    (1..=2).for_each(|number| unit(&source, number));
    done(&push(""));
    unit(&source, 3);
    done(&push(""));
    assert_eq!(there(), (vec![2, 3], vec![2, 3]));
    // One of them is away: what it may still need stays at the other, unless one is enough.
    fs::rename(at.path().join("away"), at.path().join("elsewhere")).unwrap();
    fs::write(at.path().join("away"), "").unwrap();
    unit(&source, 4);
    ends(&push(""), 4, &["what 'retain' is to take away stays until 2 targets are in step"]);
    assert_eq!(there().0, [2, 3, 4]);
    ends(&push("quorum = 1\n"), 4, &["1 unit taken away"]);
    assert_eq!(there().0, [3, 4]);
    fs::remove_file(at.path().join("away")).unwrap();
    fs::rename(at.path().join("elsewhere"), at.path().join("away")).unwrap();
    done(&push(""));
    assert_eq!(there(), (vec![3, 4], vec![3, 4]));
}
