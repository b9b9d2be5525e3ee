//! `lockstep policy`: what is found, what is mended, and whether the kernel agrees.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use lockstep::drift::{Question, look};
use lockstep::monitor::Silent;
use lockstep::policy::rights::Subject;

fn root() -> bool {
    rustix::process::geteuid().is_root()
}

/// What is not tested without root is said, so that nobody takes it for tested.
#[allow(clippy::print_stderr)]
fn without_root(what: &str) -> bool {
    if !root() {
        eprintln!("not root: {what} is not tested");
    }
    !root()
}

fn lockstep(arguments: &[&str], at: &Path) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lockstep"));
    command.args(arguments).current_dir(at).env("XDG_STATE_HOME", at.join("state")).env_remove("LOCKSTEP_CONFIG");
    command.output().unwrap()
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// Runs lockstep and gives what it said; the exit code has to be `code`.
fn said(arguments: &[&str], at: &Path, code: i32) -> String {
    let output = lockstep(arguments, at);
    assert_eq!(output.status.code(), Some(code), "{arguments:?}: {}", text(&output));
    text(&output)
}

fn chmod(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

fn mode(path: &Path) -> String {
    format!("{:04o}", fs::metadata(path).unwrap().mode() & 0o7777)
}

fn run(program: &str, package: &str, arguments: &[&str], paths: &[PathBuf]) -> String {
    let output = Command::new(program).args(arguments).args(paths).output();
    let output = output.unwrap_or_else(|_| panic!("{program} is not installed: Debian package {package}"));
    assert!(output.status.success(), "{program}: {}", text(&output));
    String::from_utf8(output.stdout).unwrap()
}

/// A directory that everybody can enter, as that of a test.
fn open_directory() -> tempfile::TempDir {
    let at = tempfile::tempdir().unwrap();
    chmod(at.path(), 0o755);
    at
}

/// What the kernel says to a process of these numbers: paths that it cannot read (files), enter or list (directories).
fn kernel(subject: &Subject, tree: &Path, files: &[PathBuf], directories: &[PathBuf]) -> BTreeMap<PathBuf, String> {
    let script = "for f; do case $f in */) d=${f%/}; if ! read -r _ < \"$d/in\"; then echo \"enter $d\"; else \
                  set -- \"$d\"/*; [ \"$1\" = \"$d/*\" ] && echo \"list $d\"; fi;; \
                  *) read -r _ < \"$f\" || echo \"read $f\";; esac; done 2>/dev/null; exit 0";
    let mut paths: Vec<PathBuf> = files.to_vec();
    paths.extend(directories.iter().map(|directory| directory.join("")));
    let output = if root() {
        let uid = subject.uid.unwrap_or(61_234).to_string();
        let groups: Vec<String> = subject.groups.iter().map(u32::to_string).collect();
        let primary = groups.first().cloned().unwrap_or_else(|| "61234".into());
        let all = groups.join(",");
        let groups = if groups.is_empty() { vec!["--clear-groups"] } else { vec!["--groups", &all] };
        let first = ["--reuid", &uid, "--regid", &primary];
        run("setpriv", "util-linux", &[&first[..], &groups, &["sh", "-c", script, "sh"]].concat(), &paths)
    } else {
        run("sh", "dash", &["-c", script, "sh"], &paths)
    };
    let line = |line: &str| line.split_once(' ').map(|(what, path)| (tree.join(path), what.to_owned()));
    output.lines().filter_map(line).collect()
}

#[test]
fn s11_what_is_said_to_be_unreadable_is_what_the_kernel_refuses() {
    let at = open_directory();
    let tree = at.path().join("tree");
    fs::create_dir(&tree).unwrap();
    let own = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    let everything = !without_root("reading as somebody else");
    let owners: &[(u32, u32)] = if everything { &[(33, 60), (5000, 60), (5000, 33), (5000, 5000)] } else { &[own] };
    let lists =
        ["", "u:33:r", "u:33:---", "g:60:r", "g:60:---", "g:60:---,g:33:r", "g::---,g:60:rx", "u:65534:rwx,g::rx"];
    let (mut files, mut directories) = (Vec::new(), Vec::new());
    let mut by_list: BTreeMap<&str, Vec<PathBuf>> = BTreeMap::new();
    for (&(uid, gid), list) in owners.iter().flat_map(|owner| lists.iter().map(move |list| (owner, list))) {
        for bits in [0o000, 0o400, 0o040, 0o004, 0o640, 0o604, 0o077, 0o620] {
            let path = tree.join(format!("f{}-{uid}-{gid}-{bits:o}", files.len()));
            fs::write(&path, "content\n").unwrap();
            files.push(path.clone());
            by_list.entry(list).or_default().push(path);
        }
        for bits in [0o700, 0o050, 0o010, 0o040, 0o001, 0o005, 0o755, 0o704] {
            let path = tree.join(format!("d{}-{uid}-{gid}-{bits:o}", directories.len()));
            fs::create_dir(&path).unwrap();
            fs::write(path.join("in"), "content\n").unwrap();
            chmod(&path.join("in"), 0o444);
            directories.push(path.clone());
            by_list.entry(list).or_default().push(path);
        }
    }
    for (list, paths) in by_list.iter().filter(|(list, _)| !list.is_empty()) {
        run("setfacl", "acl", &["-m", list], paths);
    }
    for path in files.iter().chain(&directories) {
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        let fields: Vec<&str> = name.split('-').collect();
        if everything {
            chown(path, Some(fields[1].parse().unwrap()), Some(fields[2].parse().unwrap())).unwrap();
        }
        chmod(path, u32::from_str_radix(fields[3], 8).unwrap());
    }
    let subject = |uid, groups: &[u32]| Subject { shown: "somebody".into(), uid, groups: groups.to_vec() };
    let subjects = match everything {
        true => vec![
            subject(Some(33), &[33]),
            subject(Some(33), &[33, 60]),
            subject(Some(65534), &[60]),
            subject(Some(65534), &[65534]),
            subject(Some(7777), &[]),
            subject(None, &[60]),
            subject(Some(0), &[0]),
        ],
        false => vec![subject(Some(own.0), &[own.1])],
    };
    for subject in subjects {
        let question = Question { subject: Some(&subject), ..Question::default() };
        let findings = look(&tree, &question, &Silent::default()).unwrap();
        assert!(findings.problems.is_empty(), "{:?}", findings.problems);
        let ours: BTreeMap<PathBuf, String> =
            findings.unreadable.iter().map(|found| (found.path.clone(), found.what.to_owned())).collect();
        let theirs = kernel(&subject, &tree, &files, &directories);
        let different: Vec<_> = files
            .iter()
            .chain(&directories)
            .filter(|path| ours.get(*path) != theirs.get(*path))
            .map(|path| (path, ours.get(path), theirs.get(path)))
            .collect();
        assert!(different.is_empty(), "{subject:?}: (ours, the kernel's) {different:#?}");
        assert!(subject.uid == Some(0) || !theirs.is_empty());
    }
}

#[test]
fn s11_a_reader_is_told_which_file_or_directory_stands_in_the_way_and_why() {
    if without_root("what another user cannot read") {
        return;
    }
    let at = open_directory();
    let tree = at.path().join("above/tree");
    fs::create_dir_all(tree.join("closed/deep")).unwrap();
    for (name, bits) in
        [("w.bin", 0o600), ("open", 0o644), ("closed/a", 0o644), ("closed/deep/b", 0o644), ("masked", 0o600)]
    {
        fs::write(tree.join(name), "x").unwrap();
        chmod(&tree.join(name), bits);
    }
    chmod(&tree.join("closed"), 0o750);
    run("setfacl", "acl", &["-m", "u:nobody:r,m::-,o::-"], &[tree.join("masked")]);
    chmod(&tree.join("masked"), 0o620);
    let check = |code| said(&["policy", "check", "--user", "nobody", tree.to_str().unwrap()], at.path(), code);
    let said_so = check(1);
    let shown = tree.display();
    for line in [
        format!(
            "'{shown}/w.bin': nobody (uid 65534, groups nogroup) may not read it: owner root, group root, mode 0600: others have no r\n"
        ),
        format!(
            "'{shown}/closed': nobody (uid 65534, groups nogroup) may not enter it: owner root, group root, mode 0750: \
             others have no x, so that 3 paths beneath cannot be reached\n"
        ),
        "mode 0620: the ACL entry user:nobody:r--, which the mask -w- cuts gives no r\n".to_owned(),
        "of 7 paths 6 cannot be read by nobody".to_owned(),
    ] {
        assert!(said_so.contains(&line), "{line}\n in {said_so}");
    }
    assert_eq!(said_so.lines().count(), 4, "{said_so}");

    chmod(&at.path().join("above"), 0o700);
    let said_so = check(1);
    let line = format!("'{}': nobody (uid 65534, groups nogroup) may not enter it", at.path().join("above").display());
    assert!(said_so.starts_with(&line) && said_so.contains("7 paths beneath"), "{said_so}");
    let json = said(&["policy", "check", "--user", "nobody", "--json", tree.to_str().unwrap()], at.path(), 1);
    let first: serde_json::Value = serde_json::from_str(json.lines().next().unwrap()).unwrap();
    assert_eq!(
        (first["event"].as_str(), first["what"].as_str(), first["beneath"].as_u64()),
        (Some("unreadable"), Some("enter"), Some(7))
    );

    chmod(&at.path().join("above"), 0o711);
    said(&["policy", "check", "--group", "root", "above/tree/closed"], at.path(), 0);
    said(&["policy", "check", "--user", "no-such-user", "above/tree"], at.path(), 2);
    said(&["policy", "check", "above/tree"], at.path(), 2);
    said(&["policy", "check", "--user", "nobody", "above/tree/open"], at.path(), 2);
}

const RULES: &str = "[[rule]]\nmatch = \"**\"\nmode = \"640\"\n\n[[rule]]\nmatch = \"**/\"\nmode = \"750\"\n\n\
                     [[rule]]\nmatch = \"logs/\"\nmode = \"1770\"\nacl = [\"group:games:rwx\", \"default:group:games:rx\"]\n\n\
                     [[rule]]\nmatch = \"*.bin\"\nmode = \"744\"\n\n[[rule]]\nmatch = \"tool\"\nmode = \"4755\"\n";

/// A tree that was published by the rules.
fn published() -> tempfile::TempDir {
    let at = open_directory();
    fs::create_dir_all(at.path().join("source/logs")).unwrap();
    for name in ["a", "update.bin", "tool", "logs/x", "odd\nname"] {
        fs::write(at.path().join("source").join(name), format!("content of {name}")).unwrap();
    }
    fs::write(at.path().join("rules.toml"), RULES).unwrap();
    said(&["push", "--policy-file", "rules.toml", "source", "target"], at.path(), 0);
    at
}

const CHECK: &[&str] = &["policy", "check", "--policy-file", "rules.toml", "target"];
const APPLY: &[&str] = &["policy", "apply", "--policy-file", "rules.toml", "target"];

#[test]
fn s11_drift_of_every_kind_is_found_mended_and_recorded() {
    let at = published();
    let target = at.path().join("target");
    assert!(said(CHECK, at.path(), 0).contains("all 6 paths have the permissions that the rules say"));
    let good = |name: &str| (mode(&target.join(name)), getfacl(&target.join(name)));
    let names = ["a", "update.bin", "tool", "logs", "logs/x", "odd\nname"];
    let before: Vec<_> = names.map(good).into();

    chmod(&target.join("a"), 0o666);
    chmod(&target.join("update.bin"), 0o644);
    chmod(&target.join("tool"), 0o755);
    chmod(&target.join("odd\nname"), 0o2640);
    run("setfacl", "acl", &["-x", "g:games"], &[target.join("logs")]);
    run("setfacl", "acl", &["-m", "u:nobody:r"], &[target.join("logs/x")]);
    let found = said(CHECK, at.path(), 1);
    for line in [
        "'a': mode 0666, should be 0640 (rule 1, rules.toml:1)",
        "'update.bin': mode 0644, should be 0744 (rule 4, rules.toml:14)",
        "'tool': mode 0755, should be 4755",
        "'odd\\nname': mode 2640, should be 0640",
        "'logs': acl group::rwx, should be group::rwx,group:games:rwx (rule 3, rules.toml:9)",
        "'logs/x': acl user:nobody:r--,group::r--, should be none",
        "of 6 paths 6 differ from the rules",
    ] {
        assert!(found.contains(line), "{line}\n in {found}");
    }
    let json = said(&[CHECK, &["--json"]].concat(), at.path(), 1);
    assert_eq!(json.lines().filter(|line| line.contains("\"event\":\"drift\"")).count(), 6);

    let would = said(&[APPLY, &["-n"]].concat(), at.path(), 0);
    assert!(would.contains("6 of 6 paths would be mended"), "{would}");
    assert_eq!(mode(&target.join("a")), "0666");
    let mended = said(APPLY, at.path(), 0);
    assert!(mended.contains("'a': mode 0666 -> 0640 (rule 1, rules.toml:1)"), "{mended}");
    assert_eq!(names.map(good).to_vec(), before);
    said(CHECK, at.path(), 0);
    assert!(said(APPLY, at.path(), 0).contains("0 of 6 paths mended"));
    said(&["manifest", "verify", "target"], at.path(), 0);
    said(&["audit", "verify", "target"], at.path(), 0);
    let log = fs::read_to_string(target.join(".lockstep/audit.jsonl")).unwrap();
    assert!(
        log.contains("\"source\":\"policy apply\",\"action\":\"metadata\",\"path\":\"a\",\"mode\":\"0640\""),
        "{log}"
    );
    assert!(said(&["push", "--policy-file", "rules.toml", "source", "target"], at.path(), 0).contains("nothing to do"));
}

fn getfacl(path: &Path) -> String {
    run("getfacl", "acl", &["-cnpE"], &[path.to_owned()])
}

#[test]
fn s10_apply_gives_execute_bits_only_to_what_the_manifest_vouches_for() {
    let at = published();
    let target = at.path().join("target");
    let damage = |name: &str| {
        chmod(&target.join(name), 0o644);
        let time = fs::metadata(target.join(name)).unwrap().modified().unwrap();
        let size = fs::read(target.join(name)).unwrap().len();
        fs::write(target.join(name), vec![b'!'; size]).unwrap();
        fs::File::options().write(true).open(target.join(name)).unwrap().set_modified(time).unwrap();
    };
    damage("update.bin");
    damage("tool");
    fs::write(target.join("new.bin"), "not published").unwrap();
    chmod(&target.join("new.bin"), 0o644);
    let refused = said(APPLY, at.path(), 4);
    for name in ["update.bin", "tool", "new.bin"] {
        assert_eq!(mode(&target.join(name)), "0644", "{refused}");
    }
    assert!(refused.contains("'update.bin': left as it is (mode 0644 -> 0744): it may get execute or set-ID bits only when its content is verified, and it is not what the manifest lists"), "{refused}");
    assert!(refused.contains("'new.bin'") && refused.contains("it is not in the manifest"), "{refused}");
    assert!(
        fs::read_to_string(target.join(".lockstep/audit.jsonl"))
            .unwrap()
            .contains("\"action\":\"refuse\",\"path\":\"tool\"")
    );

    // Nor does a push give them to damaged content.
    fs::write(at.path().join("rules.toml"), RULES.replace("\"640\"", "\"750\"")).unwrap();
    damage("a");
    let pushed = lockstep(&["push", "--policy-file", "rules.toml", "source", "target"], at.path());
    // What was changed with its time put back is noticed, and sent again.
    let sent = fs::read(at.path().join("source/a")).unwrap();
    assert!(pushed.status.success() && fs::read(target.join("a")).unwrap() == sent, "{}", text(&pushed));
    assert_eq!(mode(&target.join("a")), "0750");
}

#[test]
fn s10_h45_apply_gives_nothing_away_that_runs_and_is_not_what_was_published() {
    if without_root("giving files away") {
        return;
    }
    let at = published();
    let target = at.path().join("target");
    fs::write(at.path().join("rules.toml"), RULES.replace("mode = \"4755\"", "mode = \"4755\"\nowner = \"games\""))
        .unwrap();
    // Somebody's own program under the name, with the mode that the rule says already.
    fs::write(target.join("tool"), "content of evil").unwrap();
    std::os::unix::fs::chown(target.join("tool"), Some(65534), None).unwrap();
    chmod(&target.join("tool"), 0o4755);
    let refused = said(APPLY, at.path(), 4);
    assert!(
        refused.contains("'tool': left as it is") && refused.contains("it is not what the manifest lists"),
        "{refused}"
    );
    let found = fs::metadata(target.join("tool")).unwrap();
    assert_eq!(std::os::unix::fs::MetadataExt::uid(&found), 65534);
    // What was published is given to whom it is to belong.
    fs::write(target.join("tool"), "content of tool").unwrap();
    chmod(&target.join("tool"), 0o4755);
    said(APPLY, at.path(), 0);
    let found = fs::metadata(target.join("tool")).unwrap();
    assert_eq!((std::os::unix::fs::MetadataExt::uid(&found), mode(&target.join("tool"))), (5, "4755".into()));
}

#[test]
fn h16_h17_apply_neither_follows_links_nor_changes_what_has_other_names() {
    let at = published();
    let target = at.path().join("target");
    let outside = at.path().join("outside");
    fs::create_dir(&outside).unwrap();
    for name in ["file", "linked"] {
        fs::write(outside.join(name), "keep").unwrap();
        chmod(&outside.join(name), 0o600);
    }
    symlink(&outside, target.join("logs2")).unwrap();
    symlink(outside.join("file"), target.join("link")).unwrap();
    fs::remove_dir_all(target.join("logs")).unwrap();
    symlink(&outside, target.join("logs")).unwrap();
    fs::hard_link(outside.join("linked"), target.join("hard")).unwrap();
    fs::hard_link(target.join("a"), target.join("a2")).unwrap();
    chmod(&target.join("a"), 0o604);
    let refused = said(APPLY, at.path(), 4);
    assert!(
        refused.contains("'hard': left as it is (mode 0600 -> 0640): it has 2 names, 1 of them outside of this tree"),
        "{refused}"
    );
    assert_eq!(
        (mode(&outside.join("file")), mode(&outside.join("linked")), mode(&outside)),
        ("0600".into(), "0600".into(), "0755".into())
    );
    // Both names are in the tree, and the first decides.
    assert_eq!(mode(&target.join("a")), "0640");
}

#[test]
fn h35_apply_waits_for_nobody_and_says_who_has_the_root() {
    let at = published();
    let held = lockstep::root::Root::open(&at.path().join("target")).unwrap();
    let _lock = lockstep::staging::RootLock::take(&held, "ana@gpu01", std::time::Duration::ZERO, &|| false).unwrap();
    chmod(&at.path().join("target/a"), 0o600);
    assert!(said(APPLY, at.path(), 75).contains("in use by ana@gpu01"));
    assert_eq!(mode(&at.path().join("target/a")), "0600");
}

#[test]
fn h48_unknown_names_in_rules_end_check_and_apply() {
    let at = published();
    for line in ["owner = \"no-such-user\"", "group = \"no-such-group\"", "acl = [\"user:no-such-user:r\"]"] {
        fs::write(at.path().join("rules.toml"), format!("[[rule]]\nmatch = \"**\"\nmode = \"640\"\n{line}\n")).unwrap();
        for command in [CHECK, APPLY] {
            assert!(said(command, at.path(), 2).contains("no-such-"));
        }
    }
}

#[test]
fn a_tree_without_a_manifest_is_mended_and_stays_without() {
    let at = open_directory();
    fs::create_dir_all(at.path().join("target/logs")).unwrap();
    fs::write(at.path().join("rules.toml"), RULES).unwrap();
    chmod(&at.path().join("target/logs"), 0o777);
    said(APPLY, at.path(), 0);
    assert_eq!(mode(&at.path().join("target/logs")), "1770");
    assert!(!at.path().join("target/.lockstep").exists());
    if !without_root("mending owners") {
        fs::write(at.path().join("target/w.ckpt"), "x").unwrap();
        fs::write(
            at.path().join("rules.toml"),
            "[[rule]]\nmatch = \"*.ckpt\"\nowner = \"nobody\"\ngroup = \"games\"\nmode = \"600\"\n",
        )
        .unwrap();
        let found = said(CHECK, at.path(), 1);
        assert!(found.contains("owner root, should be nobody, group root, should be games"), "{found}");
        said(APPLY, at.path(), 0);
        let now = fs::metadata(at.path().join("target/w.ckpt")).unwrap();
        assert_eq!((now.uid(), now.gid(), now.mode() & 0o7777), (65534, 60, 0o600));
    }
}

#[test]
fn what_explain_says_of_a_named_policy_has_its_place_in_the_file() {
    let at = open_directory();
    let config = "# First line.\n[[policy.p.rule]]\nmatch = \"**\"\nmode = \"640\"\n\n[[policy.p.rule]]\nmatch = \"*.dcm\"\n\
                  mode = \"640\"\ngroup = \"clinical\"\nacl = [\"group:auditors:r\", \"group::---\"]\n";
    fs::write(at.path().join("config.toml"), config).unwrap();
    chmod(&at.path().join("config.toml"), 0o600);
    let explain = ["policy", "explain", "scans/a.dcm", "--policy", "p", "--config", "config.toml"];
    let explained = said(&explain, at.path(), 0);
    for line in [
        "  acl    group:auditors:r--,group::---\n",
        "Decided by rule 2 of 2, the last that matches (rule 2, config.toml:6):\n",
        "'**' matches too, but comes earlier (rule 1, config.toml:2).\n",
    ] {
        assert!(explained.contains(line), "{line}\n in {explained}");
    }
    said(&["policy", "explain", "x"], at.path(), 2);
    said(&["policy", "explain", "x", "--policy", "q", "--config", "config.toml"], at.path(), 2);
}
