//! The command as people and scripts see it.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::fs;
use std::path::Path;

use assert_cmd::Command;
use predicates::str::contains;

fn lockstep(arguments: &[&str], directory: &Path) -> assert_cmd::assert::Assert {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lockstep"));
    command.env_clear().env("PATH", "/usr/bin:/bin").env("XDG_STATE_HOME", directory.join(".state"));
    command.current_dir(directory).args(arguments).assert()
}

/// A tree `data` with a file in a directory, odd names, a hard link and symbolic links.
fn tree() -> tempfile::TempDir {
    let at = tempfile::tempdir().unwrap();
    let data = at.path().join("data");
    fs::create_dir_all(data.join("sub/empty")).unwrap();
    fs::write(data.join("sub/large.bin"), vec![7; 700_000]).unwrap();
    fs::write(data.join("a b"), "text").unwrap();
    fs::write(data.join("new\nline\\"), "odd").unwrap();
    fs::hard_link(data.join("a b"), data.join("second")).unwrap();
    std::os::unix::fs::symlink("a b", data.join("link")).unwrap();
    at
}

fn flip(file: &Path) {
    let mut bytes = fs::read(file).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(file, bytes).unwrap();
}

#[test]
fn a_manifest_verifies_and_each_kind_of_damage_is_a_line() {
    let at = tree();
    lockstep(&["manifest", "create", "data", "-o", "list"], at.path()).code(0);
    let verify = || lockstep(&["manifest", "verify", "data", "--manifest", "list"], at.path());
    verify().code(0).stdout(contains("all as listed"));
    lockstep(&["manifest", "show", "list"], at.path()).code(0).stdout(contains("sub/large.bin"));

    flip(&at.path().join("data/sub/large.bin"));
    verify().code(1).stdout(contains("sub/large.bin: differs: SHA-256")).stderr(contains("lockstep: 'data'"));
    flip(&at.path().join("data/sub/large.bin"));
    verify().code(0);

    fs::write(at.path().join("data/more"), "").unwrap();
    Command::new("mkfifo").arg(at.path().join("data/pipe")).assert().code(0);
    fs::remove_file(at.path().join("data/link")).unwrap();
    fs::write(at.path().join("data/a b"), "longer text").unwrap();
    let stdout = "a b: differs: 11 bytes, listed with 4\nlink: missing\nmore: not listed\npipe: not listed\n\
        second: differs: 11 bytes, listed with 4\n";
    verify().code(1).stdout(stdout);
}

#[test]
fn s20_sha256sum_reads_ours_and_we_read_that_of_sha256sum() {
    let at = tree();
    let data = at.path().join("data");
    lockstep(&["manifest", "create", "data", "--format", "sha256sum", "-o", "ours"], at.path()).code(0);
    let check = Command::new("sha256sum").args(["--strict", "-c", "../ours"]).current_dir(&data).assert();
    check.code(0).stdout(contains("sub/large.bin: OK"));
    lockstep(&["manifest", "verify", "data", "--sums", "ours"], at.path()).code(0);

    // Written into the directory itself, with a link that it follows and `./` before each name.
    let script = "find . -type f ! -name sums.txt -exec sha256sum {} + > sums.txt; sha256sum link >> sums.txt";
    Command::new("sh").args(["-c", script]).current_dir(&data).assert().code(0);
    let verify = || lockstep(&["manifest", "verify", "data", "--sums", "data/sums.txt"], at.path());
    verify().code(0);
    flip(&data.join("a b"));
    verify().code(1).stdout(contains("a b: differs")).stdout(contains("link: differs"));
}

#[test]
fn h12_a_bad_list_is_refused_with_its_line() {
    let at = tree();
    let good = format!("{}  a b\n", "0".repeat(64));
    let bad = [
        "junk\n".to_owned(),
        format!("{}  ../x\n", "0".repeat(64)),
        format!("{}  /etc/passwd\n", "0".repeat(64)),
        format!("{}  x\r\n", "0".repeat(64)),
        format!("{}  x\0y\n", "0".repeat(64)),
    ];
    for line in bad {
        fs::write(at.path().join("list"), good.clone() + &line).unwrap();
        lockstep(&["manifest", "verify", "data", "--sums", "list"], at.path())
            .code(1)
            .stderr(contains("lockstep: 'list', line 2: "));
    }
    lockstep(&["manifest", "create", "data", "-o", "list"], at.path()).code(0);
    flip(&at.path().join("list"));
    lockstep(&["manifest", "verify", "data", "--manifest", "list"], at.path()).code(1).stderr(contains(" line "));
}

#[test]
fn wrong_usage_exits_with_2_and_help_with_0() {
    let at = tempfile::tempdir().unwrap();
    let cases: [&[&str]; 7] = [
        &[],
        &["nothing"],
        &["manifest"],
        &["manifest", "verify"],
        &["manifest", "verify", ".", "--sums", "a", "--manifest", "b"],
        &["manifest", "verify", "."],
        &["policy", "explain", "x", "--policy-file", "missing.toml"],
    ];
    for case in cases {
        lockstep(case, at.path()).code(2).stdout("");
    }
    lockstep(&["nothing"], at.path()).stderr(contains("lockstep: unrecognized subcommand"));
    lockstep(&["--help"], at.path()).code(0).stdout(contains("Exit codes:"));
    for (command, part) in
        [("push", "One file SRC: DEST is"), ("pull", "DEST is on this machine"), ("serve", "with --user one user")]
    {
        lockstep(&[command, "--help"], at.path()).code(0).stdout(contains(part));
    }
    lockstep(&["completions", "bash"], at.path()).code(0).stdout(contains("complete -F"));
    lockstep(&["man"], at.path()).code(0).stdout(contains(".TH lockstep"));
    lockstep(&["man", "--to", "."], at.path()).code(0);
    assert!(at.path().join("lockstep-manifest-verify.1").exists());
}

#[test]
fn a_policy_is_explained_with_the_rule_that_decides() {
    let at = tempfile::tempdir().unwrap();
    let rules = "[[rule]]\nmatch = \"**\"\nmode = \"640\"\n\n[[rule]]\nmatch = \"*.sh\"\nmode = \"u=rwx,go=\"\nowner = \"ops\"\n";
    fs::write(at.path().join("rules.toml"), rules).unwrap();
    let explain = |path: &str| lockstep(&["policy", "explain", path, "--policy-file", "rules.toml"], at.path());
    explain("bin/run.sh").code(0).stdout(contains("mode   0700")).stdout(contains("rule 2 of 2"));
    explain("bin/data").code(0).stdout(contains("mode   0640")).stdout(contains("rule 1 of 2"));
    explain("../x").code(2);
    fs::write(at.path().join("rules.toml"), rules.replace("owner", "ower")).unwrap();
    explain("x").code(2).stderr(contains("'rules.toml', line 8: unknown field"));
}

#[test]
fn what_was_published_is_verified_by_the_manifest_that_lies_with_it() {
    let at = tree();
    fs::create_dir(at.path().join("data/.lockstep")).unwrap();
    lockstep(&["manifest", "create", "data", "-o", "data/.lockstep/manifest"], at.path()).code(0);
    lockstep(&["manifest", "verify", "data"], at.path()).code(0);
    lockstep(&["manifest", "show", "data"], at.path()).code(0).stdout(contains("link -> a b"));
    // An ignore file hides nothing that is listed.
    flip(&at.path().join("data/sub/large.bin"));
    fs::write(at.path().join("data/.lockstepignore"), "*.bin\n").unwrap();
    let verify = lockstep(&["manifest", "verify", "data"], at.path()).code(1);
    verify.stdout(contains(".lockstepignore: not listed")).stdout(contains("sub/large.bin: differs"));
}

#[test]
fn h60_a_log_that_was_tampered_with_is_bad_data() {
    let at = tempfile::tempdir().unwrap();
    let root = lockstep::root::Root::open(at.path()).unwrap();
    let record = lockstep::audit::AuditRecord { action: "publish".into(), ..Default::default() };
    lockstep::audit::AuditLog::open(&root).unwrap().append(&[record.clone(), record]).unwrap();
    lockstep(&["audit", "verify", "."], at.path()).code(0).stdout(contains("2 lines, unbroken"));
    let log = at.path().join(lockstep::audit::LOG);
    fs::write(&log, fs::read_to_string(&log).unwrap().replace("publish", "nothing")).unwrap();
    lockstep(&["audit", "verify", "."], at.path()).code(1).stderr(contains("line 1"));
}

#[test]
fn a_log_that_is_not_there_is_not_good() {
    let at = tempfile::tempdir().unwrap();
    lockstep(&["audit", "verify", "."], at.path()).code(1).stderr(contains("no audit log"));
}

#[test]
fn two_manifests_are_compared_path_by_path() {
    let at = tree();
    let create = |name: &str| lockstep(&["manifest", "create", "data", "-o", name], at.path()).code(0);
    create("before");
    lockstep(&["manifest", "diff", "before", "before"], at.path()).code(0).stdout(contains("all of them the same"));
    flip(&at.path().join("data/sub/large.bin"));
    fs::write(at.path().join("data/new"), "").unwrap();
    fs::remove_dir(at.path().join("data/sub/empty")).unwrap();
    fs::remove_file(at.path().join("data/link")).unwrap();
    std::os::unix::fs::symlink("new", at.path().join("data/link")).unwrap();
    std::fs::set_permissions(at.path().join("data/new\nline\\"), std::os::unix::fs::PermissionsExt::from_mode(0o600))
        .unwrap();
    create("after");
    let diff = |more: &[&str]| lockstep(&[&["manifest", "diff", "before", "after"], more].concat(), at.path());
    let stdout = "link: points to 'a b' -> 'new'\nnew: only in 'after'\nnew\\nline\\\\: mode 0644 -> 0600\n\
        sub/empty: only in 'before'\nsub/large.bin: content, time\n";
    diff(&[]).code(1).stdout(stdout).stderr("lockstep: 'before' and 'after' differ in 5 paths\n");
    diff(&["--content"]).code(1).stderr(contains("differ in 4 paths"));
    flip(&at.path().join("after"));
    diff(&[]).code(1).stdout("").stderr(contains("'after'"));
    lockstep(&["manifest", "diff", "before", "missing"], at.path()).code(5);
    lockstep(&["manifest", "diff", "before", "data"], at.path()).code(2).stderr(contains("no manifest"));
}

#[test]
fn s13_the_record_says_who_did_what_when_and_from_where() {
    let at = tree();
    let push = || lockstep(&["push", "data", "target"], at.path()).code(0);
    push();
    flip(&at.path().join("data/sub/large.bin"));
    push();
    let show = |more: &[&str]| lockstep(&[&["audit", "show", "target"], more].concat(), at.path());
    let line = r"(?m)^\d{4}-\d\d-\d\dT[0-9:]{8}\.\d{3}Z publish sub/large.bin 700000 bytes sha256:[0-9a-f]{64} mode 0644 \S+:\S+ by \S+@\S+ from data$";
    show(&[]).code(0).stdout(predicates::str::is_match(line).unwrap().count(2));
    show(&["--path", "sub/"]).code(0).stdout(predicates::str::is_match("(?m)^").unwrap().count(5));
    show(&["--path", r"new\nline\\"]).code(0).stdout(contains(r" publish new\nline\\ 3 bytes"));
    show(&["--path", "su"]).code(0).stdout("");
    show(&["-n", "1", "--json"]).code(0).stdout(predicates::str::is_match(r#"\A\{"sequence":.*\}\n\z"#).unwrap());
    let log = at.path().join("target").join(lockstep::audit::LOG);
    fs::write(&log, fs::read_to_string(&log).unwrap().replacen("sub/large", "sub/other", 1)).unwrap();
    show(&[]).code(1).stdout(contains("sub/other")).stderr(contains("edited"));
    lockstep(&["audit", "show", "data"], at.path()).code(1).stderr(contains("no audit log"));
}

/// What a command says when it fails: in one line, with its exit code.
#[track_caller]
fn fails(arguments: &[&str], at: &Path, code: i32, line: &str) {
    lockstep(arguments, at).code(code).stdout("").stderr(format!("lockstep: {line}\n"));
}

#[test]
fn an_error_says_what_failed_where_and_why_in_one_line() {
    let at = tree();
    let push = |arguments: &[&str], code, line: &str| {
        fails(&[&["push"], arguments].concat(), at.path(), code, line);
    };
    push(&["gone", "there"], 5, "cannot open 'gone': No such file or directory");
    fs::write(at.path().join("file"), "").unwrap();
    let file = "'file/x' cannot be a target: a file lies there, or on the way to it";
    push(&["data", "file/x"], 2, file);
    push(&["data", "h:"], 2, "'h:' names no path; the home directory of the account there is HOST:.");
    push(
        &["-P", "22", "data", "there"],
        2,
        "-P is for another machine, and none is named: write it as [USER@]HOST:PATH",
    );
    for option in [["--remote", "sftp"], ["--remote-command", "x"], ["--verify", "exec"]] {
        let said = format!("{} is for another machine, and none is named: write it as [USER@]HOST:PATH", option[0]);
        push(&[option[0], option[1], "data", "there"], 2, &said);
    }
    let job = "'data' alone would be the name of a job; to send a file or directory, say where to: \
        lockstep push data [USER@]HOST:DEST";
    Command::new(env!("CARGO_BIN_EXE_lockstep"))
        .env_clear()
        .current_dir(at.path())
        .args(["push", "data"])
        .assert()
        .code(2)
        .stderr(format!("lockstep: {job}\n"));
    // A name that would steer a terminal.
    fs::create_dir(at.path().join("\x1b[2J")).unwrap();
    fs::write(at.path().join("\x1b[2J/x"), "").unwrap();
    push(&["data", "\x1b[2J/x/y"], 2, "'\\x1b[2J/x/y' cannot be a target: a file lies there, or on the way to it");
    fails(
        &["pull", "h:/x"],
        at.path(),
        2,
        "pull needs SRC and DEST: lockstep pull [USER@]HOST:SRC DIRECTORY ('.' is the one you are in)",
    );
}

#[test]
fn a_mistake_in_a_file_of_rules_is_told_with_its_line_by_everybody_that_reads_it() {
    let at = tree();
    let write = |text: &str| fs::write(at.path().join("rules.toml"), text).unwrap();
    let keys = ["--user", "u", "--root", ".", "--authorized-keys", "keys", "--host-key", "key"];
    let serve = [&["serve", "--policy-file", "rules.toml"], &keys[..]].concat();
    let everybody: [&[&str]; 3] = [
        &["push", "--policy-file", "rules.toml", "data", "there"],
        &["sftp-server", "--policy-file", "rules.toml"],
        &serve,
    ];
    for reader in everybody {
        write("[[rule]]\nmatch = \"*\"\n\n[[rule]]\nmatch = \"*\"\nmode = \"9\"\n");
        lockstep(reader, at.path()).code(2).stderr(contains("'rules.toml', line 4: rule 2 ('*'): '9' is not a mode"));
        write("[[rule]]\nmatch = \"*\"\nmoed = \"600\"\n");
        lockstep(reader, at.path()).code(2).stderr(contains("'rules.toml', line 3: unknown field `moed`"));
    }
    // Who may write a receiver's rules decides who may read what arrives.
    write("");
    use std::os::unix::fs::PermissionsExt as _;
    fs::set_permissions(at.path().join("rules.toml"), fs::Permissions::from_mode(0o666)).unwrap();
    for receiver in &everybody[1..] {
        lockstep(receiver, at.path()).code(2).stderr(contains("can be written by others"));
    }
}

#[test]
fn what_people_know_from_rsync_and_scp_is_accepted_or_answered() {
    let at = tree();
    lockstep(&["push", "-aavviirptz", "--archive", "data", "there"], at.path()).code(0);
    lockstep(&["push", "-z", "--no-compress", "data", "there"], at.path()).code(2);
    for (option, hint) in [
        ("-e", "--identity FILE"),
        ("--rsh=ssh", "--identity FILE"),
        ("-C", "needs no option"),
        ("--partial", "leave it out"),
        ("-H", "leave it out"),
        ("-u", "-n -i"),
        ("-aP", "'data' is no port"),
        ("--delete-after", "--delete"),
    ] {
        let answer = lockstep(&["push", option, "data", "h:/there"], at.path()).code(2);
        answer.stderr(contains(hint)).stderr(predicates::str::is_match("^lockstep: [^\n]*\n$").unwrap());
    }
    lockstep(&["push", "--nothing-known", "data", "h:/there"], at.path()).code(2).stderr(contains("--nothing-known"));
}

#[test]
fn the_summary_counts_in_words() {
    let at = tempfile::tempdir().unwrap();
    fs::create_dir(at.path().join("data")).unwrap();
    let push = |more: &[&str]| lockstep(&[&["push", "data", "there"], more].concat(), at.path()).code(0);
    push(&[]).stdout(contains("nothing to do: the source is empty, or all of it is left out"));
    fs::write(at.path().join("data/a"), "").unwrap();
    push(&["-n"]).stdout("dry run, nothing was changed: 1 to add, 0 to replace, 0 to change in metadata only\n");
    push(&[]).stdout(contains("1 published"));
    push(&[]).stdout(contains("in step: nothing to do (1 entry)\n"));
    fs::write(at.path().join("data/b"), "").unwrap();
    push(&[]);
    push(&[]).stdout(contains("in step: nothing to do (2 entries)\n"));
    lockstep(&["manifest", "verify", "there"], at.path()).code(0).stdout("there: 2 paths verified, all as listed\n");
    fs::remove_file(at.path().join("data/a")).unwrap();
    push(&["-n"]).stdout(contains("; 1 at the target alone, which --delete would remove\n"));
    push(&["-n", "--delete"]).stdout(contains("metadata only; 1 to remove\n"));
}

#[test]
fn the_readme_tells_of_every_option_of_push_and_of_no_other() {
    let at = tempfile::tempdir().unwrap();
    let help = lockstep(&["push", "--help"], at.path()).code(0).get_output().stdout.clone();
    let help = String::from_utf8(help).unwrap();
    let readme = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md")).unwrap();
    let table: Vec<&str> = readme.lines().skip_while(|line| !line.starts_with("| option of push")).collect();
    let table: String = table.iter().take_while(|line| line.starts_with('|')).copied().collect::<Vec<_>>().join("\n");
    // What a help line begins with: "  -n, --dry-run", "      --json".
    let option = |line: &&str| line.trim_start().starts_with('-') && line.len() - line.trim_start().len() <= 6;
    for line in help.lines().filter(option) {
        let names: Vec<&str> = line.split([' ', ',', '[']).filter(|word| word.starts_with('-')).take(2).collect();
        let told = names.iter().any(|name| table.contains(&format!("`{name}")));
        assert!(told || names.contains(&"--help"), "{line}");
    }
    let words = table.split(['`', ' ', ',']).filter(|word| word.starts_with("--") && word.len() > 2 && *word != "---");
    for option in words {
        assert!(help.contains(option), "{option}");
    }
}

#[test]
fn a_listed_path_that_is_not_there_is_a_failure() {
    let at = tree();
    let push = |list: &str, more: &[&str]| {
        fs::write(at.path().join("list"), list).unwrap();
        lockstep(&[&["push", "--files-from", "list", "data", "there"], more].concat(), at.path())
    };
    push("a b\nsub/empty\n", &[]).code(0);
    let said = "failed: gone: is listed in --files-from, but the source does not have it\n";
    push("a b\ngone\n", &[]).code(4).stderr(said);
    push("a b\ngone\n", &["-n"]).code(4).stderr(said);
    // A rule that leaves it out is meant, and so is its removal.
    push("a b\nsub/large.bin\n", &["--exclude", "*.bin"]).code(0);
    push("a b\ngone\n", &["--exclude", "gone"]).code(0);
    fs::write(at.path().join("there/gone"), "").unwrap();
    push("a b\ngone\n", &["--delete"]).code(0).stdout(contains("1 removed"));
    // One that neither side has is a mistake, and then nothing is removed.
    fs::write(at.path().join("there/gone"), "").unwrap();
    let said = "failed: typo: is listed in --files-from, but the source does not have it\n";
    push("a b\ngone\ntypo\n", &["--delete"]).code(4).stderr(contains(said));
    assert!(at.path().join("there/gone").exists());
}

#[test]
fn a_port_that_is_taken_is_said_once() {
    let at = tempfile::tempdir().unwrap();
    fs::create_dir(at.path().join("root")).unwrap();
    fs::write(at.path().join("keys"), "").unwrap();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let serve =
        ["serve", "--user", "u", "--root", "root", "--authorized-keys", "keys", "--host-key", "key", "--listen"];
    let said = format!(
        "lockstep: cannot listen on {address}: Address already in use; name a free port and an address of this machine \
         with --listen\n"
    );
    lockstep(&[&serve[..], &[&address]].concat(), at.path()).code(5).stderr(predicates::str::ends_with(said));
    // And nobody there is said as what it is.
    drop(taken);
    let port = address.rsplit(':').next().unwrap();
    let push = lockstep(&["push", "-F", "none", "-P", port, "root", "127.0.0.1:/x"], at.path()).code(75);
    let said = "Connection refused; is its SSH server running, on this port (-P)?\n";
    push.stderr(contains(said).count(1));
}

#[test]
fn a_directory_is_not_sent_into_itself() {
    let at = tree();
    let push = |source: &str, target: &str, more: &[&str], code: i32, part: &str| {
        let run = lockstep(&[&["push", source, target], more].concat(), at.path()).code(code);
        let output = run.get_output();
        let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(said.contains(part), "{source} {target}: {said}");
    };
    std::os::unix::fs::symlink("data", at.path().join("alias")).unwrap();
    push("data", "data", &[], 2, "are the same directory");
    push("data", "alias/.", &[], 2, "are the same directory");
    push("data", "data/sub", &[], 2, "'data/sub' lies in 'data'");
    push("alias", "data/new/deep", &[], 2, "'data/new/deep' lies in 'alias'");
    push("data/sub", "data", &["--delete"], 2, "--delete would remove 'data/sub' itself");
    push("data/sub", "data", &["-n"], 0, "nothing was changed");
    push("data", "data/copy", &["--exclude", "/copy/"], 0, "published");
    push("data", "data_2", &[], 0, "published");
}
