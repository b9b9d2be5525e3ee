//! What push and pull mean by their arguments, jobs of the configuration, and runs that are stopped.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use crate::kit::own::Server;
use crate::kit::{text as said, until};

fn lockstep(at: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lockstep"));
    command.current_dir(at).args(arguments).env_clear().env("XDG_STATE_HOME", at.join("state"));
    command.stdin(Stdio::null());
    command
}

fn run(at: &Path, arguments: &[&str]) -> Output {
    lockstep(at, arguments).output().unwrap()
}

#[track_caller]
fn ends(output: &Output, code: i32, part: &str) {
    assert_eq!(output.status.code(), Some(code), "{}", said(output));
    assert!(said(output).contains(part), "{part}: {}", said(output));
}

/// All paths below, without lockstep's own directory.
fn paths(at: &Path) -> Vec<String> {
    let entries = walkdir::WalkDir::new(at).min_depth(1).sort_by_file_name().into_iter();
    let entries = entries.filter_entry(|entry| entry.file_name() != ".lockstep").map(Result::unwrap);
    entries.map(|entry| entry.path().strip_prefix(at).unwrap().to_str().unwrap().to_owned()).collect()
}

fn write(at: &Path, path: &str, content: &str) {
    fs::create_dir_all(at.join(path).parent().unwrap()).unwrap();
    fs::write(at.join(path), content).unwrap();
}

#[test]
fn s21_a_single_file_goes_where_scp_would_put_it_and_touches_nothing_else() {
    let server = Server::start(&[]);
    let at = server.at.path();
    for (path, content) in
        [("model.ckpt", "new"), ("root/models/other.ckpt", "other"), ("root/models/model.ckpt", "old")]
    {
        write(at, path, content);
    }
    let push = |source: &str, target: &str| {
        let target = format!("sync@127.0.0.1:{target}");
        ends(&server.lockstep(&["push", "--delete", source, &target], "user"), 0, "1 published");
    };
    let content = |path: &str| fs::read_to_string(at.join("root").join(path)).unwrap();
    push("model.ckpt", "/models");
    assert_eq!((content("models/model.ckpt"), content("models/other.ckpt")), ("new".into(), "other".into()));
    push("model.ckpt", "/models/renamed.ckpt");
    push("model.ckpt", "/models/sub/");
    push("model.ckpt", "/models/more/deep.ckpt");
    assert_eq!(
        paths(&at.join("root/models")),
        ["model.ckpt", "more", "more/deep.ckpt", "other.ckpt", "renamed.ckpt", "sub", "sub/model.ckpt"]
    );
    // A file that is there is replaced, and the record of its neighbours stays.
    fs::write(at.join("model.ckpt"), "newer").unwrap();
    push("model.ckpt", "/models/renamed.ckpt");
    assert_eq!((content("models/renamed.ckpt"), content("models/model.ckpt")), ("newer".into(), "new".into()));
    let manifest = content("models/.lockstep/manifest");
    assert!(manifest.contains("\tmodel.ckpt\n") && manifest.contains("\trenamed.ckpt\n"), "{manifest}");

    let pull = |source: &str, target: &str| {
        let source = format!("sync@127.0.0.1:{source}");
        server.lockstep(&["pull", &source, target], "user")
    };
    ends(&pull("/models/renamed.ckpt", "back.ckpt"), 0, "1 published");
    ends(&pull("/models/other.ckpt", "into/"), 0, "1 published");
    assert_eq!(fs::read_to_string(at.join("back.ckpt")).unwrap(), "newer");
    assert_eq!(paths(&at.join("into")), ["other.ckpt"]);
    ends(&pull("/models/nothing", "x"), 5, "nothing");
    assert!(!at.join("x").exists() && !at.join(".x.lockstep").exists());
}

#[test]
fn several_sources_get_their_own_names_and_neighbours_stay() {
    let at = tempfile::tempdir().unwrap();
    let at = at.path();
    for path in ["a.ckpt", "far/b.ckpt", "dir/sub/f", "far/other", "dest/neighbour", "dest/dir/extra"] {
        write(at, path, path);
    }
    std::os::unix::fs::symlink("far/b.ckpt", at.join("link.ckpt")).unwrap();
    let push = ["push", "--delete", "a.ckpt", "far/b.ckpt", "dir/", "link.ckpt", "dest"];
    ends(&run(at, &push), 0, "1 removed");
    assert_eq!(paths(&at.join("dest")), ["a.ckpt", "b.ckpt", "dir", "dir/sub", "dir/sub/f", "link.ckpt", "neighbour"]);
    assert!(at.join("dest/link.ckpt").symlink_metadata().unwrap().is_file());
    ends(&run(at, &push), 0, "nothing to do");
    ends(&run(at, &["pull", "far/b.ckpt", "dir", "back"]), 0, "4 published");
    assert_eq!(paths(&at.join("back")), ["b.ckpt", "dir", "dir/sub", "dir/sub/f"]);

    write(at, "far/a.ckpt", "twin");
    write(at, "list", "f\n");
    for (arguments, code, part) in [
        (&["push", "a.ckpt", "far/a.ckpt", "x"][..], 2, "two sources are called 'a.ckpt'"),
        (&["push", "a.ckpt", "missing", "x"], 5, "missing"),
        (&["push", "a.ckpt", "/", "x"], 2, "no name"),
        (&["push", "--files-from", "list", "a.ckpt", "dir", "x"], 2, "--files-from"),
        (&["push", "host:/a", "x"], 2, "written './host:/a'"),
        (&["pull", "host:/a", "host:/b"], 2, "written './host:/b'"),
        (&["push", "--exclude", "*.ckpt", "a.ckpt", "dir", "x"], 4, "a.ckpt: is not there, or left out"),
    ] {
        ends(&run(at, arguments), code, part);
    }
}

#[test]
fn s29_a_job_goes_to_all_its_targets_and_says_which_failed() {
    let at = tempfile::tempdir().unwrap();
    let at = at.path();
    for path in ["data/model.safetensors", "data/x.tmp", "good/extra", "other/extra", "not a directory"] {
        write(at, path, path);
    }
    let root = at.to_str().unwrap();
    let job = |more: &str, targets: &str| {
        let text = format!(
            "[[policy.weights.rule]]\nmatch = '*.safetensors'\nmode = '600'\n\n[[job]]\nname = 'nightly'\n\
             source = '{root}/data'\ntargets = [{targets}]\nexclude = ['*.tmp']\npolicy = 'weights'\n{more}\n"
        );
        write(at, "config.toml", &text);
        use std::os::unix::fs::PermissionsExt as _;
        fs::set_permissions(at.join("config.toml"), fs::Permissions::from_mode(0o600)).unwrap();
    };
    let push = |more: &[&str]| {
        let config = at.join("config.toml");
        lockstep(at, &[&["push", "nightly"], more].concat()).env("LOCKSTEP_CONFIG", config).output().unwrap()
    };
    let good = format!("'{root}/good'");
    job(
        "delete = 'mirror'\nbandwidth = '1 GB/s'\nlast = ['latest']",
        &format!("{good}, '{root}/not a directory', '{root}/other'"),
    );
    let output = push(&[]);
    ends(&output, 4, "targets that are not in step: 1 of 3");
    assert!(said(&output).contains(&format!("to {root}/not a directory: ")), "{}", said(&output));
    for target in ["good", "other"] {
        assert_eq!(paths(&at.join(target)), ["model.safetensors"]);
        use std::os::unix::fs::MetadataExt as _;
        assert_eq!(at.join(target).join("model.safetensors").metadata().unwrap().mode() & 0o7777, 0o600);
    }
    job("", &good);
    ends(&push(&["-n"]), 0, "nothing was changed");
    ends(&run(at, &["push", "--config", "config.toml", "nightly"]), 0, "nothing to do");
    ends(&push(&["--exclude", "x"]), 2, "--exclude is for the job");
    job("ready = 'megatron'", &good);
    ends(&push(&[]), 4, "is not finished: ");
    fs::rename(at.join("data"), at.join("away")).unwrap();
    job("", &format!("{good}, 'h:/other'"));
    let output = push(&[]);
    ends(&output, 5, &format!("lockstep: cannot open '{root}/data': No such file or directory\n"));
    assert_eq!(said(&output).lines().count(), 1, "once, whatever the number of targets: {}", said(&output));
    write(at, "data", "");
    ends(&push(&[]), 2, "is not a directory");
    fs::remove_file(at.join("data")).unwrap();
    fs::rename(at.join("away"), at.join("data")).unwrap();
    job("ready = '_SUCCESS'", &good);
    ends(&push(&[]), 4, "'_SUCCESS' is not in it");
    write(at, "data/_SUCCESS", "");
    ends(&push(&[]), 0, "1 published");
    job("unit = 'checkpoint-*/'", &good);
    let unit = || {
        write(at, "data/checkpoint-1/a", &format!("{:?}", std::time::Instant::now()));
        ends(&push(&[]), 0, "published");
        std::os::unix::fs::MetadataExt::ino(&at.join("good/checkpoint-1").metadata().unwrap())
    };
    assert_ne!(unit(), unit(), "the unit was changed in place");
    ends(&run(at, &["push", "--config", "config.toml", "nigthly"]), 2, "did you mean 'nightly'?");
    ends(&run(at, &["push", "data"]), 2, "say where to: lockstep push data");
    ends(&run(at, &["push", "--config", "config.toml", "data", "x"]), 2, "--config is for");
}

/// A tree that takes a limited run long enough to be stopped in the middle.
fn slow_tree(at: &Path) {
    fs::create_dir(at.join("data")).unwrap();
    for number in 0..40_u32 {
        let content: Vec<u8> = (0..50_000_u32).map(|at| (at.wrapping_mul(2_654_435_761) ^ number) as u8).collect();
        fs::write(at.join(format!("data/{number:02}")), content).unwrap();
    }
}

fn signal(child: &std::process::Child, signal: rustix::process::Signal) {
    rustix::process::kill_process(rustix::process::Pid::from_child(child), signal).unwrap();
}

/// Waits until a run has staged some files, and gives how many.
fn staged(at: &Path) -> usize {
    let staging = at.join(".target.lockstep/.lockstep/staging/current/tree");
    let started = std::time::Instant::now();
    loop {
        let count = fs::read_dir(&staging).map_or(0, Iterator::count);
        if count >= 5 {
            return count;
        }
        assert!(started.elapsed() < std::time::Duration::from_secs(30), "nothing is staged");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}

#[test]
fn a_run_that_is_stopped_says_so_and_the_next_goes_on_from_there() {
    use rustix::process::Signal;
    for (with, code) in [(Signal::INT, 130), (Signal::TERM, 143), (Signal::HUP, 129)] {
        let at = tempfile::tempdir().unwrap();
        slow_tree(at.path());
        let push = ["push", "--json", "data", "target"];
        let mut child = lockstep(at.path(), &push);
        let child = child.args(["--bwlimit", "500K"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        staged(at.path());
        signal(&child, with);
        let output = child.wait_with_output().unwrap();
        ends(&output, code, "the same command goes on from there");
        assert!(!at.path().join("target").exists());
        let staged = staged(at.path());
        assert!(staged < 40, "it was not stopped: --bwlimit does nothing");
        let again = run(at.path(), &push);
        ends(&again, 0, "\"published\":40");
        let summary = String::from_utf8(again.stdout).unwrap();
        let sent = serde_json::from_str::<serde_json::Value>(summary.lines().last().unwrap()).unwrap();
        assert!(sent["transferred_bytes"].as_u64().unwrap() <= (41 - staged as u64) * 50_000, "{sent}");
        assert_eq!(run(at.path(), &["manifest", "verify", "target"]).status.code(), Some(0));
    }
}

fn catches_interrupts(pid: u32) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:")).unwrap().trim();
    u64::from_str_radix(caught, 16).unwrap() & 2 != 0
}

#[test]
fn the_second_signal_ends_a_run_at_once() {
    let at = tempfile::tempdir().unwrap();
    slow_tree(at.path());
    let mut first = lockstep(at.path(), &["push", "--bwlimit", "1K", "data", "target"]);
    let mut first = first.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let lock = at.path().join(".target.lockstep/.lockstep/lock");
    let holds =
        || fs::read(&lock).is_ok_and(|text| String::from_utf8_lossy(&text).contains(&format!("{}", first.id())));
    while !holds() {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    // Waits for a lock that nobody gives up: the first signal can only be noted.
    let mut second = lockstep(at.path(), &["push", "-v", "--wait", "600", "data", "target"]);
    let mut second = second.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    while !catches_interrupts(second.id()) {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    while second.try_wait().unwrap().is_none() {
        signal(&second, rustix::process::Signal::INT);
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    assert_eq!(second.wait().unwrap().code(), Some(130));
    assert!(first.try_wait().unwrap().is_none());
    first.kill().unwrap();
    first.wait().unwrap();
}

const TREES: &str = "
mkdir -p new/sub new/keep new/added new/mode_dir old/sub old/keep old/gone/deep old/mode_dir
mk() { printf %s \"$2\" > $1; touch -d $3 $1; }
both() { mk new/$1 $2 $3; mk old/$1 $4 $5; }
both same x 2026-01-01 x 2026-01-01
both size longer 2026-01-02 s 2026-01-01
both size_only longer 2026-01-01 s 2026-01-01
both content ab 2026-01-02 xy 2026-01-01
both mode m 2026-01-01 m 2026-01-01; chmod 600 new/mode
both time t 2026-01-02 t 2026-01-01
both mode_and_content ab 2026-01-02 xy 2026-01-01; chmod 755 new/mode_and_content
mk new/added_file n 2026-01-01; mk new/added/f n 2026-01-01
mk old/gone/deep/f g 2026-01-01; mk old/gone_file g 2026-01-01
ln -s same new/added_link; ln -s same new/link; ln -s other old/link; ln -s same new/same_link; ln -s same old/same_link
mk new/was_link f 2026-01-01; ln -s same old/was_link
ln -s same new/was_file; mk old/was_file f 2026-01-01
mkdir new/was_file_too; mk new/was_file_too/f x 2026-01-01; mk old/was_file_too f 2026-01-01
chmod 700 new/mode_dir
touch -h -d 2026-01-01 new/*link new/was_file old/*link old/keep new/keep old/mode_dir new/mode_dir old/sub new/added
touch -d 2026-01-03 new/sub
cp -a old theirs
touch -d 2026-01-05 new theirs old
";

/// The lines of `--itemize-changes`, sorted by path.
fn itemized(output: &Output) -> Vec<String> {
    let text = String::from_utf8(output.stdout.clone()).unwrap();
    let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
    lines.sort_by_key(|line| line[11..].trim().to_owned());
    lines
}

#[test]
fn changes_are_itemized_as_rsync_does() {
    let at = tempfile::tempdir().unwrap();
    let at = at.path();
    let made = Command::new("sh").args(["-ec", TREES]).current_dir(at).status().unwrap();
    assert!(made.success());
    ends(&run(at, &["push", "old", "ours"]), 0, "published");
    // The directory itself is no path of a tree, and has no line.
    let rsync = |more: &[&str]| {
        let output = Command::new("rsync").current_dir(at).args(["-rlptHci", "--delete"]).args(more).output();
        let output = output.expect("rsync is not installed: Debian package rsync");
        assert!(output.status.success(), "{}", said(&output));
        output
    };
    let theirs = itemized(&rsync(&["new/", "theirs/"]));
    assert!(theirs.len() > 20, "{theirs:#?}");
    // A dry run reads no content: the two files that only reading tells apart have no letter for it.
    let dry = itemized(&run(at, &["push", "-n", "-q", "-i", "--delete", "new", "ours"]));
    let unread = ["content", "mode_and_content"];
    let known = |lines: &[String]| {
        let known = lines.iter().filter(|line| !unread.contains(&line[11..].trim()));
        known.cloned().collect::<Vec<_>>()
    };
    assert_eq!((known(&dry), dry.len()), (known(&theirs), theirs.len()));
    let ours = run(at, &["push", "-q", "-i", "-c", "--delete", "new", "ours"]);
    assert_eq!(itemized(&ours), theirs);
    // What rsync still sees is the directory itself, and times of links, which are not kept.
    let mut left = itemized(&rsync(&["-n", "--exclude=.lockstep", "new/", "ours/"]));
    left.retain(|line| !line.starts_with(".L..t") && !line.ends_with(" ./"));
    assert_eq!(left, [] as [&str; 0]);
    assert!(run(at, &["push", "-q", "-i", "new", "ours"]).stdout.is_empty());
}

#[test]
fn with_json_every_line_is_an_object_and_nothing_else_is_said() {
    let at = tempfile::tempdir().unwrap();
    write(at.path(), "data/f", "content");
    write(at.path(), "data/escape\u{1b}[31m", "x");
    let output = run(at.path(), &["push", "--json", "-v", "-i", "data", "target"]);
    assert_eq!(output.status.code(), Some(0), "{}", said(&output));
    assert!(output.stderr.is_empty(), "{}", said(&output));
    let text = String::from_utf8(output.stdout).unwrap();
    let events: Vec<serde_json::Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let named = |name: &str| events.iter().filter(|event| event["event"] == name).count();
    assert_eq!((named("change"), named("summary")), (2, 1));
    assert!(named("phase") >= 4, "{text}");
    let documented = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/format.md")).unwrap();
    for event in &events {
        let name = event["event"].as_str().unwrap();
        assert!(documented.contains(&format!("`{name}`")), "docs/format.md does not speak of {name}");
        for key in event.as_object().unwrap().keys() {
            assert!(documented.contains(&format!("`{key}`")), "docs/format.md does not speak of {key}");
        }
    }
    assert!(!text.contains('\u{1b}'));
}

#[test]
fn without_a_terminal_nothing_steers_one() {
    let at = tempfile::tempdir().unwrap();
    write(at.path(), "data/escape\u{1b}[31m", "x");
    std::os::unix::fs::symlink("/etc/\u{1b}]0;", at.path().join("data/link")).unwrap();
    let output = run(at.path(), &["push", "-v", "-i", "data", "target"]);
    ends(&output, 0, "skipped: link");
    assert!(!said(&output).contains(['\u{1b}', '\r']), "{}", said(&output));
    assert!(said(&run(at.path(), &["push", "-q", "data", "target2"])).is_empty());
}

#[test]
fn the_examples_of_a_sender_and_a_receiver_work_with_each_other() {
    let at = tempfile::tempdir().unwrap();
    let at = at.path();
    let root = at.to_str().unwrap();
    let example = |name: &str, changes: &[(&str, &str)]| {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("config").join(name);
        let mut text = fs::read_to_string(file).unwrap();
        for (from, to) in changes {
            assert!(text.contains(from), "{name} has no {from}");
            text = text.replace(from, to);
        }
        write(at, name, &text);
        use std::os::unix::fs::PermissionsExt as _;
        fs::set_permissions(at.join(name), fs::Permissions::from_mode(0o600)).unwrap();
    };
    let (uid, gid) = (rustix::process::getuid().as_raw().to_string(), rustix::process::getgid().as_raw().to_string());
    let (etc, data, log) = (format!("{root}/etc"), format!("\"{root}/data/"), format!("{root}/log"));
    example(
        "receiver.toml",
        &[
            ("/etc/lockstep", &etc),
            ("/var/lib/lockstep", &etc),
            ("\"/data/", &data),
            ("\"/var/log/lockstep\"", &format!("\"{log}\"")),
            ("192.168.1.0/24", "127.0.0.0/8"),
            ("ai_team", &gid),
            ("trainer", &uid),
        ],
    );
    example("sender.toml", &[("= \"/data/", &format!("= \"{root}/from/"))]);
    assert!(run(at, &["keys", "generate", "key"]).status.success());
    for directory in ["data/checkpoints", "data/datasets", "log"] {
        fs::create_dir_all(at.join(directory)).unwrap();
    }
    write(at, "etc/revoked_keys", "");
    for user in ["sync", "reader"] {
        write(at, &format!("etc/keys/{user}"), &fs::read_to_string(at.join("key.pub")).unwrap());
    }
    for path in ["checkpoints/checkpoint-1/a.safetensors", "checkpoints/latest", "checkpoints/x.tmp", "maps/m"] {
        write(&at.join("from"), path, path);
    }

    let serve = ["serve", "--config", "receiver.toml", "--listen", "127.0.0.1:0", "--port-file", "port"];
    let mut server = lockstep(at, &serve).arg("--die-with-parent").stderr(Stdio::null()).spawn().unwrap();
    let started = std::time::Instant::now();
    let port = loop {
        match fs::read_to_string(at.join("port")) {
            Ok(port) if !port.trim().is_empty() => break port,
            _ => assert!(started.elapsed().as_secs() < 20 && server.try_wait().unwrap().is_none(), "no server"),
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    };
    let hosts = format!(
        "Host gpu02 gpu03\n HostName 127.0.0.1\n Port {}\n IdentityFile {root}/key\n UserKnownHostsFile {root}/known\n",
        port.trim()
    );
    write(at, "ssh_config", &hosts);
    let done = |arguments: &[&str], part: &str| {
        ends(&run(at, &[arguments, &["-F", "ssh_config"]].concat()), 0, part);
    };
    done(&["keys", "scan-host", "--add", "gpu02"], "added");
    done(&["push", "--config", "sender.toml", "checkpoints"], "published");
    done(&["push", "--config", "sender.toml", "maps"], "1 published");
    done(&["pull", "reader@gpu02:/", "copy"], "the source is empty");
    rustix::process::kill_process(rustix::process::Pid::from_child(&server), rustix::process::Signal::TERM).unwrap();
    assert!(server.wait().unwrap().success());
    let arrived = at.join("data/checkpoints/data");
    assert_eq!(paths(&arrived.join("checkpoints")), ["checkpoint-1", "checkpoint-1/a.safetensors", "latest"]);
    assert_eq!(paths(&arrived.join("maps")), ["m"]);
    assert!(run(at, &["audit", "verify", "log"]).status.success());
}

#[test]
fn what_the_target_did_not_let_happen_is_not_counted_as_done() {
    use std::os::unix::fs::PermissionsExt as _;
    let at = tempfile::tempdir().unwrap();
    let at = at.path();
    write(at, "source/a", "a");
    ends(&run(at, &["push", "source", "target"]), 0, "1 published");
    // A mount point is what nobody can remove, replace or rename, root neither.
    write(at, "target/there/f", "f");
    fs::set_permissions(at.join("target/there"), fs::Permissions::from_mode(0o500)).unwrap();
    let closed = |arguments: &[&str]| {
        let script = "mount --bind target/there target/there && exec \"$@\"";
        let program = env!("CARGO_BIN_EXE_lockstep");
        let mut command = Command::new("unshare");
        command.args(["--user", "--map-root-user", "--mount", "sh", "-c", script, "sh", program]).args(arguments);
        command.current_dir(at).env("XDG_STATE_HOME", at.join("state"));
        command.output().expect("unshare is not installed: Debian package util-linux")
    };
    let output = closed(&["push", "--delete", "source", "target"]);
    ends(&output, 4, "failed: there: cannot remove the directory");
    assert!(said(&output).contains("1 removed, 1 failed"), "{}", said(&output));
    assert!(!at.join("target/there/f").exists() && at.join("target/there").exists());
}

#[test]
fn a_job_that_is_pushed_gives_way_as_it_says() {
    let area = tempfile::tempdir().unwrap();
    let at = area.path();
    write(at, "data/file", "data");
    let root = at.display();
    let job = format!("[[job]]\nname = \"j\"\nsource = \"{root}/data\"\ntargets = [\"{root}/target\"]\n");
    let config = at.join("config.toml").display().to_string();
    let push = |more: &str, calls: &str| {
        write(at, "config.toml", &format!("{job}{more}"));
        let command = [crate::kit::area::lockstep(), "push", "--config", &config, "j"];
        let mut push = crate::kit::area::traced(calls, None, &at.join("log"), &command);
        assert!(crate::kit::area::run_traced(push.env("HOME", at)).status.success());
        fs::read_to_string(at.join("log")).unwrap()
    };
    let calls = push("nice = 15\nio_class = \"best-effort:6\"\n", "setpriority,ioprio_set");
    assert!(calls.contains("setpriority(PRIO_PROCESS, 0, 15)"), "{calls}");
    assert!(calls.contains("IOPRIO_PRIO_VALUE(IOPRIO_CLASS_BE, 6)) = 0"), "{calls}");
    let threads = |count: usize| push(&format!("threads = {count}\n"), "clone3,clone").matches("CLONE_THREAD").count();
    // For listing the source, and for listing the target.
    let (few, many) = (threads(1), threads(11));
    assert!(many >= few + 20, "{few} {many}");
}

/// The directory under its hidden name, as another run has it that is about to end.
#[test]
fn h35_a_target_that_gets_its_name_while_another_run_waits_for_it_is_gone_on_with() {
    for named in [true, false] {
        let at = tempfile::tempdir().unwrap();
        let path = |name: &str| at.path().join(name);
        fs::create_dir(path("source")).unwrap();
        fs::write(path("source/file"), "content").unwrap();
        let state = path(".target.lockstep/.lockstep");
        fs::create_dir_all(&state).unwrap();
        for directory in [path(".target.lockstep"), state.clone()] {
            fs::set_permissions(directory, fs::Permissions::from_mode(0o700)).unwrap();
        }
        let lock = fs::File::create(state.join("lock")).unwrap();
        rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive).unwrap();
        let mut push = lockstep(at.path(), &["push", "-q", "--wait", "60", "source", "target"]).spawn().unwrap();
        until("the wait for the lock", || {
            let open = fs::read_dir(format!("/proc/{}/fd", push.id())).into_iter().flatten().flatten();
            open.filter_map(|entry| fs::read_link(entry.path()).ok()).any(|to| to.ends_with(".lockstep/lock"))
        });
        // The run that has the lock publishes; or it is another directory that gets the name.
        if named {
            fs::rename(path(".target.lockstep"), path("target")).unwrap();
        } else {
            fs::create_dir(path("target")).unwrap();
        }
        drop(lock);
        assert!(push.wait().unwrap().success(), "named: {named}");
        assert_eq!(fs::read_to_string(path("target/file")).unwrap(), "content");
    }
}
