//! Push and pull with nothing but OpenSSH at the other end: its `sftp` subsystem, with and without a shell beside it.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use crate::kit::{self, assert_same, text};

/// An sshd with stock SFTP only, and lockstep's ways to it.
struct Sshd {
    sshd: kit::sshd::Sshd,
}

const SHELL: &str = "Subsystem sftp internal-sftp";
const NO_SHELL: &str = "Subsystem sftp internal-sftp\nForceCommand internal-sftp";

impl Sshd {
    fn start(configuration: &str) -> Sshd {
        Sshd { sshd: kit::sshd::Sshd::only(configuration) }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.sshd.path(name)
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = self.sshd.command();
        let port = self.sshd.port.to_string();
        command.args(arguments).args(["-P", &port, "--identity", "user", "--known-hosts", "known"]);
        command
    }

    fn remote(&self, name: &str) -> String {
        self.sshd.remote(name)
    }

    /// Pushes `source` to `target`, with further arguments; by the subsystem at once where they name no way.
    fn push(&self, arguments: &[&str]) -> Output {
        let source = self.path("source").display().to_string();
        let named = arguments.iter().any(|argument| argument.starts_with("--remote"));
        let way = if named { [].as_slice() } else { &["--remote=sftp"] };
        let all: Vec<&str> = ["push", "-v"].iter().chain(way).chain(arguments).copied().collect();
        self.command(&all).arg(source).arg(self.remote("target")).output().unwrap()
    }

    fn pushed(&self, arguments: &[&str]) -> String {
        let output = self.push(arguments);
        assert!(output.status.success(), "{}", text(&output));
        text(&output)
    }

    fn pull(&self, arguments: &[&str]) -> Output {
        let all: Vec<&str> = ["pull", "-v"].iter().chain(arguments).copied().collect();
        self.command(&all).arg(self.remote("target")).arg(self.path("copy")).output().unwrap()
    }

    fn write(&self, path: &str, data: impl AsRef<[u8]>) {
        let path = self.path("source").join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, data).unwrap();
    }

    fn same(&self) {
        assert_same(&self.path("source"), &self.path("target"));
    }
}

/// What a push says of itself in the end.
fn summary(output: &Output) -> serde_json::Value {
    let text = text(output);
    assert!(output.status.success(), "{text}");
    let summary = text.lines().find(|line| line.contains("\"summary\"")).expect("there is a summary");
    serde_json::from_str(summary).unwrap()
}

#[test]
fn s25_what_the_server_has_is_copied_there_and_only_what_changed_goes_over() {
    for configuration in [SHELL, NO_SHELL] {
        let sshd = Sshd::start(configuration);
        let mut data = kit::noise(1, 24 << 20);
        let path = sshd.path("source/step-1/model.bin");
        sshd.write("step-1/model.bin", &data);
        fs::File::options().write(true).open(&path).unwrap().set_modified(old()).unwrap();
        // A file that was written this moment is not believed to be what was read.
        std::thread::sleep(Duration::from_millis(50));
        sshd.pushed(&[]);
        sshd.same();
        for change in ["renamed", "changed", "grown"] {
            match change {
                "renamed" => fs::rename(sshd.path("source/step-1"), sshd.path("source/step-2")).unwrap(),
                "changed" => data[9_000_000..9_100_000].fill(7),
                _ => data.extend(kit::noise(2, 1 << 20)),
            }
            if change != "renamed" {
                fs::write(sshd.path("source/step-2/model.bin"), &data).unwrap();
            }
            let summary = summary(&sshd.push(&["--json", "--delete"]));
            sshd.same();
            // Without a shell it is read back, which is its proof.
            let most = if configuration == SHELL { 2_u64 } else { 29 } << 20;
            let wire = summary["wire_bytes"].as_u64().unwrap();
            assert!(wire < most, "{configuration}, {change}: {wire} bytes went over the wire");
        }
    }
}

#[test]
fn a_host_with_nothing_but_busybox_takes_and_hashes_content_by_commands() {
    let tools = tempfile::tempdir().unwrap();
    let made = Command::new("busybox").args(["--install", "-s"]).arg(tools.path()).status();
    assert!(made.expect("busybox is not installed").success());
    let sshd = Sshd::start(&format!("{SHELL}\nSetEnv PATH={}", tools.path().display()));
    sample(&sshd.path("source"));
    for number in 0..3 {
        sshd.write(&format!("step-1/{number}"), kit::noise(number, 6 << 20));
    }
    let summary = summary(&sshd.push(&["--json"]));
    sshd.same();
    verified(&sshd.path("target"));
    // What is not hashed there would be read back.
    let (wire, sent) = (summary["wire_bytes"].as_u64().unwrap(), 23_u64 << 20);
    assert!(wire < sent + (4 << 20), "{wire}");
}

#[test]
fn h51_what_an_ignore_file_that_cannot_be_used_leaves_out_is_sent_nowhere() {
    let sshd = Sshd::start(SHELL);
    let from = sshd.path("target");
    for (path, data) in [("a/secret.key", "secret"), ("a/sub/data", "data"), ("b/data", "data")] {
        let path = from.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, data).unwrap();
    }
    let ignore = from.join("a/.lockstepignore");
    let make: [(&str, &dyn Fn()); 4] = [
        ("a bad glob", &|| fs::write(&ignore, "*.key\ncache{\n").unwrap()),
        ("no UTF-8", &|| fs::write(&ignore, b"# gr\xfc\xdfe\n*.key\n").unwrap()),
        ("a link", &|| symlink("../b/data", &ignore).unwrap()),
        ("a directory", &|| fs::create_dir(&ignore).unwrap()),
    ];
    for (what, make) in make {
        make();
        let (local, copy) = (sshd.path("local"), sshd.path("copy"));
        let pushed = sshd.sshd.command().args(["push", "-v"]).args([&from, &local]).output();
        for (output, to) in [(pushed.unwrap(), &local), (sshd.pull(&["--remote=sftp"]), &copy)] {
            let text = text(&output);
            assert_eq!(output.status.code(), Some(4), "{what}: {text}");
            assert!(
                text.contains("a: its .lockstepignore cannot be used, so that nothing in this directory"),
                "{what}: {text}"
            );
            assert!(!to.join("a/secret.key").exists() && !to.join("a/sub/data").exists(), "{what}: {text}");
            assert!(to.join("b/data").exists(), "{what}: {text}");
            fs::remove_dir_all(to).unwrap();
        }
        let _ = fs::remove_file(&ignore).or_else(|_| fs::remove_dir(&ignore));
    }
}

/// A time that is older than any manifest.
fn old() -> std::time::SystemTime {
    std::time::SystemTime::now() - Duration::from_secs(3600)
}

/// A tree with something of everything.
fn sample(at: &Path) {
    fs::create_dir_all(at.join("checkpoint-1/shards")).unwrap();
    fs::create_dir_all(at.join("empty/deeper")).unwrap();
    for number in 0..300 {
        fs::write(at.join(format!("checkpoint-1/shards/{number}.txt")), format!("{number}").repeat(number)).unwrap();
    }
    let large: Vec<u8> = (0..5_000_000u32).map(|at| (at * 7 / 3) as u8).collect();
    fs::write(at.join("checkpoint-1/model.safetensors"), large).unwrap();
    fs::write(at.join("checkpoint-1/_SUCCESS"), "").unwrap();
    fs::write(at.join("train.py"), "print('x')\n").unwrap();
    fs::set_permissions(at.join("train.py"), fs::Permissions::from_mode(0o755)).unwrap();
    fs::set_permissions(at.join("empty"), fs::Permissions::from_mode(0o550)).unwrap();
    // Names of one file are told from the manifest, and of a file as young as that only its content is believed.
    let hour_ago = std::time::SystemTime::now() - Duration::from_secs(3600);
    fs::File::options().write(true).open(at.join("train.py")).unwrap().set_modified(hour_ago).unwrap();
    fs::hard_link(at.join("train.py"), at.join("same.py")).unwrap();
    symlink("checkpoint-1", at.join("latest")).unwrap();
    let sparse = fs::File::create(at.join("sparse")).unwrap();
    sparse.write_all_at(b"data", 2_000_000).unwrap();
    sparse.set_len(4_000_000).unwrap();
}

fn verified(root: &Path) {
    let output = Command::new(env!("CARGO_BIN_EXE_lockstep")).args(["manifest", "verify"]).arg(root).output().unwrap();
    assert!(output.status.success(), "{}", text(&output));
}

#[test]
fn s14_s15_a_tree_of_everything_arrives_by_a_stock_server_and_comes_back() {
    for (configuration, said) in [(SHELL, "hashed there"), (NO_SHELL, "read back")] {
        let sshd = Sshd::start(configuration);
        sample(&sshd.path("source"));
        let first = sshd.pushed(&["--remote=auto"]);
        assert!(first.contains("connected to the subsystem 'sftp'") && first.contains(said), "{first}");
        sshd.same();
        verified(&sshd.path("target"));
        assert!(!sshd.path(".target.lockstep").exists() && !sshd.path("target/.lockstep/staging/sftp").exists());

        let again = sshd.pushed(&[]);
        assert!(again.contains("nothing to do"), "{again}");

        let pulled = sshd.pull(&[]);
        assert!(pulled.status.success(), "{}", text(&pulled));
        assert_same(&sshd.path("target"), &sshd.path("copy"));
        verified(&sshd.path("copy"));
        let again = sshd.pull(&[]);
        assert!(text(&again).contains("nothing to do"), "{}", text(&again));
    }
}

#[test]
fn the_manifest_is_for_those_who_may_read_what_it_lists() {
    for configuration in [SHELL, NO_SHELL] {
        let sshd = Sshd::start(configuration);
        sshd.write("d/open", "1");
        sshd.write("secret", "2");
        let mode = |name: &str| fs::metadata(sshd.path("target/.lockstep").join(name)).unwrap().mode() & 0o7777;
        // The last time nothing changes but the permissions.
        for (secret, directory, manifest, state) in
            [(0o600, 0o755, 0o600, 0o700), (0o644, 0o755, 0o644, 0o711), (0o640, 0o750, 0o640, 0o711)]
        {
            for (path, mode) in [("d", directory), ("d/open", 0o644), ("secret", secret)] {
                fs::set_permissions(sshd.path("source").join(path), fs::Permissions::from_mode(mode)).unwrap();
            }
            sshd.pushed(&[]);
            assert_eq!((mode("manifest"), mode("")), (manifest, state), "{secret:o}");
        }
    }
}

#[test]
fn what_changes_goes_over_and_what_is_gone_goes_with_delete() {
    let sshd = Sshd::start(SHELL);
    sample(&sshd.path("source"));
    for name in ["was-file", "was-link", "stays"] {
        sshd.write(name, "before");
    }
    sshd.write("was-directory/inside", "before");
    sshd.write("gone/deep/file", "before");
    sshd.pushed(&[]);
    let at = |name: &str| sshd.path("source").join(name);
    for name in ["was-file", "was-link"] {
        fs::remove_file(at(name)).unwrap();
    }
    fs::remove_dir_all(at("was-directory")).unwrap();
    fs::remove_dir_all(at("gone")).unwrap();
    sshd.write("was-file/now/below", "after");
    symlink("stays", at("was-link")).unwrap();
    sshd.write("was-directory", "after");
    sshd.write("checkpoint-1/shards/7.txt", "changed");
    sshd.write("checkpoint-2/new", "new");
    fs::set_permissions(at("train.py"), fs::Permissions::from_mode(0o700)).unwrap();
    fs::set_permissions(at("checkpoint-1"), fs::Permissions::from_mode(0o750)).unwrap();
    fs::remove_file(at("latest")).unwrap();
    symlink("checkpoint-2", at("latest")).unwrap();
    fs::remove_file(at("same.py")).unwrap();

    // Nothing changes in a dry run, and nothing is removed without being asked for.
    let planned = sshd.pushed(&["-n", "-i", "--delete"]);
    assert!(planned.contains("deleting") && planned.contains("checkpoint-2/new"), "{planned}");
    assert_eq!(fs::read_link(sshd.path("target/latest")).unwrap(), Path::new("checkpoint-1"));
    sshd.pushed(&[]);
    assert!(sshd.path("target/gone/deep/file").exists());
    sshd.pushed(&["--delete"]);
    sshd.same();
    verified(&sshd.path("target"));
    let again = sshd.pushed(&["--delete"]);
    assert!(again.contains("nothing to do"), "{again}");
    let record =
        Command::new(env!("CARGO_BIN_EXE_lockstep")).args(["audit", "verify"]).arg(sshd.path("target")).output();
    assert!(record.unwrap().status.success());
    let log = fs::read_to_string(sshd.path("target/.lockstep/audit.jsonl")).unwrap();
    assert!(log.contains(r#""action":"remove","path":"gone/deep/file""#));
    assert!(log.contains(r#""action":"metadata","path":"checkpoint-1""#));
}

#[test]
fn h06_h09_h10_names_of_any_bytes_are_literal_with_a_shell_and_without() {
    let names: [&[u8]; 12] = [
        b"caf\xe9",
        b"new\nline",
        b"\x1b[31mred",
        b"back\\slash",
        b"$(touch touched)",
        b"`touch touched`",
        b"-rf",
        b"; touch touched #",
        b"quote ' and \" and space ",
        b"lockstep:0\n",
        b"*",
        b"\xff\xfe",
    ];
    for configuration in [SHELL, NO_SHELL] {
        let sshd = Sshd::start(configuration);
        for name in names {
            let directory = sshd.path("source").join(OsStr::from_bytes(name));
            fs::create_dir_all(&directory).unwrap();
            fs::write(directory.join(OsStr::from_bytes(name)), name).unwrap();
            symlink(OsStr::from_bytes(name), directory.join("link")).unwrap();
        }
        let said = sshd.pushed(&[]);
        assert!(!said.contains('\x1b'), "{said}");
        sshd.same();
        assert!(sshd.pull(&[]).status.success());
        assert_same(&sshd.path("source"), &sshd.path("copy"));
        assert!(sshd.pushed(&["--checksum"]).contains("nothing"));
        for at in [sshd.path("touched"), PathBuf::from(std::env::var_os("HOME").unwrap()).join("touched")] {
            assert!(!at.exists());
        }
    }
}

#[test]
fn modes_and_owners_are_those_of_the_policy_and_a_second_run_has_nothing_to_do() {
    let root = fs::metadata("/proc/self").unwrap().uid() == 0;
    for configuration in [SHELL, NO_SHELL] {
        let sshd = Sshd::start(configuration);
        sshd.write("model.safetensors", "weights");
        sshd.write("bin/tool", "#!/bin/sh\n");
        sshd.write("shared/inner/file", "x");
        fs::set_permissions(sshd.path("source/bin/tool"), fs::Permissions::from_mode(0o4755)).unwrap();
        let owner = if root { "owner = \"daemon\"\ngroup = \"12345\"\n" } else { "" };
        let policy = format!(
            "[[rule]]\nmatch = \"*.safetensors\"\nmode = \"600\"\n{owner}\
             [[rule]]\nmatch = \"bin/*\"\nmode = \"6755\"\n{owner}\
             [[rule]]\nmatch = \"shared/\"\nmode = \"2770\"\n{owner}"
        );
        fs::write(sshd.path("policy.toml"), policy).unwrap();
        let file = sshd.path("policy.toml").display().to_string();
        sshd.pushed(&["--policy-file", &file]);
        let found = |name: &str| {
            let found = fs::metadata(sshd.path("target").join(name)).unwrap();
            (format!("{:04o}", found.mode() & 0o7777), found.uid(), found.gid())
        };
        let owners = if root {
            (1, 12345)
        } else {
            let own = fs::metadata("/proc/self").unwrap();
            (own.uid(), own.gid())
        };
        for (name, mode) in [("model.safetensors", "0600"), ("bin/tool", "6755"), ("shared", "2770")] {
            assert_eq!(found(name), (mode.to_owned(), owners.0, owners.1), "{name}");
        }
        let again = sshd.pushed(&["--policy-file", &file]);
        assert!(again.contains("nothing to do"), "{again}");
        verified(&sshd.path("target"));
        // h45: special bits come from a rule only.
        sshd.pushed(&[]);
        assert_eq!(found("bin/tool").0, "0755");

        // h48, and ACLs, which SFTP cannot set.
        for (rule, reason) in
            [("owner = \"nobody-has-this-name\"", "there is no user"), ("acl = [\"user:daemon:r\"]", "ACL")]
        {
            fs::write(&file, format!("[[rule]]\nmatch = \"**\"\n{rule}\n")).unwrap();
            let refused = sshd.push(&["--policy-file", &file]);
            assert!(!refused.status.success() && text(&refused).contains(reason), "{}", text(&refused));
        }
        assert_eq!(found("bin/tool").0, "0755");
    }
}

#[test]
fn h47_a_default_acl_of_the_target_does_not_reach_what_arrives() {
    let sshd = Sshd::start(SHELL);
    sshd.write("d/file", "x");
    fs::create_dir(sshd.path("target")).unwrap();
    let set = Command::new("setfacl").args(["-d", "-m", "user:daemon:rwx"]).arg(sshd.path("target")).status();
    assert!(set.expect("setfacl is not installed: Debian package acl").success());
    sshd.pushed(&["--chmod", "D770,F660"]);
    for name in ["target/d", "target/d/file"] {
        let output = Command::new("getfacl").arg("-c").arg(sshd.path(name)).output().unwrap();
        assert!(!text(&output).contains("daemon"), "{name}: {}", text(&output));
    }
    // Nor where nothing is staged but the manifest.
    sshd.pushed(&["--chmod", "D750,F640"]);
    let output = Command::new("getfacl").arg("-c").arg(sshd.path("target/.lockstep/manifest")).output().unwrap();
    assert!(output.status.success() && !text(&output).contains("daemon"), "{}", text(&output));
}

#[test]
fn h13_links_of_the_source_are_kept_when_they_stay_in_the_tree() {
    let sshd = Sshd::start(SHELL);
    sshd.write("d/file", "x");
    for (name, target) in [("inside", "d/file"), ("d/up", "../inside"), ("outside", "../../etc"), ("absolute", "/etc")]
    {
        symlink(target, sshd.path("source").join(name)).unwrap();
    }
    let said = sshd.pushed(&[]);
    assert!(said.contains("out of the tree"), "{said}");
    let listed = |at: &str| -> Vec<_> {
        let names = fs::read_dir(sshd.path(at)).unwrap().map(|found| found.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<_> = names.filter(|name| name != ".lockstep").collect();
        names.sort();
        names
    };
    assert_eq!(listed("target"), ["d", "inside"]);
    sshd.pushed(&["--links=all"]);
    sshd.same();
    // And the same for a stock source.
    assert!(sshd.pull(&[]).status.success());
    assert_eq!(listed("copy"), ["d", "inside"]);
    assert!(sshd.pull(&["--links=all"]).status.success());
    assert_same(&sshd.path("source"), &sshd.path("copy"));
    assert!(!sshd.pull(&["--links=refuse"]).status.success());
}

#[test]
fn h34_a_sender_that_is_killed_leaves_what_the_next_goes_on_from() {
    let sshd = Sshd::start(SHELL);
    let large: Vec<u8> = (0..30_000_000u32).map(|at| (at / 5) as u8).collect();
    sshd.write("large", &large);
    let source = sshd.path("source").display().to_string();
    let mut child = sshd.command(&["push", "-q", &source, &sshd.remote("target")]).spawn().unwrap();
    let staged = sshd.path(".target.lockstep/.lockstep/staging/sftp/tree/large");
    let started = Instant::now();
    while fs::metadata(&staged).map_or(0, |found| found.len()) < 3_000_000 && child.try_wait().unwrap().is_none() {
        assert!(started.elapsed() < Duration::from_secs(60));
        std::thread::sleep(Duration::from_millis(1));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(!sshd.path("target").exists() || sshd.path("target/large").exists());
    // The lock of a process that is no more is nobody's.
    sshd.pushed(&[]);
    sshd.same();
    verified(&sshd.path("target"));
}

#[test]
fn h32_what_was_staged_of_a_file_that_kept_its_size_is_not_sent_again() {
    const LENGTH: u64 = 30_000_000;
    let sshd = Sshd::start(SHELL);
    let version = |number: u64| (0..LENGTH).map(|at| (at / 5 + number) as u8).collect::<Vec<u8>>();
    sshd.write("large", version(0));
    sshd.pushed(&[]);
    sshd.write("large", version(1));
    let source = sshd.path("source").display().to_string();
    let mut child = sshd.command(&["push", "-q", &source, &sshd.remote("target")]).spawn().unwrap();
    let file = sshd.path("target/.lockstep/staging/sftp/tree/large");
    let staged = || fs::metadata(&file).map_or(0, |found| found.len());
    let started = Instant::now();
    while staged() < 3_000_000 && child.try_wait().unwrap().is_none() {
        assert!(started.elapsed() < Duration::from_secs(60));
        std::thread::sleep(Duration::from_millis(1));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(staged() >= 3_000_000, "it ended before it was killed");
    let output = sshd.push(&["--json"]);
    assert!(output.status.success(), "{}", text(&output));
    let said = String::from_utf8_lossy(&output.stdout);
    let summary: serde_json::Value = serde_json::from_str(said.lines().last().unwrap()).unwrap();
    let sent = summary["transferred_bytes"].as_u64().unwrap();
    // Some of the beginning may have been on its way when the file was looked at: no more than this is sent.
    assert!(sent <= LENGTH - 3_000_000 + (64 << 10), "{summary}");
    sshd.same();
    verified(&sshd.path("target"));
}

#[test]
fn the_way_in_can_be_chosen_and_what_answers_otherwise_is_said() {
    let sshd = Sshd::start(SHELL);
    sshd.write("f", "x");
    let by = |arguments: &[&str], said: &str, code: i32| {
        let output = sshd.push(arguments);
        assert_eq!(output.status.code(), Some(code), "{}", text(&output));
        assert!(text(&output).contains(said), "{arguments:?}: {}", text(&output));
    };
    by(&["--remote=lockstep"], "not found", 2);
    by(&["--remote=subsystem"], "not offered", 2);
    let command = format!("{} sftp-server", env!("CARGO_BIN_EXE_lockstep"));
    by(&["--remote=exec", "--remote-command", &command], "connected to the command", 0);
    by(&["--remote=exec", "--remote-command", &format!("echo hello; {command}")], "login script", 2);
    // In step already, whoever published it.
    by(&["--remote=sftp"], "nothing to do", 0);
    sshd.write("f", "other");
    by(&["--remote=sftp", "--verify=read-back"], "read back", 0);
    sshd.write("f", "another");
    by(&["--remote=auto", "--remote-command", &command, "--verify=exec"], "--verify is for stock", 0);
    sshd.same();

    let forced = Sshd::start(NO_SHELL);
    forced.write("f", "x");
    let refused = forced.push(&["--verify=exec"]);
    assert_eq!(refused.status.code(), Some(2), "{}", text(&refused));
    assert!(text(&refused).contains("--verify=read-back"), "{}", text(&refused));
    assert!(!forced.path("target").exists());
    let noisy =
        Sshd::start("Subsystem sftp /usr/lib/openssh/sftp-server\nForceCommand echo hello; $SSH_ORIGINAL_COMMAND");
    noisy.write("f", "x");
    let refused = noisy.push(&["--remote=auto"]);
    assert!(!refused.status.success() && text(&refused).contains("login script"), "{}", text(&refused));
    // In its own words, and once, though three ways in were tried.
    assert_eq!(text(&refused).matches("it said 'hello'").count(), 1, "{}", text(&refused));
}

#[test]
fn a_tilde_is_where_the_account_starts_and_no_name() {
    let at = tempfile::tempdir().unwrap();
    let home = at.path().join("home");
    fs::create_dir(&home).unwrap();
    let sshd =
        Sshd::start(&format!("Subsystem sftp internal-sftp -d {0}\nForceCommand internal-sftp -d {0}", home.display()));
    sshd.write("f", "x");
    for (there, found) in [("~/a/b", "a/b/f"), ("c", "c/f"), ("./~d", "~d/f"), ("~", "f")] {
        let output = sshd
            .command(&["push", &sshd.path("source").display().to_string(), &format!("127.0.0.1:{there}")])
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(0), "{there}: {}", text(&output));
        assert!(home.join(found).exists(), "{there}: {}", text(&output));
    }
    let pattern = sshd.command(&["pull", "127.0.0.1:c/*", "here"]).output().unwrap();
    assert_eq!(pattern.status.code(), Some(5), "{}", text(&pattern));
    assert!(text(&pattern).contains("there is no 'c/*'; patterns are not"), "{}", text(&pattern));
    for (there, said) in [("", "names no path"), ("~other/x", "write the whole path")] {
        let output = sshd.command(&["push", "x", &format!("127.0.0.1:{there}")]).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{there}: {}", text(&output));
        assert!(text(&output).contains(said), "{there}: {}", text(&output));
    }
}

#[test]
fn h34_a_connection_cut_at_the_greeting_is_tried_again_and_not_by_another_way() {
    // Whoever has lockstep's subsystem must not get a run of the other kind because the network failed.
    let sshd = Sshd::start("Subsystem lockstep kill -9 $PPID\nSubsystem sftp internal-sftp");
    sshd.write("f", "x");
    let cut = sshd.push(&["--remote=auto"]);
    assert_eq!(cut.status.code(), Some(75), "{}", text(&cut));
    assert_eq!(text(&cut).matches("the connection was lost").count(), 1, "{}", text(&cut));
    assert!(!sshd.path("target").exists());
}

#[test]
fn a_host_that_allows_one_stream_at_a_time_is_pushed_to() {
    let sshd = Sshd::start("Subsystem sftp internal-sftp\nMaxSessions 1");
    for round in 0..3 {
        sshd.write("file", format!("{round}"));
        let said = sshd.pushed(&["--remote=auto"]);
        assert!(said.contains("connected to the subsystem 'sftp'") && said.contains("read back"), "{said}");
        sshd.same();
    }
}
